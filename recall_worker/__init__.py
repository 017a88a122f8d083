"""recall-worker: keeps an AI agent's promises to come back.

For applications in Python: `from recall_worker import Recalls, RecallExists`; where they are not
async, `SyncRecalls` in place of `Recalls`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import RecallExists as RecallExists
    from .client import Recalls as Recalls
    from .client_sync import SyncRecalls as SyncRecalls
    from .recall import Recall as Recall

__all__ = ["Recall", "RecallExists", "Recalls", "SyncRecalls"]


def __getattr__(name: str) -> Any:
    # Late, so that the command line does not load the driver before it knows what for.
    if name in ("RecallExists", "Recalls"):
        from . import client

        return getattr(client, name)
    if name == "SyncRecalls":
        from .client_sync import SyncRecalls

        return SyncRecalls
    if name == "Recall":
        from .recall import Recall

        return Recall
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What a pause or a resume of queues has done, and what a person should know beside it, in words:
those of the commands and of the console.

Never here: which queues are meant, and who is asked before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import statements
from ..database.identity import Identity
from ..fleet import SILENCE
from ..terminal import local
from .connection import Connection

Row = Mapping[str, Any]

ALL_PAUSED = "all queues are paused, so nothing is claimed"


def since(row: Row) -> str:
    """Since when a queue is paused, by whom, and why."""
    why = f": {row['reason']}" if row["reason"] else ""
    return f"since {local(row['paused_at'])} by {row['paused_by']}{why}"


def paused(row: Row) -> str:
    """From a row of `pause_queues`."""
    if not row["changed"]:
        return f"paused already, {since(row)}"
    return "paused; current runs are not interrupted"


def resumed(changed: bool) -> str:
    return "resumed" if changed else "was not paused"


def state(conn: Connection, queue: str, here: Identity) -> Row:
    """Whether a queue has recalls, workers, and is paused."""
    values = {"queue": queue, **SILENCE, **here.known}
    row = conn.execute(statements.load("reads")["queue"].encode(), values).fetchone()
    assert row is not None
    return row


def strange(state: Row, queue: str) -> str | None:
    """A question, where the queue's name may be a typing error."""
    if state["has_recalls"] or state["workers"]:
        return None
    return f"queue {queue} has no recalls, and no live worker serves it: is that its name?"


def unserved(state: Row, queue: str) -> str | None:
    """A clause, where a recall that was put into this queue would wait."""
    if state["paused"]:
        return f"queue {queue} is paused"
    return None if state["workers"] else f"no live worker serves queue {queue}"

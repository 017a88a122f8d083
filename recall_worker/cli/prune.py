"""`prune`: delete old recalls that have ended, and old calls: the daemon's own sweep, at once and
without its pauses.
"""

from __future__ import annotations

import time

from .. import settings, statements
from ..recall import FINAL
from ..sweep import Sweep
from ..terminal import USAGE, Trouble, confirmed, print_json, seconds, tell
from .recalls import connect


def prune(
    dsn: str | None,
    *,
    older_than: str | None,
    keep: str | None,
    statuses: list[str] | None,
    yes: bool,
    as_json: bool,
) -> None:
    kept, what = _retention(older_than, keep, statuses)
    if not yes and not confirmed(f"Delete {what}?"):
        raise Trouble("nothing was done", "the same with --yes")
    sql, sweep = statements.load("prune"), Sweep(kept)
    with connect(dsn) as conn:
        while (batch := sweep.next()) is not None:
            began = time.monotonic()
            row = conn.execute(sql[batch.statement].encode(), batch.values).fetchone()
            assert row is not None
            sweep.note(batch, row, time.monotonic() - began)
    calls = sweep.deleted["calls"]
    recalls = sum(sweep.deleted.values()) - calls
    if as_json:
        print_json({"recalls": recalls, "calls": calls})
    tell(f"Deleted {recalls} recalls and the records of {calls} calls.")


def _retention(
    older_than: str | None, keep: str | None, statuses: list[str] | None
) -> tuple[dict[str, float], str]:
    """How long each kind is kept, in seconds, and what is deleted, in words. Raises Trouble."""
    if (older_than is None) == (keep is None):
        raise Trouble(
            "say for how long ended recalls are kept",
            "either --older-than 30d or --keep fired=7d,failed=90d",
            status=USAGE,
        )
    if keep is not None:
        if statuses:
            raise Trouble(
                "--keep and --status are both given",
                "name the statuses in --keep: fired=7d",
                status=USAGE,
            )
        kept, problems = settings.retention(keep)
        if problems or not kept:
            why = "; ".join(problems) or "names nothing"
            raise Trouble(
                f"--keep {why}",
                "--keep 30d, --keep 30d,failed=90d or --keep fired=7d,calls=1d",
                status=USAGE,
            )
        return kept, f"everything past its retention ({keep})"
    assert older_than is not None
    age = seconds(older_than, "--older-than")
    wrong = sorted(set(statuses or []) - set(FINAL))
    if wrong:
        raise Trouble(
            f"{', '.join(wrong)} is not a final status",
            f"--status with one of {', '.join(FINAL)}",
            status=USAGE,
        )
    what = f"{' and '.join(statuses)} recalls" if statuses else "recalls and records of calls"
    return dict.fromkeys(
        statuses or settings.KEPT, age
    ), f"{what} that ended more than {older_than} ago"

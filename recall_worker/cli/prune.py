"""`prune`: delete old recalls that have ended, and old records of calls, actions and failures told:
the daemon's own sweep, at once and without its pauses.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import errors

from .. import settings, statements
from ..recall import FINAL
from ..sweep import Sweep
from ..terminal import USAGE, Trouble, ask, print_json, seconds, tell
from .recalls import connect


def prune(
    dsn: str | None,
    *,
    older_than: str | None,
    keep: str | None,
    statuses: list[str] | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    kept, what = _retention(older_than, keep, statuses)
    sql, sweep = statements.load("prune"), Sweep(kept)
    referring: str | None = None
    with connect(dsn) as conn:
        if dry_run or not yes:
            counts = _count(conn, kept)
            if dry_run and as_json:
                print_json(_of(counts))
            if not any(counts.values()):
                tell("Nothing is old enough to be deleted.")
                return
            tell(f"To delete: {what}:")
            for kind, count in counts.items():
                tell(f"{count:>15,} {_WORDS[kind]}")
            if dry_run:
                tell("Nothing was deleted: --dry-run.")
                return
            ask("Delete them?")
        while (batch := sweep.next()) is not None:
            began = time.monotonic()
            try:
                row = conn.execute(sql[batch.statement].encode(), batch.values).fetchone()
            except (errors.ForeignKeyViolation, errors.RestrictViolation) as error:
                referring = error.diag.table_name
                sweep.refused(batch)
                continue
            assert row is not None
            sweep.note(batch, row, time.monotonic() - began)
    deleted = _of(sweep.deleted)
    if as_json:
        print_json(deleted)
    if sweep.referenced:
        tell(
            f"{sweep.referenced} recalls stay: the table {referring} refers to them. "
            "To let them go, give that foreign key on delete cascade or on delete set null."
        )
    if sweep.vetoed:
        tell(f"{sweep.vetoed} recalls stay: a trigger of session_recalls lets no delete pass.")
    tell(
        f"Deleted {deleted['recalls']:,} recalls and the records of {deleted['calls']:,} calls, "
        f"{deleted['actions']:,} actions and {deleted['failures']:,} failures told."
    )


_WORDS = {
    "fired": "recalls that fired",
    "cancelled": "cancelled recalls",
    "failed": "failed recalls",
    "calls": "records of calls",
    "actions": "records of actions (they stay for a day at least)",
    "failures": "records of failures told",
}


def _count(conn: psycopg.Connection[dict[str, Any]], kept: Mapping[str, float]) -> dict[str, int]:
    """How many of each kind are past their retention; not of kinds that are kept for ever."""
    values = {kind: kept.get(kind) for kind in settings.KEPT}
    row = conn.execute(statements.load("prune")["count"].encode(), values).fetchone()
    assert row is not None
    return {kind: row[kind] for kind in settings.KEPT if kind in kept}


def _of(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts as --json shows them: recalls together, and each kind of record."""
    records = {kind: counts.get(kind, 0) for kind in ("calls", "actions", "failures")}
    return {"recalls": sum(counts.values()) - sum(records.values()), **records}


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
    what = (
        f"{' and '.join(statuses)} recalls"
        if statuses
        else "recalls, and records of calls, actions and failures told,"
    )
    return dict.fromkeys(
        statuses or settings.KEPT, age
    ), f"{what} that ended more than {older_than} ago"

"""The queues: does a live worker serve each that has live recalls, and which are paused?"""

from __future__ import annotations

from .. import statements
from ..fleet import SILENCE
from ..terminal import command, local
from .examination import NOTE, OK, PROBLEM, Examination

SHOWN_MOST = 10
"""Queues of which a finding each is shown."""


async def queues(exam: Examination) -> None:
    values = {**SILENCE, **exam.identity.known}
    cursor = await exam.conn.execute(statements.load("reads")["queues"].encode(), values)
    rows = await cursor.fetchall()
    live = [row for row in rows if row["waiting"] or row["leased"] or row["held_back"]]
    unserved = [row for row in live if not row["workers"] and row["paused_at"] is None]
    paused = [row for row in rows if row["paused_at"] is not None]
    # Where no worker is alive at all, the check of the workers has said so.
    if exam.alive:
        for row in unserved[:SHOWN_MOST]:
            exam.find(
                PROBLEM,
                f"no live worker claims from queue {row['queue']}, which has {row['waiting']:,} "
                f"recalls waiting and {row['leased']:,} in a run",
                f"{command('run', '--queue', row['queue'])}, or "
                f"{command('edit')} ID --queue NAME, if that name is a mistake",
            )
        if len(unserved) > SHOWN_MOST:
            exam.find(
                PROBLEM,
                f"{len(unserved) - SHOWN_MOST:,} more queues have no live worker",
                command("queues"),
            )
    if paused and all(row["all_paused"] for row in paused):
        exam.find(NOTE, f"all queues are paused{_since(paused[0])}", "queues resume --all")
    else:
        for row in paused[:SHOWN_MOST]:
            exam.find(
                NOTE,
                f"queue {row['queue']} is paused{_since(row)}, and {row['due']:,} recalls are due",
                command("queues", "resume", row["queue"]),
            )
    if not paused and not (unserved and exam.alive):
        exam.find(OK, f"{len(live):,} with live recalls, none paused")


def _since(row: dict[str, object]) -> str:
    why = f": {row['reason']}" if row["reason"] else ""
    return f" since {local(row['paused_at'])} by {row['paused_by']}{why}"  # type: ignore[arg-type]

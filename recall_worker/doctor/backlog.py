"""Recalls that wait: overdue ones, those that are held back and why, and recent failures."""

from __future__ import annotations

from .. import statements
from ..fleet import FLEET, fleet_cap, serves
from ..settings import DEFAULT_QUEUE
from ..terminal import command, relative
from .examination import NOTE, OK, PROBLEM, Examination

LATE = 10.0
"""Seconds after which a due recall is reported: a running worker with a free slot claims it within
milliseconds.
"""
OVERDUE = 60.0
"""Seconds after which an overdue recall is a problem and no longer a note: as the alert says."""


async def backlog(exam: Examination) -> None:
    row = await exam.one("overdue", late=LATE)
    if not row["recalls"]:
        exam.find(OK, "nothing is overdue")
        return
    age = (row["now"] - row["since"]).total_seconds()
    seen = (
        f"{row['recalls']:,} overdue, the oldest ({row['oldest']}) due "
        f"{relative(row['since'], row['now'])}"
    )
    if row["leased"]:
        seen += f"; {row['leased']:,} of them have an expired lease"
    serving = [worker for worker in exam.alive if serves(worker, row["queue"] or DEFAULT_QUEUE)]
    full = serving and sum(r["leases"] for r in serving) >= sum(r["slots"] for r in serving)
    todo = (
        "more RECALL_CONCURRENCY or more workers: all slots are taken"
        if full
        else command("why", row["oldest"])
    )
    text = statements.load("reads")["fleet"].encode()
    values = FLEET | exam.identity.known | {"queue": row["queue"]}
    [fleet] = await (await exam.conn.execute(text, values)).fetchall()
    if (cap := fleet_cap(fleet)) is not None:
        seen += f"; {cap}"
        todo = (
            "a higher RECALL_FLEET_CONCURRENCY for all workers, if due recalls can't wait "
            "for these runs to end"
        )
    exam.find(PROBLEM if age > OVERDUE else NOTE, seen, todo)


async def held(exam: Examination) -> None:
    before = len(exam.findings)
    for row in await exam.ask("held"):
        since = relative(row["since"], row["now"])
        seen = f"{row['recalls']:,} {row['by']}, the first {since}" + (
            f"; such as: {row['reason']}" if row["reason"] else ""
        )
        match row["by"]:
            case "misconfigured" | "unavailable":
                exam.find(PROBLEM, seen, "see the endpoint below; every recall is kept")
            case "paused":
                exam.find(
                    NOTE,
                    f"{row['recalls']:,} paused by hand, the first {since}",
                    f"{command('resume')} ID… when they may go on",
                )
            case "capped":
                exam.find(
                    NOTE,
                    seen,
                    "RECALL_SESSION_LIMIT holds them back: does an agent call itself in a loop?",
                )
            case "busy":
                exam.find(OK, seen)
            case _:
                exam.find(NOTE, seen, f"{command('why')} ID explains each of them")
    failed = await exam.one("failed")
    if failed["recalls"]:
        seen = f"{failed['recalls']:,} have failed within a day; such as: {failed['reason']}"
        exam.find(
            NOTE,
            seen,
            (
                f"{command('list', '--status', 'failed')}; {command('retry')} ID… when the cause "
                "is fixed"
            ),
        )
    if len(exam.findings) == before:
        exam.find(OK, "nothing is held back")

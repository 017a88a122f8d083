"""The workers: are any alive, do their settings agree, does another scheduler settle recalls; and
did PostgreSQL's clock go back since they wrote?"""

from __future__ import annotations

from .. import settings, statements
from ..database.identity import COPY, COPY_HINT, PAUSED_HINT
from ..fleet import CLOCK_TOLERANCE, SILENCE, clock_back, differences
from ..terminal import command, relative
from .examination import NOTE, OK, PROBLEM, Examination


async def workers(exam: Examination) -> None:
    cursor = await exam.conn.execute(
        statements.load("reads")["workers"].encode(),
        {**SILENCE, **exam.identity.known},
    )
    rows = await cursor.fetchall()
    exam.alive = alive = [row for row in rows if row["alive"]]
    if not alive:
        waiting = (await exam.one("waiting"))["recalls"]
        seen = "none alive" + (f", and {waiting:,} recalls wait" if waiting else "; nothing waits")
        exam.find(PROBLEM if waiting else NOTE, seen, command("run"))
    else:
        slots, runs = (sum(row[name] for row in alive) for name in ("slots", "leases"))
        exam.find(OK, f"{len(alive)} alive, {runs:,} of {slots:,} slots in a run")
    for row in rows:
        name = row["worker"]
        if row["elsewhere"]:
            seen = f"{name} runs on another database: its row came here with a copy of that one"
            exam.find(NOTE, seen, "nothing: such a row is deleted after a day")
            continue
        if not row["alive"]:
            seen = (
                f"{name} sent its last heartbeat {relative(row['seen_at'], row['now'])}, and "
                "did not deregister"
            )
            exam.find(
                NOTE, seen, "see its log if you don't know why; other workers take over its runs"
            )
            continue
        if row["held"] is not None:
            why = (
                "the database is a copy" if row["held"] == COPY else "it was started with --paused"
            )
            exam.find(
                PROBLEM,
                f"{name} claims nothing: {why}",
                COPY_HINT if row["held"] == COPY else PAUSED_HINT,
            )
        if row["queues"] is None:
            exam.find(
                NOTE,
                f"{name} is of a version without queues: it claims from all of them, so recalls in "
                "other queues than default are refused while it runs",
                "upgrade it before you use queues",
            )
        if row["breaker"] != "closed":
            exam.find(
                PROBLEM,
                f"the breaker is open in {name}: the endpoint is failing; only test calls are "
                "sent until it answers",
                "see the endpoint below",
            )
        if row.get("bell", "listening") != "listening":
            how = (
                "receives no notifications"
                if row["bell"] == "deaf"
                else "has no connection for LISTEN"
            )
            exam.find(
                PROBLEM,
                f"{name} {how}, and finds new recalls only by polls",
                (
                    f"its log (listener.{row['bell']}) says why; its RECALL_LISTEN_DSN must lead "
                    "to the server itself"
                ),
            )
    text = statements.load("reads")["clock_back"].encode()
    cursor = await exam.conn.execute(text, {"id": None, "tolerance": CLOCK_TOLERANCE})
    [clock] = await cursor.fetchall()
    if (back := clock_back(clock)) is not None:
        exam.find(
            PROBLEM,
            back,
            "the database server's clock, if it is wrong now; if it was wrong before, "
            "recall-worker reschedule ID for what must not wait",
        )
    if alive:
        others = await exam.one("settled_by_others", since=min(row["started_at"] for row in alive))
        if others["recalls"]:
            were = "recall was" if others["recalls"] == 1 else "recalls were"
            seen = (
                f"{others['recalls']:,} {were} marked fired by others than the workers "
                f"within an hour, for example {others['last']}"
            )
            todo = (
                "if the application's old scheduler still runs beside the workers, turn it off: "
                "docs/migration.md"
            )
            exam.find(NOTE, seen, todo)
    for what, values in differences(alive):
        exam.find(
            NOTE,
            f"live workers differ in {what}: {', '.join(values)}",
            "upgrade the package tzdata of the others, too"
            if what == "tzdata"
            else f"the same {settings.variable(what)} for all",
        )
    if len(versions := {row["version"] for row in alive}) > 1:
        exam.find(
            NOTE,
            f"live workers differ in version: {', '.join(sorted(versions))}",
            "upgrade the others, too",
        )

"""The workers: are any alive, do their settings agree, does another scheduler settle recalls?"""

from __future__ import annotations

from .. import settings, statements
from ..fleet import SILENT_AFTER, differences
from ..terminal import command, relative
from .examination import NOTE, OK, PROBLEM, Examination


async def workers(exam: Examination) -> None:
    cursor = await exam.conn.execute(
        statements.load("reads")["workers"].encode(), {"silence": SILENT_AFTER}
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
        if not row["alive"]:
            seen = (
                f"{name} sent its last heartbeat {relative(row['seen_at'], row['now'])}, and "
                "did not deregister"
            )
            exam.find(
                NOTE, seen, "see its log if you don't know why; other workers take over its runs"
            )
            continue
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
            f"the same {settings.variable(what)} for all",
        )
    if len(versions := {row["version"] for row in alive}) > 1:
        exam.find(
            NOTE,
            f"live workers differ in version: {', '.join(sorted(versions))}",
            "upgrade the others, too",
        )

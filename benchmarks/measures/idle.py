"""The cost of an idle replica."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from ..contenders import OURS, PEERS, Contest
from ..figures import judged, number, table
from ..ground import Ground, memory, tree
from .wake import STATISTICS_LAG

TITLE = "Idle"
SLOTS = 50


def measure(contest: Contest) -> dict[str, Any]:
    ground = contest.ground
    seconds = 15.0 if ground.quick else 120.0
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        fields = {
            name: stack.enter_context(contest.field(name)) for name in contest.present(OURS, *PEERS)
        }
        for field in fields.values():
            field.start(SLOTS)
            field.settle_down()
            field.end_writing()
        # Its transactions belong to no contender, and it runs the more often the more was written.
        stack.callback(_autovacuum, ground, "on")
        _autovacuum(ground, "off")
        time.sleep(STATISTICS_LAG + 1)
        # What PostgreSQL itself does in a database that nobody uses.
        nobody = stack.enter_context(ground.database())
        before = {name: (field.transactions(), field.cpu()) for name, field in fields.items()}
        alone = ground.transactions(nobody)
        time.sleep(seconds)
        for name, field in fields.items():
            found[name] = {
                "cpu_ms": (field.cpu() - before[name][1]) * 1000 * 60 / seconds,
                "mib": sum(memory(pid) for pid in tree(field.processes[0].pid)),
                "connections": field.connections(),
            }
            field.stop()
        time.sleep(0.5)
        alone = ground.transactions(nobody) - alone
        for name, field in fields.items():
            found[name]["transactions"] = (
                (field.transactions() - before[name][0] - (0 if field.redis else alone))
                * 60
                / seconds
            )
    return found


def _autovacuum(ground: Ground, state: str) -> None:
    ground.maintenance.execute(f"alter system set autovacuum = {state}".encode())
    ground.maintenance.execute("select pg_reload_conf()")


def report(found: dict[str, Any]) -> str:
    rows = [
        [
            name,
            number(f["transactions"]),
            number(f["cpu_ms"]),
            number(f["mib"]),
            str(f["connections"]),
        ]
        for name, f in found.items()
    ]
    section = "Without autovacuum, and less the transactions of a database that nobody uses.\n\n"
    section += (
        table(
            [
                "",
                "transactions a minute",
                "CPU a minute, ms",
                "resident memory, MiB",
                "connections",
            ],
            rows,
        )
        + "\n"
    )
    section += judged("transactions a minute", found[OURS]["transactions"], 6)
    python = [name for name in ("procrastinate", "PgQueuer") if name in found]
    if python:
        leanest = min(python, key=lambda name: float(found[name]["mib"]))
        section += judged(
            f"memory against the leanest Python peer's ({leanest})",
            found[OURS]["mib"] / found[leanest]["mib"],
            1.0,
            unit=" ×",
        )
    return section

"""The cost of the table's triggers for the application that inserts: pgbench with 32 clients, while
no worker runs. And what a table costs that is full already.
"""

from __future__ import annotations

import re
import subprocess
from typing import Any

from ..contenders import CONTENDERS, OURS, PEERS, Contest, Field, rotated
from ..figures import judged, ratio, shown, spread, table
from .timers import load

TITLE = "Inserting: pgbench, 32 clients"
PLAIN, LATER, NEAR = (
    "recall-worker, triggers off",
    "recall-worker, due in two hours",
    "recall-worker, due now",
)
IDLE = "recall-worker, a trigger that does nothing"
FULL = "recall-worker, due in two hours, table filled"


def measure(contest: Contest) -> dict[str, Any]:
    quick = contest.ground.quick
    # Those that write a row by one statement: pgbench can send it.
    written = [name for name in PEERS if CONTENDERS[name].one]
    peers = [] if quick else contest.present(*written)
    contest.present(OURS)
    names = [PLAIN, IDLE, LATER, NEAR, *peers]
    found: dict[str, Any] = {name: [] for name in (*names[:3], FULL, *names[3:])}
    with contest.field(OURS) as full:
        # Pending for another day, and as many settled.
        load(full, 1, 20_000 if quick else 1_000_000)
        for round in range(1 if quick else 3):
            _round(contest, rotated(names, round), found, 2 if quick else 5)
            full.connection.execute("checkpoint")
            found[FULL].append(_pgbench(full, "now() + interval '2 hours'", 2 if quick else 5))
    return found


def _round(contest: Contest, names: list[str], found: dict[str, Any], seconds: int) -> None:
    for name in names:
        ours = name in (PLAIN, IDLE, LATER, NEAR)
        with contest.field(OURS if ours else name) as field:
            if name == PLAIN:
                field.connection.execute("alter table session_recalls disable trigger user")
            elif name == IDLE:
                field.connection.execute(
                    "create or replace function recall_before_insert() returns trigger "
                    "language plpgsql as"
                    " 'begin return new; end'"
                )
            due = "now() + interval '2 hours'" if name in (PLAIN, IDLE, LATER) else "now()"
            found[name].append(_pgbench(field, due, seconds))


def _pgbench(field: Field, due: str, seconds: int) -> float:
    """Inserts a second."""
    text = CONTENDERS[field.contender.name].one
    for name, value in (
        ("session", "gen_random_uuid()::text"),
        ("message", "'Look at the build again, and say whether it is green.'"),
        ("due", due),
    ):
        text = text.replace(f"%({name})s", f"({value})")
    script = field.ground.scratch / "insert.sql"
    script.write_text(" ".join(text.split()) + ";\n")
    command = [
        field.ground.server.bindir / "pgbench",
        "-n",
        "-c",
        "32",
        "-j",
        "2",
        "-T",
        str(seconds),
        "-f",
        script,
        field.dsn,
    ]
    output = subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"tps = ([\d.]+)", output)
    assert found is not None, output
    return float(found[1])


def report(found: dict[str, Any]) -> str:
    plain = found[PLAIN]
    rows = [
        [name, shown(spread(rates)), "" if name == PLAIN else shown(ratio(rates, plain))]
        for name, rates in found.items()
    ]
    section = table(["", "inserts/s", "of those with triggers off"], rows) + "\n"
    section += judged(
        "recalls due later", ratio(found[LATER], plain)["median"], 0.95, at_least=True, unit=" ×"
    )
    if FULL in found:
        section += judged(
            "recalls due later, table filled, against those in an empty table",
            ratio(found[FULL], found[LATER])["median"],
            0.95,
            at_least=True,
            unit=" ×",
        )
    near = spread(found[NEAR])["median"]
    return section + (
        "\nA recall due within a minute sends a notification, which takes a lock of the whole "
        f"database at commit: {near:,.0f} such inserts a second are the most here. An "
        "application that approaches this rate should insert recalls due later than a minute, "
        "notify once for many, or use polling: connect with "
        "`options=-crecall_worker.rings=off`, and set RECALL_POLL_INTERVAL to the lateness "
        "that it accepts.\n"
    )

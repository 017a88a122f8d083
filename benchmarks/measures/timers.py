"""From a due instant to the request's arrival; the same with millions of rows in the table; and the
cost of a claim then.
"""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import psycopg

from recall_worker import statements
from recall_worker.database.connection import STATEMENT_DEADLINE, transaction_setup
from recall_worker.database.ledger import Ledger

from ..contenders import OURS, PEERS, Contest, Field, rotated
from ..figures import judged, number, percentile, shown, spread, table

TITLE = "Timers: from due to request"
STEP = timedelta(milliseconds=20)
LOADED = "recall-worker, table filled"
CLAIMED = 10
LOAD = """
insert into session_recalls (id, session_id, call_type, trigger_at, additional_context_message,
    status, created_at, updated_at, planned_at{more})
select '{prefix}' || n, '{prefix}' || n, 'once', now() + {due}, 'Look at the build again.',
    '{status}', now(), now(), now() + {due}{values}
from generate_series({first}, {last}) n"""
DUE = """
insert into session_recalls (id, session_id, call_type, trigger_at, additional_context_message,
    status, created_at, updated_at, queue)
select 'c-' || n, 'c-' || n, 'once', now(), 'Look at the build again.', 'pending', now(), now(),
    %(queue)s
from generate_series(1, %(n)s) n"""
MARKS = """
insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, session_id, worker,
    lease, scheduled_for, called_at, last_called_at, ended_at, http_status, settled)
select 's' || n, 1, 0, 1, 'answered', 's' || n, 'worker', gen_random_uuid(), now(), now(), now(),
    now() - interval '1 day', 200, 'fired'
from generate_series({first}, {last}) n"""


def measure(contest: Contest) -> dict[str, Any]:
    quick = contest.ground.quick
    names = contest.present(OURS, *PEERS)
    late: dict[str, Any] = {name: [] for name in names}
    for round in range(1 if quick else 3):
        for name in rotated(names, round):
            with contest.field(name) as field:
                late[name].append(_lateness(field, 60 if quick else 200))
    sizes = (1_000, 20_000) if quick else (1_000, 30_000, 1_000_000)
    claims: dict[str, Any] = {}
    with contest.field(OURS) as field:
        so_far = 0
        for size in sizes:
            load(field, so_far + 1, size)
            so_far = size
            claims[str(size)] = claim_time(field)
        late[LOADED] = [_lateness(field, 60 if quick else 200) for _ in range(1 if quick else 3)]
    return {"late": late, "claims": claims, "rows": sizes[-1]}


def _lateness(field: Field, instants: int) -> dict[str, Any]:
    sink = field.ground.sink
    if not field.processes:
        field.start(10)
    field.settle_down()
    start = field.scalar("select clock_timestamp() + interval '3 seconds'")
    prefix = f"p-{time.monotonic_ns()}-"
    due = {f"{prefix}{n}": start + n * STEP for n in range(instants)}
    for session, at in due.items():
        field.insert(session, at)
    # PostgreSQL is on this host and uses this clock.
    offset = time.time_ns() - time.monotonic_ns()
    sink.wait(3 + instants * STEP.total_seconds() + 12, probes=instants)
    arrived = sink.probes()
    late = [
        (arrived[s] + offset - at.timestamp() * 1e9) / 1e6 for s, at in due.items() if s in arrived
    ]
    if not late:
        raise RuntimeError(f"{field.contender.name} does not call: {field.log()[-2000:]}")
    return {
        "least": min(late),
        "p50": percentile(late, 0.5),
        "p99": percentile(late, 0.99),
        "most": max(late),
        "never": instants - len(late),
    }


def load(field: Field, first: int, last: int) -> None:
    """Write recalls that wait for another day, and as many settled ones with their calls. Without
    triggers, which are for what applications write.
    """
    field.connection.execute("set session_replication_role = replica")
    for prefix, due, status, more, values in (
        ("w", "interval '1 day' + n * interval '1 second'", "pending", "", ""),
        (
            "s",
            "interval '-1 day'",
            "fired",
            ", attempt, last_outcome, ended_at, scheduled_for",
            ", 1, 'answered', now(), now()",
        ),
    ):
        text = LOAD.format(
            prefix=prefix, due=due, status=status, more=more, values=values, first=first, last=last
        )
        field.connection.execute(text.encode())
    field.connection.execute(MARKS.format(first=first, last=last).encode())
    field.connection.execute("reset session_replication_role")
    field.connection.execute("vacuum analyze session_recalls, recall_attempts")


def claim_time(field: Field, queue: str = "default") -> dict[str, Any]:
    """Milliseconds of a claim of ten rows of one queue as the worker makes it: prepared, and
    committed. And its plan.
    """
    took, plan = asyncio.run(_claims(field, queue))
    field.connection.execute("vacuum session_recalls")
    return {"ms": spread(took), "plan": plan}


async def _claims(field: Field, queue: str) -> tuple[list[float], list[str]]:
    ledger, took = Ledger(field.dsn, "bench", 60.0, queues=[queue]), []
    values = {"n": CLAIMED, "queue": queue}
    try:
        for n in range(60):
            field.connection.execute(DUE.encode(), values)
            began = time.perf_counter()
            claimed = await ledger.claim(CLAIMED)
            if n >= 10:
                took.append((time.perf_counter() - began) * 1000)
            assert len(claimed.claims) == CLAIMED, claimed
            field.connection.execute("delete from session_recalls where id like 'c-%'")
    finally:
        await ledger.close()
    field.connection.execute(DUE.encode(), values)
    with psycopg.connect(field.dsn, autocommit=True) as connection:
        setup = {"pid": connection.pgconn.backend_pid} | transaction_setup(STATEMENT_DEADLINE)
        sql = statements.load("ledger")
        connection.execute(sql["session_setup"].encode(), setup, prepare=False)
        explained = connection.execute(
            b"explain (analyze, buffers, costs off) " + sql["claim"].encode(),
            ledger._claim_values(CLAIMED, 0.0) | {"aside": []},
            prepare=False,
        ).fetchall()
    field.connection.execute("delete from session_recalls where id like 'c-%'")
    return took, [str(row[0]) for row in explained]


def report(found: dict[str, Any]) -> str:
    rows = [
        [
            name,
            *(
                shown(spread([run[figure] for run in runs]))
                for figure in ("least", "p50", "p99", "most")
            ),
        ]
        for name, runs in found["late"].items()
    ]
    section = "Milliseconds; recalls due 20 ms apart:\n\n" + table(
        ["", "least", "p50", "p99", "most"], rows
    )
    section += (
        f"\n*{LOADED}*: {found['rows']:,} recalls pending for later, and as many settled, "
        "each with its mark.\n\n"
    )
    for name in (OURS, LOADED):
        section += judged(
            f"p99, {name}",
            spread([run["p99"] for run in found["late"][name]])["median"],
            10,
            unit=" ms",
        )
    claims = found["claims"]
    section += (
        "\nA claim of ten rows, with so many recalls pending for later and as many settled:\n\n"
    )
    section += table(
        ["rows", "milliseconds, median", "least"],
        [
            [f"2 × {int(size):,}", number(claim["ms"]["median"]), number(claim["ms"]["least"])]
            for size, claim in claims.items()
        ],
    )
    smallest, *_, largest = claims.values()
    grown = largest["ms"]["median"] / smallest["ms"]["median"]
    section += "\n" + judged("claim time from the fewest rows to the most", grown, 1.2, unit=" ×")
    section += (
        "\n<details><summary>The plan with the most rows</summary>\n\n```\n"
        + "\n".join(largest["plan"])
        + "\n```\n\n</details>\n"
    )
    return section


def plot(found: dict[str, Any], axes: Any) -> None:
    names = list(found["late"])
    for figure, offset in (("p50", -0.2), ("p99", 0.2)):
        values = [
            max(0.1, spread([run[figure] for run in found["late"][name]])["median"])
            for name in names
        ]
        axes.barh([n + offset for n in range(len(names))], values, 0.38, label=figure)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("milliseconds from due to request")
    axes.legend()

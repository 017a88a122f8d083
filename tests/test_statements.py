"""sql/ as it is written and as PostgreSQL plans it: every statement compiles, and the worker's
never read the table through.

The plans are those of the very statements that the ledger sends, prepared as psycopg prepares them
and with the values that the ledger gives; once planned for these values, once for any, with and
without statistics, and with statistics that tell of another day.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import ClientCursor, sql
from psycopg_pool import AsyncNullConnectionPool

from recall_worker import RecallExists, Recalls, schema, statements
from recall_worker.agent import AgentTools
from recall_worker.database import connection as connection_module
from recall_worker.database import ledger as ledger_module
from recall_worker.database.ledger import Ledger, Stale
from recall_worker.database.outbox import Outbox
from recall_worker.database.pipeline import numbered
from recall_worker.endpoint.postgres import PostgresStore
from recall_worker.endpoint.store import GoesOn, Start, Started
from recall_worker.recall import (
    Accepted,
    After,
    AsMoved,
    Busy,
    Claim,
    Defer,
    Ending,
    Finish,
    Placement,
)
from recall_worker.settings import KEPT
from recall_worker.sweep import Sweep

from .conftest import connected
from .process.test_lease import eventually
from .support import postgres
from .support.endpoint import Endpoint
from .support.pgbouncer import PgBouncer
from .support.recorder import Recorder
from .test_cli import operate
from .test_completion import completed
from .test_console import news, served
from .test_ledger import put
from .test_recall import claim_with

FILES = sorted(path.stem for path in statements.folder().glob("*.sql"))
NAMED = [(file, name) for file in FILES for name in statements.load(file)]
PLACEHOLDER = re.compile(r"%\((\w+)\)s")
WORKER = "w"
LEASE = 60.0
FEW = 5
"""Rows in hand, and rows that are due besides."""


def text_of(file: str) -> str:
    return (statements.folder() / f"{file}.sql").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES)
def test_names_are_unique(file: str) -> None:
    """No statement hides behind another one of the same name, and none is without a name or a
    body."""
    names = re.findall(r"^-- name: (.*)$", text_of(file), re.MULTILINE)
    assert names == list(statements.load(file))
    assert all(statements.load(file).values())


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[f"{file}-{name}" for file, name in NAMED])
def test_comments_are_dropped(file: str, name: str) -> None:
    """What is sent is one statement: no comment is left, no `%` but in placeholders, no
    semicolon."""
    statement = statements.load(file)[name]
    assert "--" not in statement
    assert "%" not in PLACEHOLDER.sub("", statement)
    assert ";" not in statement


def test_a_percent_sign_in_a_comment_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """psycopg would read `%` in a comment as a placeholder: before, behind and between the lines it
    is dropped with its comment."""
    (tmp_path / "odd.sql").write_text(
        "-- 100% of it\n-- name: one\n-- 50% (done)s\nselect 1 -- 7%\n    -- and 8%s\n    + 1;\n"
    )
    monkeypatch.setattr(statements, "folder", lambda: tmp_path)
    assert [
        line.strip() for line in statements.load("odd")["one"].splitlines() if line.strip()
    ] == ["select 1", "+ 1"]
    statements.load.cache_clear()


@pytest.fixture(scope="module")
def migrated(server: str, template: str) -> Iterator[str]:
    """A database to ask for plans."""
    with postgres.database(server, template) as dsn:
        yield dsn


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[f"{file}-{name}" for file, name in NAMED])
def test_every_statement_is_planned_with_nulls(file: str, name: str, migrated: str) -> None:
    """PostgreSQL knows every table, column, function and type that a statement names, whatever
    values it will be given."""
    statement = statements.load(file)[name]
    nothing = dict.fromkeys(PLACEHOLDER.findall(statement))
    with psycopg.connect(migrated, autocommit=True) as conn:
        assert conn.execute(f"explain {statement}".encode(), nothing).fetchall()


@pytest.mark.parametrize("name", ["claim", "take_up", "moved"])
def test_a_claim_is_made_of_columns_as_they_come(name: str, migrated: str) -> None:
    """An answer's columns are a claim's fields, in that order, with dates for ages: nothing but
    this test would notice two that change places."""
    dates = {"begun_age": "begun_at", "lag": "due_at", "delivered_age": "delivered_at"}
    statement = statements.load("ledger")[name]
    with psycopg.connect(migrated, autocommit=True) as conn:
        answer = conn.execute(statement.encode(), dict.fromkeys(PLACEHOLDER.findall(statement)))
        assert answer.description is not None
        expected = [
            dates.get(field, field) for field in Claim._fields if field not in ("lateness", "due")
        ]
        assert [column.name for column in answer.description] == expected


# --- plans ----------------------------------------------------------------------------------------

FILL = """
insert into sessions select 's' || n, 'u' || n % 100 from generate_series(1, {half} + {due}) n;
alter table session_recalls set (autovacuum_enabled = off);
alter table recall_attempts set (autovacuum_enabled = off);
alter table session_recalls disable trigger user;
insert into session_recalls
    (id, session_id, call_type, trigger_at, interval_seconds, additional_context_message, status,
        created_at, updated_at)
select 'old' || n, 's' || n, 'once', now() - n * interval '1 second', null, 'over', (array['fired',
    'cancelled', 'failed'])[1 + n % 3],
    now(), now()
from generate_series(1, {half}) n
union all
select 'far' || n, 's' || n, (array['once', 'recurring', 'immediate'])[1 + n % 3],
    now() + interval '1 year' + n * interval '1 second',
    case when n % 3 = 1 then 60 end, 'not yet', '{first}', now(), now()
from generate_series(1, {half}) n;
insert into recall_attempts
    (recall_id, occurrence, rekey, attempt, outcome, session_id, worker, lease, scheduled_for,
        ended_at, settled)
select 'old' || n, 1, 0, a, 'unknown', 's' || n, 'w', gen_random_uuid(), now(), now(), 'pending'
from generate_series(1, {half}) n, generate_series(1, 2) a;
"""
DUE = """
insert into session_recalls
    (id, session_id, call_type, trigger_at, interval_seconds, additional_context_message, status,
        created_at, updated_at)
select 'due' || n, 's' || {half} + n, 'once', now() - n * interval '1 second', null, 'now',
    'pending', now(), now()
from generate_series(1, {due}) n;
alter table session_recalls enable trigger user;
"""


def filled(dsn: str, half: int, statistics: str, due: int = 2 * FEW) -> None:
    """`half` rows that wait for next year, `half` that are over, and `due` that are due."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        another_day = statistics == "another day"
        conn.execute(
            FILL.format(half=half, due=due, first="fired" if another_day else "pending").encode()
        )
        if another_day:
            conn.execute("analyze")
            conn.execute("update session_recalls set status = 'pending' where id like 'far%'")
        conn.execute(DUE.format(half=half, due=due).encode())
        if statistics == "fresh":
            conn.execute("analyze")


NAMES = [
    "claim",
    "ended_leases",
    "take_up",
    "sent",
    "message",
    "next_due",
    "stale",
    "write_moves",
    "renew",
    "check_leases",
    "settle",
    "backlog",
]


class Enough(Exception):
    """The ledger has said what it asks."""


class Table:
    """A filled table with a few rows in hand, and the plans of what the ledger asks of it."""

    def __init__(self, dsn: str, claims: Sequence[Claim]) -> None:
        self.dsn = dsn
        self.claims = list(claims)

    async def asked(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[str, Mapping[str, Any]]:
        """The statement and the values that the ledger sends."""
        said: list[tuple[str, Mapping[str, Any]]] = []

        async def ask(
            _: object, statement: str, values: Mapping[str, Any], **more: object
        ) -> list[Any]:
            said.append((statement, values))
            raise Enough

        ledger = Ledger(self.dsn, WORKER, LEASE)
        leases = {claim.id: claim.lease for claim in self.claims}
        now = time.monotonic()
        with monkeypatch.context() as patched, pytest.raises(Enough):
            patched.setattr(connection_module.QueryConnection, "ask", ask)
            match name:
                case "claim":
                    await ledger.claim(2 * FEW)
                case "ended_leases":
                    await ledger.ended_leases()
                case "take_up":
                    await ledger.take_up([claim.id for claim in self.claims])
                case "sent":
                    await ledger.sent(self.claims[0])
                case "message":
                    await ledger.message(self.claims[0])
                case "next_due":
                    await ledger.next_due(claimed_at=now)
                case "stale":
                    await ledger.stale([])
                case "write_moves":
                    await ledger.write_moves(
                        [
                            (claim, Placement(claim.occurrence + 1, AsMoved(), 0))
                            for claim in self.claims
                        ]
                    )
                case "renew":
                    await ledger.renew(leases)
                case "backlog":
                    await ledger.backlog()
                case "check_leases":
                    await ledger.check_leases(leases)
                case "settle":
                    await ledger.settle(
                        [
                            (
                                Ending(c, Busy(409), 0.1, 0.2, now),
                                Defer(After(60.0), "the session is busy"),
                            )
                            for c in self.claims
                        ]
                    )
        return said[0]

    def plan(
        self,
        statement: str,
        values: Mapping[str, Any],
        mode: str,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """The plan by which PostgreSQL did what was asked; nothing of it stays. `meanwhile()`: what
        happens between its being made and used."""
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            if meanwhile is not None:
                conn.execute("set plan_cache_mode = force_generic_plan")
                conn.execute("set enable_seqscan = off")
            # Prepared by asking for nothing.
            nothing: dict[str, Any] = {
                k: [] if isinstance(v, list) else 0 if k == "slots" else v
                for k, v in values.items()
            }
            conn.execute(statement.encode(), nothing, prepare=True)
            found = conn.execute(
                "select name from pg_prepared_statements where not from_sql"
            ).fetchall()
            assert len(found) == 1
            order = dict.fromkeys(PLACEHOLDER.findall(statement))
            listed = ", ".join(f"%({name})s" for name in order)
            conn.execute(f"set plan_cache_mode = force_{mode}_plan".encode())
            if meanwhile is not None:
                meanwhile()
            with conn.transaction(force_rollback=True), ClientCursor(conn) as cursor:
                cursor.execute(
                    (
                        f"explain (analyze, buffers, timing off, format json) execute "
                        f"{found[0][0]} "
                        f"({listed})"
                    ).encode(),
                    values,
                )
                row = cursor.fetchone()
        assert row is not None
        plan: dict[str, Any] = row[0][0]["Plan"]
        return plan


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def buffers(plan: dict[str, Any]) -> int:
    """Pages touched by the most expensive part: what only writes is not among those of the
    whole."""
    return max(int(n["Shared Hit Blocks"] + n["Shared Read Blocks"]) for n in nodes(plan))


def touched(node: dict[str, Any]) -> float:
    """Rows that passed through a node of a plan, those that it threw away included."""
    thrown_away = (node.get(f"Rows Removed by {by}", 0) for by in ("Filter", "Join Filter"))
    return float((node["Actual Rows"] + sum(thrown_away)) * node["Actual Loops"])


@contextmanager
def crowd(
    server: str, template: str, half: int, statistics: str, due: int = 2 * FEW, held: int = FEW
) -> Iterator[Table]:
    """A table filled in a database of its own; `held` of its due rows are claimed."""
    with postgres.database(server, template) as dsn:
        filled(dsn, half, statistics, due)
        # In a thread of its own, as a test's loop may be running here.
        with ThreadPoolExecutor() as threads:
            claimed = threads.submit(asyncio.run, _claimed(dsn, min(held, due))).result()
        yield Table(dsn, claimed)


async def _claimed(dsn: str, slots: int) -> list[Claim]:
    ledger = Ledger(dsn, WORKER, LEASE)
    try:
        return (await ledger.claim(slots)).claims
    finally:
        await ledger.close()


@pytest.fixture(scope="module", params=["none", "fresh", "another day"])
def crowded(request: pytest.FixtureRequest, server: str, template: str) -> Iterator[Table]:
    """A hundred thousand rows, half of them live, in three states that the planner's statistics can
    be in."""
    with crowd(server, template, 50_000, request.param) as table:
        yield table


@pytest.mark.parametrize("mode", ["custom", "generic"])
@pytest.mark.parametrize("name", NAMES)
async def test_only_indexes_are_used(
    name: str, mode: str, crowded: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the planner believes, a statement comes to its few rows by indexes: nothing is read
    through, nothing large is sorted."""
    plan = crowded.plan(*await crowded.asked(name, monkeypatch), mode)
    read_through = [n["Relation Name"] for n in nodes(plan) if n["Node Type"] == "Seq Scan"]
    assert "session_recalls" not in read_through and "recall_attempts" not in read_through
    assert max(map(touched, nodes(plan))) <= 10 * FEW
    assert buffers(plan) <= 80 * FEW


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
async def test_a_plan_that_was_made_of_empty_tables_serves_full_ones(
    name: str, server: str, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is often older than its tables' rows: what it prepared when there were none must not
    come to read through them."""

    def filled_in() -> None:
        with psycopg.connect(dsn, autocommit=True) as conn:
            # No word to the planner: neither by DDL nor by an analyze.
            conn.execute("set session_replication_role = replica")
            for statement in (FILL, DUE):
                conn.execute(
                    re.sub("alter table[^;]*;", "", statement)
                    .format(half=50_000, due=2 * FEW, first="pending")
                    .encode()
                )

    with postgres.database(server, template) as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn:
            for table in ("session_recalls", "recall_attempts"):
                conn.execute(f"alter table {table} set (autovacuum_enabled = off)".encode())
        crowd = Table(
            dsn,
            [
                claim_with(id=f"due{n + 1}", session_id=f"s{50_001 + n}", lease=uuid4())
                for n in range(FEW)
            ],
        )
        plan = crowd.plan(*await crowd.asked(name, monkeypatch), "generic", filled_in)
    assert max(map(touched, nodes(plan))) <= 10 * FEW
    assert buffers(plan) <= 80 * FEW


@pytest.mark.slow
@pytest.mark.parametrize("name", ["claim", "ended_leases", "next_due"])
@pytest.mark.parametrize("due", [0, 5_000], ids=["nothing due", "thousands due"])
async def test_a_look_costs_the_same_at_any_size(
    name: str, due: int, server: str, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages that it touches depend on what it takes, not on how many rows wait or are over: a
    hundred times as many are no more."""
    cost: dict[str, list[int]] = {"custom": [], "generic": []}
    for half in (500, 50_000):
        with crowd(server, template, half, "fresh", due) as table:
            asked = await table.asked(name, monkeypatch)
            for mode in cost:
                cost[mode].append(buffers(table.plan(*asked, mode)))
    for few, many in cost.values():
        assert max(few, many) <= (80 * FEW if due else 30)
        assert many <= 1.5 * few + 10


@pytest.mark.parametrize("mode", ["custom", "generic"])
async def test_a_backlog_is_counted_to_a_bound(
    mode: str, server: str, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything overdue, what monitoring asks touches no more rows than it may count, and
    finds the oldest among them."""
    monkeypatch.setattr(ledger_module, "BACKLOG_MOST", 1000)
    with crowd(server, template, 500, "fresh", due=20_000) as table:
        plan = table.plan(*await table.asked("backlog", monkeypatch), mode)
    assert max(n["Actual Rows"] * n["Actual Loops"] for n in nodes(plan)) <= 1000
    # The tables of workers and of paused queues have a few rows, and a few queues are sorted.
    read_through = [n["Relation Name"] for n in nodes(plan) if n["Node Type"] == "Seq Scan"]
    assert set(read_through) <= {"recall_workers", "recall_queues"}
    assert max((n["Actual Rows"] for n in nodes(plan) if n["Node Type"] == "Sort"), default=0) <= 5
    assert buffers(plan) <= 5000


@pytest.mark.parametrize("mode", ["custom", "generic"])
async def test_a_large_batch_looks_up_one_by_one(
    mode: str, crowded: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five hundred endings at once, all of recalls that are gone: their marks are looked for by
    key, not by reading all marks there are."""
    claim, *_ = crowded.claims
    gone = Table(crowded.dsn, [claim._replace(id=f"gone{n}", lease=uuid4()) for n in range(500)])
    plan = gone.plan(*await gone.asked("settle", monkeypatch), mode)
    looked_up = [
        n
        for n in nodes(plan)
        if n.get("Relation Name") == "recall_attempts" and n["Node Type"] != "ModifyTable"
    ]
    assert looked_up and "Seq Scan" not in [n["Node Type"] for n in looked_up]
    assert max(map(touched, looked_up)) <= 500


@pytest.mark.parametrize("mode", ["custom", "generic"])
@pytest.mark.parametrize("name", ["claim", "settle"])
async def test_a_large_batch_costs_no_more_for_each_row(
    name: str, mode: str, server: str, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three hundred rows of a table of two thousand, which the planner knows to be as small, and
    which it may read through once: no row is compared with all that are due, nor with all others of
    its batch, and no list of their ids is sorted anew for each of them."""
    half, due = 10, 2_000
    with crowd(server, template, half, "fresh", due=due, held=300) as table:
        assert len(table.claims) == 300
        statement, values = await table.asked(name, monkeypatch)
        plan = table.plan(statement, {**values, "slots": 300} if name == "claim" else values, mode)
    assert plan["Actual Rows"] == 300
    assert max(map(touched, nodes(plan))) <= due + 2 * half
    repeated = [n for n in nodes(plan) if n["Actual Loops"] > 10]
    assert not [n for n in repeated if "InitPlan" in n.get("Index Cond", "")]


@pytest.mark.parametrize("statistics", ["none", "of the others"])
@pytest.mark.parametrize("mode", ["custom", "generic"])
@pytest.mark.parametrize("name", ["claim", "next_due"])
async def test_what_is_due_in_another_queue_is_not_read(
    name: str,
    mode: str,
    statistics: str,
    server: str,
    template: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten rows of this worker's queue behind ten thousand that have long been due in another one,
    also where these are all that the planner knows of."""
    with postgres.database(server, template) as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("set session_replication_role = replica")
            conn.execute(FILL.format(half=10, due=2 * FEW, first="pending").encode())
            conn.execute(
                "insert into session_recalls (id, session_id, call_type, trigger_at, "
                "additional_context_message, status, created_at, updated_at, queue) "
                "select 'other' || n, 'o' || n, 'once', now() - interval '1 day', 'now', "
                "'pending', now(), now(), 'others' from generate_series(1, 10000) n"
            )
            if statistics != "none":
                conn.execute("analyze")
            conn.execute(DUE.format(half=10, due=2 * FEW).encode())
        table = Table(dsn, [])
        plan = table.plan(*await table.asked(name, monkeypatch), mode)
    assert max(map(touched, nodes(plan))) <= 10 * FEW
    assert buffers(plan) <= 80 * FEW


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["none", "fresh"])
async def test_the_runs_of_thousands_are_renewed_each_by_itself(
    statistics: str, server: str, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thousand runs are renewed by a plan that looks each of them up once: by an id and a list
    of all ids it sorted the list for each, and the leases of thousands ended meanwhile."""
    with crowd(server, template, 10, statistics, due=2_000, held=2_000) as table:
        asked = await table.asked("renew", monkeypatch)
        plan = table.plan(*asked, "generic")
    assert plan["Actual Rows"] == 2_000
    assert max(map(touched, nodes(plan))) <= 2 * 2_000
    repeated = [n for n in nodes(plan) if n["Actual Loops"] > 10]
    assert not [n for n in repeated if "InitPlan" in n.get("Index Cond", "")]


# --- what is executed -----------------------------------------------------------------------------

WHOLE = {
    numbered(statement)[0].decode(): f"{file}/{name}"
    for file, name in NAMED
    for statement in [statements.load(file)[name]]
}
"""The statements as PostgreSQL must receive them, and their names. Equal texts count as one."""
OUR_ROWS = re.compile(
    r"\b(from|join|into|update) "
    r"(session_recalls|recall_(attempts|actions|workers|endpoints|chores|queues))\b"
)
"""What only statements of sql/ read and write. (recall_schema is the migrations' own.)"""
REFUSING = """
create function refuse() returns trigger language plpgsql as
    $$ begin raise check_violation using message = 'not this one'; end $$;
create trigger refuse before update on session_recalls
    for each row when (old.id = 'refused') execute function refuse();
"""


async def give_one_up(ledger: Ledger, dsn: str, db: psycopg.AsyncConnection[Any]) -> None:
    """A connection is given up in the middle of a query: the next one ends it first. (Asked for on
    a connection without a transaction, in which pg_stat_activity would not change.)"""
    async with connected(dsn) as holder, holder.transaction():
        await holder.execute("lock table recall_schema in access exclusive mode")
        asking = asyncio.create_task(ledger.schema())
        await eventually(
            db,
            "select 1 from pg_stat_activity "
            "where wait_event_type = 'Lock' and datname = current_database()",
        )
        asking.cancel()
        await asyncio.wait((asking,))


async def use_the_ledger(dsn: str, db: psycopg.AsyncConnection[Any]) -> None:
    """Every method of a ledger, on recalls of its own."""
    ledger = Ledger(dsn, WORKER, LEASE, fleet=100)
    try:
        await ledger.schema()
        await give_one_up(ledger, dsn, db)
        await ledger.schema()
        for id in ("called", "accepted", "refused"):
            await put(db, f"s-{id}", id=id)
        await db.execute(REFUSING.encode())
        claims = {claim.id: claim for claim in (await ledger.claim(10)).claims}
        assert set(claims) == {"called", "accepted"}, "one is refused, the others are claimed"
        called, accepted = claims["called"], claims["accepted"]
        leases = {id: claim.lease for id, claim in claims.items()}
        await ledger.next_due(claimed_at=None)
        await ledger.ended_leases()
        await ledger.take_up(["called"])
        await ledger.message(called)
        await ledger.sent(called)
        await ledger.write_moves([(called, Placement(called.occurrence, AsMoved(), 0))])
        await ledger.moved()
        await ledger.known_elsewhere({"Mars/Olympus"})
        await ledger.stale(())
        await ledger.replan(
            [(Stale("called", None, "UTC", datetime.now(UTC), "now", 0, True), None, False)]
        )
        await ledger.settle_moved([(called, Finish("fired", None))])
        await ledger.accept(accepted, Accepted("run-1", 202), 0.1)
        await ledger.count_session_runs("s-called", [(3600.0, 1)])
        await ledger.renew(leases)
        await ledger.check_leases(leases)
        ending = Ending(called, Busy(409), 0.1, 0.2, time.monotonic())
        await ledger.settle_waiting(ending, Defer(After(60.0), "the session is busy"))
        await ledger.probe("endpoint", 1.0, wanted=True, fresh=False, pause_most=30.0)
        await ledger.endpoint_answers("endpoint")
        facts = {
            "host": "h",
            "pid": 1,
            "version": "1",
            "slots": 3,
            "running": 0,
            "breaker": "closed",
            "bell": "listening",
        }
        await ledger.heartbeat(facts, {})
        await ledger.notify("somebody")
        await ledger.backlog(failures=True)
        await ledger.next_failure()
        await use_the_outbox(dsn, db)
        assert await ledger.take_turn(60.0) is None
        sweep = Sweep(dict.fromkeys(KEPT, 3600.0))
        while (batch := sweep.next()) is not None:
            sweep.note(batch, await ledger.prune(batch), 0.01)
        await ledger.end_turn(0.0)
        await ledger.deregister()
        await db.execute(b"drop function refuse cascade; delete from sessions")
    finally:
        await ledger.close()


async def use_the_outbox(dsn: str, db: psycopg.AsyncConnection[Any]) -> None:
    """A recall that fails, as it is told; the trigger's own statements are not of sql/."""
    outbox = Outbox(dsn, WORKER)
    try:
        await outbox.subscribe()
        await put(db, "s-failed", id="failed")
        await db.execute("update session_recalls set status = 'failed' where id = 'failed'")
        [entry] = await outbox.take(1, 60.0)
        await outbox.record(entry, http_status=204, delivered=True)
    finally:
        await outbox.close()


async def use_recalls(dsn: str, db: psycopg.AsyncConnection[Any]) -> None:
    """The application's side."""
    await db.execute("insert into sessions values ('s', 'ann')")
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        recalls = Recalls()
        made = await recalls.schedule("s", "m", cron="0 9 * * *", conn=conn)
        await recalls.preview(made.id, conn=conn)
        await recalls.skip_next("s", conn=conn)
        await recalls.reschedule(made.id, datetime.now(UTC) + timedelta(days=1), conn=conn)
        await recalls.update(made.id, times=3, conn=conn)
        await recalls.update(made.id, message="another", conn=conn)
        await recalls.list(conn=conn)
        await recalls.list(session_id="s", conn=conn)
        await recalls.list(user_id="ann", conn=conn)
        await recalls.due(conn=conn)
        await recalls.next_trigger_at(conn=conn)
        await recalls.sessions_with_pending(["s"], conn=conn)
        await recalls.cancel("s", conn=conn)
        await recalls.mark_fired(made.id, conn=conn)
        async with conn.transaction():
            await Recalls(schema="public").list(conn=conn)
        # An id that is too short for ours comes from its column's default.
        await db.execute(
            b"delete from session_recalls; alter table session_recalls "
            b"alter column id type varchar(20), "
            b"alter column id set default left(gen_random_uuid()::text, 20)"
        )
        await recalls.schedule("s", "m", conn=conn)
        with pytest.raises(RecallExists):
            await recalls.schedule("s", "another", conn=conn)
        await recalls.cancel("s", conn=conn)
        await db.execute(
            b"alter table session_recalls alter column id type text, alter column id drop default"
        )


async def use_an_agent(dsn: str, db: psycopg.AsyncConnection[Any]) -> None:
    """The agent's side."""
    await db.execute("insert into sessions values ('agents', 'ann')")
    async with AsyncNullConnectionPool(dsn, max_size=1, open=False) as pool:
        tools = AgentTools(Recalls(pool), "agents")
        await tools.schedule("m", every="1h")
        await tools.skip()
        await tools.reschedule(after="1h")
        await tools.cancel()
        await tools.list(ended=True)


async def use_the_repairs(dsn: str, db: psycopg.AsyncConnection[Any]) -> None:
    """What `migrate` asks for where something is missing, or rows have to change."""
    # Twice the same slot, as in a table that never had the index over one pending recall.
    await asyncio.to_thread(schema.migrate, dsn, pending_most=2)
    await db.execute("drop index idx_recalls_active_pending")
    await db.execute("alter table session_recalls disable trigger user")
    for _ in range(2):
        await put(db, "crowded")
    await db.execute("alter table session_recalls enable trigger user")
    await asyncio.to_thread(schema.migrate, dsn, pending_most=4)
    await db.execute("drop table recall_endpoints")
    await db.execute("drop index idx_recalls_due")
    await asyncio.to_thread(schema.migrate, dsn)
    await db.execute("drop table session_recalls")
    await asyncio.to_thread(schema.migrate, dsn)


def use_the_commands(dsn: str) -> None:
    """The operator's side, every command that asks the database for something."""
    id = operate(dsn, "schedule", "s", "m", "--every", "1h", "--in", "1h").out.strip()
    for words in (
        "list",
        "list --session s",
        "list --user ann",
        "list --state due --user ann --limit 1",
        f"show {id}",
        f"show {id[:8]}",
        f"why {id}",
        "actions",
        "events",
        "pause --state live --yes",
        "resume --state paused --dry-run",
        "prune --older-than 30d --dry-run",
        "workers",
        "stats",
        "top",
        "queues",
        "queues pause default",
        "queues resume default",
        f"edit {id} --queue mail",
        f"skip {id}",
        f"pause {id}",
        f"resume {id}",
        f"fire {id}",
        f"reschedule {id} --in 1h",
        f"edit {id} --every 2h --comment note",
        f"edit {id} --times 9",
        f"cancel {id} --yes",
        f"retry {id}",
        "cancel --session s --yes",
        "prune --older-than 30d --yes",
    ):
        done = operate(dsn, *words.split())
        assert done.status == 0, (words, done)
    for words in ("show ", "list --queue "):
        assert completed(f"recall-worker {words}", RECALL_DSN=dsn)
    assert operate(dsn, "list", columns=20).status == 0
    assert operate(dsn, "pause", id).status == 1, "it is over, and is said to be"
    assert operate(dsn, "list", environ={"RECALL_SCHEMA": "nowhere"}).status == 1


async def use_the_endpoint(dsn: str) -> None:
    """What the endpoint kit asks of its own tables."""
    store = PostgresStore(dsn, schema=None, lease=LEASE)
    await store.open()
    try:
        run = Start("k:1", "s", "x", uuid4())
        assert await store.begin(run, 3) == Started(1, False)
        assert await store.look(run.key, run.session_id) == GoesOn()
        await store.stored(run)
        await store.accepted(run)
        assert await store.renew([(run.session_id, run.lease)]) == {run.lease}
        assert await store.ended([run.key]) == set()
        await store.undo(run)
        await store.begin(run, 3)
        await store.cancel(run.key, run.session_id, "{}")
        assert not await store.finish(run, "completed", "{}")
        lock = uuid4()
        assert await store.take("s", lock)
        await store.free("s", lock)
        await store.give_up(run.key, run.session_id, "{}")
        await store.prune(0.0)
    finally:
        await store.close()


async def use_the_console(dsn: str, db: psycopg.AsyncConnection[Any]) -> None:
    """What its pages ask besides."""
    await put(db, "s-shown", 3600.0, id="shown")
    async with served(dsn) as site:
        await site.page("/recalls?queue=mail")
        for path in ("/", "/agenda", "/recalls?state=live", "/recalls/shown", "/failures"):
            await site.page(path)
        assert (await site.post("/recalls/shown/fire", seen="as it was"))[0] == 409
        async with site.session.get(f"{site.root}/live?part=recall&id=shown"):
            async with site.session.get(f"{site.root}/live?part=now") as page:
                await news(page)


async def use_migrate(dsn: str, db: psycopg.AsyncConnection[Any]) -> None:
    """What is asked where the record of the migrations, or of the database, is lost."""
    await db.execute("truncate recall_identity")
    await asyncio.to_thread(schema.migrate, dsn)
    await db.execute("alter table recall_identity rename to elsewhere")
    assert not await asyncio.to_thread(schema.is_copy, dsn)
    await db.execute("alter table elsewhere rename to recall_identity")
    cursor = await db.execute("select obj_description('recall_schema'::regclass) as comment")
    [row] = await cursor.fetchall()
    comment = sql.SQL("comment on table recall_schema is {}")
    await db.execute("delete from recall_schema")
    await db.execute(comment.format(sql.NULL))
    assert schema.RECORD in await asyncio.to_thread(schema.pending, dsn)
    await db.execute(comment.format(sql.Literal(row["comment"])))
    assert await asyncio.to_thread(schema.migrate, dsn) == [schema.RECORD]
    # A table that was never adopted, and a key that is asked for.
    await db.execute("create schema app")
    await db.execute("create table app.session_recalls (id text)")
    with pytest.raises(schema.Refused):
        await asyncio.to_thread(schema.pending, dsn, schema="app")
    await db.execute("drop schema app cascade")
    await db.execute("create table conversations (id text primary key)")
    await asyncio.to_thread(schema.migrate, dsn, foreign_key="conversations")
    await db.execute("drop table conversations cascade")


@pytest.mark.slow
async def test_what_is_executed_stands_in_the_files_and_each_statement_is(
    database: str, bouncer: PgBouncer, endpoint: Endpoint
) -> None:
    """What PostgreSQL receives is each statement of sql/, whole; no other one touches the rows."""
    pooled = Recorder(bouncer.way_to(database))
    async with Recorder(database) as recorder, pooled, connected(database) as db:
        await use_the_ledger(pooled.dsn, db)
        await use_the_ledger(recorder.dsn, db)
        await use_recalls(recorder.dsn, db)
        await use_an_agent(recorder.dsn, db)
        await use_the_endpoint(recorder.dsn)
        await asyncio.to_thread(use_the_commands, recorder.dsn)
        await use_the_console(recorder.dsn, db)
        await use_migrate(recorder.dsn, db)
        await put(db, "overdue", -3600.0)
        environ = {
            "RECALL_RUN_URL": endpoint.url,
            "RECALL_RUN_TOKEN": "token",
            "RECALL_PRUNE": "fired=1d",
            "RECALL_FAILURE_URL": endpoint.url.replace("{session_id}", "failures"),
        }
        # Without a running worker `doctor` asks other questions than with one.
        await asyncio.to_thread(operate, recorder.dsn, "doctor", environ=environ)
        await db.execute(
            "insert into recall_workers (worker, host, pid, version, slots, settings)"
            " values ('w', 'h', 1, '1', 3, '{}')"
        )
        await asyncio.to_thread(operate, recorder.dsn, "doctor", environ=environ)
        await use_the_repairs(recorder.dsn, db)
    received = recorder.statements | pooled.statements
    assert not [name for text, name in WHOLE.items() if text not in received]
    # `doctor` puts a word before a statement, to ask for its rights.
    others = {text.removeprefix("explain ") for text in received} - set(WHOLE)
    assert not [text for text in others if OUR_ROWS.search(text)]

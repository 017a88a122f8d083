"""Commits that PostgreSQL holds up, and backends that do not end: what is given up is cancelled at
the server, and never more connections are open there than are counted. And commits in two phases,
which PostgreSQL refuses to what has notified."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import psycopg
import pytest

from recall_worker import schema
from recall_worker.database.budget import CONNECTIONS_MOST, ConnectionBudget, NoPlace
from recall_worker.database.connection import (
    DatabaseUnavailable,
    Deadlines,
    QueryConnection,
    StatementRejected,
)
from recall_worker.database.ledger import Ledger
from recall_worker.embedded import EmbeddedServer

from .conftest import Connection, connected
from .process.test_lease import eventually, rows
from .support import postgres
from .support.application import CREATE_TABLES
from .support.proxy import Proxy

NAME = "recall-worker ledger w"
SHORT = Deadlines(statement=1.0, connect=2.0)
WRITING = "insert into sessions values (%(id)s, 'ann') returning id"


@pytest.fixture(scope="module")
def own_server() -> Iterator[EmbeddedServer]:
    """A PostgreSQL that could have a standby, with the application's tables, adopted."""
    server = postgres.embedded(
        settings={
            "wal_level": "replica",
            "max_wal_senders": "4",
            "max_prepared_transactions": "4",
        }
    )
    with server:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
        schema.migrate(server.dsn())
        yield server


@pytest.fixture
async def primary(own_server: EmbeddedServer) -> AsyncIterator[Connection]:
    """The test's own connection, whose commits wait for nobody; no rows, no standby at the end."""
    async with connected(own_server.dsn()) as conn:
        await conn.execute("set synchronous_commit = local")
        await conn.execute("truncate sessions cascade")
        yield conn
        await standby(conn, "")


async def standby(conn: Connection, name: str) -> None:
    """Have every commit wait for a standby of this name; of none where it is empty."""
    await conn.execute(f"alter system set synchronous_standby_names = '{name}'".encode())
    await conn.execute("select pg_reload_conf()")
    # It is the checkpointer that tells all backends of it, when it comes to it.
    async with asyncio.timeout(60):
        while await a_commit_waits(conn) != bool(name):
            pass


async def a_commit_waits(conn: Connection) -> bool:
    """Whether a commit that another connection makes now is held up. That is ended here."""
    async with connected(conn.info.dsn) as probe:
        writing = asyncio.create_task(probe.execute("create temporary table probe ()"))
        state = "select wait_event from pg_stat_activity where pid = %s"
        while not writing.done():
            ((seen,),) = [row.values() for row in await rows(conn, state, [probe.info.backend_pid])]
            if seen == "SyncRep":
                await conn.execute("select pg_cancel_backend(%s)", [probe.info.backend_pid])
                await writing
                return True
            await asyncio.sleep(0.01)
        await writing
    return False


async def backends(conn: Connection, name: str = NAME) -> list[int]:
    """The backends of this application_name, as PostgreSQL counts them."""
    cursor = await conn.execute(
        "select pid from pg_stat_activity where application_name = %s order by backend_start",
        [name],
    )
    return [row["pid"] for row in await cursor.fetchall()]


async def pid_of(line: QueryConnection) -> int:
    return int((await line.ask("select pg_backend_pid() as pid", {}))[0]["pid"])


@pytest.mark.slow
async def test_a_commit_that_waits_is_cancelled_and_stands(
    own_server: EmbeddedServer, primary: Connection
) -> None:
    """The answer comes after the deadline, on the same connection, and says that only this server
    has it; once commits pass, the next one is like any other."""
    line = QueryConnection(own_server.dsn(), NAME, SHORT, [])
    pid = await pid_of(line)
    await standby(primary, "nobody")
    for n in range(3):
        assert await line.ask(WRITING, {"id": f"s{n}"}) == [{"id": f"s{n}"}]
        assert line.unreplicated
        assert await backends(primary) == [pid]
    assert await line.ask("select count(*) as n from sessions", {}) == [{"n": 3}]
    assert not line.unreplicated, "what only reads waits for nobody"
    await standby(primary, "")
    assert await line.ask(WRITING, {"id": "s"}) == [{"id": "s"}]
    assert not line.unreplicated
    assert await backends(primary) == [pid]
    await line.close()


@pytest.mark.slow
async def test_who_is_cancelled_leaves_no_backend_behind(
    own_server: EmbeddedServer, primary: Connection
) -> None:
    """A task that is ended while its commit waits: nobody reads the answer, and the backend ends
    all the same."""
    line = QueryConnection(own_server.dsn(), NAME, Deadlines(statement=10, connect=2), [])
    await pid_of(line)
    await standby(primary, "nobody")
    asking = asyncio.create_task(line.ask(WRITING, {"id": "s"}))
    await eventually(primary, "select 1 from pg_stat_activity where wait_event = 'SyncRep'")
    asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking
    await line.close()
    await eventually(
        primary,
        "select 1 where not exists (select from pg_stat_activity where application_name = %s)",
        [NAME],
        within=5,
    )


@pytest.mark.slow
async def test_a_claim_that_no_standby_confirmed_says_so(
    own_server: EmbeddedServer, primary: Connection
) -> None:
    """The rows are leased, on this server alone: the claim returns them with that; so do renewals
    and settles tell of it."""
    confirmed: list[bool] = []
    ledger = Ledger(own_server.dsn(), "w", 4.0, committed=confirmed.append)
    await ledger.schema()
    await primary.execute("insert into sessions values ('s', 'ann')")
    await primary.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, created_at, updated_at) "
        "values ('r', 's', 'once', now(), 'look', now(), now())"
    )
    await standby(primary, "nobody")
    claimed = await ledger.claim(1)
    assert ([claim.id for claim in claimed.claims], claimed.confirmed) == (["r"], False)
    lease = claimed.claims[0].lease
    assert await ledger.renew({"r": lease}) == {"r": "renewed"}
    await standby(primary, "")
    assert await ledger.renew({"r": lease}) == {"r": "renewed"}
    assert confirmed == [False, False, True]
    assert (await ledger.claim(1)).confirmed, "what writes nothing waits for nobody"
    assert len(await backends(primary)) == 2
    await ledger.close()


@pytest.mark.slow
async def test_a_query_that_can_be_cancelled_costs_no_connection(
    own_server: EmbeddedServer, primary: Connection
) -> None:
    """A backend that stood still and goes on: it gets the cancel, and is asked again."""
    async with Proxy(own_server.dsn()) as proxy:
        line = QueryConnection(proxy.dsn, NAME, Deadlines(statement=2.0, connect=2.0), [])
        pid = await pid_of(line)
        asking = asyncio.create_task(line.ask("select pg_sleep(30)", {}))
        await eventually(primary, "select 1 from pg_stat_activity where wait_event = 'PgSleep'")
        os.kill(pid, signal.SIGSTOP)
        # A cancel comes on a connection of its own.
        await proxy.until(lambda: proxy.connections == 2)
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(DatabaseUnavailable) as outage:
            await asking
        assert outage.value.timed_out
        assert await pid_of(line) == pid
        await line.close()


@pytest.mark.slow
async def test_no_more_connections_than_are_counted(
    own_server: EmbeddedServer, primary: Connection
) -> None:
    """Backends that nothing ends: each is replaced while there is a place, then nothing is opened
    any more; when they end, it goes on."""
    budget, most = ConnectionBudget(3), 3
    siblings: list[QueryConnection] = []
    line = QueryConnection(own_server.dsn(), NAME, SHORT, siblings, budget=budget)
    stopped: list[int] = []
    try:
        reason = ""
        while not reason:
            try:
                stopped.append(await pid_of(line))
            except DatabaseUnavailable as full:
                reason = full.reason
                break
            os.kill(stopped[-1], signal.SIGSTOP)
            with pytest.raises(DatabaseUnavailable, match="no answer"):
                await line.ask("select 1", {})
            assert len(await backends(primary)) <= most
        assert "have not ended" in reason
        assert len(stopped) == most - 1
        for _ in range(3):
            with pytest.raises(DatabaseUnavailable, match="have not ended"):
                await line.ask("select 1", {})
            assert len(await backends(primary)) <= most
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(5):
        while True:
            with suppress(DatabaseUnavailable):
                pid = await pid_of(line)
                break
    assert pid not in stopped
    await eventually(
        primary,
        "select 1 from pg_stat_activity where application_name = %s having count(*) = 1",
        [NAME],
    )
    await line.close()


@pytest.mark.slow
async def test_a_peer_that_was_forgotten_is_ended(
    own_server: EmbeddedServer, primary: Connection
) -> None:
    """The network swallows what passes, and no cancel helps: the backend is ended by way of the
    next connection, and counted until then."""
    budget = ConnectionBudget()
    async with Proxy(own_server.dsn()) as proxy:
        line = QueryConnection(proxy.dsn, NAME, SHORT, [], budget=budget)
        await pid_of(line)
        proxy.blackhole()
        for _ in range(2):
            with pytest.raises(DatabaseUnavailable):
                await line.ask("select 1", {})
            assert (budget.counted, len(budget.given_up[0])) == (1, 1)
        proxy.heal()
        pid = await pid_of(line)
        await eventually(
            primary,
            "select 1 from pg_stat_activity where application_name = %s having count(*) = 1",
            [NAME],
        )
        assert await backends(primary) == [pid]
        assert budget.counted == 1
        await line.close()


async def test_a_refusal_gives_nothing_up(own_server: EmbeddedServer, primary: Connection) -> None:
    """A statement that PostgreSQL refuses, or ends by its own deadline, costs no place."""
    budget = ConnectionBudget()
    line = QueryConnection(own_server.dsn(), NAME, SHORT, [], budget=budget)
    with pytest.raises(StatementRejected):
        await line.ask("select 1 / %(n)s", {"n": 0})
    assert (budget.counted, budget.given_up) == (1, ([], []))
    await line.close()
    assert budget.counted == 0


def test_places() -> None:
    """Pure: a place ends once, a given-up one counts until it is gone, and a number that is used
    again is no longer the old backend's."""
    budget = ConnectionBudget()
    places = [budget.take() for _ in range(CONNECTIONS_MOST)]
    with pytest.raises(NoPlace):
        budget.take()
    for n, place in enumerate(places):
        place.opened(n, "ä" * 40)
    places[0].free()
    places[0].give_up()
    assert (budget.counted, budget.given_up) == (CONNECTIONS_MOST - 1, ([], []))
    places[1].give_up()
    places[1].free()
    places[2].pooled()
    places[2].give_up()
    assert budget.given_up == ([1], ["ä" * 31])
    assert budget.counted == CONNECTIONS_MOST - 2
    budget.take().opened(1, "again")
    assert budget.given_up == ([], [])
    assert budget.is_full is False


# --- two phases -----------------------------------------------------------------------------------

LEASED = """
update session_recalls set lease = gen_random_uuid(), lease_until = now() + interval '1 hour',
    leased_at = now() where id = 'r'
"""
"""As in a run."""
ROW = """
insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds,
    additional_context_message, status, created_at, updated_at)
values ('r', 's', 'recurring', now() + interval '30 seconds', 60, 'look', 'pending', now(), now())
"""
EARLIER = "update session_recalls set trigger_at = now() - interval '1 s' where id = 'r'"
TWO_PHASES = {
    "insert": ("", ROW),
    "reschedule": (ROW, EARLIER),
    "skip": (
        ROW
        + "; update session_recalls set cadence = 'cron', cron = '0 9 * * *', time_zone = 'UTC'",
        "update session_recalls set trigger_at = trigger_at + interval_seconds * interval '1 s' "
        "where session_id = 's' and status = 'pending' and call_type = 'recurring'",
    ),
    "edit": (
        ROW
        + "; update session_recalls set cadence = 'cron', cron = '0 9 * * *', time_zone = 'UTC'",
        "update session_recalls set cron = '0 10 * * *'",
    ),
    "make live again": (
        ROW + "; update session_recalls set status = 'cancelled'",
        "update session_recalls set status = 'pending'",
    ),
    "cancel in mid-run": (
        ROW + ";" + LEASED,
        "update session_recalls set status = 'cancelled', updated_at = now() "
        "where session_id = 's' and status = 'pending'",
    ),
    "mark in mid-run": (
        ROW + ";" + LEASED,
        "update session_recalls set status = 'fired', updated_at = now() where id = 'r'",
    ),
    "delete the session in mid-run": (ROW + ";" + LEASED, "delete from sessions where id = 's'"),
}
"""What was there, and what the application does then: each has a trigger that notifies."""


@pytest.mark.parametrize("act", TWO_PHASES)
async def test_a_commit_in_two_phases(
    act: str, own_server: EmbeddedServer, primary: Connection
) -> None:
    """With recall_worker.rings off every statement of the application can be prepared and
    committed, and what it did stands; on, or with a value that means nothing, PostgreSQL says why
    not."""
    before, statement = TWO_PHASES[act]
    async with connected(own_server.dsn()) as app:
        for value in (None, "on", "nonsense", "", "off"):
            await primary.execute("truncate sessions cascade")
            await primary.execute("insert into sessions values ('s', 'ann')")
            if before:
                await primary.execute(before.encode())
            if value is not None:
                await app.execute("select set_config('recall_worker.rings', %s, false)", [value])
            await app.execute("begin")
            cursor = await app.execute(statement.encode())
            assert cursor.rowcount == 1
            if value != "off":
                with pytest.raises(psycopg.errors.FeatureNotSupported, match="NOTIFY"):
                    await app.execute("prepare transaction 'two'")
                await app.execute("rollback")
                continue
            await app.execute("prepare transaction 'two'")
            await app.execute("commit prepared 'two'")
            seen = await app.execute("select status from session_recalls where id = 'r'")
            ended = {"cancel in mid-run": "cancelled", "mark in mid-run": "fired"}
            assert [row["status"] for row in await seen.fetchall()] == (
                [] if act.startswith("delete") else [ended.get(act, "pending")]
            )

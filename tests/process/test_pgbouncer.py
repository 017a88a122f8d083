"""PgBouncer in transaction mode: all that goes through it, and what does not: the notify, which
needs a direct connection, and is missed loudly.

Several server connections are in the pool, and other clients use them, so that what was left behind
on one would be found.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from recall_worker import RecallExists, Recalls, schema

from ..conftest import Connection, connected
from ..support import postgres
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from ..support.pgbouncer import PgBouncer, pooler
from ..support.proxy import Proxy
from ..test_cli import operate
from .test_corridor import soon
from .test_lease import calls, eventually, promise, rows
from .test_listener import listening
from .test_ops import read, scrape, value
from .test_outage import same_process

POOLER = (
    "notifications do not arrive: a transaction pooler, which LISTEN does not pass, is in between"
)


@pytest.fixture
def pooled(database: str, bouncer: PgBouncer) -> str:
    """The DSN of the test's database, through pgbouncer."""
    return bouncer.way_to(database)


@asynccontextmanager
async def busy(dsn: str, clients: int = 3) -> AsyncIterator[None]:
    """Other clients of the pool, so that no two transactions of ours in a row get the same server
    connection by habit."""

    async def client() -> None:
        async with connected(dsn) as conn:
            conn.prepare_threshold = None
            while True:
                await conn.execute("select pg_sleep(0.002)")
                await asyncio.sleep(0.003)

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def left_behind(pooled: str) -> list[dict[str, object]]:
    """What the pool's server connections hold that their servers did not give them: asked on
    several of them at once."""

    async def ask() -> dict[str, object]:
        async with await psycopg.AsyncConnection.connect(pooled) as conn:
            conn.prepare_threshold = None
            cursor = await conn.execute(
                "select pg_backend_pid(), current_setting('lock_timeout'), "
                "current_setting('statement_timeout'), "
                "current_setting('default_transaction_isolation'), current_setting('search_path'), "
                "(select count(*) from pg_prepared_statements), "
                "(select count(*) from pg_locks where locktype = 'advisory' and pid = "
                "pg_backend_pid()), pg_sleep(0.2)"
            )
            [(pid, *found, _)] = await cursor.fetchall()
            return {"pid": pid, "found": found}

    return list(await asyncio.gather(*(ask() for _ in range(4))))


@pytest.mark.slow
async def test_the_daemon_through_it(
    pooled: str,
    database: str,
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Queries through the pooler, LISTEN beside it: notified at once, renewed, cancelled in
    mid-run, settled; nothing is left on its connections."""
    gates = {session: Gate() for session in ("long", "unwanted")}
    for session, gate in gates.items():
        endpoint.script(session, gate)
    async with busy(pooled):
        daemon = await daemons.start(
            dsn=pooled, listen_dsn=database, lease=2, concurrency=5, poll_interval=30
        )
        for session, gate in gates.items():
            await promise(app, session)
            await gate.entered.wait()
        seconds = []
        for n in range(12):
            await app.create_session(f"s{n}", "ann")
            asked = time.monotonic()
            recall = await app.schedule(
                f"s{n}", "recurring" if n % 2 else "once", soon(0), "go", 3600 if n % 2 else None
            )
            [request] = await endpoint.count(1, f"s{n}")
            seconds.append(request.at - asked)
            await daemon.hears("recall.settled", recall=recall)
        assert sorted(seconds)[6] < 1, f"insert to request, in seconds: {seconds}"
        # Longer than two leases: they were renewed.
        await eventually(
            db,
            "select 1 from session_recalls where session_id = 'long' and lease_until > leased_at "
            "+ interval '6 s'",
        )
        assert await app.cancel_session("unwanted") == 1
        await gates["unwanted"].hung_up.wait()
        gates["long"].open()
        await daemon.hears("recall.settled", session="long", attempt=1)
    assert len(endpoint.requests) == 14
    [about] = await rows(db, "select bell from recall_workers")
    assert about["bell"] == "listening"
    assert not any(
        daemon.told(event)
        for event in (
            "listener.deaf",
            "listener.lost",
            "database.lost",
            "worker.error",
            "lease.taken",
        )
    )
    found = await left_behind(pooled)
    assert len({f["pid"] for f in found}) > 1, "several connections were asked"
    usual = ["0", "0", "read committed", '"$user", public', 0, 0]
    assert [f["found"] for f in found] == [usual] * len(found)
    assert await daemon.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"ignore_startup_parameters": "options,extra_float_digits"}],
    ids=["strict", "lenient"],
)
async def test_without_a_direct_connection(
    settings: dict[str, str],
    database: str,
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Nothing notifies: said once and loudly, in the log, in `workers`; what is inserted comes by
    the poll, what was known before on the instant."""
    with pooler(database, **settings) as bouncer:
        daemon = await daemons.start(dsn=bouncer.dsn, poll_interval=1)
        [event] = await daemon.hears("listener.deaf")
        assert event["level"] == "error" and event["reason"] == POOLER
        assert "RECALL_LISTEN_DSN" in event["hint"] and "RECALL_POLL_INTERVAL" in event["hint"]
        await eventually(db, "select 1 from recall_workers where bell = 'deaf'")
        said = operate(database, "workers")
        assert " deaf " in said.out
        assert "Note: 1 of 1 live workers receive no notifications" in said.err

        at_once = [await promise(app, f"s{n}") for n in range(8)]
        planned = await promise(app, "planned", "once", 2.5)
        for recall in (*at_once, planned):
            await daemon.hears("recall.settled", recall=recall)
        late = {
            request.session: float(request.headers["recall-lateness"])
            for request in endpoint.requests
        }
        assert max(late.values()) < 1 + 2, late
        assert late["planned"] < 0.5, "a timer was armed for it: no poll"
        assert (
            len(daemon.told("listener.deaf")) == 1
            and not daemon.told("worker.error")
            and not daemon.told("database.lost")
        )
        assert same_process(daemon)
        assert await daemon.stop() == 0


@pytest.mark.slow
async def test_session_pooling_notifies(
    database: str, app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A pooler in session mode passes LISTEN: one DSN is enough, and the listener has heard itself
    through it."""
    with pooler(database, pool_mode="session", default_pool_size=20) as bouncer:
        daemon = await daemons.start(dsn=bouncer.dsn, poll_interval=30)
        recall = await promise(app, "s")
        await daemon.hears("recall.settled", recall=recall)
        async with connected(database) as db:
            await eventually(db, "select 1 from recall_workers where bell = 'listening'")
        assert daemon.told("listener.deaf") == []


@pytest.mark.full
@pytest.mark.timeout(200)
async def test_a_listener_that_hears_again(
    database: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The address behind RECALL_LISTEN_DSN leads to a pooler first and then to the server: the
    listener finds out by itself, and says so."""
    with pooler(database) as bouncer:
        async with Proxy(bouncer.dsn) as proxy:
            daemon = await daemons.start(listen_dsn=proxy.dsn, dsn=database, poll_interval=30)
            await daemon.hears("listener.deaf")
            proxy.lead(database)
            await daemon.hears("listener.listening", times=2, within=120)
            await eventually(db, "select 1 from recall_workers where bell = 'listening'")
            asked = time.monotonic()
            recall = await promise(app, "s")
            await daemon.hears("recall.settled", recall=recall)
            assert time.monotonic() - asked < 10
            assert len(daemon.told("listener.deaf")) == 1


@pytest.mark.slow
async def test_a_listener_in_another_database(
    server: str,
    template: str,
    database: str,
    app: Application,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """A RECALL_LISTEN_DSN that names another database hears nothing, though PostgreSQL takes the
    LISTEN: that is noticed, and named."""
    with postgres.database(server, template) as elsewhere:
        daemon = await daemons.start(listen_dsn=elsewhere, poll_interval=1)
        [event] = await daemon.hears("listener.deaf")
        assert "RECALL_LISTEN_DSN leads to another database than RECALL_DSN" in event["reason"]
        recall = await promise(app, "s")
        await daemon.hears("recall.settled", recall=recall)


@pytest.mark.slow
async def test_the_listener_wakes_nobody_by_its_self_test(database: str, daemons: Daemons) -> None:
    """The self-test has a channel of its own: on the one that wakes workers nothing
    is heard of it."""
    async with connected(database) as conn:
        notifies = await listening(conn)
        daemon = await daemons.start()
        other = await daemons.start()
        await eventually_heard(database, 2)
        assert await notifies.until_now() == 0
    for one in (daemon, other):
        assert one.told("listener.deaf") == []


async def eventually_heard(database: str, workers: int) -> None:
    async with connected(database) as db:
        await eventually(
            db,
            "select 1 from recall_workers where bell = 'listening' having count(*) = %s",
            [workers],
        )


@pytest.mark.full
async def test_the_pooler_is_restarted(
    database: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The pooler is killed with a run open and comes back: the same process goes on, and the run is
    settled once."""
    gate = Gate()
    endpoint.script("open", gate, reply())
    with pooler(database) as bouncer:
        daemon = await daemons.start(dsn=bouncer.dsn, listen_dsn=database, lease=5)
        recall = await promise(app, "open")
        await gate.entered.wait()
        bouncer.stop()
        await promise(app, "meanwhile")
        await daemon.hears("database.lost")
        gate.open()
        bouncer.start()
        await daemon.hears("database.found")
        await daemon.hears("recall.settled", recall=recall, attempt=1)
        await daemon.hears("recall.settled", session="meanwhile")
        assert [c["outcome"] for c in await calls(db, recall)] == ["answered"]
        assert len(endpoint.requests) == 2 and same_process(daemon)


# --- commands and the application's side ----------------------------------------------------------


@pytest.mark.slow
async def test_commands_through_it(pooled: str, app: Application, database: str) -> None:
    """Every command that asks the database, again and again on the pool's connections: all are
    done."""
    for session in ("s", "t"):
        await app.create_session(session, "ann")
    async with busy(pooled):
        for _ in range(2):
            said = await asyncio.to_thread(
                operate, pooled, "schedule", "s", "look", "--every", "1h", "--json"
            )
            assert said.status == 0, said.err
            id = said.document["id"]
            for words in (
                ("list", "--json"),
                ("list", "--user", "ann"),
                ("show", id),
                ("why", id),
                ("skip", id),
                ("pause", id),
                ("resume", id),
                ("reschedule", id, "--in", "2h"),
                ("fire", id),
                ("workers",),
                ("stats",),
                ("cancel", id),
                ("retry", id),
                ("cancel", "--session", "s", "--yes"),
                ("prune", "--older-than", "0s", "--yes"),
                ("migrate", "--check"),
            ):
                said = await asyncio.to_thread(operate, pooled, *words)
                assert said.status == 0, (words, said.err)


async def test_pruning_in_many_batches(pooled: str, app: Application, db: Connection) -> None:
    """A statement that is repeated past psycopg's threshold is not prepared: the next batch may go
    to another connection."""
    await app.create_session("s", "ann")
    await db.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, status, created_at, updated_at) "
        "select 'old' || n, 's', 'once', now(), 'm', 'fired', now() - interval '1 d', now() - "
        "interval '1 d' from generate_series(1, 12000) n"
    )
    async with busy(pooled):
        said = await asyncio.to_thread(operate, pooled, "prune", "--older-than", "1h", "--yes")
    assert said.status == 0, said.err
    assert await rows(db, "select 1 from session_recalls") == []


async def test_migrating_through_it(empty_database: str, bouncer: PgBouncer) -> None:
    """`migrate` refuses the pooler, where its lock and settings would stay behind, and goes by
    RECALL_LISTEN_DSN where that is set."""
    pooled = bouncer.way_to(empty_database)
    said = operate(pooled, "migrate")
    assert (said.status, said.out) == (1, "")
    assert "a pooler stands between" in said.err and "Try: recall-worker migrate --dsn" in said.err
    assert schema.pending(empty_database)
    said = operate(pooled, "migrate", environ={"RECALL_LISTEN_DSN": empty_database})
    assert said.status == 0 and "migrating by RECALL_LISTEN_DSN" in said.err
    assert operate(pooled, "migrate", "--check").status == 0


async def test_recalls_through_it(pooled: str, app: Application) -> None:
    """`Recalls` on a pool of psycopg's defaults, each method often enough to be prepared, beside
    others: all is as without a pooler."""
    await app.create_session("s", "ann")
    async with (
        busy(pooled),
        AsyncConnectionPool(pooled, open=False, min_size=3, max_size=3) as pool,
    ):
        recalls = Recalls(pool)
        for _ in range(12):
            made = await recalls.schedule("s", "look", every=timedelta(hours=1))
            with pytest.raises(RecallExists):
                await recalls.schedule("s", "again")
            assert await recalls.skip_next("s")
            assert [r.id for r in await recalls.list(session_id="s", statuses=["pending"])] == [
                made.id
            ]
            assert await recalls.due() == [] and await recalls.next_trigger_at() is not None
            assert await recalls.sessions_with_pending(["s", "t"]) == {"s"}
            assert await recalls.cancel("s") == 1


@pytest.mark.slow
async def test_the_pages_through_a_pooler(
    pooled: str, database: str, app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """What /readyz and /metrics ask goes through it like all the rest, and leaves nothing
    behind."""
    gate = Gate()
    endpoint.script("first", gate)
    daemon = await daemons.start(dsn=pooled, listen_dsn=database, ops_listen=0, concurrency=1)
    await promise(app, "first", "once")
    await gate.entered.wait()
    await promise(app, "second", "once", -5)
    async with busy(pooled):
        assert (await read(daemon, "/readyz")).text == "ready\n"
        assert value(await scrape(daemon), "recalls_overdue") == 1
    gate.open()
    await daemon.hears("recall.settled", times=2)

"""Outages: PostgreSQL killed, away, restarted, read-only, full, half-open. The same process goes
on, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psycopg
import pytest

from recall_worker import schema
from recall_worker.embedded import EmbeddedServer

from ..conftest import Connection, connected
from ..support import postgres
from ..support.application import CREATE_TABLES, AlreadyScheduled, Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint, Gate, Raw, Request, reply
from ..support.proxy import Proxy
from .test_corridor import row
from .test_lease import calls, eventually, promise, rows


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    """A PostgreSQL of the test's own, with the application's tables, adopted: to be killed."""
    server = postgres.embedded()
    with server:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
        schema.migrate(server.dsn())
        yield server


@pytest.fixture
async def replicas(own_server: EmbeddedServer, endpoint: Endpoint) -> AsyncIterator[Daemons]:
    """Starts daemons on the test's own server."""
    async with Daemons({"RECALL_DSN": own_server.dsn(), "RECALL_RUN_URL": endpoint.url}) as started:
        yield started


def same_process(daemon: Daemon) -> bool:
    with suppress(ProcessLookupError):
        os.kill(daemon.pid, 0)
        return daemon.process.returncode is None
    return False


async def terminate(db: Connection, name: str) -> int:
    """End the backends whose application_name begins so; how many there were."""
    ended = await rows(
        db,
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = "
        "current_database() and application_name like %s",
        [name + " %"],
    )
    return len(ended)


@pytest.mark.full
async def test_killed_for_three_leases_under_load(
    own_server: EmbeddedServer, replicas: Daemons, endpoint: Endpoint
) -> None:
    """PostgreSQL is killed under load with runs open, for three leases: both daemons go on, nothing
    is lost, nothing is called twice."""
    lease, sessions = 2.0, [f"s{n}" for n in range(36)]
    kinds = dict(zip(sessions, ("once", "recurring", "immediate") * 12, strict=True))
    gates = {session: Gate() for session in sessions[:6]}
    for session, gate in gates.items():
        endpoint.script(session, gate, reply())

    async def run(_: Request) -> Raw:
        await asyncio.sleep(0.05)
        return reply()

    endpoint.default = run
    one, two = [await replicas.start(lease=lease, concurrency=6) for _ in range(2)]
    async with await Application.connect(own_server.dsn()) as app:
        for session in sessions:
            await app.create_session(session, "ann")
        for session in gates:
            await app.schedule(
                session, kinds[session], datetime.now(UTC), "open when it happens", 1
            )
        for gate in gates.values():
            await gate.entered.wait()
    told = asyncio.Event()

    async def load() -> None:
        """The application: it goes on scheduling, and comes back when its database does."""
        left = [s for s in sessions if s not in gates]
        while left:
            with suppress(
                OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError
            ):
                async with await Application.connect(own_server.dsn()) as app:
                    while left:
                        with suppress(AlreadyScheduled):
                            await app.schedule(
                                left[0],
                                kinds[left[0]],
                                datetime.now(UTC) + timedelta(seconds=0.2),
                                "go",
                                1,
                            )
                        left.pop(0)
                        if len(left) == 15:
                            told.set()
                        await asyncio.sleep(0.02)
            await asyncio.sleep(0.05)

    loading = asyncio.create_task(load())
    await told.wait()
    own_server.kill()
    for daemon in (one, two):
        await daemon.hears("database.lost")
    # Runs that end while nobody can write it down.
    for session in list(gates)[:4]:
        gates[session].open()
    await asyncio.sleep(3 * lease)
    own_server.start()
    for daemon in (one, two):
        await daemon.hears("database.found")
    for session in list(gates)[4:]:
        gates[session].open()
    await loading

    async with connected(own_server.dsn()) as db:
        await eventually(
            db,
            """
            select 1 from session_recalls having count(*) = 36
                and bool_and(case call_type when 'recurring' then occurrence > 2
                    else status = 'fired' end)
            """,
            within=30,
        )
        assert all(map(same_process, (one, two)))
        twice = {key: n for key, n in Counter(endpoint.keys).items() if n > 1}
        unknown = await rows(
            db,
            "select recall_id, occurrence from recall_attempts where outcome = 'unknown' and "
            "called_at is not null",
        )
        assert twice == {}, f"called again, and not because of {unknown}"
        # What was claimed by a statement whose answer was lost had no run; all others stay their
        # owners'.
        taken = {e["recall"] for d in (one, two) for e in d.told("lease.taken")}
        assert taken.isdisjoint(e["recall"] for d in (one, two) for e in d.told("lease.lost"))
        assert not any(d.told("lease.lost") for d in (one, two))
        for daemon in (one, two):
            assert [len(daemon.told(f"database.{how}")) for how in ("lost", "found")] == [1, 1]
    for daemon in (one, two):
        assert await daemon.stop() == 0


@pytest.mark.slow
async def test_started_while_it_is_away(
    own_server: EmbeddedServer, replicas: Daemons, endpoint: Endpoint
) -> None:
    """A daemon that starts without PostgreSQL is ready, stays up, and works when it comes."""
    async with await Application.connect(own_server.dsn()) as app:
        await promise(app, "s")
    own_server.kill()
    daemon = await replicas.start(ready=False)
    await daemon.hears("worker.ready")
    await daemon.hears("database.lost")
    own_server.start()
    await daemon.hears("listener.listening")
    await daemon.hears("database.found")
    await endpoint.count(1, "s")
    await daemon.hears("recall.settled", session="s")
    assert same_process(daemon)
    assert len(daemon.told("listener.lost")) == 1, "told once, however often it tries"
    assert await daemon.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recall-worker listener", "recall-worker ledger"])
async def test_connections_terminated(
    name: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Each of its connections ended by pg_terminate_backend, again and again with a run open: it
    recovers and misses nothing."""
    gate = Gate()
    endpoint.script("open", gate)
    daemon = await daemons.start(lease=3, concurrency=5, poll_interval=30)
    await promise(app, "open")
    await gate.entered.wait()
    for n in range(4):
        if name.endswith("listener"):
            await daemon.hears("listener.listening", times=n + 1)
        assert await terminate(db, name) >= 1
        await promise(app, f"s{n}", seconds=0.1 * (n % 2))
        await daemon.hears("recall.settled", session=f"s{n}")
    gate.open()
    await daemon.hears("recall.settled", session="open")
    assert sorted(r.session for r in endpoint.requests) == ["open", "s0", "s1", "s2", "s3"]
    assert daemon.told("lease.taken") == daemon.told("worker.error") == []
    # The reason is PostgreSQL's, not only that the connection is closed.
    lost = "listener.lost" if name.endswith("listener") else "database.lost"
    assert {event["reason"] for event in daemon.told(lost)} <= {
        "terminating connection due to administrator command"
    }
    assert same_process(daemon)


async def test_every_connection_is_named(database: str, db: Connection, daemons: Daemons) -> None:
    """What pg_stat_activity shows of a daemon says which replica it is and what the connection is
    for; they are few."""
    daemon = await daemons.start()
    await eventually(db, "select 1 from recall_workers")
    found = await rows(
        db,
        "select application_name from pg_stat_activity where datname = current_database() and "
        "pid <> pg_backend_pid()",
    )
    names = Counter(str(f["application_name"]) for f in found)
    assert set(names) == {
        f"recall-worker listener {daemon.name}"[:63],
        f"recall-worker ledger {daemon.name}"[:63],
    }
    assert sum(names.values()) <= 4


@pytest.mark.slow
async def test_cut_in_mid_run(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The network to PostgreSQL is away for longer than the lease while a run ends: nobody else
    about, it is settled, called once."""
    gate = Gate()
    endpoint.script("s", gate)
    async with Proxy(database) as proxy:
        daemon = await daemons.start(lease=2, dsn=proxy.dsn)
        recall = await promise(app, "s", "once")
        await gate.entered.wait()
        proxy.cut()
        await daemon.hears("database.lost")
        await daemon.hears("listener.lost")
        gate.open()
        await eventually(db, "select 1 from session_recalls where lease_until < now()")
        proxy.heal()
        await daemon.hears("recall.settled", recall=recall, attempt=1)
        assert daemon.told("lease.taken") == []
        assert len(endpoint.requests) == 1
        assert [(c["attempt"], c["outcome"], c["settled"]) for c in await calls(db, recall)] == [
            (1, "answered", "fired")
        ]
        await daemon.hears("listener.listening", times=2)
        assert await daemon.stop() == 0


@pytest.mark.full
async def test_slow_network(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """With every round trip to PostgreSQL taking a third of a second runs are renewed, settled and
    called once."""
    gate = Gate()
    endpoint.script("slow", gate)
    async with Proxy(database) as proxy:
        daemon = await daemons.start(lease=3, dsn=proxy.dsn)
        proxy.delay(0.15)
        recall = await promise(app, "slow")
        await gate.entered.wait()
        other = await promise(app, "other")
        await daemon.hears("recall.settled", recall=other)
        gate.open()
        await daemon.hears("recall.settled", recall=recall, attempt=1)
        assert len(endpoint.requests) == 2
        assert daemon.told("database.lost") == []
        assert await daemon.stop() == 0


@pytest.mark.full
@pytest.mark.timeout(300)
async def test_half_open_connections(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """All connections half-open, which raises nothing: the listener notices by its probe, the
    ledger by its deadline, and both go on."""
    gate = Gate()
    endpoint.script("open", gate)
    async with Proxy(database) as proxy:
        daemon = await daemons.start(lease=60, dsn=proxy.dsn, poll_interval=5)
        recall = await promise(app, "open")
        await gate.entered.wait()
        proxy.blackhole()
        gate.open()
        await promise(app, "deaf")
        await daemon.hears("database.lost", within=60)
        await daemon.hears("listener.lost", within=90)
        proxy.heal()
        await daemon.hears("recall.settled", recall=recall, within=60)
        await daemon.hears("recall.settled", session="deaf", within=60)
        await daemon.hears("listener.listening", times=2, within=60)
        await promise(app, "heard")
        await daemon.hears("recall.settled", session="heard")
        assert len(endpoint.requests) == 3
        assert same_process(daemon)


@pytest.mark.full
@pytest.mark.timeout(200)
async def test_half_open_listener(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Only the listener is half-open: claims go on by the poll, and the listener comes back by
    itself."""
    async with Proxy(database) as proxy:
        daemon = await daemons.start(listen_dsn=proxy.dsn, poll_interval=1)
        proxy.blackhole()
        await promise(app, "by poll")
        await daemon.hears("recall.settled", session="by poll")
        await daemon.hears("listener.lost", within=90, reason="no answer to the probe")
        proxy.heal()
        await daemon.hears("listener.listening", times=2, within=60)
        assert daemon.told("database.lost") == []


@pytest.mark.full
async def test_no_connection_to_be_had(own_server: EmbeddedServer, endpoint: Endpoint) -> None:
    """The account has no connection left: a daemon that is up loses its own and goes on when there
    are some again; so does a new one."""
    parts = urlsplit(own_server.dsn())
    dsn = urlunsplit(parts._replace(netloc="limited@"))
    async with (
        connected(own_server.dsn()) as db,
        await Application.connect(own_server.dsn()) as app,
    ):
        await db.execute("create role limited login connection limit 6")
        await db.execute("grant all on all tables in schema public to limited")
        async with Daemons({"RECALL_DSN": dsn, "RECALL_RUN_URL": endpoint.url}) as replicas:
            up = await replicas.start(lease=3, poll_interval=1)
            await promise(app, "before")
            await up.hears("recall.settled", session="before")
            await db.execute("alter role limited connection limit 0")
            await terminate(db, "recall-worker")
            late = await replicas.start(ready=False, lease=3, poll_interval=1)
            await late.hears("database.lost")
            await late.hears("worker.ready")
            await promise(app, "meanwhile")
            await up.hears("database.lost")
            assert (
                "too many connections" in up.told("database.lost")[0]["reason"]
                or "terminat" in up.told("database.lost")[0]["reason"]
            )
            # Fewer than two replicas would like: what can't be had is done without.
            await db.execute("alter role limited connection limit 6")
            await endpoint.count(1, "meanwhile")
            await eventually(
                db,
                "select 1 from session_recalls where session_id = 'meanwhile' and status = 'fired'",
            )
            assert len(endpoint.of("meanwhile")) == 1
            assert all(map(same_process, (up, late)))


@pytest.mark.slow
async def test_restarted_read_only(
    own_server: EmbeddedServer, replicas: Daemons, endpoint: Endpoint
) -> None:
    """PostgreSQL comes back taking no writes, and takes them later: nothing is called meanwhile,
    and the open run is settled."""
    gate = Gate()
    endpoint.script("open", gate)
    daemon = await replicas.start(lease=2)
    async with await Application.connect(own_server.dsn()) as app:
        recall = await promise(app, "open")
        await gate.entered.wait()
        await app.connection.execute("alter system set default_transaction_read_only = on")
    own_server.shutdown()
    await daemon.hears("database.lost")
    own_server.start()
    gate.open()
    async with (
        await Application.connect(own_server.dsn()) as app,
        connected(own_server.dsn()) as db,
    ):
        await app.connection.execute("set default_transaction_read_only = off")
        await promise(app, "meanwhile")
        await daemon.hears("listener.listening", times=2)
        await eventually(
            db, "select 1 from session_recalls where session_id = 'open' and lease_until < now()"
        )
        assert endpoint.of("meanwhile") == []
        await app.connection.execute("alter system reset default_transaction_read_only")
        await app.connection.execute("select pg_reload_conf()")
        await daemon.hears("recall.settled", recall=recall, attempt=1)
        await daemon.hears("recall.settled", session="meanwhile")
        assert (await row(db, "open"))["status"] == "fired"
    assert [r.session for r in endpoint.requests] == ["open", "meanwhile"]
    lost: list[dict[str, Any]] = daemon.told("database.lost")
    assert len(lost) == 1
    assert same_process(daemon)
    assert await daemon.stop() == 0

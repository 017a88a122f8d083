"""Failover: the primary dies under load or falls silent, its replica is promoted, and the same
daemons go on there.

With a synchronous replica nothing is lost and nothing is called twice. What an asynchronous one had
not received is gone, and this says what that means, measured: settles are made up for under the
same key; promises are not.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta

import asyncpg
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from recall_worker import schema
from recall_worker.embedded import EmbeddedServer

from ..conftest import connected
from ..support import postgres
from ..support.application import CREATE_TABLES, AlreadyScheduled, Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, Raw, Request, reply
from ..support.proxy import Proxy
from ..test_cli import operate
from .test_bad_setting import Standby
from .test_lease import calls, eventually, promise, rows
from .test_outage import same_process

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]

SETTINGS = {
    "wal_level": "replica",
    "max_wal_senders": "4",
    "fsync": "off",
    "max_connections": "100",
}
STREAMING = "select 1 from pg_stat_replication where state = 'streaming' and sync_state = %s"


class Pair:
    """A primary and its streaming replica. `dsn` names both, the primary first."""

    def __init__(self, primary: EmbeddedServer, standby: EmbeddedServer) -> None:
        self.primary, self.standby = primary, standby

    @property
    def dsn(self) -> str:
        return self.through(self.primary.dsn(), self.standby.dsn())

    @staticmethod
    def through(*dsns: str) -> str:
        """One DSN with the hosts of several; which of them is meant is left to the worker."""
        parts = [conninfo_to_dict(dsn) for dsn in dsns]
        hosts = {name: ",".join(str(part[name]) for part in parts) for name in ("host", "port")}
        return make_conninfo(
            user="postgres", dbname="postgres", sslmode="disable", gssencmode="disable", **hosts
        )

    async def synchronous(self) -> None:
        """From now on the primary answers for a commit when the replica has it, too."""
        async with connected(self.primary.dsn()) as db:
            await db.execute("alter system set synchronous_standby_names = '*'")
            await db.execute("select pg_reload_conf()")
            await eventually(db, STREAMING, ["sync"])

    async def level(self) -> None:
        """Wait until the replica has, and shows, all that the primary has."""
        async with connected(self.primary.dsn()) as db, connected(self.standby.dsn()) as behind:
            [now] = await rows(db, "select pg_current_wal_lsn()::text as lsn")
            await eventually(
                behind, "select 1 where pg_last_wal_replay_lsn() >= %s::pg_lsn", [now["lsn"]]
            )

    async def part(self) -> None:
        """The replica receives nothing any more, and neither side minds: as when the network
        between them is gone."""
        async with connected(self.primary.dsn()) as db, connected(self.standby.dsn()) as behind:
            await behind.execute("alter system set primary_conninfo = ''")
            await behind.execute("select pg_reload_conf()")
            await eventually(db, "select 1 from pg_stat_replication having count(*) = 0")

    async def promote(self) -> float:
        """Make the replica the primary; the instant at which it takes writes."""
        async with connected(self.standby.dsn()) as db:
            assert await rows(db, "select pg_promote() as done") == [{"done": True}]
        return time.monotonic()


@asynccontextmanager
async def started() -> AsyncIterator[Pair]:
    bindir = os.environ.get("RECALL_TEST_PG_BINDIR") or None
    with EmbeddedServer(base=postgres._memory(), bindir=bindir, settings=SETTINGS) as primary:
        with psycopg.connect(primary.dsn(), autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
        schema.migrate(primary.dsn())
        with Standby(primary) as standby:
            pair = Pair(primary, standby)
            async with connected(primary.dsn()) as db:
                await eventually(db, STREAMING, ["async"])
            yield pair


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with started() as made:
        yield made


@pytest.fixture
async def replicas(pair: Pair, endpoint: Endpoint) -> AsyncIterator[Daemons]:
    """Starts daemons that know both servers."""
    async with Daemons({"RECALL_DSN": pair.dsn, "RECALL_RUN_URL": endpoint.url}) as started:
        yield started


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def scheduling(
    dsn: Callable[[], str], kinds: dict[str, str], acknowledged: dict[str, str]
) -> None:
    """The application: one recall for each session, going on where it was when its database comes
    back; ids of what was acknowledged."""
    left = list(kinds)
    while left:
        with suppress(
            OSError,
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
            asyncpg.InternalClientError,
            TimeoutError,
        ):
            async with asyncio.timeout(5), await Application.connect(dsn()) as app:
                while left:
                    session = left[0]
                    with suppress(asyncpg.UniqueViolationError):
                        await app.create_session(session, "ann")
                    try:
                        acknowledged[session] = await app.schedule(
                            session, kinds[session], soon(0.2), "go", 1
                        )
                    except AlreadyScheduled:
                        pass  # Written before, by an insert whose answer was lost.
                    left.pop(0)
                    await asyncio.sleep(0.02)
        await asyncio.sleep(0.05)


async def test_a_synchronous_replica_under_load(
    pair: Pair, replicas: Daemons, endpoint: Endpoint
) -> None:
    """Killed under load with runs open, two daemons and 80 recalls of all kinds: nothing is lost,
    nothing called twice, same processes."""
    await pair.synchronous()
    sessions = [f"s{n}" for n in range(80)]
    kinds = dict(zip(sessions, ("once", "recurring", "immediate", "once") * 20, strict=True))
    gates = {session: Gate() for session in sessions[:6]}
    for session, gate in gates.items():
        endpoint.script(session, gate, reply())

    async def run(_: Request) -> Raw:
        await asyncio.sleep(0.05)
        return reply()

    endpoint.default = run
    daemons = [await replicas.start(lease=3, concurrency=6) for _ in range(2)]
    current, acknowledged = pair.primary, dict[str, str]()
    load = asyncio.create_task(scheduling(lambda: current.dsn(), kinds, acknowledged))
    for gate in gates.values():
        await gate.entered.wait()
    async with connected(pair.primary.dsn()) as db:
        await eventually(db, "select 1 from session_recalls having count(*) >= 40")
    pair.primary.kill()
    died = time.monotonic()
    for daemon in daemons:
        await daemon.hears("database.lost")
    for session in list(gates)[:3]:
        gates[session].open()  # Runs that end while nobody can write it down.
    promoted = await pair.promote()
    current = pair.standby
    for daemon in daemons:
        await daemon.hears("database.found", within=60)
        await daemon.hears("listener.listening", times=2, within=60)
    for session in list(gates)[3:]:
        gates[session].open()
    await asyncio.wait_for(load, 60)
    back = {daemon.name: daemon.told("database.found")[0]["after_s"] for daemon in daemons}
    print(f"died to promoted {promoted - died:.2f} s; away as the daemons saw it: {back}")

    async with connected(pair.standby.dsn()) as db:
        await eventually(
            db,
            "select 1 from session_recalls having count(*) = 80 "
            "and bool_and(case call_type when 'recurring' then occurrence > 2 else status = "
            "'fired' end)",
            within=60,
        )
        there = {row["id"] for row in await rows(db, "select id from session_recalls")}
        assert set(acknowledged.values()) <= there, "every promise that was acknowledged is there"
    twice = {key: times for key, times in Counter(endpoint.keys).items() if times > 1}
    assert twice == {}
    for daemon in daemons:
        assert daemon.told("lease.lost") == daemon.told("worker.error") == []
        assert daemon.told("claims.held") == [], "a standby is no copy"
        assert [len(daemon.told(f"database.{how}")) for how in ("lost", "found")] == [1, 1]
        assert same_process(daemon)
        assert await daemon.stop() == 0


async def test_what_an_asynchronous_replica_lost(
    pair: Pair, replicas: Daemons, endpoint: Endpoint
) -> None:
    """Lost settles: their occurrences are called again, under the same key. Lost inserts: the
    promises are gone, called or not."""
    open_run = Gate()
    endpoint.script("open", open_run)
    daemon = await replicas.start(lease=2, concurrency=20)
    async with (
        await Application.connect(pair.primary.dsn()) as app,
        connected(pair.primary.dsn()) as db,
    ):
        kept = [await promise(app, f"kept{n}") for n in range(5)]
        for recall in kept:
            await daemon.hears("recall.settled", recall=recall)
        waiting = [await promise(app, f"waiting{n}", "once", 4.0) for n in range(5)]
        again = await promise(app, "again", "recurring", 4.0, interval=3600)
        running = await promise(app, "open")
        await open_run.entered.wait()
        await eventually(
            db, "select 1 from session_recalls where session_id = 'open' and lease is not null"
        )
        await pair.level()
        await pair.part()
        # From here on the replica knows nothing.
        for recall in (*waiting, again):
            await daemon.hears("recall.settled", recall=recall)
        open_run.open()
        await daemon.hears("recall.settled", recall=running)
        done = [await promise(app, f"done{n}") for n in range(5)]
        for recall in done:
            await daemon.hears("recall.settled", recall=recall)
        promised = [await promise(app, f"promised{n}", "once", 30) for n in range(5)]
    pair.primary.kill()
    await daemon.hears("listener.lost")
    await pair.promote()
    async with connected(pair.standby.dsn()) as db:
        for recall in (*waiting, again, running):
            await daemon.hears("recall.settled", times=2, recall=recall, within=60)
        left = {row["id"]: row for row in await rows(db, "select * from session_recalls")}
        assert set(left) == {*kept, *waiting, again, running}, (
            "what was inserted and not received is gone"
        )
        assert {left[recall]["status"] for recall in (*kept, *waiting, running)} == {"fired"}
        assert (left[again]["status"], left[again]["occurrence"]) == ("pending", 2)
        marks = {
            recall: [(c["occurrence"], c["attempt"], c["outcome"]) for c in await calls(db, recall)]
            for recall in left
        }
        assert all(marks[recall] == [(1, 1, "answered")] for recall in (*waiting, again)), (
            "as if for the first time"
        )
        assert marks[running] == [(1, 1, "unknown"), (1, 2, "answered")], (
            "known to have been claimed, so called a second time"
        )
    times = Counter(endpoint.keys)
    assert {times[f"{recall}:1"] for recall in (*waiting, again, running)} == {2}, (
        "again, under the same key"
    )
    assert {times[f"{recall}:1"] for recall in (*kept, *done)} == {1}
    assert {times[f"{recall}:1"] for recall in promised} == {0}
    bodies = {(r.key, r.body) for r in endpoint.requests}
    assert len(bodies) == len(times), "the same body under the same key"
    print(
        f"of {len(waiting) + 2} lost settles {len(waiting) + 2} were called again under the same "
        f"key; "
        f"of {len(done) + len(promised)} lost inserts {len(done)} had been called and left no "
        f"trace, {len(promised)} never will be"
    )
    assert same_process(daemon) and daemon.told("worker.error") == []
    assert await daemon.stop() == 0


async def test_the_old_primary_comes_back_as_a_standby(
    pair: Pair, replicas: Daemons, endpoint: Endpoint
) -> None:
    """Named first in the DSN, and up again, but taking no writes: it is passed over at each
    reconnection, by the listener, too."""
    daemon = await replicas.start(lease=2)
    pair.primary.kill()
    await daemon.hears("listener.lost")
    await pair.promote()
    await daemon.hears("listener.listening", times=2, within=60)
    (pair.primary.directory / "pgdata" / "standby.signal").touch()
    pair.primary.start()
    async with connected(pair.standby.dsn()) as db, connected(pair.primary.dsn()) as old:
        [state] = await rows(old, "select pg_is_in_recovery() as standby")
        assert state["standby"]
        for n in range(3):
            ended = (
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name "
                "like 'recall-worker%'"
            )
            assert len(await rows(db, ended)) >= 2
            await daemon.hears("listener.listening", times=3 + n, within=60)
            async with await Application.connect(pair.standby.dsn()) as app:
                recall = await promise(app, f"s{n}")
            await daemon.hears("recall.settled", recall=recall)
        ours = await rows(
            old,
            "select pid from pg_stat_activity where application_name like 'recall-worker%' and "
            "state = 'idle'",
        )
        assert ours == [], "nothing of ours stays with the old one"
    said = await asyncio.to_thread(operate, pair.primary.dsn(), "doctor", "--json")
    assert said.status == 1
    assert ("database", "this is a standby: it takes no writes") in [
        (row["check"], row["seen"]) for row in said.document["checks"] if row["state"] == "problem"
    ]
    said = await asyncio.to_thread(operate, pair.dsn, "doctor")
    assert said.status == 0, "with both hosts it finds the new primary"
    assert same_process(daemon) and await daemon.stop() == 0


@pytest.mark.parametrize("attrs", ["", " target_session_attrs=any"], ids=["one host", "any of two"])
async def test_a_standby_is_named_and_not_spun_upon(
    attrs: str, pair: Pair, endpoint: Endpoint
) -> None:
    """Led to a standby for good, the daemon says so once, asks a few times a second at most, and
    works as soon as it is promoted."""
    async with await Application.connect(pair.primary.dsn()) as app:
        recall = await promise(app, "s")
    await pair.level()
    async with Proxy(pair.standby.dsn()) as proxy:
        dsn = Pair.through(proxy.dsn, pair.primary.dsn()) + attrs if attrs else proxy.dsn
        async with Daemons({"RECALL_DSN": dsn, "RECALL_RUN_URL": endpoint.url}) as daemons:
            daemon = await daemons.start(ready=False, lease=2)
            [lost] = await daemon.hears("database.lost")
            assert "takes no writes, as a standby does" in lost["reason"]
            [lost] = await daemon.hears("listener.lost")
            assert "takes no writes, as a standby does" in lost["reason"]
            connections, began = proxy.connections, time.monotonic()
            async with connected(pair.standby.dsn()) as db:
                await db.execute("select pg_sleep(5)")
            rate = (proxy.connections - connections) / (time.monotonic() - began)
            print(f"{rate:.1f} connections a second while the server takes no writes")
            assert rate < 8
            assert len(daemon.told("database.lost")) == len(daemon.told("listener.lost")) == 1
            assert endpoint.requests == []
            pair.primary.kill()
            await pair.promote()
            await daemon.hears("database.found", within=60)
            await daemon.hears("recall.settled", recall=recall, within=60)
            await daemon.hears("listener.listening", within=60)
            assert same_process(daemon) and await daemon.stop() == 0


async def test_a_primary_that_falls_silent(
    pair: Pair, replicas: Daemons, endpoint: Endpoint
) -> None:
    """Not dead but stopped, so that no connection breaks: ledger and bell find out by their
    deadlines, and both move to the replica."""
    gate = Gate()
    endpoint.script("open", gate, reply())
    await pair.synchronous()
    daemon = await replicas.start(lease=5, poll_interval=30)
    async with await Application.connect(pair.primary.dsn()) as app:
        recall = await promise(app, "open")
    await gate.entered.wait()
    stopped = pair.primary.processes()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    fell = time.monotonic()
    try:
        await pair.promote()
        gate.open()
        await daemon.hears("database.lost", within=90)
        await daemon.hears("database.found", within=90)
        ledger_after = time.monotonic() - fell
        await daemon.hears("recall.settled", recall=recall, attempt=1, within=60)
        await daemon.hears("listener.lost", within=90, reason="no answer to the probe")
        await daemon.hears("listener.listening", times=2, within=90)
        print(
            f"silent primary: the ledger moved after {ledger_after:.1f} s, the listener after "
            f"{time.monotonic() - fell:.1f} s"
        )
        async with await Application.connect(pair.standby.dsn()) as app:
            asked = time.monotonic()
            heard = await promise(app, "heard")
            await daemon.hears("recall.settled", recall=heard)
            assert time.monotonic() - asked < 10, "notified, and not found by a poll"
        assert len(endpoint.requests) == 2
        assert same_process(daemon)
    finally:
        pair.primary.kill()

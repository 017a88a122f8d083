"""Hosts: two workers, the database and the API, each in a network namespace with an address of its
own. Each pair is parted, and healed.

The account is drawn from the API's own record of requests: what was run, under which key, from when
to when.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from recall_worker import schema
from recall_worker.protocols import connection, http
from recall_worker.settings import Settings

from ..conftest import Connection, connected
from ..support import network, postgres
from ..support.application import CREATE_TABLES, Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint, Gate, Raw, Request, reply
from ..support.planted import FOLDER, SUFFIX, copy_with
from .test_lease import eventually, promise, rows

LEASE = 4.0
PARTED = 3 * LEASE
LATE = 2.5
"""Seconds that this machine may be late."""

LACKING = network.lacking()
pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(180),
    pytest.mark.skipif(LACKING is not None, reason=str(LACKING)),
]


@dataclass
class Hosts:
    """`db` and `app` come by PostgreSQL's Unix socket, which no network parts."""

    net: network.Network
    api: Endpoint
    db: Connection
    app: Application
    environ: dict[str, str]
    daemons: AsyncExitStack

    async def start(self, host: str, concurrency: int) -> Daemon:
        started = await self.daemons.enter_async_context(
            Daemons(self.environ, before=self.net[host].words)
        )
        return await started.start(lease=LEASE, concurrency=concurrency, poll_interval=30)

    async def held(self, kinds: dict[str, str]) -> dict[str, Gate]:
        """A run that stays open for each of these sessions, and for whoever calls a second time in
        it."""
        gates = {}
        for session, kind in kinds.items():
            gates[session] = first = Gate()
            self.api.script(session, first, Gate(opened=first.opened))
            await promise(self.app, session, kind, interval=3600 if kind == "recurring" else None)
        for gate in gates.values():
            await gate.entered.wait()
        return gates


@pytest.fixture
async def hosts() -> AsyncIterator[Hosts]:
    async with AsyncExitStack() as stack:
        net = stack.enter_context(network.Network("one", "two", "db", "api"))
        server = postgres.embedded(settings={"listen_addresses": net["db"].address})
        with net["db"].entered():
            stack.enter_context(server)
        hba = server.directory / "pgdata/pg_hba.conf"
        hba.write_text(hba.read_text() + f"host all all {net['db'].address}/24 trust\n")
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
            conn.execute("select pg_reload_conf()")
        schema.migrate(server.dsn())
        api = Endpoint()
        await api.start(on=stack.enter_context(closing(net["api"].socket())))
        stack.push_async_callback(api.stop)
        db = await stack.enter_async_context(connected(server.dsn()))
        app = await stack.enter_async_context(await Application.connect(server.dsn()))
        dsn = f"postgresql://postgres@{net['db'].address}:{server.port}/postgres"
        daemons = await stack.enter_async_context(AsyncExitStack())
        yield Hosts(net, api, db, app, {"RECALL_DSN": dsn, "RECALL_RUN_URL": api.url}, daemons)


async def run(_: Request) -> Raw:
    await asyncio.sleep(0.05)
    return reply()


async def account(hosts: Hosts, *, again: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Nothing lost, nothing doubled, no two runs at once in a session. `again`: sessions that were
    called twice under one key."""
    by_key: dict[str, list[Request]] = defaultdict(list)
    by_session: dict[str, list[Request]] = defaultdict(list)
    for request in hosts.api.requests:
        by_key[request.key].append(request)
        by_session[request.session].append(request)
    for key, same in by_key.items():
        for earlier in same[:-1]:
            assert not earlier.answered, f"{key} was called again after its run was answered"
        assert len({request.body for request in same}) == 1
    assert {same[0].session for same in by_key.values() if len(same) > 1} == again
    for session, calls in by_session.items():
        for before, after in itertools.pairwise(calls):
            assert before.ended_at is not None, session
            assert before.ended_at <= after.at, (
                f"two runs at once in {session}: by {after.at - before.ended_at:.3f} s"
            )
    for recall in await rows(hosts.db, "select * from session_recalls"):
        runs = [r.key for r in by_session[recall["session_id"]] if r.answered]
        done = recall["occurrence"] - (recall["call_type"] == "recurring")
        assert sorted(runs) == sorted(f"{recall['id']}:{n}" for n in range(1, done + 1)), recall
        assert recall["status"] == ("pending" if recall["call_type"] == "recurring" else "fired"), (
            recall
        )
        assert recall["lease"] is None, recall


ALL_RUN = """
    select 1 from session_recalls
    having bool_and(case call_type when 'recurring' then occurrence > 1 else status = 'fired' end
        and lease is null)
"""


async def end(hosts: Hosts, gates: dict[str, Gate], *daemons: Daemon) -> None:
    """Let what runs end, wait until all has run, and stop."""
    for gate in gates.values():
        gate.open()
    await eventually(hosts.db, ALL_RUN, within=30)
    for daemon in daemons:
        assert await daemon.stop() == 0
        assert daemon.told("worker.error") == []


@pytest.mark.parametrize(
    ("cut_off", "how"),
    [("one", "silent"), ("two", "silent"), ("one", "answers vanish"), ("one", "barred")],
)
async def test_a_worker_and_the_database(hosts: Hosts, cut_off: str, how: str) -> None:
    """The cut-off worker breaks its calls off before its leases end, the other takes them up when
    they do, and both work again soon."""
    await part(hosts, cut_off, how)


@pytest.mark.parametrize(
    ("defect", "seen"),
    [
        ("no_break_off", "two runs at once"),
        ("one_deadline_for_all", "the silence was not noticed within the lease"),
    ],
)
async def test_a_planted_defect_is_found(
    hosts: Hosts, defect: str, seen: str, tmp_path: Path
) -> None:
    """The same check on a copy of the code with a defect in it fails, and says why."""
    copy_with(FOLDER / f"{defect}{SUFFIX}", tmp_path)
    hosts.environ |= {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    with pytest.raises(AssertionError, match=seen):
        await part(hosts, "one", "silent")


async def part(hosts: Hosts, cut_off: str, how: str) -> None:
    """Part a worker from the database for three leases, with runs open on both, and heal. Raises
    AssertionError where that is not borne."""
    hosts.api.default = run
    other = {"one": "two", "two": "one"}[cut_off]
    lost = await hosts.start(cut_off, concurrency=2)
    its = await hosts.held({"once": "once", "recurring": "recurring"})
    kept = await hosts.start(other, concurrency=5)
    others = await hosts.held({"kept once": "once", "kept recurring": "recurring"})
    assert [len(daemon.told("recall.claimed")) for daemon in (lost, kept)] == [2, 2]

    # Its connection for renewals is open: a new one takes longer to be given up.
    await eventually(
        hosts.db,
        "select 1 from session_recalls where leased_by = %s having count(*) = 2 "
        "and bool_and(lease_until > leased_at + %s * interval '1 second')",
        [lost.name, LEASE],
    )
    parted_at = time.monotonic()
    if how == "silent":
        hosts.net.cut(cut_off, "db")
    elif how == "answers vanish":
        hosts.net.cut("db", cut_off, both=False)
    else:
        hosts.net.bar(cut_off, "db")
        hosts.net.bar("db", cut_off)
    await kept.hears("lease.taken", times=2, worker_before=lost.name)
    # A renewal that arrived, and whose answer did not, has extended the lease.
    bound = LEASE * (4 / 3 if how == "answers vanish" else 1) + LATE
    for session in its:
        first, second = await hosts.api.count(2, session)
        assert first.key == second.key
        assert second.at - parted_at < bound
        assert first.ended_at is not None and first.ended_at < second.at, (
            f"two runs at once in {session}"
        )
    assert len(lost.told("recall.aborted", because="its lease could not be renewed")) == 2
    assert lost.told("database.lost"), "the silence was not noticed within the lease"
    await promise(hosts.app, "meanwhile")
    await kept.hears("recall.settled", session="meanwhile", within=5)
    # The kept runs have been renewed all the while.
    await eventually(
        hosts.db,
        "select 1 from session_recalls where lease_until > leased_at + %s * interval '1 second'",
        [PARTED + LEASE],
        within=60,
    )
    healed_at = time.monotonic()
    hosts.net.heal()
    await lost.hears("database.found", within=10)
    await lost.hears("listener.listening", times=2, within=15)
    # The other has a slot left at most. Once that is filled what comes next is the healed worker's.
    filling = await hosts.held({"filling": "once"})
    if kept.told("recall.claimed", session="filling"):
        await promise(hosts.app, "next")
        await lost.hears("recall.settled", session="next", within=5)
    assert time.monotonic() - healed_at < 20
    await end(hosts, its | others | filling, lost, kept)
    await account(hosts, again=set(its))
    assert len(lost.told("lease.lost")) == 2
    assert [len(lost.told(f"database.{what}")) for what in ("lost", "found")] == [1, 1]
    assert [len(kept.told(f"database.{what}")) for what in ("lost", "found")] == [0, 0]
    assert kept.told("recall.aborted") == kept.told("listener.lost") == []


def test_the_hosts_are_removed_also_after_a_failure() -> None:
    with pytest.raises(ZeroDivisionError), network.Network("a", "b") as net:
        namespaces = [net[name].namespace for name in ("a", "b")]
        assert all(Path(f"/run/netns/{namespace}").exists() for namespace in namespaces)
        _ = 1 / 0
    assert not any(Path(f"/run/netns/{namespace}").exists() for namespace in namespaces)


async def test_both_workers_and_the_database(hosts: Hosts) -> None:
    """The database is alone: both break off, nobody takes anything, and afterwards each run is
    called again under its key."""
    hosts.api.default = run
    one = await hosts.start("one", concurrency=2)
    gates = await hosts.held({"once": "once", "recurring": "recurring"})
    two = await hosts.start("two", concurrency=2)
    gates |= await hosts.held({"two's": "once"})
    for worker in ("one", "two"):
        hosts.net.cut(worker, "db")
    await one.hears("recall.aborted", times=2)
    await two.hears("recall.aborted", times=1)
    await eventually(
        hosts.db,
        "select 1 from session_recalls having max(lease_until) < now() - interval '8 seconds'",
        within=30,
    )
    await promise(hosts.app, "meanwhile")
    assert len(hosts.api.requests) == 3
    hosts.net.heal()
    for daemon in (one, two):
        await daemon.hears("database.found", within=10)
        await daemon.hears("listener.listening", times=2, within=15)
    await end(hosts, gates, one, two)
    await account(hosts, again=set(gates))
    for daemon in (one, two):
        assert [len(daemon.told(f"database.{what}")) for what in ("lost", "found")] == [1, 1]


async def test_a_worker_and_the_api(hosts: Hosts) -> None:
    """Runs that are open stay open and are renewed; what the API answers meanwhile arrives; new
    calls are kept; nobody calls twice."""
    hosts.api.default = run
    one = await hosts.start("one", concurrency=4)
    gates = await hosts.held({"once": "once", "recurring": "recurring"})
    two = await hosts.start("two", concurrency=4)
    hosts.net.cut("one", "api")
    for n in range(6):
        await promise(hosts.app, f"meanwhile {n}")
    gates["once"].open()
    await eventually(
        hosts.db,
        "select 1 from session_recalls where lease_until > leased_at + %s * interval '1 second'",
        [PARTED + LEASE],
        within=60,
    )
    hosts.net.heal()
    await promise(hosts.app, "afterwards")
    await end(hosts, gates, one, two)
    await account(hosts)
    for daemon in (one, two):
        assert [
            daemon.told(event)
            for event in ("database.lost", "lease.lost", "lease.taken", "recall.aborted")
        ] == [[]] * 4


async def test_a_worker_and_a_worker(hosts: Hosts) -> None:
    """They have nothing to say to each other: nothing happens."""
    hosts.api.default = run
    one = await hosts.start("one", concurrency=2)
    gates = await hosts.held({"once": "once", "recurring": "recurring"})
    two = await hosts.start("two", concurrency=2)
    gates |= await hosts.held({"two's": "once"})
    hosts.net.cut("one", "two")
    await promise(hosts.app, "meanwhile")
    await eventually(
        hosts.db,
        "select 1 from session_recalls where lease_until > leased_at + %s * interval '1 second'",
        [PARTED + LEASE],
        within=60,
    )
    hosts.net.heal()
    await end(hosts, gates, one, two)
    await account(hosts)
    for daemon in (one, two):
        assert [
            daemon.told(e)
            for e in (
                "database.lost",
                "listener.lost",
                "lease.lost",
                "lease.taken",
                "recall.aborted",
            )
        ] == [[]] * 5


async def test_an_api_that_vanishes_in_mid_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host says nothing any more, and answers no probe: the call breaks off as one that may
    have run, long before a run's time is up."""
    async with AsyncExitStack() as stack:
        net = stack.enter_context(network.Network("one", "api"))
        api = Endpoint()
        await api.start(on=stack.enter_context(closing(net["api"].socket())))
        stack.push_async_callback(api.stop)
        made = connection._socket

        def there(address: connection.Address) -> socket.socket:
            with net["one"].entered():
                return made(address)

        for name, value in (
            ("_socket", there),
            ("PROBE_AFTER", 1),
            ("PROBE_EVERY", 1),
            ("PROBES", 2),
        ):
            monkeypatch.setattr(connection, name, value)
        caller = http.HttpClient(Settings())
        stack.push_async_callback(caller.close)
        gate = Gate()
        api.script("s", gate)
        sent = asyncio.Event()
        call = asyncio.create_task(
            caller.post(
                api.url.replace("{session_id}", "s"),
                lambda: {"Idempotency-Key": "k:1"},
                b'{"session_id":"s"}',
                100.0,
                sent.set,
            )
        )
        await gate.entered.wait()
        # While both hosts are there, silence alone breaks nothing off.
        await asyncio.wait({call}, timeout=5)
        assert sent.is_set() and not call.done()
        net.cut("one", "api")
        async with asyncio.timeout(20):
            answer = await call
        assert isinstance(answer, http.NoAnswer) and answer.sent, answer

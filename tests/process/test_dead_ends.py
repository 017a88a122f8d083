"""Dead ends: nothing may stop a worker, or all of them, for good, or have it loop.

Each test leads real daemons into one. They must come out of it alone: SIGTERM is heard, runs
settle, due recalls are called, and PostgreSQL is asked no more often than it should be.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recall_worker.embedded import EmbeddedServer

from ..conftest import Connection, connected
from ..support.application import Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint, Gate, Raw, Request, reply
from ..test_cli import process
from .test_accepted import DONE, ON, accepted
from .test_corridor import soon
from .test_lease import eventually, promise, rows
from .test_outage import own_server, replicas  # noqa: F401 fixtures

pytestmark = pytest.mark.full

LATER = reply(503, {"error": "starting"}, {"retry-after": "3600"})
"""Trouble, and not due again while the test runs: no other probe comes between."""


async def comes_out(
    daemon: Daemon,
    endpoint: Endpoint,
    app: Application,
    session: str = "after",
) -> None:
    """The endpoint answers again: the daemon calls what is due, hears SIGTERM, and ends well."""
    endpoint.default = reply()
    await promise(app, session)
    await daemon.hears("recall.settled", session=session, status="fired", within=30)
    assert await daemon.stop() == 0


async def stopped_twice(daemon: Daemon) -> None:
    daemon.signal(signal.SIGTERM)
    await daemon.hears("worker.draining")
    daemon.signal(signal.SIGTERM)
    assert await daemon.exit() == 0


def cpu_seconds(daemon: Daemon) -> float:
    """Seconds of processor time that the daemon has used so far."""
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- 1: the claim loop that never turns again ----------------------------------------------------


@pytest.mark.parametrize("slots", [3, 1])
async def test_all_slots_in_hand_when_postgresql_is_killed(
    slots: int,
    own_server: EmbeddedServer,  # noqa: F811
    replicas: Daemons,  # noqa: F811
    endpoint: Endpoint,
) -> None:
    """PostgreSQL dies with all slots taken, and the API answers 503: a probe is due, no slot is."""
    gates = [Gate(LATER) for _ in range(slots)]
    sessions = [f"s{n}" for n in range(slots)]
    for session, gate in zip(sessions, gates, strict=True):
        endpoint.script(session, gate)
    daemon = await replicas.start(concurrency=slots, lease=12)
    async with await Application.connect(own_server.dsn()) as app:
        if slots == 1:
            # One slot meets trouble in one session at a time; the run in hand is then a probe.
            for session in ("a", "b"):
                endpoint.script(session, LATER)
                await promise(app, session)
            await daemon.hears("breaker.opened")
        for session in sessions:
            await promise(app, session)
        for gate in gates:
            await gate.entered.wait()
    own_server.kill()
    for gate in gates:
        gate.open()
    await daemon.hears("breaker.opened" if slots > 1 else "breaker.probed")
    await daemon.hears("database.lost")
    await asyncio.sleep(2.5)  # The next probe falls due: 1 s after it opened, or 2 s after a probe.
    own_server.start()
    await daemon.hears("database.found")
    for session in sessions:
        await daemon.hears("recall.settled", session=session, outcome="unavailable")
    async with await Application.connect(own_server.dsn()) as app:
        await comes_out(daemon, endpoint, app)


@pytest.mark.parametrize("sessions", [3, 2])
async def test_all_slots_in_hand_with_their_rows_locked(
    sessions: int, app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The application holds the rows of all runs locked for 5 s while the API answers 503."""
    gates = {f"s{n}": Gate(LATER) for n in range(sessions)}
    for session, gate in gates.items():
        endpoint.script(session, gate)
    daemon = await daemons.start(concurrency=sessions, lease=30)
    for session in gates:
        await promise(app, session)
    for gate in gates.values():
        await gate.entered.wait()
    async with await Application.connect(database) as holder:
        async with holder.connection.transaction():
            await holder.connection.execute("select 1 from session_recalls for update")
            for gate in gates.values():
                gate.open()
            await daemon.hears("breaker.opened")
            await asyncio.sleep(5)
    for session in gates:
        await daemon.hears("recall.settled", session=session, outcome="unavailable")
    await comes_out(daemon, endpoint, app)


@pytest.mark.full
async def test_the_one_slot_follows_an_accepted_run_of_a_dead_worker(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The breaker opens, and the one slot takes an accepted run up: it is polled to its end."""
    endpoint.script("acc", accepted("r1"))
    endpoint.scripts["GET r1"] = [ON]
    first = await daemons.start(lease=3)
    await promise(app, "acc")
    await endpoint.until(lambda: endpoint.of("r1", "GET"))
    await first.kill()
    for session in ("a", "b"):
        endpoint.script(session, LATER)
        await promise(app, session)
    second = await daemons.start(concurrency=1, lease=3)
    await second.hears("breaker.opened")
    await second.hears("lease.taken", session="acc")
    await asyncio.sleep(2)  # The worker looks again within a second, with a probe due and no slot.
    polled = len(endpoint.of("r1", "GET"))
    await endpoint.until(lambda: len(endpoint.of("r1", "GET")) > polled + 1)
    endpoint.scripts["GET r1"] = [DONE]
    await second.hears("recall.settled", session="acc", status="fired", attempt=1)
    assert len(endpoint.of("acc")) == 1
    await comes_out(second, endpoint, app)


@pytest.mark.full
async def test_a_full_worker_hears_a_second_sigterm(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """All slots wait for locked rows, the breaker is open, a probe is due: two signals end it."""
    gates = {f"s{n}": Gate(LATER) for n in range(3)}
    for session, gate in gates.items():
        endpoint.script(session, gate)
    daemon = await daemons.start(concurrency=3, lease=30)
    for session in gates:
        await promise(app, session)
    for gate in gates.values():
        await gate.entered.wait()
    async with await Application.connect(database) as holder:
        async with holder.connection.transaction():
            await holder.connection.execute("select 1 from session_recalls for update")
            for gate in gates.values():
                gate.open()
            await daemon.hears("breaker.opened")
            await asyncio.sleep(1.5)
            began = cpu_seconds(daemon)
            await asyncio.sleep(1)
            assert cpu_seconds(daemon) - began < 0.5, "it waits, and does not spin"
            await stopped_twice(daemon)


# --- 2: a cap on the fleet that counts the dead --------------------------------------------------


def at_once(endpoint: Endpoint) -> Callable[[], int]:
    """How many calls were open at the same time, at most. To be asked for before the first call."""
    most = 0
    running: set[int] = set()

    def look() -> bool:
        nonlocal most
        running.clear()
        calls = [(n, r) for n, r in enumerate(endpoint.requests) if r.method == "POST"]
        running.update(n for n, r in calls if r.ended_at is None)
        most = max(most, len(running))
        return False

    watching = asyncio.ensure_future(endpoint.until(look, within=600))

    def answer() -> int:
        watching.cancel()
        return most

    return answer


async def test_a_cap_filled_by_dead_workers_is_free_when_their_leases_end(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Cap 2, SIGKILL with 2 in hand: two fresh workers call them and 20 others, two at once."""
    gates = [Gate(), Gate()]
    sessions = [f"s{n}" for n in range(20)]
    first = await daemons.start(fleet_concurrency=2, concurrency=2, lease=2)
    for n, gate in enumerate(gates):
        endpoint.script(f"held{n}", gate, reply())
        await promise(app, f"held{n}", "once")
        await gate.entered.wait()
    await first.kill()
    most = at_once(endpoint)
    for session in sessions:
        await promise(app, session, "once")
    fresh = [await daemons.start(fleet_concurrency=2, concurrency=5, lease=2) for _ in range(2)]
    wanted = {*sessions}
    await endpoint.until(lambda: wanted <= {r.session for r in endpoint.requests if r.answered})
    for n in range(2):
        assert len(await endpoint.count(2, f"held{n}")) == 2
        assert len({r.key for r in endpoint.of(f"held{n}")}) == 1
    await eventually(db, "select 1 from session_recalls having bool_and(status = 'fired')")
    assert most() <= 2
    assert Counter(r.session for r in endpoint.requests).most_common(3)[2][1] == 1, "once each"
    for daemon in fresh:
        assert await daemon.stop() == 0


async def test_a_cap_filled_by_an_accepted_run_that_was_handed_over(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Cap 1, an accepted run and a graceful stop: the next worker polls it to its end."""
    endpoint.script("acc", accepted("r1"))
    endpoint.scripts["GET r1"] = [ON]
    first = await daemons.start(fleet_concurrency=1, lease=6, drain_timeout=0)
    await promise(app, "acc")
    await endpoint.until(lambda: endpoint.of("r1", "GET"))
    assert await first.stop() == 0
    endpoint.scripts["GET r1"] = [DONE]
    second = await daemons.start(fleet_concurrency=1, lease=6)
    await promise(app, "other")
    await second.hears("recall.settled", session="acc", status="fired", attempt=1, within=15)
    await second.hears("recall.settled", session="other", status="fired")
    assert len(endpoint.of("acc")) == 1
    assert await second.stop() == 0


@pytest.mark.full
async def test_the_cap_holds_over_an_outage(
    own_server: EmbeddedServer,  # noqa: F811
    replicas: Daemons,  # noqa: F811
    endpoint: Endpoint,
) -> None:
    """PostgreSQL is away for three leases with the cap's two runs open: never a third at once."""
    lease = 2.0
    gates = [Gate(), Gate()]
    for n, gate in enumerate(gates):
        endpoint.script(f"held{n}", gate, reply())
    most = at_once(endpoint)
    capped: dict[str, Any] = {"fleet_concurrency": 2, "concurrency": 5, "lease": lease}
    workers = [await replicas.start(**capped) for _ in range(2)]
    async with await Application.connect(own_server.dsn()) as app:
        for n, gate in enumerate(gates):
            await promise(app, f"held{n}", "once")
            await gate.entered.wait()
        for n in range(10):
            await promise(app, f"s{n}", "once")

    async def brief(_: Request) -> Raw:
        await asyncio.sleep(0.05)
        return reply()

    endpoint.default = brief
    own_server.kill()
    for daemon in workers:
        await daemon.hears("database.lost")
    await asyncio.sleep(3 * lease)
    own_server.start()
    for daemon in workers:
        await daemon.hears("database.found")
    # The leases have ended; their owners run on, and are the first to have them again.
    await asyncio.sleep(lease)
    assert len(endpoint.requests) == 2, "nothing beside the two runs that are open"
    for gate in gates:
        gate.open()
    await endpoint.count(12)
    async with connected(own_server.dsn()) as db:
        await eventually(db, "select 1 from session_recalls having bool_and(status = 'fired')")
    assert most() == 2
    assert len(endpoint.requests) == 12


async def test_why_names_a_cap_that_is_full(
    app: Application,
    database: str,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """While the fleet's one place is taken `why` says of a due recall that it waits for the cap."""
    gate = Gate()
    endpoint.script("held", gate)
    daemon = await daemons.start(fleet_concurrency=1, concurrency=3)
    await promise(app, "held")
    await gate.entered.wait()
    waiting = await promise(app, "waiting")
    await daemon.hears("claim.answered", times=2)
    said = await asyncio.to_thread(process, database, "why", waiting)
    gate.open()
    await daemon.hears("recall.settled", session="waiting")
    assert said.returncode == 0
    assert "RECALL_FLEET_CONCURRENCY" in said.stdout


# --- 3: a loop of claims -------------------------------------------------------------------------


async def committed(db: Connection) -> int:
    """Transactions of this database so far, as far as its backends have reported them."""
    await db.execute("select pg_stat_clear_snapshot()")
    count = "select xact_commit as n from pg_stat_database where datname = current_database()"
    found = await rows(db, count)
    return int(found[0]["n"])


@pytest.mark.parametrize("sessions", [25, 3])
@pytest.mark.parametrize("how", ["restarted", "killed", "worker stopped"])
async def test_what_is_due_and_cannot_be_claimed_is_asked_for_now_and_then(
    how: str,
    sessions: int,
    own_server: EmbeddedServer,  # noqa: F811
    replicas: Daemons,  # noqa: F811
    endpoint: Endpoint,
) -> None:
    """Sessions in a run whose next links are due, and then an outage: a few claims a second."""
    gates = {f"s{n}": Gate() for n in range(sessions)}
    for session, gate in gates.items():
        endpoint.script(session, gate, reply())
    daemon = await replicas.start(concurrency=sessions + 5, lease=9)
    async with await Application.connect(own_server.dsn()) as app:
        for session, gate in gates.items():
            await promise(app, session, "once")
            await gate.entered.wait()
        for session in gates:
            await app.schedule(session, "once", soon(0), "the next link")
    asked = len(daemon.told("claim.answered"))
    if how == "worker stopped":
        daemon.signal(signal.SIGSTOP)
        await asyncio.sleep(5)  # More than a third of a lease, counted from the end of its wait.
        daemon.signal(signal.SIGCONT)
    else:
        (own_server.shutdown if how == "restarted" else own_server.kill)()
        await daemon.hears("database.lost")
        own_server.start()
        await daemon.hears("database.found")
        await daemon.hears("claim.answered", times=asked + 1)
    async with connected(own_server.dsn()) as db:
        asked, before = len(daemon.told("claim.answered")), await committed(db)
        seconds = 2.5  # Of the third of a lease in which ended leases are left to their owners.
        await asyncio.sleep(seconds)
        claims = len(daemon.told("claim.answered")) - asked
        transactions = await committed(db) - before
        print(f"{sessions} sessions, {how}: {claims} claims, {transactions} transactions")
        assert claims < 20 * seconds
        assert transactions < 40 * seconds
        for gate in gates.values():
            gate.open()
        await eventually(db, "select 1 from session_recalls having bool_and(status = 'fired')")
    assert len(endpoint.requests) == 2 * sessions
    assert await daemon.stop() == 0


# --- 5: locked rows that queue behind each other -------------------------------------------------


@pytest.mark.parametrize("locked", [40, 1])
async def test_a_settle_does_not_wait_for_other_locked_rows(
    locked: int,
    app: Application,
    database: str,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Rows that the application locks for long, and one for 0.3 s: its settle waits for its own."""
    long = [f"long{n}" for n in range(locked)]
    gates = {session: Gate() for session in [*long, "brief"]}
    for session, gate in gates.items():
        endpoint.script(session, gate)
    daemon = await daemons.start(concurrency=locked + 1, lease=120)
    for session, gate in gates.items():
        await promise(app, session)
        await gate.entered.wait()
    lock = "select 1 from session_recalls where session_id = any ($1) for update"
    async with (
        await Application.connect(database) as one,
        await Application.connect(database) as other,
    ):
        held = one.connection.transaction()
        await held.start()
        await one.connection.execute(lock, long)
        for session in long:
            gates[session].open()
        settles = "batch.settled"
        await daemon.until(lambda: sum(e["endings"] for e in daemon.told(settles)) >= locked)
        async with other.connection.transaction():
            await other.connection.execute(lock, ["brief"])
            gates["brief"].open()
            await asyncio.sleep(0.3)
        began = time.monotonic()
        await daemon.hears("recall.settled", session="brief", status="fired", within=60)
        assert time.monotonic() - began < 2
        assert [e["session"] for e in daemon.told("recall.settled")] == ["brief"]
        # And they do not wait for each other either, once they are free.
        await held.rollback()
        began = time.monotonic()
        await daemon.hears("recall.settled", times=locked + 1, within=60)
        assert time.monotonic() - began < 4
    assert await daemon.stop() == 0


async def test_a_new_recall_is_called_while_rows_are_locked(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Many settles stand behind locks: claims, renewals and other settles go on."""
    gates = {f"long{n}": Gate() for n in range(40)}
    for session, gate in gates.items():
        endpoint.script(session, gate)
    daemon = await daemons.start(concurrency=41, lease=3)
    for session, gate in gates.items():
        await promise(app, session)
        await gate.entered.wait()
    async with await Application.connect(database) as one:
        async with one.connection.transaction():
            await one.connection.execute("select 1 from session_recalls for update")
            for gate in gates.values():
                gate.open()
            settles = "batch.settled"
            await daemon.until(lambda: sum(e["endings"] for e in daemon.told(settles)) >= 40)
            await promise(app, "other")
            await daemon.hears("recall.settled", session="other", status="fired", within=3)
            await asyncio.sleep(4)  # Longer than their leases.
    await daemon.hears("recall.settled", times=41)
    assert daemon.told("lease.taken") == daemon.told("lease.lost") == []
    assert len(endpoint.requests) == 41


@pytest.mark.full
async def test_a_cron_recall_that_can_not_be_put_on_its_moment(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A trigger of the application's refuses every update of one row: others are called on time."""
    await app.create_session("frozen", "ann")
    await db.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, status, created_at,"
        " updated_at, additional_context_message, cadence, cron, time_zone) values ('frozen',"
        " 'frozen', 'recurring', now() + interval '1 day', 'pending', now(), now(), 'x', 'cron',"
        " '0 0 * * *', 'UTC')"
    )
    await db.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception "
        "'frozen'; end $$"
    )
    await db.execute(
        "create trigger zz before update on session_recalls for each row when (old.id = "
        "'frozen') execute function refuse()"
    )
    daemon = await daemons.start()
    for n in range(4):
        await promise(app, f"s{n}", "once", 4 + 1.7 * n)
    settled = await daemon.hears("recall.settled", times=4, status="fired")
    assert max(event["lateness_ms"] for event in settled) < 1000
    assert [e["error"] for e in daemon.told("recall.stranded")] == ["frozen"], "told once"
    assert daemon.told("worker.error") == []

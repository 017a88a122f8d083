"""Dead ends: nothing may stop a worker, or all of them, for good, or have it ask PostgreSQL in a loop.

Each test leads real daemons into one. They must come out of it alone: SIGTERM is heard, runs settle,
due recalls are called, and PostgreSQL is asked no more often than it should be.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from recall_worker.cli.embedded import EmbeddedServer

from ..application import Application
from ..daemon import Daemon, Daemons
from ..endpoint import Endpoint, Gate, reply
from .test_accepted import DONE, ON, accepted
from .test_lease import promise
from .test_outage import own_server, replicas  # noqa: F401 fixtures

LATER = reply(503, {"error": "starting"}, {"retry-after": "3600"})
"""Trouble, and not due again while the test runs: no other probe takes the place of what is tested."""


async def comes_out(daemon: Daemon, endpoint: Endpoint, app: Application, session: str = "after") -> None:
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


# --- 1: the claim loop that never turns again ---------------------------------------------------


@pytest.mark.parametrize("slots", [3, 1])
async def test_all_slots_in_hand_when_postgresql_is_killed(
    slots: int,
    own_server: EmbeddedServer,  # noqa: F811
    replicas: Daemons,  # noqa: F811
    endpoint: Endpoint,
) -> None:
    """PostgreSQL dies with all slots taken while the API answers 503: a probe is due, no slot is."""
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

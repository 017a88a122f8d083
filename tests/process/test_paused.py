"""Paused: PostgreSQL stopped, which takes connections and says nothing; and a worker stopped for
longer than its lease."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

import pytest

from recall_worker.embedded import EmbeddedServer

from ..conftest import Connection, connected
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from .test_corridor import row
from .test_lease import calls, eventually, promise
from .test_outage import own_server, replicas  # noqa: F401 fixtures

LEASE = 3.0


@pytest.mark.full
async def test_postgresql(
    own_server: EmbeddedServer,  # noqa: F811
    replicas: Daemons,  # noqa: F811
    endpoint: Endpoint,
) -> None:
    """A paused PostgreSQL can't be told from one that others reach: runs are broken off, and called
    again under their keys when it goes on."""
    gates = {session: Gate() for session in ("once", "recurring", "also")}
    for session, gate in gates.items():
        endpoint.script(session, gate, reply())
    one, two = [await replicas.start(lease=LEASE, concurrency=2) for _ in range(2)]
    async with await Application.connect(own_server.dsn()) as app:
        for session in gates:
            await promise(
                app, session, "recurring" if session == "recurring" else "once", interval=3600
            )
        for gate in gates.values():
            await gate.entered.wait()
    stopped = [own_server.pid, *own_server.processes()]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        for gate in gates.values():
            async with asyncio.timeout(LEASE + 2):
                await gate.hung_up.wait()
        for daemon in (one, two):
            await daemon.hears("database.lost")
        # What PostgreSQL can't say: three leases, by this host's clock.
        await asyncio.sleep(2 * LEASE)
        assert len(endpoint.requests) == 3
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    async with connected(own_server.dsn()) as db:
        await eventually(
            db,
            "select 1 from session_recalls having bool_and(case call_type when 'recurring' then "
            "occurrence = 2 else status = 'fired' end)",
            within=30,
        )
        for session in gates:
            first, second = endpoint.of(session)
            assert first.key == second.key
        aborted = one.told("recall.aborted") + two.told("recall.aborted")
        assert [event["because"] for event in aborted] == ["its lease could not be renewed"] * 3
    for daemon in (one, two):
        await daemon.hears("database.found")
        assert [len(daemon.told(f"database.{what}")) for what in ("lost", "found")] == [1, 1]
        assert await daemon.stop() == 0


@pytest.mark.full
async def test_a_worker(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Stopped with a run open for longer than its lease: it finds the lease gone, breaks the call
    off, and settles nothing."""
    gate, successor = Gate(), Gate()
    endpoint.script("s", gate, successor)
    stopped = await daemons.start(lease=LEASE)
    recall = await promise(app, "s", "recurring", interval=3600)
    await gate.entered.wait()
    other = await daemons.start(lease=LEASE)
    stopped.signal(signal.SIGSTOP)
    await other.hears("lease.taken", recall=recall, worker_before=stopped.name)
    await successor.entered.wait()
    before = await row(db, "s")
    stopped.signal(signal.SIGCONT)
    await gate.hung_up.wait()
    await stopped.hears("recall.aborted", recall=recall)
    await stopped.hears("lease.lost", recall=recall)
    after = await row(db, "s")
    assert {k: after[k] for k in after if k != "lease_until"} == {
        k: before[k] for k in before if k != "lease_until"
    }
    successor.open()
    await other.hears("recall.settled", recall=recall, attempt=2)
    assert stopped.told("recall.settled") == []
    assert [request.key for request in endpoint.requests] == [f"{recall}:1"] * 2
    assert [
        (c["attempt"], c["settled"]) for c in await calls(db, recall) if c["worker"] == other.name
    ] == [(2, "pending")]
    # It works on: with the other one's only slot free or not, both claim.
    await promise(app, "next")
    await endpoint.count(1, "next")

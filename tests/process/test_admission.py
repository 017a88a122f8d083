"""Admission: PostgreSQL is there and lets nobody in, or not this worker. Told as it is; what may go
on goes on."""

from __future__ import annotations

import os
import signal
from urllib.parse import urlsplit, urlunsplit

import pytest

from recall_worker.embedded import EmbeddedServer

from ..conftest import connected
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from .test_corridor import row
from .test_lease import eventually, promise, rows
from .test_outage import own_server, replicas, terminate  # noqa: F401 fixtures

LEASE = 2.0


@pytest.mark.full
async def test_shutting_down(
    own_server: EmbeddedServer,  # noqa: F811
    replicas: Daemons,  # noqa: F811
    endpoint: Endpoint,
) -> None:
    """It lets nobody in for three leases: so nobody takes leases either. The run goes on, and is
    settled when it is up again."""
    gate = Gate()
    endpoint.script("open", gate)
    one = await replicas.start(lease=LEASE, concurrency=1)
    async with await Application.connect(own_server.dsn()) as app:
        recall = await promise(app, "open", "once")
        await gate.entered.wait()
    two = await replicas.start(lease=LEASE, concurrency=1)
    async with connected(own_server.dsn()) as holder:
        # A smart shutdown: as long as somebody is in PostgreSQL stays up, and takes nobody else.
        os.kill(own_server.pid, signal.SIGTERM)
        await eventually(
            holder,
            "select 1 where now() > %s",
            [(await rows(holder, "select now() as at"))[0]["at"]],
        )
        await terminate(holder, "recall-worker")
        for daemon in (one, two):
            await daemon.hears("database.lost")
        await eventually(
            holder,
            "select 1 from session_recalls where lease_until < now() - %s * interval '1 second'",
            [2 * LEASE],
            within=30,
        )
    own_server.shutdown()
    own_server.start()
    for daemon in (one, two):
        await daemon.hears("database.found")
    gate.open()
    await one.hears("recall.settled", recall=recall, attempt=1, status="fired")
    assert len(endpoint.requests) == 1
    for daemon in (one, two):
        assert (
            daemon.told("recall.aborted")
            == daemon.told("lease.taken")
            == daemon.told("lease.lost")
            == []
        )
        assert [len(daemon.told(f"database.{what}")) for what in ("lost", "found")] == [1, 1]
        assert await daemon.stop() == 0


@pytest.mark.full
@pytest.mark.parametrize("long", [False, True], ids=["for less than a lease", "for longer"])
async def test_too_many_clients(long: bool, own_server: EmbeddedServer, endpoint: Endpoint) -> None:  # noqa: F811
    """Whoever is out stays out, whoever is in stays in, and may take leases. So a run is broken
    off, but not before its lease ends."""
    parts = urlsplit(own_server.dsn())
    limited = urlunsplit(parts._replace(netloc="limited@"))
    gate = Gate()
    endpoint.script("open", gate, reply())
    async with (
        connected(own_server.dsn()) as db,
        await Application.connect(own_server.dsn()) as app,
        Daemons({"RECALL_RUN_URL": endpoint.url}) as workers,
    ):
        await db.execute("create role limited login connection limit 6")
        await db.execute("grant all on all tables in schema public to limited")
        out = await workers.start(lease=3, concurrency=1, dsn=limited)
        recall = await promise(app, "open", "once")
        await gate.entered.wait()
        stays = await workers.start(lease=3, concurrency=1, dsn=own_server.dsn())
        await db.execute("alter role limited connection limit 0")
        await rows(
            db, "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'limited'"
        )
        await out.hears("database.lost")
        if long:
            await out.hears(
                "recall.aborted", recall=recall, because="its lease could not be renewed"
            )
            await stays.hears("recall.settled", recall=recall, attempt=2, status="fired")
            first, second = endpoint.requests
            assert first.key == second.key
            assert first.ended_at is not None
            assert first.ended_at < second.at
        await db.execute("alter role limited connection limit 6")
        await out.hears("database.found")
        if not long:
            await eventually(
                db,
                "select 1 from session_recalls where lease_until > leased_at + interval '6 "
                "seconds'",
            )
            gate.open()
            await out.hears("recall.settled", recall=recall, attempt=1, status="fired")
            assert len(endpoint.requests) == 1
            assert out.told("recall.aborted") == []
        assert (await row(db, "open"))["status"] == "fired"
        [lost] = out.told("database.lost")
        assert (
            "too many connections" in lost["reason"] or "terminating connection" in lost["reason"]
        )

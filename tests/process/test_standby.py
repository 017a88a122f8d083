"""A synchronous standby that is gone: PostgreSQL holds every commit up. Workers open no more
connections than they may, the application keeps its own, and what goes on is called once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator

import psycopg
import pytest

from recall_worker import schema
from recall_worker.database.budget import CONNECTIONS_MOST
from recall_worker.embedded import EmbeddedServer

from ..conftest import Connection, connected
from ..support import postgres
from ..support.application import CREATE_TABLES, Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate
from .test_lease import HELD, calls, eventually, promise, rows

LEASE = 4.0
PLACES = 24
"""Connections that this PostgreSQL has, three of them for superusers."""


@pytest.fixture
def crowded() -> Iterator[EmbeddedServer]:
    """A PostgreSQL with few connections that could have a standby, with the application's tables,
    adopted."""
    server = postgres.embedded(
        settings={
            "wal_level": "replica",
            "max_wal_senders": "2",
            "max_connections": str(PLACES),
        }
    )
    with server:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
        schema.migrate(server.dsn())
        yield server


async def standby(db: Connection, name: str) -> None:
    """Have every commit wait for a standby of this name; of none where it is empty."""
    await db.execute(f"alter system set synchronous_standby_names = '{name}'".encode())
    await db.execute("select pg_reload_conf()")
    await eventually(db, "select 1 where current_setting('synchronous_standby_names') = %s", [name])


@pytest.mark.full
@pytest.mark.parametrize("leases", [1, 4])
@pytest.mark.timeout(240)
async def test_commits_that_hang(leases: int, crowded: EmbeddedServer, endpoint: Endpoint) -> None:
    """For a lease, and for several: counted by PostgreSQL, no worker has more than its places, the
    application gets a connection all the while; the open run is renewed, what falls due is put
    back, and is called once when commits pass."""
    gate = Gate()
    endpoint.script("open", gate)
    environ = {"RECALL_DSN": crowded.dsn(), "RECALL_RUN_URL": endpoint.url}
    async with (
        connected(crowded.dsn()) as db,
        await Application.connect(crowded.dsn()) as app,
        Daemons(environ) as daemons,
    ):
        for conn in (db.execute, app.connection.execute):
            await conn("set synchronous_commit = local")
        one, two = [await daemons.start(lease=LEASE, poll_interval=1) for _ in range(2)]
        recall = await promise(app, "open", "once")
        await gate.entered.wait()
        await standby(db, "nobody")
        late = await promise(app, "late", "once")
        until, most = time.monotonic() + leases * LEASE, Counter[str]()
        while time.monotonic() < until:
            found = await rows(
                db,
                "select split_part(application_name, ' ', 3) as worker, count(*) as n "
                "from pg_stat_activity where application_name like 'recall-worker %' group by 1",
            )
            most |= Counter({str(row["worker"]): int(row["n"]) for row in found})
            async with connected(crowded.dsn()) as another:
                await another.execute("select pg_sleep(0.05)")
        assert set(most) == {one.name, two.name}
        assert max(most.values()) <= CONNECTIONS_MOST
        # Nothing was hung up on: the connections are those of every day.
        assert max(most.values()) <= 5
        await asyncio.wait(
            [
                asyncio.ensure_future(daemon.hears("recall.claimed", recall=late))
                for daemon in (one, two)
            ],
            return_when=asyncio.FIRST_COMPLETED,
        )
        assert endpoint.of("late") == []
        await eventually(db, HELD, ["open"])
        await standby(db, "")
        await endpoint.count(1, "late")
        gate.open()
        for id in (recall, late):
            await eventually(
                db, "select 1 from session_recalls where id = %s and status = 'fired'", [id]
            )
            assert [(c["attempt"], c["outcome"]) for c in await calls(db, id)] == [(1, "answered")]
        assert len(endpoint.requests) == 2
        for daemon in (one, two):
            # Told once by each that had something to commit: who claimed neither of the two says
            # only that it is alive, every few seconds.
            if daemon.told("recall.claimed"):
                await daemon.hears("commit.unconfirmed")
            if daemon.told("commit.unconfirmed"):
                await daemon.hears("commit.confirmed")
            for event in ("commit.unconfirmed", "commit.confirmed"):
                assert len(daemon.told(event)) <= 1
            assert [
                daemon.told(event)
                for event in ("recall.aborted", "lease.taken", "lease.lost", "worker.error")
            ] == [[]] * 4
            assert await daemon.stop() == 0

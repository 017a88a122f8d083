"""Half-open: one connection's peer is gone without a word, as behind a router that forgot it. It is
noticed in time, and replaced."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from recall_worker.database.connection import Deadlines, session_setup

from ..conftest import Connection, connected
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate
from ..support.proxy import Proxy
from .test_lease import calls, eventually, promise

LEASE = 4.0
"""Seconds. A statement has one of them, a connection two."""


@pytest.mark.full
@pytest.mark.parametrize("n", range(3))
async def test_a_line_of_the_ledger(
    n: int, app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Whichever of claims, settles and renewals it is: within a lease it is replaced, nothing is
    broken off, lost, or called twice."""
    gate = Gate()
    endpoint.script("open", gate)
    async with Proxy(database) as proxy:
        daemon = await daemons.start(lease=LEASE, dsn=proxy.dsn, listen_dsn=database)
        await promise(app, "before")
        await daemon.hears("recall.settled", session="before")
        recall = await promise(app, "open")
        await gate.entered.wait()
        await proxy.until(lambda: proxy.open == 3)
        proxy.forget(n)
        await promise(app, "meanwhile")
        await daemon.hears("recall.settled", session="meanwhile", within=LEASE)
        await eventually(
            db,
            "select 1 from session_recalls where lease_until > leased_at + %s * interval '1 "
            "second'",
            [3 * LEASE],
        )
        gate.open()
        await daemon.hears("recall.settled", recall=recall, attempt=1)
        # What a look at a notification found dead was replaced before anybody else asked: then
        # there was nothing to tell.
        assert [len(daemon.told(f"database.{what}")) for what in ("lost", "found")] in (
            [1, 1],
            [0, 0],
        )
        assert [(call["outcome"], call["settled"]) for call in await calls(db, recall)] == [
            ("answered", "fired")
        ]
    assert sorted(request.session for request in endpoint.requests) == [
        "before",
        "meanwhile",
        "open",
    ]
    assert (
        daemon.told("recall.aborted")
        == daemon.told("lease.taken")
        == daemon.told("lease.lost")
        == []
    )


@pytest.mark.full
async def test_the_listener(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """It notifies itself every other second, gives that five, and a question five more: then it
    connects anew, and hears what is notified."""
    async with Proxy(database) as proxy:
        daemon = await daemons.start(lease=LEASE, listen_dsn=proxy.dsn, poll_interval=30)
        proxy.forget(0)
        await daemon.hears("listener.lost", within=2 + 5 + 5 + 3)
        await daemon.hears("listener.listening", times=2, within=5)
        await promise(app, "heard")
        async with asyncio.timeout(5):
            await endpoint.count(1, "heard")
    assert daemon.told("database.lost") == []


async def test_postgresql_has_bounds_for_a_silence_too(database: str) -> None:
    """On a connection that has arrived the server's own deadlines are drawn from the lease: a
    vanished worker's locks end before that does."""
    conn = await psycopg.AsyncConnection.connect(database, autocommit=True)
    assert await session_setup(conn, Deadlines.within(LEASE).statement)
    for name, value in {
        "statement_timeout": "1s",
        "lock_timeout": "500ms",
        "idle_in_transaction_session_timeout": "1s",
    }.items():
        assert await (await conn.execute(f"show {name}".encode())).fetchone() == (value,), name
    await conn.execute("begin")
    await conn.execute("select pg_advisory_xact_lock(1)")
    async with connected(database) as other:
        await eventually(
            other, "select 1 from (select pg_try_advisory_lock(1) as had) l where had", within=LEASE
        )
    with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
        await conn.execute("commit")
    await conn.close()

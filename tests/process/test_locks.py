"""Locks of the application's: of the whole table (`vacuum full`, an ALTER in an open transaction)
and of a row. PostgreSQL answers, so it is no outage; and a run that goes on is not called again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from recall_worker.database.ledger import GRACE_AFTER_OUTAGE, Ledger

from ..conftest import Connection, connected
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from .test_lease import HELD, calls, eventually, promise

LEASE = 3.0
"""Of ledgers that the tests ask themselves."""


@asynccontextmanager
async def locked(dsn: str, mode: str = "access exclusive") -> AsyncIterator[Connection]:
    """The whole table is locked by an open transaction."""
    async with connected(dsn) as holder, holder.transaction():
        await holder.execute(f"lock table session_recalls in {mode} mode".encode())
        yield holder


async def for_leases(holder: Connection, leases: float, lease: float) -> None:
    """Wait until the holder's transaction is so many leases old, by PostgreSQL's clock."""
    await eventually(
        holder,
        "select 1 where clock_timestamp() > now() + %s * interval '1 second'",
        [leases * lease],
        within=leases * lease + 20,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lease", "mode"),
    [
        (1.0, "access exclusive"),
        pytest.param(1.0, "share row exclusive", marks=pytest.mark.full),
        pytest.param(4.0, "access exclusive", marks=pytest.mark.full),
        pytest.param(4.0, "exclusive", marks=pytest.mark.full),
    ],
)
async def test_a_table_locked_for_three_leases(
    lease: float,
    mode: str,
    app: Application,
    database: str,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """With a run open, two replicas: it goes on and is called once, no outage is told, and the lock
    is told once by each, with how long it took."""
    gate = Gate()
    endpoint.script("s", gate)
    one = await daemons.start(lease=lease, poll_interval=1)
    recall = await promise(app, "s", "once")
    await gate.entered.wait()
    two = await daemons.start(lease=lease, poll_interval=1)
    async with locked(database, mode) as holder:
        await for_leases(holder, 3, lease)
        for daemon in (one, two):
            await daemon.hears("table.locked")
    await eventually(db, HELD, ["s"])
    for daemon in (one, two):
        (unlocked,) = await daemon.hears("table.unlocked")
        assert unlocked["after_s"] > 1.5 * lease
    # The grace after it is over, and leases are taken up again.
    await eventually(
        db,
        "select 1 from session_recalls where lease_until > %s::timestamptz + %s * interval '1 s'",
        [unlocked["timestamp"], 2 * lease],
    )
    gate.open()
    await one.hears("recall.settled", recall=recall, attempt=1, status="fired")
    assert len(endpoint.requests) == 1
    for daemon in (one, two):
        assert [
            len(daemon.told(event))
            for event in (
                "table.locked",
                "table.unlocked",
                "database.lost",
                "recall.aborted",
                "lease.taken",
                "lease.lost",
                "worker.error",
            )
        ] == [1, 1, 0, 0, 0, 0, 0]
    assert [(c["attempt"], c["outcome"]) for c in await calls(db, recall)] == [(1, "answered")]


@pytest.mark.slow
async def test_an_owner_that_dies_under_a_lock(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Nobody renews after the lock: then another worker takes the row up, under the same key."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    one = await daemons.start(lease=1)
    recall = await promise(app, "s", "once")
    await gate.entered.wait()
    two = await daemons.start(lease=1, poll_interval=1)
    async with locked(database) as holder:
        await one.kill()
        await for_leases(holder, 1.5, 1)
    await two.hears("lease.taken", recall=recall, worker_before=one.name)
    await two.hears("recall.settled", recall=recall, attempt=2, status="fired")
    assert [request.key for request in endpoint.requests] == [f"{recall}:1"] * 2


@pytest.mark.full
async def test_a_row_locked_for_two_leases(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Its renewal is passed over, and told; the other run in the same batch is renewed all the
    while. Nobody else takes either of them."""
    gates = {session: Gate() for session in ("locked", "free")}
    for session, gate in gates.items():
        endpoint.script(session, gate)
    one = await daemons.start(lease=3)
    ids = {session: await promise(app, session, "once") for session in gates}
    for gate in gates.values():
        await gate.entered.wait()
    two = await daemons.start(lease=3, poll_interval=1)
    async with connected(database) as holder, holder.transaction():
        await holder.execute("select from session_recalls where session_id = 'locked' for update")
        told = await one.hears("lease.locked")
        await eventually(
            db,
            "select 1 from session_recalls where session_id = 'locked' "
            "and lease_until < now() - interval '3 seconds'",
        )
        await eventually(db, HELD, ["free"])
        assert one.told("lease.unlocked") == []
    (unlocked,) = await one.hears("lease.unlocked")
    assert unlocked["after_s"] > 3
    await eventually(db, HELD, ["locked"])
    for gate in gates.values():
        gate.open()
    for id in ids.values():
        await one.hears("recall.settled", recall=id, attempt=1)
    assert [event["recall"] for event in told] == [ids["locked"]]
    assert len(one.told("lease.locked")) == 1
    assert len(endpoint.requests) == 2
    for daemon in (one, two):
        assert daemon.told("table.locked") == daemon.told("database.lost") == []
        assert daemon.told("lease.taken") == daemon.told("recall.aborted") == []


@pytest.mark.slow
async def test_who_waited_for_the_lock_leaves_leases_to_their_owners(
    app: Application, database: str, db: Connection
) -> None:
    """A query for ended leases, or the taking up itself, that gets its lock in the moment when the
    table is unlocked: it takes nothing, as the owner was locked out, too; later it does."""
    owner, other = (Ledger(database, name, LEASE) for name in ("owner", "other"))
    await promise(app, "s", "once")
    (claim,) = (await owner.claim(1)).claims
    await eventually(db, "select 1 where pg_postmaster_start_time() < now() - interval '1 second'")
    # Planned, so that planning is not taken for waiting.
    assert (await other.ended_leases()).unanswered == []
    assert (await other.take_up(["nobody"])).claims == []
    await db.execute("update session_recalls set lease_until = now() - interval '1 hour'")
    for ask in (
        lambda: other.ended_leases(),
        lambda: other.take_up([claim.id]),
    ):
        async with locked(database):
            asking = asyncio.ensure_future(ask())
            await eventually(
                db,
                "select 1 from pg_stat_activity where wait_event_type = 'Lock' "
                "and clock_timestamp() > query_start + interval '0.4 seconds' "
                "and datname = current_database()",
            )
        found = await asking
        assert not (getattr(found, "unanswered", None) or getattr(found, "claims", None))
        assert (await other.ended_leases()).unanswered == []
        async with asyncio.timeout(LEASE * GRACE_AFTER_OUTAGE + 5):
            while (await other.ended_leases()).unanswered != [claim.id]:
                await db.execute("select pg_sleep(0.05)")
    (taken,) = (await other.take_up([claim.id])).claims
    assert taken.taken_from == "owner"
    assert await owner.renew({claim.id: claim.lease}) == {claim.id: "lost"}
    for ledger in (owner, other):
        await ledger.close()


async def test_a_claim_under_a_lock_says_so(app: Application, database: str) -> None:
    """A claim and a renewal of a locked table: whose lock it is, and that the statement itself was
    right; a row that an index makes wait is not the table."""
    ledger = Ledger(database, "w", LEASE)
    await promise(app, "s", "once")
    async with locked(database):
        claimed = await ledger.claim(1)
        assert claimed.refused and claimed.claims == []
        assert claimed.locked is not None and "lock timeout" in claimed.locked
    claimed = await ledger.claim(1)
    assert len(claimed.claims) == 1 and claimed.locked is None
    await ledger.close()

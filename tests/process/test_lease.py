"""The lease: who may settle, what becomes of the runs of workers that die, stall or are cut off,
and what a lock does to it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from typing import Any

import pytest

from ..conftest import Connection, connected
from ..support.application import MARK_CANCELLED, MARK_FIRED, RESCHEDULE, Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint, Gate, Raw, Request, reply
from ..support.proxy import Proxy
from .test_corridor import row, soon


async def rows(db: Connection, query: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
    return await (await db.execute(query.encode(), values or None)).fetchall()


async def eventually(
    db: Connection, query: str, values: Sequence[Any] = (), within: float = 20.0
) -> dict[str, Any]:
    """Ask until the query answers with a row, and return that. Raises TimeoutError with the table
    as it stands."""
    try:
        async with asyncio.timeout(within):
            while True:
                if found := await rows(db, query, values):
                    return found[0]
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise TimeoutError(
            f"not within {within} s: {query}\n{await rows(db, 'select * from session_recalls')}"
        ) from None


async def promise(
    app: Application,
    session: str,
    call_type: str = "immediate",
    seconds: float = 0.0,
    interval: int | None = None,
) -> str:
    """A session with one recall, due in so many seconds; the recall's id."""
    await app.create_session(session, "ann")
    return await app.schedule(
        session, call_type, soon(seconds), f"come back to {session}", interval
    )


async def calls(db: Connection, recall: str) -> list[dict[str, Any]]:
    """The marks that the recall's calls left, in order."""
    return await rows(
        db,
        "select * from recall_attempts where recall_id = %s order by occurrence, rekey, attempt, "
        "outcome",
        [recall],
    )


EXPIRED = "select 1 from session_recalls where session_id = %s and lease_until < now()"
HELD = "select 1 from session_recalls where session_id = %s and lease_until > now()"


@pytest.mark.slow
async def test_a_dead_workers_run_is_taken_up(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """SIGKILL in mid-run: another worker calls again when the lease ends, under the same key with
    the same body, as attempt 2."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    first = await daemons.start(lease=2)
    recall = await promise(app, "s", "once")
    await gate.entered.wait()
    second = await daemons.start(lease=2, poll_interval=30)
    await first.kill()

    await second.hears("lease.taken", recall=recall, worker_before=first.name)
    await second.hears("recall.settled", recall=recall, outcome="answered", attempt=2)
    one, two = endpoint.requests
    assert (one.key, one.body) == (two.key, two.body)
    assert (one.headers["recall-attempt"], two.headers["recall-attempt"]) == ("1", "2")
    assert two.at - one.at < 2 + 8, "taken up when the lease ended, not by a poll"
    assert (await row(db, "s"))["status"] == "fired"
    lost, kept = await calls(db, recall)
    assert (lost["attempt"], lost["outcome"], lost["settled"], lost["worker"]) == (
        1,
        "unknown",
        "taken",
        first.name,
    )
    assert (kept["attempt"], kept["outcome"], kept["settled"], kept["worker"]) == (
        2,
        "answered",
        "fired",
        second.name,
    )


@pytest.mark.slow
async def test_a_long_run_is_renewed(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A run of more than three leases, with another worker about, stays its owner's and is called
    once."""
    gate = Gate()
    endpoint.script("s", gate)
    owner = await daemons.start(lease=1.5)
    recall = await promise(app, "s")
    await gate.entered.wait()
    other = await daemons.start(lease=1.5)
    await eventually(
        db, "select 1 from session_recalls where lease_until > leased_at + interval '6 seconds'"
    )
    gate.open()
    await owner.hears("recall.settled", recall=recall, attempt=1)
    assert len(endpoint.requests) == 1
    assert other.told("lease.taken") == owner.told("lease.lost") == []
    assert [call["attempt"] for call in await calls(db, recall)] == [1]


@pytest.mark.slow
async def test_a_stopped_worker_settles_nothing(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """SIGSTOP for longer than the lease: another takes the run, and what the first one brings after
    SIGCONT changes nothing."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    stopped = await daemons.start(lease=1)
    recall = await promise(app, "s", "recurring", interval=3600)
    await gate.entered.wait()
    stopped.signal(signal.SIGSTOP)
    other = await daemons.start(lease=1)
    await other.hears("lease.taken", recall=recall, worker_before=stopped.name)
    await other.hears("recall.settled", recall=recall, attempt=2)
    before = await row(db, "s")
    assert (before["occurrence"], before["status"]) == (2, "pending")

    gate.open()
    stopped.signal(signal.SIGCONT)
    await stopped.hears("lease.lost", recall=recall)
    assert await row(db, "s") == before
    assert [r.key for r in endpoint.requests] == [f"{recall}:1"] * 2
    late = [call["settled"] for call in await calls(db, recall) if call["worker"] == stopped.name]
    assert "lost" in late, "what came too late stays on record"
    assert stopped.told("recall.settled") == []


@pytest.mark.slow
async def test_a_stalled_worker_does_not_take_its_own_run_up(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A worker that stood still for longer than its lease, with nobody else about, goes on with the
    run that it has in hand."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start(lease=1.5)
    recall = await promise(app, "s")
    await gate.entered.wait()
    for _ in range(2):
        daemon.signal(signal.SIGSTOP)
        await eventually(db, EXPIRED, ["s"])
        daemon.signal(signal.SIGCONT)
        await eventually(db, HELD, ["s"])
    gate.open()
    await daemon.hears("recall.settled", recall=recall)
    assert daemon.told("lease.taken") == []
    assert len(endpoint.requests) == 1
    assert [(call["attempt"], call["outcome"]) for call in await calls(db, recall)] == [
        (1, "answered")
    ]


@pytest.mark.full
async def test_a_recall_that_kills_its_worker_is_buried(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Each attempt counts when it is claimed: after RECALL_MAX_ATTEMPTS dead workers a one-shot
    fails, a recurring one goes on."""
    sessions = ("single", "again")
    victim: Daemon | None = None

    async def murder(request: Request) -> Raw:
        assert victim is not None
        # Both are in their workers' hands by now, so both die with each of them.
        await eventually(
            db, "select 1 from session_recalls where lease_until > now() having count(*) = 2"
        )
        victim.signal(signal.SIGKILL)
        return Raw()

    for session in sessions:
        endpoint.script(session, murder)
    single = await promise(app, "single", "once")
    again = await promise(app, "again", "recurring", interval=3600)
    for _ in range(2):
        victim = await daemons.start(ready=False, lease=1, max_attempts=2)
        assert await victim.exit() == -signal.SIGKILL

    survivor = await daemons.start(lease=1, max_attempts=2)
    await survivor.hears("recall.settled", recall=single, status="failed", outcome="unknown")
    await survivor.hears("recall.settled", recall=again, status="pending", verdict="next")
    assert len(endpoint.of("single")) <= 2
    assert len(endpoint.of("again")) <= 2
    left = await row(db, "single")
    assert (left["status"], left["last_outcome"]) == ("failed", "unknown")
    assert "attempts" in str(left["reason"])
    left = await row(db, "again")
    assert (left["status"], left["occurrence"], left["attempt"]) == ("pending", 2, 0)
    for recall in (single, again):
        first, second = [
            (c["attempt"], c["outcome"], c["settled"]) for c in await calls(db, recall)
        ]
        assert first == (1, "unknown", "taken")
        # What the second worker had taken up and not yet sent when it died cost it no attempt: the
        # survivor makes that call, and settles it.
        assert second[:2] == (2, "unknown") and second[2] in ("taken", "failed", "pending")


@pytest.mark.slow
async def test_a_row_that_the_application_holds_locked(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Its run ends under a lock that outlives the lease: others settle meanwhile, it settles
    afterwards, and nothing fires twice."""
    gate = Gate()
    endpoint.script("locked", gate)
    owner = await daemons.start(lease=2)
    locked = await promise(app, "locked", "once")
    await gate.entered.wait()
    async with connected(database) as holder:
        async with holder.transaction():
            await holder.execute(
                "select from session_recalls where session_id = 'locked' for update"
            )
            gate.open()
            await endpoint.until(lambda: endpoint.requests[0].ended_at is not None)
            free = await promise(app, "free", "once")
            await owner.hears("recall.settled", recall=free)
            await eventually(db, EXPIRED, ["locked"])
            also = await promise(app, "also free", "once")
            await owner.hears("recall.settled", recall=also)
            assert owner.told("recall.settled", recall=locked) == []
    await owner.hears("recall.settled", recall=locked, attempt=1, status="fired")
    assert sorted(r.session for r in endpoint.requests) == ["also free", "free", "locked"]
    assert owner.told("lease.taken") == owner.told("lease.lost") == []
    assert await owner.stop() == 0


@pytest.mark.slow
async def test_a_run_whose_row_is_held_locked(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Its lease can't be renewed for two leases, but nobody else can take it either: it goes on,
    and is settled."""
    gate = Gate()
    endpoint.script("locked", gate)
    owner = await daemons.start(lease=2)
    recall = await promise(app, "locked", "once")
    await gate.entered.wait()
    other = await daemons.start(lease=2)
    async with connected(database) as holder, holder.transaction():
        await holder.execute("select from session_recalls where session_id = 'locked' for update")
        await eventually(
            db, "select 1 from session_recalls where lease_until < now() - interval '2 seconds'"
        )
    await eventually(db, HELD, ["locked"])
    gate.open()
    await owner.hears("recall.settled", recall=recall, attempt=1, status="fired")
    assert len(endpoint.requests) == 1
    for daemon in (owner, other):
        assert [
            daemon.told(event)
            for event in ("recall.aborted", "lease.taken", "lease.lost", "database.lost")
        ] == [[]] * 4


async def test_a_cancel_in_mid_run_aborts_by_the_listener(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The application's own cancel of a recall that is being run breaks the call off at once, long
    before a renewal."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start(lease=60)
    recall = await promise(app, "s", "recurring", interval=1)
    await gate.entered.wait()
    assert await app.cancel_session("s") == 1
    async with asyncio.timeout(15):
        await gate.hung_up.wait()
    await daemon.hears("recall.aborted", recall=recall, because="cancelled")
    await daemon.hears("recall.ended", recall=recall, status="cancelled")
    left = await row(db, "s")
    assert (left["status"], left["lease"], left["occurrence"]) == ("cancelled", None, 1)
    assert [call["settled"] for call in await calls(db, recall)] == ["ended"]
    assert len(endpoint.requests) == 1


async def test_a_cancel_in_mid_run_aborts_by_renewal(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Where the listener's connection is half-open the next renewal finds the cancel, and breaks
    the call off."""
    gate = Gate()
    endpoint.script("s", gate)
    async with Proxy(database) as proxy:
        daemon = await daemons.start(lease=1.5, listen_dsn=proxy.dsn)
        recall = await promise(app, "s", "once")
        await gate.entered.wait()
        proxy.blackhole()
        assert await app.cancel_session("s") == 1
        await daemon.hears("recall.aborted", recall=recall, because="cancelled")
        await gate.hung_up.wait()
        await daemon.hears("recall.ended", recall=recall, status="cancelled")
        assert (await row(db, "s"))["status"] == "cancelled"
        await daemon.kill()


@pytest.mark.parametrize("how", ["mark_fired", "mark_cancelled"])
async def test_marked_in_mid_run_by_the_application(
    how: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A recall that its application marks by id in mid-run stays as marked, and does not fire
    again."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start()
    recall = await promise(app, "s", "recurring", interval=1)
    await gate.entered.wait()
    assert await getattr(app, how)(recall)
    await gate.hung_up.wait()
    await daemon.hears("recall.ended", recall=recall)
    assert (await row(db, "s"))["status"] == {"mark_fired": "fired", "mark_cancelled": "cancelled"}[
        how
    ]
    assert len(endpoint.requests) == 1


# --- somebody else settles what is leased ---------------------------------------------------------

AS_AFTER_A_RUN = """
update session_recalls set trigger_at = now() + interval_seconds * interval '1 second',
    updated_at = now() where id = $1
"""
BY_FIVE_MINUTES = (
    "update session_recalls set trigger_at = now() + interval '5 minutes', updated_at = now() "
    "where id = $1"
)
LONG_AGO = (
    "update session_recalls set trigger_at = '-infinity', updated_at = '-infinity' where id = $1"
)


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        (MARK_FIRED, ["fired"]),
        ("update session_recalls set status = 'failed' where id = $1", ["failed"]),
        (AS_AFTER_A_RUN, ["pending"]),
        (MARK_CANCELLED, []),
        ("delete from session_recalls where id = $1", []),
        (RESCHEDULE.replace("$2", "trigger_at + interval_seconds * interval '1 second'"), []),
        (BY_FIVE_MINUTES, []),
        (LONG_AGO, []),
    ],
    ids=[
        "fired",
        "failed",
        "put off as after a run",
        "cancelled",
        "deleted",
        "skipped",
        "moved",
        "moved to no date",
    ],
)
async def test_a_lease_that_somebody_violates(
    statement: str, told: list[str], app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A leased recall that others settle is told, loudly and once; what an application may do in
    mid-run is not."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start(lease=30)
    recall = await promise(app, "s", "recurring", interval=3600)
    await gate.entered.wait()
    await app.connection.execute(statement, recall)
    gate.open()
    await daemon.until(lambda: daemon.told("recall.settled") + daemon.told("recall.ended"))
    violated = daemon.told("lease.violated")
    assert [(event["recall"], event["status"], event["level"]) for event in violated] == [
        (recall, s, "warning") for s in told
    ]
    assert all("another scheduler" in event["hint"] for event in violated)

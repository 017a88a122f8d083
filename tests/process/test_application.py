"""The application beside the daemon: what it does to recalls with its own SQL, in mid-run above
all, is done.

The agent is the endpoint's script; it, too, speaks to the table as the application does.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from typing import Any

import asyncpg
import pytest

from ..conftest import Connection
from ..support.application import AlreadyScheduled, Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, Raw, Request, reply
from .test_corridor import soon
from .test_lease import EXPIRED, calls, eventually, promise, rows

MOMENTS = 5.0
"""Seconds within which a call that nobody wants any more is broken off: it takes milliseconds, on a
machine that is not busy."""


@pytest.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
    """The application's connections, for agents that work at the same time."""
    async with asyncpg.create_pool(database, min_size=1, max_size=8) as pool:
        yield pool


async def by_id(db: Connection, id: str) -> dict[str, Any]:
    (found,) = await rows(db, "select * from session_recalls where id = %s", [id])
    return found


# --- ended in mid-run -----------------------------------------------------------------------------

Act = Callable[[Application, str], Awaitable[Any]]

ENDINGS: dict[str, tuple[Act, str]] = {
    "cancelled by session": (lambda app, _: app.cancel_session("s"), "cancelled"),
    "cancelled by id": (lambda app, recall: app.mark_cancelled(recall), "cancelled"),
    "marked fired": (lambda app, recall: app.mark_fired(recall), "fired"),
}


@pytest.mark.slow
@pytest.mark.parametrize("call_type", ["once", "recurring"])
@pytest.mark.parametrize(("act", "status"), ENDINGS.values(), ids=ENDINGS.keys())
async def test_a_recall_that_is_ended_in_mid_run(
    act: Act,
    status: str,
    call_type: str,
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Its call is broken off at once and nothing of it fires again; the session takes a new recall
    in the same moment, which runs."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    daemon = await daemons.start(lease=30)
    id = await promise(app, "s", call_type, interval=1 if call_type == "recurring" else None)
    await gate.entered.wait()

    assert await act(app, id)
    newer = await app.schedule("s", "immediate", soon(0), "something else")
    async with asyncio.timeout(MOMENTS):
        await gate.hung_up.wait()

    await daemon.hears("recall.ended", recall=id, status=status)
    await daemon.hears("recall.settled", recall=newer, status="fired")
    assert [r.key for r in endpoint.requests] == [f"{id}:1", f"{newer}:1"]
    old = await by_id(db, id)
    assert (old["status"], old["lease"], old["occurrence"]) == (status, None, 1)
    assert [(c["outcome"], c["settled"]) for c in await calls(db, id)] == [("unknown", "ended")]


@pytest.mark.slow
async def test_a_session_that_is_deleted_in_mid_run(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Its call is broken off at once; what was called stays on record, and the worker goes on with
    the others."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start(lease=30, concurrency=1)
    id = await promise(app, "s", "recurring", interval=1)
    await gate.entered.wait()
    next_one = await promise(app, "t")

    assert await app.delete_session("s") == 1
    async with asyncio.timeout(MOMENTS):
        await gate.hung_up.wait()

    await daemon.hears("recall.ended", recall=id, status="deleted")
    await daemon.hears("recall.settled", recall=next_one, status="fired")
    assert [r.key for r in endpoint.requests] == [f"{id}:1", f"{next_one}:1"]
    assert await rows(db, "select id from session_recalls where session_id = 's'") == []
    assert [(c["outcome"], c["settled"]) for c in await calls(db, id)] == [("unknown", "deleted")]


@pytest.mark.slow
async def test_a_cancel_acts_on_the_newer_recall(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """After an agent has scheduled from inside its run, the application's cancel means that one:
    the run goes on to its end."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start()
    older = await promise(app, "s")
    await gate.entered.wait()
    newer = await app.schedule("s", "once", soon(0.1), "the next one")
    assert await app.cancel_session("s") == 1
    assert await app.cancel_session("s") == 0
    gate.open()
    await daemon.hears("recall.settled", recall=older, status="fired")
    assert not gate.hung_up.is_set() and len(endpoint.requests) == 1
    assert (await by_id(db, newer))["status"] == "cancelled"


# --- moved in mid-run -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("skips", [1, 2])
async def test_a_skip_in_mid_run_is_one_occurrence_less(
    skips: int, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The run ends as it ends; the following occurrence is left out, and the one after it comes an
    interval later, under its number."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    daemon = await daemons.start()
    id = await promise(app, "s", "recurring", interval=1)
    await gate.entered.wait()
    for _ in range(skips):
        assert await app.skip_next("s")
    gate.open()

    first, second, third = await endpoint.count(3)
    assert [r.key for r in (first, second, third)] == [
        f"{id}:{n}" for n in (1, 2 + skips, 3 + skips)
    ]
    assert first.ended_at is not None and second.ended_at is not None
    assert skips + 0.9 < second.at - first.ended_at
    assert third.at - second.ended_at > 0.9
    settled = (await daemon.hears("recall.settled", times=2))[:2]
    assert all(s["status"] == "pending" and s["lag_ms"] < 5_000 for s in settled)
    assert await app.cancel_session("s") == 1


@pytest.mark.slow
@pytest.mark.parametrize("call_type", ["once", "recurring"])
@pytest.mark.parametrize("later", [0.7, -3600.0], ids=["later", "into the past"])
async def test_a_reschedule_in_mid_run_stands(
    later: float,
    call_type: str,
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """The time that the application names while a recall runs is the recall's next one, a
    one-shot's too; it has its own key."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    daemon = await daemons.start()
    id = await promise(app, "s", call_type, interval=3600 if call_type == "recurring" else None)
    await gate.entered.wait()
    then = soon(later)
    assert await app.reschedule(id, then)
    gate.open()

    first, second = await endpoint.count(2)
    assert (first.key, second.key) == (f"{id}:1", f"{id}:2")
    assert second.document["recall"]["scheduled_for"] == then.isoformat(
        timespec="microseconds"
    ).replace("+00:00", "Z")
    assert float(second.headers["recall-lateness"]) > (3500 if later < 0 else -0.001)
    await daemon.hears(
        "recall.settled", occurrence=2, status="fired" if call_type == "once" else "pending"
    )
    after = await by_id(db, id)
    assert (after["status"], after["occurrence"]) == (
        ("fired", 2) if call_type == "once" else ("pending", 3)
    )


@pytest.mark.slow
async def test_a_cancel_of_a_recall_that_is_deferred(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Between two calls a cancel is a cancel: nothing is called again, and a new recall of the
    session is."""
    endpoint.script("s", reply(409), reply())
    daemon = await daemons.start(busy_delay=0.3)
    id = await promise(app, "s")
    await daemon.hears("recall.settled", recall=id, outcome="busy")
    assert await app.cancel_session("s") == 1
    newer = await app.schedule(
        "s", "once", soon(0.6), "later than the deferred one would have been"
    )
    await daemon.hears("recall.settled", recall=newer, status="fired")
    assert [r.key for r in endpoint.requests] == [f"{id}:1", f"{newer}:1"]


# --- scheduled from inside a run ------------------------------------------------------------------


@pytest.mark.slow
async def test_an_agent_schedules_its_next_recall_in_a_transaction(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The insert is part of the agent's own transaction, with the message that asked for it,
    committed before the answer."""

    async def agent(request: Request) -> Raw:
        if len(endpoint.of("s")) == 1:
            async with app.connection.transaction():
                await app.connection.execute("create table if not exists messages (id text)")
                await app.schedule("s", "once", soon(0.2), "the next link", id="next")
                await app.connection.execute("insert into messages values ('asked for it')")
        return reply()

    endpoint.script("s", agent)
    daemon = await daemons.start()
    first = await promise(app, "s")
    await daemon.hears("recall.settled", recall=first, status="fired")
    await daemon.hears("recall.settled", recall="next", status="fired")
    assert [r.key for r in endpoint.requests] == [f"{first}:1", "next:1"]


@pytest.mark.slow
async def test_an_agent_commits_after_its_answer(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Its open transaction holds the row that ran: the settle waits until then, past its lease, and
    the next link follows."""
    transaction = app.connection.transaction()

    async def agent(request: Request) -> Raw:
        if len(endpoint.of("s")) == 1:
            await transaction.start()
            await app.schedule("s", "immediate", soon(0), "the next link", id="next")
        return reply()

    endpoint.script("s", agent)
    daemon = await daemons.start(lease=1)
    first = await promise(app, "s")
    other = await promise_elsewhere(db, "t")
    await daemon.hears("recall.settled", recall=other, status="fired")
    await eventually(db, EXPIRED, ["s"])
    assert (await by_id(db, first))["status"] == "pending"
    await transaction.commit()
    await daemon.hears("recall.settled", recall=first, status="fired")
    await daemon.hears("recall.settled", recall="next", status="fired")
    assert [r.key for r in endpoint.of("s")] == [f"{first}:1", "next:1"]


async def promise_elsewhere(db: Connection, session: str) -> str:
    """A recall of another session, by another connection than the application's."""
    await db.execute("insert into sessions values (%s, 'bob')", (session,))
    await db.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, created_at, updated_at) "
        "values ('elsewhere', %s, 'immediate', now(), 'look', now(), now())",
        (session,),
    )
    return "elsewhere"


async def test_a_run_of_a_recurring_recall_keeps_its_slot(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The application's insert is refused in its own words while a recurring recall runs, and while
    it waits."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    daemon = await daemons.start()
    await promise(app, "s", "recurring", interval=3600)
    await gate.entered.wait()
    with pytest.raises(AlreadyScheduled) as refused:
        await app.schedule("s", "once", soon(5), "one too many")
    assert "unique" in str(refused.value.__cause__)
    gate.open()
    await daemon.hears("recall.settled", status="pending")
    with pytest.raises(AlreadyScheduled):
        await app.schedule("s", "once", soon(5), "one too many")
    assert len(endpoint.requests) == 1


async def test_a_deferred_recall_keeps_its_slot(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A one-shot that met a busy session has not run: the session has a recall, and the application
    is told so."""
    endpoint.script("s", reply(409))
    daemon = await daemons.start(busy_delay=60)
    id = await promise(app, "s")
    await daemon.hears("recall.settled", recall=id, outcome="busy", status="pending")
    with pytest.raises(AlreadyScheduled) as refused:
        await app.schedule("s", "once", soon(5), "one too many")
    assert "unique" in str(refused.value.__cause__)


@pytest.mark.slow
async def test_an_unknown_outcome_frees_the_slot(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The run behind a broken answer may still go on, and schedule: its insert is taken, and both
    recalls come to their end."""
    endpoint.script("s", reply(500), reply())
    daemon = await daemons.start()
    older = await promise(app, "s")
    await daemon.hears("recall.settled", recall=older, outcome="unknown", status="pending")
    newer = await app.schedule("s", "once", soon(0.1), "scheduled by a run that nobody heard of")
    await daemon.hears("recall.settled", recall=newer, status="fired")
    await daemon.hears("recall.settled", recall=older, status="fired")
    assert sorted(Counter(r.key for r in endpoint.requests).items()) == sorted(
        [(f"{older}:1", 2), (f"{newer}:1", 1)]
    )


@pytest.mark.slow
async def test_an_unknown_run_that_is_found_on_frees_the_slot(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The session is busy with the very run whose answer broke: that it is deferred now does not
    take the slot from what that run schedules."""
    endpoint.script("s", reply(500), reply(409), reply())
    daemon = await daemons.start(busy_delay=1)
    older = await promise(app, "s")
    await daemon.hears("recall.settled", recall=older, outcome="busy", status="pending")
    newer = await app.schedule("s", "once", soon(0.1), "scheduled by the run that was found on")
    await daemon.hears("recall.settled", recall=newer, status="fired")
    await daemon.hears("recall.settled", recall=older, status="fired")
    assert sorted(Counter(r.key for r in endpoint.requests).items()) == sorted(
        [(f"{older}:1", 3), (f"{newer}:1", 1)]
    )


@pytest.mark.slow
async def test_a_failed_run_that_waits_keeps_its_slot(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A run that the API reports as failed is over: nobody schedules from inside it, busy though
    the session is when it is tried again."""
    endpoint.script("s", reply(200, body={"status": "failed"}), reply(409))
    daemon = await daemons.start(busy_delay=60)
    id = await promise(app, "s")
    await daemon.hears("recall.settled", recall=id, outcome="busy", status="pending")
    with pytest.raises(AlreadyScheduled):
        await app.schedule("s", "once", soon(5), "one too many")


# --- replicas -------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_two_replicas_on_one_table(
    db: Connection, endpoint: Endpoint, daemons: Daemons, pool: asyncpg.Pool[asyncpg.Record]
) -> None:
    """Sixty recalls in chains of three over twenty sessions: each key is requested once, and no
    session has two open requests."""
    app = Application(pool)
    sessions = [f"s{n}" for n in range(20)]

    async def agent(request: Request) -> Raw:
        await pool.execute("select pg_sleep(0.02)")
        if len(endpoint.of(request.session)) < 3:
            await app.schedule(request.session, "immediate", soon(0), "the next link")
        return reply()

    endpoint.default = agent
    replicas = [await daemons.start(lease=30) for _ in range(2)]
    for session in sessions:
        await promise(app, session)
    await eventually(
        db, "select 1 from session_recalls where status = 'fired' having count(*) = 60"
    )

    assert len(endpoint.requests) == 60 and max(Counter(endpoint.keys).values()) == 1
    for session in sessions:
        runs = endpoint.of(session)
        assert len(runs) == 3
        for earlier, later in pairwise(runs):
            assert earlier.ended_at is not None and later.at >= earlier.ended_at
    workers = await rows(db, "select worker from recall_attempts group by 1")
    assert {w["worker"] for w in workers} == {replica.name for replica in replicas}


# --- what the application reads -------------------------------------------------------------------


async def test_what_the_application_reads_is_still_right(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """With rows running, failed, fired, cancelled, deferred and waiting about, its own queries
    answer by the meaning they always had."""
    gate = Gate()
    endpoint.script("chatty", gate)
    endpoint.script("wrong", reply(422))
    endpoint.script("busy", reply(409))
    daemon = await daemons.start(busy_delay=600)
    chatty = await promise(app, "chatty")
    await gate.entered.wait()
    following = await app.schedule("chatty", "once", soon(300), "the next one")
    wrong = await promise(app, "wrong")
    done = await promise(app, "done")
    busy = await promise(app, "busy")
    off = await promise(app, "off", "once", 60)
    await app.cancel_session("off")
    await app.create_session("bobs", "bob")
    bobs = await app.schedule("bobs", "recurring", soon(900), "every hour", interval_seconds=3600)
    await daemon.hears("recall.settled", recall=wrong, status="failed")
    await daemon.hears("recall.settled", recall=done, status="fired")
    await daemon.hears("recall.settled", recall=busy, status="pending")

    states = {r["id"]: r["status"] for r in await app.list_by_user("ann")}
    assert states == {
        chatty: "running",
        following: "pending",
        wrong: "failed",
        done: "fired",
        busy: "pending",
        off: "cancelled",
    }
    assert [r["id"] for r in await app.list_by_user("bob")] == [bobs]
    assert [r["id"] for r in await app.list_by_session("chatty")] == [following, chatty]
    assert [r["id"] for r in await app.list_by_session("chatty", limit=1, offset=1)] == [chatty]
    listed = [r["trigger_at"] for r in await app.list_by_user("ann", limit=4)]
    assert len(listed) == 4 and listed == sorted(listed, reverse=True)
    assert await app.list_by_user("nobody") == []

    assert await app.due(soon(0)) == []
    assert [r["id"] for r in await app.due(soon(1000))] == [following, busy, bobs]
    first = await app.next_trigger()
    assert first is not None and first == (await by_id(db, following))["trigger_at"]
    everywhere = ["chatty", "wrong", "done", "busy", "off", "bobs", "nowhere"]
    assert await app.sessions_with_pending(everywhere) == {"chatty", "busy", "bobs"}
    assert await app.sessions_with_pending([]) == set()
    gate.open()
    await daemon.hears("recall.settled", recall=chatty, status="fired")


@pytest.mark.slow
async def test_a_run_is_due_and_pending_to_the_application(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A recall in its run is still the session's pending one: the application finds it, and finds
    it gone when it is over."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start()
    id = await promise(app, "s")
    await gate.entered.wait()
    assert [r["id"] for r in await app.due(soon(0))] == [id]
    assert await app.sessions_with_pending(["s"]) == {"s"}
    gate.open()
    await daemon.hears("recall.settled", recall=id)
    assert await app.due(soon(0)) == [] and await app.next_trigger() is None


@pytest.mark.slow
async def test_the_application_restarts_beside_the_daemon(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Its `create … if not exists` at every start is done at once while runs are open, and the
    recalls go on as before."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start(lease=1)
    id = await promise(app, "s")
    await gate.entered.wait()
    began = time.monotonic()
    await app.create_tables()
    assert time.monotonic() - began < MOMENTS
    following = await app.schedule("s", "immediate", soon(0), "the next link")
    gate.open()
    await daemon.hears("recall.settled", recall=id, status="fired")
    await daemon.hears("recall.settled", recall=following, status="fired")


@pytest.mark.slow
async def test_the_application_changes_its_table_in_mid_run(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """While its DDL holds the whole table, past the lease, an ending waits; then it is settled, and
    nothing was called twice."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start(lease=3)
    id = await promise(app, "s")
    await gate.entered.wait()
    async with app.connection.transaction():
        await app.connection.execute(
            "create index by_comment on session_recalls (internal_comment)"
        )
        gate.open()
        await eventually(db, EXPIRED, ["s"])
    await daemon.hears("recall.settled", recall=id, status="fired")
    assert daemon.told("recall.stranded") == [] and len(endpoint.requests) == 1

"""Caps: how many runs a session may have, and how many the whole fleet, whoever counts at the same
time."""

from __future__ import annotations

import asyncio

import pytest

from recall_worker.database.ledger import Ledger

from ..conftest import Connection
from ..support.application import Application
from ..support.claiming import claim_due
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, Raw, Request, reply
from .test_corridor import row, soon


@pytest.mark.slow
async def test_a_session_that_calls_itself_in_a_loop_is_held_back(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """RECALL_SESSION_LIMIT=5/h over two replicas: five runs, then deferred without an attempt,
    saying why; other sessions go on."""
    await app.create_session("loop", "ann")
    await app.create_session("calm", "ann")

    async def agent(_: Request) -> Raw:
        await app.schedule("loop", "immediate", soon(0), "again")
        return reply()

    endpoint.script("loop", agent)
    worker = await daemons.start(session_limit="5/h,100/d")
    other = await daemons.start(session_limit="5/h,100/d")
    await app.schedule("loop", "immediate", soon(0), "start")
    await endpoint.count(5, "loop")
    told = [
        asyncio.ensure_future(w.hears("recall.settled", outcome="capped")) for w in (worker, other)
    ]
    _, waiting = await asyncio.wait(told, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    for one in waiting:
        one.cancel()
    held = await (await db.execute("select * from session_recalls where deferrals > 0")).fetchall()
    assert (held[0]["status"], held[0]["attempt"]) == ("pending", 0)
    assert "had 5 runs within an hour, and may have 5" in held[0]["reason"]
    wait = await (
        await db.execute(
            "select extract(epoch from trigger_at - now())::float8 as s from session_recalls "
            "where deferrals > 0"
        )
    ).fetchone()
    assert wait is not None and 3500 < wait["s"] <= 3600
    await app.schedule("calm", "immediate", soon(0), "not in a loop")
    await endpoint.count(1, "calm")
    assert len(endpoint.of("loop")) == 5


@pytest.mark.slow
async def test_the_fleet_never_runs_more_than_it_may(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """RECALL_FLEET_CONCURRENCY=3 over three replicas of ten slots each: never more than three runs
    at once, and all come to run."""
    running = most = 0

    async def agent(_: Request) -> Raw:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return reply()

    endpoint.default = agent
    for n in range(30):
        await app.create_session(f"s{n}", "ann")
        await app.schedule(f"s{n}", "once", soon(3600), "work")
    for _ in range(3):
        await daemons.start(fleet_concurrency=3, concurrency=10)
    await db.execute("update session_recalls set trigger_at = now(), planned_at = now()")
    await endpoint.count(30, within=60)
    assert most == 3
    assert len(set(endpoint.keys)) == 30


async def test_claims_under_a_fleet_cap_race_without_overshooting(
    database: str, db: Connection
) -> None:
    """Eight claimers, a connection each, many rounds at once under a cap of five: never more than
    five leased."""
    await db.execute(
        "insert into sessions (id, user_id) select 's' || n, 'ann' from generate_series(1, 40) n"
    )
    await db.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, created_at, updated_at) "
        "select 'r' || n, 's' || n, 'once', now(), 'work', now(), now() from generate_series(1, "
        "40) n"
    )
    ledgers = [Ledger(database, f"w{n}", 60, fleet=5) for n in range(8)]
    for _ in range(20):
        answers = await asyncio.gather(
            *(claim_due(ledger, 3, take_expired=False) for ledger in ledgers)
        )
        assert sum(len(answer.claims) for answer in answers) == 5
        assert all(answer.waiting for answer in answers if not answer.claims)
        await db.execute("update session_recalls set lease = null, lease_until = null, attempt = 0")
    for ledger in ledgers:
        await ledger.close()


async def test_a_run_that_ends_makes_room_in_the_fleet(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """With the fleet's one place taken, the next recall waits, due, and runs when the first has
    ended."""
    gate = Gate()
    endpoint.script("long", gate)
    daemon = await daemons.start(fleet_concurrency=1)
    for session in ("long", "next"):
        await app.create_session(session, "ann")
        await app.schedule(session, "immediate", soon(0), "work")
        if session == "long":
            await gate.entered.wait()
    waiting = await row(db, "next")
    assert (waiting["lease"], endpoint.of("next")) == (None, [])
    gate.open()
    await daemon.hears("recall.settled", session="next")

"""Several pending recalls a session (`migrate --slots`), and whole daemons: the runs of a session
never overlap, whoever schedules, cancels or dies meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from recall_worker import schema

from ..conftest import Connection, connected
from ..support.application import AlreadyScheduled, Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, Raw, Request, reply
from ..test_cli import operate
from .test_lease import eventually, rows

MOST = 3


@pytest.fixture
async def db(database: str) -> AsyncIterator[Connection]:
    """A connection to the test's database, whose sessions may have three pending recalls."""
    await asyncio.to_thread(schema.migrate, database, pending_most=MOST)
    async with connected(database) as conn:
        yield conn


class OneAtATime:
    """Answers calls after a moment, and notes which of them began while another of their session
    went on: the other one's recall. It does not see that a caller has hung up."""

    def __init__(self) -> None:
        self.running: dict[str, str] = {}
        self.overlapped: set[str] = set()
        self.called: set[str] = set()

    async def __call__(self, request: Request) -> Raw | Gate:
        id = request.key.split(":")[0]
        if (other := self.running.get(request.session)) is not None:
            self.overlapped.add(other)
        self.running[request.session] = id
        self.called.add(id)
        await asyncio.sleep(0.05)
        if self.running.get(request.session) == id:
            del self.running[request.session]
        return reply()


@pytest.mark.slow
async def test_three_that_are_due_run_one_after_the_other(
    db: Connection, app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """At once as soon as the one before has ended; `why` says what a recall waits for."""
    gate, agent = Gate(), OneAtATime()
    endpoint.script("s", gate, agent)
    await app.create_session("s", "ann")
    now = datetime.now(UTC)
    ids = [
        await app.schedule("s", "once", now - timedelta(seconds=9 - n), "m", id=f"recall-{n}")
        for n in range(3)
    ]
    await daemons.start(poll_interval=30)
    await daemons.start(poll_interval=30)
    await gate.entered.wait()
    said = await asyncio.to_thread(operate, database, "why", ids[1])
    assert f"its session is in a run: recall {ids[0]} since" in said.out, said
    # One more has the slot of the first, which is in its run; a further one has none.
    said = await asyncio.to_thread(operate, database, "schedule", "s", "m", "--in", "1h")
    assert said.status == 0, said
    said = await asyncio.to_thread(operate, database, "schedule", "s", "m", "--in", "1h")
    assert said.status == 1
    assert "session s already has 3 pending recalls, and can have no more" in said.err
    gate.open()
    await eventually(
        db, "select 1 from session_recalls having count(*) filter (where status = 'fired') = 3"
    )
    requests = endpoint.of("s")
    assert [r.key for r in requests] == [f"{id}:1" for id in ids]
    assert agent.overlapped == set()
    for before, after in pairwise(requests):
        assert before.ended_at is not None and 0 <= after.at - before.ended_at < 5


async def test_a_chain_beside_a_recurring_recall_and_one_for_later(
    db: Connection, app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Each link schedules the next from inside its run, at once; nothing moves while a slot is
    free, and the others stay what they are."""
    links = 5
    await app.create_session("s", "ann")

    async def agent(request: Request) -> Raw | Gate:
        number = int(request.document["user_message"])
        if number < links:
            await app.schedule("s", "immediate", datetime.now(UTC), str(number + 1))
        return reply()

    endpoint.script("s", agent)
    far = datetime.now(UTC) + timedelta(hours=1)
    await app.schedule("s", "recurring", far, "0", interval_seconds=3600, id="every")
    await daemons.start(poll_interval=30)
    await app.schedule("s", "immediate", datetime.now(UTC), "1")
    await eventually(
        db,
        "select 1 from session_recalls having count(*) filter (where status = 'fired') = 5",
    )
    assert [r.document["user_message"] for r in endpoint.of("s")] == list("12345")
    assert await rows(db, "select status, slot from session_recalls where id = 'every'") == [
        {"status": "pending", "slot": 1}
    ]
    # With a third that waits there is no room but that of the run itself.
    await app.schedule("s", "once", far, "0", id="later")
    endpoint.requests.clear()
    await app.schedule("s", "immediate", datetime.now(UTC), "1")
    await eventually(
        db,
        "select 1 from session_recalls having count(*) filter (where status = 'fired') = 10",
    )
    assert [r.document["user_message"] for r in endpoint.of("s")] == list("12345")
    assert await rows(
        db, "select id, slot from session_recalls where status = 'pending' order by slot"
    ) == [{"id": "every", "slot": 1}, {"id": "later", "slot": 2}]


@pytest.mark.full
async def test_everything_at_once(
    db: Connection, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Applications on connections of their own insert into four sessions, cancel, delete, and undo;
    two daemons, one of them killed and replaced. Never two runs in a session, never more than
    three pending, and each recall that was accepted ends, or still waits."""
    agent = OneAtATime()
    endpoint.default = agent
    settings: dict[str, Any] = {"lease": 3, "poll_interval": 5, "concurrency": 10}
    first = await daemons.start(**settings)
    await daemons.start(**settings)
    accepted: set[str] = set()
    dice = random.Random(7)
    until = asyncio.get_running_loop().time() + 8

    async def work(number: int) -> None:
        async with await Application.connect(database) as own:
            while asyncio.get_running_loop().time() < until:
                session = f"s{dice.randrange(4)}"
                kind = dice.choice(["once", "immediate", "immediate", "recurring"])
                at = datetime.now(UTC) + timedelta(seconds=dice.choice([-1, 0, 0.2, 1]))
                what = dice.random()
                if what < 0.05:
                    await own.cancel_session(session)
                    continue
                transaction = own.connection.transaction()
                await transaction.start()
                try:
                    id = await own.schedule(session, kind, at, "m", interval_seconds=1)
                except AlreadyScheduled:
                    await transaction.rollback()
                    await asyncio.sleep(0.02)
                    continue
                if what < 0.15:
                    await transaction.rollback()
                else:
                    await transaction.commit()
                    accepted.add(id)

    async def watch() -> None:
        while asyncio.get_running_loop().time() < until:
            found = await rows(
                db,
                "select session_id, count(*) as pending, count(distinct slot) as slots "
                "from session_recalls where status = 'pending' group by 1",
            )
            for row in found:
                assert row["pending"] == row["slots"] <= MOST, found
            held = await rows(
                db,
                "select session_id from session_recalls where lease is not null "
                "and status in ('pending', 'running') group by 1 having count(*) > 1",
            )
            assert held == []
            await asyncio.sleep(0.05)

    async def kill() -> None:
        await asyncio.sleep(3)
        await first.kill()
        await daemons.start(**settings)

    for n in range(4):
        await rows(db, f"insert into sessions values ('s{n}', 'ann') returning id")
    await asyncio.gather(*(work(n) for n in range(4)), watch(), kill())
    await rows(
        db,
        "update session_recalls set status = 'cancelled' where status = 'pending' "
        "and call_type = 'recurring' returning id",
    )
    await eventually(
        db,
        "select 1 from session_recalls having count(*) filter "
        "(where status in ('pending', 'running') or lease is not null) = 0",
        within=60,
    )
    kept = {row["id"] for row in await rows(db, "select id from session_recalls")}
    assert kept == accepted
    ended = {r["id"]: r["status"] for r in await rows(db, "select id, status from session_recalls")}
    fired = {id for id, status in ended.items() if status == "fired"}
    assert fired <= agent.called and len(fired) > 20
    # A run goes on at this API after it was aborted: its recall was cancelled, or its worker killed
    # (`taken`: another worker has taken it up).
    taken = await rows(db, "select distinct recall_id from recall_attempts where settled = 'taken'")
    aborted = {id for id, status in ended.items() if status == "cancelled"}
    assert agent.overlapped <= aborted | {row["recall_id"] for row in taken}

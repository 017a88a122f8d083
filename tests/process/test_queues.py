"""Two agents on one table: daemons with a queue and an endpoint each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from ..conftest import Connection
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from ..test_cli import operate
from ..test_ledger import put
from .test_lease import calls, eventually, rows


@pytest.fixture
async def other() -> AsyncIterator[Endpoint]:
    """The second agent's API."""
    async with Endpoint() as api:
        yield api


async def operated(database: str, *words: str) -> None:
    done = await asyncio.to_thread(operate, database, *words)
    assert done.status == 0, done


@pytest.mark.slow
async def test_each_gets_its_own(
    db: Connection, endpoint: Endpoint, other: Endpoint, daemons: Daemons
) -> None:
    """Forty recalls in two queues, some there before the workers and some not: each endpoint is
    asked for its own, once, and nobody for a third queue's."""
    for n in range(10):
        await put(db, f"mail-{n}", queue="mail")
        await put(db, f"night-{n}", queue="night")
    await put(db, "nobody", queue="nobody")
    mail = await daemons.start(queue="mail", concurrency=5)
    await daemons.start("--queue", "night", run_url=other.url, concurrency=5)
    for n in range(10, 20):
        await put(db, f"mail-{n}", 0.5, queue="mail")
        await put(db, f"night-{n}", 0.5, queue="night")
    await endpoint.count(20)
    await other.count(20)
    await eventually(
        db, "select 1 from session_recalls having count(*) filter (where status = 'fired') = 40"
    )
    for api, queue in ((endpoint, "mail"), (other, "night")):
        assert sorted(r.session for r in api.requests) == sorted(f"{queue}-{n}" for n in range(20))
    assert await rows(
        db, "select status, lease from session_recalls where session_id = 'nobody'"
    ) == [{"status": "pending", "lease": None}]
    # A new recall of another queue wakes nobody.
    looked = len(mail.told("claim.answered"))
    await put(db, "later", queue="night")
    await other.count(21)
    assert len(mail.told("claim.answered")) == looked


@pytest.mark.slow
async def test_runs_of_a_session_never_meet_across_queues(
    db: Connection, endpoint: Endpoint, other: Endpoint, daemons: Daemons
) -> None:
    """A session with a recall in each queue: the second agent is called when the first has
    answered, and no later than its next look."""
    gate = Gate()
    endpoint.script("s", gate)
    await daemons.start(queue="mail")
    await daemons.start(queue="night", run_url=other.url)
    await put(db, "s", queue="mail", id="m")
    await gate.entered.wait()
    await put(db, "s", queue="night", id="n")
    await put(db, "t", queue="night", id="t")
    await other.count(1, "t")
    assert other.of("s") == []
    gate.open()
    answered_at = time.monotonic()
    [request] = await other.count(1, "s")
    assert request.at - answered_at < 5


@pytest.mark.slow
async def test_a_queue_is_paused_and_resumed(
    db: Connection, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """In mid-run: the run ends as ever; nothing more is claimed, also by a worker that starts then,
    and nobody looks again and again; resumed, all is called at once."""
    gate = Gate()
    endpoint.script("running", gate)
    one = await daemons.start(poll_interval=30)
    await put(db, "running", id="running")
    await gate.entered.wait()
    await operated(database, "queues", "pause", "default", "--reason", "the API is being moved")
    await one.hears("queue.paused", queue="default")
    for n in range(5):
        await put(db, f"s{n}", id=f"s{n}")
    gate.open()
    await one.hears("recall.settled", recall="running", outcome="answered")
    two = await daemons.start(poll_interval=30)
    await two.hears("queue.paused", queue="default")
    before = len(one.told("claim.answered")) + len(two.told("claim.answered"))
    # What doesn't happen can only be waited for: a worker that looks for what it can't have would
    # look some twenty times.
    await asyncio.sleep(2)
    assert len(one.told("claim.answered")) + len(two.told("claim.answered")) - before <= 2
    assert [r.session for r in endpoint.requests] == ["running"]
    resumed_at = time.monotonic()
    await operated(database, "queues", "resume", "default")
    await endpoint.count(6)
    assert max(r.at for r in endpoint.requests) - resumed_at < 5
    for daemon in (one, two):
        await daemon.hears("queue.resumed", queue="default")
        assert len(daemon.told("queue.paused")) == 1
    actions = await rows(db, "select action, recall_id, detail from recall_actions order by id")
    assert [(row["action"], row["recall_id"], row["detail"]["queue"]) for row in actions] == [
        ("pause_queue", None, "default"),
        ("resume_queue", None, "default"),
    ]


async def test_a_pause_outlives_all_workers(
    db: Connection, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """All queues are paused while no worker runs: the next one knows."""
    await operated(database, "queues", "pause", "--all", "--yes")
    await put(db, "s", id="r")
    daemon = await daemons.start(queue="default,mail")
    await daemon.hears("queue.paused", 2)
    await operated(database, "queues", "resume", "--all", "--yes")
    await endpoint.count(1, "s")


@pytest.mark.slow
async def test_a_worker_dies_and_its_queue_is_paused(
    db: Connection, database: str, endpoint: Endpoint, other: Endpoint, daemons: Daemons
) -> None:
    """Its run holds the session until it must be over; then the other queue's recall is called.
    When the queue is resumed its recall is called again, under the same key."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    first = await daemons.start(queue="mail", lease=1, run_timeout=5)
    await put(db, "s", queue="mail", id="m")
    await gate.entered.wait()
    began = time.monotonic()
    await put(db, "s", queue="night", id="n")
    await first.kill()
    await operated(database, "queues", "pause", "mail")
    await daemons.start(queue="night", run_url=other.url, lease=1, run_timeout=5)
    successor = await daemons.start(queue="mail", lease=1, run_timeout=5)
    [request] = await other.count(1, "s", within=40)
    assert 5 - 0.5 < request.at - began < 5 + 1 + 10
    assert len(endpoint.requests) == 1
    await eventually(db, "select 1 from session_recalls where id = 'n' and status = 'fired'")
    await operated(database, "queues", "resume", "mail")
    await successor.hears("recall.settled", recall="m", outcome="answered", attempt=2)
    one, two = endpoint.of("s")
    assert one.key == two.key and one.body == two.body
    lost, kept = await calls(db, "m")
    assert (lost["outcome"], lost["settled"]) == ("unknown", "taken")
    assert (kept["outcome"], kept["settled"]) == ("answered", "fired")


@pytest.mark.slow
async def test_a_queue_that_is_edited_in_sql(
    db: Connection, endpoint: Endpoint, other: Endpoint, daemons: Daemons
) -> None:
    """A due recall of a queue that nobody serves is put into one that is: its worker calls it at
    once."""
    await put(db, "s", queue="nobody")
    await daemons.start(queue="mail", poll_interval=30)
    night = await daemons.start(queue="night", run_url=other.url, poll_interval=30)
    await night.hears("claim.answered")
    edited_at = time.monotonic()
    await db.execute("update session_recalls set queue = 'night'")
    [request] = await other.count(1, "s")
    assert request.at - edited_at < 5 and endpoint.requests == []

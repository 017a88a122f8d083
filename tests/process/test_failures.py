"""RECALL_FAILURE_URL with real daemons: each failure is told once as a rule, and at least once
whatever dies in between; and no recall waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Answer, Endpoint, Gate, Raw, Request, reply
from ..support.receiver import Receiver
from ..support.recorder import Recorder
from ..test_cli import operate
from .test_lease import eventually, promise, rows
from .test_ops import scrape, value

REFUSED = reply(400, {"detail": "no such tool"})
DELIVERED = "select 1 from recall_outbox where delivered_at is not null having count(*) = %s"


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as started:
        yield started


async def test_from_the_refusal_to_the_receiver(
    app: Application,
    database: str,
    db: Connection,
    endpoint: Endpoint,
    receiver: Receiver,
    daemons: Daemons,
) -> None:
    """The API refuses a recall, and a moment later somebody knows; so do `show`, `why`, `stats` and
    /metrics. A recall that is answered, or whose session is gone, is none."""
    endpoint.script("bad", REFUSED)
    endpoint.script("gone", reply(404, {"code": "session_not_found"}))
    daemon = await daemons.start(
        failure_url=receiver.url,
        signing_secret="correct-horse",
        run_token="hush",
        ops_listen=0,
    )
    bad, good, gone = [await promise(app, session) for session in ("bad", "good", "gone")]
    [settled] = await daemon.hears("recall.settled", recall=bad)
    [told] = await daemon.hears("failure.delivered")
    await daemon.hears("recall.settled", recall=good, status="fired")
    await daemon.hears("recall.settled", recall=gone, status="cancelled")
    [request] = receiver.told
    Webhook(b"correct-horse").verify(request.body, request.headers)
    said = request.document
    assert said["data"]["id"] == bad and settled["status"] == "failed"
    assert said["data"]["reason"].endswith("no such tool") and said["data"]["attempts"] == 1
    assert "authorization" not in request.headers and "come back" not in request.body.decode()
    assert told["waited_s"] < 1
    found = await scrape(daemon)
    assert value(found, "failures_delivered_total") == 1
    assert value(found, "failures_waiting") == 0 == value(found, "oldest_failure_seconds")
    await eventually(db, DELIVERED, [1])

    async def done(*words: str) -> Any:
        return await asyncio.to_thread(operate, database, *words)

    assert "told          RECALL_FAILURE_URL, " in (await done("show", bad)).out
    [row] = (await done("show", bad, "--json")).document["told"]
    assert row["delivered_at"] is not None and row["tries"] == 1
    assert "; told: RECALL_FAILURE_URL, " in (await done("why", bad)).out
    assert "told" not in (await done("show", gone)).out
    assert "failures    1 told, 0 waiting to be" in (await done("stats")).out
    assert await daemon.stop() == 0


async def test_nobody_is_told_where_nobody_is_named(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Without the setting the worker sends no statement for it, and a failure leaves no entry."""
    endpoint.default = REFUSED
    async with Recorder(database) as recorder:
        daemon = await daemons.start(dsn=recorder.dsn, ops_listen=0)
        recall = await promise(app, "s")
        await daemon.hears("recall.settled", recall=recall, status="failed")
        assert value(await scrape(daemon), "failures_waiting") is None
        assert await daemon.stop() == 0
    for text in recorder.statements:
        assert "recall_outbox" not in text and "recall_subscriptions" not in text
    assert await rows(db, "select from recall_outbox") == []


@pytest.mark.slow
async def test_a_worker_that_is_killed_before_it_wrote_it_down(
    app: Application, db: Connection, endpoint: Endpoint, receiver: Receiver, daemons: Daemons
) -> None:
    """The receiver has it, PostgreSQL does not know: another worker sends it again when the lease
    ends, the same message."""
    gate = Gate()
    endpoint.default = REFUSED
    receiver.answers(gate, reply())
    first = await daemons.start(failure_url=receiver.url)
    await promise(app, "s")
    await gate.entered.wait()
    await first.kill()
    second = await daemons.start(failure_url=receiver.url)
    [entry] = await rows(
        db, "select tries, due_at - now() > interval '1 s' as leased from recall_outbox"
    )
    assert entry == {"tries": 1, "leased": True}
    await db.execute("update recall_outbox set due_at = now()")
    await second.hears("failure.delivered", within=90)
    one, other = receiver.told
    assert one.body == other.body and one.message == other.message
    assert await second.stop() == 0


async def test_a_worker_that_is_stopped_tells_what_failed_in_its_drain(
    app: Application, db: Connection, endpoint: Endpoint, receiver: Receiver, daemons: Daemons
) -> None:
    """SIGTERM while the last run is open: it ends badly, that is told, and the worker is gone."""
    gate = Gate(then=REFUSED)
    endpoint.default = gate
    daemon = await daemons.start(failure_url=receiver.url)
    await promise(app, "s")
    await gate.entered.wait()
    stopping = asyncio.create_task(daemon.stop())
    await daemon.hears("worker.draining")
    gate.open()
    assert await stopping == 0
    assert len(receiver.told) == 1
    await eventually(db, DELIVERED, [1])


@pytest.mark.slow
async def test_a_hundred_failures_and_two_daemons(
    app: Application, db: Connection, endpoint: Endpoint, receiver: Receiver, daemons: Daemons
) -> None:
    """Each is told once."""
    endpoint.default = REFUSED
    fleet = [await daemons.start(failure_url=receiver.url, concurrency=10) for _ in range(2)]
    recalls = [await promise(app, f"s{n}") for n in range(100)]
    await eventually(db, DELIVERED, [100], within=60)
    assert sorted(request.recall for request in receiver.told) == sorted(recalls)
    assert len({request.message for request in receiver.told}) == 100
    for daemon in fleet:
        assert await daemon.stop() == 0
        assert daemon.told("worker.error") == []


async def slow(_: Request) -> Raw:
    await asyncio.sleep(0.5)
    return reply()


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", [reply(500), Gate(), slow, None], ids=["500", "hangs", "slow", "nobody there"]
)
async def test_no_recall_waits_for_it(
    answer: Answer | None,
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    receiver: Receiver,
    daemons: Daemons,
) -> None:
    """Five hundred recalls, a fifth of which fail, while the receiver is in trouble: each is called
    as soon as without it, and every failure is kept."""
    if answer is None:
        await receiver.stop()
    else:
        receiver.answers(answer)
    # On this machine, at this moment, without it.
    usual = lags(await five_hundred("a", app, endpoint, await daemons.start(concurrency=20)))
    daemon = await daemons.start(failure_url=receiver.url, concurrency=20, ops_listen=0)
    beside = lags(await five_hundred("b", app, endpoint, daemon))
    print(
        f"lag in ms, usual and beside it: p50 {usual[250]} {beside[250]}, "
        f"p98 {usual[490]} {beside[490]}"
    )
    # A receiver in the way would cost its deadline of seconds.
    assert beside[250] < 500 + 3 * usual[250] and beside[490] < 1500 + 3 * usual[490]
    [kept] = await rows(db, "select count(*) as n, sum(tries) as tries from recall_outbox")
    # A request that is open, or was answered just now, is not written yet.
    assert kept["n"] == 100 and len(receiver.told) - 10 <= kept["tries"] <= 100
    waiting = value(await scrape(daemon), "failures_waiting")
    assert waiting is not None and waiting > 0
    assert await daemon.stop() == 0
    assert told_in_trouble(daemon) <= 20


async def five_hundred(
    name: str, app: Application, endpoint: Endpoint, daemon: Daemon
) -> list[dict[str, Any]]:
    """Have the daemon run 500 recalls, a fifth of which fail; how each was settled."""
    for n in range(0, 500, 5):
        endpoint.script(f"{name}{n}", REFUSED)
    for n in range(500):
        await promise(app, f"{name}{n}")
    settled = await daemon.hears("recall.settled", 500, within=60)
    if name == "a":
        assert await daemon.stop() == 0
    return settled


def lags(settled: list[dict[str, Any]]) -> list[float]:
    return sorted(event["lag_ms"] for event in settled)


def told_in_trouble(daemon: Daemon) -> int:
    return len(daemon.told("failure.deferred"))


@pytest.mark.slow
async def test_beside_a_worker_without_it(
    app: Application, db: Connection, endpoint: Endpoint, receiver: Receiver, daemons: Daemons
) -> None:
    """A worker without the setting (or of an earlier version, whose settles the trigger sees as
    well) leaves an entry, and the one that has it delivers it at its start."""
    endpoint.default = REFUSED
    first = await daemons.start(failure_url=receiver.url)
    await first.stop()
    without = await daemons.start()
    recall = await promise(app, "s")
    await without.hears("recall.settled", recall=recall, status="failed")
    assert len(await rows(db, "select from recall_outbox")) == 1
    again = await daemons.start(failure_url=receiver.url)
    await again.hears("failure.delivered")
    assert [request.recall for request in receiver.told] == [recall]


async def test_a_retry_that_fails_is_told_again(
    app: Application,
    database: str,
    db: Connection,
    endpoint: Endpoint,
    receiver: Receiver,
    daemons: Daemons,
) -> None:
    """`retry` makes it live; its second failure is another message."""
    endpoint.default = REFUSED
    daemon = await daemons.start(failure_url=receiver.url)
    recall = await promise(app, "s")
    await daemon.hears("failure.delivered")
    assert (await asyncio.to_thread(operate, database, "retry", recall)).status == 0
    await daemon.hears("failure.delivered", 2)
    first, second = receiver.told
    assert first.recall == second.recall == recall and first.message != second.message


@pytest.mark.slow
async def test_one_that_is_paused_tells_nothing(
    app: Application, db: Connection, endpoint: Endpoint, receiver: Receiver, daemons: Daemons
) -> None:
    """`run --paused` is for clones: what waits in their outbox is the original's."""
    first = await daemons.start(failure_url=receiver.url)
    await first.stop()
    await promise(app, "s", "once", 3600)
    await db.execute("update session_recalls set status = 'failed'")
    daemon = await daemons.start(failure_url=receiver.url, paused=1)
    await daemon.hears("worker.ready")
    await asyncio.sleep(0.5)
    assert await daemon.stop() == 0
    [entry] = await rows(db, "select tries, delivered_at from recall_outbox")
    assert entry == {"tries": 0, "delivered_at": None} and receiver.told == []

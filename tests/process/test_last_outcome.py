"""What a recall's last outcome decides: how it ends, whether its session's slot is free, and what
people read of the endpoint."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from ..conftest import Connection
from ..support.application import AlreadyScheduled, Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint, Gate, Raw, reply
from ..test_cli import process
from .test_accepted import ON, accepted
from .test_corridor import row, soon
from .test_lease import eventually, promise
from .test_left_behind import command

pytestmark = pytest.mark.full

# --- 6: fired, though nothing ever ran well ------------------------------------------------------


async def recurring(
    app: Application,
    db: Connection,
    session: str,
    interval: int,
    **columns: Any,
) -> str:
    """A recall that recurs so many times, inserted by the application and due now; its id."""
    await app.create_session(session, "ann")
    id = await app.schedule(session, "recurring", soon(3600), "work", interval)
    for name, value in columns.items():
        change = f"update session_recalls set {name} = %s where id = %s"
        await db.execute(change.encode(), [value, id])
    await app.reschedule(id, soon(0))
    return id


ENDINGS = {
    "409": reply(409),
    "500": reply(500),
    "503": reply(503),
    "failed": reply(200, {"status": "failed", "error": "the model broke"}),
}


@pytest.mark.parametrize("how", ["skips", "reschedules"])
@pytest.mark.parametrize("ending", ENDINGS)
async def test_moved_past_its_end_in_a_run_that_ends_badly(
    ending: str, how: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """times = 1, moved by the application in mid-run, the call ends badly: failed, not fired."""
    gate = Gate(ENDINGS[ending])
    endpoint.script("s", gate)
    daemon = await daemons.start()
    id = await recurring(app, db, "s", 3600, times=1)
    await gate.entered.wait()
    if how == "skips":
        assert await app.skip_next("s")
    else:
        assert await app.reschedule(id, soon(600))
    gate.open()
    await daemon.hears("recall.settled", recall=id)
    left = await row(db, "s")
    assert left["status"] == "failed"
    assert left["reason"]
    assert len(endpoint.of("s")) == 1


@pytest.mark.parametrize("how", ["skips", "reschedules"])
async def test_moved_past_its_end_in_a_run_that_ends_well(
    how: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The neighbour: the call was answered well, so it is fired."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start()
    id = await recurring(app, db, "s", 3600, times=1)
    await gate.entered.wait()
    assert await (app.skip_next("s") if how == "skips" else app.reschedule(id, soon(600)))
    gate.open()
    await daemon.hears("recall.settled", recall=id, status="fired")
    assert (await row(db, "s"))["status"] == "fired"


@pytest.mark.parametrize("ending", ["409", "500", "503"])
async def test_skipped_to_its_end_while_it_waits_deferred(
    ending: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """times = 1, the only call met 409 and waits; the application skips it to its end: failed."""
    status = int(ending)
    endpoint.script("s", reply(status, headers={"retry-after": "3"}))
    daemon = await daemons.start()
    id = await recurring(app, db, "s", 1, times=1)
    await daemon.hears("recall.settled", recall=id, status="pending")
    assert await app.skip_next("s")
    await daemon.hears("recall.settled", recall=id, times=2, within=30)
    assert len(endpoint.of("s")) == 1
    assert (await row(db, "s"))["status"] == "failed"


async def test_skipped_to_its_end_after_an_occurrence_that_ran_well(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """times = 2: the first was answered, the second is skipped while it waits: it stays fired."""
    daemon = await daemons.start()
    id = await recurring(app, db, "s", 3, times=2)
    await daemon.hears("recall.settled", recall=id, status="pending", outcome="answered")
    assert await app.skip_next("s")
    await daemon.hears("recall.settled", recall=id, times=2)
    assert (await row(db, "s"))["status"] == "fired"
    assert len(endpoint.of("s")) == 1


async def test_skipped_to_its_end_after_an_occurrence_that_failed(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """times = 2: the first was refused, the second is skipped while it waits: it ends as failed."""
    endpoint.script("s", reply(422))
    daemon = await daemons.start()
    id = await recurring(app, db, "s", 3, times=2)
    await daemon.hears("recall.settled", recall=id, status="pending", outcome="refused")
    assert await app.skip_next("s")
    await daemon.hears("recall.settled", recall=id, times=2)
    assert (await row(db, "s"))["status"] == "failed"
    assert len(endpoint.of("s")) == 1


# --- 10: a slot that is not freed ----------------------------------------------------------------

BUSY = reply(409)
AWAY = reply(503, headers={"retry-after": "60"})
BROKEN = reply(500)
REFUSED = reply(422)
FAILED = reply(200, {"status": "failed", "error": "the model broke"})


@pytest.mark.parametrize(
    ("answers", "retries", "last", "free"),
    [
        ([REFUSED, BROKEN, BUSY], 1, "busy", True),
        ([REFUSED, REFUSED, BROKEN, BUSY], 2, "busy", True),
        ([REFUSED, BROKEN, AWAY], 1, "unavailable", True),
        ([REFUSED, BROKEN, BROKEN], 1, "unknown", True),
        ([BROKEN, BUSY], 0, "busy", True),
        ([REFUSED, FAILED, BUSY], 1, "busy", False),
        ([REFUSED, BUSY], 1, "busy", False),
        ([FAILED, BUSY], 0, "busy", False),
    ],
    ids=[
        "retry, unknown, busy",
        "retry twice, unknown, busy",
        "retry, unknown, unavailable",
        "retry, unknown twice",
        "unknown, busy",
        "retry, failed, busy",
        "retry, busy",
        "failed, busy",
    ],
)
async def test_the_slot_of_a_recall_whose_run_may_still_go_on(
    answers: list[Raw],
    retries: int,
    last: str,
    free: bool,
    app: Application,
    database: str,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Since a call of it ended as unknown its session can schedule another, with an operator's
    `retry` before as without."""
    endpoint.script("s", *answers)
    daemon = await daemons.start(max_attempts=10)
    recall = await promise(app, "s", "once")
    for n in range(retries):
        await daemon.hears("recall.settled", times=n + 1, recall=recall, status="failed")
        await command(database, "retry", recall)
    # A retry is put off by up to 5 s, and then by up to 20 s.
    await daemon.hears("recall.settled", times=len(answers), within=40, recall=recall)
    assert daemon.told("recall.settled", recall=recall)[-1]["outcome"] == last
    if free:
        await app.schedule("s", "immediate", soon(3600), "from inside the run")
    else:
        with pytest.raises(AlreadyScheduled):
            await app.schedule("s", "immediate", soon(3600), "one too many")


# --- 11: breaker.closed --------------------------------------------------------------------------

LATER = reply(503, {"error": "starting"}, {"retry-after": "0"})
BEATEN = """
select 1 from recall_workers where worker = %s and seen_at > started_at + interval '4 seconds'
"""
"""A new worker writes its row twice; then once a minute, unless it has something to say."""
SAYS = "select 1 from recall_workers where worker = %s and breaker = %s"


async def opens(
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
    then: Raw | Gate,
) -> Daemon:
    """A worker whose breaker is open, as its row says, and whose next probe is answered so."""
    for session in ("a", "b"):
        endpoint.script(session, LATER, then)
    daemon = await daemons.start(concurrency=4, poll_interval=30)
    await eventually(db, BEATEN, [daemon.name])
    for session in ("a", "b"):
        await promise(app, session, "once")
    await daemon.hears("breaker.opened")
    await eventually(db, SAYS, [daemon.name, "open"], within=2)
    return daemon


async def says_closed(database: str, db: Connection, daemon: Daemon) -> None:
    """Its row and the command line say closed within two seconds, and it was told once."""
    await eventually(db, SAYS, [daemon.name, "closed"], within=2)
    said = await asyncio.to_thread(process, database, "workers", "--json")
    assert {w["worker"]: w["breaker"] for w in json.loads(said.stdout)}[daemon.name] == "closed"
    opened, closed = daemon.told("breaker.opened"), daemon.told("breaker.closed")
    assert (len(opened), len(closed)) == (1, 1)


async def stats_say_closed(database: str) -> None:
    """For all workers together."""
    said = await asyncio.to_thread(process, database, "stats", "--json")
    assert json.loads(said.stdout)["workers"]["breakers_open"] == 0


async def test_closed_by_an_answer(
    app: Application,
    database: str,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """A probe is answered."""
    daemon = await opens(app, db, endpoint, daemons, reply())
    await daemon.hears("breaker.closed")
    await says_closed(database, db, daemon)
    await stats_say_closed(database)
    await daemon.hears("recall.settled", times=2, status="fired")
    assert len(daemon.told("breaker.closed")) == 1


async def test_closed_by_an_accepted_run(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A probe is accepted, and goes on at the API."""
    endpoint.scripts["GET r1"] = [ON]
    daemon = await opens(app, db, endpoint, daemons, accepted("r1"))
    await daemon.hears("breaker.closed")
    await says_closed(database, db, daemon)
    await stats_say_closed(database)


@pytest.mark.full
async def test_a_probe_that_is_silent_closes_nothing(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """It may be a run, or a gateway that is silent, too: it stays open until there is an answer,
    and the next probe is made meanwhile."""
    gate = Gate()
    daemon = await opens(app, db, endpoint, daemons, gate)
    await gate.entered.wait()
    await promise(app, "next")
    endpoint.script("next", Gate())
    await endpoint.count(1, "next")
    assert daemon.told("breaker.closed") == []
    gate.open()
    await daemon.hears("breaker.closed")
    await says_closed(database, db, daemon)
    await stats_say_closed(database)
    assert len(daemon.told("breaker.closed")) == 1


@pytest.mark.parametrize("how", ["answered", "accepted"])
async def test_closed_by_another_workers_word(
    how: str, app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """One of two workers finds the endpoint answering: both close, say so once, and are read so."""
    endpoint.default = LATER
    workers = [await daemons.start(concurrency=1, poll_interval=30) for _ in range(2)]
    for daemon in workers:
        await eventually(db, BEATEN, [daemon.name])
    for n in range(8):
        await promise(app, f"s{n}", "once")
    for daemon in workers:
        await daemon.hears("breaker.opened", within=30)
        await eventually(db, SAYS, [daemon.name, "open"], within=2)
    endpoint.scripts["GET r1"] = [ON]
    ways: dict[str, Raw | Gate] = {"answered": reply(), "accepted": accepted("r1")}
    endpoint.default = ways[how]
    told = [asyncio.create_task(daemon.hears("breaker.closed", within=30)) for daemon in workers]
    await asyncio.gather(*told)
    for daemon in workers:
        await says_closed(database, db, daemon)
    await stats_say_closed(database)


async def test_a_worker_that_is_being_stopped_says_closed_once(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """SIGTERM while a silent probe is out, and then it is answered: told once, and a good end."""
    gate = Gate()
    daemon = await opens(app, db, endpoint, daemons, gate)
    await gate.entered.wait()
    stopping = asyncio.create_task(daemon.stop())
    await daemon.hears("worker.draining")
    gate.open()
    assert await stopping == 0
    assert len(daemon.told("breaker.closed")) == 1

"""What a worker leaves behind when it dies, stops or is cut off: accepted runs, attempts, sessions.

Whoever comes next must neither call again what the API has accepted, nor call more often than
RECALL_MAX_ATTEMPTS allows, nor leave a session blocked.
"""

from __future__ import annotations

import asyncio
import re
import signal
import time
from typing import Any

import pytest

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint, Gate, reply
from ..support.proxy import Proxy
from ..test_cli import process
from .test_accepted import DONE, ON, accepted
from .test_corridor import row, soon
from .test_lease import eventually, promise, rows

pytestmark = pytest.mark.full


async def command(database: str, *words: str) -> float:
    """`recall-worker <words>` ends well; the monotonic instant at which it had ended."""
    said = await asyncio.to_thread(process, database, *words)
    assert said.returncode == 0, said.stderr
    return time.monotonic()


async def stopped_while_it_claims(
    daemons: Daemons,
    database: str,
    db: Connection,
    session: str,
    *,
    lease: float,
    **settings: Any,
) -> Daemon:
    """A worker far from PostgreSQL takes a dead worker's row up, and is told to stop while the
    claim's answer is on its way. It has ended well."""
    async with Proxy(database) as proxy:
        daemon = await daemons.start(lease=lease, dsn=proxy.dsn, **settings)
        proxy.delay(0.15)
        taken = "select 1 from session_recalls where session_id = %s and leased_by = %s"
        await eventually(db, taken, [session, daemon.name])
        daemon.signal(signal.SIGTERM)
        assert await daemon.exit() == 0
        claimed = daemon.told("recall.claimed", session=session)
        draining = daemon.told("worker.draining")
        order = [daemon.events.index(told[0]) for told in (draining, claimed)]
        assert order == sorted(order), "the claim was on its way"
    return daemon


# --- 4: an accepted run's reference --------------------------------------------------------------


async def accepted_by_a_dead_worker(
    app: Application,
    endpoint: Endpoint,
    daemons: Daemons,
    lease: float,
) -> str:
    """A recall whose run the API has accepted, and whose worker is dead; its id."""
    endpoint.script("acc", accepted("r1"))
    endpoint.scripts["GET r1"] = [ON]
    first = await daemons.start(lease=lease)
    recall = await promise(app, "acc", "once")
    await endpoint.until(lambda: endpoint.of("r1", "GET"))
    await first.kill()
    return recall


async def test_an_accepted_run_that_a_stopping_worker_takes_up(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """SIGTERM while the claim is under way: its reference and attempt stay, and it is polled."""
    await accepted_by_a_dead_worker(app, endpoint, daemons, lease=3)
    before = await row(db, "acc")
    await stopped_while_it_claims(daemons, database, db, "acc", lease=3)
    left = await row(db, "acc")
    endpoint.scripts["GET r1"] = [DONE]
    third = await daemons.start(lease=3)
    await third.hears("recall.settled", session="acc", status="fired")
    assert len(endpoint.of("acc")) == 1, "posted once"
    for column in ("status", "run_reference", "attempt", "delivered_at"):
        assert left[column] == before[column]
    assert (await row(db, "acc"))["attempt"] == 1


async def test_an_accepted_run_whose_claim_is_answered_late(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Claims are answered after more than two thirds of a lease: put back, and polled later."""
    await accepted_by_a_dead_worker(app, endpoint, daemons, lease=1)
    async with Proxy(database) as proxy:
        second = await daemons.start(lease=1, dsn=proxy.dsn, ready=False)
        proxy.delay(0.4)
        await second.hears("recall.claimed", session="acc", within=30)
        proxy.heal()
        endpoint.scripts["GET r1"] = [DONE]
        await second.hears("recall.settled", session="acc", status="fired", attempt=1)
        assert len(endpoint.of("acc")) == 1, "posted once"


async def test_an_accepted_run_whose_row_the_application_holds_locked(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Locked for longer than a statement waits while the API accepts: polled, not posted again."""
    gate = Gate(accepted("r1"))
    endpoint.script("acc", gate, accepted("r2"))
    endpoint.scripts["GET r1"] = [DONE]
    daemon = await daemons.start(lease=30)
    await promise(app, "acc", "once")
    await gate.entered.wait()
    async with await Application.connect(database) as holder:
        async with holder.connection.transaction():
            await holder.connection.execute("select 1 from session_recalls for update")
            gate.open()
            await asyncio.sleep(3)  # Three times as long as a statement waits for a lock.
    await daemon.hears("recall.settled", session="acc")
    assert [e["status"] for e in daemon.told("recall.settled")] == ["fired"]
    assert len(endpoint.of("acc")) == 1, "posted once"


async def test_an_accepted_run_of_a_worker_that_is_stopped_in_an_outage(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """What the API accepted could not be put on record before the stop: the release does it."""
    gate = Gate(accepted("r1"))
    endpoint.script("acc", gate, accepted("r2"))
    endpoint.scripts["GET r1"] = [DONE]
    async with Proxy(database) as proxy:
        first = await daemons.start(lease=6, drain_timeout=1, dsn=proxy.dsn)
        recall = await promise(app, "acc", "once")
        await gate.entered.wait()
        proxy.cut()
        gate.open()
        await first.hears("database.lost")
        first.signal(signal.SIGTERM)
        await first.hears("worker.released")
        proxy.heal()
        assert await first.exit() == 0
    left = await row(db, "acc")
    assert left["run_reference"] is not None and left["delivered_at"] is not None
    second = await daemons.start(lease=6)
    await second.hears("recall.settled", session="acc", status="fired", attempt=1)
    assert len(endpoint.of("acc")) == 1, "posted once"
    marks = await rows(db, "select * from recall_attempts where recall_id = %s", [recall])
    assert [(m["outcome"], m["calls"]) for m in marks] == [("answered", 1)]
    assert marks[0]["called_at"] <= marks[0]["delivered_at"] <= marks[0]["completed_at"]


# --- 7: RECALL_MAX_ATTEMPTS ----------------------------------------------------------------------


@pytest.mark.parametrize("attempts", [1, 2])
async def test_a_release_gives_no_attempt_back_that_was_spent(
    attempts: int,
    app: Application,
    database: str,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Killed in hand, taken up, released unsent, taken up again: never more calls than allowed."""
    gate = Gate()
    endpoint.script("s", gate)
    first = await daemons.start(lease=3, max_attempts=attempts)
    await promise(app, "s", "once")
    await gate.entered.wait()
    await first.kill()
    await stopped_while_it_claims(daemons, database, db, "s", lease=3, max_attempts=attempts)
    endpoint.script("s", reply(500))
    third = await daemons.start(lease=3, max_attempts=attempts)
    await third.hears("recall.settled", session="s", status="failed")
    assert len(endpoint.of("s")) == attempts
    assert len({r.key for r in endpoint.of("s")}) == 1
    if attempts == 1:
        # The row alone does not tell whether the dead worker had called.
        assert re.search("perhaps|may |not known", str((await row(db, "s"))["reason"]))


async def test_the_last_attempt_of_a_dead_worker_says_what_is_not_known(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """RECALL_MAX_ATTEMPTS=1, killed in mid-run: not called again, and the reason claims no call."""
    gate = Gate()
    endpoint.script("s", gate)
    first = await daemons.start(lease=2, max_attempts=1)
    await promise(app, "s", "once")
    await gate.entered.wait()
    await first.kill()
    second = await daemons.start(lease=2, max_attempts=1)
    await second.hears("recall.settled", session="s", status="failed")
    assert len(endpoint.of("s")) == 1
    assert re.search("perhaps|may |not known", str((await row(db, "s"))["reason"]))


# --- 8: paused in mid-run, and then its worker dies ----------------------------------------------

CALLED_WITHIN = 3 + 10
"""Seconds after its worker's death: the lease, and some for the look that finds it."""


async def test_a_run_that_was_paused_blocks_its_session_for_a_lease_only(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Its session's next link is called; the paused row stays, and is resumed under its own key."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    first = await daemons.start(lease=3)
    paused = await promise(app, "s", "once")
    await gate.entered.wait()
    link = await app.schedule("s", "immediate", soon(0), "the next link")
    await command(database, "pause", paused)
    await first.kill()
    second = await daemons.start(lease=3)
    await endpoint.count(2, "s", within=CALLED_WITHIN)
    await second.hears("recall.settled", recall=link, status="fired")
    assert [r.key for r in endpoint.of("s")] == [f"{paused}:1", f"{link}:1"]
    left = (await rows(db, "select * from session_recalls where id = %s", [paused]))[0]
    assert left["status"] in ("pending", "running") and left["paused_at"] is not None

    resumed = await command(database, "resume", paused)
    await second.hears("recall.settled", recall=paused, status="fired")
    assert [r.key for r in endpoint.of("s")] == [f"{paused}:1", f"{link}:1", f"{paused}:1"]
    assert endpoint.of("s")[2].at - resumed < 2
    assert endpoint.of("s")[2].headers["recall-attempt"] == "2", "the lost call counts"


async def test_a_run_that_was_paused_before_it_was_sent_costs_no_attempt(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Taken up, paused, and its second worker died before the call: it has its last attempt yet."""
    recall = await promise(app, "s", "once")
    await db.execute(
        "update session_recalls set lease = gen_random_uuid(), lease_until = now() - interval '1 "
        "min',"
        " leased_at = now() - interval '1 min', leased_by = 'dead', attempt = 2, paused_at = now(),"
        " begun_at = now() - interval '2 min', takeovers = 1"
    )
    await db.execute("update session_recalls set taken_lease = lease")
    daemon = await daemons.start(lease=3, max_attempts=2)
    await eventually(db, "select 1 from session_recalls where lease is null")
    await command(database, "resume", recall)
    await daemon.hears("recall.settled", recall=recall)
    assert [e["status"] for e in daemon.told("recall.settled")] == ["fired"]
    assert [r.headers["recall-attempt"] for r in endpoint.of("s")] == ["2"]


async def test_an_accepted_run_that_was_paused_is_polled_when_it_is_resumed(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The API has accepted the paused run: the next link is called, the run not posted again."""
    endpoint.script("acc", accepted("r1"), reply())
    endpoint.scripts["GET r1"] = [ON]
    first = await daemons.start(lease=3)
    paused = await promise(app, "acc", "once")
    await endpoint.until(lambda: endpoint.of("r1", "GET"))
    link = await app.schedule("acc", "immediate", soon(0), "the next link")
    await command(database, "pause", paused)
    await first.kill()
    endpoint.scripts["GET r1"] = [DONE]
    second = await daemons.start(lease=3)
    await endpoint.count(2, "acc", within=CALLED_WITHIN)
    await second.hears("recall.settled", recall=link, status="fired")
    await command(database, "resume", paused)
    await second.hears("recall.settled", recall=paused, status="fired", attempt=1)
    assert [r.key for r in endpoint.of("acc")] == [f"{paused}:1", f"{link}:1"]


async def test_a_paused_run_that_goes_on_still_keeps_its_session_to_itself(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Paused in mid-run with its worker alive: the next link waits for the run's end."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    daemon = await daemons.start(lease=1.5)
    paused = await promise(app, "s", "once")
    await gate.entered.wait()
    link = await app.schedule("s", "immediate", soon(0), "the next link")
    await command(database, "pause", paused)
    await asyncio.sleep(4)  # Longer than two leases: it is renewed.
    assert len(endpoint.of("s")) == 1
    gate.open()
    await daemon.hears("recall.settled", recall=link, status="fired")
    assert [r.key for r in endpoint.of("s")] == [f"{paused}:1", f"{link}:1"]


# --- 9: no notification --------------------------------------------------------------------------


async def idle_beside_a_dead_worker(
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> tuple[str, Daemon]:
    """A recall whose worker died in mid-run, and another worker that sleeps until its poll."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    first = await daemons.start(lease=2, poll_interval=30)
    recall = await promise(app, "s", "once")
    await gate.entered.wait()
    await first.kill()
    second = await daemons.start(lease=2, poll_interval=30)
    return recall, second


EXPIRED = """
select 1 from session_recalls where session_id = 's' and (lease is null or lease_until < now())
"""


async def test_a_retry_after_a_cancel_in_mid_run_notifies(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Cancelled in mid-run, its worker dead: `retry` is called within a second."""
    recall, second = await idle_beside_a_dead_worker(app, db, endpoint, daemons)
    assert await app.cancel_session("s") == 1
    await eventually(db, EXPIRED)
    done = await command(database, "retry", recall)
    await endpoint.count(2, "s", within=5)
    assert endpoint.of("s")[1].at - done < 1
    assert endpoint.of("s")[1].key == f"{recall}:1.1"
    await second.hears("recall.settled", recall=recall, status="fired")


@pytest.mark.parametrize("when", ["after its lease", "before"])
async def test_a_resume_of_a_dead_workers_run_notifies(
    when: str, app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Paused in mid-run, its worker dead: called within a second of `resume` or its lease's end."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    lease = 2 if when == "after its lease" else 8
    first = await daemons.start(lease=lease, poll_interval=30)
    second = await daemons.start(lease=lease, poll_interval=30)
    recall = await promise(app, "s", "once")
    await gate.entered.wait()
    running, idle = (first, second) if first.told("recall.claimed") else (second, first)
    await command(database, "pause", recall)
    await running.kill()
    if when == "after its lease":
        await eventually(db, EXPIRED)
        expected = await command(database, "resume", recall)
    else:
        await command(database, "resume", recall)
        await eventually(db, EXPIRED)
        expected = time.monotonic()
    await endpoint.count(2, "s", within=5)
    assert endpoint.of("s")[1].at - expected < 1
    await idle.hears("recall.settled", recall=recall, status="fired")
    assert [r.key for r in endpoint.of("s")] == [f"{recall}:1"] * 2


# --- one row that is locked does not stand before the others -------------------------------------


@pytest.mark.parametrize("cap", [{}, {"fleet_concurrency": 10}], ids=["no cap", "under a cap"])
async def test_a_locked_row_of_a_dead_worker_holds_up_no_other(
    cap: dict[str, Any],
    app: Application,
    database: str,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """The application holds the oldest of two ended leases locked: the other is taken up."""
    gates = [Gate(), Gate()]
    first = await daemons.start(lease=3, **cap)
    for n, gate in enumerate(gates):
        endpoint.script(f"s{n}", gate, reply())
        await promise(app, f"s{n}", "once")
        await gate.entered.wait()
    await first.kill()
    async with await Application.connect(database) as holder:
        async with holder.connection.transaction():
            await holder.connection.execute(
                "select 1 from session_recalls order by lease_until, id limit 1 for update"
            )
            second = await daemons.start(lease=3, **cap)
            await second.hears("recall.settled", status="fired", within=12)
    await second.hears("recall.settled", times=2, status="fired")

"""Runs that the API accepts and ends later: on record before they are polled, followed by whoever
holds the lease, never posted twice."""

from __future__ import annotations

import signal

import pytest

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, Raw, reply
from .test_corridor import row, soon

ON = reply(200, {"status": "running"}, {"retry-after": "0"})
DONE = reply(200, {"status": "completed"})


def accepted(run: str) -> Raw:
    return reply(202, {"status": "accepted"}, {"location": f"/runs/{run}"})


@pytest.mark.parametrize(
    ("answer", "polls"),
    [
        (reply(202, {}, {"location": "/runs/r1"}), "r1"),
        (reply(202, {}, {"location": "../../runs/r1"}), "r1"),
        (reply(200, {"run_id": "r 1", "status": "queued"}), "/sessions/acc/run/r%201"),
        (reply(202, {"run_id": "..", "status": "odd"}), "/sessions/acc/run/%2E%2E"),
    ],
    ids=["location", "relative location", "run_id", "dotted run_id"],
)
async def test_accepted_then_polled_to_its_end(
    answer: Raw, polls: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """One POST; GETs until the status is final; delivered and completed are apart on the call's
    mark."""
    await app.create_session("acc", "ann")
    endpoint.script("acc", answer)
    endpoint.default = DONE
    endpoint.scripts["GET r1"] = [ON, reply(202), reply(503), DONE]
    daemon = await daemons.start()
    await app.schedule("acc", "immediate", soon(0), "work")
    settled = (await daemon.hears("recall.settled"))[0]
    assert (settled["outcome"], settled["status"]) == ("answered", "fired")
    assert len(endpoint.of("acc")) == 1
    asked = [r for r in endpoint.requests if r.method == "GET"]
    assert {r.path.rpartition("/runs/")[2] for r in asked} == {polls}
    marks = await (await db.execute("select * from recall_attempts")).fetchall()
    assert [(m["outcome"], m["calls"]) for m in marks] == [("answered", 1)]
    assert marks[0]["called_at"] <= marks[0]["delivered_at"] <= marks[0]["completed_at"]
    assert (await row(db, "acc"))["run_reference"] is None


async def test_an_accepted_run_that_fails_is_called_again_under_a_new_key(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The poll says failed: the next attempt has a new key, as the old one would only replay the
    failure."""
    await app.create_session("acc", "ann")
    endpoint.script("acc", accepted("r1"), reply())
    endpoint.scripts["GET r1"] = [reply(200, {"status": "failed", "error": "the model broke"})]
    daemon = await daemons.start()
    await app.schedule("acc", "immediate", soon(0), "work")
    await daemon.hears("recall.settled", status="fired", within=30)
    first, second = (r.key for r in endpoint.of("acc"))
    assert second == first + ".1"


@pytest.mark.slow
async def test_a_killed_worker_is_succeeded_without_a_second_post(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """SIGKILL while an accepted run is polled: the next worker polls on; one POST, no attempt
    spent."""
    await app.create_session("acc", "ann")
    endpoint.script("acc", accepted("r1"))
    endpoint.scripts["GET r1"] = [ON]
    first = await daemons.start(lease=2)
    await app.schedule("acc", "immediate", soon(0), "work")
    await endpoint.until(lambda: len(endpoint.of("r1", "GET")) >= 2)
    assert (await row(db, "acc"))["last_outcome"] == "accepted"
    await first.kill()
    second = await daemons.start(lease=2)
    await second.hears("lease.taken")
    polled = len(endpoint.of("r1", "GET"))
    await endpoint.until(lambda: len(endpoint.of("r1", "GET")) > polled)
    endpoint.scripts["GET r1"] = [DONE]
    await second.hears("recall.settled", outcome="answered", status="fired", attempt=1)
    assert len(endpoint.of("acc")) == 1
    marks = await (await db.execute("select outcome, calls from recall_attempts")).fetchall()
    assert marks == [{"outcome": "answered", "calls": 1}]


@pytest.mark.slow
async def test_a_stopping_worker_hands_an_accepted_run_over(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """SIGTERM past the drain: the lease ends at once, and the other replica polls on without
    waiting it out."""
    await app.create_session("acc", "ann")
    endpoint.script("acc", accepted("r1"))
    endpoint.scripts["GET r1"] = [ON]
    first = await daemons.start(lease=12, drain_timeout=0)
    await app.schedule("acc", "immediate", soon(0), "work")
    await endpoint.until(lambda: endpoint.of("r1", "GET"))
    second = await daemons.start(lease=12)
    assert await first.stop() == 0
    assert (await row(db, "acc"))["run_reference"] is not None
    endpoint.scripts["GET r1"] = [DONE]
    # At once, or (where PostgreSQL itself has just started) after the third of a lease that living
    # owners get.
    await second.hears("recall.settled", status="fired", within=8)
    assert len(endpoint.of("acc")) == 1


@pytest.mark.slow
async def test_a_cancel_in_mid_run_ends_the_run_at_the_api(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The application cancels while the run is polled: polling stops, and the API is asked to end
    the run."""
    await app.create_session("acc", "ann")
    endpoint.script("acc", accepted("r1"))
    endpoint.scripts["GET r1"] = [ON]
    daemon = await daemons.start()
    await app.schedule("acc", "immediate", soon(0), "work")
    await endpoint.until(lambda: endpoint.of("r1", "GET"))
    assert await app.cancel_session("acc") == 1
    await endpoint.until(lambda: endpoint.of("r1", "DELETE"))
    await daemon.hears("recall.ended", status="cancelled")
    assert len(endpoint.of("acc")) == 1


@pytest.mark.slow
async def test_a_run_past_its_time_is_ended_at_the_api(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """RECALL_RUN_TIMEOUT passes while the run is polled: it is cancelled there, and the outcome is
    unknown."""
    await app.create_session("acc", "ann")
    endpoint.script("acc", accepted("r1"))
    endpoint.scripts["GET r1"] = [ON]
    daemon = await daemons.start(run_timeout=1, max_attempts=1)
    await app.schedule("acc", "immediate", soon(0), "work")
    await daemon.hears("recall.settled", outcome="unknown", status="failed")
    assert endpoint.of("r1", "DELETE")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ended", [DONE, reply(200, {"status": "failed"}), ON], ids=["well", "badly", "on"]
)
async def test_a_run_whose_time_went_by_while_nobody_asked(
    ended: Raw, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Its worker stands still for longer than the lease and RECALL_RUN_TIMEOUT: who takes it over
    asks the API before it says anything of the run, and what the API says stands."""
    await app.create_session("acc", "ann")
    endpoint.script("acc", accepted("r1"))
    gate = Gate(ON)
    endpoint.scripts["GET r1"] = [gate, ended]
    first = await daemons.start(lease=1.5, run_timeout=3, max_attempts=1)
    await app.schedule("acc", "immediate", soon(0), "work")
    await gate.entered.wait()
    first.signal(signal.SIGSTOP)
    await db.execute("select pg_sleep(4)")
    asked = len(endpoint.of("r1", "GET"))
    second = await daemons.start(lease=1.5, run_timeout=3, max_attempts=1)
    [settled] = await second.hears("recall.settled")
    if ended is DONE:
        assert (settled["outcome"], settled["status"]) == ("answered", "fired")
    elif ended is ON:
        assert (settled["outcome"], settled["status"]) == ("unknown", "failed")
        assert settled["reason"] == "the accepted run did not end in its time"
        assert endpoint.of("r1", "DELETE")
    else:
        assert (settled["outcome"], settled["status"]) == ("failed", "failed")
    assert len(endpoint.of("r1", "GET")) == asked + 1 and len(endpoint.of("acc")) == 1
    first.signal(signal.SIGCONT)


@pytest.mark.slow
async def test_a_run_that_ends_in_a_long_pause_between_polls(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The API wants the next poll after RECALL_RUN_TIMEOUT: at its end the run is asked for."""
    await app.create_session("acc", "ann")
    endpoint.script("acc", accepted("r1"))
    endpoint.scripts["GET r1"] = [reply(200, {"status": "running"}, {"retry-after": "200"}), DONE]
    daemon = await daemons.start(run_timeout=2, max_attempts=1)
    await app.schedule("acc", "immediate", soon(0), "work")
    await daemon.hears("recall.settled", outcome="answered", status="fired")
    assert len(endpoint.of("r1", "GET")) == 2 and not endpoint.of("r1", "DELETE")


@pytest.mark.slow
async def test_a_reference_elsewhere_is_never_asked(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A Location on another host is not followed, as the token would leak; the run may have been
    made, so the outcome is unknown, and it is not posted again."""
    await app.create_session("acc", "ann")
    async with Endpoint() as elsewhere:
        endpoint.script(
            "acc", reply(202, {}, {"location": f"http://localhost:{elsewhere.port}/runs/r1"})
        )
        daemon = await daemons.start()
        await app.schedule("acc", "immediate", soon(0), "work")
        await daemon.hears("recall.settled", outcome="unknown", status="failed")
        assert elsewhere.connections == 0
    assert len(endpoint.requests) == 1


@pytest.mark.slow
async def test_a_skip_in_mid_run_of_an_accepted_run(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A recurring recall is skipped while its accepted run is polled: exactly one occurrence
    less."""
    await app.create_session("acc", "ann")
    gate = Gate(DONE)
    endpoint.script("acc", accepted("r1"))
    endpoint.scripts["GET r1"] = [gate]
    daemon = await daemons.start()
    await app.schedule("acc", "recurring", soon(0), "work", interval_seconds=3600)
    await gate.entered.wait()
    assert await app.skip_next("acc")
    gate.open()
    await daemon.hears("recall.settled", outcome="answered")
    assert (await row(db, "acc"))["occurrence"] == 3


@pytest.mark.slow
async def test_a_second_signal_hands_over_at_once(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """SIGTERM twice while an accepted run is polled: the worker is gone within moments, the run
    stays on record."""
    await app.create_session("acc", "ann")
    endpoint.script("acc", accepted("r1"))
    endpoint.scripts["GET r1"] = [ON]
    daemon = await daemons.start(drain_timeout=300)
    await app.schedule("acc", "immediate", soon(0), "work")
    await endpoint.until(lambda: endpoint.of("r1", "GET"))
    daemon.signal(signal.SIGTERM)
    await daemon.hears("worker.draining")
    daemon.signal(signal.SIGTERM)
    assert await daemon.exit() == 0
    held = await row(db, "acc")
    assert (held["status"], held["run_reference"] is not None, held["attempt"]) == (
        "pending",
        True,
        1,
    )

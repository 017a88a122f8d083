"""The breaker in the daemon: an endpoint that is not there stops the claims and not the promises;
one session's trouble stops nobody."""

from __future__ import annotations

import pytest

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from .test_accepted import accepted
from .test_corridor import row
from .test_lease import calls, eventually, promise, rows

LATER = reply(503, {"error": "starting"}, {"retry-after": "0"})
"""Unavailable, and due again as soon as may be: what holds the call back is the breaker."""


@pytest.mark.slow
async def test_opens_and_closes(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Two sessions in a row are told "later": claims stop but for probes, which go round; an answer
    closes it, and all recalls fire."""
    sessions = [f"s{n}" for n in range(12)]
    for session in sessions:
        endpoint.script(session, LATER)
    daemon = await daemons.start(concurrency=3, poll_interval=30)
    for session in sessions:
        await promise(app, session, "once")
    await daemon.hears("breaker.opened")
    already = len(endpoint.requests)
    assert already <= 3, "no more than the slots that were taken before it opened"
    await daemon.hears("breaker.probed", times=2)
    probes = endpoint.requests[already:]
    assert probes[1].at - probes[0].at > 1
    assert len({r.session for r in probes}) == len(probes), "each probe is of another session"
    assert len(probes) <= 3

    for session in sessions:
        endpoint.script(session, reply())
    await daemon.hears("breaker.closed")
    for session in sessions:
        await daemon.hears("recall.settled", session=session, status="fired")
    left = await rows(db, "select distinct status, attempt from session_recalls")
    assert left == [{"status": "fired", "attempt": 1}]
    marks = await rows(db, "select distinct attempt from recall_attempts")
    assert marks == [{"attempt": 1}], "waiting cost no attempt"


@pytest.mark.full
async def test_no_connection(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The endpoint's process is gone and comes back: nothing is claimed but probes, nothing is
    lost, no attempt is spent."""
    sessions = [f"s{n}" for n in range(6)]
    daemon = await daemons.start(concurrency=2, poll_interval=30)
    await promise(app, "first")
    await daemon.hears("recall.settled", session="first")
    await endpoint.stop()
    for session in sessions:
        await promise(app, session, "once")
    await daemon.hears("breaker.opened")
    await daemon.hears("breaker.probed", times=2)
    assert len(daemon.told("recall.claimed")) <= 1 + 2 + 3
    probed = [e["session"] for e in daemon.told("breaker.probed")]
    assert len(set(probed)) == len(probed)
    await endpoint.start()
    await daemon.hears("breaker.closed", within=40)
    # Deferred by backoff, which is at most 5 s, then 20 s.
    for session in sessions:
        await daemon.hears("recall.settled", within=60, session=session, status="fired", attempt=1)
    assert sorted(r.session for r in endpoint.requests) == ["first", *sessions]


@pytest.mark.slow
async def test_one_sessions_trouble(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A session that is told "later" for ever does not open it, among others that are answered or
    alone."""
    endpoint.script("ill", reply(503, {}, {"retry-after": "0"}))
    daemon = await daemons.start(concurrency=1, poll_interval=30)
    ill = await promise(app, "ill", "once")
    await endpoint.count(2, "ill")
    for n in range(3):
        await promise(app, f"well{n}")
        await daemon.hears("recall.settled", session=f"well{n}", status="fired")
        seen = len(endpoint.of("ill"))
        await endpoint.count(seen + 1, "ill")
    assert daemon.told("breaker.opened") == []
    left = await row(db, "ill")
    assert left["status"] == "pending"
    [mark] = await calls(db, ill)
    assert (mark["attempt"], mark["outcome"]) == (1, "unavailable")
    assert mark["calls"] >= 4, "deferrals fold into one mark"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (reply(401, {"error": "who are you"}), 401),
        pytest.param(reply(404, text=b"<html>nothing here</html>"), 404, marks=pytest.mark.full),
        (reply(200, text=b"<html>welcome</html>", headers={"content-type": "text/html"}), 200),
        pytest.param(
            reply(307, headers={"location": "http://127.0.0.1:1/"}), 307, marks=pytest.mark.full
        ),
    ],
    ids=["a wrong token", "a wrong path", "a web page", "a redirect"],
)
async def test_misconfigured(
    answer: object,
    status: int,
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Our own fault is told loudly, opens the breaker, and costs no recall an attempt."""
    endpoint.default = answer  # type: ignore[assignment]
    daemon = await daemons.start(concurrency=2)
    for session in ("a", "b"):
        await promise(app, session, "once")
    told = await daemon.hears("endpoint.misconfigured", times=2, http_status=status)
    assert {e["level"] for e in told} == {"error"}
    [opened] = await daemon.hears("breaker.opened")
    assert opened["level"] == "error"
    for session in ("a", "b"):
        await daemon.hears(
            "recall.settled", session=session, outcome="misconfigured", verdict="defer"
        )
        left = await row(db, session)
        assert (left["status"], left["attempt"], left["last_outcome"]) == (
            "pending",
            0,
            "misconfigured",
        )


@pytest.mark.full
async def test_nothing_is_given_up_while_it_is_open(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Past RECALL_GIVE_UP a recall whose endpoint is away for all is kept, and one that alone meets
    trouble fails."""
    endpoint.default = LATER
    daemon = await daemons.start(concurrency=1, give_up=0.5)
    for session in ("a", "b"):
        await promise(app, session, "once")
    await daemon.hears("breaker.opened")
    await eventually(
        db, "select 1 from session_recalls having min(begun_at) < now() - interval '1 second'"
    )
    seen = len(endpoint.requests)
    await endpoint.count(seen + 1)
    await daemon.hears("breaker.probed", times=2)
    left = await rows(db, "select distinct status from session_recalls")
    assert left == [{"status": "pending"}]

    endpoint.default = reply()
    await daemon.hears("recall.settled", session="a", status="fired")
    await daemon.hears("recall.settled", session="b", status="fired")
    endpoint.script("alone", LATER)
    await promise(app, "alone", "once")
    await daemon.hears("recall.settled", session="alone", status="failed")
    assert "given up" in str((await row(db, "alone"))["reason"])


@pytest.mark.slow
async def test_a_probe_that_runs_closes_it(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A probe that is taken and goes on for a while has shown enough: claims go on long before its
    run has ended."""
    gate = Gate()
    for session in ("a", "b"):
        endpoint.script(session, LATER, gate)
    daemon = await daemons.start(concurrency=4, poll_interval=30)
    for session in ("a", "b"):
        await promise(app, session, "once")
    await daemon.hears("breaker.opened")
    await gate.entered.wait()
    await promise(app, "held back")
    await daemon.hears("breaker.closed")
    await daemon.hears("recall.settled", session="held back", status="fired")
    assert endpoint.of("held back")[0].at - endpoint.requests[2].at < 20
    gate.open()
    for session in ("a", "b"):
        await daemon.hears("recall.settled", session=session, status="fired")


@pytest.mark.full
async def test_accepted_runs_of_a_dead_worker_take_no_probe(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Twelve of them are taken up while the breaker is open: the next probe still finds out."""
    runs = [f"r{n}" for n in range(12)]
    first = await daemons.start(lease=3, concurrency=12)
    for run in runs:
        endpoint.script(f"of {run}", accepted(run))
        endpoint.scripts[f"GET {run}"] = [reply(200, {"status": "running"}, {"retry-after": "1"})]
        await promise(app, f"of {run}", "once")
    await endpoint.until(lambda: all(endpoint.of(run, "GET") for run in runs))
    second = await daemons.start(lease=3, concurrency=20)
    endpoint.default = reply(503, {}, {"retry-after": "3600"})
    await first.kill()
    for n in range(8):
        await promise(app, f"bad{n}")
    await second.hears("breaker.opened")
    await second.hears("lease.taken", 12)
    endpoint.default = reply()
    await promise(app, "good")
    # Twelve probes' pauses, 1 s doubling to 30 s, would be minutes; one or two are half of one.
    await second.hears("breaker.closed", within=45)
    await second.hears("recall.settled", session="good", status="fired")
    assert len(second.told("lease.taken")) == 12

"""Stopping: SIGTERM drains, then releases; a second signal releases now. What was put back is
another replica's at once."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from ..support.proxy import Proxy
from .test_corridor import row
from .test_lease import calls, eventually, promise

BOTH = pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.full),
    ],
)


@contextmanager
def mute_port() -> Iterator[int]:
    """A port whose server never accepts and whose backlog is full: connecting to it hangs."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        yield int(server.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_with_nothing_to_do(number: signal.Signals, db: Connection, daemons: Daemons) -> None:
    """A worker without runs ends at once, with status 0, leaves the table of workers, and says so
    in order."""
    daemon = await daemons.start()
    await eventually(db, "select 1 from recall_workers")
    asked = time.monotonic()
    daemon.signal(number)
    assert await daemon.exit() == 0
    assert time.monotonic() - asked < 10
    # What was being asked when the signal came may still be answered in between.
    assert [e["event"] for e in daemon.events if e["level"] != "debug"][-2:] == [
        "worker.draining",
        "worker.stopped",
    ]
    assert daemon.talk == []
    assert await (await db.execute("select worker from recall_workers")).fetchall() == []


@pytest.mark.slow
@BOTH
async def test_a_run_is_drained(
    number: signal.Signals, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """With a run open it claims nothing new, waits for the run's end, settles it, and ends with
    status 0."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start(drain_timeout=30)
    recall = await promise(app, "s", "once")
    await gate.entered.wait()
    daemon.signal(number)
    await daemon.hears("worker.draining", runs=1)
    # Rings, and is due while the worker drains for longer than any of its pauses.
    await promise(app, "late")
    await eventually(
        db,
        "select 1 from session_recalls where session_id = 'late' and trigger_at < now() - "
        "interval '1.2 seconds'",
    )
    assert endpoint.of("late") == []
    gate.open()
    assert await daemon.exit() == 0
    await daemon.hears("recall.settled", recall=recall, outcome="answered", status="fired")
    assert (await row(db, "s"))["status"] == "fired"
    late = await row(db, "late")
    assert (late["status"], late["attempt"], late["lease"]) == ("pending", 0, None)
    assert daemon.told("worker.released") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "second", [False, True], ids=["past the drain timeout", "by a second signal"]
)
async def test_a_call_that_was_sent_is_unknown(
    second: bool, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A run that does not end is broken off: Unknown, its attempt spent, called again by another
    replica under the same key."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    daemon = await daemons.start(lease=60, drain_timeout=600 if second else 0.5)
    recall = await promise(app, "s", "recurring", interval=3600)
    await gate.entered.wait()
    daemon.signal(signal.SIGTERM)
    await daemon.hears("worker.draining", runs=1)
    if second:
        daemon.signal(signal.SIGTERM)
        await daemon.hears("worker.hurried", runs=1)
    asked = time.monotonic()
    assert await daemon.exit() == 0
    assert time.monotonic() - asked < 15
    assert gate.hung_up.is_set()
    await daemon.hears("worker.released", runs=1)
    await daemon.hears("recall.settled", recall=recall, outcome="unknown", verdict="retry")
    left = await row(db, "s")
    assert (left["status"], left["attempt"], left["lease"], left["last_outcome"]) == (
        "pending",
        1,
        None,
        "unknown",
    )
    due = await eventually(
        db, "select extract(epoch from trigger_at - now())::float8 as seconds from session_recalls"
    )
    assert due["seconds"] <= 5, "due by the first backoff"

    other = await daemons.start(lease=60)
    await other.hears("recall.settled", recall=recall, attempt=2)
    one, two = endpoint.requests
    assert (one.key, one.body, two.headers["recall-attempt"]) == (two.key, two.body, "2")
    assert [(c["attempt"], c["outcome"], c["worker"]) for c in await calls(db, recall)] == [
        (1, "unknown", daemon.name),
        (2, "answered", other.name),
    ]


@pytest.mark.parametrize(
    "second", [False, True], ids=["past the drain timeout", "by a second signal"]
)
async def test_a_call_not_yet_sent_is_given_back(
    second: bool, app: Application, db: Connection, daemons: Daemons
) -> None:
    """A call that still waits for its connection goes back as it was: no attempt spent, due at
    once, no call on record."""
    with mute_port() as port:
        daemon = await daemons.start(
            drain_timeout=600 if second else 0.5, run_url=f"http://127.0.0.1:{port}/{{session_id}}"
        )
        recall = await promise(app, "s", "once")
        before = await row(db, "s")
        await eventually(
            db, "select 1 from session_recalls where lease is not null and attempt = 1"
        )
        daemon.signal(signal.SIGTERM)
        await daemon.hears("worker.draining", runs=1)
        if second:
            daemon.signal(signal.SIGTERM)
        assert await daemon.exit() == 0
    await daemon.hears("recall.settled", recall=recall, outcome=None, verdict="release")
    left = await row(db, "s")
    assert (left["status"], left["attempt"], left["lease"], left["begun_at"]) == (
        "pending",
        0,
        None,
        None,
    )
    assert (left["trigger_at"], left["occurrence"]) == (before["trigger_at"], 1)
    assert await calls(db, recall) == []


async def test_what_is_put_back_is_taken_at_once(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A leaving worker notifies, so another takes what was put back long before its poll."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    with mute_port() as port:
        leaving = await daemons.start(
            drain_timeout=0, run_url=f"http://127.0.0.1:{port}/{{session_id}}"
        )
        unsent = await promise(app, "unsent", "once")
        await eventually(
            db, "select 1 from session_recalls where session_id = 'unsent' and lease is not null"
        )
        staying = await daemons.start(poll_interval=30)
        assert await leaving.stop() == 0
        left = time.monotonic()
        await staying.hears("recall.settled", recall=unsent, attempt=1, status="fired")
        assert time.monotonic() - left < 15
    [request] = endpoint.requests
    assert request.headers["recall-attempt"] == "1"


@pytest.mark.slow
async def test_an_unknown_run_waits_for_its_backoff_elsewhere(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """What a leaving worker had sent is called by another at the instant its backoff ends, not at
    that one's poll."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    leaving = await daemons.start(drain_timeout=0)
    recall = await promise(app, "s", "once")
    await gate.entered.wait()
    staying = await daemons.start(poll_interval=30)
    assert await leaving.stop() == 0
    await staying.hears("recall.settled", recall=recall, attempt=2, status="fired")
    assert [r.key for r in endpoint.requests] == [f"{recall}:1"] * 2


@BOTH
async def test_with_nothing_to_do_while_postgresql_is_away(
    number: signal.Signals, database: str, daemons: Daemons
) -> None:
    """A worker without runs does not wait for PostgreSQL to come back before it ends."""
    async with Proxy(database) as proxy:
        daemon = await daemons.start(dsn=proxy.dsn, poll_interval=1)
        proxy.cut()
        await daemon.hears("database.lost")
        asked = time.monotonic()
        daemon.signal(number)
        assert await daemon.exit() == 0
        assert time.monotonic() - asked < 10
    assert daemon.events[-1]["event"] == "worker.stopped"


@pytest.mark.full
async def test_with_a_run_while_postgresql_is_away(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """SIGTERM during an outage, with a run that has ended and can't be settled: it ends all the
    same, and another takes the run up."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    async with Proxy(database) as proxy:
        daemon = await daemons.start(lease=2, drain_timeout=1, dsn=proxy.dsn)
        recall = await promise(app, "s", "once")
        await gate.entered.wait()
        proxy.cut()
        await daemon.hears("database.lost")
        gate.open()
        asked = time.monotonic()
        assert await daemon.stop(within=30) == 0
        assert time.monotonic() - asked < 1 + 10 + 2 + 5, "the drain, the last settles, the goodbye"
    other = await daemons.start(lease=2)
    await other.hears("recall.settled", recall=recall, attempt=2)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "silent"])
async def test_by_a_second_signal_while_postgresql_is_away(
    how: str, app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Who asks twice does not wait for a PostgreSQL that is lost: neither in the drain nor for the
    settles; the lease ends by itself."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    async with Proxy(database) as proxy:
        daemon = await daemons.start(lease=3, drain_timeout=600, dsn=proxy.dsn)
        recall = await promise(app, "s", "once")
        await gate.entered.wait()
        proxy.cut() if how == "cut" else proxy.blackhole()
        await daemon.hears("database.lost")
        daemon.signal(signal.SIGTERM)
        await daemon.hears("worker.draining")
        asked = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert await daemon.exit() == 0
        assert time.monotonic() - asked < 5, (
            "neither for the last settles, ten seconds, nor for the goodbye"
        )
        await gate.hung_up.wait()
    assert daemon.events[-1]["event"] == "worker.stopped"
    other = await daemons.start(lease=3)
    await other.hears("recall.settled", recall=recall, attempt=2)


@pytest.mark.slow
async def test_at_startup(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """SIGTERM at any moment of the start ends the process soon and in order, and leaves nothing
    leased that was not called."""
    began = time.monotonic()
    first = await daemons.start(ready=False)
    await first.hears("worker.ready")
    whole = time.monotonic() - began
    assert await first.stop() == 0
    await promise(app, "s", "once")
    for part in (0.0, 0.6, 0.9, 1.0):
        daemon = await daemons.start(ready=False)
        await asyncio.sleep(part * whole)
        status = await daemon.stop()
        # Before Python has come to our code the signal ends the process by itself.
        assert status in (0, -signal.SIGTERM)
        assert daemon.talk == []
        if status == 0:
            assert daemon.events[-1]["event"] == "worker.stopped"
    left = await row(db, "s")
    assert left["lease"] is None
    assert len(endpoint.requests) == (left["status"] == "fired")


async def test_in_the_instant_of_readiness(
    app: Application, db: Connection, daemons: Daemons
) -> None:
    """SIGTERM as soon as the worker says that it is ready: it stops with status 0."""
    await promise(app, "s", "once")
    daemon = await daemons.start(ready=False)
    await daemon.hears("worker.ready")
    assert await daemon.stop() == 0
    assert (await row(db, "s"))["lease"] is None


@pytest.mark.full
async def test_with_a_row_that_stays_locked(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A run that has ended but can't be settled, as the application holds its row, does not keep
    the process for ever."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start(lease=2, drain_timeout=0.5)
    await promise(app, "s", "once")
    await gate.entered.wait()
    await db.execute("begin")
    await db.execute("select from session_recalls where session_id = 's' for update")
    gate.open()
    asked = time.monotonic()
    assert await daemon.stop(within=30) == 0
    assert time.monotonic() - asked < 0.5 + 10 + 2 + 5
    await db.execute("rollback")


@pytest.mark.full
async def test_with_half_open_connections(database: str, daemons: Daemons) -> None:
    """SIGTERM while a claim waits for an answer that never comes: the process ends within the
    claim's own deadline."""
    async with Proxy(database) as proxy:
        daemon = await daemons.start(dsn=proxy.dsn, poll_interval=0.5)
        asked = proxy.asked
        await proxy.until(lambda: proxy.asked >= asked + 2)
        proxy.blackhole()
        await asyncio.sleep(1.0)  # By now a claim waits, whether it had been asked before or since.
        began = time.monotonic()
        assert await daemon.stop(within=80) == 0
        assert time.monotonic() - began < 60


async def test_a_database_without_a_schema(
    empty_database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Where nobody has migrated the worker ends at once, says what to do, and says nothing else."""
    daemon = await daemons.start(ready=False, dsn=empty_database)
    assert await daemon.exit() == 1
    assert [line.partition(":")[0] for line in daemon.talk] == ["Error", "Try"]
    assert "recall-worker migrate" in daemon.talk[1]
    assert [e["event"] for e in daemon.events] == ["schema.refused"]

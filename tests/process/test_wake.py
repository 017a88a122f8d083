"""Waking: due instants are kept to the moment, and PostgreSQL's clock alone decides when that
is."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ..conftest import Connection, connected
from ..support.application import Application
from ..support.daemon import FAKETIME, Daemons
from ..support.endpoint import Endpoint, Gate, Raw, Request, reply
from .test_lease import eventually, rows

STEP = timedelta(milliseconds=200)


async def schedule_in_steps(app: Application, db: Connection, count: int) -> dict[str, datetime]:
    """One recall a session at distinct instants, inserted in no order; when each is due, the first
    in a second."""
    [start] = await rows(db, "select clock_timestamp() + interval '1 second' as at")
    due = {f"s{n}": start["at"] + n * STEP for n in range(count)}
    for session in due:
        await app.create_session(session, "ann")
    for session in random.sample(list(due), count):
        await app.schedule(session, "once", due[session], "now")
    return due


async def asked_at(database: str, endpoint: Endpoint) -> dict[str, datetime]:
    """From now on, when each session was first requested by PostgreSQL's clock."""
    asked: dict[str, datetime] = {}

    async def run(request: Request) -> Raw:
        async with connected(database) as clock:
            [now] = await rows(clock, "select clock_timestamp() as now")
        asked.setdefault(request.session, now["now"])
        return reply()

    endpoint.default = run
    return asked


@pytest.mark.slow
async def test_distinct_instants_are_kept(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Twenty recalls 200 ms apart: none is requested before its time, and none as late as the next
    look by poll would be."""
    asked = await asked_at(database, endpoint)
    daemon = await daemons.start(poll_interval=30)
    due = await schedule_in_steps(app, db, 20)
    await daemon.hears("recall.settled", times=20)
    late = {session: (asked[session] - at).total_seconds() for session, at in due.items()}
    assert all(0 <= seconds < 2 for seconds in late.values()), late
    assert sum(seconds < 0.5 for seconds in late.values()) >= 15, late
    assert len(endpoint.requests) == 20


@pytest.mark.slow
async def test_many_at_one_instant(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """More recalls than slots due at one instant: all are called, one after the other, the slots
    never idle until a poll."""
    daemon = await daemons.start(poll_interval=30, concurrency=2)
    [start] = await rows(db, "select clock_timestamp() + interval '0.5 seconds' as at")
    for n in range(12):
        await app.create_session(f"s{n}", "ann")
        await app.schedule(f"s{n}", "once", start["at"], "now")
    await daemon.hears("recall.settled", times=12)
    [late] = await rows(
        db,
        "select max(extract(epoch from called_at - scheduled_for))::float8 as most from "
        "recall_attempts",
    )
    assert 0 <= late["most"] < 10


@pytest.fixture
def faketime() -> str:
    if FAKETIME is None:
        pytest.skip("faketime is not installed")
    return FAKETIME


@pytest.mark.slow
@pytest.mark.parametrize("hours", ["+7h", pytest.param("-7h", marks=pytest.mark.full), "jumps"])
async def test_a_wrong_clock_of_the_host(
    hours: str,
    faketime: str,
    tmp_path: Path,
    app: Application,
    database: str,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """A host whose clock is hours off, or is set in mid-work, calls at the same instants; its log
    alone is wrong."""
    offset = tmp_path / "offset"
    offset.write_text("+7h\n" if hours == "jumps" else f"{hours}\n")
    asked = await asked_at(database, endpoint)
    daemons.environ |= {
        "LD_PRELOAD": faketime,
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    daemon = await daemons.start(poll_interval=30, lease=3)
    told = datetime.fromisoformat(daemon.events[0]["timestamp"])
    assert abs(told - datetime.now(UTC)) > timedelta(hours=6), "the clock is wrong indeed"
    due = await schedule_in_steps(app, db, 5)
    if hours == "jumps":
        await daemon.hears("recall.settled", times=2)
        offset.write_text("-7h\n")
    await daemon.hears("recall.settled", times=5)
    late = {session: (asked[session] - at).total_seconds() for session, at in due.items()}
    assert all(0 <= seconds < 5 for seconds in late.values()), late
    told_late = [float(r.headers["recall-lateness"]) for r in endpoint.requests]
    assert all(0 <= seconds < 5 for seconds in told_late), told_late
    assert len(endpoint.requests) == 5
    assert await daemon.stop() == 0


@pytest.mark.slow
async def test_those_who_come_first_may_be_gone(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """In a fleet not all look at once. Whoever is left does, also where all that come before it
    stand still: at notifies, and at due instants."""
    fleet = [await daemons.start(poll_interval=30) for _ in range(5)]
    await eventually(db, "select 1 from recall_workers having count(*) = 5")
    last = max(fleet, key=lambda daemon: daemon.name)
    for daemon in fleet:
        if daemon is not last:
            daemon.signal(signal.SIGSTOP)
    for session in ("notified", "timed"):
        await app.create_session(session, "ann")
    await app.schedule("timed", "once", datetime.now(UTC) + timedelta(seconds=2), "now")
    await app.schedule("notified", "immediate", datetime.now(UTC), "now")
    await last.hears("recall.settled", times=2)
    assert max(event["lag_ms"] for event in last.told("recall.settled")) < 5000, (
        "and not at the next look by poll"
    )


@pytest.mark.slow
async def test_what_is_over_costs_no_look(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """One claim for each that notifies; none after its end, where nothing can have waited for it.
    What waits behind a run is claimed when that ends."""

    async def run(_: Request) -> Raw:
        await asyncio.sleep(0.1)
        return reply()

    endpoint.default = run
    daemon = await daemons.start(poll_interval=30)
    await daemon.hears("listener.listening")
    await db.execute("select pg_sleep(0.5)")
    await app.create_session("s", "ann")
    for n in range(1, 4):
        before = len(daemon.told("claim.answered"))
        await app.schedule("s", "immediate", datetime.now(UTC), "now")
        await daemon.hears("recall.settled", times=n)
        await db.execute("select pg_sleep(0.2)")
        assert [told["recalls"] for told in daemon.told("claim.answered")[before:]] == [1]
    gate = Gate()
    endpoint.script("s", gate)
    await app.schedule("s", "immediate", datetime.now(UTC), "first")
    await gate.entered.wait()
    await app.schedule("s", "once", datetime.now(UTC), "behind it")
    gate.open()
    await daemon.hears("recall.settled", times=5)
    [lag] = [told["lag_ms"] for told in daemon.told("recall.settled")[-1:]]
    assert lag < 5000 and [told["recalls"] for told in daemon.told("claim.answered")].count(1) == 5


@contextmanager
def answering_at_once() -> Iterator[str]:
    """An endpoint that takes a fraction of a millisecond to answer, as a thread of its own does:
    its URL."""
    length = re.compile(rb"(?i)\r\ncontent-length: (\d+)\r\n")

    def answer(conn: socket.socket) -> None:
        with conn:
            while data := conn.recv(1 << 16):
                while (found := length.search(data)) is None or len(
                    data.partition(b"\r\n\r\n")[2]
                ) < int(found[1]):
                    data += conn.recv(1 << 16)
                conn.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):  # It is closed when the test is over.
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/{{session_id}}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
async def test_what_is_over_at_once_costs_no_look(
    app: Application, db: Connection, daemons: Daemons
) -> None:
    """Nor where a run has ended before it was asked what is next, or meanwhile; and of one
    session's recalls each is claimed when the one before it has ended."""
    with answering_at_once() as url:
        daemon = await daemons.start(run_url=url, poll_interval=30)
        await db.execute("select pg_sleep(0.5)")
        await app.create_session("s", "ann")
        for n in range(1, 11):
            before = len(daemon.told("claim.answered"))
            await app.schedule("s", "immediate", datetime.now(UTC), "now")
            await daemon.hears("recall.settled", times=n)
            await db.execute("select pg_sleep(0.1)")
            assert [told["recalls"] for told in daemon.told("claim.answered")[before:]] == [1]
        await db.execute(
            "insert into session_recalls (id, session_id, call_type, trigger_at, "
            "additional_context_message, status, created_at, updated_at)"
            " select 'r' || n, 's', 'once', now() - n * interval '1 second', 'now', 'running', "
            "now(), now() from generate_series(1, 20) n"
        )
        await db.execute("select pg_notify('session_recalls', '')")
        settled = await daemon.hears("recall.settled", times=30)
        took = datetime.fromisoformat(settled[-1]["timestamp"]) - datetime.fromisoformat(
            settled[10]["timestamp"]
        )
        assert took < timedelta(seconds=4), (
            "each at the end of the one before it, and not some time later"
        )

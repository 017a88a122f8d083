"""One large or slow row must not take other sessions' recalls with it, nor the worker's memory."""

from __future__ import annotations

import asyncio
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import pytest

from recall_worker.settings import SettingsError, read

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint, Gate
from .test_corridor import row, soon
from .test_lease import calls, eventually, promise, rows

pytestmark = pytest.mark.full

KIB, MIB = 1024, 1024 * 1024
FIRED = "select 1 from session_recalls having count(*) filter (where status = 'fired') = %s"
EMOJI = "\N{GRINNING FACE}"
"""Four octets in UTF-8, and four in each character of the text that holds it in Python."""


class Sink:
    """An API that counts calls by session and keeps nothing of their bodies."""

    def __init__(self) -> None:
        self.called: Counter[str] = Counter()
        self.octets: Counter[str] = Counter()
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/sessions/{{session_id}}/run"

    async def until_called(self, *sessions: str, within: float = 60.0) -> None:
        async with asyncio.timeout(within), self._changed:
            await self._changed.wait_for(lambda: self.called.keys() >= {*sessions})

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                found = re.search(r"content-length: *(\d+)", head, re.IGNORECASE)
                length = left = int(found[1]) if found else 0
                while left:
                    left -= len(await reader.read(min(left, MIB)) or b"?" * left)
                async with self._changed:
                    session = head.split(" ")[1].split("/")[2]
                    self.called[session] += 1
                    self.octets[session] = length
                    self._changed.notify_all()
                head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2"
                writer.write(head.encode() + b"\r\n\r\n{}")
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    async with Sink() as started:
        yield started


@pytest.fixture
async def workers(database: str, sink: Sink) -> AsyncIterator[Daemons]:
    """Starts daemons that call the sink."""
    async with Daemons({"RECALL_DSN": database, "RECALL_RUN_URL": sink.url}) as started:
        yield started


async def put(
    db: Connection,
    session: str,
    octets: int,
    text: str = "a",
    column: str = "message",
    **more: Any,
) -> str:
    """A recall, due now, with so many octets of this text in a column; its id. PostgreSQL makes the
    text itself, so that this process does not hold it."""
    row = {"call_type": "once", "interval_seconds": None} | more
    row |= {"additional_context_message": "work"} if column != "message" else {}
    name = "additional_context_message" if column == "message" else column
    await db.execute("insert into sessions values (%s, 'ann') on conflict do nothing", [session])
    await db.execute(
        f"""
        insert into session_recalls
            (id, session_id, trigger_at, created_at, updated_at, {name}, {", ".join(row)})
        values (%s, %s, now(), now(), now(), repeat(%s, %s), {", ".join(["%s"] * len(row))})
        """.encode(),
        [f"r-{session}", session, text, octets // len(text.encode()), *row.values()],
    )
    return f"r-{session}"


def peak(daemon: Daemon) -> float:
    """The most memory that the daemon has had so far, in MB."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) * KIB / 1e6


async def fails(daemon: Daemon, db: Connection, session: str, within: float = 20.0) -> str:
    """Wait until its recall has failed without a call; the reason."""
    failed = "select reason from session_recalls where session_id = %s and status = 'failed'"
    reason = str((await eventually(db, failed, [session], within=within))["reason"])
    assert (
        await rows(
            db,
            "select 1 from recall_attempts where session_id = %s and called_at is not null",
            [session],
        )
        == []
    )
    return reason


# --- RECALL_MESSAGE_LIMIT ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "octets"),
    [
        (None, 4 * MIB),
        ("4MiB", 4 * MIB),
        ("512KiB", 512 * KIB),
        ("65536", 65536),
        ("16MiB", 16 * MIB),
    ],
)
def test_the_limit_is_read(said: str | None, octets: int) -> None:
    """In MiB, KiB or plain octets; 4 MiB where it is not set."""
    settings = read({} if said is None else {"RECALL_MESSAGE_LIMIT": said})
    assert getattr(settings, "message_limit", None) == octets


@pytest.mark.parametrize("said", ["lots", "4MB!", "-1", "0", "1.5.2KiB", "nan", "inf"])
def test_a_limit_that_is_none(said: str) -> None:
    """Refused at the start, by its name."""
    with pytest.raises(SettingsError, match="RECALL_MESSAGE_LIMIT"):
        read({"RECALL_MESSAGE_LIMIT": said})


SIZE = {"128 KiB": r"131[ ,_.]?072|128(\.0)? ?KiB", "64 KiB": r"65[ ,_.]?536|64(\.0)? ?KiB"}


@pytest.mark.parametrize("limit", ["64KiB", "65536"])
async def test_a_message_beyond_the_limit(
    limit: str,
    app: Application,
    db: Connection,
    sink: Sink,
    workers: Daemons,
) -> None:
    """It fails with its size and the limit, unsent; what is due beside it is called once."""
    daemon = await workers.start(ready=False, message_limit=limit, concurrency=10)
    async with db.transaction():
        for n in range(3):
            await put(db, f"before{n}", 10)
        await put(db, "large", 128 * KIB)
        await put(db, "wide", 66_000, EMOJI)
        await put(db, "at-the-limit", 64 * KIB)
        await put(db, "one-more", 64 * KIB + 1)
        for n in range(3):
            await put(db, f"after{n}", 10)
    good = {*(f"{w}{n}" for w in ("before", "after") for n in range(3)), "at-the-limit"}
    await sink.until_called(*good, within=20)
    reason = await fails(daemon, db, "large")
    assert re.search(SIZE["128 KiB"], reason) and re.search(SIZE["64 KiB"], reason)
    await fails(daemon, db, "wide")  # 16,500 characters: octets count.
    await fails(daemon, db, "one-more")
    assert sink.called == dict.fromkeys(good, 1)
    await eventually(db, FIRED, [7])


async def test_a_recurring_message_beyond_the_limit(
    db: Connection,
    sink: Sink,
    workers: Daemons,
) -> None:
    """It fails at once, and is not tried again at each of its occurrences."""
    await put(db, "large", 5 * MIB, call_type="recurring", interval_seconds=1)
    daemon = await workers.start()
    await fails(daemon, db, "large")
    assert sink.called == {}
    assert daemon.told("worker.error") == daemon.told("database.lost") == []


# --- memory --------------------------------------------------------------------------------------


async def idle(
    db: Connection,
    sink: Sink,
    workers: Daemons,
    **settings: Any,
) -> tuple[Daemon, float]:
    """A worker that has called once, and the most memory that it needed for it, in MB."""
    daemon = await workers.start(**settings)
    await put(db, "first", 10)
    await sink.until_called("first")
    return daemon, peak(daemon)


@pytest.mark.parametrize("text", ["a", EMOJI], ids=["plain", "emoji"])
async def test_a_message_of_50_mb_is_never_loaded(
    text: str,
    db: Connection,
    sink: Sink,
    workers: Daemons,
) -> None:
    """The worker's peak stays near an idle one's, and other sessions are called once."""
    daemon, before = await idle(db, sink, workers)
    await put(db, "large", 50_000_000, text)
    for n in range(3):
        await put(db, f"ok{n}", 10)
    await sink.until_called("ok0", "ok1", "ok2")
    await fails(daemon, db, "large")
    print(f"peak: {before:.0f} MB idle, {peak(daemon):.0f} MB with it")
    assert peak(daemon) - before < 60
    assert sink.called == dict.fromkeys(["first", "ok0", "ok1", "ok2"], 1)


@pytest.mark.parametrize(
    "column",
    ["cron", "time_zone", "last_outcome", "reason", "internal_comment"],
)
async def test_no_other_text_of_a_row_is_loaded(
    column: str,
    db: Connection,
    sink: Sink,
    workers: Daemons,
) -> None:
    """Tens of MB where an application or a hand has written them: its neighbours are called."""
    daemon, before = await idle(db, sink, workers)
    more: dict[str, Any] = {}
    if column in ("cron", "time_zone"):
        more = {"call_type": "recurring", "interval_seconds": 3600, "cadence": "cron"}
        more |= {"cron": "* * * * *"} if column != "cron" else {"time_zone": "UTC"}
    await put(db, "large", 40_000_000, "*", column, **more)
    for n in range(3):
        await put(db, f"ok{n}", 10)
    await sink.until_called("ok0", "ok1", "ok2")
    if column in ("cron", "time_zone"):
        reason = await fails(daemon, db, "large")
        assert len(reason) < 1000
    else:
        await sink.until_called("large")
    print(f"{column}: {before:.0f} MB idle, {peak(daemon):.0f} MB with it")
    assert peak(daemon) - before < 60
    assert {session: n for session, n in sink.called.items() if n > 1} == {}
    assert daemon.told("database.lost") == daemon.told("worker.error") == []


async def test_fifty_messages_just_below_the_limit(
    db: Connection,
    sink: Sink,
    workers: Daemons,
) -> None:
    """RECALL_CONCURRENCY=50: all are called, and the peak does not grow with what is due."""
    sessions = [f"s{n}" for n in range(50)]
    async with db.transaction():
        for session in sessions:
            await put(db, session, 4 * MIB - 64, EMOJI)
    daemon = await workers.start(concurrency=50, lease=120)
    await sink.until_called(*sessions, within=90)
    await eventually(db, FIRED, [50], within=30)
    print(f"50 messages of 4 MiB: {peak(daemon):.0f} MB")
    assert peak(daemon) < 250
    assert sink.called == dict.fromkeys(sessions, 1)
    # The whole message was sent, in both of its fields.
    assert min(sink.octets.values()) > 2 * (4 * MIB - 64)


# --- timeouts ------------------------------------------------------------------------------------


async def test_a_short_lease_and_a_row_of_100_mb(
    db: Connection,
    sink: Sink,
    workers: Daemons,
) -> None:
    """RECALL_LEASE=6: it fails within seconds, and PostgreSQL is not taken for lost."""
    daemon, _ = await idle(db, sink, workers, lease=6)
    await put(db, "large", 100_000_000, EMOJI)
    for n in range(3):
        await put(db, f"ok{n}", 10)
    await sink.until_called("ok0", "ok1", "ok2", within=15)
    await fails(daemon, db, "large", within=15)
    assert daemon.told("database.lost") == []
    assert sink.called == dict.fromkeys(["first", "ok0", "ok1", "ok2"], 1)


SLOW = """
create function slow() returns trigger language plpgsql as $$
begin
    if new.id = 'r-slow' then
        perform pg_sleep(60);
    end if;
    return new;
end
$$;
create trigger slow before update on session_recalls for each row execute function slow();
"""


@pytest.mark.parametrize("lease", [4, pytest.param(12, marks=pytest.mark.full)])
async def test_a_row_that_cannot_be_written_in_time(
    lease: int,
    db: Connection,
    sink: Sink,
    workers: Daemons,
) -> None:
    """An application's trigger sleeps for one row: it is put aside, and the others are called."""
    await db.execute(SLOW.encode())
    async with db.transaction():
        await put(db, "slow", 10)
        for n in range(5):
            await put(db, f"ok{n}", 10)
    daemon = await workers.start(lease=lease, concurrency=10)
    await sink.until_called(*(f"ok{n}" for n in range(5)), within=10 + 3 * lease)
    await daemon.hears("recall.stranded", recall="r-slow", within=10 + 3 * lease)
    await put(db, "late", 10)
    await sink.until_called("late", within=10 + lease)
    await asyncio.sleep(lease)  # In which it could be claimed, and time out, again and again.
    assert len(daemon.told("database.lost")) <= 1
    assert len(daemon.told("recall.stranded", recall="r-slow")) == 1
    left = await row(db, "slow")
    assert (left["status"], left["attempt"]) == ("pending", 0)
    good = {f"ok{n}" for n in range(5)} | {"late"}
    assert sink.called == dict.fromkeys(good, 1)
    assert await daemon.stop() == 0


async def test_a_row_that_cannot_be_settled_in_time(
    db: Connection, sink: Sink, workers: Daemons
) -> None:
    """The trigger sleeps only where the row ends: what ended with it is settled, and so is what
    comes later."""
    await db.execute(SLOW.replace("'r-slow'", "'r-slow' and new.status = 'fired'").encode())
    async with db.transaction():
        await put(db, "slow", 10)
        for n in range(5):
            await put(db, f"ok{n}", 10)
    daemon = await workers.start(lease=4, concurrency=10)
    for n in range(5):
        await daemon.hears("recall.settled", session=f"ok{n}", status="fired", within=15)
    await put(db, "late", 10)
    await daemon.hears("recall.settled", session="late", status="fired", within=4)
    assert len(daemon.told("database.lost")) <= 1
    await db.execute("drop trigger slow on session_recalls")
    await daemon.hears("recall.settled", session="slow", status="fired", within=10)
    assert sink.called == {"slow": 1, "late": 1} | {f"ok{n}": 1 for n in range(5)}
    assert await daemon.stop() == 0


# --- what was never sent -------------------------------------------------------------------------


class Deaf:
    """A port that takes no connection in time, as its queue is full."""

    def __init__(self) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen(0)
        self._fill = [socket.socket() for _ in range(4)]
        for one in self._fill:
            one.setblocking(False)
            one.connect_ex(self.socket.getsockname())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}/sessions/{{session_id}}/run"

    def close(self) -> None:
        for one in self._fill:
            one.close()


async def killed_before_anything_was_sent(
    daemons: Daemons,
    sessions: int,
    url: str,
    times: int,
) -> None:
    """So many workers claim, one after the other, and are killed while they connect."""
    for n in range(times):
        daemon = await daemons.start(lease=1, concurrency=10, run_url=url)
        if n == 0:
            await daemon.hears("recall.claimed", times=sessions)
        else:
            await daemon.hears("lease.taken")
        await daemon.kill()


def taken_together(daemon: Daemon) -> int:
    """How many recalls of dead workers one claim of this daemon took up, at most."""
    most = taken = 0
    for event in daemon.events:
        name = event["event"]
        taken = 0 if name == "claim.answered" else taken + (name == "lease.taken")
        most = max(most, taken)
    return most


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_workers_that_died_before_they_called(
    times: int, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Killed with rows in hand, nothing sent: no recall is buried, and each is called once."""
    deaf = Deaf()
    for n in range(3):
        await promise(app, f"s{n}", "once")
    await killed_before_anything_was_sent(daemons, 3, deaf.url, times)
    await endpoint.stop()
    deaf.close()
    await endpoint.start(on=deaf.socket)
    last = await daemons.start(lease=1, concurrency=10, run_url=deaf.url)
    over = "select 1 from session_recalls having bool_and(status in ('fired', 'failed'))"
    await eventually(db, over, within=30)
    statuses = [r["status"] for r in await rows(db, "select status from session_recalls")]
    assert statuses == ["fired"] * 3, "what was never called is not buried"
    assert [len(endpoint.of(f"s{n}")) for n in range(3)] == [1, 1, 1]
    marks = await rows(db, "select called_at from recall_attempts where outcome <> 'answered'")
    assert all(mark["called_at"] is None for mark in marks), "nobody knows of a call"
    assert taken_together(last) == 1, "one that killed its worker must not kill the others"


async def test_a_row_that_kills_its_worker_takes_no_other_with_it(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Three workers die with a row in hand that was called; its neighbours are called once."""
    deadly = Gate()
    endpoint.script("deadly", deadly)
    recall = await promise(app, "deadly", "once")
    for n in range(3):
        daemon = await daemons.start(lease=1, concurrency=10)
        await endpoint.count(n + 1, "deadly")
        await daemon.kill()
    for n in range(3):
        await app.create_session(f"s{n}", "ann")
        await app.schedule(f"s{n}", "once", soon(0), "work")
    last = await daemons.start(lease=1, concurrency=10)
    await last.hears("recall.settled", recall=recall, status="failed", within=30)
    await endpoint.count(6)
    assert len(endpoint.of("deadly")) == 3, "RECALL_MAX_ATTEMPTS bounds what may have run"
    await eventually(db, FIRED, [3])
    assert len(await calls(db, recall)) >= 3

"""The outcome table, row by row: what the real daemon makes of each answer that a raw socket gives
it, with requests counted.

One daemon, one database and one endpoint serve the whole table; each case has a session of its own.
What a settle wrote is noted by a trigger in the test's database, with the distance to the next due
time by the database's own clock, so that nothing has to be caught before the daemon moves on. Where
minutes would have to pass, the row is made due at once as nobody's move: `trigger_at` and
`planned_at` together.

A session in trouble is followed by a calm one, as two in a row would open the breaker.
"""

from __future__ import annotations

import re
import socket
import struct
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio

from ..conftest import Connection, connected
from ..support import postgres
from ..support.application import Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Answer, Endpoint, Gate, Raw, Request, reply
from .test_corridor import soon

COMMENT = "for operators' eyes only: rosebud"
INTERVAL = 3600
CALL_TYPES = ("once", "immediate", "recurring")

NOTE_SETTLES = """
create table settles (
    n bigint generated always as identity, id text, session_id text, status text,
        occurrence integer, rekey integer, attempt integer,
    deferrals integer, last_outcome text, reason text, wait float8, ended boolean
);
create function note_settle() returns trigger language plpgsql as $$
begin
    insert into settles (id, session_id, status, occurrence, rekey, attempt, deferrals,
        last_outcome, reason, wait, ended)
    values (new.id, new.session_id, new.status, new.occurrence, new.rekey, new.attempt,
        new.deferrals, new.last_outcome, new.reason,
        extract(epoch from new.trigger_at - now()), new.ended_at is not null);
    return null;
end
$$;
create trigger note_settle after update on session_recalls for each row
    when (old.lease is not null and new.lease is null) execute function note_settle();
"""

HASTEN = """
update session_recalls set trigger_at = now(), planned_at = now()
where session_id = %s and lease is null and status in ('pending', 'running') and trigger_at > now()
"""

MARKS = """
select occurrence, rekey, attempt, outcome, calls, http_status, called_at is not null as sent
from recall_attempts where session_id = %s order by occurrence, attempt, rekey, ended_at
"""


class Api(Endpoint):
    """The scripted endpoint, whose `reset` is a real RST."""

    async def _answer(self, request: Request, reader: StreamReader, writer: StreamWriter) -> bool:
        script = self.scripts.get(request.session)
        if script and isinstance(script[0], Raw) and script[0].reset:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return await super()._answer(request, reader, writer)


@dataclass(frozen=True)
class Settle:
    """What one settle wrote."""

    status: str
    occurrence: int
    rekey: int
    attempt: int
    deferrals: int
    last_outcome: str | None
    reason: str | None
    wait: float
    """Seconds from the settle to the next due time."""
    ended: bool


@dataclass(frozen=True)
class Mark:
    """What is kept of a call."""

    occurrence: int
    rekey: int
    attempt: int
    outcome: str
    calls: int
    http_status: int | None
    sent: bool


@dataclass
class Table:
    """The application, the database, the endpoint and the daemon that the cases share."""

    app: Application
    db: Connection
    api: Endpoint
    daemon: Daemon

    async def schedule(self, session: str, call_type: str, id: str | None = None) -> str:
        """A recall that is due now; returns its id."""
        await self.app.create_session(session, "ann")
        interval = INTERVAL if call_type == "recurring" else None
        return await self.app.schedule(
            session, call_type, soon(0), "look again", interval, COMMENT, id
        )

    async def settles(self, session: str, n: int) -> list[Settle]:
        """Wait for the session's nth settle; returns all so far."""
        await self.daemon.hears("recall.settled", times=n, session=session)
        columns = ", ".join(Settle.__annotations__)
        found = await self.db.execute(
            f"select {columns} from settles where session_id = %s order by n".encode(), (session,)
        )
        return [Settle(**row) for row in await found.fetchall()]

    async def hasten(self, session: str) -> None:
        """Have the session's recall due now, as if the time had passed."""
        await self.db.execute(HASTEN.encode(), (session,))

    async def marks(self, session: str) -> list[Mark]:
        return [
            Mark(**row)
            for row in await (await self.db.execute(MARKS.encode(), (session,))).fetchall()
        ]

    async def plays(self, session: str, call_type: str, *answers: Answer) -> list[Settle]:
        """A recall from its first call until so many answers were given; each settle."""
        self.api.script(session, *answers)
        await self.schedule(session, call_type)
        for n in range(1, len(answers)):
            await self.settles(session, n)
            await self.hasten(session)
        return await self.settles(session, len(answers))

    async def calm(self) -> None:
        """An answered call, so that trouble before and trouble behind are not in a row."""
        answered = len(self.daemon.told("recall.settled", session="calm"))
        await self.schedule("calm", "immediate")
        await self.daemon.hears("recall.settled", times=answered + 1, session="calm")

    async def tidy(self) -> None:
        """Nothing of this case reaches the next; and what holds for every request that was made."""
        await self.db.execute(b"delete from sessions")
        await self.calm()
        await self.db.execute(b"truncate sessions, session_recalls, recall_attempts, settles")
        # The daemon tells in order: with the calm call's settle all of this case has been heard.
        del self.daemon.events[1:]
        for request in self.api.requests:
            assert "rosebud" not in request.line + str(request.headers) + request.body.decode()
        self.api.requests.clear()
        self.api.scripts.clear()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(server: str, template: str) -> AsyncIterator[Table]:
    """What the cases share."""
    async with AsyncExitStack() as stack:
        dsn = stack.enter_context(postgres.database(server, template))
        db = await stack.enter_async_context(connected(dsn))
        await db.execute(NOTE_SETTLES.encode())
        app = await stack.enter_async_context(await Application.connect(dsn))
        api = await stack.enter_async_context(Api())
        daemons = await stack.enter_async_context(
            Daemons({"RECALL_DSN": dsn, "RECALL_RUN_URL": api.url})
        )
        yield Table(app, db, api, await daemons.start())


@pytest_asyncio.fixture(loop_scope="module")
async def table(shared: Table) -> AsyncIterator[Table]:
    """The shared table, tidied up after each case."""
    yield shared
    await shared.tidy()


a_case = pytest.mark.asyncio(loop_scope="module")


def counted_under_one_key(requests: Sequence[Request], id: str, occurrence: int = 1) -> None:
    """All these requests have the occurrence's first key, and the same body byte for byte."""
    assert [request.key for request in requests] == [f"{id}:{occurrence}"] * len(requests)
    assert len({request.body for request in requests}) == 1


async def id_of(table: Table, session: str) -> str:
    """The recall's id as the API was told it."""
    return str(table.api.of(session)[0].document["recall"]["id"])


# --- Answered -------------------------------------------------------------------------------------


def large(size: int) -> bytes:
    """A JSON object of so many bytes."""
    return b'{"text": "' + b"x" * (size - 12) + b'"}'


ANSWERED: dict[str, Raw] = {
    "200 {}": reply(),
    "200 with an answer": reply(body={"answer": "all is well", "status": "completed"}),
    "201 {}": reply(201),
    "204 empty": Raw(b"HTTP/1.1 204 No Content\r\n\r\n", keep=True),
    "202 empty": reply(202, text=b""),
    "202 with a final word": reply(202, {"run_id": "r1", "status": "done"}),
    "200 with an id and a final word": reply(body={"run_id": "r1", "status": "ok"}),
    "201 with an address, and nothing that goes on": reply(
        201, {"id": "m1"}, {"location": "/sessions/s/runs/r1"}
    ),
    "200 with a word that is not ours": reply(body={"run_id": "r1", "status": "frobnicated"}),
    "200 plain text": reply(text=b"OK", headers={"content-type": "text/plain"}),
    "200 text as Flask sends it": reply(text=b"done", headers={"content-type": "text/html"}),
    "200 event stream": reply(
        text=b'event: token\ndata: {"t": 1}\n\nevent: done\ndata: [DONE]\n\n',
        headers={"content-type": "text/event-stream"},
    ),
    "200 NDJSON": reply(
        text=b'{"type": "token"}\n{"type": "end"}\n',
        headers={"content-type": "application/x-ndjson"},
    ),
    "200 event stream in pieces": Raw(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        b"a\r\ndata: one\n\r\n1\r\n\n\r\n0\r\n\r\n",
        keep=True,
    ),
    "200 event stream of 3 MiB": reply(
        text=b"data: " + b"x" * (3 << 20) + b"\n\ndata: [DONE]\n\n",
        headers={"content-type": "text/event-stream"},
    ),
    "200 empty": reply(text=b""),
    "200 empty page": reply(text=b"", headers={"content-type": "text/html"}),
    "200 of 1 MiB": reply(text=large(1 << 20)),
    "200 of more than 1 MiB": reply(text=large((1 << 20) + 1)),
    "200 of 5 MiB whose status is failed at its end": reply(
        text=large(5 << 20)[:-1] + b', "status": "failed"}'
    ),
}


@a_case
@pytest.mark.parametrize("call_type", CALL_TYPES)
@pytest.mark.parametrize("answer", ANSWERED.values(), ids=list(ANSWERED))
async def test_answered(table: Table, answer: Raw, call_type: str) -> None:
    """The run went well: a one-shot has fired, a recurring recall waits for its next occurrence an
    interval on; one request."""
    [settle] = await table.plays("s", call_type, answer)
    assert (settle.last_outcome, settle.reason) == ("answered", None)
    if call_type == "recurring":
        assert (settle.status, settle.occurrence, settle.attempt, settle.ended) == (
            "pending",
            2,
            0,
            False,
        )
        assert INTERVAL - 10 < settle.wait <= INTERVAL
    else:
        assert (settle.status, settle.occurrence, settle.attempt, settle.ended) == (
            "fired",
            1,
            1,
            True,
        )
    [request] = table.api.of("s")
    assert request.key == f"{await id_of(table, 's')}:1"
    assert request.headers["recall-attempt"] == "1"
    [mark] = await table.marks("s")
    assert (mark.occurrence, mark.attempt, mark.outcome, mark.calls, mark.sent) == (
        1,
        1,
        "answered",
        1,
        True,
    )
    [event] = table.daemon.told("recall.settled", session="s", recall=await id_of(table, "s"))
    assert (event["outcome"], event["verdict"]) == (
        "answered",
        "next" if call_type == "recurring" else "finish",
    )


# --- Busy, Unavailable, Misconfigured: deferred ---------------------------------------------------


WEB_PAGE = reply(
    text=b"<!doctype html><title>Welcome to nginx</title>", headers={"content-type": "text/html"}
)
BARE_404 = reply(404, {"detail": "Not Found"})
SHORT, MINUTE = (5.0, 20.0), (60.0, 60.0)
"""The longest wait after the first call and after the second: backoff, and RECALL_BUSY_DELAY."""


@dataclass(frozen=True)
class Deferral:
    """One row of the table that costs no attempt."""

    answer: Raw
    outcome: str
    says: str
    """What the reason holds."""
    most: tuple[float, float] = SHORT


DEFERRED: dict[str, Deferral] = {
    "409": Deferral(reply(409), "busy", "the session is busy (HTTP 409)", MINUTE),
    "423": Deferral(reply(423), "busy", "the session is busy (HTTP 423)", MINUTE),
    **{str(s): Deferral(reply(s), "unavailable", f"HTTP {s}") for s in (408, 425, 429, 503)},
    **{
        str(s): Deferral(reply(s), "misconfigured", f"HTTP {s}")
        for s in (401, 402, 403, 405, 406, 407, 421, 426)
    },
    "400 of a port that speaks TLS": Deferral(
        reply(
            400,
            text=b"<html><title>400 The plain HTTP request was sent to HTTPS port</title></html>",
            headers={"content-type": "text/html"},
        ),
        "misconfigured",
        "https in RECALL_RUN_URL",
    ),
    "401 that names the session": Deferral(
        reply(401, {"code": "session_not_found"}), "misconfigured", "RECALL_RUN_TOKEN"
    ),
    "404": Deferral(BARE_404, "misconfigured", "RECALL_RUN_URL"),
    "404 empty": Deferral(reply(404, text=b""), "misconfigured", "RECALL_RUN_URL"),
    "404 that says it in words": Deferral(
        reply(404, {"detail": "session_not_found"}), "misconfigured", "RECALL_RUN_URL"
    ),
    "404 as FastAPI says it": Deferral(
        reply(404, {"detail": "Session not found"}), "misconfigured", "Session not found"
    ),
    "410": Deferral(reply(410), "misconfigured", "session_not_found"),
    "200 web page": Deferral(WEB_PAGE, "misconfigured", "text/html"),
    "200 web page of 2 MiB": Deferral(
        reply(text=b"<html>" + b" " * (2 << 20), headers={"content-type": "text/html"}),
        "misconfigured",
        "no JSON",
    ),
    "304": Deferral(reply(304, text=b""), "misconfigured", "HTTP 304"),
}


@a_case
@pytest.mark.parametrize("call_type", CALL_TYPES)
@pytest.mark.parametrize("row", DEFERRED.values(), ids=list(DEFERRED))
async def test_deferred(table: Table, row: Deferral, call_type: str) -> None:
    """The occurrence waits, its attempt given back, and is called again under the same key;
    deferrals fold into one mark."""
    first, second, last = await table.plays("s", call_type, row.answer, row.answer, reply())
    for n, settle in enumerate((first, second)):
        assert (settle.status, settle.occurrence, settle.rekey, settle.attempt, settle.ended) == (
            "pending",
            1,
            0,
            0,
            False,
        )
        assert (settle.last_outcome, settle.deferrals) == (row.outcome, n + 1)
        assert settle.reason is not None and row.says in settle.reason
        assert (40 if row.most == MINUTE else -20) < settle.wait <= row.most[n]
    assert (last.status, last.last_outcome) == (
        "pending" if call_type == "recurring" else "fired",
        "answered",
    )
    assert last.occurrence == (2 if call_type == "recurring" else 1)
    requests = table.api.of("s")
    assert len(requests) == 3
    counted_under_one_key(requests, await id_of(table, "s"))
    assert [request.headers["recall-attempt"] for request in requests] == ["1", "1", "1"]
    status = int(row.answer.data.split()[1])
    assert await table.marks("s") == [
        Mark(1, 0, 1, row.outcome, 2, status, True),
        Mark(1, 0, 1, "answered", 1, 200, True),
    ]
    loud = table.daemon.told("endpoint.misconfigured", http_status=status)
    assert bool(loud) is (row.outcome == "misconfigured") and all(
        event["level"] == "error" for event in loud
    )


@a_case
@pytest.mark.parametrize("call_type", CALL_TYPES)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects(table: Table, status: int, call_type: str) -> None:
    """A redirect is not followed, as the token would go with it: the target sees no connection, and
    the reason names it."""
    async with Endpoint() as target:
        moved = reply(status, headers={"location": target.url})
        deferred, _ = await table.plays("s", call_type, moved, reply())
        assert (target.connections, target.requests) == (0, [])
        assert (deferred.status, deferred.attempt, deferred.last_outcome) == (
            "pending",
            0,
            "misconfigured",
        )
        assert deferred.reason is not None and target.url in deferred.reason
    requests = table.api.of("s")
    assert len(requests) == 2
    counted_under_one_key(requests, await id_of(table, "s"))


@a_case
@pytest.mark.parametrize("call_type", CALL_TYPES)
async def test_no_connection(table: Table, call_type: str) -> None:
    """Nobody listens: nothing was sent, no attempt spent; the calls leave their mark, and the same
    key is called later."""
    await table.api.stop()
    id = await table.schedule("s", call_type)
    first = (await table.settles("s", 1))[0]
    await table.hasten("s")
    second = (await table.settles("s", 2))[1]
    assert table.api.of("s") == []
    await table.api.start()
    await table.hasten("s")
    last = (await table.settles("s", 3))[2]
    for n, settle in enumerate((first, second)):
        assert (settle.status, settle.occurrence, settle.attempt, settle.deferrals) == (
            "pending",
            1,
            0,
            n + 1,
        )
        assert (settle.last_outcome, -20 < settle.wait <= SHORT[n]) == ("unavailable", True)
        assert settle.reason is not None and "no connection" in settle.reason
    assert last.last_outcome == "answered"
    assert len(table.api.of("s")) == 1
    counted_under_one_key(table.api.of("s"), id)
    assert await table.marks("s") == [
        Mark(1, 0, 1, "unavailable", 2, None, False),
        Mark(1, 0, 1, "answered", 1, 200, True),
    ]


RETRY_AFTER = {
    "seconds": ({"retry-after": "1800"}, 1800.0),
    "seconds and a part": ({"retry-after": "120.5"}, 120.5),
    "a Unix time": (
        {"retry-after": "1000000900", "date": formatdate(1_000_000_000, usegmt=True)},
        900.0,
    ),
    "a date": (
        {
            "retry-after": formatdate(1_000_000_900, usegmt=True),
            "date": formatdate(1_000_000_000, usegmt=True),
        },
        900.0,
    ),
    "more than a day": ({"retry-after": "9999999"}, 86_400.0),
    "a date in years": (
        {
            "retry-after": formatdate(2_000_000_000, usegmt=True),
            "date": formatdate(1e9, usegmt=True),
        },
        86_400.0,
    ),
}


@a_case
@pytest.mark.parametrize("call_type", ["once", "recurring"])
@pytest.mark.parametrize("status", [409, 429, 503])
@pytest.mark.parametrize(("headers", "wait"), RETRY_AFTER.values(), ids=list(RETRY_AFTER))
async def test_retry_after(
    table: Table, headers: dict[str, str], wait: float, status: int, call_type: str
) -> None:
    """The API says when to come back, in seconds or as a date by its own clock: that is when, at
    most a day on."""
    [settle] = await table.plays("s", call_type, reply(status, headers=headers))
    assert (settle.status, settle.attempt) == ("pending", 0)
    assert wait - 20 < settle.wait <= wait


@a_case
@pytest.mark.parametrize(
    "value", ["soon", "-5", "1,5", "Fri, 31 Dec 99999999999999999999 23:59:59 GMT"]
)
async def test_a_retry_after_that_can_not_be_read(table: Table, value: str) -> None:
    """It counts as not said."""
    [settle] = await table.plays("s", "once", reply(409, headers={"retry-after": value}))
    assert (settle.status, settle.attempt, settle.last_outcome) == ("pending", 0, "busy")
    assert 40 < settle.wait <= 60


@a_case
async def test_what_is_kept_of_folded_calls(table: Table) -> None:
    """A mark says who called, for which due moment, when first and last, with what end: the last of
    the calls that it stands for."""
    await table.plays("s", "once", reply(409), reply(423), reply(409), reply())
    found = await table.db.execute(
        b"""select a.*, a.scheduled_for = r.scheduled_for as of_this_occurrence,
            called_at < last_called_at as in_order,
            last_called_at <= a.ended_at as called_before_it_ended,
                r.begun_at = a.called_at as begun_with_it
            from recall_attempts a join session_recalls r on r.id = a.recall_id
                order by a.ended_at"""
    )
    busy, answered = await found.fetchall()
    assert (busy["outcome"], busy["calls"], busy["http_status"], busy["settled"]) == (
        "busy",
        3,
        409,
        "pending",
    )
    assert (
        answered["outcome"],
        answered["calls"],
        answered["http_status"],
        answered["settled"],
    ) == ("answered", 1, 200, "fired")
    assert busy["reason"] == "the session is busy (HTTP 409)" and answered["reason"] is None
    for mark in (busy, answered):
        assert (mark["worker"], mark["session_id"], mark["of_this_occurrence"]) == (
            table.daemon.name,
            "s",
            True,
        )
        assert mark["called_before_it_ended"]
    assert busy["in_order"] and busy["begun_with_it"]
    assert answered["called_at"] == answered["last_called_at"] > busy["last_called_at"]
    assert answered["lease"] != busy["lease"]


# --- Gone and Refused: over -----------------------------------------------------------------------


GONE: dict[str, Raw] = {
    f"{status} {where}": reply(status, body)
    for status in (404, 410)
    for where, body in (
        ("code", {"code": "session_not_found"}),
        ("type", {"type": "session_not_found", "title": "No such session"}),
        ("detail.code", {"detail": {"code": "session_not_found", "message": "no such session"}}),
    )
}


@a_case
@pytest.mark.parametrize("call_type", CALL_TYPES)
@pytest.mark.parametrize("answer", GONE.values(), ids=list(GONE))
async def test_gone(table: Table, answer: Raw, call_type: str) -> None:
    """The API names the session as one that does not exist: cancelled, whatever the call type,
    after one request."""
    [settle] = await table.plays("s", call_type, answer)
    assert (settle.status, settle.occurrence, settle.last_outcome, settle.ended) == (
        "cancelled",
        1,
        "gone",
        True,
    )
    assert settle.reason is not None and "does not exist" in settle.reason
    assert len(table.api.of("s")) == 1
    assert [(mark.outcome, mark.calls) for mark in await table.marks("s")] == [("gone", 1)]


@a_case
@pytest.mark.parametrize("call_type", CALL_TYPES)
@pytest.mark.parametrize("status", [400, 413, 415, 422, 431, 451])
async def test_refused(table: Table, status: int, call_type: str) -> None:
    """The API will never take this request: a one-shot has failed, a recurring recall waits for the
    next; one request, and its words."""
    [settle] = await table.plays(
        "s", call_type, reply(status, {"error": {"message": "the message is too rude"}})
    )
    assert settle.last_outcome == "refused"
    assert (
        settle.reason is not None
        and f"HTTP {status}" in settle.reason
        and "too rude" in settle.reason
    )
    if call_type == "recurring":
        assert (settle.status, settle.occurrence, settle.attempt) == ("pending", 2, 0)
        assert INTERVAL - 10 < settle.wait <= INTERVAL
    else:
        assert (settle.status, settle.occurrence, settle.attempt, settle.ended) == (
            "failed",
            1,
            1,
            True,
        )
    assert len(table.api.of("s")) == 1
    assert [(mark.outcome, mark.calls, mark.http_status) for mark in await table.marks("s")] == [
        ("refused", 1, status)
    ]


# --- Unknown: retried under the same key ----------------------------------------------------------


HALF = (
    b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"answer": '
    b'"al'
)

UNKNOWN: dict[str, Raw] = {
    **{str(status): reply(status) for status in (500, 501, 502, 504, 505, 520)},
    "502 web page": reply(
        502, text=b"<html>Bad Gateway</html>", headers={"content-type": "text/html"}
    ),
    "broken off, by FIN": Raw(),
    "broken off, by RST": Raw(reset=True),
    "half a head": Raw(b"HTTP/1.1 200 OK\r\ncontent-len"),
    "half a body, then FIN": Raw(HALF),
    "half a body, then RST": Raw(HALF, reset=True),
    "garbage": Raw(b"\x00\xffgarbage\r\n\r\n"),
    "not JSON that says it is": reply(text=b'{"answer": "al'),
    "529": reply(529),
    "an event stream that breaks off": Raw(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        b"a\r\ndata: one\n\r\n"
    ),
    "neither JSON nor text": reply(
        text=b"\x89PNG\r\n\x1a\n\0\0", headers={"content-type": "application/octet-stream"}
    ),
}


def check_retries(
    settles: Sequence[Settle], call_type: str, outcome: str, rekeys: Sequence[int]
) -> None:
    """Three attempts with backoff between, then the end of a one-shot, or the next occurrence of a
    recurring recall."""
    *retried, last = settles
    for n, settle in enumerate(retried):
        assert (settle.status, settle.occurrence, settle.attempt, settle.deferrals) == (
            "pending",
            1,
            n + 1,
            0,
        )
        assert (settle.last_outcome, settle.rekey, settle.ended) == (outcome, rekeys[n + 1], False)
        assert settle.reason and -20 < settle.wait <= SHORT[n]
    assert last.last_outcome == outcome and last.reason
    if call_type == "recurring":
        assert (last.status, last.occurrence, last.attempt, last.rekey) == ("pending", 2, 0, 0)
        assert INTERVAL - 10 < last.wait <= INTERVAL
    else:
        assert (last.status, last.occurrence, last.attempt, last.ended) == ("failed", 1, 3, True)


@a_case
@pytest.mark.parametrize("call_type", CALL_TYPES)
@pytest.mark.parametrize("answer", UNKNOWN.values(), ids=list(UNKNOWN))
async def test_unknown(table: Table, answer: Raw, call_type: str) -> None:
    """It may have run: three attempts under the same key with the same body, then over, with a
    reason; three requests."""
    settles = await table.plays("s", call_type, answer, answer, answer)
    check_retries(settles, call_type, "unknown", [0, 0, 0])
    requests = table.api.of("s")
    assert [request.headers["recall-attempt"] for request in requests] == ["1", "2", "3"]
    counted_under_one_key(requests, await id_of(table, "s"))
    marks = await table.marks("s")
    assert [(m.occurrence, m.rekey, m.attempt, m.outcome, m.calls, m.sent) for m in marks] == [
        (1, 0, n, "unknown", 1, True) for n in (1, 2, 3)
    ]


@a_case
@pytest.mark.parametrize("call_type", CALL_TYPES)
async def test_unknown_then_busy_then_answered(table: Table, call_type: str) -> None:
    """An attempt that is spent stays spent, a deferral between gives back its own alone, and the
    key stays the same."""
    settles = await table.plays(
        "s", call_type, reply(500), reply(409), reply(503), reply(502), reply()
    )
    assert [(settle.last_outcome, settle.attempt, settle.deferrals) for settle in settles[:4]] == [
        ("unknown", 1, 0),
        ("busy", 1, 1),
        ("unavailable", 1, 2),
        ("unknown", 2, 0),
    ]
    assert settles[4].status == ("pending" if call_type == "recurring" else "fired")
    requests = table.api.of("s")
    assert [request.headers["recall-attempt"] for request in requests] == ["1", "2", "2", "2", "3"]
    counted_under_one_key(requests, await id_of(table, "s"))


@a_case
async def test_the_next_occurrence_has_a_key_of_its_own(table: Table) -> None:
    """After an occurrence that was buried, the next begins with all its attempts, under its own
    key, with its own body."""
    table.api.script("s", *[reply(500)] * 3, reply(500), reply())
    id = await table.schedule("s", "recurring")
    for n in range(1, 5):
        await table.settles("s", n)
        await table.hasten("s")
    settles = await table.settles("s", 5)
    assert [(s.occurrence, s.attempt) for s in settles] == [(1, 1), (1, 2), (2, 0), (2, 1), (3, 0)]
    requests = table.api.of("s")
    assert [request.key for request in requests] == [f"{id}:1"] * 3 + [f"{id}:2"] * 2
    assert [request.document["recall"]["occurrence"] for request in requests] == [1, 1, 1, 2, 2]
    assert len({request.body for request in requests}) == 2
    assert len({request.headers["traceparent"] for request in requests}) == 5


# --- Failed: retried under a new key --------------------------------------------------------------


@a_case
@pytest.mark.parametrize("call_type", CALL_TYPES)
@pytest.mark.parametrize("word", ["failed", "error", "cancelled", "Timed Out", "incomplete"])
async def test_failed(table: Table, word: str, call_type: str) -> None:
    """The API itself reports the run as failed: three attempts, each under a new key, then over,
    with the API's words."""
    answer = reply(body={"status": word, "error": "the model is gone"})
    settles = await table.plays("s", call_type, answer, answer, answer)
    check_retries(settles, call_type, "failed", [0, 1, 2])
    assert all(
        settle.reason and word.lower() in settle.reason and "the model is gone" in settle.reason
        for settle in settles
    )
    requests, id = table.api.of("s"), await id_of(table, "s")
    assert [request.key for request in requests] == [f"{id}:1", f"{id}:1.1", f"{id}:1.2"]
    assert [request.headers["recall-attempt"] for request in requests] == ["1", "2", "3"]
    assert [(m.rekey, m.attempt, m.outcome, m.calls) for m in await table.marks("s")] == [
        (n - 1, n, "failed", 1) for n in (1, 2, 3)
    ]


@a_case
async def test_failed_then_unknown(table: Table) -> None:
    """A retry of an unknown end keeps the key that the failure before it brought; the limit counts
    them together."""
    settles = await table.plays(
        "s", "once", reply(body={"status": "failed"}), reply(500), reply(body={"status": "failed"})
    )
    id = await id_of(table, "s")
    assert [request.key for request in table.api.of("s")] == [f"{id}:1", f"{id}:1.1", f"{id}:1.1"]
    assert settles[-1].status == "failed"


# --- what leaves the house ------------------------------------------------------------------------


SESSIONS = [
    "a/../b",
    "a?b#c",
    "%2e%2e",
    "größe/漢字",
    "two words",
    "a\r\nX-Injected: yes",
    "@elsewhere",
    "{session_id}",
    "...",
    "a\\b;c&d",
]


@a_case
@pytest.mark.parametrize("session", SESSIONS, ids=ascii)
async def test_hostile_sessions_stay_in_their_place(table: Table, session: str) -> None:
    """A session's id, whatever is in it, is one segment of the address and nothing else; the body
    has it as it is."""
    await table.plays(session, "once", reply())
    [request] = table.api.of(session)
    assert request.line == f"POST /sessions/{quote(session, safe='')}/run HTTP/1.1"
    assert request.document["session_id"] == session
    assert (
        request.headers["host"] == f"127.0.0.1:{table.api.port}"
        and "x-injected" not in request.headers
    )


@a_case
@pytest.mark.parametrize("call_type", CALL_TYPES)
@pytest.mark.parametrize("session", ["", ".", ".."], ids=repr)
async def test_sessions_that_can_not_be_named(table: Table, session: str, call_type: str) -> None:
    """An id that an address can't name is never requested: the recall has failed, and says why."""
    connections = table.api.connections
    await table.schedule(session, call_type)
    [settle] = await table.settles(session, 1)
    assert (settle.status, settle.last_outcome, settle.ended) == ("failed", "malformed", True)
    assert settle.reason is not None and "session_id" in settle.reason
    assert (table.api.requests, table.api.connections) == ([], connections)
    assert await table.marks(session) == []


@a_case
@pytest.mark.parametrize("interval", [None, 0, -60], ids=str)
async def test_an_interval_that_was_there_before_us(table: Table, interval: int | None) -> None:
    """A recurring recall without an interval, from before the migration: failed, with its reason,
    and never requested."""
    await table.app.create_session("s", "ann")
    async with table.db.transaction():
        await table.db.execute(b"alter table session_recalls disable trigger recall_before_insert")
        await table.db.execute(
            b"""insert into session_recalls (id, session_id, call_type, trigger_at,
                interval_seconds, additional_context_message,
                created_at, updated_at) values ('old', 's', 'recurring', now(), %s, 'look', now(),
                    now())""",
            (interval,),
        )
        await table.db.execute(b"alter table session_recalls enable trigger recall_before_insert")
        await table.db.execute(b"notify session_recalls")
    [settle] = await table.settles("s", 1)
    assert (settle.status, settle.last_outcome) == ("failed", "malformed")
    assert settle.reason is not None and "interval_seconds" in settle.reason
    assert table.api.of("s") == []


KEYS = {
    "plain-1": "plain-1:1",
    "ключ é": "%D0%BA%D0%BB%D1%8E%D1%87%20%C3%A9:1",
    "tab\there": "tab%09here:1",
    "a\r\nX-Injected: yes": "a%0D%0AX-Injected:%20yes:1",
    "a\nX-Injected: yes\n\n": "a%0AX-Injected:%20yes%0A%0A:1",
    "100%": "100%25:1",
    "\x7f\x01": "%7F%01:1",
}


@a_case
@pytest.mark.parametrize(("id", "header"), KEYS.items(), ids=map(ascii, KEYS))
async def test_hostile_keys_stay_in_their_header(table: Table, id: str, header: str) -> None:
    """A recall's id, whatever is in it, is percent-encoded in the key's header and adds no other;
    again and again the same."""
    table.api.script("s", reply(500), reply())
    await table.schedule("s", "once", id)
    await table.settles("s", 1)
    await table.hasten("s")
    await table.settles("s", 2)
    requests = table.api.of("s")
    assert [request.key for request in requests] == [header, header]
    assert all(request.document["recall"]["id"] == id for request in requests)
    assert set(requests[0].headers) == {
        "host",
        "accept",
        "accept-encoding",
        "user-agent",
        "content-type",
        "content-length",
        "idempotency-key",
        "recall-attempt",
        "recall-lateness",
        "traceparent",
    }


@a_case
async def test_what_is_sent(table: Table) -> None:
    """The request is DESIGN's: a JSON document, and headers that say which call this is and how
    late."""
    await table.plays("s", "recurring", reply())
    [request] = table.api.of("s")
    document = request.document
    assert set(document) == {"session_id", "user_message", "system_message", "recall"}
    assert (document["session_id"], document["user_message"]) == ("s", "look again")
    assert document["system_message"] == "[Scheduled recall] look again"
    recall = document["recall"]
    assert set(recall) == {"id", "call_type", "occurrence", "scheduled_for", "missed"}
    assert (recall["call_type"], recall["occurrence"], recall["missed"]) == ("recurring", 1, 0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", recall["scheduled_for"])
    assert request.headers["content-type"] == "application/json"
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", request.headers["traceparent"])
    assert 0 <= float(request.headers["recall-lateness"]) < 20
    assert "authorization" not in request.headers and "webhook-signature" not in request.headers


# --- settings that change the table: daemons of their own -----------------------------------------


@pytest.fixture
def noted(database: str) -> Iterator[str]:
    """The test's database, with settles noted."""
    import psycopg

    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(NOTE_SETTLES.encode())
    yield database


@pytest.mark.slow
async def test_timeout(
    noted: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A run longer than RECALL_RUN_TIMEOUT is hung up on and Unknown: three requests under one key,
    then over."""
    gates = {session: [Gate() for _ in range(3)] for session in ("once", "recurring")}
    for session, each in gates.items():
        endpoint.script(session, *each)
    table = Table(app, db, endpoint, await daemons.start(run_timeout=0.5))
    for session in gates:
        await table.schedule(session, session)
    for n in (1, 2):
        for session in gates:
            await table.settles(session, n)
            await table.hasten(session)
    for session, each in gates.items():
        settles = await table.settles(session, 3)
        check_retries(settles, session, "unknown", [0, 0, 0])
        assert all(settle.reason == "no answer within 0.5 s" for settle in settles)
        assert len(endpoint.of(session)) == 3 and all(gate.hung_up.is_set() for gate in each)
        counted_under_one_key(endpoint.of(session), await id_of(table, session))


async def test_one_attempt(
    noted: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """With RECALL_MAX_ATTEMPTS=1 nothing is retried; a deferral before it still costs none."""
    table = Table(app, db, endpoint, await daemons.start(max_attempts=1))
    *_, once = await table.plays("once", "once", reply(409), reply(500))
    assert (once.status, once.last_outcome, once.attempt) == ("failed", "unknown", 1)
    [recurring] = await table.plays("recurring", "recurring", reply(body={"status": "failed"}))
    assert (recurring.status, recurring.occurrence, recurring.last_outcome) == (
        "pending",
        2,
        "failed",
    )
    assert (len(endpoint.of("once")), len(endpoint.of("recurring"))) == (2, 1)


async def test_our_own_fault_is_given_up_while_others_are_answered(
    noted: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Past RECALL_GIVE_UP an address that is wrong for this session alone ends the occurrence."""
    table = Table(app, db, endpoint, await daemons.start(give_up=600))
    for session, answer in (("forbidden", reply(403)), ("missing", BARE_404), ("page", WEB_PAGE)):
        endpoint.script(session, answer)
        await table.schedule(f"before {session}", "immediate")
        await table.settles(f"before {session}", 1)
        await table.schedule(session, "once")
        await table.settles(session, 1)
        await db.execute(
            b"update session_recalls set begun_at = begun_at - interval '601 seconds' where "
            b"session_id = %s",
            [session],
        )
        await table.schedule(f"between {session}", "immediate")
        await table.settles(f"between {session}", 1)
        await table.hasten(session)
        last = (await table.settles(session, 2))[1]
        assert (last.status, last.last_outcome) == ("failed", "misconfigured")
        assert last.reason is not None and last.reason.startswith("given up after")
        assert len(endpoint.of(session)) == 2
    assert daemons.started[0].told("breaker.opened") == []


async def test_our_own_fault_costs_no_attempt(
    noted: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The recall is kept until somebody has put the settings right."""
    table = Table(app, db, endpoint, await daemons.start())
    *kept, last = await table.plays(
        "s", "once", reply(401), reply(404), WEB_PAGE, reply(405), reply()
    )
    assert [(settle.status, settle.attempt, settle.deferrals) for settle in kept] == [
        ("pending", 0, n) for n in (1, 2, 3, 4)
    ]
    assert (last.status, last.last_outcome) == ("fired", "answered")
    counted_under_one_key(endpoint.requests, await id_of(table, "s"))
    assert [(mark.outcome, mark.calls) for mark in await table.marks("s")] == [
        ("misconfigured", 4),
        ("answered", 1),
    ]


@pytest.mark.slow
async def test_giving_up_on_a_busy_session(
    noted: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Past RECALL_GIVE_UP a session that stays busy is given up: a one-shot has failed, a recurring
    recall takes its next turn."""
    table = Table(app, db, endpoint, await daemons.start(give_up=1, busy_delay=0.3))
    for session in ("once", "immediate", "recurring"):
        endpoint.script(session, reply(409))
        await table.schedule(session, session)
    for session in ("once", "immediate", "recurring"):
        [over] = await table.daemon.hears(
            "recall.settled",
            session=session,
            verdict="finish" if session != "recurring" else "next",
        )
        requests = endpoint.of(session)
        settles = await table.settles(session, len(requests))
        assert 2 <= len(requests) == len(settles) and over["outcome"] == "busy"
        assert all(settle.status == "pending" and settle.wait <= 0.3 for settle in settles[:-1])
        last = settles[-1]
        assert last.reason is not None and "given up" in last.reason and "busy" in last.reason
        if session == "recurring":
            assert (last.status, last.occurrence, last.attempt, last.deferrals) == (
                "pending",
                2,
                0,
                0,
            )
            assert INTERVAL - 10 < last.wait <= INTERVAL
        else:
            assert (last.status, last.ended) == ("failed", True)
        counted_under_one_key(requests, await id_of(table, session))
        [mark] = await table.marks(session)
        assert (mark.outcome, mark.calls) == ("busy", len(requests))


@pytest.mark.slow
@pytest.mark.parametrize("call_type", ["once", "recurring"])
@pytest.mark.parametrize("listening", [True, False], ids=["503", "no connection"])
async def test_giving_up_on_an_api_that_is_away(
    noted: str,
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
    listening: bool,
    call_type: str,
) -> None:
    """Past RECALL_GIVE_UP, counted from the first call (also one that found no connection), one
    session's wait is over."""
    table = Table(app, db, endpoint, await daemons.start(give_up=600))
    endpoint.script("s", reply(503))
    if not listening:
        await endpoint.stop()
    await table.schedule("s", call_type)
    await table.settles("s", 1)
    await table.hasten("s")
    await table.settles("s", 2)
    aged = await db.execute(
        b"update session_recalls set begun_at = begun_at - interval '601 seconds' where begun_at "
        b"is not null"
    )
    assert aged.rowcount == 1
    await table.hasten("s")
    *waited, last = await table.settles("s", 3)
    assert [(settle.status, settle.attempt, settle.deferrals) for settle in waited] == [
        ("pending", 0, 1),
        ("pending", 0, 2),
    ]
    assert last.reason is not None and "given up" in last.reason
    assert (last.status, last.occurrence) == (
        ("pending", 2) if call_type == "recurring" else ("failed", 1)
    )
    assert len(endpoint.requests) == (3 if listening else 0)


@pytest.mark.slow
async def test_nothing_is_given_up_while_the_breaker_is_open(
    noted: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """In an outage of the API every recall is kept, however long it lasts, and is answered
    afterwards under its first key."""
    gates = {session: Gate(reply(503, headers={"retry-after": "60"})) for session in ("one", "two")}
    for session, gate in gates.items():
        endpoint.script(session, gate, reply(503), reply())
    table = Table(app, db, endpoint, await daemons.start(give_up=0))
    ids = {session: await table.schedule(session, "once") for session in gates}
    await endpoint.count(2)
    for gate in gates.values():
        gate.open()
    await table.daemon.hears("breaker.opened")
    for session in gates:
        await table.settles(session, 1)
    await table.hasten("one")
    await table.daemon.hears("breaker.probed")
    [_, probe] = await table.settles("one", 2)
    assert (probe.status, probe.attempt, probe.last_outcome) == ("pending", 0, "unavailable")
    await table.hasten("one")
    await table.daemon.hears("breaker.closed")
    endpoint.script("two", reply())
    await table.hasten("two")
    for session, id in ids.items():
        await table.daemon.hears("recall.settled", session=session, outcome="answered")
        counted_under_one_key(endpoint.of(session), id)
        assert [mark.outcome for mark in await table.marks(session)] == ["unavailable", "answered"]


async def test_cookies_do_not_come_back(
    noted: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A cookie that one session's answer sets goes neither with its own next call nor with another
    session's.

    The endpoint goes by its name here, as no jar keeps the cookies of an address.
    """
    url = endpoint.url.replace("127.0.0.1", "localhost")
    table = Table(app, db, endpoint, await daemons.start(run_url=url))
    sets = reply(409, headers={"set-cookie": "session=hers; Path=/; Max-Age=9999"})
    await table.plays("hers", "once", sets, reply())
    await table.plays("his", "once", reply())
    assert [request.headers["host"] for request in endpoint.requests] == [
        f"localhost:{endpoint.port}"
    ] * 3
    assert not any("cookie" in request.headers for request in endpoint.requests)


async def test_the_token_goes_with_every_call(
    noted: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """RECALL_RUN_TOKEN is a bearer token, on the first call as on the next, and is written
    nowhere."""
    daemon = await daemons.start(run_token="open-sesame")
    table = Table(app, db, endpoint, daemon)
    await table.plays("s", "once", reply(401), reply())
    assert [request.headers["authorization"] for request in endpoint.requests] == [
        "Bearer open-sesame"
    ] * 2
    assert await daemon.stop() == 0
    assert "open-sesame" not in str((daemon.events, daemon.talk))


def test_every_status_of_the_table_has_its_case() -> None:
    """The cases above name every status that DESIGN's table names."""
    named: dict[str, Any] = {**ANSWERED, **DEFERRED, **GONE, **UNKNOWN}
    for status in (
        200,
        204,
        401,
        403,
        404,
        405,
        407,
        408,
        409,
        410,
        423,
        425,
        429,
        500,
        501,
        502,
        503,
        504,
    ):
        assert any(name.startswith(str(status)) for name in named)

"""Hostile answers and hostile rows, drawn by a seed, against the daemon as a process: it must
neither break, nor grow, nor be led astray.

Answers come from a raw socket (`Liar`), which also reads every request as strictly as RFC 9112
allows: a smuggled header, a second request in the bytes, a control character anywhere is seen
there. The account afterwards is complete: each request on record, each recall ended or kept with a
reason. What is known to be nasty has tests of its own (test_bad_input, test_wire, test_terminal);
here it meets what it was not made for.

A failure names its seed; RECALL_TEST_SEEDS=7,8 draws others.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import re
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

import pytest
from psycopg import sql

from ..conftest import Connection
from ..support.daemon import Daemon, Daemons
from ..test_cli import operate
from ..test_terminal import SGR, STORABLE
from .test_lease import eventually, rows

TOKEN = "open-sesame-4711"
FIELDS = {
    "host",
    "content-type",
    "content-length",
    "accept",
    "accept-encoding",
    "user-agent",
    "authorization",
    "idempotency-key",
    "recall-attempt",
    "recall-lateness",
    "traceparent",
    "webhook-id",
    "webhook-timestamp",
    "webhook-signature",
    "x-api-key",
}
"""All that a request of ours may carry."""
GROWTH_MOST = 64 << 20
"""Bytes by which the daemon's memory may have grown at its highest. Each of its slots may hold an
answer of 1 MiB, and what JSON makes of it."""


def seeds(*ours: int) -> list[int]:
    return (
        [int(seed) for seed in os.environ["RECALL_TEST_SEEDS"].split(",")]
        if "RECALL_TEST_SEEDS" in os.environ
        else list(ours)
    )


# --- a server that lies ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lie:
    """Bytes for an answer. `then`: keep, close, reset, or stall (say no more, and wait until the
    peer goes). `endless`: this again and again."""

    data: bytes = b""
    then: str = "close"
    endless: bytes | None = None


@dataclass(frozen=True, slots=True)
class Heard:
    """One request, read strictly."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.body)
        return document


@dataclass(slots=True)
class Liar:
    """Listens on 127.0.0.1; `answer(request)` says what each request gets."""

    answer: Callable[[Heard], Lie]
    heard: list[Heard] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """What no request of ours may look like."""
    most: int = 1 << 30
    """Bytes of an endless answer after which it stalls."""
    port: int = 0
    _server: asyncio.Server | None = None
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/sessions/{{session_id}}/run"

    @property
    def posts(self) -> list[Heard]:
        return [request for request in self.heard if request.method == "POST"]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 23)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while (request := await self._read(reader)) is not None:
                self.heard.append(request)
                lie = self.answer(request)
                writer.write(lie.data)
                await writer.drain()
                sent = 0
                while lie.endless is not None and sent < self.most:
                    writer.write(lie.endless)
                    await writer.drain()
                    sent += len(lie.endless)
                if lie.then == "stall" or lie.endless is not None:
                    await reader.read(1)
                    return
                if lie.then == "reset":
                    writer.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                    writer.transport.abort()
                if lie.then != "keep":
                    return
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Heard | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                self.wrong.append(f"half a request, or bytes behind one: {error.partial[:200]!r}")
            return None
        line, *fields = head[:-4].split(b"\r\n")
        found = re.fullmatch(rb"(POST|GET|DELETE) (/[!-~]*) HTTP/1\.1", line)
        headers: dict[str, str] = {}
        for one in fields:
            if not (part := re.fullmatch(rb"([A-Za-z-]+): ([ -~]*)", one)):
                self.wrong.append(f"a header: {one[:200]!r}")
                continue
            name = part[1].decode().lower()
            if name in headers or name not in FIELDS:
                self.wrong.append(f"a header of somebody else's: {one[:200]!r}")
            headers[name] = part[2].decode()
        if found is None:
            self.wrong.append(f"a request line: {line[:200]!r}")
            return None
        if (
            b"#" in found[2]
            or headers.get("host") != f"127.0.0.1:{self.port}"
            or headers.get("authorization") != f"Bearer {TOKEN}"
        ):
            self.wrong.append(f"an address or a token: {head[:400]!r}")
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Heard(found[1].decode(), found[2].decode(), headers, body)


# --- what it says ---------------------------------------------------------------------------------

WORDS = [
    *STORABLE,
    TOKEN,
    f"Bearer {TOKEN}",
    "\ud800",
    "\udfff\ud800",
    "\x00",
    "a\x00b",
    "x" * 300,
    "é" * 300,
    "％",
    "%0d%0aX-Evil:%201",
    "%s%n%(x)s{x}",
    "\r\nX-Evil: 1\r\n\r\n",
    "\nrecall.settled",
    '{"event": "recall.settled"}',
    "..",
    "../../x",
    "．．",
    "‥",
    "%2e%2e",
    "",
    " ",
    "0",
    "-1",
    "null",
]
STATUS_WORDS = [
    "failed",
    "error",
    "success",
    "completed",
    "running",
    "queued",
    "cancelled",
    "FAILED",
    "\x1b[2Jon",
    "",
    "timeout",
]
LOCATIONS = [
    "/runs/1",
    "runs/1",
    "?poll=1",
    "#x",
    "",
    "//elsewhere/x",
    "http://elsewhere/x",
    "https://127.0.0.1:{port}/x",
    "http://127.0.0.1:1/x",
    "http://user:pw@127.0.0.1:{port}/x",
    "http://127.0.0.1:{port}@elsewhere/x",
    "http://127.0.0.1:{port}/x#y",
    "HTTP://127.0.0.1:{port}/X",
    "http://127.0.0.1:{port}\\@elsewhere/",
    "\\\\elsewhere\\x",
    "javascript:alert(1)",
    "file:///etc/passwd",
    "http://[::1",
    "http://127.0.0.1:99999/x",
    "http://127.1:{port}/x",
    "http://2130706433:{port}/x",
    "/../../x",
    "/%2e%2e/x",
    "/a b",
    "/é",
    "/\x1b[2J",
    "/" + "x" * 5000,
    "http:///x",
    "http:x",
    "///x",
    "/x?y=\u202e",
    " /x",
    "/x\t",
]
AFTERS = [
    "0",
    "1",
    "60",
    "-1",
    "1e9",
    "1e999",
    "NaN",
    "inf",
    "0x10",
    "٣",
    "１０",
    "9" * 400,
    "",
    " ",
    "5, 5",
    "1;2",
    "Wed, 21 Oct 2015 07:28:00 GMT",
    "Wed, 21 Oct 9999 07:28:00 GMT",
    "Fri, 31 Feb 2027 25:61:61 GMT",
    "Mon, 1 Jan 0000 00:00:00 -9999",
    "Mon, 1 Jan 10000 00:00:00 GMT",
    "Mon, 01 Jan 2027 00:00:00 +99999999999",
    "\x1b[2J",
    "1" + " " * 500,
]
NASTY = [
    b"no colon here",
    b" folded: 1",
    b": no name",
    b"space : before",
    b"x\x00y: 1",
    b"X-Nul: a\x00b",
    b"X-Bare: a\rb",
    b"X-Latin: \xe9\xff",
    b"X-Esc: \x1b[2J\x1b]0;owned\x07",
    b"X-Long: " + b"y" * 20_000,
    b"X" * 20_000 + b": 1",
    b"Content-Length: -5",
    b"Content-Length: +2",
    b"Content-Length: 0x10",
    b"Content-Length: 2, 2",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: 2\r\nContent-Length: 3",
    b"Transfer-Encoding: chunked\r\nContent-Length: 3",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding: x",
    b"Content-Encoding: gzip",
    b"Content-Encoding: br",
    b"Content-Encoding: deflate, gzip, zstd",
    b"Connection: upgrade\r\nUpgrade: websocket",
    b"Connection: keep-alive, close",
    b"Set-Cookie: a=b; Domain=127.0.0.1",
    b"Set-Cookie: \x00\xff=\r",
    b"Trailer: X",
    b"Keep-Alive: timeout=99999999",
    b"X-Many: 1\r\n" * 400 + b"X-Last: 1",
    b"Date: never",
    b"Date: Mon, 1 Jan 0000 00:00:00 -9999",
]
STATUS_LINES = [
    b"HTTP/1.1 200",
    b"HTTP/9.9 200 OK",
    b"HTTP/1.1 99999 X",
    b"HTTP/1.1 -1 X",
    b"HTTP/1.1  200 OK",
    b"http/1.1 200 ok",
    b"ICY 200 OK",
    b"HTTP/1.1 2OO OK",
    "HTTP/1.1 ２００ OK".encode(),
    b"HTTP/1.1 200 \x1b[2J",
    b"HTTP/1.1 200 " + b"O" * 20_000,
    b"HTTP/1.0 200 OK",
    b"HTTP/1.1 600 X",
    b"HTTP/1.1 000 X",
    b"HTTP/2 200",
    b"\x16\x03\x01\x02\x00",
    b"PRI * HTTP/2.0",
    b"",
    b"\r\n\r\nHTTP/1.1 200 OK",
    b"220 smtp ESMTP",
]
INTERIM = [
    b"HTTP/1.1 100 Continue\r\n\r\n" * 3,
    b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
    b"HTTP/1.1 199 X\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
]
STATUSES = [
    200,
    200,
    200,
    200,
    201,
    202,
    202,
    204,
    205,
    206,
    226,
    300,
    301,
    302,
    304,
    307,
    400,
    401,
    403,
    404,
    404,
    405,
    407,
    408,
    409,
    409,
    410,
    411,
    413,
    414,
    415,
    418,
    421,
    422,
    423,
    425,
    426,
    429,
    431,
    451,
    500,
    500,
    501,
    502,
    503,
    504,
    505,
    507,
    511,
    599,
]


def document(dice: random.Random) -> bytes:
    """A body: JSON that is hostile, JSON that is none, and other things."""
    word = dice.choice(WORDS)
    plain: dict[str, Any] = {
        dice.choice(
            ["status", "run_id", "error", "message", "detail", "title", "code", "type", word]
        ): dice.choice(
            [
                word,
                dice.choice(STATUS_WORDS),
                {"message": word, "code": word},
                [word],
                None,
                1,
                1.5,
                True,
                "session_not_found",
            ]
        )
        for _ in range(dice.randrange(5))
    }
    text = json.dumps(plain, ensure_ascii=dice.random() < 0.5)
    match dice.randrange(24):
        case 0:
            return b"[" * dice.choice([500, 5_000, 900_000])
        case 1:
            return b'{"a":' * 100_000 + b"1" + b"}" * 100_000
        case 2:
            return b'{"status": ' + b"9" * dice.choice([100, 5_000, 400_000]) + b"}"
        case 3:
            return b'{"status": NaN, "run_id": Infinity, "error": -Infinity}'
        case 4:
            return (
                b'{"status": "running", "status": "failed", "run_id": "a", "run_id": "b", '
                b'"error": "\\ud800\\udc00\\ud800"}'
            )
        case 5:
            return text.encode("utf-16", "replace")
        case 6:
            return b"\xef\xbb\xbf" + text.encode("utf-8", "replace")
        case 7:
            return dice.randbytes(dice.choice([1, 10, 5_000]))
        case 8:
            return b"<!doctype html><title>\x1b[2J</title>" + b"x" * 1000
        case 9:
            return b" " * dice.choice([1, 100_000]) + text.encode("utf-8", "replace")
        case 10:
            return gzip.compress(b"{" + b" " * (16 << 20) + b"}")
        case 11:
            return zlib.compress(text.encode("utf-8", "replace"))
        case 12:
            return text.encode("utf-8", "replace")[: dice.randrange(len(text) + 1)]
        case 13:
            return b'{"error": "' + b"e" * (2 << 20) + b'"}'
        case 14:
            return (
                b'{"error": {"message": {"message": "x"}}, "detail": [{"msg": "\\u0000"}], '
                b'"message": "\\u001b[2J\\r\\n\\u202e"}'
            )
        case 15:
            # Few of these: each is polled for a while.
            return json.dumps(
                {"run_id": dice.choice([*WORDS, "r" * 5_000, "é" * 200_000]), "status": "running"}
            ).encode()
        case 16 | 17:
            return b""
        case _:
            return text.encode("utf-8", "surrogatepass")


def framed(dice: random.Random, body: bytes) -> tuple[bytes, bytes]:
    """A header that says how long the body is, truly or not, and the body as it goes over the
    wire."""
    size = b"%x" % len(body)
    match dice.randrange(14):
        case 0:
            return b"", body
        case 1:
            return b"Content-Length: %d\r\n" % (len(body) + dice.choice([1, 1000])), body
        case 2:
            return b"Content-Length: %d\r\n" % (len(body) // 2), body
        case 3:
            chunk = dice.choice(
                [
                    b"zz",
                    b"-1",
                    b"F" * 16,
                    b"F" * 400,
                    b"",
                    size + b";" + b"x" * 9_000,
                    b"0x" + size,
                    size + b" \x00",
                    b" " + size,
                ]
            )
            return b"Transfer-Encoding: chunked\r\n", chunk + b"\r\n" + body + b"\r\n0\r\n\r\n"
        case 4:
            trailer = dice.choice(
                [
                    b"X: 1",
                    b"Content-Length: 5",
                    b"no colon",
                    b"X: " + b"y" * 20_000,
                    b"Y: 1\r\n" * 300 + b"Z: 1",
                ]
            )
            return (
                b"Transfer-Encoding: chunked\r\n",
                size + b"\r\n" + body + b"\r\n0\r\n" + trailer + b"\r\n\r\n",
            )
        case 5:
            pieces = b"".join(
                b"1\r\n" + body[n : n + 1] + b"\r\n" for n in range(min(len(body), 2_000))
            )
            return b"Transfer-Encoding: chunked\r\n", pieces + b"0\r\n\r\n"
        case 6:
            return b"Transfer-Encoding: chunked\r\n", size + b"\r\n" + body
        case 7 | 8:
            return b"Transfer-Encoding: chunked\r\n", (
                size + b"\r\n" + body + b"\r\n" if body else b""
            ) + b"0\r\n\r\n"
        case _:
            return b"Content-Length: %d\r\n" % len(body), body


def lie(dice: random.Random, port: int, polled: bool = False) -> Lie:
    """An answer, whole or broken, of which any part may be wrong. Most have few wrong parts, to get
    far."""
    if dice.random() < 0.04:
        return Lie(
            dice.choice(
                [
                    b"",
                    b"\r\n",
                    b"\x00" * 100,
                    dice.randbytes(500),
                    b"HTTP/1.1 ",
                    b"HTTP/1.1 200 OK\r\nContent-Le",
                ]
            ),
            dice.choice(["close", "reset"]),
        )
    if dice.random() < 0.05:
        # A run that is accepted as it should be, but for its name or place: it is polled there, or
        # not at all.
        named = json.dumps(
            {
                "run_id": dice.choice([*WORDS, "r" * 5_000, "é" * 200_000]),
                "status": dice.choice(["running", "x", "\x1b[2J"]),
            }
        ).encode()
        place = (
            dice.choice(LOCATIONS[:4] if dice.random() < 0.5 else LOCATIONS)
            .format(port=port)
            .encode()
        )
        head = b"HTTP/1.1 202 OK\r\nContent-Length: %d\r\n" % len(named) + (
            b"Location: %s\r\n" % place if dice.random() < 0.5 else b""
        )
        return Lie(head + b"\r\n" + named, "keep")
    status = dice.choice(STATUSES) if not polled or dice.random() < 0.4 else 200
    body = document(dice) if not polled or dice.random() < 0.6 else b'{"status": "completed"}'
    if status in (404, 410) and dice.random() < 0.5:
        body = b'{"code": "session_not_found"}'
    length, sent = framed(dice, body)
    line = (
        dice.choice(STATUS_LINES)
        if dice.random() < 0.08
        else b"HTTP/1.1 %d %s" % (status, dice.choice([b"OK", b"", b"\xe9"]))
    )
    fields = []
    if dice.random() < 0.8:
        fields.append(
            b"Content-Type: "
            + dice.choice(
                [
                    b"application/json",
                    b"text/html",
                    b"application/json; charset=utf-16",
                    b"json\x7f",
                    b"\xff" * 100,
                ]
            )
        )
    if status == 202 or dice.random() < 0.05:
        fields.append(
            b"Location: "
            + dice.choice(LOCATIONS).format(port=port).encode("utf-8", "surrogatepass")
        )
    if status in (409, 423, 429, 503) or dice.random() < 0.1:
        fields.append(b"Retry-After: " + dice.choice(AFTERS).encode())
    while dice.random() < 0.2:
        fields.append(dice.choice(NASTY))
    dice.shuffle(fields)
    before = b"" if dice.random() < 0.93 else dice.choice(INTERIM)
    # A second answer behind the first must not become that of the next request.
    behind = b"" if dice.random() < 0.9 else b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    data = (
        before
        + line
        + b"\r\n"
        + b"".join(one + b"\r\n" for one in fields)
        + length
        + b"\r\n"
        + sent
        + behind
    )
    # Where the length lies, the daemon waits for the rest until its time is up: seldom, as that
    # takes a second each.
    ways = ["close", "close", "reset", "keep", "keep"]
    true = length == b"Content-Length: %d\r\n" % len(sent)
    return Lie(data, dice.choice(ways if true or dice.random() < 0.04 else ways[:3]))


# --- the account ----------------------------------------------------------------------------------


def memory(daemon: Daemon) -> int:
    """Bytes of memory that the daemon had at its highest."""
    found = re.search(
        r"^VmHWM:\s+(\d+) kB$",
        Path(f"/proc/{daemon.pid}/status").read_text(encoding="ascii"),
        re.MULTILINE,
    )
    assert found is not None
    return int(found[1]) * 1024


def said_nothing_wrong(daemon: Daemon) -> None:
    """Every line of the log is one JSON document, no call broke the worker, no row could not be
    written, the token is nowhere."""
    assert daemon.talk == []
    assert (
        daemon.told("worker.error")
        == daemon.told("recall.stranded")
        == daemon.told("database.lost")
        == []
    )
    assert daemon.process.returncode is None
    assert TOKEN not in str(daemon.events)


async def insert(db: Connection, **columns: Any) -> None:
    row = {"call_type": "once", "additional_context_message": "m", "status": "pending"} | columns
    await db.execute(
        "insert into sessions values (%s, 'ann') on conflict do nothing", [row["session_id"]]
    )
    await db.execute(
        sql.SQL(
            "insert into session_recalls ({}, trigger_at, created_at, updated_at) values ({}, "
            "now(), now(), now())"
        ).format(
            sql.SQL(", ").join(map(sql.Identifier, row)),
            sql.SQL(", ").join(sql.Placeholder() * len(row)),
        ),
        list(row.values()),
    )


SETTINGS: dict[str, Any] = {
    "log_level": "debug",
    "run_token": TOKEN,
    "max_attempts": 2,
    "give_up": 0,
    "lease": 5,
    "agno_agent": "a/../b",
}
HOSTILE = "00000000-0000-4000-8000-00000000bad0"
"""The session that is lied to. LangGraph's are UUIDs."""
GOOD = "00000000-0000-4000-8000-00000000900d"


def ok(**members: Any) -> Lie:
    body = json.dumps(members).encode()
    return Lie(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body),
        "keep",
    )


def honest(protocol: str, request: Heard) -> Lie:
    """What a server of this protocol says, all being well."""
    match protocol, request.method:
        case "langgraph", "POST":
            return ok(run_id="4f", status="pending")
        case "langgraph", _:
            return ok(run_id="4f", status="success")
        case "agno", "POST":
            return ok(run_id="4f", status="PENDING")
        case "agno", _:
            return ok(
                status="COMPLETED", data=[], queue={"durable": True, "queue_per_session": True}
            )
        case _:
            return ok()


async def lied_to(protocol: str, seed: int, recalls: int, database: str, db: Connection) -> None:
    """So many recalls of one session, whose trouble alone can't open the breaker, are called until
    each is over or cancelled.

    Now and then there is a good one, which must be called on time.
    """
    dice = random.Random(seed)

    def answer(request: Heard) -> Lie:
        # Agno is asked for its settings before each post: a server that lies about these is never
        # called.
        others = (
            GOOD in request.path
            or GOOD.encode() in request.body
            or request.path == "/config"
            or "limit=1" in request.path
        )
        return (
            honest(protocol, request)
            if others
            else lie(dice, liar.port, polled=request.method != "POST")
        )

    async with Liar(answer) as liar:
        url = liar.url if protocol == "native" else f"http://127.0.0.1:{liar.port}"
        async with Daemons(
            {"RECALL_DSN": database, "RECALL_RUN_URL": url, "RECALL_PROTOCOL": protocol}
        ) as daemons:
            daemon = await daemons.start(**SETTINGS, run_timeout=1)
            before = memory(daemon)
            for n in range(recalls):
                # Outside of the session's one slot.
                await insert(db, id=f"r{n}", session_id=HOSTILE, status="running")
            for n in range(4):
                await insert(db, id=f"good{n}", session_id=GOOD)
                [settled] = await daemon.hears("recall.settled", recall=f"good{n}")
                assert settled["outcome"] == "answered" or protocol != "native", settled
                assert settled["lag_ms"] < 5_000
                await eventually(
                    db,
                    "select where (select count(*) from session_recalls where id like 'r%%' and "
                    "last_outcome is null) <= %s",
                    [recalls * (3 - n) // 4],
                    within=100,
                )
            await account(protocol, liar, daemon, db)
            assert memory(daemon) - before < GROWTH_MOST
            assert daemon.told("breaker.opened") == []
            said_nothing_wrong(daemon)
            assert await daemon.stop() == 0
            assert daemon.talk == []


ODD = """
select id, status, reason from session_recalls
where not (status = 'fired' or reason is not null or lease is not null) or reason ~ '[[:cntrl:]]'
    or length(reason) > 2000
"""


async def account(protocol: str, liar: Liar, daemon: Daemon, db: Connection) -> None:
    """Every request is on record and every recall has ended, or waits, with a reason; what waits is
    cancelled."""
    assert await rows(db, ODD) == []
    await db.execute(
        "update session_recalls set status = 'cancelled', reason = 'enough' where status in "
        "('pending', 'running')"
    )
    await eventually(
        db, "select where not exists (select from session_recalls where lease is not null)"
    )
    assert liar.wrong == []
    calls = [
        request
        for request in liar.heard
        if "idempotency-key" in request.headers and request.method == "POST"
    ]
    posted = Counter(request.headers["idempotency-key"].partition(":")[0] for request in calls)
    marks = await rows(
        db,
        "select recall_id, sum(calls) as n from recall_attempts where called_at is not null "
        "group by 1",
    )
    marked = {mark["recall_id"]: mark["n"] for mark in marks}
    if protocol == "agno":
        # A session that turns out to be somebody's is posted to again, with its owner's name: one
        # call, two requests.
        assert set(marked) == set(posted) and all(posted[id] <= 2 * marked[id] for id in marked)
    else:
        # A server may hang up while a request is on its way to it: what it never read is unknown.
        unread = Counter(marked) - posted
        assert Counter(marked) == posted + unread
        lost = await rows(
            db,
            "select recall_id, sum(calls) as n from recall_attempts where outcome = 'unknown' "
            "and reason ~ 'broke off' group by 1",
        )
        assert (
            unread <= Counter({mark["recall_id"]: mark["n"] for mark in lost})
            and unread.total() <= 3
        )
        bodies: dict[str, bytes] = {}
        for request in calls:
            assert (
                bodies.setdefault(request.headers["idempotency-key"], request.body) == request.body
            )
    assert await rows(db, ODD) == []
    assert TOKEN not in str(
        await rows(
            db,
            "select r::text from session_recalls r union all select a::text from recall_attempts a",
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", seeds(1))
async def test_hostile_answers(seed: int, database: str, db: Connection) -> None:
    """A hundred and twenty answers, drawn from all that can be wrong with one: the daemon goes on,
    and accounts for each."""
    await lied_to("native", seed, 120, database, db)


@pytest.mark.full
@pytest.mark.parametrize("seed", seeds(2, 3))
@pytest.mark.parametrize("protocol", ["native", "langgraph", "agno"])
async def test_many_hostile_answers(
    protocol: str, seed: int, database: str, db: Connection
) -> None:
    """The same with more of them, and for the other protocols, whose servers are no better."""
    await lied_to(protocol, seed, 300 if protocol == "native" else 150, database, db)


# --- without end ----------------------------------------------------------------------------------

START = b"HTTP/1.1 200 OK\r\n"
KIB = b"x" * 1024
ENDLESS = {
    "a status line": Lie(b"HTTP/1.1 200 ", endless=KIB * 64),
    "a header": Lie(START + b"X: ", endless=KIB * 64),
    "a header's name": Lie(START, endless=KIB * 64),
    "headers": Lie(START, endless=b"X-Header: y\r\n" * 4096),
    "folded headers": Lie(START + b"X: y\r\n", endless=b" z\r\n" * 16384),
    "interim answers": Lie(endless=b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 1024),
    "empty lines": Lie(endless=b"\r\n" * 32768),
    "a body": Lie(START + b"Content-Type: application/json\r\n\r\n[", endless=b"1," * 32768),
    "a body of a terabyte": Lie(START + b"Content-Length: 1000000000000\r\n\r\n", endless=KIB * 64),
    "chunks": Lie(
        START + b"Transfer-Encoding: chunked\r\n\r\n", endless=(b"400\r\n" + KIB + b"\r\n") * 64
    ),
    "tiny chunks": Lie(START + b"Transfer-Encoding: chunked\r\n\r\n", endless=b"1\r\nx\r\n" * 8192),
    "a chunk's size": Lie(START + b"Transfer-Encoding: chunked\r\n\r\n", endless=b"0" * 65536),
    "a chunk's extension": Lie(START + b"Transfer-Encoding: chunked\r\n\r\n1;", endless=KIB * 64),
    "trailers": Lie(
        START + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", endless=b"X-Trailer: y\r\n" * 4096
    ),
    "silence": Lie(then="stall"),
    "silence in a body": Lie(START + b"Content-Length: 5\r\n\r\n[", then="stall"),
}


BODIES = {"a body", "a body of a terabyte", "chunks", "tiny chunks"}


@pytest.mark.slow
async def test_answers_without_end(database: str, db: Connection) -> None:
    """Whatever goes on without end, in all slots at once: none is read for ever or kept in memory,
    each ends, and others are called on time."""

    def answer(request: Heard) -> Lie:
        return ENDLESS.get(unquote(request.path.split("/")[2]), ok())

    async with Liar(answer) as liar:
        async with Daemons({"RECALL_DSN": database, "RECALL_RUN_URL": liar.url}) as daemons:
            daemon = await daemons.start(
                **SETTINGS | {"max_attempts": 1}, run_timeout=4, concurrency=40
            )
            await insert(db, id="warm", session_id="warm")
            await daemon.hears("recall.settled", recall="warm")
            before = memory(daemon)
            for name in ENDLESS:
                await insert(db, id=name, session_id=name)
            await insert(db, id="good", session_id="good")
            for name in ENDLESS:
                settled = (await daemon.hears("recall.settled", recall=name, within=60))[0]
                # As much of a body as counts may be read in time; all else has no end that could be
                # an answer.
                assert settled["outcome"] in {"unknown"} | (
                    {"answered", "misconfigured"} if name in BODIES else set()
                ), settled
            [settled] = await daemon.hears("recall.settled", recall="good", outcome="answered")
            assert memory(daemon) - before < GROWTH_MOST, memory(daemon) - before
            assert liar.wrong == [] and len(liar.posts) >= len(ENDLESS) + 2
            said_nothing_wrong(daemon)
            assert await daemon.stop() == 0


# --- rows -----------------------------------------------------------------------------------------

PARTS = [
    *(text for text in STORABLE if text),
    "..",
    ".",
    "/",
    "//",
    "/../",
    "%2e%2e%2f",
    "%00",
    "%0d%0a",
    "％２ｅ",
    "．．",
    "‥",
    "…",
    "⁄",
    "∕",
    "\\",
    "?",
    "#",
    "&",
    "=",
    ":",
    "@",
    ";",
    "{session_id}",
    "%s",
    "%(id)s",
    "{}",
    "$1",
    "'",
    '"',
    "`",
    "--",
    "-h",
    "--yes",
    " ",
    "  ",
    "a",
    "é",
    "e\u0301",
    "漢",
    "🙂",
    "ﷺ" * 3,
    "\u0300" * 20,
    "HTTP/1.1",
    "Host: elsewhere",
    "\r\n\r\nGET /admin HTTP/1.1\r\n\r\n",
    '{"event":"recall.settled"}',
    "<b>",
    "$(id)",
    "`id`",
]


def words(dice: random.Random, most: int) -> str:
    return "".join(dice.choice(PARTS) for _ in range(dice.randrange(1, 8)))[:most]


@pytest.mark.full
async def test_hostile_rows(database: str, db: Connection) -> None:
    """Forty rows, any text in any column: each is delivered to its own session and nowhere else,
    and neither logs nor commands are led astray."""
    await hostile_rows(1, 40, database, db)


@pytest.mark.full
@pytest.mark.parametrize("seed", seeds(2, 3))
async def test_many_hostile_rows(seed: int, database: str, db: Connection) -> None:
    """The same, with more of them."""
    await hostile_rows(seed, 300, database, db)


async def hostile_rows(seed: int, count: int, database: str, db: Connection) -> None:
    dice = random.Random(seed)
    made: dict[str, dict[str, Any]] = {}
    while len(made) < count:
        row = {
            "id": words(dice, 600),
            "session_id": words(dice, 600),
            "additional_context_message": words(dice, 600),
            "internal_comment": f"hush {words(dice, 600)}",
            "leased_by": words(dice, 600),
            "last_outcome": words(dice, 600),
            "reason": words(dice, 600),
            "body_hash": words(dice, 600),
        }
        if dice.random() < 0.1:
            row["additional_context_message"] *= (1 << 20) // len(row["additional_context_message"])
        if dice.random() < 0.2:
            # A reference that somebody wrote there: to be polled at the endpoint's own origin, or
            # not at all.
            row["run_reference"] = dice.choice(LOCATIONS).format(port=1) + words(dice, 50)
        sessions = {other["session_id"] for other in made.values()}
        if row["session_id"] not in sessions | {".", ".."} and row["id"] not in made:
            made[row["id"]] = row
    async with Liar(
        lambda request: ok(status="completed") if request.method == "GET" else ok()
    ) as liar:
        settings = SETTINGS | {"max_attempts": 1, "run_timeout": 2}
        async with Daemons({"RECALL_DSN": database, "RECALL_RUN_URL": liar.url}) as daemons:
            over = (
                "select where (select count(*) from session_recalls where status in ('fired', "
                "'failed')) = %s"
            )
            # Half of them for a daemon that writes for machines, half for one that writes for
            # people.
            daemon = await daemons.start(**settings, concurrency=10)
            for row in [*made.values()][: count // 2]:
                await insert(db, **row)
            await eventually(db, over, [count // 2], within=60)
            said_nothing_wrong(daemon)
            assert await daemon.stop() == 0 and daemon.talk == []
            plain = await daemons.start(
                **settings, concurrency=10, log_format="console", ready=False
            )
            for row in [*made.values()][count // 2 :]:
                await insert(db, **row)
            await eventually(db, over, [count], within=60)
            assert await plain.stop() == 0
        # The log for people: a line an event, which begins with its time, and holds nothing but
        # what can be printed.
        assert len(plain.talk) > count and plain.events == []
        for line in plain.talk:
            assert line.isprintable() and re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z \[", line), line
        assert liar.wrong == []
        for request in liar.posts:
            recall = made[request.document["recall"]["id"]]
            key, path = request.headers["idempotency-key"], request.path.split("/")
            assert (
                unquote(key).rpartition(":")[0] == recall["id"]
                or key.rpartition(":")[0] == recall["id"]
            )
            assert (
                path[:2] == ["", "sessions"]
                and path[3:] == ["run"]
                and unquote(path[2]) == recall["session_id"]
            )
            assert request.document["session_id"] == recall["session_id"]
            assert request.document["user_message"] == recall["additional_context_message"]
            assert b"hush" not in request.body
        called = {request.document["recall"]["id"] for request in liar.posts}
        assert called >= {id for id, row in made.items() if "run_reference" not in row}
        for request in liar.heard:
            assert request.method == "POST" or request.headers["idempotency-key"]
    await asyncio.to_thread(commands_are_not_led_astray, database, made, dice)


def commands_are_not_led_astray(
    database: str, made: Mapping[str, Mapping[str, Any]], dice: random.Random
) -> None:
    """list, show, why: in a pipe and on a terminal, of these rows; each prints text that can be
    read, and JSON holds what the rows hold."""

    def printable(text: str) -> bool:
        return all(line.isprintable() for line in SGR.sub("", text).split("\n"))

    shown = operate(database, "list", "--limit", "1000", "--json").document
    assert {row["id"]: row["additional_context_message"] for row in shown} == {
        id: row["additional_context_message"] for id, row in made.items()
    }
    for columns in (None, 80):
        said = operate(database, "list", "--limit", "1000", columns=columns)
        assert (
            said.status == 0
            and printable(said.out)
            and printable(said.err)
            and len(said.out.splitlines()) == len(made) + 1
        )
        for id in dice.sample(sorted(made), 6):
            for command in ("show", "why", "cancel"):
                said = operate(database, command, "--", id, columns=columns)
                assert said.status in (0, 1) and printable(said.out) and printable(said.err), (
                    command,
                    id,
                    said,
                )
                assert "Traceback" not in said.err
            assert printable(
                operate(database, "list", "--session", made[id]["session_id"], columns=columns).out
            )

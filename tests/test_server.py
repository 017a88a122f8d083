"""The small HTTP server, over raw sockets: in order, within its limits, and never longer than its
caller stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from recall_worker.protocols import server as room
from recall_worker.protocols.server import Reply, Request, ServerConnection

PATIENCE = 20.0
Ask = Callable[[bytes], Awaitable[bytes]]


class Handler:
    """Answers with what it was asked; `/wait` when it is let go; `/break` breaks."""

    def __init__(self) -> None:
        self.seen: list[Request] = []
        self.go, self.entered, self.left = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, request: Request) -> Reply:
        self.seen.append(request)
        if request.path == "/break":
            raise RuntimeError("broken")
        if request.path == "/wait":
            self.entered.set()
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.left.set()
                raise
        return Reply(200, f"{request.method} {request.path} {request.body.decode()}".encode())


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture(params=[1000])
async def port(handler: Handler, request: pytest.FixtureRequest) -> AsyncIterator[int]:
    """A server that takes bodies of so many octets (0: none)."""
    listening = await asyncio.get_running_loop().create_server(
        lambda: ServerConnection(handler, body_most=request.param), "127.0.0.1", 0
    )
    yield listening.sockets[0].getsockname()[1]
    listening.close()


async def asked(port: int, *pieces: bytes) -> bytes:
    """All that is answered to these bytes, sent one after the other, until the server hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(PATIENCE):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            return await reader.read()
    finally:
        writer.close()


LAST = b"connection: close\r\n\r\n"


async def test_requests_are_answered_in_order(port: int, handler: Handler) -> None:
    """Also where they come before the first is answered, and whatever their bodies are made of."""
    sent = (
        b"POST /a HTTP/1.1\r\ncontent-length: 3\r\n\r\none"
        b"POST /b?x=y HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3\r\ntwo\r\n0\r\n\r\n"
        b"GET http://host/c%2F HTTP/1.1\r\n" + LAST
    )
    for pieces in ((sent,), tuple(sent[at : at + 7] for at in range(0, len(sent), 7))):
        answers = (await asked(port, *pieces)).split(b"HTTP/1.1 200 OK\r\n")[1:]
        assert [answer.partition(b"\r\n\r\n")[2] for answer in answers] == [
            b"POST /a one",
            b"POST /b two",
            b"GET /c%2F ",
        ]
        assert b"Server: recall-worker\r\n" in answers[0]
        assert b"Connection: keep-alive\r\n" in answers[0]
        assert b"Connection: close\r\n" in answers[2]


async def test_a_head_alone(port: int) -> None:
    """HEAD gets the length of what GET gets, and nothing of it."""
    said = await asked(port, b"HEAD /a HTTP/1.1\r\n" + LAST)
    assert b"Content-Length: 8\r\n" in said and said.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"garbage\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /" + b"x" * room.HEAD_MOST, 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 1001\r\n\r\n" + b"x" * 1001, 413),
        (b"GET /break HTTP/1.1\r\n" + LAST, 500),
    ],
    ids=["garbage", "TLS", "a header", "a long head", "a long body", "a defect"],
)
async def test_what_can_not_be_answered(
    port: int, sent: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The status says why; only a defect of our own is logged."""
    said = await asked(port, sent)
    assert said.startswith(f"HTTP/1.1 {status} ".encode()) and b"Connection: close\r\n" in said
    assert bool(caplog.records) is (status == 500)


async def test_a_caller_who_disconnects(port: int, handler: Handler) -> None:
    """Its request is given up."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /wait HTTP/1.1\r\n\r\n")
    await asyncio.wait_for(handler.entered.wait(), PATIENCE)
    writer.close()
    await asyncio.wait_for(handler.left.wait(), PATIENCE)


async def test_a_body_that_waits_to_be_asked_for(port: int) -> None:
    """`Expect: 100-continue` is answered first, as curl sends it with long bodies."""
    head = b"POST /a HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 3\r\n" + LAST
    said = await asked(port, head, b"one")
    assert said.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert said.endswith(b"POST /a one")


async def test_a_change_of_protocols_is_not_made(port: int) -> None:
    """Who offers one is answered as others are."""
    said = await asked(port, b"GET /a HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200 OK\r\n") and b"Connection: close\r\n" in said


@pytest.mark.parametrize("port", [0], indirect=True)
async def test_where_no_bodies_are_read(port: int, handler: Handler) -> None:
    """A request is answered when its head is there, and is the last one."""
    said = await asked(port, b"GET /a HTTP/1.1\r\ncontent-length: 1000000\r\n\r\n")
    assert said.endswith(b"GET /a ") and b"Connection: close\r\n" in said
    said = await asked(port, b"GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\n")
    assert said.count(b"HTTP/1.1 200 OK") == 1 and len(handler.seen) == 2


async def test_an_idle_connection_is_closed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, before a request and after one."""
    monkeypatch.setattr(room, "IDLE_MOST", 0.1)
    assert await asked(port) == b""
    assert (await asked(port, b"GET /a HTTP/1.1\r\n\r\n")).endswith(b"GET /a ")

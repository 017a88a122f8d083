"""The transport beside peers that do harm, or that are merely strange: what a call ends as, what it
costs others, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import pytest

from recall_worker.protocols import connection as room
from recall_worker.protocols import http
from recall_worker.protocols.answer import AnswerReader
from recall_worker.protocols.http import LIMIT, Answer, HttpClient, NoAnswer
from recall_worker.settings import Settings

from .support.flood import ENDLESS, flooding
from .support.peer import BODY, OK, PATIENCE, Conn, Peer, Posting, again, kept

LARGE = b'"' + b"x" * (4 << 20) + b'"'
CHUNKED = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    b'6;q=1\r\n{"a":"\r\n3\r\nb"}\r\n0\r\nx-sum: 1\r\n\r\n'
)
REFUSED = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 9\r\n\r\ntoo large"


@pytest.fixture
async def wire() -> AsyncIterator[HttpClient]:
    """The transport, as a protocol has it."""
    made = HttpClient(Settings())
    yield made
    await made.close()


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """A server to be played by hand."""
    with Peer() as played:
        yield played


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- the names alone


# --- answers that break off, or are too much ------------------------------------------------------


@pytest.mark.parametrize("ending", ["fin", "rst"])
@pytest.mark.parametrize("sent", [OK, CHUNKED], ids=["length", "chunked"])
async def test_cut_after_any_byte(wire: HttpClient, sent: bytes, ending: str) -> None:
    """The end of the connection, wherever in an answer it comes, makes no success of it; the
    request was sent, once."""
    with Peer() as peer:
        for cut in range(len(sent) + 1):
            posting = Posting(wire, peer.url)
            conn = await peer.accept()
            await conn.request()
            await conn.send(sent[:cut])
            if ending == "rst" and cut == len(sent):
                await posting.sent.wait()
                await asyncio.wait({posting.task}, timeout=PATIENCE)  # RST may overtake the bytes.
            conn.reset() if ending == "rst" else conn.close()
            end = await posting.ends()
            assert isinstance(end, Answer) is (cut == len(sent)), (cut, end)
            assert isinstance(end, Answer) or end.sent
        assert len(peer.conns) == len(sent) + 1
        assert (await peer.seen()).count(BODY) == len(sent) + 1


@pytest.mark.parametrize(
    ("length", "answered"), [(1, b"{"), (2, b"{}"), (3, None)], ids=["smaller", "right", "larger"]
)
async def test_a_length_that_is_not_the_bodys(
    wire: HttpClient, peer: Peer, length: int, answered: bytes | None
) -> None:
    """What is announced is read: more than that spoils the connection, less is no answer."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    await conn.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n{}" % length)
    if answered is None:
        conn.close()
        await posting.unanswered(sent=True)
    else:
        assert (await posting.answered()).body == answered
    if length != 2:
        await kept(wire, peer)
        assert len(peer.conns) == 2


@pytest.mark.parametrize("kind", ["head", "nothing"])
async def test_a_half_closed_peer(wire: HttpClient, peer: Peer, kind: str) -> None:
    """It says that it sends no more, and goes on reading: nothing can come."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    if kind == "head":
        await conn.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
    conn.end()
    await posting.unanswered(sent=True)
    assert await conn.rest() == b""


async def test_a_head_that_comes_byte_by_byte_without_end(wire: HttpClient, peer: Peer) -> None:
    """It takes until the run's time is up, or until it is too long; others are answered."""
    posting = Posting(wire, peer.url, timeout=1.5)
    conn = await peer.accept()
    await conn.request()

    async def trickle() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await conn.send(b"a")
                await asyncio.sleep(0)

    await conn.send(b"HTTP/1.1 200 OK\r\nx: ")
    trickling = asyncio.create_task(trickle())
    with Peer() as other:
        await kept(wire, other)
    assert not posting.task.done()
    await posting.unanswered(sent=True)
    await trickling


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 30 + OK, "interim answers without end"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 30, "interim answers without end"),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", "HTTP 101"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: %s\r\n" % (b"y" * 1000) * 66 + b"\r\n", "head is longer"),
    ],
    ids=["103", "100", "101", "head"],
)
async def test_too_much_before_an_answer(
    wire: HttpClient, peer: Peer, sent: bytes, words: str
) -> None:
    """The reason says what was too much; the connection is given up."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    with contextlib.suppress(ConnectionError):
        await conn.send(sent)
    assert words in (await posting.unanswered(sent=True)).reason
    assert await conn.rest() == b""


async def test_a_head_of_64_kib(wire: HttpClient, peer: Peer) -> None:
    """Large headers of cookies and policies are read."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    fields = b"".join(b"x-%d: %s\r\n" % (n, b"y" * 1000) for n in range(63))
    await conn.send(OK.replace(b"\r\n\r\n", b"\r\n" + fields + b"\r\n", 1))
    answer = await posting.answered()
    assert answer.headers["X-62"] == "y" * 1000
    await again(wire, peer, conn)


# --- large requests -------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["hangs up", "resets", "reads nothing", "reads on"])
async def test_an_answer_before_the_request_is_whole(wire: HttpClient, then: str) -> None:
    """A server that refuses a long request while it comes: its answer is read, however it treats
    the rest; the connection is not used again."""
    for _ in range(5):
        with Peer() as peer:
            posting = Posting(wire, peer.url, body=LARGE)
            conn = await peer.accept()
            await conn.some()
            await conn.send(REFUSED)
            if then == "hangs up":
                conn.close()  # With bytes unread, so that a reset follows the answer.
            elif then == "resets":
                await asyncio.wait({posting.task}, timeout=PATIENCE)
                conn.reset()
            elif then == "reads on":
                await conn.rest()
            answer = await posting.answered()
            assert (answer.status, answer.body) == (413, b"too large")
            if then in ("reads nothing", "reads on"):
                assert len(conn.seen) < len(LARGE)


async def test_a_peer_that_reads_slowly(wire: HttpClient, peer: Peer) -> None:
    """A long body waits for it, and is written when it was read; its pieces are released."""
    written = asyncio.Event()
    pieces: list[bytes | memoryview] = [LARGE, memoryview(LARGE)[1:]]
    size = sum(map(len, pieces))
    sent = asyncio.Event()
    call = asyncio.create_task(
        wire.post(peer.url, dict, pieces, PATIENCE, sent.set, on_written=written.set)
    )
    conn = await peer.accept()
    await sent.wait()
    for _ in range(50):
        await asyncio.sleep(0)
    assert not written.is_set()
    request = await conn.request()
    assert len(request.partition(b"\r\n\r\n")[2]) == size
    await asyncio.wait_for(written.wait(), PATIENCE)
    assert pieces == []
    await conn.send(OK)
    assert isinstance(await call, Answer)


async def test_hanging_up_in_the_middle_of_a_long_request(wire: HttpClient, peer: Peer) -> None:
    """Without an answer it is one that may have run."""
    posting = Posting(wire, peer.url, body=LARGE)
    conn = await peer.accept()
    await conn.some()
    conn.close()
    assert "broke off" in (await posting.unanswered(sent=True)).reason


# --- the loop belongs to all ----------------------------------------------------------------------


async def latencies(wire: HttpClient, url: str, count: int) -> list[float]:
    """Seconds that calls took, one after the other."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        assert isinstance(await Posting(wire, url + "ok").ends(), Answer)
        found.append(time.perf_counter() - began)
    return found


class Watch:
    """The longest time for which the loop did not turn, in seconds of this thread's CPU: those in
    which the machine serves others do not count."""

    longest = 0.0

    async def run(self) -> None:
        while True:
            began = time.thread_time()
            await asyncio.sleep(0.001)
            self.longest = max(self.longest, time.thread_time() - began)


@pytest.mark.parametrize("kind", ENDLESS)
async def test_thirty_peers_without_end(wire: HttpClient, kind: str) -> None:
    """They never hold the loop, and calls beside them are answered as if they were not there (the
    bounds are generous: the machine has others to serve)."""
    async with flooding() as url, flooding() as healthy:
        await latencies(wire, healthy, 50)
        alone = statistics.median(await latencies(wire, healthy, 100))
        watch, over = Watch(), asyncio.Event()

        async def call_again() -> None:
            while not over.is_set():
                end = await wire.post(url + kind, dict, BODY, 0.5, lambda: None)
                assert isinstance(end, NoAnswer) and end.sent, end
                await asyncio.sleep(0.05)

        bad = [asyncio.create_task(call_again()) for _ in range(30)]
        watching = asyncio.create_task(watch.run())
        beside = statistics.median(await latencies(wire, healthy, 200))
        watching.cancel()
        over.set()
        await asyncio.gather(*bad)
    assert watch.longest < 0.1
    assert beside < max(5 * alone, 0.05), (alone, beside)


@pytest.mark.slow
async def test_a_large_answer_is_read_in_turn(wire: HttpClient, peer: Peer) -> None:
    """32 MiB are read to their end while the loop goes on turning."""
    size = 32 * LIMIT
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    watch = Watch()
    watching = asyncio.create_task(watch.run())
    await conn.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
    for _ in range(size // LIMIT - 1):
        await conn.send(b"x" * LIMIT)
    await conn.send(b"x" * (LIMIT - 6) + b"ending")
    answer = await posting.answered()
    watching.cancel()
    assert answer.truncated and answer.body == b"x" * LIMIT
    assert answer.tail == b"x" * ((1 << 16) - 6) + b"ending"
    assert watch.longest < 0.1
    await again(wire, peer, conn)


# --- what is left behind --------------------------------------------------------------------------


async def fails_refused(wire: HttpClient, peer: Peer) -> None:
    with Peer() as gone:
        pass
    await Posting(wire, gone.url).unanswered(sent=False)


async def fails_hanging_up(wire: HttpClient, peer: Peer) -> None:
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    conn.close()
    await posting.unanswered(sent=True)


async def fails_garbage(wire: HttpClient, peer: Peer) -> None:
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    await conn.send(b"garbage\r\n\r\n")
    await posting.unanswered(sent=True)


async def fails_timeout(wire: HttpClient, peer: Peer) -> None:
    posting = Posting(wire, peer.url, timeout=0.05)
    await (await peer.accept()).request()
    await posting.unanswered(sent=True)


async def fails_cancelled(wire: HttpClient, peer: Peer) -> None:
    posting = Posting(wire, peer.url, body=LARGE)
    await (await peer.accept()).some()
    posting.task.cancel()
    await asyncio.wait({posting.task})


async def fails_early(wire: HttpClient, peer: Peer) -> None:
    posting = Posting(wire, peer.url, body=LARGE)
    conn = await peer.accept()
    await conn.some()
    await conn.send(REFUSED)
    await posting.answered()


async def fails_handshake(wire: HttpClient, peer: Peer) -> None:
    posting = Posting(wire, f"https://127.0.0.1:{peer.port}/")
    conn = await peer.accept()
    await conn.some()
    await conn.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await posting.unanswered(sent=False)


async def fails_name(wire: HttpClient, peer: Peer) -> None:
    await Posting(wire, "http://nowhere.invalid/").unanswered(sent=False)


FAILING = {name: made for name, made in sorted(globals().items()) if name.startswith("fails_")}


@pytest.mark.parametrize("name", FAILING)
async def test_nothing_is_left_behind(wire: HttpClient, name: str) -> None:
    """After many calls that fail, as many descriptors and tasks are there as before."""
    failing: Callable[[HttpClient, Peer], Awaitable[None]] = FAILING[name]
    with Peer() as peer:
        await failing(wire, peer)  # Threads and their like.
        await settle(peer)
        before = descriptors(), len(asyncio.all_tasks())
        for _ in range(20):
            await failing(wire, peer)
        await settle(peer)
        assert (descriptors(), len(asyncio.all_tasks())) <= before


async def test_nothing_waits_for_a_collection(wire: HttpClient, peer: Peer) -> None:
    """Calls that were made, and connections that were closed, are freed by themselves."""
    conn = await kept(wire, peer)
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            await again(wire, peer, conn)
        conn.close()
        for _ in range(10):
            await fails_hanging_up(wire, peer)
            await fails_garbage(wire, peer)
            await fails_early(wire, peer)
        await wire.close()
        left = [one for one in gc.get_objects() if isinstance(one, AnswerReader | room.Connection)]
    finally:
        gc.enable()
    assert len(left) <= 2, left


async def settle(peer: Peer) -> None:
    """Close this side's ends, and give the loop its turns."""
    while peer.conns:
        peer.conns.pop().close()
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("body", [BODY, LARGE], ids=["short", "long"])
async def test_cancelled_at_any_moment(body: bytes) -> None:
    """The connection is hung up on, wherever the call is; no descriptor and no task is left."""
    for turns in range(0, 40, 3):
        wire = HttpClient(Settings())
        with Peer() as peer:
            before = descriptors(), len(asyncio.all_tasks())
            posting = Posting(wire, peer.url, body=body)
            for _ in range(turns):
                await asyncio.sleep(0)
            posting.task.cancel()
            await asyncio.wait({posting.task})
            for _ in range(5):
                await asyncio.sleep(0)
            assert (descriptors(), len(asyncio.all_tasks())) == before
            arrived = await peer.seen()
            assert bool(arrived) is (posting.said_sent == 1)
        await wire.close()


# --- connections that are kept --------------------------------------------------------------------


async def serve(peer: Peer, answer: bytes = OK) -> None:
    """Answer every request of every connection."""

    async def answers(conn: Conn) -> None:
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                await conn.request()
                await conn.send(answer)

    async with asyncio.TaskGroup() as group:
        while True:
            group.create_task(answers(await peer.accept()))


async def test_connections_are_used_again(wire: HttpClient, peer: Peer) -> None:
    """As many as are needed at once, and never one more."""
    serving = asyncio.create_task(serve(peer))
    for _ in range(20):
        await Posting(wire, peer.url).answered()
    assert len(peer.conns) == 1
    for _ in range(10):
        for posting in [Posting(wire, peer.url) for _ in range(5)]:
            await posting.answered()
    assert len(peer.conns) == 5
    serving.cancel()
    await asyncio.wait({serving})


async def test_idle_connections_are_closed(
    wire: HttpClient, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a server would close them; and none is used that is older."""
    monkeypatch.setattr(http, "KEEP_ALIVE", 0.2)
    conn = await kept(wire, peer)
    began = time.perf_counter()
    assert await conn.rest() == b""
    assert 0.15 < time.perf_counter() - began < 5
    await kept(wire, peer)
    assert len(peer.conns) == 2


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_question_is_repeated_once(wire: HttpClient, peer: Peer, method: str) -> None:
    """On a kept connection that the server ends as the question comes: it changes nothing."""
    conn = await kept(wire, peer)
    call = asyncio.create_task(wire.ask(method, peer.url, {}))
    await conn.some()
    conn.close()
    other = await peer.accept()
    assert (await other.some()).startswith(method.encode() + b" /run HTTP/1.1\r\n")
    await other.send(OK)
    assert isinstance(await call, Answer)
    repeated = asyncio.create_task(wire.ask(method, peer.url, {}))
    await other.some()
    other.close()
    third = await peer.accept()
    await third.some()
    third.close()
    end = await repeated
    assert isinstance(end, NoAnswer) and end.sent and len(peer.conns) == 3


# --- what a caller can have -----------------------------------------------------------------------


async def test_the_moments_of_a_call(wire: HttpClient, peer: Peer) -> None:
    """A connection is open, headers are made, the request leaves, is written, is answered."""
    moments: list[Any] = []
    headed = asyncio.Event()

    async def before() -> bool:
        moments.append("before")
        return True

    def headers() -> dict[str, str]:
        moments.append("headers")
        return {}

    def head(status: int, fields: Mapping[str, str]) -> None:
        moments.append((status, fields["Content-Type"]))
        headed.set()

    call = asyncio.create_task(
        wire.post(
            peer.url,
            headers,
            BODY,
            PATIENCE,
            lambda: moments.append("sent"),
            before_sent=before,
            on_written=lambda: moments.append("written"),
            on_head=head,
        )
    )
    conn = await peer.accept()
    await conn.request()
    await conn.send(OK[:-1])
    await headed.wait()
    assert not call.done()
    await conn.send(OK[-1:])
    assert isinstance(await call, Answer)
    assert moments == ["before", "headers", "sent", "written", (200, "application/json")]


async def test_what_is_held_back_is_not_sent(wire: HttpClient, peer: Peer) -> None:
    """Its connection is kept for the next."""

    async def hold() -> bool:
        return False

    posting = Posting(wire, peer.url, before_sent=hold)
    conn = await peer.accept()
    assert (await posting.unanswered(sent=False)).reason == "nothing was sent: it was held back"
    await again(wire, peer, conn)
    assert conn.seen.count(b"POST ") == 1


@pytest.mark.parametrize(
    ("url", "line", "host"),
    [
        ("http://127.0.0.1:{port}", "/", "127.0.0.1:{port}"),
        ("HTTP://127.0.0.1:{port}?a=b", "/?a=b", "127.0.0.1:{port}"),
        ("http://LocalHost:{port}/a?b#c", "/a?b", "LocalHost:{port}"),
        ("http://127.0.0.1:{port}/ä b", "/%C3%A4%20b", "127.0.0.1:{port}"),
        ("http://127.0.0.1:{port}/a\r\nx: y", "/a%0D%0Ax:%20y", "127.0.0.1:{port}"),
    ],
    ids=["no path", "no path, a query", "fragment", "no ASCII", "a line break"],
)
async def test_addresses(wire: HttpClient, peer: Peer, url: str, line: str, host: str) -> None:
    """What is asked for, and of whom."""
    posting = Posting(wire, url.format(port=peer.port))
    conn = await peer.accept()
    first, second, *_ = (await conn.request()).decode().split("\r\n")
    await conn.send(OK)
    await posting.answered()
    assert first == f"POST {line} HTTP/1.1"
    assert second == f"Host: {host.format(port=peer.port)}"


async def test_an_address_of_ipv6(wire: HttpClient) -> None:
    """In brackets, in the header too."""
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with listener:
        port = listener.getsockname()[1]
        posting = Posting(wire, f"http://[::1]:{port}/")
        listener.setblocking(False)
        sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        conn = Conn(sock)
        assert f"\r\nHost: [::1]:{port}\r\n".encode() in await conn.request()
        await conn.send(OK)
        await posting.answered()
        conn.close()


async def test_headers_of_the_callers_own(wire: HttpClient, peer: Peer) -> None:
    """They take the place of the usual ones, in any case; a question has no length."""
    call = asyncio.create_task(wire.ask("GET", peer.url, {"ACCEPT": "text/plain", "x-key": "ä"}))
    conn = await peer.accept()
    request = await conn.request()
    await conn.send(OK)
    await call
    assert request.lower().count(b"accept:") == 1 and b"ACCEPT: text/plain\r\n" in request
    assert "x-key: ä\r\n".encode() in request and b"content-" not in request.lower()
    posting = Posting(wire, peer.url)
    assert b"\r\nContent-Type: application/json\r\n" in await conn.request()
    await conn.send(OK)
    await posting.answered()


@pytest.mark.parametrize("name", ["", "a b", "ä", "a:b"], ids=repr)
async def test_names_of_headers_that_are_none(wire: HttpClient, peer: Peer, name: str) -> None:
    """Nothing is sent."""
    await Posting(wire, peer.url, headers=lambda: {name: "x"}).unanswered(sent=False)
    await wire.close()
    assert await peer.seen() == b""


# --- connecting -----------------------------------------------------------------------------------


async def test_calls_share_a_question_for_a_name(
    wire: HttpClient, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver takes a thread for each question: many calls at once ask one."""
    loop = asyncio.get_running_loop()
    asked, answering = 0, asyncio.Event()

    async def resolve(host: str, port: int, **_: Any) -> list[room.Address]:
        nonlocal asked
        asked += 1
        await answering.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", peer.port))]

    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    serving = asyncio.create_task(serve(peer))
    postings = [Posting(wire, f"http://agent.test:{peer.port}/") for _ in range(10)]
    cancelled = Posting(wire, f"http://agent.test:{peer.port}/")
    for _ in range(5):
        await asyncio.sleep(0)
    cancelled.task.cancel()
    answering.set()
    for posting in postings:
        await posting.answered()
    assert asked == 1
    serving.cancel()
    await asyncio.wait({serving})


async def test_the_next_address_is_tried(peer: Peer) -> None:
    """Where the first refuses, at once; where it is silent, beside it."""

    def at(port: int) -> room.Address:
        return (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))

    with Peer() as gone:
        pass
    began = time.perf_counter()
    (await room._first([at(gone.port), at(peer.port)])).close()
    assert time.perf_counter() - began < room.NEXT_ADDRESS_AFTER
    with Peer(backlog=0) as silent, contextlib.ExitStack() as crowd:
        for _ in range(4):
            waiting = crowd.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", silent.port))
        async with asyncio.timeout(PATIENCE):
            found = await room._first([at(silent.port), at(gone.port), at(peer.port)])
        assert found.getpeername()[1] == peer.port
        found.close()
        await asyncio.sleep(0)
    with pytest.raises(ConnectionRefusedError):
        await room._first([at(gone.port), at(gone.port)])


def test_families_take_turns() -> None:
    """The resolver's first stays first."""
    six, four = socket.AF_INET6, socket.AF_INET
    given = [(six, n) for n in range(3)] + [(four, n) for n in range(2)]
    assert room._interleaved(given) == [(six, 0), (four, 0), (six, 1), (four, 1), (six, 2)]
    assert room._interleaved([]) == []

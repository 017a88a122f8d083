"""The transport over raw sockets: what became of one request, and whether anything of it was sent.

The peer here is a listening socket that each test plays by hand. It reads every byte that arrives,
so "nothing was sent" is counted and not believed: wherever the wire says so, the peer has seen no
byte of the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from recall_worker.protocols import http as room
from recall_worker.protocols.http import LIMIT, HttpClient, NoAnswer
from recall_worker.settings import Settings

from .support.peer import BODY, CERTIFICATE, KEY, OK, PATIENCE, Peer, Posting, kept


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The certificate of a private authority, as RECALL_CA_FILE has it."""
    file = tmp_path_factory.mktemp("authority") / "ca.pem"
    file.write_text(CERTIFICATE, encoding="ascii")
    return str(file)


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


# --- nothing was sent -----------------------------------------------------------------------------


async def test_refused(wire: HttpClient, peer: Peer) -> None:
    """Nobody listens: nothing was sent."""
    peer.stop()
    end = await Posting(wire, peer.url).unanswered(sent=False)
    assert "no connection" in end.reason


@contextlib.contextmanager
def crowded() -> Iterator[Peer]:
    """A peer that is too full to take another connection."""
    with Peer(backlog=0) as peer, contextlib.ExitStack() as crowd:
        for _ in range(4):
            waiting = crowd.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", peer.port))
        yield peer


async def test_no_connection_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was sent when the time for connecting is over."""
    monkeypatch.setattr(room, "CONNECT_DEADLINE", 0.3)
    wire = HttpClient(Settings())
    with crowded() as peer:
        end = await Posting(wire, peer.url).unanswered(sent=False)
    assert "no connection within 0.3 s" in end.reason
    await wire.close()


async def test_the_runs_time_is_over_before_there_is_a_connection(wire: HttpClient) -> None:
    """The whole call's timeout covers connecting, too: nothing was sent."""
    with crowded() as peer:
        end = await Posting(wire, peer.url, timeout=0.2).unanswered(sent=False)
    assert "no answer within 0.2 s" in end.reason


@pytest.mark.parametrize("ending", ["fin", "rst"])
async def test_the_peer_hangs_up_unread(wire: HttpClient, peer: Peer, ending: str) -> None:
    """A server that hangs up on everybody is tried a few times as long as nothing was sent, and
    never once something was."""

    async def hang_up() -> None:
        while True:
            conn = await peer.accept()
            conn.reset() if ending == "rst" else conn.close()

    hanging_up = asyncio.create_task(hang_up())
    posting = Posting(wire, peer.url)
    end = await posting.ends()
    hanging_up.cancel()
    assert isinstance(end, NoAnswer) and end.reason
    assert 1 <= len(peer.conns) <= room.CONNECTIONS_TRIED


@pytest.mark.parametrize(
    "headers", [{"X": "a\r\nX-Injected: yes"}, {"X\r\nX-Injected": "yes"}, {"X": "a\0b"}], ids=repr
)
async def test_a_header_that_can_not_be_sent(
    wire: HttpClient, peer: Peer, headers: dict[str, str]
) -> None:
    """A line break in a header is refused before anything leaves: no header can be smuggled in."""
    await Posting(wire, peer.url, headers=lambda: headers).unanswered(sent=False)
    await wire.close()
    assert await peer.seen() == b""


@pytest.mark.parametrize("url", ["http://", "no address", "http://127.0.0.1:notaport/"], ids=repr)
async def test_an_address_that_is_none(wire: HttpClient, url: str) -> None:
    """What can't be an address raises nothing and sends nothing."""
    await Posting(wire, url).unanswered(sent=False)


# --- TLS ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def secured(tmp_path: Path, seen: list[bytes]) -> AsyncIterator[int]:
    """A TLS server on 127.0.0.1 that answers each request; yields its port. `seen` takes what came
    through the handshake."""
    file = tmp_path / "server.pem"
    file.write_text(KEY + CERTIFICATE, encoding="ascii")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                seen.append(head + await reader.readexactly(len(BODY)))
                writer.write(OK)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize("given", ["RECALL_CA_FILE", "system"])
async def test_an_authority_that_is_trusted(
    tmp_path: Path, authority: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With RECALL_CA_FILE a private endpoint is trusted, and so it is by the system's authorities;
    two requests go over one connection."""
    seen: list[bytes] = []
    if given == "system":
        monkeypatch.setenv("SSL_CERT_FILE", authority)
    wire = HttpClient(
        Settings(run_url="https://localhost", ca_file=None if given == "system" else authority)
    )
    async with secured(tmp_path, seen) as port:
        for _ in range(2):
            assert (await Posting(wire, f"https://127.0.0.1:{port}/run").answered()).status == 200
        await wire.close()
    assert len(seen) == 2 and all(request.endswith(BODY) for request in seen)


@pytest.mark.parametrize("wrong", ["authority", "name"])
async def test_a_certificate_that_is_not_trusted(
    tmp_path: Path, authority: str, wrong: str
) -> None:
    """An unknown authority, or the certificate of another host: nothing was sent, and the reason
    names the certificate."""
    seen: list[bytes] = []
    wire = HttpClient(
        Settings(run_url="https://localhost", ca_file=None if wrong == "authority" else authority)
    )
    host = "127.0.0.1" if wrong == "authority" else "localhost"
    async with secured(tmp_path, seen) as port:
        end = await Posting(wire, f"https://{host}:{port}/run").unanswered(sent=False)
        await wire.close()
    assert "certificate" in end.reason and seen == []


@pytest.mark.parametrize("peer_does", ["speaks plainly", "hangs up", "resets"])
async def test_a_handshake_that_fails(peer: Peer, wire: HttpClient, peer_does: str) -> None:
    """The peer speaks no TLS, or hangs up in the handshake: nothing of the request was sent."""
    posting = Posting(wire, f"https://127.0.0.1:{peer.port}/run")
    conn = await peer.accept()
    if peer_does == "speaks plainly":
        await conn.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
    conn.reset() if peer_does == "resets" else conn.close()
    await posting.unanswered(sent=False)


# --- it was sent ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["fin", "rst"])
async def test_the_peer_reads_and_hangs_up(wire: HttpClient, peer: Peer, ending: str) -> None:
    """A server that took the request and died: it was sent, once, and nobody posts it again."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    conn.reset() if ending == "rst" else conn.close()
    end = await posting.unanswered(sent=True)
    assert "broke off" in end.reason
    assert (await peer.seen()).count(BODY) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 100 Continue\r\nset-cookie: sesame=1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nset-cookie: sesame=1\r\n",
        b"HTTP/1.1 200 OK\r\nset-cookie: sesame=1\r\nx: y",
        b"HTTP/1.1 200 OK\r\nset-cookie: sesame=1\r\ncontent-length: 9\r\n\r\nsesame",
    ],
    ids=["interim", "no end", "half a line", "half a body"],
)
async def test_a_head_that_breaks_off_is_not_quoted(
    wire: HttpClient, peer: Peer, data: bytes
) -> None:
    """What stood in the head of a broken answer, such as another user's cookie, does not come into
    a reason, and so not into a row or a log."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    await conn.send(data)
    conn.close()
    end = await posting.unanswered(sent=True)
    assert "sesame" not in end.reason and len(end.reason) < 200


CUT = {
    "no status": b"HTTP/1.1",
    "half the head": b"HTTP/1.1 200 OK\r\ncontent-le",
    "no body": b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n",
    "half the body": b'HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"a":',
    "half the chunks": b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{"a":\r\n',
    "only interim": b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n",
}


@pytest.mark.parametrize("ending", ["fin", "rst"])
@pytest.mark.parametrize("data", CUT.values(), ids=list(CUT))
async def test_an_answer_that_breaks_off(
    wire: HttpClient, peer: Peer, data: bytes, ending: str
) -> None:
    """Half of a good answer is none: the request was sent and may have run."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    await conn.send(data)
    conn.reset() if ending == "rst" else conn.close()
    await posting.unanswered(sent=True)
    assert (await peer.seen()).count(BODY) == 1


GARBAGE = {
    "binary": b"\x00\x01\x02 hello\r\n\r\n",
    "a banner": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a page without a head": b"<html>hello</html>\r\n\r\n",
    "a status that is no number": b"HTTP/1.1 abc OK\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "a negative length": b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\n{}",
    "chunks that are none": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "a header without end": b"HTTP/1.1 200 OK\r\nx: " + b"a" * 200_000,
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=list(GARBAGE))
async def test_an_answer_that_is_no_http(wire: HttpClient, peer: Peer, data: bytes) -> None:
    """Garbage after the request raises nothing: it was sent, and no answer to it came."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    with contextlib.suppress(ConnectionError):
        await conn.send(data)
    conn.close()
    end = await posting.unanswered(sent=True)
    assert "\n" not in end.reason and len(end.reason) < 500


@pytest.mark.parametrize("status", [409, 422, 500, 503])
async def test_a_refusal_says_enough_with_its_status(
    wire: HttpClient, peer: Peer, status: int
) -> None:
    """An error whose body breaks off is still the error that its status says."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    await conn.send(
        f"HTTP/1.1 {status} Status\r\ncontent-length: 100\r\nretry-after: 7\r\n\r\n{{".encode()
    )
    conn.close()
    answer = await posting.answered()
    assert (answer.status, answer.headers["Retry-After"]) == (status, "7")


@pytest.mark.parametrize("until", ["request", "head", "body"])
async def test_timeout_once_sent(wire: HttpClient, peer: Peer, until: str) -> None:
    """The time for the run covers everything until the last byte of the answer; then the connection
    is given up."""
    posting = Posting(wire, peer.url, timeout=0.4)
    conn = await peer.accept()
    await conn.request()
    if until != "request":
        await conn.send(
            b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n" + (b"" if until == "head" else b"\r\n{")
        )
    end = await posting.unanswered(sent=True)
    assert end.reason == "no answer within 0.4 s"
    assert await conn.rest() == b""


async def test_an_answer_in_good_time(wire: HttpClient, peer: Peer) -> None:
    """Byte by byte is slow and whole: an answer."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    for byte in OK:
        await conn.send(bytes([byte]))
        await asyncio.sleep(0)
    answer = await posting.answered()
    assert (answer.status, answer.body, answer.truncated) == (200, b"{}", False)


# --- kept connections -----------------------------------------------------------------------------


async def test_a_connection_is_kept(wire: HttpClient, peer: Peer) -> None:
    """The next request goes over the connection of the last."""
    conn = await kept(wire, peer)
    posting = Posting(wire, peer.url)
    await conn.request()
    await conn.send(OK)
    await posting.answered()
    await wire.close()
    assert (await peer.seen()).count(b"POST ") == 2 and len(peer.conns) == 1


@pytest.mark.parametrize("moment", ["before the call", "in the call"])
@pytest.mark.parametrize("ending", ["fin", "rst"])
async def test_a_kept_connection_that_was_closed_right_before(
    wire: HttpClient, peer: Peer, ending: str, moment: str
) -> None:
    """The server hangs up in the moment before the next request: exactly one request arrives, on
    another connection, and is answered."""
    conn = await kept(wire, peer)

    def hang_up() -> dict[str, str]:
        conn.reset() if ending == "rst" else conn.close()
        return {}

    # Without a turn of the loop in between: the client has not seen the end when it takes the
    # connection up.
    if moment == "before the call":
        hang_up()
    posting = Posting(wire, peer.url, headers=hang_up)
    fresh = await peer.accept()
    assert (await fresh.request()).endswith(BODY)
    await fresh.send(OK)
    assert (await posting.answered()).status == 200
    await wire.close()
    assert await fresh.rest() == b""
    assert len(peer.conns) == 2


@pytest.mark.parametrize("moment", ["before the call", "in the call"])
@pytest.mark.parametrize("ending", ["fin", "close_notify"])
async def test_a_kept_connection_that_was_closed_right_before_over_tls(
    tmp_path: Path, authority: str, ending: str, moment: str
) -> None:
    """The same behind TLS, whether the server takes its leave or just goes."""
    file = tmp_path / "server.pem"
    file.write_text(KEY + CERTIFICATE, encoding="ascii")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    requests: list[bytes] = []
    go, gone = threading.Event(), threading.Event()

    def serve(listener: socket.socket) -> None:
        for _ in range(2):
            sock, _ = listener.accept()
            sock.settimeout(PATIENCE)
            with context.wrap_socket(sock, server_side=True) as conn:
                data = b""
                while not data.endswith(BODY) and (more := conn.recv(1 << 16)):
                    data += more
                requests.append(data)
                conn.sendall(OK)
                go.wait(PATIENCE)
                if ending == "close_notify":
                    conn.settimeout(0.05)
                    with contextlib.suppress(OSError):  # Nobody answers it in time.
                        conn.unwrap()
            gone.set()

    def hang_up() -> dict[str, str]:
        go.set()
        gone.wait(PATIENCE)  # Blocks the loop, so that it can't have seen the end.
        return {}

    wire = HttpClient(Settings(ca_file=authority))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/run"
        serving = asyncio.create_task(asyncio.to_thread(serve, listener))
        assert (await Posting(wire, url).answered()).status == 200
        if moment == "before the call":
            hang_up()
        assert (await Posting(wire, url, headers=hang_up).answered()).status == 200
        await serving
    await wire.close()
    assert [request.count(BODY) for request in requests] == [1, 1]


STRAY = {
    "a parting 408": (
        b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    ),
    "a 408 that keeps on": b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n",
    "a success": OK.replace(b"{}", b"[]"),
    "half a body": OK[:-1],
    "garbage": b"garbage\r\n\r\n",
}


@pytest.mark.parametrize("moment", ["long before", "before the call", "in the call"])
@pytest.mark.parametrize("data", STRAY.values(), ids=list(STRAY))
async def test_bytes_that_wait_on_an_idle_connection(
    wire: HttpClient, peer: Peer, data: bytes, moment: str
) -> None:
    """What a proxy says on an idle connection is no answer to the next request, which goes over
    another connection."""
    conn = await kept(wire, peer)

    def speak() -> dict[str, str]:
        with contextlib.suppress(OSError):  # It was hung up on for what it said before.
            conn.send_now(data)
        return {}

    if moment != "in the call":
        speak()
    for _ in range(10 if moment == "long before" else 0):
        await asyncio.sleep(0)
    posting = Posting(wire, peer.url, headers=speak if moment == "in the call" else dict)
    fresh = await peer.accept()
    await fresh.request()
    await fresh.send(OK)
    assert (await posting.answered()).body == b"{}"
    await wire.close()
    assert await conn.rest() == b"" and await fresh.rest() == b""


async def test_a_burst_after_an_answer(wire: HttpClient, peer: Peer) -> None:
    """Bytes behind an answer spoil the connection and nothing else."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    await conn.send(OK + OK)
    assert (await posting.answered()).body == b"{}"
    again = Posting(wire, peer.url)
    fresh = await peer.accept()
    await fresh.request()
    await fresh.send(OK.replace(b"{}", b"[]"))
    assert (await again.answered()).body == b"[]"
    assert await conn.rest() == b""


async def test_nothing_listens_any_more_behind_a_kept_connection(
    wire: HttpClient, peer: Peer
) -> None:
    """The server is gone altogether: nothing was sent."""
    conn = await kept(wire, peer)
    peer.stop()
    conn.close()
    await Posting(wire, peer.url).unanswered(sent=False)


# --- cancelling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reused", [False, True], ids=["fresh connection", "kept connection"])
async def test_cancelled_after_any_number_of_turns(peer: Peer, reused: bool) -> None:
    """Wherever a call is cancelled, it was said to be sent exactly if bytes of it arrived."""
    said = set()
    for turns in range(16):
        wire = HttpClient(Settings())
        before = 0
        if reused:
            before = len((await kept(wire, peer)).seen)
        posting = Posting(wire, peer.url)
        for _ in range(turns):
            await asyncio.sleep(0)
        posting.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await posting.task
        await wire.close()
        arrived = len(await peer.seen()) - before
        assert (posting.said_sent == 1) is (arrived > 0)
        said.add(posting.said_sent)
        while peer.conns:
            peer.conns.pop().close()
    assert said == {0, 1}


async def test_cancelled_in_mid_run(wire: HttpClient, peer: Peer) -> None:
    """A call that is aborted hangs up at once, so that the API can stop the run; the connection is
    not used again."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    posting.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await posting.task
    assert posting.said_sent == 1
    assert await conn.rest() == b""
    await kept(wire, peer)
    assert len(peer.conns) == 2


async def test_closing_breaks_open_calls_off(wire: HttpClient, peer: Peer) -> None:
    """A wire that is closed leaves no call hanging, and the peer sees the end."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    await wire.close()
    await posting.unanswered(sent=True)
    assert await conn.rest() == b""


# --- what is sent, and what is read ---------------------------------------------------------------


async def test_what_is_sent(wire: HttpClient, peer: Peer) -> None:
    """The address goes as it is given, the body as it is, the headers once each; nothing asks for
    packing or an upgrade."""
    url = f"http://127.0.0.1:{peer.port}/%41/sessions/a%2F..%2Fb%3Fc%23d%252e/run?x=%20"
    posting = Posting(
        wire, url, headers=lambda: {"Content-Type": "application/json", "Idempotency-Key": "r1:1"}
    )
    conn = await peer.accept()
    head, _, body = (await conn.request()).partition(b"\r\n\r\n")
    await conn.send(OK)
    await posting.answered()
    line, *fields = head.decode().split("\r\n")
    assert line == "POST /%41/sessions/a%2F..%2Fb%3Fc%23d%252e/run?x=%20 HTTP/1.1"
    headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
    assert len(headers) == len(fields)
    assert headers == {
        "host": f"127.0.0.1:{peer.port}",
        "accept": "application/json",
        "accept-encoding": "identity",
        "user-agent": "recall-worker",
        "content-type": "application/json",
        "idempotency-key": "r1:1",
        "content-length": str(len(BODY)),
    }
    assert body == BODY


async def test_a_large_body_arrives_whole(wire: HttpClient, peer: Peer) -> None:
    """A body of megabytes is sent to a reader that takes its time."""
    body = b'"' + b"x" * (4 << 20) + b'"'
    posting = Posting(wire, peer.url, body=body)
    conn = await peer.accept()
    assert (await conn.request()).endswith(b"\r\n\r\n" + body)
    await conn.send(OK)
    assert (await posting.answered()).status == 200


async def test_headers_are_asked_for_when_the_request_is_made(wire: HttpClient, peer: Peer) -> None:
    """A request that has to take another connection asks for its headers again: what they say of
    the time is true."""
    conn = await kept(wire, peer)
    conn.close()
    asked: list[int] = []

    def headers() -> dict[str, str]:
        asked.append(len(asked) + 1)
        return {"X-Asked": str(asked[-1])}

    posting = Posting(wire, peer.url, headers=headers)
    fresh = await peer.accept()
    request = await fresh.request()
    await fresh.send(OK)
    await posting.answered()
    assert f"X-Asked: {asked[-1]}\r\n".encode() in request


async def test_cookies_are_not_kept(wire: HttpClient, peer: Peer) -> None:
    """What one answer sets is not sent with the next request. By name: no jar keeps cookies of an
    address."""
    url = f"http://localhost:{peer.port}/run"
    posting = Posting(wire, url)
    conn = await peer.accept()
    await conn.request()
    await conn.send(OK.replace(b"\r\n\r\n", b"\r\nset-cookie: session=hers; Path=/\r\n\r\n"))
    await posting.answered()
    again = Posting(wire, url)
    assert b"cookie" not in (await conn.request()).lower()
    await conn.send(OK)
    await again.answered()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(wire: HttpClient, peer: Peer, status: int) -> None:
    """A redirect is an answer like others; nobody connects to where it points."""
    with Peer() as target:
        posting = Posting(wire, peer.url)
        conn = await peer.accept()
        await conn.request()
        await conn.send(
            (
                f"HTTP/1.1 {status} Status\r\nlocation: {target.url}\r\ncontent-length: 0\r\n\r\n"
            ).encode()
        )
        answer = await posting.answered()
        assert (answer.status, answer.headers["location"]) == (status, target.url)
        await target.seen()
        assert target.conns == []


async def test_no_proxy_from_the_environment(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables for proxies change nothing: the token goes to the endpoint and to nobody else."""
    with Peer() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        wire = HttpClient(Settings())
        await kept(wire, peer)
        await wire.close()
        await proxy.seen()
        assert proxy.conns == []


async def test_gzip_is_unpacked_within_the_limit(wire: HttpClient, peer: Peer) -> None:
    """A server that packs though nobody asked is unpacked, up to what is kept of any answer: a
    small answer can't become a large one."""
    packed = gzip.compress(b"{}" + b" " * (8 << 20))
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    await conn.send(
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n"
        + f"content-length: {len(packed)}\r\n\r\n".encode()
        + packed
    )
    answer = await posting.answered()
    assert (answer.body, answer.truncated) == (b"{}" + b" " * (LIMIT - 2), True)


@pytest.mark.parametrize("length", ["content-length", "chunked", "until the end"])
@pytest.mark.parametrize(
    ("size", "truncated"),
    [(LIMIT - 1, False), (LIMIT, False), (LIMIT + 1, True), (3 * LIMIT, True)],
)
async def test_the_limit(
    wire: HttpClient, peer: Peer, size: int, truncated: bool, length: str
) -> None:
    """An answer of exactly 1 MiB is kept whole; of one byte more, 1 MiB is kept and the rest is
    read."""
    head = {
        "content-length": f"content-length: {size}\r\n",
        "chunked": "transfer-encoding: chunked\r\n",
    }.get(length, "")
    before, after = (
        (f"{size:x}\r\n".encode(), b"\r\n0\r\n\r\n") if length == "chunked" else (b"", b"")
    )
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    await conn.send(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + before + b"x" * min(size, LIMIT))
    for _ in range(100):  # Turns in which it may read all that there is, and take it for the whole.
        await asyncio.sleep(0)
    await conn.send(b"x" * max(0, size - LIMIT) + after)
    if length == "until the end":
        conn.close()
    answer = await posting.answered()
    assert (len(answer.body), answer.truncated) == (min(size, LIMIT), truncated)


async def test_an_endless_answer_is_read(wire: HttpClient, peer: Peer) -> None:
    """A server that never stops talking may be in mid-run: it is not hung up on before the run's
    time is up; the next call takes another connection."""
    posting = Posting(wire, peer.url, timeout=1.0)
    conn = await peer.accept()
    await conn.request()
    await conn.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    sent = 0
    with pytest.raises(ConnectionError):
        async with asyncio.timeout(PATIENCE):
            while True:
                await conn.send(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                sent += 65536
    assert sent > 2 * LIMIT
    assert (await posting.unanswered(sent=True)).reason == "no answer within 1 s"
    await kept(wire, peer)
    assert len(peer.conns) == 2


async def test_interim_answers_are_passed_over(wire: HttpClient, peer: Peer) -> None:
    """100 and 103 come before an answer and are none."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    await conn.send(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK
    )
    assert (await posting.answered()).status == 200


async def test_many_at_once(wire: HttpClient, peer: Peer) -> None:
    """Nothing holds one call back behind others: a hundred are open at the same time."""
    postings = [Posting(wire, peer.url, body=f"{n:>10}".encode()) for n in range(100)]
    requests = [await (await peer.accept()).request() for _ in postings]
    assert len({request[-10:] for request in requests}) == 100
    for conn, request in zip(peer.conns, requests, strict=True):
        await conn.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n" + request[-10:])
    for n, posting in enumerate(postings):
        assert int((await posting.answered()).body) == n

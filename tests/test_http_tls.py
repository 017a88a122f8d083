"""The transport over TLS and through a proxy: what is trusted, what is shown, what is said where a
handshake fails, and that nothing was sent then."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from recall_worker.protocols import http
from recall_worker.protocols.http import LIMIT, HttpClient, Proxy
from recall_worker.settings import Settings, SettingsError

from .support.peer import BODY, CERTIFICATE, EXPIRED, KEY, OK, PATIENCE, Peer, Posting

LOGIN = "Basic " + base64.b64encode(b"me:pass@word").decode()
# Keys for nothing but this file.
OTHER_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgFPcYROxweHfOi3w6
O2Tpl2uJOVs/lJtW3fwvWg06cnShRANCAASA1O9iCFdDgnoeclUcI2zM8A35zjOA
sADifEx2u95N/55B+XlC79UviQiUhxFGeVToACbukdSb6NuOmLAY1+x2
-----END PRIVATE KEY-----
"""
LOCKED_KEY = """-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAjINLdKdh1tFAICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEELHdTUwZqqQkUzRx3aq99SEEgZC4
0KHh9aYbr0PDZq5eO4/UgrVuJRha2Yi+id8WftuJklfJWeSlzsWmK2WNjVwgxwvF
lj8+QmWAZfGch7TRQ3uCrPgRXH+iNY2s69YwBhJ7GLf6tXTWnW0gnTf5rl4j324w
azfVgdZx/JymBUkSccFNICifCNI1pV+TjD4hj7+0/Qs4381+WA3NiRvTMseCpuY=
-----END ENCRYPTED PRIVATE KEY-----
"""
TLS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """PEM files: `ca`, `key`, `both` (the certificate with its key), `expired` (likewise)."""
    held = {"ca": CERTIFICATE, "key": KEY, "both": KEY + CERTIFICATE, "expired": KEY + EXPIRED}
    for name, text in held.items():
        (tmp_path / name).write_text(text, encoding="ascii")
    return {name: str(tmp_path / name) for name in held}


def answering(conn: ssl.SSLSocket, seen: list[bytes]) -> None:
    """Answer one request after another."""
    data = b""
    while more := conn.recv(1 << 16):
        data += more
        if data.endswith(BODY):
            seen.append(data)
            data = b""
            conn.sendall(OK)


class Secured:
    """A TLS server in a thread of its own, which plays its part by `serve(conn, seen)`."""

    def __init__(
        self,
        certificate: str,
        serve: Callable[[ssl.SSLSocket, list[bytes]], None] = answering,
        *,
        wanted: str | None = None,
        version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ) -> None:
        """`wanted`: the authority of the certificates that it wants of its clients."""
        self.seen: list[bytes] = []
        self.certificates: list[object] = []
        self._serve = serve
        self._conn: ssl.SSLSocket | None = None
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        self._context.minimum_version = self._context.maximum_version = version
        if wanted is not None:
            self._context.verify_mode = ssl.CERT_REQUIRED
            self._context.load_verify_locations(wanted)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"https://127.0.0.1:{self.port}/run"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.settimeout(PATIENCE)
                with contextlib.suppress(OSError, ssl.SSLError), sock:
                    with self._context.wrap_socket(sock, server_side=True) as conn:
                        self._conn = conn
                        self.certificates.append(conn.getpeercert())
                        self._serve(conn, self.seen)

    def hang_up(self) -> None:
        """End the connection that is open."""
        assert self._conn is not None
        with contextlib.suppress(OSError):
            self._conn.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE)


@contextlib.contextmanager
def secured(*given: object, **options: object) -> Iterator[Secured]:
    server = Secured(*given, **options)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()


@contextlib.asynccontextmanager
async def client(**settings: str) -> AsyncIterator[HttpClient]:
    made = HttpClient(Settings(run_url="https://localhost", **settings))  # type: ignore[arg-type]
    try:
        yield made
    finally:
        await made.close()


# --- the server's certificate ---------------------------------------------------------------------


async def test_an_expired_certificate(files: dict[str, str]) -> None:
    """It is not trusted, and the reason says why; nothing was sent."""
    with secured(files["expired"]) as server:
        async with client(ca_file=files["ca"]) as wire:
            end = await Posting(wire, server.url).unanswered(sent=False)
    assert end.reason == "the certificate is not trusted: certificate has expired"
    assert not end.is_misconfigured and server.seen == []


@pytest.mark.parametrize("version", TLS)
async def test_connections_are_kept(files: dict[str, str], version: ssl.TLSVersion) -> None:
    """Session tickets and their like, which arrive by themselves, are nothing that spoils one."""
    with secured(files["both"], version=version) as server:
        async with client(ca_file=files["ca"]) as wire:
            for _ in range(5):
                assert (await Posting(wire, server.url).answered()).status == 200
        assert len(server.seen) == 5 and len(server.certificates) == 1


# --- the client's certificate ---------------------------------------------------------------------


@pytest.mark.parametrize("version", TLS)
@pytest.mark.parametrize("given", ["both", "two files", "none", "another"])
async def test_a_server_that_wants_a_certificate(
    files: dict[str, str], version: ssl.TLSVersion, given: str
) -> None:
    """It gets the one that is set. Without it, or with another, the reason says what to set, and
    the request counts as not sent: no server reads it then."""
    shown = {
        "both": {"client_cert_file": files["both"]},
        "two files": {"client_cert_file": files["ca"], "client_key_file": files["key"]},
        "none": {},
        "another": {"client_cert_file": files["expired"]},
    }[given]
    with secured(files["both"], wanted=files["ca"], version=version) as server:
        async with client(ca_file=files["ca"], **shown) as wire:
            posting = Posting(wire, server.url)
            if given in ("both", "two files"):
                assert (await posting.answered()).status == 200
                assert server.certificates[0]
                return
            end = await posting.unanswered(sent=False)
        assert server.seen == []
    assert "client certificate" in end.reason and "RECALL_CLIENT_CERT_FILE" in end.reason
    assert end.reason.startswith("no connection: the server ") and end.is_misconfigured


@pytest.mark.parametrize("wrong", ["no key", "no PEM", "mismatch", "locked"])
def test_files_that_hold_no_certificate(files: dict[str, str], wrong: str, tmp_path: Path) -> None:
    """They are named at the start, and nobody is asked for a password."""
    other = tmp_path / "other"
    other.write_text(OTHER_KEY if wrong == "mismatch" else LOCKED_KEY, encoding="ascii")
    given = {
        "no key": Settings(client_cert_file=files["ca"]),
        "no PEM": Settings(client_cert_file=__file__),
        "mismatch": Settings(client_cert_file=files["ca"], client_key_file=str(other)),
        "locked": Settings(client_cert_file=files["ca"], client_key_file=str(other)),
    }[wrong]
    with pytest.raises(SettingsError) as caught:
        http.trust(given)
    [problem] = caught.value.problems
    assert problem.startswith(f"RECALL_CLIENT_CERT_FILE is {given.client_cert_file!r}")
    words = {"mismatch": "not that of the certificate", "locked": "locked by a password"}
    assert words.get(wrong, "hold no certificate with its key") in problem


async def test_certificates_are_read_again(files: dict[str, str]) -> None:
    """New files count for new connections; what can't be used leaves the last ones in place."""
    cert = Path(files["expired"])

    def put(text: str) -> None:
        cert.write_text(text, encoding="ascii")

    with secured(files["both"], wanted=files["ca"]) as server:
        async with client(ca_file=files["ca"], client_cert_file=str(cert)) as wire:
            await Posting(wire, server.url).unanswered(sent=False)
            put(KEY + CERTIFICATE)
            assert (await Posting(wire, server.url).answered()).status == 200
            put("half a fi")
            server.hang_up()
            assert (await Posting(wire, server.url).answered()).status == 200
            assert len(server.certificates) == 2


# --- the wrong scheme -----------------------------------------------------------------------------


async def test_https_to_a_port_of_plain_http(peer: Peer) -> None:
    """The reason says what to write."""
    async with client() as wire:
        posting = Posting(wire, f"https://127.0.0.1:{peer.port}/")
        conn = await peer.accept()
        await conn.some()
        await conn.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        end = await posting.unanswered(sent=False)
    assert end.reason.startswith("no connection: the port speaks no TLS") and end.is_misconfigured
    assert "write http://" in end.reason


async def test_http_to_a_port_of_tls(peer: Peer) -> None:
    """An alert is all that a TLS server has to say to it: it has read no request."""
    async with client() as wire:
        posting = Posting(wire, peer.url)
        conn = await peer.accept()
        await conn.request()
        await conn.send(b"\x15\x03\x03\x00\x02\x02\x46")
        conn.close()
        end = await posting.unanswered(sent=False)
    assert end.reason.startswith("no connection: the port speaks TLS") and end.is_misconfigured
    assert "write https://" in end.reason


async def test_http_to_a_tls_server_that_hangs_up(files: dict[str, str]) -> None:
    """Where it says nothing, nobody knows: it was sent."""
    with secured(files["both"]) as server:
        async with client() as wire:
            end = await Posting(wire, f"http://127.0.0.1:{server.port}/").ends()
    assert isinstance(end, http.NoAnswer) and (end.sent or end.is_misconfigured)


# --- the end of a connection ----------------------------------------------------------------------


@pytest.mark.parametrize("takes_leave", [True, False])
async def test_an_answer_that_ends_with_its_connection(
    files: dict[str, str], takes_leave: bool
) -> None:
    """It is whole where the server takes its leave (close_notify): anybody in between could end the
    connection otherwise."""

    def serve(conn: ssl.SSLSocket, seen: list[bytes]) -> None:
        while not conn.recv(1 << 16).endswith(BODY):
            pass
        conn.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (3 * LIMIT))
        if takes_leave:
            with contextlib.suppress(OSError):
                conn.unwrap()
        else:
            conn.shutdown(socket.SHUT_RDWR)

    with secured(files["both"], serve) as server:
        async with client(ca_file=files["ca"]) as wire:
            posting = Posting(wire, server.url)
            if takes_leave:
                answer = await posting.answered()
                assert answer.truncated and answer.body == b"x" * LIMIT
            else:
                assert "no end of its own" in (await posting.unanswered(sent=True)).reason


@pytest.mark.parametrize("takes_leave", [True, False])
async def test_large_answers_are_read_whole(files: dict[str, str], takes_leave: bool) -> None:
    """One after the other over one connection, and the last one although the server hangs up right
    behind it."""

    def serve(conn: ssl.SSLSocket, seen: list[bytes]) -> None:
        for _ in range(2):
            while not conn.recv(1 << 16).endswith(BODY):
                pass
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (3 * LIMIT)
            conn.sendall(head + b"x" * (3 * LIMIT - 3) + b"end")
        if takes_leave:
            with contextlib.suppress(OSError):
                conn.unwrap()

    with secured(files["both"], serve) as server:
        async with client(ca_file=files["ca"]) as wire:
            for _ in range(2):
                answer = await Posting(wire, server.url).answered()
                assert answer.truncated and answer.tail.endswith(b"xend")
        assert len(server.certificates) == 1


async def test_a_renegotiation(files: dict[str, str]) -> None:
    """TLS 1.2 lets a server begin anew in mid-connection: the answer is read all the same, or it is
    no answer; never half of one."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ("s_server", "-accept", f"127.0.0.1:{port}", "-cert", files["both"], "-tls1_2")
    server = await asyncio.create_subprocess_exec(
        openssl,
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert server.stdin is not None and server.stdout is not None
    try:
        while b"ACCEPT" not in await asyncio.wait_for(server.stdout.readline(), PATIENCE):
            pass
        async with client(ca_file=files["ca"]) as wire:
            posting = Posting(wire, f"https://127.0.0.1:{port}/", timeout=5)
            await asyncio.wait_for(server.stdout.readuntil(b"x" * 100), PATIENCE)
            server.stdin.write(b"r\n")
            await server.stdin.drain()
            await asyncio.wait({posting.task}, timeout=0.3)
            server.stdin.write(OK + b"\n")
            await server.stdin.drain()
            end = await posting.ends()
        assert end.status == 200 if isinstance(end, http.Answer) else end.sent
    finally:
        server.kill()
        await server.communicate()


# --- a proxy --------------------------------------------------------------------------------------


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """A server, or a proxy, to be played by hand."""
    with Peer() as played:
        yield played


def through(peer: Peer) -> dict[str, str]:
    return {"proxy": f"http://me:pass%40word@127.0.0.1:{peer.port}"}


async def test_plain_http_through_a_proxy(peer: Peer) -> None:
    """The proxy gets the whole address, and its login; nobody else is connected to."""
    async with client(**through(peer)) as wire:
        posting = Posting(wire, "http://agent.test:8080/sessions/s/run?a=b")
        conn = await peer.accept()
        request = await conn.request()
        await conn.send(OK)
        assert (await posting.answered()).status == 200
        second = Posting(wire, "http://agent.test:8080/other")
        assert (await conn.request()).startswith(b"POST http://agent.test:8080/other HTTP/1.1\r\n")
        await conn.send(OK)
        await second.answered()
    line, host, *fields = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    assert line == "POST http://agent.test:8080/sessions/s/run?a=b HTTP/1.1"
    assert host == "Host: agent.test:8080" and f"Proxy-Authorization: {LOGIN}" in fields
    assert len(peer.conns) == 1


async def test_a_proxy_that_wants_a_login(peer: Peer) -> None:
    """407 is the proxy's: the endpoint has received nothing, over http and https alike."""
    refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n"
    async with client(**through(peer)) as wire:
        for scheme in ("http", "https"):
            posting = Posting(wire, f"{scheme}://agent.test/run")
            conn = await peer.accept()
            await conn.some()
            await conn.send(refusal)
            end = await posting.unanswered(sent=False)
            assert end.reason == http.PROXY_LOGIN and end.is_misconfigured
            assert posting.said_sent == (1 if scheme == "http" else 0)
            await wire.close() if scheme == "https" else conn.close()


@pytest.mark.parametrize("does", ["works", "in pieces"])
async def test_https_through_a_proxy(files: dict[str, str], peer: Peer, does: str) -> None:
    """CONNECT, then TLS with the endpoint itself: the proxy sees neither request nor token, and the
    endpoint not the proxy's login; the tunnel is kept."""
    with secured(files["both"]) as server:
        async with client(ca_file=files["ca"], **through(peer)) as wire:
            posting = Posting(wire, server.url)
            conn = await peer.accept()
            asked = await conn.request()
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            opened = b"HTTP/1.1 200 Connection established\r\nContent-Length: 7\r\n\r\n"
            for piece in [opened] if does == "works" else [bytes([b]) for b in opened]:
                await conn.send(piece)
                await asyncio.sleep(0)

            async def there() -> None:
                while data := await conn.next():
                    writer.write(data)

            async def back() -> None:
                while data := await reader.read(1 << 16):
                    await conn.send(data)

            relay = [asyncio.create_task(there()), asyncio.create_task(back())]
            for _ in range(2):
                assert (await posting.answered()).status == 200
                posting = Posting(wire, server.url)
            await posting.answered()
            for task in relay:
                task.cancel()
            await asyncio.wait(relay)
            writer.close()
            there_at = f"127.0.0.1:{server.port}"
            assert asked.startswith(f"CONNECT {there_at} HTTP/1.1\r\nHost: {there_at}\r\n".encode())
            assert f"\r\nProxy-Authorization: {LOGIN}\r\n".encode() in asked
            assert BODY not in conn.seen and len(peer.conns) == 1
        assert len(server.seen) == 3 and not any(b"Proxy" in request for request in server.seen)


REFUSING = {
    "502": (b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 99\r\n\r\n<html>", "(HTTP 502)"),
    "403": (b"HTTP/1.1 403 Forbidden\r\n\r\n", "(HTTP 403)"),
    "garbage": (b"SSH-2.0-OpenSSH_9.6\r\n", "the proxy fails: the answer is no HTTP"),
    "interim": (b"HTTP/1.1 103 x\r\n\r\n" * 50, "the proxy fails: interim answers without end"),
    "hanging up": (b"", "the proxy fails: the server hung up"),
}


@pytest.mark.parametrize("name", REFUSING)
async def test_a_proxy_that_does_not_connect(peer: Peer, name: str) -> None:
    """The reason says what the proxy said, without its login; nothing was sent to the endpoint."""
    said, words = REFUSING[name]
    async with client(**through(peer)) as wire:
        posting = Posting(wire, "https://agent.test/run")
        conn = await peer.accept()
        await conn.request()
        with contextlib.suppress(ConnectionError):
            await conn.send(said)
        if not said:
            conn.close()
        end = await posting.unanswered(sent=False)
    assert words in end.reason and "word" not in end.reason
    assert end.reason.startswith("no connection: ")


async def test_a_proxy_that_is_slow(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is that for connecting."""
    monkeypatch.setattr(http, "CONNECT_DEADLINE", 0.3)
    async with client(**through(peer)) as wire:
        for behind in (False, True):
            posting = Posting(wire, "https://agent.test/run")
            conn = await peer.accept()
            await conn.request()
            if behind:  # The proxy is there, and the endpoint silent.
                await conn.send(b"HTTP/1.1 200 OK\r\n\r\n")
            end = await posting.unanswered(sent=False)
            assert end.reason == "no connection within 0.3 s"
            assert (await conn.rest()) == b"" or behind


async def test_a_proxy_that_is_away(peer: Peer) -> None:
    """The reason says that it is the proxy."""
    peer.stop()
    async with client(**through(peer)) as wire:
        end = await Posting(wire, "https://agent.test/run").unanswered(sent=False)
    assert end.reason == "no connection to the proxy: Connection refused"


def test_a_proxys_login_is_not_shown() -> None:
    """Not where it is printed."""
    proxy = Proxy.of("http://me:pass%40word@proxy.test:3128")
    assert proxy.login == LOGIN and repr(proxy) == "Proxy(proxy.test:3128)"
    assert Proxy.of("http://proxy.test") == ("proxy.test", 80, None)
    assert Proxy.of("http://me@proxy.test").login == "Basic bWU6"

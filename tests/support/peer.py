"""A server of one test's own, played by hand over raw sockets, and a request to it.

It reads every byte that arrives, so "nothing was sent" is counted and not believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any, Self

from recall_worker.protocols.http import Answer, HttpClient, NoAnswer

BODY = b'{"a":"' + b"x" * 300 + b'"}'
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
PATIENCE = 20.0

# A key for nothing but this file, and the certificate that it signed for itself: 127.0.0.1, years
# 2000 to 9999.
KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgIsUYYHC7xjIejLzo
59SvmnjYwvEfNo6qu+YZX6yWIfahRANCAAQaIxkjVxCq57Tar1nnDLjsGFM2/jEJ
PukFBOrDsMH8GCd6IIIIhRrlwQjKVL0P/akaLDVffsam6+iL7INUzVWh
-----END PRIVATE KEY-----
"""
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBfzCCASagAwIBAgIBATAKBggqhkjOPQQDAjAeMRwwGgYDVQQDDBNyZWNhbGwt
d29ya2VyIHRlc3RzMCAXDTAwMDEwMTAwMDAwMFoYDzk5OTkxMjMxMjM1OTU5WjAe
MRwwGgYDVQQDDBNyZWNhbGwtd29ya2VyIHRlc3RzMFkwEwYHKoZIzj0CAQYIKoZI
zj0DAQcDQgAEGiMZI1cQque02q9Z5wy47BhTNv4xCT7pBQTqw7DB/BgneiCCCIUa
5cEIylS9D/2pGiw1X37Gpuvoi+yDVM1VoaNTMFEwDwYDVR0RBAgwBocEfwAAATAO
BgNVHQ8BAf8EBAMCAoQwDwYDVR0TAQH/BAUwAwEB/zAdBgNVHQ4EFgQUIAZt8pG9
faE+2cWWQ/wt2zHuAy4wCgYIKoZIzj0EAwIDRwAwRAIgEoaIdZKRfNJusHZRL+i2
x08YDFt74Eds2CoOsY97YnICIByhAiJ+r9veO6YvbT5A62fhPnCSh4GsFfhLVxNQ
LGR2
-----END CERTIFICATE-----
"""

# By the same, for the same address; its time was over in 2001.
EXPIRED = """-----BEGIN CERTIFICATE-----
MIIBZjCCAQugAwIBAgIBAjAKBggqhkjOPQQDAjAeMRwwGgYDVQQDDBNyZWNhbGwt
d29ya2VyIHRlc3RzMB4XDTAwMDEwMTAwMDAwMFoXDTAxMDEwMTAwMDAwMFowJjEk
MCIGA1UEAwwbcmVjYWxsLXdvcmtlciB0ZXN0cyBleHBpcmVkMFkwEwYHKoZIzj0C
AQYIKoZIzj0DAQcDQgAEGiMZI1cQque02q9Z5wy47BhTNv4xCT7pBQTqw7DB/Bgn
eiCCCIUa5cEIylS9D/2pGiw1X37Gpuvoi+yDVM1VoaMyMDAwDwYDVR0RBAgwBocE
fwAAATAdBgNVHQ4EFgQUIAZt8pG9faE+2cWWQ/wt2zHuAy4wCgYIKoZIzj0EAwID
SQAwRgIhAO5T4qfX0CNnGghyYtO/R8xwMLROd/Li9wCzs77FP5gdAiEAteJOjfmO
Plh7AGGishUO0fYiRGs3gE/4MZ+5VuLTxHc=
-----END CERTIFICATE-----
"""


class Conn:
    """One accepted connection. `seen` is every byte that came over it."""

    def __init__(self, sock: socket.socket) -> None:
        self.seen = b""
        self._taken = 0
        self._sock = sock
        sock.setblocking(False)

    async def request(self) -> bytes:
        """The next request, read whole. Raises EOFError where the caller hangs up first."""
        while True:
            head, found, rest = self.seen[self._taken :].partition(b"\r\n\r\n")
            if found:
                lines = head.lower().split(b"\r\n")
                [length] = [
                    int(line.split(b":")[1])
                    for line in lines
                    if line.startswith(b"content-length:")
                ] or [0]
                if len(rest) >= length:
                    whole = head + found + rest[:length]
                    self._taken += len(whole)
                    return whole
            if not await self._more():
                raise EOFError

    async def some(self) -> bytes:
        """What has come since the last request, at least a byte."""
        await self._more()
        return self.seen[self._taken :]

    async def next(self) -> bytes:
        """The next bytes; none at the end. They count as read."""
        await self._more()
        data = self.seen[self._taken :]
        self._taken = len(self.seen)
        return data

    async def rest(self) -> bytes:
        """What else comes until the caller hangs up."""
        while await self._more():
            pass
        return self.seen[self._taken :]

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    def send_now(self, data: bytes) -> None:
        """Without a turn of the loop."""
        assert self._sock.send(data) == len(data)

    def end(self) -> None:
        """FIN, of this side alone."""
        self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """FIN; or RST where bytes are left unread."""
        self._sock.close()

    def reset(self) -> None:
        """RST."""
        if self._sock.fileno() >= 0:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    async def _more(self) -> bool:
        try:
            async with asyncio.timeout(PATIENCE):
                data = await asyncio.get_running_loop().sock_recv(self._sock, 1 << 16)
        except ConnectionError:
            data = b""
        self.seen += data
        return bool(data)


class Peer:
    """A server of one test's own, played by hand."""

    def __init__(self, backlog: int = 100) -> None:
        self.conns: list[Conn] = []
        self._sock = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self._sock.setblocking(False)
        self.port: int = self._sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/run"

    async def accept(self) -> Conn:
        """Wait for the next connection."""
        async with asyncio.timeout(PATIENCE):
            sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
        self.conns.append(Conn(sock))
        return self.conns[-1]

    async def seen(self) -> bytes:
        """Every byte that came over any connection, those included that were never accepted; reads
        until the callers hang up."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.conns.append(Conn(self._sock.accept()[0]))
        for conn in self.conns:
            if conn._sock.fileno() >= 0:
                await conn.rest()
        return b"".join(conn.seen for conn in self.conns)

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for conn in self.conns:
            conn.close()


class Posting:
    """One request under way, and when it was said to be sent."""

    def __init__(
        self,
        wire: HttpClient,
        url: str,
        *,
        body: bytes = BODY,
        timeout: float = PATIENCE,
        headers: Callable[[], Mapping[str, str]] = dict,
        **hooks: Any,
    ) -> None:
        self.said_sent = 0
        self.sent = asyncio.Event()
        self.task = asyncio.create_task(
            wire.post(url, headers, body, timeout, self._on_sent, **hooks)
        )

    def _on_sent(self) -> None:
        self.said_sent += 1
        self.sent.set()

    async def ends(self) -> Answer | NoAnswer:
        """How it ended. `sent` is what was said at the time, once."""
        async with asyncio.timeout(2 * PATIENCE):
            end = await self.task
        if isinstance(end, NoAnswer) and end.is_misconfigured:
            # It may have left, and was refused unread, by a proxy or in a TLS handshake.
            assert not end.sent
        else:
            assert self.said_sent == (1 if isinstance(end, Answer) or end.sent else 0)
        return end

    async def answered(self) -> Answer:
        end = await self.ends()
        assert isinstance(end, Answer), end
        return end

    async def unanswered(self, *, sent: bool) -> NoAnswer:
        end = await self.ends()
        assert isinstance(end, NoAnswer), end
        assert end.sent is sent and end.reason, end
        return end


async def kept(wire: HttpClient, peer: Peer) -> Conn:
    """A connection that has served one request and is kept for the next."""
    posting = Posting(wire, peer.url)
    conn = await peer.accept()
    await conn.request()
    await conn.send(OK)
    await posting.answered()
    return conn


async def again(wire: HttpClient, peer: Peer, conn: Conn) -> None:
    """The next call goes over the same connection."""
    posting = Posting(wire, peer.url)
    await conn.request()
    await conn.send(OK)
    await posting.answered()
    assert len(peer.conns) == 1

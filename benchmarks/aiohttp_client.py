"""recall-worker's HTTP client before it had one of its own: the same interface over aiohttp.

Kept for transport.py, which compares both; nothing else uses it.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp
from yarl import URL

from recall_worker.protocols.http import Answer, NoAnswer, trust
from recall_worker.settings import Settings

LIMIT = 1 << 20
CONNECT_DEADLINE = 10.0
KEEP_ALIVE = 4.0
PROBE_AFTER, PROBE_EVERY, PROBES = 30, 10, 3
"""Seconds of silence after which the other end is probed, seconds between two probes, and how many
go unanswered.
"""
ASK_DEADLINE = 10.0
CONNECTIONS_TRIED = 3
PIECE = 1 << 16
"""Bytes of a long body that are written at once."""


class HttpClient:
    """Connections to the endpoint. Needs a running event loop."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError if RECALL_CA_FILE holds no certificate."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=KEEP_ALIVE, ssl=trust(settings), socket_factory=_socket
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            headers={
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": "recall-worker",
            },
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_DEADLINE),
        )

    async def close(self) -> None:
        await self._session.close()

    async def post(
        self,
        url: str,
        headers: Callable[[], Mapping[str, str]],
        body: bytes | list[bytes | memoryview],
        timeout: float,
        on_sent: Callable[[], None],
        *,
        before_sent: Callable[[], Awaitable[bool]] | None = None,
        on_written: Callable[[], None] | None = None,
    ) -> Answer | NoAnswer:
        """POST once. Never raises, except for cancellation.

        `url` is used as it is, percent-encoding included. `headers()` is called when the request is
        made. `timeout`: seconds for everything. `body`: in pieces if it is long; a list is emptied
        when it is written. `on_sent()` is called just before the first byte leaves, so also if the
        request is cancelled afterwards; `on_written()` after the last byte. `before_sent()` is
        called when a connection is open: if it returns False, nothing is sent.
        """
        witness = _Witness(
            [body] if isinstance(body, bytes) else body, on_sent, before_sent, on_written
        )
        failure: BaseException = _Stale()
        try:
            async with asyncio.timeout(timeout):
                for _ in range(CONNECTIONS_TRIED):
                    witness.asked = False
                    try:
                        answer = await self._try(URL(url, encoded=True), headers(), witness)
                        if answer is not None:
                            return answer
                    except aiohttp.ClientError as error:
                        failure = error
                        if witness.sent or not witness.asked:
                            break
        except TimeoutError:
            return NoAnswer(witness.sent, f"no answer within {timeout:g} s")
        except (
            Exception
        ) as error:  # A header or an address that can't be sent: ValueError, TypeError and others.
            failure = error
        return NoAnswer(witness.sent, _reason(failure, witness.sent))

    async def ask(
        self, method: str, url: str, headers: Mapping[str, str], timeout: float = ASK_DEADLINE
    ) -> Answer | NoAnswer:
        """A request that changes nothing when it is repeated (GET, DELETE), without a body. Never
        raises, but for cancellation.
        """
        try:
            async with (
                asyncio.timeout(timeout),
                self._session.request(
                    method, URL(url, encoded=True), headers=headers, allow_redirects=False
                ) as response,
            ):
                return await self._read(response)
        except TimeoutError:
            return NoAnswer(True, f"no answer within {timeout:g} s")
        except Exception as error:
            return NoAnswer(True, _reason(error, True))

    async def _try(self, url: URL, headers: Mapping[str, str], witness: _Witness) -> Answer | None:
        """One request; None if bytes arrived before it was sent, which are no answer to it."""
        async with self._session.post(
            url, data=witness, headers=headers, allow_redirects=False
        ) as response:
            if not witness.sent:
                # Bytes that waited on an idle connection, such as a proxy's 408.
                response.close()
                return None
            return await self._read(response)

    @staticmethod
    async def _read(response: aiohttp.ClientResponse) -> Answer:
        read = bytearray()
        try:
            while len(read) <= LIMIT and (chunk := await response.content.readany()):
                read += chunk
        except aiohttp.ClientError:
            # The connection ended within the body. A success counts only if it is whole; for other
            # answers the status is enough.
            if response.status < 300:
                raise
        if len(read) > LIMIT:
            response.close()
        return Answer(response.status, response.headers, bytes(read[:LIMIT]), len(read) > LIMIT)


def _socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket that notices when its peer is gone: a run may be silent for half an hour, but its
    host answers keepalive probes.
    """
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", PROBE_AFTER),
        ("TCP_KEEPINTVL", PROBE_EVERY),
        ("TCP_KEEPCNT", PROBES),
        ("TCP_USER_TIMEOUT", (PROBE_AFTER + PROBES * PROBE_EVERY) * 1000),
    ):
        if hasattr(socket, name):  # Not every system has all of them.
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made


def _is_gone(writer: Any) -> bool:
    return writer.transport is None or writer.transport.is_closing() or writer.protocol.should_close


def _has_unread(transport: asyncio.BaseTransport) -> bool:
    """Whether the kernel has data, or the end, of a connection that the loop has not seen yet."""
    found = select.poll()
    found.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(found.poll(0))


class _Stale(ConnectionResetError):
    """The connection was dead, or spoke out of turn, before any byte of the request was handed to
    it.
    """

    def __str__(self) -> str:
        return "the server closed the connection first"


class _Withheld(ConnectionError):
    """Nothing was sent, as `before_sent` refused it."""

    def __str__(self) -> str:
        return "it was held back"


class _Witness(aiohttp.Payload):
    """The body of one request, which sees the moment at which it is sent."""

    def __init__(
        self,
        body: list[bytes | memoryview],
        on_sent: Callable[[], None],
        before_sent: Callable[[], Awaitable[bool]] | None,
        on_written: Callable[[], None] | None,
    ) -> None:
        super().__init__(body, content_type="application/json")
        self._size = sum(len(piece) for piece in body)
        self.asked = False
        self.sent = False
        self._on_sent = on_sent
        self._before_sent = before_sent
        self._on_written = on_written

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return b"".join(self._value).decode(encoding, errors)

    async def write(self, writer: Any) -> None:
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: Any, content_length: int | None) -> None:
        self.asked = True
        if self._before_sent is not None and not await self._before_sent():
            raise _Withheld
        if not _is_gone(writer) and _has_unread(writer.transport):
            # FIN, RST or unexpected bytes: one turn of the event loop delivers them. TLS, which
            # sends messages of its own, needs a second one.
            for _ in range(2 if writer.transport.get_extra_info("ssl_object") is not None else 1):
                await asyncio.sleep(0)
        if _is_gone(writer):
            raise _Stale
        self.sent = True
        self._on_sent()
        # Written pieces are released: the run may go on for long.
        self._value.reverse()
        while self._value:
            piece = self._value.pop()
            # A long piece is written as fast as the server reads it, and is never copied whole into
            # a buffer.
            for start in range(0, len(piece), PIECE):
                await writer.write(
                    piece if len(piece) <= PIECE else memoryview(piece)[start : start + PIECE]
                )
        if self._on_written is not None:
            self._on_written()


def _reason(error: BaseException, sent: bool) -> str:
    match error:
        case aiohttp.ConnectionTimeoutError():
            return f"no connection within {CONNECT_DEADLINE:g} s"
        case aiohttp.ClientConnectorCertificateError():
            return f"the certificate is not trusted: {error.certificate_error}"
        case aiohttp.ClientConnectorError():
            # With several addresses the text lists them all; the first is enough.
            return f"no connection: {error.os_error.strerror or error.os_error}"
        case aiohttp.ServerDisconnectedError() if sent:
            # Its text may quote all headers of an answer that was cut off, cookies included.
            return "the connection broke off after the request was sent: the server hung up"
        case aiohttp.ClientResponseError():
            return (
                "the answer is no HTTP: "
                f"{error.message.splitlines()[0] if error.message else 'malformed'}"
            )
        case _:
            detail = str(error) or type(error).__name__
            return (
                f"the connection broke off after the request was sent: {detail}"
                if sent
                else f"nothing was sent: {detail}"
            )

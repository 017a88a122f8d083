"""One request over one connection, by a client that knows whether any byte of it was sent.

Owns which connection a request gets: kept ones first, new ones else (with TLS, RECALL_CLIENT_CERT
and RECALL_PROXY), and the words for what goes wrong. The protocols say what to send and what an
answer means; `connection` moves bytes, `answer` reads them.

It is a client of our own, chosen by measurement (docs/performance.md): no library says whether the
request was sent, which decides whether a run may be posted again. Until `on_sent` is called no byte
of the request has left this process. Right before, it is checked whether the server has closed the
connection, or has said something on it that nobody asked for: then another one is taken, at no
cost. What breaks after that is never posted again here.

No cookies are kept, no redirects followed, no proxies or netrc read from the environment. Idle
connections are closed before uvicorn's keep-alive of 5 s would close them.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from ..settings import Settings, SettingsError
from . import connection as room
from .answer import LIMIT, TAIL, Answer, AnswerReader, Headers
from .connection import Broken, Connection, Lane, Unreachable

__all__ = ["LIMIT", "TAIL", "Answer", "Headers", "HttpClient", "NoAnswer", "Trust", "trust"]

CONNECT_DEADLINE = 10.0
"""Seconds for everything until a request can be sent: the name, the proxy, TLS."""
KEEP_ALIVE = 4.0
ASK_DEADLINE = 10.0
CONNECTIONS_TRIED = 3
DEFAULTS = {
    "accept": "Accept: application/json\r\n",
    "accept-encoding": "Accept-Encoding: identity\r\n",
    "user-agent": "User-Agent: recall-worker\r\n",
}


@dataclass(frozen=True, slots=True)
class NoAnswer:
    sent: bool
    """False: the endpoint has received nothing of the request. Either no byte left this process, or
    a proxy kept it, or TLS refused it unread. True: the endpoint may have received it."""
    reason: str
    is_misconfigured: bool = False
    """Whether only other settings help, as the reason says: a certificate, the scheme, a login."""


class Origin(NamedTuple):
    """Where a connection leads."""

    scheme: str
    host: str
    port: int
    name: str
    """As it stands in the header Host."""


class Proxy(NamedTuple):
    """RECALL_PROXY."""

    host: str
    port: int
    login: str | None
    """The header Proxy-Authorization. Secret."""

    @classmethod
    def of(cls, url: str) -> Proxy:
        parts = urlsplit(url)
        assert parts.hostname is not None
        login = None
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            login = f"Basic {base64.b64encode(pair.encode()).decode()}"
        return cls(parts.hostname, parts.port or 80, login)

    def __repr__(self) -> str:
        return f"Proxy({self.host}:{self.port})"


# --- trust ----------------------------------------------------------------------------------------


def trust(settings: Settings) -> ssl.SSLContext:
    """The authorities trusted for the endpoint's certificate (the system's, or RECALL_CA_FILE
    alone), and the certificate by which this client shows who it is (RECALL_CLIENT_CERT_FILE).
    Raises SettingsError if a file does not hold what it should.
    """
    secured = urlsplit(settings.run_url or "").scheme == "https"
    try:
        if settings.ca_file is not None or secured or settings.client_cert_file is not None:
            context = ssl.create_default_context(cafile=settings.ca_file)
        else:
            # Trusts nobody, and is created at once.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    except OSError:
        raise SettingsError(
            [f"RECALL_CA_FILE is {settings.ca_file!r}, which holds no certificate: give a PEM file"]
        ) from None
    if settings.client_cert_file is not None:
        try:
            context.load_cert_chain(
                settings.client_cert_file, settings.client_key_file, password=_no_password
            )
        except (OSError, _Locked) as error:
            raise SettingsError([_unusable(settings, error)]) from None
    return context


class _Locked(Exception):
    """A key that needs a password, which nobody is there to type."""


def _no_password() -> str:
    raise _Locked


def _unusable(settings: Settings, error: Exception) -> str:
    key = settings.client_key_file
    where = f"RECALL_CLIENT_CERT_FILE is {settings.client_cert_file!r}"
    where += "" if key is None else f" and RECALL_CLIENT_KEY_FILE {key!r}"
    if isinstance(error, _Locked):
        return f"{where}: the key is locked by a password: give one without"
    if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
        return f"{where}: the key is not that of the certificate: give the two that belong together"
    if isinstance(error, ssl.SSLError):
        wanted = "give PEM files, the certificate with those of its chain"
        wanted += " and its key" if key is None else ""
        return f"{where}, which hold no certificate with its key: {wanted}"
    return f"{where}, which can't be read: {error.args[-1]}"


class Trust:
    """`trust`, made anew when one of its files has changed: certificates are replaced while a
    worker runs. Files that can't be used leave the last ones in place."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError."""
        self._settings = settings
        self._files = [
            name
            for name in (settings.ca_file, settings.client_cert_file, settings.client_key_file)
            if name is not None
        ]
        self._seen = self._marks()
        self._context = trust(settings)

    def context(self) -> ssl.SSLContext:
        """For a connection that is opened now."""
        if self._files and (marks := self._marks()) != self._seen:
            try:
                self._context = trust(self._settings)
            except SettingsError:
                return self._context  # Half written: looked at again at the next connection.
            self._seen = marks
        return self._context

    def _marks(self) -> list[tuple[int, int, int] | None]:
        found: list[tuple[int, int, int] | None] = []
        for name in self._files:
            try:
                seen = Path(name).stat()
                found.append((seen.st_mtime_ns, seen.st_ino, seen.st_size))
            except OSError:
                found.append(None)
        return found


# --- the client -----------------------------------------------------------------------------------


class HttpClient:
    """Connections to the endpoint. Needs a running event loop."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError if a file of certificates can't be used."""
        self._trust = Trust(settings)
        self._has_certificate = settings.client_cert_file is not None
        self._proxy = None if settings.proxy is None else Proxy.of(settings.proxy)
        self._loop = asyncio.get_running_loop()
        self._deadline = CONNECT_DEADLINE
        self._lane = Lane()
        self._origins: dict[tuple[str, str, str | None], Origin] = {}
        self._names: dict[str, str] = {}
        """Names of headers that can be sent, and the same in lower case."""
        self._lookups: dict[tuple[str, int], asyncio.Task[list[room.Address] | OSError]] = {}
        self._idle: dict[Origin, list[Connection]] = {}
        """Kept connections, the last used at the end."""
        self._open: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def close(self) -> None:
        """Hang up. Calls that are open end as broken off."""
        self._is_closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._lane.close()
        for connection in list(self._open):
            connection.abort()
        while self._open:  # noqa: ASYNC110 -- a turn or two, in which the loop closes their sockets
            await asyncio.sleep(0)

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
        on_head: Callable[[int, Mapping[str, str]], None] | None = None,
    ) -> Answer | NoAnswer:
        """POST once. Never raises, except for cancellation.

        `url` is used as it is, percent-encoding included. `headers()` is called when the request is
        made. `timeout`: seconds for everything. `body`: in pieces if it is long; a list is emptied
        when it is written. `on_sent()` is called just before the first byte leaves, so also if the
        request is cancelled afterwards; `on_written()` after the last byte. `before_sent()` is
        called when a connection is open: if it returns False, nothing is sent. `on_head(status,
        headers)` is called when the head of the answer has arrived.
        """
        request = _Request("POST", url, headers, [body] if isinstance(body, bytes) else body)
        request.on_sent, request.before_sent = on_sent, before_sent
        request.on_written, request.on_head = on_written, on_head
        return await self._answered(request, timeout)

    async def ask(
        self, method: str, url: str, headers: Mapping[str, str], timeout: float = ASK_DEADLINE
    ) -> Answer | NoAnswer:
        """A request that changes nothing when it is repeated (GET, DELETE), without a body. Never
        raises, but for cancellation.
        """
        return await self._answered(_Request(method, url, lambda: headers, None), timeout)

    async def _answered(self, request: _Request, timeout: float) -> Answer | NoAnswer:
        try:
            async with asyncio.timeout(timeout):
                return await self._carry(request)
        except TimeoutError:
            reader = request.reader
            if reader is not None and reader.has_head and reader.status >= 300:
                return reader.answer()  # A refusal says enough with its head.
            return NoAnswer(request.sent, f"no answer within {timeout:g} s")
        except _NoConnection as error:
            return NoAnswer(False, error.reason, error.is_misconfigured)
        except Exception as error:
            # A header or an address that can't be sent: ValueError, TypeError and others.
            what = "the call failed" if request.sent else "nothing was sent"
            return NoAnswer(request.sent, f"{what}: {error or type(error).__name__}")

    async def _carry(self, request: _Request) -> Answer | NoAnswer:
        """The answer to one request, over a connection that was quiet when it was sent."""
        origin, target = self._split(request.url)
        opened = repeated = 0
        while True:
            connection = self._kept(origin)
            if connection is None:
                if opened == CONNECTIONS_TRIED:
                    return NoAnswer(False, "nothing was sent: the server closed the connection")
                opened += 1
                connection = await self._connected(origin)
            is_reusable = False
            try:
                if request.before_sent is not None and not await request.before_sent():
                    is_reusable = True
                    return NoAnswer(False, "nothing was sent: it was held back")
                head = self._head(request, origin, target)
                if not connection.is_quiet() and not await connection.settle():
                    refused = self._refused(connection)
                    if refused is not None:
                        return refused
                    continue
                request.reader = AnswerReader(request.on_head)
                request.leave()
                is_reusable = await connection.exchange(
                    request.reader, head, request.body or [], request.on_written
                )
                answer = request.reader.answer()
            except Broken as error:
                if request.body is None and connection.served > 1 and not repeated:
                    repeated += 1  # It changes nothing, and the connection had been kept too long.
                    continue
                return self._broken(error)
            finally:
                if is_reusable:
                    self._keep(origin, connection)
                else:
                    connection.abort()
            if answer.status == 407 and self._proxy is not None and origin.scheme == "http":
                return NoAnswer(False, PROXY_LOGIN, True)
            return answer

    # --- connections ------------------------------------------------------------------------------

    def _kept(self, origin: Origin) -> Connection | None:
        kept = self._idle.get(origin)
        oldest = self._loop.time() - KEEP_ALIVE
        while kept:
            connection = kept.pop()
            if connection.is_open and connection.idle_since > oldest:
                return connection
            connection.abort()
        return None

    def _keep(self, origin: Origin, connection: Connection) -> None:
        if self._is_closed or not connection.is_open:
            connection.abort()
            return
        connection.idle_since = self._loop.time()
        self._idle.setdefault(origin, []).append(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(KEEP_ALIVE, self._sweep)

    def _sweep(self) -> None:
        """Close connections that were idle for KEEP_ALIVE."""
        self._sweeper = None
        oldest = self._loop.time() - KEEP_ALIVE
        next_at = []
        for origin, kept in list(self._idle.items()):
            fresh = [c for c in kept if c.is_open and c.idle_since > oldest]
            for connection in set(kept).difference(fresh):
                connection.abort()
            if fresh:
                self._idle[origin] = fresh
                next_at.append(fresh[0].idle_since + KEEP_ALIVE)
            else:
                del self._idle[origin]
        if next_at:
            self._sweeper = self._loop.call_at(min(next_at), self._sweep)

    async def _connected(self, origin: Origin) -> Connection:
        """A new connection, over which requests to the origin can be sent. Raises _NoConnection."""
        proxy = self._proxy
        host, port = (origin.host, origin.port) if proxy is None else (proxy.host, proxy.port)
        tls = self._trust.context() if origin.scheme == "https" else None
        connection = None
        try:
            async with asyncio.timeout(self._deadline):
                addresses = await self._looked_up(host, port)
                connection = await room.dial(
                    lambda: Connection(self._lane, self._open.discard),
                    addresses,
                    tls if proxy is None else None,
                    host,
                )
                self._open.add(connection)
                if proxy is not None and tls is not None:
                    await self._tunnel(connection, proxy, origin)
                    await room.secure(connection, tls, origin.host)
            if self._is_closed:
                raise _NoConnection("nothing was sent: the client is closed")
        except BaseException as error:
            if connection is not None:
                connection.abort()
                self._open.discard(connection)
            if isinstance(error, OSError | Unreachable):
                raise self._no_connection(error) from None
            raise
        return connection

    async def _looked_up(self, host: str, port: int) -> list[room.Address]:
        """The addresses of a host. Calls that ask at the same time share one question, as each
        takes a thread, and a resolver that is down takes it for long. Raises OSError."""
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                socket.inet_pton(family, host)
            except OSError:
                continue
            return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))]
        lookup = self._lookups.get((host, port))
        if lookup is None:
            lookup = self._lookups[host, port] = asyncio.create_task(self._look_up(host, port))
        found = await asyncio.shield(lookup)
        if isinstance(found, OSError):
            raise found
        return found

    async def _look_up(self, host: str, port: int) -> list[room.Address] | OSError:
        try:
            return list(await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            return error
        except UnicodeError:
            return OSError("the host's name is none")
        finally:
            del self._lookups[host, port]

    async def _tunnel(self, connection: Connection, proxy: Proxy, origin: Origin) -> None:
        """Have the proxy connect to the origin. Raises _NoConnection."""
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        there = f"{host}:{origin.port}"
        head = f"CONNECT {there} HTTP/1.1\r\nHost: {there}\r\n{DEFAULTS['user-agent']}"
        head += "" if proxy.login is None else f"Proxy-Authorization: {proxy.login}\r\n"
        answer = AnswerReader(None, is_tunnel=True)
        try:
            is_open = await connection.exchange(answer, f"{head}\r\n".encode(), [])
        except Broken as error:
            raise _NoConnection(f"no connection: the proxy fails: {error.reason}") from None
        if answer.status == 407:
            raise _NoConnection(PROXY_LOGIN, is_misconfigured=True)
        if not is_open:
            raise _NoConnection(
                f"no connection: the proxy does not connect to {there} (HTTP {answer.status})"
            )

    # --- what is sent -----------------------------------------------------------------------------

    def _split(self, url: str) -> tuple[Origin, str]:
        """An address as its origin and the request's target. Raises ValueError."""
        found = _URL.fullmatch(url)
        if found is None:
            raise ValueError("this is no address of http or https")
        scheme, host, port, path, query = found.groups()
        origin = self._origins.get((scheme, host, port))
        if origin is None:
            origin = self._origins[scheme, host, port] = _origin(scheme, host, port)
        target = f"{path or '/'}{query or ''}"
        if not (target.isascii() and target.isprintable()) or " " in target:
            target = quote(target, safe=_SAFE)
        return origin, target

    def _head(self, request: _Request, origin: Origin, target: str) -> bytes:
        """The request line and the headers. Raises ValueError, UnicodeError."""
        fields = request.headers()
        given = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
        # A line break would smuggle a header in.
        if not (given.count("\n") == given.count("\r") == len(fields)) or "\0" in given:
            raise ValueError("a header holds a line break")
        names = {self._names.get(name) or self._checked(name) for name in fields}
        lines = [line for name, line in DEFAULTS.items() if name not in names]
        if request.body is not None and "content-type" not in names:
            lines.append("Content-Type: application/json\r\n")
        if request.method != "GET":
            lines.append(f"Content-Length: {sum(map(len, request.body or ()))}\r\n")
        if self._proxy is not None and origin.scheme == "http":
            target = f"http://{origin.name}{target}"
            if self._proxy.login is not None:
                lines.append(f"Proxy-Authorization: {self._proxy.login}\r\n")
        return (
            f"{request.method} {target} HTTP/1.1\r\nHost: {origin.name}\r\n"
            f"{''.join(lines)}{given}\r\n"
        ).encode()

    def _checked(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("a header has a name that can't be sent")
        return self._names.setdefault(name, name.lower())

    # --- what went wrong --------------------------------------------------------------------------

    def _no_connection(self, error: OSError | Unreachable) -> _NoConnection:
        """The reason why there is no connection, and so nothing was sent."""
        to = "" if self._proxy is None else " to the proxy"
        if isinstance(error, TimeoutError):
            return _NoConnection(f"no connection within {self._deadline:g} s")
        cause = error.cause if isinstance(error, Unreachable) else error
        if isinstance(error, Unreachable) and error.is_secure:
            reason = room.tls_reason(cause, self._has_certificate)
            if reason is None:
                return _NoConnection("no connection: the server hung up in the TLS handshake")
            if isinstance(cause, ssl.SSLCertVerificationError):
                # Of the server, and perhaps renewed there soon.
                return _NoConnection(reason)
            return _NoConnection(f"no connection: {reason}", is_misconfigured=True)
        return _NoConnection(f"no connection{to}: {_in_words(cause)}")

    def _refused(self, connection: Connection) -> NoAnswer | None:
        """What TLS said on a connection that ended before a request was sent; None if nothing."""
        if connection.cause is None:
            return None
        reason = room.tls_reason(connection.cause, self._has_certificate)
        return None if reason is None else NoAnswer(False, f"no connection: {reason}", True)

    def _broken(self, error: Broken) -> NoAnswer:
        """What there is to say of a request that was sent and got no answer."""
        reason = error.reason
        if isinstance(error.cause, OSError):
            reason = room.tls_reason(error.cause, self._has_certificate) or _in_words(error.cause)
        if error.is_unread:
            return NoAnswer(False, f"no connection: {reason}", True)
        if error.is_break:
            return NoAnswer(True, f"the connection broke off after the request was sent: {reason}")
        return NoAnswer(True, reason)


class _Request:
    """One request, and what became of it so far."""

    __slots__ = (
        "before_sent",
        "body",
        "headers",
        "method",
        "on_head",
        "on_sent",
        "on_written",
        "reader",
        "sent",
        "url",
    )

    def __init__(
        self,
        method: str,
        url: str,
        headers: Callable[[], Mapping[str, str]],
        body: list[bytes | memoryview] | None,
    ) -> None:
        self.method, self.url, self.headers, self.body = method, url, headers, body
        self.on_sent: Callable[[], None] | None = None
        self.before_sent: Callable[[], Awaitable[bool]] | None = None
        self.on_written: Callable[[], None] | None = None
        self.on_head: Callable[[int, Mapping[str, str]], None] | None = None
        self.sent = False
        self.reader: AnswerReader | None = None
        """Of the answer, once it is sent."""

    def leave(self) -> None:
        """Its first byte leaves now."""
        if not self.sent:
            self.sent = True
            if self.on_sent is not None:
                self.on_sent()


class _NoConnection(Exception):
    """Nothing was sent, as there is no connection."""

    def __init__(self, reason: str, *, is_misconfigured: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.is_misconfigured = reason, is_misconfigured


PROXY_LOGIN = "the proxy wants a login (HTTP 407): give its user and password in RECALL_PROXY"

_URL = re.compile(
    r"(https?)://(\[[^\[\]/?#@]+\]|[^\[\]/?#@:\s]+)(?::(\d{1,5}))?(/[^?#]*)?(\?[^#]*)?(?:#.*)?",
    re.IGNORECASE | re.DOTALL,
)
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SAFE = "".join(map(chr, range(33, 127)))


def _origin(scheme: str, host: str, port: str | None) -> Origin:
    scheme = scheme.lower()
    usual = 443 if scheme == "https" else 80
    number = usual if port is None else int(port)
    bare = host.strip("[]")
    if not bare.isascii():
        bare = host = host.encode("idna").decode("ascii")
    return Origin(scheme, bare, number, host if number == usual else f"{host}:{number}")


def _in_words(error: BaseException) -> str:
    """An error of the system, without addresses and Python's own words."""
    number = getattr(error, "errno", None)
    if isinstance(number, int) and number > 0:
        return os.strerror(number)
    return getattr(error, "strerror", None) or str(error) or "the server hung up"

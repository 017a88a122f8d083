"""MCP over streamable HTTP: `/mcp`, a bearer token for each session, and `/healthz`.

A gate stands before the SDK. In this order it checks the path, that the request names this server
(Host) and comes from no web page of another (Origin), the method, the token, and the size of the
body, which has to arrive in time. Only then is anything of the body read by others. An address that
a browser was tricked into (DNS rebinding) fails at the second.

Stateless: each request is answered as JSON and forgotten. There are no MCP sessions, so that an
`mcp-session-id` of somebody else means nothing, and any number of replicas can stand side by side.
TLS is a proxy's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import re
import signal
import socket
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import uvicorn
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import tokens
from ..agent import AgentTools
from ..exposures import is_local
from ..settings import Settings
from ..terminal import USAGE, Trouble
from .process import Process, running
from .server import Context, serve_tools

PATH, HEALTH = "/mcp", "/healthz"
BODY_LEAST = 256 << 10
"""Octets of the largest request, at least; more where a message may be longer."""
READ_PAST = 8
"""How many times that is read of a body that is too large, so that its client is answered."""
BODY_WITHIN = 15.0
"""Seconds in which a body has to arrive."""
SESSION_AT_ONCE = 4
"""Calls of one session at once; further ones wait for their turn, so that one agent does not take
the places of all: there are eight connections to PostgreSQL."""
AT_ONCE = 200
"""Connections at once; further ones are answered with 503."""
LAST_CALL = 10
"""Seconds for the calls that are going on when the process is told to end."""
_SESSION = "recall_worker.session"
"""Where a request's session stands in its scope, by the gate's hand."""


@dataclass(frozen=True, slots=True)
class Refusal:
    status: int
    error: str
    """In a word, for programs."""
    says: str
    headers: tuple[tuple[str, str], ...] = ()


class Gate:
    """The ASGI application before the SDK's."""

    def __init__(self, process: Process, hosts: frozenset[str], inner: ASGIApp) -> None:
        self._process = process
        self._hosts = hosts
        self._inner = inner
        self._body_most = max(BODY_LEAST, 8 * process.settings.agent_message)
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._keys: tuple[str | None, list[tokens.Key]] = (None, [])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == HEALTH and scope["method"] in ("GET", "HEAD"):
            await _answer(send, 200, b"ok\n", "text/plain")
            return
        found = self._judge(scope)
        if isinstance(found, tokens.Claims):
            body = await self._body(scope, receive)
            if isinstance(body, bytes):
                scope[_SESSION] = found.session_id
                turn = self._turns.setdefault(found.session_id, asyncio.Semaphore(SESSION_AT_ONCE))
                async with turn:
                    await self._inner(scope, _replay(body, receive), send)
                return
            found = body
        if found.status != 405:  # With GET, each client asks once whether there is a stream.
            self._process.events.tell("mcp.rejected", reason=found.says, http_status=found.status)
        document = {"error": found.error, "message": found.says}
        # What was not read of a body must not be taken for the next request.
        headers = (*found.headers, ("connection", "close"))
        await _answer(
            send, found.status, json.dumps(document).encode(), "application/json", headers
        )

    def _judge(self, scope: Scope) -> tokens.Claims | Refusal:
        if scope["path"] != PATH:
            return Refusal(404, "not_found", f"there is nothing here: MCP is at {PATH}")
        hosts = _headers(scope, b"host")
        if len(hosts) != 1 or not is_known(hosts[0], self._hosts):
            return Refusal(
                421, "wrong_host", "the header Host is not a name of this server (RECALL_MCP_HOSTS)"
            )
        origins = _headers(scope, b"origin")
        if origins and (len(origins) > 1 or not _is_own(origins[0], self._hosts)):
            return Refusal(
                403, "wrong_origin", "the header Origin is a web page of another server's"
            )
        if scope["method"] != "POST":
            return Refusal(
                405,
                "method_not_allowed",
                "this server answers POST: it keeps no sessions and sends nothing by itself",
                (("allow", "POST"),),
            )
        given = _headers(scope, b"authorization")
        if not given:
            return _unauthorized("there is no token: send Authorization: Bearer and the token")
        scheme, _, token = given[0].partition(" ")
        if len(given) > 1 or scheme.lower() != "bearer":
            return _unauthorized("there is no bearer token in the header Authorization", "request")
        try:
            return tokens.verify(
                self._known_keys(), token.strip(), audience=self._process.settings.token_audience
            )
        except tokens.TokenError as error:
            return _unauthorized(f"the token is refused: {error}", "token")

    def _known_keys(self) -> list[tokens.Key]:
        """The keys as their file has them now."""
        text = self._process.secrets.current_if_changed("token_key")
        if text != self._keys[0]:
            self._keys = (text, tokens.keys(text or ""))
        return self._keys[1]

    async def _body(self, scope: Scope, receive: Receive) -> bytes | Refusal:
        large = Refusal(
            413, "too_large", f"a request has at most {self._body_most} octets: shorten the message"
        )
        # A client that is still sending when it is answered may lose the answer with the
        # connection: what is somewhat too large is read to its end, and thrown away.
        most = self._body_most * (1 if _headers(scope, b"expect") else READ_PAST)
        for length in _headers(scope, b"content-length"):
            if not re.fullmatch("[0-9]{1,18}", length) or int(length) > most:
                return large
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_WITHIN):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return Refusal(400, "incomplete", "the request was not sent to its end")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._body_most:
                        parts.clear()
                    if size > most:
                        return large
                    if not message.get("more_body", False):
                        return large if size > self._body_most else b"".join(parts)
        except TimeoutError:
            return Refusal(408, "too_slow", f"the body did not arrive within {BODY_WITHIN:g} s")


def _unauthorized(says: str, what: str | None = None) -> Refusal:
    """As RFC 6750 answers."""
    challenge = 'Bearer realm="recall-worker"'
    if what is not None:
        challenge += f', error="invalid_{what}", error_description="{says}"'
    return Refusal(401, f"invalid_{what or 'token'}", says, (("www-authenticate", challenge),))


def _headers(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key == name]


def is_known(host: str, known: Collection[str]) -> bool:
    """Whether a Host, as a client sends it, is among the known ones; one that is known without a
    port is with any."""
    name = host.lower()
    return name in known or re.sub(r":\d{1,5}$", "", name) in known


def _is_own(origin: str, known: Collection[str]) -> bool:
    """Whether a web page of this server sends it."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https")
        and not (parts.path or parts.query or parts.fragment)
        and is_known(parts.netloc, known)
    )


def _replay(body: bytes, receive: Receive) -> Receive:
    """What the application behind the gate receives: the body, and then what the client does."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


async def _answer(
    send: Send,
    status: int,
    body: bytes,
    kind: str,
    headers: tuple[tuple[str, str], ...] = (),
) -> None:
    own = (
        ("content-type", kind),
        ("content-length", str(len(body))),
        ("cache-control", "no-store"),
    )
    encoded = [(name.encode(), value.encode("latin-1", "replace")) for name, value in own + headers]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


class _Server(uvicorn.Server):
    """uvicorn's, which leaves signals to us: it would end the process by the signal that it got,
    and not with status 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(chosen: Settings, address: tuple[str, int], given: Collection[str]) -> None:
    """Serve until a signal stops it. Raises Trouble where the address can't be served."""
    with _listening(*address) as listener:
        port = listener.getsockname()[1]
        hosts = known_hosts(chosen, address[0], port)
        async with running(chosen, given) as process, _application(process, hosts) as application:
            config = uvicorn.Config(
                application,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                proxy_headers=False,
                server_header=False,
                limit_concurrency=AT_ONCE,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=LAST_CALL,
            )
            server = _Server(config)

            def stop() -> None:
                server.force_exit = server.should_exit
                server.should_exit = True

            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stop)
            process.events.tell("mcp.listening", host=address[0], port=port)
            await server.serve(sockets=[listener])
            process.events.tell("mcp.stopped")


@contextlib.asynccontextmanager
async def _application(process: Process, hosts: frozenset[str]) -> AsyncIterator[Gate]:
    def tools_of(context: Context) -> AgentTools:
        # The request is the one that passed the gate: its scope has the token's session.
        assert context.request is not None
        session = context.request.scope[_SESSION]
        assert isinstance(session, str)
        return process.tools(session)

    server = serve_tools(tools_of, process.events)
    manager = StreamableHTTPSessionManager(
        server,
        json_response=True,
        stateless=True,
        max_request_body_size=1 << 30,  # The gate has checked it.
    )
    async with manager.run():
        yield Gate(process, hosts, manager.handle_request)


def known_hosts(chosen: Settings, host: str, port: int) -> frozenset[str]:
    """The names, in lower case, by which a client may call this server. Raises Trouble where none
    is known."""
    names = [name.strip() for name in (chosen.mcp_hosts or "").split(",") if name.strip()]
    if is_local(host):
        names += [f"{one}:{port}" for one in ("localhost", "127.0.0.1", "[::1]")]
    elif not names:
        if _is_wildcard(host):
            raise Trouble(
                f"--http {host}:{port} listens on every address, and by which name clients call it "
                "is not known",
                "RECALL_MCP_HOSTS=mcp.example.com (the name that clients use)",
                status=USAGE,
            )
        names = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    return frozenset(name.lower() for name in names)


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family, kind, proto, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise _no_address(host, port, error) from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(where)
            listener.listen(256)
        except OSError as error:
            raise _no_address(host, port, error) from None
        yield listener


def _no_address(host: str, port: int, error: OSError) -> Trouble:
    return Trouble(
        f"--http {host}:{port} can't be listened on: {error.strerror or error}",
        "another port, or an address of this host",
    )

"""`reference-api`: a run endpoint as recall-worker requires it, on the endpoint kit
(`recall_worker.endpoint`), with an agent of one's own.

What it promises a caller of `POST /sessions/{id}/run` is what the kit promises: docs/endpoint.md.
Here are the application's parts: which sessions there are (all, but for those that were deleted,
and those whose id begins with "missing"), their messages, the agent, the chat. Everything is in
memory, and lost at the end.

For people and for the demo: `PUT` and `DELETE /sessions/{id}/chat` (a person enters, leaves), `GET`
and `DELETE /sessions/{id}`, `GET /runs`, `GET /healthz`. docs/openapi.yaml describes the contract;
tests compare both.

It needs no framework, and no package besides recall-worker's own: requests come from
`protocols.server`, and are given to the kit whole. An application with a framework mounts the kit
instead, as in examples/fastapi_agent.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

from ..endpoint import Endpoint, RunRequest, SessionBusy
from ..endpoint.request import Asked, Refusal, authorize
from ..events import escape_controls
from ..protocols.server import Handler, Reply, Request, ServerConnection
from ..terminal import Trouble, rfc3339, tell

Agent = Callable[[str, str, Mapping[str, Any]], Awaitable[str]]
"""The agent: from session id, user message and the request's recall to the agent's reply."""

HEAD_MOST, BODY_MOST = 1 << 16, 16 << 20
STOPPING = 1.0
"""Seconds in which callers are answered when the API stops."""
RUNS_KEPT = 100_000

_SILENT = logging.getLogger("recall_worker.endpoint.reference")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


@dataclass(slots=True, eq=False)
class Call:
    """One request to the run endpoint."""

    at: datetime
    """When its head had arrived."""
    session_id: str
    key: str
    attempt: str
    http_status: int | None = None
    """None while it is open, and if the caller disconnected before it was answered."""
    code: str | None = None
    left_at: datetime | None = None
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the caller has disconnected."""


@dataclass(slots=True, eq=False)
class Run:
    """The agent's work under one key."""

    call: Call
    request: RunRequest
    status: str = "running"
    said: str | None = None
    ended_at: datetime | None = None

    @property
    def left(self) -> asyncio.Event:
        """Set when the caller has disconnected."""
        return self.call.left

    @property
    def user_message(self) -> str:
        return self.request.user_message

    @property
    def recall(self) -> Mapping[str, Any]:
        return self.request.recall

    def shown(self) -> dict[str, Any]:
        return {
            "key": self.call.key,
            "session_id": self.call.session_id,
            "status": self.status,
            "attempt": self.call.attempt,
            "user_message": self.user_message,
            "said": self.said,
            "recall": self.recall,
            "called_at": rfc3339(self.call.at),
            "ended_at": self.ended_at and rfc3339(self.ended_at),
        }


class ReferenceAPI:
    """The API around `agent`.

    `token`: the bearer token that it requires. `retry_after`: seconds of Retry-After for a busy
    session or a current run. `accept_after`: seconds after which a run that has not ended is
    accepted (202); None: never. `watch(call)` is called when a request to the run endpoint has been
    answered, or its caller has disconnected.
    """

    def __init__(
        self,
        agent: Agent,
        *,
        token: str | None = None,
        retry_after: int = 2,
        accept_after: float | None = None,
        watch: Callable[[Call], None] = lambda _: None,
    ) -> None:
        self.calls: deque[Call] = deque(maxlen=100_000)
        self.runs: dict[str, Run] = {}
        """By key, oldest first."""
        self.inside: dict[str, Run | None] = {}
        """The busy sessions: taken by a run, or (None) by a person."""
        self.messages: dict[str, list[dict[str, str]]] = {}
        self._agent, self._watch = agent, watch
        self._tokens = [token.encode()] if token else []
        self.endpoint = Endpoint(
            self._perform,
            self._exists,
            token=token or None,
            store=self._store,
            answer_within=accept_after,
            retry_after=retry_after,
            drain=0.0,
            logger=_SILENT,
        )
        self._people: dict[str, AsyncExitStack] = {}
        self._deleted: set[str] = set()
        self._stopping = False
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()

    # --- what the kit asks an application for -----------------------------------------------------

    async def _exists(self, session_id: str) -> bool:
        return not session_id.startswith("missing") and session_id not in self._deleted

    async def _store(self, session_id: str, system_message: str, _: str) -> None:
        self._say(session_id, "system", system_message)

    async def _perform(self, session_id: str, message: str, recall: RunRequest) -> str:
        call = next(call for call in reversed(self.calls) if call.left is recall.left)
        run = self.runs[recall.key] = self.inside[session_id] = Run(call, recall)
        if len(self.runs) > RUNS_KEPT:
            del self.runs[next(iter(self.runs))]
        try:
            self._say(session_id, "user", message)
            run.said = await self._agent(session_id, message, recall.recall)
            self._say(session_id, "assistant", run.said)
            run.status = "completed"
            return run.said
        except asyncio.CancelledError:
            run.status = "interrupted" if self._stopping else "cancelled"
            raise
        except Exception as error:
            run.status, run.said = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            run.ended_at = datetime.now(UTC)
            del self.inside[session_id]

    def _say(self, session_id: str, role: str, content: str) -> None:
        if session_id not in self._deleted:
            self.messages.setdefault(session_id, []).append({"role": role, "content": content})

    # --- people -----------------------------------------------------------------------------------

    async def enter(self, session_id: str) -> None:
        """A person enters a free session. Raises an error that HTTP callers see as 404 or 409."""
        await self._must_exist(session_id)
        if session_id in self._people:
            return
        stack = self._people[session_id] = AsyncExitStack()
        try:
            await stack.enter_async_context(self.endpoint.session(session_id))
        except SessionBusy:
            del self._people[session_id]
            raise Refusal(
                409, "session_busy", "the agent is at work in this session", Retry_After="1"
            ) from None
        self.inside[session_id] = None

    async def leave(self, session_id: str) -> None:
        """The person leaves."""
        if (stack := self._people.pop(session_id, None)) is not None:
            self.inside.pop(session_id, None)
            await stack.aclose()

    async def _must_exist(self, session_id: str) -> None:
        if not await self._exists(session_id):
            raise Refusal(404, "session_not_found", "there is no such session")

    async def _chat(self, request: Request) -> Reply:
        await (self.enter if request.method == "PUT" else self.leave)(request.names["id"])
        return Reply(204)

    async def _session(self, request: Request) -> Reply:
        session_id = request.names["id"]
        await self._must_exist(session_id)
        if request.method == "DELETE":
            self._deleted.add(session_id)
            self.messages.pop(session_id, None)
            return Reply(204)
        return _json(
            {"busy": session_id in self.inside, "messages": self.messages.get(session_id, [])}
        )

    # --- HTTP -------------------------------------------------------------------------------------

    async def run(self, request: Request) -> Reply:
        """POST /sessions/{id}/run"""
        headers = request.headers
        key, attempt = headers.get("Idempotency-Key", ""), headers.get("Recall-Attempt", "")
        call = Call(datetime.now(UTC), request.names["id"], key, attempt)
        self.calls.append(call)
        try:
            reply = await self._of_the_kit(request, call.left)
            call.http_status = reply.status
            if reply.status >= 400:
                call.code = json.loads(reply.body)["code"]
            return reply
        except asyncio.CancelledError:
            call.left_at = datetime.now(UTC)
            call.left.set()
            raise
        finally:
            self._watch(call)

    async def accepted(self, request: Request) -> Reply:
        """GET, DELETE /sessions/{id}/run/{key}: the state of a run; end it."""
        return await self._of_the_kit(request, asyncio.Event())

    async def _of_the_kit(self, request: Request, left: asyncio.Event) -> Reply:
        return await self.endpoint.answer(
            Asked(request.method, request.path, request.headers, request.body, left=left)
        )

    async def _runs(self, _: Request) -> Reply:
        return _json([run.shown() for run in self.runs.values()])

    async def _healthz(self, _: Request) -> Reply:
        return _json({"status": "ok"})

    async def answer(self, request: Request) -> Reply:
        """The answer to any request."""
        methods, handler, request.names = self._route(request.path)
        if handler is None:
            return _json({"code": "not_found", "message": "nothing is at this address"}, 404)
        if request.method not in methods:
            allowed = {"Allow": ",".join(methods)}
            return _json({"code": "method", "message": "not by this method"}, 405, allowed)
        try:
            # The kit checks it itself: a call with a wrong token also counts as a call.
            if handler not in (self.run, self._healthz):
                authorize(Asked(request.method, request.path, request.headers), self._tokens)
            return await handler(request)
        except Refusal as refusal:
            return _json(
                {"code": refusal.code, "message": str(refusal)}, refusal.status, refusal.headers
            )

    def _route(self, path: str) -> tuple[tuple[str, ...], Handler | None, dict[str, str]]:
        """What an address stands for: the methods that it takes, who answers, and the names in
        it."""
        match path.split("/")[1:]:
            case ["sessions", id, "run"] if id:
                return ("POST",), self.run, {"id": unquote(id)}
            case ["sessions", id, "run", key] if id and key:
                return ("GET", "DELETE"), self.accepted, {"id": unquote(id), "key": unquote(key)}
            case ["sessions", id, "chat"] if id:
                return ("PUT", "DELETE"), self._chat, {"id": unquote(id)}
            case ["sessions", id] if id:
                return ("GET", "DELETE"), self._session, {"id": unquote(id)}
            case ["runs"]:
                return ("GET", "HEAD"), self._runs, {}
            case ["healthz"]:
                return ("GET", "HEAD"), self._healthz, {}
            case _:
                return (), None, {}

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen (port 0: on a free one); returns the RECALL_RUN_URL for it. Raises OSError if it
        can't listen.
        """
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self.answer, self._connections), host, port
        )
        await self.endpoint.start()
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- nothing is bound here
        where = f"[{reached}]" if ":" in reached else reached
        return (
            f"http://{where}:{self._server.sockets[0].getsockname()[1]}/sessions/{{session_id}}/run"
        )

    async def stop(self) -> None:
        """Abort the runs, answer their callers, and stop listening."""
        self._stopping = True
        await self.endpoint.stop()
        if self._server is not None:
            server, self._server = self._server, None
            server.close()
            answering = [c.task for c in self._connections if c.task is not None]
            if answering:
                await asyncio.wait(answering, timeout=STOPPING)
            for connection in list(self._connections):
                connection.close()
            await asyncio.sleep(0)


class Connection(ServerConnection):
    """A caller's connection."""

    def __init__(self, handler: Handler, others: set[Connection]) -> None:
        super().__init__(handler, head_most=HEAD_MOST, body_most=BODY_MOST)
        self._others = others

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._others.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._others.discard(self)


def _json(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    fields = {"Content-Type": "application/json; charset=utf-8"} | dict(headers or {})
    return Reply(status, json.dumps(document).encode(), fields)


def serve(
    host: str, port: int, *, seconds: float, token: str | None, accept_after: float | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, with an agent that waits for `seconds` and says so."""
    asyncio.run(_serve(host, port, seconds, token, accept_after))


async def _serve(
    host: str, port: int, seconds: float, token: str | None, accept_after: float | None
) -> None:
    async def agent(session_id: str, user_message: str, recall: Mapping[str, Any]) -> str:
        await asyncio.sleep(seconds)
        return f"looked after, for {seconds:g} s: {user_message}"

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    api = ReferenceAPI(agent, token=token, accept_after=accept_after, watch=_show)
    try:
        url = await api.start(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Trouble(
                f"port {port} on {host} is in use",
                "recall-worker reference-api --port 0 (a free one)",
            ) from None
        raise Trouble(
            f"can't listen on {host}, port {port}: {error.strerror or error}",
            "--host 127.0.0.1 --port 8090",
        ) from None
    tell(
        f"The reference API listens on {url.partition('/sessions/')[0]}; its agent takes "
        f"{seconds:g} s. For the worker:"
    )
    tell(f"  export RECALL_RUN_URL='{url}'")
    if token:
        tell("  and the same RECALL_RUN_TOKEN as here.")
    await stop.wait()
    await api.stop()


def _show(call: Call) -> None:
    became = (
        "the caller disconnected"
        if call.http_status is None
        else f"{call.http_status} {call.code or ''}".strip()
    )
    tell(escape_controls(f"{call.at.astimezone():%H:%M:%S} {call.session_id} {call.key}: {became}"))

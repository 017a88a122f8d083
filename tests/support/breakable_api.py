"""A run endpoint that keeps the contract, in small steps that a test can break one by one: what
`check-endpoint` must find. Everything is in memory.

It shares nothing with the endpoint kit, so that a mistake of the kit's is none of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, unquote

from recall_worker.contract.reference_api import Connection
from recall_worker.protocols.server import Handler, Reply, Request
from recall_worker.recall import CALL_TYPES
from recall_worker.terminal import rfc3339

Agent = Callable[[str, str, Mapping[str, Any]], Awaitable[str]]
"""The agent: from session id, user message and the request's recall to the agent's reply."""

KEYS_KEPT = timedelta(days=2)
"""How long an answer stays known under its key: longer than any worker goes on asking
(RECALL_GIVE_UP, a day).
"""
STOPPING = 1.0
"""Seconds in which callers are answered when the API stops."""
TEXTS = ("session_id", "user_message", "system_message")
ENDING = 1.0
"""Seconds that an agent has to stop before the caller who asked for that is answered."""


@dataclass(slots=True)
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


@dataclass(slots=True, eq=False)
class Run:
    """The agent's work under one key."""

    call: Call
    user_message: str
    recall: Mapping[str, Any]
    fingerprint: bytes
    status: str = "running"
    said: str | None = None
    ended_at: datetime | None = None
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the caller has disconnected."""
    task: asyncio.Task[None] | None = None
    unwanted: bool = False
    """Whether a caller has asked to end it."""

    @property
    def address(self) -> str:
        """Its path, with the key encoded as one segment."""
        key = quote(self.call.key, safe="")
        return "/runs/" + (key.replace(".", "%2E") if key in (".", "..") else key)

    def answer(self) -> tuple[int, dict[str, Any]]:
        match self.status:
            case "running":
                return 202, {"run_id": self.call.key, "status": self.status}
            case "completed":
                return 200, {"status": self.status, "output": self.said}
            case "failed":
                return 200, {"status": self.status, "error": self.said}
            case "cancelled":
                return 200, {"status": self.status}
            case _:
                return 500, {"code": "interrupted", "message": "the API ended in mid-run"}

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


class _Refusal(Exception):
    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class BreakableAPI:
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
        self._agent, self._watch, self._retry_after, self._accept_after = (
            agent,
            watch,
            retry_after,
            accept_after,
        )
        self._token = token.encode() if token else None
        self._deleted: set[str] = set()
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()

    # --- the run endpoint -------------------------------------------------------------------------

    async def run(self, request: Request) -> Reply:
        """POST /sessions/{id}/run"""
        key, session_id = request.headers.get("Idempotency-Key", ""), request.names["id"]
        call = Call(datetime.now(UTC), session_id, key, request.headers.get("Recall-Attempt", ""))
        self.calls.append(call)
        run = None
        try:
            self._authorize(request)
            run = self._started_or_known(
                call,
                _checked(request.body, session_id, key),
                hashlib.sha256(request.body).digest(),
            )
            if run.call is call and run.task is not None:
                # `wait`, not `await`: if our caller disconnects, only the waiting ends.
                await asyncio.wait({run.task}, timeout=self._accept_after)
            call.http_status, answer = run.answer()
            headers = {} if run.call is call else {"Idempotent-Replayed": "true"}
            if run.status == "running":
                headers["Location"] = run.address
            return _json(answer, call.http_status, headers)
        except asyncio.CancelledError:
            call.left_at = datetime.now(UTC)
            if run is not None:
                run.left.set()
            raise
        except _Refusal as refusal:
            call.http_status, call.code = refusal.status, refusal.code
            raise
        finally:
            self._watch(call)

    def _started_or_known(self, call: Call, document: Mapping[str, Any], fingerprint: bytes) -> Run:
        """A new run, started; or the one of this key. The atomic step: it contains no await."""
        self._must_exist(call.session_id)
        if (run := self.runs.get(call.key)) is not None:
            if run.fingerprint != fingerprint:
                raise _Refusal(422, "key_reused", "this Idempotency-Key stands for another request")
            if run.status == "running" and self._accept_after is None:
                raise self._later("run_in_progress", "the run under this key goes on")
            return run
        if call.session_id in self.inside:
            raise self._later("session_busy", "somebody is in this session")
        run = Run(call, document["user_message"], document["recall"], fingerprint)
        self._forget_old_keys()
        self.runs[call.key] = self.inside[call.session_id] = run
        self._say(call.session_id, "system", document["system_message"])
        run.task = asyncio.create_task(self._work(run))
        return run

    async def _work(self, run: Run) -> None:
        session_id = run.call.session_id
        try:
            self._say(session_id, "user", run.user_message)
            run.said = await self._agent(session_id, run.user_message, run.recall)
            self._say(session_id, "assistant", run.said)
            run.status = "completed"
        except asyncio.CancelledError:
            run.status = "cancelled" if run.unwanted else "interrupted"
            raise
        except Exception as error:
            run.status, run.said = "failed", f"{type(error).__name__}: {error}"
        finally:
            run.ended_at = datetime.now(UTC)
            del self.inside[session_id]

    async def accepted(self, request: Request) -> Reply:
        """GET, DELETE /runs/{key}: the state of a run; end it (again and again does no more)."""
        run = self.runs.get(request.names["key"])
        if run is None:
            raise _Refusal(404, "run_not_found", "there is no such run")
        if request.method == "DELETE":
            if run.task is not None and not run.task.done():
                run.unwanted = True
                run.task.cancel()
                await asyncio.wait({run.task}, timeout=ENDING)
            return Reply(204)
        status, answer = run.answer()
        if run.status == "running":
            return _json(answer, headers={"Retry-After": str(self._retry_after)})
        return _json({"run_id": run.call.key} | answer, status)

    def _say(self, session_id: str, role: str, content: str) -> None:
        if session_id not in self._deleted:
            self.messages.setdefault(session_id, []).append({"role": role, "content": content})

    def _forget_old_keys(self) -> None:
        old = datetime.now(UTC) - KEYS_KEPT
        while (
            self.runs
            and (first := next(iter(self.runs.values()))).ended_at is not None
            and first.ended_at < old
        ):
            del self.runs[first.call.key]

    # --- sessions, people, start and stop ---------------------------------------------------------

    def enter(self, session_id: str) -> None:
        """A person enters a free session. Raises an error that HTTP callers see as 404 or 409."""
        self._must_exist(session_id)
        if self.inside.setdefault(session_id, None) is not None:
            raise self._later("session_busy", "the agent is at work in this session")

    def leave(self, session_id: str) -> None:
        """The person leaves."""
        if self.inside.get(session_id, self) is None:
            del self.inside[session_id]

    def _must_exist(self, session_id: str) -> None:
        if session_id.startswith("missing") or session_id in self._deleted:
            raise _Refusal(404, "session_not_found", "there is no such session")

    def _later(self, code: str, message: str) -> _Refusal:
        return _Refusal(409, code, message, Retry_After=str(self._retry_after))

    def _authorize(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._token):
            raise _Refusal(
                401, "unauthorized", "another bearer token is required", WWW_Authenticate="Bearer"
            )

    async def _chat(self, request: Request) -> Reply:
        (self.enter if request.method == "PUT" else self.leave)(request.names["id"])
        return Reply(204)

    async def _session(self, request: Request) -> Reply:
        session_id = request.names["id"]
        self._must_exist(session_id)
        if request.method == "DELETE":
            self._deleted.add(session_id)
            self.messages.pop(session_id, None)
            return Reply(204)
        return _json(
            {"busy": session_id in self.inside, "messages": self.messages.get(session_id, [])}
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
            # The run endpoint checks it itself: a call with a wrong token also counts as a call.
            if handler not in (self.run, self._healthz):
                self._authorize(request)
            return await handler(request)
        except _Refusal as refusal:
            return _json(
                {"code": refusal.code, "message": str(refusal)}, refusal.status, refusal.headers
            )

    def _route(self, path: str) -> tuple[tuple[str, ...], Handler | None, dict[str, str]]:
        """What an address stands for: the methods that it takes, who answers, and the names in
        it."""
        match path.split("/")[1:]:
            case ["sessions", id, "run"] if id:
                return ("POST",), self.run, {"id": unquote(id)}
            case ["sessions", id, "chat"] if id:
                return ("PUT", "DELETE"), self._chat, {"id": unquote(id)}
            case ["sessions", id] if id:
                return ("GET", "DELETE"), self._session, {"id": unquote(id)}
            case ["runs", key] if key:
                return ("GET", "DELETE"), self.accepted, {"key": unquote(key)}
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
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        where = f"[{reached}]" if ":" in reached else reached
        return (
            f"http://{where}:{self._server.sockets[0].getsockname()[1]}/sessions/{{session_id}}/run"
        )

    async def stop(self) -> None:
        """Abort the runs, answer their callers, and stop listening."""
        tasks = [
            run.task for run in self.runs.values() if run.task is not None and not run.task.done()
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            server, self._server = self._server, None
            server.close()
            answering = [c.task for c in self._connections if c.task is not None]
            if answering:
                await asyncio.wait(answering, timeout=STOPPING)
            for connection in list(self._connections):
                connection.close()
            await asyncio.sleep(0)


def _checked(body: bytes, session_id: str, key: str) -> dict[str, Any]:
    """The request's document, if it is valid. Raises _Refusal."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise _Refusal(400, "malformed", "the body is not JSON") from None
    if not key:
        raise _Refusal(400, "key_missing", "a run needs an Idempotency-Key")
    fields = document if isinstance(document, dict) else {}
    if not _is_recall(fields.get("recall")) or any(
        not isinstance(fields.get(name), str) for name in TEXTS
    ):
        raise _Refusal(
            422,
            "invalid",
            (
                f"required: an object with {', '.join(TEXTS)} (texts) and recall, as in "
                "docs/openapi.yaml"
            ),
        )
    if fields["session_id"] != session_id:
        raise _Refusal(422, "invalid", "the body names another session than the address")
    return fields


def _is_recall(value: Any) -> bool:
    """Whether this is the `recall` of a request. It may have more fields than are known today."""
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("id"), str)
        or value.get("call_type") not in CALL_TYPES
    ):
        return False
    try:
        datetime.fromisoformat(value["scheduled_for"])
    except (KeyError, TypeError, ValueError):
        return False
    return all(
        _is_whole(value.get(name)) and value[name] >= least
        for name, least in (("occurrence", 1), ("missed", 0))
    )


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number in JSON: 1.0 is one."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and value.is_integer()
    )


def _json(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    fields = {"Content-Type": "application/json; charset=utf-8"} | dict(headers or {})
    return Reply(status, json.dumps(document).encode(), fields)

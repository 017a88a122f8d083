"""`reference-api`: a run endpoint as recall-worker requires it, small enough to be read whole.
Write yours like `ReferenceAPI.run`.

What it guarantees to a caller of `POST /sessions/{id}/run`:
- In one atomic step (here: no await in it; with a database: one transaction) it checks that the
  session is free, takes it for the run, and stores the system message under the key. A taken
  session is 409 `session_busy`, with Retry-After.
- `Idempotency-Key` stands for one run (draft-ietf-httpapi-idempotency-key-header-07): during that
  run it is 409 `run_in_progress`; afterwards it gets the run's answer again, however it ended; with
  another body it is 422 `key_reused`.
- If it may accept runs (`accept_after`), one that has not ended by then is answered 202, with its
  address in Location and a `run_id`: GET it until its status is final, DELETE it to end it. The
  same key meanwhile gets the same 202.
- A caller who disconnects does not end the run: it may be a worker that died, and another one calls
  again with the same key. An agent that should stop then (the recall may have been cancelled)
  checks
  `Run.left`.
- A session that does not exist is 404 with a code, as any other 404 means a wrong address. A failed
  run is an answer: 200 with `"status": "failed"`. A run that the API itself interrupted is a 500:
  nobody can say how far it came.

Sessions exist unless they were deleted or their id begins with "missing". Everything is in memory,
and lost at the end.

Also here, for people and for the demo: `PUT` and `DELETE /sessions/{id}/chat` (a person enters,
leaves), `GET` and `DELETE /sessions/{id}`, `GET /runs`, `GET /healthz`. docs/openapi.yaml describes
the contract; tests compare both.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import json
import logging
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from ..events import escape_controls
from ..recall import CALL_TYPES
from ..terminal import Trouble, rfc3339, tell

Agent = Callable[[str, str, Mapping[str, Any]], Awaitable[str]]
"""The agent: from session id, user message and the request's recall to the agent's reply."""

KEYS_KEPT = timedelta(days=2)
"""How long an answer stays known under its key: longer than any worker goes on asking
(RECALL_GIVE_UP, a day).
"""
BODY_MOST = 16 << 20
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
        self._agent, self._watch, self._retry_after, self._accept_after = (
            agent,
            watch,
            retry_after,
            accept_after,
        )
        self._token = token.encode() if token else None
        self._deleted: set[str] = set()
        self._runner: web.AppRunner | None = None

    # --- the run endpoint -------------------------------------------------------------------------

    async def run(self, request: web.Request) -> web.Response:
        """POST /sessions/{id}/run"""
        key, session_id = request.headers.get("Idempotency-Key", ""), request.match_info["id"]
        call = Call(datetime.now(UTC), session_id, key, request.headers.get("Recall-Attempt", ""))
        self.calls.append(call)
        run = None
        try:
            self._authorize(request)
            body = await request.read()
            run = self._started_or_known(
                call, _checked(body, session_id, key), hashlib.sha256(body).digest()
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

    async def accepted(self, request: web.Request) -> web.Response:
        """GET, DELETE /runs/{key}: the state of a run; end it (again and again does no more)."""
        run = self.runs.get(request.match_info["key"])
        if run is None:
            raise _Refusal(404, "run_not_found", "there is no such run")
        if request.method == "DELETE":
            if run.task is not None and not run.task.done():
                run.unwanted = True
                run.task.cancel()
                await asyncio.wait({run.task}, timeout=ENDING)
            return web.Response(status=204)
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

    def _authorize(self, request: web.Request) -> None:
        if self._token is None:
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._token):
            raise _Refusal(
                401, "unauthorized", "another bearer token is required", WWW_Authenticate="Bearer"
            )

    async def _chat(self, request: web.Request) -> web.Response:
        (self.enter if request.method == "PUT" else self.leave)(request.match_info["id"])
        return web.Response(status=204)

    async def _session(self, request: web.Request) -> web.Response:
        session_id = request.match_info["id"]
        self._must_exist(session_id)
        if request.method == "DELETE":
            self._deleted.add(session_id)
            self.messages.pop(session_id, None)
            return web.Response(status=204)
        return _json(
            {"busy": session_id in self.inside, "messages": self.messages.get(session_id, [])}
        )

    async def _runs(self, _: web.Request) -> web.Response:
        return _json([run.shown() for run in self.runs.values()])

    async def _healthz(self, _: web.Request) -> web.Response:
        return _json({"status": "ok"})

    @web.middleware
    async def _authorized(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            # The run endpoint checks it itself: a call with a wrong token also counts as a call.
            if request.match_info.route.name not in ("run", "healthz"):
                self._authorize(request)
            return await handler(request)
        except _Refusal as refusal:
            return _json(
                {"code": refusal.code, "message": str(refusal)}, refusal.status, refusal.headers
            )

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen (port 0: on a free one); returns the RECALL_RUN_URL for it. Raises OSError if it
        can't listen.
        """
        app = web.Application(middlewares=[self._authorized], client_max_size=BODY_MOST)
        # aiohttp's default pattern excludes braces, and an id may contain any character.
        session, run = "/sessions/{id:[^/]+}", "/runs/{key:[^/]+}"
        app.router.add_post(f"{session}/run", self.run, name="run")
        for method in ("PUT", "DELETE"):
            app.router.add_route(method, f"{session}/chat", self._chat)
        for method in ("GET", "DELETE"):
            app.router.add_route(method, session, self._session)
            app.router.add_route(method, run, self.accepted)
        app.router.add_get("/runs", self._runs)
        app.router.add_get("/healthz", self._healthz, name="healthz")
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except BaseException:
            await self.stop()
            raise
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- nothing is bound here
        where = f"[{reached}]" if ":" in reached else reached
        return f"http://{where}:{self._runner.addresses[0][1]}/sessions/{{session_id}}/run"

    async def stop(self) -> None:
        """Abort the runs, answer their callers, and stop listening."""
        tasks = [
            run.task for run in self.runs.values() if run.task is not None and not run.task.done()
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()


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


def _json(
    document: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.json_response(document, status=status, headers=headers)


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

    # A request that is not HTTP gets a 400; it is no defect and needs no traceback.
    logging.getLogger("aiohttp.server").addFilter(
        lambda record: not isinstance((record.exc_info or (0, 0))[1], HttpProcessingError)
    )
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

"""`Endpoint`: answers the worker's calls, runs the agent, and keeps what runs.

A call's way: token → body → signature → session exists → key and session in one step → system
message → agent → answer kept and session freed → answered. Each run is a task of its own, so that
it goes on where its caller closes the connection.

What the store decides: whether a key is new, whether a session is free, whether a lease has ended.
What this process believes: which runs and chats are its own (`_runs`, `_locks`), as long as a
renewal has not said otherwise. A run whose lease was taken by somebody else is cancelled.

PostgreSQL gone for a while: nothing new begins (503). What runs goes on; an answer that can't be
written yet is kept here and written when PostgreSQL is back, for up to an hour, and the same key
meanwhile gets it from here. If this process dies before that, the run is lost.

Never here: SQL (postgres), what makes a request valid (request).
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeAlias
from uuid import UUID, uuid4

from ..protocols.contract import segment
from ..protocols.outcomes import Word, meaning
from ..protocols.server import Reply
from . import request
from .memory import MemoryStore
from .request import Asked, Refusal, RunRequest
from .store import (
    Ended,
    GoesOn,
    Lost,
    NotStarted,
    OtherRequest,
    Start,
    Started,
    Store,
    StoreUnavailable,
    Taken,
)
from .watchdog import LoopWatchdog

Chunk: TypeAlias = str | Mapping[str, Any]
Result: TypeAlias = str | Mapping[str, Any] | AsyncIterator[Chunk] | None
Run: TypeAlias = Callable[..., Awaitable[Result] | AsyncIterator[Chunk]]
"""`run(session_id, message)`, or with a third parameter `recall` (a RunRequest): a coroutine
function or an async generator function."""
Sessions: TypeAlias = Callable[[str], Awaitable[bool]]
StoreMessage: TypeAlias = Callable[[str, str, str], Awaitable[None]]
OnChunk: TypeAlias = Callable[[str, Chunk], Awaitable[None]]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

KEEP = 2 * 86_400.0
"""Seconds for which an answer stays known under its key: longer than any worker goes on asking
(RECALL_GIVE_UP, a day)."""
ANSWER_WITHIN = 25.0
"""Seconds after which a run that has not ended is accepted (202): shorter than the deadlines of
common gateways (30 and 60 s)."""
BODY_MOST = 16 << 20
"""Octets: twice RECALL_MESSAGE_LIMIT as it is by default, and as much again for escapes."""
DISCARDED = 1 << 20
"""Octets of a refused request that are read before it is answered, or four times `body_most`."""
DISCARD_WITHIN = 5.0
OUTPUT_MOST = 512 << 10
"""Characters that are kept of what the agent says. `status` stands before it: the worker reads the
first MiB."""
ERROR_MOST = 500
STARTS_MOST = 3
"""How often a run is started under one key where each was lost, as RECALL_MAX_ATTEMPTS has it."""
DRAIN = 30.0
"""Seconds that `stop` waits for runs to end by themselves."""
ENDING = 1.0
"""Seconds that an agent has to stop before the caller who asked for that is answered."""
WRITE_WAIT = 20.0
"""Seconds that a caller waits for an answer to be written, when it can't be."""
WRITE_FOR = 3600.0
"""Seconds for which it is tried to write an answer."""
WATCH_EVERY = 1.0
"""Seconds between two looks whether another process has ended a run of ours."""
PRUNE_EVERY = 600.0
SAY_EVERY = 30.0
"""Seconds between two lines of the log on an outage that goes on."""
PAUSE_FIRST, PAUSE_MOST = 0.05, 1.0
"""Seconds between two tries to take a session for a chat: doubling from the first to the most."""

LOGGER = logging.getLogger("recall_worker.endpoint")


class SessionBusy(Exception):
    """Somebody is in the session: a run, or another chat. `hint` says what to do."""

    def __init__(self, session_id: str, waited: float) -> None:
        after = f", also after {waited:g} s" if waited else ""
        super().__init__(f"session {session_id!r} is busy{after}")
        self.session_id = session_id
        self.hint = "tell the person that the agent is at work, or give more seconds to `wait`"


@dataclass(slots=True, eq=False)
class SessionLock:
    """A session that a chat has taken."""

    session_id: str
    lease: UUID
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when somebody else has the session: this process could not renew its lease in time."""


@dataclass(slots=True, eq=False)
class OpenRun:
    """A run of this process, until its answer is written."""

    start: Start
    request: RunRequest
    is_accepted: bool = False
    """Whether its caller was told to poll it."""
    status: str = "running"
    """running, completed, failed, cancelled, interrupted, lost, refused"""
    answer: str | None = None
    """The JSON text, as it is kept."""
    wish: str | None = None
    """Why the agent is to stop: cancel, stop, lost."""
    agent: asyncio.Task[str] | None = None
    task: asyncio.Task[None] | None = None
    answerable: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when its caller can be answered."""


class _NotStored(Exception):
    """The application could not store the system message: nothing was run."""


class Endpoint:
    """The run endpoint as an ASGI application: `POST …/{session_id}/run`, below any prefix.

    `run(session_id, message)` is the agent: a coroutine function that returns its answer (a text,
    a document, or nothing), or one that yields the answer in pieces. With a third parameter
    `recall` it is given a RunRequest. What it raises is a failed run.

    `sessions(session_id)`: whether the session exists; None: all exist. `store(session_id,
    system_message, key)`: stores the system message in the session, called once per key, before the
    run (again only where the process died just then: insert it `on conflict do nothing`).
    `on_chunk(session_id, chunk)`: shows a piece of the answer in the open chat.

    `dsn`: PostgreSQL with the tables of `recall-worker migrate`, for keys and sessions that all
    processes of the API agree on; None: the memory of this process. `schema`: the one that has the
    tables, if the role's search_path does not find them.

    `token`: the bearer token, RECALL_RUN_TOKEN of the worker; or several, while it is being
    replaced. `signing_secret`: RECALL_SIGNING_SECRET, where calls must be signed.

    `answer_within`: seconds after which a run that has not ended is accepted, and polled by the
    worker; 0: each run is; None: none, the call stays open until the run has ended. `retry_after`:
    seconds after which a busy session is to be called again. `lease`: seconds after which another
    process may take what a dead one held. `rerun_lost`: whether a run whose process died is run
    again under the same key (up to `starts_most` times); False: the recall fails instead. `keep`:
    seconds for which answers are kept. `body_most`: octets of a request. `drain`: seconds that
    `stop` waits for runs. `logger`: where it says what goes wrong.

    Start and stop it by the server's lifespan (`Endpoint` as the application itself, or
    `lifespan=endpoint.lifespan` of Starlette and FastAPI), or by `async with endpoint`. Without
    that it starts at the first request, and runs end with the process.
    """

    def __init__(
        self,
        run: Run,
        sessions: Sessions | None = None,
        dsn: str | None = None,
        token: str | Sequence[str] | None = None,
        *,
        store: StoreMessage | None = None,
        on_chunk: OnChunk | None = None,
        signing_secret: str | None = None,
        schema: str | None = None,
        answer_within: float | None = ANSWER_WITHIN,
        retry_after: int = 2,
        lease: float = 15.0,
        rerun_lost: bool = True,
        starts_most: int = STARTS_MOST,
        keep: float = KEEP,
        body_most: int = BODY_MOST,
        drain: float = DRAIN,
        logger: logging.Logger = LOGGER,
    ) -> None:
        if lease < 1:
            raise ValueError("`lease` is at least a second")
        if starts_most < 1:
            raise ValueError("`starts_most` is at least 1")
        self._run, self._sessions, self._store_message, self._on_chunk = (
            run,
            sessions,
            store,
            on_chunk,
        )
        self._wants_request = _takes(run, "recall")
        tokens = [token] if isinstance(token, str) else list(token or [])
        if "" in tokens:
            raise ValueError("`token` is empty: give a token, or None for an endpoint without one")
        self._tokens = [one.encode() for one in tokens]
        if signing_secret is not None and not tokens:
            raise ValueError(
                "`signing_secret` without `token`: polls and cancels carry no signature, so "
                "anybody could send them; give both"
            )
        self._signing_secret = signing_secret
        self._answer_within, self._retry_after = answer_within, retry_after
        self._starts_most = starts_most if rerun_lost else 1
        self._rerun_lost = rerun_lost
        self._keep, self._body_most, self._drain = keep, body_most, drain
        self._logger = logger
        self._is_local = dsn is None
        self._store: Store = MemoryStore() if dsn is None else _postgres(dsn, schema, lease)
        self._runs: dict[str, OpenRun] = {}
        """By key: those that were started here, until their answers are written."""
        self._locks: dict[UUID, SessionLock] = {}
        """What chats of this process hold."""
        self._freed = asyncio.Event()
        self._starting = asyncio.Lock()
        self._keeping: asyncio.Task[None] | None = None
        self._watchdog: LoopWatchdog | None = None
        self._is_stopping = self._is_drained = False

    # --- start and stop ---------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to answer. Never fails: where PostgreSQL is away, or its tables are missing, calls
        are answered 503 until it is there."""
        async with self._starting:
            if self._keeping is not None:
                return
            self._is_stopping = self._is_drained = False
            if self._is_local:
                self._logger.warning(
                    "the endpoint has no dsn: keys and sessions are in the memory of this process; "
                    "run one process only, and expect runs to be lost at its end"
                )
            await self._store.open()
            if (lease := self._store.lease) is not None:
                self._watchdog = LoopWatchdog(
                    lease, self._held, self._store.renew_now, self._logger
                )
                self._watchdog.start()
            self._keeping = asyncio.create_task(self._keep_held())

    async def _started(self) -> None:
        """Start where nobody did; not again after the end."""
        if self._keeping is None and not self._is_stopping:
            await self.start()

    async def stop(self) -> None:
        """Begin nothing new, wait for the runs (`drain` seconds), then stop them: each is lost, and
        run again when the worker calls again."""
        self._is_stopping = True
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=self._drain)
        self._is_drained = True
        for run in list(self._runs.values()):
            self._end_agent(run, "stop")
        if left := [task for task in tasks if not task.done()]:
            await asyncio.wait(left, timeout=ENDING * 5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._watchdog is not None:
            await self._watchdog.stop()
            self._watchdog = None
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
            self._keeping = None
        await self._store.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @asynccontextmanager
    async def lifespan(self, _: Any = None) -> AsyncIterator[None]:
        """For Starlette and FastAPI: `FastAPI(lifespan=endpoint.lifespan)`. A mounted application
        is not told by them when the server starts and stops."""
        async with self:
            yield

    # --- the chat's side --------------------------------------------------------------------------

    @asynccontextmanager
    async def session(self, session_id: str, *, wait: float = 0.0) -> AsyncIterator[SessionLock]:
        """Have the session for a chat: no run begins in it while the block runs.

        `wait`: seconds to wait for a run, or for another chat, to end. Raises SessionBusy where the
        session is not free by then, StoreUnavailable where PostgreSQL can't be asked.
        """
        await self._started()
        if self._is_stopping:
            raise StoreUnavailable("the endpoint is stopping")
        lock = SessionLock(str(session_id), uuid4())
        try:
            await self._take(lock, wait)
        except asyncio.CancelledError:
            # Perhaps it was taken just then.
            await asyncio.shield(self._free(lock.session_id, lock.lease))
            raise
        self._locks[lock.lease] = lock
        try:
            yield lock
        finally:
            del self._locks[lock.lease]
            # It is given back also where the block was cancelled, and if not now, by its lease.
            await asyncio.shield(self._free(lock.session_id, lock.lease))

    async def _take(self, lock: SessionLock, wait: float) -> None:
        until, pause = time.monotonic() + wait, PAUSE_FIRST
        while True:
            freed = self._freed
            if await self._store.take(lock.session_id, lock.lease):
                return
            left = until - time.monotonic()
            if left <= 0:
                raise SessionBusy(lock.session_id, wait)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(pause, left)):
                    await freed.wait()
            pause = min(pause * 2, PAUSE_MOST)

    async def _free(self, session_id: str, lease: UUID) -> None:
        try:
            await self._store.free(session_id, lease)
        except StoreUnavailable as error:
            self._logger.warning(
                "session %r stays busy until its lease ends: %s", session_id, error
            )
        self._tell_freed()

    def _tell_freed(self) -> None:
        freed, self._freed = self._freed, asyncio.Event()
        freed.set()

    # --- HTTP -------------------------------------------------------------------------------------

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            raw = scope.get("raw_path")
            asked = Asked(
                scope["method"],
                raw.decode("latin-1").partition("?")[0] if raw else scope["path"],
                _headers(scope["headers"]),
                is_raw=bool(raw),
            )
            try:
                # A stranger's body is not kept.
                request.authorize(asked, self._tokens)
                asked = replace(asked, body=await self._body(asked, receive))
            except Refusal as refusal:
                await self._discard(receive)
                await _send(send, _refused(refusal))
                return
            except _Left:
                return
            leaving = asyncio.create_task(_leaves(receive, asked.left))
            try:
                reply = await self.answer(asked)
            finally:
                leaving.cancel()
            await _send(send, reply)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _body(self, asked: Asked, receive: Receive) -> bytes:
        """The whole body. Raises Refusal as soon as it is too long."""
        length = asked.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._body_most):
            raise _too_large(self._body_most)
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Left
            body += message.get("body", b"")
            if len(body) > self._body_most and message.get("more_body"):
                raise _too_large(self._body_most)
            if not message.get("more_body"):
                return bytes(body)

    async def _discard(self, receive: Receive) -> None:
        """Read what is left of a request, within bounds: a caller who is still writing when the
        connection closes does not get to read the answer."""
        left = max(DISCARDED, 4 * self._body_most)
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_WITHIN):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b"")) + 1
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return

    async def answer(self, asked: Asked) -> Reply:
        """The answer to a request that has come whole: for servers that are not ASGI."""
        try:
            request.authorize(asked, self._tokens)
            if len(asked.body) > self._body_most:
                raise _too_large(self._body_most)
            if request.is_run(asked):
                if asked.method == "POST":
                    return await self._answer_run(asked)
                if request.run_named(asked) is None:
                    raise Refusal(405, "method", "a run is begun by POST", Allow="POST")
            if (named := request.run_named(asked)) is None:
                raise Refusal(404, "not_found", "nothing is at this address")
            if asked.method == "GET":
                return await self._answer_poll(*named)
            if asked.method == "DELETE":
                return await self._answer_cancel(*named)
            raise Refusal(405, "method", "a run is polled by GET", Allow="GET, DELETE")
        except Refusal as refusal:
            return _refused(refusal)
        except StoreUnavailable as error:
            self._logger.error("answered 503: %s%s", error, f"; {error.hint}" if error.hint else "")
            return _refused(
                Refusal(503, "unavailable", str(error), Retry_After=str(self._retry_after))
            )

    async def _answer_run(self, asked: Asked) -> Reply:
        request.verify(asked, self._signing_secret)
        wanted = request.read(asked)
        await self._started()
        if self._is_stopping:
            raise _stopping()
        await self._must_exist(wanted.session_id)
        start = Start(
            wanted.key, wanted.session_id, hashlib.sha256(asked.body).hexdigest(), uuid4()
        )
        if (known := self._runs.get(wanted.key)) is not None:
            return self._known_here(known, start, asked)
        # Once it is asked for, a run begins, also where its caller is cancelled just then.
        match await asyncio.shield(asyncio.create_task(self._begin(start, wanted))):
            case OpenRun() as run:
                return await self._answer_when_ended(run, asked)
            case Ended(answer):
                return _whole(answer, REPLAYED)
            case GoesOn(is_accepted):
                return self._goes_on(start.key, asked, is_accepted)
            case Taken():
                raise self._later("session_busy", "somebody is in this session")
            case OtherRequest():
                raise _key_reused()
            case Lost(starts):
                return await self._answer_lost(start, starts)

    async def _begin(self, start: Start, wanted: RunRequest) -> OpenRun | NotStarted:
        begun = await self._store.begin(start, self._starts_most)
        if not isinstance(begun, Started):
            return begun
        if self._is_stopping:
            await self._store.undo(start)
            raise _stopping()
        run = self._runs[start.key] = OpenRun(start, replace(wanted, starts=begun.starts))
        run.task = asyncio.create_task(self._work(run, begun.is_stored))
        return run

    async def _answer_when_ended(self, run: OpenRun, asked: Asked) -> Reply:
        ended = asyncio.create_task(run.answerable.wait())
        left = asyncio.create_task(asked.left.wait())
        try:
            # If our caller closes the connection, only the waiting ends.
            await asyncio.wait(
                {ended, left},
                timeout=self._answer_within,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            ended.cancel()
            left.cancel()
        if run.answerable.is_set():
            return self._reply_of(run, asked)
        if asked.left.is_set():
            raise self._later("run_in_progress", "the caller has left, and the run goes on")
        # On record before it is told: from now on this run is polled, and not called again.
        await self._store.accepted(run.start)
        run.is_accepted = True
        return self._accepted(run.start.key, asked)

    def _reply_of(
        self, run: OpenRun, asked: Asked, headers: Mapping[str, str] | None = None
    ) -> Reply:
        if not run.answerable.is_set():
            return self._accepted(run.start.key, asked, headers)
        if run.answer is not None:
            return _whole(run.answer, headers)
        if run.status == "refused":
            raise Refusal(
                503,
                "not_stored",
                "the system message could not be stored, and nothing was run",
                Retry_After=str(self._retry_after),
            )
        raise Refusal(500, "interrupted", "the run was stopped, and nobody can say how far it came")

    def _known_here(self, run: OpenRun, start: Start, asked: Asked) -> Reply:
        if (run.start.fingerprint, run.start.session_id) != (start.fingerprint, start.session_id):
            raise _key_reused()
        if run.answer is None or not run.answerable.is_set():
            return self._goes_on(start.key, asked, run.is_accepted)
        return self._reply_of(run, asked, REPLAYED)

    def _goes_on(self, key: str, asked: Asked, is_accepted: bool) -> Reply:
        # Where nobody polls it, it is called again until it has ended: if its process dies, it is
        # started again under this key, and is not told to be lost.
        if not is_accepted:
            raise self._later("run_in_progress", "the run under this key goes on")
        return self._accepted(key, asked, REPLAYED)

    def _accepted(self, key: str, asked: Asked, headers: Mapping[str, str] | None = None) -> Reply:
        # Relative to the request's address: so it is right behind every prefix, and every gateway.
        before = "./" if asked.path.endswith("/") else "run/"
        more = {"Location": before + segment(key), "Retry-After": str(self._retry_after)}
        return _json({"run_id": key, "status": "running"}, 202, {**more, **(headers or {})})

    async def _answer_lost(self, start: Start, starts: int) -> Reply:
        self._logger.error(
            "the run of key %r in session %r was lost %d times and is not run again",
            start.key,
            start.session_id,
            starts,
        )
        if not self._rerun_lost:
            raise _lost()
        await self._store.give_up(start.key, start.session_id, _lost_answer(starts))
        state = await self._store.look(start.key, start.session_id)
        if not isinstance(state, Ended):
            raise self._later("run_in_progress", "the run under this key goes on")
        return _whole(state.answer, REPLAYED)

    async def _answer_poll(self, session_id: str, key: str) -> Reply:
        await self._started()
        state = await self._store.look(key, session_id)
        if isinstance(state, Lost) and state.is_accepted:
            # It was accepted, so nobody posts it again: its end is told here, or never.
            if not self._rerun_lost:
                raise _lost(410)
            self._logger.error("the accepted run of key %r in session %r was lost", key, session_id)
            await self._store.give_up(key, session_id, _lost_answer(state.starts))
            state = await self._store.look(key, session_id)
        if state is None:
            raise Refusal(404, "run_not_found", "there is no such run")
        if isinstance(state, Ended):
            return _json({"run_id": key} | json.loads(state.answer))
        return _json(
            {"run_id": key, "status": "running"}, 200, {"Retry-After": str(self._retry_after)}
        )

    async def _answer_cancel(self, session_id: str, key: str) -> Reply:
        await self._started()
        state = await self._store.look(key, session_id)
        if state is None:
            raise Refusal(404, "run_not_found", "there is no such run")
        if not isinstance(state, Ended):
            await self._store.cancel(key, session_id, CANCELLED)
            # Another process's run is found there by its next look.
            if (run := self._runs.get(key)) is not None and run.task is not None:
                self._end_agent(run, "cancel")
                await asyncio.wait({run.task}, timeout=ENDING)
        return Reply(204)

    async def _must_exist(self, session_id: str) -> None:
        if self._sessions is None:
            return
        try:
            exists = await self._sessions(session_id)
        except Exception as error:
            self._logger.exception("whether session %r exists could not be asked", session_id)
            raise Refusal(
                503,
                "unavailable",
                f"whether the session exists can't be asked now ({type(error).__name__})",
                Retry_After=str(self._retry_after),
            ) from None
        if not exists:
            raise Refusal(404, "session_not_found", "there is no such session")

    def _later(self, code: str, message: str) -> Refusal:
        return Refusal(409, code, message, Retry_After=str(self._retry_after))

    # --- a run ------------------------------------------------------------------------------------

    async def _work(self, run: OpenRun, is_stored: bool) -> None:
        """One run, from its start to its written answer. Ends by cancellation only where the
        process stops."""
        run.agent = asyncio.create_task(self._perform(run, is_stored))
        try:
            if run.wish is not None:
                run.agent.cancel()
            await asyncio.wait({run.agent})
            await self._settle(run, *self._ending(run, run.agent))
        finally:
            run.agent.cancel()
            if run.status == "running":
                run.status = "interrupted"
            run.answerable.set()
            del self._runs[run.start.key]
            self._tell_freed()

    async def _perform(self, run: OpenRun, is_stored: bool) -> str:
        """The system message, then the agent. Returns the answer's JSON text."""
        start = run.start
        if self._store_message is not None and not is_stored:
            try:
                await self._store_message(start.session_id, run.request.system_message, start.key)
                await self._store.stored(start)
            except Exception as error:
                self._logger.exception(
                    "the system message of key %r could not be stored", start.key
                )
                raise _NotStored from error
        args = (start.session_id, run.request.user_message)
        try:
            made = self._run(*args, recall=run.request) if self._wants_request else self._run(*args)
            result = await made if inspect.isawaitable(made) else made
            if isinstance(result, AsyncIterator):
                result = await self._gathered(start.session_id, result)
            elif result is not None and self._on_chunk is not None:
                await self._show(start.session_id, result)
            return _answer(result)
        except SystemExit as error:
            # A tool's command line says so of itself: it is no reason to end the API.
            raise RuntimeError(f"the agent called sys.exit({error.code!r})") from error

    async def _gathered(self, session_id: str, chunks: AsyncIterator[Chunk]) -> str:
        """The pieces' texts as one, each shown in the chat as it comes."""
        texts: list[str] = []
        length = 0
        async for chunk in chunks:
            if isinstance(chunk, str) and length <= OUTPUT_MOST:
                texts.append(chunk)
                length += len(chunk)
            if self._on_chunk is not None:
                await self._show(session_id, chunk)
        return "".join(texts)

    async def _show(self, session_id: str, chunk: Chunk) -> None:
        assert self._on_chunk is not None
        try:
            await self._on_chunk(session_id, chunk)
        except Exception:
            # The chat that is open does not see it; the run goes on.
            self._logger.exception(
                "a piece of the answer could not be shown in session %r", session_id
            )

    def _ending(self, run: OpenRun, agent: asyncio.Task[str]) -> tuple[str, str | None]:
        """How the run has ended: its status, and its answer where there is one."""
        if run.wish == "lost":
            return "lost", None
        if agent.cancelled():
            if run.wish == "cancel":
                return "cancelled", CANCELLED
            if run.wish == "stop":
                return "interrupted", None
            return "failed", _failed("the agent's run was cancelled from within")
        error = agent.exception()
        if error is None:
            answer = agent.result()
            return _status(answer), answer
        if isinstance(error, _NotStored):
            return "refused", None
        if not isinstance(error, Exception):
            return "interrupted", None
        self._logger.error("the run of key %r failed", run.start.key, exc_info=error)
        return "failed", _failed(f"{type(error).__name__}: {error}")

    async def _settle(self, run: OpenRun, status: str, answer: str | None) -> None:
        """Write down how the run has ended, however long PostgreSQL is away (up to an hour), and
        free the session."""
        began, pause = time.monotonic(), 0.2
        while True:
            try:
                if answer is not None:
                    if not await self._store.finish(run.start, status, answer):
                        status, answer = await self._ended_by_others(run, status)
                elif status == "refused":
                    await self._store.undo(run.start)
                elif status != "lost":
                    await self._store.free(run.start.session_id, run.start.lease)
                break
            except StoreUnavailable as error:
                waited = time.monotonic() - began
                if pause == 0.2:
                    self._logger.warning(
                        "the answer of key %r can't be written yet: %s", run.start.key, error
                    )
                if waited > WRITE_FOR or (self._is_drained and waited > ENDING):
                    self._logger.error(
                        "the answer of key %r was not written: %s", run.start.key, error
                    )
                    break
                if waited > WRITE_WAIT and answer is not None:
                    run.status, run.answer = status, answer
                    run.answerable.set()
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5.0)
        run.status, run.answer = status, answer

    async def _ended_by_others(self, run: OpenRun, status: str) -> tuple[str, str | None]:
        state = await self._store.look(run.start.key, run.start.session_id)
        if isinstance(state, Ended):
            return _status(state.answer), state.answer
        self._logger.error(
            "the run of key %r was taken over by another process while it went on here (%s)",
            run.start.key,
            status,
        )
        return "lost", None

    @staticmethod
    def _end_agent(run: OpenRun, wish: str) -> None:
        run.wish = run.wish or wish
        if run.agent is not None:
            run.agent.cancel()

    # --- leases -----------------------------------------------------------------------------------

    async def _keep_held(self) -> None:
        """Renew the leases of what this process holds, learn which runs others have ended, and
        prune, until cancelled."""
        lease = self._store.lease
        every = WATCH_EVERY if lease is None else min(WATCH_EVERY, lease / 6)
        renewed_at = held_at = time.monotonic()
        pruned_at = time.monotonic() - PRUNE_EVERY
        said_at: float | None = None
        while True:
            await asyncio.sleep(every)
            try:
                if lease is not None and (self._runs or self._locks):
                    if self._store.is_down:
                        # Before anything else, on a connection of its own: others wait for a third
                        # of a lease after an outage, and then take what is not renewed.
                        await asyncio.to_thread(self._store.renew_now, self._held())
                        held_at = time.monotonic()
                    await self._watch()
                    if time.monotonic() - renewed_at >= lease / 3 - every:
                        await self._renew()
                        renewed_at = held_at = time.monotonic()
                if time.monotonic() - pruned_at >= PRUNE_EVERY:
                    pruned_at = time.monotonic()
                    await self._store.prune(self._keep)
                said_at = None
            except StoreUnavailable as error:
                # Tried each second, and said at first and now and then.
                if said_at is None or time.monotonic() - said_at > SAY_EVERY:
                    said_at = time.monotonic()
                    self._logger.warning("leases could not be renewed: %s", error)
                if lease is not None and time.monotonic() - held_at > lease:
                    self._doubt_chats()
            except Exception:
                self._logger.exception("leases could not be renewed")

    def _doubt_chats(self) -> None:
        """By this process's own clock the leases have ended: somebody else may have the sessions
        now, and nobody can be asked."""
        for lock in self._locks.values():
            if not lock.lost.is_set():
                self._logger.error(
                    "a chat may have lost session %r: its lease has ended, and PostgreSQL is away",
                    lock.session_id,
                )
                lock.lost.set()

    async def _watch(self) -> None:
        open_keys = [key for key, run in self._runs.items() if run.answer is None]
        if not open_keys:
            return
        for key in await self._store.ended(open_keys):
            if (run := self._runs.get(key)) is not None and run.wish is None:
                self._end_agent(run, "cancel")

    def _held(self) -> list[tuple[str, UUID]]:
        """What this process holds. Also called in another thread, while the loop stands still."""
        held = [(run.start.session_id, run.start.lease) for run in list(self._runs.values())]
        return held + [(lock.session_id, lock.lease) for lock in list(self._locks.values())]

    async def _renew(self) -> None:
        runs = {run.start.lease: run for run in self._runs.values()}
        locks = dict(self._locks)
        if not (held := self._held()):
            return
        ours = await self._store.renew(held)
        for lease in {lease for _, lease in held} - ours:
            if (run := runs.get(lease)) is not None and self._runs.get(run.start.key) is run:
                if run.agent is not None and not run.agent.done():
                    self._logger.error(
                        "the run of key %r is stopped: its lease had ended, and somebody else has "
                        "session %r",
                        run.start.key,
                        run.start.session_id,
                    )
                    self._end_agent(run, "lost")
            elif (lock := locks.get(lease)) is not None and lease in self._locks:
                self._logger.error(
                    "a chat has lost session %r: its lease had ended", lock.session_id
                )
                lock.lost.set()


class _Left(Exception):
    """The caller has closed the connection before the request was whole."""


REPLAYED: Mapping[str, str] = {"Idempotent-Replayed": "true"}
JSON = {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "no-store"}
CANCELLED = json.dumps({"status": "cancelled"})


def _postgres(dsn: str, schema: str | None, lease: float) -> Store:
    from .postgres import PostgresStore  # Loads the driver.

    return PostgresStore(dsn, schema=schema, lease=lease)


def _takes(run: Run, name: str) -> bool:
    try:
        return name in inspect.signature(run).parameters
    except (TypeError, ValueError):
        return False


def _answer(result: Result) -> str:
    """The answer's JSON text, with `status` first. Raises ValueError and TypeError for what can't
    be one."""
    if result is None:
        return json.dumps({"status": "completed"})
    if isinstance(result, str):
        output = {"output": result[:OUTPUT_MOST]}
        cut = {"truncated": True} if len(result) > OUTPUT_MOST else {}
        return json.dumps({"status": "completed"} | output | cut)
    if not isinstance(result, Mapping):
        raise TypeError(f"`run` returned {type(result).__name__}: return a str, a dict or None")
    status = result.get("status", "completed")
    if meaning(status) is Word.GOING_ON:
        raise ValueError(f"`run` returned status {status!r}: return when the run has ended")
    document = {"status": status} | dict(result)
    try:
        return json.dumps(document, allow_nan=False)
    except ValueError:
        # JSON has no NaN and no infinities, as pandas and numpy return them.
        plain = json.loads(json.dumps(document), parse_constant=lambda _: None)
        return json.dumps(plain)


def _status(answer: str) -> str:
    """The answer's status, for people who read the table."""
    status = json.loads(answer)["status"]
    plain = isinstance(status, str) and status.isascii() and status.isprintable()
    return status[:40] if plain else "other"


def _failed(error: str) -> str:
    text = error[:ERROR_MOST].encode("utf-8", "replace").decode()
    return json.dumps({"status": "failed", "error": text})


def _lost_answer(starts: int) -> str:
    times = "" if starts == 1 else f", {starts} times"
    return json.dumps(
        {
            "status": "failed",
            "code": "run_lost",
            "error": f"the process that ran it ended in mid-run{times}",
        }
    )


def _lost(status: int = 422) -> Refusal:
    return Refusal(
        status, "run_lost", "the process that ran it ended in mid-run; it is not run again"
    )


def _key_reused() -> Refusal:
    return Refusal(422, "key_reused", "this Idempotency-Key stands for another request")


def _stopping() -> Refusal:
    return Refusal(503, "stopping", "the API is stopping", Retry_After="1")


def _too_large(most: int) -> Refusal:
    return Refusal(413, "too_large", f"the body has more than {most} octets", Connection="close")


def _refused(refusal: Refusal) -> Reply:
    return _json({"code": refusal.code, "message": str(refusal)}, refusal.status, refusal.headers)


def _json(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(document).encode(), JSON | dict(headers or {}))


def _whole(answer: str, headers: Mapping[str, str] | None = None) -> Reply:
    """An answer as it is kept: the same octets each time."""
    return Reply(200, answer.encode(), JSON | dict(headers or {}))


def _headers(fields: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    """The first of each name, as it is the one that a gateway has checked."""
    found: dict[str, str] = {}
    for name, value in fields:
        found.setdefault(name.decode("latin-1").lower(), value.decode("utf-8", "surrogateescape"))
    return found


async def _leaves(receive: Receive, left: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    left.set()


async def _send(send: Send, reply: Reply) -> None:
    fields = {"Content-Length": str(len(reply.body)), **reply.headers}
    if reply.status == 204:
        del fields["Content-Length"]
    # A caller who has left is no error: some servers say so by raising.
    with suppress(OSError):
        await send(
            {
                "type": "http.response.start",
                "status": reply.status,
                "headers": [
                    (name.lower().encode("latin-1"), value.encode("latin-1"))
                    for name, value in fields.items()
                ],
            }
        )
        await send({"type": "http.response.body", "body": reply.body})

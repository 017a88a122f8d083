"""The pages of RECALL_OPS_LISTEN: /livez, /readyz, /metrics. They are unauthenticated; nothing in
them is secret, and nothing can be changed.

`/livez` depends on this process alone: does the claim loop turn? An outage of PostgreSQL is no
reason to restart it. `/readyz` says whether recalls can be called now: PostgreSQL answers, the
schema fits, no drain has begun. PostgreSQL is queried for a page at most every few seconds, however
often pages are read, and never while nobody reads them; a page never waits long for the answer.

No client of the port may stop the worker's work. So connections are accepted one at a time and
serve one request each; their number is bounded by the descriptors that calls and PostgreSQL leave
free; each has a deadline for its head and one for its answer; and at the bound the oldest
connection without a request is closed for the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar, cast

from ..database import identity
from ..database.connection import DatabaseUnavailable, StatementRejected
from ..database.ledger import Backlog
from ..events import Events
from ..protocols.server import Reply, Request, ServerConnection
from ..terminal import Trouble
from ..worker.process import misfit, spare_descriptors, standing_still
from ..worker.worker import Worker
from .metrics import Metrics

BACKLOG_EVERY = 5.0
SCHEMA_EVERY = 2.0
"""Seconds between two queries, at least."""
PATIENCE = 2.0
"""Seconds that a page waits for PostgreSQL."""
HEAD_DEADLINE = 5.0
"""Seconds from accepting a connection until the whole head of its request must have been read."""
ANSWER_DEADLINE = 10.0
"""Seconds from there until the answer must have been taken and the connection be closed."""
CONNECTIONS_LEAST, CONNECTIONS_MOST = 4, 64
"""Open connections: enough for probes and scrapers; the fewest if descriptors are scarce."""
ACCEPT_PAUSE = 0.5
"""Seconds until accept is tried again after an error, such as having no descriptor left."""
TELL_EVERY = 60.0
"""Seconds between two log lines about the same problem with connections, however often it occurs.
"""

T = TypeVar("T")


class Question(Generic[T]):
    """A query to PostgreSQL, made at most every so many seconds and once at a time."""

    def __init__(self, ask: Callable[[], Awaitable[T]], every: float) -> None:
        self._ask = ask
        self._every = every
        self._asked_at = -every
        self._asking: asyncio.Task[T | str] | None = None

    async def answer(self) -> T | str:
        """The newest answer, or the reason why there is none."""
        if self._asking is None or (
            self._asking.done() and time.monotonic() - self._asked_at >= self._every
        ):
            self._asked_at = time.monotonic()
            self._asking = asyncio.create_task(self._answered())
        # Not aborted when it takes longer: that would close the connection, which others use, too.
        await asyncio.wait((self._asking,), timeout=PATIENCE)
        return (
            self._asking.result()
            if self._asking.done()
            else f"PostgreSQL has not answered for {PATIENCE:g} s"
        )

    async def _answered(self) -> T | str:
        try:
            return await self._ask()
        except (DatabaseUnavailable, StatementRejected) as error:
            return error.reason

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait((self._asking,))


class Pages:
    """Answers for one worker."""

    def __init__(self, worker: Worker, metrics: Metrics) -> None:
        self._worker = worker
        self._metrics = metrics
        self._schema = Question(worker.schema, SCHEMA_EVERY)
        self._backlog: Question[Backlog] = Question(worker.backlog, BACKLOG_EVERY)

    async def answer(self, request: Request) -> Reply:
        """The answer to any request."""
        page = {"/livez": self.livez, "/readyz": self.readyz, "/metrics": self.metrics}.get(
            request.path
        )
        if page is None:
            return plain_text("not found", 404)
        if request.method not in ("GET", "HEAD"):
            refused = plain_text("only to be read", 405)
            return Reply(405, refused.body, {**refused.headers, "Allow": "GET,HEAD"})
        return await page(request)

    async def livez(self, _: Request) -> Reply:
        if standing_still(self._worker):
            return plain_text(
                (
                    "the claim loop has not turned for "
                    f"{time.monotonic() - self._worker.turned_at:.0f} s"
                ),
                503,
            )
        return plain_text("alive")

    async def readyz(self, _: Request) -> Reply:
        if self._worker.refused is not None:
            hint = getattr(self._worker.refused, "hint", "")
            return plain_text(f"{self._worker.refused}: {hint}", 503)
        if self._worker.status.is_draining:
            return plain_text("draining: nothing more is claimed", 503)
        schema = await self._schema.answer()
        if isinstance(schema, str):
            return plain_text(f"PostgreSQL: {schema}", 503)
        unfit = misfit(*schema)
        if unfit is not None:
            return plain_text(f"{unfit}: {unfit.hint}", 503)
        if (refused := self._worker.schema_refuses) is not None:
            return plain_text(refused, 503)
        match self._worker.status.held:
            case identity.COPY:
                return plain_text(f"{identity.IS_A_COPY}: {identity.COPY_HINT}", 503)
            case identity.PAUSED:
                return plain_text(f"{identity.IS_PAUSED}: {identity.PAUSED_HINT}", 503)
            case _:
                return plain_text("ready")

    async def metrics(self, request: Request) -> Reply:
        backlog = await self._backlog.answer()
        self._metrics.backlog = None if isinstance(backlog, str) else backlog
        page, content_type = self._metrics.page(request.headers.get("Accept", ""))
        return Reply(200, page, {"Content-Type": content_type, "Cache-Control": "no-store"})

    async def close(self) -> None:
        for question in (self._schema, self._backlog):
            await question.close()


def plain_text(text: str, status: int = 200) -> Reply:
    fields = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"}
    return Reply(status, f"{text}\n".encode(), fields)


class Port:
    """The open connections of the ops port: at most `most`, each closed by a deadline.

    Connections are accepted here and not by asyncio's own server: that accepts a hundred at once,
    whether there is room for them or not, and logs a traceback for each that fails.
    """

    def __init__(self, pages: Pages, events: Events, most: int) -> None:
        self._pages = pages
        self._events = events
        self._most = most
        self._open: dict[Connection, None] = {}
        """Oldest first."""
        self._closed = asyncio.Event()
        """Set when one of them is closed."""
        self._untold: dict[str, int] = {}
        """How often an event occurred since it was last logged."""
        self._told_at: dict[str, float] = {}

    async def accept(self, listener: socket.socket) -> None:
        """Accept connections until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except ConnectionError:
                continue  # The client has already closed it.
            except OSError as error:
                # Mostly no descriptor is left. The error stays until something is closed: one of
                # ours, if there is one.
                self._tell("ops.refused", reason=os.strerror(error.errno or 0))
                self._give_way()
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            try:
                while len(self._open) >= self._most:
                    self._closed.clear()
                    self._give_way()
                    self._tell("ops.crowded", connections=self._most)
                    await self._closed.wait()
                await loop.connect_accepted_socket(lambda: Connection(self, self._pages), accepted)
            except OSError:
                accepted.close()
            except asyncio.CancelledError:
                accepted.close()
                raise

    def opened(self, connection: Connection) -> None:
        self._open[connection] = None

    def closed(self, connection: Connection) -> None:
        self._open.pop(connection, None)
        self._closed.set()

    def abort(self) -> None:
        """Close all connections at once."""
        for connection in list(self._open):
            connection.abort()

    def _give_way(self) -> None:
        """Close the oldest connection without a request, or else the oldest."""
        for connection in sorted(self._open, key=lambda connection: connection.is_answered)[:1]:
            connection.abort()

    def _tell(self, event: str, **facts: Any) -> None:
        """Log an event at most once in TELL_EVERY, with its number since the last time."""
        self._untold[event] = self._untold.get(event, 0) + 1
        now = time.monotonic()
        if now >= self._told_at.get(event, now - TELL_EVERY) + TELL_EVERY:
            self._told_at[event] = now
            self._events.tell(event, times=self._untold.pop(event), **facts)


class Connection(ServerConnection):
    """One connection, with its two deadlines."""

    def __init__(self, port: Port, pages: Pages) -> None:
        super().__init__(pages.answer)
        self.is_answered = False
        """Whether the whole head has been read."""
        self._port = port

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._deadline = asyncio.get_running_loop().call_later(HEAD_DEADLINE, self.abort)
        self._port.opened(self)

    def head_was_read(self) -> None:
        """From now on the deadline is that of the answer."""
        self.is_answered = True
        self._deadline.cancel()
        self._deadline = asyncio.get_running_loop().call_later(ANSWER_DEADLINE, self.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)
        self._port.closed(self)


@contextlib.asynccontextmanager
async def pages(worker: Worker, events: Events, host: str, port: int) -> AsyncIterator[None]:
    """Serve the pages until the context ends. Raises Trouble if nothing can listen there."""
    metrics = Metrics(lambda: worker.status)
    events.listen(metrics.hear)
    answers = Pages(worker, metrics)
    connections = Port(answers, events, connections_most(spare_descriptors(worker.status.slots)))
    async with contextlib.AsyncExitStack() as around:
        around.push_async_callback(answers.close)
        around.callback(connections.abort)
        try:
            listeners = await _listeners(host, port)
        except OSError as error:
            # Python's text repeats the address; errors of name resolution have numbers below zero.
            reason = (
                os.strerror(error.errno)
                if error.errno is not None and error.errno > 0
                else error.strerror or str(error)
            )
            hint = (
                "another address in RECALL_OPS_LISTEN, or see what listens there: ss "
                f"-ltnp 'sport = :{port}'"
            )
            raise Trouble(
                f"RECALL_OPS_LISTEN: nothing can listen on {host} port {port}: {reason}", hint
            ) from None
        for listener in listeners:
            around.callback(listener.close)
        accepting = [
            asyncio.create_task(connections.accept(listener), name="ops") for listener in listeners
        ]
        around.push_async_callback(_cancelled, accepting)
        address, bound = listeners[0].getsockname()[:2]
        events.tell("ops.listening", host=address, port=bound)
        yield


def connections_most(spare: int) -> int:
    """How many connections the port may hold: half of the descriptors that nothing else needs,
    within bounds.
    """
    return max(CONNECTIONS_LEAST, min(CONNECTIONS_MOST, spare // 2))


async def _listeners(host: str, port: int) -> list[socket.socket]:
    """A listening socket for each address of the host's name. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listeners: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            listener = socket.create_server(
                cast("tuple[str, int]", address), family=cast("Any", family)
            )
            listener.setblocking(False)
            listeners.append(listener)
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)

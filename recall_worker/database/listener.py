"""The listener: one dedicated LISTEN connection that wakes the worker.

A notification only says that something changed, and the row is the truth: its payload is empty, or
the queue of a new row, so that workers of other queues need not query. The worker must also query
once after every (re)connection, as notifications sent meanwhile are lost; the listener calls
`notify("")` for that.

The connection is used for nothing else, and is read as soon as data arrives; psycopg's `notifies()`
would do that two turns of the event loop later. A half-open connection raises nothing. A LISTEN
through a transaction pooler, or on another server than the one that is written to, succeeds and
receives nothing. So the listener tests itself from time to time: it has a channel of its own
notified from another connection (the ledger's). If that does not arrive, it is deaf. This is
logged once; until a test succeeds the worker relies on its polls. It reconnects for ever, with
jitter.

Never here: what a notification means.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import pq

from ..events import Events
from .budget import ConnectionBudget
from .connection import (
    STATEMENT_DEADLINE,
    Connection,
    DatabaseUnavailable,
    Deadlines,
    Dsn,
    StatementRejected,
    connection_info,
    current,
    end_given_up,
    error_text,
    session_setup,
)
from .pipeline import Farewell

CHANNEL = "session_recalls"
PROBE_EVERY = 60.0
"""Seconds between self-tests. An idle replica should cost nothing, and polls find what a dead
connection misses. More often where the lease is short."""
PROBE_DEADLINE = 5.0
"""Seconds that a self-test, or a statement on this connection, may take."""
SELF_TEST_STEP = 0.2
"""Seconds between two checks whether the self-test's notification was sent."""
RECONNECT_FIRST, RECONNECT_MOST, DOUBLINGS_MOST = 0.2, 5.0, 6
"""Seconds, at most, before it reconnects: doubling with each failure, for so many failures."""
ANSWERS_JITTER = 0.05
"""Seconds over which replicas spread their connections when PostgreSQL answers again."""
MEANWHILE = "until then a poll every RECALL_POLL_INTERVAL finds new recalls"
POOLER = (
    "notifications do not arrive: a transaction pooler, which LISTEN does not pass, is in between"
)
POOLER_HINT = f"give the server's own address in RECALL_LISTEN_DSN; {MEANWHILE}"
ELSEWHERE = (
    "notifications do not arrive: RECALL_LISTEN_DSN leads to another database than RECALL_DSN"
)
ELSEWHERE_HINT = f"name the same database on the same server in RECALL_LISTEN_DSN; {MEANWHILE}"


class Listener:
    """Calls `notify(payload)` at each notification, and `notify("")` after each connection, until
    cancelled."""

    def __init__(
        self,
        dsn: Dsn,
        worker: str,
        notify: Callable[[str], None],
        self_test: Callable[[str], Awaitable[None]],
        events: Events,
        deadlines: Deadlines = Deadlines(),  # noqa: B008 frozen
        schema: str | None = None,
        budget: ConnectionBudget | None = None,
    ) -> None:
        """`dsn` is read anew for each connection. `schema`: RECALL_SCHEMA. `budget`: of all
        connections of this worker. `self_test(channel)`: notify that channel from another
        connection. It raises DatabaseUnavailable or StatementRejected where that can't be done."""
        self._schema = schema
        self._deadlines = deadlines
        self._dsn = dsn
        self._budget = budget or ConnectionBudget()
        self._probe_every = (
            PROBE_EVERY
            if deadlines.statement >= STATEMENT_DEADLINE
            else min(PROBE_EVERY, 2 * deadlines.statement)
        )
        self._name = f"recall-worker listener {worker}"
        self._notify = notify
        self._self_test = self_test
        self._events = events
        # The same for all connections of this listener: behind a pooler, a LISTEN stays on the
        # server connection that ran it.
        self._own = f"{CHANNEL}_{uuid4().hex[:16]}"
        self._direct = True
        self.listening = False
        self.deaf = False
        """Whether the last self-test did not arrive."""
        self._rechecks = False
        self._answers = asyncio.Event()
        self._tested = False
        self._stirred = asyncio.Event()
        """Set when the event that `_wait` waits for may have happened."""

    def recheck(self) -> None:
        """PostgreSQL was unavailable to other connections and answers again: test this connection
        soon, or connect at once."""
        self._rechecks = True
        self._answers.set()
        self._stirred.set()

    @property
    def state(self) -> str:
        """`listening`, `lost` or `deaf`: for people."""
        return "deaf" if self.deaf else "listening" if self.listening else "lost"

    async def run(self) -> None:
        """Listen for ever. Returns only by cancellation."""
        failures = 0
        while True:
            self._answers.clear()
            try:
                await self._listen()
                failures = 0
            except (psycopg.Error, OSError, TimeoutError) as error:
                is_news = self.listening or failures == 0
                failures = 1 if self.listening else failures + 1
                self.listening = False
                if is_news:
                    reason = (
                        "no answer to the probe"
                        if isinstance(error, TimeoutError)
                        else error_text(error)
                    )
                    self._events.tell("listener.lost", reason=reason)
            try:
                async with asyncio.timeout(
                    random.uniform(
                        0.05,
                        min(RECONNECT_MOST, RECONNECT_FIRST * 2 ** min(failures, DOUBLINGS_MOST)),
                    )
                ):
                    await self._answers.wait()
                # All replicas notice it in the same instant.
                await asyncio.sleep(random.uniform(0.0, ANSWERS_JITTER))
            except TimeoutError:
                pass

    async def _listen(self) -> None:
        """Listen on a new connection. Returns when notifications do not arrive on it."""
        dsn = current(self._dsn)
        place = self._budget.take()
        try:
            async with asyncio.timeout(self._deadlines.connecting(dsn)):
                conn = await Connection.connect(
                    **connection_info(dsn, self._name, self._deadlines.connect)
                )
        except BaseException:
            place.free()
            raise
        place.opened(conn.pgconn.backend_pid, self._name)
        farewell = Farewell(conn)
        # For notifications that arrive while a statement runs.
        conn.add_notify_handler(
            lambda notification: self._receive(notification.channel, notification.payload)
        )
        try:
            async with asyncio.timeout(PROBE_DEADLINE):
                self._direct = await session_setup(conn, self._deadlines.statement, self._schema)
                if not self._direct:
                    place.pooled()
                await end_given_up(conn, place, self._budget)
                for channel in (CHANNEL, self._own):
                    await conn.execute(f"listen {channel}".encode(), prepare=False)
            self.listening, self._tested = True, False
            if not self.deaf:
                self._events.tell("listener.listening", channel=CHANNEL)
            self._notify("")
            while await self._passes_self_test(conn):
                await self._wait(conn, self._probe_every, while_trusted=True)
            if self.deaf:
                # A new connection is deaf, too. It is kept for a while: another one would not help.
                await self._wait(conn, self._probe_every, while_trusted=True)
                return
            self.deaf = True
            reason, hint = (ELSEWHERE, ELSEWHERE_HINT) if self._direct else (POOLER, POOLER_HINT)
            self._events.tell("listener.deaf", reason=reason, hint=hint)
        except psycopg.Error as error:
            raise farewell.instead_of(error) from None
        finally:
            # PostgreSQL notices the end of a connection that carries nothing, unless the network
            # has cut it off.
            if conn.pgconn.status == pq.ConnStatus.BAD:
                place.free()
            place.give_up()
            # Never close(): it could wait for a peer that is gone.
            conn.pgconn.finish()

    async def _wait(
        self, conn: psycopg.AsyncConnection[Any], seconds: float, *, while_trusted: bool = False
    ) -> bool:
        """Receive notifications for so many seconds, or until the self-test's arrives (or, where
        `while_trusted`, a recheck is wanted). Returns whether the self-test's arrived."""
        broken: list[psycopg.Error] = []

        def receive() -> None:
            try:
                conn.pgconn.consume_input()
                while (notification := conn.pgconn.notifies()) is not None:
                    self._receive(
                        notification.relname.decode(),
                        notification.extra.decode("utf-8", "replace"),
                    )
            except psycopg.Error as error:
                broken.append(error)
                self._stirred.set()

        loop, socket, until = asyncio.get_running_loop(), conn.fileno(), time.monotonic() + seconds
        loop.add_reader(socket, receive)
        try:
            receive()
            while (
                not (self._tested or broken or (while_trusted and self._rechecks))
                and (left := until - time.monotonic()) > 0
            ):
                self._stirred.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._stirred.wait()
        finally:
            loop.remove_reader(socket)
        if broken:
            raise broken[0]
        echoed, self._tested = self._tested, False
        return echoed

    def _receive(self, channel: str, payload: str) -> None:
        if channel == self._own:
            self._tested = True
            self._stirred.set()
        else:
            self._notify(payload)

    async def _passes_self_test(self, conn: psycopg.AsyncConnection[Any]) -> bool:
        """Whether notifications arrive on this connection; also True where none can be sent now.
        Raises TimeoutError where the connection is dead."""
        self._rechecks = False
        self_test = asyncio.ensure_future(self._test_notified())
        until: float | None = None
        try:
            while until is None or time.monotonic() < until:
                if await self._wait(
                    conn, SELF_TEST_STEP if until is None else until - time.monotonic()
                ):
                    return self._not_deaf()
                if until is None and self_test.done():
                    if not self_test.result():
                        break
                    until = time.monotonic() + PROBE_DEADLINE
        except BaseException:
            self_test.cancel()
            raise
        async with asyncio.timeout(PROBE_DEADLINE):
            await conn.execute(b"select 1", prepare=False)
        # If this process was stopped meanwhile, the notification may have arrived unread.
        return self._not_deaf() if await self._wait(conn, SELF_TEST_STEP) else until is None

    def _not_deaf(self) -> bool:
        if self.deaf:
            self.deaf = False
            self._events.tell("listener.listening", channel=CHANNEL)
        return True

    async def _test_notified(self) -> bool:
        """Have our own channel notified. False where that can't be done now."""
        try:
            await self._self_test(self._own)
        except (DatabaseUnavailable, StatementRejected):
            return False
        return True

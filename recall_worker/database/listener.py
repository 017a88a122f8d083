"""The bell: one dedicated LISTEN connection that wakes the worker.

A notification says only "look": the payload is empty and the row is the truth. The worker must also look once after every
(re)connection, as whatever rang meanwhile was not heard; the bell rings itself for that.

The connection is the bell's alone, and is read as soon as something comes, which psycopg's `notifies()` would do two turns of the loop later. A
half-open peer raises nothing, and a LISTEN through a
transaction pooler, or on another server than the one that is written to, succeeds and hears nothing. So every now and then the bell has
itself rung, on a channel of its own and from another connection (the ledger's): what arrives has come all the way. What does not is told
once, loudly; until it is heard again the worker lives by its regular look. It reconnects for ever, with jitter.

Never here: what a notify means.
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

from ..events import Events
from .connection import (
    STATEMENT_DEADLINE,
    Connection,
    DatabaseUnavailable,
    Deadlines,
    StatementRejected,
    connection_info,
    error_text,
    session_setup,
)

CHANNEL = "session_recalls"
PROBE_EVERY = 60.0
"""Seconds, as a replica that has nothing to do should cost nothing: what rings meanwhile on a dead connection, the regular look finds. Oftener
where the lease is short."""
PROBE_DEADLINE = 5.0
SELF_TEST_STEP = 0.2
RECONNECT_MOST = 5.0
MEANWHILE = "until then a look every RECALL_POLL_INTERVAL finds what is inserted"
POOLER = "what is rung does not reach it: a transaction pooler stands in between, which LISTEN does not pass"
POOLER_HINT = f"give the server's own address in RECALL_LISTEN_DSN; {MEANWHILE}"
ELSEWHERE = (
    "what is rung does not reach it: RECALL_LISTEN_DSN leads to another database than RECALL_DSN"
)
ELSEWHERE_HINT = f"the same database on the same server in RECALL_LISTEN_DSN; {MEANWHILE}"


class Listener:
    """Calls `notify()` at each notification and after each connection, until cancelled."""

    def __init__(
        self,
        dsn: str,
        worker: str,
        notify: Callable[[], None],
        self_test: Callable[[str], Awaitable[None]],
        events: Events,
        deadlines: Deadlines = Deadlines(),  # noqa: B008 frozen
    ) -> None:
        """`self_test(channel)`: notify that channel from another connection. Raises DatabaseUnavailable or
        StatementRejected where that can't be done."""
        self._deadlines = deadlines
        self._connect_within = deadlines.connecting(dsn)
        self._probe_every = (
            PROBE_EVERY
            if deadlines.statement >= STATEMENT_DEADLINE
            else min(PROBE_EVERY, 2 * deadlines.statement)
        )
        self._info = connection_info(dsn, f"recall-worker listener {worker}", deadlines.connect)
        self._notify = notify
        self._self_test = self_test
        self._events = events
        # The same for all connections of this bell: behind a pooler a LISTEN stays on whatever connection it was passed to.
        self._own = f"{CHANNEL}_{uuid4().hex[:16]}"
        self._direct = True
        self.listening = False
        self.deaf = False
        """Whether the last self_test did not come."""
        self._rechecks = False
        self._answers = asyncio.Event()
        self._tested = False
        self._stirred = asyncio.Event()
        """What is waited for may have come."""

    def recheck(self) -> None:
        """PostgreSQL was away for others and answers again: soon see whether this connection still hears, or connect at once."""
        self._rechecks = True
        self._answers.set()
        self._stirred.set()

    @property
    def state(self) -> str:
        """listening, lost or deaf: for people."""
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
                told = self.listening or failures == 0
                failures = 1 if self.listening else failures + 1
                self.listening = False
                if told:
                    reason = (
                        "no answer to the probe"
                        if isinstance(error, TimeoutError)
                        else error_text(error)
                    )
                    self._events.tell("listener.lost", reason=reason)
            try:
                async with asyncio.timeout(
                    random.uniform(0.05, min(RECONNECT_MOST, 0.2 * 2 ** min(failures, 6)))
                ):
                    await self._answers.wait()
                # The same instant for all replicas.
                await asyncio.sleep(random.uniform(0.0, 0.05))
            except TimeoutError:
                pass

    async def _listen(self) -> None:
        """Listen on a new connection. Returns when that does not hear what is rung."""
        async with asyncio.timeout(self._connect_within):
            conn = await Connection.connect(**self._info)
        # What comes while it is asked something.
        conn.add_notify_handler(lambda came: self._receive(came.channel))
        try:
            async with asyncio.timeout(PROBE_DEADLINE):
                self._direct = await session_setup(conn, self._deadlines.statement)
                for channel in (CHANNEL, self._own):
                    await conn.execute(f"listen {channel}".encode(), prepare=False)
            self.listening, self._tested = True, False
            if not self.deaf:
                self._events.tell("listener.listening", channel=CHANNEL)
            self._notify()
            while await self._hears(conn):
                await self._wait(conn, self._probe_every, while_trusted=True)
            if self.deaf:
                # A new connection did not hear either. It is kept for a while, as nothing speaks for another one.
                await self._wait(conn, self._probe_every, while_trusted=True)
                return
            self.deaf = True
            reason, hint = (ELSEWHERE, ELSEWHERE_HINT) if self._direct else (POOLER, POOLER_HINT)
            self._events.tell("listener.deaf", reason=reason, hint=hint)
        finally:
            # Never close(): it could wait for a peer that is gone.
            conn.pgconn.finish()

    async def _wait(
        self, conn: psycopg.AsyncConnection[Any], seconds: float, *, while_trusted: bool = False
    ) -> bool:
        """Hear what comes, for so long, or until the self_test comes (or a recheck). Returns whether the self_test came."""
        broken: list[psycopg.Error] = []

        def hear() -> None:
            try:
                conn.pgconn.consume_input()
                while (came := conn.pgconn.notifies()) is not None:
                    self._receive(came.relname.decode())
            except psycopg.Error as error:
                broken.append(error)
                self._stirred.set()

        loop, socket, until = asyncio.get_running_loop(), conn.fileno(), time.monotonic() + seconds
        loop.add_reader(socket, hear)
        try:
            hear()
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

    def _receive(self, channel: str) -> None:
        if channel == self._own:
            self._tested = True
            self._stirred.set()
        else:
            self._notify()

    async def _hears(self, conn: psycopg.AsyncConnection[Any]) -> bool:
        """Whether this connection hears what is rung; True, too, where nobody can notify now. Raises TimeoutError where it is dead."""
        self._rechecks = False
        self_test = asyncio.ensure_future(self._test_notified())
        until: float | None = None
        try:
            while until is None or time.monotonic() < until:
                if await self._wait(
                    conn, SELF_TEST_STEP if until is None else until - time.monotonic()
                ):
                    return self._is_heard()
                if until is None and self_test.done():
                    if not self_test.result():
                        break
                    until = time.monotonic() + PROBE_DEADLINE
        except BaseException:
            self_test.cancel()
            raise
        async with asyncio.timeout(PROBE_DEADLINE):
            await conn.execute(b"select 1", prepare=False)
        # Should this process have been stopped meanwhile, the self_test has come and was not read.
        return self._is_heard() if await self._wait(conn, SELF_TEST_STEP) else until is None

    def _is_heard(self) -> bool:
        if self.deaf:
            self.deaf = False
            self._events.tell("listener.listening", channel=CHANNEL)
        return True

    async def _test_notified(self) -> bool:
        """Have ourselves rung. False where that can't be done now."""
        try:
            await self._self_test(self._own)
        except (DatabaseUnavailable, StatementRejected):
            return False
        return True

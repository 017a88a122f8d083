"""How the pages reach PostgreSQL: a few connections, each used by one thread at a time, as the
questions and actions of operators are asked on a connection that waits.

A connection is opened when it is first needed, and again after it broke. While PostgreSQL does not
answer, every page says so, and since when. What is given up is cut off, so that it is not done
later, when a person has been told that PostgreSQL was silent. A question may be asked a second time
where the connection broke before the answer. An action is one transaction: where it broke before
its commit was sent nothing was done, and afterwards that is not known, which is said.

Never here: what is asked.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Any, TypeVar

import psycopg

from .. import statements
from ..database import identity
from ..database.connection import DatabaseUnavailable, error_text
from ..database.identity import UNKNOWN, Identity
from ..database.setup import CommandConnection
from ..operations.connection import opened
from ..settings import Settings

CONNECTIONS = 4
"""Open connections for pages and actions, at most. (The live picture has one more.)"""
STATEMENT_PATIENCE = 8.0
"""Seconds that a statement may take."""
SEARCH_PATIENCE = 2.0
"""Seconds that a search may take: what no index serves is given up then."""
PATIENCE = 15.0
"""Seconds that a page waits for all that it asks."""
CONNECT_WITHIN = 5.0
"""Seconds to open a connection."""
IDENTITY_FOR = 30.0
"""Seconds for which it is believed which database this is, and what the account may do."""

Connection = psycopg.Connection[dict[str, Any]]
T = TypeVar("T")


class Doubt(DatabaseUnavailable):
    """The connection broke after the commit of an action was sent: whether it was done is not
    known."""


class Kind(Enum):
    QUESTION = auto()
    """It may run twice."""
    ACTION = auto()
    """It runs in a transaction of ours."""
    BATCH = auto()
    """It runs in a transaction of its own."""


@dataclass(eq=False)
class Work:
    """One piece of work, between the thread that does it and the loop that may give it up."""

    kind: Kind
    begun: bool = False
    """Whether more than its transaction's begin was sent."""
    committing: bool = False
    given_up: bool = False
    _conn: Connection | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def uses(self, conn: Connection | None) -> None:
        """From now on it uses this connection. Raises DatabaseUnavailable where nobody waits for it
        any more."""
        with self._lock:
            self._conn = conn
            if conn is not None and self.given_up:
                raise DatabaseUnavailable("given up", timed_out=True)

    def commits(self) -> None:
        """From now on it is not known whether it was done, until PostgreSQL says so. Raises
        DatabaseUnavailable where it was given up."""
        with self._lock:
            if self.given_up:
                raise DatabaseUnavailable("given up", timed_out=True)
            self.committing = True

    def give_up(self) -> bool:
        """Cut its connection off: the thread wakes up, and PostgreSQL rolls back what was not
        committed, also where it is silent now and goes on later. Returns whether the commit was
        sent."""
        with self._lock:
            self.given_up = True
            if self._conn is not None and not self._conn.closed:
                with suppress(OSError), socket.socket(fileno=os.dup(self._conn.fileno())) as same:
                    same.shutdown(socket.SHUT_RDWR)
            return self.committing


class Database:
    def __init__(self, settings: Callable[[], Settings]) -> None:
        """`settings()`: read anew for each connection, as a password may change."""
        self._settings = settings
        self._threads = ThreadPoolExecutor(CONNECTIONS, "postgresql")
        self._works: set[Work] = set()
        self._idle: list[tuple[CommandConnection[dict[str, Any]], float]] = []
        self._asked_at = -IDENTITY_FOR
        self.identity: Identity = UNKNOWN
        self.may_act = False
        """Whether the account may change recalls here."""
        self.takes_writes = True
        """Whether this PostgreSQL lets anybody change something: a standby does not."""
        self.role = ""
        self.name = ""
        """The database's."""
        self.lost_since: datetime | None = None
        """Since when PostgreSQL does not answer."""
        self.lost_reason = ""

    async def ask(self, work: Callable[[Connection], T]) -> T:
        """What `work` finds. It may run twice. Raises DatabaseUnavailable, and psycopg's errors."""
        return await self._run(work, Work(Kind.QUESTION))

    async def act(self, work: Callable[[Connection], T]) -> T:
        """What `work` did, in one transaction. It runs once. Raises Doubt too."""
        return await self._run(work, Work(Kind.ACTION))

    async def act_in_batch(self, work: Callable[[Connection], T]) -> T:
        """The same, where `work` has a transaction of its own."""
        return await self._run(work, Work(Kind.BATCH))

    def lost(self, reason: str) -> None:
        """Note that PostgreSQL did not answer."""
        if self.lost_since is None:
            self.lost_since = datetime.now(UTC)
        self.lost_reason = reason

    def found(self) -> None:
        """Note that it did."""
        self.lost_since = None

    async def _run(self, do: Callable[[Connection], T], work: Work) -> T:
        context = contextvars.copy_context()
        queued = self._threads.submit(lambda: context.run(self._in_thread, do, work))
        self._works.add(work)
        running = asyncio.wrap_future(queued)
        running.add_done_callback(lambda future: future.cancelled() or future.exception())
        try:
            done, _ = await asyncio.wait((running,), timeout=PATIENCE)
            if not done:
                # What no thread has begun is not begun any more.
                queued.cancel()
                doubt = work.give_up()
                reason = f"no answer within {PATIENCE:g} s"
                self.lost(reason)
                raise (Doubt if doubt else DatabaseUnavailable)(reason, timed_out=True)
            result = running.result()
        except DatabaseUnavailable as error:
            self.lost(error.reason)
            raise
        except asyncio.CancelledError:
            # The console stops, and has waited long enough.
            queued.cancel()
            work.give_up()
            raise
        finally:
            self._works.discard(work)
        self.found()
        return result

    def _in_thread(self, do: Callable[[Connection], T], work: Work) -> T:
        """Run it on a connection of this thread's. Raises DatabaseUnavailable, Doubt."""
        while True:
            conn, rested = self._take()
            try:
                if conn is None:
                    conn = self._open()
                work.uses(conn)
                if time.monotonic() - self._asked_at > IDENTITY_FOR:
                    self._look_around(conn)
                elif rested and work.kind is Kind.BATCH:
                    conn.execute("select")
                result = self._done(conn, do, work)
            except psycopg.OperationalError as error:
                # Of a server that refuses something, or that gave a statement up, the connection
                # goes on.
                work.uses(None)
                if conn is not None and not conn.broken and error.sqlstate is not None:
                    self._give_back(conn)
                    raise
                if conn is not None:
                    conn.close()
                if rested and not work.given_up and not work.begun:
                    continue  # It broke while nobody used it.
                kind = Doubt if work.committing else DatabaseUnavailable
                raise kind(error_text(error)) from error
            except BaseException:
                work.uses(None)
                if conn is not None:
                    self._give_back(conn)
                raise
            work.uses(None)
            self._give_back(conn)
            return result

    def _done(self, conn: Connection, do: Callable[[Connection], T], work: Work) -> T:
        match work.kind:
            case Kind.QUESTION:
                return do(conn)
            case Kind.BATCH:
                # Which of its statements is the commit is not known here.
                work.begun = True
                work.commits()
                return do(conn)
            case Kind.ACTION:
                with conn.transaction():
                    work.begun = True
                    result = do(conn)
                    work.commits()
                return result

    def _take(self) -> tuple[CommandConnection[dict[str, Any]] | None, float]:
        """A connection that is free, and the seconds for which it was."""
        with suppress(IndexError):
            conn, since = self._idle.pop()
            return conn, max(time.monotonic() - since, 1e-9)
        return None, 0.0

    def _give_back(self, conn: CommandConnection[dict[str, Any]]) -> None:
        if conn.closed:
            return
        if conn.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
            conn.close()
            return
        self._idle.append((conn, time.monotonic()))

    def _open(self) -> CommandConnection[dict[str, Any]]:
        chosen = self._settings()
        self._asked_at = -IDENTITY_FOR
        return opened(
            chosen.dsn or "",
            "recall-worker console",
            chosen.schema,
            patience=STATEMENT_PATIENCE,
            connect_within=CONNECT_WITHIN,
        )

    def _look_around(self, conn: Connection) -> None:
        """Which database this is, and what this account may do in it."""
        self.identity = identity.ask_once(conn)
        row = conn.execute(statements.load("console")["rights"].encode()).fetchone()
        assert row is not None
        self.takes_writes, self.role, self.name = row["writable"], row["role"], row["database"]
        self.may_act = row["may_act"] and row["writable"]
        self._asked_at = time.monotonic()

    def close(self) -> None:
        """Hang up, also on what still runs: a silent PostgreSQL keeps no thread from its end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for work in self._works:
            work.give_up()
        while self._idle:
            self._idle.pop()[0].close()


def patience(*, by_index: bool = False) -> tuple[str, dict[str, str]]:
    """A statement, and its values: what the transaction asks after it is given up after
    SEARCH_PATIENCE. `by_index`: there is an index for it, whatever the planner takes for cheaper.
    """
    return statements.load("console")["patience"], {
        "milliseconds": f"{SEARCH_PATIENCE * 1000:.0f}",
        "read_through": "off" if by_index else "on",
    }


def impatient(conn: Connection, *, by_index: bool = False) -> None:
    """Be so until the transaction ends."""
    statement, values = patience(by_index=by_index)
    conn.execute(statement.encode(), values)

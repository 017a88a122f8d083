"""One connection to PostgreSQL, as the daemon needs it: how it is opened, how long we wait for an
answer, and what silence means.

A connection is opened when it is first needed, and again after it broke. It carries one query at a
time, each a transaction of its own and one round trip (`pipeline`). Deadlines follow the lease, on
both ends: silence is noticed, and a new connection tried, while the lease lasts. The first query
finds out whether the connection is the server's own or pooled (lent by a pooler for one
transaction at a time): on a pooled one nothing is prepared, and every transaction sets its own
settings. Any failure of a connection is DatabaseUnavailable. A statement that PostgreSQL answers
but refuses, because of its values, is StatementRejected.

Never here: the statements (ledger), and when they are run.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import re
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import errors, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import tuple_row

from .. import statements
from .pipeline import PipelineConnection, Step, given_in_order, numbered

STATEMENT_DEADLINE = 15.0
"""Seconds, at most, after which an unanswered statement means that the connection is gone."""
CONNECT_DEADLINE = 10.0
"""Seconds, at most, to open a connection."""
CONNECT_LEAST = 2.0
"""Seconds that libpq gives a host at least."""
DEADLINE_AT = 1 / 4
"""Part of a lease: renewals start at a third of it, so an unanswered one leaves time for a new
connection and a second try."""
SERVER_GIVES_UP_AT = 15 / 16
"""Part of our deadline: PostgreSQL, where it is alive, gives a statement up a little before us."""
LOCK_PATIENCE = 1.0
"""Seconds, at most, a statement may wait for the application to end a transaction. Locked rows are
skipped, not waited for."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long we wait for PostgreSQL, in seconds."""

    statement: float = STATEMENT_DEADLINE
    connect: float = CONNECT_DEADLINE

    @classmethod
    def within(cls, lease: float) -> Deadlines:
        """Deadlines that leave time to renew a lease of so many seconds again: see DEADLINE_AT."""
        return cls(
            min(STATEMENT_DEADLINE, max(1.0, lease * DEADLINE_AT)),
            min(CONNECT_DEADLINE, max(CONNECT_LEAST, lease * DEADLINE_AT)),
        )

    def connecting(self, dsn: str) -> float:
        """Seconds in which each of a DSN's hosts can be tried."""
        return max(self.connect, CONNECT_LEAST * _hosts(conninfo_to_dict(dsn)))


class DatabaseUnavailable(Exception):
    """PostgreSQL, or this connection to it, does not answer. `reason` is for people; the caller
    tries again."""

    def __init__(
        self,
        reason: str,
        asked_at: float = math.inf,
        *,
        for_all: bool = False,
        timed_out: bool = False,
    ) -> None:
        """`asked_at`: monotonic instant of the query. `for_all`: PostgreSQL refuses everyone, so no
        other worker can take a lease either. `timed_out`: the connection was open, and this
        statement was not done in time: one of its rows may be the cause."""
        super().__init__(reason)
        self.timed_out = timed_out
        self.reason = reason
        self.asked_at = asked_at
        self.for_all = for_all


class StatementRejected(Exception):
    """PostgreSQL answered that it will not run this statement with these values, or at all. Trying
    again changes nothing."""

    def __init__(self, reason: str, sqlstate: str | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sqlstate = sqlstate

    @property
    def is_lock(self) -> bool:
        """Whether the whole table is locked, as DDL does: not the fault of the values."""
        return self.sqlstate == errors.LockNotAvailable.sqlstate

    @property
    def of_a_row(self) -> bool:
        """Whether a row's values are the cause (data, constraints, limits, an exception of a
        trigger), and not the statement."""
        return self.sqlstate is not None and self.sqlstate[:2] in ("22", "23", "44", "54", "P0")


def connection_info(
    dsn: str, name: str, connect_within: float = CONNECT_DEADLINE
) -> dict[str, Any]:
    """Keyword arguments for psycopg's connect: the DSN with our application_name and with
    keepalives that notice a dead peer.

    `connect_within`: seconds, shared by all hosts of the DSN, so that the last one is tried in time
    when the others are silent (but each gets two seconds). Of several hosts we want the one that
    takes writes, unless the DSN says otherwise: after a failover the first may be a standby.
    """
    given = conninfo_to_dict(dsn)
    hosts = _hosts(given)
    which = (
        {"target_session_attrs": "read-write"}
        if hosts > 1 and not given.get("target_session_attrs")
        else {}
    )
    return which | {
        "conninfo": dsn,
        "application_name": name,
        "connect_timeout": int(max(CONNECT_LEAST, connect_within / hosts)),
        "keepalives": 1,
        "keepalives_idle": int(1.5 * connect_within),
        "keepalives_interval": int(0.5 * connect_within),
        "keepalives_count": 3,
        "tcp_user_timeout": int(2000 * connect_within),
        "client_encoding": "utf8",
        "autocommit": True,
    }


class Connection(psycopg.AsyncConnection[Any]):
    """A connection that is closed when a query on it is cancelled: by a deadline, or with its task.

    psycopg would first ask the server to cancel, over a new connection, and then wait for the old
    one to confirm: five seconds each, and a deadline is meant for a server that says nothing.
    PostgreSQL gives up by itself: see `session_setup`.
    """

    async def cancel_safe(self, *, timeout: float = 0.0) -> None:
        with suppress(OSError), socket.socket(fileno=os.dup(self.pgconn.socket)) as same:
            same.shutdown(socket.SHUT_RDWR)


def _hosts(given: Mapping[str, Any]) -> int:
    return max(str(given.get(name) or "").count(",") + 1 for name in ("host", "hostaddr"))


def transaction_setup(seconds: float) -> dict[str, str]:
    """How long PostgreSQL may wait, in its notation: for a lock, for a statement, and for us."""
    return {
        "lock": f"{min(LOCK_PATIENCE, seconds / 2) * 1000:.0f}",
        "statement": f"{seconds * 1000:.0f}",
        "idle": f"{math.ceil(seconds)}",
        "interval": f"{math.ceil(seconds / 3)}",
        "unheard": f"{seconds * 4 / 3 * 1000:.0f}",
    }


async def session_setup(
    conn: psycopg.AsyncConnection[Any], seconds: float = STATEMENT_DEADLINE
) -> bool:
    """Run the first query on a connection. Returns whether the connection is the server's own: then
    it has our settings from now on.

    `seconds`: the deadline of a statement; after twice that PostgreSQL, too, closes a connection
    whose peer has vanished, and releases its locks. False: a pooler stands in between, and what we
    set would stay behind for others.
    """
    cursor = psycopg.AsyncCursor(conn, row_factory=tuple_row)
    values = {"pid": conn.pgconn.backend_pid} | transaction_setup(seconds)
    setup = statements.load("ledger")["session_setup"].encode()
    try:
        await cursor.execute(setup, values, prepare=False)
    except errors.QueryCanceled:
        # The account's own deadline holds until ours is set, even if it is one millisecond. The
        # second try is faster: PostgreSQL has everything in its caches.
        await cursor.execute(setup, values, prepare=False)
    row = await cursor.fetchone()
    assert row is not None
    return bool(row[0])


def error_text(error: BaseException) -> str:
    """The first line of an error's text, without what could be a secret.

    libpq never names a password. But it quotes pieces of a DSN that it can't parse, and with them
    pieces of a password that has a blank, a slash or an @ in it.
    """
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else type(error).__name__
    if _OF_A_DSN.search(line):
        line = re.sub(r'".*"', '"…"', line)
    line = re.sub(r"(['\"])[^'\"]*@", r"\1…@", line)
    if isinstance(error, errors.ReadOnlySqlTransaction):
        return f"this PostgreSQL takes no writes, as a standby does: {line}"
    return line


def takes_nobody(error: psycopg.Error, dsn: str) -> bool:
    """Whether everyone's connections are refused: no server listens there, or PostgreSQL is
    starting up or shutting down.

    False where others may get in, or are in already: no answer, no route, too many clients, a wrong
    password. With several hosts: True only if none of them listens.
    """
    attempts = str(error).split("\n- ")[1:] or [str(error)]
    if all(
        _REFUSED in attempt or (_MISSING in attempt and "/.s.PGSQL." in attempt)
        for attempt in attempts
    ):
        return True
    # A server's own message follows two blanks, in any language; libpq's ping reads its code
    # instead. The ping blocks the whole process, but this server has just answered.
    if _hosts(conninfo_to_dict(dsn)) > 1 or ":  " not in attempts[-1]:
        return False
    return (
        pq.PGconn.ping(make_conninfo(dsn, connect_timeout=int(CONNECT_LEAST)).encode())
        == pq.Ping.REJECT
    )


# The words of the C library, which libpq quotes.
_REFUSED, _MISSING = os.strerror(errno.ECONNREFUSED), os.strerror(errno.ENOENT)


_OF_A_DSN = re.compile(r"connection (?:option|info)|URI|percent-encoded|port number")


def _is_refusal(error: psycopg.Error) -> bool:
    """Whether PostgreSQL rejects the values or the schema: neither the moment nor the connection is
    the cause."""
    if error.sqlstate is None:
        return not isinstance(error, errors.OperationalError | errors.InterfaceError)
    # 08 connection, 0A a plan from before a column changed its type, 25 a standby after a failover,
    # 26 a forgotten plan, 40 a deadlock, 53 no resources, 57 shut down, 58 disk.
    return error.sqlstate[:2] not in ("08", "0A", "25", "26", "40", "53", "57", "58", "XX")


class QueryConnection:
    """One connection, opened when needed, one query at a time.

    When one breaks, its siblings reconnect before their next query: most often they broke too, and
    the same outage would be reported again.
    """

    def __init__(
        self,
        dsn: str,
        name: str,
        deadlines: Deadlines,
        siblings: list[QueryConnection],
        *,
        prepare: bool = True,
    ) -> None:
        """`prepare`: have PostgreSQL keep the plans of the statements."""
        self._dsn = dsn
        self._info = connection_info(dsn, name, deadlines.connect)
        self._within = deadlines.statement
        self._connect_within = deadlines.connecting(dsn)
        self._prepare = prepare
        self._siblings = siblings
        self._siblings.append(self)
        self._suspect = False
        self._pipe: PipelineConnection | None = None
        self._pooled = False
        """Whether a pooler lends us a server connection for one transaction at a time."""
        self._turn = asyncio.Lock()

    async def ask(
        self,
        statement: str,
        values: Mapping[str, Any],
        after: str | tuple[str, Mapping[str, Any]] | None = None,
        *,
        as_: type[dict[str, Any]] | type[tuple[Any, ...]] = dict,
    ) -> list[Any]:
        """Run a statement and return its rows, each `as_` a dict or a tuple.

        `after`: a statement (with its values) to run before it in the same transaction, still in
        one round trip. Raises DatabaseUnavailable, StatementRejected.
        """
        text, names = numbered(statement)
        async with self._turn:
            asked_at = time.monotonic()
            try:
                within = self._within / SERVER_GIVES_UP_AT
                async with asyncio.timeout(
                    within + (0.0 if self._is_open else self._connect_within)
                ) as deadline:
                    if not self._is_open:
                        await self._connect()
                        deadline.reschedule(asyncio.get_running_loop().time() + within)
                    pipe = self._pipe
                    assert pipe is not None
                    wanted = (text, given_in_order(names, values))
                    before: list[Step] = self._pooled_setup if self._pooled else []
                    if after is not None:
                        first, its = (after, {}) if isinstance(after, str) else after
                        first_text, first_names = numbered(first)
                        before = [*before, (first_text, given_in_order(first_names, its))]
                    query = pipe.ask(
                        before,
                        wanted,
                        [(b"commit", ())] if self._pooled else [],
                        self._prepare and not self._pooled,
                    )
                    try:
                        answer = await query.answer
                    except psycopg.Error:
                        await self._roll_back(pipe)
                        raise
                    return pipe.load(answer, as_)
            except TimeoutError:
                was_open = self._pipe is not None
                self._break()
                raise DatabaseUnavailable(
                    "no answer within the deadline", asked_at, timed_out=was_open
                ) from None
            except psycopg.Error as error:
                if _is_refusal(error):
                    raise StatementRejected(error_text(error), error.sqlstate) from error
                for_all = self._pipe is None and takes_nobody(error, self._dsn)
                timed_out = isinstance(error, errors.QueryCanceled)
                self._break()
                raise DatabaseUnavailable(
                    error_text(error), asked_at, for_all=for_all, timed_out=timed_out
                ) from error
            except (UnicodeDecodeError, UnicodeEncodeError) as error:
                self._drop()
                raise StatementRejected(
                    f"a text that is not UTF-8: {error.reason}",
                    errors.CharacterNotInRepertoire.sqlstate,
                ) from error
            except OSError as error:
                self._break()
                raise DatabaseUnavailable(error_text(error), asked_at) from error
            except BaseException:
                # Cancelled in the middle of a query: nobody would read the rest of its answer.
                self._drop()
                raise

    @property
    def _pooled_setup(self) -> list[Step]:
        """The start of a transaction on a pooled connection, where no setting may stay behind."""
        text, names = numbered(statements.load("ledger")["transaction_setup"])
        given = transaction_setup(self._within)
        return [
            (b"begin isolation level read committed", ()),
            (text, [given[name] for name in names]),
        ]

    async def _roll_back(self, pipe: PipelineConnection) -> None:
        """End a transaction that we began explicitly and that failed."""
        if pipe.is_in_error:
            await pipe.ask([], (b"rollback", ()), [], False).answer

    @property
    def _is_open(self) -> bool:
        return self._pipe is not None and not self._suspect

    async def _connect(self) -> None:
        self._drop()
        self._suspect = False
        conn = await Connection.connect(**self._info)
        try:
            self._pooled = not await session_setup(conn, self._within)
        except BaseException:
            conn.pgconn.finish()
            raise
        self._pipe = PipelineConnection(conn)

    def _break(self) -> None:
        for sibling in self._siblings:
            sibling._suspect = True
        self._drop()

    def _drop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    async def close(self) -> None:
        async with self._turn:
            self._drop()

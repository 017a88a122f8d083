"""One connection to PostgreSQL, as the daemon needs it: how it is opened, how long it is waited for, and what its
silence means.

A connection is opened when it is first needed, and again after it broke. It carries one question at a time, each a
transaction of its own and one round trip (`pipeline`). Deadlines follow the lease, on both ends: a silence is noticed, and a
new connection tried, while the lease lasts. Its first question is whether it is the server's own, or lent by a pooler for one
transaction at a time: there nothing is prepared, and every transaction brings its settings along. Whatever goes wrong with a
connection is DatabaseUnavailable. What PostgreSQL answers but refuses, because of the values given, is StatementRejected.

Never here: what is asked (ledger), and when.
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
CONNECT_LEAST = 2.0
"""Seconds that libpq gives a host at least."""
LOCK_PATIENCE = 1.0
"""Seconds, at most, a statement may wait for the application to end a transaction. Row locks are passed over and not waited for."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long PostgreSQL is waited for, in seconds."""

    statement: float = STATEMENT_DEADLINE
    connect: float = CONNECT_DEADLINE

    @classmethod
    def within(cls, lease: float) -> Deadlines:
        """A renewal is asked for at a third of the lease. Should it go unanswered there is time for a new connection and another one."""
        return cls(
            min(STATEMENT_DEADLINE, max(1.0, lease / 4)),
            min(CONNECT_DEADLINE, max(CONNECT_LEAST, lease / 4)),
        )

    def connecting(self, dsn: str) -> float:
        """Until each of a DSN's hosts has been asked."""
        return max(self.connect, CONNECT_LEAST * _hosts(conninfo_to_dict(dsn)))


class DatabaseUnavailable(Exception):
    """PostgreSQL does not answer, or not this connection. `reason` is for people; the caller tries again."""

    def __init__(
        self,
        reason: str,
        asked_at: float = math.inf,
        *,
        for_all: bool = False,
        timed_out: bool = False,
    ) -> None:
        """`asked_at`: monotonic instant of the question. `for_all`: nobody is let in, so nobody else can take a lease either.
        `timed_out`: the connection was there, and this statement was not done in time: it may be one of its rows."""
        super().__init__(reason)
        self.timed_out = timed_out
        self.reason = reason
        self.asked_at = asked_at
        self.for_all = for_all


class StatementRejected(Exception):
    """PostgreSQL answered, and will not run this statement with these values (or at all). Trying again changes nothing."""

    def __init__(self, reason: str, sqlstate: str | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sqlstate = sqlstate

    @property
    def is_lock(self) -> bool:
        """Whether somebody holds the whole table locked, as DDL does: no fault of the values."""
        return self.sqlstate == errors.LockNotAvailable.sqlstate

    @property
    def of_a_row(self) -> bool:
        """Whether it is about a row's values (data, constraints, limits, what a trigger raised), and not about the statement."""
        return self.sqlstate is not None and self.sqlstate[:2] in ("22", "23", "44", "54", "P0")


def connection_info(
    dsn: str, name: str, connect_within: float = CONNECT_DEADLINE
) -> dict[str, Any]:
    """Keyword arguments for psycopg's connect: the DSN with our application_name and with keepalives that notice a dead peer.

    `connect_within`: seconds. Of several hosts the last one, too, is asked within them, should those before it be silent (but each gets
    two seconds); and the one that takes writes is meant, unless the DSN says otherwise: after a failover the first may be a standby.
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
    """One that is hung up where what it was asked is broken off: by a deadline, or by its task's end.

    psycopg would first ask the server to cancel, over a new connection, and then wait for the old one to say so: five seconds each, and
    a deadline is meant for a server that says nothing. PostgreSQL gives up by itself: see `session_setup`.
    """

    async def cancel_safe(self, *, timeout: float = 0.0) -> None:
        with suppress(OSError), socket.socket(fileno=os.dup(self.pgconn.socket)) as same:
            same.shutdown(socket.SHUT_RDWR)


def _hosts(given: Mapping[str, Any]) -> int:
    return max(str(given.get(name) or "").count(",") + 1 for name in ("host", "hostaddr"))


def transaction_setup(seconds: float) -> dict[str, str]:
    """For how long PostgreSQL may wait, in its spelling: locks, a statement, and for us."""
    return {
        "lock": f"{min(LOCK_PATIENCE, seconds / 2) * 1000:.0f}", "statement": f"{seconds * 1000:.0f}",
        "idle": f"{math.ceil(seconds)}", "interval": f"{math.ceil(seconds / 3)}", "unheard": f"{seconds * 4 / 3 * 1000:.0f}",
    }  # fmt: skip


async def session_setup(
    conn: psycopg.AsyncConnection[Any], seconds: float = STATEMENT_DEADLINE
) -> bool:
    """The first question on a connection. Returns whether it is the server's own: then it has our settings from now on.

    `seconds`: the deadline of a statement; after twice that PostgreSQL, too, is rid of a connection whose peer has vanished, and of
    the locks that it held. False: a pooler stands in between, and what was set would stay behind for others.
    """
    cursor = psycopg.AsyncCursor(conn, row_factory=tuple_row)
    values = {"pid": conn.pgconn.backend_pid} | transaction_setup(seconds)
    question = statements.load("ledger")["session_setup"].encode()
    try:
        await cursor.execute(question, values, prepare=False)
    except errors.QueryCanceled:
        # Until ours is set the account's own deadline holds, be it a millisecond. A second time PostgreSQL has it all in its caches.
        await cursor.execute(question, values, prepare=False)
    row = await cursor.fetchone()
    assert row is not None
    return bool(row[0])


def error_text(error: BaseException) -> str:
    """The first line of an error's text, without what could be a secret.

    libpq never names a password; but of a DSN that it can't take apart it quotes pieces, and with them pieces of a password that has a
    blank, a slash or an @ in it.
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
    """Whether a connection was refused as everybody's is: nobody listens there, or PostgreSQL is starting up or shutting down.

    False where others may be let in, or be in already: no answer, no way there, too many clients, a password that is wrong. Of several
    hosts none may be listening.
    """
    attempts = str(error).split("\n- ")[1:] or [str(error)]
    if all(
        _REFUSED in attempt or (_MISSING in attempt and "/.s.PGSQL." in attempt)
        for attempt in attempts
    ):
        return True
    # What a server said follows two blanks, and may be in any language. libpq's ping knows it by its code. It holds the whole process up, but
    # this server has just answered.
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
    """Whether it is the values or the schema that PostgreSQL won't have, and not the moment or the connection."""
    if error.sqlstate is None:
        return not isinstance(error, errors.OperationalError | errors.InterfaceError)
    # 08 connection, 0A a plan from before a column changed its type, 25 a standby after a failover, 26 a forgotten plan,
    # 40 a deadlock, 53 no resources, 57 shut down, 58 disk.
    return error.sqlstate[:2] not in ("08", "0A", "25", "26", "40", "53", "57", "58", "XX")


class QueryConnection:
    """One connection, opened when needed, one question at a time.

    Where one breaks its siblings open theirs anew before their next question: most often they broke too, and then the same outage would be
    told again.
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
        """`prepare`: have PostgreSQL keep the plans of what is asked."""
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
        """Whether a pooler lends us the server's connection for one transaction at a time."""
        self._turn = asyncio.Lock()

    async def ask(
        self,
        statement: str,
        values: Mapping[str, Any],
        after: str | tuple[str, Mapping[str, Any]] | None = None,
        *,
        as_: type[dict[str, Any]] | type[tuple[Any, ...]] = dict,
    ) -> list[Any]:
        """Run a statement; `after` another one, where given (with its values), in one transaction and still one round trip.

        Raises DatabaseUnavailable, StatementRejected.
        """
        text, names = numbered(statement)
        async with self._turn:
            asked_at = time.monotonic()
            try:
                # PostgreSQL itself gives a statement up a little before, where it is there.
                within = self._within * 16 / 15
                async with asyncio.timeout(
                    within + (0.0 if self._is_open else self._connect_within)
                ) as deadline:
                    if not self._is_open:
                        await self._connect()
                        deadline.reschedule(asyncio.get_running_loop().time() + within)
                    pipe = self._pipe
                    assert pipe is not None
                    wanted = (text, given_in_order(names, values))
                    before: list[Step] = self._borrowed if self._pooled else []
                    if after is not None:
                        first, its = (after, {}) if isinstance(after, str) else after
                        first_text, first_names = numbered(first)
                        before = [*before, (first_text, given_in_order(first_names, its))]
                    question = pipe.ask(
                        before,
                        wanted,
                        [(b"commit", ())] if self._pooled else [],
                        self._prepare and not self._pooled,
                    )
                    try:
                        answer = await question.answer
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
                # Cancelled in mid-question: what the connection would say next belongs to nobody.
                self._drop()
                raise

    @property
    def _borrowed(self) -> list[Step]:
        """What a transaction begins with where nothing may stay behind."""
        text, names = numbered(statements.load("ledger")["transaction_setup"])
        given = transaction_setup(self._within)
        return [
            (b"begin isolation level read committed", ()),
            (text, [given[name] for name in names]),
        ]

    async def _roll_back(self, pipe: PipelineConnection) -> None:
        """End a transaction that was begun in so many words, and refused."""
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
        for line in self._siblings:
            line._suspect = True
        self._drop()

    def _drop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    async def close(self) -> None:
        async with self._turn:
            self._drop()

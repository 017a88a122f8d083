"""One connection to PostgreSQL, as the daemon needs it: how it is opened, how long we wait for an
answer, and what silence means.

A connection is opened when it is first needed, and again after it broke. It carries one query at a
time, each a transaction of its own and one round trip (`pipeline`). Deadlines follow the lease, on
both ends: silence is noticed, and a new connection tried, while the lease lasts. The first query
finds out whether the connection is the server's own or pooled (lent by a pooler for one
transaction at a time): on a pooled one nothing is prepared, and every transaction sets its own
settings (`setup`). A query that is late is cancelled at the server: one that is only hung up on
would go on there, and its connection with it (`budget`). A commit that waited for a synchronous
standby answers a cancel by committing on this server alone: `unreplicated` says so. Any failure of
a connection is DatabaseUnavailable. A statement that PostgreSQL answers but refuses, because of its
values, is StatementRejected.

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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import psycopg
from psycopg import errors, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq.abc import PGresult
from psycopg.rows import tuple_row

from .. import statements
from . import identity, setup
from .budget import ConnectionBudget, NoPlace, Place
from .identity import UNKNOWN, Identity
from .pipeline import PendingQuery, PipelineConnection, Step, given_in_order, numbered

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
CANCEL_AT, CANCEL_MOST = 1 / 4, 2.0
"""Part of our deadline, and seconds at most, in which a late query is cancelled and answers that;
then we hang up."""
IDENTITY_FOR = 30.0
"""Seconds for which it is believed that the database is no copy. Asked on each new connection, and
before each claim while it is one, or while nothing is recorded in it."""
OF_THE_SCHEMA = "42"
"""The class of errors of a statement that names what is not there, or not so, or forbidden."""
LOCK_PATIENCE = 1.0
"""Seconds, at most, a statement may wait for the application to end a transaction. Locked rows are
skipped, not waited for."""


Dsn: TypeAlias = str | Callable[[], str]
"""A DSN, or what returns the one of now: its password may change while we run."""


def current(dsn: Dsn) -> str:
    """The DSN for a connection that is opened now."""
    return dsn if isinstance(dsn, str) else dsn()


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

    @property
    def cancel(self) -> float:
        """Seconds in which a late query is cancelled."""
        return min(CANCEL_MOST, self.statement * CANCEL_AT)

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

    def __init__(self, reason: str, sqlstate: str | None, context: str | None = None) -> None:
        """`context`: what PostgreSQL did within the statement, such as a write to an index."""
        super().__init__(reason)
        self.reason = reason
        self.sqlstate = sqlstate
        self._context = context

    @property
    def is_lock(self) -> bool:
        """Whether the whole table is locked, as DDL does: not the fault of the values."""
        return self.sqlstate == errors.LockNotAvailable.sqlstate

    @property
    def is_table_lock(self) -> bool:
        """Whether it is the table for certain. An entry of an index that another transaction keeps
        open may also be waited for."""
        return self.is_lock and not self._context

    @property
    def of_the_schema(self) -> bool:
        """Whether the statement and the schema don't fit: something is missing, or of another type,
        or the account may not use it. Every statement of its kind is refused until that is
        changed."""
        return (self.sqlstate or "")[:2] == OF_THE_SCHEMA

    @property
    def of_a_row(self) -> bool:
        """Whether a row's values are the cause (data, constraints, limits, an exception of a
        trigger), and not the statement."""
        return self.sqlstate is not None and self.sqlstate[:2] in ("22", "23", "44", "54", "P0")


class ClaimsHeld(StatementRejected):
    """The database is a copy, and this statement was not sent: claims are held back there."""

    def __init__(self) -> None:
        super().__init__(identity.IS_A_COPY, None)


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
    PostgreSQL gives up by itself: see `session_setup`. Where it can't, as in a commit that waits,
    `QueryConnection` cancels the query first.
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
    conn: psycopg.AsyncConnection[Any],
    seconds: float = STATEMENT_DEADLINE,
    schema: str | None = None,
) -> bool:
    """Run the first queries on a connection. Returns whether the connection is the server's own:
    then it has our settings from now on.

    `seconds`: the deadline of a statement; after twice that PostgreSQL, too, closes a connection
    whose peer has vanished, and releases its locks. `schema`: RECALL_SCHEMA. False: a pooler stands
    in between, and what we set would stay behind for others.
    """
    pid = conn.pgconn.backend_pid
    try:
        return await _first_queries(conn, pid, seconds, schema)
    except errors.QueryCanceled:
        # The account's own deadline holds until ours is set, even if it is one millisecond. The
        # second try is faster: PostgreSQL has everything in its caches.
        return await _first_queries(conn, pid, seconds, schema)


async def _first_queries(
    conn: psycopg.AsyncConnection[Any], pid: int, seconds: float, schema: str | None
) -> bool:
    """In one round trip: a distant PostgreSQL leaves no time for more within a short lease."""
    first, second = (psycopg.AsyncCursor(conn, row_factory=tuple_row) for _ in range(2))
    direct = statements.load("ledger")["session_setup"].encode()
    terms = setup.values(schema, local=None, pid=pid)
    async with conn.pipeline():
        await first.execute(direct, {"pid": pid} | transaction_setup(seconds), prepare=False)
        await second.execute(setup.settings(), terms, prepare=False)
    row = await first.fetchone()
    assert row is not None
    return bool(row[0])


async def end_given_up(
    conn: psycopg.AsyncConnection[Any], place: Place, budget: ConnectionBudget
) -> None:
    """On a new connection: end those that this worker gave up before, and count them as gone that
    are. Raises NoPlace where too many of them are still there."""
    pids, names = budget.given_up
    if pids:
        cursor = psycopg.AsyncCursor(conn, row_factory=tuple_row)
        ending = statements.load("ledger")["end_given_up"].encode()
        await cursor.execute(ending, {"pids": pids, "names": names}, prepare=False)
        there = {row[0] for row in await cursor.fetchall()}
        budget.ended([pid for pid in pids if pid not in there])
    if budget.is_full:
        raise NoPlace("connections that were given up have not ended at PostgreSQL")


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
        dsn: Dsn,
        name: str,
        deadlines: Deadlines,
        siblings: list[QueryConnection],
        *,
        prepare: bool = True,
        schema: str | None = None,
        budget: ConnectionBudget | None = None,
        identify: bool = False,
        allow_copy: bool = True,
    ) -> None:
        """`dsn` is read anew for each connection that is opened. `prepare`: have PostgreSQL keep
        the plans of the statements. `schema`: RECALL_SCHEMA. `budget`: of all connections of this
        worker. `identify`: find out before any statement which database this is. `allow_copy`: else
        on a copy nothing is sent, except what is asked `on_a_copy`."""
        self._dsn = dsn
        self._schema = schema
        self._name = name
        self._deadlines = deadlines
        self._within = deadlines.statement
        self._prepare = prepare
        self._budget = budget or ConnectionBudget()
        self._place: Place | None = None
        self.unreplicated = False
        """Whether the last answer is of a transaction that was committed on this server, and that
        its synchronous standby has not confirmed. To be read before anything else is awaited."""
        self._siblings = siblings
        self._siblings.append(self)
        self._suspect = False
        self._pipe: PipelineConnection | None = None
        self._pooled = False
        """Whether a pooler lends us a server connection for one transaction at a time."""
        self._turn = asyncio.Lock()
        self._identify, self._allow_copy = identify, allow_copy
        self._identity_until = 0.0
        """Monotonic instant until which `identity` is believed on this connection."""
        self.identity: Identity = UNKNOWN
        """Of the database, as last asked."""

    async def ask(
        self,
        statement: str,
        values: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        after: str | tuple[str, Mapping[str, Any]] | None = None,
        *,
        as_: type[dict[str, Any]] | type[tuple[Any, ...]] = dict,
        on_a_copy: bool = False,
    ) -> list[Any]:
        """Run a statement and return its rows, each `as_` a dict or a tuple.

        `after`: a statement (with its values) to run before it in the same transaction, still in
        one round trip. `values()` is called when `identity` is that of this connection.
        `on_a_copy`: send it there, too. Raises DatabaseUnavailable, StatementRejected (ClaimsHeld).
        """
        async with self._turn:
            asked_at = time.monotonic()
            query: PendingQuery | None = None
            dsn = "" if self._is_open else current(self._dsn)
            self.unreplicated = False
            try:
                within = self._within / SERVER_GIVES_UP_AT
                async with asyncio.timeout(
                    within + (0.0 if self._is_open else self._deadlines.connecting(dsn))
                ) as deadline:
                    if not self._is_open:
                        await self._connect(dsn)
                        deadline.reschedule(asyncio.get_running_loop().time() + within)
                    if self._identify and time.monotonic() >= self._identity_until:
                        await self._find_identity()
                        # Its answer takes no time from the statement's own.
                        deadline.reschedule(asyncio.get_running_loop().time() + within)
                    if self.identity.copy and not (self._allow_copy or on_a_copy):
                        raise ClaimsHeld
                    given = values() if callable(values) else values
                    pipe, query = self._send(statement, given, after)
                    return await self._answer(pipe, query, as_)
            except TimeoutError:
                late, was_open = self._pipe, self._pipe is not None
                if late is None or query is None or not late.waits_for(query):
                    self._break()
                elif (done := await self._cancel(late, query)) is not None:
                    return late.load(done, as_)
                raise DatabaseUnavailable(
                    "no answer within the deadline", asked_at, timed_out=was_open
                ) from None
            except NoPlace as full:
                # The connections that are open are needed, and not suspect.
                raise DatabaseUnavailable(error_text(full), asked_at) from full
            except psycopg.Error as error:
                if _is_refusal(error):
                    if isinstance(error, errors.UndefinedTable):
                        # Restored, renamed or moved meanwhile: the next query looks for it anew.
                        self._drop()
                    raise StatementRejected(
                        error_text(error), error.sqlstate, error.diag.context
                    ) from error
                for_all = self._pipe is None and takes_nobody(error, dsn)
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

    def _send(
        self,
        statement: str,
        values: Mapping[str, Any],
        after: str | tuple[str, Mapping[str, Any]] | None = None,
    ) -> tuple[PipelineConnection, PendingQuery]:
        """Send a statement on the open connection. Raises psycopg.Error."""
        pipe = self._pipe
        assert pipe is not None
        text, names = numbered(statement)
        wanted = (text, given_in_order(names, values))
        before: list[Step] = self._pooled_setup if self._pooled else []
        if after is not None:
            first, its = (after, {}) if isinstance(after, str) else after
            first_text, first_names = numbered(first)
            before = [*before, (first_text, given_in_order(first_names, its))]
        return pipe, pipe.ask(
            before,
            wanted,
            [(b"commit", ())] if self._pooled else [],
            self._prepare and not self._pooled,
        )

    async def _answer(
        self,
        pipe: PipelineConnection,
        query: PendingQuery,
        as_: type[dict[str, Any]] | type[tuple[Any, ...]] = dict,
    ) -> list[Any]:
        """The rows of what was sent. Raises psycopg.Error."""
        try:
            answer = await query.answer
        except psycopg.Error:
            await self._roll_back(pipe)
            raise
        return pipe.load(answer, as_)

    async def _find_identity(self) -> None:
        """Ask which database this is: on a new connection, after IDENTITY_FOR, and each time as
        long as it is a copy, or nothing is recorded: a dump may be about to be restored."""
        self.identity = found = await identity.ask(lambda text: self._answer(*self._send(text, {})))
        sure = found.recorded and not found.copy
        self._identity_until = time.monotonic() + IDENTITY_FOR if sure else 0.0

    @property
    def _pooled_setup(self) -> list[Step]:
        """The start of a transaction on a pooled connection, where no setting may stay behind."""
        text, names = numbered(statements.load("ledger")["transaction_setup"])
        given = transaction_setup(self._within)
        terms, its = numbered(statements.load("setup")["settings"])
        return [
            (b"begin isolation level read committed", ()),
            (text, [given[name] for name in names]),
            (terms, given_in_order(its, setup.values(self._schema, local=True))),
        ]

    async def _roll_back(self, pipe: PipelineConnection) -> None:
        """End a transaction that we began explicitly and that failed."""
        if pipe.is_in_error:
            await pipe.ask([], (b"rollback", ()), [], False).answer

    @property
    def _is_open(self) -> bool:
        return self._pipe is not None and not self._suspect

    async def _connect(self, dsn: str) -> None:
        self._drop()
        self._suspect = False
        self._identity_until = 0.0
        place = self._budget.take()
        try:
            conn = await Connection.connect(
                **connection_info(dsn, self._name, self._deadlines.connect)
            )
        except BaseException:
            place.free()
            raise
        try:
            place.opened(conn.pgconn.backend_pid, self._name)
            self._pooled = not await session_setup(conn, self._within, self._schema)
            if self._pooled:
                place.pooled()
            await end_given_up(conn, place, self._budget)
        except NoPlace:
            conn.pgconn.finish()
            place.free()
            raise
        except BaseException:
            conn.pgconn.finish()
            place.give_up()
            raise
        self._pipe, self._place = PipelineConnection(conn), place

    async def _cancel(self, pipe: PipelineConnection, query: PendingQuery) -> PGresult | None:
        """Have PostgreSQL cancel a query that is late. Returns its answer where it was done all the
        same: in time, or because it waited for a standby and is committed on this server now. Where
        PostgreSQL does not answer, hang up."""
        within = self._deadlines.cancel
        query.wait_on()
        try:
            async with asyncio.timeout(within):
                await pipe.cancel(within)
                answer = await query.answer
            self.unreplicated = pipe.committed_here
            return answer
        except errors.QueryCanceled:
            try:
                async with asyncio.timeout(within):
                    await self._roll_back(pipe)
            except (TimeoutError, psycopg.Error):
                self._break()
        except (TimeoutError, psycopg.Error, OSError):
            self._break()
        except BaseException:
            self._drop()
            raise
        return None

    def _break(self) -> None:
        for sibling in self._siblings:
            sibling._suspect = True
        self._drop()

    def _drop(self) -> None:
        """Hang up. PostgreSQL may not notice, so the place is taken until it says that it did."""
        pipe, self._pipe = self._pipe, None
        if pipe is None:
            return
        assert self._place is not None
        if pipe.is_lost:
            self._place.free()
        else:
            self._place.give_up()
        if pipe.is_asked and not pipe.is_lost:
            self._budget.see_off(pipe.see_off(self._deadlines.cancel))
        else:
            pipe.close()

    async def close(self) -> None:
        """Close the connection in good order: PostgreSQL notices at once."""
        async with self._turn:
            if self._pipe is not None and self._place is not None and not self._pipe.is_asked:
                self._place.free()
            self._drop()
        await self._budget.close()

"""One connection to PostgreSQL, as the daemon needs it: how it is opened, how long it is waited for, and what its silences mean.

A line is opened when it is first needed, and again after it broke. It carries one question at a time, each a transaction of its own and one
round trip. Deadlines follow the lease, on both ends: a silence is noticed, and a new connection tried, while the lease lasts. On arrival it
asks whether it is the server's own, or lent by a pooler for one transaction at a time; there nothing is prepared, and every transaction
brings its settings along. Whatever goes wrong with a connection is an `Outage`. What PostgreSQL answers but will not have, because of the values
given, is a `Refusal`.

A question goes through libpq's pipeline, and its answer is read by a reader of the connection's own: to a worker that was idle, psycopg's cursors
cost twice the time of such a round trip, being more code than the caches hold by then. Values and rows are adapted by psycopg.

Never here: what is asked (ledger), and when.
"""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeAlias
from uuid import UUID

import psycopg
from psycopg import errors, pq
from psycopg.abc import Buffer
from psycopg.adapt import Loader, PyFormat, Transformer
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq.abc import PGresult
from psycopg.rows import tuple_row
from psycopg.types.datetime import TimestamptzLoader

from . import statements

STATEMENT_DEADLINE = 15.0
"""Seconds, at most, after which an unanswered statement means that the connection is gone."""
CONNECT_DEADLINE = 10.0
CONNECT_LEAST = 2.0
"""Seconds that libpq gives a host at least."""
LOCK_PATIENCE = 1.0
"""Seconds, at most, a statement may wait for the application to end a transaction. Row locks are passed over and not waited for."""
LEVELS_MOST = 100
"""Values within values that are read from a JSON document: Python's own reader and writer stop at
some hundreds.
"""
DIGITS_MOST = 300
"""Digits of a whole number that a double can still stand for."""
EARLIEST, LATEST = datetime(1, 1, 2, tzinfo=UTC), datetime(9998, 1, 1, tzinfo=UTC)

_Step: TypeAlias = tuple[bytes, Sequence[Any]]
"""A statement with its values."""
_Plan: TypeAlias = tuple[bytes, tuple[int, ...]]
"""A statement with its values' types."""
_Prepared: TypeAlias = tuple[_Plan, bytes]
"""A plan and its name."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long PostgreSQL is waited for, in seconds."""

    statement: float = STATEMENT_DEADLINE
    connect: float = CONNECT_DEADLINE

    @classmethod
    def within(cls, lease: float) -> Deadlines:
        """A renewal is asked for at a third of the lease. Should it go unanswered there is time for a new connection and another one."""
        return cls(min(STATEMENT_DEADLINE, max(1.0, lease / 4)), min(CONNECT_DEADLINE, max(CONNECT_LEAST, lease / 4)))

    def connecting(self, dsn: str) -> float:
        """Until each of a DSN's hosts has been asked."""
        return max(self.connect, CONNECT_LEAST * _hosts(conninfo_to_dict(dsn)))


class Outage(Exception):
    """PostgreSQL does not answer, or not this connection. `reason` is for people; the caller tries again."""

    def __init__(self, reason: str, asked_at: float = math.inf, *, for_all: bool = False, timed_out: bool = False) -> None:
        """`asked_at`: monotonic instant of the question. `for_all`: nobody is let in, so nobody else can take a lease either.
        `timed_out`: the connection was there, and this statement was not done in time: it may be one of its rows."""
        super().__init__(reason)
        self.timed_out = timed_out
        self.reason = reason
        self.asked_at = asked_at
        self.for_all = for_all


class Refusal(Exception):
    """PostgreSQL answered, and will not run this statement with these values (or at all). Trying again changes nothing."""

    def __init__(self, reason: str, sqlstate: str | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sqlstate = sqlstate

    @property
    def of_a_row(self) -> bool:
        """Whether it is about a row's values (data, constraints, limits, what a trigger raised), and not about the statement."""
        return self.sqlstate is not None and self.sqlstate[:2] in ("22", "23", "44", "54", "P0")


def clamped(when: datetime) -> datetime:
    """`when`, or the nearest date that can still be reckoned with."""
    return when if EARLIEST.year < when.year < LATEST.year else min(LATEST, max(EARLIEST, when))


class Dates(TimestamptzLoader):
    """Dates as Python can hold them: those that it can't (infinite, before Christ, beyond the year 9998) as the nearest.

    In UTC, as Python's difference of two dates of one zone is that of its clocks on the wall.
    """

    def load(self, data: Buffer) -> datetime:
        text = bytes(data)
        if text.startswith(b"-") or text.endswith(b"BC"):
            return EARLIEST
        try:
            return clamped(super().load(data)).astimezone(UTC)
        except (errors.DataError, ValueError, OverflowError):
            return LATEST


def load_whatever_stands_there(
    conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any],
) -> None:
    """Have a connection read also what somebody may have written into a row by hand and Python has
    no value for.
    """
    conn.adapters.register_loader("timestamptz", Dates)
    for name in ("json", "jsonb"):
        conn.adapters.register_loader(name, Documents)


class Documents(Loader):
    """JSON. What Python, or a reader of our own `--json`, has no value for stays text: a document in
    which values are nested for more than LEVELS_MOST, a number that is no finite double.
    """

    def load(self, data: Buffer) -> Any:
        text = bytes(data).decode("utf-8", "backslashreplace")
        levels = most = 0
        for bracket in re.findall(r"[][{}]", text):
            levels += 1 if bracket in "[{" else -1
            most = max(most, levels)
        if most > LEVELS_MOST:
            return text
        return json.loads(text, parse_int=_whole, parse_float=_fraction)


def _whole(digits: str) -> int | str:
    return int(digits) if len(digits) <= DIGITS_MOST else digits


def _fraction(digits: str) -> float | str:
    number = float(digits)
    return number if math.isfinite(number) else digits


def connection_info(dsn: str, name: str, connect_within: float = CONNECT_DEADLINE) -> dict[str, Any]:
    """Keyword arguments for psycopg's connect: the DSN with our application_name and with keepalives that notice a dead peer.

    `connect_within`: seconds. Of several hosts the last one, too, is asked within them, should those before it be silent (but each gets
    two seconds); and the one that takes writes is meant, unless the DSN says otherwise: after a failover the first may be a standby.
    """
    given = conninfo_to_dict(dsn)
    hosts = _hosts(given)
    which = {"target_session_attrs": "read-write"} if hosts > 1 and not given.get("target_session_attrs") else {}
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
    a deadline is meant for a server that says nothing. PostgreSQL gives up by itself: see `arrive`.
    """

    async def cancel_safe(self, *, timeout: float = 0.0) -> None:
        with suppress(OSError), socket.socket(fileno=os.dup(self.pgconn.socket)) as same:
            same.shutdown(socket.SHUT_RDWR)


def _hosts(given: Mapping[str, Any]) -> int:
    return max(str(given.get(name) or "").count(",") + 1 for name in ("host", "hostaddr"))


def manners(seconds: float) -> dict[str, str]:
    """For how long PostgreSQL may wait, in its spelling: locks, a statement, and for us."""
    return {
        "lock": f"{min(LOCK_PATIENCE, seconds / 2) * 1000:.0f}", "statement": f"{seconds * 1000:.0f}",
        "idle": f"{math.ceil(seconds)}", "interval": f"{math.ceil(seconds / 3)}", "unheard": f"{seconds * 4 / 3 * 1000:.0f}",
    }  # fmt: skip


async def arrive(conn: psycopg.AsyncConnection[Any], seconds: float = STATEMENT_DEADLINE) -> bool:
    """The first question on a connection. Returns whether it is the server's own: then it has our settings from now on.

    `seconds`: the deadline of a statement; after twice that PostgreSQL, too, is rid of a connection whose peer has vanished, and of
    the locks that it held. False: a pooler stands in between, and what was set would stay behind for others.
    """
    cursor = psycopg.AsyncCursor(conn, row_factory=tuple_row)
    values = {"pid": conn.pgconn.backend_pid} | manners(seconds)
    question = statements.load("ledger")["arrive"].encode()
    try:
        await cursor.execute(question, values, prepare=False)
    except errors.QueryCanceled:
        # Until ours is set the account's own deadline holds, be it a millisecond. A second time PostgreSQL has it all in its caches.
        await cursor.execute(question, values, prepare=False)
    row = await cursor.fetchone()
    assert row is not None
    return bool(row[0])


def said(error: BaseException) -> str:
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
    if all(_REFUSED in attempt or (_MISSING in attempt and "/.s.PGSQL." in attempt) for attempt in attempts):
        return True
    # What a server said follows two blanks, and may be in any language. libpq's ping knows it by its code. It holds the whole process up, but
    # this server has just answered.
    if _hosts(conninfo_to_dict(dsn)) > 1 or ":  " not in attempts[-1]:
        return False
    return pq.PGconn.ping(make_conninfo(dsn, connect_timeout=int(CONNECT_LEAST)).encode()) == pq.Ping.REJECT


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


class Line:
    """One connection, opened when needed, one question at a time.

    Where one breaks its siblings open theirs anew before their next question: most often they broke too, and then the same outage would be
    told again.
    """

    def __init__(self, dsn: str, name: str, deadlines: Deadlines, siblings: list[Line], *, prepare: bool = True) -> None:
        """`prepare`: have PostgreSQL keep the plans of what is asked."""
        self._dsn = dsn
        self._info = connection_info(dsn, name, deadlines.connect)
        self._within = deadlines.statement
        self._connect_within = deadlines.connecting(dsn)
        self._prepare = prepare
        self._siblings = siblings
        self._siblings.append(self)
        self._suspect = False
        self._pipe: _Pipe | None = None
        self._lent = False
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

        Raises Outage, Refusal.
        """
        text, names = _numbered(statement)
        async with self._turn:
            asked_at = time.monotonic()
            try:
                # PostgreSQL itself gives a statement up a little before, where it is there.
                within = self._within * 16 / 15
                async with asyncio.timeout(within + (0.0 if self._is_open else self._connect_within)) as deadline:
                    if not self._is_open:
                        await self._connect()
                        deadline.reschedule(asyncio.get_running_loop().time() + within)
                    pipe = self._pipe
                    assert pipe is not None
                    wanted = (text, _given(names, values))
                    before: list[_Step] = self._borrowed if self._lent else []
                    if after is not None:
                        first, its = (after, {}) if isinstance(after, str) else after
                        first_text, first_names = _numbered(first)
                        before = [*before, (first_text, _given(first_names, its))]
                    question = pipe.ask(before, wanted, [(b"commit", ())] if self._lent else [], self._prepare and not self._lent)
                    try:
                        answer = await question.answer
                    except psycopg.Error:
                        await self._roll_back(pipe)
                        raise
                    return pipe.load(answer, as_)
            except TimeoutError:
                was_open = self._pipe is not None
                self._break()
                raise Outage("no answer within the deadline", asked_at, timed_out=was_open) from None
            except psycopg.Error as error:
                if _is_refusal(error):
                    raise Refusal(said(error), error.sqlstate) from error
                for_all = self._pipe is None and takes_nobody(error, self._dsn)
                timed_out = isinstance(error, errors.QueryCanceled)
                self._break()
                raise Outage(said(error), asked_at, for_all=for_all, timed_out=timed_out) from error
            except (UnicodeDecodeError, UnicodeEncodeError) as error:
                self._drop()
                raise Refusal(f"a text that is not UTF-8: {error.reason}", errors.CharacterNotInRepertoire.sqlstate) from error
            except OSError as error:
                self._break()
                raise Outage(said(error), asked_at) from error
            except BaseException:
                # Cancelled in mid-question: what the connection would say next belongs to nobody.
                self._drop()
                raise

    @property
    def _borrowed(self) -> list[_Step]:
        """What a transaction begins with where nothing may stay behind."""
        text, names = _numbered(statements.load("ledger")["manners"])
        given = manners(self._within)
        return [(b"begin isolation level read committed", ()), (text, [given[name] for name in names])]

    async def _roll_back(self, pipe: _Pipe) -> None:
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
            self._lent = not await arrive(conn, self._within)
        except BaseException:
            conn.pgconn.finish()
            raise
        self._pipe = _Pipe(conn)

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


class _Question:
    """What was asked in one transaction and has not been answered whole."""

    def __init__(self, place: int, prepared: _Prepared | None) -> None:
        """`place`: which of the results is wanted, counted from 0. `prepared`: what the first one says of having been prepared."""
        self.answer: asyncio.Future[PGresult] = asyncio.get_running_loop().create_future()
        """When the transaction has ended. Raises psycopg.Error."""
        self.prepared = prepared
        self._place = place
        self._results = 0
        self._wanted: PGresult | None = None
        self._error: psycopg.Error | None = None

    def take(self, result: PGresult) -> bool:
        """One result more. Returns whether it was the last one."""
        match result.status:
            case pq.ExecStatus.PIPELINE_SYNC:
                if self._error is None and self._wanted is not None and not self.answer.done():
                    self.answer.set_result(self._wanted)
                else:
                    self.fail(psycopg.InternalError("an answer without its result"))
                return True
            case pq.ExecStatus.FATAL_ERROR:
                # One without a code is libpq's own: the connection is lost.
                coded = result.error_field(pq.DiagnosticField.SQLSTATE) is not None
                error = errors.error_from_result(result) if coded else psycopg.OperationalError(result.get_error_message())
                self._error = self._error or error
            case pq.ExecStatus.PIPELINE_ABORTED:
                pass
            case _:
                if self._results == self._place:
                    self._wanted = result
                self._results += 1
        return False

    def fail(self, error: psycopg.Error) -> None:
        """The transaction was refused, or the connection is lost; what PostgreSQL said before that says more."""
        if not self.answer.done():
            self.answer.set_exception(self._error or error)


class _Pipe:
    """An open connection in pipeline mode: what is asked leaves in one write, and its answers are read as they come."""

    def __init__(self, conn: psycopg.AsyncConnection[Any]) -> None:
        """`conn`: nobody else's from now on. It may be lent by a pooler."""
        self._conn = conn
        self._pg = conn.pgconn
        self._adapt = Transformer(conn)
        self._prepared: dict[_Plan, bytes] = {}
        self._asked: _Question | None = None
        self._lost: psycopg.Error | None = None
        self._loop = asyncio.get_running_loop()
        self._socket = self._pg.socket
        """Remembered, as libpq closes it when the server has."""
        self._pg.enter_pipeline_mode()
        self._loop.add_reader(self._socket, self._read)

    @property
    def is_in_error(self) -> bool:
        """Whether a transaction waits to be rolled back."""
        return self._pg.transaction_status == pq.TransactionStatus.INERROR

    def ask(self, before: Sequence[_Step], wanted: _Step, behind: Sequence[_Step], prepare: bool) -> _Question:
        """Send these statements, one transaction; the rows are those of `wanted`. Raises psycopg.Error where that can't be sent."""
        if self._lost is not None:
            raise self._lost
        pg, text = self._pg, wanted[0]
        # Whatever can't be adapted is found before anything is sent.
        adapted = [(step, *self._adapted(values)) for step, values in (*before, wanted, *behind)]
        plan = text, adapted[len(before)][2]
        name = self._prepared.get(plan) if prepare else None
        fresh = prepare and name is None
        if fresh:
            name = b"recall_worker_%d" % len(self._prepared)
            pg.send_prepare(name, text, plan[1])
        self._asked = question = _Question(len(before) + fresh, (plan, name) if fresh and name is not None else None)
        for place, (step, given, types, formats) in enumerate(adapted):
            if place == len(before) and name is not None:
                pg.send_query_prepared(name, given, formats)
            else:
                pg.send_query_params(step, given, types, formats)
        pg.pipeline_sync()
        if pg.flush():
            self._loop.add_writer(self._socket, self._flush)
        return question

    def _adapted(self, values: Sequence[Any]) -> tuple[Sequence[Buffer | None], tuple[int, ...], Sequence[pq.Format]]:
        given = self._adapt.dump_sequence(values, [PyFormat.AUTO] * len(values))
        return given, self._adapt.types or (), self._adapt.formats or ()

    def load(self, result: PGresult, as_: type[dict[str, Any]] | type[tuple[Any, ...]]) -> list[Any]:
        """The rows of a result, none where it has no columns."""
        try:
            return self._rows(result, as_)
        except errors.DataError:
            # A date that psycopg can't load. Most tables have none, so it is only from the first one on that each is looked at more closely.
            self._conn.adapters.register_loader("timestamptz", Dates)
            self._adapt = Transformer(self._conn)
            return self._rows(result, as_)

    def _rows(self, result: PGresult, as_: type[dict[str, Any]] | type[tuple[Any, ...]]) -> list[Any]:
        self._adapt.set_pgresult(result)
        if as_ is tuple:
            return self._adapt.load_rows(0, result.ntuples, tuple)
        names = [(result.fname(column) or b"").decode() for column in range(result.nfields)]
        return self._adapt.load_rows(0, result.ntuples, lambda row: dict(zip(names, row, strict=True)))

    def _flush(self) -> None:
        """Send what the kernel did not take before."""
        try:
            left = self._pg.flush()
        except psycopg.Error:
            left = 0  # The reader finds out, too.
        if not left:
            self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        lost: psycopg.Error | None = None
        try:
            self._pg.consume_input()
        except psycopg.Error as error:
            lost = error
        # The results of each statement end with None; after two there is nothing more for now.
        nones = 0
        while self._asked is not None and nones < 2 and not self._pg.is_busy():
            result = self._pg.get_result()
            if result is None:
                nones += 1
                continue
            nones = 0
            question = self._asked
            if question.prepared is not None:
                plan, name = question.prepared
                question.prepared = None
                if result.status == pq.ExecStatus.COMMAND_OK:
                    self._prepared[plan] = name
            if question.take(result):
                self._asked = None
        if lost is not None:
            self._hang_up()
            self._lost = lost
            if self._asked is not None:
                self._asked.fail(lost)

    def _hang_up(self) -> None:
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)

    def close(self) -> None:
        """At once: it never waits for a peer that is gone."""
        if self._lost is None:
            self._hang_up()
        self._pg.finish()


@cache
def _numbered(statement: str) -> tuple[bytes, tuple[str, ...]]:
    """A statement with `$1`, `$2` … in place of its named parameters, and those names in order. psycopg would take a statement as long as
    ours apart each time that it is run."""
    numbers: dict[str, int] = {}
    text = re.sub(r"%\((\w+)\)s", lambda found: f"${numbers.setdefault(found[1], len(numbers) + 1)}", statement)
    return text.replace("%%", "%").encode(), tuple(numbers)


def _given(names: Sequence[str], values: Mapping[str, Any]) -> list[Any]:
    """A statement's values in order."""
    return [_array(value) if isinstance(value := values[name], list) else value for name in names]


def _array(values: Sequence[Any]) -> str:
    """A list as PostgreSQL reads an array; of what, the statement says. psycopg's own way finds out for each element how to write it, which
    costs a settle more than all the rest of it."""
    return "{" + ",".join([_WRITTEN[type(value)](value) for value in values]) + "}"


def _quoted(value: object) -> str:
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


_WRITTEN: Mapping[type, Callable[[Any], str]] = {
    type(None): lambda _: "null", bool: str, int: str, float: repr, str: _quoted, UUID: str, datetime: _quoted,
}  # fmt: skip

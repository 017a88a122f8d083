"""One open connection in libpq's pipeline mode: one write per transaction, answers read as they
come.

In a worker that was idle, psycopg's cursors take twice the time of such a round trip: they are more
code than the CPU's caches still hold by then. psycopg still adapts the values and rows.

Never here: when a connection is opened, how long we wait for it, and what silence means
(connection).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache
from typing import Any, TypeAlias
from uuid import UUID

import psycopg
from psycopg import errors, pq
from psycopg.abc import Buffer
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq.abc import PGresult

from .values import Dates

Step: TypeAlias = tuple[bytes, Sequence[Any]]
"""A statement with its values."""
_Plan: TypeAlias = tuple[bytes, tuple[int, ...]]
"""A statement with its values' types."""
_Prepared: TypeAlias = tuple[_Plan, bytes]
"""A plan and its name."""


class PendingQuery:
    """The statements of one transaction whose answer is not complete yet."""

    def __init__(self, place: int, prepared: _Prepared | None, farewell: Farewell) -> None:
        """`place`: which of the results is wanted, counted from 0. `prepared`: the plan that the
        first result confirms, if one is being prepared. `farewell`: of its connection."""
        self.answer: asyncio.Future[PGresult] = asyncio.get_running_loop().create_future()
        """Done when the transaction has ended. Raises psycopg.Error."""
        self.prepared = prepared
        self._place = place
        self._farewell = farewell
        self._results = 0
        self._wanted: PGresult | None = None
        self._error: psycopg.Error | None = None

    def wait_on(self) -> None:
        """Take the answer although a deadline has cancelled those who waited for it: they wait
        again."""
        if self.answer.cancelled():
            self.answer = asyncio.get_running_loop().create_future()

    def take(self, result: PGresult) -> bool:
        """Add one result. Returns whether it was the last one."""
        match result.status:
            case pq.ExecStatus.PIPELINE_SYNC:
                if self._error is None and self._wanted is not None and not self.answer.done():
                    self.answer.set_result(self._wanted)
                else:
                    self.fail(psycopg.InternalError("an answer without its result"))
                return True
            case pq.ExecStatus.FATAL_ERROR:
                # An error without a code comes from libpq itself: the connection is lost.
                coded = result.error_field(pq.DiagnosticField.SQLSTATE) is not None
                error = (
                    errors.error_from_result(result)
                    if coded
                    else self._farewell.instead_of(
                        psycopg.OperationalError(result.get_error_message())
                    )
                )
                self._error = self._error or error
            case pq.ExecStatus.PIPELINE_ABORTED:
                pass
            case _:
                if self._results == self._place:
                    self._wanted = result
                self._results += 1
        return False

    def fail(self, error: psycopg.Error) -> None:
        """The transaction was refused, or the connection is lost. PostgreSQL's first error is
        raised instead where there was one: it says more."""
        if not self.answer.done():
            self.answer.set_exception(self._error or error)


class Farewell:
    """What PostgreSQL said as it closed an idle connection: that it shuts down, that somebody
    ended the connection, a timeout.

    libpq hands this over as a notice. What it reports afterwards is only that the connection is
    closed.
    """

    def __init__(self, conn: psycopg.AsyncConnection[Any]) -> None:
        self._error: psycopg.Error | None = None
        conn.add_notice_handler(self._take)

    def _take(self, notice: errors.Diagnostic) -> None:
        if notice.severity_nonlocalized in ("FATAL", "PANIC") and notice.sqlstate is not None:
            try:
                kind = errors.lookup(notice.sqlstate)
            except KeyError:
                kind = psycopg.OperationalError
            self._error = kind(notice.message_primary or notice.sqlstate)

    def instead_of(self, error: psycopg.Error) -> psycopg.Error:
        """The server's own reason, or this error where it gave none."""
        return self._error or error


class PipelineConnection:
    """An open connection in pipeline mode: each transaction is sent in one write, and its answers
    are read as they come."""

    def __init__(self, conn: psycopg.AsyncConnection[Any]) -> None:
        """`conn`: used by nobody else from now on. It may be pooled."""
        self._conn = conn
        self._pg = conn.pgconn
        self._farewell = Farewell(conn)
        # The connection's adapters without the connection: psycopg would ask that for DateStyle and
        # TimeZone. They are always the same (`setup`), but a pooled connection reports its own
        # again once the transaction has ended.
        self._adapt = Transformer(conn.adapters)
        self._prepared: dict[_Plan, bytes] = {}
        self._asked: PendingQuery | None = None
        self._lost: psycopg.Error | None = None
        self.committed_here = False
        """Whether the last transaction was cancelled while its commit waited for a synchronous
        standby: then it is committed on this server, and perhaps on no other."""
        conn.add_notice_handler(self._note)
        self._loop = asyncio.get_running_loop()
        self._socket = self._pg.socket
        """Remembered, as libpq closes it when the server does."""
        self._pg.enter_pipeline_mode()
        self._loop.add_reader(self._socket, self._read)

    @property
    def is_in_error(self) -> bool:
        """Whether a transaction waits to be rolled back."""
        return self._pg.transaction_status == pq.TransactionStatus.INERROR

    @property
    def is_lost(self) -> bool:
        """Whether PostgreSQL has closed it."""
        return self._lost is not None

    @property
    def is_asked(self) -> bool:
        """Whether the answer of any query is not complete yet."""
        return self._asked is not None

    def waits_for(self, query: PendingQuery | None) -> bool:
        """Whether this query's answer is not complete yet."""
        return query is not None and self._asked is query

    async def cancel(self, within: float) -> None:
        """Have PostgreSQL cancel what it does for us: by a request on a connection of its own, as
        this one is busy. Returns when PostgreSQL has it. Raises psycopg.Error."""
        await psycopg.AsyncConnection.cancel_safe(self._conn, timeout=within)

    async def see_off(self, within: float) -> None:
        """Have the query cancelled whose answer nobody waits for, and close."""
        with suppress(psycopg.Error, OSError):
            await self.cancel(within)
        self.close()

    def _note(self, notice: errors.Diagnostic) -> None:
        # By the name of PostgreSQL's function, as the text may be in any language.
        if notice.source_function == "SyncRepWaitForLSN":
            self.committed_here = True

    def ask(
        self, before: Sequence[Step], wanted: Step, behind: Sequence[Step], prepare: bool
    ) -> PendingQuery:
        """Send these statements as one transaction; the rows are those of `wanted`. Raises
        psycopg.Error where they can't be sent."""
        if self._lost is not None:
            raise self._lost
        pg, text, self.committed_here = self._pg, wanted[0], False
        # A value that can't be adapted is found before anything is sent.
        adapted = [(step, *self._adapted(values)) for step, values in (*before, wanted, *behind)]
        plan = text, adapted[len(before)][2]
        name = self._prepared.get(plan) if prepare else None
        fresh = prepare and name is None
        if fresh:
            name = b"recall_worker_%d" % len(self._prepared)
            pg.send_prepare(name, text, plan[1])
        self._asked = query = PendingQuery(
            len(before) + fresh,
            (plan, name) if fresh and name is not None else None,
            self._farewell,
        )
        for place, (step, given, types, formats) in enumerate(adapted):
            if place == len(before) and name is not None:
                pg.send_query_prepared(name, given, formats)
            else:
                pg.send_query_params(step, given, types, formats)
        pg.pipeline_sync()
        if pg.flush():
            self._loop.add_writer(self._socket, self._flush)
        return query

    def _adapted(
        self, values: Sequence[Any]
    ) -> tuple[Sequence[Buffer | None], tuple[int, ...], Sequence[pq.Format]]:
        given = self._adapt.dump_sequence(values, [PyFormat.AUTO] * len(values))
        return given, self._adapt.types or (), self._adapt.formats or ()

    def load(
        self, result: PGresult, as_: type[dict[str, Any]] | type[tuple[Any, ...]]
    ) -> list[Any]:
        """The rows of a result, none where it has no columns."""
        try:
            return self._rows(result, as_)
        except errors.DataError:
            # A date that psycopg can't load. Most tables have none, so the slower loader is used
            # only from the first one on.
            self._conn.adapters.register_loader("timestamptz", Dates)
            self._adapt = Transformer(self._conn.adapters)
            return self._rows(result, as_)

    def _rows(
        self, result: PGresult, as_: type[dict[str, Any]] | type[tuple[Any, ...]]
    ) -> list[Any]:
        self._adapt.set_pgresult(result)
        if as_ is tuple:
            return self._adapt.load_rows(0, result.ntuples, tuple)
        names = [(result.fname(column) or b"").decode() for column in range(result.nfields)]
        return self._adapt.load_rows(
            0, result.ntuples, lambda row: dict(zip(names, row, strict=True))
        )

    def _flush(self) -> None:
        """Send what the kernel did not accept before."""
        try:
            left = self._pg.flush()
        except psycopg.Error:
            left = 0  # The reader notices the error, too.
        if not left:
            self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        broken: psycopg.Error | None = None
        try:
            self._pg.consume_input()
        except psycopg.Error as error:
            broken = error
        if self._asked is None:
            self._pg.is_busy()  # Has libpq parse what came: a farewell is lost with the connection.
        # None ends the results of each statement; two in a row mean that there is no more for now.
        nones = 0
        while self._asked is not None and nones < 2 and not self._pg.is_busy():
            result = self._pg.get_result()
            if result is None:
                nones += 1
                continue
            nones = 0
            query = self._asked
            if query.prepared is not None:
                plan, name = query.prepared
                query.prepared = None
                if result.status == pq.ExecStatus.COMMAND_OK:
                    self._prepared[plan] = name
            if query.take(result):
                self._asked = None
        if broken is not None:
            # Not before what came with it was parsed: a farewell may be in it.
            lost = self._farewell.instead_of(broken)
            self._stop_watching()
            self._lost = lost
            if self._asked is not None:
                self._asked.fail(lost)

    def _stop_watching(self) -> None:
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)

    def close(self) -> None:
        """Close at once: this never waits for a peer that is gone."""
        if self._lost is None:
            self._stop_watching()
        self._pg.finish()


@cache
def numbered(statement: str) -> tuple[bytes, tuple[str, ...]]:
    """A statement with `$1`, `$2` … in place of its named parameters, and those names in order.
    Cached: psycopg would parse statements as long as ours at every run."""
    numbers: dict[str, int] = {}
    text = re.sub(
        r"%\((\w+)\)s",
        lambda found: f"${numbers.setdefault(found[1], len(numbers) + 1)}",
        statement,
    )
    return text.replace("%%", "%").encode(), tuple(numbers)


def given_in_order(names: Sequence[str], values: Mapping[str, Any]) -> list[Any]:
    """A statement's values in order."""
    return [_array(value) if isinstance(value := values[name], list) else value for name in names]


def _array(values: Sequence[Any]) -> str:
    """A list in PostgreSQL's notation of an array; the statement names its type. psycopg would find
    out for each element how to write it, which costs more than the rest of a settle."""
    return "{" + ",".join([_WRITTEN[type(value)](value) for value in values]) + "}"


def _quoted(value: object) -> str:
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


_WRITTEN: Mapping[type, Callable[[Any], str]] = {
    type(None): lambda _: "null",
    bool: str,
    int: str,
    float: repr,
    str: _quoted,
    UUID: str,
    datetime: _quoted,
}

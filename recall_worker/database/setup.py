"""What every connection is set to before its first statement, and where the table is.

Our statements, and what reads their answers, depend on settings that a database or a role may have
otherwise: DateStyle, TimeZone, IntervalStyle, isolation, search_path … (`settings` in sql/setup.sql
lists them). Everybody who opens a connection sets them here. A connection that is ours alone has
them for good; on a pooled one (lent by a pooler for one transaction at a time), and on the
application's own, they hold for one transaction, so nothing stays behind.

The schema that has session_recalls is RECALL_SCHEMA, or the one that the role's search_path finds.

Never here: how a connection is opened, and the daemon's deadlines (connection); how the
application's own connections are set (borrowed).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import psycopg
from psycopg import IsolationLevel, errors
from psycopg.pq import TransactionStatus
from psycopg.rows import Row, dict_row, tuple_row

from .. import statements

STATEMENT, LOCK = 600.0, 30.0
"""Seconds, at most, that a statement of a command may take, and wait for a lock."""
FIRST_TRIES = 5
"""How often the first statement is tried where the role's own deadline cuts it off."""


def settings() -> bytes:
    """The statement that sets what our statements depend on; it returns the schema that has
    session_recalls, or null where none is found."""
    return statements.load("setup")["settings"].encode()


def values(
    schema: str | None, *, local: bool | None, alone: bool = False, pid: int | None = None
) -> dict[str, Any]:
    """Its values. `schema`: RECALL_SCHEMA. `local`: for the transaction only; None: where the
    backend is another one than `pid`. `alone`: without the other schemas of the role's
    search_path."""
    return {"schema": schema, "local": local, "alone": alone, "pid": pid}


# --- where the table is ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Absence:
    """Why session_recalls is not where it is looked for, and what to do."""

    reason: str
    hint: str


def elsewhere(conn: psycopg.Connection[Any]) -> list[str]:
    """The schemas that have a table session_recalls, but for the one that the search_path finds:
    their names, unquoted, in order. Also those that the role may not use."""
    schemas: list[str] = _look(conn, None)["schemas"]
    return schemas


def absence(conn: psycopg.Connection[Any], schema: str | None) -> Absence | None:
    """Why the table is not found. None where it is, or where no schema has one and `migrate` may
    create it."""
    return absence_of(_look(conn, schema), schema)


def absence_of(row: Mapping[str, Any], schema: str | None) -> Absence | None:
    """The same, from the row of the statement `elsewhere`."""
    if row["found"]:
        return None
    forbidden = [name for name in row["schemas"] if name in row["forbidden"]]
    if schema in forbidden or (schema is None and forbidden and forbidden == row["schemas"]):
        name = forbidden[0] if schema is None else schema
        return Absence(
            f"{row['role']} may not use the schema {name}, which has the table session_recalls",
            f"grant usage on schema {identifier(name)} to {identifier(row['role'])}",
        )
    there = " and ".join(row["schemas"])
    there = f"there is one in the schema {there}" if there else ""
    name_it = " or ".join(f"RECALL_SCHEMA={shlex.quote(name)}" for name in row["schemas"])
    if schema is None:
        return (
            Absence(
                f"the search_path of {row['role']} finds no table session_recalls; {there}", name_it
            )
            if there
            else None
        )
    if there:
        return Absence(f"RECALL_SCHEMA is {schema!r}: no session_recalls there; {there}", name_it)
    if row["schema_exists"]:
        return None
    return Absence(
        f"RECALL_SCHEMA is {schema!r}, and the database has no such schema",
        f"create schema {identifier(schema)}; or without RECALL_SCHEMA, by the search_path",
    )


def identifier(name: str) -> str:
    """A name as SQL has it: quoted where it must be."""
    plain = re.fullmatch(r"[a-z_][a-z0-9_]*", name)
    return name if plain else '"' + name.replace('"', '""') + '"'


def _look(conn: psycopg.Connection[Any], schema: str | None) -> dict[str, Any]:
    cursor = psycopg.Cursor(conn, row_factory=dict_row)
    cursor.execute(_sql("elsewhere"), {"schema": schema}, prepare=False)
    row = cursor.fetchone()
    assert row is not None
    return row


# --- the connections of commands ------------------------------------------------------------------


class CommandConnection(psycopg.Connection[Row]):
    """A connection in autocommit that has our settings; where it is pooled, in each transaction."""

    schema: str | None = None
    """RECALL_SCHEMA."""
    pooled = False
    """Whether the connection is a pooler's."""
    _patience: float | None = None
    _alone = False
    _place: str | None = None

    def set_up(self, schema: str | None, patience: float | None = None) -> None:
        """Run the first statements. `patience`: seconds that a statement may take (STATEMENT)."""
        self.schema, self._patience = schema, patience
        for tries_left in reversed(range(FIRST_TRIES)):
            try:
                direct = self._set_patience()
                break
            except errors.QueryCanceled:
                # The role's own deadline holds until ours is set, even if it is one millisecond.
                # The next try is faster: PostgreSQL has everything in its caches.
                if not tries_left:
                    raise
        if direct:
            self._set(local=False)
            return
        self.pooled, self.isolation_level = True, IsolationLevel.READ_COMMITTED
        self.cursor_factory = CommandCursor

    def stay_in(self, schema: str) -> None:
        """Find tables in this schema only from now on, whether it has session_recalls or not."""
        self.schema, self._alone = schema, True
        if not self.pooled:
            self._set(local=False)

    def find(self) -> str | None:
        """The schema that has session_recalls; None where none is found."""
        if self.pooled:
            with self.transaction():
                pass
        return self._place

    @contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Iterator[psycopg.Transaction]:
        """As psycopg's, with our settings."""
        begins = self.info.transaction_status == TransactionStatus.IDLE
        with super().transaction(savepoint_name, force_rollback) as transaction:
            if self.pooled and begins:
                self._set_patience()
                self._set(local=True)
            yield transaction

    def _set_patience(self) -> bool:
        cursor = psycopg.Cursor(self, row_factory=tuple_row)
        of = _patience(self.pgconn.backend_pid, self._patience)
        cursor.execute(_sql("patience"), of, prepare=False)
        return bool(_first(cursor.fetchone()))

    def _set(self, *, local: bool) -> None:
        cursor = psycopg.Cursor(self, row_factory=tuple_row)
        given = values(self.schema, local=local, alone=self._alone)
        cursor.execute(settings(), given, prepare=False)
        self._place = _first(cursor.fetchone())


class CommandCursor(psycopg.Cursor[Row]):
    """On a pooled connection: a statement outside of a transaction has one of its own, with our
    settings."""

    def execute(self, query: Any, *values: Any, **more: Any) -> Self:
        """As psycopg's."""
        if self.connection.info.transaction_status != TransactionStatus.IDLE:
            return super().execute(query, *values, **more)
        with self.connection.transaction():
            return super().execute(query, *values, **more)


class AsyncCommandConnection(psycopg.AsyncConnection[Row]):
    """The same for a command that waits for several things at once."""

    schema: str | None = None
    """RECALL_SCHEMA."""
    pooled = False
    """Whether the connection is a pooler's."""

    async def set_up(self, schema: str | None) -> None:
        """Run the first statements."""
        self.schema = schema
        for tries_left in reversed(range(FIRST_TRIES)):
            try:
                direct = await self._set_patience()
                break
            except errors.QueryCanceled:
                if not tries_left:
                    raise
        if direct:
            await self._set(local=False)
            return
        self.pooled = True
        await self.set_isolation_level(IsolationLevel.READ_COMMITTED)
        self.cursor_factory = AsyncCommandCursor

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[psycopg.AsyncTransaction]:
        """As psycopg's, with our settings."""
        begins = self.info.transaction_status == TransactionStatus.IDLE
        async with super().transaction(savepoint_name, force_rollback) as transaction:
            if self.pooled and begins:
                await self._set_patience()
                await self._set(local=True)
            yield transaction

    async def _set_patience(self) -> bool:
        cursor = psycopg.AsyncCursor(self, row_factory=tuple_row)
        await cursor.execute(_sql("patience"), _patience(self.pgconn.backend_pid), prepare=False)
        return bool(_first(await cursor.fetchone()))

    async def _set(self, *, local: bool) -> None:
        cursor = psycopg.AsyncCursor(self, row_factory=tuple_row)
        await cursor.execute(settings(), values(self.schema, local=local), prepare=False)


class AsyncCommandCursor(psycopg.AsyncCursor[Row]):
    """As CommandCursor."""

    async def execute(self, query: Any, *values: Any, **more: Any) -> Self:
        """As psycopg's."""
        if self.connection.info.transaction_status != TransactionStatus.IDLE:
            return await super().execute(query, *values, **more)
        async with self.connection.transaction():
            return await super().execute(query, *values, **more)


def _patience(pid: int, seconds: float | None = None) -> dict[str, Any]:
    return {
        "pid": pid,
        "statement": f"{(STATEMENT if seconds is None else seconds) * 1000:.0f}",
        "lock": f"{LOCK * 1000:.0f}",
    }


def _first(row: tuple[Any, ...] | None) -> Any:
    assert row is not None
    return row[0]


def _statements() -> dict[str, str]:
    return statements.load("setup")


def _sql(name: str) -> bytes:
    return _statements()[name].encode()

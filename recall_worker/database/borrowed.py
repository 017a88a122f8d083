"""The application's own connections: what `Recalls` sets on one while a statement of its runs, and
puts back afterwards. What is set there, and why: setup.

Never here: how a connection is opened; commands' and the worker's own connections (setup).

borrowed_sync has the same for psycopg's synchronous connections; `python -m tests.unasync` writes
it from this file.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg import IsolationLevel
from psycopg.adapt import AdaptersMap
from psycopg.postgres import register_default_adapters
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from .. import statements
from .values import register_loaders


class BorrowedCursor(psycopg.AsyncCursor[dict[str, Any]]):
    """A cursor of ours on a connection of the application's, which may have made it return other
    rows, cursors and types than psycopg does by itself."""

    def __init__(self, conn: psycopg.AsyncConnection[Any]) -> None:
        super().__init__(conn, row_factory=dict_row)

    @property
    def adapters(self) -> AdaptersMap:
        """psycopg's own types, but for dates, of which Python does not have all."""
        return _ADAPTERS

    async def ask(self, statement: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows of a statement. Never prepared: a transaction pooler in between may run the next
        one on another connection."""
        await self.execute(statement.encode(), values, prepare=False)
        return await self.fetchall()


_ADAPTERS = AdaptersMap(types=psycopg.adapters.types)
register_default_adapters(_ADAPTERS)
register_loaders(_ADAPTERS)

_READ_BY = {"DateStyle": "ISO", "IntervalStyle": "postgres", "client_encoding": "UTF8"}
"""What PostgreSQL reports of a connection, and how it has to begin for its answers to be read."""


@asynccontextmanager
async def borrowed(
    conn: psycopg.AsyncConnection[Any], schema: str | None, *, ours: bool
) -> AsyncIterator[None]:
    """Within a transaction (or savepoint) on the application's connection: what our statement
    depends on is set while the block runs. Where the block raises, the savepoint has to be rolled
    back, and with it what was set here.

    `schema`: RECALL_SCHEMA. `ours`: the transaction ends with the block, and with it what was set.
    Two more round trips at most, and none where the connection fits as it is.
    """
    fits = schema is None and all(
        (conn.info.parameter_status(name) or "").startswith(value)
        for name, value in _READ_BY.items()
    )
    if fits:
        yield
        return
    [before] = await BorrowedCursor(conn).ask(_sql("borrow"), {"schema": schema})
    yield
    if not ours:
        await BorrowedCursor(conn).ask(_sql("give_back"), before)


@asynccontextmanager
async def read_committed(conn: psycopg.AsyncConnection[Any]) -> AsyncIterator[None]:
    """The transactions that begin within the block, on a connection without an open one, are read
    committed: what our statements are made for. Afterwards the connection is as it was."""
    before = conn.isolation_level
    await conn.set_isolation_level(IsolationLevel.READ_COMMITTED)
    try:
        yield
    finally:
        if conn.info.transaction_status == TransactionStatus.IDLE:
            await conn.set_isolation_level(before)


def _sql(name: str) -> str:
    return statements.load("setup")[name]

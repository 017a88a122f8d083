"""Written by `python -m tests.unasync` from borrowed.py: not to be edited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import IsolationLevel
from psycopg.adapt import AdaptersMap
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from .borrowed import _ADAPTERS, _READ_BY, _sql


class BorrowedCursor(psycopg.Cursor[dict[str, Any]]):
    """A cursor of ours on a connection of the application's, which may have made it return other
    rows, cursors and types than psycopg does by itself."""

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        super().__init__(conn, row_factory=dict_row)

    @property
    def adapters(self) -> AdaptersMap:
        """psycopg's own types, but for dates, of which Python does not have all."""
        return _ADAPTERS

    def ask(self, statement: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows of a statement. Never prepared: a transaction pooler in between may run the next
        one on another connection."""
        self.execute(statement.encode(), values, prepare=False)
        return self.fetchall()


@contextmanager
def borrowed(conn: psycopg.Connection[Any], schema: str | None, *, ours: bool) -> Iterator[None]:
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
    [before] = BorrowedCursor(conn).ask(_sql("borrow"), {"schema": schema})
    yield
    if not ours:
        BorrowedCursor(conn).ask(_sql("give_back"), before)


@contextmanager
def read_committed(conn: psycopg.Connection[Any]) -> Iterator[None]:
    """The transactions that begin within the block, on a connection without an open one, are read
    committed: what our statements are made for. Afterwards the connection is as it was."""
    before = conn.isolation_level
    conn.set_isolation_level(IsolationLevel.READ_COMMITTED)
    try:
        yield
    finally:
        if conn.info.transaction_status == TransactionStatus.IDLE:
            conn.set_isolation_level(before)

"""A connection for people's questions and actions: our settings, dates of any year, rows that say
what is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import dict_row

from ..database.connection import CONNECT_DEADLINE, connection_info
from ..database.setup import CommandConnection, absence
from ..database.values import is_unencoded, load_whatever_stands_there
from ..terminal import Trouble

Connection = psycopg.Connection[dict[str, Any]]


def opened(
    dsn: str,
    name: str,
    schema: str | None,
    *,
    patience: float | None = None,
    connect_within: float = CONNECT_DEADLINE,
) -> CommandConnection[dict[str, Any]]:
    """A connection to the database that has the table. `name`: of the program, for
    pg_stat_activity; `schema`: RECALL_SCHEMA; `patience`: seconds that a statement may take, None:
    as a command's. Raises Trouble where the table is elsewhere, and psycopg's errors."""
    # Where Ctrl-C breaks off a statement, psycopg would tell the terminal that it could not roll it
    # back: the connection is closed, and PostgreSQL does.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    conn = CommandConnection[dict[str, Any]].connect(
        **connection_info(dsn, name, connect_within),
        row_factory=dict_row,
        # A transaction pooler may stand in between, and pass the next statement to another
        # connection.
        prepare_threshold=None,
    )
    try:
        conn.set_up(schema, patience)
        if conn.find() is None and (absent := absence(conn, schema)) is not None:
            raise Trouble(absent.reason, absent.hint)
        load_whatever_stands_there(conn)
        if not conn.pooled and is_unencoded(conn):
            conn.execute("set client_encoding = 'SQL_ASCII'")
    except BaseException:
        conn.close()
        raise
    conn.row_factory = _rows
    return conn


def clock(conn: Connection) -> datetime:
    """PostgreSQL's clock."""
    row = conn.execute("select now() as now").fetchone()
    assert row is not None
    now: datetime = row["now"]
    return now


class Damaged(Trouble):
    """The schema is not as released."""


class Row(dict[str, Any]):
    """A row whose columns are those of the schema as released. `select *` has fewer where somebody
    dropped one: then the command says what is missing."""

    def __missing__(self, column: str) -> Any:
        raise Damaged(
            f"the schema is not as recall-worker made it: column {column} is missing",
            "recall-worker migrate (recall-worker doctor names what is missing)",
        )


def _rows(cursor: psycopg.Cursor[Any]) -> Callable[[Sequence[Any]], Row]:
    made = dict_row(cursor)
    return lambda values: Row(made(values))

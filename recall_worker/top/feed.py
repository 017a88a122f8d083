"""Where the pictures come from: one connection to PostgreSQL that is asked a look at a time, and
that hears the workers' notifications.

A look is one round trip: all statements in one transaction that only reads, of one snapshot. The
connection also listens, so that a look can follow at once when something was scheduled. Where it
leads through a transaction pooler, which LISTEN does not pass, RECALL_LISTEN_DSN has a connection
of its own for that; without one there are only the regular looks. A connection that breaks is
dropped, and the next look opens another.

Failures are remembered: each look asks only for what ended since the one before.

Never here: when to look (screen), and what the answers mean (picture).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import psycopg
from psycopg.rows import dict_row

from .. import statements
from ..database import identity, setup
from ..database.connection import (
    Connection,
    DatabaseUnavailable,
    Deadlines,
    connection_info,
    error_text,
    session_setup,
    transaction_setup,
)
from ..database.identity import UNKNOWN, Identity
from ..database.listener import CHANNEL
from ..database.values import is_unencoded, load_whatever_stands_there
from ..fleet import FLEET
from ..settings import Settings
from ..terminal import Trouble
from .picture import MOST, OVERDUE, ROWS, WINDOW, Picture, Row

NAME = "recall-worker top"
DEADLINE = 10.0
"""Seconds that a look, and a connection, may take."""
OVERLAP = 60.0
"""Seconds that a look asks again for failures: a call is dated before its record is committed."""
NOTHING: Mapping[str, tuple[str, Mapping[str, Any]]] = {}
LISTEN_AGAIN = 30.0
"""Seconds until the second connection is tried again."""


class Feed:
    """`heard` is set by each notification, and when a connection breaks."""

    def __init__(
        self, settings: Callable[[], Settings], name: str = NAME, *, listens: bool = True
    ) -> None:
        """`settings()`: read anew for each connection, as a password may change. `name`: of the
        connection, for pg_stat_activity. `listens`: whether notifications are wanted."""
        self._settings = settings
        self._name = name
        self._wants_to_listen = listens
        self.also: Mapping[str, list[dict[str, Any]]] = {}
        """The rows of the further statements of the last look."""
        self._conn: Connection | None = None
        self._pooled = False
        self._schema: str | None = None
        self._listener: Connection | None = None
        """Where the first connection can't listen."""
        self._listen_dsn: str | None = None
        self._listen_at = 0.0
        self._identity: Identity = UNKNOWN
        self._watched: dict[Connection, int] = {}
        """Connections that are read between two looks, and their sockets: a broken one has none."""
        self._recent = Recent()
        self.listening = False
        """Whether notifications arrive."""
        self.heard = asyncio.Event()

    async def look(
        self, needle: str | None, also: Mapping[str, tuple[str, Mapping[str, Any]]] = NOTHING
    ) -> Picture:
        """What is going on. `needle`: see sql/top.sql. `also`: further statements that only read,
        by name, with their values, asked in the same round trip. Raises psycopg.Error,
        DatabaseUnavailable, Trouble where the table is elsewhere; the next look opens another
        connection then."""
        try:
            if self._conn is None or self._conn.closed:
                if self._conn is not None:
                    self._hang_up(self._conn)
                await self._connect()
            await self._listen_elsewhere()
            conn = self._conn
            assert conn is not None
            self._unwatch(conn)
            began = time.monotonic()
            async with asyncio.timeout(DEADLINE):
                found = await self._ask(conn, needle, also)
            self._watch(conn)
            return self._picture(found, needle, time.monotonic() - began)
        except (OSError, TimeoutError) as error:
            self.close()
            late = isinstance(error, TimeoutError)
            reason = f"no answer within {DEADLINE:g} s" if late else error_text(error)
            raise DatabaseUnavailable(reason) from error
        except BaseException:
            self.close()
            raise

    async def _ask(
        self,
        conn: Connection,
        needle: str | None,
        also: Mapping[str, tuple[str, Mapping[str, Any]]],
    ) -> dict[str, list[dict[str, Any]]]:
        """The rows of all statements, in one round trip."""
        of: dict[str, Any] = {
            "needle": needle,
            "most": MOST,
            "depth": ROWS if needle is None else MOST,
            "rows": ROWS,
            "late": OVERDUE,
            "since": self._recent.since(needle),
            "overlap": OVERLAP,
            "window": WINDOW,
        }
        of |= FLEET | self._identity.known
        asked = statements.load("top") | {"workers": statements.load("reads")["workers"]}
        if self._identity != UNKNOWN:
            # The one of the two that is allowed here.
            by = "identity" if self._identity.system_identifier is not None else "identity_by_oid"
            asked["identity"] = statements.load("identity")[by]
        cursors = {}
        async with conn.pipeline():
            await conn.execute(b"begin isolation level repeatable read read only", prepare=False)
            if self._pooled:
                # Nothing may stay behind on a pooler's connection.
                await conn.execute(
                    statements.load("ledger")["transaction_setup"].encode(),
                    transaction_setup(DEADLINE),
                    prepare=False,
                )
                terms = setup.values(self._schema, local=True)
                await conn.execute(setup.settings(), terms, prepare=False)
            for name, statement in asked.items():
                cursors[name] = conn.cursor(row_factory=dict_row)
                await cursors[name].execute(statement.encode(), of, prepare=False)
            others = {name: conn.cursor(row_factory=dict_row) for name in also}
            for name, (statement, values) in also.items():
                await others[name].execute(statement.encode(), values, prepare=False)
            await conn.execute(b"commit", prepare=False)
        self.also = {name: await cursor.fetchall() for name, cursor in others.items()}
        return {name: await cursor.fetchall() for name, cursor in cursors.items()}

    def _picture(
        self, found: Mapping[str, list[dict[str, Any]]], needle: str | None, took: float
    ) -> Picture:
        [moment] = found["moment"]
        self._recent.add(found["failures"], found["failed"], moment["now"])
        for row in found.get("identity", []):
            self._identity = Identity.of(row)
        return Picture(
            now=moment["now"],
            database=moment["database"],
            needle=needle,
            copy=self._identity.copy,
            counts=found["counts"],
            next=found["next"],
            runs=found["runs"],
            failures=self._recent.failures,
            failed=self._recent.failed,
            workers=found["workers"],
            paused_queues=found["paused_queues"],
            endpoints=found["endpoints"],
            took=took,
        )

    async def _connect(self) -> None:
        chosen = self._settings()
        dsn = chosen.dsn or ""
        self._schema = chosen.schema
        conn, direct = await self._opened(dsn)
        self._conn, self._pooled = conn, not direct
        async with asyncio.timeout(DEADLINE):
            await self._check_place(conn)
            self._identity = await identity.ask(lambda text: self._rows(conn, text))
            load_whatever_stands_there(conn)
            if direct and is_unencoded(conn):
                await conn.execute(b"set client_encoding = 'SQL_ASCII'")
            listens = self._wants_to_listen
            self.listening = direct and listens and await self._listens(conn)
        # Where this connection can't listen another one does.
        elsewhere = listens and not direct
        self._listen_dsn, self._listen_at = chosen.listen_dsn if elsewhere else None, 0.0

    async def _opened(self, dsn: str) -> tuple[Connection, bool]:
        """A connection with our settings, and whether it is the server's own."""
        deadlines = Deadlines(DEADLINE, DEADLINE)
        async with asyncio.timeout(deadlines.connecting(dsn)):
            conn = await Connection.connect(**connection_info(dsn, self._name, DEADLINE))
        conn.prepare_threshold = None
        conn.add_notify_handler(lambda _: self.heard.set())
        try:
            async with asyncio.timeout(DEADLINE):
                return conn, await session_setup(conn, DEADLINE, self._schema)
        except BaseException:
            conn.pgconn.finish()
            raise

    async def _rows(self, conn: Connection, statement: str) -> list[Any]:
        cursor = conn.cursor(row_factory=dict_row)
        await cursor.execute(statement.encode(), prepare=False)
        return await cursor.fetchall()

    async def _check_place(self, conn: Connection) -> None:
        """Raises Trouble where another schema has the table."""
        cursor = conn.cursor(row_factory=dict_row)
        text = statements.load("setup")["elsewhere"].encode()
        await cursor.execute(text, {"schema": self._schema}, prepare=False)
        row = await cursor.fetchone()
        assert row is not None
        if not self._pooled and (absent := setup.absence_of(row, self._schema)) is not None:
            raise Trouble(absent.reason, absent.hint)

    async def _listens(self, conn: Connection) -> bool:
        """Whether notifications arrive from now on: a standby refuses it."""
        try:
            await conn.execute(f"listen {CHANNEL}".encode(), prepare=False)
        except (
            psycopg.errors.ObjectNotInPrerequisiteState,
            psycopg.errors.ReadOnlySqlTransaction,
        ):
            return False
        return True

    async def _listen_elsewhere(self) -> None:
        """Where it is needed, listen on a second connection. What fails there is no outage: looks
        go on."""
        if self._listen_dsn is None or self._listener is not None:
            return
        if time.monotonic() < self._listen_at:
            return
        self._listen_at = time.monotonic() + LISTEN_AGAIN
        try:
            conn, direct = await self._opened(self._listen_dsn)
        except (psycopg.Error, OSError, TimeoutError):
            return
        if direct and await self._listens(conn):
            self._listener, self.listening = conn, True
            self._watch(conn)
        else:
            conn.pgconn.finish()

    # --- between two looks ------------------------------------------------------------------------

    def _watch(self, conn: Connection) -> None:
        """Read notifications as they come. (While a look goes on psycopg reads them.)"""

        def receive() -> None:
            try:
                conn.pgconn.consume_input()
                while conn.pgconn.notifies() is not None:
                    self.heard.set()
            except psycopg.Error:
                # The next look says what happened.
                self._unwatch(conn)
                if conn is self._listener:
                    self._drop_listener()
                    self.listening = False
                self.heard.set()

        self._watched[conn] = conn.fileno()
        asyncio.get_running_loop().add_reader(conn.fileno(), receive)

    def _unwatch(self, conn: Connection) -> None:
        """Leave the socket to psycopg, or to nobody."""
        number = self._watched.pop(conn, None)
        if number is not None:
            asyncio.get_running_loop().remove_reader(number)

    def _drop_listener(self) -> None:
        if self._listener is not None:
            self._hang_up(self._listener)
            self._listener = None

    def _hang_up(self, conn: Connection) -> None:
        self._unwatch(conn)
        conn.pgconn.finish()

    def close(self) -> None:
        """Hang up."""
        self._drop_listener()
        if self._conn is not None:
            self._hang_up(self._conn)
        self._conn, self.listening = None, False


class Recent:
    """The failures of the last hour, of which each look adds the latest."""

    def __init__(self) -> None:
        self._needle: str | None = None
        self._since: datetime | None = None
        """The moment of the last look, by PostgreSQL's clock."""
        self._rows: dict[tuple[Any, ...], Row] = {}
        self._minutes: dict[int, int] = {}

    def since(self, needle: str | None) -> datetime | None:
        """From when on the next look has to ask; None: all of the hour."""
        if needle != self._needle:
            self._needle, self._since, self._rows, self._minutes = needle, None, {}, {}
        return self._since

    def add(self, rows: Sequence[Row], minutes: Sequence[Mapping[str, int]], now: datetime) -> None:
        """What a look at `now` has found, that asked from `since` on."""
        hour = now - timedelta(seconds=WINDOW)
        overlap = now - timedelta(seconds=OVERLAP)
        asked = hour if self._since is None else max(hour, min(self._since, overlap))
        for row in rows:
            key = (row["id"], row["occurrence"], row["rekey"], row["attempt"], row["outcome"])
            self._rows[key] = row
        latest = sorted(self._rows.items(), key=lambda item: item[1]["ended_at"], reverse=True)
        self._rows = {key: row for key, row in latest[:ROWS] if row["ended_at"] >= hour}
        known = {minute: n for minute, n in self._minutes.items() if minute < _minute(asked)}
        known |= {row["minute"]: row["failed"] for row in minutes}
        self._minutes = {minute: n for minute, n in known.items() if minute >= _minute(hour)}
        self._since = now

    @property
    def failures(self) -> list[Row]:
        """The latest first."""
        return list(self._rows.values())

    @property
    def failed(self) -> int:
        """How many recalls failed for good."""
        return sum(self._minutes.values())


def _minute(when: datetime) -> int:
    return int(when.timestamp() // 60)

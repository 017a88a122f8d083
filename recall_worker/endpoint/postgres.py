"""Keys and sessions in PostgreSQL, so that all processes of an API agree.

Rows with leases, and no advisory locks. A session's advisory lock belongs to a connection: it would
take one for each run and chat, for as long as they last; a transaction pooler would lend that
connection to others; a network's hiccup would free the session while its agent goes on, and a
failover all of them at once. A transaction's advisory lock would hold a transaction open for an
hour, and with it every dead row of the database. A row outlives all that, is replicated, and can be
read by a person at night. What it costs is one update for all sessions of a process, three times a
lease, and that a dead process's sessions stay busy until their leases end.

What PostgreSQL decides, by its own clock: whether a session is free, and so whether a run goes on.
`begin` is one transaction, which takes the key first, then the session: the second of two callers
waits for the first, and then sees its rows. Nothing is held between transactions, so poolers of all
kinds may be in between; nothing is prepared.

After an outage, living processes come first: a process that has met one takes nothing that is dead
for a third of a lease, and so does everybody where PostgreSQL itself has just been started.

Never here: the table session_recalls, but for the schema that has it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import psycopg
from psycopg import errors
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from .. import dsn as dsns
from .. import statements
from ..database import borrowed_sync
from ..database.borrowed import BorrowedCursor, borrowed, read_committed
from ..database.connection import Connection, connection_info
from .store import (
    Begun,
    Ended,
    GoesOn,
    Lost,
    OtherRequest,
    Start,
    Started,
    State,
    StoreUnavailable,
    Taken,
)

NAME = "recall-worker endpoint"
"""application_name of its connections."""
CONNECTIONS = 4
"""Connections of one process, at most. None is held while a run goes on."""
DEADLINE = 10.0
"""Seconds, at most, that PostgreSQL may take for one step."""
RECONNECT = 2.0
"""Seconds for which the pool tries to connect by itself; then the next step tries anew."""
IDLE_MOST = 60.0
"""Seconds for which a connection is kept that is not used."""
PRUNED_MOST = 1_000
"""Rows that are deleted in one transaction."""
AWAY = ("08", "53", "57", "58")
"""Classes of errors by which PostgreSQL says that it is away, or full."""
GRACE = 1 / 3
"""Of a lease: how long nothing dead is taken after an outage."""
MIGRATE = "recall-worker migrate"

logger = logging.getLogger("recall_worker.endpoint")


class PostgresStore:
    def __init__(self, dsn: str, *, schema: str | None, lease: float) -> None:
        """`schema`: the one that has session_recalls, if the search_path does not find it. Raises
        ValueError where the DSN is none."""
        try:
            conninfo = dsns.libpq(dsn)
            given = connection_info(conninfo, NAME, DEADLINE / 2)
        except (ValueError, psycopg.ProgrammingError) as error:
            raise ValueError(f"`dsn` {_clause(error)}") from None
        self.lease: float | None = lease
        self._seconds = lease
        self._schema = schema
        self._sql = statements.load("endpoint")
        self._given = given
        self._pool: AsyncConnectionPool[Connection] | None = None
        self._down_since: float | None = None
        self._back_at = -float("inf")
        """Of the monotonic clock: when the last outage was over."""

    async def open(self) -> None:
        given = dict(self._given)
        self._pool = AsyncConnectionPool(
            given.pop("conninfo"),
            connection_class=Connection,
            kwargs=given,
            min_size=0,
            max_size=CONNECTIONS,
            max_idle=IDLE_MOST,
            timeout=DEADLINE / 2,
            # The pool's own pauses would double up to minutes, and no lease be renewed meanwhile.
            reconnect_timeout=RECONNECT,
            check=AsyncConnectionPool.check_connection,
            name="recall-worker-endpoint",
            open=False,
        )
        await self._pool.open()
        try:
            await self._ask("ended", {"keys": []})
        except StoreUnavailable as error:
            logger.error(
                "the endpoint can't begin runs yet: %s%s",
                error,
                f". Try: {error.hint}" if error.hint else "",
            )

    @property
    def is_down(self) -> bool:
        return self._down_since is not None

    async def close(self) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            await pool.close(timeout=1.0)

    async def begin(self, start: Start, starts_most: int) -> Begun:
        values = {
            "key": start.key,
            "session_id": start.session_id,
            "fingerprint": start.fingerprint,
            "lease": start.lease,
            "starts_most": starts_most,
        }
        try:
            async with self._transaction() as cursor:
                started = await cursor.ask(self._sql["start"], values)
                if not started:
                    found = await cursor.ask(self._sql["look"], values)
                    return self._known(found, start, starts_most)
                if not await cursor.ask(self._sql["take"], values | self._terms()):
                    raise _SessionTaken  # Rolled back: the key is as it was.
                return Started(started[0]["starts"], started[0]["is_stored"])
        except _SessionTaken:
            return Taken()

    @staticmethod
    def _known(rows: list[dict[str, Any]], start: Start, starts_most: int) -> Begun:
        if not rows:
            return Taken()  # It was pruned just now: the next call finds it unknown.
        row = rows[0]
        if (row["fingerprint"], row["session_id"]) != (start.fingerprint, start.session_id):
            return OtherRequest()
        state = _state(row)
        # It was lost just now: the next call starts it again.
        return GoesOn() if isinstance(state, Lost) and state.starts < starts_most else state

    async def stored(self, start: Start) -> None:
        await self._ask("stored", {"key": start.key, "lease": start.lease})

    async def accepted(self, start: Start) -> None:
        await self._ask("accepted", {"key": start.key, "lease": start.lease})

    async def finish(self, start: Start, status: str, answer: str) -> bool:
        values = {
            "key": start.key,
            "session_id": start.session_id,
            "lease": start.lease,
            "status": status,
            "answer": answer,
        }
        [row] = await self._ask("finish", values)
        return bool(row["ended"])

    async def undo(self, start: Start) -> None:
        values = {"key": start.key, "session_id": start.session_id, "lease": start.lease}
        await self._ask("undo", values)

    async def look(self, key: str, session_id: str) -> State | None:
        rows = await self._ask("look", {"key": key})
        return _state(rows[0]) if rows and rows[0]["session_id"] == session_id else None

    async def cancel(self, key: str, session_id: str, answer: str) -> None:
        await self._ask("cancel", {"key": key, "session_id": session_id, "answer": answer})

    async def give_up(self, key: str, session_id: str, answer: str) -> None:
        terms = self._terms()
        if not terms["doubtful"]:
            values = {"key": key, "session_id": session_id, "answer": answer}
            await self._ask("give_up", values | {"grace": terms["grace"]})

    async def take(self, session_id: str, lease: UUID) -> bool:
        values = {"session_id": session_id, "lease": lease, "key": None}
        return bool(await self._ask("take", values | self._terms()))

    async def free(self, session_id: str, lease: UUID) -> None:
        await self._ask("free", {"session_id": session_id, "lease": lease})

    async def renew(self, held: Collection[tuple[str, UUID]]) -> set[UUID]:
        return {row["lease"] for row in await self._ask("renew", self._renewal(held))}

    def renew_now(self, held: Collection[tuple[str, UUID]]) -> None:
        try:
            with (
                psycopg.connect(**self._given) as conn,
                conn.transaction(),
                borrowed_sync.borrowed(conn, self._schema, ours=True),
            ):
                borrowed_sync.BorrowedCursor(conn).ask(self._sql["renew"], self._renewal(held))
        except (psycopg.Error, OSError) as error:
            raise StoreUnavailable(
                f"PostgreSQL can't be asked now ({type(error).__name__})"
            ) from error

    def _renewal(self, held: Collection[tuple[str, UUID]]) -> dict[str, Any]:
        return {
            "session_ids": [session_id for session_id, _ in held],
            "leases": [lease for _, lease in held],
            "seconds": self._seconds,
        }

    async def ended(self, keys: Collection[str]) -> set[str]:
        return {row["key"] for row in await self._ask("ended", {"keys": list(keys)})}

    async def prune(self, keep: float) -> None:
        while True:
            [row] = await self._ask("prune", {"keep": keep, "most": PRUNED_MOST})
            if row["pruned"] < PRUNED_MOST:
                return

    def _terms(self) -> dict[str, Any]:
        """How a session is taken: for how long, and whether from the dead."""
        grace = self._seconds * GRACE
        doubtful = self._down_since is not None or time.monotonic() - self._back_at < grace
        return {"seconds": self._seconds, "grace": grace, "doubtful": doubtful}

    async def _ask(self, name: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        async with self._transaction() as cursor:
            return await cursor.ask(self._sql[name], values)

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[BorrowedCursor]:
        """A transaction of its own, with what our statements depend on. Raises StoreUnavailable
        where PostgreSQL is away, silent or refuses."""
        if self._pool is None:
            raise StoreUnavailable("the endpoint is stopped")
        try:
            async with (
                asyncio.timeout(DEADLINE),
                self._pool.connection() as conn,
                read_committed(conn),
                conn.transaction(),
                borrowed(conn, self._schema, ours=True),
            ):
                yield BorrowedCursor(conn)
        except (errors.UndefinedTable, errors.UndefinedColumn) as error:
            raise StoreUnavailable(
                "PostgreSQL has no tables for the endpoint (recall_runs, recall_session_locks)"
                if isinstance(error, errors.UndefinedTable)
                else "the endpoint's tables are of another version",
                f"{MIGRATE}, by the owner of session_recalls; or `schema=`, where it is in another",
            ) from error
        except errors.InsufficientPrivilege as error:
            raise StoreUnavailable(
                f"PostgreSQL refuses: {error.diag.message_primary}",
                "grant recall_application to the endpoint's role (docs/roles.md)",
            ) from error
        except (psycopg.Error, PoolTimeout, TimeoutError, OSError) as error:
            state = error.sqlstate if isinstance(error, psycopg.Error) else None
            if state is None or state[:2] in AWAY:
                self._down_since = self._down_since or time.monotonic()
            raise StoreUnavailable(
                f"PostgreSQL can't be asked now ({type(error).__name__})"
            ) from error
        if self._down_since is not None:
            logger.info("PostgreSQL is back, after %.1f s", time.monotonic() - self._down_since)
            self._down_since, self._back_at = None, time.monotonic()


class _SessionTaken(Exception):
    """Somebody is in the session."""


def _state(row: Mapping[str, Any]) -> State:
    if row["answer"] is not None:
        return Ended(row["answer"])
    accepted = row["is_accepted"]
    return GoesOn(accepted) if row["goes_on"] else Lost(row["starts"], accepted)


def _clause(error: Exception) -> str:
    # psycopg quotes what it can't read, which may be a password.
    return str(error) if type(error) is ValueError else "can't be read by libpq"

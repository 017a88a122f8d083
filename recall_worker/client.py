"""`Recalls`: the application's side of the table, for applications in Python. Others use plain SQL
(docs/application.md).

Every method takes `conn=`, an async psycopg connection: it then works inside the caller's own
transaction, so that the recall exists exactly if the message that asked for it does. Without it a
connection of the pool is used, and each call is a transaction of its own. An error inside the
caller's transaction is confined to a savepoint: the transaction can continue.

Never here: leases, occurrences, verdicts. Those belong to the worker.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import random
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any
from uuid import uuid4

from psycopg import AsyncConnection, errors
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from . import cadence, statements
from .database.values import Dates
from .recall import STATUSES, Recall

Connection = AsyncConnection[Any]


class RecallExists(Exception):
    """The session has a pending recall already; a session holds one at a time. Cancel it first, or
    keep it."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {session_id} has a pending recall already")
        self.session_id = session_id


class Recalls:
    """Schedules, cancels, skips, moves and lists recalls."""

    def __init__(self, pool: AsyncConnectionPool[Any] | None = None) -> None:
        """`pool`: an open psycopg pool; without one, every call needs `conn=`."""
        self._pool = pool
        self._sql = statements.load("client")
        self._reads = statements.load("reads")

    async def schedule(
        self,
        session_id: str,
        message: str,
        *,
        at: datetime | None = None,
        after: timedelta | None = None,
        every: timedelta | None = None,
        grid: timedelta | None = None,
        cron: str | None = None,
        time_zone: str | None = None,
        until: datetime | None = None,
        times: int | None = None,
        failures: int | None = None,
        grace: timedelta | None = None,
        jitter: timedelta | None = None,
        comment: str | None = None,
        id: str | None = None,
        conn: Connection | None = None,
    ) -> Recall:
        """Promise to come back to `session_id` with `message`.

        `at` (aware) or `after`: once. Without any time: at once. A time in the past also means at
        once.

        Recurring: `every`, this long after the end of each run; `grid`, each whole multiple of this
        after the first, without drift; `cron`, five fields (minute, hour, day, month, weekday) in
        `time_zone` (an IANA name; default UTC). The first occurrence is one interval from now, or
        at `at` or `after`; with cron, at the first tick from there on.

        It ends after `until` (aware; an occurrence at that instant still runs), after so many
        `times` (skipped ones count), or after so many `failures` in a row. An occurrence that is
        later than `grace` is not run, but recorded as misfired. Each is due up to `jitter` after
        its nominal time, at random.

        `comment` never leaves the database. `id`: any text, a random UUID if not given.

        Raises RecallExists where the session has a pending recall, ValueError for times, cadences
        and sessions that make no sense, and psycopg's errors, such as ForeignKeyViolation for a
        session that does not exist and DataError for text with NUL characters.
        """
        for name, when in (("at", at), ("until", until)):
            if when is not None and when.tzinfo is None:
                raise ValueError(
                    f"`{name}` has no time zone: give an aware datetime, as in datetime.now(UTC)"
                )
        if session_id in ("", ".", ".."):
            raise ValueError(f"{session_id!r} can't be a session's id: an address can't name it")
        # Query PostgreSQL's clock only where something is calculated from it.
        asked = cron is not None or until is not None
        now = (
            (await self._ask(self._sql["clock"], {}, conn))[0]["now"]
            if asked
            else datetime.now(UTC)
        )
        plan = cadence.plan(
            now,
            random.random(),
            at=at,
            after=after,
            every=every,
            grid=grid,
            cron=cron,
            time_zone=time_zone,
            until=until,
            times=times,
            failures=failures,
            grace=grace,
            jitter=jitter,
        )
        values = dataclasses.asdict(plan) | {
            "id": str(uuid4()) if id is None else id,
            "session_id": session_id,
            "comment": comment,
            "message": message,
        }
        try:
            rows = await self._ask(self._sql["schedule"], values, conn)
        except errors.UniqueViolation as error:
            if error.diag.constraint_name != "idx_recalls_active_pending":
                raise
            raise RecallExists(session_id) from None
        return Recall.of(rows[0])

    async def preview(
        self,
        what: str,
        *,
        time_zone: str | None = None,
        count: int = 10,
        conn: Connection | None = None,
    ) -> builtins.list[datetime]:
        """The next moments (aware, in their zone) of a recall by its id, or of a cron expression in
        `time_zone`. An id with blanks is a recall first.

        The first moment of a recall may be past: it is due. A recall that is over has none. Raises
        ValueError for a cadence that makes no sense, and LookupError where there is no such recall.
        """
        now = (await self._ask(self._sql["clock"], {}, conn))[0]["now"]
        rows = await self._ask(self._reads["show"], {"id": what}, conn)
        if not rows and len(what.split()) > 1:
            where = cadence.zone(time_zone)
            cadence.check(what, time_zone, now)
            return [
                moment.astimezone(where)
                for moment in islice(cadence.ticks(what, time_zone, now), count)
            ]
        if not rows:
            raise LookupError(f"there is no recall {what}")
        found = Recall.of(rows[0])
        where = cadence.zone(found.time_zone)
        return [moment.astimezone(where) for moment in islice(cadence.upcoming(found, now), count)]

    async def cancel(self, session_id: str, *, conn: Connection | None = None) -> int:
        """Cancel the session's pending recall, also during its run: its call is aborted, nothing
        fires again. Returns how many: 0 or 1."""
        values = {"session_id": session_id}
        # Run again where nothing was found: a cancel that waited for the insert of the session's
        # next recall has a snapshot without it, and finds the recall before it moved out of the
        # slot.
        found = await self._ask(self._sql["cancel_pending"], values, conn) or await self._ask(
            self._sql["cancel_pending"], values, conn
        )
        return len(found)

    async def skip_next(self, session_id: str, *, conn: Connection | None = None) -> bool:
        """Leave out one occurrence of the session's recurring recall. False where it has none."""
        return bool(await self._ask(self._sql["skip_pending"], {"session_id": session_id}, conn))

    async def list(
        self,
        *,
        session_id: str | None = None,
        user_id: str | None = None,
        statuses: Sequence[str] | None = None,
        limit: int = 50,
        offset: int = 0,
        conn: Connection | None = None,
    ) -> builtins.list[Recall]:
        """Recalls, newest trigger first: of one session, of the sessions that a user owns
        (`sessions.user_id`), or all."""
        unknown = set(statuses or ()) - set(STATUSES)
        if unknown:
            raise ValueError(
                f"there is no status {', '.join(sorted(unknown))}: there are {', '.join(STATUSES)}"
            )
        name = (
            "list_user"
            if user_id is not None
            else "list_session"
            if session_id is not None
            else "list"
        )
        values = {
            "session_id": session_id,
            "user_id": user_id,
            "statuses": list(statuses) if statuses else None,
        }
        rows = await self._ask(
            self._reads[name], {**values, "limit": limit, "offset": offset}, conn
        )
        return [Recall.of(row) for row in rows]

    async def due(
        self, limit: int = 100, *, conn: Connection | None = None
    ) -> builtins.list[Recall]:
        """Recalls that are due and wait for a worker, oldest first."""
        return [Recall.of(row) for row in await self._ask(self._sql["due"], {"limit": limit}, conn)]

    async def next_trigger_at(self, *, conn: Connection | None = None) -> datetime | None:
        """The earliest due time of all waiting recalls, which may be past; None where none
        waits."""
        rows = await self._ask(self._sql["next_trigger"], {}, conn)
        return rows[0]["next_trigger"] if rows else None

    async def mark_fired(self, id: str, *, conn: Connection | None = None) -> bool:
        """Settle a recall as fired by hand. False where it does not exist, or is final already."""
        return bool(await self._ask(self._sql["mark"], {"id": id, "status": "fired"}, conn))

    async def mark_cancelled(self, id: str, *, conn: Connection | None = None) -> bool:
        """Cancel one recall. False where it does not exist, or is final already."""
        return bool(await self._ask(self._sql["mark"], {"id": id, "status": "cancelled"}, conn))

    async def reschedule(self, id: str, at: datetime, *, conn: Connection | None = None) -> bool:
        """Move a recall to `at` (aware); during a run, the occurrence after it. False where it does
        not exist, or is final already."""
        if at.tzinfo is None:
            raise ValueError(
                "`at` has no time zone: give an aware datetime, as in datetime.now(UTC)"
            )
        return bool(
            await self._ask(self._sql["reschedule"], {"ids": [id], "at": at, "after": None}, conn)
        )

    async def sessions_with_pending(
        self, session_ids: Iterable[str], *, conn: Connection | None = None
    ) -> set[str]:
        """Which of these sessions have a pending recall."""
        rows = await self._ask(
            self._sql["sessions_with_pending"], {"session_ids": [*session_ids]}, conn
        )
        return {row["session_id"] for row in rows}

    async def _ask(
        self, statement: str, values: Mapping[str, Any], conn: Connection | None
    ) -> Sequence[dict[str, Any]]:
        async with self._connection(conn) as connection:
            cursor = connection.cursor(row_factory=dict_row)
            cursor.adapters.register_loader("timestamptz", Dates)
            # Never prepared: a transaction pooler in between may run the next statement on another
            # connection.
            await cursor.execute(statement.encode(), values, prepare=False)
            return await cursor.fetchall()

    @contextlib.asynccontextmanager
    async def _connection(self, conn: Connection | None) -> AsyncIterator[Connection]:
        if conn is not None:
            if not conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE:
                # The caller's transaction begins with its first statement, which may be ours.
                # Without this, the block below would be a transaction of its own, and commit.
                await conn.execute(b"select")
            async with conn.transaction():
                yield conn
        elif self._pool is not None:
            async with self._pool.connection() as pooled:
                yield pooled
        else:
            raise ValueError("Recalls has no pool: give one, or `conn=`")

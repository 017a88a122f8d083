"""Written by `python -m tests.unasync` from client.py: not to be edited."""

from __future__ import annotations

import builtins
import contextlib
import copy
import dataclasses
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Self, TypeAlias

import psycopg
from psycopg import errors
from psycopg_pool import ConnectionPool

from . import cadence, keys, settings, statements
from .cadence import KEEP, Keep
from .client import RecallExists, _has_transaction, check_queue, check_types, edit, texts
from .database.borrowed_sync import BorrowedCursor, borrowed, read_committed
from .keys import Columns, Key, UnfitKey
from .recall import STATUSES, Recall

Connection: TypeAlias = psycopg.Connection[Any]


class SyncRecalls:
    """Schedules, finds, changes and ends recalls.

    Times are aware datetimes, lengths of time are timedeltas, numbers are whole, texts are str.
    Anything else is a TypeError that shows what to write, and a datetime without a time zone is a
    ValueError.
    """

    def __init__(
        self,
        pool: ConnectionPool[Any] | None = None,
        *,
        actor: str | None = None,
        via: str = "python",
        schema: str | None = None,
    ) -> None:
        """`pool`: an open psycopg pool; without one, every call needs `conn=`.

        `actor`: who acts, for the record of what is done (the table recall_actions); if not given,
        RECALL_ACTOR, else the role of the database session. `via`: the way in which it acts, for
        the same record. `schema`: the one that has
        session_recalls; if not given, RECALL_SCHEMA, else the one that the connection's search_path
        finds. Raises SettingsError where one of these variables holds what it can't be.
        """
        if pool is not None and not hasattr(pool, "connection"):
            raise TypeError(f"`pool` is {repr(pool)[:80]}: give an open pool of psycopg_pool")
        if not isinstance(actor, str | None):
            raise TypeError(f"`actor` is {repr(actor)[:80]}: give a text, such as 'ann'")
        self._pool = pool
        self._schema = schema or settings.schema()
        self._by = {"actor": actor or settings.actor(), "via": via}
        self._sql = statements.load("client")
        self._reads = statements.load("reads")
        self._columns: Columns | None = None
        """As they were when last asked for: the application may give them other types."""

    def schedule(
        self,
        session_id: Key,
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
        queue: str = settings.DEFAULT_QUEUE,
        id: Key | None = None,
        conn: Connection | None = None,
    ) -> Recall:
        """Promise to come back to `session_id` with `message`.

        `at` (aware) or `after`: once. Without any time: at once. A time in the past also means at
        once, and lateness counts from now (with `grid` and `cron` it stays the first moment, and
        those since then are missed).

        Recurring: `every`, this long after the end of each run; `grid`, each whole multiple of this
        after the first, without drift; `cron`, five fields (minute, hour, day, month, weekday) in
        `time_zone` (an IANA name, in any case; default UTC). The first occurrence is one interval
        from now, or at `at` or `after`; with cron, at the first tick from there on.

        It ends after `until` (aware; an occurrence at that instant still runs), after so many
        `times` (skipped ones count), or after so many `failures` in a row. An occurrence that is
        later than `grace` is not run, but recorded as misfired. Each is due up to `jitter` after
        its nominal time, at random.

        `comment` never leaves the database. `queue`: which workers may claim it, those whose
        RECALL_QUEUE names it. `id`: what the column holds. If it is not given, a
        random UUID where the column takes one (a shorter random text where it is too short for
        that), else the column's default.

        Raises RecallExists where the session has a pending recall, ValueError for times, cadences,
        sessions and queues that make no sense and for ids that their columns can't hold (or where
        an id has to be given), and psycopg's errors, such as ForeignKeyViolation for a session that
        does not exist, DataError for text with NUL characters, and ObjectNotInPrerequisiteState for
        another queue than `default` while a worker is alive that knows no queues.
        """
        check_types(
            at=at,
            after=after,
            every=every,
            grid=grid,
            until=until,
            times=times,
            failures=failures,
            grace=grace,
            jitter=jitter,
            message=message,
            comment=comment,
            cron=cron,
            time_zone=time_zone,
            queue=queue,
            needed=["message", "queue"],
        )
        session = keys.text(session_id)
        if session in ("", ".", ".."):
            raise ValueError(f"{session!r} can't be a session's id: an address can't name it")
        check_queue(queue)
        # Query PostgreSQL's clock only where something is calculated from it.
        asked = cron is not None or until is not None
        now = (self._ask(self._sql["clock"], {}, conn))[0]["now"] if asked else datetime.now(UTC)
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
            "session_id": session,
            "comment": comment,
            "message": message,
            "queue": queue,
            **self._by,
        }
        given = None if id is None else keys.text(id)
        try:
            return self._insert(given, session, values, conn)
        except errors.UniqueViolation as error:
            most = self._pending_most(error, conn)
            if most is None:
                raise
            raise RecallExists(session, most) from None

    def _insert(
        self, given: str | None, session: str, values: Mapping[str, Any], conn: Connection | None
    ) -> Recall:
        """Insert a recall under this id, or a new one. Raises UnfitKey."""
        remembered = self._columns is not None
        while True:
            columns = self._columns
            if columns is None:
                found = self._ask(self._sql["keys"], {}, conn)
                columns = self._columns = Columns.of(found[0]) if found else keys.TEXT
            try:
                id = columns.new_id(given)
                name = "schedule_by_default" if id is None else "schedule"
                return Recall.of((self._ask(self._sql[name], {**values, "id": id}, conn))[0])
            except UnfitKey:
                if not remembered:
                    raise
            except errors.NotNullViolation as error:
                unfit = columns.refusal(error.diag.column_name, given, session)
                if not remembered:
                    raise error if unfit is None else unfit from None
            except (errors.StringDataRightTruncation, errors.GeneratedAlways):
                if not remembered:
                    raise
            # The columns may have got other types since they were asked for.
            self._columns, remembered = None, False

    def _pending_most(self, error: errors.UniqueViolation, conn: Connection | None) -> int | None:
        """How many pending recalls the session may have, and has; None where an id is taken, or an
        index of the application's forbids it."""
        violated = {"schema": error.diag.schema_name, "name": error.diag.constraint_name}
        found = self._ask(self._sql["violated"], violated, conn)
        return keys.pending_most(found[0] if found else None)

    def get(self, id: Key, *, conn: Connection | None = None) -> Recall | None:
        """The recall with this id, whatever its status; None where there is none."""
        rows = self._ask(self._reads["show"], {"id": keys.text(id)}, conn)
        return Recall.of(rows[0]) if rows else None

    def preview(
        self,
        what: Key,
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
        check_types(count=count, time_zone=time_zone)
        what = keys.text(what)
        now = (self._ask(self._sql["clock"], {}, conn))[0]["now"]
        rows = self._ask(self._reads["show"], {"id": what}, conn)
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

    def cancel(self, session_id: Key, *, conn: Connection | None = None) -> int:
        """Cancel the session's pending recall, also during its run: its call is aborted, nothing
        fires again. Where a session may have several (`migrate --slots`), all of them. Returns how
        many."""
        values = {"session_id": keys.text(session_id), **self._by}
        # Run again where nothing was found: a cancel that waited for the insert of the session's
        # next recall has a snapshot without it, and finds the recall before it moved out of the
        # slot.
        found = self._ask(self._sql["cancel_pending"], values, conn) or self._ask(
            self._sql["cancel_pending"], values, conn
        )
        return len(found)

    def skip_next(self, session_id: Key, *, conn: Connection | None = None) -> bool:
        """Leave out one occurrence of the session's recurring recall; where a session may have
        several (`migrate --slots`), of each. False where it has none."""
        values = {"session_id": keys.text(session_id), **self._by}
        return bool(self._ask(self._sql["skip_pending"], values, conn))

    def list(
        self,
        *,
        session_id: Key | None = None,
        user_id: Key | None = None,
        statuses: Sequence[str] | None = None,
        queue: str | None = None,
        limit: int = 50,
        offset: int = 0,
        conn: Connection | None = None,
    ) -> builtins.list[Recall]:
        """Recalls, newest trigger first: of one session, of the sessions that a user owns
        (`sessions.user_id`), or all; of one `queue` where it is given."""
        check_types(limit=limit, offset=offset)
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
            "session_id": None if session_id is None else keys.text(session_id),
            "user_id": None if user_id is None else keys.text(user_id),
            "statuses": list(statuses) if statuses else None,
            "queue": queue,
        }
        try:
            rows = self._ask(self._reads[name], {**values, "limit": limit, "offset": offset}, conn)
        except (errors.InvalidTextRepresentation, errors.NumericValueOutOfRange):
            if user_id is None:
                raise
            return []  # The type of sessions.user_id can't hold such a user.
        return [Recall.of(row) for row in rows]

    def due(self, limit: int = 100, *, conn: Connection | None = None) -> builtins.list[Recall]:
        """Recalls that are due and wait for a worker, oldest first."""
        check_types(limit=limit)
        return [Recall.of(row) for row in self._ask(self._sql["due"], {"limit": limit}, conn)]

    def next_trigger_at(self, *, conn: Connection | None = None) -> datetime | None:
        """The earliest due time of all waiting recalls, which may be past; None where none
        waits."""
        rows = self._ask(self._sql["next_trigger"], {}, conn)
        return rows[0]["next_trigger"] if rows else None

    def mark_fired(self, id: Key, *, conn: Connection | None = None) -> bool:
        """Settle a recall as fired by hand. False where it does not exist, or is final already."""
        values = {"status": "fired", "action": "mark_fired", **self._by}
        return bool(self._ask(self._sql["mark"], {"id": keys.text(id), **values}, conn))

    def mark_cancelled(self, id: Key, *, conn: Connection | None = None) -> bool:
        """Cancel one recall. False where it does not exist, or is final already."""
        values = {"status": "cancelled", "action": "cancel", **self._by}
        return bool(self._ask(self._sql["mark"], {"id": keys.text(id), **values}, conn))

    def reschedule(self, id: Key, at: datetime, *, conn: Connection | None = None) -> bool:
        """Move a recall to `at` (aware); during a run, the occurrence after it. False where it does
        not exist, or is final already."""
        check_types(at=at, needed=["at"])
        values = {"ids": [keys.text(id)], "at": at, "after": None, **self._by}
        return bool(self._ask(self._sql["reschedule"], values, conn))

    def pause(self, id: Key, *, conn: Connection | None = None) -> Recall | None:
        """Hold a recall back until it is resumed. The current run is not interrupted.

        Returns the recall as it is then, also where it was paused already; None where it does not
        exist, or is final already.
        """
        return self._act("pause", id, conn)

    def resume(self, id: Key, *, conn: Connection | None = None) -> Recall | None:
        """Let a paused recall run again. What was missed meanwhile runs once, with its number.

        Returns the recall as it is then, also where it was not paused; None where it does not
        exist, or is final already.
        """
        return self._act("resume", id, conn)

    def fire(self, id: Key, *, conn: Connection | None = None) -> Recall | None:
        """Run a recall now. Of a recurring one that waits, this is an extra run: its schedule stays
        as it is. An occurrence that was called before keeps its key.

        Returns the recall as it is then, also where it was due already; None where it does not
        exist, is final already, is paused, or is in a run.
        """
        return self._act("fire", id, conn)

    def retry(self, id: Key, *, conn: Connection | None = None) -> Recall | None:
        """Run a failed or cancelled recall again now, under a new key and with all its attempts.

        Returns the recall as it is then; None where it does not exist, is neither failed nor
        cancelled, or where its aborted call is still open. Raises RecallExists where its session
        has another pending recall.
        """
        try:
            return self._act("retry", id, conn)
        except errors.UniqueViolation as error:
            found = self.get(id, conn=conn)
            most = self._pending_most(error, conn)
            if found is None or most is None:
                raise
            raise RecallExists(found.session_id, most) from None

    def _act(self, name: str, id: Key, conn: Connection | None) -> Recall | None:
        """Run a statement that acts on recalls by their ids, and returns them as they are then."""
        values = {"ids": [keys.text(id)], **self._by}
        rows = self._ask(self._sql[name], values, conn)
        return Recall.of(rows[0]) if rows else None

    def update(
        self,
        id: Key,
        *,
        message: str | Keep = KEEP,
        comment: str | Keep | None = KEEP,
        every: timedelta | Keep = KEEP,
        grid: timedelta | Keep = KEEP,
        cron: str | Keep = KEEP,
        time_zone: str | Keep | None = KEEP,
        until: datetime | Keep | None = KEEP,
        times: int | Keep | None = KEEP,
        failures: int | Keep | None = KEEP,
        grace: timedelta | Keep | None = KEEP,
        jitter: timedelta | Keep | None = KEEP,
        queue: str | Keep = KEEP,
        conn: Connection | None = None,
    ) -> Recall | None:
        """Change what is given of a live recall, waiting, paused or in mid-run; what is not given
        stays as it is. None takes a value away (a time zone: back to UTC).

        The current run is not interrupted. An occurrence that has fallen due is still owed; what
        follows it follows the new rule. A waiting occurrence is computed anew where `cron`,
        `time_zone` or the kind of rule changes; another distance counts from the next one on.
        `every`, `grid` and `cron` make a one-shot recurring. `queue`: other workers claim it from
        now on.

        Returns the recall as it is then (also where nothing differs: then nothing is written), None
        where it does not exist or is final already. Raises ValueError for an edit that makes no
        sense, such as an end before the next occurrence.
        """
        check_types(
            every=every,
            grid=grid,
            until=until,
            times=times,
            failures=failures,
            grace=grace,
            jitter=jitter,
            message=message,
            comment=comment,
            cron=cron,
            time_zone=time_zone,
            queue=queue,
            needed=["queue"],
        )
        if message is None:
            raise ValueError("a message can be replaced, but not taken away")
        if not isinstance(queue, Keep):
            check_queue(queue)
        with self._connection(conn) as connection, connection.transaction():
            found = _query(connection, self._sql["hold"], {"id": keys.text(id)})
            if not found:
                return None
            now = (_query(connection, self._sql["clock"], {}))[0]["now"]
            changes = cadence.change(
                Recall.of(found[0]),
                now,
                every=every,
                grid=grid,
                cron=cron,
                time_zone=time_zone,
                until=until,
                times=times,
                failures=failures,
                grace=grace,
                jitter=jitter,
            ) | texts(found[0], message, comment, queue)
            if changes:
                statement, values = edit(found[0]["id"], changes)
                found = _query(connection, self._sql[statement], values | self._by)
            return Recall.of(found[0])

    def sessions_with_pending(
        self, session_ids: Iterable[Key], *, conn: Connection | None = None
    ) -> set[str]:
        """Which of these sessions have a pending recall."""
        if isinstance(session_ids, str | bytes):
            raise TypeError(f"`session_ids` is {session_ids!r}: give a list, [{session_ids!r}]")
        values = {"session_ids": [keys.text(session_id) for session_id in session_ids]}
        rows = self._ask(self._sql["sessions_with_pending"], values, conn)
        return {row["session_id"] for row in rows}

    @contextlib.contextmanager
    def transaction(self, *, conn: Connection | None = None) -> Iterator[Connection]:
        """One transaction for several calls: each is given the connection that this yields, as
        `conn=`. It is committed at the end of the block, and rolled back where that raises; with
        `conn=` here it is a savepoint of the caller's transaction."""
        with self._connection(conn) as connection:
            yield connection

    def acting_as(self, actor: str) -> Self:
        """The same for somebody else: what it does is on record as `actor`'s."""
        other = copy.copy(self)
        other._by = {**self._by, "actor": actor}
        return other

    @property
    def by(self) -> Mapping[str, str | None]:
        """Who acts, and in which way, as the statements of sql/client.sql take it."""
        return self._by

    def _ask(
        self, statement: str, values: Mapping[str, Any], conn: Connection | None
    ) -> Sequence[dict[str, Any]]:
        with self._connection(conn) as connection:
            return _query(connection, statement, values)

    @contextlib.contextmanager
    def _connection(self, conn: Connection | None) -> Iterator[Connection]:
        if conn is not None:
            if not isinstance(conn, psycopg.Connection):
                raise TypeError(f"`conn` is {repr(conn)[:80]}: give a connection of psycopg's")
            if not _has_transaction(conn) and not conn.autocommit:
                # The caller's transaction begins with its first statement, which may be ours.
                # Without this, the block below would be a transaction of its own, and commit.
                BorrowedCursor(conn).execute(b"select", prepare=False)
            with self._transaction(conn):
                yield conn
        elif self._pool is not None:
            with self._pool.connection() as pooled, self._transaction(pooled):
                yield pooled
        else:
            raise ValueError("Recalls has no pool: give one, or `conn=`")

    @contextlib.contextmanager
    def _transaction(self, conn: Connection) -> Iterator[None]:
        """A savepoint in the caller's transaction, or a transaction of our own."""
        with contextlib.ExitStack() as stack:
            ours = not _has_transaction(conn)
            if ours:
                stack.enter_context(read_committed(conn))
            stack.enter_context(conn.transaction())
            stack.enter_context(borrowed(conn, self._schema, ours=ours))
            yield


def _query(
    connection: Connection, statement: str, values: Mapping[str, Any]
) -> Sequence[dict[str, Any]]:
    return BorrowedCursor(connection).ask(statement, values)

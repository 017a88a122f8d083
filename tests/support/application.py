"""The agent application's own code: asyncpg and plain SQL, as it stood before there was a
recall-worker.

It owns `sessions` and `session_recalls`, and goes on doing to them what it always did: its
statements name its own ten columns, and it knows two refusals only, "this session has one already"
(by the words in the error's text) and the rest.

Never here: an import of recall_worker, or anything that the application could not have known. If a
test needs a change in this file, recall-worker has broken its promise.

Its ids are text. Applications whose ids have other types are the same but for these types:
`create_tables`, `Application(…, id_type, session_type)`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Self

import asyncpg

Row = dict[str, Any]
"""One recall, by column; the dates aware, in UTC."""


def create_tables(id_type: str = "text", session_type: str = "text") -> str:
    """The application's tables, with ids of these types."""
    return f"""
create table if not exists sessions (
    id {session_type} primary key,
    user_id text not null
);

create table if not exists session_recalls (
    id {id_type} primary key,
    session_id {session_type} not null references sessions(id) on delete cascade,
    call_type text not null check (call_type in ('once', 'recurring', 'immediate')),
    trigger_at timestamptz not null,
    interval_seconds integer,
    internal_comment text,
    additional_context_message text not null,
    status text not null default 'pending' check (status in ('pending', 'fired', 'cancelled')),
    created_at timestamptz not null,
    updated_at timestamptz not null
);

create index if not exists idx_recalls_trigger_at_status on session_recalls (trigger_at, status);
create index if not exists idx_recalls_session_status on session_recalls (session_id, status);
create unique index if not exists idx_recalls_active_pending on session_recalls (session_id)
    where status = 'pending';
"""


CREATE_TABLES = create_tables()

COLUMNS = """
id, session_id, call_type, trigger_at, interval_seconds, internal_comment,
additional_context_message, status,
created_at, updated_at
"""
QUALIFIED = ", ".join(f"r.{column.strip()}" for column in COLUMNS.split(","))

INSERT = f"""
insert into session_recalls ({COLUMNS})
values ($1, $2, $3, $4, $5, $6, $7, 'pending', now(), now())
"""

CANCEL_SESSION = """
update session_recalls set status = 'cancelled', updated_at = now()
where session_id = $1 and status = 'pending'
"""

SKIP_NEXT = """
update session_recalls
set trigger_at = trigger_at + interval_seconds * interval '1 second', updated_at = now()
where session_id = $1 and status = 'pending' and call_type = 'recurring'
"""

RESCHEDULE = "update session_recalls set trigger_at = $2, updated_at = now() where id = $1"

MARK_FIRED = "update session_recalls set status = 'fired', updated_at = now() where id = $1"

MARK_CANCELLED = "update session_recalls set status = 'cancelled', updated_at = now() where id = $1"

LIST_BY_SESSION = f"""
select {COLUMNS} from session_recalls
where session_id = $1
order by trigger_at desc limit $2 offset $3
"""

LIST_BY_USER = f"""
select {QUALIFIED} from session_recalls r join sessions s on s.id = r.session_id
where s.user_id = $1
order by r.trigger_at desc limit $2 offset $3
"""

DUE = f"""
select {COLUMNS} from session_recalls
where status = 'pending' and trigger_at <= $1
order by trigger_at
"""

NEXT_TRIGGER = "select min(trigger_at) from session_recalls where status = 'pending'"

SESSIONS_WITH_PENDING = """
select distinct session_id from session_recalls where session_id = any($1::{session_type}[])
    and status = 'pending'
"""


NUMBERS = ("bigint", "integer")
"""Types whose ids are numbers."""


class AlreadyScheduled(Exception):
    """This session has a pending recall already."""


class Application:
    """The agent application's recalls, on one asyncpg connection (or a pool's: it asks for execute
    and fetch only)."""

    def __init__(
        self,
        connection: asyncpg.Connection[asyncpg.Record],
        id_type: str = "text",
        session_type: str = "text",
    ) -> None:
        self.connection = connection
        self._id_type, self._session_type = id_type, session_type
        # asyncpg takes a number for an integer, and text for everything else.
        self._id = int if id_type in NUMBERS else str
        self._session = int if session_type in NUMBERS else str

    @classmethod
    async def connect(cls, dsn: str, id_type: str = "text", session_type: str = "text") -> Self:
        """On a connection of its own; `close` ends it."""
        return cls(await asyncpg.connect(dsn), id_type, session_type)

    async def close(self) -> None:
        await self.connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def create_tables(self) -> None:
        """What the application runs at every start."""
        await self.connection.execute(create_tables(self._id_type, self._session_type))

    # Sessions

    async def create_session(self, id: str, user_id: str) -> None:
        await self.connection.execute(
            "insert into sessions (id, user_id) values ($1, $2)", self._session(id), user_id
        )

    async def delete_session(self, id: str) -> int:
        """Deletes the session, and with it its recalls; also while one of them runs."""
        return _rows(
            await self.connection.execute("delete from sessions where id = $1", self._session(id))
        )

    # What the agent asks for

    async def schedule(
        self,
        session_id: str,
        call_type: str,
        trigger_at: datetime,
        message: str,
        interval_seconds: int | None = None,
        comment: str | None = None,
        id: str | None = None,
    ) -> str:
        """Inserts a pending recall and returns its id."""
        id = id or str(uuid.uuid4())
        try:
            await self.connection.execute(
                INSERT,
                self._id(id),
                self._session(session_id),
                call_type,
                trigger_at,
                interval_seconds,
                comment,
                message,
            )
        except Exception as error:
            text = str(error).lower()
            if "unique" in text or "duplicate" in text:
                raise AlreadyScheduled(session_id) from error
            raise
        return id

    async def cancel_session(self, session_id: str) -> int:
        """Cancels what the session has pending; how many rows that were."""
        return _rows(await self.connection.execute(CANCEL_SESSION, self._session(session_id)))

    async def skip_next(self, session_id: str) -> bool:
        """Leaves out the next occurrence of the session's recurring recall; False where it has
        none."""
        return _rows(await self.connection.execute(SKIP_NEXT, self._session(session_id))) > 0

    async def reschedule(self, id: str, trigger_at: datetime) -> bool:
        return _rows(await self.connection.execute(RESCHEDULE, self._id(id), trigger_at)) > 0

    # What its old scheduler did, and its operators still do

    async def mark_fired(self, id: str) -> bool:
        return _rows(await self.connection.execute(MARK_FIRED, self._id(id))) > 0

    async def mark_cancelled(self, id: str) -> bool:
        return _rows(await self.connection.execute(MARK_CANCELLED, self._id(id))) > 0

    # What it shows

    async def list_by_session(self, session_id: str, limit: int = 50, offset: int = 0) -> list[Row]:
        """The session's recalls in every state, newest trigger first."""
        return _dicts(
            await self.connection.fetch(LIST_BY_SESSION, self._session(session_id), limit, offset)
        )

    async def list_by_user(self, user_id: str, limit: int = 50, offset: int = 0) -> list[Row]:
        """The recalls of all the owner's sessions in every state, newest trigger first."""
        return _dicts(await self.connection.fetch(LIST_BY_USER, user_id, limit, offset))

    async def due(self, now: datetime) -> list[Row]:
        """The pending recalls whose time has come, oldest first."""
        return _dicts(await self.connection.fetch(DUE, now))

    async def next_trigger(self) -> datetime | None:
        """When the next pending recall is due, if there is one."""
        value: datetime | None = await self.connection.fetchval(NEXT_TRIGGER)
        return value

    async def sessions_with_pending(self, ids: Iterable[str]) -> set[str]:
        """Which of these sessions have a pending recall."""
        statement = SESSIONS_WITH_PENDING.format(session_type=self._session_type)
        rows = await self.connection.fetch(statement, [self._session(id) for id in ids])
        return {row["session_id"] for row in rows}


def _rows(tag: str) -> int:
    """The number in PostgreSQL's command tag, "UPDATE 1"."""
    return int(tag.rpartition(" ")[2])


def _dicts(records: Iterable[asyncpg.Record]) -> list[Row]:
    return [dict(record) for record in records]

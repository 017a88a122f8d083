"""The application's own connections beside a worker and a migration: what PostgreSQL refuses them,
and that docs/adoption.md's way on works."""

from __future__ import annotations

import asyncio

import asyncpg
import psycopg
import pytest
from psycopg import errors

from recall_worker import RecallExists, Recalls, schema
from recall_worker.database.ledger import Ledger

from .conftest import Connection, connected
from .support.application import CREATE_TABLES
from .test_ledger import put

INSERT = """
insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds,
    internal_comment, additional_context_message, status, created_at, updated_at)
values (%(id)s, 's', 'once', now() + interval '1 hour', null, null, 'm', 'pending', now(), now())
"""
SELECT = "select * from session_recalls where session_id = 's'"
STRICTER = ["repeatable read", "serializable"]


@pytest.mark.parametrize("isolation", STRICTER)
@pytest.mark.parametrize("way", ["plain SQL", "Recalls"])
async def test_an_insert_beside_a_renewal(
    way: str, isolation: str, database: str, db: Connection
) -> None:
    """From inside a run, in a transaction that began before a renewal, an insert is refused with a
    serialization failure, whose text does not read as if the session had a recall already. The
    transaction again, and it is done."""
    await put(db, "s", id="running")
    ledger = Ledger(database, "w", 60)
    try:
        [claim] = (await ledger.claim(1)).claims

        async def insert(conn: psycopg.AsyncConnection[object]) -> None:
            if way == "Recalls":
                await Recalls().schedule("s", "m", id="next", conn=conn)
            else:
                await conn.execute(INSERT, {"id": "next"})

        async with connected(database) as conn:
            with pytest.raises(errors.SerializationFailure) as refused:
                async with conn.transaction():
                    await conn.execute(f"set transaction isolation level {isolation}".encode())
                    await conn.execute(SELECT.encode())
                    assert await ledger.renew({claim.id: claim.lease}) == {claim.id: "renewed"}
                    await insert(conn)
            assert not {"unique", "duplicate"} & set(str(refused.value).lower().split())
            async with conn.transaction():
                await conn.execute(f"set transaction isolation level {isolation}".encode())
                await insert(conn)
            cursor = await conn.execute("select id, status from session_recalls order by id")
            assert [tuple(row.values()) for row in await cursor.fetchall()] == [
                ("next", "pending"),
                ("running", "running"),
            ]
            with pytest.raises(RecallExists):
                await Recalls().schedule("s", "m", conn=conn)
    finally:
        await ledger.close()


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0, 5])
def test_a_plan_from_before_the_migration(threshold: int, empty_database: str) -> None:
    """A psycopg connection in autocommit that prepared `select *` meets the error at each further
    execution; one that rolls back does once. What ends it: `deallocate all`, or a new connection;
    what avoids it: columns by name, or nothing prepared."""
    with psycopg.connect(empty_database, autocommit=True) as conn:
        conn.execute(CREATE_TABLES.encode())
    named = SELECT.replace("*", "id, status, trigger_at")
    with (
        psycopg.connect(empty_database, autocommit=True) as conn,
        psycopg.connect(empty_database) as other,
        psycopg.connect(empty_database, autocommit=True, prepare_threshold=None) as unprepared,
    ):
        for one in (conn, other):
            one.prepare_threshold = threshold
        for _ in range(threshold + 2):
            conn.execute(SELECT)
            conn.execute(named)
            other.execute(SELECT)
            unprepared.execute(SELECT)
        other.commit()
        schema.migrate(empty_database)
        for _ in range(3):
            with pytest.raises(errors.FeatureNotSupported, match="cached plan must not change"):
                conn.execute(SELECT)
        conn.execute(named)
        unprepared.execute(SELECT)
        conn.execute("deallocate all")
        conn.execute(SELECT)
        with pytest.raises(errors.FeatureNotSupported):
            other.execute(SELECT)
        other.rollback()
        other.execute(SELECT)


@pytest.mark.slow
async def test_asyncpg_from_before_the_migration(empty_database: str) -> None:
    """asyncpg prepares anew by itself; inside a transaction it has to be told the first time."""
    conn = await asyncpg.connect(empty_database)
    try:
        await conn.execute(CREATE_TABLES)
        await conn.fetch(SELECT)
        await asyncio.to_thread(schema.migrate, empty_database)
        with pytest.raises(asyncpg.InvalidCachedStatementError):
            async with conn.transaction():
                await conn.fetch(SELECT)
        async with conn.transaction():
            assert await conn.fetch(SELECT) == []
    finally:
        await conn.close()

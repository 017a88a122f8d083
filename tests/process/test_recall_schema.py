"""The daemon on a table in another schema, beside settings that are made for others."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from recall_worker import Recalls, schema

from ..conftest import connected
from ..support.application import CREATE_TABLES
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint
from ..support.pgbouncer import PgBouncer
from .test_pgbouncer import left_behind

NAME = "My Schema"
SET = [
    "datestyle = 'German'",
    "timezone = 'Asia/Kolkata'",
    "extra_float_digits = -15",
    "default_transaction_isolation = serializable",
]


def prepare(dsn: str) -> None:
    """The application's tables in a schema that no search_path has; settings for all others."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(f'create schema "{NAME}"; set search_path = "{NAME}"'.encode())
        conn.execute(CREATE_TABLES.encode())
        conn.execute("insert into sessions values ('s', 'ann')")
    schema.migrate(dsn, schema=NAME)
    with psycopg.connect(dsn, autocommit=True) as conn:
        name = sql.Identifier(str(conninfo_to_dict(dsn)["dbname"]))
        for one in SET:
            conn.execute(sql.SQL("alter database {} set {}").format(name, sql.SQL(one)))


@pytest.mark.slow
@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pooled"])
async def test_a_daemon_in_a_schema(
    pooled: bool, empty_database: str, bouncer: PgBouncer, endpoint: Endpoint
) -> None:
    """It is notified, calls, settles, and schedules the next occurrence; nothing of its settings
    stays behind on a pooler's connections. Without RECALL_SCHEMA it says where the table is."""
    await asyncio.to_thread(prepare, empty_database)
    dsn = bouncer.way_to(empty_database) if pooled else empty_database
    environ = {
        "RECALL_DSN": dsn,
        "RECALL_LISTEN_DSN": empty_database,
        "RECALL_RUN_URL": endpoint.url,
    }
    async with Daemons(environ) as daemons, connected(empty_database) as conn:
        lost = await daemons.start(ready=False)
        assert await lost.exit() == 1
        assert "Try: RECALL_SCHEMA='My Schema'" in lost.talk
        daemon = await daemons.start(schema=NAME)
        await daemon.hears("listener.listening")
        made = await Recalls(schema=NAME).schedule("s", "m", cron="0 9 * * *", conn=conn)
        await Recalls(schema=NAME).reschedule(made.id, made.created_at, conn=conn)
        await daemon.hears("recall.settled", recall=made.id, outcome="answered", occurrence=1)
        [row] = await Recalls(schema=NAME).list(conn=conn)
        assert (row.occurrence, row.status) == (2, "pending")
        assert await daemon.stop() == 0
        assert daemon.told("worker.error") == daemon.told("database.lost") == []
    if pooled:
        for left in await left_behind(dsn):
            assert '"$user", public' in str(left["found"]) and NAME not in str(left["found"])

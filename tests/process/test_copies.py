"""A copy beside production: its daemon posts nothing, says why, and goes on when it is told that
this database is the one. Dumps are made and restored by the real programs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.request import urlopen

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from recall_worker import schema
from recall_worker.database.identity import IS_A_COPY, IS_PAUSED

from .. import schema as expected
from ..conftest import Connection
from ..support import postgres
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint
from ..test_cli import operate
from ..test_dumps import program, psql
from .test_lease import eventually, promise

pytestmark = pytest.mark.skipif(expected.pg_dump() is None, reason="there is no pg_dump here")


def restored(source: str, target: str, tmp_path: Path) -> None:
    file = tmp_path / "dump"
    program("pg_dump", "-f", file, source)
    psql(target, "-f", file)


def page(port: int, name: str) -> tuple[int, str]:
    """A page of the ops port, whatever its status."""
    import urllib.error

    try:
        with urlopen(f"http://127.0.0.1:{port}/{name}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.fixture
async def production(app: Application) -> AsyncIterator[list[str]]:
    """Three recalls that are due, in a database that workers serve."""
    yield [await promise(app, f"s{n}", "recurring", -1.0, 3600) for n in range(3)]


@pytest.mark.slow
async def test_a_dump_restored_beside_production(
    production: list[str],
    database: str,
    empty_database: str,
    daemons: Daemons,
    endpoint: Endpoint,
    tmp_path: Path,
) -> None:
    """With production's settings, and its three recalls due: nothing is posted, by any look, and
    everything says why. After `migrate --here` the same process posts."""
    restored(database, empty_database, tmp_path)
    port = postgres.free_port()
    daemon = await daemons.start(
        dsn=empty_database, poll_interval=0.2, ops_listen=port, prune="1d", lease=1
    )
    [held] = await daemon.hears("claims.held")
    assert held["level"] == "error" and held["reason"] == IS_A_COPY
    assert "migrate --here" in held["hint"]
    with psycopg.connect(empty_database, autocommit=True) as conn:
        before = conn.execute("select * from session_recalls order by id").fetchall()
        # A notification, and a few polls.
        conn.execute("notify session_recalls")
        said = await asyncio.to_thread(operate, empty_database, "workers")
        assert "held (copy)" in said.out and IS_A_COPY in said.err
        said = await asyncio.to_thread(operate, empty_database, "why", production[0])
        assert "this database is a copy" in " ".join(said.out.split())
        status, text = await asyncio.to_thread(page, port, "readyz")
        assert status == 503 and IS_A_COPY in text
        assert (
            "recall_worker_claims_held 1.0" in (await asyncio.to_thread(page, port, "metrics"))[1]
        )
        said = await asyncio.to_thread(
            operate,
            empty_database,
            "doctor",
            environ={"RECALL_RUN_URL": "http://127.0.0.1:1/{session_id}"},
        )
        assert said.status == 1 and IS_A_COPY in " ".join(said.out.split())
        assert endpoint.keys == []
        assert conn.execute("select * from session_recalls order by id").fetchall() == before
    assert len(daemon.told("claims.held")) == 1, "once, and then rarely"
    await asyncio.to_thread(schema.migrate, empty_database, here=True)
    await daemon.hears("claims.resumed")
    for recall in production:
        await daemon.hears("recall.settled", recall=recall)
    assert sorted(endpoint.keys) == sorted(f"{recall}:1" for recall in production)
    assert (await asyncio.to_thread(page, port, "readyz"))[0] == 200
    assert await daemon.stop() == 0


@pytest.mark.slow
async def test_a_database_that_is_restored_under_a_worker(
    database: str,
    server: str,
    daemons: Daemons,
    endpoint: Endpoint,
    app: Application,
    tmp_path: Path,
) -> None:
    """Dropped, made again under its name, and restored: the worker finds out as it reconnects,
    before it claims."""
    daemon = await daemons.start(poll_interval=0.2)
    first = await promise(app, "first")
    await daemon.hears("recall.settled", recall=first)
    await promise(app, "later", "recurring", 3600.0, 3600)
    file = tmp_path / "dump"
    await asyncio.to_thread(program, "pg_dump", "-f", file, database)
    await app.close()
    await asyncio.to_thread(postgres.drop_database, server, database)
    await daemon.hears("database.lost")
    name = sql.Identifier(str(conninfo_to_dict(database)["dbname"]))
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute(sql.SQL("create database {} template template0").format(name))
    await asyncio.to_thread(psql, database, "--single-transaction", "-f", file)
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("update session_recalls set trigger_at = now() where status = 'pending'")
    await daemon.hears("claims.held")
    assert len(endpoint.keys) == 1
    schema.migrate(database, here=True)
    await daemon.hears("claims.resumed")
    await daemon.until(lambda: len(endpoint.keys) == 2, what="the restored recall is called")
    assert await daemon.stop() == 0


@pytest.mark.slow
async def test_a_paused_worker(
    production: list[str], database: str, daemons: Daemons, endpoint: Endpoint, db: Connection
) -> None:
    """`run --paused`: it starts, posts nothing, says so everywhere; started again without, it
    posts."""
    daemon = await daemons.start("--paused", poll_interval=0.2)
    [held] = await daemon.hears("claims.held")
    assert held["reason"] == IS_PAUSED
    await eventually(db, "select from recall_workers where held = 'paused'")
    await db.execute("notify session_recalls")
    said = await asyncio.to_thread(operate, database, "workers")
    assert "paused" in said.out
    said = await asyncio.to_thread(operate, database, "why", production[0])
    assert "all live workers are paused" in " ".join(said.out.split())
    assert endpoint.keys == [] and daemon.told("recall.claimed") == []
    assert await daemon.stop() == 0
    daemon = await daemons.start(paused=0)
    for recall in production:
        await daemon.hears("recall.settled", recall=recall)
    assert await daemon.stop() == 0


@pytest.mark.slow
async def test_a_copy_is_allowed(
    production: list[str], database: str, empty_database: str, daemons: Daemons, tmp_path: Path
) -> None:
    """RECALL_ALLOW_COPY=1: whoever has changed the endpoint may let a single worker claim."""
    restored(database, empty_database, tmp_path)
    daemon = await daemons.start(dsn=empty_database, allow_copy=1)
    for recall in production:
        await daemon.hears("recall.settled", recall=recall)
    assert daemon.told("claims.held") == []
    assert await daemon.stop() == 0

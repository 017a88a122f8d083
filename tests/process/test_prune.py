"""RECALL_PRUNE: the daemon deletes what is over, beside its work, through outages, and stops when
it is told to."""

from __future__ import annotations

import asyncio
import signal

import psycopg
import pytest

from recall_worker.embedded import EmbeddedServer

from ..conftest import Connection, connected
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from .test_lease import eventually, promise, rows
from .test_ops import scrape, value
from .test_outage import own_server, replicas

__all__ = ["own_server", "replicas"]  # fixtures

OLD = """
insert into sessions select 'old' || n, 'ann' from generate_series(1, {n}) n on conflict do nothing;
insert into session_recalls (id, session_id, call_type, trigger_at, additional_context_message,
    status, created_at, updated_at)
select 'old' || n, 'old' || n, 'once', now() - interval '1 year', 'long ago', (array['fired',
    'cancelled', 'failed'])[1 + n % 3],
    now() - interval '1 year', now() - interval '1 year'
from generate_series(1, {n}) n on conflict do nothing;
"""
GONE = "select 1 where not exists (select from session_recalls where id like 'old%')"
PRUNED = ("fired", "cancelled", "failed")


@pytest.mark.slow
async def test_it_deletes_what_is_over_and_nothing_else(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Old rows go in the background, while recalls are called; an hour's are kept. It is told, and
    counted, and one replica does it."""
    await db.execute(OLD.format(n=3000).encode())
    fleet = [await daemons.start(prune="24s,calls=1h", ops_listen=0) for _ in range(2)]
    recalls = [await promise(app, f"s{n}") for n in range(20)]
    await eventually(db, GONE)
    await eventually(
        db, "select 1 where not exists (select from session_recalls where status = 'pending')"
    )
    assert {row["id"] for row in await rows(db, "select id from session_recalls")} == set(recalls)
    # Told when a walk is over, which is after its last row is gone.
    async with asyncio.timeout(20):
        while sum(e[kind] for d in fleet for e in d.told("rows.pruned") for kind in PRUNED) < 3000:  # noqa: ASYNC110 - of two daemons
            await asyncio.sleep(0.02)
    counted = dict.fromkeys(PRUNED, 0.0)
    for daemon in fleet:
        found = await scrape(daemon)
        told = daemon.told("rows.pruned")
        for kind in PRUNED:
            counted[kind] += value(found, "rows_pruned_total", kind=kind) or 0
            assert value(found, "rows_pruned_total", kind=kind) == sum(e[kind] for e in told)
        assert (value(found, "prune_duration_seconds_count") or 0) >= len(told)
        assert value(found, "stumbles_total", doing="prune") == 0
    assert counted == dict.fromkeys(PRUNED, 1000)
    # Both have worked all the while, and stop as ever.
    assert [await daemon.stop() for daemon in fleet] == [0, 0]


async def test_off_unless_it_is_switched_on(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Without RECALL_PRUNE nothing is deleted, and nobody takes a turn."""
    await db.execute(OLD.format(n=3).encode())
    daemon = await daemons.start()
    recall = await promise(app, "s")
    await daemon.hears("recall.settled", recall=recall)
    assert await daemon.stop() == 0
    assert daemon.told("rows.pruned") == [] and await rows(db, "select from recall_chores") == []
    assert len(await rows(db, "select from session_recalls")) == 4


@pytest.mark.slow
async def test_a_draining_worker_does_not_prune(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A run is open, the worker was told to stop: what becomes old meanwhile stays, and the run is
    settled."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    daemon = await daemons.start(prune="24s")
    await daemon.hears("rows.pruned")
    recall = await promise(app, "s")
    await gate.entered.wait()
    daemon.signal(signal.SIGTERM)
    await daemon.hears("worker.draining")
    # The walk that may have been under way is over when the pruner's connection is gone.
    walks = (
        "select from pg_stat_activity where datname = current_database() and query ~ "
        "'recall_chores' and pid <> pg_backend_pid()"
    )
    await eventually(db, f"select 1 where not exists ({walks})")
    told = len(daemon.told("rows.pruned"))
    await db.execute(OLD.format(n=3).encode())
    # Two of its pauses, which are of a second here.
    await db.execute("select pg_sleep(2.5)")
    assert len(daemon.told("rows.pruned")) == told and await rows(db, GONE) == []
    gate.open()
    await daemon.hears("recall.settled", recall=recall)
    assert await daemon.exit() == 0


@pytest.mark.slow
async def test_it_survives_an_outage(
    own_server: EmbeddedServer, replicas: Daemons, endpoint: Endpoint
) -> None:
    """PostgreSQL is killed in mid-walk: the pruner tells no outage of its own, and begins again
    when PostgreSQL is back."""

    def fill() -> None:
        with psycopg.connect(own_server.dsn(), autocommit=True) as conn:
            conn.execute(OLD.format(n=20_000).encode())

    await asyncio.to_thread(fill)
    daemon = await replicas.start(prune="24s", poll_interval=1)
    async with connected(own_server.dsn()) as db:
        await eventually(db, "select 1 where (select count(*) from session_recalls) < 19000")
    own_server.kill()
    await daemon.hears("database.lost")
    own_server.start()
    await daemon.hears("database.found")
    # The dead one's turn is its own, so it need not wait for it to lapse.
    async with connected(own_server.dsn()) as db:
        await eventually(db, GONE, within=60)
    assert len(daemon.told("database.lost")) == 1
    assert daemon.told("worker.error") == []
    assert await daemon.stop() == 0


@pytest.mark.full
async def test_work_does_not_wait_for_it(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """While hundreds of thousands of rows are being deleted, recalls are called within milliseconds
    of being due."""
    await db.execute(OLD.format(n=400_000).encode())
    daemon = await daemons.start(prune="24s", concurrency=20)
    await eventually(db, "select from recall_chores")
    for n in range(200):
        await promise(app, f"s{n}")
    settled = await daemon.hears("recall.settled", times=200, within=60)
    assert await rows(db, GONE) == [], "it was still at it"
    lags = sorted(event["lag_ms"] for event in settled)
    print(f"lag beside the pruner: p50 {lags[100]} ms, p99 {lags[198]} ms, most {lags[-1]} ms")
    assert lags[100] < 50

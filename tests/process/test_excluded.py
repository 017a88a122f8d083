"""A schema that comes to exclude this worker's code: the worker ends, with a status of its own, and
loses nothing."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from recall_worker.statements import generation

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate
from .test_lease import eventually, promise, rows

UNIT = Path(__file__).parent.parent.parent / "systemd" / "recall-worker.service"
EXCLUDE = "insert into recall_schema (version, name, oldest_code) values (9999, 'next', 9999)"
ADMIT = "delete from recall_schema where version = 9999"
EXCLUDED = 4


@pytest.mark.slow
async def test_a_running_worker_drains_and_ends(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """At its next heartbeat it says so, claims no more, lets the open run end, settles it, and ends
    with 4."""
    gate = Gate()
    endpoint.script("open", gate)
    daemon = await daemons.start(lease=5)
    await promise(app, "open", "once")
    await gate.entered.wait()
    await db.execute(EXCLUDE.encode())
    [told] = await daemon.hears("schema.refused", within=15)
    assert "works with code from generation 9999 on" in told["reason"]
    assert told["hint"] == "upgrade recall-worker on this host"
    await daemon.hears("worker.draining")
    await promise(app, "later", "once")
    await eventually(
        db, "select 1 from session_recalls where session_id = 'later' and trigger_at < now()"
    )
    gate.open()
    assert await daemon.exit() == EXCLUDED
    assert len(daemon.told("schema.refused")) == 1
    assert [line.partition(":")[0] for line in daemon.talk] == ["Error", "Try"]
    assert "works with code from generation 9999 on" in daemon.talk[0]
    found = await rows(
        db, "select session_id, status, lease from session_recalls order by session_id"
    )
    assert [(row["session_id"], row["status"]) for row in found] == [
        ("later", "pending"),
        ("open", "fired"),
    ]
    assert [row["lease"] for row in found] == [None, None] and len(endpoint.of("later")) == 0
    assert await rows(db, "select 1 from recall_workers") == []


@pytest.mark.slow
async def test_the_drain_has_its_time(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A run that outlasts RECALL_DRAIN_TIMEOUT is given back, for a worker that the schema
    admits."""
    gate = Gate()
    endpoint.script("open", gate)
    daemon = await daemons.start(lease=5, drain_timeout=1)
    await promise(app, "open", "once")
    await gate.entered.wait()
    await db.execute(EXCLUDE.encode())
    await daemon.hears("worker.released", within=15, runs=1)
    assert await daemon.exit() == EXCLUDED
    assert await rows(
        db, "select 1 from session_recalls where status = 'pending' and lease is null"
    )


@pytest.mark.slow
async def test_a_signal_in_that_drain_does_not_cut_it_short(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """SIGTERM in the middle of it, as a rollout sends it, is a first signal: the run still ends by
    itself."""
    gate = Gate()
    endpoint.script("open", gate)
    daemon = await daemons.start(lease=5)
    recall = await promise(app, "open", "once")
    await gate.entered.wait()
    await db.execute(EXCLUDE.encode())
    await daemon.hears("worker.draining", within=15)
    daemon.signal(signal.SIGTERM)
    await db.execute("select pg_sleep(0.5)")
    assert daemon.told("worker.hurried") == []
    gate.open()
    await daemon.hears("recall.settled", recall=recall, status="fired")
    assert await daemon.exit() == EXCLUDED


@pytest.mark.slow
async def test_a_worker_that_starts(db: Connection, daemons: Daemons) -> None:
    """The same status at the start, before anything is claimed; and the units don't start it
    again."""
    await db.execute(EXCLUDE.encode())
    daemon = await daemons.start(ready=False)
    assert await daemon.exit() == EXCLUDED
    assert [event["event"] for event in daemon.events] == ["schema.refused"]
    [listed] = re.findall(
        r"^RestartPreventExitStatus=(.*)$", UNIT.read_text(encoding="utf-8"), re.M
    )
    assert str(EXCLUDED) in listed.split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("away", "back"),
    [
        (
            "alter table recall_schema rename to elsewhere",
            "alter table elsewhere rename to recall_schema",
        ),
        (
            "update recall_schema set version = -version",
            "update recall_schema set version = -version",
        ),
    ],
    ids=["missing", "older"],
)
async def test_a_schema_that_is_being_restored(
    away: str, back: str, app: Application, db: Connection, daemons: Daemons
) -> None:
    """A schema that is missing, or older, at a heartbeat ends nobody: somebody restores it, and the
    work goes on."""
    daemon = await daemons.start(lease=5)
    await db.execute(away.encode())
    await db.execute("update recall_workers set seen_at = now() - interval '1 hour'")
    await eventually(db, "select 1 from recall_workers where seen_at > now() - interval '1 minute'")
    await db.execute(back.encode())
    await daemon.hears("recall.settled", recall=await promise(app, "s", "once"))
    assert daemon.told("schema.refused") == []
    assert await daemon.stop() == 0


@pytest.mark.slow
async def test_what_an_outage_hid_is_seen_at_its_end(
    db: Connection, database: str, daemons: Daemons
) -> None:
    """After an outage the schema is looked at at once, and not at the next heartbeat a minute
    later."""
    daemon = await daemons.start(lease=60)
    await db.execute("update recall_workers set started_at = now()")
    # Past the first beats, which come sooner.
    await eventually(
        db, "select 1 from recall_workers where now() > started_at + interval '6 seconds'"
    )
    await db.execute(EXCLUDE.encode())
    await db.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = "
        "current_database() and pid <> pg_backend_pid()"
    )
    await daemon.hears("schema.refused", within=15)
    assert await daemon.exit() == EXCLUDED


def test_the_generation_is_below() -> None:
    assert generation() < 9999

"""Workers whose tzdata differ: an old package, made for the test, beside the one that is
installed."""

from __future__ import annotations

import asyncio
import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tzdata

from tests.conftest import Connection
from tests.support.application import Application
from tests.support.daemon import Daemons
from tests.support.endpoint import Endpoint, Gate
from tests.test_cli import operate, process

NEW = "Europe/Berlin"
"""The zone that the old package lacks."""
OLD = "2020a"


CHANGED, BEFORE = "Asia/Tokyo", "Asia/Shanghai"
"""A zone that has the clocks of another one in the old package: one hour behind."""


@pytest.fixture
def old_tzdata(tmp_path: Path) -> str:
    """A PYTHONPATH by which a process finds an older tzdata, without the zone NEW, and with other
    clocks in CHANGED."""
    package = tmp_path / "old" / "tzdata"
    shutil.copytree(Path(tzdata.__file__).parent, package)
    shutil.copy(package / "zoneinfo" / BEFORE, package / "zoneinfo" / CHANGED)
    zones = package / "zones"
    zones.write_text(zones.read_text().replace(f"{NEW}\n", ""))
    (package / "zoneinfo" / NEW).unlink()
    (package / "__init__.py").write_text(f'IANA_VERSION = "{OLD}"\n__version__ = "2020.1"\n')
    return str(package.parent)


async def put(db: Connection, app: Application, id: str, zone: str, due: timedelta) -> None:
    """An hourly cron recall in a zone, as a worker has planned it."""
    await app.create_session(id, "ann")
    await db.execute(
        """insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds,
               additional_context_message, status, created_at, updated_at, cadence, cron, time_zone)
           values (%s, %s, 'recurring', %s, 3600, 'm', 'pending', now(), now(), 'cron',
               '0 * * * *', %s)""",
        [id, id, datetime.now(UTC) + due, zone],
    )


async def row(db: Connection, id: str) -> dict[str, Any]:
    found = await (await db.execute("select * from session_recalls where id = %s", [id])).fetchone()
    assert found is not None
    return found


DUE, MOVED, IN_A_RUN = timedelta(seconds=-5), timedelta(hours=1), timedelta(minutes=-1)


@pytest.mark.slow
async def test_a_zone_that_only_others_know(
    app: Application,
    db: Connection,
    database: str,
    endpoint: Endpoint,
    daemons: Daemons,
    old_tzdata: str,
) -> None:
    """A worker whose tzdata lacks a zone leaves its recalls alone, loudly, unsent and unended;
    other recalls are run, and a zone that nobody knows ends its recall."""
    await put(db, app, "new", NEW, DUE)
    await put(db, app, "moved", NEW, MOVED)
    # As a row that was never planned: an edit would keep the distance.
    await db.execute(
        "update session_recalls set interval_seconds = null, edits = 1 where id = 'moved'"
    )
    await put(db, app, "bogus", "Mars/Olympus", DUE)
    await put(db, app, "plain", "Asia/Kolkata", DUE)
    # Taken up from a dead worker while the API still runs it: polling is left to others, too.
    await put(db, app, "accepted", NEW, IN_A_RUN)
    await db.execute(
        """update session_recalls set lease = gen_random_uuid(), leased_by = 'dead', attempt = 1,
               leased_at = now() - interval '1 minute', lease_until = now() - interval '50 seconds',
               run_reference = '/runs/1', delivered_at = now() where id = 'accepted'"""
    )
    daemons.environ["PYTHONPATH"] = old_tzdata
    old = await daemons.start(lease=3)
    del daemons.environ["PYTHONPATH"]
    for id in ("new", "moved", "accepted"):
        [told] = await old.hears("recall.stranded", recall=id)
        assert f"{NEW!r} is not in tzdata {OLD}" in told["error"]
    await old.hears("recall.settled", recall="plain", outcome="answered")
    await old.hears("recall.settled", recall="bogus", outcome="malformed")
    assert {request.session for request in endpoint.requests} == {"plain"}
    for id in ("new", "moved", "accepted"):
        left = await row(db, id)
        assert (left["status"], left["occurrence"], left["rekey"]) == ("pending", 1, 0)
    assert (await row(db, "accepted"))["run_reference"] == "/runs/1"
    assert (await row(db, "bogus"))["status"] == "failed"

    said = process(database, "why", "new", environ={"PYTHONPATH": old_tzdata}).stdout
    assert f"its time zone {NEW!r} is not in tzdata {OLD} of this host, and others know it" in said
    said = operate(database, "why", "new").out
    assert "given back unsent: its time zone is not known to this worker" in said

    young = await daemons.start(lease=3)
    await young.hears("recall.settled", recall="new", outcome="answered")
    await endpoint.count(1, "new")
    told_twice = [e["recall"] for e in old.told("recall.stranded")]
    assert sorted(told_twice) == ["accepted", "moved", "new"], "each is told once a minute at most"
    await one_row_is(db, "moved", "interval_seconds", 3600)
    assert (await row(db, "moved"))["status"] == "pending"
    examined = await asyncio.to_thread(
        process, database, "doctor", "--json", environ={"RECALL_RUN_URL": endpoint.url}
    )
    seen = [finding["seen"] for finding in json.loads(examined.stdout)["checks"]]
    assert f"live workers differ in tzdata: {OLD}, {tzdata.IANA_VERSION}" in seen


@pytest.mark.slow
async def test_edited_in_mid_run_to_a_zone_that_only_others_know(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons, old_tzdata: str
) -> None:
    """The run's end leaves the next moment to a worker that knows the zone."""
    await put(db, app, "edited", "Europe/London", DUE)
    gate = Gate()
    endpoint.script("edited", gate)
    daemons.environ["PYTHONPATH"] = old_tzdata
    old = await daemons.start()
    del daemons.environ["PYTHONPATH"]
    await gate.entered.wait()
    await db.execute("update session_recalls set time_zone = %s where id = 'edited'", [NEW])
    gate.open()
    await old.hears("recall.settled", recall="edited", outcome="answered", status="pending")
    left = await row(db, "edited")
    assert (left["status"], left["occurrence"], left["edit_of"]) == ("pending", 2, 2)
    await old.hears("recall.stranded", recall="edited")
    await daemons.start()
    await one_row_is(db, "edited", "edit_of", None)
    planned = await row(db, "edited")
    assert (planned["status"], planned["occurrence"], planned["skips"]) == ("pending", 2, 0)
    assert planned["zone_data"] == tzdata.IANA_VERSION
    assert planned["trigger_at"] > left["edited_at"] and planned["trigger_at"].minute == 0
    assert [request.key for request in endpoint.requests] == ["edited:1"]


@pytest.mark.slow
async def test_newer_tzdata_plans_anew(
    app: Application,
    db: Connection,
    database: str,
    daemons: Daemons,
    old_tzdata: str,
) -> None:
    """What waits for a moment of its cron expression waits for the nearest by the newer data, with
    its jitter; a chosen time stands, and so do called and due occurrences, and what is still a
    tick. An older worker does not plan back, and plans what follows by what it knows."""

    async def made(id: str, zone: str, *words: str) -> None:
        await app.create_session(id, "ann")
        words = ("--cron", "30 9 1 1 *", "--tz", zone, *words)
        done = await asyncio.to_thread(
            process, database, "schedule", id, "m", *words, environ={"PYTHONPATH": old_tzdata}
        )
        assert done.returncode == 0, done.stderr
        await db.execute("update session_recalls set id = session_id where session_id = %s", [id])

    await made("waits", CHANGED)
    await made("spread", CHANGED, "--jitter", "1h")
    await made("named", CHANGED)
    await made("odd", CHANGED)
    await made("called", CHANGED)
    await made("same", "Europe/London")
    await made("hourly", "Europe/London", "--cron", "7 * * * *")
    year = datetime.now(UTC).year + 1
    nominal = datetime(year, 1, 1, 1, 30, tzinfo=UTC)
    rows = {id: await row(db, id) for id in ("waits", "spread", "named", "odd", "called", "same")}
    assert rows["waits"]["trigger_at"] == nominal and rows["waits"]["zone_data"] == OLD
    moved = nominal + timedelta(hours=5)
    words = ("reschedule", "named", "--at", moved.isoformat())
    assert (await asyncio.to_thread(process, database, *words)).returncode == 0
    # Named before zone data was written: known by being off the ticks of any zone.
    await db.execute(
        """update session_recalls set trigger_at = trigger_at + interval '7 minutes',
               planned_at = trigger_at + interval '7 minutes',
               scheduled_for = trigger_at + interval '7 minutes', zone_data = null,
               edits = edits + 1 where id = 'odd'"""
    )
    await db.execute("update session_recalls set begun_at = now() where id = 'called'")

    daemons.environ["PYTHONPATH"] = old_tzdata
    old = await daemons.start()
    del daemons.environ["PYTHONPATH"]
    young = await daemons.start()
    for id in ("waits", "spread"):
        [told] = await young.hears("recall.replanned", recall=id)
        assert told["tzdata"] == tzdata.IANA_VERSION and told["time_zone"] == CHANGED
    await one_row_is(db, "same", "zone_data", tzdata.IANA_VERSION)
    now = {id: await row(db, id) for id in rows}
    earlier = nominal - timedelta(hours=1)
    for id in ("waits", "spread"):
        assert now[id]["trigger_at"] == now[id]["planned_at"]
        assert rows[id]["trigger_at"] - now[id]["trigger_at"] == timedelta(hours=1)
        assert (now[id]["scheduled_for"] or now[id]["trigger_at"]) == earlier
        assert (now[id]["occurrence"], now[id]["skips"]) == (1, 0)
    assert now["named"]["trigger_at"] == moved
    assert now["odd"]["trigger_at"] == nominal + timedelta(minutes=7)
    for id in ("called", "same"):
        assert now[id]["trigger_at"] == rows[id]["trigger_at"]
    assert {id: r["zone_data"] for id, r in now.items()} == dict.fromkeys(rows, tzdata.IANA_VERSION)
    assert old.told("recall.replanned") == [] and len(young.told("recall.replanned")) == 2

    # The older worker alone leaves it so; what it plans itself says by which data.
    assert await young.stop() == 0
    await old.stop()
    daemons.environ["PYTHONPATH"] = old_tzdata
    old = await daemons.start()
    await db.execute(
        """update session_recalls set trigger_at = now(), planned_at = now(), scheduled_for = null,
               edits = edits + 1 where id = 'hourly'"""
    )
    await db.execute("select pg_notify('session_recalls', '')")
    await old.hears("recall.settled", recall="hourly", outcome="answered")
    assert (await row(db, "hourly"))["zone_data"] == OLD
    assert (await row(db, "waits"))["trigger_at"] == earlier
    assert old.told("recall.replanned") == []


async def one_row_is(db: Connection, id: str, column: str, value: object) -> None:
    """Wait until a column has this value."""
    async with asyncio.timeout(20):
        while (await row(db, id))[column] != value:
            await db.execute("select pg_sleep(0.02)")

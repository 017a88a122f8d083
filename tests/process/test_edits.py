"""Schedules that people edit while they wait and while they run, as it was reported: the real
command line, the application's own SQL, the real daemon.

Every edit in every state is in tests/test_edits.py.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint, Gate, reply
from ..support.passing import let_pass
from ..test_cli import Said, operate
from .test_cadence import nominal, one, told
from .test_lease import calls, eventually, rows

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
IDLE = "select 1 as idle from session_recalls where id = %s and lease is null and occurrence = %s"


async def put(db: Connection, session: str, trigger: str = "now()", **columns: Any) -> str:
    """A recall as plain SQL writes it, recurring if nothing else is told; `trigger` is an SQL
    expression."""
    row = {"id": f"r-{session}", "call_type": "recurring"} | columns
    await db.execute("insert into sessions values (%s, 'ann')", [session])
    await db.execute(
        f"""insert into session_recalls (session_id, trigger_at, additional_context_message, status,
            created_at, updated_at, {", ".join(row)})
        values (%s, {trigger}, 'look', 'pending', now(), now(), {", ".join(["%s"] * len(row))})
        """.encode(),
        [session, *row.values()],
    )
    return str(row["id"])


async def command(dsn: str, *words: str) -> Said:
    return await asyncio.to_thread(operate, dsn, *words)


async def looked(db: Connection, daemon: Daemon) -> None:
    """The daemon has looked at everything that is due or moved by now: another recall of ours has
    come and gone, twice, as it looks for moved ones after its claims."""
    for _ in range(2):
        n = len(daemon.told("recall.settled"))
        session = f"other-{n}"
        await put(db, session, call_type="once", cadence="interval")
        await daemon.hears("recall.settled", session=session)
        await db.execute("delete from sessions where id = %s", [session])


def at(row: dict[str, Any], name: str = "trigger_at") -> datetime:
    found: datetime = row[name]
    return found.astimezone(UTC)


def next_nine(after: datetime, weekdays: range = range(7)) -> datetime:
    """The next nine o'clock in UTC, on one of these weekdays."""
    nine = after.astimezone(UTC).replace(hour=9, minute=0, second=0, microsecond=0)
    while nine <= after or nine.weekday() not in weekdays:
        nine += DAY
    return nine


# --- in mid-run -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "edit", "status", "occurrence", "distance"),
    [
        ({"times": 1}, "times = 10", "pending", 2, 3600),
        ({}, "times = 1", "fired", 1, None),
        ({}, "interval_seconds = 7200", "pending", 2, 7200),
        ({}, "until_at = now() + interval '10 minutes'", "fired", 1, None),
        ({}, "call_type = 'once'", "fired", 1, None),
        (
            {"call_type": "once", "interval_seconds": None},
            "call_type = 'recurring', interval_seconds = 1800",
            "pending",
            2,
            1800,
        ),
    ],
    ids=["times more", "times fewer", "interval", "until", "once", "recurring"],
)
async def test_edited_in_mid_run(
    before: dict[str, Any],
    edit: str,
    status: str,
    occurrence: int,
    distance: int | None,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """What was written during the run decides what follows it, not what the claim had read."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start()
    row = {"cadence": "interval", "interval_seconds": 3600, **before}
    id = await put(db, "s", **row)
    await gate.entered.wait()
    await db.execute(f"update session_recalls set {edit} where id = %s".encode(), [id])
    began = datetime.now(UTC)
    gate.open()
    await daemon.hears("recall.settled", recall=id, status=status)
    found = await one(db, "s")
    assert (found["status"], found["occurrence"]) == (status, occurrence)
    if distance is not None:
        assert began < at(found) - timedelta(seconds=distance) < began + timedelta(seconds=20)
    assert endpoint.keys == [f"{id}:1"]


@pytest.mark.slow
@pytest.mark.parametrize("cadence", ["interval", "grid", "cron"])
async def test_a_named_time_in_mid_run_is_no_skip(
    cadence: str, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """An hourly recall that `reschedule` moves in mid-run by three hours: occurrence 2 comes at
    that time, and no number is left out."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    daemon = await daemons.start()
    id = await put(
        db,
        "s",
        "date_trunc('minute', now())",
        cadence=cadence,
        interval_seconds=3600,
        cron=f"{datetime.now(UTC).minute} * * * *" if cadence == "cron" else None,
    )
    await gate.entered.wait()
    named = at(await one(db, "s")) + 3 * HOUR
    said = await command(database, "reschedule", id, "--at", named.isoformat())
    assert said.status == 0, said.err
    gate.open()
    await daemon.hears("recall.settled", recall=id)
    await looked(db, daemon)
    found = await one(db, "s")
    assert (found["status"], found["occurrence"], at(found)) == ("pending", 2, named)
    await let_pass(db, id, 180)
    await daemon.hears("recall.settled", recall=id, times=2)
    assert [r.key for r in endpoint.of("s")] == [f"{id}:1", f"{id}:2"]
    assert (told(endpoint, "s")[1]["missed"], (await one(db, "s"))["occurrence"]) == (0, 3)


@pytest.mark.slow
async def test_the_last_run_can_not_be_rescheduled(
    database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Where no occurrence is left for the time that is named, it is refused and says what to do;
    the run is not touched."""
    gates = {name: Gate() for name in ("once", "times", "until")}
    for name, gate in gates.items():
        endpoint.script(name, gate)
    daemon = await daemons.start()
    await put(db, "once", call_type="once", cadence="interval")
    await put(db, "times", cadence="interval", interval_seconds=3600, times=1)
    await put(
        db,
        "until",
        cadence="interval",
        interval_seconds=3600,
        until_at=datetime.now(UTC) + HOUR,
    )
    for name, gate in gates.items():
        await gate.entered.wait()
        said = await command(database, "reschedule", f"r-{name}", "--in", "2h")
        assert said.status == 1 and f"r-{name}" in said.err, said
    for gate in gates.values():
        gate.open()
    for name in gates:
        await daemon.hears("recall.settled", session=name)
    assert (await one(db, "once"))["status"] == (await one(db, "times"))["status"] == "fired"
    assert len(endpoint.requests) == 3


UPSERT = """
insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds,
    internal_comment, additional_context_message, status, created_at, updated_at)
values (%(id)s, 's', %(call_type)s, %(at)s, %(interval)s, null, 'look again', 'pending', now(),
    now())
on conflict (id) do """


@pytest.mark.slow
@pytest.mark.parametrize("call_type", ["once", "recurring"])
@pytest.mark.parametrize(
    "does", ["update set trigger_at = excluded.trigger_at", "nothing"], ids=["update", "nothing"]
)
async def test_an_upsert_by_id_in_mid_run(
    call_type: str, does: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The application's upsert of the recall that is being run: the trigger on insert leaves that
    row alone. `do update` moves it as its own SQL does, `do nothing` does nothing."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    daemon = await daemons.start()
    interval = 3600 if call_type == "recurring" else None
    id = await put(db, "s", call_type=call_type, cadence="interval", interval_seconds=interval)
    await gate.entered.wait()
    was = await one(db, "s")
    named = datetime.now(UTC) + timedelta(minutes=17)
    values = {"id": id, "call_type": call_type, "at": named, "interval": interval}
    await db.execute((UPSERT + does).encode(), values)
    found = await one(db, "s")
    moved = does != "nothing"
    assert found["status"] == "pending" and found["lease"] == was["lease"]
    assert found["trigger_at"] == (named if moved else was["trigger_at"])
    gate.open()
    await daemon.hears("recall.settled", recall=id)
    found = await one(db, "s")
    if moved:
        assert (found["status"], found["occurrence"], at(found)) == ("pending", 2, named)
    elif call_type == "once":
        assert (found["status"], found["occurrence"]) == ("fired", 1)
    else:
        assert (found["status"], found["occurrence"]) == ("pending", 2)
    assert endpoint.keys == [f"{id}:1"]


@pytest.mark.slow
@pytest.mark.parametrize("call_type", ["once", "recurring"])
async def test_an_upsert_by_session_in_mid_run(
    call_type: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The application's upsert by session: beside a one-shot that is being run the session gets its
    next recall, a recurring one is moved."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    daemon = await daemons.start()
    interval = 3600 if call_type == "recurring" else None
    id = await put(db, "s", call_type=call_type, cadence="interval", interval_seconds=interval)
    await gate.entered.wait()
    named = datetime.now(UTC) + timedelta(minutes=17)
    values = {"id": "r-2", "call_type": "once", "at": named, "interval": None}
    upsert = UPSERT.replace("(id) do", "(session_id) where status = 'pending' do")
    await db.execute(
        f"{upsert} update set trigger_at = excluded.trigger_at, updated_at = now()".encode(), values
    )
    gate.open()
    await daemon.hears("recall.settled", recall=id)
    found = await rows(db, "select * from session_recalls order by id")
    states = [(r["id"], r["status"], r["occurrence"]) for r in found]
    if call_type == "once":
        assert states == [("r-2", "pending", 1), (id, "fired", 1)]
    else:
        assert states == [(id, "pending", 2)]
    [waiting] = [r for r in found if r["status"] == "pending"]
    assert at(waiting) == named


# --- while it waits -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("weekdays", [range(5), range(3), range(3, 7)], ids=str)
async def test_an_edited_expression_counts_at_once(
    weekdays: range, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """`0 9 * * *` changed to some weekdays only: `preview` shows the first of those, before and
    after a worker has planned it, and none by the old expression comes first."""
    now = datetime.now(UTC)
    id = await put(
        db,
        "s",
        "now()",
        cadence="cron",
        cron="0 9 * * *",
        interval_seconds=None,
    )
    daemon = await daemons.start()
    await eventually(
        db, "select 1 as ok from session_recalls where id = %s and interval_seconds > 0", [id]
    )
    assert at(await one(db, "s")) == next_nine(now)
    await daemon.stop()
    names = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
    edited = f"0 9 * * {','.join(names[n] for n in weekdays)}"
    if weekdays == range(5):
        edited = "0 9 * * mon-fri"
    await db.execute("update session_recalls set cron = %s where id = %s", [edited, id])
    first = next_nine(datetime.now(UTC), weekdays)

    async def previewed() -> datetime:
        said = await command(database, "preview", id, "--json", "--count", "2")
        assert said.status == 0, said.err
        times = [datetime.fromisoformat(moment["at"]) for moment in said.document["occurrences"]]
        assert times[1] == next_nine(times[0], weekdays)
        return times[0]

    assert await previewed() == first
    daemon = await daemons.start()
    await looked(db, daemon)
    found = await one(db, "s")
    assert (at(found), found["occurrence"], found["status"]) == (first, 1, "pending")
    assert await previewed() == first
    assert endpoint.of("s") == []


@pytest.mark.slow
async def test_a_named_time_is_no_skip(
    database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The only occurrence of a daily recall, moved by a day: it still comes, as occurrence 1, at
    the time that was named."""
    await db.execute("insert into sessions values ('f5', 'ann')")
    daemon = await daemons.start()
    tomorrow = next_nine(datetime.now(UTC) + DAY)
    first, second = tomorrow.isoformat(), (tomorrow + DAY).isoformat()
    words = ("--cron", "0 9 * * *", "--times", "1", "--at", first, "--json")
    said = await command(database, "schedule", "f5", "x", *words)
    assert said.status == 0, said.err
    id = (await one(db, "f5"))["id"]
    said = await command(database, "reschedule", id, "--at", second)
    assert said.status == 0, said.err
    await looked(db, daemon)
    found = await one(db, "f5")
    assert (found["status"], found["occurrence"]) == ("pending", 1), found["reason"]
    assert at(found) == tomorrow + DAY
    days = (tomorrow + DAY - datetime.now(UTC)) // DAY + 1
    await let_pass(db, id, days * 1440)
    await daemon.hears("recall.settled", recall=id, status="fired")
    assert [request.key for request in endpoint.of("f5")] == [f"{id}:1"]
    assert (await one(db, "f5"))["reason"] == "it had its one occurrence"


@pytest.mark.slow
@pytest.mark.parametrize("cadence", ["interval", "grid", "cron"])
async def test_none_is_missed_past_the_end(
    cadence: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Due 48 hours ago, hourly, with an end three hours later: the run stands for three more, and
    the recall is over."""
    daemon = await daemons.start()
    now = datetime.now(UTC).replace(second=0, microsecond=0)
    id = await put(
        db,
        "s",
        "date_trunc('minute', now()) - interval '48 hours'",
        cadence=cadence,
        interval_seconds=3600,
        cron=f"{now.minute} * * * *" if cadence == "cron" else None,
        until_at=now - 45 * HOUR + timedelta(minutes=2),
    )
    await daemon.hears("recall.settled", recall=id)
    assert [(r["occurrence"], r["missed"]) for r in told(endpoint, "s")] == [(1, 3)]
    assert [c["missed"] for c in await calls(db, id)] == [3]
    found = await one(db, "s")
    assert found["status"] == "fired" and "where it ends" in found["reason"]


# --- fire -----------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_an_extra_run_leaves_what_is_planned(
    database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A daily cron recall, fired twice: two extra runs under keys of their own, with their own
    times; what was planned comes as it was planned, as the same occurrence."""
    daemon = await daemons.start()
    id = await put(db, "s", "now()", cadence="cron", cron="0 9 * * *", times=1)
    await eventually(
        db, "select 1 as ok from session_recalls where id = %s and interval_seconds > 0", [id]
    )
    planned = await one(db, "s")
    for n in (1, 2):
        began = datetime.now(UTC)
        said = await command(database, "fire", id)
        assert said.status == 0, said.err
        await daemon.hears("recall.settled", recall=id, outcome="answered", times=n)
        [*_, request] = endpoint.of("s")
        assert request.key == f"{id}:1.f{n}"
        recall = request.document["recall"]
        assert (recall["occurrence"], recall["missed"]) == (1, 0)
        assert began - timedelta(seconds=1) < nominal(recall) <= datetime.now(UTC)
        found = await one(db, "s")
        same = ("status", "occurrence", "trigger_at", "planned_at", "scheduled_for", "attempt")
        assert {name: found[name] for name in same} == {name: planned[name] for name in same}
        assert found["lease"] is None and found["lease_until"] is None
    assert [(c["occurrence"], c["rekey"]) for c in await calls(db, id)] == [(1, -2), (1, -1)]
    days = (at(planned) - datetime.now(UTC)) // DAY + 1
    await let_pass(db, id, days * 1440)
    await daemon.hears("recall.settled", recall=id, status="fired")
    assert [r.key for r in endpoint.of("s")] == [f"{id}:1.f1", f"{id}:1.f2", f"{id}:1"]


@pytest.mark.slow
async def test_an_extra_run_begins_the_interval_anew(
    database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """On an interval the next occurrence comes one interval after the extra run, with its own
    number."""
    daemon = await daemons.start()
    id = await put(db, "s", "now() + interval '10 minutes'", cadence="interval",
                   interval_seconds=3600)  # fmt: skip
    said = await command(database, "fire", id)
    assert said.status == 0, said.err
    await daemon.hears("recall.settled", recall=id)
    now, found = datetime.now(UTC), await one(db, "s")
    assert (found["status"], found["occurrence"]) == ("pending", 1)
    assert now - timedelta(seconds=20) < at(found) - HOUR <= now
    assert endpoint.keys == [f"{id}:1.f1"]


@pytest.mark.slow
@pytest.mark.parametrize("cadence", ["interval", "grid"])
async def test_an_extra_run_gives_way_to_what_is_planned(
    cadence: str, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The session is busy until after the planned moment: the extra run is dropped, and the planned
    one comes at its time, under its own key."""
    endpoint.script("s", reply(409, headers={"retry-after": "3600"}), reply())
    daemon = await daemons.start()
    id = await put(db, "s", "now() + interval '10 minutes'", cadence=cadence, interval_seconds=3600)
    planned = at(await one(db, "s"))
    said = await command(database, "fire", id)
    assert said.status == 0, said.err
    await daemon.hears("recall.settled", recall=id)
    found = await one(db, "s")
    assert (at(found), found["lease_until"], found["occurrence"]) == (planned, None, 1)
    await let_pass(db, id, 10)
    await daemon.hears("recall.settled", recall=id, times=2)
    assert endpoint.keys == [f"{id}:1.f1", f"{id}:1"]
    assert (await one(db, "s"))["occurrence"] == 2


@pytest.mark.slow
async def test_an_extra_run_of_a_busy_session_waits(
    database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Busy for a second, hours before the planned moment: the extra run comes again, under the same
    key."""
    endpoint.script("s", reply(409, headers={"retry-after": "1"}), reply())
    daemon = await daemons.start()
    id = await put(db, "s", "now() + interval '5 hours'", cadence="grid", interval_seconds=86_400)
    planned = at(await one(db, "s"))
    assert (await command(database, "fire", id)).status == 0
    await daemon.hears("recall.settled", recall=id, times=2)
    assert endpoint.keys == [f"{id}:1.f1", f"{id}:1.f1"]
    found = await one(db, "s")
    assert (at(found), found["occurrence"], found["lease_until"]) == (planned, 1, None)


@pytest.mark.slow
async def test_a_worker_that_dies_in_an_extra_run(
    database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Another worker takes the extra run up when its lease ends, under the same key with the same
    body; what is planned stays."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    first = await daemons.start(lease=2)
    id = await put(db, "s", "now() + interval '5 hours'", cadence="grid", interval_seconds=86_400)
    planned = at(await one(db, "s"))
    assert (await command(database, "fire", id)).status == 0
    await gate.entered.wait()
    second = await daemons.start(lease=2)
    await first.kill()
    await second.hears("lease.taken", recall=id, worker_before=first.name)
    await second.hears("recall.settled", recall=id, outcome="answered")
    one_call, two_call = endpoint.requests
    assert one_call.key == two_call.key == f"{id}:1.f1"
    assert one_call.body == two_call.body
    found = await one(db, "s")
    assert (at(found), found["occurrence"], found["lease_until"]) == (planned, 1, None)
    assert (found["status"], found["attempt"]) == ("pending", 0)


# --- the application's table ----------------------------------------------------------------------


async def test_the_application_widens_its_column(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """`alter column interval_seconds type bigint` is the application's own business: no trigger
    stands in its way, and edits count as before."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start()
    await db.execute("alter table session_recalls alter column interval_seconds type bigint")
    id = await put(db, "s", cadence="interval", interval_seconds=3600)
    await gate.entered.wait()
    await db.execute("update session_recalls set interval_seconds = 7200 where id = %s", [id])
    gate.open()
    await daemon.hears("recall.settled", recall=id)
    found = await one(db, "s")
    assert at(found) - datetime.now(UTC) > timedelta(minutes=110)

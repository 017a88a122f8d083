"""Recurring recalls against the daemon: grid and cron, missed and overlapping occurrences, ends,
and the application's own hand on them."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from recall_worker import Recalls

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from .test_lease import calls, eventually, rows


async def put(db: Connection, session: str, trigger: str = "now()", **columns: Any) -> str:
    """A recurring recall as plain SQL writes it; `trigger` is an SQL expression."""
    row = {"id": f"r-{session}", "cadence": "grid", "interval_seconds": None} | columns
    await db.execute("insert into sessions values (%s, 'ann') on conflict do nothing", (session,))
    await db.execute(
        f"""insert into session_recalls (session_id, call_type, trigger_at,
            additional_context_message, status, created_at, updated_at,
            {", ".join(row)}) values (%s, 'recurring', {trigger}, 'look', 'pending', now(), now(),
                {", ".join(["%s"] * len(row))})""".encode(),
        [session, *row.values()],
    )
    return str(row["id"])


async def one(db: Connection, session: str) -> dict[str, Any]:
    (found,) = await rows(db, "select * from session_recalls where session_id = %s", [session])
    return found


def told(endpoint: Endpoint, session: str) -> list[dict[str, Any]]:
    """What each request said of its recall."""
    return [request.document["recall"] for request in endpoint.of(session)]


def nominal(recall: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(recall["scheduled_for"])


# --- grid -----------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_grid_does_not_drift(db: Connection, endpoint: Endpoint, daemons: Daemons) -> None:
    """However long its runs take, occurrences fall on the first trigger and whole intervals from
    it, and end after so many."""

    async def slow(_: object) -> Any:
        await asyncio.sleep(0.3)
        return reply()

    endpoint.default = slow
    daemon = await daemons.start()
    id = await put(db, "s", "now() + interval '0.5 s'", interval_seconds=1, times=4)
    first = (await one(db, "s"))["trigger_at"]
    await daemon.hears("recall.settled", recall=id, status="fired")
    found = told(endpoint, "s")
    assert [r["occurrence"] for r in found] == [1, 2, 3, 4]
    # On a machine that stands still for a second a moment is missed, and told; the grid stays where
    # it was.
    gaps = [(nominal(r) - first).total_seconds() for r in found]
    assert gaps == [float(round(gap)) for gap in gaps] and gaps[0] == 0
    for before, after in pairwise(found):
        assert nominal(after) - nominal(before) == timedelta(seconds=1 + before["missed"])
    last = await one(db, "s")
    assert (last["status"], last["reason"]) == ("fired", "it had all of its 4 occurrences")


@pytest.mark.slow
async def test_what_falls_due_during_a_run_is_told_to_the_next(
    db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A run over several intervals: its successor is due at once, stands for the first of them, and
    says how many more there were."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    daemon = await daemons.start()
    id = await put(db, "s", interval_seconds=1, times=2)
    await gate.entered.wait()
    await eventually(
        db,
        "select 1 as ok from session_recalls where id = %s and now() > trigger_at + interval "
        "'2.2 s'",
        [id],
    )
    gate.open()
    await daemon.hears("recall.settled", recall=id, status="fired")
    first, second = told(endpoint, "s")
    assert nominal(second) - nominal(first) == timedelta(seconds=1 + first["missed"])
    assert first["missed"] + second["missed"] >= 1
    assert [c["missed"] for c in await calls(db, id)] == [first["missed"], second["missed"]]


# --- cron -----------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_late_cron_recall_says_how_many_it_missed(
    db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Two hours of every tenth minute, missed: one run that stands for the first and counts the
    others; the next is on the next tick."""
    daemon = await daemons.start()
    id = await put(
        db,
        "s",
        "date_trunc('hour', now()) - interval '2 hours'",
        cadence="cron",
        cron="*/10 * * * *",
        interval_seconds=600,
    )
    await daemon.hears("recall.settled", recall=id)
    (found,) = told(endpoint, "s")
    row = await one(db, "s")
    moments = (row["trigger_at"] - nominal(found)).total_seconds() / 600
    assert (found["occurrence"], found["missed"]) == (1, moments - 1) and found["missed"] >= 12
    assert (
        row["trigger_at"] > datetime.now(UTC) - timedelta(seconds=30)
        and row["trigger_at"].minute % 10 == 0
    )
    assert (row["occurrence"], row["interval_seconds"], row["missed"]) == (2, 600, 0)


@pytest.mark.slow
async def test_plain_sql_leaves_the_first_moment_to_the_worker(
    db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A cron recall inserted without a distance is put on its first moment within moments, and
    nothing is called before that."""
    await daemons.start()
    await put(db, "s", cadence="cron", cron="0 9 * * *", time_zone="America/New_York")
    row = await eventually(
        db, "select * from session_recalls where session_id = 's' and interval_seconds is not null"
    )
    assert row["trigger_at"] == row["planned_at"] == row["scheduled_for"] > datetime.now(UTC)
    assert row["trigger_at"].minute == 0 and row["trigger_at"].hour in (13, 14)
    assert row["interval_seconds"] in (23 * 3600, 24 * 3600, 25 * 3600)
    assert (row["occurrence"], row["status"], endpoint.requests) == (1, "pending", [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"cron": "0 9 * * *", "time_zone": "Mars/Olympus"},
            "there is no time zone 'Mars/Olympus'",
        ),
        ({"cron": "0 9 30 2 *"}, "'0 9 30 2 *' never comes"),
        ({"cron": "0 0 9 * * *"}, "it takes five fields"),
        ({"cron": "@daily"}, "it takes five fields"),
        ({"cron": "9" * 5000 + " 9 * * *"}, "at most 1000 characters"),
    ],
    ids=["an unknown zone", "30 February", "six fields", "a nickname", "five thousand digits"],
)
@pytest.mark.parametrize("distance", [None, 86_400], ids=["unplanned", "planned"])
async def test_what_nobody_can_keep_fails_with_its_reason(
    columns: dict[str, Any],
    said: str,
    distance: int | None,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Written by plain SQL, a cadence that makes no sense ends as failed, and says why; nothing is
    called."""
    await daemons.start()
    await put(db, "s", cadence="cron", interval_seconds=distance, **columns)
    row = await eventually(
        db, "select * from session_recalls where session_id = 's' and status = 'failed'"
    )
    assert said in row["reason"] and row["ended_at"] is not None
    assert endpoint.requests == []


# --- downtime -------------------------------------------------------------------------------------


@pytest.mark.full
async def test_after_downtime_thousands_start_oldest_first_and_once(
    db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """3,000 overdue recalls of all cadences, two workers: each runs once, oldest due first; those
    past their grace are recorded, not run."""
    await db.execute("insert into sessions select 's' || n, 'ann' from generate_series(1, 3000) n")
    await db.execute(
        """insert into session_recalls (id, session_id, call_type, trigger_at,
            additional_context_message, status, created_at, updated_at,
            interval_seconds, cadence, cron, grace_seconds)
        select 'r' || n, 's' || n, case when n % 4 = 0 then 'once' else 'recurring' end,
            date_trunc('minute', now()) - n * interval '1 min',
            'look', 'pending', now(), now(), case n % 4 when 0 then null else 864000 end,
            case n % 4 when 1 then 'interval' when 2 then 'grid' when 3 then 'cron'
                else 'interval' end,
            case n % 4 when 3 then '0 0 1 1 *' end, case when n % 10 = 7 then 60 end
        from generate_series(1, 3000) n"""
    )
    misfired = {f"r{n}" for n in range(1, 3001) if n % 10 == 7 and n > 1}
    started = [await daemons.start(concurrency=50) for _ in range(2)]
    await endpoint.count(3000 - len(misfired), within=60)
    await eventually(
        db,
        "select 1 as ok where not exists (select from session_recalls where trigger_at <= now() "
        "and status = 'pending')",
    )
    keys = Counter(endpoint.keys)
    assert (
        set(keys.values()) == {1}
        and {key.partition(":")[0] for key in keys} == {f"r{n}" for n in range(1, 3001)} - misfired
    )
    order = [int(key.partition(":")[0][1:]) for key in endpoint.keys]
    # Two workers with fifty slots each, so that nobody is further from his place than what they may
    # hold and start at once.
    assert (
        max(abs(place - order.index(n)) for place, n in enumerate(sorted(order, reverse=True)))
        <= 400
    )
    marks = await rows(
        db, "select recall_id, reason from recall_attempts where outcome = 'misfired'"
    )
    assert {mark["recall_id"] for mark in marks} == misfired and all(
        "past its grace of 60 s" in mark["reason"] for mark in marks
    )
    for daemon in started:
        assert await daemon.stop() == 0


@pytest.mark.slow
async def test_a_successor_says_the_same(
    db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A worker is killed in the run of a late occurrence: its successor calls with the same key and
    byte for byte the same body."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    dead = await daemons.start(lease=2)
    id = await put(
        db,
        "s",
        "date_trunc('minute', now()) - interval '5 min'",
        cadence="cron",
        cron="* * * * *",
        interval_seconds=60,
    )
    await gate.entered.wait()
    await dead.kill()
    daemon = await daemons.start(lease=2)
    await daemon.hears("recall.settled", recall=id)
    one_call, again = endpoint.of("s")[:2]
    assert one_call.key == again.key == f"{id}:1" and one_call.body == again.body
    assert again.document["recall"]["missed"] in (5, 6)


@pytest.mark.slow
async def test_paused_and_resumed(db: Connection, endpoint: Endpoint, daemons: Daemons) -> None:
    """What fell due while a recall was paused is coalesced when it goes on, or, past the grace,
    recorded and passed over."""
    daemon = await daemons.start()
    await put(
        db,
        "s",
        "now() - interval '95 s'",
        interval_seconds=10,
        paused_at=datetime.now(UTC),
        times=1,
    )
    await put(
        db,
        "t",
        "now() - interval '95 s'",
        interval_seconds=10,
        paused_at=datetime.now(UTC),
        grace_seconds=12,
        times=2,
    )
    await db.execute("update session_recalls set paused_at = null")
    await daemon.hears("recall.settled", recall="r-s", status="fired")
    await daemon.hears("recall.settled", recall="r-t", status="fired")
    (coalesced,) = told(endpoint, "s")
    assert coalesced["occurrence"] == 1 and coalesced["missed"] in range(9, 15)
    (within,) = told(endpoint, "t")
    assert within["occurrence"] == 2
    misfired, answered = await calls(db, "r-t")
    assert (misfired["outcome"], answered["outcome"]) == ("misfired", "answered")
    # Every moment up to now is accounted for: the one that misfired and what was passed over with
    # it, the one that ran and what it missed.
    assert nominal(within) - misfired["scheduled_for"] == timedelta(seconds=10) * (
        1 + misfired["missed"]
    )


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_failures_in_a_row_end_it(
    db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """One failure, a success, then two failures: with two in a row it has failed and says so; the
    success in between began anew."""
    endpoint.script("s", reply(422), reply(), reply(422), reply(422))
    daemon = await daemons.start()
    id = await put(db, "s", interval_seconds=1, failures_most=2)
    await daemon.hears("recall.settled", recall=id, status="failed")
    row = await one(db, "s")
    assert row["reason"].startswith("2 occurrences failed in a row, the last: ")
    assert [r["occurrence"] for r in told(endpoint, "s")] == [1, 2, 3, 4]


@pytest.mark.slow
async def test_until(db: Connection, endpoint: Endpoint, daemons: Daemons) -> None:
    """No occurrence after a date: the last before it runs, and then the recall has fired, saying
    why."""
    daemon = await daemons.start()
    id = await put(
        db, "s", interval_seconds=3600, until_at=datetime.now(UTC) + timedelta(minutes=30)
    )
    await daemon.hears("recall.settled", recall=id, status="fired")
    row = await one(db, "s")
    assert "where it ends" in row["reason"] and len(endpoint.requests) == 1


@pytest.mark.slow
async def test_jitter(db: Connection, endpoint: Endpoint, daemons: Daemons) -> None:
    """The next occurrence is due up to its jitter after its nominal time, which stays on the
    grid."""
    daemon = await daemons.start()
    ids = [await put(db, f"s{n}", interval_seconds=3600, jitter_seconds=600) for n in range(8)]
    for id in ids:
        await daemon.hears("recall.settled", recall=id)
    found = await rows(db, "select trigger_at, scheduled_for from session_recalls")
    late = [(row["trigger_at"] - row["scheduled_for"]).total_seconds() for row in found]
    assert all(0 <= seconds <= 600 for seconds in late) and len(set(late)) > 1
    firsts = {nominal(recall) for n in range(8) for recall in told(endpoint, f"s{n}")}
    assert all(row["scheduled_for"] - timedelta(hours=1) in firsts for row in found)


# --- the application's own hand -------------------------------------------------------------------


async def test_skips_of_a_waiting_cron_recall(
    app: Application, db: Connection, daemons: Daemons
) -> None:
    """Two skips in quick succession from a Friday: two working days less, each consuming its
    number, and the distance follows."""
    await daemons.start()
    friday = "date_trunc('week', now()) + interval '4 weeks 4 days 9 hours'"
    id = await put(
        db, "s", friday, cadence="cron", cron="0 9 * * mon-fri", interval_seconds=3 * 86_400
    )
    assert await app.skip_next("s") and await app.skip_next("s")
    row = await eventually(
        db, "select * from session_recalls where id = %s and occurrence = 3", [id]
    )
    assert (row["trigger_at"].isoweekday(), row["trigger_at"].hour, row["interval_seconds"]) == (
        2,
        9,
        86_400,
    )
    assert row["trigger_at"] == row["planned_at"] == row["scheduled_for"]


@pytest.mark.slow
@pytest.mark.parametrize("cadence", ["grid", "cron"])
async def test_a_skip_in_mid_run(
    cadence: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Exactly one occurrence less: the one after the run."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    daemon = await daemons.start()
    cron = {"cron": "0 * * * *"} if cadence == "cron" else {}
    id = await put(
        db, "s", "date_trunc('hour', now())", cadence=cadence, interval_seconds=3600, **cron
    )
    first = (await one(db, "s"))["trigger_at"]
    await gate.entered.wait()
    assert await app.skip_next("s")
    gate.open()
    await daemon.hears("recall.settled", recall=id)
    row = await one(db, "s")
    missed = told(endpoint, "s")[0]["missed"]
    assert (row["occurrence"], row["trigger_at"]) == (3, first + timedelta(hours=2 + missed))


@pytest.mark.slow
@pytest.mark.parametrize("cadence", ["grid", "cron"])
async def test_rescheduled_in_mid_run(
    cadence: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The time that the application names stands for what comes after the run; the cadence goes on
    from there."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    daemon = await daemons.start()
    cron = {"cron": "0 * * * *"} if cadence == "cron" else {}
    id = await put(
        db, "s", "date_trunc('hour', now())", cadence=cadence, interval_seconds=3600, **cron
    )
    await gate.entered.wait()
    named = datetime.now(UTC).replace(microsecond=0) + timedelta(days=3, seconds=7)
    assert await app.reschedule(id, named)
    gate.open()
    await daemon.hears("recall.settled", recall=id)
    row = await one(db, "s")
    assert (row["occurrence"], row["trigger_at"]) == (2, named)
    hour = named.replace(minute=0, second=0) + timedelta(hours=1)
    assert row["interval_seconds"] == (
        3600 if cadence == "grid" else (hour - named).total_seconds()
    )


@pytest.mark.slow
@pytest.mark.parametrize("what", ["skip", "reschedule"])
@pytest.mark.parametrize("cadence", ["grid", "cron"])
async def test_moved_between_two_calls(
    what: str, cadence: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The occurrence that was put off is over: what follows from the move is the next, with a key
    of its own."""
    endpoint.script("s", reply(409, headers={"Retry-After": "3600"}), reply())
    daemon = await daemons.start()
    cron = {"cron": "0 * * * *"} if cadence == "cron" else {}
    id = await put(
        db, "s", "date_trunc('hour', now())", cadence=cadence, interval_seconds=3600, **cron
    )
    nominal_first = (await one(db, "s"))["trigger_at"]
    await daemon.hears("recall.settled", recall=id, outcome="busy")
    if what == "reschedule":
        named = datetime.now(UTC) - timedelta(seconds=1)
        assert await app.reschedule(id, named)
        await daemon.hears("recall.settled", recall=id, outcome="answered")
        first, second = told(endpoint, "s")
        assert (first["occurrence"], second["occurrence"]) == (1, 2) and nominal(second) == named
        assert endpoint.keys == [f"{id}:1", f"{id}:2"]
        following = named.replace(minute=0, second=0, microsecond=0) if cadence == "cron" else named
        assert (await one(db, "s"))["trigger_at"] == following + timedelta(hours=1)
    else:
        assert await app.skip_next("s")
        # Skipped from where it waited, it stands for the moment after its own; on cron the worker
        # is notified, and puts it there.
        ahead = {
            "cron": "occurrence = 2 and trigger_at = planned_at",
            "grid": "trigger_at > planned_at",
        }[cadence]
        row = await eventually(db, f"select * from session_recalls where id = %s and {ahead}", [id])
        found = await Recalls().preview(id, count=2, conn=db)
        assert found == [nominal_first + timedelta(hours=n) for n in (1, 2)]
        assert len(endpoint.requests) == 1 and row["status"] == "pending"

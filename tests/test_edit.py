"""`edit` and `Recalls.update`: what they write in each state, what they say, and what they leave
alone. What an edit means for the occurrences that follow is in test_cadence and test_operations."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from recall_worker import Recalls
from recall_worker.terminal import local

from .conftest import Connection, connected
from .process.test_lease import eventually, rows
from .test_cli import operate, trouble
from .test_ledger import put

HOUR = timedelta(hours=1)
NEXT = r"; next due \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d( \(computed by a worker\))?\.\n"


async def stands(db: Connection, id: str = "r") -> dict[str, Any]:
    [row] = await rows(db, "select * from session_recalls where id = %s", [id])
    return row


@pytest.fixture
async def hourly(db: Connection) -> None:
    """In the session s, a recall `r` that is due in an hour, and then an hour after each run."""
    await put(db, "s", 3600.0, id="r", call_type="recurring", interval_seconds=3600)


SAID: list[tuple[str, str, dict[str, Any], str]] = [
    ("an interval", "--every 2h", {"interval_seconds": 7200}, "every 2h"),
    (
        "a grid",
        "--grid 30m --times 9",
        {"cadence": "grid", "interval_seconds": 1800, "times": 9},
        "grid 30m, 9 times",
    ),
    (
        "an expression",
        "--cron 0_9_*_*_mon-fri --tz Europe/Berlin",
        {"cadence": "cron", "cron": "0 9 * * mon-fri", "time_zone": "Europe/Berlin"},
        r"cron '0 9 \* \* mon-fri' Europe/Berlin",
    ),
    (
        "an end",
        "--until 2099-01-31T09:00 --tz Europe/Berlin",
        {"until_at": datetime(2099, 1, 31, 8, tzinfo=UTC), "time_zone": None},
        r"every 1h, until 2099-01-31 \d\d:00:00[+-]\d\d",
    ),
    (
        "an end that is taken away, and a zone that has nothing to read",
        "--until none --tz Asia/Kolkata --times 3",
        {"until_at": None, "time_zone": None, "times": 3},
        "every 1h, 3 times",
    ),
    ("a number", "--times 1", {"times": 1}, "every 1h, once"),
    ("failures", "--failures 3", {"failures_most": 3}, "every 1h, until 3 in a row failed"),
    (
        "grace and jitter",
        "--grace 5m --jitter 20s",
        {"grace_seconds": 300, "jitter_seconds": 20},
        "grace changed, jitter changed",
    ),
    ("a message", "--message Look!", {"additional_context_message": "Look!"}, "message changed"),
    ("a note", "--comment Note --times 2", {"internal_comment": "Note"}, "every 1h, 2 times, co.*"),
]


@pytest.mark.parametrize(
    ("words", "columns", "said"), [case[1:] for case in SAID], ids=[case[0] for case in SAID]
)
async def test_what_is_changed_and_said(
    words: str,
    columns: dict[str, Any],
    said: str,
    hourly: None,
    database: str,
    db: Connection,
) -> None:
    """One sentence: what it is then, and what is next. A second time there is nothing to do."""
    options = [word.replace("_", " ") for word in words.split()]
    done = operate(database, "edit", "r", *options)
    assert (done.status, done.out) == (0, "r\n"), done
    assert re.fullmatch(rf"r: {said}{NEXT}", done.err), done.err
    row = await stands(db)
    assert {name: row[name] for name in columns} == columns
    again = operate(database, "edit", "r", *options)
    assert again.status == 0
    assert re.fullmatch(rf"r: nothing to change, it is so already{NEXT}", again.err), again.err
    assert await stands(db) == row, "nothing was written, not even the time of it"


@pytest.mark.slow
async def test_what_a_worker_is_to_compute(hourly: None, database: str, db: Connection) -> None:
    """With another expression a worker computes the moment that waits: `edit` says which it will
    be, one later for each skip that was made before, and `preview` says the same."""
    for skips in (0, 1):
        await db.execute("delete from session_recalls")
        await put(db, "s", 3600.0, id="r", call_type="recurring", interval_seconds=3600)
        if skips:
            assert operate(database, "skip", "r").status == 0
        said = operate(database, "edit", "r", "--cron", "0 9 * * *")
        found = re.search(r"; next due (.*) \(computed by a worker\)\.\n$", said.err)
        assert found is not None, said.err
        row = await stands(db)
        days = row["edited_at"].replace(hour=9, minute=0, second=0, microsecond=0)
        first = days if days > row["edited_at"] else days + timedelta(days=1)
        when = first + skips * timedelta(days=1)
        assert found[1] == local(when)
        [ahead, *_] = operate(database, "preview", "r", "--json").document["occurrences"]
        assert datetime.fromisoformat(ahead["at"]) == when
    assert not re.search("computed", operate(database, "edit", "r", "--grid", "1h").err)


async def test_what_is_taken_away(hourly: None, database: str, db: Connection) -> None:
    """The word none, for all that there can be none of."""
    every = (
        *("--cron", "0 9 * * *", "--tz", "Europe/Berlin", "--until", "2099-01-01", "--times", "9"),
        *("--failures", "3", "--grace", "5m", "--jitter", "20s", "--comment", "Note"),
    )
    columns = (
        *("time_zone", "until_at", "times", "failures_most", "grace_seconds", "jitter_seconds"),
        "internal_comment",
    )
    assert operate(database, "edit", "r", *every).status == 0
    row = await stands(db)
    assert all(row[name] is not None for name in columns)
    none = [
        word
        for name in ("tz", "until", "times", "failures", "grace", "jitter", "comment")
        for word in (f"--{name}", "none")
    ]
    done = operate(database, "edit", "r", *none)
    assert done.status == 0 and "r: cron '0 9 * * *' UTC, grace changed" in done.err
    row = await stands(db)
    assert all(row[name] is None for name in columns)


async def test_what_is_not_named_stays(hourly: None, database: str, db: Connection) -> None:
    """A value that Python can't hold stays as it is where something else is edited."""
    await db.execute("update session_recalls set until_at = 'infinity' where id = 'r'")
    assert operate(database, "edit", "r", "--times", "3").status == 0
    [row] = await rows(
        db, "select until_at = 'infinity' as endless, times from session_recalls where id = 'r'"
    )
    assert row == {"endless": True, "times": 3}


async def test_a_one_shot_recurs(database: str, db: Connection) -> None:
    """With a rule, a one-shot recurs, and is said to."""
    await put(db, "s", 60.0, id="r")
    done = operate(database, "edit", "r", "--every", "2h")
    assert re.fullmatch(rf"r: recurs now, every 2h{NEXT}", done.err), done
    row = await stands(db)
    assert (row["call_type"], row["interval_seconds"]) == ("recurring", 7200)


async def test_in_a_run_and_paused(hourly: None, database: str, db: Connection) -> None:
    """The run goes on under its lease, and a pause stays; the edit is written all the same."""
    lease = (
        "update session_recalls set lease = gen_random_uuid(), lease_until = now() + "
        "interval '1 minute', leased_at = now(), leased_by = 'w', scheduled_for = trigger_at"
    )
    await db.execute(lease.encode())
    before = await stands(db)
    done = operate(database, "edit", "r", "--every", "2h")
    assert done.err == "r: every 2h; the current run is not interrupted.\n", done
    row = await stands(db)
    assert row["interval_seconds"] == 7200 and row["lease"] == before["lease"]
    await db.execute(
        "update session_recalls set lease = null, lease_until = null, leased_by = null"
    )
    assert operate(database, "pause", "r").status == 0
    done = operate(database, "edit", "r", "--times", "4")
    assert re.search(r"; next due .*, but paused\.\n$", done.err), done
    assert (await stands(db))["paused_at"] is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "hint"),
    [("fired", "schedule SESSION MESSAGE"), ("cancelled", "retry r"), ("failed", "retry r")],
)
async def test_what_is_over(
    status: str, hint: str, hourly: None, database: str, db: Connection
) -> None:
    """What is over can't be edited; the hint says what can be done."""
    await db.execute("update session_recalls set status = %s", [status])
    before = await stands(db)
    said = operate(database, "edit", "r", "--times", "3")
    assert f"r is {status}: what is over can't be edited" in trouble(said, 1)
    assert said.err.endswith(f"\nTry: recall-worker {hint}\n")
    assert await Recalls().update("r", times=3, conn=db) is None
    assert await stands(db) == before


async def test_a_document(hourly: None, database: str) -> None:
    """--json: the rows as they stand then, as the other operations have it."""
    for _ in range(2):
        said = operate(database, "edit", "r", "--times", "3", "--json")
        assert (said.status, said.err) == (0, "")
        [row] = said.document
        assert (row["id"], row["times"]) == ("r", 3)


async def test_by_the_databases_clock(hourly: None, database: str, db: Connection) -> None:
    """An end is past by PostgreSQL's clock: a moment ahead of it is refused as before the next
    occurrence, a moment behind as past."""
    [row] = await rows(db, "select now() as now")
    for seconds, why in ((60, "would be after its end"), (-60, "is past")):
        with pytest.raises(ValueError, match=why):
            await Recalls().update("r", until=row["now"] + timedelta(seconds=seconds), conn=db)


async def test_two_at_once(hourly: None, database: str, db: Connection) -> None:
    """The second edit waits for the first, and is judged by what stands there then."""
    async with connected(database) as first, connected(database) as second:
        async with first.transaction():
            await Recalls().update("r", cron="0 9 * * *", conn=first)
            waits = asyncio.create_task(
                Recalls().update("r", time_zone="Europe/Berlin", conn=second)
            )
            blocked = "select from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
            await eventually(db, blocked, [second.info.backend_pid])
        edited = await waits
    assert edited is not None and (edited.cron, edited.time_zone) == ("0 9 * * *", "Europe/Berlin")


async def test_what_is_missing_or_makes_no_sense(hourly: None, db: Connection) -> None:
    """None for a recall that is not there; ValueError for what can't be meant."""
    recalls = Recalls()
    assert await recalls.update("nope", times=3, conn=db) is None
    with pytest.raises(ValueError, match="`until` has no time zone"):
        await recalls.update("r", until=datetime(2031, 5, 6), conn=db)
    nothing: Any = None
    with pytest.raises(ValueError, match="message can be replaced, but not taken away"):
        await recalls.update("r", message=nothing, conn=db)
    with pytest.raises(ValueError, match="not taken away: cancel"):
        await recalls.update("r", every=nothing, conn=db)
    with pytest.raises(psycopg.DataError):
        await recalls.update("r", message="a\0b", conn=db)
    assert (await stands(db))["additional_context_message"] == "look again"


async def test_everything_at_once(hourly: None, db: Connection) -> None:
    """All that can be given, in one call; the recall as it is then is returned."""
    edited = await Recalls().update(
        "r",
        message="another",
        comment="note",
        grid=2 * HOUR,
        until=datetime(2031, 5, 6, tzinfo=UTC),
        times=9,
        failures=2,
        grace=HOUR,
        jitter=HOUR,
        conn=db,
    )
    assert edited is not None
    row = await stands(db)
    found = {
        "additional_context_message": "another",
        "internal_comment": "note",
        "cadence": "grid",
        "interval_seconds": 7200,
        "until_at": datetime(2031, 5, 6, tzinfo=UTC),
        "times": 9,
        "failures_most": 2,
        "grace_seconds": 3600,
        "jitter_seconds": 3600,
    }
    assert {name: row[name] for name in found} == found
    assert {name: getattr(edited, name) for name in found} == found


def test_a_message_is_not_taken_away(database: str) -> None:
    """`none` takes a value away, and a message can't be: the agent would be told the word."""
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("insert into sessions values ('s', 'ann')")
    id = operate(database, "schedule", "s", "look", "--in", "2h").out.strip()
    said = operate(database, "edit", id, "--message", "none")
    assert said.status == 2 and "a message can be replaced, and not taken away" in said.err
    assert "look" in operate(database, "show", id).out

"""Pure time: how far apart occurrences are, and what it means that the application moved one."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recall_worker import cadence
from recall_worker.recall import After, Recall

from .test_recall import NOON, claim_with

INTERVALS = st.integers(1, 2**31 - 1)


@pytest.mark.parametrize("interval", [None, 0, -1, -(2**31)], ids=str)
def test_an_interval_that_would_make_a_hot_loop(interval: int | None) -> None:
    """A recurring recall without an interval of at least a second can't go on, and the reason names
    what stands there."""
    reason = cadence.problem(claim_with(call_type="recurring", interval=interval))
    assert reason is not None and "interval_seconds" in reason
    assert ("null" if interval is None else str(interval)) in reason


@pytest.mark.parametrize("interval", [1, 60, 2**31 - 1], ids=str)
def test_an_interval_that_will_do(interval: int) -> None:
    """An interval of a second or more is no problem."""
    assert cadence.problem(claim_with(call_type="recurring", interval=interval)) is None


@pytest.mark.parametrize("call_type", ["once", "immediate"])
@pytest.mark.parametrize("interval", [None, 0, -5, 60], ids=str)
def test_a_one_shot_needs_no_interval(call_type: str, interval: int | None) -> None:
    """Whatever stands in the interval of a one-shot, nobody asks."""
    claim = claim_with(
        call_type=call_type, interval=interval, trigger_at=NOON + timedelta(seconds=120)
    )
    assert cadence.problem(claim) is None
    assert cadence.skipped(claim) == 0


@pytest.mark.parametrize(
    ("moved_by", "skipped"),
    [
        (timedelta(0), 0),
        (timedelta(seconds=60), 1),
        (timedelta(seconds=120), 2),
        (timedelta(days=1), 1440),
        (timedelta(seconds=61), 0),
        (timedelta(seconds=30), 0),
        (timedelta(seconds=60, microseconds=1), 0),
        (timedelta(seconds=60, microseconds=-1), 0),
        (timedelta(seconds=-60), 0),
        (timedelta(seconds=-61), 0),
    ],
    ids=str,
)
def test_skipped(moved_by: timedelta, skipped: int) -> None:
    """Whole intervals onwards are skips; any other move, also one backwards, names a time of its
    own."""
    assert (
        cadence.skipped(claim_with(call_type="recurring", interval=60, trigger_at=NOON + moved_by))
        == skipped
    )


@pytest.mark.parametrize("interval", [None, 0, -60], ids=str)
def test_nothing_is_skipped_by_an_absurd_interval(interval: int | None) -> None:
    """An interval that is none divides nothing."""
    claim = claim_with(
        call_type="recurring", interval=interval, trigger_at=NOON + timedelta(seconds=60)
    )
    assert cadence.skipped(claim) == 0


@given(interval=st.integers(1, 10_000_000), times=st.integers(0, 200))
@settings(deadline=None)
def test_skipping_times_intervals_is_seen_as_times_skips(interval: int, times: int) -> None:
    """As often as the application adds the interval, so many skips are seen, for any interval."""
    moved = NOON + timedelta(seconds=interval) * times
    assert (
        cadence.skipped(claim_with(call_type="recurring", interval=interval, trigger_at=moved))
        == times
    )


@given(
    interval=st.integers(2, 10_000_000),
    times=st.integers(0, 200),
    rest=st.integers(1, 10_000_000 * 10**6),
)
@settings(deadline=None)
def test_any_other_move_is_no_skip(interval: int, times: int, rest: int) -> None:
    """A move that is off the whole intervals by as little as a microsecond is a time of its own."""
    by = timedelta(seconds=interval) * times + timedelta(
        microseconds=rest % (interval * 10**6 - 1) + 1
    )
    assert (
        cadence.skipped(claim_with(call_type="recurring", interval=interval, trigger_at=NOON + by))
        == 0
    )


@given(interval=INTERVALS, skip=st.integers(0, 1000))
@settings(deadline=None)
def test_following(interval: int, skip: int) -> None:
    """The next occurrence falls one interval after the run ended, and one more for each that is
    passed over."""
    claim = claim_with(call_type="recurring", interval=interval)
    assert cadence.following(claim) == After(float(interval))
    assert cadence.following(claim, skip) == After(float(interval) * (1 + skip))


# --- a new recall's plan --------------------------------------------------------------------------

HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"at": NOON, "after": HOUR}, "exclude each other"),
        ({"every": HOUR, "grid": HOUR}, "exclude each other"),
        ({"times": 3}, "only what recurs has an end"),
        ({"after": HOUR, "until": NOON}, "only what recurs has an end"),
        ({"grid": HOUR, "time_zone": "Europe/Berlin"}, "goes with a cron expression"),
        ({"cron": "0 9 * * *", "time_zone": "Mars/Olympus"}, "no time zone"),
        ({"cron": "0 9 30 2 *"}, "never comes"),
        ({"cron": "0 0 9 * * *"}, "five fields"),
        ({"grid": HOUR, "times": 0}, "at least one"),
        ({"grid": HOUR, "failures": 0}, "at least one"),
        ({"grid": timedelta(seconds=0.5)}, "whole number of seconds"),
        ({"every": timedelta(0)}, "whole number of seconds"),
        ({"grid": HOUR, "jitter": timedelta(seconds=-1)}, "whole number of seconds"),
        ({"grid": HOUR, "grace": timedelta(0)}, "grace is a whole number of seconds, at least 1"),
        ({"grid": HOUR, "times": 2**31}, "at most 2147483647"),
        ({"grid": HOUR, "until": NOON}, "after its end"),
        (
            {"grid": HOUR, "until": datetime.max.replace(tzinfo=cadence.zone("America/New_York"))},
            "beyond the calendar",
        ),
        ({"cron": "0 9 * * *", "after": timedelta.max}, "beyond the calendar"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(told: dict[str, Any], said: str) -> None:
    """Before anything is written: a sentence that says what is wrong."""
    with pytest.raises(cadence.CadenceError, match=said):
        cadence.plan(NOON, 0.5, **told)


def test_the_first_occurrence() -> None:
    """One interval from now, or where it is named; on cron the first moment from there on, which a
    named start may be itself."""
    assert cadence.plan(NOON, 0.0, every=HOUR).after == 3600.0
    assert cadence.plan(NOON, 0.0, grid=HOUR, at=NOON).at == NOON
    daily: dict[str, Any] = {"cron": "0 12 * * *"}
    assert cadence.plan(NOON, 0.0, **daily).at == NOON + timedelta(days=1)
    assert cadence.plan(NOON, 0.0, at=NOON, **daily).at == NOON
    found = cadence.plan(NOON, 0.5, jitter=timedelta(seconds=60), **daily)
    assert (found.call_type, found.cadence, found.interval, found.put_off) == (
        "recurring",
        "cron",
        86_400,
        30.0,
    )
    assert (
        cadence.plan(NOON, 0.0).call_type == "immediate"
        and cadence.plan(NOON, 0.0, after=HOUR).call_type == "once"
    )


def test_a_time_in_a_zone_of_ours() -> None:
    """What `preview` gives can be copied, pickled, and scheduled again."""
    when = datetime(2027, 7, 1, 9, tzinfo=cadence.zone("Europe/Berlin"))
    assert copy.deepcopy(when) == pickle.loads(pickle.dumps(when)) == when
    planned = cadence.plan(NOON, 0.0, at=when).at
    assert planned is not None
    assert planned == when and planned.tzinfo is UTC


WEEKDAYS = "0 9 * * mon-fri"


@pytest.mark.parametrize(
    ("expression", "zone", "least"),
    [
        ("0 9 * * *", None, 86_400),
        # Seen on a Friday, the next two are three days apart.
        (WEEKDAYS, None, 86_400),
        ("0 9,10 * * *", None, 3600),
        ("0,59 0,23 * * *", None, 60),
        ("* 9 1 * *", None, 60),
        ("*/5 * * * *", None, 300),
        # One night a year is an hour shorter.
        ("0 9 * * *", "Europe/Berlin", 82_800),
        ("0 0 29 2 *", None, 4 * 365 * 86_400 + 86_400),
    ],
)
@pytest.mark.parametrize("day", range(4))
def test_a_jitter_is_compared_with_the_shortest_distance(
    expression: str, zone: str | None, least: int, day: int
) -> None:
    """A jitter wider than the shortest distance between two ticks is refused, whatever the day and
    the time of day at which it is asked for; one as wide is not."""
    now = datetime(2026, 11, 27, 9, 30, tzinfo=UTC) + timedelta(days=day, hours=5 * day)
    rule: dict[str, Any] = {"cron": expression, "time_zone": zone}
    assert cadence.plan(now, 0.0, jitter=timedelta(seconds=least), **rule).jitter == least
    with pytest.raises(cadence.CadenceError, match=f"wider than the {least} s"):
        cadence.plan(now, 0.0, jitter=timedelta(seconds=least + 1), **rule)


def test_a_zone_in_any_case() -> None:
    """A plan has it as IANA spells it; what nobody knows is answered with what is near."""
    planned = cadence.plan(NOON, 0.0, cron="0 9 * * *", time_zone="aMERICA/new_york")
    assert planned.time_zone == "America/New_York"
    for written, near in (
        ("Berlin", "Europe/Berlin"),
        ("new york", "America/New_York"),
        ("Asia/Kolkatta", "Asia/Kolkata"),
    ):
        with pytest.raises(cadence.CadenceError, match=f"did you mean {near}"):
            cadence.zone(written)
    for written in ("", "\0", "x" * 10_000, "../../etc/passwd", "Mars/Olympus"):
        with pytest.raises(cadence.CadenceError, match="an IANA name, such as"):
            cadence.zone(written)


def test_what_is_past() -> None:
    """A time within the last minute is not past: it is typed to the minute."""
    assert not cadence.is_past(NOON, NOON + timedelta(minutes=1))
    assert cadence.is_past(NOON, NOON + timedelta(minutes=1, microseconds=1))


@pytest.mark.parametrize(("grace", "late"), [(-5, 1), (0, 1), (1, 1), (60, 60)])
def test_too_late(grace: int, late: int) -> None:
    """Later than the grace; one that plain SQL wrote below a second is one, as nothing is called in
    the instant at which it is due."""
    claim = claim_with(call_type="recurring", interval=60, grace=grace, lateness=late)
    assert cadence.too_late(claim) is None
    said = cadence.too_late(claim._replace(lateness=late + 0.6))
    assert said == f"{late + 1} s late, past its grace of {late} s"


# --- what is ahead --------------------------------------------------------------------------------


def recall_with(**changes: Any) -> Recall:
    """An hourly recall that waits for noon."""
    columns: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Recall)) | {
        "id": "r1",
        "session_id": "s1",
        "call_type": "recurring",
        "trigger_at": NOON,
        "planned_at": NOON,
        "interval_seconds": 3600,
        "additional_context_message": "look",
        "status": "pending",
        "created_at": NOON,
        "updated_at": NOON,
        "occurrence": 1,
        "attempt": 0,
        "skips": 0,
        "fires": 0,
        "cadence": "grid",
    }
    return Recall(**columns | changes)


HOURLY = {"cadence": "cron", "cron": "0 * * * *"}
RUNNING = {"leased_by": "w1", "scheduled_for": NOON}


@pytest.mark.parametrize(
    ("columns", "hours"),
    [
        ({}, [0, 1, 2]),
        ({"cadence": "interval"}, [0, 1, 2]),
        (HOURLY, [0, 1, 2]),
        (HOURLY | {"interval_seconds": None}, [0, 1, 2]),
        ({"call_type": "once"}, [0]),
        ({"times": 2}, [0, 1]),
        ({"until_at": NOON + HOUR}, [0, 1]),
        # Skipped once while it waits, called before or not.
        ({"trigger_at": NOON + HOUR}, [1, 2, 3]),
        ({"trigger_at": NOON + HOUR, "cadence": "interval"}, [1, 2, 3]),
        ({"trigger_at": NOON + HOUR, "times": 2}, [1]),
        ({"trigger_at": NOON + HOUR, "scheduled_for": NOON}, [1, 2, 3]),
        ({"trigger_at": NOON + HOUR} | HOURLY, [1, 2, 3]),
        # By as much as from Friday to Monday: one working day less.
        (
            {
                "cadence": "cron",
                "cron": "0 12 * * mon-fri",
                "interval_seconds": 86_400,
                "trigger_at": NOON + 24 * HOUR,
            },
            [24, 48, 72],
        ),
        # A second's distance goes into many a time that somebody names: no three thousand and six
        # hundred skips.
        (
            {
                "cadence": "cron",
                "cron": "0 12 * * *",
                "interval_seconds": 1,
                "trigger_at": NOON + HOUR,
            },
            [1, 24, 48],
        ),
        # Put at another time.
        ({"trigger_at": NOON + HOUR / 2}, [0.5, 1.5, 2.5]),
        ({"trigger_at": NOON + HOUR / 2} | HOURLY, [0.5, 1, 2]),
        # Retried before any worker had found its first moment: from where it stands.
        (
            HOURLY
            | {
                "interval_seconds": None,
                "scheduled_for": NOON - 3 * HOUR,
                "trigger_at": NOON + HOUR / 2,
                "planned_at": NOON + HOUR / 2,
            },
            [1, 2, 3],
        ),
        # Jitter puts off what is due, and not what it stands for.
        (
            {"trigger_at": NOON + HOUR / 4, "planned_at": NOON + HOUR / 4, "scheduled_for": NOON},
            [0, 1, 2],
        ),
        # In mid-run: what runs, then what comes after it.
        (RUNNING, [0, 1, 2]),
        (RUNNING | {"call_type": "once"}, [0]),
        (RUNNING | {"trigger_at": NOON + HOUR}, [0, 2, 3]),
        (RUNNING | {"trigger_at": NOON + HOUR} | HOURLY, [0, 2, 3]),
        (RUNNING | {"trigger_at": NOON + HOUR, "times": 3}, [0, 2]),
        (RUNNING | {"trigger_at": NOON + HOUR / 2}, [0, 0.5, 1.5]),
        (RUNNING | {"trigger_at": NOON + HOUR / 2} | HOURLY, [0, 0.5, 1]),
        (RUNNING | {"trigger_at": NOON + HOUR / 2, "call_type": "once"}, [0, 0.5]),
    ],
    ids=str,
)
def test_upcoming(columns: dict[str, Any], hours: list[float]) -> None:
    """What `preview` says of a recall: hours from noon."""
    found = islice(cadence.upcoming(recall_with(**columns), NOON - HOUR / 10), 3)
    assert [(moment - NOON) / HOUR for moment in found] == hours


# --- edits ----------------------------------------------------------------------------------------

ONCE = {"call_type": "once", "cadence": "interval", "interval_seconds": None}
NINE = {"cadence": "cron", "cron": "0 9 * * *", "interval_seconds": 86_400}
BERLIN = "Europe/Berlin"
CHANGED: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("nothing", {}, {}, {}),
    ("the same", {"times": 3}, {"grid": HOUR, "times": 3, "until": None, "jitter": None}, {}),
    ("another distance", {}, {"grid": 2 * HOUR}, {"interval_seconds": 7200}),
    ("an interval of a grid", {}, {"every": HOUR}, {"cadence": "interval"}),
    (
        "a grid of an expression",
        NINE | {"time_zone": BERLIN},
        {"grid": HOUR},
        {"cadence": "grid", "interval_seconds": 3600, "cron": None, "time_zone": None},
    ),
    # The distance is left to the worker.
    (
        "an expression of a grid",
        {},
        {"cron": "0 9 * * *"},
        {"cadence": "cron", "cron": "0 9 * * *"},
    ),
    (
        "another expression keeps its zone",
        NINE | {"time_zone": BERLIN},
        {"cron": "0 9 * * mon-fri"},
        {"cron": "0 9 * * mon-fri"},
    ),
    ("a zone", NINE, {"time_zone": BERLIN}, {"time_zone": BERLIN}),
    ("no zone", NINE | {"time_zone": BERLIN}, {"time_zone": None}, {"time_zone": None}),
    ("no zone where there is none", {}, {"time_zone": None}, {}),
    (
        "a one-shot that recurs",
        ONCE,
        {"every": HOUR, "times": 2},
        {"call_type": "recurring", "interval_seconds": 3600, "times": 2},
    ),
    (
        "a one-shot by an expression",
        ONCE,
        {"cron": "0 9 * * *", "time_zone": BERLIN},
        {"call_type": "recurring", "cadence": "cron", "cron": "0 9 * * *", "time_zone": BERLIN},
    ),
    ("a grace of a one-shot", ONCE, {"grace": HOUR}, {"grace_seconds": 3600}),
    ("no end of what has none", ONCE, {"until": None, "times": None, "failures": None}, {}),
    ("an end", {}, {"until": NOON + HOUR}, {"until_at": NOON + HOUR}),
    ("an end at the very moment", {}, {"until": NOON}, {"until_at": NOON}),
    ("no end", {"until_at": NOON + HOUR}, {"until": None}, {"until_at": None}),
    ("this occurrence is the last", {"occurrence": 4}, {"times": 4}, {"times": 4}),
    ("failures", {}, {"failures": 2}, {"failures_most": 2}),
    ("jitter", {}, {"jitter": HOUR}, {"jitter_seconds": 3600}),
    (
        "a jitter of an interval is as wide as it likes",
        {"cadence": "interval"},
        {"jitter": 9 * HOUR},
        {"jitter_seconds": 9 * 3600},
    ),
    # What stands there from before is no matter of an edit that does not touch it.
    ("a wide jitter stays", {"jitter_seconds": 9999}, {"times": 3}, {"times": 3}),
    ("used up before", {"occurrence": 4, "times": 2}, {"grace": HOUR}, {"grace_seconds": 3600}),
    ("past before", {"until_at": NOON - HOUR}, {"times": 3}, {"times": 3}),
    ("an odd expression stays", NINE | {"cron": "*/90 * * * *"}, {"times": 3}, {"times": 3}),
    # In mid-run and when it is due, the occurrence is owed, whatever the end.
    ("the run is the last", RUNNING, {"until": NOON - HOUR / 20}, {"until_at": NOON - HOUR / 20}),
    (
        "what is due is owed",
        {"trigger_at": NOON - HOUR, "planned_at": NOON - HOUR},
        {"until": NOON - HOUR / 20},
        {"until_at": NOON - HOUR / 20},
    ),
]


@pytest.mark.parametrize(
    ("columns", "edit", "changes"),
    [case[1:] for case in CHANGED],
    ids=[case[0] for case in CHANGED],
)
def test_an_edit(columns: dict[str, Any], edit: dict[str, Any], changes: dict[str, Any]) -> None:
    """Which columns differ after an edit, at six minutes to noon."""
    assert cadence.change(recall_with(**columns), NOON - HOUR / 10, **edit) == changes


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("two rules", {}, {"grid": HOUR, "cron": "0 9 * * *"}, "exclude each other"),
    ("no rule", {}, {"every": None}, "not taken away: cancel"),
    ("no interval", {}, {"every": HOUR * 0}, "interval is a whole number of seconds"),
    ("half a second", {}, {"grid": HOUR / 7200}, "grid is a whole number of seconds"),
    ("an expression that never comes", {}, {"cron": "0 9 31 4 *"}, "never comes"),
    ("an expression that lies", {}, {"cron": "*/90 * * * *"}, "a step of 90"),
    ("a zone that is none", NINE, {"time_zone": "Mars/Olympus"}, "no time zone"),
    ("a zone of a grid", {}, {"time_zone": BERLIN}, "goes with a cron expression"),
    ("a zone of a one-shot", ONCE, {"time_zone": BERLIN}, "goes with a cron expression"),
    ("an end of a one-shot", ONCE, {"until": NOON + HOUR}, "only what recurs has an end"),
    ("times of a one-shot", ONCE, {"times": 2}, "only what recurs has an end"),
    ("no occurrence", {}, {"times": 0}, "times is 0"),
    ("too many failures", {}, {"failures": 2**31}, "failures is 2147483648"),
    ("used up", {"occurrence": 4}, {"times": 3}, "at its occurrence 4 already.*give 4"),
    ("used up in a run", RUNNING | {"occurrence": 4}, {"times": 3}, "give 4 to make this one"),
    ("past", {}, {"until": NOON - HOUR}, "11:00:00 UTC, is past"),
    ("past in a run", RUNNING, {"until": NOON - HOUR}, "is past"),
    ("before the next", {}, {"until": NOON - HOUR / 20}, "12:00:00 UTC, would be after its end"),
    (
        "before where it was moved",
        {"trigger_at": NOON + HOUR / 2},
        {"until": NOON + HOUR / 3},
        "12:30:00 UTC, would be",
    ),
    (
        "a rule beyond the end",
        {"until_at": NOON + HOUR},
        {"cron": "0 9 * * *"},
        "2026-03-02 09:00:00 UTC, would be after its end",
    ),
    (
        "an interval beyond",
        {"until_at": NOON + HOUR},
        {"every": 3 * HOUR},
        "14:54:00 UTC, would be",
    ),
    ("a grace of nothing", {}, {"grace": HOUR * 0}, "grace is a whole number"),
    ("a wide jitter", {}, {"jitter": 2 * HOUR}, "wider than the 3600 s"),
    ("a wide jitter by cron", NINE, {"jitter": 25 * HOUR}, "wider than the 86400 s"),
    ("a jitter too wide then", {"jitter_seconds": 60}, {"grid": HOUR / 120}, "wider than the 30 s"),
]


@pytest.mark.parametrize(
    ("columns", "edit", "why"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_an_edit_that_makes_no_sense(
    columns: dict[str, Any], edit: dict[str, Any], why: str
) -> None:
    """Why an edit is refused, at six minutes to noon."""
    with pytest.raises(cadence.CadenceError, match=why):
        cadence.change(recall_with(**columns), NOON - HOUR / 10, **edit)


@pytest.mark.parametrize("columns", [{}, HOURLY], ids=["grid", "cron"])
def test_upcoming_after_downtime(columns: dict[str, Any]) -> None:
    """One that is past, which stands for all that were missed, and then what is ahead."""
    found = islice(cadence.upcoming(recall_with(**columns), NOON + 2.5 * HOUR), 3)
    assert [(moment - NOON) / HOUR for moment in found] == [0, 3, 4]

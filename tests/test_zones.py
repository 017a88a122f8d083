"""Cron in time zones: clocks that change, days that never were, and an independent oracle over twenty years."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, tzinfo
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recall_worker.cadence import CadenceError, check, spread, ticks
from recall_worker.cadence import zone as zone_of

TABLE = [
    # A fixed time in the gap: once, at the first instant after it.
    ("30 2 * * *", "America/New_York", "2026-03-07T12:00", ["2026-03-08T03:00-04:00", "2026-03-09T02:30-04:00"]),
    ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", ["2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00"]),
    ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T12:00", ["2026-10-04T02:30+11:00", "2026-10-05T02:15+11:00"]),
    ("0 0 * * *", "America/Sao_Paulo", "2018-11-03T12:00", ["2018-11-04T01:00-02:00", "2018-11-05T00:00-02:00"]),
    ("0 12 * * *", "Pacific/Apia", "2011-12-29T13:00", ["2011-12-31T00:00+14:00", "2011-12-31T12:00+14:00"]),
    # Two fixed times in one gap fall on one instant: once.
    ("15,45 2 * * *", "America/New_York", "2026-03-08T01:00", ["2026-03-08T03:00-04:00", "2026-03-09T02:15-04:00"]),
    # A repeated fixed time: once, the first.
    ("30 1 * * *", "America/New_York", "2026-10-31T12:00", ["2026-11-01T01:30-04:00", "2026-11-02T01:30-05:00"]),
    ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"]),
    ("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T12:00", ["2026-04-05T01:45+11:00", "2026-04-06T01:45+10:30"]),
    ("30 23 * * *", "America/Sao_Paulo", "2018-02-17T12:00", ["2018-02-17T23:30-02:00", "2018-02-18T23:30-03:00"]),
    # Wildcards follow elapsed time: every half hour, also twice through the repeated hour, and over the gap.
    ("*/30 * * * *", "America/New_York", "2026-11-01T00:40",
     ["2026-11-01T01:00-04:00", "2026-11-01T01:30-04:00", "2026-11-01T01:00-05:00", "2026-11-01T01:30-05:00", "2026-11-01T02:00-05:00"]),
    ("*/30 * * * *", "America/New_York", "2026-03-08T01:10", ["2026-03-08T01:30-05:00", "2026-03-08T03:00-04:00", "2026-03-08T03:30-04:00"]),
    # Names, ranges, steps, last day.
    ("0 9 * * mon-fri", "Europe/Berlin", "2026-11-20T10:00", ["2026-11-23T09:00+01:00", "2026-11-24T09:00+01:00"]),
    ("0 0 L * *", "UTC", "2026-01-31T12:00", ["2026-02-28T00:00+00:00", "2026-03-31T00:00+00:00"]),
    ("0 0 29 feb *", "UTC", "2026-01-01T00:00", ["2028-02-29T00:00+00:00", "2032-02-29T00:00+00:00"]),
    ("5-20/5 8 1 */6 *", "UTC", "2026-01-01T08:06", ["2026-01-01T08:10+00:00", "2026-01-01T08:15+00:00", "2026-01-01T08:20+00:00"]),
]  # fmt: skip


@pytest.mark.parametrize(("expression", "zone", "start", "expected"), TABLE, ids=[f"{e} {z} {s}" for e, z, s, _ in TABLE])
def test_where_clocks_change(expression: str, zone: str, start: str, expected: list[str]) -> None:
    """Each row of the table: the next moments, with their offsets."""
    after = datetime.fromisoformat(start).replace(tzinfo=zone_of(zone))
    found = islice(ticks(expression, zone, after.astimezone(UTC)), len(expected))
    assert [f.astimezone(zone_of(zone)).isoformat(timespec="minutes") for f in found] == expected


def test_a_start_in_the_repeated_hour_never_goes_back() -> None:
    """Asked between the two passes of 1:30, the next 1:30 is tomorrow's: never a moment before the start."""
    after = datetime(2026, 11, 1, 1, 10, tzinfo=zone_of("America/New_York"), fold=1).astimezone(UTC)
    assert next(ticks("30 1 * * *", "America/New_York", after)) == datetime(2026, 11, 2, 6, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("expression", "zone", "said"),
    [
        ("0 0 30 2 *", "UTC", "no cron expression"),
        ("* * * * * *", "UTC", "five fields"),
        ("@daily", "UTC", "five fields"),
        ("", "UTC", "five fields"),
        ("61 * * * *", "UTC", "no cron expression"),
        ("0 9 * * *", "Mars/Olympus", "no time zone"),
        ("0 9 * * *", "../../etc/passwd", "no time zone"),
        ("0 9 * * *", "\x00", "no time zone"),
        ("0 9 * * *", "Europe", "no time zone"),
    ],
)
def test_what_nobody_can_keep_is_refused(expression: str, zone: str, said: str) -> None:
    """Impossible expressions, six fields, unknown and hostile zones: a sentence, not a traceback."""
    with pytest.raises(CadenceError, match=said):
        check(expression, zone, datetime(2026, 1, 1, tzinfo=UTC))


def test_the_distance_is_kept_for_the_applications_skip() -> None:
    """From Friday nine o'clock to Monday nine o'clock, over a change of clocks, in elapsed seconds."""
    friday = spread("0 9 * * mon-fri", "Europe/Berlin", datetime(2026, 10, 23, 6, tzinfo=UTC))
    assert friday.when == datetime(2026, 10, 23, 7, tzinfo=UTC)
    assert friday.distance == (3 * 24 + 1) * 3600


ZONES = [
    "America/New_York", "Europe/Berlin", "Australia/Lord_Howe", "Pacific/Apia", "America/Sao_Paulo", "Asia/Kolkata", "Africa/Casablanca",
    "Pacific/Chatham", "America/St_Johns", "Asia/Tehran", "Europe/Dublin", "Africa/Cairo", "Antarctica/Troll", "UTC",
]  # fmt: skip


def oracle(minutes: set[int], hours: set[int], days: set[int], months: set[int], zone: str, after: datetime) -> datetime:
    """The next moment of fixed times, from first principles: wall times of each day, mapped to instants one by one.

    A wall time that a zone skips stands for the first instant after the gap; of one that it repeats, the first pass counts. The gap is
    found by looking, minute by minute, at which instants the zone shows.
    """
    where = zone_of(zone)
    best: datetime | None = None
    day = after.astimezone(where).date() - timedelta(days=2)
    while best is None or day <= (best.astimezone(where).date() + timedelta(days=2)):
        if day.month in months and day.day in days:
            for hour in sorted(hours):
                for minute in sorted(minutes):
                    instant = _instant(day, hour, minute, where)
                    if instant > after and (best is None or instant < best):
                        best = instant
        day += timedelta(days=1)
    return best


def _instant(day: date, hour: int, minute: int, where: tzinfo) -> datetime:
    wall = datetime(day.year, day.month, day.day, hour, minute)
    # Instants whose wall clock shows at least this time, from well before; the first of them.
    guess = wall.replace(tzinfo=UTC) - timedelta(hours=15)
    step = timedelta(hours=1)
    while guess.astimezone(where).replace(tzinfo=None) < wall:
        guess += step
    guess -= step
    while guess.astimezone(where).replace(tzinfo=None) < wall:
        guess += timedelta(minutes=1)
    return guess


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(ZONES),
    st.datetimes(datetime(2010, 1, 1), datetime(2030, 1, 1)),
    st.sets(st.integers(0, 59), min_size=1, max_size=3),
    st.sets(st.integers(0, 23), min_size=1, max_size=3),
    st.sets(st.integers(1, 28), min_size=8, max_size=28),
)
def test_fixed_times_agree_with_the_oracle(
    zone: str, start: datetime, minutes: set[int], hours: set[int], days: set[int]
) -> None:
    """Fixed times in many zones over twenty years: the next occurrence is the oracle's."""
    after = start.replace(second=0, microsecond=0, tzinfo=UTC)
    expression = (
        f"{','.join(map(str, sorted(minutes)))} {','.join(map(str, sorted(hours)))} {','.join(map(str, sorted(days)))} * *"
    )
    assert next(ticks(expression, zone, after)) == oracle(minutes, hours, days, set(range(1, 13)), zone, after)


TRANSITIONS = [
    (zone, datetime.fromisoformat(at).replace(tzinfo=UTC))
    for zone, at in [
        ("America/New_York", "2026-03-08T07:00"), ("America/New_York", "2026-11-01T06:00"), ("Europe/Berlin", "2026-03-29T01:00"),
        ("Europe/Berlin", "2026-10-25T01:00"), ("Australia/Lord_Howe", "2026-10-03T15:30"), ("Australia/Lord_Howe", "2026-04-04T15:00"),
        ("Pacific/Apia", "2011-12-30T10:00"), ("America/Sao_Paulo", "2018-11-04T03:00"), ("America/Sao_Paulo", "2018-02-18T02:00"),
        ("Pacific/Chatham", "2026-09-26T14:00"), ("Africa/Casablanca", "2026-02-15T02:00"), ("Antarctica/Troll", "2026-03-29T01:00"),
    ]
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(TRANSITIONS), st.integers(-60 * 30, 60 * 30), st.integers(0, 59), st.integers(0, 23))
def test_around_changes_of_clocks(change: tuple[str, datetime], minutes: int, minute: int, hour: int) -> None:
    """The same, drawn within thirty hours of a change of clocks, where it matters."""
    zone, at = change
    after = at + timedelta(minutes=minutes)
    assert next(ticks(f"{minute} {hour} * * *", zone, after)) == oracle(
        {minute}, {hour}, set(range(1, 32)), set(range(1, 13)), zone, after
    )


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(TRANSITIONS), st.integers(-600, 600), st.sampled_from([5, 10, 15, 30]))
def test_wildcards_follow_elapsed_time(change: tuple[str, datetime], minutes: int, step: int) -> None:
    """`*/n * * * *` over a change of clocks: never further apart than n, never the same twice, always on the mark."""
    zone, at = change
    found = list(islice(ticks(f"*/{step} * * * *", zone, at + timedelta(minutes=minutes)), 40))
    assert all(b - a <= timedelta(minutes=step) for a, b in pairwise(found))
    assert all(f.astimezone(zone_of(zone)).minute % step == 0 for f in found)
    assert found == sorted(set(found))

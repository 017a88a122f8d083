"""Cron in time zones: clocks that change, days that never were, and an independent oracle over
twenty years."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache
from importlib import resources
from itertools import islice, pairwise, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recall_worker.cadence import CadenceError, check, replanned, spread, ticks
from recall_worker.cadence import zone as zone_of

TABLE = [
    # A fixed time in the gap: once, at the first instant after it.
    (
        "30 2 * * *",
        "America/New_York",
        "2026-03-07T12:00",
        ["2026-03-08T03:00-04:00", "2026-03-09T02:30-04:00"],
    ),
    (
        "30 2 * * *",
        "Europe/Berlin",
        "2026-03-28T12:00",
        ["2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00"],
    ),
    (
        "15 2 * * *",
        "Australia/Lord_Howe",
        "2026-10-03T12:00",
        ["2026-10-04T02:30+11:00", "2026-10-05T02:15+11:00"],
    ),
    (
        "0 0 * * *",
        "America/Sao_Paulo",
        "2018-11-03T12:00",
        ["2018-11-04T01:00-02:00", "2018-11-05T00:00-02:00"],
    ),
    (
        "0 12 * * *",
        "Pacific/Apia",
        "2011-12-29T13:00",
        ["2011-12-31T00:00+14:00", "2011-12-31T12:00+14:00"],
    ),
    # Two fixed times in one gap fall on one instant: once.
    (
        "15,45 2 * * *",
        "America/New_York",
        "2026-03-08T01:00",
        ["2026-03-08T03:00-04:00", "2026-03-09T02:15-04:00"],
    ),
    # A repeated fixed time: once, the first.
    (
        "30 1 * * *",
        "America/New_York",
        "2026-10-31T12:00",
        ["2026-11-01T01:30-04:00", "2026-11-02T01:30-05:00"],
    ),
    (
        "30 2 * * *",
        "Europe/Berlin",
        "2026-10-24T12:00",
        ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"],
    ),
    (
        "45 1 * * *",
        "Australia/Lord_Howe",
        "2026-04-04T12:00",
        ["2026-04-05T01:45+11:00", "2026-04-06T01:45+10:30"],
    ),
    (
        "30 23 * * *",
        "America/Sao_Paulo",
        "2018-02-17T12:00",
        ["2018-02-17T23:30-02:00", "2018-02-18T23:30-03:00"],
    ),
    # Wildcards follow elapsed time: every half hour, also twice through the repeated hour, and over
    # the gap.
    (
        "*/30 * * * *",
        "America/New_York",
        "2026-11-01T00:40",
        [
            "2026-11-01T01:00-04:00",
            "2026-11-01T01:30-04:00",
            "2026-11-01T01:00-05:00",
            "2026-11-01T01:30-05:00",
            "2026-11-01T02:00-05:00",
        ],
    ),
    (
        "*/30 * * * *",
        "America/New_York",
        "2026-03-08T01:10",
        ["2026-03-08T01:30-05:00", "2026-03-08T03:00-04:00", "2026-03-08T03:30-04:00"],
    ),
    # Also where they change by half an hour, and hours later; and a time that the clock never shows
    # is none.
    (
        "*/30 9 * * *",
        "Australia/Lord_Howe",
        "2026-04-04T10:00",
        ["2026-04-05T09:00+10:30", "2026-04-05T09:30+10:30", "2026-04-06T09:00+10:30"],
    ),
    (
        "*/20 2 * * *",
        "Australia/Lord_Howe",
        "2026-10-03T10:00",
        ["2026-10-04T02:40+11:00", "2026-10-05T02:00+11:00"],
    ),
    (
        "* * 30 * *",
        "Pacific/Apia",
        "2011-12-29T12:00",
        ["2012-01-30T00:00+14:00", "2012-01-30T00:01+14:00"],
    ),
    (
        "*/30 0 4 11 *",
        "America/Sao_Paulo",
        "2018-11-01T12:00",
        ["2019-11-04T00:00-03:00", "2019-11-04T00:30-03:00"],
    ),
    # A fixed time that falls in the gap whenever it comes.
    (
        "30 2 * 3 sun#2",
        "America/New_York",
        "2026-01-01T00:00",
        ["2026-03-08T03:00-04:00", "2027-03-14T03:00-04:00"],
    ),
    # Names, ranges, steps, last day.
    (
        "0 9 * * mon-fri",
        "Europe/Berlin",
        "2026-11-20T10:00",
        ["2026-11-23T09:00+01:00", "2026-11-24T09:00+01:00"],
    ),
    ("0 0 L * *", "UTC", "2026-01-31T12:00", ["2026-02-28T00:00+00:00", "2026-03-31T00:00+00:00"]),
    (
        "0 0 29 feb *",
        "UTC",
        "2026-01-01T00:00",
        ["2028-02-29T00:00+00:00", "2032-02-29T00:00+00:00"],
    ),
    (
        "5-20/5 8 1 */6 *",
        "UTC",
        "2026-01-01T08:06",
        ["2026-01-01T08:10+00:00", "2026-01-01T08:15+00:00", "2026-01-01T08:20+00:00"],
    ),
]


@pytest.mark.parametrize(
    ("expression", "zone", "start", "expected"), TABLE, ids=[f"{e} {z} {s}" for e, z, s, _ in TABLE]
)
def test_where_clocks_change(expression: str, zone: str, start: str, expected: list[str]) -> None:
    """Each row of the table: the next moments, with their offsets."""
    after = datetime.fromisoformat(start).replace(tzinfo=zone_of(zone))
    found = islice(ticks(expression, zone, after.astimezone(UTC)), len(expected))
    assert [f.astimezone(zone_of(zone)).isoformat(timespec="minutes") for f in found] == expected


def test_a_start_in_the_repeated_hour_never_goes_back() -> None:
    """Asked between the two passes of 1:30, the next 1:30 is tomorrow's: never a moment before the
    start."""
    after = datetime(2026, 11, 1, 1, 10, tzinfo=zone_of("America/New_York"), fold=1).astimezone(UTC)
    assert next(ticks("30 1 * * *", "America/New_York", after)) == datetime(
        2026, 11, 2, 6, 30, tzinfo=UTC
    )


@pytest.mark.parametrize(
    ("expression", "zone", "said"),
    [
        ("0 0 30 2 *", "UTC", "'0 0 30 2 [*]' never comes: its months have no such day"),
        ("0 0 31 4,jun *", "UTC", "its months have no such day"),
        ("0 0 32 2 *", "UTC", "no cron expression: bad day-of-month"),
        ("0 0 */30 * mon#2", "UTC", "never comes"),
        ("*/30 2 * 3 sun#2", "America/New_York", "never comes"),
        ("9" * 5000 + " * * * *", "UTC", "at most 1000 characters"),
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
    """Impossible expressions, six fields, unknown and hostile zones: a sentence, not a
    traceback."""
    with pytest.raises(CadenceError, match=said):
        check(expression, zone, datetime(2026, 1, 1, tzinfo=UTC))


def test_the_distance_is_kept_for_the_applications_skip() -> None:
    """From Friday nine o'clock to Monday nine o'clock, over a change of clocks, in elapsed
    seconds."""
    friday = spread("0 9 * * mon-fri", "Europe/Berlin", datetime(2026, 10, 23, 6, tzinfo=UTC))
    assert friday.when == datetime(2026, 10, 23, 7, tzinfo=UTC)
    assert friday.distance == (3 * 24 + 1) * 3600


ZONES = [
    "America/New_York",
    "Europe/Berlin",
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "America/Sao_Paulo",
    "Asia/Kolkata",
    "Africa/Casablanca",
    "Pacific/Chatham",
    "America/St_Johns",
    "Asia/Tehran",
    "Europe/Dublin",
    "Africa/Cairo",
    "Antarctica/Troll",
    "UTC",
]


ODD = [
    "Australia/Lord_Howe",
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "America/Sao_Paulo",
    "America/St_Johns",
    "Antarctica/Troll",
]
"""Half an hour, a day, midnight, a minute past midnight, two hours."""
ALL_ZONES = sorted(set((resources.files("tzdata") / "zones").read_text().split()))
FIRST, LAST = datetime(2010, 1, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC)
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)


@dataclass(frozen=True)
class Fields:
    """A cron expression, and what it means, by the hand that drew it: no test reads expressions."""

    text: str
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    """0 is a month's last."""
    months: frozenset[int]
    weekdays: frozenset[int]
    """Monday is 1."""
    fixed: bool
    """Whether neither the minute nor the hour begins with `*`."""
    both: bool
    """Whether the day of the month and the weekday must both match."""

    def on(self, day: date) -> bool:
        of_month = day.day in self.days or (0 in self.days and (day + DAY).day == 1)
        of_week = day.isoweekday() in self.weekdays
        return day.month in self.months and (
            of_month and of_week if self.both else of_month or of_week
        )


@cache
def stretches(zone: str) -> list[tuple[datetime, datetime, timedelta]]:
    """The twenty years in stretches in which a zone's clock is as far from UTC: from, to, how far.
    Asked of instants alone."""
    where, found = zone_of(zone), list[tuple[datetime, datetime, timedelta]]()

    def offset(instant: datetime) -> timedelta:
        return instant.astimezone(where).replace(tzinfo=UTC) - instant

    start = instant = FIRST - 4 * DAY
    step = timedelta(hours=11)
    while instant < LAST + 4 * DAY:
        low, high = instant, instant + step
        if offset(low) != offset(high):
            while high - low > MINUTE:
                middle = low + (high - low) // MINUTE // 2 * MINUTE
                low, high = (middle, high) if offset(middle) == offset(low) else (low, middle)
            found.append((start, high, offset(low)))
            start = high
        instant += step
    return [*found, (start, instant, offset(start))]


def oracle(fields: Fields, zone: str, after: datetime, until: datetime) -> list[datetime]:
    """All moments after an instant and up to another, from first principles.

    The clock on the wall is followed from stretch to stretch. A fixed time comes when the clock
    first shows at least that: what it jumps over comes with the jump, and what it showed before
    does not come again. Otherwise each instant counts at which it shows a match.
    """
    found = set[datetime]()
    reached: datetime | None = None
    for start, end, offset in stretches(zone):
        shows, shown = start + offset, end + offset
        lowest = shows if reached is None or not fields.fixed else reached
        reached = shown if reached is None else max(reached, shown)
        if end <= after or start > until:
            continue
        day = max(lowest, after + offset - 2 * DAY).date()
        while day <= min(shown, until + offset).date():
            if fields.on(day):
                walls = (
                    datetime(day.year, day.month, day.day, h, m, tzinfo=UTC)
                    for h in fields.hours
                    for m in fields.minutes
                )
                found |= {max(start, wall - offset) for wall in walls if lowest <= wall < shown}
            day += DAY
    return sorted(instant for instant in found if after < instant <= until)


def daily(*walls: str) -> Fields:
    """The same times every day."""
    hours, minutes = ({int(wall.split(":")[part]) for wall in walls} for part in (0, 1))
    text = f"{','.join(map(str, minutes))} {','.join(map(str, hours))} * * *"
    every = frozenset(range(32)), frozenset(range(1, 13)), frozenset(range(1, 8))
    return Fields(text, frozenset(minutes), frozenset(hours), *every, fixed=True, both=True)


@st.composite
def field(draw: st.DrawFn, low: int, high: int, names: str = "") -> tuple[str, set[int]]:
    """A field's text, and the numbers that it means."""
    called = {low + n: name for n, name in enumerate(names.split())}

    def said(number: int) -> str:
        return (
            draw(st.sampled_from([str(number), called[number]]))
            if number in called
            else str(number)
        )

    step, first = draw(st.integers(1, 12)), draw(st.integers(low, high - 1))
    last = draw(st.integers(first + 1, high))
    match draw(st.sampled_from(["*", "*/n", "a-b", "a-b/n", "a/n", "a,b", "a,b", "a,b"])):
        case "*":
            return "*", set(range(low, high + 1))
        case "*/n":
            return f"*/{step}", set(range(low, high + 1, step))
        case "a-b":
            return f"{said(first)}-{said(last)}", set(range(first, last + 1))
        case "a-b/n":
            return f"{said(first)}-{said(last)}/{step}", set(range(first, last + 1, step))
        case "a/n":
            return f"{said(first)}/{step}", set(range(first, high + 1, step))
        case _:
            some = draw(st.lists(st.integers(low, high), min_size=1, max_size=4))
            return ",".join(map(said, some)), set(some)


@st.composite
def expressions(draw: st.DrawFn) -> Fields:
    # Most often on every day, as clocks change on few.
    every = st.just(("*", set(range(32)))) | st.just(("*", set(range(32))))
    minute, minutes = draw(field(0, 59))
    hour, hours = draw(field(0, 23))
    day, days = draw(every | field(1, 31) | st.just(("L", {0})))
    month, months = draw(every | field(1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"))
    weekday, weekdays = draw(every | field(0, 7, "sun mon tue wed thu fri sat"))
    return Fields(
        f"{minute} {hour} {day} {month} {weekday}",
        frozenset(minutes),
        frozenset(hours),
        frozenset(days),
        frozenset(months),
        frozenset(n or 7 for n in weekdays),
        fixed=not (minute.startswith("*") or hour.startswith("*")),
        both=day.startswith("*") or weekday.startswith("*"),
    )


def worked_out(fields: Fields, zone: str, after: datetime, until: datetime) -> list[datetime]:
    """All moments after an instant and up to another, as the product has them."""
    try:
        return list(takewhile(lambda tick: tick <= until, ticks(fields.text, zone, after)))
    except CadenceError as error:
        assert "never comes" in str(error)
        return []


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(fields=expressions(), zone=st.sampled_from(ODD) | st.sampled_from(ALL_ZONES), data=st.data())
def test_any_expression_in_any_zone_agrees_with_the_oracle(
    fields: Fields, zone: str, data: st.DataObject
) -> None:
    """All moments of some days, most of them around a change of clocks, in twenty years of all
    zones there are."""
    changes = [start for start, _, _ in stretches(zone)[1:]]
    anywhere = data.draw(st.integers(0, 3), label="anywhere") == 0
    if changes and not anywhere:
        after = (
            data.draw(st.sampled_from(changes), label="change")
            + data.draw(st.integers(-1800, 1800), label="minutes") * MINUTE
        )
    else:
        after = FIRST + data.draw(st.integers(0, 20 * 365 * 1440), label="minute") * MINUTE
    until = after + (3 if len(fields.minutes) * len(fields.hours) > 9 else 400) * DAY
    assert worked_out(fields, zone, after, min(until, LAST)) == oracle(
        fields, zone, after, min(until, LAST)
    )


def twenty_years(zone: str) -> None:
    for fields in (daily("2:30", "0:00"), daily("1:45", "12:00", "23:15")):
        found = worked_out(fields, zone, FIRST, LAST)
        assert found == oracle(fields, zone, FIRST, LAST)
        assert len(found) > 2 * 365 * 20


@pytest.mark.parametrize("zone", ZONES)
def test_every_occurrence_of_twenty_years(zone: str) -> None:
    """From 2010 to 2030, one after the other, at times that clocks skip and repeat: none missing,
    none twice, none besides."""
    twenty_years(zone)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_every_occurrence_of_twenty_years_in_every_zone() -> None:
    """The same, in all zones there are; of those whose clocks agree throughout, in one."""
    for zone in {tuple(stretches(zone)): zone for zone in ALL_ZONES}.values():
        twenty_years(zone)


TRANSITIONS = [
    (zone, datetime.fromisoformat(at).replace(tzinfo=UTC))
    for zone, at in [
        ("America/New_York", "2026-03-08T07:00"),
        ("America/New_York", "2026-11-01T06:00"),
        ("Europe/Berlin", "2026-03-29T01:00"),
        ("Europe/Berlin", "2026-10-25T01:00"),
        ("Australia/Lord_Howe", "2026-10-03T15:30"),
        ("Australia/Lord_Howe", "2026-04-04T15:00"),
        ("Pacific/Apia", "2011-12-30T10:00"),
        ("America/Sao_Paulo", "2018-11-04T03:00"),
        ("America/Sao_Paulo", "2018-02-18T02:00"),
        ("Pacific/Chatham", "2026-09-26T14:00"),
        ("Africa/Casablanca", "2026-02-15T02:00"),
        ("Antarctica/Troll", "2026-03-29T01:00"),
    ]
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(TRANSITIONS), st.integers(-600, 600), st.sampled_from([5, 10, 15, 30]))
def test_wildcards_follow_elapsed_time(
    change: tuple[str, datetime], minutes: int, step: int
) -> None:
    """`*/n * * * *` over a change of clocks: never further apart than n, never the same twice,
    always on the mark."""
    zone, at = change
    found = list(islice(ticks(f"*/{step} * * * *", zone, at + timedelta(minutes=minutes)), 40))
    assert all(b - a <= timedelta(minutes=step) for a, b in pairwise(found))
    assert all(f.astimezone(zone_of(zone)).minute % step == 0 for f in found)
    assert found == sorted(set(found))


@pytest.mark.parametrize(
    ("expression", "shift", "to"),
    [
        # By how many minutes the moment that waits is off, and where it then falls.
        ("0 9 * * *", 0, 0),
        ("0 9 * * *", 60, -60),
        ("0 9 * * *", -60, 60),
        ("0 9 * * *", 45, -45),
        ("0 9 * * *", 24 * 60, 0),
        ("0 9 1 * *", -24 * 60, 24 * 60),
        # Of two as near the later.
        ("0 * * * *", 30, 30),
        ("*/30 * * * *", 15, 15),
        ("* * * * *", 60, 0),
        # Chosen by somebody: no zone ever moves so.
        ("0 9 * * *", 7, 0),
        # Nothing is near.
        ("0 9 1 1 *", 0, 0),
    ],
)
def test_planned_anew(expression: str, shift: int, to: int) -> None:
    """A moment that is still a tick stays; another goes to the nearest, and each has the distance
    from there."""
    tick = datetime(2027, 7, 1, 7, tzinfo=UTC)
    nominal = tick + timedelta(minutes=shift)
    found = replanned(expression, "Europe/Berlin", nominal)
    assert found.when == nominal + timedelta(minutes=to)
    following = next(ticks(expression, "Europe/Berlin", found.when))
    assert found.distance == (following - found.when).total_seconds()

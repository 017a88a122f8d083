"""When cron expressions fall, from first principles: every moment of a few expressions over two
years, worked out from wall clocks.

Independent of recall_worker.cadence (but for the zones' data) and of the library behind it: a fixed
wall time stands for the first instant at which the zone's clock shows at least that (so a gap gives
the instant after it, a repetition its first pass); a wildcard minute for every such minute that
passes.
"""

from __future__ import annotations

from bisect import bisect_right
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import cache

from recall_worker.cadence import zone as zone_of

FIRST, LAST = date(2027, 2, 1), date(2028, 6, 1)

FIXED: dict[str, tuple[int, int, set[int]]] = {
    "30 2 * * *": (2, 30, set(range(7))),
    "30 1 * * *": (1, 30, set(range(7))),
    "0 9 * * *": (9, 0, set(range(7))),
    "0 9 * * mon-fri": (9, 0, {0, 1, 2, 3, 4}),
    "45 1 * * *": (1, 45, set(range(7))),
}
"""Expression → hour, minute, weekdays (Monday is 0)."""
EVERY: dict[str, int] = {"*/30 * * * *": 30, "*/20 * * * *": 20}
"""Expression → minutes."""
EXPRESSIONS = [*FIXED, *EVERY]
ZONES = ["America/New_York", "Europe/Berlin", "Australia/Lord_Howe", "UTC"]
KNOWN = [
    ("30 2 * * *", "America/New_York"),
    ("30 1 * * *", "America/New_York"),
    ("0 9 * * mon-fri", "Europe/Berlin"),
    ("45 1 * * *", "Australia/Lord_Howe"),
    ("*/30 * * * *", "America/New_York"),
    ("*/20 * * * *", "Australia/Lord_Howe"),
]
"""Expressions in zones whose clocks change near a moment of theirs."""


@cache
def moments(expression: str, zone: str) -> list[datetime]:
    """All moments between FIRST and LAST, in UTC, each once."""
    where = zone_of(zone)
    if expression in EVERY:
        step = EVERY[expression]
        instant = datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC)
        found = []
        while instant.date() < LAST:
            if instant.astimezone(where).minute % step == 0:
                found.append(instant)
            instant += timedelta(minutes=10)
        return found
    hour, minute, weekdays = FIXED[expression]
    days = [FIRST + timedelta(days=n) for n in range((LAST - FIRST).days)]
    return sorted({_first(day, hour, minute, where) for day in days if day.weekday() in weekdays})


def after(expression: str, zone: str, instant: datetime, nth: int = 1) -> datetime:
    """The nth moment after an instant."""
    found = moments(expression, zone)
    return found[bisect_right(found, instant) + nth - 1]


def between(expression: str, zone: str, start: datetime, end: datetime) -> int:
    """How many moments lie after `start` and up to `end`."""
    found = moments(expression, zone)
    return max(0, bisect_right(found, end) - bisect_right(found, start))


def _first(day: date, hour: int, minute: int, where: tzinfo) -> datetime:
    wall = datetime(day.year, day.month, day.day, hour, minute)
    instant = wall.replace(tzinfo=UTC) - timedelta(hours=15)
    while instant.astimezone(where).replace(tzinfo=None) < wall:
        instant += timedelta(hours=1)
    instant -= timedelta(hours=1)
    while instant.astimezone(where).replace(tzinfo=None) < wall:
        instant += timedelta(minutes=1)
    return instant

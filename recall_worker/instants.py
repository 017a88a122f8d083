"""Instants as people write them: `2027-01-31T09:00`, `2027-01-31 09:00:30+01`, a date alone. The
one parser, for every option that takes a time. Pure: text and zone in, an instant out.

A time without an offset is the wall clock's in a zone. One that the clocks skip is the first
instant after the gap, one that they repeat is the first of the two: the rule of cron expressions
(cadence). Either is said in a note, as its author may have meant another instant.

Never here: what is past (PostgreSQL's clock decides that), which zones there are (cadence).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo

EXAMPLES = "2027-01-31T09:00 or 2027-01-31T09:00+01:00"
_OFFSET_MOST = timedelta(hours=16)
"""PostgreSQL reads no larger offset. The largest in use is 14 h."""
_MARGIN = timedelta(days=1)
"""Distance from the ends of the calendar: an instant must have a date wherever it is looked at."""
_TICK = timedelta(microseconds=1)
"""PostgreSQL's resolution."""

_NONE: tuple[str, ...] = ()

_DATE = r"(?P<date>\d{4}-\d\d-\d\d|\d{8}|\d{4}-?W\d\d-?[1-7])"
_TIME = r"(?P<hour>\d\d)(?::?(?P<minute>\d\d)(?::?(?P<second>\d\d)(?:[.,](?P<part>\d+))?)?)?"
_OFFSET = r"(?P<sign>[+\u2212-])(?P<hours>\d\d)(?::?(?P<minutes>\d\d)(?::?(?P<seconds>\d\d))?)?"
_UTC = r"(?P<utc>z|utc|gmt)"
_INSTANT = re.compile(
    rf"{_DATE}(?:(?:t| +){_TIME})?(?: *(?:{_OFFSET}|{_UTC}))?", re.ASCII | re.IGNORECASE
)
_NAMED = re.compile(r"(.*\d) *\[?([a-z]+(?:/[a-z0-9_+-]+)*)\]?", re.ASCII | re.IGNORECASE)


class InstantError(ValueError):
    """The text is not an instant. The message is a clause that says why; `instead`: what to
    write."""

    def __init__(self, why: str, instead: str = EXAMPLES) -> None:
        super().__init__(why)
        self.instead = instead


@dataclass(frozen=True, slots=True)
class Instant:
    when: datetime
    """Aware, in UTC."""
    notes: tuple[str, ...] = ()
    """Sentences for people: how a time was read that the clocks skip or repeat."""


def parse(text: str, zone: tzinfo | None = None, *, whole_day: bool = False) -> Instant:
    """The instant that a text names; without an offset, by the wall clock in `zone` (None: the
    host's).

    A date alone is the first instant of that day, or with `whole_day` its last one. Raises
    InstantError.
    """
    given = text.strip()
    found = _INSTANT.fullmatch(given)
    if found is None:
        raise _unread(given)
    try:
        day = date.fromisoformat(found["date"].upper())
        wall, next_day = _wall(day, found)
        offset = _offset(found)
    except ValueError:
        raise InstantError("is not a time: there is no such date, time of day or offset") from None
    alone, notes = found["hour"] is None, _NONE
    if alone and offset is not None:
        shift = "Z" if found["utc"] else found[0][len(found["date"]) :].strip()
        raise InstantError(
            "has an offset and no time of day",
            f"{day.isoformat()}T00:00{shift} (a date alone is a day in the zone of --tz)",
        )
    try:
        if alone and whole_day:
            return Instant(_on_clock(wall + timedelta(days=1), zone)[0] - _TICK)
        if next_day:
            wall += timedelta(days=1)
        if offset is not None:
            when = wall.replace(tzinfo=timezone(offset)).astimezone(UTC)
        else:
            when, notes = _on_clock(wall, zone)
        # Raises OverflowError.
        when - _MARGIN
        when + _MARGIN
    except (OverflowError, OSError, ValueError):
        # The C library's clock, where the host's zone decides, may have less room than ours.
        raise InstantError("is beyond the calendar") from None
    # The first instant of a day is what a date alone says, also where the clocks skip midnight.
    return Instant(when, () if alone else notes)


def _wall(day: date, found: re.Match[str]) -> tuple[datetime, bool]:
    """The wall clock's time, and whether it is one day later: 24:00 is the end of its day."""
    hour, minute, second = (int(found[name] or 0) for name in ("hour", "minute", "second"))
    part = int((found["part"] or "").ljust(6, "0")[:6])
    if hour == 24 and minute == second == part == 0:
        return datetime.combine(day, time()), True
    return datetime.combine(day, time(hour, minute, second, part)), False


def _offset(found: re.Match[str]) -> timedelta | None:
    if found["utc"]:
        return timedelta(0)
    if not found["sign"]:
        return None
    hours, minutes, seconds = (int(found[name] or 0) for name in ("hours", "minutes", "seconds"))
    offset = timedelta(hours=hours, minutes=minutes, seconds=seconds)
    if max(minutes, seconds) > 59 or offset >= _OFFSET_MOST:
        raise ValueError
    return offset if found["sign"] == "+" else -offset


def _on_clock(wall: datetime, zone: tzinfo | None) -> tuple[datetime, tuple[str, ...]]:
    """The instant at which a clock in the zone shows this time."""
    before, after = sorted(
        (
            wall.replace(fold=fold) if zone is None else wall.replace(fold=fold, tzinfo=zone)
        ).astimezone(UTC)
        for fold in (0, 1)
    )
    if before == after:
        return before, ()
    where, shown = "on this host" if zone is None else f"in {zone}", f"{wall:%Y-%m-%d %H:%M}"
    if before.astimezone(zone).replace(tzinfo=None, fold=0) == wall:
        return before, (
            f"The clocks {where} show {shown} twice: the first is taken, {_shown(before, zone)}; "
            f"the second is {_shown(after, zone)}.",
        )
    # Read with either offset, a time in a gap falls on another side of it. Clocks change at whole
    # seconds.
    before, after = before.replace(microsecond=0), after.replace(microsecond=0)
    held = before.astimezone(zone).utcoffset()
    while after - before > timedelta(seconds=1):
        middle = before + timedelta(seconds=(after - before) // timedelta(seconds=2))
        if middle.astimezone(zone).utcoffset() == held:
            before = middle
        else:
            after = middle
    return after, (
        f"The clocks {where} skip {shown}: the first instant after that is taken, "
        f"{_shown(after, zone)}.",
    )


def _shown(when: datetime, zone: tzinfo | None) -> str:
    return when.astimezone(zone).isoformat(timespec="minutes")


def _unread(given: str) -> InstantError:
    """Why a text is no instant, with the nearest that is one."""
    if _INSTANT.fullmatch(f"2027-01-31 {given}") and re.match(r"\d\d:", given):
        return InstantError("has no date", f"2027-01-31T{given}")
    if (named := _NAMED.fullmatch(given)) is not None:
        plain = _INSTANT.fullmatch(named[1])
        if plain is not None and plain["hour"] is not None and "/" in named[2]:
            return InstantError("names a zone", f"{named[1]} with --tz {named[2]}")
    if (early := re.fullmatch(r"(\d{4}-\d\d-\d\d)[T ]+(\d:.*)", given, re.IGNORECASE)) is not None:
        return InstantError("is not a time: an hour has two digits", f"{early[1]}T0{early[2]}")
    return InstantError("is not a time")

"""Pure time: when the next occurrence falls, how many were missed, and what it means that the
application moved one.

Three cadences. `interval`, the application's own rule and the default: interval_seconds after the
run ended. `grid`: every interval_seconds of elapsed time from the first trigger, without drift.
`cron`: five fields in an IANA time zone.

cronsim parses cron expressions, with the meaning of Debian's cron: a fixed time in a gap falls on
the first instant after it, a repeated fixed time on its first; where the minute or the hour starts
with `*`, each instant counts at which the clock shows a match. The ticks are calculated here:
cronsim advances by whole hours, and so loses some on a day on which clocks change by half an hour.
Zones are those of the tzdata package, so that all replicas agree whatever their hosts have.

On grid and cron, the due moments up to an occurrence's first claim belong to it (it records how
many it stands for besides its own). Later ones, during its run or while it is deferred, belong to
the next. No clock is read here: the instants come with the claim.

Where a rule was edited, its moments count from the edit. What was skipped before it comes with the
row (`skips`). Never here: what an ending means for the row (judge).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from functools import lru_cache
from importlib import resources
from itertools import chain, islice, takewhile
from typing import Any
from zoneinfo import ZoneInfo

import tzdata
from cronsim import CronSim, CronSimError

from . import crontab
from .recall import After, AsMoved, At, Claim, Recall

TZDATA = tzdata.IANA_VERSION
"""The version of IANA's data by which the moments of zones are computed here, such as 2026f; a
later one is the greater text."""
KINDS = ("interval", "grid", "cron")
LONGEST = 2_147_483_647
"""Seconds of the longest interval, 68 years: the most that `interval_seconds` holds, except in a
table that was made with a wider column."""
GRACE_LEAST = 1
"""Seconds of the shortest grace: no call is sent in the very instant at which it is due, so that
with a grace of 0 nothing would ever run."""
COUNTED_MOST = 10_000
"""Cron ticks are counted up to this number: about seven days of an every-minute recall."""
SKIPS_BELIEVED = 10
"""A move of one cron recall by up to so many distances counts as skips, wherever it leads."""
PAST_AFTER = timedelta(minutes=1)
"""A time that lies further back than this is past: one to the minute, such as 09:00, is typed
within it. `sql/client.sql` (`schedule`) has the same."""
FAR = datetime(9997, 1, 1, tzinfo=UTC)
"""Stands for a moment beyond the calendar."""
CRON_LONGEST = 1000
"""Characters of the longest cron expression: three times what names every minute, hour, day and
month."""
SEARCHED = 50
"""Years without a tick after which a cron expression counts as one that never comes. The rarest, 29
February on a given weekday, waits 40."""

SHIFT, SHIFT_MOST = timedelta(minutes=15), timedelta(hours=26)
"""Governments move their zones by multiples of the first, and by less than the second (a day, at
the date line)."""

_FOLDED = timedelta(hours=25)
"""Clocks are put back by less than this."""
_BEGINNING, _END = datetime(1, 1, 1), date(9999, 12, 30)


class CadenceError(ValueError):
    """A cadence that makes no sense; the text is a sentence for people."""


class Unfit(CadenceError):
    """An edit that makes no sense for this recall as it stands."""


class Zone(ZoneInfo):
    """A zone of the package's data. It can be copied and pickled, by its name."""

    def __reduce__(self) -> tuple[Callable[[str | None], Zone], tuple[str]]:
        return zone, (self.key,)


@lru_cache(1)
def zones() -> Mapping[str, str]:
    """The names of all zones, by themselves in lower case."""
    names = resources.files("tzdata").joinpath("zones").read_text().split()
    return {name.lower(): name for name in names}


@lru_cache(256)
def zone(name: str | None) -> Zone:
    """The IANA zone of this name, in any case; UTC for None. Its `key` is the name as IANA spells
    it. Raises CadenceError."""
    key = "UTC" if name is None else zones().get(name.lower())
    if key is None:
        raise CadenceError(f"there is no time zone {name!r}: {_instead(name or '')}")
    with resources.files("tzdata").joinpath("zoneinfo", *key.split("/")).open("rb") as data:
        return Zone.from_file(data, key=key)


def foreign_zone(recall: Claim | Recall) -> str | None:
    """The zone of a cron recall that this process's tzdata does not know; None where it does, or
    where none is needed. Others may know it."""
    if recall.call_type != "recurring" or recall.cadence != "cron" or recall.time_zone is None:
        return None
    return None if recall.time_zone.lower() in zones() else recall.time_zone


def _instead(name: str) -> str:
    """What the author of a name that no zone has may have meant."""
    given = name[:100].lower().strip().replace(" ", "_")
    cities = {lower.rpartition("/")[2]: lower for lower in sorted(zones(), reverse=True)}
    near = difflib.get_close_matches(given, zones(), 1, 0.8)
    near += [cities[city] for city in difflib.get_close_matches(given, cities, 1, 0.8)]
    if not near:
        return "give an IANA name, such as Europe/Berlin"
    return f"did you mean {zones()[near[0]]}?"


def is_past(at: datetime, now: datetime) -> bool:
    """Whether a time that somebody names lies in the past, and not only in the current minute."""
    return now - at > PAST_AFTER


def ticks(expression: str, time_zone: str | None, after: datetime) -> Iterator[datetime]:
    """The ticks of a cron expression after an instant, as aware UTC datetimes. Raises
    CadenceError."""
    where, fields = zone(time_zone), _fields(expression)
    try:
        local = after.astimezone(where).replace(tzinfo=None)
    except OverflowError:
        return  # The end of the calendar.
    # Where clocks were put back, a later instant may show an earlier local time.
    begin = max(local, _BEGINNING + _FOLDED) - _FOLDED
    if where.utcoffset(begin) == where.utcoffset(local):
        begin = local
    last = after
    for tick in chain.from_iterable(_batches(fields, where, begin)):
        # Two fixed times in one gap fall on the same instant.
        if tick > last:
            last = tick
            yield tick


@lru_cache(256)
def _fields(expression: str) -> CronSim:
    """The fields as cronsim parses them; it is never iterated. Raises CadenceError."""
    if len(expression) > CRON_LONGEST:
        raise CadenceError(
            f"a cron expression has at most {CRON_LONGEST} characters, "
            f"and this one {len(expression)}"
        )
    parts = expression.split()
    if len(parts) != 5:
        raise CadenceError(
            f"{expression!r} is no cron expression: it takes five fields, "
            "minute hour day month weekday"
        )
    try:
        return CronSim(expression, _BEGINNING)
    except CronSimError as error:
        reason = str(error).lower()
    try:
        CronSim(" ".join([*parts[:3], "*", parts[4]]), _BEGINNING)
    except CronSimError:
        raise CadenceError(f"{expression!r} is no cron expression: {reason}") from None
    if "day-of-month" in reason:
        raise CadenceError(f"{expression!r} never comes: its months have no such day")
    raise CadenceError(f"{expression!r} is no cron expression: {reason}")


def _batches(fields: CronSim, where: ZoneInfo, begin: datetime) -> Iterator[list[datetime]]:
    """All ticks from a local time on, in order."""
    fixed = not (fields.parts[1].startswith("*") or fields.parts[2].startswith("*"))
    minutes = [timedelta(minutes=minute) for minute in sorted(fields.minutes)]
    held: list[datetime] = []
    since, found = begin, begin.year
    for hour in _hours(fields, begin):
        if hour.year > found + SEARCHED:
            break
        offset = where.utcoffset(hour) or timedelta(0)
        steady = where.utcoffset(hour.replace(minute=59, fold=1)) == offset
        # Hours in which clocks change may overlap, where they are put back by more than one hour.
        if held and (steady or hour - since > _FOLDED):
            yield sorted(held)
            held, found = [], hour.year
        if steady:
            base = hour.replace(tzinfo=UTC) - offset
            yield [base + minute for minute in minutes]
            found = hour.year
        else:
            since = since if held else hour
            for minute in minutes:
                held += _instants(hour + minute, where, fixed)
    yield sorted(held)


def _hours(fields: CronSim, begin: datetime) -> Iterator[datetime]:
    """The matching hours in local time, from `begin` on."""
    day, hours, found = begin.date(), sorted(fields.hours), begin.year
    while day < _END and day.year <= found + SEARCHED:
        if day.month not in fields.months:
            day = (day.replace(day=1) + timedelta(days=32)).replace(day=1)
            continue
        if fields.match_day(day):
            found = day.year
            for hour in hours:
                if hour >= begin.hour or day > begin.date():
                    yield datetime(day.year, day.month, day.day, hour)
        day += timedelta(days=1)


def _instants(wall: datetime, where: ZoneInfo, fixed: bool) -> list[datetime]:
    """The instants at which a clock shows this local time. Of a fixed time only the first one, or,
    in a gap, the first instant after the gap."""
    while True:
        passes = [wall.replace(tzinfo=where, fold=fold).astimezone(UTC) for fold in (0, 1)]
        shown = [
            instant for instant in passes if instant.astimezone(where).replace(tzinfo=None) == wall
        ]
        if not fixed:
            return shown
        if shown:
            return shown[:1]
        wall += timedelta(minutes=1)


def check(expression: str, time_zone: str | None, after: datetime) -> datetime:
    """The first tick after an instant of a cron expression that somebody writes now. Raises
    CadenceError where it is unreadable, can't mean what it says, or never comes."""
    if len(expression) <= CRON_LONGEST and (wrong := crontab.objection(expression)) is not None:
        raise CadenceError(wrong)
    return _first(expression, time_zone, after)


def _first(expression: str, time_zone: str | None, after: datetime) -> datetime:
    """The first tick of a cron expression that a row has, after an instant. Raises CadenceError
    where it is unreadable, or never comes."""
    tick = next(ticks(expression, time_zone, after), None)
    if tick is None:
        raise CadenceError(f"{expression!r} never comes")
    return tick


def spread(expression: str, time_zone: str | None, after: datetime) -> At:
    """The first tick of a cron expression after an instant, with its distance to the second. Raises
    CadenceError."""
    first = check(expression, time_zone, after)
    return At(first, _distance(first, ticks(expression, time_zone, first)))


def _least_distance(expression: str, time_zone: str | None, after: datetime, enough: int) -> int:
    """The shortest distance in seconds between two ticks within a year: from Friday to Monday it is
    not the one of every day. Any that is less than `enough` is as good.

    Of an expression with more ticks than COUNTED_MOST a year, these show its shortest distance:
    they are more than one an hour on most of its days.
    """
    found = ticks(expression, time_zone, after)
    before, least = next(found, FAR), LONGEST
    for tick in islice(found, COUNTED_MOST):
        least = min(least, int((tick - before).total_seconds()))
        if least < enough or tick > after + timedelta(days=366):
            break
        before = tick
    return least


@dataclass(frozen=True, slots=True)
class Plan:
    """The times of a new recall's row. Columns of the table, except `at`, `after` and `put_off`."""

    call_type: str
    at: datetime | None
    """The first nominal time; None: `after` seconds from now, by PostgreSQL's clock."""
    after: float | None
    put_off: float = 0.0
    """Seconds by which the first occurrence is due after its nominal time."""
    cadence: str = "interval"
    interval: int | None = None
    cron: str | None = None
    time_zone: str | None = None
    until: datetime | None = None
    times: int | None = None
    failures: int | None = None
    grace: int | None = None
    jitter: int | None = None
    zone_data: str | None = None
    """The version of the time zone data by which `at` was computed."""


def plan(
    now: datetime,
    chance: float,
    *,
    at: datetime | None = None,
    after: timedelta | None = None,
    every: timedelta | None = None,
    grid: timedelta | None = None,
    cron: str | None = None,
    time_zone: str | None = None,
    until: datetime | None = None,
    times: int | None = None,
    failures: int | None = None,
    grace: timedelta | None = None,
    jitter: timedelta | None = None,
) -> Plan:
    """When a new recall is due, and how it recurs and ends. Raises CadenceError where that makes no
    sense.

    `now`: PostgreSQL's clock. `chance` in [0, 1): the first occurrence's part of the jitter.
    """
    if at is not None and after is not None:
        raise CadenceError("a time and a delay exclude each other")
    if sum(rule is not None for rule in (every, grid, cron)) > 1:
        raise CadenceError("an interval, a grid and a cron expression exclude each other")
    recurring = every is not None or grid is not None or cron is not None
    if not recurring and any(end is not None for end in (until, times, failures)):
        raise CadenceError(
            "only what recurs has an end: give an interval, a grid or a cron expression too"
        )
    if time_zone is not None:
        time_zone = zone(time_zone).key
        if cron is None:
            raise CadenceError(
                "a time zone goes with a cron expression: intervals and grids are elapsed time"
            )
    _count("times", times)
    _count("failures", failures)
    at, until = _utc(at), _utc(until)
    put_off = chance * (_whole("jitter", jitter, 0) or 0)
    distance = _whole("interval", every, 1) or _whole("grid", grid, 1)
    try:
        if cron is not None:
            # A tick at a given start counts; a tick right now does not.
            start = (
                now
                if at is None and after is None
                else (at or now + (after or timedelta(0))) - timedelta(microseconds=1)
            )
            first = spread(cron, time_zone, start)
            at, after, distance = first.when, None, first.distance
        elif recurring and at is None and after is None:
            assert distance is not None
            after = timedelta(seconds=distance)
        if until is not None and (falls := at or now + (after or timedelta(0))) > until:
            raise CadenceError(
                f"the first occurrence, {falls:%Y-%m-%d %H:%M:%S %Z}, would be after its end"
            )
    except OverflowError:
        raise CadenceError("the first occurrence would be beyond the calendar") from None
    spread_over = _whole("jitter", jitter, 0)
    if every is None and spread_over:
        _fits(
            spread_over,
            distance if cron is None else _least_distance(cron, time_zone, now, spread_over),
        )
    return Plan(
        call_type="recurring"
        if recurring
        else "immediate"
        if at is None and after is None
        else "once",
        at=at,
        after=None if after is None else after.total_seconds(),
        put_off=put_off,
        cadence="cron" if cron is not None else "grid" if grid is not None else "interval",
        interval=distance,
        cron=cron,
        time_zone=time_zone,
        until=until,
        times=times,
        failures=failures,
        grace=_whole("grace", grace, GRACE_LEAST),
        jitter=spread_over,
        zone_data=None if time_zone is None else TZDATA,
    )


class Keep(Enum):
    """What an edit leaves as it is; None takes it away."""

    KEEP = "as it is"


KEEP = Keep.KEEP


def change(
    recall: Recall,
    now: datetime,
    *,
    every: timedelta | Keep | None = KEEP,
    grid: timedelta | Keep | None = KEEP,
    cron: str | Keep | None = KEEP,
    time_zone: str | Keep | None = KEEP,
    until: datetime | Keep | None = KEEP,
    times: int | Keep | None = KEEP,
    failures: int | Keep | None = KEEP,
    grace: timedelta | Keep | None = KEEP,
    jitter: timedelta | Keep | None = KEEP,
) -> dict[str, Any]:
    """The columns that an edit of a live recall changes, with their new values; those that stay the
    same are not in it. Raises CadenceError where they make no sense, Unfit where they make none for
    this recall.

    `now`: PostgreSQL's clock. An interval, a grid or a cron expression makes a one-shot recurring.
    On cron, the distance in `interval_seconds` is left to the worker.
    """
    rules = {"every": every, "grid": grid, "cron": cron}
    given = [name for name, rule in rules.items() if rule is not KEEP]
    if len(given) > 1:
        raise CadenceError("an interval, a grid and a cron expression exclude each other")
    if any(rules[name] is None for name in given):
        raise CadenceError("how it recurs can be replaced, but not taken away: cancel the recall")
    new = replace(
        recall,
        call_type="recurring" if given else recall.call_type,
        until_at=recall.until_at if until is KEEP else _utc(until),
        times=recall.times if times is KEEP else _count("times", times),
        failures_most=recall.failures_most if failures is KEEP else _count("failures", failures),
        grace_seconds=recall.grace_seconds
        if grace is KEEP
        else _whole("grace", grace, GRACE_LEAST),
        jitter_seconds=recall.jitter_seconds if jitter is KEEP else _whole("jitter", jitter, 0),
    )
    if isinstance(cron, str):
        new = replace(new, cadence="cron", cron=cron)
    for name, distance in (("interval", every), ("grid", grid)):
        if isinstance(distance, timedelta):
            new = replace(
                new,
                cadence=name,
                interval_seconds=_whole(name, distance, 1),
                cron=None,
                time_zone=None,
            )
    if time_zone is not KEEP:
        if time_zone is not None and not _by_cron(new):
            raise Unfit(
                "a time zone goes with a cron expression: intervals and grids are elapsed time"
            )
        new = replace(new, time_zone=None if time_zone is None else zone(time_zone).key)
    changes = {
        name: value for name in EDITED if (value := getattr(new, name)) != getattr(recall, name)
    }
    _sensible(recall, new, changes, now, written=isinstance(cron, str))
    return changes


EDITED = (
    "call_type",
    "interval_seconds",
    "cadence",
    "cron",
    "time_zone",
    "until_at",
    "times",
    "failures_most",
    "grace_seconds",
    "jitter_seconds",
)
"""The columns that say how a recall recurs and ends."""


def _sensible(
    old: Recall, new: Recall, changes: dict[str, Any], now: datetime, *, written: bool
) -> None:
    """Raise Unfit, or CadenceError, where an edited recall would make no sense, because of what was
    changed.

    `written`: whether the cron expression comes with the edit.
    """
    if new.call_type != "recurring" and any(
        changes.get(end) is not None for end in ("until_at", "times", "failures_most")
    ):
        raise Unfit(
            "only what recurs has an end: give an interval, a grid or a cron expression too"
        )
    if (times := changes.get("times")) is not None and times < new.occurrence:
        raise Unfit(
            f"it is at its occurrence {new.occurrence} already: with times {times} it would be "
            f"over; give {new.occurrence} to make this one its last, or cancel it"
        )
    until = new.until_at
    if until is not None and "until_at" in changes and until <= now:
        raise Unfit(
            f"its end, {until:%Y-%m-%d %H:%M:%S %Z}, is past: give a later one, or cancel it"
        )
    rule = changes.keys() & {"call_type", "interval_seconds", "cadence", "cron", "time_zone"}
    falls, distance = _waits_for(new), new.interval_seconds
    if _by_cron(new) and (rule or "jitter_seconds" in changes):
        first = (check if written else _first)(new.cron or "", new.time_zone, now)
        jitter = new.jitter_seconds
        distance = _least_distance(new.cron or "", new.time_zone, now, jitter) if jitter else None
        falls = first if rule and falls > now else falls
    elif "cadence" in changes and falls > now:
        falls = _later(now, new.interval_seconds or 0)
    if (rule or "jitter_seconds" in changes) and (new.cadence != "interval"):
        _fits(new.jitter_seconds, distance)
    # An occurrence that has fallen due, or runs, is still owed, whatever comes after it.
    waits = old.leased_by is None and falls > now
    if waits and until is not None and falls > until and (rule or "until_at" in changes):
        raise Unfit(
            f"its next occurrence, {falls:%Y-%m-%d %H:%M:%S %Z}, would be after its end, "
            f"{until:%Y-%m-%d %H:%M:%S %Z}: give a later end, or cancel it"
        )


def _waits_for(recall: Recall) -> datetime:
    """The nominal time of the occurrence that waits; where it was moved, that time."""
    planned = recall.planned_at or recall.trigger_at
    moved = recall.trigger_at != planned
    return recall.trigger_at if moved else recall.scheduled_for or planned


def _by_cron(recall: Recall) -> bool:
    return recall.call_type == "recurring" and recall.cadence == "cron"


def _later(when: datetime, seconds: int) -> datetime:
    try:
        return min(FAR, when + timedelta(seconds=seconds))
    except OverflowError:
        return FAR


def _count(name: str, count: int | None) -> int | None:
    """A number of occurrences, as the table's columns hold it. Raises CadenceError."""
    if count is not None and not 1 <= count <= LONGEST:
        raise CadenceError(
            f"{name} is {count}: it is a number of occurrences, at least one and at most {LONGEST}"
        )
    return count


def _fits(jitter: int | None, distance: int | None) -> None:
    """Raises CadenceError where a jitter is wider than the distance of two occurrences."""
    if jitter and distance and jitter > distance:
        raise CadenceError(
            f"a jitter of {jitter} s is wider than the {distance} s from one occurrence to the "
            "next: occurrences would be swallowed; give a shorter jitter"
        )


def upcoming(recall: Recall, now: datetime) -> Iterator[datetime]:
    """The next nominal times of a live recall, as its row is now; with an interval, as if runs took
    no time. Raises CadenceError.

    The first may be past: it is being run, or is due and stands for all that were missed until now.
    """
    for number, moment in _numbered(recall, now):
        if recall.call_type == "recurring" and (
            (recall.times is not None and number > recall.times)
            or (recall.until_at is not None and moment > recall.until_at)
        ):
            return
        yield moment


def skips_that_wait(recall: Recall) -> int:
    """How many occurrences a waiting recall's last move leaves out; 0 where it is no skip."""
    if recall.trigger_at == recall.named_at:
        return 0
    base = recall.named_at or recall.planned_at or recall.trigger_at
    nominal = recall.scheduled_for or base
    moved = recall.trigger_at - base
    return recall.skips + _skipped(recall, moved, recall.interval_seconds, nominal)


def _numbered(recall: Recall, now: datetime) -> Iterator[tuple[int, datetime]]:
    planned, number = recall.planned_at or recall.trigger_at, recall.occurrence
    named = recall.named_at not in (None, planned) and recall.trigger_at != planned
    base = recall.named_at if named and recall.named_at is not None else planned
    nominal = recall.scheduled_for or planned
    skipped_now = _skipped(recall, recall.trigger_at - base, recall.interval_seconds, nominal)
    skip = recall.skips + skipped_now
    chosen = named or (recall.trigger_at != planned and not skipped_now)
    cron = recall.call_type == "recurring" and recall.cadence == "cron"
    if recall.fired_at is not None:
        # An extra run, which has no number: what is planned follows.
        yield 0, recall.fired_at
        if (
            recall.call_type == "recurring"
            and recall.cadence == "interval"
            and recall.interval_seconds
            and not (chosen or skip)
        ):
            nominal = now + timedelta(seconds=min(recall.interval_seconds, LONGEST))
    elif recall.leased_by is not None:
        # During a run, a move applies to the occurrence after the run.
        yield number, nominal
        after = (
            _moments(recall, recall.trigger_at, now)
            if chosen
            else islice(_moments(recall, nominal, now), 1 + skip, None)
        )
        yield from enumerate(after, number + 1 + skip)
        return
    if cron and recall.interval_seconds is None:
        # A worker will find its next tick, starting at `trigger_at`.
        nominal = recall.trigger_at
    elif cron and recall.edit_of == number and not chosen:
        # A worker will find its next tick by the new rule.
        nominal = _nth(recall, recall.edited_at or now, 1 + skip)
    elif chosen or not skip:
        nominal = (
            _nth(recall, max(base, recall.edited_at or base), skipped_now)
            if cron and skipped_now
            else recall.trigger_at
            if chosen
            else nominal
        )
    else:
        nominal = _skipped_to(recall, nominal, base, skipped_now)
    yield from enumerate(_moments(recall, nominal, now), number + skip)


def _skipped_to(recall: Recall, nominal: datetime, base: datetime, now: int) -> datetime:
    """The nominal time of a recall of which occurrences were skipped: as `moved_to`. `now`: skips
    after `base`."""
    cadence = recall.cadence if recall.call_type == "recurring" else "interval"
    edited = recall.edited_at or nominal
    if cadence == "grid":
        put_off = base - nominal
        led_to = timedelta(0) <= put_off <= timedelta(seconds=max(0, recall.jitter_seconds or 0))
        return (
            nominal + (recall.trigger_at - base)
            if led_to or not recall.skips
            else recall.trigger_at
        )
    if cadence != "cron":
        return recall.trigger_at
    if recall.skips and recall.edited_at is not None and base <= edited:
        return _nth(recall, max(base, edited), now) if now else base
    return _nth(recall, max(nominal, edited), recall.skips + now)


def _nth(recall: Recall, after: datetime, count: int) -> datetime:
    if count > 2 * COUNTED_MOST:
        return FAR
    found = ticks(recall.cron or "", recall.time_zone, after)
    return next(islice(found, count - 1, None), FAR)


def _moments(recall: Recall, first: datetime, now: datetime) -> Iterator[datetime]:
    cron = recall.call_type == "recurring" and recall.cadence == "cron"
    if not cron or recall.interval_seconds is not None:
        yield first
    if cron:
        beyond = (
            max(first, now)
            if recall.interval_seconds is not None
            else first - timedelta(microseconds=1)
        )
        yield from ticks(recall.cron or "", recall.time_zone, beyond)
    elif (
        recall.call_type == "recurring"
        and recall.interval_seconds is not None
        and 0 < recall.interval_seconds <= LONGEST
    ):
        step = timedelta(seconds=recall.interval_seconds)
        moment = first + step * (max(0, (now - first) // step) + 1)
        while moment < FAR:
            yield moment
            moment += step


def problem(claim: Claim) -> str | None:
    """Why this row can never have a next occurrence, in a sentence; None where it can (or needs
    none)."""
    if not claim.recurring:
        return None
    if claim.cadence not in KINDS:
        return (
            f"cadence is {claim.cadence!r}, which nobody here knows: there are {', '.join(KINDS)}"
        )
    if claim.cadence == "cron":
        try:
            _first(claim.cron or "", claim.time_zone, claim.claimed_at)
        except CadenceError as error:
            return str(error)
    elif claim.interval is None or claim.interval < 1:
        return (
            "a recurring recall needs interval_seconds of at least 1, "
            f"not {'null' if claim.interval is None else claim.interval}"
        )
    elif claim.interval > LONGEST:
        return (
            f"a recurring recall needs interval_seconds of at most {LONGEST}, not {claim.interval}"
        )
    return None


def unplanned(claim: Claim) -> bool:
    """Whether this is a cron recall that plain SQL wrote without the distance to the next tick: we
    find its first tick."""
    return claim.recurring and claim.cadence == "cron" and claim.interval is None


def skipped(claim: Claim) -> int:
    """How many occurrences were skipped: before an edit, and after it."""
    return claim.skips + _skipped_now(claim)


def is_skip(claim: Claim) -> bool:
    """Whether `trigger_at` was moved, and by a skip. Any other move is a time of its own."""
    return _skipped_now(claim) > 0


def _skipped_now(claim: Claim) -> int:
    """By how many whole distances the application moved `trigger_at` forward from where the worker
    had put it, or a person had named it."""
    return _skipped(claim, claim.trigger_at - claim.base, claim.interval, claim.scheduled_for)


def _skipped(
    recall: Claim | Recall, moved: timedelta, distance: int | None, nominal: datetime
) -> int:
    if recall.call_type != "recurring" or distance is None or not 1 <= distance <= LONGEST:
        return 0
    times, rest = divmod(moved, timedelta(seconds=distance))
    if times <= 0 or rest:
        return 0
    if recall.cadence != "cron" or times <= SKIPS_BELIEVED:
        return times
    # Distances on cron differ, and many chosen times are multiples of a short one. So a move is a
    # skip only where so many ticks lead near its time.
    if times > COUNTED_MOST:
        return 0
    leads_to = next(
        islice(ticks(recall.cron or "", recall.time_zone, nominal), times - 1, None), FAR
    )
    return times if leads_to - nominal <= 2 * moved else 0


def missed(claim: Claim) -> int:
    """The due moments after `scheduled_for` up to the claim, not counting the one that runs, and
    none after the recall's end."""
    return _between(claim, claim.claimed_at)


def passed_over(claim: Claim) -> int:
    """How many further due moments are too late together with this one."""
    return _between(claim, _within(claim) - timedelta(microseconds=1))


def _between(claim: Claim, last: datetime) -> int:
    """The number of due moments after `scheduled_for` up to `last`."""
    if not claim.recurring:
        return 0
    if claim.until is not None:
        last = min(last, claim.until)
    if claim.cadence != "cron":
        assert claim.interval is not None
        count = (last - claim.scheduled_for) // timedelta(seconds=claim.interval)
        return min(LONGEST, max(0, count - _before_edit(claim)))
    count = 0
    for tick in ticks(claim.cron or "", claim.time_zone, _since(claim)):
        if tick > last or count == COUNTED_MOST:
            break
        count += 1
    return count


def _within(claim: Claim) -> datetime:
    """The instant before which a due moment is past its grace."""
    try:
        return claim.claimed_at - timedelta(seconds=_allowed(claim))
    except OverflowError:
        return datetime(1, 1, 2, tzinfo=UTC)


def following(claim: Claim, skip: int = 0) -> After | At:
    """When the occurrence after this one falls, with `skip` occurrences left out."""
    # What was missed was counted by the rule as it was then.
    missed = 0 if _edited_since_called(claim) else claim.missed
    if claim.cadence == "cron":
        if missed >= COUNTED_MOST:
            return _tick(claim, claim.claimed_at, 1 + skip)
        return _tick(claim, _since(claim), missed + 1 + skip)
    assert claim.interval is not None
    if claim.cadence == "grid":
        return _on_grid(claim, _before_edit(claim) + missed + 1 + skip)
    return After(float(claim.interval) * (1 + skip))


def _edited_since_called(claim: Claim) -> bool:
    """Whether the rule was edited after the occurrence's first claim."""
    if claim.edited_at is None:
        return False
    try:
        return claim.edited_at > claim.claimed_at - timedelta(seconds=claim.begun_age or 0.0)
    except OverflowError:
        return True


def _since(claim: Claim) -> datetime:
    """The instant after which the rule's moments count: the nominal time, or the rule's last edit,
    as moments before that were the old rule's."""
    return max(claim.scheduled_for, claim.edited_at or claim.scheduled_for)


def _before_edit(claim: Claim) -> int:
    """How many moments of a grid, seen from the nominal time, lie before the rule's last edit."""
    assert claim.interval is not None
    return (_since(claim) - claim.scheduled_for) // timedelta(seconds=claim.interval)


def within_grace(claim: Claim, skip: int = 0) -> At:
    """The first due moment of a late recall that is still within its grace, or else the next
    one."""
    since = _within(claim)
    if claim.cadence == "cron":
        return _tick(claim, max(since - timedelta(microseconds=1), _since(claim)), 1 + skip)
    assert claim.interval is not None
    n = -((claim.scheduled_for - since) // timedelta(seconds=claim.interval))
    return _on_grid(claim, max(1 + _before_edit(claim), n) + skip)


def moved_to(claim: Claim) -> At | AsMoved:
    """When a row is due that was moved, or whose rule was edited: at a moment of its cadence, or at
    exactly the time that was chosen."""
    now, chosen = _skipped_now(claim), claim.has_another_time
    if not claim.recurring or claim.cadence not in ("grid", "cron"):
        return AsMoved()
    if claim.cadence == "grid":
        exact = claim.named or (chosen and not now)
        # Skips from before an edit have led to `base`. Of an occurrence that was not called before
        # the nominal time has been moved with it; else that is not known, but when it is due.
        put_off = claim.base - claim.scheduled_for
        led_to = timedelta(0) <= put_off <= timedelta(seconds=max(0, claim.jitter or 0))
        return AsMoved() if exact or (claim.skips and not led_to) else _on_grid(claim, now)
    if unplanned(claim):
        return _tick(claim, claim.trigger_at - timedelta(microseconds=1), 1)
    if claim.to_replan and (now or not chosen):
        return _tick(claim, claim.edited_at or claim.claimed_at, 1 + claim.skips + now)
    # What the skips before an edit had led to, and was due before it, is owed as it stands.
    owed = claim.skips > 0 and claim.edited_at is not None and claim.base <= claim.edited_at
    if (chosen and not now) or not (claim.skips or now) or (owed and not now):
        return AsMoved(
            _distance(claim.trigger_at, ticks(claim.cron or "", claim.time_zone, claim.trigger_at))
        )
    if owed or claim.named:
        return _tick(claim, max(claim.base, claim.edited_at or claim.base), now)
    return _tick(claim, _since(claim), claim.skips + now)


def replanned(expression: str, time_zone: str, nominal: datetime) -> At:
    """The moment of a cron recall that waits for `nominal`, by the time zone data of this process:
    that moment where it still is a tick, else the nearest tick, of two the later. Raises
    CadenceError.

    What lies off its ticks by another span than zones ever change by was no tick before, and
    stands, too.
    """
    found = ticks(expression, time_zone, nominal - timedelta(microseconds=1))
    if next(found, FAR) == nominal:
        return At(nominal, _distance(nominal, found))
    near = takewhile(
        lambda tick: tick <= nominal + SHIFT_MOST,
        ticks(expression, time_zone, nominal - SHIFT_MOST),
    )
    tick = min(near, key=lambda tick: (abs(tick - nominal), tick < nominal), default=nominal)
    if (tick - nominal) % SHIFT:
        tick = nominal
    return At(tick, _distance(tick, ticks(expression, time_zone, tick)))


def jittered(claim: Claim, chance: float) -> float:
    """Seconds by which an occurrence is due after its nominal time. `chance` in [0, 1)."""
    return chance * max(0, claim.jitter or 0)


def too_late(claim: Claim) -> str | None:
    """Why this occurrence is no longer run, in a sentence: it is later than its grace, not counting
    its jitter. None where it is not too late."""
    if claim.grace is None or claim.lateness <= _allowed(claim):
        return None
    return f"{claim.lateness:.0f} s late, past its grace of {max(GRACE_LEAST, claim.grace)} s"


def _allowed(claim: Claim) -> int:
    return max(GRACE_LEAST, claim.grace or 0) + max(0, claim.jitter or 0)


def ends(claim: Claim, falls: datetime, occurrence: int) -> str | None:
    """Why a recall is over before its occurrence with this number and nominal time; None where it
    is not."""
    if not claim.recurring:
        return None
    if claim.times is not None and occurrence > claim.times:
        return (
            f"it had all of its {claim.times} occurrences"
            if claim.times != 1
            else "it had its one occurrence"
        )
    if claim.until is not None and falls > claim.until:
        end = f"{claim.until.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        return f"its next occurrence would be after {end}, where it ends"
    return None


def _tick(claim: Claim, after: datetime, count: int) -> At:
    """The count-th tick after an instant; FAR where the calendar ends before it, or where nobody
    can have meant so many."""
    if count > 2 * COUNTED_MOST:
        return At(FAR, LONGEST)
    found = ticks(claim.cron or "", claim.time_zone, after)
    tick = next(islice(found, count - 1, None), FAR)
    return At(tick, _distance(tick, found))


def _distance(moment: datetime, beyond: Iterator[datetime]) -> int:
    return max(1, min(LONGEST, round((next(beyond, FAR) - moment).total_seconds())))


def _on_grid(claim: Claim, count: int) -> At:
    assert claim.interval is not None
    try:
        return At(min(FAR, claim.scheduled_for + timedelta(seconds=claim.interval) * count))
    except OverflowError:
        return At(FAR)


def _utc(when: datetime | None) -> datetime | None:
    try:
        return None if when is None else when.astimezone(UTC)
    except OverflowError:
        raise CadenceError(f"{when} is beyond the calendar") from None


def _whole(name: str, span: timedelta | None, least: int) -> int | None:
    """A whole number of seconds, as the table's columns hold it. Raises CadenceError."""
    if span is None:
        return None
    seconds = int(span.total_seconds())
    if seconds != span.total_seconds() or not least <= seconds <= LONGEST:
        raise CadenceError(
            f"{name} is a whole number of seconds, at least {least} and at most {LONGEST}"
        )
    return seconds

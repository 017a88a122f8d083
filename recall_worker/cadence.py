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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from importlib import resources
from itertools import chain, islice
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from . import crontab
from .recall import After, AsMoved, At, Claim, Recall

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
FAR = datetime(9997, 1, 1, tzinfo=UTC)
"""Stands for a moment beyond the calendar."""
CRON_LONGEST = 1000
"""Characters of the longest cron expression: three times what names every minute, hour, day and
month."""
SEARCHED = 50
"""Years without a tick after which a cron expression counts as one that never comes. The rarest, 29
February on a given weekday, waits 40."""

_FOLDED = timedelta(hours=25)
"""Clocks are put back by less than this."""
_BEGINNING, _END = datetime(1, 1, 1), date(9999, 12, 30)


class CadenceError(ValueError):
    """A cadence that makes no sense; the text is a sentence for people."""


class Zone(ZoneInfo):
    """A zone of the package's data. It can be copied and pickled, by its name."""

    def __reduce__(self) -> tuple[Callable[[str | None], Zone], tuple[str]]:
        return zone, (self.key,)


@lru_cache(1)
def _zones() -> frozenset[str]:
    return frozenset(resources.files("tzdata").joinpath("zones").read_text().split())


@lru_cache(256)
def zone(name: str | None) -> Zone:
    """The IANA zone of this name, UTC for None. Raises CadenceError."""
    if name is not None and name not in _zones():
        raise CadenceError(
            f"there is no time zone {name!r}: give an IANA name, such as Europe/Berlin"
        )
    name = name or "UTC"
    with resources.files("tzdata").joinpath("zoneinfo", *name.split("/")).open("rb") as data:
        return Zone.from_file(data, key=name)


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
        zone(time_zone)
        if cron is None:
            raise CadenceError(
                "a time zone goes with a cron expression: intervals and grids are elapsed time"
            )
    for name, count in (("times", times), ("failures", failures)):
        if count is not None and not 1 <= count <= LONGEST:
            raise CadenceError(
                f"{name} is {count}: it is a number of occurrences, "
                f"at least one and at most {LONGEST}"
            )
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
    if spread_over and distance and every is None and spread_over > distance:
        raise CadenceError(
            f"a jitter of {spread_over} s is wider than the {distance} s from one occurrence to "
            "the next: occurrences would be swallowed; give a shorter jitter"
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


def _numbered(recall: Recall, now: datetime) -> Iterator[tuple[int, datetime]]:
    planned, number = recall.planned_at or recall.trigger_at, recall.occurrence
    nominal = recall.scheduled_for or planned
    moved = recall.trigger_at != planned
    skip = _skipped(recall, recall.trigger_at - planned, recall.interval_seconds, nominal)
    if recall.leased_by is not None:
        # During a run, a move applies to the occurrence after the run.
        yield number, nominal
        named = moved and not skip
        after = (
            _moments(recall, recall.trigger_at, now)
            if named
            else islice(_moments(recall, nominal, now), 1 + skip, None)
        )
        yield from enumerate(after, number + 1 + skip)
        return
    if (
        recall.call_type == "recurring"
        and recall.cadence == "cron"
        and recall.interval_seconds is None
    ):
        # A worker will find its next tick, starting at `trigger_at`.
        nominal = recall.trigger_at
    elif moved:
        nominal = recall.trigger_at
        if skip and recall.cadence == "cron":
            nominal = next(
                islice(
                    ticks(recall.cron or "", recall.time_zone, recall.scheduled_for or planned),
                    skip - 1,
                    None,
                ),
                FAR,
            )
        elif skip and recall.cadence == "grid":
            nominal = (recall.scheduled_for or planned) + (recall.trigger_at - planned)
    yield from enumerate(_moments(recall, nominal, now), number + skip)


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
        and recall.interval_seconds > 0
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
    """By how many whole distances the application moved `trigger_at` forward from where the worker
    had put it.

    0 for any other move: that is a time of its own.
    """
    return _skipped(claim, claim.trigger_at - claim.planned_at, claim.interval, claim.scheduled_for)


def _skipped(
    recall: Claim | Recall, moved: timedelta, distance: int | None, nominal: datetime
) -> int:
    if recall.call_type != "recurring" or distance is None or distance < 1:
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
    return times if leads_to <= nominal + 2 * moved else 0


def missed(claim: Claim) -> int:
    """The due moments after `scheduled_for` up to the claim, not counting the one that runs."""
    return _between(claim, claim.claimed_at)


def passed_over(claim: Claim) -> int:
    """How many further due moments are too late together with this one."""
    return _between(claim, _within(claim) - timedelta(microseconds=1))


def _between(claim: Claim, last: datetime) -> int:
    """The number of due moments after `scheduled_for` up to `last`."""
    if not claim.recurring:
        return 0
    if claim.cadence != "cron":
        assert claim.interval is not None
        return min(
            LONGEST, max(0, (last - claim.scheduled_for) // timedelta(seconds=claim.interval))
        )
    count = 0
    for tick in ticks(claim.cron or "", claim.time_zone, claim.scheduled_for):
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
    if claim.cadence == "cron":
        if claim.missed >= COUNTED_MOST:
            return _tick(claim, claim.claimed_at, 1 + skip)
        return _tick(claim, claim.scheduled_for, claim.missed + 1 + skip)
    assert claim.interval is not None
    if claim.cadence == "grid":
        return _on_grid(claim, claim.missed + 1 + skip)
    return After(float(claim.interval) * (1 + skip))


def within_grace(claim: Claim, skip: int = 0) -> At:
    """The first due moment of a late recall that is still within its grace, or else the next
    one."""
    since = _within(claim)
    if claim.cadence == "cron":
        return _tick(claim, max(since - timedelta(microseconds=1), claim.scheduled_for), 1 + skip)
    assert claim.interval is not None
    return _on_grid(
        claim, max(1, -((claim.scheduled_for - since) // timedelta(seconds=claim.interval))) + skip
    )


def moved_to(claim: Claim) -> At | AsMoved:
    """When a row is due that the application moved: at a moment of its cadence, or at exactly the
    time that the application chose."""
    skip = skipped(claim)
    if claim.recurring and claim.cadence == "grid" and skip:
        return _on_grid(claim, skip)
    if claim.recurring and claim.cadence == "cron":
        if unplanned(claim):
            return _tick(claim, claim.trigger_at - timedelta(microseconds=1), 1)
        if skip:
            return _tick(claim, claim.scheduled_for, skip)
        return AsMoved(
            _distance(claim.trigger_at, ticks(claim.cron or "", claim.time_zone, claim.trigger_at))
        )
    return AsMoved()


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
    """The count-th tick after an instant; FAR where the calendar ends before it."""
    found = ticks(claim.cron or "", claim.time_zone, after)
    for _ in range(count - 1):
        next(found, None)
    tick = next(found, FAR)
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

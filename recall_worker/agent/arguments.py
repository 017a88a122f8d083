"""What a model writes as a tool's arguments, read. Pure: texts and PostgreSQL's time in, a plan
out, or a refusal that says what to write instead.

Lenient where nothing can be misread (null and an empty text are an argument that is not given),
strict where something could: a number without a unit, a time without a zone, a time that is past,
two plans at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import islice, pairwise
from typing import Any, TypeVar

from .. import cadence, durations, instants
from ..cadence import CadenceError, Zone
from ..durations import DurationError
from ..instants import InstantError
from .limits import LimitExceeded, Limits

TEXT_MOST = 1000
"""Characters of an argument, but for the message."""
TICKS = 100
"""Ticks of a cron expression whose distances are looked at: of most, a week or more."""
_PLACED = re.compile(r"(.*\d) *\[?([A-Za-z_]+(?:/[A-Za-z0-9_+-]+)+)\]?", re.ASCII)
"""A time, and a zone behind it."""
_EAST = timezone(timedelta(hours=1))

T = TypeVar("T")


class ArgumentError(Exception):
    """Why an argument can't be used, a clause; `todo`: what to write instead."""

    def __init__(self, what: str, *todo: str) -> None:
        super().__init__(what)
        self.todo = todo


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """When a recall comes, as `Recalls.schedule` takes it."""

    at: datetime | None = None
    after: timedelta | None = None
    every: timedelta | None = None
    grid: timedelta | None = None
    cron: str | None = None
    time_zone: str | None = None
    until: datetime | None = None
    times: int | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    plan: Plan
    zone: Zone
    """In which its times are said."""
    notes: tuple[str, ...]
    """Sentences on how a time was read."""


def text(name: str, value: Any, example: str) -> str | None:
    """An argument that is a text; None where it is not given. Raises ArgumentError."""
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ArgumentError(f"{name} is {_shown(value)}, and not a text", f'{name}: "{example}"')
    if len(value) > TEXT_MOST:
        raise ArgumentError(
            f"{name} has {len(value)} characters, and {TEXT_MOST} is the most",
            f'{name}: "{example}"',
        )
    return _storable(name, value.strip()) or None


def message(value: Any) -> str:
    """Raises ArgumentError."""
    example = 'message: "Look at the build again, and say in the chat whether it is green."'
    if not isinstance(value, str):
        what = "message is missing" if value is None else f"message is {_shown(value)}"
        raise ArgumentError(what, example)
    if not value.strip():
        raise ArgumentError(
            "message is empty: it is what you will read when you are called back", example
        )
    return _storable("message", value)


def count(value: Any) -> int | None:
    """`times`. Raises ArgumentError."""
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= cadence.LONGEST:
        raise ArgumentError(
            f"times is {_shown(value)}: it is a number of occurrences, 1 or more", "times: 5"
        )
    return value


def flag(name: str, value: Any) -> bool:
    """Raises ArgumentError."""
    if value is None or value == "" or isinstance(value, bool):
        return bool(value)
    raise ArgumentError(f"{name} is {_shown(value)}: it is true or false", f"{name}: true")


def zone(value: Any) -> Zone | None:
    """`time_zone`; None where it is not given. Raises ArgumentError."""
    name = text("time_zone", value, "Europe/Berlin")
    if name is None:
        return None
    try:
        return cadence.zone(name)
    except CadenceError as error:
        raise ArgumentError(
            str(error), 'time_zone: "Europe/Berlin" (an IANA name, or "UTC")'
        ) from None


def length(name: str, value: Any) -> timedelta | None:
    """A length of time; None where it is not given. Raises ArgumentError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ArgumentError(
            f"{name} is {_shown(value)}, a number without a unit",
            f'a text with a unit: {name}: "{_shown(value)}s" for seconds, "{_shown(value)}m" for '
            "minutes",
        )
    given = text(name, value, "10m")
    if given is None:
        return None
    try:
        seconds = durations.seconds(given)
        span = timedelta(seconds=seconds)
    except DurationError as error:
        raise ArgumentError(f"{name} {_shown(given)} {error}", f"{name}: {error.instead}") from None
    except OverflowError:
        raise ArgumentError(
            f"{name} {_shown(given)} is longer than any calendar", f'{name}: "2d"'
        ) from None
    if seconds <= 0:
        raise ArgumentError(f"{name} {_shown(given)} is no time at all", f'{name}: "10m"')
    return span


def instant(
    name: str, value: Any, where: Zone | None, now: datetime
) -> tuple[datetime | None, tuple[str, ...]]:
    """A time, and notes on how it was read; None where it is not given. Raises ArgumentError, also
    where it is past, or has no zone."""
    given = text(name, value, f"{now:%Y-%m-%d}T09:00Z")
    if given is None:
        return None, ()
    whole_day = name == "until"
    try:
        found = instants.parse(given, where or UTC, whole_day=whole_day)
        # A time with an offset of its own is the same wherever it is read.
        elsewhere = instants.parse(given, _EAST, whole_day=whole_day)
        if where is None and elsewhere.when != found.when:
            # A day alone is meant to its end where it is `until`.
            by_day = "T23:59Z" if whole_day else "T09:00Z"
            in_utc = f"{given}Z" if ":" in given else f"{given}{by_day}"
            raise ArgumentError(
                f"{name} {_shown(given)} does not say in which time zone",
                f'the same with time_zone: "Europe/Berlin" (the zone of the person who asks), or '
                f'with an offset: {name}: "{in_utc}" for UTC',
            )
    except InstantError as error:
        if (placed := _PLACED.fullmatch(given)) is not None:
            raise ArgumentError(
                f"{name} {_shown(given)} names a zone",
                f'{name}: "{placed[1]}", time_zone: "{placed[2]}"',
            ) from None
        instead = error.instead.replace("the zone of --tz", "time_zone")
        raise ArgumentError(f"{name} {_shown(given)} {error}", f"{name}: {instead}") from None
    if cadence.is_past(found.when, now):
        said = now.astimezone(where or UTC)
        raise ArgumentError(
            f"{name} {_shown(given)} is past: now it is {said:%Y-%m-%d %H:%M} "
            f"{where.key if where else 'UTC'}",
            "a later time",
        )
    return found.when, found.notes


def schedule(now: datetime, limits: Limits, delay: str, given: Mapping[str, Any]) -> Schedule:
    """The plan that the arguments of schedule_recall make, within the limits. `delay`: what the
    argument `in` is called. Raises ArgumentError, LimitExceeded."""
    where = zone(given.get("time_zone"))
    at, notes = instant("at", given.get("at"), where, now)
    until, more = instant("until", given.get("until"), where, now)
    plan = Plan(
        at=at,
        after=length(delay, given.get("in")),
        every=length("every", given.get("every")),
        grid=length("grid", given.get("grid")),
        cron=text("cron", given.get("cron"), "0 9 * * mon-fri"),
        until=until,
        times=count(given.get("times")),
    )
    plan = replace(plan, time_zone=where.key if where and plan.cron is not None else None)
    _one_plan(plan, delay)
    first = _planned(plan, now)
    rule = next((name for name in ("every", "grid", "cron") if getattr(plan, name)), None)
    if plan.cron is not None:
        limits.check_distance("cron", _least_distance(plan.cron, plan.time_zone, first))
    elif rule is not None:
        distance: timedelta = getattr(plan, rule)
        limits.check_distance(rule, distance.total_seconds())
    limits.check_due("at" if plan.at else delay if plan.after else rule or "at", first, now)
    return Schedule(plan, where or cadence.zone(None), notes + more)


def moment(
    now: datetime, limits: Limits, delay: str, given: Mapping[str, Any]
) -> tuple[datetime, Zone | None, tuple[str, ...]]:
    """The new time that the arguments of reschedule_recall name, its zone where one is given, and
    notes. Raises ArgumentError, LimitExceeded."""
    where = zone(given.get("time_zone"))
    at, notes = instant("at", given.get("at"), where, now)
    after = length(delay, given.get("in"))
    if at is not None and after is not None:
        raise ArgumentError(f"{delay} and at are two times", f"{delay} or at, one of them")
    if at is None:
        if after is None:
            raise ArgumentError(
                "no new time is given", f'{delay}: "2h", or at: "{now:%Y-%m-%d}T18:00Z"'
            )
        try:
            at = now + after
        except OverflowError:
            raise ArgumentError(f"{delay} is beyond the calendar", f'{delay}: "2h"') from None
    limits.check_due("at" if after is None else delay, at, now)
    return at, where, notes


def _one_plan(plan: Plan, delay: str) -> None:
    """Raises ArgumentError where the arguments make none, or two."""
    rules = [name for name in ("every", "grid", "cron") if getattr(plan, name) is not None]
    if len(rules) > 1:
        raise ArgumentError(
            f"{' and '.join(rules)} are {len(rules)} plans at once", f"one of them: {rules[0]}"
        )
    if plan.at is not None and plan.after is not None:
        raise ArgumentError(
            f"{delay} and at are two times for one occurrence", f"{delay} or at, one of them"
        )
    if not rules and (plan.until is not None or plan.times is not None):
        end = "times" if plan.times is not None else "until"
        raise ArgumentError(
            f"{end} says when something ends that comes again, and nothing says how it does",
            f'every: "1h" or cron: "0 9 * * *" beside it, or the same without {end}',
        )
    if not rules and plan.at is None and plan.after is None:
        raise ArgumentError(
            "nothing says when",
            f'{delay}: "10m" (once), every: "1h" (again and again), or cron: "0 9 * * mon-fri" '
            "with time_zone",
        )


def _planned(plan: Plan, now: datetime) -> datetime:
    """When the first occurrence falls. Raises ArgumentError."""
    try:
        made = cadence.plan(
            now,
            0.0,
            at=plan.at,
            after=plan.after,
            every=plan.every,
            grid=plan.grid,
            cron=plan.cron,
            time_zone=plan.time_zone,
            until=plan.until,
            times=plan.times,
        )
        return made.at or now + timedelta(seconds=made.after or 0.0)
    except CadenceError as error:
        example = (
            'cron: "0 9 * * mon-fri" (minute hour day month weekday)'
            if plan.cron is not None and plan.until is None
            else "a later until, an earlier start, or whole seconds"
        )
        raise ArgumentError(str(error), example) from None
    except OverflowError:
        raise ArgumentError(
            "the first occurrence would be beyond the calendar", "an earlier one"
        ) from None


def _least_distance(cron: str, time_zone: str | None, first: datetime) -> float:
    """Seconds of the shortest distance between ticks from the first on."""
    found = islice(cadence.ticks(cron, time_zone, first - timedelta(microseconds=1)), TICKS)
    return min(
        ((later - earlier).total_seconds() for earlier, later in pairwise(found)),
        default=float(cadence.LONGEST),
    )


def _storable(name: str, value: str) -> str:
    """Raises ArgumentError for what PostgreSQL's texts can't hold."""
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise ArgumentError(
            f"{name} holds a character that can't be stored (NUL, or half of one)",
            "the same without it",
        )
    return value


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:60] + "…"


__all__ = [
    "ArgumentError",
    "LimitExceeded",
    "Plan",
    "Schedule",
    "count",
    "flag",
    "instant",
    "length",
    "message",
    "moment",
    "schedule",
    "text",
    "zone",
]

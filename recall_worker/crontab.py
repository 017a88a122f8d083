"""What a cron expression may say when somebody writes it: what cronsim reads without an error and
that can't mean what it says, and what it refuses without saying what to write instead.

Pure, and only for the entrance (`schedule`, `preview`, `Recalls`): a row that holds such an
expression already goes on by what cronsim makes of it. Never here: when a tick falls (`cadence`).

The meaning is that of Debian's cron (crontab(5)); names are its three letters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
WEEKDAYS = ["sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday"]
NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    first: int
    last: int
    names: tuple[str, ...] = ()
    """Full names of its values, from the first."""
    every: str = ""
    """A unit of --every for what a step in this field is mostly meant to say."""

    def value(self, text: str) -> int | None:
        """The number that a word stands for; None where it is none of this field."""
        if text.isascii() and text.isdigit():
            return int(text)
        return next((self.first + n for n, name in enumerate(self.names) if text == name[:3]), None)

    def written(self, value: int, like: str) -> str:
        """A value as a name, where `like` is one, else as a number."""
        return str(value) if like.isdigit() else self.names[value - self.first][:3]


FIELDS = (
    Field("minute", 0, 59, every="m"),
    Field("hour", 0, 23, every="h"),
    Field("day of month", 1, 31, every="d"),
    Field("month", 1, 12, tuple(MONTHS)),
    Field("day of week", 0, 6, tuple(WEEKDAYS)),
)
_ELEMENT = re.compile(r"(?:(\*)|(\w+)(?:-(\w+))?)(?:/(\d+))?", re.ASCII)


def objection(expression: str) -> str | None:
    """What is wrong with a cron expression, and what to write instead: one sentence; None where
    there is nothing to say here (cronsim may still refuse it)."""
    shown = repr(expression)
    words = expression.split()
    if words and re.match(r"(?i)(cron_)?tz=", words[0]):
        zone = words[0].partition("=")[2] or "ZONE"
        return (
            f"{shown}: the time zone is no part of the expression; give it with --tz {zone} "
            "(`time_zone` in Python and SQL)"
        )
    if words and words[0].startswith("@"):
        meant = NICKNAMES.get(words[0].lower())
        return f"{shown} is no cron expression of five fields, minute hour day month weekday" + (
            f": write {meant!r}" if meant else ""
        )
    if len(words) in (6, 7):
        return (
            f"{shown} has {len(words)} fields: a cron expression takes five fields, minute hour "
            "day month weekday, without seconds or years"
        )
    if len(words) != len(FIELDS):
        return None  # `cadence` says how many it takes.
    for field, text in zip(FIELDS, words, strict=True):
        elements = text.lower().split(",")
        for element in elements:
            if (wrong := _objection(field, element, alone=len(elements) == 1)) is not None:
                return f"{shown}: {wrong}"
    return None


def _objection(field: Field, element: str, *, alone: bool) -> str | None:
    """What is wrong with one element of a field's list. `alone`: the list has no other."""
    if re.fullmatch(r"(lw?|\w*l)/.*", element):
        return f"in the field {field.name}, {element!r}: a last day takes no step; leave /… out"
    for name in re.findall(r"[a-z]{4,}", element):
        if name in field.names:
            return f"in the field {field.name}, {name!r}: write {name[:3]}"
    found = _ELEMENT.fullmatch(element)
    if found is None:
        return None
    star, begin, end, step = found[1], found[2], found[3], found[4]
    first = field.first if star else field.value(begin)
    last = field.last if star or (step and end is None) else field.value(end or begin)
    if first is None or last is None:
        return None
    if end is not None and last < first and first <= field.last + (field.name == "day of week"):
        return f"in the field {field.name}, {element!r} runs backwards: write " + _unwrapped(
            field, first, last, begin, end, step
        )
    # Beside another element in a field of days, `*/100` is an idiom: see docs/cadence.md.
    idiom = star and not alone and field.name.startswith("day")
    if step and int(step) > last - first + 1 and not idiom:
        every = f"{step}{field.every}"
        instead = f"; for one every {every} use --every {every} or --grid {every}"
        return (
            f"in the field {field.name}, {element!r}: a step of {step} leaves only {first} of "
            f"{first} to {last}: write {first} if that is meant"
            f"{instead if field.every else ''}"
        )
    return None


def _unwrapped(field: Field, first: int, last: int, begin: str, end: str, step: str | None) -> str:
    """A range over the end of its field, as one that cron knows."""
    if step:
        size = field.last - field.first + 1
        values = range(first, last + size + 1, max(1, int(step)))
        return ",".join(str((v - field.first) % size + field.first) for v in values)
    if first > field.last:  # Sunday as 7.
        return f"{field.written(field.first, begin)}-{field.written(last, end)}"
    upper = begin if first == field.last else f"{begin}-{field.written(field.last, begin)}"
    lower = (
        field.written(field.first, end)
        if last == field.first
        else f"{field.written(field.first, end)}-{end}"
    )
    return f"{upper},{lower}"

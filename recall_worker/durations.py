"""Durations as people write them: `90s`, `5m`, `1h30`, `2 hours`, `1d 12h`. The one parser, for
settings and for commands. Pure: text in, seconds out, and back.

Never here: how long something may be (settings, cadence), how a mistake is shown (terminal).
"""

from __future__ import annotations

import re

_NAMES = {
    604_800: "w week weeks",
    86_400: "d day days",
    3600: "h hr hrs hour hours",
    60: "m min mins minute minutes",
    1: "s sec secs second seconds",
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_PART = re.compile(rf"({_NUMBER})\s*([a-z]+)\s*")
_MINUTES = re.compile(r"[0-5]?[0-9]")
_CAPITAL = re.compile(rf"({_NUMBER})\s*M(?![A-Za-z])")
_CALENDAR = re.compile(rf"{_NUMBER}\s*(mo|mos|month|months|y|yr|yrs|year|years)(?![a-z])")
EXAMPLES = "90s, 5m, 1h30m, 2 hours or 30d"


class DurationError(ValueError):
    """The text is not a duration. The message is a clause that says why; `instead`: an example."""

    def __init__(self, why: str, instead: str) -> None:
        super().__init__(why)
        self.instead = instead


def seconds(text: str, *, bare: bool = False) -> float:
    """The seconds of a duration: numbers with units, the largest unit first.

    `bare`: whether a number alone is accepted, as seconds. Otherwise it is refused, as its author
    may have meant seconds, minutes or days. A capital M is refused, as it may be a month, and so
    are months and years, as they differ in length. Raises DurationError.
    """
    if (capital := _CAPITAL.search(text)) is not None:
        number = capital[1]
        raise DurationError(
            "may mean minutes or months", f"{number}m for minutes; for months, a number of days"
        )
    given = text.strip().lower()
    if (named := _CALENDAR.search(given)) is not None:
        unit = "years" if named[1].startswith("y") else "months"
        raise DurationError(
            f"counts in {unit}, which differ in length",
            f"{'365d' if unit == 'years' else '30d'}; for a date that comes again, a cron "
            "expression, such as '0 9 1 * *'",
        )
    if bare:
        try:
            return float(given)
        except ValueError:
            pass
    elif re.fullmatch(_NUMBER, given):
        raise DurationError("has no unit", f"{given}s, {given}m, {given}h or {given}d")
    total, at, last = 0.0, 0, float("inf")
    while (part := _PART.match(given, at)) is not None:
        size = _SIZES.get(part[2], 0)
        if not 0 < size < last:
            break
        total, at, last = total + float(part[1]) * size, part.end(), size
    if last == 3600 and _MINUTES.fullmatch(given, at):
        return total + float(given[at:]) * 60  # 1h30: minutes, as everybody reads it
    if at == 0 or at < len(given):
        raise DurationError("is not a duration", EXAMPLES)
    return total


def length(seconds: int) -> str:
    """A whole number of seconds as `seconds` reads it: `1h30m`."""
    parts, left = [], max(0, seconds)
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        times, left = divmod(left, size)
        if times:
            parts.append(f"{times}{unit}")
    return "".join(parts) or f"{seconds}s"

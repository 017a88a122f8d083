"""`settings`: every setting with its value, and where that comes from. Reads the environment only:
no file of another program's, no database."""

from __future__ import annotations

from typing import Any

from .. import settings
from ..durations import length
from ..terminal import USAGE, Trouble, print_json, print_table, tell


def show(*, as_json: bool) -> None:
    """The command. Raises Trouble with all problems, behind the table, where a setting is wrong."""
    found, problems = settings.survey()
    if as_json:
        rows = [
            {"variable": one.name, "value": one.value, "origin": one.origin, "says": one.says}
            for one in found
        ]
        print_json({"settings": rows, "problems": problems})
    else:
        print_table(
            ["SETTING", "VALUE", "ORIGIN"],
            [[one.name, _value(one.value), one.origin] for one in found],
            yields=[("VALUE", 16)],
        )
    for name in settings.ignored():
        tell(f"Note: {name} is not a setting of recall-worker and is ignored.")
    if problems:
        raise Trouble(
            "; ".join(problems), "docs/configuration.md (what each setting may be)", status=USAGE
        )


def _value(value: Any) -> str:
    """A value as a person writes it."""
    match value:
        case None:
            return "not set"
        case bool():
            return "yes" if value else "no"
        case float() if value >= 1 and value.is_integer():
            return length(int(value))
        case float():
            return f"{value:g}s"
        case _:
            return str(value)

"""What the rows of recall_workers say of the workers together: who is alive, and do they agree?

For those who read (`workers`, `why`, `stats`, `doctor`); the worker itself decides nothing by this.

Never here: a statement, a way to show things.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SILENT_AFTER = 180.0
"""Seconds after which a worker that has not been heard of counts as gone: three of its heartbeats."""
ALIKE = ("lease", "run_url", "max_attempts", "give_up", "run_timeout", "protocol")
"""Settings that the workers of one table should agree in."""


def told_setting(row: Mapping[str, Any], name: str) -> str | None:
    """A setting as the worker told it; None where it did not. In a row of another version, or of one
    that somebody wrote by hand, anything may stand there.
    """
    told = row["settings"].get(name) if isinstance(row["settings"], dict) else None
    return f"{told:g}" if isinstance(told, int | float) else None if told is None else str(told)


def differences(alive: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The settings in which live workers differ, each with the values that there are."""
    told = [(name, sorted({str(told_setting(row, name)) for row in alive})) for name in ALIKE]
    return [(name, values) for name, values in told if len(values) > 1]

"""Figures and how they are shown: medians with least and most, ratios of pairs, tables, targets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypedDict


class Spread(TypedDict):
    least: float
    median: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of all values lies, the nearest existing one."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def curve(values: Sequence[float]) -> list[float]:
    """The distribution in steps of two per cent."""
    return [round(percentile(values, share / 100), 3) for share in range(0, 101, 2)]


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Round by round, as a slow minute of the machine affects both."""
    return spread([a / b for a, b in zip(mine, theirs, strict=True)])


def number(value: float) -> str:
    """Three significant figures, with separators of thousands."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def shown(found: Spread, factor: float = 1.0) -> str:
    """`2.10 (1.90 to 2.41)`, or the value alone if there was one round."""
    least, median, most = (found[name] * factor for name in ("least", "median", "most"))
    return (
        number(median) if least == most else f"{number(median)} ({number(least)} to {number(most)})"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def judged(
    what: str, value: float, target: float, *, at_least: bool = False, unit: str = ""
) -> str:
    """A line that says whether a target was met, and by how much it was missed."""
    met = value >= target if at_least else value <= target
    word = "at least" if at_least else "at most"
    says = "met" if met else f"**missed** by {number(abs(value - target))}{unit}"
    return f"- {what}: {number(value)}{unit}, wanted {word} {number(target)}{unit}: {says}.\n"

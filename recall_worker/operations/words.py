"""How a recall recurs and ends, and its message, in a few words that stand in a line. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ..durations import length
from ..terminal import local, relative


def nature(row: Mapping[str, Any]) -> str:
    """How a recall recurs, in a few words."""
    if row["call_type"] != "recurring":
        return str(row["call_type"])
    if row["cadence"] == "cron":
        return f"cron '{row['cron']}' {row['time_zone'] or 'UTC'}"
    if row["interval_seconds"] is None:
        return "recurring"
    return f"{'grid' if row['cadence'] == 'grid' else 'every'} {length(row['interval_seconds'])}"


def ends(row: Mapping[str, Any]) -> str:
    """When a recall ends by itself, in a few words that follow its nature."""
    ends = []
    if row["until_at"] is not None:
        ends.append(f"until {local(row['until_at'])}")
    if row["times"] is not None:
        ends.append("once" if row["times"] == 1 else f"{row['times']} times")
    if row["failures_most"] is not None:
        ends.append(
            f"until {row['failures_most']} in a row failed"
            if row["failures_most"] > 1
            else "until one fails"
        )
    return "".join(f", {end}" for end in ends)


def in_a_line(text: str | None, most: int) -> str | None:
    """A message in one line; if it is long, its beginning and its length."""
    if text is None:
        return None
    line = " ".join(text[:most].split())
    return line if len(text) <= most else f"{line} … ({len(text):,} characters)"


def when(row: Mapping[str, Any], now: datetime) -> str:
    """How far its next moment is, or its end; or what holds it."""
    if row["status"] not in ("pending", "running"):
        return relative(row["ended_at"] or row["updated_at"], now)
    return (
        ("in a run" if row["lease_until"] is None or row["lease_until"] > now else "lease ended")
        if row["lease"] is not None
        else "paused"
        if row["paused_at"] is not None
        else relative(row["trigger_at"], now)
    )

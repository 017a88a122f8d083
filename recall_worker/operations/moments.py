"""What there is to know about a recall's next moments: changes of clocks, and what may hold them
back. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from ..durations import length
from ..recall import Recall


def remarks(row: Mapping[str, Any], recall: Recall) -> str:
    """What follows a recall's nature: clauses, and a full stop."""
    remarks = []
    if recall.call_type == "recurring" and recall.cadence == "interval":
        remarks.append("counted from each run's end: these are the earliest possible times")
    if row["lease"] is not None:
        remarks.append("the first one runs now")
    if recall.paused_at is not None:
        remarks.append("paused: nothing is called until it is resumed")
    if recall.jitter_seconds:
        remarks.append(f"each due up to {length(recall.jitter_seconds)} later")
    return "".join(f"; {remark}" for remark in remarks) + "."


def offset(wall: datetime) -> str:
    """How far a wall clock is from UTC: `+01:00`."""
    return wall.isoformat()[-6:]


def notes(walls: Iterable[datetime]) -> list[str]:
    """For each time, whether the clocks changed since the one before."""
    notes, before = [], None
    for wall in walls:
        changed = before is not None and wall.utcoffset() != before.utcoffset()
        notes.append(
            f"clocks changed from {offset(before)}" if changed and before is not None else ""
        )
        before = wall
    return notes

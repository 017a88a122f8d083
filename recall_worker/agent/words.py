"""How a recall and a time are said to a model: in one zone, with the distance from now, so that
nothing has to be computed by who reads it. Pure.

What an agent sees of a row is chosen here: never its comment, its lease, its worker, its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from .. import cadence
from ..cadence import CadenceError, Zone
from ..durations import length
from ..recall import FINAL, Recall

MESSAGE_SHOWN = 500
"""Characters of a message that a list shows."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A recall of the session, and what its row says besides."""

    recall: Recall
    in_run: bool

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Seen:
        return cls(Recall.of(row), row["lease"] is not None)

    @property
    def over(self) -> bool:
        return self.recall.status in FINAL

    def next_due(self, now: datetime) -> datetime | None:
        """When it comes next, after the current run where there is one; None where it does not."""
        if self.over:
            return None
        found = self.recall
        if found.call_type != "recurring" and not self.in_run:
            return found.trigger_at
        try:
            upcoming = cadence.upcoming(found, now)
            return next(islice(upcoming, 1 if self.in_run else 0, None), None)
        except CadenceError:
            return found.trigger_at  # A worker will say what is wrong with it.


def said(when: datetime, zone: Zone) -> str:
    """`2026-12-01 09:00 Europe/Berlin`."""
    try:
        local = when.astimezone(zone)
    except (OverflowError, ValueError):
        local = when.astimezone(UTC)
    clock = "%H:%M:%S" if local.second else "%H:%M"
    return f"{local:%Y-%m-%d} {local.strftime(clock)} {zone.key}"


def distance(when: datetime, now: datetime) -> str:
    """`in 14 hours 3 minutes`, `now`."""
    seconds = int((when - now).total_seconds() + 0.5)
    return "now" if seconds <= 0 else f"in {span(seconds)}"


def span(seconds: int) -> str:
    """A length of time to the minute; below ten minutes, to the second."""
    parts, left = [], seconds if seconds < 600 else (seconds + 30) // 60 * 60
    for unit, size in (("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1)):
        number, left = divmod(left, size)
        if number:
            parts.append(f"{number} {unit}{'' if number == 1 else 's'}")
    return " ".join(parts) or "0 seconds"


def due(when: datetime, zone: Zone, now: datetime) -> str:
    """`due 2026-12-01 09:00 Europe/Berlin, in 14 hours 3 minutes`."""
    return f"due {said(when, zone)}, {distance(when, now)}"


def now_is(now: datetime, zone: Zone) -> str:
    return f"Now it is {said(now, zone)}."


def recurs(recall: Recall) -> str | None:
    """How it comes again, in words; None where it does not."""
    if recall.call_type != "recurring":
        return None
    if recall.cadence == "cron":
        return f"by cron '{recall.cron}' in {recall.time_zone or 'UTC'}"
    each = length(recall.interval_seconds or 0)
    if recall.cadence == "grid":
        return f"every {each}, counted from the first"
    return f"every {each}, counted from the end of each run"


def ends(recall: Recall, zone: Zone) -> str | None:
    """When it ends by itself, in words; None where it does not."""
    parts = []
    if recall.until_at is not None:
        parts.append(f"until {said(recall.until_at, zone)}")
    if recall.times is not None:
        left = max(0, recall.times - recall.occurrence + 1 - cadence.skips_that_wait(recall))
        times = "once" if recall.times == 1 else f"{recall.times} times"
        parts.append(f"{times} in all, {left} left")
    return ", ".join(parts) or None


def state(seen: Seen, now: datetime) -> str:
    """waiting, due, in a run, paused, fired, cancelled, failed."""
    recall = seen.recall
    if seen.over:
        return recall.status
    if seen.in_run:
        return "in a run"
    if recall.paused_at is not None:
        return "paused"
    when = seen.next_due(now)
    return "due" if when is not None and when <= now else "waiting"


def comes(seen: Seen, zone: Zone, now: datetime) -> str:
    """When it comes next, in words: `due … , in …`, `in its run now, and then due …`."""
    when = seen.next_due(now)
    next_ = None if when is None else due(when, zone, now)
    if seen.over:
        return seen.recall.status
    if seen.in_run and seen.recall.call_type == "recurring" and when is not None:
        if seen.recall.cadence == "interval" and not _chosen(seen.recall):
            each = length(seen.recall.interval_seconds or 0)
            next_ = f"due {each} after the end of this run"
        return f"in its run now, and then {next_}"
    if seen.in_run:
        return "in its run now, which is its last"
    if next_ is None:
        return "over: no occurrence is left"
    return f"{next_} (but paused)" if seen.recall.paused_at is not None else next_


def _chosen(recall: Recall) -> bool:
    """Whether the time after this run was named by somebody."""
    return recall.planned_at is not None and recall.trigger_at != recall.planned_at


def view(seen: Seen, zone: Zone, now: datetime, *, whole: bool = True) -> dict[str, Any]:
    """A recall as JSON, as an agent sees it. `whole`: with all of its message."""
    recall, when = seen.recall, seen.next_due(now)
    message = recall.additional_context_message
    if not whole and len(message) > MESSAGE_SHOWN:
        message = message[:MESSAGE_SHOWN] + "…"
    return {
        "id": recall.id,
        "status": state(seen, now),
        "message": message,
        "due": None if when is None else said(when, zone),
        "due_at": None if when is None else rfc3339(when),
        "due_in": None if when is None else distance(when, now),
        "recurs": recurs(recall),
        "ends": None if seen.over else ends(recall, zone),
    }


def line(seen: Seen, zone: Zone, now: datetime) -> str:
    """A recall in a line of a list."""
    recall = seen.recall
    message = " ".join(recall.additional_context_message[:MESSAGE_SHOWN].split())
    message += "…" if len(recall.additional_context_message) > MESSAGE_SHOWN else ""
    more = [part for part in (recurs(recall), None if seen.over else ends(recall, zone)) if part]
    tail = f"; {', '.join(more)}" if more else ""
    return f'- "{message}": {comes(seen, zone, now)}{tail}; id {recall.id}'


def zone_of(recall: Recall, chosen: Zone | None) -> Zone:
    """The zone in which a recall's times are said: the one asked for, else its own, else UTC."""
    if chosen is not None:
        return chosen
    try:
        return cadence.zone(recall.time_zone)
    except CadenceError:
        return cadence.zone(None)


def rfc3339(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

"""The agenda: what comes in the next day or week, by time, and how busy each hour is.

PostgreSQL says which recalls wait, and for when; what a rule makes of them later is computed here,
as far as there is room. The days of a clock that is changed have 23 or 25 hours: hours are counted
as they pass, and named by the reader's clock. Pure: `now` is PostgreSQL's.

Never here: how it is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import islice
from math import ceil
from typing import Any

from .. import cadence
from ..durations import length
from ..operations.moments import offset
from ..recall import Recall
from ..settings import ALL_QUEUES
from .rendering import here

Row = Mapping[str, Any]

SPANS = {"day": (86_400, 3_600), "week": (7 * 86_400, 6 * 3_600)}
"""Seconds, and those of a column of the strip."""
ROWS, PAUSED = 150, 50
"""Recalls that are read, and paused ones."""
DRAWN = 150
"""Moments that are drawn."""
OF_ONE, OF_ALL = 1_000, 5_000
"""Moments that are computed of one recall, and of all."""
COUNTED = 300
"""Recalls that a column of the strip counts, at most."""


def asked(span: str, queue: str | None) -> dict[str, Any]:
    """The values of its statements."""
    ahead, width = SPANS[span]
    return {
        "ahead": ahead,
        "width": width,
        "queue": queue,
        "rows": ROWS,
        "paused": PAUSED,
        "counted": COUNTED,
    }


def agenda(
    rows: Sequence[Row],
    paused: Sequence[Row],
    busy: Sequence[Row],
    paused_queues: Sequence[Row],
    now: datetime,
    span: str,
) -> dict[str, Any]:
    """What the page shows. `rows`: recalls that wait, the first ones first, as `agenda` finds them;
    `paused`: as `agenda_paused` does; `busy`: how many wait for each column of the strip."""
    ahead, width = SPANS[span]
    whole = now + timedelta(seconds=ahead)
    counts = [row["recalls"] for row in busy]
    more = [row["recalls"] >= COUNTED for row in busy]
    # Beyond the last row that was read others would be missing between the moments.
    full = len(rows) == ROWS
    end = rows[-1]["due_at"] if full else whole
    queues = {row["queue"]: row for row in paused_queues}
    moments: list[dict[str, Any]] = []
    room = OF_ALL
    endless: list[str] = []
    for row in rows:
        stopped = _stopped(row, queues)
        found, is_whole = _within(row, now, whole, min(OF_ONE, room))
        room -= len(found)
        if not is_whole:
            endless.append(row["id"])
            last = _column(found[-1], now, width)
            more[last:] = [True] * (len(more) - last)
        for number, moment in enumerate(found):
            if number and moment <= whole:
                counts[_column(moment, now, width)] += 1
            if moment <= end:
                moments.append(_moment(row, moment, number == 0, stopped))
    for row in paused:
        if row["due_at"] <= end:
            moments.append(_moment(row, row["due_at"], True, "paused: it will not run"))
    moments.sort(key=lambda one: (one["at"], one["row"]["id"]))
    cut = full or len(moments) > DRAWN or len(paused) == PAUSED
    shown = moments[:DRAWN]
    _note_own_clocks(shown, now)
    changes = list(clock_changes(now, shown[-1]["at"] if cut and shown else whole))
    return {
        "now": now,
        "moments": _with_changes(shown, changes),
        "drawn": len(shown),
        "cut": cut,
        "endless": endless,
        "total": sum(row["recalls"] for row in busy),
        "many": any(row["recalls"] >= COUNTED for row in busy),
        "paused": len(paused),
        "paused_many": len(paused) == PAUSED,
        "busiest": f"{max(counts, default=0):,}{'+' if any(more) else ''}",
        "strip_counts": [
            (
                column_name(now + timedelta(seconds=at * width), width),
                count,
                f"{count:,}{'+' if more[at] else ''}",
            )
            for at, count in enumerate(counts)
        ],
        "ticks": [
            _tick(now + timedelta(seconds=at * width), span)
            for at in range(0, len(counts), max(1, len(counts) // 8))
        ],
    }


def _column(moment: datetime, now: datetime, width: int) -> int:
    """That of the strip: as the statement `busy` counts, up to its end, and without its
    beginning."""
    return max(0, ceil((moment - now).total_seconds() / width) - 1)


def _moment(row: Row, at: datetime, first: bool, stopped: str) -> dict[str, Any]:
    return {
        "at": at,
        "row": row,
        "first": first,
        "stopped": stopped,
        "day": here(at).date(),
        "clock": None,
        "wall": _own_wall(row, at),
        "own_clock": None,
        "notes": _notes(row),
    }


def _stopped(row: Row, queues: Mapping[str, Row]) -> str:
    """Why it will not run at its time as things are; empty where it will."""
    pause = queues.get(ALL_QUEUES) or queues.get(row["queue"])
    if pause is None:
        return ""
    which = "all queues are" if pause["queue"] == ALL_QUEUES else "its queue is"
    return f"{which} paused: it will not run before somebody resumes it"


def _notes(row: Row) -> list[str]:
    """What may move its run, or leave it out."""
    notes = []
    if row["jitter_seconds"] and row["call_type"] == "recurring":
        notes.append(f"jitter: up to {length(row['jitter_seconds'])} later")
    if row["grace_seconds"] is not None:
        notes.append(f"grace: not if it is more than {length(row['grace_seconds'])} late")
    return notes


def _within(row: Row, now: datetime, end: datetime, most: int) -> tuple[list[datetime], bool]:
    """Its moments until then: the one that waits, and what its rule makes of it; and whether that
    is all of them."""
    first = row["due_at"]
    if row["call_type"] != "recurring" or row["cadence"] == "interval":
        # The next one counts from the end of a run that nobody knows.
        return [first], True
    moments = [first]
    try:
        for moment in islice(cadence.upcoming(Recall.of(row), now), most):
            if moment > end:
                return moments, True
            if moment > first:
                moments.append(moment)
        return moments, len(moments) < most
    except cadence.CadenceError:
        return moments, True


def _own_zone(row: Row) -> Any:
    """The zone of its cron rule; None where it has none of its own."""
    if row["call_type"] != "recurring" or row["cadence"] != "cron" or not row["time_zone"]:
        return None
    try:
        return cadence.zone(row["time_zone"])
    except cadence.CadenceError:
        return None


def _own_wall(row: Row, moment: datetime) -> str | None:
    """By the recall's own clock, where that shows another time than the reader's."""
    zone = _own_zone(row)
    if zone is None:
        return None
    own = moment.astimezone(zone)
    if own.utcoffset() == here(moment).utcoffset():
        return None
    return f"{own:%H:%M} {row['time_zone']}"


def _note_own_clocks(moments: Sequence[dict[str, Any]], now: datetime) -> None:
    """For each moment whether the clocks of the recall's own zone, where that is another one than
    the reader's, have changed since its moment before, or since now."""
    before: dict[str, datetime] = {}
    reader = here(now).tzinfo
    for one in moments:
        zone = _own_zone(one["row"])
        if zone is None or zone == reader:
            continue
        own = one["at"].astimezone(zone)
        last = before.get(one["row"]["id"]) or now.astimezone(zone)
        before[one["row"]["id"]] = own
        if own.utcoffset() != last.utcoffset():
            one["own_clock"] = f"its clocks changed from {offset(last)} to {offset(own)}"


def clock_changes(start: datetime, end: datetime) -> Iterator[tuple[datetime, str]]:
    """When the clocks of the reader's zone are changed between the two, and in which words."""
    step = timedelta(hours=1)
    before = start
    while before < end:
        after = min(before + step, end)
        if here(before).utcoffset() != here(after).utcoffset():
            low, high = before, after
            while high - low > timedelta(seconds=1):
                middle = low + (high - low) / 2
                if here(middle).utcoffset() == here(before).utcoffset():
                    low = middle
                else:
                    high = middle
            at = high.replace(microsecond=0)
            new = here(at)
            nothing = timedelta()
            old = new + ((here(before).utcoffset() or nothing) - (new.utcoffset() or nothing))
            yield (
                at,
                f"At {old:%H:%M} the clocks are set to {new:%H:%M}, "
                f"from {offset(here(before))} to {offset(new)}.",
            )
        before = after


def _with_changes(
    moments: Sequence[dict[str, Any]], changes: Sequence[tuple[datetime, str]]
) -> list[dict[str, Any]]:
    """The moments, and between them where clocks are changed."""
    lines: list[dict[str, Any]] = [
        {"at": at, "clock": says, "day": here(at).date()} for at, says in changes
    ]
    return sorted([*moments, *lines], key=lambda one: (one["at"], one["clock"] is None))


def column_name(start: datetime, width: int) -> str:
    """By the reader's clock; with the distance from UTC where that changes within, as an hour may
    be there twice."""
    first, last = here(start), here(start + timedelta(seconds=width))
    if first.utcoffset() != last.utcoffset():
        return f"{first:%a %H:%M} ({offset(first)}) to {last:%H:%M} ({offset(last)})"
    return f"{first:%a %H:%M} to {last:%H:%M}"


def _tick(moment: datetime, span: str) -> str:
    return f"{here(moment):%H:%M}" if span == "day" else f"{here(moment):%a %H:%M}"

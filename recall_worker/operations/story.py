"""What became of a recall, and who did what to it: a sentence for each call and each action.

An entry's time is that of its record: a call's is when it ended, an action's when its transaction
began. Pure: the rows are those of sql/reads.sql.

Never here: why a recall waits (why).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ..durations import length
from ..terminal import local, relative, span
from .words import ends, in_a_line, nature

Row = Mapping[str, Any]

ACTIONS = {
    "schedule": "scheduled",
    "cancel": "cancelled",
    "skip": "one occurrence skipped",
    "pause": "paused",
    "resume": "resumed",
    "retry": "retried",
    "fire": "fired by hand",
    "reschedule": "moved",
    "edit": "edited",
    "mark_fired": "marked as fired",
    "pause_queue": "queue paused",
    "resume_queue": "queue resumed",
}
"""What people and agents do, and what is done then."""

NAMES = {
    "trigger_at": "due",
    "paused_at": "paused",
    "interval_seconds": "interval",
    "until_at": "until",
    "failures_most": "failures",
    "grace_seconds": "grace",
    "jitter_seconds": "jitter",
    "additional_context_message": "message",
    "internal_comment": "comment",
    "in_run": "in a run",
    "extra": "extra run",
    "rekey": "key",
}
"""What a column or a fact of `detail` is called for people."""

UNKNOWN = "by whom is not on record, as of the application's own SQL"

LENGTHS = frozenset({"interval_seconds", "grace_seconds", "jitter_seconds"})

IMPLIED = frozenset({"paused_at", "session_id"})
"""What the action says by itself, or what stands elsewhere."""

FIRST = datetime.min.replace(tzinfo=UTC)


class Entry(NamedTuple):
    at: datetime | None
    says: str


def story(calls: Iterable[Row], actions: Iterable[Row], more: Iterable[Entry] = ()) -> list[Entry]:
    """What happened to a recall, the last first: its calls, its actions, and `more` before what
    has the same time."""
    entries = list(more)
    entries += [Entry(call["ended_at"], call_sentence(call)) for call in calls]
    entries += [Entry(action["at"], action_sentence(action)) for action in actions]
    # Of a row that the application wrote without a date, the beginning is not known.
    return sorted(entries, key=lambda entry: entry.at or FIRST)[::-1]


def unsaid(row: Row | None, total: Row) -> list[Entry]:
    """What no action on record tells: that the recall was made, and cancelled."""
    if row is None:
        return []
    entries = []
    if not total["made_by"]:
        entries.append(Entry(row["created_at"], f"made; {UNKNOWN}"))
    if row["status"] == "cancelled" and row["ended_at"] is None and not total["cancelled_by"]:
        entries.append(Entry(row["updated_at"], f"cancelled; {UNKNOWN}"))
    return entries


def call_sentence(call: Row) -> str:
    """One call, or several that were deferred alike: how it ended, how late it was, how long it
    took."""
    which = (
        f"extra run {-call['rekey']}"
        if call["rekey"] < 0
        else f"occurrence {call['occurrence']}" + (f", key {call['rekey']}" * bool(call["rekey"]))
    )
    times = f" {call['calls']} times" if call["calls"] > 1 else ""
    parts = [f"{which}, attempt {call['attempt']}: {answer(call)}{times}"]
    if call["reason"]:
        parts[0] += f": {call['reason']}"
    if call["called_at"] is None:
        parts.append("nothing was sent")
    else:
        took = call["ended_at"] - call["called_at"]
        called = ""
        if call["calls"] > 1:
            called = f"first called {_beside(call['called_at'], call['ended_at'])}, "
        elif took.total_seconds() >= 1:
            called = f"called {_beside(call['called_at'], call['ended_at'])}, "
        late = _between(call["called_at"], call["scheduled_for"])
        parts.append(f"{called}{late} late")
        parts.append(f"took {_between(call['ended_at'], call['last_called_at'])}")
    if call["missed"]:
        parts.append(f"missed before it: {call['missed']}")
    return f"{'; '.join(parts)} (worker {call['worker']})"


def answer(call: Row) -> str:
    """The outcome, with the HTTP status where there was one and the reason does not name it."""
    status = f"HTTP {call['http_status']}"
    if call["http_status"] is None or status in (call["reason"] or ""):
        return str(call["outcome"])
    return f"{call['outcome']} ({status})"


def action_sentence(action: Row) -> str:
    """What was done, by whom, and what it changed."""
    word = ACTIONS.get(action["action"], action["action"])
    changed = changes(action)
    return f"{word} by {action['actor']} ({action['via']})" + (f": {changed}" if changed else "")


def changes(action: Row) -> str:
    """What an action changed, before → after, and its facts, in one line. `detail` is as some
    program wrote it."""
    detail = action["detail"]
    if not isinstance(detail, dict):
        return ""
    parts = []
    if action["action"] == "schedule":
        made = {name: value["to"] for name, value in detail.items() if _is_change(value)}
        parts += _made(made, action["at"]) if made else []
        detail = {name: value for name, value in detail.items() if name not in made}
        if isinstance(detail.get("session_id"), str):
            parts.insert(0, f"session {detail['session_id']}")
    # What was changed comes first.
    for name, value in sorted(detail.items(), key=lambda item: not _is_change(item[1])):
        says = NAMES.get(name, name.replace("_", " "))
        if name in IMPLIED or value is None or value is False:
            continue
        if _is_change(value):
            before, after = (_value(name, value[which], action["at"]) for which in ("from", "to"))
            parts.append(f"{says} {before} → {after}")
        elif value is True:
            parts.append(says)
        else:
            parts.append(f"{says} {_value(name, value, action['at'])}")
    return ", ".join(parts)


def _made(made: Row, at: datetime) -> list[str]:
    """How a recall recurs, from the columns that it was made with."""
    columns = ("call_type", "cadence", "cron", "time_zone", "interval_seconds")
    try:
        row = {name: made.get(name) for name in (*columns, "times", "failures_most")}
        until = made.get("until_at")
        row["until_at"] = None if until is None else datetime.fromisoformat(until)
        how = nature(row) + ends(row)
    except (TypeError, ValueError):
        how = str(made.get("call_type"))
    parts = [how]
    if (due := made.get("trigger_at")) is not None:
        parts.append(f"due {_value('trigger_at', due, at)}")
    if made.get("queue") not in (None, "default"):
        parts.append(f"queue {made['queue']}")
    return parts


def _beside(when: datetime, other: datetime) -> str:
    """A time for a person who sees another one beside it: of the same day without the date."""
    shown, date = local(when), local(other)[:10]
    return shown[11:19] if shown[:10] == date and when.tzinfo is not None else shown


def _is_change(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"from", "to"}


def _value(name: str, value: object, at: datetime) -> str:
    """A value of `detail` for a person, who sees `at` beside it."""
    if value is None:
        return "none"
    if name.endswith("_at") and isinstance(value, str):
        try:
            return _beside(datetime.fromisoformat(value), at)
        except (ValueError, TypeError):
            return value
    if name in LENGTHS and isinstance(value, int):
        return length(value)
    return str(value)


def facts(row: Row, told: list[dict[str, Any]], now: datetime) -> list[tuple[str, str | None]]:
    message = row["additional_context_message"]
    found = [
        ("recall", row["id"]),
        ("session", row["session_id"]),
        ("queue", row["queue"]),
        ("type", nature(row) + ends(row)),
        ("status", row["status"]),
        ("reason", row["reason"]),
        ("due", _due(row, now)),
        ("occurrence", f"{row['occurrence']}{_so_far(row)}"),
        ("stands for", _stands_for(row)),
        ("grace", length(row["grace_seconds"]) if row["grace_seconds"] is not None else None),
        ("jitter", f"up to {length(row['jitter_seconds'])}" if row["jitter_seconds"] else None),
        ("failed", _in_a_row(row)),
        ("last outcome", row["last_outcome"]),
        (
            "in a run",
            f"by worker {row['leased_by']} since {local(row['leased_at'])}"
            if row["lease"]
            else None,
        ),
        ("paused", local(row["paused_at"]) or None),
        ("ended", local(row["ended_at"]) or None),
        ("told", how_told(told[-1], now) if told and row["status"] == "failed" else None),
        ("created", local(row["created_at"])),
        ("comment", row["internal_comment"]),
        ("message", in_a_line(message, 2000)),
    ]
    return [(name, str(value)) for name, value in found if value is not None]


def _due(row: Row, now: datetime) -> str:
    """When it is due, or was; of one that ended before, when it would have been."""
    at = row["trigger_at"]
    if row["status"] not in ("pending", "running") and at is not None and at > now:
        return f"{local(at)}, but it has ended"
    return f"{local(at)} ({relative(at, now)})"


def how_told(entry: Row, now: datetime) -> str:
    """Whether RECALL_FAILURE_URL was told of a failure: a clause. `entry`: a row of `told`."""
    if entry["delivered_at"] is not None:
        return f"RECALL_FAILURE_URL, {relative(entry['delivered_at'], now)}"
    last = f"; the last try: {entry['reason']}" if entry["reason"] else ""
    tries = "1 try" if entry["tries"] == 1 else f"{entry['tries']} tries"
    if entry["given_up_at"] is not None:
        return f"nobody: given up after {tries}{last}"
    return f"nobody yet, after {tries}, the next {relative(entry['next_try_at'], now)}{last}"


def _stands_for(row: Mapping[str, Any]) -> str | None:
    """The nominal time of the current occurrence, if it differs from the due time; and how many
    more were missed.
    """
    if row["status"] not in ("pending", "running") or row["scheduled_for"] in (
        None,
        row["trigger_at"],
    ):
        return None
    if row["lease"] is None and row["planned_at"] not in (None, row["trigger_at"]):
        return None  # It was moved: the claim will set another nominal time.
    missed = f", and {row['missed']} missed after it" if row["missed"] else ""
    return f"{local(row['scheduled_for'])}{missed}"


def _in_a_row(row: Mapping[str, Any]) -> str | None:
    if not row["failures"]:
        return None
    return f"the last {row['failures']} in a row" if row["failures"] > 1 else "the last one"


def _so_far(row: Mapping[str, Any]) -> str:
    parts = [f"attempt {row['attempt']}"] if row["attempt"] else []
    if row["deferrals"]:
        parts.append(
            f"deferred {'once' if row['deferrals'] == 1 else str(row['deferrals']) + ' times'}"
        )
    return f" ({', '.join(parts)})" if parts else ""


def _between(end: datetime | None, start: datetime | None) -> str:
    return "" if end is None or start is None else span((end - start).total_seconds())

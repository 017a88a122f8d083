"""What a model is told of the five tools: names, descriptions, JSON Schemas of arguments and
answers. Pure data.

No schema of arguments has the word "session": there is nothing that could name another one. Each
argument says its form by an example, and what it must not be mixed with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    name: str
    title: str
    description: str
    input_schema: Schema
    output_schema: Schema
    reads_only: bool = False
    destructive: bool = False
    idempotent: bool = False


def _text(description: str, *examples: str) -> Schema:
    return {"type": "string", "description": description, "examples": list(examples)}


def _object(properties: Schema, required: tuple[str, ...] = ()) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_IN = _text(
    "How long from now, with a unit: s, m, h, d, w. m is minutes. Not together with `at`.",
    "90s",
    "10m",
    "1h30m",
    "2d",
)
_AT = _text(
    "A date and time, ISO 8601. Without an offset it is the local time of `time_zone`, which is "
    "required then. Not together with `in`.",
    "2027-01-31T09:00",
    "2027-01-31T09:00+01:00",
    "2027-01-31T08:00Z",
)
_ZONE = _text(
    "IANA time zone of the person who asks: of `at`, `until` and `cron`, and of the times in the "
    "answer. UTC if left out.",
    "Europe/Berlin",
    "America/New_York",
    "UTC",
)
_ID = _text(
    "Which recall, by the id that schedule_recall or list_recalls gave. Leave it out where there "
    "is only one.",
    "5f2c1a3e-7a55-4c0b-9a51-0f6d3c1e8b42",
)
_NULL_TEXT: Schema = {"type": ["string", "null"]}
_RECALL: Schema = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "status": {
            "type": "string",
            "description": "waiting, due, in a run, paused; or over: fired, cancelled, failed",
        },
        "message": {"type": "string"},
        "due": {**_NULL_TEXT, "description": "when it comes next, in the answer's time zone"},
        "due_at": {**_NULL_TEXT, "description": "the same instant, RFC 3339 in UTC"},
        "due_in": {**_NULL_TEXT, "description": "how long from now, in words"},
        "recurs": {**_NULL_TEXT, "description": "how it comes again; null: it comes once"},
        "ends": {**_NULL_TEXT, "description": "when it ends by itself; null: it does not"},
    },
    "required": ["id", "status", "message", "due", "due_at", "due_in", "recurs", "ends"],
}
_NOW: Schema = {
    "now": {"type": "string", "description": "what time it is, in the answer's time zone"},
    "now_at": {"type": "string", "description": "the same instant, RFC 3339 in UTC"},
}
_ONE = {
    "type": "object",
    "properties": {**_NOW, "recall": _RECALL},
    "required": ["now", "now_at", "recall"],
}
_MANY = {
    "type": "object",
    "properties": {**_NOW, "recalls": {"type": "array", "items": _RECALL}},
    "required": ["now", "now_at", "recalls"],
}

INSTRUCTIONS = (
    "These tools let you come back to this conversation later by yourself: you are called with the "
    "message that you scheduled. Answers say when a recall is due and what time it is now; say "
    "these to the person rather than computing them. A refusal says what to do instead."
)

TOOLS = (
    Tool(
        name="schedule_recall",
        title="Schedule a recall",
        description=(
            "Have yourself called back in this conversation, with a message to yourself: once "
            "(`in` or `at`), or again and again (`every`, `grid` or `cron`; exactly one of the "
            "three; `in` or `at` beside it is the first time, beside `cron` the earliest). A "
            "conversation has one pending recall, as a rule: from inside the run of one that comes "
            "once the next one can be scheduled. Use it for reminders, for looking at something "
            "again, and for anything that was promised for later."
        ),
        input_schema=_object(
            {
                "message": _text(
                    "What you will read when you are called back. Write it so that it can be "
                    "understood without the conversation: what to do, where, and for whom.",
                    "Look at build 4711 in CI again, and tell Ann whether it is green.",
                ),
                "in": _IN,
                "at": _AT,
                "every": _text(
                    "Again and again, this long after the end of each run; with a unit. First "
                    "after that time, unless `in` or `at` say otherwise.",
                    "15m",
                    "1h",
                    "1d",
                ),
                "grid": _text(
                    "Again and again at fixed distances from the first time, however long runs "
                    "take; with a unit.",
                    "1h",
                ),
                "cron": _text(
                    "Again and again by five fields, minute hour day-of-month month day-of-week, "
                    "in `time_zone`. For times of the day and of the week.",
                    "0 9 * * mon-fri",
                    "30 17 1 * *",
                ),
                "time_zone": _ZONE,
                "until": _text(
                    "With every, grid or cron: nothing comes after this time, or after this day "
                    "where it is a date alone.",
                    "2027-06-30",
                    "2027-06-30T18:00",
                ),
                "times": {
                    "type": "integer",
                    "minimum": 1,
                    "description": "With every, grid or cron: it ends after so many occurrences.",
                    "examples": [5],
                },
            },
            ("message",),
        ),
        output_schema=_ONE,
    ),
    Tool(
        name="list_recalls",
        title="List recalls",
        description=(
            "What is scheduled in this conversation, with ids, next times, and what time it is now."
        ),
        input_schema=_object(
            {
                "time_zone": _ZONE,
                "ended": {
                    "type": "boolean",
                    "description": "Also the last ones that are over. False if left out.",
                },
            }
        ),
        output_schema=_MANY,
        reads_only=True,
        idempotent=True,
    ),
    Tool(
        name="reschedule_recall",
        title="Reschedule a recall",
        description=(
            "Move the next occurrence of a recall to another time: `in` or `at`, one of them. How "
            "it recurs stays as it is. During its run, this is the occurrence after the run."
        ),
        input_schema=_object({"id": _ID, "in": _IN, "at": _AT, "time_zone": _ZONE}),
        output_schema=_ONE,
        destructive=True,
    ),
    Tool(
        name="skip_recall",
        title="Skip one occurrence",
        description=(
            "Leave out the next occurrence of a recurring recall; the ones after it still come."
        ),
        input_schema=_object({"id": _ID, "time_zone": _ZONE}),
        output_schema=_ONE,
        destructive=True,
    ),
    Tool(
        name="cancel_recall",
        title="Cancel a recall",
        description=(
            "End a recall: it does not come again. From inside its own run, that run goes on to "
            "its end, and is the last."
        ),
        input_schema=_object({"id": _ID}),
        output_schema=_ONE,
        destructive=True,
        idempotent=False,
    ),
)

"""`schema`: JSON Schemas of what this program writes for other programs: the log's events, and each
command's `--json` document.

Rows of the database's tables are described by the schema as released, with the comments of its
columns; what commands make up themselves, here. A recall has the application's own columns
besides. Tests hold both against what the daemon and the commands write.
"""

from __future__ import annotations

from typing import Any

from .. import events
from ..schema.released import released
from ..terminal import print_json

Schema = dict[str, Any]

TYPES: dict[str, Schema] = {
    "text": {"type": "string"},
    "uuid": {"type": "string"},
    "integer": {"type": "integer"},
    "bigint": {"type": "integer"},
    "boolean": {"type": "boolean"},
    "timestamp with time zone": {"type": "string", "format": "date-time"},
    "text[]": {"type": "array", "items": {"type": "string"}},
    "jsonb": {},
}
"""PostgreSQL's types in JSON."""
TEXT, COUNT, NUMBER, FLAG = ({"type": name} for name in ("string", "integer", "number", "boolean"))
TIME = TYPES["timestamp with time zone"]


def show(what: str) -> None:
    """Print the schema of `events` or `json`."""
    print_json(events.json_schema() if what == "events" else documents())


def documents() -> Schema:
    """One JSON Schema, with a definition for each command's document: `#/$defs/list`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "recall-worker: documents of --json",
        "description": (
            "Each definition that is named like a command is the document that it writes with "
            "--json."
        ),
        "$defs": definitions(),
    }


def _null(schema: Schema) -> Schema:
    """The same, or null."""
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]} if schema else {}


def _some(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def _of(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _object(properties: dict[str, Schema], *, optional: dict[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "required": list(properties),
        "properties": {**properties, **(optional or {})},
        "additionalProperties": False,
    }


def _row(table: str, *, nulls: bool = False) -> dict[str, Schema]:
    """A table's columns. `nulls`: the application's table may allow what ours would not."""
    columns = {}
    for name, column in released().tables[table].columns.items():
        says = {} if column.comment is None else {"description": column.comment}
        may_be_null = nulls or not column.not_null
        columns[name] = {
            **(_null(TYPES[column.type]) if may_be_null else TYPES[column.type]),
            **says,
        }
    return columns


def definitions() -> dict[str, Schema]:
    """The definitions by name: first those of rows, then one for each command."""
    recall = _object(_row("session_recalls", nulls=True))
    recall["properties"] |= {"id": TEXT, "session_id": TEXT}
    recall["additionalProperties"] = True
    queue = _object(
        {
            "queue": TEXT,
            **dict.fromkeys(
                ("due", "overdue", "waiting", "leased", "held_back", "failed", "workers"), COUNT
            ),
            "oldest": {**_null(NUMBER), "description": "seconds that the oldest has been due"},
            "next_due": _null(TIME),
            "paused_at": _null(TIME),
            "paused_by": _null(TEXT),
            "reason": _null(TEXT),
            "all_paused": FLAG,
        }
    )
    call = _object(_row("recall_attempts"))
    action = _object(_row("recall_actions"))
    told = _object(
        {
            "id": TEXT,
            "occurrence": COUNT,
            "written_at": TIME,
            "tries": COUNT,
            "http_status": _null(COUNT),
            "reason": _null(TEXT),
            "delivered_at": _null(TIME),
            "given_up_at": _null(TIME),
            "next_try_at": _null(TIME),
        }
    )
    worker = _object(
        {
            **_row("recall_workers"),
            "elsewhere": {
                **FLAG,
                "description": "whether its row came with another database's dump",
            },
            "alive": {**FLAG, "description": "whether its last heartbeat is fresh"},
            "leases": {**COUNT, "description": "runs that it has in hand"},
        }
    )
    entry = {"kind": {"enum": ["call", "action"]}, "at": {**TIME, "description": "of the record"}}
    columns = _row("recall_attempts")
    of_call = {
        name: column
        for name, column in columns.items()
        if name not in ("lease", "ended_at", "delivered_at", "completed_at")
    }
    of_action = {name: column for name, column in _row("recall_actions").items() if name != "at"}
    event = {
        "oneOf": [
            _object({**entry, "kind": {"const": "call"}, **of_call}),
            _object({**entry, "kind": {"const": "action"}, **of_action, "id": TEXT}),
        ]
    }
    recalls = _some(_of("recall"))
    changed = _object(
        {"queue": TEXT, "paused_at": _null(TIME), "paused_by": _null(TEXT), "reason": _null(TEXT)},
        optional={"changed": FLAG, "resumed": FLAG},
    )
    numbers: Schema = {"type": "object", "additionalProperties": COUNT}
    return {
        "recall": recall,
        "call": call,
        "action": action,
        "queue": queue,
        "event": event,
        "schedule": _of("recall"),
        "list": recalls,
        "show": _object(
            {
                "recall": {**_null(_of("recall")), "description": "null: it was deleted"},
                "calls": {**_some(_of("call")), "description": "the oldest first"},
                "actions": {**_some(_of("action")), "description": "the oldest first"},
                "told": {**_some(told), "description": "what RECALL_FAILURE_URL was told"},
            }
        ),
        "why": _object(
            {
                "id": TEXT,
                "status": _null(TEXT),
                "why": TEXT,
                "evidence": {"type": "object", "description": "what it was concluded from"},
            }
        ),
        **dict.fromkeys(
            ("cancel", "skip", "pause", "resume", "retry", "fire", "reschedule", "edit"), recalls
        ),
        "actions": {**_some(_of("action")), "description": "the latest first"},
        "events": {
            **_some(_of("event")),
            "description": "the oldest first; with --follow one `event` on each line",
        },
        "workers": _some(worker),
        "queues": _some(_of("queue")),
        "queues pause": _some(changed),
        "queues resume": _some(changed),
        "stats": _object(
            {
                "live": _object(
                    {
                        **dict.fromkeys(
                            ("waiting", "due", "overdue", "deferred", "paused", "leased"), COUNT
                        ),
                        "next_due": _null(TIME),
                    }
                ),
                "statuses": numbers,
                "calls_last_hour": {**numbers, "description": "by outcome"},
                "lateness_last_hour": _object(
                    {"occurrences": COUNT, **dict.fromkeys(("p50", "p99", "most"), _null(NUMBER))}
                ),
                "queues": _some(_of("queue")),
                "workers": _object(
                    dict.fromkeys(("alive", "silent", "slots", "breakers_open", "held"), COUNT)
                ),
                "failures_told": _object(
                    {
                        **dict.fromkeys(("waiting", "delivered", "given_up"), COUNT),
                        "oldest": _null(TIME),
                        "wanted": FLAG,
                    }
                ),
                "copy": FLAG,
            }
        ),
        "top": _object(
            {
                "at": TIME,
                "database": TEXT,
                "filter": _null(TEXT),
                "copy": FLAG,
                "counts": numbers,
                "counted_to": {**COUNT, "description": "no kind is counted any further"},
                "not_counted_to_the_end": _some(TEXT),
                **dict.fromkeys(("next", "runs", "failures"), _some({"type": "object"})),
                "workers": _some({"type": "object"}),
                "endpoints": _some(_object({"failing": FLAG, "sentence": TEXT})),
                "queues": _some({"type": "object"}),
            }
        ),
        "settings": _object(
            {
                "settings": _some(
                    _object(
                        {
                            "variable": TEXT,
                            "value": {"description": "of a secret, whether it is set"},
                            "origin": TEXT,
                            "says": TEXT,
                        }
                    )
                ),
                "problems": _some(TEXT),
            }
        ),
        "prune": _object(dict.fromkeys(("recalls", "calls", "actions", "failures"), COUNT)),
        "preview": _object(
            {
                "cron": _null(TEXT),
                "time_zone": _null(TEXT),
                "occurrences": _some(_object({"at": TIME, "local": TIME})),
            },
            optional={"id": TEXT},
        ),
        "doctor": _object(
            {
                "version": TEXT,
                "verdict": TEXT,
                "checks": _some(
                    _object({"check": TEXT, "state": TEXT, "seen": TEXT, "todo": _null(TEXT)})
                ),
            }
        ),
        "migrate": _object({"done": _some(TEXT)}),
        "migrate --check": _object(
            {"up_to_date": FLAG, "pending": _some(TEXT)},
            optional={"refused": _some(_object({"what": TEXT, "todo": TEXT}))},
        ),
        "check-endpoint": _object(
            {
                "url": TEXT,
                "session": TEXT,
                "verdict": TEXT,
                "requests": COUNT,
                "seconds": NUMBER,
                "rows": _some(
                    _object(
                        {
                            **dict.fromkeys(("row", "property", "verdict", "seen"), TEXT),
                            "todo": _null(TEXT),
                        }
                    )
                ),
            }
        ),
    }

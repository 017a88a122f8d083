"""Events: the log lines and, where they are switched on, the metrics both come from here.

Owns the names of events, the level and the fields of each, and the schema that says so to programs
(`schema events`). A name is `noun.past_participle`. One canonical line
per settled run, `recall.settled`, carries outcome, verdict, lateness, lag and duration. Events go
to stderr; stdout is for the output of commands. Never here: secrets, messages of recalls, internal
comments.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from select import PIPE_BUF
from typing import Any, NamedTuple, TextIO, cast

import structlog


class Event(NamedTuple):
    level: str
    says: str
    fields: tuple[str, ...] = ()
    """What every line of it has, besides COMMON."""
    optional: tuple[str, ...] = ()
    is_open: bool = False
    """Whether it has further fields: the settings."""


TEXT, NUMBER, COUNT, FLAG, TIME, LIST = "text", "number", "count", "flag", "time", "list"
"""Kinds of fields. COUNT: a whole number. TIME: RFC 3339."""
KINDS: dict[str, dict[str, Any]] = {
    TEXT: {"type": "string"},
    NUMBER: {"type": "number"},
    COUNT: {"type": "integer"},
    FLAG: {"type": "boolean"},
    TIME: {"type": "string", "format": "date-time"},
    LIST: {"type": "array", "items": {"type": "string"}},
}
COMMON = {
    "event": (TEXT, "its name"),
    "level": (TEXT, "debug, info, warning, error"),
    "timestamp": (TIME, "when, by the host's clock"),
    "worker": (TEXT, "who"),
}
"""What every line has: name, kind, meaning."""
FIELDS = {
    "action": (TEXT, "what was done to recalls: cancel, retry …"),
    "actions": (COUNT, "records of actions that were deleted"),
    "after_s": (NUMBER, "seconds that it lasted"),
    "answer": (TEXT, "done, refused, or unreachable: PostgreSQL did not answer"),
    "attempt": (COUNT, "the attempt, from 1"),
    "because": (TEXT, "the recall's new status; deleted; lost: its lease was"),
    "calls": (COUNT, "records of calls that were deleted"),
    "cancelled": (COUNT, "cancelled recalls that were deleted"),
    "channel": (TEXT, "the channel of the notifications"),
    "connections": (COUNT, "open connections of the ops port, at most"),
    "doing": (TEXT, "what failed: claim, call, accept, settle, renew, prune, tell …"),
    "duration_ms": (NUMBER, "from the request to the end of the call"),
    "endings": (COUNT, "runs that were settled together"),
    "error": (TEXT, "what PostgreSQL said"),
    "exception": (TEXT, "a traceback"),
    "failed": (COUNT, "failed recalls that were deleted"),
    "failures": (COUNT, "records of failures told that were deleted"),
    "fired": (COUNT, "fired recalls that were deleted"),
    "first": (FLAG, "whether it was the occurrence's first call"),
    "held_ms": (NUMBER, "from the claim to the settled run"),
    "hint": (TEXT, "what to do"),
    "host": (TEXT, "the address that is listened on, or of who asks"),
    "http_status": (COUNT, "the answer's status"),
    "key": (TEXT, "the Idempotency-Key"),
    "lag_ms": (NUMBER, "from due to the request: what the worker adds"),
    "lateness_ms": (NUMBER, "from the nominal time to the request: what the owner sees"),
    "message": (TEXT, "the id of the message about the failure"),
    "missed": (COUNT, "due moments that this run also stands for"),
    "next_in_s": (NUMBER, "seconds until the next try"),
    "occurrence": (COUNT, "the occurrence, from 1"),
    "outcome": (TEXT, "how the call ended: docs/endpoint.md; null: nothing was called"),
    "planned_before": (TIME, "the moment by the older time zone data"),
    "planned_for": (TIME, "the moment by ours"),
    "port": (COUNT, "the port that is listened on"),
    "queue": (TEXT, "the queue; * stands for all"),
    "reason": (TEXT, "why, in a sentence"),
    "recall": (TEXT, "the recall's id"),
    "recalls": (COUNT, "how many recalls were claimed"),
    "runs": (COUNT, "how many runs"),
    "scheduled_for": (TIME, "the occurrence's nominal time"),
    "session": (TEXT, "the session's id"),
    "setting": (TEXT, "the setting's name"),
    "settings": (LIST, "the settings' names"),
    "settled_ms": (NUMBER, "from the end of the call to the settled run"),
    "status": (TEXT, "the recall's status after it"),
    "time_zone": (TEXT, "the recall's time zone"),
    "timeout_s": (NUMBER, "seconds that runs have to end"),
    "times": (COUNT, "how many times since the last line"),
    "tool": (TEXT, "the tool's name, as the agent gave it"),
    "took_ms": (NUMBER, "how long it took"),
    "took_s": (NUMBER, "how long it took, pauses included"),
    "traceparent": (TEXT, "the call's header of that name"),
    "tries": (COUNT, "how many times it was tried"),
    "tzdata": (TEXT, "the version of our time zone data"),
    "user": (TEXT, "who acted, as it stands on record"),
    "verdict": (TEXT, "what the row becomes: finish, next, retry, defer, release"),
    "waited_s": (NUMBER, "seconds from the failure to its delivery"),
    "whole": (FLAG, "whether the end of the tables was reached"),
    "worker_before": (TEXT, "whose lease had ended"),
}
"""Every field: its kind, and what it is. One name means the same everywhere."""
NULLABLE = frozenset({"http_status", "outcome", "reason", "session"})

RUN = ("recall", "session", "occurrence", "attempt")
_ENDING = (*RUN, "outcome", "settled_ms", "held_ms")
_CALLED = (
    "first",
    "lag_ms",
    "lateness_ms",
    "duration_ms",
    "http_status",
    "reason",
    "traceparent",
)
EVENTS = {
    "mcp.started": Event("info", "the MCP server serves a session on stdin", ("session",)),
    "mcp.listening": Event("info", "the MCP server serves tokens over HTTP", ("host", "port")),
    "mcp.called": Event(
        "info",
        "an agent called a tool: the one line of each call",
        ("session", "tool", "answer", "took_ms"),
        ("recall", "reason"),
    ),
    "mcp.rejected": Event(
        "warning", "the MCP server did not take a request", ("reason", "http_status")
    ),
    "mcp.stopped": Event("info", "the MCP server has ended"),
    "console.listening": Event("info", "the console's pages are served", ("host", "port")),
    "console.acted": Event(
        "info",
        "somebody acted in the console",
        ("user", "action"),
        ("recall", "recalls", "queue"),
    ),
    "console.refused": Event(
        "warning", "somebody was not let into the console", ("host", "reason")
    ),
    "console.failed": Event(
        "error", "a page failed, by a defect", ("doing", "reason"), ("exception",)
    ),
    "console.stopped": Event("info", "the console has ended"),
    "ops.listening": Event("info", "/livez, /readyz and /metrics are served", ("host", "port")),
    "ops.crowded": Event(
        "warning",
        "connections of the ops port were closed for new ones",
        ("times", "connections"),
    ),
    "ops.refused": Event("warning", "the ops port could not accept", ("times", "reason")),
    "worker.started": Event("info", "the worker starts, with these settings", is_open=True),
    "worker.ready": Event("info", "the worker works, with or without PostgreSQL"),
    "worker.draining": Event("info", "it claims no more, and runs may end", ("runs", "timeout_s")),
    "worker.hurried": Event("warning", "a second signal: runs are broken off now", ("runs",)),
    "worker.released": Event("warning", "runs were broken off and given back", ("runs",)),
    "worker.stopped": Event("info", "the worker has ended"),
    "worker.error": Event(
        "error",
        "a defect, or a statement that PostgreSQL refused",
        ("doing", "reason"),
        ("recall", "exception"),
    ),
    "settings.exposed": Event("warning", "others can read a secret", ("setting", "reason", "hint")),
    "secrets.read": Event("info", "SIGHUP: secrets were read again", ("settings",)),
    "secret.changed": Event("info", "a secret's file has a new value", ("setting",)),
    "secret.unreadable": Event(
        "warning", "a secret's file can't be read; the old value stays", ("reason", "hint")
    ),
    "listener.listening": Event("info", "notifications arrive", ("channel",)),
    "listener.lost": Event("warning", "the LISTEN connection is lost", ("reason",)),
    "listener.deaf": Event("error", "notifications do not arrive", ("reason", "hint")),
    "database.lost": Event("warning", "PostgreSQL does not answer", ("reason",)),
    "database.found": Event("info", "PostgreSQL answers again", ("after_s",)),
    "commit.unconfirmed": Event(
        "error", "a synchronous standby does not confirm commits", ("reason", "hint")
    ),
    "commit.confirmed": Event("info", "it confirms them again", ("after_s",)),
    "table.locked": Event("warning", "somebody holds the table locked", ("reason", "hint")),
    "table.unlocked": Event("info", "the table's lock is gone", ("after_s",)),
    "schema.refused": Event("error", "schema and code can't work together", ("reason", "hint")),
    "claims.held": Event("error", "nothing is claimed", ("reason", "hint")),
    "claims.resumed": Event("info", "it claims again"),
    "queue.paused": Event("warning", "a queue is paused", ("queue", "hint")),
    "queue.resumed": Event("info", "a queue is resumed", ("queue",)),
    "schema.broken": Event(
        "error", "the schema lets something not be done", ("doing", "reason", "hint")
    ),
    "schema.whole": Event("info", "it can be done again", ("after_s",)),
    "claim.answered": Event("debug", "a claim was answered", ("recalls", "took_ms")),
    "batch.settled": Event("debug", "runs were settled together", ("endings", "took_ms")),
    "recall.claimed": Event(
        "debug", "a recall was taken under a lease", ("recall", "session", "occurrence")
    ),
    "recall.started": Event(
        "info",
        "a call begins",
        (*RUN, "key", "scheduled_for", "missed", "lag_ms", "lateness_ms", "traceparent"),
    ),
    "recall.moved": Event(
        "info", "the application had moved the recall", ("recall", "session", "occurrence")
    ),
    "recall.replanned": Event(
        "info",
        "newer time zone data gave it another moment",
        ("recall", "time_zone", "tzdata", "planned_before", "planned_for"),
    ),
    "recall.settled": Event(
        "info", "a run was settled: the one line of each", (*_ENDING, "verdict", "status"), _CALLED
    ),
    "recall.ended": Event(
        "info", "others had ended the recall in mid-run", (*_ENDING, "status"), _CALLED
    ),
    "recall.aborted": Event("info", "its call was broken off", ("recall", "session", "because")),
    "recall.stranded": Event(
        "error",
        "PostgreSQL refuses a change to the row; it is tried again",
        ("recall", "error"),
        (*_ENDING[1:], *_CALLED),
    ),
    "lease.taken": Event("warning", "a run was taken over", ("recall", "session", "worker_before")),
    "lease.locked": Event(
        "warning", "a row is locked, so its lease can't be renewed", ("recall", "session", "reason")
    ),
    "lease.unlocked": Event("info", "that row's lock is gone", ("recall", "session", "after_s")),
    "lease.lost": Event("warning", "another worker had taken the run over", _ENDING, _CALLED),
    "lease.violated": Event(
        "warning", "somebody else settled the run", (*_ENDING, "status", "hint"), _CALLED
    ),
    "failure.delivered": Event(
        "info",
        "RECALL_FAILURE_URL was told of a failed recall",
        ("recall", "message", "tries", "http_status", "took_ms", "waited_s"),
    ),
    "failure.deferred": Event(
        "warning",
        "it could not be told, and is tried again",
        ("recall", "message", "tries", "reason", "next_in_s", "hint"),
    ),
    "failure.unsubscribed": Event(
        "warning",
        "it wants no more messages (HTTP 410)",
        ("recall", "message", "tries", "reason", "next_in_s", "hint"),
    ),
    "failure.abandoned": Event(
        "error",
        "it could not be told for a week",
        ("recall", "message", "tries", "reason", "after_s", "hint"),
    ),
    "rows.pruned": Event(
        "info",
        "old rows were deleted",
        ("fired", "cancelled", "failed", "calls", "actions", "failures", "took_s", "whole"),
    ),
    "breaker.opened": Event(
        "error", "the endpoint is failing: only test calls are sent", ("session",), ("reason",)
    ),
    "breaker.probed": Event(
        "warning", "a test call found it still failing", ("session",), ("reason",)
    ),
    "breaker.closed": Event("info", "the endpoint answers again", (), ("session", "reason")),
    "endpoint.misconfigured": Event(
        "error", "the endpoint's answer is our fault", ("reason", "http_status")
    ),
    "endpoint.noted": Event("info", "something about the endpoint to know", ("recall", "reason")),
}
"""Every event: its level, what it says, and the fields that it has."""
LOUDNESS = {name: event.level for name, event in EVENTS.items()}


def json_schema() -> dict[str, Any]:
    """A JSON Schema of one line of the log in JSON: `oneOf` of the events by their names."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "recall-worker: log events",
        "description": "One line of the log with RECALL_LOG_FORMAT=json.",
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in EVENTS],
        "$defs": {name: _event_schema(name, event) for name, event in EVENTS.items()},
    }


def _event_schema(name: str, event: Event) -> dict[str, Any]:
    own = {field: _field_schema(field) for field in (*event.fields, *event.optional)}
    common = {field: {**KINDS[kind], "description": says} for field, (kind, says) in COMMON.items()}
    return {
        "description": event.says,
        "type": "object",
        "required": [*COMMON, *event.fields],
        "properties": common | {"event": {"const": name}, "level": {"const": event.level}} | own,
        "additionalProperties": event.is_open,
    }


def _field_schema(field: str) -> dict[str, Any]:
    kind, says = FIELDS[field]
    schema = {**KINDS[kind], "description": says}
    if field in NULLABLE:
        schema["type"] = [schema["type"], "null"]
    return schema


Listener = Callable[[str, dict[str, Any]], None]


class Events:
    """Writes events to the log and passes them to all listeners."""

    def __init__(self, **context: Any) -> None:
        self._log = structlog.get_logger().bind(**context)
        self._say = {name: getattr(self._log, level) for name, level in LOUDNESS.items()}
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Have `listener(name, facts)` called for every event, after its log line."""
        self._listeners.append(listener)

    def tell(self, event: str, **facts: Any) -> None:
        say = self._say[event]
        try:
            say(event, **facts)
        except OSError:
            pass  # The reader of the log has gone. The work goes on.
        for listener in self._listeners:
            listener(event, facts)


def configure(level: str, format: str) -> None:
    """Set up the log of this process. `format`: auto (console on a terminal, else JSON), json,
    console."""
    console = format == "console" or (format == "auto" and sys.stderr.isatty())
    facts: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(),
        # Tracebacks are texts by then, so that control characters in them can be escaped; rich must
        # not render them.
        exception_formatter=structlog.dev.plain_traceback,
    )
    shown: list[Any] = [_escaped, renderer] if console else [_line]
    structlog.configure(
        processors=[*facts, *shown],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(
            file=sys.stderr if console else cast("TextIO", Together(sys.stderr))
        ),
        cache_logger_on_first_use=True,
    )
    # psycopg and others log through the standard library: only errors, in lines like ours.
    others = logging.StreamHandler(sys.stderr)
    others.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *facts],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *shown],
        )
    )
    logging.basicConfig(level=logging.ERROR, handlers=[others])
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)


def escape_controls(text: str) -> str:
    """`text` with every character that could control a terminal or hide in a line made visible:
    control characters, bidi marks, surrogates, what has no width and no ink."""
    return "".join(
        c
        if c.isprintable() and c not in _WITHOUT_INK
        else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


_WITHOUT_INK = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F),  # joins graphemes
        (0x115F, 0x1160),  # fill a Korean syllable
        (0x17B4, 0x17B5),  # Khmer vowels that are not written
        (0x180B, 0x180F),  # choose a Mongolian letter's form
        (0x2800, 0x2800),  # a Braille cell without dots
        (0x3164, 0x3164),
        (0xFE00, 0xFE0D),  # choose a form; the two after them, of emoji, are in everybody's texts
        (0xFFA0, 0xFFA0),
        (0xE0100, 0xE01EF),
    )
    for code in range(first, last + 1)
)
"""Characters that Python calls printable, and nobody can see."""


def _escaped(_: Any, __: str, facts: Any) -> Any:
    return {name: _shown(name, fact) for name, fact in facts.items()}


def _shown(name: str, fact: Any) -> Any:
    if not isinstance(fact, str):
        return fact
    if name == "exception":
        # A traceback keeps its lines, indented so that quoted text can't look like an event.
        return "\n".join("  " + escape_controls(line) for line in fact.split("\n"))
    return escape_controls(fact)


_WRITER = json.JSONEncoder(default=str, allow_nan=False)


def _line(_: Any, __: str, facts: Any) -> str:
    try:
        line = _WRITER.encode(facts)
    except ValueError:
        # JSON has neither infinity nor NaN, though Python would write them.
        line = _WRITER.encode(
            {
                k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in facts.items()
            }
        )
    # The one control character that JSON's ASCII leaves as it is.
    return line.replace("\x7f", "\\u007f")


class Together:
    """A file to which all lines of one turn of the event loop go in one write: a batch of settled
    recalls takes one write, not one each."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lines: list[str] = []
        atexit.register(self._leave)

    def write(self, line: str) -> None:
        self._lines.append(line)
        if len(self._lines) == 1:
            try:
                asyncio.get_running_loop().call_soon(self._leave)
            except RuntimeError:
                self._leave()

    def flush(self) -> None:
        """For structlog, which asks for it after each line."""

    def _leave(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            with suppress(OSError):  # The reader of the log has gone. The work goes on.
                for piece in _pieces(lines):
                    self._file.write(piece)
                    self._file.flush()


def _pieces(lines: list[str]) -> Iterator[str]:
    """The lines, joined into pieces that a pipe accepts as a whole: several workers may write to
    one."""
    piece = ""
    for line in lines:
        if piece and len(piece) + len(line) > PIPE_BUF:
            yield piece
            piece = ""
        piece += line
    yield piece

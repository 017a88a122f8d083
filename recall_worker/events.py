"""Events: the log lines and, where they are switched on, the metrics both come from here.

Owns the names of events and the level of each. A name is `noun.past_participle`. One canonical line
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
from typing import Any, TextIO, cast

import structlog

LOUDNESS = {
    "ops.listening": "info",
    "ops.crowded": "warning",
    "ops.refused": "warning",
    "worker.started": "info",
    "worker.ready": "info",
    "worker.draining": "info",
    "worker.hurried": "warning",
    "worker.released": "warning",
    "worker.stopped": "info",
    "worker.error": "error",
    "listener.listening": "info",
    "listener.lost": "warning",
    "listener.deaf": "error",
    "database.lost": "warning",
    "database.found": "info",
    "schema.refused": "error",
    "claim.answered": "debug",
    "batch.settled": "debug",
    "recall.claimed": "debug",
    "recall.moved": "info",
    "recall.settled": "info",
    "recall.ended": "info",
    "recall.aborted": "info",
    "recall.stranded": "error",
    "lease.taken": "warning",
    "lease.lost": "warning",
    "lease.violated": "warning",
    "rows.pruned": "info",
    "breaker.opened": "error",
    "breaker.probed": "warning",
    "breaker.closed": "info",
    "endpoint.misconfigured": "error",
}

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
    control characters, bidi marks, surrogates."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


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
        return _WRITER.encode(facts)
    except ValueError:
        # JSON has neither infinity nor NaN, though Python would write them.
        return _WRITER.encode(
            {
                k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in facts.items()
            }
        )


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

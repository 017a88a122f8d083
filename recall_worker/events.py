"""What happened, told once: the log lines (and, where they are switched on, the metrics) both come from here.

Owns the names of events and how loud each is. A name is `noun.past_participle`. One canonical line per settled run,
`recall.settled`, carries outcome, verdict, lateness, lag and duration. Data on stdout belongs to the commands; events go to stderr.
Never here: secrets, messages of recalls, internal comments.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable
from typing import Any

import structlog

LOUDNESS = {
    "ops.listening": "info",
    "worker.started": "info",
    "worker.ready": "info",
    "worker.draining": "info",
    "worker.hurried": "warning",
    "worker.released": "warning",
    "worker.stopped": "info",
    "worker.stumbled": "error",
    "bell.listening": "info",
    "bell.lost": "warning",
    "bell.unheard": "error",
    "database.lost": "warning",
    "database.found": "info",
    "schema.refused": "error",
    "claim.answered": "debug",
    "batch.settled": "debug",
    "recall.claimed": "debug",
    "recall.placed": "info",
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
    """Tells what happened to the log and to whoever else listens."""

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
            pass  # Whoever read the log has gone. The work goes on.
        for listener in self._listeners:
            listener(event, facts)


def configure(level: str, format: str) -> None:
    """Set the log up for this process. `format`: auto (console on a terminal, else JSON), json, console."""
    console = format == "console" or (format == "auto" and sys.stderr.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if console else structlog.processors.JSONRenderer(_line)
    )
    facts: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    shown: list[Any] = [_harmless if console else _finite, renderer]
    structlog.configure(
        processors=[*facts, *shown],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # psycopg and others speak through the standard library: only what is wrong, and in lines like ours.
    others = logging.StreamHandler(sys.stderr)
    others.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *facts],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *shown],
        )
    )
    logging.basicConfig(level=logging.ERROR, handlers=[others])
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)


def harmless(text: str) -> str:
    """`text` with everything that could steer a terminal or hide in a line made visible: controls, bidi marks, surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _harmless(_: Any, __: str, facts: Any) -> Any:
    return {name: _shown(name, fact) for name, fact in facts.items()}


def _shown(name: str, fact: Any) -> Any:
    if not isinstance(fact, str):
        return fact
    if name == "exception":
        # A traceback keeps its lines, set in so that what it quotes can't pass for an event.
        return "\n".join("  " + harmless(line) for line in fact.split("\n"))
    return harmless(fact)


_WRITER = json.JSONEncoder(default=str)


def _line(facts: Any, **_: Any) -> str:
    return _WRITER.encode(facts)


def _finite(_: Any, __: str, facts: Any) -> Any:
    # JSON knows neither infinity nor NaN, though Python would write them.
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}

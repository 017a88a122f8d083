"""What a page shows that is not in the live picture: a search, an agenda, the failures of a window.
Pages that show the same ask the same question, and the live picture asks it once for all of them.

A row's mark is short, and changes with what a page shows of the row. The page sends the marks of
its rows with its stream, so it is told of what has changed since it was drawn, whatever console
answers.

Never here: when a question is asked (live), how it is drawn (the templates).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from .. import statements
from ..selection import Selection
from ..top.picture import ROWS, Picture
from . import agenda
from .database import patience

Row = Mapping[str, Any]
Rows = Mapping[str, Sequence[Row]]
"""A question's answer: rows by the name of the statement."""

MARKED = (
    *("id", "session_id", "queue", "status", "trigger_at", "lease", "paused_at", "ended_at"),
    *("attempt", "deferrals", "reason", "last_outcome", "updated_at", "run_reference"),
    *("call_type", "cadence", "cron", "interval_seconds", "recall_id", "outcome"),
)
"""Columns of which a change is shown, where a row has them. An extended lease is none."""
MARK = 8
"""Characters of a mark."""
WINDOWS = {"1h": 3_600, "24h": 86_400, "7d": 7 * 86_400}
"""Windows of the page of failures, in seconds."""
FAILURES = 2_000
"""Calls that ended in trouble that a page groups."""


def mark(row: Row) -> str:
    """What changes when something that is shown of a recall does."""
    lease_ended = None if row.get("lease") is not None else row.get("lease_until")
    shown = [*(row.get(name) for name in MARKED), lease_ended]
    return hashlib.blake2b(repr(shown).encode(errors="replace")).hexdigest()[:MARK]


def marks_of(rows: Iterable[Row]) -> frozenset[str]:
    return frozenset(mark(row) for row in rows if row["id"] is not None)


@dataclass(frozen=True)
class Question:
    part: str
    """Which page asks it."""
    key: str
    """The same for all that ask the same."""
    statements: Mapping[str, tuple[str, Mapping[str, Any]]]
    """By name, with their values; the first one bounds the time of the others."""
    is_searched: bool = False
    """Whether a person reads its rows as they were found, and is only told how many have
    changed."""
    span: str = ""
    """Of an agenda, of failures."""
    queue: str | None = None

    def content(self, rows: Rows, picture: Picture) -> Any:
        """What is compared with what it was: of an agenda without the minute that has passed."""
        plain = [
            [{name: value for name, value in row.items() if name != "now"} for row in found]
            for name, found in rows.items()
            if name in self.statements
        ]
        return (plain, picture.paused_queues)


def _of(name: str, values: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    return statements.load("console")[name], values


def listed(selection: Selection, *, by_index: bool) -> Question | None:
    """The search of a list. None where the sessions of a user would have to be asked for first."""
    if selection.user is not None:
        return None
    values = selection.values() | {"count_most": 0}
    return Question(
        "recalls",
        "recalls?" + repr(sorted(values.items())),
        {
            "patience": patience(by_index=by_index),
            "rows": (statements.load("find")["find"], values),
        },
        is_searched=True,
    )


def agenda_of(span: str, queue: str | None) -> Question:
    """`span`: of agenda.SPANS. `queue` None: all."""
    values = agenda.asked(span, queue)
    return Question(
        "agenda",
        "agenda?" + urlencode({"span": span, "queue": queue or ""}),
        {
            "patience": patience(by_index=True),
            "rows": _of("agenda", values),
            "paused": _of("agenda_paused", values),
            "busy": _of("busy", values),
            "paused_queues": (statements.load("top")["paused_queues"], {"rows": ROWS}),
        },
        span=span,
        queue=queue,
    )


def failures_of(window: str) -> Question:
    """`window`: of WINDOWS."""
    values = {"window": WINDOWS[window], "most": FAILURES}
    return Question(
        "failures",
        f"failures?window={window}",
        {"patience": patience(), "rows": _of("failures", values)},
        span=window,
    )

"""What PostgreSQL answered in one look, and what follows from it: sums, sentences, the document of
`--json`. Pure.

Never here: how it is drawn (frame), and when it is asked for (feed).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from ..database.identity import IS_A_COPY
from ..durations import length
from ..fleet import setting_of, state_of
from ..terminal import whole_span

Row = Mapping[str, Any]

MOST = 2_000
"""Rows that a count reads at most."""
ROWS = 200
"""Rows of a section at most."""
OVERDUE = 60.0
"""Seconds after its due time from which a recall that nobody has in hand is overdue."""
WINDOW = 3600.0
"""Seconds for which failures are shown and counted."""
KINDS = ("due", "overdue", "in_run", "waiting", "deferred", "paused")
PART_OF = {"overdue": "due", "deferred": "waiting"}
"""Kinds that are counted within another one."""
ENDPOINT_UNKNOWN = "an endpoint whose address is not known"


@dataclass(frozen=True, slots=True)
class Count:
    """How many there are; `more`: at least so many."""

    number: int = 0
    more: bool = False

    def __str__(self) -> str:
        return f"{self.number:,}{'+' if self.more else ''}"


@dataclass(frozen=True, slots=True)
class Picture:
    """The answers of one look. Rows are as the statements of sql/top.sql return them."""

    now: datetime
    """By PostgreSQL's clock."""
    database: str
    needle: str | None = None
    """What was asked for: all of it is about recalls that match. Workers are not filtered."""
    copy: bool = False
    counts: Sequence[Row] = ()
    next: Sequence[Row] = ()
    runs: Sequence[Row] = ()
    failures: Sequence[Row] = ()
    failed: int = 0
    """Recalls that failed for good within WINDOW."""
    workers: Sequence[Row] = ()
    paused_queues: Sequence[Row] = ()
    endpoints: Sequence[Row] = ()
    took: float = field(default=0.0, compare=False)
    """Seconds from the question to the answer."""

    def age(self, when: datetime) -> float:
        """Seconds since then; below zero where it is yet to come."""
        return (self.now - when).total_seconds()

    def count(self, kind: str) -> Count:
        """The number of a kind, over all queues."""
        return Count(
            sum(row[kind] for row in self.counts),
            any(PART_OF.get(kind, kind) in row["more"] for row in self.counts),
        )

    @property
    def waiting(self) -> Count:
        """Neither in a run nor paused, whether their time has come or not: what `stats`, `queues`
        and `list --state waiting` call so."""
        due, ahead = self.count("due"), self.count("waiting")
        return Count(due.number + ahead.number, due.more or ahead.more)

    @property
    def alive(self) -> list[Row]:
        return [row for row in self.workers if row["alive"]]

    @property
    def slots(self) -> int:
        return sum(row["slots"] for row in self.alive)

    @property
    def queues(self) -> list[dict[str, Any]]:
        """A row for each queue that has live recalls, is served or is paused: its counts, how many
        live workers serve it, and why it is paused."""
        paused = {row["queue"]: row for row in self.paused_queues}
        counted = {row["queue"]: row for row in self.counts}
        names = {"default", *counted, *paused} - {"*"}
        for row in self.alive:
            names.update(row["queues"] or ())
        nothing: dict[str, Any] = dict.fromkeys(KINDS, 0) | {"more": []}
        return [
            {
                **nothing,
                **counted.get(name, {}),
                "queue": name,
                "workers": sum(
                    row["queues"] is None or name in row["queues"] for row in self.alive
                ),
                "pause": paused.get("*", paused.get(name)),
            }
            for name in sorted(names, key=lambda name: (name != "default", name))
        ]

    @property
    def notes(self) -> list[str]:
        """Sentences on what keeps recalls from being called, the gravest first."""
        notes = []
        if self.copy:
            notes.append(f"{IS_A_COPY[0].upper()}{IS_A_COPY[1:]}.")
        if not self.alive:
            notes.append("No live worker: nothing is called. Start one with: recall-worker run")
        elif all(row["held"] is not None for row in self.alive):
            notes.append("All live workers are held: they claim nothing.")
        if any(row["queue"] == "*" for row in self.paused_queues):
            notes.append("All queues are paused: nothing is claimed until queues resume --all.")
        return notes

    def breakers(self, elapsed: float = 0.0, *, brief: bool = False) -> list[tuple[bool, str]]:
        """A sentence for each endpoint of live workers, those that fail first; and whether it
        fails. `brief`: those that do not share one."""
        found: dict[str, list[Row]] = {}
        for row in self.alive:
            found.setdefault(setting_of(row, "run_url") or ENDPOINT_UNKNOWN, []).append(row)
        failing = []
        closed: dict[str, int] = {}
        for url, rows in found.items():
            open_in = sum(row["breaker"] == "open" for row in rows)
            if not open_in:
                closed[url] = len(rows)
                continue
            of = (
                _workers(len(rows)) if open_in == len(rows) else f"{open_in} of {len(rows)} workers"
            )
            probed = self._probed(url)
            last = "" if probed is None else f" (the last one {_ago(self.age(probed) + elapsed)})"
            failing.append(
                f"Breaker open in {of}: {url} is failing, only test calls are sent{last} until it "
                "answers"
            )
        if brief and len(closed) > 1:
            workers = _workers(sum(closed.values()))
            called = [f"Breaker closed for {len(closed)} endpoints, in {workers}"]
        else:
            called = [
                f"Breaker closed in {_workers(n)}: calls go to {url}" for url, n in closed.items()
            ]
        return [*((True, sentence) for sentence in failing), *((False, text) for text in called)]

    def _probed(self, url: str) -> datetime | None:
        """When an endpoint got its last test call. Its key is made of the whole address, of which
        workers show no query."""
        key = hashlib.sha256(url.encode()).hexdigest()[:16]
        probed: Sequence[datetime | None] = [
            row["probed_at"] for row in self.endpoints if row["endpoint"] == key
        ]
        return probed[0] if probed else None

    def document(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "at": self.now,
            "database": self.database,
            "filter": self.needle,
            "copy": self.copy,
            "counts": {kind: self.count(kind).number for kind in KINDS}
            | {"failed_last_hour": self.failed},
            "counted_to": MOST,
            "not_counted_to_the_end": [kind for kind in KINDS if self.count(kind).more],
            "next": [dict(row) for row in self.next],
            "runs": [dict(row) for row in self.runs],
            "failures": [dict(row) for row in self.failures],
            "workers": [
                {name: value for name, value in row.items() if name != "now"}
                | {"state": state_of(row)}
                for row in self.workers
            ],
            "endpoints": [
                {"failing": failing, "sentence": sentence} for failing, sentence in self.breakers()
            ],
            "queues": self.queues,
        }


def matches(row: Row, needle: str) -> bool:
    """Whether a row is shown while the filter is `needle`: as the statements decide it."""
    return any(
        needle in str(row[name]).lower() for name in ("id", "session_id", "queue") if name in row
    )


def kind(row: Row) -> str:
    """How a recall recurs, in a word or two."""
    if row["call_type"] != "recurring":
        return str(row["call_type"])
    if row["cadence"] == "cron":
        return f"cron {row['cron']}"
    seconds = row["interval_seconds"]
    if seconds is None:
        return "recurring"
    return f"{'grid' if row['cadence'] == 'grid' else 'every'} {length(seconds)}"


def note(row: Row, late: float) -> str:
    """Why a recall of `next` has not been called, as far as its row says. `late`: seconds for which
    it has been due."""
    return called_before(row) or ("overdue" if late > OVERDUE else "")


def called_before(row: Row) -> str | None:
    """What the last calls of an occurrence were that is called again; None where it is not."""
    why = row["reason"] or row["last_outcome"]
    if row["deferrals"]:
        times = "" if row["deferrals"] == 1 else f" {row['deferrals']} times"
        return f"deferred{times}: {why}"
    if row["attempt"]:
        return f"attempt {row['attempt'] + 1} follows: {why}"
    return None


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"


def _ago(seconds: float) -> str:
    return f"{whole_span(seconds)} ago"


def since(picture: Picture, elapsed: float) -> datetime:
    """PostgreSQL's clock now: `elapsed` seconds after the picture was taken."""
    return picture.now + timedelta(seconds=elapsed)

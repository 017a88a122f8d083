"""What the demo promises, and whether it was kept: expected against seen. Pure: evidence in,
expectations out.

Evidence is what the agent's API saw and what PostgreSQL holds at the end, never what the daemon
says of itself. All instants are of one clock, as the demo's PostgreSQL and its API share a machine.

Never here: how the evidence was collected (demo), or how it is shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from statistics import median
from typing import Any

ON_TIME = 1.0
"""Seconds after its due moment within which a call counts as on time; the figures show the measured
values.
"""
INTERVAL = 2
LINKS = 5


@dataclass(frozen=True, slots=True)
class Visit:
    """One request to the agent's API."""

    session: str
    key: str
    at: datetime
    http_status: int | None
    """None if the caller disconnected."""
    message: str | None = None
    """The agent's message; None if no run was started."""
    scheduled_for: datetime | None = None
    ended_at: datetime | None = None
    left_at: datetime | None = None

    @property
    def lateness(self) -> float:
        """Seconds from the nominal time to the request."""
        return 0.0 if self.scheduled_for is None else (self.at - self.scheduled_for).total_seconds()


@dataclass(frozen=True, slots=True)
class Evidence:
    visits: Sequence[Visit]
    """In the order of their arrival."""
    rows: Sequence[dict[str, Any]]
    """The table's rows at the end: session_id, status."""
    recorded: int
    """Calls on record in PostgreSQL."""
    person_left: datetime | None
    cancelled: dict[str, datetime]
    """When the cancel of a session's recall was committed."""
    daemon_status: int | None
    """How the daemon's process ended after SIGTERM."""

    def runs(self, session: str) -> list[Visit]:
        return [
            visit for visit in self.visits if visit.session == session and visit.message is not None
        ]

    def of(self, session: str) -> list[Visit]:
        return [visit for visit in self.visits if visit.session == session]

    def states(self, session: str) -> str:
        return (
            ", ".join(
                sorted(str(row["status"]) for row in self.rows if row["session_id"] == session)
            )
            or "no row"
        )

    def later(self, session: str) -> int:
        """Calls after the cancel."""
        return (
            sum(visit.at > self.cancelled[session] for visit in self.of(session))
            if session in self.cancelled
            else 0
        )


@dataclass(frozen=True, slots=True)
class Expectation:
    session: str
    what: str
    expected: str
    seen: str
    kept: bool


TIMED = ("hello", "build", "report", "inbox")
"""The sessions whose runs waited only for their time."""


def lateness(evidence: Evidence) -> list[float]:
    """The lateness of the timed runs, in seconds."""
    return [visit.lateness for session in TIMED for visit in evidence.runs(session)]


def handovers(evidence: Evidence) -> list[float]:
    """Seconds from the end of each link of the chain to the request of the next one."""
    runs = evidence.runs("chain")
    return [
        (b.at - a.ended_at).total_seconds() for a, b in pairwise(runs) if a.ended_at is not None
    ]


def expectations(evidence: Evidence) -> list[Expectation]:
    """Everything that was promised, in the order in which it was shown."""
    return [
        _once(evidence, "hello", "at once"),
        _once(evidence, "build", "in 3 s"),
        _once(evidence, "report", "in 1.5 s, by SQL"),
        _recurring(evidence),
        _busy(evidence),
        _chain(evidence),
        _aborted(evidence),
        _each_once(evidence),
        _recorded(evidence),
        _states(evidence),
        Expectation(
            "daemon",
            "ends on SIGTERM",
            "status 0",
            f"status {evidence.daemon_status}",
            evidence.daemon_status == 0,
        ),
    ]


def _once(evidence: Evidence, session: str, what: str) -> Expectation:
    runs = evidence.runs(session)
    late = f", {ms(runs[0].lateness)} late" if runs else ""
    kept = len(evidence.of(session)) == len(runs) == 1 and 0 <= runs[0].lateness <= ON_TIME
    return Expectation(session, what, "1 run, on time", f"{_count(runs)}{late}", kept)


def _recurring(evidence: Evidence) -> Expectation:
    runs, after = evidence.runs("inbox"), evidence.later("inbox")
    numbers = [run.key.rpartition(":")[2] for run in runs]
    gaps = [
        (b.at - a.ended_at).total_seconds() for a, b in pairwise(runs) if a.ended_at is not None
    ]
    steady = all(INTERVAL <= gap <= INTERVAL + ON_TIME for gap in gaps) and all(
        0 <= run.lateness <= ON_TIME for run in runs
    )
    in_order = len(runs) >= 3 and numbers == [str(n + 1) for n in range(len(runs))]
    apart = f" {'on' if steady else 'NOT on'} time"
    return Expectation(
        "inbox",
        f"every {INTERVAL} s",
        "3+ on time, then none",
        f"{len(runs)}{apart}, {after} later",
        steady and in_order and "inbox" in evidence.cancelled and after == 0,
    )


def _busy(evidence: Evidence) -> Expectation:
    calls, runs, left = evidence.of("meeting"), evidence.runs("meeting"), evidence.person_left
    refused = sum(call.http_status == 409 for call in calls)
    after = sum(left is not None and run.at > left for run in runs)
    return Expectation(
        "meeting",
        "waits for people",
        "put off, 1 run after",
        f"{refused} x put off, {after} after",
        len(runs) == after == 1 and refused >= 1 and len(calls) == refused + 1,
    )


def _chain(evidence: Evidence) -> Expectation:
    runs = evidence.runs("chain")
    order = " ".join((run.message or "").split()[1] for run in runs)
    wanted = " ".join(str(n + 1) for n in range(LINKS))
    apart = all(b.at > (a.ended_at or b.at) for a, b in pairwise(runs))
    kept = order == wanted and apart and len(runs) == len(evidence.of("chain"))
    return Expectation(
        "chain",
        "from inside runs",
        f"1-{LINKS}, never 2 at once",
        f"{order}{'' if apart else ', OVERLAPPING'}",
        kept,
    )


def _aborted(evidence: Evidence) -> Expectation:
    runs, when, after = (
        evidence.runs("draft"),
        evidence.cancelled.get("draft"),
        evidence.later("draft"),
    )
    left = runs[0].left_at if runs else None
    took = None if left is None or when is None else (left - when).total_seconds()
    seen = "not aborted" if took is None else f"after {ms(took)}"
    kept = (
        len(evidence.of("draft")) == 1 and took is not None and 0 <= took <= ON_TIME and after == 0
    )
    return Expectation(
        "draft", "cancel in mid-run", "aborted, then none", f"{seen}, {after} later", kept
    )


def _each_once(evidence: Evidence) -> Expectation:
    due = {visit.key for visit in evidence.visits}
    taken = [visit.key for visit in evidence.visits if visit.http_status != 409]
    runs = [visit.key for visit in evidence.visits if visit.message is not None]
    kept = len(taken) == len(runs) == len(set(runs)) == len(due) > 0
    return Expectation(
        "all",
        "exactly once",
        f"{len(due)} due, each 1 run",
        f"{len(taken)} calls, {len(runs)} runs",
        kept,
    )


def _recorded(evidence: Evidence) -> Expectation:
    made = len(evidence.visits)
    seen = f"{evidence.recorded} in PostgreSQL"
    return Expectation(
        "all", "calls on record", f"{made} in PostgreSQL", seen, made == evidence.recorded > 0
    )


def _states(evidence: Evidence) -> Expectation:
    wanted = dict.fromkeys(("hello", "build", "report", "meeting"), "fired") | dict.fromkeys(
        ("inbox", "draft"), "cancelled"
    )
    wanted["chain"] = ", ".join(["fired"] * LINKS)
    total = Counter(", ".join(wanted.values()).split(", "))
    seen = Counter(str(row["status"]) for row in evidence.rows)
    kept = (
        all(evidence.states(session) == states for session, states in wanted.items())
        and seen == total
    )
    return Expectation("all", "rows at the end", _counted(total), _counted(seen), kept)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {word}" for word, n in sorted(counts.items(), reverse=True)) or "none"


def _count(runs: Sequence[Visit]) -> str:
    return "1 run" if len(runs) == 1 else f"{len(runs) or 'no'} runs"


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if abs(seconds) < 1 else f"{seconds:.1f} s"


def figures(evidence: Evidence) -> list[str]:
    """What was counted and measured, a line each."""
    late, gaps = lateness(evidence), handovers(evidence)
    counts = Counter(
        "aborted" if v.http_status is None else "busy" if v.http_status == 409 else "answered"
        for v in evidence.visits
    )
    lines = [
        (
            f"Requests that the API counted: {len(evidence.visits)} "
            f"({', '.join(f'{n} {word}' for word, n in counts.most_common())})"
        )
    ]
    if late:
        lines.append(
            f"From due to request at the API: median {ms(median(late))}, at most "
            f"{ms(max(late))} ({len(late)} timed runs)"
        )
    if gaps:
        lines.append(
            f"From one run of the chain to the next: median {ms(median(gaps))}, at most "
            f"{ms(max(gaps))}"
        )
    return lines

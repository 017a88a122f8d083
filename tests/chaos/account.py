"""The account: what must be true at the end, from the API's record, the table of attempts, the recalls and the application's journal alone.

Every rule answers with findings, in words; an empty list of them is a clean account. What excuses an oddity is written where it is excused,
with the rule that it comes from. A replay is a second request under one key; that alone is no finding, as delivery is at least once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any

from .api import DEFINITE, Api, Call
from .faults import HEARD_WITHIN, Fault
from .hand import Journal, Promise
from .stage import LEASE

MAX_ATTEMPTS = 3
SLACK = 0.05
"""Seconds by which two instants of one host may seem to be in the wrong order."""
LAG_MOST = 1.5
"""Seconds that a recall may be late in a calm phase, on a machine that does much else; what is usual is told beside it."""
CANCEL_TAKES = 1.0
"""Seconds in which a call may still arrive that was claimed before its recall was ended."""

WORKER_DIED = ("kill", "stop long", "term")
CUT_OFF = ("database silent", "database half open", "database cut", "database cut for all", "database slow")
API_WAY = ("api cut", "api slow", "api silent")
STOPPED = ("stop short", "stop long")
OUTAGES = ("postgres kill short", "postgres kill long", "postgres restart", "full house", "full disk", *CUT_OFF)


@dataclass(slots=True)
class Account:
    findings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def take(self, rule: str, found: Iterator[str]) -> None:
        self.findings += [f"{rule}: {said}" for said in found]


@dataclass
class Records:
    api: Api
    journal: Journal
    rows: Mapping[str, Mapping[str, Any]]
    """session_recalls, by id."""
    marks: Sequence[Mapping[str, Any]]
    """recall_attempts."""
    faults: Sequence[Fault]
    calm: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        self.by_key: dict[str, list[Call]] = defaultdict(list)
        self.by_recall: dict[str, list[Call]] = defaultdict(list)
        for call in self.api.calls:
            self.by_key[call.key].append(call)
            self.by_recall[call.recall].append(call)
        self.marks_of: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for mark in self.marks:
            self.marks_of[mark["recall_id"]].append(mark)

    def struck(self, slot: str, start: float, end: float, kinds: Sequence[str]) -> bool:
        return any(f.kind in kinds and f.strikes(slot, start, end) for f in self.faults)

    def on(self, start: float, end: float, kinds: Sequence[str]) -> bool:
        """Whether such a fault was on at any time between, whomever it struck."""
        return any(f.kind in kinds and f.began <= end and (f.ended is None or f.ended >= start) for f in self.faults)

    def succeeded(self, call: Call) -> bool:
        """Whether this call told its worker that the run ended well."""
        run = self.api.runs.get(call.key)
        return call.how in ("ok", "huge", "dribbled") or (call.how == "accepted" and run is not None and run.result == "ok")


def settle_up(records: Records) -> Account:
    """All rules, one after the other."""
    account = Account()
    account.take("contract", iter(records.api.broken + records.journal.strange))
    for rule in (
        unknown_calls,
        replays,
        second_keys,
        endings,
        numbers,
        settled_twice,
        too_early,
        at_once,
        after_the_end,
        leases,
        lateness,
        heard,
    ):
        account.take(rule.__name__.replace("_", " "), rule(records))
    replayed = sum(len(calls) - 1 for calls in records.by_key.values())
    lags = sorted(_lags(records))
    account.facts = {
        "recalls": len(records.journal.promises),
        "occurrences": len({(c.recall, c.number[0]) for c in records.api.calls}),
        "requests": len(records.api.calls),
        "runs": len(records.api.runs),
        "replays under the same key": replayed,
        "keys after a failed run": len({c.key for c in records.api.calls if c.number[1] > 0}),
        "lost": sum(said.startswith(("endings: lost", "numbers")) for said in account.findings),
        "doubled": sum(said.startswith(("replays", "second keys", "at once", "settled twice")) for said in account.findings),
        "lag in calm phases, ms (p50, p99, most)": [round(lags[min(len(lags) - 1, int(len(lags) * q))] * 1000, 1) for q in (0.5, 0.99, 1)]
        if lags
        else [],
        "answers": dict(Counter(c.how if not c.hung_up else "hung up on" for c in records.api.calls).most_common()),
        "the application did": dict(records.journal.did.most_common()),
    }  # fmt: skip
    return account


def unknown_calls(records: Records) -> Iterator[str]:
    """Each request is for a recall that somebody scheduled."""
    for recall, calls in records.by_recall.items():
        if recall not in records.journal.promises:
            yield f"{calls[0].key} was called, which nobody scheduled"


def replays(records: Records) -> Iterator[str]:
    """A second request under a key comes only where the first ending was not known to its worker, or said to come again."""
    for key, calls in records.by_key.items():
        for first, second in pairwise(calls):
            run = records.api.runs.get(key)
            told = first.how in (*DEFINITE, "accepted") or (first.how == "failed" and run is not None)
            if not told or first.hung_up or first.ended is None:
                continue
            # Its worker died, or was stopped for longer than its lease, before it could settle.
            if records.struck(first.worker, first.at, second.at, ("kill", "stop long")):
                continue
            # It was told to stop while PostgreSQL would not take its last settles.
            if records.struck(first.worker, first.at, second.at, ("term",)) and records.on(first.at, second.at, OUTAGES):
                continue
            # It was cut off from the database, alone, for about as long as a lease: the others can't know that it lives.
            cuts = [f for f in records.faults if f.kind in CUT_OFF and f.strikes(first.worker, first.at, second.at)]
            if any(f.seconds > LEASE / 2 for f in cuts) and second.worker != first.worker:
                continue
            # Accepted, but in an outage the reference could not be put on record before the lease ran out: through a proxy the worker can't tell
            # a PostgreSQL that is gone for all from one that is gone for it, and breaks off.
            if first.how == "accepted" and records.on(first.at, second.at, OUTAGES):
                continue
            # The answer may not have arrived. A connection that was forgotten while it was open stays so when the way is healed.
            if records.on(first.ended - 1, first.ended + 1, API_WAY) or records.on(first.at, first.ended, ("api silent",)):
                continue
            yield f"{key}: answered {first.how} to {first.worker}, and asked again by {second.worker} {second.at - first.ended:.1f} s later"


def second_keys(records: Records) -> Iterator[str]:
    """A new key for the same occurrence comes only after a run that the API said had failed."""
    for recall, calls in records.by_recall.items():
        seen: set[tuple[int, int]] = set()
        for call in calls:
            occurrence, rekey = call.number
            if (occurrence, rekey) not in seen:
                seen.add((occurrence, rekey))
                before = f"{recall}:{occurrence}" + (f".{rekey - 1}" if rekey > 1 else "")
                run = records.api.runs.get(before)
                if rekey and (run is None or run.result != "failed"):
                    yield f"{call.key} was called, though no run under {before} had failed"


def endings(records: Records) -> Iterator[str]:
    """Every recall has come to an end that its calls, or its application, explain."""
    deleted = {p.session for p in records.journal.promises.values() if p.ended == "deleted" or p.maybe_ended}
    for promise in records.journal.promises.values():
        row, calls = records.rows.get(promise.id), records.by_recall[promise.id]
        if row is None:
            if promise.session not in deleted and (promise.certain or calls):
                yield f"lost: {promise.id} ({promise.kind}) is gone, and nobody deleted it"
            continue
        status = row["status"]
        if promise.ended == "cancelled" and status != "cancelled":
            yield f"overwritten: {promise.id} ({promise.kind}) was cancelled by its application, and is {status}"
        elif status in ("pending", "running"):
            yield f"lost: {promise.id} ({promise.kind}) is {status} still: {row['reason']}"
        elif (
            status == "fired"
            and not any(records.succeeded(c) for c in calls)
            and not (row["last_outcome"] == "over" and promise.moves)
        ):
            # Skips and moves may take the last of its numbers; which were never called, `numbers` counts.
            yield f"lost: {promise.id} ({promise.kind}) is fired, though no call of it was answered so"
        elif status == "cancelled" and not (promise.ended or promise.maybe_ended or any(c.how == "gone" for c in calls)):
            yield f"lost: {promise.id} ({promise.kind}) is cancelled, and nobody did that"
        elif status == "failed":
            yield from _failed(promise, row, records)


def _failed(promise: Promise, row: Mapping[str, Any], records: Records) -> Iterator[str]:
    if not row["reason"]:
        yield f"{promise.id} failed without a reason"
    if any(c.how == "refused" for c in records.by_recall[promise.id]):
        return
    marks = records.marks_of[promise.id]
    spent = max(
        (
            sum(m["calls"] for m in marks if m["occurrence"] == o and m["outcome"] in ("unknown", "failed"))
            for o in {m["occurrence"] for m in marks}
        ),
        default=0,
    )
    if spent < MAX_ATTEMPTS:
        yield f"lost: {promise.id} failed after {spent} attempts: {row['reason']}"


def numbers(records: Records) -> Iterator[str]:
    """Every number of an occurrence was called, or is one that the application's skips and moves took."""
    for promise in records.journal.promises.values():
        row = records.rows.get(promise.id)
        if row is None:
            continue
        called = {c.number[0] for c in records.by_recall[promise.id]}
        # A skip may lead to a number beyond the recall's end, which then ends it uncalled.
        was_called = row["status"] in ("fired", "failed") and row["last_outcome"] != "over"
        last = row["occurrence"] if was_called else row["occurrence"] - 1
        missing = [n for n in range(1, last + 1) if n not in called]
        if len(missing) > promise.moves:
            yield f"{promise.id} ({promise.kind}): {missing} were never called, and {promise.moves} were moved or skipped"
        if called and max(called) > row["occurrence"]:
            yield f"{promise.id}: {max(called)} was called, and the row stands at {row['occurrence']}"
        if promise.kind != "recurring" and called and max(called) > 1 + promise.moves:
            yield f"{promise.id}: a {promise.kind} was called {max(called)} times, and moved {promise.moves} times"


def settled_twice(records: Records) -> Iterator[str]:
    """One settle ends an occurrence. Whoever lost the lease leaves a mark that says so; and nothing is settled that was not answered."""
    ended: Counter[tuple[str, int]] = Counter()
    for mark in records.marks:
        if mark["outcome"] in ("answered", "refused", "gone") and mark["settled"] not in (
            "lost",
            "taken",
            "ended",
            "deleted",
            "cancelled",
        ):
            ended[mark["recall_id"], mark["occurrence"]] += 1
        if mark["outcome"] == "answered":
            key = f"{mark['recall_id']}:{mark['occurrence']}" + (f".{mark['rekey']}" if mark["rekey"] else "")
            if not any(records.succeeded(c) for c in records.by_key.get(key, [])):
                yield f"{key} is on record as answered, which no call of it was"
    for (recall, occurrence), times in ended.items():
        if times > 1:
            yield f"{recall}:{occurrence} was settled {times} times"


def too_early(records: Records) -> Iterator[str]:
    """Nothing is called before its time, whatever the host's clock says."""
    for call in records.api.calls:
        early = datetime.fromisoformat(call.scheduled_for).timestamp() - call.at
        if early > SLACK:
            yield f"{call.key} was called {early:.2f} s before its time"


def at_once(records: Records) -> Iterator[str]:
    """No two requests of a session are open at once."""
    by_session: dict[str, list[Call]] = defaultdict(list)
    for call in records.api.calls:
        by_session[call.session].append(call)
    for session, calls in by_session.items():
        for n, second in enumerate(calls):
            for first in calls[:n]:
                if first.ended is not None and first.ended <= second.at + SLACK:
                    continue
                # A stopped process holds its connections open and can't know; its successor asks under the same key.
                if records.struck(first.worker, first.at, second.at, STOPPED) and first.key == second.key:
                    continue
                # What a slow or silent way to the API does to a connection, the API learns late.
                if records.on(first.at, second.at + 1, API_WAY):
                    continue
                over = (first.ended or second.at) - second.at
                yield f"{session}: {first.key} at {first.worker} was open for {over:.2f} s when {second.key} came from {second.worker}"


def after_the_end(records: Records) -> Iterator[str]:
    """A recall that its application ended is not called again."""
    for promise in records.journal.promises.values():
        if promise.ended_at is None:
            continue
        for call in records.by_recall[promise.id]:
            late = call.at - promise.ended_at
            # A process that was stopped between its claim and its call goes on where it stood; a slow way holds the request itself back.
            if (
                late > CANCEL_TAKES
                and not records.struck(call.worker, promise.ended_at, call.at, STOPPED)
                and not records.on(promise.ended_at, call.at, API_WAY)
            ):
                yield f"{call.key} was called {late:.1f} s after it was {promise.ended}"


def leases(records: Records) -> Iterator[str]:
    """No lease is left at the end."""
    for id, row in records.rows.items():
        if row["lease"] is not None and row["status"] in ("pending", "running"):
            yield f"{id} is leased by {row['leased_by']} until {row['lease_until']}"


def lateness(records: Records) -> Iterator[str]:
    """In calm phases nothing is late; and after any fault nothing stays unclaimed: what is due is called when that is over."""
    for lag, key in _lagging(records):
        if lag > LAG_MOST:
            yield f"{key} was called {lag:.1f} s after it was due, in a calm phase"


def heard(records: Records) -> Iterator[str]:
    """Whoever listens again looks: what was inserted while nobody heard does not wait for the regular look."""
    for fault in records.faults:
        if fault.lone is not None and fault.alone and fault.lone.certain:
            calls = records.by_recall[fault.lone.id]
            if not calls or calls[0].at - fault.lone.due > HEARD_WITHIN:
                yield f"{fault.lone.id} was inserted while no bell heard, and was not called within {HEARD_WITHIN:g} s"


def _lags(records: Records) -> Iterator[float]:
    yield from (lag for lag, _ in _lagging(records))


def _lagging(records: Records) -> Iterator[tuple[float, str]]:
    """Of recalls in sessions of their own that fell due in a calm phase, and that nobody moved: how late their first call was."""
    seen = Counter(promise.session for promise in records.journal.promises.values())
    chains = {session for session, times in seen.items() if times > 1}
    for promise in records.journal.promises.values():
        calls = records.by_recall[promise.id]
        if promise.kind == "recurring" or promise.moves or not calls or not promise.certain or promise.maybe_ended:
            continue
        if calls[0].attempt > 1:
            continue  # Its first request was lost on the way, and is on record as unknown.
        for start, end in records.calm:
            # What happens after the calm phase is the next fault's doing.
            if start <= promise.due < end and promise.session not in chains:
                yield min(calls[0].at, end) - promise.due, calls[0].key

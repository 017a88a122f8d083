"""The account: what must be true at the end, from the API's record, the table of attempts, the
recalls, the actions on record and the journal alone.

Every rule answers with findings, in words; an empty list of them is a clean account. What excuses
an oddity is written where it is excused, with the rule that it comes from. A replay is a second
request under one key; that alone is no finding, as delivery is at least once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise, zip_longest
from typing import Any

from .api import DEFINITE, Api, Call
from .drawn import RUN_TIMEOUT, Drawn
from .faults import HEARD_WITHIN, Fault
from .journal import NEVER, SLACK, Act, Journal, Promise
from .people import PAGES, Answer

MAX_ATTEMPTS = 3
LAG_MOST = 1.5
"""Seconds that a recall may be late in a calm phase, on a machine that does much else; what is
usual is told beside it."""
CANCEL_TAKES = 1.0
"""Seconds in which a call may still come of what was claimed before its recall was ended."""

GAP_SLACK = 0.1
"""Seconds by which an interval may seem too short: the API notes the end of a run a moment after
it."""
GAP_MOST = 1.5
"""Seconds by which an interval may be longer than it should, on a machine that does much else."""
POLLED_MOST = 10.0
"""Seconds between two polls of an accepted run, at most."""
HUNG_UP_WITHIN = 2.0
"""Seconds after a cancel in which the API sees its run's connection close."""
LOOKS_SPARED, SLOW_MOST = 20.0, 0.3
"""A look at what is in hand that takes long is waited for so many times as long until the next one.
How long it may take on this machine is told by the lag in calm phases (p99), at most so many
seconds."""
TROUBLED = 4.0
"""Seconds after a fault in which a worker may still be starting, or connecting."""
CONSOLE_STARTS = 15.0
"""Seconds after its end in which the console is there again."""
CONNECTION_TRUSTED = 6.0
"""Seconds for which the console takes a connection for whole: five, and some."""
PAGE_MOST = 8.0
"""Seconds that a page may take in a calm phase, on a machine that does much else."""

STOOD_STILL = "machine stood still"
"""Nobody got anything of the machine for a while: nothing that was injected, but as a SIGSTOP to
all at once."""
WORKER_DIED = ("kill", "stop long", "term")
CUT_OFF = (
    "database silent",
    "database half open",
    "database cut",
    "database cut for all",
    "database slow",
)
API_WAY = ("api cut", "api slow", "api silent")
STOPPED = ("stop short", "stop long", STOOD_STILL)
OUTAGES = (
    "postgres kill short",
    "postgres kill long",
    "postgres restart",
    "postgres frozen",
    "full house",
    "full disk",
    "api down slots full",
    STOOD_STILL,
    *CUT_OFF,
)
BELLS = ("bells", "ledgers", "lone ring")
PAGES_ASKED = {f"GET {page.partition('?')[0]}" for page in PAGES}
RAN = ("ok", "huge", "dribbled", "accepted", "failed", "unknown", "broken off", "garbage", "reset")
"""Answers after which a run counts for the session limit."""


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
    drawn: Drawn
    spins: Sequence[str] = ()
    """Workers that turned without a rest, in words."""
    differs: Sequence[str] = ()
    """In what the actions on record differ from what was asked and answered, in words."""
    answers: Sequence[Answer] = ()
    """The console's."""

    def __post_init__(self) -> None:
        self.by_key: dict[str, list[Call]] = defaultdict(list)
        self.by_recall: dict[str, list[Call]] = defaultdict(list)
        for call in self.api.calls:
            self.by_key[call.key].append(call)
            self.by_recall[call.recall].append(call)
        self.marks_of: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for mark in self.marks:
            self.marks_of[mark["recall_id"]].append(mark)
        self.by_session: dict[str, list[Call]] = defaultdict(list)
        for call in self.api.calls:
            self.by_session[call.session].append(call)
        seen = Counter(promise.session for promise in self.journal.promises.values())
        self.chains = {session for session, times in seen.items() if times > 1}
        """Sessions with several recalls, which wait for each other."""
        self.full = {queue: _full(self, queue) for queue in self.drawn.names}

    def struck(self, slot: str, start: float, end: float, kinds: Sequence[str]) -> bool:
        return any(f.kind in kinds and f.strikes(slot, start, end) for f in self.faults)

    def on(self, start: float, end: float, kinds: Collection[str]) -> bool:
        """Whether such a fault was on at any time between, whomever it struck."""
        return any(
            f.kind in kinds and f.began <= end and (f.ended is None or f.ended >= start)
            for f in self.faults
        )

    def in_calm(self, instant: float) -> float | None:
        """The end of the calm phase that this instant lies in."""
        return next((end for start, end in self.calm if start <= instant < end), None)

    def seconds_full(self, queue: str, start: float, end: float) -> float:
        """For how long of this time no worker of the queue had a slot free, or it was paused."""
        return sum(
            max(0.0, min(end, until) - max(start, since)) for since, until in self.full[queue]
        )

    def queue_of(self, call: Call) -> str | None:
        """None of a recall that nobody knows."""
        promise = self.journal.promises.get(call.recall)
        return None if promise is None else promise.queue

    def is_capped(self, session: str) -> bool:
        """Whether a session may have had all the runs that it may have."""
        limit = self.drawn.session_limit
        return limit is not None and len(self.by_session[session]) >= limit

    def held_back(self, promise: Promise, instant: float) -> bool:
        """Whether it was paused at that time, or may have been."""
        acts = [
            a for a in promise.acts if a.what in ("pause", "resume", "retry") and a.asked < instant
        ]
        return bool(acts) and (acts[-1].what == "pause" or acts[-1].done is None)

    def stood_or_slow(self, call: Call, since: float) -> bool:
        """A process that was stopped between its claim and its call goes on where it stood; a slow
        way holds the request itself back."""
        return self.struck(call.worker, since, call.at, STOPPED) or self.on(since, call.at, API_WAY)

    def succeeded(self, call: Call) -> bool:
        """Whether this call told its worker that the run ended well."""
        run = self.api.runs.get(call.key)
        return call.how in ("ok", "huge", "dribbled") or (
            call.how == "accepted" and run is not None and run.result == "ok"
        )


def settle_up(records: Records) -> Account:
    """All rules, one after the other."""
    account = Account()
    account.take("contract", iter(records.journal.strange))
    account.take("spins", iter(records.spins))
    account.take("recorded", iter(records.differs))
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
        one_body,
        edits,
        paused,
        intervals,
        counts,
        hung_up,
        links,
        queues_paused,
        pages,
        moved,
        fleet_cap,
        session_limit,
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
        "operations": _operations(records),
        "pages and clicks": len(records.answers),
        "lost": sum(said.startswith(("endings: lost", "numbers")) for said in account.findings),
        "doubled": sum(
            said.startswith(("replays", "second keys", "at once", "settled twice"))
            for said in account.findings
        ),
        "lag in calm phases, ms (p50, p99, most)": [
            round(lags[min(len(lags) - 1, int(len(lags) * q))] * 1000, 1) for q in (0.5, 0.99, 1)
        ]
        if lags
        else [],
        "answers": dict(
            Counter(
                c.how if not c.hung_up else "hung up on" for c in records.api.calls
            ).most_common()
        ),
        "the application did": dict(records.journal.did.most_common()),
    }
    return account


def _operations(records: Records) -> dict[str, str]:
    """How many were asked for, by which way, and what was answered."""
    found: dict[str, list[int]] = {}
    for op in records.journal.operations:
        counted = found.setdefault(op.via, [0, 0, 0])
        counted[2 if op.done is None else 1 if op.refused or op.changed == set() else 0] += 1
    return {
        via: f"{done} done, {refused} not, {unknown} without an answer"
        for via, (done, refused, unknown) in sorted(found.items())
    }


def unknown_calls(records: Records) -> Iterator[str]:
    """Each request is for a recall that somebody scheduled."""
    for recall, calls in records.by_recall.items():
        if recall not in records.journal.promises:
            yield f"{calls[0].key} was called, which nobody scheduled"


def replays(records: Records) -> Iterator[str]:
    """A second request under a key comes only where the first ending was not known to its worker,
    or said to come again."""
    for key, calls in records.by_key.items():
        for first, second in pairwise(calls):
            run = records.api.runs.get(key)
            told = first.how in (*DEFINITE, "accepted") or (
                first.how == "failed" and run is not None
            )
            if not told or first.hung_up or first.ended is None:
                continue
            # Its worker died, or was stopped for longer than its lease, before it could settle.
            if records.struck(first.worker, first.at, second.at, ("kill", "stop long")):
                continue
            # Or the machine itself stood still, for about as long as a lease.
            if any(
                f.kind == STOOD_STILL and f.seconds > records.drawn.lease / 3
                for f in records.faults
                if f.strikes(first.worker, first.at, second.at)
            ):
                continue
            # The second had claimed first, was stopped before it called, and went on where it
            # stood.
            if second.attempt < first.attempt and records.struck(
                second.worker, first.at, second.at, STOPPED
            ):
                continue
            # It was told to stop while PostgreSQL would not take its last settles.
            if records.struck(first.worker, first.at, second.at, ("term",)) and records.on(
                first.at, second.at, OUTAGES
            ):
                continue
            # It was cut off from the database, alone, for about as long as a lease: the others
            # can't know that it lives.
            cuts = [
                f
                for f in records.faults
                if f.kind in CUT_OFF and f.strikes(first.worker, first.at, second.at)
            ]
            if (
                any(f.seconds > records.drawn.lease / 2 for f in cuts)
                and second.worker != first.worker
            ):
                continue
            # Accepted, but in an outage the reference could not be put on record before the lease
            # ran out: through a proxy the worker can't tell a PostgreSQL that is gone for all from
            # one that is gone for it, and breaks off.
            if first.how == "accepted" and records.on(first.at, second.at, OUTAGES):
                continue
            # Accepted, and its polls met a way that cut, slowed or swallowed them until its time
            # was up.
            if first.how == "accepted" and records.on(first.at, second.at, API_WAY):
                continue
            # The answer may not have arrived. A connection that was forgotten while it was open
            # stays so when the way is healed.
            if records.on(first.ended - 1, first.ended + 1, API_WAY) or records.on(
                first.at, first.ended, ("api silent",)
            ):
                continue
            yield (
                f"{key}: answered {first.how} to {first.worker}, and asked again by "
                f"{second.worker} {second.at - first.ended:.1f} s later"
            )


def _key(mark: Mapping[str, Any]) -> str:
    """The key of the calls that a mark stands for. A rekey below zero is an extra run's number."""
    rekey = mark["rekey"]
    behind = f".f{-rekey}" if rekey < 0 else f".{rekey}" if rekey else ""
    return f"{mark['recall_id']}:{mark['occurrence']}{behind}"


def second_keys(records: Records) -> Iterator[str]:
    """A new key for the same occurrence comes only after a run that the API said had failed, an
    edit of the message, or a retry by hand; and after such a retry the old one does not come
    again."""
    for recall, calls in records.by_recall.items():
        promise = records.journal.promises.get(recall)
        retries = promise.did("retry") if promise else 0
        edits = promise.did("edit") if promise else 0
        # One whose time a person names anew keeps its number, if it was called and did not run.
        moves = promise.did("move") if promise else 0
        last: dict[int, Call] = {}
        seen: set[str] = set()
        for call in calls:
            if call.is_extra:
                continue
            occurrence, rekey = call.number
            before = last.get(occurrence)
            if call.key not in seen and (rekey if before is None else True):
                run = records.api.runs.get(before.key) if before else None
                edited = edits > 0 and (before is None or before.message != call.message)
                if not (run is not None and run.result == "failed") and not edited:
                    # An edit that was taken back, or two between two calls, are not seen in the
                    # messages.
                    if retries + max(0, edits - 1) > 0:
                        retries, edits = (retries - 1, edits) if retries else (retries, edits - 1)
                    elif moves > 0:
                        moves -= 1
                    else:
                        yield (
                            f"{call.key} was called, though no run under the key before it had "
                            f"failed"
                        )
            seen.add(call.key)
            last[occurrence] = call
        for act in promise.acts if promise else ():
            if act.what == "retry" and act.done is not None:
                old = {c.key for c in calls if c.at < act.asked}
                for call in calls:
                    late = call.at > act.done + CANCEL_TAKES
                    if late and call.key in old and not records.stood_or_slow(call, act.done):
                        yield f"{call.key} was called again, after a retry that gives it a new key"


def endings(records: Records) -> Iterator[str]:
    """Every recall has come to an end that its calls, or its application, explain."""
    deleted = {
        p.session
        for p in records.journal.promises.values()
        if p.ended == "deleted" or p.maybe_ended
    }
    for promise in records.journal.promises.values():
        row, calls = records.rows.get(promise.id), records.by_recall[promise.id]
        if row is None:
            if promise.session not in deleted and (promise.certain or calls):
                yield f"lost: {promise.id} ({promise.kind}) is gone, and nobody deleted it"
            continue
        status = row["status"]
        if promise.ended == "cancelled" and status != "cancelled":
            yield (f"overwritten: {promise.id} ({promise.kind}) was cancelled, and is {status}")
        elif status in ("pending", "running"):
            yield f"lost: {promise.id} ({promise.kind}) is {status} still: {row['reason']}"
        elif (
            status == "fired"
            and not any(records.succeeded(c) for c in calls)
            and not (row["last_outcome"] == "expired" and (promise.moves or promise.did("rule")))
        ):
            # Skips and moves may take the last of its numbers; which were never called, `numbers`
            # counts.
            yield (
                f"lost: {promise.id} ({promise.kind}) is fired, though no call of it was "
                f"answered so"
            )
        elif status == "cancelled" and not (
            promise.may_be_over or any(c.how == "gone" for c in calls)
        ):
            yield f"lost: {promise.id} ({promise.kind}) is cancelled, and nobody did that"
        elif status == "failed":
            yield from _failed(promise, row, records)


def _failed(promise: Promise, row: Mapping[str, Any], records: Records) -> Iterator[str]:
    if not row["reason"]:
        yield f"{promise.id} failed without a reason"
    if any(c.how == "refused" for c in records.by_recall[promise.id]):
        return
    if (promise.moves or promise.did("rule")) and any(
        said in row["reason"] for said in ("it had all", "it had its one", "where it ends")
    ):
        # Skips and moves took the last of its numbers. It ends as its last call did.
        # (By its marks: a request may be lost on its way to the API.)
        marks = sorted(records.marks_of[promise.id], key=lambda mark: mark["ended_at"])
        if marks and marks[-1]["outcome"] == "answered":
            yield f"{promise.id} failed at its end, though its last call was answered"
        return
    marks = records.marks_of[promise.id]
    spent = max(
        (
            sum(
                m["calls"]
                for m in marks
                if m["occurrence"] == o
                and m["rekey"] >= 0
                and m["outcome"] in ("unknown", "failed")
            )
            for o in {m["occurrence"] for m in marks}
        ),
        default=0,
    )
    if spent < MAX_ATTEMPTS:
        yield f"lost: {promise.id} failed after {spent} attempts: {row['reason']}"


def numbers(records: Records) -> Iterator[str]:
    """Every number of an occurrence was called, or is one that the application's skips and moves
    took."""
    for promise in records.journal.promises.values():
        row = records.rows.get(promise.id)
        if row is None:
            continue
        called = {c.number[0] for c in records.by_recall[promise.id] if not c.is_extra}
        # A skip may lead to a number beyond the recall's end, which then ends it uncalled.
        was_called = row["status"] in ("fired", "failed") and row["last_outcome"] != "expired"
        last = row["occurrence"] if was_called else row["occurrence"] - 1
        missing = [
            n
            for n in range(1, last + 1)
            if n not in called and _lost_on_the_way(records, promise.id, n) < MAX_ATTEMPTS
        ]
        if len(missing) > promise.moves:
            yield (
                f"{promise.id} ({promise.kind}): {missing} were never called, and "
                f"{promise.moves} were moved or skipped"
            )
        if called and max(called) > row["occurrence"]:
            yield (
                f"{promise.id}: {max(called)} was called, and the row stands at {row['occurrence']}"
            )
        if promise.kind != "recurring" and called and max(called) > 1 + promise.moves:
            yield (
                f"{promise.id}: a {promise.kind} was called {max(called)} times, and moved "
                f"{promise.moves} times"
            )


def _lost_on_the_way(records: Records, id: str, occurrence: int) -> int:
    """Requests for an occurrence that were sent, and whose connection broke off (an attempt each)
    while the way to the API was bad: it may have read none of them."""
    return sum(
        mark["calls"]
        for mark in records.marks_of[id]
        if mark["occurrence"] == occurrence
        and mark["outcome"] == "unknown"
        and mark["called_at"] is not None
        and records.on(mark["called_at"].timestamp(), mark["ended_at"].timestamp(), API_WAY)
    )


def settled_twice(records: Records) -> Iterator[str]:
    """One settle ends an occurrence. Whoever lost the lease leaves a mark that says so; and nothing
    is settled that was not answered."""
    ended: Counter[tuple[str, int]] = Counter()
    for mark in records.marks:
        if (
            mark["outcome"] in ("answered", "refused", "gone")
            and mark["settled"]
            not in (
                "lost",
                "taken",
                "ended",
                "deleted",
                "cancelled",
            )
            and mark["rekey"] >= 0
        ):
            ended[mark["recall_id"], mark["occurrence"]] += 1
        if mark["outcome"] == "answered":
            key = _key(mark)
            if not any(records.succeeded(c) for c in records.by_key.get(key, [])):
                yield f"{key} is on record as answered, which no call of it was"
    for (recall, occurrence), times in ended.items():
        promise = records.journal.promises.get(recall)
        # What was refused, or gone, and then retried by hand, ends once more.
        if times > 1 + (promise.did("retry") if promise else 0):
            yield f"{recall}:{occurrence} was settled {times} times"


def too_early(records: Records) -> Iterator[str]:
    """Nothing is called before its time, whatever the host's clock says."""
    for call in records.api.calls:
        promise = records.journal.promises.get(call.recall)
        if promise is not None and promise.did("fire", "retry") and promise.cadence != "interval":
            continue  # Its nominal time stands, as what follows is counted from it.
        early = datetime.fromisoformat(call.scheduled_for).timestamp() - call.at
        if early > SLACK:
            yield f"{call.key} was called {early:.2f} s before its time"


def at_once(records: Records) -> Iterator[str]:
    """No two requests of a session are open at once."""
    for session, calls in records.by_session.items():
        for n, second in enumerate(calls):
            for first in calls[:n]:
                if first.ended is not None and first.ended <= second.at + SLACK:
                    continue
                # A stopped process holds its connections open and can't know; its successor asks
                # under the same key.
                if (
                    records.struck(first.worker, first.at, second.at, STOPPED)
                    and first.key == second.key
                ):
                    continue
                # What a slow or silent way to the API does to a connection, the API learns late.
                if records.on(first.at, second.at + 1, API_WAY):
                    continue
                over = (first.ended or second.at) - second.at
                yield (
                    f"{session}: {first.key} at {first.worker} was open for {over:.2f} s when "
                    f"{second.key} came from {second.worker}"
                )


def after_the_end(records: Records) -> Iterator[str]:
    """A recall that its application ended is not called again, unless it was retried."""
    for promise in records.journal.promises.values():
        for end in promise.ends:
            for call in records.by_recall[promise.id]:
                late = call.at - end.done
                if (
                    late > CANCEL_TAKES
                    and call.at < end.revived
                    and not records.stood_or_slow(call, end.done)
                ):
                    yield (
                        f"{call.key} was called {late:.1f} s after it was "
                        f"{promise.ended or 'ended'}"
                    )


def leases(records: Records) -> Iterator[str]:
    """No lease is left at the end."""
    for id, row in records.rows.items():
        if row["lease"] is not None and row["status"] in ("pending", "running"):
            yield f"{id} is leased by {row['leased_by']} until {row['lease_until']}"


def lateness(records: Records) -> Iterator[str]:
    """In calm phases nothing is late; and after any fault nothing stays unclaimed: what is due is
    called when that is over."""
    for lag, _, key in _lagging(records):
        if lag > LAG_MOST:
            yield f"{key} was called {lag:.1f} s after it was due, in a calm phase"


def heard(records: Records) -> Iterator[str]:
    """Whoever listens again looks: what was inserted while nobody heard does not wait for the
    regular look."""
    for fault in records.faults:
        if fault.lone is not None and fault.alone and fault.lone.certain:
            calls = records.by_recall[fault.lone.id]
            if not calls or calls[0].at - fault.lone.due > HEARD_WITHIN:
                yield (
                    f"{fault.lone.id} was inserted while no bell heard, and was not called "
                    f"within {HEARD_WITHIN:g} s"
                )


def one_body(records: Records) -> Iterator[str]:
    """The body is the same, byte for byte, under one key."""
    for key, calls in records.by_key.items():
        if len({call.body for call in calls}) > 1:
            yield f"{key}: {len({call.body for call in calls})} bodies under one key"


def edits(records: Records) -> Iterator[str]:
    """What is claimed after an edit carries the message as it was edited."""
    for promise in records.journal.promises.values():
        # What an operator edits is on record without whether it was in a run.
        acts = [act for act in promise.acts if act.what == "edit"]
        for act, after in zip_longest(acts, acts[1:]):
            if act.done is None or act.leased or act.message is None:
                continue
            for call in records.by_recall[promise.id]:
                was = act.done + CANCEL_TAKES < call.at < (NEVER if after is None else after.asked)
                if (
                    was
                    and call.message != act.message
                    and not records.stood_or_slow(call, act.done)
                ):
                    yield (
                        f"{call.key} said {call.message!r} {call.at - act.done:.1f} s after an "
                        f"edit to {act.message!r}"
                    )


def paused(records: Records) -> Iterator[str]:
    """Between a pause and what ends it nothing is called. (A run that is open ends as it ends.)"""
    for promise in records.journal.promises.values():
        for n, act in enumerate(promise.acts):
            if act.what != "pause" or act.done is None:
                continue
            until = min(
                (a.asked for a in promise.acts[n + 1 :] if a.what in ("resume", "retry")),
                default=records.journal.resumed,
            )
            for call in records.by_recall[promise.id]:
                late = call.at - act.done
                if (
                    late > CANCEL_TAKES
                    and call.at < until
                    and not records.stood_or_slow(call, act.done)
                ):
                    yield f"{call.key} was called {late:.1f} s after it was paused"


def intervals(records: Records) -> Iterator[str]:
    """The next occurrence on an interval falls that long after the run before has ended: not
    earlier, and where nothing was wrong not later."""
    kinds = {fault.kind for fault in records.faults}
    for promise in records.journal.promises.values():
        if promise.kind != "recurring" or promise.cadence != "interval" or promise.interval is None:
            continue
        if any(act.what not in ("pause", "resume", "edit") for act in promise.acts):
            continue  # Moved, skipped, fired or retried: `moved` looks at those.
        first: dict[int, Call] = {}
        last: dict[int, Call] = {}
        for call in records.by_recall[promise.id]:
            first.setdefault(call.number[0], call)
            last[call.number[0]] = call
        for number, before in last.items():
            after, ended = first.get(number + 1), before.ended
            if before.how == "accepted":
                run = records.api.runs.get(before.key)
                # An answer under a key whose run had ended before: known to have ended by then.
                known = None if run is None else run.ended
                ended = None if known is None else max(known, ended or known)
            if after is None or ended is None or after.at < before.at:
                continue
            # The API learns late of what such a way did to the connection; a process that stood
            # still read the answer late, and its last attempt may have been counted as unknown
            # before that.
            if records.on(before.at, ended + 1, API_WAY) or records.struck(
                before.worker, before.at, after.at, STOPPED
            ):
                continue
            gap = after.at - ended
            if gap < promise.interval - GAP_SLACK:
                yield (
                    f"{after.key} was called {gap:.2f} s after {before.key} had ended, at an "
                    f"interval of {promise.interval} s"
                )
            # A worker that died, or was cut off, did not see the end.
            if before.hung_up or records.on(before.at, ended + 2, kinds):
                continue
            planned = datetime.fromisoformat(after.scheduled_for).timestamp() - ended
            most = promise.interval + GAP_MOST + (POLLED_MOST if before.how == "accepted" else 0)
            if planned > most:
                yield (
                    f"{after.key} was planned {planned:.2f} s after {before.key} had ended, at "
                    f"an interval of {promise.interval} s"
                )


def counts(records: Records) -> Iterator[str]:
    """The marks of an attempt count as many calls as the API had requests of it."""
    asked: Counter[tuple[str, int]] = Counter()
    by_attempt: dict[tuple[str, int], list[Call]] = defaultdict(list)
    for call in records.api.calls:
        asked[call.key, call.attempt] += 1
        by_attempt[call.key, call.attempt].append(call)
    marks: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for mark in records.marks:
        if mark["outcome"] != "misfired":
            key = _key(mark)
            marks[key, mark["attempt"]].append(mark)
    for key, attempt in {*asked, *marks}:
        promise = records.journal.promises.get(key.rpartition(":")[0])
        calls, found = by_attempt[key, attempt], marks[key, attempt]
        most = sum(mark["calls"] for mark in found)
        # What another worker put down for one that was not heard of again may never have been sent;
        # or it was, and that one puts its own mark beside it. And a run that the API accepted is
        # polled by two workers where the lease of the first ended: each leaves how it saw it end.
        polled = any(call.how == "accepted" for call in calls)
        others = ("taken", "ended", "lost") if polled else ("taken", "ended")
        least = sum(mark["calls"] for mark in found if mark["settled"] not in others)
        if len(calls) > most:
            # Ended in mid-run, and its worker died: it is put down a minute later, and never where
            # the row is gone or was retried.
            # (A session that is deleted takes its other recalls along; `endings` holds that.)
            gone = key.rpartition(":")[0] not in records.rows
            over = gone or promise is None or promise.may_be_over
            if not over and promise is not None:
                over = promise.did("retry") > 0
            if over and any(
                records.struck(c.worker, c.at, c.ended or NEVER, (*WORKER_DIED, *OUTAGES))
                for c in calls
            ):
                continue
            yield f"{key}, attempt {attempt}: {len(calls)} requests, and its marks count {most}"
        elif len(calls) < least:
            # Lost on the way to the API, or no connection was made.
            begun = min(m["called_at"] or m["ended_at"] for m in found).timestamp()
            ended = max(m["ended_at"] for m in found).timestamp()
            if not records.on(begun - RUN_TIMEOUT, ended, API_WAY):
                yield (
                    f"{key}, attempt {attempt}: {len(calls)} requests, and its marks count "
                    f"{least} at least"
                )


def hung_up(records: Records) -> Iterator[str]:
    """A run whose recall its application ends is broken off at once: the API sees its connection
    close, or is asked to end the run that it accepted."""
    lags = sorted(_lags(records))
    # Not the median: the machine is slow for moments, and it takes one.
    slow = min(SLOW_MOST, lags[len(lags) * 99 // 100]) if lags else SLOW_MOST
    within = HUNG_UP_WITHIN + LOOKS_SPARED * slow
    for promise in records.journal.promises.values():
        for end in promise.ends:
            ended, revived = end.done, end.revived
            until = ended + within
            # The ring may be lost with its connection, and the renewal that would find out is a
            # third of a lease away; a worker that stands still, or is cut off, does not know.
            troubled = (ended - records.drawn.lease / 3 - TROUBLED, until)
            if records.on(*troubled, (*OUTAGES, *BELLS, *STOPPED, *API_WAY, "kill", "term")):
                continue
            for call in records.by_recall[promise.id]:
                run = records.api.runs.get(call.key)
                if call.how == "accepted":
                    asked = records.api.deleted.get(call.key, NEVER)
                    # Its reference is on record before it can be asked to end.
                    if (
                        call.ended is None
                        or call.ended > ended - 1
                        or run is None
                        or asked <= until
                    ):
                        continue
                    if (run.ended or NEVER) > until and revived > until:
                        yield (
                            f"{call.key} was accepted, and not asked to end within {within:.1f} "
                            f"s of its recall's"
                        )
                elif call.at < ended and (call.ended or NEVER) > until:
                    over = (
                        f"{call.ended - ended:.1f} s later"
                        if call.ended is not None
                        else "to the end"
                    )
                    yield (
                        f"{call.key} was {promise.ended or 'ended'} in mid-run, and its call was "
                        f"open {over}"
                    )


def links(records: Records) -> Iterator[str]:
    """An agent can schedule the next link from inside its run."""
    for session in records.journal.refused_inside:
        # One that was moved in mid-run, or retried, or whose message was edited after a call whose
        # end nobody knows (that is another key), runs again beside its own next link; where one was
        # ended the session may be gone.
        promises = [p for p in records.journal.promises.values() if p.session == session]
        plain = not any(
            p.may_be_over or p.moves or p.did("retry", "fire", "edit", "rule") for p in promises
        )
        if plain and session not in records.journal.crowded:
            yield f"{session}: the next link was refused in mid-run"


def queues_paused(records: Records) -> Iterator[str]:
    """Nothing is called of a queue that is paused. (A run that is open ends as it ends.)"""
    for pause in records.journal.pauses:
        for call in records.api.calls:
            late = call.at - pause.held
            if (
                late > CANCEL_TAKES
                and call.at < pause.freed
                and pause.queue in ("*", records.queue_of(call))
                and not records.stood_or_slow(call, pause.held)
            ):
                yield f"{call.key} was called {late:.1f} s after queue {pause.queue} was paused"


def pages(records: Records) -> Iterator[str]:
    """The console never fails by a defect of its own, and answers in calm phases."""
    for answer in records.answers:
        said = f"{answer.what} was answered {answer.status or 'not at all'}"
        calm = records.in_calm(answer.asked)
        killed = records.on(answer.asked - CONSOLE_STARTS, answer.done, ("console kill",))
        # An action is sent once, and on a connection that was used seconds ago without trying it:
        # PostgreSQL may have broken that one.
        killed |= records.on(answer.asked - CONNECTION_TRUSTED, answer.done, OUTAGES)
        refused = 400 <= answer.status < 500 and answer.what in PAGES_ASKED
        if answer.status in (400, 405, 500) or refused:
            yield said
        elif calm is None or answer.done > calm or killed:
            continue
        elif answer.status in (0, 503) or answer.done - answer.asked > PAGE_MOST:
            yield f"{said} after {answer.done - answer.asked:.1f} s, in a calm phase"


def moved(records: Records) -> Iterator[str]:
    """What was moved, skipped, fired, retried or resumed is called when it is due then: not before,
    and in calm phases not later."""
    for promise in records.journal.promises.values():
        if promise.cadence == "cron":
            continue  # What a skip adds is another distance than cron's: a worker finds the moment.
        for n, act in enumerate(promise.acts):
            # What was done to it afterwards changes that again.
            bounds = [a.asked for a in promise.acts[n + 1 :]] + [
                end.asked for end in promise.ends if end.done > act.asked
            ]
            until = min(bounds, default=NEVER)
            if act.what in ("pause", "edit", "rule") or act.done is None or act.due is None:
                continue
            if act.leased:
                yield from _moved_in_run(promise, act, until, records)
            else:
                yield from _moved_waiting(promise, act, until, records)


def _moved_waiting(promise: Promise, act: Act, until: float, records: Records) -> Iterator[str]:
    assert act.done is not None and act.due is not None
    calls = [c for c in records.by_recall[promise.id] if act.what == "fire" or not c.is_extra]
    for call in calls:
        if act.done + CANCEL_TAKES < call.at < min(
            act.due - SLACK, until
        ) and not records.stood_or_slow(call, act.done):
            yield (
                f"{call.key} was called {act.due - call.at:.1f} s before the time that a "
                f"{act.what} gave it"
            )
    if records.held_back(promise, act.done):
        return
    after = next((call for call in calls if call.at >= act.asked), None)
    yield from _late(promise, act, max(act.due, act.done), after, until, records)


def _moved_in_run(promise: Promise, act: Act, until: float, records: Records) -> Iterator[str]:
    """In mid-run a new time speaks of what comes after the run."""
    assert act.done is not None and act.due is not None
    calls = records.by_recall[promise.id]
    flight = next((call for call in reversed(calls) if call.at <= act.done), None)
    if act.what != "move" or flight is None or flight.ended is None or flight.hung_up:
        return
    if flight.how in ("accepted", "gone") or records.held_back(promise, act.done):
        return
    after = next((call for call in calls if call.at > flight.ended), None)
    yield from _late(promise, act, max(act.due, act.done, flight.ended), after, until, records)


def _late(
    promise: Promise, act: Act, when: float, call: Call | None, until: float, records: Records
) -> Iterator[str]:
    calm = records.in_calm(when)
    if calm is None or promise.session in records.chains or records.is_capped(promise.session):
        return
    if call is None and promise.kind == "recurring":
        return  # The move took the last of its numbers.
    # It was in the hands of a worker that died, stood still or was cut off, or the application
    # itself had it locked.
    away = (*WORKER_DIED, *OUTAGES, *STOPPED, "locks")
    if records.on(act.asked - records.drawn.taken_up_within, when, away):
        return
    if records.on(when - RUN_TIMEOUT - 1, when, ("api silent",)):
        return
    called = min(call.at if call is not None else NEVER, calm, until)
    late = called - when - records.seconds_full(promise.queue, when, called)
    if late > LAG_MOST:
        said = "was not called" if call is None or call.at > called else f"was called as {call.key}"
        yield f"{promise.id}: {said} {late:.1f} s after it was due by a {act.what}, in a calm phase"


def fleet_cap(records: Records) -> Iterator[str]:
    """Never more runs at once than the fleet's cap."""
    cap = records.drawn.fleet
    if cap is None:
        return
    ended = {p.id for p in records.journal.promises.values() if p.may_be_over}
    # One that was ended is no longer counted from then on, and is hung up on a moment later.
    calls = [call for call in records.api.calls if call.recall not in ended]
    all_open: list[Call] = []
    for call in calls:
        all_open = [c for c in all_open if c.ended is None or c.ended > call.at + SLACK] + [call]
        # Each worker counts what runs in the queues that it serves. Which of two was claimed first
        # is not known here: what all who claim from the call's own queue count, is that queue.
        open_ = [c for c in all_open if records.queue_of(c) == records.queue_of(call)]
        if len(open_) <= cap:
            continue
        # Whoever stood still, or was cut off, keeps connections open whose leases have ended.
        since = min(c.at for c in open_)
        if records.on(since, call.at, (*STOPPED, *OUTAGES, *API_WAY, "kill", "term", "locks")):
            continue
        yield f"{len(open_)} runs at once when {call.key} was called, and the cap is {cap}"


def session_limit(records: Records) -> Iterator[str]:
    """No session has more runs than it may have; this takes less than an hour."""
    limit = records.drawn.session_limit
    if limit is None:
        return
    for session, calls in records.by_session.items():
        # What was under way when its worker died, or stood still, is put down later where its
        # recall was ended meanwhile, or never where the row is gone.
        runs = [
            c for c in calls if c.how in RAN and not c.hung_up and not _put_down_late(c, records)
        ]
        if len(runs) > limit:
            yield f"{session} had {len(runs)} runs, and may have {limit} in an hour"


def _put_down_late(call: Call, records: Records) -> bool:
    promise = records.journal.promises.get(call.recall)
    ended = promise is None or promise.may_be_over
    away = (*WORKER_DIED, *STOPPED, *OUTAGES)
    return bool(ended) and records.struck(call.worker, call.at, call.ended or NEVER, away)


def _full(records: Records, queue: str) -> list[tuple[float, float]]:
    """When no worker of a queue had a slot free, as far as the API can tell, or the queue was
    paused, in order.

    A worker that is away takes no more, nor one that met trouble in two sessions in a row: its
    breaker is open until it meets an answer.
    """
    drawn = records.drawn
    served = {f"w{n}": drawn.serves(n) for n in range(drawn.replicas)}
    workers = {slot for slot, queues in served.items() if queue in queues}
    changes: list[tuple[float, str, int, int]] = []
    """Instant, slot, by how many slots more or less of it are in use, and how many leases that it
    counts."""

    def take(slot: str, start: float, end: float, slots: int, leases: int = 0) -> None:
        if slot in workers:
            changes.extend(((start, slot, slots, leases), (end, slot, -slots, -leases)))

    for call in records.api.calls:
        run, ended = records.api.runs.get(call.key), call.ended or NEVER
        if call.how == "accepted":
            ended = (run.ended or NEVER if run is not None else ended) + POLLED_MOST
        take(call.worker, call.at - 0.05, ended + 0.15, 1)
        if records.struck(call.worker, call.at, ended + 1, (*WORKER_DIED, *OUTAGES)):
            # Its lease counts until it is taken up.
            ended += drawn.taken_up_within
        for slot in workers:
            if records.queue_of(call) in served[slot]:
                take(slot, call.at - 0.05, ended + 0.15, 0, 1)
    for fault in records.faults:
        if fault.kind in (*WORKER_DIED, *STOPPED, *OUTAGES, *BELLS):
            for slot in fault.slots or workers:
                take(slot, fault.began, (fault.ended or NEVER) + TROUBLED, drawn.slots)
    for slot in workers:
        for start, end in _breaker_open([c for c in records.api.calls if c.worker == slot]):
            take(slot, start, end, drawn.slots)
    for pause in records.journal.pauses:
        if pause.queue in (queue, "*"):
            for slot in workers:
                take(slot, pause.asked, pause.over + 0.15, drawn.slots)
    used: Counter[str] = Counter(dict.fromkeys(workers, 0))
    held: Counter[str] = Counter(dict.fromkeys(workers, 0))
    found: list[tuple[float, float]] = []
    since: float | None = None
    for instant, slot, more, leases in sorted(changes):
        used[slot] += more
        held[slot] += leases
        full = all(
            used[slot] >= drawn.slots or (drawn.fleet is not None and held[slot] >= drawn.fleet)
            for slot in workers
        )
        if full and since is None:
            since = instant
        elif not full and since is not None:
            found.append((since, instant))
            since = None
    return found if since is None else [*found, (since, NEVER)]


def _breaker_open(calls: Sequence[Call]) -> Iterator[tuple[float, float]]:
    """When one worker had reason to think that the API is in trouble: from the second session in a
    row that met it to the next answer of a call that began since, and some."""
    trouble: str | None = None
    opened: float | None = None
    for call in sorted((c for c in calls if c.ended is not None), key=lambda c: c.ended or 0):
        assert call.ended is not None
        if call.how in ("unavailable", "misconfigured"):
            if opened is None and trouble is not None and trouble != call.session:
                opened = call.ended
            trouble = trouble or call.session
        elif not call.hung_up and call.how not in ("reset", "broken off", "garbage"):
            if opened is not None and call.at >= opened:
                yield opened, call.ended + 1
                opened = None
            if opened is None:
                trouble = None
    if opened is not None:
        yield opened, NEVER


def _lags(records: Records) -> Iterator[float]:
    """Those of `_lagging` that found a slot free."""
    yield from (lag for lag, waited, _ in _lagging(records) if not waited)


def _lagging(records: Records) -> Iterator[tuple[float, float, str]]:
    """Of recalls in sessions of their own that fell due in a calm phase, and that nobody touched:
    how late their first call was, in seconds, besides those in which no slot was free; those; and
    its key."""
    for promise in records.journal.promises.values():
        calls = records.by_recall[promise.id]
        if (
            promise.kind == "recurring"
            or promise.moves
            or promise.acts
            or not calls
            or not promise.certain
            or promise.may_be_over
        ):
            continue
        if calls[0].attempt > 1:
            continue  # Its first request was lost on the way, and is on record as unknown.
        # What an API that fell silent keeps open takes slots until a run's time is up.
        if records.on(promise.due - RUN_TIMEOUT - 1, promise.due, ("api silent",)):
            continue
        for start, end in records.calm:
            # What happens after the calm phase is the next fault's doing.
            if start <= promise.due < end and promise.session not in records.chains:
                called = min(calls[0].at, end)
                waited = records.seconds_full(promise.queue, promise.due, called)
                yield called - promise.due - waited, waited, calls[0].key

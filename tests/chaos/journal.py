"""The journal: what was promised, and what was asked of it since, by whom. One side of the account.

The application's own statements are noted as their answers came. What operators and agents do by
recall-worker's ways (its statements, commands, console, MCP server) is noted as an operation with a
name of its own, which stands on record as its actor. At the end `resolve` reads recall_actions: an
operation was done exactly as far as it is on record, whatever became of its answer, and what an
answer said is compared with the record.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

NEVER = float("inf")
SLACK = 0.05
"""Seconds by which two instants of one host may seem to be in the wrong order."""
BATCH = 100
"""Recalls of one batch of what acts on many, at most."""
LATEST = 60.0
"""Seconds after the beginning of its transaction by which an action is done for certain, where no
answer came: every statement has a deadline, but PostgreSQL may have stood still."""

Row = dict[str, Any]


@dataclass(slots=True, eq=False)
class Act:
    """What was done to one recall, and found it live (or over, for `retry`)."""

    what: str
    """move, skip, fire, retry, pause, resume, edit (of the message) or rule (another edit)."""
    asked: float
    done: float | None
    """When it was certain; None where nobody knows whether it was done."""
    due: float | None = None
    """When the row was due by then."""
    leased: bool = False
    """Whether it was in a run."""
    message: str | None = None


@dataclass(slots=True, eq=False)
class End:
    """The recall was cancelled, or deleted with its session. Instants are seconds of the epoch."""

    asked: float
    done: float
    """From when on it was certainly ended."""
    revived: float = NEVER
    """When it was retried afterwards; `asked` where nobody knows which of the two was first."""


@dataclass(slots=True, eq=False)
class Promise:
    """One recall as its application, or its agent, knows it. Instants are seconds of the epoch."""

    id: str
    session: str
    kind: str
    due: float
    interval: int | None = None
    times: int | None = None
    cadence: str = "interval"
    queue: str = "default"
    certain: bool = True
    """Whether the insert's answer came."""
    stock: bool = False
    """Whether it is one of many that only wait, for operators to act on."""
    moves: int = 0
    """Skips and reschedules that were done, or may have been."""
    ended: str | None = None
    """cancelled or deleted: by the application, an operator or its agent."""
    maybe_ended: bool = False
    """Whether the application may have ended it."""
    ends: list[End] = field(default_factory=list)
    acts: list[Act] = field(default_factory=list)

    @property
    def may_be_over(self) -> bool:
        """Whether anybody ended it, or may have."""
        return bool(self.ends) or self.maybe_ended

    def did(self, *what: str) -> int:
        """How often any of this was done to it, or may have been."""
        return sum(act.what in what for act in self.acts)


@dataclass(slots=True, eq=False)
class Operation:
    """What was asked of recall-worker: to act on one recall, on many, or on a queue."""

    name: str
    """Who asks, for the record; no two have the same name, but for those of agents."""
    via: str
    """chaos (by its statements), cli, console or mcp."""
    actions: tuple[str, ...]
    """What it may do, as recall_actions calls it."""
    asked: float
    done: float | None = None
    """When its answer was there; None where none came."""
    refused: bool = False
    """Whether the answer said that nothing was done."""
    changed: set[str] | None = None
    """The recalls that it changed, by its answer; None where the answer does not name them."""
    count: int | None = None
    """How many it changed, by its answer."""
    in_hand: int = 0
    """How many more it may have changed, by its answer: a batch that was broken off."""
    told: dict[str, Row] = field(default_factory=dict)
    """The rows of its answer, by id."""
    session: str | None = None
    """Whose agent asked."""
    shown: set[str] = field(default_factory=set)
    """The recalls that the agent was shown."""
    message: str | None = None
    """What the message was changed to."""

    def counted(self, number: str, *, exactly: bool) -> None:
        """Its answer is there, with how many it changed. A batch more may be done later, too."""
        self.count = int(number.replace(",", ""))
        if exactly:
            self.done = time.time()
        else:
            self.in_hand = BATCH


@dataclass(slots=True)
class Pause:
    """A queue was paused, and resumed: nothing of it may be claimed between `held` and `freed`.
    Instants are seconds of the epoch."""

    queue: str
    asked: float
    held: float
    freed: float = NEVER
    over: float = NEVER
    """When it was certainly resumed."""


@dataclass(slots=True)
class Journal:
    promises: dict[str, Promise] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    refused: int = 0
    """Inserts that met a session with as many pending recalls as it may have: expected, as the
    application's agents do ask twice."""
    strange: list[str] = field(default_factory=list)
    did: Counter[str] = field(default_factory=Counter)
    refused_inside: list[str] = field(default_factory=list)
    """Sessions whose next link was refused in mid-run."""
    crowded: set[str] = field(default_factory=set)
    """Sessions with several recalls of which none is another's next link."""
    agents: set[str] = field(default_factory=set)
    """Sessions whose agents schedule by MCP."""
    edited: dict[str, list[Act]] = field(default_factory=lambda: defaultdict(list))
    """What the application did to recalls of agents, by id."""
    maybe_edited: list[Act] = field(default_factory=list)
    """Edits of which nobody knows whether they were done, and to which recall."""
    swept: set[str] = field(default_factory=set)
    """What was cancelled at the end, as it would go on for ever."""
    resumed: float = NEVER
    """When whatever was still paused was resumed, at the end: what resumed it had met a fault."""
    pauses: list[Pause] = field(default_factory=list)

    def operation(self, via: str, *actions: str, session: str | None = None) -> Operation:
        """One that is asked for now; `answered` says what came of it."""
        name = f"op{len(self.operations)}" if session is None else f"agent of {session}"
        found = Operation(name, via, actions, time.time(), session=session)
        self.operations.append(found)
        self.did[f"{actions[0]} by {via}"] += 1
        return found


def resolve(journal: Journal, actions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write what is on record into the journal's promises and pauses; what differs from what was
    asked and answered, in words. `actions`: recall_actions in the order of their ids."""
    return list(_Resolving(journal).go(actions))


class _Resolving:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.named = {op.name: op for op in journal.operations if op.session is None}
        self.of_agents: dict[str, list[Operation]] = defaultdict(list)
        for op in journal.operations:
            if op.session is not None:
                self.of_agents[op.name].append(op)
        self.written: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        """By the operation's identity."""
        self.paused: dict[str, list[float]] = defaultdict(list)
        """When each recall was paused."""

    def go(self, actions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        touched: set[str] = set()
        for row in actions:
            op = self._asked_by(row)
            what = f"{row['action']} of {row['recall_id']} by {row['actor']} ({row['via']})"
            if op is None:
                yield f"{what} is on record, and nobody asked for it"
                continue
            self.written[id(op)].append(row)
            if row["action"] not in op.actions or row["via"] != op.via:
                yield f"{what} is on record, and asked for was {op.actions[0]} ({op.via})"
            at = row["at"].timestamp()
            if not op.asked - SLACK <= at <= (NEVER if op.done is None else op.done + SLACK):
                yield f"{what} is on record as of {at - op.asked:.2f} s after it was asked for"
            if row["recall_id"] is None:
                self._queue(row, op)
                continue
            yield from self._recall(row, op)
            touched.add(row["recall_id"])
        for op in self.journal.operations:
            yield from self._answer(op)
        for recall, acts in self.journal.edited.items():
            if recall in self.journal.promises:
                self.journal.promises[recall].acts += acts
        for promise in self.journal.promises.values():
            if promise.id in self.journal.swept:
                promise.maybe_ended = True
            _in_order(promise)

    def _asked_by(self, row: Mapping[str, Any]) -> Operation | None:
        """The operation that a row on record is of. Of an agent, whose operations have all the
        same name, the last one that had been asked then and wrote nothing yet."""
        found = self.named.get(row["actor"])
        if found is not None:
            return found
        at = row["at"].timestamp()
        fit = [
            op
            for op in self.of_agents.get(row["actor"], [])
            if op.asked - SLACK <= at <= (NEVER if op.done is None else op.done + SLACK)
            and row["action"] in op.actions
            and not self.written[id(op)]
        ]
        told = [op for op in fit if op.changed is not None and row["recall_id"] in op.changed]
        last = told or fit
        return last[-1] if last else None

    def _queue(self, row: Mapping[str, Any], op: Operation) -> None:
        queue, at = row["detail"]["queue"], row["at"].timestamp()
        done = at + LATEST if op.done is None else op.done
        pauses = [p for p in self.journal.pauses if p.queue == queue and p.freed == NEVER]
        if row["action"] == "pause_queue":
            self.journal.pauses.append(Pause(queue, at, done))
        elif pauses:
            pauses[-1].freed, pauses[-1].over = at, done

    def _recall(self, row: Mapping[str, Any], op: Operation) -> Iterator[str]:
        recall, detail = row["recall_id"], row["detail"]
        at = row["at"].timestamp()
        done = at + LATEST if op.done is None else op.done
        if row["action"] == "schedule":
            self._scheduled(recall, detail, done)
        promise = self.journal.promises.get(recall)
        if promise is None:
            yield f"{row['action']} of {recall} is on record, which nobody scheduled"
            return
        if op.session is not None and promise.session != op.session:
            yield f"an agent of {op.session} did {row['action']} to {recall} of {promise.session}"
        if row["action"] == "cancel":
            promise.ends.append(End(at, done))
            return
        what = {"reschedule": "move"}.get(row["action"], row["action"])
        if what == "schedule":
            return
        if what == "edit" and op.message is None:
            what = "rule"
        if what == "pause":
            self.paused[recall].append(at)
        promise.moves += what in ("move", "skip")
        promise.acts.append(
            Act(
                what,
                at,
                done,
                _due(what, at, detail, op.told.get(recall)),
                bool(detail.get("in_run")),
                op.message,
            )
        )

    def _scheduled(self, recall: str, detail: Mapping[str, Any], done: float) -> None:
        """An agent's recall, as it is on record."""
        has = {name: value["to"] for name, value in detail.items() if isinstance(value, dict)}
        due = datetime.fromisoformat(has["trigger_at"]).timestamp()
        self.journal.promises[recall] = Promise(
            recall,
            detail["session_id"],
            has["call_type"],
            # It was there when its agent knew.
            max(due, done),
            has.get("interval_seconds"),
            has.get("times"),
            has.get("cadence", "interval"),
            has.get("queue", "default"),
            acts=list(self.journal.maybe_edited),
        )

    def _answer(self, op: Operation) -> Iterator[str]:
        """Where an answer came, it is as on record."""
        rows = self.written[id(op)]
        what = f"{op.actions[0]} by {op.name} ({op.via})"
        recalls = [row["recall_id"] for row in rows if row["recall_id"] is not None]
        for recall, times in Counter(recalls).items():
            if times > 1:
                yield f"{what} is on record {times} times for {recall}"
        for shown in op.shown:
            promise = self.journal.promises.get(shown)
            if promise is not None and promise.session != op.session:
                yield f"an agent of {op.session} was shown {shown} of {promise.session}"
        if op.count is not None and not op.count <= len(rows) <= op.count + op.in_hand:
            yield f"{what}: its answer counts {op.count}, and on record are {len(rows)}"
        if op.done is None:
            return
        for recall, told in op.told.items() if op.actions[0] == "pause" else ():
            when = told["paused_at"].timestamp()
            if when > op.asked and not any(abs(at - when) < 0.01 for at in self.paused[recall]):
                yield f"{what} paused {recall}, and that is not on record"
        if op.refused and rows:
            yield f"{what} was refused, and is on record for {recalls}"
        if op.changed is not None and op.changed != set(recalls):
            more, less = set(recalls) - op.changed, op.changed - set(recalls)
            yield (
                f"{what}: its answer names {len(op.changed)} recalls, and on record are "
                f"{len(recalls)}; not on record: {sorted(less)[:5]}, not named: {sorted(more)[:5]}"
            )


def _due(what: str, at: float, detail: Mapping[str, Any], told: Row | None) -> float | None:
    """When the row was due after this: by its answer, else by the record."""
    if what == "fire":
        return at
    if told is not None and told.get("trigger_at") is not None:
        return float(told["trigger_at"].timestamp())
    moved = detail.get("trigger_at")
    return None if moved is None else datetime.fromisoformat(moved["to"]).timestamp()


def _in_order(promise: Promise) -> None:
    """Ends and acts by the time at which they were asked for, and which ends were undone by a
    retry."""
    promise.acts.sort(key=lambda act: act.asked)
    promise.ends.sort(key=lambda end: end.asked)
    retries = [act for act in promise.acts if act.what == "retry"]
    for end in promise.ends:
        if promise.ended == "deleted" and end is promise.ends[-1]:
            continue
        if any(act.asked <= end.done and (act.done or NEVER) >= end.asked for act in retries):
            end.revived = end.asked  # Which of the two was first is not known.
            continue
        end.revived = min((act.asked for act in retries if act.asked > end.done), default=NEVER)
    if promise.ended != "deleted":
        stands = bool(promise.ends) and all(end.revived != end.asked for end in promise.ends)
        stands = stands and promise.ends[-1].revived == NEVER
        promise.ended = "cancelled" if stands else None

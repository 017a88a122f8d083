"""The worker's only SQL: claim, place, renew, look, settle, beat, prune. One round trip each, no transaction across a call.

The database is authoritative for what is due, who holds which lease, and what a recall has become. The process may believe a
lease to be its own until a renewal or a settle says otherwise; it never concludes that from its own clock.

A ledger keeps a few connections (`line`) of its own: one for claims, one for settles, one for renewals, so that none waits behind
another. In an `Outage` callers wait and ask again.

Never here: what an ending means (judge), when to ask (worker).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, assert_never
from uuid import UUID

from psycopg import errors

from . import statements
from .events import harmless
from .judge import LAST
from .line import Deadlines, Line, Outage, Refusal, clamped
from .recall import (
    Accepted,
    After,
    AsMoved,
    At,
    Claim,
    Defer,
    Ended,
    Ending,
    Finish,
    LeaseLost,
    Locked,
    Misfired,
    Moved,
    Next,
    Placement,
    Release,
    Retry,
    Settled,
    Settlement,
    Stranded,
    Unsent,
    Verdict,
    http_status_of,
    name_of,
    reason_of,
)
from .sweep import Batch

REASON_MOST = 500
"""Characters of a reason that are kept."""
ASIDE = 60.0
"""Seconds for which a row that PostgreSQL won't let us claim is passed over."""
TURN = 60.0
"""Seconds after which another replica may prune, should the one whose turn it is have fallen silent."""
BACKLOG_MOST = 10_000
"""Overdue recalls that are counted: beyond that the number says nothing more, and counting would cost."""
PASSED_MOST = 20
"""Rows of what is due and was not claimed that are looked at one by one: the limit in the statement `ahead`."""
_NONE_ASIDE = "r.id <> all ('{}')"


@dataclass(frozen=True, slots=True)
class Claimed:
    """The answer to one claim: the rows taken, oldest due first."""

    claims: list[Claim]
    asked_at: float
    """Monotonic instant at which the claim was asked for."""
    refused: bool = False
    """Whether PostgreSQL would not have all that is due claimed now: to be tried again soon."""
    stranded: Sequence[tuple[str, str]] = ()
    """Rows that PostgreSQL refuses to have claimed, with its reason: passed over for a while, as they must not hold up the others."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """What a claim left behind, and when to come back."""

    next_in: float | None
    """Seconds until the next row is due, or None where none is."""
    waiting: bool
    """Whether something is due and was not claimed."""
    fresh: bool
    """Whether some of that fell due only after the claim was asked for. What did not is locked, or behind a run of its session."""
    expired: bool
    """Whether leases have ended that may be taken, or may have: where too much is due to see it all."""
    asked_at: float
    """Monotonic instant at which this was asked for."""
    moved: bool
    """Whether cron recalls wait where the application (or an insert in plain SQL) put them: to be put on a tick."""


@dataclass(frozen=True, slots=True)
class Probe:
    mine: bool
    """Whether the next probe is ours to make."""
    answered: bool
    """Whether somebody found the endpoint answering since our breaker opened."""
    next_in: float | None
    """Seconds until the next probe may be asked for."""


@dataclass(frozen=True, slots=True)
class Backlog:
    overdue: int
    """Recalls that are due and in nobody's hand; BACKLOG_MOST where there are more."""
    oldest: float
    """Seconds for which the oldest of them has been due; 0 where there is none."""


class Ledger:
    """The table as the worker sees it. All methods raise Outage, and Refusal where PostgreSQL will not take the values."""

    def __init__(self, dsn: str, worker: str, lease: float, *, fleet: int | None = None) -> None:
        """`lease` in seconds. `fleet`: the most runs at once of all replicas together."""
        name = f"recall-worker ledger {worker}"
        self._worker = worker
        self._lease = lease
        self._fleet = fleet
        self._lines: list[Line] = []
        deadlines = Deadlines.within(lease)
        self._claims, self._settles, self._renewals = (Line(dsn, name, deadlines, self._lines) for _ in range(3))
        # Opened only where the application holds a row locked.
        self._patient = Line(dsn, name, deadlines, self._lines, prepare=False)
        # Opened only while this worker prunes. Its deadlines have nothing to do with leases, and where it breaks the others need not care.
        self._prunes = Line(dsn, name, Deadlines(), [])
        self._sql, self._pruning = dict(statements.load("ledger")), statements.load("prune")
        if fleet is None:
            self._sql["claim"] = _without("fleet", self._sql["claim"])
        self._sql["claim_waiting"] = _without("left", self._sql["claim"])
        self._aside: dict[str, float] = {}
        self._left: dict[str, float] = {}
        """Leases that ended while the application held their rows locked: until when they are left to their owners."""
        self._turn = None if fleet is None else self._sql["fleet_turn"]

    async def close(self) -> None:
        for line in (*self._lines, self._prunes):
            await line.close()

    async def schema(self) -> tuple[int, int]:
        """The schema's version and the oldest code that can work with it; (0, 0) where there is none."""
        try:
            row = (await self._renewals.ask(self._sql["schema"], {}))[0]
        except Refusal as refusal:
            if refusal.sqlstate == errors.UndefinedTable.sqlstate:
                return 0, 0
            raise
        return row["version"], row["oldest_code"]

    async def claim(self, slots: int, *, take_expired: bool, in_hand: Collection[str] = ()) -> Claimed:
        """Take at most `slots` due rows under leases of their own, oldest due first.

        `take_expired`: also those whose leases have ended. `in_hand`: ids of our runs whose leases may have ended: those are not taken from
        ourselves.
        """
        asked_at = time.monotonic()
        statement, values = self._looking("claim" if take_expired else "claim_waiting", asked_at)
        values |= {"slots": slots, "fleet": self._fleet, "in_hand": list(in_hand)}
        try:
            rows = await self._claims.ask(statement, values, after=self._turn, as_=tuple)
        except Refusal as refusal:
            if refusal.sqlstate in (errors.UniqueViolation.sqlstate, errors.LockNotAvailable.sqlstate):
                # Another worker took a row of the same session in the same instant; a new look will see its lease. Or somebody
                # holds the whole table, as DDL does.
                return Claimed([], asked_at, refused=True)
            if refusal.of_a_row:
                return await self._claim_one_by_one(self._sql["claim" if take_expired else "claim_waiting"], values, asked_at)
            raise
        return Claimed(_claims_in(rows), asked_at)

    async def ahead(
        self, *, take_expired: bool, in_hand: Collection[str] = (), claimed_at: float | None, took_expired: bool = True
    ) -> Ahead:
        """When the next row is due, and what is due now and was not claimed.

        `take_expired`: whether leases that have ended may be taken. `claimed_at`: the monotonic instant at which all that is due was asked for
        last, but for such leases where not `took_expired`; None: nothing was.
        """
        asked_at = time.monotonic()
        statement, values = self._looking("ahead", asked_at)
        values |= {"take_expired": take_expired}
        found = (await self._claims.ask(statement, values))[0]
        self._leave(found["locked"])
        since = math.inf if claimed_at is None else time.monotonic() - claimed_at
        ended = [
            (id, due_for)
            for id, due_for in zip(found["passed_over"], found["due_for"], strict=True)
            if id is not None and id not in in_hand and id not in self._left
        ]
        if took_expired and self._fleet is None:
            # Else it may be the fleet's cap that passed them over.
            self._leave(id for id, due_for in ended if due_for > since)
        youngest = found["youngest"]
        return Ahead(
            next_in=found["next_in"],
            waiting=youngest is not None,
            fresh=youngest is not None and youngest <= since,
            expired=len(found["passed_over"]) >= PASSED_MOST or any(id not in self._left for id, _ in ended),
            asked_at=asked_at,
            moved=found["moved"],
        )

    def _looking(self, name: str, now: float) -> tuple[str, dict[str, Any]]:
        """A statement about what is due, without the rows that are put aside for now, and its values."""
        self._left = {id: until for id, until in self._left.items() if until > now}
        self._aside = {id: until for id, until in self._aside.items() if until > now}
        statement = self._sql[name]
        if self._aside:
            statement = statement.replace(_NONE_ASIDE, "r.id <> all (%(aside)s::text[])")
        return statement, {
            "lease": self._lease, "worker": self._worker, "left": list(self._left), "aside": list(self._aside),
        }  # fmt: skip

    def _leave(self, ids: Iterable[str]) -> None:
        """These rows are locked by the application, and their leases have ended: their owners could not renew them."""
        self._left.update(dict.fromkeys(ids, time.monotonic() + self._lease / 3))

    async def _claim_one_by_one(self, statement: str, values: dict[str, Any], asked_at: float) -> Claimed:
        """One of the due rows can't be claimed. It holds up nobody else: each goes alone, and those that are refused are put aside."""
        statement = statement.replace(_NONE_ASIDE, "r.id = %(only)s")
        claims: list[Claim] = []
        stranded: list[tuple[str, str]] = []
        for row in await self._claims.ask(self._sql["suspects"], {"aside": list(self._aside)}):
            try:
                claims += _claims_in(
                    await self._claims.ask(statement, values | {"slots": 1, "only": row["id"]}, after=self._turn, as_=tuple)
                )
            except Refusal as refusal:
                if refusal.of_a_row and refusal.sqlstate != errors.UniqueViolation.sqlstate:
                    self._aside[row["id"]] = asked_at + ASIDE
                    stranded.append((row["id"], refusal.reason))
            except Outage:
                break  # What was claimed before it is ours.
            if len(claims) >= values["slots"]:
                break
        return Claimed(claims, asked_at, refused=True, stranded=stranded)

    async def place(self, placements: Sequence[tuple[Claim, Placement]]) -> list[Claim]:
        """Write what claims stand for where that differs from what they say, before they are called.

        Returns the claims as they now stand; those that were moved again meanwhile, or lost, are left out.
        """
        rows = await self._claims.ask(
            self._sql["place"],
            {
                "ids": [c.id for c, _ in placements],
                "leases": [c.lease for c, _ in placements],
                "triggers": [c.trigger for c, _ in placements],
                "occurrences": [p.occurrence for _, p in placements],
                "ats": [p.when.when if isinstance(p.when, At) else None for _, p in placements],
                "distances": [p.when.distance for _, p in placements],
                "missed": [p.missed for _, p in placements],
            },
        )
        written = {row["id"] for row in rows}
        return [_placed(c, p) for c, p in placements if c.id in written]

    async def moved(self) -> list[Claim]:
        """Cron recalls that wait where the application moved them, in the shape of claims; nobody leases them."""
        return [_claim(row)._replace(lateness=0.0) for row in await self._claims.ask(self._sql["moved"], {}, as_=tuple)]

    async def settle_moved(self, verdicts: Sequence[tuple[Claim, Finish | Next]]) -> None:
        """Write what becomes of them, unless they are locked, or were moved again or claimed meanwhile."""
        nexts = [verdict if isinstance(verdict, Next) else None for _, verdict in verdicts]
        ats = [n.when if n is not None and isinstance(n.when, At) else None for n in nexts]
        values = {
            "ids": [claim.id for claim, _ in verdicts],
            "triggers": [claim.trigger for claim, _ in verdicts],
            "statuses": [verdict.status if isinstance(verdict, Finish) else None for _, verdict in verdicts],
            "reasons": [_told(verdict.reason) for _, verdict in verdicts],
            "occurrences": [None if n is None else n.occurrence for n in nexts],
            "ats": [None if at is None else at.when for at in ats],
            "jitters": [0.0 if at is None else at.jitter for at in ats],
            "distances": [None if n is None or isinstance(n.when, After) else n.when.distance for n in nexts],
        }
        await self._claims.ask(self._sql["settle_moved"], values)

    async def accept(self, claim: Claim, accepted: Accepted, called_ago: float) -> bool:
        """Put an accepted run's reference on record, under the lease. False where the row is no longer ours."""
        values = {
            "id": claim.id, "lease": claim.lease, "reference": accepted.reference, "http_status": accepted.http_status,
            "called_ago": called_ago, "worker": self._worker,
        }  # fmt: skip
        return bool(await self._renewals.ask(self._sql["accept"], values))

    async def runs_of(self, session_id: str, windows: Sequence[tuple[float, int]]) -> list[tuple[int, float | None]]:
        """For each window (seconds, most runs): how many runs the session had in it, and in how many seconds it has room again."""
        values = {"session_id": session_id, "spans": [span for span, _ in windows], "mosts": [most for _, most in windows]}
        rows = await self._renewals.ask(self._sql["runs_of"], values)
        by_span = {row["span"]: (row["runs"], row["frees_in"]) for row in rows}
        return [by_span[span] for span, _ in windows]

    async def probe(self, endpoint: str, open_for: float, *, wanted: bool) -> Probe:
        """While our breaker is open, since `open_for` seconds: has anybody found the endpoint answering, and is the fleet's next probe ours?"""
        values = {"endpoint": endpoint, "open_for": open_for, "wanted": wanted}
        row = (await self._claims.ask(self._sql["probe"], values))[0]
        return Probe(row["mine"], row["answered"], row["next_in"])

    async def endpoint_answers(self, endpoint: str) -> None:
        """Tell all replicas that the endpoint answers again."""
        await self._claims.ask(self._sql["endpoint_answers"], {"endpoint": endpoint})

    async def renew(self, leases: Mapping[str, UUID]) -> dict[str, str]:
        """Extend these leases (id → lease). Says of each: renewed, locked (ask again soon), lost, deleted, or its final status."""
        values = {"ids": list(leases), "leases": list(leases.values()), "lease": self._lease}
        try:
            return {row["id"]: row["state"] for row in await self._renewals.ask(self._sql["renew"], values)}
        except Refusal as refusal:
            if not refusal.of_a_row:
                raise
        # One row that can't be written does not cost the others their leases.
        if len(leases) == 1:
            return dict.fromkeys(leases, "locked")
        half, rows = len(leases) // 2, list(leases.items())
        return await self.renew(dict(rows[:half])) | await self.renew(dict(rows[half:]))

    async def look(self, leases: Mapping[str, UUID]) -> dict[str, str]:
        """Of these leases, those that are no longer ours to finish: lost, deleted, or the recall's final status."""
        values = {"ids": list(leases), "leases": list(leases.values())}
        return {row["id"]: row["state"] for row in await self._renewals.ask(self._sql["look"], values)}

    async def settle(self, batch: Sequence[tuple[Ending, Verdict]]) -> list[Settlement]:
        """Write the verdicts, each guarded by its lease, and leave each call's mark. Answers in the order of `batch`.

        One row that can't be written does not strand the others: where the batch is refused, each goes alone.
        """
        try:
            return await self._settle(batch)
        except Refusal as refusal:
            if len(batch) > 1:
                return [(await self.settle([one]))[0] for one in batch]
            # A reason quotes what a server said; a database that does not keep Unicode gets it in ASCII.
            plain = refusal.sqlstate == errors.UntranslatableCharacter.sqlstate
            if not plain and refusal.sqlstate not in (errors.UniqueViolation.sqlstate, errors.LockNotAvailable.sqlstate):
                return [Stranded(refusal.reason)]
        # The session's slot was taken (or is being taken) between look and write: put back outside of it.
        try:
            return await self._settle(batch, outside=not plain, plain=plain)
        except Refusal as refusal:
            # It was no slot: somebody holds the whole table, as DDL does.
            return [Locked() if refusal.sqlstate == errors.LockNotAvailable.sqlstate else Stranded(refusal.reason)]

    async def insist(self, ending: Ending, verdict: Verdict) -> Settlement:
        """Settle a row that the application holds locked, standing in the queue for it, for a second at most.

        Whoever passes locked rows over comes too late when the lock goes after the lease has ended: another worker would take the row up.
        """
        try:
            return (await self._settle([(ending, verdict)], on=self._patient))[0]
        except Refusal:
            return Locked()

    async def _settle(
        self, batch: Sequence[tuple[Ending, Verdict]], outside: bool = False, plain: bool = False, on: Line | None = None
    ) -> list[Settlement]:
        now = time.monotonic()
        rows = [_row(ending, verdict, now, "running" if outside else "pending") for ending, verdict in batch]
        if plain:
            for row in rows:
                row["reasons"] = row["reasons"] and row["reasons"].encode("ascii", "backslashreplace").decode()
        columns = {
            name: list(values) for name, values in zip(rows[0], zip(*(row.values() for row in rows), strict=True), strict=True)
        }
        statement = (
            self._sql["settle"] if on is None else self._sql["settle"].replace("for update of r skip locked", "for update of r")
        )
        answers = await (on or self._settles).ask(statement, columns | {"worker": self._worker})
        by_lease = {(row["id"], row["lease"]): row for row in answers}
        return [_settlement(by_lease[ending.claim.id, ending.claim.lease]) for ending, _ in batch]

    async def beat(self, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
        """Tell people that this worker is about. Returns how many others are at hand, with slots free and a bell that hears, before it."""
        row = (await self._claims.ask(self._sql["beat"], {**facts, "worker": self._worker, "settings": json.dumps(settings)}))[0]
        return int(row["ahead"])

    async def ring(self, channel: str) -> None:
        """Notify a channel: a bell that is not sure of being rung asks for it, as only another connection can tell."""
        await self._renewals.ask(self._sql["ring"], {"channel": channel})

    async def backlog(self) -> Backlog:
        """How much is due and in nobody's hand, and for how long: for those who watch."""
        row = (await self._renewals.ask(self._sql["backlog"], {"most": BACKLOG_MOST}))[0]
        return Backlog(row["overdue"], row["oldest"])

    async def take_turn(self, every: float) -> float | None:
        """Ask to be the replica that prunes, or to go on being it: None where it is, else in how many seconds to ask again.

        The turn is this worker's for TURN seconds from now. `every`: the pause that it will make between two of them, in seconds.
        """
        values = {"worker": self._worker, "patience": TURN, "every": every}
        row = (await self._prunes.ask(self._pruning["turn"], values))[0]
        return None if row["mine"] else float(row["next_in"])

    async def prune(self, batch: Batch) -> Mapping[str, int]:
        """Delete one batch of what is over."""
        deleted: Mapping[str, int] = (await self._prunes.ask(self._pruning[batch.statement], batch.values))[0]
        return deleted

    async def end_turn(self, again_in: float) -> None:
        """Have the next turn in so many seconds, whoever's it will be."""
        await self._prunes.ask(self._pruning["ended"], {"worker": self._worker, "again_in": again_in})

    async def stop_pruning(self) -> None:
        """Close the connection that pruning alone needs."""
        await self._prunes.close()

    async def leave(self) -> None:
        """Say goodbye, and ring for what was put back."""
        await self._claims.ask(self._sql["leave"], {"worker": self._worker})


def _claims_in(rows: Sequence[tuple[Any, ...]]) -> list[Claim]:
    """The oldest due first."""
    return sorted(map(_claim, rows), key=lambda claim: -claim.lag)


def _claim(row: Sequence[Any]) -> Claim:
    """A row of the statement `claim`: dates become ages here, as PostgreSQL would take longer to make ready for that than for all the rest."""
    (
        *first,
        scheduled_for,
        missed,
        begun_at,
        due_at,
        lease,
        trigger,
        trigger_at,
        planned_at,
        taken_from,
        reference,
        delivered_at,
        now,
    ) = row[:21]
    cadence, cron, time_zone, until, *last = row[21:]
    scheduled_for, trigger_at, planned_at = clamped(scheduled_for), clamped(trigger_at), clamped(planned_at)
    begun_age, delivered_age = (None if at is None else max(0.0, (now - at).total_seconds()) for at in (begun_at, delivered_at))
    return Claim._make(
        (
            *first, scheduled_for, missed, begun_age, (now - clamped(due_at)).total_seconds(), (now - scheduled_for).total_seconds(), lease,
            trigger, trigger_at, planned_at, trigger_at <= now, taken_from, reference, delivered_age, now, cadence, cron, time_zone,
            None if until is None else clamped(until), *last,
        )
    )  # fmt: skip


def _without(part: str, statement: str) -> str:
    """A statement without what it has for one purpose, in between marks of that name."""
    return re.sub(rf"/\* {part}: \*/.*?/\* :{part} \*/", "", statement, flags=re.DOTALL)


def _placed(claim: Claim, placement: Placement) -> Claim:
    """A claim after its placement was written."""
    when = placement.when
    nominal = when.when if isinstance(when, At) else claim.trigger_at
    return claim._replace(
        occurrence=placement.occurrence, rekey=claim.rekey if placement.occurrence == claim.occurrence else 0, attempt=1,
        deferrals=0, begun_age=None, taken_from=None, missed=placement.missed, scheduled_for=nominal, planned_at=claim.trigger_at,
        interval=claim.interval if when.distance is None else when.distance,
        lateness=claim.lateness + (claim.scheduled_for - nominal).total_seconds(),
    )  # fmt: skip


def _row(ending: Ending, verdict: Verdict, now: float, waiting: str) -> dict[str, Any]:
    """One verdict as the settle statement takes it: the row's next state, and the call's mark."""
    claim, outcome = ending.claim, ending.outcome
    ended_ago = now - ending.ended_at
    called_ago = None if ending.called_after is None else ended_ago + ending.ended_after - ending.called_after
    status, occurrence, rekey, attempt, deferrals = waiting, claim.occurrence, claim.rekey, claim.attempt, claim.deferrals
    fresh = False
    delay: float | None = None
    at: datetime | None = None
    distance: int | None = None
    failures: int | None = None
    jitter = 0.0
    match verdict:
        case Finish():
            status = verdict.status
            attempt -= 0 if called_ago is not None else 1
        case Next(occurrence, when):
            # An occurrence that keeps its number keeps the key that an operator gave it.
            rekey = claim.rekey if occurrence == claim.occurrence else 0
            attempt, deferrals, fresh = 0, 0, True
            failures = verdict.failures
            match when:
                case After(delay):
                    pass
                case At(at, distance, jitter):
                    pass
                case AsMoved(distance):
                    pass
                case never:
                    assert_never(never)
        case Retry(After(delay), anew):
            rekey, deferrals = min(LAST, rekey + (1 if anew else 0)), 0
        case Defer(After(delay)):
            attempt, deferrals = attempt - 1, min(LAST, deferrals + 1)
        case Release():
            attempt -= 0 if isinstance(outcome, Accepted) else 1
        case never_either:
            assert_never(never_either)
    return {
        "ids": claim.id, "leases": claim.lease, "triggers": claim.trigger,
        "statuses": status, "occurrences": occurrence, "rekeys": rekey, "attempts": attempt, "deferrals": deferrals,
        "delays": delay, "fresh": fresh,
        "outcomes": None if isinstance(outcome, Unsent) else name_of(outcome),
        "reasons": _told(verdict.reason if isinstance(verdict, Next) else verdict.reason or reason_of(outcome)),
        "called_ago": called_ago, "ended_ago": ended_ago, "http_statuses": http_status_of(outcome),
        "call_occurrences": claim.occurrence, "call_rekeys": claim.rekey, "call_attempts": claim.attempt,
        "sessions": claim.session_id, "scheduled": claim.scheduled_for,
        "missed": outcome.passed_over if isinstance(outcome, Misfired) else claim.missed,
        "keep_references": isinstance(outcome, Accepted), "references": claim.reference is not None,
        "ats": at, "jitters": jitter, "distances": distance, "failures": failures,
    }  # fmt: skip


def _told(reason: str | None) -> str | None:
    """A reason that any column and any terminal takes: it may quote what a server answered."""
    return None if reason is None else harmless(reason[:REASON_MOST])


def _settlement(row: Mapping[str, Any]) -> Settlement:
    match row["state"]:
        case "settled":
            return Settled(row["status"])
        case "again":
            return Settled("before")
        case "moved":
            return Moved(row["trigger"], row["trigger_at"], row["as_settled"])
        case "locked":
            return Locked()
        case "lost":
            return LeaseLost()
        case "deleted":
            return Ended("deleted")
        case _:
            return Ended(row["status"])

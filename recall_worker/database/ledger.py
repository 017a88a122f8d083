"""The worker's only SQL: claim, take up, write moves, renew, check leases, settle, heartbeat,
prune. One round trip each, no transaction across a call.

The database is authoritative for what is due, who holds which lease, and what a recall has become.
The process may believe a lease to be its own until a renewal or a settle says otherwise; it never
concludes that from its own clock.

A ledger keeps a few connections of its own: one for claims, one for settles, one for renewals, so
that none waits behind another. On DatabaseUnavailable callers wait and try again.

Never here: what an outcome means (judge), when to query (worker).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, assert_never
from uuid import UUID

from psycopg import errors

from .. import statements
from ..events import escape_controls
from ..judge import LAST
from ..recall import (
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
from ..settings import LEASE_MOST
from ..sweep import Batch
from .connection import DatabaseUnavailable, Deadlines, QueryConnection, StatementRejected
from .values import clamped

REASON_MOST = 500
"""Characters of a reason that are kept."""
ASIDE_FIRST, ASIDE_MOST = 60.0, 3600.0
"""Seconds for which a row that PostgreSQL does not let us claim is skipped: doubling from the first
to the most."""
ALONE_MOST = 100
"""Rows that are claimed one by one after a batch was refused, before the next query."""
GRACE_AFTER_OUTAGE = 1 / 3
"""Part of a lease for which a row whose lease has ended is left to its owner, where the owner could
not renew it (PostgreSQL was down, or the row was locked). A worker renews at a third of a lease, so
every living owner renews within this. The `grace` of the statements."""
HELD = 1e9
"""Seconds, as good as for ever: after an outage the owner of a lease that has ended may be
alive."""
TURN = 60.0
"""Seconds after which another replica may prune if the one whose turn it is has fallen silent."""
BACKLOG_MOST = 10_000
"""Overdue recalls that are counted, at most: counting costs, and a higher number says nothing
new."""
PASSED_MOST = 20
"""Due rows left unclaimed that are examined one by one."""
BATCH_MESSAGE_MOST = 65_536
"""Octets of a message that is claimed with its row: a longer one is read alone."""
ENDED_MOST = 1000
"""Leases that have ended, listed at once."""
MOVED_MOST = 500
"""Moved cron recalls that are put on a moment at once."""
LEASE_END_MOST = LEASE_MOST + 3600.0
"""Seconds from now after which no worker's lease ends: one that does was not written by a worker.
An hour more than the longest lease, for a clock that was set back."""
ABANDONED_AFTER = 60.0
"""Seconds after which the ended lease of a recall that was ended in mid-run is ended by any worker:
its owner, if only slow, has settled by then."""
ABANDONED_MOST = 100
"""Leases of each kind that one heartbeat ends."""
NOT_READY_AFTER = 90.0
"""Seconds without a heartbeat after which a worker no longer counts as ready: one and a half of the
longest pause between two."""
FORGET_AFTER = 86_400.0
"""Seconds without a heartbeat after which a worker's row is deleted."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """The answer to one claim: the rows taken, oldest due first."""

    claims: list[Claim]
    asked_at: float
    """Monotonic instant at which the claim was sent."""
    refused: bool = False
    """Whether PostgreSQL refused to claim some of what is due: try again soon."""
    stranded: Sequence[tuple[str, str]] = ()
    """Rows that PostgreSQL refuses to claim, with its reason: skipped for a while, as they must not
    hold up the others."""


@dataclass(frozen=True, slots=True)
class NextDue:
    """What a claim left unclaimed, and when to claim again."""

    next_in: float | None
    """Seconds until the next row is due, or None where none is."""
    waiting: bool
    """Whether something is due and was not claimed."""
    fresh: bool
    """Whether some of that fell due only after the claim was sent. The rest is locked, or waits for
    a run of its session."""
    ended: bool
    """Whether leases have ended, or may have: too much is due to see it all."""
    asked_at: float
    """Monotonic instant at which this query was sent."""
    moved: bool
    """Whether cron recalls wait at a time that the application (or an insert in plain SQL) chose:
    they are to be put on a tick."""


@dataclass(frozen=True, slots=True)
class EndedLeases:
    """Rows whose leases have ended and may be taken up, oldest first."""

    unanswered: list[str]
    """Nobody knows whether their runs were called, nor how they ended."""
    accepted: list[str]
    """Their runs continue at the API, and polling continues."""


@dataclass(slots=True)
class _Aside:
    """A row that could not be claimed."""

    until: float
    """Monotonic instant from which it is tried again, alone."""
    pause: float
    """Seconds that it was skipped for last."""


@dataclass(frozen=True, slots=True)
class Probe:
    mine: bool
    """Whether this worker makes the next probe."""
    answered: bool
    """Whether any worker found the endpoint answering since our breaker opened."""
    next_in: float | None
    """Seconds until the next probe may be asked for."""


@dataclass(frozen=True, slots=True)
class Backlog:
    overdue: int
    """Recalls that are due and unclaimed; BACKLOG_MOST where there are more."""
    oldest: float
    """Seconds for which the oldest of them has been due; 0 where there is none."""


class Ledger:
    """The table as the worker sees it. All methods raise DatabaseUnavailable, and StatementRejected
    where PostgreSQL does not accept the values."""

    def __init__(
        self,
        dsn: str,
        worker: str,
        lease: float,
        *,
        fleet: int | None = None,
        message_limit: int = 4 << 20,
    ) -> None:
        """`lease`: seconds. `fleet`: the most runs at once of all replicas together.
        `message_limit`: octets."""
        name = f"recall-worker ledger {worker}"
        self._worker = worker
        self._lease = lease
        self._grace = lease * GRACE_AFTER_OUTAGE
        self._fleet = fleet
        self._message_limit = message_limit
        self._connections: list[QueryConnection] = []
        deadlines = Deadlines.within(lease)
        self._claims, self._settles, self._renewals = (
            QueryConnection(dsn, name, deadlines, self._connections) for _ in range(3)
        )
        # Opened only when the application holds a row locked, or a message is long.
        self._patient = QueryConnection(dsn, name, deadlines, self._connections, prepare=False)
        # Opened only while this worker prunes. Its deadlines do not depend on the lease, and when
        # it breaks the others do not reconnect.
        self._prunes = QueryConnection(dsn, name, Deadlines(), [])
        self._sql, self._pruning = statements.load("ledger"), statements.load("prune")
        self._aside: dict[str, _Aside] = {}
        self._alone_next = False
        """Whether the last claim took too long and was given up: one of its rows may be the
        cause."""
        self._room: float = math.inf
        """Runs that the fleet's cap still allowed at the last query for leases that have ended."""
        self._left: dict[str, float] = {}
        """Leases that ended while the application held their rows locked: until when they are left
        to their owners."""
        self._fleet_lock = None if fleet is None else self._sql["fleet_lock"]

    async def close(self) -> None:
        for connection in (*self._connections, self._prunes):
            await connection.close()

    async def schema(self) -> tuple[int, int]:
        """The schema's version and the oldest code that can work with it; (0, 0) where there is
        none."""
        try:
            row = (await self._renewals.ask(self._sql["schema"], {}))[0]
        except StatementRejected as refusal:
            if refusal.sqlstate == errors.UndefinedTable.sqlstate:
                return 0, 0
            raise
        return row["version"], row["oldest_code"]

    async def claim(self, slots: int, *, all_held: bool = False) -> Claimed:
        """Take at most `slots` due rows that nobody holds, under leases of their own, oldest due
        first.

        `all_held`: under a cap of the fleet, count every lease that has ended: after an outage its
        owner may be alive.
        """
        asked_at = time.monotonic()
        if self._alone_next or any(aside.until <= asked_at for aside in self._aside.values()):
            return await self._claim_one_by_one(slots, asked_at, all_held=all_held)
        values = self._claim_values(slots, self._held_for(all_held=all_held)) | {
            "aside": list(self._aside)
        }
        try:
            rows = await self._claims.ask(
                self._sql["claim"], values, after=self._fleet_lock, as_=tuple
            )
        except DatabaseUnavailable as outage:
            # If this is an outage, the next query shows it. If one row is the cause, claiming one
            # by one finds it.
            self._alone_next = outage.timed_out
            raise
        except StatementRejected as refusal:
            if refusal.sqlstate in (
                errors.UniqueViolation.sqlstate,
                errors.LockNotAvailable.sqlstate,
            ):
                # Another worker took a row of the same session in the same instant; the next claim
                # sees its lease. Or the whole table is locked, as DDL does.
                return Claimed([], asked_at, refused=True)
            if refusal.of_a_row:
                return await self._claim_one_by_one(slots, asked_at, all_held=all_held)
            raise
        return Claimed(_claims_in(rows), asked_at)

    def _held_for(self, *, all_held: bool) -> float:
        """Seconds for which a lease that has ended counts under the fleet's cap."""
        return HELD if all_held else self._grace

    def _claim_values(self, slots: int, held_for: float) -> dict[str, Any]:
        return {
            "lease": self._lease,
            "worker": self._worker,
            "slots": slots,
            "fleet": self._fleet,
            "held_for": held_for,
            "message_limit": self._message_limit,
            "grace": self._grace,
            "lease_end_most": LEASE_END_MOST,
            "batch_message_most": BATCH_MESSAGE_MOST,
        }

    async def ended_leases(self, in_hand: Collection[str] = ()) -> EndedLeases:
        """Rows whose leases have ended and may be taken up.

        `in_hand`: ids of our runs whose leases may have ended: we do not take those from ourselves.
        A row that the application holds locked could not be renewed by its owner: it is left to
        that owner for a while (GRACE_AFTER_OUTAGE).
        """
        now = time.monotonic()
        self._left = {id: until for id, until in self._left.items() if until > now}
        values = {
            "grace": self._grace,
            "worker": self._worker,
            "in_hand": list(in_hand),
            "left": list(self._left),
            "most": ENDED_MOST,
            "aside": [id for id, aside in self._aside.items() if aside.until > now],
            "fleet": self._fleet,
        }
        found = (await self._claims.ask(self._sql["ended_leases"], values))[0]
        self._leave_to_owners(found["locked"])
        self._room = math.inf if found["room"] is None else found["room"]
        ended = list(zip(found["ids"], found["accepted"], strict=True))
        return EndedLeases(
            [id for id, accepted in ended if not accepted],
            [id for id, accepted in ended if accepted],
        )

    async def take_up(
        self, ids: Sequence[str], in_hand: Collection[str] = (), *, most: int | None = None
    ) -> Claimed:
        """Take these rows, whose leases have ended, under leases of our own: the oldest first, and
        at most `most` of them.

        Rows that are not returned are locked, or taken by others, or beyond `most`.
        """
        asked_at = time.monotonic()
        most = len(ids) if most is None else most
        try:
            claims = await self._take_up(ids, most, in_hand)
        except StatementRejected as refusal:
            if refusal.sqlstate in (
                errors.UniqueViolation.sqlstate,
                errors.LockNotAvailable.sqlstate,
            ):
                return Claimed([], asked_at, refused=True)
            if not refusal.of_a_row:
                raise
            if len(ids) > 1:
                found: list[Claim] = []
                stranded: list[tuple[str, str]] = []
                for id in ids:
                    if len(found) < most:
                        one = await self.take_up([id], in_hand)
                        found += one.claims
                        stranded += one.stranded
                return Claimed(found, asked_at, stranded=stranded)
            self._put_aside(ids[0], asked_at)
            return Claimed([], asked_at, stranded=[(ids[0], refusal.reason)])
        taken = {claim.id for claim in claims}
        whole = len(ids) <= self._room and (most == len(ids) or not taken)
        # `ids` are in the order in which they are taken. Where the limit or the fleet's cap may
        # have cut them off, only those before the last one taken are known to be locked.
        tried = (
            len(ids) if whole else max((n for n, id in enumerate(ids) if id in taken), default=0)
        )
        self._leave_to_owners(id for id in ids[:tried] if id not in taken)
        for claim in claims:
            self._aside.pop(claim.id, None)
        return Claimed(claims, asked_at)

    async def _take_up(
        self,
        ids: Sequence[str],
        slots: int,
        in_hand: Collection[str] = (),
        *,
        held_for: float | None = None,
    ) -> list[Claim]:
        """`held_for`: as in the statement, for rows that nobody holds; None: take up leases that
        have ended."""
        values = self._claim_values(slots, held_for or 0.0) | {
            "ids": list(ids),
            "in_hand": list(in_hand),
            "ended": held_for is None,
        }
        return _claims_in(
            await self._claims.ask(self._sql["take_up"], values, after=self._fleet_lock, as_=tuple)
        )

    async def _claim_one_by_one(self, slots: int, asked_at: float, *, all_held: bool) -> Claimed:
        """One of the due rows can't be claimed. So that it does not hold up the others, each is
        claimed alone, and those that are refused are put aside.

        A row that could not be claimed is never in a batch again: it is tried alone, after pauses
        that grow.
        """
        claims: list[Claim] = []
        stranded: list[tuple[str, str]] = []
        tried = [id for id, aside in self._aside.items() if aside.until <= asked_at]
        if self._alone_next or not tried:
            values = {"aside": list(self._aside), "most": ALONE_MOST}
            rows = await self._claims.ask(self._sql["due_ids"], values)
            tried += [row["id"] for row in rows]
        self._alone_next = False
        for id in tried[:ALONE_MOST]:
            if len(claims) >= slots:
                break
            try:
                taken = await self._take_up([id], 1, held_for=self._held_for(all_held=all_held))
                claims += taken
                if taken:
                    self._aside.pop(id, None)
                elif id in self._aside:
                    self._wait_longer(id, asked_at)
            except StatementRejected as refusal:
                if refusal.of_a_row and refusal.sqlstate != errors.UniqueViolation.sqlstate:
                    self._put_aside(id, asked_at)
                    stranded.append((id, refusal.reason))
            except DatabaseUnavailable as outage:
                # PostgreSQL had answered just before, so this row took too long. The rows claimed
                # before it are ours.
                if outage.timed_out:
                    self._put_aside(id, asked_at)
                    stranded.append((id, f"it can't be claimed in time: {outage.reason}"))
                    self._alone_next = True
                break
        return Claimed(claims, asked_at, refused=True, stranded=stranded)

    def _wait_longer(self, id: str, now: float) -> None:
        """This row can't be claimed now: not due, not live, behind a run of its session, or
        deleted. It is not tried for ever."""
        if self._aside[id].pause < ASIDE_MOST:
            self._put_aside(id, now)
        else:
            del self._aside[id]

    def _put_aside(self, id: str, now: float) -> None:
        before = self._aside.get(id)
        pause = ASIDE_FIRST if before is None else min(ASIDE_MOST, 2 * before.pause)
        self._aside[id] = _Aside(now + pause, pause)

    async def next_due(self, *, claimed_at: float | None) -> NextDue:
        """When the next row is due, and whether rows are due now that were not claimed.

        `claimed_at`: the monotonic instant of the last claim that asked for all that is due; None:
        there was none.
        """
        asked_at = time.monotonic()
        values = {"aside": list(self._aside), "passed_most": PASSED_MOST}
        found = (await self._claims.ask(self._sql["next_due"], values))[0]
        since = math.inf if claimed_at is None else time.monotonic() - claimed_at
        youngest = found["youngest"]
        return NextDue(
            next_in=found["next_in"],
            waiting=youngest is not None,
            fresh=youngest is not None and youngest <= since,
            ended=found["ended"] or found["passed_over"] >= PASSED_MOST,
            asked_at=asked_at,
            moved=found["moved"],
        )

    def _leave_to_owners(self, ids: Iterable[str]) -> None:
        """The application holds these rows locked, and their leases have ended: their owners could
        not renew them."""
        self._left.update(dict.fromkeys(ids, time.monotonic() + self._grace))

    async def message(self, claim: Claim) -> str | None:
        """The message of a claim that came without it; None where it was changed since, or the
        lease is no longer ours."""
        rows = await self._patient.ask(self._sql["message"], {"id": claim.id, "lease": claim.lease})
        return rows[0]["message"] if rows else None

    async def sent(self, claim: Claim) -> bool:
        """Record that its request is about to be sent. False where the lease is no longer ours, or
        the application holds the row locked."""
        return bool(
            await self._renewals.ask(self._sql["sent"], {"id": claim.id, "lease": claim.lease})
        )

    async def write_moves(self, placements: Sequence[tuple[Claim, Placement]]) -> list[Claim]:
        """Write the occurrence that each moved claim stands for into its row, before it is called.

        Returns the claims as they now are, without those that were moved again meanwhile, or lost.
        """
        rows = await self._claims.ask(
            self._sql["write_moves"],
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
        """Cron recalls that wait where the application moved them, as claims without a lease."""
        values = {"aside": list(self._aside), "most": MOVED_MOST}
        rows = await self._claims.ask(self._sql["moved"], values, as_=tuple)
        return [_claim(row)._replace(lateness=0.0) for row in rows]

    async def settle_moved(
        self, verdicts: Sequence[tuple[Claim, Finish | Next]]
    ) -> list[tuple[str, str]]:
        """Write these verdicts, except where the row is locked, or was moved again or claimed
        meanwhile.

        Returns the rows that PostgreSQL refuses to write, with its reason: they are put aside, as
        in a claim.
        """
        nexts = [verdict if isinstance(verdict, Next) else None for _, verdict in verdicts]
        ats = [n.when if n is not None and isinstance(n.when, At) else None for n in nexts]
        values = {
            "ids": [claim.id for claim, _ in verdicts],
            "triggers": [claim.trigger for claim, _ in verdicts],
            "statuses": [
                verdict.status if isinstance(verdict, Finish) else None for _, verdict in verdicts
            ],
            "reasons": [clean_reason(verdict.reason) for _, verdict in verdicts],
            "occurrences": [None if n is None else n.occurrence for n in nexts],
            "ats": [None if at is None else at.when for at in ats],
            "jitters": [0.0 if at is None else at.jitter for at in ats],
            "distances": [
                None if n is None or isinstance(n.when, After) else n.when.distance for n in nexts
            ],
        }
        try:
            await self._claims.ask(self._sql["settle_moved"], values)
        except StatementRejected as refusal:
            if not refusal.of_a_row:
                raise
            if len(verdicts) > 1:
                return [row for one in verdicts for row in await self.settle_moved([one])]
            id = verdicts[0][0].id
            self._put_aside(id, time.monotonic())
            return [(id, refusal.reason)]
        return []

    async def accept(self, claim: Claim, accepted: Accepted, called_ago: float) -> bool | Locked:
        """Record an accepted run's reference, under the lease. `called_ago`: seconds. False where
        the row is no longer ours."""
        values = {
            "id": claim.id,
            "lease": claim.lease,
            "reference": accepted.reference,
            "http_status": accepted.http_status,
            "called_ago": called_ago,
            "worker": self._worker,
        }
        row = (await self._renewals.ask(self._sql["accept"], values))[0]
        return Locked() if row["locked"] else bool(row["accepted"])

    async def count_session_runs(
        self, session_id: str, windows: Sequence[tuple[float, int]]
    ) -> list[tuple[int, float | None]]:
        """For each window (seconds, most runs): how many runs the session had in it, and in how
        many seconds it has room again."""
        values = {
            "session_id": session_id,
            "spans": [span for span, _ in windows],
            "mosts": [most for _, most in windows],
        }
        rows = await self._renewals.ask(self._sql["count_session_runs"], values)
        by_span = {row["span"]: (row["runs"], row["frees_in"]) for row in rows}
        return [by_span[span] for span, _ in windows]

    async def probe(self, endpoint: str, open_for: float, *, wanted: bool) -> Probe:
        """While our breaker is open, for `open_for` seconds now: whether any worker found the
        endpoint answering, and whether the fleet's next probe is ours. `wanted`: we want to make
        it."""
        values = {"endpoint": endpoint, "open_for": open_for, "wanted": wanted}
        row = (await self._claims.ask(self._sql["probe"], values))[0]
        return Probe(row["mine"], row["answered"], row["next_in"])

    async def endpoint_answers(self, endpoint: str) -> None:
        """Tell all replicas that the endpoint answers again."""
        await self._claims.ask(self._sql["endpoint_answers"], {"endpoint": endpoint})

    async def renew(
        self, leases: Mapping[str, UUID], sent_ago: Mapping[str, float] | None = None
    ) -> dict[str, str]:
        """Extend these leases (id → lease). Returns for each: renewed, locked (ask again soon),
        lost, deleted, or its final status.

        `sent_ago`: seconds since the requests of those that were sent, to be recorded.
        """
        sent_ago = sent_ago or {}
        values = {
            "ids": list(leases),
            "leases": list(leases.values()),
            "sent_ago": [sent_ago.get(id) for id in leases],
            "lease": self._lease,
        }
        try:
            return {
                row["id"]: row["state"]
                for row in await self._renewals.ask(self._sql["renew"], values)
            }
        except StatementRejected as refusal:
            if not refusal.of_a_row:
                raise
        # One row that can't be written must not cost the others their leases.
        if len(leases) == 1:
            return dict.fromkeys(leases, "locked")
        half, rows = len(leases) // 2, list(leases.items())
        return await self.renew(dict(rows[:half]), sent_ago) | await self.renew(
            dict(rows[half:]), sent_ago
        )

    async def check_leases(self, leases: Mapping[str, UUID]) -> dict[str, str]:
        """Those of these leases that are no longer ours to finish: lost, deleted, or the recall's
        final status."""
        values = {"ids": list(leases), "leases": list(leases.values())}
        return {
            row["id"]: row["state"]
            for row in await self._renewals.ask(self._sql["check_leases"], values)
        }

    async def settle(self, batch: Sequence[tuple[Ending, Verdict]]) -> list[Settlement]:
        """Write the verdicts, each guarded by its lease, and record each call. Answers in the order
        of `batch`.

        One row that can't be written does not strand the others: where PostgreSQL refuses the
        batch, each is written alone.
        """
        try:
            return await self._settle(batch)
        except StatementRejected as refusal:
            if len(batch) > 1:
                return [(await self.settle([one]))[0] for one in batch]
            # A reason quotes a server's answer; a database that does not keep Unicode gets it in
            # ASCII.
            plain = refusal.sqlstate == errors.UntranslatableCharacter.sqlstate
            if not plain and refusal.sqlstate not in (
                errors.UniqueViolation.sqlstate,
                errors.LockNotAvailable.sqlstate,
            ):
                return [Stranded(refusal.reason)]
        # The session's slot was taken (or is being taken) between the check and the write: put back
        # outside of it.
        try:
            return await self._settle(batch, outside=not plain, plain=plain)
        except StatementRejected as refusal:
            # It was not the slot: the whole table is locked, as DDL does.
            return [
                Locked()
                if refusal.sqlstate == errors.LockNotAvailable.sqlstate
                else Stranded(refusal.reason)
            ]

    async def settle_waiting(self, ending: Ending, verdict: Verdict) -> Settlement:
        """Settle a row that the application holds locked, waiting in the lock's queue for
        LOCK_PATIENCE at most.

        SKIP LOCKED can miss the moment between the unlock and the lease's end: then another worker
        would take the row up.
        """
        try:
            return (await self._settle([(ending, verdict)], waiting=True))[0]
        except StatementRejected:
            return Locked()

    async def _settle(
        self,
        batch: Sequence[tuple[Ending, Verdict]],
        outside: bool = False,
        plain: bool = False,
        waiting: bool = False,
    ) -> list[Settlement]:
        now = time.monotonic()
        rows = [
            _row(ending, verdict, now, "running" if outside else "pending")
            for ending, verdict in batch
        ]
        if plain:
            for row in rows:
                row["reasons"] = (
                    row["reasons"] and row["reasons"].encode("ascii", "backslashreplace").decode()
                )
        columns = {
            name: list(values)
            for name, values in zip(
                rows[0], zip(*(row.values() for row in rows), strict=True), strict=True
            )
        }
        values = columns | {"worker": self._worker}
        # To wait, lock the rows first in the same transaction: then the settle does not skip them.
        before = (self._sql["wait_for"], {"ids": columns["ids"]}) if waiting else None
        answers = await (self._patient if waiting else self._settles).ask(
            self._sql["settle"], values, after=before
        )
        by_lease = {(row["id"], row["lease"]): row for row in answers}
        return [_settlement(by_lease[ending.claim.id, ending.claim.lease]) for ending, _ in batch]

    async def heartbeat(
        self, facts: Mapping[str, Any], settings: Mapping[str, Any], in_hand: Collection[str] = ()
    ) -> int:
        """Record that this worker runs. Returns how many other workers come before it that are
        running, have free slots, and are listening.

        `in_hand`: as for `ended_leases`.
        """
        values = {
            **facts,
            "worker": self._worker,
            "settings": json.dumps(settings),
            "grace": self._grace,
            "in_hand": list(in_hand),
            "lease_end_most": LEASE_END_MOST,
            "abandoned_after": ABANDONED_AFTER,
            "not_ready_after": NOT_READY_AFTER,
            "forget_after": FORGET_AFTER,
            "most": ABANDONED_MOST,
        }
        row = (await self._claims.ask(self._sql["heartbeat"], values))[0]
        return int(row["ahead"])

    async def notify(self, channel: str) -> None:
        """Notify a channel: for the listener's self-test, which needs another connection."""
        await self._renewals.ask(self._sql["notify"], {"channel": channel})

    async def backlog(self) -> Backlog:
        """How much is due and unclaimed, and for how long: for monitoring."""
        row = (await self._renewals.ask(self._sql["backlog"], {"most": BACKLOG_MOST}))[0]
        return Backlog(row["overdue"], row["oldest"])

    async def take_turn(self, every: float) -> float | None:
        """Ask to be the replica that prunes, or to stay it. Returns None where it is, else in how
        many seconds to ask again.

        The turn is this worker's for TURN seconds from now. `every`: the pause between two turns,
        in seconds.
        """
        values = {"worker": self._worker, "patience": TURN, "every": every}
        row = (await self._prunes.ask(self._pruning["turn"], values))[0]
        return None if row["mine"] else float(row["next_in"])

    async def prune(self, batch: Batch) -> Mapping[str, int]:
        """Delete one batch of what is over. Returns how much was deleted."""
        deleted: Mapping[str, int] = (
            await self._prunes.ask(self._pruning[batch.statement], batch.values)
        )[0]
        return deleted

    async def end_turn(self, again_in: float) -> None:
        """Let the next turn, of any replica, begin in so many seconds."""
        await self._prunes.ask(
            self._pruning["ended"], {"worker": self._worker, "again_in": again_in}
        )

    async def stop_pruning(self) -> None:
        """Close the connection that only pruning needs."""
        await self._prunes.close()

    async def deregister(self) -> None:
        """Delete this worker's row, and notify the others of what it put back."""
        await self._claims.ask(self._sql["deregister"], {"worker": self._worker})


def _claims_in(rows: Sequence[tuple[Any, ...]]) -> list[Claim]:
    """The oldest due first."""
    return sorted(map(_claim, rows), key=lambda claim: -claim.lag)


_DATED = {"begun_age": "begun_at", "lag": "due_at", "delivered_age": "delivered_at"}
_COLUMNS = tuple(_DATED.get(n, n) for n in Claim._fields if n not in ("lateness", "due"))
"""The columns of `claim`, `take_up` and `moved`: a claim's fields in order, with dates for ages."""
_NOW, _NOMINAL, _TRIGGER, _DUE_AT = map(
    _COLUMNS.index, ("claimed_at", "scheduled_for", "trigger_at", "due_at")
)
_CLAMPED = [_COLUMNS.index(n) for n in ("scheduled_for", "trigger_at", "planned_at", "until")]
_SINCE = [_COLUMNS.index(n) for n in ("begun_at", "delivered_at")]
_LATENESS, _DUE = Claim._fields.index("lateness"), Claim._fields.index("due")


def _claim(row: Sequence[Any]) -> Claim:
    """A row of `claim`, `take_up` or `moved`. Dates become ages here: PostgreSQL would need longer
    to prepare for that than for all the rest. By places and not by names, as this is done for every
    run."""
    values = list(row)
    now = values[_NOW]
    for place in _CLAMPED:
        if values[place] is not None:
            values[place] = clamped(values[place])
    for place in _SINCE:
        if values[place] is not None:
            values[place] = max(0.0, (now - values[place]).total_seconds())
    values[_DUE_AT] = (now - clamped(values[_DUE_AT])).total_seconds()
    lateness, due = (now - values[_NOMINAL]).total_seconds(), values[_TRIGGER] <= now
    # In the order of their places: the first shifts the second to its own.
    values.insert(_LATENESS, lateness)
    values.insert(_DUE, due)
    return Claim._make(values)


def _placed(claim: Claim, placement: Placement) -> Claim:
    """A claim after its move was written."""
    when = placement.when
    nominal = when.when if isinstance(when, At) else claim.trigger_at
    return claim._replace(
        occurrence=placement.occurrence,
        rekey=claim.rekey if placement.occurrence == claim.occurrence else 0,
        attempt=1,
        deferrals=0,
        begun_age=None,
        taken_from=None,
        missed=placement.missed,
        scheduled_for=nominal,
        planned_at=claim.trigger_at,
        interval=claim.interval if when.distance is None else when.distance,
        lateness=claim.lateness + (claim.scheduled_for - nominal).total_seconds(),
    )


def _row(ending: Ending, verdict: Verdict, now: float, waiting: str) -> dict[str, Any]:
    """One verdict as values of the settle statement: the row's next state, and the call's
    record."""
    claim, outcome = ending.claim, ending.outcome
    ended_ago = now - ending.ended_at
    called_ago = (
        None
        if ending.called_after is None
        else ended_ago + ending.ended_after - ending.called_after
    )
    status, occurrence, rekey, attempt, deferrals = (
        waiting,
        claim.occurrence,
        claim.rekey,
        claim.attempt,
        claim.deferrals,
    )
    fresh = False
    delay: float | None = None
    at: datetime | None = None
    distance: int | None = None
    failures: int | None = None
    jitter = 0.0
    # A run that was accepted before was only polled: its claim counted no attempt to give back.
    counted = 0 if claim.reference is not None and called_ago is None else 1
    match verdict:
        case Finish():
            status = verdict.status
            attempt -= counted if called_ago is None else 0
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
            attempt, deferrals = attempt - counted, min(LAST, deferrals + 1)
        case Release():
            attempt -= 0 if isinstance(outcome, Accepted) else 1
        case never_either:
            assert_never(never_either)
    return {
        "ids": claim.id,
        "leases": claim.lease,
        "triggers": claim.trigger,
        "statuses": status,
        "occurrences": occurrence,
        "rekeys": rekey,
        "attempts": attempt,
        "deferrals": deferrals,
        "delays": delay,
        "fresh": fresh,
        "outcomes": None if isinstance(outcome, Unsent) else name_of(outcome),
        "reasons": clean_reason(
            verdict.reason if isinstance(verdict, Next) else verdict.reason or reason_of(outcome)
        ),
        "called_ago": called_ago,
        "ended_ago": ended_ago,
        "http_statuses": http_status_of(outcome),
        "call_occurrences": claim.occurrence,
        "call_rekeys": claim.rekey,
        "call_attempts": claim.attempt,
        "sessions": claim.session_id,
        "scheduled": claim.scheduled_for,
        "missed": outcome.passed_over if isinstance(outcome, Misfired) else claim.missed,
        "keep_references": isinstance(outcome, Accepted),
        "references": claim.reference is not None,
        "kept": outcome.reference if isinstance(outcome, Accepted) else None,
        "ats": at,
        "jitters": jitter,
        "distances": distance,
        "failures": failures,
    }


def clean_reason(reason: str | None) -> str | None:
    """A reason that is safe in any column and on any terminal: it may quote a server's answer."""
    return None if reason is None else escape_controls(reason[:REASON_MOST])


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

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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, assert_never
from uuid import UUID

from psycopg import errors

from .. import statements
from ..cadence import TZDATA
from ..events import escape_controls
from ..judge import LAST, next_rekey
from ..recall import (
    Accepted,
    After,
    Answered,
    AsMoved,
    AsPlanned,
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
from ..settings import DEFAULT_QUEUE, LEASE_MOST
from ..statements import generation
from ..sweep import Batch
from .budget import ConnectionBudget
from .connection import (
    DatabaseUnavailable,
    Deadlines,
    Dsn,
    QueryConnection,
    StatementRejected,
)
from .identity import COPY, PAUSED
from .setup import Absence, absence_of
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
WAITED_MOST = 0.25
"""Seconds that a query for leases that have ended may wait for a lock of the table (or for a
PostgreSQL that stands still) before what it finds is left to the owners. take_up has the same
number."""
HELD = 1e9
"""Seconds, as good as for ever: after an outage the owner of a lease that has ended may be
alive."""
TURN = 60.0
"""Seconds after which another replica may prune if the one whose turn it is has fallen silent."""
BACKLOG_MOST = 10_000
"""Overdue recalls that are counted, at most, in all queues together: counting costs, and a higher
number says nothing new."""
QUEUES_MOST = 100
"""Queues that are counted, at most: a name is anybody's choice, and metrics have a series for
each."""
SERVES_AFTER = 180.0
"""Seconds without a heartbeat after which a worker no longer counts as serving its queues. The
trigger recall_admit_queue has the same number."""
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
STALE_MOST = 200
"""Cron recalls that are planned anew at once, by newer time zone data."""
LEFT_MOST, ZONES_MOST = 10_000, 1000
"""Rows, and zones, that are remembered as left to other workers."""
ZONES_ELSEWHERE_FOR = 600.0
"""Seconds for which it is remembered whether others know a zone that this worker's tzdata lacks."""
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
    locked: str | None = None
    """PostgreSQL's words where the whole table is locked, as DDL does: nothing could be claimed."""
    confirmed: bool = True
    """Whether the claim is committed as PostgreSQL is told to commit. Else only this server has it,
    and a synchronous standby that takes its place would not know of it."""


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
    paused: frozenset[str] = frozenset()
    """Those of our queues that are paused: nothing of them counts here."""


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
class Stale:
    """A cron recall whose moment was computed by older time zone data."""

    id: str
    cron: str | None
    time_zone: str
    nominal: datetime
    """The moment that it waits for."""
    trigger: str
    edits: int
    waits: bool
    """Whether it waits for a moment of its cadence; else its moment stands."""


@dataclass(frozen=True, slots=True)
class Probe:
    id: str | None
    """The row that is the next probe, where this worker makes it."""
    answered: bool
    """Whether any worker found the endpoint answering since our breaker opened."""
    next_in: float | None
    """Seconds until the next probe may be asked for; None where no row could be it."""


@dataclass(frozen=True, slots=True)
class QueueBacklog:
    """What monitoring shows of one queue."""

    queue: str
    ours: bool
    """Whether this worker serves it."""
    overdue: int
    oldest: float
    """As in Backlog."""
    workers: int
    """Live workers that serve it, this one included."""
    paused: bool


@dataclass(frozen=True, slots=True)
class Backlog:
    """Of the queues that this worker serves and that are not paused."""

    overdue: int
    """Recalls that are due and unclaimed; BACKLOG_MOST where there are more."""
    oldest: float
    """Seconds for which the oldest of them has been due; 0 where there is none."""
    queues: Sequence[QueueBacklog] = ()
    """All queues of the table, and those that are paused or ours: QUEUES_MOST at most, ours
    first."""
    untold: int | None = None
    """Failures that wait to be told to RECALL_FAILURE_URL, at most BACKLOG_MOST; None where nobody
    is told."""
    oldest_untold: float = 0.0
    """Seconds since the oldest of them; 0 where there is none."""


class Ledger:
    """The table as the worker sees it. All methods raise DatabaseUnavailable, and StatementRejected
    where PostgreSQL does not accept the values."""

    def __init__(
        self,
        dsn: Dsn,
        worker: str,
        lease: float,
        *,
        fleet: int | None = None,
        message_limit: int = 4 << 20,
        schema: str | None = None,
        budget: ConnectionBudget | None = None,
        committed: Callable[[bool], None] = lambda _: None,
        allow_copy: bool = False,
        paused: bool = False,
        queues: Sequence[str] = (DEFAULT_QUEUE,),
        run_timeout: float = 1800.0,
    ) -> None:
        """`lease`: seconds. `fleet`: the most runs at once in these queues, of all replicas
        together. `queues`: those that are claimed from. `run_timeout`: seconds that a run takes at
        most; for so long the ended lease of a row that nobody may take up holds its session.
        `message_limit`: octets. `schema`: RECALL_SCHEMA. `budget`: of all connections of this
        worker. `committed(confirmed)` is called after each statement that wrote: whether the commit
        was confirmed by the synchronous standby, if there is to be one. `allow_copy`: claim on a
        database that is a copy, too. `paused`: claim nothing, and end no leases of others.
        `queues`: those whose failures are told."""
        budget = budget or ConnectionBudget()
        name = f"recall-worker ledger {worker}"
        self._worker = worker
        self._lease = lease
        self._grace = lease * GRACE_AFTER_OUTAGE
        self._fleet = fleet
        self._schema = schema
        self._message_limit = message_limit
        self._queues = queues
        self._committed = committed
        self._connections: list[QueryConnection] = []
        deadlines = Deadlines.within(lease)
        self._allow_copy = allow_copy
        self._paused = paused
        self._queues = list(queues)
        self._run_timeout = run_timeout
        # Read once: a heartbeat may find no descriptor left.
        self._generation = generation()
        self._claims = QueryConnection(
            dsn,
            name,
            deadlines,
            self._connections,
            schema=schema,
            budget=budget,
            identify=True,
            allow_copy=allow_copy,
        )
        self._settles, self._renewals = (
            QueryConnection(dsn, name, deadlines, self._connections, schema=schema, budget=budget)
            for _ in range(2)
        )
        # Opened only when the application holds a row locked, or a message is long.
        self._patient = QueryConnection(
            dsn,
            name,
            deadlines,
            self._connections,
            prepare=False,
            schema=schema,
            budget=budget,
        )
        # Opened only while this worker prunes. Its deadlines do not depend on the lease, and when
        # it breaks the others do not reconnect.
        self._prunes = QueryConnection(
            dsn,
            name,
            Deadlines(),
            [],
            schema=schema,
            budget=budget,
            identify=True,
            allow_copy=allow_copy,
        )
        self._sql, self._pruning = statements.load("ledger"), statements.load("prune")
        self._zones, self._outbox = statements.load("zones"), statements.load("outbox")
        self._zones_elsewhere: dict[str, tuple[bool, float]] = {}
        """Whether others know a zone that is unknown here, and the monotonic instant until which
        that is believed."""
        self._left_for: dict[str, float] = {}
        """Seconds for which rows were last left to other workers."""
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

    @property
    def held(self) -> str | None:
        """Why nothing is claimed, as last asked: COPY, PAUSED, or None."""
        if self._claims.identity.copy and not self._allow_copy:
            return COPY
        return PAUSED if self._paused else None

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

    async def absence(self) -> Absence | None:
        """Why there is no table where it is looked for, and what to do. None where there is one, or
        where `migrate` may create it."""
        [row] = await self._renewals.ask(
            statements.load("setup")["elsewhere"], {"schema": self._schema}
        )
        return absence_of(row, self._schema)

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
                return self._refused(asked_at, refusal)
            if refusal.of_a_row:
                return await self._claim_one_by_one(slots, asked_at, all_held=all_held)
            raise
        confirmed = not rows or self._confirmed(self._claims)
        return Claimed(_claims_in(rows), asked_at, confirmed=confirmed)

    async def claim_probe(self, id: str, *, all_held: bool = False) -> Claimed:
        """Take this one due row that nobody holds, as `claim` does."""
        asked_at = time.monotonic()
        try:
            claims = await self._take_up([id], 1, held_for=self._held_for(all_held=all_held))
        except StatementRejected as refusal:
            if refusal.sqlstate in (
                errors.UniqueViolation.sqlstate,
                errors.LockNotAvailable.sqlstate,
            ):
                return self._refused(asked_at, refusal)
            if not refusal.of_a_row:
                raise
            self._put_aside(id, asked_at)
            return Claimed([], asked_at, stranded=[(id, refusal.reason)])
        confirmed = not claims or self._confirmed(self._claims)
        return Claimed(claims, asked_at, confirmed=confirmed)

    def _refused(self, asked_at: float, refusal: StatementRejected) -> Claimed:
        """PostgreSQL refused a claim for what others do at the moment. (Under a cap of the fleet it
        may be another worker's claim that was waited for.)"""
        locked = refusal.reason if refusal.is_table_lock and self._fleet is None else None
        return Claimed([], asked_at, refused=True, locked=locked)

    def _confirmed(self, connection: QueryConnection) -> bool:
        """Whether the transaction that this connection has just answered, and that wrote, is
        committed as PostgreSQL is told to commit."""
        confirmed = not connection.unreplicated
        self._committed(confirmed)
        return confirmed

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
            "queues": self._queues,
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
            "queues": self._queues,
        }
        found = (await self._claims.ask(self._sql["ended_leases"], values))[0]
        self._leave_to_owners(found["locked"])
        self._room = math.inf if found["room"] is None else found["room"]
        if found["waited"] > WAITED_MOST:
            # The table was locked a moment ago, or PostgreSQL stood still: no owner could renew.
            self._leave_to_owners(found["ids"])
            return EndedLeases([], [])
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
                return self._refused(asked_at, refusal)
            if not refusal.of_a_row:
                raise
            if len(ids) > 1:
                found: list[Claim] = []
                stranded: list[tuple[str, str]] = []
                confirmed = True
                for id in ids:
                    if len(found) < most:
                        one = await self.take_up([id], in_hand)
                        found += one.claims
                        stranded += one.stranded
                        confirmed = confirmed and one.confirmed
                return Claimed(found, asked_at, stranded=stranded, confirmed=confirmed)
            self._put_aside(ids[0], asked_at)
            return Claimed([], asked_at, stranded=[(ids[0], refusal.reason)])
        confirmed = not claims or self._confirmed(self._claims)
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
        return Claimed(claims, asked_at, confirmed=confirmed)

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
        confirmed = True
        tried = [id for id, aside in self._aside.items() if aside.until <= asked_at]
        if self._alone_next or not tried:
            values = {
                "aside": list(self._aside),
                "most": ALONE_MOST,
                "queues": self._queues,
            }
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
                    confirmed = self._confirmed(self._claims) and confirmed
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
        return Claimed(claims, asked_at, refused=True, stranded=stranded, confirmed=confirmed)

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

    def leave_to_others(self, ids: Iterable[str]) -> None:
        """Skip these rows for a while, as other workers can run them and this one can't: longer
        each time."""
        now = time.monotonic()
        for id in ids:
            before = self._left_for.get(id)
            pause = ASIDE_FIRST if before is None else min(ASIDE_MOST, 2 * before)
            if len(self._left_for) >= LEFT_MOST:
                self._left_for.clear()
            self._left_for[id] = pause
            self._aside[id] = _Aside(now + pause, pause)

    async def known_elsewhere(self, zones: Collection[str]) -> set[str]:
        """Those of these zones, unknown to this worker's tzdata, that others know, or may know."""
        now = time.monotonic()
        known = {zone: found for zone, found in self._zones_elsewhere.items() if found[1] > now}
        if asked := [zone for zone in zones if zone not in known]:
            values = {
                "names": asked,
                "silence": NOT_READY_AFTER,
                "tzdata": TZDATA,
                "queues": self._queues,
                **self._claims.identity.known,
            }
            rows = await self._claims.ask(self._zones["known_elsewhere"], values)
            found = {row["name"] for row in rows}
            known = dict(list(known.items())[-ZONES_MOST:])
            known |= {zone: (zone in found, now + ZONES_ELSEWHERE_FOR) for zone in asked}
        self._zones_elsewhere = known
        return {zone for zone in zones if known[zone][0]}

    async def stale(self, left: Collection[str]) -> list[Stale]:
        """Cron recalls whose moments were computed by older time zone data than this worker's, but
        for those in `left`; at most STALE_MOST. None for a worker that is paused."""
        if self._paused:
            return []
        values = {"tzdata": TZDATA, "left": list(left), "most": STALE_MOST}
        return [Stale(**row) for row in await self._claims.ask(self._zones["stale"], values)]

    async def replan(self, moments: Sequence[tuple[Stale, At | None, bool]]) -> set[str]:
        """Write their moments by this worker's time zone data, except where a row is locked, or was
        changed or claimed meanwhile. None: the row stays as it is. The third: whether its moment
        is another one now. Returns the ids of those that were written."""
        values = {
            "ids": [stale.id for stale, _, _ in moments],
            "triggers": [stale.trigger for stale, _, _ in moments],
            "edits": [stale.edits for stale, _, _ in moments],
            "ats": [at.when if at is not None and moved else None for _, at, moved in moments],
            "distances": [None if at is None else at.distance for _, at, _ in moments],
            "tzdata": TZDATA,
        }
        rows = await self._claims.ask(self._zones["replan"], values)
        return {row["id"] for row in rows}

    async def next_due(self, *, claimed_at: float | None) -> NextDue:
        """When the next row is due, and whether rows are due now that were not claimed.

        `claimed_at`: the monotonic instant of the last claim that asked for all that is due; None:
        there was none.
        """
        asked_at = time.monotonic()
        values = {
            "aside": list(self._aside),
            "passed_most": PASSED_MOST,
            "queues": self._queues,
        }
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
            paused=frozenset(found["paused"]),
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
                "rekeys": [p.rekey for _, p in placements],
                "edits": [c.edits for c, _ in placements],
                "tzdata": TZDATA,
            },
        )
        written = {row["id"]: row["edits"] for row in rows}
        return [_placed(c, p, written[c.id]) for c, p in placements if c.id in written]

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
                n.when.distance if n is not None and isinstance(n.when, At | AsMoved) else None
                for n in nexts
            ],
            "rekeys": [
                None if n is None else next_rekey(claim, n.occurrence, called=claim.begun)
                for (claim, _), n in zip(verdicts, nexts, strict=True)
            ],
            "edits": [claim.edits for claim, _ in verdicts],
            "tzdata": TZDATA,
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

    async def probe(
        self, endpoint: str, open_for: float, *, wanted: bool, fresh: bool, pause_most: float
    ) -> Probe:
        """While our breaker is open, for `open_for` seconds now: whether any worker found the
        endpoint answering, and the fleet's next probe, where it is ours. `wanted`: we want to make
        it. `fresh`: only of a session that is not known as bad. `pause_most`: seconds between two
        probes at most."""
        values = {
            "endpoint": endpoint,
            "open_for": open_for,
            "wanted": wanted,
            "fresh": fresh,
            "pause_most": pause_most,
            "queues": self._queues,
            "aside": list(self._aside),
            "lease_end_most": LEASE_END_MOST,
        }
        row = (await self._claims.ask(self._sql["probe"], values))[0]
        return Probe(row["id"], row["answered"], row["next_in"])

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
            rows = await self._renewals.ask(self._sql["renew"], values)
        except StatementRejected as refusal:
            if not refusal.of_a_row:
                raise
        else:
            states = {row["id"]: row["state"] for row in rows}
            if "renewed" in states.values():
                # On this server alone it is a renewal, too: it keeps a run that goes on, and begins
                # none.
                self._confirmed(self._renewals)
            return states
        # One row that can't be written must not cost the others their leases.
        if len(leases) == 1:
            return dict.fromkeys(leases, "locked")
        half, given = len(leases) // 2, list(leases.items())
        return await self.renew(dict(given[:half]), sent_ago) | await self.renew(
            dict(given[half:]), sent_ago
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
        batch, each is written alone. Raises StatementRejected where the schema lets none be
        written; where it is one row that a trigger refuses in this way, that row is tried again as
        a locked one is.
        """
        try:
            return await self._settle(batch)
        except StatementRejected as refusal:
            if len(batch) > 1:
                return await self._settle_one_by_one(batch)
            if refusal.of_the_schema:
                raise
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

    async def _settle_one_by_one(self, batch: Sequence[tuple[Ending, Verdict]]) -> list[Settlement]:
        answers: list[Settlement] = []
        refusal: StatementRejected | None = None
        refused = 0
        for one in batch:
            try:
                answers += await self.settle([one])
            except StatementRejected as error:
                refusal, refused = error, refused + 1
                answers.append(Locked())
        if refusal is not None and refused == len(batch):
            raise refusal
        return answers

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
        values = columns | {"worker": self._worker, "tzdata": TZDATA}
        # To wait, lock the rows first in the same transaction: then the settle does not skip them.
        before = (self._sql["wait_for"], {"ids": columns["ids"]}) if waiting else None
        connection = self._patient if waiting else self._settles
        answers = await connection.ask(self._sql["settle"], values, after=before)
        if any(row["state"] == "settled" for row in answers):
            self._confirmed(connection)
        by_lease = {(row["id"], row["lease"]): row for row in answers}
        moved = [row["id"] for row in answers if row["state"] == "moved"]
        schedules = await self._schedules(moved) if moved else {}
        return [
            _settlement(by_lease[claim.id, claim.lease], schedules.get(claim.id, {}))
            for claim in (ending.claim for ending, _ in batch)
        ]

    async def _schedules(self, ids: list[str]) -> dict[str, dict[str, Any]]:
        """Of these rows, the fields of a claim that say when it is due and how it recurs. A row
        that is gone is left out."""
        rows = await self._settles.ask(self._sql["schedules"], {"ids": ids})
        return {row["id"]: _schedule(row) for row in rows}

    async def heartbeat(
        self,
        facts: Mapping[str, Any],
        settings: Mapping[str, Any],
        in_hand: Collection[str] = (),
        *,
        all_held: bool = False,
    ) -> int:
        """Record that this worker runs. Returns how many other workers come before it that are
        running, have free slots, and are listening.

        `in_hand`: as for `ended_leases`. `all_held`: end no lease of a paused recall: after an
        outage, or a lock, its owner may be alive.
        """

        def values() -> dict[str, Any]:
            held = self.held
            return {
                **facts,
                **self._claims.identity.known,
                "held": held,
                "worker": self._worker,
                "settings": json.dumps(settings),
                "grace": self._held_for(all_held=all_held),
                "in_hand": list(in_hand),
                "lease_end_most": LEASE_END_MOST,
                "abandoned_after": ABANDONED_AFTER,
                "not_ready_after": NOT_READY_AFTER,
                "forget_after": FORGET_AFTER,
                "run_timeout": self._run_timeout,
                "queues": self._queues,
                "generation": self._generation,
                # Leases of others are left alone by a worker that claims nothing.
                "most": ABANDONED_MOST if held is None else 0,
            }

        row = (await self._claims.ask(self._sql["heartbeat"], values, on_a_copy=True))[0]
        self._confirmed(self._claims)
        return int(row["ahead"])

    async def notify(self, channel: str) -> None:
        """Notify a channel: for the listener's self-test, which needs another connection."""
        await self._renewals.ask(self._sql["notify"], {"channel": channel})

    async def backlog(self, *, failures: bool = False) -> Backlog:
        """How much is due and unclaimed, and for how long: for monitoring. `failures`: also what
        waits to be told."""
        values = {
            "queues": self._queues,
            "most": BACKLOG_MOST,
            "queues_most": max(QUEUES_MOST, len(self._queues)),
            "silence": SERVES_AFTER,
            **self._claims.identity.known,
        }
        rows = await self._renewals.ask(self._sql["backlog"], values)
        queues = [QueueBacklog(**row) for row in rows]
        ours = [queue for queue in queues if queue.ours and not queue.paused]
        found = Backlog(
            sum(queue.overdue for queue in ours),
            max((queue.oldest for queue in ours), default=0.0),
            queues,
        )
        if not failures:
            return found
        values = {"queues": self._queues, "most": BACKLOG_MOST}
        told = (await self._renewals.ask(self._outbox["waiting"], values))[0]
        return replace(found, untold=told["untold"], oldest_untold=told["oldest"])

    async def next_failure(self) -> float | None:
        """Seconds until a failure is due to be told; None where none waits. By the connection of
        the renewals: it is asked each minute, and the outbox's own is closed as a rule."""
        rows = await self._renewals.ask(self._outbox["next"], {"queues": self._queues})
        return float(rows[0]["next_in"]) if rows else None

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
        await self._claims.ask(self._sql["deregister"], {"worker": self._worker}, on_a_copy=True)


def _claims_in(rows: Sequence[tuple[Any, ...]]) -> list[Claim]:
    """The oldest due first."""
    return sorted(map(_claim, rows), key=lambda claim: -claim.lag)


_DATED = {"begun_age": "begun_at", "lag": "due_at", "delivered_age": "delivered_at"}
_COLUMNS = tuple(_DATED.get(n, n) for n in Claim._fields if n not in ("lateness", "due"))
"""The columns of `claim`, `take_up` and `moved`: a claim's fields in order, with dates for ages."""
_NOW, _NOMINAL, _TRIGGER, _DUE_AT = map(
    _COLUMNS.index, ("claimed_at", "scheduled_for", "trigger_at", "due_at")
)
_DATES = ("scheduled_for", "trigger_at", "planned_at", "until", "edited_at", "named_at")
_CLAMPED = [_COLUMNS.index(n) for n in _DATES]
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


def _placed(claim: Claim, placement: Placement, edits: int) -> Claim:
    """A claim after its move was written."""
    when = placement.when
    nominal = when.when if isinstance(when, At) else claim.trigger_at
    return claim._replace(
        occurrence=placement.occurrence,
        rekey=placement.rekey,
        attempt=1,
        deferrals=0,
        begun_age=None,
        taken_from=None,
        missed=placement.missed,
        scheduled_for=nominal,
        planned_at=claim.trigger_at,
        skips=0,
        edit_of=None,
        named_at=None,
        edits=edits,
        uncounted=0,
        interval=claim.interval if when.distance is None else when.distance,
        lateness=claim.lateness + (claim.scheduled_for - nominal).total_seconds(),
    )


def _row(ending: Ending, verdict: Verdict, now: float, waiting: str) -> dict[str, Any]:
    """One verdict as values of the settle statement: the row's next state, and the call's
    record."""
    claim, outcome = ending.claim, ending.outcome
    fires: int | None = None
    wait: float | None = None
    uncounted: int | None = None
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
            rekey = next_rekey(
                claim,
                occurrence,
                called=not claim.extra and (claim.begun or called_ago is not None),
            )
            attempt, deferrals, fresh, uncounted = 0, 0, True, 0
            failures = verdict.failures
            match when:
                case After(delay):
                    pass
                case At(at, distance, jitter):
                    pass
                case AsMoved(distance):
                    pass
                case AsPlanned():
                    pass
                case never:
                    assert_never(never)
        case Retry(After(delay), anew, _, uncounted):
            if claim.extra:
                fires = min(LAST, claim.extra + (1 if anew else 0))
            else:
                rekey = min(LAST, rekey + (1 if anew else 0))
            deferrals = 0
        case Defer(After(delay), _, uncounted):
            attempt, deferrals = attempt - counted, min(LAST, deferrals + 1)
        case Release():
            attempt -= 0 if isinstance(outcome, Accepted) else 1
        case never_either:
            assert_never(never_either)
    stays = isinstance(verdict, Next) and isinstance(verdict.when, AsPlanned)
    if claim.extra and not isinstance(verdict, Finish | Next):
        # Due again at lease_until: trigger_at is when the planned occurrence is due.
        stays, wait, delay = True, ended_ago if delay is None else delay, None
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
            verdict.reason
            if isinstance(verdict, Next) and not isinstance(outcome, Answered)
            else verdict.reason or reason_of(outcome)
        ),
        "called_ago": called_ago,
        "ended_ago": ended_ago,
        "http_statuses": http_status_of(outcome),
        "call_occurrences": claim.occurrence,
        # Of an extra run, its number below zero.
        "call_rekeys": -claim.extra if claim.extra else claim.rekey,
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
        "edits": claim.edits,
        "replans": isinstance(verdict, Next) and verdict.replan,
        "uncounted": uncounted,
        "stays": stays,
        "waits": wait,
        "fires": fires,
    }


def clean_reason(reason: str | None) -> str | None:
    """A reason that is safe in any column and on any terminal: it may quote a server's answer."""
    return None if reason is None else escape_controls(reason[:REASON_MOST])


def _schedule(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `schedules` as fields of a claim."""
    now = {name: value for name, value in row.items() if name not in ("id", "lease")}
    for name in _DATES:
        if now.get(name) is not None:
            now[name] = clamped(now[name])
    return now


def _settlement(row: Mapping[str, Any], schedule: Mapping[str, Any]) -> Settlement:
    """`schedule`: as the row has it now, where it was changed in mid-run."""
    match row["state"]:
        case "settled":
            return Settled(row["status"])
        case "again":
            return Settled("before")
        case "moved":
            return Moved(schedule, row["as_settled"])
        case "locked":
            return Locked()
        case "lost":
            return LeaseLost()
        case "deleted":
            return Ended("deleted")
        case _:
            return Ended(row["status"])

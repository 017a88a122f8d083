"""Claims what is due and starts it, never more than the free slots; takes up what dead workers
left.

Owns the dispatch loop. `wake` decides when the next dispatch is due; at every turn the loop lets
all other tasks run. A dispatch claims first, lets the calls be sent, and then asks what is due
next.

What the database decides: what is due, and who holds it. Rows of dead workers are taken up one at a
time: until its request has been sent, such a row may be what killed that worker, and must not kill
several. Rows whose runs the API accepted are only polled, and are taken up together.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from .. import cadence
from .. import judge as judging
from ..database.connection import ClaimsHeld, DatabaseUnavailable, StatementRejected
from ..database.identity import COPY_HINT, IS_A_COPY, IS_PAUSED, PAUSED_HINT
from ..database.ledger import Claimed, Ledger, NextDue
from ..events import Events
from ..protocols import Call
from ..recall import Claim, Placement
from ..settings import Settings
from .database_status import DatabaseStatus
from .endpoint_status import Allowance, EndpointStatus
from .executor import Executor
from .run import RENEW_AT, Run, Runs
from .schema_status import SchemaStatus
from .wake import DispatchResult, Wake

OUTAGE_PAUSE = (0.1, 0.5)
"""Seconds, drawn at random, until the next try while PostgreSQL does not answer."""
LOCKED_PAUSE = (0.1, 0.5)
"""The same while the whole table is locked: each try waits a second for the lock."""
REFUSED_PAUSE = (1.0, 5.0)
"""The same after PostgreSQL refused a statement."""
TICK = 0.001
"""Seconds before an instant at which the loop stops sleeping and only yields: its sleeps are whole
milliseconds, rounded up."""
TOGETHER_LEAST, TOGETHER_MOST = 5, 100
"""Recalls that one claim takes at most: half of the slots, within these bounds. With all slots in
one claim, this process and PostgreSQL take turns waiting for each other."""
CALLS_FIRST = 0.001
"""Seconds in which calls may be sent before the query for what is due next."""
UNSEEN_MOST = 1.0
"""Seconds after which that query is sent even during a backlog."""
HELD_TOLD_EVERY = 3600.0
"""Seconds between two log lines that say that nothing is claimed."""
PROBED_AGAIN = 1.0
"""Seconds until a worker whose breaker is open checks its probe."""


class Dispatcher:
    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        runs: Runs,
        executor: Executor,
        endpoint: EndpointStatus,
        database: DatabaseStatus,
        schema: SchemaStatus,
        events: Events,
        wake: Wake,
        traceparent: Callable[[], str],
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._runs = runs
        self._executor = executor
        self._endpoint = endpoint
        self._database = database
        self._schema = schema
        self._events = events
        self._traceparent = traceparent
        self._wake = wake
        self._roused = asyncio.Event()
        self._leases_ended = True
        """Whether leases that are to be taken up may have ended, as of the last query for them."""
        self._unseen_since: float | None = None
        """Monotonic instant of the first claim since the last query for what is due next."""
        self._full = False
        """Whether the last claim took as much as it might: more may be due."""
        self._held_told_at: float | None = None
        """Monotonic instant of the last log line that says that nothing is claimed; None while
        claims are made."""
        self._paused: frozenset[str] = frozenset()
        """Those of our queues that were paused at the last query for what is due next."""
        self._stopped = False
        self.turned_at = time.monotonic()
        """Monotonic instant of the loop's last turn: for a watchdog."""

    # --- what happened ----------------------------------------------------------------------------

    def notified(self) -> None:
        """A notification came, or the listener has a new connection."""
        self._wake.notified(time.monotonic())
        self._roused.set()

    def changed(self) -> None:
        """PostgreSQL or the endpoint answers again."""
        self._wake.changed(time.monotonic())
        self._roused.set()

    def progressed(self) -> None:
        """A run has left its slot, or has proven safe: dispatch where something waits for that."""
        if self._full or self._leases_ended:
            self.changed()

    def run_ended(self, *, is_over: bool) -> None:
        """A run was settled. `is_over`: its recall will not be due again."""
        self._wake.run_ended(time.monotonic(), is_over=is_over, awaited=self._endpoint.is_open)
        self._roused.set()

    def stop(self) -> None:
        """Claim no more."""
        self._stopped = True
        self._roused.set()

    # --- the loop ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Dispatch whenever it is time. Returns when stopped."""
        while not self._stopped:
            self._roused.clear()
            self.turned_at = now = time.monotonic()
            wait = self._wake.seconds(now)
            if wait > 0:
                await self._sleep(now + wait)
                continue
            # Let all other tasks run, however often this loop turns.
            await asyncio.sleep(0)
            claims = self._wake.begin(time.monotonic())
            # What was refused is tried again, whether anything is due or not.
            found = await self.dispatch_once(claims=claims or self._schema.reason is not None)
            self._wake.dispatched(found, time.monotonic())

    async def _sleep(self, until: float) -> None:
        """Sleep until an instant, or until something wakes us, and report how late it was: the
        process may have been stopped meanwhile."""
        try:
            async with asyncio.timeout(until - time.monotonic() - TICK):
                await self._roused.wait()
        except TimeoutError:
            while time.monotonic() < until and not self._roused.is_set():  # noqa: ASYNC110 - for less than a TICK
                await asyncio.sleep(0)
        self._database.woke(time.monotonic() - until)

    async def dispatch_once(self, *, claims: bool) -> DispatchResult:
        """Claim what is due and start it. `claims`: claim at once; else first ask whether anything
        is due."""
        if self._settings.paused:
            return self._held(IS_PAUSED, PAUSED_HINT)
        try:
            allowance = await self._endpoint.allowance(self._runs.free_slots)
            if allowance.slots <= 0:
                return DispatchResult(blocked=True, again_in=allowance.changes_in)
            found = await self._dispatch(allowance, claims=claims)
            if self._held_told_at is not None:
                self._held_told_at = None
                self._events.tell("claims.resumed")
            return found
        except ClaimsHeld:
            self._database.found()
            return self._held(IS_A_COPY, COPY_HINT)
        except DatabaseUnavailable as outage:
            self._database.lost(outage.reason, outage.asked_at)
            return DispatchResult(blocked=True, again_in=random.uniform(*OUTAGE_PAUSE))
        except StatementRejected as refusal:
            if refusal.is_table_lock:
                self._database.locked(refusal.reason)
                return DispatchResult(blocked=True, again_in=random.uniform(*LOCKED_PAUSE))
            if refusal.of_the_schema:
                self._schema.refused("claim", refusal)
            else:
                self._events.tell("worker.error", doing="claim", reason=refusal.reason)
            return DispatchResult(blocked=True, again_in=random.uniform(*REFUSED_PAUSE))

    def _held(self, reason: str, hint: str) -> DispatchResult:
        """Nothing is claimed: on a copy until `migrate --here`, which the next poll notices."""
        now = time.monotonic()
        if self._held_told_at is None or now >= self._held_told_at + HELD_TOLD_EVERY:
            self._held_told_at = now
            self._events.tell("claims.held", reason=reason, hint=hint)
        return DispatchResult(blocked=True)

    async def _dispatch(self, allowance: Allowance, *, claims: bool) -> DispatchResult:
        probing = self._endpoint.is_open
        slots = min(
            allowance.slots,
            max(TOGETHER_LEAST, min(TOGETHER_MOST, self._settings.concurrency // 2)),
        )
        tried = self._leases_ended and self._database.may_take_expired
        taken = await self._take_up(slots, probing=probing) if tried else 0
        if taken >= slots:
            return self._filled(taken)
        next_due = None
        if not claims and taken == 0 and allowance.probe is None:
            next_due = await self._ask_next_due(None)
            if not next_due.waiting:
                return self._seen(0, next_due, tried=tried)
        all_held = not self._database.may_take_expired
        claimed = await (
            self._ledger.claim(slots - taken, all_held=all_held)
            if allowance.probe is None
            else self._ledger.claim_probe(allowance.probe, all_held=all_held)
        )
        self._tell_claimed(claimed)
        self._schema.fits("claim")
        await self._start(claimed, probing=probing)
        taken += len(claimed.claims)
        self._full = taken >= slots
        if not claimed.confirmed:
            return DispatchResult(taken, blocked=True, again_in=random.uniform(*OUTAGE_PAUSE))
        if claimed.locked is not None:
            return DispatchResult(
                taken, unfinished=True, blocked=True, again_in=random.uniform(*LOCKED_PAUSE)
            )
        if claimed.refused:
            return DispatchResult(taken, unfinished=True, blocked=True)
        self._unseen_since = self._unseen_since or claimed.asked_at
        # Calls first: the query for what is due next would keep PostgreSQL and this process busy. A
        # notification meanwhile starts another dispatch, and while all slots are filled nobody
        # needs the answer.
        if claimed.claims and time.monotonic() < self._unseen_since + UNSEEN_MOST:
            if self._full:
                return self._filled(taken)
            self._wake.asks_next_due()
            if await self._is_called(CALLS_FIRST):
                return DispatchResult(taken)
        next_due = await self._ask_next_due(claimed.asked_at)
        return self._filled(taken) if self._full else self._seen(taken, next_due, tried=tried)

    def _filled(self, taken: int) -> DispatchResult:
        """The slots are filled. The end of a run wakes us; some may have ended meanwhile. A running
        probe is checked, as its silence may close the breaker."""
        if self._endpoint.is_open:
            return DispatchResult(taken, full=True, again_in=PROBED_AGAIN)
        return DispatchResult(taken, full=True, has_room=self._runs.free_slots > 0)

    def _seen(self, taken: int, next_due: NextDue, *, tried: bool) -> DispatchResult:
        # The next dispatch takes up the leases that have ended, unless this one has tried: then
        # something blocks those that are left.
        ended = next_due.ended and not tried
        may_take_in = self._database.may_take_expired_in if ended else 0.0
        return DispatchResult(
            taken,
            waiting=next_due.waiting,
            fell_due=next_due.fresh,
            ended=ended and may_take_in == 0 and not self._runs.any_unproven,
            due_at=None if next_due.next_in is None else next_due.asked_at + next_due.next_in,
            unfinished=next_due.moved,
            again_in=may_take_in or None,
        )

    async def _is_called(self, within: float) -> bool:
        """Whether anything asks for another dispatch within so many seconds."""
        if self._wake.is_called:
            return True
        self._roused.clear()
        try:
            async with asyncio.timeout(within):
                while not self._wake.is_called:
                    await self._roused.wait()
                    self._roused.clear()
        except TimeoutError:
            return False
        return True

    async def _ask_next_due(self, claimed_at: float | None) -> NextDue:
        self._wake.asks_next_due()
        next_due = await self._ledger.next_due(claimed_at=claimed_at)
        self._leases_ended = next_due.ended
        self._database.found()
        self._unseen_since = None
        self._tell_paused(next_due.paused)
        if next_due.moved:
            await self._settle_moved()
        return next_due

    def _tell_paused(self, paused: frozenset[str]) -> None:
        """Log which of our queues were paused or resumed since we last knew: each once."""
        for queue in sorted(paused - self._paused):
            self._events.tell(
                "queue.paused", queue=queue, hint="recall-worker queues says since when and why"
            )
        for queue in sorted(self._paused - paused):
            self._events.tell("queue.resumed", queue=queue)
        self._paused = paused

    async def _settle_moved(self) -> None:
        """Put cron recalls that plain SQL inserted or moved on ticks of their cron expressions, so
        that the application's next skip adds the right distance."""
        moved = await self._ledger.moved()
        left = await self._leave_to_others(moved)
        moved = [claim for claim in moved if claim.id not in left]
        for id, reason in await self._ledger.settle_moved(
            [(claim, judging.planned(claim, random.random)) for claim in moved]
        ):
            self._events.tell("recall.stranded", recall=id, error=reason)

    async def _leave_to_others(self, claims: list[Claim]) -> set[str]:
        """Leave those of these recalls alone whose zone this worker's tzdata lacks and others know.
        Returns their ids. A zone that nobody knows is the row's own fault, and ends it."""
        zones = {
            claim.id: zone for claim in claims if (zone := cadence.foreign_zone(claim)) is not None
        }
        if not zones:
            return set()
        try:
            known = await self._ledger.known_elsewhere(set(zones.values()))
        except (DatabaseUnavailable, StatementRejected):
            known = set(zones.values())  # Not known to be nobody's: no row is ended for that.
        left = {id for id, zone in zones.items() if zone in known}
        self._ledger.leave_to_others(left)
        for id in left:
            self._events.tell(
                "recall.stranded",
                recall=id,
                error=(
                    f"its time zone {zones[id]!r} is not in tzdata {cadence.TZDATA}, which this "
                    "worker has: left to other workers; upgrade the package tzdata"
                ),
            )
        return left

    # --- taking up --------------------------------------------------------------------------------

    async def _take_up(self, slots: int, *, probing: bool) -> int:
        """Take up what dead workers left, within so many slots. Returns how many of these it used.

        While the breaker is open, accepted runs may fill all slots but one, which the probe needs:
        they are only polled.
        """
        in_hand = self._runs.in_doubt(self._settings.lease)
        ended = await self._ledger.ended_leases(in_hand)
        self._database.found()
        room = max(slots, min(TOGETHER_MOST, self._runs.free_slots - 1)) if probing else slots
        self._leases_ended = len(ended.accepted) > room or len(ended.unanswered) > 0
        used = await self._take(ended.accepted[:room], in_hand, probing=probing)
        if probing:
            used = max(0, slots - self._runs.free_slots)
        if ended.unanswered and used < slots and not self._runs.any_unproven:
            # Only one: the oldest that is not locked.
            used += await self._take(ended.unanswered, in_hand, probing=probing, most=1)
        return used

    async def _take(
        self, ids: list[str], in_hand: list[str], *, probing: bool, most: int | None = None
    ) -> int:
        if not ids:
            return 0
        claimed = await self._ledger.take_up(ids, in_hand, most=most)
        self._tell_claimed(claimed)
        await self._start(claimed, probing=probing)
        return len(claimed.claims)

    # --- starting ---------------------------------------------------------------------------------

    def _tell_claimed(self, claimed: Claimed) -> None:
        self._database.found()
        if claimed.locked is not None:
            self._database.locked(claimed.locked)
        elif not claimed.refused:
            self._database.unlocked()
        # While commits wait for a standby one turn of the loop takes several deadlines.
        self.turned_at = time.monotonic()
        took = round((time.monotonic() - claimed.asked_at) * 1000, 1)
        self._events.tell("claim.answered", recalls=len(claimed.claims), took_ms=took)
        for id, reason in claimed.stranded:
            self._events.tell("recall.stranded", recall=id, error=reason)

    async def _start(self, claimed: Claimed, *, probing: bool) -> None:
        left = await self._leave_to_others(claimed.claims)
        placements = [
            (claim, placement)
            for claim in claimed.claims
            if (placement := judging.resolve_move(claim)) is not None
        ]
        to_place = {claim.lease for claim, _ in placements}
        placed = await self._write_moves(placements) if placements else {}
        for claim in claimed.claims:
            call = Call(
                placed.get(claim.lease, claim), claimed.asked_at, traceparent=self._traceparent()
            )
            held_until = claimed.asked_at + self._settings.lease
            run = Run(call, held_until, held_until, reference=claim.reference)
            self._events.tell(
                "recall.claimed",
                recall=claim.id,
                session=claim.session_id,
                occurrence=call.claim.occurrence,
            )
            if claim.taken_from is not None:
                self._forget(claim)
                self._events.tell(
                    "lease.taken",
                    recall=claim.id,
                    session=claim.session_id,
                    worker_before=claim.taken_from,
                )
            self._runs.add(run)
            unsent = (
                "its time zone is not known to this worker"
                if claim.id in left
                else "moved by the application"
                if claim.lease in to_place and claim.lease not in placed
                else "stopping"
                if self._stopped
                else "no synchronous standby has confirmed its claim"
                if not claimed.confirmed and claim.reference is None
                else "its claim was answered too late"
                if time.monotonic() > held_until - self._settings.lease * RENEW_AT
                else None
            )
            if unsent is not None:
                self._executor.give_back(run, unsent)
                continue
            if probing and claim.reference is None:
                self._endpoint.probing(call)
            run.task = asyncio.create_task(self._executor.execute(run))

    def _forget(self, claim: Claim) -> None:
        """If the row was ours before, that lease ended with this claim: abort the run under it."""
        for run in self._runs:
            if run.claim.id == claim.id:
                run.abort("lost")

    async def _write_moves(self, placements: list[tuple[Claim, Placement]]) -> dict[object, Claim]:
        """Write the moves of the claims that are to run now. Returns those by lease, as they are
        after it; the others go back as moved."""
        try:
            placed = await self._ledger.write_moves(
                [(claim, to) for claim, to in placements if judging.runs_now(claim, to)]
            )
        except (DatabaseUnavailable, StatementRejected):
            return {}  # Put back unsent: the settle applies the move.
        for claim in placed:
            self._events.tell(
                "recall.moved",
                recall=claim.id,
                session=claim.session_id,
                occurrence=claim.occurrence,
            )
        return {claim.lease: claim for claim in placed}

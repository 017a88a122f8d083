"""The worker: wakes, claims never more than its free slots, makes the calls, and hands every ending to the settler.

All its loops are supervised together: one that ends by a defect ends the worker, loudly, after its runs were given back.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar
from uuid import UUID

from .. import judge as judging
from ..bell import Bell
from ..events import Events
from ..ledger import Ahead, Backlog, Claimed, Ledger
from ..line import Deadlines, Outage, Refusal
from ..protocols import Call, Protocol, hushed, traceparent
from ..recall import FINAL, Accepted, Answered, Capped, Claim, Ending, Misconfigured, Outcome, Placement, Unknown, Unsent
from ..settings import Settings
from .breaker import Breaker
from .keeper import Keeper
from .pruner import Pruner
from .reach import Reach
from .run import Run
from .settler import Settler

FLOOR_FIRST, FLOOR_MOST = 0.05, 1.0
"""Seconds between two looks at something due that can't be claimed: doubling from the first to the most."""
OUTAGE_PAUSE = (0.1, 0.5)
TICK = 0.001
"""Seconds before an instant from which on the loop turns without sleeping: its sleeps are whole milliseconds, rounded up."""
HEARTBEAT_LEAST, HEARTBEAT_MOST = 5.0, 60.0
"""Seconds between two heartbeats: the lease, within these bounds. At its start, and after one that failed, a worker's next comes after the least."""
FIRST = 2
"""Replicas that look at once when it rings or something falls due. In a fleet one claim finds it, and all others were for nothing."""
STAGGER, STAGGER_MOST = 0.01, 0.25
"""Seconds by which each further replica looks later than the one before it, should those have died, or be full. What rings meanwhile is one look."""
TOGETHER_LEAST, TOGETHER_MOST = 5, 100
"""Recalls that one claim takes at most: half of the slots, within these bounds. With all slots in one claim this process and PostgreSQL come to
wait for each other by turns."""
CALLS_FIRST = 0.001
"""Seconds for which calls go before the question what is due next."""
UNSEEN_MOST = 1.0
"""Seconds after which that is asked in the midst of a backlog, too."""
ENDED = (*FINAL, "deleted")
"""What the application can make of a recall in mid-run."""
LET_GO = (*ENDED, "lost")
SETTLE_PATIENCE = 10.0
"""Seconds that a stopping worker waits for its last settles; leases that are not settled by then end by themselves."""

PRUNE_PATIENCE = 1.0
"""Seconds that it waits besides for a batch that is being pruned."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Vitals:
    """How a worker is, as it knows itself."""

    slots: int
    slots_in_use: int
    breaker: str
    """open or closed"""
    bell: str
    """listening, lost or unheard"""
    database_is_lost: bool
    is_draining: bool


class Worker:
    """One replica. `run()` works until `stop()` is called (drain) and, if need be, called again (release now)."""

    def __init__(self, settings: Settings, protocol: Protocol, events: Events, name: str) -> None:
        assert settings.dsn is not None
        self.name = name
        self._settings = settings
        self._protocol = protocol
        self._events = events
        self._policy = judging.Policy(
            busy_delay=settings.busy_delay, max_attempts=settings.max_attempts, give_up=settings.give_up
        )
        self._ledger = Ledger(settings.dsn, name, settings.lease, fleet=settings.fleet_concurrency)
        self._endpoint = hashlib.sha256((settings.run_url or "").encode()).hexdigest()[:16]
        self._shout: asyncio.Task[None] | None = None
        deadlines = Deadlines.within(settings.lease)
        self._bell = Bell(settings.listen_dsn or settings.dsn, name, self._ring, self._echo, events, deadlines)
        self._reach = Reach(events, settings.lease)
        self._settler = Settler(self._ledger, self._policy, events, self._reach, self._free)
        self._keeper = Keeper(self._ledger, settings.lease, self._reach, self._held, self._let_go)
        self._breaker = Breaker()
        self._runs: dict[UUID, Run] = {}
        self._slots_in_use = 0
        """Of these, those that hold a slot. The others were answered, and wait to be settled."""
        self._wake = asyncio.Event()
        self._expects = True
        """Whether whoever woke us expects something to be claimed. Who merely came by sees first whether there is anything: that is cheap."""
        self._waits = True
        """Whether something may wait for a run of ours to end: as of the last look, and of what rang since."""
        self._freed = False
        """Whether a run has ended since the last look began."""
        self._expired = True
        """Whether leases may have ended that are to be taken: as of when that was asked last. A claim that takes none is the quicker one."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._beat_now = asyncio.Event()
        self._ahead = 0
        """How many others are at hand before us, as of the last beat."""
        self._unseen_since: float | None = None
        """The first claim since it was asked what is due next."""
        self._later: asyncio.TimerHandle | None = None
        self._floor = FLOOR_FIRST
        self._more_waits = False
        """Whether the last claim took as much as it might: more may be due."""
        self.turned_at = time.monotonic()
        """Monotonic instant of the claim loop's last turn: what a watchdog should look at."""
        self.before_heartbeat: Callable[[], Awaitable[None]] | None = None
        """What else is looked at whenever a heartbeat is due. May raise Outage, Refusal."""
        self._refused: Exception | None = None
        self.traceparent: Callable[[], str] = traceparent
        """What a call's header of that name is made by: whoever writes traces puts its own in here."""
        keep = settings.keep
        self._pruner = Pruner(self._ledger, keep, self._reach, events, self._stop) if keep else None
        self._reach.on_return(self._look_soon)
        self._reach.on_return(self._bell.doubt)
        events.listen(lambda event, _: self._beat_now.set() if event.startswith("bell.") else None)

    # --- from outside --------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Claim no more and let the runs end, at most RECALL_DRAIN_TIMEOUT; called again: give them back now."""
        if self._stop.is_set():
            if not self._hurry.is_set():
                self._events.tell("worker.hurried", runs=len(self._runs))
            self._hurry.set()
        else:
            self._events.tell("worker.draining", runs=len(self._runs), timeout_s=self._settings.drain_timeout)
            self._stop.set()
            self._wake.set()

    def refuse(self, reason: Exception) -> None:
        """Claim no more and let the runs end, as with `stop()`; then `run()` raises `reason`."""
        if self._refused is None and not self._stop.is_set():
            self._refused = reason
            self.stop()

    @property
    def bell_is_listening(self) -> bool:
        return self._bell.listening

    @property
    def vitals(self) -> Vitals:
        return Vitals(
            slots=self._settings.concurrency,
            slots_in_use=self._slots_in_use,
            breaker=self._breaker.state,
            bell=self._bell.state,
            database_is_lost=self._reach.is_lost,
            is_draining=self._stop.is_set(),
        )

    async def schema(self) -> tuple[int, int]:
        """The schema's version and the oldest code that can work with it. Raises Outage, Refusal."""
        return await self._heard(self._ledger.schema())

    async def backlog(self) -> Backlog:
        """What is due in the table and in nobody's hand. Raises Outage, Refusal."""
        return await self._heard(self._ledger.backlog())

    async def _heard(self, answer: Awaitable[T]) -> T:
        """An answer for somebody outside; whether there is one is for all to know."""
        try:
            heard = await answer
        except Outage as outage:
            self._reach.lost(outage.reason)
            raise
        self._reach.found()
        return heard

    async def run(self) -> None:
        """Work until stopped. Raises ExceptionGroup where a loop broke by a defect, after giving the runs back, and what `refuse()` was given."""
        self._events.tell("worker.started", **{k: v for k, v in self._settings.shown().items() if v is not None})
        try:
            async with asyncio.TaskGroup() as loops:
                helpers = [
                    loops.create_task(work, name=name)
                    for name, work in (
                        ("bell", self._bell.run()),
                        ("settler", self._settler.run()),
                        ("renewals", self._keeper.renew()),
                        ("looks", self._keeper.look()),
                        ("ends of leases", self._keeper.let_go_in_time()),
                        ("beats", self._beat()),
                    )
                ]
                pruning = loops.create_task(self._pruner.run(), name="pruner") if self._pruner is not None else None
                await self._claim_until_stopped()
                await self._drain()
                if pruning is not None:
                    # It has seen the stop, and ends by itself: after the batch that it is at.
                    await asyncio.wait((pruning,), timeout=PRUNE_PATIENCE)
                    helpers.append(pruning)
                for helper in helpers:
                    helper.cancel()
        finally:
            for run in self._runs.values():
                run.abort("the worker broke")
            await self._protocol.close()
            await self._say_goodbye()
            await self._ledger.close()
        self._events.tell("worker.stopped")
        if self._refused is not None:
            raise self._refused

    # --- waking and claiming -------------------------------------------------------------------------------------

    def _look_soon(self, *, expects: bool = True) -> None:
        self._expects |= expects
        self._wake.set()

    def _ring(self) -> None:
        self._floor = FLOOR_FIRST
        self._waits = True
        if self._runs:
            self._keeper.ring()
        if self._courtesy == 0:
            self._look_soon()
        elif self._later is None:
            self._later = asyncio.get_running_loop().call_later(self._courtesy, self._look_after_others)

    def _look_after_others(self) -> None:
        self._later = None
        self._look_soon(expects=False)

    @property
    def _courtesy(self) -> float:
        """Seconds for which others come first."""
        return min(STAGGER_MOST, STAGGER * max(0, self._ahead - FIRST + 1))

    async def _echo(self, channel: str) -> None:
        """Ring the bell itself. It goes over the line of the renewals: an outage may show here first, and holds them up."""
        try:
            await self._ledger.ring(channel)
        except Outage as outage:
            self._reach.lost(outage.reason, outage.asked_at)
            # Whether it is found again is for those to say who write: a standby, too, can be rung.
            self._look_soon()
            raise

    async def _claim_until_stopped(self) -> None:
        while not self._stop.is_set():
            # Cleared before the look, never after: what rings meanwhile is heard.
            self._wake.clear()
            expects, self._expects = self._expects, False
            wait = await self._look(merely=not expects)
            self.turned_at = time.monotonic()
            if wait > 0:
                try:
                    async with asyncio.timeout(wait - TICK):
                        await self._wake.wait()
                except TimeoutError:
                    while time.monotonic() < self.turned_at + wait and not self._wake.is_set():  # noqa: ASYNC110 - for less than a TICK
                        await asyncio.sleep(0)
                self._reach.woke(time.monotonic() - self.turned_at - wait)
                self.turned_at = time.monotonic()

    async def _look(self, *, merely: bool) -> float:
        """Claim what is due and start it. Returns seconds until the next look, unless something wakes us before.

        `merely`: see first whether there is anything.
        """
        most = self._settings.poll_interval
        self._waits, self._freed = True, False
        was_open = self._breaker.is_open
        allowed, changes_in = self._breaker.allowance(time.monotonic())
        if was_open and not self._breaker.is_open:
            self._events.tell("breaker.closed", reason="the probe was taken and is being run")
        slots = self._free_slots
        try:
            if allowed is not None and slots > 0:
                allowed, changes_in = await self._share_probes(allowed, changes_in)
        except (Outage, Refusal):
            allowed, changes_in = 0, 1.0
        if allowed is not None:
            slots = min(slots, allowed)
        if slots <= 0:
            return min(most, changes_in) if allowed is not None else most
        slots = min(slots, max(TOGETHER_LEAST, min(TOGETHER_MOST, self._settings.concurrency // 2)))
        expired = False
        try:
            ahead = await self._see_ahead(None) if merely else None
            if ahead is None or ahead.waiting:
                expired = self._expired and self._reach.may_take_expired
                claimed = await self._ledger.claim(slots, take_expired=expired, in_hand=self._in_doubt())
                self._reach.found()
                took = round((time.monotonic() - claimed.asked_at) * 1000, 1)
                self._events.tell("claim.answered", recalls=len(claimed.claims), took_ms=took)
                for id, reason in claimed.stranded:
                    self._events.tell("recall.stranded", recall=id, error=reason)
                await self._start(claimed, probing=allowed is not None)
                if claimed.refused:
                    self._expects = True
                    return min(most, self._next_floor())
                self._more_waits = len(claimed.claims) >= slots
                self._unseen_since = self._unseen_since or claimed.asked_at
                # The calls go first: PostgreSQL and this process would otherwise be busy with what comes next. What rings meanwhile is a look of
                # its own, and while all slots are filled nobody needs to know.
                if claimed.claims and time.monotonic() < self._unseen_since + UNSEEN_MOST:
                    if self._more_waits:
                        return self._until_room(most)
                    self._waits = False  # For a run that ends until then the question that follows is early enough.
                    if await self._is_rung(CALLS_FIRST):
                        return 0.0
                ahead = await self._see_ahead(claimed.asked_at, took_expired=expired)
                if self._more_waits:
                    return self._until_room(most)
        except Outage as outage:
            self._reach.lost(outage.reason, outage.asked_at)
            return random.uniform(*OUTAGE_PAUSE)
        except Refusal as refusal:
            self._events.tell("worker.stumbled", doing="claim", reason=refusal.reason)
            return random.uniform(1, 5)
        return self._until_next(ahead, most, took_expired=expired)

    def _until_room(self, most: float) -> float:
        """The end of a run wakes us; some may have ended meanwhile. A probe that is being run is looked after, as its silence may close the
        breaker."""
        self._waits = self._expects = True
        return min(most, 1.0) if self._breaker.is_open else most if self._free_slots <= 0 else 0.0

    async def _is_rung(self, within: float) -> bool:
        """Whether anything wakes us within so many seconds."""
        try:
            async with asyncio.timeout(within):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True

    async def _see_ahead(self, claimed_at: float | None, *, took_expired: bool = False) -> Ahead:
        # A run that ends meanwhile needs no look of its own: the answer tells whether anything can have waited for it.
        self._waits = False
        try:
            ahead = await self._ledger.ahead(
                take_expired=self._reach.may_take_expired,
                in_hand=self._in_doubt(),
                claimed_at=claimed_at,
                took_expired=took_expired,
            )
        finally:
            self._waits = True
        self._expired = ahead.expired
        self._reach.found()
        self._unseen_since = None
        if ahead.moved:
            await self._plan()
        return ahead

    async def _share_probes(self, allowed: int, changes_in: float) -> tuple[int | None, float]:
        """What the fleet knows: whether the endpoint answers others, and whose the next probe is."""
        now = time.monotonic()
        probe = await self._ledger.probe(self._endpoint, self._breaker.open_for(now), wanted=allowed > 0)
        if probe.answered:
            self._breaker.close()
            self._beat_now.set()
            self._events.tell("breaker.closed", reason="another worker found the endpoint answering")
            return None, 0.0
        if allowed > 0 and not probe.mine:
            wait = probe.next_in or 1.0
            self._breaker.postpone(now + wait)
            return 0, wait
        return allowed, changes_in

    def _until_next(self, ahead: Ahead, most: float, *, took_expired: bool) -> float:
        self._waits = ahead.waiting
        if ahead.fresh or (ahead.waiting and self._freed) or (ahead.expired and not took_expired):
            self._expects = True
            return 0.0
        if ahead.waiting or ahead.moved:
            # What stands in its way may go without a ring.
            most = min(most, self._next_floor())
            self._expects = True
        else:
            self._floor = FLOOR_FIRST
        if ahead.next_in is None:
            return most
        # The instant on our clock at which the row is due. PostgreSQL read its clock a little after we asked: should the
        # timer be early by that much, the next look says so and names the rest.
        wait = max(0.0005, ahead.asked_at + ahead.next_in + self._courtesy - time.monotonic())
        self._expects |= wait <= most and self._courtesy == 0
        return min(most, wait)

    def _next_floor(self) -> float:
        self._floor, wait = min(FLOOR_MOST, self._floor * 2), self._floor
        return wait

    async def _plan(self) -> None:
        """Put cron recalls that plain SQL inserted or moved on moments of theirs, so that the application's next skip adds the right distance."""
        await self._ledger.settle_moved([(claim, judging.planned(claim, random.random)) for claim in await self._ledger.moved()])

    async def _start(self, claimed: Claimed, *, probing: bool) -> None:
        placements = [(claim, placement) for claim in claimed.claims if (placement := judging.honour(claim)) is not None]
        to_place = {claim.lease for claim, _ in placements}
        placed = await self._place(placements) if placements else {}
        for claim in claimed.claims:
            call = Call(placed.get(claim.lease, claim), claimed.asked_at, traceparent=self.traceparent())
            held_until = claimed.asked_at + self._settings.lease
            run = Run(call, held_until, held_until)
            self._runs[claim.lease] = run
            self._slots_in_use += 1
            self._idle.clear()
            self._events.tell("recall.claimed", recall=claim.id, session=claim.session_id, occurrence=call.claim.occurrence)
            if claim.taken_from is not None:
                self._forget(claim)
                self._events.tell("lease.taken", recall=claim.id, session=claim.session_id, worker_before=claim.taken_from)
            unsent = (
                "moved by the application"
                if claim.lease in to_place and claim.lease not in placed
                else "stopping"
                if self._stop.is_set()
                else "its claim was answered too late"
                if time.monotonic() > held_until - self._settings.lease / 3
                else None
            )
            if unsent is not None:
                self._end(run, Unsent(unsent))
                continue
            if probing and claim.reference is None:
                self._breaker.probing(call)
            run.task = asyncio.create_task(self._run(run))

    def _forget(self, claim: Claim) -> None:
        """Should the row have been ours before, the lease of that time is gone with this claim."""
        for run in [run for run in self._runs.values() if run.claim.id == claim.id]:
            run.abort("lost")

    async def _place(self, placements: list[tuple[Claim, Placement]]) -> dict[UUID, Claim]:
        """Those that are to run now, as they stand after it; the others go back as moved."""
        try:
            placed = await self._ledger.place([(claim, to) for claim, to in placements if judging.runs_now(claim, to)])
        except (Outage, Refusal):
            return {}  # Put back unsent: the settle honours the move.
        for claim in placed:
            self._events.tell("recall.placed", recall=claim.id, session=claim.session_id, occurrence=claim.occurrence)
        return {claim.lease: claim for claim in placed}

    # --- runs ----------------------------------------------------------------------------------------------------

    async def _run(self, run: Run) -> None:
        outcome: Outcome
        try:
            outcome = hushed(await self._outcome(run), self._settings.run_token)
        except asyncio.CancelledError:
            outcome = self._broken_off(run, run.aborted or "the worker broke")
            if run.aborted in ENDED:
                await self._end_there(run)
        except Exception as error:
            self._events.tell("worker.stumbled", doing="call", recall=run.claim.id, reason=type(error).__name__, exc_info=True)
            outcome = self._broken_off(run, f"a defect of the worker: {type(error).__name__}")
        self._end(run, outcome)

    async def _outcome(self, run: Run) -> Outcome:
        claim = run.claim
        if claim.reference is None:
            decided: Outcome | None = judging.before_call(claim, self._policy.max_attempts)
            if isinstance(decided, Unknown) and isinstance(found := await self._protocol.find(claim), Accepted):
                # No attempt is left, but the last one reached the server: it is followed there.
                decided = found
            outcome = decided or await self._capped(claim) or await self._posted(run)
            if not isinstance(outcome, Accepted):
                return outcome
            if self._breaker.is_open:
                self._breaker.close()
                self._events.tell("breaker.closed", reason="the API accepted a run")
            if not await self._accept(run, outcome):
                await self._end_there(run)
                return Unknown("the recall was taken from this worker while the API accepted the run", outcome.http_status)
        claim = run.claim
        assert claim.reference is not None
        within = self._settings.run_timeout - (claim.delivered_age or 0.0)
        outcome = await self._protocol.follow(claim, claim.reference, within)
        if isinstance(outcome, Unknown) and outcome.http_status is None:
            await self._protocol.abort(claim, claim.reference)
        return outcome

    async def _end_there(self, run: Run) -> None:
        """The application ended the recall: ask the API to end the run that it accepted, be its reference on record yet or not."""
        claim = run.claim
        try:
            if run.aborted is None and not set((await self._ledger.look({claim.id: claim.lease})).values()) & set(ENDED):
                return
        except (Outage, Refusal):
            return
        reference = claim.reference
        if reference is None and run.call.sent_at is not None:
            found = await self._protocol.find(claim)
            reference = found.reference if isinstance(found, Accepted) else None
        if reference is not None:
            await self._protocol.abort(claim, reference)

    async def _posted(self, run: Run) -> Outcome:
        claim = run.claim
        if claim.begun_age is not None or claim.taken_from is not None:
            found = await self._protocol.find(claim)
            if found is not None:
                return found
        return await self._protocol.call(run.call)

    async def _accept(self, run: Run, accepted: Accepted) -> bool:
        """Put the reference on record before it is polled, however long PostgreSQL takes. False where the row is not ours any more."""
        claim = run.claim
        run.call.claim = claim._replace(reference=accepted.reference, delivered_age=0.0)
        sent_at = run.call.sent_at
        while True:
            try:
                return await self._ledger.accept(claim, accepted, 0.0 if sent_at is None else time.monotonic() - sent_at)
            except Outage as outage:
                self._reach.lost(outage.reason, outage.asked_at)
                await asyncio.sleep(random.uniform(*OUTAGE_PAUSE))
            except Refusal as refusal:
                self._events.tell("worker.stumbled", doing="accept", recall=claim.id, reason=refusal.reason)
                return False

    async def _capped(self, claim: Claim) -> Capped | None:
        """Whether the session has had as many runs as it may: asked under its lease, so that no two claims count at once."""
        windows = self._settings.session_windows
        if not windows:
            return None
        try:
            found = await self._ledger.runs_of(claim.session_id, windows)
        except (Outage, Refusal) as error:
            return Capped(f"its session's runs could not be counted: {error.reason}", 1.0)
        for (span, most), (runs, frees_in) in zip(windows, found, strict=True):
            if runs >= most:
                said = f"its session had {runs} runs within {'an hour' if span == 3600 else 'a day'}, and may have {most}"
                return Capped(said, max(0.05, frees_in or 1.0))
        return None

    @staticmethod
    def _broken_off(run: Run, reason: str) -> Outcome:
        reference = run.claim.reference
        if reference is not None and run.aborted not in LET_GO:
            return Accepted(reference, 202)
        return Unsent(reason) if run.call.sent_at is None else Unknown(reason)

    def _end(self, run: Run, outcome: Outcome) -> None:
        now, call = time.monotonic(), run.call
        breaker_closed = not self._breaker.is_open
        event = self._breaker.note(call, outcome, now)
        called_after = None if call.sent_at is None else call.sent_at - call.asked_at
        if event == "breaker.closed":
            self._shout = asyncio.create_task(self._tell_fleet())
        if event is not None:
            reason = getattr(outcome, "reason", None)
            self._events.tell(event, session=call.claim.session_id, **({"reason": reason} if reason else {}))
            self._look_soon()
            self._beat_now.set()
        if isinstance(outcome, Misconfigured):
            self._events.tell("endpoint.misconfigured", reason=outcome.reason, http_status=outcome.http_status)
        if isinstance(outcome, Answered):
            self._leave_slot(run)
            if self._more_waits:
                self._look_soon()
        self._settler.put(run, Ending(call.claim, outcome, called_after, now - call.asked_at, now, breaker_closed))

    async def _tell_fleet(self) -> None:
        try:
            await self._ledger.endpoint_answers(self._endpoint)
        except (Outage, Refusal):
            pass  # The others find out by their own probes.

    @property
    def _free_slots(self) -> int:
        """A run that was answered leaves its slot before it is settled, so that the next one is claimed meanwhile. Should PostgreSQL take no
        settles, no more gather than there are slots. What ends otherwise keeps its slot: trouble is not to be met faster."""
        return min(self._settings.concurrency - self._slots_in_use, 2 * self._settings.concurrency - len(self._runs))

    def _leave_slot(self, run: Run) -> None:
        self._slots_in_use -= run.holds_slot
        run.holds_slot = False

    def _free(self, run: Run, is_over: bool) -> None:
        self._leave_slot(run)
        self._runs.pop(run.claim.lease, None)
        self._freed = True
        if not self._runs:
            self._idle.set()
        if self._waits or self._breaker.is_open:
            self._look_soon()
        elif not is_over:
            # It is due again, some time.
            self._look_soon(expects=False)

    def _held(self) -> Mapping[str, Run]:
        return {run.claim.id: run for run in self._runs.values()}

    def _in_doubt(self) -> list[str]:
        """Recalls in hand whose leases may have ended: their renewal was refused, or is late."""
        soon = time.monotonic() + self._settings.lease / 3
        return [run.claim.id for run in self._runs.values() if run.held_until < soon]

    def _let_go(self, run: Run, state: str) -> None:
        if run.claim.lease in self._runs and run.abort(state):
            self._events.tell("recall.aborted", recall=run.claim.id, session=run.claim.session_id, because=state)

    # --- stopping ------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        hurry = asyncio.create_task(self._hurry.wait())
        idle = asyncio.create_task(self._idle.wait())
        until = time.monotonic() + self._settings.drain_timeout
        while (left := until - time.monotonic()) > 0 and not (hurry.done() or idle.done()):
            await asyncio.wait((hurry, idle), timeout=min(1.0, left), return_when=asyncio.FIRST_COMPLETED)
            self.turned_at = time.monotonic()
        if self._runs:
            released = sum(run.abort("the worker stopped in mid-run") for run in list(self._runs.values()))
            self._events.tell("worker.released", runs=released)
            until = time.monotonic() + SETTLE_PATIENCE
            while (left := until - time.monotonic()) > 0 and not idle.done() and not self._is_hurried_away:
                await asyncio.wait((idle,), timeout=min(0.2, left))
                self.turned_at = time.monotonic()
        for task in (hurry, idle):
            task.cancel()

    @property
    def _is_hurried_away(self) -> bool:
        """A second signal does not wait for a PostgreSQL that is lost: the leases end by themselves."""
        return self._hurry.is_set() and self._reach.is_lost

    async def _say_goodbye(self) -> None:
        if self._is_hurried_away:
            return
        try:
            async with asyncio.timeout(2):
                await self._ledger.leave()
        except (Outage, Refusal, TimeoutError):
            pass

    async def _beat(self) -> None:
        facts = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": version("recall-worker"),
            "slots": self._settings.concurrency,
        }
        began, every = time.monotonic(), min(HEARTBEAT_MOST, max(HEARTBEAT_LEAST, self._settings.lease))
        while True:
            self._beat_now.clear()
            try:
                if self.before_heartbeat is not None:
                    await self.before_heartbeat()
                vitals = self.vitals
                now = {"running": vitals.slots_in_use, "breaker": vitals.breaker, "bell": vitals.bell}
                self._ahead = await self._ledger.beat(facts | now, self._settings.shown())
                # Those of a fleet that were started together know of each other a little later.
                pause = every if time.monotonic() - began > HEARTBEAT_LEAST else HEARTBEAT_LEAST
            except (Outage, Refusal):
                pause = HEARTBEAT_LEAST
            try:
                async with asyncio.timeout(pause):
                    await self._beat_now.wait()
            except TimeoutError:
                pass

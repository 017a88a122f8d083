"""Endings become verdicts and are written.

While one batch is on its way to PostgreSQL the next one gathers: batches form by themselves under
load, and nothing waits when idle. A row whose time or schedule was changed during its run is judged
again as it stands then. A row that the application holds locked is tried again, after pauses that
grow and together with all others, so that no row waits for another's lock. One of them at a time
also waits in the queue for its lock. In an outage endings wait here, with their runs' slots, until
PostgreSQL answers again.

The application may cancel, move and delete a recall during its run. Only the lease's holder settles
it. If anything else marks it fired or failed, or moves it by its interval as after a run, another
scheduler works on the same table: `lease.violated` reports that.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from typing import assert_never
from uuid import UUID

from ..database.connection import DatabaseUnavailable, StatementRejected
from ..database.ledger import Ledger
from ..events import Events
from ..judge import Dice, Policy, as_it_stands, changed_by_hand, judge
from ..recall import (
    FINAL,
    Capped,
    Ended,
    Ending,
    Expired,
    LeaseLost,
    Locked,
    Malformed,
    Misfired,
    Moved,
    Settled,
    Settlement,
    Stranded,
    Unsent,
    Verdict,
    http_status_of,
    name_of,
    reason_of,
)
from .database_status import DatabaseStatus
from .run import MARGIN, Run
from .schema_status import SchemaStatus

BATCH_MOST = 500
"""Endings that are settled in one statement, at most."""
NEVER_CALLED = Unsent | Capped | Misfired | Expired | Malformed
LOCKED_FIRST = 0.05
LOCKED_MOST = 1.0
"""Seconds between two tries to settle a locked row: doubling from the first to the most, and MARGIN
of a lease at most, so that a row whose lock is gone is settled before its lease ends."""
OUTAGE_PAUSE = (0.1, 0.5)
"""Seconds, drawn at random, until the next try while PostgreSQL does not answer."""
REFUSED_PAUSE = (0.5, 2.0)
"""The same while the schema lets nothing be settled."""
REASON_TOLD = 300
"""Characters of a reason that go into the log."""
VIOLATED = "does another scheduler run beside the workers? docs/migration.md"


class Settler:
    def __init__(
        self,
        ledger: Ledger,
        policy: Policy,
        events: Events,
        database: DatabaseStatus,
        schema: SchemaStatus,
        free: Callable[[Run, bool], None],
        lease: float,
        dice: Dice = random.random,
    ) -> None:
        """`free(run, is_over)` is called when a run is settled, whatever the answer: its slot is
        free then. `is_over`: its recall will not be due again."""
        self._ledger = ledger
        self._policy = policy
        self._events = events
        self._database = database
        self._schema = schema
        self._free = free
        self._dice = dice
        self._waiting: list[tuple[Run, Ending, float]] = []
        self._some = asyncio.Event()
        self._standing: asyncio.Task[None] | None = None
        """The task that waits in the queue for a locked row."""
        self._locked_most = min(LOCKED_MOST, lease * MARGIN)
        self._together = BATCH_MOST
        """Endings in one batch, at most: fewer where one of them takes too long."""
        self._slow: set[UUID] = set()
        """Leases of rows that could not be settled in time: each is settled alone from then on."""

    def put(self, run: Run, ending: Ending) -> None:
        """Have this ending judged and written."""
        self._again(run, ending, LOCKED_FIRST)

    async def run(self) -> None:
        """Write endings as they arrive. Returns only by cancellation."""
        while True:
            await self._some.wait()
            self._some.clear()
            while self._waiting:
                batch = self._next_batch()
                if not batch:
                    break
                judged = [
                    (ending, judge(ending, self._policy, self._dice)) for _, ending, _ in batch
                ]
                began = time.monotonic()
                try:
                    answers = await self._ledger.settle(judged)
                except DatabaseUnavailable as outage:
                    self._waiting = batch + self._waiting
                    if outage.timed_out:
                        # PostgreSQL was connected, so one of these rows may be the cause. (If it is
                        # an outage, other loops report it.)
                        self._together = max(1, len(batch) // 2)
                        self._slow |= {run.claim.lease for run, _, _ in batch if len(batch) == 1}
                    else:
                        self._database.lost(outage.reason, outage.asked_at)
                    await asyncio.sleep(random.uniform(*OUTAGE_PAUSE))
                    continue
                except StatementRejected as refusal:
                    # The schema, not a row: the endings wait here until it is whole again.
                    self._waiting = batch + self._waiting
                    self._schema.refused("settle", refusal)
                    await asyncio.sleep(random.uniform(*REFUSED_PAUSE))
                    continue
                self._together = min(BATCH_MOST, self._together * 2)
                self._database.found()
                self._schema.fits("settle")
                if any(isinstance(answer, Settled) for answer in answers):
                    self._database.unlocked()
                self._events.tell(
                    "batch.settled",
                    endings=len(batch),
                    took_ms=round((time.monotonic() - began) * 1000, 1),
                )
                for (run, ending, pause), (_, verdict), answer in zip(
                    batch, judged, answers, strict=True
                ):
                    self._conclude(run, ending, verdict, answer, pause)

    def _next_batch(self) -> list[tuple[Run, Ending, float]]:
        """The batch to write next. Rows that take too long are settled alone, beside it."""
        batch: list[tuple[Run, Ending, float]] = []
        waiting = deque(self._waiting)
        while waiting and len(batch) < self._together:
            run, ending, pause = waiting.popleft()
            if run.claim.lease in self._slow:
                self._alone(run, ending, judge(ending, self._policy, self._dice), pause)
            else:
                batch.append((run, ending, pause))
        self._waiting = list(waiting)
        return batch

    def _conclude(
        self, run: Run, ending: Ending, verdict: Verdict, answer: Settlement, pause: float
    ) -> None:
        is_over = False
        match answer:
            case Moved(now, as_settled):
                ending = as_it_stands(ending, now)
                if as_settled and not changed_by_hand(ending.claim):
                    self._tell("lease.violated", run, ending, status="pending", hint=VIOLATED)
                self._again(run, ending, pause)
                return
            case Locked():
                self._alone(run, ending, verdict, pause)
                return
            case Settled(status):
                is_over = status in FINAL
                self._tell(
                    "recall.settled",
                    run,
                    ending,
                    verdict=type(verdict).__name__.lower(),
                    status=status,
                )
            case Ended(status):
                if status in ("fired", "failed"):
                    self._tell("lease.violated", run, ending, status=status, hint=VIOLATED)
                self._tell("recall.ended", run, ending, status=status)
            case LeaseLost():
                self._tell("lease.lost", run, ending)
            case Stranded(reason):
                self._tell("recall.stranded", run, ending, error=reason)
            case never:
                assert_never(never)
        self._slow.discard(run.claim.lease)
        self._free(run, is_over)

    def _alone(self, run: Run, ending: Ending, verdict: Verdict, pause: float) -> None:
        """Settle it beside the batches, waiting in the queue for its row; later, where another one
        waits there now."""
        if self._standing is None:
            self._standing = asyncio.create_task(self._settle_waiting(run, ending, verdict, pause))
        else:
            self._later(run, ending, pause)

    async def _settle_waiting(
        self, run: Run, ending: Ending, verdict: Verdict, pause: float
    ) -> None:
        """Wait in the queue for a locked row, so that its lease's owner gets it first."""
        try:
            answer = await self._ledger.settle_waiting(ending, verdict)
        except DatabaseUnavailable:
            answer = Locked()
        finally:
            self._standing = None
        if isinstance(answer, Locked):
            # In a batch again, where every other cause is recognized.
            self._later(run, ending, pause)
        else:
            self._conclude(run, ending, verdict, answer, pause)

    def _later(self, run: Run, ending: Ending, pause: float) -> None:
        """Try again after a pause, and the next time after a longer one."""
        asyncio.get_running_loop().call_later(
            pause, self._again, run, ending, min(self._locked_most, pause * 2)
        )

    def _again(self, run: Run, ending: Ending, pause: float) -> None:
        self._waiting.append((run, ending, pause))
        self._some.set()

    def _tell(self, event: str, run: Run, ending: Ending, **more: object) -> None:
        claim, outcome, called = ending.claim, ending.outcome, ending.called_after
        facts: dict[str, object] = {
            "recall": claim.id,
            "session": claim.session_id,
            "occurrence": claim.occurrence,
            "attempt": claim.attempt,
            "outcome": None if isinstance(outcome, Unsent) else name_of(outcome),
            **more,
        }
        now = time.monotonic()
        if called is not None:
            # The owner of the recall waited for the occurrence's first call.
            facts["first"] = claim.begun_age is None
            facts["lag_ms"] = round((claim.lag + called) * 1000, 1)
            facts["lateness_ms"] = round((claim.lateness + called) * 1000, 1)
            facts["duration_ms"] = round((ending.ended_after - called) * 1000, 1)
        facts["settled_ms"] = round((now - ending.ended_at) * 1000, 1)
        facts["held_ms"] = round((now - ending.ended_at + ending.ended_after) * 1000, 1)
        status, reason = http_status_of(outcome), reason_of(outcome)
        if status is not None:
            facts["http_status"] = status
        if reason is not None:
            facts["reason"] = reason[:REASON_TOLD]
        if not isinstance(outcome, NEVER_CALLED):
            facts["traceparent"] = run.call.traceparent
        self._events.tell(event, **facts)

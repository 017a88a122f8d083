"""One run, step by step: check, count, find or call, accept, follow; its outcome goes to the
settler.

The claim says what to run and never changes; what is learned on the way (the API's reference, when
the request was sent) is kept in the run. Nothing is raised from here: a defect ends a run like one
that was broken off.

What the database decides: whether the lease is still ours when a reference is recorded, and when
the request of a row taken up from a dead worker is about to be sent. Never here: what an outcome
means for the row (judge).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress

from .. import judge as judging
from ..database.connection import DatabaseUnavailable, StatementRejected
from ..database.ledger import Ledger
from ..events import Events
from ..judge import Policy
from ..protocols import Protocol
from ..protocols.credentials import Credentials
from ..recall import (
    Accepted,
    Answered,
    Capped,
    Ending,
    Locked,
    Malformed,
    Misconfigured,
    Outcome,
    Unknown,
    Unsent,
)
from ..settings import Settings
from .database_status import DatabaseStatus
from .endpoint_status import EndpointStatus
from .run import ENDED, LET_GO, MARGIN, Run, Runs
from .schema_status import SchemaStatus
from .settler import LOCKED_FIRST, LOCKED_MOST, REFUSED_PAUSE, Settler

OUTAGE_PAUSE = (0.1, 0.5)
"""Seconds, drawn at random, until the next try while PostgreSQL does not answer."""
LONG_AT_ONCE = 2
"""Long messages that are read and sent at the same time, so that a worker's memory does not grow
with its slots."""
LONG_PATIENCE = 5.0
"""Seconds after which the next long message is read although the server has not yet received all of
the one before."""
READ_AGAIN = 5.0
"""Seconds until the next try to read a message that could not be read."""
COUNT_AGAIN, COUNT_AGAIN_LEAST = 1.0, 0.05
"""Seconds until a session's runs are counted again: where PostgreSQL does not say, and at least."""
HOUR = 3600


class Executor:
    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        protocol: Protocol,
        credentials: Credentials,
        ledger: Ledger,
        runs: Runs,
        settler: Settler,
        endpoint: EndpointStatus,
        database: DatabaseStatus,
        schema: SchemaStatus,
        events: Events,
        progressed: Callable[[], None],
    ) -> None:
        """`progressed()` is called when a slot is free before its run is settled, and when a row
        taken up from a dead worker has proven safe."""
        self._settings = settings
        self._policy = policy
        self._protocol = protocol
        self._credentials = credentials
        self._ledger = ledger
        self._runs = runs
        self._settler = settler
        self._endpoint = endpoint
        self._database = database
        self._schema = schema
        self._events = events
        self._progressed = progressed
        self._long = asyncio.Semaphore(LONG_AT_ONCE)

    async def execute(self, run: Run) -> None:
        """Make the run, and hand its outcome to the settler."""
        outcome: Outcome
        try:
            outcome = self._credentials.redact(await self._outcome(run))
        except asyncio.CancelledError:
            outcome = self._broken_off(run, run.aborted or "the worker broke")
            if run.aborted in ENDED:
                await self._end_there(run)
        except Exception as error:
            self._events.tell(
                "worker.error",
                doing="call",
                recall=run.claim.id,
                reason=type(error).__name__,
                exc_info=True,
            )
            outcome = self._broken_off(run, f"a defect of the worker: {type(error).__name__}")
        self._finish(run, outcome)

    def give_back(self, run: Run, reason: str) -> None:
        """Do not make this run: its row goes back as it was."""
        self._finish(run, self._broken_off(run, reason))

    # --- the steps --------------------------------------------------------------------------------

    async def _outcome(self, run: Run) -> Outcome:
        first_in: float | None = None
        if run.reference is None:
            decided = await self._checked(run) or await self._counted(run)
            if decided is None:
                self._tell_started(run)
            outcome = decided or await self._called(run)
            if not isinstance(outcome, Accepted):
                return outcome
            outcome = self._credentials.redact(outcome)
            assert isinstance(outcome, Accepted)
            first_in = outcome.retry_after
            if outcome.note is not None:
                self._events.tell("endpoint.noted", recall=run.claim.id, reason=outcome.note)
            if not await self._accepted(run, outcome):
                await self._end_there(run)
                return Unknown(
                    "the recall was taken from this worker while the API accepted the run",
                    outcome.http_status,
                )
        return await self._followed(run, first_in)

    def _tell_started(self, run: Run) -> None:
        """Say that a call begins: what goes on now is in the log, too, not only what has ended."""
        claim = run.claim
        since_claim = time.monotonic() - run.call.asked_at
        self._events.tell(
            "recall.started",
            recall=claim.id,
            session=claim.session_id,
            occurrence=claim.occurrence,
            attempt=claim.attempt,
            key=claim.key,
            scheduled_for=claim.scheduled_for.isoformat(),
            missed=claim.missed,
            lag_ms=round((claim.lag + since_claim) * 1000, 1),
            lateness_ms=round((claim.lateness + since_claim) * 1000, 1),
            traceparent=run.call.traceparent,
        )

    async def _checked(self, run: Run) -> Outcome | None:
        """The outcome where it is decided without a call; None where the run is to be called."""
        decided = judging.before_call(
            run.claim, self._policy.max_attempts, self._policy.message_limit
        )
        if isinstance(decided, Unknown) and isinstance(
            found := await self._protocol.find(run.claim), Accepted
        ):
            # No attempt is left, but the last one arrived at the server: follow it there.
            return found
        return decided

    async def _counted(self, run: Run) -> Capped | None:
        """Capped where the session has had as many runs as it may. Counted under its lease, so that
        no two claims count at once."""
        windows = self._settings.session_windows
        if not windows:
            return None
        try:
            found = await self._ledger.count_session_runs(run.claim.session_id, windows)
        except (DatabaseUnavailable, StatementRejected) as error:
            return Capped(f"its session's runs could not be counted: {error.reason}", COUNT_AGAIN)
        for (span, most), (runs, frees_in) in zip(windows, found, strict=True):
            if runs >= most:
                within = "an hour" if span == HOUR else "a day"
                return Capped(
                    f"its session had {runs} runs within {within}, and may have {most}",
                    max(COUNT_AGAIN_LEAST, frees_in or COUNT_AGAIN),
                )
        return None

    async def _called(self, run: Run) -> Outcome:
        """Find the run where the API may have it already, else post it."""
        claim = run.claim
        if claim.begun:
            found = await self._protocol.find(claim)
            if found is not None:
                return found
        withheld: list[str] = []
        if claim.taken_from is not None:
            run.call.on_sent = self._progressed

            async def put_on_record() -> bool:
                try:
                    if await self._ledger.sent(claim):
                        return True
                    withheld.append("its row is locked, or its lease is not ours any more")
                except (DatabaseUnavailable, StatementRejected) as error:
                    withheld.append(
                        f"it could not be put on record that it is sent: {error.reason}"
                    )
                return False

            run.call.before_sent = put_on_record
        outcome = await (
            self._protocol.call(run.call)
            if claim.message is not None
            else self._called_at_length(run)
        )
        return Unsent(withheld[0]) if withheld and run.call.sent_at is None else outcome

    async def _called_at_length(self, run: Run) -> Outcome:
        """Call with a message that is read only for this call, a few at a time."""
        loop, call = asyncio.get_running_loop(), run.call
        await self._long.acquire()
        holds = True

        def release() -> None:
            nonlocal holds
            if holds:
                holds = False
                self._long.release()

        try:
            try:
                call.message = await self._ledger.message(run.claim)
            except DatabaseUnavailable as outage:
                return Capped(f"its message could not be read: {outage.reason}", READ_AGAIN)
            except StatementRejected as refusal:
                if refusal.of_the_schema:
                    self._schema.say("read a message", refusal)
                    return Capped(f"its message could not be read: {refusal.reason}", READ_AGAIN)
                return Malformed(f"its message can't be read: {refusal.reason}")
            if call.message is None:
                return Unsent(
                    "its message was changed while it was read, or the lease is not ours any more"
                )
            before = call.on_sent

            def sent() -> None:
                loop.call_later(LONG_PATIENCE, release)
                if before is not None:
                    before()

            call.on_sent, call.on_written = sent, release
            return await self._protocol.call(call)
        finally:
            release()

    async def _accepted(self, run: Run, accepted: Accepted) -> bool:
        """Record the reference before it is polled, however long PostgreSQL takes. False where the
        row is no longer ours."""
        run.reference, run.delivered_at = accepted.reference, time.monotonic()
        self._endpoint.note(run.call, accepted)
        self._progressed()
        sent_at = run.call.sent_at
        pause = LOCKED_FIRST
        while True:
            try:
                called_ago = 0.0 if sent_at is None else time.monotonic() - sent_at
                answer = await self._ledger.accept(run.claim, accepted, called_ago)
                if not isinstance(answer, Locked):
                    return answer
                await asyncio.sleep(pause)
                pause = min(LOCKED_MOST, self._settings.lease * MARGIN, pause * 2)
            except DatabaseUnavailable as outage:
                self._database.lost(outage.reason, outage.asked_at)
                await asyncio.sleep(random.uniform(*OUTAGE_PAUSE))
            except StatementRejected as refusal:
                if refusal.is_lock:
                    # The whole table is locked, as DDL does.
                    await asyncio.sleep(pause)
                    continue
                if refusal.of_the_schema:
                    self._schema.say("accept", refusal)
                    await asyncio.sleep(random.uniform(*REFUSED_PAUSE))
                    continue
                self._events.tell(
                    "worker.error", doing="accept", recall=run.claim.id, reason=refusal.reason
                )
                return False

    async def _followed(self, run: Run, first_in: float | None) -> Outcome:
        """Poll the run that the API accepted, until RECALL_RUN_TIMEOUT after it was accepted; from
        `first_in` seconds on, where the API says so."""
        assert run.reference is not None
        age = (
            run.claim.delivered_age or 0.0
            if run.delivered_at is None
            else time.monotonic() - run.delivered_at
        )
        outcome = await self._protocol.follow(
            run.claim, run.reference, self._settings.run_timeout - age, first_in
        )
        if isinstance(outcome, Unknown) and outcome.http_status is None:
            await self._protocol.abort(run.claim, run.reference)
        return outcome

    # --- endings ----------------------------------------------------------------------------------

    async def _end_there(self, run: Run) -> None:
        """The application ended the recall: ask the API to end the run that it accepted, whether or
        not its reference is recorded yet."""
        claim = run.claim
        with suppress(DatabaseUnavailable, StatementRejected):
            if run.aborted is None and not set(
                (await self._ledger.check_leases({claim.id: claim.lease})).values()
            ) & set(ENDED):
                return
            reference = run.reference
            if reference is None and run.call.sent_at is not None:
                found = await self._protocol.find(claim)
                reference = found.reference if isinstance(found, Accepted) else None
            if reference is not None:
                await self._protocol.abort(claim, reference)

    @staticmethod
    def _broken_off(run: Run, reason: str) -> Outcome:
        if run.reference is not None and run.aborted not in LET_GO:
            # It continues at the API, whether this worker has polled it or not.
            return Accepted(run.reference, 202)
        return Unsent(reason) if run.call.sent_at is None else Unknown(reason)

    def _finish(self, run: Run, outcome: Outcome) -> None:
        if isinstance(outcome, Unsent):
            # An accepted run is never given back as unsent: it would be posted again.
            outcome = self._broken_off(run, outcome.reason)
        now, call = time.monotonic(), run.call
        breaker_closed = not self._endpoint.is_open
        others_answered = self._endpoint.others_answered(run.claim.session_id)
        self._endpoint.note(call, outcome)
        if isinstance(outcome, Misconfigured):
            self._events.tell(
                "endpoint.misconfigured", reason=outcome.reason, http_status=outcome.http_status
            )
        if isinstance(outcome, Answered):
            self._runs.leave_slot(run)
        if isinstance(outcome, Answered) or run.claim.taken_from is not None:
            self._progressed()
        claim = run.claim
        if claim.reference != run.reference:
            claim = claim._replace(reference=run.reference)
        called_after = None if call.sent_at is None else call.sent_at - call.asked_at
        self._settler.put(
            run,
            Ending(
                claim,
                outcome,
                called_after,
                now - call.asked_at,
                now,
                breaker_closed,
                others_answered,
            ),
        )

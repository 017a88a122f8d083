"""Tells RECALL_FAILURE_URL which recalls have failed: sends what waits in the outbox.

An entry is written in the transaction in which a recall becomes failed, so it is there exactly if
the recall has failed; here it is sent, at least once and, as a rule, once. An entry is taken under
a lease, sent, and then recorded: where the worker dies in between, another one sends it again, with
the same webhook-id.

Never in the way of recalls: a loop of its own with AT_ONCE requests, a database connection and a
connection pool of its own. It sleeps until the next entry is due, or until this worker settles a
recall as failed. What others have written (a worker without the setting or of an earlier version,
the application) it finds by looking every LOOK_EVERY. A receiver that fails gets one request at a
time, after pauses that grow to PACE_MOST; each entry is tried again after pauses of its own, which
grow to DELAY_MOST, until it is KEEP old. Then it is given up.

410 means that the receiver wants no more of them. Standard Webhooks has the sender stop then. Here
the one who chose the receiver is the operator, who can unset RECALL_FAILURE_URL; so nothing is lost
for a wrong 410: one entry is sent each UNSUBSCRIBED_FOR, and no other.

The database decides what is due, and who sends it. Never here: SQL (database.outbox), HTTP
(protocols.webhook).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from ..database.connection import ClaimsHeld, DatabaseUnavailable, StatementRejected
from ..database.ledger import Ledger
from ..database.outbox import KEEP, Entry, Outbox
from ..events import Events, escape_controls
from ..protocols.webhook import DEADLINE, Delivered, Undelivered, Webhook
from .database_status import DatabaseStatus

AT_ONCE = 2
"""Entries that are sent at the same time."""
LEASE = 4 * DEADLINE
"""Seconds after which another worker sends an entry: longer than a try and its record take."""
DELAY_FIRST, DELAY_FACTOR, DELAY_MOST = 5.0, 3.0, 3600.0
"""Seconds, about, until an entry is tried again: from the first, each time so many times more, to
the most."""
PACE_FIRST, PACE_MOST = 1.0, 60.0
"""Seconds until anything is sent to a receiver that fails: doubling from the first to the most."""
UNSUBSCRIBED_FOR = 3600.0
"""Seconds for which nothing is sent after a 410."""
LOOK_EVERY = 60.0
"""Seconds, at most, between two looks for entries that others wrote."""
SUBSCRIBE_EVERY = 3600.0
"""Seconds between two statements that say that failures are to be told."""
OPEN_FOR = 10.0
"""Seconds until the next entry from which on the connection is closed meanwhile."""
DATABASE_PAUSE, REFUSED_PAUSE = 5.0, 300.0
"""Seconds until the next try where PostgreSQL does not answer, and where it refuses."""
LEAST = 0.05
"""Seconds between two looks that found nothing to send, at least."""
REASON_MOST = 500
LOCKED = "55P03"
HINT = "see that RECALL_FAILURE_URL answers 2xx; recall-worker doctor connects to it"
GIVEN_UP_HINT = "recall-worker show ID says why the recall has failed; nobody was told"
UNREADABLE = "its text can't be read as UTF-8"


class FailureSender:
    def __init__(
        self,
        outbox: Outbox,
        ledger: Ledger,
        webhook: Callable[[], Webhook],
        database: DatabaseStatus,
        events: Events,
    ) -> None:
        """`webhook()` is called once, when the loop runs."""
        self._outbox = outbox
        self._ledger = ledger
        self._make_webhook = webhook
        self._database = database
        self._events = events
        self._woken = asyncio.Event()
        self._ends = asyncio.Event()
        self._ready = asyncio.Event()
        self._subscribe_at = 0.0
        """Monotonic instant of the next `subscribe`."""
        self._failures = 0
        """Tries in a row that did not deliver."""
        self._unrecorded: list[tuple[Entry, Delivered | Undelivered]] = []
        """Tries that PostgreSQL did not take the record of."""

    def wake(self) -> None:
        """This worker has settled a recall as failed: its entry is there."""
        self._woken.set()

    def end(self) -> None:
        """Send only what this worker has just settled: `run` returns when that is recorded."""
        self._ends.set()

    async def ready(self) -> None:
        """Wait until PostgreSQL knows that failures are to be told, or has refused to."""
        await self._ready.wait()

    async def run(self) -> None:
        """Send what is due. Returns after `end()`."""
        webhook = self._make_webhook()
        try:
            while self._woken.is_set() or not self._ends.is_set():
                self._woken.clear()
                pause, wakeable = await self._turn(webhook)
                await self._sleep(pause, wakeable=wakeable)
        finally:
            await webhook.close()
            await self._outbox.close()

    async def _sleep(self, seconds: float, *, wakeable: bool) -> None:
        if seconds <= 0:
            return
        events = [self._ends, self._woken] if wakeable else [self._ends]
        waits = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _turn(self, webhook: Webhook) -> tuple[float, bool]:
        """Send a few entries, if any are due. Returns the seconds until the next turn, and whether
        a new failure makes it sooner."""
        if self._database.is_lost:
            return DATABASE_PAUSE, False
        try:
            await self._record_again()
            if time.monotonic() >= self._subscribe_at:
                await self._subscribe()
            most = 1 if self._failures else AT_ONCE
            entries = await self._outbox.take(most, LEASE)
            if entries:
                pause = await self._send(webhook, entries)
                return pause, pause == 0
            next_in = await self._ledger.next_failure()
        except DatabaseUnavailable:
            # The loops that need PostgreSQL for more than this report it.
            return DATABASE_PAUSE, False
        except ClaimsHeld:
            # Of a copy nothing is told, as nothing is claimed.
            self._ready.set()
            return LOOK_EVERY, False
        except StatementRejected as refusal:
            self._ready.set()
            if refusal.sqlstate == LOCKED:
                return DATABASE_PAUSE, False
            self._events.tell("worker.error", doing="tell", reason=refusal.reason)
            return REFUSED_PAUSE, False
        # All replicas know when it is due, and one gets it.
        until = LOOK_EVERY if next_in is None else next_in + random.uniform(LEAST, 0.5)
        if until >= OPEN_FOR:
            await self._outbox.close()
        return min(until, LOOK_EVERY), True

    async def _subscribe(self) -> None:
        given_up = await self._outbox.subscribe()
        self._ready.set()
        for entry in given_up:
            self._given_up(entry.id, entry.recall_id, entry.tries, entry.reason, entry.age)
        self._subscribe_at = time.monotonic() + SUBSCRIBE_EVERY * random.uniform(0.9, 1.0)

    async def _send(self, webhook: Webhook, entries: list[Entry]) -> float:
        """Send entries and record how that ended. Returns seconds until the next turn."""
        results = await asyncio.gather(*(self._try(webhook, entry) for entry in entries))
        self._unrecorded += zip(entries, results, strict=True)
        pause = 0.0
        for result in results:
            if isinstance(result, Delivered):
                self._failures = 0
                continue
            pace = min(PACE_MOST, PACE_FIRST * 2 ** min(self._failures, 10))
            self._failures += 1
            pause = max(pause, UNSUBSCRIBED_FOR if result.gone else pace)
        await self._record_again()
        return pause * random.uniform(0.8, 1.0)

    async def _try(self, webhook: Webhook, entry: Entry) -> Delivered | Undelivered:
        if entry.body is None:
            return Undelivered(UNREADABLE)
        began = time.monotonic()
        result = await webhook.send(entry.id, entry.body.encode())
        if isinstance(result, Delivered):
            self._events.tell(
                "failure.delivered",
                recall=entry.recall_id,
                message=entry.id,
                tries=entry.tries,
                http_status=result.http_status,
                took_ms=round((time.monotonic() - began) * 1000, 1),
                waited_s=round(entry.age, 3),
            )
        return result

    async def _record_again(self) -> None:
        """Record what is not recorded yet. After an outage of PostgreSQL, too: what was delivered
        is then not sent again, unless another worker has done so meanwhile."""
        while self._unrecorded:
            entry, result = self._unrecorded.pop(0)
            try:
                await self._record(entry, result)
            except DatabaseUnavailable:
                self._unrecorded.insert(0, (entry, result))
                raise

    async def _record(self, entry: Entry, result: Delivered | Undelivered) -> None:
        if isinstance(result, Delivered):
            await self._outbox.record(entry, http_status=result.http_status, delivered=True)
            return
        delay = _delay(entry.tries, result)
        given_up = entry.age + delay > KEEP
        # In ASCII, which a database of any encoding takes.
        reason = escape_controls(result.reason[:REASON_MOST])
        reason = reason.encode("ascii", "backslashreplace").decode()
        await self._outbox.record(
            entry,
            http_status=result.http_status,
            reason=reason,
            given_up=given_up,
            delay=delay,
        )
        if given_up:
            self._given_up(entry.id, entry.recall_id, entry.tries, reason, entry.age)
            return
        self._events.tell(
            "failure.unsubscribed" if result.gone else "failure.deferred",
            recall=entry.recall_id,
            message=entry.id,
            tries=entry.tries,
            reason=reason,
            next_in_s=round(delay, 1),
            hint=HINT,
        )

    def _given_up(
        self, id: str, recall_id: str, tries: int, reason: str | None, age: float
    ) -> None:
        self._events.tell(
            "failure.abandoned",
            recall=recall_id,
            message=id,
            tries=tries,
            reason=reason or "it was never its turn: the receiver has failed all the while",
            after_s=round(age),
            hint=GIVEN_UP_HINT,
        )


def _delay(tries: int, result: Undelivered) -> float:
    """Seconds until an entry is tried again, after so many tries."""
    if result.gone:
        return UNSUBSCRIBED_FOR
    if result.retry_after is not None:
        return min(DELAY_MOST, max(1.0, result.retry_after))
    grown = min(DELAY_MOST, DELAY_FIRST * DELAY_FACTOR ** min(tries - 1, 20))
    return grown * random.uniform(0.7, 1.0)

"""What DESIGN says becomes of recalls, in plain Python: no SQL, nothing of the product imported.

One object a recall, whose fields are the table's columns; one method for each thing that can
happen. Where the product answers with a row, the test compares it with the object's fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from . import almanac

LEASE = 60
BUSY_DELAY = 45
MAX_ATTEMPTS = 3
GIVE_UP = 86_400
CHANCE = 0.5
"""What all dice show."""

FAILURES = ("unknown", "failed", "refused")


@dataclass(repr=False)
class Row:
    id: str
    session: str
    call_type: str
    trigger: datetime
    cadence: str = "interval"
    interval: int | None = None
    cron: str | None = None
    zone: str | None = None
    until: datetime | None = None
    times: int | None = None
    failures_most: int | None = None
    grace: int | None = None
    jitter: int | None = None
    status: str = "pending"
    planned: datetime = field(default=None)  # type: ignore[assignment]
    scheduled: datetime | None = None
    occurrence: int = 1
    rekey: int = 0
    attempt: int = 0
    deferrals: int = 0
    failures: int = 0
    missed: int = 0
    begun: datetime | None = None
    last_outcome: str | None = None
    holder: str | None = None
    """The worker that has it under a lease."""
    leased_at: datetime | None = None
    lease_until: datetime | None = None
    paused: bool = False
    called: list[tuple[str, datetime, int]] = field(default_factory=list)
    """Each call's key, nominal time and missed."""

    stands: bool = False
    """Whether it stands wherever it is put: a one-shot that was never claimed."""

    def __post_init__(self) -> None:
        self.planned = self.trigger
        self.stands = not self.recurring

    def __repr__(self) -> str:
        return self.id

    # --- words ------------------------------------------------------------------------------------

    @property
    def live(self) -> bool:
        return self.status in ("pending", "running")

    @property
    def recurring(self) -> bool:
        return self.call_type == "recurring"

    @property
    def due_at(self) -> datetime:
        return self.lease_until if self.lease_until is not None else self.trigger

    @property
    def moved(self) -> bool:
        return self.trigger != self.planned

    @property
    def unplanned(self) -> bool:
        return self.recurring and self.cadence == "cron" and self.interval is None

    @property
    def may_go_on(self) -> bool:
        """Whether a run of it may still go on though nobody holds it: a call under its key ended as
        unknown."""
        return self.last_outcome == "unknown" or self.attempt > self.rekey

    @property
    def key(self) -> str:
        return f"{self.id}:{self.occurrence}" + (f".{self.rekey}" if self.rekey else "")

    # --- time -------------------------------------------------------------------------------------

    def nth(self, after: datetime, n: int) -> datetime:
        """The nth moment after one, on grid and cron."""
        if self.cadence == "cron":
            return almanac.after(self.cron or "", self.zone or "UTC", after, n)
        return after + timedelta(seconds=self.interval or 0) * n

    def count(self, start: datetime, end: datetime) -> int:
        """Moments after `start` up to `end`."""
        if not self.recurring:
            return 0
        if self.cadence == "cron":
            return almanac.between(self.cron or "", self.zone or "UTC", start, end)
        return max(0, int((end - start).total_seconds() // (self.interval or 1)))

    def distance(self, moment: datetime) -> int:
        return max(1, round((self.nth(moment, 1) - moment).total_seconds()))

    def skipped(self) -> int:
        if not self.recurring or not self.interval:
            return 0
        moved = (self.trigger - self.planned).total_seconds()
        k = int(moved // self.interval) if moved > 0 and moved % self.interval == 0 else 0
        if k > 10 and self.cadence == "cron":
            # So many at once are a skip only where they lead near the time that was named.
            start = self.scheduled or self.planned
            try:
                near = self.nth(start, k) <= start + 2 * (self.trigger - self.planned)
            except IndexError:
                near = False
            return k if near else 0
        return k

    def put_off(self) -> timedelta:
        return timedelta(seconds=CHANCE * (self.jitter or 0))

    def ahead(self) -> datetime | None:
        """The nominal time of what waits, as `preview` says it; None where the recall ends before
        it."""
        k = self.skipped()
        waits = (
            self._named(k)[0] if self.moved or self.unplanned else self.scheduled or self.planned
        )
        return None if self._past_its_end(waits, self.occurrence + k) else waits

    @property
    def as_before(self) -> str:
        """How the recall ends before an occurrence that is not called: as the last one did."""
        failed = self.failures > 0 or self.last_outcome not in (None, "answered")
        return "failed" if failed else "fired"

    # --- what happens -----------------------------------------------------------------------------

    def claim(self, worker: str, now: datetime) -> str:
        """Take it. Says what follows: `put back`, `ended` (also failed or misfired), or `call`."""
        taken = self.holder is not None
        if taken or self.begun is not None:
            self.begun = min(self.begun or self.leased_at or now, now)
        self.attempt += 1
        self.stands = False
        self.scheduled = self.scheduled or self.planned
        fresh = self.begun is None
        self.holder, self.leased_at, self.lease_until = worker, now, now + timedelta(seconds=LEASE)
        if fresh and self.recurring and self.cadence != "cron":
            self.missed = self.count(self.scheduled, now)
        if self.moved or self.unplanned:
            k = self.skipped()
            number = self.occurrence + (k or (0 if fresh else 1))
            nominal, on_moment = self._named(k)
            if self.trigger > now or (self.cadence == "cron" and on_moment and nominal > now):
                self._next(
                    number, nominal if on_moment else None, self.as_before, None, called=False
                )
                return "put back"
            if self.recurring and self.cadence == "cron":
                self.interval = self.distance(nominal)
            self.rekey = self.rekey if number == self.occurrence else 0
            self.occurrence, self.attempt, self.deferrals, self.begun = number, 1, 0, None
            self.scheduled, self.planned, fresh, taken = nominal, self.trigger, True, False
            self.missed = self.count(nominal, now)
        elif fresh and self.recurring and self.cadence == "cron":
            # The distance on record says whether anything can have been missed.
            late = self.interval is None or (now - self.scheduled).total_seconds() >= self.interval
            self.missed = self.count(self.scheduled, now) if late else self.missed
            if late and self.missed:
                self.attempt, self.deferrals, self.begun, self.planned = 1, 0, None, self.trigger
        if fresh:
            if self._past_its_end(self.scheduled, self.occurrence):
                self._finish(self.as_before, "expired", called=False)
                return "ended"
            allowed = None if self.grace is None else max(1, self.grace) + (self.jitter or 0)
            if allowed is not None and (now - self.scheduled).total_seconds() > allowed:
                self._misfire(now, allowed)
                return "ended"
        if taken and self.attempt > MAX_ATTEMPTS:
            self._occurrence_done(now, "unknown", called=False)
            return "ended"
        self.called.append((self.key, self.scheduled, self.missed))
        return "call"

    def settle(self, outcome: str, now: datetime, retry_after: int | None) -> None:
        """The call that is under way ended so."""
        begun = self.begun or self.leased_at or now
        match outcome:
            case "answered" | "refused":
                self._occurrence_done(now, outcome)
            case "gone":
                self._finish("cancelled", outcome)
            case "unknown" | "failed" if self.attempt >= MAX_ATTEMPTS:
                self._occurrence_done(now, outcome)
            case "unsent" if not self.moved:
                self._wait(now, None, self.attempt - 1, outcome=None)
            case "unsent":
                k = self.skipped()
                nominal, on_moment = self._named(k)
                self._next(
                    self.occurrence + (k or (1 if self.begun else 0)),
                    nominal if on_moment else None,
                    self.as_before,
                    None,
                    called=False,
                )
            case _ if self.moved:
                k = self.skipped()
                nominal, on_moment = self._named(k)
                self._next(
                    self.occurrence + (k or 1), nominal if on_moment else None, "failed", outcome
                )
            case "unknown" | "failed":
                backoff = CHANCE * min(300, 5 * 4 ** (self.attempt - 1))
                self.rekey += outcome == "failed"
                self._wait(now, backoff, self.attempt, outcome, begun, deferrals=0)
            case "misconfigured":
                backoff = CHANCE * min(300, 5 * 4 ** min(self.deferrals, 10))
                self._wait(now, backoff, self.attempt - 1, outcome, begun, self.deferrals + 1)
            case "busy" | "unavailable":
                waited = (now - self.begun).total_seconds() if self.begun else 0.0
                delay: float = (
                    BUSY_DELAY
                    if outcome == "busy"
                    else CHANCE * min(300, 5 * 4 ** min(self.deferrals, 10))
                )
                if waited > GIVE_UP:
                    self._occurrence_done(now, outcome)
                else:
                    self._wait(
                        now,
                        delay if retry_after is None else retry_after,
                        self.attempt - 1,
                        outcome,
                        begun,
                        self.deferrals + 1,
                    )
            case _:
                raise AssertionError(outcome)

    def plan(self) -> None:
        """A cron recall that waits where it was moved (or inserted) is put on a moment."""
        k = self.skipped()
        nominal, on_moment = self._named(k)
        number = self.occurrence + (k or (1 if self.begun else 0))
        if self._past_its_end(nominal, number):
            self.status, self.planned = self.as_before, self.trigger
            self.attempt = self.deferrals = self.missed = 0
            self.begun = None
            return
        self._next(number, nominal if on_moment else None, self.as_before, None)
        self.scheduled = nominal

    def _named(self, k: int) -> tuple[datetime, bool]:
        """The nominal time that the application's move stands for, and whether it is a moment of
        the cadence (or the very time)."""
        if self.unplanned:
            return self.nth(self.trigger - timedelta(microseconds=1), 1), True
        if k and self.recurring and self.cadence != "interval":
            return self.nth(self.scheduled or self.planned, k), True
        return self.trigger, False

    def _occurrence_done(self, now: datetime, outcome: str, *, called: bool = True) -> None:
        ended = "fired" if outcome == "answered" else "failed"
        if not self.recurring:
            if self.moved:
                self._next(self.occurrence + 1, None, ended, outcome, called=called)
            else:
                self._finish(ended, outcome, called=called)
            return
        failures = 0 if outcome == "answered" else self.failures + 1
        if self.failures_most is not None and failures >= self.failures_most:
            self._finish("failed", outcome, called=called)
            return
        k = self.skipped()
        number = self.occurrence + 1 + k
        if self.moved and not k:
            self._next(number, None, ended, outcome, failures, called=called)
        elif self.cadence == "interval":
            falls = now + timedelta(seconds=(self.interval or 0) * (1 + k))
            self._next(number, falls, ended, outcome, failures, called=called)
        else:
            assert self.scheduled is not None
            self._next(
                number,
                self.nth(self.scheduled, self.missed + 1 + k),
                ended,
                outcome,
                failures,
                called=called,
            )

    def _misfire(self, now: datetime, allowed: int) -> None:
        if not self.recurring:
            self._finish("failed", "misfired", called=False)
            return
        assert self.scheduled is not None
        n = 1
        while self.nth(self.scheduled, n) < now - timedelta(seconds=allowed):
            n += 1
        self._next(
            self.occurrence + 1, self.nth(self.scheduled, n), "failed", "misfired", called=False
        )

    def _past_its_end(self, falls: datetime, number: int) -> bool:
        if not self.recurring:
            return False
        return (self.times is not None and number > self.times) or (
            self.until is not None and falls > self.until
        )

    def _next(
        self,
        number: int,
        nominal: datetime | None,
        ended: str,
        outcome: str | None,
        failures: int | None = None,
        *,
        called: bool = True,
    ) -> None:
        """Another occurrence waits: at a nominal time, or (None) where the application put it.
        Unless the recall ends before it."""
        if self._past_its_end(nominal or self.trigger, number):
            self._finish(ended, outcome, called=called)
            return
        if self.recurring and self.cadence == "cron":
            self.interval = self.distance(nominal or self.trigger)
        if nominal is not None:
            self.trigger = nominal + self.put_off()
        self.planned = self.trigger
        # After an interval nothing but the due time is nominal.
        self.scheduled = nominal if self.cadence != "interval" or outcome == "misfired" else None
        self.rekey = self.rekey if number == self.occurrence else 0
        self.failures = self.failures if failures is None else failures
        self.occurrence, self.attempt, self.deferrals, self.missed, self.begun = (
            number,
            0,
            0,
            0,
            None,
        )
        self._let_go(outcome)

    def _wait(
        self,
        now: datetime,
        delay: float | None,
        attempt: int,
        outcome: str | None,
        begun: datetime | None = None,
        deferrals: int | None = None,
    ) -> None:
        """The same occurrence again."""
        if delay is not None:
            self.trigger = now + timedelta(seconds=delay)
        self.planned = self.trigger
        self.attempt = attempt
        self.begun = begun if begun is not None else self.begun
        self.deferrals = self.deferrals if deferrals is None else deferrals
        self._let_go(outcome)

    def _finish(self, status: str, outcome: str | None, *, called: bool = True) -> None:
        self.attempt -= not called
        self.status = status
        self.planned = self.trigger
        self._let_go(outcome)

    def _let_go(self, outcome: str | None) -> None:
        self.holder = self.leased_at = self.lease_until = None
        self.last_outcome = outcome or self.last_outcome

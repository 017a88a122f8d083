"""What DESIGN says becomes of recalls, in plain Python: no SQL, nothing of the product imported.

One object a recall, whose fields are the table's columns; one method for each thing that can
happen. Where the product answers with a row, the test compares it with the object's fields.

How an edit is told from the rest: `base` is where the row was last put, and `put_by` says by whom.
What lies between it and `trigger` is the application's own move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from . import almanac

LEASE = 60
BUSY_DELAY = 45
MAX_ATTEMPTS = 3
GIVE_UP = 86_400
CHANCE = 0.5
"""What all dice show."""

FAILURES = ("unknown", "failed", "refused")
RULE = ("call_type", "interval", "cadence", "cron", "zone")
"""The columns that say when occurrences fall."""


MOMENT = timedelta(microseconds=1)


class Waits(NamedTuple):
    """What a row stands for that was moved, skipped or edited."""

    number: int
    rekey: int
    nominal: datetime
    on_moment: bool
    """Whether the nominal time is one of the rule's moments, and not a time that somebody chose."""


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
    slot: int = 1
    """Its session's slot, while it is pending."""
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
    may_still_run: bool = False
    """Whether a call ended as unknown, and none has ended otherwise since."""
    accepted: bool = False
    """Whether the API accepted the run of this occurrence and says later how it ended."""
    paused: bool = False
    called: list[tuple[str, datetime, int]] = field(default_factory=list)
    """Each call's key, nominal time and missed."""

    base: datetime = field(default=None)  # type: ignore[assignment]
    """The trigger as it was last put."""
    planned: datetime | None = None
    """The trigger as a worker last put it."""
    put_by: Literal["worker", "name", "application"] = "worker"
    """Who put it there: a worker (or the insert); `reschedule`, or the statement of an edit; or the
    application, with a move that an edit came after."""
    skips: int = 0
    """Occurrences that were skipped before an edit, or before it was put elsewhere by name."""
    edited: datetime | None = None
    """When its rule was last edited: the rule has no moments before."""
    led_to: datetime | None = None
    """The nominal time to which those skips have led; None: that is not known, but when it is
    due."""
    anew: bool = False
    """Whether a worker is still to find the moment for which it waits, after an edit."""
    covered: datetime | None = None
    """Due moments up to this instant belong to the occurrence that was called."""
    body: tuple[int, str] | None = None
    """What the last claim was to send: of which occurrence, and what of it an edit can change."""
    extra: datetime | None = None
    """Since when an extra run is asked for, or runs."""
    extra_of: int = 0
    """The occurrence that waited when it was asked for."""
    extras: int = 0
    """Extra runs so far."""
    stands: bool = False
    """Whether it stands wherever it is put: a one-shot that was never claimed."""

    taken: bool = False
    """Whether the worker that has it took it up from another."""
    placed: bool = False
    """Whether that worker had to write what it stands for before the call."""

    def __post_init__(self) -> None:
        if self.base is None:
            self.base = self.planned = self.trigger
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
    def on_cron(self) -> bool:
        return self.recurring and self.cadence == "cron"

    @property
    def due_at(self) -> datetime:
        return self.lease_until if self.lease_until is not None else self.trigger

    @property
    def in_run(self) -> bool:
        """Whether its occurrence is being run; not an extra run."""
        return self.holder is not None and self.extra is None

    @property
    def called_before(self) -> bool:
        """Whether its occurrence is being called, or was called and did not run."""
        return self.extra is None and (self.holder is not None or self.begun is not None)

    @property
    def unplanned(self) -> bool:
        return self.on_cron and self.interval is None

    @property
    def changed(self) -> bool:
        """Whether it stands for something else than a worker has written."""
        return (
            self.trigger != self.base
            or self.put_by != "worker"
            or self.skips > 0
            or self.anew
            or self.unplanned
        )

    @property
    def may_go_on(self) -> bool:
        """Whether a run of it may still go on though nobody holds it: a call under its key ended as
        unknown."""
        return self.may_still_run or self.last_outcome == "unknown" or self.attempt > self.rekey

    @property
    def key(self) -> str:
        if self.extra is not None:
            return f"{self.id}:{self.extra_of}.f{self.extras}"
        return f"{self.id}:{self.occurrence}" + (f".{self.rekey}" if self.rekey else "")

    # --- time -------------------------------------------------------------------------------------

    def nth(self, start: datetime, n: int) -> datetime:
        """The nth moment after a nominal time, none of them before the last edit."""
        since = start if self.edited is None else max(start, self.edited)
        if self.cadence == "cron":
            return almanac.after(self.cron or "", self.zone or "UTC", since, n)
        step = timedelta(seconds=self.interval or 0)
        return start + step * ((since - start) // step + n)

    def count(self, start: datetime, end: datetime) -> int:
        """Moments after a nominal time and up to `end`, none of them before the last edit, none
        after the recall's end."""
        if not self.recurring:
            return 0
        since = start if self.edited is None else max(start, self.edited)
        end = end if self.until is None else min(end, self.until)
        if self.cadence == "cron":
            return almanac.between(self.cron or "", self.zone or "UTC", since, end)
        step = timedelta(seconds=self.interval or 1)
        return max(0, (end - start) // step - (since - start) // step)

    def distance(self, moment: datetime) -> int:
        ahead = almanac.after(self.cron or "", self.zone or "UTC", moment)
        return max(1, round((ahead - moment).total_seconds()))

    def skipped(self) -> int:
        """How many occurrences the application skipped since it was last put somewhere."""
        if not self.recurring or not self.interval:
            return 0
        moved = (self.trigger - self.base).total_seconds()
        k = int(moved // self.interval) if moved > 0 and moved % self.interval == 0 else 0
        if k > 10 and self.cadence == "cron":
            # So many at once are a skip only where they lead near the time that was named.
            start = self.scheduled or self.base
            try:
                near = self.nth(start, k) <= start + 2 * (self.trigger - self.base)
            except IndexError:
                near = False
            return k if near else 0
        return k

    def skipped_for_certain(self) -> int:
        """The same for PostgreSQL, which knows no cron: there many at once are never skips."""
        k = self.skipped()
        return 0 if self.cadence == "cron" and k > 10 else k

    def put_off(self) -> timedelta:
        return timedelta(seconds=CHANCE * (self.jitter or 0))

    def stands_for(self) -> Waits:
        """The occurrence that it stands for when it is called next."""
        k = self.skipped()
        chosen = self.put_by == "application" or (not k and self.trigger != self.base)
        k = 0 if chosen else k
        all_skips = self.skips + k
        by_name = self.put_by == "name" and not chosen
        if self.begun is None or self.extra is not None or all_skips:
            number = self.occurrence + all_skips
        elif by_name:
            # It was called and did not run: the same occurrence, as something else.
            return Waits(self.occurrence, self.rekey + 1, self.trigger, False)
        else:
            number = self.occurrence + 1
        rekey = self.rekey if number == self.occurrence else 0
        if self.unplanned:
            # No moment was found for it before: it begins with what it is now.
            falls = almanac.after(self.cron or "", self.zone or "UTC", self.trigger - MOMENT)
            return Waits(number, rekey, falls, True)
        if self.anew and not chosen:
            assert self.edited is not None
            return Waits(number, rekey, self.nth(self.edited, 1 + all_skips), True)
        if not all_skips or chosen or not self.recurring or self.cadence == "interval":
            return Waits(number, rekey, self.trigger, False)
        if by_name:
            falls = self.nth(self.base, k) if self.on_cron and k else self.trigger
            return Waits(number, rekey, falls, self.on_cron and k > 0)
        if not self.on_cron:
            # A grid goes on from where the skips have led, those before an edit, too.
            start = (self.led_to or self.base) if self.skips else (self.scheduled or self.base)
            on_moment = not self.skips or self.led_to is not None
            return Waits(
                number, rekey, start + timedelta(seconds=k * (self.interval or 0)), on_moment
            )
        if self.skips and self.edited is not None and self.base <= self.edited:
            # It had fallen due before the edit, and is owed as it stands.
            return Waits(number, rekey, self.nth(self.base, k) if k else self.base, k > 0)
        return Waits(number, rekey, self.nth(self.scheduled or self.base, all_skips), True)

    def ahead(self) -> datetime | None:
        """The nominal time of what waits, as `preview` says it; None where the recall ends before
        it."""
        if self.extra is not None:
            number, falls = 0, self.extra
        elif self.changed:
            number, _, falls, _ = self.stands_for()
        else:
            number, falls = self.occurrence, self.scheduled or self.base
        return None if self._past_its_end(falls, number) else falls

    @property
    def as_before(self) -> str:
        """How the recall ends before an occurrence that is not called: as the last one did."""
        failed = self.failures > 0 or self.last_outcome not in (None, "answered")
        return "failed" if failed else "fired"

    # --- what people do ---------------------------------------------------------------------------

    def edit(self, now: datetime, new: dict[str, Any], trigger: datetime | None) -> None:
        """Other values in these columns, perhaps with another time in the same statement."""
        changed = {name for name, value in new.items() if getattr(self, name) != value}
        if not changed & set(RULE):
            for name, value in new.items():
                setattr(self, name, value)
            self.move(now, trigger)
            return
        k = self.skipped_for_certain()
        if not k and self.trigger != self.base and not self.stands:
            self.put_by = "application"
        elif k and not self.called_before:
            self.scheduled = self.scheduled or self.base
            if self.cadence == "grid":
                self.led_to = self.scheduled = self.scheduled + (self.trigger - self.base)
        elif k:
            self.led_to = None
        k = 0 if self.put_by == "application" else k
        self.base, self.skips, self.stands = self.trigger, self.skips + k, False
        waits = not self.called_before and self.trigger > now
        was_on_cron = self.on_cron
        for name, value in new.items():
            setattr(self, name, value)
        self.edited = now + MOMENT if self.called_before else now
        self.anew = self.anew and self.on_cron
        if self.unplanned and not was_on_cron:
            self.interval = 86_400  # Until a worker has planned a moment.
        if trigger is not None and trigger != self.trigger:
            self._put(trigger, "name")
            self.anew = False
        elif waits and self.recurring and changed & {"cadence", "cron", "zone"}:
            if self.on_cron:
                self.anew, self.put_by = True, "worker"
            elif "cadence" in changed:
                self._put(now + timedelta(seconds=(self.interval or 0) * (1 + self.skips)))
                self.scheduled = None
                if self.extra is not None:
                    # Its key has the number of what waits, which stays while it lasts.
                    self.led_to = self.trigger
                else:
                    self.occurrence += self.skips
                    self.rekey = 0 if self.skips else self.rekey
                    self.skips = 0
        self.what_is_planned_comes_first(now)

    def move(self, now: datetime, trigger: datetime | None) -> None:
        """The application names another time."""
        self.trigger = self.trigger if trigger is None else trigger
        if self.stands:
            self.base = self.trigger
        self.what_is_planned_comes_first(now)

    def what_is_planned_comes_first(self, now: datetime) -> None:
        """An extra run that waits to be called again is dropped where it would come later."""
        waits = self.extra is not None and self.holder is None and self.due_at > now
        if waits and self.trigger < self.due_at:
            self.extra = self.begun = self.lease_until = None
            self.attempt = self.deferrals = 0

    def reschedule(self, now: datetime, at: datetime) -> bool:
        """Move it by name; False where that is refused."""
        # What the application chose is no skip, as in `stands_for`.
        k = 0 if self.put_by == "application" else self.skipped()
        number = self.occurrence + self.skips + k + self.in_run
        last = self.in_run and (not self.recurring or number > (self.times or number))
        if last or (self.recurring and self.until is not None and at > self.until):
            return False
        self.skips += 0 if self.put_by == "application" else self.skipped_for_certain()
        self._put(at, "worker" if self.stands else "name")
        self.anew = False
        self.what_is_planned_comes_first(now)
        return True

    def fire(self, now: datetime) -> bool:
        """Run it now: what is due or was called is only hastened, else it is an extra run. False
        where that is refused."""
        if self.holder is not None or self.paused:
            return False
        if self.extra is not None:
            # What was called already is the same call under its key.
            self.lease_until = now
            return True
        if self.recurring and self.begun is None and self.trigger > now:
            self.extras += 1
            self.extra, self.extra_of, self.lease_until = now, self.occurrence, now
            return True
        self.hasten(now)
        return True

    def retry(self, now: datetime) -> None:
        """Run the occurrence again with which it ended, under a new key."""
        if self.put_by == "name":
            self.put_by = "worker"
            if self.trigger == self.base and self.cadence != "interval":
                self.scheduled = self.trigger
        self.hasten(now, however=True)
        self.led_to = None
        self.status, self.rekey = "pending", self.rekey + 1
        self.attempt, self.deferrals, self.failures, self.begun = 0, 0, 0, None
        self.holder = self.leased_at = self.lease_until = self.extra = None
        self.paused = self.accepted = False

    def hasten(self, now: datetime, *, however: bool = False) -> None:
        """What waits is due now; a move by the application stays one. `however`: also what is due
        already."""
        nominal = self.scheduled or self.trigger
        self.scheduled = min(nominal, now) if self.cadence == "interval" else nominal
        if self.put_by == "name" and (however or self.trigger > now):
            # What was moved away from there is due now, and was skipped.
            self.skips, self.base = self.skips + self.skipped(), self.trigger
            if now == self.planned:
                self.put_by = "worker"  # Where it had been planned, to the microsecond.
        if however or self.trigger > now:
            self.base += now - self.trigger
            self.trigger = now
            self.stands = False

    # --- what happens -----------------------------------------------------------------------------

    def take(self, worker: str, now: datetime) -> None:
        """A worker has it under a lease."""
        self.taken = self.holder is not None
        self.may_still_run = self.may_still_run or self.taken
        if not self.accepted:
            now_sent = (self.occurrence, self.call_type)
            if (self.taken or self.begun is not None) and self.body not in (None, now_sent):
                # A key stands for one body.
                self.rekey += self.extra is None and self.body[0] == self.occurrence
                self.extras += self.extra is not None and self.body[0] == self.occurrence
            self.body = now_sent
        if self.taken or self.begun is not None:
            self.begun = min(self.begun or self.leased_at or now, now)
        self.attempt += not self.accepted
        self.holder, self.leased_at, self.lease_until = worker, now, now + timedelta(seconds=LEASE)
        self.stands = False
        self.scheduled = self.scheduled or self.base
        if self.extra is not None:
            return
        if self.begun is None and self.recurring and self.cadence != "cron":
            self._cover(self.scheduled, now)

    def begin(self, now: datetime, edit: Callable[[], None] | None = None) -> str:
        """What the worker does with what it has taken: `put back`, `ended` (also failed or
        misfired), `used up`, `call`, or `poll`, as nothing is called again. `edit`: comes in
        between."""
        if edit is not None:
            as_it_was, as_taken = replace(self), replace(self, called=[*self.called], placed=False)
            edit()
            if self == as_it_was:
                return self.begin(now)
            does = as_taken.begin(now)
            if does == "poll" or (does == "call" and not as_taken.placed):
                self.called += as_taken.called[len(self.called) :]
                return does
            if does == "used up":
                return self._used_up(now)
            # What was decided, or was to be written, by the schedule as it was is dropped.
            self.settle("unsent", now, None)
            return "given back"
        if self.extra is not None:
            return self._begin_extra(now)
        if self.accepted:
            return "poll"
        assert self.scheduled is not None
        fresh, taken = self.begun is None, self.taken
        if self.changed:
            number, rekey, nominal, on_moment = self.stands_for()
            if self.trigger > now or (self.on_cron and on_moment and nominal > now):
                self._go_to(self.stands_for(), self.as_before, None, called=False)
                return "put back"
            if self.on_cron:
                self.interval = self.distance(nominal)
            self.occurrence, self.rekey, self.body = number, rekey, (number, self.call_type)
            self.attempt, self.deferrals, self.begun = 1, 0, None
            self.scheduled, fresh, taken = nominal, True, False
            self._settled_on()
            self.placed = True
            self._cover(nominal, now)
        elif fresh and self.on_cron:
            self._cover(self.scheduled, now)
            if self.missed:
                self.attempt, self.deferrals, self.begun = 1, 0, None
                self._settled_on()
                self.placed = True
        if fresh:
            if self._past_its_end(self.scheduled, self.occurrence):
                self._finish(self.as_before, "expired", called=False)
                return "ended"
            allowed = None if self.grace is None else max(1, self.grace) + (self.jitter or 0)
            if allowed is not None and (now - self.scheduled).total_seconds() > allowed:
                self._misfire(now, allowed)
                return "ended"
        if taken and self.attempt > MAX_ATTEMPTS:
            return self._used_up(now)
        self.called.append((self.key, self.scheduled, self.missed))
        return "call"

    def _used_up(self, now: datetime) -> str:
        """No attempt is left, and how the last one ended is not known: whatever was edited."""
        if self.extra is not None:
            self._extra_done(now, "unknown")
        else:
            self._occurrence_done(now, "unknown", called=False)
        return "used up"

    def _begin_extra(self, now: datetime) -> str:
        assert self.extra is not None
        if self.accepted:
            return "poll"
        if self.attempt > MAX_ATTEMPTS:
            return self._used_up(now)
        self.called.append((self.key, self.extra, 0))
        return "call"

    def _cover(self, nominal: datetime, now: datetime) -> None:
        self.missed = self.count(nominal, now)
        self.covered = now if self.until is None else min(now, self.until)

    def accept(self, now: datetime) -> None:
        """The API took the run: it is polled from now on."""
        # What was missed was counted at the claim: an edit since then came after the beginning.
        claimed = self.leased_at or now
        edited = self.edited is not None and self.edited >= claimed
        self.begun = self.begun or (claimed if edited else now)
        self.accepted, self.last_outcome = True, "accepted"

    def hand_over(self, now: datetime) -> None:
        """The worker that polls it stops: its lease ends, and the next one goes on polling."""
        self.lease_until, self.last_outcome = now, "accepted"

    def settle(self, outcome: str, now: datetime, retry_after: int | None) -> None:
        """The call that is under way ended so."""
        if self.extra is not None:
            self._settle_extra(outcome, now, retry_after)
            return
        begun = self.begun or self.leased_at or now
        match outcome:
            case "answered" | "refused":
                self._occurrence_done(now, outcome)
            case "gone":
                self._finish("cancelled", outcome)
            case "unknown" | "failed" if self.attempt >= MAX_ATTEMPTS:
                self._occurrence_done(now, outcome)
            case "unknown" if self.accepted:
                # Never posted again.
                self._occurrence_done(now, outcome)
            case "unsent" if not self.changed:
                self._wait(now, None, self.attempt - 1, outcome=None)
            case "unsent":
                self._go_to(self.stands_for(), self.as_before, None, called=False)
            case _ if self.changed:
                self.begun = begun
                self._go_to(self.stands_for(), "failed", outcome)
            case "unknown" | "failed":
                self.rekey += outcome == "failed"
                delay = self._delay(outcome, retry_after)
                self._wait(now, delay, self.attempt, outcome, begun, deferrals=0)
            case _:
                waited = (now - self.begun).total_seconds() if self.begun else 0.0
                if waited > GIVE_UP:
                    self._occurrence_done(now, outcome)
                    return
                delay, more = self._delay(outcome, retry_after), self.deferrals + 1
                self._wait(now, delay, self.attempt - 1, outcome, begun, more)

    def _settle_extra(self, outcome: str, now: datetime, retry_after: int | None) -> None:
        """An extra run ended: what is planned stands, and comes first."""
        over = outcome in ("unknown", "failed") and self.attempt >= MAX_ATTEMPTS
        over = over or (outcome == "unknown" and self.accepted)
        if outcome == "gone":
            self._finish("cancelled", outcome)
            return
        if outcome in ("answered", "refused") or over:
            self._extra_done(now, outcome)
            return
        waited = (now - self.begun).total_seconds() if self.begun else 0.0
        if waited > GIVE_UP and outcome in ("busy", "unavailable", "misconfigured"):
            self._extra_done(now, outcome)
            return
        again = now + timedelta(seconds=self._delay(outcome, retry_after))
        if again >= self.trigger and outcome != "unsent":
            self._what_is_planned_stays(outcome)
            return
        self.extras += outcome == "failed"
        counted = outcome in ("unknown", "failed")
        self.attempt -= not counted
        self.deferrals = 0 if counted else self.deferrals + (outcome != "unsent")
        if outcome != "unsent":
            self.begun = self.begun or self.leased_at
        self.holder = self.leased_at = None
        self.accepted, self.lease_until = False, again
        self._ended_as(None if outcome == "unsent" else outcome)

    def _extra_done(self, now: datetime, outcome: str) -> None:
        if self.recurring and self.cadence == "interval" and not self.changed:
            falls = now + timedelta(seconds=self.interval or 0)
            waits = Waits(self.occurrence, self.rekey, falls, True)
            self._go_to(waits, self.as_before, outcome)
            return
        self._what_is_planned_stays(outcome)

    def _what_is_planned_stays(self, outcome: str) -> None:
        self.begun, self.attempt, self.deferrals, self.may_still_run = None, 0, 0, False
        self._let_go(outcome)

    def _delay(self, outcome: str, retry_after: int | None) -> float:
        """Seconds until the next call."""
        if outcome == "unsent":
            return 0.0
        if outcome == "busy":
            return BUSY_DELAY if retry_after is None else retry_after
        n = self.attempt - 1 if outcome in ("unknown", "failed") else min(self.deferrals, 10)
        return CHANCE * min(300.0, 5.0 * 4.0**n)

    def plan(self) -> None:
        """A cron recall that waits where it was moved (or inserted, or edited) is put on a
        moment."""
        waits = self.stands_for()
        may_still_run = self.may_still_run
        if self._past_its_end(waits.nominal, waits.number):
            self.status = self.as_before
            self.attempt = self.deferrals = self.missed = 0
            self.begun = None
            self._settled_on()
        else:
            self._go_to(waits, self.as_before, None)
            self.scheduled = waits.nominal
        self.may_still_run = may_still_run

    def _occurrence_done(self, now: datetime, outcome: str, *, called: bool = True) -> None:
        ended = "fired" if outcome == "answered" else "failed"
        k = self.skipped()
        chosen = self.put_by == "application" or (not k and self.trigger != self.base)
        if not self.recurring:
            if chosen or self.put_by == "name":
                number = self.occurrence + 1
                self._go_to(Waits(number, 0, self.trigger, False), ended, outcome, called=called)
            else:
                self._finish(ended, outcome, called=called)
            return
        failures = 0 if outcome == "answered" else self.failures + 1
        if self.failures_most is not None and failures >= self.failures_most:
            self._finish("failed", outcome, called=called)
            return
        assert self.scheduled is not None
        k = 0 if chosen else k
        number = self.occurrence + 1 + self.skips + k
        if chosen:
            falls, on_moment = self.trigger, False
        elif self.put_by == "name":
            on_moment = self.on_cron and k > 0
            falls = self.nth(self.base, k) if on_moment else self.trigger
        elif self.cadence == "interval":
            falls = now + timedelta(seconds=(self.interval or 0) * (1 + self.skips + k))
            on_moment = True
        else:
            covered = self.count(self.scheduled, self.covered or self.scheduled)
            falls, on_moment = self.nth(self.scheduled, covered + 1 + self.skips + k), True
        waits = Waits(number, 0, falls, on_moment)
        self._go_to(waits, ended, outcome, failures, called=called)

    def _misfire(self, now: datetime, allowed: int) -> None:
        if not self.recurring:
            self._finish("failed", "misfired", called=False)
            return
        assert self.scheduled is not None
        n = 1
        while self.nth(self.scheduled, n) < now - timedelta(seconds=allowed):
            n += 1
        waits = Waits(self.occurrence + 1, 0, self.nth(self.scheduled, n), True)
        self._go_to(waits, "failed", "misfired", called=False)

    def _past_its_end(self, falls: datetime, number: int) -> bool:
        if not self.recurring:
            return False
        return (self.times is not None and number > self.times) or (
            self.until is not None and falls > self.until
        )

    def _go_to(
        self,
        waits: Waits,
        ended: str,
        outcome: str | None,
        failures: int | None = None,
        *,
        called: bool = True,
    ) -> None:
        """Another occurrence waits: at a moment, or where somebody put it. Unless the recall ends
        before it."""
        if self._past_its_end(waits.nominal, waits.number):
            self._finish(ended, outcome, called=called)
            return
        if self.on_cron:
            self.interval = self.distance(waits.nominal)
        if waits.on_moment:
            self.trigger = waits.nominal + self.put_off()
        # After an interval nothing but the due time is nominal.
        nominal = waits.on_moment and (self.cadence != "interval" or outcome == "misfired")
        self.scheduled = waits.nominal if nominal else None
        self.occurrence, self.rekey = waits.number, waits.rekey
        self.failures = self.failures if failures is None else failures
        self.attempt = self.deferrals = self.missed = 0
        self.begun = self.covered = self.edited = None
        self.may_still_run = False
        self._settled_on()
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
        self._settled_on()
        self.attempt = attempt
        self.begun = begun if begun is not None else self.begun
        self.deferrals = self.deferrals if deferrals is None else deferrals
        self._let_go(outcome)

    def _finish(self, status: str, outcome: str | None, *, called: bool = True) -> None:
        self.attempt -= not called
        self.status = status
        self._settled_on()
        self._let_go(outcome)

    def _put(self, trigger: datetime, by: Literal["worker", "name"] = "worker") -> None:
        self.trigger = self.base = trigger
        self.planned = trigger if by == "worker" else self.planned
        self.put_by = by

    def _settled_on(self) -> None:
        """A worker has written what it stands for."""
        self._put(self.trigger)
        self.skips, self.led_to, self.anew = 0, None, False

    def _let_go(self, outcome: str | None) -> None:
        self.holder = self.leased_at = self.lease_until = None
        self.accepted = False
        self.extra = None
        self._ended_as(outcome)

    def _ended_as(self, outcome: str | None) -> None:
        if outcome in ("unknown", "answered", "failed", "refused", "gone"):
            self.may_still_run = outcome == "unknown"
        self.last_outcome = outcome or self.last_outcome

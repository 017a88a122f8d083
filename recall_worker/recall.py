"""The nouns: what a recall is while the worker holds it, how a call can end, and what the row can
become.

Owns the words (DESIGN's glossary) and their types. Everything here is frozen data: no clock, no
SQL, no HTTP. `Outcome` and `Verdict` are closed unions: code that matches one ends with
`assert_never`, so that a new ending cannot be forgotten.

Never here: rules. The judge decides what an outcome means, cadence when the next occurrence falls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

CALL_TYPES = ("once", "recurring", "immediate")
LIVE = ("pending", "running")
FINAL = ("fired", "cancelled", "failed")
STATUSES = LIVE + FINAL
KEYS_OF_AN_ERA = 1000
"""Renewals of one occurrence's key that are counted together. Where `migrate` has to renew the keys
of all recalls, `rekey` starts at a multiple of this that no key had, and each later occurrence
starts there again, as its number may have been used before."""


@dataclass(frozen=True, slots=True)
class Recall:
    """The standing promise: one row, as its owner sees it. Dates are in UTC, clamped to years 1 to
    9998."""

    id: str
    session_id: str
    call_type: str
    """once, recurring, immediate."""
    trigger_at: datetime
    """When it is next due (while it is not being run)."""
    interval_seconds: int | None
    internal_comment: str | None
    additional_context_message: str
    status: str
    """pending, running, fired, cancelled, failed."""
    created_at: datetime
    updated_at: datetime
    occurrence: int
    """Number of the occurrence that waits or runs, from 1."""
    attempt: int
    last_outcome: str | None
    reason: str | None
    """Why it waits, or why it ended, in a sentence."""
    leased_by: str | None
    ended_at: datetime | None
    paused_at: datetime | None
    scheduled_for: datetime | None
    """Nominal time of that occurrence; None: `trigger_at`."""
    planned_at: datetime | None
    """`trigger_at` as the worker (or the insert) last wrote it. A different `trigger_at` means that
    the application moved it."""
    cadence: str
    """interval, grid, cron."""
    cron: str | None
    time_zone: str | None
    until_at: datetime | None
    times: int | None
    failures_most: int | None
    grace_seconds: int | None
    jitter_seconds: int | None
    edited_at: datetime | None
    """When its rule was last edited."""
    edit_of: int | None
    """The occurrence whose moment a worker is to compute anew, as the rule was edited."""
    skips: int
    """Occurrences that were skipped before an edit, and are not left out yet."""
    named_at: datetime | None
    """`trigger_at` as a person named it: it consumes no occurrence."""
    fired_at: datetime | None
    """Since when an extra run is asked for, if one is."""
    fires: int
    """How many extra runs were asked for so far."""
    queue: str = "default"
    """Which workers may claim it."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Recall:
        """The recall from a row, which may have more columns."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})


class Claim(NamedTuple):
    """One occurrence of one recall, held under a lease: the columns of the ledger's statement
    `claim`, in its order.

    Ages and distances are seconds by PostgreSQL's clock at the moment of the claim; the caller adds
    the time since then from the host's monotonic clock. Dates are clamped to years 1 to 9998, as
    psycopg loads no others.
    """

    id: str
    session_id: str
    call_type: str
    message: str | None
    """None: too long to come with the claim; it is read before the call."""
    interval: int | None
    """`interval_seconds` as it stands in the row: seconds, possibly absurd."""
    occurrence: int
    """Number of the occurrence, from 1."""
    rekey: int
    """How many times this occurrence was given a new idempotency key, 0 at first."""
    attempt: int
    """The attempt this claim may spend, from 1: counted when claimed, given back on defer and
    release."""
    deferrals: int
    """Calls of this occurrence in a row that cost no attempt."""
    scheduled_for: datetime
    """The occurrence's nominal time."""
    missed: int
    """Due moments after `scheduled_for` that this run also stands for, fixed at the occurrence's
    first claim."""
    begun_age: float | None
    """Seconds since the occurrence's first call, or None where it has had none."""
    lag: float
    """Seconds from due to the start of the claim."""
    lateness: float
    """Seconds from `scheduled_for` to the start of the claim."""
    lease: UUID
    trigger: str
    """`trigger_at` as text, to the microsecond and with its offset: proof for the settle that
    nobody moved it meanwhile."""
    trigger_at: datetime
    planned_at: datetime
    """`trigger_at` as the worker (or the insert) last wrote it. A different `trigger_at` means that
    the application moved it."""
    due: bool
    """Whether `trigger_at` has come: False only where a lease ended on a row that was moved into
    the future meanwhile."""
    taken_from: str | None
    """The worker whose lease had ended when this claim took the row up, if any."""
    octets: int = 0
    """How long the message is, in UTF-8."""
    called_before: bool = False
    """Whether that worker is known to have sent its request. Where this is False it may have,
    too."""
    takeovers: int = 0
    """Where a row was taken up: how many workers in a row took it up without being known to have
    sent anything, this one included."""
    reference: str | None = None
    """The API's name for the run of this occurrence that it accepted: to be polled, not called
    again."""
    delivered_age: float | None = None
    """Seconds since the API accepted that run."""
    claimed_at: datetime = datetime(1, 1, 2, tzinfo=UTC)
    """The instant of the claim, by PostgreSQL's clock."""
    cadence: str = "interval"
    """interval, grid, cron; or what plain SQL wrote there."""
    cron: str | None = None
    time_zone: str | None = None
    until: datetime | None = None
    times: int | None = None
    failures: int = 0
    failures_most: int | None = None
    grace: int | None = None
    """Seconds of lateness after which an occurrence is not run."""
    jitter: int | None = None
    """Seconds by which occurrences are spread, at most."""
    last_outcome: str | None = None
    """How the last call of any occurrence ended; None: nothing was called yet."""
    edits: int = 0
    """How often its schedule was edited: proof for the settle, as `trigger`."""
    edited_at: datetime | None = None
    """When its rule was last edited: the new rule's moments count from there."""
    edit_of: int | None = None
    """The occurrence whose moment is to be computed anew."""
    skips: int = 0
    """Occurrences that were skipped before an edit, and are not left out yet."""
    named_at: datetime | None = None
    """`trigger_at` as a person named it."""
    extra: int = 0
    """The number of the extra run that is in hand (`fire`), from 1; 0: it is the occurrence."""
    uncounted: int = 0
    """Calls of this occurrence that may have run and cost no attempt. Of an occurrence that was
    never called, what an earlier one left behind: see `may_have_run`."""

    @property
    def key(self) -> str:
        """The idempotency key: `<recall id>:<occurrence>`, with `.<rekey>` behind it where it was
        renewed, or `.f<n>` for an extra run."""
        behind = f".f{self.extra}" if self.extra else f".{self.rekey}" if self.rekey else ""
        return f"{self.id}:{self.occurrence}{behind}"

    @property
    def begun(self) -> bool:
        """Whether this occurrence was called before, or may have been."""
        return self.begun_age is not None or self.taken_from is not None

    @property
    def may_have_run(self) -> int:
        """Calls of this occurrence that may have run and cost no attempt."""
        return max(0, self.uncounted) if self.begun else 0

    @property
    def named(self) -> bool:
        """Whether a person named its time since the worker last planned it. A worker of an earlier
        version plans without erasing the name: what it planned stands then."""
        return (
            self.named_at is not None
            and self.named_at != self.planned_at
            and self.trigger_at != self.planned_at
        )

    @property
    def keeps_number(self) -> bool:
        """Whether its time is the one that a person named: that consumes no occurrence."""
        return self.named and self.trigger_at == self.named_at

    @property
    def base(self) -> datetime:
        """The time from which a move by the application is counted."""
        return self.named_at if self.named_at is not None and self.named else self.planned_at

    @property
    def to_replan(self) -> bool:
        """Whether its rule was edited while it waited, so that its moment is to be computed
        anew."""
        return self.edit_of == self.occurrence and self.recurring and self.cadence == "cron"

    @property
    def has_another_time(self) -> bool:
        """Whether `trigger_at` is not what the worker planned: moved by the application, or
        named."""
        return self.trigger_at != self.planned_at

    @property
    def moved(self) -> bool:
        """Whether the row stands for another occurrence, or another time, than was planned."""
        return self.has_another_time or self.skips > 0 or self.to_replan

    @property
    def recurring(self) -> bool:
        return self.call_type == "recurring"


# --- outcomes: how a call ended -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answered:
    """The agent ran, and the API confirmed it."""

    http_status: int
    note: str | None = None
    """What people should know of it all the same: the run waits for a person, say."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The API accepted the run and reports later how it ended."""

    reference: str
    http_status: int
    retry_after: float | None = None
    """Seconds until it is to be asked first, where the API says so."""
    note: str | None = None
    """What people should know of the address that it gave."""


@dataclass(frozen=True, slots=True)
class Busy:
    """The session is in use; nothing was started."""

    http_status: int
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Gone:
    """The API says that the session does not exist."""

    http_status: int


@dataclass(frozen=True, slots=True)
class Misconfigured:
    """Our fault, not the recall's: a wrong address, a wrong token, a web page in place of the
    API."""

    reason: str
    http_status: int | None = None
    of_session: bool = False
    """Whether it may be this session's trouble alone: nothing is at its address."""

    @property
    def may_have_run(self) -> bool:
        """Whether the agent may have run all the same: a success that is a web page."""
        return self.http_status is not None and 200 <= self.http_status < 300


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Nothing was started: no connection, or an answer that says "later"."""

    reason: str
    http_status: int | None = None
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Unknown:
    """The request was sent and no trustworthy answer came: it may have run."""

    reason: str
    http_status: int | None = None
    retry_after: float | None = None
    by_gateway: bool = False
    """Whether a gateway answered for a server that is away: trouble of the endpoint, and no answer
    of the application's."""
    accepted: bool = False
    """Whether the API accepted the run, and it can't be followed: it is never posted again."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The API itself says that the run failed."""

    reason: str
    http_status: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """The API will never accept this request as it is."""

    reason: str
    http_status: int | None = None


@dataclass(frozen=True, slots=True)
class Unsent:
    """We stopped, or the recall was taken from us, before anything was sent."""

    reason: str


@dataclass(frozen=True, slots=True)
class Capped:
    """We hold the recall back: its session has had as many runs as it may. Nothing was sent."""

    reason: str
    retry_after: float


@dataclass(frozen=True, slots=True)
class Misfired:
    """The occurrence is later than its grace: nothing was sent."""

    reason: str
    passed_over: int
    """Further due moments that were too late with it."""


@dataclass(frozen=True, slots=True)
class Expired:
    """The recall's own end (a date, a number of occurrences) came before this occurrence: nothing
    was sent."""

    reason: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """The row itself can't be run: nothing was sent."""

    reason: str


Outcome: TypeAlias = (
    Answered
    | Accepted
    | Busy
    | Gone
    | Misconfigured
    | Unavailable
    | Unknown
    | Failed
    | Refused
    | Capped
    | Misfired
    | Expired
    | Unsent
    | Malformed
)


def name_of(outcome: Outcome) -> str:
    """The outcome's name as it stands in the table of attempts and in the logs: its class in lower
    case."""
    return type(outcome).__name__.lower()


def reason_of(outcome: Outcome) -> str | None:
    """One sentence on how the call ended, where the outcome carries one."""
    match outcome:
        case Busy(status, _):
            return f"the session is busy (HTTP {status})"
        case Gone(status):
            return f"the API says that the session does not exist (HTTP {status})"
        case Answered() | Accepted():
            return outcome.note
        case _:
            return outcome.reason


def http_status_of(outcome: Outcome) -> int | None:
    return getattr(outcome, "http_status", None)


# --- verdicts: what the row becomes ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class After:
    """A due time relative to the end of the call, in seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class AsMoved:
    """The due time that is already in the row, because the application wrote it."""

    distance: int | None = None
    """As with At."""


@dataclass(frozen=True, slots=True)
class AsPlanned:
    """What was planned stays: the run was one besides the schedule."""


@dataclass(frozen=True, slots=True)
class At:
    """A nominal time."""

    when: datetime
    distance: int | None = None
    """Seconds from it to the moment after, where `interval_seconds` keeps that for the
    application's skip."""
    jitter: float = 0.0
    """Seconds by which it is due after its nominal time."""


When: TypeAlias = After | At | AsMoved | AsPlanned


@dataclass(frozen=True, slots=True)
class Placement:
    """The occurrence that a row stands for after the application moved it (or cron ticks were
    missed): it is written before the call."""

    occurrence: int
    when: At | AsMoved
    missed: int
    rekey: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """The recall is over: `fired`, `cancelled` or `failed`."""

    status: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Next:
    """This occurrence is over; another one waits."""

    occurrence: int
    when: When
    reason: str | None = None
    failures: int = 0
    """Failed occurrences in a row so far."""
    replan: bool = False
    """Its moment is to be computed by another worker, as this one's time zone data can't."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The same occurrence again; the attempt is spent. With a new key where the API would only
    replay the old ending."""

    when: After
    rekey: bool
    reason: str
    uncounted: int = 0
    """As with Defer."""


@dataclass(frozen=True, slots=True)
class Defer:
    """The same occurrence again, same key; the attempt is given back."""

    when: After
    reason: str
    uncounted: int = 0
    """Calls of this occurrence so far that may have run and cost no attempt."""


@dataclass(frozen=True, slots=True)
class Release:
    """Given back as it was, due at once: another worker may run it."""

    reason: str


Verdict: TypeAlias = Finish | Next | Retry | Defer | Release


@dataclass(frozen=True, slots=True)
class Ending:
    """A call that has ended: what there is to judge and then to settle.

    `called_after` and `ended_after` are seconds of the host's monotonic clock since the claim was
    sent; `called_after` is None where no request was sent. `ended_at` is the monotonic instant of
    the end: a settle that waits for PostgreSQL to come back still knows how long ago the run ended.
    """

    claim: Claim
    outcome: Outcome
    called_after: float | None
    ended_after: float
    ended_at: float
    breaker_closed: bool = True
    others_answered: bool = False
    """Whether the application answered other sessions meanwhile."""


# --- settle: how the row answered -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settled:
    """Written; the recall is now in `status`."""

    status: str


@dataclass(frozen=True, slots=True)
class Moved:
    """Not written: `trigger_at` or the schedule was changed during the run. Judge again."""

    now: Mapping[str, Any]
    """The fields of the claim that say when it is due and how it recurs, as the row has them
    now."""
    as_settled: bool
    """Whether it is due one interval after that write: another scheduler writes that after its
    run."""


@dataclass(frozen=True, slots=True)
class Locked:
    """Not written: the application holds the row locked. Try again."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The application ended the recall during its run (cancelled, marked, or deleted): the run's
    end changes nothing."""

    status: str


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The lease ended and another worker took the row: we forget it."""


@dataclass(frozen=True, slots=True)
class Stranded:
    """Not written: PostgreSQL refuses this one row. Its lease will end, and a worker will take it
    up."""

    reason: str


Settlement: TypeAlias = Settled | Moved | Locked | Ended | LeaseLost | Stranded

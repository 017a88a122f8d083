"""The one place that decides what an ending means: (ending, policy, dice) → verdict. Pure; the
outcome table of DESIGN in code.

Owns backoff, attempts, giving up, and what the row becomes when the application moved it during its
run. Never here: the clock, SQL, HTTP. Durations come with the ending, chance comes as `dice`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, assert_never

from . import cadence
from .recall import (
    KEYS_OF_AN_ERA,
    Accepted,
    After,
    Answered,
    AsMoved,
    AsPlanned,
    At,
    Busy,
    Capped,
    Claim,
    Defer,
    Ending,
    Expired,
    Failed,
    Finish,
    Gone,
    Malformed,
    Misconfigured,
    Misfired,
    Next,
    Placement,
    Refused,
    Release,
    Retry,
    Unavailable,
    Unknown,
    Unsent,
    Verdict,
    When,
    reason_of,
)

Dice = Callable[[], float]
"""A number in [0, 1), new at each call: `random.random`."""

BACKOFF_FIRST, BACKOFF_FACTOR, BACKOFF_MOST = 5.0, 4.0, 300.0
"""Seconds before the second call, at most; then this many times as long; at most."""
BACKOFF_STEPS = 10
"""The largest exponent: the most is reached long before it, and no larger power needs computing."""
RETRY_AFTER_LEAST, RETRY_AFTER_MOST = 1.0, 86_400.0
"""Seconds: an API that answers 0 would otherwise be called as fast as it answers, until we give
up."""

UNCOUNTED_MOST = 20
"""Calls of one occurrence that may have run and cost no attempt: beyond that, it is given up."""
UNCOUNTED_BACKOFF_MOST = 3600.0
"""Seconds between two of these, at most: their pauses go on growing."""
RUN_BEGAN = 10.0
"""Seconds after which a gateway's answer no longer means that nothing was there to run it: a crash
in mid-run, or the gateway's own deadline."""

NEVER_REACHED = frozenset({521, 522, 523, 525, 526, 530})
"""By these Cloudflare says that it could not reach the server, however long that took."""

LAST = 2_147_483_647
"""The largest number that an occurrence can have: as much as the table's counters hold."""
MESSAGE_LIMIT = 4 << 20
"""Octets of the longest message that is sent, where nothing else is set."""
UNSENT_MOST = 10
"""Workers in a row that may die with a row that they had taken up and not sent: beyond that, the
row is what kills them."""
ID_MOST = 2000
"""Bytes of the longest id that is called: it must fit into an index of recall_attempts, and into a
header that servers accept."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that decide. Seconds, a count of attempts, and octets of the longest message."""

    busy_delay: float
    max_attempts: int
    give_up: float
    message_limit: int = MESSAGE_LIMIT


def backoff(n: int, dice: Dice) -> float:
    """Seconds before call n + 2 of an occurrence: 5 s × 4ⁿ, at most 300 s, full jitter."""
    steps = max(0, min(n, BACKOFF_STEPS))
    return dice() * min(BACKOFF_MOST, BACKOFF_FIRST * BACKOFF_FACTOR**steps)


def uncounted_backoff(n: int, dice: Dice) -> float:
    """Seconds before the next call after n + 1 that may have run and cost no attempt: as `backoff`
    at first, then twice as long each time, to an hour."""
    n = max(0, min(n, UNCOUNTED_MOST))
    first = BACKOFF_FIRST * BACKOFF_FACTOR**n
    return dice() * (
        first
        if first <= BACKOFF_MOST
        else min(UNCOUNTED_BACKOFF_MOST, BACKOFF_MOST * 2 ** (n - _STEPS_TO_MOST))
    )


_STEPS_TO_MOST = 3
"""5 s × 4³ is more than 300 s."""


def before_call(
    claim: Claim, max_attempts: int, message_limit: int = MESSAGE_LIMIT
) -> Malformed | Misfired | Expired | Unknown | None:
    """The outcome of a claim that is decided without a call; None where it is to be called.
    `message_limit`: octets."""
    reason = absent(claim) or cadence.problem(claim)
    if reason is None and claim.call_type not in ("once", "recurring", "immediate"):
        reason = f"call_type is {claim.call_type!r}, which nobody here knows"
    if reason is None and claim.session_id in ("", ".", ".."):
        reason = f"session_id is {claim.session_id!r}, which can't be named in an address"
    if reason is None and len(claim.id.encode()) > ID_MOST:
        reason = (
            f"id is {len(claim.id.encode())} bytes long: at most {ID_MOST} make an idempotency key"
        )
    if reason is None and claim.octets > message_limit:
        long, limit = _mebibytes(claim.octets), _mebibytes(message_limit)
        reason = f"its message is {long} long: RECALL_MESSAGE_LIMIT allows {limit}"
    if reason is None and claim.takeovers > UNSENT_MOST:
        reason = f"{UNSENT_MOST} workers in a row died with it in hand before anything was sent"
    if reason is not None:
        return Malformed(reason)
    # An extra run was asked for by a person: the recall's end and grace are its occurrences'.
    if not claim.begun and not claim.extra:
        if (end := cadence.ends(claim, claim.scheduled_for, claim.occurrence)) is not None:
            return Expired(end)
        if (late := cadence.too_late(claim)) is not None:
            return Misfired(late, cadence.passed_over(claim))
    if claim.begun and claim.attempt > max_attempts:
        made = f"{max_attempts} attempts" if max_attempts != 1 else "its one attempt"
        if claim.taken_from is None:
            return Unknown(f"{made} used up, and how the last one ended is not known")
        perhaps = "" if claim.called_before else ": perhaps never called"
        return Unknown(f"{made}, the last by a worker that was not heard of again{perhaps}")
    return None


def absent(claim: Claim) -> str | None:
    """What the row must have and has not, in words: the application's columns may be null."""
    needed: tuple[tuple[str, object], ...] = (
        ("session_id", claim.session_id),
        ("call_type", claim.call_type),
        # The message itself is left out where it is long.
        ("additional_context_message", claim.octets),
    )
    names = [name for name, value in needed if value is None]
    return f"{', '.join(names)} must not be null" if names else None


def _mebibytes(octets: int) -> str:
    return f"{octets / (1 << 20):.4g} MiB" if octets >= 1 << 20 else f"{octets} octets"


def resolve_move(claim: Claim) -> Placement | None:
    """The occurrence that a row stands for, where its columns differ from it: `trigger_at` was
    moved, the rule was edited, or cron ticks were missed.

    A skip of k intervals consumes k numbers. Any other move keeps the number of an occurrence that
    was never called; between two calls it begins the next one, as a key stands for one occurrence
    only. A time that a person named keeps the number also then, under a new key.
    """
    if claim.extra or claim.reference is not None or cadence.problem(claim) is not None:
        # A run that continues at the API is followed to its end first; the verdict applies the
        # move. What is planned waits until an extra run has ended.
        return None
    if not claim.moved and not cadence.unplanned(claim):
        # The row has the distance to the following tick, to the second: only where that has passed,
        # ticks may have been missed. Since an edit it is no longer known.
        late = (
            not claim.begun
            and claim.recurring
            and claim.cadence == "cron"
            and (claim.edited_at is not None or claim.lateness + 1 >= (claim.interval or 0))
        )
        missed = cadence.missed(claim) if late else 0
        return (
            Placement(
                claim.occurrence, At(claim.scheduled_for, claim.interval), missed, claim.rekey
            )
            if missed
            else None
        )
    when = cadence.moved_to(claim)
    occurrence = _number(claim, called=claim.begun)
    rekey = next_rekey(claim, occurrence, called=claim.begun)
    placed = claim._replace(scheduled_for=when.when if isinstance(when, At) else claim.trigger_at)
    return Placement(min(LAST, occurrence), when, cadence.missed(placed), rekey)


def _number(claim: Claim, *, called: bool) -> int:
    """The number of the occurrence that a moved row stands for. `called`: whether the one that it
    has was called."""
    goes_on = 0 if claim.keeps_number or not called else 1
    return claim.occurrence + (cadence.skipped(claim) or goes_on)


def next_rekey(claim: Claim, occurrence: int, *, called: bool) -> int:
    """How often this occurrence's key was renewed: an occurrence that keeps its number keeps the
    key that an operator gave it, unless it was called. Where the keys of all recalls were renewed,
    as columns had been lost, another occurrence starts at the number that was chosen then."""
    if occurrence != claim.occurrence:
        return max(0, claim.rekey // KEYS_OF_AN_ERA * KEYS_OF_AN_ERA)
    return min(LAST, claim.rekey + 1) if called else claim.rekey


def as_it_stands(ending: Ending, now: Mapping[str, Any]) -> Ending:
    """The same ending for a row whose time or schedule was changed in mid-run. `now`: the claim's
    fields as the row has them. What was decided without a call, by the earlier schedule, is decided
    anew at the next claim."""
    claim = ending.claim._replace(**now)
    outcome = ending.outcome
    if claim.edits != ending.claim.edits and isinstance(outcome, Expired | Misfired | Malformed):
        outcome = Unsent("its schedule was edited meanwhile")
    return dataclasses.replace(ending, claim=claim, outcome=outcome)


def changed_by_hand(claim: Claim) -> bool:
    """Whether the row's time was named by a person, is a skip, or its rule makes no sense: not what
    another scheduler writes after a run."""
    return claim.named or cadence.problem(claim) is not None or cadence.is_skip(claim)


def runs_now(claim: Claim, placement: Placement) -> bool:
    """Whether a claimed row with this placement is to run at once; else it goes back to wait for
    it.

    The application's skip may have added another distance than cron's next one: then a row is due
    before its tick.
    """
    early = (
        claim.cadence == "cron"
        and isinstance(placement.when, At)
        and placement.when.when > claim.claimed_at
    )
    return claim.due and not early


def planned(claim: Claim, dice: Dice) -> Finish | Next:
    """What becomes of an unclaimed cron recall at a time that the application chose: it waits for a
    tick of its own, or it is over."""
    reason = cadence.problem(claim)
    if reason is not None:
        return Finish("failed", reason)
    placement = resolve_move(claim) or Placement(claim.occurrence, AsMoved(), 0)
    ending = Ending(claim, Unsent(""), None, 0.0, 0.0)
    return _going_on(
        ending, placement.occurrence, placement.when, None, claim.failures, dice, _as_before(claim)
    )


def judge(ending: Ending, policy: Policy, dice: Dice) -> Verdict:
    """What the row becomes. `ending.claim` carries `trigger_at` as it stands in the row now."""
    claim = ending.claim
    match ending.outcome:
        case Unsent(reason):
            placement = resolve_move(claim) if claim.moved or cadence.unplanned(claim) else None
            if placement is None:
                return Release(reason)
            return _going_on(
                ending,
                placement.occurrence,
                placement.when,
                None,
                claim.failures,
                dice,
                _as_before(claim),
            )
        case Malformed(reason):
            return Finish("failed", reason)
        case Gone() as gone:
            return Finish("cancelled", reason_of(gone))
        case Expired(reason):
            return Finish(_as_before(claim), reason)
        case Misfired(reason):
            return _misfired(ending, reason, dice)
        case Accepted():
            # We stop while the run continues at the API: the next worker polls it.
            return Release("accepted by the API, and polled by the next worker")
        case Capped(reason, retry_after):
            return _again(ending, Defer(After(retry_after), reason, claim.may_have_run), dice)
        case Answered():
            return _occurrence_done(ending, None, dice, succeeded=True)
        case Busy(_, retry_after) as busy:
            delay = policy.busy_delay if retry_after is None else _obeyed(retry_after)
            return _defer(ending, policy, delay, dice, reason_of(busy) or "busy")
        case Misconfigured(reason) as page if page.may_have_run:
            return _uncounted(ending, policy, dice, reason, None)
        case Misconfigured(reason):
            return _defer(ending, policy, backoff(claim.deferrals, dice), dice, reason)
        case Unavailable(reason, int(), retry_after) if _may_have_begun(ending):
            # As routers answer for a run that took too long, or that broke its server.
            return _uncounted(ending, policy, dice, reason, retry_after)
        case Unavailable(reason, _, retry_after):
            wait = backoff(claim.deferrals, dice)
            return _defer(
                ending, policy, wait if retry_after is None else _obeyed(retry_after), dice, reason
            )
        case Unknown(reason) as lost if claim.reference is not None or lost.accepted:
            # Once accepted, never posted again: what became of it is not known, and stays so.
            return _occurrence_done(ending, reason, dice, succeeded=False)
        case Unknown(reason, _, retry_after, True) if _is_away(ending):
            return _uncounted(ending, policy, dice, reason, retry_after)
        case Unknown(reason, _, retry_after):
            return _retry(ending, policy, dice, reason, rekey=False, retry_after=retry_after)
        case Failed(reason):
            return _retry(ending, policy, dice, reason, rekey=True)
        case Refused(reason):
            return _occurrence_done(ending, reason, dice, succeeded=False)
        case never:
            assert_never(never)


def _occurrence_done(ending: Ending, reason: str | None, dice: Dice, *, succeeded: bool) -> Verdict:
    """This occurrence is over, with or without success."""
    claim = ending.claim
    if claim.extra:
        return _extra_done(ending, reason, dice)
    ended = "fired" if succeeded else "failed"
    if not claim.recurring:
        if not claim.has_another_time:
            return Finish(ended, reason)
        return _going_on(ending, claim.occurrence + 1, AsMoved(), reason, 0, dice, ended)
    failures = 0 if succeeded else min(LAST, claim.failures + 1)
    if claim.failures_most is not None and failures >= max(1, claim.failures_most):
        return Finish("failed", f"{failures} occurrences failed in a row, the last: {reason}")
    if (broken := _broken(claim, reason, failures)) is not None:
        return broken
    skip = cadence.skipped(claim)
    when = cadence.moved_to(claim) if _chosen(claim) else cadence.following(claim, skip)
    return _going_on(ending, claim.occurrence + 1 + skip, when, reason, failures, dice, ended)


def _broken(claim: Claim, reason: str | None, failures: int) -> Finish | Next | None:
    """What becomes of a recall whose rule was edited in mid-run to one that makes no sense: it has
    no next occurrence. Where this worker only lacks its time zone, another one may plan it."""
    problem = cadence.problem(claim)
    if problem is None:
        return None
    if cadence.foreign_zone(claim) is not None:
        occurrence = min(LAST, claim.occurrence + 1 + claim.skips)
        return Next(occurrence, After(0.0), reason, failures, replan=True)
    return Finish("failed", problem)


def _chosen(claim: Claim) -> bool:
    """Whether what follows is due at a time of its own, and not by the rule."""
    return claim.named or (claim.has_another_time and not cadence.is_skip(claim))


def _extra_done(ending: Ending, reason: str | None, dice: Dice) -> Verdict:
    """An extra run is over. What was planned stays; on an interval the next occurrence is one
    interval after the run, unless somebody has moved it meanwhile."""
    claim = ending.claim
    if claim.recurring and claim.cadence == "interval" and not claim.moved:
        if (broken := _broken(claim, reason, claim.failures)) is not None:
            return broken
        return _going_on(
            ending,
            claim.occurrence,
            cadence.following(claim),
            reason,
            claim.failures,
            dice,
            _as_before(claim),
        )
    return Next(claim.occurrence, AsPlanned(), reason, claim.failures)


def _misfired(ending: Ending, reason: str, dice: Dice) -> Verdict:
    """Too late to be run. Moments still within the grace are run; those that are too late with this
    one are skipped."""
    claim = ending.claim
    reason = f"misfired: {reason}"
    if not claim.recurring:
        if not claim.has_another_time:
            return Finish("failed", reason)
        return _going_on(ending, claim.occurrence + 1, AsMoved(), reason, 0, dice, "failed")
    if (broken := _broken(claim, reason, claim.failures)) is not None:
        return broken
    skip = cadence.skipped(claim)
    when = cadence.moved_to(claim) if _chosen(claim) else cadence.within_grace(claim, skip)
    return _going_on(
        ending, claim.occurrence + 1 + skip, when, reason, claim.failures, dice, "failed"
    )


def _as_before(claim: Claim) -> str:
    """The final status of a recall that ends before an occurrence without calling it: that of the
    last occurrence."""
    return (
        "failed" if claim.failures > 0 or claim.last_outcome not in (None, "answered") else "fired"
    )


def _going_on(
    ending: Ending,
    occurrence: int,
    when: When,
    reason: str | None,
    failures: int,
    dice: Dice,
    ended: str,
) -> Finish | Next:
    """The next occurrence, unless the recall ends before it: then its status is `ended`."""
    claim = ending.claim
    if occurrence > LAST:
        return Finish(
            "failed", f"no number is left for another occurrence{f': {reason}' if reason else ''}"
        )
    match when:
        case At(falls, distance):
            when = At(falls, distance, cadence.jittered(claim, dice()))
        case After(seconds):
            # Skips may add up to more than the calendar holds; a time so far away is after any end.
            falls = claim.claimed_at + timedelta(
                seconds=min(ending.ended_after + seconds, 10.0 * cadence.LONGEST)
            )
            when = After(seconds + cadence.jittered(claim, dice()))
        case AsMoved() | AsPlanned():
            falls = claim.trigger_at
        case never:
            assert_never(never)
    end = cadence.ends(claim, falls, occurrence)
    if end is not None:
        return Finish(ended, end if reason is None else f"{end}; {reason}")
    return Next(occurrence, when, reason, failures)


def _moved(ending: Ending, reason: str | None, dice: Dice) -> Verdict:
    """Between two calls of one occurrence another time was chosen. The application's begins the
    next occurrence, with its own key; one that a person named, the same under a new key.

    The call that has just ended was no success, so where no occurrence is left the recall has
    failed.
    """
    claim = ending.claim
    if (broken := _broken(claim, reason, claim.failures)) is not None:
        return broken
    occurrence = _number(claim, called=True)
    return _going_on(
        ending, occurrence, cadence.moved_to(claim), reason, claim.failures, dice, "failed"
    )


def _again(ending: Ending, verdict: Defer | Retry, dice: Dice) -> Verdict:
    """The same occurrence again, unless another time was chosen for it meanwhile. An extra run is
    over where the planned occurrence comes first."""
    claim = ending.claim
    if claim.extra:
        planned_in = (claim.trigger_at - claim.claimed_at).total_seconds() - ending.ended_after
        return (
            Next(claim.occurrence, AsPlanned(), verdict.reason, claim.failures)
            if planned_in <= verdict.when.seconds
            else verdict
        )
    return _moved(ending, verdict.reason, dice) if claim.moved else verdict


def _obeyed(retry_after: float) -> float:
    return min(max(retry_after, RETRY_AFTER_LEAST), RETRY_AFTER_MOST)


def _defer(
    ending: Ending,
    policy: Policy,
    delay: float,
    dice: Dice,
    reason: str,
    *,
    uncounted: int | None = None,
) -> Verdict:
    claim = ending.claim
    uncounted = claim.may_have_run if uncounted is None else uncounted
    if claim.moved and not claim.extra:
        return _moved(ending, reason, dice)
    waited = 0.0 if claim.begun_age is None else claim.begun_age + ending.ended_after
    if waited > policy.give_up and ending.breaker_closed:
        return _occurrence_done(
            ending, f"given up after {waited:.0f} s: {reason}", dice, succeeded=False
        )
    return _again(ending, Defer(After(delay), reason, uncounted), dice)


def _is_away(ending: Ending) -> bool:
    """Whether a gateway's answer means that the server behind it is away for everybody, and not
    that this run broke it."""
    never_there = getattr(ending.outcome, "http_status", None) in NEVER_REACHED
    return not ending.others_answered and (never_there or not _may_have_begun(ending))


def _may_have_begun(ending: Ending) -> bool:
    """Whether the answer came so late that a run may have begun before it."""
    return ending.ended_after - (ending.called_after or 0.0) > RUN_BEGAN


def _uncounted(
    ending: Ending, policy: Policy, dice: Dice, reason: str, retry_after: float | None
) -> Verdict:
    """The same occurrence again, though it may have run, and at no attempt: bounded all the same,
    whether the breaker is open or not."""
    calls = ending.claim.may_have_run + 1
    if calls >= UNCOUNTED_MOST:
        reason = f"given up after {calls} calls that may have run: {reason}"
        return _occurrence_done(ending, reason, dice, succeeded=False)
    # Not sooner than the pauses grow: else the bound would be reached within a minute.
    delay = max(uncounted_backoff(calls - 1, dice), _obeyed(retry_after or 0.0))
    return _defer(ending, policy, delay, dice, reason, uncounted=calls)


def _retry(
    ending: Ending,
    policy: Policy,
    dice: Dice,
    reason: str,
    *,
    rekey: bool,
    retry_after: float | None = None,
) -> Verdict:
    claim = ending.claim
    if claim.attempt >= policy.max_attempts:
        return _occurrence_done(ending, reason, dice, succeeded=False)
    wait = backoff(claim.attempt - 1, dice)
    delay = wait if retry_after is None else _obeyed(retry_after)
    return _again(ending, Retry(After(delay), rekey, reason, claim.may_have_run), dice)

"""One place decides what an ending means: (ending, policy, dice) → verdict. Pure; the outcome table of DESIGN in code.

Owns backoff, attempts, giving up, and what the row becomes when the application moved it in mid-run.
Never here: the clock, SQL, HTTP. Durations come with the ending, chance comes as `dice`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from . import cadence
from .recall import (
    Accepted,
    After,
    Answered,
    AsMoved,
    Busy,
    Capped,
    Claim,
    Defer,
    Ending,
    Failed,
    Finish,
    Gone,
    Malformed,
    Misconfigured,
    Next,
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

BACKOFF_FIRST = 5.0
BACKOFF_FACTOR = 4.0
BACKOFF_MOST = 300.0
RETRY_AFTER_LEAST, RETRY_AFTER_MOST = 1.0, 86_400.0
"""Seconds: an API that says 0 would otherwise be called as fast as it answers, until it is given up."""

LAST = 2_147_483_647
"""The largest number that an occurrence can have: as much as the table's counters hold."""
ID_MOST = 2000
"""Bytes of the longest id that is called: what fits an index beside a call's mark, and a header that servers take."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that decide. Seconds, and a count of attempts."""

    busy_delay: float
    max_attempts: int
    give_up: float


def backoff(n: int, dice: Dice) -> float:
    """Seconds before call n + 2 of an occurrence: 5 s × 4ⁿ, at most 300 s, full jitter."""
    return dice() * min(BACKOFF_MOST, BACKOFF_FIRST * BACKOFF_FACTOR ** max(0, min(n, 10)))


def before_call(claim: Claim, max_attempts: int) -> Malformed | Unknown | None:
    """What already decides this claim, so that nothing is sent; None where it is to be called."""
    reason = cadence.problem(claim)
    if reason is None and claim.call_type not in ("once", "recurring", "immediate"):
        reason = f"call_type is {claim.call_type!r}, which nobody here knows"
    if reason is None and claim.session_id in ("", ".", ".."):
        reason = f"session_id is {claim.session_id!r}, which can't be named in an address"
    if reason is None and len(claim.id.encode()) > ID_MOST:
        reason = f"id is {len(claim.id.encode())} bytes long: at most {ID_MOST} make an idempotency key"
    if reason is not None:
        return Malformed(reason)
    if claim.taken_from is not None and claim.attempt > max_attempts:
        return Unknown(f"{max_attempts} attempts, the last by a worker that was not heard of again")
    return None


def honour(claim: Claim) -> int | None:
    """The occurrence that a claimed row stands for where the application moved `trigger_at`; None where nobody did.

    A skip of k intervals consumes k numbers. Any other move keeps the number of an occurrence that was never called, and begins
    the next one between two calls, as a key stands for one occurrence only.
    """
    if not claim.moved or claim.reference is not None:
        # A run that goes on at the API is followed to its end first; what comes after it honours the move.
        return None
    begun = claim.begun_age is not None or claim.taken_from is not None
    return min(LAST, claim.occurrence + (cadence.skipped(claim) or (1 if begun else 0)))


def judge(ending: Ending, policy: Policy, dice: Dice) -> Verdict:
    """What the row becomes. `ending.claim` carries `trigger_at` as it stands in the row now."""
    claim = ending.claim
    match ending.outcome:
        case Unsent(reason):
            occurrence = honour(claim)
            return Release(reason) if occurrence is None else Next(occurrence, AsMoved())
        case Malformed(reason):
            return Finish("failed", reason)
        case Gone() as gone:
            return Finish("cancelled", reason_of(gone))
        case Accepted():
            # We stop while the run goes on at the API: the next worker polls on.
            return Release("accepted by the API, and polled by the next worker")
        case Capped(reason, retry_after):
            return _moved(claim, reason) if claim.moved else Defer(After(retry_after), reason)
        case Answered():
            return _over(claim, None, succeeded=True)
        case Busy(_, retry_after) as busy:
            delay = policy.busy_delay if retry_after is None else _obeyed(retry_after)
            return _defer(ending, policy, delay, reason_of(busy) or "busy")
        case Misconfigured(reason):
            return _moved(claim, reason) if claim.moved else Defer(After(backoff(claim.deferrals, dice)), reason)
        case Unavailable(reason, _, retry_after):
            wait = backoff(claim.deferrals, dice)
            return _defer(ending, policy, wait if retry_after is None else _obeyed(retry_after), reason)
        case Unknown(reason):
            return _retry(claim, policy, dice, reason, rekey=False)
        case Failed(reason):
            return _retry(claim, policy, dice, reason, rekey=True)
        case Refused(reason):
            return _over(claim, reason, succeeded=False)
        case never:
            assert_never(never)


def _over(claim: Claim, reason: str | None, *, succeeded: bool) -> Verdict:
    """This occurrence is over, one way or the other."""
    if claim.recurring:
        skip = cadence.skipped(claim)
        if claim.moved and not skip:
            return _next(claim.occurrence + 1, AsMoved(), reason)
        return _next(claim.occurrence + 1 + skip, cadence.following(claim, skip), reason)
    if claim.moved:
        return _next(claim.occurrence + 1, AsMoved(), reason)
    return Finish("fired" if succeeded else "failed", reason)


def _moved(claim: Claim, reason: str | None) -> Verdict:
    """Between two calls of one occurrence the application named another time: that begins the next one, with its own key."""
    return _next(claim.occurrence + (cadence.skipped(claim) or 1), AsMoved(), reason)


def _next(occurrence: int, when: When, reason: str | None) -> Verdict:
    if occurrence > LAST:
        return Finish("failed", f"no number is left for another occurrence{f': {reason}' if reason else ''}")
    return Next(occurrence, when, reason)


def _obeyed(retry_after: float) -> float:
    return min(max(retry_after, RETRY_AFTER_LEAST), RETRY_AFTER_MOST)


def _defer(ending: Ending, policy: Policy, delay: float, reason: str) -> Verdict:
    claim = ending.claim
    if claim.moved:
        return _moved(claim, reason)
    waited = 0.0 if claim.begun_age is None else claim.begun_age + ending.ended_after
    if waited > policy.give_up and ending.breaker_closed:
        return _over(claim, f"given up after {waited:.0f} s: {reason}", succeeded=False)
    return Defer(After(delay), reason)


def _retry(claim: Claim, policy: Policy, dice: Dice, reason: str, *, rekey: bool) -> Verdict:
    if claim.attempt >= policy.max_attempts:
        return _over(claim, reason, succeeded=False)
    if claim.moved:
        return _moved(claim, reason)
    return Retry(After(backoff(claim.attempt - 1, dice)), rekey, reason)

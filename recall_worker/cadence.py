"""Pure time: how far apart occurrences are, and what it means that the application moved one.

Owns the arithmetic of due times. No clock is read here; whoever calls brings the instants.
The application's own rule, an interval after the run ended, is the one cadence so far.
"""

from __future__ import annotations

from datetime import timedelta

from .recall import After, Claim

LONGEST = 2_147_483_647
"""Seconds of the longest interval, 68 years: as much as `interval_seconds` holds, but in a table that was made with a wider column."""


def problem(claim: Claim) -> str | None:
    """Why this row can never have a next occurrence, in a sentence; None where it can (or needs none)."""
    if claim.recurring and (claim.interval is None or claim.interval < 1):
        return f"a recurring recall needs interval_seconds of at least 1, not {_said(claim.interval)}"
    if claim.recurring and claim.interval is not None and claim.interval > LONGEST:
        return f"a recurring recall needs interval_seconds of at most {LONGEST}, not {claim.interval}"
    return None


def skipped(claim: Claim) -> int:
    """By how many whole intervals the application moved `trigger_at` onwards from where the worker had put it.

    0 for any other move: that one names a time of its own.
    """
    if not claim.recurring or claim.interval is None or problem(claim) is not None:
        return 0
    times, rest = divmod(claim.trigger_at - claim.planned_at, timedelta(seconds=claim.interval))
    return times if times > 0 and not rest else 0


def following(claim: Claim, skip: int = 0) -> After:
    """When the occurrence after this one falls, `skip` occurrences passed over: intervals after the run ended."""
    assert claim.interval is not None
    return After(float(claim.interval) * (1 + skip))


def _said(interval: int | None) -> str:
    return "null" if interval is None else str(interval)

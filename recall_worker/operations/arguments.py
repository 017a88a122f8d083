"""What people type, read: durations, times, queues, and the values of an edit. A mistake is a
Trouble that says which and what to give; `option`: what the field is called where it was typed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, tzinfo
from typing import TypeVar

from psycopg import errors

from .. import cadence, instants
from ..cadence import KEEP, CadenceError, Keep, Unfit
from ..events import escape_controls
from ..instants import InstantError
from ..settings import queue_problem
from ..terminal import USAGE, Trouble, command, local, seconds, tell

T = TypeVar("T")
NONE = "none"
"""What `edit` takes for a value that is to be taken away."""


def known_queue(queue: str) -> str:
    """A queue's name as an option gives it. Raises Trouble where it can't be one."""
    if (wrong := queue_problem(queue)) is not None:
        raise Trouble(f"--queue {wrong}", "--queue mail", status=USAGE)
    return queue


def refused_queue(error: errors.ObjectNotInPrerequisiteState) -> Trouble:
    """PostgreSQL refuses the queue, as a worker is alive that knows none."""
    return Trouble(
        (error.diag.message_primary or str(error)).removeprefix("session_recalls: "),
        error.diag.message_hint or command("workers"),
    )


@contextlib.contextmanager
def explained(hint: str = "recall-worker schedule --help") -> Iterator[None]:
    """A rule that can't be kept is a usage error; an edit that does not fit a recall passes."""
    try:
        yield
    except Unfit:
        raise
    except CadenceError as error:
        raise Trouble(str(error), hint, status=USAGE) from None


def delta(text: str | None, option: str) -> timedelta | None:
    """An option's duration. Raises Trouble."""
    if text is None:
        return None
    try:
        return timedelta(seconds=seconds(text, option))
    except OverflowError:
        raise Trouble(
            f"{option} {text} is longer than any calendar", f"{option} 2d", status=USAGE
        ) from None


def instant(
    text: str,
    option: str,
    where: tzinfo | None = None,
    hear: Callable[[str], None] = tell,
) -> datetime:
    """A time as people write it; a date alone for --until is the end of that day. Without an offset
    it is the wall clock's there (None: here); how one was read that the clocks skip or repeat is
    told by `hear`. Raises Trouble.
    """
    try:
        found = instants.parse(text, where, whole_day=option == "--until")
    except InstantError as error:
        raise Trouble(
            f"{option} {text!r} {error}", f"{option} {error.instead}", status=USAGE
        ) from None
    for note in found.notes:
        hear(f"Note: {option} {escape_controls(text)}: {note}")
    return found.when


def is_past(at: datetime | None, now: datetime, *, now_if_past: bool) -> bool:
    """Whether what --at names is past by PostgreSQL's clock, and so means now. Raises Trouble where
    that was not asked for."""
    if at is None or not cadence.is_past(at, now):
        return False
    if not now_if_past:
        raise Trouble(
            f"--at {local(at)} is past: PostgreSQL's clock says {local(now)}",
            "a later time, or --now-if-past where it is to run now",
            status=USAGE,
        )
    return True


def given(text: str | None, convert: Callable[[str], T]) -> T | Keep | None:
    """An option of `edit`: as it is, nothing any more, or a value."""
    return KEEP if text is None else None if text.strip().lower() == NONE else convert(text)


def number(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Trouble(
            f"{option} {text!r} is not a number", f"{option} 10, or {option} none", status=USAGE
        ) from None

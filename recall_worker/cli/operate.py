"""`cancel`, `skip`, `pause`, `resume`, `retry`, `fire`, `reschedule`, `edit`: what an operator does
to recalls.

What each does, and why it does not apply, is in operations.actions. Without ids they act on all
that the filters of `list` find, in batches: see bulk.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from psycopg import Connection

from .. import cadence
from ..cadence import KEEP, Keep
from ..events import escape_controls
from ..operations import actions
from ..operations.actions import (
    CANCELLED,
    Action,
    Refusal,
    act,
    cancelled,
    edited,
    refusals,
    skipped,
    why_not_edited,
)
from ..operations.arguments import (
    NONE,
    delta,
    explained,
    given,
    instant,
    is_past,
    known_queue,
    number,
)
from ..operations.connection import clock
from ..selection import Selection, choose, whole_ids
from ..terminal import USAGE, Trouble, ask, command, print_json, seconds, tell
from .bulk import act_on_all, show_meant
from .listing import Given
from .recalls import acting, connect, warn_of_queue, whole_id

Row = Mapping[str, Any]
WhyNot = Callable[[Row], Refusal]
"""From the row as it is now: why the operation did not apply, and what to do instead."""


def cancel(
    dsn: str | None,
    ids: list[str],
    given: Given,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    # A session alone is that session, also where its name has a `*`: scripts name sessions so.
    only_session = _only_session(given) and not ids
    if only_session and not dry_run:
        _cancel_session(dsn, str(given["session"]), yes=yes, as_json=as_json)
        return

    action = actions.cancel(acting(), literal=only_session)
    _each_or_all(dsn, ids, given, action, dry_run=dry_run, yes=yes, as_json=as_json)


def _cancel_session(dsn: str | None, session: str, *, yes: bool, as_json: bool) -> None:
    """What the session has at the moment of the statement."""
    with connect(dsn) as conn:
        if not yes:
            live = Selection(states=("live",), session=session, literal=True, limit=None)
            if ids := choose(conn, live).ids:
                show_meant(conn, actions.cancel(acting()), ids)
                ask(f"Cancel every live recall of session {session}?")
        values = {"session_id": session, "reason": CANCELLED}
        rows = act(conn, "cancel_session", values, acting())
        _show(rows, as_json, cancelled)
        if rows:
            return
        pattern = command("cancel", "--session", session, "--state", "live")
        raise Trouble(
            f"session {session} has no live recall",
            command("list", "--session", session),
            *([f"{pattern} (a pattern)"] if "*" in session else []),
        )


def skip(dsn: str | None, ids: list[str], *, session: str | None, as_json: bool) -> None:
    if (session is None) == (not ids):
        raise Trouble(
            "name recalls, or a session",
            "recall-worker skip ID…",
            "recall-worker skip --session ID",
            status=USAGE,
        )
    with connect(dsn) as conn:
        ids = whole_ids(conn, ids)
        values = {"ids": ids, "session_id": session}
        rows = act(conn, "skip" if session is None else "skip_pending", values, acting())
        _show(rows, as_json, skipped)
        if session is None:
            _account(conn, rows, ids, actions.skip(acting()).why_not)
        elif not rows:
            raise Trouble(
                f"session {session} has no recurring recall that waits",
                command("list", "--session", session),
            )


def pause(
    dsn: str | None,
    ids: list[str],
    given: Given,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    action = actions.pause(acting())
    _each_or_all(dsn, ids, given, action, dry_run=dry_run, yes=yes, as_json=as_json)


def resume(
    dsn: str | None,
    ids: list[str],
    given: Given,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    action = actions.resume(acting())
    _each_or_all(dsn, ids, given, action, dry_run=dry_run, yes=yes, as_json=as_json)


def retry(
    dsn: str | None,
    ids: list[str],
    given: Given,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    action = actions.retry(acting())
    _each_or_all(dsn, ids, given, action, dry_run=dry_run, yes=yes, as_json=as_json)


def fire(
    dsn: str | None,
    ids: list[str],
    given: Given,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    action = actions.fire(acting())
    _each_or_all(dsn, ids, given, action, dry_run=dry_run, yes=yes, as_json=as_json)


def reschedule(
    dsn: str | None,
    ids: list[str],
    given: Given,
    *,
    after: str | None,
    at: str | None,
    time_zone: str | None,
    now_if_past: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    if (after is None) == (at is None):
        what = "no time is given" if at is None else "--in and --at exclude each other"
        raise Trouble(what, "--in 90s, or --at 2027-01-31T09:00", status=USAGE)
    if at is None and (time_zone is not None or now_if_past):
        raise Trouble(
            "--tz and --now-if-past go with --at", "the same command without them", status=USAGE
        )
    with explained("--tz with an IANA name, such as Europe/Berlin"):
        where = None if time_zone is None else cadence.zone(time_zone)
    when: dict[str, Any] = {
        "at": None if at is None else instant(at, "--at", where),
        "after": None if after is None else seconds(after, "--in"),
    }

    def begin(conn: Connection[dict[str, Any]]) -> None:
        if is_past(when["at"], clock(conn), now_if_past=now_if_past):
            when.update({"at": None, "after": 0.0})

    action = actions.reschedule(acting(), when, begin)
    _each_or_all(dsn, ids, given, action, dry_run=dry_run, yes=yes, as_json=as_json)


def edit(
    dsn: str | None,
    id: str,
    *,
    every: str | None,
    grid: str | None,
    cron: str | None,
    time_zone: str | None,
    until: str | None,
    times: str | None,
    failures: str | None,
    grace: str | None,
    jitter: str | None,
    message: str | None,
    comment: str | None,
    queue: str | None,
    as_json: bool,
) -> None:
    rules = (every, grid, cron, time_zone, until, times, failures, grace, jitter)
    if all(option is None for option in (*rules, message, comment, queue)):
        raise Trouble("nothing to change is given", "recall-worker edit --help", status=USAGE)
    with explained("--tz with an IANA name, such as Europe/Berlin"):
        where = None if time_zone in (None, NONE) else cadence.zone(time_zone)
    rule: dict[str, Any] = {
        "every": KEEP if every is None else delta(every, "--every"),
        "grid": KEEP if grid is None else delta(grid, "--grid"),
        "cron": KEEP if cron is None else cron,
        # With --until and without --cron it is only the zone of that time.
        "time_zone": KEEP
        if cron is None and until is not None and time_zone != NONE
        else given(time_zone, lambda text: text),
        "until": given(until, lambda text: instant(text, "--until", where)),
        "times": given(times, lambda text: number(text, "--times")),
        "failures": given(failures, lambda text: number(text, "--failures")),
        "grace": given(grace, lambda text: delta(text, "--grace")),
        "jitter": given(jitter, lambda text: delta(text, "--jitter")),
    }
    if message == NONE:
        raise Trouble(
            "a message can be replaced, and not taken away: 'none' would be sent to the agent",
            command("cancel", id),
            "--message with the text that the agent is to be told",
            status=USAGE,
        )
    said: str | Keep = KEEP if message is None else message
    note = given(comment, lambda text: text)
    into: str | Keep = KEEP if queue is None else known_queue(queue)
    with connect(dsn) as conn:
        id = whole_id(conn, id)
        rows, changes = actions.edit(conn, id, rule, (said, note, into), acting())
        if rows and "queue" in changes:
            warn_of_queue(conn, rows[0]["queue"])
        _show(rows, as_json, lambda row: edited(row, changes))
        _account(conn, rows, [id], why_not_edited)


def _show(rows: list[dict[str, Any]], as_json: bool, done: Callable[[Row], str]) -> None:
    """Print what was done: the rows as they are now, or a sentence for each, and for a script their
    ids.
    """
    if as_json:
        print_json(rows)
        return
    for row in rows:
        if not sys.stdout.isatty():
            print(escape_controls(row["id"]), flush=True)
        tell(escape_controls(f"{row['id']}: {done(row)}."))


def _account(
    conn: Connection[dict[str, Any]], rows: list[dict[str, Any]], ids: list[str], why_not: WhyNot
) -> None:
    """Raise Trouble that says why, for each recall that was named and is not among the rows."""
    if found := refusals(conn, rows, ids, why_not):
        raise Trouble(
            "; ".join(refusal.what for refusal in found),
            *dict.fromkeys(refusal.hint for refusal in found),
        )


def _each_or_all(
    dsn: str | None,
    ids: list[str],
    given: Given,
    action: Action,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Act on the recalls that were named, or on all that the filters find."""
    if not ids:
        act_on_all(dsn, action, given, dry_run=dry_run, yes=yes, as_json=as_json)
        return
    _ids_alone(ids, given, dry_run)
    with connect(dsn) as conn:
        ids = whole_ids(conn, ids)
        action.begin(conn)
        rows = action.act(conn, ids)
        _show(rows, as_json, action.says)
        _account(conn, rows, ids, action.why_not)


def _ids_alone(ids: list[str], given: Given, dry_run: bool) -> None:
    """Ids and filters exclude each other. Raises Trouble."""
    options = [f"--{name}" for name, value in given.items() if value is not None]
    options += ["--dry-run"] if dry_run else []
    if ids and options:
        raise Trouble(
            f"recalls are named, and {options[0]} finds others",
            f"the recalls without {' and '.join(options)}, or the filters without a recall",
            status=USAGE,
        )


def _only_session(given: Given) -> bool:
    return [name for name, value in given.items() if value is not None] == ["session"]

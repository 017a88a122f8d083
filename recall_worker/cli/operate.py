"""`cancel`, `skip`, `pause`, `resume`, `retry`, `fire`, `reschedule`: what an operator does to
recalls.

Each is one guarded statement on the rows that it can apply to. The other rows are read afterwards,
and the error says why it did not apply and what to do instead. Races with claim, settle, cancel and
deletion are decided by the row's lock: an operation acts on the row as it finds it.
docs/operations.md says what each does in every state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from psycopg import Connection, errors

from .. import statements
from ..events import escape_controls
from ..terminal import USAGE, Trouble, command, confirmed, local, print_json, seconds, tell
from .recalls import connect, instant

Row = Mapping[str, Any]
WhyNot = Callable[[Row], tuple[str, str]]
"""From the row as it is now: why the operation did not apply, and what to do instead."""


def cancel(
    dsn: str | None, ids: list[str], *, session: str | None, yes: bool, as_json: bool
) -> None:
    _one_of(ids, session, "cancel")
    with connect(dsn) as conn:
        values = {"ids": ids, "session_id": session, "reason": "cancelled on the command line"}
        if session is not None:
            _ask(f"Cancel every live recall of session {session}?", yes)
        rows = _act(conn, "cancel" if session is None else "cancel_session", values)
        _show(
            rows, as_json, lambda row: f"cancelled{', its call is aborted' if row['lease'] else ''}"
        )
        if session is None:
            _account(conn, rows, ids, _why_not_live)
        elif not rows:
            raise Trouble(
                f"session {session} has no live recall", command("list", "--session", session)
            )


def skip(dsn: str | None, ids: list[str], *, session: str | None, as_json: bool) -> None:
    _one_of(ids, session, "skip")
    with connect(dsn) as conn:
        values = {"ids": ids, "session_id": session}
        rows = _act(conn, "skip" if session is None else "skip_pending", values)
        _show(
            rows,
            as_json,
            lambda row: (
                "the occurrence after this run is left out" if row["lease"] else f"next {_due(row)}"
            ),
        )
        if session is None:
            _account(conn, rows, ids, _why_not_skipped)
        elif not rows:
            raise Trouble(
                f"session {session} has no recurring recall that waits",
                command("list", "--session", session),
            )


def pause(dsn: str | None, ids: list[str], *, as_json: bool) -> None:
    with connect(dsn) as conn:
        rows = _act(conn, "pause", {"ids": ids})

        def done(row: Row) -> str:
            run = "; the current run is not interrupted" if row["lease"] else ""
            return f"paused since {local(row['paused_at'])}{run}"

        _show(rows, as_json, done)
        _account(conn, rows, ids, _why_not_live)


def resume(dsn: str | None, ids: list[str], *, as_json: bool) -> None:
    with connect(dsn) as conn:
        rows = _act(conn, "resume", {"ids": ids})

        def done(row: Row) -> str:
            what = "resumed" if row["resumed"] else "was not paused"
            return f"{what}; {'it is in a run' if row['lease'] else _due(row)}"

        _show(rows, as_json, done)
        _account(conn, rows, ids, _why_not_live)


def retry(dsn: str | None, ids: list[str], *, as_json: bool) -> None:
    rows: list[dict[str, Any]] = []
    taken: list[str] = []
    with connect(dsn) as conn:
        for id in ids:
            try:
                rows += _act(conn, "retry", {"ids": [id]})
            except errors.UniqueViolation:
                taken.append(id)

        def done(row: Row) -> str:
            # The key of a recall that was moved is decided by the claim, which resolves the move.
            moved = row["planned_at"] not in (None, row["trigger_at"])
            return (
                "due now, under a new key"
                if moved
                else f"due now, under the key {row['id']}:{row['occurrence']}.{row['rekey']}"
            )

        def why_not(row: Row) -> tuple[str, str]:
            if row["id"] in taken:
                what = (
                    f"{row['id']}: its session {row['session_id']} has another pending "
                    "recall, and can have only one"
                )
                found = command("list", "--status", "pending", "--session", row["session_id"])
                return what, f"{found}, and cancel that one first"
            return _why_not_retried(row)

        _show(rows, as_json, done)
        _account(conn, rows, ids, why_not)


def fire(dsn: str | None, ids: list[str], *, as_json: bool) -> None:
    with connect(dsn) as conn:
        rows = _act(conn, "fire", {"ids": ids})
        _show(rows, as_json, lambda row: "due now")
        _account(conn, rows, ids, _why_not_fired)


def reschedule(
    dsn: str | None, id: str, *, after: str | None, at: str | None, as_json: bool
) -> None:
    if (after is None) == (at is None):
        raise Trouble("say when", "--in 90s, or --at 2027-01-31T09:00", status=USAGE)
    values = {
        "ids": [id],
        "at": None if at is None else instant(at, "--at"),
        "after": None if after is None else seconds(after, "--in"),
    }
    with connect(dsn) as conn:
        rows = _act(conn, "reschedule", values)
        _show(rows, as_json, lambda row: f"{'after this run, ' if row['lease'] else ''}{_due(row)}")
        _account(conn, rows, [id], _why_not_live)


def _act(
    conn: Connection[dict[str, Any]], name: str, values: Mapping[str, Any]
) -> list[dict[str, Any]]:
    return conn.execute(statements.load("client")[name].encode(), values).fetchall()


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
    done = {row["id"] for row in rows}
    left = [id for id in dict.fromkeys(ids) if id not in done]
    if left:
        states = {row["id"]: row for row in _act(conn, "states", {"ids": left})}
        found = [
            why_not(states[id]) if id in states else (f"there is no recall {id}", command("list"))
            for id in left
        ]
        raise Trouble(
            "; ".join(what for what, _ in found), *dict.fromkeys(hint for _, hint in found)
        )


def _due(row: Row) -> str:
    return f"due {local(row['trigger_at'])}{', but paused' if row['paused_at'] is not None else ''}"


def _why_not_live(row: Row) -> tuple[str, str]:
    return f"{row['id']} is {row['status']} already", command("show", row["id"])


def _why_not_skipped(row: Row) -> tuple[str, str]:
    if row["status"] in ("pending", "running") and row["call_type"] != "recurring":
        return f"{row['id']} is {row['call_type']}: it has no next occurrence", command(
            "cancel", row["id"]
        )
    if row["status"] in ("pending", "running"):
        return f"{row['id']} has no positive interval_seconds", command("show", row["id"])
    return _why_not_live(row)


def _why_not_fired(row: Row) -> tuple[str, str]:
    if row["status"] not in ("pending", "running"):
        return f"{row['id']} is {row['status']}", command(
            "retry" if row["status"] in ("failed", "cancelled") else "show", row["id"]
        )
    if row["leased"]:
        return f"{row['id']} is in a run, by {row['leased_by']}", command("why", row["id"])
    return f"{row['id']} is paused", command("resume", row["id"])


def _why_not_retried(row: Row) -> tuple[str, str]:
    if row["status"] in ("failed", "cancelled"):
        return f"{row['id']}: its aborted call is still open", "the same command in a moment"
    if row["status"] == "fired":
        return (
            f"{row['id']} has fired: there is nothing to retry",
            "recall-worker schedule SESSION MESSAGE",
        )
    return f"{row['id']} is {row['status']}: it waits or runs already", command("why", row["id"])


def _one_of(ids: list[str], session: str | None, name: str) -> None:
    if (session is None) == (not ids):
        raise Trouble(
            "name recalls, or a session",
            f"recall-worker {name} ID…",
            f"recall-worker {name} --session ID",
            status=USAGE,
        )


def _ask(question: str, yes: bool) -> None:
    if not yes and not confirmed(question):
        raise Trouble("nothing was done", "the same with --yes")

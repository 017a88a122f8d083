"""`schedule`, `list`, `show`: how an operator creates and reads recalls."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import errors
from psycopg.rows import dict_row

from .. import cadence, settings, statements
from ..cadence import CadenceError
from ..database.connection import connection_info
from ..database.values import load_whatever_stands_there
from ..durations import length
from ..events import escape_controls
from ..recall import STATUSES
from ..terminal import (
    USAGE,
    Trouble,
    command,
    local,
    print_facts,
    print_json,
    print_table,
    relative,
    seconds,
    span,
    tell,
    warn_of_password,
)


def connect(dsn: str | None) -> psycopg.Connection[dict[str, Any]]:
    """A connection for one command."""
    warn_of_password(dsn)
    address = settings.read(needed=["dsn"], dsn=dsn).dsn or ""
    conn = psycopg.connect(
        **connection_info(address, "recall-worker cli"),
        row_factory=dict_row,
        # A transaction pooler may stand in between, and pass the next statement to another
        # connection.
        prepare_threshold=None,
    )
    load_whatever_stands_there(conn)
    return conn


def schedule(
    dsn: str | None,
    session: str,
    message: str,
    *,
    after: str | None,
    at: str | None,
    every: str | None,
    grid: str | None,
    cron: str | None,
    time_zone: str | None,
    until: str | None,
    times: int | None,
    failures: int | None,
    grace: str | None,
    jitter: str | None,
    comment: str | None,
    as_json: bool,
) -> None:
    if session in ("", ".", ".."):
        raise Trouble(
            f"{session!r} can't be a session's id",
            "the id that the application gave the session",
            status=USAGE,
        )
    with explained():
        where = None if time_zone is None else cadence.zone(time_zone)
    rule: dict[str, Any] = {
        "at": None if at is None else instant(at, "--at", where),
        "after": _span(after, "--in"),
        "every": _span(every, "--every"),
        "grid": _span(grid, "--grid"),
        "cron": cron,
        # Without cron it is only the zone of --at and --until.
        "time_zone": time_zone if cron is not None or (at is None and until is None) else None,
        "until": None if until is None else instant(until, "--until", where),
        "times": times,
        "failures": failures,
        "grace": _span(grace, "--grace"),
        "jitter": _span(jitter, "--jitter"),
    }
    with explained():
        # Mistakes are reported before a connection is opened; then PostgreSQL's clock decides.
        cadence.plan(datetime.now(UTC), 0.0, **rule)
    client = statements.load("client")
    with connect(dsn) as conn:
        with explained():
            plan = cadence.plan(clock(conn), random.random(), **rule)
        values = dataclasses.asdict(plan) | {
            "id": str(uuid4()),
            "session_id": session,
            "message": message,
            "comment": comment,
        }
        try:
            row = conn.execute(client["schedule"].encode(), values).fetchone()
        except errors.UniqueViolation:
            raise Trouble(
                f"session {session} already has a pending recall, and can have only one",
                command("list", "--session", session),
                command("cancel", "--session", session),
            ) from None
        except errors.ForeignKeyViolation:
            raise Trouble(
                f"there is no session {session}", "the id that the application gave the session"
            ) from None
    assert row is not None
    if as_json:
        print_json(row)
    else:
        print(row["id"])
        tell(
            f"Scheduled {escape_controls(nature(row))}, due {local(row['trigger_at'])}{_ends(row)}."
        )


@contextlib.contextmanager
def explained(hint: str = "recall-worker schedule --help") -> Iterator[None]:
    """A rule that can't be kept is a usage error."""
    try:
        yield
    except CadenceError as error:
        raise Trouble(str(error), hint, status=USAGE) from None


def _span(text: str | None, option: str) -> timedelta | None:
    if text is None:
        return None
    try:
        return timedelta(seconds=seconds(text, option))
    except OverflowError:
        raise Trouble(
            f"{option} {text} is longer than any calendar", f"{option} 2d", status=USAGE
        ) from None


def instant(text: str, option: str, where: tzinfo | None = None) -> datetime:
    """A time as people write it. Without an offset it is the wall clock's there (None: here).
    Raises Trouble.
    """
    try:
        when = datetime.fromisoformat(text)
        if when.tzinfo is None:
            when = when.astimezone() if where is None else when.replace(tzinfo=where)
        when.astimezone(UTC) - timedelta(days=1)  # Within the calendar, wherever it is looked at.
        return when
    except (ValueError, OverflowError):
        raise Trouble(
            f"{option} {text!r} is not a time",
            f"{option} 2027-01-31T09:00 or 2027-01-31T09:00:00+01:00",
            status=USAGE,
        ) from None


def list_recalls(
    dsn: str | None,
    *,
    session: str | None,
    user: str | None,
    statuses: list[str] | None,
    limit: int,
    offset: int,
    as_json: bool,
) -> None:
    unknown = sorted(set(statuses or []) - set(STATUSES))
    if unknown:
        raise Trouble(
            f"there is no status {', '.join(unknown)}",
            f"--status with one of {', '.join(STATUSES)}",
            status=USAGE,
        )
    name = "list_user" if user is not None else "list_session" if session is not None else "list"
    values = {
        "session_id": session,
        "user_id": user,
        "statuses": statuses or None,
        "limit": limit,
        "offset": offset,
    }
    with connect(dsn) as conn:
        try:
            rows = conn.execute(statements.load("reads")[name].encode(), values).fetchall()
        except errors.UndefinedTable:
            if user is None:
                raise
            raise Trouble(
                "this database has no table sessions, so a user's sessions are not known",
                "--session ID",
            ) from None
        now = clock(conn)
    if as_json:
        print_json(rows)
        return
    if not rows:
        tell("No recalls.")
        return
    print_table(
        ["ID", "SESSION", "TYPE", "STATUS", "WHEN", "DUE", ">OCC", "MESSAGE"],
        [
            [
                row["id"],
                row["session_id"],
                nature(row),
                row["status"],
                _when(row, now),
                local(row["trigger_at"]),
                str(row["occurrence"]),
                _line(row["additional_context_message"], 200),
            ]
            for row in rows
        ],
        yields=[
            ("MESSAGE", 16),
            ("OCC", 0),
            ("DUE", 0),
            ("TYPE", 0),
            ("SESSION", 36),
            ("MESSAGE", 0),
            ("SESSION", 8),
        ],
    )
    if len(rows) == limit:
        tell(f"More may follow: --offset {offset + limit}")


def show(dsn: str | None, id: str, *, as_json: bool) -> None:
    reads = statements.load("reads")
    with connect(dsn) as conn:
        row = conn.execute(reads["show"].encode(), {"id": id}).fetchone()
        calls = conn.execute(reads["calls"].encode(), {"id": id}).fetchall()
        now = clock(conn)
    if row is None and not calls:
        raise Trouble(f"there is no recall {id}", command("list"))
    if as_json:
        print_json({"recall": row, "calls": calls})
        return
    if row is None:
        tell("The recall is gone (it or its session was deleted); its calls are on record:")
    else:
        message = row["additional_context_message"]
        facts = [
            ("recall", row["id"]),
            ("session", row["session_id"]),
            ("type", nature(row) + _ends(row)),
            ("status", row["status"]),
            ("reason", row["reason"]),
            ("due", f"{local(row['trigger_at'])} ({relative(row['trigger_at'], now)})"),
            ("occurrence", f"{row['occurrence']}{_so_far(row)}"),
            ("stands for", _stands_for(row)),
            ("grace", length(row["grace_seconds"]) if row["grace_seconds"] is not None else None),
            ("jitter", f"up to {length(row['jitter_seconds'])}" if row["jitter_seconds"] else None),
            ("failed", _in_a_row(row)),
            ("last outcome", row["last_outcome"]),
            (
                "in a run",
                f"by worker {row['leased_by']} since {local(row['leased_at'])}"
                if row["lease"]
                else None,
            ),
            ("paused", local(row["paused_at"]) or None),
            ("ended", local(row["ended_at"]) or None),
            ("created", local(row["created_at"])),
            ("comment", row["internal_comment"]),
            ("message", _line(message, 2000)),
        ]
        print_facts([(name, str(value)) for name, value in facts if value is not None])
    if calls:
        print()
        print_table(
            [
                ">OCC",
                ">ATT",
                "OUTCOME",
                ">CALLS",
                "CALLED",
                ">LATE",
                ">MISSED",
                ">TOOK",
                ">HTTP",
                "REASON",
                "WORKER",
            ],
            [
                [
                    str(c["occurrence"]) + (f".{c['rekey']}" if c["rekey"] else ""),
                    str(c["attempt"]),
                    c["outcome"],
                    str(c["calls"]),
                    local(c["called_at"]),
                    _between(c["called_at"], c["scheduled_for"]),
                    str(c["missed"] or ""),
                    _between(c["ended_at"], c["last_called_at"]),
                    str(c["http_status"] or ""),
                    c["reason"] or "",
                    c["worker"],
                ]
                for c in calls
            ],
            yields=[
                ("REASON", 24),
                ("WORKER", 0),
                ("REASON", 0),
                ("TOOK", 0),
                ("MISSED", 0),
                ("CALLED", 19),
            ],
        )


def clock(conn: psycopg.Connection[dict[str, Any]]) -> datetime:
    row = conn.execute("select now() as now").fetchone()
    assert row is not None
    now: datetime = row["now"]
    return now


def nature(row: Mapping[str, Any]) -> str:
    """How a recall recurs, in a few words."""
    if row["call_type"] != "recurring":
        return str(row["call_type"])
    if row["cadence"] == "cron":
        return f"cron '{row['cron']}' {row['time_zone'] or 'UTC'}"
    if row["interval_seconds"] is None:
        return "recurring"
    return f"{'grid' if row['cadence'] == 'grid' else 'every'} {length(row['interval_seconds'])}"


def _ends(row: Mapping[str, Any]) -> str:
    ends = []
    if row["until_at"] is not None:
        ends.append(f"until {local(row['until_at'])}")
    if row["times"] is not None:
        ends.append("once" if row["times"] == 1 else f"{row['times']} times")
    if row["failures_most"] is not None:
        ends.append(
            f"until {row['failures_most']} in a row failed"
            if row["failures_most"] > 1
            else "until one fails"
        )
    return "".join(f", {end}" for end in ends)


def _stands_for(row: Mapping[str, Any]) -> str | None:
    """The nominal time of the current occurrence, if it differs from the due time; and how many
    more were missed.
    """
    if row["status"] not in ("pending", "running") or row["scheduled_for"] in (
        None,
        row["trigger_at"],
    ):
        return None
    if row["lease"] is None and row["planned_at"] not in (None, row["trigger_at"]):
        return None  # It was moved: the claim will set another nominal time.
    missed = f", and {row['missed']} missed after it" if row["missed"] else ""
    return f"{local(row['scheduled_for'])}{missed}"


def _in_a_row(row: Mapping[str, Any]) -> str | None:
    if not row["failures"]:
        return None
    return f"the last {row['failures']} in a row" if row["failures"] > 1 else "the last one"


def _so_far(row: dict[str, Any]) -> str:
    parts = [f"attempt {row['attempt']}"] if row["attempt"] else []
    if row["deferrals"]:
        parts.append(
            f"deferred {'once' if row['deferrals'] == 1 else str(row['deferrals']) + ' times'}"
        )
    return f" ({', '.join(parts)})" if parts else ""


def _line(text: str, most: int) -> str:
    """A message in one line; if it is long, its beginning and its length."""
    line = " ".join(text[:most].split())
    return line if len(text) <= most else f"{line} … ({len(text):,} characters)"


def _when(row: dict[str, Any], now: datetime) -> str:
    if row["status"] not in ("pending", "running"):
        return relative(row["ended_at"] or row["updated_at"], now)
    return (
        "in a run"
        if row["lease"] is not None
        else "paused"
        if row["paused_at"] is not None
        else relative(row["trigger_at"], now)
    )


def _between(end: datetime | None, start: datetime | None) -> str:
    return "" if end is None or start is None else span((end - start).total_seconds())

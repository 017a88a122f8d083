"""`schedule`, `list`, `show`: recalls as an operator makes and sees them."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import errors
from psycopg.rows import dict_row

from .. import settings, statements
from ..ledger import CONNECT_DEADLINE, Dates
from ..recall import STATUSES
from .talk import USAGE, Trouble, command, length, local, print_facts, print_json, print_table, relative, seconds, span, tell


def connect(dsn: str | None) -> psycopg.Connection[dict[str, Any]]:
    """A connection for one command."""
    address = settings.read(needed=["dsn"], dsn=dsn).dsn or ""
    conn = psycopg.connect(
        address,
        row_factory=dict_row,
        autocommit=True,
        application_name="recall-worker cli",
        connect_timeout=int(CONNECT_DEADLINE),
    )
    conn.adapters.register_loader("timestamptz", Dates)
    return conn


def schedule(
    dsn: str | None,
    session: str,
    message: str,
    *,
    after: str | None,
    at: str | None,
    every: str | None,
    comment: str | None,
    as_json: bool,
) -> None:
    if sum(option is not None for option in (after, at, every)) > 1:
        raise Trouble("--in, --at and --every exclude each other", "give one of them, or none for a recall at once", status=USAGE)
    if session in ("", ".", ".."):
        raise Trouble(f"{session!r} can't be a session's id", "the id that the application gave the session", status=USAGE)
    values: dict[str, Any] = {
        "id": str(uuid4()), "session_id": session, "call_type": "immediate", "message": message, "at": None, "after": None,
        "interval": None, "comment": comment,
    }  # fmt: skip
    if after is not None:
        values |= {"call_type": "once", "after": seconds(after, "--in")}
    elif at is not None:
        values |= {"call_type": "once", "at": instant(at, "--at")}
    elif every is not None:
        interval = seconds(every, "--every")
        if interval < 1 or interval != int(interval) or interval > 2**31 - 1:
            raise Trouble(
                f"--every {every!r}: an interval is a whole number of seconds, at least one", "--every 1h", status=USAGE
            )
        values |= {"call_type": "recurring", "after": interval, "interval": int(interval)}
    with connect(dsn) as conn:
        try:
            row = conn.execute(statements.load("client")["schedule"].encode(), values).fetchone()
        except errors.UniqueViolation:
            raise Trouble(
                f"session {session} has a pending recall already, and holds one at a time",
                command("list", "--session", session),
                command("cancel", "--session", session),
            ) from None
        except errors.ForeignKeyViolation:
            raise Trouble(f"there is no session {session}", "the id that the application gave the session") from None
    assert row is not None
    if as_json:
        print_json(row)
    else:
        print(row["id"])
        tell(f"Scheduled {_nature(row)}, due {local(row['trigger_at'])}.")


def instant(text: str, option: str) -> datetime:
    """A time as people write it. Raises Trouble."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise Trouble(
            f"{option} {text!r} is no time", "--at 2027-01-31T09:00 or 2027-01-31T09:00:00+01:00", status=USAGE
        ) from None
    # Without an offset the person means the clock on the wall, here.
    return when.astimezone() if when.tzinfo is None else when


def list_recalls(
    dsn: str | None, *, session: str | None, user: str | None, statuses: list[str] | None, limit: int, offset: int, as_json: bool
) -> None:
    unknown = sorted(set(statuses or []) - set(STATUSES))
    if unknown:
        raise Trouble(f"there is no status {', '.join(unknown)}", f"--status with one of {', '.join(STATUSES)}", status=USAGE)
    name = "list_user" if user is not None else "list_session" if session is not None else "list"
    values = {"session_id": session, "user_id": user, "statuses": statuses or None, "limit": limit, "offset": offset}
    with connect(dsn) as conn:
        try:
            rows = conn.execute(statements.load("reads")[name].encode(), values).fetchall()
        except errors.UndefinedTable:
            if user is None:
                raise
            raise Trouble("this database has no table sessions, so nobody's sessions are known", "--session ID") from None
        now = _now(conn)
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
                row["id"], row["session_id"], _nature(row), row["status"], _when(row, now), local(row["trigger_at"]),
                str(row["occurrence"]), _line(row["additional_context_message"], 200),
            ]
            for row in rows
        ],
        yields=[("MESSAGE", 16), ("OCC", 0), ("DUE", 0), ("TYPE", 0), ("SESSION", 36), ("MESSAGE", 0), ("SESSION", 8)],
    )  # fmt: skip
    if len(rows) == limit:
        tell(f"More may follow: --offset {offset + limit}")


def show(dsn: str | None, id: str, *, as_json: bool) -> None:
    reads = statements.load("reads")
    with connect(dsn) as conn:
        row = conn.execute(reads["show"].encode(), {"id": id}).fetchone()
        calls = conn.execute(reads["calls"].encode(), {"id": id}).fetchall()
        now = _now(conn)
    if row is None and not calls:
        raise Trouble(f"there is no recall {id}", command("list"))
    if as_json:
        print_json({"recall": row, "calls": calls})
        return
    if row is None:
        tell("The recall is gone (deleted, or its session was); its calls are on record:")
    else:
        message = row["additional_context_message"]
        facts = [
            ("recall", row["id"]),
            ("session", row["session_id"]),
            ("type", _nature(row)),
            ("status", row["status"]),
            ("reason", row["reason"]),
            ("due", f"{local(row['trigger_at'])} ({relative(row['trigger_at'], now)})"),
            ("occurrence", f"{row['occurrence']}{_so_far(row)}"),
            ("last outcome", row["last_outcome"]),
            ("in a run", f"by worker {row['leased_by']} since {local(row['leased_at'])}" if row["lease"] else None),
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
            [">OCC", ">ATT", "OUTCOME", ">CALLS", "CALLED", ">LATE", ">TOOK", ">HTTP", "REASON", "WORKER"],
            [
                [
                    str(c["occurrence"]) + (f".{c['rekey']}" if c["rekey"] else ""), str(c["attempt"]), c["outcome"], str(c["calls"]),
                    local(c["called_at"]), _between(c["called_at"], c["scheduled_for"]), _between(c["ended_at"], c["last_called_at"]),
                    str(c["http_status"] or ""), c["reason"] or "", c["worker"],
                ]
                for c in calls
            ],
            yields=[("REASON", 24), ("WORKER", 0), ("REASON", 0), ("TOOK", 0), ("CALLED", 19)],
        )  # fmt: skip


def _now(conn: psycopg.Connection[dict[str, Any]]) -> datetime:
    row = conn.execute("select now() as now").fetchone()
    assert row is not None
    now: datetime = row["now"]
    return now


def _nature(row: dict[str, Any]) -> str:
    if row["call_type"] == "recurring" and row["interval_seconds"] is not None:
        return f"every {length(row['interval_seconds'])}"
    return str(row["call_type"])


def _so_far(row: dict[str, Any]) -> str:
    parts = [f"attempt {row['attempt']}"] if row["attempt"] else []
    if row["deferrals"]:
        parts.append(f"deferred {'once' if row['deferrals'] == 1 else str(row['deferrals']) + ' times'}")
    return f" ({', '.join(parts)})" if parts else ""


def _line(text: str, most: int) -> str:
    """A message in one line; of a long one the beginning, and how long it is."""
    line = " ".join(text[:most].split())
    return line if len(text) <= most else f"{line} … ({len(text):,} characters)"


def _when(row: dict[str, Any], now: datetime) -> str:
    if row["status"] not in ("pending", "running"):
        return relative(row["ended_at"] or row["updated_at"], now)
    return (
        "in a run" if row["lease"] is not None else "paused" if row["paused_at"] is not None else relative(row["trigger_at"], now)
    )


def _between(end: datetime | None, start: datetime | None) -> str:
    return "" if end is None or start is None else span((end - start).total_seconds())

"""`schedule`, `list`, `show`, `cancel`: recalls as an operator sees and handles them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import errors
from psycopg.rows import dict_row
from psycopg.types.datetime import TimestamptzLoader

from .. import settings, statements
from ..ledger import CONNECT_DEADLINE
from ..recall import STATUSES
from .talk import REFUSED, USAGE, Trouble, local, print_json, print_table, relative, seconds, tell

# Years that psycopg can't load; the row keeps them, people see the nearest.
_EARLIEST, _LATEST = datetime(1, 1, 2, tzinfo=UTC), datetime(9998, 1, 1, tzinfo=UTC)


def connect(dsn: str | None) -> psycopg.Connection[dict[str, Any]]:
    """A connection for one command."""
    address = settings.read(dsn=dsn).needed("dsn").dsn or ""
    conn = psycopg.connect(
        address, row_factory=dict_row, autocommit=True, application_name="recall-worker cli", connect_timeout=int(CONNECT_DEADLINE)
    )
    conn.adapters.register_loader("timestamptz", _Clamped)
    return conn


class _Clamped(TimestamptzLoader):
    """Dates as people can be shown them: infinite and far ones as the nearest that Python has."""

    def load(self, data: Any) -> datetime:
        text = bytes(data)
        if text == b"infinity":
            return _LATEST
        if text == b"-infinity" or text.endswith(b"BC"):
            return _EARLIEST
        try:
            return max(_EARLIEST, min(_LATEST, super().load(data)))
        except (errors.DataError, ValueError, OverflowError):
            return _LATEST


def schedule(
    dsn: str | None, session: str, message: str, *, after: str | None, at: str | None, every: str | None, comment: str | None, as_json: bool
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
        values |= {"call_type": "once", "at": _instant(at)}
    elif every is not None:
        interval = seconds(every, "--every")
        if interval < 1 or interval != int(interval) or interval > 2**31 - 1:
            raise Trouble(f"--every {every!r}: an interval is a whole number of seconds, at least one", "--every 1h", status=USAGE)
        values |= {"call_type": "recurring", "after": interval, "interval": int(interval)}
    with connect(dsn) as conn:
        try:
            row = conn.execute(statements.load("client")["schedule"].encode(), values).fetchone()
        except errors.UniqueViolation:
            raise Trouble(
                f"session {session} has a recall already", f"recall-worker list --session {session}", f"recall-worker cancel --session {session}"
            ) from None
        except errors.ForeignKeyViolation:
            raise Trouble(f"there is no session {session}", "the id that the application gave the session") from None
        except psycopg.DataError as error:
            raise Trouble(f"PostgreSQL can't store that: {str(error).splitlines()[0]}", status=USAGE) from None
    assert row is not None
    if as_json:
        print_json(row)
    else:
        print(row["id"])
        tell(f"Scheduled {_nature(row)}, due {local(row['trigger_at'])}.")


def _instant(text: str) -> datetime:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise Trouble(f"--at {text!r} is no time", "--at 2027-01-31T09:00 or 2027-01-31T09:00:00+01:00", status=USAGE) from None
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
        ["ID", "SESSION", "TYPE", "STATUS", "DUE", "", "OCC", "MESSAGE"],
        [
            [
                row["id"], row["session_id"], _nature(row), row["status"], local(row["trigger_at"]), _when(row, now),
                str(row["occurrence"]), " ".join(row["additional_context_message"][:200].split()),
            ]
            for row in rows
        ],
        wide="MESSAGE",
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
        raise Trouble(f"there is no recall {id}", "recall-worker list")
    if as_json:
        print_json({"recall": row, "calls": calls})
        return
    if row is None:
        tell("The recall is gone (deleted, or its session was); its calls are on record:")
    else:
        facts = [
            ("recall", row["id"]),
            ("session", row["session_id"]),
            ("type", _nature(row)),
            ("status", row["status"] + (f": {row['reason']}" if row["reason"] else "")),
            ("due", f"{local(row['trigger_at'])}  {_when(row, now)}"),
            ("occurrence", f"{row['occurrence']}, attempt {row['attempt']}, deferred {row['deferrals']} times"),
            ("last outcome", row["last_outcome"]),
            ("leased by", f"{row['leased_by']}, until {local(row['lease_until'])}" if row["lease"] else None),
            ("paused", local(row["paused_at"]) or None),
            ("ended", local(row["ended_at"]) or None),
            ("created", local(row["created_at"])),
            ("comment", row["internal_comment"]),
            ("message", " ".join(row["additional_context_message"][:2000].split())),
        ]
        print_table(["", ""], [[name, str(value)] for name, value in facts if value is not None], wide="")
    if calls:
        print()
        print_table(
            ["OCC", "ATTEMPT", "OUTCOME", "CALLS", "CALLED", "LATE", "TOOK", "HTTP", "WORKER", "REASON"],
            [
                [
                    str(c["occurrence"]) + (f".{c['rekey']}" if c["rekey"] else ""), str(c["attempt"]), c["outcome"], str(c["calls"]),
                    local(c["called_at"]), _span(c["called_at"], c["scheduled_for"]), _span(c["ended_at"], c["last_called_at"]),
                    str(c["http_status"] or ""), c["worker"], c["reason"] or "",
                ]
                for c in calls
            ],
            wide="REASON",
        )  # fmt: skip


def cancel(dsn: str | None, ids: list[str], *, session: str | None, yes: bool, as_json: bool) -> None:
    if (session is None) == (not ids):
        raise Trouble("name recalls, or a session", "recall-worker cancel ID…", "recall-worker cancel --session ID", status=USAGE)
    client = statements.load("client")
    with connect(dsn) as conn:
        if session is not None:
            _ask(f"Cancel every live recall of session {session}?", yes)
        reason = "cancelled on the command line"
        name = "cancel_session" if session is not None else "cancel"
        rows = conn.execute(client[name].encode(), {"ids": ids, "session_id": session, "reason": reason}).fetchall()
        done = [row["id"] for row in rows]
        states = {row["id"]: row["status"] for row in conn.execute(client["states"].encode(), {"ids": ids})}
    if as_json:
        print_json(rows)
    else:
        for id in done:
            print(id)
    left = [f"{id} is {states[id]} already" if id in states else f"there is no recall {id}" for id in ids if id not in done]
    if left:
        raise Trouble("; ".join(left), "recall-worker list", status=REFUSED)
    if not done:
        raise Trouble(f"session {session} has no live recall", f"recall-worker list --session {session}")


def _ask(question: str, yes: bool) -> None:
    import typer

    if not yes and not typer.confirm(question, err=True):
        raise Trouble("nothing was done")


def _now(conn: psycopg.Connection[dict[str, Any]]) -> datetime:
    row = conn.execute("select now() as now").fetchone()
    assert row is not None
    now: datetime = row["now"]
    return now


def _nature(row: dict[str, Any]) -> str:
    if row["call_type"] == "recurring" and row["interval_seconds"] is not None:
        return f"every {timedelta(seconds=row['interval_seconds'])}"
    return str(row["call_type"])


def _when(row: dict[str, Any], now: datetime) -> str:
    if row["lease"] is not None and row["status"] in ("pending", "running"):
        return "in a run"
    return relative(row["trigger_at"], now) if row["status"] in ("pending", "running") else ""


def _span(end: datetime | None, start: datetime | None) -> str:
    if end is None or start is None:
        return ""
    took = (end - start).total_seconds()
    return f"{took * 1000:.1f} ms" if abs(took) < 1 else f"{took:.1f} s" if abs(took) < 600 else str(timedelta(seconds=int(took)))

"""`schedule`: how an operator creates recalls; and what all commands share."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import random
import socket
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg import errors

from .. import cadence, keys, settings, statements
from ..database import identity
from ..database.connection import error_text
from ..events import escape_controls
from ..keys import UnfitKey
from ..operations import queues
from ..operations.arguments import (
    delta,
    explained,
    instant,
    is_past,
    known_queue,
    refused_queue,
)
from ..operations.connection import clock, opened
from ..operations.words import ends, nature
from ..selection import whole_ids
from ..settings import DEFAULT_QUEUE
from ..terminal import (
    USAGE,
    Trouble,
    command,
    local,
    print_json,
    tell,
    warn_of_password,
)


def connect(dsn: str | None) -> psycopg.Connection[dict[str, Any]]:
    """A connection for one command. Raises Trouble where the table is elsewhere."""
    warn_of_password(dsn)
    chosen = settings.read(needed=["dsn"], dsn=dsn)
    conn = opened(chosen.dsn or "", "recall-worker cli", chosen.schema)
    try:
        if identity.ask_once(conn).copy:
            # What is written on a copy is written; who reads the answer must know that nobody
            # calls it.
            tell(f"Note: {identity.IS_A_COPY}. Try: {identity.COPY_HINT}")
    except BaseException:
        conn.close()
        raise
    return conn


def whole_id(conn: psycopg.Connection[dict[str, Any]], id: str) -> str:
    """The id that is meant by an id or its beginning. Raises AmbiguousId."""
    return whole_ids(conn, [id])[0]


def acting() -> dict[str, str | None]:
    """Who acts, for the record: RECALL_ACTOR, else the login name and the host; where the host
    does not know the account's name, None: the role of the database session. Raises SettingsError.
    """
    actor = settings.actor()
    if actor is None:
        with contextlib.suppress(KeyError):
            name = f"{pwd.getpwuid(os.getuid()).pw_name}@{socket.gethostname()}"
            actor = name.encode(errors="replace").decode()
    return {"actor": actor, "via": "cli"}


def schedule(
    dsn: str | None,
    session: str,
    message: str,
    *,
    after: str | None,
    at: str | None,
    now_if_past: bool,
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
    queue: str,
    as_json: bool,
) -> None:
    known_queue(queue)
    if session in ("", ".", ".."):
        raise Trouble(
            f"{session!r} can't be a session's id",
            "the id that the application gave the session",
            status=USAGE,
        )
    if time_zone is not None and cron is None and at is None and until is None:
        raise Trouble(
            "--tz goes with --cron, --at or --until: --in, --every and --grid are elapsed time",
            "the same command without --tz",
            status=USAGE,
        )
    with explained("--tz with an IANA name, such as Europe/Berlin"):
        where = None if time_zone is None else cadence.zone(time_zone)
    rule: dict[str, Any] = {
        "at": None if at is None else instant(at, "--at", where),
        "after": delta(after, "--in"),
        "every": delta(every, "--every"),
        "grid": delta(grid, "--grid"),
        "cron": cron,
        # Without cron it is only the zone of --at and --until.
        "time_zone": time_zone if cron is not None else None,
        "until": None if until is None else instant(until, "--until", where),
        "times": times,
        "failures": failures,
        "grace": delta(grace, "--grace"),
        "jitter": delta(jitter, "--jitter"),
    }
    if now_if_past and at is None:
        raise Trouble(
            "--now-if-past goes with --at", "the same command without --now-if-past", status=USAGE
        )
    with explained():
        # Mistakes are reported before a connection is opened. What depends on the time is not
        # judged here: then PostgreSQL's clock decides.
        endless = {"until": None if until is None else cadence.FAR}
        cadence.plan(datetime.now(UTC), 0.0, **rule | endless)
    client = statements.load("client")
    with connect(dsn) as conn:
        now = clock(conn)
        if is_past(rule["at"], now, now_if_past=now_if_past):
            rule |= {"at": None, "after": timedelta(0)}
        with explained():
            plan = cadence.plan(now, random.random(), **rule)
        values = dataclasses.asdict(plan) | {
            "session_id": session,
            "message": message,
            "comment": comment,
            "queue": queue,
            **acting(),
        }
        try:
            row = _insert(conn, session, values)
        except UnfitKey as error:
            raise Trouble(str(error), error.hint) from None
        except errors.ObjectNotInPrerequisiteState as error:
            raise refused_queue(error) from None
        except errors.UniqueViolation as error:
            violated = {"schema": error.diag.schema_name, "name": error.diag.constraint_name}
            found = conn.execute(client["violated"].encode(), violated).fetchone()
            most = keys.pending_most(found)
            if most is None:
                raise Trouble(
                    f"PostgreSQL refuses the recall: {error_text(error)}",
                    "where the id comes from a sequence: is that behind the table's ids?",
                ) from None
            raise Trouble(
                f"session {session} already has a pending recall, and can have only one"
                if most == 1
                else f"session {session} already has {most} pending recalls, and can have no more",
                command("list", "--session", session),
                command("cancel", "--session", session)
                if most == 1
                else "recall-worker cancel ID, of one of them",
            ) from None
        except errors.ForeignKeyViolation:
            raise Trouble(
                f"there is no session {session}", "the id that the application gave the session"
            ) from None
        warn_of_queue(conn, queue)
    if as_json:
        print_json(row)
    else:
        print(escape_controls(row["id"]))
        tell(
            f"Scheduled {escape_controls(nature(row))}, due {local(row['trigger_at'])}{ends(row)}."
        )


def warn_of_queue(conn: psycopg.Connection[dict[str, Any]], queue: str) -> None:
    """Say where nobody would claim from this queue, which may be a typing error."""
    if queue == DEFAULT_QUEUE:
        return
    state = queues.state(conn, queue, identity.ask_once(conn))
    if (note := queues.unserved(state, queue)) is not None:
        tell(f"Note: {escape_controls(note)}: recall-worker queues")


def _insert(
    conn: psycopg.Connection[dict[str, Any]], session: str, values: dict[str, Any]
) -> dict[str, Any]:
    """Insert a recall under an id as its column takes it. Raises UnfitKey."""
    client = statements.load("client")
    found = conn.execute(client["keys"].encode()).fetchone()
    columns = keys.TEXT if found is None else keys.Columns.of(found)
    id = columns.new_id(None)
    name = "schedule_by_default" if id is None else "schedule"
    try:
        row = conn.execute(client[name].encode(), values | {"id": id}).fetchone()
    except errors.NotNullViolation as error:
        if (unfit := columns.refusal(error.diag.column_name, id, session)) is not None:
            raise unfit from None
        raise Trouble(
            f"column {error.diag.column_name} of session_recalls must be given, "
            "and this command has nothing to give",
            "set a default for that column, or let the application insert this recall",
        ) from None
    assert row is not None
    return row

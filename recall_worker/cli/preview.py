"""`preview`: the next occurrences of a cron expression, or of a recall, with time zone and offset,
so that a change of clocks is seen before it comes.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice

import psycopg

from .. import cadence, settings, statements
from ..events import escape_controls
from ..operations.arguments import explained, instant
from ..operations.connection import clock
from ..operations.moments import notes, offset, remarks
from ..operations.words import nature
from ..recall import FINAL, Recall
from ..terminal import USAGE, Trouble, command, print_json, print_table, relative, rfc3339, tell
from .recalls import connect, whole_id


def preview(
    dsn: str | None,
    what: str,
    *,
    time_zone: str | None,
    start: str | None,
    count: int,
    as_json: bool,
) -> None:
    row, now = _row(dsn, what)
    if row is None and len(what.split()) > 1:
        with explained("--tz with an IANA name, such as Europe/Berlin"):
            where = cadence.zone(time_zone)
        with explained("recall-worker preview --help"):
            # A moment given with --from counts itself, as with `schedule`; now does not.
            after = (
                now
                if start is None
                else instant(start, "--from", where).astimezone(UTC) - timedelta(microseconds=1)
            )
            cadence.check(what, time_zone, after)
            moments = list(islice(cadence.ticks(what, time_zone, after), count))
        _show(moments, where, now, {"cron": what, "time_zone": where.key}, as_json)
        return
    if time_zone is not None or start is not None:
        raise Trouble(
            f"--tz and --from go with a cron expression of five fields, and {what!r} is none",
            "recall-worker preview '30 9 * * mon-fri' --tz Europe/Berlin",
            status=USAGE,
        )
    if row is None:
        hint = "recall-worker preview '30 9 * * mon-fri' --tz Europe/Berlin"
        raise Trouble(
            f"there is no recall {what}, and it is no cron expression of five fields",
            command("list"),
            hint,
        )
    recall = Recall.of(row)
    if recall.status in FINAL:
        raise Trouble(
            f"{recall.id} is {recall.status}: it has no next occurrence",
            command("show", recall.id),
        )
    with explained(command("show", recall.id)):
        where = cadence.zone(recall.time_zone)
        moments = list(islice(cadence.upcoming(recall, now), count))
    zone: tzinfo | None = where if recall.cadence == "cron" else None
    if not as_json:
        tell(escape_controls(f"{recall.id}: {nature(row)}{remarks(row, recall)}"))
    _show(
        moments,
        zone,
        now,
        {"id": recall.id, "cron": recall.cron, "time_zone": recall.time_zone},
        as_json,
    )


def _row(dsn: str | None, what: str) -> tuple[dict[str, object] | None, datetime]:
    """The recall of this id, and PostgreSQL's clock. An id may have blanks, as an expression has;
    so a text with blanks is looked up where there is a DSN, and is an expression where PostgreSQL
    does not answer or knows no such recall."""
    if len(what.split()) == 1:
        with connect(dsn) as conn:
            return _shown(conn, what)
    try:
        if settings.read(dsn=dsn).dsn is not None:
            with connect(dsn) as conn:
                return _shown(conn, what)
    except (settings.SettingsError, psycopg.Error, OSError, Trouble):
        pass
    return None, datetime.now(UTC)


def _shown(
    conn: psycopg.Connection[dict[str, object]], id: str
) -> tuple[dict[str, object] | None, datetime]:
    whole = {"id": whole_id(conn, id)}
    found = conn.execute(statements.load("reads")["show"].encode(), whole).fetchone()
    return found, clock(conn)


def _show(
    moments: list[datetime],
    zone: tzinfo | None,
    now: datetime,
    source: dict[str, object],
    as_json: bool,
) -> None:
    """`zone` None: that of this host. `source`: what the times are of, for JSON."""
    walls = [moment.astimezone(zone) for moment in moments]
    if as_json:
        found = [
            {"at": rfc3339(moment), "local": wall.isoformat()}
            for moment, wall in zip(moments, walls, strict=True)
        ]
        print_json({**source, "occurrences": found})
        return
    print_table(
        ["LOCAL TIME", "ZONE", "OFFSET", "UTC", "WHEN", ""],
        [
            [
                f"{wall:%a %Y-%m-%d %H:%M:%S}",
                wall.tzname() or "",
                offset(wall),
                f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}",
                relative(moment, now),
                note,
            ]
            for moment, wall, note in zip(moments, walls, notes(walls), strict=True)
        ],
        yields=[("UTC", 0), ("WHEN", 0), ("", 12)],
    )
    if not moments:
        tell("No next occurrence.")

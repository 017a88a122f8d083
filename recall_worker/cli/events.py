"""`events`: calls and actions as one stream, in the order of time, and on request on and on.

One statement reads both, at most once a second. What is found is compared with what was shown: a
transaction may commit after later ones did, and a call is recorded after it ended. So each look
goes back: for actions, to the oldest id that a transaction may still bring; for calls, by NEAR, and
once a minute by FAR. A call that is recorded later than that after its end is not shown.

Never here: what an entry says (story).
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from .. import statements
from ..database.connection import error_text
from ..events import escape_controls
from ..operations.story import Entry, action_sentence, call_sentence
from ..terminal import print_json, print_json_line, tell
from .recalls import connect, whole_id
from .story import beginning, known, print_entries

Row = Mapping[str, Any]
Connection = psycopg.Connection[dict[str, Any]]

NEAR, FAR = timedelta(minutes=2), timedelta(hours=1)
"""How far back a look goes, and each FAR_EVERYth."""
EVER = datetime(1, 1, 2, tzinfo=UTC)
"""Before everything that is on record."""
FAR_EVERY = 60
BUSY, IDLE = 1.0, 2.0
"""Seconds between two looks: after a notification, or an entry, and without."""
TURN = 0.5
"""Seconds after which it is noticed that nobody reads any more."""
AGAIN = 2.0
"""Seconds between two tries to reach PostgreSQL again."""

OF_CALLS = (
    "recall_id",
    "session_id",
    "occurrence",
    "rekey",
    "attempt",
    "outcome",
    "calls",
    "missed",
    "scheduled_for",
    "called_at",
    "last_called_at",
    "http_status",
    "reason",
    "settled",
    "worker",
)
OF_ACTIONS = ("id", "recall_id", "actor", "via", "action", "detail")


class Stream:
    """What to look for next, and which of what is found is new.

    A call is known by its key, the number of calls that it stands for, and its end: one that is
    repeated, or corrected, is new.
    """

    def __init__(self) -> None:
        self._calls: dict[tuple[Any, ...], datetime] = {}
        self._actions: set[int] = set()
        self._looks = 0
        self._looked_at: datetime | None = None
        self.after: int | None = None
        """The id up to which every action was seen, or will never be; None before the first
        look."""
        self._undecided: list[tuple[int, int]] = []
        """Numbers of transactions, and the last action that was given an id before: when all below
        that number have ended, all up to that action is decided."""
        self._last_before: int | None = None

    def since(self, now: datetime) -> datetime:
        """From when on calls are looked for; `now`: PostgreSQL's at the last look."""
        far = self._looks % FAR_EVERY == 0
        return (self._looked_at or now) - (FAR if far else NEAR)

    def reconnected(self) -> None:
        """PostgreSQL was lost: what was recorded meanwhile may have ended long before."""
        self._looks = 0

    def new(self, rows: Iterable[Row]) -> list[Row]:
        """Of what one look found, what no look before did, in the order of time. The first row is
        that of the snapshot."""
        first, *found = rows
        self._looks += 1
        fresh = [row for row in found if self._is_new(row)]
        self._looked_at = first["at"]
        self._decide(first)
        oldest = first["at"] - 2 * FAR
        self._calls = {key: at for key, at in self._calls.items() if at > oldest}
        return sorted(fresh, key=lambda row: (row["at"], row["kind"], int(row["id"] or 0)))

    def _is_new(self, row: Row) -> bool:
        if row["kind"] == "action":
            id = int(row["id"])
            if id in self._actions:
                return False
            self._actions.add(id)
            return True
        key = tuple(
            row[name]
            for name in ("recall_id", "occurrence", "rekey", "attempt", "outcome", "calls", "at")
        )
        if key in self._calls:
            return False
        self._calls[key] = row["at"]
        return True

    def _decide(self, first: Row) -> None:
        """Move `after` on, over the ids whose transactions have ended."""
        if self.after is None:
            self.after = first["decided"]
        # An id is drawn an instant before its transaction has a number: so that of the next look
        # bounds it.
        if self._last_before is not None:
            self._undecided.append((first["next"], self._last_before))
        self._last_before = max(first["last_action"], *self._actions, 0)
        while self._undecided and first["oldest"] >= self._undecided[0][0]:
            self.after = max(self.after, self._undecided.pop(0)[1])
        after = self.after
        self._actions = {id for id in self._actions if id > after}


def events(
    dsn: str | None,
    id: str | None,
    *,
    follow: bool,
    since: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """`limit`: of entries that are past, the last ones. What is followed ends well by a signal."""
    if not follow:
        _stream(dsn, id, follow=False, since=since, limit=limit, as_json=as_json)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        _stream(dsn, id, follow=True, since=since, limit=limit, as_json=as_json)


def _stream(
    dsn: str | None, id: str | None, *, follow: bool, since: str | None, limit: int, as_json: bool
) -> None:
    stream = Stream()
    with connect(dsn) as conn:
        if id is not None:
            id = whole_id(conn, id)
            known(conn, id)
        if follow:
            tell("Following what happens; Ctrl-C ends it.")
            _listen(conn)
        now = _now(conn)
        start = beginning(since, now) if since else now - FAR if id is None else EVER
        # What is known from the start is not shown later.
        entries = stream.new(_look(conn, id, min(start, now - FAR), None))
        entries = [row for row in entries if row["at"] > start]
        past = entries[max(0, len(entries) - limit) :]
        if not follow and as_json:
            print_json([_document(row) for row in past])
        else:
            _print(past, as_json)
        if limit and len(past) < len(entries):
            tell(f"The latest {len(past)} of {len(entries):,}: --limit {len(entries)} shows all.")
        elif not past and not follow:
            hour = not since and id is None
            tell("Nothing is on record" + (" of the last hour: --since 1d." if hour else "."))
        if not follow:
            return
        try:
            _follow(conn, stream, id, now, as_json)
        except psycopg.OperationalError as error:
            tell(escape_controls(f"Note: PostgreSQL is lost, and tried again: {error_text(error)}"))
    while True:
        try:
            with connect(dsn) as conn:
                tell("Note: PostgreSQL is back.")
                stream.reconnected()
                _listen(conn)
                _follow(conn, stream, id, now, as_json)
        except psycopg.OperationalError:
            _wait(None, time.monotonic() + AGAIN)


def _follow(conn: Connection, stream: Stream, id: str | None, now: datetime, as_json: bool) -> None:
    """Print what is new, again and again. Raises OperationalError where PostgreSQL is lost."""
    while True:
        looked_at = time.monotonic()
        fresh = stream.new(_look(conn, id, stream.since(now), stream.after))
        _print(fresh, as_json)
        _wait(conn, looked_at + (BUSY if fresh else IDLE), looked_at + BUSY)


def _look(
    conn: Connection, id: str | None, since: datetime, after: int | None
) -> list[dict[str, Any]]:
    values = {"id": id, "since": since, "after": after}
    rows = conn.execute(statements.load("reads")["events"].encode(), values).fetchall()
    return sorted(rows, key=lambda row: row["kind"] is not None)


def _listen(conn: Connection) -> None:
    """Have notifications wake us, where they arrive: a transaction pooler does not pass them."""
    if not getattr(conn, "pooled", False):
        conn.execute(b"listen session_recalls")


def _now(conn: Connection) -> datetime:
    row = conn.execute(statements.load("client")["clock"].encode()).fetchone()
    assert row is not None
    now: datetime = row["now"]
    return now


def _wait(conn: Connection | None, until: float, notified_until: float = 0.0) -> None:
    """Wait until that monotonic instant; after a notification only until the other one. Raises
    BrokenPipeError where nobody reads any more."""
    while (left := until - time.monotonic()) > 0:
        turn = min(left, TURN)
        if conn is None or getattr(conn, "pooled", False):
            time.sleep(turn)
        elif list(conn.notifies(timeout=turn, stop_after=1)):
            until = min(until, notified_until)
        if _reader_is_gone():
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    if conn is not None and not getattr(conn, "pooled", False):
        # What arrived meanwhile is seen by the look that follows.
        list(conn.notifies(timeout=0))


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads: without an entry no write would tell."""
    with suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _document(row: Row) -> dict[str, Any]:
    names = OF_CALLS if row["kind"] == "call" else OF_ACTIONS
    return {"kind": row["kind"], "at": row["at"], **{name: row[name] for name in names}}


def _print(rows: list[Row], as_json: bool) -> None:
    for row in rows:
        if as_json:
            print_json_line(_document(row))
            continue
        says = (
            call_sentence({**row, "ended_at": row["at"]})
            if row["kind"] == "call"
            else action_sentence(row)
        )
        whom = f"{row['recall_id']}: " if row["recall_id"] is not None else ""
        print_entries([Entry(row["at"], whom + says)])

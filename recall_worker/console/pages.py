"""What each page shows: a few bounded questions to PostgreSQL, asked on one connection, and their
answers in the order in which a person reads them. All of it only reads.

Never here: how it is drawn (templates), who may see it (access), what is done (acting).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any
from urllib.parse import parse_qs

from .. import cadence, statements
from ..database.identity import Identity
from ..fleet import FLEET, differences, queues_of, setting_of, state_of
from ..operations import moments as moment_words
from ..operations import story as stories
from ..operations.connection import clock
from ..operations.why import because, evidence
from ..recall import Recall
from ..selection import (
    COUNT_MOST,
    FILTERS,
    AmbiguousId,
    Page,
    Selection,
    find,
    whole_ids,
)
from ..terminal import USAGE, Trouble
from ..top.picture import OVERDUE, ROWS, Picture
from . import agenda
from .brief import Fleet, brief
from .database import Connection, impatient
from .questions import FAILURES, Question, Rows, listed
from .rendering import here

Row = Mapping[str, Any]

BY_INDEX = frozenset({"due", "overdue", "in-run", "deferred", "paused"})
"""States that an index has."""
FIELDS_MOST = 2_000
"""Fields of an address, or of a form."""
LIMIT_MOST = 500
"""Recalls of one page."""
READ_THROUGH = 100_000
"""Recalls of a table, at most, that is read through for a search that no index serves."""
LIVE_MOST = 200
"""Recalls of a page, at most, that is told of changes."""
CALLS, ACTIONS = 20, 50
"""Of the latest calls and actions of a recall, so many are shown."""
NEXT = 10
"""Moments that are computed ahead."""
HIDDEN = frozenset({"message", "comment"})


# --- now, and what the live picture shows ---------------------------------------------------------


def fleet_of(picture: Picture) -> Fleet:
    return Fleet.of(picture.workers, picture.paused_queues, picture.runs, picture.copy)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that have the same cause."""

    why: str
    rows: list[Row]

    @property
    def count(self) -> int:
        return len(self.rows)


def overdue(picture: Picture) -> list[Group]:
    """What is overdue, by why it was not called, the most first."""
    fleet = fleet_of(picture)
    return grouped(
        (brief(row, fleet, picture.now), row)
        for row in picture.next
        if picture.age(row["due_at"]) > OVERDUE
    )


def grouped(pairs: Iterable[tuple[str, Row]]) -> list[Group]:
    """Rows by their reason, numbers aside; the largest group first."""
    found: dict[str, Group] = {}
    for why, row in pairs:
        key = re.sub(r"[0-9]+([.:][0-9]+)*", "#", why)
        found.setdefault(key, Group(why, [])).rows.append(row)
    return sorted(found.values(), key=lambda group: -group.count)


def failing(rows: Iterable[Row]) -> list[Group]:
    """Calls that ended in trouble, by outcome and reason."""
    return grouped(
        (f"{row['outcome']}: {row['reason']}" if row["reason"] else str(row["outcome"]), row)
        for row in rows
    )


def now(picture: Picture) -> dict[str, Any]:
    """Everything that the page `now` shows."""
    fleet = fleet_of(picture)
    return {
        "picture": picture,
        "now": picture.now,
        "overdue": overdue(picture),
        "next": [
            {**row, "why": brief(row, fleet, picture.now)}
            for row in picture.next
            if picture.age(row["due_at"]) <= OVERDUE
        ][:15],
        "failing": failing(picture.failures),
        "failures_cut": len(picture.failures) >= ROWS,
        **workers(picture),
    }


def workers(picture: Picture) -> dict[str, Any]:
    return {
        "picture": picture,
        "now": picture.now,
        "workers": [
            {
                **row,
                "state": state_of(row),
                "serves": queues_of(row),
                "url": setting_of(row, "run_url"),
            }
            for row in picture.workers
        ],
        "differences": differences([dict(row) for row in picture.alive]),
    }


def queues(picture: Picture) -> dict[str, Any]:
    return {"picture": picture, "now": picture.now, "queues": picture.queues}


PARTS = {"now": now, "workers": workers, "queues": queues}
"""What the live picture keeps up to date, by template."""


# --- recalls --------------------------------------------------------------------------------------


def filters(query: str) -> dict[str, list[str]]:
    """The filters in an address; empty fields of a form are none. Raises Trouble."""
    try:
        given = parse_qs(
            query, keep_blank_values=False, max_num_fields=FIELDS_MOST, errors="surrogateescape"
        )
    except ValueError:
        raise Trouble(
            f"the address has more than {FIELDS_MOST:,} fields", "fewer of them", status=USAGE
        ) from None
    return {name: values for name, values in given.items() if name in FILTERS}


@dataclass(frozen=True, slots=True)
class Found:
    """A page of recalls."""

    selection: Selection
    page: Page
    whys: dict[str, str]
    """By id."""

    @property
    def many(self) -> bool:
        return self.page.total > COUNT_MOST

    @property
    def newer(self) -> int | None:
        """The offset of the page before."""
        limit = self.selection.limit or 0
        return max(0, self.selection.offset - limit) if self.selection.offset else None

    @property
    def older(self) -> int | None:
        """The offset of the page behind."""
        end = self.selection.offset + len(self.page.rows)
        full = len(self.page.rows) == self.selection.limit
        return end if full and (self.many or end < self.page.total) else None


def selection(given: Mapping[str, list[str]]) -> Selection:
    """What a list shows: at most LIMIT_MOST. Raises SelectionError."""
    found = Selection.parse(given)
    return replace(found, limit=min(found.limit or LIMIT_MOST, LIMIT_MOST))


def by_index(selection: Selection) -> bool:
    return bool(selection.states) and BY_INDEX.issuperset(selection.states)


class Unserved(Exception):
    """A search that no index serves, of a large table. `recalls`: about how many it has."""

    def __init__(self, recalls: int) -> None:
        super().__init__(f"no index serves this search of {recalls:,} recalls")
        self.recalls = recalls


def is_served(selection: Selection) -> bool:
    """Whether an index leads to the recalls that are meant: by session, state or status, or by an
    outcome. (A user's sessions are asked for first.) Without any filter the newest are read."""
    by_session = selection.session is not None and not selection.is_pattern
    narrowed = selection.queue is not None or selection.since is not None or selection.is_pattern
    return bool(
        by_session
        or selection.user is not None
        or selection.states
        or selection.statuses
        or selection.outcome is not None
        or not narrowed
    )


def question_of(selection: Selection) -> Question | None:
    """How a list's page is kept up to date; None where it is not."""
    if (selection.limit or 0) > LIVE_MOST or not is_served(selection):
        return None
    return listed(selection, by_index=by_index(selection))


def search(conn: Connection, given: Mapping[str, list[str]], here: Identity) -> Found:
    """The recalls that are meant. Raises SelectionError, Unserved, and QueryCanceled where that
    reads too much."""
    meant = selection(given)
    if not is_served(meant):
        size = conn.execute(statements.load("console")["size"].encode()).fetchone()
        if size is not None and size["recalls"] > READ_THROUGH:
            raise Unserved(size["recalls"])
    with conn.transaction():
        impatient(conn, by_index=by_index(meant))
        page = find(conn, meant)
    fleet = _fleet(conn, page.rows, here)
    whys = {row["id"]: brief(row, fleet, page.now) for row in page.rows}
    return Found(meant, page, whys)


def _fleet(conn: Connection, rows: Sequence[Row], here: Identity) -> Fleet:
    """What may hold these recalls back."""
    sessions = [
        row["session_id"]
        for row in rows
        if row["status"] in ("pending", "running") and row["lease"] is None
    ]
    workers = conn.execute(statements.load("reads")["workers"].encode(), FLEET | here.known)
    paused = conn.execute(statements.load("top")["paused_queues"].encode(), {"rows": ROWS})
    runs: list[dict[str, Any]] = []
    if sessions:
        asked = {"sessions": sorted(set(filter(None, sessions)))}
        runs = conn.execute(statements.load("console")["in_a_run"].encode(), asked).fetchall()
    return Fleet.of(workers.fetchall(), paused.fetchall(), runs, here.copy)


def whole(conn: Connection, id: str) -> tuple[str | None, list[str]]:
    """The id that is meant by an id or its beginning, or None and the ids that may be."""
    with conn.transaction():
        impatient(conn)
        try:
            [found] = whole_ids(conn, [id])
        except AmbiguousId as error:
            return None, error.some
        known = conn.execute(statements.load("find")["existing"].encode(), {"ids": [found]})
        return (found, []) if known.fetchone() is not None else (None, [])


def recall(conn: Connection, id: str, here: Identity, *, messages: bool) -> dict[str, Any] | None:
    """One recall: why, its plan, its next moments, its calls and actions. None where there is
    nothing of it, and no record."""
    reads = statements.load("reads")
    row = conn.execute(reads["show"].encode(), {"id": id}).fetchone()
    calls = conn.execute(reads["calls"].encode(), {"id": id, "most": CALLS}).fetchall()
    values = {"id": id, "since": None, "actor": None, "actions": None, "most": ACTIONS}
    actions = conn.execute(reads["actions"].encode(), values).fetchall()
    total = conn.execute(reads["on_record"].encode(), {"id": id}).fetchone()
    told = conn.execute(reads["told"].encode(), {"id": id}).fetchall()
    now = clock(conn)
    assert total is not None
    if row is None and not calls and not actions:
        return None
    found: dict[str, Any] = {
        "id": id if row is None else row["id"],
        "row": row,
        "now": now,
        "calls": timed(calls),
        "calls_total": total["calls"],
        "most": max([1.0, *(call["whole"] or 0.0 for call in timed(calls))]),
        "story": stories.story(calls, actions, stories.unsaid(row, total))[: CALLS + ACTIONS],
        "total": total["calls"] + total["actions"],
        "why": None,
        "facts": [],
        "message": None,
        "comment": None,
        **dict.fromkeys(("moments", "moments_note"), None),
    }
    if row is None:
        return found
    if (row_of_why := evidence(conn, id, here)) is not None:
        found["why"] = because(row_of_why)
    found["facts"] = [
        (name, value)
        for name, value in stories.facts(row, told, now)
        if name not in HIDDEN | {"recall", "session", "queue", "status", "reason"}
    ]
    if messages:
        found["message"] = row["additional_context_message"]
        found["comment"] = row["internal_comment"]
    found |= upcoming(row, now)
    return found


def upcoming(row: Row, now: datetime) -> dict[str, Any]:
    """The next moments of a recall as its row is, in its own zone and in the reader's."""
    if row["status"] not in ("pending", "running"):
        return {"moments": [], "moments_note": None}
    found = Recall.of(row)
    try:
        zone = cadence.zone(found.time_zone)
        next = list(islice(cadence.upcoming(found, now), NEXT))
    except cadence.CadenceError as error:
        return {"moments": [], "moments_note": str(error)}
    shown = []
    own_zone = found.call_type == "recurring" and found.cadence == "cron"
    walls = [moment.astimezone(zone if own_zone else here(moment).tzinfo) for moment in next]
    for moment, wall, note in zip(next, walls, moment_words.notes(walls), strict=True):
        shown.append(
            {
                "at": moment,
                "wall": f"{wall:%a %Y-%m-%d %H:%M:%S}",
                "zone": zone.key if own_zone else None,
                "offset": moment_words.offset(wall),
                "note": note,
            }
        )
    remarks = moment_words.remarks(row, found).strip("; .")
    return {"moments": shown, "moments_note": remarks or None}


def timed(calls: Sequence[Row]) -> list[dict[str, Any]]:
    """Calls with the seconds that each was late and took."""
    found = []
    for call in calls:
        late = took = None
        if call["called_at"] is not None:
            if call["scheduled_for"] is not None:
                late = max(0.0, (call["called_at"] - call["scheduled_for"]).total_seconds())
            took = max(0.0, (call["ended_at"] - call["last_called_at"]).total_seconds())
        which = (
            f"extra run {-call['rekey']}"
            if call["rekey"] < 0
            else f"{call['occurrence']}" + (f", key {call['rekey']}" if call["rekey"] else "")
        )
        found.append(
            {
                **call,
                "late": late,
                "took": took,
                "whole": None if took is None else (late or 0.0) + took,
                "which": which,
                "answered": stories.answer(call),
            }
        )
    return found


# --- the agenda, and failures ---------------------------------------------------------------------


def answer(conn: Connection, question: Question) -> Rows:
    """A question's answer, asked for by itself. Raises QueryCanceled where that takes too long."""
    with conn.transaction():
        return {
            name: conn.execute(text.encode(), values).fetchall()
            for name, (text, values) in question.statements.items()
        }


def shown(question: Question, rows: Rows, now: datetime) -> dict[str, Any]:
    """What the page of a question shows. `now`: by PostgreSQL's clock."""
    if question.part == "agenda":
        found = agenda.agenda(
            rows["rows"], rows["paused"], rows["busy"], rows["paused_queues"], now, question.span
        )
        return found | {"span": question.span, "queue": question.queue}
    calls = rows["rows"]
    return {
        "now": now,
        "groups": failing(calls),
        "calls": len(calls),
        "many": len(calls) >= FAILURES,
        "rows": calls[:100],
        "window": question.span,
    }

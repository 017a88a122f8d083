"""Which recalls are meant: the filters of `list` and of the commands that act on many, and ids of
which the beginning was given.

Owns the words of the filters, what each may be, and how they become the values of one statement
(`find` in sql/find.sql). They come as texts, from options or from a query string, and a mistake is
a SelectionError that says which and what to give. PostgreSQL decides what matches, at the moment of
the query.

Never here: how recalls are shown, what is done to them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, get_args

import psycopg
from psycopg import errors

from . import durations, statements
from .keys import TEXT, Columns
from .recall import STATUSES, Outcome
from .settings import queue_problem

Connection = psycopg.Connection[dict[str, Any]]

AGES = 1e10
"""Seconds: three centuries. Longer ago is no further back, and PostgreSQL can't subtract all."""
STATES = {
    "due": "its time has come, and nobody has it in hand",
    "overdue": "due for over a minute",
    "in-run": "a worker runs it now",
    "deferred": "called, and to be called again, as the session was busy or nobody answered",
    "paused": "held back by an operator",
    "waiting": "neither in a run nor paused",
    "live": "waiting, paused or in a run",
    "failed": "ended without success",
    "fired": "ended well",
    "cancelled": "ended by somebody",
    "ended": "failed, fired or cancelled",
}
"""What people mean by the state of a recall, in the order in which it is shown."""
BY_DUE = frozenset({"due", "overdue", "deferred", "waiting"})
"""States of which the one that is due first is shown first."""
FILTERS = (
    "state",
    "status",
    "queue",
    "session",
    "user",
    "since",
    "outcome",
    "sort",
    "limit",
    "offset",
)
"""The names of what can be asked for."""
SORTS = ("due", "newest")
OUTCOMES = tuple(kind.__name__.lower() for kind in get_args(Outcome))
PAGE = 50
"""Recalls of a page, where nothing else is asked for."""
COUNT_MOST = 10_000
"""So many recalls are counted; of more it is only said that there are more. Counting them takes
some ten milliseconds, also where there are millions."""
PREFIX_LEAST = 6
"""Characters of an id's beginning, at least, that stand for it."""
CUT_LEAST = 8
"""Characters of an id that is shown cut, at least."""
ALIKE_MOST = 1000
"""Ids that are looked at, at most, to tell an id's beginning apart."""
INTEGERS = ("smallint", "integer", "bigint")

_UUID = (8, 4, 4, 4, 12)
_HEX = re.compile(r"[0-9a-f]+")


class SelectionError(ValueError):
    """A filter can't be meant. The message is a sentence that begins with its name, as an option
    has it; `instead`: an example that can."""

    def __init__(self, name: str, why: str, instead: str) -> None:
        super().__init__(f"--{name} {why}")
        self.name = name
        self.why = why
        self.instead = instead


class NoSessions(Exception):
    """The database has no table `sessions`, so nobody knows which sessions a user owns."""


class AmbiguousId(Exception):
    """Several recalls have an id that begins as given. `some`: a few of them; `recalls`: how many
    there are."""

    def __init__(self, given: str, some: Sequence[str], recalls: int) -> None:
        super().__init__(f"{given} is the beginning of {recalls:,} ids: {', '.join(some)}")
        self.given = given
        self.some = list(some)
        self.recalls = recalls


@dataclass(frozen=True, slots=True)
class Selection:
    """What was asked for. None and () stand for all."""

    states: tuple[str, ...] = ()
    """Of STATES; a recall in any of them."""
    statuses: tuple[str, ...] = ()
    """Of recall.STATUSES: the column as it stands."""
    queue: str | None = None
    session: str | None = None
    """Its id; or with `*` for any text, where no session has exactly this id."""
    literal: bool = False
    """Whether a `*` in it is a `*`, and nothing else."""
    user: str | None = None
    """The owner of its session, by the application's table `sessions`."""
    since: float | None = None
    """Seconds: something happened to it since then."""
    outcome: str | None = None
    """How its last call ended."""
    sort: str | None = None
    """Of SORTS; None: `due` where all states are of those that are due some time, else `newest`."""
    limit: int | None = PAGE
    """None: all."""
    offset: int = 0

    @classmethod
    def parse(cls, given: Mapping[str, str | Sequence[str] | None]) -> Selection:
        """The selection of options or of a query string (as `urllib.parse.parse_qs` has it).

        The names are state, status, queue, session, user, since, outcome, sort, limit and offset;
        state and status may be given several times. None stands for what is not given. An empty
        text is a text: it is for the caller to leave out the empty fields of a form. Raises
        SelectionError.
        """
        texts = {
            name: [value] if isinstance(value, str) else list(value)
            for name, value in given.items()
            if value is not None
        }
        for name, values in texts.items():
            if name not in FILTERS:
                raise SelectionError(name, "is no filter", f"--{', --'.join(FILTERS)}")
            if len(values) > 1 and name not in ("state", "status"):
                raise SelectionError(name, "is given twice", f"--{name} once")

        def one(name: str, read: Callable[[str, str], Any], default: Any = None) -> Any:
            return read(name, texts[name][0]) if texts.get(name) else default

        def some(name: str, known: Iterable[str]) -> tuple[str, ...]:
            found = [_word(name, value, known) for value in texts.get(name, ())]
            return tuple(dict.fromkeys(found))

        return cls(
            states=some("state", STATES),
            statuses=some("status", STATUSES),
            queue=one("queue", _queue),
            session=one("session", _text),
            user=one("user", _text),
            since=one("since", _since),
            outcome=one("outcome", lambda name, text: _word(name, text, OUTCOMES)),
            sort=one("sort", lambda name, text: _word(name, text, SORTS)),
            limit=one("limit", lambda name, text: _number(name, text, 1), PAGE),
            offset=one("offset", lambda name, text: _number(name, text, 0), 0),
        )

    @property
    def is_all(self) -> bool:
        """Whether no filter was given: every recall is meant."""
        return not any(
            (
                self.states,
                self.statuses,
                self.queue is not None,
                self.session is not None,
                self.user is not None,
                self.since is not None,
                self.outcome is not None,
            )
        )

    @property
    def order(self) -> str:
        """Of SORTS."""
        if self.sort is not None:
            return self.sort
        return "due" if self.states and BY_DUE.issuperset(self.states) else "newest"

    @property
    def is_pattern(self) -> bool:
        """Whether the session stands for several, where none has exactly this id."""
        return self.session is not None and "*" in self.session and not self.literal

    def values(self, sessions: Sequence[str] | None = None) -> dict[str, Any]:
        """The values of the statement `find`. `sessions`: those that `user` owns."""
        pattern = self.is_pattern
        return {
            "states": list(self.states) or None,
            "statuses": list(self.statuses) or None,
            "queue": self.queue,
            "session": self.session,
            "session_like": _like(self.session or "").replace("*", "%") if pattern else None,
            "sessions": None if sessions is None else list(sessions),
            "since": self.since,
            "outcome": self.outcome,
            "among": None,
            "gathered": sessions is not None or (self.session is not None and not pattern),
            "sort": self.order,
            "limit": self.limit,
            "offset": self.offset,
            "rows": True,
            "count_most": COUNT_MOST + 1,
        }


@dataclass(frozen=True, slots=True)
class Page:
    """Recalls that were found, in their order."""

    rows: list[dict[str, Any]]
    total: int
    """How many there are in all, at most COUNT_MOST + 1."""
    now: datetime
    """When, by PostgreSQL's clock."""


def find(conn: Connection, selection: Selection) -> Page:
    """The page of the recalls that are meant. Raises NoSessions, and psycopg's errors."""
    return _page(conn, selection.values(_sessions(conn, selection)))


@dataclass(frozen=True, slots=True)
class Chosen:
    """All recalls that were meant at one moment."""

    ids: list[str]
    """In the selection's order."""
    values: dict[str, Any]
    """What was asked for, as the statement `find` takes it."""


def choose(conn: Connection, selection: Selection, among: Sequence[str] | None = None) -> Chosen:
    """All that are meant now, up to the selection's limit; `among`: of these alone. Raises
    NoSessions."""
    values = selection.values(_sessions(conn, selection)) | {"rows": False, "count_most": 0}
    values["among"] = None if among is None else list(among)
    return Chosen(_find(conn, values)[0]["find_ids"], values)


@dataclass(frozen=True, slots=True)
class Held:
    """Recalls that are locked until the transaction ends."""

    locked: set[str]
    meant: set[str]
    """Those of them that are still what was asked for."""


def hold(conn: Connection, chosen: Chosen, ids: Sequence[str]) -> Held:
    """Lock these recalls until the transaction ends; not those that somebody else has locked."""
    rows = conn.execute(statements.load("find")["lock"].encode(), {"ids": list(ids)}).fetchall()
    locked = [row["id"] for row in rows]
    # What has happened since has happened: the window does not move on while a person thinks.
    of_these = {"among": locked, "since": None, "limit": None, "offset": 0}
    return Held(set(locked), set(_find(conn, chosen.values | of_these)[0]["find_ids"]))


def named(conn: Connection, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The recalls with these ids, as they are now, in this order; not those that are gone."""
    rows = conn.execute(statements.load("find")["named"].encode(), {"ids": list(ids)}).fetchall()
    places = {id: place for place, id in enumerate(ids)}
    return sorted(rows, key=lambda row: places.get(row["id"], len(places)))


def whole_ids(conn: Connection, given: Sequence[str]) -> list[str]:
    """The ids that are meant: each as it was given where a recall has exactly this id, else the one
    that begins so, in 6 characters or more. What no id begins with stays as it was given, and is
    the id of nothing. An integer never stands for a longer one. Raises AmbiguousId.
    """
    found = conn.execute(statements.load("find")["existing"].encode(), {"ids": list(given)})
    exact = {row["given"] for row in found.fetchall()}
    if exact.issuperset(given):
        return list(given)
    columns = columns_of(conn)
    whole = {id: id if id in exact else _beginning(conn, columns, id) for id in set(given)}
    return [whole[id] for id in given]


def short_ids(conn: Connection, ids: Sequence[str], room: int) -> dict[str, str]:
    """What to show of ids where each has so much room: the id itself where it fits, else its
    shortest beginning that no other recall's id has, of 8 characters or more. An id that can't be
    told apart by a beginning stays whole."""
    long = [id for id in ids if len(id) > max(room, CUT_LEAST)]
    shown = {id: id for id in ids}
    if not long or columns_of(conn).id_type in INTEGERS:
        return shown
    heads = sorted({id[:CUT_LEAST] for id in long})
    values = {"heads": heads, "length": CUT_LEAST, "most": ALIKE_MOST}
    alike = [row["id"] for row in conn.execute(statements.load("find")["alike"].encode(), values)]
    if len(alike) == ALIKE_MOST:
        return shown
    for id in long:
        shared = max((_shared(id, other) for other in alike if other != id), default=0)
        shown[id] = id[: max(CUT_LEAST, shared + 1)]
    return shown


def _shared(one: str, other: str) -> int:
    """How many characters two ids begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def columns_of(conn: Connection) -> Columns:
    """What the columns of the keys take."""
    row = conn.execute(statements.load("client")["keys"].encode()).fetchone()
    return TEXT if row is None else Columns.of(row)


def _beginning(conn: Connection, columns: Columns, given: str) -> str:
    if len(given) < PREFIX_LEAST or columns.id_type in INTEGERS:
        return given
    low = high = None
    pattern = given
    if columns.id_type == "uuid":
        digits = given.lower().replace("-", "")
        pattern = _grouped(digits)
        if not _HEX.fullmatch(digits) or not PREFIX_LEAST <= len(digits) <= sum(_UUID):
            return given
        # With all its hyphens or without any; the last may be one that follows a whole group.
        if given.lower() not in (digits, pattern, _grouped(f"{digits}0")[:-1]):
            return given
        low = _grouped(digits.ljust(sum(_UUID), "0"))
        high = _grouped(digits.ljust(sum(_UUID), "f"))
    values = {"low": low, "high": high, "pattern": f"{_like(pattern)}%", "most": 5}
    rows = conn.execute(statements.load("find")["beginning"].encode(), values).fetchall()
    if len(rows) > 1:
        raise AmbiguousId(given, [row["id"] for row in rows], rows[0]["recalls"])
    return rows[0]["id"] if rows else given


def _grouped(digits: str) -> str:
    """The digits of a uuid, or of its beginning, with the hyphens between its groups."""
    groups, at = [], 0
    for length in _UUID:
        groups.append(digits[at : at + length])
        at += length
    return "-".join(group for group in groups if group)


def _like(text: str) -> str:
    """A text as LIKE reads it literally."""
    return re.sub(r"([\\%_])", r"\\\1", text)


def _page(conn: Connection, values: Mapping[str, Any]) -> Page:
    rows = _find(conn, values)
    total, now = rows[0]["find_total"], rows[0]["find_now"]
    for row in rows:
        for name in ("find_total", "find_ids", "find_now"):
            del row[name]
    return Page([row for row in rows if row["id"] is not None], total, now)


def _find(conn: Connection, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return conn.execute(statements.load("find")["find"].encode(), values).fetchall()


def _sessions(conn: Connection, selection: Selection) -> list[str] | None:
    """The sessions that the user owns; None where no user was asked for."""
    if selection.user is None:
        return None
    owned = statements.load("find")["sessions_of_user"].encode()
    try:
        return [row["id"] for row in conn.execute(owned, {"user": selection.user})]
    except errors.UndefinedTable:
        raise NoSessions from None
    except (errors.InvalidTextRepresentation, errors.NumericValueOutOfRange):
        return []  # The type of sessions.user_id can't hold such a user.


def _text(_: str, text: str) -> str:
    return text


def _queue(name: str, text: str) -> str:
    if (wrong := queue_problem(text)) is not None:
        raise SelectionError(name, wrong, f"--{name} mail")
    return text


def _word(name: str, text: str, known: Iterable[str]) -> str:
    if text not in known:
        raise SelectionError(
            name, f"{text!r}: there is no such {name}", f"--{name} with one of {', '.join(known)}"
        )
    return text


def _since(name: str, text: str) -> float:
    try:
        return min(durations.seconds(text), AGES)
    except durations.DurationError as error:
        raise SelectionError(name, f"{text!r} {error}", f"--{name} {error.instead}") from None


def _number(name: str, text: str, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
        raise SelectionError(
            name, f"{text!r} is no number of at least {least}", f"--{name} {max(least, PAGE)}"
        )
    return int(text)

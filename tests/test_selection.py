"""Which recalls are meant: what the filters mean in each state, ids by their beginning, and what is
shown of an id that does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row

from recall_worker import schema, selection, statements
from recall_worker.selection import Selection, SelectionError

from .support import postgres
from .support.application import create_tables
from .test_cli import Said, operate, plain, trouble
from .test_inspect import Desk


@pytest.fixture(scope="module")
def room(server: str, template: str) -> Iterator[str]:
    """A database for all that leaves its schema as it is."""
    with postgres.database(server, template) as dsn:
        yield dsn


@pytest.fixture
def desk(room: str) -> Iterator[Desk]:
    """A database without rows, and rows put into it."""
    at = Desk(room)
    yield at
    at.conn.execute("truncate sessions, session_recalls, recall_actions")
    at.conn.close()


# --- what may be asked for ------------------------------------------------------------------------


def test_texts_become_a_selection() -> None:
    """Options and a query string say the same; what is not given is not asked for."""
    assert Selection.parse({}) == Selection() and Selection().is_all
    found = Selection.parse(
        {
            "state": ["failed", "failed", "paused"],
            "status": "pending",
            "queue": ["mail"],
            "session": "chat-*",
            "user": None,
            "since": "1h30",
            "outcome": "busy",
            "sort": "due",
            "limit": "20",
            "offset": "40",
        }
    )
    assert found == Selection(
        ("failed", "paused"), ("pending",), "mail", "chat-*", False, None, 5400.0, "busy", "due",
        20, 40,
    )  # fmt: skip
    assert not found.is_all


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"state": "done"}, "--state 'done': there is no such state"),
        ({"state": ""}, "--state '': there is no such state"),
        ({"status": ["fired", "over"]}, "--status 'over': there is no such status"),
        ({"outcome": "ok"}, "--outcome 'ok': there is no such outcome"),
        ({"sort": "oldest"}, "--sort 'oldest': there is no such sort"),
        ({"since": "30"}, "--since '30' has no unit"),
        ({"since": "soon"}, "--since 'soon' is not a duration"),
        ({"queue": ""}, "--queue "),
        ({"limit": "0"}, "--limit '0' is no number of at least 1"),
        ({"offset": "-1"}, "--offset '-1' is no number of at least 0"),
        ({"offset": "9" * 5000}, "--offset '999"),
        ({"queue": ["a", "b"]}, "--queue is given twice"),
        ({"page": "2"}, "--page is no filter"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, str | list[str]], why: str) -> None:
    """The mistake names its filter, and what to give instead."""
    with pytest.raises(SelectionError) as error:
        Selection.parse(given)
    assert str(error.value).startswith(why) and error.value.instead.startswith("--")


def test_an_empty_session_is_the_session_of_that_name() -> None:
    """A variable that is empty in a script must not widen what is acted on."""
    assert not Selection.parse({"session": ""}).is_all
    assert Selection.parse({"session": ""}).values()["session"] == ""


def test_what_waits_is_shown_by_when_it_is_due() -> None:
    """Where all states are of those that become due, the first to be due is shown first."""
    for states, order in (
        ([], "newest"),
        (["overdue"], "due"),
        (["due", "waiting"], "due"),
        (["due", "failed"], "newest"),
    ):
        assert Selection.parse({"state": states}).order == order
    assert Selection.parse({"state": "due", "sort": "newest"}).order == "newest"


# --- what is found --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hall(server: str, template: str) -> Iterator[Desk]:
    """A recall in each situation, named by it."""
    with postgres.database(server, template) as dsn:
        desk = Desk(dsn)
        for n in range(20):
            desk.conn.execute("insert into sessions values (%s, 'ann')", (f"s-{n}",))
        now = datetime.now(UTC)
        desk.recall("soon", "s-0", due=600)
        desk.recall("due", "s-1", due=-30)
        desk.recall("overdue", "s-2", due=-300)
        desk.recall("run", "s-3", due=-300)
        desk.lease("run")
        desk.recall("run-outside", "s-3", due=-300, status="running")
        desk.recall("lost", "s-4", due=-900)
        desk.lease("lost", left=-120)
        desk.recall("busy", "s-5", due=60, deferrals=2, last_outcome="busy")
        desk.recall("paused", "s-6", due=-300, paused_at=now)
        desk.recall("paused-run", "s-7", due=-300, paused_at=now)
        desk.lease("paused-run")
        desk.recall("mail", "s-8", due=-300, queue="mail")
        desk.recall("failed", "s-9", status="failed", last_outcome="refused")
        desk.recall("fired", "s-10", status="fired", last_outcome="answered")
        desk.recall("cancelled", "s-11", status="cancelled")
        desk.change("lost", leased_at=datetime(2020, 1, 1, tzinfo=UTC))
        old = datetime(2020, 1, 1, tzinfo=UTC)
        for id in ("soon", "lost", "fired"):
            desk.change(id, updated_at=old)
        yield desk
        desk.conn.close()


FOUND = [
    ("--state due", "due lost mail overdue"),
    ("--state overdue", "lost mail overdue"),
    ("--state in-run", "paused-run run"),
    ("--state deferred", "busy"),
    ("--state paused", "paused paused-run"),
    ("--state waiting", "busy due mail overdue run-outside soon"),
    ("--state failed", "failed"),
    ("--state fired", "fired"),
    ("--state cancelled", "cancelled"),
    ("--state ended", "cancelled failed fired"),
    ("--state failed --state deferred", "busy failed"),
    ("--state due --queue mail", "mail"),
    ("--state due --queue default", "due lost overdue"),
    ("--status running", "run-outside"),
    ("--status running --state waiting", "run-outside"),
    ("--status fired --status failed", "failed fired"),
    ("--outcome busy", "busy"),
    ("--outcome answered --state ended", "fired"),
    ("--session s-1", "due"),
    ("--session s-1*", "cancelled due fired"),
    ("--session *-1", "due"),
    ("--session s-1 --state failed", ""),
    ("--session s%1", ""),
    ("--session s_1*", ""),
    ("--session nobody*", ""),
    ("--user ann --state overdue", "lost mail overdue"),
    ("--user zoe", ""),
    ("--state waiting --since 1h", "busy due mail overdue run-outside"),
    ("--state in-run --since 1h", "paused-run run"),
    ("--state ended --since 1h", "cancelled failed"),
]


@pytest.mark.parametrize(("words", "found"), FOUND)
def test_found(words: str, found: str, hall: Desk) -> None:
    """What a person means by each filter, and by two together."""
    if words.startswith("--state due") or "overdue" in words:
        hall.change("run-outside", paused_at=datetime.now(UTC))
    else:
        hall.change("run-outside", paused_at=None)
    said = operate(hall.dsn, "list", *words.split(), "--json")
    assert said.status == 0, said
    assert " ".join(sorted(row["id"] for row in said.document)) == found


def test_what_is_due_first_is_shown_first(hall: Desk) -> None:
    """By the moment at which it is due: of a lease that ended, that end."""
    words = ["list", "--state", "overdue", "--state", "due"]
    hall.change("run-outside", paused_at=datetime.now(UTC))
    ids = [row["id"] for row in operate(hall.dsn, *words, "--json").document]
    assert ids[-2:] == ["lost", "due"] and set(ids[:2]) == {"mail", "overdue"}
    newest = [row["id"] for row in operate(hall.dsn, *words, "--sort", "newest", "--json").document]
    assert newest[0] == "due" and newest[-1] == "lost"


def test_a_session_of_that_name_goes_before_the_pattern(desk: Desk) -> None:
    """A session's id may hold a `*` itself, and then means this session alone."""
    for n, name in enumerate(("a*", "ab", "a%", "a\\*")):
        desk.conn.execute("insert into sessions values (%s, 'ann')", (name,))
        desk.recall(str(n), name)

    def found(session: str) -> list[str]:
        rows = operate(desk.dsn, "list", "--session", session, "--json").document
        return sorted(row["id"] for row in rows)

    assert found("a*") == ["0"]
    assert found("a%") == ["2"] and found("a%*") == ["2"] and found("a\\*") == ["3"]
    assert found("*") == ["0", "1", "2", "3"]
    desk.conn.execute("delete from sessions where id = 'a*'")
    assert found("a*") == ["1", "2", "3"]


def test_how_many_there_are(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The total, what is shown of it, and how to go on; of very many only that there are more."""
    for n in range(5):
        desk.recall(f"r{n}", "s", status="fired")

    def said(*words: str) -> str:
        return operate(desk.dsn, "list", *words).err

    assert said() == "5 recalls.\n"
    assert said("--limit", "2") == "5 recalls, 2 shown; --offset 2 for more.\n"
    assert said("--limit", "2", "--offset", "4") == "5 recalls, 1 shown.\n"
    assert said("--offset", "9") == "5 recalls, none shown: --offset is 9.\n"
    assert said("--status", "failed") == "No recalls.\n"
    assert operate(desk.dsn, "list", "--json").err == ""
    assert "--offset 2" in operate(desk.dsn, "list", "--limit", "2", "--json").err
    monkeypatch.setattr(selection, "COUNT_MOST", 3)
    monkeypatch.setattr("recall_worker.cli.listing.COUNT_MOST", 3)
    assert said("--limit", "4") == "more than 3 recalls, 4 shown; --offset 4 for more.\n"


def test_a_query_that_takes_too_long(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up with a sentence that says so: PostgreSQL is there."""
    monkeypatch.setattr("recall_worker.database.setup.STATEMENT", 0.5)
    with desk.conn.transaction():
        desk.conn.execute("lock table session_recalls in access exclusive mode")
        said = operate(desk.dsn, "list", "--state", "due")
    assert "gave up what was asked: canceling statement due to" in trouble(said, 1)


# --- ids ------------------------------------------------------------------------------------------

ODD = "100%_\\*x"


@pytest.fixture
def alike(desk: Desk) -> Desk:
    """Recalls whose ids begin alike; some are no text to trust."""
    for id in ("abcdef-1", "abcdef-2", "abcdef-2-long", "zyxwvu", ODD + "-1", "100__\\*x-2"):
        desk.recall(id, "s", status="fired")
    return desk


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("zyxwvu", "zyxwvu"),
        ("abcdef-1", "abcdef-1"),
        ("abcdef-2", "abcdef-2"),
        ("abcdef-2-", "abcdef-2-long"),
        (ODD, ODD + "-1"),
        (ODD[:6], ODD + "-1"),
        ("100__\\", "100__\\*x-2"),
    ],
)
def test_an_id_by_its_beginning(given: str, meant: str, alike: Desk) -> None:
    """Exactly this id, else the one that begins so; what LIKE would read is taken literally."""
    assert operate(alike.dsn, "show", given, "--json").document["recall"]["id"] == meant


@pytest.mark.parametrize(
    "given", ["zyxwv", "abcde", "ABCDEF-1", "%%%%%%", "______", "******", "\x1b[31mx%", ""]
)
def test_no_id_begins_so(given: str, alike: Desk) -> None:
    """Fewer than six characters stand for nothing but themselves."""
    assert "there is no recall" in trouble(operate(alike.dsn, "show", given), 1)


EACH = [
    "show {}",
    "why {}",
    "preview {}",
    "cancel {}",
    "skip {}",
    "pause {}",
    "resume {}",
    "fire {}",
    "reschedule {} --in 1h",
    "edit {} --times 9",
]


@pytest.mark.parametrize("words", [*EACH, "retry {}"])
def test_every_command_takes_a_beginning(words: str, desk: Desk) -> None:
    """Whatever takes an id; where several begin so, it says which, and nothing is done."""
    desk.recall("0123456789-a", "s", call_type="recurring")
    desk.recall("0123456789-b", "t", call_type="recurring")
    if words.startswith("retry"):
        desk.change("0123456789-a", status="failed")
    before = desk.conn.execute("select * from session_recalls order by id").fetchall()
    said = operate(desk.dsn, *words.format("0123456").split())
    assert trouble(said, 1) == "0123456 is the beginning of 2 ids: 0123456789-a, 0123456789-b"
    assert desk.conn.execute("select * from session_recalls order by id").fetchall() == before
    desk.conn.execute("delete from session_recalls where id = '0123456789-b'")
    assert operate(desk.dsn, *words.format("0123456").split()).status == 0


def test_a_beginning_of_very_many(desk: Desk) -> None:
    """How many there are, and a few of them."""
    for n in range(12):
        desk.recall(f"same-beginning-{n:02}", "s", status="fired")
    said = trouble(operate(desk.dsn, "show", "same-b"), 1)
    assert said.startswith("same-b is the beginning of 12 ids: same-beginning-00, ")
    assert said.count("same-beginning") == 5


@pytest.fixture(scope="module")
def uuids(server: str) -> Iterator[Desk]:
    """A table whose ids are of type uuid."""
    with postgres.database(server) as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(create_tables("uuid", "text").encode())
        schema.migrate(dsn)
        desk = Desk(dsn)
        for n in range(300):
            desk.recall(str(UUID(int=n * 7919 << 100 | n)), "s", status="fired")
        yield desk
        desk.conn.close()


@pytest.mark.parametrize("length", [6, 8, 9, 10, 13, 14, 20, 35, 36])
def test_a_beginning_of_a_uuid(length: int, uuids: Desk) -> None:
    """In any case, with its hyphens or without."""
    id = str(UUID(int=250 * 7919 << 100 | 250))
    for given in (id[:length], id[:length].upper(), id.replace("-", "")[:length]):
        found = operate(uuids.dsn, "show", given, "--json")
        assert found.status == 0 and found.document["recall"]["id"] == id


@pytest.mark.parametrize(
    "given", ["00000-", "000000-", "xyzxyz", "00-000-00", "0" * 40, "%%%%%%", "0001e"]
)
def test_no_beginning_of_a_uuid(given: str, uuids: Desk) -> None:
    """What no uuid begins with, as PostgreSQL writes it, and what is too short."""
    trouble(operate(uuids.dsn, "show", given), 1)


def test_a_uuid_is_looked_up_by_its_index(uuids: Desk) -> None:
    """By the range of what begins so, however many there are."""
    sql = statements.load("find")["beginning"]
    values = {
        "low": "00abcdef-0000-0000-0000-000000000000",
        "high": "00abcdef-ffff-ffff-ffff-ffffffffffff",
        "pattern": "00abcdef%",
        "most": 5,
    }
    uuids.conn.execute("analyze session_recalls")
    with uuids.conn.transaction():
        uuids.conn.execute("set local enable_seqscan = off")
        plan = str(uuids.conn.execute(f"explain {sql}".encode(), values).fetchall())
    assert re.search(r"Index (Cond|Only)", plan) and "session_recalls_pkey" in plan, plan


def test_an_integer_stands_for_no_longer_one(server: str) -> None:
    """Recall 123456 is not recall 1234567."""
    with postgres.database(server) as dsn:
        with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as conn:
            conn.execute(create_tables("bigint", "text").encode())
        schema.migrate(dsn)
        desk = Desk(dsn)
        desk.recall("1234567", "s")
        assert "there is no recall 123456" in trouble(operate(dsn, "cancel", "123456"), 1)
        assert operate(dsn, "cancel", "1234567").status == 0
        assert "1234567" in operate(dsn, "list", columns=20).out
        desk.conn.close()


# --- what is shown of an id -----------------------------------------------------------------------

LONG = "0f3a2b1c-5b5e-4f5e-8f43-9c1e6a3f7d10"


@pytest.mark.parametrize("columns", [20, 40, 50, 60, 66, 80, 120])
def test_what_list_shows_of_an_id_can_be_copied(columns: int, desk: Desk) -> None:
    """At any width the id, or a beginning that no other has; never an ellipsis in it."""
    others = ["0f3a2b1c-5b5e-4f5e-8f43-000000000000", "0f3a2b1c-0", "short", "e" * 60]
    for id in (LONG, *others):
        desk.recall(id, "s", status="fired")
    lines = plain(operate(desk.dsn, "list", columns=columns).out).splitlines()[1:]
    shown = [line.split()[0] for line in lines]
    assert len(shown) == 5 and not any("…" in id for id in shown)
    for id in shown:
        meant: Said = operate(desk.dsn, "show", id, "--json")
        assert meant.document["recall"]["id"].startswith(id)
        assert len(id) >= 8 or id == "short"
    assert (LONG in shown) if columns >= 80 else columns > 50 or LONG not in shown

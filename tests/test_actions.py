"""Every action is on record: one row for each recall that was changed, in the transaction of what
it records, by the command line and by `Recalls`."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import socket
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool

from recall_worker import Recalls, schema
from recall_worker.settings import SettingsError

from .conftest import Connection
from .process.test_lease import rows
from .support.application import CREATE_TABLES
from .support.pgbouncer import PgBouncer
from .test_cli import operate, trouble
from .test_ledger import put
from .test_schema import up_to

HOUR = timedelta(hours=1)
SOON = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
HERE = f"{pwd.getpwuid(os.getuid()).pw_name}@{socket.gethostname()}"


async def actions(db: Connection) -> list[dict[str, Any]]:
    """What is on record, in the order of writing; it is taken off the record."""
    found = await rows(
        db, "select actor, via, action, recall_id, detail from recall_actions order by id"
    )
    await db.execute("delete from recall_actions")
    return found


@pytest.fixture
async def waiting(db: Connection) -> None:
    """In the session s, an hourly recall `r` that is due in an hour."""
    await db.execute("insert into sessions values ('s', 'ann'), ('t', 'ann')")
    await put(db, "s", 3600.0, id="r", call_type="recurring", interval_seconds=3600)


COMMANDS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("skip r", "skip", {"in_run": False, "trigger_at": ...}),
    ("skip --session s", "skip", {"in_run": False, "trigger_at": ...}),
    ("pause r", "pause", {"in_run": False, "paused_at": ...}),
    ("pause r", "", None),
    ("resume r", "resume", {"paused_at": ...}),
    ("resume r", "", None),
    ("reschedule r --in 2h", "reschedule", {"in_run": False, "trigger_at": ...}),
    ("edit r --times 9", "edit", {"times": {"from": None, "to": 9}}),
    ("edit r --times 9", "", None),
    ("fire r", "fire", {"occurrence": 1, "extra": 1}),
    ("fire r", "", None),
    ("cancel r", "cancel", {"occurrence": 1, "in_run": False, "status": ...}),
    ("cancel r", "", None),
    ("retry r", "retry", {"status": ..., "trigger_at": ...}),
    ("cancel --session s --yes", "cancel", {"occurrence": 1, "in_run": False, "status": ...}),
]
COLUMNS = ("status", "trigger_at", "paused_at")


async def standing(db: Connection, id: str = "r") -> dict[str, Any]:
    """What of a recall may be changed by an action, as JSON has it."""
    [row] = await rows(db, f"select to_jsonb(r) as row from session_recalls r where id = '{id}'")
    return {name: row["row"][name] for name in COLUMNS}


@pytest.mark.slow
async def test_what_commands_do(waiting: None, database: str, db: Connection) -> None:
    """Each command records what it did to whom, and nothing where it changed nothing."""
    for words, action, detail in COMMANDS:
        before = await standing(db)
        await asyncio.to_thread(operate, database, *words.split())
        after, found = await standing(db), await actions(db)
        assert [row["action"] for row in found] == ([action] if action else []), words
        if detail is not None:
            [row] = found
            assert (row["recall_id"], row["via"], row["actor"]) == ("r", "cli", HERE)
            # What differs stands there with both its values, and nothing else does.
            differs = {
                name: {"from": before[name], "to": after[name]}
                for name in COLUMNS
                if before[name] != after[name]
            }
            assert differs.keys() >= {name for name, fact in detail.items() if fact is ...}, words
            facts = {name: fact for name, fact in detail.items() if fact is not ...}
            recorded = row["detail"]
            assert recorded.items() >= {**facts, **differs}.items(), words
            assert {n for n in COLUMNS if n in recorded} == set(differs), words
    made = await asyncio.to_thread(operate, database, "schedule", "t", "SECRET", "--every", "1h")
    [row] = await actions(db)
    assert (row["action"], row["recall_id"]) == ("schedule", made.out.strip())
    assert row["detail"]["session_id"] == "t" and "SECRET" not in json.dumps(row["detail"])
    assert row["detail"]["interval_seconds"] == {"from": None, "to": 3600}
    assert row["detail"]["status"] == {"from": None, "to": "pending"}
    assert "times" not in row["detail"]


@pytest.mark.slow
async def test_queues_are_on_record(database: str, db: Connection) -> None:
    """That a queue was paused and resumed, by whom and why, before and after."""
    await asyncio.to_thread(operate, database, "queues", "pause", "mail", "--reason", "repair")
    await asyncio.to_thread(operate, database, "queues", "pause", "mail")
    await asyncio.to_thread(operate, database, "queues", "resume", "mail")
    paused, resumed = await actions(db)
    assert (paused["action"], paused["via"], paused["actor"]) == ("pause_queue", "cli", HERE)
    since = paused["detail"]["paused_at"]
    assert (paused["recall_id"], since["from"]) == (None, None)
    assert paused["detail"].items() >= {"queue": "mail", "reason": "repair"}.items()
    assert resumed["action"] == "resume_queue"
    assert resumed["detail"] == {
        "queue": "mail",
        "paused_at": {"from": since["to"], "to": None},
    }


async def test_one_row_for_each_that_was_changed(
    waiting: None, database: str, db: Connection
) -> None:
    """Of several recalls each that was changed has its own row; the others have none."""
    await put(db, "t", 60.0, id="q")
    await put(db, "u", -60.0, id="over", status="fired")
    await asyncio.to_thread(operate, database, "pause", "r", "nope", "q", "over")
    assert {row["recall_id"] for row in await actions(db)} == {"r", "q"}


ASKED: list[tuple[str, Callable[[Recalls, Any], Awaitable[Any]], dict[str, Any]]] = [
    ("skip", lambda r, conn: r.skip_next("s", conn=conn), {"in_run": False}),
    ("reschedule", lambda r, conn: r.reschedule("r", SOON, conn=conn), {"in_run": False}),
    ("edit", lambda r, conn: r.update("r", times=9, conn=conn), {"times": {"from": None, "to": 9}}),
    ("pause", lambda r, conn: r.pause("r", conn=conn), {"in_run": False}),
    ("fire", lambda r, conn: r.fire("r", conn=conn), {"occurrence": 1}),
    ("mark_fired", lambda r, conn: r.mark_fired("r", conn=conn), {"in_run": False}),
    ("cancel", lambda r, conn: r.mark_cancelled("r", conn=conn), {"occurrence": 1}),
    ("cancel", lambda r, conn: r.cancel("s", conn=conn), {"occurrence": 1, "in_run": False}),
    ("schedule", lambda r, conn: r.schedule("t", "m", id="r2", conn=conn), {"session_id": "t"}),
]


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pooled"])
@pytest.mark.parametrize(
    ("action", "act", "detail"), ASKED, ids=[f"{n}-{case[0]}" for n, case in enumerate(ASKED)]
)
async def test_what_recalls_does(
    action: str,
    act: Callable[[Recalls, Any], Awaitable[Any]],
    detail: dict[str, Any],
    pooled: bool,
    waiting: None,
    database: str,
    db: Connection,
    request: pytest.FixtureRequest,
) -> None:
    """Each method that changes a recall records it in the caller's transaction, and so not where
    that is rolled back; also through a transaction pooler."""
    dsn = database
    if pooled:
        bouncer: PgBouncer = request.getfixturevalue("bouncer")
        dsn = bouncer.way_to(database)
    recalls = Recalls(actor="ann")
    async with AsyncConnectionPool(dsn, open=False, min_size=1, max_size=1) as pool:
        async with pool.connection() as conn:
            assert await act(recalls, conn)
            await conn.rollback()
        assert await actions(db) == []
        assert await act(Recalls(pool, actor="ann"), None)
        [row] = await actions(db)
        assert (row["actor"], row["via"], row["action"]) == ("ann", "python", action)
        assert row["recall_id"] == ("r2" if action == "schedule" else "r")
        assert row["detail"].items() >= detail.items()
        if action in ("mark_fired", "cancel"):
            assert not await act(Recalls(pool), None)
            assert await actions(db) == []


async def test_resume_and_retry_are_on_record(waiting: None, db: Connection) -> None:
    """Of a recall that is paused, or over; what changes nothing is not on record."""
    recalls = Recalls(actor="ann")
    for act in (recalls.resume, recalls.retry, recalls.pause, recalls.pause, recalls.resume):
        await act("r", conn=db)
    assert await recalls.mark_cancelled("r", conn=db)
    assert await recalls.retry("r", conn=db) is not None
    recorded = [(row["actor"], row["action"]) for row in await actions(db)]
    assert recorded == [("ann", name) for name in ("pause", "resume", "cancel", "retry")]


async def test_what_was_refused_is_not_on_record(
    waiting: None, db: Connection, database: str
) -> None:
    """A second recall of a session, and an edit that makes no sense."""
    recalls = Recalls()
    with pytest.raises(Exception, match="pending recall already"):
        await recalls.schedule("s", "m", conn=db)
    with pytest.raises(ValueError, match="is past"):
        await recalls.update("r", until=datetime(2020, 1, 1, tzinfo=UTC), conn=db)
    assert await recalls.update("nope", times=1, conn=db) is None
    assert await recalls.update("r", every=HOUR, conn=db) is not None, "nothing differs"
    assert await actions(db) == []


async def test_an_edit_tells_old_and_new_but_no_text(
    waiting: None, db: Connection, database: str
) -> None:
    """Of a rule the old and the new value; of message and comment that they changed. They are
    another's words, and go with the recall."""
    await db.execute("update session_recalls set internal_comment = 'OLD NOTE' where id = 'r'")
    said = await asyncio.to_thread(
        operate,
        database,
        *("edit", "r", "--cron", "0 9 * * *", "--tz", "Europe/Berlin", "--times", "9"),
        *("--message", "NEW TEXT", "--comment", "NEW NOTE"),
    )
    assert said.status == 0, said
    [row] = await actions(db)
    assert {
        "cadence": {"from": "interval", "to": "cron"},
        "cron": {"from": None, "to": "0 9 * * *"},
        "time_zone": {"from": None, "to": "Europe/Berlin"},
        "times": {"from": None, "to": 9},
        "additional_context_message": "changed",
        "internal_comment": "changed",
    }.items() <= row["detail"].items()
    assert set(row["detail"]) <= {
        *("cadence", "cron", "time_zone", "times", "trigger_at"),
        *("additional_context_message", "internal_comment"),
    }
    assert "TEXT" not in json.dumps(row["detail"]) and "NOTE" not in json.dumps(row["detail"])


# --- who ------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_who_acts_on_the_command_line(
    waiting: None, database: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RECALL_ACTOR, else login name and host; where the host has no name for the account, the
    database's role."""
    operate(database, "pause", "r", environ={"RECALL_ACTOR": "ann on call"})
    operate(database, "resume", "r")

    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr("recall_worker.cli.recalls.pwd.getpwuid", unknown)
    operate(database, "pause", "r")
    assert [row["actor"] for row in await actions(db)] == ["ann on call", HERE, "postgres"]


async def test_who_acts_in_python(
    waiting: None, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`actor=`, else RECALL_ACTOR, else the role of the database session."""
    await Recalls().skip_next("s", conn=db)
    monkeypatch.setenv("RECALL_ACTOR", "the app")
    await Recalls().skip_next("s", conn=db)
    await Recalls(actor="ann").skip_next("s", conn=db)
    assert [row["actor"] for row in await actions(db)] == ["postgres", "the app", "ann"]


def test_an_actor_of_control_characters(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RECALL_ACTOR is one line of text, as every setting is; the error is harmless on a
    terminal."""
    said = operate(database, "pause", "r", environ={"RECALL_ACTOR": "ann\x1b]0;gone\x07"})
    assert "RECALL_ACTOR holds a control character" in trouble(said, 2)
    assert "\x1b" not in said.err
    monkeypatch.setenv("RECALL_ACTOR", "a\nb")
    with pytest.raises(SettingsError):
        Recalls()


async def test_who_acts_is_any_text(waiting: None, db: Connection) -> None:
    """What an application gives is recorded as it stands, and its NUL is PostgreSQL's to refuse;
    nothing is done then."""
    await Recalls(actor="\x1b[31mann\u202e").skip_next("s", conn=db)
    before = await rows(db, "select * from session_recalls")
    with pytest.raises(psycopg.DataError):
        await Recalls(actor="a\0b").skip_next("s", conn=db)
    assert await rows(db, "select * from session_recalls") == before
    assert [row["actor"] for row in await actions(db)] == ["\x1b[31mann\u202e"]


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_database_from_before(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table is not there yet, a command says to migrate, and does nothing."""
    with psycopg.connect(empty_database, autocommit=True) as conn:
        conn.execute(CREATE_TABLES.encode())
        up_to(monkeypatch, empty_database, 18)
        conn.execute("insert into sessions values ('s', 'ann')")
        said = operate(empty_database, "schedule", "s", "m")
        assert "no (or an old) recall-worker schema" in trouble(said, 1)
        assert said.err.endswith("\nTry: recall-worker migrate\n")
        assert conn.execute("select count(*) from session_recalls").fetchone() == (0,)


async def test_a_long_id(db: Connection) -> None:
    """An id that the table of recalls can hold can be acted on, however long it is."""
    await db.execute("insert into sessions values ('s', 'ann')")
    id = "".join(chr(0x4E00 + n * 7919 % 20_000) for n in range(896))
    await put(db, "s", 60.0, id=id)
    assert await Recalls().mark_cancelled(id, conn=db)
    [row] = await actions(db)
    assert row["recall_id"] == id


ACCOUNTS = ("writes", "inserts", "one column", "reads", "prunes", "nothing")


@pytest.mark.slow
def test_accounts_of_ones_own(
    empty_database: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accounts with grants of their own, from before the table was there: who may write recalls may
    record and read, who may prune calls may prune, and nobody more."""
    roles = {what: f"recall_test_actions {what} {os.getpid()}" for what in ACCOUNTS}
    with psycopg.connect(empty_database, autocommit=True) as conn:
        conn.execute(CREATE_TABLES.encode())
        up_to(monkeypatch, empty_database, 18)
        for role in roles.values():
            conn.execute(f'create role "{role}" login'.encode())
        try:
            for grant, what in (
                ("select, update on session_recalls", "writes"),
                ("insert on session_recalls", "inserts"),
                ("update (trigger_at) on session_recalls", "one column"),
                ("select on session_recalls, recall_attempts", "reads"),
                ("select, delete on recall_attempts", "prunes"),
            ):
                conn.execute(f'grant {grant} to "{roles[what]}"'.encode())
            schema.migrate(empty_database)
            may = {what: rights(empty_database, role) for what, role in roles.items()}
        finally:
            for role in roles.values():
                conn.execute(f'drop owned by "{role}"'.encode())
                conn.execute(f'drop role "{role}"'.encode())
    assert may == {
        "writes": "select insert",
        "inserts": "select insert",
        "one column": "select insert",
        "reads": "select",
        "prunes": "select delete",
        "nothing": "",
    }


def rights(dsn: str, role: str) -> str:
    """What the role is let do to recall_actions, by trying it."""
    tries = {
        "select": "select from recall_actions",
        "insert": "insert into recall_actions (actor, via, action, recall_id) "
        "values ('', '', '', '')",
        "update": "update recall_actions set actor = ''",
        "delete": "delete from recall_actions",
    }
    with psycopg.connect(make_conninfo(dsn, user=role)) as conn:
        may = []
        for what, statement in tries.items():
            try:
                conn.execute(statement.encode())
                may.append(what)
            except errors.InsufficientPrivilege:
                pass
            conn.rollback()
    return " ".join(may)

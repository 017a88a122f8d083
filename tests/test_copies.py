"""Which database this is: what `migrate` records, what makes a copy, and what the commands say of
one. The daemon on a copy is in tests/process/test_copies.py."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from recall_worker import schema
from recall_worker.database.connection import ClaimsHeld
from recall_worker.database.identity import COPY, IS_A_COPY, PAUSED, ask_once
from recall_worker.database.ledger import Ledger
from recall_worker.schema import SchemaError

from .conftest import connected
from .support import postgres
from .support.application import CREATE_TABLES
from .test_cli import operate
from .test_ledger import put

FOREIGN = "insert into recall_identity values (1, 1)"
OWN = "select count(*) from recall_identity where (system_identifier, database_oid) = (%s, %s)"
FACTS = {
    "host": "h",
    "pid": 1,
    "version": "1",
    "slots": 3,
    "running": 0,
    "breaker": "closed",
    "bell": "listening",
}


def execute(dsn: str, *statements: str) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    with psycopg.connect(dsn, autocommit=True) as conn:
        for statement in statements:
            cursor = conn.execute(statement.encode())
            rows = cursor.fetchall() if cursor.description else []
    return rows


@pytest.fixture
def copy(server: str, template: str) -> Iterator[str]:
    """A copy of an adopted database."""
    with postgres.database(server, template, recorded=False) as dsn:
        yield dsn


# --- migrate --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_migrate_records_it_once(empty_database: str) -> None:
    """The first `migrate` records the database, and says nothing of it; the second adds nothing."""
    execute(empty_database, CREATE_TABLES)
    for _ in range(2):
        schema.migrate(empty_database)
        with psycopg.connect(empty_database, autocommit=True) as conn:
            found = ask_once(conn)
            [(rows,)] = conn.execute("select count(*) from recall_identity").fetchall()
        assert found.recorded and not found.copy and rows == 1


def test_an_upgrade_records_it(database: str) -> None:
    """A database of an earlier version has no record: it is no copy, and the next `migrate` of this
    version records it."""
    execute(database, "truncate recall_identity")
    assert not schema.is_copy(database)
    assert schema.migrate(database) == []
    assert execute(database, "select count(*) from recall_identity") == [(1,)]


@pytest.mark.slow
def test_a_copy_is_migrated_and_not_adopted(copy: str) -> None:
    """`migrate` brings its schema up to date, says what it is, and leaves the record; `--check`
    says it too; `--here` records it in place of what was recorded."""
    before = execute(copy, "select * from recall_identity")
    execute(copy, "delete from recall_schema")
    for options in ((), ("--check",)):
        said = operate(copy, "migrate", *options)
        assert said.status == 0 and IS_A_COPY in said.err and "migrate --here" in said.err
        assert execute(copy, "select * from recall_identity") == before
    said = operate(copy, "migrate", "--here", "--json")
    assert said.status == 0 and IS_A_COPY not in said.err
    assert said.document == {"done": ["recorded this database as the one whose recalls are called"]}
    assert not schema.is_copy(copy)
    assert len(execute(copy, "select * from recall_identity")) == 1
    assert operate(copy, "migrate", "--here", "--json").document == {"done": []}


def test_check_and_here_contradict_each_other(database: str) -> None:
    said = operate(database, "migrate", "--here", "--check")
    assert said.status == 2 and "Traceback" not in said.err


@pytest.mark.parametrize(
    ("rows", "copy"),
    [
        ([], False),
        (["own"], False),
        (["own", "own"], False),
        (["foreign"], True),
        (["own", "foreign"], True),
        (["same cluster"], True),
        (["same oid"], True),
        (["own", "same oid"], True),
    ],
    ids=str,
)
def test_what_makes_a_copy(rows: list[str], copy: bool, database: str) -> None:
    """Any record of another database does: of another cluster, or of another oid."""
    [(system, oid)] = execute(
        database, "select system_identifier, database_oid from recall_identity"
    )
    kinds = {
        "own": (system, oid),
        "foreign": (1, 1),
        "same cluster": (system, oid + 1),
        "same oid": (system + 1, oid),
    }
    execute(
        database,
        "truncate recall_identity",
        *(f"insert into recall_identity values ({kinds[row][0]}, {kinds[row][1]})" for row in rows),
    )
    assert schema.is_copy(database) == copy
    schema.migrate(database, here=True)
    assert not schema.is_copy(database)
    assert set(
        execute(database, "select system_identifier, database_oid from recall_identity")
    ) == {(system, oid)}


@pytest.fixture
def denied(database: str) -> Iterator[str]:
    """The DSN of an owner who may not run pg_control_system()."""
    role = str(conninfo_to_dict(database)["dbname"]) + "_owner"
    name = sql.Identifier(role)
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(sql.SQL("create role {} login").format(name))
        conn.execute(sql.SQL("grant create, usage on schema public to {}").format(name))
        conn.execute("revoke execute on function pg_control_system() from public")
        for table in ("sessions", "session_recalls", "recall_identity", "recall_schema"):
            conn.execute(sql.SQL("alter table {} owner to {}").format(sql.Identifier(table), name))
        try:
            yield make_conninfo(database, user=role)
        finally:
            conn.execute(sql.SQL("reassign owned by {} to current_user").format(name))
            conn.execute(sql.SQL("drop owned by {}").format(name))
            conn.execute(sql.SQL("drop role {}").format(name))


@pytest.mark.skipif("RECALL_TEST_DSN" in os.environ, reason="a login by trust")
def test_without_the_right_to_ask(denied: str, database: str) -> None:
    """Then nothing is recorded, nothing but another oid makes a copy, and --here says what is
    missing."""
    assert not schema.is_copy(denied)
    execute(database, "truncate recall_identity")
    with psycopg.connect(denied, autocommit=True) as conn:
        found = ask_once(conn)
        assert found.system_identifier is None and found.database_oid and not found.recorded
    with pytest.raises(SchemaError) as refused:
        schema.migrate(denied, here=True)
    assert "pg_control_system()" in refused.value.hint
    schema.migrate(denied)
    assert execute(database, "select * from recall_identity") == []
    execute(database, "insert into recall_identity values (1, 1)")
    assert schema.is_copy(denied), "another oid is another database in any case"


# --- the worker's ledger --------------------------------------------------------------------------


async def test_nothing_is_claimed_on_a_copy(copy: str) -> None:
    """Not by any way to a lease, and before anything was asked on the fresh connection; leases of
    others, however old, are left; the heartbeat says it; `migrate --here` ends it at once."""
    ledger = Ledger(copy, "w", 60.0)
    try:
        async with connected(copy) as db:
            await put(db, "s", id="due")
            await put(db, "t", id="ended")
            await put(db, "u", id="paused")
            await db.execute(
                "update session_recalls set lease = gen_random_uuid(), leased_by = 'x',"
                " leased_at = '2020-01-01', lease_until = '2020-01-02',"
                " paused_at = case id when 'paused' then now() end where id <> 'due'"
            )
            before = await (await db.execute("select * from session_recalls")).fetchall()
            with pytest.raises(ClaimsHeld):
                await ledger.claim(3)
            for act in (
                ledger.ended_leases(),
                ledger.take_up(["ended"]),
                ledger.next_due(claimed_at=None),
                ledger.moved(),
                ledger.stale([]),
                ledger.take_turn(60.0),
            ):
                with pytest.raises(ClaimsHeld):
                    await act
            assert ledger.held == COPY
            await ledger.heartbeat(FACTS, {})
            [row] = await (await db.execute("select * from recall_workers")).fetchall()
            assert row["held"] == COPY and row["database_oid"] is not None
            assert await (await db.execute("select * from session_recalls")).fetchall() == before
            schema.migrate(copy, here=True)
            assert [claim.id for claim in (await ledger.claim(3)).claims] == ["due"]
            assert ledger.held is None
            await ledger.deregister()
    finally:
        await ledger.close()


async def test_a_record_that_comes_with_a_restore_is_noticed(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a worker that is connected: not at once, but before long."""
    monkeypatch.setattr("recall_worker.database.connection.IDENTITY_FOR", 0.0)
    ledger = Ledger(database, "w", 60.0)
    try:
        async with connected(database) as db:
            await put(db, "s", id="one")
            assert [claim.id for claim in (await ledger.claim(3)).claims] == ["one"]
            await db.execute(FOREIGN.encode())
            await put(db, "t", id="two")
            with pytest.raises(ClaimsHeld):
                await ledger.claim(3)
    finally:
        await ledger.close()


async def test_a_copy_may_be_allowed(copy: str) -> None:
    """RECALL_ALLOW_COPY=1."""
    ledger = Ledger(copy, "w", 60.0, allow_copy=True)
    try:
        async with connected(copy) as db:
            await put(db, "s", id="due")
            assert [claim.id for claim in (await ledger.claim(3)).claims] == ["due"]
            assert ledger.held is None
    finally:
        await ledger.close()


async def test_a_paused_worker_leaves_the_leases_of_others(database: str) -> None:
    """`run --paused`: its heartbeat ends none, and says why it claims nothing."""
    ledger = Ledger(database, "w", 60.0, paused=True)
    try:
        async with connected(database) as db:
            await put(db, "u", id="endless")
            await db.execute(
                "update session_recalls set lease = gen_random_uuid(), lease_until = 'infinity'"
            )
            await ledger.heartbeat(FACTS, {})
            [row] = await (
                await db.execute(
                    "select held, lease_until = 'infinity' as endless "
                    "from session_recalls, recall_workers"
                )
            ).fetchall()
            assert row == {"held": PAUSED, "endless": True}
    finally:
        await ledger.close()


# --- what is said ---------------------------------------------------------------------------------

WORKERS = """
insert into recall_workers
    (worker, host, pid, version, slots, settings, held, system_identifier, database_oid)
select w, 'h', 1, '1', 3, '{"fleet_concurrency": 1}', h, system_identifier + s, database_oid + o
from recall_identity cross join (values
    ('of this one', null, 0, 0), ('paused', 'paused', 0, 0), ('of another', null, 1, 0),
    ('of its neighbour', null, 0, 1), ('old', null, null, null)
) as given (w, h, s, o)
"""


@pytest.mark.slow
def test_workers_of_before_a_restore_are_not_alive(database: str) -> None:
    """However fresh their heartbeats: their rows were written in another database. A worker of an
    earlier version does not say where."""
    execute(database, WORKERS)
    rows = operate(database, "workers", "--json").document
    assert {row["worker"] for row in rows if row["alive"]} == {"of this one", "old", "paused"}
    table = operate(database, "workers").out.splitlines()
    states = {line.split("  ")[0]: line for line in table[1:]}
    assert "elsewhere" in states["of another"] and "elsewhere" in states["of its neighbour"]
    assert "paused" in states["paused"].removeprefix("paused") and "alive" in states["old"]
    stats = operate(database, "stats", "--json").document
    assert stats["copy"] is False
    assert (stats["workers"]["alive"], stats["workers"]["held"]) == (3, 1)
    said = operate(database, "stats").out
    assert "3 alive, 1 of them claim nothing" in said
    checks = operate(
        database, "doctor", "--json", environ={"RECALL_RUN_URL": "http://127.0.0.1:1/{session_id}"}
    ).document["checks"]
    seen = [row["seen"] for row in checks if row["check"] == "workers"]
    assert any("of another runs on another database" in line for line in seen), seen
    assert any("paused claims nothing" in line for line in seen), seen


async def test_the_fleet_does_without_them(database: str) -> None:
    """Neither do they come before a worker that polls, nor does their cap count."""
    ledger = Ledger(database, "z", 60.0)
    try:
        async with connected(database) as db:
            await db.execute(WORKERS.encode())
            # Which database it is, it learns on the connection by which it writes its row.
            assert await ledger.heartbeat(FACTS, {}) == 2
            await db.execute(b"delete from recall_workers where held is null and worker <> 'old'")
    finally:
        await ledger.close()


@pytest.mark.slow
def test_the_commands_say_it(copy: str) -> None:
    """Each with a note on stderr; what is written is written; data on stdout stays data."""
    execute(copy, "insert into sessions values ('s', 'ann')")
    said = operate(copy, "schedule", "s", "m", "--in", "1h")
    id = said.out.strip()
    assert said.status == 0 and f"Note: {IS_A_COPY}" in said.err and "--here" in said.err
    for words in (["list", "--json"], ["show", id, "--json"], ["fire", id], ["workers"]):
        said = operate(copy, *words)
        assert said.status == 0 and IS_A_COPY in said.err, words
    assert json.loads(operate(copy, "list", "--json").out)[0]["id"] == id
    why = operate(copy, "why", id, "--json").document
    assert IS_A_COPY in why["why"] and why["evidence"]["copy"] is True
    stats = operate(copy, "stats", "--json").document
    assert stats["copy"] is True


@pytest.mark.slow
def test_doctor_says_it(copy: str, database: str) -> None:
    """A problem on a copy, a note where that is allowed, or not known; nothing is wrong with the
    database itself."""
    url = {"RECALL_RUN_URL": "http://127.0.0.1:1/{session_id}"}

    def examined(dsn: str, **environ: str) -> tuple[str, str]:
        checks = operate(dsn, "doctor", "--json", environ=url | environ).document["checks"]
        [row] = [row for row in checks if row["check"] == "identity"]
        return row["state"], row["seen"]

    assert examined(copy) == ("problem", IS_A_COPY)
    state, seen = examined(copy, RECALL_ALLOW_COPY="1")
    assert state == "note" and "RECALL_ALLOW_COPY" in seen
    assert examined(database)[0] == "ok"
    execute(database, "truncate recall_identity")
    assert examined(database)[0] == "note"


@pytest.mark.slow
def test_the_data_of_embedded_is_upgraded(database: str, tmp_path: Path) -> None:
    """The database in the directory of `run --embedded`, after pg_upgrade: what is recorded is what
    it was. Where another one was restored into it, it is a copy."""
    [(system, oid)] = execute(
        database, "select system_identifier, database_oid from recall_identity"
    )
    execute(database, "update recall_identity set system_identifier = 7")
    schema.migrate(database, was=f"8 {oid}")
    assert schema.is_copy(database)
    assert schema.migrate(database, was=f"7 {oid}") != []
    assert not schema.is_copy(database)
    assert schema.identity_text(database) == f"{system} {oid}"

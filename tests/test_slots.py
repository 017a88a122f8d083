"""More than one pending recall a session (`migrate --slots N`): the switch, up, down and
interrupted; who gets which slot; and that nothing of it is there where it was not asked for.

That a session's runs never overlap then, and nothing is lost, is for tests/test_slots_lives.py.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import errors

from recall_worker import RecallExists, schema
from recall_worker.database.ledger import Ledger
from recall_worker.doctor.examination import PROBLEM
from recall_worker.recall import After, Busy, Defer, Settled
from recall_worker.schema import Refused, catalog
from recall_worker.schema import slots as slots_room

from . import schema as expected
from .conftest import connected
from .support import postgres
from .support.application import AlreadyScheduled, Application, create_tables
from .test_adoption import accounts, examined
from .test_ledger import settle
from .test_schema import MANY_ROWS, Migrate, Writers, command, execute, until

FAR = datetime.now(UTC) + timedelta(days=300)
INSERT = (
    "insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds, "
    "internal_comment, additional_context_message, status, created_at, updated_at) "
    "values (%s, %s, %s, now() + interval '1 year', 3600, null, 'm', 'pending', now(), now())"
)
PENDING = "select id, slot from session_recalls where status = 'pending' order by slot"
INDEX = (
    "select pg_get_indexdef(indexrelid) from pg_index "
    "where indexrelid = to_regclass('idx_recalls_active_pending')"
)


@pytest.fixture
def three(database: str) -> str:
    """A database in which a session may have three pending recalls, with the sessions s and t."""
    schema.migrate(database, pending_most=3)
    execute(database, "insert into sessions values ('s', 'ann'), ('t', 'ann')")
    return database


@pytest.fixture
def conn(three: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(three, autocommit=True) as connection:
        yield connection


def insert(conn: psycopg.Connection[Any], id: str, session: str = "s", type_: str = "once") -> None:
    conn.execute(INSERT, (id, session, type_))


def slots(conn: psycopg.Connection[Any], session: str = "s") -> dict[str, int]:
    """The slots of a session's pending recalls, by their ids."""
    found = conn.execute(
        "select id, slot from session_recalls where session_id = %s and status = 'pending'",
        (session,),
    )
    return {str(id): slot for id, slot in found}


# --- the switch -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_switched_on_and_off_and_leaves_nothing_behind(empty_database: str) -> None:
    """The catalog is the same before and after, and says what it does in between."""
    execute(empty_database, create_tables())
    schema.migrate(empty_database)
    before = expected.dump(empty_database)
    assert schema.pending(empty_database, pending_most=1) == []
    assert schema.pending(empty_database, pending_most=4) == [
        "up to 4 pending recalls a session, where it is 1"
    ]
    assert schema.migrate(empty_database, pending_most=4) == ["up to 4 pending recalls a session"]
    assert execute(empty_database, INDEX) == [
        (
            "CREATE UNIQUE INDEX idx_recalls_active_pending ON public.session_recalls "
            "USING btree (session_id, slot) WHERE (status = 'pending'::text)",
        )
    ]
    assert schema.pending(empty_database) == []
    assert schema.pending(empty_database, pending_most=4) == []
    assert "a session may have up to 4 pending recalls" in str(examined(empty_database))
    assert schema.migrate(empty_database) == []
    assert schema.migrate(empty_database, pending_most=4) == []
    # What the application runs at each start finds its index by the name.
    execute(empty_database, create_tables())
    assert schema.pending(empty_database) == []
    assert schema.migrate(empty_database, pending_most=1) == ["one pending recall a session"]
    assert expected.dump(empty_database) == before
    assert schema.pending(empty_database) == []


@pytest.mark.slow
def test_the_command_says_what_changes(database: str) -> None:
    done = command(database, "--check", "--slots", "2", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {
        "up_to_date": False,
        "pending": ["up to 2 pending recalls a session, where it is 1"],
    }
    done = command(database, "--slots", "2")
    assert done.returncode == 0, done.stderr
    assert "an upsert by session (on conflict (session_id)" in done.stderr
    assert "A session has up to 2 pending recalls" in done.stderr
    done = command(database, "--check")
    assert (done.returncode, done.stderr) == (0, "The schema is up to date.\n")
    done = command(database, "--slots", "101")
    assert done.returncode == 2
    assert "--slots is 101, and must be 1 to 100" in done.stderr


def test_fewer_than_a_session_has_is_refused_before_the_first_change(
    conn: psycopg.Connection[Any], three: str
) -> None:
    for id in "abc":
        insert(conn, id)
    insert(conn, "d", "t")
    before = expected.dump(three)
    for most in (2, 1):
        for refused in (schema.migrate, schema.pending):
            with pytest.raises(Refused, match=f"1 session has more pending recalls than {most}"):
                refused(three, pending_most=most)
    assert expected.dump(three) == before
    conn.execute("update session_recalls set status = 'cancelled' where id = 'a'")
    # What is left has slots of the smaller number.
    assert schema.migrate(three, pending_most=2) == ["up to 2 pending recalls a session"]
    assert sorted(slots(conn).values()) == [1, 2]
    conn.execute("update session_recalls set status = 'cancelled' where id = 'b'")
    assert schema.migrate(three, pending_most=1) == ["one pending recall a session"]
    assert slots(conn) == {"c": 1}
    with pytest.raises(errors.UniqueViolation, match="idx_recalls_active_pending"):
        insert(conn, "e")


def test_a_table_that_never_had_the_index(empty_database: str) -> None:
    """Its sessions have as many pending recalls as they like, until it is told how many."""
    execute(empty_database, create_tables(), "drop index idx_recalls_active_pending")
    schema.migrate(empty_database)
    with psycopg.connect(empty_database, autocommit=True) as conn:
        conn.execute("insert into sessions values ('s', 'ann'), ('t', 'ann')")
        for id in "abcd":
            insert(conn, id)
        insert(conn, "e", "t")
        with pytest.raises(Refused, match="1 session has more pending recalls than 3"):
            schema.migrate(empty_database, pending_most=3)
        schema.migrate(empty_database, pending_most=4)
        assert slots(conn) == {"a": 1, "b": 2, "c": 3, "d": 4}
        with pytest.raises(errors.UniqueViolation):
            insert(conn, "f")
        assert schema.pending(empty_database) == []


@pytest.mark.parametrize("session_type", ["uuid", "bigint", "varchar(40)"])
def test_keys_of_other_types(session_type: str, empty_database: str) -> None:
    one = {"uuid": "'11111111-1111-1111-1111-111111111111'", "bigint": "7"}.get(session_type, "'s'")
    execute(empty_database, create_tables("uuid", session_type))
    schema.migrate(empty_database, pending_most=2)
    execute(empty_database, f"insert into sessions values ({one}, 'ann')")
    new = (
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, created_at, updated_at) "
        f"values (gen_random_uuid(), {one}, 'once', now() + interval '1 day', 'm', now(), now())"
    )
    execute(empty_database, new, new)
    with pytest.raises(errors.UniqueViolation):
        execute(empty_database, new)
    assert [slot for _, slot in execute(empty_database, PENDING)] == [1, 2]
    assert schema.pending(empty_database) == []


def test_a_schema_of_another_name_and_one_that_is_renamed(empty_database: str) -> None:
    execute(empty_database, 'create schema "Old one"', 'set search_path = "Old one"')
    with psycopg.connect(
        empty_database, autocommit=True, options='-c search_path="Old\\ one"'
    ) as conn:
        conn.execute(create_tables().encode())
    schema.migrate(empty_database, schema="Old one", pending_most=2)
    execute(empty_database, 'alter schema "Old one" rename to new')
    assert schema.migrate(empty_database, schema="new") != []
    assert schema.pending(empty_database, schema="new", pending_most=2) == []
    with psycopg.connect(empty_database, autocommit=True, options="-c search_path=new") as conn:
        conn.execute("insert into sessions values ('s', 'ann')")
        insert(conn, "a")
        insert(conn, "b")
        assert slots(conn) == {"a": 1, "b": 2}


DAMAGES = {
    "a trigger is dropped": ["drop trigger recall_admit_slot on session_recalls"],
    "the other trigger": ["drop trigger recall_admit_slot_again on session_recalls"],
    "a trigger is disabled": ["alter table session_recalls disable trigger recall_admit_slot"],
    "a trigger has another number": [
        "create or replace trigger recall_admit_slot before insert on session_recalls "
        "for each row when (new.status = 'pending') execute function recall_admit_slot('7')"
    ],
    "the index is dropped": ["drop index idx_recalls_active_pending"],
    "the application's index is back": [
        "drop index idx_recalls_active_pending",
        "create unique index idx_recalls_active_pending on session_recalls (session_id) "
        "where status = 'pending'",
    ],
    "the application's index stands beside it": [
        "create unique index mine on session_recalls (session_id) where status = 'pending'"
    ],
    "the column is dropped": ["alter table session_recalls drop column slot"],
    "the function is dropped": ["drop function recall_admit_slot() cascade"],
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_damaged_is_named_and_put_back(damage: str, three: str) -> None:
    before = expected.dump(three)
    execute(three, *DAMAGES[damage])
    assert [f for f in examined(three) if f.state == PROBLEM]
    assert schema.pending(three) != []
    assert schema.migrate(three) != []
    assert schema.pending(three) == []
    with psycopg.connect(three, autocommit=True) as conn:
        for id in "abc":
            insert(conn, id)
        assert slots(conn) == {"a": 1, "b": 2, "c": 3}
        with pytest.raises(errors.UniqueViolation):
            insert(conn, "d")
    if damage != "the column is dropped":  # It comes back as the last one.
        assert expected.dump(three) == before


def test_recalls_lose_their_slots_with_the_column(
    conn: psycopg.Connection[Any], three: str
) -> None:
    """What a tool dropped is put back, and each recall has a slot of its own again."""
    for id in "abc":
        insert(conn, id)
    conn.execute("alter table session_recalls drop column slot")
    schema.migrate(three)
    assert slots(conn) == {"a": 1, "b": 2, "c": 3}
    assert schema.pending(three) == []


# --- dumps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["comments", "no comments"])
@pytest.mark.skipif(expected.pg_dump() is None, reason="there is no pg_dump")
def test_a_dump_of_the_schema_has_it(kept: str, three: str, server: str) -> None:
    with postgres.database(server) as copy:
        postgres_restore(three, copy, "--schema-only", *(["--no-comments"] * (kept != "comments")))
        schema.migrate(copy, here=True)
        assert schema.pending(copy, pending_most=3) == []
        with psycopg.connect(copy, autocommit=True) as conn:
            conn.execute("insert into sessions values ('s', 'ann')")
            for id in "abc":
                insert(conn, id)
            with pytest.raises(errors.UniqueViolation):
                insert(conn, "d")


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.skipif(expected.pg_dump() is None, reason="there is no pg_dump")
def test_a_dump_of_the_rows_keeps_their_slots(
    whole: bool, conn: psycopg.Connection[Any], three: str, server: str
) -> None:
    for id in "abc":
        insert(conn, id)
    conn.execute("update session_recalls set status = 'fired' where id = 'a'")
    with postgres.database(server) as copy:
        if not whole:
            execute(copy, create_tables())
            schema.migrate(copy, pending_most=3)
        options = [] if whole else ["--data-only"]
        postgres_restore(three, copy, *options)
        schema.migrate(copy, here=True)
        assert execute(copy, PENDING) == [("b", 2), ("c", 3)]
        with psycopg.connect(copy, autocommit=True) as other:
            insert(other, "d")
            assert slots(other) == {"d": 1, "b": 2, "c": 3}


def postgres_restore(source: str, target: str, *options: str) -> None:
    import subprocess

    program = expected.pg_dump()
    assert program is not None
    made = subprocess.run(
        [program, "--no-owner", *options, source], capture_output=True, text=True, check=True
    )
    psql = program.replace("pg_dump", "psql")
    done = subprocess.run(
        [psql, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", target],
        input=made.stdout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- who gets which slot --------------------------------------------------------------------------


def test_the_lowest_free_slot_and_then_unique(conn: psycopg.Connection[Any]) -> None:
    for id in "abc":
        insert(conn, id, type_="recurring")
    assert slots(conn) == {"a": 1, "b": 2, "c": 3}
    with pytest.raises(errors.UniqueViolation, match="unique"):
        insert(conn, "d")
    conn.execute("update session_recalls set status = 'cancelled' where id = 'b'")
    insert(conn, "d")
    assert slots(conn) == {"a": 1, "d": 2, "c": 3}
    insert(conn, "e", "t")
    assert slots(conn, "t") == {"e": 1}
    # `on conflict do nothing` is answered by the index, and so is not an error.
    conn.execute(f"{INSERT} on conflict do nothing", ("f", "s", "once"))
    assert set(slots(conn)) == {"a", "c", "d"}


@pytest.mark.parametrize(("given", "gets"), [(2, 2), (1, 2), (0, 2), (4, 2), (-5, 2), (3, 3)])
def test_a_slot_that_is_given_is_taken_where_it_is_free(
    given: int, gets: int, conn: psycopg.Connection[Any]
) -> None:
    insert(conn, "a")
    conn.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, created_at, updated_at, slot) "
        "values ('b', 's', 'once', now() + interval '1 day', 'm', now(), now(), %s)",
        (given,),
    )
    assert slots(conn) == {"a": 1, "b": gets}


@pytest.mark.slow
def test_many_rows_in_one_statement(conn: psycopg.Connection[Any], three: str) -> None:
    """More than locks may be taken for; by select, COPY, and prepared."""
    conn.execute("insert into sessions select 's' || n, 'bob' from generate_series(1, 5000) n")
    conn.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, created_at, updated_at) "
        "select n || '/' || m, 's' || n, 'once', now() + interval '1 day', 'm', now(), now() "
        "from generate_series(1, 5000) n, generate_series(1, 2) m order by m, n"
    )
    with conn.cursor().copy(
        "copy session_recalls (id, session_id, call_type, trigger_at, additional_context_message, "
        "created_at, updated_at) from stdin"
    ) as copy:
        now = datetime.now(UTC)
        for n in range(1, 5001):
            copy.write_row((f"{n}/3", f"s{n}", "once", FAR, "m", now, now))
    [counted] = conn.execute(
        "select count(*), count(distinct (session_id, slot)), min(slot), max(slot) "
        "from session_recalls where status = 'pending'"
    )
    assert counted == (15000, 15000, 1, 3)
    conn.prepare_threshold = 1
    for n in range(4):
        insert(conn, f"p{n}", "t") if n < 3 else None
    assert sorted(slots(conn, "t").values()) == [1, 2, 3]
    with pytest.raises(errors.UniqueViolation):
        conn.execute(
            "insert into session_recalls (id, session_id, call_type, trigger_at, "
            "additional_context_message, created_at, updated_at) "
            "select 'x' || n, 't', 'once', now(), 'm', now(), now() from generate_series(1, 2) n"
        )


def test_a_row_that_becomes_pending_again(conn: psycopg.Connection[Any]) -> None:
    """Its own slot where that is free, else another; and none where there is none."""
    for id in "abc":
        insert(conn, id)
    conn.execute("update session_recalls set status = 'cancelled' where id = 'a'")
    insert(conn, "d")
    conn.execute("update session_recalls set status = 'cancelled' where id = 'c'")
    conn.execute("update session_recalls set status = 'pending' where id = 'a'")
    assert slots(conn) == {"d": 1, "b": 2, "a": 3}
    with pytest.raises(errors.UniqueViolation):
        conn.execute("update session_recalls set status = 'pending' where id = 'c'")


def test_a_one_shot_in_its_run_moves_only_where_no_slot_is_free(
    conn: psycopg.Connection[Any],
) -> None:
    insert(conn, "run")
    insert(conn, "every", type_="recurring")
    conn.execute(
        "update session_recalls set lease = gen_random_uuid(), leased_at = now(), "
        "lease_until = now() + interval '1 minute' where id = 'run'"
    )
    insert(conn, "next")
    assert slots(conn) == {"run": 1, "every": 2, "next": 3}
    insert(conn, "more")
    assert slots(conn) == {"more": 1, "every": 2, "next": 3}
    [status] = conn.execute("select status, slot from session_recalls where id = 'run'")
    assert status == ("running", 1)
    # An upsert of the one in its run, by its id, finds it where it was.
    conn.execute(
        f"{INSERT} on conflict (id) do update set trigger_at = excluded.trigger_at",
        ("run", "s", "once"),
    )
    assert slots(conn) == {"more": 1, "every": 2, "next": 3}
    with pytest.raises(errors.UniqueViolation):
        insert(conn, "too many")


def test_an_upsert_by_id_in_its_run_leaves_it_where_it_is(conn: psycopg.Connection[Any]) -> None:
    for id in "abc":
        insert(conn, id)
    conn.execute(
        "update session_recalls set lease = gen_random_uuid(), leased_at = now(), "
        "lease_until = now() + interval '1 minute' where id = 'b'"
    )
    conn.execute(
        f"{INSERT} on conflict (id) do update set trigger_at = excluded.trigger_at",
        ("b", "s", "once"),
    )
    assert slots(conn) == {"a": 1, "b": 2, "c": 3}


def test_a_cancel_and_an_insert_in_one_transaction(conn: psycopg.Connection[Any]) -> None:
    for id in "abc":
        insert(conn, id)
    with conn.transaction():
        conn.execute(
            "update session_recalls set status = 'cancelled' "
            "where session_id = 's' and status = 'pending'"
        )
        insert(conn, "d")
        insert(conn, "e")
    assert slots(conn) == {"d": 1, "e": 2}


@pytest.mark.parametrize(
    "grants",
    [
        "insert",
        "insert (id, session_id, call_type, trigger_at, "
        "interval_seconds, internal_comment, additional_context_message, status, created_at, "
        "updated_at)",
    ],
)
def test_an_account_with_few_rights(grants: str, three: str) -> None:
    with accounts(three, "insert") as [(name, dsn)]:
        execute(
            three,
            f"grant {grants} on session_recalls to {name}",
            f"grant select, references on sessions to {name}",
        )
        with (
            psycopg.connect(dsn, autocommit=True) as conn,
            psycopg.connect(three, autocommit=True) as owner,
        ):
            for id in "abc":
                insert(conn, id)
            assert slots(owner) == {"a": 1, "b": 2, "c": 3}
            with pytest.raises(errors.UniqueViolation):
                insert(conn, "d")
            owner.execute(
                "update session_recalls set lease = gen_random_uuid(), leased_at = now(), "
                "lease_until = now() + interval '1 minute' where id = 'b'"
            )
            insert(conn, "d")
            assert slots(owner) == {"a": 1, "d": 2, "c": 3}


def test_the_function_tells_nothing_on_another_table(three: str) -> None:
    """Whoever may create a table can use the function as a trigger of it: it answers as if there
    were no recalls."""
    with accounts(three, "other") as [(name, dsn)]:
        execute(three, f"create schema own authorization {name}")
        with psycopg.connect(three, autocommit=True) as owner:
            insert(owner, "a")
            insert(owner, "b")
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(
                "create table own.session_recalls (id text, session_id text, status text, slot "
                "integer default 1)"
            )
            conn.execute(
                "create trigger t before insert on own.session_recalls for each row "
                "execute function public.recall_admit_slot('3')"
            )
            conn.execute("insert into own.session_recalls values ('x', 's', 'pending')")
            [(slot,)] = conn.execute("select slot from own.session_recalls").fetchall()
            assert slot == 1


# --- several at once ------------------------------------------------------------------------------

LEVELS = ("read committed", "repeatable read", "serializable")


def ids(conn: psycopg.Connection[Any], session: str = "s") -> set[str]:
    return set(slots(conn, session))


class Waiting:
    """A statement on a connection of its own that waits for another transaction."""

    def __init__(self, conn: psycopg.Connection[Any], watch: str, act: Any) -> None:
        self.error: psycopg.Error | None = None
        self._act = act
        self._thread = threading.Thread(target=self._run)
        self._pid, self._watch = conn.info.backend_pid, watch

    def _run(self) -> None:
        try:
            self._act()
        except psycopg.Error as error:
            self.error = error

    def begin(self) -> None:
        """Returns when it waits for a lock."""
        self._thread.start()
        waits = f"select from pg_locks where pid = {self._pid} and not granted"
        asyncio.run(until(lambda: execute(self._watch, f"select exists ({waits})") == [(True,)]))

    def end(self) -> psycopg.Error | None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.error


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_two_for_the_last_slot(
    level: str, ends: str, conn: psycopg.Connection[Any], three: str
) -> None:
    """Exactly one gets it. The other waits, and reads "unique"; serializable, PostgreSQL may ask it
    to try again, and then it reads that."""
    insert(conn, "a", type_="recurring")
    insert(conn, "b", type_="recurring")
    with psycopg.connect(three) as one, psycopg.connect(three) as two:
        for c in (one, two):
            c.execute(f"set transaction isolation level {level}")
            c.execute("select count(*) from sessions")
        insert(one, "c")
        waiting = Waiting(two, three, lambda: insert(two, "d"))
        waiting.begin()
        getattr(one, ends)()
        error = waiting.end()
        if ends == "rollback":
            assert error is None
            two.commit()
            assert ids(conn) == {"a", "b", "d"}
            return
        if isinstance(error, errors.SerializationFailure):
            assert level == "serializable"
            two.rollback()
            with pytest.raises(errors.UniqueViolation) as raised:
                insert(two, "d")
            error = raised.value
        assert "unique" in str(error)
        two.rollback()
    assert slots(conn) == {"a": 1, "b": 2, "c": 3}


def test_two_at_once_while_slots_are_free(conn: psycopg.Connection[Any], three: str) -> None:
    """Neither waits for the other, whoever commits first."""
    insert(conn, "a")
    with psycopg.connect(three) as one, psycopg.connect(three) as two:
        for c in (one, two):
            c.execute("set lock_timeout = '10s'")
        insert(one, "b")
        insert(two, "c")
        two.commit()
        one.commit()
    assert slots(conn) == {"a": 1, "b": 2, "c": 3}
    conn.execute("delete from session_recalls")
    with psycopg.connect(three) as one, psycopg.connect(three) as two:
        # One that was undone leaves its slot to the next.
        insert(one, "a")
        insert(two, "b")
        one.rollback()
        insert(two, "c")
        two.commit()
    assert sorted(slots(conn).values()) == [1, 2]


def test_two_inserts_of_many_in_opposite_order(conn: psycopg.Connection[Any], three: str) -> None:
    """They do not block each other: each takes other slots."""
    with psycopg.connect(three) as one, psycopg.connect(three) as two:
        for c in (one, two):
            c.execute("set lock_timeout = '10s'")
        insert(one, "a1", "s")
        insert(two, "b1", "t")
        insert(one, "a2", "t")
        insert(two, "b2", "s")
        one.commit()
        two.commit()
    assert slots(conn, "s") == {"a1": 1, "b2": 2}
    assert slots(conn, "t") == {"b1": 1, "a2": 2}


@pytest.mark.parametrize("level", LEVELS)
def test_many_at_once_in_one_session(level: str, three: str) -> None:
    """Of ten at once three get in, whatever the level; at read committed nobody is refused while a
    slot is free."""
    start = threading.Barrier(10)
    won: list[str] = []
    texts: list[str] = []

    def work(n: int) -> None:
        with psycopg.connect(three) as conn:
            conn.execute(f"set session characteristics as transaction isolation level {level}")
            conn.commit()
            start.wait(60)
            while True:
                try:
                    insert(conn, f"r{n}")
                    conn.commit()
                    won.append(f"r{n}")
                    return
                except errors.SerializationFailure:
                    conn.rollback()
                except errors.UniqueViolation as error:
                    conn.rollback()
                    texts.append(str(error))
                    if level == "read committed" or len(won) == 3:
                        return

    threads = [threading.Thread(target=work, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with psycopg.connect(three, autocommit=True) as conn:
        assert len(won) == 3
        assert slots(conn).keys() == set(won)
        assert sorted(slots(conn).values()) == [1, 2, 3]
    assert len(texts) >= 7 and all("unique" in text for text in texts)


def test_a_session_that_is_deleted_meanwhile(conn: psycopg.Connection[Any], three: str) -> None:
    """No deadlock: the insert waits for the delete, and finds no session."""
    insert(conn, "a")
    with psycopg.connect(three) as one, psycopg.connect(three) as two:
        one.execute("delete from sessions where id = 's'")
        waiting = Waiting(two, three, lambda: insert(two, "b"))
        waiting.begin()
        one.commit()
        assert isinstance(waiting.end(), errors.ForeignKeyViolation)
        two.rollback()
    with psycopg.connect(three) as one, psycopg.connect(three) as two:
        insert(one, "c", "t")
        waiting = Waiting(two, three, lambda: two.execute("delete from sessions where id = 't'"))
        waiting.begin()
        one.commit()
        assert waiting.end() is None
        two.commit()
    assert execute(three, "select id from session_recalls") == []


def test_a_slot_that_a_bulk_insert_takes_unseen_is_refused_by_the_index(
    conn: psycopg.Connection[Any], three: str
) -> None:
    """After its first rows a statement of very many takes no locks: another waits for it."""
    conn.execute("insert into sessions select 's' || n, 'bob' from generate_series(1, 400) n")
    bulk = (
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, created_at, updated_at) "
        "select 'b' || n, 's' || n, 'once', now() + interval '1 day', 'm', now(), now() "
        "from generate_series(1, 400) n"
    )
    with psycopg.connect(three) as one, psycopg.connect(three) as two:
        one.execute(bulk)
        [(locks,)] = conn.execute(
            "select count(*) from pg_locks where locktype = 'advisory' and pid = %s",
            (one.info.backend_pid,),
        ).fetchall()
        assert locks == 64
        waiting = Waiting(two, three, lambda: insert(two, "x", "s400"))
        waiting.begin()
        one.commit()
        assert isinstance(waiting.end(), errors.UniqueViolation)
        two.rollback()
        insert(two, "x", "s400")
        two.commit()
    assert slots(conn, "s400") == {"b400": 1, "x": 2}


@pytest.mark.parametrize("said", ["", "nonsense", "-5", "999999999999999999"])
def test_a_setting_that_somebody_wrote_changes_nothing(
    said: str, conn: psycopg.Connection[Any]
) -> None:
    conn.execute("select set_config('recall_worker.slot_locks', %s, false)", (said,))
    insert(conn, "a")
    insert(conn, "b")
    assert slots(conn) == {"a": 1, "b": 2}


# --- while the application works ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "switches"),
    [
        (1_000, ("4",)),
        pytest.param(1_000, ("4", "2", "1"), marks=pytest.mark.full),
        pytest.param(200_000, ("4", "2", "1"), marks=pytest.mark.full),
    ],
)
async def test_the_switch_holds_nobody_up(
    rows: int, switches: tuple[str, ...], empty_database: str
) -> None:
    """Up and down while the application inserts and cancels, and a reader stays open."""
    execute(empty_database, create_tables(), MANY_ROWS.format(n=rows))
    schema.migrate(empty_database)
    async with Writers.at_work(empty_database) as writers:
        for most in switches:
            async with connected(empty_database) as reader:
                await reader.execute("begin")
                await reader.execute("select count(*) from session_recalls")
                async with Migrate.started(empty_database, "--slots", most) as migrate:
                    await migrate.says("pending recall")
                    await writers.more(10)
                    await reader.execute("rollback")
                    assert await migrate.exit() == 0, migrate.lines
        await writers.more(10)
    assert writers.longest < 1.0
    assert schema.pending(empty_database, pending_most=int(switches[-1])) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "most"),
    [
        (1, 3),
        pytest.param(3, 1, marks=pytest.mark.full),
        pytest.param(3, 2, marks=pytest.mark.full),
    ],
)
async def test_a_switch_that_was_interrupted_is_completed_by_the_next(
    before: int, most: int, database: str
) -> None:
    """Killed while an index is built: nothing is refused meanwhile that was not refused before, the
    next look names it, and the next `migrate` completes it."""
    execute(database, "insert into sessions values ('s', 'ann')")
    schema.migrate(database, pending_most=before)
    async with connected(database) as reader:
        await reader.execute("begin isolation level repeatable read")
        await reader.execute("select count(*) from session_recalls")
        async with Migrate.started(database, "--slots", str(most)) as migrate:
            await migrate.says("pending recall")
            if most != 2:
                await until(
                    lambda: execute(
                        database,
                        "select 1 from pg_class where relname = 'idx_recalls_session_slot'",
                    )
                )
            else:
                await until(
                    lambda: execute(
                        database,
                        "select 1 from pg_trigger where tgname = 'recall_admit_slot' "
                        "and pg_get_triggerdef(oid) like '%(''2'')'",
                    )
                )
            migrate.process.kill()
            await migrate.exit()
        with psycopg.connect(database, autocommit=True) as conn:
            insert(conn, "a", type_="recurring")
            if most == 3:
                with pytest.raises(errors.UniqueViolation):
                    insert(conn, "b")
        await reader.execute("rollback")
    left = schema.pending(database)
    assert (left != []) == (most != 2)
    if most != 2:
        assert any(
            finding.state == PROBLEM for finding in await asyncio.to_thread(examined, database)
        )
    done = await asyncio.to_thread(schema.migrate, database)
    assert (done != []) == (most != 2)
    assert schema.pending(database, pending_most=most) == []
    with psycopg.connect(database, autocommit=True) as conn:
        for n in range(most - 1):
            insert(conn, f"more{n}")
        with pytest.raises(errors.UniqueViolation):
            insert(conn, "too many")
        assert sorted(slots(conn).values()) == list(range(1, most + 1))


# --- through the worker, the commands, and Recalls ------------------------------------------------


@pytest.mark.slow
async def test_the_application_cancels_and_skips_all_of_them(three: str) -> None:
    async with await Application.connect(three) as app:
        first = await app.schedule("s", "recurring", FAR, "m", interval_seconds=3600)
        await app.schedule("s", "recurring", FAR, "m", interval_seconds=60)
        await app.schedule("s", "once", FAR, "m")
        with pytest.raises(AlreadyScheduled):
            await app.schedule("s", "once", FAR, "m")
        assert await app.skip_next("s")
        moved = {r["id"]: r["trigger_at"] - FAR for r in await app.list_by_session("s")}
        assert sorted(m.total_seconds() for m in moved.values()) == [0, 60, 3600]
        assert moved[first] == timedelta(hours=1)
        assert await app.sessions_with_pending(["s", "t"]) == {"s"}
        assert await app.cancel_session("s") == 3
        await app.schedule("s", "once", FAR, "m")


@pytest.mark.slow
async def test_recalls_says_how_many(three: str, client: Any) -> None:
    async with client.pool(three) as pool:
        recalls = client.make(pool)
        made = [await recalls.schedule("s", f"m{n}", after=timedelta(days=1)) for n in range(3)]
        with pytest.raises(RecallExists, match="session s has 3 pending recalls already") as found:
            await recalls.schedule("s", "m", after=timedelta(days=1))
        assert found.value.most == 3
        assert len(await recalls.list(session_id="s")) == 3
        assert await recalls.mark_cancelled(made[0].id)
        await recalls.schedule("s", "m", after=timedelta(days=1))
        with pytest.raises(RecallExists, match="3 pending"):
            await recalls.retry(made[0].id)
        assert await recalls.sessions_with_pending(["s", "t"]) == {"s"}
        assert await recalls.cancel("s") == 3


def catalogue_is_legacy(dsn: str) -> bool:
    return not schema.differences(dsn) and catalog.NOTE in str(
        execute(
            dsn,
            "select obj_description(oid, 'pg_trigger') from pg_trigger "
            "where tgname = 'recall_before_insert'",
        )
    )


def test_nothing_of_it_is_there_where_it_was_not_asked_for(database: str) -> None:
    """But a column with a default, and a function that nothing calls."""
    assert catalogue_is_legacy(database)
    assert (
        execute(
            database,
            "select tgname from pg_trigger where tgfoid = 'recall_admit_slot'::regproc",
        )
        == []
    )
    assert execute(database, INDEX) == [
        (
            "CREATE UNIQUE INDEX idx_recalls_active_pending ON public.session_recalls "
            "USING btree (session_id) WHERE (status = 'pending'::text)",
        )
    ]
    execute(database, "insert into sessions values ('s', 'ann')")
    with psycopg.connect(database, autocommit=True) as conn:
        insert(conn, "a")
        with pytest.raises(errors.UniqueViolation, match="idx_recalls_active_pending"):
            conn.execute(
                "insert into session_recalls (id, session_id, call_type, trigger_at, "
                "additional_context_message, created_at, updated_at, slot) "
                "values ('b', 's', 'once', now(), 'm', now(), now(), 2)"
            )
        with conn.transaction():
            conn.execute(
                f"{INSERT} on conflict (session_id) where status = 'pending' "
                "do update set trigger_at = excluded.trigger_at",
                ("c", "s", "once"),
            )
        assert slots(conn) == {"a": 1}


@pytest.mark.slow
def test_an_index_of_another_name_keeps_its_name(empty_database: str) -> None:
    """So that what the application runs at each start, by that name, still finds it."""
    own = "create unique index if not exists mine on session_recalls (session_id) " + (
        "where status = 'pending'"
    )
    execute(empty_database, create_tables(), "drop index idx_recalls_active_pending", own)
    schema.migrate(empty_database)
    before = expected.dump(empty_database)
    schema.migrate(empty_database, pending_most=2)
    after = expected.dump(empty_database)
    execute(empty_database, own)
    assert expected.dump(empty_database) == after
    assert "CREATE UNIQUE INDEX mine ON public.session_recalls USING btree (session_id, slot)" in (
        after
    )
    assert schema.pending(empty_database) == []
    schema.migrate(empty_database, pending_most=1)
    assert expected.dump(empty_database) == before


@pytest.mark.slow
def test_a_session_that_gets_one_more_meanwhile_takes_the_switch_back(
    three: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the switch: nothing is lost, and it is refused, naming it."""
    before = expected.dump(three)
    switched = slots_room._fires
    asked: list[int] = []

    def fires(found: Any, most: int) -> Any:
        if not asked:  # Behind the look, and before the switch is committed.
            for id in "ab":
                with psycopg.connect(three, autocommit=True) as conn:
                    insert(conn, id)
        asked.append(most)
        return switched(found, most)

    monkeypatch.setattr(slots_room, "_fires", fires)
    with pytest.raises(Refused, match="1 session has more pending recalls than 1"):
        schema.migrate(three, pending_most=1)
    assert asked == [1, 3]
    assert expected.dump(three) == before
    assert schema.pending(three) == []


@pytest.mark.slow
async def test_a_run_that_ends_takes_a_slot_that_is_free(three: str) -> None:
    """One that made room for a newer recall is pending again once a slot is free, and stays
    `running` until then."""
    async with await Application.connect(three) as app:
        ledger = Ledger(three, "w", 60.0)
        try:
            await app.schedule("s", "once", datetime.now(UTC), "m", id="run")
            [claim] = (await ledger.claim(1)).claims
            for n in range(3):
                await app.schedule("s", "recurring", FAR, "m", interval_seconds=60, id=f"r{n}")
            defer = Defer(After(-1.0), "busy")
            assert execute(three, "select status from session_recalls where id = 'run'") == [
                ("running",)
            ]
            assert await settle(ledger, claim, defer, Busy(409)) == Settled("running")
            [claim] = (await ledger.claim(1)).claims
            execute(three, "update session_recalls set status = 'cancelled' where id = 'r2'")
            assert await settle(ledger, claim, defer, Busy(409)) == Settled("pending")
        finally:
            await ledger.close()
    assert execute(three, PENDING) == [("run", 1), ("r0", 2), ("r1", 3)]

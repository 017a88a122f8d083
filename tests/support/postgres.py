"""The databases of the tests: one server a session, as many databases on it as the tests like.

Owns where the server comes from. In this order: RECALL_TEST_DSN, whose account may create
databases; the binaries in RECALL_TEST_PG_BINDIR (`/usr/lib/postgresql/15/bin`), run by our own
EmbeddedServer; Docker through testcontainers, if an engine answers at once (the image is
RECALL_TEST_PG_IMAGE, postgres:18); the EmbeddedServer with its wheel.

Never here: RECALL_DSN, which is never read, and any database that is not named
recall_test_<pid>_<n>.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from urllib.parse import quote, urlencode

import psycopg
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict

from recall_worker.embedded import EmbeddedServer

PREFIX = "recall_test_"
IMAGE = "postgres:18"
ENGINE_PATIENCE = 2.0
SETTINGS = {"max_connections": "300", "max_wal_size": "256MB"}

RECORD = """
do $$
begin
    if to_regclass('recall_identity') is not null then
        truncate recall_identity;
        insert into recall_identity
        select c.system_identifier, d.oid::bigint from pg_control_system() c, pg_database d
        where d.datname = current_database();
    end if;
end
$$
"""
"""What `migrate --here` does."""

_numbers = count(1)


@contextmanager
def server() -> Iterator[str]:
    """A server for the whole session: the DSN of a database to make others from."""
    with ExitStack() as stack:
        if dsn := os.environ.get("RECALL_TEST_DSN"):
            yield dsn
            return
        if not os.environ.get("RECALL_TEST_PG_BINDIR") and engine_answers():
            try:
                dsn = stack.enter_context(_container())
            except Exception as error:  # an engine without the image and without a way to it
                # Not a warning: those are errors in our tests.
                print(
                    f"Docker answers, but gives no PostgreSQL, so it is embedded: {error!r}",
                    file=sys.__stderr__,
                )
            else:
                yield dsn
                return
        yield stack.enter_context(embedded()).dsn()


def embedded(*, tcp: bool = False, settings: Mapping[str, str] | None = None) -> EmbeddedServer:
    """A server of the caller's own, not yet started, to be killed and started again;
    RECALL_TEST_PG_BINDIR counts."""
    bindir = os.environ.get("RECALL_TEST_PG_BINDIR") or None
    return EmbeddedServer(
        base=_memory(), bindir=bindir, tcp=tcp, settings=SETTINGS | dict(settings or {})
    )


@contextmanager
def database(
    maintenance: str, template: str | None = None, *, recorded: bool = True
) -> Iterator[str]:
    """A database for as long as the block runs."""
    dsn = create_database(maintenance, template, recorded=recorded)
    try:
        yield dsn
    finally:
        drop_database(maintenance, dsn)


def create_database(maintenance: str, template: str | None = None, *, recorded: bool = True) -> str:
    """A new database, empty or a copy of `template` (a name or a DSN; nobody may be connected to
    it), as a URL. `recorded`: it is not to be taken for a copy, in which workers claim nothing."""
    source = "template0" if template is None else _name(template)
    with psycopg.connect(maintenance, autocommit=True) as connection:
        # A copy of the files takes half the time of one by the log, but begins and ends with a
        # checkpoint.
        files = connection.info.server_version >= 150000 and connection.execute(
            "show fsync"
        ).fetchone() == ("off",)
        while True:
            name = f"{PREFIX}{os.getpid()}_{next(_numbers)}"
            words = sql.SQL("create database {} template {}").format(
                sql.Identifier(name), sql.Identifier(source)
            )
            if files:
                words += sql.SQL(" strategy file_copy")
            try:
                connection.execute(words)
            except (
                errors.DuplicateDatabase
            ):  # of a process with our number that died before it could tidy up
                continue
            break
    made = address(maintenance, name)
    if template is not None and recorded:
        with psycopg.connect(made, autocommit=True) as connection:
            connection.execute(RECORD)
    return made


def drop_database(maintenance: str, database: str) -> None:
    """Drops a database of ours (a name or a DSN), whoever is connected to it; it may be gone
    already."""
    name = _name(database)
    if not name.startswith(PREFIX):
        raise ValueError(f"{name!r} is not a test's database")
    with psycopg.connect(maintenance, autocommit=True) as connection:
        connection.execute(
            sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
        )


def address(dsn: str, dbname: str) -> str:
    """The same server's database `dbname`, as a URL: psycopg takes other spellings too, asyncpg
    takes no other."""
    parts = {key: str(value) for key, value in conninfo_to_dict(dsn).items() if value is not None}
    parts.pop("dbname", None)
    login = quote(parts.pop("user", ""), safe="")
    if "password" in parts:
        login += ":" + quote(parts.pop("password"), safe="")
    host, port = parts.get("host", ""), parts.get("port", "")
    place = ""
    if host and not host.startswith(("/", "@")) and not set(host + port) & set(",:"):
        place = host + (f":{port}" if port else "")
        parts.pop("host")
        parts.pop("port", None)
    query = urlencode(parts, safe="/", quote_via=quote)
    name = quote(dbname, safe="")
    at, more = "@" if login else "", "?" if query else ""
    return f"postgresql://{login}{at}{place}/{name}{more}{query}"


def engine_answers() -> bool:
    """Whether a Docker engine answers, asked the way testcontainers asks, and never for longer than
    a moment."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            from testcontainers.core.docker_client import DockerClient

            client = DockerClient(timeout=ENGINE_PATIENCE).client
            try:
                answers.append(bool(client.ping()))
            finally:
                client.close()
        except Exception:  # not installed, not running, not allowed: all the same to us
            answers.append(False)

    asking = threading.Thread(target=ask, name="docker ping", daemon=True)
    asking.start()
    asking.join(ENGINE_PATIENCE * 2)
    with warnings.catch_warnings():  # docker's client drops a socket that could not connect
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    return answers == [True]


@contextmanager
def _container() -> Iterator[str]:
    try:
        from testcontainers.community.postgres import PostgresContainer
    except ImportError:  # before testcontainers 4.15
        from testcontainers.postgres import PostgresContainer

    image = os.environ.get("RECALL_TEST_PG_IMAGE") or IMAGE
    settings = " ".join(
        f"-c {name}={value}" for name, value in {**SETTINGS, "fsync": "off"}.items()
    )
    with PostgresContainer(image, driver=None).with_command(f"postgres {settings}") as container:
        yield container.get_connection_url()


def _memory() -> Path | None:
    """Linux's tmpfs, if it has room (a container's 64 MB are none): there a database is copied in 5
    ms, not in 70."""
    memory = Path("/dev/shm")
    if (
        memory.is_dir()
        and os.access(memory, os.W_OK | os.X_OK)
        and shutil.disk_usage(memory).free > 2 << 30
    ):
        return memory
    return None


def _name(database: str) -> str:
    if "=" not in database and "://" not in database:
        return database
    return str(conninfo_to_dict(database)["dbname"])


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has, a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

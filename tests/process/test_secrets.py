"""Secrets: token, signing secret and the DSN's password come out nowhere, whatever goes wrong on
the way.

In the log at level debug, on a command's stdout and stderr, in tracebacks, tables, PostgreSQL's
list of sessions and the system's of processes. What goes well is in test_bad_setting; here things
fail: passwords, certificates, networks, servers that lie, and the worker itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from recall_worker.embedded import EmbeddedServer
from recall_worker.terminal import UNREACHABLE, USAGE

from ..conftest import Connection, connected
from ..support import postgres
from ..support.application import Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint, reply
from ..support.peer import CERTIFICATE, KEY
from ..test_cli import operate, process
from .test_bad_setting import heard
from .test_lease import eventually, promise, rows

HUSH = "xylophone-zymurgy"  # no five letters of it are found in a uuid or a number
"""The password. Any five of its characters in a row are too many."""
TOKEN, SIGNING = f"{HUSH}-token", f"{HUSH}-signing"
SECRETS = {"RECALL_RUN_TOKEN": TOKEN, "RECALL_SIGNING_SECRET": SIGNING}
COMMANDS = [
    ["list"],
    ["list", "--user", "u", "--json"],
    ["show", "x"],
    ["why", "x"],
    ["stats"],
    ["workers", "--json"],
    ["cancel", "x"],
    ["skip", "x"],
    ["pause", "x"],
    ["retry", "x"],
    ["fire", "x"],
    ["reschedule", "x", "--in", "1h"],
    ["schedule", "s", "m"],
    ["prune", "--older-than", "1d", "--yes"],
    ["migrate"],
    ["migrate", "--check"],
]


def pieces(text: str, secret: str = HUSH) -> set[str]:
    """What of a secret stands in a text."""
    return {piece for n in range(len(secret) - 4) if (piece := secret[n : n + 5]) in text}


# --- databases that can't be had ------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked() -> Iterator[EmbeddedServer]:
    """A server that asks for passwords, and knows no TLS."""
    with EmbeddedServer(bindir=os.environ.get("RECALL_TEST_PG_BINDIR") or None, tcp=True) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute("create role ann login password 'another'")
        yield server


async def _hangs_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _garbles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1 << 12)
    writer.write(b"N" + b"\xff" * 500)
    writer.close()


async def _takes_no_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readexactly(8)
    writer.write(b"N")
    await reader.read(1 << 12)
    writer.close()


async def _is_somebody_else(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """PostgreSQL's way into TLS, with a certificate that nobody vouches for."""
    await reader.readexactly(8)
    writer.write(b"S")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.environ["TEST_SECRETS_PEM"])
    with contextlib.suppress(OSError, ssl.SSLError):
        await writer.start_tls(context, ssl_handshake_timeout=5)
    writer.close()


@contextlib.asynccontextmanager
async def false_server(talk: object) -> AsyncIterator[int]:
    """Something on a port where a PostgreSQL should be."""
    server = await asyncio.start_server(talk, "127.0.0.1", 0)  # type: ignore[arg-type]
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


WAYS = [
    "wrong password",
    "no such account",
    "no such database",
    "nobody there",
    "no TLS",
    "no root certificate",
    "another's certificate",
    "hangs up",
    "garbage",
]


@contextlib.asynccontextmanager
async def failing(
    way: str, locked: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[str]:
    """A DSN with the password in it that leads to nothing good."""
    at = conninfo_to_dict(locked.dsn(tcp=True))
    pem = tmp_path / "server.pem"
    pem.write_text(KEY + CERTIFICATE, encoding="ascii")
    monkeypatch.setenv("TEST_SECRETS_PEM", str(pem))
    here = f"postgresql://ann:{HUSH}@127.0.0.1:{at['port']}/postgres"
    talks = {
        "another's certificate": _is_somebody_else,
        "hangs up": _hangs_up,
        "garbage": _garbles,
        "no TLS": _takes_no_tls,
    }
    if way in talks:
        async with false_server(talks[way]) as port:
            mode = {
                "another's certificate": "?sslmode=verify-full&sslrootcert=system",
                "no TLS": "?sslmode=require",
            }.get(way, "")
            yield f"postgresql://ann:{HUSH}@127.0.0.1:{port}/postgres{mode}"
        return
    yield {
        "wrong password": here,
        "no such account": here.replace("ann:", "zoe:"),
        "no such database": make_conninfo(locked.dsn(tcp=True), dbname=f"app_{way[:2]}"),
        "nobody there": f"postgresql://ann:{HUSH}@127.0.0.1:{postgres.free_port()}/postgres",
        "no root certificate": f"{here}?sslmode=verify-full&sslrootcert=/nowhere/root.crt",
    }[way]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
async def test_commands_that_fail(
    way: str, locked: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command, whatever keeps it from the database, says so in a sentence with a hint,
    without a traceback and without the password."""
    async with failing(way, locked, tmp_path, monkeypatch) as dsn:
        secret = str(conninfo_to_dict(dsn)["password"])
        for words in COMMANDS:
            said = await asyncio.to_thread(operate, dsn, *words, environ=SECRETS)
            assert said.status == UNREACHABLE, (words, said)
            assert (
                said.out == ""
                and said.err.startswith("Error: ")
                and "\nTry: " in said.err
                and "Traceback" not in said.err
            )
            assert not pieces(said.err, secret) | pieces(said.err), (words, said)


@pytest.mark.parametrize("way", WAYS)
async def test_daemons_that_fail(
    way: str,
    locked: EmbeddedServer,
    endpoint: Endpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The daemon stays up and says at level debug why it has no database, for claims as for the
    bell, and not by which password."""
    async with failing(way, locked, tmp_path, monkeypatch) as dsn:
        environ = {
            "RECALL_DSN": dsn,
            "RECALL_LISTEN_DSN": dsn,
            "RECALL_RUN_URL": endpoint.url,
            **SECRETS,
        }
        async with Daemons(environ) as daemons:
            daemon = await daemons.start(ready=False)
            await daemon.hears("database.lost")
            await daemon.hears("listener.lost")
            assert await daemon.stop() == 0
            assert not pieces(heard(daemon), str(conninfo_to_dict(dsn)["password"])) | pieces(
                heard(daemon)
            )


# --- DSNs that are none ---------------------------------------------------------------------------

MARKS = st.text(st.sampled_from("@/:?#%&=+ '\"\\[]{},;|"), min_size=0, max_size=3)
SHAPES = [
    "postgresql://ann:{p}@127.0.0.1:1/app",
    "postgres://ann:{p}@127.0.0.1:1/app",
    "postgresql://ann:{p}@127.0.0.1:x/app",
    "postgresql://ann:{p}@[::1/app",
    "postgresql://127.0.0.1:1/app?password={p}",
    "postgresql://127.0.0.1:1/app?user=ann&pass={p}",
    "ann:{p}@127.0.0.1:1/app",
    "host=127.0.0.1 port=1 password={p}",
    "host=127.0.0.1 port=1 password='{p}' x=y",
    "host=127.0.0.1 port=1 passwd={p}",
    "postgresql+asyncpg://ann:{p}@127.0.0.1:1/app",
    "jdbc:postgresql://127.0.0.1:1/app?user=ann&password={p}",
    "host=127.0.0.1 port=1 password={p} dbname='a",
    "postgresql://ann:{p}@127.0.0.1:1,127.0.0.1:y/app",
]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(shape=st.sampled_from(SHAPES), before=MARKS, between=MARKS, after=MARKS)
@example(shape=SHAPES[0], before="", between="@", after="")
@example(shape=SHAPES[7], before="", between=" ", after="")
def test_a_dsn_in_any_shape(shape: str, before: str, between: str, after: str) -> None:
    """A password with any marks in it, not escaped, in a DSN of any shape: what is said of it
    quotes no five characters of it."""
    dsn = shape.format(p=f"{before}xylo4{between}phone11{after}")
    said = operate(dsn, "list")
    assert said.status in (USAGE, UNREACHABLE), said
    assert not pieces(said.out + said.err, "xylo4") | pieces(said.out + said.err, "phone11"), said


# --- an API that fails ----------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_server_that_repeats_what_it_was_sent(
    app: Application, database: str, db: Connection, endpoint: Endpoint
) -> None:
    """The token in an error's text, a redirect, a type, a run's end, a retry's reason: neither
    rows, nor calls, nor commands, nor logs have it."""
    answers = {
        "error": reply(400, {"error": f"bad token {TOKEN}"}),
        "detail": reply(500, {"detail": {"message": f"Bearer {TOKEN}"}}),
        "redirect": reply(302, headers={"location": f"http://elsewhere/?token={TOKEN}"}),
        "type": reply(200, text=b"x", headers={"content-type": TOKEN}),
        "failed": reply(200, {"status": "failed", "error": TOKEN}),
        "elsewhere": reply(202, headers={"location": f"http://elsewhere/{TOKEN}"}),
        "header": reply(200, headers={TOKEN: "x\r\nbad header"}),
    }
    for session, answer in answers.items():
        endpoint.script(session, answer)
    environ = {"RECALL_DSN": database, "RECALL_RUN_URL": endpoint.url, **SECRETS}
    async with Daemons(environ) as daemons:
        daemon = await daemons.start(max_attempts=1)
        for session in answers:
            recall = await promise(app, session)
            await daemon.hears("recall.settled", recall=recall)
            for words in (
                ["show", recall],
                ["why", recall],
                ["show", recall, "--json"],
                ["why", recall, "--json"],
            ):
                said = await asyncio.to_thread(operate, database, *words)
                assert said.status == 0 and TOKEN not in said.out + said.err
        assert all(
            request.headers["authorization"] == f"Bearer {TOKEN}" for request in endpoint.requests
        )
        for table in ("session_recalls", "recall_attempts", "recall_workers", "recall_endpoints"):
            assert not pieces(str(await rows(db, f"select t::text from {table} t")))
        activity = await rows(
            db, "select a::text from pg_stat_activity a where pid <> pg_backend_pid()"
        )
        assert "recall-worker ledger" in str(activity) and not pieces(str(activity))
        assert await daemon.stop() == 0
        assert TOKEN not in heard(daemon) and SIGNING not in heard(daemon)


async def test_an_endpoint_that_is_not_trusted(
    app: Application, database: str, db: Connection, tmp_path: Path
) -> None:
    """A certificate that nobody vouches for gets nothing, least of all the token; what is said of
    it says which certificate."""
    pem, seen = tmp_path / "server.pem", bytearray()
    pem.write_text(KEY + CERTIFICATE, encoding="ascii")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.extend(await reader.read(1 << 16))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    environ = {
        "RECALL_DSN": database,
        "RECALL_RUN_URL": f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/{{session_id}}",
    }
    async with Daemons(environ | SECRETS) as daemons:
        daemon = await daemons.start()
        recall = await promise(app, "s")
        [settled] = await daemon.hears("recall.settled", recall=recall, outcome="unavailable")
        assert "certificate is not trusted" in settled["reason"]
        assert await daemon.stop() == 0
        assert not pieces(heard(daemon)) and seen == b""
    server.close()


# --- a worker that breaks -------------------------------------------------------------------------

BROKEN = """
import sys
from recall_worker.cli import main
from recall_worker.protocols import native
from recall_worker.worker import leases

def broken(*given, **named):
    raise RuntimeError("a defect")

async def broken_loop(*given, **named):
    raise RuntimeError("a defect")

if sys.argv.pop(1) == "call":
    native.pieces = broken
else:
    leases.LeaseRenewer.renew = broken_loop
main()
"""


async def broken(where: str, environ: dict[str, str]) -> Daemon:
    """The daemon with a defect in one place."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
    return Daemon(
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            BROKEN,
            where,
            "run",
            env=kept
            | {"RECALL_LOG_FORMAT": "json", "RECALL_LOG_LEVEL": "debug", **SECRETS}
            | environ,
            stderr=asyncio.subprocess.PIPE,
            stdin=asyncio.subprocess.DEVNULL,
            limit=1 << 22,
        )
    )


@pytest.mark.parametrize("where", ["call", "loop"])
async def test_a_traceback(where: str, app: Application, database: str, endpoint: Endpoint) -> None:
    """A defect is told with its traceback, in the log or at the process's end: where it was, and
    not with which values."""
    dsn = make_conninfo(database, password=HUSH)
    daemon = await broken(where, {"RECALL_DSN": dsn, "RECALL_RUN_URL": endpoint.url})
    try:
        if where == "call":
            await promise(app, "s")
            [told] = (await daemon.hears("worker.error"))[:1]
            assert "RuntimeError: a defect" in told["exception"]
            assert await daemon.stop() == 0
        else:
            assert await daemon.exit() != 0
            assert "RuntimeError: a defect" in heard(daemon)
        assert not pieces(heard(daemon))
    finally:
        await daemon.kill()


# --- the list of processes ------------------------------------------------------------------------


def command_lines() -> str:
    """What everybody on this host can read of all processes."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                found.append(
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
    return "\n".join(found)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other accounts may enter: as root, the embedded server runs as one of them."""
    with tempfile.TemporaryDirectory(prefix="recall-secrets-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.slow
async def test_the_process_list(
    database: str, db: Connection, endpoint: Endpoint, open_folder: Path
) -> None:
    """A daemon, one with its own PostgreSQL and all its children, and a command that waits: no
    secret is in anybody's command line."""
    secrets = {"RECALL_RUN_URL": endpoint.url, **SECRETS}
    async with Daemons(secrets) as daemons:
        one = await daemons.start(dsn=make_conninfo(database, password=HUSH))
        two = await daemons.start("--embedded", "--data", str(open_folder / "data"))
        async with connected(database) as holder:
            async with holder.transaction():
                await holder.execute("lock table session_recalls in access exclusive mode")
                waiting = asyncio.create_task(
                    asyncio.to_thread(
                        process,
                        None,
                        "list",
                        environ={"RECALL_DSN": make_conninfo(database, password=HUSH)},
                    )
                )
                await eventually(
                    db, "select from pg_stat_activity where application_name = 'recall-worker cli'"
                )
                lines = await asyncio.to_thread(command_lines)
        assert (await waiting).returncode == 0
        assert str(open_folder) in lines and " list" in lines and not pieces(lines)
        for daemon in (two, one):
            assert await daemon.stop(within=40) == 0
            assert not pieces(heard(daemon))


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["migrate", "--check"],
        ["run", "--run-url", "http://127.0.0.1:9/{session_id}", "--log-level", "x"],
    ],
)
def test_a_password_in_an_option(words: list[str], database: str) -> None:
    """A password that is given on the command line stands in the list of processes: that is told,
    and where it belongs."""
    dsn = make_conninfo(database, password=HUSH)
    said = operate(None, *words, "--dsn", dsn)
    note = [line for line in said.err.splitlines() if line.startswith("Note: ")]
    assert (
        len(note) == 1
        and "list of processes" in note[0]
        and "RECALL_DSN" in note[0]
        and not pieces(said.err + said.out)
    )
    assert "Note: " not in operate(None, *words, "--dsn", database).err
    assert "Note: " not in operate(dsn, *words).err

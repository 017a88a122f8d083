"""A password that is changed while a worker runs: it recovers by itself when the file has the new
one, and no signal that has something reloaded ends it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from recall_worker import schema
from recall_worker.embedded import EmbeddedServer

from ..conftest import Connection, connected
from ..support import postgres
from ..support.application import CREATE_TABLES, Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint, Gate
from .test_lease import eventually, promise

FIRST, SECOND = "first-word", "second-word"
NEVER_DEADLY = [
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGPIPE,
]


@pytest.fixture
def guarded() -> Iterator[EmbeddedServer]:
    """A PostgreSQL that asks for passwords over TCP, with the application's tables, adopted, and a
    worker's account."""
    server = postgres.embedded(tcp=True)
    with server:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
            schema.migrate(server.dsn())
            conn.execute(f"create role worker login password '{FIRST}'".encode())
            conn.execute("grant all on all tables in schema public to worker")
            conn.execute("grant all on all sequences in schema public to worker")
        yield server


async def change(db: Connection, password: str) -> None:
    """Change the worker's password and end its connections, as a failover or a pooler does."""
    await db.execute(f"alter role worker password '{password}'".encode())
    await db.execute(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity where usename = 'worker'"
    )


@pytest.mark.slow
async def test_a_password_is_changed(
    guarded: EmbeddedServer, endpoint: Endpoint, tmp_path: Path
) -> None:
    """The file is late, is missing, empty, half, wrong once, and then right: the same process goes
    on without being told, keeps its run, and no secret is in its log."""
    port = guarded.port
    base = urlsplit(guarded.dsn()).path
    path, gate = tmp_path / "dsn", Gate()
    endpoint.script("open", gate)

    def dsn(password: str) -> str:
        return f"postgresql://worker:{password}@127.0.0.1:{port}{base}"

    path.write_text(dsn(FIRST))
    environ = {"RECALL_DSN_FILE": str(path), "RECALL_RUN_URL": endpoint.url}
    async with (
        connected(guarded.dsn()) as db,
        await Application.connect(guarded.dsn()) as app,
        Daemons(environ) as daemons,
    ):
        daemon = await daemons.start(lease=30, poll_interval=1)
        await promise(app, "open", "once")
        await gate.entered.wait()
        await change(db, SECOND)
        lost = await daemon.hears("database.lost")
        path.unlink()
        await daemon.hears("secret.unreadable")
        path.write_text("")
        await daemon.hears("secret.unreadable", times=2)
        path.write_text(dsn("wrong-word"))
        await daemon.hears("secret.changed")
        path.write_text("postgresql://worker:second%")
        await daemon.hears("secret.unreadable", times=3)
        other = tmp_path / "other"
        other.write_text(dsn(SECOND))
        other.replace(path)
        await daemon.hears("database.found")
        await daemon.hears("listener.listening", times=2)
        gate.open()
        await daemon.hears("recall.settled", session="open", attempt=1)
        await promise(app, "after")
        await daemon.hears("recall.settled", session="after")
        assert len(lost) == len(daemon.told("database.lost")) == 1
        assert len(endpoint.requests) == 2
        assert await daemon.stop() == 0
        log = f"{daemon.events}{daemon.talk}"
        assert not [word for word in (FIRST, SECOND, "wrong-word", "second%") if word in log]


async def survives(daemon: Daemon, number: signal.Signals) -> None:
    """Send it, and see that the process is there and does what it is asked to."""
    heard = len(daemon.told("secrets.read"))
    daemon.signal(number)
    if number == signal.SIGHUP:
        await daemon.hears("secrets.read", times=heard + 1)
    else:
        # A signal that ends a process does so before the next one is delivered.
        daemon.signal(signal.SIGHUP)
        await daemon.hears("secrets.read", times=heard + 1)
    assert daemon.process.returncode is None


async def test_signals_that_never_end_it(
    app: Application, endpoint: Endpoint, daemons: Daemons, tmp_path: Path, database: str
) -> None:
    """With a run open, and while it drains: SIGHUP reads the secrets again and says which; the
    others do nothing."""
    path, gate = tmp_path / "dsn", Gate()
    path.write_text(database)
    endpoint.script("s", gate)
    daemons.environ.pop("RECALL_DSN")
    daemon = await daemons.start(dsn_file=path)
    await promise(app, "s", "once")
    await gate.entered.wait()
    for number in NEVER_DEADLY:
        await survives(daemon, number)
    daemon.signal(signal.SIGTERM)
    await daemon.hears("worker.draining")
    for number in NEVER_DEADLY:
        await survives(daemon, number)
    gate.open()
    assert await daemon.exit() == 0
    assert daemon.told("secrets.read")[0]["settings"] == ["RECALL_DSN"]
    assert daemon.told("recall.settled", session="s", attempt=1)
    assert daemon.talk == []


async def test_signals_while_it_starts(daemons: Daemons, db: Connection) -> None:
    """From when its signals are set, long before the loop turns: it starts all the same."""
    daemon = await daemons.start(ready=False)
    status = Path(f"/proc/{daemon.pid}/status")

    def ignores_all() -> bool:
        # Of all: SIGHUP alone may have been ignored by whoever started the tests (nohup).
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("SigIgn:")]
        ignored = int(line.split()[1], 16)
        return all(ignored & 1 << (number - 1) for number in NEVER_DEADLY)

    while not ignores_all() and not daemon.events:
        await db.execute("select pg_sleep(0.002)")
    for number in NEVER_DEADLY:
        for _ in range(5):
            os.kill(daemon.pid, number)
    await daemon.hears("listener.listening")
    await eventually(db, "select 1 from recall_workers")
    assert await daemon.stop() == 0

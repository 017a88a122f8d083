"""Who is compared: how each one's schema is made, how rows are written for it, and how its workers
are started.

The statements are what each library's own "defer", "enqueue" or "add_job" sends, with
`%(session)s`, `%(message)s` and `%(due)s` (null: now). Where that is no single statement, a process
of the library's own client writes (`Writer`).
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import psycopg

from .ground import ROOT, Ground, Redis, cpu, run, tree
from .peers import MESSAGE

OURS, CAPPED = "recall-worker", "PgQueuer, by its own cap"
LOOP, HTTPX_LOOP, BARE = "bare loop", "bare httpx loop", "bare worker"


@dataclass(frozen=True)
class Contender:
    name: str
    one: str
    """Writes one row. Empty: `writer` does."""
    many: str
    """Writes `%(n)s` rows, their sessions named `%(session)s` and a number."""
    install: Callable[[Ground, str], None]
    command: Callable[[Ground, str, str, int], tuple[list[str], dict[str, str]]]
    """(ground, dsn, url, slots) → arguments and further environment."""
    speed: int
    """More runs a second than it can do: so many rows are written for each second."""
    writer: Callable[[Ground, str], tuple[list[str], dict[str, str]]] | None = None
    """(ground, dsn) → arguments and further environment of the process that writes its rows."""
    redis: bool = False
    """Its rows are in Redis: the DSN is that of a Redis of its own."""


class Writer:
    """A process that writes rows by a library's own client.

    A line on its stdin is `{"session": …, "due": … or null}`, with `"rows"` where so many are
    wanted, their sessions named `session` and a number from 1. It answers `{"at": …}` once they are
    written: nanoseconds of the monotonic clock, which all processes of a host share.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> None:
        self._log = log
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            bufsize=1,
        )

    def write(self, session: str, due: datetime | None, **rows: int) -> int:
        """Write, and return the instant at which that was done. Raises RuntimeError if the process
        has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"session": session, "due": due and due.isoformat()} | rows
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            said = Path(self._log.name).read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the writer has ended: {said}")
        return int(json.loads(answer)["at"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._log.close()


def _ours_install(ground: Ground, dsn: str) -> None:
    arguments, more = _ours("migrate")(ground, dsn, "http://127.0.0.1/", 1)
    subprocess.run(arguments, env=_environment(more), check=True, capture_output=True)


def _ours(command: str) -> Callable[[Ground, str, str, int], tuple[list[str], dict[str, str]]]:
    def made(ground: Ground, dsn: str, url: str, slots: int) -> tuple[list[str], dict[str, str]]:
        settings = {"RECALL_DSN": dsn, "RECALL_RUN_URL": url, "RECALL_CONCURRENCY": str(slots)}
        return [sys.executable, "-m", "recall_worker", command], settings | {
            "PYTHONPATH": str(ground.installed)
        }

    return made


def _python(name: str) -> Callable[[Ground, str, str, int], tuple[list[str], dict[str, str]]]:
    return lambda ground, dsn, url, slots: (
        [sys.executable, "-m", "benchmarks.peers", name, dsn, url, str(slots)],
        {"PYTHONPATH": str(ROOT)},
    )


def _procrastinate_install(ground: Ground, dsn: str) -> None:
    import procrastinate

    app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=dsn))
    with app.open():
        app.schema_manager.apply_schema()


def _pgqueuer_install(ground: Ground, dsn: str) -> None:
    import asyncpg
    from pgqueuer.db import AsyncpgDriver
    from pgqueuer.queries import Queries

    async def install() -> None:
        connection = await asyncpg.connect(dsn)
        queries = Queries(AsyncpgDriver(connection))
        await queries.install()
        await queries.optimize_autovacuum()
        await connection.close()

    asyncio.run(install())


def _needs(module: str) -> None:
    """Raises ImportError if it is not installed."""
    importlib.import_module(module)


def _graphile_install(ground: Ground, dsn: str) -> None:
    run(
        ground.node,
        str(ground.npm / "node_modules/graphile-worker/dist/cli.js"),
        "--schema-only",
        "-c",
        dsn,
    )


def _apart(name: str, speed: int, key: str, *, redis: bool = False) -> Contender:
    """A peer of peers_apart.py."""

    def command(ground: Ground, what: str, *words: str) -> tuple[list[str], dict[str, str]]:
        arguments = [str(ground.apart), "-m", "benchmarks.peers_apart", key, what, *words]
        return arguments, {"PYTHONPATH": str(ROOT)}

    return _written(name, speed, command, redis=redis)


def _pgboss(ground: Ground, what: str, *words: str) -> tuple[list[str], dict[str, str]]:
    return [ground.node, str(ground.npm / "pgboss.mjs"), what, *words], {}


def _written(
    name: str,
    speed: int,
    command: Callable[..., tuple[list[str], dict[str, str]]],
    *,
    redis: bool = False,
) -> Contender:
    """A peer whose schema, writer and worker are one program."""

    def install(ground: Ground, dsn: str) -> None:
        if redis:
            run("redis-server", "--version")
        arguments, more = command(ground, "schema", dsn)
        subprocess.run(
            arguments, env=_environment(more), check=True, capture_output=True, text=True
        )

    return Contender(
        name,
        "",
        "",
        install,
        lambda ground, dsn, url, slots: command(ground, "work", dsn, url, str(slots)),
        speed,
        lambda ground, dsn: command(ground, "write", dsn),
        redis,
    )


_COLUMNS = """insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds,
    internal_comment, additional_context_message, status, created_at, updated_at)"""
_JOB = "jsonb_build_object('session', {}, 'message', %(message)s::text)"
_PGQUEUER = """with made as (
    insert into pgqueuer (priority, entrypoint, payload, execute_after, status)
    select 0, 'call', convert_to({}::text, 'UTF8'), coalesce(%(due)s::timestamptz, now()),
        'queued'{}
    returning id, entrypoint, priority
)
insert into pgqueuer_log (job_id, status, entrypoint, priority)
    select id, 'queued', entrypoint, priority from made"""
_SERIES = " from generate_series(1, %(n)s) n"
_NTH = "%(session)s::text || n"
_RECALL = f"""{_COLUMNS} values (%(session)s, %(session)s, 'once',
    coalesce(%(due)s::timestamptz, now()), null, null, %(message)s, 'pending', now(), now())"""
_RECALLS = f"""{_COLUMNS} select {_NTH}, {_NTH}, 'once',
    coalesce(%(due)s::timestamptz, now()), null, null, %(message)s, 'pending', now(), now(){_SERIES}
"""

CONTENDERS = {
    made.name: made
    for made in (
        Contender(OURS, _RECALL, _RECALLS, _ours_install, _ours("run"), 12000),
        Contender(
            "procrastinate",
            f"""select procrastinate_defer_jobs_v1(array[row('default', 'call', 0, null, null,
                {_JOB.format("%(session)s::text")},
                %(due)s::timestamptz)::procrastinate_job_to_defer_v1])""",
            f"""select procrastinate_defer_jobs_v1(array_agg(row('default', 'call', 0, null, null,
                {_JOB.format(_NTH)},
                %(due)s::timestamptz)::procrastinate_job_to_defer_v1)){_SERIES}""",
            _procrastinate_install,
            _python("procrastinate"),
            2000,
        ),
        Contender(
            "PgQueuer",
            _PGQUEUER.format(_JOB.format("%(session)s::text"), ""),
            _PGQUEUER.format(_JOB.format(_NTH), _SERIES),
            _pgqueuer_install,
            _python("pgqueuer"),
            12000,
        ),
        Contender(
            "graphile-worker",
            (
                "select graphile_worker.add_job('call', "
                f"{_JOB.format('%(session)s::text')}::json, run_at => %(due)s::timestamptz)"
            ),
            f"""select count(*) from graphile_worker.add_jobs((select array_agg(('call',
                {_JOB.format(_NTH)}::json, null, %(due)s::timestamptz, null, null, null,
                null)::graphile_worker.job_spec){_SERIES}))""",
            _graphile_install,
            lambda ground, dsn, url, slots: (
                [ground.node, str(ground.npm / "graphile.mjs"), dsn, url, str(slots)],
                {},
            ),
            16000,
        ),
        _written("pg-boss", 12000, _pgboss),
        _apart("APScheduler", 1000, "apscheduler"),
        _apart("Celery", 3000, "celery", redis=True),
        _apart("DBOS", 1500, "dbos"),
        _apart("absurd", 2000, "absurd"),
        Contender(
            CAPPED,
            _PGQUEUER.format(_JOB.format("%(session)s::text"), ""),
            _PGQUEUER.format(_JOB.format(_NTH), _SERIES),
            _pgqueuer_install,
            _python("pgqueuer-capped"),
            12000,
        ),
        Contender(BARE, _RECALL, _RECALLS, _ours_install, _python("bare"), 0),
        Contender(LOOP, "", "", lambda ground, dsn: None, _python("loop"), 0),
        Contender(
            HTTPX_LOOP,
            "",
            "",
            lambda ground, dsn: _needs("httpx_aiohttp"),
            _python("loop-httpx"),
            0,
        ),
    )
}
PEERS = tuple(name for name in CONTENDERS if name not in (OURS, BARE, LOOP, HTTPX_LOOP, CAPPED))


class Field:
    """A contender on its own database: rows are written, workers started."""

    def __init__(self, ground: Ground, contender: Contender, dsn: str) -> None:
        self.ground = ground
        self.contender = contender
        self.dsn = dsn
        self.processes: list[subprocess.Popen[bytes]] = []
        self._logs: list[IO[bytes]] = []
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.redis = Redis(ground.scratch / "redis") if contender.redis else None
        self._warmed = 0

    @cached_property
    def _writer(self) -> Writer:
        assert self.contender.writer is not None
        arguments, more = self.contender.writer(self.ground, self._where)
        log = (self.ground.scratch / f"log-writer-{id(self)}").open("wb")
        return Writer(arguments, _environment(more), log)

    @property
    def _where(self) -> str:
        return self.redis.dsn if self.redis is not None else self.dsn

    def end_writing(self) -> None:
        """Close what only writes: no row can be written afterwards."""
        if "_writer" in self.__dict__:
            self._writer.close()
            del self.__dict__["_writer"]
        self.connection.close()

    def close(self) -> None:
        """End its workers and all that writes."""
        self.stop()
        self.end_writing()
        if self.redis is not None:
            self.redis.close()

    def insert(self, session: str, due: datetime | None = None) -> int:
        """Write one row; returns the monotonic instant at which its commit was known."""
        if self.contender.writer is not None:
            return self._writer.write(session, due)
        self.connection.execute(
            self.contender.one, {"session": session, "message": MESSAGE, "due": due}
        )
        return time.monotonic_ns()

    def fill(self, session: str, rows: int, due: datetime | None = None) -> None:
        """Write many rows, some thousands in one transaction."""
        for start in range(0, rows, 5000):
            if self.contender.writer is not None:
                self._writer.write(f"{session}{start}-", due, rows=min(5000, rows - start))
                continue
            self.connection.execute(
                self.contender.many,
                {
                    "session": f"{session}{start}-",
                    "message": MESSAGE,
                    "due": due,
                    "n": min(5000, rows - start),
                },
            )

    def start(self, slots: int, workers: int = 1, **settings: Any) -> None:
        """Start workers. `settings` of ours: lease=30 becomes RECALL_LEASE."""
        arguments, more = self.contender.command(
            self.ground, self._where, self.ground.sink.url, slots
        )
        more |= {f"RECALL_{name.upper()}": str(value) for name, value in settings.items()}
        for _ in range(workers):
            log = (self.ground.scratch / f"log-{len(self.processes)}").open("wb")
            self._logs.append(log)
            self.processes.append(
                subprocess.Popen(
                    arguments,
                    env=_environment(more),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.ground.scratch,
                )
            )

    def settle_down(self, within: float = 60.0) -> None:
        """Wait until all workers run: a first row was called, and no more connections open."""
        self.ground.sink.reset()
        self._warmed += 1
        self.insert(f"p-warm-{self._warmed}")
        if not self.ground.sink.wait(within, probes=1)["probes"]:
            raise RuntimeError(f"{self.contender.name} does not call: {self.log()[-2000:]}")
        before, since = -1, time.monotonic()
        while time.monotonic() - since < 1.5:
            now = self.connections()
            if now < len(self.processes) or now != before:
                before, since = now, time.monotonic()
            time.sleep(0.1)
        self.ground.sink.reset()

    def pids(self) -> list[int]:
        return [pid for process in self.processes for pid in tree(process.pid)]

    def cpu(self) -> float:
        return cpu(self.pids())

    def server_cpu(self) -> float:
        """Seconds of CPU that PostgreSQL has used, or its Redis."""
        return self.redis.cpu() if self.redis is not None else self.ground.postgres_cpu()

    def transactions(self) -> int:
        """Transactions so far, or commands to its Redis."""
        if self.redis is not None:
            return self.redis.commands()
        return self.ground.transactions(self.dsn)

    def connections(self) -> int:
        """Connections to its database, ours and the writer's included, or to its Redis."""
        if self.redis is not None:
            return self.redis.connections()
        database = psycopg.conninfo.conninfo_to_dict(self.dsn)["dbname"]
        row = self.ground.maintenance.execute(
            "select count(*) from pg_stat_activity where datname = %s", [database]
        ).fetchone()
        assert row is not None
        return int(row[0])

    def log(self) -> str:
        return (self.ground.scratch / "log-0").read_text(errors="replace")

    def stop(self, kill: bool = True) -> None:
        """End all workers: at once, as most measurements leave rows that nobody needs."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        for process in self.processes:
            process.wait()
        for log in self._logs:
            log.close()
        self.processes.clear()
        self._logs.clear()

    def scalar(self, statement: str) -> Any:
        row = self.connection.execute(statement.encode()).fetchone()
        return None if row is None else row[0]


class Contest:
    """The contenders whose packages are installed; their empty databases are created once."""

    def __init__(self, ground: Ground, peers: Sequence[str] | None = None) -> None:
        self.ground = ground
        self._wanted = PEERS if peers is None else peers
        self.missing: dict[str, str] = {}
        self._templates: dict[str, str] = {}

    @contextmanager
    def field(self, name: str) -> Iterator[Field]:
        """A contender on a new database of its own. Raises LookupError if it is not installed."""
        contender = CONTENDERS[name]
        with self.ground.database(self._template(contender)) as dsn:
            field = Field(self.ground, contender, dsn)
            try:
                yield field
            finally:
                field.close()

    def present(self, *names: str) -> list[str]:
        """Those of them that are installed here."""
        found = []
        for name in names:
            if name in self.missing or (name in PEERS and name not in self._wanted):
                continue
            try:
                self._template(CONTENDERS[name])
                found.append(name)
            except (ImportError, OSError, subprocess.CalledProcessError) as error:
                said = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
                lines = said.strip().splitlines() if said else [str(error)]
                last = lines[-1] if lines else ""
                self.missing[name] = f"{type(error).__name__}: {last}"
        return found

    def _template(self, contender: Contender) -> str:
        if contender.name not in self._templates:
            name = "template_" + re.sub(r"\W+", "_", contender.name).lower()
            self.ground.maintenance.execute(f'create database "{name}"'.encode())
            contender.install(self.ground, self.ground.server.dsn(name))
            self._templates[contender.name] = name
        return self._templates[contender.name]


def _environment(more: dict[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RECALL_", "PG", "PYTHON"))}
    return (
        kept
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        | more
    )


def rotated(names: list[str], round: int) -> list[str]:
    """The names, beginning with another one each round."""
    turn = round % len(names) if names else 0
    return names[turn:] + names[:turn]

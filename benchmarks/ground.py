"""What all measurements share: PostgreSQL, the sink, the installed packages, the kernel's clocks.

Never here: what is measured (measures/), who is compared (contenders.py).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import sql

from recall_worker.embedded import EmbeddedServer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
Connection = psycopg.Connection[tuple[Any, ...]]


def commit() -> str:
    """The commit of this checkout, with `-dirty` where a tracked file has changed since; `unknown`
    where there is no Git.
    """
    words = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


class Sink:
    """The sink's process. Times are monotonic nanoseconds, as time.monotonic_ns() gives."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "sink.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.url = f"http://127.0.0.1:{self._read()['port']}/s/{{session_id}}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def _ask(self, do: str, **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        return self._read()

    def reset(self, hold: float = 0.0) -> None:
        """Forget all arrivals; from now on hold sessions named h… for so many seconds."""
        self._ask("reset", hold=hold)

    def state(self) -> dict[str, Any]:
        return self._ask("state")

    def wait(self, within: float, **least: int) -> dict[str, Any]:
        """Wait until so many arrivals (`count`), `probes`, or calls that are `held`; returns the
        state, reached or not.
        """
        return self._ask("wait", within=within, **least)

    def between(self, since: int, until: int) -> int:
        """The number of requests that arrived in this span."""
        return int(self._ask("between", since=since, until=until)["count"])

    def probes(self) -> dict[str, int]:
        """When each probe (a session named p…) arrived first."""
        return self._ask("probes")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Redis:
    """A Redis of its own, as Debian configures it: it writes a snapshot now and then, so that what
    was written since is lost in a crash. Raises OSError where redis-server is missing.
    """

    def __init__(self, directory: Path) -> None:
        self._place = directory / "redis"
        directory.mkdir(exist_ok=True)
        self.dsn = f"redis+socket://{self._place}"
        self._process = subprocess.Popen(
            [
                *("redis-server", "--port", "0", "--unixsocket", str(self._place)),
                *("--dir", str(directory), "--save", "3600 1 300 100 60 10000"),
            ],
            stdout=subprocess.DEVNULL,
        )
        while not self._place.exists():
            if self._process.poll() is not None:
                raise OSError(f"redis-server ended with {self._process.returncode}")
            time.sleep(0.02)

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        return cpu([self._process.pid])

    def commands(self) -> int:
        """Commands that it has executed so far."""
        return self._counted(b"total_commands_processed")

    def connections(self) -> int:
        """Connections besides the one that asks."""
        return self._counted(b"connected_clients") - 1

    def _counted(self, name: bytes) -> int:
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self._place))
            line.sendall(b"INFO\r\n")
            answer = b""
            while name + b":" not in answer or b"\r\n# Keyspace" not in answer:
                answer += line.recv(65536)
        return int(answer.split(name + b":")[1].split(b"\r\n")[0])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self._place.parent, ignore_errors=True)


OWN_IDENTITY = """
do $$ begin
    if to_regclass('recall_identity') is not null then
        update recall_identity set database_oid = (
            select oid::bigint from pg_database where datname = current_database()
        );
    end if;
end $$
"""
"""A database made of a template is no copy: workers would claim nothing on one."""


class Ground:
    """PostgreSQL and the sink, for as long as the block runs."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self._numbers = count(1)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.scratch = Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="recall-bench-", dir="/var/tmp")
                )
            )
            self.scratch.chmod(0o711)
            # A given directory is kept, so fsync and all other settings are PostgreSQL's defaults.
            self.server = stack.enter_context(
                EmbeddedServer(self.scratch / "pg", settings={"max_connections": "500"})
            )
            self.sink = Sink()
            stack.callback(self.sink.close)
            self.maintenance: Connection = stack.enter_context(
                psycopg.connect(self.server.dsn(), autocommit=True)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    # --- databases --------------------------------------------------------------------------------

    @contextmanager
    def database(self, template: str = "template0") -> Iterator[str]:
        """A database for as long as the block runs: its DSN."""
        name = f"bench_{next(self._numbers)}"
        self.maintenance.execute(
            sql.SQL("create database {} template {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
        try:
            with psycopg.connect(self.server.dsn(name), autocommit=True) as conn:
                conn.execute(OWN_IDENTITY.encode())
            yield self.server.dsn(name)
        finally:
            self.maintenance.execute(
                sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
            )
            # The next one should not pay for this one's unwritten pages.
            self.maintenance.execute("checkpoint")

    def transactions(self, dsn: str) -> int:
        """Transactions of this database so far, as PostgreSQL counts them: a backend reports its
        own within a second.
        """
        name = psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]
        self.maintenance.execute("select pg_stat_clear_snapshot()")
        row = self.maintenance.execute(
            "select xact_commit + xact_rollback from pg_stat_database where datname = %s", [name]
        ).fetchone()
        assert row is not None
        return int(row[0])

    def postgres_cpu(self) -> float:
        """Seconds of CPU that PostgreSQL's living processes have used."""
        return cpu(self.server.processes())

    # --- what is installed ------------------------------------------------------------------------

    @cached_property
    def cache(self) -> Path:
        given = os.environ.get("BENCH_CACHE")
        place = (
            Path(given)
            if given
            else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            / "recall-worker-benchmarks"
        )
        place.mkdir(parents=True, exist_ok=True)
        return place

    @cached_property
    def installed(self) -> Path:
        """Where the wheel of this checkout is installed, without its dependencies, which are this
        interpreter's.
        """
        digest = hashlib.sha256()
        for path in sorted(
            [
                ROOT / "pyproject.toml",
                *(ROOT / "recall_worker").rglob("*.py"),
                *(ROOT / "sql").rglob("*.sql"),
            ]
        ):
            digest.update(path.read_bytes())
        place = self.cache / f"wheel-{digest.hexdigest()[:12]}"
        if not place.exists():
            for old in self.cache.glob("wheel-*"):
                shutil.rmtree(old, ignore_errors=True)
            run(
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                f"{place}.new",
                str(ROOT),
            )
            Path(f"{place}.new").rename(place)
        return place

    @cached_property
    def apart(self) -> Path:
        """The interpreter of the environment of `peers.txt`, in which peers_apart.py runs. Raises
        CalledProcessError where pip cannot install it.
        """
        wanted = HERE / "peers.txt"
        place = self.cache / f"peers-{hashlib.sha256(wanted.read_bytes()).hexdigest()[:12]}"
        if not place.exists():
            for old in self.cache.glob("peers-*"):
                shutil.rmtree(old, ignore_errors=True)
            made = Path(f"{place}.new")
            run(sys.executable, "-m", "venv", str(made))
            run(str(made / "bin" / "pip"), "install", "--quiet", "--pre", "-r", str(wanted))
            # An environment knows its own path only in its scripts, which nobody calls.
            made.rename(place)
        return place / "bin" / "python"

    @cached_property
    def node(self) -> str:
        """Node.js, out of that environment: the same version everywhere."""
        return self._apart("node").strip()

    @cached_property
    def npm(self) -> Path:
        """Where the npm packages of package.json are installed, with our scripts beside them.
        Raises CalledProcessError where they cannot be installed.
        """
        place = self.cache / "npm"
        place.mkdir(exist_ok=True)
        wanted = (HERE / "package.json").read_bytes()
        kept = place / "package.json"
        if (
            not kept.exists()
            or kept.read_bytes() != wanted
            or not (place / "node_modules").exists()
        ):
            kept.write_bytes(wanted)
            options = ("--silent", "--no-audit", "--no-fund", "--prefix", str(place))
            self._apart("npm", "install", *options)
        for script in HERE.glob("*.mjs"):
            shutil.copy(script, place)
        return place

    def _apart(self, *words: str) -> str:
        command = [str(self.apart), "-m", "benchmarks.peers_apart", *words]
        return subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def machine(self) -> dict[str, str]:
        """The machine and the versions of the measurement: no names of hosts, no paths."""
        packages = (
            "recall-worker",
            "psycopg",
            "aiohttp",
            "procrastinate",
            "pgqueuer",
            "asyncpg",
            "uvloop",
        )
        found = {
            "measured": time.strftime("%Y-%m-%d", time.gmtime()),
            "CPU": processor(),
            "cores": str(os.cpu_count()),
        }
        found["memory"] = (
            f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
        )
        found["system"] = f"{platform.system()} {platform.release().split('-')[0]}"
        row = self.maintenance.execute(
            "select current_setting('server_version'), current_setting('fsync')"
        ).fetchone()
        assert row is not None
        found["PostgreSQL"], found["fsync"] = str(row[0]), str(row[1])
        found["Python"] = platform.python_version()
        for name in packages:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "not installed"
        try:
            found["Node.js"] = run(self.node, "--version").strip().removeprefix("v")
            for name in ("graphile-worker", "pg-boss"):
                package = self.npm / "node_modules" / name / "package.json"
                found[name] = json.loads(package.read_text())["version"]
            for line in (HERE / "peers.txt").read_text().splitlines():
                name, _, version = line.partition("==")
                if name in ("APScheduler", "absurd-sdk", "celery[redis]", "dbos"):
                    found[name] = version
        except (OSError, subprocess.CalledProcessError):
            found["peers of peers.txt and package.json"] = "not installed"
        try:
            found["Redis"] = run("redis-server", "--version").split("v=")[1].split()[0]
        except (OSError, subprocess.CalledProcessError):
            found["Redis"] = "not installed"
        return found


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def cpu(pids: Iterable[int]) -> float:
    """Seconds of CPU that these processes have used, by all of their threads, to the nanosecond."""
    total = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                total += int(thread.read_text().split()[0])
            except (OSError, ValueError):
                pass  # It has ended since.
    return total / 1e9


def memory(pid: int) -> float:
    """MiB that a process holds resident."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    fields = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
    return int(fields["Rss"]) / 1024


def tree(pid: int) -> list[int]:
    """A process and its children."""
    children = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += [int(word) for word in path.read_text().split()]
        except OSError:
            pass
    return [pid, *(below for child in children for below in tree(child))]

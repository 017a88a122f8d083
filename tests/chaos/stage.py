"""The stage: a PostgreSQL that may be killed, stopped and filled up, replicas from the wheel, and a
proxy before everything they talk to; beside them the console and the MCP server, from the same
wheel, with ways of their own.

Each replica has its own way to the database (which can be cut for it alone) and its own clock
(faketime, where it is installed); the way to the API is one for all. Whoever dies is started again
after a moment, as a service manager does.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psycopg

from recall_worker import schema
from recall_worker.embedded import EmbeddedServer

from ..support.application import create_tables
from ..support.daemon import FAKETIME
from ..support.planted import plant
from ..support.proxy import Proxy
from .api import Api
from .drawn import Drawn

ROOT = Path(__file__).parents[2]
POSTGRES = {
    "max_connections": "60",
    "max_wal_size": "128MB",
    "min_wal_size": "32MB",
    "wal_recycle": "off",
}
ROOM_MB = 700
RESTART_AFTER = 0.5
SPINS_SHARE, SPINS_FOR = 0.5, 8.0
"""A worker that takes more of a core than this, or never sleeps, for so many seconds on end, does
not work: it spins."""
STARTED_RESTS = 20
GAUGED_EVERY = 0.1
STOOD = 0.25
"""Seconds from which on it is noted that the machine stood still."""
UP_WITHIN = 180.0
"""Seconds in which everybody is at work, on a machine that does much else."""
USER_HEADER = "X-Forwarded-User"
"""Who asks the console, as a proxy before it says: each operation is a user of its own."""
TOKEN_KEY = "of-the-audit-alone-0123456789abcdef"
SERVICES = {
    "console": {
        "RECALL_CONSOLE_USER_HEADER": USER_HEADER,
        "RECALL_CONSOLE_TRUSTED": "127.0.0.1/32",
        "RECALL_CONSOLE_MESSAGES": "shown",
    },
    "mcp": {
        "RECALL_TOKEN_KEY": TOKEN_KEY,
        "RECALL_AGENT_INTERVAL": "1",
        "RECALL_AGENT_LIMIT": "100000/h,100000/d",
    },
}
DEBIAN = "/usr/lib/postgresql/{}/bin"
AUDITED = ("recall_worker", "sql", "pyproject.toml", "README.md", "LICENSE")
"""What the wheel is built from."""


def commit() -> str | None:
    """The commit of this tree, with `-dirty` where what the wheel is built from, or the audit,
    differs from it; None where git does not know this tree."""

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        changed = ask("status", "--porcelain", "--", *AUDITED, "tests/chaos")
        return ask("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def install(folder: Path, defect: Path | None = None) -> Path:
    """Build the wheel of this checkout, or of a copy of it with a planted defect; the folder in
    which it is installed."""
    source = ROOT
    if defect is not None:
        source = folder / "source"
        # Its bill of materials is part of the wheel.
        for name in (*AUDITED, "release"):
            if (ROOT / name).is_dir():
                shutil.copytree(
                    ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy(ROOT / name, source)
        plant(defect, source)
    wheels, site = folder / "wheel", folder / "site"
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (wheel,) = wheels.glob("*.whl")
    words = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(words, check=True, capture_output=True)
    where = [sys.executable, "-c", "import recall_worker; print(recall_worker.__file__)"]
    seen = subprocess.run(
        where,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.startswith(str(site)), "not the wheel would run"
    return site


def binaries(drawn: Drawn) -> str | None:
    """The folder of PostgreSQL's binaries: what RECALL_TEST_PG_BINDIR says, else those of the
    version that was drawn, where the system has it; None for the wheel's."""
    if given := os.environ.get("RECALL_TEST_PG_BINDIR"):
        return given
    folder = Path(DEBIAN.format(drawn.postgres))
    return str(folder) if (folder / "initdb").exists() else None


@dataclass(slots=True, eq=False)
class Service:
    """The console, or the MCP server: a process, and the next one after it died."""

    name: str
    port: int
    log: Path
    process: asyncio.subprocess.Process | None = None
    statuses: list[int] = field(default_factory=list)
    """Exit statuses of those that ended unasked."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)

    def is_ready(self) -> bool:
        event = f'"event": "{self.name}.listening"'
        return self.log.exists() and event in self.log.read_text(errors="replace")

    def tracebacks(self) -> int:
        return self.log.read_text(errors="replace").count("Traceback")


@dataclass(slots=True, eq=False)
class Replica:
    """One slot: a daemon, and the next one after it died."""

    slot: str
    proxy: Proxy
    clock: Path
    log: Path
    process: asyncio.subprocess.Process | None = None
    stopped: bool = False
    starts: int = 0
    statuses: list[int] = field(default_factory=list)
    """Exit statuses of those that ended unasked."""

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def ends(self, statuses: int) -> None:
        """Wait until one more than so many daemons of this slot have ended."""
        while True:
            if len(self.statuses) > statuses:
                return
            await asyncio.sleep(0.05)

    def is_ready(self) -> bool:
        return self.log.exists() and bool(self.events("worker.ready"))

    def events(self, name: str) -> list[dict[str, Any]]:
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            if f'"event": "{name}"' in line:
                with suppress(ValueError):
                    found.append(json.loads(line))
        return found


class Stage:
    def __init__(self, api: Api, site: Path, folder: Path, drawn: Drawn) -> None:
        self.api = api
        self.folder = folder
        self.site = site
        self.drawn = drawn
        self.replicas: list[Replica] = []
        self.services: list[Service] = []
        self.spins: list[str] = []
        """Workers that turned without a rest, in words."""
        self.stands: list[tuple[float, float]] = []
        """When this process got nothing of the machine: the workers, which have the same rights,
        fare no better."""
        self._stack = AsyncExitStack()
        self._keeping: list[asyncio.Task[None]] = []
        self._is_over = False
        self._mounted: Path | None = None
        self.has_room = False
        """Whether the database lies on a small file system of its own, which can be filled up."""

    async def __aenter__(self) -> Self:
        base = self.folder / "pg"
        base.mkdir()
        base.chmod(0o755)
        if await asyncio.to_thread(_mount, base):
            self._mounted, self.has_room = base, True
        # A directory that is given is kept, also where a start fails, as it does on a disk that is
        # full.
        self.server = EmbeddedServer(
            base / "data", bindir=binaries(self.drawn), port=_port(), settings=POSTGRES
        )
        await asyncio.to_thread(self.server.start)
        self.dsn = self.server.dsn("postgres", tcp=True)
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            # The MCP server names no id: a column of another type than text has to give one itself.
            given = " generated by default as identity" if self.drawn.ids == "bigint" else ""
            conn.execute(create_tables(self.drawn.ids + given, self.drawn.ids).encode())
            self.version = conn.info.server_version // 10000
        await asyncio.to_thread(
            lambda: schema.migrate(self.dsn, pending_most=self.drawn.pending_most)
        )
        self.way = await self._stack.enter_async_context(
            Proxy(f"host=127.0.0.1 port={self.api.port}")
        )
        for n in range(self.drawn.replicas):
            proxy = await self._stack.enter_async_context(Proxy(self.dsn))
            replica = Replica(f"w{n}", proxy, self.folder / f"clock{n}", self.folder / f"w{n}.log")
            # One of them is hours off from the start.
            replica.clock.write_text("-5h" if n == 1 else "+0")
            self.replicas.append(replica)
            self._keeping.append(asyncio.create_task(self._keep(replica)))
        for name in SERVICES:
            service = Service(name, _port(), self.folder / f"{name}.log")
            self.services.append(service)
            self._keeping.append(asyncio.create_task(self._serve(service)))
        self._keeping.append(asyncio.create_task(self._watch()))
        self._keeping.append(asyncio.create_task(self._gauge()))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_over = True
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        for replica in self.replicas:
            replica.signal(signal.SIGKILL)
            replica.signal(signal.SIGCONT)
            if replica.process is not None:
                await replica.process.wait()
        for service in self.services:
            service.signal(signal.SIGKILL)
            if service.process is not None:
                await service.process.wait()
        await self._stack.aclose()
        await asyncio.to_thread(self.server.stop)
        if self._mounted is not None:
            await asyncio.to_thread(
                subprocess.run, ["umount", "-l", str(self._mounted)], check=False
            )

    async def _keep(self, replica: Replica) -> None:
        """The service manager of one slot."""
        environ = {
            k: v for k, v in os.environ.items() if not k.startswith("RECALL_")
        } | self.drawn.environment
        environ |= {
            "PYTHONPATH": str(self.site),
            "RECALL_DSN": replica.proxy.dsn,
            "RECALL_QUEUE": ",".join(self.drawn.serves(self.replicas.index(replica))),
            "RECALL_RUN_URL": f"http://127.0.0.1:{self.way.port}/{replica.slot}/sessions/{{session_id}}/run",
        }
        if FAKETIME:
            environ |= {
                "LD_PRELOAD": FAKETIME,
                "FAKETIME_TIMESTAMP_FILE": str(replica.clock),
                "FAKETIME_NO_CACHE": "1",
                "DONT_FAKE_MONOTONIC": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        while not self._is_over:
            with replica.log.open("ab") as log:
                replica.process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "recall_worker",
                    "run",
                    cwd="/",
                    env=environ,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            replica.starts += 1
            status = await replica.process.wait()
            replica.statuses.append(status)
            await asyncio.sleep(RESTART_AFTER)

    async def _serve(self, service: Service) -> None:
        """The service manager of the console, or of the MCP server."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
        environ |= SERVICES[service.name] | {
            "PYTHONPATH": str(self.site),
            "RECALL_DSN": self.dsn,
            "RECALL_LOG_FORMAT": "json",
        }
        words = ["mcp", "--http", f"127.0.0.1:{service.port}"]
        if service.name == "console":
            words = ["console"]
            environ["RECALL_CONSOLE_LISTEN"] = f"127.0.0.1:{service.port}"
        while not self._is_over:
            with service.log.open("ab") as log:
                service.process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "recall_worker",
                    *words,
                    cwd="/",
                    env=environ,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            service.statuses.append(await service.process.wait())
            await asyncio.sleep(RESTART_AFTER)

    def service(self, name: str) -> Service:
        return next(service for service in self.services if service.name == name)

    async def _watch(self) -> None:
        """Look each second what each worker does: one whose loop never rests is of no use, and says
        nothing of it."""
        since: dict[int, float] = {}
        before: dict[int, tuple[float, float, int]] = {}
        told: set[int] = set()
        while True:
            for replica in self.replicas:
                process = replica.process
                used = (
                    _used(process.pid)
                    if process is not None and process.returncode is None
                    else None
                )
                if process is None or used is None:
                    continue
                pid, now = process.pid, time.monotonic()
                then, seconds, rests = before.get(pid, (now, *used))
                before[pid] = now, *used
                # On a machine that does much else it gets less than it would take. While it starts
                # it only computes.
                spins = used[0] - seconds > SPINS_SHARE * (now - then) or (
                    used[1] == rests and used[0] > seconds
                )
                if now == then or not spins or rests < STARTED_RESTS:
                    since.pop(pid, None)
                elif now - since.setdefault(pid, then) >= SPINS_FOR and pid not in told:
                    told.add(pid)
                    self.spins.append(f"{replica.slot} did not rest for {now - since[pid]:.0f} s")
            await asyncio.sleep(1)

    async def _gauge(self) -> None:
        """Measure how long the machine keeps us waiting."""
        while True:
            since = time.monotonic()
            await asyncio.sleep(GAUGED_EVERY)
            late = time.monotonic() - since - GAUGED_EVERY
            if late > STOOD:
                self.stands.append((time.time() - late, time.time()))

    # --- PostgreSQL -------------------------------------------------------------------------------

    async def up(self) -> None:
        """Wait until everybody is at work."""
        async with asyncio.timeout(UP_WITHIN):
            everybody: list[Replica | Service] = [*self.replicas, *self.services]
            while not all(one.is_ready() for one in everybody):  # noqa: ASYNC110 - a log
                await asyncio.sleep(0.05)

    async def kill_postgres(self) -> None:
        await asyncio.to_thread(self.server.kill)

    def freeze_postgres(self) -> list[int]:
        """All of it stands still, as a host does whose disk hangs; the processes, for `thaw`."""
        processes = self.server.processes()
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        return processes

    def thaw_postgres(self, processes: list[int]) -> None:
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def revive_postgres(self) -> None:
        """Start it until it runs: a disk that was full a moment ago may need another try."""
        end = time.monotonic() + 60
        while not self.server.running:
            try:
                await asyncio.to_thread(self.server.start)
            except Exception:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.3)

    def fill_disk(self) -> Path | None:
        """Take all the room that the database has left. The file that does it."""
        if self._mounted is None:
            return None
        ballast = self._mounted / "ballast"
        with ballast.open("wb") as file, suppress(OSError):
            while True:
                file.write(b"\0" * (1 << 20))
        return ballast

    async def end(self, within: float = 30) -> list[int]:
        """SIGTERM to all; their exit statuses."""
        self._is_over = True
        everybody: list[Replica | Service] = [*self.replicas, *self.services]
        for one in everybody:
            one.signal(signal.SIGCONT)
            one.signal(signal.SIGTERM)
        statuses = []
        until = asyncio.get_running_loop().time() + within
        for one in everybody:
            assert one.process is not None
            try:
                async with asyncio.timeout_at(until):
                    statuses.append(await one.process.wait())
            except TimeoutError:
                statuses.append(-999)
        return statuses


def _used(pid: int) -> tuple[float, int] | None:
    """Seconds of processor time that a process has used, and how often it went to sleep by itself;
    None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds, int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def _mount(base: Path) -> bool:
    """A file system of its own for the database, so that it can be filled up; whether there is one
    now."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={ROOM_MB}m,mode=755", "tmpfs", str(base)]
    return (
        os.geteuid() == 0
        and subprocess.run(words, capture_output=True, check=False).returncode == 0
    )


def _port() -> int:
    """A port that nobody has, below those that the system gives to clients: one of them could get
    connected to itself while the server is away."""
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def scratch() -> Path:
    """A folder for one run."""
    folder = Path(tempfile.mkdtemp(prefix="recall-chaos-"))
    folder.chmod(0o755)
    return folder

"""The stage: a PostgreSQL that may be killed and filled up, replicas from the wheel, and a proxy before everything they talk to.

Each replica has its own way to the database (which can be cut for it alone) and its own clock (faketime, where it is installed); the way to
the API is one for all. Whoever dies is started again after a moment, as a service manager does.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psycopg

from recall_worker import schema
from recall_worker.embedded import EmbeddedServer

from ..application import CREATE_TABLES
from ..proxy import Proxy
from .api import Api

ROOT = Path(__file__).parents[2]
LEASE = 6
SETTINGS = {
    "RECALL_LEASE": str(LEASE), "RECALL_CONCURRENCY": "20", "RECALL_BUSY_DELAY": "1", "RECALL_RUN_TIMEOUT": "15", "RECALL_DRAIN_TIMEOUT": "3",
    "RECALL_LOG_FORMAT": "json", "RECALL_LOG_LEVEL": "info",
}  # fmt: skip
"""All else is as shipped."""
POSTGRES = {"max_connections": "60", "max_wal_size": "128MB", "min_wal_size": "32MB", "wal_recycle": "off"}
ROOM_MB = 700
FAKETIME = next((str(p) for p in Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
RESTART_AFTER = 0.5


def install(folder: Path, patch: Path | None = None) -> Path:
    """Build the wheel of this checkout, with a patch applied to a copy of it where one is given; the folder it is installed in."""
    source = ROOT
    if patch is not None:
        source = folder / "source"
        for name in ("recall_worker", "sql"):
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        subprocess.run(["patch", "-p1", "--fuzz=0", "-s", "-i", str(patch)], cwd=source, check=True)
    wheels, site = folder / "wheel", folder / "site"
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (wheel,) = wheels.glob("*.whl")
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(words, check=True, capture_output=True)
    where = [sys.executable, "-c", "import recall_worker; print(recall_worker.__file__)"]
    seen = subprocess.run(where, cwd="/", env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True)
    assert seen.stdout.startswith(str(site)), "not the wheel would run"
    return site


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

    def events(self, name: str) -> list[dict[str, Any]]:
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            if f'"event": "{name}"' in line:
                with suppress(ValueError):
                    found.append(json.loads(line))
        return found


class Stage:
    def __init__(self, api: Api, replicas: int, site: Path, folder: Path, settings: Mapping[str, str]) -> None:
        self.api = api
        self.folder = folder
        self.replicas: list[Replica] = []
        self._count = replicas
        self._site = site
        self._settings = dict(settings)
        self._stack = AsyncExitStack()
        self._keeping: list[asyncio.Task[None]] = []
        self._over = False
        self._mounted: Path | None = None
        self.has_room = False
        """Whether the database lies on a small file system of its own, which can be filled up."""

    async def __aenter__(self) -> Self:
        base = self.folder / "pg"
        base.mkdir()
        base.chmod(0o755)
        if await asyncio.to_thread(_mount, base):
            self._mounted, self.has_room = base, True
        # A directory that is given is kept, also where a start fails, as it does on a disk that is full.
        with socket.create_server(("127.0.0.1", 0)) as chosen:
            port = chosen.getsockname()[1]
        self.server = EmbeddedServer(base / "data", port=port, settings=POSTGRES)
        await asyncio.to_thread(self.server.start)
        self.dsn = self.server.dsn("postgres", tcp=True)
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
        await asyncio.to_thread(schema.migrate, self.dsn)
        self.way = await self._stack.enter_async_context(Proxy(f"host=127.0.0.1 port={self.api.port}"))
        for n in range(self._count):
            proxy = await self._stack.enter_async_context(Proxy(self.dsn))
            replica = Replica(f"w{n}", proxy, self.folder / f"clock{n}", self.folder / f"w{n}.log")
            # One of them is hours off from the start.
            replica.clock.write_text("-5h" if n == 1 else "+0")
            self.replicas.append(replica)
            self._keeping.append(asyncio.create_task(self._keep(replica)))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        for replica in self.replicas:
            replica.signal(signal.SIGKILL)
            replica.signal(signal.SIGCONT)
            if replica.process is not None:
                await replica.process.wait()
        await self._stack.aclose()
        await asyncio.to_thread(self.server.stop)
        if self._mounted is not None:
            await asyncio.to_thread(subprocess.run, ["umount", "-l", str(self._mounted)], check=False)

    async def _keep(self, replica: Replica) -> None:
        """The service manager of one slot."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")} | SETTINGS | self._settings
        environ |= {
            "PYTHONPATH": str(self._site), "RECALL_DSN": replica.proxy.dsn,
            "RECALL_RUN_URL": f"http://127.0.0.1:{self.way.port}/{replica.slot}/sessions/{{session_id}}/run",
        }  # fmt: skip
        if FAKETIME:
            environ |= {
                "LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(replica.clock), "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }  # fmt: skip
        while not self._over:
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

    # --- PostgreSQL --------------------------------------------------------------------------------------------------

    async def up(self) -> None:
        """Wait until every replica is at work."""
        async with asyncio.timeout(60):
            while not all(replica.log.exists() and replica.events("worker.ready") for replica in self.replicas):  # noqa: ASYNC110 - a log
                await asyncio.sleep(0.05)

    async def kill_postgres(self) -> None:
        await asyncio.to_thread(self.server.kill)

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
        self._over = True
        for replica in self.replicas:
            replica.signal(signal.SIGCONT)
            replica.signal(signal.SIGTERM)
        statuses = []
        for replica in self.replicas:
            assert replica.process is not None
            try:
                async with asyncio.timeout(within):
                    statuses.append(await replica.process.wait())
            except TimeoutError:
                statuses.append(-999)
        return statuses


def _mount(base: Path) -> bool:
    """A file system of its own for the database, so that it can be filled up; whether there is one now."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={ROOM_MB}m,mode=755", "tmpfs", str(base)]
    return os.geteuid() == 0 and subprocess.run(words, capture_output=True, check=False).returncode == 0


def scratch() -> Path:
    """A folder for one run."""
    folder = Path(tempfile.mkdtemp(prefix="recall-chaos-"))
    folder.chmod(0o755)
    return folder

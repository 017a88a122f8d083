"""`recall-worker console` as a process, on a port of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .daemon import Daemon, check_events
from .postgres import free_port


@asynccontextmanager
async def console(dsn: str, port: int = 0, **settings: str) -> AsyncIterator[Console]:
    """`settings`: `CONSOLE_TOKEN=…` becomes RECALL_CONSOLE_TOKEN; `LISTEN_ON` is the host, without
    its port. It is ended as a service is, and its log has to be as its schema says."""
    host = settings.pop("LISTEN_ON", "127.0.0.1")
    port = port or free_port()
    started = Console(host, port)
    environ = {"RECALL_DSN": dsn, "RECALL_CONSOLE_LISTEN": f"{host}:{port}", "RECALL_ACTOR": "ann"}
    environ |= {f"RECALL_{name}": value for name, value in settings.items()}
    started.environ = environ
    await started.start()
    try:
        yield started
    finally:
        await started.daemon.kill()
        check_events(started.daemon.events)


class Console:
    def __init__(self, host: str, port: int) -> None:
        self.root = f"http://{host}:{port}"
        self.environ: dict[str, str] = {}
        self.daemon: Daemon

    async def start(self) -> None:
        """Start it, or start it again, and wait until it listens."""
        self.daemon = await Daemon.start(self.environ, command="console")
        await self.daemon.hears("console.listening", within=60.0)

    async def stop(self) -> None:
        """SIGTERM, and wait; it has to end well."""
        assert await self.daemon.stop(within=60.0) == 0

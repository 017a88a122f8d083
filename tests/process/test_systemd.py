"""What systemd is told: READY when the loop turns, STOPPING at the first signal, WATCHDOG as long
as the work goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import pytest

from recall_worker.terminal import OUTDATED

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate
from ..support.proxy import Proxy
from .test_lease import promise


class Manager:
    """The receiving end of NOTIFY_SOCKET. `heard` are the datagrams so far, with their monotonic
    instants."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.heard: list[tuple[float, str]] = []
        self._changed = asyncio.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)
        self._listening = asyncio.create_task(self._listen())

    def times(self, state: str) -> list[float]:
        return [at for at, said in self.heard if said == state]

    async def hears(self, state: str, times: int = 1, within: float = 20.0) -> list[float]:
        """Wait until it has been told so (so many times)."""
        async with asyncio.timeout(within), self._changed:
            await self._changed.wait_for(lambda: len(self.times(state)) >= times)
        return self.times(state)

    async def close(self) -> None:
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        self._socket.close()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            said = (await loop.sock_recv(self._socket, 4096)).decode()
            async with self._changed:
                self.heard.append((time.monotonic(), said))
                self._changed.notify_all()


@pytest.fixture(params=["a path", "an abstract name"])
async def manager(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Manager]:
    receiver = Manager(
        str(tmp_path / "notify") if request.param == "a path" else f"@recall-test-{uuid4().hex}"
    )
    yield receiver
    await receiver.close()


@pytest.fixture
async def at_path(tmp_path: Path) -> AsyncIterator[Manager]:
    receiver = Manager(str(tmp_path / "notify"))
    yield receiver
    await receiver.close()


@pytest.mark.slow
async def test_ready_and_stopping(manager: Manager, daemons: Daemons) -> None:
    """READY=1 once, at the start; STOPPING=1 at the signal; and, where no watchdog was asked for,
    nothing else."""
    daemons.environ["NOTIFY_SOCKET"] = manager.address
    daemon = await daemons.start()
    await manager.hears("READY=1")
    assert manager.times("STOPPING=1") == []
    assert await daemon.stop() == 0
    assert [said for _, said in manager.heard] == ["READY=1", "STOPPING=1"]


async def test_ready_without_postgresql(at_path: Manager, database: str, daemons: Daemons) -> None:
    """Without PostgreSQL the worker is ready and fed all the same: to restart it would help
    nobody."""
    daemons.environ |= {"NOTIFY_SOCKET": at_path.address, "WATCHDOG_USEC": "150000"}
    async with Proxy(database) as proxy:
        proxy.cut()
        daemon = await daemons.start(ready=False, dsn=proxy.dsn)
        await at_path.hears("READY=1")
        await daemon.hears("database.lost")
        await at_path.hears("WATCHDOG=1", times=10)
        assert await daemon.stop() == 0


@pytest.mark.slow
async def test_a_refused_schema_is_a_stop(
    at_path: Manager, db: Connection, daemons: Daemons
) -> None:
    """A worker that the schema comes to exclude says STOPPING=1, is fed, and ends as the units
    expect it to."""
    daemons.environ |= {"NOTIFY_SOCKET": at_path.address, "WATCHDOG_USEC": "150000"}
    daemon = await daemons.start(lease=5)
    await db.execute(
        "insert into recall_schema (version, name, oldest_code) values (9999, 'next', 9999)"
    )
    await at_path.hears("STOPPING=1")
    assert await daemon.exit() == OUTDATED
    assert at_path.times("WATCHDOG=1") and len(at_path.times("STOPPING=1")) == 1


@pytest.mark.slow
async def test_a_draining_worker_is_fed(
    at_path: Manager, app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """STOPPING=1 comes when the drain begins, and the watchdog is fed until it ends."""
    gate = Gate()
    endpoint.script("s", gate)
    daemons.environ |= {"NOTIFY_SOCKET": at_path.address, "WATCHDOG_USEC": "150000"}
    daemon = await daemons.start()
    await promise(app, "s", "once")
    await gate.entered.wait()
    daemon.signal(signal.SIGTERM)
    await at_path.hears("STOPPING=1")
    await at_path.hears("WATCHDOG=1", times=len(at_path.times("WATCHDOG=1")) + 10)
    gate.open()
    assert await daemon.exit() == 0
    assert len(at_path.times("STOPPING=1")) == 1


@pytest.mark.slow
async def test_the_watchdog_is_fed(at_path: Manager, daemons: Daemons) -> None:
    """WATCHDOG=1 comes three times in the time that systemd allows; a worker that stands still
    sends none."""
    daemons.environ |= {"NOTIFY_SOCKET": at_path.address, "WATCHDOG_USEC": "900000"}
    daemon = await daemons.start()
    fed = await at_path.hears("WATCHDOG=1", times=6)
    gaps = [later - earlier for earlier, later in pairwise(fed)]
    assert sorted(gaps)[len(gaps) // 2] < 0.9
    daemon.signal(signal.SIGSTOP)
    await asyncio.sleep(0.2)  # What was sent before it stood still has come.
    before = len(at_path.heard)
    await asyncio.sleep(1.5)
    assert len(at_path.heard) == before
    daemon.signal(signal.SIGCONT)
    await at_path.hears("WATCHDOG=1", times=len(fed) + 2)


@pytest.mark.slow
async def test_a_watchdog_for_somebody_else(
    at_path: Manager, db: Connection, daemons: Daemons
) -> None:
    """Where WATCHDOG_PID names another process, such as a wrapper, this one keeps still."""
    daemons.environ |= {
        "NOTIFY_SOCKET": at_path.address,
        "WATCHDOG_USEC": "90000",
        "WATCHDOG_PID": str(os.getpid()),
    }
    daemon = await daemons.start()
    await db.execute("select pg_sleep(0.5)")
    assert await daemon.stop() == 0
    assert at_path.times("WATCHDOG=1") == []


@pytest.mark.slow
async def test_a_manager_that_is_gone(tmp_path: Path, app: Application, daemons: Daemons) -> None:
    """A NOTIFY_SOCKET that leads nowhere stops no work."""
    daemons.environ |= {"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "90000"}
    daemon = await daemons.start()
    await promise(app, "s")
    await daemon.hears("recall.settled", session="s")
    assert await daemon.stop() == 0
    assert daemon.talk == []


@pytest.mark.full
@pytest.mark.timeout(200)
async def test_a_long_drain_is_fed(
    at_path: Manager, app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A drain of more than a minute, in which nothing is claimed, is no standstill."""
    gate = Gate()
    endpoint.script("s", gate)
    daemons.environ |= {"NOTIFY_SOCKET": at_path.address, "WATCHDOG_USEC": "3000000"}
    daemon = await daemons.start(drain_timeout=120)
    await promise(app, "s", "once")
    await gate.entered.wait()
    daemon.signal(signal.SIGTERM)
    [began] = await at_path.hears("STOPPING=1")
    while time.monotonic() - began < 75:
        await at_path.hears("WATCHDOG=1", times=len(at_path.times("WATCHDOG=1")) + 1, within=5)
    gate.open()
    assert await daemon.exit() == 0


@pytest.mark.full
@pytest.mark.timeout(300)
async def test_half_open_connections_are_no_standstill(
    at_path: Manager, database: str, daemons: Daemons
) -> None:
    """While statements wait for answers that never come, the worker is fed through all their
    deadlines."""
    daemons.environ |= {"NOTIFY_SOCKET": at_path.address, "WATCHDOG_USEC": "3000000"}
    async with Proxy(database) as proxy:
        daemon = await daemons.start(dsn=proxy.dsn, poll_interval=30)
        began = time.monotonic()
        proxy.blackhole()
        while time.monotonic() - began < 130:
            await at_path.hears("WATCHDOG=1", times=len(at_path.times("WATCHDOG=1")) + 1, within=5)
        proxy.heal()
        await daemon.hears("database.found", within=60)
        assert await daemon.stop() == 0

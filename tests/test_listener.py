"""The listener alone, on a real PostgreSQL: whether it knows that it hears, and that nothing that
notifies is lost while it finds out."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from recall_worker.database import listener as room
from recall_worker.database.connection import DatabaseUnavailable
from recall_worker.database.listener import CHANNEL, Listener
from recall_worker.events import Events

from .conftest import Connection
from .support.proxy import Proxy

Echo = Callable[[str], Awaitable[None]]


class Heard:
    """What a listener rang, and told, so far."""

    def __init__(self) -> None:
        self.rings = 0
        self.told: list[str] = []
        self._changed = asyncio.Condition()

    def notify(self, _: str) -> None:
        self.rings += 1
        self.stir()

    def tell(self, event: str, _: dict[str, Any]) -> None:
        self.told.append(event)
        self.stir()

    def stir(self) -> None:
        """Whoever waits for a condition looks again."""

        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._task = asyncio.ensure_future(notify())

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(condition)


@asynccontextmanager
async def listening(dsn: str, echo: Echo, heard: Heard) -> AsyncIterator[Listener]:
    """A listener at work."""
    events = Events()
    events.listen(heard.tell)
    bell = Listener(dsn, "w", heard.notify, echo, events)
    work = asyncio.create_task(bell.run())
    try:
        await heard.until(lambda: "listener.listening" in heard.told)
        yield bell
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PROBE_DEADLINE", 0.5)
    monkeypatch.setattr(room, "PROBE_EVERY", 0.1)


@pytest.fixture
def echo(db: Connection) -> Echo:
    """Rings as the ledger does, on another connection."""

    async def notify(channel: str) -> None:
        await db.execute("select pg_notify(%s, '')", [channel])

    return notify


async def test_it_hears_itself(database: str, echo: Echo) -> None:
    """Asked again and again, it is listening, says so once, and notifies nobody for it but at its
    beginning."""
    heard = Heard()
    asked = 0

    async def counted(channel: str) -> None:
        nonlocal asked
        asked += 1
        await echo(channel)
        heard.stir()

    async with listening(database, counted, heard) as bell:
        await heard.until(lambda: asked >= 4)
        assert bell.state == "listening"
        assert heard.told == ["listener.listening"] and heard.rings == 1


@pytest.mark.slow
async def test_it_does_not_hear(database: str, echo: Echo) -> None:
    """What is notified elsewhere does not come: told once, however often it tries; and when it does
    come, that is told, too."""
    heard = Heard()
    tries, deaf = 0, True

    async def elsewhere(channel: str) -> None:
        nonlocal tries
        tries += 1
        if not deaf:
            await echo(channel)

    async with listening(database, elsewhere, heard) as bell:
        await heard.until(lambda: tries >= 3)
        assert bell.state == "deaf"
        assert heard.told == ["listener.listening", "listener.deaf"]
        assert heard.rings >= 3, "it looks at each connection"
        deaf = False
        await heard.until(lambda: heard.told.count("listener.listening") == 2)
        assert bell.state == "listening"


async def test_nobody_can_ring(database: str) -> None:
    """While the ledger has no connection nothing can be shown, so nothing is said."""
    heard = Heard()
    tries = 0

    async def away(_: str) -> None:
        nonlocal tries
        tries += 1
        heard.stir()
        raise DatabaseUnavailable("away")

    async with listening(database, away, heard) as bell:
        await heard.until(lambda: tries >= 3)
        assert bell.state == "listening" and heard.told == ["listener.listening"]


@pytest.mark.slow
async def test_a_ring_beside_the_echo(database: str, db: Connection) -> None:
    """A notify that comes in the same instant as the echo, before or behind it, is not lost: thirty
    of thirty."""
    heard = Heard()
    sent = 0

    async def together(channel: str) -> None:
        nonlocal sent
        before, behind = (CHANNEL, channel) if sent % 2 else (channel, CHANNEL)
        await db.execute("select pg_notify(%s, ''), pg_notify(%s, '')", [before, behind])
        sent += 1

    async with listening(database, together, heard):
        await heard.until(lambda: heard.rings >= 31)
        assert heard.told == ["listener.listening"]


@pytest.mark.slow
async def test_a_process_that_stood_still(database: str) -> None:
    """Stopped while the echo came, and for longer than its deadline, it has not been deaf."""
    heard = Heard()
    asked = 0

    async def while_it_stands_still(channel: str) -> None:
        nonlocal asked
        asked += 1
        heard.stir()

        def notify() -> None:
            time.sleep(room.SELF_TEST_STEP + 0.3)
            # The last one may find the database gone, and the test over.
            with (
                contextlib.suppress(psycopg.Error),
                psycopg.connect(database, autocommit=True) as conn,
            ):
                conn.execute("select pg_notify(%s, '')", [channel])

        threading.Thread(target=notify).start()
        asyncio.get_running_loop().call_later(room.SELF_TEST_STEP + 0.1, time.sleep, 1.5)

    async with listening(database, while_it_stands_still, heard) as bell:
        await heard.until(lambda: asked >= 3)
        assert heard.told == ["listener.listening"] and bell.state == "listening"


async def test_it_connects_as_soon_as_postgresql_answers(
    database: str, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While PostgreSQL is away its pauses grow; whoever finds it answering says so, and it does not
    sit the pause out."""
    heard = Heard()
    async with Proxy(database) as proxy, listening(proxy.dsn, echo, heard) as bell:
        monkeypatch.setattr(
            random, "uniform", lambda least, most: most * 1000 if most > 0.05 else least
        )
        proxy.cut()
        await heard.until(lambda: "listener.lost" in heard.told)
        rings = heard.rings
        proxy.heal()
        bell.recheck()
        await heard.until(
            lambda: heard.told.count("listener.listening") == 2 and heard.rings > rings
        )

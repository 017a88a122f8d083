"""What every test may ask for: a database of its own, a scripted endpoint on a raw socket, daemons
as real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import hypothesis
import psycopg
import pytest
from psycopg.rows import dict_row

from recall_worker import schema

from .support import postgres
from .support.application import CREATE_TABLES, Application
from .support.awaited import BOTH, Asynchronous
from .support.daemon import Daemons
from .support.endpoint import Endpoint
from .support.pgbouncer import PgBouncer, pooler

Connection = psycopg.AsyncConnection[dict[str, Any]]

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    and threading.current_thread() is threading.main_thread()
):
    # Run in a script's background, we were told to ignore it, and every process that a test starts
    # would be, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What a change breaks is found in its own run, and not by chance in another's. To search further:
# RECALL_TEST_RANDOM=1, before a release. No example has a deadline: on a busy machine the shortest
# takes as long as the machine likes.
hypothesis.settings.register_profile("others each time", deadline=None)
hypothesis.settings.register_profile("the same each time", derandomize=True, deadline=None)
hypothesis.settings.load_profile(
    "others each time" if os.environ.get("RECALL_TEST_RANDOM") else "the same each time"
)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The maintenance DSN of the session's PostgreSQL."""
    with postgres.server() as dsn:
        yield dsn


@pytest.fixture(scope="session")
def template(server: str) -> Iterator[str]:
    """A database with the application's tables, adopted; copied for each test that asks for
    `database`."""
    with postgres.database(server) as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
        schema.migrate(dsn)
        yield dsn


@pytest.fixture
def database(server: str, template: str) -> Iterator[str]:
    """The DSN of a database of the test's own: the application's tables, migrated, no rows."""
    with postgres.database(server, template) as dsn:
        yield dsn


@pytest.fixture
def empty_database(server: str) -> Iterator[str]:
    """The DSN of a database with nothing in it."""
    with postgres.database(server) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def bouncer(server: str) -> Iterator[PgBouncer]:
    """A pgbouncer in transaction mode before the session's PostgreSQL."""
    with pooler(server) as started:
        yield started


@contextlib.asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[Connection]:
    conn = await psycopg.AsyncConnection.connect(dsn, autocommit=True, row_factory=dict_row)
    async with conn:
        yield conn


@pytest.fixture
async def db(database: str) -> AsyncIterator[Connection]:
    """A connection for looking at the test's database."""
    async with connected(database) as conn:
        yield conn


class OneAtATime(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A connection that a test and the agent in its endpoint share: who comes second waits. A
    worker can call the agent before the test has heard that its insert was committed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._turn = asyncio.Lock()

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        if args:  # `_execute` is called
            return str(await super().execute(query, *args, timeout=timeout))
        async with self._turn:
            return str(await super().execute(query, timeout=timeout))

    async def _execute(self, *args: Any, **kwargs: Any) -> Any:
        async with self._turn:
            return await super()._execute(*args, **kwargs)


@pytest.fixture
async def app(database: str) -> AsyncIterator[Application]:
    """The agent application, on its own asyncpg connection."""
    application = Application(await asyncpg.connect(database, connection_class=OneAtATime))
    yield application
    await application.close()


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    """An API on a raw socket that counts requests and answers by script."""
    async with Endpoint() as api:
        yield api


@pytest.fixture
async def daemons(database: str, endpoint: Endpoint) -> AsyncIterator[Daemons]:
    """Starts daemons on the test's database and endpoint; whatever still runs at the end is
    killed."""
    async with Daemons({"RECALL_DSN": database, "RECALL_RUN_URL": endpoint.url}) as started:
        yield started


@pytest.fixture
async def browser() -> AsyncIterator[Any]:
    """Chromium, as Playwright drives it."""
    from .support.browser import chromium_browser

    async with chromium_browser() as started:
        yield started


@pytest.fixture(params=list(BOTH))
def client(request: pytest.FixtureRequest) -> Asynchronous:
    """`Recalls` and its twin `SyncRecalls`, one after the other, used alike."""
    return BOTH[request.param]

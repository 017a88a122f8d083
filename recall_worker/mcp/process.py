"""What the MCP server's process has on either transport: settings, secrets, log, a connection for
each call, and the tools of a session."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from psycopg_pool import AsyncNullConnectionPool

from .. import signals
from ..agent import AgentTools, Limits
from ..client import Recalls
from ..database.connection import connection_info
from ..events import Events
from ..exposures import exposures
from ..secret_files import Secrets
from ..settings import Settings

CONNECTIONS = 8
"""Connections at once; further calls wait for one."""
CONNECT_DEADLINE = 8.0
"""Seconds in which a connection has to be there, or a call is refused."""


class Process:
    def __init__(self, chosen: Settings, secrets: Secrets, recalls: Recalls, events: Events):
        self.settings = chosen
        self.secrets = secrets
        self.events = events
        self._recalls = recalls
        self._limits = Limits.of(chosen)

    def tools(self, session_id: str) -> AgentTools:
        """The tools of one session."""
        return AgentTools(
            self._recalls,
            session_id,
            limits=self._limits,
            queue=self.settings.queues[0],
        )


@asynccontextmanager
async def running(chosen: Settings, given: Collection[str]) -> AsyncIterator[Process]:
    """The process while it serves. `given`: the settings that came as options, by name.

    A connection is opened for a call and closed after it: sessions are many, calls are rare, and a
    connection that waits would hold a place in PostgreSQL and break with it.
    """
    events = Events(worker=f"mcp-{socket.gethostname()}-{os.getpid()}")
    secrets = Secrets(chosen, os.environ, given)
    secrets.listen(lambda event, facts: events.tell(event, **facts))
    for exposure in exposures(chosen, secrets.files()):
        events.tell(
            "settings.exposed",
            setting=exposure.setting,
            reason=exposure.seen,
            hint=exposure.todo,
        )

    def connecting() -> dict[str, Any]:
        info = connection_info(secrets.dsn(), "recall-worker mcp", CONNECT_DEADLINE)
        return {name: value for name, value in info.items() if name != "conninfo"}

    pool: AsyncNullConnectionPool[Any] = AsyncNullConnectionPool(
        secrets.dsn,
        kwargs=connecting,
        max_size=CONNECTIONS,
        timeout=CONNECT_DEADLINE,
        open=False,
    )
    with signals.hangups(lambda: events.tell("secrets.read", settings=secrets.read_again())):
        async with pool:
            recalls = Recalls(pool, via="mcp", schema=chosen.schema)
            yield Process(chosen, secrets, recalls, events)

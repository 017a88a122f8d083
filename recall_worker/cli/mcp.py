"""`mcp`: the agent's tools over the Model Context Protocol."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from .. import events, settings
from ..terminal import USAGE, Trouble, tell, warn_of_password

_MISSING = ("mcp", "mcp_types", "uvicorn", "starlette")


def serve(flags: dict[str, Any], http: str | None) -> None:
    """Serve on stdin and stdout, or with `http` (`HOST:PORT`) over HTTP, until it is told to
    end."""
    from psycopg.conninfo import conninfo_to_dict

    warn_of_password(flags.get("dsn"))
    address = None if http is None else settings.address(http)
    if http is not None and (address is None or address[1] > 65535):
        raise Trouble(
            f"--http {http!r} is no address", "--http 127.0.0.1:9466, or a port alone", status=USAGE
        )
    needed = ["dsn", "mcp_session" if address is None else "token_key"]
    chosen = settings.read(needed=needed, **flags)
    conninfo_to_dict(chosen.dsn or "")  # An unreadable DSN is reported before anything is started.
    try:
        from ..mcp import http as over_http
        from ..mcp import stdio
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _MISSING:
            raise
        raise Trouble(
            "the MCP server needs packages that are not installed",
            "pip install 'recall-worker[mcp]'",
        ) from None
    events.configure(chosen.log_level, chosen.log_format)
    for name in settings.ignored():
        tell(f"Note: {name} is not a setting of recall-worker and is ignored.")
    given = [name for name, value in flags.items() if value is not None]
    if address is not None:
        asyncio.run(over_http.serve(chosen, address, given))
        return
    if sys.stdin.isatty():
        tell("Note: an MCP client is to start this command, and to speak to it on stdin.")
    asyncio.run(stdio.serve(chosen, given))

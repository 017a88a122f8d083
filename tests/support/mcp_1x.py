"""A client by the SDK of the 1.x line, in an environment of its own: run by tests/process/
test_mcp.py with the name of a transport, and what that needs. Prints what it was answered, as
JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.metadata import version
from typing import Any

from mcp import ClientSession, StdioServerParameters  # type: ignore[attr-defined,unused-ignore]
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import (  # type: ignore[attr-defined,unused-ignore]
    streamablehttp_client,  # type: ignore[attr-defined,unused-ignore]
)


async def go_through(streams: Any) -> dict[str, Any]:
    async with ClientSession(streams[0], streams[1]) as session:
        begun = await session.initialize()
        listed = await session.list_tools()
        answers = []
        for name, arguments in (
            ("schedule_recall", {"message": "m", "every": "1h", "in": "10m"}),
            ("schedule_recall", {"message": "m", "in": "10m"}),
            ("list_recalls", {"session_id": "z"}),
            ("list_recalls", {}),
            ("skip_recall", {}),
            ("reschedule_recall", {"in": "2h"}),
            ("cancel_recall", {}),
        ):
            # 1.x checks structured answers against the tool's schema by itself.
            result: Any = await session.call_tool(name, arguments)
            answers.append([result.isError, result.content[0].text])
        return {
            "sdk": version("mcp"),
            "protocol": begun.protocolVersion,  # type: ignore[attr-defined,unused-ignore]
            "tools": [tool.name for tool in listed.tools],
            "answers": answers,
        }


async def main(transport: str, *given: str) -> None:
    if transport == "stdio":
        command, *arguments = given
        parameters = StdioServerParameters(command=command, args=arguments)
        async with stdio_client(parameters) as streams:
            print(json.dumps(await go_through(streams)))
    else:
        url, token = given
        headers = {"Authorization": f"Bearer {token}"}
        async with streamablehttp_client(url, headers=headers) as streams:
            print(json.dumps(await go_through(streams)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

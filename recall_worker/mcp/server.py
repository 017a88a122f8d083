"""The tools as the SDK's server serves them, on either transport."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel.server import Server

from ..agent import AgentTools, ToolRefused, catalog
from ..database.connection import error_text
from ..events import Events

Context = ServerRequestContext[Any, Any]
ToolsOf = Callable[[Context], AgentTools]
"""The tools of the session that a request is of."""

TOOLS = [
    types.Tool(
        name=tool.name,
        title=tool.title,
        description=tool.description,
        input_schema=tool.input_schema,
        output_schema=tool.output_schema,
        annotations=types.ToolAnnotations(
            title=tool.title,
            read_only_hint=tool.reads_only,
            destructive_hint=tool.destructive,
            idempotent_hint=tool.idempotent,
            open_world_hint=False,
        ),
    )
    for tool in catalog.TOOLS
]


def serve_tools(tools_of: ToolsOf, events: Events) -> Server[Any]:
    """A server of the tools. What can't be done is a result with `is_error`, which the model reads;
    a defect is one, too, and is on record in the log."""

    async def list_tools(
        context: Context, params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=TOOLS)

    async def call_tool(
        context: Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        begun = time.monotonic()
        tools = tools_of(context)
        facts: dict[str, Any] = {"session": tools.session_id, "tool": params.name[:60]}
        try:
            answer = await tools.call(params.name, params.arguments)
        except ToolRefused as refused:
            facts["answer"] = "unreachable" if refused.unreachable else "refused"
            if refused.__cause__ is not None:
                facts["reason"] = error_text(refused.__cause__)
            result = _error(str(refused))
        except Exception as error:
            events.tell(
                "worker.error",
                doing="mcp call",
                reason=error_text(error),
                exception="".join(traceback.format_exception(error)),
            )
            facts["answer"] = "refused"
            result = _error(
                "the scheduler has a defect: it is not known whether anything was done.\n"
                "Try: list_recalls, and tell the person that the scheduler needs its operator."
            )
        else:
            facts["answer"] = "done"
            if (id := answer.data.get("recall", {}).get("id")) is not None:
                facts["recall"] = id
            result = types.CallToolResult(
                content=[types.TextContent(type="text", text=answer.text)],
                structured_content=answer.data,
            )
        events.tell("mcp.called", **facts, took_ms=round(1000 * (time.monotonic() - begun), 1))
        return result

    return Server(
        "recall-worker",
        version=version("recall-worker"),
        title="Recalls: come back to this conversation later",
        instructions=catalog.INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        get_tool_input_schema={tool.name: tool.input_schema for tool in catalog.TOOLS}.get,
    )


def _error(text: str) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=True)

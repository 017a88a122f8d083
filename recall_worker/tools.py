"""Tools for an agent, as plain async functions: `recall_tools(recalls, session_id)`.

Every agent framework takes a typed function with a docstring as a tool. What the functions do, what
they answer, how far they may go, and the texts of their docstrings are in `agent`, which the MCP
server has, too.

None of them takes a session: it is the one that they were made for, so that nothing a model reads
can lead it into another. None of them raises what the scheduler or the model does wrong: that is
the answer, with what to do instead, as most frameworks end the whole run on an exception.

Never here: SQL, limits, words of answers, a framework.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from .agent import AgentTools, Answer, Limits, ToolRefused, catalog
from .client import Recalls
from .keys import Key
from .settings import DEFAULT_QUEUE

Tool: TypeAlias = Callable[..., Awaitable[str]]

DELAY = "after"
"""What the argument `in` of the other tools is called here: Python has that word for itself, and
`Recalls.schedule` calls it so."""


def recall_tools(
    recalls: Recalls,
    session_id: Key,
    *,
    limits: Limits | None = None,
    queue: str = DEFAULT_QUEUE,
) -> list[Tool]:
    """schedule_recall, list_recalls, reschedule_recall, skip_recall and cancel_recall, for the
    agent of this session.

    They cost no query to make: make them for each run. `recalls` needs a pool; what the agent does
    is on record as done by `agent of <session_id>`. `limits`: how far it may go; if not given,
    those of the environment (RECALL_AGENT_LIMIT and others). `queue`: where its recalls go.

    Raises SettingsError where one of these variables holds what it can't be, and ValueError for a
    session that there can't be.
    """
    agent = AgentTools(recalls, session_id, limits=limits, queue=queue, delay=DELAY)

    async def schedule_recall(
        message: str,
        after: str | None = None,
        at: str | None = None,
        every: str | None = None,
        grid: str | None = None,
        cron: str | None = None,
        time_zone: str | None = None,
        until: str | None = None,
        times: int | None = None,
    ) -> str:
        return await _text(
            agent.schedule(
                message,
                after=after,
                at=at,
                every=every,
                grid=grid,
                cron=cron,
                time_zone=time_zone,
                until=until,
                times=times,
            )
        )

    async def list_recalls(time_zone: str | None = None, ended: bool = False) -> str:
        return await _text(agent.list(time_zone=time_zone, ended=ended))

    async def reschedule_recall(
        id: str | None = None,
        after: str | None = None,
        at: str | None = None,
        time_zone: str | None = None,
    ) -> str:
        return await _text(agent.reschedule(id=id, after=after, at=at, time_zone=time_zone))

    async def skip_recall(id: str | None = None, time_zone: str | None = None) -> str:
        return await _text(agent.skip(id=id, time_zone=time_zone))

    async def cancel_recall(id: str | None = None) -> str:
        return await _text(agent.cancel(id=id))

    functions: dict[str, Tool] = {
        function.__name__: function
        for function in (
            schedule_recall,
            list_recalls,
            reschedule_recall,
            skip_recall,
            cancel_recall,
        )
    }
    for tool in catalog.TOOLS:
        functions[tool.name].__doc__ = docstring(tool)
    return list(functions.values())


def docstring(tool: catalog.Tool) -> str:
    """What a model is told of a tool, as a docstring in Google's style, which all frameworks
    read."""
    lines = [_spelled(tool.description), "", "Args:"]
    for name, schema in tool.input_schema["properties"].items():
        lines.append(f"    {DELAY if name == 'in' else name}: {_spelled(_argument(schema))}")
    return "\n".join(lines)


def _argument(schema: dict[str, Any]) -> str:
    examples = " or ".join(str(example) for example in schema.get("examples", []))
    return " ".join([schema["description"], *([f"For example: {examples}"] if examples else [])])


def _spelled(text: str) -> str:
    return text.replace("`in`", f"`{DELAY}`")


async def _text(asked: Awaitable[Answer]) -> str:
    try:
        return (await asked).text
    except ToolRefused as refusal:
        return f"Error: {refusal}"

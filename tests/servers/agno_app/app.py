"""Two agents whose model asks the test what to say: by a POST of what it was told, to the address
in a file.

Answers: `{"content": …}` is what it says, `{"call": …}` a tool that a person has to confirm; any
status but 200 breaks the model.
"""
# mypy: ignore-errors

from __future__ import annotations

import os
from pathlib import Path

import httpx
from agno.agent import Agent
from agno.db.postgres import PostgresDb
from agno.models.base import Model
from agno.models.response import ModelResponse
from agno.os import AgentOS, QueueConfig
from agno.tools import tool


def address() -> str:
    """Where the test that is on now is to be asked."""
    return Path(os.environ["TEST_MODEL"]).read_text(encoding="ascii")


class Prompted(Model):
    """A model on the strings of a test."""

    async def ainvoke(self, messages, *_, **__):
        if messages[-1].role == "tool":
            return ModelResponse(role="assistant", content="it was done")
        async with httpx.AsyncClient(timeout=None, trust_env=False) as test:
            answer = await test.post(
                address(), json={"session_id": messages[-1].content, "messages": len(messages)}
            )
        said = answer.json()
        if answer.status_code != 200:
            raise RuntimeError(said["error"])
        if "call" in said:
            call = {
                "id": "1",
                "type": "function",
                "function": {"name": said["call"], "arguments": "{}"},
            }
            return ModelResponse(role="assistant", tool_calls=[call])
        return ModelResponse(role="assistant", content=said.get("content", "done"))

    async def ainvoke_stream(self, *arguments, **named):
        yield await self.ainvoke(*arguments, **named)

    def invoke(self, *_, **__):
        raise NotImplementedError

    def invoke_stream(self, *_, **__):
        raise NotImplementedError

    def _parse_provider_response(self, response, **_):
        return response

    def _parse_provider_response_delta(self, response):
        return response


@tool(requires_confirmation=True)
def launch() -> str:
    """What nobody does without being told to."""
    return "launched"


QUEUES = {
    "durable": {"durable": True},
    "parallel": {"durable": True, "queue_per_session": False},
    "fleeting": None,
}
kind = QUEUES[os.environ["TEST_QUEUE"]]
queue = (
    None
    if kind is None
    else QueueConfig(**kind, max_queue_depth=2, lock_grace_seconds=3, stop_timeout_seconds=1)
)
db = PostgresDb(db_url=os.environ["TEST_DSN"])
agents = [
    Agent(id=name, model=Prompted(id="prompted"), tools=[launch], db=db)
    for name in ("helper", "other")
]
app = AgentOS(id="tests", agents=agents, db=db, queue=queue, telemetry=False).get_app()

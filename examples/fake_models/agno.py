"""A model for Agno."""

import json
from typing import Any

from agno.models.base import Model
from agno.models.message import Message
from agno.models.response import ModelResponse

from . import decide


class FakeModel(Model):
    def __init__(self) -> None:
        super().__init__(id="fake")

    async def ainvoke(self, messages: list[Message], *_: Any, **__: Any) -> ModelResponse:
        last = messages[-1]
        heard = [str(message.content) for message in messages if message.role == "user"]
        step = await decide(heard, str(last.content) if last.role == "tool" else None)
        if isinstance(step, str):
            return ModelResponse(role="assistant", content=step)
        call = {"name": step["name"], "arguments": json.dumps(step["args"])}
        calls = [{"id": f"call-{len(messages)}", "type": "function", "function": call}]
        return ModelResponse(role="assistant", tool_calls=calls)

    async def ainvoke_stream(self, *arguments: Any, **named: Any) -> Any:
        yield await self.ainvoke(*arguments, **named)

    def invoke(self, *_: Any, **__: Any) -> ModelResponse:
        raise NotImplementedError("the tools are async: use arun")

    invoke_stream = invoke

    def _parse_provider_response(self, response: Any, **_: Any) -> Any:
        return response

    def _parse_provider_response_delta(self, response: Any) -> Any:
        return response

"""A model for the OpenAI Agents SDK."""

import json
from typing import Any

from agents import Model, ModelResponse, Usage
from openai.types.responses import (
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
)

from . import decide


class FakeModel(Model):
    async def get_response(
        self, system_instructions: Any, input: Any, *_: Any, **__: Any
    ) -> ModelResponse:
        items = [{"role": "user", "content": input}] if isinstance(input, str) else input
        heard = [str(item["content"]) for item in items if item.get("role") == "user"]
        last = items[-1]
        said = str(last["output"]) if last.get("type") == "function_call_output" else None
        step = await decide(heard, said)
        if isinstance(step, str):
            text = ResponseOutputText(text=step, type="output_text", annotations=[])
            output: Any = ResponseOutputMessage(
                id="1", content=[text], role="assistant", status="completed", type="message"
            )
        else:
            output = ResponseFunctionToolCall(
                call_id=f"call-{len(items)}",
                name=step["name"],
                arguments=json.dumps(step["args"]),
                type="function_call",
            )
        return ModelResponse(output=[output], usage=Usage(), response_id=None)

    def stream_response(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("use Runner.run")

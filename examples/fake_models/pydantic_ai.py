"""A model for PydanticAI."""

from pydantic_ai.messages import (
    ModelMessage,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel

from . import decide


async def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    parts = [part for message in messages for part in message.parts]
    heard = [str(part.content) for part in parts if isinstance(part, UserPromptPart)]
    last = parts[-1]
    step = await decide(heard, str(last.content) if isinstance(last, ToolReturnPart) else None)
    if isinstance(step, str):
        return ModelResponse(parts=[TextPart(step)])
    return ModelResponse(parts=[ToolCallPart(step["name"], step["args"])])


def FakeModel() -> FunctionModel:  # noqa: N802, named as in the other modules
    return FunctionModel(answer)

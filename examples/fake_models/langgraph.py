"""A model for LangChain and LangGraph."""

from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from . import decide


class FakeModel(BaseChatModel):
    @property
    def _llm_type(self) -> str:
        return "fake"

    def bind_tools(self, tools: Any, **_: Any) -> "FakeModel":
        return self

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        raise NotImplementedError("the tools are async: use ainvoke")

    async def _agenerate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        heard = [message.text for message in messages if message.type == "human"]
        step = await decide(heard, messages[-1].text if messages[-1].type == "tool" else None)
        if isinstance(step, str):
            answer = AIMessage(step)
        else:
            answer = AIMessage("", tool_calls=[{**step, "id": f"call-{len(messages)}"}])
        return ChatResult(generations=[ChatGeneration(message=answer)])

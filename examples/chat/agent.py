"""The chat's agent: a stand-in for a language model, or, where CHAT_MODEL names one, a real one.

Both have the same tools, by which they promise to come back. `answer` is all that app.py uses.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from recall_worker import Recalls
from recall_worker.tools import recall_tools


def answer(
    recalls: Recalls, session_id: str, text: str, before: Sequence[dict[str, Any]], is_recall: bool
) -> AsyncIterator[str]:
    """What the agent says to `text`, piece by piece. `before`: the messages until then."""
    tools = recall_tools(recalls, session_id)
    if os.environ.get("CHAT_MODEL"):
        return model(tools, text, before)
    return stand_in(tools, text, is_recall)


async def stand_in(tools: Sequence[Any], text: str, is_recall: bool) -> AsyncIterator[str]:
    """What a language model would do with these tools, for a few sentences."""
    call = {tool.__name__: tool for tool in tools}
    if wish := re.fullmatch(r"remind me in (.+?) to (.+)", text, re.I | re.S):
        said = await call["schedule_recall"](message=wish[2], after=wish[1])
    elif wish := re.fullmatch(r"every (\d+ )?([a-z]+) (.+)", text, re.I | re.S):
        said = await call["schedule_recall"](message=wish[3], every=f"{wish[1] or '1 '}{wish[2]}")
    elif re.match("what is planned", text, re.I):
        said = await call["list_recalls"]()
    elif re.match("cancel it", text, re.I):
        said = await call["cancel_recall"]()
    elif wish := re.fullmatch(r"think for (\d\d?) seconds?", text, re.I):
        await asyncio.sleep(int(wish[1]))
        said = f"I have thought for {wish[1]} seconds."
    else:
        said = f"It is time: {text}" if is_recall else f"I have read: {text}"
    for word in re.findall(r"\S+\s*", re.sub(r"\s+Id: \S+", "", said)):
        yield word
        await asyncio.sleep(0.02)


async def model(
    tools: Sequence[Any], text: str, before: Sequence[dict[str, Any]]
) -> AsyncIterator[str]:
    """A real language model, by PydanticAI, which reads its key from the environment."""
    from pydantic_ai import (
        Agent,
        ModelRequest,
        ModelResponse,
        PartDeltaEvent,
        PartStartEvent,
        TextPart,
        TextPartDelta,
        UserPromptPart,
    )

    history = [
        ModelResponse(parts=[TextPart(message["text"])])
        if message["role"] == "agent"
        else ModelRequest(parts=[UserPromptPart(message["text"])])
        for message in before
    ]
    agent = Agent(os.environ["CHAT_MODEL"], tools=tools)
    async with agent.run_stream_events(text, message_history=history) as events:
        async for event in events:
            if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart):
                yield event.part.content
            elif isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
                yield event.delta.content_delta

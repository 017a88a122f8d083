"""Stand-ins for language models, so that the examples run without a key and without a network.

Each module here is a model for one framework. What they say is decided below, and is the same in
all of them. A real model takes their place in one line; the examples say which.
"""

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


async def decide(heard: Sequence[str], tool_said: str | None) -> dict[str, Any] | str:
    """The call of a tool (`name` and `args`), or what the model says.

    `heard`: all messages of the user in this conversation, the last one last. `tool_said`: what the
    tool answered, where it was called for the last message.
    """
    last = heard[-1]
    if tool_said is not None:
        return f"The tool said: {tool_said}"
    if wish := re.search(r"remind me in (.+?) to (.+)", last, re.DOTALL):
        return {"name": "schedule_recall", "args": {"message": wish[2], "after": wish[1]}}
    if wish := re.search(r"remind me (every .+?) to (.+)", last, re.DOTALL):
        return {
            "name": "schedule_recall",
            "args": {"message": wish[2], "every": wish[1].removeprefix("every ")},
        }
    if "planned" in last:
        return {"name": "list_recalls", "args": {}}
    if "never mind" in last:
        return {"name": "cancel_recall", "args": {}}
    if wish := re.search(r"wait for the file (\S+)", last):
        while not await asyncio.to_thread(Path(wish[1]).exists):  # a long thought
            await asyncio.sleep(0.05)
    return f"I have read message {len(heard)} of this conversation: {last}"

"""An agent without a model: it does what the last message says, and keeps a diary in which each
time it is run is a line.

`wait` takes until a file with the thread's name lies beside the diary, `fail` fails, `ask` stops to
ask a person, all else is echoed.
"""
# What is imported here is installed in the server's environment only.
# mypy: ignore-errors

import asyncio
import json
import os
from pathlib import Path

from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import interrupt

FOLDER = Path(os.environ["AGENT_NOTES"])


def write(line: dict) -> None:
    with (FOLDER / "diary").open("a") as diary:
        diary.write(json.dumps(line) + "\n")


async def until_there(file: Path) -> None:
    while True:
        if await asyncio.to_thread(file.exists):
            return
        await asyncio.sleep(0.02)


async def act(state: MessagesState, config: RunnableConfig) -> dict:
    text, thread = state["messages"][-1].content, config["configurable"]["thread_id"]
    recall = {
        name: value for name, value in config["metadata"].items() if name.startswith("recall_")
    }
    await asyncio.to_thread(write, {"thread": thread, "text": text, "recall": recall})
    match text.removeprefix("[Scheduled recall] "):
        case "wait":
            await until_there(FOLDER / thread)
        case "fail":
            raise ValueError("no model today")
        case "ask":
            interrupt("may I?")
    return {"messages": [AIMessage(f"done: {text}")]}


graph = StateGraph(MessagesState).add_node("act", act).add_edge(START, "act").compile()

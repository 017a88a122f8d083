"""An agent without a model behind A2A: each time that it is run is a line in its diary, and `wait`
takes until a file of that name lies beside it."""
# What is imported here is installed in the server's environment only.
# mypy: ignore-errors

import asyncio
import json
import os
from pathlib import Path

import uvicorn
from a2a.server.agent_execution import AgentExecutor
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import create_agent_card_routes, create_rest_routes
from a2a.server.tasks import InMemoryTaskStore, TaskUpdater
from a2a.types import AgentCapabilities, AgentCard, Task, TaskState, TaskStatus
from starlette.applications import Starlette

FOLDER = Path(os.environ["AGENT_NOTES"])


async def until_there(file: Path) -> None:
    while True:
        if await asyncio.to_thread(file.exists):
            return
        await asyncio.sleep(0.02)


class Agent(AgentExecutor):
    async def execute(self, context, event_queue):
        text, message = context.get_user_input(), context.message.message_id
        line = {"context": context.context_id, "task": context.task_id, "message": message}
        with (FOLDER / "diary").open("a") as diary:
            diary.write(json.dumps(line | {"text": text, "does": "begins"}) + "\n")
        if context.current_task is None:
            submitted = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
            await event_queue.enqueue_event(
                Task(
                    id=context.task_id,
                    context_id=context.context_id,
                    status=submitted,
                    history=[context.message],
                )
            )
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        await updater.start_work()
        if text == "wait":
            await until_there(FOLDER / "wait")
        await updater.complete()
        with (FOLDER / "diary").open("a") as diary:
            diary.write(json.dumps(line | {"text": text, "does": "ends"}) + "\n")

    async def cancel(self, context, event_queue):
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()


card = AgentCard(name="agent", version="1", capabilities=AgentCapabilities(streaming=True))
handler = DefaultRequestHandler(Agent(), InMemoryTaskStore(), card)
app = Starlette(routes=[*create_agent_card_routes(card), *create_rest_routes(handler)])
uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]))

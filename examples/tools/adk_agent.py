"""An agent of Google's ADK that schedules its own recalls: one turn of a conversation.

python -m tools.adk_agent SESSION 'remind me in 2 hours to look at the build'
"""

import asyncio
import os
import sys

from google.adk.agents import Agent
from google.adk.runners import InMemoryRunner
from google.genai.types import UserContent
from psycopg_pool import AsyncConnectionPool

from fake_models.adk import FakeModel
from recall_worker import Recalls
from recall_worker.tools import recall_tools


async def turn(session_id: str, text: str) -> str:
    async with AsyncConnectionPool(os.environ["RECALL_DSN"]) as pool:
        model = FakeModel()  # a real one: "gemini-3.8-flash"
        agent = Agent(name="helper", model=model, tools=recall_tools(Recalls(pool), session_id))
        runner = InMemoryRunner(agent)
        runner.auto_create_session = True
        said = ""
        async for event in runner.run_async(
            user_id="ann", session_id=session_id, new_message=UserContent(text)
        ):
            if event.is_final_response() and event.content:
                said = "".join(part.text or "" for part in event.content.parts or [])
        return said


print(asyncio.run(turn(*sys.argv[1:])))

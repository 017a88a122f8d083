"""An agent of Agno that schedules its own recalls: one turn of a conversation.

python -m tools.agno_agent SESSION 'remind me in 2 hours to look at the build'
"""

import asyncio
import os
import sys

from agno.agent import Agent
from psycopg_pool import AsyncConnectionPool

from fake_models.agno import FakeModel
from recall_worker import Recalls
from recall_worker.tools import recall_tools


async def turn(session_id: str, text: str) -> str:
    async with AsyncConnectionPool(os.environ["RECALL_DSN"]) as pool:
        model = FakeModel()  # a real one: Claude(id="claude-sonnet-5-5"), of agno.models.anthropic
        tools = recall_tools(Recalls(pool), session_id)
        agent = Agent(model=model, tools=tools, telemetry=False)
        answer = await agent.arun(text, session_id=session_id)
        return str(answer.content)


print(asyncio.run(turn(*sys.argv[1:])))

"""An agent of PydanticAI that schedules its own recalls: one turn of a conversation.

python -m tools.pydantic_ai_agent SESSION 'remind me in 2 hours to look at the build'
"""

import asyncio
import os
import sys

from psycopg_pool import AsyncConnectionPool
from pydantic_ai import Agent

from fake_models.pydantic_ai import FakeModel
from recall_worker import Recalls
from recall_worker.tools import recall_tools


async def turn(session_id: str, text: str) -> str:
    async with AsyncConnectionPool(os.environ["RECALL_DSN"]) as pool:
        model = FakeModel()  # a real one: "anthropic:claude-sonnet-5-5"
        agent = Agent(model, tools=recall_tools(Recalls(pool), session_id))
        answer = await agent.run(text)
        return answer.output


print(asyncio.run(turn(*sys.argv[1:])))

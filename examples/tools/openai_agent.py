"""An agent of the OpenAI Agents SDK that schedules its own recalls: one turn of a conversation.

python -m tools.openai_agent SESSION 'remind me in 2 hours to look at the build'
"""

import asyncio
import os
import sys

from agents import Agent, RunConfig, Runner, function_tool
from psycopg_pool import AsyncConnectionPool

from fake_models.openai_agents import FakeModel
from recall_worker import Recalls
from recall_worker.tools import recall_tools


async def turn(session_id: str, text: str) -> str:
    async with AsyncConnectionPool(os.environ["RECALL_DSN"]) as pool:
        model = FakeModel()  # a real one: "gpt-6-luna"
        tools = [function_tool(tool) for tool in recall_tools(Recalls(pool), session_id)]
        agent = Agent(name="helper", model=model, tools=tools)
        answer = await Runner.run(agent, text, run_config=RunConfig(tracing_disabled=True))
        return str(answer.final_output)


print(asyncio.run(turn(*sys.argv[1:])))

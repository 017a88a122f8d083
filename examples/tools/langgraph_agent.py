"""An agent of LangGraph that schedules its own recalls: one turn of a conversation.

python -m tools.langgraph_agent SESSION 'remind me in 2 hours to look at the build'
"""

import asyncio
import os
import sys

from langchain.agents import create_agent
from psycopg_pool import AsyncConnectionPool

from fake_models.langgraph import FakeModel
from recall_worker import Recalls
from recall_worker.tools import recall_tools


async def turn(session_id: str, text: str) -> str:
    async with AsyncConnectionPool(os.environ["RECALL_DSN"]) as pool:
        model = FakeModel()  # a real one: ChatOpenAI(model="gpt-6-luna"), of langchain-openai
        agent = create_agent(model, recall_tools(Recalls(pool), session_id))
        state = await agent.ainvoke({"messages": [("user", text)]})
        return state["messages"][-1].text


print(asyncio.run(turn(*sys.argv[1:])))

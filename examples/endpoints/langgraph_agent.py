"""An agent of LangGraph behind the run endpoint: a person chats with it, it schedules its own
recalls, and recall-worker calls it.

uvicorn endpoints.langgraph_agent:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Body, FastAPI
from langchain.agents import create_agent
from langgraph.checkpoint.memory import InMemorySaver
from psycopg_pool import AsyncConnectionPool

from fake_models.langgraph import FakeModel
from recall_worker import Recalls
from recall_worker.endpoint import Endpoint
from recall_worker.tools import recall_tools

DSN = os.environ["RECALL_DSN"]
pool = AsyncConnectionPool(DSN, open=False)
model = FakeModel()  # a real one: ChatOpenAI(model="gpt-6-luna"), of langchain-openai
conversations = InMemorySaver()  # to keep them: AsyncPostgresSaver


async def run(session_id: str, message: str) -> str:
    """One turn of a session: what a person says, or what a recall says."""
    tools = recall_tools(Recalls(pool), session_id)
    agent = create_agent(model, tools, checkpointer=conversations)
    state = await agent.ainvoke(
        {"messages": [("user", message)]}, {"configurable": {"thread_id": session_id}}
    )
    return state["messages"][-1].text


endpoint = Endpoint(run=run, dsn=DSN)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with pool, endpoint:
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/sessions", endpoint)  # RECALL_RUN_URL=http://127.0.0.1:8000/sessions/{session_id}/run


@app.post("/chat/{session_id}")
async def chat(session_id: str, text: str = Body()) -> str:
    async with endpoint.session(session_id, wait=60):  # Meanwhile a recall is told: busy.
        return await run(session_id, text)

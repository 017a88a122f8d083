"""An agent of the OpenAI Agents SDK behind the run endpoint: a person chats with it, it schedules
its own recalls, and recall-worker calls it.

uvicorn endpoints.openai_agent:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agents import Agent, RunConfig, Runner, SQLiteSession, function_tool
from fastapi import Body, FastAPI
from psycopg_pool import AsyncConnectionPool

from fake_models.openai_agents import FakeModel
from recall_worker import Recalls
from recall_worker.endpoint import Endpoint
from recall_worker.tools import recall_tools

DSN = os.environ["RECALL_DSN"]
pool = AsyncConnectionPool(DSN, open=False)
model = FakeModel()  # a real one: "gpt-6-luna"
conversations: dict[str, SQLiteSession] = {}  # to keep them: SQLAlchemySession


async def run(session_id: str, message: str) -> str:
    """One turn of a session: what a person says, or what a recall says."""
    tools = [function_tool(tool) for tool in recall_tools(Recalls(pool), session_id)]
    agent = Agent(name="helper", model=model, tools=tools)
    conversation = conversations.setdefault(session_id, SQLiteSession(session_id))
    quiet = RunConfig(tracing_disabled=True)
    answer = await Runner.run(agent, message, session=conversation, run_config=quiet)
    return str(answer.final_output)


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

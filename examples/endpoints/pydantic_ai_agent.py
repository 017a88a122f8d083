"""An agent of PydanticAI behind the run endpoint: a person chats with it, it schedules its own
recalls, and recall-worker calls it.

uvicorn endpoints.pydantic_ai_agent:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Body, FastAPI
from psycopg_pool import AsyncConnectionPool
from pydantic_ai import Agent, ModelMessage

from fake_models.pydantic_ai import FakeModel
from recall_worker import Recalls
from recall_worker.endpoint import Endpoint
from recall_worker.tools import recall_tools

DSN = os.environ["RECALL_DSN"]
pool = AsyncConnectionPool(DSN, open=False)
model = FakeModel()  # a real one: "anthropic:claude-sonnet-5-5"
conversations: dict[str, list[ModelMessage]] = {}  # to keep them: a table of yours


async def run(session_id: str, message: str) -> str:
    """One turn of a session: what a person says, or what a recall says."""
    agent = Agent(model, tools=recall_tools(Recalls(pool), session_id))
    answer = await agent.run(message, message_history=conversations.get(session_id))
    conversations[session_id] = answer.all_messages()
    return answer.output


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

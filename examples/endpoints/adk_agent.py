"""An agent of Google's ADK behind the run endpoint: a person chats with it, it schedules its own
recalls, and recall-worker calls it.

uvicorn endpoints.adk_agent:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Body, FastAPI
from google.adk.agents import Agent
from google.adk.runners import Runner
from google.adk.sessions import InMemorySessionService
from google.genai.types import UserContent
from psycopg_pool import AsyncConnectionPool

from fake_models.adk import FakeModel
from recall_worker import Recalls
from recall_worker.endpoint import Endpoint
from recall_worker.tools import recall_tools

DSN = os.environ["RECALL_DSN"]
pool = AsyncConnectionPool(DSN, open=False)
model = FakeModel()  # a real one: "gemini-3.8-flash"
conversations = InMemorySessionService()  # to keep them: DatabaseSessionService


async def run(session_id: str, message: str) -> str:
    """One turn of a session: what a person says, or what a recall says."""
    agent = Agent(name="helper", model=model, tools=recall_tools(Recalls(pool), session_id))
    runner = Runner(
        app_name="app", agent=agent, session_service=conversations, auto_create_session=True
    )
    said = ""
    async for event in runner.run_async(
        user_id="ann", session_id=session_id, new_message=UserContent(message)
    ):
        if event.is_final_response() and event.content:
            said = "".join(part.text or "" for part in event.content.parts or [])
    return said


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

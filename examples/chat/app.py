"""A chat with an agent that comes back: a person's turns and the recalls' runs share one lock.

    DATABASE_URL=postgresql://… uvicorn app:app

`turn` is what a person does, `run` what a recall does, by way of `endpoint`, which recall-worker
calls. What is said is kept and shown by live.py; the agent is in agent.py.
"""

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import live
import psycopg
from agent import answer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from recall_worker import Recalls
from recall_worker.endpoint import Endpoint, RunRequest, SessionBusy, StoreUnavailable

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
STATIC = Path(__file__).parent / "static"
recalls = Recalls(live.pool, actor="agent")


# --- what a person says ---------------------------------------------------------------------------


async def turn(request: Request) -> JSONResponse:
    """Store what a person says and answer it, never beside a recall's run in this session."""
    session_id = str(request.path_params["id"])
    if not request.headers.get("content-type", "").startswith("application/json"):
        return refusal(415, "Send JSON.")
    if int(request.headers.get("content-length") or 1 << 20) > 1 << 15:
        return refusal(413, "This message is too long.")
    try:
        text = str((await request.json())["text"]).encode(errors="replace").decode().strip()
    except (ValueError, KeyError, TypeError, RecursionError):
        return refusal(400, 'Send {"text": "…"}.')
    if not text or "\0" in text:
        return refusal(400, "Say something.")
    try:
        async with live.pool.connection() as conn:
            await conn.execute(
                "insert into sessions (id, user_id) values (%s, 'ann') on conflict do nothing",
                [session_id],
            )
        async with endpoint.session(session_id, wait=60):
            await live.store(session_id, "user", text)
            try:
                async for chunk in respond(session_id, text):
                    await live.show(session_id, chunk)
            except Exception:
                await live.store(session_id, "agent", "I could not answer: the log says why.")
                raise
    except SessionBusy:
        return refusal(409, "The agent is still at work. Send it again in a while.")
    except (StoreUnavailable, psycopg.OperationalError):
        return refusal(503, "PostgreSQL does not answer. Send it again in a while.")
    return JSONResponse({})


async def respond(session_id: str, text: str, key: str | None = None) -> AsyncIterator[str]:
    """What the agent answers to the last message, piece by piece; stored when it is whole."""
    *before, _ = await live.messages(session_id)
    said = ""
    async for chunk in answer(recalls, session_id, text, before[-50:], key is not None):
        said += chunk
        yield chunk
    await live.store(session_id, "agent", said.strip() or "(nothing)", key)


def refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"message": message}, status)


# --- what a recall does ---------------------------------------------------------------------------


async def exists(session_id: str) -> bool:
    async with live.pool.connection() as conn:
        found = await conn.execute("select from sessions where id = %s", [session_id])
        return found.rowcount == 1


async def store_system(session_id: str, system_message: str, key: str) -> None:
    await live.store(session_id, "system", system_message, key)


async def run(session_id: str, message: str, recall: RunRequest) -> AsyncIterator[str]:
    async for chunk in respond(session_id, message, recall.key):
        yield chunk


endpoint = Endpoint(
    run=run,
    sessions=exists,
    store=store_system,
    on_chunk=live.show,
    dsn=live.DSN,
    token=os.environ.get("RUN_TOKEN") or None,
)


# --- the application ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with live.pool, endpoint:
        async with live.pool.connection() as conn:
            await conn.execute(live.TABLES)
        listening = asyncio.create_task(live.listen())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(
                number, partial(stop, asyncio.get_running_loop(), signal.getsignal(number))
            )
        yield
        listening.cancel()


def stop(loop: asyncio.AbstractEventLoop, server: Any, *received: Any) -> None:
    """The server is told to stop: it would wait for the open pages."""
    live.close(loop)
    server(*received)


def new_chat(request: Request) -> RedirectResponse:
    """Who knows a chat's address reads it: this example knows no accounts."""
    return RedirectResponse(f"/chats/{uuid.uuid4()}")


def page(request: Request) -> FileResponse:
    return FileResponse(STATIC / "index.html", headers=HEADERS)


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/", new_chat),
        Route("/chats/{id:uuid}", page),
        Route("/chats/{id:uuid}/events", live.events),
        Route("/chats/{id:uuid}/messages", turn, methods=["POST"]),
        Mount("/static", StaticFiles(directory=STATIC)),
        Mount("/agent", endpoint),  # what recall-worker calls: /agent/{session_id}/run
    ],
)

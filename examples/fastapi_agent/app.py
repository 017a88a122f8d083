"""A small agent application: it owns the sessions, a person chats with its agent, the agent
schedules recalls, recall-worker calls them in.

    pip install fastapi uvicorn[standard] asyncpg
    DATABASE_URL=postgresql://… uvicorn app:app                      # the application
    RECALL_DSN=… RECALL_RUN_URL='http://127.0.0.1:8000/sessions/{session_id}/run' recall-worker run

What to copy from here is the order of things in `run`: the key is looked up and the session taken
in one transaction, so that two calls at once, or a call and a chat, can never both have the
session; the session is given back however the run ends. The agent is a stand-in for a language
model: it understands `remind me in 5s: <what>` and `stop reminding me`.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator

import asyncpg
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse

TOKEN = os.environ.get("RUN_TOKEN")
# Seconds for which a session stays busy without a renewal, in case this process dies.
BUSY_FOR = 30

TABLES = """
create table if not exists sessions (
    id text primary key, user_id text not null, busy_until timestamptz
);
create table if not exists messages (
    id bigint generated always as identity primary key,
    session_id text not null references sessions (id) on delete cascade,
    role text not null, text text not null, recall_key text,
    created_at timestamptz not null default now(),
    -- a recall's messages are stored once, however often it is called under one key
    unique (recall_key, role)
);
create table if not exists runs (key text primary key, body_hash text not null, answer jsonb);
create table if not exists session_recalls (
    id text primary key, session_id text not null references sessions (id) on delete cascade,
    call_type text not null check (call_type in ('once', 'recurring', 'immediate')),
    trigger_at timestamptz not null,
    interval_seconds integer, internal_comment text, additional_context_message text not null,
    status text not null default 'pending' check (status in ('pending', 'fired', 'cancelled')),
    created_at timestamptz not null, updated_at timestamptz not null
);
create index if not exists idx_recalls_trigger_at_status on session_recalls (trigger_at, status);
create index if not exists idx_recalls_session_status on session_recalls (session_id, status);
create unique index if not exists idx_recalls_active_pending on session_recalls (session_id)
    where status = 'pending';
"""


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], max_size=10) as pool:
        await pool.execute(TABLES)
        app.state.pool = pool
        yield


app = FastAPI(title="A small agent application", lifespan=lifespan)


# --- the agent and its tool -----------------------------------------------------------------------


async def agent(pool: asyncpg.Pool, session_id: str, text: str) -> str:
    """What a language model with the tool `schedule_recall` would do."""
    if wish := re.fullmatch(r"remind me in (\d+)s: (.+)", text, re.DOTALL):
        return await schedule_recall(pool, session_id, int(wish[1]), wish[2])
    if text == "stop reminding me":
        done = await pool.execute(
            (
                "update session_recalls set status = 'cancelled', updated_at = now() where "
                "session_id = $1 and status = 'pending'"
            ),
            session_id,
        )
        return "I will not." if done != "UPDATE 0" else "I was not going to."
    await asyncio.sleep(0.05)
    return f"I have read: {text}"


async def schedule_recall(pool: asyncpg.Pool, session_id: str, seconds: int, message: str) -> str:
    """The tool. Also from inside a run: the recall in the run has freed its session's slot."""
    try:
        await pool.execute(
            """insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds,
                   internal_comment, additional_context_message, status, created_at, updated_at)
               values (gen_random_uuid()::text, $1, 'once', now() + $2 * interval '1 second', null,
                   null, $3, 'pending', now(), now())""",
            session_id,
            seconds,
            message,
        )
    except asyncpg.UniqueViolationError:
        return "There is a reminder already."
    return f"I will come back in {seconds} s."


async def keep_busy(pool: asyncpg.Pool, session_id: str) -> None:
    """Renew the busy mark while a session is in use."""
    while True:
        await asyncio.sleep(BUSY_FOR / 3)
        await pool.execute(
            "update sessions set busy_until = now() + $2 * interval '1 second' where id = $1",
            session_id,
            BUSY_FOR,
        )


async def take(conn: asyncpg.Connection, session_id: str) -> bool:
    """Take the session if it is free: one atomic statement, so that only one caller gets it."""
    return await conn.fetchval(
        """update sessions set busy_until = now() + $2 * interval '1 second'
           where id = $1 and (busy_until is null or busy_until < now()) returning true""",
        session_id,
        BUSY_FOR,
    )


async def give_back(pool: asyncpg.Pool, session_id: str) -> None:
    await pool.execute("update sessions set busy_until = null where id = $1", session_id)


# --- a person chats -------------------------------------------------------------------------------


@app.websocket("/sessions/{session_id}/chat")
async def chat(socket: WebSocket, session_id: str, user: str = "ann") -> None:
    """While a person is connected the session is theirs: due recalls wait."""
    pool = app.state.pool
    await socket.accept()
    async with pool.acquire() as conn:
        await conn.execute(
            "insert into sessions (id, user_id) values ($1, $2) on conflict do nothing",
            session_id,
            user,
        )
        while not await take(conn, session_id):
            await asyncio.sleep(0.1)  # The agent is at work; the person waits a moment.
    alive = asyncio.create_task(keep_busy(pool, session_id))
    try:
        while True:
            text = await socket.receive_text()
            await pool.execute(
                "insert into messages (session_id, role, text) values ($1, 'user', $2)",
                session_id,
                text,
            )
            answer = await agent(pool, session_id, text)
            await pool.execute(
                "insert into messages (session_id, role, text) values ($1, 'agent', $2)",
                session_id,
                answer,
            )
            await socket.send_text(answer)
    except WebSocketDisconnect:
        pass
    finally:
        alive.cancel()
        await give_back(pool, session_id)


# --- recall-worker calls --------------------------------------------------------------------------


@app.post("/sessions/{session_id}/run")
async def run(session_id: str, request: Request) -> Response:
    pool = app.state.pool
    if TOKEN and request.headers.get("authorization") != f"Bearer {TOKEN}":
        return JSONResponse({"code": "unauthorized"}, 401)
    key, body = request.headers.get("idempotency-key"), await request.body()
    try:
        document = json.loads(body)
        user_message, system_message = (
            str(document["user_message"]),
            str(document["system_message"]),
        )
    except (ValueError, KeyError, TypeError):
        return JSONResponse({"code": "invalid_body"}, 400)
    if not key:
        return JSONResponse({"code": "missing_idempotency_key"}, 400)
    body_hash = hashlib.sha256(body).hexdigest()

    async with pool.acquire() as conn, conn.transaction():
        # A second call with this key waits here for the first one's transaction, and then sees its
        # row.
        new = await conn.fetchval(
            (
                "insert into runs (key, body_hash) values ($1, $2) on conflict do nothing "
                "returning true"
            ),
            key,
            body_hash,
        )
        known = await conn.fetchrow("select body_hash, answer from runs where key = $1", key)
        if known["body_hash"] != body_hash:
            return JSONResponse(
                {"code": "key_reused", "message": "this key was used with another body"}, 422
            )
        if known["answer"] is not None:
            return JSONResponse(json.loads(known["answer"]))
        if not await take(conn, session_id):
            if new:
                await conn.execute("delete from runs where key = $1", key)
            if await conn.fetchval("select true from sessions where id = $1", session_id) is None:
                return JSONResponse({"code": "session_not_found"}, 404)
            return JSONResponse({"code": "session_busy"}, 409, {"Retry-After": "1"})
        await conn.execute(
            (
                "insert into messages (session_id, role, text, recall_key) values ($1, 'system', "
                "$2, $3) on conflict do nothing"
            ),
            session_id,
            system_message,
            key,
        )

    alive = asyncio.create_task(keep_busy(pool, session_id))
    try:
        answer = {"status": "completed", "reply": await agent(pool, session_id, user_message)}
        async with pool.acquire() as conn, conn.transaction():
            await conn.execute(
                (
                    "insert into messages (session_id, role, text, recall_key) values ($1, "
                    "'agent', $2, $3) on conflict do nothing"
                ),
                session_id,
                answer["reply"],
                key,
            )
            await conn.execute(
                "update runs set answer = $2 where key = $1", key, json.dumps(answer)
            )
    finally:
        alive.cancel()
        await give_back(pool, session_id)
    return JSONResponse(answer)


@app.get("/sessions/{session_id}/messages")
async def messages(session_id: str) -> list[dict[str, str]]:
    rows = await app.state.pool.fetch(
        "select role, text from messages where session_id = $1 order by id", session_id
    )
    return [dict(row) for row in rows]

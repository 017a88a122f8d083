"""A small agent application: it owns the sessions, a person chats with its agent, the agent
schedules recalls, recall-worker calls them in.

    pip install fastapi uvicorn[standard] asyncpg recall-worker
    DATABASE_URL=postgresql://… uvicorn app:app                      # the application
    RECALL_DSN=… RECALL_RUN_URL='http://127.0.0.1:8000/sessions/{session_id}/run' recall-worker run

The run endpoint is recall-worker's own kit, mounted: it keeps keys, answers and who is in which
session, in the same database, for as many processes as run. What is the application's is given to
it as three functions (`run_recall`, `session_exists`, `store_message`), and the chat takes its
session by `endpoint.session`, so that a recall and a person never meet. The agent is a stand-in for
a language model: it understands `remind me in 5s: <what>` and `stop reminding me`.
"""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator

import asyncpg
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from recall_worker.endpoint import Endpoint, RunRequest, SessionBusy

# Seconds that a person waits while the agent is at work in the session.
PATIENCE = 60.0

TABLES = """
create table if not exists sessions (
    id text primary key, user_id text not null
);
create table if not exists messages (
    id bigint generated always as identity primary key,
    session_id text not null references sessions (id) on delete cascade,
    role text not null, text text not null, recall_key text,
    created_at timestamptz not null default now(),
    -- a recall's messages are stored once, however often it is called under one key
    unique (recall_key, role)
);
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
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], max_size=10) as pool, endpoint:
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


async def say(session_id: str, role: str, text: str, key: str | None = None) -> None:
    """Store a message; those of a recall once, by its key."""
    await app.state.pool.execute(
        "insert into messages (session_id, role, text, recall_key) values ($1, $2, $3, $4) "
        "on conflict do nothing",
        *(session_id, role, text, key),
    )


# --- recall-worker calls --------------------------------------------------------------------------


async def run_recall(session_id: str, message: str, recall: RunRequest) -> str:
    answer = await agent(app.state.pool, session_id, message)
    await say(session_id, "agent", answer, recall.key)
    return answer


async def session_exists(session_id: str) -> bool:
    return await app.state.pool.fetchval(
        "select exists (select from sessions where id = $1)", session_id
    )


async def store_message(session_id: str, system_message: str, key: str) -> None:
    await say(session_id, "system", system_message, key)


endpoint = Endpoint(
    run=run_recall,
    sessions=session_exists,
    store=store_message,
    dsn=os.environ["DATABASE_URL"],
    token=os.environ.get("RUN_TOKEN"),
)


# --- a person chats -------------------------------------------------------------------------------


@app.websocket("/sessions/{session_id}/chat")
async def chat(socket: WebSocket, session_id: str, user: str = "ann") -> None:
    """While a person is connected the session is theirs: due recalls wait."""
    pool = app.state.pool
    await socket.accept()
    await pool.execute(
        "insert into sessions (id, user_id) values ($1, $2) on conflict do nothing",
        *(session_id, user),
    )
    try:
        async with endpoint.session(session_id, wait=PATIENCE):
            while True:
                text = await socket.receive_text()
                await say(session_id, "user", text)
                answer = await agent(pool, session_id, text)
                await say(session_id, "agent", answer)
                await socket.send_text(answer)
    except WebSocketDisconnect:
        pass
    except SessionBusy:
        await socket.close(1013, "The agent is at work. Try again later.")


@app.get("/sessions/{session_id}/messages")
async def messages(session_id: str) -> list[dict[str, str]]:
    rows = await app.state.pool.fetch(
        "select role, text from messages where session_id = $1 order by id", session_id
    )
    return [dict(row) for row in rows]


# Last: below /sessions, all that is not one of the routes above.
app.mount("/sessions", endpoint)

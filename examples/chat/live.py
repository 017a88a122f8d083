"""What is said in the chats: stored in `messages`, and told to the open pages.

A notification takes it from there to every page, whichever process of the chat has it. It is only a
doorbell for what is stored, so a page that was away misses nothing; of an answer that is being
written it carries the pieces.
"""

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator
from typing import Any

import psycopg
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool
from starlette.requests import Request
from starlette.responses import StreamingResponse

DSN = os.environ["DATABASE_URL"]
TABLES = """
create table if not exists sessions (id text primary key, user_id text not null);
create table if not exists messages (
    id bigint generated always as identity primary key,
    session_id text not null references sessions (id) on delete cascade,
    role text not null check (role in ('user', 'agent', 'system')), text text not null,
    created_at timestamptz not null default now(),
    -- A recall's messages are stored once, however often it is called under its key.
    key text, unique (key, role)
);
create index if not exists messages_session on messages (session_id, id);
"""

pool = AsyncConnectionPool(
    DSN,
    open=False,
    max_size=10,
    kwargs={"row_factory": dict_row, "client_encoding": "utf8"},  # of whatever the database is
    check=AsyncConnectionPool.check_connection,  # PostgreSQL may have ended it meanwhile
)
pages: dict[str, set[asyncio.Queue[str | None]]] = {}
"""For each session the open pages of this process. None is for a page to look at the messages."""
closing = asyncio.Event()


async def messages(session_id: str, after: int = 0) -> list[dict[str, Any]]:
    async with pool.connection() as conn:
        found = await conn.execute(
            """select id, role, text, to_json(created_at) as at from messages
               where session_id = %s and id > %s order by id""",
            [session_id, after],
        )
        return await found.fetchall()


async def store(session_id: str, role: str, text: str, key: str | None = None) -> None:
    async with pool.connection() as conn:
        await conn.execute(
            """insert into messages (session_id, role, text, key) values (%s, %s, %s, %s)
               on conflict (key, role) do nothing""",
            [session_id, role, text, key],
        )
        await conn.execute("select pg_notify('chat', %s)", [json.dumps([session_id, None])])


async def show(session_id: str, chunk: str) -> None:
    """Let the open pages see a piece of the answer that is being written."""
    async with pool.connection() as conn:
        for start in range(0, len(chunk), 500):  # a notification has 8000 octets at most
            piece = json.dumps([session_id, chunk[start : start + 500]])
            await conn.execute("select pg_notify('chat', %s)", [piece])


def look() -> None:
    """Have every open page look at the messages."""
    for queue in [queue for queues in pages.values() for queue in queues]:
        queue.put_nowait(None)


async def listen() -> None:
    """Pass on what is notified, for ever; after a lost connection every page looks again."""
    while True:
        with contextlib.suppress(psycopg.OperationalError):
            async with await psycopg.AsyncConnection.connect(
                DSN, autocommit=True, client_encoding="utf8"
            ) as conn:
                await conn.execute("listen chat")
                look()
                async for note in conn.notifies():
                    session_id, chunk = json.loads(note.payload)
                    for queue in pages.get(session_id, ()):
                        queue.put_nowait(chunk)
        await asyncio.sleep(1)


async def events(request: Request) -> StreamingResponse:
    """The open chat, as server-sent events: all messages, then what comes."""
    session_id, seen = str(request.path_params["id"]), request.headers.get("last-event-id", "")

    async def stream(seen: int) -> AsyncIterator[str]:
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        pages.setdefault(session_id, set()).add(queue)
        chunk, is_told = None, False
        try:
            while not closing.is_set():
                if chunk is None:
                    for row in await messages(session_id, seen):
                        seen = row["id"]
                        yield f"id: {seen}\nevent: message\ndata: {json.dumps(row)}\n\n"
                    if is_told:  # What was a piece of an answer is in a message now.
                        yield "event: whole\ndata:\n\n"
                else:
                    yield f"event: chunk\ndata: {json.dumps(chunk)}\n\n"
                try:
                    chunk, is_told = await asyncio.wait_for(queue.get(), 15), True
                except TimeoutError:
                    chunk, is_told = None, False
                    yield ": still here\n\n"  # It fails where the page is gone.
        except psycopg.OperationalError:
            pass  # The stream ends, and the page asks again by itself.
        finally:
            pages[session_id].discard(queue)
            if not pages[session_id]:
                del pages[session_id]

    start = int(seen) if re.fullmatch(r"\d{1,18}", seen, re.ASCII) else 0
    return StreamingResponse(stream(start), media_type="text/event-stream")


def close(loop: asyncio.AbstractEventLoop) -> None:
    """End the open pages' streams, as a server that stops waits for them. From any thread."""
    closing.set()
    loop.call_soon_threadsafe(look)

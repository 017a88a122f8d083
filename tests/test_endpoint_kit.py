"""The endpoint kit, served by uvicorn in the test's own loop, with its keys in memory and in
PostgreSQL: what an application gives it, and what it promises a caller."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
import uvicorn
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount

from recall_worker import schema
from recall_worker.endpoint import Endpoint, RunRequest, SessionBusy, StoreUnavailable
from recall_worker.endpoint.memory import MemoryStore
from recall_worker.endpoint.postgres import PostgresStore
from recall_worker.endpoint.request import Asked, is_run, run_named
from recall_worker.endpoint.store import (
    Ended,
    GoesOn,
    Lost,
    OtherRequest,
    Start,
    Started,
    Store,
    Taken,
)
from recall_worker.protocols.contract import address, segment, signature

from .support import postgres
from .support.pgbouncer import PgBouncer
from .support.proxy import Proxy
from .test_reference_api import document

TOKEN = "rosebud-1"
DEADLINE = 30.0
LEASE = 30.0
"""Longer than any test waits, where no lease is to end."""


class Agent:
    """Does what the message says: "wait" until `opened`, "break", or answer at once."""

    def __init__(self) -> None:
        self.runs: list[RunRequest] = []
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.chunks: list[tuple[str, Any]] = []
        self.stored: list[tuple[str, str, str]] = []

    async def __call__(self, session_id: str, message: str, recall: RunRequest) -> Any:
        self.runs.append(recall)
        self.entered.set()
        try:
            if message == "wait":
                await self.opened.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if message == "break":
            raise RuntimeError("a tool broke")
        return f"did {message}"

    async def exists(self, session_id: str) -> bool:
        if session_id == "trouble":
            raise RuntimeError("no database")
        return not session_id.startswith("missing")

    async def store(self, session_id: str, system_message: str, key: str) -> None:
        self.stored.append((session_id, system_message, key))

    async def on_chunk(self, session_id: str, chunk: Any) -> None:
        self.chunks.append((session_id, chunk))


@contextlib.asynccontextmanager
async def served(app: Any, **options: Any) -> AsyncIterator[str]:
    """An ASGI application under uvicorn, its lifespan too; its base URL."""
    config = uvicorn.Config(app, log_level="warning", ws="none", **{"lifespan": "on"} | options)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        task = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            until = time.monotonic() + DEADLINE
            while not server.started and not task.done():
                assert time.monotonic() < until
                await asyncio.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await asyncio.wait_for(task, DEADLINE)


class Client:
    """Calls the run endpoint as the worker does."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.url, self.http = url, http

    async def run(
        self, session: str = "s", key: str = "r:1", message: str = "work", **changes: Any
    ) -> httpx.Response:
        body = changes.get("content", json.dumps(document(session, message)).encode())
        given = {"Idempotency-Key": key} | changes.get("headers", {})
        headers = {n.encode(): v if isinstance(v, bytes) else v.encode() for n, v in given.items()}
        return await self.http.post(address(self.url, session), content=body, headers=headers)


@contextlib.asynccontextmanager
async def called(
    app: Any, prefix: str = "", token: str | None = TOKEN, **options: Any
) -> AsyncIterator[Client]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with (
        served(app, **options) as base,
        httpx.AsyncClient(headers=headers, timeout=DEADLINE) as http,
    ):
        yield Client(f"{base}{prefix}/{{session_id}}/run", http)


@pytest.fixture
def agent() -> Agent:
    return Agent()


Make = Callable[..., Endpoint]


@pytest.fixture(params=["memory", "postgres"])
def make(request: pytest.FixtureRequest, agent: Agent) -> Make:
    """Makes an endpoint of the agent's, with its keys in either place."""
    dsn = None if request.param == "memory" else request.getfixturevalue("database")

    def made(**options: Any) -> Endpoint:
        given: dict[str, Any] = {
            "run": agent,
            "sessions": agent.exists,
            "store": agent.store,
            "on_chunk": agent.on_chunk,
            "token": TOKEN,
            "dsn": dsn,
            "lease": LEASE,
            "retry_after": 7,
            "answer_within": None,
            "drain": 0.2,
        }
        return Endpoint(**(given | options))

    return made


async def ended(run: Callable[[], Any]) -> Any:
    """Call until it is no longer said that the run goes on."""
    async with asyncio.timeout(DEADLINE):
        while (answer := await run()).status_code == 409:
            pass
    return answer


# --- what a call is answered ----------------------------------------------------------------------


async def test_a_run(make: Make, agent: Agent) -> None:
    """The agent is told what the call says, the system message is stored once, the chat sees the
    answer, and the same request gets the same octets again."""
    async with called(make(), "/agents/one") as client:
        first = await client.run(headers={"Recall-Attempt": "2"})
        again = await client.run()
    assert (first.status_code, first.json()) == (200, {"status": "completed", "output": "did work"})
    assert (again.content, again.headers["Idempotent-Replayed"]) == (first.content, "true")
    assert "Idempotent-Replayed" not in first.headers
    [told] = agent.runs
    assert (told.key, told.session_id, told.user_message) == ("r:1", "s", "work")
    assert (told.recall_id, told.occurrence, told.missed, told.attempt, told.starts) == (
        *("r", 1, 0, 2),
        1,
    )
    assert told.scheduled_for.isoformat() == "2027-01-31T09:00:00+00:00"
    assert agent.stored == [("s", "[Scheduled recall] work", "r:1")]
    assert agent.chunks == [("s", "did work")]


@pytest.mark.parametrize(
    ("call", "status", "code"),
    [
        ({"message": "break"}, 200, None),
        ({"session": "missing-1"}, 404, "session_not_found"),
        ({"session": "trouble"}, 503, "unavailable"),
        ({"headers": {"Authorization": "Bearer other"}}, 401, "unauthorized"),
        ({"headers": {"Authorization": b"Bearer \xff"}}, 401, "unauthorized"),
        ({"headers": {"Authorization": ""}}, 401, "unauthorized"),
        ({"content": b"{"}, 400, "malformed"),
        ({"content": b"[" * 4_000}, 400, "malformed"),
        ({"content": b"\xff\xfe"}, 400, "malformed"),
        ({"content": b"[]"}, 422, "invalid"),
        ({"content": json.dumps(document("other", "x")).encode()}, 422, "invalid"),
        ({"content": json.dumps(document("s", "\ud800")).encode()}, 422, "invalid"),
        ({"key": ""}, 400, "key_missing"),
        ({"key": "a b"}, 400, "key_invalid"),
        ({"key": "k" * 1025}, 400, "key_invalid"),
        ({"session": "a\0b"}, 422, "invalid"),
        ({"content": b" " * 5_000}, 413, "too_large"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
async def test_answers(
    make: Make, agent: Agent, call: dict[str, Any], status: int, code: str | None
) -> None:
    """Each kind of request gets its status and its code, in JSON; only what is right is run."""
    async with called(make(body_most=4_096), "/x") as client:
        answer = await client.run(**call)
    assert (answer.status_code, answer.json().get("code")) == (status, code)
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert len(agent.runs) == (1 if status == 200 else 0)
    if status == 200:
        assert answer.json() == {"status": "failed", "error": "RuntimeError: a tool broke"}
    if status == 503:
        assert answer.headers["Retry-After"] == "7"


async def test_a_body_without_a_length_is_bounded(agent: Agent) -> None:
    """One that comes in chunks is refused as soon as it is too long."""

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * 1_024

    async with called(Endpoint(agent, token=TOKEN, body_most=4_096)) as client:
        answer = await client.run(content=endless())
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


async def test_other_addresses_and_methods(make: Make) -> None:
    """What is no run's address is 404 without the code of a missing session; another method 405."""
    async with called(make(), "/x") as client:
        base = client.url.partition("/{")[0]
        seen = [
            (answer.status_code, answer.json()["code"], answer.headers.get("Allow"))
            for answer in [
                await client.http.post(f"{base}/s"),
                await client.http.get(f"{base}/s/run"),
                await client.http.put(f"{base}/s/run/r%3A1"),
                await client.http.get(f"{base}/s/run/unknown"),
                await client.http.delete(f"{base}/s/run/unknown"),
            ]
        ]
    assert seen == [
        (404, "not_found", None),
        (405, "method", "POST"),
        (405, "method", "GET, DELETE"),
        (404, "run_not_found", None),
        (404, "run_not_found", None),
    ]


@pytest.mark.parametrize("session", ["a/b", "a%2Fb", "a b?c#d", "ünder", "..%", "run", "{x}", "-"])
async def test_hostile_sessions(make: Make, agent: Agent, session: str) -> None:
    """A session's id arrives as it is; and its accepted run is found at the address that was
    given, below any prefix, whatever its key is."""
    key = "../a?b#c/{x}%25:1"
    async with called(make(answer_within=0.0), "/deep/below") as client:
        taken = await client.run(session, key, "wait")
        assert taken.status_code == 202, taken.text
        where = taken.url.join(taken.headers["Location"])
        assert (await client.http.get(where)).json() == {"run_id": key, "status": "running"}
        other = await client.http.get(
            address(client.url, "other") + "/" + str(where).rpartition("/")[2]
        )
        assert other.status_code == 404, "a run is that of its session only"
        agent.opened.set()
        assert (await client.http.delete(where)).status_code == 204
    assert [run.session_id for run in agent.runs] == [session]


@given(st.text(min_size=1), st.text(min_size=1))
def test_addresses_are_read_as_they_are_made(session: str, key: str) -> None:
    """Whatever a session and a key hold that UTF-8 can: the address of the worker's is read as the
    same names."""
    with contextlib.suppress(UnicodeEncodeError):
        path = f"/x/{segment(session)}/run/{segment(key)}"
        named = run_named(Asked("GET", path, {}))
        assert named == (None if "\0" in session + key else (session, key))
        assert is_run(Asked("POST", f"/x/{segment(session)}/run", {}))


@pytest.mark.parametrize(
    "mounted",
    [
        lambda app: app,
        lambda app: Starlette(routes=[Mount("/", app)], lifespan=app.lifespan),
        lambda app: _fastapi(app, "/"),
    ],
    ids=["alone", "Starlette", "FastAPI"],
)
@pytest.mark.parametrize("root_path", ["", "/behind"])
async def test_mounted(mounted: Callable[[Any], Any], root_path: str, agent: Agent) -> None:
    """It is found under every framework's mount, below a root path, and its accepted runs are."""
    app = mounted(Endpoint(agent, token=TOKEN, answer_within=0.0))
    async with called(app, "/a/b", root_path=root_path) as client:
        taken = await client.run("s/1", "r:1", "wait")
        where = taken.url.join(taken.headers["Location"])
        assert (await client.http.get(where)).json()["status"] == "running"
        assert (await client.http.delete(where)).status_code == 204


def _fastapi(app: Endpoint, prefix: str) -> FastAPI:
    api = FastAPI(lifespan=app.lifespan)
    api.mount(prefix, app)
    return api


async def test_without_a_lifespan(agent: Agent) -> None:
    """Where nobody starts it, the first call does."""
    api = FastAPI()
    endpoint = Endpoint(agent)
    api.mount("/agent", endpoint)
    async with called(api, "/agent", token=None) as client:
        assert (await client.run()).status_code == 200
    await endpoint.stop()


# --- keys, sessions, the chat ---------------------------------------------------------------------


async def test_one_of_many_at_once_gets_in(make: Make, agent: Agent) -> None:
    """Of twenty calls for one session that arrive together exactly one is started; and of ten
    under one key."""
    async with called(make()) as client:
        calls = [client.run(key=f"r:{n}", message="wait") for n in range(10)]
        calls += [client.run(key="r:0", message="wait") for _ in range(10)]
        tasks = [asyncio.create_task(call) for call in calls]
        completed = asyncio.as_completed(tasks)
        codes = {(await next(completed)).json()["code"] for _ in range(19)}
        agent.opened.set()
        answers = [await task for task in tasks]
    assert codes <= {"session_busy", "run_in_progress"}
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 19
    assert len(agent.runs) == 1
    assert all(a.headers["Retry-After"] == "7" for a in answers if a.status_code == 409)


async def test_a_key_has_one_body_and_one_session(make: Make, agent: Agent) -> None:
    """Another body, or another session, under a known key is 422, during its run and after."""
    async with called(make()) as client:
        running = asyncio.create_task(client.run(message="wait"))
        await asyncio.wait_for(agent.entered.wait(), DEADLINE)
        during = await client.run(message="other")
        agent.opened.set()
        await running
        after = await client.run(message="other"), await client.run("t")
    assert {a.json()["code"] for a in (during, *after)} == {"key_reused"}
    assert {a.status_code for a in (during, *after)} == {422}


async def test_the_chats_side(make: Make, agent: Agent) -> None:
    """While a person chats a run is busy and leaves no trace; while a run goes on the chat waits,
    or is told that the session is busy."""
    endpoint = make()
    async with called(endpoint) as client:
        async with endpoint.session("s") as lock:
            assert not lock.lost.is_set()
            refused = await client.run()
            assert (refused.status_code, refused.json()["code"]) == (409, "session_busy")
            with pytest.raises(SessionBusy) as busy:
                async with endpoint.session("s", wait=0.1):
                    pass
            assert "busy" in str(busy.value) and busy.value.hint
            assert (await client.run("other", "q:1")).status_code == 200
        assert agent.stored == [("other", "[Scheduled recall] work", "q:1")]
        running = asyncio.create_task(client.run(message="wait"))
        agent.entered.clear()
        await asyncio.wait_for(agent.entered.wait(), DEADLINE)

        async def chat() -> str:
            async with endpoint.session("s", wait=DEADLINE):
                return "in"

        waiting = asyncio.create_task(chat())
        await asyncio.sleep(0)
        assert not waiting.done()
        agent.opened.set()
        assert (await running).status_code == 200
        assert await asyncio.wait_for(waiting, DEADLINE) == "in"


async def test_a_chat_that_is_cancelled_gives_back(make: Make) -> None:
    """However the block ends, the session is free afterwards."""
    async with make() as endpoint:

        async def chat(entered: asyncio.Event) -> None:
            async with endpoint.session("s"):
                entered.set()
                await asyncio.Event().wait()

        entered = asyncio.Event()
        task = asyncio.create_task(chat(entered))
        await asyncio.wait_for(entered.wait(), DEADLINE)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with contextlib.suppress(ZeroDivisionError):
            async with endpoint.session("s"):
                raise ZeroDivisionError
        async with endpoint.session("s"):
            pass


async def test_a_caller_who_hangs_up(make: Make, agent: Agent) -> None:
    """The run learns that its caller has left, goes on, and answers who asks again."""
    async with called(make()) as client:
        task = asyncio.create_task(client.run(message="wait"))
        await asyncio.wait_for(agent.entered.wait(), DEADLINE)
        task.cancel()
        await asyncio.wait_for(agent.runs[0].left.wait(), DEADLINE)
        assert (await client.run(message="wait")).json()["code"] == "run_in_progress"
        agent.opened.set()
        answer = await ended(lambda: client.run(message="wait"))
        assert answer.json()["output"] == "did wait"
    assert len(agent.runs) == 1


# --- what the agent returns -----------------------------------------------------------------------


async def pieces(session_id: str, message: str) -> AsyncIterator[str | dict[str, Any]]:
    yield "I looked. "
    yield {"tool": "build"}
    yield "It is green."


async def returns_pieces(session_id: str, message: str) -> AsyncIterator[str | dict[str, Any]]:
    return pieces(session_id, message)


async def breaks_off(session_id: str, message: str) -> AsyncIterator[str]:
    yield "I look"
    raise RuntimeError("out of tokens")


@pytest.mark.parametrize("run", [pieces, returns_pieces], ids=["generator", "returned"])
async def test_pieces_of_an_answer(run: Any, agent: Agent) -> None:
    """Each goes to the chat, in order; the texts together are the answer; a chat that can't be
    shown something does not end the run."""

    async def on_chunk(session_id: str, chunk: Any) -> None:
        agent.chunks.append((session_id, chunk))
        if isinstance(chunk, dict):
            raise RuntimeError("the chat is closed")

    async with called(Endpoint(run, on_chunk=on_chunk)) as client:
        answer = await client.run()
    assert answer.json() == {"status": "completed", "output": "I looked. It is green."}
    assert [chunk for _, chunk in agent.chunks] == ["I looked. ", {"tool": "build"}, "It is green."]


def returning(result: Any) -> Any:
    async def run(session_id: str, message: str) -> Any:
        return result

    return run


@pytest.mark.parametrize(
    ("run", "answer"),
    [
        (returning(None), {"status": "completed"}),
        (returning({"status": "requires_action", "n": 1}), {"status": "requires_action", "n": 1}),
        (returning({"n": 1}), {"status": "completed", "n": 1}),
        (returning({"n": float("nan")}), {"status": "completed", "n": None}),
        (breaks_off, {"status": "failed", "error": "RuntimeError: out of tokens"}),
        (
            returning({"status": "running"}),
            {
                "status": "failed",
                "error": "ValueError: `run` returned status 'running': return when the run has "
                "ended",
            },
        ),
        (
            returning(7),
            {
                "status": "failed",
                "error": "TypeError: `run` returned int: return a str, a dict or None",
            },
        ),
    ],
    ids=["nothing", "a person", "a document", "not a number", "breaks off", "goes on", "a number"],
)
async def test_what_an_agent_returns(run: Any, answer: Mapping[str, Any]) -> None:
    """Whatever it is, the answer is JSON whose `status` comes first."""
    async with called(Endpoint(run)) as client:
        said = await client.run()
    assert said.status_code == 200 and said.json() == answer
    assert said.text.startswith('{"status"')


async def test_a_long_answer_is_cut(agent: Agent) -> None:
    """It stays within the first MiB, which the worker reads."""
    async with called(Endpoint(returning("ü" * 3_000_000))) as client:
        said = await client.run()
    assert said.json()["truncated"] is True and said.text.startswith('{"status"')


# --- accepted runs --------------------------------------------------------------------------------


async def test_an_accepted_run(make: Make, agent: Agent) -> None:
    """What takes longer is answered 202, and polled to its end; the same key meanwhile gets the
    same answer, afterwards the end."""
    async with called(make(answer_within=0.05)) as client:
        first = await client.run(message="wait")
        assert (first.status_code, first.json()) == (202, {"run_id": "r:1", "status": "running"})
        assert (first.headers["Location"], first.headers["Retry-After"]) == ("run/r%3A1", "7")
        again = await client.run(message="wait")
        assert (again.status_code, again.content) == (202, first.content)
        where = first.url.join(first.headers["Location"])
        assert (await client.http.get(where)).headers["Retry-After"] == "7"
        agent.opened.set()
        async with asyncio.timeout(DEADLINE):
            while (over := (await client.http.get(where)).json())["status"] == "running":
                pass
        assert over == {"run_id": "r:1", "status": "completed", "output": "did wait"}
        assert (await client.run(message="wait")).json()["output"] == "did wait"


async def test_a_run_that_ends_in_time_is_not_accepted(make: Make) -> None:
    """The call is answered with the run's end."""
    async with called(make(answer_within=DEADLINE)) as client:
        assert (await client.run()).json() == {"status": "completed", "output": "did work"}


async def test_a_run_is_ended_by_delete(make: Make, agent: Agent) -> None:
    """The agent is stopped, the session freed, the run cancelled for whoever asks; again and again
    it does no more. One that has ended stays as it ended."""
    async with called(make(answer_within=0.0)) as client:
        first = await client.run(message="wait")
        where = first.url.join(first.headers["Location"])
        assert [(await client.http.delete(where)).status_code for _ in range(2)] == [204, 204]
        await asyncio.wait_for(agent.cancelled.wait(), DEADLINE)
        assert (await client.http.get(where)).json() == {"run_id": "r:1", "status": "cancelled"}
        assert (await client.run(message="wait")).json() == {"status": "cancelled"}
        done = await ended(lambda: client.run(key="r:2"))
        where = done.url.join("run/r%3A2")
        async with asyncio.timeout(DEADLINE):
            while (await client.http.get(where)).json()["status"] == "running":
                pass
        assert (await client.http.delete(where)).status_code == 204
        assert (await client.http.get(where)).json()["status"] == "completed"


async def test_a_run_is_ended_by_another_process(database: str) -> None:
    """DELETE reaches any process; the one that runs the agent finds out, stops it, and frees the
    session."""
    first, second = Agent(), Agent()
    options: dict[str, Any] = {"dsn": database, "answer_within": 0.0, "lease": LEASE}
    async with (
        called(Endpoint(first, **options)) as one,
        called(Endpoint(second, **options)) as two,
    ):
        await one.run(message="wait")
        where = httpx.URL(address(two.url, "s")).join("run/r%3A1")
        assert (await two.http.delete(where)).status_code == 204
        assert (await two.http.get(where)).json()["status"] == "cancelled"
        await asyncio.wait_for(first.cancelled.wait(), DEADLINE)
        assert (await ended(lambda: two.run(key="r:2"))).status_code == 202
    assert (len(first.runs), len(second.runs)) == (1, 1)


# --- what goes wrong ------------------------------------------------------------------------------


async def test_a_system_message_that_can_not_be_stored(make: Make, agent: Agent) -> None:
    """Nothing is run, the worker is told to come later, and then it is run, as if for the first
    time."""
    broken = True

    async def store(session_id: str, system_message: str, key: str) -> None:
        if broken:
            raise RuntimeError("no database")
        agent.stored.append((session_id, system_message, key))

    async with called(make(store=store)) as client:
        refused = await client.run()
        assert (refused.status_code, refused.json()["code"]) == (503, "not_stored")
        assert agent.runs == []
        broken = False
        assert (await client.run()).status_code == 200
    assert [run.starts for run in agent.runs] == [1] and len(agent.stored) == 1


async def test_stopping(make: Make, agent: Agent) -> None:
    """Runs are waited for; one that takes too long is stopped, its caller told that nobody knows,
    and the same key runs again afterwards, with its message stored already."""
    endpoint = make()
    async with called(endpoint) as client:
        running = asyncio.create_task(client.run(message="wait"))
        await asyncio.wait_for(agent.entered.wait(), DEADLINE)
        await endpoint.stop()
        answer = await running
        assert (answer.status_code, answer.json()["code"]) == (500, "interrupted")
        await asyncio.wait_for(agent.cancelled.wait(), DEADLINE)
        agent.opened.set()
        late = await client.run(message="wait")
        assert (late.status_code, late.json()["code"]) == (503, "stopping"), "no call restarts it"
        with pytest.raises(StoreUnavailable, match="stopping"):
            async with endpoint.session("s"):
                pass
        await endpoint.start()
        assert (await client.run(message="wait")).json()["output"] == "did wait"
    assert [run.starts for run in agent.runs] == [1, 2] and len(agent.stored) == 1


async def test_drain_waits_for_a_run(make: Make, agent: Agent) -> None:
    """A run that ends in time is answered, and its answer kept."""
    endpoint = make(drain=DEADLINE)
    async with called(endpoint) as client:
        running = asyncio.create_task(client.run(message="wait"))
        await asyncio.wait_for(agent.entered.wait(), DEADLINE)
        stopping = asyncio.create_task(endpoint.stop())
        async with asyncio.timeout(DEADLINE):
            while (late := await client.run(key="r:2")).json()["code"] != "stopping":
                pass
        assert (late.status_code, late.headers["Retry-After"]) == (503, "1")
        agent.opened.set()
        assert (await running).json()["output"] == "did wait"
        await stopping


async def test_a_database_without_the_tables(empty_database: str, agent: Agent) -> None:
    """It starts, says what is missing and what to do, and answers 503 until that is done."""
    async with called(Endpoint(agent, dsn=empty_database)) as client:
        answer = await client.run()
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert "recall_runs" in answer.json()["message"]
        await asyncio.to_thread(schema.migrate, empty_database)
        assert (await client.run()).status_code == 200


@pytest.mark.parametrize("dsn", ["nonsense", "mysql://a@b/c", "host=h password=secret x"], ids=str)
def test_a_dsn_that_is_none(dsn: str, agent: Agent) -> None:
    """It is refused at once, without its password."""
    with pytest.raises(ValueError, match="`dsn`") as refused:
        Endpoint(agent, dsn=dsn)
    assert "secret" not in str(refused.value)


async def test_without_a_dsn_it_says_so(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    """Memory is for one process, and that is in the log."""
    async with Endpoint(agent):
        assert "one process only" in caplog.text


SECRET = "whsec_" + "cm9zZWJ1ZC1yb3NlYnVkLXJvc2VidWQ="


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        pytest.param({}, 200, id="signed"),
        pytest.param({"webhook-signature": "v1,AAAA"}, 401, id="by another secret"),
        pytest.param({"webhook-signature": "v1,\xff"}, 401, id="no ASCII"),
        pytest.param({"webhook-id": "other:1"}, 401, id="for another key"),
        pytest.param({"webhook-timestamp": "1"}, 401, id="long ago"),
        pytest.param({"webhook-timestamp": "soon"}, 401, id="no time"),
        pytest.param(None, 401, id="not signed"),
    ],
)
async def test_signatures(changes: dict[str, str] | None, status: int, agent: Agent) -> None:
    """Where a secret is set only what is signed by it, now, for this key, is run; by the old one
    too, while it is being replaced."""
    body = json.dumps(document("s", "work")).encode()
    stamp = int(time.time())
    headers = {
        "webhook-id": "r:1",
        "webhook-timestamp": str(stamp),
        "webhook-signature": f"v1,x {signature(SECRET, 'r:1', stamp, body)}",
    }
    headers = {} if changes is None else headers | changes
    secrets = f"whsec_bmV3 {SECRET}"
    with pytest.raises(ValueError, match="polls and cancels carry no signature"):
        Endpoint(agent, signing_secret=secrets)
    async with called(Endpoint(agent, token=TOKEN, signing_secret=secrets)) as client:
        sent = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        answer = await client.http.post(
            address(client.url, "s"), content=body, headers=[(b"idempotency-key", b"r:1"), *sent]
        )
    assert answer.status_code == status, answer.text
    assert len(agent.runs) == (1 if status == 200 else 0)


async def test_tokens_are_replaced(agent: Agent) -> None:
    """Several are valid at once; an empty one is refused at the start."""
    async with called(Endpoint(agent, token=["new", TOKEN])) as client:
        assert (await client.run()).status_code == 200
        wanted = {"Authorization": "Bearer new"}
        assert (await client.run(key="r:2", headers=wanted)).status_code == 200
    with pytest.raises(ValueError, match="token"):
        Endpoint(agent, token="")


# --- leases in PostgreSQL -------------------------------------------------------------------------


def start(key: str = "r:1", session_id: str = "s", body: bytes = b"x") -> Start:
    return Start(key, session_id, hashlib.sha256(body).hexdigest(), uuid4())


@contextlib.asynccontextmanager
async def stored_in(dsn: str, lease: float = LEASE) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(dsn, schema=None, lease=lease)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def end_leases(dsn: str) -> None:
    """As if all processes had died a while ago. (Just after PostgreSQL has started nobody takes
    what is dead: waits until that is over.)"""
    rest = (
        "select pg_sleep(greatest(0, extract(epoch from pg_postmaster_start_time() - now())"
        f" + {LEASE / 3 + 1}))"
    )
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        await conn.execute(rest.encode())
        await conn.execute("update recall_session_locks set until = now() - interval '1 hour'")


@pytest.fixture(params=["memory", "postgres"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
    else:
        async with stored_in(request.getfixturevalue("database")) as made:
            yield made


async def test_a_store(store: Store) -> None:
    """Each state of a key, by each step, the same in memory and in PostgreSQL."""
    first = start()
    assert await store.look("r:1", "s") is None
    assert await store.begin(first, 3) == Started(1, False)
    assert await store.begin(start(), 3) == GoesOn()
    assert await store.begin(start("r:2"), 3) == Taken()
    assert await store.look("r:2", "s") is None, "what was refused leaves no trace"
    assert await store.begin(start(body=b"y"), 3) == OtherRequest()
    assert await store.begin(start(session_id="t"), 3) == OtherRequest()
    assert not await store.take("s", uuid4())
    assert await store.look("r:1", "s") == GoesOn()
    assert await store.look("r:1", "t") is None
    await store.give_up("r:1", "s", "{}")
    assert await store.look("r:1", "s") == GoesOn(), "what goes on is not given up"
    await store.stored(first)
    # Stopped in mid-run: lost, and started again.
    await store.free("s", first.lease)
    assert await store.look("r:1", "s") == Lost(1)
    second = start()
    assert await store.begin(second, 3) == Started(2, True)
    assert not await store.finish(first, "completed", "{}"), "the first one's lease is over"
    assert await store.renew([("s", first.lease), ("s", second.lease)]) == {second.lease}
    assert await store.ended(["r:1", "other"]) == set()
    await store.undo(second)
    third = start()
    assert await store.begin(third, 3) == Started(2, True), "what was undone is not counted"
    assert await store.finish(third, "completed", '{"status": "completed"}')
    assert await store.begin(start(), 3) == Ended('{"status": "completed"}')
    assert await store.ended(["r:1", "other"]) == {"r:1"}
    await store.cancel("r:1", "s", "{}")
    assert await store.look("r:1", "s") == Ended('{"status": "completed"}')
    # Lost too often.
    again = start("r:3")
    assert await store.begin(again, 1) == Started(1, False)
    await store.free("s", again.lease)
    assert await store.begin(start("r:3"), 1) == Lost(1)
    await store.give_up("r:3", "s", '{"status": "failed"}')
    assert await store.look("r:3", "s") == Ended('{"status": "failed"}')
    # Undone, as if it had never been.
    nothing = start("r:4")
    assert await store.begin(nothing, 3) == Started(1, False)
    await store.undo(nothing)
    assert await store.look("r:4", "s") is None
    lock = uuid4()
    assert await store.take("s", lock) and not await store.take("s", uuid4())
    await store.free("s", uuid4())
    assert not await store.take("s", uuid4()), "nobody frees what is another's"
    await store.free("s", lock)
    going = start("r:5")
    await store.begin(going, 3)
    await store.prune(0.0)
    assert await store.look("r:1", "s") is None, "answers are forgotten"
    assert await store.look("r:5", "s") == GoesOn(), "what goes on is not"


async def test_the_dead_are_succeeded_and_the_living_are_not(database: str) -> None:
    """A lease that has ended is taken; its former owner can't renew it or write an answer. One that
    was renewed in time, or late but before anybody took it, is not taken."""
    async with stored_in(database) as one, stored_in(database) as other:
        first = start()
        assert await one.begin(first, 3) == Started(1, False)
        await end_leases(database)
        assert await one.renew([("s", first.lease)]) == {first.lease}, "late, and still its own"
        assert await other.begin(start(), 3) == GoesOn()
        await end_leases(database)
        second = start()
        assert await other.begin(second, 3) == Started(2, False)
        assert await one.renew([("s", first.lease)]) == set()
        assert not await one.finish(first, "completed", "{}")
        assert await other.look("r:1", "s") == GoesOn()
        # A chat takes the session of a dead run, and the run stays lost until it is free.
        await end_leases(database)
        lock = uuid4()
        assert await one.take("s", lock)
        assert await one.begin(start(), 3) == Taken()
        await one.free("s", lock)
        assert await one.begin(start(), 3) == Started(3, False)


async def test_a_run_that_lost_its_lease_is_stopped(database: str) -> None:
    """A process that was away for too long stops its agent when it learns that another one has the
    session; the caller is told that nobody knows."""
    agent, chat = Agent(), uuid4()
    async with (
        called(Endpoint(agent, dsn=database, answer_within=None, lease=1.0)) as client,
        stored_in(database) as other,
    ):
        running = asyncio.create_task(client.run(message="wait"))
        await asyncio.wait_for(agent.entered.wait(), DEADLINE)
        async with asyncio.timeout(DEADLINE):
            while not await other.take("s", chat):
                await end_leases(database)
        await asyncio.wait_for(agent.cancelled.wait(), DEADLINE)
        answer = await running
        assert (answer.status_code, answer.json()["code"]) == (500, "interrupted")
        assert await other.look("r:1", "s") == Lost(1)
        assert (await client.run(message="wait")).json()["code"] == "session_busy"


async def test_a_chat_that_lost_its_lease_is_told(database: str) -> None:
    """Its lock says so."""
    endpoint = Endpoint(Agent(), dsn=database, lease=1.0)
    async with endpoint, stored_in(database) as other, endpoint.session("s") as lock:
        async with asyncio.timeout(DEADLINE):
            while not await other.take("s", uuid4()):
                await end_leases(database)
        await asyncio.wait_for(lock.lost.wait(), DEADLINE)


@pytest.mark.full
async def test_leases_are_renewed(database: str) -> None:
    """A run that takes longer than a lease keeps its session."""
    agent = Agent()
    async with (
        called(Endpoint(agent, dsn=database, answer_within=None, lease=4.0)) as client,
        stored_in(database) as other,
    ):
        running = asyncio.create_task(client.run(message="wait"))
        await asyncio.wait_for(agent.entered.wait(), DEADLINE)
        until = time.monotonic() + 10.0
        while time.monotonic() < until:
            assert await other.look("r:1", "s") == GoesOn()
            await asyncio.sleep(0.05)
        agent.opened.set()
        assert (await running).status_code == 200


@pytest.mark.full
async def test_leases_are_renewed_while_the_loop_is_blocked(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An agent that blocks the event loop for four leases keeps its session, and its author is
    told. (Another thread looks on, as this one is blocked, too.)"""
    free: list[bool] = []
    stopped = threading.Event()

    def look_on() -> None:
        alive = "select until > now() from recall_session_locks where session_id = 's'"
        with psycopg.connect(database, autocommit=True) as conn:
            while not stopped.wait(0.02):
                free.append(conn.execute(alive).fetchone() != (True,))

    async def run(session_id: str, message: str) -> None:
        looking.start()
        time.sleep(8.0)  # noqa: ASYNC251 -- as people do
        stopped.set()

    looking = threading.Thread(target=look_on)
    async with called(Endpoint(run, dsn=database, answer_within=None, lease=2.0)) as client:
        assert (await client.run()).status_code == 200
    await asyncio.to_thread(looking.join)
    assert len(free) > 20 and not any(free)
    assert "the event loop has been blocked" in caplog.text


@pytest.mark.parametrize("rerun", [True, False])
@pytest.mark.parametrize("accepted", [True, False])
async def test_a_lost_run(database: str, agent: Agent, rerun: bool, accepted: bool) -> None:
    """Posted again, it runs again, unless that is not wanted: then the call is refused. Polled, it
    has failed, so that the worker begins anew under another key; or it is gone."""
    async with stored_in(database) as dead:
        lost = start(body=json.dumps(document("s", "work")).encode())
        await dead.begin(lost, 3)
        if accepted:
            await dead.accepted(lost)
    await end_leases(database)
    options: dict[str, Any] = {"dsn": database, "rerun_lost": rerun, "lease": LEASE}
    async with called(Endpoint(agent, **options)) as client:
        if accepted:
            answer = await client.http.get(httpx.URL(address(client.url, "s")).join("run/r%3A1"))
        else:
            answer = await client.run()
    said = answer.status_code, answer.json().get("code"), answer.json().get("status")
    assert (
        said
        == {
            (True, False): (200, None, "completed"),
            (True, True): (200, "run_lost", "failed"),
            (False, False): (422, "run_lost", None),
            (False, True): (410, "run_lost", None),
        }[rerun, accepted]
    )
    assert [run.starts for run in agent.runs] == ([2] if rerun and not accepted else [])


async def test_an_open_call_is_told_to_come_again(database: str) -> None:
    """While a run goes on that nobody polls, another process tells its caller to come again, and
    gives no address: if the first process dies, the run is started again under the same key."""
    first, second = Agent(), Agent()
    options: dict[str, Any] = {"dsn": database, "lease": LEASE}
    async with (
        called(Endpoint(first, **options)) as one,
        called(Endpoint(second, **options)) as two,
    ):
        calling = asyncio.create_task(one.run(message="wait"))
        await asyncio.wait_for(first.entered.wait(), DEADLINE)
        for client in (one, two):
            again = await client.run(message="wait")
            assert (again.status_code, again.json()["code"]) == (409, "run_in_progress")
            assert int(again.headers["Retry-After"]) > 0 and "Location" not in again.headers
        first.opened.set()
        assert (await calling).json()["output"] == "did wait"
        assert (await two.run(message="wait")).json()["output"] == "did wait"
    assert (len(first.runs), len(second.runs)) == (1, 0)


async def test_an_agent_that_exits(make: Make, agent: Agent) -> None:
    """A tool that calls sys.exit() ends its run, as failed, and not the API."""

    async def leaves(session_id: str, message: str) -> str:
        raise SystemExit(3)

    async with called(Endpoint(leaves)) as client:
        for key in ("r:1", "r:2"):
            answer = await client.run(key=key)
            assert answer.json()["status"] == "failed"
            assert "sys.exit(3)" in answer.json()["error"]


async def test_a_session_of_any_length(database: str, agent: Agent) -> None:
    """One that no index can hold is refused, and is no outage."""
    async with called(Endpoint(agent, dsn=database)) as client:
        answer = await client.run(session="s" * 1025)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid")


@pytest.mark.full
@pytest.mark.timeout(300)
async def test_living_processes_renew_first_after_a_long_outage() -> None:
    """PostgreSQL is away for several leases, with a run open: the process that has it renews as
    soon as PostgreSQL is back, before another one may take its session or its key."""
    first, second = Agent(), Agent()
    with postgres.embedded() as server:
        schema.migrate(server.dsn())
        options: dict[str, Any] = {"dsn": server.dsn(), "answer_within": None, "lease": LEASE}
        async with (
            called(Endpoint(first, **options)) as one,
            called(Endpoint(second, **options)) as two,
        ):
            one.http.timeout = None
            calling = asyncio.create_task(one.run(message="wait"))
            await asyncio.wait_for(first.entered.wait(), DEADLINE)
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(LEASE * 4 / 3)  # Longer than a lease: the outage itself.
            await asyncio.to_thread(server.start)
            # Both are back long before the third of a lease is over for which nobody takes what
            # seems dead: a pool's own pauses would be half a minute long by now.
            async with asyncio.timeout(LEASE / 3):
                while (await two.run(key="r:2")).status_code == 503:
                    pass
            until = time.monotonic() + LEASE / 2
            while time.monotonic() < until:
                for key in ("r:1", "r:2"):
                    answer = await two.run(key=key, message="wait" if key == "r:1" else "work")
                    assert answer.status_code == 409, answer.text
                await asyncio.sleep(0.2)  # A caller who comes again.
            first.opened.set()
            assert (await calling).json()["output"] == "did wait"
            assert (await two.run(message="wait")).json()["output"] == "did wait"
        assert (len(first.runs), len(second.runs)) == (1, 0)


async def test_a_run_is_not_started_for_ever(database: str, agent: Agent) -> None:
    """One that was lost three times has failed, and stays so."""
    body = json.dumps(document("s", "work")).encode()
    async with stored_in(database) as dead:
        for n in range(3):
            assert await dead.begin(start(body=body), 3) == Started(n + 1, False)
            await end_leases(database)
    async with called(Endpoint(agent, dsn=database)) as client:
        answers = [await client.run() for _ in range(2)]
    assert {(a.status_code, a.json()["code"]) for a in answers} == {(200, "run_lost")}
    assert "3 times" in answers[0].json()["error"] and agent.runs == []


@pytest.mark.full
@pytest.mark.parametrize("silent", [False, True])
async def test_postgresql_is_gone_for_a_moment(database: str, agent: Agent, silent: bool) -> None:
    """Nothing begins meanwhile, which is said; the run that goes on ends, its answer is written
    when PostgreSQL is back, and its key never runs twice."""
    async with Proxy(database) as proxy:
        endpoint = Endpoint(agent, dsn=proxy.dsn, answer_within=None, lease=LEASE)
        async with called(endpoint) as client:
            running = asyncio.create_task(client.run(message="wait"))
            await asyncio.wait_for(agent.entered.wait(), DEADLINE)
            (proxy.blackhole if silent else proxy.cut)()
            refused = await client.run("t", "t:1")
            assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
            assert "Retry-After" in refused.headers
            agent.opened.set()
            again = await client.run(message="wait")
            assert again.status_code in (409, 200), "its own process knows this run"
            proxy.heal()
            assert (await running).json()["output"] == "did wait"
            assert (await client.run(message="wait")).headers["Idempotent-Replayed"] == "true"
            async with asyncio.timeout(DEADLINE):
                while (await client.run("t", "t:1")).status_code != 200:
                    pass
    assert [run.key for run in agent.runs] == ["r:1", "t:1"]


async def test_behind_a_pooler(bouncer: PgBouncer, database: str, agent: Agent) -> None:
    """A transaction pooler in between changes nothing: nothing is held between transactions."""
    dsn = bouncer.way_to(database)
    async with called(Endpoint(agent, dsn=dsn, answer_within=None)) as client:
        running = asyncio.create_task(client.run(message="wait"))
        await asyncio.wait_for(agent.entered.wait(), DEADLINE)
        assert (await client.run(key="r:2")).json()["code"] == "session_busy"
        agent.opened.set()
        assert (await running).status_code == 200


async def test_a_stopped_endpoint_asks_nobody(database: str) -> None:
    """After its end the store says so."""
    store = PostgresStore(database, schema=None, lease=LEASE)
    with pytest.raises(StoreUnavailable, match="stopped"):
        await store.look("r:1", "s")

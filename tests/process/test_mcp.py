"""`recall-worker mcp` as a process, on both transports: by the SDK's own client, and by one that
means harm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import httpx2
import mcp_types
import psycopg
import pytest
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client

from recall_worker import schema, tokens
from recall_worker.mcp import http as over_http

from ..conftest import Connection, connected
from ..support import postgres
from ..support.application import CREATE_TABLES, Application
from ..support.daemon import Daemon, check_events
from ..test_cli import operate, process
from .test_corridor import soon
from .test_lease import eventually, rows

KEY = "0123456789abcdefghijklmnopqrstuv"
OTHER_KEY = "a-key-that-somebody-else-has-made-up-and-that-is-long"
HOUR = timedelta(hours=1)
NAMES = [
    "schedule_recall",
    "list_recalls",
    "reschedule_recall",
    "skip_recall",
    "cancel_recall",
]
Meta = mcp_types.RequestParamsMeta


class Server:
    """One `recall-worker mcp --http`."""

    def __init__(self, daemon: Daemon, port: int) -> None:
        self.daemon = daemon
        self.port = port
        self.url = f"http://127.0.0.1:{port}/mcp"

    @contextlib.asynccontextmanager
    async def client(
        self, session: str, mode: str = "auto", headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Client]:
        """The SDK's client, with a token of this session."""
        sent = {"Authorization": f"Bearer {token(session)}", **(headers or {})}
        async with httpx2.AsyncClient(headers=sent, timeout=60) as http:
            transport = streamable_http_client(self.url, http_client=http)
            async with Client(transport, mode=mode) as client:
                yield client

    async def post(
        self, document: Any, headers: Mapping[str, str] | Sequence[tuple[str, str]] = ()
    ) -> httpx.Response:
        accept = {"accept": "application/json, text/event-stream"}
        async with httpx.AsyncClient(headers=accept, timeout=60) as http:
            content = document if isinstance(document, bytes) else json.dumps(document).encode()
            given = [("content-type", "application/json"), *_items(headers)]
            return await http.post(self.url, content=content, headers=given)


def _items(headers: Mapping[str, str] | Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return list(headers.items() if isinstance(headers, Mapping) else headers)


@contextlib.asynccontextmanager
async def serving(dsn: str, *options: str, **settings: str) -> AsyncIterator[Server]:
    environ = {"RECALL_DSN": dsn, "RECALL_TOKEN_KEY": KEY} | {
        "RECALL_" + name.upper(): value for name, value in settings.items()
    }
    environ = {name: value for name, value in environ.items() if value}
    daemon = await Daemon.start(environ, *(options or ("--http", "0")), command="mcp")
    try:
        [listening] = await daemon.hears("mcp.listening", within=60)
        yield Server(daemon, listening["port"])
    finally:
        await daemon.kill()
        check_events(daemon.events)


def token(session: str, **more: Any) -> str:
    return tokens.sign(tokens.keys(KEY), session, **{"ttl": HOUR, **more})


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def said(result: mcp_types.CallToolResult) -> str:
    [content] = result.content
    assert isinstance(content, mcp_types.TextContent)
    return content.text


def over_stdio(dsn: str, session: str = "a", **settings: str) -> Any:
    environ = {
        "RECALL_DSN": dsn,
        "RECALL_MCP_SESSION": session,
        "RECALL_LOG_LEVEL": "error",
        **{"RECALL_" + name.upper(): value for name, value in settings.items()},
    }
    return stdio_client(
        StdioServerParameters(
            command=sys.executable,
            args=["-m", "recall_worker", "mcp"],
            env={**os.environ, **environ},
        )
    )


@pytest.fixture
async def sessions(app: Application) -> None:
    for session, user in (("a", "ann"), ("b", "ann"), ("z", "zoe")):
        await app.create_session(session, user)


@pytest.fixture
async def served(database: str, sessions: None) -> AsyncIterator[Server]:
    async with serving(database) as started:
        yield started


async def go_through(client: Client, db: Connection, session: str) -> None:
    """The tools from a promise to its end."""
    listed = await client.list_tools()
    assert [tool.name for tool in listed.tools] == NAMES
    assert "session" not in json.dumps([tool.input_schema for tool in listed.tools]).lower()
    made = await client.call_tool(
        "schedule_recall",
        {"message": "m", "every": "1h", "in": "10m"},
    )
    assert not made.is_error and made.structured_content is not None
    id = made.structured_content["recall"]["id"]
    assert "in 10 minutes" in said(made) and "Now it is" in said(made)
    again = await client.call_tool("schedule_recall", {"message": "m", "in": "10m"})
    assert again.is_error and "one pending recall a session" in said(again)
    for name, arguments in (
        ("reschedule_recall", {"in": "2h", "id": id}),
        ("skip_recall", {}),
        ("list_recalls", {"time_zone": "Europe/Berlin"}),
        ("cancel_recall", {}),
    ):
        result = await client.call_tool(name, arguments)
        assert not result.is_error, said(result)
        assert "Now it is" in said(result)
    done = await rows(db, "select * from recall_actions where recall_id = %s order by id", [id])
    assert [row["action"] for row in done] == ["schedule", "reschedule", "skip", "cancel"]
    assert {(row["actor"], row["via"]) for row in done} == {(f"agent of {session}", "mcp")}
    [row] = await rows(db, "select * from session_recalls where id = %s", [id])
    assert (row["session_id"], row["status"]) == (session, "cancelled")


# --- stdin and stdout -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", pytest.param("legacy", marks=pytest.mark.full)])
async def test_over_stdio(mode: str, database: str, sessions: None, db: Connection) -> None:
    """For the session that the process was started for, with either generation of the protocol;
    what a client sends besides has no say in it."""
    async with Client(over_stdio(database), mode=mode) as client:
        await go_through(client, db, "a")
        meta: Meta = {"session_id": "z", "sessionId": "z", "session": "z"}  # type: ignore[typeddict-unknown-key]
        made = await client.call_tool("schedule_recall", {"message": "m", "in": "1h"}, meta=meta)
        assert not made.is_error
        strange = await client.call_tool("list_recalls", {"session_id": "z"})
        assert strange.is_error and "has no argument 'session_id'" in said(strange)
    assert await rows(db, "select from session_recalls where session_id <> 'a'") == []


@pytest.mark.full
async def test_stdout_carries_the_protocol_alone(database: str, sessions: None) -> None:
    """Whatever comes in, and whatever is logged at debug; the process ends with its stdin."""
    daemon = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", "-m", "recall_worker", "mcp"),
        env={
            **os.environ,
            "RECALL_DSN": database,
            "RECALL_MCP_SESSION": "a",
            "RECALL_LOG_LEVEL": "debug",
            "RECALL_LOG_FORMAT": "json",
        },
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    lines: list[Any] = [
        {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "initialize",
            "params": {
                "protocolVersion": "2025-06-18",
                "capabilities": {},
                "clientInfo": {"name": "test", "version": "1"},
            },
        },
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        "nonsense",
        {"jsonrpc": "2.0", "id": 2, "method": "nothing/of/it"},
        {"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"name": 7}},
        {
            "jsonrpc": "2.0",
            "id": 4,
            "method": "tools/call",
            "params": {"name": "cancel_recall", "arguments": {"id": "\ud800"}},
        },
        {
            "jsonrpc": "2.0",
            "id": 5,
            "method": "tools/call",
            "params": {"name": "list_recalls", "arguments": {}},
        },
    ]
    sent = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
    assert daemon.stdin is not None and daemon.stdout is not None and daemon.stderr is not None
    daemon.stdin.write(sent.encode())
    answers: dict[Any, Any] = {}
    async with asyncio.timeout(60):
        while 5 not in answers:
            answer = json.loads(await daemon.stdout.readline())
            answers[answer.get("id")] = answer
    daemon.stdin.close()
    async with asyncio.timeout(60):
        assert await daemon.wait() == 0
    assert await daemon.stdout.read() == b""
    assert "error" in answers[2] and "error" in answers[3]
    if "result" in answers.get(4, {}):
        assert answers[4]["result"]["isError"]
    assert answers[5]["result"]["content"][0]["text"].startswith("No recalls. Now it is")
    told = [json.loads(line) for line in (await daemon.stderr.read()).splitlines()]
    assert "mcp.started" in [event["event"] for event in told]
    check_events(told)


@pytest.mark.slow
@pytest.mark.parametrize("reads", [True, False])
def test_stdin_ends_right_after_a_call(
    reads: bool, database: str, sessions: None, tmp_path: Path
) -> None:
    """A script that writes its requests and closes: the call that goes on is done, and answered,
    before the process ends. Where nobody reads the answer it is done all the same, without a
    traceback."""
    about = {"name": "test", "version": "1"}
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": about}
    call = {"name": "schedule_recall", "arguments": {"message": "look", "in": "1h"}}
    lines: list[dict[str, Any]] = [
        {"id": 1, "method": "initialize", "params": hello},
        {"method": "notifications/initialized"},
        {"id": 2, "method": "tools/call", "params": call},
    ]
    sent = "".join(json.dumps({"jsonrpc": "2.0", **line}) + "\n" for line in lines)
    (tmp_path / "sent").write_text(sent, encoding="utf-8")
    reading, writing = os.pipe()
    if not reads:
        os.close(reading)
    with (tmp_path / "sent").open("rb") as stdin:
        done = subprocess.run(
            [sys.executable, "-m", "recall_worker", "mcp"],
            env={**os.environ, "RECALL_DSN": database, "RECALL_MCP_SESSION": "a"},
            stdin=stdin,
            stdout=subprocess.PIPE if reads else writing,
            stderr=subprocess.PIPE,
            timeout=60,
            text=True,
        )
    os.close(writing)
    if reads:
        os.close(reading)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert "Scheduled: due" in answers[-1]["result"]["content"][0]["text"], done
        with psycopg.connect(database) as conn:
            assert conn.execute("select count(*) from session_recalls").fetchone() == (1,)
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_while_its_client_stays(
    number: signal.Signals, database: str
) -> None:
    """Also with stdin open; SIGHUP, by which secrets are read again, does not."""
    daemon = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "recall_worker", "mcp"),
        env={
            **os.environ,
            "RECALL_DSN": database,
            "RECALL_MCP_SESSION": "a",
            "RECALL_LOG_FORMAT": "json",
        },
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert daemon.stderr is not None
    async with asyncio.timeout(60):
        assert b"mcp.started" in await daemon.stderr.readline()
        daemon.send_signal(signal.SIGHUP)
        assert b"secrets.read" in await daemon.stderr.readline()
        daemon.send_signal(number)
        assert await daemon.wait() == 0
        assert b"mcp.stopped" in await daemon.stderr.read()


# --- over HTTP ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", pytest.param("legacy", marks=pytest.mark.full)])
async def test_over_http(mode: str, served: Server, db: Connection) -> None:
    """Each client has the session of its token."""
    async with served.client("a", mode) as ann, served.client("z", mode) as zoe:
        await go_through(ann, db, "a")
        await go_through(zoe, db, "z")
    [called, *_] = await served.daemon.hears("mcp.called", tool="schedule_recall")
    assert (called["session"], called["answer"]) == ("a", "done")
    assert KEY not in str(served.daemon.events) and token("a")[:40] not in str(served.daemon.events)
    assert await served.daemon.stop() == 0


@pytest.mark.slow
async def test_nothing_but_the_token_says_which_session(served: Server, db: Connection) -> None:
    """No argument, no header, no `_meta`, no MCP session of somebody else's."""
    headers = {
        "mcp-session-id": "z",
        "x-session-id": "z",
        "session_id": "z",
        "recall-session": "z",
        "x-forwarded-user": "zoe",
        "cookie": "session=z; session_id=z",
    }
    meta: Meta = {"session_id": "z", "io.recall/session": "z"}  # type: ignore[typeddict-unknown-key]
    async with served.client("a", headers=headers) as client:
        made = await client.call_tool("schedule_recall", {"message": "m", "in": "1h"}, meta=meta)
        assert not made.is_error
        for name in ("session_id", "session", "_meta", "sub"):
            strange = await client.call_tool("list_recalls", {name: "z"}, meta=meta)
            assert strange.is_error and "has no argument" in said(strange)
    assert [r["session_id"] for r in await rows(db, "select * from session_recalls")] == ["a"]


@pytest.mark.full
async def test_recalls_of_others(served: Server, app: Application, db: Connection) -> None:
    """By their very ids they are not found, in the words of an id that never was."""
    others = [await app.schedule(s, "recurring", soon(3600), f"of {s}", 3600) for s in ("b", "z")]
    before = await rows(db, "select * from session_recalls order by id")
    async with served.client("a") as client:
        for name in ("cancel_recall", "skip_recall", "reschedule_recall"):
            more = {"in": "1h"} if name == "reschedule_recall" else {}
            heard = set()
            for id in (*others, "never-was"):
                result = await client.call_tool(name, {"id": id, **more})
                assert result.is_error
                heard.add(said(result).replace(id, "ID"))
            assert len(heard) == 1
        assert said(await client.call_tool("list_recalls", {"ended": True})).startswith(
            "No recalls"
        )
    assert await rows(db, "select * from session_recalls order by id") == before


LIST = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
A = "a"


def altered(text: str) -> str:
    head, claims, signature = text.split(".")
    return f"{head}.{claims[:-2]}{'AA' if claims[-2:] != 'AA' else 'BB'}.{signature}"


NONE_HEADER = "eyJhbGciOiJub25lIiwidHlwIjoicmVjYWxsK2p3dCJ9"
UNAUTHORIZED: list[tuple[str, dict[str, str]]] = [
    ("nothing", {}),
    ("empty", {"Authorization": ""}),
    ("no token", {"Authorization": "Bearer"}),
    ("another scheme", {"Authorization": f"Basic {token(A)}"}),
    ("as a cookie", {"Cookie": f"token={token(A)}"}),
    ("a word", bearer("admin")),
    ("truncated", bearer(token(A)[:-5])),
    ("altered", bearer(altered(token(A)))),
    ("forged", bearer(tokens.sign(tokens.keys(OTHER_KEY), A, ttl=HOUR))),
    ("alg none", bearer(f"{NONE_HEADER}.{token(A).split('.')[1]}.")),
    ("expired", bearer(token(A, ttl=timedelta(seconds=1), now=1_000_000_000))),
    ("another audience", bearer(token(A, audience="staging"))),
    ("endless", bearer("a" * 20_000)),
]


@pytest.mark.slow
async def test_without_a_valid_token(served: Server) -> None:
    """401, with the challenge of RFC 6750; nothing of the token is repeated, or logged."""
    for name, headers in UNAUTHORIZED:
        answer = await served.post(LIST, headers)
        assert answer.status_code == 401, (name, answer.text)
        assert answer.headers["www-authenticate"].startswith("Bearer realm=")
        assert set(answer.json()) == {"error", "message"}
        sent = headers.get("Authorization", "").partition(" ")[2]
        if len(sent) > 20:
            assert sent not in answer.text
            assert sent not in str(served.daemon.events)
    both = [("Authorization", f"Bearer {token(A)}"), ("Authorization", "Bearer x")]
    assert (await served.post(LIST, both)).status_code == 401
    await served.daemon.hears("mcp.rejected", times=len(UNAUTHORIZED) + 1, http_status=401)


PAGES: list[tuple[dict[str, str], int]] = [
    ({"Host": "evil.example"}, 421),
    ({"Host": "127.0.0.1"}, 421),
    ({"Host": "localhost:1"}, 421),
    ({"Host": ""}, 421),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": "http://127.0.0.1:1"}, 403),
    ({"Origin": "file://"}, 403),
    ({"Origin": "http://127.0.0.1:PORT/path"}, 403),
    ({"Origin": "http://127.0.0.1:PORT@evil.example"}, 403),
    ({"Origin": "http://127.0.0.1:PORT"}, 200),
    ({"Host": "LOCALHOST:PORT"}, 200),
    ({}, 200),
]


@pytest.mark.slow
async def test_web_pages_of_others(served: Server) -> None:
    """A browser that was led here under another name (DNS rebinding), or by another server's page,
    gets nothing, also with a valid token."""
    for headers, status in PAGES:
        given = {name: value.replace("PORT", str(served.port)) for name, value in headers.items()}
        answer = await served.post(LIST, {**bearer(token("a")), **given})
        assert answer.status_code == status, (headers, answer.text)


@pytest.mark.full
async def test_what_else_is_asked(served: Server) -> None:
    """No other path, no other method; a probe of a platform needs no token, and no Host."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}") as http:
        headers = bearer(token("a"))
        assert (await http.get("/mcp", headers=headers)).status_code == 405
        assert (await http.delete("/mcp", headers=headers)).status_code == 405
        for path in ("/", "/mcp/", "/MCP", "/mcp/../mcp2", "/metrics"):
            assert (await http.post(path, headers=headers, json=LIST)).status_code == 404
        answer = await http.get("/healthz", headers={"Host": "10.0.0.7:9466"})
        assert (answer.status_code, answer.text) == (200, "ok\n")


@pytest.mark.full
async def test_bodies(served: Server, db: Connection) -> None:
    """Too large, no JSON, no JSON-RPC, deep: each is refused, and the next request is answered."""
    headers = bearer(token("a"))
    large = b" " * (over_http.BODY_LEAST + 1)
    for times in range(1, 6):
        assert (await served.post(large * times, headers)).status_code == 413

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield large[: over_http.BODY_LEAST // 4]

    async with httpx.AsyncClient() as http:
        answer = await http.post(
            served.url, content=parts(), headers={**headers, "content-type": "application/json"}
        )
        assert answer.status_code == 413
    for body in (b"", b"{", b"[]", b"7", b'{"jsonrpc": "2.0"}', b"[" * 100_000, b"\xff\xfe"):
        assert 400 <= (await served.post(body, headers)).status_code < 500, body[:20]
    deep = json.dumps({**LIST, "method": "tools/call", "params": {"name": "list_recalls"}})
    nested = deep.replace('"list_recalls"', '"list_recalls", "arguments": ' + "[" * 500 + "]" * 500)
    assert (await served.post(nested.encode(), headers)).status_code in (200, 400)
    answer = await served.post(LIST, headers)
    assert [tool["name"] for tool in answer.json()["result"]["tools"]] == NAMES
    assert not served.daemon.told("worker.error")


@pytest.mark.full
async def test_many_sessions_at_once(served: Server, app: Application, db: Connection) -> None:
    """Each has its own recall, whoever calls beside it; no answer goes to another's client."""
    names = [f"many-{n}" for n in range(40)]
    for name in names:
        await app.create_session(name, "ann")

    async def one(name: str) -> None:
        call = {
            **LIST,
            "method": "tools/call",
            "params": {"name": "schedule_recall", "arguments": {"message": name, "in": "1h"}},
        }
        answers = await asyncio.gather(*(served.post(call, bearer(token(name))) for _ in range(2)))
        results = [answer.json()["result"] for answer in answers]
        done = [one for one in results if not one.get("isError")]
        assert len(done) == 1, results
        assert done[0]["structuredContent"]["recall"]["message"] == name

    await asyncio.gather(*map(one, names))
    found = await rows(db, "select session_id, additional_context_message from session_recalls")
    assert {(r["session_id"], r["additional_context_message"]) for r in found} == {
        (name, name) for name in names
    }


@pytest.mark.full
async def test_one_session_does_not_take_the_place_of_others(
    served: Server, database: str, app: Application
) -> None:
    """However many calls of one agent wait for a row that somebody holds, another's is answered."""
    await app.schedule("a", "recurring", soon(3600), "m", 3600)
    cancel = {**LIST, "method": "tools/call", "params": {"name": "cancel_recall", "arguments": {}}}
    schedule = {
        **LIST,
        "method": "tools/call",
        "params": {"name": "schedule_recall", "arguments": {"message": "m", "in": "1h"}},
    }
    async with await psycopg.AsyncConnection.connect(database) as other:
        await other.execute("select from session_recalls for update")
        waiting = [asyncio.create_task(served.post(cancel, bearer(token("a")))) for _ in range(20)]
        async with connected(database) as db:
            await eventually(
                db,
                "select from pg_stat_activity where application_name = 'recall-worker mcp' "
                "and wait_event_type = 'Lock' having count(*) >= %s",
                [over_http.SESSION_AT_ONCE],
            )
        answer = await served.post(schedule, bearer(token("z")))
        assert not answer.json()["result"].get("isError"), answer.text
        await other.rollback()
    results = [answer.json()["result"] for answer in await asyncio.gather(*waiting)]
    assert sum(not result.get("isError") for result in results) == 1


@pytest.mark.full
async def test_it_costs_nothing_while_nobody_calls(served: Server, db: Connection) -> None:
    """Not even a connection."""
    ours = "select from pg_stat_activity where application_name = 'recall-worker mcp'"
    assert await rows(db, ours) == []
    async with served.client("a") as client:
        assert not (await client.call_tool("list_recalls", {})).is_error
        await eventually(db, f"select where not exists ({ours})")


@pytest.mark.full
async def test_keys_are_changed_while_it_runs(
    database: str, sessions: None, tmp_path: Path
) -> None:
    """The file's new keys count from the next request on; what can't be a key leaves the old ones
    in place, and is said once."""
    file = tmp_path / "key"
    file.write_text(KEY)
    async with serving(database, token_key="", token_key_file=str(file)) as server:

        async def status(key: str) -> int:
            signed = tokens.sign(tokens.keys(key), "a", ttl=HOUR)
            return (await server.post(LIST, bearer(signed))).status_code

        assert (await status(KEY), await status(OTHER_KEY)) == (200, 401)
        file.write_text(f"{OTHER_KEY} {KEY}")
        assert (await status(KEY), await status(OTHER_KEY)) == (200, 200)
        file.write_text("short")
        assert (await status(KEY), await status(OTHER_KEY)) == (200, 200)
        await server.daemon.hears("secret.unreadable")
        file.write_text(f"{OTHER_KEY}\n")
        assert (await status(KEY), await status(OTHER_KEY)) == (401, 200)
        assert OTHER_KEY not in str(server.daemon.events)


@pytest.mark.full
async def test_postgresql_comes_and_goes() -> None:
    """Without it a call is answered by what to do, as a tool's error; when it is back, by itself.
    The process starts without it, too."""
    with postgres.embedded() as database:
        dsn = database.dsn("postgres")
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
            conn.execute("insert into sessions values ('a', 'ann')")
        schema.migrate(dsn)
        database.kill()
        async with serving(dsn) as server, server.client("a") as client:
            result = await client.call_tool("schedule_recall", {"message": "m", "in": "1h"})
            assert result.is_error and "can't be reached just now: nothing was done" in said(result)
            assert "Try: the same call again in a minute." in said(result)
            [called] = await server.daemon.hears("mcp.called")
            assert called["answer"] == "unreachable" and called["reason"]
            database.start()
            result = await client.call_tool("schedule_recall", {"message": "m", "in": "1h"})
            assert not result.is_error
            assert not server.daemon.told("worker.error")


@pytest.mark.full
async def test_a_body_that_does_not_come(served: Server) -> None:
    """It is given up after a while; others are answered meanwhile."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(
        f"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Length: 9\r\n"
        f"Content-Type: application/json\r\nAuthorization: Bearer {token('a')}\r\n\r\n{{".encode()
    )
    assert (await served.post(LIST, bearer(token("a")))).status_code == 200
    async with asyncio.timeout(over_http.BODY_WITHIN * 4):
        assert b" 408 " in await reader.readline()
    writer.close()


# --- clients of the 1.x line ----------------------------------------------------------------------

ONE_X = Path(__file__).parent.parent / "support" / "mcp_1x.py"


@pytest.fixture(scope="module")
def one_x(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python with the SDK's last 1.x."""
    folder = tmp_path_factory.mktemp("mcp-1x")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "mcp>=1.30,<1.31"], check=True, timeout=600
    )
    return python


async def ask_by_one_x(python: Path, *words: str, **environ: str) -> dict[str, Any]:
    client = await asyncio.create_subprocess_exec(
        python,
        str(ONE_X),
        *words,
        env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(120):
        out, _ = await client.communicate()
    assert client.returncode == 0
    found: dict[str, Any] = json.loads(out)
    return found


def check_one_x(found: dict[str, Any]) -> None:
    assert found["sdk"].startswith("1.30.") and found["tools"] == NAMES
    made, again, strange, *others = found["answers"]
    assert made[0] is False and "in 10 minutes" in made[1]
    assert again[0] is True and "one pending recall a session" in again[1]
    assert strange[0] is True and "has no argument 'session_id'" in strange[1]
    assert [failed for failed, _ in others] == [False] * 4, others


@pytest.mark.full
@pytest.mark.timeout(900)
async def test_clients_of_the_line_before(
    one_x: Path, database: str, sessions: None, tmp_path: Path, db: Connection
) -> None:
    """The SDK's 1.x client goes through the tools on both transports, with nothing told to it."""
    async with serving(database) as server:
        check_one_x(await ask_by_one_x(one_x, "http", server.url, token("a")))
    # That client passes on nothing of its environment, as most do: a script sets it.
    script = tmp_path / "recalls"
    script.write_text(
        f"#!/bin/sh\nexec env RECALL_DSN='{database}' RECALL_MCP_SESSION=b "
        f"{sys.executable} -m recall_worker mcp\n"
    )
    script.chmod(0o755)
    check_one_x(await ask_by_one_x(one_x, "stdio", str(script)))
    found = await rows(db, "select session_id, status from session_recalls order by session_id")
    assert [(r["session_id"], r["status"]) for r in found] == [
        ("a", "cancelled"),
        ("b", "cancelled"),
    ]


# --- at the start ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "environ", "says"),
    [
        ([], {}, "RECALL_DSN is not set"),
        ([], {"RECALL_DSN": "dbname=x"}, "RECALL_MCP_SESSION is not set"),
        (["--http", "9466"], {"RECALL_DSN": "dbname=x"}, "RECALL_TOKEN_KEY is not set"),
        (
            ["--http", "9466"],
            {"RECALL_DSN": "dbname=x", "RECALL_TOKEN_KEY": "short"},
            "give 32 at least",
        ),
        (
            ["--http", "nowhere"],
            {"RECALL_DSN": "dbname=x", "RECALL_TOKEN_KEY": KEY},
            "--http 'nowhere' is no address",
        ),
        (
            ["--http", "127.0.0.1:99999"],
            {"RECALL_DSN": "dbname=x", "RECALL_TOKEN_KEY": KEY},
            "is no address",
        ),
        (
            ["--http", "0.0.0.0:0"],
            {"RECALL_DSN": "dbname=x", "RECALL_TOKEN_KEY": KEY},
            "by which name clients call it is not known",
        ),
    ],
)
def test_what_it_refuses_to_start_with(
    options: list[str], environ: dict[str, str], says: str
) -> None:
    """Exit status 2, and what to set."""
    found = operate(None, "mcp", *options, environ=environ)
    assert found.status == 2 and found.out == ""
    assert says in found.err and "Try: " in found.err


@pytest.mark.full
def test_an_address_that_is_taken(database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = process(database, "mcp", "--http", str(port), environ={"RECALL_TOKEN_KEY": KEY})
    assert found.returncode == 1
    assert f"Error: --http 127.0.0.1:{port} can't be listened on" in found.stderr


@pytest.mark.parametrize(
    "missing",
    ["mcp", *(pytest.param(name, marks=pytest.mark.full) for name in ("mcp_types", "uvicorn"))],
)
def test_without_the_extra(missing: str, database: str) -> None:
    """It says what to install."""
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "sys.argv = ['recall-worker', 'mcp']\n"
        "from recall_worker.cli import main\nmain()"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "RECALL_DSN": database, "RECALL_MCP_SESSION": "a"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 1
    assert "Try: pip install 'recall-worker[mcp]'" in found.stderr
    assert "Traceback" not in found.stderr


def test_names_by_which_it_is_called() -> None:
    """What RECALL_MCP_HOSTS names, and this host's own where it listens on that."""
    from recall_worker.settings import read

    none, some = read({}), read({"RECALL_MCP_HOSTS": "MCP.example.com, a.example:8443"})
    local = {"localhost:1", "127.0.0.1:1", "[::1]:1"}
    assert over_http.known_hosts(none, "127.0.0.1", 1) == local
    assert over_http.known_hosts(none, "192.0.2.1", 1) == {"192.0.2.1:1"}
    assert over_http.known_hosts(none, "2001:db8::1", 1) == {"[2001:db8::1]:1"}
    named = over_http.known_hosts(some, "0.0.0.0", 1)
    assert named == {"mcp.example.com", "a.example:8443"}
    for host, known in (
        ("mcp.example.com", True),
        ("mcp.example.com:443", True),
        ("MCP.EXAMPLE.COM", True),
        ("a.example:8443", True),
        ("a.example", False),
        ("a.example:1", False),
        ("evil.mcp.example.com", False),
        ("mcp.example.com.evil", False),
        ("mcp.example.com:443:443", False),
        ("", False),
    ):
        assert over_http.is_known(host, named) is known, host

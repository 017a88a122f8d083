"""The reference API: every promise of the run endpoint, over real HTTP, and what the native
protocol makes of each answer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from recall_worker.contract.reference_api import ReferenceAPI
from recall_worker.protocols.contract import address
from recall_worker.protocols.http import Answer, HttpClient
from recall_worker.protocols.native import accepted, polled
from recall_worker.protocols.outcomes import read
from recall_worker.protocols.polling import StillOn
from recall_worker.recall import Accepted, name_of
from recall_worker.settings import Settings

from .support.application import Application
from .support.daemon import Daemons

TOKEN = "secret"
DEADLINE = 20.0


class Agent:
    """Does what the message says: "wait" until `opened`, "break", or answer at once."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.opened = asyncio.Event()
        self.entered = asyncio.Event()

    async def __call__(self, session_id: str, user_message: str, recall: Mapping[str, Any]) -> str:
        self.runs.append(session_id)
        self.entered.set()
        if user_message == "wait":
            await self.opened.wait()
        if user_message == "break":
            raise RuntimeError("a tool broke")
        return f"did {user_message}"


class Client:
    """Calls the run endpoint as the worker does."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.url, self.http = url, http
        self.base = url.partition("/sessions/")[0]

    async def run(
        self, session: str = "s", key: str = "r:1", message: str = "work", **changes: Any
    ) -> httpx.Response:
        content = changes.get(
            "content", json.dumps(document(changes.get("named", session), message)).encode()
        )
        headers = {"Idempotency-Key": key} | changes.get("headers", {})
        return await self.http.post(address(self.url, session), content=content, headers=headers)


def document(session: str, message: str) -> dict[str, Any]:
    recall = {
        "id": "r",
        "call_type": "once",
        "occurrence": 1,
        "scheduled_for": "2027-01-31T09:00:00Z",
        "missed": 0,
    }
    return {
        "session_id": session,
        "user_message": message,
        "system_message": f"[Scheduled recall] {message}",
        "recall": recall,
    }


def outcome(response: httpx.Response) -> str:
    return name_of(read(Answer(response.status_code, response.headers, response.content, False)))


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
async def api(agent: Agent) -> AsyncIterator[ReferenceAPI]:
    served = ReferenceAPI(agent, token=TOKEN, retry_after=7)
    yield served
    agent.opened.set()
    await served.stop()


@pytest.fixture
async def client(api: ReferenceAPI) -> AsyncIterator[Client]:
    url = await api.start()
    async with httpx.AsyncClient(
        headers={"Authorization": f"Bearer {TOKEN}"}, timeout=DEADLINE
    ) as http:
        yield Client(url, http)


@pytest.mark.parametrize(
    ("call", "status", "says", "reads"),
    [
        pytest.param(
            {}, 200, {"status": "completed", "output": "did work"}, "answered", id="a run"
        ),
        pytest.param(
            {"message": "break"},
            200,
            {"status": "failed", "error": "RuntimeError: a tool broke"},
            "failed",
            id="a failed run",
        ),
        pytest.param(
            {"session": "missing-1"},
            404,
            {"code": "session_not_found"},
            "gone",
            id="no such session",
        ),
        pytest.param(
            {"headers": {"Authorization": "Bearer other"}},
            401,
            {"code": "unauthorized"},
            "misconfigured",
            id="another token",
        ),
        pytest.param(
            {"headers": {"Authorization": ""}},
            401,
            {"code": "unauthorized"},
            "misconfigured",
            id="no token",
        ),
        pytest.param({"content": b"{"}, 400, {"code": "malformed"}, "refused", id="no JSON"),
        pytest.param(
            {"content": b"[" * 100_000},
            400,
            {"code": "malformed"},
            "refused",
            id="absurdly deep JSON",
        ),
        pytest.param({"content": b"[]"}, 422, {"code": "invalid"}, "refused", id="no object"),
        pytest.param(
            {"content": b'{"session_id": "s"}'},
            422,
            {"code": "invalid"},
            "refused",
            id="half of it",
        ),
        pytest.param(
            {"named": "other"}, 422, {"code": "invalid"}, "refused", id="body names another session"
        ),
        pytest.param({"key": ""}, 400, {"code": "key_missing"}, "refused", id="no key"),
    ],
)
async def test_answers(
    client: Client,
    agent: Agent,
    api: ReferenceAPI,
    call: dict[str, Any],
    status: int,
    says: dict[str, str],
    reads: str,
) -> None:
    """Each kind of request gets its status and code, is read by the worker as DESIGN's table has
    it, and is counted."""
    response = await client.run(**call)
    assert (response.status_code, outcome(response)) == (status, reads)
    assert says.items() <= response.json().items()
    assert len(agent.runs) == (1 if status == 200 else 0)
    assert [(seen.http_status, seen.code) for seen in api.calls] == [(status, says.get("code"))]
    assert api.inside == {}


@pytest.mark.parametrize(
    "change",
    [
        {"id": 1},
        {"call_type": "often"},
        {"occurrence": 0},
        {"occurrence": "1"},
        {"occurrence": True},
        {"scheduled_for": "soon"},
        {"scheduled_for": None},
        {"missed": -1},
        {"missed": 0.5},
    ],
    ids=str,
)
async def test_a_recall_that_is_none(client: Client, agent: Agent, change: dict[str, Any]) -> None:
    """A request whose recall is not as the contract has it is refused, and nothing runs; what is
    added to it does no harm."""
    told = document("s", "work")
    bad = told | {"recall": told["recall"] | change}
    more = told | {"recall": told["recall"] | {"new": 1}, "new": 2}
    assert (await client.run(content=json.dumps(bad).encode())).json()["code"] == "invalid"
    assert agent.runs == []
    assert (await client.run(content=json.dumps(more).encode())).status_code == 200


async def test_a_person_keeps_the_session_busy(client: Client, agent: Agent) -> None:
    """While a person chats a run is refused with Retry-After and leaves no word behind; once they
    have left it is run."""
    chat = f"{client.base}/sessions/s/chat"
    assert (
        (await client.http.put(chat)).status_code
        == (await client.http.put(chat)).status_code
        == 204
    )
    refused = await client.run()
    assert (refused.status_code, refused.json()["code"], refused.headers["Retry-After"]) == (
        409,
        "session_busy",
        "7",
    )
    assert outcome(refused) == "busy"
    assert (await client.http.get(f"{client.base}/sessions/s")).json() == {
        "busy": True,
        "messages": [],
    }
    assert (await client.run("other", "q:1")).status_code == 200
    assert (await client.http.delete(chat)).status_code == 204
    assert (await client.run()).json()["status"] == "completed"
    assert agent.runs == ["other", "s"]


async def test_a_run_keeps_the_session_busy(client: Client, agent: Agent) -> None:
    """While the agent runs no other run and no person gets in, and a person who was not in there
    cannot free the session."""
    running = asyncio.create_task(client.run(message="wait"))
    await asyncio.wait_for(agent.entered.wait(), DEADLINE)
    chat = f"{client.base}/sessions/s/chat"
    entering = await client.http.put(chat)
    assert (entering.status_code, entering.json()["code"]) == (409, "session_busy")
    await client.http.delete(chat)
    assert (await client.run(key="r:2")).json()["code"] == "session_busy"
    agent.opened.set()
    assert (await running).status_code == 200
    assert (await client.run(key="r:2")).status_code == 200


async def test_one_of_many_at_once_gets_in(client: Client, agent: Agent) -> None:
    """Of twenty calls for one session that arrive together exactly one is started."""
    calls = [asyncio.create_task(client.run(key=f"r:{n}", message="wait")) for n in range(20)]
    completed = asyncio.as_completed(calls)
    for _ in range(19):
        assert (await next(completed)).json()["code"] == "session_busy"
    agent.opened.set()
    assert sorted(r.status_code for r in await asyncio.gather(*calls)) == [200] + [409] * 19
    assert agent.runs == ["s"]


async def test_a_key_while_its_run_goes_on(client: Client, agent: Agent) -> None:
    """The same request again, before the first has ended, is 409 with a code of its own, which the
    worker reads as busy."""
    running = asyncio.create_task(client.run(message="wait"))
    await asyncio.wait_for(agent.entered.wait(), DEADLINE)
    again = await client.run(message="wait")
    assert (again.status_code, again.json()["code"], outcome(again)) == (
        409,
        "run_in_progress",
        "busy",
    )
    agent.opened.set()
    assert (await running).json()["output"] == "did wait"
    assert agent.runs == ["s"]


@pytest.mark.parametrize("message", ["work", "break"])
async def test_a_key_after_its_run(client: Client, agent: Agent, message: str) -> None:
    """A key whose run has ended, well or badly, gets the stored answer, and neither a second run
    nor a second system message."""
    first = await client.run(message=message)
    again = await client.run(message=message)
    assert again.content == first.content
    assert ("Idempotent-Replayed" in first.headers, again.headers["Idempotent-Replayed"]) == (
        False,
        "true",
    )
    assert agent.runs == ["s"]
    messages = (await client.http.get(f"{client.base}/sessions/s")).json()["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"][
        : 3 if message == "work" else 2
    ]
    assert messages[0]["content"] == f"[Scheduled recall] {message}"


async def test_a_key_also_replays_while_somebody_is_in_the_session(
    client: Client, api: ReferenceAPI
) -> None:
    """What has run is answered from memory, whoever is in the session now."""
    await client.run()
    await api.enter("s")
    assert (await client.run()).json()["output"] == "did work"


async def test_a_key_with_another_body(client: Client, agent: Agent) -> None:
    """A key that stands for another request is 422 with a code; under a new key the request is
    run."""
    await client.run(message="one")
    other = await client.run(message="two")
    assert (other.status_code, other.json()["code"], outcome(other)) == (
        422,
        "key_reused",
        "refused",
    )
    assert (await client.run(message="two", key="r:1.1")).json()["output"] == "did two"
    assert agent.runs == ["s", "s"]


async def test_a_caller_who_hangs_up(client: Client, api: ReferenceAPI, agent: Agent) -> None:
    """The run learns that its caller has left, goes on, and answers the successor who asks again
    under the same key."""
    body = json.dumps(document("s", "wait")).encode()
    host, port = httpx.URL(client.base).host, httpx.URL(client.base).port
    _, writer = await asyncio.open_connection(host, port)
    head = (
        f"POST /sessions/s/run HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
        f"{TOKEN}\r\nIdempotency-Key: r:1\r\n"
    )
    writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await asyncio.wait_for(agent.entered.wait(), DEADLINE)
    run = api.runs["r:1"]
    assert not run.left.is_set()
    writer.transport.abort()
    await asyncio.wait_for(run.left.wait(), DEADLINE)
    assert run.call.left_at is not None and run.call.http_status is None
    assert (await client.run(message="wait")).json()["code"] == "run_in_progress"
    agent.opened.set()
    async with asyncio.timeout(DEADLINE):
        while (over := await client.run(message="wait")).status_code == 409:
            pass
    assert over.json()["output"] == "did wait"
    assert agent.runs == ["s"]


@pytest.fixture
async def accepting(agent: Agent) -> AsyncIterator[Client]:
    """A client of an API that accepts every run at once."""
    api = ReferenceAPI(agent, token=TOKEN, retry_after=7, accept_after=0.0)
    url = await api.start()
    async with httpx.AsyncClient(
        headers={"Authorization": f"Bearer {TOKEN}"}, timeout=DEADLINE
    ) as http:
        yield Client(url, http)
    agent.opened.set()
    await api.stop()


async def test_an_accepted_run(accepting: Client, agent: Agent) -> None:
    """202 with an address that the worker polls; the same key meanwhile gets the same, another body
    422, another key 409; in the end the address and the key give the run's answer."""
    first = await accepting.run(message="wait")
    assert (first.status_code, first.json()) == (202, {"run_id": "r:1", "status": "running"})
    taken = accepted(Answer(first.status_code, first.headers, first.content, False), str(first.url))
    assert isinstance(taken, Accepted)
    where = first.url.join(taken.reference)
    on = await accepting.http.get(where)
    assert (on.status_code, on.json(), on.headers["Retry-After"]) == (
        200,
        {"run_id": "r:1", "status": "running"},
        "7",
    )
    assert isinstance(polled(Answer(on.status_code, on.headers, on.content, False)), StillOn)

    again = await accepting.run(message="wait")
    assert (again.status_code, again.content, again.headers["Location"]) == (
        202,
        first.content,
        first.headers["Location"],
    )
    assert ("Idempotent-Replayed" in first.headers, again.headers["Idempotent-Replayed"]) == (
        False,
        "true",
    )
    assert (await accepting.run(message="other")).json()["code"] == "key_reused"
    assert (await accepting.run(key="r:2")).json()["code"] == "session_busy"

    agent.opened.set()
    async with asyncio.timeout(DEADLINE):
        while (over := await accepting.http.get(where)).json()["status"] == "running":
            pass
    assert over.json() == {"run_id": "r:1", "status": "completed", "output": "did wait"}
    assert outcome(over) == "answered"
    last = await accepting.run(message="wait")
    assert (last.status_code, last.json()) == (200, {"status": "completed", "output": "did wait"})
    assert agent.runs == ["s"]


async def test_a_run_that_ends_in_time_is_not_accepted(agent: Agent) -> None:
    """Where the run ends within `accept_after` the call is answered with its end."""
    api = ReferenceAPI(agent, accept_after=DEADLINE)
    url = await api.start()
    async with httpx.AsyncClient(timeout=DEADLINE) as http:
        assert (await Client(url, http).run()).json() == {
            "status": "completed",
            "output": "did work",
        }
    await api.stop()


@pytest.mark.parametrize("waiting", [False, True], ids=["accepted", "waited for"])
async def test_a_run_is_ended_by_delete(
    waiting: bool, accepting: Client, client: Client, api: ReferenceAPI, agent: Agent
) -> None:
    """DELETE ends the run and frees the session, says 204 however often, and whoever asks for the
    run learns that it was cancelled."""
    caller = client if waiting else accepting
    calling = asyncio.create_task(caller.run(message="wait"))
    await asyncio.wait_for(agent.entered.wait(), DEADLINE)
    run = f"{caller.base}/sessions/s/run/r%3A1"
    assert [(await caller.http.delete(run)).status_code for _ in range(2)] == [204, 204]
    answer = await calling
    assert (answer.status_code, answer.json()["status"]) == (
        (200, "cancelled") if waiting else (202, "running")
    )
    over = await caller.http.get(run)
    assert (over.json(), outcome(over)) == ({"run_id": "r:1", "status": "cancelled"}, "failed")
    replayed = await caller.run(message="wait")
    assert (replayed.status_code, replayed.json(), outcome(replayed)) == (
        200,
        {"status": "cancelled"},
        "failed",
    )
    assert (await caller.http.get(f"{caller.base}/sessions/s")).json()["busy"] is False
    assert agent.runs == ["s"]


async def test_a_run_that_is_over_stays_as_it_ended(client: Client) -> None:
    """DELETE of a run that has ended is 204 and changes nothing; an unknown one is 404 with a code,
    and a stranger is told nothing."""
    await client.run()
    run = f"{client.base}/sessions/s/run/r%3A1"
    assert (await client.http.delete(run)).status_code == 204
    assert (await client.http.get(run)).json()["status"] == "completed"
    for method in ("GET", "DELETE"):
        unknown = await client.http.request(method, f"{client.base}/sessions/s/run/other")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "run_not_found")
        async with httpx.AsyncClient() as stranger:
            assert (await stranger.request(method, run)).status_code == 401


async def test_the_worker_follows_what_it_accepts(
    accepting: Client, agent: Agent, app: Application, daemons: Daemons
) -> None:
    """A real daemon polls an accepted run to its end, and has one ended whose recall is cancelled;
    each was posted once."""
    daemon = await daemons.start(run_url=accepting.url, run_token=TOKEN)
    for session, message in (("first", "work"), ("second", "wait")):
        await app.create_session(session, "ann")
        await app.schedule(session, "immediate", datetime.now(UTC), message)
    await daemon.hears("recall.settled", session="first", outcome="answered", status="fired")
    async with asyncio.timeout(DEADLINE):
        while "second" not in agent.runs:
            agent.entered.clear()
            await agent.entered.wait()
    assert await app.cancel_session("second") == 1
    await daemon.hears("recall.ended", session="second", status="cancelled")
    runs = (await accepting.http.get(f"{accepting.base}/runs")).json()
    assert {run["session_id"]: run["status"] for run in runs} == {
        "first": "completed",
        "second": "cancelled",
    }
    assert sorted(agent.runs) == ["first", "second"]


@pytest.mark.parametrize("key", ["a/b:1", "a?b#c:1", "..", ".", "100%25:1", "a%2Fb:1", "{x}:1"])
async def test_hostile_keys(accepting: Client, key: str) -> None:
    """Whatever a key holds, the address of its run is one that the worker's own wire finds it
    at."""
    taken = await accepting.run(key=key, message="wait")
    wire = HttpClient(Settings())
    try:
        answer = await wire.ask(
            "GET",
            str(taken.url.join(taken.headers["Location"])),
            {"Authorization": f"Bearer {TOKEN}"},
        )
    finally:
        await wire.close()
    assert isinstance(answer, Answer)
    assert json.loads(answer.body) == {"run_id": key, "status": "running"}


async def test_stopping_breaks_runs_off(client: Client, api: ReferenceAPI, agent: Agent) -> None:
    """Who waits for a run while the API stops gets a 500, which the worker reads as unknown; then
    nobody listens."""
    running = asyncio.create_task(client.run(message="wait"))
    await asyncio.wait_for(agent.entered.wait(), DEADLINE)
    await api.stop()
    assert outcome(await running) == "unknown"
    with pytest.raises(httpx.ConnectError):
        await client.run()


async def test_a_deleted_session(client: Client, agent: Agent) -> None:
    """A deleted session is gone for runs and for people, also if it was deleted in mid-run."""
    running = asyncio.create_task(client.run(message="wait"))
    await asyncio.wait_for(agent.entered.wait(), DEADLINE)
    session = f"{client.base}/sessions/s"
    assert (await client.http.delete(session)).status_code == 204
    agent.opened.set()
    assert (await running).status_code == 200
    later = [
        await client.run(key="r:2"),
        await client.http.get(session),
        await client.http.put(f"{session}/chat"),
        await client.http.delete(session),
    ]
    assert [(r.status_code, r.json()["code"]) for r in later] == [(404, "session_not_found")] * 4


async def test_what_ran(client: Client) -> None:
    """GET /runs lists the runs in order, with what the agent was told and said."""
    await client.run("a", "x:1", "one")
    await client.run("b", "y:1", "break", headers={"Recall-Attempt": "2"})
    shown = (await client.http.get(f"{client.base}/runs")).json()
    assert [
        (r["key"], r["session_id"], r["user_message"], r["status"], r["said"], r["attempt"])
        for r in shown
    ] == [
        ("x:1", "a", "one", "completed", "did one", ""),
        ("y:1", "b", "break", "failed", "RuntimeError: a tool broke", "2"),
    ]
    assert all(r["called_at"] <= r["ended_at"] for r in shown)
    assert shown[0]["recall"]["occurrence"] == 1


async def test_who_may_ask(client: Client) -> None:
    """Everything but the health wants the token."""
    async with httpx.AsyncClient(base_url=client.base) as stranger:
        assert (await stranger.get("/healthz")).json() == {"status": "ok"}
        for method, path in (
            ("GET", "/runs"),
            ("PUT", "/sessions/s/chat"),
            ("DELETE", "/sessions/s"),
            ("GET", "/sessions/s"),
        ):
            assert (await stranger.request(method, path)).status_code == 401


@pytest.mark.parametrize("session", ["a/b", "a%2Fb", "a b?c#d", "ünder", "..%", "run", "{x}"])
async def test_hostile_ids(client: Client, agent: Agent, session: str) -> None:
    """A session's id arrives as it is, whatever is in it."""
    assert (await client.run(session)).status_code == 200
    assert agent.runs == [session]


async def serving(*options: str) -> asyncio.subprocess.Process:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "recall_worker",
        "reference-api",
        *options,
        env=environ,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_accepting_as_a_process() -> None:
    """`--accept-after` makes the command's API accept what takes longer."""
    process = await serving("--port", "0", "--run-seconds", "60", "--accept-after", "0.05")
    try:
        assert process.stderr is not None
        async with asyncio.timeout(DEADLINE):
            await process.stderr.readline()
            url = (
                (await process.stderr.readline())
                .decode()
                .partition("RECALL_RUN_URL='")[2]
                .rstrip("'\n")
            )
        async with httpx.AsyncClient(timeout=DEADLINE) as http:
            taken = await Client(url, http).run()
            assert (taken.status_code, taken.headers["Location"]) == (202, "run/r%3A1")
        process.terminate()
        async with asyncio.timeout(DEADLINE):
            assert await process.wait() == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_as_a_process(number: signal.Signals) -> None:
    """The command says what RECALL_RUN_URL is to be, serves there, shows each call, and ends with
    status 0 when told to."""
    process = await serving("--port", "0", "--run-seconds", "0")
    try:
        assert process.stderr is not None
        async with asyncio.timeout(DEADLINE):
            await process.stderr.readline()
            url = (
                (await process.stderr.readline())
                .decode()
                .partition("RECALL_RUN_URL='")[2]
                .rstrip("'\n")
            )
        async with httpx.AsyncClient(timeout=DEADLINE) as http:
            assert (await Client(url, http).run("s\x1b[2J")).json()["status"] == "completed"
        async with asyncio.timeout(DEADLINE):
            shown = (await process.stderr.readline()).decode()
            process.send_signal(number)
            assert await process.wait() == 0
        assert shown.endswith(" s\\x1b[2J r:1: 200\n")
        assert await process.stderr.read() == b""
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.slow
async def test_a_port_in_use() -> None:
    """A port that is taken is refused with a sentence and a hint, and status 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await serving("--port", str(port))
        _, said = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert process.returncode == 1
    assert said.decode().splitlines() == [
        f"Error: port {port} on 127.0.0.1 is in use",
        "Try: recall-worker reference-api --port 0 (a free one)",
    ]

"""LangGraph's protocol: what each answer means, against an impostor on a raw socket; then with the
real server, through the real daemon."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from recall_worker.protocols import Call
from recall_worker.protocols.credentials import Credentials
from recall_worker.protocols.langgraph import PAGE, PAGES, LangGraph, api_key, body, thread_of
from recall_worker.protocols.outcomes import WAITS_FOR_A_PERSON
from recall_worker.recall import (
    Accepted,
    Answered,
    Busy,
    Failed,
    Gone,
    Malformed,
    Misconfigured,
    Outcome,
    Refused,
    Unavailable,
    Unknown,
    reason_of,
)
from recall_worker.secret_files import Secrets
from recall_worker.settings import read

from ..conftest import Connection
from ..process.test_corridor import row, soon
from ..process.test_lease import calls, eventually
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Raw, reply
from ..test_recall import claim_with
from .impostor import NO_ROUTE, Answers, Asked, Impostor, Relay
from .langgraph_server import LangGraphServer

pytestmark = pytest.mark.timeout(900)  # The first test with the real server may have to install it.

THREAD = "1f0c7a52-6a1d-4c6b-9a39-2f4f5f0e8a11"
RUN = "1f0c7a52-0000-7000-8000-000000000001"
RUNS = f"/threads/{THREAD}/runs"
POST, LIST, POLL, JOIN = (
    f"POST {RUNS}",
    f"GET {RUNS}",
    f"GET {RUNS}/{RUN}",
    f"GET {RUNS}/{RUN}/join",
)
THREADS, ASSISTANTS = "POST /threads/search", "POST /assistants/search"

NO_THREAD_OR_ASSISTANT = reply(404, {"detail": "Thread or assistant not found."})
NO_THREAD = reply(404, {"detail": f"Thread with ID {THREAD} not found"})
PENDING = reply(200, {"run_id": RUN, "status": "pending"})
PAGE_OF_THE_WEB = reply(200, text=b"<!doctype html>", headers={"content-type": "text/html"})
HANGS_UP = Raw()
STREAM = reply(
    200,
    text=b'event: values\ndata: {"messages": []}\n\nevent: end\ndata: null\n\n',
    headers={"content-type": "text/event-stream"},
)
BROKEN_STREAM = reply(
    200,
    text=b'event: error\ndata: {"message": "no model"}\n\n',
    headers={"content-type": "text/event-stream"},
)


# --- an impostor ----------------------------------------------------------------------------------


@asynccontextmanager
async def impostor(answers: Answers, **environ: str) -> AsyncIterator[tuple[LangGraph, Impostor]]:
    """The protocol, and the server that it speaks to."""
    async with Impostor(answers) as server:
        environ = {"RECALL_RUN_URL": server.url, "RECALL_PROTOCOL": "langgraph"} | environ
        settings = read(environ)
        protocol = LangGraph(settings, Credentials(settings, Secrets(settings, environ)))
        try:
            yield protocol, server
        finally:
            await protocol.close()


CLAIM = claim_with(session_id=THREAD)


# --- what is sent ---------------------------------------------------------------------------------


def test_body() -> None:
    """The body holds one message of a user, the key and what else the contract tells as metadata,
    and nothing else."""
    when = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
    claim = claim_with(
        call_type="recurring",
        interval=60,
        occurrence=7,
        rekey=1,
        scheduled_for=when,
        missed=2,
        message="read it",
    )
    document = json.loads(body(claim, "agent"))
    message = document["input"]["messages"][0]
    assert UUID(message.pop("id"))
    assert document == {
        "assistant_id": "agent",
        "input": {"messages": [{"role": "user", "content": "[Scheduled recall] read it"}]},
        "metadata": {
            "recall_key": "r1:7.1",
            "recall_id": "r1",
            "recall_call_type": "recurring",
            "recall_occurrence": 7,
            "recall_scheduled_for": "2026-03-01T12:30:00.000000Z",
            "recall_missed": 2,
        },
        "multitask_strategy": "reject",
        "if_not_exists": "reject",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"attempt": 3},
        {"deferrals": 9},
        {"begun_age": 99.0},
        {"lag": 5.0},
        {"taken_from": "w1"},
        {"due": False},
    ],
    ids=repr,
)
def test_the_body_stays_the_same_under_one_key(changes: dict[str, Any]) -> None:
    """Nothing that changes between two calls of an occurrence is in the body, byte for byte."""
    assert body(claim_with(**changes), "agent") == body(claim_with(), "agent")


def test_another_key_is_another_message() -> None:
    """The message's id is made of the key: the same key can't put it into the thread twice, another
    key can."""
    one, other = (
        json.loads(body(claim_with(rekey=n), "agent"))["input"]["messages"][0]["id"] for n in (0, 1)
    )
    assert one != other


@pytest.mark.parametrize(
    ("token", "headers"),
    [
        (None, {}),
        ("secret", {"X-Api-Key": "secret", "Authorization": "Bearer secret"}),
        ("lsv2_sk_1", {"X-Api-Key": "lsv2_sk_1"}),
    ],
)
def test_credentials(token: str | None, headers: dict[str, str]) -> None:
    """The token goes both ways in which servers ask for it; a LangSmith key goes the one in which
    LangSmith does."""
    assert ({} if token is None else api_key(token)) == headers


async def test_the_request() -> None:
    """The run is posted once, to the thread, with the contract's headers, the token, and a
    signature where there is a secret."""
    async with impostor({POST: PENDING}, RECALL_RUN_TOKEN="t", RECALL_SIGNING_SECRET="s") as (
        protocol,
        server,
    ):
        call = Call(CLAIM, asked_at=0.0)
        assert await protocol.call(call) == Accepted(RUN, 200)
    (asked,) = server.asked
    assert asked.line == f"POST {RUNS} HTTP/1.1" and asked.body == body(CLAIM, "agent")
    assert call.sent_at is not None
    expected = {
        "idempotency-key": "r1:1",
        "recall-attempt": "1",
        "authorization": "Bearer t",
        "x-api-key": "t",
        "content-type": "application/json",
        "webhook-id": "r1:1",
    }
    assert {name: asked.headers[name] for name in expected} == expected
    assert {"traceparent", "recall-lateness", "webhook-signature"} <= set(asked.headers)


@pytest.mark.parametrize("base", ["", "/", "/deployments/a", "/deployments/a/"])
async def test_the_base_may_be_a_path(base: str) -> None:
    """RECALL_RUN_URL is the server's base, whether it ends in a slash or not."""
    where = f"POST {base.rstrip('/')}{RUNS}"
    async with Impostor({where: PENDING}) as server:
        protocol = LangGraph(
            read({"RECALL_RUN_URL": server.url + base, "RECALL_LANGGRAPH_ASSISTANT": "other"})
        )
        assert await protocol.call(Call(CLAIM, 0.0)) == Accepted(RUN, 200)
        await protocol.close()
    assert server.what == [where] and json.loads(server.asked[0].body)["assistant_id"] == "other"


# --- sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "session",
    [THREAD, THREAD.upper(), THREAD.replace("-", ""), f"{{{THREAD}}}", f"urn:uuid:{THREAD}"],
    ids=str,
)
async def test_a_thread_however_it_is_written(session: str) -> None:
    """Every way to write a UUID that the server takes leads to the same address."""
    async with impostor({POST: PENDING}) as (protocol, server):
        assert isinstance(await protocol.call(Call(claim_with(session_id=session), 0.0)), Accepted)
    assert server.what == [POST]


@pytest.mark.parametrize(
    "session",
    [
        "s1",
        "search",
        "",
        "..",
        "a/../b",
        f"{THREAD}/state",
        f"{THREAD}?x=",
        f"{THREAD}\r\nx: y",
        "%2e",
        THREAD + "0",
    ],
    ids=repr,
)
async def test_a_session_that_is_no_thread(session: str) -> None:
    """A session whose id is no UUID can never run there: its row is malformed, and nothing is sent
    for it."""
    async with impostor({POST: PENDING}) as (protocol, server):
        claim = claim_with(session_id=session)
        call = Call(claim, 0.0)
        outcome = await protocol.call(call)
        assert isinstance(outcome, Malformed) and "UUID" in outcome.reason
        assert await protocol.find(claim) is None
        assert isinstance(await protocol.follow(claim, RUN, 1), Unknown)
        await protocol.abort(claim, RUN)
    assert call.sent_at is None and server.asked == []


@given(st.text(max_size=60))
@examples(deadline=None)
def test_any_session_is_a_thread_or_none(session: str) -> None:
    """Whatever the id holds, only hexadecimal digits and hyphens get into an address."""
    thread = thread_of(claim_with(session_id=session))
    assert thread is None or set(str(thread)) <= set("0123456789abcdef-")


# --- what the answer to a post means --------------------------------------------------------------

THERE, NOT_THERE = reply(200, [{"run_id": RUN}]), reply(200, [])
NO_SUCH_GRAPH = reply(
    422, {"detail": "Invalid assistant: 'agent'. Must be either:\n- A valid assistant UUID, or …"}
)

POSTED: list[tuple[str, Answers, type[Outcome], str]] = [
    ("taken", {POST: PENDING}, Accepted, ""),
    ("taken, and running", {POST: reply(200, {"run_id": RUN, "status": "running"})}, Accepted, ""),
    ("no run in it", {POST: reply(200, {"ok": True})}, Misconfigured, "not as LangGraph"),
    ("nothing in it", {POST: reply(204, text=b"")}, Misconfigured, "not as LangGraph"),
    ("a list", {POST: reply(200, [])}, Misconfigured, "not as LangGraph"),
    (
        "a strange run",
        {POST: reply(200, {"run_id": "../x", "status": "pending"})},
        Misconfigured,
        "not as LangGraph",
    ),
    (
        "a run without a status",
        {POST: reply(200, {"run_id": RUN})},
        Misconfigured,
        "not as LangGraph",
    ),
    (
        "a failure by another's words",
        {POST: reply(200, {"status": "failed"})},
        Misconfigured,
        "not as LangGraph",
    ),
    ("a page of the web", {POST: PAGE_OF_THE_WEB}, Misconfigured, "text/html"),
    ("broken JSON", {POST: reply(200, text=b'{"run_id": ')}, Unknown, "none"),
    ("larger than can be read", {POST: reply(200, {"x": "x" * (1 << 20)})}, Unknown, "1 MiB"),
    (
        "larger, its run at the beginning",
        {POST: reply(200, {"run_id": RUN, "status": "pending", "x": "x" * (1 << 20)})},
        Accepted,
        "",
    ),
    (
        "larger, its run at the end",
        {POST: reply(200, {"x": "x" * (1 << 20), "run_id": RUN, "status": "pending"})},
        Accepted,
        "",
    ),
    ("streams", {POST: STREAM}, Answered, ""),
    ("streams an error", {POST: BROKEN_STREAM}, Failed, "stream"),
    (
        "larger, and named",
        {POST: reply(200, {"x": "x" * (1 << 20)}, {"content-location": f"{RUNS}/{RUN}"})},
        Accepted,
        "",
    ),
    ("busy", {POST: reply(409, {"detail": "Thread is already running a task."})}, Busy, ""),
    (
        "no thread",
        {POST: NO_THREAD_OR_ASSISTANT, LIST: NO_THREAD, THREADS: reply(200, [])},
        Gone,
        "",
    ),
    (
        "no thread, others",
        {POST: NO_THREAD_OR_ASSISTANT, LIST: NO_THREAD, THREADS: reply(200, [{"thread_id": RUN}])},
        Gone,
        "",
    ),
    (
        "no thread, and yet",
        {
            POST: NO_THREAD_OR_ASSISTANT,
            LIST: NO_THREAD,
            THREADS: reply(200, [{"thread_id": THREAD}]),
        },
        Unavailable,
        "just now",
    ),
    (
        "no thread, no search",
        {POST: NO_THREAD_OR_ASSISTANT, LIST: NO_THREAD},
        Misconfigured,
        "RECALL_RUN_URL",
    ),
    (
        "no thread, search forbidden",
        {POST: NO_THREAD_OR_ASSISTANT, LIST: NO_THREAD, THREADS: reply(403)},
        Misconfigured,
        "RECALL_RUN_TOKEN",
    ),
    (
        "no thread, search broken",
        {POST: NO_THREAD_OR_ASSISTANT, LIST: NO_THREAD, THREADS: reply(500)},
        Unavailable,
        "HTTP 500",
    ),
    (
        "no thread, search hangs up",
        {POST: NO_THREAD_OR_ASSISTANT, LIST: NO_THREAD, THREADS: HANGS_UP},
        Unavailable,
        "broke off",
    ),
    (
        "no assistant",
        {POST: NO_THREAD_OR_ASSISTANT, LIST: THERE},
        Misconfigured,
        "RECALL_LANGGRAPH_ASSISTANT",
    ),
    (
        "no assistant, new thread",
        {POST: NO_THREAD_OR_ASSISTANT, LIST: NOT_THERE},
        Misconfigured,
        "RECALL_LANGGRAPH_ASSISTANT",
    ),
    (
        "404, and then nothing",
        {POST: NO_THREAD_OR_ASSISTANT, LIST: HANGS_UP},
        Unavailable,
        "whether the thread exists",
    ),
    (
        "404, and then a web page",
        {POST: NO_THREAD_OR_ASSISTANT, LIST: PAGE_OF_THE_WEB},
        Misconfigured,
        "text/html",
    ),
    ("404, and then 503", {POST: NO_THREAD_OR_ASSISTANT, LIST: reply(503)}, Unavailable, "later"),
    ("another server's 404", {}, Misconfigured, "RECALL_RUN_URL"),
    (
        "no such graph",
        {POST: NO_SUCH_GRAPH, ASSISTANTS: reply(404, {"detail": "Graph 'agent' not found."})},
        Misconfigured,
        "ASSISTANT",
    ),
    (
        "no such graph, older",
        {POST: NO_SUCH_GRAPH, ASSISTANTS: reply(200, [])},
        Misconfigured,
        "RECALL_LANGGRAPH_ASSISTANT",
    ),
    (
        "refused",
        {POST: reply(422, {"detail": "no such input"}), ASSISTANTS: reply(200, [{}])},
        Refused,
        "no such input",
    ),
    (
        "refused otherwise",
        {POST: reply(400, {"detail": "no such input"}), ASSISTANTS: reply(200, [{}])},
        Refused,
        "no such input",
    ),
    (
        "refused, and then nothing",
        {POST: reply(422), ASSISTANTS: HANGS_UP},
        Unavailable,
        "whether the assistant exists",
    ),
    ("too large", {POST: reply(413)}, Refused, "413"),
    ("the token", {POST: reply(401)}, Misconfigured, "RECALL_RUN_TOKEN"),
    ("forbidden", {POST: reply(403)}, Misconfigured, "RECALL_RUN_TOKEN"),
    (
        "moved",
        {POST: reply(307, headers={"location": "https://elsewhere/"})},
        Misconfigured,
        "elsewhere",
    ),
    ("too many", {POST: reply(429, headers={"retry-after": "7"})}, Unavailable, "429"),
    ("broken", {POST: reply(500, {"detail": "Internal Server Error"})}, Unknown, "500"),
    ("a gateway's patience", {POST: reply(504)}, Unknown, "504"),
    ("a gateway without its server", {POST: reply(502)}, Unknown, "502"),
    ("a gateway of Cloudflare's", {POST: reply(522)}, Unknown, "522"),
    ("hangs up", {POST: HANGS_UP}, Unknown, "after the request was sent"),
]


@pytest.mark.parametrize(
    ("answers", "kind", "said"), [case[1:] for case in POSTED], ids=[case[0] for case in POSTED]
)
async def test_what_a_post_is_answered(answers: Answers, kind: type[Outcome], said: str) -> None:
    """Each answer is the outcome that the contract asks for; where its one text leaves that open,
    the server is asked; it is posted once."""
    async with impostor(answers) as (protocol, server):
        outcome = await protocol.call(Call(CLAIM, 0.0))
    assert type(outcome) is kind and said in (reason_of(outcome) or "")
    assert server.what.count(POST) == 1


async def test_silence() -> None:
    """A server that takes the post and says nothing within RECALL_RUN_TIMEOUT (a minute at most)
    may have run it."""
    async with impostor({POST: lambda _: None}, RECALL_RUN_TIMEOUT="0.3") as (protocol, server):
        assert isinstance(await protocol.call(Call(CLAIM, 0.0)), Unknown)
    assert server.what == [POST]


async def test_an_assistant_by_its_uuid() -> None:
    """Where the assistant is given by its UUID, what the server refuses is refused, and nobody is
    asked for a graph's name."""
    async with impostor({POST: reply(422)}, RECALL_LANGGRAPH_ASSISTANT=RUN) as (protocol, server):
        assert isinstance(await protocol.call(Call(CLAIM, 0.0)), Refused)
    assert server.what == [POST]


async def test_nobody_there() -> None:
    """Without a connection nothing was sent: a post and a question are both Unavailable, and a
    run's poll goes on until its time is up."""
    async with impostor({}) as (protocol, server):
        await server.__aexit__()
        call = Call(CLAIM, 0.0)
        assert isinstance(await protocol.call(call), Unavailable) and call.sent_at is None
        assert isinstance(await protocol.find(CLAIM), Unavailable)
        outcome = await protocol.follow(CLAIM, RUN, 1.0)
        assert (
            isinstance(outcome, Unknown)
            and "no connection" in outcome.reason
            and outcome.http_status is None
        )


GATEWAY = reply(502, headers={"retry-after": "7"})


async def test_gateways() -> None:
    """A gateway that answers a post for a server that is away: it may have run. One that answers a
    question before a post: nothing was started."""
    async with impostor({POST: GATEWAY, LIST: GATEWAY}) as (protocol, _):
        posted = await protocol.call(Call(CLAIM, 0.0))
        assert isinstance(posted, Unknown) and posted.by_gateway and posted.retry_after == 7
        found = await protocol.find(CLAIM)
        assert isinstance(found, Unavailable) and found.retry_after == 7


async def test_when_to_poll_first() -> None:
    """The server may say when an accepted run is to be asked for; never less than a second."""
    for after, means in (("7", 7.0), ("0", 1.0)):
        said = reply(200, {"run_id": RUN, "status": "pending"}, {"retry-after": after})
        async with impostor({POST: said}) as (protocol, _):
            assert await protocol.call(Call(CLAIM, 0.0)) == Accepted(RUN, 200, means)


async def test_credentials_of_every_request(tmp_path: Path) -> None:
    """A token that was replaced in its file is read again where it is refused, and the request made
    once more; further headers go with all of them."""
    file = tmp_path / "token"
    file.write_text("token-1")

    def guarded(answer: Raw) -> Callable[[Asked], Raw]:
        def by_token(asked: Asked) -> Raw:
            if asked.headers["x-api-key"] == "token-2":
                return answer
            file.write_text("token-2")
            return reply(401)

        return by_token

    answers: Answers = {
        POST: guarded(PENDING),
        LIST: guarded(reply(200, [])),
        POLL: guarded(status("success")),
        THREADS: guarded(ASKS),
        f"{POLL}/cancel".replace("GET", "POST"): guarded(reply(202, text=b"")),
    }
    requests: list[Callable[[LangGraph], Any]] = [
        lambda protocol: protocol.call(Call(CLAIM, 0.0)),
        lambda protocol: protocol.find(CLAIM),
        lambda protocol: protocol.follow(CLAIM, RUN, 5),
        lambda protocol: protocol.abort(CLAIM, RUN),
    ]
    for request in requests:
        file.write_text("token-1")
        async with impostor(
            answers, RECALL_RUN_TOKEN_FILE=str(file), RECALL_RUN_HEADERS="x-team: blue"
        ) as (protocol, server):
            await request(protocol)
        assert [a.headers["x-api-key"] for a in server.asked][:2] == ["token-1", "token-2"]
        assert server.what[0] == server.what[1] and server.what.count(server.what[0]) == 2
        assert {a.headers["x-team"] for a in server.asked} == {"blue"}
        assert set(server.what) <= set(answers)


async def test_a_question_is_noted() -> None:
    """A graph that stopped to ask a person has run; what people should know of it is noted."""
    async with impostor({POLL: status("success"), THREADS: ASKS}) as (protocol, server):
        outcome = await protocol.follow(CLAIM, RUN, 5)
    assert outcome == Answered(200, WAITS_FOR_A_PERSON)
    assert server.what == [POLL, THREADS]


# --- whether a run is there already ---------------------------------------------------------------


def run(key: str | None, number: int = 1) -> dict[str, Any]:
    return {
        "run_id": f"1f0c7a52-0000-7000-8000-{number:012}",
        "metadata": {"graph_id": "agent"} | ({"recall_key": key} if key else {}),
    }


FOUND: list[tuple[str, Any, Outcome | type[Outcome] | None]] = [
    ("nothing", reply(200, []), None),
    (
        "others",
        reply(
            200,
            [
                run(None),
                run("r1:2"),
                run("r1:1.1"),
                run("r11:1"),
                {"run_id": RUN},
                {"run_id": RUN, "metadata": None},
                7,
            ],
        ),
        None,
    ),
    (
        "there",
        reply(200, [run(None), run("r1:1", 5), run("r1:0")]),
        Accepted(run(None, 5)["run_id"], 200),
    ),
    ("strange", reply(200, [{"run_id": "../x", "metadata": {"recall_key": "r1:1"}}]), None),
    ("no thread", NO_THREAD, None),
    ("no list", reply(200, {"runs": []}), Misconfigured),
    ("a web page", PAGE_OF_THE_WEB, Misconfigured),
    ("token", reply(401), Misconfigured),
    ("broken", reply(500), Unavailable),
    ("gateway", reply(504), Unavailable),
    ("later", reply(503, headers={"retry-after": "7"}), Unavailable),
    ("unasked for", reply(422), Unavailable),
    ("hangs up", HANGS_UP, Unavailable),
    ("too large", reply(200, [run("x" * (1 << 20))]), Unknown),
]


@pytest.mark.parametrize(
    ("answer", "expected"), [case[1:] for case in FOUND], ids=[case[0] for case in FOUND]
)
async def test_find(answer: Raw, expected: Outcome | type[Outcome] | None) -> None:
    """The run with exactly this key is found, in whatever state; none is none; and what can't be
    told is neither."""
    async with impostor({LIST: answer}) as (protocol, server):
        outcome = await protocol.find(CLAIM)
    assert type(outcome) is expected if isinstance(expected, type) else outcome == expected
    assert set(server.what) == {LIST}, "nothing is posted"
    assert server.asked[0].query == {
        "limit": [str(PAGE)],
        "offset": ["0"],
        "select": ["run_id", "metadata"],
    }


@pytest.mark.parametrize(
    ("runs", "at", "pages"),
    [(250, 249, 3), (250, None, 3), (PAGE, None, 2), (PAGE * PAGES + 7, None, PAGES)],
    ids=repr,
)
async def test_find_turns_pages(runs: int, at: int | None, pages: int) -> None:
    """All runs of a thread are looked through, newest first, page by page, but no more than a
    thousand."""
    there = [run("r1:1" if n == at else None, n) for n in range(runs)]

    def page(asked: Asked) -> Raw:
        offset, limit = (int(asked.query[name][0]) for name in ("offset", "limit"))
        return reply(200, there[offset : offset + limit])

    async with impostor({LIST: page}) as (protocol, server):
        outcome = await protocol.find(CLAIM)
    assert outcome == (None if at is None else Accepted(there[at]["run_id"], 200))
    assert len(server.asked) == pages


# --- how a run goes on ----------------------------------------------------------------------------


def status(word: Any) -> Raw:
    return reply(200, {"run_id": RUN, "status": word})


LARGE = reply(200, {"x": "x" * (1 << 20)})
ASKS = reply(
    200, [{"thread_id": THREAD, "status": "interrupted", "interrupts": {"t": [{"value": "?"}]}}]
)
NO_MODEL = reply(200, {"__error__": {"error": "ValueError", "message": "no\nmodel"}})
FOLLOWED: list[tuple[str, Answers, type[Outcome], str]] = [
    ("success", {POLL: status("success")}, Answered, ""),
    (
        "waits and runs",
        {POLL: [status("pending"), status("running"), status("success")]},
        Answered,
        "",
    ),
    (
        "trouble on the way",
        {POLL: [HANGS_UP, reply(502), reply(401), status("success")]},
        Answered,
        "",
    ),
    (
        "words unheard of",
        {POLL: [status("dreaming"), status(7), reply(200, []), PAGE_OF_THE_WEB, status("success")]},
        Answered,
        "",
    ),
    (
        "larger than can be read",
        {
            POLL: [LARGE, LARGE, LARGE, LARGE],
            LIST: [
                reply(503),
                reply(200, [{"run_id": "another", "status": "error"}]),
                reply(200, [{"run_id": RUN, "status": "running"}]),
                reply(
                    200,
                    [
                        {"run_id": "another", "status": "error"},
                        {"run_id": RUN, "status": "success"},
                    ],
                ),
            ],
        },
        Answered,
        "",
    ),
    (
        "failed",
        {POLL: status("error"), JOIN: NO_MODEL},
        Failed,
        "the graph failed: ValueError: no model",
    ),
    (
        "failed at length",
        {POLL: status("error"), JOIN: reply(200, {"__error__": {"message": "x" * 9000}})},
        Failed,
        "xxx",
    ),
    (
        "failed, over since",
        {POLL: status("error"), JOIN: reply(200, {"messages": []})},
        Failed,
        "the graph failed",
    ),
    (
        "failed, strangely",
        {POLL: status("error"), JOIN: reply(200, {"__error__": "no"})},
        Failed,
        "the graph failed",
    ),
    ("failed, and silent", {POLL: status("error"), JOIN: HANGS_UP}, Failed, "the graph failed"),
    ("too long", {POLL: status("timeout")}, Failed, "time limit"),
    ("cancelled", {POLL: status("interrupted")}, Failed, "cancelled at the server, or displaced"),
    (
        "cancelled, and no question",
        {
            POLL: status("interrupted"),
            THREADS: reply(200, [{"thread_id": THREAD, "interrupts": {}}]),
        },
        Failed,
        "cancelled at the server",
    ),
    ("interrupted by its question", {POLL: status("interrupted"), THREADS: ASKS}, Answered, ""),
    ("deleted", {POLL: NO_ROUTE}, Unknown, "no longer knows"),
    ("rolled back", {POLL: NO_ROUTE, LIST: reply(200, [])}, Unknown, "no longer knows"),
    (
        "deleted with its thread",
        {POLL: NO_ROUTE, LIST: NO_THREAD, THREADS: reply(200, [])},
        Gone,
        "",
    ),
]


@pytest.mark.parametrize(
    ("answers", "kind", "said"), [case[1:] for case in FOLLOWED], ids=[case[0] for case in FOLLOWED]
)
async def test_follow(
    answers: Answers, kind: type[Outcome], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is polled until its status is final, whatever happens on the way; a failed one says why
    where the server knows."""
    monkeypatch.setattr("recall_worker.protocols.polling.FIRST", 0.01)
    async with impostor(answers) as (protocol, server):
        outcome = await protocol.follow(CLAIM, RUN, 20)
    assert type(outcome) is kind and said in (reason_of(outcome) or "")
    assert len(reason_of(outcome) or "") < 400
    assert set(server.what) <= {POLL, LIST, JOIN, THREADS}, "nothing is posted"


async def test_a_runs_time_is_up() -> None:
    """A run that doesn't end in its time is Unknown, without an HTTP status: the worker then ends
    it at the server."""
    async with impostor({POLL: status("running")}) as (protocol, _):
        outcome = await protocol.follow(CLAIM, RUN, 0.1)
    assert (
        isinstance(outcome, Unknown)
        and outcome.http_status is None
        and "in its time" in outcome.reason
    )


@pytest.mark.parametrize(
    "reference",
    ["", "..", "a/b", "a?b", "http://elsewhere/", "a b", "x" * 101, "é", f"{RUN}\n"],
    ids=repr,
)
async def test_a_reference_that_is_none(reference: str) -> None:
    """What a row holds as a reference is hostile: one that LangGraph could not have given leads
    nowhere."""
    async with impostor({}) as (protocol, server):
        assert isinstance(await protocol.follow(CLAIM, reference, 5), Unknown)
        await protocol.abort(CLAIM, reference)
    assert server.asked == []


@pytest.mark.parametrize(
    "answer",
    [reply(202, text=b""), reply(404, {"detail": "No runs found to cancel."}), HANGS_UP],
    ids=["done", "over", "broken"],
)
async def test_abort(answer: Raw) -> None:
    """A run is cancelled once, with the token, whatever comes of it."""
    async with impostor({f"POST {RUNS}/{RUN}/cancel": answer}, RECALL_RUN_TOKEN="t") as (
        protocol,
        server,
    ):
        await protocol.abort(CLAIM, RUN)
    (asked,) = server.asked
    assert (
        asked.line == f"POST {RUNS}/{RUN}/cancel HTTP/1.1"
        and asked.body == b""
        and asked.headers["x-api-key"] == "t"
    )


# --- the real server, through the real daemon -----------------------------------------------------


@pytest.fixture(scope="module")
def langgraph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LangGraphServer]:
    """The server, started once for all tests of this file."""
    server = LangGraphServer(tmp_path_factory.mktemp("langgraph"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def workers(database: str, langgraph: LangGraphServer) -> AsyncIterator[Daemons]:
    """Starts daemons that speak to the server; whatever still runs at the end is killed."""
    environ = {
        "RECALL_DSN": database,
        "RECALL_RUN_URL": langgraph.url,
        "RECALL_PROTOCOL": "langgraph",
        "RECALL_BUSY_DELAY": "0.2",
        "RECALL_LEASE": "2",
    }
    async with Daemons(environ) as started:
        yield started


async def promise(app: Application, thread: str, message: str, interval: int | None = None) -> str:
    """A recall of this thread that is due now; its id."""
    await app.create_session(thread, "ann")
    return await app.schedule(
        thread, "recurring" if interval else "once", soon(0), message, interval
    )


async def eventually_over(langgraph: LangGraphServer, thread: str) -> None:
    """Wait until no run of the thread goes on."""
    async with asyncio.timeout(20):
        while True:
            if not {"pending", "running"} & {word for _, word in await langgraph.runs(thread)}:
                return
            await asyncio.sleep(0.05)


@pytest.mark.full
async def test_a_recall_runs_once(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """A due recall is one run of the thread and one message in it; the graph finds the recall in
    its metadata; both times are on record."""
    thread = await langgraph.create_thread()
    daemon = await workers.start()
    recall = await promise(app, thread, "look at the build")
    await daemon.hears("recall.settled", recall=recall, outcome="answered")
    assert await langgraph.messages(thread) == [
        "[Scheduled recall] look at the build",
        "done: [Scheduled recall] look at the build",
    ]
    assert await langgraph.runs(thread) == [(f"{recall}:1", "success")]
    (once,) = langgraph.times(thread)
    assert once["recall"]["recall_id"] == recall and once["recall"]["recall_occurrence"] == 1
    assert (await row(db, thread))["status"] == "fired"
    (mark,) = await calls(db, recall)
    assert (
        mark["outcome"] == "answered"
        and mark["called_at"] <= mark["delivered_at"] < mark["completed_at"]
    )


@pytest.mark.full
async def test_a_long_message(
    app: Application, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """A message that is too long for the server's answers, which repeat it, to be read is run and
    followed all the same, once."""
    thread = await langgraph.create_thread()
    daemon = await workers.start()
    recall = await promise(app, thread, "long " + "x" * 1_500_000)
    await daemon.hears("recall.settled", recall=recall, outcome="answered", attempt=1)
    assert (
        await langgraph.runs(thread) == [(f"{recall}:1", "success")]
        and len(langgraph.times(thread)) == 1
    )


@pytest.mark.full
async def test_a_recurring_recall(
    app: Application, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """Each occurrence is a run of its own, one after the other, in one conversation."""
    thread = await langgraph.create_thread()
    daemon = await workers.start()
    recall = await promise(app, thread, "again", interval=1)
    await daemon.hears("recall.settled", recall=recall, times=2)
    assert (await langgraph.runs(thread))[:2] == [
        (f"{recall}:1", "success"),
        (f"{recall}:2", "success"),
    ]
    assert (await langgraph.messages(thread))[:4] == [
        "[Scheduled recall] again",
        "done: [Scheduled recall] again",
    ] * 2


@pytest.mark.full
async def test_a_busy_thread(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """While somebody's run goes on in the thread its recall is deferred, again and again;
    afterwards it runs, once."""
    thread = await langgraph.create_thread()
    await langgraph.say(thread, "wait")
    await langgraph.until_run(thread)
    daemon = await workers.start()
    recall = await promise(app, thread, "after that")
    await daemon.hears("recall.settled", recall=recall, outcome="busy", times=3)
    assert len(langgraph.times(thread)) == 1
    langgraph.open(thread)
    await daemon.hears("recall.settled", recall=recall, outcome="answered")
    assert await langgraph.runs(thread) == [(None, "success"), (f"{recall}:1", "success")]
    assert (await langgraph.messages(thread)).count("[Scheduled recall] after that") == 1
    answered, busy = await calls(db, recall)
    assert (answered["outcome"], answered["attempt"], busy["outcome"]) == (
        "answered",
        1,
        "busy",
    ) and busy["calls"] >= 3


@pytest.mark.full
async def test_a_failing_graph(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """A graph that raises is Failed with its own words, tried again under a new key, and then
    failed for good."""
    thread = await langgraph.create_thread()
    daemon = await workers.start(max_attempts=2)
    recall = await promise(app, thread, "fail")
    await daemon.hears("recall.settled", recall=recall, outcome="failed", times=2)
    after = await row(db, thread)
    assert (after["status"], after["reason"]) == (
        "failed",
        "the graph failed: ValueError: no model today",
    )
    assert await langgraph.runs(thread) == [(f"{recall}:1", "error"), (f"{recall}:1.1", "error")]
    assert [(mark["outcome"], mark["attempt"]) for mark in await calls(db, recall)] == [
        ("failed", 1),
        ("failed", 2),
    ]


@pytest.mark.full
async def test_a_graph_that_asks_a_person(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """A graph that stops to ask a person has run: the recall has fired, and the question stands in
    the thread."""
    thread = await langgraph.create_thread()
    daemon = await workers.start()
    recall = await promise(app, thread, "ask")
    await daemon.hears("recall.settled", recall=recall, outcome="answered")
    assert (await row(db, thread))["status"] == "fired"
    found = await langgraph.ask("GET", f"/threads/{thread}")
    assert found["status"] == "interrupted" and "may I?" in json.dumps(found["interrupts"])
    (mark,) = await calls(db, recall)
    assert mark["reason"] == WAITS_FOR_A_PERSON


@pytest.mark.full
async def test_a_missing_thread(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """A thread that the server doesn't have cancels its recall, and is not created by it."""
    thread = str(uuid4())
    daemon = await workers.start()
    recall = await promise(app, thread, "hello")
    await daemon.hears("recall.settled", recall=recall, outcome="gone")
    after = await row(db, thread)
    assert after["status"] == "cancelled" and "does not exist" in str(after["reason"])
    assert await langgraph.ask("POST", "/threads/search", {"ids": [thread]}) == []


@pytest.mark.full
async def test_a_deleted_thread(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """A thread that is deleted in mid-run takes the run with it: the recall is cancelled."""
    thread = await langgraph.create_thread()
    daemon = await workers.start()
    recall = await promise(app, thread, "wait")
    await langgraph.until_run(thread)
    await langgraph.ask("DELETE", f"/threads/{thread}")
    await daemon.hears("recall.settled", recall=recall, outcome="gone")
    assert (await row(db, thread))["status"] == "cancelled"
    assert len(langgraph.times(thread)) == 1


@pytest.mark.full
@pytest.mark.parametrize("assistant", ["no-such-graph", str(uuid4())], ids=["by name", "by UUID"])
async def test_a_wrong_assistant(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons, assistant: str
) -> None:
    """An assistant that the server doesn't have is our fault: the recall is kept, loudly, and costs
    no attempt."""
    thread = await langgraph.create_thread()
    daemon = await workers.start(langgraph_assistant=assistant)
    recall = await promise(app, thread, "hello")
    (told,) = (await daemon.hears("endpoint.misconfigured"))[:1]
    assert "RECALL_LANGGRAPH_ASSISTANT" in told["reason"]
    await daemon.hears("recall.settled", recall=recall, outcome="misconfigured")
    after = await row(db, thread)
    assert (after["status"], after["attempt"]) == ("pending", 0)
    assert await langgraph.runs(thread) == []


@pytest.mark.full
async def test_another_server_at_the_address(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """An address at which everything is 404 cancels nothing."""
    thread = str(uuid4())
    daemon = await workers.start(run_url=f"{langgraph.url}/nothing/here")
    recall = await promise(app, thread, "hello")
    await daemon.hears("recall.settled", recall=recall, outcome="misconfigured")
    assert (await row(db, thread))["status"] == "pending"


@pytest.mark.full
async def test_a_session_that_is_no_thread_of_the_server(
    app: Application, db: Connection, workers: Daemons
) -> None:
    """A recall of a session whose id can't be a thread's ends at once, saying so; a recurring one,
    too."""
    daemon = await workers.start()
    await app.create_session("chat 1", "ann")
    recall = await app.schedule("chat 1", "recurring", soon(0), "hello", 60)
    await daemon.hears("recall.settled", recall=recall, outcome="malformed")
    after = await row(db, "chat 1")
    assert after["status"] == "failed" and "UUID" in str(after["reason"])


@pytest.mark.full
async def test_a_worker_dies_in_mid_run(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """SIGKILL once the run's reference is on record: the next worker polls that run to its end, and
    the graph has run once."""
    thread = await langgraph.create_thread()
    first = await workers.start()
    recall = await promise(app, thread, "wait")
    await langgraph.until_run(thread)
    await eventually(db, "select 1 from session_recalls where run_reference is not null")
    await first.kill()
    second = await workers.start()
    await second.hears("lease.taken", recall=recall, worker_before=first.name)
    langgraph.open(thread)
    await second.hears("recall.settled", recall=recall, outcome="answered", attempt=1)
    assert await langgraph.runs(thread) == [(f"{recall}:1", "success")]
    assert len(langgraph.times(thread)) == 1


@pytest.mark.full
async def test_a_worker_dies_before_it_knows_the_run(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """SIGKILL while the server's answer is still on its way: the next worker finds the run by its
    key and does not post again."""
    thread = await langgraph.create_thread()
    async with Relay(langgraph.url, silent=True) as relay:
        first = await workers.start(run_url=relay.url)
        recall = await promise(app, thread, "wait")
        await relay.lost.wait()
        await langgraph.until_run(thread)
        await first.kill()
        second = await workers.start(run_url=relay.url)
        await second.hears("lease.taken", recall=recall, worker_before=first.name)
        await eventually(db, "select 1 from session_recalls where run_reference is not null")
        langgraph.open(thread)
        await second.hears("recall.settled", recall=recall, outcome="answered", attempt=2)
    assert await langgraph.runs(thread) == [(f"{recall}:1", "success")]
    assert len(langgraph.times(thread)) == 1
    assert [mark["outcome"] for mark in await calls(db, recall)] == ["unknown", "answered"]


@pytest.mark.full
@pytest.mark.parametrize("message", ["wait", "fail"])
async def test_an_answer_is_lost(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons, message: str
) -> None:
    """The connection breaks before the answer to the post: Unknown, and the next attempt finds the
    run, be it on or failed meanwhile."""
    thread = await langgraph.create_thread()
    async with Relay(langgraph.url, silent=False) as relay:
        daemon = await workers.start(run_url=relay.url, max_attempts=2)
        recall = await promise(app, thread, message)
        await daemon.hears("recall.settled", recall=recall, outcome="unknown", attempt=1)
        await langgraph.until_run(thread)
        langgraph.open(thread)
        await daemon.hears(
            "recall.settled",
            recall=recall,
            outcome="failed" if message == "fail" else "answered",
            attempt=2,
        )
    assert await langgraph.runs(thread) == [
        (f"{recall}:1", "error" if message == "fail" else "success")
    ]
    assert len(langgraph.times(thread)) == 1


@pytest.mark.full
async def test_a_recall_is_cancelled_in_mid_run(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """The application's cancel ends the run at the server, at once; nothing fires again."""
    thread = await langgraph.create_thread()
    daemon = await workers.start(lease=60)
    recall = await promise(app, thread, "wait")
    await langgraph.until_run(thread)
    await eventually(db, "select 1 from session_recalls where run_reference is not null")
    assert await app.cancel_session(thread) == 1
    await daemon.hears("recall.aborted", recall=recall, because="cancelled")
    await daemon.hears("recall.ended", recall=recall)
    assert await langgraph.runs(thread) == [(f"{recall}:1", "interrupted")]
    assert (await row(db, thread))["status"] == "cancelled"
    await langgraph.say(thread, "hello")
    await langgraph.until_run(thread, 2)
    assert langgraph.times(thread)[1]["text"] == "hello", "the thread is free"


@pytest.mark.full
async def test_a_run_takes_too_long(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """When RECALL_RUN_TIMEOUT passes the run is cancelled at the server; as it was accepted, it
    is not posted again."""
    thread = await langgraph.create_thread()
    daemon = await workers.start(run_timeout=3, max_attempts=2)
    recall = await promise(app, thread, "wait")
    await daemon.hears("recall.settled", recall=recall, outcome="unknown", attempt=1)
    assert await langgraph.runs(thread) == [(f"{recall}:1", "interrupted")]
    after = await row(db, thread)
    assert after["status"] == "failed" and "did not end in its time" in str(after["reason"])
    assert len(await langgraph.runs(thread)) == 1 and len(langgraph.times(thread)) == 1


@pytest.mark.full
@pytest.mark.parametrize(
    ("strategy", "outcome", "runs"),
    [
        ("interrupt", "failed", [(":1", "interrupted"), (None, "success"), (":1.1", "success")]),
        ("rollback", "unknown", [(None, "success")]),
    ],
    ids=["interrupt", "rollback"],
)
async def test_a_person_displaces_the_run(
    app: Application,
    db: Connection,
    langgraph: LangGraphServer,
    workers: Daemons,
    strategy: str,
    outcome: str,
    runs: list[tuple[str | None, str]],
) -> None:
    """A person whose message ends the recall's run comes first; then the recall runs under a new
    key. Where its run was deleted nobody knows what became of it: it is not posted again."""
    thread = await langgraph.create_thread()
    daemon = await workers.start()
    recall = await promise(app, thread, "wait")
    await langgraph.until_run(thread)
    await langgraph.say(thread, "me first", strategy)
    langgraph.open(thread)
    await daemon.hears("recall.settled", recall=recall, outcome=outcome)
    if outcome == "unknown":
        assert (await row(db, thread))["status"] == "failed"
        await langgraph.until_run(thread, 2)
    else:
        await daemon.hears("recall.settled", recall=recall, outcome="answered")
    await eventually_over(langgraph, thread)
    assert await langgraph.runs(thread) == [
        (f"{recall}{key}" if key else None, status) for key, status in runs
    ]
    last = "me first" if outcome == "unknown" else "[Scheduled recall] wait"
    assert (await langgraph.messages(thread))[-2:] == [last, f"done: {last}"]


@pytest.mark.full
async def test_the_server_restarts_in_mid_run(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """The server goes on with its runs after a restart, executing them anew; the worker polls
    through that and posts nothing again."""
    thread = await langgraph.create_thread()
    daemon = await workers.start()
    recall = await promise(app, thread, "wait")
    await langgraph.until_run(thread)
    await eventually(db, "select 1 from session_recalls where run_reference is not null")
    await asyncio.to_thread(langgraph.stop)
    await asyncio.to_thread(langgraph.start)
    langgraph.open(thread)
    await daemon.hears("recall.settled", recall=recall, outcome="answered", attempt=1)
    assert await langgraph.runs(thread) == [(f"{recall}:1", "success")]
    assert (await langgraph.messages(thread)).count("[Scheduled recall] wait") == 1
    assert (await row(db, thread))["status"] == "fired"


@pytest.mark.full
async def test_two_workers_and_many_threads(
    app: Application, db: Connection, langgraph: LangGraphServer, workers: Daemons
) -> None:
    """Two workers share twelve threads: each recall is one run."""
    threads = [await langgraph.create_thread() for _ in range(12)]
    for _ in range(2):
        await workers.start(concurrency=6)
    recalls = {thread: await promise(app, thread, "hello") for thread in threads}
    await eventually(
        db, "select 1 from session_recalls having bool_and(status = 'fired')", within=60
    )
    marks = await (
        await db.execute(
            "select outcome, settled, count(*) as calls from recall_attempts group by 1, 2"
        )
    ).fetchall()
    assert marks == [{"outcome": "answered", "settled": "fired", "calls": len(threads)}]
    for thread, recall in recalls.items():
        assert (
            await langgraph.runs(thread) == [(f"{recall}:1", "success")]
            and len(langgraph.times(thread)) == 1
        )

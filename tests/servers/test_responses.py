"""The protocol of the Responses API: what each answer means, against an impostor on a raw socket;
then with a real server, through the real daemon."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from multidict import CIMultiDict

from recall_worker.protocols import Call, create
from recall_worker.protocols.credentials import Credentials
from recall_worker.protocols.http import Answer
from recall_worker.protocols.outcomes import WAITS_FOR_A_PERSON, members
from recall_worker.protocols.polling import StillOn
from recall_worker.protocols.responses import (
    Responses,
    body,
    error_code,
    id_of,
    may_have_arrived,
    polled,
    taken,
)
from recall_worker.recall import (
    Accepted,
    Answered,
    Busy,
    Failed,
    Gone,
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
from .responses_server import ResponsesServer

pytestmark = pytest.mark.timeout(900)  # The first test with the real server may have to install it.

CLAIM = claim_with(session_id="s1")
OURS, THEIRS = id_of(CLAIM), "resp_1"
POST = "POST /v1/responses"
OUR_POLL, POLL = f"GET /v1/responses/{OURS}", f"GET /v1/responses/{THEIRS}"
CANCEL = f"POST /v1/responses/{THEIRS}/cancel"
HANGS_UP = Raw()


def response(status: Any, id: str = OURS, **more: Any) -> Raw:
    return reply(200, {"id": id, "object": "response", "status": status} | more)


def error(status: int, code: str | None, headers: dict[str, str] | None = None) -> Raw:
    return reply(status, {"error": {"code": code, "message": "no\n thing", "type": "x"}}, headers)


NO_RESPONSE = error(404, "invalid_request_error")


@asynccontextmanager
async def impostor(answers: Answers, **environ: str) -> AsyncIterator[tuple[Responses, Impostor]]:
    """The protocol, and the server that it speaks to."""
    async with Impostor(answers) as server:
        environ = {"RECALL_RUN_URL": server.url, "RECALL_PROTOCOL": "responses"} | environ
        settings = read(environ)
        protocol = create(settings, Credentials(settings, Secrets(settings, environ)))
        assert isinstance(protocol, Responses)
        try:
            yield protocol, server
        finally:
            await protocol.close()


# --- what is sent ---------------------------------------------------------------------------------


def test_body() -> None:
    """The body holds the conversation, the message, the key and what else the contract tells as
    metadata, all of it texts, and nothing else."""
    when = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
    claim = claim_with(
        session_id="s1", occurrence=7, rekey=1, scheduled_for=when, missed=2, message="read it"
    )
    expected = {
        "background": True,
        "store": True,
        "stream": False,
        "conversation": "s1",
        "input": "[Scheduled recall] read it",
        "metadata": {
            "recall_key": "r1:7.1",
            "recall_id": "r1",
            "recall_call_type": "once",
            "recall_occurrence": "7",
            "recall_scheduled_for": "2026-03-01T12:30:00.000000Z",
            "recall_missed": "2",
        },
    }
    assert json.loads(body(claim, None)) == expected
    assert json.loads(body(claim, "gpt")) == expected | {"model": "gpt"}


def test_metadata_that_no_server_takes() -> None:
    """A value of more than 512 characters would have the whole request refused: it is left out."""
    found = json.loads(body(claim_with(id="x" * 600), None))["metadata"]
    assert "recall_id" not in found and "recall_key" not in found and "recall_missed" in found


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
def test_the_request_stays_the_same_under_one_key(changes: dict[str, Any]) -> None:
    """Nothing that changes between two calls of an occurrence is in the body or in the id."""
    assert body(claim_with(**changes), "m") == body(claim_with(), "m")
    assert id_of(claim_with(**changes)) == id_of(claim_with())


@given(st.text(max_size=30), st.text(max_size=30), st.integers(0, 3))
@examples(deadline=None)
def test_ids(session: str, recall: str, rekey: int) -> None:
    """An id has the form that the server takes, and is another one in another session, and under
    another key."""
    claim = claim_with(session_id=session, id=recall, rekey=rekey)
    assert re.fullmatch(r"caresp_[0-9a-f]{16}00[0-9a-f]{32}", id_of(claim))
    assert id_of(claim) != id_of(claim._replace(session_id=session + "x"))
    assert id_of(claim) != id_of(claim._replace(rekey=rekey + 1))


async def test_the_request() -> None:
    """The response is posted once, with the contract's headers, the id, the token, and a signature
    where there is a secret."""
    async with impostor(
        {POST: response("queued")}, RECALL_RUN_TOKEN="t", RECALL_SIGNING_SECRET="s"
    ) as (protocol, server):
        call = Call(CLAIM, asked_at=0.0)
        assert await protocol.call(call) == Accepted(OURS, 200)
    (asked,) = server.asked
    assert asked.line == "POST /v1/responses HTTP/1.1" and asked.body == body(CLAIM, None)
    assert call.sent_at is not None
    expected = {
        "idempotency-key": "r1:1",
        "x-agent-response-id": OURS,
        "authorization": "Bearer t",
        "content-type": "application/json",
        "webhook-id": "r1:1",
    }
    assert {name: asked.headers[name] for name in expected} == expected
    assert {"traceparent", "recall-lateness", "webhook-signature"} <= set(asked.headers)


@pytest.mark.parametrize("base", ["", "/", "/v1", "/v1/", "/openai", "/openai/", "/openai/v1"])
async def test_the_base_may_be_a_path(base: str) -> None:
    """RECALL_RUN_URL is the server's base, whether it ends in a slash, or in /v1, or not."""
    where = f"POST {base.rstrip('/').removesuffix('/v1')}/v1/responses"
    async with Impostor({where: response("queued")}) as server:
        protocol = Responses(
            read({"RECALL_RUN_URL": server.url + base, "RECALL_RESPONSES_MODEL": "m"})
        )
        assert await protocol.call(Call(CLAIM, 0.0)) == Accepted(OURS, 200)
        await protocol.close()
    assert server.what == [where] and json.loads(server.asked[0].body)["model"] == "m"


# --- what the answer to a post means --------------------------------------------------------------

FILLING = "x" * (1 << 20)
STREAM = {"content-type": "text/event-stream"}
GATEWAY = reply(502, text=b"<h1>away</h1>", headers={"retry-after": "0"})

POSTED: list[tuple[str, Raw, Outcome | type[Outcome], str]] = [
    ("queued", response("queued"), Accepted(OURS, 200), ""),
    ("in progress", response("in_progress"), Accepted(OURS, 200), ""),
    ("under another id", response("queued", THEIRS), Accepted(THEIRS, 200), ""),
    ("a word of tomorrow", response("dreaming"), Accepted(OURS, 200), ""),
    (
        "created",
        reply(201, {"id": THEIRS, "status": "queued"}, {"retry-after": "7"}),
        Accepted(THEIRS, 201, 7.0),
        "",
    ),
    (
        "accepted, at once",
        reply(202, {"id": THEIRS, "status": "queued"}, {"retry-after": "0"}),
        Accepted(THEIRS, 202, 1.0),
        "",
    ),
    ("knows no background", response("completed"), Answered(200), ""),
    ("asks a person", response("requires_action"), Answered(200, WAITS_FOR_A_PERSON), ""),
    (
        "wants a function called",
        response("completed", output=[{"type": "message"}, {"type": "function_call"}]),
        Answered,
        "",
    ),
    (
        "failed",
        response("failed", error={"code": "c", "message": "no\n model"}),
        Failed,
        "no model",
    ),
    ("failed, in short", response("failed", error={"code": "rate"}), Failed, "failed: rate"),
    (
        "incomplete",
        response("incomplete", incomplete_details={"reason": "max_output_tokens"}),
        Failed,
        "incomplete: max_output_tokens",
    ),
    ("cancelled", response("cancelled"), Failed, "ended as cancelled"),
    (
        "large, its status at the beginning",
        response("queued", output=FILLING),
        Accepted(OURS, 200),
        "",
    ),
    (
        "large, its status at the end",
        reply(200, {"id": OURS, "output": [FILLING], "status": "completed"}),
        Answered(200),
        "",
    ),
    ("large, and nothing to see", reply(200, {"x": FILLING}), Unknown, "1 MiB"),
    (
        "streams",
        reply(
            200,
            text=b'event: response.completed\ndata: {"type": "response.completed"}\n\n',
            headers=STREAM,
        ),
        Answered(200),
        "",
    ),
    (
        "streams a failure",
        reply(200, text=b'data: {"type": "response.failed"}\n\ndata: [DONE]\n\n', headers=STREAM),
        Failed,
        "stream",
    ),
    ("no response", reply(200, {"ok": True}), Misconfigured, "not as the Responses API"),
    ("no status", reply(200, {"id": OURS}), Misconfigured, "not as the Responses API"),
    ("a strange id", response("queued", "../x"), Misconfigured, "not as the Responses API"),
    ("nothing in it", reply(204, text=b""), Misconfigured, "not as the Responses API"),
    (
        "a page of the web",
        reply(200, text=b"<!doctype html>", headers={"content-type": "text/html"}),
        Misconfigured,
        "web page",
    ),
    ("broken JSON", reply(200, text=b'{"id": '), Unknown, "none"),
    ("busy", error(409, "conversation_locked"), Busy(409), ""),
    (
        "busy, and says when",
        error(409, "conversation_locked", {"retry-after": "7"}),
        Busy(409, 7.0),
        "",
    ),
    ("busy, as OpenAI says it", error(400, "conversation_locked"), Busy(400), ""),
    ("busy, as Letta says it", reply(409, {"detail": "busy"}), Busy(409), ""),
    ("another 400", error(400, "invalid_request"), Refused, "no thing"),
    ("no conversation", error(404, "conversation_not_found"), Gone(404), ""),
    ("no session", error(404, "session_not_found"), Gone(404), ""),
    ("no conversation, without a code", error(404, None), Misconfigured, "no thing"),
    ("no conversation, another code", error(404, "invalid_request_error"), Misconfigured, "404"),
    ("another server", NO_ROUTE, Misconfigured, "RECALL_RUN_URL"),
    ("the token", reply(401), Misconfigured, "RECALL_RUN_TOKEN"),
    (
        "moved",
        reply(307, headers={"location": "https://elsewhere/"}),
        Misconfigured,
        "elsewhere",
    ),
    ("too many", reply(429, headers={"retry-after": "7"}), Unavailable, "429"),
    ("stops", error(503, "service_unavailable"), Unavailable, "503"),
    ("too large", reply(413), Refused, "413"),
    ("broken", error(500, "server_error"), Unknown, "no thing"),
    (
        "a gateway without its server",
        GATEWAY,
        Unknown("a gateway answers for a server that is away (HTTP 502)", 502, 1.0, True),
        "",
    ),
    ("hangs up", HANGS_UP, Unknown, "after the request was sent"),
]


@pytest.mark.parametrize(
    ("answer", "expected", "said"),
    [case[1:] for case in POSTED],
    ids=[case[0] for case in POSTED],
)
async def test_what_a_post_is_answered(
    answer: Raw, expected: Outcome | type[Outcome], said: str
) -> None:
    """Each answer is the outcome that the contract asks for; it is posted once."""
    async with impostor({POST: answer}) as (protocol, server):
        outcome = await protocol.call(Call(CLAIM, 0.0))
    assert type(outcome) is expected if isinstance(expected, type) else outcome == expected
    assert said in (reason_of(outcome) or "")
    assert server.what == [POST]


async def test_silence() -> None:
    """A server that takes the post and says nothing within RECALL_RUN_TIMEOUT may have run it."""
    async with impostor({POST: lambda _: None}, RECALL_RUN_TIMEOUT="0.3") as (protocol, server):
        assert isinstance(await protocol.call(Call(CLAIM, 0.0)), Unknown)
    assert server.what == [POST]


async def test_nobody_there() -> None:
    """Without a connection nothing was sent: a post and a question are both Unavailable, and a
    response's poll goes on until its time is up."""
    async with impostor({}) as (protocol, server):
        await server.__aexit__()
        call = Call(CLAIM, 0.0)
        assert isinstance(await protocol.call(call), Unavailable) and call.sent_at is None
        assert isinstance(await protocol.find(CLAIM), Unavailable)
        outcome = await protocol.follow(CLAIM, OURS, 1.0)
        assert isinstance(outcome, Unknown) and "no connection" in outcome.reason


# --- whether a run is there already ---------------------------------------------------------------

LOST = CLAIM._replace(begun_age=9.0, attempt=2, last_outcome="unknown")

FOUND: list[tuple[str, Raw, Outcome | type[Outcome] | None]] = [
    ("there", response("in_progress"), Accepted(OURS, 200)),
    ("there, and failed", response("failed"), Accepted(OURS, 200)),
    ("there, and large", response("completed", output=FILLING), Accepted(OURS, 200)),
    ("not there, and nobody knows", NO_RESPONSE, Unknown),
    ("no id of theirs", error(400, "invalid_parameters"), Unknown),
    ("another response", response("completed", THEIRS), Misconfigured),
    ("no response", reply(200, {"ok": True}), Misconfigured),
    ("nothing", reply(204, text=b""), Misconfigured),
    ("token", reply(401), Misconfigured),
    ("moved", reply(302, headers={"location": "/login"}), Misconfigured),
    ("broken", reply(500), Unavailable),
    (
        "gateway",
        GATEWAY,
        Unavailable("whether the run is there already could not be asked (HTTP 502)", 502, 1.0),
    ),
    ("later", reply(503, headers={"retry-after": "7"}), Unavailable),
    ("unasked for", reply(422), Unavailable),
    ("hangs up", HANGS_UP, Unavailable),
]


@pytest.mark.parametrize(
    ("answer", "expected"), [case[1:] for case in FOUND], ids=[case[0] for case in FOUND]
)
async def test_find(answer: Raw, expected: Outcome | type[Outcome] | None) -> None:
    """The response under our id is found, in whatever state; that it is not there is believed only
    of a server that is known to take our ids."""
    async with impostor({OUR_POLL: answer}) as (protocol, server):
        outcome = await protocol.find(LOST)
    assert type(outcome) is expected if isinstance(expected, type) else outcome == expected
    assert set(server.what) == {OUR_POLL}, "nothing is posted"


@pytest.mark.parametrize("shown", ["by an answer", "by a poll", "by a find"])
async def test_a_server_that_takes_our_ids(shown: str) -> None:
    """Once a server has shown a response under an id of ours, its 404 is an answer: it may be
    posted again."""
    other = CLAIM._replace(id="another")
    theirs = response("completed", id_of(other))
    answers: Answers = {
        POST: theirs,
        f"GET /v1/responses/{id_of(other)}": theirs,
        OUR_POLL: NO_RESPONSE,
    }
    async with impostor(answers) as (protocol, _):
        assert isinstance(await protocol.find(LOST), Unknown)
        match shown:
            case "by an answer":
                await protocol.call(Call(other, 0.0))
            case "by a poll":
                await protocol.follow(other, id_of(other), 5)
            case _:
                await protocol.find(other)
        assert await protocol.find(LOST) is None


@pytest.mark.parametrize(
    ("changes", "arrived"),
    [
        ({"begun_age": 9.0, "deferrals": 4, "last_outcome": "busy"}, False),
        ({"begun_age": 9.0, "attempt": 2, "last_outcome": "failed", "rekey": 1}, False),
        ({"begun_age": 9.0, "attempt": 2, "last_outcome": "unknown"}, True),
        ({"begun_age": 9.0, "attempt": 2, "last_outcome": "unavailable"}, True),
        ({"begun_age": 9.0, "uncounted": 1, "last_outcome": "unknown"}, True),
        ({"taken_from": "w1"}, True),
        ({"taken_from": "w1", "attempt": 2, "last_outcome": "failed"}, True),
    ],
    ids=repr,
)
async def test_what_a_server_that_ignores_our_ids_is_sent(
    changes: dict[str, Any], arrived: bool
) -> None:
    """Without our ids a second post is made only where the earlier calls can't have left a run
    behind: in doubt, the recall stops at Unknown."""
    claim = CLAIM._replace(**changes)
    assert may_have_arrived(claim) is arrived
    poll = f"GET /v1/responses/{id_of(claim)}"
    async with impostor({POST: response("completed", THEIRS), poll: NO_RESPONSE}) as (
        protocol,
        server,
    ):
        assert await protocol.call(Call(claim, 0.0)) == Answered(200), "a response of their own id"
        found = await protocol.find(claim)
    assert isinstance(found, Unknown) if arrived else found is None
    assert server.what == [POST, poll]


# --- how a run goes on ----------------------------------------------------------------------------

FOLLOWED: list[tuple[str, Any, type[Outcome], str]] = [
    ("completed", response("completed", THEIRS), Answered, ""),
    (
        "waits and runs",
        [response(word, THEIRS) for word in ("queued", "in_progress", "completed")],
        Answered,
        "",
    ),
    (
        "trouble on the way",
        [HANGS_UP, reply(500), reply(401), reply(429), response("completed", THEIRS)],
        Answered,
        "",
    ),
    (
        "words unheard of",
        [response("dreaming"), response(7), reply(200, []), response("completed", THEIRS)],
        Answered,
        "",
    ),
    (
        "large, its status at the end",
        reply(200, {"id": THEIRS, "output": [{"status": FILLING}], "status": "failed"}),
        Failed,
        "ended as failed",
    ),
    (
        "large, and going on",
        [
            reply(200, {"id": THEIRS, "output": [FILLING], "status": "in_progress"}),
            response("completed", THEIRS),
        ],
        Answered,
        "",
    ),
    ("asks a person", response("requires_action", THEIRS), Answered, ""),
    ("failed", response("failed", THEIRS, error={"message": "no model"}), Failed, "no model"),
    ("cancelled", response("cancelled", THEIRS), Failed, "cancelled"),
    ("incomplete", response("incomplete", THEIRS), Failed, "incomplete"),
    ("forgotten", NO_RESPONSE, Unknown, "no longer knows"),
]


@pytest.mark.parametrize(
    ("answers", "kind", "said"), [case[1:] for case in FOLLOWED], ids=[case[0] for case in FOLLOWED]
)
async def test_follow(
    answers: Any, kind: type[Outcome], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response is polled until its status is final, whatever happens on the way."""
    monkeypatch.setattr("recall_worker.protocols.polling.FIRST", 0.01)
    async with impostor({POLL: answers}) as (protocol, server):
        outcome = await protocol.follow(CLAIM, THEIRS, 20)
    assert type(outcome) is kind and said in (reason_of(outcome) or "")
    assert set(server.what) == {POLL}, "nothing is posted, and nothing cancelled"


async def test_a_runs_time_is_up() -> None:
    """A response that doesn't end in its time is Unknown, without an HTTP status: the worker then
    cancels it."""
    async with impostor({POLL: response("in_progress", THEIRS)}) as (protocol, _):
        outcome = await protocol.follow(CLAIM, THEIRS, 0.1)
    assert isinstance(outcome, Unknown) and outcome.http_status is None


@pytest.mark.parametrize(
    "reference", ["", "..", "a/b", "a?b", "http://elsewhere/", "a b", "x" * 201, "é", "a\n"]
)
async def test_a_reference_that_is_none(reference: str) -> None:
    """What a row holds as a reference is hostile: one that no server could have given leads
    nowhere."""
    async with impostor({}) as (protocol, server):
        assert isinstance(await protocol.follow(CLAIM, reference, 5), Unknown)
        await protocol.abort(CLAIM, reference)
    assert server.asked == []


@pytest.mark.parametrize(
    "answer", [response("cancelled", THEIRS), error(400, "invalid_request_error"), HANGS_UP]
)
async def test_abort(answer: Raw) -> None:
    """A response is cancelled once, whatever comes of it."""
    async with impostor({CANCEL: answer}) as (protocol, server):
        await protocol.abort(CLAIM, THEIRS)
    assert server.what == [CANCEL] and server.asked[0].body == b""


async def test_credentials_of_every_request(tmp_path: Path) -> None:
    """A token that was replaced in its file is read again where it is refused, and the request made
    once more; further headers go with all of them."""
    file = tmp_path / "token"

    def guarded(answer: Raw) -> Callable[[Asked], Raw]:
        def by_token(asked: Asked) -> Raw:
            if asked.headers["authorization"] == "Bearer token-2":
                return answer
            file.write_text("token-2")
            return reply(401)

        return by_token

    answers: Answers = {
        POST: guarded(response("queued")),
        OUR_POLL: guarded(response("completed")),
        POLL: guarded(response("completed", THEIRS)),
        CANCEL: guarded(response("cancelled", THEIRS)),
    }
    requests: list[tuple[str, Callable[[Responses], Any]]] = [
        (POST, lambda protocol: protocol.call(Call(CLAIM, 0.0))),
        (OUR_POLL, lambda protocol: protocol.find(CLAIM)),
        (POLL, lambda protocol: protocol.follow(CLAIM, THEIRS, 5)),
        (CANCEL, lambda protocol: protocol.abort(CLAIM, THEIRS)),
    ]
    for what, request in requests:
        file.write_text("token-1")
        async with impostor(
            answers, RECALL_RUN_TOKEN_FILE=str(file), RECALL_RUN_HEADERS="x-team: blue"
        ) as (protocol, server):
            await request(protocol)
        assert server.what == [what, what]
        assert {a.headers["x-team"] for a in server.asked} == {"blue"}


async def test_a_token_that_stays_refused() -> None:
    """A token that nobody replaced is refused once, and the call is not made again."""
    async with impostor({POST: reply(401)}, RECALL_RUN_TOKEN="t") as (protocol, server):
        assert isinstance(await protocol.call(Call(CLAIM, 0.0)), Misconfigured)
    assert server.what == [POST]


# --- large answers --------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(["status", "id", "output", "error", "code", "type", "detail"]), inner
        )
    ),
    max_leaves=9,
)


@given(JSON_VALUES, st.integers(0, 400), st.sampled_from([200, 202, 400, 404, 409, 500]))
@examples(deadline=None)
def test_any_answer_can_be_read(document: Any, cut: int, status: int) -> None:
    """Whatever JSON a server gives, and wherever it breaks off, reading it gives an outcome, and
    nothing but a success or a poll's word says that a run is on or over."""
    text = json.dumps(document).encode()
    for answer in (
        Answer(status, CIMultiDict(), text, False),
        Answer(status, CIMultiDict(), text[:cut], True, text[-40:]),
    ):
        outcome = taken(answer)
        assert status < 300 or not isinstance(outcome, Accepted | Answered | Failed)
        if isinstance(outcome, Accepted):
            assert re.fullmatch(r"[0-9A-Za-z_-]+", outcome.reference)
        assert isinstance(polled(answer), StillOn | Answered | Failed | Unknown)
        error_code(answer)


TRICKS = st.sampled_from(['"', "\\", '\\"', "},{", "[", '{"a": "b"}'])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.text(max_size=9) | TRICKS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=5) | TRICKS, ANYTHING, max_size=6)


@pytest.mark.slow
@given(OBJECTS, st.integers(0, 80), st.integers(0, 300))
@examples(deadline=None)
def test_what_is_left_of_a_large_answer(document: dict[str, Any], head: int, tail: int) -> None:
    """Of an object of which only the beginning and the end were kept, the members that came whole
    are as they were sent, and its last one is among them where it is in what was kept."""
    text = json.dumps(document).encode()
    answer = Answer(200, CIMultiDict(), text[:head], True, text[max(0, len(text) - tail) :])
    found = members(answer)
    if head == 0:
        assert found is None
        return
    assert found is not None
    # What the beginning broke off in may look whole; there are no numbers here that could.
    assert all(name in document and document[name] == value for name, value in found.items())
    for name in list(document)[-1:]:
        last = f"{json.dumps(name)}: {json.dumps(document[name])}"
        if tail > len(last) + 2:
            assert found[name] == document[name]


# --- a real server, through the real daemon -------------------------------------------------------


@pytest.fixture(scope="module")
def responses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ResponsesServer]:
    """The server, started once for all tests of this file."""
    server = ResponsesServer(tmp_path_factory.mktemp("responses"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def workers(database: str, responses: ResponsesServer) -> AsyncIterator[Daemons]:
    """Starts daemons that speak to the server; whatever still runs at the end is killed."""
    environ = {
        "RECALL_DSN": database,
        "RECALL_RUN_URL": responses.url,
        "RECALL_PROTOCOL": "responses",
        "RECALL_BUSY_DELAY": "0.2",
        "RECALL_LEASE": "2",
    }
    async with Daemons(environ) as started:
        yield started


async def promise(app: Application, message: str, interval: int | None = None) -> tuple[str, str]:
    """A recall of a session of its own that is due now; the session, and its id."""
    session = f"chat-{uuid4()}"
    await app.create_session(session, "ann")
    kind = "recurring" if interval else "once"
    return session, await app.schedule(session, kind, soon(0), message, interval)


ACCEPTED = "select 1 from session_recalls where run_reference is not null"


@pytest.mark.full
async def test_a_recall_runs_once(
    app: Application, db: Connection, responses: ResponsesServer, workers: Daemons
) -> None:
    """A due recall is one response in the conversation, under the id that we made; the agent finds
    the recall in its metadata; both times are on record."""
    daemon = await workers.start(responses_model="gpt-none")
    session, recall = await promise(app, "look at the build")
    await daemon.hears("recall.settled", recall=recall, outcome="answered")
    (once,) = responses.times(session)
    assert once["text"] == "[Scheduled recall] look at the build" and once["model"] == "gpt-none"
    assert once["recall"]["recall_key"] == f"{recall}:1"
    assert once["response"] == id_of(claim_with(session_id=session, id=recall))
    assert (await row(db, session))["status"] == "fired"
    (mark,) = await calls(db, recall)
    assert mark["called_at"] <= mark["delivered_at"] < mark["completed_at"]


@pytest.mark.full
async def test_a_long_answer(
    app: Application, responses: ResponsesServer, workers: Daemons
) -> None:
    """The server writes what the agent said before the status: of an answer that is longer than
    what is kept, the end tells."""
    daemon = await workers.start()
    session, recall = await promise(app, "long")
    await daemon.hears("recall.settled", recall=recall, outcome="answered", attempt=1)
    assert len(responses.times(session)) == 1


@pytest.mark.full
async def test_a_recurring_recall(
    app: Application, responses: ResponsesServer, workers: Daemons
) -> None:
    """Each occurrence is a response of its own, one after the other, in one conversation."""
    daemon = await workers.start()
    session, recall = await promise(app, "again", interval=1)
    await daemon.hears("recall.settled", recall=recall, times=2)
    keys = [time["recall"]["recall_key"] for time in responses.times(session)]
    assert keys[:2] == [f"{recall}:1", f"{recall}:2"]


@pytest.mark.full
async def test_a_busy_conversation(
    app: Application, db: Connection, responses: ResponsesServer, workers: Daemons
) -> None:
    """While somebody's response goes on in the conversation its recall is deferred, again and
    again, and does that response no harm; afterwards it runs, once."""
    session = f"chat-{uuid4()}"
    theirs = (await responses.say(session, "wait")).json()["id"]
    await responses.until_run(session)
    daemon = await workers.start()
    await app.create_session(session, "ann")
    recall = await app.schedule(session, "once", soon(0), "after that", None)
    await daemon.hears("recall.settled", recall=recall, outcome="busy", times=3)
    assert len(responses.times(session)) == 1 and await responses.status(theirs) == "in_progress"
    responses.open(session)
    await daemon.hears("recall.settled", recall=recall, outcome="answered")
    assert await responses.status(theirs) == "completed" and len(responses.times(session)) == 2
    answered, busy = await calls(db, recall)
    assert (answered["attempt"], busy["outcome"]) == (1, "busy") and busy["calls"] >= 3


@pytest.mark.full
async def test_a_failing_agent(
    app: Application, db: Connection, responses: ResponsesServer, workers: Daemons
) -> None:
    """An agent that raises is Failed, run again under a new key, and then failed for good."""
    daemon = await workers.start(max_attempts=2)
    session, recall = await promise(app, "fail")
    await daemon.hears("recall.settled", recall=recall, outcome="failed", times=2)
    after = await row(db, session)
    assert after["status"] == "failed" and "ended as failed" in str(after["reason"])
    keys = [time["recall"]["recall_key"] for time in responses.times(session)]
    assert keys == [f"{recall}:1", f"{recall}:1.1"]


@pytest.mark.full
async def test_another_server_at_the_address(
    app: Application, db: Connection, responses: ResponsesServer, workers: Daemons
) -> None:
    """An address at which everything is 404 cancels nothing."""
    daemon = await workers.start(run_url=f"{responses.url}/nothing/here")
    session, recall = await promise(app, "hello")
    await daemon.hears("recall.settled", recall=recall, outcome="misconfigured")
    assert (await row(db, session))["status"] == "pending"


@pytest.mark.full
async def test_a_worker_dies_in_mid_run(
    app: Application, db: Connection, responses: ResponsesServer, workers: Daemons
) -> None:
    """SIGKILL once the reference is on record: the next worker polls that response to its end, and
    nothing is posted."""
    first = await workers.start()
    session, recall = await promise(app, "wait")
    await responses.until_run(session)
    await eventually(db, ACCEPTED)
    await first.kill()
    second = await workers.start()
    await second.hears("lease.taken", recall=recall, worker_before=first.name)
    responses.open(session)
    await second.hears("recall.settled", recall=recall, outcome="answered", attempt=1)
    assert len(responses.times(session)) == 1


@pytest.mark.full
async def test_a_worker_dies_before_it_knows_the_run(
    app: Application, db: Connection, responses: ResponsesServer, workers: Daemons
) -> None:
    """SIGKILL while the server's answer is still on its way: the next worker finds the response
    under the id that we made, and does not post again."""
    async with Relay(responses.url, silent=True, path="/v1/responses") as relay:
        first = await workers.start(run_url=relay.url)
        session, recall = await promise(app, "wait")
        await relay.lost.wait()
        await responses.until_run(session)
        await first.kill()
        second = await workers.start(run_url=relay.url)
        await second.hears("lease.taken", recall=recall, worker_before=first.name)
        await eventually(db, ACCEPTED)
        responses.open(session)
        await second.hears("recall.settled", recall=recall, outcome="answered", attempt=2)
    assert len(responses.times(session)) == 1
    assert [mark["outcome"] for mark in await calls(db, recall)] == ["unknown", "answered"]


@pytest.mark.full
@pytest.mark.parametrize("message", ["wait", "fail"])
async def test_an_answer_is_lost(
    app: Application, responses: ResponsesServer, workers: Daemons, message: str
) -> None:
    """The connection breaks before the answer to the post: Unknown, and the next attempt finds the
    response, be it on or failed meanwhile."""
    async with Relay(responses.url, silent=False, path="/v1/responses") as relay:
        daemon = await workers.start(run_url=relay.url, max_attempts=2)
        session, recall = await promise(app, message)
        await daemon.hears("recall.settled", recall=recall, outcome="unknown", attempt=1)
        await responses.until_run(session)
        responses.open(session)
        outcome = "failed" if message == "fail" else "answered"
        await daemon.hears("recall.settled", recall=recall, outcome=outcome, attempt=2)
    assert len(responses.times(session)) == 1


@pytest.mark.full
async def test_a_recall_is_cancelled_in_mid_run(
    app: Application, db: Connection, responses: ResponsesServer, workers: Daemons
) -> None:
    """The application's cancel ends the response at the server, at once; nothing fires again."""
    daemon = await workers.start(lease=60)
    session, recall = await promise(app, "wait")
    await responses.until_run(session)
    await eventually(db, ACCEPTED)
    assert await app.cancel_session(session) == 1
    await daemon.hears("recall.aborted", recall=recall, because="cancelled")
    await daemon.hears("recall.ended", recall=recall)
    assert await responses.status(responses.times(session)[0]["response"]) == "cancelled"
    assert (await row(db, session))["status"] == "cancelled"
    assert (await responses.say(session, "hello")).is_success, "the conversation is free"


@pytest.mark.full
async def test_a_run_takes_too_long(
    app: Application, db: Connection, responses: ResponsesServer, workers: Daemons
) -> None:
    """When RECALL_RUN_TIMEOUT passes the response is cancelled at the server; as it was accepted,
    it is not posted again."""
    daemon = await workers.start(run_timeout=3)
    session, recall = await promise(app, "wait")
    await daemon.hears("recall.settled", recall=recall, outcome="unknown", attempt=1)
    assert await responses.status(responses.times(session)[0]["response"]) == "cancelled"
    assert (await row(db, session))["status"] == "failed" and len(responses.times(session)) == 1


@pytest.mark.full
@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_the_server_restarts_in_mid_run(
    app: Application, db: Connection, responses: ResponsesServer, workers: Daemons, how: str
) -> None:
    """The server runs its agent again after a restart, as the same response; the worker polls
    through that and posts nothing."""
    daemon = await workers.start()
    session, recall = await promise(app, "wait")
    await responses.until_run(session)
    await eventually(db, ACCEPTED)
    await asyncio.to_thread(responses.stop if how == "stopped" else responses.kill)
    await asyncio.to_thread(responses.start)
    await responses.until_run(session, 2)
    responses.open(session)
    await daemon.hears("recall.settled", recall=recall, outcome="answered", attempt=1)
    assert [time["again"] for time in responses.times(session)] == [False, True]
    assert len({time["response"] for time in responses.times(session)}) == 1
    assert (await row(db, session))["status"] == "fired"


@pytest.mark.full
async def test_what_the_server_ignores(responses: ResponsesServer) -> None:
    """Why a response is looked for before it is posted again: under the same key and id it is run
    again, once it has ended."""
    session = f"chat-{uuid4()}"
    for times in (1, 2):
        async with impostor({}) as (protocol, _):
            protocol._base = f"{responses.url}/v1/responses"
            outcome = await protocol.call(Call(CLAIM._replace(session_id=session), 0.0))
            assert isinstance(outcome, Accepted)
            await protocol.follow(CLAIM, outcome.reference, 20)
        assert len(responses.times(session)) == times

"""Agno's protocol: what each answer means, against a relay that plays the server; then with the
real server, through the real daemon."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from recall_worker.protocols import Call, create
from recall_worker.protocols import agno as agno_protocol
from recall_worker.protocols.agno import KEYS_KEPT, Agno, body, listed, members, place, polled, read
from recall_worker.protocols.credentials import Credentials
from recall_worker.protocols.http import LIMIT, Answer
from recall_worker.protocols.outcomes import WAITS_FOR_A_PERSON
from recall_worker.protocols.polling import StillOn
from recall_worker.recall import (
    Accepted,
    Answered,
    Claim,
    Failed,
    Misconfigured,
    Outcome,
    Refused,
    Unavailable,
    Unknown,
    reason_of,
)
from recall_worker.secret_files import Secrets
from recall_worker.settings import SettingsError
from recall_worker.settings import read as read_settings

from ..conftest import Connection
from ..process.test_corridor import row
from ..process.test_lease import calls, eventually, promise
from ..support import postgres
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, Raw, reply
from ..test_recall import claim_with
from .agno_server import AgnoServer, Asked, Relay

pytestmark = pytest.mark.timeout(900)  # The first test with the real server may have to install it.

# --- what is sent ---------------------------------------------------------------------------------


def test_the_agent_has_to_be_named() -> None:
    """RECALL_PROTOCOL=agno without an agent is a problem of its own, told beside all others; with
    one it is none."""
    with pytest.raises(SettingsError) as caught:
        read_settings({"RECALL_PROTOCOL": "agno", "RECALL_LEASE": "0"})
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "RECALL_LEASE",
        "RECALL_PROTOCOL",
    ]
    assert "RECALL_AGNO_AGENT" in caught.value.problems[1]
    assert (
        read_settings({"RECALL_PROTOCOL": "agno", "RECALL_AGNO_AGENT": "helper"}).agno_agent
        == "helper"
    )


def form_of(content: bytes) -> dict[str, str]:
    return {
        name: value
        for name, [value] in parse_qs(content.decode("ascii"), strict_parsing=True).items()
    }


def test_body() -> None:
    """The form asks for a background run of one message; what else the contract tells is the run's
    metadata."""
    when = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
    claim = claim_with(
        call_type="recurring",
        interval=60,
        occurrence=7,
        rekey=1,
        scheduled_for=when,
        missed=2,
        message="read it\n&",
    )
    form = form_of(body(claim, None))
    assert json.loads(form.pop("metadata")) == {
        "recall_key": "r1:7.1",
        "recall_id": "r1",
        "recall_call_type": "recurring",
        "recall_occurrence": 7,
        "recall_scheduled_for": "2026-03-01T12:30:00.000000Z",
        "recall_missed": 2,
    }
    assert form == {
        "message": "[Scheduled recall] read it\n&",
        "stream": "false",
        "background": "true",
        "session_id": "s1",
    }
    assert form_of(body(claim, "ann & bob"))["user_id"] == "ann & bob"


@pytest.mark.parametrize(
    "changes",
    [{"attempt": 3}, {"deferrals": 9}, {"begun_age": 99.0}, {"lateness": 5.0}, {"interval": 9}],
    ids=repr,
)
def test_the_body_stays_the_same_under_one_key(changes: dict[str, Any]) -> None:
    """Nothing that changes between two calls of an occurrence is in the form, byte for byte."""
    assert body(claim_with(**changes), None) == body(claim_with(), None)


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
)
@settings(deadline=None)
def test_any_text_goes_into_the_form(message: str, session: str) -> None:
    """The form is ASCII whatever is in it, and the texts can be read back."""
    form = form_of(body(claim_with(message=message, session_id=session), None))
    assert (form["message"], form["session_id"]) == ("[Scheduled recall] " + message, session)


@pytest.mark.parametrize(
    ("agent", "run_id", "path"),
    [
        ("helper", None, "/agents/helper/runs"),
        ("helper", "4f-1", "/agents/helper/runs/4f-1"),
        ("a/../b", "..", "/agents/a%2F..%2Fb/runs/%2E%2E"),
        ("..", "?x#", "/agents/%2E%2E/runs/%3Fx%23"),
    ],
)
def test_places(agent: str, run_id: str | None, path: str) -> None:
    """Names stay in their places in an address."""
    assert place(agent, run_id) == path


# --- what answers mean ----------------------------------------------------------------------------


def answer(status: int, content: Any = None, *, truncated: bool = False, **headers: str) -> Answer:
    text = (
        content
        if isinstance(content, bytes)
        else json.dumps({} if content is None else content).encode()
    )
    fields = {"content-type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    return Answer(status, CIMultiDict(fields), text, truncated)


def run(status: str, **more: Any) -> dict[str, Any]:
    return {"run_id": "4f", "session_id": "s1", "status": status} | more


def streamed(*events: str) -> Answer:
    """A run as a stream of Agno's events."""
    text = "".join(f'event: {name}\ndata: {{"event": "{name}"}}\n\n' for name in events)
    return answer(200, text.encode(), content_type="text/event-stream")


HTML = b"<!doctype html>"
TAKEN = Accepted("/agents/helper/runs/4f", 202)

POSTED: list[tuple[str, Answer, Outcome | type[Outcome]]] = [
    ("taken", answer(202, run("PENDING")), TAKEN),
    ("taken before, and running", answer(202, run("RUNNING")), TAKEN),
    *(
        (f"taken before, and {word}", answer(202, run(word)), TAKEN)
        for word in ("COMPLETED", "ERROR", "CANCELLED", "PAUSED")
    ),
    ("a word of tomorrow", answer(202, run("DREAMING")), TAKEN),
    ("foreground, fine", answer(200, run("COMPLETED", content="done")), Answered(200)),
    (
        "foreground, asks a person",
        answer(200, run("PAUSED")),
        Answered(200, WAITS_FOR_A_PERSON),
    ),
    ("streams", streamed("RunStarted", "RunCompleted"), Answered(200)),
    ("streams a failure", streamed("RunStarted", "RunError"), Failed),
    ("streams a failure of a team", streamed("TeamRunStarted", "TeamRunError"), Failed),
    ("streams a question", streamed("RunPaused"), Answered(200, WAITS_FOR_A_PERSON)),
    (
        "when to ask first",
        answer(202, run("PENDING"), retry_after="7"),
        Accepted("/agents/helper/runs/4f", 202, 7.0),
    ),
    (
        "a gateway without its server",
        answer(502, HTML, retry_after="0"),
        Unknown("a gateway answers for a server that is away (HTTP 502)", 502, 1.0, True),
    ),
    (
        "foreground, failed",
        answer(200, run("ERROR", content="no\n model")),
        Failed("Agno says that the run ended as error: no model", 200),
    ),
    (
        "foreground, cancelled",
        answer(200, run("CANCELLED")),
        Failed("Agno says that the run ended as cancelled", 200),
    ),
    ("foreground, still on", answer(200, run("RUNNING")), Accepted("/agents/helper/runs/4f", 200)),
    (
        "foreground, endless",
        answer(200, b'{"run_id": "4f", "status": "ERROR", "messages": ["', truncated=True),
        Failed,
    ),
    ("another's key", answer(202, run("COMPLETED") | {"session_id": "s2"}), Refused),
    ("no run", answer(202, {"status": "PENDING"}), Unknown),
    ("no status", answer(200, {"run_id": "4f"}), Unknown),
    ("a strange run", answer(202, {"run_id": ["4f"], "status": "PENDING"}), Unknown),
    ("no object", answer(200, [run("COMPLETED")]), Unknown),
    ("nothing", answer(204, b""), Unknown),
    ("garbage", answer(202, b'{"run_id": "4f", "sta'), Unknown),
    ("a page of the web", answer(200, HTML, content_type="text/html"), Misconfigured),
    ("no agent", answer(404, {"detail": "Agent not found"}), Misconfigured),
    (
        "another agent's key",
        answer(409, {"detail": "Idempotency-Key was already used by a different component"}),
        Unknown,
    ),
    ("the queue is full", answer(429, {"detail": "Job queue is full"}), Unavailable),
    ("a proxy without a server", answer(503, HTML, retry_after="7"), Unavailable),
    ("a wrong token", answer(401, {"detail": "Invalid authentication token"}), Misconfigured),
    ("a token for other things", answer(403), Misconfigured),
    ("a redirect", answer(307, location="http://elsewhere/"), Misconfigured),
    (
        "too long a message",
        answer(400, {"detail": "Field exceeded maximum size of 1024KB."}),
        Refused,
    ),
    ("no message", answer(422, {"detail": [{"type": "missing"}]}), Refused),
    ("it broke", answer(500, {"detail": "Run acceptance aborted"}), Unknown),
    ("its gateway gave up", answer(504, HTML), Unknown),
]


@pytest.mark.parametrize(
    ("given_answer", "outcome"), [case[1:] for case in POSTED], ids=[case[0] for case in POSTED]
)
def test_what_the_answer_to_a_post_means(
    given_answer: Answer, outcome: Outcome | type[Outcome]
) -> None:
    """A run on record is followed; what the server did not take says whether it can have run, and
    whose fault it is."""
    found = read(given_answer, "helper", "s1")
    assert (type(found) if isinstance(outcome, type) else found) == outcome
    if not isinstance(found, Answered | Accepted):
        assert f"HTTP {given_answer.status}" in (reason_of(found) or "") or isinstance(
            found, Failed
        )


LONG = (
    b'{"run_id": "4f", "content": {"status": "ERROR"}, "status": "RUNNING", "messages": '
    b'[{"content": "'
) + b"x" * 100

POLLED: list[tuple[str, Answer, Outcome | StillOn | type[Outcome]]] = [
    (
        "ticket queued",
        answer(200, {"id": "4f", "status": "queued"}),
        StillOn(None, "it waits in its session's queue"),
    ),
    ("ticket running", answer(200, {"id": "4f", "status": "running"}), StillOn()),
    (
        "ticket completed",
        answer(200, {"id": "4f", "status": "completed", "error": None}),
        Answered(200),
    ),
    (
        "ticket paused",
        answer(200, {"id": "4f", "status": "paused"}),
        Answered(200, WAITS_FOR_A_PERSON),
    ),
    ("a gateway in between", answer(502, HTML, retry_after="0"), StillOn(1.0, "HTTP 502")),
    (
        "an endless run, its status at the end",
        Answer(200, CIMultiDict(), b'{"content": "' + b"x" * 100, True, b'xx", "status": "ERROR"}'),
        Failed("Agno says that the run ended as error", 200),
    ),
    (
        "ticket failed",
        answer(200, {"status": "failed", "error": "no model"}),
        Failed("Agno says that the run ended as failed: no model", 200),
    ),
    (
        "ticket cancelled",
        answer(200, {"id": "4f", "status": "cancelled"}),
        Failed("Agno says that the run ended as cancelled", 200),
    ),
    (
        "run waiting",
        answer(200, run("PENDING", waiting_on="3e")),
        StillOn(None, "it waits in its session's queue"),
    ),
    ("run on", answer(200, run("RUNNING")), StillOn()),
    ("run completed", answer(200, run("COMPLETED")), Answered(200)),
    ("run said again by a person", answer(200, run("REGENERATED")), Answered(200)),
    (
        "run failed",
        answer(200, run("ERROR", content="no model")),
        Failed("Agno says that the run ended as error: no model", 200),
    ),
    ("a word of tomorrow", answer(200, run("DREAMING"), retry_after="3"), StillOn(3.0)),
    ("an endless run, still on", answer(200, LONG, truncated=True), StillOn()),
    (
        "an endless answer",
        answer(200, b'{"run_id": "4f", "content": "' + b"x" * 100, truncated=True),
        Answered(200),
    ),
    ("forgotten", answer(404, {"detail": "Run not found"}), Unknown),
    ("a token refused", answer(401), StillOn(None, "HTTP 401")),
    ("away for now", answer(503, HTML, retry_after="7"), StillOn(7.0, "HTTP 503")),
    ("a page of the web", answer(200, HTML), StillOn(None, "an answer that is none of Agno's")),
    ("no object", answer(200, []), StillOn(None, "an answer that is none of Agno's")),
]


@pytest.mark.parametrize(
    ("given_answer", "outcome"), [case[1:] for case in POLLED], ids=[case[0] for case in POLLED]
)
def test_what_a_poll_means(
    given_answer: Answer, outcome: Outcome | StillOn | type[Outcome]
) -> None:
    """A ticket, and a run, say how it stands in words of their own; trouble on the way ends
    nothing."""
    found = polled(given_answer)
    assert (type(found) if isinstance(outcome, type) else found) == outcome


@pytest.mark.slow
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["status", "run_id", "data", "id", "metadata", "recall_key", "x"]),
                inner,
            )
        ),
        max_leaves=9,
    ),
    st.integers(0, 400),
    st.sampled_from([200, 202, 404, 500]),
)
@settings(deadline=None)
def test_any_answer_can_be_read(document: Any, cut: int, status: int) -> None:
    """Whatever JSON a server gives, and wherever it breaks off, reading it gives an outcome;
    members that came whole are as they were sent."""
    text = json.dumps(document).encode()
    for given_answer in (answer(status, text), answer(status, text[:cut], truncated=True)):
        assert not isinstance(read(given_answer, "helper", "s1"), Answered) or status == 200
        polled(given_answer)
        listed(given_answer, "r1:1")
        # Whole numbers are read as texts, as they may be of any length.
        again = json.loads(text, parse_int=str)
        whole = again if isinstance(again, dict) else {}
        found = members(given_answer)
        # A number may be cut in its middle; it is the last thing then.
        assert all(found[name] == whole[name] for name in list(found)[:-1])


TICKETS = {
    "data": [
        {"id": "1", "component_id": "helper", "idempotency_key": None},
        {"id": "2", "component_id": "other", "idempotency_key": "r1:1"},
    ]
}
LISTED: list[tuple[str, Answer, tuple[str, str] | None]] = [
    ("a ticket", answer(200, TICKETS), ("other", "2")),
    (
        "a run",
        answer(200, [{"run_id": "3", "agent_id": "helper", "metadata": {"recall_key": "r1:1"}}]),
        ("helper", "3"),
    ),
    (
        "another's",
        answer(200, [{"run_id": "3", "agent_id": "helper", "metadata": {"recall_key": "r1:11"}}]),
        None,
    ),
    (
        "no metadata yet",
        answer(200, [{"run_id": "3", "agent_id": "helper", "metadata": None}, "x"]),
        None,
    ),
    (
        "not whole",
        answer(
            200,
            b'[{"run_id": "3", "agent_id": "helper", "metadata": {"recall_key": "r1:1"}}',
            truncated=True,
        ),
        None,
    ),
    ("refused", answer(403, TICKETS), None),
]


@pytest.mark.parametrize(
    ("given_answer", "found"), [case[1:] for case in LISTED], ids=[case[0] for case in LISTED]
)
def test_which_run_is_ours(given_answer: Answer, found: tuple[str, str] | None) -> None:
    """A run is ours by its key to the letter, among tickets as among runs."""
    assert listed(given_answer, "r1:1") == found


# --- against a relay ------------------------------------------------------------------------------


CONFIG, UNREAD = "GET /config", "GET /agents/helper/runs/recall-worker"
POST, OWNER = "POST /agents/helper/runs", "GET /sessions/s1"
JOBS, RUNS = "GET /queue/jobs", "GET /agents/helper/runs"
TICKET, RUN, CANCEL = (
    "GET /queue/jobs/4f",
    "GET /agents/helper/runs/4f",
    "POST /agents/helper/runs/4f/cancel",
)

DURABLE = reply(200, {"os_id": "x", "queue": {"durable": True, "queue_per_session": True}})
NO_TICKETS = reply(200, {"data": [], "meta": {"total_count": 0}})
NO_RUN = reply(404, {"detail": "Run not found"})
FORBIDDEN = reply(403, {"detail": "Job queue operations require an admin scope"})
SAFE: dict[str, Any] = {CONFIG: DURABLE, JOBS: NO_TICKETS, POST: reply(202, run("PENDING"))}
CLAIM = claim_with()


@asynccontextmanager
async def agno_at(answers: dict[str, Any], **environ: str) -> AsyncIterator[tuple[Agno, Relay]]:
    """The protocol, and what it speaks to."""
    async with Relay(answers=answers) as relay:
        token = {} if "RECALL_RUN_TOKEN_FILE" in environ else {"RECALL_RUN_TOKEN": "hush"}
        environ = {
            "RECALL_RUN_URL": relay.url + "/",
            "RECALL_PROTOCOL": "agno",
            "RECALL_AGNO_AGENT": "helper",
            **token,
            **environ,
        }
        found = read_settings(environ)
        protocol = create(found, Credentials(found, Secrets(found, environ)))
        assert isinstance(protocol, Agno)
        try:
            yield protocol, relay
        finally:
            await protocol.close()


def call_of(claim: Claim = CLAIM) -> Call:
    return Call(claim, asyncio.get_running_loop().time())


@pytest.mark.parametrize("name", ["\ud800", "a\udfffb", "n" * 301])
async def test_names_that_no_address_can_hold(name: str) -> None:
    """Half a surrogate pair, or a name without end, for a run or an owner: no call breaks, and
    nothing of it is remembered."""
    assert isinstance(read(answer(202, {"run_id": name, "status": "PENDING"}), "a", "s"), Unknown)
    assert (
        listed(
            answer(200, {"data": [{"idempotency_key": "k", "component_id": "a", "id": name}]}), "k"
        )
        is None
    )
    asked = SAFE | {POST: reply(404), "GET /sessions/session-1": reply(200, {"user_id": name})}
    async with agno_at(asked) as (agno, _):
        assert isinstance(
            await agno.call(call_of(claim_with(session_id="session-1"))), Misconfigured
        )


async def test_a_call() -> None:
    """A call looks whether the server is safe, then posts one form, with the token and the
    contract's headers."""
    async with agno_at(SAFE, RECALL_SIGNING_SECRET="s3cret") as (protocol, relay):
        call = call_of()
        assert await protocol.call(call) == TAKEN
        assert call.sent_at is not None
        assert relay.what == [CONFIG, JOBS, POST]
        assert {asked.headers["authorization"] for asked in relay.asked} == {"Bearer hush"}
        posted = relay.asked[-1]
        assert posted.headers["content-type"] == "application/x-www-form-urlencoded"
        assert (posted.headers["idempotency-key"], posted.headers["recall-attempt"]) == (
            "r1:1",
            "1",
        )
        assert posted.headers["webhook-signature"].startswith("v1,")
        assert posted.form == form_of(body(CLAIM, None))


UNSAFE: list[tuple[str, dict[str, Any], type[Outcome]]] = [
    (
        "no queue",
        {
            CONFIG: reply(
                200, {"os_id": "x", "queue": {"durable": False, "queue_per_session": False}}
            )
        },
        Misconfigured,
    ),
    (
        "side by side",
        {CONFIG: reply(200, {"queue": {"durable": True, "queue_per_session": False}})},
        Misconfigured,
    ),
    ("an Agno of before", {CONFIG: reply(200, {"os_id": "x"})}, Misconfigured),
    (
        "durable, and idle",
        {JOBS: reply(503, {"detail": "Durable job queue is not enabled on this replica"})},
        Misconfigured,
    ),
    (
        "a proxy says 503",
        {JOBS: reply(503, text=HTML, headers={"content-type": "text/html"})},
        Unavailable,
    ),
    ("no Agno", {CONFIG: reply(404)}, Misconfigured),
    (
        "a page of the web",
        {CONFIG: reply(200, text=HTML, headers={"content-type": "text/html"})},
        Misconfigured,
    ),
    ("a redirect", {CONFIG: reply(307, headers={"location": "http://elsewhere/"})}, Misconfigured),
    ("a wrong token", {CONFIG: reply(401)}, Misconfigured),
    ("a token without config:read", {CONFIG: reply(403)}, Misconfigured),
    ("it is broken", {CONFIG: reply(500)}, Unavailable),
    ("it is full", {CONFIG: reply(429)}, Unavailable),
    ("it hangs up", {CONFIG: Raw()}, Unavailable),
    ("it hangs up later", {JOBS: Raw()}, Unavailable),
    ("a token without agents:read", {JOBS: FORBIDDEN, UNREAD: reply(403)}, Misconfigured),
    ("reading is broken", {JOBS: FORBIDDEN, UNREAD: reply(500)}, Unavailable),
    ("reading hangs up", {JOBS: FORBIDDEN, UNREAD: Raw()}, Unavailable),
]


@pytest.mark.parametrize(
    ("answers", "kind"), [case[1:] for case in UNSAFE], ids=[case[0] for case in UNSAFE]
)
async def test_nothing_is_posted_to_a_server_that_is_not_safe(
    answers: dict[str, Any], kind: type[Outcome]
) -> None:
    """Where the queue is not durable, not in order, idle, or can't be asked for, nothing is sent,
    neither at first nor again."""
    async with agno_at(SAFE | answers) as (protocol, relay):
        call = call_of()
        for outcome in (await protocol.call(call), await protocol.find(CLAIM)):
            assert type(outcome) is kind
        assert call.sent_at is None
        assert POST not in relay.what


async def test_tickets_that_only_the_admin_reads() -> None:
    """With JWTs the queue's own pages are refused; what GET /config says is enough then, and polls
    go to the run."""
    answers = SAFE | {
        JOBS: FORBIDDEN,
        UNREAD: NO_RUN,
        TICKET: FORBIDDEN,
        RUN: [reply(200, run("RUNNING")), reply(200, run("COMPLETED"))],
    }
    async with agno_at(answers) as (protocol, relay):
        outcome = await protocol.call(call_of())
        assert outcome == TAKEN
        assert await protocol.follow(CLAIM, TAKEN.reference, 20) == Answered(200)
        assert relay.what == [CONFIG, JOBS, UNREAD, POST, TICKET, RUN, TICKET, RUN]
        assert relay.asked[-1].query == {"session_id": "s1"}


OWNED: list[tuple[str, dict[str, Any], Outcome | type[Outcome], list[str | None]]] = [
    ("ann's", {OWNER: reply(200, {"user_id": "ann", "chat_history": []})}, TAKEN, [None, "ann"]),
    (
        "ann's, and endless",
        {OWNER: reply(200, {"user_id": "ann", "chat_history": ["x" * LIMIT]})},
        TAKEN,
        [None, "ann"],
    ),
    ("nobody's", {OWNER: reply(200, {"user_id": None})}, Misconfigured, [None]),
    ("no session", {OWNER: reply(404)}, Misconfigured, [None]),
    ("not told", {OWNER: reply(403)}, Misconfigured, [None]),
    ("not told now", {OWNER: reply(500)}, Unavailable, [None]),
    ("hung up", {OWNER: Raw()}, Unavailable, [None]),
]


@pytest.mark.parametrize(
    ("answers", "outcome", "users"), [case[1:] for case in OWNED], ids=[case[0] for case in OWNED]
)
async def test_a_session_that_a_user_owns(
    answers: dict[str, Any], outcome: Outcome | type[Outcome], users: list[str | None]
) -> None:
    """A 404 can mean that the session is a user's: then the run is posted in their name, and
    otherwise not again."""

    def post(asked: Asked) -> Raw:
        return (
            reply(202, run("PENDING"))
            if "user_id" in asked.form
            else reply(404, {"detail": "Session not found"})
        )

    async with agno_at(SAFE | {POST: post} | answers) as (protocol, relay):
        found = await protocol.call(call_of())
        assert (type(found) if isinstance(outcome, type) else found) == outcome
        posted = [asked for asked in relay.asked if asked.what == POST]
        assert [asked.form.get("user_id") for asked in posted] == users
        assert {asked.headers["idempotency-key"] for asked in posted} == {"r1:1"}


async def test_no_agent_of_that_name() -> None:
    """A 404 that no session explains is the agent's."""
    async with agno_at(SAFE | {POST: reply(404, {"detail": "Agent not found"})}) as (
        protocol,
        relay,
    ):
        outcome = await protocol.call(call_of())
        assert isinstance(outcome, Misconfigured) and "RECALL_AGNO_AGENT" in outcome.reason
        assert relay.what[2:] == [POST, OWNER]


@pytest.mark.parametrize(
    ("answers", "kind"),
    [({POST: Raw()}, Unknown), ({CONFIG: Raw(reset=True)}, Unavailable)],
    ids=["sent", "not sent"],
)
async def test_no_answer(answers: dict[str, Any], kind: type[Outcome]) -> None:
    """A post without an answer may have run; a question without one has started nothing."""
    async with agno_at(SAFE | answers) as (protocol, _):
        assert type(await protocol.call(call_of())) is kind


async def test_a_server_that_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A post is answered when the run is on record: it is waited for a while, and not for as long
    as a run may take."""
    monkeypatch.setattr(agno_protocol, "POST_DEADLINE", 0.3)
    async with agno_at(SAFE) as (protocol, relay):
        relay.losing = {POST}
        outcome = await protocol.call(call_of())
        assert isinstance(outcome, Unknown) and "no answer within 0.3 s" in outcome.reason


async def test_a_server_that_says_when() -> None:
    """Retry-After is obeyed also where it answers a question before the post."""
    async with agno_at(SAFE | {CONFIG: reply(429, headers={"retry-after": "7"})}) as (protocol, _):
        outcome = await protocol.call(call_of())
        assert isinstance(outcome, Unavailable) and outcome.retry_after == 7.0


async def test_gateways() -> None:
    """A gateway that answers the post for a server that is away: it may have run. One that answers
    a question before the post: nothing was started, and nothing is posted."""
    away = reply(502, text=b"<h1>away</h1>", headers={"retry-after": "7"})
    async with agno_at(SAFE | {POST: away}) as (protocol, _):
        posted = await protocol.call(call_of())
        assert isinstance(posted, Unknown) and posted.by_gateway and posted.retry_after == 7
    for question in (CONFIG, JOBS):
        async with agno_at(SAFE | {question: away}) as (protocol, relay):
            outcome = await protocol.call(call_of())
            assert isinstance(outcome, Unavailable) and outcome.retry_after == 7
            assert POST not in relay.what


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

    answers = {
        CONFIG: guarded(DURABLE),
        JOBS: guarded(NO_TICKETS),
        POST: guarded(reply(202, run("PENDING"))),
        RUNS: guarded(reply(200, [])),
        TICKET: guarded(reply(200, {"status": "completed"})),
        CANCEL: guarded(reply(200)),
    }
    requests: list[tuple[str, dict[str, Any], Callable[[Agno], Any]]] = [
        (CONFIG, {}, lambda protocol: protocol.call(call_of())),
        (POST, {CONFIG: DURABLE, JOBS: NO_TICKETS}, lambda protocol: protocol.call(call_of())),
        (JOBS, {CONFIG: DURABLE}, lambda protocol: protocol.find(CLAIM)),
        (RUNS, {CONFIG: DURABLE, JOBS: NO_TICKETS}, lambda protocol: protocol.find(CLAIM)),
        (TICKET, {}, lambda protocol: protocol.follow(CLAIM, TAKEN.reference, 5)),
        (CANCEL, {}, lambda protocol: protocol.abort(CLAIM, TAKEN.reference)),
    ]
    for what, open_to_all, request in requests:
        file.write_text("token-1")
        async with agno_at(
            answers | open_to_all,
            RECALL_RUN_TOKEN_FILE=str(file),
            RECALL_RUN_HEADERS="x-team: blue",
        ) as (protocol, relay):
            await request(protocol)
        asked = [one for one in relay.asked if one.what == what]
        assert [one.headers["authorization"] for one in asked][:2] == [
            "Bearer token-1",
            "Bearer token-2",
        ]
        assert {one.headers["x-team"] for one in relay.asked} == {"blue"}


async def test_nobody_is_there() -> None:
    """Without a connection nothing was started."""
    async with agno_at(SAFE) as (protocol, relay):
        await relay.__aexit__()
        for outcome in (await protocol.call(call_of()), await protocol.find(CLAIM)):
            assert isinstance(outcome, Unavailable) and "no connection" in outcome.reason


OLD = {"begun_age": KEYS_KEPT + 1}
TICKET_OF_OURS = [{"id": "4f", "component_id": "helper", "idempotency_key": "r1:1"}]
OURS = [{"run_id": "4f", "agent_id": "helper", "metadata": {"recall_key": "r1:1"}}]
HUGE = reply(200, [{"content": "x" * LIMIT}])
FOUND: list[tuple[str, dict[str, Any], dict[str, Any], Outcome | type[Outcome] | None]] = [
    ("a ticket", {JOBS: reply(200, {"data": TICKET_OF_OURS})}, {}, Accepted(TAKEN.reference, 200)),
    ("a run", {JOBS: NO_TICKETS, RUNS: reply(200, OURS)}, {}, Accepted(TAKEN.reference, 200)),
    (
        "a run, no tickets",
        {JOBS: FORBIDDEN, RUNS: reply(200, OURS)},
        {},
        Accepted(TAKEN.reference, 200),
    ),
    ("neither", {JOBS: NO_TICKETS, RUNS: reply(200, [])}, {}, None),
    ("neither, long ago", {JOBS: NO_TICKETS, RUNS: reply(200, [])}, OLD, None),
    ("no session", {JOBS: NO_TICKETS, RUNS: reply(404)}, OLD, None),
    ("too much, a while ago", {JOBS: FORBIDDEN, RUNS: HUGE}, {"begun_age": 600.0}, None),
    ("too much, long ago", {JOBS: FORBIDDEN, RUNS: HUGE}, OLD, Unknown),
    ("none listed, long ago", {JOBS: FORBIDDEN, RUNS: reply(501)}, OLD, Unknown),
    ("tickets hang up", {JOBS: [NO_TICKETS, Raw()]}, {}, Unavailable),
    ("runs hang up", {JOBS: FORBIDDEN, RUNS: Raw()}, {}, Unavailable),
    ("tickets are broken", {JOBS: [NO_TICKETS, reply(500)]}, {}, Unavailable),
    ("runs are broken", {JOBS: FORBIDDEN, RUNS: reply(503)}, {}, Unavailable),
    ("a wrong token", {JOBS: [NO_TICKETS, reply(401)]}, {}, Misconfigured),
    ("runs are kept from us", {JOBS: FORBIDDEN, RUNS: reply(403)}, {}, Misconfigured),
]


@pytest.mark.parametrize(
    ("answers", "changes", "outcome"), [case[1:] for case in FOUND], ids=[case[0] for case in FOUND]
)
async def test_finding_an_earlier_run(
    answers: dict[str, Any], changes: dict[str, Any], outcome: Outcome | type[Outcome] | None
) -> None:
    """Before a post that might be the second, the run is looked for; it is posted where it is not
    there, or the key surely holds."""
    async with agno_at(SAFE | {UNREAD: NO_RUN} | answers) as (protocol, relay):
        found = await protocol.find(
            claim_with(**({"begun_age": 5.0, "session_id": "s 1&"} | changes))
        )
        assert (type(found) if isinstance(outcome, type) else found) == outcome
        assert {
            asked.query["session_id"] for asked in relay.asked if asked.what in (JOBS, RUNS)
        } == {"s 1&"}


@pytest.mark.slow
async def test_following_and_aborting() -> None:
    """A run is polled by its ticket, through trouble and to its end, and ended where the server is
    asked to."""
    answers = {
        TICKET: [
            Raw(),
            reply(500),
            reply(200, {"status": "queued"}),
            reply(200, {"status": "completed"}),
        ],
        CANCEL: reply(200),
    }
    async with agno_at(answers) as (protocol, relay):
        assert await protocol.follow(CLAIM, TAKEN.reference, 60) == Answered(200)
        await protocol.abort(CLAIM, TAKEN.reference)
        assert relay.what == [TICKET] * 4 + [CANCEL]
        assert relay.asked[-1].query == {"session_id": "s1"}
        assert {asked.headers["authorization"] for asked in relay.asked} == {"Bearer hush"}


async def test_a_run_that_waits_too_long() -> None:
    """What is still in line when its time is up is Unknown, and says so."""
    async with agno_at({TICKET: reply(200, {"status": "queued"})}) as (protocol, _):
        outcome = await protocol.follow(CLAIM, TAKEN.reference, 0.5)
        assert (
            isinstance(outcome, Unknown)
            and outcome.http_status is None
            and "queue" in outcome.reason
        )


@pytest.mark.parametrize(
    "reference",
    [
        "http://elsewhere/agents/helper/runs/4f",
        "//elsewhere/agents/helper/runs/4f",
        "/agents/../runs/4f",
        "/agents/a/runs/..",
        "/agents/a/runs/4f?x",
        "/agents/a/runs/4f/..",
        "/agents/a/runs/4f\r\nX: y",
        "4f",
        "",
    ],
    ids=ascii,
)
async def test_a_reference_that_is_none(reference: str) -> None:
    """A reference that Agno can't have given is followed nowhere."""
    async with agno_at({}) as (protocol, relay):
        assert isinstance(await protocol.follow(CLAIM, reference, 5), Unknown)
        await protocol.abort(CLAIM, reference)
        assert relay.asked == []


# --- the real server ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agno_database() -> Iterator[str]:
    """A PostgreSQL that Agno reaches by TCP; the maintenance DSN."""
    with postgres.embedded(tcp=True) as server:
        yield server.dsn(tcp=True)


@pytest.fixture(scope="module")
def agno(agno_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgnoServer]:
    """An AgentOS with a durable queue that takes two in line."""
    with postgres.database(agno_database) as dsn:
        server = AgnoServer(tmp_path_factory.mktemp("agno"), dsn)
        server.start()
        yield server
        server.kill()


@pytest.fixture
def model(agno: AgnoServer, endpoint: Endpoint) -> Endpoint:
    """What the model says, scripted by what it is told."""
    agno.play(endpoint)
    return endpoint


def at(url: str, **more: Any) -> dict[str, Any]:
    """The settings of a daemon for an AgentOS."""
    return {"protocol": "agno", "run_url": url, "agno_agent": "helper", "lease": 2} | more


def told(session: str) -> str:
    """What the agent is told by the recall of `promise`."""
    return f"[Scheduled recall] come back to {session}"


ON_RECORD = "select 1 from session_recalls where session_id = %s and run_reference is not null"
"""The server took the run, and we know it."""


@pytest.mark.full
async def test_a_recall_runs_once(
    app: Application, db: Connection, agno: AgnoServer, model: Endpoint, daemons: Daemons
) -> None:
    """A due recall is one run in the session, which the server made for it; its metadata names the
    recall; both times are on record."""
    daemon = await daemons.start(**at(agno.url))
    recall = await promise(app, "größe/1", "once")
    await daemon.hears("recall.settled", recall=recall, outcome="answered")
    assert (await row(db, "größe/1"))["status"] == "fired"
    assert len(model.of(told("größe/1"))) == 1
    [ticket] = await agno.tickets("größe/1")
    assert (ticket["idempotency_key"], ticket["status"], ticket["attempt"]) == (
        f"{recall}:1",
        "completed",
        1,
    )
    assert ticket["payload"]["kwargs"]["metadata"]["recall_id"] == recall
    assert await agno.runs("größe/1") == [(told("größe/1"), "COMPLETED")]
    [mark] = await calls(db, recall)
    assert mark["delivered_at"] < mark["completed_at"]


@pytest.mark.full
async def test_a_recurring_recall(
    app: Application, agno: AgnoServer, model: Endpoint, daemons: Daemons
) -> None:
    """Each occurrence is a run of its own under a key of its own, one after the other."""
    daemon = await daemons.start(**at(agno.url))
    recall = await promise(app, "again", "recurring", interval=1)
    await daemon.hears("recall.settled", recall=recall, outcome="answered", times=2)
    assert [ticket["idempotency_key"] for ticket in await agno.tickets("again")][:2] == [
        f"{recall}:1",
        f"{recall}:2",
    ]


@pytest.mark.full
async def test_a_queued_run_is_waited_for(
    app: Application, db: Connection, agno: AgnoServer, model: Endpoint, daemons: Daemons
) -> None:
    """Behind a person's queued run the recall stands in line, while other sessions go on; it runs
    afterwards, once."""
    gate = Gate()
    model.script("a long talk", gate)
    await agno.say("line", "a long talk")
    await gate.entered.wait()
    daemon = await daemons.start(**at(agno.url))
    recall = await promise(app, "line", "once")
    await eventually(db, ON_RECORD, ["line"])
    other = await promise(app, "elsewhere", "once")
    await daemon.hears("recall.settled", recall=other, outcome="answered")
    assert (await agno.tickets("line"))[-1]["status"] == "queued"
    assert model.of(told("line")) == []

    gate.open()
    await daemon.hears("recall.settled", recall=recall, outcome="answered")
    [ours] = model.of(told("line"))
    ended_at = model.of("a long talk")[0].ended_at
    assert ended_at is not None and ours.at > ended_at
    assert await agno.runs("line") == [("a long talk", "COMPLETED"), (told("line"), "COMPLETED")]


@pytest.mark.full
async def test_a_foreground_run_is_not_seen(
    app: Application, db: Connection, agno: AgnoServer, model: Endpoint, daemons: Daemons
) -> None:
    """What Agno can't give: beside a person's foreground run, which no page of the server shows,
    the recall runs at once."""
    await agno.say("chat", "before", background=False)
    gate = Gate()
    model.script("a long talk", gate)
    talk = asyncio.create_task(agno.say("chat", "a long talk", background=False))
    await gate.entered.wait()
    assert await agno.runs("chat") == [("before", "COMPLETED")]
    assert await agno.tickets("chat") == []
    daemon = await daemons.start(**at(agno.url))
    recall = await promise(app, "chat", "once")
    await daemon.hears("recall.settled", recall=recall, outcome="answered")
    assert not talk.done()
    assert len(model.of(told("chat"))) == 1
    gate.open()
    assert (await talk)["status"] == "COMPLETED"
    assert sorted(await agno.runs("chat")) == [
        (told("chat"), "COMPLETED"),
        ("a long talk", "COMPLETED"),
        ("before", "COMPLETED"),
    ]


@pytest.mark.full
async def test_a_failing_run(
    app: Application, db: Connection, agno: AgnoServer, model: Endpoint, daemons: Daemons
) -> None:
    """A run that fails is Failed with the model's own words, tried again under a new key, and then
    failed for good."""
    model.script(told("unlucky"), reply(500, {"error": "out of tokens"}))
    daemon = await daemons.start(**at(agno.url, max_attempts=2))
    recall = await promise(app, "unlucky", "once")
    await daemon.hears("recall.settled", recall=recall, outcome="failed", times=2)
    after = await row(db, "unlucky")
    assert (after["status"], after["reason"]) == (
        "failed",
        "Agno says that the run ended as failed: out of tokens",
    )
    tickets = await agno.tickets("unlucky")
    assert [(ticket["idempotency_key"], ticket["status"]) for ticket in tickets] == [
        (f"{recall}:1", "failed"),
        (f"{recall}:1.1", "failed"),
    ]
    assert len(model.of(told("unlucky"))) == 2


@pytest.mark.full
async def test_a_run_that_asks_a_person(
    app: Application, db: Connection, agno: AgnoServer, model: Endpoint, daemons: Daemons
) -> None:
    """A run that stops for a person's consent has come back: the recall has fired, and the question
    stands."""
    model.script(told("careful"), reply(200, {"call": "launch"}))
    daemon = await daemons.start(**at(agno.url))
    recall = await promise(app, "careful", "once")
    await daemon.hears("recall.settled", recall=recall, outcome="answered")
    [ticket] = await agno.tickets("careful")
    assert ticket["status"] == "paused"
    assert await agno.runs("careful") == [(told("careful"), "PAUSED")]


@pytest.mark.full
@pytest.mark.parametrize(("agent", "user"), [("helper", "ann"), ("other", None), ("other", "ann")])
async def test_whose_session_it_is(
    agent: str,
    user: str | None,
    app: Application,
    agno: AgnoServer,
    model: Endpoint,
    daemons: Daemons,
) -> None:
    """A session that a user owns, and one that another agent began, are come back to, once, in the
    owner's name."""
    session = f"session of {agent} and {user}"
    await agno.say(
        session,
        "hello",
        agent=agent,
        background=False,
        **({} if user is None else {"user_id": user}),
    )
    daemon = await daemons.start(**at(agno.url))
    recall = await promise(app, session, "once")
    await daemon.hears("recall.settled", recall=recall, outcome="answered", attempt=1)
    [ticket] = await agno.tickets(session)
    assert (ticket["component_id"], ticket["user_id"], ticket["status"]) == (
        "helper",
        user,
        "completed",
    )
    assert len(model.of(told(session))) == 1


@pytest.mark.full
async def test_a_worker_that_dies_in_mid_run(
    app: Application, db: Connection, agno: AgnoServer, model: Endpoint, daemons: Daemons
) -> None:
    """SIGKILL while the run goes on at the server: the next worker follows it to its end, and
    nothing is posted again."""
    gate = Gate()
    model.script(told("kept"), gate)
    async with Relay(agno.url) as relay:
        first = await daemons.start(**at(relay.url))
        recall = await promise(app, "kept", "once")
        await gate.entered.wait()
        await eventually(db, ON_RECORD, ["kept"])
        await first.kill()
        second = await daemons.start(**at(relay.url))
        await second.hears("lease.taken", recall=recall, worker_before=first.name)
        gate.open()
        await second.hears("recall.settled", recall=recall, outcome="answered", attempt=1)
        assert relay.what.count(POST) == 1
    assert len(model.of(told("kept"))) == 1
    assert (await row(db, "kept"))["status"] == "fired"


@pytest.mark.full
@pytest.mark.parametrize(
    ("seen", "ended", "posts"),
    [(True, False, 1), (False, True, 1), (False, False, 2)],
    ids=["found among the tickets", "found among the runs", "not found, and the key holds"],
)
async def test_a_worker_that_dies_before_it_knows(
    seen: bool,
    ended: bool,
    posts: int,
    app: Application,
    agno: AgnoServer,
    model: Endpoint,
    daemons: Daemons,
) -> None:
    """SIGKILL after the server took the run and before its answer came: the next worker finds that
    run, or gets it by the same key."""
    session, gate = f"lost {seen} {ended}", Gate()
    model.script(told(session), gate)
    async with Relay(agno.url) as relay:
        if not seen:
            relay.answers = {JOBS: FORBIDDEN}
        relay.losing = {POST}
        first = await daemons.start(**at(relay.url))
        recall = await promise(app, session, "once")
        await relay.lost.wait()
        await gate.entered.wait()
        await first.kill()
        if ended:
            gate.open()
            await agno.until(session, "completed")
        relay.losing = set()
        second = await daemons.start(**at(relay.url))
        await second.hears("lease.taken", recall=recall, worker_before=first.name)
        await eventually_on_record(app, session)
        gate.open()
        await second.hears("recall.settled", recall=recall, outcome="answered")
        assert relay.what.count(POST) == posts
    assert len(model.of(told(session))) == 1
    [ticket] = await agno.tickets(session)
    assert (ticket["idempotency_key"], ticket["attempt"]) == (f"{recall}:1", 1)


async def eventually_on_record(app: Application, session: str) -> None:
    """Wait until the run is on record, or has been and is over."""
    async with asyncio.timeout(20):
        while True:
            found = await app.connection.fetchval(
                "select run_reference is not null or status = 'fired' from session_recalls where "
                "session_id = $1",
                session,
            )
            if found:
                return
            await asyncio.sleep(0.02)


@pytest.mark.full
@pytest.mark.parametrize("in_line", [False, True], ids=["in mid-run", "in line"])
async def test_a_cancel_reaches_the_server(
    in_line: bool,
    app: Application,
    db: Connection,
    agno: AgnoServer,
    model: Endpoint,
    daemons: Daemons,
) -> None:
    """The application's cancel ends the run at the server: one in line never begins, one in mid-run
    is ended where its agent looks up."""
    session, gate = f"cancelled {in_line}", Gate()
    model.script("a long talk" if in_line else told(session), gate)
    if in_line:
        await agno.say(session, "a long talk")
        await gate.entered.wait()
    daemon = await daemons.start(**at(agno.url))
    recall = await promise(app, session, "once")
    await eventually(db, ON_RECORD, [session])
    if not in_line:
        await gate.entered.wait()
    assert await app.cancel_session(session) == 1
    await daemon.hears("recall.ended", recall=recall, status="cancelled")
    if in_line:
        await agno.until(session, "cancelled")
        assert model.of(told(session)) == []
    gate.open()
    await agno.until(session, "cancelled")
    assert (await agno.runs(session))[-1] == (told(session), "CANCELLED")
    assert len(model.of(told(session))) == (0 if in_line else 1)


@pytest.mark.full
async def test_a_wrong_agent(
    app: Application, db: Connection, agno: AgnoServer, model: Endpoint, daemons: Daemons
) -> None:
    """An agent that the server doesn't have costs the recall nothing; it runs when the setting is
    right."""
    wrong = await daemons.start(**at(agno.url, agno_agent="nobody"))
    recall = await promise(app, "patient", "once")
    [event, *_] = await wrong.hears("endpoint.misconfigured")
    assert "RECALL_AGNO_AGENT" in event["reason"]
    await wrong.hears("recall.settled", recall=recall, outcome="misconfigured", status="pending")
    assert (await row(db, "patient"))["attempt"] == 0
    assert await wrong.stop() == 0
    right = await daemons.start(**at(agno.url))
    await right.hears("recall.settled", recall=recall, outcome="answered", attempt=1)
    assert len(model.of(told("patient"))) == 1


@pytest.mark.full
async def test_a_full_queue(
    app: Application, db: Connection, agno: AgnoServer, model: Endpoint, daemons: Daemons
) -> None:
    """Where the server's queue is full the recall is kept, at no attempt, and runs when there is
    room."""
    gate = Gate()
    model.script("a long talk", gate)
    await agno.say("crowd", "a long talk")
    await gate.entered.wait()
    for _ in range(2):
        await agno.say("crowd", "and then")
    daemon = await daemons.start(**at(agno.url))
    recall = await promise(app, "outside", "once")
    await daemon.hears(
        "recall.settled", recall=recall, outcome="unavailable", http_status=429, status="pending"
    )
    assert await agno.tickets("outside") == []
    gate.open()
    await daemon.hears("recall.settled", recall=recall, outcome="answered", attempt=1)
    assert len(model.of(told("outside"))) == 1


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"queue": "fleeting"}, "not durable"),
        ({"queue": "parallel"}, "side by side"),
        ({"lifespan": "off"}, "lifespan"),
    ],
    ids=["no durable queue", "a queue without order", "a queue that nobody works off"],
)
async def test_a_server_that_is_not_safe(
    options: dict[str, str],
    says: str,
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    agno_database: str,
    tmp_path: Path,
    daemons: Daemons,
) -> None:
    """A server whose queue can't keep the promise is told of loudly; nothing is posted to it, and
    the recall is kept."""
    with postgres.database(agno_database) as dsn:
        server = AgnoServer(tmp_path, dsn, **options)
        server.start()
        try:
            server.play(endpoint)
            async with Relay(server.url) as relay:
                daemon = await daemons.start(**at(relay.url))
                recall = await promise(app, "kept", "once")
                [event, *_] = await daemon.hears("endpoint.misconfigured")
                assert says in event["reason"]
                await daemon.hears(
                    "recall.settled", recall=recall, outcome="misconfigured", status="pending"
                )
                assert POST not in relay.what
            # What it would have done: the same key twice is two runs, or one beside another.
            keyed = {"headers": {"Idempotency-Key": "twice"}}
            gate = Gate()
            endpoint.script("hello", gate)
            form = {"message": "hello", "session_id": "s", "stream": "false", "background": "true"}
            for _ in range(2):
                posted = await server.ask("POST", "/agents/helper/runs", data=form, **keyed)
                assert posted.status_code == 202
                keyed = (
                    keyed
                    if options.get("queue") != "parallel"
                    else {"headers": {"Idempotency-Key": "another"}}
                )
            await endpoint.count(2, "hello")
            gate.open()
        finally:
            server.kill()


@pytest.mark.full
async def test_a_server_that_dies_in_mid_run(
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    agno_database: str,
    tmp_path: Path,
    daemons: Daemons,
) -> None:
    """The polls outlive the server; it calls the run failed when it is back, and the recall is run
    again under a new key."""
    with postgres.database(agno_database) as dsn:
        server = AgnoServer(tmp_path, dsn)
        server.start()
        try:
            server.play(endpoint)
            gate = Gate()
            endpoint.script(told("restless"), gate, reply())
            daemon = await daemons.start(**at(server.url))
            recall = await promise(app, "restless", "once")
            await gate.entered.wait()
            await eventually(db, ON_RECORD, ["restless"])
            server.kill()
            await gate.hung_up.wait()
            server.start()
            await daemon.hears(
                "recall.settled", within=40, recall=recall, outcome="failed", verdict="retry"
            )
            await daemon.hears("recall.settled", recall=recall, outcome="answered", attempt=2)
            assert [t["idempotency_key"] for t in await server.tickets("restless")] == [
                f"{recall}:1",
                f"{recall}:1.1",
            ]
            assert len(endpoint.of(told("restless"))) == 2
        finally:
            server.kill()

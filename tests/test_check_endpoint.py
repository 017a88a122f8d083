"""`check-endpoint` against APIs that keep the contract, and against APIs that each break one
promise of it, over real HTTP."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from aiohttp import web
from jsonschema import Draft202012Validator

from recall_worker.cli import main
from recall_worker.cli.documents import documents
from recall_worker.contract.check import FAIL, NOT_SHOWN, PASS, PROPERTIES, Check, Row
from recall_worker.contract.probes import MESSAGE, REQUESTS
from recall_worker.contract.reference_api import ReferenceAPI
from recall_worker.protocols import server
from recall_worker.protocols.native import body
from recall_worker.protocols.server import Reply
from recall_worker.settings import Settings

from .support.breakable_api import BreakableAPI, Call, Run
from .support.endpoint import Endpoint, Raw, Request, reply
from .support.postgres import free_port
from .test_recall import claim_with

RUN = 0.5
"""Seconds that the agents take: long enough for two runs to meet, whatever else the machine
does."""
TOKEN = "secret"
pytestmark = pytest.mark.timeout(300)  # All APIs are checked before the first test that asks.
EVERYTHING = set(PROPERTIES)
OF_ANSWERS = {"answers", "gateway", "redirect", "token", "missing", "words", "large"}
ON_RUNS = EVERYTHING - OF_ANSWERS


async def agent(session_id: str, user_message: str, recall: Mapping[str, Any]) -> str:
    await asyncio.sleep(RUN)
    return f"did {recall['occurrence']}"


async def quick_agent(session_id: str, user_message: str, recall: Mapping[str, Any]) -> str:
    return "done"


async def broken_agent(session_id: str, user_message: str, recall: Mapping[str, Any]) -> str:
    await asyncio.sleep(RUN)
    raise RuntimeError("no model")


# --- APIs that break one promise each -------------------------------------------------------------


def said(document: Any, status: int) -> Reply:
    return Reply(status, json.dumps(document).encode(), {"Content-Type": "application/json"})


class Lenient(dict[str, Run | None]):
    """Sessions that may be left by those who are no longer in."""

    def __delitem__(self, session_id: str) -> None:
        self.pop(session_id, None)


class API(BreakableAPI):
    """An API that keeps the contract, to be broken."""

    def __init__(self, **options: Any) -> None:
        given: dict[str, Any] = {"agent": agent, "token": TOKEN, "retry_after": 1} | options
        super().__init__(**given)
        self.inside = Lenient()


class MakesMissingSessions(API):
    def _must_exist(self, session_id: str) -> None:
        pass


class DoesNotNameTheSession(API):
    async def run(self, request: server.Request) -> Reply:
        if request.names["id"].startswith("missing"):
            return said({"detail": "Not Found"}, 404)
        return await super().run(request)


class LooksThenTakes(API):
    """Two steps, with a moment in between."""

    async def run(self, request: server.Request) -> Reply:
        session_id = request.names["id"]
        free = session_id not in self.inside
        await asyncio.sleep(0.03)
        if free:
            self.inside.pop(session_id, None)
        return await super().run(request)


class Queues(API):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def run(self, request: server.Request) -> Reply:
        async with self._turns[request.names["id"]]:
            return await super().run(request)


class RunsBeside(API):
    async def run(self, request: server.Request) -> Reply:
        self.inside.pop(request.names["id"], None)
        return await super().run(request)


class SaysBusyWith200(API):
    """As Aegra does for `reject`."""

    def _later(self, code: str, message: str) -> Any:
        refusal = super()._later(code, message)
        refusal.status = 200
        return refusal


class FreesTooEarly(API):
    async def _work(self, run: Run) -> None:
        asyncio.get_running_loop().call_later(RUN / 3, self.inside.pop, run.call.session_id, None)
        await super()._work(run)


class ForgetsKeys(API):
    async def run(self, request: server.Request) -> Reply:
        answer = await super().run(request)
        if answer.status == 200:
            self.runs.pop(request.headers["Idempotency-Key"], None)
        return answer


class KnowsKeysOnlyAfterwards(API):
    async def run(self, request: server.Request) -> Reply:
        known = self.runs.get(request.headers["Idempotency-Key"])
        if known is not None and known.status == "running":
            del self.runs[known.call.key]
            self.inside.pop(known.call.session_id, None)
        return await super().run(request)


class TakesAnyBody(API):
    def _started_or_known(self, call: Call, document: Mapping[str, Any], fingerprint: bytes) -> Run:
        return super()._started_or_known(call, document, b"")


class EndsWithItsCaller(API):
    async def run(self, request: server.Request) -> Reply:
        try:
            return await super().run(request)
        except asyncio.CancelledError:
            left = self.runs.pop(request.headers["Idempotency-Key"])
            assert left.task is not None
            left.task.cancel()
            raise


class Changed(API):
    """Its answers are changed on their way out."""

    async def run(self, request: server.Request) -> Reply:
        answer = await super().run(request)
        return self.change(answer) if answer.status == 202 else answer

    def change(self, answer: Reply) -> Reply:
        raise NotImplementedError


class AcceptsElsewhere(Changed):
    def change(self, answer: Reply) -> Reply:
        elsewhere = {"Location": "http://elsewhere.invalid" + answer.headers["Location"]}
        return replace(answer, headers={**answer.headers, **elsewhere})


class AcceptsBehindTLS(Changed):
    """It does not know the gateway that speaks TLS for it."""

    def change(self, answer: Reply) -> Reply:
        behind = {"Location": "https://127.0.0.1" + answer.headers["Location"]}
        return replace(answer, headers={**answer.headers, **behind})


class AcceptsByOperation(Changed):
    """As Azure's services do: 201, a word, and its own name of the header."""

    def change(self, answer: Reply) -> Reply:
        where = {"Operation-Location": answer.headers["Location"], "Retry-After": "1"}
        kept = {name: value for name, value in answer.headers.items() if name != "Location"}
        return Reply(201, b'{"status": "In-Progress"}', kept | where)


class AcceptsByIdAtNoAddress(Changed):
    """`<run url>/<id>` is a guess, and there is nothing."""

    def change(self, answer: Reply) -> Reply:
        return said({"id": "r1", "status": "created"}, 200)


class SaysRunningAtNoAddress(Changed):
    def change(self, answer: Reply) -> Reply:
        return said({"status": "running"}, 200)


class AcceptsNamelessly(Changed):
    def change(self, answer: Reply) -> Reply:
        return said({}, 202)


class ForgetsAcceptedRuns(API):
    async def accepted(self, request: server.Request) -> Reply:
        return said({"code": "run_not_found"}, 404)


class EndsElsewhere(API):
    """303 to the result, as asynchronous request-reply has it."""

    where = ""

    async def accepted(self, request: server.Request) -> Reply:
        key = request.names["key"]
        if key.endswith("-result"):
            request.names["key"] = key.removesuffix("-result")
            return await super().accepted(request)
        answer = await super().accepted(request)
        if request.method == "GET" and answer.status == 200 and b"running" not in answer.body:
            return Reply(303, headers={"Location": self.where or f"{request.path}-result"})
        return answer


class EndsNowhere(EndsElsewhere):
    where = "http://elsewhere.invalid/"


class SpeaksInItsOwnWords(API):
    """Words that nobody knows: a poll is taken for a run that goes on."""

    async def accepted(self, request: server.Request) -> Reply:
        return said({"status": "marvellous"}, 200)


class RefusesPolls(API):
    """Redirected to a page for people."""

    async def accepted(self, request: server.Request) -> Reply:
        return Reply(302, headers={"Location": "/login"})


class NeverEnds(API):
    async def accepted(self, request: server.Request) -> Reply:
        return said({"status": "running"}, 200)


class GoesOnAfterCancel(API):
    async def accepted(self, request: server.Request) -> Reply:
        return Reply(204) if request.method == "DELETE" else await super().accepted(request)


class OffersNoCancel(API):
    async def accepted(self, request: server.Request) -> Reply:
        return Reply(405) if request.method == "DELETE" else await super().accepted(request)


class CallsItAReplay(API):
    """It sends the header, and runs again all the same."""

    async def run(self, request: server.Request) -> Reply:
        key = request.headers["Idempotency-Key"]
        known = self.runs.get(key)
        again = known is not None and known.ended_at is not None
        if again:
            del self.runs[key]
        answer = await super().run(request)
        if again:
            return replace(answer, headers={**answer.headers, "Idempotent-Replayed": "true"})
        return answer


class ForgetsOldKeys(API):
    """It keeps the last few only: the first is replayed soon afterwards, and not much later."""

    async def run(self, request: server.Request) -> Reply:
        for key in list(self.runs)[:-3]:
            del self.runs[key]
        return await super().run(request)


class RefusesKnownKeys(API):
    async def run(self, request: server.Request) -> Reply:
        known = self.runs.get(request.headers["Idempotency-Key"])
        if known is not None and known.ended_at is not None:
            return said({"code": "key_used"}, 422)
        return await super().run(request)


class Streams(API):
    """It answers as a stream, with the events of an agent."""

    last = b"data: [DONE]\n\n"

    async def run(self, request: server.Request) -> Reply:
        key = request.headers["Idempotency-Key"]
        replay = key in self.runs
        answer = await super().run(request)
        if answer.status != 200:
            return answer
        headers = {"Content-Type": "text/event-stream"} | (
            {"Idempotent-Replayed": "true"} if replay else {}
        )
        return Reply(200, b'data: {"delta": "I looked"}\n\n' + self.last, headers)


class StreamsAnError(Streams):
    last = b'event: error\ndata: {"message": "out of tokens"}\n\n'


class BreaksItsStream(Streams):
    """It hangs up before the end."""

    async def run(self, request: server.Request) -> Reply:
        answer = await super().run(request)
        if answer.status == 200:
            asyncio.get_running_loop().call_later(0.05, self._hang_up)
            return replace(answer, headers={**answer.headers, "Content-Length": "1000"})
        return answer

    def _hang_up(self) -> None:
        for connection in list(self._connections):
            if connection.task is None:
                connection.close()


class AnswersAtLength(API):
    """More than a MiB, with its word where it is not kept."""

    async def run(self, request: server.Request) -> Reply:
        answer = await super().run(request)
        document = json.loads(answer.body)
        if answer.status == 200:
            word, long = document["status"], "x" * (3 << 18)
            document = {"output": long * 2, "status": word, "steps": long}
            kept = {n: v for n, v in answer.headers.items() if n == "Idempotent-Replayed"}
            return replace(said(document, 200), headers=kept | {"Content-Type": "application/json"})
        return answer


class BehindAGateway(API):
    """Now and then the gateway answers for it."""

    asked = 0

    async def run(self, request: server.Request) -> Reply:
        self.asked += 1
        if self.asked == 3:
            page = b"<html><title>502 Bad Gateway</title></html>"
            return Reply(502, page, {"Content-Type": "text/html"})
        return await super().run(request)


class WantsAnotherToken(API):
    async def run(self, request: server.Request) -> Reply:
        return said({"detail": "Not authenticated"}, 401)


class KnowsNobody(API):
    def _must_exist(self, session_id: str) -> None:
        super()._must_exist("missing")


class WantsAHeader(API):
    """As a gateway does: without its pass one is sent to the login."""

    async def run(self, request: server.Request) -> Reply:
        if request.headers.get("X-Api-Key") != "rosebud":
            return Reply(302, headers={"Location": "/login"})
        return await super().run(request)


class NeverSaysWhen(API):
    def _later(self, code: str, message: str) -> Any:
        refusal = super()._later(code, message)
        refusal.headers.clear()
        return refusal


Answers = Callable[[web.Request], Awaitable[web.Response]]


class Small:
    """An API with one answer for everything."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answers)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/sessions/{{session_id}}/run"

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()


async def _web_page(_: web.Request) -> web.Response:
    return web.Response(text="<html>Welcome</html>", content_type="text/html")


async def _breaks(_: web.Request) -> web.Response:
    return web.Response(status=500)


async def _speaks_tls(_: web.Request) -> web.Response:
    page = (
        "<html><title>400 The plain HTTP request was sent to HTTPS port</title>"
        "<h1>400 Bad Request</h1>The plain HTTP request was sent to HTTPS port</html>"
    )
    return web.Response(status=400, text=page, content_type="text/html")


async def _bad_gateway(_: web.Request) -> web.Response:
    page = "<html><title>502 Bad Gateway</title></html>"
    return web.Response(status=502, text=page, content_type="text/html")


async def _moved(request: web.Request) -> web.Response:
    return web.Response(status=308, headers={"Location": "/elsewhere"})


async def _always_busy(_: web.Request) -> web.Response:
    return web.json_response({}, status=409, headers={"Retry-After": "0"})


async def _pending(request: web.Request) -> web.Response:
    """As LangGraph answers POST /threads/{id}/runs, with `enqueue`, and knows neither keys nor this
    address for polls."""
    if request.method != "POST":
        return web.json_response({"detail": "Not Found"}, status=404)
    return web.json_response({"run_id": str(uuid4()), "status": "pending"})


class LangGraph(Small):
    """As LangGraph answers /runs/wait with `reject`: busy is 409, keys are ignored, a missing
    thread is a 404 without a code."""

    def __init__(self) -> None:
        super().__init__(self._wait)
        self._threads: set[str] = set()

    async def _wait(self, request: web.Request) -> web.Response:
        thread = request.path
        if "missing" in thread:
            return web.json_response({"detail": "Thread or assistant not found."}, status=404)
        if thread in self._threads:
            return web.json_response({"detail": "Thread is already running a task."}, status=409)
        self._threads.add(thread)
        run = asyncio.create_task(asyncio.sleep(RUN))
        run.add_done_callback(lambda _: self._threads.discard(thread))
        await asyncio.shield(run)
        return web.json_response(
            {"messages": [{"type": "ai", "id": str(uuid4()), "content": "done"}]}
        )


KEEPERS: dict[str, Callable[[], API]] = {
    "answers when the run has ended": API,
    "accepts at once": lambda: API(accept_after=0.0),
    "accepts after a while": lambda: API(accept_after=RUN / 4),
    "accepts late": lambda: API(accept_after=RUN * 0.75),
    "runs fail": lambda: API(agent=broken_agent),
    "runs are short": lambda: API(agent=quick_agent),
    "never says when": NeverSaysWhen,
    "accepts, offers no cancel": lambda: OffersNoCancel(accept_after=RUN / 4),
    "accepts behind TLS": lambda: AcceptsBehindTLS(accept_after=0.0),
    "accepts by operation": lambda: AcceptsByOperation(accept_after=0.0),
    "ends elsewhere": lambda: EndsElsewhere(accept_after=0.0),
    "streams": Streams,
    "streams an error": StreamsAnError,
    "answers at length": AnswersAtLength,
}
BREAKERS: dict[str, tuple[Callable[[], API | Small], set[str]]] = {
    # Where every call is answered alike, token and missing session are not shown, instead of
    # failing for the same cause once more.
    "a web page": (lambda: Small(_web_page), {"answers"}),
    "broken": (lambda: Small(_breaks), {"answers"}),
    "redirects": (lambda: Small(_moved), {"answers", "redirect"}),
    "speaks TLS": (lambda: Small(_speaks_tls), {"answers"}),
    "a gateway's page": (lambda: Small(_bad_gateway), {"answers", "gateway"}),
    "wants another token": (WantsAnotherToken, {"answers"}),
    "knows nobody": (KnowsNobody, {"answers"}),
    "behind a gateway": (BehindAGateway, {"gateway"}),
    "is at no address": (
        lambda: AcceptsByIdAtNoAddress(accept_after=0.0),
        {"accepted"},
    ),
    "running at no address": (lambda: SaysRunningAtNoAddress(accept_after=0.0), {"accepted"}),
    "ends nowhere": (lambda: EndsNowhere(accept_after=0.0), {"accepted"}),
    "speaks in its own words": (lambda: SpeaksInItsOwnWords(accept_after=0.0), {"accepted"}),
    "refuses polls": (lambda: RefusesPolls(accept_after=0.0), {"accepted", "redirect"}),
    "calls it a replay": (CallsItAReplay, {"key_after", "body", "hang_up"}),
    "forgets old keys": (ForgetsOldKeys, {"key_after"}),
    "refuses known keys": (RefusesKnownKeys, {"key_after", "hang_up"}),
    "breaks its stream": (BreaksItsStream, {"answers", "stream"}),
    "always busy": (lambda: Small(_always_busy), {"answers", "token", "missing"}),
    "wants no token": (lambda: API(token=None), {"token"}),
    "makes missing sessions": (MakesMissingSessions, {"missing"}),
    "does not name the session": (DoesNotNameTheSession, {"missing"}),
    "looks, then takes": (LooksThenTakes, {"busy"}),
    "queues": (Queues, {"busy", "slow"}),
    "runs beside": (RunsBeside, {"busy", "slow"}),
    "says busy with 200": (SaysBusyWith200, {"busy", "slow", "key_during", "hang_up"}),
    "frees too early": (FreesTooEarly, {"slow"}),
    "forgets keys": (ForgetsKeys, {"key_after", "body"}),
    "knows keys only afterwards": (KnowsKeysOnlyAfterwards, {"key_during", "hang_up"}),
    "takes any body": (TakesAnyBody, {"body"}),
    "ends with its caller": (EndsWithItsCaller, {"hang_up"}),
    "accepts elsewhere": (lambda: AcceptsElsewhere(accept_after=0.0), {"accepted"}),
    "accepts namelessly": (lambda: AcceptsNamelessly(accept_after=0.0), {"accepted"}),
    "forgets accepted runs": (lambda: ForgetsAcceptedRuns(accept_after=0.0), {"accepted"}),
    "never ends": (lambda: NeverEnds(accept_after=0.0), {"accepted"}),
    "goes on after cancel": (lambda: GoesOnAfterCancel(accept_after=RUN / 4), {"cancel"}),
    "pending for ever": (
        lambda: Small(_pending),
        {"token", "missing", "busy", "key_after", "body", "accepted"},
    ),
    "LangGraph": (LangGraph, {"token", "missing", "key_after", "body", "hang_up"}),
}


@dataclass(frozen=True, slots=True)
class Seen:
    rows: dict[str, Row]
    requests: int

    def having(self, verdict: str) -> set[str]:
        return {name for name, row in self.rows.items() if row.finding.verdict == verdict}

    def __str__(self) -> str:
        return "\n".join(
            f"{row.finding.verdict:9} {name:12} {row.finding.seen}"
            for name, row in self.rows.items()
        )


async def checked(api: API | Small, turn: asyncio.Semaphore) -> Seen:
    async with turn:
        url = await api.start()
        try:
            check = Check(Settings(run_url=url, run_token=TOKEN), "s", "missing-1", 4.0)
            rows = await check.rows()
            return Seen({row.name: row for row in rows}, check.requests)
        finally:
            await api.stop()


NOT_SHOWN_BY = {
    "answers when the run has ended": {"accepted", "cancel", "stream"},
    "accepts at once": {"stream"},
    "accepts after a while": {"stream"},
    "accepts late": {"stream"},
    "runs fail": {"accepted", "cancel", "stream"},
    "runs are short": {"slow", "key_during", "hang_up", "accepted", "cancel", "stream"},
    "never says when": {"accepted", "cancel", "stream", "retry_after"},
    "accepts, offers no cancel": {"cancel", "stream"},
    "accepts behind TLS": {"stream"},
    "accepts by operation": {"stream"},
    "ends elsewhere": {"stream"},
    "streams": {"accepted", "cancel", "words"},
    "streams an error": {"accepted", "cancel", "words"},
    "answers at length": {"accepted", "cancel", "stream", "large", "words"},
}
"""The rows that an API that keeps its promises gives nothing to be seen of."""


def as_expected(name: str, seen: Seen) -> bool:
    """Whether the check said of this API what the tests below ask of it."""
    if name in BREAKERS:
        return seen.having(FAIL) == BREAKERS[name][1]
    return not seen.having(FAIL) and seen.having(NOT_SHOWN) == NOT_SHOWN_BY.get(
        name, seen.having(NOT_SHOWN)
    )


@pytest.fixture(scope="module")
def seen() -> dict[str, Seen]:
    """What the check says of each API; several are checked beside one another, as a check mostly
    waits."""

    async def all_of_them() -> dict[str, Seen]:
        made = KEEPERS | {name: make for name, (make, _) in BREAKERS.items()}
        apis = {name: make() for name, make in made.items()}
        turn = asyncio.Semaphore(20)
        found = dict(
            zip(
                apis,
                await asyncio.gather(*(checked(api, turn) for api in apis.values())),
                strict=True,
            )
        )
        # It judges by time: where the machine was held up, the runs blur, and it is asked again,
        # with few others.
        again = [name for name in apis if not as_expected(name, found[name])]
        few = asyncio.Semaphore(4)
        seen = await asyncio.gather(*(checked(made[name](), few) for name in again))
        return found | dict(zip(again, seen, strict=True))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("name", BREAKERS)
def test_a_broken_promise_is_caught(seen: dict[str, Seen], name: str) -> None:
    """An API that breaks a promise fails in that promise's row, and in no other that it keeps."""
    assert seen[name].having(FAIL) == BREAKERS[name][1], str(seen[name])


def test_every_row_has_its_breaker() -> None:
    """There is no row that no broken API makes fail, but for those that only give advice."""
    advice = {name for name, row in PROPERTIES.items() if "(advice)" in row}
    assert advice == {"words", "large", "retry_after"}
    assert set().union(*(rows for _, rows in BREAKERS.values())) == EVERYTHING - advice


def test_every_row_is_documented() -> None:
    """docs/endpoint.md has a line for each row, in the order in which they are shown."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "endpoint.md").read_text(
        encoding="utf-8"
    )
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(PROPERTIES)


@pytest.mark.parametrize(("name", "not_shown"), NOT_SHOWN_BY.items())
def test_an_api_that_keeps_its_promises_passes(
    seen: dict[str, Seen], name: str, not_shown: set[str]
) -> None:
    """No row fails where the contract is kept, whichever of its ways an API goes; what can't be
    shown is not passed off as shown."""
    assert (seen[name].having(FAIL), seen[name].having(NOT_SHOWN)) == (set(), not_shown), str(
        seen[name]
    )


@pytest.mark.parametrize("name", ["a web page", "broken", "redirects", "always busy"])
def test_where_nothing_runs_nothing_is_passed(seen: dict[str, Seen], name: str) -> None:
    """An API that runs nothing gets no verdict on its runs, is not asked much, and can't pass."""
    assert seen[name].having(NOT_SHOWN) >= ON_RUNS, str(seen[name])
    assert seen[name].requests < 12


def test_requests_are_bounded(seen: dict[str, Seen]) -> None:
    """No API gets the check to ask more often than it promises, and one that keeps the contract
    stays below that."""
    assert max(one.requests for one in seen.values()) <= REQUESTS < 80
    assert seen["answers when the run has ended"].requests < 40


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("queues", "busy", "waited for one another"),
        ("runs beside", "busy", "ran at the same time"),
        ("says busy with 200", "busy", "busy must not be answered as a success"),
        ("forgets keys", "key_after", "it ran again"),
        ("pending for ever", "key_after", "another run"),
        ("does not name the session", "missing", "HTTP 404 (read as misconfigured)"),
        ("accepts elsewhere", "accepted", "its address is on another host"),
        ("accepts behind TLS", "accepted", "noted: the API gives the run's address as https://"),
        ("accepts by operation", "accepted", "by Operation-Location"),
        ("accepts by operation", "retry_after", "with Retry-After (1 s)"),
        ("is at no address", "accepted", "nothing is at the address of its id"),
        ("running at no address", "accepted", "neither a Location nor a run_id"),
        ("ends nowhere", "accepted", "its result is elsewhere"),
        ("speaks in its own words", "accepted", "marvellous"),
        ("speaks in its own words", "words", "marvellous"),
        ("refuses polls", "accepted", "HTTP 302"),
        ("calls it a replay", "key_after", "though it is called a replay"),
        ("forgets old keys", "key_after", "at first"),
        ("breaks its stream", "stream", "broke off"),
        ("answers at length", "large", "2.3 MiB"),
        ("behind a gateway", "gateway", "1 of "),
        ("behind a gateway", "answers", "by a gateway"),
        ("speaks TLS", "answers", "write https in RECALL_RUN_URL"),
        ("wants another token", "token", "answered as every call is"),
        ("wants another token", "answers", "HTTP 401"),
        ("goes on after cancel", "cancel", "went on to its end"),
        ("redirects", "redirect", "HTTP 308 to /elsewhere"),
    ],
)
def test_what_was_seen_is_said(seen: dict[str, Seen], name: str, row: str, says: str) -> None:
    """A row that failed says what was seen, as the worker reads it, and what is to be done."""
    found = seen[name].rows[row].finding
    assert says in found.seen
    assert found.todo or found.verdict == PASS or name == "wants another token"


@pytest.mark.slow
async def test_headers_instead_of_a_token() -> None:
    """A gateway's pass in RECALL_RUN_HEADERS: without it one is sent to the login, which is a
    refusal, and no redirect of the endpoint's."""
    api = WantsAHeader(token=None)
    url = await api.start()
    try:
        settings = Settings(run_url=url, run_headers="X-Api-Key: rosebud")
        rows = {r.name: r.finding for r in await Check(settings, "s", "missing-1", 4.0).rows()}
        wrong = Settings(run_url=url, run_headers="X-Api-Key: lily")
        refused = {r.name: r.finding for r in await Check(wrong, "s", "missing-1", 4.0).rows()}
    finally:
        await api.stop()
    assert {name for name, f in rows.items() if f.verdict == FAIL} == set(), rows
    assert (rows["token"].verdict, rows["redirect"].verdict) == (PASS, PASS)
    assert "a wrong header" in rows["token"].seen
    assert {name for name, f in refused.items() if f.verdict == FAIL} == {"answers", "redirect"}
    assert refused["token"].verdict == NOT_SHOWN


@pytest.mark.parametrize("detail", ["Session not found", "Not Found"])
async def test_the_fix_for_fastapi_is_named(endpoint: Endpoint, detail: str) -> None:
    """A 404 with FastAPI's own body gets the lines that make it right."""

    async def answers(request: Request) -> Raw:
        gone = request.session == "missing-1"
        return reply(404, {"detail": detail}) if gone else reply(200, {"status": "completed"})

    endpoint.default = answers
    rows = await Check(Settings(run_url=endpoint.url), "s", "missing-1", 4.0).rows()
    found = next(row.finding for row in rows if row.name == "missing")
    assert found.verdict == FAIL and detail in found.seen
    assert found.todo is not None
    assert 'HTTPException(404, detail={"code": "session_not_found"' in found.todo
    assert "JSONResponse(" in found.todo


async def test_secrets_that_an_api_repeats(endpoint: Endpoint) -> None:
    """They are in no row, whichever part of an answer repeats them."""

    async def repeats(request: Request) -> Raw:
        said = f"{request.headers.get('x-api-key')} {request.headers.get('authorization')}"
        body = {"detail": said, "status": said, "error": said}
        return reply(404 if request.session == "missing-1" else 202, body, {"location": f"/{said}"})

    endpoint.default = repeats
    settings = Settings(
        run_url=endpoint.url, run_token="rosebud-1", run_headers="X-Api-Key: lily-2"
    )
    rows = await Check(settings, "s", "missing-1", 0.5).rows()
    said = str([row.shown() for row in rows])
    assert "…" in said and "rosebud-1" not in said and "lily-2" not in said


@pytest.mark.parametrize(("whole", "verdict"), [(True, PASS), (False, FAIL)])
async def test_a_compressed_answer(endpoint: Endpoint, whole: bool, verdict: str) -> None:
    """It is unpacked, as the worker does; one that is not whole is no answer."""
    packed = gzip.compress(b'{"status": "completed"}')
    endpoint.default = reply(
        text=packed if whole else packed[:-4], headers={"content-encoding": "gzip"}
    )
    rows = await Check(Settings(run_url=endpoint.url), "s", "missing-1", 4.0).rows()
    found = {row.name: row.finding for row in rows}
    assert found["answers"].verdict == verdict
    assert whole == (found["words"].seen == "completed (well)")


async def test_an_answer_without_end(endpoint: Endpoint) -> None:
    """It is read until its time is up, and the row says that it began."""
    endpoint.default = Raw(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: 1\n\n", keep=True
    )
    rows = await Check(Settings(run_url=endpoint.url), "s", "missing-1", 0.5).rows()
    found = {row.name: row.finding for row in rows}
    assert {name for name, f in found.items() if f.verdict == FAIL} == {"answers", "stream"}
    assert "did not end within 0.5 s (HTTP 200, 9 octets so far)" in found["answers"].seen


# --- what is sent ---------------------------------------------------------------------------------


async def test_probes_are_what_the_worker_sends(endpoint: Endpoint) -> None:
    """Each probe has the shape of the worker's own calls and says what it is; a key has one body,
    but where that is the question; no cookie is kept."""

    async def guarded(request: Request) -> Raw:
        known = request.headers.get("authorization") == f"Bearer {TOKEN}"
        return (
            reply(200, {"status": "completed"}, {"set-cookie": "crumb=1; path=/"})
            if known
            else reply(401)
        )

    endpoint.default = guarded
    settings = Settings(run_url=endpoint.url, run_token=TOKEN, signing_secret="whsec_c2VjcmV0")
    assert {row.name for row in await Check(settings, "s 1", "gone", 5.0).rows()} == EVERYTHING
    known = json.loads(body(claim_with()))
    bodies = defaultdict(set)
    for request in endpoint.requests:
        assert request.line.startswith("POST /sessions/s%201/run ") or request.session == "gone"
        assert (request.document.keys(), request.document["recall"].keys()) == (
            known.keys(),
            known["recall"].keys(),
        )
        assert MESSAGE in request.document["user_message"] and "harmless" in MESSAGE
        assert (
            request.document["system_message"]
            == f"[Scheduled recall] {request.document['user_message']}"
        )
        assert request.headers["webhook-id"] == request.key and request.headers[
            "webhook-signature"
        ].startswith("v1,")
        assert "cookie" not in request.headers
        bodies[request.key].add(request.body)
    assert {r.headers.get("authorization", "")[:13] for r in endpoint.requests} == {
        "Bearer secret",
        "Bearer wrong-",
        "",
    }
    assert sorted(map(len, bodies.values()))[-2:] == [1, 2]


# --- the command ----------------------------------------------------------------------------------


Command = Callable[..., Awaitable[tuple[int, str, str]]]


async def run_command(*arguments: str, **environ: str) -> tuple[int, str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "recall_worker",
        "check-endpoint",
        *arguments,
        env=kept | environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(40):
        said, talk = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode(), talk.decode()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process, on a thread with an event loop of its own: what the console
    script would do."""

    async def run(*arguments: str, **environ: str) -> tuple[int, str, str]:
        for name in [name for name in os.environ if name.startswith("RECALL_")]:
            monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["recall-worker", "check-endpoint", *arguments])

        def called() -> int:
            try:
                main()
            except SystemExit as ended:
                return int(ended.code or 0)
            return 0

        status = await asyncio.to_thread(called)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.mark.slow
@pytest.mark.parametrize("accept_after", [None, 0.1], ids=["off", "on"])
async def test_the_reference_api_passes(accept_after: float | None) -> None:
    """Exit status 0 and a line for each row, where nothing failed; the token is nowhere in it."""
    api = ReferenceAPI(agent, token=TOKEN, accept_after=accept_after)
    url = await api.start()
    try:
        status, said, talk = await run_command(
            "--session", "s", RECALL_RUN_URL=url, RECALL_RUN_TOKEN=TOKEN
        )
    finally:
        await api.stop()
    assert status == 0, said
    verdicts = [line.split("  ")[0] for line in said.splitlines() if not line.startswith(" ")]
    assert len(verdicts) == len(PROPERTIES)
    # Of the kinds of answers that it does not give, nothing is shown.
    assert verdicts.count(NOT_SHOWN) == (1 if accept_after is not None else 3)
    assert set(verdicts) == {PASS, NOT_SHOWN}
    assert TOKEN not in said + talk


@pytest.mark.slow
async def test_a_failure_is_exit_status_1() -> None:
    """Exit status 1, and one JSON document with each row, where something failed; the URL may be an
    argument."""
    api = MakesMissingSessions(agent=quick_agent)
    url = await api.start()
    try:
        status, said, _ = await run_command(
            url,
            "--session",
            "s",
            "--missing-session",
            "missing-2",
            "--json",
            RECALL_RUN_TOKEN=TOKEN,
        )
    finally:
        await api.stop()
    document = json.loads(said)
    described = Draft202012Validator({**documents(), "$ref": "#/$defs/check-endpoint"})
    described.validate(document)
    assert (status, document["verdict"], document["session"]) == (1, FAIL, "s")
    assert [row["row"] for row in document["rows"]] == list(PROPERTIES)
    assert [row["row"] for row in document["rows"] if row["verdict"] == FAIL] == ["missing"]
    assert document["requests"] < REQUESTS
    assert "missing-2" in next(row["seen"] for row in document["rows"] if row["row"] == "missing")
    assert "missing-2" in {call.session_id for call in api.calls}


@pytest.mark.slow
async def test_nobody_there_is_exit_status_3() -> None:
    """A refused connection is a trouble with a hint."""
    status, said, talk = await run_command(f"http://127.0.0.1:{free_port()}/run", "--session", "s")
    assert (status, said) == (3, "")
    assert talk.splitlines()[1].startswith("Error: the endpoint can't be reached: ")
    assert talk.splitlines()[2].startswith("Try: ")


@pytest.mark.parametrize(
    ("arguments", "environ", "says"),
    [
        (["ftp://x/run", "--session", "s"], {}, "Error: URL is no address"),
        (["http://u:p@x/run", "--session", "s"], {}, "user name or password"),
        (["--session", "s"], {}, "RECALL_RUN_URL is not set"),
        (["http://x/run"], {}, "--session"),
        (["http://x/run", "--session", ".."], {}, "can't be a session's id"),
        (
            ["http://x/run", "--session", "s", "--missing-session", ""],
            {},
            "can't be a session's id",
        ),
        (["http://x/run", "--session", "\udce9"], {}, "can't be a session's id"),
        (
            ["http://x/run", "--session", "s"],
            {"RECALL_PROTOCOL": "langgraph"},
            "RECALL_PROTOCOL is langgraph",
        ),
        (
            ["http://x/run", "--session", "s"],
            {"RECALL_RUN_TOKEN_FILE": "/nowhere"},
            "RECALL_RUN_TOKEN_FILE can't be read",
        ),
    ],
    ids=[
        "no address",
        "password",
        "no URL",
        "no session",
        "dots",
        "empty",
        "no text",
        "other protocol",
        "no token file",
    ],
)
async def test_usage_is_exit_status_2(
    command: Command, arguments: list[str], environ: dict[str, str], says: str
) -> None:
    """What can't be asked at all is refused before anything is sent."""
    status, said, talk = await command(*arguments, **environ)
    assert (status, said) == (2, "")
    assert says in talk and "Traceback" not in talk


HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\x9b31m"
BOMB = gzip.compress(b"[" * 30_000_000)


async def _endless(request: Request) -> Raw:
    return Raw(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + b'["' + b"x" * (3 << 20)
    )


@pytest.mark.parametrize(
    "answer",
    [
        reply(422, {"error": HOSTILE, "code": HOSTILE}),
        reply(200, {"status": "failed", "error": HOSTILE}),
        reply(307, headers={"location": "http://x/\x1b[2J" + "y" * 5000}),
        reply(202, {}, {"location": "/runs/\x1b[2J"}),
        reply(200, text=b"{" * 200_000),
        reply(200, text=BOMB, headers={"content-encoding": "gzip"}),
        _endless,
        Raw(b"HTTP/1.1 200 \x1b[2J\r\ncontent-length: 0\r\n\r\n", keep=True),
        Raw(b"\x1b[2J garbage\r\n\r\n"),
        Raw(reset=True),
    ],
    ids=[
        "error text",
        "failed run",
        "redirect",
        "location",
        "deep JSON",
        "packed",
        "endless",
        "status line",
        "garbage",
        "reset",
    ],
)
async def test_hostile_answers(endpoint: Endpoint, command: Command, answer: Any) -> None:
    """Whatever a server sends ends in rows: nothing steers the terminal, nothing is unpacked
    without bounds, no traceback is seen."""
    endpoint.default = answer
    status, said, talk = await command(
        endpoint.url, "--session", "s", "--timeout", "5", RECALL_RUN_TOKEN=TOKEN
    )
    assert status == 1, talk
    assert "Traceback" not in talk
    assert all(c.isprintable() or c == "\n" for c in said + talk)
    assert max(map(len, said.splitlines())) < 2000
    assert 0 < len(endpoint.requests) <= REQUESTS

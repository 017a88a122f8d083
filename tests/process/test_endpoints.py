"""The endpoints that people have: gateways, streams, large answers, addresses of all kinds, tokens
that are replaced. The real daemon against raw sockets that count requests."""

from __future__ import annotations

import asyncio
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Answer, Endpoint, Gate, Raw, Request, reply
from .test_corridor import row
from .test_lease import eventually, promise, rows

ON = reply(200, {"status": "running"})
DONE = reply(200, {"status": "completed"})
GUESS = "/sessions/acc/run/r1"
BAD_GATEWAY = reply(
    502, text=b"<html><title>502 Bad Gateway</title></html>", headers={"content-type": "text/html"}
)
NOT_FOUND = reply(404, {"detail": "Session not found"})


async def accepts(
    app: Application, endpoint: Endpoint, answer: Raw, polls: dict[str, list[Answer]]
) -> None:
    """A recall that is due now, whose call is answered so; what is polled, likewise."""
    endpoint.script("acc", answer)
    for run, answers in polls.items():
        endpoint.script(f"GET {run}", *answers)
    await promise(app, "acc", "once")


def asked(endpoint: Endpoint, method: str = "GET") -> list[str]:
    return [r.path for r in endpoint.requests if r.method == method]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "polled"),
    [
        (reply(201, {"status": "queued"}, {"location": "/runs/r1"}), "r1"),
        (reply(202, {}, {"operation-location": "/runs/r1"}), "r1"),
        (reply(200, {"status": "Pending"}, {"content-location": "/runs/r1"}), "r1"),
        (reply(200, {"id": "r1", "status": "in-progress"}), GUESS),
        (reply(201, {"runId": "r1", "status": "created"}), GUESS),
        (reply(202, {"id": "r1"}), GUESS),
        (reply(202, {"run_id": "r1", "status": {"state": 1}}), GUESS),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.data[9:12].decode(),
)
async def test_where_a_run_is_followed(
    answer: Raw, polled: str, app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """One POST, then polls at the address that the answer gives, until a final word."""
    await accepts(app, endpoint, answer, {polled: [ON, reply(500, {"status": "succeeded"})]})
    daemon = await daemons.start()
    await daemon.hears("recall.settled", outcome="answered", status="fired")
    assert len(endpoint.of("acc")) == 1 and len(asked(endpoint)) == 2
    assert asked(endpoint, "DELETE") == []


@pytest.mark.slow
async def test_an_address_with_another_scheme_and_port(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """An API behind TLS that does not know it: polled at RECALL_RUN_URL's own, with a note."""
    where = f"https://{endpoint.host}:8443/runs/r1?x=1"
    answer = reply(202, {}, {"location": where})
    await accepts(app, endpoint, answer, {"r1?x=1": [DONE]})
    daemon = await daemons.start()
    await daemon.hears("recall.settled", outcome="answered", status="fired")
    assert len(endpoint.of("acc")) == 1 and asked(endpoint) == ["/runs/r1?x=1"]
    [noted] = daemon.told("endpoint.noted")
    assert where in noted["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["location", "operation-location"])
async def test_an_address_on_another_host(
    name: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Never asked, as the token would go there; and never posted again."""
    async with Endpoint() as other:
        where = f"http://localhost:{other.port}/runs/r1"
        await accepts(app, endpoint, reply(202, {}, {name: where}), {})
        daemon = await daemons.start(run_token="rosebud-1")
        await daemon.hears("recall.settled", outcome="unknown", status="failed")
        assert other.connections == 0
    assert len(endpoint.requests) == 1
    assert where in str((await row(db, "acc"))["reason"])


@pytest.mark.slow
@pytest.mark.parametrize("status", [404, 405, 410])
async def test_a_guess_that_was_none(
    status: int, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Nothing is at the address of the id: the answer was the run's end. One POST, one GET."""
    answer = reply(200, {"id": "r1", "status": "running"})
    await accepts(app, endpoint, answer, {GUESS: [reply(status)]})
    daemon = await daemons.start()
    await daemon.hears("recall.settled", outcome="answered", status="fired")
    assert [r.method for r in endpoint.requests] == ["POST", "GET"]


@pytest.mark.slow
async def test_a_guess_is_not_spent_on_an_answer_that_shows_nothing(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A poll that is told to come back later has not found a run."""
    answer = reply(200, {"id": "r1", "status": "created"})
    later = reply(429, {}, {"retry-after": "1"})
    await accepts(app, endpoint, answer, {GUESS: [later, BAD_GATEWAY, reply(404)]})
    daemon = await daemons.start()
    await daemon.hears("recall.settled", outcome="answered", status="fired")
    assert len(endpoint.of("acc")) == 1


@pytest.mark.slow
async def test_a_run_that_is_not_known_everywhere_yet(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A replica, or a router, that answers 404 once or twice has not lost it."""
    answer = reply(202, {}, {"location": "/runs/r1"})
    missing = reply(404, text=b"404 page not found")
    await accepts(app, endpoint, answer, {"r1": [missing, ON, missing, missing, DONE]})
    daemon = await daemons.start()
    await daemon.hears("recall.settled", outcome="answered", status="fired")
    assert len(endpoint.of("acc")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "early", [ON, reply(503), reply(401), reply(303, {}, {"location": "/runs/r1-result"})]
)
async def test_a_result_that_is_not_there_yet(
    early: Raw, app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """303 leads to it: what is no end of the run ends nothing."""
    answer = reply(202, {}, {"location": "/runs/r1"})
    end = reply(303, {}, {"location": "/runs/r1-result"})
    await accepts(app, endpoint, answer, {"r1": [end], "r1-result": [early, DONE]})
    daemon = await daemons.start()
    await daemon.hears("recall.settled", outcome="answered", status="fired")
    assert asked(endpoint).count("/runs/r1-result") == 2


@pytest.mark.slow
async def test_the_run_url_is_moved_while_a_run_goes_on(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """To another port on the same host: the next worker polls there."""
    async with Endpoint() as other:
        await accepts(app, endpoint, reply(202, {}, {"location": "/runs/r1"}), {"r1": [ON]})
        other.script("GET r1", DONE)
        first = await daemons.start(lease=3)
        await endpoint.until(lambda: endpoint.of("r1", "GET"))
        await first.kill()
        second = await daemons.start(lease=3, run_url=other.url)
        await second.hears("recall.settled", outcome="answered", status="fired")
        assert [r.method for r in other.requests] == ["GET"]


@pytest.mark.slow
async def test_a_run_that_the_api_forgets_is_not_posted_again(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Once accepted, never posted again: what became of it is not known."""
    answer = reply(202, {}, {"location": "/runs/r1"})
    await accepts(app, endpoint, answer, {"r1": [ON, reply(404)]})
    daemon = await daemons.start()
    await daemon.hears("recall.settled", outcome="unknown", status="failed")
    assert len(endpoint.of("acc")) == 1


@pytest.mark.slow
async def test_polls_that_end_at_another_address(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """303 says that the result is there: it is read, once, and says how the run ended."""
    answer = reply(202, {}, {"location": "/runs/r1"})
    end = reply(303, {}, {"location": "/runs/r1-result"})
    failed = reply(200, {"status": "failed", "error": "no model"})
    await accepts(app, endpoint, answer, {"r1": [ON, end], "r1-result": [failed]})
    daemon = await daemons.start(max_attempts=1)
    [settled] = await daemon.hears("recall.settled", outcome="failed", status="failed")
    assert "no model" in settled["reason"]
    assert asked(endpoint) == ["/runs/r1", "/runs/r1", "/runs/r1-result"]


@pytest.mark.slow
@pytest.mark.parametrize("word", ["requires_action", "input-required", "Paused"])
async def test_a_question_to_a_person_is_left_to_them(
    word: str, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """It is no hanging run: never deleted, never posted again."""
    answer = reply(202, {}, {"location": "/runs/r1"})
    await accepts(app, endpoint, answer, {"r1": [ON, reply(200, {"status": word})]})
    daemon = await daemons.start(run_timeout=5)
    await daemon.hears("recall.settled", outcome="answered", status="fired")
    assert len(endpoint.of("acc")) == 1 and asked(endpoint, "DELETE") == []
    assert "a person" in str((await row(db, "acc"))["reason"])


@pytest.mark.slow
async def test_nothing_is_deleted_at_a_guess_that_shows_no_run(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """What is there may be a message, or the session. It is asked before."""
    answer = reply(202, {"id": "r1"})
    await accepts(
        app, endpoint, answer, {GUESS: [reply(503), reply(503), reply(200, {"text": "hello"})]}
    )
    daemon = await daemons.start(run_timeout=0.4)
    await daemon.hears("recall.settled", outcome="unknown", status="failed")
    await endpoint.until(lambda: len(asked(endpoint)) >= 3)
    assert asked(endpoint, "DELETE") == []


@pytest.mark.slow
async def test_polls_wait_as_they_are_told(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The first after the 202's Retry-After; 0 means a second."""
    answer = reply(202, {}, {"location": "/runs/r1", "retry-after": "1.5"})
    soon_again = reply(200, {"status": "running"}, {"retry-after": "0"})
    await accepts(app, endpoint, answer, {"r1": [soon_again, soon_again, DONE]})
    daemon = await daemons.start()
    await daemon.hears("recall.settled", status="fired")
    posted, *polls = [r.at for r in endpoint.requests]
    assert polls[0] - posted >= 1.4
    assert all(b - a >= 0.95 for a, b in pairwise(polls)) and len(polls) == 3


LARGE = b"x" * (2 << 20)


@pytest.mark.slow
async def test_a_large_poll_that_says_running(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Its word is read from what was kept, and the run goes on."""
    big = reply(text=b'{"status": "running", "state": "' + LARGE + b'"}')
    answer = reply(202, {}, {"location": "/runs/r1"})
    await accepts(app, endpoint, answer, {"r1": [big, big, DONE]})
    daemon = await daemons.start()
    await daemon.hears("recall.settled", status="fired")
    assert len(asked(endpoint)) == 3


@pytest.mark.slow
async def test_a_large_answer_is_read_to_its_end(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A run that streams its answer is not hung up on after the first MiB: its end decides."""
    first, then, left = asyncio.Event(), asyncio.Event(), False

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n200006\r\ndata: " + LARGE + b"\r\n"
        )
        await writer.drain()
        first.set()
        await then.wait()
        left = reader.at_eof() or writer.is_closing()
        end = b'\n\nevent: error\ndata: {"message": "out of tokens"}\n\n'
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(end), end))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 24)
    port = server.sockets[0].getsockname()[1]
    daemon = await daemons.start(run_url=f"http://127.0.0.1:{port}/run", max_attempts=1)
    await promise(app, "s", "once")
    await first.wait()
    await asyncio.to_thread(time.sleep, 0.3)  # It would have hung up by then.
    then.set()
    [settled] = await daemon.hears("recall.settled", outcome="failed", status="failed")
    assert not left and "out of tokens" in settled["reason"]
    server.close()


# --- tokens and headers ---------------------------------------------------------------------------


async def test_a_token_that_is_replaced(
    app: Application, endpoint: Endpoint, daemons: Daemons, tmp_path: Path
) -> None:
    """The API refuses the old one before the worker has noticed the new one: the call is made once
    more, at once, and costs nothing."""
    file = tmp_path / "token"
    file.write_text("first-word", encoding="utf-8")
    valid = "first-word"

    async def guard(request: Request) -> Raw:
        nonlocal valid
        if request.headers["authorization"] == f"Bearer {valid}":
            return reply()
        if valid == "second-word":
            file.write_text("second-word", encoding="utf-8")
        return reply(401)

    endpoint.default = guard
    daemon = await daemons.start(run_token_file=file)
    await promise(app, "a")
    await daemon.hears("recall.settled", session="a", status="fired")
    valid = "second-word"
    await promise(app, "b")
    await daemon.hears("recall.settled", session="b", status="fired", attempt=1)
    assert len(endpoint.of("b")) == 2 and len({r.key for r in endpoint.of("b")}) == 1
    valid = "third-word"
    file.write_text("third-word", encoding="utf-8")
    os.utime(file, (1, 1))
    await promise(app, "c")
    await daemon.hears("recall.settled", session="c", status="fired")
    assert len(endpoint.of("c")) == 1
    assert "-word" not in str(daemon.events)


async def test_further_headers(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons, tmp_path: Path
) -> None:
    """They go with every request, are read again when their file changes, and get into no log and
    no row, though the API repeats them."""
    file = tmp_path / "headers"
    file.write_text("# gateway\nX-Api-Key: rosebud-1\nCF-Access-Client-Id: rosebud-2\n")

    async def repeats(request: Request) -> Raw:
        return reply(422, {"error": f"what is {request.headers['x-api-key']}?"})

    endpoint.script("echo", repeats)
    endpoint.script("acc", reply(202, {}, {"location": "/runs/r1"}))
    endpoint.script("GET r1", DONE)
    daemon = await daemons.start(run_headers_file=file, run_token="rosebud-0")
    for session in ("echo", "acc"):
        await promise(app, session, "once")
        await daemon.hears("recall.settled", session=session)
    file.write_text("X-Api-Key: rosebud-3\n")
    await promise(app, "later")
    await daemon.hears("recall.settled", session="later", status="fired")
    by_session = {r.session: r.headers for r in endpoint.requests}
    for session in ("echo", "acc", "r1"):
        headers = by_session[session]
        assert (headers["x-api-key"], headers["cf-access-client-id"]) == ("rosebud-1", "rosebud-2")
        assert headers["authorization"] == "Bearer rosebud-0"
    assert by_session["later"]["x-api-key"] == "rosebud-3"
    assert "cf-access-client-id" not in by_session["later"]
    assert "rosebud" not in str(daemon.events) + str(
        await rows(db, "select * from recall_attempts")
    )
    assert str((await row(db, "echo"))["reason"]).endswith("what is …?")


# --- gateways, and sessions that are gone ---------------------------------------------------------


@pytest.mark.slow
async def test_a_restart_behind_a_gateway_fails_nobody(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Two answers, then 502 for all, then answers again: each recall runs once, none is failed, and
    few requests are made meanwhile."""
    daemon = await daemons.start(concurrency=5)
    await promise(app, "before")
    await daemon.hears("recall.settled", session="before", status="fired")
    endpoint.default = BAD_GATEWAY
    sessions = [f"s{n}" for n in range(20)]
    for session in sessions:
        await promise(app, session, "once")
    await daemon.hears("breaker.opened")
    await daemon.hears("breaker.probed", times=3)
    assert daemon.told("breaker.closed") == []
    meanwhile = len(endpoint.requests)
    endpoint.default = reply()
    await daemon.hears("breaker.closed", within=40)
    for session in sessions:
        await daemon.hears("recall.settled", within=60, session=session, status="fired")
    assert await rows(db, "select status, count(*) from session_recalls group by 1") == [
        {"status": "fired", "count": 21}
    ]
    assert len(endpoint.requests) == meanwhile + 20 and meanwhile < 1 + 20


@pytest.mark.slow
async def test_a_502_closes_no_breaker(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Opened by 503s: a gateway's answer proves no life."""
    endpoint.default = reply(503)
    daemon = await daemons.start()
    for session in ("a", "b", "c", "d"):
        await promise(app, session, "once")
    await daemon.hears("breaker.opened")
    endpoint.default = BAD_GATEWAY
    await daemon.hears("breaker.probed", times=3)
    assert daemon.told("breaker.closed") == []


async def test_a_gateways_own_deadline_costs_attempts(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """While others are answered, a session whose run breaks the server is bounded by its
    attempts."""
    endpoint.script("poison", BAD_GATEWAY)
    daemon = await daemons.start()
    for n in range(3):
        await promise(app, f"well{n}")
        await daemon.hears("recall.settled", session=f"well{n}")
        if n == 0:
            await promise(app, "poison", "once")
        await endpoint.count(n + 1, "poison", within=40)
        await daemon.hears("recall.settled", times=n + 1, session="poison")
        await db.execute(
            "update session_recalls set trigger_at = now(), planned_at = now() "
            "where session_id = 'poison' and lease is null and status = 'pending'"
        )
    await daemon.hears("recall.settled", session="poison", status="failed")
    assert len(endpoint.of("poison")) == 3 and daemon.told("breaker.opened") == []


@pytest.mark.parametrize("others", [True, False], ids=["after an answer", "at the start"])
async def test_sessions_that_are_gone_hold_up_nobody(
    others: bool, app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Two dozen sessions answered 404 as FastAPI says it: a good one's recall is called within
    seconds, and theirs are kept."""
    gone = [f"gone{n}" for n in range(24)]
    for session in gone:
        endpoint.script(session, NOT_FOUND)
    daemon = await daemons.start()
    if others:
        await promise(app, "good-0")
        await daemon.hears("recall.settled", session="good-0", status="fired")
    for session in gone:
        await promise(app, session, "once")
    await daemon.hears("recall.settled", session="gone0", outcome="misconfigured")
    for n in range(1, 4):
        await promise(app, f"good-{n}")
        [settled] = await daemon.hears("recall.settled", session=f"good-{n}", status="fired")
        assert settled["lag_ms"] < 6000
    if others:
        assert daemon.told("breaker.opened") == []
    left = await rows(db, "select distinct status from session_recalls where session_id ~ 'gone'")
    assert left == [{"status": "pending"}]


@pytest.mark.slow
async def test_a_probe_that_hangs_closes_nothing(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A gateway that takes connections and is silent: silence is no answer."""
    gates = [Gate(then=BAD_GATEWAY) for _ in range(4)]
    endpoint.default = reply(503)
    daemon = await daemons.start(concurrency=10)
    for n in range(4):
        await promise(app, f"s{n}", "once")
    await daemon.hears("breaker.opened")
    for n, gate in enumerate(gates):
        endpoint.script(f"s{n}", gate)
    await endpoint.until(lambda: sum(gate.entered.is_set() for gate in gates) >= 2, within=40)
    assert daemon.told("breaker.closed") == []
    for gate in gates:
        gate.open()
    await eventually(db, "select from session_recalls having bool_and(status = 'pending')")


async def test_a_gateway_says_when(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Its Retry-After is obeyed."""
    endpoint.script("s", reply(502, {}, {"retry-after": "1800"}))
    daemon = await daemons.start()
    await promise(app, "s", "once")
    await daemon.hears("recall.settled", session="s", verdict="defer")
    wait = "select extract(epoch from trigger_at - now())::float8 as wait from session_recalls"
    assert 1700 < (await rows(db, wait))[0]["wait"] <= 1800

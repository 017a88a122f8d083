"""The pages of RECALL_OPS_LISTEN, read from a real daemon: what it counts against what its endpoint
counted, alive, ready, refused."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from recall_worker.embedded import EmbeddedServer

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint, Gate, reply
from ..support.proxy import Proxy
from .test_corridor import soon
from .test_lease import eventually, promise, rows
from .test_outage import own_server, replicas

__all__ = ["own_server", "replicas"]  # fixtures


def _all_settled(worker: Daemon) -> bool:
    return len(worker.told("recall.settled")) == len(worker.told("recall.claimed"))


@dataclass(frozen=True, slots=True)
class Page:
    status: int
    headers: dict[str, str]
    text: str


async def address(daemon: Daemon) -> str:
    [told] = await daemon.hears("ops.listening")
    host = f"[{told['host']}]" if ":" in told["host"] else told["host"]
    return f"http://{host}:{told['port']}"


async def read(
    daemon: Daemon, path: str, method: str = "GET", within: float = 10.0, **headers: str
) -> Page:
    timeout = aiohttp.ClientTimeout(total=within)
    async with aiohttp.ClientSession(timeout=timeout) as client:
        async with client.request(method, await address(daemon) + path, headers=headers) as answer:
            return Page(
                answer.status,
                {k.lower(): v for k, v in answer.headers.items()},
                await answer.text(),
            )


Sample = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(daemon: Daemon) -> Sample:
    page = await read(daemon, "/metrics")
    assert page.status == 200
    found = {}
    for family in text_string_to_metric_families(page.text):
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


def value(sample: Sample, name: str, **labels: str) -> float | None:
    return sample.get((f"recall_worker_{name}", frozenset(labels.items())))


async def until(daemon: Daemon, path: str, status: int, within: float = 30.0) -> Page:
    """Read a page until it has this status."""
    async with asyncio.timeout(within):
        while True:
            page = await read(daemon, path)
            if page.status == status:
                return page
            await asyncio.sleep(0.1)


@pytest.mark.slow
async def test_the_counts_are_the_endpoints_own(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Outcomes, verdicts, runs and durations on /metrics are as many as the requests that the
    endpoint has read and how it answered them."""
    endpoint.script("busy", reply(409, headers={"retry-after": "1"}), reply())
    endpoint.script("refused", reply(422))
    endpoint.script("gone", reply(404, {"code": "session_not_found"}))
    daemon = await daemons.start(ops_listen=0, concurrency=5)
    sessions = ["busy", "refused", "gone", *(f"s{n}" for n in range(12))]
    for session in sessions:
        await promise(app, session)
    await daemon.hears("recall.settled", times=len(sessions) + 1)
    await endpoint.until(lambda: len(endpoint.requests) == len(sessions) + 1)
    found = await scrape(daemon)
    answered = (
        sum(1 for request in endpoint.requests if request.session not in ("refused", "gone")) - 1
    )
    assert {
        o: value(found, "outcomes_total", outcome=o)
        for o in ("answered", "busy", "refused", "gone", "unknown")
    } == {
        "answered": answered,
        "busy": 1,
        "refused": 1,
        "gone": 1,
        "unknown": 0,
    }
    assert value(found, "settles_total", verdict="finish", status="fired") == answered
    assert value(found, "settles_total", verdict="finish", status="failed") == 1
    assert value(found, "settles_total", verdict="finish", status="cancelled") == 1
    assert value(found, "settles_total", verdict="defer", status="pending") == 1
    assert value(found, "recalls_claimed_total") == len(endpoint.requests)
    assert (
        value(found, "lag_seconds_count")
        == value(found, "run_duration_seconds_count")
        == len(endpoint.requests)
    )
    # The busy session's second call is not the first of its occurrence.
    assert value(found, "lateness_seconds_count") == len(sessions)
    assert value(found, "settle_batch_size_sum") == len(endpoint.requests)
    claims = value(found, "claims_total", found="recalls")
    assert claims is not None and claims <= len(endpoint.requests)
    assert (value(found, "slots"), value(found, "slots_in_use")) == (5, 0)
    assert (value(found, "recalls_overdue"), value(found, "oldest_due_seconds")) == (0, 0)
    assert value(found, "listener_state", state="listening") == value(found, "database_up") == 1
    assert (
        value(found, "breaker_open")
        == value(found, "draining")
        == value(found, "leases_lost_total")
        == 0
    )


@pytest.mark.slow
async def test_a_fleets_counts_add_up(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Three workers share two hundred recalls that end in all kinds of ways: together they count
    what the endpoint read and the marks say."""
    for n in range(0, 200, 5):
        endpoint.script(f"s{n}", reply(409, headers={"retry-after": "1"}), reply())
        endpoint.script(f"s{n + 1}", reply(200, {"status": "failed"}), reply())
        endpoint.script(f"s{n + 2}", reply(422))
    workers = [await daemons.start(ops_listen=0, concurrency=8, max_attempts=1) for _ in range(3)]
    for n in range(200):
        await promise(app, f"s{n}")
    await eventually(
        db,
        "select 1 from session_recalls having count(*) filter (where status in ('pending', "
        "'running')) = 0",
        within=60,
    )
    for worker in workers:
        await worker.until(partial(_all_settled, worker))
    pages = [await scrape(worker) for worker in workers]
    counted = {
        outcome: sum(value(page, "outcomes_total", outcome=outcome) or 0 for page in pages)
        for outcome in ("answered", "busy", "failed", "refused", "unknown", "unavailable")
    }
    assert counted == {
        "answered": 120,
        "busy": 40,
        "failed": 40,
        "refused": 40,
        "unknown": 0,
        "unavailable": 0,
    }
    assert sum(counted.values()) == len(endpoint.requests) == 240
    marks = {
        row["outcome"]: row["n"]
        for row in await rows(
            db, "select outcome, sum(calls)::int as n from recall_attempts group by outcome"
        )
    }
    assert marks == {outcome: n for outcome, n in counted.items() if n}
    for name in (
        "lag_seconds_count",
        "run_duration_seconds_count",
        "settle_batch_size_sum",
        "recalls_claimed_total",
    ):
        assert sum(value(page, name) or 0 for page in pages) == 240, name
    assert sum(value(page, "lateness_seconds_count") or 0 for page in pages) == 200


async def test_what_is_due_and_in_nobodys_hand(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """With the one slot taken, what is due is overdue; what waits for its own session's run, is
    paused or lies ahead is not."""
    gate = Gate()
    endpoint.script("first", gate)
    daemon = await daemons.start(ops_listen=0, concurrency=1)
    await promise(app, "first", "once")
    await gate.entered.wait()
    await app.schedule("first", "immediate", soon(-100), "behind its own session's run")
    await promise(app, "later", "once", 3600)
    for session in ("waits", "waits-too", "paused"):
        await promise(app, session, "once", -100)
    await db.execute("update session_recalls set paused_at = now() where session_id = 'paused'")
    found = await scrape(daemon)
    assert (value(found, "slots_in_use"), value(found, "recalls_overdue")) == (1, 2)
    oldest = value(found, "oldest_due_seconds")
    assert oldest is not None and 99 < oldest < 160
    gate.open()


async def test_the_breaker_and_what_it_meets(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """An endpoint that wants another token opens the breaker, and is counted as misconfigured."""
    endpoint.default = reply(401)
    daemon = await daemons.start(ops_listen=0)
    for session in ("a", "b"):
        await promise(app, session)
    await daemon.hears("breaker.opened")
    await daemon.hears("recall.settled", times=2)
    found = await scrape(daemon)
    assert (value(found, "breaker_open"), value(found, "breaker_opened_total")) == (1, 1)
    misconfigured = value(found, "outcomes_total", outcome="misconfigured")
    assert misconfigured is not None and 2 <= misconfigured <= len(endpoint.requests)


@pytest.mark.slow
async def test_taken_and_lost_leases(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A worker that stood still lost its lease and counts that; the one that took it up counts
    that."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    first = await daemons.start(ops_listen=0, lease=2)
    await promise(app, "s", "once")
    await gate.entered.wait()
    first.signal(signal.SIGSTOP)
    second = await daemons.start(ops_listen=0, lease=2)
    await second.hears("recall.settled", session="s")
    first.signal(signal.SIGCONT)
    await first.hears("lease.lost")
    assert value(await scrape(first), "leases_lost_total") == 1
    assert value(await scrape(first), "recalls_aborted_total", because="lost") in (0, 1)
    assert value(await scrape(second), "leases_taken_total") == 1


async def test_a_cancelled_run_is_counted(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A recall that the application cancels in mid-run is aborted and ended, by the reason."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start(ops_listen=0)
    await promise(app, "s", "once")
    await gate.entered.wait()
    assert await app.cancel_session("s") == 1
    await daemon.hears("recall.ended", session="s")
    found = await scrape(daemon)
    assert value(found, "recalls_aborted_total", because="cancelled") == 1
    assert value(found, "recalls_ended_total", status="cancelled") == 1
    assert value(found, "outcomes_total", outcome="unknown") == 1


async def test_who_asks_for_what(daemons: Daemons) -> None:
    """GET and HEAD; other methods are refused, other addresses are not there; formats as asked for;
    no word on what serves it."""
    daemon = await daemons.start(ops_listen="127.0.0.1:0")
    for path in ("/livez", "/readyz", "/metrics"):
        whole, head = await read(daemon, path), await read(daemon, path, "HEAD")
        assert whole.status == head.status == 200 and whole.text and not head.text
        assert head.headers["content-type"] == whole.headers["content-type"]
        assert (
            whole.headers["server"] == "recall-worker"
            and whole.headers["cache-control"] == "no-store"
        )
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
            refused = await read(daemon, path, method)
            assert (refused.status, refused.headers["allow"]) == (405, "GET,HEAD"), method
    for path in ("/", "/metrics/", "/livez/..", "/etc/passwd"):
        assert (await read(daemon, path)).status == 404
    plain = await read(daemon, "/metrics", Accept="*/*")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    modern = await read(daemon, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert modern.headers["content-type"].startswith(
        "application/openmetrics-text"
    ) and modern.text.endswith("# EOF\n")
    assert await daemon.stop() == 0


async def test_a_daemon_that_says_nothing_it_was_not_asked(
    app: Application, daemons: Daemons, database: str
) -> None:
    """No session, recall, worker's secret or message is on the page, whatever was run."""
    daemon = await daemons.start(ops_listen=0, run_token="hush-token")
    recall = await promise(app, "session-of-ann")
    await daemon.hears("recall.settled", recall=recall)
    page = (await read(daemon, "/metrics")).text
    assert not [
        word
        for word in (recall, "session-of-ann", "come back", "hush-token", database)
        if word in page
    ]


@pytest.mark.slow
async def test_an_address_that_is_taken(daemons: Daemons) -> None:
    """Refused in a sentence with what to do, before anything is claimed; so is one that isn't this
    host's."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for where, says in (
            (f"127.0.0.1:{port}", "Address already in use"),
            (f"192.0.2.1:{port}", "Cannot assign requested address"),
        ):
            daemon = await daemons.start(ready=False, ops_listen=where)
            assert await daemon.exit() == 1
            assert len(daemon.talk) == 2 and daemon.told("worker.started") == []
            assert (
                daemon.talk[0].startswith("Error: RECALL_OPS_LISTEN: nothing can listen on ")
                and says in daemon.talk[0]
            )
            assert daemon.talk[1].startswith("Try: another address in RECALL_OPS_LISTEN")


async def test_a_host_that_has_no_name(daemons: Daemons) -> None:
    """A host that nobody knows is refused likewise."""
    daemon = await daemons.start(ready=False, ops_listen="nobody.invalid:9464")
    assert await daemon.exit() == 1
    assert len(daemon.talk) == 2 and daemon.talk[0].startswith("Error: RECALL_OPS_LISTEN")


@pytest.mark.slow
async def test_a_worker_that_stands_still_is_not_alive(daemons: Daemons) -> None:
    """SIGSTOP: /livez does not answer; SIGCONT: it does."""
    daemon = await daemons.start(ops_listen=0)
    assert (await read(daemon, "/livez")).status == 200
    daemon.signal(signal.SIGSTOP)
    with pytest.raises(asyncio.TimeoutError):
        await read(daemon, "/livez", within=1.0)
    daemon.signal(signal.SIGCONT)
    assert (await until(daemon, "/livez", 200)).text == "alive\n"


@pytest.mark.slow
async def test_without_postgresql_alive_but_not_ready(
    own_server: EmbeddedServer, replicas: Daemons
) -> None:
    """PostgreSQL killed: /readyz says so, /livez goes on, /metrics has what needs no database; all
    of it comes back."""
    daemon = await replicas.start(ops_listen=0)
    assert (await read(daemon, "/readyz")).text == "ready\n"
    own_server.kill()
    page = await until(daemon, "/readyz", 503)
    assert page.text.startswith("PostgreSQL: ")
    await daemon.hears("database.lost")
    assert (await read(daemon, "/livez")).status == 200
    async with asyncio.timeout(20):
        while True:
            found = await scrape(daemon)
            if value(found, "recalls_overdue") is None:
                break
            await asyncio.sleep(0.2)
    # On a busy machine PostgreSQL may have been too slow once before.
    assert value(found, "database_up") == 0
    assert value(found, "database_lost_total") == len(daemon.told("database.lost")) >= 1
    own_server.start()
    assert (await until(daemon, "/readyz", 200)).text == "ready\n"
    await daemon.hears("database.found")
    assert value(await scrape(daemon), "database_up") == 1


@pytest.mark.full
async def test_silence_keeps_no_page_waiting(database: str, daemons: Daemons) -> None:
    """Where PostgreSQL says nothing at all, pages answer within moments all the same."""
    async with Proxy(database) as proxy:
        daemon = await daemons.start(ops_listen=0, dsn=proxy.dsn)
        proxy.blackhole()
        page = await until(daemon, "/readyz", 503)
        assert page.text == "PostgreSQL: PostgreSQL has not answered for 2 s\n"
        assert (await read(daemon, "/livez", within=2)).status == 200
        assert value(await scrape(daemon), "recalls_overdue") is None
        proxy.heal()
        await until(daemon, "/readyz", 200)


@pytest.mark.slow
async def test_a_schema_that_asks_for_newer_code(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """An upgrade that leaves this code behind makes it not ready, with what to do: at once, and
    while it drains because of that."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start(ops_listen=0)
    await promise(app, "s", "once")
    await gate.entered.wait()
    await until(daemon, "/readyz", 200)
    await db.execute(
        "update recall_schema set oldest_code = 9999 where version = (select max(version) from "
        "recall_schema)"
    )
    page = await until(daemon, "/readyz", 503)
    assert (
        "works with code from generation 9999 on" in page.text
        and "upgrade recall-worker" in page.text
    )
    gate.open()


async def test_a_drain_is_not_ready(app: Application, endpoint: Endpoint, daemons: Daemons) -> None:
    """From the first signal on /readyz is 503, /livez goes on, and both are gone when the last run
    has ended."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start(ops_listen=0)
    await promise(app, "s", "once")
    await gate.entered.wait()
    daemon.signal(signal.SIGTERM)
    await daemon.hears("worker.draining")
    assert (await read(daemon, "/readyz")).text == "draining: nothing more is claimed\n"
    assert (await read(daemon, "/livez")).status == 200
    found = await scrape(daemon)
    assert (value(found, "draining"), value(found, "slots_in_use")) == (1, 1)
    gate.open()
    assert await daemon.exit() == 0
    with pytest.raises(aiohttp.ClientConnectionError):
        await read(daemon, "/livez")


async def test_readers_that_hang_on_hold_up_no_stop(daemons: Daemons) -> None:
    """Connections that are open, idle or in mid-sentence, don't delay the end."""
    daemon = await daemons.start(ops_listen=0)
    port = int((await address(daemon)).rpartition(":")[2])
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
    for _, writer in idle[:10]:
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")
    await until(daemon, "/livez", 200)
    assert await daemon.stop(within=5) == 0
    for _, writer in idle:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.slow
async def test_scrapes_cost_one_question(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """However often it is scraped, PostgreSQL is asked at most every five seconds: rows that fall
    due in between are seen by the next one."""
    gate = Gate()
    endpoint.script("first", gate)
    daemon = await daemons.start(ops_listen=0, concurrency=1)
    await promise(app, "first", "once")
    await gate.entered.wait()
    began = time.monotonic()
    assert value(await scrape(daemon), "recalls_overdue") == 0
    await promise(app, "second", "once", -1)
    scrapes = 0
    while value(await scrape(daemon), "recalls_overdue") == 0:
        scrapes += 1
    assert scrapes > 10 and time.monotonic() - began > 4
    gate.open()


@pytest.fixture
def bare_proc() -> list[str]:
    """What a command line begins with to run where /proc shows processes and nothing else."""
    program = 'mount -t proc -o subset=pid proc /proc && [ ! -e /proc/stat ] && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", program, "sh"]
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip(
            "a mount namespace with a /proc of its own needs root, and a kernel from 5.8 on"
        )
    return words


async def test_the_process_is_told_of_where_proc_is_bare(
    bare_proc: list[str], daemons: Daemons
) -> None:
    """Below systemd's ProcSubset=pid, as our units have it, memory, CPU, files and the start of the
    process are on the page all the same."""
    async with Daemons(daemons.environ, before=bare_proc) as elsewhere:
        daemon = await elsewhere.start(ops_listen=0)
        found = {name: number for (name, _), number in (await scrape(daemon)).items()}
    assert abs(found["process_start_time_seconds"] - time.time()) < 60
    assert found["process_resident_memory_bytes"] > 1e7 and found["process_cpu_seconds_total"] > 0
    assert 0 < found["process_open_fds"] < found["process_max_fds"]

"""Which HTTP client carries thousands of open calls: requests a second, memory, import time, side
by side.

    python benchmarks/transport.py                      # all candidates, under two minutes
    python benchmarks/transport.py --only aiohttp,nouns --rounds 5 --seconds 2

Every candidate POSTs the same JSON body (about 300 bytes, 8 headers, a path of its own for each
session) to a sink in another process on the loopback interface and reads a small JSON answer;
connections stay open. A slot posts again as soon as its answer is in, so `open` is the number of
calls in flight at any moment. Each candidate runs in a fresh process, rounds are interleaved and
start at another candidate each time, so that a slow minute of the machine hits all of them. Shown
are medians; `±` is half the distance between the best and the worst round, in per cent. A candidate
that falls below 100 requests a second is spared the higher levels.

`own` is recall-worker's client, `former` the one that it had before: the same interface over
aiohttp (aiohttp_client.py, kept for this comparison). `run-own` and `run-former` are both below the
worker's own path for a run: the native protocol, from a claim to its outcome. `raw` is no HTTP
client: it writes ready-made bytes and counts answers. It shows that sink and machine are not what
limits the others. `witness` is an early form of `former`. `traced` asks aiohttp's TraceConfig
whether anything was sent, to show what that costs.

Besides the rates: the CPU of the process for each request at 50 open ones; the memory once all is
imported and the client is made; and what each of 1,000 calls takes that are open and not answered.

The measure is the cost of the client alone: the sink answers at once. Figures of two machines are
not comparable, ratios nearly are. A candidate whose package is missing is skipped and named below
the table.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

ANSWER_BODY = json.dumps({"run_id": "run_0123456789abcdef", "status": "completed"}).encode()
ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    % len(ANSWER_BODY)
    + ANSWER_BODY
)
HELD = 1000  # calls that are left open, to see what each takes
WARM_UP = 0.3  # seconds before counting starts: connections open, caches fill
GRACE = 1.0  # seconds an open call may take to end once counting is over
HOPELESS = (
    100  # below so many requests a second no higher level is tried: it would only hold up the rest
)
LIMIT = 1 << 20  # an answer is read no further than this
PORT = 0  # of the sink, in a candidate's process
MESSAGE = "Look at the build again, and say whether it is green. " * 4
KEEP_ALIVE = 4.0  # below the 5 s after which uvicorn closes an idle connection

Post = Callable[[int, str, dict[str, str], bytes], Awaitable[Any]]


# --------------------------------------------------------------------------------------------------


class Sink(asyncio.Protocol):
    """A minimal HTTP server: finds the end of a request, answers, keeps the connection."""

    length = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.pending = b""

    def data_received(self, data: bytes) -> None:
        data = self.pending + data if self.pending else data
        answers = 0
        if data.startswith(b"POST /held"):
            self.pending = data
            return  # Until the caller hangs up.
        while (head := data.find(b"\r\n\r\n")) >= 0:
            found = self.length.search(data, 0, head)
            end = head + 4 + (int(found[1]) if found else 0)
            if len(data) < end:
                break
            data = data[end:]
            answers += 1
        self.pending = data
        if answers:
            self.transport.write(ANSWER * answers)


async def serve() -> None:
    """Listens on a free loopback port, prints it on stdout, and ends when stdin is closed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Sink, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


# --- candidates -----------------------------------------------------------------------------------
# Each is an async context manager that takes the number of slots and returns the function that
# posts once.


@asynccontextmanager
async def httpx_own(slots: int) -> AsyncIterator[Post]:
    """httpx with its own transport, one client, limits raised."""
    import httpx

    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE
    )
    async with httpx.AsyncClient(limits=limits, timeout=30, trust_env=False) as client:

        async def post(slot: int, url: str, headers: dict[str, str], body: bytes) -> Any:
            return (await client.post(url, content=body, headers=headers)).json()

        yield post


@asynccontextmanager
async def httpx_slots(slots: int) -> AsyncIterator[Post]:
    """httpx with its own transport, a client (and so a pool of one connection) for each slot."""
    import ssl

    import httpx

    verify = ssl.create_default_context()  # one for all: it is what makes a client heavy
    limits = httpx.Limits(
        max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEP_ALIVE
    )
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                httpx.AsyncClient(limits=limits, timeout=30, trust_env=False, verify=verify)
            )
            for _ in range(slots)
        ]

        async def post(slot: int, url: str, headers: dict[str, str], body: bytes) -> Any:
            return (await clients[slot].post(url, content=body, headers=headers)).json()

        yield post


@asynccontextmanager
async def httpx_aiohttp(slots: int) -> AsyncIterator[Post]:
    """httpx.AsyncClient over the transport of the httpx-aiohttp package."""
    import httpx
    from httpx_aiohttp import AiohttpTransport

    async with (
        aiohttp_session() as session,
        httpx.AsyncClient(
            transport=AiohttpTransport(client=session), timeout=30, trust_env=False
        ) as client,
    ):

        async def post(slot: int, url: str, headers: dict[str, str], body: bytes) -> Any:
            return (await client.post(url, content=body, headers=headers)).json()

        yield post


@asynccontextmanager
async def httpcore_slots(slots: int) -> AsyncIterator[Post]:
    """httpcore without httpx: one bare connection for each slot, replaced once it is closed or
    stale.
    """
    import httpcore

    origin: httpcore.Origin | None = None
    held: list[httpcore.AsyncHTTPConnection | None] = [None] * slots

    async def post(slot: int, url: str, headers: dict[str, str], body: bytes) -> Any:
        nonlocal origin
        request = httpcore.Request(
            "POST",
            url,
            headers={"host": url.split("/", 3)[2], "content-length": str(len(body)), **headers},
            content=body,
        )
        connection = held[slot]
        if connection is None or connection.is_closed() or connection.has_expired():
            if connection is not None:
                await connection.aclose()
            origin = origin or request.url.origin
            connection = held[slot] = httpcore.AsyncHTTPConnection(
                origin, keepalive_expiry=KEEP_ALIVE
            )
        response = await connection.handle_async_request(request)
        try:
            return json.loads(await response.aread())
        finally:
            await response.aclose()

    try:
        yield post
    finally:
        for connection in held:
            if connection is not None:
                await connection.aclose()


def aiohttp_session(**options: Any) -> Any:
    """A session without a memory of its own: no cookies, no environment, no cap on connections,
    nothing unpacked.
    """
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=30, sock_connect=10),
        **options,
    )


@asynccontextmanager
async def aiohttp_bare(slots: int) -> AsyncIterator[Post]:
    """aiohttp.ClientSession as it is."""
    from yarl import URL

    async with aiohttp_session() as session:

        async def post(slot: int, url: str, headers: dict[str, str], body: bytes) -> Any:
            target = URL(url, encoded=True)
            async with session.post(
                target, data=body, headers=headers, allow_redirects=False
            ) as response:
                return json.loads(await response.read())

        yield post


@asynccontextmanager
async def aiohttp_traced(slots: int) -> AsyncIterator[Post]:
    """aiohttp with a TraceConfig that notes connections made and reused, headers and body handed
    over.
    """
    import aiohttp
    from yarl import URL

    trace = aiohttp.TraceConfig()

    async def mark(session: Any, context: Any, params: Any) -> None:
        context.trace_request_ctx.append(params)

    trace.on_connection_create_end.append(mark)
    trace.on_connection_reuseconn.append(mark)
    trace.on_request_headers_sent.append(mark)
    trace.on_request_chunk_sent.append(mark)

    async with aiohttp_session(trace_configs=[trace]) as session:

        async def post(slot: int, url: str, headers: dict[str, str], body: bytes) -> Any:
            marks: list[Any] = []
            target = URL(url, encoded=True)
            async with session.post(
                target, data=body, headers=headers, allow_redirects=False, trace_request_ctx=marks
            ) as response:
                return json.loads(await response.read())

        yield post


@asynccontextmanager
async def aiohttp_witness(slots: int) -> AsyncIterator[Post]:
    """aiohttp with a body that knows whether it was handed to a connection, and an answer read up
    to a limit.
    """
    import aiohttp
    from yarl import URL

    class Witness(aiohttp.BytesPayload):
        """The body of one call. Headers and body leave in one write, and this is asked for the body
        just before.
        """

        sent = False

        async def write_with_length(self, writer: Any, content_length: int | None) -> None:
            # A turn of the loop shows what the kernel already knows of a connection that waited:
            # closed, reset, or bytes that nobody asked for. TLS needs a second turn.
            transport = writer.transport
            secure = transport is not None and transport.get_extra_info("ssl_object") is not None
            for _ in range(2 if secure else 1):
                await asyncio.sleep(0)
            transport = writer.transport
            if transport is None or transport.is_closing() or writer.protocol.should_close:
                raise ConnectionResetError("closed before anything was sent")
            self.sent = True
            await super().write_with_length(writer, content_length)

    async with aiohttp_session() as session:

        async def post(slot: int, url: str, headers: dict[str, str], body: bytes) -> Any:
            witness = Witness(body, content_type="application/json")
            target = URL(url, encoded=True)
            async with session.post(
                target, data=witness, headers=headers, allow_redirects=False
            ) as response:
                read = bytearray()
                while len(read) <= LIMIT and (chunk := await response.content.readany()):
                    read += chunk
            if not witness.sent:
                raise AssertionError("an answer to a request that was never sent")
            return json.loads(read)

        yield post


@asynccontextmanager
async def nouns(slots: int) -> AsyncIterator[Post]:
    """httpx.Request and httpx.Response as nouns, a small transport over aiohttp between them, no
    httpx.AsyncClient.
    """
    import aiohttp
    import httpx
    from yarl import URL

    class Stream(httpx.AsyncByteStream):
        def __init__(self, response: aiohttp.ClientResponse) -> None:
            self.response = response

        async def __aiter__(self) -> AsyncIterator[bytes]:
            while chunk := await self.response.content.readany():
                yield chunk

        async def aclose(self) -> None:
            self.response.release()

    class Transport(httpx.AsyncBaseTransport):
        def __init__(self, session: aiohttp.ClientSession) -> None:
            self.session = session

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            response = await self.session.request(
                request.method,
                URL(str(request.url), encoded=True),
                data=request.content,
                headers=request.headers,
                allow_redirects=False,
            )
            return httpx.Response(
                response.status,
                headers=response.raw_headers,
                stream=Stream(response),
                request=request,
            )

    async with aiohttp_session() as session:
        transport = Transport(session)

        async def post(slot: int, url: str, headers: dict[str, str], body: bytes) -> Any:
            request = httpx.Request("POST", url, headers=headers, content=body)
            response = await transport.handle_async_request(request)
            return json.loads(await response.aread())

        yield post


@asynccontextmanager
async def pyreqwest_own(slots: int) -> AsyncIterator[Post]:
    """A client in Rust, on threads of its own. It can't say whether anything was sent."""
    from pyreqwest.client import ClientBuilder

    async with ClientBuilder().build() as client:

        async def post(slot: int, url: str, headers: dict[str, str], body: bytes) -> Any:
            response = await client.post(url).headers(headers).body_bytes(body).build().send()
            return json.loads(bytes(await response.bytes()))

        yield post


def through(client: Any) -> Post:
    """A client with the interface of recall_worker.protocols.http, used as a protocol uses it."""

    def sent() -> None:
        pass

    async def post(slot: int, url: str, headers: dict[str, str], body: bytes) -> Any:
        answer = await client.post(url, lambda: headers, body, 30.0, sent)
        return json.loads(answer.body)

    return post


@asynccontextmanager
async def own(slots: int) -> AsyncIterator[Post]:
    """recall-worker's own client: connections and httptools."""
    from recall_worker.protocols.http import HttpClient
    from recall_worker.settings import Settings

    client = HttpClient(Settings())
    yield through(client)
    await client.close()


@asynccontextmanager
async def former(slots: int) -> AsyncIterator[Post]:
    """recall-worker's client before: the same interface over aiohttp (aiohttp_client.py)."""
    from aiohttp_client import HttpClient

    from recall_worker.settings import Settings

    client = HttpClient(Settings())
    yield through(client)
    await client.close()


def as_runs(client: Any, native: Any) -> Post:
    """The native protocol's whole way, from a claim to its outcome, over this client."""
    from datetime import UTC, datetime

    from recall_worker.protocols import Call
    from recall_worker.recall import Answered, Claim

    native._http = client
    when = datetime(2027, 1, 31, 9, tzinfo=UTC)
    fields: dict[str, Any] = dict.fromkeys(Claim._fields)
    fields |= {"call_type": "once", "occurrence": 1, "rekey": 0, "attempt": 1, "octets": 0}
    fields |= {"scheduled_for": when, "missed": 0, "lateness": 0.01}

    async def post(slot: int, url: str, headers: dict[str, str], body: bytes) -> Any:
        session = url.rsplit("/", 2)[-2]
        claim = Claim(**fields | {"id": session, "session_id": session, "message": MESSAGE})
        outcome = await native.call(Call(claim, time.monotonic()))
        return {"status": "completed" if isinstance(outcome, Answered) else outcome}

    return post


def settings_for(port: int) -> Any:
    from recall_worker.settings import Settings

    return Settings(run_url=f"http://127.0.0.1:{port}/sessions/{{session_id}}/runs", run_token="t")


@asynccontextmanager
async def run_own(slots: int) -> AsyncIterator[Post]:
    """A run by the native protocol, over recall-worker's own client."""
    from recall_worker.protocols.native import Native

    native = Native(settings_for(PORT))
    yield as_runs(native._http, native)
    await native.close()


@asynccontextmanager
async def run_former(slots: int) -> AsyncIterator[Post]:
    """The same over the client before."""
    from aiohttp_client import HttpClient

    from recall_worker.protocols.native import Native

    native = Native(settings_for(PORT))
    await native.close()
    yield as_runs(HttpClient(settings_for(PORT)), native)
    await native.close()


@asynccontextmanager
async def raw(slots: int) -> AsyncIterator[Post]:
    """No client at all: bytes out, bytes in. The ceiling that sink, loop and machine allow."""

    class Pipe(asyncio.Protocol):
        waiting: asyncio.Future[bytes]

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.waiting.set_result(data)

    loop = asyncio.get_running_loop()
    pipes: list[Pipe | None] = [None] * slots

    async def post(slot: int, url: str, headers: dict[str, str], body: bytes) -> Any:
        pipe = pipes[slot]
        if pipe is None:
            host, port = url.split("/", 3)[2].split(":")
            _, pipe = await loop.create_connection(Pipe, host, int(port))
            pipes[slot] = pipe
        pipe.waiting = loop.create_future()
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        path = "/" + url.split("/", 3)[3]
        pipe.transport.write(
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{head}\r\n".encode()
            + body
        )
        return json.loads((await pipe.waiting).partition(b"\r\n\r\n")[2])

    try:
        yield post
    finally:
        for pipe in pipes:
            if pipe is not None:
                pipe.transport.close()


CANDIDATES: dict[str, tuple[Callable[[int], Any], tuple[str, ...]]] = {
    "httpx": (httpx_own, ("httpx",)),
    "httpx-slots": (httpx_slots, ("httpx",)),
    "httpcore-slots": (httpcore_slots, ("httpcore", "anyio")),
    "httpx-aiohttp": (httpx_aiohttp, ("httpx", "aiohttp", "httpx_aiohttp")),
    "nouns": (nouns, ("httpx", "aiohttp")),
    "traced": (aiohttp_traced, ("aiohttp",)),
    "witness": (aiohttp_witness, ("aiohttp",)),
    "aiohttp": (aiohttp_bare, ("aiohttp",)),
    "pyreqwest": (pyreqwest_own, ("pyreqwest",)),
    "former": (former, ("aiohttp", "aiohttp_client")),
    "own": (own, ("recall_worker.protocols.http",)),
    "run-former": (run_former, ("aiohttp", "aiohttp_client")),
    "run-own": (run_own, ("recall_worker.protocols.native",)),
    "raw": (raw, ()),
}


HOLDING = ("former", "own", "aiohttp", "raw")
"""Candidates whose open calls are weighed."""


# --------------------------------------------------------------------------------------------------


def resident(peak: bool = False) -> float:
    """Memory of this process in MB, now or at its highest. Of the kernel's own page where there is
    one: the peak that getrusage gives begins with that of the parent process.
    """
    try:
        with open("/proc/self/status") as status:
            key = "VmHWM:" if peak else "VmRSS:"
            return next(int(line.split()[1]) for line in status if line.startswith(key)) / 1024
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (1 << 20 if sys.platform == "darwin" else 1024)


def call(port: int, number: int) -> tuple[str, dict[str, str], bytes]:
    """A call as the daemon makes it: a path with the session, 8 headers, about 300 bytes."""
    key = f"0b6f4c52-7d1e-4a3b-9c55-{number:012d}"
    message = (
        "Remember to ask how the interview went, and whether the offer of "
        f"{number % 97} days still stands."
    )
    body = {
        "session_id": f"session-{number}",
        "user_message": message,
        "system_message": f"[Scheduled recall] {message}",
        "recall": {"id": key, "call_type": "once", "occurrence": 1},
    }
    headers = {
        "content-type": "application/json",
        "authorization": "Bearer 6d1f0c9be2a84b7f",
        "idempotency-key": f"{key}:1",
        "recall-attempt": "1",
        "recall-lateness": "0.012",
        "traceparent": f"00-4bf92f3577b34da6a3ce929d{number % 16**8:08x}-00f067aa0ba902b7-01",
        "webhook-timestamp": "1767225600",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    return (
        f"http://127.0.0.1:{port}/sessions/session-{number}/runs",
        headers,
        json.dumps(body).encode(),
    )


async def measure(name: str, port: int, slots: int, seconds: float) -> dict[str, Any]:
    """Keeps `slots` calls of one candidate open for `seconds` and counts what was answered."""
    numbers = itertools.count()
    done, failures, over = 0, {}, False

    async def keep_open(slot: int, post: Post) -> None:
        nonlocal done
        while not over:
            try:
                answer = await post(slot, *call(port, next(numbers)))
                if answer["status"] != "completed":
                    raise ValueError(answer)
                done += 1
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"[:120]
                failures[reason] = failures.get(reason, 0) + 1
                await asyncio.sleep(0)

    async with CANDIDATES[name][0](slots) as post:
        tasks = [asyncio.create_task(keep_open(slot, post)) for slot in range(slots)]
        await asyncio.sleep(WARM_UP)
        start, before, used = time.perf_counter(), done, time.process_time()
        await asyncio.sleep(seconds)
        took, counted = time.perf_counter() - start, done - before
        used = time.process_time() - used
        over = True
        _, late = await asyncio.wait(tasks, timeout=GRACE)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "open": slots,
        "rate": counted / took,
        "cpu": used * 1e6 / max(1, counted),
        "peak": resident(peak=True),
        "failures": failures,
    }


async def held(name: str, port: int) -> dict[str, float]:
    """Memory in MB of a process with a client that has made one call; and in KB, of each call that
    is open beside it."""
    async with CANDIDATES[name][0](HELD) as post:
        await post(0, *call(port, 0))
        before = resident()

        async def hold(slot: int) -> None:
            url, headers, body = call(port, slot)
            url = url.replace("/sessions/", "/held/")
            await post(slot, url, headers, body)

        tasks = [asyncio.create_task(hold(slot)) for slot in range(HELD)]
        await asyncio.sleep(2.0)
        after = resident()
        still = sum(not task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if still < HELD:
        raise ValueError(f"only {still} calls stayed open")
    return {"with client": before, "an open call": (after - before) * 1024 / HELD}


def candidate(name: str, port: int, levels: list[int], seconds: float) -> dict[str, Any]:
    """All levels of one candidate, smallest first, so that each level's peak is its own."""
    bare = resident()
    start = time.perf_counter()
    for package in CANDIDATES[name][1]:
        importlib.import_module(package)
    result: dict[str, Any] = {
        "import": time.perf_counter() - start,
        "bare": bare,
        "imported": resident(),
    }
    if name in HOLDING:
        result["held"] = asyncio.run(held(name, port))
    result["levels"] = []
    for slots in sorted(levels):
        result["levels"].append(asyncio.run(measure(name, port, slots, seconds)))
        if result["levels"][-1]["rate"] < HOPELESS:
            break
    return result


# --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="candidates, separated by commas: " + ", ".join(CANDIDATES))
    parser.add_argument(
        "--open", default="3,50,200,1000", help="calls open at once (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=0.7, help="for each candidate, level and round"
    )
    parser.add_argument(
        "--json", action="store_true", help="every figure of every round, as one document"
    )
    parser.add_argument("--role", choices=["sink", "candidate"], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    levels = [int(level) for level in options.open.split(",")]
    names = options.only.split(",") if options.only else list(CANDIDATES)
    if unknown := [name for name in names if name not in CANDIDATES]:
        parser.error(f"unknown candidate: {', '.join(unknown)}")

    raise_file_limit(2 * max(*levels, HELD) + 200)
    if options.role == "sink":
        asyncio.run(serve())
    elif options.role == "candidate":
        global PORT
        PORT = options.port
        print(json.dumps(candidate(names[0], options.port, levels, options.seconds)))
    else:
        report(options, names, levels)


def raise_file_limit(wanted: int) -> None:
    """A connection is a file, and the usual limit is 1,024."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, top), hard))


def missing(name: str) -> list[str]:
    from importlib.util import find_spec

    return [package for package in CANDIDATES[name][1] if find_spec(package) is None]


def report(options: argparse.Namespace, names: list[str], levels: list[int]) -> None:
    skipped = {name: missing(name) for name in names if missing(name)}
    names = [name for name in names if name not in skipped]
    bound = len(levels) * (WARM_UP + options.seconds + GRACE + 15)
    own = [
        sys.executable,
        os.path.abspath(__file__),
        "--open",
        options.open,
        "--seconds",
        str(options.seconds),
    ]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}

    with subprocess.Popen(
        [*own, "--role", "sink"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as sink:
        assert sink.stdin and sink.stdout
        port = sink.stdout.readline().strip()
        try:
            for turn in range(options.rounds):
                shift = turn * len(names) // max(options.rounds, 1)
                for name in names[shift:] + names[:shift]:
                    if sys.stderr.isatty():
                        print(
                            f"\rround {turn + 1}/{options.rounds}: {name:<16}",
                            end="",
                            file=sys.stderr,
                            flush=True,
                        )
                    command = [*own, "--role", "candidate", "--only", name, "--port", port]
                    try:
                        run = subprocess.run(
                            command, stdout=subprocess.PIPE, timeout=bound, check=True
                        )
                        results[name].append(json.loads(run.stdout))
                    except (subprocess.SubprocessError, ValueError) as error:
                        print(f"\n{name}: {error}", file=sys.stderr)
        finally:
            if sys.stderr.isatty():
                print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)
            sink.stdin.close()

    if options.json:
        print(json.dumps({"results": results, "skipped": skipped}, indent=1))
        return
    levels = sorted(levels)
    print(
        f"Requests a second; {options.rounds} rounds of {options.seconds:g} s; Python "
        f"{sys.version.split()[0]}"
    )
    print(f"{'candidate':<15}" + "".join(f"{f'{level} open':>14}" for level in levels), end="")
    print(
        f"{'µs CPU':>9}{'peak MB':>9}{'imported MB':>13}{'import s':>10}"
        f"{'client MB':>11}{'KB a call':>11}"
    )
    for name, runs in results.items():
        if not runs:
            print(f"{name:<15} no round ended")
            continue
        line = f"{name:<15}"
        for index in range(len(levels)):
            rates = [run["levels"][index]["rate"] for run in runs if index < len(run["levels"])]
            if not rates:
                line += f"{'not tried':>14}"
                continue
            middle = statistics.median(rates)
            spread = 50 * (max(rates) - min(rates)) / middle if middle else 0
            line += f"{middle:>9,.0f} ±{spread:>2.0f}%"
        peak = statistics.median(run["levels"][-1]["peak"] for run in runs)
        imported = statistics.median(run["imported"] for run in runs)
        took = statistics.median(run["import"] for run in runs)
        at = levels.index(50) if 50 in levels else 0
        used = [run["levels"][at]["cpu"] for run in runs if at < len(run["levels"])]
        cpu = f"{statistics.median(used):>9.0f}" if used else f"{'':>9}"
        print(f"{line}{cpu}{peak:>9.0f}{imported:>13.0f}{took:>10.2f}", end="")
        weighed = [run["held"] for run in runs if "held" in run]
        for what in ("with client", "an open call") if weighed else ():
            print(f"{statistics.median(held[what] for held in weighed):>11.1f}", end="")
        print()
    failures = {
        (name, why)
        for name, runs in results.items()
        for run in runs
        for at in run["levels"]
        for why in at["failures"]
    }
    for name, why in sorted(failures):
        print(f"failed calls, {name}: {why}")
    for name, packages in skipped.items():
        print(f"skipped, {name}: {', '.join(packages)} not installed")


if __name__ == "__main__":
    main()

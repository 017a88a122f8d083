"""Traces, as an OTLP collector receives them: one a run, hung together with what the API got in
`traceparent`."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from aiohttp import web

from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from ..support.postgres import free_port
from .test_lease import promise

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True, slots=True)
class Span:
    trace: str
    id: str
    parent: str
    name: str
    kind: int
    began: int
    ended: int
    failed: bool
    facts: dict[str, Any]
    service: dict[str, Any]


def plain(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


class Collector:
    """Receives OTLP over HTTP as protobuf. `spans` are those so far."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.requests: list[web.Request] = []
        self._changed = asyncio.Condition()

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.read()  # aiohttp unpacks gzip
        document = ExportTraceServiceRequest.FromString(
            gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
        )
        async with self._changed:
            self.requests.append(request)
            for resource in document.resource_spans:
                for scope in resource.scope_spans:
                    self.spans += [
                        Span(
                            s.trace_id.hex(),
                            s.span_id.hex(),
                            s.parent_span_id.hex(),
                            s.name,
                            s.kind,
                            s.start_time_unix_nano,
                            s.end_time_unix_nano,
                            s.status.code == 2,
                            plain(s.attributes),
                            plain(resource.resource.attributes),
                        )
                        for s in scope.spans
                    ]
            self._changed.notify_all()
        return web.Response(content_type="application/x-protobuf")

    async def until(self, condition: Callable[[], object], within: float = 20.0) -> None:
        async with asyncio.timeout(within), self._changed:
            await self._changed.wait_for(condition)

    def of(self, session: str) -> list[Span]:
        """The spans of the traces of a session's runs."""
        traces = [s.trace for s in self.spans if s.facts.get("session.id") == session]
        return [s for s in self.spans if s.trace in traces]

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.add_routes([web.post("/v1/traces", self.receive)])
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


@pytest.fixture
async def collector(daemons: Daemons) -> AsyncIterator[Collector]:
    async with Collector() as collecting:
        daemons.environ |= {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collecting.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        yield collecting


@pytest.mark.slow
async def test_one_trace_a_run(
    app: Application, endpoint: Endpoint, daemons: Daemons, collector: Collector
) -> None:
    """Each run is a trace of four spans, in order and without a gap; its call is the parent that
    the API was told of."""
    daemon = await daemons.start()
    for n in range(5):
        await promise(app, f"s{n}")
    await daemon.hears("recall.settled", times=5)
    await collector.until(lambda: len(collector.spans) == 20)
    for n in range(5):
        spans = {s.name: s for s in collector.of(f"s{n}")}
        root, claim, call, settle = (spans[name] for name in ("recall", "claim", "call", "settle"))
        [request] = endpoint.of(f"s{n}")
        assert request.headers["traceparent"] == f"00-{root.trace}-{call.id}-01"
        assert root.parent == "" and {s.parent for s in (claim, call, settle)} == {root.id}
        assert len({s.id for s in spans.values()}) == 4
        assert (
            root.began
            == claim.began
            <= claim.ended
            == call.began
            <= call.ended
            == settle.began
            <= settle.ended
            == root.ended
        )
        assert (call.kind, call.facts["http.response.status_code"]) == (3, 200)
        [told] = daemon.told("recall.settled", session=f"s{n}")
        assert told["traceparent"] == request.headers["traceparent"]
        assert (
            root.facts["recall.id"] == told["recall"] and root.facts["recall.outcome"] == "answered"
        )
        assert not root.failed
        assert (
            root.service["service.name"] == "recall-worker"
            and root.service["service.instance.id"] == daemon.name
        )
    assert "come back" not in str(collector.spans)


@pytest.mark.slow
async def test_runs_that_go_wrong(
    app: Application, endpoint: Endpoint, daemons: Daemons, collector: Collector
) -> None:
    """A retry is a trace of its own and both are of one recall; what is cancelled in mid-run says
    so; a busy session is no error."""
    gate = Gate()
    endpoint.script("broken", reply(500), reply())
    endpoint.script("busy", reply(409, headers={"retry-after": "60"}))
    endpoint.script("cancelled", gate)
    daemon = await daemons.start()
    for session in ("broken", "busy", "cancelled"):
        await promise(app, session)
    await gate.entered.wait()
    await app.cancel_session("cancelled")
    await daemon.hears("recall.settled", session="broken", times=2)
    await daemon.hears("recall.ended", session="cancelled")
    await collector.until(lambda: len(collector.spans) == 16)
    roots = {
        s: [span for span in collector.of(s) if span.name == "recall"]
        for s in ("broken", "busy", "cancelled")
    }
    assert [
        (s.failed, s.facts["recall.outcome"])
        for s in sorted(roots["broken"], key=lambda s: s.began)
    ] == [
        (True, "unknown"),
        (False, "answered"),
    ]
    assert len({s.trace for s in roots["broken"]}) == 2
    assert [s.failed for s in roots["busy"]] == [False]
    assert [(s.failed, s.facts["recall.status"]) for s in roots["cancelled"]] == [
        (True, "cancelled")
    ]


@pytest.mark.slow
async def test_what_the_operator_sets(
    app: Application, endpoint: Endpoint, daemons: Daemons, collector: Collector
) -> None:
    """OpenTelemetry's own variables hold: the service's name, headers, and a sampler, whose answer
    the API is told, too."""
    daemons.environ |= {
        "OTEL_SERVICE_NAME": "callbacks",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-key=k",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
    }
    daemon = await daemons.start()
    await promise(app, "s")
    await collector.until(lambda: len(collector.spans) == 4)
    service = collector.spans[0].service
    assert (service["service.name"], service["deployment.environment"]) == ("callbacks", "test")
    assert collector.requests[0].headers["x-key"] == "k"
    assert await daemon.stop() == 0
    daemons.environ["OTEL_TRACES_SAMPLER"] = "always_off"
    daemon = await daemons.start()
    await promise(app, "unseen")
    await daemon.hears("recall.settled", session="unseen")
    assert await daemon.stop() == 0
    assert len(collector.spans) == 4
    assert endpoint.of("unseen")[0].headers["traceparent"].endswith("-00")


@pytest.mark.slow
async def test_the_last_spans_are_sent(
    app: Application, daemons: Daemons, collector: Collector
) -> None:
    """What was traced just before the end is not lost."""
    daemons.environ["OTEL_BSP_SCHEDULE_DELAY"] = "60000"
    daemon = await daemons.start()
    await promise(app, "s")
    await daemon.hears("recall.settled")
    assert collector.spans == []
    assert await daemon.stop() == 0
    assert len(collector.spans) == 4


@pytest.mark.slow
async def test_a_collector_that_is_away(app: Application, daemons: Daemons) -> None:
    """Recalls are kept as ever, and the end is not held up."""
    daemons.environ |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    daemon = await daemons.start()
    for n in range(3):
        await promise(app, f"s{n}")
    await daemon.hears("recall.settled", outcome="answered", times=3)
    assert await daemon.stop(within=10) == 0
    assert daemon.talk == []


async def test_what_is_off_is_not_there(app: Application, daemons: Daemons) -> None:
    """Where nothing is switched on, the running daemon has imported neither OpenTelemetry nor
    prometheus-client nor aiohttp."""
    daemons.environ["PYTHONPROFILEIMPORTTIME"] = "1"
    daemon = await daemons.start()
    await promise(app, "s")
    await daemon.hears("recall.settled")
    assert await daemon.stop() == 0
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in daemon.talk}
    assert {"httptools", "psycopg"} <= imported
    assert not imported & {"opentelemetry", "prometheus_client", "requests", "aiohttp", "yarl"}


@pytest.mark.slow
async def test_the_extra_is_not_installed(tmp_path: Path, daemons: Daemons) -> None:
    """An endpoint for traces without the extra: a note that names it, and the work goes on."""
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("raise ImportError('not installed')\n")
    daemons.environ |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318",
        "PYTHONPATH": str(tmp_path),
    }
    daemon = await daemons.start()
    assert await daemon.stop() == 0
    assert [line for line in daemon.talk if "recall-worker[otel]" in line] == daemon.talk

"""OpenTelemetry traces, an extra: one trace for each run, with the spans claim, call and settle,
written from the events that the log is written from.

The ids exist before the spans do: they go to the API in `traceparent`, whose parent is the span of
the call, so that the API's own spans are below it. A span is written only when the run has been
settled, so that tracing never delays a run. Configured by OpenTelemetry's own OTEL_* variables,
which its SDK reads; off, and not imported, unless an OTLP endpoint is among them. The times are the
host's, for people.

Never here: messages of recalls, comments, secrets.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import AsyncIterator, Mapping
from importlib.metadata import version
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

from ..events import Events
from ..worker.worker import Worker

ENDINGS = frozenset({"recall.settled", "recall.ended", "recall.stranded", "lease.lost"})
GOOD = frozenset({"answered", "accepted", "busy", "gone"})
"""Outcomes that are no error; the others mean that the API, or the way to it, has a problem."""
ATTRIBUTES = {
    "recall": "recall.id",
    "session": "session.id",
    "occurrence": "recall.occurrence",
    "attempt": "recall.attempt",
    "outcome": "recall.outcome",
    "verdict": "recall.verdict",
    "status": "recall.status",
    "lag_ms": "recall.lag_ms",
    "lateness_ms": "recall.lateness_ms",
    "http_status": "http.response.status_code",
}
SHUTDOWN_DEADLINE = 3.0
"""Seconds that a stopping worker waits until the last spans are sent."""


class Ids(IdGenerator):
    """The ids that were sent in `traceparent`, when the spans are made; otherwise random ones."""

    def __init__(self) -> None:
        self.trace: int | None = None
        self.span: int | None = None

    def generate_trace_id(self) -> int:
        given, self.trace = self.trace, None
        return given or secrets.randbits(128) or 1

    def generate_span_id(self) -> int:
        given, self.span = self.span, None
        return given or secrets.randbits(64) or 1


class Traces:
    def __init__(self, worker: str) -> None:
        ours = {
            "service.name": "recall-worker",
            "service.version": version("recall-worker"),
            "service.instance.id": worker,
        }
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, set by the operator, win.
        resource = Resource.create().merge(Resource(ours)).merge(OTELResourceDetector().detect())
        self._ids = Ids()
        self._provider = TracerProvider(
            resource=resource, id_generator=self._ids, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("recall_worker", version("recall-worker"))

    def traceparent(self) -> str:
        """The traceparent of a run: its ids, and whether it is sampled."""
        trace, span = secrets.randbits(128) or 1, secrets.randbits(64) or 1
        sampled = (
            self._provider.sampler.should_sample(None, trace, "recall").decision
            is Decision.RECORD_AND_SAMPLE
        )
        return f"00-{trace:032x}-{span:016x}-{'01' if sampled else '00'}"

    def hear(self, event: str, facts: Mapping[str, Any]) -> None:
        """Write the trace of a run that has ended."""
        if event not in ENDINGS or "traceparent" not in facts:
            return
        _, trace, span, _ = facts["traceparent"].split("-")
        settled = time.time_ns()
        ended = settled - _ns(facts["settled_ms"])
        began = settled - _ns(facts["held_ms"])
        called = ended - _ns(facts["duration_ms"]) if "duration_ms" in facts else None
        attributes = {
            attribute: facts[fact]
            for fact, attribute in ATTRIBUTES.items()
            if facts.get(fact) is not None
        }
        self._ids.trace = int(trace, 16)
        root = self._tracer.start_span("recall", start_time=began, attributes=attributes)
        if event != "recall.settled":
            root.add_event(event, timestamp=settled)
        if "reason" in facts:
            root.set_attribute("recall.reason", facts["reason"])
        status = (
            Status(StatusCode.ERROR, facts.get("reason"))
            if facts.get("outcome") not in GOOD
            else None
        )
        if status is not None:
            root.set_status(status)
        within = set_span_in_context(root)
        self._tracer.start_span("claim", within, start_time=began).end(
            ended if called is None else called
        )
        if called is not None:
            self._ids.span = int(span, 16)
            code = attributes.get("http.response.status_code")
            asked = {"http.request.method": "POST"} | (
                {} if code is None else {"http.response.status_code": code}
            )
            call = self._tracer.start_span(
                "call", within, SpanKind.CLIENT, start_time=called, attributes=asked
            )
            if status is not None:
                call.set_status(status)
            call.end(ended)
        self._tracer.start_span("settle", within, start_time=ended).end(settled)
        root.end(settled)
        # If a trace is not sampled, no id was requested.
        self._ids.trace = self._ids.span = None

    def close(self) -> None:
        """Send the remaining spans and wait briefly; a collector that is down delays nothing."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(SHUTDOWN_DEADLINE)


def _ns(ms: float) -> int:
    return int(ms * 1e6)


@contextlib.asynccontextmanager
async def traced(worker: Worker, events: Events) -> AsyncIterator[None]:
    """Write traces until the context ends."""
    traces = Traces(worker.name)
    worker.traceparent = traces.traceparent
    events.listen(traces.hear)
    try:
        yield
    finally:
        traces.close()

"""The content of /metrics: counted from the events that the log is written from, and read from the
worker at each scrape.

Owns names, labels and buckets. Labels are bounded: outcomes, verdicts, states, and queues up to
QUEUES_MOST (database/ledger); never ids or sessions. A series whose labels are known beforehand
exists from the start, at zero, as otherwise a rate would miss its first increase. Names and units
follow Prometheus's rules.

Never here: HTTP (pages), queries to PostgreSQL (pages brings the answer).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ..database.ledger import Backlog, QueueBacklog
from ..recall import FINAL, Outcome, Unsent
from ..settings import KEPT
from ..statements import generation
from ..worker.run import ENDED
from ..worker.worker import WorkerStatus

WAITS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    300,
    900,
    3600,
)
RUNS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
TRIPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15)
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500)

OUTCOMES = tuple(kind.__name__.lower() for kind in get_args(Outcome) if kind is not Unsent)
VERDICTS = (
    *(("finish", status) for status in FINAL),
    *((verdict, "pending") for verdict in ("next", "retry", "defer", "release")),
)
BECAUSE = (*ENDED, "lost")
VIOLATED = ("fired", "failed", "pending")
LISTENER_STATES = ("listening", "lost", "deaf")


class Metrics:
    """Counts events; `page()` is what a scrape gets."""

    def __init__(self, status: Callable[[], WorkerStatus]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # Series that nobody asks for, one for each counter.
        self.registry = CollectorRegistry()
        self.backlog: Backlog | None = None
        """What was overdue at the last query; None if that is not known."""
        self._status = status
        self._lag = self._histogram(
            "lag_seconds",
            "From due to the request: what the worker adds. Counted when the run is settled.",
            WAITS,
        )
        self._lateness = self._histogram(
            "lateness_seconds",
            (
                "From an occurrence's nominal time to its first request: what its owner sees. "
                "Counted when the run is settled."
            ),
            WAITS,
        )
        self._run = self._histogram(
            "run_duration_seconds", "From the request to the end of the run.", RUNS
        )
        self._claim = self._histogram("claim_duration_seconds", "Round trips of claims.", TRIPS)
        self._settle = self._histogram(
            "settle_duration_seconds", "Round trips of settles, a batch each.", TRIPS
        )
        self._batch = self._histogram("settle_batch_size", "Runs settled by one round trip.", SIZES)
        self._outcomes = self._counter(
            "outcomes", "How calls ended.", ["outcome"], [(o,) for o in OUTCOMES]
        )
        self._settles = self._counter(
            "settles",
            "Verdicts written, and the recall's status after each.",
            ["verdict", "status"],
            VERDICTS,
        )
        self._claims = self._counter(
            "claims",
            "Queries for due recalls, by what they found.",
            ["found"],
            [("recalls",), ("nothing",)],
        )
        self._claimed = self._counter("recalls_claimed", "Recalls taken under a lease.")
        self._ended = self._counter(
            "recalls_ended",
            "Runs whose recall the application ended or deleted before they were settled.",
            ["status"],
            [(status,) for status in ENDED],
        )
        self._aborted = self._counter(
            "recalls_aborted",
            "Calls aborted, as the recall was ended by others or its lease lost.",
            ["because"],
            [(because,) for because in BECAUSE],
        )
        self._stranded = self._counter(
            "recalls_stranded", "Recalls whose claim or settle PostgreSQL refuses."
        )
        self._lost = self._counter(
            "leases_lost",
            "Runs that could not be settled, as another worker had taken over their lease.",
        )
        self._violated = self._counter(
            "leases_violated",
            (
                "Current runs whose recall somebody else settled (another scheduler, or a person), "
                "by its new status."
            ),
            ["status"],
            [(status,) for status in VIOLATED],
        )
        self._taken = self._counter(
            "leases_taken", "Expired leases of other workers that were taken over."
        )
        self._opened = self._counter("breaker_opened", "Times that the breaker opened.")
        self._probed = self._counter(
            "breaker_probes_failed", "Probes that found the endpoint still failing."
        )
        self._listener_lost = self._counter(
            "listener_lost", "Times that the LISTEN connection was lost."
        )
        self._database_lost = self._counter("database_lost", "Times that PostgreSQL was lost.")
        self._pruned = self._counter(
            "rows_pruned",
            "Rows deleted by RECALL_PRUNE: recalls by status, records of calls, of actions and of "
            "failures told.",
            ["kind"],
            [(kind,) for kind in KEPT],
        )
        self._prune = self._histogram(
            "prune_duration_seconds",
            "Sweeps through the tables to prune them, pauses included.",
            RUNS,
        )
        self._told = self._counter(
            "failures_delivered", "Failed recalls that RECALL_FAILURE_URL was told of."
        )
        self._untold = self._counter(
            "failures_deferred", "Tries to tell RECALL_FAILURE_URL that did not deliver."
        )
        self._given_up = self._counter(
            "failures_given_up", "Failed recalls that it could not be told of for a week."
        )
        self._stumbles = self._counter(
            "stumbles",
            "Defects, and statements that PostgreSQL refused.",
            ["doing"],
            [("claim",), ("call",), ("accept",), ("prune",), ("tell",)],
        )
        build = Info(
            "recall_worker_build",
            "Version, Python, and the schema that this code was made for.",
            registry=self.registry,
        )
        build.info(
            {
                "version": version("recall-worker"),
                "python": platform.python_version(),
                "schema": str(generation()),
            }
        )
        self.registry.register(_Now(self))
        _Process(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The page in the format that this `Accept` header prefers, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def hear(self, event: str, facts: Mapping[str, Any]) -> None:
        """Count an event."""
        match event:
            case "claim.answered":
                self._claims.labels("recalls" if facts["recalls"] else "nothing").inc()
                self._claim.observe(facts["took_ms"] / 1000)
            case "batch.settled":
                self._batch.observe(facts["endings"])
                self._settle.observe(facts["took_ms"] / 1000)
            case "recall.claimed":
                self._claimed.inc()
            case "recall.settled":
                self._settles.labels(facts["verdict"], facts["status"]).inc()
                self._call(facts)
            case "recall.ended":
                self._ended.labels(facts["status"]).inc()
                self._call(facts)
            case "lease.lost":
                self._lost.inc()
                self._call(facts)
            case "lease.violated":
                self._violated.labels(facts["status"]).inc()
            case "recall.stranded":
                self._stranded.inc()
                self._call(facts)
            case "recall.aborted":
                self._aborted.labels(facts["because"]).inc()
            case "lease.taken":
                self._taken.inc()
            case "breaker.opened":
                self._opened.inc()
            case "breaker.probed":
                self._probed.inc()
            case "listener.lost":
                self._listener_lost.inc()
            case "database.lost":
                self._database_lost.inc()
            case "rows.pruned":
                for kind in KEPT:
                    self._pruned.labels(kind).inc(facts[kind])
                self._prune.observe(facts["took_s"])
            case "failure.delivered":
                self._told.inc()
            case "failure.deferred" | "failure.unsubscribed":
                self._untold.inc()
            case "failure.abandoned":
                self._given_up.inc()
            case "worker.error" | "schema.broken":
                self._stumbles.labels(facts["doing"]).inc()
            case _:
                pass  # Read from the worker's state, or only for people.

    def now(self) -> Iterator[Metric]:
        """Read from the worker at this moment."""
        status = self._status()
        yield self._gauge("slots", "Runs that this worker may have at once.", status.slots)
        yield self._gauge(
            "slots_in_use", "Current runs, from the claim until they end.", status.slots_in_use
        )
        yield self._gauge(
            "breaker_open",
            "1 while the breaker is open: the endpoint is failing, only test calls are sent.",
            status.breaker == "open",
        )
        yield self._gauge(
            "database_up", "0 while PostgreSQL does not answer.", not status.database_is_lost
        )
        yield self._gauge(
            "draining", "1 after the first signal: nothing more is claimed.", status.is_draining
        )
        yield self._gauge(
            "claims_held",
            "1 while nothing is claimed: the database is a copy, or the worker was started paused.",
            status.held is not None,
        )
        listener = GaugeMetricFamily(
            "recall_worker_listener_state", "1 for the listener's state now.", labels=["state"]
        )
        for state in LISTENER_STATES:
            listener.add_metric([state], status.bell == state)
        yield listener
        if self.backlog is not None:
            yield self._gauge(
                "recalls_overdue",
                (
                    "Recalls that are due and not claimed in the queues that this worker serves, "
                    "at most 10000; none of a paused queue. Absent while PostgreSQL does not "
                    "answer."
                ),
                self.backlog.overdue,
            )
            yield self._gauge(
                "oldest_due_seconds",
                "Seconds that the oldest of them has been due.",
                self.backlog.oldest,
            )
            if self.backlog.untold is not None:
                yield self._gauge(
                    "failures_waiting",
                    (
                        "Failed recalls that RECALL_FAILURE_URL is still to be told of, at most "
                        "10000; absent where it is unset, and while PostgreSQL does not answer."
                    ),
                    self.backlog.untold,
                )
                yield self._gauge(
                    "oldest_failure_seconds",
                    "Seconds since the oldest of them.",
                    self.backlog.oldest_untold,
                )
            yield from self._queues(self.backlog.queues)

    def _queues(self, queues: Sequence[QueueBacklog]) -> Iterator[Metric]:
        """Of all queues of the table, whoever serves them: one that nobody serves has no worker to
        tell of it."""
        for name, says, values in (
            (
                "queue_overdue",
                "Recalls that are due and not claimed, by queue: 10000 at most in all.",
                [queue.overdue for queue in queues],
            ),
            (
                "queue_oldest_due_seconds",
                "Seconds that the oldest of them has been due.",
                [queue.oldest for queue in queues],
            ),
            (
                "queue_workers",
                (
                    "Live workers that claim from the queue. The same in all workers, as the other "
                    "series by queue are: take the maximum."
                ),
                [queue.workers for queue in queues],
            ),
            ("queue_paused", "1 while the queue is paused.", [queue.paused for queue in queues]),
        ):
            family = GaugeMetricFamily(f"recall_worker_{name}", says, labels=["queue"])
            for queue, value in zip(queues, values, strict=True):
                family.add_metric([queue.queue], float(value))
            yield family

    def _call(self, facts: Mapping[str, Any]) -> None:
        if facts.get("outcome") is not None:
            self._outcomes.labels(facts["outcome"]).inc()
        if "lag_ms" in facts:
            # A recall that an operator fired early is not late.
            self._lag.observe(max(0.0, facts["lag_ms"] / 1000))
            self._run.observe(facts["duration_ms"] / 1000)
            if facts["first"]:
                self._lateness.observe(max(0.0, facts["lateness_ms"] / 1000))

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"recall_worker_{name}", says, buckets=buckets, registry=self.registry)

    def _counter(
        self, name: str, says: str, labels: list[str] | None = None, known: Any = ()
    ) -> Counter:
        counter = Counter(f"recall_worker_{name}", says, labels or (), registry=self.registry)
        for values in known:
            counter.labels(*values)
        return counter

    @staticmethod
    def _gauge(name: str, says: str, value: float) -> Metric:
        return GaugeMetricFamily(f"recall_worker_{name}", says, value=float(value))


class _Process(ProcessCollector):
    """Process metrics also if /proc shows only processes, as with systemd's ProcSubset=pid, and so
    not the time of boot.
    """

    def _boot_time(self) -> float:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


class _Now(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.now()

"""Metrics for Prometheus. Imported, with its client library, when a health address is configured.

Histograms are fed while attempts run, at about a microsecond each; all else is read when it is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from flowagent.daemon import journeys
from flowagent.daemon.journeys import Journey
from flowagent.daemon.tally import Tally
from flowagent.models import FlowSpec, Outcome, Run

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG = (*SHORT, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
"""Upper bounds of histograms, seconds."""


@dataclass
class Readings:
    """What is read when metrics are asked for. None: it could not be had just now."""

    tally: Tally
    running: int
    limit: int
    lag: float
    accepting: bool  # whether it takes new runs
    store_waits: int
    queue_age: float | None  # seconds that the oldest due run it could take has waited
    sources: Mapping[str, int] = field(default_factory=dict)  # lookups, fills, filled_bytes
    free: Mapping[str, int] = field(default_factory=dict)  # bytes by directory


class Metrics:
    """The metrics of one agent; a watcher of attempts."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.queue_wait = Histogram(
            "flowagent_queue_wait_seconds",
            "From when a run was due until it was claimed.",
            buckets=LONG,
            registry=self._registry,
        )
        phases = Histogram(
            "flowagent_phase_seconds",
            "How long attempts were in each phase.",
            ["phase"],
            buckets=LONG,
            registry=self._registry,
        )
        self.phases = {phase: phases.labels(phase) for phase in journeys.PHASES}
        self.loop_lag = Histogram(
            "flowagent_loop_lag_seconds",
            "By how much the event loop was late, measured once a second.",
            buckets=SHORT,
            registry=self._registry,
        )

    def begin(self, run: Run, number: int, spec: FlowSpec, asked: float, inherited: str | None) -> Journey:
        now = time.time()
        if inherited is not None:
            return _Timed(self, journeys.RUN, now - (run.started or now))
        self.queue_wait.observe(max(0.0, asked - run.due))
        return _Timed(self, journeys.CLAIM, max(0.0, now - asked))

    def exposition(self, readings: Readings, accept: str) -> tuple[bytes, str]:
        """All metrics in the format that was asked for, and its content type."""
        try:
            encoder, kind = choose_encoder(accept)
        except Exception:  # it compares versions that are none
            encoder, kind = choose_encoder("")
        registry = _Both(self._registry, lambda: families(readings))
        return encoder(registry), kind


class _Both(CollectorRegistry):
    """What a registry has, and what was read just now."""

    def __init__(self, registry: CollectorRegistry, read: Callable[[], Iterable[Metric]]) -> None:
        super().__init__()
        self.register(registry)
        self.register(_Read(read))


class _Read(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


class _Timed(Journey):
    __slots__ = ("_metrics", "_phase", "_since")

    def __init__(self, metrics: Metrics, phase: str, passed: float) -> None:
        self._metrics = metrics
        self._phase: str | None = phase
        self._since = time.perf_counter() - passed

    def enter(self, phase: str) -> None:
        if phase == self._phase:
            return
        now = time.perf_counter()
        if self._phase is not None:
            self._metrics.phases[self._phase].observe(now - self._since)
        self._phase, self._since = phase, now

    def end(self, outcome: Outcome | None = None, again: bool = False) -> None:
        if self._phase is not None:
            self._metrics.phases[self._phase].observe(time.perf_counter() - self._since)
            self._phase = None


def families(readings: Readings) -> Iterable[Metric]:
    """Counters and gauges as of now."""
    tally = readings.tally
    yield _gauge("running", "Attempts that this agent holds.", readings.running)
    yield _gauge("limit", "Attempts that it holds at the most.", readings.limit)
    yield _gauge(
        "accepting", "1: it takes new runs; 0: it drains, or its disk is nearly full.", readings.accepting
    )
    yield _gauge("started_time_seconds", "When it started, in seconds since 1970.", tally.started)
    yield _gauge("loop_lag_last_seconds", "By how much the event loop was late last.", readings.lag)
    if readings.queue_age is not None:
        about = "How long the oldest due run that it could take has waited."
        yield _gauge("queue_age_seconds", about, readings.queue_age)
    free = GaugeMetricFamily("flowagent_disk_free_bytes", "Free bytes where it writes.", labels=["directory"])
    for directory, amount in readings.free.items():
        free.add_metric([directory], amount)
    yield free
    yield from (
        _counter("claims", "Attempts claimed.", tally.claimed),
        _counter("claim_failures", "Times that the store could not be asked for work.", tally.claims_failed),
        _counter("lease_renewals", "Times that all leases were renewed.", tally.renewals),
        _counter("lease_renewal_failures", "Times that they could not be.", tally.renewals_failed),
        _counter("leases_lost", "Attempts whose lease was lost.", tally.lost),
        _counter("retries", "Attempts after whose end the run was scheduled again.", tally.again),
        _counter(
            "store_waits", "Times that a call had to be repeated as the store was away.", readings.store_waits
        ),
        _counter("output_bytes", "Output of the attempts that have ended.", tally.output_bytes),
        _counter("hook_vetoes", "Runs that a hook has refused.", tally.vetoes),
        _counter("notification_failures", "Notifications that were given up.", tally.notices_failed),
    )
    lookups, fills = readings.sources.get("lookups", 0), readings.sources.get("fills", 0)
    yield _counter("source_cache_hits", "Sources that were in the cache.", max(0, lookups - fills))
    yield _counter("source_cache_misses", "Sources that were materialised.", fills)
    about = "Bytes of the sources that were materialised."
    yield _counter("source_cache_bytes", about, readings.sources.get("filled_bytes", 0))
    ended = CounterMetricFamily("flowagent_attempts_ended", "Attempts by how they ended.", labels=["state"])
    for state in ("completed", "failed", "crashed", "cancelled"):
        ended.add_metric([state], tally.ended[state])
    yield ended


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"flowagent_{name}", about, value=value)


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(f"flowagent_{name}", about, value=value)

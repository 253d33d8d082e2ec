"""Traces by OpenTelemetry: one span for each attempt, and one below it for each of its phases.

Imported when tracing is on; it needs the extra ``flowagent[otel]``. Where the spans go, and how many of them,
is said by OpenTelemetry's own variables (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_TRACES_SAMPLER`` …):
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

import anyio
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import flowagent
from flowagent.daemon import journeys
from flowagent.daemon.journeys import Journey
from flowagent.models import FlowSpec, Outcome, Run, State

VARIABLE = "TRACEPARENT"
"""The environment variable of flows, and of runs that continue a trace: https://www.w3.org/TR/trace-context/"""
_CONTEXT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class Tracing:
    """A watcher that makes spans of attempts."""

    def __init__(self, host: str, exporter: SpanExporter | None = None) -> None:
        resource = Resource.create({"host.name": host, "service.version": flowagent.__version__})
        if str(resource.attributes.get("service.name")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "flowagent"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("flowagent", flowagent.__version__)

    def begin(self, run: Run, number: int, spec: FlowSpec, asked: float, inherited: str | None) -> Journey:
        parent = _context(inherited or run.env.get(VARIABLE, ""))
        now = time.time_ns()
        began = now if inherited is not None else min(now, int(asked * 1e9))
        span = self._tracer.start_span(
            f"run {spec.name}",
            context=parent,
            kind=SpanKind.CONSUMER,
            start_time=began,
            attributes={
                "flowagent.run": run.id,
                "flowagent.attempt": number,
                "flowagent.flow": spec.name,
                "flowagent.version": run.version,
                "flowagent.storage": str(spec.storage["type"]),
                "flowagent.adopted": inherited is not None,
            },
        )
        return _Traced(self._tracer, span, journeys.RUN if inherited is not None else journeys.CLAIM, began)

    async def close(self, at_most: float) -> None:
        """Send what is left, for at most so many seconds."""
        with anyio.move_on_after(at_most):
            await anyio.to_thread.run_sync(self._provider.shutdown, abandon_on_cancel=True)


class _Traced(Journey):
    __slots__ = ("_context", "_name", "_phase", "_span", "_tracer")

    def __init__(self, tracer: trace.Tracer, span: Span, phase: str, began: int) -> None:
        self._tracer = tracer
        self._span = span
        self._context = trace.set_span_in_context(span, Context())
        self._name = phase
        self._phase: Span | None = tracer.start_span(phase, context=self._context, start_time=began)

    def enter(self, phase: str) -> None:
        if self._phase is not None and phase != self._name:
            self._phase.end()
            self._name = phase
            self._phase = self._tracer.start_span(phase, context=self._context)

    def environment(self) -> Mapping[str, str]:
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, self._context)
        return {name.upper(): value for name, value in carrier.items()}

    def end(self, outcome: Outcome | None = None, again: bool = False) -> None:
        if self._phase is None:
            return
        self._phase.end()
        self._phase = None
        if outcome is not None:
            self._span.set_attribute("flowagent.state", str(outcome.state))
            self._span.set_attribute("flowagent.again", again)
            if outcome.state is not State.COMPLETED:
                self._span.set_status(Status(StatusCode.ERROR, outcome.reason or str(outcome.state)))
        self._span.end()


def _context(parent: str) -> Context:
    """The context that a variable holds; an empty one, if that is not what it should be."""
    carrier = {"traceparent": parent} if _CONTEXT.fullmatch(parent) else {}
    return TraceContextTextMapPropagator().extract(carrier, Context())

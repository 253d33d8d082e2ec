"""Traces as a collector receives them, and as flows go on with them."""

from __future__ import annotations

import gzip
import re
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from tests.e2e.harness import Site, until

FLOW = """
    import os, pathlib, time
    from flowagent import flow

    @flow
    def traced(flag: str = "", fail: bool = False):
        print("parent", os.environ.get("TRACEPARENT"), flush=True)
        while flag and not pathlib.Path(flag).exists():
            time.sleep(0.02)
        assert not fail, "it was to fail"
"""


class Collector(HTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[Span] = []
        self.services: set[str] = set()


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            for attribute in group.resource.attributes:
                if attribute.key == "service.name":
                    self.server.services.add(attribute.value.string_value)
            for scope in group.scope_spans:
                self.server.spans.extend(scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def tracing(collector: Collector) -> dict[str, str]:
    return {
        "FLOWAGENT_TRACING": "otlp",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }


def value(span: Span, key: str) -> object:
    for attribute in span.attributes:
        if attribute.key == key:
            found = attribute.value
            return getattr(found, str(found.WhichOneof("value")))
    return None


def test_a_run_is_a_span_with_its_phases_below(site: Site, collector: Collector) -> None:
    site.command("register", site.write("traced.py", FLOW))
    agent = site.start(**tracing(collector))
    parent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    run = site.submit("traced", "--env", f"TRACEPARENT={parent}", "-p", "fail=true")
    site.wait_for(run)
    (whole,) = until(lambda: [span for span in collector.spans if span.name == "run traced"])
    assert whole.trace_id.hex() == "a" * 32 and whole.parent_span_id.hex() == "b" * 16
    assert value(whole, "flowagent.run") == run and value(whole, "flowagent.state") == "failed"
    assert whole.status.code == 2 and "it was to fail" in whole.status.message
    below = [span for span in collector.spans if span.parent_span_id == whole.span_id]
    assert [span.name for span in below] == ["claim", "resolve", "materialise", "start", "run", "record"]
    for before, after in pairwise(below):
        assert before.end_time_unix_nano <= after.start_time_unix_nano + 1_000_000
    assert below[0].start_time_unix_nano == whole.start_time_unix_nano
    given = re.search(r"parent (\S+)", site.output(run))
    assert given and given[1] == f"00-{whole.trace_id.hex()}-{whole.span_id.hex()}-01"
    assert collector.services == {"flowagent"}
    site.stop(agent)


def test_a_run_that_outlives_its_agent_stays_in_its_trace(site: Site, collector: Collector) -> None:
    site.command("register", site.write("traced.py", FLOW))
    agent = site.start("--name", "one", **tracing(collector))
    flag = site.shared / "flag"
    run = site.submit("traced", "-p", f"flag={flag}")
    site.wait_for(run, "running")
    until(lambda: "parent" in site.output(run))
    site.stop(agent, signal.SIGKILL)
    again = site.start("--name", "one", **tracing(collector))
    flag.touch()
    site.wait_for(run)
    site.stop(again)
    (whole,) = [span for span in collector.spans if span.name == "run traced"]
    given = re.search(r"parent 00-(\w+)-(\w+)-", site.output(run))
    assert given and (whole.trace_id.hex(), whole.parent_span_id.hex()) == given.groups()
    assert value(whole, "flowagent.adopted") is True
    below = [span for span in collector.spans if span.parent_span_id == whole.span_id]
    assert [span.name for span in below] == ["run", "record"]


def test_what_is_no_context_is_not_taken_for_one(site: Site, collector: Collector) -> None:
    site.command("register", site.write("traced.py", FLOW))
    agent = site.start(**tracing(collector))
    site.wait_for(site.submit("traced", "--env", "TRACEPARENT=garbage\x01"))
    site.stop(agent)
    (whole,) = [span for span in collector.spans if span.name == "run traced"]
    assert whole.parent_span_id == b""


def test_without_tracing_a_flow_sees_its_own_context_only(site: Site) -> None:
    site.command("register", site.write("traced.py", FLOW))
    site.start()
    run = site.submit("traced")
    site.wait_for(run)
    assert "parent None" in site.output(run)

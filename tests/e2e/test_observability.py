"""Health, status and metrics of a real agent, as those see them who ask for them."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from tests.e2e.harness import Site, until
from tests.e2e.operating import FAILING, SLEEPER, get, health_of, scrape, status


def test_an_agent_at_work_is_seen(site: Site) -> None:
    for name, text in (("sleeper", SLEEPER), ("failing", FAILING)):
        site.command("register", site.write(f"{name}.py", text))
    agent = site.start("--health-address", "127.0.0.1:0", "--limit", "1")
    url = health_of(site, agent)
    assert get(f"{url}/livez") == (200, "ok   loop\nok   calls\n")
    until(lambda: get(f"{url}/readyz")[0] == 200)
    before = scrape(url)
    assert before["flowagent_running",] == 0 and before["flowagent_limit",] == 1

    flag = site.shared / "flag"
    run = site.submit("sleeper", "-p", f"flag={flag}")
    site.wait_for(run, "running")
    waiting = site.submit("sleeper")
    (shown,) = until(lambda: [each for each in status(url)["runs"] if each["phase"] == "run"])
    assert (shown["run"], shown["flow"]) == (run, "sleeper")
    assert status(url)["state"] == "working"
    assert f"{run}  sleeper  run for" in get(f"{url}/status")[1]
    assert json.loads(get(f"{url}/status", "application/json")[1])["limit"] == 1
    during = until(lambda: (seen := scrape(url))["flowagent_queue_age_seconds",] > 0.2 and seen)
    assert during["flowagent_running",] == 1

    flag.touch()
    site.wait_for(run)
    site.wait_for(waiting)
    site.wait_for(site.submit("failing"))
    after = until(lambda: (seen := scrape(url))["flowagent_running",] == 0 and seen)
    assert after["flowagent_claims_total",] == 3
    assert after["flowagent_attempts_ended_total", "completed"] == 2
    assert after["flowagent_attempts_ended_total", "failed"] == 1
    assert after["flowagent_queue_wait_seconds_count",] == 3
    assert after["flowagent_queue_wait_seconds_sum",] > 0.2  # the second waited for the first
    for phase in ("claim", "resolve", "materialise", "start", "run", "record"):
        assert after["flowagent_phase_seconds_count", phase] == 3, phase
    assert after["flowagent_phase_seconds_sum", "run"] > 0.2
    assert after["flowagent_output_bytes_total",] > 6
    assert after["flowagent_queue_age_seconds",] == 0
    assert after["flowagent_disk_free_bytes", str(site.home)] > 0
    assert 0 < after["process_resident_memory_bytes",] < 200e6


def test_sources_count_as_hits_and_misses(site: Site) -> None:
    script = SLEEPER.replace("@flow", "@flow(storage=Local(stored_as_script=False))").replace(
        "import flow\n", "import flow\n    from flowagent.storage import Local\n"
    )
    site.command("register", site.write("sleeper.py", script))
    url = health_of(site, site.start("--health-address", "127.0.0.1:0"))
    for _ in range(3):
        site.wait_for(site.submit("sleeper"))
    seen = scrape(url)
    assert seen["flowagent_source_cache_misses_total",] == 1
    assert seen["flowagent_source_cache_hits_total",] == 2
    assert seen["flowagent_source_cache_bytes_total",] > 100


def test_what_is_not_well_is_said(site: Site) -> None:
    agent = site.start("--health-address", "127.0.0.1:0", "--reserve", "500T")
    url = health_of(site, agent)
    text = until(lambda: (answer := get(f"{url}/readyz"))[0] == 503 and "disk" in answer[1] and answer[1])
    assert "no   disk: " in text and "500T are to be" in text, text
    assert get(f"{url}/livez")[0] == 200
    assert scrape(url)["flowagent_accepting",] == 0
    assert status(url)["state"] == "disk nearly full"


def test_a_dead_launcher_makes_an_agent_unready(site: Site) -> None:
    agent = site.start("--health-address", "127.0.0.1:0")
    url = health_of(site, agent)
    until(lambda: get(f"{url}/readyz")[0] == 200)
    launcher = next(
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _parent(entry) == agent.pid
    )
    os.kill(launcher, signal.SIGSTOP)
    try:
        code, text = get(f"{url}/readyz")
        assert code == 503 and "no   launcher: no answer within" in text, text
    finally:
        os.kill(launcher, signal.SIGCONT)
    until(lambda: get(f"{url}/readyz")[0] == 200)


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return None


def test_health_is_served_at_a_socket_of_any_length(site: Site) -> None:
    path = site.root / ("x" * 120) / "health.sock"
    path.parent.mkdir()
    agent = site.start("--health-address", str(path))
    with socket.socket(socket.AF_UNIX) as client:
        directory = os.open(path.parent, os.O_PATH)
        client.connect(f"/proc/self/fd/{directory}/health.sock")
        os.close(directory)
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while data := client.recv(4096):
            answer += data
    assert answer.startswith(b"HTTP/1.1 200 ") and b"ok   loop" in answer
    site.stop(agent)
    again = site.start("--health-address", str(path))  # the stale socket is replaced
    assert "health and metrics are served" in site.log(again)


@pytest.mark.parametrize("address", ["192.0.2.1:80", "no-such-host.invalid:80", "/no/such/directory/x"])
def test_an_address_that_cannot_be_had_is_an_error(site: Site, address: str) -> None:
    done = site.command("start", "--health-address", address, code=2)
    assert done.stderr.startswith(f"Error: cannot listen at {address}: "), done.stderr
    assert done.stderr.count("\n") == 1


def ask(host: str, port: str, request: bytes) -> bytes:
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(4096), b""))


def test_hostile_requests_do_no_harm(site: Site) -> None:
    url = health_of(site, site.start("--health-address", "127.0.0.1:0"))
    host, _, port = url.removeprefix("http://").rpartition(":")
    for data in (
        b"\x00\xff garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"x" * 100_000 + b"\r\n\r\n",
        b"POST /status HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n" + b"x" * 100_000,
        b"GET /status.json?\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /drain HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"HEAD /none HTTP/1.1\r\nHost: x\r\n\r\n",
        b"HEAD / HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n" + b"x" * 100_000,
    ):
        with socket.create_connection((host, int(port)), timeout=20) as client:
            answer = b""
            try:
                client.sendall(data)
                while piece := client.recv(4096):
                    answer += piece
            except ConnectionError:
                pass  # it was not willing to hear it all
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer
    for headers in ("text/plain; version=..", "application/openmetrics-text; version=1.x", "\xff;q=é"):
        request = f"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: {headers}\r\n\r\n".encode("latin-1")
        assert ask(host, port, request).startswith(b"HTTP/1.1 200 ")
    for path in ("/livez", "/metrics", "/status"):
        answer = ask(host, port, f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\n")
        assert b"Content-Length: 0" not in answer  # it is the one of the body that a GET has
    held = [socket.create_connection((host, int(port)), timeout=20) for _ in range(100)]
    assert get(f"{url}/livez")[0] == 200  # whoever only holds connections open does not keep others out
    for each in held:
        each.close()

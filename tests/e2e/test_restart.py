"""Runs outlive the agent: killed, restarted, gone for good, drained."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest
from tests.e2e.harness import Site, processes_of, until

from flowagent.runtime.rundir import RunDirectory

LINES = """
    import time
    from flowagent import flow, Parameter
    from flowagent.run_configs import LocalRun

    @flow(run_config=LocalRun(retries=1))
    def lines(count=100, pause=0.02):
        for number in range(count):
            print("line", number, flush=True)
            time.sleep(pause)
"""


def numbers(output: str) -> list[int]:
    return [int(found) for found in re.findall(r"line (\d+)", output)]


@pytest.fixture
def lines(site: Site) -> Site:
    site.command("register", site.write("flow.py", LINES))
    return site


def test_a_killed_agent_comes_back_and_no_line_is_lost(lines: Site) -> None:
    agent = lines.start()
    run = lines.submit("lines", "-p", "count=150")
    until(lambda: "line 20" in lines.output(run))
    agent.kill()
    agent.wait()
    alive = processes_of(lines.home)
    assert alive, "the flow must live on without its agent"
    time.sleep(0.3)
    again = lines.start()
    until(lambda: '"found a live attempt"' in lines.log(again))
    shown = lines.wait_for(run)
    assert shown["state"] == "completed" and shown["attempt"] == 1, shown
    assert numbers(lines.output(run)) == list(range(150))


def test_an_end_without_an_agent_is_recorded_later(lines: Site) -> None:
    agent = lines.start()
    run = lines.submit("lines", "-p", "count=100")
    until(lambda: "line 5" in lines.output(run))
    agent.kill()
    agent.wait()
    (directory,) = lines.home.glob(f"agents/*/runs/{run}.1")
    until(lambda: RunDirectory(directory).supervisor() is None)
    lines.start()
    shown = lines.wait_for(run)
    assert (shown["state"], shown["attempt"]) == ("completed", 1), shown
    assert numbers(lines.output(run)) == list(range(100))


def test_nobody_comes_back_so_the_lease_ends_the_run_and_another_agent_repeats_it(lines: Site) -> None:
    agent = lines.start("--name", "first", "--lease", "2")
    run = lines.submit("lines", "-p", "count=400")
    until(lambda: "line 5" in lines.output(run))
    other = lines.start("--name", "second", "--lease", "2")
    agent.kill()
    agent.wait()
    killed = time.monotonic()
    until(lambda: lines.show(run)["attempt"] == 2, 15)
    # By the time that anyone else could have it, nothing of the first attempt may live.
    assert len([pid for pid in processes_of(lines.home) if _comm(pid).startswith(b"flow:lines")]) <= 1
    assert time.monotonic() - killed < 10
    first = lines.show(run)["attempts"][0]
    assert first["state"] == "crashed" and "lease lost" in first["reason"]
    lines.command("cancel", run)
    lines.wait_for(run, "cancelled")
    assert lines.stop(other) == 0


def test_without_retries_a_lost_run_is_crashed(site: Site) -> None:
    site.command("register", site.write("flow.py", LINES.replace("retries=1", "retries=0")))
    agent = site.start("--name", "first", "--lease", "1.5")
    run = site.submit("lines", "-p", "count=400")
    until(lambda: "line 5" in site.output(run))
    agent.kill()
    agent.wait()
    site.start("--name", "second", "--lease", "1.5")
    shown = site.wait_for(run)
    assert (shown["state"], "lease lost" in shown["reason"]) == ("crashed", True)


def test_sigterm_drains(lines: Site) -> None:
    agent = lines.start()
    run = lines.submit("lines", "-p", "count=50")
    until(lambda: "line 5" in lines.output(run))
    agent.send_signal(signal.SIGTERM)
    until(lambda: '"draining"' in lines.log(agent))
    late = lines.submit("lines")
    assert agent.wait(20) == 0
    assert lines.state(run) == "completed"
    assert lines.state(late) == "scheduled"
    assert processes_of(lines.home) == []


def test_an_agent_stopped_at_once_ends_the_launcher_that_a_killed_one_left(site: Site) -> None:
    killed = site.start()
    until(lambda: processes_of(site.home))
    time.sleep(0.5)  # the launcher is up
    killed.kill()
    killed.wait()
    left = processes_of(site.home)
    for process in left:
        os.kill(process, signal.SIGSTOP)  # so that the launcher does not answer before the agent is stopped
    agent = site.start()
    agent.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    for process in left:
        os.kill(process, signal.SIGCONT)
    assert agent.wait(10) == 0
    assert until(lambda: not processes_of(site.home), 5)


def test_a_second_sigterm_cancels(lines: Site) -> None:
    agent = lines.start("--grace", "1")
    run = lines.submit("lines", "-p", "count=4000")
    until(lambda: "line 5" in lines.output(run))
    agent.send_signal(signal.SIGTERM)
    until(lambda: '"draining"' in lines.log(agent))
    assert lines.stop(agent) == 0
    shown = lines.show(run)
    assert shown["state"] == "cancelled" and "was stopped" in shown["reason"], shown
    assert processes_of(lines.home) == []


def test_the_drain_has_a_deadline(lines: Site) -> None:
    agent = lines.start("--drain", "0.5", "--grace", "1")
    run = lines.submit("lines", "-p", "count=4000")
    until(lambda: "line 5" in lines.output(run))
    assert lines.stop(agent) == 0
    assert lines.state(run) == "cancelled"


def test_a_third_signal_leaves_the_run_to_its_supervisor(lines: Site) -> None:
    agent = lines.start("--grace", "60")
    run = lines.submit("lines", "-p", "count=120")
    until(lambda: "line 5" in lines.output(run))
    for _ in range(3):
        agent.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    agent.wait(10)
    lines.start()
    assert lines.wait_for(run)["state"] in ("completed", "cancelled")


def test_once_takes_what_is_due_and_ends(lines: Site) -> None:
    runs = [lines.submit("lines", "-p", "count=3") for _ in range(5)]
    later = lines.submit("lines", "--at", "+1h")
    agent = lines.start("--once", "--limit", "2", wait=False)
    assert agent.wait(30) == 0
    assert {lines.state(run) for run in runs} == {"completed"}
    assert lines.state(later) == "scheduled"
    assert processes_of(lines.home) == []


def test_one_agent_of_a_name_at_a_time(lines: Site) -> None:
    lines.start("--name", "only")
    done = lines.command("start", "--name", "only", code=1)
    assert "an agent named only is running on this machine" in done.stderr
    unnamed = [lines.start(), lines.start()]
    names = {agent["name"] for agent in json.loads(lines.command("agents", "--json").stdout)}
    assert len(names) == 3, (names, unnamed)


def test_cancel_before_a_start_and_while_scheduled(lines: Site) -> None:
    run = lines.submit("lines")
    lines.command("cancel", run, "--reason", "changed my mind")
    shown = lines.show(run)
    assert (shown["state"], shown["reason"]) == ("cancelled", "changed my mind")
    assert "cancelled" in lines.command("cancel", run, code=1).stderr


def _comm(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read()
    except OSError:
        return b""

"""Agents, engines and connections that end in the middle of a run."""

from __future__ import annotations

import signal
import time

from tests.containers.conftest import start
from tests.containers.machinery import Engine
from tests.containers.test_runs import register, text
from tests.e2e.harness import Site, until

COUNTER = """
for number in range({most}):
    print("line", number, "é" * 30, flush=True)
    time.sleep(0.02)
"""


def lines(most: int) -> str:
    return "".join(f"line {number} {'é' * 30}\n" for number in range(most))


def test_an_agent_that_was_killed_goes_on_where_it_was(site: Site, engine: Engine) -> None:
    start(site, "--lease", "20s")
    register(site, "long", COUNTER.format(most=250) + "return 'the result'")
    run = site.submit("long")
    until(lambda: "line 20 " in text(site, run), 30)
    for _ in (1, 2):
        site.stop(site.agents[-1], signal.SIGKILL)
        time.sleep(0.3)
        start(site, "--lease", "20s")
    shown = site.wait_for(run, timeout=60)
    assert shown["state"] == "completed", shown
    assert text(site, run) == lines(250)
    assert shown["attempt"] == 1 and shown["tasks"][0]["result"]["size"] > 10
    until(lambda: engine.containers() == [])


def test_a_run_that_ended_meanwhile_is_recorded_by_the_next_agent(site: Site, engine: Engine) -> None:
    start(site, "--lease", "30s")
    register(site, "short", COUNTER.format(most=60))
    run = site.submit("short")
    until(lambda: "line 5 " in text(site, run), 30)
    site.stop(site.agents[-1], signal.SIGKILL)
    container = f"flowagent-{run}.1"
    until(lambda: not engine.inspect(container)["State"]["Running"], 30)
    start(site, "--lease", "30s")
    assert site.wait_for(run)["state"] == "completed"
    assert text(site, run) == lines(60)


def test_cancelling_reaches_a_container_of_an_agent_before(site: Site, engine: Engine) -> None:
    start(site, "--lease", "20s", "--grace", "1s")
    register(site, "waits", "print('ready', flush=True); time.sleep(100)")
    run = site.submit("waits")
    until(lambda: "ready" in text(site, run), 30)
    site.stop(site.agents[-1], signal.SIGKILL)
    start(site, "--lease", "20s", "--grace", "1s")
    site.command("cancel", run)
    assert site.wait_for(run)["state"] == "cancelled"


def test_a_container_whose_agent_never_comes_back_ends_by_itself(site: Site, engine: Engine) -> None:
    start(site, "--lease", "4s")
    register(site, "orphan", "print('ready', flush=True); time.sleep(100)")
    run = site.submit("orphan")
    until(lambda: "ready" in text(site, run), 30)
    site.stop(site.agents[-1], signal.SIGKILL)
    container = f"flowagent-{run}.1"
    until(lambda: not engine.inspect(container)["State"]["Running"], 15)
    assert '"stop":"lease"' in engine.docker("logs", container).replace(": ", ":")
    # an agent of the same name finds what is left, and that the run is not its own any more
    start(site, "--lease", "4s")
    assert "lease lost" in site.wait_for(run)["reason"]
    until(lambda: engine.containers() == [])


def test_a_long_run_outlives_its_first_lease(site: Site, engine: Engine) -> None:
    start(site, "--lease", "3s")
    register(site, "renewed", "time.sleep(7); print('still there')")
    run = site.submit("renewed")
    assert site.wait_for(run)["state"] == "completed"
    assert text(site, run) == "still there\n"


def test_an_engine_that_restarts_loses_nothing(site: Site, engine: Engine) -> None:
    start(site, "--lease", "60s")
    register(site, "steady", COUNTER.format(most=400))
    run = site.submit("steady")
    until(lambda: "line 20 " in text(site, run), 30)
    engine.stop()
    time.sleep(1)
    engine.start()
    shown = site.wait_for(run, timeout=60)
    assert shown["state"] == "completed", shown
    assert text(site, run) == lines(400)
    until(lambda: engine.containers() == [])


def test_a_container_that_somebody_removes(site: Site, engine: Engine) -> None:
    start(site)
    register(site, "gone", "print('ready', flush=True); time.sleep(100)")
    run = site.submit("gone")
    until(lambda: "ready" in text(site, run), 30)
    engine.docker("rm", "-f", f"flowagent-{run}.1")
    shown = site.wait_for(run)
    assert shown["state"] == "crashed"


def test_an_agent_without_an_engine_says_so_and_ends(site: Site) -> None:
    agent = site.start("--runner", "docker", "--base-url", "unix:///nowhere.sock", wait=False)
    assert agent.wait(20) == 1
    assert "the Docker engine at unix:///nowhere.sock cannot be reached" in site.log(agent)

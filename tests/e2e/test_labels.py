"""Which agent takes which run, how many at a time, and what is said when none does."""

from __future__ import annotations

import json
import socket
import sqlite3
import time
from contextlib import closing

import pytest
from tests.e2e.harness import Site, until

HOST = socket.gethostname()
FLOWS = """
    import time
    from flowagent import flow
    from flowagent.storage import Module, Local
    from flowagent.run_configs import DockerRun, LocalRun

    @flow
    def anywhere():
        print("here")

    @flow(run_config=LocalRun(labels=["a"]), labels=["b"])
    def both():
        print("here")

    @flow(run_config=DockerRun(image="x"))
    def contained():
        pass

    @flow
    def counted(place: str, seconds: float = 0.3):
        import os
        mark = os.path.join(place, os.environ["FLOWAGENT_RUN"])
        open(mark, "x").close()
        print("beside", len(os.listdir(place)))
        time.sleep(seconds)
        os.unlink(mark)
"""


@pytest.fixture
def flows(site: Site) -> Site:
    site.command("register", site.write("flows.py", FLOWS))
    # scripts of this machine: their label is left out, to see the others at work
    text = site.sources.joinpath("flows.py").read_text().replace("@flow(", "@flow(storage=S, ")
    text = text.replace("@flow\n", "@flow(storage=S)\n")
    text = text.replace("\n@flow", "\nS = Local(stored_as_script=True, add_default_labels=False)\n@flow", 1)
    site.write("free.py", text)
    site.command("register", site.sources / "free.py")
    return site


def test_an_agent_takes_a_run_if_it_carries_all_its_labels(flows: Site) -> None:
    flows.start("--name", "a", "--labels", "a", "--no-hostname-label", "--require-labels")
    flows.start(
        "--name", "abc", "--labels", "a,b", "--labels", "c", "--no-hostname-label", "--require-labels"
    )
    runs = [flows.submit("both") for _ in range(3)]
    assert {flows.wait_for(run)["agent"] for run in runs} == {"abc"}
    # with one more label, none; and with one that it has, still it
    assert "lacks label gpu" in flows.command("run", "both", "--label", "gpu").stderr
    more = flows.submit("both", "--label", "c")
    assert flows.wait_for(more)["labels"] == ["a", "b", "c"]


def test_runs_without_labels_and_agents_that_require_some(flows: Site) -> None:
    flows.start("--name", "strict", "--labels", "a", "--require-labels")
    asked = flows.command("run", "anywhere", "--json")
    run = json.loads(asked.stdout)["id"]
    assert "strict was started with --require-labels and the run has none" in asked.stderr
    assert "flowagent start" in asked.stderr
    explained = flows.command("explain", run).stdout
    assert "it asks for no labels" in explained
    assert "was started with --require-labels and the run has none" in explained
    time.sleep(0.5)
    assert flows.state(run) == "scheduled"
    # unlike in Prefect 1, an agent with labels takes a run without
    flows.start("--name", "open", "--labels", "b")
    assert flows.wait_for(run)["agent"] == "open"


def test_explain_says_for_each_agent_why(flows: Site) -> None:
    flows.start("--name", "a", "--labels", "a")
    flows.start("--name", "b", "--labels", "b", "--no-hostname-label")
    stopped = flows.start("--name", "gone", "--labels", "a,b")
    flows.stop(stopped)
    asked = flows.command("run", "both", "--json")
    assert asked.stderr.startswith("Warning: run ")
    assert len(asked.stderr.splitlines()) == 1
    assert "a lacks label b" in asked.stderr
    assert "b lacks label a" in asked.stderr
    assert asked.stderr.endswith("; start one that can with: flowagent start --labels a,b\n")
    run = json.loads(asked.stdout)["id"]
    explained = json.loads(flows.command("explain", run, "--json").stdout)
    reasons = {item["agent"]["name"]: item["reason"] for item in explained["agents"]}
    assert reasons["a"] == "lacks label b"
    assert reasons["b"] == "lacks label a"
    assert "gone" not in reasons or reasons["gone"]
    assert "no live agent can take it" in explained["verdict"]
    refused = flows.command("run", "contained").stderr
    assert "runs process flows only; the run needs docker" in refused
    # somebody who can: no warning, and the run that waited is taken
    flows.start("--name", "ab", "--labels", "b,a")
    assert flows.wait_for(run)["agent"] == "ab"
    assert "ab" in flows.command("explain", run).stdout


def test_runs_that_nobody_takes_are_in_nobodys_way(flows: Site) -> None:
    """Prefect's server looked at the 75 oldest runs only, so that these would have stopped everything."""
    for _ in range(2):
        flows.submit("both")
    with closing(sqlite3.connect(flows.home / "flowagent.db", timeout=10)) as database, database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(run)")]
        chosen = ", ".join(column if column != "id" else "lower(hex(randomblob(8)))" for column in columns)
        for _ in range(8):
            database.execute(f"INSERT INTO run SELECT {chosen} FROM run WHERE idempotency_key IS NULL")
    flows.start("--name", "free", "--no-hostname-label")
    assert "completed" in flows.watch("anywhere")


@pytest.mark.parametrize("limits", [(2,), (1, 3)], ids=["one agent", "two agents"])
def test_the_limit_holds_under_load(flows: Site, limits: tuple[int, ...]) -> None:
    """Defect 19: there was none."""
    place = flows.shared / "place"
    place.mkdir()
    runs = [flows.submit("counted", "-p", f"place={place}") for _ in range(10)]
    for number, limit in enumerate(limits):
        flows.start("--name", f"agent-{number}", "--limit", str(limit), wait=False)
    seen = []
    until(lambda: seen.append(len(list(place.iterdir()))) or all(flows.state(r) == "completed" for r in runs))
    assert max(seen) == sum(limits)
    shown = [flows.show(run) for run in runs]
    for number, limit in enumerate(limits):
        spans = [(run["started"], run["ended"]) for run in shown if run["agent"] == f"agent-{number}"]
        assert spans
        assert max(sum(a <= start < b for a, b in spans) for start, _ in spans) <= limit
    assert {len(run["attempts"]) for run in shown} == {1}


def test_the_hostname_is_a_label_unless_told_otherwise(site: Site) -> None:
    site.start("--name", "by-default", "--labels", " x , y")
    site.start("--name", "without", "--no-hostname-label")
    agents = {agent["name"]: agent for agent in json.loads(site.command("agents", "--json").stdout)}
    assert agents["by-default"]["labels"] == sorted([HOST, "x", "y"])
    assert agents["without"]["labels"] == []

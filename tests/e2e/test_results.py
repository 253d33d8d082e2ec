"""Results from the command line: printed, saved, and what a repeated run makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.e2e.harness import Site

GRAPH = """
import os
from flowagent import Flow, Parameter, task
from flowagent.results import JSONSerializer, LocalResult

MENDED = {mended!r}

@task
def numbers():
    print("ran numbers")
    return [1, 2, 3]

@task
def load(values):
    print("ran load")

@task
def square(n):
    print("ran square", n)
    if n == 2 and not os.path.exists(MENDED):
        raise ValueError("two is not possible")
    return n * n

@task(result=LocalResult(location="totals/{{flow_name}}/{{today}}.json", serializer=JSONSerializer()))
def total(squares):
    print("ran total")
    return {{"total": sum(squares), "colour": "\\x1b[31m"}}

with Flow({name!r}) as flow:
    values = numbers()
    load(values)
    total(square.map(values))
"""
FUNCTION = """
import os, random
from flowagent import flow, task

@task
def draw():
    print("ran draw")
    return random.random()

@task
def load(x):
    print("ran load")

@task
def check(x):
    print("ran check", x)
    if x == "b" and not os.path.exists({mended!r}):
        raise ValueError("not b")
    return x

@flow
def {name}():
    load(draw())
    return [check(x) for x in "abc"]
"""


def ran(site: Site, run: str) -> list[str]:
    return sorted(line[4:] for line in site.output(run).splitlines() if line.startswith("ran "))


def retry(site: Site, run: str, *options: str) -> str:
    return str(json.loads(site.command("retry", run, "--json", *options).stdout)["id"])


def register(site: Site, text: str, name: str) -> Path:
    mended = site.shared / f"mended-{name}"
    script = site.write(f"{name}/flow.py", text.format(mended=str(mended), name=name))
    site.command("register", script)
    return mended


def test_a_retry_starts_from_the_results_that_exist(workshop: Site) -> None:
    site = workshop
    mended = register(site, GRAPH, "graph")
    first = site.submit("graph")
    assert site.wait_for(first)["state"] == "failed"
    assert ran(site, first) == ["load", "numbers", "square 1", "square 2", "square 3"]
    # it fails again, and the next one takes over what this one took over
    second = retry(site, first)
    assert site.wait_for(second)["state"] == "failed"
    assert ran(site, second) == ["square 2"]
    mended.touch()
    third = retry(site, second)
    shown = site.wait_for(third)
    assert shown["state"] == "completed"
    assert ran(site, third) == ["square 2", "total"]
    assert shown["retry_of"] == second
    tasks = {task["task"]: task for task in shown["tasks"]}
    assert tasks["numbers-1"]["reason"] == f"restored from run {second}"
    assert tasks["numbers-1"]["result"]["path"].endswith(f"/graph/{first}/1/numbers-1")
    assert site.command("result", third, "square-1[2]").stdout == "9\n"
    assert site.command("result", third, "load-1").stdout == "None\n"
    kept = Path(tasks["total-1"]["result"]["path"])
    assert kept.parent == site.home / "results" / "totals" / "graph"
    # what it returned steers no terminal, and can be had as it is stored
    assert site.command("result", third, "total-1").stdout == "{'total': 14, 'colour': '\\x1b[31m'}\n"
    assert json.loads(site.command("result", third, "total-1", "--output", "-").stdout)["total"] == 14
    saved = site.root / "saved.json"
    site.command("result", third, "total-1", "-o", saved)
    assert saved.read_bytes() == kept.read_bytes()
    document = json.loads(site.command("result", third, "total-1", "--json").stdout)
    assert (document["value"]["total"], document["result"]["path"]) == (14, str(kept))

    # a run that completed is repeated as a whole, and so is any if that is asked for
    whole = ["load", "numbers", "square 1", "square 2", "square 3", "total"]
    again = retry(site, third)
    assert site.wait_for(again)["state"] == "completed"
    assert ran(site, again) == whole
    afresh = retry(site, second, "--from-start")
    assert site.wait_for(afresh)["retry_of"] is None
    assert ran(site, afresh) == whole

    # results that are gone are made again, with what depends on them
    Path(tasks["numbers-1"]["result"]["path"]).unlink()
    fourth = retry(site, second)
    assert site.wait_for(fourth)["state"] == "completed"
    assert ran(site, fourth) == whole
    refused = site.command("result", third, "numbers-1", code=1).stderr
    assert refused.startswith("Error: Local: no file ") and len(refused.splitlines()) == 1


def test_a_retry_of_a_function(workshop: Site) -> None:
    site = workshop
    mended = register(site, FUNCTION, "function")
    first = site.submit("function")
    assert site.wait_for(first)["state"] == "failed"
    assert ran(site, first) == ["check a", "check b", "draw", "load"]
    mended.touch()
    second = retry(site, first)
    assert site.wait_for(second)["state"] == "completed"
    assert ran(site, second) == ["check b", "check c"]
    assert site.command("result", second).stdout == "['a', 'b', 'c']\n"
    drawn = [site.command("result", run, "draw-1").stdout for run in (first, second)]
    assert drawn[0] == drawn[1]


EVIL = """
import os
from flowagent import flow
from flowagent.storage import Local

class Evil:
    def __reduce__(self):
        return os.mkdir, ({mark!r},)

@flow(name={name!r}, storage=Local())
def evil():
    return Evil()
"""


def test_reading_a_result_executes_nothing(workshop: Site) -> None:
    """Flows are not trusted, and neither is what they return."""
    site = workshop
    mark = site.root / "executed"
    site.command("register", site.write("evil/flow.py", EVIL.format(mark=str(mark), name="evil")))
    run = site.submit("evil")
    assert site.wait_for(run)["state"] == "completed"
    refused = site.command("result", run, code=1).stderr
    assert "the result holds posix.mkdir" in refused
    assert not mark.exists()
    site.command("result", run, "-o", site.root / "evil.pickle")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-1"], "has no task 'nothing-1'; it has: draw-1"),
        (["check-2"], "task check-2 of run {run} has no result that was kept: it is failed"),
        (["load-1", "-o", "x"], "task load-1 of run {run} returned None; there is nothing to save"),
        (
            ["check-1", "-o", "no/such/directory/x"],
            "cannot be written: name a file in a directory that exists",
        ),
        (
            ["check-1", "-o", "/proc/x"],
            "the result cannot be written to /proc: No such file or directory; free",
        ),
    ],
)
def test_what_there_is_no_result_of(workshop: Site, arguments: list[str], message: str) -> None:
    site = workshop
    name = "results"
    script = site.write(f"{name}/flow.py", FUNCTION.format(mended="/nonexistent", name=name))
    known = json.loads(site.command("runs", "--json").stdout)
    run = next((found["id"] for found in known if found["flow_name"] == name), None)
    if run is None:
        site.command("register", script)
        run = site.submit(name)
        site.wait_for(run)
    refused = site.command("result", run, *arguments, code=1).stderr
    assert message.format(run=run) in refused
    assert len(refused.splitlines()) == 1

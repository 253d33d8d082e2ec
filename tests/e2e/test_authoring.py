"""Flows as their authors write them: Prefect 1 style, plain functions, packages, and what run configs say."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from tests.e2e.harness import Site

PREFECT_1_STYLE = """
    import os
    from datetime import timedelta

    import flowagent
    from flowagent import Flow, Parameter, Task, task, unmapped
    from flowagent.run_configs import DockerRun, KubernetesRun, LocalRun, UniversalRun
    from flowagent.storage import Local
    from flowagent.triggers import all_finished

    class Extract(Task):
        def __init__(self, step, **kwargs):
            self.step = step
            super().__init__(**kwargs)

        def run(self, start, count):
            self.logger = flowagent.context.get("logger")
            self.logger.warning("extracting from %s", start)
            return list(range(start, start + count * self.step, self.step))

    @task(max_retries=2, retry_delay=timedelta(seconds=0.05), log_stdout=True)
    def transform(x, factor):
        if x == 14 and flowagent.context.task_run_count < 3:
            raise ConnectionError("not yet")
        print("transformed", x)
        return x * factor

    @task
    def load(values, total):
        print("loaded", values, "total", total, os.environ.get("A"))

    @task(trigger=all_finished)
    def clean_up():
        print("cleaned up")

    extract = Extract(step=2, name="extract")

    with Flow("prefect one style") as flow:
        start = Parameter("start")
        count = Parameter("count", default=3)
        values = extract(start, count=count)
        products = transform.map(values, factor=unmapped(start))
        total = flowagent.task(lambda values: sum(values), name="total")(products) + 1
        done = load(products, total)
        clean_up(upstream_tasks=[done])

    flow.run_config = LocalRun(env={"A": "b"}, labels=["x"])
    flow.storage = Local(stored_as_script=True)
    flow.register(project_name="x")
    flow.run(parameters={"start": 1})  # both do nothing while an agent loads the file
"""

MANY = """
    from __future__ import annotations
    import json, os, sys, threading, time
    from pathlib import Path
    from flowagent import Flow, Parameter, context, flow, get_logger, task
    from flowagent.run_configs import LocalRun
    from flowagent.storage import Local

    @flow
    def types(text: str, integer: int, real: float, truth: bool, nothing: None, array: list, table: dict):
        print(json.dumps([text, integer, real, truth, nothing, array, table], sort_keys=True))

    @task
    def look():
        names = ("flow_name", "attempt", "labels", "task_name", "task_slug", "task_run_count")
        found = {name: context.get(name) for name in names}
        found["parameters"] = dict(context.parameters)
        found["run_id"] = context.run_id
        found["scheduled_for"] = context.scheduled_for.timestamp()
        found["zone"] = str(context.scheduled_for.tzinfo)
        found["in a thread of its own"] = []
        thread = threading.Thread(target=lambda: found["in a thread of its own"].append(context.run_id))
        thread.start(); thread.join()
        print("found " + json.dumps(found))

    with Flow("looking", labels=[]) as looking:
        Parameter("x", default=None)
        look()

    @flow(name="unsteady", run_config=LocalRun(retries=2))
    def unsteady():
        print("attempt", context.attempt)
        if context.attempt < 3:
            raise OSError("not yet")

    @task(timeout=0.3)
    def sleep():
        time.sleep(60)

    with Flow("too slow") as too_slow:
        sleep()

    @flow(name="too slow as a whole", run_config=LocalRun(timeout=0.5))
    def whole():
        print("sleeping", flush=True)
        time.sleep(60)

    @flow(run_config=LocalRun(env={"GREETING": "grüß dich =\\n"}, working_dir=Path(__file__).parent / "work"))
    def surroundings():
        home = Path(os.environ["HOME"]).is_dir()
        print(json.dumps([os.getcwd(), os.environ["GREETING"], sys.executable, home]))

    @task(name="größe ✓")
    def unicode_task(x):
        get_logger().info("日本語 %s", x)
        print("naïve 🐍", x)

    with Flow("Überflug 🚀 日本") as unicode:
        unicode_task(Parameter("größe", default="ß"))

    @flow
    def talkative():
        line = "x" * 99
        for number in range(50):
            print("\\n".join([line] * 1048), end="\\n")
        print("the end")

    @task
    def shout(text):
        print("shouting", text)
        return text.upper()

    @flow
    def calling(text: str = "quiet") -> str:
        assert shout(text) == text.upper()
        return shout(text)

    nested = {"flows": [Flow("in a dict")]}
"""


@pytest.fixture(scope="module")
def site(workshop: Site) -> Site:
    (workshop.sources / "work").mkdir()
    done = workshop.command("register", workshop.write("many.py", MANY))
    assert len(done.stdout.splitlines()) == 10  # several flows of one file, that in a dict as well
    return workshop


def test_a_flow_in_the_style_of_prefect_1(site: Site) -> None:
    said = site.python(site.write("prefect_1_style.py", PREFECT_1_STYLE))
    assert re.search(r"registered prefect one style version 1 \(labels: .*\bx\b.*\): new", said.stdout)
    assert "loaded [1, 3, 5] total 10 None" in said.stdout
    agent = site.start("--labels", "x", "--name", "x")
    try:
        output = site.watch("prefect one style", "-p", "start=10")
    finally:
        site.stop(agent)
    assert "loaded [100, 120, 140] total 361 b" in output
    assert "cleaned up" in output
    assert re.search(r"WARNING.*extracting from 10", output)
    assert "loaded [1, 3, 5]" not in output
    assert output.count("ConnectionError: not yet") >= 2
    refused = site.command("run", "prefect one style", code=1)
    assert "needs a value for start" in refused.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from flowagent import Client", "flowagent has no 'Client'; use the command line"),
        ("from flowagent.executors import LocalDaskExecutor", "flowagent has no 'executors'; independent"),
        ("from flowagent.storage import Dropbox", "'Dropbox'"),
        ("from flowagent.engine.results import LocalResult", "results are in flowagent.results"),
        ("Flow('a', schedule=1)", "flow 'a' has no argument 'schedule'; start runs with: flowagent run"),
        ("task(lambda: 1, name='a', cache_for=1)", "has no argument 'cache_for'"),
    ],
)
def test_what_is_not_there_says_what_is(site: Site, line: str, message: str) -> None:
    script = site.write("not_there.py", f"from flowagent import Flow, task\n{line}\n")
    refused = site.command("register", script, code=1)
    assert len(refused.stderr.splitlines()) == 1
    assert message in refused.stderr
    assert str(script) in refused.stderr


def test_parameters_of_each_json_type(site: Site) -> None:
    values = {
        "text": 'a "quoted"\nline, größer',
        "integer": -(2**63),
        "real": 0.1,
        "truth": True,
        "nothing": None,
        "array": [1, "2", [None]],
        "table": {"k": {"l": []}},
    }
    options = [f"-p{name}={json.dumps(value)}" for name, value in values.items()]
    output = site.watch("types", *options)
    assert json.dumps(list(values.values()), sort_keys=True) in output


def test_what_tasks_know_of_their_run(site: Site) -> None:
    before = time.time()
    output = site.watch("looking", "-p", 'x={"a": [1]}', "--at", "+0.5s")
    found = json.loads(re.search(r"found (\{.*\})", output).group(1))  # type: ignore[union-attr]
    shown = site.show(found["run_id"])
    assert shown["flow_name"] == found["flow_name"] == "looking"
    assert found["parameters"] == {"x": {"a": [1]}}
    assert before + 0.5 <= found["scheduled_for"] == pytest.approx(shown["due"], abs=1e-5)
    assert found["zone"] == "UTC"
    assert (found["attempt"], found["task_run_count"]) == (1, 1)
    assert (found["task_name"], found["task_slug"]) == ("look", "look-1")
    assert found["labels"] == shown["labels"]
    assert found["in a thread of its own"] == [found["run_id"]]


def test_a_run_is_tried_again(site: Site) -> None:
    output = site.watch("unsteady")
    assert re.findall(r"attempt (\d)$", output, re.M) == ["1", "2", "3"]


def test_task_and_run_timeouts(site: Site) -> None:
    began = time.monotonic()
    assert "task sleep-1 failed: timed out after 0.3 s" in site.watch("too slow", code=1)
    output = site.watch("too slow as a whole", code=1)
    assert "sleeping" in output
    assert re.search(r"timed out after 0.5 ?s", output)
    assert time.monotonic() - began < 15


def test_environment_and_working_directory(site: Site) -> None:
    line = next(line for line in site.watch("surroundings").splitlines() if line.startswith("["))
    directory, greeting, python, has_home = json.loads(line)
    assert directory == str(site.sources / "work")
    assert greeting == "grüß dich =\n"
    assert Path(python).resolve() == Path(sys.executable).resolve()
    assert has_home is True


def test_a_working_directory_that_is_not_there(site: Site) -> None:
    os.rename(site.sources / "work", site.sources / "gone")
    try:
        output = site.watch("surroundings", code=1)
    finally:
        os.rename(site.sources / "gone", site.sources / "work")
    assert f"cannot enter working_dir {site.sources / 'work'}: No such file or directory" in output


def test_names_in_any_script(site: Site) -> None:
    output = site.watch("Überflug 🚀 日本", "-p", "größe=Straße")
    assert "日本語 Straße" in output
    assert "naïve 🐍 Straße" in output
    run = json.loads(site.command("runs", "--flow", "Überflug 🚀 日本", "--json").stdout)[0]
    assert [task["task"] for task in site.show(run["id"])["tasks"]] == ["größe ✓-1"]


def test_five_megabytes_of_output_arrive(site: Site) -> None:
    run = site.submit("talkative")
    site.wait_for(run)
    output = site.output(run)
    assert output.count("x" * 99 + "\n") == 50 * 1048
    assert output.endswith("the end\n")


def test_a_function_calls_tasks(site: Site) -> None:
    run = site.submit("calling", "-p", "text=loud")
    shown = site.wait_for(run)
    assert shown["state"] == "completed"
    assert [task["task"] for task in shown["tasks"]] == ["", "shout-1", "shout-2"]
    assert site.output(run).count("shouting loud") == 2


def test_a_flow_in_a_dict_runs(site: Site) -> None:
    assert "completed" in site.watch("in a dict")


@pytest.mark.parametrize("how", ["file", "module"])
def test_relative_imports_inside_a_package(site: Site, how: str) -> None:
    """`prefect register` could not handle them; nor siblings that import one another (defect 8)."""
    package = f"package_{how}"
    site.write(f"{how}/{package}/__init__.py", "")
    site.write(f"{how}/{package}/common/__init__.py", "from .numbers import ANSWER\n")
    site.write(f"{how}/{package}/common/numbers.py", "ANSWER = 42\n")
    site.write(f"{how}/{package}/flows/__init__.py", "")
    site.write(f"{how}/{package}/flows/sibling.py", "from ..common import ANSWER\nTWICE = 2 * ANSWER\n")
    text = f"""
        from flowagent import Flow, task
        from . import sibling
        from ..common import ANSWER

        @task
        def show():
            from {package}.common import numbers
            print("answer", ANSWER, sibling.TWICE, numbers.ANSWER)

        with Flow("{package}") as flow:
            show()
    """
    script = site.write(f"{how}/{package}/flows/etl.py", text)
    if how == "file":
        site.command("register", script)
        assert "answer 42 84 42" in site.watch(package)
        return
    directory = site.sources / how
    site.command("register", "-m", f"{package}.flows.etl", cwd=directory)
    assert f"no module named '{package}'" in site.watch(package, code=1)
    site.command("register", "-m", f"{package}.flows.etl", "--label", "importing", cwd=directory)
    none = str(directory / "none")
    agent = site.start("--labels", "importing", "--import-path", str(directory), "--import-path", none)
    try:
        assert f'"import_path": "{none}", "event": "nothing is imported from there: no such' in site.log(
            agent
        )
        assert "answer 42 84 42" in site.watch(package)
    finally:
        site.stop(agent)

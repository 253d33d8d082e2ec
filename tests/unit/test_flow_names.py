"""What is importable from flowagent, and what a name of Prefect 1 that is not says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flowagent

AGENT = str(Path(flowagent.__file__).parents[1])


def interpreters() -> list[str]:
    return [python for python in os.environ.get("FLOWAGENT_TEST_PYTHONS", "").split(":") if python] or [
        sys.executable
    ]


def run_python(python: str, code: str) -> str:
    env = {**os.environ, "PYTHONPATH": AGENT}
    done = subprocess.run([python, "-S", "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", flowagent.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(flowagent, name) is not None
    assert name in dir(flowagent)


def test_it_is_lazy() -> None:
    code = "import sys, flowagent; print([name for name in sys.modules if name.startswith('flowagent')])"
    assert run_python(sys.executable, code).strip() == "['flowagent']"


@pytest.mark.parametrize("python", interpreters())
def test_the_floor_needs_the_standard_library_only(python: str) -> None:
    code = """
import sys, json
import flowagent
from flowagent import *
from flowagent.flows import engine, pickles, loading
from flowagent.storage import Local
from flowagent.run_configs import LocalRun
from flowagent.results import LocalResult
from flowagent.triggers import all_finished

@task(max_retries=1)
def double(x):
    if context.task_run_count == 1:
        raise ValueError(x)
    return 2 * x

class Total(Task):
    def run(self, xs):
        return sum(xs)

with Flow("etl", Local(add_default_labels=False), run_config=LocalRun()) as flow_:
    xs = Parameter("xs", default=[1, 2])
    total = Total()(double.map(xs)) + 1

@flow
def function(n: int = 2):
    return sum(double.map([n]))

state = flow_.run(xs=[1, 2, 3])
foreign = [n for n in sys.modules if n.partition(".")[0] in ("cloudpickle", "anyio", "click", "sqlalchemy")]
print(json.dumps([state.result[total].result, function.run(n=4).result, foreign, flow_.describe()["kind"]]))
"""
    assert json.loads(run_python(python, code)) == [13, 8, [], "dag"]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("from flowagent import Client", "flowagent has no 'Client'; use the command line"),
        ("import flowagent; flowagent.Client", "flowagent has no 'Client'"),
        ("from flowagent.schedules import IntervalSchedule", "flowagent run NAME --at TIME"),
        ("from flowagent.executors import LocalDaskExecutor", "independent tasks run at the same time"),
        ("from flowagent.engine.signals import SKIP", "raising any exception"),
        ("from flowagent.engine.results import LocalResult", "results are in flowagent.results"),
        ("from flowagent.tasks.shell import ShellTask", "write a task with @flowagent.task"),
        ("from flowagent import case", "plain if inside a task or an @flow function"),
        ("from flowagent.triggers import manual_only", "no manual_only; there are all_successful"),
        ("from flowagent.run_configs import ECSRun", "no ECSRun; run an agent"),
        (
            "from flowagent.results import PrefectResult",
            "there are AzureResult, GCSResult, LocalResult, S3Result",
        ),
        ("from flowagent.results import CompressedSerializer", "there are JSONSerializer, PandasSerializer"),
    ],
)
def test_what_is_not_there_names_the_nearest_thing(statement: str, message: str) -> None:
    with pytest.raises(ImportError) as caught:
        exec(statement, {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_ordinary_errors() -> None:
    assert not hasattr(flowagent, "nothing_of_the_kind")
    assert not hasattr(flowagent.storage, "nothing_of_the_kind")
    with pytest.raises(ModuleNotFoundError):
        exec("import flowagent.nothing_of_the_kind", {})

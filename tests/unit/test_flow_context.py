"""The context, secrets and logs as tasks see them."""

from __future__ import annotations

import datetime
import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import flowagent
from flowagent import Flow, FlowError, Parameter, Secret, context, flow, get_logger, task
from flowagent.flows.context import RunContext
from flowagent.flows.observer import Observer


def test_outside_of_a_run() -> None:
    assert context.get("run_id") is None
    assert context.get("run_id", "x") == "x"
    assert "run_id" not in context
    assert context.get("logger").name == "flowagent"
    with pytest.raises(AttributeError, match=r"context\.run_id is not set here"):
        _ = context.run_id
    with pytest.raises(AttributeError, match="context has no 'colour'"):
        _ = context.colour


def test_temporary_values() -> None:
    with context(colour="red"), context({"size": 1}):
        assert (context.colour, context["size"]) == ("red", 1)
    assert "colour" not in context


def test_threads_see_the_run_that_is_on() -> None:
    seen = []

    def look() -> None:
        seen.append(context.get("run_id"))

    def from_a_thread() -> None:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    with RunContext({"run_id": "outer"}):
        with RunContext({"run_id": "inner"}):
            from_a_thread()
        from_a_thread()
    from_a_thread()
    assert seen == ["inner", "outer", None]


def test_dates_follow_the_schedule() -> None:
    with context(scheduled_for=datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)):
        assert (context.today, context.yesterday, context.tomorrow_nodash) == (
            "2026-03-01",
            "2026-02-28",
            "20260302",
        )
        assert context.scheduled_start_time == context.date
    assert context.get("scheduled_start_time") is None
    assert len(context.today) == 10


def test_secrets_are_not_shown() -> None:
    with context(secrets={"TOKEN": "hush"}, run_id="r"):
        assert "hush" not in repr(context)
        assert "run_id='r'" in repr(context)


def test_it_pickles_as_itself() -> None:
    assert pickle.loads(pickle.dumps(context)) is context


def test_what_tasks_see() -> None:
    seen: dict[str, Any] = {}
    barrier = threading.Barrier(2, timeout=10)

    @task(name="look")
    def look(x: int) -> None:
        barrier.wait()
        names = (
            "run_id",
            "flow_name",
            "parameters",
            "attempt",
            "task_name",
            "task_slug",
            "task_run_count",
            "map_index",
        )
        found = {name: context.get(name) for name in names}
        thread = threading.Thread(target=lambda: found.update(thread=context.get("run_id")))
        thread.start()
        thread.join()
        barrier.wait()
        seen[context.task_slug] = found

    with Flow("etl") as flow:
        Parameter("p", default=1)
        look.map([1, 2])
    with RunContext({"run_id": "r1", "attempt": 2}):
        assert flow.execute({}, Observer()).is_successful()
    assert seen["look-1[1]"] == {
        "run_id": "r1",
        "flow_name": "etl",
        "parameters": {"p": 1},
        "attempt": 2,
        "task_name": "look",
        "task_slug": "look-1[1]",
        "task_run_count": 1,
        "map_index": 1,
        "thread": "r1",
    }
    assert seen["look-1[0]"]["task_slug"] == "look-1[0]"
    assert "task_slug" not in context


def test_a_local_run_has_all_of_it() -> None:
    @flow
    def look(x: int = 1) -> dict[str, Any]:
        return {
            name: context[name] for name in ("run_id", "flow_name", "parameters", "attempt", "scheduled_for")
        }

    state = look.run(x=2)
    assert state is not None
    assert state.result["flow_name"] == "look"
    assert state.result["parameters"] == {"x": 2}
    assert state.result["scheduled_for"].tzinfo is not None
    assert len(state.result["run_id"]) == 32


# -- secrets ---------------------------------------------------------------------------------------------


def test_a_declared_secret_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = ' 0123e4 ${HOME} "x"\n'
    monkeypatch.setenv("FLOWAGENT_SECRET_TOKEN", exact)

    @task
    def use(token: str) -> tuple[str, str]:
        return token, Secret("TOKEN").get()

    with Flow("etl") as flow:
        used = use(Secret("TOKEN"))
        use(Secret("TOKEN"))
    assert flow.describe()["secrets"] == ["TOKEN"]
    state = flow.run()
    assert state is not None
    assert state.result[used].result == (exact, exact)


def test_a_secret_from_a_file(home: Path) -> None:
    path = home / "secrets" / "TOKEN"
    path.parent.mkdir()
    path.write_bytes("geheim ü\n".encode())
    path.chmod(0o600)
    assert Secret("TOKEN").get() == "geheim ü\n"
    path.chmod(0o640)
    with pytest.raises(FlowError, match="may be read by others; do: chmod 600"):
        Secret("TOKEN").get()
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(FlowError, match="cannot be read"):
        Secret("TOKEN").get()
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(FlowError):
        Secret("TOKEN").get()


def test_a_secret_that_is_not_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWAGENT_SECRET_TOKEN", "hush")

    @flow
    def undeclared() -> str:
        return Secret("TOKEN").get()

    state = undeclared.run()
    assert state is not None
    assert state.message == (
        "FlowError: secret 'TOKEN' is not available: declare it with secrets=['TOKEN'] on the flow "
        "and store it with 'flowagent secret set TOKEN'"
    )
    undeclared.secrets = ["TOKEN"]  # type: ignore[assignment]
    state = undeclared.run()
    assert state is not None
    assert state.result == "hush"


def test_in_an_agent_only_what_the_agent_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWAGENT_SECRET_OTHER", "hush")

    @task
    def use(token: str) -> str:
        return token

    with Flow("etl") as flow:
        given, missing = use(Secret("TOKEN")), use(Secret("OTHER"))
    with context(secrets={"TOKEN": "value"}):
        state = flow.execute({}, Observer())
    assert state.result[given].result == "value"
    assert (
        "upstream task secret-OTHER failed: FlowError: secret 'OTHER' is not available"
        in state.result[missing].message
    )


# -- logs ------------------------------------------------------------------------------------------------


def test_records_carry_the_task(caplog: pytest.LogCaptureFixture) -> None:
    @task
    def speak() -> None:
        get_logger("mine").info("hello", extra={"colour": "red"})
        context.get("logger").warning("again")

    caplog.set_level(logging.INFO)
    with Flow("etl") as flow:
        speak()
    flow.execute({}, Observer())
    get_logger().info("outside")
    found = [(record.name, record.message, getattr(record, "task", "-")) for record in caplog.records]
    assert found == [
        ("flowagent.mine", "hello", "speak-1"),
        ("flowagent", "again", "speak-1"),
        ("flowagent", "outside", None),
    ]


def test_prints_become_records_of_the_task_that_prints(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    barrier = threading.Barrier(2, timeout=10)

    @task(log_stdout=True)
    def logged() -> None:
        barrier.wait()
        print("one", end="")
        print(" line")
        print("two\nthree", end="")
        barrier.wait()

    @task
    def printed() -> None:
        barrier.wait()
        print("plain")
        barrier.wait()

    caplog.set_level(logging.INFO)
    before = sys.stdout
    with Flow("etl") as flow:
        logged()
        printed()
    assert flow.execute({}, Observer(), 2).is_successful()
    assert [(record.message, record.task) for record in caplog.records] == [  # type: ignore[attr-defined]
        ("one line", "logged-1"),
        ("two", "logged-1"),
        ("three", "logged-1"),
    ]
    assert capsys.readouterr().out == "plain\n"
    assert sys.stdout is before


LOCAL = """
import logging, sys
from flowagent import Flow, task, get_logger
{configure}
@task(log_stdout=True)
def speak():
    get_logger().info("hello")
    get_logger().debug("quiet")
    print("printed")
with Flow("my flow") as flow:
    speak()
flow.run()
print(len(logging.getLogger("flowagent").handlers), logging.getLogger("flowagent").level)
"""


def local_run(configure: str) -> tuple[str, str]:
    env = {**os.environ, "PYTHONPATH": str(Path(flowagent.__file__).parents[1])}
    code = LOCAL.format(configure=configure)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_log_of_a_local_run() -> None:
    out, err = local_run("")
    lines = [line.partition("] ")[2] for line in err.splitlines()]
    assert lines == [
        "INFO my flow | started",
        "INFO my flow | speak-1: running",
        "INFO my flow | speak-1: hello",
        "INFO my flow | speak-1: printed",
        "INFO my flow | speak-1: completed",
        "INFO my flow | completed",
    ]
    assert out == "0 0\n"


def test_the_applications_own_logging_is_left_alone() -> None:
    out, err = local_run("logging.basicConfig(level='DEBUG', format='APP %(message)s')")
    assert "APP hello" in err.splitlines()
    assert "APP quiet" in err.splitlines()
    assert all(line.startswith("APP ") for line in err.splitlines())
    assert out == "0 0\n"

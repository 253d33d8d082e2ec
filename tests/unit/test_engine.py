"""Running flows in this process."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import flowagent
from flowagent import Flow, Parameter, Task, flatten, flow, get_logger, task, triggers, unmapped
from flowagent.flows.errors import FlowError, Stop, TaskFailed, TaskTimeout
from flowagent.flows.observer import Observer
from flowagent.flows.states import State
from flowagent.results import JSONSerializer, LocalResult


class Recorder(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []
        self.reasons: dict[str, str | None] = {}
        self.results: list[tuple[str, Any, Any]] = []

    def task(self, slug: str, name: str, state: str, reason: str | None = None, tries: int = 1) -> None:
        self.events.append((slug, state, tries))
        self.reasons[slug] = reason

    def result(self, slug: str, value: Any, declaration: Any, inputs: str | None = None) -> None:
        self.results.append((slug, value, declaration))

    def ends(self) -> dict[str, str]:
        return {slug: state for slug, state, _ in self.events if state not in ("running", "retrying")}


def execute(flow: Any, concurrency: int | None = None, **parameters: Any) -> tuple[State, Recorder]:
    recorder = Recorder()
    return flow.execute(parameters, recorder, concurrency), recorder


def value_of(flow: Flow, state: State, slug: str) -> Any:
    return next(end.result for task, end in state.result.items() if flow.slug_of(task) == slug)


@task
def identity(x: Any) -> Any:
    return x


@task
def fail(message: str = "bad") -> None:
    raise ValueError(message)


@task
def total(xs: list[int]) -> int:
    return sum(xs)


def test_values_flow_along_the_edges() -> None:
    with Flow("etl") as flow:
        n = Parameter("n", default=2)
        total([identity(n), identity(40)])
    state, recorder = execute(flow)
    assert value_of(flow, state, "total-1") == 42
    assert recorder.events[-2:] == [("total-1", "running", 1), ("total-1", "completed", 1)]
    assert "n" not in recorder.ends()


def test_independent_tasks_run_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=10)

    @task
    def meet() -> str:
        barrier.wait()
        return threading.current_thread().name

    with Flow("etl") as flow:
        for _ in range(3):
            meet()
    state, _ = execute(flow, concurrency=3)
    assert state.is_successful()


def test_concurrency_is_a_limit() -> None:
    running, most = [], []

    @task
    def count(_: int) -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()

    with Flow("etl") as flow:
        count.map(list(range(12)))
    state, _ = execute(flow, concurrency=2)
    assert state.is_successful()
    assert max(most) == 2


def test_a_lonely_task_runs_in_the_calling_thread() -> None:
    @task
    def where(_: Any = None) -> int:
        return threading.get_ident()

    with Flow("etl") as flow:
        where(where())
    state, _ = execute(flow)
    assert {end.result for end in state.result.values()} == {threading.get_ident()}


def test_a_failure_fails_the_dependents_and_the_flow() -> None:
    with Flow("etl") as flow:
        a = fail()
        b = identity(a)
        identity(b)
        identity(7)
    state, recorder = execute(flow)
    assert state.is_failed()
    assert state.message == "task fail-1 failed: ValueError: bad"
    reason = "upstream task fail-1 failed: ValueError: bad"
    assert recorder.reasons["identity-1"] == recorder.reasons["identity-2"] == reason
    assert recorder.ends() == {
        "fail-1": "failed",
        "identity-1": "failed",
        "identity-2": "failed",
        "identity-3": "completed",
    }
    assert ("identity-1", "failed", 0) in recorder.events
    assert isinstance(state.result[a].result, ValueError)
    assert isinstance(state.result[b].result, TaskFailed)


def test_retries_and_their_delay() -> None:
    started: list[float] = []

    @task(max_retries=2, retry_delay=0.05)
    def flaky() -> int:
        started.append(time.monotonic())
        if len(started) < 3:
            raise OSError("busy")
        return 3

    with Flow("etl") as flow:
        flaky()
    state, recorder = execute(flow)
    assert state.is_successful()
    assert [event[1:] for event in recorder.events] == [
        ("running", 1),
        ("retrying", 1),
        ("running", 2),
        ("retrying", 2),
        ("running", 3),
        ("completed", 3),
    ]
    assert min(b - a for a, b in itertools.pairwise(started)) >= 0.05


def test_a_task_that_waits_for_its_retry_occupies_no_worker() -> None:
    order: list[str] = []

    @task(max_retries=1, retry_delay=0.2)
    def flaky() -> None:
        order.append("flaky")
        if order.count("flaky") == 1:
            raise OSError("busy")

    @task
    def other() -> None:
        order.append("other")

    with Flow("etl") as flow:
        flaky()
        other()
    state, _ = execute(flow, concurrency=1)
    assert state.is_successful()
    assert order == ["flaky", "other", "flaky"]


def test_retries_run_out() -> None:
    with Flow("etl") as flow:
        fail(task_args={"max_retries": 1})
    state, recorder = execute(flow)
    assert state.message == "task fail-1 failed: ValueError: bad"
    assert recorder.events[-1] == ("fail-1", "failed", 2)


def test_a_timeout_ends_the_task_at_once_and_stops_its_thread() -> None:
    stopped = threading.Event()

    @task(timeout=0.1)
    def spin() -> None:
        try:
            while True:
                time.sleep(0.005)
        except TaskTimeout:
            stopped.set()
            raise

    with Flow("etl") as flow:
        identity(spin())
    began = time.monotonic()
    state, recorder = execute(flow)
    assert time.monotonic() - began < 5
    assert state.message == "task spin-1 failed: timed out after 0.1 s"
    assert isinstance(next(iter(state.result.values())).result, TaskTimeout)
    assert recorder.ends() == {"spin-1": "failed", "identity-1": "failed"}
    assert stopped.wait(5)


def test_a_task_that_cannot_be_stopped_is_left_behind() -> None:
    release = threading.Event()
    late: list[int] = []

    @task(timeout=0.05, max_retries=1)
    def block() -> int:
        release.wait(30)
        late.append(1)
        return 1

    with Flow("etl", result=LocalResult()) as flow:
        block()
        identity.map([1, 2, 3])
    state, recorder = execute(flow, concurrency=1)
    release.set()
    assert state.message == "task block-1 failed: timed out after 0.05 s"
    assert recorder.ends()["identity-1"] == "completed"
    assert "block-1" not in [slug for slug, _, _ in recorder.results]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_tasks_that_end_just_when_their_time_is_up() -> None:
    @task(timeout=0.004, max_retries=1)
    def close(length: float) -> float:
        end = time.monotonic() + length
        while time.monotonic() < end:
            pass
        return length

    for _ in range(20):
        with Flow("etl") as flow:
            mapped = close.map([0.003, 0.0035, 0.004, 0.0045])
        state, recorder = execute(flow, concurrency=2)
        for child in state.result[mapped].map_states:
            assert child.is_failed() == isinstance(child.result, TaskTimeout)
        assert len(recorder.ends()) == 5


def test_a_timeout_that_is_not_reached_changes_nothing() -> None:
    with Flow("etl") as flow:
        for number in range(20):
            identity(number, task_args={"timeout": 30})
    state, _ = execute(flow, concurrency=4)
    assert state.is_successful()
    assert [end.result for end in state.result.values()] == list(range(20))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SystemExit(3), "SystemExit: the code called sys.exit(3)"),
        (SystemExit(), "SystemExit: the code called sys.exit()"),
        (GeneratorExit(), "GeneratorExit"),
        (ValueError("a\nb"), "ValueError: a b"),
    ],
)
@pytest.mark.parametrize("beside", [0, 2])
def test_whatever_a_task_raises_only_fails_it(error: BaseException, reason: str, beside: int) -> None:
    @task
    def leave() -> None:
        raise error

    with Flow("etl") as flow:
        leave()
        for _ in range(beside):
            identity(1)
    state, recorder = execute(flow)
    assert state.message == f"task leave-1 failed: {reason}"
    assert list(recorder.ends().values()).count("completed") == beside


def test_an_exception_that_cannot_be_shown() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    @task
    def leave() -> None:
        raise Mute

    with Flow("etl") as flow:
        leave()
    state, _ = execute(flow)
    assert state.message == "task leave-1 failed: Mute: (its message cannot be shown)"


def test_keyboard_interrupt_in_a_task_ends_the_flow() -> None:
    @task
    def interrupt() -> None:
        raise KeyboardInterrupt

    with Flow("etl") as flow:
        identity(1, upstream_tasks=[interrupt()])
        identity(2, upstream_tasks=[identity(3)], task_args={"trigger": triggers.all_finished})
    state, recorder = execute(flow, concurrency=1)
    assert state.is_failed()
    assert set(recorder.ends()) == {"interrupt-1", "identity-1", "identity-2", "identity-3"}
    with Flow("other") as other:
        interrupt()
    with pytest.raises(KeyboardInterrupt):
        other.run()


def test_ctrl_c_while_tasks_run_in_threads() -> None:
    code = """
import sys, time, os, signal, threading
from flowagent import Flow, task
@task
def spin(i):
    while True:
        time.sleep(0.01)
@task
def after(x):
    print("must not run")
with Flow("etl") as flow:
    after.map(spin.map([1, 2]))
threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
try:
    flow.run()
except KeyboardInterrupt:
    print("interrupted")
"""
    env = {**os.environ, "PYTHONPATH": str(Path(flowagent.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30)
    assert done.stdout == "interrupted\n", done.stderr
    assert "not run: the flow was interrupted" in done.stderr


def test_stop_passes_through_wherever_it_arrives() -> None:
    @task
    def lonely() -> None:
        raise Stop

    with Flow("etl") as dag:
        lonely()

    @flow
    def function() -> None:
        lonely()

    for stopped in (dag, function):
        with pytest.raises(Stop):
            execute(stopped)


def test_a_signal_handlers_stop_ends_a_flow_that_waits() -> None:
    def stop(*_: object) -> None:
        raise Stop

    with Flow("etl") as dag:
        for _ in range(2):
            task(lambda: time.sleep(0.5), name="sleep")()
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        with pytest.raises(Stop):
            execute(dag)
    finally:
        signal.signal(signal.SIGUSR1, before)


# -- triggers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trigger", "upstream", "end"),
    [
        (triggers.all_successful, "", "completed"),
        (triggers.all_successful, "cc", "completed"),
        (triggers.all_successful, "cf", "failed"),
        (triggers.all_successful, "cs", "skipped"),
        (triggers.all_finished, "cfs", "completed"),
        (triggers.any_successful, "cf", "completed"),
        (triggers.any_successful, "fs", "failed"),
        (triggers.any_successful, "ss", "skipped"),
        (triggers.any_failed, "cf", "completed"),
        (triggers.any_failed, "cc", "skipped"),
        (triggers.all_failed, "ff", "completed"),
        (triggers.all_failed, "cf", "skipped"),
    ],
)
def test_triggers(trigger: str, upstream: str, end: str) -> None:
    with Flow("etl") as flow:
        ends = {
            "c": lambda: identity(1),
            "f": fail,
            "s": lambda: identity(1, task_args={"trigger": "any_failed"}),
        }
        identity(
            0, upstream_tasks=[ends[kind]() for kind in upstream], task_args={"name": "t", "trigger": trigger}
        )
    _, recorder = execute(flow)
    assert recorder.ends()["t-1"] == end


def test_a_clean_up_gets_the_error_and_cannot_hide_it() -> None:
    with Flow("etl") as flow:
        seen = identity(fail(), task_args={"trigger": triggers.all_finished})
    state, _ = execute(flow)
    assert isinstance(state.result[seen].result, ValueError)
    assert state.is_failed()
    flow.set_reference_tasks([seen])
    assert execute(flow)[0].is_successful()


# -- mapping ---------------------------------------------------------------------------------------------


def test_mapping() -> None:
    @task
    def plus(x: int, y: int, z: int = 0) -> int:
        return x + y + z

    with Flow("etl") as flow:
        xs = identity([1, 2, 3])
        ys = plus.map(xs, y=unmapped(identity(10)))
        total(plus.map(ys, [1, 1, 1]))
        identity.map(flatten(identity([[1], [2, 3], []])))
        identity.map([])
    state, recorder = execute(flow)
    assert value_of(flow, state, "plus-1") == [11, 12, 13]
    assert value_of(flow, state, "total-1") == 39
    assert value_of(flow, state, "identity-4") == [1, 2, 3]
    assert value_of(flow, state, "identity-5") == []
    assert recorder.ends()["plus-1[2]"] == "completed"


def test_a_failed_child_fails_only_what_is_mapped_over_it() -> None:
    @task
    def odd(x: int) -> int:
        if x % 2 == 0:
            raise ValueError(f"{x} is even")
        return x

    with Flow("etl") as flow:
        odds = odd.map([1, 2, 3])
        again = identity.map(odds)
        total(again)
    state, recorder = execute(flow)
    ends = recorder.ends()
    assert [ends[f"identity-1[{index}]"] for index in range(3)] == ["completed", "failed", "completed"]
    assert recorder.reasons["identity-1[1]"] == "upstream task odd-1[1] failed: ValueError: 2 is even"
    assert recorder.reasons["odd-1"] == "1 of 3 children failed, first odd-1[1]: ValueError: 2 is even"
    assert recorder.reasons["total-1"] == "upstream task odd-1[1] failed: ValueError: 2 is even"
    assert state.message == "task odd-1[1] failed: ValueError: 2 is even"
    assert [child.name for child in state.result[odds].map_states] == ["completed", "failed", "completed"]


def test_children_are_retried_on_their_own() -> None:
    tries: list[int] = []

    @task(max_retries=1)
    def flaky(x: int) -> int:
        tries.append(x)
        if tries.count(x) == 1 and x == 2:
            raise OSError("busy")
        return x

    with Flow("etl") as flow:
        flaky.map([1, 2, 3])
    state, _ = execute(flow)
    assert state.is_successful()
    assert sorted(tries) == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1]), "differ in length: x has 2, y has 1"),
        ((3, [1]), "cannot map over argument x, which is of type int; wrap it in unmapped()"),
        (("ab", [1]), "which is of type str"),
        ((unmapped(1), unmapped(2)), "no argument to map over"),
    ],
)
def test_what_cannot_be_mapped(arguments: tuple[Any, ...], message: str) -> None:
    @task
    def pair(x: Any, y: Any) -> None:
        pass

    with Flow("etl") as flow:
        pair.map(*arguments)
    state, _ = execute(flow)
    assert message in (state.message or "")


# -- results ---------------------------------------------------------------------------------------------


def test_results_go_to_the_observer() -> None:
    own = LocalResult(serializer=JSONSerializer())
    with Flow("etl", result=LocalResult("/r")) as flow:
        identity(Parameter("p", default=5))
        identity(None)
        identity(2, task_args={"result": own})
        identity.map([7])
    _, recorder = execute(flow)
    assert sorted(recorder.results, key=lambda kept: kept[0]) == [
        ("identity-1", 5, LocalResult("/r")),
        ("identity-3", 2, own),
        ("identity-4[0]", 7, LocalResult("/r")),
    ]


def test_nothing_is_kept_without_a_declaration() -> None:
    with Flow("etl") as flow:
        identity(1)
    assert execute(flow)[1].results == []


def test_a_result_that_cannot_be_kept_fails_the_task_once() -> None:
    class Full(Recorder):
        def result(self, slug: str, value: Any, declaration: Any, inputs: str | None = None) -> None:
            raise OSError(28, "No space left on device")

    calls: list[int] = []

    @task(max_retries=3, result=LocalResult())
    def produce() -> int:
        calls.append(1)
        return 1

    with Flow("etl") as dag:
        produce()
    state = dag.execute({}, Full())
    reason = "its result could not be kept: OSError: [Errno 28] No space left on device"
    assert state.message == f"task produce-1 failed: {reason}"
    assert calls == [1]

    @flow(result=LocalResult())
    def function() -> int:
        return 1

    assert function.execute({}, Full()).message == reason


def test_an_observer_that_fails_ends_the_execution() -> None:
    class Broken(Observer):
        def task(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("no events")

    with Flow("etl") as flow:
        identity(1)
    with pytest.raises(OSError, match="no events"):
        flow.execute({}, Broken())


def test_observers_are_called_by_one_thread_at_a_time() -> None:
    class Careful(Recorder):
        inside = False

        def task(self, *args: Any, **kwargs: Any) -> None:
            assert not self.inside
            self.inside = True
            time.sleep(0.0005)
            self.inside = False

        result = task

    with Flow("etl", result=LocalResult()) as flow:
        identity.map(list(range(30)))
    assert flow.execute({}, Careful(), 8).is_successful()


# -- function flows --------------------------------------------------------------------------------------


def test_a_function_flow_and_its_tasks() -> None:
    @flow(name="report", result=LocalResult())
    def report(n: int, extra: int = 1) -> int:
        return total(identity.map([n, extra])) + identity(1)

    state, recorder = execute(report, n=5)
    assert state.result == 7
    assert recorder.ends() == {
        "identity-1[0]": "completed",
        "identity-1[1]": "completed",
        "identity-1": "completed",
        "total-1": "completed",
        "identity-2": "completed",
    }
    assert recorder.results[-1] == ("", 7, LocalResult())
    assert report(2) == 4


def test_a_function_flow_that_fails() -> None:
    @flow
    def through_task() -> None:
        fail()

    @flow
    def on_its_own() -> None:
        sys.exit(2)

    @flow
    def caught() -> str:
        with pytest.raises(ValueError):
            fail.map(["a"])
        return "fine"

    state, _ = execute(through_task)
    assert (state.message, type(state.result)) == ("task fail-1 failed: ValueError: bad", ValueError)
    assert execute(on_its_own)[0].message == "SystemExit: the code called sys.exit(2)"
    assert execute(caught)[0].result == "fine"
    assert "no parameter 'x'" in (execute(caught, x=1)[0].message or "")


def test_tasks_of_a_function_flow_have_retries_and_timeouts() -> None:
    calls: list[int] = []

    @task(max_retries=1)
    def flaky() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("busy")
        return 1

    @flow
    def slow() -> None:
        assert flaky() == 1
        identity_slowly = task(lambda: time.sleep(5), name="sleep", timeout=0.05)
        identity_slowly()

    state, recorder = execute(slow)
    assert state.message == "task sleep-1 failed: timed out after 0.05 s"
    assert ("flaky-1", "retrying", 1) in recorder.events


def test_a_task_object_is_no_argument_outside_of_a_graph() -> None:
    @flow
    def wrong() -> None:
        identity(fail)

    assert "give its result" in (execute(wrong)[0].message or "")


def test_async_functions() -> None:
    @task
    async def later(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    @flow
    async def function(x: int = 1) -> int:
        await asyncio.sleep(0)
        return x

    with Flow("etl") as dag:
        total(later.map([1, 2]))
    assert value_of(dag, execute(dag)[0], "total-1") == 5
    assert execute(function)[0].result == 1


def test_flows_inside_of_tasks_do_not_report_to_the_outer_observer() -> None:
    with Flow("inner") as inner:
        identity(1)

    @flow
    def outer() -> bool:
        return inner.execute({}, Observer()).is_successful()

    state, recorder = execute(outer)
    assert state.result is True
    assert recorder.events == []


def test_tracebacks_begin_in_user_code(caplog: pytest.LogCaptureFixture) -> None:
    with Flow("etl") as flow:
        fail()
    execute(flow)
    record = next(record for record in caplog.records if record.exc_info)
    assert record.message == "ValueError: bad"
    assert record.task == "fail-1"  # type: ignore[attr-defined]
    assert record.exc_info is not None
    trace = record.exc_info[2]
    assert trace is not None
    assert trace.tb_frame.f_code.co_filename == __file__
    assert caplog.text.count("ValueError: bad") == 2  # the message, and the end of the traceback


def test_long_chains_and_wide_maps() -> None:
    with Flow("etl") as flow:
        value = fail()
        for _ in range(3000):
            value = identity(value)
    state, _ = execute(flow)
    assert state.result[value].message == "upstream task fail-1 failed: ValueError: bad"
    with Flow("etl") as flow:
        mapped = identity.map(list(range(3000)))
    assert execute(flow)[0].result[mapped].result == list(range(3000))


def test_state_shared_by_subclasses_stays_with_the_copy() -> None:
    class Counter(Task):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def run(self) -> int:
            self.calls += 1
            return self.calls

    counter = Counter()
    with Flow("etl") as flow:
        counter()
        counter()
    state, _ = execute(flow)
    assert [end.result for end in state.result.values()] == [1, 1]
    assert counter.calls == 0


def test_loggers_work_everywhere() -> None:
    assert get_logger("x").name == "flowagent.x"
    assert get_logger().name == "flowagent"
    assert isinstance(FlowError("x"), Exception)

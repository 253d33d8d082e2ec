"""Declaring flows: tasks, edges, parameters, and the JSON form."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from flowagent import Flow, FlowError, Parameter, Secret, Task, flow, task, triggers, unmapped
from flowagent.flows.errors import ParameterError
from flowagent.flows.loading import Loading
from flowagent.flows.observer import Observer
from flowagent.flows.states import State
from flowagent.models import FlowSpec
from flowagent.results import LocalResult
from flowagent.run_configs import LocalRun
from flowagent.storage import Local, Module


@task
def one() -> int:
    return 1


@task
def add(x: Any, y: Any = 1) -> Any:
    return x + y


def results(flow: Flow, **parameters: Any) -> dict[str, Any]:
    state = flow.execute(parameters, Observer())
    assert state.is_successful(), state.message
    return {flow.slug_of(task): end.result for task, end in state.result.items()}


def slugs(flow: Flow) -> dict[str, list[str]]:
    return {spec["slug"]: spec["upstream"] for spec in flow.describe()["tasks"]}


def test_slugs_count_in_the_order_of_creation() -> None:
    with Flow("etl") as flow:
        a, b = one(), one()
        add(a, y=add(b))
    assert slugs(flow) == {"one-1": [], "one-2": [], "add-1": ["one-2"], "add-2": ["one-1", "add-1"]}


def test_slugs_are_never_taken_twice() -> None:
    with Flow("etl") as flow:
        Parameter("one-1", default=0)
        Parameter("one-3", default=0)
        for _ in range(3):
            one()
    assert list(slugs(flow)) == ["one-2", "one-4", "one-5"]


def test_describe_is_the_json_of_a_flow_spec() -> None:
    @task(name="load", max_retries=2, retry_delay=timedelta(seconds=5), timeout=1.5, result=LocalResult())
    def _load(n: int, token: str) -> int:
        return n

    with Flow("etl", Local("/f", secrets=["A"]), LocalRun(), LocalResult(), ["B"], labels=["x"]) as flow:
        _load(Parameter("n", default=[1]), Secret("TOKEN"))
    described = flow.describe()
    assert FlowSpec.from_json(described).to_json() == described
    assert described == {
        "name": "etl",
        "kind": "dag",
        "storage": Local("/f", secrets=["A"]).to_json(),
        "run_config": LocalRun().to_json(),
        "labels": ["x"],
        "parameters": [{"name": "n", "required": False, "default": [1]}],
        "tasks": [
            {
                "slug": "load-1",
                "name": "load",
                "upstream": [],
                "retries": 2,
                "retry_delay": 5.0,
                "timeout": 1.5,
                "result": LocalResult().to_json(),
            }
        ],
        "secrets": ["A", "B", "TOKEN"],
        "result": LocalResult().to_json(),
        "project": None,
    }


def test_a_function_flow_describes_itself() -> None:
    @flow(name="report", storage=Module("pkg.flows"), secrets=["A"])
    def report(day: str, limit: int = 3) -> str:
        return day * limit

    described = report.describe()
    assert FlowSpec.from_json(described).to_json() == described
    assert described["kind"] == "function"
    assert described["parameters"] == [
        {"name": "day", "required": True, "default": None},
        {"name": "limit", "required": False, "default": 3},
    ]
    assert report("a") == "aaa"


def test_storage_may_be_set_later() -> None:
    with Flow("etl") as flow:
        one()
    flow.storage = Local(add_default_labels=False)
    assert flow.describe()["storage"]["add_default_labels"] is False


def test_arguments_may_hold_tasks_anywhere() -> None:
    @task
    def keep(value: Any) -> Any:
        return value

    with Flow("etl") as flow:
        a, b = one(), add(1)
        keep({"a": [a, (b, 3)], "s": {a}, "plain": [4]})
    assert results(flow)["keep-1"] == {"a": [1, (2, 3)], "s": {1}, "plain": [4]}
    assert slugs(flow)["keep-1"] == ["one-1", "add-1"]


def test_operators_and_unpacking() -> None:
    @task(nout=2)
    def pair() -> tuple[int, int]:
        return 7, 3

    with Flow("etl") as flow:
        a, b = pair()
        (a - b) * 2
        10 - a
        _ = -b
        _ = a >= b
        pair()[0]
    found = results(flow)
    assert [found[name] for name in ("mul-1", "sub-2", "neg-1", "ge-1", "getitem-3")] == [8, 3, -3, True, 7]
    with Flow("other"), pytest.raises(FlowError, match="give it nout="):
        _, _ = one()


def test_upstream_tasks_order_without_data() -> None:
    with Flow("etl") as flow:
        first = one(task_args={"name": "first"})
        second = add(1, upstream_tasks=[first])
        add(2, upstream_tasks=second)
    assert slugs(flow) == {"first-1": [], "add-1": ["first-1"], "add-2": ["add-1"]}


def test_the_imperative_api() -> None:
    class Start(Task):
        def run(self) -> int:
            return 5

    start, plus, end = Start(), add.copy(), one.copy(name="end")
    flow = Flow("etl")
    flow.set_dependencies(plus, keyword_tasks={"x": start, "y": 2}, downstream_tasks=[end])
    flow.chain(start, end)
    flow.add_edge(start, end)
    assert slugs(flow) == {"add-1": ["Start-1"], "Start-1": [], "end-1": ["add-1", "Start-1"]}
    assert list(slugs(flow)) == ["Start-1", "add-1", "end-1"]
    assert results(flow)["add-1"] == 7


def test_a_task_that_was_not_called() -> None:
    with Flow("etl") as flow:
        add(one)  # needs no arguments: it is added
        with pytest.raises(FlowError, match="task add is used but not part of it; call it"):
            one(upstream_tasks=[add])
    assert slugs(flow) == {"one-1": [], "add-1": ["one-1"]}


def test_cycles_are_an_error() -> None:
    with (
        pytest.raises(FlowError, match=r"flow 'etl': tasks wait .* circle: .*add-1.*add-2"),
        Flow("etl") as flow,
    ):
        a = add(1)
        b = add(a)
        flow.add_edge(b, a)
    with pytest.raises(FlowError, match="circle"):
        flow.describe()
    state = flow.execute({}, Observer())
    assert state.is_failed()
    assert "circle" in (state.message or "")


def test_blocks_may_be_nested() -> None:
    with Flow("outer") as outer:
        one()
        with Flow("inner") as inner:
            add(1)
        one()
    assert (list(slugs(outer)), list(slugs(inner))) == (["one-1", "one-2"], ["add-1"])


def test_a_failing_block_ends_the_building() -> None:
    with pytest.raises(ZeroDivisionError), Flow("etl"):
        _ = 1 / 0
    assert one() == 1


def test_task_subclasses() -> None:
    class Scale(Task):
        def __init__(self, factor: int, **settings: Any) -> None:
            self.factor = factor
            super().__init__(**settings)

        def run(self, x: int) -> int:
            return x * self.factor

    class Bare(Task):
        def __init__(self) -> None:  # forgets super().__init__()
            self.value = 4

        def run(self) -> int:
            return self.value

    with Flow("etl") as flow:
        Scale(3, name="triple")(Bare()())
    assert results(flow) == {"Bare-1": 4, "triple-1": 12}


def test_a_task_may_be_run_as_the_function_it_is() -> None:
    assert add.run(1, y=2) == 3
    assert add(1) == 2


def test_parameters_used_twice_are_one() -> None:
    with Flow("etl") as flow:
        add(Parameter("x", default=1), Parameter("x", default=1))
        with pytest.raises(FlowError, match="two different parameters 'x'"):
            Parameter("x", default=2)
    assert results(flow, x=4)["add-1"] == 8


def test_parameters_are_checked() -> None:
    with Flow("etl") as flow:
        add(Parameter("x"), Parameter("y", default=None))
    with pytest.raises(ParameterError, match="needs a value for x"):
        flow.run()
    with pytest.raises(ParameterError, match="no parameter 'z'; it takes x, y"):
        flow.run(x=1, z=2)
    state = flow.execute({}, Observer())
    assert state.is_failed()
    assert "needs a value for x" in (state.message or "")
    for default in (object(), {1, 2}, float("nan")):
        with pytest.raises(ParameterError, match="its default must be JSON"):
            Parameter("p", default=default)


def test_loading_makes_run_and_register_inert() -> None:
    calls = []

    @flow
    def touch() -> None:
        calls.append(1)

    with Loading():
        assert touch.run() is None
        assert touch.register("project") is None
    assert calls == []
    assert isinstance(touch.run(), State)
    assert calls == [1]


def test_run_and_register_belong_behind_the_block() -> None:
    with Flow("etl") as flow:
        for method in (flow.run, flow.register):
            with pytest.raises(FlowError, match="move it behind the block"):
                method()


def test_secrets_are_never_baked_into_a_graph() -> None:
    with Flow("etl"), pytest.raises(FlowError, match="give the Secret to a task"):
        Secret("TOKEN").get()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Flow(""), "non-empty string; got ''"),
        (lambda: Flow("a\nb"), "printable"),
        (lambda: Flow("x", "s3"), "flow 'x': storage takes a flowagent.storage.Storage; got 's3'"),
        (lambda: Flow("x", schedule=1), "no argument 'schedule'; start runs with: flowagent run"),
        (lambda: Flow("x", executor=1), "no argument 'executor'; independent tasks"),
        (lambda: Flow("x", state_handlers=[]), "no argument 'state_handlers'"),
        (lambda: Flow("x", colour=None), "no argument 'colour'"),
        (lambda: Flow("x", secrets="A"), "takes a list of strings"),
        (lambda: setattr(Flow("x"), "executor", 1), "flow 'x' has no 'executor'"),
        (lambda: setattr(Flow("x"), "storage", 1), "storage takes a"),
        (lambda: Flow("x").run(executor=1), "no argument 'executor'"),
        (lambda: Flow("x").register(colour=1), "no argument 'colour'"),
        (lambda: Flow("x").set_reference_tasks([one]), "not part of it"),
        (lambda: task(1), "@task decorates functions"),
        (lambda: task(lambda *xs: xs), "parameter xs must have a name"),
        (lambda: task(lambda flow: flow), "no parameter can be named 'flow'"),
        (lambda: task(one.run, retries=1, max_retries=2), "contradicts"),
        (lambda: task(one.run, retry_delay=5), "retry_delay without max_retries"),
        (lambda: task(one.run, timeout=-1), "task one: timeout takes a positive"),
        (lambda: task(one.run, trigger="sometimes"), "unknown trigger 'sometimes'"),
        (lambda: task(one.run, tags="a"), "takes a list of strings"),
        (lambda: task(one.run, cache_for=1), "no argument 'cache_for'; results are not cached"),
        (lambda: task(one.run, name=""), "non-empty string"),
        (lambda: add(), "task add: missing a required argument: 'x'"),
        (lambda: add(1, z=2), "unexpected keyword argument 'z'"),
        (lambda: add(1, upstream_tasks=[]), "works only inside 'with Flow"),
        (lambda: one + 1, "works only inside 'with Flow"),
        (lambda: flow(lambda *xs: xs), "must have a name"),
        (lambda: flow(lambda x={1}: x), "default must be JSON"),
        (lambda: Secret("A/../B"), "letters, digits and _ only"),
        (lambda: Task().run(), "has no run"),
    ],
)
def test_mistakes_are_said_in_one_line(make: Any, message: str) -> None:
    with pytest.raises((FlowError, NotImplementedError)) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_triggers_of_prefect_are_there() -> None:
    assert triggers.always_run == triggers.all_finished
    assert unmapped(1).value == 1

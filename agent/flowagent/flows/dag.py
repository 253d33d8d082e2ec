"""Flows whose tasks form a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from flowagent.flows.base import BaseFlow
from flowagent.flows.context import RunContext
from flowagent.flows.errors import FlowError
from flowagent.flows.graph import Node, Slugs, building, in_order, references, resolve
from flowagent.flows.inputs import Input, Parameter, Secret
from flowagent.flows.observer import Observer
from flowagent.flows.states import COMPLETED, FAILED, State, reason_of
from flowagent.flows.tasks import Task


class Flow(BaseFlow):
    """A flow that is built by calling tasks: ``with Flow("etl") as flow: load(extract())``.

    It fails with any of its tasks, unless ``set_reference_tasks`` says which of them decide.
    """

    kind = "dag"

    def _prepare(self) -> None:
        self._nodes: dict[Task, Node] = {}
        self._inputs: dict[str, Input] = {}
        self._slugs = Slugs()
        self._reference_tasks: list[Task] = []
        self._outer: list[Flow | None] = []

    def __enter__(self) -> Flow:
        self._outer.append(building.get())
        building.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        building.set(self._outer.pop())
        if error is None:
            in_order(list(self._nodes.values()), self.name)

    # -- building ------------------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, parameters and secrets, in the order of their creation."""
        return tuple(self._nodes)

    def get_tasks(self, name: str | None = None) -> list[Task]:
        return [task for task in self._nodes if name is None or task.name == name]

    def slug_of(self, task: Task) -> str:
        """The stable identity of a task in this flow. :raises FlowError: it is not part of it."""
        if task not in self._nodes:
            raise FlowError(
                f"flow {self.name!r}: task {task.name} is not part of it; call it inside 'with Flow(...)'"
            )
        return self._nodes[task].slug

    def add_task(self, task: Task) -> Task:
        """Add a task, without arguments as yet; the one that stands for it in this flow."""
        if not isinstance(task, Task):
            raise FlowError(
                f"flow {self.name!r}: only tasks can be added; got {task!r}, decorate it with @task"
            )
        if isinstance(task, Input):
            return self._add_input(task)
        if task not in self._nodes:
            self._nodes[task] = Node(task, self._slugs.next(task.name), {}, False, [])
        return task

    def _add_input(self, task: Input) -> Task:
        slug = task._slug()
        known = self._inputs.get(slug)
        if known is None:
            self._nodes[task] = Node(task, self._slugs.take(slug), {}, False, [])
            known = self._inputs[slug] = task
        elif not known.same(task):
            raise FlowError(
                f"flow {self.name!r} has two different parameters {task.name!r}; rename one of them"
            )
        return known

    def _member(self, task: Task) -> Task:
        """The task of this flow that an argument refers to; one that needs no arguments is added."""
        if task in self._nodes or isinstance(task, Input):
            return self.add_task(task)
        try:
            task._inputs((), {})
        except FlowError:
            raise FlowError(
                f"flow {self.name!r}: task {task.name} is used but not part of it; call it with its arguments"
            ) from None
        return self.add_task(task)

    def bind(
        self, task: Task, inputs: Mapping[str, Any], *, mapped: bool = False, upstream_tasks: Any = None
    ) -> None:
        """Add a task with its arguments, and the tasks it waits for without using their values."""
        given = {name: resolve(value, self._member) for name, value in inputs.items()}
        after = self._members(upstream_tasks)
        self.add_task(task)
        node = self._nodes[task]
        node.inputs.update(given)
        node.mapped = mapped
        node.after.extend(after)

    def _members(self, tasks: Any) -> list[Task]:
        listed = [] if tasks is None else [tasks] if isinstance(tasks, Task) else list(tasks)
        found = [list(references(item)) for item in listed]
        for item, tasks_in_it in zip(listed, found):  # strict= needs Python 3.10
            if not tasks_in_it:
                raise FlowError(f"flow {self.name!r}: upstream_tasks takes tasks; got {item!r}")
        return [self._member(task) for tasks_in_it in found for task in tasks_in_it]

    def add_edge(
        self, upstream_task: Any, downstream_task: Task, key: str | None = None, mapped: bool = False
    ) -> None:
        """Make one task wait for another; with ``key``, its value becomes that argument."""
        self.add_task(downstream_task)
        node = self._nodes[downstream_task]
        if key is None:
            node.after.extend(self._members([upstream_task]))
        else:
            node.inputs[key] = resolve(upstream_task, self._member)
        node.mapped = node.mapped or mapped

    def set_dependencies(
        self,
        task: Task,
        upstream_tasks: Iterable[Any] | None = None,
        downstream_tasks: Iterable[Task] | None = None,
        keyword_tasks: Mapping[str, Any] | None = None,
        mapped: bool = False,
    ) -> None:
        """Add edges to and from a task; ``keyword_tasks`` are its arguments, by name."""
        self.add_task(task)
        for upstream in upstream_tasks or ():
            self.add_edge(upstream, task, mapped=mapped)
        for key, upstream in (keyword_tasks or {}).items():
            self.add_edge(upstream, task, key=key, mapped=mapped)
        for downstream in downstream_tasks or ():
            self.add_edge(task, downstream)

    def chain(self, *tasks: Task) -> None:
        """Make each task wait for the one before it."""
        for upstream, downstream in zip(tasks, tasks[1:]):  # needs Python 3.10
            self.add_edge(upstream, downstream)

    def set_reference_tasks(self, tasks: Iterable[Task]) -> None:
        """Let these tasks decide whether the flow failed. :raises FlowError: one is not part of it."""
        listed = list(tasks)
        for task in listed:
            self.slug_of(task)
        self._reference_tasks = listed

    def reference_tasks(self) -> tuple[Task, ...]:
        return tuple(self._reference_tasks or self._nodes)

    # -- describing and running ----------------------------------------------------------------------

    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(task for task in self._nodes if isinstance(task, Parameter))

    def needed_secrets(self) -> tuple[str, ...]:
        used = {task.name for task in self._nodes if isinstance(task, Secret)}
        return tuple(sorted({*super().needed_secrets(), *used}))

    def _task_specs(self) -> list[dict[str, Any]]:
        return [
            {
                "slug": node.slug,
                "name": node.task.name,
                "upstream": [self._nodes[t].slug for t in node.upstream() if not isinstance(t, Input)],
                "retries": node.task.max_retries,
                "retry_delay": node.task.retry_delay,
                "timeout": node.task.timeout,
                "result": node.task.result.to_json() if node.task.result else None,
            }
            for node in in_order(list(self._nodes.values()), self.name)
            if not isinstance(node.task, Input)
        ]

    def execute(
        self, parameters: Mapping[str, Any], observer: Observer, concurrency: int | None = None
    ) -> State:
        from flowagent.flows.engine import Engine, Execution, executing

        try:
            values = {"flow_name": self.name, "parameters": self._check(parameters)}
            nodes = in_order(list(self._nodes.values()), self.name)
        except FlowError as error:
            return State(FAILED, error, reason_of(error))
        execution = Execution(observer, self.result, concurrency)
        outside = executing.set(None)
        try:
            with RunContext(values):
                states = Engine(nodes, execution).execute()
        finally:
            executing.reset(outside)
        return self._verdict(states, execution.failures)

    def _verdict(self, states: dict[Task, State], failures: list[tuple[str, State]]) -> State:
        deciding = {self.slug_of(task) for task in self.reference_tasks() if states[task].is_failed()}
        if not deciding:
            return State(COMPLETED, states)
        slug, first = next(failure for failure in failures if failure[0] in deciding)
        slug, reason = first.origin or (slug, first.message or "failed")
        return State(FAILED, states, f"task {slug} failed: {reason}", origin=(slug, reason))

    def _interrupted(self, state: State) -> bool:
        states = list(state.result.values()) if isinstance(state.result, dict) else []
        units = [*states, *(child for task in states for child in task.map_states)]
        return any(isinstance(unit.result, KeyboardInterrupt) for unit in units)

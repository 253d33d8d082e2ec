"""The engine: runs the tasks of a flow in this process, as many at the same time as their graph allows."""

from __future__ import annotations

import contextvars
import heapq
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Any

from flowagent.flows.attempts import Outcome, attempt
from flowagent.flows.context import context
from flowagent.flows.errors import FlowError, Stop, TaskFailed, TaskTimeout
from flowagent.flows.graph import Node, Slugs, building, references, resolve
from flowagent.flows.inputs import Input, digest
from flowagent.flows.logs import get_logger
from flowagent.flows.mapping import spread
from flowagent.flows.observer import Observer
from flowagent.flows.results import Result
from flowagent.flows.states import COMPLETED, FAILED, SKIPPED, State, reason_of
from flowagent.flows.tasks import Task
from flowagent.flows.triggers import decide
from flowagent.flows.workers import Job, Workers


class Execution:
    """One execution of a flow. A function flow shares it with the engines of all tasks that it calls."""

    def __init__(
        self,
        observer: Observer,
        result: Result | None = None,
        concurrency: int | None = None,
        *,
        by_inputs: bool = False,
    ) -> None:
        self._observer = observer
        self._by_inputs = by_inputs  # a task is known again by its arguments, as no graph says what they are
        self._result = result
        self._lock = threading.Lock()
        self.concurrency = max(1, concurrency or min(32, (os.cpu_count() or 1) + 4))
        self._slugs = Slugs()
        self.failures: list[tuple[str, State]] = []  # of tasks, the first one first

    def slug(self, name: str) -> str:
        with self._lock:
            return self._slugs.next(name)

    def report(self, slug: str, name: str, state: str, reason: str | None = None, tries: int = 1) -> None:
        with self._lock:
            self._observer.task(slug, name, state, reason, tries)

    def keep(
        self, slug: str, value: Any, declaration: Result | None = None, inputs: str | None = None
    ) -> None:
        """Hand a value to the observer, if it is to be kept."""
        chosen = declaration or self._result
        if chosen is not None:
            with self._lock:
                if value is not None:
                    self._observer.result(slug, value, chosen, inputs)
                elif slug:
                    self._observer.nothing(slug, inputs)

    def inputs(self, unit: Unit) -> str | None:
        """The digest of a unit's arguments, before it can change them; None where it is not needed."""
        kept = self._by_inputs and (unit.task.result or self._result) is not None
        return digest(unit.inputs) if kept else None

    def restore(self, unit: Unit) -> State | None:
        """How a unit ended in the run that this one repeats; None: it has to run."""
        with self._lock:
            found = self._observer.restored(unit.slug, self.inputs(unit))
        if found is None:
            return None
        return State(COMPLETED, found.value, f"restored from run {found.run_id}")


executing: contextvars.ContextVar[Execution | None] = contextvars.ContextVar(
    "flowagent_executing", default=None
)
"""The execution of the function flow that this thread is part of."""


class Unit:
    """A task that runs, or one child of a mapped task."""

    def __init__(self, node: Node, inputs: dict[str, Any], index: int | None = None) -> None:
        self.node = node
        self.task = node.task
        self.inputs = inputs
        self.index = index
        self.slug = node.slug if index is None else f"{node.slug}[{index}]"
        self.tries = 0


class Engine:
    """Runs nodes whose order has been checked. Everything but the tasks themselves happens in one thread."""

    def __init__(self, nodes: Sequence[Node], execution: Execution) -> None:
        self._nodes = {node.task: node for node in nodes}
        self._execution = execution
        self._upstream = {node.task: node.upstream() for node in nodes}
        self._waits = {task: len(upstream) for task, upstream in self._upstream.items()}
        self._followers: dict[Task, list[Node]] = {task: [] for task in self._nodes}
        for task, upstream in self._upstream.items():
            for other in upstream:
                self._followers[other].append(self._nodes[task])
        self._free = deque(node for node in nodes if not self._waits[node.task])
        self._ready: deque[Unit] = deque()
        self._delayed: list[tuple[float, int, Unit]] = []  # a heap of retries, the next one first
        self._running: dict[Job, Unit] = {}
        self._children: dict[Task, list[State | None]] = {}
        self._open: dict[Task, int] = {}  # children of a mapped task that have not ended
        self._order = itertools.count()
        self._finished: SimpleQueue[Job] = SimpleQueue()
        self._workers = Workers(self._finished)
        self._here: tuple[Job, Unit] | None = None  # what runs in this very thread
        self._interrupted = False
        self.states: dict[Task, State] = {}

    def execute(self) -> dict[Task, State]:
        """Run all nodes; how each ended. Errors of the observer are raised, those of tasks are not."""
        try:
            while self._step():
                pass
        finally:
            for job in self._running:
                job.abandon(TaskTimeout)
            self._workers.close()
        for task in self._nodes.keys() - self.states.keys():  # Ctrl-C came between two lines of this class
            self.states[task] = State(FAILED, KeyboardInterrupt(), "not run: the flow was interrupted")
        return self.states

    def _step(self) -> bool:
        try:
            while self._free:
                self._begin(self._free.popleft())
            if not (self._ready or self._delayed or self._running):
                return False
            self._dispatch()
            if not self._free:
                self._wait()
        except KeyboardInterrupt:
            self._interrupt()
        return True

    # -- nodes ---------------------------------------------------------------------------------------

    def _begin(self, node: Node) -> None:
        """All upstream tasks of a node have ended: it ends unrun, becomes ready, or is spread."""
        task = node.task
        if isinstance(task, Input):
            self._end(node, self._input(task))
            return
        if node.mapped:
            self._spread(node)
            return
        ends = [(self._nodes[other].slug, self.states[other]) for other in self._upstream[task]]
        unit = Unit(node, {})
        state = self._unrun(node, ends)
        if state is None:
            unit.inputs = {name: resolve(value, self._value) for name, value in node.inputs.items()}
            state = self._execution.restore(unit)
        if state is None:
            self._ready.append(unit)
        else:
            self._finish(unit, state)

    def _input(self, task: Input) -> State:
        try:
            return State(COMPLETED, task.run())
        except Exception as error:
            return State(FAILED, error, reason_of(error))

    def _unrun(self, node: Node, ends: Sequence[tuple[str, State]]) -> State | None:
        if self._interrupted:
            reason = "not run: the flow was interrupted"
            return State(FAILED, TaskFailed(reason), reason)
        return decide(node.task.trigger, ends)

    def _value(self, task: Task) -> Any:
        return self.states[task].result

    def _spread(self, node: Node) -> None:
        """Make the children of a mapped task. What it is mapped over may have failed in part only."""
        over = {other for other in node.mapped_over() if self.states[other].children is not None}
        shared = [(self._nodes[t].slug, self.states[t]) for t in self._upstream[node.task] if t not in over]
        parent = Unit(node, {})
        state = self._unrun(node, shared) if shared or self._interrupted else None
        if state is not None:
            self._finish(parent, state)
            return
        try:
            spread_inputs = spread({name: resolve(value, self._value) for name, value in node.inputs.items()})
        except Exception as error:
            self._finish(parent, State(FAILED, error, reason_of(error)))
            return
        self._execution.report(node.slug, node.task.name, "running")
        self._children[node.task] = [None] * len(spread_inputs)
        self._open[node.task] = len(spread_inputs)
        if not spread_inputs:
            self._end_mapped(node)
        for index, inputs in enumerate(spread_inputs):
            unit = Unit(node, inputs, index)
            ends = [(f"{self._nodes[t].slug}[{index}]", self.states[t].map_states[index]) for t in over]
            ended = decide(node.task.trigger, [*shared, *ends]) or self._execution.restore(unit)
            if ended is None:
                self._ready.append(unit)
            else:
                self._finish(unit, ended)

    def _end_mapped(self, node: Node) -> None:
        children = [state for state in self._children.pop(node.task) if state is not None]
        values = [state.result for state in children]
        failed = [(index, state) for index, state in enumerate(children) if state.is_failed()]
        if not failed:
            state = State(COMPLETED, values, children=children)
        else:
            index, first = failed[0]
            origin = first.origin or (f"{node.slug}[{index}]", first.message or "")
            reason = f"{len(failed)} of {len(children)} children failed, first {origin[0]}: {origin[1]}"
            state = State(FAILED, values, reason, origin=origin, children=children)
        self._execution.report(node.slug, node.task.name, state.name, state.message)
        self._end(node, state)

    def _end(self, node: Node, state: State) -> None:
        self.states[node.task] = state
        if state.is_failed():
            self._execution.failures.append((node.slug, state))
            if isinstance(node.task, Input):
                self._execution.report(node.slug, node.task.name, FAILED, state.message, 0)
        for follower in self._followers[node.task]:
            self._waits[follower.task] -= 1
            if not self._waits[follower.task]:
                self._free.append(follower)

    # -- units ---------------------------------------------------------------------------------------

    def _finish(self, unit: Unit, state: State) -> None:
        """A unit ended for good."""
        self._execution.report(unit.slug, unit.task.name, state.name, state.message, unit.tries)
        if unit.index is None:
            self._end(unit.node, state)
            return
        self._children[unit.task][unit.index] = state
        self._open[unit.task] -= 1
        if not self._open[unit.task]:
            self._end_mapped(unit.node)

    def _dispatch(self) -> None:
        """Start what is ready, as far as there is room; a single unit runs in this very thread."""
        now = time.monotonic()
        while self._delayed and self._delayed[0][0] <= now:
            self._ready.append(heapq.heappop(self._delayed)[2])
        if (
            len(self._ready) == 1
            and not (self._running or self._delayed)
            and self._ready[0].task.timeout is None
        ):
            self._run_here(self._ready.popleft())
            return
        while self._ready and len(self._running) < self._execution.concurrency:
            unit = self._ready.popleft()
            job = self._job(unit)
            self._running[job] = unit
            self._workers.submit(job)

    def _run_here(self, unit: Unit) -> None:
        job = self._job(unit)
        self._here = (job, unit)
        job.execute()
        self._here = None
        self._ended(unit, job.outcome)
        if isinstance(job.outcome.state.result, KeyboardInterrupt):
            self._interrupt()

    def _job(self, unit: Unit) -> Job:
        unit.tries += 1
        self._execution.report(unit.slug, unit.task.name, "running", None, unit.tries)
        inside = contextvars.copy_context()
        inside.run(building.set, None)

        def work(job: Job) -> Outcome:
            try:
                return inside.run(attempt, unit, self._execution, job)
            except Stop:
                raise
            except BaseException as error:  # the job has to come back, or the engine would wait for ever
                return Outcome(State(FAILED, error, reason_of(error)))

        timeout = unit.task.timeout
        return Job(work, None if timeout is None else time.monotonic() + timeout)

    def _wait(self) -> None:
        """Sleep until a job ends, its time is up, or a retry is due."""
        # a worker may take its job's deadline away at any moment: each is read once
        deadlines = [due for due in [job.deadline for job in self._running] if due is not None]
        if self._delayed and len(self._running) < self._execution.concurrency:
            deadlines.append(self._delayed[0][0])
        if not (self._running or deadlines):
            return
        try:
            timeout = min(max(0.0, min(deadlines) - time.monotonic()), 3600.0) if deadlines else None
            self._came_back(self._finished.get(timeout=timeout))
            while True:
                self._came_back(self._finished.get_nowait())
        except Empty:
            pass
        self._expire()

    def _came_back(self, job: Job) -> None:
        unit = self._running.pop(job, None)
        if unit is not None:  # None: it ended while it was being interrupted
            self._workers.came_back()
            self._ended(unit, job.outcome)

    def _expire(self) -> None:
        """Give up on the jobs whose time is up; their threads are asked to stop, and not waited for."""
        now = time.monotonic()
        for job, unit in list(self._running.items()):
            if job.abandon(TaskTimeout, at=now):
                del self._running[job]
                self._workers.abandoned()
                reason = f"timed out after {unit.task.timeout:g} s"
                with context(task_slug=unit.slug):
                    get_logger().error("%s; its thread was asked to stop", reason)
                self._ended(unit, Outcome(State(FAILED, TaskTimeout(f"task {unit.slug} {reason}"), reason)))

    def _ended(self, unit: Unit, outcome: Outcome) -> None:
        """A try ended: the unit did too, unless tries are left."""
        state, task = outcome.state, unit.task
        if not state.is_failed() or outcome.final or unit.tries > task.max_retries or self._interrupted:
            self._finish(unit, state)
            return
        following = f"try {unit.tries + 1} of {task.max_retries + 1} follows in {task.retry_delay:g} s"
        reason = f"{state.message}; {following}"
        self._execution.report(unit.slug, task.name, "retrying", reason, unit.tries)
        due = time.monotonic() + task.retry_delay
        heapq.heappush(self._delayed, (due, next(self._order), unit))

    def _interrupt(self) -> None:
        """Ctrl-C: nothing is started any more, and what runs is not waited for."""
        self._interrupted = True
        running = list(self._running.items())
        if self._here is not None:
            running.append(self._here)
            self._here = None
        for job, unit in running:
            if self._running.pop(job, None) is not None and job.abandon(TaskTimeout):
                self._workers.abandoned()
            error = KeyboardInterrupt("interrupted while it ran")
            self._finish(unit, State(FAILED, error, reason_of(error)))
        waiting = [*self._ready, *(unit for _, _, unit in self._delayed)]
        self._ready.clear()
        self._delayed.clear()
        for unit in waiting:
            self._finish(unit, State(FAILED, TaskFailed("not run"), "not run: the flow was interrupted"))


def call(task: Task, inputs: dict[str, Any], *, mapped: bool = False) -> Any:
    """Run a task that was called outside of a graph, and return its value, or raise what it raised."""
    execution = executing.get() or Execution(Observer())
    given = {name: resolve(value, _present_value) for name, value in inputs.items()}
    node = Node(task, execution.slug(task.name), given, mapped, [])
    if any(True for value in given.values() for _ in references(value)):
        raise FlowError(
            f"task {task.name}: a task cannot be an argument here; give its result, {task.name}(other())"
        )
    state = Engine([node], execution).execute()[task]
    if not state.is_failed():
        return None if state.name == SKIPPED else state.result
    first = next((child for child in state.map_states if child.is_failed()), state)
    if isinstance(first.result, BaseException):
        raise first.result
    raise TaskFailed(f"task {node.slug}: {state.message}")


def _present_value(task: Task) -> Any:
    return task.run() if isinstance(task, Input) else task

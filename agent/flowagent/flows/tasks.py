"""Tasks: the steps of a flow."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

from flowagent.flows import triggers
from flowagent.flows.declarations import count, flag, is_name, names, refuse, seconds
from flowagent.flows.errors import FlowError
from flowagent.flows.graph import building
from flowagent.flows.operators import Operators, function_of
from flowagent.flows.results import Result

if TYPE_CHECKING:
    import inspect
    from datetime import timedelta

    from flowagent.flows.dag import Flow

RESERVED = frozenset({"flow", "mapped", "task_args", "upstream_tasks"})
"""Keywords of a task's call; its own parameters cannot have these names."""

_INSTEAD = {
    "cache_for": "results are not cached between runs; keep them in the task",
    "cache_key": "results are not cached between runs; keep them in the task",
    "cache_validator": "results are not cached between runs; keep them in the task",
    "checkpoint": "a result is kept where the task or the flow has result=",
    "on_failure": "add a task with trigger=flowagent.triggers.any_failed",
    "retry_on": "max_retries= applies to every exception",
    "skip_on_upstream_skip": "use trigger=flowagent.triggers.all_finished",
    "slug": "slugs are made from name=",
    "state_handlers": "add a task with trigger=flowagent.triggers.any_failed or all_finished",
    "target": "give result= a location",
    "task_run_name": "use name=",
}


class Task(Operators):
    """A step of a flow. Subclass it and define ``run()``, or decorate a function with :func:`task`.

    ``max_retries`` (or ``retries``) tries follow a failed one, ``retry_delay`` seconds later. Each may take
    ``timeout`` seconds. ``result`` says where its values are kept; by default as the flow says. With
    ``log_stdout`` what it prints is logged. ``nout`` is the number of results to unpack.

    :raises FlowError: an argument that cannot work
    """

    name: str = ""
    tags: tuple[str, ...] = ()
    max_retries: int = 0
    retry_delay: float = 0.0
    timeout: float | None = None
    trigger: str = triggers.all_successful
    result: Result | None = None
    log_stdout: bool = False
    nout: int | None = None

    def __init__(
        self,
        name: str | None = None,
        *,
        max_retries: int | None = None,
        retries: int | None = None,
        retry_delay: float | timedelta | None = None,
        timeout: float | timedelta | None = None,
        trigger: str = triggers.all_successful,
        result: Result | None = None,
        log_stdout: bool = False,
        nout: int | None = None,
        tags: Iterable[str] | None = None,
        **unknown: Any,
    ) -> None:
        self.name = type(self).__name__ if name is None else name
        if not is_name(self.name):
            raise FlowError(f"a task's name must be a printable, non-empty string; got {name!r}")
        what = f"task {self.name}"
        refuse(what, unknown, _INSTEAD)
        if retries is not None and max_retries is not None and retries != max_retries:
            raise FlowError(f"{what}: retries={retries} contradicts max_retries={max_retries}; give only one")
        times = max_retries if retries is None else retries
        self.max_retries = count(times or 0, f"{what}: max_retries")
        self.retry_delay = seconds(retry_delay, f"{what}: retry_delay", zero=True) or 0.0
        if self.retry_delay and not self.max_retries:
            raise FlowError(f"{what}: retry_delay without max_retries; give max_retries= as well")
        self.timeout = seconds(timeout, f"{what}: timeout")
        if trigger not in triggers.TRIGGERS:
            known = ", ".join(triggers.TRIGGERS)
            raise FlowError(f"{what}: unknown trigger {trigger!r}; flowagent.triggers has {known}")
        self.trigger = trigger
        if result is not None and not isinstance(result, Result):
            raise FlowError(f"{what}: result takes a flowagent.results object; got {result!r}")
        self.result = result
        self.log_stdout = flag(log_stdout, f"{what}: log_stdout")
        self.nout = None if nout is None else count(nout, f"{what}: nout")
        self.tags = names(tags, f"{what}: tags")

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the task does; its value goes to the tasks that it is an argument of."""
        raise NotImplementedError(f"task {self.name or type(self).__name__} has no run() method; define it")

    def __call__(
        self,
        *args: Any,
        mapped: bool = False,
        upstream_tasks: Iterable[Any] | None = None,
        flow: Flow | None = None,
        task_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Add a copy of this task to the flow that is being built; elsewhere, run it now.

        Inside a running function flow it is one of its tasks; its retries and its timeout hold everywhere.

        :raises FlowError: the arguments do not fit"""
        target = flow or building.get()
        called = self.copy(**(task_args or {}))
        inputs = called._inputs(args, kwargs)
        if target is not None:
            target.bind(called, inputs, mapped=mapped, upstream_tasks=upstream_tasks)
            return called
        if upstream_tasks is not None:
            raise FlowError(f"task {self.name}: upstream_tasks= works only inside 'with Flow(...)'")
        from flowagent.flows.engine import call

        return call(called, inputs, mapped=mapped)

    def map(self, *args: Any, **kwargs: Any) -> Any:
        """Run once for each item of the arguments; those in :func:`unmapped` go to each as they are."""
        return self(*args, mapped=True, **kwargs)

    def bind(self, *args: Any, **kwargs: Any) -> Task:
        """Add this very task, not a copy, to the flow that is being built."""
        target = kwargs.pop("flow", None) or building.get()
        if target is None:
            raise FlowError(f"task {self.name}: bind() works only inside 'with Flow(...)'")
        mapped, upstream_tasks = kwargs.pop("mapped", False), kwargs.pop("upstream_tasks", None)
        target.bind(self, self._inputs(args, kwargs), mapped=mapped, upstream_tasks=upstream_tasks)
        return self

    def set_upstream(self, task: Any, key: str | None = None) -> None:
        """Make this task of the flow that is being built wait for another, or take its value as ``key``."""
        target = building.get()
        if target is None:
            raise FlowError(
                f"task {self.name}: set_upstream() works only inside 'with Flow(...)'; use flow.add_edge"
            )
        target.add_edge(task, self, key=key)

    def set_downstream(self, task: Task, key: str | None = None) -> None:
        task.set_upstream(self, key=key)

    def copy(self, **changes: Any) -> Any:
        """A copy of its own, with some settings changed, as ``task_args=`` does."""
        copied = copy.copy(self)
        if changes:
            settings: dict[str, Any] = {name: getattr(self, name) for name in _SETTINGS}
            if "retries" in changes:
                settings.pop("max_retries")
            checked = Task(**{**settings, **changes})
            vars(copied).update(vars(checked))
        elif not copied.name:
            copied.name = type(self).__name__  # a subclass that did not call super().__init__()
        return copied

    def _signature(self) -> inspect.Signature:
        """The parameters of ``run``. :raises FlowError: one of them can be no argument of a task."""
        import inspect

        found = inspect.signature(self.run)
        for parameter in found.parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
                raise FlowError(
                    f"task {self.name}: its parameter {parameter.name} must have a name to give it by"
                )
            if parameter.name in RESERVED:
                raise FlowError(f"task {self.name}: no parameter can be named {parameter.name!r}; rename it")
        return found

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name. :raises FlowError: they do not fit the parameters of ``run``."""
        signature = self._signature()
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise FlowError(f"task {self.name}: {error}; it takes {signature}") from None
        given = dict(bound.arguments)
        for parameter in signature.parameters.values():
            if parameter.kind == parameter.VAR_KEYWORD:
                given.update(given.pop(parameter.name, {}))
        return given

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


_SETTINGS = (
    "name",
    "max_retries",
    "retry_delay",
    "timeout",
    "trigger",
    "result",
    "log_stdout",
    "nout",
    "tags",
)


class FunctionTask(Task):
    """A task made from a function."""

    def __init__(self, fn: Callable[..., Any], name: str | None = None, **settings: Any) -> None:
        if not callable(fn):
            raise FlowError(f"@task decorates functions; got {fn!r}")
        super().__init__(getattr(fn, "__name__", type(fn).__name__) if name is None else name, **settings)
        self.run = fn  # type: ignore[method-assign]  # f.run(1) calls the plain function, as its tests do
        self.__doc__ = fn.__doc__
        self._signature()


class OperatorTask(Task):
    """Applies a function of the module ``operator``."""

    def __init__(self, operation: str) -> None:
        super().__init__(operation.strip("_"))
        self.operation = operation

    def run(self, a: Any, b: Any = None) -> Any:
        function = function_of(self.operation)
        return function(a) if self.operation == "neg" else function(a, b)


@overload
def task(fn: Callable[..., Any], **settings: Any) -> FunctionTask: ...


@overload
def task(fn: None = None, **settings: Any) -> Callable[[Callable[..., Any]], FunctionTask]: ...


def task(fn: Callable[..., Any] | None = None, **settings: Any) -> Any:
    """Make a function a task: ``@task`` or ``@task(max_retries=3, retry_delay=10)``; see :class:`Task`."""
    return functools.partial(FunctionTask, **settings) if fn is None else FunctionTask(fn, **settings)

"""Flows that are plain functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, overload

from flowagent.flows.base import BaseFlow
from flowagent.flows.context import RunContext
from flowagent.flows.errors import FlowError, Stop
from flowagent.flows.graph import building
from flowagent.flows.inputs import Parameter
from flowagent.flows.observer import Observer
from flowagent.flows.states import COMPLETED, FAILED, State, reason_of


class FunctionFlow(BaseFlow):
    """A function as a flow: its parameters are the flow's, and tasks that it calls just run.

    Calling it calls the function; ``run()`` runs it as a flow.
    """

    kind = "function"

    def __init__(
        self, fn: Callable[..., Any], name: str | None = None, *declarations: Any, **more: Any
    ) -> None:
        if not callable(fn) or isinstance(fn, BaseFlow):
            raise FlowError(f"@flow decorates functions; got {fn!r}")
        super().__init__(getattr(fn, "__name__", "") if name is None else name, *declarations, **more)
        self.fn = fn
        self.__doc__ = fn.__doc__
        self._parameters = self._read_signature()

    def _read_signature(self) -> tuple[Parameter, ...]:
        outside = building.get()
        building.set(None)  # they are not parameters of a flow that is being built around this one
        try:
            names = _plain_parameters(self.fn)
            if names is None:
                names = self._inspected_parameters()
            return tuple([Parameter(name, **default) for name, default in names.items()])
        finally:
            building.set(outside)

    def _inspected_parameters(self) -> dict[str, dict[str, Any]]:
        import inspect

        found = {}
        for parameter in inspect.signature(self.fn).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise FlowError(
                    f"flow {self.name!r}: its parameter {parameter} must have a name to give it by"
                )
            found[parameter.name] = (
                {} if parameter.default is parameter.empty else {"default": parameter.default}
            )
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def parameters(self) -> tuple[Parameter, ...]:
        return self._parameters

    def execute(
        self, parameters: Mapping[str, Any], observer: Observer, concurrency: int | None = None
    ) -> State:
        from flowagent.flows.attempts import awaited, log_failure
        from flowagent.flows.engine import Execution, executing

        try:
            given = self._check(parameters)
        except FlowError as error:
            return State(FAILED, error, reason_of(error))
        execution = Execution(observer, self.result, concurrency, by_inputs=True)
        outside = executing.set(execution)
        try:
            with RunContext({"flow_name": self.name, "parameters": given}):
                try:
                    value = awaited(self.fn(**given))
                except Stop:
                    raise
                except BaseException as error:
                    return self._failed(error, execution.failures, log_failure)
                try:
                    execution.keep("", value)
                except Exception as error:
                    log_failure(error)
                    return State(FAILED, error, f"its result could not be kept: {reason_of(error)}")
        finally:
            executing.reset(outside)
        return State(COMPLETED, value)

    def _failed(
        self,
        error: BaseException,
        failures: list[tuple[str, State]],
        log_failure: Callable[[BaseException], None],
    ) -> State:
        """Failed, and if a task raised this: by that task, which has logged it."""
        for slug, state in failures:
            if error is state.result or any(error is child.result for child in state.map_states):
                slug, reason = state.origin or (slug, state.message or reason_of(error))
                return State(FAILED, error, f"task {slug} failed: {reason}", origin=(slug, reason))
        log_failure(error)
        return State(FAILED, error, reason_of(error))


def _plain_parameters(fn: Callable[..., Any]) -> dict[str, dict[str, Any]] | None:
    """Name -> its default, if any, of a function as ``def`` makes it; None if it has to be inspected.

    This happens in each run, and inspect touches much memory that is shared with the launcher otherwise."""
    if type(fn) is not FunctionType or fn.__dict__:  # what wraps or signs it leaves word there
        return None
    code = fn.__code__
    if code.co_flags & (CO_VARARGS | CO_VARKEYWORDS) or code.co_posonlyargcount:
        return None
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    positional = fn.__defaults__ or ()
    defaults = dict(zip(names[code.co_argcount - len(positional) :], positional))
    defaults.update(fn.__kwdefaults__ or {})
    return {name: {"default": defaults[name]} if name in defaults else {} for name in names}


CO_VARARGS, CO_VARKEYWORDS = 4, 8
"""As in inspect, which is imported only when it is needed."""


@overload
def flow(fn: Callable[..., Any], **declarations: Any) -> FunctionFlow: ...


@overload
def flow(fn: None = None, **declarations: Any) -> Callable[[Callable[..., Any]], FunctionFlow]: ...


def flow(fn: Callable[..., Any] | None = None, **declarations: Any) -> Any:
    """Make a function a flow: ``@flow`` or ``@flow(name="etl", storage=...)``; see :class:`FunctionFlow`."""
    if fn is not None:
        return FunctionFlow(fn, **declarations)
    return lambda function: FunctionFlow(function, **declarations)

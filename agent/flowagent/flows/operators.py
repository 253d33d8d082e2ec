"""Operators on the results of tasks while a flow is being built: ``total[0] + 1`` is two more tasks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from flowagent.flows.errors import FlowError


def _apply(name: str, *operands: Any) -> Any:
    """A task of the current flow that applies ``operator.NAME``."""
    from flowagent.flows.graph import building
    from flowagent.flows.tasks import OperatorTask

    if building.get() is None:
        raise FlowError(f"operator {name.strip('_')} on a task works only inside 'with Flow(...)'")
    return OperatorTask(name)(*operands)


def _forward(name: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _apply(name, self, other)


def _reflected(name: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _apply(name, other, self)


class Operators:
    """Gives tasks the operators whose results are tasks again. Equality stays identity."""

    nout: int | None

    __getitem__ = _forward("getitem")
    __add__, __radd__ = _forward("add"), _reflected("add")
    __sub__, __rsub__ = _forward("sub"), _reflected("sub")
    __mul__, __rmul__ = _forward("mul"), _reflected("mul")
    __truediv__, __rtruediv__ = _forward("truediv"), _reflected("truediv")
    __floordiv__, __rfloordiv__ = _forward("floordiv"), _reflected("floordiv")
    __mod__, __rmod__ = _forward("mod"), _reflected("mod")
    __pow__, __rpow__ = _forward("pow"), _reflected("pow")
    __and__, __rand__ = _forward("and_"), _reflected("and_")
    __or__, __ror__ = _forward("or_"), _reflected("or_")
    __lt__, __le__ = _forward("lt"), _forward("le")
    __gt__, __ge__ = _forward("gt"), _forward("ge")

    def __neg__(self) -> Any:
        return _apply("neg", self)

    def __iter__(self) -> Iterator[Any]:
        if self.nout is None:
            raise FlowError("how many results a task has must be known to unpack it; give it nout=")
        return iter([self[index] for index in range(self.nout)])


def function_of(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(operator, name)
    return function

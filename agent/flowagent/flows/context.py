"""``context``: what code can know of the run and the task that it is part of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import datetime

NAMES = (
    "run_id",
    "flow_name",
    "parameters",
    "attempt",
    "scheduled_for",
    "labels",
    "secrets",
    "task_name",
    "task_slug",
    "task_run_count",
    "map_index",
)
"""What a run and its tasks set; ``with context(...)`` may add others."""

_NO_VALUES: Mapping[str, Any] = {}
_values: ContextVar[Mapping[str, Any]] = ContextVar("flowagent_context", default=_NO_VALUES)
_run_values: Mapping[str, Any] = _NO_VALUES


def _date() -> datetime:
    """The day that the run is for: when it was scheduled for, or now."""
    from datetime import datetime, timezone

    scheduled = _current().get("scheduled_for")
    return scheduled if isinstance(scheduled, datetime) else datetime.now(timezone.utc)


def _day(offset: int, form: str = "%Y-%m-%d") -> str:
    from datetime import timedelta

    return (_date() + timedelta(days=offset)).strftime(form)


def _logger() -> Any:
    from flowagent.flows.logs import get_logger

    return get_logger()


_DERIVED: dict[str, Callable[[], Any]] = {
    "logger": _logger,
    "date": _date,
    "today": lambda: _day(0),
    "today_nodash": lambda: _day(0, "%Y%m%d"),
    "yesterday": lambda: _day(-1),
    "yesterday_nodash": lambda: _day(-1, "%Y%m%d"),
    "tomorrow": lambda: _day(1),
    "tomorrow_nodash": lambda: _day(1, "%Y%m%d"),
    "scheduled_start_time": lambda: _current()["scheduled_for"],
    "flow_run_id": lambda: _current()["run_id"],
}


def _current() -> Mapping[str, Any]:
    """The values of this thread; a thread that a task has started sees those of the run."""
    values = _values.get()
    return _run_values if values is _NO_VALUES else values


class Context:
    """The one ``context``. Its values belong to the thread, and go along into the threads of the tasks."""

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a name, or ``default`` if there is none at the moment."""
        values = _current()
        if name in values:
            return values[name]
        if name not in _DERIVED:
            return default
        try:
            return _DERIVED[name]()
        except KeyError:
            return default

    def __getattr__(self, name: str) -> Any:
        value = self.get(name, _ABSENT)
        if value is not _ABSENT:
            return value
        if name in NAMES or name in _DERIVED:
            raise AttributeError(f"context.{name} is not set here; it is there while a flow's task runs")
        known = ", ".join(sorted({*NAMES, *_DERIVED}))
        raise AttributeError(f"context has no {name!r} (known: {known})")

    def __getitem__(self, name: str) -> Any:
        value = self.get(name, _ABSENT)
        if value is _ABSENT:
            raise KeyError(name)
        return value

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name, _ABSENT) is not _ABSENT

    @contextmanager
    def __call__(self, values: Mapping[str, Any] | None = None, **more: Any) -> Iterator[Context]:
        """Set values for the body of a ``with`` statement."""
        token = _values.set({**_current(), **(values or {}), **more})
        try:
            yield self
        finally:
            _values.reset(token)

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in _current().items() if name != "secrets")
        return f"<context {', '.join(shown)}>"

    def __dir__(self) -> list[str]:
        return sorted({*_current(), *_DERIVED, *super().__dir__()})

    def __reduce__(self) -> str:
        return "context"


_ABSENT: Any = object()
context = Context()


class RunContext:
    """Sets the values of a run, also for threads that its tasks start on their own."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __enter__(self) -> None:
        global _run_values
        self._outer, self._values = _run_values, {**_current(), **self._values}
        self._token = _values.set(self._values)
        _run_values = self._values

    def __exit__(self, *_: object) -> None:
        global _run_values
        if _run_values is self._values:
            _run_values = self._outer
        _values.reset(self._token)

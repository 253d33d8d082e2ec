"""flowagent runs Python flows from wherever they are stored.

The authoring API is importable from here, each name when it is first used, so that ``import flowagent``
costs next to nothing in an agent, a command or a flow's process.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowagent import results, run_configs, storage, triggers
    from flowagent.flows.context import context
    from flowagent.flows.dag import Flow
    from flowagent.flows.errors import FlowagentError, FlowError
    from flowagent.flows.function import flow
    from flowagent.flows.inputs import Parameter, Secret
    from flowagent.flows.logs import get_logger
    from flowagent.flows.mapping import flatten, unmapped
    from flowagent.flows.tasks import Task, task

__version__ = "0.1.0"

__all__ = [
    "Flow",
    "FlowError",
    "FlowagentError",
    "Parameter",
    "Secret",
    "Task",
    "__version__",
    "context",
    "flatten",
    "flow",
    "get_logger",
    "results",
    "run_configs",
    "storage",
    "task",
    "triggers",
    "unmapped",
]

_HOMES = {
    "Flow": "flowagent.flows.dag",
    "FlowError": "flowagent.flows.errors",
    "FlowagentError": "flowagent.flows.errors",
    "Parameter": "flowagent.flows.inputs",
    "Secret": "flowagent.flows.inputs",
    "Task": "flowagent.flows.tasks",
    "context": "flowagent.flows.context",
    "flatten": "flowagent.flows.mapping",
    "flow": "flowagent.flows.function",
    "get_logger": "flowagent.flows.logs",
    "task": "flowagent.flows.tasks",
    "unmapped": "flowagent.flows.mapping",
}
_MODULES = ("results", "run_configs", "storage", "triggers")

_BRANCH = "branch with a plain if inside a task or an @flow function"
_ELSEWHERE = {
    "Client": "use the command line: flowagent run, runs, logs",
    "DateTimeParameter": "use Parameter and datetime.fromisoformat in the task",
    "Executor": "independent tasks run at the same time without one",
    "agent": "start an agent with: flowagent start --labels ...",
    "apply_map": "use task.map(...)",
    "artifacts": "return a value and give the task a result=",
    "backend": "use the command line: flowagent run, show, logs",
    "case": _BRANCH,
    "client": "use flowagent.Secret, or the command line: flowagent run, runs, logs",
    "config": "use $FLOWAGENT_HOME/config.toml, or env= of the run config",
    "engine": "results are in flowagent.results; a task fails by raising any exception",
    "environments": "use flowagent.run_configs",
    "executors": "independent tasks run at the same time in threads without one",
    "ifelse": _BRANCH,
    "merge": _BRANCH,
    "plugins": "install a backend as an entry point of the group flowagent.backends",
    "resource_manager": "use a with statement inside one task",
    "schedules": "start runs with: flowagent run NAME --at TIME, from cron or a systemd timer",
    "serialization": "flow.describe() gives a flow as JSON",
    "switch": _BRANCH,
    "tags": "give the task tags=",
    "tasks": "write a task with @flowagent.task; secrets are flowagent.Secret",
    "utilities": "flowagent.get_logger and flowagent.context are there; the rest is plain Python",
}
"""Names that Prefect 1 has at its top level and flowagent has not, and what to use instead."""


def _missing(name: str) -> str:
    return f"flowagent has no {name!r}; {_ELSEWHERE[name]}"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = import_module(f"flowagent.{name}")
    elif name in _ELSEWHERE:
        # not AttributeError: ``from flowagent import Client`` would replace its message by its own
        raise ImportError(_missing(name), name=f"flowagent.{name}")
    else:
        raise AttributeError(f"module 'flowagent' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Elsewhere:
    """The last finder: says what to use instead of a module of Prefect 1, as in ``flowagent.executors``."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> None:
        package, _, name = fullname.partition(".")
        if package == "flowagent" and name in _ELSEWHERE:
            raise ImportError(_missing(name), name=fullname)


sys.meta_path.append(_Elsewhere)  # a class with find_spec is a finder

"""What all kinds of flows have in common: their declarations, their JSON form, ``run`` and ``register``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, ClassVar

from flowagent.flows.context import context
from flowagent.flows.declarations import is_name, names, refuse
from flowagent.flows.errors import FlowError
from flowagent.flows.graph import building
from flowagent.flows.inputs import LocalSecrets, Parameter, check_parameters
from flowagent.flows.loading import is_loading
from flowagent.flows.logs import get_logger, local_log
from flowagent.flows.observer import LoggingObserver, Observer
from flowagent.flows.results import Result
from flowagent.flows.states import State
from flowagent.run_configs import RunConfig
from flowagent.storage import Storage

_INSTEAD = {
    "edges": "use flow.add_edge()",
    "environment": "use run_config=",
    "executor": "independent tasks run at the same time without one; leave it out",
    "on_failure": "add a task with trigger=flowagent.triggers.any_failed",
    "reference_tasks": "use flow.set_reference_tasks()",
    "runner_cls": "leave it out",
    "schedule": "start runs with: flowagent run NAME --at TIME, from cron or a systemd timer",
    "state_handlers": "add a task with trigger=flowagent.triggers.any_failed or all_finished",
    "tasks": "use flow.add_task()",
    "terminal_state_handler": "use flow.set_reference_tasks()",
    "validate": "leave it out: a flow is always checked",
}
_HARMLESS = frozenset({"build", "idempotency_key", "no_url", "set_schedule_active"})
"""Arguments of Prefect 1's ``register`` that need no counterpart: unchanged content is one version anyway."""


def _instance(kind: type, what: str) -> Callable[[Any, str], Any]:
    def check(value: Any, flow: str) -> Any:
        if value is not None and not isinstance(value, kind):
            module = kind.__module__.removesuffix(".base")  # where it is imported from
            raise FlowError(f"{flow}: {what} takes a {module}.{kind.__name__}; got {value!r}")
        return value

    return check


def _names(what: str) -> Callable[[Any, str], tuple[str, ...]]:
    return lambda value, flow: names(value, f"{flow}: {what}")


class BaseFlow:
    """A named unit of work that can be registered and run. ``labels`` are those that its author gave it.

    :raises FlowError: an argument that cannot work
    """

    kind: ClassVar[str]
    _checks: ClassVar[Mapping[str, Callable[[Any, str], Any]]] = {
        "storage": _instance(Storage, "storage"),
        "run_config": _instance(RunConfig, "run_config"),
        "result": _instance(Result, "result"),
        "secrets": _names("secrets"),
        "labels": _names("labels"),
    }

    def __init__(
        self,
        name: str,
        storage: Storage | None = None,
        run_config: RunConfig | None = None,
        result: Result | None = None,
        secrets: Iterable[str] = (),
        labels: Iterable[str] = (),
        **unknown: Any,
    ) -> None:
        if not is_name(name):
            raise FlowError(f"a flow's name must be a printable, non-empty string; got {name!r}")
        self.name = name
        if unknown:
            refuse(f"flow {name!r}", (key for key, value in unknown.items() if value is not None), _INSTEAD)
            refuse(f"flow {name!r}", (key for key in unknown if key not in _INSTEAD), _INSTEAD)
        self.storage = storage
        self.run_config = run_config
        self.result = result
        self.secrets: tuple[str, ...] = secrets  # type: ignore[assignment]  # made a tuple by __setattr__
        self.labels: tuple[str, ...] = labels  # type: ignore[assignment]
        self.defined_in: str = caller_globals().get("__name__", "__main__")
        self._prepare()

    def _prepare(self) -> None:
        """Set up what a kind of flow adds; its constructor takes no other arguments."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _INSTEAD and name not in dir(type(self)) and value is not None:
            raise FlowError(f"flow {self.name!r} has no {name!r}; {_INSTEAD[name]}")
        check = self._checks.get(name)
        object.__setattr__(self, name, check(value, f"flow {self.name!r}") if check else value)

    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters, in the order of their definition."""
        raise NotImplementedError

    def execute(
        self, parameters: Mapping[str, Any], observer: Observer, concurrency: int | None = None
    ) -> State:
        """Run it in this process, at most ``concurrency`` tasks at the same time.

        Whatever the flow's own code does ends up in the state; only errors of the observer are raised."""
        raise NotImplementedError

    def needed_secrets(self) -> tuple[str, ...]:
        """The secrets that runs need: declared, used in the graph, or needed by the storage."""
        return tuple(sorted({*self.secrets, *(self.storage.secrets if self.storage else ())}))

    def _task_specs(self) -> list[dict[str, Any]]:
        return []

    def describe(self) -> dict[str, Any]:
        """What registration stores: the JSON form of ``flowagent.models.FlowSpec``."""
        return {
            "name": self.name,
            "kind": self.kind,
            "storage": self.storage.to_json() if self.storage else None,
            "run_config": self.run_config.to_json() if self.run_config else None,
            "labels": list(self.labels),
            "parameters": [parameter.describe() for parameter in self.parameters()],
            "tasks": self._task_specs(),
            "secrets": list(self.needed_secrets()),
            "result": self.result.to_json() if self.result else None,
            "project": None,
        }

    def run(self, parameters: Mapping[str, Any] | None = None, **more: Any) -> State | None:
        """Run it here and now, with its log on stderr; storage, run config and labels play no part.

        Failures of the flow are in the state that is returned. While flows are being loaded nothing happens.

        :raises ParameterError: a parameter is unknown or missing
        :raises KeyboardInterrupt: it was interrupted"""
        if self._inert("run"):
            return None
        known = {parameter.name for parameter in self.parameters()}
        given = {**(parameters or {}), **more}
        if "run_on_schedule" not in known:
            given.pop("run_on_schedule", None)
        refuse(
            f"run() of flow {self.name!r}", (n for n in given if n in _INSTEAD and n not in known), _INSTEAD
        )
        self._check(given)
        import uuid
        from datetime import datetime, timezone

        outer = context.get("secrets")
        values = {
            "run_id": uuid.uuid4().hex,
            "attempt": 1,
            "scheduled_for": datetime.now(timezone.utc),
            "labels": self.labels,
            "secrets": LocalSecrets(self.needed_secrets())
            if isinstance(outer, (LocalSecrets, type(None)))
            else outer,
            "flow_name": self.name,
            "task_slug": None,
        }
        with local_log(), context(values):
            logger = get_logger()
            logger.info("started")
            state = self.execute(given, LoggingObserver())
            if state.is_failed():
                logger.error("failed: %s", state.message)
            else:
                logger.info("completed")
        if self._interrupted(state):
            raise KeyboardInterrupt
        return state

    def register(
        self, project_name: str | None = None, labels: Iterable[str] = (), **compat: Any
    ) -> int | None:
        """Register it with the store, print what changed, and return the id of the version.

        Unchanged content is the version that is there already. While flows are being loaded nothing happens.

        :raises FlowagentError: the flow, its storage or the store cannot take it"""
        refuse(f"register() of flow {self.name!r}", (name for name in compat if name not in _HARMLESS), {})
        if self._inert("register"):
            return None
        from pathlib import Path

        registration = _registration()
        file = caller_globals().get("__file__") or vars(sys.modules["__main__"]).get("__file__")
        script = Path(file).absolute() if file else None
        registered = registration.register_flow(
            self, project=project_name, labels=names(labels, "register: labels"), script=script
        )
        print(registration.summary(registered))  # noqa: T201  # what a user at a terminal waits for
        version_id: int = registered.version.version_id
        return version_id

    def _inert(self, method: str) -> bool:
        if is_loading():
            get_logger().debug(
                "flow.%s() of flow %r does nothing while flows are being loaded", method, self.name
            )
            return True
        if building.get() is not None:
            raise FlowError(
                f"flow {self.name!r}: {method}() inside 'with Flow(...)'; move it behind the block"
            )
        return False

    def _check(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The values of all parameters, defaults too. :raises ParameterError: one is unknown or missing."""
        known = self.parameters()
        if not (known or parameters):
            return {}
        described = [parameter.describe() for parameter in known]
        given = check_parameters(described, parameters, self.name, must_be_json=False)
        return {**{p.name: p.default for p in known}, **given}

    def _interrupted(self, state: State) -> bool:
        return isinstance(state.result, KeyboardInterrupt)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


def _registration() -> Any:
    if sys.version_info < (3, 11):
        version = ".".join(map(str, sys.version_info[:3]))
        raise FlowError(
            f"register() needs flowagent installed for Python 3.11 or newer; this is Python {version}"
        )
    return import_module("flowagent.registration")


def caller_globals() -> dict[str, Any]:
    """The globals of the code that called into this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("flowagent.flows."):
        frame = frame.f_back
    return frame.f_globals

"""What comes into a flow from outside: parameters and secrets. Both can be arguments of tasks."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flowagent.flows.context import context
from flowagent.flows.errors import FlowError, ParameterError
from flowagent.flows.graph import building
from flowagent.flows.tasks import Task


class Input(Task):
    """A value that is there before any task of the flow runs. It is no task for observers."""

    def _slug(self) -> str:
        raise NotImplementedError

    def same(self, other: Input) -> bool:
        """Whether two objects stand for the same value."""
        return type(self) is type(other) and vars(self) == vars(other)


_NO_DEFAULT: Any = object()


class Parameter(Input):
    """A parameter of the flow; required unless it has a default.

    :raises ParameterError: the default is not JSON"""

    def __init__(
        self,
        name: str,
        default: Any = _NO_DEFAULT,
        required: bool | None = None,
        tags: Iterable[str] | None = None,
    ) -> None:
        super().__init__(name, tags=tags)
        self.required = default is _NO_DEFAULT if required is None else bool(required)
        self.default = None if default is _NO_DEFAULT else default
        if self.required and default is not _NO_DEFAULT:
            self.required = False
        _must_be_json(self.default, f"parameter {name!r}: its default")
        flow = building.get()
        if flow is not None:
            flow.add_task(self)

    def _slug(self) -> str:
        return self.name

    def run(self) -> Any:
        return context.get("parameters", {}).get(self.name, self.default)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flow = kwargs.get("flow") or building.get()
        return flow.add_task(self) if flow is not None else self.run()

    def describe(self) -> dict[str, Any]:
        """Its JSON form, as registration stores it."""
        return {"name": self.name, "required": self.required, "default": json.loads(json.dumps(self.default))}


def _must_be_json(value: Any, what: str) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(f"{what} must be JSON: {error}") from None


def check_parameters(
    described: Sequence[Mapping[str, Any]],
    given: Mapping[str, Any],
    flow_name: str,
    *,
    must_be_json: bool = True,
) -> dict[str, Any]:
    """The given parameters, checked against ``FlowSpec.parameters``; defaults are not filled in.

    :raises ParameterError: unknown, missing, or not JSON"""
    known = {parameter["name"] for parameter in described}
    for name in given:
        if name not in known:
            takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise ParameterError(f"flow {flow_name!r} has no parameter {name!r}; {takes}")
    missing = [p["name"] for p in described if p["required"] and p["name"] not in given]
    if missing:
        raise ParameterError(
            f"flow {flow_name!r} needs a value for {', '.join(missing)}; give it as parameter"
        )
    for name, value in given.items() if must_be_json else ():
        _must_be_json(value, f"flow {flow_name!r}: parameter {name!r}")
    return dict(given)


_SECRET_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Secret(Input):
    """A secret by its name. ``Secret("NAME").get()`` in a task, or ``my_task(Secret("NAME"))`` in a flow."""

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or not _SECRET_NAME.fullmatch(name):
            raise FlowError(f"a secret's name has letters, digits and _ only; got {name!r}")
        super().__init__(name)

    def _slug(self) -> str:
        return f"secret-{self.name}"

    def get(self) -> str:
        """The value, exactly as it was stored. :raises FlowError: it is not declared, or not there."""
        if building.get() is not None:
            raise FlowError(f"secret {self.name!r}: get() works in tasks; here, give the Secret to a task")
        return self.run()

    def run(self) -> str:
        secrets = context.get("secrets")
        found = local_secret(self.name) if secrets is None else secrets.get(self.name)
        if found is None:
            raise FlowError(
                f"secret {self.name!r} is not available: declare it with secrets=[{self.name!r}] on the flow "
                f"and store it with 'flowagent secret set {self.name}'"
            )
        return str(found)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flow = kwargs.get("flow") or building.get()
        return flow.add_task(self) if flow is not None else self.run()


def local_secret(name: str) -> str | None:
    """The secret in ``$FLOWAGENT_SECRET_<NAME>``, or in the file ``$FLOWAGENT_HOME/secrets/<NAME>``.

    :raises FlowError: the file is not safe to read: not a regular file of ours with mode 0600"""
    value = os.environ.get(f"FLOWAGENT_SECRET_{name}")
    if value is not None:
        return value
    home = os.path.expanduser(os.environ.get("FLOWAGENT_HOME") or "~/.flowagent")
    path = os.path.join(home, "secrets", name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FlowError(f"secret {name!r}: {path} cannot be read: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise FlowError(f"secret {name!r}: {path} may be read by others; do: chmod 600 {path}")
        try:
            return file.read().decode()
        except UnicodeDecodeError:
            raise FlowError(f"secret {name!r}: {path} is not UTF-8 text; store it again") from None


class LocalSecrets(Mapping[str, str]):
    """The declared secrets in a local run: looked up when asked for, and never shown."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)

    def __getitem__(self, name: str) -> str:
        value = local_secret(name) if name in self._names else None
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<secrets {', '.join(self._names)}>"


class _Sink:
    """A file that keeps nothing but the digest of what is written."""

    def __init__(self) -> None:
        import hashlib

        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)


def digest(inputs: Mapping[str, Any]) -> str | None:
    """The digest of a task's arguments, equal for equal ones at least if they are plain data; None: they
    cannot be pickled."""
    import pickle

    sink = _Sink()
    try:
        pickle.Pickler(sink, protocol=4).dump(dict(inputs))
    except Exception:
        return None
    return sink.digest.hexdigest()

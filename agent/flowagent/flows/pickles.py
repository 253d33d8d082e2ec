"""Flows as pickles: frozen at registration, loaded for each run."""

from __future__ import annotations

import copyreg
import hashlib
import io
import pickle
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from flowagent import __version__
from flowagent.flows.base import BaseFlow
from flowagent.flows.errors import FlowError, FlowLoadError
from flowagent.flows.fingerprints import fingerprint
from flowagent.flows.states import reason_of

PROTOCOL = 4
"""Of the pickles: known to every Python that flows run in."""


class Pickle(NamedTuple):
    """A pickled flow. ``fingerprint`` is equal for equal content; ``sha256`` is that of these very bytes."""

    data: bytes
    sha256: str
    made_with: dict[str, str]
    fingerprint: str


def versions() -> dict[str, str]:
    """What the readability of a pickle depends on, as it is here."""
    return {
        "python": platform.python_version(),
        "cloudpickle": _cloudpickle_version(),
        "flowagent": __version__,
    }


def dump(flow: BaseFlow, root: Path | None = None) -> Pickle:
    """Pickle a flow. The code of its module, and of modules in files below ``root``, goes along by value.

    Storage, run config and labels do not: they are registered beside it.

    :raises FlowError: something in it cannot be pickled, or cloudpickle is not installed"""
    try:
        import cloudpickle
        from cloudpickle.cloudpickle import _DYNAMIC_CLASS_TRACKER_BY_CLASS as tracked
    except ImportError:
        raise FlowError(
            f"flow {flow.name!r} cannot be pickled without cloudpickle: pip install cloudpickle"
        ) from None
    buffer = io.BytesIO()
    modules = _own_modules(flow, root)
    with _by_value(cloudpickle, modules):
        try:
            _pickler(cloudpickle, buffer, modules).dump(flow)
        except Exception as error:
            raise FlowError(
                f"flow {flow.name!r} cannot be pickled: {reason_of(error)}; "
                f"create such objects inside a task, or use stored_as_script=True"
            ) from error
    data = buffer.getvalue()
    # one script is __main__ when its author runs it, and has another name when it is loaded
    neutral = {*tracked.values(), flow.defined_in, "__main__"}
    return Pickle(data, hashlib.sha256(data).hexdigest(), versions(), fingerprint(data, neutral))


def load(data: bytes, sha256: str | None, made_with: Mapping[str, str]) -> BaseFlow:
    """Load a pickled flow; with ``sha256``, other bytes are refused before anything in them is executed.

    :raises FlowLoadError: naming what differs between where it was made and here"""
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise FlowLoadError(
            f"the flow's pickle was changed: registered sha256 {sha256}, found {found}; register again"
        )
    differences = _differences(made_with)
    made_in, here = made_with.get("python", ""), platform.python_version()
    if made_in and made_in.split(".")[:2] != here.split(".")[:2]:
        raise FlowLoadError(
            f"a flow pickled by Python {made_in} cannot run in Python {here}: {differences}; "
            f"run it with the same minor version, or register it with stored_as_script=True"
        )
    try:
        flow = pickle.loads(data)  # noqa: S301  # its digest is that of what was registered
    except (Exception, SystemExit) as error:
        hint = (
            f"; install the module {error.name!r} here"
            if isinstance(error, ImportError) and error.name
            else ""
        )
        raise FlowLoadError(
            f"the flow's pickle cannot be loaded: {reason_of(error)}{hint}; {differences}"
        ) from error
    if not isinstance(flow, BaseFlow):
        raise FlowLoadError(
            f"the pickle holds no flow but an object of type {type(flow).__name__}; register it again"
        )
    return flow


def _cloudpickle_version() -> str:
    try:
        import cloudpickle
    except ImportError:
        return "none"
    return str(cloudpickle.__version__)


def _differences(made_with: Mapping[str, str]) -> str:
    names = {"python": "Python"}
    here = versions()
    different = [
        f"(made with {names.get(name, name)} {version}, running {here[name]})"
        for name, version in made_with.items()
        if name in here and here[name] != version
    ]
    return " ".join(different) or "it was made with the same versions of Python, cloudpickle and flowagent"


def _own_modules(flow: BaseFlow, root: Path | None) -> list[ModuleType]:
    """The modules whose code goes along: that of the flow, and those below ``root`` but installed ones."""
    base = None if root is None else str(root.resolve())
    installed = ("site-packages", "dist-packages")
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(module, ModuleType) or module.__name__ != name or name == "__main__":
            continue  # cloudpickle takes __main__ by value anyway
        if name.partition(".")[0] in ("flowagent", "flowagent_backends", "cloudpickle"):
            continue
        path = Path(file).resolve() if isinstance(file, str) else None
        below = base is not None and path is not None and Path(base) in path.parents
        if name == flow.defined_in or (below and path and not any(part in path.parts for part in installed)):
            found.append(module)
    return found


@contextmanager
def _by_value(cloudpickle: Any, modules: list[ModuleType]) -> Iterator[None]:
    known = cloudpickle.list_registry_pickle_by_value()
    added = [module for module in modules if module.__name__ not in known]
    for module in added:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in added:
            cloudpickle.unregister_pickle_by_value(module)


_REGISTERED_BESIDE = {"storage": None, "run_config": None, "labels": (), "defined_in": "__main__"}
_OF_THIS_PROCESS = ("__builtins__", "__cached__", "__loader__", "__spec__")


def _pickler(cloudpickle: Any, buffer: io.BytesIO, modules: list[ModuleType]) -> Any:
    """A cloudpickler that leaves out of flows and modules what does not belong to their content."""

    class FlowPickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, BaseFlow):
                return copyreg.__newobj__, (type(obj),), {**vars(obj), **_REGISTERED_BESIDE}  # type: ignore[attr-defined]
            if isinstance(obj, ModuleType) and obj in modules:
                content = {key: value for key, value in vars(obj).items() if key not in _OF_THIS_PROCESS}
                return (
                    ModuleType,
                    (obj.__name__,),
                    content,
                )  # filled afterwards: modules may refer to each other
            return super().reducer_override(obj)

    return FlowPickler(buffer, protocol=PROTOCOL)

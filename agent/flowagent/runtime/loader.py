"""Loading a flow's definition from a source, the same way for every storage.

Scripts run as real modules: a unique module name that is never ``__main__``, their real file name, their
directory and the source's root on ``sys.path``, relative imports within packages. ``register()`` and
``run()`` at module level do nothing while loading.
"""

from __future__ import annotations

import binascii
import hashlib
import importlib
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec, SourceFileLoader
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

from flowagent.flows.base import BaseFlow
from flowagent.flows.errors import FlowLoadError, FlowNotFoundError
from flowagent.flows.loading import Loading
from flowagent.runtime import bytecode


class Loaded(NamedTuple):
    """What was loaded: the flow, and the digest of the text that in fact ran (None for a module without)."""

    flow: BaseFlow
    sha256: str | None


def load(source: Mapping[str, Any], name: str | None) -> Loaded:
    """Load flow ``name`` from a source as the run's spec describes it.

    ``source``: ``kind`` script, pickle or module; ``directory``, ``path`` relative to it, ``module``,
    ``sha256`` to insist on, ``made_with``, ``bytecode``. Exceptions of user code pass through as they are.

    :raises FlowLoadError: the definition cannot be found, read or trusted, or holds no such flow."""
    kind = source["kind"]
    if kind == "script":
        root, kept = source["directory"], source.get("bytecode")
        if kept is not None:
            bytecode.use(kept, root)
        module, executed = load_script(_inside(source), root, source.get("sha256"), kept)
        return Loaded(choose(flows_in(module), name, source["path"]), executed)
    if kind == "pickle":
        return _load_pickle(source)
    if kind == "module":
        flows, digest = load_module(source["module"])
        return Loaded(choose(flows, name, "module " + source["module"]), digest)
    raise FlowLoadError(f"unknown kind of source {kind!r}; is the agent older than the registration?")


def load_script(
    path: str, root: str, sha256: str | None = None, kept: str | None = None
) -> tuple[ModuleType, str]:
    """Execute a script as a module; the module and the sha-256 of the text that ran.

    ``kept``: where byte code is, see :mod:`flowagent.runtime.bytecode`."""
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError as error:
        raise FlowLoadError(f"cannot read {path}: {error.strerror}") from None
    digest = hashlib.sha256(text).hexdigest()
    if sha256 is not None and digest != sha256:
        raise FlowLoadError(
            f"{path} has sha-256 {digest}, registered was {sha256}: refused; register it again"
        )
    directory = path.rpartition("/")[0]
    package, top = _package_of(directory)
    for entry in (root, top, directory):
        if entry not in sys.path:
            sys.path.insert(0, entry)
    if package:
        importlib.import_module(package)
    stem = "".join(
        [letter if letter.isalnum() else "_" for letter in path[len(directory) + 1 :].split(".")[0]]
    )
    name = f"_flow_{stem}_{binascii.crc32(path.encode()):08x}"
    if package:
        name = package + "." + name
    # Made by hand: what importlib does for this touches many pages of memory that a fork shares otherwise.
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, SourceFileLoader(name, path), origin=path)
    module.__loader__ = module.__spec__.loader
    module.__package__ = package
    module.__file__ = path
    sys.modules[name] = module
    try:
        with Loading():
            # These very bytes are what the digest speaks of, whatever is written to the file meanwhile.
            exec(bytecode.compiled(text, path, kept), module.__dict__)  # noqa: S102
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module, digest


def load_module(reference: str) -> tuple[list[BaseFlow], str | None]:
    """Import ``pkg.mod`` or ``pkg.mod:attr.path``; the flows there and the digest of the module's file."""
    name, _, attribute = reference.partition(":")
    try:
        with Loading():
            module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only the module asked for or a package above it: a missing import of its own is the user's error.
        if error.name is not None and (name + ".").startswith(error.name + "."):
            raise FlowLoadError(
                f"no module named {error.name!r} for {sys.executable}; "
                "install it there or start the agent with --import-path"
            ) from None
        raise
    flows = flows_in(module)
    if attribute:
        try:
            value = attrgetter(attribute)(module)
        except AttributeError:
            raise FlowLoadError(f"module {name} has no attribute {attribute!r}") from None
        if callable(value) and not isinstance(value, BaseFlow):
            with Loading():
                value = value()
        if not isinstance(value, BaseFlow):
            raise FlowLoadError(f"{reference} is a {type(value).__name__}, not a flow")
        flows = [value]
    digest = None
    file = getattr(module, "__file__", None)
    if file is not None:
        try:
            with open(file, "rb") as opened:
                digest = hashlib.sha256(opened.read()).hexdigest()
        except OSError:
            pass
    return flows, digest


def _load_pickle(source: Mapping[str, Any]) -> Loaded:
    from flowagent.flows import pickles

    path = _inside(source)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise FlowLoadError(f"cannot read {path}: {error.strerror}") from None
    with Loading():
        flow = pickles.load(data, source.get("sha256"), source.get("made_with") or {})
    return Loaded(flow, hashlib.sha256(data).hexdigest())


def flows_in(module: ModuleType) -> list[BaseFlow]:
    """The flows among a module's values and in its lists, tuples and dicts, in order, each once."""
    found: dict[int, BaseFlow] = {}

    def look(values: Iterable[Any], depth: int) -> None:
        for value in values:
            if isinstance(value, BaseFlow):
                found.setdefault(id(value), value)
            elif depth and type(value) in (list, tuple):
                look(value, depth - 1)
            elif depth and type(value) is dict:
                look(value.values(), depth - 1)

    look(list(vars(module).values()), 2)
    return list(found.values())


def choose(flows: list[BaseFlow], name: str | None, where: str) -> BaseFlow:
    """The flow called ``name``; without a name the only one.

    :raises FlowNotFoundError: there is none, or it is not clear which; the message lists what was found."""
    if len(flows) == 1 and name in (None, flows[0].name):
        return flows[0]
    names = [flow.name for flow in flows]
    twice = sorted({found for found in names if names.count(found) > 1})
    if twice:
        raise FlowNotFoundError(f"{where} holds several flows named {_listed(twice)}; names must differ")
    if not flows:
        raise FlowNotFoundError(f"{where} holds no flow; is one assigned at the top level?")
    if name is None:
        raise FlowNotFoundError(f"{where} holds {len(flows)} flows, name one: {_listed(names)}")
    for flow in flows:
        if flow.name == name:
            return flow
    raise FlowNotFoundError(f"{where} holds no flow named {name!r}; found: {_listed(names)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _inside(source: Mapping[str, Any]) -> str:
    """The absolute path of the definition. :raises FlowLoadError: it lies outside the source, or is missing.

    Asked of the kernel, by descriptors: os.path does it with many calls, in each run."""
    name = str(source["path"])
    root = _real(source["directory"])
    path = root + "/" + (name if "./" not in name and "//" not in name else os.path.normpath(name))
    if name.startswith("/") or not _real(path).startswith(root.rstrip("/") + "/"):
        raise FlowLoadError(f"the path {name!r} leaves the source")
    return path


def _real(path: str) -> str:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise FlowLoadError(f"cannot read {path}: {error.strerror}") from None
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _package_of(directory: str) -> tuple[str, str]:
    """The dotted package that a directory is, by its ``__init__.py``, and the directory above its top."""
    parts: list[str] = []
    while _is_file(directory + "/__init__.py"):
        directory, name = os.path.split(directory)
        if not name.isidentifier():
            break
        parts.insert(0, name)
    return ".".join(parts), directory

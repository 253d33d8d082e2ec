"""Module storage: the flow is importable where it runs, and nothing has to be brought there."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from flowagent.backend import Artifact, BackendContext, Entry, Features, Revision
from flowagent.errors import BackendError, StorageNotFoundError
from flowagent.models import Json
from flowagent_backends.code_only import CodeOnly

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*(\.[^\W\d]\w*)*)?")


class ModuleBackend(CodeOnly):
    """Flows named by ``pkg.flows`` or ``pkg.flows:attribute``."""

    type = "Module"
    features = Features(kinds=("script",), revision="the module's name and digest")

    def __init__(self, context: BackendContext) -> None:
        self._host = context.host

    async def resolve(self, storage: Mapping[str, Json]) -> Revision:
        """The module by its name. :raises BackendError: it is not a name, or ``__main__``."""
        reference = _reference(storage)
        return Revision(id=f"module:{reference}", entry=Entry("module", module=reference))

    async def materialise(self, storage: Mapping[str, Json], revision: Revision, directory: Path) -> None:
        """Leave the directory empty: the module comes from the interpreter that executes the flow."""

    async def upload(self, storage: Mapping[str, Json], artifact: Artifact) -> dict[str, Json]:
        """Check the module as far as this interpreter knows its package; it may be installed elsewhere only.

        :raises StorageNotFoundError: the package is here, and the module or attribute is not in it."""
        reference = _reference(storage)
        module, _, attribute = reference.partition(":")
        package = module.partition(".")[0]
        try:
            missing = (
                importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is None
            )
        except ModuleNotFoundError:
            missing = True
        except ValueError:  # a module that was made by hand has no spec
            missing = False
        except Exception as error:
            raise BackendError(
                f"Module: package of {module} cannot be imported for flow {artifact.flow_name!r}: "
                f"{type(error).__name__}: {error}; correct it, then register again"
            ) from error
        if missing:
            raise StorageNotFoundError(
                f"Module: no module {module} on {self._host} for flow {artifact.flow_name!r}, "
                f"and its package {package} is there; check the name"
            )
        loaded = sys.modules.get(module)
        if attribute and loaded is not None and not hasattr(loaded, attribute.partition(".")[0]):
            raise StorageNotFoundError(
                f"Module: no attribute {attribute} in module {module} for flow {artifact.flow_name!r}; "
                "check the name"
            )
        return {**storage, "module": reference}


def _reference(storage: Mapping[str, Json]) -> str:
    reference = storage.get("module")
    if not isinstance(reference, str) or not _REFERENCE.fullmatch(reference):
        raise BackendError(
            f"Module: {reference!r} is no module name; give one like pkg.flows or pkg.flows:attribute"
        )
    if reference.partition(":")[0] == "__main__":
        raise BackendError(
            "Module: __main__ is another program on the agent; "
            "give the importable name, like Module('pkg.flows')"
        )
    return reference

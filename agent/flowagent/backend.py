"""The contract of storage drivers, and how they are found.

A backend serves one storage type. It is found by the name of the type among the entry points of the group
``flowagent.backends``, so a third party's is installed the same way as ours. Backends are constructed once
per agent or command, with a :class:`BackendContext`, and are imported when first needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from flowagent.errors import BackendError
from flowagent.models import Json

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "flowagent.backends"


@dataclass(frozen=True)
class Entry:
    """Where in a source the flow's definition is, and how it is loaded.

    ``kind`` is ``"script"``, ``"pickle"`` or ``"module"``. ``path`` is relative to the source
    directory; ``module`` is ``"pkg.flows"`` or ``"pkg.flows:attr"``. With ``sha256`` set, the loader refuses
    other bytes. ``made_with`` names the versions a pickle was written with.
    """

    kind: str
    path: str | None = None
    module: str | None = None
    sha256: str | None = None
    made_with: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Revision:
    """What a storage points at now.

    ``id`` is immutable and shown to users. ``directory`` is set when the source is on this machine already
    and is used in place; otherwise the source cache materialises it, once per ``id``.
    """

    id: str
    entry: Entry
    directory: Path | None = None


@dataclass(frozen=True)
class Artifact:
    """What registration hands to ``upload``: a pickle (``data``) or a script (``path``)."""

    flow_name: str
    kind: str  # "pickle" or "script"
    data: bytes | None = None
    path: Path | None = None
    sha256: str | None = None
    made_with: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BackendContext:
    """What a backend may know of its host. Secrets are fetched by name when needed, never kept."""

    home: Path
    host: str
    writable: tuple[Path, ...] | None = None
    """Where results may be written besides the home's ``results``; None: anywhere. An agent writes for flows,
    and their authors say where."""


@runtime_checkable
class Backend(Protocol):
    """The driver of one storage type. Methods raise :class:`~flowagent.errors.BackendError`."""

    type: str

    def __init__(self, context: BackendContext) -> None: ...

    async def resolve(self, storage: Mapping[str, Json]) -> Revision:
        """Say exactly what would run now; cheap."""
        ...

    async def materialise(self, storage: Mapping[str, Json], revision: Revision, directory: Path) -> None:
        """Fill an empty directory with the revision. Called at most once per revision and cache."""
        ...

    async def upload(self, storage: Mapping[str, Json], artifact: Artifact) -> dict[str, Json]:
        """Store an artifact at registration, or check that what is referred to exists.

        Returns the pinned reference."""
        ...

    def default_labels(self, storage: Mapping[str, Json]) -> tuple[str, ...]:
        """Labels that a flow in this storage gets when it is registered."""
        ...

    def default_result(self, storage: Mapping[str, Json]) -> dict[str, Json] | None:
        """The result declaration that follows from the storage; None: results are not kept."""
        ...

    async def put(self, result: Mapping[str, Json], key: str, file: Path) -> dict[str, Json]:
        """Store the bytes of ``file`` as result ``key``; a reference for ``get``.

        :raises BackendError: the key leaves the place that the declaration names."""
        ...

    async def get(self, reference: Mapping[str, Json]) -> bytes:
        """Read a result back by its reference."""
        ...


@cache
def _entry_points() -> Mapping[str, EntryPoint]:
    from importlib.metadata import entry_points  # with it come zipfile, email and csv

    return {entry.name: entry for entry in entry_points(group=GROUP)}


class Backends:
    """The backends of one process, each constructed when first asked for."""

    def __init__(self, context: BackendContext) -> None:
        self._context = context
        self._backends: dict[str, Backend] = {}

    def get(self, storage_type: str) -> Backend:
        """The backend of a storage type. :raises BackendError: none is installed for it."""
        if storage_type not in self._backends:
            self._backends[storage_type] = self._load(storage_type)
        return self._backends[storage_type]

    def _load(self, storage_type: str) -> Backend:
        entry = _entry_points().get(storage_type)
        if entry is None:
            known = ", ".join(sorted(_entry_points())) or "none"
            raise BackendError(
                f"no backend is installed for storage {storage_type!r} (installed: {known}); "
                f"install the package that provides it in the agent's environment"
            )
        try:
            factory: Any = entry.load()
        except ImportError as error:
            raise BackendError(
                f"the backend of storage {storage_type!r} cannot be imported: {error}; "
                f"install what it needs in the agent's environment"
            ) from error
        backend: Backend = factory(self._context)
        return backend

"""The contract of storage drivers, and how they are found.

A backend serves one storage type. It is found by the name of the type among the entry points of the group
``flowagent.backends``, so a third party's is installed the same way as ours. Backends are constructed once
per agent or command, with a :class:`BackendContext`, and are imported when first needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from flowagent.errors import BackendError
from flowagent.models import Json
from flowagent.secrets import SecretProvider
from flowagent.settings import MAX_SOURCE, Settings, Ssh, hostname

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
    and is used in place; otherwise the source cache materialises it, once per ``key``: all that its content
    depends on, by default ``id``. A ``private`` one is copied for each run, which may write to its copy. With
    ``image``, the source is the directory of that name in a container image, and only there.
    """

    id: str
    entry: Entry
    directory: Path | None = None
    key: str = ""
    private: bool = False
    image: str | None = None

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.id)


@dataclass(frozen=True)
class Artifact:
    """What registration hands to ``upload``: a pickle (``data``), a script or a bundle (``path``).

    A bundle is an archive of a script, ``entry`` in it, and its side files (:mod:`flowagent.bundles`).
    ``given`` is what the flow's code gave to the storage for the upload alone: it is never stored.
    """

    flow_name: str
    kind: str  # "pickle", "script" or "bundle"
    data: bytes | None = None
    path: Path | None = None
    sha256: str | None = None
    made_with: Mapping[str, str] = field(default_factory=dict)
    entry: str | None = None
    given: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Features:
    """What a backend supports: checked at registration, and shown in the documentation's table.

    ``kinds``: of artifacts. ``revision``: what it is known by. ``credentials``: where they come from.
    ``results``: the type of the result declaration that follows from the storage.
    """

    kinds: tuple[str, ...]
    revision: str
    credentials: str = "none"
    results: str | None = None
    extra: str | None = None  # of flowagent, that installs what it needs


class Progress(Protocol):
    """Shows the progress of something long to whoever waits for it."""

    def __call__(self, what: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """While the context is open, its value is told of each number of bytes that are done."""
        ...


@contextmanager
def unseen(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """The progress that nobody waits for."""
    yield lambda amount: None


def unsaid(line: str) -> None:
    """What nobody hears."""


@dataclass(frozen=True)
class BackendContext:
    """What a backend may know of its host."""

    home: Path
    host: str
    writable: tuple[Path, ...] | None = None
    """Where results may be written besides the home's ``results``; None: anywhere. An agent writes for flows,
    and their authors say where."""
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    progress: Progress = unseen
    say: Callable[[str], None] = unsaid
    """Tells whoever waits what is going on, a line at a time."""
    ssh: Ssh = field(default_factory=Ssh)
    mirrors: Path | None = None
    """Where what many sources come from may be kept; None: below the home."""
    max_source: int = MAX_SOURCE
    """How many bytes a source may have."""
    token_hosts: tuple[str, ...] = ()
    """Besides the public forges, those that get tokens which no storage names: ``HOST`` or ``HOST:PORT``."""

    @classmethod
    def of(cls, settings: Settings, **options: Any) -> BackendContext:
        """What the settings say of this machine."""
        return cls(
            settings.home,
            hostname(),
            ssh=settings.openings,
            mirrors=settings.mirrors_dir,
            max_source=settings.max_source,
            token_hosts=settings.token_hosts,
            **options,
        )

    @property
    def secrets(self) -> SecretProvider:
        """The secrets of this host. They are fetched by name when they are needed, and never kept."""
        return SecretProvider(self.home, self.environ)


@runtime_checkable
class Backend(Protocol):
    """The driver of one storage type. Methods raise :class:`~flowagent.errors.BackendError`.

    It may say in an attribute ``features`` (:class:`Features`) what it supports."""

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

    async def get(self, reference: Mapping[str, Json], file: Path) -> None:
        """Write the bytes of a result to ``file``, by its reference.

        :raises StorageNotFoundError: it is gone.
        :raises BackendError: it is not what was put there; ``file`` is not to be used."""
        ...

    async def close(self) -> None:
        """Close what was kept open between calls: connections, processes."""
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

    async def close(self) -> None:
        """Close those that were used."""
        for backend in self._backends.values():
            await backend.close()

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
        except (ImportError, AttributeError) as error:
            raise BackendError(
                f"the backend of storage {storage_type!r} cannot be imported: {error}; "
                f"install what it needs in the agent's environment"
            ) from error
        backend: Backend = factory(self._context)
        return backend

"""The source cache: a hit takes no lock; a miss is materialised once, however many ask for it."""

from __future__ import annotations

import dataclasses
import errno
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import anyio

from flowagent import locks
from flowagent.backend import Backend, Revision
from flowagent.errors import SourceCacheError, StorageNotFoundError
from flowagent.hints import near_path
from flowagent.models import Json
from flowagent.sources import collection, trees
from flowagent.sources.entries import TEMPORARY, CacheEntry, Manifest, Place, boot, write_manifest

_FULL = "free space there, or run: flowagent cache prune"
_HINTS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.ENAMETOOLONG: "a path in the source is too long; shorten it",
}
"""What to do about errors of the cache's disk."""


@dataclass(frozen=True)
class Source:
    """A source that is held: it stays until the lease is closed, by this process and all it was passed to.

    ``lease`` is a descriptor with a shared lock; None for a source in place, which is not ours to remove."""

    directory: Path
    lease: int | None = None

    def close(self) -> None:
        """Give this process' hold up; call it once."""
        if self.lease is not None:
            os.close(self.lease)

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class _Flight:
    """One materialisation under way in this process. Without an error at its end, look again."""

    landed: anyio.Event = field(default_factory=lambda: anyio.Event())
    error: Exception | None = None


class SourceCache:
    """The sources of one machine below ``root``; any number of processes may share it.

    ``timeout``: seconds that waiting for another process, and materialising, may each take."""

    def __init__(self, root: Path, *, timeout: float = 600.0) -> None:
        self._root = root
        self._timeout = timeout
        self._flights: dict[str, _Flight] = {}
        self.lookups = self.fills = self.filled_bytes = 0
        """How often sources were asked for, and materialised, since this process began."""
        self._trusted: set[str] = set()  # keys seen whole since this process and this boot began
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SourceCacheError(
                f"source cache {root} cannot be created: {error.strerror}; check its parent"
            ) from error

    async def acquire(self, backend: Backend, storage: Mapping[str, Json], revision: Revision) -> Path:
        """The directory of a revision, materialised if needed. Unless it is held, it may be collected.

        :raises SourceCacheError: it cannot be published (disk full, lock not free in time).
        :raises BackendError: the backend cannot materialise it."""
        if revision.directory is not None:
            return revision.directory
        place = Place.of(self._root, backend.type, revision.key)
        while True:
            if await self._published(place):
                return place.source
            flight = self._flights.get(place.key)
            if flight is None:
                await self._lead(place, backend, storage, revision)
                continue
            await flight.landed.wait()
            if flight.error is not None:
                raise flight.error

    async def hold(self, backend: Backend, storage: Mapping[str, Json], revision: Revision) -> Source:
        """Acquire a revision, and keep it from being collected while its lease is open. Raises as acquire."""
        if revision.directory is not None:
            return Source(revision.directory)
        self.lookups += 1
        place = Place.of(self._root, backend.type, revision.key)
        while True:
            directory = await self.acquire(backend, storage, revision)
            lease = await self._lock(place.lease, locks.SHARED)
            if directory.is_dir():  # else it was collected in between
                with suppress(OSError):
                    os.utime(lease)
                source = Source(directory, lease)
                try:
                    _check_entry(directory, backend.type, revision)
                except BaseException:
                    source.close()
                    raise
                return source
            os.close(lease)

    def lease_path(self, backend: Backend, revision: Revision) -> Path:
        """The file that runs of a revision hold a shared lock on."""
        return Place.of(self._root, backend.type, revision.key).lease

    # -- care ----------------------------------------------------------------------------------------

    async def sweep(self) -> int:
        """Remove what crashed processes left half-done; how many. Call it once, at the start of an agent."""
        return await anyio.to_thread.run_sync(collection.sweep, self._root)

    async def entries(self) -> list[CacheEntry]:
        """All sources in the cache, least recently used first."""
        return await anyio.to_thread.run_sync(collection.entries, self._root)

    async def prune(
        self, *, max_bytes: int | None = None, max_age: float | None = None, keep: int = 0
    ) -> list[CacheEntry]:
        """Remove sources that no run holds, least recently used first, and say which.

        Those not used for ``max_age`` seconds go, then as many as it takes to stay within
        ``max_bytes``; the ``keep`` most recently used are spared."""
        return await anyio.to_thread.run_sync(collection.prune, self._root, max_bytes, max_age, keep)

    async def verify(self) -> list[CacheEntry]:
        """Read everything, and take out of the cache what is not what was published; says which."""
        broken = await anyio.to_thread.run_sync(collection.verify, self._root)
        self._trusted -= {entry.key for entry in broken}
        return broken

    # -- miss ----------------------------------------------------------------------------------------

    async def _published(self, place: Place) -> bool:
        """Whether the source is there and whole.

        It is read in full once after a boot: a power cut may have emptied files that were not synced."""
        if not place.source.is_dir():
            self._trusted.discard(place.key)
            return False
        if place.key in self._trusted:
            return True
        manifest = place.manifest()
        if manifest is None:
            return await self._quarantine(place)
        if manifest.boot != boot():
            if not await anyio.to_thread.run_sync(place.whole, manifest):
                return await self._quarantine(place)
            with _reported(place, manifest.backend, manifest.revision):
                write_manifest(place.directory, dataclasses.replace(manifest, boot=boot()))
        self._trusted.add(place.key)
        return True

    async def _quarantine(self, place: Place) -> bool:
        """Take a broken source out of the way; False, as it is not there then."""
        lock = await self._lock(place.lock, locks.EXCLUSIVE)
        try:
            manifest = place.manifest()
            if manifest is not None and manifest.boot == boot():
                return place.source.is_dir()  # another process has put a good one there
            await anyio.to_thread.run_sync(collection.discard, place)
        finally:
            os.close(lock)
        return False

    async def _lead(
        self, place: Place, backend: Backend, storage: Mapping[str, Json], revision: Revision
    ) -> None:
        """Fill the place for all in this process that wait for it. Cancelled, the next of them takes over."""
        flight = self._flights[place.key] = _Flight()
        try:
            lock = await self._lock(place.lock, locks.EXCLUSIVE)
            try:
                if not place.source.is_dir():  # else another process was faster
                    await self._fill(place, backend, storage, revision)
            finally:
                os.close(lock)
        except Exception as error:
            flight.error = error
            raise
        finally:
            del self._flights[place.key]
            flight.landed.set()

    async def _fill(
        self, place: Place, backend: Backend, storage: Mapping[str, Json], revision: Revision
    ) -> None:
        """Materialise and publish, all or nothing; the caller holds the place's lock."""
        with _reported(place, backend.type, revision.id):
            temporary, guard = _new_directory(self._root)
        try:
            with _reported(place, backend.type, revision.id):
                source = temporary / "source"
                source.mkdir(mode=0o700)
                with anyio.move_on_after(self._timeout) as deadline:
                    await backend.materialise(storage, revision, source)
                if deadline.cancelled_caught:
                    raise SourceCacheError(
                        f"it took longer than {self._timeout:g} s; try again, or look at its host"
                    )
                size = await anyio.to_thread.run_sync(_complete, temporary, backend.type, revision.id)
                await anyio.to_thread.run_sync(_publish, temporary, place)
                self.fills += 1
                self.filled_bytes += size
        finally:
            if temporary.exists():
                with anyio.CancelScope(shield=True), suppress(OSError):  # else the next sweep removes it
                    await anyio.to_thread.run_sync(trees.remove, temporary)
            os.close(guard)

    async def _lock(self, path: Path, kind: int) -> int:
        try:
            return await locks.lock(path, kind, self._timeout)
        except OSError as error:
            raise SourceCacheError(
                f"lock {path} cannot be taken: {error.strerror}; check that directory"
            ) from error


def _check_entry(directory: Path, backend: str, revision: Revision) -> None:
    """:raises StorageNotFoundError: the flow's file is not in its source."""
    path = revision.entry.path
    if path is not None and not (directory / path).is_file():
        scripts = [str(file.relative_to(directory)) for file in directory.rglob("*.py")]
        raise StorageNotFoundError(
            f"{backend} source {revision.id} has no file {path!r}{near_path(path, scripts)}"
        )


def _new_directory(root: Path) -> tuple[Path, int]:
    """A directory to fill, and the descriptor that keeps sweepers off as long as this process lives."""
    while True:
        # Its name is not shorter than a key: what can be read here can be read where it is published.
        path = root / f"{TEMPORARY}{secrets.token_hex(30)}"
        path.mkdir(mode=0o700)
        if (guard := locks.try_lock_directory(path)) is not None:  # else a sweeper saw it first
            return path, guard


def _complete(directory: Path, backend: str, revision: str) -> int:
    tree = trees.seal(directory / "source")
    manifest = Manifest(backend, revision, tree.bytes, tree.files, tree.digest, time.time(), boot())
    write_manifest(directory, manifest)
    return tree.bytes


def _publish(directory: Path, place: Place) -> None:
    if os.path.lexists(place.directory):  # half of it was removed by hand
        collection.discard(place)
    os.rename(directory, place.directory)


@contextmanager
def _reported(place: Place, backend: str, revision: str) -> Iterator[None]:
    """Errors of the cache's own disk and trees, in a line that says whose source it was."""
    what = f"{backend} source {revision} was not published in {place.root}"
    try:
        yield
    except SourceCacheError as error:
        raise SourceCacheError(f"{what}: {error}") from error
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "check that directory")
        raise SourceCacheError(f"{what}: {error.strerror or error}; {hint}") from error

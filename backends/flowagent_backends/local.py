"""Local storage: scripts in place, pickles and results as files of this machine."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from anyio import to_thread

from flowagent import files
from flowagent.backend import Artifact, BackendContext, Entry, Features, Revision
from flowagent.errors import BackendError, StorageNotFoundError
from flowagent.flows.names import slug
from flowagent.flows.results import LocalResult
from flowagent.models import Json
from flowagent_backends import artifacts

SETTLED = 3.0
"""Seconds after which a further change of a file surely shows in its times, on any file system."""
MOST_SCRIPTS = 1000

Identity = tuple[int, int, int, int, int]
"""Changes with the content of a file: device, inode, size, and when content and inode were changed."""


class LocalBackend:
    """Files below the home, or where the declaration says. Scripts run where they are, as they are then."""

    type = "Local"
    features = Features(
        kinds=("pickle", "script", "bundle"),
        revision="sha-256 of the file; scripts run in place",
        credentials="the agent's user",
        results="LocalResult",
    )

    def __init__(self, context: BackendContext) -> None:
        self._context = context
        self._scripts: dict[str, tuple[Identity, Revision]] = {}

    # -- flows ---------------------------------------------------------------------------------------

    async def resolve(self, storage: Mapping[str, Json]) -> Revision:
        """A script: what it says now, in place. Pickles and bundles: the digest they were registered with.

        :raises StorageNotFoundError: the file is not on this machine."""
        path = self._path(storage)
        revision = artifacts.pinned(storage)
        if revision is not None:
            with self._reading(path):
                self._check_regular(path, path.stat().st_mode)
            return revision
        if storage.get("stored_as_script"):
            known = self._known_script(str(path))
            return known if known is not None else await to_thread.run_sync(self._script, path)
        raise BackendError(f"Local: {path} was never registered as a pickle; register the flow again")

    async def materialise(self, storage: Mapping[str, Json], revision: Revision, directory: Path) -> None:
        """Copy a pickle, unpack a bundle. :raises BackendError: it is not the one that was registered."""
        await to_thread.run_sync(self._copy, storage, directory)

    async def upload(self, storage: Mapping[str, Json], artifact: Artifact) -> dict[str, Json]:
        """Write a pickle or bundle, under a new name or at a path that the flow's author gave; check that a
        script is there."""
        store = self._refer_to_script if artifact.kind == "script" else self._write
        return await to_thread.run_sync(store, storage, artifact)

    def default_labels(self, storage: Mapping[str, Json]) -> tuple[str, ...]:
        """The name of this machine: no other has the file."""
        return (self._context.host,) if storage.get("add_default_labels", True) else ()

    def default_result(self, storage: Mapping[str, Json]) -> dict[str, Json] | None:
        """Files in the home of the agent that runs the flow."""
        return LocalResult().to_json()

    async def close(self) -> None:
        """Nothing is kept open."""

    def _path(self, storage: Mapping[str, Json]) -> Path:
        path = storage.get("path")
        if not path:
            raise BackendError("Local: the storage names no file; register the flow again, or give path=")
        return Path(path)

    def _known_script(self, path: str) -> Revision | None:
        """A script whose file is the one that was read before; takes no time worth a thread."""
        known = self._scripts.get(path)
        if known is None:
            return None
        with suppress(OSError):
            # opened, not just looked at: a file system of another machine is asked anew only then
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if _identity(os.fstat(file)) == known[0]:
                    return known[1]
            finally:
                os.close(file)
        return None

    def _script(self, path: Path) -> Revision:
        with self._reading(path):
            self._check_regular(path, path.stat().st_mode)
            began = time.time()
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        revision = Revision(f"sha256:{digest}", Entry("script", path.name), directory=path.parent)
        # while it is this new, it could change once more without a trace
        if max(status.st_mtime, status.st_ctime) < began - SETTLED:
            if len(self._scripts) >= MOST_SCRIPTS:
                self._scripts.clear()
            self._scripts[str(path)] = _identity(status), revision
        return revision

    def _copy(self, storage: Mapping[str, Json], directory: Path) -> None:
        path = self._path(storage)
        copy = directory / ".fetched"
        with self._reading(path):
            source = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            self._check_regular(path, os.fstat(source).st_mode)
            _, found = files.write(copy, files.read(source))
        finally:
            os.close(source)
        artifacts.settle(f"Local: {path}", storage, copy, found, directory)

    def _refer_to_script(self, storage: Mapping[str, Json], artifact: Artifact) -> dict[str, Json]:
        declared = storage.get("path") or artifact.path
        if not declared:
            raise BackendError(
                f"Local: which script flow {artifact.flow_name!r} is stored as is not known; give path="
            )
        path = Path(declared).expanduser().absolute()
        self._script(path)
        return {**storage, "path": str(path)}

    def _write(self, storage: Mapping[str, Json], artifact: Artifact) -> dict[str, Json]:
        declared = storage.get("path") if artifact.kind == "pickle" else None  # else it is the script's
        try:
            if declared:
                path = Path(declared).expanduser().absolute()
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                size, _ = files.write(path, _content(artifact))
            else:
                path, size = self._write_new(storage.get("directory"), artifact)
        except OSError as error:
            where = declared or storage.get("directory") or self._context.home / "flows"
            raise BackendError(
                f"Local: flow {artifact.flow_name!r} cannot be written to {where}: {error.strerror}; "
                "check that directory"
            ) from error
        # a storage has a directory or a path, and now it is this path
        described = artifacts.describe(artifact, size)
        return {**storage, "directory": None, "path": str(path), "artifact": described}

    def _write_new(self, directory: str | None, artifact: Artifact) -> tuple[Path, int]:
        root = Path(directory).expanduser().absolute() if directory else self._context.home / "flows"
        parent = root / slug(artifact.flow_name)
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if artifact.kind == "bundle":
            path = parent / f"{artifact.sha256}.tar"
            return path, files.write(path, _content(artifact))[0]
        while True:
            path = parent / slug(datetime.now(UTC).isoformat(timespec="microseconds"))
            with suppress(FileExistsError):  # two flows with the same slug in the same microsecond
                return path, files.write(path, _content(artifact), exclusive=True)[0]

    # -- results -------------------------------------------------------------------------------------

    async def put(self, result: Mapping[str, Json], key: str, file: Path) -> dict[str, Json]:
        """Keep a result as a file below the declared directory, or below ``results`` in the home.

        :raises BackendError: the key leaves that directory, or the file cannot be written."""
        return await to_thread.run_sync(self._write_result, result.get("dir"), key, file)

    async def get(self, reference: Mapping[str, Json], file: Path) -> None:
        """Copy a result to ``file``.

        :raises StorageNotFoundError: it is gone.
        :raises BackendError: it was changed since it was written."""
        path = self._path(reference)

        def copy() -> str:
            with self._reading(path):
                self._check_regular(path, path.stat().st_mode)
                source = path.open("rb")
            with source:  # what goes wrong from here on is about ``file``, and its owner knows better
                return files.write(file, files.read(source.fileno()))[1]

        if await to_thread.run_sync(copy) != reference.get("sha256"):
            raise BackendError(f"Local: result {path} was changed since; a later run may have replaced it")

    def _write_result(self, declared: str | None, key: str, file: Path) -> dict[str, Json]:
        base = Path(declared or self._context.home / "results").expanduser().absolute()
        *parents, name = self._parts(base, key)
        self._check_writable(base)
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
            try:
                for part in parents:
                    with suppress(FileExistsError):
                        os.mkdir(part, 0o700, dir_fd=directory)
                    # no link is followed below the base, so that none can lead out of it
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                    below = os.open(part, flags, dir_fd=directory)
                    os.close(directory)
                    directory = below
                with open(file, "rb") as source:
                    size, sha256 = files.publish(directory, name, files.read(source.fileno()))
            finally:
                os.close(directory)
        except OSError as error:
            raise BackendError(
                f"Local: result {key!r} cannot be written below {base}: {error.strerror}; "
                "check that directory, and that no link is on the way"
            ) from error
        return {
            "storage": "Local",
            "path": str(base.joinpath(*parents, name)),
            "size": size,
            "sha256": sha256,
        }

    def _check_writable(self, base: Path) -> None:
        allowed = self._context.writable
        if allowed is None:
            return
        real = base.resolve()
        for top in (self._context.home / "results", *allowed):
            if real.is_relative_to(top.resolve()):
                return
        raise BackendError(
            f"Local: results are not written to {base}, which this agent does not allow; "
            f"start it with --allow-write {base}"
        )

    def _parts(self, base: Path, key: str) -> tuple[str, ...]:
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or key.endswith("/") or ".." in parts or "\0" in key:
            raise BackendError(f"Local: result key {key!r} leaves {base}; use a relative path without '..'")
        return parts

    # -- errors --------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise StorageNotFoundError(
                f"Local: no file {path} on {self._context.host}; "
                "put it back, or run the flow on the machine that has it"
            ) from None
        except OSError as error:
            raise BackendError(
                f"Local: {path} on {self._context.host} cannot be read: {error.strerror}; "
                "let the agent's user read it"
            ) from error

    def _check_regular(self, path: Path, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise BackendError(
                f"Local: {path} on {self._context.host} is not a regular file; register a file"
            )


def _content(artifact: Artifact) -> Iterator[bytes]:
    if artifact.data is not None:
        yield artifact.data
        return
    assert artifact.path is not None
    with artifact.path.open("rb") as file:
        yield from files.read(file.fileno())


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

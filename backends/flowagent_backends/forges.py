"""What storages in repositories have in common: a commit, and files at that commit, one request for each."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Protocol

import anyio
from anyio import to_thread

from flowagent.backend import Artifact, BackendContext, Entry, Revision
from flowagent.errors import BackendError, StorageNotFoundError, StorageTransientError, one_line
from flowagent.http import TooLargeError
from flowagent.models import Json
from flowagent_backends import declared
from flowagent_backends.answers import understood
from flowagent_backends.code_only import CodeOnly
from flowagent_backends.turns import Turns

MOST_FILES = 2000
MOST_BYTES = 256 << 20
AT_ONCE = 8
"""How many files of one source are asked for at the same time."""
LONGEST_NAME, LONGEST_PATH = 255, 2048
"""Bytes of what a directory, and of what a source, may have as a name."""
LONGEST_CHECK = 600.0
"""Seconds that registering looks whether all is there; a source cache gives a source as much."""
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_POINTER = b"version https://git-lfs.github.com/spec/v1\n"


@dataclass(frozen=True)
class File:
    """A file in a listing; ``blob`` is the object id that git has for its content, where it is known."""

    path: str
    blob: str | None = None
    size: int | None = None


class Repository(Protocol):
    """One repository, as one identity sees it through the API of its service."""

    what: str
    """The beginning of its errors: ``"GitHub: acme/flows"``."""
    key: tuple[str | None, ...]
    """What its files depend on besides commit and path: service, name, and whose access it is."""

    async def commit_of(self, ref: str | None, path: str) -> str:
        """The commit that a branch, a tag or a commit's abbreviation names; by default the default branch.
        ``path`` is there, as some services are asked for the commit of a file."""
        ...

    async def fetch(self, commit: str, file: File, target: Path, limit: int) -> int:
        """Download a file, of at most ``limit`` bytes; how many it has.

        :raises StorageNotFoundError: there is none at that commit."""
        ...

    async def listing(self, commit: str, directory: str) -> list[File]:
        """All files in a directory, in those below it too."""
        ...

    async def save(self, branch: str | None, path: str, content: bytes, message: str) -> None:
        """Commit a file to a branch, unless it is as it should be already."""
        ...


class RepositoryBackend(CodeOnly):
    """A backend of storages in repositories; what is special to a service is in :meth:`repository`."""

    refers: ClassVar[str] = "ref"

    def __init__(self, context: BackendContext) -> None:
        self.context = context
        self._turns: Turns[str] = Turns()
        self._saving = anyio.Lock()

    def repository(self, storage: Mapping[str, Json]) -> Repository:
        """The repository of a storage."""
        raise NotImplementedError

    async def resolve(self, storage: Mapping[str, Json]) -> Revision:
        """The commit that the reference names now; one that is a commit's full id costs no request.

        :raises StorageNotFoundError: there is no such repository, branch, tag or commit."""
        storage = declared.storage(storage)
        repository = self.repository(storage)
        path, ref = storage["path"], storage.get(self.refers)
        if is_sha(ref):
            commit = str(ref)
        else:
            question = (*repository.key, ref, path)
            with understood(repository.what):
                commit = await self._turns.ask(question, lambda: repository.commit_of(ref, path))
        key = [*repository.key, commit, path, *sorted(storage.get("files") or ())]
        return Revision(commit, Entry("script", path), key=json.dumps(key))

    async def materialise(self, storage: Mapping[str, Json], revision: Revision, directory: Path) -> None:
        """Fetch the script and the files beside it, at the places that they have in the repository.

        :raises StorageNotFoundError: one is not there at that commit."""
        storage = declared.storage(storage)
        repository = self.repository(storage)
        wanted = {storage["path"]: File(storage["path"])}
        for name in storage.get("files") or ():
            found = [File(name)]
            if name.endswith("/"):
                with understood(repository.what):
                    found = await repository.listing(revision.id, name.rstrip("/"))
                    _check(repository, name, found)
            wanted |= {file.path: file for file in found}
            if len(wanted) > MOST_FILES:
                raise _too_much(repository, f"{len(wanted)} files")
        for path in wanted:
            _check_path(repository, path)
        for parent in {str(parent) for path in wanted for parent in PurePosixPath(path).parents}:
            if parent in wanted:
                raise special(repository, parent, "directory")
        most = min(MOST_BYTES, self.context.max_source)
        others = f" and {len(wanted) - 1} more" if len(wanted) > 1 else ""
        with self.context.progress(f"downloading {storage['path']}{others}") as advance:
            await _fetch_all(repository, revision.id, wanted.values(), directory, most, advance)

    async def upload(self, storage: Mapping[str, Json], artifact: Artifact) -> dict[str, Json]:
        """Commit the script if that was asked for; then check that all that is named can be had.

        :raises StorageNotFoundError: it is not in the repository.
        :raises StorageTransientError: it took too long."""
        if artifact.kind != "script":
            raise BackendError(f"{self.type}: repositories hold scripts; leave stored_as_script out")
        with anyio.move_on_after(LONGEST_CHECK):
            if storage.get("upload"):
                await self._save(storage, artifact)
            revision = await self.resolve(storage)
            with tempfile.TemporaryDirectory(prefix="flowagent-") as directory:
                await self.materialise(storage, revision, Path(directory))
            return dict(storage)
        raise StorageTransientError(
            f"{self.repository(storage).what}: to look at {storage['path']} took longer than "
            f"{LONGEST_CHECK:g} s; try again, or use Git(...)"
        )

    async def _save(self, storage: Mapping[str, Json], artifact: Artifact) -> None:
        storage = declared.storage(storage)
        repository = self.repository(storage)
        if artifact.path is None:
            raise BackendError(
                f"{repository.what}: flow {artifact.flow_name!r} comes from no file that could be uploaded; "
                "register it from its script, or leave upload= out"
            )
        try:
            content = await to_thread.run_sync(artifact.path.read_bytes)
        except OSError as error:
            raise BackendError(
                f"{repository.what}: {artifact.path} cannot be read: {error.strerror}; check that file"
            ) from error
        branch = storage.get(self.refers)
        branch = branch and branch.removeprefix("refs/heads/")
        message = f"Register flow {artifact.flow_name}"
        async with self._saving:  # one commit is the parent of the next
            with understood(repository.what):
                await repository.save(branch, storage["path"], content, message)


def is_sha(value: Any) -> bool:
    """Whether this is the full id of a commit."""
    return isinstance(value, str) and _SHA.fullmatch(value) is not None


def blob_id(content: bytes, algorithm: str = "sha1") -> str:
    """The object id that git has for a file's content."""
    return hashlib.new(algorithm, b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Pages:
    """The requests that a listing takes: each is made once, and no more of them than files can be had."""

    def __init__(self, what: str, directory: str) -> None:
        self._what = what
        self._directory = directory
        self._asked: set[bytes] = set()

    def ask(self, page: str) -> None:
        """Before each request. :raises BackendError: it was made before, or there are too many."""
        digest = hashlib.sha256(page.encode()).digest()  # a page's name is as long as its service likes
        if digest in self._asked:
            raise BackendError(
                f"{self._what}: the listing of {self._directory}/ leads back to where it was; "
                "that server cannot be trusted"
            )
        if len(self._asked) > MOST_FILES:
            raise BackendError(
                f"{self._what}: the listing of {self._directory}/ takes more than {MOST_FILES} requests; "
                "that is too much for this API, use Git(...)"
            )
        self._asked.add(digest)


# -- files -----------------------------------------------------------------------------------------------


async def _fetch_all(
    repository: Repository,
    commit: str,
    files: Iterable[File],
    directory: Path,
    most: int,
    advance: Callable[[int], None],
) -> None:
    left = most
    places = anyio.CapacityLimiter(AT_ONCE)
    failed: list[Exception] = []

    async def fetch(file: File) -> None:
        nonlocal left
        async with places:
            if failed:
                return
            target = directory / file.path
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with understood(repository.what):
                    size = await repository.fetch(commit, file, target, max(left, 1))
                left -= size
                if left < 0:
                    raise TooLargeError
                await to_thread.run_sync(_verify, repository, file, target)
                advance(size)
            except TooLargeError:
                failed.append(_too_much(repository, f"more than {most} bytes"))
                group.cancel_scope.cancel()
            except Exception as error:  # as it is, not in a group
                failed.append(error)
                group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for file in files:
            group.start_soon(fetch, file)
    if failed:
        raise failed[0]


def _verify(repository: Repository, file: File, target: Path) -> None:
    """:raises BackendError: this is not the content, but what stands for it, or something else."""
    with target.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise BackendError(
                f"{repository.what}: {file.path} is kept in Git LFS, which this API does not give; "
                "use Git(...) for this flow"
            )
    if file.blob is None:
        return
    algorithm = "sha1" if len(file.blob) == 40 else "sha256"
    digest = hashlib.new(algorithm, b"blob %d\0" % target.stat().st_size, usedforsecurity=False)
    with target.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != file.blob:
        raise StorageTransientError(
            f"{repository.what}: {file.path} came with other content than git has for it; try again"
        )


def _check(repository: Repository, directory: str, found: Iterable[File]) -> None:
    """:raises BackendError: a listing leads out of its directory, whoever made it so.
    :raises TypeError: it is no listing."""
    for file in found:
        if (
            not isinstance(file.path, str)
            or not (file.blob is None or is_sha(file.blob))
            or not (file.size is None or (isinstance(file.size, int) and 0 <= file.size < 1 << 60))
        ):
            raise TypeError
        parts = PurePosixPath(file.path).parts
        if (
            not file.path.startswith(directory)
            or file.path != "/".join(parts)
            or ".." in parts
            or "\0" in file.path
            or "/".join(parts) == directory.rstrip("/")
        ):
            path = one_line(repr(file.path))
            raise BackendError(
                f"{repository.what}: the listing of {directory} has {path}, which is not in it; "
                "that server cannot be trusted"
            )


def _check_path(repository: Repository, path: str) -> None:
    """:raises BackendError: no file can have this name."""
    try:
        names = [len(name.encode()) for name in path.split("/")]
    except UnicodeEncodeError:
        names = []
    if not names or max(names) > LONGEST_NAME or sum(names) + len(names) > LONGEST_PATH:
        raise BackendError(
            f"{repository.what}: {one_line(repr(path), 100)} is no name that a file can have here; "
            "give that file another one"
        )


def _too_much(repository: Repository, what: str) -> BackendError:
    return BackendError(
        f"{repository.what}: files= comes to {what}; that is too much for this API, use Git(...)"
    )


def no_file(repository: Repository, path: str, commit: str) -> StorageNotFoundError:
    return StorageNotFoundError(
        f"{repository.what}: no file {one_line(path)} at commit {commit[:12]}; "
        "commit and push it, or correct the path"
    )


def special(repository: Repository, path: str, kind: str) -> BackendError:
    return BackendError(
        f"{repository.what}: {one_line(path)} is a {kind}, which is not fetched; "
        "name files, or directories with a / at their end, or use Git(...)"
    )

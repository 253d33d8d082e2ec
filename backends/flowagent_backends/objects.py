"""What object stores have in common: flows and results as objects; a transport for each is beside it.

An object has a key, and a revision by which exactly these bytes are read again. Pickles and bundles are
pinned by their digest at registration, so that only scripts ask the store what would run now.
"""

from __future__ import annotations

import json
import os
import posixpath
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import anyio
from anyio import to_thread

from flowagent.backend import Artifact, BackendContext, Entry, Features, Revision
from flowagent.errors import BackendError, SecretError, StorageTransientError, one_line
from flowagent.flows.names import slug
from flowagent.http import Counted, TooLargeError
from flowagent.models import Json
from flowagent_backends import artifacts, declared
from flowagent_backends.answers import understood

PART = 8 << 20
"""Bytes that are sent at a time; what is larger goes up in parts of this size, or of multiples of it."""
MOST_PARTS = 9000
SCRIPT_LIMIT = 64 << 20
"""Bytes of a script, which nobody has registered the size of."""
PATIENCE = 60.0
"""Seconds for one request with its repetitions, but for the body of a download."""
LONGEST_KEY = 1024
"""Bytes that a key may have everywhere."""
LONGEST = 3600.0
"""Seconds that the transfer of a result may take."""
MARK = ("flowagent", "result")
"""The metadata of results. An agent replaces no object without it: flows choose the keys of their results,
and must not put them in place of another flow's code."""


@dataclass(frozen=True)
class Head:
    """An object as it is now. ``ours``: it is a result of flowagent's."""

    revision: str
    size: int
    ours: bool = False


class Taken(BackendError):
    """There is an object of that key already, or it is not the one that was to be replaced."""


class Replaced(BackendError):
    """The object is not the revision that was asked for."""


@dataclass(frozen=True)
class Content:
    """What is to be uploaded, in memory or in a file; read in pieces, in a thread."""

    size: int
    data: bytes | None = None
    path: Path | None = None

    @classmethod
    def of(cls, artifact: Artifact) -> Content:
        if artifact.data is not None:
            return cls(len(artifact.data), data=artifact.data)
        assert artifact.path is not None
        return cls(artifact.path.stat().st_size, path=artifact.path)

    def part_size(self) -> int:
        return PART * max(1, -(-self.size // (PART * MOST_PARTS)))

    def parts(self) -> Iterator[tuple[int, int]]:
        """Offset and size of each part."""
        step = self.part_size()
        for offset in range(0, self.size, step):
            yield offset, min(step, self.size - offset)

    async def read(self, offset: int, size: int) -> bytes:
        if self.data is not None:
            return self.data[offset : offset + size]

        def read() -> bytes:
            assert self.path is not None
            with self.path.open("rb") as file:
                return os.pread(file.fileno(), size, offset)

        piece = await to_thread.run_sync(read)
        if len(piece) != size:
            raise BackendError(f"{self.path} became shorter while it was read; try again")
        return piece


@dataclass(frozen=True)
class Upload:
    """How an object is to be put there: only where there is none (``new``), or instead of exactly one."""

    content: Content
    new: bool = False
    instead_of: str | None = None
    metadata: tuple[tuple[str, str], ...] = ()


class ObjectBackend(ABC):
    """The driver of an object store, but for the transport. ``place`` is a storage or a result declaration:
    what it says of bucket and connection is the transport's business."""

    type: ClassVar[str]
    features: ClassVar[Features]
    key_field: ClassVar[str] = "key"
    place_fields: ClassVar[tuple[str, ...]]
    """Fields of declarations that say where objects are, and how they are reached."""

    def __init__(self, context: BackendContext) -> None:
        self._context = context

    # -- the transport -------------------------------------------------------------------------------

    @abstractmethod
    def _where(self, place: Mapping[str, Json], key: str) -> str:
        """What errors begin with: ``S3: s3://bucket/key``."""

    @abstractmethod
    async def _head(self, place: Mapping[str, Json], key: str) -> Head:
        """:raises StorageNotFoundError: there is no such object, or no such bucket."""

    @abstractmethod
    async def _fetch(
        self,
        place: Mapping[str, Json],
        key: str,
        revision: str | None,
        file: Path,
        limit: int,
        advance: Callable[[int], None],
    ) -> str:
        """Write an object to ``file``; its sha-256.

        :raises Replaced: it is another revision now.
        :raises TooLargeError: it has more than ``limit`` bytes."""

    @abstractmethod
    async def _store(
        self,
        place: Mapping[str, Json],
        key: str,
        upload: Upload,
        advance: Callable[[int], None],
    ) -> str:
        """Write an object, whole or not at all; its revision. :raises Taken: see :class:`Upload`."""

    @abstractmethod
    async def close(self) -> None:
        """Close connections."""

    # -- flows ---------------------------------------------------------------------------------------

    async def resolve(self, storage: Mapping[str, Json]) -> Revision:
        """A script: what is there now. Pickles and bundles: the digest they were registered with."""
        storage = declared.storage(storage)
        key = self._key(storage)
        identity = json.dumps([key, *(storage.get(name) for name in self.place_fields)], sort_keys=True)
        pinned = artifacts.pinned(storage, identity)
        if pinned is not None:
            return pinned
        if not storage.get("stored_as_script"):
            raise BackendError(f"{self._where(storage, key)} was never registered; register the flow again")
        name = self._script_name((artifacts.registered(storage) or {}).get("entry"), key)
        with understood(self._where(storage, key)):
            head = await self._head(storage, key)
        return Revision(head.revision, Entry("script", name), key=f"{identity} {head.revision}")

    async def materialise(self, storage: Mapping[str, Json], revision: Revision, directory: Path) -> None:
        """Download a script, a pickle, or a bundle and unpack it.

        :raises BackendError: it is not what was registered."""
        storage = declared.storage(storage)
        key = self._key(storage)
        where = self._where(storage, key)
        pinned = artifacts.registered(storage) if revision.id.startswith("sha256:") else None
        fetched = directory / f".{secrets.token_hex(8)}"
        size = None if pinned is None else pinned["size"]
        if size is not None and size > self._context.max_source:
            raise artifacts.too_large(where)
        limit = min(SCRIPT_LIMIT, self._context.max_source) if size is None else size
        try:
            with self._context.progress(f"downloading {key}", size) as advance, understood(where):
                version = revision.id if pinned is None else None
                sha256 = await self._fetch(storage, key, version, fetched, limit, advance)
        except Replaced as error:
            raise StorageTransientError(
                f"{where} was replaced while it was read; run the flow again"
            ) from error
        except TooLargeError as error:
            if pinned is None:
                raise
            raise BackendError(
                f"{where} is larger than what was registered; it was changed since: register the flow again"
            ) from error
        if pinned is not None:
            await to_thread.run_sync(artifacts.settle, where, storage, fetched, sha256, directory)
        else:
            assert revision.entry.path is not None
            fetched.rename(directory / revision.entry.path)

    async def upload(self, storage: Mapping[str, Json], artifact: Artifact) -> dict[str, Json]:
        """Store an artifact; where the script is nobody's file here, check that the object is there."""
        storage = declared.storage(storage)
        place = {**storage, **artifact.given}
        named = storage.get(self.key_field) is not None
        key = self._key(storage) if named else self._new_key(artifact)
        where = self._where(storage, key)
        if artifact.kind == "script":
            self._script_name(artifact.entry, key)
        if artifact.path is None and artifact.data is None:
            with understood(where):
                await self._head(place, key)
            return dict(storage)
        content = Content.of(artifact)
        with self._context.progress(f"uploading {key}", content.size) as advance, understood(where):
            try:
                upload = Upload(content, new=named and storage.get("overwrite") is False)
                await self._store(place, key, upload, advance)
            except Taken as error:
                raise BackendError(f"{where} exists; add overwrite=True, or choose another name") from error
        return {**storage, self.key_field: key, "artifact": artifacts.describe(artifact, content.size)}

    def default_labels(self, storage: Mapping[str, Json]) -> tuple[str, ...]:
        """None: any agent that can reach the store can run its flows."""
        return ()

    @abstractmethod
    def default_result(self, storage: Mapping[str, Json]) -> dict[str, Json] | None:
        """Objects in the same place."""

    def _key(self, storage: Mapping[str, Json]) -> str:
        key: str | None = storage.get(self.key_field)
        if not key:
            raise BackendError(
                f"{self.type}: the storage names no object; register the flow, or give {self.key_field}="
            )
        return self._checked(key)

    def _checked(self, key: str) -> str:
        """:raises BackendError: a store does not take such a key, or it leads out of its bucket, as clients
        shorten paths (RFC 3986, remove_dot_segments)."""
        try:
            size = len(key.encode())
        except UnicodeEncodeError:
            size = 0
        controls = any(ord(letter) < 32 or letter == "\x7f" for letter in key)
        if controls or not 0 < size <= LONGEST_KEY or {".", ".."} & set(key.split("/")):
            raise BackendError(
                f"{self.type}: the key {one_line(ascii(key), 100)} cannot be used: it has at most "
                f"{LONGEST_KEY} bytes, no control characters, and no '.' or '..' between slashes; "
                "choose another"
            )
        return key

    def _script_name(self, entry: str | None, key: str) -> str:
        """The file that a script becomes. :raises BackendError: nothing names one."""
        name = entry or posixpath.basename(key)
        if not artifacts.is_name(name):
            raise BackendError(
                f"{self.type}: {self.key_field}={one_line(key, 100)!r} does not end in the name of a file, "
                "as flows/etl.py does; choose another"
            )
        return name

    def _new_key(self, artifact: Artifact) -> str:
        if artifact.kind == "bundle":
            return f"{slug(artifact.flow_name)}/{artifact.sha256}.tar"
        return f"{slug(artifact.flow_name)}/{slug(datetime.now(UTC).isoformat(timespec='microseconds'))}"

    # -- results -------------------------------------------------------------------------------------

    async def put(self, result: Mapping[str, Json], key: str, file: Path) -> dict[str, Json]:
        """Store a result. It may take the place of another result, but of no other object.

        :raises BackendError: there is an object of that key which is no result."""
        result, key = declared.result(result), self._checked(key)
        size, sha256 = await to_thread.run_sync(artifacts.digest, file)
        content, where = Content(size, path=file), self._where(result, key)
        upload = Upload(content, new=True, metadata=(MARK,))
        with (
            self._context.progress(f"uploading {key}", size) as advance,
            deadline(where, LONGEST),
            understood(where),
        ):
            counted = Counted(advance)
            try:
                revision = await self._store(result, key, upload, counted)
            except Taken:  # which some stores say at the end of the upload
                counted.take_back()
                revision = await self._replace(result, key, content, counted)
        place = {name: result[name] for name in self.place_fields if result.get(name)}
        found = {"key": key, "revision": revision, "size": size, "sha256": sha256}
        return {"storage": self.type, "uri": self._where(result, key).partition(": ")[2], **place, **found}

    async def _replace(
        self, result: Mapping[str, Json], key: str, content: Content, advance: Callable[[int], None]
    ) -> str:
        head = await self._head(result, key)
        if not head.ours:
            raise BackendError(
                f"{self._where(result, key)} is no result of a flow's, and is not replaced by one; "
                "choose another location"
            )
        try:
            upload = Upload(content, instead_of=head.revision, metadata=(MARK,))
            return await self._store(result, key, upload, advance)
        except Taken as error:
            raise StorageTransientError(
                f"{self._where(result, key)} was replaced by another run at the same time"
            ) from error

    async def get(self, reference: Mapping[str, Json], file: Path) -> None:
        """Read a result as it was written.

        :raises StorageNotFoundError: it is gone.
        :raises BackendError: it was changed since."""
        key, size = reference["key"], reference["size"]
        where = self._where(reference, key)
        try:
            with (
                self._context.progress(f"downloading {key}", size) as advance,
                deadline(where, LONGEST),
                understood(where),
            ):
                found = await self._fetch(reference, key, reference["revision"], file, size, advance)
        except (Replaced, TooLargeError):
            found = ""
        if found != reference["sha256"]:
            raise BackendError(f"{where} was changed since; a later run may have replaced it")

    # -- what transports share -----------------------------------------------------------------------

    def _secret(self, name: str) -> str | None:
        """A secret of this host; None: it is not set. :raises BackendError: it cannot be read."""
        try:
            provider = self._context.secrets
            return provider.get(name) if provider.origin(name) else None
        except SecretError as error:
            raise BackendError(f"{self.type}: {error}") from error


@contextmanager
def deadline(where: str, seconds: float) -> Iterator[None]:
    """No more than so many seconds. :raises StorageTransientError: they have passed."""
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise StorageTransientError(f"{where} did not answer within {seconds:g} s; try again later")

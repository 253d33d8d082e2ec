"""Bundles: a script and its side files as one archive.

A bundle is a tar archive of regular files in the order of their names, with neither times nor owners, so that
equal files make equal archives, which are known by their digest. It is not compressed: what is unpacked is
no larger than what was fetched, and the size of that is registered.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flowagent.errors import BackendError, UsageError

LEFT_OUT = frozenset({"__pycache__", ".git", ".hg", ".svn"})
"""Directories that are nobody's side files."""
MOST_FILES = 100_000
PIECE = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """An archive that was packed. ``entry`` is the script's name in it."""

    path: Path
    entry: str
    sha256: str
    size: int


def pack(script: Path, include: Iterable[str], archive: Path) -> Bundle:
    """Write the script and what ``include`` names below its directory to the new file ``archive``.

    A name of ``include`` is a file, a directory with all that is in it, or a glob pattern (``**`` too).

    :raises UsageError: a name matches nothing, or leads out of the script's directory."""
    root = Path(os.path.realpath(script.parent))
    found = {script.name: script}
    for pattern in include:
        matches = {os.path.relpath(path, root): Path(path) for path in _matching(root, pattern)}
        if not matches:
            raise UsageError(f"include={pattern!r} matches no file below {root}; correct it, or leave it out")
        found.update(matches)
    if len(found) > MOST_FILES:
        raise UsageError(
            f"include= matches {len(found)} files below {root}, more than {MOST_FILES}; name fewer"
        )
    try:
        with open(archive, "xb") as raw:
            target = _Digesting(raw)
            with tarfile.open(fileobj=target, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
                for name in sorted(found):
                    _add(tar, name, found[name], root)
    except OSError as error:
        raise _unwritten(archive, error) from error
    return Bundle(archive, script.name, target.digest.hexdigest(), target.size)


def unpack(archive: BinaryIO, directory: Path, what: str) -> None:
    """Unpack an archive of :func:`pack` into an empty directory.

    Nothing but regular files below it is ever written, whatever the archive says, and no more bytes than it
    has. ``what`` begins errors.

    :raises BackendError: it is no such archive."""
    try:
        for member in _members(archive):
            parts = member.name.split("/")
            if member.type != tarfile.REGTYPE or member.size < 0 or {"", ".", ".."} & set(parts):
                raise tarfile.TarError(f"{member.name!r} is no plain file below it")
            target = directory.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            mode = 0o700 if member.mode & stat.S_IXUSR else 0o600
            with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                for piece in _exactly(archive, member.size):
                    file.write(piece)
            for _ in _exactly(archive, -member.size % tarfile.BLOCKSIZE):
                pass
    except (tarfile.TarError, ValueError, FileExistsError, NotADirectoryError) as error:
        raise BackendError(
            f"{what}: the bundle cannot be unpacked: {error}; register the flow again"
        ) from error


def _members(archive: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers, one by one; whoever takes one reads its content. What tar has besides plain headers is
    refused: it can be large, and sparse."""
    for number in range(MOST_FILES + 1):
        header = archive.read(tarfile.BLOCKSIZE)
        if header == bytes(tarfile.BLOCKSIZE):
            return
        if number == MOST_FILES:
            raise tarfile.TarError(f"it holds more than {MOST_FILES} files")
        yield tarfile.TarInfo.frombuf(header, "utf-8", "strict")


def _exactly(archive: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        piece = archive.read(min(size, PIECE))
        if not piece:
            raise tarfile.TarError("it ends in the middle of a file")
        size -= len(piece)
        yield piece


def _matching(root: Path, pattern: str) -> Iterator[Path]:
    for match in glob.iglob(glob.escape(str(root)) + "/" + pattern, recursive=True, include_hidden=True):
        for path in _below(match) if os.path.isdir(match) else [match]:
            if not LEFT_OUT & set(os.path.relpath(path, root).split(os.sep)):
                yield Path(os.path.normpath(path))


def _below(directory: str) -> Iterator[str]:
    for parent, _, names in os.walk(directory):
        for name in names:
            yield os.path.join(parent, name)


def _add(tar: tarfile.TarFile, name: str, path: Path, root: Path) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise UsageError(f"{shown} cannot be part of a bundle: its name is not UTF-8; rename it") from None
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        raise UsageError(f"{path} leads out of {root}, to {real}; put a copy of it there")
    try:
        with open(os.open(real, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path} is no regular file, and cannot be part of a bundle")
            member = tarfile.TarInfo(Path(name).as_posix())
            member.size = status.st_size
            member.mode = 0o755 if status.st_mode & stat.S_IXUSR else 0o644
            tar.addfile(member, file)
    except ValueError as error:
        raise UsageError(f"{path} cannot be part of a bundle: {error}; rename it") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read for the bundle: {error.strerror or error}") from error


def _unwritten(archive: Path, error: OSError) -> UsageError:
    return UsageError(
        f"the bundle cannot be written to {archive.parent}: {error.strerror or error}; "
        "free space there, or set TMPDIR to another directory"
    )


class _Digesting(io.RawIOBase):
    """Passes on what is written, and knows its digest and size."""

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            self._target.write(data)
        except OSError as error:  # it must not be taken for one of the file that is read
            raise _unwritten(Path(self._target.name), error) from error
        self.digest.update(data)
        self.size += len(data)
        return len(data)

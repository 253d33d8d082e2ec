"""Directory trees as the cache keeps them: nothing in them leads outside, and nobody writes to them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flowagent import files
from flowagent.errors import SourceCacheError

READ_ONLY = 0o555
"""Mode of directories and programs; below a home that only its owner can enter."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Tree:
    """What a tree holds. ``digest`` covers names, kinds, execute bits and contents."""

    bytes: int
    files: int
    digest: str


def seal(root: Path) -> Tree:
    """Make everything below ``root``, and ``root``, read-only, and read it.

    :raises SourceCacheError: a symbolic link leads out of it, or something is neither file nor directory."""
    real_root = os.path.realpath(root)

    def close(name: str, path: str, status: os.stat_result) -> None:
        if stat.S_ISLNK(status.st_mode):
            target = os.path.realpath(path)
            if os.path.isabs(os.readlink(path)) or os.path.commonpath([target, real_root]) != real_root:
                raise SourceCacheError(
                    f"symbolic link {name} leads out of it, to {os.readlink(path)!r}; "
                    "remove the link, or make it relative to a place inside"
                )
        elif stat.S_ISDIR(status.st_mode):
            os.chmod(path, READ_ONLY)
        elif stat.S_ISREG(status.st_mode):
            os.chmod(path, READ_ONLY if status.st_mode & stat.S_IXUSR else 0o444)
        else:
            raise SourceCacheError(f"{name} in the source is neither file nor directory; remove it")

    tree = _read(root, close)
    os.chmod(root, READ_ONLY)
    return tree


def measure(root: Path) -> Tree:
    """Read a whole tree. :raises OSError: some of it cannot be read."""
    return _read(root, lambda name, path, status: None)


def _read(root: Path, visit: Callable[[str, str, os.stat_result], None]) -> Tree:
    """What a tree holds; ``visit`` sees each thing in it before it is read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(files.PIECE))
    size = count = 0
    for relative, path, status in _walk(root):
        visit(relative, path, status)
        name = os.fsencode(relative)
        if stat.S_ISDIR(status.st_mode):
            content = b"directory"
        elif stat.S_ISLNK(status.st_mode):
            content = b"link " + os.fsencode(os.readlink(path))
        else:
            kind = b"program " if status.st_mode & stat.S_IXUSR else b"file "
            content = kind + _digest(path, buffer)
            size += status.st_size
            count += 1
        digest.update(b"%d %s %d %s\n" % (len(name), name, len(content), content))
    return Tree(size, count, digest.hexdigest())


def copy(root: Path, target: Path) -> None:
    """Copy a tree for somebody who may write to it. :raises SourceCacheError: it cannot be written."""
    try:
        shutil.copytree(root, target, symlinks=True, copy_function=shutil.copyfile)
        for name, _, status in _walk(root):
            if not stat.S_ISLNK(status.st_mode):
                os.chmod(target / name, 0o700 if status.st_mode & stat.S_IXUSR else 0o600)
        target.chmod(0o700)
    except (OSError, shutil.Error) as error:
        said = getattr(error, "strerror", None) or error
        raise SourceCacheError(f"the source cannot be copied to {target}: {said}; check that disk") from error


def remove(root: Path) -> None:
    """Remove a tree, however deep, read-only or not; another process may be removing it too.

    :raises OSError: some of it cannot be removed."""
    with suppress(FileNotFoundError):
        _empty(root)
        os.rmdir(root)


@dataclass
class _Level:
    """A directory on the way from the root of a removal down to where it is."""

    name: str
    identity: tuple[int, int]
    directories: list[str]
    """Names of those in it that are still to be removed."""


def _empty(root: Path) -> None:
    """Remove all that is in ``root``.

    Names are relative to the one directory that is open, and the way back is ``..``: paths from the root may
    be longer than the system takes, and the levels more than a process may have files open."""
    here = _enter(os.fspath(root), None)
    try:
        way = [_Level("", _identity(here), _unlink_files(here))]
        while way:
            if way[-1].directories:
                name = way[-1].directories.pop()
                try:
                    below = _enter(name, here)
                except FileNotFoundError:
                    continue
                here = _instead_of(here, below)
                way.append(_Level(name, _identity(here), _unlink_files(here)))
                continue
            emptied = way.pop()
            if way:
                here = _instead_of(here, os.open("..", _DIRECTORY, dir_fd=here))
                if _identity(here) != way[-1].identity:
                    raise OSError(errno.EAGAIN, "a directory in it was moved meanwhile", str(root))
                with suppress(FileNotFoundError):
                    os.rmdir(emptied.name, dir_fd=here)
    finally:
        os.close(here)


def _enter(name: str, parent: int | None) -> int:
    """A descriptor of a directory, made writable first; a link is refused."""
    seen = os.open(name, _DIRECTORY | os.O_PATH, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{seen}", 0o700)
        return os.open(".", _DIRECTORY, dir_fd=seen)
    finally:
        os.close(seen)


def _instead_of(old: int, new: int) -> int:
    os.close(old)
    return new


def _identity(directory: int) -> tuple[int, int]:
    status = os.fstat(directory)
    return status.st_dev, status.st_ino


def _unlink_files(directory: int) -> list[str]:
    """Unlink all but the directories in it, and name those."""
    with os.scandir(directory) as found:
        entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
    for name, is_directory in entries:
        if not is_directory:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
    return [name for name, is_directory in entries if is_directory]


def _walk(root: Path) -> Iterator[tuple[str, str, os.stat_result]]:
    """Everything below ``root`` in a fixed order, directories before what they hold; no link is followed.

    Gives names relative to ``root``, and paths; as text, since path objects would take most of the time."""
    directories = [("", os.fspath(root))]
    for prefix, directory in directories:  # grows on the way: a tree may be deeper than Python's stack
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            yield prefix + entry.name, entry.path, status
            if stat.S_ISDIR(status.st_mode):
                directories.append((f"{prefix}{entry.name}/", entry.path))


def _digest(path: str, buffer: memoryview) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        digest = hashlib.sha256()
        while count := os.readv(file, [buffer]):
            digest.update(buffer[:count])
    finally:
        os.close(file)
    return digest.hexdigest().encode()

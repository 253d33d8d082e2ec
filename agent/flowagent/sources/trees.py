"""Directory trees as the cache keeps them: nothing in them leads outside, and nobody writes to them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flowagent import files
from flowagent.errors import SourceCacheError

READ_ONLY = 0o555
"""Mode of directories and programs; below a home that only its owner can enter."""


@dataclass(frozen=True)
class Tree:
    """What a tree holds. ``digest`` covers names, kinds, execute bits and contents."""

    bytes: int
    files: int
    digest: str


def seal(root: Path) -> None:
    """Make everything below ``root``, and ``root``, read-only.

    :raises SourceCacheError: a symbolic link leads out of it, or something is neither file nor directory."""
    real_root = os.path.realpath(root)
    for path, status in _walk(root):
        if stat.S_ISLNK(status.st_mode):
            target = os.path.realpath(path)
            if os.path.isabs(os.readlink(path)) or os.path.commonpath([target, real_root]) != real_root:
                raise SourceCacheError(
                    f"symbolic link {path.relative_to(root)} leads out of it, to {os.readlink(path)!r}; "
                    "remove the link, or make it relative to a place inside"
                )
        elif stat.S_ISDIR(status.st_mode):
            os.chmod(path, READ_ONLY)
        elif stat.S_ISREG(status.st_mode):
            os.chmod(path, READ_ONLY if status.st_mode & stat.S_IXUSR else 0o444)
        else:
            raise SourceCacheError(
                f"{path.relative_to(root)} in the source is neither file nor directory; remove it"
            )
    os.chmod(root, READ_ONLY)


def measure(root: Path) -> Tree:
    """Read a whole tree. :raises OSError: some of it cannot be read."""
    digest = hashlib.sha256()
    size = count = 0
    for path, status in _walk(root):
        name = os.fsencode(path.relative_to(root))
        if stat.S_ISDIR(status.st_mode):
            content = b"directory"
        elif stat.S_ISLNK(status.st_mode):
            content = b"link " + os.fsencode(os.readlink(path))
        else:
            kind = b"program " if status.st_mode & stat.S_IXUSR else b"file "
            content = kind + _digest(path)
            size += status.st_size
            count += 1
        digest.update(b"%d %s %d %s\n" % (len(name), name, len(content), content))
    return Tree(size, count, digest.hexdigest())


def remove(root: Path) -> None:
    """Remove a tree, read-only or not; another process may be removing it too. :raises OSError:"""
    directories = [os.fspath(root)]
    for directory in directories:  # grows on the way
        with suppress(FileNotFoundError):
            os.chmod(directory, 0o700)
            with os.scandir(directory) as found:
                entries = list(found)
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.path)
                else:
                    with suppress(FileNotFoundError):
                        os.unlink(entry.path)
    for directory in reversed(directories):
        with suppress(FileNotFoundError):
            os.rmdir(directory)


def _walk(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything below ``root`` in a fixed order, directories before what they hold; no link is followed."""
    directories = [root]
    for directory in directories:  # grows on the way: a tree may be deeper than Python's stack
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            path, status = Path(entry.path), entry.stat(follow_symlinks=False)
            yield path, status
            if stat.S_ISDIR(status.st_mode):
                directories.append(path)


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        for piece in files.read(file.fileno()):
            digest.update(piece)
    return digest.hexdigest().encode()

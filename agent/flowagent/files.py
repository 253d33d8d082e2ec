"""Files that are either whole or not there, whatever happens while they are written; and files that nobody
else can have written."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

PIECE = 1 << 20
"""How many bytes are read or written at a time."""
MOST_LINKS = 40
"""Symbolic links on the way to a file, as the kernel has it."""


def publish(
    directory: int, name: str, pieces: Iterable[bytes], *, mode: int = 0o600, exclusive: bool = False
) -> tuple[int, str]:
    """Write ``pieces`` to the file ``name`` of an open directory; its size in bytes and its sha-256.

    The file is complete and on disk when this returns; before, ``name`` is what it was.

    :raises FileExistsError: ``exclusive`` was asked for and the file is there.
    :raises OSError: it could not be written; nothing is left behind."""
    temporary = f".tmp-{secrets.token_hex(8)}"
    digest = hashlib.sha256()
    size = 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with open(os.open(temporary, flags, mode, dir_fd=directory), "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask is
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                size += len(piece)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        else:
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
    finally:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
    return size, digest.hexdigest()


def write(
    path: Path, pieces: Iterable[bytes], *, mode: int = 0o600, exclusive: bool = False
) -> tuple[int, str]:
    """As :func:`publish`, by path; its directory must exist."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return publish(directory, path.name, pieces, mode=mode, exclusive=exclusive)
    finally:
        os.close(directory)


def read(file: int) -> Iterable[bytes]:
    """The bytes of an open file from where it stands, a piece at a time."""
    while piece := os.read(file, PIECE):
        yield piece


def changeable(place: str) -> bool:
    """Whether others than root and this user may change a file, a link, or what is there already in a
    directory. :raises OSError: it cannot be looked at."""
    status = os.lstat(place)
    link, directory = stat.S_ISLNK(status.st_mode), stat.S_ISDIR(status.st_mode)
    others = not link and status.st_mode & 0o022 and not (directory and status.st_mode & stat.S_ISVTX)
    return status.st_uid not in (0, os.geteuid()) or bool(others)


def way(path: str) -> Iterator[str]:
    """All that is looked at when a path is opened: directories, links, and what they lead to.

    :raises OSError: there are too many links."""
    place, links = "/", 0
    names = os.path.abspath(path).split("/")[::-1]
    yield place
    while names:
        name = names.pop()
        if name in ("", "."):
            continue
        if name == "..":
            place = os.path.dirname(place)
            continue
        here = os.path.join(place, name)
        yield here
        if not os.path.islink(here):
            place = here
            continue
        links += 1
        if links > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        target = os.readlink(here)
        names += target.split("/")[::-1]
        if target.startswith("/"):
            place = "/"

"""Files that are either whole or not there, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PIECE = 1 << 20
"""How many bytes are read or written at a time."""


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

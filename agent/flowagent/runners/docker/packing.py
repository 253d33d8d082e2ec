"""Files on their way into a container: a list of them, then their contents, one after the other."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio

from flowagent.errors import LauncherError
from flowagent.runtime.limits import size

PIECE = 1 << 18
MOST_FILES = 200_000
"""More than any source should have. One in place is all that is next to a script, which may be a lot."""
LEFT_OUT = frozenset({".git", "__pycache__", ".venv", "node_modules"})
"""Of a source in place: what tools keep there."""


def listed(source: Path, most: int, *, in_place: bool) -> list[list[Any]]:
    """What is in a source: name, mode, and size or, of a link, its target. ``in_place``: nobody made it for
    this, so what tools keep there stays where it is.

    :raises LauncherError: it is more than ``most`` bytes."""
    found: list[list[Any]] = []
    total = 0
    pending = [""]
    while pending:
        directory = pending.pop()
        with os.scandir(os.path.join(source, directory)) as entries:
            for entry in entries:
                name = os.path.join(directory, entry.name)
                status = entry.stat(follow_symlinks=False)
                if entry.is_symlink():
                    found.append([name, None, os.readlink(entry.path)])
                elif entry.is_dir():
                    if not (in_place and entry.name in LEFT_OUT):
                        found.append([name, None, None])
                        pending.append(name)
                elif stat.S_ISREG(status.st_mode):
                    found.append([name, status.st_mode & 0o777 | 0o400, status.st_size])
                    total += status.st_size
        if len(found) > MOST_FILES or total > most:
            raise LauncherError(
                f"{source} is too large to be copied into a container: more than {MOST_FILES} files, or "
                f"than {size(most)}; keep the flow in a directory of its own, or in an image"
            )
    return found


async def stream(head: bytes, source: Path, files: list[list[Any]]) -> AsyncIterator[bytes]:
    """First ``head``, then what is in the files."""
    yield head
    pieces = contents(source, files)
    while piece := await anyio.to_thread.run_sync(next, pieces, b""):
        yield piece


def contents(source: Path, files: list[list[Any]]) -> Iterator[bytes]:
    """What is in the files, each as long as it was listed, whatever happened to it since."""
    for name, mode, length in files:
        if mode is None:
            continue
        left = length
        with open(os.path.join(source, name), "rb") as file:
            while left and (data := file.read(min(PIECE, left))):
                left -= len(data)
                yield data
        while left:
            yield bytes(min(PIECE, left))
            left -= min(PIECE, left)

"""Advisory locks between processes, on files that may be unlinked while others open them.

A lock counts only while its file is the one that the path names: a holder of the exclusive lock may unlink
the file, and whoever had it open already notices that and opens the new one. The kernel releases a lock
when the last descriptor of its open file is closed, at the latest with the death of its holders.
"""

from __future__ import annotations

import fcntl
import os
import random
from pathlib import Path

import anyio

from flowagent.errors import SourceCacheError

SHARED, EXCLUSIVE = fcntl.LOCK_SH, fcntl.LOCK_EX


def try_lock(path: Path, kind: int) -> int | None:
    """A descriptor that holds the lock, or None if it is not free. The file is created if needed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            if _current(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


async def lock(path: Path, kind: int, timeout: float) -> int:
    """Wait for a lock, at most ``timeout`` seconds. :raises SourceCacheError: it was not free in time."""
    pause = 0.002
    with anyio.move_on_after(timeout):
        while (descriptor := try_lock(path, kind)) is None:
            await anyio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
            pause = min(pause * 2, 0.25)
        return descriptor
    raise SourceCacheError(
        f"lock {path} was not free within {timeout:g} s; see which process holds it with: fuser -v {path}"
    )


def try_lock_directory(path: Path) -> int | None:
    """A descriptor that holds the lock of a directory itself; None if it is not free, or not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _current(descriptor, path):
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _current(descriptor: int, path: Path) -> bool:
    ours = os.fstat(descriptor)
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)


def held(path: Path) -> bool:
    """Whether anybody holds a lock on the file; it is not created for that."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False

"""Care for the mirrors that backends keep between sources: what there is, and what may go.

What a mirror holds is its backend's business. Here it is a directory ``<key>.git`` whose lock file says by
its times when it was last used, and whose ``description`` says of what it is.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flowagent import locks
from flowagent.errors import SourceCacheError
from flowagent.sources import collection, trees
from flowagent.sources.entries import TEMPORARY

SUFFIX = ".git"


@dataclass(frozen=True)
class MirrorEntry:
    """A mirror, as ``flowagent cache ls`` shows it."""

    key: str
    what: str
    bytes: int
    last_used: float
    in_use: bool


def entries(root: Path) -> list[MirrorEntry]:
    """All mirrors below ``root``, least recently used first."""
    found = [_entry(path) for path in root.glob(f"*{SUFFIX}") if path.is_dir()] if root.is_dir() else []
    return sorted(found, key=lambda entry: entry.last_used)


def prune(root: Path, max_bytes: int | None, max_age: float | None) -> list[MirrorEntry]:
    """Remove mirrors that nobody works in, least recently used first, and say which: those not used for
    ``max_age`` seconds, then as many as it takes to stay within ``max_bytes``.

    :raises SourceCacheError: one cannot be taken out."""
    known = entries(root)
    total = sum(entry.bytes for entry in known)
    removed = []
    for entry in known:
        old = max_age is not None and time.time() - entry.last_used > max_age
        if not old and (max_bytes is None or total <= max_bytes):
            break  # all that follow were used later still
        if _collect(root, entry.key):
            removed.append(entry)
            total -= entry.bytes
    sweep(root)
    return removed


def sweep(root: Path) -> int:
    """Remove what killed processes left of mirrors, made or removed by half; how many."""
    if not root.is_dir():
        return 0
    left = list(root.glob(f"{TEMPORARY}*"))
    return sum(not _worked_at(path) and collection.swept(path) for path in left)


def _worked_at(left: Path) -> bool:
    """Whether somebody holds the lock of the mirror that ``.tmp-<key>-<random>`` is of.

    Who makes one takes that lock first, and the lock of the directory itself only when it is there."""
    key = left.name.removeprefix(TEMPORARY).partition("-")[0]
    try:
        return locks.held(left.with_name(f"{key}.lock"))
    except OSError:
        return True  # nobody can tell


def _entry(path: Path) -> MirrorEntry:
    lock = path.with_suffix(".lock")
    what = ""
    with suppress(OSError, UnicodeError):
        what = (path / "description").read_text("utf-8").strip()
    size, last_used = 0, 0.0
    for parent, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(parent, name)).st_size
    with suppress(OSError):
        last_used = lock.stat().st_mtime
    return MirrorEntry(path.stem, what, size, last_used, locks.held(lock))


def _collect(root: Path, key: str) -> bool:
    """False: it is in use."""
    path = root / f"{key}.lock"
    lock = locks.try_lock(path, locks.EXCLUSIVE)
    if lock is None:
        return False
    # a new name each time: something may be left at an old one
    taken = root / f"{TEMPORARY}{key}-{secrets.token_hex(8)}"
    try:
        with suppress(FileNotFoundError):
            os.rename(root / f"{key}{SUFFIX}", taken)
        path.unlink(missing_ok=True)  # who has it open finds out that it is not the one that is named
    except OSError as error:
        raise SourceCacheError(
            f"mirror {root / key}{SUFFIX} cannot be removed: {error.strerror}; remove it by hand"
        ) from error
    finally:
        os.close(lock)
    with suppress(OSError):
        trees.remove(taken)
    return True

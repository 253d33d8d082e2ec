"""What leaves the cache: the least recently used, what is broken, and what crashed processes left."""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

from flowagent import locks
from flowagent.errors import SourceCacheError
from flowagent.sources import trees
from flowagent.sources.entries import TEMPORARY, CacheEntry, Place, places


def entries(root: Path) -> list[CacheEntry]:
    """All sources, least recently used first."""
    found = []
    for place in places(root):
        manifest = place.manifest()
        if manifest is not None:
            found.append(
                CacheEntry(
                    key=place.key,
                    backend=manifest.backend,
                    revision=manifest.revision,
                    bytes=manifest.bytes,
                    files=manifest.files,
                    created=manifest.created,
                    last_used=place.last_used(manifest),
                    in_use=locks.held(place.lease),
                )
            )
    return sorted(found, key=lambda entry: entry.last_used)


def prune(root: Path, max_bytes: int | None, max_age: float | None, keep: int) -> list[CacheEntry]:
    """Remove unused sources by age, then by size; the ``keep`` most recently used are spared. What a program
    that outlived its agent for a moment was still writing goes, too."""
    found = entries(root)
    total = sum(entry.bytes for entry in found)
    oldest = -float("inf") if max_age is None else time.time() - max_age
    removed = []
    for entry in found[: max(len(found) - keep, 0)]:
        if entry.last_used >= oldest and (max_bytes is None or total <= max_bytes):
            break  # all that follow were used later still
        if _collect(Place(root, entry.key)):
            removed.append(entry)
            total -= entry.bytes
    sweep(root)
    return removed


def verify(root: Path) -> list[CacheEntry]:
    """Discard what is not what was published, and say which."""
    known = {entry.key: entry for entry in entries(root)}
    broken = []
    for place in places(root):
        manifest = place.manifest()
        if manifest is not None and place.whole(manifest):
            continue
        lock = locks.try_lock(place.lock, locks.EXCLUSIVE)
        if lock is None:
            continue  # another process is at it
        try:
            manifest = place.manifest()  # it may have been replaced since
            if manifest is None or not place.whole(manifest):
                discard(place)
                broken.append(known.get(place.key, _unreadable(place)))
        finally:
            os.close(lock)
    return broken


def sweep(root: Path) -> int:
    """Remove what no live process has locked; how many. What cannot be removed stays for the next time."""
    with os.scandir(root) as found:
        left = [root / entry.name for entry in found if entry.name.startswith(TEMPORARY)]
    return sum(swept(path) for path in left)


def swept(path: Path) -> bool:
    """Remove one of them; False: a live process has it, or it stays for the next time."""
    with suppress(OSError):
        lock = locks.try_lock_directory(path)
        if lock is not None:
            try:
                trees.remove(path)
                return True
            finally:
                os.close(lock)
    return False


def discard(place: Place) -> None:
    """Take a source out of the cache, whoever uses it. The caller holds its lock."""
    _remove(_take_out(place))


def _collect(place: Place) -> bool:
    """Take an unused source out of the cache with its lock files; False: it is in use."""
    lock = locks.try_lock(place.lock, locks.EXCLUSIVE)
    if lock is None:
        return False
    try:
        lease = locks.try_lock(place.lease, locks.EXCLUSIVE)
        if lease is None:
            return False
        try:
            taken = _take_out(place)
            # who has them open finds out that they are not the ones that the path names (see locks)
            for path in (place.lease, place.lock):
                path.unlink(missing_ok=True)
        finally:
            os.close(lease)
    finally:
        os.close(lock)
    _remove(taken)
    return True


def _take_out(place: Place) -> Path:
    taken = place.root / f"{TEMPORARY}{secrets.token_hex(8)}"
    with suppress(FileNotFoundError):
        os.rename(place.directory, taken)
    return taken


def _remove(path: Path) -> None:
    try:
        trees.remove(path)
    except OSError as error:
        raise SourceCacheError(f"{path} cannot be removed: {error.strerror}; remove it by hand") from error


def _unreadable(place: Place) -> CacheEntry:
    return CacheEntry(place.key, "unknown", "unknown", 0, 0, 0.0, 0.0, False)

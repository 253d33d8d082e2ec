"""The disk guard: an agent takes nothing new while a disk that it writes to is nearly full.

It also keeps the cache of sources and mirrors within its limits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import anyio

from flowagent.daemon.log import Log
from flowagent.errors import SourceCacheError
from flowagent.runtime.limits import size
from flowagent.sources.upkeep import Removed, Upkeep

LOOK_EVERY = 5.0
"""Seconds that an answer holds for."""
PRUNE_EVERY = 60.0
MARGIN = 1.1
"""Pruning makes room for so many times the reserve, so that it is not needed again at once."""


class DiskGuard:
    """Watches where an agent writes. ``reserve``: bytes that have to be free on each directory's disk."""

    def __init__(
        self,
        directories: Sequence[Path],
        reserve: int,
        cache: Upkeep,
        log: Log,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.reserve = reserve
        self.low: str | None = None
        """What there is too little of, in words; None: there is room."""
        self._directories = directories
        self._cache = cache
        self._log = log
        self._clock = clock
        self._looked = self._pruned = -float("inf")

    async def room(self) -> bool:
        """Whether there is room for new runs; unused sources, then unused mirrors, go to make it."""
        now = self._clock()
        if now - self._looked < LOOK_EVERY:
            return self.low is None
        self._looked = now
        low = self._shortage()
        if low is not None and now - self._pruned >= PRUNE_EVERY:
            self._pruned = now
            await self._prune()
            low = self._shortage()
        if low is not None and self.low is None:
            self._log.warning("nothing new is taken: a disk is nearly full", disk=low)
        elif low is None and self.low is not None:
            self._log.info("there is room on the disks again: runs are taken")
        self.low = low
        return low is None

    def free(self) -> dict[str, int]:
        """Free bytes by directory, as far as they can be had."""
        found = {}
        for directory in self._directories:
            if (free := _free(directory)) is not None:
                found[str(directory)] = free
        return found

    async def keep(self, max_bytes: int | None, max_age: float | None) -> None:
        """Remove from the cache what is beyond its limits and used by nobody. ``max_age``: seconds."""
        if max_bytes is None and max_age is None:
            return
        removed = await self._removed(lambda: self._cache.prune(max_bytes, max_age))
        if removed is not None and (removed.sources or removed.mirrors):
            self._log.info("kept the source cache within its limits", **_counts(removed))

    def _shortage(self) -> str | None:
        for directory, free in self.free().items():
            if free < self.reserve:
                return f"{size(free)} are free at {directory}, and {size(self.reserve)} are to be"
        return None

    async def _prune(self) -> None:
        free = _free(self._cache.sources)
        if free is None or free >= self.reserve:
            return  # it is on another disk: the one that is nearly full would gain nothing
        removed = await self._removed(partial(self._make_room, int(self.reserve * MARGIN - free)))
        if removed is not None and removed.bytes:
            self._log.warning("pruned the source cache", **_counts(removed))

    def _make_room(self, missing: int) -> Removed:
        return self._cache.prune(max(0, self._cache.bytes() - missing), None)

    async def _removed(self, prune: Callable[[], Removed]) -> Removed | None:
        """What was removed; None: it failed."""
        try:
            return await anyio.to_thread.run_sync(prune)
        except (OSError, SourceCacheError) as error:
            self._log.warning("the source cache cannot be pruned", error=str(error))
            return None


def _free(directory: Path) -> int | None:
    """Free bytes on the disk of a directory; None: that cannot be had."""
    try:
        status = os.statvfs(directory)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _counts(removed: Removed) -> dict[str, object]:
    return {
        "sources": len(removed.sources),
        "mirrors": len(removed.mirrors),
        "freed": size(removed.bytes),
    }

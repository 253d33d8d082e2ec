"""The disk guard: an agent takes nothing new while a disk that it writes to is nearly full."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio

from flowagent.daemon.log import Log
from flowagent.errors import SourceCacheError
from flowagent.runtime.limits import size
from flowagent.sources import SourceCache

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
        sources: SourceCache,
        log: Log,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.reserve = reserve
        self.low: str | None = None
        """What there is too little of, in words; None: there is room."""
        self._directories = directories
        self._sources = sources
        self._log = log
        self._clock = clock
        self._looked = self._pruned = -float("inf")

    async def room(self) -> bool:
        """Whether there is room for new runs; unused sources go to make it."""
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
            try:
                status = os.statvfs(directory)
            except OSError:
                continue
            found[str(directory)] = status.f_bavail * status.f_frsize
        return found

    def _shortage(self) -> str | None:
        for directory, free in self.free().items():
            if free < self.reserve:
                return f"{size(free)} are free at {directory}, and {size(self.reserve)} are to be"
        return None

    async def _prune(self) -> None:
        missing = max(self.reserve * MARGIN - free for free in self.free().values())
        try:
            total = sum(entry.bytes for entry in await self._sources.entries())
            removed = await self._sources.prune(max_bytes=max(0, int(total - missing)))
        except (OSError, SourceCacheError) as error:
            self._log.warning("the source cache cannot be pruned", error=str(error))
            return
        freed = sum(entry.bytes for entry in removed)
        self._log.warning("pruned the source cache", sources=len(removed), freed=size(freed))
        await anyio.lowlevel.checkpoint()

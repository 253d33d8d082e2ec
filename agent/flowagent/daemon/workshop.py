"""Run directories are made and removed here, in a thread of its own.

On a file system with a journal that takes longer than all else that an agent does for a run, and most of it
is waiting. A few are made ahead, so that an attempt takes one by a single rename.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import anyio

from flowagent.daemon.log import Log
from flowagent.runtime.rundir import RunDirectory

SPARE = ".spare-"
"""With what the names of directories begin that no attempt has taken yet."""
MOST_SPARES = 8


class Workshop:
    """That of one agent, for the directory ``runs`` of its own."""

    def __init__(self, runs: Path, spares: int, log: Log) -> None:
        """``spares``: how many directories are kept ready, as many as attempts may begin at the same time."""
        self._prefix = f"{runs}/{SPARE}{os.urandom(4).hex()}-"  # one that left may still be at work here
        self._most = min(spares, MOST_SPARES)
        self._log = log
        self._made = 0
        self._spares: deque[RunDirectory] = deque()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._left = False
        self._closed = anyio.Event()

    async def run(self) -> None:
        """Work until closed, or cancelled: what is not removed by then the next agent of this name finds."""
        self._jobs.put(self._make_spares)
        try:
            await anyio.to_thread.run_sync(
                self._serve, limiter=anyio.CapacityLimiter(1), abandon_on_cancel=True
            )
        finally:
            self._left = True
            self._jobs.put(None)
            self._closed.set()

    async def close(self) -> None:
        """Wait until all is removed that was to be, and the spare directories as well."""
        self._jobs.put(None)
        await self._closed.wait()

    def make(self, run: RunDirectory) -> None:
        """Make the directory of an attempt. :raises OSError: it cannot be made."""
        if self._spares:
            spare = self._spares.popleft()
            try:
                os.rename(spare.path, run.path)
            except OSError:  # somebody tidied up here
                self.remove(spare)
                run.make()
        else:  # more begin at once than there are
            run.make()
        self._jobs.put(self._make_spares)

    def remove(self, run: RunDirectory) -> None:
        """Remove it soon, whatever is in it."""
        self._jobs.put(run.remove)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None and not self._left:
            try:
                job()
            except Exception:
                self._log.exception("a run directory could not be made or removed")
        if not self._left:
            for spare in self._spares:
                spare.remove()

    def _make_spares(self) -> None:
        while len(self._spares) < self._most and not self._left:
            self._made += 1
            spare = RunDirectory(f"{self._prefix}{self._made}")
            try:
                spare.make()
            except OSError:  # the attempt that would have taken it meets the same, and says it
                spare.remove()
                return
            self._spares.append(spare)

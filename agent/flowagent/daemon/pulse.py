"""The pulse of an agent: what its loops wait for and since when, and how late the event loop is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio

STALL = 30.0
"""Seconds after which a call that has neither returned nor failed counts as stalled."""
LATE = 5.0
"""Seconds of loop lag from which on the agent is not alive in any useful sense."""
LOOK_EVERY = 1.0
"""Seconds between two measurements of the lag."""


class Pulse:
    """Times are seconds by the monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._under_way: dict[str, tuple[float, float]] = {}
        self.lag = 0.0
        """Seconds by which the event loop was late when that was measured last."""

    @contextmanager
    def during(self, what: str, patience: float = 0.0) -> Iterator[None]:
        """Something that is to come back, and that an agent does one of at a time. ``patience``: seconds that
        it is known to take."""
        self._under_way[what] = self._clock(), patience
        try:
            yield
        finally:
            del self._under_way[what]

    def stalled(self, limit: float = STALL) -> list[str]:
        """What has been under way for more than ``limit`` seconds, and longer than it is known to take."""
        now = self._clock()
        return [what for what, (began, own) in self._under_way.items() if now - began > max(limit, own)]

    async def measure(self, observe: Callable[[float], None] | None = None) -> None:
        """Measure the event loop's lag until cancelled."""
        while True:
            asked = self._clock()
            await anyio.sleep(LOOK_EVERY)
            self.lag = max(0.0, self._clock() - asked - LOOK_EVERY)
            if observe is not None:
                observe(self.lag)

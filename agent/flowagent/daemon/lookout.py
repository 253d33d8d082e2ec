"""The lookout: looks for new output of all attempts, so that none needs a task and a clock of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskGroup

from flowagent.daemon.shipping import Shipper

FIRST_LOOK = 0.02
"""Seconds after the start when output is looked for first, and between looks at the least; the pause of an
attempt doubles while it has none."""
LONGEST_LOOK = 0.25


@dataclass(eq=False)
class _Watched:
    shipper: Shipper
    due: float
    pause: float = FIRST_LOOK
    shipping: anyio.Event | None = None  # set at the end of what is under way
    error: Exception | None = None
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)


class Lookout:
    """Ships output while it is written. One for all attempts of an agent."""

    def __init__(self) -> None:
        self._watched: set[_Watched] = set()
        self._nap = anyio.CancelScope()

    @contextmanager
    def watching(self, shipper: Shipper) -> Iterator[_Watched]:
        """Ship an attempt's output for as long as the context is open; it is left when that fails.

        Afterwards :func:`rest` says how it went."""
        watched = _Watched(shipper, anyio.current_time() + FIRST_LOOK)
        self._watched.add(watched)
        self._nap.deadline = min(self._nap.deadline, watched.due)
        try:
            with watched.scope:
                yield watched
        finally:
            self._watched.discard(watched)

    async def run(self) -> None:
        """Look and ship until cancelled."""
        async with anyio.create_task_group() as tasks:
            while True:
                self._look(tasks)
                soonest = min((each.due for each in self._watched), default=math.inf)
                self._nap = anyio.CancelScope(deadline=max(soonest, anyio.current_time() + FIRST_LOOK))
                with self._nap:
                    await anyio.sleep_forever()

    def _look(self, tasks: TaskGroup) -> None:
        now = anyio.current_time()
        for each in self._watched:
            if each.due > now:
                continue
            if each.shipper.behind():
                each.due = math.inf
                each.shipping = anyio.Event()
                tasks.start_soon(self._ship, each, each.shipping)
            else:
                each.pause = min(LONGEST_LOOK, each.pause * 2)
                each.due = now + each.pause

    async def _ship(self, watched: _Watched, done: anyio.Event) -> None:
        try:
            shipped = await watched.shipper.pump()
            watched.pause = FIRST_LOOK if shipped else min(LONGEST_LOOK, watched.pause * 2)
            watched.due = anyio.current_time() + watched.pause
            self._nap.deadline = min(self._nap.deadline, watched.due)
        except Exception as error:  # of this attempt only
            watched.error = error
            watched.scope.cancel()
        finally:
            watched.shipping = None
            done.set()


async def rest(watched: _Watched) -> None:
    """Wait until nothing is under way any more. Raises what went wrong."""
    if watched.shipping is not None:
        await watched.shipping.wait()
    if watched.error is not None:
        raise watched.error

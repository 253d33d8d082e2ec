"""A thread that calls functions for coroutines, one after the other."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import anyio

from flowagent.errors import StoreError

Outcome = tuple[Any, BaseException | None]
"""What a function returned, or raised."""


class _Job(NamedTuple):
    function: Callable[[], Any]
    done: Callable[[Outcome], None]
    loop: asyncio.AbstractEventLoop


class Worker:
    """Calls functions in the order in which they come; ``finish`` last, when it is closed."""

    def __init__(self, name: str, finish: Callable[[], None]) -> None:
        self._finish = finish
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(
        self,
        function: Callable[[], Any],
        done: Callable[[Outcome], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Have a function called; ``loop`` then calls ``done`` with its outcome."""
        self._queue.put(_Job(function, done, loop))

    async def run(self, function: Callable[[], Any]) -> Any:
        """What a function returns. Cancelled, it is called all the same."""
        if self._closed:
            raise StoreError("the store has been closed")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self.submit(function, lambda outcome: settle(answer, outcome), loop)
        return await answer

    async def close(self) -> None:
        """Call what is queued and end the thread."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._thread.join)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                outcome: Outcome = job.function(), None
            except BaseException as error:
                outcome = None, error
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                job.loop.call_soon_threadsafe(job.done, outcome)
            del job, outcome  # they may be large, and the next one far away
        self._finish()


def settle(answer: asyncio.Future[Any], outcome: Outcome) -> None:
    """Answer whoever waits, if anybody does."""
    result, error = outcome
    if answer.cancelled():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)

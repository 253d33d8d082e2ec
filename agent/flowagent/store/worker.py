"""A thread that serves the operations of coroutines, as many at once as are waiting."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import anyio

from flowagent.errors import StoreError
from flowagent.store.database import Transaction

_BATCH = 512

Operation = Callable[[Transaction], Any]
Outcome = tuple[Any, BaseException | None]
"""What an operation returned, or raised."""


class _Job(NamedTuple):
    operation: Operation
    answer: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


class Worker:
    """Hands operations, in the order in which they come, to ``serve``, which answers with their outcomes.

    ``finish`` is called in the thread when all has been served and the worker is closed."""

    def __init__(
        self, name: str, serve: Callable[[list[Operation]], list[Outcome]], finish: Callable[[], None]
    ) -> None:
        self._serve = serve
        self._finish = finish
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def run(self, operation: Operation) -> Any:
        if self._closed:
            raise StoreError("the store has been closed")
        loop = asyncio.get_running_loop()
        job = _Job(operation, loop.create_future(), loop)
        self._queue.put(job)
        return await job.answer

    async def close(self) -> None:
        """Serve what is queued and end the thread."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._thread.join)

    def _run(self) -> None:
        for jobs in self._batches():
            outcomes = self._serve([job.operation for job in jobs])
            for loop in {job.loop for job in jobs}:
                answers = [each for each in zip(jobs, outcomes, strict=True) if each[0].loop is loop]
                with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                    loop.call_soon_threadsafe(_answer, answers)
            del jobs, outcomes, answers  # they may be large, and the next batch far away
        self._finish()

    def _batches(self) -> Iterator[list[_Job]]:
        while (job := self._queue.get()) is not None:
            jobs = [job]
            with suppress(queue.Empty):
                while len(jobs) < _BATCH and (job := self._queue.get_nowait()) is not None:
                    jobs.append(job)
            if job is None:
                self._queue.put(None)  # the end: after these
            yield jobs
            del jobs


def _answer(answers: list[tuple[_Job, Outcome]]) -> None:
    for job, (result, error) in answers:
        if job.answer.cancelled():
            continue
        if error is None:
            job.answer.set_result(result)
        else:
            job.answer.set_exception(error)

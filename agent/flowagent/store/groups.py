"""Group commit: what is asked for while a transaction is on its way to the disk goes into the next one.

Statements are executed where they are asked for, in the event loop: they take microseconds, and a thread
beside it would have to take turns with it for the interpreter's lock at every one of them. A thread does what
waits: for the disk at a commit, and for another process that is writing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import anyio

from flowagent.errors import StoreError
from flowagent.store.database import Transaction
from flowagent.store.worker import Outcome, Worker, settle

MOST = 512
"""Operations in one transaction."""

Operation = Callable[[Transaction], Any]


class Executed(NamedTuple):
    """What became of a group, if it is committed."""

    outcomes: list[Outcome]  # of each operation, in order
    topics: frozenset[str]  # to be rung then
    changed: bool  # whether there is anything to be written


class Connection(Protocol):
    """What groups are written to: by one thread at a time, though not always the same."""

    def begin(self, wait: bool) -> bool:
        """Begin a transaction; False: another process is writing, and it was not to wait for that."""
        ...

    def execute(self, operations: Sequence[Operation]) -> Executed:
        """Run the operations. Raises, with all undone, only what concerns every one of them."""
        ...

    def commit(self) -> None:
        """Write it to the disk. Raises, with all undone, if that fails."""
        ...

    def explained(self, error: BaseException) -> BaseException: ...

    def ring(self, topics: frozenset[str]) -> None: ...

    def close(self) -> None: ...


class _Job(NamedTuple):
    operation: Operation
    answer: asyncio.Future[Any]


class Groups:
    """Runs the operations of one event loop's coroutines, in the order in which they come."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._worker = Worker("store-writer", connection.close)
        self._waiting: list[_Job] = []
        self._busy = False
        self._closed = False
        self._idle = anyio.Event()

    async def run(self, operation: Operation) -> Any:
        """What an operation returns, once it is committed."""
        if self._closed:
            raise StoreError("the store has been closed")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._waiting.append(_Job(operation, answer))
        if not self._busy:
            self._busy = True
            loop.call_soon(self._begin, loop)  # then with all that is asked for in this turn of the loop
        return await answer

    async def close(self) -> None:
        """Commit what was asked for, and end the thread."""
        self._closed = True
        with anyio.CancelScope(shield=True):
            if self._busy:
                await self._idle.wait()
            await self._worker.close()

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        jobs, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
        operations = [job.operation for job in jobs]

        def done(outcome: Outcome) -> None:
            self._end(jobs, outcome, loop)

        try:
            if not self._connection.begin(wait=False):
                self._worker.submit(lambda: self._execute_patiently(operations), done, loop)
                return
            executed = self._connection.execute(operations)
            if executed.changed:
                self._worker.submit(lambda: self._commit(executed), done, loop)
                return
            outcome: Outcome = self._commit(executed), None
        except BaseException as error:
            outcome = None, error
        done(outcome)

    def _execute_patiently(self, operations: Sequence[Operation]) -> Executed:
        self._connection.begin(wait=True)
        return self._commit(self._connection.execute(operations))

    def _commit(self, executed: Executed) -> Executed:
        self._connection.commit()
        return executed

    def _end(self, jobs: list[_Job], outcome: Outcome, loop: asyncio.AbstractEventLoop) -> None:
        executed, error = outcome
        if error is None:
            self._connection.ring(executed.topics)
            for job, each in zip(jobs, executed.outcomes, strict=True):
                settle(job.answer, each)
        else:
            for job in jobs:
                settle(job.answer, (None, self._connection.explained(error)))
        if self._waiting:
            loop.call_soon(self._begin, loop)  # after those who were just answered have asked for more
            return
        self._busy = False
        if self._closed:
            self._idle.set()

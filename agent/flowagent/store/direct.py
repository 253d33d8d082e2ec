"""The store on SQLite for one caller that waits for each answer: no event loop, no threads.

A command asks the store a few things and ends. To import asyncio and anyio for that would take it longer than
all the rest of its work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

from flowagent.store.contention import ERRORS, explain, patiently
from flowagent.store.database import READ_VERSION, Transaction
from flowagent.store.protocol import Doorbell
from flowagent.store.sqlite_file import DIALECT, SQLiteTransaction, connect, prepare

T = TypeVar("T")


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that awaits nothing but a :class:`DirectDatabase`, and so never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise RuntimeError("this waits for something, and needs an event loop")


class DirectDatabase:
    """A store's file, open. Its coroutines do what they are asked at once, in the caller's thread."""

    dialect = DIALECT

    def __init__(self, url: str, path: Path, *, create: bool = True) -> None:
        """Open the file, creating or upgrading it if allowed. :raises StoreError: it cannot be used."""
        self.url = url
        self.commits = 0
        self._path = path
        try:
            prepare(path, create)
            self._connection = connect(path, 0)  # waiting is done here: see patiently
        except ERRORS as error:
            raise explain(path, error) from error

    async def close(self) -> None:
        self._connection.close()

    async def write(self, operation: Callable[[Transaction], T]) -> T:
        result, topics = self._patiently("BEGIN IMMEDIATE", operation)
        self.commits += 1
        await self.ring(topics)
        return result

    async def read(self, operation: Callable[[Transaction], T]) -> T:
        return self._patiently("BEGIN", operation)[0]  # all its statements see one state of the database

    def _patiently(self, begin: str, operation: Callable[[Transaction], T]) -> tuple[T, list[str]]:
        done: list[tuple[T, list[str]]] = []
        try:
            patiently(lambda: done.append(self._transact(begin, operation)))
        except ERRORS as error:
            raise explain(self._path, error) from error
        return done[0]

    def _transact(self, begin: str, operation: Callable[[Transaction], T]) -> tuple[T, list[str]]:
        tx = SQLiteTransaction(self._connection, time.time())
        self._connection.execute(begin)
        try:
            result = operation(tx)
            self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        return result, sorted(tx.topics)

    async def check(self) -> None:
        await self.read(lambda tx: tx.execute(READ_VERSION))

    async def ring(self, topics: Sequence[str]) -> None:
        if topics:
            from flowagent.store.bells import Bells

            Bells(self._path.with_name(self._path.name + ".bells")).ring(topics)

    def doorbell(self, topics: Sequence[str]) -> AbstractAsyncContextManager[Doorbell]:
        raise RuntimeError("to wait for a doorbell needs an event loop: use open_store")

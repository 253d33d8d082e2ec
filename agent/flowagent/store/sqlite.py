"""The store on SQLite: one thread that writes, in group commits, and one that reads.

Everything queued while a transaction was being committed goes into the next one, each operation in a
savepoint of its own; callers are answered after the commit. Other processes write the same file likewise.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio

from flowagent.errors import StoreError
from flowagent.store.bells import Bells
from flowagent.store.contention import ERRORS, PATIENCE, explain, explained, patiently
from flowagent.store.database import READ_VERSION, Transaction
from flowagent.store.protocol import Doorbell
from flowagent.store.sqlite_file import DIALECT, SQLiteTransaction, connect, identity, prepare
from flowagent.store.worker import Operation, Outcome, Worker

T = TypeVar("T")


class SQLiteDatabase:
    """A store's file, open. ``connections`` are one to write and one to read."""

    dialect = DIALECT

    def __init__(
        self,
        url: str,
        path: Path,
        connections: tuple[sqlite3.Connection, sqlite3.Connection],
        clock: Callable[[], float],
    ) -> None:
        self.url = url
        self.commits = 0
        self._path = path
        self._identity = identity(path)
        self._clock = clock
        self._bells = Bells(path.with_name(path.name + ".bells"))
        self._writing, self._reading = connections
        self._writer = Worker("store-writer", self._serve_writes, self._writing.close)
        self._reader = Worker("store-reader", self._serve_reads, self._reading.close)

    @classmethod
    async def open(
        cls, url: str, path: Path, *, create: bool = True, clock: Callable[[], float] = time.time
    ) -> SQLiteDatabase:
        """Open the file, creating or upgrading it if allowed. :raises StoreError: it cannot be used."""

        def open_file() -> SQLiteDatabase:
            try:
                return cls(url, path, _connections(path, create), clock)
            except ERRORS as error:
                raise explain(path, error) from error

        return await anyio.to_thread.run_sync(open_file)

    async def close(self) -> None:
        await self._reader.close()
        await self._writer.close()

    async def write(self, operation: Callable[[Transaction], T]) -> T:
        with anyio.CancelScope(shield=True):
            result: T = await self._writer.run(operation)
        return result

    async def read(self, operation: Callable[[Transaction], T]) -> T:
        result: T = await self._reader.run(operation)
        return result

    async def check(self) -> None:
        await self.read(self._check)

    def _check(self, tx: Transaction) -> None:
        tx.execute(READ_VERSION)
        if identity(self._path) != self._identity:
            raise StoreError(f"the store {self._path} was replaced by another file; restart what uses it")

    def doorbell(self, topics: Sequence[str]) -> AbstractAsyncContextManager[Doorbell]:
        return self._bells.listen(topics)

    async def ring(self, topics: Sequence[str]) -> None:
        self._bells.ring(topics)

    # -- in the threads ----------------------------------------------------------------------------------

    def _serve_reads(self, operations: list[Operation]) -> list[Outcome]:
        return [self._serve_read(operation) for operation in operations]

    def _serve_read(self, operation: Operation) -> Outcome:
        try:
            self._reading.execute("BEGIN")  # all its statements see one state of the database
            try:
                return operation(SQLiteTransaction(self._reading, self._clock())), None
            finally:
                if self._reading.in_transaction:
                    self._reading.execute("ROLLBACK")
        except BaseException as error:
            return None, explained(self._path, error)

    def _serve_writes(self, operations: list[Operation]) -> list[Outcome]:
        topics: set[str] = set()
        try:
            outcomes = self._group_commit(operations, topics)
        except BaseException as error:
            return [(None, explained(self._path, error)) for _ in operations]
        if topics:
            self._bells.ring(topics)
        return outcomes

    def _group_commit(self, operations: list[Operation], topics: set[str]) -> list[Outcome]:
        patiently(partial(self._writing.execute, "BEGIN IMMEDIATE"))
        try:
            if len(operations) == 1:
                outcomes = [self._run(operations[0], topics)]
            else:
                outcomes = [self._run_apart(operation, topics) for operation in operations]
            self._writing.execute("COMMIT")
        except BaseException:
            if self._writing.in_transaction:
                self._writing.execute("ROLLBACK")
            raise
        self.commits += 1
        return outcomes

    def _run(self, operation: Operation, topics: set[str]) -> Outcome:
        tx = SQLiteTransaction(self._writing, self._clock())
        result = operation(tx)
        topics |= tx.topics
        return result, None

    def _run_apart(self, operation: Operation, topics: set[str]) -> Outcome:
        """Run an operation that undoes only its own work if it fails."""
        self._writing.execute("SAVEPOINT operation")
        try:
            outcome = self._run(operation, topics)
        except BaseException as error:
            if not self._writing.in_transaction:
                raise  # the disk is full or broken: SQLite has undone the whole transaction
            self._writing.execute("ROLLBACK TO operation")
            outcome = None, explained(self._path, error)
        self._writing.execute("RELEASE operation")
        return outcome


def _connections(path: Path, create: bool) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    prepare(path, create)
    writing = connect(path, 0)  # the writer waits by itself: see patiently
    reading = connect(path, PATIENCE)
    reading.execute("PRAGMA query_only = ON")
    return writing, reading

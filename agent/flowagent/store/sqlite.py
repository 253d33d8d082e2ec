"""The store on SQLite: one connection that writes, in group commits, and one that reads, in a thread.

Everything asked for while a transaction was being committed goes into the next one, in which an operation
that fails undoes only its own work; callers are answered after the commit. Other processes write the same
file likewise.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeVar

import anyio

from flowagent.errors import StoreError
from flowagent.store.bells import Bells
from flowagent.store.contention import ERRORS, PATIENCE, busy, explain, explained, patiently
from flowagent.store.database import READ_VERSION, Transaction
from flowagent.store.groups import Executed, Groups, Operation
from flowagent.store.protocol import Doorbell
from flowagent.store.sqlite_file import DIALECT, SQLiteTransaction, connect, identity, prepare
from flowagent.store.worker import Outcome, Worker

T = TypeVar("T")


class _Writing:
    """Implements :class:`~flowagent.store.groups.Connection`."""

    def __init__(self, path: Path, connection: sqlite3.Connection, clock: Callable[[], float]) -> None:
        self._path = path
        self._connection = connection
        self._clock = clock
        self._bells = Bells(path.with_name(path.name + ".bells"))
        self.listen = self._bells.listen
        self.ring = self._bells.ring
        self.close = connection.close
        self.commits = 0

    def begin(self, wait: bool) -> bool:
        if wait:
            patiently(self._begin)
            return True
        try:
            self._begin()
        except sqlite3.OperationalError as error:
            if busy(error):
                return False
            raise
        return True

    def _begin(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def execute(self, operations: Sequence[Operation]) -> Executed:
        topics: set[str] = set()
        before = self._connection.total_changes
        try:
            outcomes = self._run_all(operations, topics)
        except BaseException:
            self._undo()
            raise
        return Executed(outcomes, frozenset(topics), self._connection.total_changes != before)

    def _run_all(self, operations: Sequence[Operation], topics: set[str]) -> list[Outcome]:
        if len(operations) == 1:
            return [self._run(operations[0], topics)]
        self._connection.execute("SAVEPOINT operations")
        try:
            return [self._run(operation, topics) for operation in operations]
        except BaseException:
            # One of them failed half-way, which is rare: again, each so that it undoes only its own work.
            if not self._connection.in_transaction:
                raise  # the disk is full or broken: SQLite has undone the whole transaction
            self._connection.execute("ROLLBACK TO operations")
            topics.clear()
            return [self._run_apart(operation, topics) for operation in operations]

    def commit(self) -> None:
        try:
            self._connection.execute("COMMIT")
        except BaseException:
            self._undo()
            raise
        self.commits += 1

    def _undo(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _run(self, operation: Operation, topics: set[str]) -> Outcome:
        """Raises only what leaves something to be undone."""
        before = self._connection.total_changes
        tx = SQLiteTransaction(self._connection, self._clock())
        try:
            result = operation(tx)
        except BaseException as error:
            if self._connection.total_changes != before or not self._connection.in_transaction:
                raise
            return None, self.explained(error)
        topics |= tx.topics
        return result, None

    def _run_apart(self, operation: Operation, topics: set[str]) -> Outcome:
        self._connection.execute("SAVEPOINT operation")
        try:
            outcome = self._run(operation, topics)
        except BaseException as error:
            if not self._connection.in_transaction:
                raise
            self._connection.execute("ROLLBACK TO operation")
            outcome = None, self.explained(error)
        self._connection.execute("RELEASE operation")
        return outcome

    def explained(self, error: BaseException) -> BaseException:
        return explained(self._path, error)


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
        self._path = path
        self._identity = identity(path)
        self._clock = clock
        self._reading = connections[1]
        self._writing = _Writing(path, connections[0], clock)
        self._groups = Groups(self._writing)
        self._reader = Worker("store-reader", self._reading.close)

    @classmethod
    async def open(
        cls, url: str, path: Path, *, create: bool = True, clock: Callable[[], float] = time.time
    ) -> SQLiteDatabase:
        """Open the file, creating or upgrading it if allowed. :raises StoreError: it cannot be used."""

        def open_file() -> tuple[sqlite3.Connection, sqlite3.Connection]:
            try:
                return _connections(path, create)
            except ERRORS as error:
                raise explain(path, error) from error

        return cls(url, path, await anyio.to_thread.run_sync(open_file), clock)

    @property
    def commits(self) -> int:
        return self._writing.commits

    async def close(self) -> None:
        await self._reader.close()
        await self._groups.close()

    async def write(self, operation: Callable[[Transaction], T]) -> T:
        with anyio.CancelScope(shield=True):
            result: T = await self._groups.run(operation)
        return result

    async def read(self, operation: Callable[[Transaction], T]) -> T:
        result: T = await self._reader.run(lambda: self._read(operation))
        return result

    async def check(self) -> None:
        await self.read(self._check)

    def _check(self, tx: Transaction) -> None:
        tx.execute(READ_VERSION)
        if identity(self._path) != self._identity:
            raise StoreError(f"the store {self._path} was replaced by another file; restart what uses it")

    def doorbell(self, topics: Sequence[str]) -> AbstractAsyncContextManager[Doorbell]:
        return self._writing.listen(topics)

    async def ring(self, topics: Sequence[str]) -> None:
        self._writing.ring(topics)

    def _read(self, operation: Callable[[Transaction], T]) -> T:
        """In the reader's thread."""
        try:
            self._reading.execute("BEGIN")  # all its statements see one state of the database
            try:
                return operation(SQLiteTransaction(self._reading, self._clock()))
            finally:
                if self._reading.in_transaction:
                    self._reading.execute("ROLLBACK")
        except ERRORS as error:
            raise explain(self._path, error) from error


def _connections(path: Path, create: bool) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    prepare(path, create)
    writing = connect(path, 0)  # the writer waits by itself: see patiently
    reading = connect(path, PATIENCE)
    reading.execute("PRAGMA query_only = ON")
    return writing, reading

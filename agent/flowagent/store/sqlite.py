"""The store on SQLite: one connection that writes, in group commits, and one that reads, in a thread.

Everything asked for while a transaction was being committed goes into the next one, in which an operation
that fails undoes only its own work; callers are answered after the commit. Other processes write the same
file likewise.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio

from flowagent.errors import StoreError
from flowagent.store.bells import Bells
from flowagent.store.contention import ERRORS, PATIENCE, busy, explain, explained, patiently
from flowagent.store.database import (
    READ_VERSION,
    SCHEMA_VERSION,
    VERSION_TABLE,
    Dialect,
    Row,
    Transaction,
    check_upgrade,
)
from flowagent.store.groups import Executed, Groups, Operation
from flowagent.store.protocol import Doorbell
from flowagent.store.worker import Outcome, Worker

T = TypeVar("T")

DIALECT = Dialect(
    each="json_each(:items) AS item",
    locked="",
    locked_free="",
    due_runs="""
        SELECT r.id FROM json_each(:items) AS item JOIN run AS r ON r.id IN (
            SELECT head.id FROM run AS head
            WHERE head.state = 'scheduled' AND head.label_set_id = item.value AND head.due <= :now
            ORDER BY head.due, head.id LIMIT :capacity)
        ORDER BY r.due, r.id LIMIT :capacity""",
    skips=False,
    in_order=None,
)

_UPGRADE_PATIENCE = 60.0
_OLDEST = (3, 35)  # RETURNING, MATERIALIZED


class _Transaction:
    """Implements :class:`~flowagent.store.database.Transaction` on a connection."""

    dialect = DIALECT

    def __init__(self, connection: sqlite3.Connection, now: float) -> None:
        self._connection = connection
        self._now = now
        self.topics: set[str] = set()

    def execute(self, sql: str, params: Mapping[str, Any] = {}) -> list[Row]:
        return self._connection.execute(sql, {**params, "now": self._now}).fetchall()

    def execute_many(self, sql: str, params: Sequence[Mapping[str, Any]]) -> None:
        self._connection.executemany(sql, [{**each, "now": self._now} for each in params])

    def ring(self, topic: str) -> None:
        self.topics.add(topic)


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
        tx = _Transaction(self._connection, self._clock())
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
        self._identity = _identity(path)
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

        def prepare() -> tuple[sqlite3.Connection, sqlite3.Connection]:
            try:
                return _prepare(path, create)
            except ERRORS as error:
                raise explain(path, error) from error

        return cls(url, path, await anyio.to_thread.run_sync(prepare), clock)

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
        if _identity(self._path) != self._identity:
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
                return operation(_Transaction(self._reading, self._clock()))
            finally:
                if self._reading.in_transaction:
                    self._reading.execute("ROLLBACK")
        except ERRORS as error:
            raise explain(self._path, error) from error


# -- opening -------------------------------------------------------------------------------------------


def _prepare(path: Path, create: bool) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    if sqlite3.sqlite_version_info < _OLDEST:
        raise StoreError(
            f"the store needs SQLite 3.35 or newer, this Python has {sqlite3.sqlite_version}; "
            f"use another Python, or a PostgreSQL store"
        )
    if create:
        _create_file(path)
    elif not path.exists():
        raise StoreError(f"there is no store at {path}; register a flow or start an agent to make one")
    with closing(_connect(path, PATIENCE)) as connection:
        version = _version(path, connection)
    if version != SCHEMA_VERSION:
        check_upgrade(str(path), version, create)
        from flowagent.store.migrations import upgrade

        upgrade("sqlite://", partial(_connect_wal, path, _UPGRADE_PATIENCE), "BEGIN IMMEDIATE")
    writing = _connect_wal(path, 0)  # the writer waits by itself: see patiently
    reading = _connect_wal(path, PATIENCE)
    reading.execute("PRAGMA query_only = ON")
    return writing, reading


def _create_file(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # only when it is new: closing a descriptor of a file drops the locks this process has on it
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))


def _connect(path: Path, patience: float) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=patience, isolation_level=None, check_same_thread=False)


def _connect_wal(path: Path, patience: float) -> sqlite3.Connection:
    connection = _connect(path, patience)
    try:
        # SQLite does not wait by itself for others that are changing to WAL too
        patiently(partial(connection.execute, "PRAGMA journal_mode = WAL"))
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_size_limit = 67108864")  # 64 MiB
    except BaseException:
        connection.close()
        raise
    return connection


def _version(path: Path, connection: sqlite3.Connection) -> str | None:
    """The revision of the schema; None in an empty file."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables:
        return None
    if VERSION_TABLE not in tables:
        raise StoreError(f"{path} is another program's database, not a store; use another path")
    rows = connection.execute(READ_VERSION).fetchall()
    return str(rows[0][0]) if rows else None


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino

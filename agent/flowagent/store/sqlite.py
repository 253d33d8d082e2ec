"""The store on SQLite: one thread that writes, in group commits, and one that reads.

Everything queued while a transaction was being committed goes into the next one, each operation in a
savepoint of its own; callers are answered after the commit. Other processes write the same file likewise.
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

from flowagent.errors import StoreError, StoreUnavailableError
from flowagent.store.bells import Bells
from flowagent.store.database import (
    READ_VERSION,
    SCHEMA_VERSION,
    VERSION_TABLE,
    Dialect,
    Row,
    Transaction,
    check_upgrade,
)
from flowagent.store.protocol import Doorbell
from flowagent.store.worker import Operation, Outcome, Worker

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

PATIENCE = 5.0
"""Seconds to wait for another process that is writing."""

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
        self._identity = _identity(path)
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

        def prepare() -> SQLiteDatabase:
            try:
                return cls(url, path, _prepare(path, create), clock)
            except _ERRORS as error:
                raise _explain(path, error) from error

        return await anyio.to_thread.run_sync(prepare)

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
        if _identity(self._path) != self._identity:
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
                return operation(_Transaction(self._reading, self._clock())), None
            finally:
                if self._reading.in_transaction:
                    self._reading.execute("ROLLBACK")
        except BaseException as error:
            return None, self._explained(error)

    def _serve_writes(self, operations: list[Operation]) -> list[Outcome]:
        topics: set[str] = set()
        try:
            outcomes = self._group_commit(operations, topics)
        except BaseException as error:
            return [(None, self._explained(error)) for _ in operations]
        if topics:
            self._bells.ring(topics)
        return outcomes

    def _group_commit(self, operations: list[Operation], topics: set[str]) -> list[Outcome]:
        _patiently(partial(self._writing.execute, "BEGIN IMMEDIATE"))
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
        tx = _Transaction(self._writing, self._clock())
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
            outcome = None, self._explained(error)
        self._writing.execute("RELEASE operation")
        return outcome

    def _explained(self, error: BaseException) -> BaseException:
        if not isinstance(error, _ERRORS):
            return error
        explained = _explain(self._path, error)
        explained.__cause__ = error
        return explained


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
    writing = _connect_wal(path, 0)  # the writer waits by itself: see _patiently
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
        _patiently(partial(connection.execute, "PRAGMA journal_mode = WAL"))
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


# -- waiting and failing ---------------------------------------------------------------------------------


def _patiently(attempt: Callable[[], object]) -> None:
    """Try until no other process is in the way.

    SQLite's own waiting sleeps up to 100 ms between tries: too long beside a process that writes steadily."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            attempt()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.0003 + time.monotonic_ns() % 3_000_000 / 1e9)  # different for each that waits
        else:
            return


_ERRORS = (sqlite3.Error, OSError, OverflowError, UnicodeError)


def _explain(path: Path, error: BaseException) -> StoreError:
    """What an error of SQLite or of the file system means to a person, in one line."""
    if isinstance(error, OSError):
        return StoreError(f"the store {path} cannot be opened: {error.strerror}; check its path and owner")
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreUnavailableError(
            f"the store {path} is locked by another process for more than {PATIENCE:.0f} s; "
            f"see which has it open"
        )
    if code == sqlite3.SQLITE_FULL:
        return StoreUnavailableError(f"the disk of the store {path} is full; free some space")
    if code == sqlite3.SQLITE_IOERR:
        return StoreUnavailableError(f"the store {path} cannot be read or written: {error}; check its disk")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return StoreError(
            f"the store {path} cannot be written: {error}; "
            f"its file and its directory must belong to this user"
        )
    if code == sqlite3.SQLITE_NOTADB:
        return StoreError(f"{path} is not a store: it is no SQLite database; use another path")
    if code == sqlite3.SQLITE_CORRUPT:
        return StoreError(f"the store {path} is damaged: {error}; restore it from a backup")
    return StoreError(f"the store {path} refused a statement: {error}")

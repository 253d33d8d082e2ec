"""The file of a store on SQLite: opening it, creating or upgrading it, and transactions on a connection.

Imports neither asyncio nor anyio, so that commands that only ask the store something start fast.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from flowagent.errors import StoreError
from flowagent.store.contention import PATIENCE, patiently
from flowagent.store.database import READ_VERSION, SCHEMA_VERSION, VERSION_TABLE, Dialect, Row, check_upgrade

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


class SQLiteTransaction:
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


def prepare(path: Path, create: bool) -> None:
    """See to it that the file is a store with the schema of this version.

    :raises StoreError: it is not, and must not be made one. Other errors are of ``contention.ERRORS``."""
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

        upgrade("sqlite://", partial(connect, path, _UPGRADE_PATIENCE), "BEGIN IMMEDIATE")


def _create_file(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # only when it is new: closing a descriptor of a file drops the locks this process has on it
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))


def _connect(path: Path, patience: float) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=patience, isolation_level=None, check_same_thread=False)


def connect(path: Path, patience: float) -> sqlite3.Connection:
    """A connection as the store needs it. ``patience``: seconds that SQLite waits for other writers."""
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


def identity(path: Path) -> tuple[int, int]:
    """What tells the file from another one that has taken its place."""
    status = path.stat()
    return status.st_dev, status.st_ino

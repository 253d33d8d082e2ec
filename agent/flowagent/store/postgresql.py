"""The store on PostgreSQL: blocking connections in a few threads, LISTEN and NOTIFY as the doorbell.

Importing this needs psycopg, the extra ``flowagent[postgresql]``.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar
from urllib.parse import quote

import anyio
import psycopg
from psycopg.conninfo import conninfo_to_dict

from flowagent.errors import SettingsError, StoreError, StoreUnavailableError
from flowagent.store.database import READ_VERSION, SCHEMA_VERSION, Dialect, Row, Transaction, check_upgrade
from flowagent.store.notifications import Notifications, channels

T = TypeVar("T")
Connection = psycopg.Connection[Row]

DIALECT = Dialect(
    each="json_array_elements_text(CAST(:items AS json)) AS item(value)",
    locked=" FOR UPDATE",
    locked_free=" FOR UPDATE SKIP LOCKED",
    due_runs="""
        SELECT r.id FROM json_array_elements_text(CAST(:items AS json)) AS item(value)
        CROSS JOIN LATERAL (
            SELECT run.id, run.due FROM run WHERE run.state = 'scheduled'
            AND run.label_set_id = CAST(item.value AS INTEGER) AND run.due <= :now
            ORDER BY run.due, run.id LIMIT :reach) AS head
        JOIN run AS r ON r.id = head.id WHERE r.state = 'scheduled'
        ORDER BY head.due, head.id LIMIT :capacity FOR UPDATE OF r SKIP LOCKED""",
    skips=True,
    in_order="SELECT pg_advisory_xact_lock(7091305127)",
)
_UPGRADE_LOCK = "SELECT pg_advisory_xact_lock(7091305128)"

_THREADS = 4
_TRIES = 4
_DEADLINE = 40.0
"""Seconds after which a server that does not answer is given up; it limits statements to 30 by itself."""
_UPGRADE_DEADLINE = 600.0
_CONNECT: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
    "application_name": "flowagent",
}
_SESSION = """
    SELECT set_config('statement_timeout', '30s', false),
        set_config('idle_in_transaction_session_timeout', '30s', false)"""
_NOTIFY = "SELECT pg_notify(value, '') FROM json_array_elements_text(CAST(:items AS json))"


@cache
def _translated(sql: str) -> Any:
    """A statement with ``:name`` parameters as psycopg takes it."""
    now = "extract(epoch FROM now())::float8"
    return re.sub(
        r"(?<!:):([a-z_]+)",
        lambda found: now if found[1] == "now" else f"%({found[1]})s",
        sql.replace("%", "%%"),
    )


class _Transaction:
    """Implements :class:`~flowagent.store.database.Transaction` on a connection."""

    dialect = DIALECT

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.topics: set[str] = set()

    def execute(self, sql: str, params: Mapping[str, Any] = {}) -> list[Row]:
        cursor = self._connection.execute(_translated(sql), params)
        return cursor.fetchall() if cursor.description else []

    def execute_many(self, sql: str, params: Sequence[Mapping[str, Any]]) -> None:
        with self._connection.cursor() as cursor:
            cursor.executemany(_translated(sql), params)

    def ring(self, topic: str) -> None:
        self.topics.add(topic)


class PostgreSQLDatabase:
    """A database on a server, which may go away and come back."""

    dialect = DIALECT

    def __init__(self, conninfo: str) -> None:
        self.url = _without_credentials(conninfo)
        self.commits = 0
        self._conninfo = conninfo
        self._threads = ThreadPoolExecutor(_THREADS, "store")
        self._local = threading.local()
        self._lock = threading.Lock()  # guards what the threads share:
        self._connections: set[Connection] = set()
        self._unsent: set[str] = set()
        self._closed = False

    @classmethod
    async def open(cls, url: str, *, create: bool = True) -> PostgreSQLDatabase:
        """Connect, creating or upgrading the schema if allowed. :raises StoreError: it cannot be used."""
        database = cls(url)
        try:
            await database._run(lambda: database._prepare(create), _UPGRADE_DEADLINE)
        except BaseException:
            await database.close()
            raise
        return database

    def _prepare(self, create: bool) -> None:
        try:
            found = self._connection().execute(READ_VERSION).fetchall()
        except psycopg.errors.UndefinedTable:
            found = []
        version = str(found[0][0]) if found else None
        if version != SCHEMA_VERSION:
            check_upgrade(self.url, version, create)
            from flowagent.store.migrations import upgrade

            upgrade(
                "postgresql+psycopg://", lambda: psycopg.connect(self._conninfo, **_CONNECT), _UPGRADE_LOCK
            )

    async def close(self) -> None:
        self._closed = True
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(5) as patience:
                await anyio.to_thread.run_sync(self._threads.shutdown, abandon_on_cancel=True)
            if patience.cancelled_caught:  # a thread waits for a server that hangs
                self._hang_up()
                await anyio.to_thread.run_sync(self._threads.shutdown)
        for connection in self._connections:
            connection.close()

    # -- operations ------------------------------------------------------------------------------------

    async def write(self, operation: Callable[[Transaction], T]) -> T:
        with anyio.CancelScope(shield=True):
            result = await self._run(lambda: self._retried(self._write, operation))
        return result

    async def read(self, operation: Callable[[Transaction], T]) -> T:
        return await self._run(lambda: self._retried(self._read, operation))

    async def check(self) -> None:
        await self.read(lambda tx: tx.execute(READ_VERSION))

    async def ring(self, topics: Sequence[str]) -> None:
        self._notify(topics)

    def doorbell(self, topics: Sequence[str]) -> Notifications:
        return Notifications(self._connect, topics)

    async def _run(self, function: Callable[[], T], deadline: float | None = None) -> T:
        if self._closed:
            raise StoreError("the store has been closed")
        try:
            with anyio.fail_after(deadline or _DEADLINE):
                result = await asyncio.get_running_loop().run_in_executor(self._threads, function)
            return result
        except TimeoutError as error:
            self._hang_up()
            raise StoreUnavailableError(f"the store {self.url} does not answer; see its server") from error
        except psycopg.Error as error:
            raise self._explained(error) from error

    # -- in the threads ----------------------------------------------------------------------------------

    def _retried(
        self,
        run: Callable[[Connection, Callable[[Transaction], T]], T],
        operation: Callable[[Transaction], T],
    ) -> T:
        """Run a transaction, again if it certainly had no effect and may have one the next time."""
        for tries_left in reversed(range(_TRIES)):
            connection = self._connection()
            try:
                return run(connection, operation)
            except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
                if not tries_left:
                    raise
            except psycopg.OperationalError as error:
                if not connection.closed or isinstance(error.__cause__, _Committing) or not tries_left:
                    raise
        raise AssertionError

    def _read(self, connection: Connection, operation: Callable[[Transaction], T]) -> T:
        return operation(_Transaction(connection))

    def _write(self, connection: Connection, operation: Callable[[Transaction], T]) -> T:
        tx = _Transaction(connection)
        connection.execute("BEGIN")
        try:
            result = operation(tx)
        except BaseException:
            if not connection.closed:
                connection.execute("ROLLBACK")
            raise
        try:
            connection.execute("COMMIT")
        except psycopg.OperationalError as error:
            raise error from _Committing()
        with self._lock:
            self.commits += 1
        self._notify(tx.topics)
        return result

    def _connection(self) -> Connection:
        """The connection of this thread."""
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is None or connection.closed:
            with self._lock:
                self._connections.discard(connection)
            self._local.connection = connection = self._connect()
            with self._lock:
                self._connections.add(connection)
        return connection

    def _connect(self) -> Connection:
        connection = psycopg.connect(self._conninfo, autocommit=True, **_CONNECT)
        try:
            connection.execute(_SESSION)
        except BaseException:
            connection.close()
            raise
        return connection

    def _notify(self, topics: Iterable[str]) -> None:
        """Notify soon, once for all who ask: transactions that notify commit one after the other."""
        with self._lock:
            idle = not self._unsent
            self._unsent.update(channels(topics))
            if idle and self._unsent and not self._closed:
                with suppress(RuntimeError):  # shutting down
                    self._threads.submit(self._send)

    def _send(self) -> None:
        with self._lock:
            unsent, self._unsent = sorted(self._unsent), set()
        with suppress(psycopg.Error):
            _Transaction(self._connection()).execute(_NOTIFY, {"items": json.dumps(unsent)})

    def _hang_up(self) -> None:
        """Cut all connections, so that threads which wait for a server that hangs come back."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with (
                suppress(psycopg.Error, OSError),
                socket.socket(fileno=os.dup(connection.fileno())) as wire,
            ):
                wire.shutdown(socket.SHUT_RDWR)

    def _explained(self, error: psycopg.Error) -> StoreError:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
            return StoreUnavailableError(f"the store {self.url} cannot be reached or used now: {line}")
        return StoreError(f"the store {self.url} refused a statement: {line}")


class _Committing(Exception):
    """The connection was lost at a commit: nobody knows whether it took place."""


def _without_credentials(conninfo: str) -> str:
    try:
        parts = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:  # its message may quote the password
        parts = None
    # a slash in a password makes the beginning of it a port, and the rest of it a database
    if parts is None or re.search(r"[^\d,]", str(parts.get("port") or "")) or "@" in str(parts.get("dbname")):
        raise SettingsError(
            "the URL of the store is not understood; write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, "
            "with special characters as %XX"
        )
    host = quote(str(parts.get("host") or ""), safe=",:[]")
    port = f":{parts['port']}" if parts.get("port") else ""
    return f"postgresql://{host}{port}/{parts.get('dbname') or ''}"

"""What the store's operations need of a database, so that each is written once for SQLite and PostgreSQL.

An operation is a plain function of a :class:`Transaction` with textual statements in the dialect that both
understand. A database runs such functions in its threads; the few places where the dialects differ are named
in :class:`Dialect`.

In statements ``:now`` is the time by the store's clock in seconds since the epoch: the server's on
PostgreSQL, which many machines share, this machine's on SQLite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

from flowagent.errors import StoreError
from flowagent.store.protocol import Doorbell

Row = tuple[Any, ...]
T = TypeVar("T")

SCHEMA_VERSION = "0001"
"""The revision this code works with: the newest in ``migrations/versions``. Revisions sort by age."""

VERSION_TABLE = "flowagent_version"
READ_VERSION = f"SELECT version_num FROM {VERSION_TABLE}"  # noqa: S608


class Dialect(NamedTuple):
    """Where the two databases differ."""

    each: str
    """A table ``item(value)`` of the elements of the JSON array ``:items``, as text or number."""
    locked: str
    """Ends a SELECT whose rows are about to be changed."""
    locked_free: str
    """The same, leaving out rows that another transaction has locked."""
    due_runs: str
    """Ids of the ``:capacity`` first due runs of the label sets ``:items``, locked.

    ``:reach`` is how many of each set are looked at, where some can be locked by others."""
    skips: bool
    """Whether ``due_runs`` can miss runs because another transaction is looking at them."""
    in_order: str | None
    """A statement after which rows get ids in the order in which they become visible."""


class Transaction(Protocol):
    """One transaction, within one of the database's threads."""

    dialect: Dialect

    def execute(self, sql: str, params: Mapping[str, Any] = ...) -> list[Row]: ...

    def execute_many(self, sql: str, params: Sequence[Mapping[str, Any]]) -> None: ...

    def ring(self, topic: str) -> None:
        """Ring a doorbell as soon as the transaction is committed."""
        ...


class Database(Protocol):
    """A database that is open."""

    dialect: Dialect
    url: str
    """Without credentials."""

    @property
    def commits(self) -> int:
        """How many write transactions were committed; one may hold many writes."""
        ...

    async def write(self, operation: Callable[[Transaction], T]) -> T:
        """Run an operation and commit: when this returns, it is on disk.

        It is not interrupted by cancellation, so that what became of a write is always known."""
        ...

    async def read(self, operation: Callable[[Transaction], T]) -> T:
        """Run an operation that writes nothing."""
        ...

    async def check(self) -> None:
        """Raise :class:`~flowagent.errors.StoreError` unless the database answers."""
        ...

    def doorbell(self, topics: Sequence[str]) -> AbstractAsyncContextManager[Doorbell]: ...

    async def ring(self, topics: Sequence[str]) -> None: ...

    async def close(self) -> None: ...


def check_upgrade(where: str, version: str | None, allowed: bool) -> None:
    """:raises StoreError: the store has this revision, and is not to be brought to ours."""
    if version is not None and version > SCHEMA_VERSION:
        raise StoreError(
            f"the store {where} was written by a newer flowagent (its schema is {version}, "
            f"this one knows {SCHEMA_VERSION}); upgrade flowagent here"
        )
    if not allowed:
        raise StoreError(f"the store {where} is not set up for this flowagent; start an agent to upgrade it")

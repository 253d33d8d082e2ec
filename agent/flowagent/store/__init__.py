"""Registry and queue: SQLite for one machine, PostgreSQL for many."""

from __future__ import annotations

from pathlib import Path

from flowagent.errors import UsageError
from flowagent.store.database import Database
from flowagent.store.protocol import CANCEL, WORK, Doorbell, Store, progress
from flowagent.store.sql import SQLStore

__all__ = ["CANCEL", "WORK", "Doorbell", "SQLStore", "Store", "open_store", "progress"]


async def open_store(url: str, *, create: bool = True) -> SQLStore:
    """Open the store at a URL: ``sqlite:////absolute/path`` or ``postgresql://user:password@host/database``.

    ``create`` allows to make it, or to upgrade its schema, where that is due.

    :raises UsageError: the URL names no store.
    :raises StoreUnavailableError: it cannot be reached now.
    :raises StoreError: what is there cannot be used.
    """
    return SQLStore(await _open_database(url, create))


async def _open_database(url: str, create: bool) -> Database:
    scheme = url.partition("://")[0].lower()
    if scheme == "sqlite":
        from flowagent.store.sqlite import SQLiteDatabase

        return await SQLiteDatabase.open(url, _sqlite_path(url), create=create)
    if scheme in ("postgresql", "postgres"):
        try:
            from flowagent.store.postgresql import PostgreSQLDatabase
        except ImportError as error:
            raise UsageError(
                f"a store on PostgreSQL needs psycopg ({error}); install flowagent[postgresql]"
            ) from error
        return await PostgreSQLDatabase.open(url, create=create)
    if scheme in ("http", "https"):
        raise UsageError(
            "a store behind a flowagent server is not part of this version; use sqlite:/// or postgresql://"
        )
    raise UsageError("the URL of the store must begin with sqlite:/// or postgresql://")


def _sqlite_path(url: str) -> Path:
    path = url[len("sqlite:///") :]
    if not url.lower().startswith("sqlite:///") or path in ("", ":memory:") or "\0" in path:
        raise UsageError("the URL of an SQLite store names a file: sqlite:////absolute/path")
    return Path(path).absolute()

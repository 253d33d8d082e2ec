"""Registry and queue: SQLite for one machine, PostgreSQL for many."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from flowagent.errors import SettingsError
from flowagent.store.database import Database
from flowagent.store.protocol import CANCEL, WORK, Doorbell, Store, progress
from flowagent.store.sql import SQLStore

__all__ = ["CANCEL", "WORK", "Doorbell", "SQLStore", "Store", "ask", "open_store", "progress", "run"]

T = TypeVar("T")


async def open_store(url: str, *, create: bool = True) -> SQLStore:
    """Open the store at a URL: ``sqlite:////absolute/path`` or ``postgresql://user:password@host/database``.

    ``create`` allows to make it, or to upgrade its schema, where that is due.

    :raises SettingsError: the URL names no store.
    :raises StoreUnavailableError: it cannot be reached now.
    :raises StoreError: what is there cannot be used.
    """
    return SQLStore(await _open_database(url, create))


def ask(url: str, job: Callable[[Store], Coroutine[Any, Any, T]], *, create: bool = True) -> T:
    """Run a job on the store at a URL that waits for nothing but the store; errors as of :func:`open_store`.

    A store on SQLite needs no event loop for that, which is most of the start-up of a command."""
    if _scheme(url) == "sqlite":
        from flowagent.store.direct import DirectDatabase, finish

        store = SQLStore(DirectDatabase(url, _sqlite_path(url), create=create))
        try:
            return finish(job(store))
        finally:
            finish(store.close())
    return run(url, job, create=create)


def run(url: str, job: Callable[[Store], Coroutine[Any, Any, T]], *, create: bool = True) -> T:
    """Run any job on the store at a URL, in an event loop of its own; errors as of :func:`open_store`."""
    import anyio

    async def with_open_store() -> T:
        store = await open_store(url, create=create)
        try:
            return await job(store)
        finally:
            with anyio.CancelScope(shield=True):
                await store.close()

    return anyio.run(with_open_store)


async def _open_database(url: str, create: bool) -> Database:
    scheme = _scheme(url)
    if scheme == "sqlite":
        from flowagent.store.sqlite import SQLiteDatabase

        return await SQLiteDatabase.open(url, _sqlite_path(url), create=create)
    if scheme in ("postgresql", "postgres"):
        try:
            from flowagent.store.postgresql import PostgreSQLDatabase
        except ImportError as error:
            raise SettingsError(
                f"a store on PostgreSQL needs psycopg ({error}); install flowagent[postgresql]"
            ) from error
        return await PostgreSQLDatabase.open(url, create=create)
    if scheme in ("http", "https"):
        raise SettingsError(
            "a store behind a flowagent server is not part of this version; use sqlite:/// or postgresql://"
        )
    raise SettingsError("the URL of the store must begin with sqlite:/// or postgresql://")


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _sqlite_path(url: str) -> Path:
    path = url[len("sqlite:///") :]
    if not url.lower().startswith("sqlite:///") or path in ("", ":memory:") or "\0" in path:
        raise SettingsError("the URL of an SQLite store names a file: sqlite:////absolute/path")
    return Path(path).absolute()

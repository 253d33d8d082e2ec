"""Waiting for other processes that write the same SQLite file, and what its errors mean to a person."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from flowagent.errors import StoreError, StoreUnavailableError

PATIENCE = 5.0
"""Seconds to wait for another process that is writing."""


def patiently(attempt: Callable[[], object]) -> None:
    """Try until no other process is in the way.

    SQLite's own waiting sleeps up to 100 ms between tries: too long beside a process that writes steadily."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            attempt()
        except sqlite3.OperationalError as error:
            if not busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.0003 + time.monotonic_ns() % 3_000_000 / 1e9)  # different for each that waits
        else:
            return


def busy(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY


ERRORS = (sqlite3.Error, OSError, OverflowError, UnicodeError)


def explained(path: Path, error: BaseException) -> BaseException:
    if not isinstance(error, ERRORS):
        return error
    explanation = explain(path, error)
    explanation.__cause__ = error
    return explanation


def explain(path: Path, error: BaseException) -> StoreError:
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

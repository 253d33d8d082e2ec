"""The doorbell on PostgreSQL: LISTEN and NOTIFY, one channel per topic."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import anyio
import psycopg

_TOPIC = re.compile(r"[\w-]{1,50}")  # with the prefix below PostgreSQL's limit of 63 bytes


def channels(topics: Iterable[str]) -> list[str]:
    return [f"flowagent_{topic}" for topic in topics if _TOPIC.fullmatch(topic)]


class Notifications:
    """Listens on a connection of its own. Without one it only waits: polling is the fallback."""

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]], topics: Sequence[str]) -> None:
        self._connect = connect
        self._listen = "; ".join(f'LISTEN "{channel}"' for channel in channels(topics))
        self._connection: psycopg.Connection[Any] | None = None

    async def __aenter__(self) -> Notifications:
        await anyio.to_thread.run_sync(self._open)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    async def wait(self, timeout: float) -> bool:
        with anyio.move_on_after(timeout):
            if self._connection is None:
                await anyio.to_thread.run_sync(self._open)
                if self._connection is None:
                    await anyio.sleep(timeout)
                    return False
                return True  # rung for all we know
            return await self._rung(self._connection)
        return False

    async def _rung(self, connection: psycopg.Connection[Any]) -> bool:
        try:
            while not _drain(connection):
                await anyio.wait_readable(connection.fileno())
        except (psycopg.Error, OSError, ValueError):
            self._close()  # the server went away: connect again at the next wait
        return True

    def _open(self) -> None:
        with suppress(psycopg.Error, OSError):
            connection = self._connect()
            try:
                connection.execute(self._listen)
            except BaseException:
                connection.close()
                raise
            self._connection = connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _drain(connection: psycopg.Connection[Any]) -> bool:
    connection.pgconn.consume_input()
    rung = False
    while connection.pgconn.notifies():
        rung = True
    return rung

"""Waiting for a store that is away: with backoff and jitter, and a word in the log, but never giving up."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from flowagent.daemon.log import Log
from flowagent.errors import StoreUnavailableError

T = TypeVar("T")

FIRST = 0.1
LONGEST = 5.0


class Waits:
    """How often this process has found a store away, and waited for it."""

    total = 0


async def patiently(call: Callable[[], Awaitable[T]], log: Log, what: str) -> T:
    """The call's answer, however often the store has to be asked. Other errors pass through."""
    delay = FIRST
    while True:
        try:
            return await call()
        except StoreUnavailableError as error:
            Waits.total += 1
            log.warning("the store is away", doing=what, error=str(error), retry_in=round(delay, 2))
        await anyio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        delay = min(LONGEST, delay * 2)

"""The progress of long downloads, in the daemon's log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flowagent.backend import Progress
from flowagent.daemon.log import Log
from flowagent.runtime.limits import size

EVERY = 10.0
"""Seconds between lines about the same transfer; a shorter one gets none."""


def logged(log: Log, clock: Callable[[], float] = time.monotonic) -> Progress:
    """A progress that writes a line every so often, so that nobody takes a long fetch for a hang."""

    @contextmanager
    def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        began = said = clock()
        done = 0

        def advance(amount: int) -> None:
            nonlocal said, done
            done += amount
            now = clock()
            if now - said >= EVERY:
                said = now
                of = {} if total is None else {"of": size(total)}
                log.info("still at work", what=what, done=size(done), **of, seconds=round(now - began))

        yield advance

    return progress

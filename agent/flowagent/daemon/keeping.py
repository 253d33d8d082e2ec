"""Keeping: an attempt's results, put where their declarations say, while its output is shipped.

A place for results that is slow, or away for a moment, holds up neither output nor what goes elsewhere. The
file of a result stays in the run directory until the store knows what became of it, so an agent that starts
in between puts it again.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from flowagent.backend import Backends
from flowagent.daemon.log import Log
from flowagent.errors import BackendError
from flowagent.models import Json, TaskRun

AT_ONCE = 8
"""Results of an attempt that are put at the same time."""
PATIENCE = 60.0
"""Seconds after the end of a flow for which results are tried again; while it runs, they always are."""
FIRST, LONGEST = 0.5, 10.0
"""Seconds between tries."""


@dataclass(eq=False)
class Kept:
    """A result on its way. ``task``: the newest that is known of the task whose it is."""

    task: TaskRun
    declaration: Mapping[str, Json]
    key: str
    file: Path
    more: Mapping[str, Json]  # what belongs into its reference besides where it is
    reference: dict[str, Json] = field(default_factory=dict)  # what has become of it
    tries: int = 0

    @property
    def place(self) -> str:
        """What fails together."""
        return json.dumps(self.declaration, sort_keys=True)


class Keeper:
    """Of one attempt."""

    def __init__(self, tasks: TaskGroup, backends: Backends, log: Log) -> None:
        self._tasks = tasks
        self._backends = backends
        self._log = log
        self._waiting: deque[Kept] = deque()
        self._workers = 0
        self._idle = anyio.Event()
        self._failing: dict[str, str] = {}  # what places say that may think better of it
        self._until = float("inf")
        self.done: list[Kept] = []
        """Those of which is known what became of them; for the caller to take."""

    @property
    def busy(self) -> bool:
        """Whether there is any of which that is not known yet."""
        return self._workers > 0

    def add(self, result: Kept) -> None:
        """Put one, soon."""
        self._waiting.append(result)
        if self._workers < AT_ONCE:
            if not self._workers:
                self._idle = anyio.Event()
            self._workers += 1
            self._tasks.start_soon(self._work)

    async def finish(self) -> None:
        """The flow has ended: wait until all are put, or given up."""
        self._until = min(self._until, anyio.current_time() + PATIENCE)
        if self.busy:
            await self._idle.wait()

    async def _work(self) -> None:
        try:
            while self._waiting:
                await self._put(self._waiting.popleft())
        finally:
            self._workers -= 1
            if not self._workers:
                self._idle.set()

    async def _put(self, result: Kept) -> None:
        late = anyio.current_time() >= self._until
        if late and result.place in self._failing:
            self._give_up(result, self._failing[result.place])
            return
        result.tries += 1
        try:
            backend = self._backends.get(result.declaration["storage"])
            reference = await backend.put(result.declaration, result.key, result.file)
        except Exception as error:  # of a full disk, of anybody's backend: it costs the result, not the run
            said = str(error) if isinstance(error, BackendError) else f"{type(error).__name__}: {error}"
            if not (isinstance(error, BackendError) and error.retryable):
                self._give_up(result, said)
                return
            self._failing[result.place] = said
            self._waiting.append(result)
            delay = min(LONGEST, FIRST * 2 ** (result.tries - 1)) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
            delay = min(delay, max(0.0, self._until - anyio.current_time()))
            if delay:
                self._log.warning("a result cannot be written yet", task=result.task.task, error=said)
            await anyio.sleep(delay)
        else:
            self._failing.pop(result.place, None)
            result.reference = {**reference, **result.more}
            self.done.append(result)

    def _give_up(self, result: Kept, said: str) -> None:
        self._log.warning("result not written", task=result.task.task, error=said)
        result.reference = {"error": said}
        self.done.append(result)


@asynccontextmanager
async def keeping(backends: Backends, log: Log) -> AsyncIterator[Keeper]:
    """A keeper that works while the context is open. What it has not put then it leaves where it is."""
    problem: Exception | None = None
    async with anyio.create_task_group() as tasks:
        try:
            yield Keeper(tasks, backends, log)
        except Exception as error:  # as it is, not in a group
            problem = error
        tasks.cancel_scope.cancel()
    if problem is not None:
        raise problem

"""Shipping: an attempt's output and events from its run directory to the store, by byte offset.

The output file is the spool: while the store is away nothing is read, nothing is lost, and memory stays at
one piece. What was acknowledged is not sent again, also not by an agent that started meanwhile.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from flowagent.daemon.keeping import Keeper, Kept
from flowagent.daemon.log import Log
from flowagent.daemon.patience import patiently
from flowagent.flows.names import slug
from flowagent.models import FlowSpec, Json, OutputChunk, TaskRun
from flowagent.redaction import Redactor
from flowagent.runtime.events import Event, Parser
from flowagent.runtime.rundir import RunDirectory, open_plain
from flowagent.store.protocol import Store

PIECE = 256 * 1024
"""Bytes that are read, redacted and sent at a time."""
MAX_TASKS = 20_000
"""Tasks of one attempt whose states are kept; a flow that makes up more is not followed further."""
TASK_STATES = frozenset({"running", "retrying", "completed", "failed", "skipped"})
ENDED = frozenset({"completed", "failed", "skipped"})
NOTHING = "none"
"""The key of a reference that says: the task returned None."""
MAX_TEXT = 4000
"""Characters of a name or reason that are kept."""
LATEST = 1e12
"""Seconds since 1970 above which a number is no time."""
MAX_TRIES = 1 << 31
"""What every store's columns hold."""
SOON = 0.1
"""Seconds that the last of the output waits for results, to come with the end; after that it comes alone."""


class Shipper:
    """Sends one attempt's output; one call at a time. ``start``: raw bytes that the store has already."""

    def __init__(
        self,
        store: Store,
        keeper: Keeper,
        run: RunDirectory,
        run_id: str,
        attempt: int,
        spec: FlowSpec,
        redactor: Redactor,
        log: Log,
        start: int = 0,
        restored: Mapping[str, Json] | None = None,
    ) -> None:
        self._store = store
        self._keeper = keeper
        self._run = run
        self._run_id = run_id
        self._attempt = attempt
        self._spec = spec
        self._redactor = redactor
        self._log = log
        self._read = 0  # raw bytes that the parser has seen
        self._fed = start  # raw bytes that the redactor has seen
        self._start = start
        self._covered = start  # raw bytes that the redactor has let go of
        self._restored = restored or {}  # results of the run that is repeated, by task
        self._parser = Parser()
        self._tasks: set[str] = set()
        self._keeping: dict[str, list[Kept]] = {}  # results on their way, by task
        self._taken: list[Path] = []  # results that were put, and of which the store may not know yet
        self.loaded_sha256: str | None = None
        self.resolved: str | None = None  # the revision, if the run was to find it out itself

    @property
    def covered(self) -> int:
        """Raw bytes that were handed out for the store, those that it had already not counted."""
        return self._covered - self._start

    def behind(self) -> bool:
        """Whether there may be something to ship."""
        if self._keeper.done:
            return True
        try:
            return os.stat(self._run.output_path, follow_symlinks=False).st_size > self._read
        except OSError:
            return False

    async def pump(self) -> bool:
        """Ship what is there now; whether there was anything."""
        shipped = False
        async for data in self._pieces():
            chunks, tasks = self._take_in(data)
            shipped = await self._append(chunks, tasks) or shipped
        return await self._append([], self._kept()) or shipped

    async def drain(self) -> tuple[list[OutputChunk], list[TaskRun]]:
        """Nothing more will be written: ship what is there, but for the last of it. That is to be recorded
        together with the end of the attempt; call :meth:`recorded` then."""
        chunks: list[OutputChunk] = []
        tasks: list[TaskRun] = []
        async for data in self._pieces():
            await self._append(chunks, tasks)
            chunks, tasks = self._take_in(data)
        if last := self._redact(b"", final=True):
            chunks = [*chunks, last]
        with anyio.move_on_after(SOON):
            await self._keeper.finish()
        if self._keeper.busy:
            await self._append(chunks, tasks)
            chunks, tasks = [], []
            await self._keeper.finish()
        return chunks, [*tasks, *self._kept()]

    def recorded(self) -> None:
        """The store has all that was handed out."""
        while self._taken:
            self._taken.pop().unlink(missing_ok=True)

    def _take_in(self, data: bytes) -> tuple[list[OutputChunk], list[TaskRun]]:
        tasks = list(self._observe(data))
        begin = max(0, self._fed - (self._read - len(data)))
        chunk = self._redact(data[begin:])
        return [chunk] if chunk else [], tasks

    async def _append(self, chunks: list[OutputChunk], tasks: list[TaskRun]) -> bool:
        if not chunks and not tasks:
            return False
        call = partial(self._store.append, self._run_id, self._attempt, chunks, tasks)
        await patiently(call, self._log, "shipping output")
        self.recorded()
        return True

    async def _pieces(self) -> AsyncIterator[bytes]:
        # A piece per await of the store: local reads of this size are quicker than a trip to a thread.
        try:
            fd = open_plain(self._run.output_path, os.O_RDONLY)
        except OSError:
            return  # not there yet; or the flow put something else in its place
        try:
            while data := os.pread(fd, PIECE, self._read):
                self._read += len(data)
                yield data
        finally:
            os.close(fd)

    def _redact(self, data: bytes, final: bool = False) -> OutputChunk | None:
        self._fed += len(data)
        redacted, covered = self._redactor.feed(data, final)
        if not covered:
            return None
        start, self._covered = self._covered, self._covered + covered
        return OutputChunk(start, self._covered, redacted)

    # -- events ----------------------------------------------------------------------------------------

    def _observe(self, data: bytes) -> Iterator[TaskRun]:
        for item in self._parser.feed(data):
            if not isinstance(item, Event):
                continue
            event = item.data
            kind = event["event"]
            if kind == "task":
                task = self._task(event)
            elif kind == "result":
                task = self._result(event)
            else:
                task = None
                if kind == "loaded" and isinstance(event.get("sha256"), str):
                    self.loaded_sha256 = event["sha256"][:64]
                elif kind == "resolved" and isinstance(event.get("revision"), str):
                    self.resolved = event["revision"][:MAX_TEXT]
            if task is not None:
                yield task

    def _task(self, event: Mapping[str, Any]) -> TaskRun | None:
        """A task's state from its event; None when the event is not one that flowagent writes."""
        name, state = event.get("task"), str(event.get("state"))
        if not isinstance(name, str) or state not in TASK_STATES or not self._known(name):
            return None
        reason, tries, time = event.get("reason"), event.get("tries"), event.get("time")
        when = float(time) if isinstance(time, (int, float)) and 0 <= time < LATEST else None
        task = TaskRun(
            run_id=self._run_id,
            attempt=self._attempt,
            task=name,
            state=state,
            reason=self.clean(str(reason)) if reason else None,
            tries=tries if isinstance(tries, int) and 0 <= tries < MAX_TRIES else 1,
            started=when if state == "running" else None,
            ended=when if state in ENDED else None,
            result=self._restored.get(name) if state == "completed" and tries == 0 else None,
        )
        for kept in self._keeping.get(name, ()):
            kept.task = task
        return task

    def _known(self, task: str) -> bool:
        if task not in self._tasks:
            if len(task) > MAX_TEXT or len(self._tasks) >= MAX_TASKS:
                return False
            self._tasks.add(task)
        return True

    def _result(self, event: Mapping[str, Any]) -> TaskRun | None:
        """Have a result put where its registered declaration says: the flow has no say in where."""
        name, file, inputs = event.get("task"), event.get("file"), event.get("inputs")
        if not isinstance(name, str) or not self._known(name):
            return None
        known_by: dict[str, Json] = {"inputs": inputs[:64]} if isinstance(inputs, str) else {}
        task = TaskRun(self._run_id, self._attempt, name, "running" if name else "completed")
        if file is None:
            return replace(task, state="running", result={NOTHING: True, **known_by})
        declaration = self._declaration(name)
        taken = self._take(file) if declaration is not None and isinstance(file, str) else None
        if declaration is None or taken is None:
            return None
        location = event.get("location")
        key = location if isinstance(location, str) else self._default_key(name)
        more = {**known_by, "serializer": str(event.get("serializer"))[:MAX_TEXT]}
        kept = Kept(task, declaration, key, taken, more)
        self._keeping.setdefault(name, []).append(kept)
        self._keeper.add(kept)
        return None

    def _kept(self) -> list[TaskRun]:
        """Tasks of which it is known now what became of their results."""
        tasks = []
        done, self._keeper.done = self._keeper.done, []
        for kept in done:
            reference = kept.reference
            if "error" in reference:
                reference = {"error": self.clean(reference["error"])}
            tasks.append(replace(kept.task, result=reference))
            others = self._keeping[kept.task.task]
            others.remove(kept)
            if not others:
                del self._keeping[kept.task.task]
            self._taken.append(kept.file)
        return tasks

    def _declaration(self, task: str) -> dict[str, Json] | None:
        registered = task.partition("[")[0]
        for known in self._spec.tasks:
            if known["slug"] == registered and known.get("result") is not None:
                declaration: dict[str, Json] = known["result"]
                return declaration
        return dict(self._spec.result) if self._spec.result is not None else None

    def _default_key(self, task: str) -> str:
        name = _file_name(task) if task else "flow"
        return f"{slug(self._spec.name)}/{self._run_id}/{self._attempt}/{name}"

    def _take(self, name: str) -> Path | None:
        """Move a result out of the flow's reach; None if it is not a plain file of the flow's own.

        The flow may put links anywhere in its directory: none is followed, and a hard link to a file of
        somebody else's is not a result."""
        if not re.fullmatch(r"[0-9]{1,9}", name):
            return None
        taken = Path(self._run.path) / f"result-{name}"
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            directory = os.open(self._run.results, flags)
        except OSError:
            return None
        try:
            os.rename(name, taken, src_dir_fd=directory)
        except OSError:
            pass  # taken already by an agent that died before the store knew?
        finally:
            os.close(directory)
        try:
            found = taken.lstat()
        except OSError:
            return None
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            return taken
        with suppress(OSError):
            taken.unlink()
        return None

    def clean(self, text: str) -> str:
        """A text that is to be recorded, without secrets and not too long."""
        return self._redactor.redact(text)[:MAX_TEXT]


def _file_name(task: str) -> str:
    """Of a task's result: no other task of its run has the same."""
    registered, index = re.fullmatch(r"(.+?)(?:\[([0-9]{1,9})\])?", task, re.DOTALL).groups()  # type: ignore[union-attr]
    name = slug(registered)
    if name != registered:
        name += "-" + hashlib.sha256(registered.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return name if index is None else f"{name}.{index}"

"""Hooks: the operator's programs that are run around sources and runs, and that may refuse them.

A hook is trusted like the agent. It is run outside of any sandbox as the agent's user, so nobody else may be
able to write it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import anyio
from anyio.abc import Process

from flowagent import files
from flowagent.backend import Backend, Revision
from flowagent.daemon.log import Log
from flowagent.errors import HookError, one_line
from flowagent.models import Json
from flowagent.redaction import Redactor
from flowagent.secrets import PREFIX as SECRETS

BEFORE_SOURCE, AFTER_SOURCE = "before-source", "after-source"
BEFORE_RUN, AFTER_RUN = "before-run", "after-run"
EVENTS = (BEFORE_SOURCE, AFTER_SOURCE, BEFORE_RUN, AFTER_RUN)
TRY_AGAIN = 75
"""The exit code (EX_TEMPFAIL) by which a hook says that another attempt may be welcome."""
LAST_WORDS = 500
"""Characters of its output that end up in a run's reason and in the log."""
PIECE, KEPT = 16 << 10, 64 << 10
"""Bytes of its output that are read at a time; of its end, in which they are looked for."""


class Hooks:
    """The programs in a directory, by the events that their names begin with: ``before-run``,
    ``before-run.10-quota``; those of one event in the order of their names."""

    def __init__(self, directory: Path | None, timeout: float, log: Log) -> None:
        self._directory = directory
        self._timeout = timeout
        self._log = log

    def __bool__(self) -> bool:
        """Whether there may be any."""
        return self._directory is not None

    def check(self) -> None:
        """:raises HookError: the directory, or one that is in it, cannot be used."""
        if self._directory is None:
            return
        hooks = [path for event in EVENTS for path in self._programs(self._directory, event)]
        others = {path.name for path in self._directory.iterdir() if os.access(path, os.X_OK)}
        if others := others.difference(path.name for path in hooks):
            self._log.warning("no hooks, by their names", programs=sorted(others), events=EVENTS)

    async def run(self, event: str, facts: Mapping[str, Json], secrets: Collection[str] = ()) -> None:
        """Run the hooks of an event. ``secrets``: values that their last words are not to have in them.

        :raises HookError: one refuses, fails, or takes too long."""
        if self._directory is None:
            return
        for path in self._programs(self._directory, event):
            await self._run(path, event, facts, secrets)

    async def tell(self, event: str, facts: Mapping[str, Json], secrets: Collection[str] = ()) -> None:
        """The same where nothing can be refused any more."""
        try:
            await self.run(event, facts, secrets)
        except HookError as error:
            self._log.warning("a hook failed", hook_event=event, run_id=facts.get("run"), error=str(error))

    def around(self, backend: Backend, facts: Mapping[str, Json], secrets: Collection[str] = ()) -> Backend:
        """A backend whose sources are materialised between hooks; the backend itself where there are none."""
        return _Hooked(self, backend, facts, secrets) if self._directory is not None else backend

    # -- one hook --------------------------------------------------------------------------------------

    def _programs(self, directory: Path, event: str) -> list[Path]:
        try:
            _check_directory(directory)
            found = sorted(
                path
                for path in directory.iterdir()
                if path.name == event or path.name.startswith(f"{event}.")
            )
        except OSError as error:
            raise HookError(
                f"the hooks in {directory} cannot be read: {error.strerror}; see --hooks"
            ) from error
        for path in found:
            _check_program(path)
        return found

    async def _run(self, path: Path, event: str, facts: Mapping[str, Json], secrets: Collection[str]) -> None:
        with tempfile.TemporaryFile() as given, _Output(secrets) as said:
            given.write(json.dumps({"event": event, **facts}).encode())
            given.seek(0)
            try:
                process = await anyio.open_process(
                    [path],
                    stdin=given,
                    stdout=said.writing,
                    stderr=subprocess.STDOUT,
                    cwd="/",
                    env=_environment(event, facts),
                    start_new_session=True,
                )
            except OSError as error:
                raise HookError(
                    f"the hook {path} cannot be started: {error.strerror}; mend it, or remove it"
                ) from error
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(said.read)
                code = await self._wait(process)
                tasks.cancel_scope.cancel()
            words = said.last_words()
        self._log.debug("a hook has run", hook=str(path), code=code, run_id=facts.get("run"))
        if code is None:
            raise HookError(f"the hook {path} took longer than {self._timeout:g} s, and was killed")
        if code:
            why = words or (f"it exited with {code}" if code > 0 else f"it was killed by signal {-code}")
            raise HookError(f"the hook {path.name} refused: {why}", retryable=code == TRY_AGAIN)

    async def _wait(self, process: Process) -> int | None:
        """Its exit code; None: it was killed, with all that it started, as its time was up."""
        try:
            with anyio.move_on_after(self._timeout):
                return await process.wait()
            return None
        finally:
            if process.returncode is None:
                with anyio.CancelScope(shield=True):
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()


class _Output:
    """What a hook says: read while it runs, so that it is never held up, and only its end is kept."""

    def __init__(self, secrets: Collection[str]) -> None:
        self._redactor = Redactor(secrets)
        self._kept = b""
        self._reading, writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reading, False)
        self.writing: BinaryIO = open(writing, "wb", buffering=0)  # noqa: SIM115 - closed by read, or on leaving
        """For the hook."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.writing.close()
        os.close(self._reading)

    async def read(self) -> None:
        """Read until cancelled, or until nobody can write any more."""
        self.writing.close()
        while True:
            await anyio.wait_readable(self._reading)
            if not self._read():
                return

    def last_words(self) -> str:
        """The last line that says something, without secrets, and nothing that a terminal obeys.

        The hook has ended; what it has left running may still write, and nobody waits for that."""
        self.writing.close()
        for _ in range(KEPT // PIECE):
            if not self._read():
                break
        said = (self._kept + self._redactor.feed(b"", final=True)[0])[-KEPT:].decode(errors="replace")
        return next(filter(None, (one_line(line, LAST_WORDS) for line in reversed(said.split("\n")))), "")

    def _read(self) -> bool:
        """Take what is there; whether there was any."""
        try:
            data = os.read(self._reading, PIECE)
        except BlockingIOError:
            return False
        self._kept = (self._kept + self._redactor.feed(data)[0])[-KEPT:]
        return bool(data)


class _Hooked:
    """A backend with hooks around its sources. What is refused afterwards is not published."""

    def __init__(
        self, hooks: Hooks, backend: Backend, facts: Mapping[str, Json], secrets: Collection[str]
    ) -> None:
        self.type = backend.type
        self._hooks = hooks
        self._backend = backend
        self._facts = facts
        self._secrets = secrets

    async def materialise(self, storage: Mapping[str, Json], revision: Revision, directory: Path) -> None:
        facts = {**self._facts, "revision": revision.id, "source": str(directory)}
        await self._hooks.run(BEFORE_SOURCE, facts, self._secrets)
        await self._backend.materialise(storage, revision, directory)
        await self._hooks.run(AFTER_SOURCE, facts, self._secrets)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def _check_directory(directory: Path) -> None:
    """:raises HookError: others than root and this user may put something into it, or in its place."""
    _check_way(f"the hooks in {directory} are", directory)
    if directory.stat().st_mode & 0o022:  # also where all may only add files: each would be a hook
        raise HookError(
            f"the hooks in {directory} are refused: others than root and the agent's user may add some; "
            f"run: chmod go-w {directory}"
        )


def _check_program(path: Path) -> None:
    """:raises HookError: it is no program, or others than root and this user may have written it."""
    try:
        _check_way(f"the hook {path} is", path)
        if not path.is_file():
            raise HookError(f"the hook {path} is no file; remove it, or name it otherwise")
        if not os.access(path, os.X_OK, effective_ids=True):
            raise HookError(f"the hook {path} is not executable; run: chmod +x {path}")
        _check_interpreter(path)
    except OSError as error:
        raise HookError(f"the hook {path} cannot be used: {error.strerror}; remove it") from error


def _check_way(what: str, path: Path) -> None:
    for place in files.way(str(path)):
        if files.changeable(place):
            raise HookError(
                f"{what} refused: others than root and the agent's user may change {place}; "
                f"run: chmod go-w {place}, and if it belongs to another user, chown root {place}"
            )


def _check_interpreter(path: Path) -> None:
    """:raises HookError: it is a text of which the kernel does not know what is to execute it."""
    try:
        with path.open("rb") as file:
            first = file.read(256).partition(b"\n")[0]
    except PermissionError:
        return  # a program need not be readable
    if not first.startswith(b"#!"):
        if b"\0" not in first:
            raise HookError(
                f"the hook {path} is no program: its first line has to name what executes it, "
                "such as #!/bin/sh"
            )
        return
    words = os.fsdecode(first[2:]).strip(" \t").split(" ")
    interpreter = words[0].split("\t")[0]
    if not os.access(interpreter, os.X_OK, effective_ids=True):
        raise HookError(f"the hook {path} names {interpreter!r} in its first line, which is no program here")


def _environment(event: str, facts: Mapping[str, Json]) -> dict[str, str]:
    """The agent's own variables, without secrets and what its service manager told it alone."""
    found = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(SECRETS) and name not in ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
    }
    for name, value in {"event": event, **facts}.items():
        if isinstance(value, (str, int)) and "\0" not in str(value):
            found[f"HOOK_{name.upper()}"] = str(value)
    return found

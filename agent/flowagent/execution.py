"""The one-shot executor inside of containers and pods: fetches the flow that a brief names, then runs it.

It has no store and no token. What it has to say goes to standard output, which its agent follows, in the
framing of :mod:`flowagent.runtime.relay`; see :mod:`flowagent.runtime.container` for what a brief is.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import anyio

from flowagent import ground
from flowagent.backend import BackendContext, Backends, Revision
from flowagent.errors import BackendError, FlowagentError, UsageError, one_line
from flowagent.models import Json
from flowagent.runtime import relay
from flowagent.runtime.container import FIRST_LEASE, UNATTENDED, boot_id
from flowagent.runtime.events import Emitter
from flowagent.runtime.rundir import boottime
from flowagent.settings import Settings
from flowagent.sources import SourceCache, trees

STDIN, STDOUT = 0, 1
LOOK_EVERY = 1.0
"""Seconds between looks at the lease while the flow is fetched."""


def execute(settings: Settings, spec: str) -> NoReturn:
    """Run the brief in the file ``spec``, or on standard input if that is ``-``; ends this process.

    :raises UsageError: it is no brief."""
    brief = _read(spec)
    relay.note(STDOUT, relay.BEGAN, boot_id=boot_id(), boottime=boottime())
    fetching = _Fetching(brief, attended=spec == "-")
    if brief["storage"] is None:  # the flow is in the image
        _become(brief, fetching, ground.lay_out(Path(tempfile.mkdtemp(prefix="flowagent-ground-"))))
    try:
        revision = anyio.run(fetching.run, settings)
    except FlowagentError as error:
        said = f"the flow could not be fetched: {error}"
        _end(gone=said, retryable=bool(getattr(error, "retryable", False)))
    if revision is None:
        _end(**fetching.ended)
    Emitter(STDOUT).emit("resolved", revision=revision.id)
    _become(brief, fetching, ground.lay_out(Path(tempfile.mkdtemp(prefix="flowagent-ground-"))))


def _read(spec: str) -> dict[str, Any]:
    try:
        # Not a byte more than the first line: what follows is for others.
        with open(STDIN if spec == "-" else spec, "rb", buffering=0, closefd=spec != "-") as file:
            brief: dict[str, Any] = json.loads(file.readline() if spec == "-" else file.read())
        brief["spec"]["source"], brief["limits"]
        _check(brief["storage"], brief["spec"]["env"])
    except OSError as error:
        raise UsageError(f"{spec} cannot be read: {error.strerror}; it is mounted by an agent") from None
    except (ValueError, LookupError, TypeError):
        raise UsageError(f"{spec} holds nothing that can be executed; only agents make that") from None
    return brief


def _check(storage: Any, env: Any) -> None:
    """:raises ValueError: this is not what an agent gives to a flow that fetches itself."""
    if storage is not None and not (isinstance(storage, dict) and isinstance(storage.get("type"), str)):
        raise ValueError("no storage")
    if not isinstance(env, dict):
        raise ValueError("no variables")


class _Fetching:
    """Makes the source of a brief, for as long as the attempt may live. ``attended``: an agent speaks to us.

    ``ended`` says why it was given up."""

    def __init__(self, brief: Mapping[str, Any], *, attended: bool) -> None:
        self._brief = brief
        self._attended = attended
        self.said: list[str] = []  # lines that came meanwhile
        self._line = b""
        self.ended: dict[str, Any] = {"stop": "lease", "reason": "no agent renewed its lease"}
        self.deadline = boottime() + UNATTENDED
        if attended:
            same = brief["boot_id"] == boot_id()
            self.deadline = float(brief["deadline"]) if same else boottime() + FIRST_LEASE

    async def run(self, settings: Settings) -> Revision | None:
        """What was fetched; None if it was given up."""
        revision: Revision | None = None
        failure: FlowagentError | None = None
        given_up = True
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._keep_time, tasks.cancel_scope)
            if self._attended:
                tasks.start_soon(self._hear, tasks.cancel_scope)
            try:
                revision = await self._fetch(settings)
            except FlowagentError as error:
                failure = error
            except (TypeError, ValueError, LookupError, AttributeError) as error:
                # not all backends look at every field before they use it
                kind, said = type(error).__name__, one_line(str(error))
                failure = BackendError(
                    f"{self._brief['storage']['type']}: the flow's storage is wrong ({kind}: {said}); "
                    "register it again"
                )
            given_up = tasks.cancel_scope.cancel_called  # maybe at the very moment when it was done
            tasks.cancel_scope.cancel()
        if given_up:
            return None
        if failure is not None:
            raise failure
        return revision

    async def _fetch(self, settings: Settings) -> Revision:
        storage: Mapping[str, Json] = self._brief["storage"]
        environ = {**os.environ, **self._brief["spec"]["env"]}
        backends = Backends(BackendContext.of(settings, environ=environ))
        try:
            backend = backends.get(storage["type"])
            revision = await backend.resolve(storage)
            place = Path(tempfile.mkdtemp(prefix="flowagent-source-"))
            # the lease of what nobody else sees needs no keeping
            directory = (await SourceCache(place).hold(backend, storage, revision)).directory
            if revision.private:
                await anyio.to_thread.run_sync(trees.copy, directory, place / "own")
                directory = place / "own"
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(5):
                await backends.close()
        entry = revision.entry
        self._brief["spec"]["source"] = {
            "kind": entry.kind,
            "directory": str(directory),
            "path": entry.path,
            "module": entry.module,
            "sha256": entry.sha256,
            "made_with": dict(entry.made_with),
        }
        return revision

    async def _keep_time(self, scope: anyio.CancelScope) -> None:
        while boottime() < self.deadline:  # noqa: ASYNC110 - it is moved meanwhile
            await anyio.sleep(min(LOOK_EVERY, max(0.01, self.deadline - boottime())))
        scope.cancel()

    async def _hear(self, scope: anyio.CancelScope) -> None:
        """Leases extend the time; a request to stop ends it."""
        while True:
            await anyio.wait_readable(STDIN)
            data = os.read(STDIN, 1 << 16)
            if not data:
                return
            *lines, self._line = (self._line + data).split(b"\n")
            for line in lines:
                self.said.append(line.decode())
                word = json.loads(line)
                self.deadline = float(word.get("lease", self.deadline))
                if "stop" in word:
                    self.ended = {"stop": "stop", "reason": str(word["reason"])}
                    scope.cancel()

    def rest(self) -> dict[str, Any]:
        """What the supervisor has to know of it."""
        return {"deadline": self.deadline, "boot_id": boot_id(), "said": self._line.decode()}


def _become(brief: dict[str, Any], fetching: _Fetching, floor: Path) -> NoReturn:
    """Become the supervisor: a fresh interpreter without threads, and with the ground floor only."""
    fd = os.memfd_create("brief", 0)
    relay.write(fd, json.dumps({**brief, "files": None, **fetching.rest()}).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    os.set_inheritable(fd, True)
    os.execv(sys.executable, [sys.executable, str(floor / ground.ENTRY), "--container", str(fd)])  # noqa: S606


def _end(**status: Any) -> NoReturn:
    relay.note(STDOUT, relay.ENDED, status={**status, "ended": True})
    os._exit(1)

"""What is said between an agent and one container: leases and requests to stop go in, the log comes out."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import anyio
from anyio.abc import TaskGroup

from flowagent.docker import BrokenLogError, Channel, Engine, EngineError
from flowagent.runners.following import FollowedTooFarError, Follower, noted
from flowagent.runtime.limits import Limits
from flowagent.runtime.rundir import RunDirectory

KILL_MARGIN = 5.0
"""Seconds that the supervisor inside has to end the flow after its grace, before the engine does."""
AGAIN = 0.5
"""Seconds before an engine that failed is asked again."""
NOT_FOUND = 127
"""The exit code of init for a program that is not there."""
LAST_BREATH = 0.5
"""Seconds in which a container is sure to end after its supervisor's last words, if these were its own."""
REMOVED = {"gone": "its container was removed by somebody else"}


class Conversation:
    """Talks with the container of one attempt, for as long as it lives, through any failure of the engine.

    ``clock`` is what is to be added to this machine's boot time for that of the container's machine."""

    def __init__(
        self, engine: Engine, container: str, run: RunDirectory, limits: Limits, boot_id: str
    ) -> None:
        self.container = container
        self._engine = engine
        self._run = run
        self._limits = limits
        self._boot_id = boot_id
        self._init: int | None = None  # a descriptor of the container's first process, where we see it
        self._channel: Channel | None = None
        self._word = anyio.Event()
        self._lease: float | None = None
        self._stop: tuple[str, float] | None = None
        self._clock = 0.0
        self._met = self._dead = False

    # -- to the container ----------------------------------------------------------------------------

    async def attach(self) -> Channel:
        """Its standard input. :raises EngineError: it cannot be had."""
        if self._channel is None:
            self._channel = await self._engine.attach(self.container)
        return self._channel

    def extend(self, deadline: float) -> None:
        """Pass on until when it may live, by this machine's boot time."""
        self._lease = deadline
        self._word.set()

    def stop(self, reason: str, grace: float) -> None:
        """Pass on that it is to end; it is killed if it does not listen."""
        self._stop = reason, grace
        self._word.set()

    async def hold(self) -> None:
        """Talk until the container has ended, and note in the run directory how it did."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._speak, tasks)
                await self._listen()
                tasks.cancel_scope.cancel()
        finally:
            if self._init is not None:
                os.close(self._init)
                self._init = None
            await self.close()

    async def close(self) -> None:
        """Hang up. The container goes on."""
        if self._channel is not None:
            with anyio.CancelScope(shield=True):
                await self._channel.close()
            self._channel = None

    async def kill(self) -> None:
        """End it by force, if it lives."""
        with suppress(EngineError):
            await self._engine.call("POST", f"/containers/{self.container}/kill")

    async def _speak(self, tasks: TaskGroup) -> None:
        while True:
            await self._word.wait()
            self._word = anyio.Event()
            words: list[dict[str, Any]] = []
            if self._lease is not None:
                words.append({"lease": self._lease + self._clock})
            stop, self._stop = self._stop, None
            if stop is not None:
                words.append({"stop": stop[1], "reason": stop[0]})
                tasks.start_soon(self._kill_later, stop[1] + KILL_MARGIN)
            try:
                channel = await self.attach()
                for word in words:
                    await channel.send(json.dumps(word).encode() + b"\n")
            except EngineError:
                await self.close()
                await anyio.sleep(AGAIN)
                self._stop = self._stop or stop
                self._word.set()

    async def _kill_later(self, seconds: float) -> None:
        await anyio.sleep(seconds)
        await self.kill()

    # -- from the container --------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            follower = Follower(self._run, self._limits, self._boot_id)
            broken = ""
            try:
                try:
                    await self._follow(follower)
                except BrokenLogError as error:
                    broken = str(error)
                state: Mapping[str, Any] = {}
                if not self._dead:
                    state = (await self._inspect())["State"]
            except EngineError as error:
                if error.status == 404:
                    self._run.note(REMOVED)
                    return
                await anyio.sleep(AGAIN)  # it is being restarted: its containers may go on meanwhile
                continue
            except OSError:  # this machine's disk is full: the log keeps it all until there is room
                await anyio.sleep(AGAIN)
                continue
            except FollowedTooFarError as error:
                await self.kill()
                self._run.note({"ended": True, "limit": str(error)})
                return
            if not state.get("Running"):
                follower.close()
                self._conclude(follower, state, broken)
                return
            if broken:
                await anyio.sleep(AGAIN)

    async def _follow(self, follower: Follower) -> None:
        async with self._engine.log(self.container, follow=True) as pieces:
            async for data in pieces:
                follower.feed(data)
                if follower.began and not self._met:
                    self._meet(follower)
                    self._init = _first_process(await self._inspect())
                if follower.done and await self._has_ended():
                    return

    async def _has_ended(self) -> bool:
        """Whether the kernel says so, now or in a moment; an engine says the same 45 ms later."""
        if self._init is not None:
            with anyio.move_on_after(LAST_BREATH):
                await anyio.wait_readable(self._init)
                self._dead = True
        return self._dead

    async def _inspect(self) -> dict[str, Any]:
        found: dict[str, Any] = await self._engine.call("GET", f"/containers/{self.container}/json")
        return found

    def _meet(self, follower: Follower) -> None:
        """The supervisor has spoken first. On another machine it waits for a lease in its own time."""
        self._met = True
        self._run.note({"began": True})
        if follower.clock is not None:
            self._clock = follower.clock
            self.extend(self._run.read_lease())

    def _conclude(self, follower: Follower, state: Mapping[str, Any], broken: str) -> None:
        """Note how it ended: in its supervisor's words, or if that has none left, in the engine's.
        ``broken``: why the log could not be read to its end."""
        limit = {"memory_limit": self._limits.memory}
        killed_for_memory = bool(state.get("OOMKilled"))
        if follower.ended is not None:
            notes = noted(follower.ended)
            if killed_for_memory and notes.get("signal") == signal.SIGKILL and not notes.get("stop"):
                notes["out_of_memory"] = True
            self._run.note({**notes, **limit, "ended": True}, follower.ended.get("outcome"))
        elif killed_for_memory:
            self._run.note({"ended": True, "out_of_memory": True, **limit})
        elif self._run.read_stop() is not None:
            self._run.note({"ended": True, "stop": "stop"})
        elif state.get("ExitCode") == NOT_FOUND and not follower.began:
            noted_before = self._run.status()
            image, program = noted_before.get("image"), noted_before.get("program")
            self._run.note({"gone": f"image {image} has no {program}", "retryable": False})
        else:
            last = broken or follower.last_line
            said = f": {last}" if last else ""
            code = state.get("ExitCode")
            self._run.note({"gone": f"the container ended with exit code {code} before the flow had{said}"})


def _first_process(found: Mapping[str, Any]) -> int | None:
    """A descriptor of a container's first process, with whom all others die; None: the engine is on another
    machine, or we are in a container and do not see it."""
    pid, shared = found["State"].get("Pid"), found["HostConfig"].get("PidMode")
    if not pid or shared:
        return None
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return None
    with suppress(OSError), open(f"/proc/{pid}/cgroup") as file:
        if found["Id"] in file.read():
            return process
    os.close(process)  # that pid is somebody else's here
    return None

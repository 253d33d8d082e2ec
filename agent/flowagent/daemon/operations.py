"""What surrounds an agent: the service manager, health and metrics, the control socket. All of it costs
nothing, or next to nothing, where nobody asks for it."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from flowagent.daemon import listening
from flowagent.daemon.journeys import Watcher, Watchers
from flowagent.daemon.log import Log
from flowagent.daemon.pulse import STALL, Pulse
from flowagent.daemon.systemd import ServiceManager
from flowagent.daemon.tally import Tally
from flowagent.errors import UsageError
from flowagent.settings import Settings, hostname

if TYPE_CHECKING:
    from flowagent.daemon.agent import Agent
    from flowagent.daemon.health import Health
    from flowagent.daemon.metrics import Metrics
    from flowagent.daemon.tracing import Tracing
    from flowagent.daemon.webserver import Server

STATUS_EVERY = 5.0
"""Seconds between looks whether the service manager's idea of the status is still right."""
FLUSH = 5.0
"""Seconds that traces and answers may take to leave when the agent has stopped."""
SOCKET, KEY = "control.sock", "control.key"
"""Files of the control socket, next to those of the launchers, where nothing of a flow's can get."""


class Operations:
    """Open from before the store is there until after the agent has ended.

    :raises SettingsError: the health address cannot be had.
    :raises UsageError: tracing is on, and its extra is not installed."""

    def __init__(self, settings: Settings, log: Log, manager: ServiceManager | None = None) -> None:
        self.tally = Tally()
        self.pulse = Pulse()
        self.manager = manager or ServiceManager()
        self._log = log
        self._agent: Agent | None = None
        self._metrics: Metrics | None = None
        self._health: Health | None = None
        self._listening: socket.socket | None = None
        self._address = settings.health_address
        self._made: tuple[int, int] | None = None  # which file the socket is, if it is one
        self._serving: Server | None = None
        self._said = ""
        self._tracing = _tracing() if settings.tracing == "otlp" else None
        if settings.health_address is not None:
            from flowagent.daemon.health import Health
            from flowagent.daemon.metrics import Metrics

            self._metrics = Metrics()
            self._health = Health(self.pulse, self.tally, self._metrics)
            self._listening = listening.listen(settings.health_address)
            self._made = listening.identity(settings.health_address)
        watching: list[Watcher] = [each for each in (self._metrics, self._tracing) if each is not None]
        self.watchers = Watchers(watching)

    async def run(self) -> None:
        """Serve and tell until cancelled."""
        async with anyio.create_task_group() as tasks:
            if self._listening is not None and self._health is not None:
                from flowagent.daemon.webserver import Server

                address = listening.shown(self._listening, self._address or "")
                self._log.info("health and metrics are served", address=address)
                tasks.start_soon(Server(self._listening, self._health.answer, self._log).run)
            if self._metrics is not None:
                tasks.start_soon(self.pulse.measure, self._metrics.loop_lag.observe)
            elif self.manager.watchdog is not None:
                tasks.start_soon(self.pulse.measure)
            if self.manager.listens:
                self.manager.status("waiting for the store")
                tasks.start_soon(self._tell)

    def attach(self, agent: Agent) -> None:
        """This is the agent that all is about."""
        self._agent = agent
        if self._health is not None:
            self._health.agent = agent

    async def serve_control(self, directory: Path) -> None:
        """Answer the agent's owner until cancelled, at a socket in ``directory``."""
        agent = self._agent
        assert agent is not None
        key = _new_key(directory)
        with listening.listen(str(directory / SOCKET), 0o600) as server:
            await anyio.wait_readable(server)  # what answering takes is imported when somebody asks
            from flowagent.daemon.control import Control
            from flowagent.daemon.health import Health
            from flowagent.daemon.webserver import Server

            if self._health is None:
                self._health = Health(self.pulse, self.tally)
                self._health.agent = agent
            self._serving = Server(server, Control(self._health, agent, key).answer, self._log)
            await self._serving.run()

    async def answered(self) -> None:
        """Wait until those have their answer who waited for the agent to be drained."""
        with anyio.move_on_after(FLUSH):
            while self._serving is not None and self._serving.busy:  # noqa: ASYNC110 - seconds, once
                await anyio.sleep(0.01)

    async def close(self) -> None:
        """Send what is left to be sent."""
        if self._listening is not None:
            self._listening.close()
        if self._address is not None and self._made is not None:
            listening.remove(self._address, self._made)
        if self._tracing is not None:
            await self._tracing.close(FLUSH)

    # -- the service manager ---------------------------------------------------------------------------

    def ready(self) -> None:
        """The agent takes runs now, for the first time or again with other settings."""
        self._said = self._status()
        self.manager.ready(self._said)

    def stopping(self) -> None:
        self._said = self._status()
        self.manager.stopping(self._said)

    def refused(self, reason: str) -> None:
        """A reload came to nothing: the old settings stay."""
        self._said = f"{self._status()}; not reloaded: {reason}"
        self.manager.ready(self._said)

    async def _tell(self) -> None:
        """Keep the status current, and the watchdog from barking while things move."""
        dog = self.manager.watchdog
        limit = STALL if dog is None else min(STALL, dog / 2)
        withheld = False
        while True:
            stalled = self.pulse.stalled(limit)
            if stalled and not withheld:
                self._log.error("stalled: the watchdog is not told that all is well", waiting_for=stalled)
            withheld = bool(stalled)
            if dog is not None and not stalled:
                self.manager.alive()
            if self._agent is not None and (status := self._status()) != self._said.partition(";")[0]:
                self._said = status
                self.manager.status(status)
            await anyio.sleep(STATUS_EVERY if dog is None else min(STATUS_EVERY, dog / 3))

    def _status(self) -> str:
        agent = self._agent
        if agent is None:
            return "starting"
        held, ended = len(agent.attempts), self.tally.attempts_ended
        return f"{agent.condition}, {held} of {agent.info.limit} runs, {ended} ended"


def _new_key(directory: Path) -> str:
    key = secrets.token_hex(32)
    directory.mkdir(mode=0o700, exist_ok=True)
    with open(os.open(directory / KEY, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as file:
        file.write(key)
    return key


def _tracing() -> Tracing:
    try:
        from flowagent.daemon.tracing import Tracing
    except ImportError as error:
        raise UsageError(
            f"tracing needs OpenTelemetry ({error}); install flowagent[otel], or leave out --tracing"
        ) from error
    return Tracing(hostname())

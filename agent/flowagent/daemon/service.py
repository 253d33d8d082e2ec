"""The agent as a service: settings, signals, the store that may be away, and the exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import anyio

from flowagent.daemon.agent import Agent
from flowagent.daemon.log import Log, make_log
from flowagent.daemon.operations import Operations
from flowagent.daemon.patience import patiently
from flowagent.errors import FlowagentError
from flowagent.settings import Settings
from flowagent.store import Store, open_store

SLOW = 1.5
"""Seconds after which a store that does not answer is spoken of."""
EXIT_LEFT = 75
"""The exit code of an agent that has left live runs to their supervisors: another is to be started soon."""


class Service:
    """One agent and what is around it. ``read`` gives the settings as they are now.

    ``once``: take what is due, then end."""

    def __init__(self, read: Callable[[], Settings], once: bool = False) -> None:
        self._read = read
        self._once = once
        self._settings = read()
        self._log = make_log(self._settings.log_format, self._settings.log_level)
        self._agent: Agent | None = None
        self._early = False  # whether to read the settings again while the store was away
        self._opening = anyio.CancelScope()
        self._interactive = sys.stdin is not None and sys.stdin.isatty()

    async def run(self) -> int:
        """Run the agent until it ends; the exit code. :raises FlowagentError: it cannot start."""
        operations = Operations(self._settings, self._log)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._obey, operations)
                tasks.start_soon(operations.run)
                store = None
                with self._opening:
                    store = await _open(self._settings, self._log)
                if store is not None:
                    await self._work(store, operations)
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await operations.close()
        return EXIT_LEFT if self._agent is not None and self._agent.left else 0

    async def _work(self, store: Store, operations: Operations) -> None:
        try:
            agent = Agent(self._settings, store, self._log, runs_once=self._once, operations=operations)
            self._agent = agent
            if self._early:
                self._reload(operations)
            await agent.run()
        finally:
            with anyio.CancelScope(shield=True):
                await store.close()

    async def _obey(self, operations: Operations) -> None:
        known = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
        with anyio.open_signal_receiver(*known) as signals:
            async for number in signals:
                if number == signal.SIGHUP and not self._hung_up():
                    self._reload(operations)
                elif self._agent is None:
                    self._opening.cancel()
                elif number == signal.SIGQUIT:
                    self._agent.leave()
                else:
                    self._agent.stop()

    def _hung_up(self) -> bool:
        """Whether the terminal that the agent was started in has been closed, which is a reason to stop."""
        if not self._interactive:
            return False
        try:
            os.tcgetpgrp(sys.stdin.fileno())
        except OSError:
            return True
        return False

    def _reload(self, operations: Operations) -> None:
        """Go by the configuration as it is now; if it is wrong, by the one of before."""
        operations.manager.reloading()
        try:
            settings = self._read()
            log = make_log(self._settings.log_format, settings.log_level)  # a log has one format to its end
            waiting = self._agent.reload(settings, log) if self._agent is not None else []
        except Exception as error:  # whatever is wrong with a file, an agent at work goes on
            reason = str(error) if isinstance(error, FlowagentError) else f"{type(error).__name__}: {error}"
            self._log.error("not reloaded: the configuration is wrong, the old one stays", reason=reason)
            operations.refused(reason)
            return
        self._log = log
        if self._agent is None:
            self._early = True
            operations.manager.status("waiting for the store")
            return
        if waiting:
            self._log.warning("some settings count from the next start on", settings=waiting)
        operations.ready()


async def _open(settings: Settings, log: Log) -> Store:
    """Open the store, however long it is away, and say so soon."""

    async def speak_of_it() -> None:
        await anyio.sleep(SLOW)
        log.warning("the store does not answer yet; still trying")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(speak_of_it)
        store = await patiently(lambda: open_store(settings.store), log, "opening the store")
        tasks.cancel_scope.cancel()
    return store

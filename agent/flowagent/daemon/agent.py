"""The agent itself: four loops around one table of attempts.

Claims: while there is room, take due runs. Leases: renew all at once, learn what is to be cancelled and what
was lost. Expiry: end what other agents lost. Stopping: drain, cancel, or leave.
"""

from __future__ import annotations

import gc
import os
import random
import time
import uuid
from dataclasses import replace
from functools import partial

import anyio
from anyio.abc import TaskGroup

import flowagent
from flowagent import settings as settings_module
from flowagent.backend import BackendContext, Backends
from flowagent.daemon import identity
from flowagent.daemon.attempts import Attempt, Services, lost
from flowagent.daemon.log import Log
from flowagent.daemon.lookout import Lookout
from flowagent.daemon.patience import patiently
from flowagent.errors import FlowagentError, LeaseLostError, StoreError
from flowagent.models import AgentInfo, Claims, FlowSpec, Held, Outcome, Run, State
from flowagent.runners.confinement import Confinement
from flowagent.runners.process import ProcessRunner
from flowagent.runtime.linux import make_undumpable
from flowagent.runtime.rundir import RunDirectory, boottime
from flowagent.secrets import SecretProvider
from flowagent.settings import Settings
from flowagent.sources import SourceCache
from flowagent.store.protocol import CANCEL, WORK, Store

ANNOUNCE_EVERY = 10.0
"""Seconds between signs of life when leases give no reason for one sooner."""


class Agent:
    """One agent, from its start to its last attempt. ``runs_once``: take what is due now, then end."""

    def __init__(self, settings: Settings, store: Store, log: Log, *, runs_once: bool = False) -> None:
        host = settings_module.hostname()
        self._settings = settings
        self._store = store
        self._runs_once = runs_once
        self._identity = identity.take(settings.agents_dir, settings.name, host)
        self.log = log.bind(agent=self._identity.name)
        labels = {*settings.labels, host} if settings.hostname_label else set(settings.labels)
        self.info = AgentInfo(
            name=self._identity.name,
            instance=uuid.uuid4().hex,
            host=host,
            pid=os.getpid(),
            labels=tuple(sorted(labels)),
            runner=ProcessRunner.name,
            limit=settings.capacity,
            version=flowagent.__version__,
            require_labels=settings.require_labels,
        )
        confinement = Confinement(settings, self._identity.runs)
        self._services = Services(
            settings=settings,
            store=store,
            backends=Backends(BackendContext(settings.home, host, settings.allow_write)),
            sources=SourceCache(settings.sources_dir),
            runner=ProcessRunner(
                self._identity.directory, settings.home / "ground", confinement.rules, settings.preload
            ),
            confinement=confinement,
            lookout=Lookout(),
            secrets=SecretProvider(settings.home),
            runs=self._identity.runs,
            log=self.log,
        )
        self._attempts: dict[tuple[str, int], Attempt] = {}
        # Claims and renewals take turns: what a renewal finds unknown is then truly unknown.
        self._leases = anyio.Lock(fast_acquire=True)
        self._nap = anyio.CancelScope()  # of the claims, until a doorbell rings
        self._room = anyio.Event()
        self._stops = 0
        self._stopping = anyio.Event()
        self._stopped_again = anyio.Event()
        self._leaving = anyio.Event()
        self.ready = anyio.Event()

    # -- from outside ----------------------------------------------------------------------------------

    def stop(self) -> None:
        """First call: drain. Second: cancel all runs now. Third: leave them to their supervisors and go."""
        self._stops += 1
        for event in (self._stopping, self._stopped_again, self._leaving)[: self._stops]:
            event.set()
        self._nap.cancel()
        self._make_room()

    async def run(self) -> None:
        """Work until stopped. :raises FlowagentError: it could not start."""
        make_undumpable()
        self._identity.directory.mkdir(exist_ok=True)
        await self._services.sources.sweep()
        await anyio.to_thread.run_sync(self._services.confinement.sweep)
        try:
            await patiently(lambda: self._store.announce(self.info), self.log, "announcing the agent")
            info = self.info
            gc.freeze()  # what the start has made stays, and need not be looked at by every collection
            level = self._services.confinement.floor
            self.log.info(
                "started", labels=list(info.labels), limit=info.limit, store=self._store.url, sandbox=level
            )
            for gap in self._services.confinement.gaps:
                self.log.warning("the sandbox has a gap", gap=gap)
            async with anyio.create_task_group() as tasks:
                await self._adopt(tasks)
                tasks.start_soon(self._warm_up)
                tasks.start_soon(self._services.lookout.run)
                tasks.start_soon(self._renew_leases)
                tasks.start_soon(self._listen_for_cancels)
                tasks.start_soon(self._expire)
                tasks.start_soon(self._leave, tasks)
                await self._claim(tasks)
                await self._drain()
                tasks.cancel_scope.cancel()
            if not self._leaving.is_set():
                await self._services.runner.close()
                with anyio.move_on_after(5):
                    await self._store.depart(self.info.name)
            self.log.info("stopped")
        finally:
            self._identity.close()

    # -- claims ----------------------------------------------------------------------------------------

    async def _claim(self, tasks: TaskGroup) -> None:
        async with self._store.doorbell(WORK) as bell:
            self.ready.set()
            while not self._stopping.is_set():
                free = self.info.limit - sum(not attempt.ended for attempt in self._attempts.values())
                if free <= 0:
                    await self._wait_for_room()
                    continue
                try:
                    taken = await self._take(free, tasks)
                    if len(taken) == free or (self._runs_once and taken):
                        continue
                    if self._runs_once and not taken:
                        if not self._attempts:
                            return
                        await self._wait_for_room()
                        continue
                    pause = self._until(taken.next_due)
                except StoreError as error:
                    self.log.warning("cannot claim", error=str(error))
                    pause = self._settings.poll
                if not self._stopping.is_set():
                    with anyio.CancelScope() as self._nap:
                        await bell.wait(pause)

    async def _take(self, free: int, tasks: TaskGroup) -> Claims:
        async with self._leases:
            asked = boottime()
            claims = await self._store.claim(self.info, free, self._settings.lease)
            for claim in claims:
                self._hold(claim.run, claim.attempt, claim.spec, asked)
        for claim in claims:
            self.log.debug("claimed", run_id=claim.run.id, attempt=claim.attempt)
            tasks.start_soon(self._own, self._attempts[claim.run.id, claim.attempt], False)
        return claims

    def _hold(self, run: Run, number: int, spec: FlowSpec, asked: float) -> Attempt:
        attempt = Attempt(self._services, run, number, spec, self._deadline(asked), self._make_room)
        self._attempts[run.id, number] = attempt
        return attempt

    async def _own(self, attempt: Attempt, resumed: bool) -> None:
        """Everything of one attempt; whatever goes wrong in it stays in it."""
        try:
            await (attempt.resume() if resumed else attempt.execute())
        except Exception:
            self.log.exception("an attempt failed inside the agent", run_id=attempt.run_id)
            # The next renewal finds it unknown and records that; by then nothing of it may live.
            await self._forbid(attempt.directory, "the agent failed")
        finally:
            del self._attempts[attempt.run_id, attempt.number]
            self._make_room()

    async def _forbid(self, directory: RunDirectory, reason: str) -> None:
        try:
            await self._services.runner.forbid(directory, reason)
        except OSError as error:
            self.log.error("cannot end an attempt", path=directory.path, error=str(error))

    def _until(self, due: float | None) -> float:
        """Seconds to sleep when no doorbell rings: to the next due run, at most the jittered fallback."""
        fallback = self._settings.poll * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        if due is None:
            return fallback
        return max(0.01, min(fallback, due - time.time()))

    async def _wait_for_room(self) -> None:
        self._room = anyio.Event()
        await self._room.wait()

    def _make_room(self) -> None:
        self._room.set()

    # -- leases ----------------------------------------------------------------------------------------

    def _deadline(self, asked: float) -> float:
        """Until when an attempt may live whose lease was asked for at ``asked``: surely before the lease
        ends in the store, the time to kill it included."""
        lease = self._settings.lease
        return asked + lease - min(5.0, lease / 4)

    async def _renew_leases(self) -> None:
        announced = boottime()
        while True:
            await anyio.sleep(min(self._settings.lease / 3, ANNOUNCE_EVERY))
            try:
                await self._renew()
                if boottime() - announced >= ANNOUNCE_EVERY - 1:
                    await self._store.announce(replace(self.info, stopping=self._stopping.is_set()))
                    announced = boottime()
                    await self._services.runner.retire_idle()
            except StoreError as error:
                self.log.warning("leases were not renewed", error=str(error), attempts=len(self._attempts))

    async def _listen_for_cancels(self) -> None:
        async with self._store.doorbell(CANCEL) as bell:
            while True:
                if await bell.wait(60.0) and self._attempts:
                    try:
                        await self._renew()
                    except StoreError as error:
                        self.log.warning("cannot ask for cancellations", error=str(error))

    async def _renew(self) -> dict[tuple[str, int], Held]:
        async with self._leases:
            asked = boottime()
            known = dict(self._attempts)
            held = {
                (lease.run_id, lease.attempt): lease
                for lease in await self._store.renew(self.info.name, self._settings.lease)
            }
        if held.keys() - known:
            # Another host's agent may have taken the name while this one slept: then they are not ours.
            await self._store.announce(replace(self.info, stopping=self._stopping.is_set()))
        for key, lease in held.items():
            attempt = known.get(key)
            if attempt is None:
                await self._give_up(lease)
                continue
            attempt.extend(self._deadline(asked))
            if lease.state is State.CANCELLING:
                attempt.stop(lease.reason or "cancelled")
        for attempt in lost(held, known):
            attempt.lose()
        return held

    async def _give_up(self, lease: Held) -> None:
        """The store says that we hold an attempt of which there is nothing here: say so at once."""
        self.log.warning("an attempt is held of which nothing is here", run_id=lease.run_id)
        try:
            if lease.state is State.PENDING:
                await self._store.release(lease.run_id, lease.attempt, "its agent was restarted")
            elif lease.state is State.CANCELLING:
                outcome = Outcome(State.CANCELLED, lease.reason)
                await self._store.finish(lease.run_id, lease.attempt, outcome)
            else:
                outcome = Outcome(State.CRASHED, "its agent lost track of it")
                await self._store.finish(lease.run_id, lease.attempt, outcome)
        except LeaseLostError:
            pass

    async def _expire(self) -> None:
        while True:
            try:
                for run in await self._store.expire():
                    state = str(run.state)
                    self.log.warning("a lease ran out", run_id=run.id, state=state, reason=run.reason)
            except StoreError as error:
                self.log.debug("cannot look for expired leases", error=str(error))
            await anyio.sleep(max(0.5, self._settings.lease / 3) * random.uniform(0.7, 1.3))  # noqa: S311

    # -- restart ---------------------------------------------------------------------------------------

    async def _adopt(self, tasks: TaskGroup) -> None:
        """Find the attempts that were started under this name before, and go on with them."""
        asked = boottime()
        leases = await patiently(
            lambda: self._store.renew(self.info.name, self._settings.lease), self.log, "asking for leases"
        )
        held = {(lease.run_id, lease.attempt): lease for lease in leases}
        for path in sorted(self._identity.runs.iterdir()):
            directory = RunDirectory(path)
            run_id, _, number = path.name.rpartition(".")
            lease = held.pop((run_id, int(number)), None) if number.isdigit() else None
            if lease is None:
                tasks.start_soon(self._clear, directory)
                continue
            run, spec = await patiently(partial(self._look_up, run_id), self.log, "reading a run")
            attempt = self._hold(run, lease.attempt, spec, asked)
            tasks.start_soon(self._own, attempt, True)
            if lease.state is State.CANCELLING:
                attempt.stop(lease.reason or "cancelled")
        for lease in held.values():
            await self._give_up(lease)

    async def _look_up(self, run_id: str) -> tuple[Run, FlowSpec]:
        run = await self._store.run(run_id)
        return run, (await self._store.version(run.version_id)).spec

    async def _clear(self, directory: RunDirectory) -> None:
        """End and remove what is left of an attempt that is not ours any more."""
        self.log.info("clearing an old run directory", path=directory.path)
        await self._forbid(directory, "lease lost")
        await anyio.to_thread.run_sync(directory.remove)

    async def _warm_up(self) -> None:
        """Have the launcher running before the first run asks for it."""
        try:
            await self._services.runner.prepare()
        except (FlowagentError, OSError) as error:
            self.log.error("the launcher does not start", error=str(error))

    # -- stopping --------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        if self._attempts:
            self.log.info("draining", attempts=len(self._attempts), at_most=self._settings.drain)
        with anyio.move_on_after(self._settings.drain):
            async with anyio.create_task_group() as waits:

                async def emptied() -> None:
                    while self._attempts:
                        await self._wait_for_room()
                    waits.cancel_scope.cancel()

                waits.start_soon(emptied)
                await self._stopped_again.wait()
                waits.cancel_scope.cancel()
        for attempt in list(self._attempts.values()):
            reason = f"agent {self.info.name} was stopped"
            try:
                await self._store.cancel(attempt.run_id, reason)
            except FlowagentError as error:
                self.log.warning("cannot record the cancellation", run_id=attempt.run_id, error=str(error))
            attempt.stop(reason)
        while self._attempts:
            await self._wait_for_room()

    async def _leave(self, tasks: TaskGroup) -> None:
        await self._leaving.wait()
        self.log.warning("leaving at once", attempts=len(self._attempts))
        tasks.cancel_scope.cancel()

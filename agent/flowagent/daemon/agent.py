"""The agent itself: four loops around one table of attempts.

Claims: while there is room, take due runs. Leases: renew all at once, learn what is to be cancelled and what
was lost. Expiry: end what other agents lost. Stopping: drain, cancel, or leave.
"""

from __future__ import annotations

import gc
import math
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
from flowagent.daemon import facts, identity
from flowagent.daemon.attempts import Attempt, Services, lost
from flowagent.daemon.disk import DiskGuard
from flowagent.daemon.hooks import Hooks
from flowagent.daemon.journeys import Journey, trace_of
from flowagent.daemon.log import Log
from flowagent.daemon.lookout import Lookout
from flowagent.daemon.operations import Operations
from flowagent.daemon.patience import patiently
from flowagent.daemon.progress import logged
from flowagent.daemon.webhook import Notices
from flowagent.daemon.workshop import SPARE, Workshop
from flowagent.errors import AgentError, FlowagentError, LeaseLostError, StoreError
from flowagent.models import AgentInfo, Claims, FlowSpec, Held, Outcome, Run, State
from flowagent.runners import make_runner
from flowagent.runtime.linux import make_undumpable
from flowagent.runtime.rundir import RunDirectory, boottime
from flowagent.secrets import SecretProvider
from flowagent.settings import Settings
from flowagent.sources import SourceCache, mirrors
from flowagent.sources.upkeep import Upkeep
from flowagent.store.protocol import CANCEL, WORK, Store

ANNOUNCE_EVERY = 10.0
"""Seconds between signs of life when leases give no reason for one sooner."""
EXPIRE_EVERY = 0.5
"""Seconds between looks for what other agents lost, at the least."""
FLUSH = 10.0
"""Seconds that a stopping agent goes on trying to send notifications."""
KEEP_EVERY = 600.0
"""Seconds between looks at how much is in the cache, and how old it is."""
PRUNING = 600.0
"""Seconds that it may take to make room in a large cache."""
RELOADABLE = frozenset(
    {"labels", "hostname_label", "require_labels", "limit", "max_runs", "idle_exit", "reserve", "log_level"}
    | {"env", "import_paths", "max", "grace", "poll", "drain", "hooks", "hook_timeout"}
    | {"cache_max_size", "cache_max_age"}
)
"""Settings that a running agent can change; the others are made part of it when it starts."""


class Agent:
    """One agent, from its start to its last attempt. ``runs_once``: take what is due now, then end."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        log: Log,
        *,
        runs_once: bool = False,
        operations: Operations | None = None,
    ) -> None:
        host = settings_module.hostname()
        self._settings = settings
        self.store = store
        self._runs_once = runs_once
        self._operations = operations or Operations(settings, log)
        self._operations.attach(self)
        self._pulse = self._operations.pulse
        self.tally = self._operations.tally
        self._identity = identity.take(settings.agents_dir, settings.name, host)
        self.log = log.bind(agent=self._identity.name)
        self.info = AgentInfo(
            name=self._identity.name,
            instance=uuid.uuid4().hex,
            host=host,
            pid=os.getpid(),
            labels=_labels(settings, host),
            runner=settings.runner,
            limit=settings.capacity,
            version=flowagent.__version__,
            require_labels=settings.require_labels,
        )
        secrets = SecretProvider(settings.home)
        self._services = Services(
            settings=settings,
            store=store,
            backends=Backends(
                BackendContext.of(settings, writable=settings.allow_write, progress=logged(self.log))
            ),
            sources=SourceCache(settings.sources_dir),
            runner=make_runner(settings, self._identity.directory),
            lookout=Lookout(),
            secrets=secrets,
            hooks=_hooks(settings, self.log),
            notices=Notices(settings.notify, settings.notify_key, secrets, self.tally, self.log),
            watchers=self._operations.watchers,
            tally=self.tally,
            runs=self._identity.runs,
            workshop=Workshop(self._identity.runs, settings.capacity, self.log),
            log=self.log,
        )
        self.disk = self._disk_guard()
        self._attempts: dict[tuple[str, int], Attempt] = {}
        # Claims and renewals take turns: what a renewal finds unknown is then truly unknown.
        self._leases = anyio.Lock(fast_acquire=True)
        self._nap = anyio.CancelScope()  # of the claims, until a doorbell rings
        self._announce_soon = anyio.Event()
        self._room = anyio.Event()
        self._warm = anyio.Event()
        self._not_claimed: str | None = None
        self._not_renewed: str | None = None
        self._busy_until = time.monotonic()  # when the last attempt ended
        self._stops = 0
        self._drain_for: float | None = None  # seconds; None: as the settings say
        self._draining = anyio.CancelScope()
        self._stopping = anyio.Event()
        self._stopped_again = anyio.Event()
        self._leaving = anyio.Event()
        self.ready = anyio.Event()
        self.drained = anyio.Event()
        """Set when nothing is left to wait for."""

    # -- from outside ----------------------------------------------------------------------------------

    @property
    def attempts(self) -> list[Attempt]:
        """Those that it holds."""
        return list(self._attempts.values())

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    @property
    def left(self) -> bool:
        """Whether it was told to go and leave its runs to their supervisors."""
        return self._leaving.is_set()

    @property
    def store_trouble(self) -> str | None:
        """Why the newest claim, or renewal, failed; None: it did not. A store may answer questions all the
        while, as one does that somebody else has locked for writing."""
        return self._not_claimed or self._not_renewed

    @property
    def condition(self) -> str:
        """What it is doing, in a word or two."""
        if self.stopping:
            return "draining"
        if not self.ready.is_set():
            return "starting"
        return "disk nearly full" if self.disk.low else "working" if self._attempts else "idle"

    @property
    def source_counts(self) -> dict[str, int]:
        sources = self._services.sources
        return {"lookups": sources.lookups, "fills": sources.fills, "filled_bytes": sources.filled_bytes}

    async def check_launcher(self) -> None:
        """:raises LauncherError: flow processes cannot be started now."""
        await self._services.runner.check()

    def drain(self, deadline: float | None = None) -> None:
        """Take nothing new, wait for the runs, at most ``deadline`` seconds from now, and end."""
        self.log.info("asked to drain", deadline=deadline)
        self._drain_for = deadline
        if self._stops == 0:
            self.stop()
        elif deadline is not None:
            self._draining.deadline = anyio.current_time() + deadline

    def leave(self) -> None:
        """Go at once: the runs stay with their supervisors, and an agent of this name finds them."""
        while self._stops < 3:
            self.stop()

    def reload(self, settings: Settings, log: Log) -> list[str]:
        """Go by other settings from the next run on. What only a new start can change stays: its names.

        :raises HookError: the hooks cannot be used; nothing has changed then.
        :raises SettingsError: the next start would fail, as far as that can be told; the same."""
        old = self._settings
        if settings.run_as not in (None, old.run_as) and settings.runner == "process":
            from flowagent.runners import confinement  # which other runners do without

            confinement.user(settings.run_as)
        kept = [
            name for name in vars(settings) if name not in RELOADABLE and name not in ("config", "origins")
        ]
        changed = [name for name in kept if getattr(old, name) != getattr(settings, name)]
        log = log.bind(agent=self.info.name)
        hooks = _hooks(settings, log)
        hooks.check()
        self._settings = settings = replace(settings, **{name: getattr(old, name) for name in kept})
        self.log = log
        self.info = replace(
            self.info,
            labels=_labels(settings, self.info.host),
            limit=settings.capacity,
            require_labels=settings.require_labels,
        )
        self._services.runner.reload(settings)
        self._services = replace(
            self._services,
            settings=settings,
            hooks=hooks,
            log=log,
        )
        self.disk = self._disk_guard()
        self._announce_soon.set()
        self._nap.cancel()
        self._make_room()
        self.log.info("reloaded", labels=list(self.info.labels), limit=self.info.limit)
        self._look_at_import_paths()
        return changed

    def _look_at_import_paths(self) -> None:
        for path in self._settings.import_paths:
            if not path.is_dir():  # it may be mounted later
                self.log.warning("nothing is imported from there: no such directory", import_path=str(path))

    def _disk_guard(self) -> DiskGuard:
        settings = self._settings
        directories = [settings.home, *([settings.cache] if settings.cache else [])]
        cache = Upkeep(settings.sources_dir, settings.mirrors_dir)
        return DiskGuard(directories, settings.reserve, cache, self.log)

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
        await anyio.to_thread.run_sync(mirrors.sweep, self._settings.mirrors_dir)
        try:
            self._services.hooks.check()
            self._services.notices.check()
            await self._services.runner.open()
            await patiently(lambda: self.store.announce(self.info), self.log, "announcing the agent")
            gc.freeze()  # what the start has made stays, and need not be looked at by every collection
            level = self._services.runner.floor
            info = self.info
            self.log.info(
                "started", labels=list(info.labels), limit=info.limit, store=self.store.url, sandbox=level
            )
            for gap in self._services.runner.gaps:
                self.log.warning("the sandbox has a gap", gap=gap)
            self._look_at_import_paths()
            async with anyio.create_task_group() as tasks:
                await self._adopt(tasks)
                tasks.start_soon(self._services.workshop.run)
                tasks.start_soon(self._warm_up)
                tasks.start_soon(self._keep_cache)
                tasks.start_soon(self._services.lookout.run)
                tasks.start_soon(self._renew_leases)
                tasks.start_soon(self._listen_for_cancels)
                tasks.start_soon(self._expire)
                tasks.start_soon(self._leave, tasks)
                tasks.start_soon(self._services.notices.run)
                tasks.start_soon(self._operations.serve_control, self._identity.directory / "launchers")
                await self._claim(tasks)
                self._operations.stopping()
                await self._drain()
                self.drained.set()
                await self._services.notices.flush(FLUSH)
                await self._operations.answered()
                await self._services.workshop.close()
                with anyio.move_on_after(1):  # else a launcher that it has just found is not told to end
                    await self._warm.wait()
                tasks.cancel_scope.cancel()
            if not self._leaving.is_set():
                await self._services.runner.close()
                await self._take_leave()
            self.log.info("stopped")
        finally:
            self._identity.close()

    # -- claims ----------------------------------------------------------------------------------------

    async def _claim(self, tasks: TaskGroup) -> None:
        async with self.store.doorbell(WORK) as bell:
            self.ready.set()
            self._operations.ready()
            while not self.stopping:
                free = self._room_for()
                if free <= 0:
                    if self._done():
                        return
                    await self._wait_for_room()
                    continue
                with self._pulse.during("looking for room on the disks", PRUNING):
                    room = await self.disk.room()
                self._tell_of_room(room)
                if not room:
                    if self._runs_once:
                        raise AgentError(f"nothing was taken: {self.disk.low}; make room")
                    pause = self._settings.poll
                else:
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
                        self.tally.claims_failed += 1
                        self._not_claimed = str(error)
                        self.log.warning("cannot claim", error=str(error))
                        pause = self._settings.poll
                if self._settings.idle_exit is not None:
                    pause = min(pause, self._idle_for(self._settings.idle_exit))
                    if pause <= 0:
                        return
                if not self.stopping:
                    with anyio.CancelScope() as self._nap:
                        await bell.wait(pause)

    def _tell_of_room(self, room: bool) -> None:
        """Have those know who ask why a run is not taken."""
        if self.info.no_room is room:
            self.info = replace(self.info, no_room=not room)
            self._announce_soon.set()

    def _room_for(self) -> int:
        """How many attempts it may claim now."""
        free = self.info.limit - sum(not attempt.ended for attempt in self._attempts.values())
        most = self._settings.max_runs
        return free if most is None else min(free, most - self.tally.claimed)

    def _done(self) -> bool:
        """Whether it has claimed all that it was to, and all of that has ended."""
        most = self._settings.max_runs
        if most is None or self.tally.claimed < most or self._attempts:
            return False
        self.log.info("it has had all the runs that it was to", max_runs=most)
        return True

    def _idle_for(self, at_most: float) -> float:
        """Seconds that it may go on to be idle."""
        if self._attempts:
            return at_most
        left = self._busy_until + at_most - time.monotonic()
        if left <= 0:
            self.log.info("it was idle for long enough", idle_exit=at_most)
        return left

    async def _take(self, free: int, tasks: TaskGroup) -> Claims:
        async with self._leases:
            asked, when = boottime(), time.time()
            with self._pulse.during("claiming runs"):
                claims = await self.store.claim(self.info, free, self._settings.lease)
            self._not_claimed = self._not_renewed = None
            self.tally.claimed += len(claims)
            for claim in claims:
                journey = self._operations.watchers.begin(claim.run, claim.attempt, claim.spec, when)
                self._hold(claim.run, claim.attempt, claim.spec, asked, journey)
        for claim in claims:
            self.log.debug("claimed", run_id=claim.run.id, attempt=claim.attempt)
            tasks.start_soon(self._own, self._attempts[claim.run.id, claim.attempt], False)
        return claims

    def _hold(self, run: Run, number: int, spec: FlowSpec, asked: float, journey: Journey) -> Attempt:
        deadline = self._deadline(asked)
        attempt = Attempt(self._services, run, number, spec, deadline, self._make_room, journey)
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
            attempt.journey.end()
            del self._attempts[attempt.run_id, attempt.number]
            self._busy_until = time.monotonic()
            self._make_room()

    async def _forbid(self, directory: RunDirectory, reason: str) -> None:
        try:
            await self._services.runner.forbid(directory, reason)
        except (OSError, FlowagentError) as error:
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
            with anyio.move_on_after(min(self._settings.lease / 3, ANNOUNCE_EVERY)):
                await self._announce_soon.wait()
                self._announce_soon, announced = anyio.Event(), -math.inf
            try:
                await self._renew()
                if boottime() - announced >= ANNOUNCE_EVERY - 1:
                    await self.store.announce(replace(self.info, stopping=self._stopping.is_set()))
                    announced = boottime()
                    await self._services.runner.tend()
            except StoreError as error:
                self.tally.renewals_failed += 1
                self._not_renewed = str(error)
                self.log.warning("leases were not renewed", error=str(error), attempts=len(self._attempts))

    async def _listen_for_cancels(self) -> None:
        async with self.store.doorbell(CANCEL) as bell:
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
            with self._pulse.during("renewing leases"):
                leases = await self.store.renew(self.info.name, self._settings.lease)
            held = {(lease.run_id, lease.attempt): lease for lease in leases}
            self.tally.renewals += 1
            self._not_renewed = None
        if held.keys() - known:
            # Another host's agent may have taken the name while this one slept: then they are not ours.
            await self.store.announce(replace(self.info, stopping=self._stopping.is_set()))
        for key, lease in held.items():
            attempt = known.get(key)
            if attempt is None:
                await self._give_up(lease)
                continue
            attempt.extend(self._deadline(asked))
            if lease.state is State.CANCELLING:
                attempt.stop(lease.reason or "cancelled")
        for attempt in lost(held, known):
            self.tally.lost += 1
            attempt.lose()
        return held

    async def _give_up(self, lease: Held) -> None:
        """The store says that we hold an attempt of which there is nothing here: say so at once."""
        self.log.warning("an attempt is held of which nothing is here", run_id=lease.run_id)
        try:
            if lease.state is State.PENDING:
                await self.store.release(lease.run_id, lease.attempt, "its agent was restarted")
                return
            outcome = Outcome(State.CRASHED, "its agent lost track of it")
            if lease.state is State.CANCELLING:
                outcome = Outcome(State.CANCELLED, lease.reason)
            await self._notify(await self.store.finish(lease.run_id, lease.attempt, outcome))
        except LeaseLostError:
            pass

    async def _expire(self) -> None:
        while True:
            try:
                for run in await self.store.expire():
                    state = str(run.state)
                    self.log.warning("a lease ran out", run_id=run.id, state=state, reason=run.reason)
                    await self._notify(run)
            except StoreError as error:
                self.log.debug("cannot look for expired leases", error=str(error))
            await anyio.sleep(max(EXPIRE_EVERY, self._settings.lease / 3) * random.uniform(0.7, 1.3))  # noqa: S311

    async def _notify(self, run: Run) -> None:
        """Tell of a run whose last attempt nobody could follow to its end."""
        if self._services.notices and run.state.terminal:
            spec = (await self.store.version(run.version_id)).spec
            outcome = Outcome(run.state, run.reason)
            self._services.notices.add(facts.of_end(run, spec, run.attempt, outcome))

    # -- restart ---------------------------------------------------------------------------------------

    async def _adopt(self, tasks: TaskGroup) -> None:
        """Find the attempts that were started under this name before, and go on with them."""
        asked = boottime()
        leases = await patiently(
            lambda: self.store.renew(self.info.name, self._settings.lease), self.log, "asking for leases"
        )
        held = {(lease.run_id, lease.attempt): lease for lease in leases}
        for path in sorted(self._identity.runs.iterdir()):
            directory = RunDirectory(path)
            if path.name.startswith(SPARE):
                self._services.workshop.remove(directory)
                continue
            run_id, _, number = path.name.rpartition(".")
            lease = held.pop((run_id, int(number)), None) if number.isdigit() else None
            if lease is None:
                tasks.start_soon(self._clear, directory)
                continue
            run, spec = await patiently(partial(self._look_up, run_id), self.log, "reading a run")
            begin = self._operations.watchers.begin
            journey = begin(run, lease.attempt, spec, time.time(), trace_of(directory))
            attempt = self._hold(run, lease.attempt, spec, asked, journey)
            tasks.start_soon(self._own, attempt, True)
            if lease.state is State.CANCELLING:
                attempt.stop(lease.reason or "cancelled")
        for lease in held.values():
            await self._give_up(lease)

    async def _look_up(self, run_id: str) -> tuple[Run, FlowSpec]:
        run = await self.store.run(run_id)
        return run, (await self.store.version(run.version_id)).spec

    async def _clear(self, directory: RunDirectory) -> None:
        """End and remove what is left of an attempt that is not ours any more."""
        self.log.info("clearing an old run directory", path=directory.path)
        await self._forbid(directory, "lease lost")
        self._services.workshop.remove(directory)

    async def _warm_up(self) -> None:
        """Have the launcher running before the first run asks for it."""
        try:
            await self._services.runner.prepare()
        except (FlowagentError, OSError) as error:
            self.log.error("the launcher does not start", error=str(error))
        self._warm.set()

    async def _keep_cache(self) -> None:
        await self._warm.wait()  # the first run is not to wait for it
        while True:
            await self.disk.keep(self._settings.cache_max_size, self._settings.cache_max_age)
            await anyio.sleep(KEEP_EVERY * random.uniform(0.7, 1.3))  # noqa: S311 - jitter

    # -- stopping --------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        at_most = self._settings.drain if self._drain_for is None else self._drain_for
        if self._attempts:
            self.log.info("draining", attempts=len(self._attempts), at_most=at_most)
        with anyio.move_on_after(at_most) as self._draining:
            async with anyio.create_task_group() as waits:

                async def emptied() -> None:
                    while self._attempts:
                        await self._wait_for_room()
                    waits.cancel_scope.cancel()

                waits.start_soon(emptied)
                await self._stopped_again.wait()
                waits.cancel_scope.cancel()
        self.tally.cancelled_by_drain = len(self._attempts)
        for attempt in list(self._attempts.values()):
            reason = f"agent {self.info.name} was stopped"
            try:
                await self.store.cancel(attempt.run_id, reason)
            except FlowagentError as error:
                self.log.warning("cannot record the cancellation", run_id=attempt.run_id, error=str(error))
            attempt.stop(reason)
        while self._attempts:
            await self._wait_for_room()

    async def _take_leave(self) -> None:
        with anyio.move_on_after(5):
            try:
                await self.store.depart(self.info.name)
            except StoreError as error:  # it is stopped all the same, and soon counts as gone
                self.log.warning("the store does not know that the agent has stopped", error=str(error))
            await self._services.backends.close()

    async def _leave(self, tasks: TaskGroup) -> None:
        await self._leaving.wait()
        self.log.warning("leaving at once", attempts=len(self._attempts))
        tasks.cancel_scope.cancel()


def _labels(settings: Settings, host: str) -> tuple[str, ...]:
    """What an agent with these settings carries."""
    return tuple(sorted({*settings.labels, host} if settings.hostname_label else {*settings.labels}))


def _hooks(settings: Settings, log: Log) -> Hooks:
    return Hooks(settings.hooks, settings.hook_timeout, log)

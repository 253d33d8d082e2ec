"""One attempt, from its claim, or from its run directory after a restart, to its recorded end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from flowagent.backend import Backends, Entry, Revision
from flowagent.daemon import facts, journeys
from flowagent.daemon.hooks import AFTER_RUN, BEFORE_RUN, Hooks
from flowagent.daemon.journeys import Journey, Watchers
from flowagent.daemon.keeping import Keeper, keeping
from flowagent.daemon.log import Log
from flowagent.daemon.lookout import Lookout, rest
from flowagent.daemon.outcomes import outcome_of
from flowagent.daemon.patience import patiently
from flowagent.daemon.restoring import restore, results_of_repeated
from flowagent.daemon.shipping import Shipper
from flowagent.daemon.tally import Tally
from flowagent.daemon.webhook import Notices
from flowagent.daemon.workshop import Workshop
from flowagent.errors import (
    BackendError,
    FlowagentError,
    HookError,
    LeaseLostError,
)
from flowagent.models import FlowSpec, Held, Json, Outcome, OutputChunk, Run, State, TaskRun
from flowagent.redaction import Redactor
from flowagent.runners.protocol import Order, Runner
from flowagent.runtime.rundir import RunDirectory
from flowagent.secrets import SecretProvider
from flowagent.settings import Settings
from flowagent.sources import Source, SourceCache, copy
from flowagent.store.protocol import Store

UNRESOLVED = "unresolved"
"""The revision of a run that finds out by itself what it executes, until it says so."""


@dataclass(frozen=True)
class Services:
    """What every attempt works with."""

    settings: Settings
    store: Store
    backends: Backends
    sources: SourceCache
    runner: Runner
    lookout: Lookout
    secrets: SecretProvider
    hooks: Hooks
    notices: Notices
    watchers: Watchers
    tally: Tally
    runs: Path  # where run directories are
    workshop: Workshop
    log: Log


class Attempt:
    """An attempt that this agent holds. ``number`` is its fencing token.

    ``executed`` is called once, when nothing of it is left to be executed, before its end is recorded."""

    def __init__(
        self,
        services: Services,
        run: Run,
        number: int,
        spec: FlowSpec,
        deadline: float,
        executed: Callable[[], None],
        journey: Journey = journeys.UNWATCHED,
    ) -> None:
        self.run_id = run.id
        self.number = number
        self.flow = spec.name
        self.phase = journeys.CLAIM
        self.since = time.time()  # when that phase began
        self.journey = journey
        self.directory = RunDirectory(f"{services.runs}/{run.id}.{number}")
        self._services = services
        self._run = run
        self._spec = spec
        self._deadline = deadline
        self._restored: Mapping[str, Json] = {}  # results of the run that is repeated, by task
        self._stop_reason: str | None = None
        self._lost = False
        self.ended = False
        self._executed = executed
        self._plan: dict[str, Json] | None = None  # as handed over, if it was by this process
        self._secrets: Mapping[str, str] = {}  # that the flow declares, once they were read
        self._preparing = anyio.CancelScope()
        self._log = services.log.bind(run_id=run.id, attempt=number, flow=spec.name)

    # -- from outside ----------------------------------------------------------------------------------

    def extend(self, deadline: float) -> None:
        """The lease was renewed: let the supervisor know how long the attempt may live."""
        self._deadline = deadline
        try:
            self._services.runner.extend(self.directory, deadline)
        except FileNotFoundError:
            pass  # not made yet, or gone already
        except OSError as error:
            self._log.warning("the lease cannot be passed on to the flow's supervisor", error=str(error))

    def stop(self, reason: str, grace: float | None = None) -> None:
        """Bring it to an end: SIGTERM, grace, SIGKILL; or, before there is a process, at once."""
        patience = self._services.settings.grace if grace is None else grace
        if self._stop_reason is None:
            self._log.info("stopping", reason=reason)
            self._stop_reason = reason
        elif grace is None:
            return
        self._preparing.cancel()
        with suppress(FileNotFoundError):
            self._services.runner.stop(self.directory, reason, patience)

    def lose(self) -> None:
        """The store says that the lease is not ours: end the process now, record nothing."""
        if not self.ended and not self._lost:
            self._log.warning("lease lost: stopping the flow")
            self._lost = True
            self.stop("lease lost", grace=0)

    # -- its life --------------------------------------------------------------------------------------

    def _enter(self, phase: str) -> None:
        self.phase, self.since = phase, time.time()
        self.journey.enter(phase)

    def _facts(self, **more: Json) -> dict[str, Json]:
        return facts.of_attempt(self._run, self._spec, self.number, **more)

    async def execute(self) -> None:
        """Resolve, materialise, start, follow and record a fresh claim."""
        handle = None
        try:
            with self._preparing:
                handle = await self._start()
        except LeaseLostError as error:
            self._log.warning("not started", error=str(error))
            await self._discard()
        except FlowagentError as error:
            reason = f"could not be started: {error}"
            if isinstance(error, BackendError):
                reason = f"the flow could not be fetched: {error}"
            if isinstance(error, HookError):
                self._services.tally.vetoes += 1
            retryable = getattr(error, "retryable", False)
            await self._end_unstarted(Outcome(State.CRASHED, reason, retryable=retryable))
        except Exception as error:
            self._log.exception("could not be started")
            reason = f"could not be started: {type(error).__name__}: {error}"
            await self._end_unstarted(Outcome(State.CRASHED, reason))
        else:
            if handle is not None:
                await self._follow(handle)
            else:
                await self._end_unstarted(Outcome(State.CANCELLED, self._stop_reason))

    async def resume(self) -> None:
        """Go on with an attempt that an agent of this name started before."""
        if not await self._services.runner.began(self.directory):
            # The agent died between recording the start and handing it over: nothing of the flow ever ran.
            release = partial(self._services.store.release, self.run_id, self.number)
            with suppress(LeaseLostError):
                await patiently(
                    partial(release, "its agent was restarted before it began"), self._log, "giving back"
                )
            self._log.info("given back: its agent was restarted before it began")
            await self._discard()
            return
        self._log.info("found a live attempt", supervisor=self.directory.supervisor())
        self.extend(self._deadline)
        await self._follow(None)

    # Whatever is done in these two steps, the record comes before the directory goes: an agent that dies in
    # between finds the directory, and with it the truth.

    async def _end_unstarted(self, outcome: Outcome) -> None:
        await self._services.runner.forbid(self.directory, outcome.reason or "not needed any more")
        await self._record(outcome)
        await self._discard()

    async def _discard(self, *, failed: bool = False) -> None:
        """Remove the run directory, once nothing lives in it and nothing can."""
        await self._services.runner.forbid(self.directory, "not needed any more", failed=failed)
        self._services.workshop.remove(self.directory)

    # -- start -----------------------------------------------------------------------------------------

    async def _start(self) -> Any:
        """Have it executed; the runner's handle of it."""
        services = self._services
        rights = services.runner.admit(self._spec.run_config)
        self._secrets = values = services.secrets.get_many(self._spec.secrets)
        self._enter(journeys.RESOLVE)
        revision = await self._resolve()
        self._enter(journeys.MATERIALISE)
        with await self._hold(revision) as source:
            if services.hooks:
                where = {"source": str(source.directory), "sandbox": rights["sandbox"]}
                told = self._facts(revision=revision.id, **where)
                await services.hooks.run(BEFORE_RUN, told, values.values())
            self._enter(journeys.START)
            order = self._order(revision, source, values)
            self._plan = services.runner.furnish(order, {**self._planned(revision), **rights})
            services.workshop.make(self.directory)
            self.directory.hand_over(self._plan, self._deadline)
            await self._restore()
            if order.source is not None and order.source != source.directory:
                await anyio.to_thread.run_sync(copy, source.directory, order.source)
            await services.runner.make_ready(order)
            state = await patiently(
                lambda: services.store.started(self.run_id, self.number, revision.id, rights["sandbox"]),
                self._log,
                "recording the start",
            )
            if state is State.CANCELLING:
                self.stop("cancelled before it began")
                await anyio.lowlevel.checkpoint()
            # From here on the process may live: the answer must not be lost to a cancellation in between.
            with anyio.CancelScope(shield=True):
                return await services.runner.start(order)

    async def _restore(self) -> None:
        """Take over what the run that this one repeats has left."""
        services = self._services
        found = await results_of_repeated(services.store, self._run, self._spec)
        if found:
            found = await restore(services.backends, self._run, self._spec, found, self.directory, self._log)
            self._log.info("results taken over", repeats=self._run.retry_of, tasks=len(found))
        self._restored = found

    async def _resolve(self) -> Revision:
        """What would run now; where the run is to find that out, only that it is."""
        storage = self._spec.storage
        in_image = bool(storage.get("runners"))  # which can be told without asking anybody
        if self._services.runner.resolves(self._spec.run_config) and not in_image:
            return Revision(UNRESOLVED, Entry("storage"))
        return await self._services.backends.get(storage["type"]).resolve(storage)

    async def _hold(self, revision: Revision) -> Source:
        """The directory of the revision on this machine, if it is to be there at all."""
        if revision.image is not None or revision.id == UNRESOLVED:
            return Source(Path(revision.directory or "/"))
        storage = self._spec.storage
        backend = self._services.backends.get(storage["type"])
        if self._services.hooks:
            backend = self._services.hooks.around(backend, self._facts(), self._secrets.values())
        return await self._services.sources.hold(backend, storage, revision)

    def _order(self, revision: Revision, source: Source, values: Mapping[str, str]) -> Order:
        place: Path | None = Path(self.directory.source) if revision.private else source.directory
        if revision.image is not None or revision.id == UNRESOLVED:
            place = None
        return Order(
            run=self.directory,
            run_id=self.run_id,
            attempt=self.number,
            flow_name=self._spec.name,
            config=self._spec.run_config,
            storage=self._spec.storage,
            grace=self._services.settings.grace,
            values=values,
            source=place,
            origin=source.directory,
            lease_fd=source.lease,
            image=revision.image,
        )

    def _planned(self, revision: Revision) -> dict[str, Json]:
        """What the flow process is told, wherever it runs: the run directory's spec."""
        run, spec, settings = self._run, self._spec, self._services.settings
        config = spec.run_config
        entry = revision.entry
        return {
            "run_id": run.id,
            "attempt": self.number,
            "flow_name": spec.name,
            "parameters": dict(run.parameters),
            "scheduled_for": run.due,
            "labels": list(run.labels),
            "source": {
                "kind": entry.kind,
                "path": entry.path,
                "module": entry.module,
                "sha256": entry.sha256,
                "made_with": dict(entry.made_with),
            },
            "revision": revision.id,
            "in_place": revision.directory is not None and revision.image is None,
            "result": spec.result,
            "env": {
                **settings.env,
                **config.get("env", {}),
                **run.env,
                **self.journey.environment(),
            },
            "working_dir": config.get("working_dir"),
            "import_paths": [str(path) for path in settings.import_paths],
        }

    # -- follow ----------------------------------------------------------------------------------------

    async def _follow(self, handle: Any) -> None:
        """Ship output until nobody supervises it any more, then record the end. ``handle``: see the runner's
        ``start``; None for an attempt that an agent before this one has started."""
        services = self._services
        self._enter(journeys.RUN)
        if self._stop_reason is not None:  # asked for while it was being started
            services.runner.stop(self.directory, self._stop_reason, services.settings.grace)
        try:
            start = 0
            if handle is None:
                asked = partial(services.store.shipped, self.run_id, self.number)
                start = await patiently(asked, self._log, "asking for the offset")
                again = partial(results_of_repeated, services.store, self._run, self._spec)
                self._restored = await patiently(again, self._log, "asking for results")
            status: dict[str, Any] = {}
            async with keeping(services.backends, self._log) as keeper:
                shipper = self._shipper(keeper, start)
                with services.lookout.watching(shipper) as watched:
                    status = await services.runner.wait(self.directory, handle)
                await rest(watched)
                if "ended" not in status:
                    self._log.warning("the supervisor was killed", leftovers=status.get("leftovers"))
                chunks, tasks = await shipper.drain()
        except LeaseLostError:
            self.lose()
            await self._discard()
        else:
            await self._conclude(shipper, status, chunks, tasks)

    def _shipper(self, keeper: Keeper, start: int) -> Shipper:
        services = self._services
        try:
            self._secrets = services.secrets.get_many(self._spec.secrets)
        except FlowagentError as error:
            self._log.warning("secrets are gone: the output cannot be redacted", error=str(error))
        return Shipper(
            services.store,
            keeper,
            self.directory,
            self.run_id,
            self.number,
            self._spec,
            Redactor(self._secrets.values()),
            self._log,
            start,
            self._restored,
        )

    async def _conclude(
        self,
        shipper: Shipper,
        status: Mapping[str, Any],
        chunks: Sequence[OutputChunk],
        tasks: Sequence[TaskRun],
    ) -> None:
        outcome = outcome_of(status)
        self._services.tally.output_bytes += shipper.covered
        if outcome.reason is not None:
            outcome = replace(outcome, reason=shipper.clean(outcome.reason))
        if shipper.resolved is not None and self._services.runner.resolves(self._spec.run_config):
            outcome = replace(outcome, revision=shipper.clean(shipper.resolved))
        elif shipper.loaded_sha256 is not None:
            outcome = replace(outcome, revision=self._loaded_revision(shipper.loaded_sha256))
        await self._record(outcome, chunks, tasks)
        shipper.recorded()
        await self._discard(failed=outcome.state in (State.FAILED, State.CRASHED))

    def _loaded_revision(self, sha256: str) -> str | None:
        """The revision that in fact ran, where resolving alone could not say: a script used in place may
        have been edited since, and a module is found by its interpreter only."""
        try:
            plan = self._plan or self.directory.read_spec()
        except (OSError, ValueError):
            return None  # the flow has been there
        if plan["source"]["kind"] == "module":
            return f"{plan['revision']}@sha256:{sha256}"
        if plan["source"]["kind"] == "script" and plan["in_place"]:
            return f"sha256:{sha256}"
        return None

    async def _record(
        self, outcome: Outcome, chunks: Sequence[OutputChunk] = (), tasks: Sequence[TaskRun] = ()
    ) -> None:
        """Write the end, and the last output with it, however long the store is away; unless the lease is
        lost."""
        self.ended = True
        self._enter(journeys.RECORD)
        self._executed()
        finish = self._services.store.finish
        try:
            run = await patiently(
                lambda: finish(self.run_id, self.number, outcome, chunks, tasks),
                self._log,
                "recording the end",
            )
        except LeaseLostError as error:
            self._log.warning("the end could not be recorded", error=str(error))
            return
        again = run.state is State.SCHEDULED
        following = {"next": "scheduled again"} if again else {}
        self._log.info(
            str(outcome.state), **({"reason": outcome.reason} if outcome.reason else {}), **following
        )
        self.journey.end(outcome, again)
        tally = self._services.tally
        tally.ended[str(outcome.state)] += 1
        tally.again += again
        await self._tell(run, outcome)

    async def _tell(self, run: Run, outcome: Outcome) -> None:
        """Let those know who asked to be told of ends."""
        services = self._services
        if services.hooks or services.notices:
            told = facts.of_end(run, self._spec, self.number, outcome)
            if run.state.terminal:
                services.notices.add(told)
            await services.hooks.tell(AFTER_RUN, told, self._secrets.values())


def lost(held: Mapping[tuple[str, int], Held], attempts: Mapping[tuple[str, int], Attempt]) -> list[Attempt]:
    """The attempts that we thought ours and the store does not."""
    return [attempt for key, attempt in attempts.items() if key not in held]

"""One attempt, from its claim, or from its run directory after a restart, to its recorded end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from flowagent.backend import Backend, Backends, Revision
from flowagent.daemon.log import Log
from flowagent.daemon.lookout import Lookout, rest
from flowagent.daemon.outcomes import outcome_of
from flowagent.daemon.patience import patiently
from flowagent.daemon.shipping import Shipper
from flowagent.errors import (
    BackendError,
    FlowagentError,
    LauncherError,
    LeaseLostError,
)
from flowagent.models import FlowSpec, Held, Json, Outcome, OutputChunk, Run, State, TaskRun
from flowagent.redaction import Redactor
from flowagent.runners.confinement import Confinement
from flowagent.runners.process import ProcessRunner
from flowagent.runtime.rundir import RunDirectory
from flowagent.secrets import SecretProvider
from flowagent.settings import Settings
from flowagent.sources import SourceCache
from flowagent.store.protocol import Store


@dataclass(frozen=True)
class Services:
    """What every attempt works with."""

    settings: Settings
    store: Store
    backends: Backends
    sources: SourceCache
    runner: ProcessRunner
    confinement: Confinement
    lookout: Lookout
    secrets: SecretProvider
    runs: Path  # where run directories are made
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
    ) -> None:
        self.run_id = run.id
        self.number = number
        self.directory = RunDirectory(f"{services.runs}/{run.id}.{number}")
        self._services = services
        self._run = run
        self._spec = spec
        self._deadline = deadline
        self._stop_reason: str | None = None
        self._lost = False
        self.ended = False
        self._executed = executed
        self._plan: dict[str, Json] | None = None  # as handed over, if it was by this process
        self._preparing = anyio.CancelScope()
        self._log = services.log.bind(run_id=run.id, attempt=number, flow=spec.name)

    # -- from outside ----------------------------------------------------------------------------------

    def extend(self, deadline: float) -> None:
        """The lease was renewed: let the supervisor know how long the attempt may live."""
        self._deadline = deadline
        try:
            self.directory.write_lease(deadline)
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

    async def execute(self) -> None:
        """Resolve, materialise, start, follow and record a fresh claim."""
        end: int | None = None
        try:
            with self._preparing:
                end = await self._start()
        except LeaseLostError as error:
            self._log.warning("not started", error=str(error))
            await self._discard()
        except FlowagentError as error:
            reason = f"could not be started: {error}"
            if isinstance(error, BackendError):
                reason = f"the flow could not be fetched: {error}"
            retryable = isinstance(error, LauncherError) or getattr(error, "retryable", False)
            await self._end_unstarted(Outcome(State.CRASHED, reason, retryable=retryable))
        except Exception as error:
            self._log.exception("could not be started")
            reason = f"could not be started: {type(error).__name__}: {error}"
            await self._end_unstarted(Outcome(State.CRASHED, reason))
        else:
            if end is not None:
                await self._follow(end)
            else:
                await self._end_unstarted(Outcome(State.CANCELLED, self._stop_reason))

    async def resume(self) -> None:
        """Go on with an attempt that an agent of this name started before."""
        if self.directory.take_place() or "abandoned" in self.directory.status():
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

    async def _discard(self) -> None:
        """Remove the run directory, once nothing lives in it and nothing can."""
        await self._services.runner.forbid(self.directory, "not needed any more")
        await self._remove()

    async def _remove(self) -> None:
        if not self.directory.remove_own():
            await anyio.to_thread.run_sync(self.directory.remove)

    # -- start -----------------------------------------------------------------------------------------

    async def _start(self) -> int:
        services = self._services
        config = self._spec.run_config
        level = services.confinement.level(config)
        grants = services.confinement.grants(config)
        values = services.secrets.get_many(self._spec.secrets)
        backend = services.backends.get(self._spec.storage["type"])
        revision = await backend.resolve(self._spec.storage)
        with await services.sources.hold(backend, self._spec.storage, revision) as source:
            self._plan = self._planned(backend, revision, source.directory, level, grants)
            self.directory.create(self._plan, self._deadline)
            services.confinement.hand_over(self.directory.path, source.directory)
            state = await patiently(
                lambda: services.store.started(self.run_id, self.number, revision.id, level),
                self._log,
                "recording the start",
            )
            if state is State.CANCELLING:
                self.stop("cancelled before it began")
                await anyio.lowlevel.checkpoint()
            # From here on the process may live: the answer must not be lost to a cancellation in between.
            with anyio.CancelScope(shield=True):
                end = await services.runner.start(
                    self.directory,
                    level=level,
                    limits=services.confinement.limits_of(config),
                    grace=services.settings.grace,
                    interpreter=config.get("python"),
                    preload=config.get("preload") or (),
                    values=values,
                    lease_fd=source.lease,
                )
        return end

    def _planned(
        self, backend: Backend, revision: Revision, source: Path, level: str, grants: Mapping[str, Json]
    ) -> dict[str, Json]:
        """What the flow process is told: the run directory's spec."""
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
                "directory": str(source),
                "path": entry.path,
                "module": entry.module,
                "sha256": entry.sha256,
                "made_with": dict(entry.made_with),
            },
            "revision": revision.id,
            "in_place": revision.directory is not None,
            "result": spec.result,
            "env": {
                **self._services.runner.environment,
                **settings.env,
                **config.get("env", {}),
                **run.env,
            },
            "working_dir": config.get("working_dir"),
            "import_paths": [str(path) for path in settings.import_paths],
            "sandbox": level,
            "grants": dict(grants),
            "readable": self._services.confinement.readable(source),
            "bytecode": self._services.confinement.bytecode(source),
            "run_directory": self.directory.path,
        }

    # -- follow ----------------------------------------------------------------------------------------

    async def _follow(self, end: int | None) -> None:
        """Ship output until nobody supervises it any more, then record the end. ``end``: see the runner's
        ``start``; None for an attempt that an agent before this one has started."""
        services = self._services
        if self._stop_reason is not None:  # asked for while it was being started
            services.runner.stop(self.directory, self._stop_reason, services.settings.grace)
        try:
            start = 0
            if end is None:
                asked = partial(services.store.shipped, self.run_id, self.number)
                start = await patiently(asked, self._log, "asking for the offset")
            shipper = self._shipper(start)
            status: dict[str, Any] = {}
            with services.lookout.watching(shipper) as watched:
                status = await services.runner.wait(self.directory, end)
            await rest(watched)
            if "ended" not in status:
                killed = services.runner.reap(self.directory, self.run_id, self.number)
                self._log.warning("the supervisor was killed", leftovers=killed)
            chunks, tasks = await shipper.drain()
        except LeaseLostError:
            self.lose()
            await self._discard()
        else:
            await self._conclude(shipper, status, chunks, tasks)

    def _shipper(self, start: int) -> Shipper:
        services = self._services
        values: Mapping[str, str] = {}
        try:
            values = services.secrets.get_many(self._spec.secrets)
        except FlowagentError as error:
            self._log.warning("secrets are gone: the output cannot be redacted", error=str(error))
        return Shipper(
            services.store,
            services.backends,
            self.directory,
            self.run_id,
            self.number,
            self._spec,
            Redactor(values.values()),
            self._log,
            start,
        )

    async def _conclude(
        self,
        shipper: Shipper,
        status: Mapping[str, Any],
        chunks: Sequence[OutputChunk],
        tasks: Sequence[TaskRun],
    ) -> None:
        outcome = outcome_of(status)
        if outcome.reason is not None:
            outcome = replace(outcome, reason=shipper.clean(outcome.reason))
        if shipper.loaded_sha256 is not None:
            outcome = replace(outcome, revision=self._loaded_revision(shipper.loaded_sha256))
        await self._record(outcome, chunks, tasks)
        shipper.recorded()
        # A supervisor notes the end when nothing else lives; the flow could have written that as well.
        if "ended" in status and self.directory.supervisor() is None:
            await self._remove()
        else:
            await self._discard()

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
        again = {"next": "scheduled again"} if run.state is State.SCHEDULED else {}
        self._log.info(str(outcome.state), **({"reason": outcome.reason} if outcome.reason else {}), **again)


def lost(held: Mapping[tuple[str, int], Held], attempts: Mapping[tuple[str, int], Attempt]) -> list[Attempt]:
    """The attempts that we thought ours and the store does not."""
    return [attempt for key, attempt in attempts.items() if key not in held]

"""What every store offers: one async protocol, whatever database or server is behind it.

All methods raise :class:`~flowagent.errors.StoreUnavailableError` when the store cannot be reached, and
:class:`~flowagent.errors.StoreError` for what a retry cannot mend. A write that returned has survived:
it is on disk (SQLite: WAL with synchronous=FULL), so neither ``kill -9`` nor a power cut undoes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from flowagent.models import (
    AgentInfo,
    Attempt,
    Claims,
    FlowSpec,
    FlowVersion,
    Held,
    Outcome,
    OutputChunk,
    Registration,
    Run,
    RunRequest,
    State,
    TaskRun,
)

WORK = "work"
"""Doorbell topic: a run may be due. Agents with room listen to it."""
CANCEL = "cancel"
"""Doorbell topic: an attempt is to be cancelled. Agents answer with a renewal, which says which."""


def progress(run_id: str) -> str:
    """The doorbell topic of one run: rung when its state changes or output arrives."""
    return f"run-{run_id}"


class Doorbell(Protocol):
    """A wake-up that another process can ring. A hint only: callers poll as well, with jitter."""

    async def wait(self, timeout: float) -> bool:
        """Wait until rung, at most ``timeout`` seconds; whether it was. Rings are coalesced."""
        ...


class Store(Protocol):
    """Registry and queue."""

    url: str
    """Where it is, without credentials: safe to print."""

    async def close(self) -> None: ...

    async def ping(self) -> None:
        """Raise :class:`StoreUnavailableError` unless a statement can be answered now."""
        ...

    async def clock(self) -> float:
        """The time by the store's clock: runs are due by it. Seconds since the epoch."""
        ...

    def doorbell(self, *topics: str) -> AbstractAsyncContextManager[Doorbell]:
        """Listen to topics for as long as the context is open."""
        ...

    async def ring(self, topic: str) -> None:
        """Wake all that listen to the topic, now. Never raises: polling is the fallback."""
        ...

    # -- flows ---------------------------------------------------------------------------------------

    async def register(self, spec: FlowSpec, content_hash: str) -> Registration:
        """Make this content the current version of the flow ``spec.name``, creating both if needed.

        The same content is the same version: nothing is written when it is current already."""
        ...

    async def flows(self) -> list[FlowVersion]:
        """The current version of every flow, by name."""
        ...

    async def flow(self, name: str) -> FlowVersion:
        """The current version. :raises NotFoundError: naming near matches."""
        ...

    async def version(self, version_id: int) -> FlowVersion: ...

    async def versions(self, name: str) -> list[FlowVersion]:
        """All versions of a flow, newest first."""
        ...

    # -- runs ----------------------------------------------------------------------------------------

    async def create_run(self, request: RunRequest) -> tuple[Run, bool]:
        """Insert a run and ring :data:`WORK`. A known idempotency key answers that run and False."""
        ...

    async def run(self, id_or_prefix: str) -> Run:
        """One run by its id or a unique prefix of it. :raises NotFoundError: unknown or ambiguous."""
        ...

    async def runs(
        self, *, flow: str | None = None, states: Sequence[State] = (), limit: int = 50
    ) -> list[Run]:
        """Newest first."""
        ...

    async def attempts(self, run_id: str) -> list[Attempt]:
        """In order."""
        ...

    async def task_runs(self, run_id: str, attempt: int) -> list[TaskRun]: ...

    async def cancel(self, run_id: str, reason: str) -> Run:
        """Ask for the end of a run: a scheduled one is cancelled at once, a live one becomes cancelling.

        Rings :data:`CANCEL` and the run's progress.

        :raises UsageError: the run has ended already."""
        ...

    async def output(self, run_id: str, attempt: int, start: int, limit: int = 1 << 20) -> list[OutputChunk]:
        """Chunks from the one that begins at raw offset ``start`` on, about ``limit`` bytes in all."""
        ...

    # -- agents --------------------------------------------------------------------------------------

    async def announce(self, agent: AgentInfo) -> None:
        """Insert or refresh an agent. :raises UsageError: another live one on another host has the name."""
        ...

    async def agents(self) -> list[AgentInfo]:
        """All agents known, most recently seen first; ``running`` counts the attempts they hold."""
        ...

    async def depart(self, name: str) -> None:
        """The agent stopped in good order: it is shown no longer."""
        ...

    # -- the path of an attempt; statements are few and batched -----------------------------------------

    async def claim(self, agent: AgentInfo, capacity: int, lease: float) -> Claims:
        """Lease up to ``capacity`` due runs whose labels this agent carries, oldest due first.

        Each becomes a new pending attempt; no other claim can get it. Cost is flat in the queue length."""
        ...

    async def next_due(self, agent: AgentInfo) -> float | None:
        """When the next run that this agent could take is due; None: there is none scheduled."""
        ...

    async def renew(self, agent: str, lease: float) -> list[Held]:
        """Extend every live lease of the agent by ``lease`` seconds from now, in one statement, and list
        them: what is missing from the list was lost; cancelling ones are to be stopped."""
        ...

    async def started(self, run_id: str, attempt: int, revision: str, sandbox: str) -> State:
        """Pending becomes running. Returns the state now held: running, or cancelling if cancelled meanwhile.

        :raises LeaseLostError: the attempt is not held any more; nothing may be executed."""
        ...

    async def append(
        self, run_id: str, attempt: int, chunks: Sequence[OutputChunk], tasks: Sequence[TaskRun] = ()
    ) -> None:
        """Add output and task states in one transaction; repeating it changes nothing.

        :raises LeaseLostError: the attempt is not held any more."""
        ...

    async def shipped(self, run_id: str, attempt: int) -> int:
        """How many raw bytes of the attempt's output the store has."""
        ...

    async def finish(
        self,
        run_id: str,
        attempt: int,
        outcome: Outcome,
        chunks: Sequence[OutputChunk] = (),
        tasks: Sequence[TaskRun] = (),
    ) -> Run:
        """End the attempt, and the run with it unless retries are left: then it is scheduled again.

        The last of its output and task states is added in the same transaction, as by :meth:`append`.
        ``outcome.revision``, if given, replaces the one recorded at the start.

        :raises LeaseLostError: the attempt is not held any more."""
        ...

    async def release(self, run_id: str, attempt: int, reason: str, delay: float = 0.0) -> Run:
        """Give an attempt back of which nothing was executed: scheduled again, no retry is used up.

        Only the agent can know that of a running one, whose start it recorded but never made."""
        ...

    async def expire(self) -> list[Run]:
        """End every attempt whose lease ran out, of any agent.

        Pending ones are scheduled again (crashed after 10 such losses); running ones are crashed
        with the reason "lease lost: ...", and scheduled again if retries are left; cancelling ones are
        cancelled.
        """
        ...

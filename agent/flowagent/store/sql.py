"""The store on a database: implements the :class:`~flowagent.store.protocol.Store` protocol."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

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
from flowagent.store import agents, attempts, flows, runs
from flowagent.store.database import Database
from flowagent.store.protocol import Doorbell


class SQLStore:
    """Each method is one transaction. What the methods do is said in the protocol."""

    def __init__(self, database: Database) -> None:
        self.url = database.url
        self.database = database
        self._known = attempts.Known()

    async def close(self) -> None:
        await self.database.close()

    async def ping(self) -> None:
        await self.database.check()

    async def clock(self) -> float:
        ((now,),) = await self.database.read(lambda tx: tx.execute("SELECT :now"))
        return float(now)

    def doorbell(self, *topics: str) -> AbstractAsyncContextManager[Doorbell]:
        return self.database.doorbell(topics)

    async def ring(self, topic: str) -> None:
        await self.database.ring([topic])

    # -- flows ---------------------------------------------------------------------------------------

    async def register(self, spec: FlowSpec, content_hash: str) -> Registration:
        return await self.database.write(lambda tx: flows.register(tx, spec, content_hash))

    async def flows(self) -> list[FlowVersion]:
        return await self.database.read(flows.flows)

    async def flow(self, name: str) -> FlowVersion:
        return await self.database.read(lambda tx: flows.flow(tx, name))

    async def version(self, version_id: int) -> FlowVersion:
        return await self.database.read(lambda tx: flows.version(tx, version_id))

    async def versions(self, name: str) -> list[FlowVersion]:
        return await self.database.read(lambda tx: flows.versions(tx, name))

    # -- runs ----------------------------------------------------------------------------------------

    async def create_run(self, request: RunRequest) -> tuple[Run, bool]:
        return await self.database.write(lambda tx: runs.create_run(tx, request))

    async def run(self, id_or_prefix: str) -> Run:
        return await self.database.read(lambda tx: runs.run(tx, id_or_prefix))

    async def runs(
        self, *, flow: str | None = None, states: Sequence[State] = (), limit: int = 50
    ) -> list[Run]:
        return await self.database.read(lambda tx: runs.runs(tx, flow, states, limit))

    async def attempts(self, run_id: str) -> list[Attempt]:
        return await self.database.read(lambda tx: runs.attempts(tx, run_id))

    async def task_runs(self, run_id: str, attempt: int) -> list[TaskRun]:
        return await self.database.read(lambda tx: runs.task_runs(tx, run_id, attempt))

    async def cancel(self, run_id: str, reason: str) -> Run:
        return await self.database.write(lambda tx: runs.cancel(tx, run_id, reason))

    async def output(self, run_id: str, attempt: int, start: int, limit: int = 1 << 20) -> list[OutputChunk]:
        return await self.database.read(lambda tx: runs.output(tx, run_id, attempt, start, limit))

    # -- agents --------------------------------------------------------------------------------------

    async def announce(self, agent: AgentInfo) -> None:
        await self.database.write(lambda tx: agents.announce(tx, agent))

    async def agents(self) -> list[AgentInfo]:
        return await self.database.read(agents.agents)

    async def depart(self, name: str) -> None:
        await self.database.write(lambda tx: agents.depart(tx, name))

    # -- the path of an attempt ------------------------------------------------------------------------

    async def claim(self, agent: AgentInfo, capacity: int, lease: float) -> Claims:
        known = self._known
        claims, self._known = await self.database.write(
            lambda tx: attempts.claim(tx, known, agent, capacity, lease)
        )
        return claims

    async def next_due(self, agent: AgentInfo) -> float | None:
        known = self._known
        when, self._known = await self.database.read(lambda tx: attempts.next_due(tx, known, agent))
        return when

    async def renew(self, agent: str, lease: float) -> list[Held]:
        return await self.database.write(lambda tx: attempts.renew(tx, agent, lease))

    async def started(self, run_id: str, attempt: int, revision: str, sandbox: str) -> State:
        return await self.database.write(lambda tx: attempts.started(tx, run_id, attempt, revision, sandbox))

    async def append(
        self, run_id: str, attempt: int, chunks: Sequence[OutputChunk], tasks: Sequence[TaskRun] = ()
    ) -> None:
        await self.database.write(lambda tx: attempts.append(tx, run_id, attempt, chunks, tasks))

    async def shipped(self, run_id: str, attempt: int) -> int:
        return await self.database.read(lambda tx: runs.shipped(tx, run_id, attempt))

    async def finish(
        self,
        run_id: str,
        attempt: int,
        outcome: Outcome,
        chunks: Sequence[OutputChunk] = (),
        tasks: Sequence[TaskRun] = (),
    ) -> Run:
        return await self.database.write(
            lambda tx: attempts.finish(tx, run_id, attempt, outcome, chunks, tasks)
        )

    async def release(self, run_id: str, attempt: int, reason: str, delay: float = 0.0) -> Run:
        return await self.database.write(lambda tx: attempts.release(tx, run_id, attempt, reason, delay))

    async def expire(self) -> list[Run]:
        return await self.database.write(attempts.expire)

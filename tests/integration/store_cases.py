"""What the tests of the store put into it."""

from __future__ import annotations

from flowagent.models import AgentInfo, FlowSpec, FlowVersion, Run, RunRequest
from flowagent.store import SQLStore


def spec(name: str = "flow", **changes: object) -> FlowSpec:
    return FlowSpec(name, "dag", {"type": "Local"}, {"type": "LocalRun"}, **changes)  # type: ignore[arg-type]


async def version_of(store: SQLStore, name: str = "flow") -> FlowVersion:
    return (await store.register(spec(name), f"hash of {name}")).version


async def add_run(store: SQLStore, **request: object) -> Run:
    version = await version_of(store)
    run, created = await store.create_run(RunRequest(version.version_id, **request))  # type: ignore[arg-type]
    assert created
    return run


def an_agent(name: str = "agent", labels: tuple[str, ...] = (), **changes: object) -> AgentInfo:
    known: dict[str, object] = {"host": "host", "pid": 1, "runner": "process", "limit": 8, "version": "1"}
    return AgentInfo(name, f"{name}-1", labels=labels, **{**known, **changes})  # type: ignore[arg-type]

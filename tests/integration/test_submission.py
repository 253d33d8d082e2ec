"""Asking for runs, on a real store: what a run gets from its flow, what from the request."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from flowagent.errors import FlowError, NotFoundError, UsageError
from flowagent.models import AgentInfo, FlowSpec, Run, State
from flowagent.run_configs import DockerRun, LocalRun, UniversalRun
from flowagent.storage import Module
from flowagent.store import SQLStore, open_store
from flowagent.submission import Placement, is_live, obstacle, placements, repeat, submit

SPEC = FlowSpec(
    name="etl",
    kind="dag",
    storage=Module("pkg.flows").to_json(),
    run_config=LocalRun(retries=2, retry_delay=5, env={"A": "1"}).to_json(),
    labels=("a", "b"),
    parameters=(
        {"name": "x", "required": True, "default": None},
        {"name": "y", "required": False, "default": 1},
    ),
)
AGENT = AgentInfo("one", "i", "here", 1, ("a", "b", "here"), "process", 2, "0")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLStore]:
    opened = await open_store(f"sqlite:///{tmp_path}/test.db")
    await opened.register(SPEC, "h1")
    yield opened
    await opened.close()


async def test_a_run_has_the_flows_defaults_and_the_requests_own(store: SQLStore) -> None:
    run, created = await submit(store, "etl", {"x": 1})
    assert created and run.parameters == {"x": 1}
    assert (run.labels, run.runners, run.retries_left, run.env) == (("a", "b"), ("process",), 2, {})
    run, _ = await submit(
        store, "etl", {"x": 1}, labels=["c,a"], env={"A": "2"}, retries=0, due=time.time() + 60
    )
    assert (run.labels, run.retries_left, run.env) == (("a", "b", "c"), 0, {"A": "2"})
    assert run.due > time.time() + 50


@pytest.mark.parametrize(
    ("config", "runners"), [(UniversalRun(), ()), (LocalRun(), ("process",)), (DockerRun("x"), ("docker",))]
)
async def test_the_runner_follows_from_the_run_config(
    store: SQLStore, config: UniversalRun, runners: tuple[str, ...]
) -> None:
    await store.register(replace(SPEC, run_config=config.to_json()), "h2")
    run, _ = await submit(store, "etl", {"x": 1})
    assert run.runners == runners


async def test_what_cannot_be_asked_for(store: SQLStore) -> None:
    for parameters, said in (
        ({}, "needs a value for x"),
        ({"x": 1, "z": 2}, "no parameter 'z'; it takes x, y"),
    ):
        with pytest.raises(FlowError, match=said):
            await submit(store, "etl", parameters)
    with pytest.raises(NotFoundError, match="did you mean 'etl'"):
        await submit(store, "elt", {})
    with pytest.raises(UsageError, match="white space"):
        await submit(store, "etl", {"x": 1}, labels=["a b"])
    for env in ({"A=B": "1"}, {"A": "\0"}, {"": "1"}):
        with pytest.raises(UsageError, match="cannot be set"):
            await submit(store, "etl", {"x": 1}, env=env)
    assert await store.runs() == []


async def test_one_idempotency_key_is_one_run(store: SQLStore) -> None:
    first, created = await submit(store, "etl", {"x": 1}, idempotency_key="k")
    again, created_again = await submit(store, "etl", {"x": 2}, idempotency_key="k")
    assert (created, created_again) == (True, False) and again == first


async def test_a_repetition_asks_for_the_same(store: SQLStore) -> None:
    run, _ = await submit(store, "etl", {"x": [1]}, labels=["c"], env={"A": "2"})
    with pytest.raises(UsageError, match="is scheduled; only a run that has ended"):
        await repeat(store, run)
    run = await store.cancel(run.id, "not now")
    await store.register(replace(SPEC, labels=("z",)), "h2")
    again = await repeat(store, run)
    assert again.retry_of == run.id and again.state is State.SCHEDULED and again.id != run.id
    for field in ("version_id", "parameters", "labels", "runners", "env"):
        assert getattr(again, field) == getattr(run, field)


async def _placed(store: SQLStore, agent: AgentInfo, run: Run) -> Placement:
    await store.announce(agent)
    (found,) = [placement for placement in await placements(store, run) if placement.agent.name == agent.name]
    return found


async def test_which_agent_could_take_it_and_why_not(store: SQLStore) -> None:
    run, _ = await submit(store, "etl", {"x": 1})
    assert obstacle(run, [], "here") == "no agent is running; start one with: flowagent start --labels a,b"
    able = await _placed(store, AGENT, run)
    assert able.reason is None and not able.full
    await store.claim(AGENT, 2, 30)
    await submit(store, "etl", {"x": 1})
    await store.claim(AGENT, 2, 30)
    assert (await _placed(store, AGENT, run)).full
    unable = await _placed(store, replace(AGENT, name="two", labels=("b",)), run)
    assert unable.reason == "lacks label a"
    stopping = await _placed(store, replace(AGENT, name="three", stopping=True), run)
    assert stopping.reason == "is stopping"
    cramped = await _placed(store, replace(AGENT, name="four", no_room=True), run)
    assert cramped.reason == "takes nothing new until there is room on its disk"
    assert not cramped.agent.stopping and stopping.agent.stopping and not stopping.agent.no_room
    assert (await _placed(store, replace(unable.agent, no_room=True), run)).reason == "lacks label a"
    assert obstacle(run, [able, unable, stopping], "here") is None
    said = obstacle(run, [unable, stopping], "b")
    assert said is not None
    assert "two lacks label a; three is stopping" in said and said.endswith("flowagent start --labels a")
    gone = replace(AGENT, seen=time.time() - 31)
    assert not is_live(gone, time.time())

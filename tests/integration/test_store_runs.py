"""Flows, runs and agents in the store, on both databases."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path

import anyio
import psycopg
import pytest
from store_cases import add_run, an_agent, spec, version_of

from flowagent.errors import NotFoundError, StoreError, UsageError
from flowagent.models import Outcome, Run, RunRequest, State
from flowagent.store import SQLStore, open_store

pytest_plugins = ("store_databases",)


async def test_register_new_same_changed_reverted(store: SQLStore) -> None:
    first = await store.register(spec(labels=("b", "a"), secrets=("s",)), "one")
    assert (first.created, first.previous, first.version.number, first.version.current) == (
        True,
        None,
        1,
        True,
    )
    assert first.version.spec == spec(labels=("a", "b"), secrets=("s",))
    same = await store.register(spec(), "one")
    assert (same.created, same.version, same.previous) == (False, first.version, first.version)
    changed = await store.register(spec(project="p"), "two")
    assert (changed.created, changed.version.number, changed.previous) == (True, 2, first.version)
    reverted = await store.register(spec(), "one")
    assert (reverted.created, reverted.version, reverted.previous) == (False, first.version, changed.version)
    assert await store.flow("flow") == first.version
    assert [(each.number, each.current) for each in await store.versions("flow")] == [(2, False), (1, True)]
    assert await store.version(changed.version.version_id) != changed.version  # it is not current any more


async def test_concurrent_registration_makes_one_version(store: SQLStore, url: str) -> None:
    stores = [store, *[await open_store(url) for _ in range(3)]]
    created: list[bool] = []

    async def register(own: SQLStore, content: str) -> None:
        created.append((await own.register(spec(), content)).created)

    async with anyio.create_task_group() as group:
        for number in range(16):
            group.start_soon(register, stores[number % 4], f"content {number % 2}")
    assert created.count(True) == 2
    assert [each.number for each in await store.versions("flow")] == [2, 1]
    for own in stores[1:]:
        await own.close()


async def test_flows(store: SQLStore) -> None:
    for name in ("zeta", "Alpha-Flow", "beta"):
        await version_of(store, name)
    assert sorted(each.spec.name for each in await store.flows()) == ["Alpha-Flow", "beta", "zeta"]
    with pytest.raises(NotFoundError, match="did you mean 'Alpha-Flow'"):
        await store.flow("alpha_flow")
    with pytest.raises(NotFoundError, match="flowagent flows"):
        await store.versions("q")
    with pytest.raises(NotFoundError):
        await store.version(999)
    with pytest.raises(NotFoundError):
        await store.create_run(RunRequest(999))


async def test_run_keeps_what_was_asked_for(store: SQLStore) -> None:
    parameters = {"x": [1, None, {"ü\0": "\udcff"}], "y": 1.5}
    run = await add_run(
        store, parameters=parameters, labels=("b", "a", "b"), runners=("process",), env={"K": "V"}, due=5.0,
        retries=2, retry_of="0" * 16, idempotency_key="key",
    )  # fmt: skip
    assert run == await store.run(run.id)
    assert (run.parameters, run.labels, run.runners, run.env) == (
        parameters, ("a", "b"), ("process",), {"K": "V"},
    )  # fmt: skip
    assert (run.state, run.due, run.retries_left, run.retry_of) == (State.SCHEDULED, 5.0, 2, "0" * 16)
    assert (run.flow_name, run.version, run.attempt, run.agent) == ("flow", 1, 0, None)
    assert await store.attempts(run.id) == []


async def test_idempotency_key_under_concurrency(store: SQLStore, url: str) -> None:
    stores = [store, *[await open_store(url) for _ in range(3)]]
    version = await version_of(store)
    answers: list[tuple[str, bool]] = []

    async def submit(own: SQLStore) -> None:
        run, created = await own.create_run(RunRequest(version.version_id, idempotency_key="once"))
        answers.append((run.id, created))

    async with anyio.create_task_group() as group:
        for number in range(40):
            group.start_soon(submit, stores[number % 4])
    assert len({id for id, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1
    assert len(await store.runs()) == 1
    for own in stores[1:]:
        await own.close()


async def copy_run(store: SQLStore, run: Run, ids: list[str]) -> None:
    columns = (
        "flow_id, version_id, label_set_id, state, parameters, env, due, created, attempt, losses, "
        "retries_left, retry_delay"
    )
    copy = f"INSERT INTO run (id, {columns}) SELECT :id, {columns} FROM run WHERE id = :old"
    values = [{"id": id, "old": run.id} for id in ids]
    await store.database.write(lambda tx: tx.execute_many(copy, values))


async def test_prefix(store: SQLStore) -> None:
    run = await add_run(store)
    for id in ("ab00000000000000", "abf0000000000000", "abff000000000000"):
        await copy_run(store, run, [id])
    assert (await store.run("ab0")).id == "ab00000000000000"
    assert (await store.run("abff")).id == "abff000000000000"
    with pytest.raises(NotFoundError, match="several runs begin with 'ab'"):
        await store.run("ab")
    for wrong in ("", "ac1", "AB0", "ab%", "ab_", "' OR 1=1", "é", "ab0\n", "f" * 16, "a" * 1000):
        if not run.id.startswith(wrong or "-"):
            with pytest.raises(NotFoundError, match="no run has the id"):
                await store.run(wrong)


async def test_runs(store: SQLStore) -> None:
    runs = [await add_run(store) for _ in range(6)]
    other = await version_of(store, "other")
    last, _ = await store.create_run(RunRequest(other.version_id))
    for run in runs[:3]:
        await store.cancel(run.id, "test")
    newest_first = [last.id, *[run.id for run in reversed(runs)]]
    assert [run.id for run in await store.runs()] == newest_first
    assert [run.id for run in await store.runs(limit=2)] == newest_first[:2]
    cancelled = await store.runs(states=[State.CANCELLED, State.FAILED])
    assert [run.id for run in cancelled] == newest_first[4:]
    assert [run.id for run in await store.runs(flow="flow", states=[State.SCHEDULED])] == newest_first[1:4]
    assert [run.id for run in await store.runs(flow="other")] == [last.id]
    assert await store.runs(flow="none") == []


async def test_agents(store: SQLStore) -> None:
    first = an_agent("first", ("b", "a"), require_labels=True, started=5.0)
    await store.announce(first)
    await store.announce(an_agent("second", host="elsewhere"))
    with pytest.raises(UsageError, match="'second' is alive on host 'elsewhere'"):
        await store.announce(an_agent("second"))
    await add_run(store)
    await store.claim(an_agent("second"), 1, 60)
    await store.announce(an_agent("first", ("a", "b"), require_labels=True, started=5.0, stopping=True))
    agents = await store.agents()
    assert [(each.name, each.running, each.stopping) for each in agents] == [
        ("first", 0, True),
        ("second", 1, False),
    ]
    assert (agents[0].labels, agents[0].require_labels, agents[0].limit) == (("a", "b"), True, 8)
    assert (agents[0].started, agents[0].host) == (5.0, "host")
    assert agents[0].seen >= agents[1].seen > 1e9
    await store.database.write(
        lambda tx: tx.execute("UPDATE agent SET seen = seen - 31 WHERE name = 'second'")
    )
    with pytest.raises(UsageError, match="'second' is alive"):  # silent, but it holds a lease that lives
        await store.announce(an_agent("second", host="moved"))
    await store.database.write(lambda tx: tx.execute("UPDATE attempt SET lease_expires = 1"))
    await store.announce(an_agent("second", host="moved"))
    await store.depart("first")
    assert [(each.name, each.host) for each in await store.agents()] == [("second", "moved")]


# -- the cost of a claim stays flat --------------------------------------------------------------------


async def _queue_in_front(store: SQLStore, count: int) -> None:
    """Runs that are due earlier and that the agent of these tests cannot take."""
    run = await add_run(store, labels=("unmatched",), due=1.0)
    await copy_run(store, run, [f"{number:016x}" for number in range(count)])


@pytest.mark.parametrize("kind", ["sqlite"])
async def test_unmatched_runs_in_front_cost_nothing_on_sqlite(store: SQLStore, tmp_path: Path) -> None:
    """Counts the steps of SQLite's virtual machine."""

    def steps() -> int:
        count = 0

        def step() -> None:
            nonlocal count
            count += 1

        connection = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        connection.execute("BEGIN")
        connection.set_progress_handler(step, 1)
        values = {"items": json.dumps([1, 3]), "capacity": 5, "reach": 5, "now": 1e12}
        taken = connection.execute(store.database.dialect.due_runs, values).fetchall()
        connection.close()
        assert len(taken) == 3
        return count

    await add_run(store, labels=("mine",))  # 1
    await add_run(store, labels=("unmatched",))  # 2
    for _ in range(2):
        await add_run(store)  # 3
    few = steps()
    await _queue_in_front(store, 10_000)
    assert steps() <= few + 50
    assert len(await store.claim(an_agent(labels=("mine",)), 5, 60)) == 3


@pytest.mark.parametrize("kind", ["postgresql"])
@pytest.mark.parametrize("analyzed", [True, False])
async def test_unmatched_runs_in_front_cost_nothing_on_postgresql(
    store: SQLStore, url: str, analyzed: bool
) -> None:
    """Counts the rows that the plan's scans of the queue touch."""
    mine = await add_run(store, labels=("mine",))
    await _queue_in_front(store, 10_000)
    with psycopg.connect(url, autocommit=True) as connection:
        if analyzed:
            connection.execute("ANALYZE")
        statement = store.database.dialect.due_runs
        for name, value in {"items": "'[1]'", "now": "1e12", "capacity": "5", "reach": "20"}.items():
            statement = statement.replace(f":{name}", value)
        connection.execute("BEGIN")
        explained = connection.execute("EXPLAIN (ANALYZE, FORMAT JSON) " + statement).fetchone()
        connection.execute("ROLLBACK")
    assert explained is not None

    def touched(plan: dict[str, object]) -> float:
        own = 0.0
        if plan.get("Relation Name") == "run":
            rows = float(str(plan["Actual Rows"])) + float(str(plan.get("Rows Removed by Filter", 0)))
            own = rows * float(str(plan["Actual Loops"]))
        plans = plan.get("Plans", [])
        assert isinstance(plans, list)
        return own + sum(touched(each) for each in plans)

    assert 1 <= touched(explained[0][0]["Plan"]) < 20
    assert [claim.run.id for claim in await store.claim(an_agent(labels=("mine",)), 5, 60)] == [mine.id]


async def test_a_live_run_is_found_among_many_that_ended(store: SQLStore) -> None:
    await _queue_in_front(store, 1000)
    await store.database.write(
        lambda tx: tx.execute("UPDATE run SET state = 'completed', created = created + 9")
    )
    run = await add_run(store)
    assert [each.id for each in await store.runs(states=[State.SCHEDULED, State.PENDING])] == [run.id]
    await store.claim(an_agent(), 1, 60)
    assert [each.id for each in await store.runs(states=[State.PENDING])] == [run.id]
    await store.finish(run.id, 1, Outcome(State.FAILED))


async def test_closed_store_says_so(url: str) -> None:
    store = await open_store(url)
    await store.ping()
    await store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.flows()
    await store.close()


async def test_the_clock_of_the_store(store: SQLStore) -> None:
    assert abs(await store.clock() - time.time()) < 5

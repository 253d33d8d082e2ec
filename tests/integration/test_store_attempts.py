"""The path of an attempt, on both databases: claim, lease, fencing, retries, cancellation."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import anyio
import pytest
from store_cases import add_run, an_agent, spec, version_of

from flowagent.errors import LeaseLostError, NotFoundError, StoreError, UsageError
from flowagent.models import LIVE, TRANSITIONS, Outcome, OutputChunk, Run, RunRequest, State, TaskRun
from flowagent.store import SQLStore, open_store

pytest_plugins = ("store_databases",)

SCHEDULED, PENDING, RUNNING, CANCELLING = State.SCHEDULED, State.PENDING, State.RUNNING, State.CANCELLING
COMPLETED, FAILED, CRASHED, CANCELLED = State.COMPLETED, State.FAILED, State.CRASHED, State.CANCELLED
ENDED = (COMPLETED, FAILED, CRASHED, CANCELLED)


async def bring(store: SQLStore, state: State, *, lease: float = 60, **request: object) -> Run:
    """A run in this state, with attempt 1 in it too unless it is scheduled."""
    run = await add_run(store, **request)
    if state is SCHEDULED:
        return run
    assert len(await store.claim(an_agent(), 1, lease)) == 1
    if state is not PENDING:
        await store.started(run.id, 1, "rev", "landlock")
    if state is CANCELLING:
        await store.cancel(run.id, "because")
    if state.terminal:
        await store.finish(run.id, 1, Outcome(state, "it ended", retryable=False))
    return await store.run(run.id)


async def states(store: SQLStore, run: Run) -> tuple[State, State | None]:
    attempts = await store.attempts(run.id)
    return (await store.run(run.id)).state, attempts[0].state if attempts else None


async def act(store: SQLStore, action: str, run: Run) -> None:
    match action:
        case "claim":
            await store.claim(an_agent(), 5, 60)
        case "cancel":
            await store.cancel(run.id, "because")
        case "started":
            await store.started(run.id, 1, "rev", "landlock")
        case "append":
            await store.append(run.id, 1, [OutputChunk(0, 1, b"x")])
        case "release":
            await store.release(run.id, 1, "no room")
        case "expire":
            await store.expire()
        case "renew":
            held = await store.renew("agent", 60)
            assert [each.state for each in held] == ([run.state] if run.state in LIVE else [])
        case _:
            await store.finish(run.id, 1, Outcome(State(action)))


def unless_live(**live: object) -> dict[State, object]:
    """What is expected where an attempt is not held: it is lost."""
    return dict.fromkeys((SCHEDULED, *ENDED), LeaseLostError) | {State(k): v for k, v in live.items()}


UNCHANGED = {SCHEDULED: (SCHEDULED, None)} | {
    state: (state, state) for state in State if state is not SCHEDULED
}
TABLE: dict[str, dict[State, object]] = {
    "claim": {**UNCHANGED, SCHEDULED: (PENDING, PENDING)},
    "renew": {**UNCHANGED},
    "expire": {**UNCHANGED, PENDING: (SCHEDULED, CRASHED), RUNNING: (CRASHED, CRASHED),
               CANCELLING: (CANCELLED, CANCELLED)},
    "cancel": dict.fromkeys(ENDED, UsageError) | {SCHEDULED: (CANCELLED, None)}
    | dict.fromkeys(LIVE, (CANCELLING, CANCELLING)),
    "started": unless_live(pending=(RUNNING, RUNNING), running=(RUNNING, RUNNING),
                           cancelling=(CANCELLING, CANCELLING)),
    "append": unless_live(**{state: (state, state) for state in LIVE}),
    "release": unless_live(pending=(SCHEDULED, CANCELLED), running=(SCHEDULED, CANCELLED),
                           cancelling=(CANCELLED, CANCELLED)),
    "completed": unless_live(pending=StoreError, running=(COMPLETED, COMPLETED),
                             cancelling=(COMPLETED, COMPLETED)),
    "failed": unless_live(**dict.fromkeys(LIVE, (FAILED, FAILED))),
    "crashed": unless_live(**dict.fromkeys(LIVE, (CRASHED, CRASHED))),
    "cancelled": unless_live(**dict.fromkeys(LIVE, (CANCELLED, CANCELLED))),
    **{state: dict.fromkeys(State, StoreError) for state in (SCHEDULED, *LIVE)},
}  # fmt: skip


@pytest.mark.parametrize("action", TABLE)
async def test_every_operation_in_every_state(store: SQLStore, action: str) -> None:
    assert set(TABLE[action]) == set(State)
    for state, expected in TABLE[action].items():
        run = await bring(store, state, lease=-1 if action == "expire" else 60)
        before = await states(store, run)
        if isinstance(expected, tuple):
            await act(store, action, run)
            after = await states(store, run)
            assert after == expected, state
            for old, new in zip(before, after, strict=True):
                assert old in (None, new) or new in TRANSITIONS[old]
        else:
            assert isinstance(expected, type)
            with pytest.raises(expected) as caught:
                await act(store, action, run)
            assert type(caught.value) is expected, state
            assert "\n" not in str(caught.value)
            assert await states(store, run) == before, state
        if (await store.run(run.id)).state not in ENDED:  # out of the way of the next
            await store.cancel(run.id, "test")
            if (await store.run(run.id)).state is CANCELLING:
                await store.finish(run.id, 1, Outcome(CANCELLED))


@pytest.mark.parametrize("ended", [FAILED, CRASHED])
@pytest.mark.parametrize("state", [PENDING, RUNNING])
async def test_retries(store: SQLStore, state: State, ended: State) -> None:
    run = await bring(store, state, retries=1, retry_delay=100.0)
    again = await store.finish(run.id, 1, Outcome(ended, "boom"))
    assert (again.state, again.retries_left, again.reason, again.ended) == (SCHEDULED, 0, "boom", None)
    assert (await store.attempts(run.id))[0].state is ended
    assert again.due - run.due > 99
    assert await store.claim(an_agent(), 1, 60) == []
    assert await store.next_due(an_agent()) == again.due


async def test_retries_end(store: SQLStore) -> None:
    run = await bring(store, RUNNING, retries=1)
    await store.finish(run.id, 1, Outcome(FAILED, "first"))
    (claim,) = await store.claim(an_agent(), 1, 60)
    assert (claim.run.id, claim.attempt, claim.run.reason) == (run.id, 2, None)
    await store.started(run.id, 2, "rev", "landlock")
    ended = await store.finish(run.id, 2, Outcome(FAILED, "second"))
    assert (ended.state, ended.reason, ended.attempt) == (FAILED, "second", 2)
    assert [each.reason for each in await store.attempts(run.id)] == ["first", "second"]


async def test_no_retry_when_it_cannot_help_or_is_not_wanted(store: SQLStore) -> None:
    run = await bring(store, RUNNING, retries=3)
    assert (await store.finish(run.id, 1, Outcome(FAILED, retryable=False))).state is FAILED
    run = await bring(store, CANCELLING, retries=3)
    assert (await store.finish(run.id, 1, Outcome(CRASHED))).state is CRASHED
    run = await bring(store, RUNNING, retries=3)
    assert (await store.finish(run.id, 1, Outcome(COMPLETED))).state is COMPLETED
    run = await bring(store, CANCELLING, retries=3, lease=-1)
    assert [each.state for each in await store.expire()] == [CANCELLED]


async def test_release_and_loss_before_the_start_use_no_retry(store: SQLStore) -> None:
    run = await bring(store, PENDING, retries=1)
    released = await store.release(run.id, 1, "no room", 50)
    assert (released.state, released.retries_left) == (SCHEDULED, 1)
    assert released.due - run.due > 49
    run = await bring(store, PENDING, retries=1, lease=-1)
    (lost,) = await store.expire()
    assert (lost.id, lost.state, lost.retries_left) == (run.id, SCHEDULED, 1)


async def test_a_run_that_is_always_lost_crashes(store: SQLStore) -> None:
    run = await add_run(store, retries=5)
    for number in range(1, 11):
        (claim,) = await store.claim(an_agent(), 1, -1)
        assert claim.attempt == number
        (lost,) = await store.expire()
    assert (lost.id, lost.state) == (run.id, CRASHED)
    assert "lease lost" in str(lost.reason)


async def test_running_attempt_that_is_lost_is_retried_with_a_new_token(store: SQLStore) -> None:
    run = await bring(store, RUNNING, lease=-1, retries=1)
    (lost,) = await store.expire()
    assert (lost.state, lost.retries_left) == (SCHEDULED, 0)
    assert str(lost.reason).startswith("lease lost: ")
    assert await store.expire() == []
    other = an_agent("other")
    (claim,) = await store.claim(other, 1, 60)
    assert claim.attempt == 2
    for stale in (
        store.append(run.id, 1, [OutputChunk(0, 5, b"stale")], [TaskRun(run.id, 1, "t", "running")]),
        store.finish(run.id, 1, Outcome(COMPLETED)),
        store.started(run.id, 1, "rev", "landlock"),
        store.release(run.id, 1, "no"),
    ):
        with pytest.raises(LeaseLostError):
            await stale
    assert await store.renew("agent", 60) == []
    assert [(held.run_id, held.attempt) for held in await store.renew("other", 60)] == [(run.id, 2)]
    assert (await store.run(run.id)).state is PENDING
    assert await store.output(run.id, 1, 0) == []
    assert await store.task_runs(run.id, 1) == []


async def test_renewal_keeps_a_lease(store: SQLStore) -> None:
    runs = [await bring(store, PENDING, lease=-1) for _ in range(3)]
    held = await store.renew("agent", 60)
    assert {(each.run_id, each.attempt) for each in held} == {(run.id, 1) for run in runs}
    claimed = (await store.attempts(runs[0].id))[0].claimed
    assert all(59 < each.lease_expires - claimed < 70 for each in held)
    assert await store.expire() == []
    assert await store.renew("stranger", 60) == []


async def test_cancel_is_told_to_the_holder(store: SQLStore) -> None:
    run = await bring(store, RUNNING)
    await store.cancel(run.id, "asked by somebody")
    (held,) = await store.renew("agent", 60)
    assert (held.state, held.reason) == (CANCELLING, "asked by somebody")
    ended = await store.finish(run.id, 1, Outcome(CANCELLED))
    assert (ended.state, ended.reason) == (CANCELLED, "asked by somebody")
    with pytest.raises(NotFoundError):
        await store.cancel("0" * 16, "nobody")


async def test_cancelled_between_claim_and_start(store: SQLStore) -> None:
    run = await bring(store, PENDING)
    await store.cancel(run.id, "too late")
    assert await store.started(run.id, 1, "rev", "landlock") is CANCELLING


async def test_outcome_is_recorded(store: SQLStore) -> None:
    run = await bring(store, RUNNING)
    outcome = Outcome(CRASHED, "killed\0 by \udce9\nsignal", 1, 9, 3 << 33, 1.5, "in fact")
    ended = await store.finish(run.id, 1, outcome)
    assert ended.started is not None and ended.ended is not None and ended.ended >= ended.started
    (attempt,) = await store.attempts(run.id)
    assert (attempt.exit_code, attempt.signal, attempt.peak_memory, attempt.cpu_time) == (1, 9, 3 << 33, 1.5)
    assert (attempt.revision, attempt.sandbox, attempt.agent) == ("in fact", "landlock", "agent")
    assert attempt.reason == ended.reason == "killed\N{REPLACEMENT CHARACTER} by ?\nsignal"


async def test_the_end_comes_with_the_last_output(store: SQLStore) -> None:
    run = await bring(store, RUNNING)
    done = TaskRun(run.id, 1, "a", "completed", None, 1, 1.0, 3.0)
    await store.append(run.id, 1, [OutputChunk(0, 5, b"first")])
    await store.finish(run.id, 1, Outcome(COMPLETED), [OutputChunk(5, 9, b"last")], [done])
    assert await store.output(run.id, 1, 0) == [OutputChunk(0, 5, b"first"), OutputChunk(5, 9, b"last")]
    assert await store.task_runs(run.id, 1) == [done]
    with pytest.raises(LeaseLostError):
        await store.finish(run.id, 1, Outcome(COMPLETED), [OutputChunk(9, 10, b"!")], [])
    assert await store.shipped(run.id, 1) == 9


async def test_a_claim_tells_when_the_next_run_is_due(store: SQLStore) -> None:
    assert (await store.claim(an_agent(), 5, 60)).next_due is None
    await add_run(store)
    late = await add_run(store, due=time.time() + 3600)
    await add_run(store, labels=("other",))
    claims = await store.claim(an_agent(), 2, 60)
    assert (len(claims), claims.next_due) == (1, late.due)
    claims = await store.claim(an_agent(), 2, 60)
    assert (len(claims), claims.next_due) == (0, late.due)


async def test_claims_of_several_versions_get_their_own_specs(
    store: SQLStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowagent.store.attempts.MOST_SPECS", 2)
    names = ["a", "b", "c", "a", "c", "b"]
    for name in names:
        version = await version_of(store, name)
        await store.create_run(RunRequest(version.version_id))
    claims = [*await store.claim(an_agent(), 4, 60), *await store.claim(an_agent(), 4, 60)]
    assert sorted(claim.run.flow_name for claim in claims) == sorted(names)
    assert [claim.spec.name for claim in claims] == [claim.run.flow_name for claim in claims]
    changed = await store.register(replace(spec("a"), labels=("new",)), "changed")
    await store.create_run(RunRequest(changed.version.version_id))
    (claim,) = await store.claim(an_agent(), 4, 60)
    assert claim.spec.labels == ("new",)


async def test_output_and_tasks(store: SQLStore) -> None:
    run = await bring(store, RUNNING)
    chunks = [
        OutputChunk(0, 10, b"0123456789"),
        OutputChunk(10, 12, b"\xff\x00"),
        OutputChunk(12, 20, b"***"),
    ]
    tasks = [
        TaskRun(run.id, 1, "a", "running", started=1.0),
        TaskRun(run.id, 1, "b[3]", "running", started=2.0),
    ]
    await store.append(run.id, 1, chunks[:2], tasks)
    await store.append(run.id, 1, chunks[:2], tasks)  # repeating changes nothing
    done = TaskRun(run.id, 1, "a", "completed", None, 2, 1.0, 3.0, {"file": "x"})
    await store.append(run.id, 1, chunks[2:], [done])
    assert await store.output(run.id, 1, 0) == chunks
    assert await store.output(run.id, 1, 10) == chunks[1:]
    assert await store.output(run.id, 1, 0, 5) == chunks[:1]
    assert await store.output(run.id, 1, 20) == []
    assert await store.shipped(run.id, 1) == 20
    assert await store.task_runs(run.id, 1) == [done, tasks[1]]
    await store.append(run.id, 1, [OutputChunk(25, 30, b"after a gap")])
    assert await store.shipped(run.id, 1) == 20
    await store.append(run.id, 1, [OutputChunk(20, 22, b"ab")])
    await store.append(run.id, 1, [OutputChunk(20, 25, b"abcde")])  # sent again, grown meanwhile
    assert await store.shipped(run.id, 1) == 30
    assert (await store.output(run.id, 1, 20))[0].data == b"abcde"


async def test_claim_takes_the_oldest_due_first(store: SQLStore) -> None:
    now = (await add_run(store)).due
    late = await add_run(store, due=now + 1000)
    due = [(await add_run(store, due=now - age, labels=(f"label{age % 3}",))).id for age in range(1, 8)]
    agent = an_agent(labels=("label0", "label1", "label2"))
    claims = await store.claim(agent, 5, 60)
    assert [claim.run.id for claim in claims] == due[:1:-1]
    assert [claim.attempt for claim in claims] == [1] * 5
    assert claims[0].spec == (await store.flow("flow")).spec
    assert len(await store.claim(agent, 5, 60)) == 3
    assert await store.claim(agent, 5, 60) == []
    assert await store.claim(agent, 0, 60) == []
    assert await store.next_due(agent) == late.due
    assert (await store.agents()) == []


@pytest.mark.parametrize(
    ("labels", "runners", "agent_labels", "runner", "require", "taken"),
    [
        ((), (), (), "process", False, True),
        ((), (), ("a",), "process", True, False),
        (("a",), (), ("a",), "process", True, True),
        (("a",), (), ("a", "b"), "process", False, True),
        (("a", "b"), (), ("a",), "process", False, False),
        (("a",), (), (), "process", False, False),
        (("a",), (), ("A",), "process", False, False),
        ((), ("docker",), (), "process", False, False),
        ((), ("docker", "process"), (), "process", False, True),
        (("a",), ("docker",), ("a",), "docker", False, True),
    ],
)
async def test_which_agent_takes_which_run(
    store: SQLStore,
    labels: tuple[str, ...],
    runners: tuple[str, ...],
    agent_labels: tuple[str, ...],
    runner: str,
    require: bool,
    taken: bool,
) -> None:
    run = await add_run(store, labels=labels, runners=runners)
    agent = an_agent(labels=agent_labels, runner=runner, require_labels=require)
    assert (await store.next_due(agent) is not None) == taken
    assert [claim.run.id for claim in await store.claim(agent, 5, 60)] == [run.id] * taken


async def test_new_label_sets_are_noticed(store: SQLStore, url: str) -> None:
    other = await open_store(url)
    for name in ("one", "two", "three"):
        agent = an_agent(labels=(name,))
        assert await store.claim(agent, 5, 60) == []
        await add_run(other, labels=(name,))
        assert len(await store.claim(agent, 5, 60)) == 1
    await other.close()


@pytest.mark.parametrize("claimers", [2, 8])
async def test_no_run_is_claimed_twice(store: SQLStore, url: str, claimers: int) -> None:
    version = await version_of(store)
    runs = 500
    labels = itertools.cycle([(), ("a",), ("b",), ("a", "b")])
    ids: set[str] = set()

    async def submit(labels: tuple[str, ...]) -> None:
        ids.add((await store.create_run(RunRequest(version.version_id, labels=labels)))[0].id)

    async with anyio.create_task_group() as group:
        for _ in range(runs):
            group.start_soon(submit, next(labels))
    claimed: list[tuple[str, int]] = []

    async def claimer(name: str) -> None:
        own = await open_store(url)
        agent = an_agent(name, labels=("a", "b"))
        while len(claimed) < runs:
            claimed.extend((each.run.id, each.attempt) for each in await own.claim(agent, 3, 60))
        await own.close()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            for number in range(claimers):
                group.start_soon(claimer, f"agent{number}")
    assert len(claimed) == runs
    assert set(claimed) == {(id, 1) for id in ids}


async def test_concurrent_ends_of_one_attempt_are_one_end(store: SQLStore, url: str) -> None:
    stores = [store, *[await open_store(url) for _ in range(3)]]
    for _ in range(10):
        run = await bring(store, RUNNING, retries=1, lease=-1)
        ends: list[str] = []

        async def end(own: SQLStore, way: int, run: Run = run, ends: list[str] = ends) -> None:
            try:
                if way % 3 == 0:
                    await own.finish(run.id, 1, Outcome(FAILED, "boom"))
                elif way % 3 == 1 and not await own.expire():
                    return
                elif way % 3 == 2:
                    await own.cancel(run.id, "stop")
                    return
            except (LeaseLostError, UsageError):
                return
            ends.append(run.id)

        async with anyio.create_task_group() as group:
            for way in range(8):
                group.start_soon(end, stores[way % 4], way)
        assert len(ends) == 1
        now, attempt = await states(store, run)
        assert now in (SCHEDULED, CANCELLED, FAILED)
        assert attempt in ENDED
        if now is SCHEDULED:
            await store.cancel(run.id, "test")
    for own in stores[1:]:
        await own.close()

"""Operations on the path of an attempt: claimed, started, fed, ended. Its number is its fencing token.

An attempt belongs to its agent while its state is live. A lease that ran out is lost when :func:`expire` ends
the attempt; before that nobody else can have claimed the run, and the agent may still renew it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flowagent.errors import LeaseLostError, StoreError
from flowagent.models import (
    LIVE,
    AgentInfo,
    Claim,
    Claims,
    FlowSpec,
    Held,
    Outcome,
    OutputChunk,
    Run,
    State,
    TaskRun,
)
from flowagent.store import rows
from flowagent.store.database import Row, Transaction
from flowagent.store.flows import specs as read_specs
from flowagent.store.labelsets import LabelSets
from flowagent.store.protocol import WORK, progress
from flowagent.store.runs import existing
from flowagent.store.states import IS_LIVE, move_attempt, move_run, within

MOST_LOSSES = 10
"""How often a run may be lost before it started; then something about it kills agents."""
MOST_SPECS = 1000
"""Flow versions whose specs are kept in memory."""

# -- claiming ------------------------------------------------------------------------------------------

_ATTEMPT = """
    INSERT INTO attempt (run_id, number, state, agent, lease_expires, claimed)
    SELECT id, attempt, 'pending', :agent, :now + :lease, :now
    FROM run WHERE id IN (SELECT value FROM {each})"""
_CLAIMED = """
    SELECT {columns}, a.lease_expires {tables}
    WHERE r.id IN (SELECT value FROM {each}) ORDER BY r.due, r.id"""


class Known(NamedTuple):
    """What never changes in a store, as of some transaction: to be kept after its commit, and only then."""

    sets: LabelSets = LabelSets()
    specs: Mapping[int, FlowSpec] = {}  # by version id

    def with_versions(self, tx: Transaction, wanted: set[int]) -> Known:
        new = wanted - self.specs.keys()
        if not new:
            return self
        kept = self.specs if len(self.specs) + len(new) <= MOST_SPECS else {}
        return self._replace(specs={**kept, **read_specs(tx, wanted - kept.keys())})


def claim(
    tx: Transaction, known: Known, agent: AgentInfo, capacity: int, lease: float
) -> tuple[Claims, Known]:
    known = known._replace(sets=known.sets.refreshed(tx))
    items = known.sets.served_by(agent)
    if capacity <= 0 or items == "[]":
        return Claims(), known
    due = _due_runs(tx, items, capacity)
    claims = Claims()
    if due:
        for run_id in due:
            move_run(tx, run_id, State.PENDING, "attempt = attempt + 1, reason = NULL")
            tx.ring(progress(run_id))
        each = tx.dialect.each
        values = {"items": rows.to_json(due), "agent": agent.name, "lease": lease}
        tx.execute(_ATTEMPT.format(each=each), values)
        statement = _CLAIMED.format(columns=rows.RUN_COLUMNS, tables=rows.RUN_TABLES, each=each)
        runs = [(rows.run(tuple(columns)), until) for *columns, until in tx.execute(statement, values)]
        known = known.with_versions(tx, {run.version_id for run, _ in runs})
        claims += (Claim(run, run.attempt, until, known.specs[run.version_id]) for run, until in runs)
    if len(due) < capacity:
        ((claims.next_due,),) = tx.execute(_next_due(tx), {"items": items})
    return claims, known


def _due_runs(tx: Transaction, items: str, capacity: int) -> list[str]:
    """Ids of the first due runs of these label sets, locked."""
    reach = capacity
    while True:
        reach *= 4  # where others claim at the same time, look further than they do
        found = tx.execute(tx.dialect.due_runs, {"items": items, "capacity": capacity, "reach": reach})
        if found or not tx.dialect.skips or reach > 64 * capacity or not _any_due(tx, items):
            return [id for (id,) in found]


def _any_due(tx: Transaction, items: str) -> bool:
    (when, now) = tx.execute(f"SELECT ({_next_due(tx)}), :now", {"items": items})[0]
    return when is not None and when <= now


def next_due(tx: Transaction, known: Known, agent: AgentInfo) -> tuple[float | None, Known]:
    """When the next run is due that the agent can take."""
    known = known._replace(sets=known.sets.refreshed(tx))
    ((when,),) = tx.execute(_next_due(tx), {"items": known.sets.served_by(agent)})
    return when, known


def _next_due(tx: Transaction) -> str:
    return (
        f"SELECT MIN((SELECT r.due FROM run r WHERE {within([State.SCHEDULED], 'r.state')} "  # noqa: S608
        f"AND r.label_set_id = CAST(item.value AS INTEGER) ORDER BY r.due LIMIT 1)) FROM {tx.dialect.each}"
    )


# -- holding ---------------------------------------------------------------------------------------------


def renew(tx: Transaction, agent: str, lease: float) -> list[Held]:
    renewed = tx.execute(
        f"UPDATE attempt SET lease_expires = :now + :lease WHERE agent = :agent AND {IS_LIVE} "  # noqa: S608
        f"RETURNING run_id, number, state, reason, lease_expires",
        {"agent": agent, "lease": lease},
    )
    return [Held(id, number, State(state), why, until) for id, number, state, why, until in renewed]


class _Hold(NamedTuple):
    """A live attempt, locked together with its run."""

    run_id: str
    number: int
    state: State
    agent: str
    retries_left: int
    retry_delay: float
    losses: int


_HOLD = """
    SELECT r.id, a.number, a.state, a.agent, r.retries_left, r.retry_delay, r.losses
    FROM run r JOIN attempt a ON a.run_id = r.id WHERE """


def _hold(tx: Transaction, run_id: str, attempt: int) -> _Hold:
    """:raises LeaseLostError: the attempt is not held any more."""
    found = tx.execute(
        f"{_HOLD} r.id = :run_id AND a.number = :attempt{tx.dialect.locked}",
        {"run_id": run_id, "attempt": attempt},
    )
    if not found:
        raise LeaseLostError(f"run {run_id} has no attempt {attempt}; nothing may be written for it")
    held = _read_hold(found[0])
    if not held.state.live:
        raise LeaseLostError(
            f"attempt {attempt} of run {run_id} is held no longer, it is {held.state}; "
            f"nothing more may be written for it"
        )
    return held


def _read_hold(row: Row) -> _Hold:
    run_id, number, state, *rest = row
    return _Hold(run_id, number, State(state), *rest)


def started(tx: Transaction, run_id: str, attempt: int, revision: str, sandbox: str) -> State:
    held = _hold(tx, run_id, attempt)
    if held.state is State.PENDING:
        move_attempt(
            tx, run_id, attempt, State.RUNNING,
            "started = :now, revision = :revision, sandbox = :sandbox",
            revision=rows.clean(revision), sandbox=sandbox,
        )  # fmt: skip
        move_run(tx, run_id, State.RUNNING, "started = COALESCE(started, :now)")
        tx.ring(progress(run_id))
        return State.RUNNING
    return held.state  # cancelled meanwhile; or running: the answer to the first call was lost


# a chunk sent again may have grown meanwhile
_OUTPUT = """
    INSERT INTO output (run_id, attempt, start, stop, data) VALUES (:run_id, :attempt, :start, :stop, :data)
    ON CONFLICT (run_id, attempt, start) DO UPDATE SET stop = excluded.stop, data = excluded.data
    WHERE excluded.stop > output.stop"""
_TASK = """
    INSERT INTO task_run (run_id, attempt, task, state, reason, tries, started, ended, result)
    VALUES (:run_id, :attempt, :task, :state, :reason, :tries, :started, :ended, :result)
    ON CONFLICT (run_id, attempt, task) DO UPDATE SET state = excluded.state, reason = excluded.reason,
        tries = excluded.tries, started = COALESCE(excluded.started, task_run.started),
        ended = excluded.ended, result = COALESCE(excluded.result, task_run.result)"""


def append(
    tx: Transaction, run_id: str, attempt: int, chunks: Sequence[OutputChunk], tasks: Sequence[TaskRun]
) -> None:
    _hold(tx, run_id, attempt)
    _add(tx, run_id, attempt, chunks, tasks)
    tx.ring(progress(run_id))


def _add(
    tx: Transaction, run_id: str, attempt: int, chunks: Sequence[OutputChunk], tasks: Sequence[TaskRun]
) -> None:
    key = {"run_id": run_id, "attempt": attempt}
    if chunks:
        tx.execute_many(
            _OUTPUT, [{**key, "start": each.start, "stop": each.stop, "data": each.data} for each in chunks]
        )
    if tasks:
        tx.execute_many(_TASK, [{**key, **_task_values(each)} for each in tasks])


def _task_values(task: TaskRun) -> dict[str, object]:
    return {
        "task": rows.clean(task.task),
        "state": rows.clean(task.state),
        "reason": rows.clean(task.reason),
        "tries": task.tries,
        "started": task.started,
        "ended": task.ended,
        "result": None if task.result is None else rows.to_json(task.result),
    }


# -- ending ----------------------------------------------------------------------------------------------


def finish(
    tx: Transaction,
    run_id: str,
    attempt: int,
    outcome: Outcome,
    chunks: Sequence[OutputChunk],
    tasks: Sequence[TaskRun],
) -> Run:
    if not outcome.state.terminal:
        raise StoreError(f"attempt {attempt} of run {run_id} cannot end as {outcome.state}")
    held = _hold(tx, run_id, attempt)
    _add(tx, run_id, attempt, chunks, tasks)
    _end_attempt(tx, held, outcome)
    if outcome.state in (State.FAILED, State.CRASHED) and outcome.retryable and _may_retry(held):
        _reschedule(tx, held, outcome.reason, delay=held.retry_delay, retries=1)
    else:
        _end_run(tx, held, outcome.state, outcome.reason)
    return existing(tx, run_id)


def release(tx: Transaction, run_id: str, attempt: int, reason: str, delay: float) -> Run:
    held = _hold(tx, run_id, attempt)
    if held.state is State.CANCELLING:
        _end_attempt(tx, held, Outcome(State.CANCELLED))
        _end_run(tx, held, State.CANCELLED, None)
    else:
        _end_attempt(tx, held, Outcome(State.CANCELLED, reason))
        _reschedule(tx, held, reason, delay=delay)
    return existing(tx, run_id)


def expire(tx: Transaction) -> list[Run]:
    ran_out = f"{within(LIVE, 'a.state')} AND a.lease_expires < :now"
    found = tx.execute(f"{_HOLD} {ran_out} ORDER BY a.lease_expires{tx.dialect.locked_free}")
    lost = [_read_hold(row) for row in found]
    for held in lost:
        _lose(tx, held)
    return [existing(tx, held.run_id) for held in lost]


def _lose(tx: Transaction, held: _Hold) -> None:
    """End an attempt of an agent that let its lease run out."""
    reason = f"lease lost: agent {held.agent} did not renew it in time"
    if held.state is State.CANCELLING:
        _end_attempt(tx, held, Outcome(State.CANCELLED))
        _end_run(tx, held, State.CANCELLED, None)
        return
    _end_attempt(tx, held, Outcome(State.CRASHED, reason))
    if held.state is State.PENDING and held.losses + 1 < MOST_LOSSES:
        _reschedule(tx, held, reason, losses=1)
    elif held.state is State.PENDING:
        _end_run(tx, held, State.CRASHED, f"{reason}, the {MOST_LOSSES}th loss before the run could start")
    elif _may_retry(held):
        _reschedule(tx, held, reason, delay=held.retry_delay, retries=1)
    else:
        _end_run(tx, held, State.CRASHED, reason)


def _may_retry(held: _Hold) -> bool:
    return held.retries_left > 0 and held.state is not State.CANCELLING


def _end_attempt(tx: Transaction, held: _Hold, outcome: Outcome) -> None:
    move_attempt(
        tx, held.run_id, held.number, outcome.state,
        f"{_reason(outcome.state)}, ended = :now, exit_code = :exit_code, signal = :signal, "
        f"peak_memory = :peak_memory, cpu_time = :cpu_time, revision = COALESCE(:revision, revision)",
        reason=rows.clean(outcome.reason), exit_code=outcome.exit_code, signal=outcome.signal,
        peak_memory=outcome.peak_memory, cpu_time=outcome.cpu_time, revision=rows.clean(outcome.revision),
    )  # fmt: skip


def _end_run(tx: Transaction, held: _Hold, state: State, reason: str | None) -> None:
    move_run(tx, held.run_id, state, f"{_reason(state)}, ended = :now", reason=rows.clean(reason))
    tx.ring(progress(held.run_id))


def _reason(state: State) -> str:
    # who asked for a cancellation, and why, stays unless there is more to say
    return "reason = COALESCE(:reason, reason)" if state is State.CANCELLED else "reason = :reason"


def _reschedule(
    tx: Transaction, held: _Hold, reason: str | None, *, delay: float = 0.0, retries: int = 0, losses: int = 0
) -> None:
    move_run(
        tx, held.run_id, State.SCHEDULED,
        "reason = :reason, due = :now + :delay, retries_left = retries_left - :retries, "
        "losses = losses + :losses",
        reason=rows.clean(reason), delay=delay, retries=retries, losses=losses,
    )  # fmt: skip
    tx.ring(WORK)
    tx.ring(progress(held.run_id))

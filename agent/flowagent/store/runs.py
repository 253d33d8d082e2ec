"""Operations on runs, as those that ask for them see them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from flowagent.errors import NotFoundError, UsageError
from flowagent.models import Attempt, OutputChunk, Run, RunRequest, State, TaskRun
from flowagent.store import rows
from flowagent.store.database import Transaction
from flowagent.store.labelsets import label_set_id
from flowagent.store.protocol import CANCEL, WORK, progress
from flowagent.store.states import move_attempt, move_run, within

_ID = re.compile(r"[0-9a-f]{16}")
_PREFIX = re.compile(r"[0-9a-f]{1,15}")

_INSERT = """
    INSERT INTO run (id, flow_id, version_id, label_set_id, state, parameters, env, due, created, attempt,
        losses, retries_left, retry_delay, retry_of, idempotency_key)
    SELECT :id, v.flow_id, v.id, :label_set_id, 'scheduled', :parameters, :env, COALESCE(:due, :now), :now, 0,
        0, :retries, :retry_delay, :retry_of, :idempotency_key
    FROM flow_version v WHERE v.id = :version_id
    ON CONFLICT (idempotency_key) DO NOTHING RETURNING id"""


def create_run(tx: Transaction, request: RunRequest) -> tuple[Run, bool]:
    key = request.idempotency_key
    if key is not None and (known := _run(tx, "r.idempotency_key = :key", key=key)):
        return known[0], False
    if not tx.execute("SELECT id FROM flow_version WHERE id = :id", {"id": request.version_id}):
        raise NotFoundError(f"no flow version has the id {request.version_id}; see `flowagent flows`")
    run_id = os.urandom(8).hex()
    values = {
        "id": run_id,
        "version_id": request.version_id,
        "label_set_id": label_set_id(tx, rows.canon(request.labels, request.runners)),
        "parameters": rows.to_json(dict(request.parameters)),
        "env": rows.to_json(dict(request.env)),
        "due": request.due,
        "retries": request.retries,
        "retry_delay": request.retry_delay,
        "retry_of": request.retry_of,
        "idempotency_key": key,
    }
    inserted = tx.execute(_INSERT, values)
    if not inserted:  # somebody else used the key at the same time
        return _run(tx, "r.idempotency_key = :key", key=key)[0], False
    tx.ring(WORK)
    return existing(tx, run_id), True


def existing(tx: Transaction, run_id: str) -> Run:
    """A run by its full id. :raises NotFoundError: there is none."""
    found = _run(tx, "r.id = :run_id", run_id=run_id)
    if not found:
        raise _no_run(run_id)
    return found[0]


def run(tx: Transaction, id_or_prefix: str) -> Run:
    if not _PREFIX.fullmatch(id_or_prefix):
        if _ID.fullmatch(id_or_prefix):
            return existing(tx, id_or_prefix)
        raise _no_run(id_or_prefix)
    found = tx.execute(
        "SELECT id FROM run WHERE id >= :first AND id < :last ORDER BY id LIMIT 3",
        {"first": id_or_prefix, "last": id_or_prefix + "g"},  # what follows a prefix is at most "f"
    )
    if not found:
        raise _no_run(id_or_prefix)
    if len(found) > 1:
        some = ", ".join(id for (id,) in found[:2]) + (", …" if len(found) > 2 else "")
        raise NotFoundError(f"several runs begin with {id_or_prefix!r} ({some}); give more of the id")
    return existing(tx, found[0][0])


def runs(tx: Transaction, flow: str | None, states: Sequence[State], limit: int) -> list[Run]:
    """Each state is looked up by itself: few runs of a state are found fast among many of others."""
    conditions = [within([state], "r.state") for state in dict.fromkeys(states)] or [""]
    if flow is not None:
        by_flow = "r.flow_id = (SELECT id FROM flow WHERE name = :flow)"
        conditions = [f"{by_flow} AND {each}" if each else by_flow for each in conditions]
    found = [
        run
        for condition in conditions
        for run in _run(tx, f"{condition or '1 = 1'} ORDER BY r.created DESC, r.id LIMIT :limit",
                        flow=flow, limit=limit)
    ]  # fmt: skip
    return sorted(found, key=lambda run: (-run.created, run.id))[:limit]


def _run(tx: Transaction, condition: str, **values: object) -> list[Run]:
    return [rows.run(row) for row in tx.execute(f"{rows.RUN} WHERE {condition}", values)]


def _no_run(given: str) -> NotFoundError:
    return NotFoundError(f"no run has the id {given[:40]!r}, or one that begins so; see `flowagent runs`")


def cancel(tx: Transaction, run_id: str, reason: str) -> Run:
    found = tx.execute(
        f"SELECT state, attempt FROM run WHERE id = :run_id{tx.dialect.locked}",  # noqa: S608
        {"run_id": run_id},
    )
    if not found:
        raise _no_run(run_id)
    state, attempt = State(found[0][0]), found[0][1]
    why = rows.clean(reason)
    if state.terminal:
        raise UsageError(f"run {run_id} has ended already: it is {state}")
    if state is State.SCHEDULED:
        move_run(tx, run_id, State.CANCELLED, "reason = :reason, ended = :now", reason=why)
    elif state is not State.CANCELLING:
        move_run(tx, run_id, State.CANCELLING, "reason = :reason", reason=why)
        move_attempt(tx, run_id, attempt, State.CANCELLING, "reason = :reason", reason=why)
    tx.ring(CANCEL)
    tx.ring(progress(run_id))
    return existing(tx, run_id)


def attempts(tx: Transaction, run_id: str) -> list[Attempt]:
    found = tx.execute(f"{rows.ATTEMPT} WHERE run_id = :run_id ORDER BY number", {"run_id": run_id})
    return [rows.attempt(row) for row in found]


def task_runs(tx: Transaction, run_id: str, attempt: int) -> list[TaskRun]:
    found = tx.execute(
        f"{rows.TASK_RUN} WHERE run_id = :run_id AND attempt = :attempt ORDER BY started, task",
        {"run_id": run_id, "attempt": attempt},
    )
    return [rows.task_run(row) for row in found]


_CHUNKS_AT_ONCE = 1000


def output(tx: Transaction, run_id: str, attempt: int, start: int, limit: int) -> list[OutputChunk]:
    key = {"run_id": run_id, "attempt": attempt, "start": start, "most": _CHUNKS_AT_ONCE}
    of_attempt = "FROM output WHERE run_id = :run_id AND attempt = :attempt AND start >= :start"
    last = size = 0
    # sizes first: the data of more than is asked for may not fit in memory
    for chunk_start, chunk_stop in tx.execute(
        f"SELECT start, stop {of_attempt} ORDER BY start LIMIT :most",
        key,
    ):
        last, size = chunk_start, size + chunk_stop - chunk_start
        if size >= limit:
            break
    found = tx.execute(
        f"SELECT start, stop, data {of_attempt} AND start <= :last ORDER BY start",
        {**key, "last": last},
    )
    return [OutputChunk(*row) for row in found]


def shipped(tx: Transaction, run_id: str, attempt: int) -> int:
    end = 0
    for start, stop in tx.execute(
        "SELECT start, stop FROM output WHERE run_id = :run_id AND attempt = :attempt ORDER BY start",
        {"run_id": run_id, "attempt": attempt},
    ):
        if start > end:
            break
        end = max(end, stop)
    return end

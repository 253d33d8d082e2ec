"""Between rows and the nouns of :mod:`flowagent.models`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from flowagent.models import AgentInfo, Attempt, FlowSpec, FlowVersion, Run, State, TaskRun
from flowagent.store.database import Row

VERSION_COLUMNS = "f.id, v.id, v.number, v.content_hash, v.created, v.spec, f.current_version_id = v.id"
VERSION = f"SELECT {VERSION_COLUMNS} FROM flow_version v JOIN flow f ON f.id = v.flow_id"  # noqa: S608


def flow_version(row: Row) -> FlowVersion:
    flow_id, version_id, number, content_hash, created, spec, current = row
    return FlowVersion(flow_id, version_id, number, content_hash, created, flow_spec(spec), bool(current))


def flow_spec(text: str) -> FlowSpec:
    return FlowSpec.from_json(json.loads(text))


RUN_COLUMNS = """
    r.id, f.name, r.version_id, v.number, r.state, r.reason, s.canon, r.parameters, r.env, r.due, r.created,
    r.started, r.ended, r.attempt, r.retries_left, a.agent, r.retry_of, r.idempotency_key"""
RUN_TABLES = """
    FROM run r JOIN flow f ON f.id = r.flow_id JOIN flow_version v ON v.id = r.version_id
    JOIN label_set s ON s.id = r.label_set_id
    LEFT JOIN attempt a ON a.run_id = r.id AND a.number = r.attempt"""
RUN = f"SELECT {RUN_COLUMNS} {RUN_TABLES}"


def run(row: Row) -> Run:
    (
        id, flow_name, version_id, version, state, reason, canon, parameters, env, due, created,
        started, ended, attempt, retries_left, agent, retry_of, idempotency_key,
    ) = row  # fmt: skip
    labels, runners = demands(canon)
    return Run(
        id=id,
        flow_name=flow_name,
        version_id=version_id,
        version=version,
        state=State(state),
        reason=reason,
        labels=labels,
        runners=runners,
        parameters=json.loads(parameters),
        env=json.loads(env),
        due=due,
        created=created,
        started=started,
        ended=ended,
        attempt=attempt,
        retries_left=retries_left,
        agent=agent,
        retry_of=retry_of,
        idempotency_key=idempotency_key,
    )


ATTEMPT = """
    SELECT run_id, number, state, reason, agent, lease_expires, claimed, started, ended, exit_code, signal,
    peak_memory, cpu_time, revision, sandbox FROM attempt"""


def attempt(row: Row) -> Attempt:
    run_id, number, state, *rest = row
    return Attempt(run_id, number, State(state), *rest)


TASK_RUN = """
    SELECT run_id, attempt, task, state, reason, tries, started, ended, result FROM task_run"""


def task_run(row: Row) -> TaskRun:
    run_id, attempt, task, state, reason, tries, started, ended, result = row
    return TaskRun(
        run_id,
        attempt,
        task,
        state,
        reason,
        tries,
        started,
        ended,
        None if result is None else json.loads(result),
    )


AGENT_COLUMNS = """
    a.name, a.instance, a.host, a.pid, a.labels, a.runner, a.capacity, a.version, a.require_labels, a.started,
    a.seen, a.stopping"""

CLAIMING, STOPPING, NO_ROOM = 0, 1, 2
"""What the column ``stopping`` says: whether, and why, an agent claims nothing new."""


def agent(row: Row) -> AgentInfo:
    (
        name, instance, host, pid, labels, runner, capacity, version, require_labels, started, seen,
        stopping, running,
    ) = row  # fmt: skip
    return AgentInfo(
        name=name,
        instance=instance,
        host=host,
        pid=pid,
        labels=tuple(json.loads(labels)),
        runner=runner,
        limit=capacity,
        version=version,
        require_labels=bool(require_labels),
        started=started,
        seen=seen,
        stopping=stopping == STOPPING,
        no_room=stopping == NO_ROOM,
        running=running,
    )


_ENCODER = json.JSONEncoder(separators=(",", ":"), sort_keys=True)


def to_json(value: Any) -> str:
    return _ENCODER.encode(value)


def clean(text: str | None) -> str | None:
    """Text that any database takes. Reasons and names may quote whatever a flow printed or raised."""
    if text is None:
        return None
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def canon(labels: Sequence[str], runners: Sequence[str]) -> str:
    """The identity of a set of demands on an agent."""
    return to_json({"labels": sorted(set(labels)), "runners": sorted(set(runners))})


@lru_cache(1000)
def demands(canon: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The labels and the runners in it."""
    read = json.loads(canon)
    return tuple(read["labels"]), tuple(read["runners"])

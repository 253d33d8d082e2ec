"""The nouns that the parts of flowagent pass to each other, and the one table of state transitions.

Times are seconds since the epoch, UTC, as float. Durations are seconds. Sizes are bytes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Json = Any
"""A value that ``json.dumps`` takes: the parameters, references and specs below are made of these."""


class State(enum.StrEnum):
    """The state of a run, and of each of its attempts."""

    SCHEDULED = "scheduled"  # waits until it is due and an agent that carries its labels has room
    PENDING = "pending"  # an agent claimed it; its source is being resolved and materialised
    RUNNING = "running"  # the flow process was handed to a launcher
    CANCELLING = "cancelling"  # somebody asked for its end; the process may still live
    COMPLETED = "completed"
    FAILED = "failed"  # the flow's own code failed
    CRASHED = "crashed"  # the machinery under it did: killed, out of memory, agent lost
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return not TRANSITIONS[self]

    @property
    def live(self) -> bool:
        """Whether an agent holds a lease on it."""
        return self in LIVE


TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.SCHEDULED: frozenset({State.PENDING, State.CANCELLED}),
    # back to scheduled: the agent gave it back or was lost before anything of the flow ran
    State.PENDING: frozenset(
        {State.RUNNING, State.SCHEDULED, State.CANCELLING, State.FAILED, State.CRASHED, State.CANCELLED}
    ),
    # back to scheduled: the attempt failed or crashed, and retries are left
    State.RUNNING: frozenset(
        {State.COMPLETED, State.FAILED, State.CRASHED, State.CANCELLED, State.CANCELLING, State.SCHEDULED}
    ),
    # an attempt may complete or fail on its own while it is being cancelled; it is never retried then
    State.CANCELLING: frozenset({State.CANCELLED, State.COMPLETED, State.FAILED, State.CRASHED}),
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset(),
    State.CRASHED: frozenset(),
    State.CANCELLED: frozenset(),
}
"""What may follow what. Every write of a state goes through this table (see :func:`sources_of`)."""

LIVE = (State.PENDING, State.RUNNING, State.CANCELLING)
"""States in which an attempt is leased to an agent."""

TERMINAL = tuple(state for state, following in TRANSITIONS.items() if not following)


def sources_of(target: State) -> tuple[State, ...]:
    """The states from which ``target`` may be entered; store statements filter by these."""
    return tuple(state for state, following in TRANSITIONS.items() if target in following)


@dataclass(frozen=True)
class FlowSpec:
    """What registration stores of a flow: never code. ``to_json``/``from_json`` are exact inverses.

    ``storage``, ``run_config`` and ``result`` are the JSON forms of the declarations in
    :mod:`flowagent.storage`, :mod:`flowagent.run_configs` and :mod:`flowagent.flows.results`.
    ``parameters`` are ``{"name", "required", "default"}``; ``tasks`` are ``{"slug", "name", "upstream",
    "retries", "retry_delay", "timeout", "result"}`` in topological order.
    """

    name: str
    kind: str  # "dag" or "function"
    storage: Json
    run_config: Json
    labels: tuple[str, ...] = ()
    parameters: tuple[Json, ...] = ()
    tasks: tuple[Json, ...] = ()
    secrets: tuple[str, ...] = ()
    result: Json = None
    project: str | None = None

    def to_json(self) -> dict[str, Json]:
        return {
            "name": self.name,
            "kind": self.kind,
            "storage": self.storage,
            "run_config": self.run_config,
            "labels": sorted(self.labels),
            "parameters": list(self.parameters),
            "tasks": list(self.tasks),
            "secrets": sorted(self.secrets),
            "result": self.result,
            "project": self.project,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> FlowSpec:
        return cls(
            **{
                **data,
                "labels": tuple(data["labels"]),
                "parameters": tuple(data["parameters"]),
                "tasks": tuple(data["tasks"]),
                "secrets": tuple(data["secrets"]),
            }
        )


@dataclass(frozen=True)
class FlowVersion:
    """One registered version of a flow. ``number`` counts from 1 per flow; ``content_hash`` is its key."""

    flow_id: int
    version_id: int
    number: int
    content_hash: str
    created: float
    spec: FlowSpec
    current: bool = True  # whether new runs of the flow take this version


@dataclass(frozen=True)
class Registration:
    """The answer to a registration."""

    version: FlowVersion
    previous: FlowVersion | None  # what was current before; None for a new flow
    created: bool  # False: this content was known already


@dataclass(frozen=True)
class RunRequest:
    """A run that is asked for. Parameters have been checked against the flow version."""

    version_id: int
    parameters: Mapping[str, Json] = field(default_factory=dict)
    labels: tuple[str, ...] = ()  # all labels an agent must carry
    runners: tuple[str, ...] = ()  # runners that can execute it; empty: any
    due: float | None = None  # None: now
    idempotency_key: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    retries: int = 0  # attempts after the first, when one fails or crashes
    retry_delay: float = 0.0
    retry_of: str | None = None  # the run that this one repeats


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: recorded once, under its fencing token."""

    state: State
    reason: str | None = None
    exit_code: int | None = None
    signal: int | None = None
    peak_memory: int | None = None  # bytes, of the largest process
    cpu_time: float | None = None  # seconds, user and system, of all processes
    revision: str | None = None  # what in fact ran, if it is not what was resolved
    retryable: bool = True  # False: another attempt cannot help (the flow is not there, wrong python …)


@dataclass(frozen=True)
class Run:
    """A run as the store shows it."""

    id: str
    flow_name: str
    version_id: int
    version: int
    state: State
    reason: str | None
    labels: tuple[str, ...]
    runners: tuple[str, ...]
    parameters: Mapping[str, Json]
    env: Mapping[str, str]
    due: float
    created: float
    started: float | None
    ended: float | None
    attempt: int  # number of the newest attempt; 0: none yet
    retries_left: int
    agent: str | None  # agent of the newest attempt
    retry_of: str | None
    idempotency_key: str | None


@dataclass(frozen=True)
class Attempt:
    """One try of a run."""

    run_id: str
    number: int
    state: State
    reason: str | None
    agent: str
    lease_expires: float
    claimed: float
    started: float | None
    ended: float | None
    exit_code: int | None
    signal: int | None
    peak_memory: int | None
    cpu_time: float | None
    revision: str | None
    sandbox: str | None


@dataclass(frozen=True)
class TaskRun:
    """The newest known state of one task within one attempt. ``result`` is its reference, if written."""

    run_id: str
    attempt: int
    task: str  # slug; mapped children are "slug[3]"; "" is the flow's own result
    state: str  # running, retrying, completed, failed, skipped
    reason: str | None = None
    tries: int = 1
    started: float | None = None
    ended: float | None = None
    result: Json = None


@dataclass(frozen=True)
class Claim:
    """A claimed attempt: what the agent needs to execute it. ``attempt`` is the fencing token."""

    run: Run
    attempt: int
    lease_expires: float
    spec: FlowSpec


class Claims(list[Claim]):
    """What was claimed, oldest due first. Were they fewer than asked for, ``next_due`` says when the next run
    is due that the agent could take; None: there is none scheduled."""

    def __init__(self, claims: Iterable[Claim] = (), next_due: float | None = None) -> None:
        super().__init__(claims)
        self.next_due = next_due


@dataclass(frozen=True)
class Held:
    """An attempt that the store says this agent holds, as answered to a renewal."""

    run_id: str
    attempt: int
    state: State  # CANCELLING: stop it
    reason: str | None
    lease_expires: float


@dataclass(frozen=True)
class OutputChunk:
    """A piece of an attempt's output: raw bytes ``start:stop`` of the stream; ``data`` is redacted."""

    start: int
    stop: int
    data: bytes


@dataclass(frozen=True)
class AgentInfo:
    """An agent as it announces itself."""

    name: str  # unique; the identity under which it holds leases
    instance: str  # differs for each start
    host: str
    pid: int
    labels: tuple[str, ...]
    runner: str  # process, docker, kubernetes
    limit: int  # runs at the same time
    version: str
    require_labels: bool = False  # refuses runs without labels
    started: float = 0.0
    seen: float = 0.0
    stopping: bool = False  # drains: claims nothing new
    no_room: bool = False  # claims nothing new while a disk of its is nearly full
    running: int = 0  # attempts it holds now

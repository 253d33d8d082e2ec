"""Asking for runs: the checks that belong before the queue, and which agents could take one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from flowagent import labels as label_names
from flowagent.errors import UsageError
from flowagent.flows.inputs import check_parameters
from flowagent.models import AgentInfo, Json, Run, RunRequest
from flowagent.run_configs import RunConfig
from flowagent.store.agents import ALIVE
from flowagent.store.protocol import Store


async def submit(
    store: Store,
    name: str,
    parameters: Mapping[str, Json],
    *,
    labels: Iterable[str] = (),
    env: Mapping[str, str] | None = None,
    due: float | None = None,
    idempotency_key: str | None = None,
    retries: int | None = None,
    retry_delay: float | None = None,
) -> tuple[Run, bool]:
    """Ask for a run of a flow's current version; False: a run with this idempotency key was there already.

    ``labels`` are added to those of the flow; ``retries`` and ``retry_delay`` (seconds) replace those of its
    run config.

    :raises NotFoundError: no flow has that name.
    :raises ParameterError: a parameter is unknown, missing or not JSON.
    :raises UsageError: a label or variable cannot be one."""
    version = await store.flow(name)
    spec = version.spec
    checked = check_parameters(spec.parameters, parameters, spec.name)
    config = _run_config(spec.run_config)
    request = RunRequest(
        version_id=version.version_id,
        parameters=checked,
        labels=label_names.parse([*spec.labels, *labels]),
        runners=label_names.common_runners(config.runners, spec.storage.get("runners") or ()),
        due=due,
        idempotency_key=idempotency_key,
        env=_environment(env or {}),
        retries=config.retries if retries is None else retries,
        retry_delay=config.retry_delay if retry_delay is None else retry_delay,
    )
    return await store.create_run(request)


async def repeat(store: Store, run: Run, *, from_start: bool = False) -> Run:
    """Ask for another run of the same version as one that has ended, with all that was asked for then.

    Unless the run completed, its agent starts from the results that it left; not so ``from_start``, which is
    a run of its own.

    :raises UsageError: it has not ended."""
    if not run.state.terminal:
        raise UsageError(f"run {run.id} is {run.state}; only a run that has ended can be repeated")
    config = _run_config((await store.version(run.version_id)).spec.run_config)
    request = RunRequest(
        version_id=run.version_id,
        parameters=run.parameters,
        labels=run.labels,
        runners=run.runners,
        env=run.env,
        retries=config.retries,
        retry_delay=config.retry_delay,
        retry_of=None if from_start else run.id,
    )
    return (await store.create_run(request))[0]


def _run_config(data: Json) -> RunConfig:
    return cast(RunConfig, RunConfig.from_json(data))


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    for name, value in env.items():
        if not name or "=" in name or "\0" in name + value:
            raise UsageError(
                f"environment variable {name!r} cannot be set; check its name and value for NUL and ="
            )
    return dict(env)


# -- who could take it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """One agent in the light of one run. ``reason`` says why it does not take the run; None: it may."""

    agent: AgentInfo
    reason: str | None

    @property
    def full(self) -> bool:
        return self.agent.running >= self.agent.limit


def is_live(agent: AgentInfo, now: float) -> bool:
    """Whether an agent has given a sign of life recently."""
    return now - agent.seen < ALIVE


async def placements(store: Store, run: Run) -> list[Placement]:
    """Every known agent, and why it may not take the run."""
    now = time.time()
    return [Placement(agent, _reason(agent, run, now)) for agent in await store.agents()]


def _reason(agent: AgentInfo, run: Run, now: float) -> str | None:
    if not is_live(agent, now):
        return f"was last seen {now - agent.seen:.0f} s ago"
    if agent.stopping:
        return "is stopping"
    unlike = label_names.mismatch(agent.labels, agent.require_labels, agent.runner, run.labels, run.runners)
    if unlike is None and agent.no_room:
        return "takes nothing new until there is room on its disk"
    return unlike


def obstacle(run: Run, found: Iterable[Placement], host: str) -> str | None:
    """Why no agent can take a run now, and what to do, in one line; None: one can.

    ``host`` is this machine's name, which agents here carry as a label anyway."""
    known = list(found)
    if any(placement.reason is None for placement in known):
        return None
    asked = ",".join(label for label in run.labels if label != host)
    runner = f" --runner {run.runners[0]}" if run.runners and "process" not in run.runners else ""
    command = f"flowagent start{runner}" + (f" --labels {asked}" if asked else "")
    refusals = [
        f"{placement.agent.name} {placement.reason}"
        for placement in known
        if is_live(placement.agent, time.time())
    ]
    if not refusals:
        return f"no agent is running; start one with: {command}"
    return f"no live agent can take it: {'; '.join(refusals)}; start one that can with: {command}"

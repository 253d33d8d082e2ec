"""``flows`` and ``agents``: what is registered, and who executes it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from flowagent.cli import output
from flowagent.cli.session import Command, Session, json_option, pass_session

if TYPE_CHECKING:
    from flowagent.models import AgentInfo, FlowSpec, FlowVersion
    from flowagent.store.protocol import Store


WHERE = ("repo", "bucket", "container", "registry_url")
WHAT = ("path", "flow_path", "module", "key", "blob_name", "image_name")
"""Of declarations, in this order: what says where a flow is, and which of what is there."""


@click.command(cls=Command)
@json_option()
@pass_session
def flows(session: Session, as_json: bool) -> None:
    """List the registered flows in their current versions."""

    async def job(store: Store) -> list[FlowVersion]:
        return await store.flows()

    found = session.with_store(job)
    if as_json:
        output.print_json([{**_plain(version), **version.spec.to_json()} for version in found])
        return
    output.print_table(
        ["flow", "version", "storage", "labels", "parameters", "project", "registered"],
        [
            (
                version.spec.name,
                version.number,
                _storage(version.spec),
                ", ".join(version.spec.labels),
                ", ".join(_parameter(parameter) for parameter in version.spec.parameters),
                version.spec.project,
                output.ago(version.created),
            )
            for version in found
        ],
        empty="no flow is registered; register some with: flowagent register FILE",
    )


def _plain(version: FlowVersion) -> dict[str, object]:
    return {
        "version": version.number,
        "version_id": version.version_id,
        "content_hash": version.content_hash,
        "created": version.created,
    }


def _storage(spec: FlowSpec) -> str:
    """Its type and place, as far as the declaration says it: a URL in a secret stays there."""
    places = [[spec.storage.get(name) for name in names] for names in (WHERE, WHAT)]
    return " ".join([spec.storage["type"], *(next(filter(None, place)) for place in places if any(place))])


def _parameter(parameter: dict[str, object]) -> str:
    return f"{parameter['name']}{'*' if parameter['required'] else ''}"


@click.command(cls=Command)
@click.option("--here", is_flag=True, help="Those of this host; the exit code is 1 if none is live.")
@json_option()
@pass_session
def agents(session: Session, here: bool, as_json: bool) -> int:
    """List the agents, and whether they have given a sign of life lately."""
    from flowagent.settings import hostname

    async def job(store: Store) -> list[AgentInfo]:
        return await store.agents()

    found = [agent for agent in session.with_store(job) if not here or agent.host == hostname()]
    code = int(here and not any(_life(agent) in ("live", "no room") for agent in found))
    if as_json:
        output.print_json([{**vars(agent), "state": _life(agent)} for agent in found])
        return code
    output.print_table(
        ["agent", "state", "host", "labels", "runner", "running", "seen", "version"],
        [
            (
                agent.name,
                _life(agent),
                agent.host,
                ", ".join(agent.labels) + (" (required)" if agent.require_labels else ""),
                agent.runner,
                f"{agent.running}/{agent.limit}",
                output.ago(agent.seen),
                agent.version,
            )
            for agent in found
        ],
        empty="no agent is known; start one with: flowagent start",
    )
    return code


def _life(agent: AgentInfo) -> str:
    from flowagent.submission import is_live

    if not is_live(agent, time.time()):
        return "gone"
    return "stopping" if agent.stopping else "no room" if agent.no_room else "live"

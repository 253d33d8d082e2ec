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
    place = spec.storage.get("path") or spec.storage.get("module") or ""
    return f"{spec.storage['type']} {place}".strip()


def _parameter(parameter: dict[str, object]) -> str:
    return f"{parameter['name']}{'*' if parameter['required'] else ''}"


@click.command(cls=Command)
@json_option()
@pass_session
def agents(session: Session, as_json: bool) -> None:
    """List the agents, and whether they have given a sign of life lately."""

    async def job(store: Store) -> list[AgentInfo]:
        return await store.agents()

    found = session.with_store(job)
    if as_json:
        output.print_json([{**vars(agent), "state": _life(agent)} for agent in found])
        return
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


def _life(agent: AgentInfo) -> str:
    from flowagent.submission import is_live

    if not is_live(agent, time.time()):
        return "gone"
    return "stopping" if agent.stopping else "live"

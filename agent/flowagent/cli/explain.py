"""``explain``: why a run is where it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from flowagent.cli import output
from flowagent.cli.session import Command, Session, find_run, json_option, pass_session, run_argument

if TYPE_CHECKING:
    from flowagent.models import Run
    from flowagent.store.protocol import Store
    from flowagent.submission import Placement


@click.command(cls=Command)
@run_argument
@json_option()
@pass_session
def explain(session: Session, run_id: str, as_json: bool) -> None:
    """Say why a run is where it is, and for each known agent why it matches or not.

    RUN is an id, or a unique beginning of one.
    """

    async def job(store: Store) -> None:
        from flowagent.submission import placements

        run = await find_run(store, run_id)
        found = await placements(store, run)
        if as_json:
            output.print_json(
                {"run": run, "verdict": verdict(run, found), "agents": [_plain(p) for p in found]}
            )
            return
        click.echo(f"run {run.id} of {output.on_line(run.flow_name)}: {output.on_line(verdict(run, found))}")
        needs = f"labels {', '.join(run.labels)}" if run.labels else "no labels"
        click.echo(f"it asks for {needs}, and runner {' or '.join(run.runners) or 'any'}\n")
        output.print_table(
            ["agent", "matches", "why", "running", "seen"],
            [
                (p.agent.name, "no" if p.reason else "yes", _why(p), _load(p), output.ago(p.agent.seen))
                for p in found
            ],
            empty="no agent is known; start one with: flowagent start",
        )

    session.with_store(job)


def verdict(run: Run, found: list[Placement]) -> str:
    """The state of a run in words, and what it waits for."""
    from flowagent.settings import hostname
    from flowagent.submission import obstacle

    if run.state.terminal:
        return f"{run.state} {output.ago(run.ended)}{f': {run.reason}' if run.reason else ''}"
    if run.state != "scheduled":
        what = {
            "pending": "is being fetched and started by",
            "running": "is executed by",
            "cancelling": "is being stopped by",
        }[run.state]
        return f"{what} agent {run.agent} (attempt {run.attempt})"
    reason = obstacle(run, found, hostname())
    wait = run.due - time.time()
    due = (
        f"due in {output.duration(wait)} ({output.moment(run.due)})"
        if wait > 0
        else "due since " + output.moment(run.due)
    )
    before = f"; the last attempt ended: {run.reason}" if run.attempt and run.reason else ""
    if reason is not None:
        return f"scheduled, {due}, and {reason}{before}"
    able = [placement for placement in found if placement.reason is None]
    if all(placement.full for placement in able):
        return f"scheduled, {due}; every agent that could take it is full{before}"
    names = " or ".join(placement.agent.name for placement in able if not placement.full)
    return f"scheduled, {due}; agent {names} will take it{before}"


def _why(placement: Placement) -> str:
    if placement.reason is not None:
        return placement.reason
    return "carries its labels, but is full" if placement.full else "carries its labels and has room"


def _load(placement: Placement) -> str:
    return f"{placement.agent.running}/{placement.agent.limit}"


def _plain(placement: Placement) -> dict[str, object]:
    return {
        "agent": placement.agent,
        "matches": placement.reason is None,
        "reason": placement.reason,
        "full": placement.full,
    }

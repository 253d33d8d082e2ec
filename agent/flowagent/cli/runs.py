"""``runs`` and ``show``: what is known of runs."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import click

from flowagent.cli import output
from flowagent.cli.session import (
    Command,
    Session,
    complete_flow,
    find_run,
    json_option,
    pass_session,
    run_argument,
)

if TYPE_CHECKING:
    from flowagent.models import Attempt, Run, TaskRun
    from flowagent.store.protocol import Store

STATES = ("scheduled", "pending", "running", "cancelling", "completed", "failed", "crashed", "cancelled")
LAST_LINES = 20
TAIL = 1 << 20
"""Bytes of output that the last lines are looked for in."""


@click.command(cls=Command)
@click.option("--flow", metavar="NAME", shell_complete=complete_flow, help="Only runs of this flow.")
@click.option(
    "--state", "states", multiple=True, type=click.Choice(STATES), help="Only in this state. Repeatable."
)
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many at most.")
@json_option()
@pass_session
def runs(session: Session, flow: str | None, states: tuple[str, ...], limit: int, as_json: bool) -> None:
    """List runs, newest first."""

    async def job(store: Store) -> list[Run]:
        from flowagent.models import State

        if flow is not None:
            await store.flow(flow)  # says so when there is none
        return await store.runs(flow=flow, states=[State(state) for state in states], limit=limit)

    found = session.with_store(job)
    if as_json:
        output.print_json(found)
        return
    output.print_table(
        ["run", "flow", "state", "created", "took", "agent", "reason"],
        [
            (run.id, run.flow_name, run.state, output.ago(run.created), _took(run), run.agent, run.reason)
            for run in found
        ],
        empty="no runs; ask for one with: flowagent run NAME",
    )


def _took(run: Run | Attempt | TaskRun) -> str:
    if run.started is None or run.ended is None:
        return ""
    return output.duration(max(0.0, run.ended - run.started))


@click.command(cls=Command)
@run_argument
@json_option()
@pass_session
def show(session: Session, run_id: str, as_json: bool) -> None:
    """Show all about a run: its attempts, tasks and results, and why it ended as it did.

    RUN is an id, or a unique beginning of one.
    """

    async def job(store: Store) -> None:
        run = await find_run(store, run_id)
        attempts = await store.attempts(run.id)
        tasks = await store.task_runs(run.id, run.attempt) if run.attempt else []
        troubled = run.attempt > 0 and run.state not in ("completed", "pending", "running")
        tail = await last_lines(store, run.id, run.attempt) if troubled else []
        if as_json:
            output.print_json({"run": run, "attempts": attempts, "tasks": tasks, "last_lines": tail})
        else:
            _print_run(run, attempts)
            _print_attempts(attempts)
            _print_tasks(tasks)
            if tail:
                click.echo("\nLast lines of output:")
                for line in tail:
                    click.echo(f"  {line}")

    session.with_store(job)


def _print_run(run: Run, attempts: list[Attempt]) -> None:
    newest = attempts[-1] if attempts else None
    output.print_fields(
        [
            ("run", run.id),
            ("flow", f"{run.flow_name} version {run.version}"),
            ("state", run.state),
            ("reason", run.reason),
            ("parameters", json.dumps(dict(run.parameters)) if run.parameters else None),
            ("environment", ", ".join(f"{name}={value}" for name, value in run.env.items())),
            ("labels", ", ".join(run.labels) or "none"),
            ("runner", " or ".join(run.runners) or "any"),
            ("repeats", run.retry_of),
            ("idempotency key", run.idempotency_key),
            ("created", output.moment(run.created)),
            ("due", output.moment(run.due)),
            ("started", output.moment(run.started)),
            ("ended", output.moment(run.ended)),
            ("took", _took(run)),
            ("agent", run.agent),
            ("retries left", run.retries_left if run.retries_left and not run.state.terminal else None),
            ("revision", newest and newest.revision),
            ("sandbox", newest and newest.sandbox),
            ("exit code", newest and newest.exit_code),
            ("signal", newest and output.signal_name(newest.signal)),
            ("peak memory", newest and output.size(newest.peak_memory)),
            ("CPU time", newest and output.duration(newest.cpu_time)),
        ]
    )


def _print_attempts(attempts: list[Attempt]) -> None:
    if len(attempts) < 2:
        return  # all of it has been said
    click.echo()
    output.print_table(
        ["attempt", "state", "agent", "started", "took", "exit", "signal", "reason"],
        [
            (
                attempt.number,
                attempt.state,
                attempt.agent,
                output.moment(attempt.started),
                _took(attempt),
                attempt.exit_code,
                output.signal_name(attempt.signal),
                attempt.reason,
            )
            for attempt in attempts
        ],
        empty="",
    )


def _print_tasks(tasks: list[TaskRun]) -> None:
    if not tasks:
        return
    click.echo()
    output.print_table(
        ["task", "state", "tries", "took", "result", "reason"],
        [
            (task.task or "(the flow)", task.state, task.tries, _took(task), _reference(task), task.reason)
            for task in tasks
        ],
        empty="",
    )


def _reference(task: TaskRun) -> str:
    """Where a result is, as short as it can be said."""
    if not isinstance(task.result, dict):
        return ""
    if "none" in task.result:
        return "None"
    if "error" in task.result:
        return f"not kept: {task.result['error']}"
    return str(task.result.get("path") or task.result.get("uri") or json.dumps(task.result))


async def last_lines(store: Store, run_id: str, attempt: int, count: int = LAST_LINES) -> list[str]:
    """The end of an attempt's output as people would read it, harmless to a terminal."""
    from flowagent.cli.following import Console

    start = max(0, await store.shipped(run_id, attempt) - TAIL)
    text = io.BytesIO()
    console = Console(text, terminal=False)
    console.begin(attempt)
    while chunks := await store.output(run_id, attempt, start):
        for chunk in chunks:
            console.feed(chunk.data)
            start = chunk.stop
    console.end()
    lines = text.getvalue().decode(errors="replace").splitlines()
    return [output.visible(line) for line in lines[-count:]]

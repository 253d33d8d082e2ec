"""``run``: ask for a run, and watch it."""

from __future__ import annotations

import sys
from typing import IO, TYPE_CHECKING, Any

import click

from flowagent.cli import output
from flowagent.cli.session import Command, Session, complete_flow, json_option, pass_session
from flowagent.cli.values import duration, json_pair, moment, pair, read_parameters

if TYPE_CHECKING:
    from flowagent.models import Run
    from flowagent.store.protocol import Store

EXIT_CODES = {"completed": 0, "failed": 1, "crashed": 3, "cancelled": 4}
"""How ``run --watch`` ends; 2 is a usage error."""


@click.command(cls=Command)
@click.argument("name", shell_complete=complete_flow)
@click.option(
    "-p",
    "--param",
    "pairs",
    multiple=True,
    type=json_pair,
    metavar="KEY=VALUE",
    help="A parameter; JSON if it parses.",
)
@click.option(
    "--param-file", type=click.File(encoding="utf-8"), metavar="FILE", help="A JSON object of parameters."
)
@click.option(
    "--label", "labels", multiple=True, metavar="LABEL", help="One more label that the agent must carry."
)
@click.option(
    "--env",
    multiple=True,
    type=pair,
    metavar="KEY=VALUE",
    help="An environment variable of the flow. Repeatable.",
)
@click.option("--at", "due", type=moment, metavar="TIME", help="When: ISO 8601, or +10m from now.")
@click.option("--idempotency-key", metavar="KEY", help="Asking twice with the same key is one run.")
@click.option("--retries", type=click.IntRange(min=0), help="Attempts after the first, if one fails.")
@click.option("--retry-delay", type=duration, help="How long to wait before each of them.")
@click.option("-w", "--watch", is_flag=True, help="Follow the run to its end, which gives the exit code.")
@json_option("Print the run as JSON; with --watch its output too, one document a line.")
@pass_session
def run(
    session: Session,
    name: str,
    pairs: tuple[tuple[str, Any], ...],
    param_file: IO[str] | None,
    labels: tuple[str, ...],
    env: tuple[tuple[str, str], ...],
    due: float | None,
    idempotency_key: str | None,
    retries: int | None,
    retry_delay: float | None,
    watch: bool,
    as_json: bool,
) -> int:
    """Ask for a run of the flow NAME, and print its id.

    With --watch the exit code is 0 completed, 1 failed, 3 crashed, 4 cancelled. Ctrl-C ends the watching; the
    run goes on.
    """
    parameters = {**(read_parameters(param_file) if param_file else {}), **dict(pairs)}
    asked: list[Run] = []

    async def job(store: Store) -> int:
        from flowagent.submission import submit

        requested, created = await submit(
            store,
            name,
            parameters,
            labels=labels,
            env=dict(env),
            due=due,
            idempotency_key=idempotency_key,
            retries=retries,
            retry_delay=retry_delay,
        )
        asked.append(requested)
        announce(requested, created, as_json=as_json, watch=watch)
        await warn_if_stuck(store, requested)
        return await watch_run(store, requested.id, as_json) if watch else 0

    try:
        return session.with_store(job, waits=watch)
    except KeyboardInterrupt:
        if asked:
            run_id = asked[0].id
            click.echo(
                f"\nthe run goes on: see it with flowagent logs -f {run_id}, "
                f"end it with flowagent cancel {run_id}",
                err=True,
            )
        raise


def announce(run: Run, created: bool, *, as_json: bool, watch: bool) -> None:
    """Say which run there is now."""
    if not created:
        click.echo(f"this idempotency key was used before: its run is {run.id}, {run.state}", err=True)
    if not as_json:
        click.echo(run.id, err=watch)
    elif watch:
        output.print_json_line({"event": "run", "run": run})
    else:
        output.print_json(run)


async def warn_if_stuck(store: Store, run: Run) -> None:
    """Say at once when nobody can take a run."""
    from flowagent.settings import hostname
    from flowagent.submission import obstacle, placements

    if run.state == "scheduled":
        reason = obstacle(run, await placements(store, run), hostname())
        if reason is not None:
            click.echo(f"Warning: run {run.id} waits: {reason}", err=True)


async def watch_run(store: Store, run_id: str, as_json: bool = False) -> int:
    """Follow a run to its end; the exit code that says how it ended."""
    from flowagent.cli.following import Console, JsonLines, follow

    seen: list[str] = []

    def changed(run: Run) -> None:
        if seen[-1:] == [run.state]:
            return
        seen.append(run.state)
        if as_json:
            output.print_json_line({"event": "run", "run": run})
        elif not run.state.terminal:
            where = f" on {run.agent}" if run.agent and run.state.live else ""
            _say(f"{run.flow_name} is {run.state}{where}")

    sink = JsonLines() if as_json else Console()
    run = await follow(store, run_id, sink, wait=True, changed=changed)
    if not as_json:
        took = f" after {output.duration(run.ended - run.started)}" if run.ended and run.started else ""
        _say(
            f"{run.flow_name} {run.state}{took}{f': {output.on_line(run.reason)}' if run.reason else ''}",
            run.state,
        )
    return EXIT_CODES[run.state]


def _say(text: str, state: str | None = None) -> None:
    colour = output.COLOURS.get(state or "") if sys.stderr.isatty() else None
    click.echo(click.style(text, fg=colour, dim=state is None) if sys.stderr.isatty() else text, err=True)

"""``cancel`` and ``retry``: what can be done about a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from flowagent.cli import output
from flowagent.cli.run import warn_if_stuck, watch_run
from flowagent.cli.session import Command, Session, find_run, json_option, pass_session, run_argument

if TYPE_CHECKING:
    from flowagent.models import Run
    from flowagent.store.protocol import Store


@click.command(cls=Command)
@run_argument
@click.option("--reason", default="cancelled by a user", metavar="TEXT", help="Recorded with the run.")
@json_option()
@pass_session
def cancel(session: Session, run_id: str, reason: str, as_json: bool) -> None:
    """End a run: at once if no agent has it yet, else its agent stops the flow.

    RUN is an id, or a unique beginning of one.
    """

    async def job(store: Store) -> Run:
        return await store.cancel((await find_run(store, run_id)).id, reason)

    run = session.with_store(job)
    if as_json:
        output.print_json(run)
    else:
        click.echo(f"run {run.id} of {output.on_line(run.flow_name)} is {run.state}")


@click.command(cls=Command)
@run_argument
@click.option("--from-start", is_flag=True, help="Run all tasks again, also those that have completed.")
@click.option("-w", "--watch", is_flag=True, help="Follow the new run to its end, as run --watch does.")
@json_option()
@pass_session
def retry(session: Session, run_id: str, from_start: bool, watch: bool, as_json: bool) -> int:
    """Ask for another run like one that has ended: same version, parameters, labels and environment.

    If that one did not complete, tasks that completed in it are not run again: the new run starts from their
    results, as far as those were kept.

    RUN is an id, or a unique beginning of one.
    """

    async def job(store: Store) -> int:
        from flowagent.cli.run import announce
        from flowagent.submission import repeat

        run = await repeat(store, await find_run(store, run_id), from_start=from_start)
        announce(run, True, as_json=as_json, watch=watch)
        current = await store.flow(run.flow_name)
        if current.version_id != run.version_id:
            click.echo(
                f"version {run.version} is repeated; version {current.number} is newer: "
                f"flowagent run {output.on_line(run.flow_name)!r}",
                err=True,
            )
        await warn_if_stuck(store, run)
        return await watch_run(store, run.id, as_json) if watch else 0

    return session.with_store(job, waits=watch)

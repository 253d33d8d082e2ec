"""``logs``: the output of a run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from flowagent.cli.session import Command, Session, find_run, json_option, pass_session, run_argument

if TYPE_CHECKING:
    from flowagent.cli.following import Sink
    from flowagent.store.protocol import Store


@click.command(cls=Command)
@run_argument
@click.option("-f", "--follow", "wait", is_flag=True, help="Go on until the run has ended.")
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Only this attempt. [all]")
@click.option("--raw", is_flag=True, help="The bytes as they were written, with the events between them.")
@json_option("Print texts and events as JSON, one document a line.")
@pass_session
def logs(session: Session, run_id: str, wait: bool, attempt: int | None, raw: bool, as_json: bool) -> None:
    """Print what a run wrote and logged, attempt after attempt.

    RUN is an id, or a unique beginning of one.
    """
    if raw and as_json:
        raise click.UsageError("--raw and --json exclude each other.")

    async def job(store: Store) -> None:
        from flowagent.cli.following import Console, JsonLines, Raw, follow
        from flowagent.errors import UsageError

        run = await find_run(store, run_id)
        if attempt is not None and attempt > run.attempt and not wait:
            raise UsageError(f"run {run.id} has no attempt {attempt}; it has {run.attempt}")
        sink: Sink = Raw(sys.stdout.buffer) if raw else JsonLines() if as_json else Console()
        await follow(store, run.id, sink, wait=wait, only=attempt)
        if not run.attempt and not wait:
            click.echo(f"run {run.id} is {run.state}: it has no output yet", err=True)

    session.with_store(job, waits=wait)

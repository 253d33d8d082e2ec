"""``execute``: what runs a flow inside of a container that has flowagent."""

from __future__ import annotations

import click

from flowagent.cli.session import Command, Session, pass_session


@click.command(cls=Command)
@click.option(
    "--spec", required=True, metavar="FILE", help="What to execute, as an agent writes it; - is stdin."
)
@pass_session
def execute(session: Session, spec: str) -> None:
    """Fetch a flow and run it, here and once.

    Agents start this in containers and pods. It knows no store: what it prints is for the agent to read.
    """
    from flowagent.execution import execute as run

    run(session.settings(), spec)

"""``docker``: another name for agents that run flows in Docker containers."""

from __future__ import annotations

from typing import Any

import click

from flowagent.cli.session import Command
from flowagent.cli.start import start


def _start(**options: Any) -> None:
    assert start.callback is not None
    start.callback(runner="docker", **options)


@click.group()
def docker() -> None:
    """Run flows in Docker containers."""


docker.add_command(
    Command(
        "start",
        callback=_start,
        params=[option for option in start.params if option.name != "runner"],
        help="Start an agent that runs flows in Docker containers: start --runner docker.",
    )
)

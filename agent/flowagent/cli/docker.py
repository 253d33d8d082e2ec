"""``docker``: another name for agents that run flows in Docker containers."""

from __future__ import annotations

import click

from flowagent.cli.start import for_runner


@click.group()
def docker() -> None:
    """Run flows in Docker containers."""


docker.add_command(for_runner("docker", "Docker containers"))

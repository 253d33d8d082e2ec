"""``completion``: the script that completes commands, flows and runs in a shell."""

from __future__ import annotations

import os

import click

from flowagent.cli.session import Command

SHELLS = ("bash", "zsh", "fish")


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.pass_context
def completion(ctx: click.Context, shell: str | None) -> None:
    """Print the completion script of a shell; for bash: eval "$(flowagent completion bash)"."""
    from click.shell_completion import get_completion_class

    name = shell or os.path.basename(os.environ.get("SHELL", ""))
    kind = get_completion_class(name)
    if kind is None:
        raise click.UsageError(f"Name a shell: {', '.join(SHELLS)}.")
    click.echo(kind(ctx.find_root().command, {}, "flowagent", "_FLOWAGENT_COMPLETE").source())

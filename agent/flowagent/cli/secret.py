"""``secret``: the secrets of this machine. Values come from standard input, and are never shown."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from flowagent.cli import output
from flowagent.cli.session import Command, Session, json_option, pass_session

if TYPE_CHECKING:
    from flowagent.secrets import SecretProvider


@click.group()
def secret() -> None:
    """Store secrets on this machine, for the agents that run here."""


def _provider(session: Session) -> SecretProvider:
    from flowagent.secrets import SecretProvider

    return SecretProvider(session.settings().home)


@secret.command("set", cls=Command)
@click.argument("name")
@pass_session
def set_(session: Session, name: str) -> None:
    """Store the value of a secret, typed at a prompt or read from standard input byte for byte."""
    from flowagent.secrets import check_name

    provider = _provider(session)
    check_name(name)
    if sys.stdin.isatty():
        value = click.prompt(f"Value of {name}", hide_input=True, confirmation_prompt=True, err=True)
    else:
        value = _read(name)
    provider.set(name, value)
    click.echo(f"secret {name} is set", err=True)
    origin = provider.origin(name)
    if origin != "file":
        click.echo(f"Warning: {name} also comes from the {origin} here, and that goes first", err=True)


def _read(name: str) -> str:
    from flowagent.errors import SecretError

    data = sys.stdin.buffer.read()
    try:
        value = data.decode("utf-8")
    except UnicodeDecodeError:
        raise SecretError(
            f"secret {name}: the value is not UTF-8 text; give it encoded, say as base64"
        ) from None
    if not value:
        raise SecretError(f"secret {name}: standard input is empty; give the value there")
    if value.endswith("\n") and value.count("\n") == 1:
        click.echo("Warning: the value ends with a line feed, which is kept; printf %s writes none", err=True)
    return value


@secret.command(cls=Command)
@json_option()
@pass_session
def ls(session: Session, as_json: bool) -> None:
    """List the names of the secrets that are set, and where each comes from."""
    provider = _provider(session)
    found = [{"name": name, "from": provider.origin(name)} for name in provider.names()]
    if as_json:
        output.print_json(found)
    else:
        output.print_table(
            ["secret", "from"],
            [(each["name"], each["from"]) for each in found],
            empty="no secret is set; set one with: flowagent secret set NAME",
        )


@secret.command(cls=Command)
@click.argument("name")
@pass_session
def rm(session: Session, name: str) -> None:
    """Remove a secret that was set here."""
    _provider(session).remove(name)
    click.echo(f"secret {name} is removed", err=True)

"""``drain``: have an agent of this machine take nothing new, wait for its runs, and end."""

from __future__ import annotations

import json
import socket
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowagent.cli import output
from flowagent.cli.session import Command, Session, json_option, pass_session
from flowagent.cli.values import duration
from flowagent.errors import AgentError, NotFoundError, UsageError

if TYPE_CHECKING:
    from flowagent.settings import Settings

EXIT_CANCELLED = 3
"""The exit code when the agent has ended, and had to cancel runs for it."""
PATIENCE = 10.0
"""Seconds for the agent to answer; one that waits for its runs answers when they have ended."""


@click.command(cls=Command)
@click.argument("agent", required=False)
@click.option(
    "--deadline", type=duration, help="How long to wait for runs before they are cancelled. [drain]"
)
@click.option("--no-wait", is_flag=True, help="Do not wait for its end.")
@json_option()
@pass_session
def drain(session: Session, agent: str | None, deadline: float | None, no_wait: bool, as_json: bool) -> int:
    """Have AGENT take nothing new, wait for its runs, and end. It has to run here, and be yours.

    AGENT can be left out if only one runs here. Exit code 3: runs had to be cancelled.
    """
    directory = find(session.settings(), agent)
    asked = {"deadline": deadline, "wait": not no_wait}
    answer = ask(directory, "POST", "/drain", json.dumps(asked).encode(), patient=not no_wait)
    found = json.loads(answer)
    if as_json:
        output.print_json({"agent": directory.name, **found})
    elif no_wait:
        click.echo(f"agent {directory.name} drains: {found['attempts']} runs to wait for", err=True)
    else:
        rest = f", of which {found['cancelled']} had to be cancelled" if found["cancelled"] else ""
        click.echo(f"agent {directory.name} is drained: {found['attempts']} runs have ended{rest}", err=True)
    return EXIT_CANCELLED if found["cancelled"] else 0


def find(settings: Settings, name: str | None) -> Path:
    """The directory of an agent that runs here. :raises NotFoundError: there is none, or more than one."""
    running = [directory for directory in sorted(settings.agents_dir.glob("*")) if _runs(directory)]
    names = ", ".join(directory.name for directory in running)
    if name is None and len(running) == 1:
        return running[0]
    if name is None and running:
        raise UsageError(f"several agents run here; name one: {names}")
    for directory in running:
        if directory.name == name:
            return directory
    what = f"no agent named {name}" if name else "no agent"
    hint = f"these do: {names}" if names else "see: flowagent agents"
    raise NotFoundError(f"{what} runs on this machine with the home {settings.home}; {hint}")


def _runs(directory: Path) -> bool:
    import fcntl

    try:
        with open(directory / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def ask(directory: Path, method: str, path: str, body: bytes = b"", *, patient: bool = False) -> bytes:
    """An agent's answer at its control socket. :raises AgentError: there is none."""
    from flowagent.daemon.operations import KEY, SOCKET

    name = directory.name
    try:
        key = (directory / "launchers" / KEY).read_text()
        connection = _Connection(str(directory / "launchers" / SOCKET), None if patient else PATIENCE)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {key}"})
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
    except (OSError, HTTPException) as error:
        why = getattr(error, "strerror", None) or error or "it did not answer"
        raise AgentError(
            f"agent {name} cannot be reached: {why}; signal it: systemctl stop, or kill"
        ) from error
    if response.status >= 300:
        raise AgentError(f"agent {name} refused: {answer.decode(errors='replace').strip()}")
    return answer


class _Connection(HTTPConnection):
    """HTTP over a unix socket at a path of any length."""

    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        from flowagent.runtime.sockets import short_address

        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with short_address(self._path) as address:
            self.sock.connect(address)

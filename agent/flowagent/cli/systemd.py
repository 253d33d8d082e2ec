"""``systemd``: the units of this installation, and what to do with them."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from flowagent.cli.session import Command, Session, pass_session
from flowagent.errors import UsageError

PROGRAM = "/opt/flowagent/bin/flowagent"
"""What the units as they are shipped execute."""
SUBGROUPS_SINCE = 254
"""The version of systemd from which on the agent can have a control group of its own."""
UNITS = ("flowagent.service", "flowagent@.service")
DROP_IN = "flowagent.service.d/memory.conf"


@click.group()
def systemd() -> None:
    """Have systemd run agents on this machine."""


@systemd.command(cls=Command)
@click.option("--user", is_flag=True, help="A unit of your own, without root.")
@click.option(
    "-l", "--labels", multiple=True, metavar="LABEL[,LABEL...]", help="What the agent carries. Repeatable."
)
@click.option("--name", metavar="NAME", help="Of several agents, the one to set up: flowagent@NAME.service.")
@click.option(
    "--root", type=click.Path(path_type=Path), default=Path("/"), help="Write below another root. [/]"
)
@pass_session
def install(session: Session, user: bool, labels: tuple[str, ...], name: str | None, root: Path) -> None:
    """Write units for this installation of flowagent, and say what to do next. What is there already but the
    configuration is replaced."""
    from flowagent import labels as label_names

    carried = label_names.parse(list(labels))
    if user and name:
        raise UsageError("--user has one agent; leave out --name")
    if name is not None and not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
        raise UsageError(f"{name!r} cannot be an agent's name; use letters, digits, '.', '_' and '-'")
    program = _program(anybody=not user)
    try:
        steps = _for_user(program, carried, session) if user else _for_all(program, carried, name, root)
    except OSError as error:
        hint = "write to another --root" if user else "do this as root, or with --user"
        raise UsageError(f"{error.filename} cannot be written: {error.strerror}; {hint}") from error
    click.echo("\nnext:")
    for step in steps:
        click.echo(f"  {step}")


def _for_all(program: str, labels: Sequence[str], name: str | None, root: Path) -> list[str]:
    etc = root / "etc"
    for unit in UNITS:
        _write(etc / "systemd/system" / unit, _unit(unit, program))
    if _version() >= SUBGROUPS_SINCE:
        for unit in UNITS:
            _write(etc / f"systemd/system/{unit}.d/memory.conf", _shipped(DROP_IN))
    _write(etc / "sysusers.d/flowagent.conf", _shipped("flowagent.sysusers.conf"))
    _write(etc / "tmpfiles.d/flowagent.conf", _shipped("flowagent.tmpfiles.conf"))
    (etc / "flowagent/secrets").mkdir(mode=0o700, parents=True, exist_ok=True)
    config = etc / "flowagent" / f"{name or 'config'}.toml"
    _configure(config, labels)
    unit = f"flowagent@{name}" if name else "flowagent"
    return [
        "systemd-sysusers flowagent.conf",
        "systemd-tmpfiles --create flowagent.conf",
        "systemctl daemon-reload",
        f"systemctl enable --now {unit}",
        f"journalctl -u {unit} -f",
        f"settings: {config}; after a change: systemctl reload {unit}",
    ]


def _for_user(program: str, labels: Sequence[str], session: Session) -> list[str]:
    from flowagent.settings import DEFAULT_HOME

    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    settings = session.settings()
    config = settings.config or settings.home / "config.toml"
    unit = _unit("user/flowagent.service", program)
    variables = {} if settings.home == DEFAULT_HOME.expanduser() else {"FLOWAGENT_HOME": settings.home}
    if settings.config is not None:
        variables["FLOWAGENT_CONFIG"] = settings.config
    for name, path in variables.items():
        unit = unit.replace("\nExecStart=", f"\nEnvironment={_quoted(f'{name}={path}')}\nExecStart=", 1)
    _write(base / "systemd/user/flowagent.service", unit)
    _configure(config, labels)
    return [
        "systemctl --user daemon-reload",
        "systemctl --user enable --now flowagent",
        "loginctl enable-linger  # to have it run while you are not logged in",
        "journalctl --user -u flowagent -f",
        f"settings: {config}; after a change: systemctl --user reload flowagent",
    ]


def _quoted(text: str) -> str:
    """One word of a unit file, as it is."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _configure(path: Path, labels: Iterable[str]) -> None:
    """Have a configuration file, which is never replaced."""
    import json

    line = f"labels = {json.dumps(list(labels))}"
    if path.exists():
        if labels:
            click.echo(f"kept {path}: set there {line}, below [agent]")
        return
    _write(path, f"[agent]\n{line}\n" if labels else "", 0o640)


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    click.echo(f"wrote {path}")


def _unit(name: str, program: str) -> str:
    return _shipped(name).replace(PROGRAM, program)


def _shipped(name: str) -> str:
    """A file of the directory ``systemd``: wheels hold it, copies of the repository have it at their top."""
    import flowagent

    package = Path(flowagent.__file__).parent
    for directory in (package / "units", package.parents[1] / "systemd"):
        if (directory / name).is_file():
            return (directory / name).read_text("utf-8")
    raise UsageError(f"this installation of flowagent has no {name}; install it again")


def _program(*, anybody: bool) -> str:
    """The command of this installation. :raises UsageError: the agent's user could not execute it."""
    path = Path(sys.executable).parent / "flowagent"
    if not path.is_file():
        found = shutil.which("flowagent")
        path = Path(found) if found else path
    if not os.access(path, os.X_OK):
        raise UsageError(f"there is no {path}; install flowagent with pip, so that its command is there")
    if re.search(r"[\s%$\"'\\]", str(path)):
        raise UsageError(f"{path} has characters that units give a meaning to; install flowagent elsewhere")
    if anybody:
        for place in (path, Path(sys.executable), Path(os.path.realpath(sys.executable))):
            for directory in place.parents:
                if not directory.stat().st_mode & stat.S_IXOTH:
                    raise UsageError(
                        f"other users may not enter {directory}, so the agent's user cannot execute {place}; "
                        f"install flowagent elsewhere, say in /opt/flowagent, or use --user"
                    )
    return str(path)


def _version() -> int:
    """The major version of systemd here; 0: there is none."""
    try:
        done = subprocess.run(
            ["systemctl", "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.match(r"systemd (\d+)", done.stdout)
    return int(found[1]) if found else 0

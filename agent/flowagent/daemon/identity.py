"""Who an agent is: a name, and the directory that goes with it while no other process holds it.

The name is what leases are held under, so an agent that starts again under its name finds its attempts. The
directory's lock makes sure that one process at a time is that agent on this machine.
"""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path

from flowagent.errors import AgentError, SettingsError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass
class Identity:
    """A held name. ``close`` gives it up; so does the end of the process."""

    name: str
    directory: Path
    _lock: int

    @property
    def runs(self) -> Path:
        """Where the run directories of this agent are."""
        return self.directory / "runs"

    def close(self) -> None:
        os.close(self._lock)


def take(agents: Path, name: str | None, default: str) -> Identity:
    """Become the agent ``name``; without one, the first of ``default``, ``default-2``, … that is free.

    :raises SettingsError: the name is not a name, or its directory cannot be used.
    :raises AgentError: a process on this machine is that agent already."""
    if name is not None:
        identity = _try(agents, name)
        if identity is None:
            raise AgentError(f"an agent named {name} is running on this machine; give another --name")
        return identity
    for number in range(1, 1000):
        identity = _try(agents, default if number == 1 else f"{default}-{number}")
        if identity is not None:
            return identity
    raise SettingsError(f"no free agent name like {default}-N in {agents}; give a --name")


def _try(agents: Path, name: str) -> Identity | None:
    if not NAME.fullmatch(name):
        raise SettingsError(f"{name!r} cannot be an agent's name; use letters, digits, '.', '_' and '-'")
    directory = agents / name
    try:
        (directory / "runs").mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(f"cannot use {directory}: {error.strerror}; check its permissions") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return Identity(name, directory, lock)

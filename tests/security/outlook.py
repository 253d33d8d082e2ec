"""What the tests see of a stage from outside of its sandbox: runs, files, processes, mounts."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.security.jail import TOP, Jail

AGENT_NAME = "stage"
ENDED = ("completed", "failed", "crashed", "cancelled")
PATIENCE = 90.0
"""Seconds that anything may take, on a busy machine."""


class Outlook:
    """Asks for runs and looks at what became of them."""

    jail: Jail
    home: Path
    looked_through: tuple[Path, ...]
    """Where things could be that should not be there."""
    _desk: subprocess.Popen[str]
    _mounts: set[str]

    def __init__(self) -> None:
        self.runs: dict[str, str] = {}

    # -- runs ------------------------------------------------------------------------------------------

    def _request(self, request: dict[str, Any]) -> Any:
        assert self._desk.stdin is not None and self._desk.stdout is not None
        self._desk.stdin.write(json.dumps(request) + "\n")
        self._desk.stdin.flush()
        return json.loads(self._desk.stdout.readline())

    def ask(self, runs: list[list[Any]]) -> None:
        ids = self._request({"ask": runs})
        self.runs |= {name: run for (name, _, _), run in zip(runs, ids, strict=True)}

    def query(self, sql: str, *values: str) -> list[Any]:
        rows: list[Any] = self._request({"query": [sql, *values]})
        return rows

    def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "waited in vain: " + self.jail.path(TOP / "agent.log").read_text()
            time.sleep(0.05)

    def state(self, flow: str) -> str:
        return str(self.query("SELECT state FROM run WHERE id = ?", self.runs[flow])[0][0])

    def ended(self, flow: str) -> dict[str, Any]:
        """How the run of a flow ended, once it has."""
        self.until(lambda: self.state(flow) in ENDED)
        run = self.runs[flow]
        sql = "SELECT run.state, run.reason, sandbox FROM run JOIN attempt ON run_id = id WHERE id = ?"
        state, reason, sandbox = self.query(sql, run)[-1]
        return {"state": state, "reason": reason, "sandbox": sandbox}

    def output(self, flow: str) -> str:
        """All that the run of a flow printed, once it has ended."""
        self.ended(flow)
        return self.logged(self.runs[flow])

    def logged(self, run: str) -> str:
        rows = self.query("SELECT data FROM output WHERE run_id = ? ORDER BY start", run)
        return "".join(row[0] for row in rows).encode("latin-1").decode(errors="replace")

    # -- files and mounts ------------------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        return self.jail.path(path).exists()

    def files_named(self, *names: str) -> list[str]:
        """Files of these names, wherever they could have come to."""
        return [str(path) for path in self._files() if path.name in names]

    def files_with(self, text: bytes) -> list[str]:
        """Files with this text in them, but sources and the store."""
        found = []
        for path in self._files():
            with suppress(OSError):
                if path.suffix != ".py" and "flowagent.db" not in path.name and text in path.read_bytes():
                    found.append(str(path.relative_to(self.jail.inside)))
        return found

    def _files(self) -> list[Path]:
        found = []
        for top in self.looked_through:
            for directory, _, names in os.walk(self.jail.path(top)):
                if ".pyenv" not in directory:
                    found += [Path(directory, name) for name in names]
        return [path for path in found if path.is_file() and not path.is_symlink()]

    def has_directory_of(self, flow: str) -> bool:
        """Whether the run directory is still there when the run has ended, and a moment later."""
        self.ended(flow)
        runs = self.jail.path(self.home / "agents" / AGENT_NAME / "runs")
        end = time.monotonic() + 5
        while any(path.name.startswith(self.runs[flow]) for path in runs.iterdir()):
            if time.monotonic() > end:
                return True
            time.sleep(0.05)
        return False

    def mounted(self) -> set[str]:
        lines = Path(f"/proc/{self.jail.first}/mountinfo").read_text().splitlines()
        return {line.split()[4] for line in lines}

    def new_mounts(self) -> set[str]:
        return self.mounted() - self._mounts

    # -- processes -------------------------------------------------------------------------------------

    def lives_on(self, flow: str, name: str) -> bool:
        """Whether a process of that name is there when the run has ended."""
        self.ended(flow)
        for _ in range(20):  # what forks itself anew all the time may be missed by one look
            if any(_read(entry / "comm").startswith(name) for entry in self._processes()):
                return True
        return False

    def unconfined_with(self, text: str) -> list[str]:
        """Of the processes that are not confined: those with a text in what they mapped or were given."""
        found, looked_at = [], 0
        for entry in self._processes():
            if "Seccomp:\t0" in _read(entry / "status"):
                looked_at += 1
                if text in _read(entry / "maps") + _read(entry / "environ"):
                    found.append(_read(entry / "cmdline"))
        assert looked_at >= 4, "agent, launcher, supervisor, services: where are they?"
        return found

    def _processes(self) -> list[Path]:
        """All processes of the jail, also those that flows have put into namespaces below."""
        numbers = [entry for entry in os.listdir("/proc") if entry.isdigit()]
        ours = len(_numbers("self"))
        return [Path("/proc", number) for number in numbers if self._is_inside(number, ours)]

    def _is_inside(self, number: str, ours: int) -> bool:
        """By its number in the namespace below ours: there, too, it began when it began."""
        below = _numbers(number)[ours:]
        if not below:
            return False
        there = _read(self.jail.inside / "proc" / below[0] / "stat").rpartition(")")[2].split()
        here = _read(Path("/proc", number, "stat")).rpartition(")")[2].split()
        return bool(here) and here[19:20] == there[19:20]


def _numbers(number: str) -> list[str]:
    """The pids of a process, from our namespace down."""
    for line in _read(Path("/proc", number, "status")).splitlines():
        if line.startswith("NSpid:"):
            return line.split()[1:]
    return []


def _read(path: Path) -> str:
    """A file of /proc; empty when its process has ended."""
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""

"""A site for end-to-end tests: a home, real agents as subprocesses, the command line as users type it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "flowagent"]


@dataclass
class Site:
    """One FLOWAGENT_HOME, a directory for sources beside it, one that flows may write to, and the agents
    started there."""

    root: Path
    agents: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home = self.root / "home"
        self.sources = self.root / "sources"
        self.shared = self.root / "shared"
        for directory in (self.sources, self.shared):
            directory.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FLOWAGENT_")},
            "FLOWAGENT_HOME": str(self.home),
        }

    # -- files and commands ----------------------------------------------------------------------------

    def write(self, name: str, text: str) -> Path:
        path = self.sources / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def command(
        self, *arguments: str | Path, code: int | None = 0, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run ``flowagent ARGUMENTS``; its exit code must be ``code`` unless that is None."""
        return self.execute([*COMMAND, *map(str, arguments)], code=code, env=env, **more)

    def python(self, script: Path, code: int = 0, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run ``python SCRIPT``, as the author of a flow does."""
        return self.execute([sys.executable, str(script)], code=code, **more)

    def execute(
        self, arguments: list[str], code: int | None, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            arguments,
            env={**self.environment, **(env or {})},
            cwd=more.pop("cwd", self.root),
            capture_output=True,
            text=True,
            timeout=60,
            **more,
        )
        assert code is None or done.returncode == code, (
            f"{arguments[1:]} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        assert "Traceback (most recent call last)" not in done.stderr, done.stderr
        return done

    # -- agents ----------------------------------------------------------------------------------------

    def start(self, *options: str, wait: bool = True, **env: str) -> subprocess.Popen[bytes]:
        """Start an agent; with ``wait``, until it claims."""
        log = self.root / f"agent-{len(self.agents)}.log"
        with open(log, "wb") as file:
            agent = subprocess.Popen(
                [*COMMAND, "start", "--log-format", "json", "--allow-write", str(self.shared), *options],
                env={**self.environment, **env},
                stdout=subprocess.DEVNULL,
                stderr=file,
                cwd=self.root,
            )
        agent.log = log  # type: ignore[attr-defined]
        self.agents.append(agent)
        if wait:
            until(lambda: b'"event": "started"' in log.read_bytes() or agent.poll() is not None, 20)
            assert agent.poll() is None, log.read_text()
        return agent

    def stop(self, agent: subprocess.Popen[bytes], number: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Signal an agent and wait for its end; its exit code."""
        agent.send_signal(number)
        return agent.wait(timeout)

    def log(self, agent: subprocess.Popen[bytes]) -> str:
        return agent.log.read_text()  # type: ignore[attr-defined,no-any-return]

    def close(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                agent.kill()
                agent.wait()
        for pid in processes_of(self.home):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # -- runs ------------------------------------------------------------------------------------------

    def submit(self, name: str, *options: str) -> str:
        """Ask for a run; its id."""
        return str(json.loads(self.command("run", name, "--json", *options).stdout)["id"])

    def watch(self, name: str, *options: str, code: int = 0) -> str:
        """Ask for a run and watch it to its end, which gives the exit code; all that was seen."""
        done = self.execute([*COMMAND, "run", name, "--watch", *options], code=code, env={"NO_COLOR": "1"})
        return done.stdout + done.stderr

    def show(self, run: str) -> dict[str, Any]:
        shown = json.loads(self.command("show", run, "--json").stdout)
        return {**shown["run"], **{key: shown[key] for key in ("attempts", "tasks", "last_lines")}}

    def state(self, run: str) -> str:
        """Read from the database itself: a command each time would make the tests slow."""
        with closing(sqlite3.connect(self.home / "flowagent.db", timeout=10)) as database:
            return str(database.execute("SELECT state FROM run WHERE id = ?", [run]).fetchone()[0])

    def wait_for(self, run: str, *states: str, timeout: float = 30) -> dict[str, Any]:
        """Wait until the run is in one of the states, by default any terminal one; how it is shown then."""
        wanted = states or ("completed", "failed", "crashed", "cancelled")
        end = time.monotonic() + timeout
        while (state := self.state(run)) not in wanted:
            assert time.monotonic() < end, f"run {run} is {state}, not {wanted}: {self.show(run)}"
            time.sleep(0.02)
        return self.show(run)

    def output(self, run: str) -> str:
        return self.command("logs", run).stdout


def until(condition: Callable[[], Any], timeout: float = 20.0) -> Any:
    """Wait until the condition holds; what it returned then."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def processes_of(home: Path) -> list[int]:
    """Launchers, supervisors, flow processes: the home's path is in their arguments or environment."""
    found = []
    needle = str(home).encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            seen = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            zombie = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
        except OSError:
            continue
        if needle in seen and not zombie:
            found.append(int(entry.name))
    return found

"""A stage: one agent at one level in a jail of its own, and around it what flows must not reach."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.security.jail import TOP, USERS, Jail, home_of, lines_of
from tests.security.outlook import AGENT_NAME, ENDED, Outlook
from tests.security.probes import PROBES

from flowagent.runtime import cgroups

HERE = Path(__file__).parent
SECRET = "t0ken-" + "of-the-agent"
BOMBS = (
    "fork_bomb",
    "memory_bomb",
    "shared_memory_bomb",
    "memfd_bomb",
    "tmp_bomb",
    "disk_fill",
    "hidden_disk_fill",
    "unlinked_disk_fill",
    "output_flood",
    "descriptors",
    "frugal",
    "cpu_burn",
    "large_file",
    "overtime",
)
SURVIVORS = ("daemon", "reforker", "swarm", "mounter")
DEMANDS = (
    "humble",
    "greedy",
    "roundabout",
    "python_in_source",
    "python_in_home",
    "python_in_shared",
    "python_of_others",
    "hostile_preload",
    "misplaced",
    "cheat",
    "forger",
    "pickled",
    "explosive",
)


class Stage(Outlook):
    """``observe`` gives, for every probe, whether it reached what it was after."""

    def __init__(self, identity: str, level: str) -> None:
        super().__init__()
        self.identity, self.level = identity, level
        self.user = "fa-operator" if identity == "user" else "root"
        self.uid = USERS[self.user]
        self.user_home = home_of(self.user)
        self.home = TOP / "agent"
        self.script_directory = TOP / "sources"
        self.shared = TOP / "shared"
        self.marker = f"m4rker-{identity}-{level}-{os.getpid()}"
        self._told_before = (SECRET, self.marker + "-parameter", self.marker + "-variable")
        self.poison = str(TOP / "poison")
        self.looked_through = (self.home, self.user_home, TOP / "etc", self.script_directory, self.shared)
        self.jail = Jail()
        try:
            self._furnish()
            self._start()
        except BaseException:
            self.jail.close()
            raise

    def close(self) -> None:
        self.jail.close()
        cgroups.sweep(cgroups.find())  # killed like this, its launchers leave their empty groups

    # -- setting it ------------------------------------------------------------------------------------

    def _write(self, path: str | Path, text: str, mode: int = 0o600) -> None:
        self._directory(Path(path).parent)
        real = self.jail.path(path)
        real.write_text(text)
        real.chmod(mode)
        os.chown(real, self.uid, self.uid)

    def _directory(self, path: str | Path, mode: int = 0o755) -> None:
        real = self.jail.path(path)
        if not real.exists():
            self._directory(Path(path).parent)
            real.mkdir()
            real.chmod(mode)
            os.chown(real, self.uid, self.uid)

    def _furnish(self) -> None:
        """Decoys, sources, services."""
        home = self.user_home
        for name in (
            ".ssh/id_ed25519",
            ".aws/credentials",
            ".netrc",
            ".pgpass",
            ".git-credentials",
            ".bashrc",
        ):
            self._write(home / name, "decoy")
        for number in range(1200):  # more than the agent may have descriptors
            self._write(home / f"neighbour-{number}", "of what is closed", 0o644)
        self._write(self.flows_home / ".ssh/id_ed25519", "decoy")
        os.chown(self.jail.path(self.flows_home / ".ssh/id_ed25519"), USERS["fa-flows"], USERS["fa-flows"])
        self._directory(self.home, 0o700)
        for name in ("secrets", "results"):
            self._directory(self.home / name, 0o700)
        self._write(self.home / "secrets" / "TOKEN", SECRET)
        self._write(self.home / "results" / "of-another", "value")
        self._directory(self.shared, 0o777)
        os.symlink(self.home, self.jail.path(self.shared / "link"))
        for path in (
            self.script_directory / "evil/bin/python",
            self.home / "sources/evil-python",
            TOP / "open/python",
            self.shared / "venv/bin/python",
        ):
            self._directory(path.parent)
            os.symlink(os.path.realpath(sys.executable), self.jail.path(path))
            self._write(path.parent.parent / "pyvenv.cfg", "home = /usr/bin\n")
        self.jail.path(TOP / "open").chmod(0o777)
        for path in [HERE / "flows.py", HERE / "bombs.py", *(HERE / "probes").glob("*.py")]:
            self._write(self.script_directory / path.relative_to(HERE), path.read_text(), 0o644)
        self._write(self.poison + "/sitecustomize.py", "", 0o644)
        self._write(self.poison + "/poison_probe.py", "", 0o644)
        self._write(self.poison + "/bash_env", "", 0o644)
        library = next(
            line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libm" in line
        )
        self.jail.path(self.poison + "/preload.so").write_bytes(Path(library).read_bytes())
        arguments = [sys.executable, HERE / "services.py", str(self.uid), f"flowagent-{self.marker}", home]
        self._services = self.jail.start(
            "root", *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.world: dict[str, Any] = json.loads(self._services.stdout.readline())

    @property
    def flows_home(self) -> Path:
        return home_of("fa-flows")

    def _start(self) -> None:
        """The agent, and a run of somebody else."""
        self._environment = {"FLOWAGENT_HOME": str(self.home)}
        site = {
            "port": self.world["port"],
            "home": str(self.home),
            "user_home": str(self.user_home),
            "shared": str(self.shared),
            "script_directory": str(self.script_directory),
            "open": str(TOP / "open"),
            "marker": self.marker,
        }
        self._write(self.script_directory / "site.json", json.dumps(site), 0o644)
        script = self.script_directory / "flows.py"
        self._flowagent("register", script, self.script_directory / "bombs.py")
        pickle = next(self.jail.path(self.home / "flows" / "pickled").iterdir())
        pickle.write_bytes(pickle.read_bytes() + b".")
        self._desk = self.jail.start(
            self.user,
            sys.executable,
            HERE / "desk.py",
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        options = ["--run-as", "fa-flows"] if self.identity == "run_as" else []
        environment = {
            **self._environment,
            "SSH_AUTH_SOCK": self.world["ssh_agent"],
            "NOTIFY_SOCKET": "/run/systemd/notify",
            "OUTSIDE": "of the agent",
        }
        command = [
            sys.executable,
            "-m",
            "flowagent",
            "start",
            "--log-format",
            "json",
            "--sandbox",
            self.level,
        ]
        command += [
            "--allow-write",
            str(self.shared),
            "--allow-read",
            "/run/allowed",
            "--name",
            AGENT_NAME,
            "--grace",
            "1s",
            "--limit",
            "6",
            *options,
        ]
        log = self.jail.path(TOP / "agent.log")
        with open(log, "wb") as file:
            self.jail.start(self.user, *command, env=environment, stdin=subprocess.DEVNULL, stderr=file)
        self.until(lambda: '"started"' in log.read_text() or '"error"' in log.read_text())
        self._services.stdin.write("the agent is there\n")
        self._services.stdin.flush()
        assert self._services.stdout.readline() == "late\n"
        variables = {
            "LD_PRELOAD": self.poison + "/preload.so",
            "PYTHONPATH": self.poison,
            "BASH_ENV": self.poison + "/bash_env",
            "PYTHONSTARTUP": self.poison + "/poison_probe.py",
            "GIT_SSH_COMMAND": self.poison + "/bash_env",
            "HOME": "/forged",
            "TMPDIR": "/forged",
            "FLOWAGENT_RUN": "forged",
        }
        self.ask([["earlier", {"marker": self._told_before[1]}, {"EARLIER": self._told_before[2]}]])
        self.ended("earlier")
        self.ask([["victim", {"marker": "of the victim"}, {"VICTIM": "1", **variables}]])
        self.until(lambda: self.state("victim") in ENDED or "PROBE" in self.logged(self.runs["victim"]))
        assert self.state("victim") == "running", self.output("victim")
        directory = lines_of(self.logged(self.runs["victim"]))[0]["victim"]
        launchers = self.home / "agents" / AGENT_NAME / "launchers"
        cached = next(self.jail.path(self.home / "ground").iterdir())
        self.world |= {
            "home": str(self.home),
            "user_home": str(self.user_home),
            "flows_home": str(self.flows_home),
            "shared": str(self.shared),
            "script": str(script),
            "agent_directory": str(self.home / "agents" / AGENT_NAME),
            "victim_directory": os.path.dirname(directory),
            "launcher_socket": str(launchers / next(self.jail.path(launchers).glob("*.sock")).name),
            "ground": str(self.home / "ground" / cached.name),
            "other_pickle": str(self.home / "flows" / "pickled" / pickle.name),
            "cached_source": str(self._cached_source()),
            "poison": self.poison,
            "reversed_markers": [text[::-1] for text in self._told_before],
        }
        self._mounts = self.mounted()
        self.ask(
            [
                ["batch", {"world": self.world}, variables],
                ["offline", {"world": self.world}, {}],
                ["ports", {"world": self.world}, {}],
                *[[name, {}, {}] for name in (*SURVIVORS, *DEMANDS, *BOMBS)],
            ]
        )

    def _cached_source(self) -> Path:
        """A source that another flow has in the cache."""
        self.ask([["explosive", {}, {}]])
        self.ended("explosive")
        sources = self.jail.path(self.home / "sources")
        found = next(sources.glob("*/source/*"))
        return self.home / "sources" / found.relative_to(sources)

    def _flowagent(self, *arguments: str | Path) -> str:
        done = self.jail.run(self.user, sys.executable, "-m", "flowagent", *arguments, env=self._environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # -- the outcome -------------------------------------------------------------------------------------

    def observe(self) -> dict[str, tuple[bool, str]]:
        """Probe -> was it reached, and what was met."""
        found = {}
        for flow in ("batch", "offline", "ports"):
            for line in lines_of(self.output(flow)):
                found[line["probe"]] = (line["reached"], line["how"])
            assert self.ended(flow)["state"] == "completed", (self.ended(flow), self.output(flow)[-3000:])
        for each in PROBES:
            if each.outside:
                found[each.key] = (each.attempt(self), "")
        return found

    def control(self) -> dict[str, tuple[bool, str]]:
        """The same without any sandbox, by root: what shows that the probes can do what they try."""
        code = "import importlib, json, os, sys\n"
        code += "sys.path.insert(0, '/mnt/sources'); os.chdir('/mnt/control/work'); import probes\n"
        code += "[importlib.import_module('probes.' + name) for name in sys.argv[2].split(',')]\n"
        code += "probes.run_all(json.loads(sys.argv[1]), ('',))"
        groups = ",".join(sorted({each.group for each in PROBES}))
        environment = {"TMPDIR": "/mnt/control", "HOME": "/mnt/control", "FLOWAGENT_RUN": "1"}
        self._directory("/mnt/control/work")
        for name in ("status", "lease", "spec.json", "outcome", "output"):
            self._write("/mnt/control/" + name, "")
        done = self.jail.run(
            "root", sys.executable, "-c", code, json.dumps(self.world), groups, env=environment
        )
        assert done.returncode == 0, done.stderr
        return {line["probe"]: (line["reached"], line["how"]) for line in lines_of(done.stdout)}

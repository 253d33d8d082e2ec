"""A jail for the tests themselves: everything that a probe could break, reach or leave behind is in it.

It is namespaces (mount, pid, IPC) made as root, in which agents, services and decoys live: empty ``/tmp``,
``/run``, ``/dev/shm`` and home of root, other users in ``/etc/passwd``, other hashes in ``/etc/shadow``. When
its first process ends, the kernel ends all others, and what they left goes with the mounts. flowagent does
not know of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
TOP = Path("/mnt")
"""Where agents, sources and decoys are, inside."""
USERS = {"root": 0, "fa-operator": 61801, "fa-flows": 61802}
libc = ctypes.CDLL(None, use_errno=True)
MS_BIND = 0x1000
COVERED = ("/tmp", "/var/tmp", "/run", "/dev/shm", str(TOP))


def home_of(user: str) -> Path:
    """A user's home in the jail, as its user database has it."""
    return Path(pwd.getpwuid(0).pw_dir) if user == "root" else TOP / user


class Jail:
    """One jail. ``inside`` is how this process sees its file system."""

    def __init__(self) -> None:
        assert os.geteuid() == 0, "tests/security makes namespaces and users: run it as root"
        flags = ["--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        flags += ["--propagation", "private"]
        self._started: list[subprocess.Popen[Any]] = []
        self._outer = subprocess.Popen(
            ["unshare", *flags, sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._outer.stdout is not None
        assert self._outer.stdout.readline() == "ready\n", "the jail could not be made: see above"
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        self.first = int(children[0])
        self.inside = Path(f"/proc/{self.first}/root")

    def close(self) -> None:
        self._outer.kill()  # --kill-child: and with it the first process, and with that all others
        self._outer.communicate()
        for _ in range(500):  # the first process goes last
            if not os.path.exists(f"/proc/{self.first}"):
                break
            time.sleep(0.01)
        for process in self._started:
            with process:  # closes its pipes and collects it
                process.kill()

    def path(self, path: str | Path) -> Path:
        """A path of the jail, for this process."""
        return self.inside / str(path).lstrip("/")

    def _arguments(self, user: str, command: Sequence[str | Path], env: Mapping[str, str]) -> list[str]:
        uid = USERS[user]
        known = {
            "PATH": os.defpath + ":/usr/sbin",
            "LANG": "C.UTF-8",
            "HOME": str(home_of(user)),
            "PYTHONPATH": str(REPOSITORY),
            **env,
        }
        return [
            *("nsenter", f"--target={self.first}", "--mount", "--ipc", "--pid"),
            # should a limit of flowagent fail, the machine lives on; descriptors are as few as services get
            *("prlimit", "--nproc=1500", "--nofile=1024:"),
            *("setsid", "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"),
            *(
                "env",
                "--ignore-environment",
                *(f"{name}={value}" for name, value in known.items()),
            ),
            *map(str, command),
        ]

    def start(
        self, user: str, *command: str | Path, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.Popen[Any]:
        """Start a command in the jail; it ends with it."""
        self._started.append(subprocess.Popen(self._arguments(user, command, env or {}), **more))
        return self._started[-1]

    def run(
        self, user: str, *command: str | Path, env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the jail to its end."""
        arguments = self._arguments(user, command, env or {})
        return subprocess.run(arguments, capture_output=True, text=True, timeout=timeout)


# -- the first process in it, which makes it ---------------------------------------------------------------


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _bind(source: str, target: str) -> None:
    if libc.mount(source.encode(), target.encode(), None, ctypes.c_ulong(MS_BIND), None) != 0:
        raise OSError(ctypes.get_errno(), f"cannot bind {target}")


def _needed() -> list[str]:
    """What has to be there although a directory above it is emptied, or closed to users."""
    found = {str(REPOSITORY), sys.prefix, sys.base_prefix, os.path.realpath(sys.executable)}
    found = {os.path.dirname(path) if os.path.isfile(path) else path for path in found}
    return sorted(path for path in found if not any(path.startswith(other + "/") for other in found))


def _covers(needed: Sequence[str]) -> list[str]:
    """The directories to empty: known ones, and those that close the way to what other users need."""
    found = {*COVERED, str(home_of("root"))}
    for path in needed:
        above = [*reversed(Path(path).parents), Path(path)]
        found |= {str(each) for each in above if not each.stat().st_mode & 0o001}
    return sorted(each for each in found if not any(each.startswith(other + "/") for other in found))


def _empty(path: str, needed: Sequence[str]) -> None:
    kept = [each for each in needed if each.startswith(path + "/")]
    opened = [os.open(each, os.O_PATH | os.O_DIRECTORY) for each in kept]
    mode = "1777" if path in ("/tmp", "/var/tmp", "/dev/shm") else "755"
    _mount("-t", "tmpfs", "-o", f"mode={mode},size=1G", "tmpfs", path)
    for each, fd in zip(kept, opened, strict=True):
        os.makedirs(each, exist_ok=True)
        _bind(f"/proc/self/fd/{fd}", each)  # mount(8) would look up the name that it has no more
        os.close(fd)


def make() -> None:
    """Make it; then stay, and collect what nobody waits for, until the tests are done."""
    needed = _needed()
    for path in _covers(needed):
        _empty(path, needed)
    accounts = TOP / "etc"
    accounts.mkdir()
    for name, form in (
        ("passwd", "{name}:x:{uid}:{uid}::{home}:/bin/sh\n"),
        ("group", "{name}:x:{uid}:\n"),
    ):
        lines = Path("/etc", name).read_text()
        for user, uid in USERS.items():
            if uid:
                lines += form.format(name=user, uid=uid, home=home_of(user))
        (accounts / name).write_text(lines)
        _mount("--bind", str(accounts / name), f"/etc/{name}")
    if os.path.exists("/etc/shadow"):
        (accounts / "shadow").write_text("root:decoy:1::::::\n")
        (accounts / "shadow").chmod(0o640)
        _mount("--bind", str(accounts / "shadow"), "/etc/shadow")
    for user, uid in USERS.items():
        home_of(user).mkdir(mode=0o755, exist_ok=True)
        os.chown(home_of(user), uid, uid)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        time.sleep(0.2)


def lines_of(output: str) -> list[dict[str, Any]]:
    """The JSON lines that a probing flow printed."""
    marked = (line.partition("PROBE ") for line in output.splitlines())
    return [json.loads(rest) for _, mark, rest in marked if mark]


if __name__ == "__main__":
    make()

"""Probes: each tries one thing that a flow should not be able to do, and says whether it could.

They are executed by a flow, so they need nothing but the standard library, and change nothing that matters
when they succeed: they open without writing, signal with what is ignored, set what is set already. Each runs
in a process of its own. What is expected of it stands with it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

World = Any
"""A SimpleNamespace: where things are on the machine that is probed, see tests.security.stage."""
LEVELS = ("process", "landlock", "namespace")
IDENTITIES = ("user", "root", "run_as")
"""Who the agent is: an ordinary user, root, and root with --run-as."""
BLOCKED, VISIBLE, ALLOWED = "blocked", "visible", "allowed by design"
VERDICTS = {"B": BLOCKED, "V": VISIBLE, "A": ALLOWED}
PATIENCE = 5.0
"""Seconds that one probe may take."""

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Probe(NamedTuple):
    """``expected``: identity -> a letter for each level."""

    group: str
    name: str
    title: str
    expected: dict[str, str]
    why: str
    everywhere: bool
    outside: bool
    attempt: Callable[[World], bool]

    @property
    def key(self) -> str:
        return f"{self.group}.{self.name}"

    def verdict(self, identity: str, level: str) -> str:
        return VERDICTS[self.expected[identity][LEVELS.index(level)]]


PROBES: list[Probe] = []


def probe(
    title: str,
    user: str,
    root: str | None = None,
    run_as: str | None = None,
    why: str = "",
    everywhere: bool = True,
    outside: bool = False,
) -> Callable[[Callable[[World], bool]], Callable[[World], bool]]:
    """Declare a probe and what is expected, a letter per level: Blocked, Visible, Allowed by design.

    ``everywhere``: without a sandbox, root can do it on any machine, so the probe is known to work.
    ``outside``: it is told from outside of the sandbox, of a stage, whether it was reached."""

    def declare(function: Callable[[World], bool]) -> Callable[[World], bool]:
        expected = {"user": user, "root": root or user, "run_as": run_as or user}
        assert all(len(letters) == len(LEVELS) for letters in expected.values()), title
        assert why or not set("VA") & set("".join(expected.values())), f"{title}: say why it is not blocked"
        group = function.__module__.rpartition(".")[2]
        PROBES.append(Probe(group, function.__name__, title, expected, why, everywhere, outside, function))
        return function

    return declare


# -- what probes are made of -------------------------------------------------------------------------------


def checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return int(result)


def opens(path: str, flags: int = os.O_RDONLY) -> bool:
    """Whether a file can be opened, and, to read, has something to say."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return bool(flags & (os.O_WRONLY | os.O_RDWR)) or bool(os.read(fd, 1))
    finally:
        os.close(fd)


def creates(directory: str) -> bool:
    """Whether a file can be made in a directory; it is taken away again."""
    path = os.path.join(directory, f"probe-{os.getpid()}")
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    os.unlink(path)
    return True


def found(needle: bytes) -> int:
    """The process, other than of this flow, with these bytes in its command line or name; as it is seen."""
    own = os.getsid(0)
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            pid = int(entry)
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                seen = file.read()
            with open(f"/proc/{pid}/comm", "rb") as file:
                seen += b"\0" + file.read()
            if needle in seen and os.getsid(pid) != own and pid > 1 and b"nsenter" not in seen:
                return pid
    raise ProcessLookupError(errno.ESRCH, "no such process is to be seen")


def agent(_: World = None) -> int:
    return found(b"flowagent\0start\0")


def launcher(_: World = None) -> int:
    return found(b"launch.py\0003\0")


def supervisor(_: World = None) -> int:
    return found(b"flowagent-run")


def victim(_: World = None) -> int:
    """The flow process of another run."""
    return found(b"flow:victim")


# -- executing them ------------------------------------------------------------------------------------------


def run_all(world: dict[str, Any], chosen: tuple[str, ...]) -> None:
    """Try those whose name begins so, each in a process of its own, and print a line about each."""
    for each in PROBES:
        if each.key.startswith(chosen) and not each.outside:
            outcome = _outcome(each, SimpleNamespace(**world))
            print("PROBE " + json.dumps({"probe": each.key, **outcome}), flush=True)


def _outcome(each: Probe, world: World) -> dict[str, Any]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.close(read)
            os.write(write, json.dumps(_attempt(each, world)).encode())
        os._exit(0)
    os.close(write)
    said = b""
    deadline = time.monotonic() + PATIENCE
    while select.select([read], [], [], max(0, deadline - time.monotonic()))[0]:
        piece = os.read(read, 4096)
        if not piece:
            break
        said += piece
    else:
        said = b'{"reached": false, "how": "it took too long"}'
        os.kill(pid, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(pid, 0)
    if not said and os.WIFSIGNALED(status):
        return {"reached": False, "how": f"killed by signal {os.WTERMSIG(status)}"}
    outcome: dict[str, Any] = json.loads(said)
    return outcome


def _attempt(each: Probe, world: World) -> dict[str, Any]:
    try:
        return {"reached": bool(each.attempt(world)), "how": ""}
    except OSError as error:
        return {"reached": False, "how": f"{errno.errorcode.get(error.errno or 0)}: {error}"}
    except Exception as error:
        return {"reached": False, "how": f"broken: {type(error).__name__}: {error}"}

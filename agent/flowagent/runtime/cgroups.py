"""Control groups: the kernel's own accounts and limits of an attempt's processes, where we may have any.

Version 2 where a subtree is delegated to us, as a systemd unit with ``Delegate=`` has it; version 1
where this user may write there, which is root. Moving a process into a group takes the kernel over 10 ms, so
a supervisor moves once, at its start, into a group of its own; what it forks is born there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress

MOUNTS = "/proc/self/mountinfo"
MEMBERSHIP = "/proc/self/cgroup"
UNIFIED, MEMORY, PIDS = "unified", "memory", "pids"
"""Names of hierarchies: version 2's one, and two of version 1."""
NO_LIMIT = -1
OWN_GROUP = "agent"
"""In a delegated subtree: processes may be in the leaves only, so the agent moves into one of them."""


def find() -> dict[str, str]:
    """Hierarchy -> the directory in which groups can be made; what cannot be had is left out."""
    found: dict[str, str] = {}
    member = _memberships()
    for name, mount, root in _hierarchies():
        path = member.get(name)
        if path is None:
            continue
        inside = path[len(root) :] if root != "/" and path.startswith(root) else path
        directory = mount + inside.rstrip("/")
        if name == UNIFIED and directory.endswith("/" + OWN_GROUP):
            directory = os.path.dirname(directory)
        if _can_make_groups(directory):
            found[name] = directory
    if UNIFIED in found:
        _delegate(found[UNIFIED])
    return found


def limits(roots: Mapping[str, str], controller: str) -> bool:
    """Whether groups below ``roots`` can limit memory, or processes: a hierarchy of version 2 alone does not
    say so, it need not have the controller."""
    if controller in roots:
        return True
    with suppress(OSError, KeyError):
        return controller in _read(roots[UNIFIED] + "/cgroup.subtree_control").split()
    return False


def _memberships() -> dict[str, str]:
    found = {}
    with suppress(OSError), open(MEMBERSHIP) as file:
        for line in file:
            number, controllers, path = line.rstrip("\n").split(":", 2)
            for name in controllers.split(",") if number != "0" else (UNIFIED,):
                found[name] = path
    return found


def _hierarchies() -> list[tuple[str, str, str]]:
    """Name, mount point, and which part of the hierarchy is mounted there."""
    found = []
    with suppress(OSError), open(MOUNTS) as file:
        for line in file:
            fields, _, rest = line.partition(" - ")
            kind, _, options = rest.split(" ", 2)
            root, mount = fields.split()[3:5]
            if kind == "cgroup2":
                found.append((UNIFIED, mount, root))
            elif kind == "cgroup":
                names = options.strip().split(" ")[-1].split(",")
                found += [(name, mount, root) for name in (MEMORY, PIDS) if name in names]
    return found


def _can_make_groups(directory: str) -> bool:
    trial = f"{directory}/flowagent-trial-{os.getpid()}"
    try:
        os.mkdir(trial)
        os.rmdir(trial)
    except OSError:
        return False
    return True


def _delegate(directory: str) -> None:
    """Hand the controllers on to the groups below, if the subtree is ours alone to arrange."""
    try:
        wanted = {MEMORY, PIDS} & set(_read(directory + "/cgroup.controllers").split())
        if directory.endswith(".service") and not os.path.isdir(f"{directory}/{OWN_GROUP}"):
            # Without DelegateSubgroup=, systemd starts the next agent in this very group, which the kernel
            # refuses once memory is handed on and runs are still alive below.
            wanted.discard(MEMORY)
        given = set(_read(directory + "/cgroup.subtree_control").split())
        if wanted <= given:
            return
        if os.path.exists(directory + "/cgroup.type"):  # not the root, which may have processes
            here = _read(directory + "/cgroup.procs").split()
            if any(not _ours(int(pid)) for pid in here):
                return
            os.makedirs(f"{directory}/{OWN_GROUP}", exist_ok=True)
            for pid in here:
                _write(f"{directory}/{OWN_GROUP}/cgroup.procs", pid)
        _write(directory + "/cgroup.subtree_control", " ".join("+" + name for name in sorted(wanted)))
    except (OSError, ValueError):
        return


def _ours(pid: int) -> bool:
    """This process, or one that it or an agent before it has started: not a shell that happens to be here."""
    if pid == os.getpid():
        return True
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read()
    except OSError:
        return True  # it has ended
    return b"launch.py" in command


class Group:
    """The control groups of one supervisor and, for as long as it runs one, of an attempt."""

    def __init__(self, roots: Mapping[str, str], name: str) -> None:
        self._paths = {hierarchy: f"{root}/flowagent-{name}" for hierarchy, root in roots.items()}
        self._limited: tuple[int | None, int | None] | None = None  # as last set
        self._kills = 0

    @classmethod
    def enter(cls, roots: Mapping[str, str], name: str) -> Group:
        """Make a group and move this process there. :raises OSError: it could not be."""
        group = cls(roots, name)
        for path in group._paths.values():
            for last in (False, True):
                with suppress(FileExistsError):
                    os.mkdir(path)
                try:
                    _write(path + "/cgroup.procs", str(os.getpid()))
                    break
                except FileNotFoundError:  # swept in between by another launcher
                    if last:
                        raise
        return group

    @property
    def limits_memory(self) -> bool:
        return self._file("memory.max", MEMORY, "memory.limit_in_bytes") is not None

    @property
    def limits_processes(self) -> bool:
        return self._file("pids.max", PIDS, "pids.max") is not None

    def _file(self, unified: str, controller: str, other: str) -> str | None:
        for hierarchy, name in ((UNIFIED, unified), (controller, other)):
            if hierarchy in self._paths:
                path = f"{self._paths[hierarchy]}/{name}"
                if os.path.exists(path):
                    return path
        return None

    def limit(self, memory: int | None, processes: int | None) -> None:
        """Set what all processes here may use together; the supervisor itself is one of them."""
        if self._limited == (memory, processes):
            return
        path = self._file("memory.max", MEMORY, "memory.limit_in_bytes")
        if path is not None:
            version_1 = path.endswith("limit_in_bytes")
            value = str(memory) if memory is not None else str(NO_LIMIT) if version_1 else "max"
            name = "memory.memsw.limit_in_bytes" if version_1 else "memory.swap.max"
            swap = f"{os.path.dirname(path)}/{name}"
            if version_1:  # the sum of both may never be below the one
                with suppress(OSError):
                    _write(swap, str(NO_LIMIT))
            _write(path, value)
            with suppress(OSError):  # there may be no accounts of swap
                _write(swap, value if version_1 or memory is None else "0")
        path = self._file("pids.max", PIDS, "pids.max")
        if path is not None:
            _write(path, "max" if processes is None else str(processes + 1))
        self._limited = (memory, processes)

    def allow_no_more(self) -> None:
        """No process here can start another, so that killing them all comes to an end."""
        path = self._file("pids.max", PIDS, "pids.max")
        if path is not None:
            self._limited = None
            with suppress(OSError):
                _write(path, "0")

    def allow_again(self) -> None:
        """After :meth:`allow_no_more`: the supervisor itself can fork again."""
        if self._limited is None:
            self.limit(None, None)

    def has_killed(self) -> bool:
        """Whether the kernel has killed here for want of memory since this was asked before."""
        path = self._file("memory.events", MEMORY, "memory.oom_control")
        before = self._kills
        if path is not None:
            with suppress(OSError, ValueError):
                for line in _read(path).splitlines():
                    name, _, value = line.partition(" ")
                    if name == "oom_kill":
                        self._kills = int(value)
        return self._kills > before

    def cpu_time(self) -> float | None:
        """CPU seconds of all processes that were ever here."""
        if UNIFIED in self._paths:
            with suppress(OSError, ValueError, IndexError):
                return int(_read(self._paths[UNIFIED] + "/cpu.stat").split()[1]) / 1e6
        return None

    def kill(self) -> bool:
        """Kill all processes here, at one stroke; whether the kernel can."""
        if UNIFIED in self._paths:
            with suppress(OSError):
                _write(self._paths[UNIFIED] + "/cgroup.kill", "1")
                return True
        return False

    def remove(self, patience: float = 1.0) -> None:
        """Take the group away when its last process is gone; the kernel may take a moment to see that."""
        deadline = time.monotonic() + patience
        for path in self._paths.values():
            while True:
                try:
                    os.rmdir(path)
                except FileNotFoundError:
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.002)
                else:
                    break


def sweep(roots: Mapping[str, str]) -> None:
    """Remove groups that nobody is in any more, left by launchers that were killed."""
    for root in roots.values():
        with suppress(OSError):
            for name in os.listdir(root):
                if name.startswith("flowagent-"):
                    with suppress(OSError):
                        os.rmdir(f"{root}/{name}")


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)

"""How much one attempt may use, and what sees to it.

The kernel where it can (a cgroup, resource limits), else the supervisor, which looks several times a second.
``None`` is no limit. What a limit means is the same either way; only how soon it bites differs.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from flowagent.flows.declarations import DURATIONS, SIZES

FIRST_LOOK, LONGEST_LOOK = 0.1, 0.5
"""Seconds between looks at what no kernel watches."""
LONGEST_PATH = 3500
"""Characters of a path, near the most that can be named: what lies deeper cannot be measured."""
PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")


class Limits(NamedTuple):
    """The limits of one attempt. memory, file_size, output, disk: bytes; cpu_time, wall_time: seconds.

    memory, processes and cpu_time are of all processes of the attempt together."""

    memory: int | None = None
    processes: int | None = None
    open_files: int | None = None
    file_size: int | None = None
    cpu_time: float | None = None
    wall_time: float | None = None
    output: int | None = None
    disk: int | None = None

    def tightened(self, asked: Mapping[str, float]) -> Limits:
        """With what a flow asks for, where that is less."""
        mine = self._asdict()
        less = {name: value for name, value in asked.items() if mine[name] is None or value < mine[name]}
        return Limits(**{**mine, **less})


class Excess(NamedTuple):
    """A limit that was broken."""

    name: str
    reason: str


def excess(name: str, limit: float) -> Excess:
    """What to say of it."""
    amount = size(limit) if name in SIZES else f"{limit:g} s" if name in DURATIONS else f"{limit:g}"
    what = {
        "memory": "of memory",
        "processes": "processes",
        "cpu_time": "of CPU time",
        "output": "of output",
        "disk": "of disk space",
    }[name]
    return Excess(name, f"it used more than its limit of {amount} {what}")


def size(number: float) -> str:
    """Bytes for people, as they would be typed: 512M, 1.5G."""
    for unit, letter in ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if number >= unit:
            return f"{number / unit:.4g}{letter}"
    return f"{number:.0f} bytes"


def apply(limits: Limits, *, memory: bool) -> None:
    """Set this process' own limits but that of open files, which all that it starts inherits. ``memory``: by
    them, too.

    :raises OSError: the system allows less than was asked for."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_FSIZE, limits.file_size)
    if limits.cpu_time is not None:
        _lower(resource.RLIMIT_CPU, max(1, round(limits.cpu_time + 0.5)))
    if memory:  # of one process only; the supervisor adds them up
        _lower(resource.RLIMIT_DATA, limits.memory)


def apply_open_files(limits: Limits) -> None:
    """The same for open files: of those that are open already, none is closed."""
    _lower(resource.RLIMIT_NOFILE, limits.open_files)


def _lower(kind: int, value: float | None) -> None:
    if value is None:
        return
    _, hard = resource.getrlimit(kind)
    least = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
    resource.setrlimit(kind, (least, least))


class Watch:
    """Looks at what an attempt uses. ``processes`` lists its pids; ``counted``: memory and processes too."""

    def __init__(
        self,
        limits: Limits,
        *,
        directory: str,
        processes: Callable[[], Iterable[int]],
        counted: bool,
        spent: Callable[[], float] | None,
    ) -> None:
        self._limits = limits
        self._directory = directory
        self._processes = processes
        self._counted = counted and (limits.memory is not None or limits.processes is not None)
        self._spent = spent  # CPU seconds by a cgroup
        self._pause = FIRST_LOOK
        self._disk_again = 0.0
        self.next = time.monotonic()

    def look(self) -> Excess | None:
        """What is over its limit, if anything. ``next``: when to look again, by the monotonic clock."""
        now = time.monotonic()
        self._pause = min(LONGEST_LOOK, self._pause * 1.5)
        self.next = now + self._pause
        return self._of_files(now) or self._of_processes()

    def _of_files(self, now: float) -> Excess | None:
        limits = self._limits
        if limits.disk is not None and now >= self._disk_again:
            if _used(self._directory, limits.disk) > limits.disk:
                return excess("disk", limits.disk)
            self._disk_again = now + 20 * (time.monotonic() - now)  # a large tree is measured less often
        return None

    def _of_processes(self) -> Excess | None:
        limits = self._limits
        if self._spent is not None:
            if limits.cpu_time is not None and self._spent() > limits.cpu_time:
                return excess("cpu_time", limits.cpu_time)
            if not self._counted:
                return None
        elif limits.cpu_time is None and not self._counted:
            return None
        count, memory, seconds = 0, 0, 0.0
        for pid in self._processes():
            count += 1
            memory += _resident(pid)
            seconds += _cpu_time(pid)
        if limits.cpu_time is not None and self._spent is None and seconds > limits.cpu_time:
            return excess("cpu_time", limits.cpu_time)
        if self._counted and limits.memory is not None and memory > limits.memory:
            return excess("memory", limits.memory)
        if self._counted and limits.processes is not None and count > limits.processes:
            return excess("processes", limits.processes)
        return None


def _used(directory: str, enough: int) -> int:
    """Bytes on disk below a directory; no need to count beyond ``enough``. Links are not followed."""
    total = 0
    pending = [directory]
    while pending and total <= enough:
        path = pending.pop()
        if len(path) > LONGEST_PATH:
            return enough + 1  # made to hide something
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except PermissionError:
            return enough + 1  # closed, so that it cannot be measured
        except OSError:
            continue
    return total


def _resident(pid: int) -> int:
    """Bytes of memory that are this process' own."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            fields = file.read().split()
        return (int(fields[1]) - int(fields[2])) * PAGE
    except (OSError, IndexError, ValueError):
        return 0


def _cpu_time(pid: int) -> float:
    """Seconds of this process and of those below it that it has waited for."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return sum(map(int, fields[11:15])) / TICK
    except (OSError, IndexError, ValueError):
        return 0.0

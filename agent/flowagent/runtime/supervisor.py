"""The supervisor: parent, timekeeper and reaper of one attempt's processes.

It is forked by the launcher, depends on neither launcher nor agent, and speaks through the run directory. As
a child subreaper it inherits every descendant of the flow process however it was daemonised, and it does not
end before all of them have.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import time
from typing import Any, Callable

from flowagent.runtime.rundir import RunDirectory, boottime

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
_libc = ctypes.CDLL(None, use_errno=True)

FALLOC_FL_KEEP_SIZE = 1

WATCHED = (signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM)
MAX_OUTCOME = 1 << 16
"""Bytes of the outcome that a flow process may leave behind."""


def prctl(option: int, value: int) -> None:
    """:raises OSError: the kernel refused."""
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")


def make_undumpable() -> None:
    """Keep other processes of this user from reading this one's memory and environment."""
    prctl(PR_SET_DUMPABLE, 0)


def set_process_name(name: str) -> None:
    """What ``ps`` and ``top`` show; 15 bytes."""
    _libc.prctl(PR_SET_NAME, name.encode()[:15] + b"\0", 0, 0, 0)


def supervise(directory: str, secrets_fd: int | None, lease_fd: int | None) -> None:
    """Execute the attempt in ``directory`` to its end.

    ``secrets_fd`` is passed on to the flow process; ``lease_fd`` holds the lock that keeps the source in the
    cache, simply by being open here until the end. Raises nothing: what goes wrong is noted as the end."""
    run = RunDirectory(directory)
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.umask(0o077)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    set_process_name("flowagent-run")
    try:
        status = run.open_status()
    except OSError:
        return  # another supervisor has, or had, this attempt: asking twice is harmless
    try:
        _reserve(status)
        end = _Attempt(run, status).execute(secrets_fd)
    except Exception as error:
        kill_descendants()
        end = {"ended": True, "error": f"{type(error).__name__}: {error}"}
    _note(status, end)


def _note(status: int, data: dict[str, Any]) -> None:
    line = json.dumps(dict(data, time=time.time()) if "ended" in data else data).encode() + b"\n"
    while line:
        line = line[os.write(status, line) :]


def _reserve(status: int) -> None:
    """Have the room on disk for all notes, so that the end can be noted however full the flow makes it.

    :raises OSError: it is full already. Where the file system cannot reserve, nothing is."""
    if _libc.fallocate(status, FALLOC_FL_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(MAX_OUTCOME)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(code, os.strerror(code))


class _Attempt:
    def __init__(self, run: RunDirectory, status: int) -> None:
        self._run = run
        self._status = status
        self._spec = run.read_spec()
        self._reason: str | None = None  # why it is being stopped
        self._stop_kind: str | None = None  # timeout, lease, stop
        self._kill_at: float | None = None  # boottime of the SIGKILL that follows a SIGTERM
        self._main: int | None = None
        self._main_status: int | None = None
        self._lease = 0.0  # as last read

    def execute(self, secrets_fd: int | None) -> dict[str, Any]:
        output = os.open(self._run.output_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        outcome_read, outcome_write = os.pipe()
        _note(self._status, {"supervisor": os.getpid(), "started": time.time(), "boottime": boottime()})
        oom_kills = _oom_kills()
        if boottime() >= self._read_lease():
            return {"ended": True, "stop": "lease", "reason": "its lease ran out before it began"}
        began = boottime()
        parent = os.getpid()
        self._main = os.fork()
        if self._main == 0:
            # Nothing returns from here; flowagent.runtime.child ends the process.
            from flowagent.runtime import child

            child.run(self._run, self._spec, parent, output, outcome_write, secrets_fd)
        os.close(outcome_write)
        os.close(output)
        if secrets_fd is not None:
            os.close(secrets_fd)
        _note(self._status, {"pid": self._main})
        self._watch(began)
        leftovers = kill_descendants()
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        status = self._main_status if self._main_status is not None else 0
        killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        return {
            "ended": True,
            "stop": self._stop_kind,
            "reason": self._reason,
            "exit_code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "signal": killed_by,
            "out_of_memory": killed_by == signal.SIGKILL
            and self._kill_at is None
            and _oom_kills() > oom_kills,
            "peak_memory": usage.ru_maxrss * 1024,
            "cpu_time": round(usage.ru_utime + usage.ru_stime, 6),
            "outcome": _read_outcome(outcome_read),
            "leftovers": leftovers,
        }

    def _watch(self, began: float) -> None:
        """Until the main process has ended: reap, stop when told to, keep the time."""
        timeout = float(self._spec["timeout"] or 0.0)
        expires = began + timeout if timeout else None
        self._read_stop()  # word that was left before there was a supervisor to hear the signal
        while self._main_status is None:
            now = boottime()
            lease = self._read_lease()
            if now >= lease:
                self._reason = "no agent renewed its lease"
                self._stop_kind = "lease"
                self._kill()
            elif expires is not None and now >= expires and self._stop_kind is None:
                self._reason = f"timed out after {timeout:g} s"
                self._stop("timeout", float(self._spec.get("grace", 10.0)), now)
            elif self._kill_at is not None and now >= self._kill_at:
                self._kill()
            deadlines = [lease]
            if expires is not None and self._stop_kind is None:
                deadlines.append(expires)
            if self._kill_at is not None:
                deadlines.append(self._kill_at)
            received = signal.sigtimedwait(WATCHED, max(0.0, min(min(deadlines) - boottime(), 3600.0)))
            if received is not None and received.si_signo == signal.SIGUSR1:
                self._read_stop()
            elif received is not None and received.si_signo == signal.SIGTERM and self._stop_kind is None:
                self._reason = "its supervisor was asked to end"
                self._stop("stop", float(self._spec.get("grace", 10.0)), boottime())
            self._reap()

    def _read_lease(self) -> float:
        """Until when the attempt may live. What cannot be read extends nothing: the last word stands."""
        self._lease = self._run.read_lease() or self._lease
        return self._lease

    def _read_stop(self) -> None:
        stop = self._run.read_stop()
        if stop is None:
            return
        if self._stop_kind is None:
            self._reason = str(stop["reason"])
            self._stop("stop", float(stop["grace"]), boottime())
        else:  # asked again, perhaps with less patience
            sooner = boottime() + float(stop["grace"])
            self._kill_at = sooner if self._kill_at is None else min(self._kill_at, sooner)

    def _stop(self, kind: str, grace: float, now: float) -> None:
        self._stop_kind = kind
        self._kill_at = now + grace
        if grace > 0 and self._main is not None:
            try:
                os.killpg(self._main, signal.SIGTERM)
                os.killpg(self._main, signal.SIGCONT)  # a stopped process hears nothing
            except ProcessLookupError:  # just forked, and no leader of its group yet
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._main, signal.SIGTERM)

    def _kill(self) -> None:
        """SIGKILL the main process and all below it; the loop then sees the main process end."""
        kill_descendants(self._collect)

    def _collect(self, pid: int, status: int) -> None:
        if pid == self._main:
            self._main_status = status

    def _reap(self) -> None:
        """Collect every child that has ended: the main process, and orphans that came to us."""
        while self._main_status is None:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._collect(pid, status)


def kill_descendants(collect: Callable[[int, int], None] | None = None) -> int:
    """SIGKILL and reap all descendants of this process until none is left; how many were still alive.

    A descendant of a killed one becomes a child of this process (it is a subreaper), so the loop ends only
    when no process of the attempt lives, however fast they fork or deep they hide."""
    killed: set[int] = set()
    pause = 0.005
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return len(killed)
        if pid:
            if collect is not None:
                collect(pid, status)
            continue
        for pid in _descendants():
            try:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            except ProcessLookupError:
                pass
        signal.sigtimedwait([signal.SIGCHLD], pause)
        pause = min(0.25, pause * 1.5)  # one may hang in the kernel for long


def _descendants() -> list[int]:
    """All living descendants of this process."""
    children = children_by_parent()
    found: list[int] = []
    queue = [os.getpid()]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def children_by_parent() -> dict[int, list[int]]:
    """All processes of this machine, by the pid of their parent."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            children.setdefault(parent, []).append(int(name))
    return children


def _oom_kills() -> int:
    """How often the kernel has killed for want of memory since boot, in any cgroup."""
    try:
        with open("/proc/vmstat", "rb") as file:
            for line in file:
                if line.startswith(b"oom_kill "):
                    return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


def _read_outcome(fd: int) -> dict[str, Any] | None:
    """What the flow process said of its own end; nothing of it is trusted beyond its own run."""
    os.set_blocking(fd, False)
    data = b""
    try:
        while len(data) < MAX_OUTCOME:
            piece = os.read(fd, MAX_OUTCOME)
            if not piece:
                break
            data += piece
        outcome = json.loads(data)
    except (OSError, ValueError):
        return None
    return outcome if isinstance(outcome, dict) else None

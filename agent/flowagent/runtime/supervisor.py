"""The supervisor: parent, timekeeper and reaper of one attempt's processes at a time.

It is forked by the launcher, depends on neither launcher nor agent once it has an attempt, and speaks through
the run directory. As a child subreaper it inherits every descendant of the flow process however it was
daemonised, and it is not done before all of them have ended. Then it takes the next attempt.

It never reads what an attempt is about, so that nothing of one attempt is left in the memory that the next
one's flow process begins with: it knows a directory, times and limits, and hands everything else on unread.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from flowagent.runtime import bytecode, linux
from flowagent.runtime.cgroups import Group
from flowagent.runtime.limits import FIRST_LOOK, Excess, Limits, Watch, excess
from flowagent.runtime.rundir import RunDirectory, boottime
from flowagent.runtime.sandbox import NAMESPACE, Sandbox
from flowagent.runtime.spool import Spool
from flowagent.runtime.standby import FlowProcess

URGENT = (signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM)
WATCHED = (*URGENT, signal.SIGIO)
BREATH = 0.002
"""Seconds after some output until more is looked for: many small writes are taken together."""
BLOCKED, GIVE_UP = 0.25, 5.0
"""Seconds until a full disk is tried again, and after the end, for which that is done."""
RESERVED = 1 << 13
"""Bytes of disk that the notes of an attempt may need."""
MAX_PACKET = 1 << 16
MAX_FDS = 3
MOST_ATTEMPTS = 1000
"""After so many attempts a supervisor makes room for a fresh one."""


def serve(connection: socket.socket, sandbox: Sandbox, names: str) -> None:
    """Execute attempts as the launcher sends them, one after the other, until it closes the connection.

    ``names``: with what the names of the launcher's control groups begin."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.umask(0o077)
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    linux.set_process_name("flowagent-run")
    group = Group.enter(dict(sandbox.rules.cgroups), f"{names}-{os.getpid()}")
    for number in range(1, MOST_ATTEMPTS + 1):
        group.allow_again()
        process = FlowProcess(sandbox, connection)
        packet, fds, _, _ = socket.recv_fds(connection, MAX_PACKET, MAX_FDS)
        if not packet:
            return
        job = json.loads(packet)
        handed = dict(zip(job["fds"], fds))
        try:
            supervise(job, process, group, handed.get("secrets"))
        finally:
            process.close()
            for fd in fds:
                with suppress(OSError):
                    os.close(fd)
        if number < MOST_ATTEMPTS:
            with suppress(OSError):  # the launcher may be gone: nothing more comes then
                connection.send(b"done")


def supervise(job: Mapping[str, Any], process: FlowProcess, group: Group, secrets: int | None) -> None:
    """Execute one attempt to its end. Raises nothing: what goes wrong is noted as the end."""
    run = RunDirectory(job["directory"])
    while signal.sigtimedwait(WATCHED, 0):
        pass  # meant for an attempt before this one
    try:
        status = run.open_status()
    except OSError:  # another supervisor has, or had, this attempt: asking twice is harmless
        kill_descendants(None, group)
        return
    try:
        try:
            _reserve(status)
            end = _Attempt(run, status, job, process, group).execute(secrets)
        except Exception as error:
            end = {"ended": True, "error": f"{type(error).__name__}: {error}"}
        kill_descendants(None, group)
        with suppress(OSError):
            bytecode.keep(run)  # before the end is known: then the directory may go
        _note(status, dict(end, time=time.time()))
    finally:
        os.close(status)


def _note(status: int, data: dict[str, Any]) -> None:
    line = json.dumps(data).encode() + b"\n"
    while line:
        line = line[os.write(status, line) :]


def _reserve(fd: int) -> None:
    """Have the room on disk for what is written at the end, so that it can be however full the flow makes it.

    :raises OSError: it is full already. Where the file system cannot reserve, nothing is."""
    code = linux.reserve(fd, RESERVED)
    if code in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(code, os.strerror(code))


class _Attempt:
    def __init__(
        self, run: RunDirectory, status: int, job: Mapping[str, Any], process: FlowProcess, group: Group
    ) -> None:
        self._run = run
        self._status = status
        self._process = process
        self._group = group
        self._limits = Limits(**job["limits"])
        self._level = str(job["level"])
        self._grace = float(job["grace"])
        self._reason: str | None = None  # why it is being stopped
        self._stop_kind: str | None = None  # timeout, lease, stop, limit
        self._excess: Excess | None = None
        self._kill_at: float | None = None  # boottime of the SIGKILL that follows a SIGTERM
        self._main = process.pid
        self._main_status: int | None = None
        self._peak_memory = 0  # bytes, of the largest process
        self._cpu_time = 0.0
        self._lease = 0.0  # as last read
        self._spool = Spool(run.output_path, self._limits.output)
        self._listens = True  # for output; not for a moment after there was some

    def execute(self, secrets: int | None) -> dict[str, Any]:
        outcome = -1
        try:
            outcome = os.open(self._run.outcome_path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            _reserve(outcome)
            begun = {"supervisor": os.getpid(), "started": time.time(), "boottime": boottime()}
            _note(self._status, {**begun, "pid": self._main})
            if boottime() >= self._read_lease():
                return {"ended": True, "stop": "lease", "reason": "its lease ran out before it began"}
            self._group.limit(self._limits.memory, self._limits.processes)
            fds = [self._spool.writer, outcome, *([] if secrets is None else [secrets])]
            self._process.begin(self._run.path, self._limits, fds)
            self._spool.close_writer()
            self._watch()
            leftovers = self._kill()
            self._finish_output()
            return self._end(leftovers, os.fstat(outcome).st_size)
        finally:
            self._spool.close()
            if outcome >= 0:
                os.close(outcome)

    def _finish_output(self) -> None:
        end = time.monotonic() + GIVE_UP
        self._spool.finish()
        while self._spool.failed is not None and time.monotonic() < end:
            time.sleep(BLOCKED)
            self._spool.finish()
        if self._excess is None and self._spool.over:
            self._excess = excess("output", self._limits.output or 0)
        elif self._excess is None and self._spool.failed is not None:
            said = self._spool.failed.strerror
            self._excess = Excess("output", f"the last of its output could not be kept: {said}")

    def _end(self, leftovers: int, said: int) -> dict[str, Any]:
        status = self._main_status if self._main_status is not None else 0
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        if self._level == NAMESPACE and not said and (code or 0) > 128:
            code, killed_by = None, (code or 0) - 128  # bubblewrap's way of telling
        if killed_by == signal.SIGXCPU and self._limits.cpu_time is not None and self._excess is None:
            self._excess = excess("cpu_time", self._limits.cpu_time)
        out_of_memory = self._excess is not None and self._excess.name == "memory"
        if killed_by == signal.SIGKILL and self._stop_kind is None:
            out_of_memory = self._group.has_killed()
        return {
            "ended": True,
            "stop": self._stop_kind,
            "reason": self._reason,
            "limit": self._excess.reason if self._excess is not None else None,
            "exit_code": code,
            "signal": killed_by,
            "out_of_memory": out_of_memory,
            "memory_limit": self._limits.memory,
            "peak_memory": self._peak_memory,
            "cpu_time": round(self._cpu_time, 6),
            "leftovers": leftovers,
        }

    def _watch(self) -> None:
        """Until the main process has ended: reap, stop when told to, keep the time and the limits."""
        began = boottime()
        expires = began + self._limits.wall_time if self._limits.wall_time else None
        watch: Watch | None = None
        look_at = time.monotonic() + FIRST_LOOK
        self._read_stop()  # word that was left before there was a supervisor to hear the signal
        while self._main_status is None:
            now = boottime()
            # The agent only ever extends it, so it needs no reading before it seems to have run out.
            if now >= self._lease and now >= self._read_lease():
                self._reason = "no agent renewed its lease"
                self._stop_kind = "lease"
                self._kill()
            elif expires is not None and now >= expires and self._stop_kind is None:
                self._reason = f"timed out after {self._limits.wall_time:g} s"
                self._stop("timeout", self._grace, now)
            elif self._kill_at is not None and now >= self._kill_at:
                self._kill()
            elif self._stop_kind is None and self._spool.over:
                self._exceed(excess("output", self._limits.output or 0))
            elif self._stop_kind is None and time.monotonic() >= look_at:
                watch = watch or self._watcher()
                found = watch.look()
                look_at = watch.next
                if found is not None:
                    self._exceed(found)
            deadlines = [self._lease]
            if expires is not None and self._stop_kind is None:
                deadlines.append(expires)
            if self._kill_at is not None:
                deadlines.append(self._kill_at)
            if self._stop_kind is None:
                deadlines.append(now + look_at - time.monotonic())
            if self._main_status is None:
                self._wait(min(min(deadlines) - boottime(), 3600.0))

    def _exceed(self, found: Excess) -> None:
        self._excess = found
        self._stop_kind = "limit"
        self._kill()

    def _wait(self, seconds: float) -> None:
        if not self._listens:
            seconds = min(seconds, BREATH)
        elif self._spool.failed is not None:
            seconds = min(seconds, BLOCKED)
        received = signal.sigtimedwait(WATCHED if self._listens else URGENT, max(0.0, seconds))
        self._listens = not self._spool.pump()
        if received is not None and received.si_signo == signal.SIGUSR1:
            self._read_stop()
        elif received is not None and received.si_signo == signal.SIGTERM and self._stop_kind is None:
            self._reason = "its supervisor was asked to end"
            self._stop("stop", self._grace, boottime())
        self._reap()

    def _watcher(self) -> Watch:
        group = self._group
        before = group.cpu_time()

        def spent() -> float:
            return (group.cpu_time() or 0.0) - (before or 0.0)

        return Watch(
            self._limits,
            directory=self._run.work,
            processes=descendants,
            counted=not (group.limits_memory and group.limits_processes),
            spent=spent if before is not None else None,
        )

    def _read_lease(self) -> float:
        """Until when the attempt may live. What cannot be read extends nothing: the last word stands."""
        self._lease = self._run.read_lease() or self._lease
        return self._lease

    def _read_stop(self) -> None:
        grace = self._run.read_stop()
        if grace is None:
            return
        if self._stop_kind is None:
            self._stop("stop", grace, boottime())
        else:  # asked again, perhaps with less patience
            sooner = boottime() + grace
            self._kill_at = sooner if self._kill_at is None else min(self._kill_at, sooner)

    def _stop(self, kind: str, grace: float, now: float) -> None:
        self._stop_kind = kind
        self._kill_at = now + grace
        if grace > 0:
            try:
                os.killpg(self._main, signal.SIGTERM)
                os.killpg(self._main, signal.SIGCONT)  # a stopped process hears nothing
            except ProcessLookupError:  # just forked, and no leader of its group yet
                with suppress(ProcessLookupError):
                    os.kill(self._main, signal.SIGTERM)

    def _kill(self) -> int:
        """SIGKILL the main process and all below it, and collect them; how many still lived."""
        return kill_descendants(self._collect, self._group)

    def _collect(self, pid: int, status: int, usage: resource.struct_rusage) -> None:
        self._peak_memory = max(self._peak_memory, usage.ru_maxrss * 1024)
        self._cpu_time += usage.ru_utime + usage.ru_stime
        if pid == self._main:
            self._main_status = status

    def _reap(self) -> None:
        """Collect every child that has ended: the main process, and orphans that came to us."""
        while self._main_status is None:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._collect(pid, status, usage)


def kill_descendants(collect: Callable[[int, int, resource.struct_rusage], None] | None, group: Group) -> int:
    """SIGKILL and reap all descendants of this process until none is left; how many were still alive.

    A descendant of a killed one becomes a child of this process (it is a subreaper), so the loop ends only
    when no process of the attempt lives, however fast they fork or deep they hide."""
    killed: set[int] = set()
    pause = 0.005
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return len(killed)
        if pid:
            if collect is not None:
                collect(pid, status, usage)
            continue
        group.allow_no_more()
        found = descendants()
        family = {os.getpid(), *found}
        killed.update(pid for pid in found if kill(pid, family))
        signal.sigtimedwait([signal.SIGCHLD], pause)
        pause = min(0.25, pause * 1.5)  # one may hang in the kernel for long


def kill(pid: int, family: Collection[int]) -> bool:
    """SIGKILL a descendant; whether it still was one, and not somebody else's who was given its pid since.
    ``family``: pids of which one is its parent's."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except (OSError, AttributeError):  # unknown to the kernel, an engine's filter, or this Python
        process = -1
    try:
        if _parent(pid) not in family:
            return False
        if process < 0:
            os.kill(pid, signal.SIGKILL)
        else:
            signal.pidfd_send_signal(process, signal.SIGKILL)
        return True
    except ProcessLookupError:
        return False
    finally:
        if process >= 0:
            os.close(process)


def descendants() -> list[int]:
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
            children.setdefault(_parent(int(name)), []).append(int(name))
    return children


def _parent(pid: int) -> int:
    """The pid of a process' parent; -1: it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return -1

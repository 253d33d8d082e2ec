"""The run directory: how agent and supervisor speak of one attempt, whichever of them is alive.

::

    <run directory>/
      spec.json   agent -> supervisor   what to execute (never a secret)
      lease       agent -> supervisor   until when the attempt may live, rewritten in place
      stop        agent -> supervisor   why and how to end it; SIGUSR1 says that it is there
      status      supervisor -> agent   a journal of JSON lines; locked for the supervisor's life
      output      the flow process's output, see flowagent.runtime.events
      work/       the flow's own: its working directory, home/, tmp/, results/

The status file's POSIX lock says whether the supervisor lives, and who it is, without races on reused pids:
the kernel drops it when the process dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import struct
import time
from pathlib import Path
from typing import Any

LEASE_WIDTH = 32
FLOCK = struct.Struct("hhqqi")  # struct flock of Linux on 64 bits: type, whence, start, length, pid


def boottime() -> float:
    """Seconds since boot, suspend included: the one clock that agent and supervisor compare leases by."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class RunDirectory:
    """One attempt's directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.spec_path = self.path + "/spec.json"
        self.lease_path = self.path + "/lease"
        self.stop_path = self.path + "/stop"
        self.status_path = self.path + "/status"
        self.output_path = self.path + "/output"
        self.work = self.path + "/work"
        self.home = self.work + "/home"
        self.tmp = self.work + "/tmp"  # noqa: S108
        self.results = self.work + "/results"

    # -- written by the agent --------------------------------------------------------------------------

    def create(self, spec: dict[str, Any], deadline: float) -> None:
        """Make the directory; ``spec.json`` comes last, so a directory without one was never handed over."""
        for directory in (self.path, self.work, self.home, self.tmp, self.results):
            os.mkdir(directory, 0o700)
        self.write_lease(deadline)
        _write_atomically(self.spec_path, json.dumps(spec).encode())

    def read_spec(self) -> dict[str, Any]:
        """:raises FileNotFoundError: the agent died before it was written."""
        with open(self.spec_path, "rb") as file:
            spec: dict[str, Any] = json.load(file)
        return spec

    def write_lease(self, deadline: float) -> None:
        """Let the attempt live until ``deadline`` (:func:`boottime`); one write, never a torn value."""
        fd = os.open(self.lease_path, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            os.pwrite(fd, b"%-*.3f\n" % (LEASE_WIDTH - 1, deadline), 0)
        finally:
            os.close(fd)

    def request_stop(self, reason: str, grace: float) -> None:
        """Leave word that the attempt is to end; the caller wakes the supervisor with SIGUSR1."""
        _write_atomically(self.stop_path, json.dumps({"reason": reason, "grace": grace}).encode())

    # -- written by the supervisor ---------------------------------------------------------------------

    def read_lease(self) -> float:
        """0.0 when the lease cannot be read: fail closed."""
        try:
            with open(self.lease_path, "rb") as file:
                return float(file.read(LEASE_WIDTH))
        except (OSError, ValueError):
            return 0.0

    def read_stop(self) -> dict[str, Any] | None:
        try:
            with open(self.stop_path, "rb") as file:
                stop: dict[str, Any] = json.load(file)
            return stop
        except (OSError, ValueError):
            return None

    def open_status(self) -> int:
        """Become the supervisor of this attempt. :raises BlockingIOError: it has, or had, one already."""
        fd = os.open(self.status_path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_size:
                raise BlockingIOError("the attempt was started before")
        except OSError:
            os.close(fd)
            raise
        return fd

    def take_place(self) -> bool:
        """Make sure that no supervisor begins this attempt any more; False: one has already.

        A launcher may still hold a request to start it. With the supervisor's place in the status file taken,
        whoever comes later leaves it alone."""
        try:
            status = self.open_status()
        except BlockingIOError:
            return False
        except FileNotFoundError:
            return True
        os.write(status, b'{"abandoned": true}\n')
        os.close(status)
        return True

    # -- read by the agent -----------------------------------------------------------------------------

    def supervisor(self) -> int | None:
        """The pid of the living supervisor, by the lock it holds; None when there is none."""
        try:
            fd = os.open(self.status_path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            question = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, question)[: FLOCK.size])
        finally:
            os.close(fd)
        return None if kind == fcntl.F_UNLCK else pid

    def status(self) -> dict[str, Any]:
        """All that the supervisor has noted, merged; empty before it began. A torn last line is left out."""
        try:
            with open(self.status_path, "rb") as file:
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return {}
        noted: dict[str, Any] = {}
        for line in lines:
            noted.update(json.loads(line))
        return noted

    def output_size(self) -> int:
        try:
            return os.stat(self.output_path).st_size
        except FileNotFoundError:
            return 0

    def remove(self) -> None:
        """Delete everything, whatever modes the flow left behind. Symbolic links are not followed."""
        # The spec goes first: an agent that dies in the middle finds a directory that was never handed over.
        for path in (self.spec_path, self.status_path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for directory, names, _ in os.walk(self.path):
            for inner in (os.path.join(directory, name) for name in names):
                if not os.path.islink(inner):
                    os.chmod(inner, 0o700)
        shutil.rmtree(self.path, ignore_errors=True)


def _write_atomically(path: str, data: bytes) -> None:
    temporary = path + ".tmp"
    fd = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)
    os.replace(temporary, path)

"""The run directory: how agent and supervisor speak of one attempt, whichever of them is alive.

::

    <run directory>/
      spec.json   agent -> supervisor   what to execute (never a secret)
      lease       agent -> supervisor   until when the attempt may live, rewritten in place
      stop        agent -> supervisor   why and how to end it; SIGUSR1 says that it is there
      status      supervisor -> agent   a journal of JSON lines; locked for the supervisor's life
      output      the flow process's output, see flowagent.runtime.events
      outcome     what the flow process says of its own end; nothing of it is trusted beyond its own run
      work/       the flow's own: its working directory, home/, tmp/, results/; .uncompiled: see bytecode

In results/, what tasks return is numbered; restored.json and what it names is from the run that is repeated.

The status file's POSIX lock says whether the supervisor lives, and who it is, without races on reused pids:
the kernel drops it when the process dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import stat
import struct
import time
from collections.abc import Iterator
from typing import Any

LEASE_WIDTH = STOP_WIDTH = 32
MAX_OUTCOME = 1 << 16
"""Bytes of the outcome that a flow process may leave behind."""
MAX_NOTES = 1 << 20
"""Bytes that are read of a file that the flow could write to as well."""
FLOCK = struct.Struct("hhqqi")  # struct flock of Linux on 64 bits: type, whence, start, length, pid


def boottime() -> float:
    """Seconds since boot, suspend included: the one clock that agent and supervisor compare leases by."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class RunDirectory:
    """One attempt's directory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.spec_path = self.path + "/spec.json"
        self.lease_path = self.path + "/lease"
        self.stop_path = self.path + "/stop"
        self.status_path = self.path + "/status"
        self.output_path = self.path + "/output"
        self.outcome_path = self.path + "/outcome"
        self._files = (
            self.spec_path,
            self.stop_path,
            self.lease_path,
            self.outcome_path,
            self.status_path,
            self.output_path,
        )
        self.work = self.path + "/work"
        self.home = self.work + "/home"
        self.tmp = self.work + "/tmp"  # noqa: S108
        self.results = self.work + "/results"
        self.source = self.work + "/source"  # of a run that has a copy of its own
        self.uncompiled_path = self.work + "/.uncompiled"

    # -- written by the agent --------------------------------------------------------------------------

    def make(self) -> None:
        """Make the directory, empty. :raises OSError: it is there, or cannot be made."""
        for directory in (self.path, self.work, self.home, self.tmp, self.results):
            os.mkdir(directory, 0o700)

    def hand_over(self, spec: dict[str, Any], deadline: float) -> None:
        """Write what is to be executed; ``spec.json`` comes last, so that it is whole where there is one."""
        self.write_lease(deadline)
        _write_atomically(self.spec_path, json.dumps(spec).encode())

    def read_spec(self) -> dict[str, Any]:
        """:raises FileNotFoundError: the agent died before it was written."""
        fd = os.open(self.spec_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        spec: dict[str, Any] = json.loads(data.decode())
        return spec

    def write_restored(self, run_id: str, tasks: dict[str, Any]) -> None:
        """Leave values of the run that is repeated, which are in ``results`` already, to the flow process."""
        path = self.results + "/restored.json"
        _write_atomically(path, json.dumps({"run": run_id, "tasks": tasks}).encode())
        os.chmod(path, 0o644)  # flows may run as another user; nobody else comes this far

    def read_restored(self) -> tuple[str, dict[str, Any]]:
        """The run that is repeated and what its tasks left: by slug, file, serializer and inputs."""
        try:
            with open(self.results + "/restored.json", "rb") as file:
                data = json.load(file)
        except OSError:
            return "", {}
        return data["run"], data["tasks"]

    def write_lease(self, deadline: float) -> None:
        """Let the attempt live until ``deadline`` (:func:`boottime`); one write, never a torn value."""
        fd = open_plain(self.lease_path, os.O_CREAT | os.O_WRONLY)
        try:
            os.pwrite(fd, b"%-*.3f\n" % (LEASE_WIDTH - 1, deadline), 0)
        finally:
            os.close(fd)

    def request_stop(self, reason: str, grace: float) -> None:
        """Leave word that the attempt is to end; the caller wakes the supervisor with SIGUSR1."""
        # The supervisor reads the first line only, the reason is for whichever agent will record the end.
        _write_atomically(self.stop_path, f"{grace:.3f}\n{reason}".encode())

    # -- written by the supervisor ---------------------------------------------------------------------

    def read_lease(self) -> float:
        """0.0 when the lease cannot be read: fail closed."""
        try:
            deadline = float(_read(self.lease_path, LEASE_WIDTH))
        except (OSError, ValueError):
            return 0.0
        return deadline if math.isfinite(deadline) else 0.0

    def read_stop(self) -> float | None:
        """The seconds of grace of a request to stop; None when there is no request."""
        try:
            return float(_read(self.stop_path, STOP_WIDTH).split(b"\n")[0])
        except (OSError, ValueError):
            return None

    def open_status(self) -> int:
        """Become the supervisor of this attempt. :raises BlockingIOError: it has, or had, one already."""
        fd = open_plain(self.status_path, os.O_CREAT | os.O_RDWR | os.O_APPEND)
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
        except OSError:
            if os.path.lexists(self.status_path):
                return False  # no file any more: the flow has been there
            self._withdraw()
            return True
        try:
            os.write(status, b'{"abandoned": true}\n')
        except OSError:
            self._withdraw()
        finally:
            os.close(status)
        return True

    def _withdraw(self) -> None:
        """On a full disk nothing can be noted, but without its spec nothing begins either."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.spec_path)

    def note(self, data: dict[str, Any], outcome: Any = None) -> None:
        """Add to the journal of an attempt whose supervisor is elsewhere: the agent writes for it."""
        if outcome is not None:
            _write_atomically(self.outcome_path, json.dumps(outcome).encode())
        fd = open_plain(self.status_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, json.dumps(data).encode() + b"\n")
        finally:
            os.close(fd)

    # -- read by the agent -----------------------------------------------------------------------------

    def supervisor(self) -> int | None:
        """The pid of the living supervisor, by the lock it holds; None when there is none."""
        try:
            fd = open_plain(self.status_path, os.O_RDWR)
        except OSError:
            return None
        try:
            question = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, question)[: FLOCK.size])
        finally:
            os.close(fd)
        return None if kind == fcntl.F_UNLCK else pid

    def status(self) -> dict[str, Any]:
        """All that the supervisor has noted, merged; empty before it began. Torn and alien lines are left
        out: a full disk cuts notes short, and the flow can write here too."""
        try:
            lines = _read(self.status_path).split(b"\n")[:-1]
        except OSError:
            return {}
        noted: dict[str, Any] = {}
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                noted.update(json.loads(line))
        if "ended" in noted:
            if noted.get("stop") == "stop":
                noted["reason"] = self._stop_reason() or noted.get("reason")
            noted["outcome"] = self._outcome()
        return noted

    def _stop_reason(self) -> str | None:
        try:
            return _read(self.stop_path).partition(b"\n")[2].decode(errors="replace") or None
        except OSError:
            return None

    def _outcome(self) -> dict[str, Any] | None:
        try:
            outcome = json.loads(_read(self.outcome_path)[:MAX_OUTCOME])
        except (OSError, ValueError, RecursionError):
            return None
        return outcome if isinstance(outcome, dict) else None

    def output_size(self) -> int:
        try:
            return os.stat(self.output_path).st_size
        except FileNotFoundError:
            return 0

    def remove(self) -> None:
        """Delete everything, whatever modes the flow left behind. Symbolic links are not followed."""
        if not self._remove_own():
            _remove_tree(self.path)

    def _remove_own(self) -> bool:
        """Delete what flowagent made, which is quick; whether that was all."""
        for path in (*self._files, self.uncompiled_path):
            with contextlib.suppress(OSError):
                os.unlink(path)
        try:
            for directory in (self.results, self.tmp, self.home, self.work, self.path):
                os.rmdir(directory)
        except OSError:
            return False  # the flow left something behind, or was never given all of it
        return True


def open_plain(path: str, flags: int) -> int:
    """Open a file of a run directory that is a plain one. The flow may have put anything else in its place:
    links are not followed and FIFOs not waited for. :raises OSError: it is not a plain file."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.EINVAL, "not a plain file", path)
    return fd


def _read(path: str, most: int = MAX_NOTES) -> bytes:
    fd = open_plain(path, os.O_RDONLY)
    try:
        data = os.read(fd, most)
        while len(data) < most and (piece := os.read(fd, most - len(data))):
            data += piece
        return data
    finally:
        os.close(fd)


def _remove_tree(path: str) -> None:
    """Delete a tree of any depth and any modes, as far as that can be done; no link is followed.

    Directories are moved up before they are emptied, so that no path gets too long to be named."""
    moved = 0
    pending = [path]
    while pending:
        directory = pending.pop()
        with contextlib.suppress(OSError), _opened(directory) as here:
            with os.scandir(here) as listing:
                entries = list(listing)
            for entry in entries:
                with contextlib.suppress(OSError):
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.path)
                        continue
                    moved += 1
                    higher = f"{path}/.removed-{moved}"
                    with _opened(entry.path):  # its ".." changes with the move: it has to be writable
                        os.rename(entry.path, higher)
                    pending.append(higher)
            if directory != path:
                os.rmdir(directory)
    with contextlib.suppress(OSError):
        os.rmdir(path)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[str]:
    """A name for this very directory, whatever is put in its place meanwhile, made writable.

    :raises OSError: it is none, or a link to one."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        here = f"/proc/self/fd/{fd}"
        os.chmod(here, 0o700)
        yield here
    finally:
        os.close(fd)


def _write_atomically(path: str, data: bytes) -> None:
    temporary = path + ".tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)
    os.replace(temporary, path)

"""From the log of a container to its run directory: output, files, and what its supervisor noted.

A log is read from its beginning each time; what the run directory has of it already is passed over. So the
end of an agent, of a connection or of the engine loses nothing and brings nothing twice. Where a log has lost
its beginning, marks in it say where in the output it is.
"""

from __future__ import annotations

import base64
import os
import re
import signal
from collections.abc import Mapping
from typing import Any

from flowagent.runtime import relay
from flowagent.runtime.events import RS, Event, Splitter, decode, encode
from flowagent.runtime.limits import Limits, excess
from flowagent.runtime.rundir import RunDirectory, boottime, open_plain

OURS = RS + b'{"event":"' + relay.PREFIX.encode()
MOST_UNPLACED, MOST_GAPS = 4 * relay.MARK_EVERY, 100
SLACK = 1 << 20
"""Bytes beyond the limit that the supervisor inside should have seen first."""
NOTED = frozenset(
    {
        "stop", "reason", "limit", "exit_code", "signal", "out_of_memory", "memory_limit", "peak_memory",
        "cpu_time", "leftovers", "error", "pid", "started", "gone", "retryable",
    }
)  # fmt: skip
"""What is taken of a supervisor's notes: the flow could have written them as well."""


class FollowedTooFarError(Exception):
    """More comes than the attempt may write, past the supervisor that should have stopped it."""


class Follower:
    """Takes in one reading of a log. ``began``: the supervisor has spoken; ``ended``: its last words;
    ``clock``: what is to be added to this machine's boot time for that of the container, if it is another.

    In the journal, ``told`` is by how many bytes the output is longer than the container's own up to the same
    place: the agent may have told something at first, or the log may have lost something."""

    def __init__(self, run: RunDirectory, limits: Limits, boot_id: str) -> None:
        self._run = run
        self._limits = limits
        self._boot_id = boot_id
        self._splitter = Splitter()
        self._known = run.output_size()
        self._size = self._known
        noted_before = run.status()
        self._spoken = "spoken" in noted_before
        self._told = min(int(noted_before.get("told", 0)), self._known)
        self._passed = self._told  # bytes of output, of those known already
        again = self._spoken or self._known > self._told
        self._unplaced = bytearray() if again else None  # from who knows where in the log
        self._gaps = 0
        self._files = 0
        self._last = b""
        self.began = False
        self.clock: float | None = None
        self.ended: dict[str, Any] | None = None

    def feed(self, data: bytes) -> None:
        """Take in the next piece. :raises FollowedTooFarError: it is more than the limits allow."""
        output = bytearray()
        for framed, piece in self._splitter.feed(data):
            if self.ended is not None:
                break  # the supervisor comes last: what follows is a node that misses the container
            item = decode(piece) if framed and piece.startswith(OURS) else None
            if isinstance(item, Event):
                self._append(bytes(output))
                output = bytearray(self._note(item.data))
            else:
                output += piece
        self._append(bytes(output))

    def close(self) -> None:
        """There is no more: what looked like the beginning of an event was none. What has no place in the log
        of a supervisor that has spoken before is not from there: that log is gone."""
        if self._unplaced is not None and self._spoken:
            return
        self._place(0)
        self._append(self._splitter.close())

    @property
    def done(self) -> bool:
        """Whether nothing more can come: the supervisor has told how it ended. Who has sent a SIGKILL, others
        may know better."""
        return self.ended is not None and self.ended.get("signal") != signal.SIGKILL

    @property
    def last_line(self) -> str:
        """The last that was written, for people who ask why it ended."""
        lines = [line for line in self._last.decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:500] if lines else ""

    def _append(self, data: bytes) -> None:
        if not data:
            return
        if self._unplaced is not None:
            self._unplaced += data
            if len(self._unplaced) > MOST_UNPLACED:  # there are no marks
                self._place(0)
            return
        self._last = (self._last + data)[-4096:]
        behind = self._known - self._passed
        self._passed += len(data)
        if behind > 0:
            data = data[behind:]
        self._size += len(data)
        if self._limits.output is not None and self._size > self._limits.output + SLACK:
            raise FollowedTooFarError(excess("output", self._limits.output).reason)
        if data:
            self._write(data)

    def _write(self, data: bytes) -> None:
        fd = open_plain(self._run.output_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        try:
            relay.write(fd, data)
        finally:
            os.close(fd)

    def _place(self, start: int) -> None:
        """What came so far begins after ``start`` bytes of the container's output."""
        if self._unplaced is None:
            return
        data, self._unplaced = bytes(self._unplaced), None
        self._passed = self._told + start
        if self._passed > self._size:
            self._lose(self._passed - self._size)
        self._append(data)

    def _mark(self, position: int) -> None:
        """So many bytes of the container's output came before."""
        if self._unplaced is not None:
            self._place(max(0, position - len(self._unplaced)))
            return
        ahead = position + self._told - self._passed
        if ahead > 0 and self._passed >= self._size:
            self._passed += ahead
            self._lose(ahead)
        elif ahead < 0:  # something else wrote to the log as well
            self._tell(-ahead)

    def _lose(self, count: int) -> None:
        """What comes next is further on than what is known."""
        self._gaps += 1
        if self._gaps > MOST_GAPS:
            return
        said = f"{count} bytes of output are lost: the log of the container was rotated"
        line = encode({"event": "log", "level": "ERROR", "logger": "flowagent", "message": said})
        self._tell(len(line) - count)
        self._write(line)
        self._passed += len(line) - count
        self._size += len(line)
        self._known = max(self._known, self._size)

    def _tell(self, more: int) -> None:
        self._told += more
        self._run.note({"told": self._told})

    def _note(self, event: Mapping[str, Any]) -> bytes:
        """What an event of ours stands for in the output."""
        kind = event["event"]
        if kind == relay.BYTES:
            return _decoded(event)
        if kind == relay.AT and isinstance(event.get("output"), int) and 0 <= event["output"] < 1 << 53:
            self._mark(event["output"])
        if kind == relay.FILE:
            self._file(event)
        elif kind == relay.BEGAN and not self.began:
            self.began = True
            self._place(0)
            if not self._spoken:
                self._spoken = True
                self._run.note({"spoken": True})
            if event.get("boot_id") != self._boot_id and isinstance(event.get("boottime"), (int, float)):
                self.clock = event["boottime"] - boottime()  # it was sent before now: on the safe side
        elif kind == relay.ENDED and isinstance(event.get("status"), dict):
            self.ended = event["status"]
        return b""

    def _file(self, event: Mapping[str, Any]) -> None:
        name, start, data = event.get("name"), event.get("start"), _decoded(event)
        if not isinstance(name, str) or not re.fullmatch(r"[0-9]{1,9}", name) or not isinstance(start, int):
            return
        self._files += len(data)
        if self._limits.disk is not None and self._files > self._limits.disk:
            raise FollowedTooFarError(excess("disk", self._limits.disk).reason)
        if self._known > self._passed:
            return  # what speaks of it is in the output already
        mode = os.O_CREAT | os.O_WRONLY | (os.O_TRUNC if start == 0 else os.O_APPEND)
        fd = os.open(os.path.join(self._run.results, name), mode | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            relay.write(fd, data)
        finally:
            os.close(fd)


def _decoded(event: Mapping[str, Any]) -> bytes:
    try:
        return base64.b64decode(str(event.get("data")), validate=True)
    except ValueError:
        return b""


def noted(status: Mapping[str, Any]) -> dict[str, Any]:
    """A supervisor's last words as they go into the journal."""
    return {name: value for name, value in status.items() if name in NOTED}

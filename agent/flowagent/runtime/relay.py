"""From the output file inside of a container to the container's log, so that every byte can be had back.

Engines keep logs by lines of text: what is not UTF-8 is replaced, and lines above 16 KiB are cut, letters
with them. What would suffer is written as an event; so are files that the agent is to have, and what the
supervisor notes. :mod:`flowagent.runners.following` undoes all of it. These events begin with
:data:`PREFIX`, and no part of flowagent sees them but these two modules.
"""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from flowagent.runtime.events import Emitter, encode

PREFIX = "container."
BYTES, FILE, AT, BEGAN, ENDED = (PREFIX + kind for kind in ("bytes", "file", "at", "began", "ended"))
"""Kinds of events: output that is no text, a piece of a file, how many bytes of output came before, the
supervisor's first and last words."""
MARK_EVERY, MARK_AFTER = 1 << 20, 30.0
"""Bytes of output, and seconds, between marks of where it is: rotated logs have lost their beginning."""
LONGEST_LINE = 16_000
"""Bytes; less than at what engines cut."""
PIECE = 64 * 1024
FILE_PIECE = 512 * 1024
SHORTEST, LONGEST = 0.01, 0.25
"""Seconds between looks at the output file."""


def emit_file(emitter: Emitter, name: str, data: bytes) -> None:
    """Write a file for the agent."""
    for start in range(0, max(1, len(data)), FILE_PIECE):
        piece = base64.b64encode(data[start : start + FILE_PIECE]).decode()
        emitter.emit(FILE, name=name, data=piece, start=start)


class Encoder:
    """Makes output fit for a log. ``feed`` it all, in pieces of any size."""

    def __init__(self) -> None:
        self._column = 0  # bytes in the line that has begun

    def feed(self, data: bytes) -> bytes:
        if data.isascii():  # wherever it is cut, nothing is harmed
            self._advance(data)
            return data
        return b"".join(self._lines(data))

    def _lines(self, data: bytes) -> Iterator[bytes]:
        for line in _split(data):
            if line.isascii() or (self._column + len(line) <= LONGEST_LINE and _is_text(line)):
                self._advance(line)
                yield line
            else:
                self._column = 0
                yield encode({"event": BYTES, "data": base64.b64encode(line).decode()})

    def _advance(self, data: bytes) -> None:
        end = data.rfind(b"\n")
        self._column = self._column + len(data) if end < 0 else len(data) - end - 1


def _split(data: bytes) -> list[bytes]:
    """Lines, by LF alone."""
    lines = data.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class Relay(threading.Thread):
    """Copies a file that grows to a descriptor, until told that it does not grow any more."""

    def __init__(self, path: str, target: int) -> None:
        super().__init__(name="relay", daemon=True)
        self._path = path
        self._target = target
        self._encoder = Encoder()
        self._position = self._marked = 0
        self._marked_at = time.monotonic()
        self._complete = threading.Event()

    def run(self) -> None:
        pause = SHORTEST
        while True:
            last = self._complete.is_set()
            if self._copy():
                pause = SHORTEST
            elif last:
                self._mark()
                return
            else:
                self._complete.wait(pause)
                pause = min(LONGEST, pause * 1.5)

    def finish(self, timeout: float) -> None:
        """Copy what is left. ``timeout``: seconds that nobody may take it for."""
        self._complete.set()
        self.join(timeout)

    def _copy(self) -> bool:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False  # not there yet, or the flow put something else in its place
        try:
            data = os.pread(fd, PIECE, self._position)
        finally:
            os.close(fd)
        self._position += len(data)
        write(self._target, self._encoder.feed(data))
        long_ago = time.monotonic() - self._marked_at > MARK_AFTER
        if self._position - self._marked >= MARK_EVERY or long_ago:
            self._mark()
        return bool(data)

    def _mark(self) -> None:
        self._marked_at = time.monotonic()
        if self._position != self._marked:
            self._marked = self._position
            note(self._target, AT, output=self._position)


def write(fd: int, data: bytes) -> None:
    """All of it."""
    while data:
        data = data[os.write(fd, data) :]


def note(fd: int, kind: str, **data: Any) -> None:
    """Write an event that is for the agent only."""
    write(fd, encode({"event": kind, **data}))

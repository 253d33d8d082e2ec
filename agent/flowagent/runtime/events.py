"""The framing of a run's output: what the process wrote, interleaved with events.

One byte stream per attempt. An event is a JSON text sequence element (RFC 7464): RS (0x1E), one JSON object,
LF. Everything else is text. The same framing serves files, container logs and pod logs.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

RS = b"\x1e"
LF = b"\n"
MAX_EVENT = 1 << 20
"""Bytes. What is longer than this between RS and LF is not an event but text."""


class Text(NamedTuple):
    """Bytes that the process wrote."""

    data: bytes


class Event(NamedTuple):
    """One event; ``data["event"]`` names its kind."""

    data: dict[str, Any]


_to_json = json.JSONEncoder(separators=(",", ":"), default=str).encode


def encode(event: dict[str, Any]) -> bytes:
    """Frame one event. JSON escapes all control characters, so neither RS nor LF occurs inside."""
    return RS + _to_json(event).encode() + LF


class Splitter:
    """Cuts a stream, fed in pieces of any size, into frames that may be events (True) and all else (False).

    Nothing is lost or added: together, what is given out is what was fed. Memory is bounded by
    :data:`MAX_EVENT` beyond the piece that is fed.
    """

    def __init__(self) -> None:
        self._pending = b""  # an event that has begun: RS and what followed so far

    def feed(self, data: bytes) -> Iterator[tuple[bool, bytes]]:
        data = self._pending + data
        self._pending = b""
        position = 0
        while position < len(data):
            begin = data.find(RS, position)
            if begin != position:
                yield False, data[position : begin if begin >= 0 else len(data)]
                if begin < 0:
                    return
            again = data.find(RS, begin + 1)
            end = data.find(LF, begin, again if again >= 0 else len(data))
            if end >= 0:
                yield end + 1 - begin <= MAX_EVENT, data[begin : end + 1]
                position = end + 1
            elif again >= 0:  # another event begins before this one ended: the writer died in the middle
                yield False, data[begin:again]
                position = again
            elif len(data) - begin > MAX_EVENT:
                yield False, data[begin:]
                return
            else:
                self._pending = data[begin:]
                return

    def close(self) -> bytes:
        """What is left at the end of the stream."""
        left, self._pending = self._pending, b""
        return left


class Parser:
    """Splits a stream, fed in pieces of any size, into :class:`Text` and :class:`Event`.

    A truncated or malformed event is given out as text: nothing that was written is lost.
    """

    def __init__(self) -> None:
        self._splitter = Splitter()

    def feed(self, data: bytes) -> Iterator[Text | Event]:
        for framed, piece in self._splitter.feed(data):
            yield decode(piece) if framed else Text(piece)

    def close(self) -> Iterator[Text | Event]:
        """What is left at the end of the stream."""
        left = self._splitter.close()
        if left:
            yield Text(left)


def decode(frame: bytes) -> Text | Event:
    """What a frame is, from its RS to its LF."""
    try:
        data = json.loads(frame[1:-1])
    except (ValueError, RecursionError):
        return Text(frame)
    if isinstance(data, dict) and isinstance(data.get("event"), str):
        return Event(data)
    return Text(frame)


class Emitter:
    """Writes events to a file descriptor, each with one write, so that events of threads do not mix."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def emit(self, event: str, **data: Any) -> None:
        """Write one event with the time of now. Values that are not JSON are written as their ``str``."""
        frame = encode({"event": event, "time": round(time.time(), 6), **data})
        with self._lock:
            while frame:
                frame = frame[os.write(self._fd, frame) :]

"""Secret values taken out of a stream of bytes, wherever the stream happens to be cut into chunks."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from copy import copy
from urllib.parse import quote, quote_plus

MASK = b"****"
SHORTEST = 3
"""Characters: values below are not redacted, as they would be found everywhere."""
SHORTEST_LINE = 6
"""Characters: lines of a value with several, such as the braces of a JSON key file, are common below."""
SHORTEST_ENCODED = 4
MOST_HELD = 1 << 16
"""Bytes held back at most, or twice the longest needle: reached only if secrets overlap without an end."""


def needles(value: str) -> set[bytes]:
    """The forms in which a secret value is looked for: itself, its lines, and its usual encodings.

    A value of fewer than 3 characters has none: it is not redacted."""
    found: set[bytes] = set()
    stripped = value.strip()
    if len(stripped) >= SHORTEST:
        for text in {value, stripped}:
            found |= _encodings(text)
    lines = [line.strip() for line in value.splitlines()]
    if len(lines) > 1:
        found |= {_bytes(line) for line in lines if len(line) >= SHORTEST_LINE}
    return found


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _encodings(text: str) -> set[bytes]:
    data = _bytes(text)
    derived = {
        quote(data, safe="").encode(),
        quote(data).encode(),
        quote_plus(data).encode(),
        json.dumps(text)[1:-1].encode(),
        _bytes(json.dumps(text, ensure_ascii=False)[1:-1]),
        _bytes(repr(text)[1:-1]),
        repr(data)[2:-1].encode(),
        base64.b64encode(data),
        base64.urlsafe_b64encode(data),
    }
    for phase in range(3):  # how many bytes before the value share its first group of three
        start, stop = -(-phase * 8 // 6), (phase + len(data)) * 8 // 6
        padded = bytes(phase) + data
        derived |= {base64.b64encode(padded)[start:stop], base64.urlsafe_b64encode(padded)[start:stop]}
    return {data} | {needle for needle in derived if len(needle) >= SHORTEST_ENCODED}


class Redactor:
    """Replaces secret values in one stream by ``****``, those that overlap by a single mask.

    ``feed`` may be called with any cuts: the output in all is the same. A new redactor that starts at a raw
    offset which an earlier one had covered goes on with the same output."""

    def __init__(self, values: Iterable[str]) -> None:
        self._needles = sorted({needle for value in values for needle in needles(value)})
        self._most_held = max(MOST_HELD, 2 * max(map(len, self._needles), default=0))
        self._held = b""
        self._masked = 0  # how many of the held bytes stand under a mask that was put out already

    def feed(self, data: bytes, final: bool = False) -> tuple[bytes, int]:
        """Take ``data``; the redacted output so far, and how many raw bytes it stands for.

        Held back is only what can still become a secret; with ``final``, nothing is."""
        if not self._needles:
            return data, len(data)
        buffer = self._held + data
        spans = self._spans(buffer)
        cut = len(buffer) if final else self._undecided(buffer)
        if spans and spans[-1][1] > cut:  # the cut may only go through a secret if the output is endless
            start = next(start for start, stop in spans if stop > cut)
            if start < cut and len(buffer) - start <= self._most_held:
                cut = start
        output: list[bytes] = []
        position = min(self._masked, cut)
        masked = max(self._masked - cut, 0)
        for start, stop in spans:
            if start >= cut:
                break
            if start >= self._masked:
                output += buffer[position:start], MASK
            position = min(stop, cut)
            masked = max(stop - cut, 0)
        output.append(buffer[position:cut])
        self._held, self._masked = buffer[cut:], masked
        return b"".join(output), cut

    def redact(self, text: str) -> str:
        """A whole text without the secrets; what is held back of the stream plays no part."""
        whole = copy(self)
        whole._held, whole._masked = b"", 0
        return whole.feed(_bytes(text), final=True)[0].decode("utf-8", "replace")

    def _spans(self, buffer: bytes) -> list[tuple[int, int]]:
        """Where secrets are, in order; overlapping ones, and what is masked already, as one."""
        found = [(0, self._masked)] if self._masked else []
        for needle in self._needles:  # a search each: many times faster than a pattern of all of them
            position = buffer.find(needle)
            while position >= 0:
                found.append((position, position + len(needle)))
                position = buffer.find(needle, position + 1)
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(found):
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return merged

    def _undecided(self, buffer: bytes) -> int:
        """The first position from which on the buffer could be the beginning of a secret."""
        first = len(buffer)
        for needle in self._needles:
            position = buffer.find(needle[:1], max(0, len(buffer) - len(needle) + 1), first)
            while position >= 0:
                if needle.startswith(buffer[position:]):
                    first = position
                    break
                position = buffer.find(needle[:1], position + 1, first)
        return first

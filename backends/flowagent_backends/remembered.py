"""What is remembered of answers, so that a service need only say that nothing has changed."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable

MOST_BYTES = 4 << 20
LONGEST = 1 << 10
"""Characters of a text that is worth remembering: tags, commits, digests, names of branches."""
_OVERHEAD = 400
"""Bytes that Python takes for an entry besides its texts, about."""


class Remembered:
    """Short texts by keys of any size, not more than ``most`` bytes in all. What was not asked for longest
    goes first: services choose how long their texts are, and flows how many there are."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._texts: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()
        self.bytes = 0

    def get(self, key: Hashable) -> tuple[str, ...]:
        """The texts of a key; none if it was forgotten."""
        digest = _digest(key)
        if digest in self._texts:
            self._texts.move_to_end(digest)
        return self._texts.get(digest, ())

    def put(self, key: Hashable, *texts: str) -> None:
        """Remember texts instead of those before, unless one is too long."""
        self.forget(key)
        if any(len(text) > LONGEST for text in texts):
            return
        self._texts[_digest(key)] = texts
        self.bytes += _size(texts)
        while self.bytes > self._most:
            self.bytes -= _size(self._texts.popitem(last=False)[1])

    def forget(self, key: Hashable) -> None:
        self.bytes -= _size(self._texts.pop(_digest(key), None))


def _digest(key: Hashable) -> bytes:
    return hashlib.sha256(repr(key).encode()).digest()


def _size(texts: tuple[str, ...] | None) -> int:
    return 0 if texts is None else _OVERHEAD + sum(4 * len(text) for text in texts)

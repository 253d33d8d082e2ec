"""Care for the whole cache of a machine: its sources, and the mirrors that they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flowagent.sources import collection, mirrors
from flowagent.sources.entries import CacheEntry
from flowagent.sources.mirrors import MirrorEntry


@dataclass(frozen=True)
class Removed:
    """What was removed, least recently used first."""

    sources: list[CacheEntry]
    mirrors: list[MirrorEntry]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.sources) + sum(entry.bytes for entry in self.mirrors)


@dataclass(frozen=True)
class Upkeep:
    """Where sources and mirrors are. The directory of mirrors need not be there."""

    sources: Path
    mirrors: Path

    def bytes(self) -> int:
        """How much is in the cache. :raises OSError: it cannot be read."""
        return self._source_bytes() + self._mirror_bytes()

    def prune(self, max_bytes: int | None, max_age: float | None) -> Removed:
        """Remove what nobody uses, least recently used first: what was not used for ``max_age`` seconds, then
        as much as it takes to stay within ``max_bytes``.

        Sources go before mirrors: a source is made again without its remote, as long as its mirror is there.

        :raises SourceCacheError: something cannot be removed.
        :raises OSError: the cache cannot be read."""
        beside = 0 if max_bytes is None else self._mirror_bytes()
        sources = collection.prune(self.sources, _less(max_bytes, beside), max_age, keep=0)
        beside = 0 if max_bytes is None else self._source_bytes()
        return Removed(sources, mirrors.prune(self.mirrors, _less(max_bytes, beside), max_age))

    def _source_bytes(self) -> int:
        return sum(entry.bytes for entry in collection.entries(self.sources))

    def _mirror_bytes(self) -> int:
        return sum(entry.bytes for entry in mirrors.entries(self.mirrors))


def _less(size: int | None, taken: int) -> int | None:
    return None if size is None else max(0, size - taken)

"""The source cache: each revision of a storage materialised once, read-only, shared by all runs of it."""

from flowagent.sources.cache import Source, SourceCache
from flowagent.sources.entries import CacheEntry

__all__ = ["CacheEntry", "Source", "SourceCache"]

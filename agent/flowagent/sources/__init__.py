"""The source cache: each revision of a storage materialised once, read-only, shared by all runs of it."""

from flowagent.sources.cache import Source, SourceCache
from flowagent.sources.entries import CacheEntry
from flowagent.sources.trees import copy

__all__ = ["CacheEntry", "Source", "SourceCache", "copy"]

"""What the cache knows of a source: its key, where its parts are, and its manifest.

<root>/<key>/source/         the source itself, read-only
<root>/<key>/manifest.json   what it is; published with it, by one rename of <key>
<root>/<key>.lock            held by the process that fills it or removes it
<root>/<key>.lease           shared by its runs; its mtime says when it was last used
<root>/.tmp-*                being filled, locked by who fills it; or on its way out
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flowagent import files
from flowagent.sources import trees

TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Manifest:
    """What was published under a key, and since which boot of the machine it is known to be whole."""

    backend: str
    revision: str
    bytes: int
    files: int
    digest: str
    created: float
    boot: str


@dataclass(frozen=True)
class CacheEntry:
    """A source in the cache, as ``flowagent cache ls`` shows it."""

    key: str
    backend: str
    revision: str
    bytes: int
    files: int
    created: float
    last_used: float
    in_use: bool


@dataclass(frozen=True)
class Place:
    """Where one source is, or would be."""

    root: Path
    key: str

    @classmethod
    def of(cls, root: Path, backend: str, key: str) -> Place:
        return cls(root, hashlib.sha256(f"{backend}\0{key}".encode()).hexdigest())

    @property
    def directory(self) -> Path:
        return self.root / self.key

    @property
    def source(self) -> Path:
        return self.directory / "source"

    @property
    def lock(self) -> Path:
        return self.root / f"{self.key}.lock"

    @property
    def lease(self) -> Path:
        return self.root / f"{self.key}.lease"

    def manifest(self) -> Manifest | None:
        """What is published here; None: nothing, or nothing that this version can read."""
        try:
            return Manifest(**json.loads((self.directory / "manifest.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def whole(self, manifest: Manifest) -> bool:
        """Whether the source still is what was published; reads all of it."""
        try:
            tree = trees.measure(self.source)
        except OSError:
            return False
        return (tree.bytes, tree.files, tree.digest) == (manifest.bytes, manifest.files, manifest.digest)

    def last_used(self, manifest: Manifest) -> float:
        try:
            return self.lease.stat().st_mtime
        except OSError:
            return manifest.created


def write_manifest(directory: Path, manifest: Manifest) -> None:
    data = json.dumps(dataclasses.asdict(manifest), indent=1).encode()
    files.write(directory / "manifest.json", [data], mode=0o644)


def places(root: Path) -> list[Place]:
    """All places with something published."""
    with os.scandir(root) as found:
        return [Place(root, entry.name) for entry in found if len(entry.name) == 64 and entry.is_dir()]


@cache
def boot() -> str:
    """Identifies this boot of the machine. What was written before it may have been lost with a power cut."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()

"""What a test of the Git backend works with: an agent's home, a backend, and the cache it fills."""

from __future__ import annotations

import os
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowagent.backend import BackendContext, Revision
from flowagent.settings import Ssh
from flowagent.sources import Source, SourceCache
from flowagent.storage import Git
from flowagent_backends.git import GitBackend


@dataclass
class Place:
    """One agent. ``home`` may be shared by several."""

    home: Path
    backend: GitBackend
    cache: SourceCache
    environ: dict[str, str] = field(default_factory=dict)

    def secret(self, name: str, value: str) -> None:
        self.environ[f"FLOWAGENT_SECRET_{name}"] = value

    def of(self, url: str, path: str = "flow.py", **options: Any) -> dict[str, Any]:
        """The declaration of a repository by its URL."""
        name = f"URL_{zlib.crc32(url.encode())}"  # the same in every process
        self.secret(name, url)
        return Git(path, git_clone_url_secret_name=name, **options).to_json()

    async def hold(self, storage: Mapping[str, Any]) -> tuple[Revision, Source]:
        revision = await self.backend.resolve(storage)
        return revision, await self.cache.hold(self.backend, storage, revision)

    async def read(self, storage: Mapping[str, Any], path: str = "flow.py") -> str:
        """Fetch, and read one file of it."""
        _, source = await self.hold(storage)
        with source:
            return (source.directory / path).read_text()

    async def tree(self, storage: Mapping[str, Any]) -> set[str]:
        """Fetch; the paths of all files."""
        _, source = await self.hold(storage)
        with source:
            top = source.directory
            return {
                str(path.relative_to(top)) for path in top.rglob("*") if path.is_symlink() or path.is_file()
            }


@asynccontextmanager
async def place(home: Path, ssh: Ssh | None = None, **options: Any) -> AsyncIterator[Place]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "SSH_"))}
    environ |= {"HOME": str(home), **options.pop("environ", {})}
    context = BackendContext(home, "host1", environ=environ, ssh=ssh or Ssh(), **options)
    backend = GitBackend(context)
    try:
        yield Place(home, backend, SourceCache(home / "sources"), environ)
    finally:
        await backend.close()

"""References of images: ``[registry/]name[:tag][@digest]``, checked before anything is asked of a registry.

The grammar is that of the OCI distribution specification, and of Docker for what it makes of short names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from flowagent.errors import UsageError

HUB = "docker.io"
LONGEST = 255
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_REGISTRY = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Reference:
    """One image. ``str`` is how people write it; ``registry`` is :data:`HUB` where none is written."""

    registry: str
    path: str
    tag: str | None = None
    digest: str | None = None
    written: str = ""  # the name as it was written, without tag and digest

    @property
    def name(self) -> str:
        """Registry and path, without tag and digest."""
        return self.written or f"{self.registry}/{self.path}"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.name}{tag}{f'@{self.digest}' if self.digest else ''}"

    def pinned(self, digest: str) -> Reference:
        """The same image by its digest, whatever its tag points at later."""
        return replace(self, tag=None, digest=digest)

    def allowed(self, registries: Iterable[str]) -> bool:
        """Whether one of ``registries`` is this image's, or the beginning of its name: ``ghcr.io/acme``."""
        full = f"{self.registry}/{self.path}"
        return any(full.startswith(each.rstrip("/") + "/") for each in registries)


def parse(text: str) -> Reference:
    """A reference. :raises UsageError: it is none; control characters and options cannot hide in one."""
    rest, at, digest = text.partition("@")
    name, tag = rest, None
    if ":" in rest.rpartition("/")[2]:
        name, _, tag = rest.rpartition(":")
    registry, path = HUB, name
    first, slash, remainder = name.partition("/")
    if slash and (first == "localhost" or "." in first or ":" in first):
        registry, path = first, remainder
    elif not slash:
        path = f"library/{name}"
    good = (
        len(name) <= LONGEST
        and _REGISTRY.fullmatch(registry)
        and _PATH.fullmatch(path)
        and (tag is None or _TAG.fullmatch(tag))
        and (not at or _DIGEST.fullmatch(digest))
    )
    if not good:
        raise UsageError(
            f"{text[:200]!r} is no image; write [registry/]name[:tag][@sha256:digest], the name in lower case"
        )
    return Reference(registry, path, tag, digest if at else None, name)

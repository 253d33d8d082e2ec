"""Volumes: ``SOURCE:TARGET[:ro|rw]``, the source a path of the host or the name of a volume."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

GROUND = "/flowagent"
"""Where the ground floor is in every container."""
TAKEN = {
    "/": "it is the image itself",
    "/tmp": "it holds the run's own files",  # noqa: S108 - no file of ours is made here
    "/proc": "it is the kernel's",
    "/sys": "it is the kernel's",
    "/dev": "it is the kernel's",
}
"""Targets at which nothing can be mounted, and why."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Volume:
    """One mount."""

    source: str
    target: str
    writable: bool = True

    @property
    def is_path(self) -> bool:
        """Whether it is a path of the host, and not the name of a volume."""
        return self.source.startswith(("/", ".", "~"))

    @property
    def mount(self) -> dict[str, Any]:
        """As the engine takes it. A path that is not there is an error then, and not made by it."""
        kind = "bind" if self.is_path else "volume"
        return {
            "Type": kind,
            "Source": self.source,
            "Target": self.target,
            "ReadOnly": not self.writable,
        }

    @classmethod
    def parse(cls, text: str, error: Callable[[str], Exception]) -> Volume:
        """Read one. A path alone is the same path in the container.

        Raises ``error``: it is none, or would be mounted where something else has to be."""
        source, _, rest = text.partition(":")
        target, _, mode = rest.partition(":")
        target = target or source
        volume = cls(source, posixpath.normpath("/" + target.lstrip("/")), mode != "ro")
        good = (
            mode in ("", "ro", "rw")
            and target.startswith("/")
            and ".." not in target.split("/")
            and "\0" not in text
            and (volume.is_path or _NAME.fullmatch(source))
        )
        if not good:
            raise error(f"volume {text!r} is none; write SOURCE:TARGET[:ro], such as ~/.ssh:/root/.ssh:ro")
        if why := volume._taken:
            raise error(
                f"volume {text!r} cannot be mounted at {volume.target}: {why}; choose another directory"
            )
        return volume

    @property
    def _taken(self) -> str | None:
        """Why nothing can be mounted at its target; None: something can."""
        if self.target == GROUND or self.target.startswith(f"{GROUND}/"):
            return "it holds what runs the flow"
        return TAKEN.get(self.target)

    def in_full(self, error: Callable[[str], Exception]) -> Volume:
        """The same as its author, on another machine, has written it. Raises ``error``: its path depends on
        who reads it; with ``..``, what is mounted could be another path than the one that was allowed."""
        if not self.is_path:
            return self
        if not self.source.startswith("/") or ".." in self.source.split("/"):
            raise error(
                f"the flow asks for volume {self.source}; write the path in full, without ~, . and .."
            )
        return replace(self, source=posixpath.normpath("/" + self.source.lstrip("/")))

    def on_host(self) -> Volume:
        """The same with ``~``, ``..`` and relative paths resolved, as this process sees them."""
        if not self.is_path:
            return self
        return replace(self, source=os.path.abspath(os.path.expanduser(self.source)))

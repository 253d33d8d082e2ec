"""Volumes: ``SOURCE:TARGET[:ro|rw]``, the source a path of the host or the name of a volume."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

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
        """Read one. A path alone is the same path in the container. Raises ``error``: it is none."""
        source, _, rest = text.partition(":")
        target, _, mode = rest.partition(":")
        volume = cls(source, target or source, mode != "ro")
        good = (
            mode in ("", "ro", "rw")
            and volume.target.startswith("/")
            and ".." not in volume.target.split("/")
            and "\0" not in text
            and (volume.is_path or _NAME.fullmatch(source))
        )
        if not good:
            raise error(f"volume {text!r} is none; write SOURCE:TARGET[:ro], such as ~/.ssh:/root/.ssh:ro")
        return volume

    def on_host(self) -> Volume:
        """The same with ``~`` and relative paths resolved, as this process sees them."""
        if not self.is_path:
            return self
        return replace(self, source=os.path.abspath(os.path.expanduser(self.source)))

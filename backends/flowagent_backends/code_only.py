"""What backends have in common that read code from where people put it, and keep nothing there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from flowagent.backend import Features
from flowagent.errors import BackendError
from flowagent.models import Json


class CodeOnly:
    """The part of a backend that has to do with results and labels, for storages of code alone."""

    type: ClassVar[str]
    features = Features(kinds=("script",), revision="the commit")

    def default_labels(self, storage: Mapping[str, Json]) -> tuple[str, ...]:
        """None: any agent that can reach the storage can run its flows."""
        return ()

    def default_result(self, storage: Mapping[str, Json]) -> dict[str, Json] | None:
        """None: this is no place for results."""
        return None

    async def put(self, result: Mapping[str, Json], key: str, file: Path) -> dict[str, Json]:
        """:raises BackendError: always."""
        raise BackendError(
            f"{self.type} storage keeps no results, so {key!r} was not kept; "
            "give the flow a result=LocalResult()"
        )

    async def get(self, reference: Mapping[str, Json], file: Path) -> None:
        """:raises BackendError: always."""
        raise BackendError(f"{self.type} storage keeps no results; give the flow a result=LocalResult()")

    async def close(self) -> None:
        """Nothing is kept open."""

"""Where results are kept: ``from flowagent.results import LocalResult``."""

from __future__ import annotations

from typing import Any

from flowagent.flows.results import (
    AzureResult,
    GCSResult,
    JSONSerializer,
    LocalResult,
    PandasSerializer,
    PickleSerializer,
    Result,
    S3Result,
    Serializer,
)

__all__ = [
    "AzureResult",
    "GCSResult",
    "JSONSerializer",
    "LocalResult",
    "PandasSerializer",
    "PickleSerializer",
    "Result",
    "S3Result",
    "Serializer",
]


def __getattr__(name: str) -> Any:
    from flowagent.flows import results

    return getattr(results, name)

"""Answers of services that are not what their documentation says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flowagent.errors import BackendError

LONGEST_REFUSAL = 1 << 16
"""Bytes of a refusal that is looked at for what it says."""


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Reads answers; ``what`` begins the error.

    :raises BackendError: what is read has another form than the service documents."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise BackendError(
            f"{what}: its answers cannot be understood; check that the address is that of its API"
        ) from error


def read(what: str, body: bytes) -> Any:
    """The JSON that a service answers with. :raises BackendError: it is none, or nested without an end."""
    with understood(what):
        return json.loads(body)


def refusal(body: bytes) -> Any:
    """The JSON of a refusal, which may be in any form; None: it has another."""
    try:
        return json.loads(body) if len(body) <= LONGEST_REFUSAL else None
    except (ValueError, RecursionError):
        return None

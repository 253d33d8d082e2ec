"""Answers of services that are not what their documentation says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flowagent.errors import BackendError


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Reads answers; ``what`` begins the error.

    :raises BackendError: what is read has another form than the service documents."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BackendError(
            f"{what}: its answers cannot be understood; check that the address is that of its API"
        ) from error

"""Whether flow definitions are being loaded: ``flow.run()`` and ``flow.register()`` are inert meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_depth = 0


@contextmanager
def loading() -> Iterator[None]:
    """Make ``run`` and ``register`` of every flow do nothing, in all threads of this process."""
    global _depth
    with _lock:
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1


def is_loading() -> bool:
    return _depth > 0

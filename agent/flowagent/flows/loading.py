"""Whether flow definitions are being loaded: ``flow.run()`` and ``flow.register()`` are inert meanwhile."""

from __future__ import annotations

import threading

_lock = threading.Lock()
_depth = 0


class Loading:
    """Makes ``run`` and ``register`` of every flow do nothing, in all threads of this process."""

    def __enter__(self) -> None:
        global _depth
        with _lock:
            _depth += 1

    def __exit__(self, *_: object) -> None:
        global _depth
        with _lock:
            _depth -= 1


def is_loading() -> bool:
    return _depth > 0

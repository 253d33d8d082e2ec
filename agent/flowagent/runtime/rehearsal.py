"""A flow that each flow process runs while it stands by: see :func:`flowagent.runtime.child.stand_by`."""

from __future__ import annotations

import sys

from flowagent import flow


@flow
def rehearsal() -> None:
    """Nothing, in the way that flows do it; no module of it stays."""
    del sys.modules[__name__]

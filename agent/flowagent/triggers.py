"""When a task runs, given how its upstream tasks ended: ``@task(trigger=triggers.all_finished)``."""

from __future__ import annotations

from typing import Any

from flowagent.flows.triggers import (
    all_failed,
    all_finished,
    all_successful,
    always_run,
    any_failed,
    any_successful,
)

__all__ = ["all_failed", "all_finished", "all_successful", "always_run", "any_failed", "any_successful"]


def __getattr__(name: str) -> Any:
    from flowagent.flows import triggers

    return getattr(triggers, name)

"""When a task runs, given how its upstream tasks ended."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flowagent.flows.errors import TaskFailed
from flowagent.flows.states import COMPLETED, FAILED, SKIPPED, State

all_successful = "all_successful"
all_finished = always_run = "all_finished"
any_successful = "any_successful"
any_failed = "any_failed"
all_failed = "all_failed"

TRIGGERS = (all_successful, all_finished, any_successful, any_failed, all_failed)


def decide(trigger: str, upstream: Iterable[tuple[str, State]]) -> State | None:
    """None: the task runs. Otherwise how it ends unrun; ``upstream`` are pairs of a slug and its state.

    A task that waits for failures is skipped when there are none: it was not needed, which is no failure.
    """
    listed = list(upstream)
    failed = [(slug, state) for slug, state in listed if state.name == FAILED]
    skipped = [slug for slug, state in listed if state.name == SKIPPED]
    if trigger == all_successful and failed:
        return _blocked(*failed[0])
    if trigger == all_successful and skipped:
        return State(SKIPPED, message=f"upstream task {skipped[0]} was skipped")
    if trigger == any_successful and listed and not any(state.name == COMPLETED for _, state in listed):
        return _blocked(*failed[0]) if failed else State(SKIPPED, message="every upstream task was skipped")
    if trigger == any_failed and not failed:
        return State(SKIPPED, message="not needed: no upstream task failed")
    if trigger == all_failed and len(failed) < max(len(listed), 1):
        return State(SKIPPED, message="not needed: not every upstream task failed")
    return None


def _blocked(slug: str, state: State) -> State:
    """Failed because of an upstream task: names the task in which the failure began."""
    origin = state.origin or (slug, state.message or "failed")
    reason = f"upstream task {origin[0]} failed: {origin[1]}"
    return State(FAILED, TaskFailed(reason), reason, origin=origin)


_MISSING = ("manual_only", "not_all_skipped", "some_failed", "some_successful")


def __getattr__(name: str) -> Any:
    if name in _MISSING:
        # not AttributeError: ``from flowagent.triggers import ...`` would replace its message by its own
        raise ImportError(f"flowagent.triggers has no {name}; there are {', '.join(TRIGGERS)}")
    raise AttributeError(f"module 'flowagent.triggers' has no attribute {name!r}")

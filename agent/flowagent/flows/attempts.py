"""One try of a task: its context, its log, its value and what it raised."""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import CoroutineType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from flowagent.flows.context import context
from flowagent.flows.errors import Stop
from flowagent.flows.logs import get_logger, prints_logged
from flowagent.flows.states import COMPLETED, FAILED, State, reason_of

if TYPE_CHECKING:
    from flowagent.flows.engine import Execution, Unit
    from flowagent.flows.workers import Job

_HERE = os.path.dirname(__file__)


class Outcome(NamedTuple):
    """How a try ended. ``final``: another try cannot help."""

    state: State
    final: bool = False


def attempt(unit: Unit, execution: Execution, job: Job) -> Outcome:
    """Run a unit once, in the thread and the context that are made for it. Raises nothing of the user's."""
    values = {
        "task_name": unit.task.name,
        "task_slug": unit.slug,
        "task_run_count": unit.tries,
        "map_index": unit.index,
    }
    inputs = execution.inputs(unit)
    with context(values):
        try:
            with prints_logged() if unit.task.log_stdout else nullcontext():
                value = awaited(unit.task.run(**unit.inputs))
        except Stop:
            raise
        except BaseException as error:
            if not job.is_abandoned():
                log_failure(error)
            return Outcome(State(FAILED, error, reason_of(error)))
        if not job.end_deadline():
            return Outcome(State(FAILED, None, "abandoned"))
        try:
            execution.keep(unit.slug, value, unit.task.result, inputs)
        except Exception as error:
            log_failure(error)
            reason = f"its result could not be kept: {reason_of(error)}"
            return Outcome(State(FAILED, error, reason), final=True)
        return Outcome(State(COMPLETED, value))


def awaited(value: Any) -> Any:
    """The value of a function that may be async: a coroutine is run to its end, in its own event loop."""
    if not isinstance(value, CoroutineType):
        return value
    import asyncio

    return asyncio.run(value)


def log_failure(error: BaseException) -> None:
    """Log the whole traceback, from the first line of user code on."""
    error.__traceback__ = _own_part(error.__traceback__)
    get_logger().error("%s", reason_of(error), exc_info=error)


def _own_part(trace: TracebackType | None) -> TracebackType | None:
    own = trace
    while own is not None and own.tb_frame.f_code.co_filename.startswith(_HERE):
        own = own.tb_next
    return own or trace

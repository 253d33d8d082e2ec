"""From what a supervisor noted to how the attempt ended, in words."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from flowagent.models import Outcome, State
from flowagent.runtime.limits import size

EXIT_INTERNAL = 70
"""The flow process' exit code when flowagent's own code in it failed; its output has the traceback."""


def outcome_of(status: Mapping[str, Any]) -> Outcome:
    """Read the merged status journal of an attempt that is over."""
    state, reason, retryable = _judge(status)
    return Outcome(
        state=state,
        reason=reason,
        exit_code=_integer(status.get("exit_code"), 31),
        signal=_integer(status.get("signal"), 31),
        peak_memory=_integer(status.get("peak_memory"), 62),
        cpu_time=_seconds(status.get("cpu_time")),
        retryable=retryable,
    )


def _judge(status: Mapping[str, Any]) -> tuple[State, str | None, bool]:
    if "error" in status:
        return State.CRASHED, f"the supervisor failed: {status['error']}", True
    if "gone" in status:
        return State.CRASHED, str(status["gone"]), status.get("retryable") is not False
    if "ended" not in status:
        return State.CRASHED, "the supervisor of the flow process was killed", True
    said = status.get("outcome")
    said = said if isinstance(said, dict) else {}
    completed = said.get("state") == "completed" and status.get("exit_code") == 0
    if status.get("out_of_memory"):
        limit = status.get("memory_limit")
        most = f" (its limit is {size(limit)})" if isinstance(limit, int) else ""
        return State.CRASHED, f"killed: out of memory{most}", True
    stop = status.get("stop")
    if status.get("limit"):
        return State.FAILED, f"stopped: {status['limit']}", True
    if stop == "timeout":
        return State.FAILED, str(status.get("reason")), True
    if stop == "lease":
        return State.CRASHED, f"lease lost: {status['reason']}", True
    if stop == "stop" and not completed:
        return State.CANCELLED, str(status.get("reason")), False
    number = status.get("signal")
    if number is not None:
        return State.CRASHED, f"killed by {_name(number)}", True
    if completed:
        return State.COMPLETED, None, True
    if said.get("state") == "failed":
        reason = said.get("reason")
        return State.FAILED, str(reason) if reason else "failed", bool(said.get("retryable", True))
    code = status.get("exit_code")
    if code == EXIT_INTERNAL:
        return State.CRASHED, "the flow process could not be set up; see the output", True
    return State.FAILED, f"the flow process exited with code {code} before the flow had ended", True


def _integer(value: object, bits: int) -> int | None:
    """A number that a store can hold: the flow process could have written to the journal as well."""
    return value if isinstance(value, int) and abs(value) < 1 << bits else None


def _seconds(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1e12 else None


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

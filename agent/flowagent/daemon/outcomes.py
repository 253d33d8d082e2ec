"""From what a supervisor noted to how the attempt ended, in words."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from flowagent.models import Outcome, State

EXIT_INTERNAL = 70
"""The flow process' exit code when flowagent's own code in it failed; its output has the traceback."""


def outcome_of(status: Mapping[str, Any]) -> Outcome:
    """Read the merged status journal of an attempt that is over."""
    state, reason, retryable = _judge(status)
    return Outcome(
        state=state,
        reason=reason,
        exit_code=status.get("exit_code"),
        signal=status.get("signal"),
        peak_memory=status.get("peak_memory"),
        cpu_time=status.get("cpu_time"),
        retryable=retryable,
    )


def _judge(status: Mapping[str, Any]) -> tuple[State, str | None, bool]:
    if "error" in status:
        return State.CRASHED, f"the supervisor failed: {status['error']}", True
    if "ended" not in status:
        return State.CRASHED, "the supervisor of the flow process was killed", True
    said = status.get("outcome") or {}
    completed = said.get("state") == "completed" and status.get("exit_code") == 0
    stop = status.get("stop")
    if stop == "timeout":
        return State.FAILED, status["reason"], True
    if stop == "lease":
        return State.CRASHED, f"lease lost: {status['reason']}", True
    if stop == "stop" and not completed:
        return State.CANCELLED, status["reason"], False
    number = status.get("signal")
    if status.get("out_of_memory"):
        return State.CRASHED, "killed by the kernel: out of memory", True
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


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

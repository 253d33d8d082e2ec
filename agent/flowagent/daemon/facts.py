"""What hooks and notifications are told of attempts, and of runs that ended."""

from __future__ import annotations

from flowagent.models import FlowSpec, Json, Outcome, Run


def of_attempt(run: Run, spec: FlowSpec, number: int, **more: Json) -> dict[str, Json]:
    return {
        "run": run.id,
        "attempt": number,
        "flow": spec.name,
        "version": run.version,
        "storage": spec.storage["type"],
        "labels": list(run.labels),
        **more,
    }


def of_end(run: Run, spec: FlowSpec, number: int, outcome: Outcome) -> dict[str, Json]:
    """``run``: as the store has it now that the attempt has ended with ``outcome``."""
    return of_attempt(
        run,
        spec,
        number,
        state=str(outcome.state),
        reason=outcome.reason,
        again=not run.state.terminal,
        exit_code=outcome.exit_code,
        started=run.started,
        ended=run.ended,
        agent=run.agent,
    )

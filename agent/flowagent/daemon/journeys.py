"""The journey of an attempt through its phases, for those who watch: metrics and traces.

Nobody who watches costs nothing: there is one journey that notes nothing down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from flowagent.models import FlowSpec, Outcome, Run
from flowagent.runtime.rundir import RunDirectory

CLAIM, RESOLVE, MATERIALISE, START, RUN, RECORD = "claim", "resolve", "materialise", "start", "run", "record"
PHASES = (CLAIM, RESOLVE, MATERIALISE, START, RUN, RECORD)
"""In order; an attempt that ends early leaves some out."""


class Journey:
    """One that nobody watches; and what those who watch override."""

    __slots__ = ()

    def enter(self, phase: str) -> None:
        """The phase before has ended, this one begins."""

    def environment(self) -> Mapping[str, str]:
        """What the flow process is to know of it."""
        return {}

    def end(self, outcome: Outcome | None = None, again: bool = False) -> None:
        """It is over; ``outcome`` None: not recorded by this agent. ``again``: another attempt follows. Only
        the first call counts."""


UNWATCHED = Journey()


class Watcher(Protocol):
    """Somebody who watches attempts."""

    def begin(self, run: Run, number: int, spec: FlowSpec, asked: float, inherited: str | None) -> Journey:
        """An attempt was claimed; the store was asked for it at ``asked``, in seconds since the epoch.

        ``inherited``: the trace context of an attempt that an agent before this one has started, which
        begins in the phase ``run``; None for one that was claimed now."""
        ...


class _Together(Journey):
    __slots__ = ("_journeys",)

    def __init__(self, journeys: Sequence[Journey]) -> None:
        self._journeys = journeys

    def enter(self, phase: str) -> None:
        for journey in self._journeys:
            journey.enter(phase)

    def environment(self) -> Mapping[str, str]:
        return {name: value for journey in self._journeys for name, value in journey.environment().items()}

    def end(self, outcome: Outcome | None = None, again: bool = False) -> None:
        for journey in self._journeys:
            journey.end(outcome, again)


class Watchers:
    """All who watch."""

    def __init__(self, watchers: Sequence[Watcher] = ()) -> None:
        self._watchers = watchers

    def begin(
        self, run: Run, number: int, spec: FlowSpec, asked: float, inherited: str | None = None
    ) -> Journey:
        if not self._watchers:
            return UNWATCHED
        journeys = [each.begin(run, number, spec, asked, inherited) for each in self._watchers]
        return journeys[0] if len(journeys) == 1 else _Together(journeys)


def trace_of(directory: RunDirectory) -> str:
    """The trace context that an agent before this one gave an attempt, or nothing."""
    try:
        return str(directory.read_spec()["env"]["TRACEPARENT"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""

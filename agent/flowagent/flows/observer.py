"""What watches an execution: the agent's child process writes events, a local run writes log lines."""

from __future__ import annotations

from typing import Any, NamedTuple

from flowagent.flows.logs import get_logger
from flowagent.flows.results import Result


class Restored(NamedTuple):
    """A value from the run ``run_id``."""

    value: Any
    run_id: str


class Observer:
    """Told what happens, one call at a time. These methods do nothing; override what is of interest."""

    def task(self, slug: str, name: str, state: str, reason: str | None = None, tries: int = 1) -> None:
        """A task is ``running``, ``retrying``, ``completed``, ``failed`` or ``skipped``.

        ``tries`` counts from 1; 0: it was never tried. An error raised here ends the execution."""

    def result(self, slug: str, value: Any, declaration: Result, inputs: str | None = None) -> None:
        """A task returned a value that is to be kept; slug "" is the value of a function flow.

        ``inputs`` is the digest of its arguments, where that is needed to know it again. Called in the task's
        own context. An error raised here fails the task, or the function flow."""

    def nothing(self, slug: str, inputs: str | None = None) -> None:
        """A task returned None, and what it returns is to be kept."""

    def restored(self, slug: str, inputs: str | None = None) -> Restored | None:
        """What a task returned in the run that this one repeats; None: it has to run."""
        return None


class LoggingObserver(Observer):
    """Writes each state as a log line."""

    def task(self, slug: str, name: str, state: str, reason: str | None = None, tries: int = 1) -> None:
        logger = get_logger()
        if state == "running":
            logger.info("%s: running%s", slug, f" (try {tries})" if tries > 1 else "")
        elif state == "retrying":
            logger.warning("%s: %s", slug, reason)
        elif state == "failed":
            logger.error("%s: failed: %s", slug, reason)
        else:
            logger.info("%s: %s%s", slug, state, f" ({reason})" if reason else "")

"""Errors raised next to user code, by the authoring API, the loader and the engine. Stdlib-only."""

from __future__ import annotations


class FlowagentError(Exception):
    """Root of all errors of flowagent. The message is one line, for the person who meets it."""


class FlowError(FlowagentError):
    """A flow is declared, loaded or called in a way that cannot work."""


class FlowLoadError(FlowError):
    """The flow's definition could not be loaded from its source."""


class FlowNotFoundError(FlowLoadError):
    """The source was loaded, and the flow asked for is not in it."""


class ParameterError(FlowError):
    """A parameter is missing, unknown or not JSON."""


class TaskFailed(FlowError):
    """A task failed for good, or could not run because one upstream of it did."""


class TaskTimeout(FlowError):
    """A task ran longer than its timeout."""


class Stop(BaseException):
    """Raised into the main thread by whoever runs a flow, to end it from outside.

    It passes through the engine, where everything else that a task raises only fails that task."""

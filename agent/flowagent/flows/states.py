"""How a task or a flow ended."""

from __future__ import annotations

from typing import Any

COMPLETED, FAILED, SKIPPED = "completed", "failed", "skipped"


class State:
    """The end of a task or a flow, as ``flow.run()`` returns it.

    ``result`` is the value returned, the exception of a failed task or function flow, or for a
    :class:`~flowagent.flows.dag.Flow` the states of its tasks by task. ``children``: of a mapped task.
    """

    __slots__ = ("children", "message", "name", "origin", "result")

    def __init__(
        self,
        name: str,
        result: Any = None,
        message: str | None = None,
        *,
        origin: tuple[str, str] | None = None,
        children: list[State] | None = None,
    ) -> None:
        self.name = name
        self.result = result
        self.message = message
        self.origin = origin  # of a failure: the slug of the task it began in, and that task's reason
        self.children = children

    def is_successful(self) -> bool:
        """Completed, or skipped because it was not needed."""
        return self.name != FAILED

    def is_failed(self) -> bool:
        return self.name == FAILED

    def is_skipped(self) -> bool:
        return self.name == SKIPPED

    def is_finished(self) -> bool:
        return True

    def is_mapped(self) -> bool:
        return self.children is not None

    @property
    def map_states(self) -> list[State]:
        return list(self.children or ())

    def __repr__(self) -> str:
        return f"<{self.name}{f': {self.message}' if self.message else ''}>"


def reason_of(error: BaseException) -> str:
    """One line that says what was raised: ``ValueError: no such row``."""
    if isinstance(error, SystemExit):
        return f"SystemExit: the code called sys.exit({'' if error.code is None else repr(error.code)})"
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = "(its message cannot be shown)"
    if len(said) > 1000:
        said = said[:1000] + "…"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__

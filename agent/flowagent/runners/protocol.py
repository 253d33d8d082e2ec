"""What the daemon asks of a runner, whatever it executes attempts in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flowagent.models import Json
from flowagent.runtime.rundir import RunDirectory
from flowagent.settings import Settings


@dataclass(frozen=True)
class Order:
    """One attempt as it is handed to a runner. ``grace``: seconds from SIGTERM to SIGKILL.

    ``values`` are the declared secrets. ``source`` is the flow's directory on this machine, a copy of its
    ``origin`` if the run may write to it; ``lease_fd`` holds the origin if it is in the source cache. None:
    it is in ``image``, or is to be fetched where the flow runs (see :meth:`Runner.resolves`)."""

    run: RunDirectory
    run_id: str
    attempt: int
    flow_name: str
    config: Mapping[str, Json]
    storage: Mapping[str, Json]
    grace: float
    values: Mapping[str, str] = field(default_factory=dict)
    source: Path | None = None
    origin: Path | None = None
    lease_fd: int | None = None
    image: str | None = None


class Runner(Protocol):
    """Executes attempts, each with a run directory on this machine that says all that is known of it.

    ``name`` is what runs ask for; ``floor`` the level of isolation that each gets at the least; ``gaps`` what
    cannot be enforced here, each in a line for people."""

    name: str

    @property
    def floor(self) -> str: ...

    @property
    def gaps(self) -> Sequence[str]: ...

    async def open(self) -> None:
        """Begin; nothing is asked before. :raises FlowagentError: attempts cannot be executed here."""
        ...

    async def prepare(self) -> None:
        """Do ahead of the first attempt what it would have to wait for, while the agent goes on.

        :raises FlowagentError: that attempt would fail."""
        ...

    async def tend(self) -> None:
        """Let go of what was not used for long. Called now and then."""
        ...

    async def check(self) -> None:
        """See whether attempts can be started now. :raises FlowagentError: they cannot."""
        ...

    def reload(self, settings: Settings) -> None:
        """Go by these limits from the next attempt on; all else takes a new start."""
        ...

    async def close(self) -> None:
        """Give up what is the agent's; attempts go on by themselves."""
        ...

    # -- before an attempt ---------------------------------------------------------------------------

    def admit(self, config: Mapping[str, Json]) -> dict[str, Json]:
        """What a run of this config is told of its isolation: ``sandbox``, its level, and ``grants``.

        :raises SandboxError: its flow demands more than there is, or asks for more than is allowed."""
        ...

    def resolves(self, config: Mapping[str, Json]) -> bool:
        """Whether the runs of this config resolve their storage themselves, where they are executed."""
        ...

    def furnish(self, order: Order, plan: Mapping[str, Json]) -> dict[str, Json]:
        """The plan with all that depends on where the flow process runs: where it finds its run directory
        and its source, which variables it starts from."""
        ...

    async def make_ready(self, order: Order) -> None:
        """Do what takes long, and may be given up, before the attempt counts as begun.

        :raises FlowagentError: it cannot be executed; ``retryable`` says whether trying again can help."""
        ...

    # -- its life ------------------------------------------------------------------------------------

    async def start(self, order: Order) -> Any:
        """Start the attempt; a handle for :meth:`wait`. Starting one twice does no harm.

        :raises FlowagentError: it cannot be started."""
        ...

    async def began(self, run: RunDirectory) -> bool:
        """Whether an attempt that an agent before this one has prepared was started; if not, it never is."""
        ...

    async def wait(self, run: RunDirectory, handle: Any = None) -> dict[str, Any]:
        """Wait until nothing of the attempt lives, keeping its output file up to date; what is noted of it.

        Without ``handle`` for an attempt that an agent before this one has started. What is noted has
        ``"ended"`` in it, unless the end came by force from outside."""
        ...

    def extend(self, run: RunDirectory, deadline: float) -> None:
        """Let the attempt live until ``deadline``, by the boot time clock. :raises OSError: the note of it
        cannot be written."""
        ...

    def stop(self, run: RunDirectory, reason: str, grace: float) -> bool:
        """Ask for the end of an attempt: SIGTERM, ``grace`` seconds, SIGKILL to all. Whether anyone heard.

        :raises FileNotFoundError: there is no such attempt."""
        ...

    async def forbid(self, run: RunDirectory, reason: str, *, failed: bool = False) -> None:
        """See to it that nothing of the attempt lives, and that nothing of it can begin any more.

        ``failed``: people may want to look at what is left of it."""
        ...

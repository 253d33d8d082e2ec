"""What a flow process may do: the levels of isolation, applied by the process to itself before user code.

``process`` is the level that every machine has: own session, clean environment, private HOME and TMPDIR,
no new privileges, no core dumps, no inherited descriptors, first in line when memory runs out.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping

from flowagent.flows.errors import FlowError
from flowagent.runtime import supervisor

LEVELS = ("process", "landlock", "namespace", "container")
"""Weakest first."""
OBTAINABLE = ("process",)
"""What this version applies; a flow that demands more is refused, never run with less."""
OOM_SCORE_ADJ = 500

INHERITED = ("PATH", "LANG", "LANGUAGE", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR")
"""Variables (and all ``LC_*``) that a flow process has from the agent; everything else is left out."""


def obtain(minimum: str | None) -> str:
    """The level that a flow gets, given the least that it accepts.

    :raises FlowError: this machine or version cannot give it; nothing may run then."""
    if minimum is None:
        return OBTAINABLE[-1]
    if minimum not in LEVELS:
        raise FlowError("unknown sandbox level {!r}; the levels are {}".format(minimum, ", ".join(LEVELS)))
    for level in OBTAINABLE:
        if LEVELS.index(level) >= LEVELS.index(minimum):
            return level
    raise FlowError(
        f"the flow demands sandbox level {minimum!r} and this agent's best is {OBTAINABLE[-1]!r}; "
        "use another agent or a lower level"
    )


def base_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The allow-listed part of an environment."""
    return {name: value for name, value in environ.items() if name in INHERITED or name.startswith("LC_")}


def confine() -> None:
    """Apply level ``process`` to the calling process. :raises OSError: fail closed."""
    # Forked from a process that is not dumpable; that would hide this one's own /proc entries from itself.
    supervisor.prctl(supervisor.PR_SET_DUMPABLE, 1)
    supervisor.prctl(supervisor.PR_SET_NO_NEW_PRIVS, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(OOM_SCORE_ADJ))

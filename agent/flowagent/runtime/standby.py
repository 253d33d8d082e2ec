"""A flow process that is there before there is anything to run, as its supervisor sees it.

To fork, and to touch for the first time the memory that every run touches, takes longer than all else that
happens before user code. Nobody has to wait for it when it is done between two attempts.
"""

from __future__ import annotations

import json
import os
import socket

from flowagent.runtime.limits import Limits
from flowagent.runtime.sandbox import Sandbox


class FlowProcess:
    """One such process. ``others``: a connection of the supervisor that it must not keep open. With ``once``
    there will be no other, and nothing is gained by a rehearsal."""

    def __init__(self, sandbox: Sandbox, others: socket.socket | None = None, *, once: bool = False) -> None:
        """:raises OSError: it could not be forked."""
        sandbox.refresh()
        parent = os.getpid()
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.pid = os.fork()
        except OSError:
            self._connection.close()
            raise
        finally:
            if os.getpid() == parent:
                theirs.close()
        if self.pid == 0:
            # Nothing returns from here; flowagent.runtime.child ends the process.
            from flowagent.runtime import child

            self._connection.close()
            if others is not None:
                others.close()
            child.stand_by(theirs, sandbox, parent, rehearses=not once)

    def begin(self, directory: str, limits: Limits, fds: list[int]) -> None:
        """Have it run the attempt in ``directory``. ``fds``: its output, its outcome, and secrets if any.

        :raises OSError: it is there no more."""
        packet = json.dumps({"directory": directory, "limits": limits}).encode()
        socket.send_fds(self._connection, [packet], fds)

    def close(self) -> None:
        """Give up the connection; if it was never begun, the process ends."""
        self._connection.close()

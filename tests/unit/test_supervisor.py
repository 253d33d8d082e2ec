"""What a supervisor kills, and what not."""

from __future__ import annotations

import os
import signal
import subprocess

from flowagent.runtime import supervisor


def test_a_pid_that_is_somebody_elses_now_is_left_alone() -> None:
    """Between the look at all processes and the signal, a pid may have been given to another process."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        assert process.pid in supervisor.descendants()
        strangers = {1, process.pid}  # its parent is none of the attempt's
        assert not supervisor.kill(process.pid, strangers)
        assert process.poll() is None
        assert supervisor.kill(process.pid, {os.getpid()})
        assert process.wait(10) == -signal.SIGKILL
        assert not supervisor.kill(process.pid, {os.getpid()})
    finally:
        process.kill()
        process.wait()

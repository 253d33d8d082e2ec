"""The supervisor inside of a container: the same run directory and supervision, in a place of its own.

What the agent has to say comes on standard input: one line of JSON (:class:`Brief`), the files of the source,
then a line of JSON for each lease and request to stop. What it is to hear goes to standard output, see
:mod:`flowagent.runtime.relay`. It depends on no agent once it has begun: when nobody extends the lease, it
ends the flow, and the container with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, BinaryIO, NoReturn

from flowagent.runtime import limits, linux, relay
from flowagent.runtime.cgroups import Group
from flowagent.runtime.rundir import RunDirectory, boottime
from flowagent.runtime.sandbox import Rules, Sandbox
from flowagent.runtime.standby import FlowProcess
from flowagent.runtime.supervisor import WATCHED, supervise

BOOT_ID = "/proc/sys/kernel/random/boot_id"
FIRST_LEASE = 60.0
"""Seconds to wait for a lease in the time of this machine, where the agent's is another one."""
UNATTENDED = 10 * 365 * 86400.0
"""Seconds that an attempt may live whose brief is a file: whoever started the container ends it."""
LAST_WORDS = 60.0
"""Seconds that the log may take to take in what is left of the output."""
EXIT_UNUSABLE = 70
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the file has no name there
"""What is in memory of the file system of every container."""
BRIEF_ARGUMENT = 2
"""Where on the command line the descriptor is."""


class Contained(Sandbox):
    """The container is the sandbox; resource limits and the loss of privileges come on top."""

    def __init__(self) -> None:
        self.rules = Rules(home="/nonexistent", runs="/nonexistent")
        self._limits_memory = True  # by the engine

    def refresh(self) -> None:
        """Nothing of it depends on the file system."""

    def make_ready(self) -> None:
        """It is."""

    def confine(self, level: str, run: RunDirectory, spec: Mapping[str, Any], limit: limits.Limits) -> None:
        self._limit(limit)
        limits.apply_open_files(limit)
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)


def boot_id() -> str:
    """Which boot of which machine this is: where it is the same, so is the clock of leases."""
    try:
        with open(BOOT_ID) as file:
            return file.read().strip()
    except OSError:
        return ""


def main() -> NoReturn:
    """Run the attempt that comes on standard input, then end the container. With an argument, its brief comes
    from that descriptor, from one who has fetched the source; or from that file, and nobody speaks to us."""
    try:
        if len(sys.argv) > BRIEF_ARGUMENT:
            named = sys.argv[BRIEF_ARGUMENT]
            with open(int(named) if named.isdigit() else named, "rb") as file:
                brief = json.load(file)
            if not named.isdigit():
                brief |= {"deadline": boottime() + UNATTENDED, "boot_id": boot_id()}
            os._exit(_serve(brief, sys.stdin.buffer))
        os._exit(_serve(json.loads(sys.stdin.buffer.readline()), sys.stdin.buffer))
    except (OSError, ValueError, LookupError) as error:
        sys.stderr.write(f"the container cannot be used: {error}\n")
        sys.stderr.flush()
        os._exit(EXIT_UNUSABLE)


def _serve(brief: Mapping[str, Any], commands: BinaryIO) -> int:
    place = _make_place()
    spec = brief["spec"]
    if brief["files"] is not None:
        spec["source"]["directory"] = os.path.join(place, "source")
        unpack(brief["files"], commands, spec["source"]["directory"])
    run = lay_out(place, spec, brief["deadline"] if brief["boot_id"] == boot_id() else None)
    secrets = _memory_file(brief["secrets"]) if brief["secrets"] else None
    control = threading.Thread(target=_obey, args=(commands, run, brief.get("said", "")), daemon=True)
    return execute(run, brief["limits"], brief["grace"], secrets, control)


def _make_place() -> str:
    """A directory of our own, where temporary files are; tempfile would first import half of the library.

    :raises OSError: none can be made."""
    for directory in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp", "."):  # noqa: S108 - its name is a secret
        if directory:
            place = os.path.join(os.path.abspath(directory), f"flowagent-{os.urandom(8).hex()}")
            with suppress(OSError):
                os.mkdir(place, 0o700)
                return place
    raise OSError("neither TMPDIR, nor /tmp, /var/tmp or the working directory can be written to")


def unpack(files: list[list[Any]], stream: BinaryIO, directory: str) -> None:
    """Write files as the agent lists them: name, mode, and size in ``stream``; or target of a link."""
    os.makedirs(directory, exist_ok=True)
    for name, mode, rest in files:
        path = os.path.join(directory, name)
        if isinstance(rest, str):
            os.symlink(rest, path)
        elif mode is None:
            os.makedirs(path, exist_ok=True)
        else:
            with open(path, "wb") as file:
                while rest:
                    piece = stream.read(min(rest, 1 << 20))
                    if not piece:
                        raise ValueError("the source did not come in full")
                    file.write(piece)
                    rest -= len(piece)
            os.chmod(path, mode)


def lay_out(place: str, spec: dict[str, Any], deadline: float | None) -> RunDirectory:
    """Make the run directory below ``place``. Without a deadline nothing begins before one comes.

    The spec holds parameters and variables, and stays off the disk: its file is a link to memory that this
    process has open, and with it the flow process that it forks, which reads it before anything else."""
    run = RunDirectory(os.path.join(place, "run"))
    here = os.getcwd()
    spec.update(
        run_directory=run.path,
        env={**os.environ, **spec["env"]},
        working_dir=spec.get("working_dir") or (here if here != "/" else None),
        bytecode=None,
        readable=[],
    )
    run.make()
    run.hand_over({}, deadline if deadline is not None else 0.0)
    os.unlink(run.spec_path)
    os.symlink(f"/proc/self/fd/{_memory_file(spec)}", run.spec_path)
    return run


def execute(
    run: RunDirectory,
    limit: Mapping[str, Any],
    grace: float,
    secrets: int | None,
    control: threading.Thread | None = None,
) -> int:
    """Supervise the attempt in a run directory, with its output going to standard output; the exit code."""
    from flowagent.runtime import warmth

    output = os.dup(1)
    os.dup2(2, 1)  # nothing but the relay writes there
    warmth.preload([])  # later, files beside the flow could take the place of what the library has
    warmth.prepare_flows()
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    process = FlowProcess(Contained(), once=True)  # before there are threads
    relay.note(output, relay.BEGAN, boot_id=boot_id(), boottime=boottime())
    if control is not None:
        control.start()
        _await_lease(run)
    copier = relay.Relay(run.output_path, output)
    copier.start()
    killed = kills()
    job = {"directory": run.path, "limits": limit, "level": "container", "grace": grace}
    supervise(job, process, Group({}, "none"), secrets)
    process.close()
    status = run.status()
    if status.get("signal") == signal.SIGKILL and not status.get("stop") and kills() > killed:
        status["out_of_memory"] = True
    copier.finish(LAST_WORDS)
    relay.note(output, relay.ENDED, status=status)
    said = status.get("outcome") or {}
    return 0 if said.get("state") == "completed" and status.get("exit_code") == 0 else 1


def _await_lease(run: RunDirectory) -> None:
    """On another machine than the agent's, the first lease can only be granted once it knows our clock."""
    end = boottime() + FIRST_LEASE
    while not run.read_lease() and boottime() < end:
        threading.Event().wait(0.01)


def _obey(commands: BinaryIO, run: RunDirectory, said: str) -> None:
    """Pass on what the agent says, as an agent next to the supervisor would. ``said``: of the first line."""
    for line in commands:
        with suppress(ValueError, LookupError, TypeError, OSError):
            word, said = json.loads(said.encode() + line), ""
            if "lease" in word:
                run.write_lease(float(word["lease"]))
            if "stop" in word:
                run.request_stop(str(word["reason"]), float(word["stop"]))
                os.kill(os.getpid(), signal.SIGUSR1)


def kills() -> int:
    """How many processes of this container the kernel has killed for memory, if it says so."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with suppress(OSError, ValueError), open(path) as file:
            counts = dict(line.split() for line in file)
            return int(counts.get("oom_kill", 0))
    return 0


def _memory_file(values: Mapping[str, Any]) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("values", os.MFD_CLOEXEC)
    else:  # a Python that was built for a C library of before 2018
        import tempfile

        with tempfile.TemporaryFile(dir=SHARED_MEMORY) as file:
            fd = os.dup(file.fileno())
    relay.write(fd, json.dumps(dict(values)).encode())
    return fd

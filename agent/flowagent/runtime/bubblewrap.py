"""Sandbox level ``namespace``: the flow process in namespaces of its own, made by bubblewrap.

bubblewrap executes a program, so a flow at this level begins with a fresh interpreter instead of a fork of
the warm one. Inside, it confines itself by Landlock as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from flowagent.runtime import credentials, landlock
from flowagent.runtime.isolation import SHARED_MEMORY
from flowagent.runtime.rundir import RunDirectory
from flowagent.runtime.sandbox import PRIVATE_TMP, Rules

EMPTY = "/dev/null"


def execute(
    rules: Rules,
    run: RunDirectory,
    spec: Mapping[str, Any],
    memory: int | None,
    program: Sequence[str],
    fds: Sequence[int],
) -> NoReturn:
    """Replace this process by bubblewrap, and that by ``program``. Descriptors ``fds`` stay open.

    :raises OSError: there is no bubblewrap."""
    for fd in fds:
        os.set_inheritable(fd, True)
    # Nothing of the flow's environment here: bubblewrap itself is not in the sandbox yet.
    environment = {"LANG": "C.UTF-8", "PATH": os.pathsep.join((os.defpath, os.environ.get("PATH", "")))}
    os.execvpe("bwrap", ["bwrap", *arguments(rules, run, spec, memory), "--", *program], environment)  # noqa: S606


def arguments(rules: Rules, run: RunDirectory, spec: Mapping[str, Any], memory: int | None) -> list[str]:
    """The options; their order is that of the mounts. ``memory``: the most bytes of files in memory."""
    grants = spec["grants"]
    found = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--hostname", "flow", "--die-with-parent"]
    if grants["network"] is False:
        found.append("--unshare-net")
    found += ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    for path in (PRIVATE_TMP, SHARED_MEMORY):
        found += [*(["--size", str(memory)] if memory is not None else []), "--tmpfs", path]
    for device in landlock.devices():
        if os.path.basename(device).startswith(landlock.COMPUTING):
            found += ["--dev-bind", device, device]
    for path in (*credentials.places(), *rules.denied, *rules.covered):
        found += _hide(path)
    found += ["--tmpfs", rules.home]
    for path in (*sys.path[:1], spec["bytecode"], *spec["readable"]):
        found += ["--ro-bind", path, path]
    # A source is anywhere; but in the home, which its author does not choose to read, as confinement says.
    for path in (spec["source"]["directory"], sys.prefix, sys.base_prefix):
        if path and os.path.exists(path) and _below(path, PRIVATE_TMP) and not _below(path, rules.home):
            found += ["--ro-bind", path, path]
    for path in grants["read"]:
        found += ["--ro-bind", path, path]
    for path in (run.work, *grants["write"]):
        found += ["--bind", path, path]
    return [*found, "--chdir", run.work]


def _hide(path: str) -> list[str]:
    real = os.path.realpath(path)
    if not os.path.lexists(real) or real.startswith(PRIVATE_TMP + "/"):
        return []
    return ["--tmpfs", real] if os.path.isdir(real) else ["--ro-bind", EMPTY, real]


def _below(path: str, top: str) -> bool:
    return os.path.commonpath([path, top]) == top

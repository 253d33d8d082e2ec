"""What a launcher imports before its first run, and what each flow process does to make it its own."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from typing import Any

from flowagent.flows.errors import FlowError

PRELOADED = (
    "concurrent.futures.thread",
    "linecache",
    "logging",
    "random",
    "traceback",
    "flowagent.flows.dag",
    "flowagent.flows.engine",
    "flowagent.flows.function",
    "flowagent.flows.mapping",
    "flowagent.flows.pickles",
    "flowagent.results",
    "flowagent.run_configs",
    "flowagent.runtime.child",
    "flowagent.runtime.bubblewrap",
    "flowagent.storage",
    "flowagent.triggers",
)
"""What nearly every flow process would import first."""

FORK_SAFE = frozenset({"jemalloc_bg_thd"})
"""Threads that a fork does no harm to: that of jemalloc, which comes with pyarrow, and so with pandas."""
REHEARSALS = 3
"""After so many, more of them change next to nothing."""

_handlers: list[dict[str, Any]] = []
"""What the standard library's modules wanted to be called for around forks."""
_register = os.register_at_fork


def hold_fork_handlers() -> None:
    """Before anything else is imported: keep modules from having themselves called at each fork.

    In a process with one thread, which holds no lock, these handlers have nothing to mend, but touch so many
    pages that they double the cost of a fork. They are registered for the forks of user code, see renew()."""
    os.register_at_fork = lambda **handlers: _handlers.append(handlers)


def preload(modules: list[str]) -> None:
    """Import our own modules and ``modules``, once, here. cloudpickle may be missing in an interpreter that
    runs scripts only.

    :raises FlowError: one of ``modules`` cannot be imported, or leaves threads running: nothing could be
        forked safely then."""
    for name in PRELOADED:
        importlib.import_module(name)
    with suppress(ImportError):
        importlib.import_module("cloudpickle")
    os.register_at_fork = _register
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise FlowError(f"cannot preload {name}: {type(error).__name__}: {error}") from error
    if modules:
        _settle()
        threads = _threads()
        if threads:
            raise FlowError(
                f"cannot preload {', '.join(modules)}: threads were left running ({', '.join(threads)}), and "
                "a process with threads cannot be forked safely; take out the one that starts them"
            )


def prepare_flows() -> None:
    """Do once what all flow processes would have to do alike."""
    from flowagent.runtime import child

    child.prepare()


def rehearse_flows() -> None:
    """Once where flow processes are forked: what each would write into its copy of the code is there then."""
    from flowagent.runtime import child

    for _ in range(REHEARSALS):
        child.rehearse()


def _settle() -> None:
    """Libraries that keep threads for computing, such as OpenBLAS, end them at the first fork."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _threads() -> list[str]:
    """The names of threads of this process that do not see to themselves around a fork."""
    found = []
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{thread}/comm") as file:
            name = file.read().strip()
            if int(thread) != os.getpid() and name not in FORK_SAFE:
                found.append(name)
    return sorted(found)


def renew() -> None:
    """Once in each flow process: what must not be the same in any two of them."""
    for handlers in _handlers:
        os.register_at_fork(**handlers)
    if "random" in sys.modules:  # it is not in an interpreter that has just started
        sys.modules["random"].seed()
    set_native_id = getattr(sys.modules["threading"].main_thread(), "_set_native_id", None)
    if set_native_id is not None:
        set_native_id()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()

"""Byte code of sources, kept outside of them: sources are read-only, and compiling costs time in each run.

What is kept goes by the file's path and content, so nothing is ever out of date. Flow processes only read it.
What they had to compile themselves they leave word of; after the run a confined process that executes nothing
of theirs compiles those files once more, from the source as it is, and keeps the result: whatever a flow says
or does, what is kept for a file is that file.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import machinery
from types import CodeType
from typing import Any

from flowagent.runtime import landlock, linux
from flowagent.runtime.rundir import RunDirectory

WORTHWHILE = 2000
"""Bytes of text below which compiling is quicker than looking."""
MOST_FILES = 1000
"""Files that are compiled after one run."""
SECONDS, MEMORY = 5, 1 << 30
"""What compiling after one run may take, of CPU time and of memory in bytes."""

_misses: list[str] = []


def compiled(text: bytes, path: str, kept: str | None) -> CodeType:
    """The code of a file, from the directory ``kept`` if it is there."""
    if kept is None or len(text) < WORTHWHILE:
        return _compile(text, path)
    try:
        with open(_place(text, path, kept), "rb") as file:
            code = marshal.loads(file.read())  # noqa: S302 - no flow can write there
        if isinstance(code, CodeType):
            return code
    except (OSError, ValueError, EOFError, TypeError):
        pass
    _misses.append(path)
    return _compile(text, path)


def _compile(text: bytes, path: str) -> CodeType:
    code: CodeType = compile(text, path, "exec", dont_inherit=True)
    return code


def _place(text: bytes, path: str, kept: str) -> str:
    digest = hashlib.sha256(path.encode() + b"\0" + text)
    return f"{kept}/{sys.implementation.cache_tag}-{digest.hexdigest()}"


class _Loader(machinery.SourceFileLoader):
    kept: str

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        return compiled(self.get_data(path), path, self.kept)


def use(kept: str, root: str) -> None:
    """From now on, import modules below ``root`` by way of ``kept``."""

    def hook(directory: str) -> Any:
        if directory != root and not directory.startswith(root + "/"):
            raise ImportError
        loader = type("Loader", (_Loader,), {"kept": kept})
        return machinery.FileFinder(
            directory,
            (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
            (loader, machinery.SOURCE_SUFFIXES),
            (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
        )

    sys.path_hooks.insert(0, hook)


def leave_word(run: RunDirectory) -> None:
    """Name the files that had to be compiled, for :func:`keep`."""
    if _misses:
        with suppress(OSError), open(run.uncompiled_path, "w") as file:
            json.dump(_misses[:MOST_FILES], file)


def keep(run: RunDirectory) -> None:
    """After a run: compile what it has left word of, in a process of its own, and wait for that."""
    if not os.path.lexists(run.uncompiled_path):
        return
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        signal.alarm(2 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.nice(10)
        spec = run.read_spec()
        root, kept = os.path.realpath(spec["source"]["directory"]), spec["bytecode"]
        names = _names(run)
        _confine(root, kept)
        for path in names:
            _keep_one(path, root, kept)
    except (OSError, ValueError, LookupError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass  # the flow left nonsense, or the disk is full: it is compiled in each run then
    finally:
        os._exit(0)


def _names(run: RunDirectory) -> Sequence[str]:
    fd = os.open(run.uncompiled_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        names = json.loads(file.read(1 << 20))
    return [name for name in names[:MOST_FILES] if isinstance(name, str)]


def _confine(root: str, kept: str) -> None:
    """The compiler meets hostile text: it may read the source and write what it makes of it."""
    linux.drop_capabilities()
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    abi = landlock.version()
    if abi:
        ruleset = landlock.Ruleset(abi, connect=None, bind=None)
        ruleset.allow(root, landlock.READ)
        ruleset.allow(kept, landlock.handled(abi))
        ruleset.enforce()


def _keep_one(path: str, root: str, kept: str) -> None:
    real = os.path.realpath(path)
    if not real.startswith(root + "/"):
        return
    with open(real, "rb") as file:
        text = file.read()
    place = _place(text, path, kept)
    if os.path.exists(place):
        return
    temporary = f"{place}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(marshal.dumps(_compile(text, path)))
    os.chmod(temporary, 0o644)  # flows may run as another user; the directory says who may enter
    os.rename(temporary, place)

"""Run a function in a forked child, which may confine itself for ever, and get what it returns."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any


def forked(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a child process; an exception that it raises there is raised here."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                answer = (True, work())
            except BaseException as error:
                answer = (False, f"{error!r}\n{traceback.format_exc()}")
            os.write(write, pickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    assert data, "the child died without a word"
    done, value = pickle.loads(data)
    assert done, value
    return value


def refused(call: Callable[[], Any]) -> int | None:
    """The errno with which a call fails; None if it does not."""
    try:
        call()
    except OSError as error:
        return error.errno
    return None

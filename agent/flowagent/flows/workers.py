"""Threads that run tasks: started when needed, reused, and left behind when a task does not stop in time.

They are daemons, unlike those of ``concurrent.futures``: a task that hangs never keeps the process alive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Job:
    """One try of a task. ``work`` gets the job and returns what goes to the engine."""

    def __init__(self, work: Callable[[Job], Any], deadline: float | None = None) -> None:
        self._work = work
        self.deadline = deadline  # on the monotonic clock; None: it may take as long as it takes
        self.outcome: Any = None
        self._thread: int | None = None
        self._abandoned = False
        self._lock = threading.Lock()

    def execute(self) -> bool:
        """Run it in this thread; False: it was abandoned meanwhile, and its outcome is of no interest."""
        self._thread = threading.get_ident()
        outcome = self._work(self)
        with self._lock:
            if self._abandoned:
                return False
            self.outcome = outcome
            self._thread = None
            return True

    def is_abandoned(self) -> bool:
        return self._abandoned

    def end_deadline(self) -> bool:
        """Say that the part with a deadline is over; False: too late, the job has been abandoned."""
        with self._lock:
            self.deadline = None
            return not self._abandoned

    def abandon(self, error: type[BaseException], *, at: float | None = None) -> bool:
        """Give up on it and ask its thread to stop; False: it is over, or has no deadline before ``at``.

        The request is an exception raised in the thread as soon as it executes Python code again."""
        with self._lock:
            late = at is None or (self.deadline is not None and self.deadline <= at)
            if self._abandoned or self._thread is None or not late:
                return False
            self._abandoned = True
            _raise_in(self._thread, error)
            return True


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in another thread as soon as it executes Python code; None: take that back."""
    try:
        import ctypes
    except ImportError:  # a Python built without it; the thread ends when its task does
        return
    raised = ctypes.py_object() if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


class Workers:
    """The threads of one execution. Only its own thread may call these methods."""

    def __init__(self, finished: SimpleQueue[Job]) -> None:
        self._finished = finished
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads = 0
        self._busy = 0

    def submit(self, job: Job) -> None:
        """Run a job in a thread that is free, or in a new one. It comes back through ``finished``."""
        if self._busy == self._threads:
            threading.Thread(target=self._work, name="flowagent-task", daemon=True).start()
            self._threads += 1
        self._busy += 1
        self._jobs.put(job)

    def came_back(self) -> None:
        """A job arrived through ``finished``."""
        self._busy -= 1

    def abandoned(self) -> None:
        """A job was abandoned: its thread ends with it, and another takes its place."""
        self._busy -= 1
        self._threads -= 1

    def close(self) -> None:
        """Let the threads end when they have nothing to do."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def _work(self) -> None:
        try:
            while True:
                job = self._jobs.get()
                if job is None:
                    return
                if not job.execute():
                    break
                self._finished.put(job)
            # the request to stop may not have arrived yet: it must not hit the end of the thread
            _raise_in(threading.get_ident(), None)
        except BaseException:
            if job is None or not job.is_abandoned():
                raise

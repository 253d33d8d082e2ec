"""Logging: the logger for flows and tasks, prints as log records, and the log of a local run."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from flowagent.flows.context import context

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter

ROOT = "flowagent"


class TaskLogger(_Adapter):
    """A standard logger whose records carry ``task``, the slug of the task that they come from (or None)."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {"task": context.get("task_slug"), **(kwargs.get("extra") or {})}
        return msg, kwargs


def get_logger(name: str | None = None) -> TaskLogger:
    """The logger ``flowagent``, or ``flowagent.NAME``. Works everywhere; its records reach the run's log."""
    if not name or name == ROOT or name.startswith(f"{ROOT}."):
        return TaskLogger(logging.getLogger(name or ROOT), {})
    return TaskLogger(logging.getLogger(f"{ROOT}.{name}"), {})


# -- prints as log records -------------------------------------------------------------------------------


class _Lines:
    """Collects what one task prints and logs it by the line."""

    def __init__(self, logger: TaskLogger) -> None:
        self._logger = logger
        self._rest = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
        self._log(lines)

    def close(self) -> None:
        with self._lock:
            lines, self._rest = [self._rest] if self._rest else [], ""
        self._log(lines)

    def _log(self, lines: list[str]) -> None:
        token = _printing.set(None)  # a handler that prints must not come back here
        try:
            for line in lines:
                self._logger.info("%s", line)
        finally:
            _printing.reset(token)


_printing: ContextVar[_Lines | None] = ContextVar("flowagent_printing", default=None)


class _Stdout:
    """Stands in for ``sys.stdout``: writes of capturing tasks are logged, all others go where they went."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        lines = _printing.get()
        if lines is not None:
            lines.write(text)
        elif self._stream is not None:
            self._stream.write(text)
        return len(text)

    def writelines(self, texts: Any) -> None:
        for text in texts:
            self.write(text)

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_stdout_lock = threading.Lock()
_stdout_users = 0
_stdout: _Stdout | None = None


@contextmanager
def prints_logged() -> Iterator[None]:
    """Log what the current task prints, at INFO; other threads and tasks keep printing."""
    global _stdout, _stdout_users
    with _stdout_lock:
        _stdout_users += 1
        if _stdout is None or sys.stdout is not _stdout:
            _stdout = _Stdout(sys.stdout)
            sys.stdout = _stdout
    lines = _Lines(get_logger())
    token = _printing.set(lines)
    try:
        yield
    finally:
        _printing.reset(token)
        lines.close()
        with _stdout_lock:
            _stdout_users -= 1
            if _stdout_users == 0 and _stdout is not None and sys.stdout is _stdout:
                sys.stdout, _stdout = _stdout._stream, None


# -- the log of a local run ------------------------------------------------------------------------------


class LocalFormatter(logging.Formatter):
    """``[2026-01-31 12:00:00] INFO my-flow | load-1: message``, the task where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        task = getattr(record, "task", None)
        text = f"[{when}] {record.levelname} {context.get('flow_name', record.name)} | "
        text += f"{task}: {record.getMessage()}" if task else record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


class _LocalHandler(logging.StreamHandler):  # type: ignore[type-arg]  # not subscriptable before Python 3.11
    """Writes to whatever ``sys.stderr`` is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        if self.stream is not None:
            super().emit(record)


_local_lock = threading.Lock()
_local_users = 0
_local_handler: logging.Handler | None = None
_local_level = logging.NOTSET


@contextmanager
def local_log() -> Iterator[None]:
    """Show the records of flows on stderr, unless the application has configured logging itself."""
    global _local_handler, _local_level, _local_users
    logger = logging.getLogger(ROOT)
    with _local_lock:
        _local_users += 1
        if _local_handler is None and not logger.hasHandlers():
            _local_handler = _LocalHandler()
            _local_handler.setFormatter(LocalFormatter())
            _local_level = logger.level
            logger.addHandler(_local_handler)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        with _local_lock:
            _local_users -= 1
            if _local_users == 0 and _local_handler is not None:
                logger.removeHandler(_local_handler)
                logger.setLevel(_local_level)
                _local_handler = None

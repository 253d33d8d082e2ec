"""The daemon's own log: ``key=value`` on a terminal, fields in the journal, elsewhere JSON, a line each."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from flowagent.daemon import journal

# structlog looks for rich, to print tracebacks in colour, which takes longer than all of the rest: not here.
_hidden = "rich" not in sys.modules
if _hidden:
    sys.modules["rich"] = None  # type: ignore[assignment]
import structlog  # noqa: E402

if _hidden:
    del sys.modules["rich"]

Log = structlog.typing.FilteringBoundLogger


def make_log(format: str = "auto", level: str = "info", stream: TextIO | None = None) -> Log:
    """A logger that writes to standard error. ``format``: auto, console, journal or json."""
    out = stream or sys.stderr
    if format == "journal" or (format == "auto" and journal.is_behind(out)):
        return _wrapped(journal.Journal(out), [structlog.processors.format_exc_info, journal.render], level)
    console = format == "console" or (format == "auto" and out.isatty())
    renderer: structlog.typing.Processor
    if console:
        renderer = structlog.dev.ConsoleRenderer(colors=out.isatty(), pad_event_to=32)
    else:
        renderer = structlog.processors.JSONRenderer()
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=not console)
    return _wrapped(
        structlog.PrintLogger(out), [stamp, structlog.processors.format_exc_info, renderer], level
    )


def _wrapped(logger: object, processors: list[structlog.typing.Processor], level: str) -> Log:
    log: Log = structlog.wrap_logger(
        logger,
        processors=[structlog.processors.add_log_level, *processors],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        cache_logger_on_first_use=True,
    )
    return log

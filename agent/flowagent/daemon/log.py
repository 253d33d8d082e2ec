"""The daemon's own log: ``key=value`` on a terminal, one JSON object a line elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog

Log = structlog.typing.FilteringBoundLogger


def make_log(format: str = "auto", level: str = "info", stream: TextIO | None = None) -> Log:
    """A logger that writes to standard error. ``format``: auto, console or json."""
    out = stream or sys.stderr
    console = format == "console" or (format == "auto" and out.isatty())
    renderer: structlog.typing.Processor
    if console:
        renderer = structlog.dev.ConsoleRenderer(colors=out.isatty(), pad_event_to=32)
    else:
        renderer = structlog.processors.JSONRenderer()
    log: Log = structlog.wrap_logger(
        structlog.PrintLogger(out),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=not console),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        cache_logger_on_first_use=True,
    )
    return log

"""Values as people type them: pairs, times, durations, sizes. A wrong one is a usage error."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from datetime import datetime
from typing import Any

import click

_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhdw]))+")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def duration_of(text: str) -> float | None:
    """Seconds of ``90s``, ``1h30m``, ``7d`` or a bare number of seconds; None: it is not one."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if not _DURATION.fullmatch(text):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(text))


def duration(text: str) -> float:
    """Seconds, written with or without units."""
    seconds = duration_of(text)
    if seconds is None:
        raise click.BadParameter(f"{text!r} is not a duration like 90s, 1h30m or 7d")
    return seconds


def moment(text: str) -> float:
    """Seconds since the epoch, of an ISO 8601 time (without a zone: here) or ``+10m`` from now."""
    if text.startswith("+"):
        seconds = duration_of(text[1:])
        if seconds is not None:
            return time.time() + seconds
    else:
        with suppress(ValueError, OverflowError):
            return datetime.fromisoformat(text).timestamp()
    raise click.BadParameter(f"{text!r} is neither ISO 8601, like 2030-01-31T08:00, nor relative, like +10m")


def size(text: str) -> int:
    """Bytes, written with or without a unit; units are powers of 1024."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size like 500M or 2G")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


def pair(text: str) -> tuple[str, str]:
    """``KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise click.BadParameter(f"{text!r} is not of the form KEY=VALUE")
    return key, value


def json_pair(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``; the value is JSON if it parses as that, else the string itself."""
    key, value = pair(text)
    try:
        return key, json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return key, value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def read_parameters(file: Any) -> dict[str, Any]:
    """The object in a parameter file. :raises click.BadParameter: it holds something else."""
    try:
        data = json.load(file, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{file.name} is not JSON: {error}", param_hint="--param-file") from None
    if not isinstance(data, dict):
        raise click.BadParameter(
            f"{file.name} holds a JSON {type(data).__name__}; an object of parameters is expected",
            param_hint="--param-file",
        )
    return data

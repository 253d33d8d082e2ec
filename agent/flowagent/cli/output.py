"""How commands print: JSON for machines, tables for people, nothing that could steer a terminal."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import click

COLOURS = {
    "completed": "green",
    "failed": "red",
    "crashed": "red",
    "gone": "red",
    "cancelled": "yellow",
    "cancelling": "yellow",
    "skipped": "yellow",
    "running": "cyan",
    "retrying": "yellow",
    "pending": "cyan",
    "live": "green",
    "stopping": "yellow",
    "no room": "yellow",
}
"""Colours of words that stand alone in a cell."""

# C0 and C1 controls, and the characters that turn the direction of what follows
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control characters written out; line feeds and tabs stay."""
    return _STEERING.sub(lambda match: _written_out(match.group()), text)


def _written_out(character: str) -> str:
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return "^" + chr(code ^ 0x40)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def on_line(value: object) -> str:
    """A value as one line without control characters, for a cell."""
    return visible(" ".join(str(value).split())) if value is not None else ""


def on_terminal() -> bool:
    return sys.stdout.isatty()


def with_colour() -> bool:
    return on_terminal() and "NO_COLOR" not in os.environ


def print_json(value: Any) -> None:
    """One JSON document. Dataclasses are objects with the names of their fields."""
    click.echo(json.dumps(value, default=_plain, indent=2))


def print_json_line(value: Any) -> None:
    """One line of a stream of JSON documents, written out at once."""
    sys.stdout.write(json.dumps(value, default=_plain) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    import dataclasses

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return str(value)


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """Rows under headers; ``empty`` is said, on standard error, when there are none."""
    cells = [[on_line(cell) for cell in row] for row in rows]
    if not cells:
        click.echo(empty, err=True)
    elif on_terminal():
        _print_rich(headers, cells)
    else:
        table = [[header.upper() for header in headers], *cells]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            click.echo("  ".join(map(str.ljust, row, widths)).rstrip())


def _print_rich(headers: Sequence[str], cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        # what people copy from a table must be whole
        table.add_column(header, no_wrap=header in ("run", "state"), overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
    Console(highlight=False).print(table)


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Names and values, one a line, aligned; those without a value are left out."""
    given = [(name, text) for name, value in fields if (text := on_line(value))]
    width = max((len(name) for name, _ in given), default=0) + 2
    for name, text in given:
        coloured = click.style(text, fg=COLOURS[text]) if with_colour() and text in COLOURS else text
        click.echo(f"{name + ':':<{width}}{coloured}")


# -- values in words ----------------------------------------------------------------------------------


def moment(seconds: float | None) -> str:
    """A time of day and date, here."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    for unit, name, below, part in ((60, "min", 3600, "s"), (3600, "h", 86400, "min")):
        if seconds < below:
            small = int(seconds % unit) // (unit // 60)
            return f"{int(seconds // unit)} {name}" + (f" {small} {part}" if small else "")
    return f"{seconds / 86400:.3g} days"


def ago(seconds: float | None) -> str:
    if seconds is None:
        return ""
    passed = time.time() - seconds
    return "now" if passed < 1 else f"{duration(int(passed))} ago"


def size(count: int | None) -> str:
    if count is None:
        return ""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}" if amount < 1000 else f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.3g} TiB"


def signal_name(number: int | None) -> str:
    if number is None:
        return ""
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

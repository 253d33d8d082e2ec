"""Following a run: its output from the store, in order, across attempts, until it ends."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import click

from flowagent.cli import output
from flowagent.errors import StoreUnavailableError, UsageError
from flowagent.runtime.events import Event, Parser, Text

if TYPE_CHECKING:
    from flowagent.models import Run
    from flowagent.store.protocol import Store

POLL = 2.0
"""Seconds between looks at the store when no doorbell rings."""


class Sink(Protocol):
    """Where output goes: a stream of bytes per attempt."""

    def begin(self, attempt: int) -> None: ...

    def feed(self, data: bytes) -> None: ...

    def end(self) -> None: ...


async def follow(
    store: Store,
    run_id: str,
    sink: Sink,
    *,
    wait: bool,
    only: int | None = None,
    changed: Callable[[Run], None] | None = None,
) -> Run:
    """Give the output of a run, or of its attempt ``only``, to a sink; ``wait`` for what is still to come.

    ``changed`` is told the run whenever its state may have changed. The run as it was at the end.

    :raises UsageError: there is no such attempt."""
    from flowagent.store.protocol import progress

    position = _Position(only or 1)
    async with store.doorbell(progress(run_id)) if wait else nullcontext() as bell:
        while True:
            try:
                run = await store.run(run_id)
                if changed is not None:
                    changed(run)
                # The state was read first: whatever came before an end is in the store by now.
                await _catch_up(store, run, sink, position, only)
            except StoreUnavailableError as error:
                if bell is None:
                    raise
                click.echo(f"the store is away, trying again: {error}", err=True)
                await bell.wait(POLL)
                continue
            over = run.state.terminal or (only is not None and only < run.attempt)
            if over or bell is None:
                if position.begun:
                    sink.end()
                return run
            await bell.wait(POLL)


class _Position:
    """How far an output has been read."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.offset = 0
        self.begun = False


async def _catch_up(store: Store, run: Run, sink: Sink, position: _Position, only: int | None) -> None:
    if only is not None and only > run.attempt and run.state.terminal:
        raise UsageError(f"run {run.id} has no attempt {only}; it has {run.attempt}")
    while position.attempt <= run.attempt:
        if not position.begun:
            sink.begin(position.attempt)
            position.begun = True
        while chunks := await store.output(run.id, position.attempt, position.offset):
            for chunk in chunks:
                sink.feed(chunk.data)
                position.offset = chunk.stop
        if position.attempt == (only or run.attempt):
            return
        sink.end()
        position.attempt, position.offset, position.begun = position.attempt + 1, 0, False


# -- sinks ---------------------------------------------------------------------------------------------


class Raw:
    """The stream as the store has it."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    def begin(self, attempt: int) -> None: ...

    def feed(self, data: bytes) -> None:
        self._out.write(data)
        self._out.flush()

    def end(self) -> None: ...


class JsonLines:
    """One JSON object a line: texts, and events as they were written, each with its attempt."""

    def begin(self, attempt: int) -> None:
        self._attempt = attempt
        self._parser = Parser()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> None:
        for item in self._parser.feed(data):
            self._give(item)

    def end(self) -> None:
        for item in self._parser.close():
            self._give(item)

    def _give(self, item: Text | Event) -> None:
        if isinstance(item, Event):
            output.print_json_line({"attempt": self._attempt, **item.data})
        elif text := self._decoder.decode(item.data):
            output.print_json_line({"attempt": self._attempt, "event": "text", "text": text})


class Console:
    """For people: text as it is, log records as lines, states of tasks dimmed.

    On a terminal, nothing that a flow prints can steer it."""

    def __init__(self, out: BinaryIO | None = None, *, terminal: bool | None = None) -> None:
        self._out = out or sys.stdout.buffer
        self._terminal = output.on_terminal() if terminal is None else terminal
        self._colour = self._terminal and output.with_colour()
        self._attempt = 0
        self._at_line_start = True
        self._reset()

    def _reset(self) -> None:
        self._parser = Parser()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._return = ""  # a carriage return that may be half of a line's end

    def begin(self, attempt: int) -> None:
        if self._attempt:
            self._line(f"-- attempt {attempt} --", dim=True)
        self._attempt = attempt
        self._reset()

    def feed(self, data: bytes) -> None:
        for item in self._parser.feed(data):
            self._show(item)
        self._out.flush()

    def end(self) -> None:
        for item in self._parser.close():
            self._show(item)
        if self._terminal and not self._at_line_start:
            self._write(b"\n")
        self._out.flush()

    def _show(self, item: Text | Event) -> None:
        if isinstance(item, Text):
            self._write(self._harmless(item.data).encode() if self._terminal else item.data)
        elif item.data["event"] == "log":
            self._line(*_log_line(item.data))
        elif item.data["event"] == "task":
            self._line(_task_line(item.data), dim=True)

    def _harmless(self, data: bytes) -> str:
        text = self._return + self._decoder.decode(data)
        self._return = "\r" if text.endswith("\r") else ""
        text = text.removesuffix("\r").replace("\r\n", "\n")
        return output.visible(text.replace("\r", "\n"))  # progress bars draw over their line; here they queue

    def _line(self, text: str, colour: str | None = None, dim: bool = False) -> None:
        if not self._at_line_start:
            self._write(b"\n")
        if self._terminal:
            text = output.visible(text)
        if self._colour and (colour or dim):
            text = click.style(text, fg=colour, dim=dim or None)
        self._write(text.encode(errors="backslashreplace") + b"\n")

    def _write(self, data: bytes) -> None:
        if data:
            self._out.write(data)
            self._at_line_start = data.endswith(b"\n")


_LEVEL_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


def _log_line(event: dict[str, Any]) -> tuple[str, str | None]:
    level = str(event.get("level", "INFO"))
    origin = event.get("task") or event.get("logger") or ""
    text = f"{_time(event)} {level:<8}{f'{origin}: ' if origin else ''}{event.get('message', '')}"
    return text, _LEVEL_COLOURS.get(level)


def _task_line(event: dict[str, Any]) -> str:
    reason = event.get("reason")
    tries = event.get("tries")
    again = f" (try {tries})" if isinstance(tries, int) and tries > 1 else ""
    return (
        f"{_time(event)} {'task':<8}{event.get('task') or 'flow'}: "
        f"{event.get('state')}{again}{f': {reason}' if reason else ''}"
    )


def _time(event: dict[str, Any]) -> str:
    try:
        return output.moment(float(event["time"]))
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return output.moment(time.time())

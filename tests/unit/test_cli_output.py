"""What commands print: harmless to terminals, whole for machines."""

from __future__ import annotations

import io
import json

import pytest

from flowagent.cli import app, output
from flowagent.cli.following import Console, JsonLines, Raw
from flowagent.errors import FlowagentError, StoreError
from flowagent.runtime.events import encode

STREAM = (
    b"plain \xc3\xa9\n"
    + encode({"event": "log", "time": 0.0, "level": "WARNING", "task": "load-1", "message": "slow\x1b[2J"})
    + b"no end"
    + encode(
        {
            "event": "task",
            "time": 0.0,
            "task": "load-1",
            "state": "failed",
            "reason": "ValueError: x",
            "tries": 2,
        }
    )
    + encode({"event": "loaded", "flow": "f"})
    + b"evil \x1b]0;title\x07 \x9b2J \xc2\x9b2J\r\nbar 1\rbar 2\n\x1e{torn"
)


def test_fields_and_cells_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "ValueError: \x1b[31mred\x07 \x9b2J\n\u202e"
    output.print_fields([("reason", evil), ("none", None)])
    output.print_table(["reason"], [[evil]], empty="")
    harmless = "ValueError: ^[[31mred^G \\x9b2J \\u202e"
    assert capsys.readouterr().out == f"reason: {harmless}\nREASON\n{harmless}\n"


def _shown(stream: bytes, step: int, *, terminal: bool) -> str:
    out = io.BytesIO()
    console = Console(out, terminal=terminal)
    console.begin(1)
    for start in range(0, len(stream), step):
        console.feed(stream[start : start + step])
    console.end()
    return out.getvalue().decode("utf-8", "surrogateescape")


@pytest.mark.parametrize("terminal", [True, False])
def test_any_chunking_shows_the_same(terminal: bool) -> None:
    whole = _shown(STREAM, len(STREAM), terminal=terminal)
    assert all(_shown(STREAM, step, terminal=terminal) == whole for step in range(1, 12))


def test_logs_and_tasks_are_lines_between_text() -> None:
    lines = _shown(STREAM, 7, terminal=True).splitlines()
    assert lines[0] == "plain é"
    assert lines[1].endswith("WARNING load-1: slow^[[2J")
    assert lines[2] == "no end"
    assert lines[3].endswith("task    load-1: failed (try 2): ValueError: x")


def test_a_flow_cannot_steer_a_terminal() -> None:
    shown = _shown(STREAM, 5, terminal=True)
    assert not {
        character for character in shown if ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0
    } - {"\n"}
    assert "evil ^[]0;title^G \ufffd2J \\x9b2J\nbar 1\nbar 2\n" in shown
    assert output.on_line("a\nb\x1b[0m\u202e") == "a b^[[0m\\u202e"


def test_text_to_a_pipe_is_byte_for_byte() -> None:
    text = b"\x1b[1mbold\x1b[0m \xff\xfe\r\n"
    assert _shown(text, 3, terminal=False).encode("utf-8", "surrogateescape") == text
    out = io.BytesIO()
    raw = Raw(out)
    raw.begin(1)
    raw.feed(STREAM)
    raw.end()
    assert out.getvalue() == STREAM


def test_attempts_are_kept_apart() -> None:
    out = io.BytesIO()
    console = Console(out, terminal=False)
    for attempt in (1, 2):
        console.begin(attempt)
        console.feed(b"half")
        console.end()
    assert out.getvalue() == b"half\n-- attempt 2 --\nhalf"


def test_json_lines_lose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    sink = JsonLines()
    sink.begin(3)
    for start in range(0, len(STREAM), 4):
        sink.feed(STREAM[start : start + 4])
    sink.end()
    items = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(item["attempt"] == 3 for item in items)
    text = "".join(item["text"] for item in items if item["event"] == "text")
    assert text.startswith("plain é\nno end") and text.endswith("\x1e{torn")
    assert [item["event"] for item in items if item["event"] != "text"] == ["log", "task", "loaded"]


def test_a_table_without_a_terminal_is_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(["run", "flow"], [("1", "long name\nwith a break"), ("22", None)], empty="nothing")
    output.print_table(["run"], [], empty="nothing")
    captured = capsys.readouterr()
    assert captured.out == "RUN  FLOW\n1    long name with a break\n22\n"
    assert captured.err == "nothing\n"


def test_values_in_words() -> None:
    assert [output.duration(value) for value in (0.1234, 12.4, 61, 3600, 90000)] == [
        "0.123 s",
        "12 s",
        "1 min 1 s",
        "1 h",
        "1.04 days",
    ]
    assert [output.size(value) for value in (0, 1023, 1024, 1 << 30)] == ["0 B", "1023 B", "1 KiB", "1 GiB"]
    assert output.signal_name(9) == "SIGKILL"


def test_errors_are_one_line_unless_debugged(capsys: pytest.CaptureFixture[str]) -> None:
    assert app._report(FlowagentError("it failed; do this"), debug=False) == 1
    assert capsys.readouterr().err == "Error: it failed; do this\n"
    assert app._report(ExceptionGroup("tasks", [StoreError("away")]), debug=False) == 1
    assert capsys.readouterr().err == "Error: away\n"
    assert app._report(ValueError("two\nlines"), debug=False) == 70
    assert capsys.readouterr().err == (
        "Error: unexpected ValueError: two lines; run again with --debug to see where\n"
    )
    try:
        raise ValueError("seen")
    except ValueError as error:
        assert app._report(error, debug=True) == 70
    assert "Traceback" in capsys.readouterr().err

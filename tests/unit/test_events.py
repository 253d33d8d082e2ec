"""The framing of run output: whatever the cuts, nothing is lost and nothing is made up."""

import json
import os
import random

import pytest

from flowagent.runtime.events import MAX_EVENT, Emitter, Event, Parser, Text, encode


def parse(*pieces: bytes) -> list:
    parser = Parser()
    items = [item for piece in pieces for item in parser.feed(piece)]
    items += parser.close()
    merged: list = []
    for item in items:
        if isinstance(item, Text) and merged and isinstance(merged[-1], Text):
            merged[-1] = Text(merged[-1].data + item.data)
        else:
            merged.append(item)
    return merged


def test_text_and_events_are_told_apart_in_the_middle_of_a_line() -> None:
    event = {"event": "log", "message": "x"}
    assert parse(b"half a li" + encode(event) + b"ne\n") == [Text(b"half a li"), Event(event), Text(b"ne\n")]


def test_any_cut_gives_the_same() -> None:
    stream = b"one\n" + encode({"event": "a", "n": 1}) + encode({"event": "b"}) + b"two\x1enot json\nthree"
    whole = parse(stream)
    assert [type(item) for item in whole] == [Text, Event, Event, Text]
    generator = random.Random(7)
    for _ in range(300):
        cuts = sorted(generator.choices(range(len(stream) + 1), k=generator.randint(1, 8)))
        pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        assert parse(*pieces) == whole


@pytest.mark.parametrize(
    "broken",
    [
        b'\x1e{"event":"log"',  # the writer died
        b"\x1enonsense\n",
        b"\x1e[1]\n",  # not an object
        b'\x1e{"event":7}\n',  # no kind
        b"\x1e" + b"x" * (MAX_EVENT + 10) + b"\n",
    ],
)
def test_what_is_no_event_is_given_out_as_text(broken: bytes) -> None:
    assert b"".join(item.data for item in parse(b"a" + broken)) == b"a" + broken


def test_an_event_cut_off_by_the_next_one_does_not_swallow_it() -> None:
    assert parse(b'\x1e{"event":"lo' + encode({"event": "b"})) == [
        Text(b'\x1e{"event":"lo'),
        Event({"event": "b"}),
    ]


def test_memory_is_bounded_when_an_event_never_ends() -> None:
    parser = Parser()
    list(parser.feed(b"\x1e"))
    for _ in range(40):
        list(parser.feed(b"x" * (MAX_EVENT // 8)))
        assert len(parser._splitter._pending) <= MAX_EVENT + 1


def test_emitted_events_hold_no_frame_bytes_inside(tmp_path) -> None:
    path = tmp_path / "output"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    Emitter(fd).emit("log", message="a\nb\x1ec", odd={1, 2}.__class__)
    os.close(fd)
    data = path.read_bytes()
    assert data.count(b"\n") == 1 and data.count(b"\x1e") == 1
    assert json.loads(data[1:])["message"] == "a\nb\x1ec"

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from itertools import pairwise
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowagent import redaction
from flowagent.redaction import MASK, Redactor, needles

SECRET = 'p@ss "wörd"/\\x'


def whole(values: list[str], data: bytes) -> bytes:
    output, covered = Redactor(values).feed(data, final=True)
    assert covered == len(data)
    return output


def test_everything_else_is_left_as_it_is() -> None:
    assert whole([], b"abc") == b"abc"
    assert whole(["secret"], bytes(range(256))) == bytes(range(256))


@pytest.mark.parametrize(
    "form",
    [
        SECRET.encode(),
        base64.b64encode(SECRET.encode()),
        base64.urlsafe_b64encode(SECRET.encode()),
        quote(SECRET, safe="").encode(),
        json.dumps(SECRET)[1:-1].encode(),
        json.dumps(SECRET, ensure_ascii=False)[1:-1].encode(),
        repr(SECRET)[1:-1].encode(),
    ],
)
def test_encodings_of_a_value_are_masked(form: bytes) -> None:
    assert whole([SECRET], b"<" + form + b">") == b"<****>"


@pytest.mark.parametrize("before", [b"", b"u", b"us", b"usr"])
def test_base64_is_masked_wherever_the_value_begins_in_it(before: bytes) -> None:
    value = "correct-horse-battery"
    output = whole([value], base64.b64encode(before + value.encode() + b":and more"))
    assert MASK in output
    assert base64.b64encode(value.encode())[4:-4] not in output
    assert len(output) < 25  # a few characters on either side hold bits of the neighbours as well


def test_lines_of_a_value_are_masked_one_by_one_but_short_ones_are_not() -> None:
    key = '{\n  "private_key": "abcdef",\n}\n'
    assert whole([key], b'  "private_key": "abcdef",\n{ }') == b"  ****\n{ }"
    assert whole([key], key.encode()) == MASK
    assert whole(["one-line\n"], b"Bearer one-line;") == b"Bearer ****;"


def test_values_of_fewer_than_three_characters_are_not_looked_for() -> None:
    assert needles("ab") == needles("") == needles(" \n") == set()
    assert whole(["ab", "abc"], b"ab abc") == b"ab ****"


def test_overlapping_values_become_one_mask() -> None:
    assert whole(["abcd", "cdef", "efgh"], b"xabcdefghx") == b"x****x"
    assert whole(["abcd", "abcdefgh"], b"abcdefgh") == MASK
    assert whole(["aaa"], b"a" * 10) == MASK
    assert whole(["abc", "def"], b"abcdef") == MASK * 2


def test_only_what_may_become_a_secret_is_held_back() -> None:
    redactor = Redactor(["secret"])
    assert redactor.feed(b"hello sec") == (b"hello ", 6)
    assert redactor.feed(b"ond secre") == (b"second ", 7)
    assert redactor.feed(b"t") == (MASK, 6)
    assert redactor.feed(b"secr") == (b"", 0)
    assert redactor.feed(b"", final=True) == (b"secr", 4)


@settings(database=None, deadline=None)
@given(st.data())
def test_any_cuts_give_the_same_output(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.text("ab\n", min_size=3, max_size=8), min_size=1, max_size=3))
    stream = data.draw(st.text("ab\n", max_size=60)).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    edges = [0, *cuts, len(stream)]
    redactor = Redactor(values)
    pieces = [redactor.feed(stream[start:stop]) for start, stop in pairwise(edges)]
    pieces.append(redactor.feed(b"", final=True))
    assert sum(covered for _, covered in pieces) == len(stream)
    assert b"".join(output for output, _ in pieces) == whole(values, stream) == reference(values, stream)


@settings(database=None, deadline=None)
@given(st.data())
def test_a_new_redactor_goes_on_where_the_last_had_come_to(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.text("ab", min_size=3, max_size=8), min_size=1, max_size=3))
    stream = data.draw(st.text("ab", max_size=60)).encode()
    cut = data.draw(st.integers(0, len(stream)))
    output, covered = Redactor(values).feed(stream[:cut])
    assert output + whole(values, stream[covered:]) == whole(values, stream)


def test_endless_overlaps_do_not_grow_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "MOST_HELD", 100)
    redactor = Redactor(["aaaa"])
    pieces = [redactor.feed(b"a" * 30) for _ in range(50)]
    assert sum(covered for _, covered in pieces) > 1500 - 150
    assert b"".join(output for output, _ in pieces) + redactor.feed(b"!", final=True)[0] == b"****!"


def reference(values: list[str], stream: bytes) -> bytes:
    """The same by the slowest way: every occurrence of every needle, as a set of ranges."""
    found = sorted(
        (start, start + len(needle))
        for needle in {needle for value in values for needle in needles(value)}
        for start in range(len(stream))
        if stream.startswith(needle, start)
    )
    output, position = b"", 0
    for start, stop in found:
        if start >= position:
            output += stream[position:start] + MASK
        position = max(position, stop)
    return output + stream[position:]


def test_every_split_of_a_stream_with_bytes_that_are_not_text() -> None:
    noise = os.urandom(20)
    stream = noise + SECRET.encode() + noise
    for cut in range(len(stream) + 1):
        redactor = Redactor([SECRET])
        first, second = redactor.feed(stream[:cut]), redactor.feed(stream[cut:], final=True)
        assert first[0] + second[0] == noise + MASK + noise


def test_importing_it_brings_no_third_party_code() -> None:
    code = "import sys, flowagent.redaction; print('anyio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

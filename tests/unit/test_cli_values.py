"""Values as people type them."""

from __future__ import annotations

import io
import time

import click
import pytest

from flowagent.cli import values


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("90s", 90), ("1h30m", 5400), ("7d", 604800), ("1w", 604800), ("250ms", 0.25)],
)
def test_durations(text: str, seconds: float) -> None:
    assert values.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "h", "1x", "-1s", "1 h", "1h30", "inf", "nan", "1e3"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a duration"):
        values.duration(text)


def test_moments_are_relative_or_iso() -> None:
    assert values.moment("+10m") == pytest.approx(time.time() + 600, abs=2)
    assert values.moment("2030-01-31T08:00Z") == 1896076800
    assert values.moment("2030-01-31T10:00:00+02:00") == 1896076800
    here = time.mktime((2030, 1, 31, 8, 0, 0, 0, 0, -1))
    assert values.moment("2030-01-31T08:00") == here


@pytest.mark.parametrize("text", ["", "tomorrow", "+", "+x", "2030-13-01", "10:00pm"])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(click.BadParameter, match="neither ISO 8601"):
        values.moment(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("12", 12),
        ("1k", 1024),
        ("1.5K", 1536),
        ("2G", 2 << 30),
        ("2GiB", 2 << 30),
        ("3 MB", 3 << 20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert values.size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1GG"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size"):
        values.size(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x=1", 1),
        ("x=1.5", 1.5),
        ("x=true", True),
        ("x=null", None),
        ('x={"a": [1]}', {"a": [1]}),
        ('x="1"', "1"),
        ("x=hello", "hello"),
        ("x=a=b", "a=b"),
        ("x=", ""),
        ("x=NaN", "NaN"),  # not JSON, whatever Python's parser thinks
        ("x=" + "[" * 100_000, "[" * 100_000),
    ],
)
def test_parameters_are_json_if_they_parse(text: str, value: object) -> None:
    assert values.json_pair(text) == ("x", value)


@pytest.mark.parametrize("text", ["", "x", "=1"])
def test_what_is_no_pair(text: str) -> None:
    with pytest.raises(click.BadParameter, match="KEY=VALUE"):
        values.pair(text)


def _file(text: str) -> io.StringIO:
    file = io.StringIO(text)
    file.name = "p.json"
    return file


def test_a_parameter_file_holds_an_object() -> None:
    assert values.read_parameters(_file('{"x": [1, 2]}')) == {"x": [1, 2]}
    for text, complaint in [
        ("[1]", "holds a JSON list"),
        ("{", "is not JSON"),
        ('{"x": Infinity}', "is not JSON"),
    ]:
        with pytest.raises(click.BadParameter, match=complaint):
            values.read_parameters(_file(text))

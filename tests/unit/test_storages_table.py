"""The documentation's table of storages says what the backends say."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

import pytest
from tests.storages_table import DOCUMENT, written

from flowagent import results, storage
from flowagent.flows.declarations import Declaration


def test_the_table_is_up_to_date() -> None:
    text = DOCUMENT.read_text()
    assert text == written(text), "run: python -m tests.storages_table --write"


def test_every_storage_is_in_it() -> None:
    text = DOCUMENT.read_text()
    for name in set(storage.__all__) - {"Storage"}:
        assert f"| `{name}` |" in text and f"## {name}" in text.replace(
            "## Local and Module", "## Local\n## Module"
        )


OTHERWISE = {"reference", "boto3_kwargs", "args", "options", "unknown"}
"""Parameters that subclasses have under another name, or that are there for other code."""
ELSEWHERE = ("Docker", "Git", "Local", "Module")
"""Storages whose arguments stand on other pages."""


def arguments(kind: type[Declaration]) -> dict[str, Any]:
    """What a constructor takes, but for what all storages take; by its default."""
    found: dict[str, Any] = {}
    for base in kind.__mro__[
        : kind.__mro__.index(storage.Storage if "Result" not in kind.__name__ else Declaration)
    ]:
        constructor = vars(base).get("__init__")
        for parameter in list(inspect.signature(constructor).parameters.values())[1:] if constructor else ():
            found.setdefault(parameter.name, parameter.default)
    left_out = OTHERWISE | ({"storage"} if issubclass(kind, results.Result) else set())
    return {name: default for name, default in found.items() if name not in left_out}


@pytest.mark.parametrize(
    "kind",
    [getattr(storage, name) for name in storage.__all__ if name not in ("Storage", *ELSEWHERE)]
    + [getattr(results, name) for name in results.__all__ if re.fullmatch(r"\w+Result", name)],
)
def test_every_argument_is_documented_with_its_default(kind: type[Declaration]) -> None:
    (shown,) = re.findall(rf"`({kind.__name__}\([^`]*\))`(?::|\.|,| \|)", DOCUMENT.read_text())[:1]
    call = ast.parse(" ".join(shown.split()), mode="eval").body
    assert isinstance(call, ast.Call)
    expected = arguments(kind)
    required = [name for name, default in expected.items() if default is inspect.Parameter.empty]
    assert len(call.args) == len(required)
    defaults = {name: default for name, default in expected.items() if name not in required}
    assert {word.arg: ast.literal_eval(word.value) for word in call.keywords} == defaults

"""The documentation's table of storages says what the backends say."""

from __future__ import annotations

from tests.storages_table import DOCUMENT, written

from flowagent import storage


def test_the_table_is_up_to_date() -> None:
    text = DOCUMENT.read_text()
    assert text == written(text), "run: python -m tests.storages_table --write"


def test_every_storage_is_in_it() -> None:
    text = DOCUMENT.read_text()
    for name in set(storage.__all__) - {"Storage"}:
        assert f"| `{name}` |" in text and f"## {name}" in text.replace(
            "## Local and Module", "## Local\n## Module"
        )

from __future__ import annotations

import pytest

from flowagent.flows.names import slug


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My Flow", "my-flow"),
        ("  --ETL__daily (v2)! ", "etl-daily-v2"),
        ("Größe é", "groe-e"),
        ("2024-05-01T10:20:30.000001+00:00", "2024-05-01t10-20-30-000001-00-00"),
        ("../../etc/passwd", "etc-passwd"),
    ],
)
def test_slugs(text: str, expected: str) -> None:
    assert slug(text) == expected


def test_a_name_without_letters_or_too_long_gets_a_hash() -> None:
    assert slug("日本語") != slug("中文")
    assert slug("日本語").isalnum()
    assert len(slug("x" * 500)) <= 80
    assert slug("x" * 500) != slug("x" * 501)

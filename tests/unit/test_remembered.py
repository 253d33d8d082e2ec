from __future__ import annotations

from flowagent_backends.remembered import LONGEST, Remembered


def test_texts_by_key() -> None:
    kept = Remembered()
    assert kept.get("a") == ()
    kept.put(("a", {"b": None}), "tag", "sha")
    kept.put("a", "other")
    assert (kept.get(("a", {"b": None})), kept.get("a")) == (("tag", "sha"), ("other",))
    kept.put("a", "newer", "x")
    assert kept.get("a") == ("newer", "x")
    kept.forget("a")
    kept.forget("a")
    assert kept.get("a") == ()


def test_it_has_a_size() -> None:
    kept = Remembered(100_000)
    kept.put("first", "x")
    for number in range(10_000):
        kept.put(f"{'k' * 1000}{number}", "t" * (number % LONGEST), "sha")
        assert kept.get("first") == ("x",)  # what is asked for stays
        assert 0 < kept.bytes <= 100_000
    assert kept.get(f"{'k' * 1000}9999") and not kept.get(f"{'k' * 1000}1")
    kept.put("first", "x" * (LONGEST + 1))
    assert kept.get("first") == ()
    for number in range(10_000):
        kept.forget(f"{'k' * 1000}{number}")
    assert kept.bytes == 0

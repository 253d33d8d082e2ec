"""What flows reach, by probes that real flows of a real agent try: each level, each kind of agent.

Every probe says itself what is expected of it; one that reaches more fails here. The table in docs/security.md
is made of the same expectations::

    python tests/security/table.py --write
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.security import table
from tests.security.probes import BLOCKED, IDENTITIES, LEVELS, PROBES, VISIBLE
from tests.security.stage import Stage

for module in sorted((Path(__file__).parent / "probes").glob("[a-z]*.py")):
    importlib.import_module(f"tests.security.probes.{module.stem}")

STAGES = [(identity, level) for identity in IDENTITIES for level in LEVELS]


@pytest.mark.timeout(180)
def test_the_probes_can_do_what_they_try() -> None:
    """Without any sandbox, by root: what is told apart here are probes that fail everywhere."""
    stage = Stage("root", "process")
    try:
        stage.observe()
        found = stage.control()
    finally:
        stage.close()
    broken = {key: how for key, (reached, how) in found.items() if not reached}
    everywhere = {each.key for each in PROBES if each.everywhere and not each.outside}
    assert not {key: how for key, how in broken.items() if key in everywhere}


@pytest.fixture(scope="module", params=STAGES, ids="-".join)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    assert os.getuid() == 0, "the escape suite makes namespaces and users: run it as root"
    stage = Stage(*request.param)
    yield stage
    stage.close()


@pytest.mark.timeout(180)
def test_no_probe_reaches_more_than_is_expected(stage: Stage) -> None:
    found = stage.observe()
    assert set(found) == {each.key for each in PROBES}
    wrong = {}
    for each in PROBES:
        expected = each.verdict(stage.identity, stage.level)
        reached, how = found[each.key]
        absent = expected == VISIBLE and not each.everywhere  # not every machine has what it looks for
        if (reached != (expected != BLOCKED) and not (absent and not reached)) or how.startswith("broken"):
            wrong[each.key] = f"expected: {expected}; reached: {reached} {how}"
    assert not wrong, wrong


def test_there_are_enough_and_the_table_is_theirs() -> None:
    assert len(PROBES) >= 40
    assert table.current() == table.made(), "run: python tests/security/table.py --write"

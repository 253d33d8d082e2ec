"""Flows that try to escape, by a real agent at each level, as an ordinary user, as root and with --run-as.

What is probed, and what is expected of it, stands in ``probes/``; ``stage`` sets one agent up in a ``jail``,
with decoys and services around it, and nothing of the machine's own within reach. All probes of an agent are
a few runs. A probe that reaches more than is declared fails here, and so does one that reaches less: then
docs/security.md, which is generated from the declarations, would say something else than what is true.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from tests.security import table
from tests.security.probes import BLOCKED, IDENTITIES, LEVELS, PROBES
from tests.security.stage import Stage

STAGES = [(identity, level) for identity in IDENTITIES for level in LEVELS]
Seen = dict[str, tuple[bool, str]]
"""Probe -> was it reached, and what was met instead."""
Stages = dict[tuple[str, str], Future[tuple[Seen, Seen]]]


def _observe(identity: str, level: str) -> tuple[Seen, Seen]:
    """What the probes of a stage reached; and, of one of them, what they reach without any sandbox."""
    stage = Stage(identity, level)
    try:
        seen = stage.observe()
        return seen, stage.control() if (identity, level) == ("root", "process") else {}
    finally:
        stage.close()


@pytest.fixture(scope="module")
def stages() -> Iterator[Stages]:
    """All of them, two at a time."""
    assert os.geteuid() == 0, "tests/security makes users and namespaces; run it as root: sudo tests/run"
    for program, package in {"bwrap": "bubblewrap", "nsenter": "util-linux", "setpriv": "util-linux"}.items():
        assert shutil.which(program), f"{program} is missing: apt-get install {package}"
    with ThreadPoolExecutor(2) as pool:
        yield {stage: pool.submit(_observe, *stage) for stage in STAGES}
        pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("identity", "level"), STAGES)
def test_every_probe_ends_as_it_is_declared(identity: str, level: str, stages: Stages) -> None:
    seen, _ = stages[identity, level].result()
    _, control = stages["root", "process"].result()
    wrong = []
    for probe in PROBES:
        reached, how = seen.get(probe.key, (False, "broken: it was not tried"))
        verdict = probe.verdict(identity, level)
        absent = (
            not reached and probe.key in control and not control[probe.key][0]
        )  # this machine has no such thing
        if "broken" in how or ((verdict == BLOCKED) == reached and not (absent and verdict != BLOCKED)):
            wrong.append(f"{probe.key} ({probe.title}): {verdict} was declared, reached: {reached} {how}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(300)
def test_the_probes_can_do_what_they_try(stages: Stages) -> None:
    _, control = stages["root", "process"].result()
    tried = [probe for probe in PROBES if probe.everywhere and not probe.outside]
    assert {
        probe.key: control.get(probe.key) for probe in tried if not control.get(probe.key, (False,))[0]
    } == {}


def test_the_document_says_what_the_tests_see() -> None:
    text = table.DOCUMENT.read_text()
    assert table.rewritten(text) == text, "run: python -m tests.security.table --write"


def test_there_are_enough_of_them() -> None:
    assert len({probe.key for probe in PROBES}) == len(PROBES) >= 40

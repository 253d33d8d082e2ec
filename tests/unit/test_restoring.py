"""Which results a run takes over from the one that it repeats."""

from __future__ import annotations

from typing import Any

import pytest

from flowagent.daemon.restoring import choose
from flowagent.flows.inputs import digest
from flowagent.models import FlowSpec, TaskRun

KEPT = {"storage": "Local", "path": "/r"}
NONE = {"none": True}


def dag(**upstream: list[str]) -> FlowSpec:
    tasks = tuple({"slug": slug, "upstream": before} for slug, before in upstream.items())
    return FlowSpec("f", "dag", {}, {}, tasks=tasks)


def ended(**states: Any) -> dict[str, TaskRun]:
    """Task runs by slug: a reference is that of a completed task, a string another state. x_0 is x[0]."""
    found = {}
    for name, end in states.items():
        slug = name.replace("_", "[") + "]" if "_" in name else name
        state, result = (end, None) if isinstance(end, str) else ("completed", end)
        found[slug] = TaskRun("r", 1, slug, state, result=result)
    return found


CHAIN: dict[str, list[str]] = {"a": [], "b": ["a"], "c": ["b"]}


@pytest.mark.parametrize(
    ("graph", "ends", "expected"),
    [
        (CHAIN, {"a": KEPT, "b": KEPT, "c": "failed"}, {"a", "b"}),
        (CHAIN, {"a": KEPT, "b": NONE, "c": "failed"}, {"a", "b"}),
        (CHAIN, {"a": KEPT, "b": "failed", "c": "failed"}, {"a"}),
        # b was made from an a that is not there any more: another a may make another b
        (CHAIN, {"a": "completed", "b": KEPT, "c": "failed"}, set()),
        (CHAIN, {"a": {"error": "disk full"}, "b": KEPT, "c": "failed"}, set()),
        (CHAIN, {"a": KEPT, "b": "running"}, {"a"}),
        (CHAIN, {}, set()),
        # a skipped task is decided anew, and as it was
        (CHAIN, {"a": KEPT, "b": "skipped", "c": KEPT}, {"a", "c"}),
        # the children of a mapped task, one by one; what uses them all only if all are there
        (
            CHAIN,
            {"a": KEPT, "b": "completed", "b_0": KEPT, "b_1": NONE, "c": KEPT},
            {"a", "b[0]", "b[1]", "c"},
        ),
        (CHAIN, {"a": KEPT, "b": "failed", "b_0": KEPT, "b_1": "failed", "c": KEPT}, {"a", "b[0]"}),
        (CHAIN, {"a": KEPT, "b": "completed", "b_0": KEPT, "b_1": "completed", "c": KEPT}, {"a", "b[0]"}),
        (CHAIN, {"a": "failed", "b": "completed", "b_0": KEPT}, set()),
        ({"a": [], "other": [], "c": ["a", "other"]}, {"a": KEPT, "other": "failed", "c": KEPT}, {"a"}),
        # what the registration knows nothing of
        (CHAIN, {"a": KEPT, "new": KEPT, "": KEPT}, {"a"}),
    ],
)
def test_in_a_graph(graph: dict[str, list[str]], ends: dict[str, Any], expected: set[str]) -> None:
    assert set(choose(dag(**graph), ended(**ends), ())) == expected


def test_what_was_lost_takes_along_what_depends_on_it() -> None:
    tasks = ended(a=KEPT, b=KEPT, c=KEPT)
    assert set(choose(dag(**CHAIN), tasks, {"b"})) == {"a"}


def test_in_a_function_only_what_can_be_known_again() -> None:
    spec = FlowSpec("f", "function", {}, {})
    tasks = ended(a={**KEPT, "inputs": "1"}, b=KEPT, c={**NONE, "inputs": "2"}, d="failed")
    assert set(choose(spec, tasks, ())) == {"a", "c"}
    assert set(choose(spec, tasks, {"a"})) == {"c"}


def test_the_digest_of_arguments() -> None:
    assert digest({"x": [1, "a"]}) == digest({"x": [1, "a"]}) != digest({"x": [2, "a"]})
    assert digest({"x": lambda: 1}) is None

from __future__ import annotations

import pytest

from flowagent.errors import UsageError
from flowagent.labels import common_runners, mismatch, parse, serves


def test_labels_may_be_repeated_or_separated_by_commas() -> None:
    assert parse(["host1,gpu", " gpu ", "a b".replace(" ", "-")]) == ("a-b", "gpu", "host1")
    assert parse("x,y") == ("x", "y")
    assert parse([]) == ()


@pytest.mark.parametrize("bad", ["", " ", "a,", "a b", "a\tb", "a\x00b", "a\x1b[31m", "x" * 201])
def test_what_is_no_label_is_an_error_of_one_line(bad: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([bad])
    assert "label" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("agent", "required", "runner", "labels", "runners", "reason"),
    [
        ({"a", "b"}, False, "process", {"a"}, (), None),
        ((), False, "process", (), (), None),
        ((), False, "docker", (), ("docker", "kubernetes"), None),
        (("a",), False, "process", ("a", "host2"), (), "lacks label host2"),
        ((), False, "process", ("y", "x"), (), "lacks labels x, y"),
        (("a",), True, "process", (), (), "was started with --require-labels and the run has none"),
        (("a",), True, "process", ("a",), (), None),
        ((), False, "process", (), ("docker",), "runs process flows only; the run needs docker"),
    ],
)
def test_who_may_take_what(
    agent: set[str],
    required: bool,
    runner: str,
    labels: set[str],
    runners: tuple[str, ...],
    reason: str | None,
) -> None:
    assert mismatch(agent, required, runner, labels, runners) == reason
    assert serves(agent, required, runner, labels, runners) == (reason is None)


def test_all_reasons_are_given() -> None:
    assert mismatch((), True, "process", ("b",), ("docker",)) == (
        "lacks label b; runs process flows only; the run needs docker"
    )


@pytest.mark.parametrize(
    ("of_config", "of_storage", "common"),
    [
        ([], [], ()),
        (["process"], [], ("process",)),
        ([], ["docker", "kubernetes"], ("docker", "kubernetes")),
        (["docker"], ["docker", "kubernetes"], ("docker",)),
    ],
)
def test_runners_are_those_of_run_config_and_storage(
    of_config: list[str], of_storage: list[str], common: tuple[str, ...]
) -> None:
    assert common_runners(of_config, of_storage) == common


def test_a_flow_that_no_runner_can_execute_is_refused() -> None:
    with pytest.raises(
        UsageError, match="for runner process, and its storage for runner docker or kubernetes"
    ):
        common_runners(["process"], ["docker", "kubernetes"])

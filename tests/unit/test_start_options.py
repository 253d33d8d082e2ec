"""Options of ``start`` that only some runners go by."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowagent.cli.app import run as main
from flowagent.cli.start import RUNNERS_OF, start
from flowagent.daemon.service import Service
from flowagent.settings import Settings


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Settings]:
    """The settings of agents that were started, none of which does anything."""
    settings: list[Settings] = []

    async def nothing(service: Service) -> int:
        settings.append(service._settings)
        return 0

    monkeypatch.setattr(Service, "run", nothing)
    monkeypatch.setenv("FLOWAGENT_HOME", str(tmp_path))
    return settings


@pytest.mark.parametrize(
    ("command", "option", "belongs"),
    [
        ("start", "--network none", "docker"),
        ("start", "--volume /a:/b", "docker"),
        ("start", "--no-pull", "docker"),
        ("start", "--base-url unix:///x", "docker"),
        ("start", "--image python:3.12", "docker or kubernetes"),
        ("start", "--keep failed", "docker or kubernetes"),
        ("start", "--namespace flows", "kubernetes"),
        ("start --runner docker", "--namespace flows", "kubernetes"),
        ("start --runner docker", "--start-timeout 5m", "kubernetes"),
        ("start --runner docker", "--sandbox landlock", "process"),
        ("start --runner docker", "--preload numpy", "process"),
        ("docker start", "--context here", "kubernetes"),
        ("start --runner kubernetes", "--network none", "docker"),
        ("start --runner kubernetes", "--run-as nobody", "process"),
        ("start --runner kubernetes", "--allow-read /x", "process or docker"),
        ("kubernetes start", "--volume /a:/b", "docker"),
    ],
)
def test_an_option_of_another_runner_is_refused(
    started: list[Settings], capsys: pytest.CaptureFixture[str], command: str, option: str, belongs: str
) -> None:
    assert main([*command.split(), *option.split()]) == 2
    said = capsys.readouterr().err
    assert f"is for the runner {belongs}, and this agent's is" in said and said.count("\n") == 1
    assert started == []


@pytest.mark.parametrize(
    "command",
    [
        "start --sandbox auto --allow-read /x --allow-write /y",
        "start --runner docker --network none --allow-read /x --allow-write /y --image x --keep failed",
        "docker start --network none --volume /a:/b",
        "kubernetes start --namespace flows --image x --allow-write /y",
    ],
)
def test_those_of_its_own_are_taken(started: list[Settings], command: str) -> None:
    assert main(command.split()) == 0
    assert len(started) == 1


@pytest.mark.parametrize(
    ("runner", "options"),
    [
        ("docker", "-l x --network none --network b --no-pull --max memory=1G --env A=b --keep failed"),
        ("kubernetes", "--name n --namespace flows --image x --image-pull-secret s --start-timeout 1m"),
    ],
)
def test_a_runners_own_command_is_another_name(started: list[Settings], runner: str, options: str) -> None:
    assert main([runner, "start", *options.split()]) == 0
    assert main(["start", "--runner", runner, *options.split()]) == 0
    one, other = started
    assert one == other and one.runner == runner


def test_the_runner_counts_wherever_it_was_set(
    started: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text('[agent]\nrunner = "docker"\nnamespace = "flows"\n')
    assert main(["start", "--network", "none"]) == 0
    monkeypatch.setenv("FLOWAGENT_RUNNER", "process")
    assert main(["start", "--network", "none"]) == 2
    assert main(["start"]) == 0  # a file may serve agents of several runners
    assert [each.runner for each in started] == ["docker", "process"]


def test_the_table_names_options_that_there_are() -> None:
    assert set(RUNNERS_OF) <= {option.name for option in start.params}

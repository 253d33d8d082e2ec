"""The compose file: which agents it starts."""

from __future__ import annotations

from pathlib import Path

import yaml

FILE = Path(__file__).parents[2] / "docker/compose.yaml"


def test_one_agent_is_started_unless_the_other_is_named() -> None:
    services = yaml.safe_load(FILE.read_text())["services"]
    assert [name for name, each in services.items() if not each.get("profiles")] == ["agent"]
    for name, each in services.items():
        assert ("docker" in each["command"]) == (name == "docker-agent")
        assert any("docker.sock" in volume for volume in each["volumes"]) == (name == "docker-agent")


def test_agents_keep_their_names_and_do_not_share_one() -> None:
    # an agent without --name is named after its host
    names = [each.get("hostname") for each in yaml.safe_load(FILE.read_text())["services"].values()]
    assert all(names) and len(set(names)) == len(names)

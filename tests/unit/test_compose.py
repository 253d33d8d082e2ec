"""The compose file: what each of its profiles starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

FILE = Path(__file__).parents[2] / "docker/compose.yaml"


def started(profile: str | None) -> list[dict[str, Any]]:
    """The services of a profile, and those that are in none: they are always started."""
    services = yaml.safe_load(FILE.read_text())["services"].values()
    return [each for each in services if not each.get("profiles") or profile in each["profiles"]]


@pytest.mark.parametrize("profile", ["process", "docker"])
def test_a_profile_starts_one_agent(profile: str) -> None:
    (agent,) = started(profile)
    assert ("docker" in agent["command"]) == (profile == "docker")
    assert any("docker.sock" in volume for volume in agent["volumes"]) == (profile == "docker")


def test_agents_keep_their_names_and_do_not_share_one() -> None:
    # an agent without --name is named after its host
    names = [each.get("hostname") for profile in ("process", "docker") for each in started(profile)]
    assert all(names) and len(set(names)) == len(names)

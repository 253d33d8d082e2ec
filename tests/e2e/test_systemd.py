"""The unit is one that systemd accepts, and fits the agent's settings."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from flowagent.settings import Settings

UNIT = Path(__file__).parents[2] / "systemd" / "flowagent.service"
PROGRAM = "/opt/flowagent/bin/flowagent"


def verify(unit: Path) -> str:
    """What systemd-analyze has to say against a unit."""
    program = shutil.which("systemd-analyze")
    assert program, "systemd-analyze is missing; tests/run installs it"
    done = subprocess.run(
        [program, "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "flowagent.service"
    text = UNIT.read_text()
    assert text.count(PROGRAM) == 1
    unit.write_text(text.replace(PROGRAM, "/bin/true"))  # verify wants a program that is installed
    assert verify(unit) == ""

    unit.write_text(unit.read_text().replace("KillMode=process", "KillMode=procss"))
    assert "procss" in verify(unit)


def test_the_agent_has_time_to_drain(tmp_path: Path) -> None:
    (timeout,) = [
        float(line.partition("=")[2])
        for line in UNIT.read_text().splitlines()
        if line.startswith("TimeoutStopSec=")
    ]
    settings = Settings(tmp_path, "")
    assert timeout > settings.drain + settings.grace

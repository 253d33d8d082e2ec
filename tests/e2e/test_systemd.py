"""The units are such that systemd accepts, and fit the agent's settings and each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.e2e.harness import Site

from flowagent.settings import Settings

UNITS = Path(__file__).parents[2] / "systemd"
UNIT = UNITS / "flowagent.service"
DOCUMENT = UNITS.parent / "docs" / "systemd.md"
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


@pytest.mark.parametrize("name", ["flowagent.service", "flowagent@.service", "user/flowagent.service"])
def test_systemd_accepts_the_unit(tmp_path: Path, name: str) -> None:
    unit = tmp_path / Path(name).name
    text = (UNITS / name).read_text()
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


def test_the_template_is_the_unit_but_for_its_name() -> None:
    def directives(path: Path) -> set[str]:
        return {line for line in path.read_text().splitlines() if line and not line.startswith("#")}

    one, many = directives(UNIT), directives(UNITS / "flowagent@.service")
    assert all("%i" in line for line in many - one)
    assert len(one - many) == 3 and len(many - one) == 4


def test_the_exposure_is_what_the_documentation_says(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text())
    arguments = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    printed = subprocess.run(arguments, capture_output=True, text=True, timeout=60).stdout
    exposure = re.search(r"exposure level for \S+: (\S+)", printed)
    documented = re.search(r"exposure level of (\d\.\d)", DOCUMENT.read_text())
    assert exposure and documented, printed[-300:]
    assert abs(float(exposure[1]) - float(documented[1])) <= 0.3  # versions of systemd differ a little
    relaxed = set(re.findall(r"^✗ ([A-Za-z]+)=", printed, re.MULTILINE))
    table = DOCUMENT.read_text().partition("## Hardening")[2]
    missing = {name for name in relaxed if f"`{name}" not in table}
    assert not missing, f"docs/systemd.md says nothing of {missing}"


def test_a_user_installs_a_unit_of_their_own(site: Site, tmp_path: Path) -> None:
    site.environment["XDG_CONFIG_HOME"] = str(tmp_path / "config")
    printed = site.command("systemd", "install", "--user", "-l", "a,b").stdout
    unit = tmp_path / "config/systemd/user/flowagent.service"
    assert f"wrote {unit}\n" in printed and "systemctl --user enable --now flowagent" in printed
    (program,) = re.findall(r"^ExecStart=(\S+) start$", unit.read_text(), re.MULTILINE)
    assert Path(program).name == "flowagent" and verify(unit) == ""
    assert (site.home / "config.toml").read_text() == '[agent]\nlabels = ["a", "b"]\n'
    assert (
        f'Environment="FLOWAGENT_HOME={site.home}"\n' in unit.read_text()
    )  # not where units look by default
    assert "kept " in site.command("systemd", "install", "--user", "-l", "c").stdout
    odd = tmp_path / '100% of"it.toml'
    odd.touch()
    site.command("--config", odd, "systemd", "install", "--user")
    assert f'Environment="FLOWAGENT_CONFIG={tmp_path}/100%% of\\"it.toml"\n' in unit.read_text()
    assert verify(unit) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--user", "--name", "x"], "leave out --name"),
        (["--name", "../x"], "cannot be an agent's name"),
        (["--user", "-l", "a b"], "has white space"),
    ],
)
def test_what_cannot_be_installed(site: Site, arguments: list[str], message: str) -> None:
    assert message in site.command("systemd", "install", *arguments, code=1).stderr

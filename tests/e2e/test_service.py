"""The unit of ``flowagent systemd install``, under a real systemd: from its installation to its end."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.e2e.nspawn import PROGRAM, Machine

FLOW = """
import pathlib, time
from flowagent import context, flow
from flowagent.run_configs import LocalRun

@flow(run_config=LocalRun(sandbox="namespace"))
def apart():
    print("apart")

@flow
def grouped():
    print(pathlib.Path("/proc/self/cgroup").read_text())

@flow(secrets=["API_TOKEN"])
def job(flag: str = ""):
    print("token", context.secrets["API_TOKEN"][::-1], flush=True)
    while flag and not pathlib.Path(flag).exists():
        time.sleep(0.02)
"""
UNIT = "flowagent"
AS_USER = (
    "setpriv --reuid flowagent --regid flowagent --init-groups env FLOWAGENT_HOME=/var/lib/flowagent"
    f" FLOWAGENT_CACHE=/var/cache/flowagent {PROGRAM}"
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    directory = tmp_path_factory.mktemp("systemd")
    machine = Machine(directory)
    try:
        yield machine
    finally:
        machine.close()


def shown(machine: Machine, name: str) -> str:
    return machine.run(f"systemctl show -p {name} --value {UNIT}").strip()


def submit(machine: Machine, *options: str) -> str:
    return str(json.loads(machine.run(f"{AS_USER} run job --json {' '.join(options)}"))["id"])


def wait(machine: Machine, run: str, state: str) -> dict[str, object]:
    shown = f"{AS_USER} show {run} --json"
    return dict(json.loads(machine.until(shown, f'"state": "{state}"')))


def install_writes_units_that_systemd_accepts(machine: Machine) -> None:
    printed = machine.run(f"{PROGRAM} systemd install --labels gpu")
    steps = printed.partition("next:\n")[2].splitlines()
    for step in steps[:3]:
        machine.run(step)
    for unit in ("flowagent.service", "flowagent@.service"):
        assert machine.run(f"systemd-analyze verify --man=no /etc/systemd/system/{unit}") == ""
    assert machine.run("stat -c '%a %U:%G' /etc/flowagent/config.toml /etc/flowagent/secrets").split(
        "\n"
    ) == [
        "640 root:flowagent",
        "700 root:root",
        "",
    ]
    again = machine.run(f"{PROGRAM} systemd install --labels other")
    assert 'kept /etc/flowagent/config.toml: set there labels = ["other"], below [agent]' in again


def start_is_over_when_the_agent_takes_runs(machine: Machine) -> None:
    machine.run(
        "printf s3cret-value > /etc/flowagent/secrets/API_TOKEN; chmod 600 /etc/flowagent/secrets/API_TOKEN"
    )
    drop_in = "[Service]\\nWatchdogSec=3\\nEnvironment=FLOWAGENT_GRACE=1\\n"
    machine.run(
        f"mkdir -p /run/systemd/system/{UNIT}.service.d;"
        f"printf '{drop_in}' > /run/systemd/system/{UNIT}.service.d/test.conf; systemctl daemon-reload"
    )
    machine.run(f"systemctl start {UNIT}")
    assert shown(machine, "StatusText").startswith("idle, 0 of ")
    assert machine.run(f"{AS_USER} agents").count("gpu") == 1
    assert (
        machine.run("stat -c '%a %U' /var/lib/flowagent /var/cache/flowagent").split()
        == ["700", "flowagent"] * 2
    )


def credentials_are_delivered(machine: Machine) -> None:
    machine.run(f"mkdir /srv/flows && cat > /srv/flows/job.py <<'END'\n{FLOW}\nEND")
    machine.run(f"{AS_USER} register /srv/flows/job.py")
    run = submit(machine)
    wait(machine, run, "completed")
    assert "token eulav-terc3s" in machine.run(f"{AS_USER} logs {run}")
    everywhere = machine.run("grep -rl s3cret-value /var/lib/flowagent /var/cache/flowagent", code=1)
    assert everywhere == ""


def the_unit_leaves_the_sandbox_alone(machine: Machine) -> None:
    journal = machine.run(f"journalctl --no-pager -u {UNIT}")
    assert "sandbox=landlock" in journal
    gaps = [line for line in journal.splitlines() if "the sandbox has a gap" in line]
    assert all("control group" in line for line in gaps), gaps  # those of the container are read-only
    assert "apart completed" in machine.run(f"{AS_USER} run apart --watch")


def each_run_has_a_control_group(machine: Machine) -> None:
    printed = machine.run(f"{AS_USER} run grouped --watch")
    groups = [line.partition("::")[2] for line in printed.splitlines() if "0::" in line]
    assert len(groups) == 1 and f"/{UNIT}.service/flowagent-" in groups[0], printed


def the_journal_has_fields(machine: Machine) -> None:
    run = submit(machine)
    wait(machine, run, "completed")
    query = f"journalctl --no-pager -o json FLOWAGENT_RUN_ID={run}"
    lines = machine.until(query, '"FLOWAGENT_EVENT":"completed"').splitlines()
    entry = json.loads(lines[-1])
    assert (entry["_SYSTEMD_UNIT"], entry["FLOWAGENT_FLOW"], entry["PRIORITY"]) == (
        f"{UNIT}.service",
        "job",
        "6",
    )
    assert entry["MESSAGE"].startswith("completed ")


def reload_reads_the_configuration_or_refuses_it(machine: Machine) -> None:
    machine.run("printf '[agent]\\nlabels = [\"tpu\"]\\nlimit = 7\\n' > /etc/flowagent/config.toml")
    before = shown(machine, "MainPID")
    machine.run(f"systemctl reload {UNIT}")
    machine.until(f"systemctl show -p StatusText {UNIT}", "0 of 7 runs")
    machine.until(f"{AS_USER} agents", "tpu")
    machine.run("echo 'lables = 1' >> /etc/flowagent/config.toml")
    machine.run(f"systemctl reload {UNIT}", code=None)
    status = machine.until(f"systemctl show -p StatusText {UNIT}", "not reloaded")
    assert "key agent.lables is unknown; did you mean agent.labels?" in status
    assert shown(machine, "ActiveState") == "active" and shown(machine, "MainPID") == before
    machine.run("sed -i '$d' /etc/flowagent/config.toml")


def a_crash_of_the_agent_is_no_matter_to_a_live_run(machine: Machine) -> None:
    run = submit(machine, "-p flag=/srv/flows/go-1")
    wait(machine, run, "running")
    before = shown(machine, "MainPID")
    machine.run(f"kill -KILL {before}")
    machine.until(f"systemctl show -p NRestarts {UNIT}", "NRestarts=1")
    machine.until(f"systemctl is-active {UNIT}", "active")
    machine.until(f"journalctl --no-pager -u {UNIT} FLOWAGENT_RUN_ID={run}", "found a live attempt")
    assert shown(machine, "MainPID") != before
    machine.run("touch /srv/flows/go-1")
    found = wait(machine, run, "completed")
    assert len(found["attempts"]) == 1  # type: ignore[arg-type]


def an_upgrade_leaves_runs_alone(machine: Machine) -> None:
    run = submit(machine, "-p flag=/srv/flows/go-upgrade")
    wait(machine, run, "running")
    before = shown(machine, "MainPID")
    machine.run(f"systemctl kill --kill-whom=main -s QUIT {UNIT}")
    machine.until(f"systemctl show -p NRestarts {UNIT}", "NRestarts=2")
    machine.until(f"systemctl is-active {UNIT}", "active")
    assert shown(machine, "MainPID") != before
    assert "status=75/" in machine.run(f"journalctl --no-pager -u {UNIT}")
    machine.run("touch /srv/flows/go-upgrade")
    assert len(wait(machine, run, "completed")["attempts"]) == 1  # type: ignore[arg-type]


def the_watchdog_kills_an_agent_that_hangs(machine: Machine) -> None:
    run = submit(machine, "-p flag=/srv/flows/go-2")
    wait(machine, run, "running")
    machine.run(f"kill -STOP {shown(machine, 'MainPID')}")
    machine.until(f"systemctl show -p NRestarts {UNIT}", "NRestarts=3")
    assert "Watchdog timeout" in machine.run(f"journalctl --no-pager -u {UNIT}")
    machine.until(f"systemctl is-active {UNIT}", "active")
    machine.run("touch /srv/flows/go-2")
    assert len(wait(machine, run, "completed")["attempts"]) == 1  # type: ignore[arg-type]


def stop_drains(machine: Machine) -> None:
    run = submit(machine, "-p flag=/srv/flows/go-3")
    wait(machine, run, "running")
    machine.run(f"systemctl stop --no-block {UNIT}")
    machine.until(f"systemctl show -p StatusText {UNIT}", "draining, 1 of 7 runs")
    late = submit(machine)
    machine.run("touch /srv/flows/go-3")
    machine.until(f"systemctl is-active {UNIT}", "inactive")
    wait(machine, run, "completed")
    wait(machine, late, "scheduled")
    assert shown(machine, "Result") == "success"
    assert machine.run("pgrep -u flowagent", code=1) == ""


def several_agents_by_the_template(machine: Machine) -> None:
    machine.run(
        f"{PROGRAM} systemd install --name blue --labels blue; systemd-tmpfiles --create flowagent.conf"
    )
    machine.run("systemctl daemon-reload; systemctl start flowagent@blue")
    assert "blue" in machine.run(f"{AS_USER} agents")
    machine.run("systemctl stop flowagent@blue")


@pytest.mark.timeout(400)
def test_the_unit_does_what_operators_expect(machine: Machine) -> None:
    for step in STEPS:
        step(machine)


STEPS = (
    install_writes_units_that_systemd_accepts,
    start_is_over_when_the_agent_takes_runs,
    credentials_are_delivered,
    the_unit_leaves_the_sandbox_alone,
    each_run_has_a_control_group,
    the_journal_has_fields,
    reload_reads_the_configuration_or_refuses_it,
    a_crash_of_the_agent_is_no_matter_to_a_live_run,
    an_upgrade_leaves_runs_alone,
    the_watchdog_kills_an_agent_that_hangs,
    stop_drains,
    several_agents_by_the_template,
)

"""What an agent is started with: the engine over TLS, networks, limits, what flows may set themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.containers.conftest import start
from tests.containers.machinery import Engine, certify
from tests.containers.test_runs import register, text
from tests.e2e.harness import Site, until

from flowagent.docker import Engine as Client
from flowagent.docker import EngineError
from flowagent.runners.docker.containers import SUPERVISION

CAP_NET_RAW = 13


def secure(engine: Engine) -> dict[str, str]:
    return {"DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(engine.certificates)}


def test_an_engine_by_way_of_tls(site: Site, engine: Engine) -> None:
    del site.environment["DOCKER_HOST"]
    site.environment |= secure(engine)
    start(site, "--base-url", engine.secure_url)
    register(site, "far", "print('ready', flush=True); time.sleep(60)")
    run = site.submit("far")
    until(lambda: text(site, run) == "ready\n")
    site.command("cancel", run)
    assert site.wait_for(run)["state"] == "cancelled"
    until(lambda: engine.containers() == [])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"DOCKER_TLS_VERIFY": ""}, "to an HTTPS server; set DOCKER_TLS_VERIFY and DOCKER_CERT_PATH"),
        ({"DOCKER_CERT_PATH": "another"}, "certificate verify failed"),
        ({"DOCKER_CERT_PATH": "stranger"}, "alert"),
    ],
    ids=["good", "none", "of another authority", "with a stranger's key"],
)
async def test_certificates(
    engine: Engine, tmp_path: Path, changed: dict[str, str], words: str | None
) -> None:
    for name in ("another", "stranger"):
        certify(tmp_path / name)
    shutil.copy(engine.certificates / "ca.pem", tmp_path / "stranger")
    environ = {"DOCKER_HOST": engine.secure_url, **secure(engine), **changed}
    environ["DOCKER_CERT_PATH"] = str(tmp_path / environ["DOCKER_CERT_PATH"])
    client = Client(None, environ)
    try:
        if words is None:
            assert (await client.call("GET", "/info"))["DockerRootDir"] == str(engine.root / "data")
            return
        with pytest.raises(EngineError, match=words) as caught:
            await client.call("GET", "/info")
        said = str(caught.value)
        certificates = f"; are the certificates in {environ['DOCKER_CERT_PATH']} for it?"
        assert said.endswith(certificates) == ("DOCKER_CERT_PATH" in changed) and "\n" not in said
    finally:
        await client.close()


@pytest.fixture
def networks(engine: Engine) -> Iterator[tuple[str, str]]:
    """Two networks; they are this machine's, too, and do not end with the engine."""
    names = ("inner", "outer")
    try:
        for name in names:
            engine.docker("network", "create", "--internal", name)
        yield names
    finally:
        for name in names:
            engine.docker("network", "rm", name)


def test_networks(networks: tuple[str, str], site: Site) -> None:
    def end(name: str) -> str:
        run = site.submit(name)
        return str(site.wait_for(run)["reason"] or text(site, run))

    body = "import socket\nprint(sorted(name for _, name in socket.if_nameindex()))"
    register(site, "linked", body)
    register(site, "lost", body, "host_config={'NetworkMode': 'nowhere'}")
    start(site, "--allow-host-config", "NetworkMode", networks=networks)
    assert end("linked") == "['eth0', 'eth1', 'lo']\n"
    missing = (
        "could not be started: network nowhere not found; make it, docker network create, or name another"
    )
    assert end("lost") == missing
    site.stop(site.agents[-1])
    start(site, networks=("inner", "nowhere"))
    assert end("linked") == missing


def test_limits_and_what_was_allowed_are_those_of_the_container(site: Site) -> None:
    start(site, "--allow-host-config", "CapAdd", "--max", "processes=40")
    register(
        site,
        "modest",
        """
def limit(*names):  # in control groups of the first version, and of the second
    (file,) = filter(os.path.exists, [f"/sys/fs/cgroup/{name}" for name in names])
    return int(open(file).read().split()[0])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
shared = os.statvfs("/dev/shm")
print(json.dumps([
    limit("memory/memory.limit_in_bytes", "memory.max"),
    limit("pids/pids.max", "pids.max"),
    limit("cpu/cpu.cfs_quota_us", "cpu.max"),
    sorted(os.sched_getaffinity(0)),
    shared.f_blocks * shared.f_bsize,
    int(status["CapEff"], 16),
]))
""",
        "limits={'memory': '64M'}, host_config={'Memory': 1 << 40, 'PidsLimit': 8, 'NanoCpus': 500_000_000,"
        " 'CpusetCpus': '0', 'ShmSize': 5 << 20, 'CapAdd': ['NET_RAW']}",
    )
    run = site.submit("modest")
    assert site.wait_for(run)["state"] == "completed"
    assert json.loads(text(site, run)) == [64 << 20, 8 + SUPERVISION, 50_000, [0], 5 << 20, 1 << CAP_NET_RAW]
    register(site, "bold", "pass", "host_config={'CapAdd': ['NET_RAW'], 'Devices': []}")
    assert "--allow-host-config Devices" in site.wait_for(site.submit("bold"))["reason"]

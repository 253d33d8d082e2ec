"""What containers are made with: which volumes and keys of a host config flows get, and which not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowagent.errors import FlowError, SandboxError, SettingsError
from flowagent.run_configs import DockerRun
from flowagent.runners.docker.containers import Rules
from flowagent.settings import load


def rules(tmp_path: Path, **flags: Any) -> Rules:
    return Rules(load(environ={}, overrides={"home": tmp_path / "home", "runner": "docker", **flags}))


def mounts(rules: Rules, *volumes: str) -> list[tuple[str, str, bool]]:
    """What the agent's and a flow's volumes are mounted as: source, target, whether it is read-only."""
    config = {"volumes": list(volumes)}
    rules.check(config)
    body = rules.container("sha256:0", ["python3"], config, {}, None)
    return [(each["Source"], each["Target"], each["ReadOnly"]) for each in body["HostConfig"]["Mounts"]]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("/", "cannot be mounted at /: it is the image itself"),
        ("//", "cannot be mounted at /:"),
        ("/tmp", "cannot be mounted at /tmp: it holds the run's own files"),
        ("/tmp/", "at /tmp:"),
        ("//./tmp//", "at /tmp:"),
        ("/flowagent", "at /flowagent: it holds what runs the flow"),
        ("/flowagent/x", "at /flowagent/x:"),
        ("/proc", "at /proc: it is the kernel's"),
        ("/data/../tmp", "is none; write SOURCE:TARGET"),
        ("tmp", "is none; write SOURCE:TARGET"),
    ],
)
def test_targets_that_are_taken(tmp_path: Path, target: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        rules(tmp_path, volumes=(f"/data:{target}",))
    assert "\n" not in str(caught.value)
    with pytest.raises(SandboxError, match=words):
        mounts(rules(tmp_path, allow_write=(Path("/data"),)), f"/data:{target}")


def test_targets_that_only_look_like_them(tmp_path: Path) -> None:
    given = ("/data:/tmp/data", "/data:/flowagents", "/data://srv/./x/")
    found = mounts(rules(tmp_path, volumes=given))
    assert [target for _, target, _ in found] == ["/tmp/data", "/flowagents", "/srv/x"]


@pytest.mark.parametrize("source", ["/data/../etc", "/data/link/..", "..", "./data", "~/data", "/.."])
def test_sources_that_depend_on_who_reads_them(tmp_path: Path, source: str) -> None:
    allowing = rules(tmp_path, allow_write=(Path("/data"), Path("/etc"), Path("/")))
    with pytest.raises(SandboxError, match="write the path in full, without"):
        mounts(allowing, f"{source}:/x")


def test_what_is_mounted_is_what_was_allowed(tmp_path: Path) -> None:
    allowing = rules(tmp_path, allow_write=(Path("/data"),), allow_read=(Path("/keys"),))
    assert mounts(allowing, "//data/./", "/keys:/k:ro") == [("/data", "/data", False), ("/keys", "/k", True)]
    for volume in ("/keys:/k", "/data/x:/x", "/datas:/x"):
        with pytest.raises(SandboxError, match="does not allow"):
            mounts(allowing, volume)


def test_the_agents_own_sources_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    found = mounts(rules(tmp_path, volumes=("./a/../b:/b", "~/.ssh:/root/.ssh:ro")))
    assert found == [(f"{tmp_path}/b", "/b", False), ("/home/me/.ssh", "/root/.ssh", True)]


def test_a_volume_that_the_agent_mounts_read_only_is_no_more_than_that(tmp_path: Path) -> None:
    giving = rules(tmp_path, volumes=("notes:/notes:ro", "work:/work"))
    assert len(mounts(giving, "notes:/n:ro", "work:/w", "work:/v:ro")) == 5
    with pytest.raises(SandboxError, match="volume notes to write to, which this agent does not allow"):
        mounts(giving, "notes:/n")


GOOD: dict[str, Any] = {
    "ports": (80, 443),
    "volumes": ["/data:/x:ro"],
    "host_config": {
        "ShmSize": 1 << 30,
        "CpusetCpus": "0-3",
        "PidsLimit": -1,
        "Tmpfs": {"/scratch": "size=64m"},
        "Dns": ("10.0.0.1",),
        "ReadonlyRootfs": True,
        "Mounts": [{"Type": "tmpfs", "Target": "/y"}],
        "OfAnotherVersion": 1.5,
    },
}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"host_config": [("Memory", 1)]}, "host_config takes a dict; got list"),
        ({"host_config": {1: 2}}, "host_config takes a dict by strings; got 1"),
        ({"host_config": {"Memory": "2G"}}, "Memory takes a whole number of bytes; got '2G'"),
        ({"host_config": {"Memory": True}}, "Memory takes a whole number of bytes"),
        ({"host_config": {"NanoCpus": 1.5}}, "NanoCpus takes a whole number; got 1.5"),
        ({"host_config": {"PidsLimit": None}}, "PidsLimit takes a whole number"),
        ({"host_config": {"CpusetCpus": 3}}, "CpusetCpus takes a string"),
        ({"host_config": {"ReadonlyRootfs": "yes"}}, "ReadonlyRootfs takes True or False"),
        ({"host_config": {"Tmpfs": ["/x"]}}, "Tmpfs takes a dict of strings"),
        ({"host_config": {"Dns": "10.0.0.1"}}, "Dns takes a list of strings"),
        ({"host_config": {"CapAdd": [1]}}, "CapAdd takes a list of strings"),
        ({"host_config": {"Mounts": 5}}, "Mounts takes a list of dicts"),
        ({"ports": 80}, "ports takes a list of TCP ports; got 80"),
        ({"ports": "80"}, "ports takes a list of TCP ports; got '80'"),
        ({"ports": {"80": 80}}, "ports takes a list of TCP ports"),
        ({"volumes": 5}, "volumes takes a list of 'source:target"),
        ({"volumes": {"/a": "/b"}}, "volumes takes a list of 'source:target"),
        ({"volumes": [None]}, "volumes, each of them, takes a non-empty string"),
        ({"image": 5}, "image takes a non-empty string"),
        ({"python": ["python3"]}, "python takes a non-empty string"),
        ({"resolve": True}, "resolve is 'agent' or 'container'"),
    ],
)
def test_arguments_of_the_wrong_type(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(FlowError) as caught:
        DockerRun(**given)
    assert f"DockerRun: {next(iter(given))}" in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)
    allowing = rules(tmp_path, allow_host_config=("Mounts", "CapAdd"))
    with pytest.raises(SandboxError) as refused:
        allowing.check({**DockerRun().to_json(), **given})
    assert words in str(refused.value)


def test_arguments_of_the_right_type(tmp_path: Path) -> None:
    config = DockerRun(**GOOD).to_json()
    assert DockerRun.from_json(config) == DockerRun(**GOOD)
    allowing = rules(tmp_path, allow_read=(Path("/data"),), allow_host_config=("Mounts", "OfAnotherVersion"))
    allowing.check(config)
    host = allowing.container("sha256:0", ["python3"], config, {}, None)["HostConfig"]
    assert host["ShmSize"] == 1 << 30 and [each["Target"] for each in host["Mounts"]] == ["/x", "/y"]


def test_what_no_flow_can_change_cannot_be_allowed(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="SecurityOpt: it is the same for all containers"):
        rules(tmp_path, allow_host_config=("SecurityOpt",))
    with pytest.raises(SandboxError, match="asks for CapDrop in its host_config: it is the same for all"):
        rules(tmp_path).check({"host_config": {"CapDrop": []}})


def test_what_was_allowed_goes_before_what_the_agent_has(tmp_path: Path) -> None:
    allowing = rules(
        tmp_path, allow_host_config=("NetworkMode", "MemorySwap"), networks=("a", "b"), max={"memory": "1G"}
    )
    asked = {"host_config": {"NetworkMode": "own", "MemorySwap": -1, "Memory": 4 << 30}}
    allowing.check(asked)
    host = allowing.container("sha256:0", ["python3"], asked, {}, None)["HostConfig"]
    assert (host["NetworkMode"], host["MemorySwap"], host["Memory"]) == ("own", -1, 1 << 30)
    assert allowing.networks(asked) == ("own",) and allowing.networks({}) == ("a", "b")

"""Limits: how they are declared, combined, and looked at where the kernel does not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from flowagent.flows import declarations
from flowagent.flows.errors import FlowError
from flowagent.runtime import limits
from flowagent.runtime.limits import Limits, Watch


@pytest.mark.parametrize(
    ("given", "bytes_"),
    [("512M", 512 << 20), ("1.5g", 3 << 29), ("2GB", 2 << 30), (4096, 4096), ("10k", 10240)],
)
def test_sizes(given: Any, bytes_: int) -> None:
    assert declarations.size(given, "x") == bytes_


@pytest.mark.parametrize("given", ["", "M", "12X", "-1G", 0, 2.5, True, None, "nan", "inf"])
def test_what_is_no_size(given: Any) -> None:
    with pytest.raises(FlowError, match="such as 512M"):
        declarations.size(given, "x")


def test_limits_are_checked_by_name() -> None:
    assert declarations.limits({"memory": "1M", "cpu_time": 2, "processes": 3}, "x") == {
        "memory": 1 << 20,
        "cpu_time": 2.0,
        "processes": 3,
    }
    with pytest.raises(FlowError, match="no 'ram'; known are memory"):
        declarations.limits({"ram": 1}, "x")
    with pytest.raises(FlowError, match="processes has to be above 0"):
        declarations.limits({"processes": 0}, "x")


def test_a_flow_can_ask_for_less_only() -> None:
    agent = Limits(memory=100, processes=10)
    assert agent.tightened({"memory": 50, "processes": 20, "disk": 7}) == Limits(50, 10, disk=7)


def watch(limit: Limits, directory: Path, processes: list[int], counted: bool = True) -> Watch:
    return Watch(
        limit,
        directory=str(directory / "work"),
        processes=lambda: processes,
        counted=counted,
        spent=None,
    )


def test_what_is_over_its_limit_is_found(tmp_path: Path) -> None:
    (tmp_path / "work" / "deep").mkdir(parents=True)
    (tmp_path / "work" / "deep" / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "work" / "link").symlink_to("/usr")
    me = [os.getpid()]
    for limit, name in (
        (Limits(disk=50_000), "disk"),
        (Limits(memory=1 << 20), "memory"),
        (Limits(processes=1), "processes"),
        (Limits(cpu_time=0.001), "cpu_time"),
    ):
        found = watch(limit, tmp_path, me * 2).look()
        assert found is not None and found.name == name
    generous = Limits(memory=1 << 40, processes=5, cpu_time=1e6, disk=1 << 30)
    assert watch(generous, tmp_path, me).look() is None
    assert watch(Limits(memory=1), tmp_path, me, counted=False).look() is None, "that is the kernel's"


def test_a_tree_that_is_too_deep_to_be_measured_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    fd = os.open(tmp_path / "work", os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=fd)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    found = watch(Limits(disk=1 << 30), tmp_path, []).look()
    assert found is not None and found.name == "disk"


def test_words() -> None:
    assert limits.excess("memory", 1 << 30).reason == "it used more than its limit of 1G of memory"
    assert limits.excess("processes", 5).reason == "it used more than its limit of 5 processes"
    assert limits.excess("cpu_time", 2.5).reason == "it used more than its limit of 2.5 s of CPU time"

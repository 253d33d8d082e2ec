"""Control groups, of whatever version this machine has."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from forked import forked

from flowagent.runtime import cgroups


@pytest.fixture(scope="module")
def roots() -> dict[str, str]:
    found: dict[str, str] = forked(cgroups.find)
    assert found, "no control groups can be made here: run the tests as root, or with a delegated subtree"
    return found


def test_too_much_memory_is_a_kill_that_is_counted(roots: dict[str, str]) -> None:
    def work() -> tuple[bool, int, bool, bool]:
        group = cgroups.Group.enter(roots, f"test-{os.getpid()}")
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("0")
        group.limit(48 << 20, None)
        pid = os.fork()
        if pid == 0:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("500")
            hoard = []
            while True:
                hoard.append(bytearray(os.urandom(1 << 20)))
        _, status = os.waitpid(pid, 0)
        return group.limits_memory, os.WTERMSIG(status), group.has_killed(), group.has_killed()

    assert forked(work) == (True, signal.SIGKILL, True, False)
    cgroups.sweep(roots)


def test_no_more_processes_than_allowed(roots: dict[str, str]) -> None:
    def work() -> tuple[int, bool]:
        group = cgroups.Group.enter(roots, f"test-{os.getpid()}")
        group.limit(None, 3)
        children = []
        try:
            for _ in range(10):
                pid = os.fork()
                if pid == 0:
                    time.sleep(30)
                    os._exit(0)
                children.append(pid)
        except BlockingIOError:
            pass
        group.allow_no_more()
        try:
            os.fork()
            more = True
        except BlockingIOError:
            more = False
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return len(children), more

    assert forked(work) == (3, False)
    cgroups.sweep(roots)


def test_a_group_is_killed_at_one_stroke_and_goes_away(roots: dict[str, str]) -> None:
    if cgroups.UNIFIED not in roots:
        pytest.fail("no cgroup version 2 here: mount -t cgroup2 none /sys/fs/cgroup/unified")
    name = f"test-{os.getpid()}"
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                cgroups.Group.enter(roots, name)
                time.sleep(30)
            finally:
                os._exit(1)
        pids.append(pid)
    group = cgroups.Group(roots, name)
    procs = Path(f"{roots[cgroups.UNIFIED]}/flowagent-{name}/cgroup.procs")
    deadline = time.monotonic() + 10
    while not procs.exists() or len(procs.read_text().split()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert group.kill()
    for pid in pids:
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    group.remove()
    assert not [path for path in roots.values() if os.path.exists(f"{path}/flowagent-{name}")]


def test_cpu_time_is_counted(roots: dict[str, str]) -> None:
    def work() -> float:
        group = cgroups.Group.enter(roots, f"test-{os.getpid()}")
        before = group.cpu_time() or 0.0
        pid = os.fork()
        if pid == 0:
            end = time.process_time() + 0.2
            while time.process_time() < end:
                pass
            os._exit(0)
        os.waitpid(pid, 0)
        return (group.cpu_time() or 0.0) - before

    assert 0.15 < forked(work) < 1.0
    cgroups.sweep(roots)


def test_a_hierarchy_without_the_controller_limits_nothing(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("pids\n")
    unified = {cgroups.UNIFIED: str(tmp_path)}
    assert cgroups.limits(unified, cgroups.PIDS) and not cgroups.limits(unified, cgroups.MEMORY)
    assert cgroups.limits({cgroups.MEMORY: "/somewhere"}, cgroups.MEMORY)
    assert not cgroups.limits({}, cgroups.MEMORY)

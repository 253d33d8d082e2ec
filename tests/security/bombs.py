"""Flows that use more than their limits allow: each prints "too far" if it was not stopped."""

from __future__ import annotations

import os
import resource
import signal
import time

from flowagent import flow
from flowagent.run_configs import LocalRun


def _too_far() -> None:
    time.sleep(1.5)  # the supervisor looks several times a second
    print("too far", flush=True)


def _limited(**limits: object) -> object:
    return flow(run_config=LocalRun(limits=limits))


@_limited(processes=40)
def fork_bomb() -> None:
    made = 0
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline and made < 400:
        try:
            if os.fork() == 0:
                time.sleep(600)
        except OSError:
            time.sleep(0.05)
            continue
        made += 1
    if made >= 60:
        _too_far()


@_limited(memory="96M")
def memory_bomb() -> None:
    children = []
    for _ in range(8):
        children.append(os.fork())
        if children[-1] == 0:
            hoard = bytearray(os.urandom(1 << 20) * 40)
            time.sleep(600)
            del hoard
    time.sleep(1)
    while os.waitpid(-1, os.WNOHANG) != (0, 0):
        pass
    shared = _resident(os.getpid())  # what they have from their parent
    held = sum(max(0, _resident(pid) - shared) for pid in children)
    if held > 120 << 20:  # where there are control groups, the kernel kills some and lets others live
        _too_far()


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


@_limited(memory="64M")
def shared_memory_bomb() -> None:
    with open("/dev/shm/bomb", "wb") as file:
        for _ in range(256):
            file.write(bytes(1 << 20))
            file.flush()
    _too_far()


@_limited(memory="64M")
def memfd_bomb() -> None:
    fd = os.memfd_create("bomb")
    for _ in range(256):
        os.write(fd, b"x" * (1 << 20))
    _too_far()


@_limited(memory="64M")
def tmp_bomb() -> None:
    with open("/tmp/bomb", "wb") as file:
        for _ in range(256):
            file.write(bytes(1 << 20))
            file.flush()
    _too_far()


@_limited(disk="8M")
def disk_fill() -> None:
    os.makedirs("a/b/c")
    for number in range(64):
        with open(f"a/b/c/{number}", "wb") as file:
            file.write(bytes(1 << 20))
    _too_far()


@_limited(disk="8M")
def hidden_disk_fill() -> None:
    """In a directory that is closed to be measured, and in an unlinked file."""
    os.mkdir("closed")
    for number in range(64):
        with open(f"closed/{number}", "wb") as file:
            file.write(bytes(1 << 20))
    os.chmod("closed", 0)
    _too_far()


@_limited(disk="8M")
def unlinked_disk_fill() -> None:
    with open("gone", "wb") as file:
        os.unlink("gone")
        for _ in range(64):
            file.write(bytes(1 << 20))
        file.flush()
        _too_far()


@_limited(output="256K")
def output_flood() -> None:
    for _ in range(64):
        os.write(1, b"x" * 65535 + b"\n")
    _too_far()


@_limited(open_files=64)
def descriptors() -> None:
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
    _too_far()
    del held


@_limited(open_files=64)
def frugal() -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE) == (64, 64) and os.path.exists(__file__):
        print("ran with few", flush=True)


@_limited(cpu_time=1)
def cpu_burn() -> None:
    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
            break
    end = time.monotonic() + 6
    while time.monotonic() < end:
        pass
    _too_far()


@_limited(file_size="1M")
def large_file() -> None:
    with open("large", "wb") as file:
        file.write(bytes(4 << 20))
    _too_far()


@flow(run_config=LocalRun(limits={"wall_time": 1}))
def overtime() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(4)
    _too_far()

"""The system call filter, enforced by the kernel on a child process."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import socket

import pytest
from forked import forked, refused

from flowagent.runtime import linux, seccomp


def tries() -> dict[str, int | None]:
    _, write = os.pipe()
    terminal, _ = os.openpty()
    return {
        "another's limits": refused(lambda: resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (9, 9))),
        "reading another's limits": refused(lambda: resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)),
        "own limits": refused(lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0))),
        "typing into a terminal": refused(lambda: fcntl.ioctl(terminal, 0x5412, b"x")),
        "the size of a terminal": refused(lambda: fcntl.ioctl(terminal, 0x5413, b"12345678")),
        "keyrings": refused(lambda: linux.checked(linux.libc.syscall(250, 0, -3, 0), "keyctl")),
        "io_uring": refused(lambda: linux.checked(linux.libc.syscall(425, 1, None), "io_uring")),
        "shared memory": refused(lambda: linux.checked(linux.libc.shmget(0, 100, 0o1600), "shmget")),
        "internet": refused(lambda: socket.socket(socket.AF_INET).close()),
        "datagrams": refused(lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()),
        "netlink": refused(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()),
        "unix sockets": refused(lambda: socket.socket(socket.AF_UNIX).close()),
        "pipes": refused(lambda: os.write(write, b"x")),
        "files": refused(lambda: open("/etc/passwd").close()),
    }


def under(own_ipc: bool, network: str) -> dict[str, int | None]:
    def work() -> dict[str, int | None]:
        linux.unshare(linux.CLONE_NEWIPC)  # the objects go with this process
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        seccomp.enforce(seccomp.programs(True)[True, own_ipc, network])
        return tries()

    found: dict[str, int | None] = forked(work)
    return found


ALWAYS = {"another's limits", "typing into a terminal", "keyrings", "io_uring"}


@pytest.mark.parametrize(
    ("own_ipc", "network", "more"),
    [
        (True, seccomp.ONLINE, set()),
        (False, seccomp.ONLINE, {"shared memory"}),
        (True, seccomp.OFFLINE, {"internet", "datagrams", "netlink"}),
    ],
)
def test_what_is_refused(own_ipc: bool, network: str, more: set[str]) -> None:
    found = under(own_ipc, network)
    assert {name for name, code in found.items() if code is not None} == ALWAYS | more
    assert {code for code in found.values() if code is not None} == {errno.EPERM}


def test_truncate_is_refused_where_landlock_does_not_see_it(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "file")
    with open(path, "w") as file:
        file.write("content")

    def work() -> int | None:
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        seccomp.enforce(seccomp.programs(False)[True, True, seccomp.ONLINE])
        return refused(lambda: os.truncate(path, 0))

    assert forked(work) == errno.EPERM


def test_calls_of_another_architecture_are_refused() -> None:
    if os.uname().machine != "x86_64":
        return  # no other that this kernel would take

    def work() -> int:
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        seccomp.enforce(seccomp.programs(True)[True, True, seccomp.ONLINE])
        ctypes.set_errno(0)
        linux.libc.syscall(0x40000000 + 39)  # getpid of the x32 ABI
        return ctypes.get_errno()

    assert forked(work) == errno.EPERM

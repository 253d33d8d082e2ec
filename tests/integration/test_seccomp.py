"""The system call filter, enforced by the kernel on a child process."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import socket
import stat
from pathlib import Path

import pytest
from forked import forked, refused

from flowagent.runtime import linux, seccomp

AT_FDCWD = -100


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


def tries_of_set_id(directory: Path) -> tuple[int, dict[str, int | None]]:
    """Each call that can give a file a mode, past libc: what bits there are then, and the errno of each."""
    os.chdir(directory)
    for name in ("file", "plain"):
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o700))
    fd = os.open("file", os.O_RDONLY)
    here = seccomp.NUMBERS[os.uname().machine]
    found: dict[str, int | None] = {}
    for bits in (0o4000, 0o2000, 0):
        new = map(b"new-%o-%d".__mod__, ((bits, number) for number in range(100)))
        mode = 0o1700 | bits
        flags = {"creating": os.O_CREAT | os.O_WRONLY, "unnamed": os.O_TMPFILE | os.O_WRONLY}
        how = (ctypes.c_uint64 * 3)(os.O_CREAT | os.O_WRONLY, mode & ~0o1000, 0)
        calls: dict[str, tuple[object, ...]] = {
            "chmod": (b"file", mode),
            "fchmod": (fd, mode),
            "fchmodat": (AT_FDCWD, b"file", mode),
            "fchmodat2": (AT_FDCWD, b"file", mode, 0),
            "creat": (next(new), mode),
            "mkdir": (next(new), mode),
            "mkdirat": (AT_FDCWD, next(new), mode),
            "mknod": (next(new), stat.S_IFREG | mode, 0),
            "mknodat": (AT_FDCWD, next(new), stat.S_IFREG | mode, 0),
            "open": (next(new), flags["creating"], mode),
            "openat": (AT_FDCWD, next(new), flags["creating"], mode),
            "open unnamed": (b".", flags["unnamed"], mode),
            "openat unnamed": (AT_FDCWD, b".", flags["unnamed"], mode),
            "open what is there": (b"plain", os.O_RDONLY, mode),
            "openat what is there": (AT_FDCWD, b"plain", os.O_RDONLY, mode),
            "openat2": (AT_FDCWD, next(new), ctypes.byref(how), ctypes.c_size_t(24)),
        }
        for title, arguments in calls.items():
            number = here.get(title.split()[0])
            if number is not None:
                done = linux.libc.syscall(number, *arguments)
                found[f"{title} {bits:o}"] = None if done >= 0 else ctypes.get_errno()
    modes = {os.lstat(path).st_mode & 0o6000 for path in os.listdir(".")}
    return sum(modes), found


@pytest.mark.parametrize("key", seccomp.programs(True))
def test_files_that_run_as_their_owner_are_refused(key: tuple[bool, bool, str], tmp_path: Path) -> None:
    def work() -> object:
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        seccomp.enforce(seccomp.programs(True)[key])
        return tries_of_set_id(tmp_path)

    bits, found = forked(work)
    assert (bits, len(found) >= 27) == (0, True)
    for title, code in found.items():
        harmless = title.endswith(" 0") or "what is there" in title
        expected = errno.ENOSYS if "openat2" in title else None if harmless else errno.EPERM
        assert code == expected or ("fchmodat2" in title and code == errno.ENOSYS), title  # before Linux 6.6


def test_the_calls_that_are_refused_would_do_it(tmp_path: Path) -> None:
    bits, found = forked(lambda: tries_of_set_id(tmp_path))
    assert bits == 0o6000
    assert {code for title, code in found.items() if "fchmodat2" not in title} == {None}


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

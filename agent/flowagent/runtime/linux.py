"""System calls that Python has no function for, by ctypes, and the numbers that go with them."""

from __future__ import annotations

import ctypes
import os
import signal

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
for _name in ("prctl", "capset", "unshare", "mount", "fallocate", "pthread_sigmask"):
    getattr(libc, _name)  # looked up once, here: it is kept then

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_SECCOMP = 22
PR_SET_SECUREBITS = 28
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000

MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 0x80000
MOUNT_ATTR_RDONLY = 1
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
SYS_CLOSE_RANGE, SYS_MOUNT_SETATTR = 436, 442

SECBIT_NOROOT_LOCKED = 0b11
"""SECBIT_NOROOT and its lock: executing a program as root gives no capabilities back."""
CAPABILITY_VERSION_3 = 0x20080522
FALLOC_FL_KEEP_SIZE = 1
SIGSET_SIZE = 128
"""Bytes of a sigset_t, of glibc and of musl."""


def checked(result: int, what: str) -> int:
    """The result of a call. :raises OSError: it was negative."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def prctl(option: int, value: int, what: int = 0) -> None:
    """:raises OSError: the kernel refused."""
    checked(libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(what), 0, 0), f"prctl {option}")


def unblock_signals() -> None:
    """Let all signals come. The signal module would make an enumeration of those that were blocked."""
    libc.pthread_sigmask(signal.SIG_SETMASK, bytes(SIGSET_SIZE), None)


def make_undumpable() -> None:
    """Keep other processes of this user from reading this one's memory and environment."""
    prctl(PR_SET_DUMPABLE, 0)


def set_process_name(name: str) -> None:
    """What ``ps`` and ``top`` show; 15 bytes."""
    libc.prctl(PR_SET_NAME, name.encode()[:15] + b"\0", 0, 0, 0)


def drop_capabilities() -> None:
    """Give up all capabilities for good, also those that root gets by executing a program."""
    if os.geteuid() == 0:
        try:
            prctl(PR_SET_SECUREBITS, SECBIT_NOROOT_LOCKED)
        except PermissionError:
            pass  # without CAP_SETPCAP there is nothing left to come back
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    checked(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def unshare(flags: int) -> None:
    """:raises OSError: the kernel or its configuration does not allow these namespaces."""
    checked(libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2). :raises OSError: as it says."""
    result = libc.mount(
        source.encode(),
        os.fsencode(target),
        None if kind is None else kind.encode(),
        ctypes.c_ulong(flags),
        None if options is None else options.encode(),
    )
    checked(result, f"mount {target}")


def set_read_only(root: str, read_only: bool) -> None:
    """All mounts from ``root`` down, as this namespace sees them. :raises OSError: Linux before 5.12."""
    attributes = (ctypes.c_uint64 * 4)()
    attributes[0 if read_only else 1] = MOUNT_ATTR_RDONLY
    result = libc.syscall(
        SYS_MOUNT_SETATTR,
        AT_FDCWD,
        os.fsencode(root),
        AT_RECURSIVE,
        attributes,
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    checked(result, "mount_setattr")


def close_all_but(kept: int, first: int) -> None:
    """Close every descriptor from ``first`` on but ``kept``."""
    for low, high in ((first, kept - 1), (kept + 1, 0x7FFFFFFF)):
        if low <= high and libc.syscall(SYS_CLOSE_RANGE, low, high, 0) < 0:  # Linux before 5.9
            os.closerange(low, min(high, max(map(int, os.listdir("/proc/self/fd")))) + 1)


def reserve(fd: int, size: int) -> int:
    """Have room on disk for ``size`` bytes of a file without changing its length; 0 or an errno."""
    if libc.fallocate(fd, FALLOC_FL_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(size)) == 0:
        return 0
    return ctypes.get_errno()

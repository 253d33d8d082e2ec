"""System calls that flows have no business with, refused by a seccomp filter.

It closes what file rules do not see: other processes' limits, the keyrings that all processes of a user
share, terminals of others, setuid programs, and calls that go past other filters. The filter is a classic
BPF program; its format is that of linux/filter.h and linux/seccomp.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

from flowagent.runtime.linux import PR_SET_SECCOMP, checked, libc

SECCOMP_MODE_FILTER = 2
RET_ALLOW, RET_ERRNO = 0x7FFF0000, 0x00050000
LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
"""Offsets in struct seccomp_data: the call's number, its architecture, its six arguments of 8 bytes."""
X32 = 0x40000000
"""Numbers from here on are calls of the x32 ABI, which would go past every number below."""

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NUMBERS = {
    "x86_64": {
        "ioctl": 16, "shmget": 29, "socket": 41, "semget": 64, "msgget": 68, "truncate": 76, "add_key": 248,
        "request_key": 249, "keyctl": 250, "perf_event_open": 298, "prlimit64": 302, "bpf": 321,
        "userfaultfd": 323, "io_uring_setup": 425, "mq_open": 240, "setpriority": 141, "ioprio_set": 251,
        "sched_setparam": 142, "sched_setscheduler": 144, "sched_setaffinity": 203, "sched_setattr": 314,
        "sendto": 44, "sendmsg": 46, "sendmmsg": 307, "open": 2, "mkdir": 83, "creat": 85, "chmod": 90,
        "fchmod": 91, "mknod": 133, "openat": 257, "mkdirat": 258, "mknodat": 259, "fchmodat": 268,
        "openat2": 437, "fchmodat2": 452,
    },
    "aarch64": {
        "ioctl": 29, "truncate": 45, "msgget": 186, "semget": 190, "shmget": 194, "socket": 198,
        "add_key": 217, "request_key": 218, "keyctl": 219, "perf_event_open": 241, "prlimit64": 261,
        "bpf": 280, "userfaultfd": 282, "io_uring_setup": 425, "mq_open": 180, "setpriority": 140,
        "ioprio_set": 30, "sched_setparam": 118, "sched_setscheduler": 119, "sched_setaffinity": 122,
        "sched_setattr": 274, "sendto": 206, "sendmsg": 211, "sendmmsg": 269, "mknodat": 33, "mkdirat": 34,
        "fchmod": 52, "fchmodat": 53, "openat": 56, "openat2": 437, "fchmodat2": 452,
    },
}  # fmt: skip

ALWAYS = ("add_key", "request_key", "keyctl", "perf_event_open", "bpf", "userfaultfd", "io_uring_setup")
"""Never of use in a flow: shared keyrings, spying, and calls that other filters do not see."""
LASTING = ("shmget", "semget", "msgget", "mq_open")
"""Objects that outlive their processes; refused where a run has no IPC namespace of its own."""
SETS_MODE = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "creat": 1, "mkdir": 1, "mkdirat": 2,
             "mknod": 1, "mknodat": 2}  # fmt: skip
"""Calls and which of their arguments is a mode; not all processors have them all."""
CREATES = {"open": 1, "openat": 2}
"""Calls and which argument is their flags; the mode comes after it, and counts for new files only."""
SET_ID = 0o6000
"""S_ISUID and S_ISGID: a program that others run as this user, long after the run."""
O_CREAT, O_TMPFILE = 0o100, 0o20000000
"""Of the latter only what is not O_DIRECTORY, which differs between processors."""
TERMINAL = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX: type into a terminal, paste its selection."""
SCHEDULING = ("sched_setparam", "sched_setscheduler", "sched_setaffinity", "sched_setattr")
"""With a pid first; 0 is the caller. Landlock lets a flow starve its own agent by them."""
PRIO_USER, IOPRIO_WHO_USER = 2, 3
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
MSG_FASTOPEN = 0x20000000
"""Sending with it connects, and Landlock does not see that."""
NO_PORTS = (33, 132, 256, 262)
"""Protocols that connect past Landlock's rules about TCP ports: DCCP, SCTP, SMC and multipath TCP."""


def available() -> bool:
    """Whether filters are known for this machine's processors."""
    return os.uname().machine in NUMBERS


class Filter:
    """A program that allows everything but what is refused. Refused calls fail with EPERM."""

    def __init__(self) -> None:
        machine = os.uname().machine
        self._numbers = NUMBERS[machine]
        self._program: list[tuple[int, int, int, int]] = [
            (LOAD, 0, 0, ARCHITECTURE),
            (JUMP_EQUAL, 1, 0, ARCHITECTURES[machine]),
            (RETURN, 0, 0, RET_ERRNO | errno.EPERM),  # calls of another architecture
            (LOAD, 0, 0, NUMBER),
        ]
        if machine == "x86_64":
            self._program += [(JUMP_GREATER_EQUAL, 0, 1, X32), (RETURN, 0, 0, RET_ERRNO | errno.EPERM)]

    def refuse(self, names: Iterable[str], code: int = errno.EPERM) -> None:
        """Whatever their arguments."""
        for name in names:
            self._program += [(JUMP_EQUAL, 0, 1, self._numbers[name]), (RETURN, 0, 0, RET_ERRNO | code)]

    def refuse_with(self, name: str, argument: int, values: Iterable[int]) -> None:
        """When the argument (its lower half) is one of ``values``."""
        body = []
        for value in values:
            body += [(JUMP_EQUAL, 0, 1, value), (RETURN, 0, 0, RET_ERRNO | errno.EPERM)]
        self._when(name, [(LOAD, 0, 0, ARGUMENTS + 8 * argument), *body])

    def refuse_without(self, name: str, argument: int, *values: int) -> None:
        """Unless the argument (its lower half) is one of ``values``."""
        body = [(JUMP_EQUAL, len(values) - number, 0, value) for number, value in enumerate(values)]
        self._when(
            name,
            [(LOAD, 0, 0, ARGUMENTS + 8 * argument), *body, (RETURN, 0, 0, RET_ERRNO | errno.EPERM)],
        )

    def refuse_with_bits(self, name: str, argument: int, bits: int) -> None:
        """When the argument has one of ``bits``."""
        body = [(JUMP_SET, 0, 1, bits), (RETURN, 0, 0, RET_ERRNO | errno.EPERM)]
        self._when(name, [(LOAD, 0, 0, ARGUMENTS + 8 * argument), *body])

    def refuse_set_id(self) -> None:
        """Files that run as their owner or group. What openat2 is asked for is in memory, which no filter
        sees: it is said not to exist, and whoever tries it first goes on with openat."""
        for name, mode in SETS_MODE.items():
            if name in self._numbers:
                self.refuse_with_bits(name, mode, SET_ID)
        for name, flags in CREATES.items():
            if name in self._numbers:
                body = [
                    (LOAD, 0, 0, ARGUMENTS + 8 * flags),
                    (JUMP_SET, 0, 3, O_CREAT | O_TMPFILE),  # else there may be anything in place of a mode
                    (LOAD, 0, 0, ARGUMENTS + 8 * (flags + 1)),
                    (JUMP_SET, 0, 1, SET_ID),
                    (RETURN, 0, 0, RET_ERRNO | errno.EPERM),
                ]
                self._when(name, body)
        self.refuse(["openat2"], errno.ENOSYS)

    def refuse_scheduling_of_others(self) -> None:
        """Priorities and CPUs of any process but the caller, and of all processes of its user."""
        for name in SCHEDULING:
            self.refuse_without(name, 0, 0)
        for name, user in (("setpriority", PRIO_USER), ("ioprio_set", IOPRIO_WHO_USER)):
            self.refuse_with(name, 0, [user])
            self.refuse_without(name, 1, 0)

    def refuse_limits_of_others(self) -> None:
        """prlimit(pid, ..., new limit, ...) with a pid other than 0."""
        lower, upper = ARGUMENTS + 16, ARGUMENTS + 20
        self._when(
            "prlimit64",
            [
                (LOAD, 0, 0, ARGUMENTS),
                (JUMP_EQUAL, 5, 0, 0),  # its own
                (LOAD, 0, 0, lower),
                (JUMP_EQUAL, 0, 2, 0),
                (LOAD, 0, 0, upper),
                (JUMP_EQUAL, 1, 0, 0),  # only asks
                (RETURN, 0, 0, RET_ERRNO | errno.EPERM),
            ],
        )

    def _when(self, name: str, body: list[tuple[int, int, int, int]]) -> None:
        self._program += [(JUMP_EQUAL, 0, len(body) + 1, self._numbers[name]), *body, (LOAD, 0, 0, NUMBER)]

    def program(self) -> bytes:
        """As the kernel takes it."""
        return b"".join(struct.pack("=HBBI", *each) for each in [*self._program, (RETURN, 0, 0, RET_ALLOW)])


OFFLINE, PORTS, ONLINE = "offline", "ports", "online"
"""How much of the network a flow may use: none, some TCP ports by Landlock's rules, all."""


def programs(truncate: bool) -> dict[tuple[bool, bool, str], bytes]:
    """The filters of flow processes, by: is it confined by Landlock, has it an IPC namespace of its own, how
    much of the network may it use. ``truncate``: Landlock sees truncate(2)."""
    return {
        (confined, own_ipc, network): _program(own_ipc, network, truncate or not confined)
        for confined in (False, True)
        for own_ipc in (False, True)
        for network in (OFFLINE, PORTS, ONLINE)
    }


def _program(own_ipc: bool, network: str, truncate: bool) -> bytes:
    made = Filter()
    made.refuse(ALWAYS)
    made.refuse_with("ioctl", 1, TERMINAL)
    made.refuse_limits_of_others()
    made.refuse_scheduling_of_others()
    made.refuse_set_id()
    if not own_ipc:
        made.refuse(LASTING)
    if network == OFFLINE:
        made.refuse_without("socket", 0, AF_UNIX)
    elif network == PORTS:
        made.refuse_without("socket", 0, AF_UNIX, AF_INET, AF_INET6, AF_NETLINK)
        made.refuse_with("socket", 2, NO_PORTS)
        for name, flags in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
            made.refuse_with_bits(name, flags, MSG_FASTOPEN)
    if not truncate:
        made.refuse(["truncate"])
    return made.program()


def enforce(program: bytes) -> None:
    """For this process and all that it starts. Needs no_new_privs. :raises OSError: the kernel refused."""
    instructions = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    checked(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0), "seccomp")

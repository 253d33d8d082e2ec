"""Landlock: what a flow process may read and write of the file system, and whom it may reach.

By ctypes: the two packages on PyPI are a pre-release that knows neither network nor scopes, and a young one
that nobody else uses yet; both would have to be laid out next to every interpreter of a flow, for three
system calls. Landlock knows only rules that allow. "Everything but these paths" is therefore made of a rule
for each entry of each directory on the way to a denied path: :class:`Readable` keeps those rules ready, with
open descriptors as far as they go, so that a run only has to hand them to the kernel.

Numbers and semantics: https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import stat
import struct
import time
from collections.abc import Iterable

from flowagent.runtime.linux import checked, libc

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH, RULE_NET_PORT = 1, 2

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
MAKE_CHAR, MAKE_BLOCK = 1 << 6, 1 << 11
BIND_TCP, CONNECT_TCP = 1 << 0, 1 << 1
SCOPE_ABSTRACT_SOCKETS, SCOPE_SIGNALS = 1 << 0, 1 << 1

READ = EXECUTE | READ_FILE | READ_DIR
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""Rights that a rule for a file can have; the others are of directories only."""
HANDLED = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""File system rights by the version that brought the last of them."""
PORTS_SINCE, SCOPES_SINCE, TRUNCATE_SINCE = 4, 6, 3

SPARE = 256
"""Descriptors that rules leave to everything else in their process."""
EXHAUSTED = (errno.EMFILE, errno.ENFILE)
"""No descriptors are left to this process, or to the machine."""

DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx")
COMPUTING = ("dri", "kfd", "nvidia", "nvhost", "accel")
"""Devices that flows may use: the harmless ones, and those that begin so: graphics cards and the like."""


_syscall = libc.syscall  # looked up once: a flow process that does it writes to memory it shares otherwise


def version() -> int:
    """The kernel's ABI version; 0 where there is no Landlock, or it is switched off."""
    return max(0, int(libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), CREATE_RULESET_VERSION)))


def handled(abi: int) -> int:
    """The file system rights that a kernel controls."""
    return HANDLED[5 if abi >= 5 else 3 if abi >= 3 else abi]


class Rule:
    """One allowed path: rights and an open descriptor, packed as the kernel takes them."""

    def __init__(self, rights: int, fd: int) -> None:
        self.fd = fd
        self.packed = struct.pack("=Qi", rights, fd)


class Readable:
    """Everything but ``denied``, as rules that stay ready between runs.

    Entries that appear later in a directory on the way to a denied path are found by its time of change. A
    directory may have more entries than a process may have descriptors; those that are left over have theirs
    for a moment only, in each run."""

    def __init__(self, denied: Iterable[str]) -> None:
        paths = {os.path.realpath(path) for path in denied}
        # What lies below another denied path is no reason to open that one for the sake of its other entries.
        self._denied = {path for path in paths if not any(parent in paths for parent in _parents(path))}
        # Directories on the way: what was seen of each, and the rules for the entries that are not denied.
        self._seen = {parent: -1 for path in self._denied for parent in _parents(path)} or {"/": -1}
        self._rules: dict[str, list[Rule]] = {}
        self._left_over: dict[str, list[str]] = {}
        self._unread: OSError | None = None

    def hand_to(self, ruleset: Ruleset) -> None:
        """Allow it all. :raises OSError: not even one descriptor is left."""
        if self._unread is not None:
            raise self._unread
        for rules in self._rules.values():
            ruleset.add(rules)
        for paths in self._left_over.values():
            for path in paths:
                rule = _rule_if_there(path)
                if rule is not None:
                    ruleset.add([rule])
                    os.close(rule.fd)

    def changed(self) -> bool:
        """Whether the rules may not be what they should be any more."""
        return any(_changed(path) != seen for path, seen in self._seen.items())

    def refresh(self) -> None:
        """Make those rules anew that a change since they were made concerns."""
        self._unread = None
        for directory, seen in self._seen.items():
            if _changed(directory) != seen:
                self._look_into(directory)

    def _look_into(self, directory: str) -> None:
        for rule in self._rules.pop(directory, ()):
            os.close(rule.fd)
        changed = _changed(directory)
        # what changed in this very tick of the clock may change again in it, unnoticed: look again next time
        settled = time.time_ns() - changed > 50_000_000
        self._seen[directory] = changed if settled else -1
        room = _most_kept() - sum(map(len, self._rules.values()))
        kept: list[Rule] = []
        left_over: list[str] = []
        self._rules[directory], self._left_over[directory] = kept, left_over
        try:
            names = os.listdir(directory)
        except OSError as error:
            if error.errno in EXHAUSTED:
                self._unread, self._seen[directory] = error, -1
            return  # otherwise it is not there, or a file by now
        for name in names:
            path = directory.rstrip("/") + "/" + name
            if path in self._denied or path in self._seen or path == "/dev":
                continue
            if len(kept) >= room:
                left_over.append(path)
                continue
            try:
                made = _rule_if_there(path)
            except OSError:
                room = 0
                left_over.append(path)
                continue
            if made is not None:
                kept.append(made)


def _most_kept() -> int:
    """How many descriptors may stay open for rules."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (1 << 20 if limit == resource.RLIM_INFINITY else limit) - SPARE


def _rule_if_there(path: str) -> Rule | None:
    """A rule to read a path; None: it cannot be had, as it is gone, closed to us, or a symbolic link.

    :raises OSError: there are no descriptors left, which says nothing about the path."""
    try:
        return rule_for(path, READ)
    except OSError as error:
        if error.errno in EXHAUSTED:
            raise
        return None


def _parents(path: str) -> Iterable[str]:
    while path != "/":
        path = os.path.dirname(path)
        yield path


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def rule_for(path: str, rights: int, abi: int = 5) -> Rule:
    """A rule for a path; of the rights, those that its kind can have.

    :raises OSError: it is not there, or is a symbolic link."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if stat.S_ISLNK(mode):
        os.close(fd)
        raise OSError(f"{path} is a symbolic link")
    rights &= handled(abi)
    return Rule(rights if stat.S_ISDIR(mode) else rights & OF_FILES, fd)


def devices() -> list[str]:
    """The devices of this machine that flows may use."""
    try:
        with os.scandir("/dev") as entries:
            found = [entry for entry in entries if not entry.is_symlink()]
    except OSError:
        return []
    return [entry.path for entry in found if entry.name in DEVICES or entry.name.startswith(COMPUTING)]


class Ruleset:
    """What one process and all that it starts may do; nothing is allowed that is not said."""

    def __init__(self, abi: int, *, connect: Iterable[int] | None, bind: Iterable[int] | None) -> None:
        """``connect``, ``bind``: the TCP ports that are allowed; None: all.

        :raises OSError: the kernel has no Landlock, or cannot control ports."""
        self._abi = abi
        net = (CONNECT_TCP if connect is not None else 0) | (BIND_TCP if bind is not None else 0)
        if net and abi < PORTS_SINCE:
            raise OSError(f"Landlock {abi} of this kernel cannot control TCP ports, version 4 can")
        scopes = SCOPE_ABSTRACT_SOCKETS | SCOPE_SIGNALS if abi >= SCOPES_SINCE else 0
        known = struct.pack("=QQQ", handled(abi), net, scopes)
        size = 24 if abi >= SCOPES_SINCE else 16 if abi >= PORTS_SINCE else 8
        self._fd = checked(libc.syscall(CREATE_RULESET, known, ctypes.c_size_t(size), 0), "Landlock")
        for right, ports in ((CONNECT_TCP, connect), (BIND_TCP, bind)):
            for port in ports or ():
                packed = struct.pack("=QQ", right, port)
                checked(libc.syscall(ADD_RULE, self._fd, RULE_NET_PORT, packed, 0), f"Landlock, port {port}")

    def add(self, rules: Iterable[Rule]) -> None:
        """Allow what the rules say."""
        ruleset = self._fd
        for each in rules:
            if _syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, each.packed, 0) < 0:
                checked(-1, "Landlock, a rule")

    def allow(self, path: str, rights: int, *, exactly: bool = False) -> None:
        """Allow a path; ``exactly``: only if no link is on the way to it.

        :raises OSError: it is not there, or there is a link."""
        made = rule_for(path, rights, self._abi)
        try:
            if exactly and os.readlink(f"/proc/self/fd/{made.fd}") != path:
                raise OSError(f"{path} leads elsewhere by now")
            self.add([made])
        finally:
            os.close(made.fd)

    def enforce(self) -> None:
        """From now on, for this process and all that it starts, for ever. Needs no_new_privs."""
        checked(libc.syscall(RESTRICT_SELF, self._fd, 0), "Landlock")
        os.close(self._fd)

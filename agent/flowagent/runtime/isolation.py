"""Mounts and System V IPC of a run's own: what Landlock cannot do, where the kernel lets us do it cheaply.

Landlock does not see chmod, nor connecting to a unix socket; and what is left in ``/dev/shm`` or as System V
objects outlives its process. In a mount namespace in which everything but the run's own directory is
read-only and the sockets of services are covered, and in an IPC namespace, all of that is gone, with the
run's last process. It takes about half a millisecond, by root's rights or in a user namespace, and 10 µs more
for each socket.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence

from flowagent.runtime import credentials, linux

SOCKETS = (
    "/run/docker.sock",
    "/run/podman",
    "/run/containerd",
    "/run/crio",
    "/run/buildkit",
    "/run/snapd.socket",
    "/run/lxd.socket",
    "/run/libvirt",
    "/run/dbus/system_bus_socket",
    "/run/docker",
    "/run/cri-dockerd.sock",
    "/run/incus",
    "/run/supervisor.sock",
    "/run/screen",
    "/run/systemd/private",
    "/run/systemd/notify",
    "/run/systemd/io.system.ManagedOOM",
    "/run/user",
    "/tmp/.X11-unix",  # noqa: S108
    "/run/fail2ban",
    "/run/k3s",
    "/run/udev/control",
    "/var/lib/incus",
    "/var/lib/lxd",
    "/var/snap/lxd",
)
"""Where services listen that do what they are asked for by this user, outside of any sandbox. Others are
found by :class:`Bound`; these may have bound another name than the one that they are reached by, or be those
of another network namespace, as that of the host is to a container."""
OF_USERS = (".ssh", ".gnupg", ".docker/run", ".docker/desktop")
"""The same below the home of the agent's user: connections that ssh keeps open, agents, engines."""
TEMPORARY = ("/tmp/tmux-{uid}", "/tmp/ssh-*")  # noqa: S108
"""The same, by pattern: terminals that can be typed into, and ssh's agents."""
BOUND = "/proc/net/unix"
_PATH = re.compile(rb" (/(?!proc/).*)")  # below /proc/self/fd it would be one of ours
OF_EVERYBODY = (
    "/run/systemd/journal/dev-log",
    "/run/systemd/journal/socket",
    "/run/systemd/journal/stdout",
    "/run/systemd/userdb",
)
"""Never covered, unless they are named above: they take a line of the log, or tell the name of a user."""
OF_NAMES = (
    "/run/avahi-daemon/socket",
    "/run/nscd/socket",
    "/run/systemd/resolve/io.systemd.Resolve",
    "/var/lib/sss/pipes/nss",
)
"""Who looks up hosts, on the network; not covered for flows that have one."""
SHARED_MEMORY, TERMINALS = "/dev/shm", "/dev/pts"  # noqa: S108


def covered(environ: dict[str, str] | os._Environ[str]) -> list[str]:
    """Paths that flows must not reach on this machine: those of SOCKETS, and such as are there now."""
    import glob  # in the agent only

    found = [*SOCKETS, *(os.path.join(credentials.home(), name) for name in OF_USERS)]
    for pattern in TEMPORARY:
        found += glob.glob(pattern.format(uid=os.getuid()))
    for name in ("SSH_AUTH_SOCK", "DBUS_SESSION_BUS_ADDRESS", "DOCKER_HOST", "NOTIFY_SOCKET"):
        value = environ.get(name, "")
        path = value.partition("path=")[2].partition(",")[0] if "path=" in value else value
        path = path[len("unix://") :] if path.startswith("unix://") else path
        if path.startswith("/"):
            found.append(path)
    return sorted({os.path.realpath(path) for path in found})


class Bound:
    """The sockets of this network namespace that are bound to a path, whoever's they are."""

    def __init__(self) -> None:
        self._places: dict[bytes, str] = {}

    def look(self) -> Iterable[str]:
        """Where they are now; none if the kernel does not say. A path may be another's, or gone.

        It takes some 100 µs on a machine with 300 sockets, and 20 µs for each that was not there before."""
        known, self._places = self._places, {}
        try:
            for name in _PATH.findall(_read(BOUND)):
                self._places[name] = known.get(name) or os.path.realpath(os.fsdecode(name))
        except OSError:
            pass
        return self._places.values()


def _read(path: str) -> bytes:
    """All of a file, without the machinery of open(): what that touches of memory a run has for its own."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(fd, 1 << 16):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)


def isolate(
    directory: str,
    writable: Sequence[str],
    covered: Iterable[str],
    empty: str,
    memory: int | None = None,
) -> None:
    """Have mounts and IPC of this process' own: all read-only but ``directory``, ``writable`` and a new,
    empty ``/dev/shm`` of at most ``memory`` bytes; with terminals of its own, and with nothing behind the
    paths ``covered``: /dev/null in place of sockets, and the directory ``empty`` in place of directories.

    :raises OSError: the kernel or its configuration does not allow it."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
    else:
        linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open("/proc/self/" + name, "w") as file:
                file.write(text)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)
    kept = [directory, *writable]
    for path in kept:
        linux.mount(path, path, None, linux.MS_BIND | linux.MS_REC)
    for path in covered:
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            continue
        try:
            if stat.S_ISDIR(mode):
                linux.mount(empty, path, None, linux.MS_BIND)  # half the cost of a file system of its own
            elif stat.S_ISSOCK(mode):
                linux.mount("/dev/null", path, None, linux.MS_BIND)
        except FileNotFoundError:
            pass  # it is gone since
    linux.set_read_only("/", True)
    for path in kept:
        linux.set_read_only(path, False)
    size = "" if memory is None else f",size={memory}"
    for kind, path, flags, options in (
        ("tmpfs", SHARED_MEMORY, linux.MS_NOSUID | linux.MS_NODEV, "mode=1777" + size),
        ("devpts", TERMINALS, linux.MS_NOSUID, "newinstance,ptmxmode=666,mode=600"),
    ):
        try:
            linux.mount(kind, path, kind, flags, options)
        except FileNotFoundError:
            pass


def possible(directory: str) -> str | None:
    """None if :func:`isolate` works for a process of this user; else why not, in a few words."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            linux.prctl(linux.PR_SET_DUMPABLE, 1)
            isolate(directory, (), (), "")
        except OSError as error:
            os.write(write, (error.strerror or str(error)).encode()[:200])
        finally:
            os._exit(0)
    os.close(write)
    why = b""
    while piece := os.read(read, 200):
        why += piece
    os.close(read)
    os.waitpid(pid, 0)
    return why.decode() or None

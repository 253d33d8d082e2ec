"""The kernel and the machine: devices, mounts, modules, calls that go past filters."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import socket
import subprocess
import termios

from . import World, checked, libc, opens, probe

ROOT_ONLY = "at level process root stays root: use --run-as"
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x00020000
BPF, PERF_EVENT_OPEN, IO_URING_SETUP, USERFAULTFD, OPEN_TREE, MOUNT_SETATTR = 321, 298, 425, 323, 428, 442
INIT_MODULE, KEXEC_LOAD, SWAPON, REBOOT = 175, 246, 167, 169
OWN_NAMESPACE = (
    "it concerns a namespace that nobody else sees; the files in it stay those that the level allows"
)


def _become_root() -> None:
    """Root, with all capabilities, of a new user namespace."""
    uid = os.getuid()
    checked(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare")
    with open("/proc/self/setgroups", "w") as file:
        file.write("deny")
    with open("/proc/self/uid_map", "w") as file:
        file.write(f"0 {uid} 1")


@probe("a mount, by capabilities of a user namespace of one's own", "ABB", why=OWN_NAMESPACE)
def mount(world: World) -> bool:
    _become_root()
    os.mkdir("mounted")
    checked(libc.mount(b"none", b"mounted", b"tmpfs", ctypes.c_ulong(0), None), "mount")
    return True


@probe(
    "taking away what covers a path, or its being read-only, in a user namespace of one's own",
    "BBB",
    everywhere=False,
)
def uncovering(world: World) -> bool:
    _become_root()
    for path in (b"/run/user", b"/dev/shm", world.home.encode()):
        if libc.umount2(path, 2) == 0:
            return os.path.exists("/run/user/mark-of-outside")
    attributes = (ctypes.c_uint64 * 4)(0, 1, 0, 0)  # take MOUNT_ATTR_RDONLY away
    if libc.syscall(MOUNT_SETATTR, -100, b"/", 0x8000, attributes, ctypes.c_size_t(32)) != 0:
        return checked(-1, "umount, mount_setattr") == 0
    path = world.user_home + "/.bashrc"
    os.chmod(path, os.stat(path).st_mode & 0o7777)
    return False


@probe(
    "a secret file by a detached copy of its mount (open_tree), in a user namespace",
    "VBB",
    run_as="BBB",
    why="at level process the file is open anyway",
)
def detached_mount(world: World) -> bool:
    _become_root()
    tree = checked(
        libc.syscall(OPEN_TREE, -100, (world.home + "/secrets").encode(), 1 | 0o2000000), "open_tree"
    )
    os.close(os.open("TOKEN", os.O_RDONLY, dir_fd=tree))
    return True


@probe(
    "chroot and pivot_root in a user namespace, to read what is closed",
    "VBB",
    run_as="BBB",
    why="at level process the file is open anyway",
)
def chroot(world: World) -> bool:
    _become_root()
    os.chroot(world.home)
    return opens("/secrets/TOKEN")


@probe("mounts on the machine", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def mount_on_the_machine(world: World) -> bool:
    os.makedirs("there", exist_ok=True)
    checked(libc.mount(b"none", b"there", b"tmpfs", ctypes.c_ulong(0), None), "mount")
    checked(libc.umount2(b"there", 2), "umount")
    return True


@probe("chroot", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def chroot_as_it_is(world: World) -> bool:
    os.chroot("/")
    return True


@probe("any capability at all", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def capabilities(world: World) -> bool:
    with open("/proc/self/status") as file:
        sets = dict(line.split(":") for line in file if line.startswith("Cap"))
    return any(int(sets[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"))


@probe("capabilities that come back with execve as root", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def capabilities_after_exec(world: World) -> bool:
    text = subprocess.run(["grep", "CapEff", "/proc/self/status"], capture_output=True, text=True).stdout
    return bool(int(text.split()[1], 16))


@probe("becoming another user by a setuid program", "BBB", everywhere=False)
def setuid_program(world: World) -> bool:
    done = subprocess.run([world.setuid, "-u"], capture_output=True, text=True)
    return done.stdout.strip() == "0" and os.getuid() != 0


@probe("becoming another user: setuid(2), setgroups(2)", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def becoming_another_user(world: World) -> bool:
    os.setgroups([])
    os.setresuid(61899, 61899, 61899)
    return True


@probe("kernel settings in /proc/sys", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def kernel_settings(world: World) -> bool:
    return opens("/proc/sys/kernel/core_pattern", os.O_WRONLY)


@probe("devices by /sys", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def devices_by_sys(world: World) -> bool:
    return opens(
        "/sys/kernel/uevent_helper"
        if os.path.exists("/sys/kernel/uevent_helper")
        else "/sys/kernel/mm/transparent_hugepage/enabled",
        os.O_WRONLY,
    )


@probe(
    "memory of the machine: /dev/mem, /dev/kmem, /proc/kcore, /dev/port",
    "BBB",
    root="VBB",
    run_as="BBB",
    why=ROOT_ONLY,
    everywhere=False,
)
def memory_of_the_machine(world: World) -> bool:
    reached = []
    for path in ("/proc/kcore", "/dev/mem", "/dev/kmem", "/dev/port"):
        try:
            reached.append(opens(path))
        except OSError as error:
            problem = error
    if not any(reached):
        raise problem
    return True


@probe("disks: block devices", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY, everywhere=False)
def block_devices(world: World) -> bool:
    names = [name for name in os.listdir("/sys/block") if os.path.exists("/dev/" + name)]
    disk = next((name for name in names if not name.startswith(("loop", "ram", "zram"))), "loop0")
    return opens("/dev/" + disk)


@probe("making a device node", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def device_node(world: World) -> bool:
    os.mknod("node", 0o600 | 0o020000, os.makedev(1, 3))
    return True


@probe("the log of the kernel", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY, everywhere=False)
def kernel_log(world: World) -> bool:
    return checked(libc.klogctl(3, ctypes.create_string_buffer(64), 64), "syslog") >= 0


def _refused(number: int, *arguments: object) -> bool:
    """Whether a privileged call with nonsense for arguments got further than being refused."""
    result = libc.syscall(number, *arguments)
    code = ctypes.get_errno()
    return bool(result >= 0 or code not in (1, 13, 38))


@probe("loading kernel modules, kexec, swap, reboot", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def rule_over_the_machine(world: World) -> bool:
    return any(
        [
            _refused(INIT_MODULE, None, ctypes.c_ulong(0), None),
            _refused(KEXEC_LOAD, ctypes.c_ulong(0), ctypes.c_ulong(1000), None, ctypes.c_ulong(0)),
            _refused(SWAPON, b"/nonexistent", 0),
            _refused(REBOOT, 0, 0, 0, None),
        ]
    )


@probe("BPF programs, performance counters, io_uring, userfaultfd", "BBB")
def risky_calls(world: World) -> bool:
    return any(
        [
            _refused(BPF, 0, None, 0),
            _refused(PERF_EVENT_OPEN, ctypes.c_void_p(8), 0, -1, -1, ctypes.c_ulong(0)),
            _refused(IO_URING_SETUP, 1, ctypes.create_string_buffer(120)),
            _refused(USERFAULTFD, 1),
        ]
    )


@probe("system calls of 32 bits and of the x32 ABI, past the filter", "BBB")
def other_calling_conventions(world: World) -> bool:
    if platform.machine() != "x86_64":
        return False
    if libc.syscall(0x40000000 + KEYRING_PROBE, 0) >= 0:
        return True
    # mov eax, 20 (getpid); int 0x80; ret
    code = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    result: int = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
    return result == os.getpid()


KEYRING_PROBE = 39  # getpid, which no filter refuses by its own number


@probe("typing into a terminal (TIOCSTI) and pasting (TIOCLINUX)", "BBB")
def typing_into_a_terminal(world: World) -> bool:
    _, follower = os.openpty()
    os.setsid()
    fcntl.ioctl(follower, termios.TIOCSCTTY, 0)
    fcntl.ioctl(follower, termios.TIOCSTI, b"x")
    return True


@probe("a terminal of its own, such as pexpect needs", "AAA", why="nobody else sees it")
def own_terminal(world: World) -> bool:
    leader, follower = os.openpty()
    os.write(leader, b"x\n")
    return os.read(follower, 2) == b"x\n"


@probe("raw sockets and packets of the machine", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def raw_sockets(world: World) -> bool:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
    return True


@probe("changing the network of the machine", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def network_of_the_machine(world: World) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = b"lo".ljust(16, b"\0") + (1500).to_bytes(4, "little") + bytes(20)
        current = fcntl.ioctl(control, 0x8921, request)  # SIOCGIFMTU
        fcntl.ioctl(control, 0x8922, current)  # SIOCSIFMTU
    return True

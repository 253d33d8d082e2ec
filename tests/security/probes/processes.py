"""Processes outside: signals, limits, priorities, and what is left behind in the kernel."""

from __future__ import annotations

import ctypes
import os
import signal
import struct

from . import World, agent, checked, launcher, libc, probe, supervisor, victim

SAME_USER = "at level process the user's processes can be signalled: use --run-as or a higher level"
ROOT_ONLY = "at level process root stays root: use --run-as"
PRLIMIT, IOPRIO_SET, SCHED_SETSCHEDULER, SCHED_SETATTR = 302, 251, 144, 314
MSGGET, SHMGET, SEMGET, MQ_OPEN, ADD_KEY, KEYCTL = 68, 29, 64, 240, 248, 250
PIDFD_OPEN, PIDFD_SEND_SIGNAL = 434, 424
IPC_CREAT, IPC_PRIVATE, IPC_RMID = 0o1000, 0, 0


def _signals(pid: int) -> bool:
    os.kill(pid, signal.SIGCONT)  # says nothing to a process that runs
    return True


@probe("signals to the agent", "VBB", run_as="BBB", why=SAME_USER)
def signal_to_the_agent(world: World) -> bool:
    return _signals(agent())


@probe("signals to the launcher", "VBB", run_as="BBB", why=SAME_USER)
def signal_to_the_launcher(world: World) -> bool:
    return _signals(launcher())


@probe("signals to the supervisor", "VBB", run_as="BBB", why=SAME_USER)
def signal_to_the_supervisor(world: World) -> bool:
    return _signals(supervisor())


@probe("signals to another run", "VBB", why=SAME_USER)
def signal_to_another_run(world: World) -> bool:
    return _signals(victim())


@probe("signals by pidfd and to threads (tgkill)", "VBB", why=SAME_USER)
def signal_by_other_ways(world: World) -> bool:
    pid = victim()
    pidfd = checked(libc.syscall(PIDFD_OPEN, pid, 0), "pidfd_open")
    results = [
        libc.syscall(PIDFD_SEND_SIGNAL, pidfd, signal.SIGCONT, None, 0),
        libc.syscall(234, pid, pid, signal.SIGCONT),
    ]
    return 0 in results or checked(results[0], "signal") == 0


FILTERED = "a filter refuses it for all processes but the own"


@probe("limits of the agent (prlimit)", "BBB")
def limits_of_the_agent(world: World) -> bool:
    return _limits(agent())


@probe("limits of another run (prlimit)", "BBB")
def limits_of_another_run(world: World) -> bool:
    return _limits(victim())


def _limits(pid: int) -> bool:
    old = ctypes.create_string_buffer(16)
    checked(libc.syscall(PRLIMIT, pid, 7, None, old), "prlimit, to ask")
    return checked(libc.syscall(PRLIMIT, pid, 7, old, None), "prlimit") == 0


@probe("priority of the agent (renice)", "BBB")
def priority_of_the_agent(world: World) -> bool:
    pid = agent()
    os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid))
    return True


@probe("priority of all processes of the user, or of a group", "BBB")
def priority_of_all(world: World) -> bool:
    os.setpriority(os.PRIO_USER, os.getuid(), os.getpriority(os.PRIO_USER, os.getuid()))
    return True


@probe("CPUs of the agent (sched_setaffinity)", "BBB")
def cpus_of_the_agent(world: World) -> bool:
    pid = agent()
    os.sched_setaffinity(pid, os.sched_getaffinity(pid))
    return True


@probe("scheduling of the agent (SCHED_IDLE, ionice)", "BBB")
def scheduling_of_the_agent(world: World) -> bool:
    pid = agent()
    ways = [
        lambda: libc.syscall(SCHED_SETSCHEDULER, pid, 0, ctypes.byref(ctypes.c_int(0))),
        lambda: libc.syscall(SCHED_SETATTR, pid, struct.pack("=IIQiIQQQ", 48, 0, 0, 0, 0, 0, 0, 0), 0),
        lambda: libc.syscall(IOPRIO_SET, 1, pid, 0),
    ]
    for way in ways:
        if way() == 0:
            return True
    return checked(-1, "sched_setscheduler, sched_setattr, ioprio_set") == 0


@probe("its own priority, CPUs and limits, to lower them", "AAA", why="it concerns the run alone")
def own_scheduling(world: World) -> bool:
    os.nice(1)
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    return _limits(0)


@probe("System V shared memory, semaphores and queues that stay behind", "BBB")
def system_v_that_stays(world: World) -> bool:
    made = [libc.syscall(SHMGET, 0x70726F62, 4096, IPC_CREAT | 0o600)]
    if made[0] < 0:
        return checked(made[0], "shmget") >= 0
    outside = os.readlink("/proc/self/ns/ipc") == world.ipc_namespace
    libc.shmctl(made[0], IPC_RMID, None)
    return outside


@probe("POSIX message queues that stay behind", "BBB")
def message_queue_that_stays(world: World) -> bool:
    name = b"probe"
    checked(libc.syscall(MQ_OPEN, name, os.O_CREAT | os.O_RDWR, 0o600, None), "mq_open")
    libc.syscall(MQ_OPEN + 1, name)
    return os.readlink("/proc/self/ns/ipc") == world.ipc_namespace


@probe("keyrings that all processes of a user share (add_key, keyctl)", "BBB")
def keyrings(world: World) -> bool:
    user_keyring = -4
    key = libc.syscall(ADD_KEY, b"user", b"probe", b"x", ctypes.c_size_t(1), user_keyring)
    if key >= 0:
        libc.syscall(KEYCTL, 9, key, user_keyring)
    return checked(key, "add_key") >= 0


@probe("descriptors inherited from launcher and supervisor", "BBB", everywhere=False)
def inherited_descriptors(world: World) -> bool:
    """All that there may be: the streams, and of this flow's own the outcome, a copy of the output and the
    pipe of this probe."""
    known = ("pipe:", "/dev/null", "anon_inode:", "/proc/")
    alien = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink("/proc/self/fd/" + name)
        except OSError:
            continue
        if not target.startswith(known) and os.path.basename(target) not in ("output", "outcome"):
            alien.append(target)
    return bool(alien)


@probe("children of other runs: being their parent or group", "BBB", everywhere=False)
def process_group_of_another_run(world: World) -> bool:
    os.setpgid(0, victim())
    return True


@probe("the OOM score of the agent", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def oom_score_of_the_agent(world: World) -> bool:
    path = f"/proc/{agent()}/oom_score_adj"
    with open(path) as file:
        score = file.read()
    with open(path, "w") as file:
        file.write(score)
    return True


@probe(
    "control groups: leaving its own, or lifting its limits", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY
)
def control_groups(world: World) -> bool:
    for directory in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"):
        path = directory + "/cgroup.procs"
        if os.path.exists(path):
            os.close(os.open(path, os.O_WRONLY))
            return True
    return False

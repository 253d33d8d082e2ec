"""What belongs to the agent, to its user or to other runs, and is not to be read."""

from __future__ import annotations

import ctypes
import os

from . import World, agent, checked, launcher, libc, opens, probe, supervisor, victim

SAME_USER = "the same user may read it; Landlock or another user is what keeps it apart"
ROOT_IS_ROOT = "at level process root stays root: use --run-as"
PTRACE_SEIZE = 0x4206
PROCESS_VM_READV, PIDFD_OPEN, PIDFD_GETFD, KCMP = 310, 434, 438, 312


def _reads(path: str) -> bool:
    with open(path, "rb") as file:
        return bool(file.read(64))


@probe("environment of the agent: /proc/PID/environ", "BBB", root="VBB", run_as="BBB", why=ROOT_IS_ROOT)
def environment_of_the_agent(world: World) -> bool:
    return _reads(f"/proc/{agent()}/environ")


@probe("environment of the launcher", "BBB", root="VBB", run_as="BBB", why=ROOT_IS_ROOT)
def environment_of_the_launcher(world: World) -> bool:
    return _reads(f"/proc/{launcher()}/environ")


@probe("environment of another run, with the variables that it was given", "VBB", why=SAME_USER)
def environment_of_another_run(world: World) -> bool:
    return _reads(f"/proc/{victim()}/environ")


@probe("memory of the agent: /proc/PID/mem", "BBB", root="VBB", run_as="BBB", why=ROOT_IS_ROOT)
def memory_of_the_agent(world: World) -> bool:
    with open(f"/proc/{agent()}/maps") as maps:
        start = int(next(line for line in maps if " r" in line).split("-")[0], 16)
    with open(f"/proc/{agent()}/mem", "rb", buffering=0) as file:
        file.seek(start)
        return bool(file.read(16))


@probe("memory of another run, with its secrets", "VBB", why=SAME_USER)
def memory_of_another_run(world: World) -> bool:
    with open(f"/proc/{victim()}/maps") as maps:
        start = int(next(line for line in maps if " r" in line).split("-")[0], 16)
    with open(f"/proc/{victim()}/mem", "rb", buffering=0) as file:
        file.seek(start)
        return bool(file.read(16))


def _reads_memory_of(pid: int) -> bool:
    """process_vm_readv(2) at an address that is not there: EFAULT says that it would have been allowed."""
    buffer = ctypes.create_string_buffer(8)
    local = (ctypes.c_void_p * 2)(ctypes.cast(buffer, ctypes.c_void_p), ctypes.c_void_p(8))
    remote = (ctypes.c_void_p * 2)(ctypes.c_void_p(8), ctypes.c_void_p(8))
    one, flags = ctypes.c_ulong(1), ctypes.c_ulong(0)  # of an int on the stack, half would be anything
    result = libc.syscall(PROCESS_VM_READV, pid, local, one, remote, one, flags)
    return bool(result >= 0 or ctypes.get_errno() == 14)


@probe("process_vm_readv on the agent", "BBB", root="VBB", run_as="BBB", why=ROOT_IS_ROOT)
def process_vm_readv(world: World) -> bool:
    return _reads_memory_of(agent())


@probe("process_vm_readv on another run", "VBB", why=SAME_USER)
def process_vm_readv_on_another_run(world: World) -> bool:
    return _reads_memory_of(victim())


def _traces(pid: int) -> bool:
    return checked(libc.ptrace(PTRACE_SEIZE, pid, None, None), "ptrace") == 0


@probe("ptrace of the agent", "BBB", root="VBB", run_as="BBB", why=ROOT_IS_ROOT)
def ptrace_of_the_agent(world: World) -> bool:
    return _traces(agent())


@probe("ptrace of the supervisor", "BBB", root="VBB", run_as="BBB", why=ROOT_IS_ROOT)
def ptrace_of_the_supervisor(world: World) -> bool:
    return _traces(supervisor())


@probe("ptrace of another run", "VBB", why=SAME_USER)
def ptrace_of_another_run(world: World) -> bool:
    return _traces(victim())


@probe("an open file of the agent by pidfd_getfd", "BBB", root="VBB", run_as="BBB", why=ROOT_IS_ROOT)
def descriptor_of_the_agent(world: World) -> bool:
    pidfd = checked(libc.syscall(PIDFD_OPEN, agent(), 0), "pidfd_open")
    return checked(libc.syscall(PIDFD_GETFD, pidfd, 2, 0), "pidfd_getfd") >= 0


@probe("an open file of another run by /proc/PID/fd", "VBB", why=SAME_USER)
def descriptor_of_another_run(world: World) -> bool:
    return bool(os.readlink(f"/proc/{victim()}/fd/1"))


@probe(
    "the file system through /proc/PID/root of a process outside",
    "BBB",
    root="VBB",
    run_as="BBB",
    why=ROOT_IS_ROOT,
)
def root_of_the_agent(world: World) -> bool:
    return bool(os.listdir(f"/proc/{agent()}/root/"))


@probe(
    "command lines of processes outside",
    "VVB",
    why="the kernel shows them to everybody; nothing secret belongs there, and flowagent puts nothing there",
)
def command_lines(world: World) -> bool:
    return agent() > 0


OWN_FILES = "at level process a flow reads what its user may read: use --run-as or a higher level"


@probe("the agent's database", "VBB", run_as="BBB", why=OWN_FILES)
def database(world: World) -> bool:
    return opens(world.home + "/flowagent.db")


@probe("the agent's secrets directory", "VBB", run_as="BBB", why=OWN_FILES)
def secrets_directory(world: World) -> bool:
    return opens(world.home + "/secrets/TOKEN")


@probe("the key of the agent's launchers", "VBB", run_as="BBB", why=OWN_FILES)
def launchers_key(world: World) -> bool:
    return opens(world.agent_directory + "/launchers/key")


@probe("results of other runs", "VBB", run_as="BBB", why=OWN_FILES)
def results(world: World) -> bool:
    return opens(world.home + "/results/of-another")


@probe(
    "pickles of other flows, before and after they are in the source cache",
    "VBB",
    run_as="BBB",
    why=OWN_FILES,
)
def pickles(world: World) -> bool:
    return opens(world.other_pickle)


@probe("output of another run", "VBB", run_as="BBB", why=OWN_FILES)
def output_of_another_run(world: World) -> bool:
    return opens(world.victim_directory + "/output")


@probe("parameters of another run: its spec.json", "VBB", run_as="BBB", why=OWN_FILES)
def spec_of_another_run(world: World) -> bool:
    return opens(world.victim_directory + "/spec.json")


@probe(
    "files of another run",
    "VBB",
    why="at level process, runs of one user read each other's files if they know the path",
)
def files_of_another_run(world: World) -> bool:
    return opens(world.victim_directory + "/work/diary")


@probe(
    "names in the agent's directories",
    "VVB",
    run_as="BBB",
    why="Landlock opens directories to be listed, so that searching the file system works; "
    "what is in the files stays closed",
)
def names_of_secrets(world: World) -> bool:
    return "TOKEN" in os.listdir(world.home + "/secrets")


def _reads_credentials(path: str) -> bool:
    return opens(path)


@probe("keys in ~/.ssh of the agent's user", "VBB", run_as="BBB", why=OWN_FILES)
def ssh_key(world: World) -> bool:
    return _reads_credentials(world.user_home + "/.ssh/id_ed25519")


@probe("credentials in ~/.aws", "VBB", run_as="BBB", why=OWN_FILES)
def aws_credentials(world: World) -> bool:
    return _reads_credentials(world.user_home + "/.aws/credentials")


@probe("passwords in ~/.netrc, ~/.pgpass and ~/.git-credentials", "VBB", run_as="BBB", why=OWN_FILES)
def passwords(world: World) -> bool:
    names = (".netrc", ".pgpass", ".git-credentials")
    return any(_reads_credentials(f"{world.user_home}/{name}") for name in names)


@probe(
    "the same file by another name: a symbolic link, .., /proc/self/root", "VBB", run_as="BBB", why=OWN_FILES
)
def by_other_names(world: World) -> bool:
    os.symlink(world.user_home + "/.ssh", "link")
    names = [
        f"{world.user_home}/.aws/../.ssh/id_ed25519",
        f"/proc/self/root{world.user_home}/.ssh/id_ed25519",
    ]
    reached = []
    for name in ["link/id_ed25519", *names]:
        try:
            reached.append(opens(name))
        except PermissionError as error:
            problem = error
    os.unlink("link")
    if not any(reached):
        raise problem
    return True


@probe(
    "keys in ~/.ssh of the user that --run-as names",
    "BBB",
    root="VBB",
    run_as="VBB",
    why="at level process a flow is that user; an agent that is root reads files of all users",
)
def key_of_the_flows_user(world: World) -> bool:
    return _reads_credentials(world.flows_home + "/.ssh/id_ed25519")


@probe("/etc/shadow", "BBB", root="VBB", run_as="BBB", why=ROOT_IS_ROOT)
def shadow(world: World) -> bool:
    return opens("/etc/shadow")


@probe("what a terminal of the agent's user shows and takes: /dev/pts/N", "VBB", run_as="BBB", why=OWN_FILES)
def terminal(world: World) -> bool:
    fd = os.open(world.terminal, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        return os.fstat(fd).st_rdev == world.terminal_device
    finally:
        os.close(fd)

"""The flows that a stage runs: they carry the probes, and do what a bomb or a survivor does."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

sys.dont_write_bytecode = True
import probes
import probes.environment
import probes.files
import probes.forgery
import probes.kernel
import probes.network
import probes.processes
import probes.secrets
import probes.sockets

from flowagent import context, flow
from flowagent.results import LocalResult
from flowagent.run_configs import LocalRun
from flowagent.storage import Local

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "site.json")) as _file:
    SITE = json.load(_file)


@flow
def batch(world: dict) -> None:
    probes.run_all(world, ("secrets", "files", "processes", "kernel", "sockets", "forgery", "environment"))


@flow(run_config=LocalRun(network=False))
def offline(world: dict) -> None:
    probes.run_all(world, ("network.none",))


@flow(run_config=LocalRun(network={"connect": [SITE["port"]]}))
def ports(world: dict) -> None:
    probes.run_all(world, ("network.ports",))


@flow(secrets=["TOKEN"])
def earlier(marker: str) -> None:
    """A run before the others, by the same supervisor; and the one whose secrets are looked for."""


@flow(secrets=["TOKEN"])
def victim(marker: str) -> None:
    with open("diary", "w") as file:
        file.write("private")
    subprocess.Popen(["sleep", "600"])
    print("PROBE " + json.dumps({"victim": os.getcwd()}), flush=True)
    time.sleep(600)


# -- limits: each prints "too far" if it was not stopped --------------------------------------------------


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
    read, write = os.pipe()
    for _ in range(8):
        if os.fork() == 0:
            hoard = bytearray(os.urandom(1 << 20) * 40)
            os.write(write, b"x")
            time.sleep(600)
            del hoard
    os.set_blocking(read, False)
    done, end = 0, time.monotonic() + 20
    while time.monotonic() < end:  # until each of them has what it wanted or is dead
        time.sleep(0.2)
        with suppress(BlockingIOError):
            done += len(os.read(read, 8))
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
        if done >= len([pid for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == os.getpid()]):
            break
    alive = [pid for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == os.getpid()]
    if len(alive) > 2:  # the kernel kills some, where there are control groups
        _too_far()


def _parent(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


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
    file = open("gone", "wb")
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


# -- surviving the end of the run ----------------------------------------------------------------------------


def _named(name: str) -> None:
    with open("/proc/self/comm", "w") as file:
        file.write(name)


@flow
def daemon() -> None:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            _named("fa-daemon")
            os.closerange(0, 100)
            os.execve(sys.executable, ["fa-daemon", "-c", "open('/proc/self/comm', 'w').write('fa-daemon'); "
                      "import time; time.sleep(600)"], {})  # fmt: skip
        os._exit(0)
    time.sleep(0.3)


@flow
def reforker() -> None:
    """A daemon that is never the same process for long."""
    if os.fork() == 0:
        os.setsid()
        _named("fa-reforker")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.closerange(0, 100)
        end = time.monotonic() + 40  # should it survive, it does not do so for ever
        while time.monotonic() < end:
            if os.fork() != 0:
                os._exit(0)
            os.setsid()
    time.sleep(0.2)


@flow
def swarm() -> None:
    """Many of those at once."""
    for _ in range(8):
        if os.fork() == 0:
            _named("fa-swarm")
            end = time.monotonic() + 40
            while time.monotonic() < end:
                if os.fork() != 0:
                    os._exit(0)
                os.setsid()
    time.sleep(0.2)


@flow
def mounter() -> None:
    probes.kernel._become_root()
    os.mkdir("mounted")
    probes.libc.mount(b"none", b"mounted", b"tmpfs", ctypes.c_ulong(0), None)


# -- forging -------------------------------------------------------------------------------------------------


@flow(result=LocalResult())
def cheat() -> str:
    """Results that are something else, or are to be somewhere else."""
    results = os.path.join(os.getcwd(), "results")
    os.makedirs(results, exist_ok=True)
    token = SITE["home"] + "/secrets/TOKEN"
    for number, make in enumerate((os.symlink, os.link), 101):
        try:
            make(token, f"{results}/{number}")
        except OSError:
            open(f"{results}/{number}", "w").close()
    os.mkfifo(f"{results}/103")
    with open(f"{results}/104", "w") as file:
        file.write("forged-result")
    for name, location in (
        ("101", "stolen-1"), ("102", "stolen-2"), ("103", "fifo"), ("../104", "x"),
        ("104", "../../../forged-result"), ("104", SITE["home"] + "/secrets/FORGED"),
    ):  # fmt: skip
        event = {"event": "result", "task": "", "file": name, "serializer": "pickle", "location": location}
        os.write(1, b"\x1e" + json.dumps({**event, "time": time.time()}).encode() + b"\n")
    return "own"


@flow(result=LocalResult(dir=SITE["user_home"], location="forged-by-declaration"))
def misplaced() -> str:
    return "written by the agent, outside of any sandbox"


@flow
def forger() -> None:
    """Another run's state, by events that name it and by words that are nobody's."""
    for event in ("state", "outcome", "ended", "task", "loaded"):
        forged = {"event": event, "run_id": SITE["marker"], "task": "forged", "state": "failed", "pid": 1}
        os.write(1, b"\x1e" + json.dumps({**forged, "time": time.time()}).encode() + b"\n")
    directory = os.path.dirname(os.getcwd())
    for name, text in (("status", '{"ended": true, "exit_code": 9, "pid": 1}\n'), ("lease", "9" * 31 + "\n")):
        try:
            with open(f"{directory}/{name}", "a" if name == "status" else "r+") as file:
                file.write(text)
        except OSError:
            continue


# -- demands ---------------------------------------------------------------------------------------------------


@flow(run_config=LocalRun(sandbox="process"))
def humble() -> None:
    print("level", context.get("flow_name"), flush=True)


@flow(run_config=LocalRun(write=[SITE["user_home"] + "/.ssh"]))
def greedy() -> None:
    print("too far")


@flow(run_config=LocalRun(write=[SITE["shared"] + "/link/secrets"]))
def roundabout() -> None:
    print("too far")


def _interpreted(name: str, python: str) -> object:
    def interpreted() -> None:
        print("too far")

    interpreted.__name__ = name
    return flow(run_config=LocalRun(python=python))(interpreted)


python_in_source = _interpreted("python_in_source", SITE["script_directory"] + "/evil/bin/python")
python_in_home = _interpreted("python_in_home", SITE["home"] + "/sources/evil-python")
python_in_shared = _interpreted("python_in_shared", SITE["shared"] + "/venv/bin/python")
python_of_others = _interpreted("python_of_others", SITE["open"] + "/python")


@flow(run_config=LocalRun(preload=["hostile_module"]))
def hostile_preload() -> None:
    print("too far")


# -- pickles -----------------------------------------------------------------------------------------------------


@flow(storage=Local())
def pickled() -> None:
    print("too far")


class Explosive:
    """Code that is executed when it is loaded: it says how confined it is."""

    def __reduce__(self) -> tuple:
        return (os.system, ("grep -e NoNewPrivs -e Seccomp: /proc/self/status",))


CHARGE = Explosive()


@flow(storage=Local())
def explosive() -> None:
    print("loaded", CHARGE)

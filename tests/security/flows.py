"""The flows that a stage runs: they carry the probes, and do what a bomb or a survivor does."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

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


def _greet(server: socket.socket) -> None:
    while True:
        server.accept()[0].sendall(b"hello")


@flow(secrets=["TOKEN"])
def victim(marker: str) -> None:
    with open("diary", "w") as file:
        file.write("private")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.getcwd() + "/socket")
        server.listen()
        threading.Thread(target=_greet, args=[server.dup()], daemon=True).start()
    subprocess.Popen(["sleep", "600"])
    print("PROBE " + json.dumps({"victim": os.getcwd()}), flush=True)
    time.sleep(600)


# -- surviving the end of the run ------------------------------------------------------------------


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


# -- forging ---------------------------------------------------------------------------------------


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


# -- demands ---------------------------------------------------------------------------------------


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


# -- pickles ---------------------------------------------------------------------------------------


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

"""What an agent costs while nobody asks anything of it, and how soon it is there.

    python benchmarks/service.py [--rounds 10] [--hours 24] [--faster 1000] [--idle 60]

Start: from starting the process to READY=1 at a socket such as systemd's, against an empty Python and one
that imports asyncio and sqlite3, in the same run; and the CPU time of it, which others change less.

A day: an agent does in ``hours / faster`` what it does in ``hours``. All its clocks (polling, renewals,
signs of life, looks for lost leases, loop lag, scrapes every 15 s) run faster by that factor, on a real
store, so that the number of everything is that of a day. Its CPU time, divided by the day, is the share
of a core; its memory is looked at in the beginning and at the end. As a busy process finds its caches
warm, an idle agent is measured for ``idle`` seconds as well, by the real clock."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

COMMAND = [sys.executable, "-m", "flowagent", "start", "--log-format", "json"]
FASTER = """\
import sys
from flowagent.daemon import agent, operations, pulse
from flowagent.cli import main
factor = float(sys.argv.pop(1))
agent.ANNOUNCE_EVERY /= factor
agent.EXPIRE_EVERY /= factor
operations.STATUS_EVERY /= factor
pulse.LOOK_EVERY /= factor
sys.argv += ["--poll", f"{5 / factor:.6f}", "--lease", f"{30 / factor:.6f}"]
main()
"""
SCRAPE_EVERY = 15.0


def row(name: str, value: float, unit: str, aim: str = "") -> None:
    print(f"{name:64} {value:9.3f} {unit:6} {aim}", flush=True)


@contextmanager
def agent(root: Path, command: list[str], **environ: str) -> Iterator[tuple[psutil.Process, float]]:
    """An agent that is ready, and how many seconds that took."""
    path = root / "notify.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(60)
        environment = {
            **os.environ,
            "FLOWAGENT_HOME": str(root / "home"),
            "NOTIFY_SOCKET": str(path),
            **environ,
        }
        with open(root / "log", "wb") as log:
            began = time.perf_counter()
            process = subprocess.Popen(command, env=environment, stderr=log)
            while b"READY=1" not in manager.recv(4096):
                pass
            took = time.perf_counter() - began
    try:
        yield psutil.Process(process.pid), took
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def took(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - began


def starts(root: Path, rounds: int) -> None:
    python, imports, ours, cpu = [], [], [], []
    for _ in range(rounds):
        python.append(took([sys.executable, "-c", "pass"]))
        imports.append(took([sys.executable, "-c", "import asyncio, sqlite3"]))
        with agent(root, COMMAND) as (process, seconds):
            cpu.append(spent(process))
            ours.append(seconds)
            time.sleep(0.3)  # its launcher comes up meanwhile, and is no part of it
    floor = statistics.median(python)
    row("python -c pass, p50", floor * 1000, "ms")
    row("python -c 'import asyncio, sqlite3', p50", statistics.median(imports) * 1000, "ms")
    row("start to ready, p50", statistics.median(ours) * 1000, "ms", "aim: 300")
    row("CPU of it, p50", statistics.median(cpu) * 1000, "ms")
    row("start to ready, best", min(ours) * 1000, "ms")
    row("ratio to an empty Python", statistics.median(ours) / floor, "x")


def spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def memory(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 1e6


def day(root: Path, hours: float, faster: float, port: int | None) -> None:
    name = "a day" if port is None else "a day with health, scraped every 15 s"
    options = [] if port is None else ["--health-address", f"127.0.0.1:{port}"]
    command = [sys.executable, "-c", FASTER, str(faster), "start", "--log-format", "json", *options]
    with agent(root, command) as (process, _):
        time.sleep(1)
        before, begin = spent(process), memory(process)
        seen = ""
        end = time.monotonic() + hours * 3600 / faster
        while (left := end - time.monotonic()) > 0:
            if port is None:
                time.sleep(left)
            else:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                    seen = answer.read().decode()
                time.sleep(SCRAPE_EVERY / faster)
        cpu = spent(process) - before
        row(f"{name}: CPU", cpu, "s")
        row(f"{name}: share of a core", cpu / (hours * 3600) * 100, "%", "aim: 0.2")
        if port is not None:
            renewals = float(re.search(r"^flowagent_lease_renewals_total (\S+)", seen, re.MULTILINE)[1])
            row(f"{name}: renewals, of those of a day", renewals / (hours * 360) * 100, "%")
        row(f"{name}: RSS in the beginning", begin, "MB")
        row(f"{name}: RSS at the end", memory(process), "MB", "aim: 50")


def idle(root: Path, seconds: float) -> None:
    with agent(root, COMMAND) as (process, _):
        time.sleep(2)
        before = spent(process)
        time.sleep(seconds)
        row(
            "idle by the real clock: share of a core",
            (spent(process) - before) / seconds * 100,
            "%",
            "aim: 0.2",
        )
        row("idle by the real clock: RSS", memory(process), "MB", "aim: 50")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--hours", type=float, default=24)
    parser.add_argument("--faster", type=float, default=1000)
    parser.add_argument("--idle", type=float, default=60)
    given = parser.parse_args()
    # byte code as an installation has it, also where Python is told to write none
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="flowagent-service-") as directory:
        root = Path(directory)
        os.environ["PYTHONPYCACHEPREFIX"] = str(root / "bytecode")
        with agent(root, COMMAND):
            pass  # makes the store and the byte code
        starts(root, given.rounds)
        idle(root, given.idle)
        day(root, given.hours, given.faster, None)
        day(root, given.hours, given.faster, free_port())


if __name__ == "__main__":
    main()

"""How long the main job takes, against what a user has without an agent: ``python flow.py``.

    python benchmarks/main_job.py [--rounds 40] [--runs 300] [--idle 20]

Everything is measured in one run on one machine, on a real agent with a real SQLite store: from submitting a
run to the first line of user code, runs per second with ``--limit 8``, CPU per run, memory and CPU of an idle
agent, start-up of commands. Times are milliseconds; each is also given as a ratio to the plain script.
"""

from __future__ import annotations

import argparse
import os
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import anyio
import psutil

from flowagent.models import State
from flowagent.store import SQLStore, open_store
from flowagent.submission import submit

FLOW = """\
import time
from flowagent import flow

@flow
def stamp():
    print("at", time.time(), flush=True)

if __name__ == "__main__":
    stamp()
"""
PLAIN = 'import time\nprint("at", time.time(), flush=True)\n'
COMMAND = [sys.executable, "-m", "flowagent"]


class Table:
    """Rows of a name, a value and its ratio to the floor."""

    def __init__(self) -> None:
        self.floor: float | None = None

    def row(self, name: str, value: float, unit: str, against: float | None = None) -> None:
        ratio = f"{value / against:8.2f} x" if against else ""
        print(f"{name:58} {value:9.2f} {unit:7} {ratio}", flush=True)

    def spread(self, name: str, values: list[float], against: float | None = None) -> float:
        ordered = sorted(values)
        median, p95 = statistics.median(ordered), ordered[int(len(ordered) * 0.95)]
        self.row(f"{name}, p50", median * 1000, "ms", against)
        self.row(f"{name}, p95", p95 * 1000, "ms", against)
        return median * 1000


@contextmanager
def running_agent(home: Path, log: Path, *options: str) -> Iterator[psutil.Process]:
    environment = {**os.environ, "FLOWAGENT_HOME": str(home)}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*COMMAND, "start", "--limit", "8", "--log-format", "json", *options],
            env=environment,
            stderr=file,
        )
    try:
        while b'"started"' not in log.read_bytes():
            time.sleep(0.02)
        time.sleep(1.0)  # its launcher warms up
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def first_line_of(arguments: list[str], environment: dict[str, str] | None = None) -> float:
    """Seconds from starting a process to its first line."""
    began = time.time()
    output = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout
    return float(output.split()[1]) - began


async def to_user_code(store: SQLStore) -> float:
    """Seconds from asking for a run to the first line of its code."""
    began = time.time()
    run, _ = await submit(store, "stamp", {})
    await anyio.sleep(0.04)  # asking meanwhile would take part of one of the cores
    while not (await store.run(run.id)).state.terminal:
        await anyio.sleep(0.01)
    output = b"".join(chunk.data for chunk in await store.output(run.id, 1, 0))
    found = re.search(rb"^at ([\d.]+)$", output, re.MULTILINE)
    assert found is not None, output
    return float(found[1]) - began


def cpu_of(agent: psutil.Process) -> float:
    """CPU seconds of the agent and of all that it started and that has ended or lives."""
    own = agent.cpu_times()
    spent = [process.cpu_times() for process in (*launchers_of(agent), *supervisors_of(agent))]
    return (
        own.user
        + own.system
        + sum(times.user + times.system + times.children_user + times.children_system for times in spent)
    )


def launchers_of(agent: psutil.Process) -> list[psutil.Process]:
    return [child for child in agent.children() if "launch.py" in " ".join(child.cmdline())]


def supervisors_of(agent: psutil.Process) -> list[psutil.Process]:
    return [child for launcher in launchers_of(agent) for child in launcher.children()]


async def throughput(store: SQLStore, database: Path, count: int) -> float:
    """Runs per second, from the first submission to the last end."""
    began = time.perf_counter()
    for _ in range(count):
        await submit(store, "stamp", {})
    with closing(sqlite3.connect(database)) as reader:
        open_runs = f"SELECT count(*) FROM run WHERE state <> '{State.COMPLETED}'"
        while reader.execute(open_runs).fetchone()[0]:
            await anyio.sleep(0.01)
    return count / (time.perf_counter() - began)


def start_up(table: Table, floor: float, home: Path) -> None:
    environment = {**os.environ, "FLOWAGENT_HOME": str(home)}
    # compiled, as an installed package is, also where the environment says not to write bytecode
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = str(home.parent / "bytecode")
    asked = subprocess.run([*COMMAND, "run", "stamp"], env=environment, capture_output=True, check=True)
    run = asked.stdout.decode().strip()
    commands = [
        *(["--help"], ["--version"], ["show", "--help"], ["runs"], ["flows"], ["agents"], ["run", "stamp"]),
        *([word, run] for word in ("show", "logs", "explain", "cancel")),
        *(["secret", "ls"], ["cache", "ls"]),
    ]
    for words in commands:
        times = []
        for _ in range(11):
            began = time.perf_counter()
            # to cancel a run that has ended is refused, after the same work
            check = words[0] != "cancel"
            subprocess.run([*COMMAND, *words], env=environment, capture_output=True, check=check)
            times.append(time.perf_counter() - began)
        name = " ".join(words).replace(run, "RUN")
        table.row(f"flowagent {name}", statistics.median(times[1:]) * 1000, "ms", floor)  # the first compiles


async def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the main job.")
    parser.add_argument("--rounds", type=int, default=40, help="repetitions of each latency")
    parser.add_argument("--runs", type=int, default=300, help="runs of the throughput measurement")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds of watching an idle agent")
    options = parser.parse_args()
    table = Table()
    with tempfile.TemporaryDirectory(prefix="flowagent-benchmark-") as directory:
        root = Path(directory)
        home, plain, flow = root / "home", root / "plain.py", root / "flow.py"
        plain.write_text(PLAIN)
        flow.write_text(FLOW)
        environment = {**os.environ, "FLOWAGENT_HOME": str(home)}
        subprocess.run([*COMMAND, "register", str(flow)], env=environment, check=True, capture_output=True)
        url = f"sqlite:///{home}/flowagent.db"
        store = await open_store(url)
        with running_agent(home, root / "log") as agent:
            await to_user_code(store)
            latencies, floors, scripts = [], [], []
            for _ in range(options.rounds):  # interleaved: all meet the same noise
                latencies.append(await to_user_code(store))
                floors.append(first_line_of([sys.executable, str(plain)]))
                scripts.append(first_line_of([sys.executable, str(flow)]))
            floor = table.spread("python plain.py -> its first line (the floor)", floors)
            table.spread("python flow.py, no agent -> first line of the flow", scripts, floor)
            table.spread("submit -> first line of user code, warm agent", latencies, floor)

            spent = cpu_of(agent)
            rate = await throughput(store, home / "flowagent.db", options.runs)
            await anyio.sleep(0.5)
            spent = cpu_of(agent) - spent
            began = time.perf_counter()
            for _ in range(20):
                subprocess.run([sys.executable, str(flow)], capture_output=True, check=True)
            plain_rate = 20 / (time.perf_counter() - began)
            table.row("python flow.py, one after the other", plain_rate, "runs/s")
            table.row("trivial runs, --limit 8, fully recorded", rate, "runs/s", plain_rate)
            table.row("CPU per run, agent and launcher and flow together", spent / options.runs * 1000, "ms")

            idle = cpu_of(agent)
            await anyio.sleep(options.idle)
            used = (cpu_of(agent) - idle) / options.idle * 100
            table.row("CPU of the idle agent and launcher", used, "% core")
            table.row("RSS of the agent after this", agent.memory_info().rss / 2**20, "MB")
            for child in agent.children():
                table.row("RSS of its launcher", child.memory_info().rss / 2**20, "MB")
            start_up(table, floor, home)
        await store.close()


if __name__ == "__main__":
    anyio.run(main)

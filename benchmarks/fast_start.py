"""How fast a run starts and what it costs, sandbox on, against a plain script and against a bare fork.

    python benchmarks/fast_start.py [--rounds 40] [--runs 400] [--pandas]

All in one run on one machine, rounds interleaved, so that all meet the same noise. ``--pandas`` needs pandas
in this environment (pip install pandas) and adds flows that import it, preloaded and not.
"""

from __future__ import annotations

import argparse
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path

import anyio
import floors
import psutil
from main_job import COMMAND, PLAIN, Table, cpu_of, first_line_of, launchers_of, running_agent, supervisors_of

from flowagent.daemon.agent import Agent
from flowagent.daemon.log import make_log
from flowagent.models import State
from flowagent.settings import load
from flowagent.store import SQLStore, open_store
from flowagent.submission import submit

FLOWS = """\
import time
from flowagent import flow
from flowagent.run_configs import LocalRun

@flow
def stamp():
    print("at", time.time(), flush=True)

@flow(run_config=LocalRun(sandbox="namespace"))
def boxed():
    print("at", time.time(), flush=True)

@flow
def idle():
    time.sleep(4)

@flow
def frames():
    import pandas
    print("at", time.time(), flush=True)

@flow(run_config=LocalRun(preload=["pandas"]))
def warm_frames():
    import pandas
    print("at", time.time(), flush=True)
"""


class Site:
    """One home with the flows registered, and its store."""

    def __init__(self, root: Path, store: SQLStore) -> None:
        self.root = root
        self.home = root / "home"
        self.store = store

    async def to_user_code(self, flow: str) -> float:
        """Seconds from asking for a run to the first line of its code."""
        began = time.time()
        run, _ = await submit(self.store, flow, {})
        await anyio.sleep(0.04)  # asking meanwhile would take part of one of the cores
        while not (state := (await self.store.run(run.id)).state).terminal:
            await anyio.sleep(0.02)
        output = b"".join(chunk.data for chunk in await self.store.output(run.id, 1, 0))
        found = re.search(rb"^at ([\d.]+)$", output, re.MULTILINE)
        assert found is not None and state is State.COMPLETED, output
        return float(found[1]) - began

    async def drained(self, count: int) -> float:
        """Seconds that an agent takes for runs that are all due at once."""
        due = time.time() + 0.005 * count + 0.5
        for _ in range(count):
            await submit(self.store, "stamp", {}, due=due)
        await anyio.sleep(max(0.0, due - time.time()))
        with closing(sqlite3.connect(self.home / "flowagent.db")) as reader:
            query = f"SELECT count(*) FROM run WHERE state <> '{State.COMPLETED}'"
            while reader.execute(query).fetchone()[0]:
                await anyio.sleep(0.02)
        return time.time() - due


def faults_of(agent: psutil.Process) -> int:
    """Page faults so far of an agent's launchers, supervisors and all whom these have waited for."""
    counted = 0
    for process in (*launchers_of(agent), *supervisors_of(agent)):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        counted += int(fields[7]) + int(fields[8])  # minflt and cminflt, see proc(5)
    return counted


def unshared(process: psutil.Process) -> float:
    """MB that are this process' own."""
    return float(process.memory_full_info().uss) / 2**20


async def concurrent(site: Site, agent: psutil.Process, table: Table) -> None:
    before = agent.memory_info().rss
    for _ in range(8):
        await submit(site.store, "idle", {})
    await anyio.sleep(2.0)
    supervisors = supervisors_of(agent)
    flows = [child for each in supervisors for child in each.children() if child.name().startswith("flow:")]
    assert len(flows) == 8, flows
    for_each = sum(map(unshared, (*supervisors, *flows))) / len(flows)
    table.row("unshared memory of an idle concurrent run, supervisor included", for_each, "MB")
    table.row("the agent grows by, for each of 8 runs", (agent.memory_info().rss - before) / 8 / 2**20, "MB")
    await anyio.sleep(3.0)


async def requests(site: Site, count: int) -> float:
    """Transactions that an agent writes for each run, runs one after the other."""
    settings = load(overrides={"home": site.home, "name": "counted", "log_level": "error"})
    store = await open_store(settings.store)
    assert isinstance(store, SQLStore)
    agent = Agent(settings, store, make_log("json", "error"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(agent.run)
        await agent.ready.wait()
        await site.to_user_code("stamp")
        before = store.database.commits
        for _ in range(count):
            await site.to_user_code("stamp")
        written = store.database.commits - before
        agent.stop()
    await store.close()
    return written / count


async def latencies(site: Site, rounds: int, table: Table) -> float:
    """Returns the floor, a plain script, in milliseconds."""
    plain = site.root / "plain.py"
    plain.write_text(PLAIN)
    agents = {"landlock": [], "process": ["--sandbox", "process"]}
    taken: dict[str, list[float]] = {}
    for level, options in agents.items():
        with running_agent(site.home, site.root / f"{level}.log", *options):
            await site.to_user_code("stamp")
            for _ in range(rounds):
                taken.setdefault(level, []).append(await site.to_user_code("stamp"))
                taken.setdefault("plain", []).append(first_line_of([sys.executable, str(plain)]))
            if level == "landlock":
                taken["namespace"] = [await site.to_user_code("boxed") for _ in range(rounds)]
    floor = table.spread("python flow.py without flowagent -> its first line (the floor)", taken["plain"])
    table.spread("submit -> first line, landlock", taken["landlock"], floor)
    table.spread("submit -> first line, process (no sandbox to speak of)", taken["process"], floor)
    table.spread("submit -> first line, namespace (bubblewrap)", taken["namespace"], floor)
    return floor


async def pandas(site: Site, agent: psutil.Process, rounds: int, floor: float, table: Table) -> None:
    for flow, words in (("frames", "not preloaded"), ("warm_frames", "preloaded")):
        await site.to_user_code(flow)
        taken = [await site.to_user_code(flow) for _ in range(rounds)]
        table.spread(f"submit -> after import pandas, {words}", taken, floor)


async def main() -> None:
    parser = argparse.ArgumentParser(description="Measure starts.")
    parser.add_argument("--rounds", type=int, default=40, help="repetitions of each latency")
    parser.add_argument("--runs", type=int, default=400, help="runs of the throughput measurement")
    parser.add_argument("--pandas", action="store_true", help="flows that import pandas, too")
    options = parser.parse_args()
    if options.pandas and find_spec("pandas") is None:
        sys.exit("pandas is not installed here: pip install pandas")
    table = Table()
    async with _site() as site:
        floor = await latencies(site, options.rounds, table)
        with running_agent(site.home, site.root / "log") as agent:
            await site.to_user_code("stamp")
            table.row("RSS of the idle agent", agent.memory_info().rss / 2**20, "MB")
            for launcher in launchers_of(agent):
                table.row("RSS of its idle launcher", launcher.memory_info().rss / 2**20, "MB")
            await site.drained(50)
            spent, faults = cpu_of(agent), faults_of(agent)
            seconds = await site.drained(options.runs)
            await anyio.sleep(0.5)
            table.row("trivial runs due at once, --limit 8, fully recorded", options.runs / seconds, "runs/s")
            used = (cpu_of(agent) - spent) / options.runs * 1000
            copied = (faults_of(agent) - faults) / options.runs
            table.row("CPU of all processes per run", used, "ms", floor)
            table.row("page faults of a run: supervisor and flow process", copied, "")
            await concurrent(site, agent, table)
            if options.pandas:
                await pandas(site, agent, options.rounds, floor, table)
        table.row("write transactions per run", await requests(site, 20), "")
        plain = floors.scripts([sys.executable, str(site.root / "plain.py")], options.runs)
        table.row("python flow.py, 8 at a time", plain.per_second, "runs/s")
        table.row("CPU of python flow.py", plain.cpu * 1000, "ms", floor)
        table.row("RSS of python flow.py", plain.rss, "MB")
        forks = floors.forks(options.runs)
        table.row(
            "bare fork of a small interpreter -> its first byte, p50", forks.first_byte * 1000, "ms", floor
        )
        table.row("bare forks, 8 at a time", forks.per_second, "a second")
        table.row("CPU of a bare fork", forks.cpu * 1000, "ms", floor)
        table.row("to copy one page that a fork shares", forks.page * 1e6, "us")


class _site(ExitStack):
    async def __aenter__(self) -> Site:
        root = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="flowagent-benchmark-")))
        (root / "flows.py").write_text(FLOWS)
        environment = {**os.environ, "FLOWAGENT_HOME": str(root / "home")}
        register = [*COMMAND, "register", str(root / "flows.py")]
        subprocess.run(register, env=environment, check=True, capture_output=True)
        self._store = await open_store(f"sqlite:///{root}/home/flowagent.db")
        return Site(root, self._store)

    async def __aexit__(self, *_: object) -> None:
        await self._store.close()
        self.close()


if __name__ == "__main__":
    anyio.run(main)

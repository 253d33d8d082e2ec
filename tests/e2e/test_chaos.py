"""Two agents on one store, killed at random: every run ends once, none is lost, none is doubled."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import time
from collections import Counter
from contextlib import closing

import anyio
import pytest
from tests.e2e.harness import Site, processes_of, until

from flowagent.store import open_store
from flowagent.submission import submit

FLOW = """
    import os, random, time
    from flowagent import context, flow

    @flow
    def marked(file=""):
        def mark(word):
            fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(fd, f"{word} {context.run_id} {context.attempt}\\n".encode())
            os.close(fd)
        mark("begin")
        for number in range(5):
            print("line", number, flush=True)
            time.sleep(random.uniform(0, 0.05))
        mark("end")
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_random_kills(site: Site, count: int) -> None:
    seed = int(os.environ.get("FLOWAGENT_TEST_SEED", time.time_ns() % 100_000))
    print("seed", seed)
    generator = random.Random(seed)
    marks = site.shared / "marks"
    site.command("register", site.write("flow.py", FLOW))
    runs = anyio.run(_submit, site, str(marks), count)

    def agent(name: str) -> subprocess.Popen[bytes]:
        return site.start("--name", name, "--limit", "8", "--lease", "20", "--poll", "0.5", wait=False)

    agents = {name: agent(name) for name in ("left", "right")}
    kills = 0
    while _open(site):
        time.sleep(generator.uniform(0.05, 1.2))
        name = generator.choice(sorted(agents))
        agents[name].kill()
        agents[name].wait()
        kills += 1
        agents[name] = agent(name)
    assert kills > 3
    for process in agents.values():
        until(lambda process=process: '"started"' in site.log(process))
        assert site.stop(process) == 0

    with closing(sqlite3.connect(site.home / "flowagent.db")) as database:
        states = Counter(state for (state,) in database.execute("SELECT state FROM run"))
        reasons = {
            reason for (reason,) in database.execute("SELECT reason FROM run WHERE state <> 'completed'")
        }
        outputs = database.execute("SELECT run_id, attempt, data FROM output ORDER BY run_id, attempt, start")
        lines: dict[str, bytes] = {}
        for run, _, data in outputs:
            lines[run] = lines.get(run, b"") + data
    assert states == {"completed": count}, (kills, reasons)
    words = Counter(tuple(line.split()[:2]) for line in marks.read_text().splitlines())
    assert set(words.values()) == {1}, f"executed more than once: {[w for w, n in words.items() if n > 1]}"
    assert {run for _, run in words} == set(runs)
    for run in runs:
        assert [lines[run].count(b"line %d\n" % number) for number in range(5)] == [1] * 5, lines[run]
    assert until(lambda: processes_of(site.home) == [], 5)
    for name in agents:
        assert list((site.home / "agents" / name / "runs").iterdir()) == []
    print("kills", kills)


async def _submit(site: Site, marks: str, count: int) -> list[str]:
    store = await open_store(f"sqlite:///{site.home}/flowagent.db")
    try:
        return [(await submit(store, "marked", {"file": marks}))[0].id for _ in range(count)]
    finally:
        await store.close()


def _open(site: Site) -> int:
    with closing(sqlite3.connect(site.home / "flowagent.db", timeout=10)) as database:
        query = "SELECT count(*) FROM run WHERE state IN ('scheduled', 'pending', 'running', 'cancelling')"
        return int(database.execute(query).fetchone()[0])

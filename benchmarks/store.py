"""How fast the store is: claims, and whole cycles create → claim → started → append → finish.

    python benchmarks/store.py [URL]

Without a URL it measures SQLite in a temporary directory. Each row is compared, in the same run, with a bare
``sqlite3`` loop that commits one small update per transaction, with the same durability.
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

from flowagent.models import AgentInfo, FlowSpec, Outcome, OutputChunk, RunRequest, State
from flowagent.store import SQLStore, open_store

AGENT = AgentInfo("bench", "1", "host", 1, ("a", "b"), "process", 64, "0")
SECONDS = 2.0


def bare_commits(directory: Path) -> float:
    """Commits per second of the simplest loop there is."""
    connection = sqlite3.connect(directory / "bare.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE run (id INTEGER PRIMARY KEY, state TEXT)")
    connection.executemany("INSERT INTO run VALUES (?, 'scheduled')", [(id,) for id in range(1000)])
    count, end = 0, time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE run SET state = ? WHERE id = ?", (f"state {count}", count % 1000))
        connection.execute("COMMIT")
        count += 1
    connection.close()
    return count / SECONDS


async def per_second(concurrency: int, work: Callable[[], Awaitable[int]]) -> tuple[float, float]:
    """How much ``work`` says it did, per second of time, and the milliseconds of CPU for each."""
    done = 0
    began, cpu = time.perf_counter(), time.process_time()

    async def worker() -> None:
        nonlocal done
        while time.perf_counter() < began + SECONDS:
            more = await work()  # not in one statement with the addition: others add meanwhile
            done += more

    async with anyio.create_task_group() as group:
        for _ in range(concurrency):
            group.start_soon(worker)
    return done / (time.perf_counter() - began), (time.process_time() - cpu) / max(done, 1) * 1000


async def measure(store: SQLStore, bare: float) -> None:
    version = (await store.register(FlowSpec("bench", "dag", {"type": "Local"}, None), "hash")).version
    request = RunRequest(version.version_id, {"x": 1}, labels=("a",))

    async def create() -> int:
        await store.create_run(request)
        return 1

    async def claim() -> int:
        return len(await store.claim(AGENT, 1, 60))

    async def claim_eight() -> int:
        return len(await store.claim(AGENT, 8, 60))

    async def cycle() -> int:
        await store.create_run(request)
        claims = await store.claim(AGENT, 1, 60)
        for each in claims:
            await store.started(each.run.id, each.attempt, "revision", "landlock")
            await store.append(each.run.id, each.attempt, [OutputChunk(0, 100, b"x" * 100)])
            await store.finish(each.run.id, each.attempt, Outcome(State.COMPLETED))
        return len(claims)

    print(f"{'':>24} {'concurrent':>10} {'per second':>11} {'CPU ms each':>12} {'of bare commits':>16}")
    print(f"{'bare sqlite3 commits':>24} {1:>10} {bare:>11,.0f} {'':>12} {1:>16.2f}")
    for name, work in {
        "create": create, "claim": claim, "claim, 8 at once": claim_eight, "cycle": cycle,
    }.items():  # fmt: skip
        for concurrency in (1, 8, 64):
            await refill(store, request)
            speed, cpu = await per_second(concurrency, work)
            print(f"{name:>24} {concurrency:>10} {speed:>11,.0f} {cpu:>12.3f} {speed / bare:>16.2f}")


async def refill(store: SQLStore, request: RunRequest, count: int = 40_000) -> None:
    """Have enough scheduled runs for what is to be claimed."""
    run, _ = await store.create_run(request)
    ((left,),) = await store.database.read(
        lambda tx: tx.execute("SELECT count(*) FROM run WHERE state = 'scheduled'")
    )
    columns = "flow_id, version_id, label_set_id, state, parameters, env, due, created, attempt, losses, \
        retries_left, retry_delay"
    copies = [{"id": f"{time.time_ns() + number:016x}", "old": run.id} for number in range(count - left)]
    await store.database.write(
        lambda tx: tx.execute_many(
            f"INSERT INTO run (id, {columns}) SELECT :id, {columns} FROM run WHERE id = :old", copies
        )
    )


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        url = sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{directory}/store.db"
        store = await open_store(url)
        print(f"{store.url}")
        await measure(store, bare_commits(Path(directory)))
        await store.close()


if __name__ == "__main__":
    anyio.run(main)

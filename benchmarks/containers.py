"""What a run in a container costs beyond a bare ``docker run`` of the same image.

    python -m benchmarks.containers [--rounds 10]

On an engine and an image of its own, rounds interleaved, so that all meet the same noise. It takes what the
tests in tests/containers take.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import statistics
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path

from tests.containers.machinery import PYTHON, Engine, check_programs
from tests.e2e.harness import Site, until

FLOW = """
from flowagent import flow
from flowagent.run_configs import DockerRun
from flowagent.storage import Local

@flow(storage=Local(stored_as_script=True), run_config=DockerRun())
def trivial():
    print("done")
"""


def bare(engine: Engine) -> float:
    """Seconds of ``docker run``: create, start, one line, wait, remove."""
    began = time.perf_counter()
    subprocess.run(
        ["docker", "run", "--rm", "--init", "--network", "none", PYTHON, "python3", "-c", "print('done')"],
        env={**os.environ, "DOCKER_HOST": engine.url},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - began


def run(site: Site) -> tuple[float, float]:
    """Seconds from the claim of a run to its recorded end, and from asking for it."""
    run = site.submit("trivial")
    until(lambda: site.state(run) == "completed", 60)
    with closing(sqlite3.connect(site.home / "flowagent.db")) as database:
        query = (
            "SELECT r.created, a.claimed, a.ended FROM run r JOIN attempt a ON a.run_id = r.id WHERE r.id = ?"
        )
        created, claimed, ended = database.execute(query, [run]).fetchone()
    return ended - claimed, ended - created


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    check_programs()
    root = Path(tempfile.mkdtemp(prefix="fa-bench-"))
    engine = Engine(root / "engine")
    engine.start()
    site = Site(root / "site")
    try:
        engine.build_images()
        site.environment |= {"DOCKER_HOST": engine.url}
        site.start("--runner", "docker", "--network", "none", "--image", PYTHON)
        site.command("register", site.write("trivial.py", FLOW))
        bare(engine), run(site)
        measured = [(bare(engine), *run(site)) for _ in range(rounds)]
    finally:
        site.close()
        engine.close()
        shutil.rmtree(root, ignore_errors=True)
    plain, claimed, asked = (statistics.median(column) for column in zip(*measured, strict=True))
    print(f"docker run, p50                      {plain * 1000:6.0f} ms   1")
    print(f"a run, claim to recorded end, p50    {claimed * 1000:6.0f} ms   {claimed / plain:.2f}")
    print(f"a run, asked for to recorded end     {asked * 1000:6.0f} ms   {asked / plain:.2f}")


if __name__ == "__main__":
    main()

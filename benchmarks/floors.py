"""What a run is measured against: a plain script, which a user has without an agent, and a bare fork, the
floor of the machine. Both as runs are measured: one at a time, and eight at a time."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

AT_ONCE = 8
FORKS = """
import gc, json, mmap, os, resource, time

COUNT, AT_ONCE, PAGES = {count}, {at_once}, 1000
gc.freeze()


def spent():
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def first_byte():
    read, write = os.pipe()
    began = time.perf_counter()
    if os.fork() == 0:
        os.write(write, b"x")
        os._exit(0)
    os.read(read, 1)
    taken = time.perf_counter() - began
    os.wait()
    os.close(read), os.close(write)
    return taken


def page_copied():
    "Seconds that it takes a child to write to a page for the first time which it shares with its parent."
    read, write = os.pipe()
    if os.fork() == 0:
        began = time.perf_counter()
        for page in range(PAGES):
            memory[page * 4096] = 2
        taken = time.perf_counter() - began
        for page in range(PAGES):
            memory[page * 4096] = 3
        os.write(write, repr(taken - (time.perf_counter() - began - taken)).encode())
        os._exit(0)
    taken = float(os.read(read, 100))
    os.wait()
    os.close(read), os.close(write)
    return taken / PAGES


latencies = sorted(first_byte() for _ in range(COUNT))
before, began, living = spent(), time.perf_counter(), 0
for _ in range(COUNT):
    if living == AT_ONCE:
        os.wait()
        living -= 1
    if os.fork() == 0:
        os._exit(0)
    living += 1
while living:
    os.wait()
    living -= 1
seconds, cpu = time.perf_counter() - began, spent() - before
memory = mmap.mmap(-1, PAGES * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(PAGES):
    memory[page * 4096] = 1
pages = sorted(page_copied() for _ in range(30))
print(json.dumps([latencies[COUNT // 2], COUNT / seconds, cpu / COUNT, pages[15]]))
"""


class Forks(NamedTuple):
    """Of a small interpreter; times in seconds."""

    first_byte: float
    per_second: float
    cpu: float
    page: float


class Scripts(NamedTuple):
    """Of ``python flow.py``; CPU in seconds, memory in MB."""

    per_second: float
    cpu: float
    rss: float


def forks(count: int) -> Forks:
    """Forks of an interpreter that has imported next to nothing."""
    program = FORKS.format(count=count, at_once=AT_ONCE)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return Forks(*json.loads(done.stdout))


def scripts(command: Sequence[str], count: int) -> Scripts:
    """A plain script, eight at a time."""

    def run(_: int) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    before, began = _spent(), time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as workers:
        list(workers.map(run, range(count)))
    seconds = time.perf_counter() - began
    return Scripts(count / seconds, (_spent() - before) / count, _peak(command))


def _spent() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _peak(command: Sequence[str]) -> float:
    """MB that a command has at most."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=2, stderr=2);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024

"""Large artifacts and results are streamed: the memory that they take does not grow with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from benches import Bench
from tests.forges import server, webhooks

from flowagent.models import Json
from flowagent.results import LocalResult
from flowagent.storage import Local, Webhook

MEASURED = """
import hashlib, json, sys
from pathlib import Path
import anyio
from flowagent import bundles
from flowagent.backend import Artifact, BackendContext, Backends
from flowagent.flows.results import result_from_json
from flowagent.sources import SourceCache

home, file, result, storage = Path(sys.argv[1]), Path(sys.argv[2]), *map(json.loads, sys.argv[3:5])


def peak():
    # not ru_maxrss, which begins with what the process had that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


async def main():
    seen = []

    class Progress:
        def __init__(self, what, total=None):
            seen.append([what, total, 0])

        def __enter__(self):
            return self.advance

        def __exit__(self, *_):
            pass

        def advance(self, amount):
            seen[-1][2] += amount

    backends = Backends(BackendContext(home, "host1", progress=Progress))
    backend, keeper = backends.get(storage["type"]), backends.get(result["storage"])
    small = home / "small"
    small.write_bytes(b"x")
    reference = await keeper.put(result, "small", small)
    await keeper.get(reference, small)
    before = peak()
    reference = await keeper.put(result, "large", file)
    await keeper.get(reference, home / "got")
    results = peak() - before
    archive = bundles.pack(home / "flow.py", [file.name], home / "bundle")
    artifact = Artifact("f", "bundle", path=archive.path, sha256=archive.sha256, entry=archive.entry)
    stored = await backend.upload(storage, artifact)
    archive.path.unlink()
    source = await SourceCache(home / "cache").acquire(backend, stored, await backend.resolve(stored))
    grown = peak() - before
    with open(source / file.name, "rb") as content:
        unpacked = hashlib.file_digest(content, "sha256").hexdigest()
    await backends.close()
    print(json.dumps({"results": results, "grown": grown, "unpacked": unpacked, "sha256": reference["sha256"],
                      "progress": [done == total for _, total, done in seen]}))


anyio.run(main)
"""
NAME = "large.bin"
ROOM = 100 << 20
"""Bytes that buffers, threads and fragmentation may take, whatever the size: parts of 8 MiB, some at once."""


@pytest.mark.parametrize(
    "size", [300 << 20, pytest.param(1 << 30, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_memory_stays_flat(bench: Bench, size: int) -> None:
    # not through the gate, which keeps bodies
    environment = bench._environment(bench.url)
    grown = measure(
        bench.home, size, bench.result().to_json(), bench.storage(include=[NAME]).to_json(), environment
    )
    assert grown < ROOM


@pytest.mark.parametrize("kind", ["Local", "Webhook"])
def test_memory_stays_flat_where_results_are_local(kind: str, home: Path) -> None:
    """What is sent and fetched in one piece, which needs no room for parts."""
    size = 150 << 20
    with server.serving(webhooks.Shelf()) as url:
        arguments = {"url": f"{url}/flow"}
        declared = (
            Local(home / "flows", include=[NAME])
            if kind == "Local"
            else Webhook(arguments, "PUT", arguments, "GET", include=[NAME])
        )
        grown = measure(home, size, LocalResult().to_json(), declared.to_json())
    assert grown < ROOM / 2


def measure(
    home: Path,
    size: int,
    result: Mapping[str, Json],
    storage: Mapping[str, Json],
    environment: Mapping[str, str] | None = None,
) -> int:
    """By how many bytes the peak of a process's memory grows that keeps a result of this size, reads it
    again, and stores and fetches a bundle that it is in."""
    (home / "flow.py").write_text("x = 1\n")
    file = home / NAME
    block = os.urandom(1 << 20)
    with file.open("wb") as target:
        for number in range(size >> 20):
            target.write(number.to_bytes(8, "big") + block[8:])
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(home), str(file), json.dumps(result), json.dumps(storage)],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["unpacked"] == measured["sha256"]
    assert all(measured["progress"])
    print(f"{storage['type']}: {measured['results'] >> 20} and {measured['grown'] >> 20} MiB")
    for path in (home / "got", file):
        path.unlink()
    subprocess.run(["rm", "-rf", str(home / "cache")], check=True)
    assert not Path(home / "cache").exists()
    return int(measured["grown"])

"""Shipping to a real store: piece by piece, the last of it together with the end."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from store_cases import add_run, an_agent, spec

from flowagent.backend import BackendContext, Backends
from flowagent.daemon import shipping
from flowagent.daemon.log import make_log
from flowagent.daemon.shipping import Shipper
from flowagent.models import Outcome, State
from flowagent.redaction import Redactor
from flowagent.runtime.events import encode
from flowagent.runtime.rundir import RunDirectory
from flowagent.store import SQLStore

pytest_plugins = ("store_databases",)
pytestmark = pytest.mark.parametrize("kind", ["sqlite"])

RESULT = {"type": "LocalResult", "storage": "Local", "dir": None, "location": None, "serializer": "json"}


async def begin(store: SQLStore, tmp_path: Path, *secrets: str) -> tuple[RunDirectory, Shipper, str]:
    run = await add_run(store)
    await store.claim(an_agent(), 1, 60)
    await store.started(run.id, 1, "r", "process")
    directory = RunDirectory(tmp_path / f"{run.id}.1")
    directory.create({}, 0.0)
    backends = Backends(BackendContext(tmp_path, "host"))
    flow = spec(result=RESULT)
    log = make_log("json", "error")
    return directory, Shipper(store, backends, directory, run.id, 1, flow, Redactor(secrets), log), run.id


def write(directory: RunDirectory, data: bytes) -> None:
    with open(directory.output_path, "ab") as output:
        output.write(data)


async def test_the_last_of_the_output_comes_with_the_end(
    store: SQLStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, shipper, run_id = await begin(store, tmp_path, "hidden")
    assert not shipper.behind()
    write(directory, b"first hid")
    assert shipper.behind()
    assert await shipper.pump()
    assert not shipper.behind()
    assert await store.shipped(run_id, 1) == 6  # what may become a secret is held back
    write(directory, b"den, then hid")
    monkeypatch.setattr(shipping, "PIECE", 5)
    chunks, tasks = await shipper.drain()
    shipped = await store.shipped(run_id, 1)
    assert 6 < shipped == chunks[0].start < chunks[-1].stop == 22
    commits = store.database.commits
    await store.finish(run_id, 1, Outcome(State.COMPLETED), chunks, tasks)
    assert store.database.commits == commits + 1
    output = await store.output(run_id, 1, 0)
    assert b"".join(chunk.data for chunk in output) == b"first ****, then hid"
    assert await store.shipped(run_id, 1) == 22


async def test_a_result_stays_until_the_store_knows_of_it(store: SQLStore, tmp_path: Path) -> None:
    directory, shipper, run_id = await begin(store, tmp_path)
    (Path(directory.results) / "1").write_bytes(b"42")
    write(directory, encode({"event": "result", "task": "", "file": "1", "serializer": "json"}))
    chunks, tasks = await shipper.drain()
    taken = Path(directory.path) / "result-1"
    assert taken.read_bytes() == b"42"
    await store.finish(run_id, 1, Outcome(State.COMPLETED), chunks, tasks)
    shipper.recorded()
    assert not taken.exists()
    (task,) = await store.task_runs(run_id, 1)
    assert Path(task.result["path"]).read_bytes() == b"42"


async def test_a_result_that_cannot_be_put_costs_the_result_only(
    store: SQLStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a backend of anybody's raises, with a secret of the flow in it."""

    async def put(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left for hidden")

    monkeypatch.setattr("flowagent_backends.local.LocalBackend.put", put)
    directory, shipper, _ = await begin(store, tmp_path, "hidden")
    (Path(directory.results) / "1").write_bytes(b"42")
    write(directory, encode({"event": "result", "task": "", "file": "1", "serializer": "json"}))
    write(directory, b"more")
    chunks, tasks = await shipper.drain()
    assert b"more" in b"".join(chunk.data for chunk in chunks)
    assert [task.result["error"] for task in tasks] == ["OSError: [Errno 28] No space left for ****"]

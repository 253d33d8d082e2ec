"""Shipping to a real store: piece by piece, the last of it together with the end."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from store_cases import add_run, an_agent, spec

from flowagent.backend import BackendContext, Backends
from flowagent.daemon import keeping, shipping
from flowagent.daemon.log import make_log
from flowagent.daemon.shipping import Shipper
from flowagent.errors import StorageTransientError
from flowagent.models import Outcome, State
from flowagent.redaction import Redactor
from flowagent.runtime.events import encode
from flowagent.runtime.rundir import RunDirectory
from flowagent.store import SQLStore

pytest_plugins = ("store_databases",)
pytestmark = pytest.mark.parametrize("kind", ["sqlite"])

RESULT = {"type": "LocalResult", "storage": "Local", "dir": None, "location": None, "serializer": "json"}


@asynccontextmanager
async def begin(
    store: SQLStore, tmp_path: Path, *secrets: str
) -> AsyncIterator[tuple[RunDirectory, Shipper, str]]:
    run = await add_run(store)
    await store.claim(an_agent(), 1, 60)
    await store.started(run.id, 1, "r", "process")
    directory = RunDirectory(tmp_path / f"{run.id}.1")
    directory.make()
    directory.hand_over({}, 0.0)
    backends = Backends(BackendContext(tmp_path, "host"))
    flow = spec(result=RESULT)
    log = make_log("json", "error")
    async with keeping.keeping(backends, log) as keeper:
        yield directory, Shipper(store, keeper, directory, run.id, 1, flow, Redactor(secrets), log), run.id


def put(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Have results go there."""
    monkeypatch.setattr("flowagent_backends.local.LocalBackend.put", function)


def leave(directory: RunDirectory, number: int, task: str = "") -> None:
    """What a flow does with a result."""
    (Path(directory.results) / str(number)).write_bytes(b"42")
    event = {"event": "result", "task": task, "file": str(number), "serializer": "json"}
    write(directory, encode(event))


def write(directory: RunDirectory, data: bytes) -> None:
    with open(directory.output_path, "ab") as output:
        output.write(data)


async def test_the_last_of_the_output_comes_with_the_end(
    store: SQLStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with begin(store, tmp_path, "hidden") as (directory, shipper, run_id):
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
    async with begin(store, tmp_path) as (directory, shipper, run_id):
        leave(directory, 1)
        chunks, tasks = await shipper.drain()
        taken = Path(directory.path) / "result-1"
        assert taken.read_bytes() == b"42"
        await store.finish(run_id, 1, Outcome(State.COMPLETED), chunks, tasks)
        shipper.recorded()
        assert not taken.exists()
        (task,) = await store.task_runs(run_id, 1)
        assert Path(task.result["path"]).read_bytes() == b"42"


async def test_no_result_takes_the_place_of_another(store: SQLStore, tmp_path: Path) -> None:
    names = [
        "load data-1",
        "load-data-1",
        "Load-Data-1",
        "sq-1[1]",
        "sq-1-1",
        "sq-1.1",
        "sq-1[0][1]",
        "fl\u00f6w",
    ]
    async with begin(store, tmp_path) as (directory, shipper, _):
        for number, name in enumerate([*names, ""]):
            leave(directory, number, name)
        _, tasks = await shipper.drain()
        paths = {task.task: Path(task.result["path"]).name for task in tasks}
        assert sorted(paths) == sorted([*names, ""])
        assert len(set(paths.values())) == len(paths)
        assert (paths["sq-1[1]"], paths["sq-1-1"], paths[""]) == ("sq-1.1", "sq-1-1", "flow")


async def test_a_result_that_cannot_be_put_costs_the_result_only(
    store: SQLStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a backend of anybody's raises, with a secret of the flow in it."""

    async def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left for hidden")

    put(monkeypatch, full)
    async with begin(store, tmp_path, "hidden") as (directory, shipper, _):
        leave(directory, 1)
        write(directory, b"more")
        chunks, tasks = await shipper.drain()
    assert b"more" in b"".join(chunk.data for chunk in chunks)
    assert [task.result["error"] for task in tasks] == ["OSError: [Errno 28] No space left for ****"]


async def test_a_result_is_tried_again_if_that_can_help(
    store: SQLStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    async def busy(*_: object) -> dict[str, Any]:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise StorageTransientError("S3: it is busy")
        return {"storage": "Local"}

    put(monkeypatch, busy)
    monkeypatch.setattr(keeping, "FIRST", 0.01)
    async with begin(store, tmp_path) as (directory, shipper, run_id):
        leave(directory, 1, "draw-1")
        event = {"event": "task", "task": "draw-1", "state": "completed", "tries": 2}
        write(directory, encode(event) + b"printed")
        assert await shipper.pump()
        while not shipper.behind():
            await anyio.sleep(0.01)
        assert await shipper.pump()
        (task,) = await store.task_runs(run_id, 1)  # its state is the newest, whenever its result came
        assert (task.state, task.tries, task.result) == (
            "completed",
            2,
            {"storage": "Local", "serializer": "json"},
        )
        assert not (Path(directory.path) / "result-1").exists()


async def test_results_that_cannot_be_put_hold_up_no_output_and_no_run(
    store: SQLStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    async def hangs(*_: object) -> None:
        nonlocal tries
        tries += 1
        await anyio.sleep(0.5)
        raise StorageTransientError("S3: it did not answer within 0.5 s")

    put(monkeypatch, hangs)
    monkeypatch.setattr(keeping, "PATIENCE", 0.2)
    async with begin(store, tmp_path) as (directory, shipper, run_id):
        for number in range(1000):
            leave(directory, number, f"draw-1[{number}]")
        write(directory, b"printed")
        began = anyio.current_time()
        assert await shipper.pump()
        output = await store.output(run_id, 1, 0)
        assert (output[0].data[-7:], anyio.current_time() - began < 0.5) == (b"printed", True)
        _, tasks = await shipper.drain()
        assert anyio.current_time() - began < 2
    assert tries == keeping.AT_ONCE
    assert [task.result for task in tasks] == [{"error": "S3: it did not answer within 0.5 s"}] * 1000


async def test_an_agent_that_starts_puts_what_the_one_before_did_not(
    store: SQLStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs(*_: object) -> None:
        await anyio.sleep_forever()

    async with begin(store, tmp_path) as (directory, shipper, run_id):
        with monkeypatch.context() as patched:
            put(patched, hangs)
            leave(directory, 1)
            write(directory, b"printed")
            assert await shipper.pump()  # and the agent is killed
    backends, log = Backends(BackendContext(tmp_path, "host")), make_log("json", "error")
    async with keeping.keeping(backends, log) as keeper:
        start = await store.shipped(run_id, 1)
        flow = spec(result=RESULT)
        shipper = Shipper(store, keeper, directory, run_id, 1, flow, Redactor(()), log, start)
        chunks, tasks = await shipper.drain()
    assert chunks == []
    assert [Path(task.result["path"]).read_bytes() for task in tasks] == [b"42"]

"""What an agent and a container say to one another: when the end is known."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from flowagent.docker import Engine, EngineError
from flowagent.runners.docker.conversation import Conversation
from flowagent.runtime import relay
from flowagent.runtime.events import encode
from flowagent.runtime.limits import Limits
from flowagent.runtime.rundir import RunDirectory

pytestmark = pytest.mark.anyio


class SlowEngine:
    """One whose container has said its last and takes long to end."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        self.asked: list[str] = []
        self.failing: list[EngineError] = []
        self.may_end = anyio.Event()
        self._log = encode({"event": relay.BEGAN, "boot_id": "boot"}) + b"said\n"
        self._log += encode({"event": relay.ENDED, "status": dict(status)})

    @asynccontextmanager
    async def log(self, container: str, *, follow: bool) -> AsyncIterator[AsyncIterator[bytes]]:
        async def pieces() -> AsyncIterator[bytes]:
            yield self._log
            await self.may_end.wait()

        yield pieces()

    async def call(self, method: str, path: str, **_: Any) -> Any:
        self.asked.append(f"{method} {path}")
        if self.failing:
            raise self.failing.pop()
        return {"State": {"Running": False, "ExitCode": 137, "OOMKilled": True}}


def conversation(
    tmp_path: Path, engine: SlowEngine, *, lingers: bool = False
) -> tuple[Conversation, RunDirectory]:
    run = RunDirectory(tmp_path / "r.1")
    run.make()
    run.hand_over({}, 0.0)
    return Conversation(cast(Engine, engine), "c", run, Limits(), "boot", lingers=lingers), run


COMPLETED = {"exit_code": 0, "signal": None, "outcome": {"state": "completed"}}


async def test_the_end_is_known_when_the_supervisor_has_told_it_and_nothing_lives_on(tmp_path: Path) -> None:
    engine = SlowEngine(COMPLETED)
    talk, run = conversation(tmp_path, engine)
    with anyio.fail_after(5):
        await talk.hold()
    status = run.status()
    assert (status["ended"], status["exit_code"], status["outcome"]["state"]) == (True, 0, "completed")
    assert Path(run.output_path).read_bytes() == b"said\n"
    assert engine.asked == ["POST /containers/c/kill"]


async def test_an_end_that_may_be_told_by_the_flow_is_believed_when_the_container_is_dead(
    tmp_path: Path,
) -> None:
    engine = SlowEngine(COMPLETED)
    engine.failing = [EngineError("it has ended", 409), EngineError("the engine is being restarted")]
    talk, run = conversation(tmp_path, engine)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(talk.hold)
        await anyio.wait_all_tasks_blocked()
        assert "ended" not in run.status()
    assert run.status()["exit_code"] == 0
    assert engine.asked == ["POST /containers/c/kill"] * 2


async def test_one_that_is_kept_ends_by_itself(tmp_path: Path) -> None:
    engine = SlowEngine(COMPLETED)
    talk, run = conversation(tmp_path, engine, lingers=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(talk.hold)
        await anyio.wait_all_tasks_blocked()
        assert "ended" not in run.status()
        engine.may_end.set()
    assert run.status()["exit_code"] == 0
    assert engine.asked == ["GET /containers/c/json"]


async def test_who_sent_a_kill_the_engine_is_asked(tmp_path: Path) -> None:
    engine = SlowEngine({"exit_code": None, "signal": int(signal.SIGKILL)})
    talk, run = conversation(tmp_path, engine)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(talk.hold)
        await anyio.wait_all_tasks_blocked()
        assert "ended" not in run.status()
        engine.may_end.set()
    assert run.status()["out_of_memory"] is True
    assert engine.asked == ["GET /containers/c/json"]

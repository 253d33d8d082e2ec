"""What an agent and a container say to one another: when the end is known."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from flowagent.docker import Engine
from flowagent.runners.docker.conversation import Conversation
from flowagent.runtime import relay
from flowagent.runtime.events import encode
from flowagent.runtime.limits import Limits
from flowagent.runtime.rundir import RunDirectory

pytestmark = pytest.mark.anyio


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """The first process of the container."""
    with subprocess.Popen(["sleep", "60"]) as started:
        yield started
        started.kill()


class SlowEngine:
    """One that takes long to say that a container has ended."""

    def __init__(self, status: Mapping[str, Any], pid: int, container: str, **host: str) -> None:
        self.asked = 0
        self.may_end = anyio.Event()
        self._state = {"Running": False, "ExitCode": 137, "OOMKilled": True, "Pid": pid}
        self._found = {"Id": container, "State": self._state, "HostConfig": host}
        self._log = encode({"event": relay.BEGAN, "boot_id": "boot"}) + b"said\n"
        self._log += encode({"event": relay.ENDED, "status": dict(status)})

    @asynccontextmanager
    async def log(self, container: str, *, follow: bool) -> AsyncIterator[AsyncIterator[bytes]]:
        async def pieces() -> AsyncIterator[bytes]:
            yield self._log
            await self.may_end.wait()

        yield pieces()

    async def call(self, method: str, path: str, **_: Any) -> Any:
        self.asked += 1
        return self._found


def conversation(tmp_path: Path, engine: SlowEngine) -> tuple[Conversation, RunDirectory]:
    run = RunDirectory(tmp_path / "r.1")
    run.make()
    run.hand_over({}, 0.0)
    return Conversation(cast(Engine, engine), "c", run, Limits(), "boot"), run


COMPLETED = {"exit_code": 0, "signal": None, "outcome": {"state": "completed"}}


def group_of(pid: int) -> str:
    """What its control groups are called, and other processes' are not, as is the id of a container's."""
    return Path(f"/proc/{pid}/cgroup").read_text().strip()


async def test_the_end_is_known_when_the_supervisor_has_told_it_and_all_are_dead(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    engine = SlowEngine(COMPLETED, process.pid, group_of(process.pid))
    talk, run = conversation(tmp_path, engine)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(talk.hold)
        await anyio.wait_all_tasks_blocked()
        assert "ended" not in run.status()
        process.kill()
    status = run.status()
    assert (status["ended"], status["exit_code"], status["outcome"]["state"]) == (True, 0, "completed")
    assert Path(run.output_path).read_bytes() == b"said\n"
    assert engine.asked == 1


@pytest.mark.parametrize(
    ("status", "container", "host"),
    [
        (COMPLETED, "another's", {}),
        (COMPLETED, "", {"PidMode": "host"}),
        ({"exit_code": None, "signal": int(signal.SIGKILL)}, "", {}),
    ],
)
async def test_otherwise_the_engine_has_to_say_it(
    status: dict[str, Any],
    container: str,
    host: dict[str, str],
    tmp_path: Path,
    process: subprocess.Popen[bytes],
) -> None:
    """Its first process is not seen, or not all die with it, or who sent a kill has to be asked."""
    engine = SlowEngine(status, process.pid, container, **host)
    talk, run = conversation(tmp_path, engine)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(talk.hold)
        await anyio.wait_all_tasks_blocked()
        process.kill()
        process.wait()
        await anyio.wait_all_tasks_blocked()
        assert "ended" not in run.status()
        engine.may_end.set()
    assert run.status()["ended"]
    assert run.status().get("out_of_memory", False) is (status["signal"] == signal.SIGKILL)
    assert engine.asked == 2


async def test_an_end_that_the_flow_has_told_is_not_believed_while_it_lives(
    tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowagent.runners.docker.conversation.LAST_BREATH", 0.05)
    engine = SlowEngine(COMPLETED, process.pid, group_of(process.pid))
    talk, run = conversation(tmp_path, engine)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(talk.hold)
        await anyio.sleep(0.2)
        assert "ended" not in run.status()
        engine.may_end.set()
    assert run.status()["ended"]
    assert engine.asked == 2

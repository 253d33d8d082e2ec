"""Run directories are made ahead and removed by a thread of its own, whatever is in their place."""

import threading
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from flowagent.daemon.log import make_log
from flowagent.daemon.workshop import SPARE, Workshop
from flowagent.runtime.rundir import RunDirectory

pytestmark = pytest.mark.anyio


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(10):
        while not condition():
            await anyio.sleep(0.005)


def spares(runs: Path) -> list[Path]:
    return [path for path in runs.glob(SPARE + "*") if (path / "work/results").is_dir()]


def make_workshop(runs: Path, count: int) -> Workshop:
    return Workshop(runs, count, make_log("json", "error"))


async def test_an_attempt_takes_a_directory_that_was_made_ahead_and_another_takes_its_place(
    tmp_path: Path,
) -> None:
    workshop = make_workshop(tmp_path, 2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(workshop.run)
        await until(lambda: len(spares(tmp_path)) == 2)
        before = {path.stat().st_ino for path in spares(tmp_path)}
        run = RunDirectory(tmp_path / "r.1")
        workshop.make(run)
        assert Path(run.path).stat().st_ino in before
        assert all(Path(path).stat().st_mode & 0o777 == 0o700 for path in (run.path, run.work, run.tmp))
        await until(lambda: len(spares(tmp_path)) == 2)
        await workshop.close()
    assert list(tmp_path.iterdir()) == [tmp_path / "r.1"]


async def test_without_one_made_ahead_it_is_made_at_once(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path, 1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(workshop.run)
        await until(lambda: len(spares(tmp_path)) == 1)
        RunDirectory(spares(tmp_path)[0]).remove()  # somebody tidied up
        for number in range(5):
            run = RunDirectory(tmp_path / f"r.{number}")
            workshop.make(run)
            assert Path(run.results).is_dir()
        await workshop.close()


async def test_what_is_to_be_removed_goes_whatever_a_flow_left_in_it(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path, 1)
    plain, stuffed, kept = (RunDirectory(tmp_path / name) for name in ("a.1", "b.1", "c.1"))
    for run in (plain, stuffed, kept):
        run.make()
        run.hand_over({}, 0.0)
    left = Path(stuffed.work) / "deep" / "er"
    left.mkdir(parents=True)
    (left / "file").write_text("x")
    left.chmod(0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(workshop.run)
        workshop.remove(plain)
        workshop.remove(stuffed)
        await workshop.close()
    assert list(tmp_path.iterdir()) == [tmp_path / "c.1"]


async def test_a_full_disk_is_said_to_the_attempt_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = make_workshop(tmp_path, 3)
    full = OSError(28, "No space left on device")

    def fail(run: RunDirectory) -> None:
        Path(run.path).mkdir()
        raise full

    async with anyio.create_task_group() as tasks:
        with monkeypatch.context() as patched:
            patched.setattr(RunDirectory, "make", fail)
            tasks.start_soon(workshop.run)
            await until(lambda: workshop._made == 1)
            with pytest.raises(OSError, match="No space"):
                workshop.make(RunDirectory(tmp_path / "r.1"))
            await until(lambda: workshop._jobs.empty())
            await until(lambda: not list(tmp_path.glob(SPARE + "*")))
        workshop.make(RunDirectory(tmp_path / "r.2"))
        await until(lambda: len(spares(tmp_path)) == 3)
        await workshop.close()


async def test_one_that_left_does_nothing_more_where_another_works(tmp_path: Path) -> None:
    first, second = make_workshop(tmp_path, 2), make_workshop(tmp_path, 2)
    later, goes_on = RunDirectory(tmp_path / "r.1"), threading.Event()
    later.make()

    def hang() -> None:
        goes_on.wait(10)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first.run)
        await until(lambda: len(spares(tmp_path)) == 2)
        first._jobs.put(hang)
        first.remove(later)
        await until(lambda: first._jobs.qsize() == 1)
        tasks.cancel_scope.cancel()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(second.run)
        await until(lambda: len(spares(tmp_path)) == 4)
        goes_on.set()
        await until(lambda: first._jobs.qsize() == 1)  # what ends its thread is not taken any more
        await second.close()
    assert len(spares(tmp_path)) == 2
    assert Path(later.results).is_dir()

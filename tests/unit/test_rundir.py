"""The run directory: who is alive is answered by the kernel, and torn writes are harmless."""

import os
import signal
import time

import pytest

from flowagent.runtime.rundir import RunDirectory, boottime


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "r.1")
    directory.make()
    directory.hand_over({"run_id": "r"}, boottime() + 60)
    return directory


def hold_status(run: RunDirectory) -> int:
    """A process that supervises, as far as its status file shows; its pid."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            fd = run.open_status()
            os.write(fd, b'{"started": 1}\n{"torn')
            os.write(write, b"x")
            time.sleep(60)
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    return pid


def test_the_supervisor_is_known_as_long_as_it_lives(run: RunDirectory) -> None:
    assert run.supervisor() is None
    pid = hold_status(run)
    try:
        assert run.supervisor() == pid
        assert run.status() == {"started": 1}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert run.supervisor() is None


def test_an_attempt_has_one_supervisor_ever(run: RunDirectory) -> None:
    pid = hold_status(run)
    with pytest.raises(BlockingIOError):
        run.open_status()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with pytest.raises(BlockingIOError):  # it began once: it never begins again
        run.open_status()
    assert not run.take_place()


def test_a_place_that_was_taken_cannot_be_had(run: RunDirectory) -> None:
    assert run.take_place()
    with pytest.raises(BlockingIOError):
        run.open_status()


def test_a_lease_is_rewritten_whole_and_read_closed(run: RunDirectory) -> None:
    for value in (123456789.125, 7.5):
        run.write_lease(value)
        assert run.read_lease() == value
    with open(run.lease_path, "wb") as file:
        file.write(b"junk")
    assert run.read_lease() == 0.0
    os.unlink(run.lease_path)
    assert run.read_lease() == 0.0


def test_removal_copes_with_what_a_flow_leaves_and_follows_no_link(run: RunDirectory, tmp_path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    (outside / "keep").write_text("x")
    os.symlink(outside, run.work + "/link")
    os.makedirs(run.work + "/a/b")
    open(run.work + "/a/b/f", "w").close()
    os.chmod(run.work + "/a/b", 0)
    os.chmod(run.work + "/a", 0)
    run.remove()
    assert not os.path.exists(run.path)
    assert (outside / "keep").read_text() == "x"
    assert outside.stat().st_mode & 0o777 == 0o755

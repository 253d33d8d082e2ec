"""Hooks by themselves: what is kept of their words, and which of them are not run at all."""

from __future__ import annotations

import io
import os
import signal
import tempfile
from pathlib import Path

import anyio
import pytest
from tests.e2e.operating import executable

from flowagent.daemon.hooks import BEFORE_RUN, Hooks
from flowagent.daemon.log import make_log
from flowagent.errors import HookError

pytestmark = pytest.mark.anyio
FACTS = {"run": "r1", "attempt": 1}


def hooks(directory: Path, stream: io.StringIO | None = None) -> Hooks:
    return Hooks(directory, 20.0, make_log("json", "debug", stream or io.StringIO()))


async def refusal(tmp_path: Path, script: str, *secrets: str) -> str:
    """What a run's reason would be."""
    hook = executable(tmp_path / "hooks" / BEFORE_RUN, f"#!/bin/sh\n{script}\nexit 1\n")
    with pytest.raises(HookError) as caught:
        await hooks(hook.parent).run(BEFORE_RUN, FACTS, secrets)
    return str(caught.value)


# -- words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo first; echo 'not on  Sundays' >&2", "not on Sundays"),
        (r"printf 'red: \033[31m\007\302\233x\342\200\256 hot\r\n\n'", "red: [31m x hot"),
        (r"printf 'this\n\033\n \n'", "this"),
        ("", "it exited with 1"),
        ("kill -9 $$", "it was killed by signal 9"),
    ],
)
async def test_last_words_are_a_line_that_no_terminal_obeys(tmp_path: Path, script: str, said: str) -> None:
    assert await refusal(tmp_path, script) == f"the hook before-run refused: {said}"


async def test_last_words_have_no_secrets_in_them(tmp_path: Path) -> None:
    said = await refusal(tmp_path, "echo hunter2 aHVudGVyMg==; echo 'the key hunter2 is wrong'", "hunter2")
    assert said == "the hook before-run refused: the key **** is wrong"
    said = await refusal(tmp_path, "yes hunter2 | head -c 200000 | tr '\\n' ,", "hunter2")
    assert "hunter" not in said and "unter2" not in said and "****,****" in said


async def test_neither_has_the_log(tmp_path: Path) -> None:
    hook = executable(tmp_path / "hooks" / "after-run", "#!/bin/sh\necho no: hunter2\nexit 1\n")
    log = io.StringIO()
    await hooks(hook.parent, log).tell("after-run", FACTS, ["hunter2"])
    assert "refused: no: ****" in log.getvalue() and "hunter2" not in log.getvalue()


# -- output ----------------------------------------------------------------------------------------------


async def test_however_much_it_says_only_the_end_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sizes = f"stat -L -c %s /proc/$$/fd/1 > {tmp_path}/size"  # of a pipe: none
    said = await refusal(tmp_path, f"head -c 5000000 /dev/zero | tr '\\0' x\n{sizes}\necho; echo enough")
    assert said == "the hook before-run refused: enough"
    assert (tmp_path / "size").read_text() == "0\n"


async def test_what_a_hook_leaves_running_is_not_waited_for(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with anyio.fail_after(10):
        said = await refusal(tmp_path, f"sleep 100 & echo $! > {pid}; echo no")
    assert said.endswith("refused: no")
    os.kill(int(pid.read_text()), signal.SIGKILL)


async def test_hooks_leave_no_descriptor_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    await refusal(tmp_path, "echo no")
    (tmp_path / "hooks" / BEFORE_RUN).write_text("#!/no/such/interpreter\n")
    with pytest.raises(HookError):
        await hooks(tmp_path / "hooks").run(BEFORE_RUN, FACTS)
    assert len(os.listdir("/proc/self/fd")) == before

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
    (tmp_path / "hooks" / BEFORE_RUN).write_bytes(b"\x7fELF\0")
    with pytest.raises(HookError, match="before-run cannot be started: Exec format error; mend it"):
        await hooks(tmp_path / "hooks").run(BEFORE_RUN, FACTS)
    assert len(os.listdir("/proc/self/fd")) == before


# -- what is refused before a run is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo hello\n", "is no program: its first line has to name what executes it, such as #!/bin/sh"),
        ("", "is no program"),
        ("#!/bin/sh\r\nexit\r\n", r"names '/bin/sh\\r' in its first line, which is no program here"),
        ("#! /no/such/python -u\n", "names '/no/such/python' in its first line"),
        ("#!\n", "names '' in its first line"),
    ],
)
async def test_a_text_that_nothing_executes_is_refused(tmp_path: Path, text: str, why: str) -> None:
    hook = executable(tmp_path / "hooks" / "after-run.x", text)
    with pytest.raises(HookError, match=why):
        hooks(hook.parent).check()


async def test_programs_are_not_refused(tmp_path: Path) -> None:
    directory = tmp_path / "hooks"
    executable(directory / "before-run", "#!/usr/bin/env sh\n")
    executable(directory / "before-run.1", "#!\t/bin/sh -e\nexit 0\n")
    (directory / "before-run.2").symlink_to("/bin/true")
    hooks(directory).check()
    await hooks(directory).run(BEFORE_RUN, FACTS)


async def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "hooks"
    (directory / BEFORE_RUN).mkdir(parents=True)
    with pytest.raises(HookError, match="before-run is no file; remove it, or name it otherwise"):
        hooks(directory).check()
    (directory / BEFORE_RUN).rmdir()
    (directory / BEFORE_RUN).symlink_to("nowhere")
    with pytest.raises(HookError, match="before-run cannot be used: No such file or directory; remove it"):
        hooks(directory).check()


async def test_nobody_else_may_be_able_to_put_hooks_there(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    hook = executable(make(open_to_all / "hooks") / BEFORE_RUN, "#!/bin/sh\n")
    hooks(hook.parent).check()
    open_to_all.chmod(0o777)
    with pytest.raises(
        HookError, match=rf"others .* may change {open_to_all}; run: chmod go-w {open_to_all},"
    ):
        hooks(hook.parent).check()
    (tmp_path / "link").symlink_to(hook.parent)
    with pytest.raises(HookError, match=rf"may change {open_to_all}; run"):
        hooks(tmp_path / "link").check()
    open_to_all.chmod(0o1777)  # as /tmp: what is there stays its owner's
    hooks(tmp_path / "link").check()
    hook.parent.chmod(0o1777)
    with pytest.raises(HookError, match=rf"may add some; run: chmod go-w {hook.parent}"):
        hooks(hook.parent).check()


def make(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory

"""Warm starts: what a fork shares and what it must not, preloading, byte code, launchers that come and go."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.e2e.harness import COMMAND, Site, until

import flowagent

FLOWS = """
    import os, random, sys, threading, uuid
    from flowagent import flow
    from flowagent.run_configs import LocalRun

    WARM = "colorsys" in sys.modules

    @flow
    def warm():
        print("warm" if WARM else "cold")

    @flow(run_config=LocalRun(preload=["colorsys"]))
    def asks():
        print("warm" if WARM else "cold")

    @flow(run_config=LocalRun(preload=["nosuchmodule"]))
    def wrong():
        pass

    @flow(run_config=LocalRun(preload=["pandas"]))
    def frames():
        assert "pandas" in sys.modules, "it was not preloaded"
        import io
        import pandas
        frame = pandas.DataFrame({"word": ["a", "b", "a"] * 5000, "number": range(15000)})
        written = io.BytesIO()
        frame.to_parquet(written)
        sums = pandas.read_parquet(io.BytesIO(written.getvalue())).groupby("word")["number"].sum()
        square = frame[["number"]].to_numpy(dtype=float).reshape(150, 100)
        print("sums", *sums, (square @ square.T).shape)

    @flow
    def chance():
        ours = random.random()
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, repr(random.random()).encode())
            os._exit(0)
        theirs = float(os.read(read, 100))
        assert ours != theirs, "the fork handlers of the random module are missing"
        assert threading.main_thread().native_id == os.getpid()
        print("chance", ours, uuid.uuid4())

    @flow
    def slow():
        import time
        for number in range(60):
            print("line", number, flush=True)
            time.sleep(0.1)
"""


@pytest.fixture
def flows(site: Site) -> Site:
    site.command("register", site.write("flow.py", FLOWS))
    return site


def test_preloading(flows: Site) -> None:
    flows.start("--name", "plain")
    assert "cold" in flows.watch("warm")
    assert "warm" in flows.watch("asks")
    reason = flows.wait_for(flows.submit("wrong"))["reason"]
    assert "cannot preload nosuchmodule: ModuleNotFoundError: No module named 'nosuchmodule'" in reason
    assert "\n" not in reason
    (agent,) = flows.agents
    flows.stop(agent)
    flows.start("--name", "warm", "--preload", "colorsys")
    assert "warm" in flows.watch("warm")


def test_pandas_is_preloaded_with_the_threads_of_its_libraries(flows: Site) -> None:
    flows.start()
    for _ in range(3):
        assert "sums 74995000 37497500 (150, 150)" in flows.watch("frames")


def test_a_module_that_starts_threads_cannot_be_preloaded(tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\n"
        "from flowagent.runtime import linux\n"
        "linux.set_process_name('main')\n"
        "def work():\n"
        "    linux.set_process_name('worker')\n"
        "    named.set()\n"
        "    time.sleep(60)\n"
        "named = threading.Event()\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "named.wait()\n"
    )
    code = "from flowagent.runtime.warmth import preload\npreload(['threaded'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "cannot preload threaded: threads were left running (worker)" in done.stderr


def test_no_two_runs_have_the_same_chance(flows: Site) -> None:
    flows.start()
    seen = {flows.watch("chance").partition("chance ")[2].splitlines()[0] for _ in range(3)}
    assert len(seen) == 3


def test_byte_code_is_kept_and_belongs_to_the_file(site: Site) -> None:
    padding = "\n".join(f"def f{number}(x):\n    return x + {number}" for number in range(100))
    helper = site.write("helper.py", f"{padding}\nanswer = 41\n")
    script = site.write(
        "flow.py",
        """
        from flowagent import flow
        import helper
        @flow
        def big():
            print("answer", helper.answer)
            open(".uncompiled", "w").write('["/etc/passwd", "../..", 7, "' + helper.__file__ + '"]')
        """,
    )
    script.write_text(script.read_text() + padding)
    site.command("register", script)
    shutil.rmtree(script.parent / "__pycache__", ignore_errors=True)  # of registration, as of any import
    site.start()
    assert "answer 41" in site.watch("big")
    kept = sorted(site.home.glob("bytecode/*/*"))
    assert len(kept) == 2, "the script and what it imports, and nothing that it only claimed"
    times = [path.stat().st_mtime_ns for path in kept]
    assert "answer 41" in site.watch("big")
    assert [path.stat().st_mtime_ns for path in kept] == times
    helper.write_text(helper.read_text().replace("41", "42"))
    assert "answer 42" in site.watch("big"), "edited at once, with the same size"
    assert not list(site.sources.rglob("__pycache__"))


def test_interpreters_that_anybody_could_have_put_there_are_refused(site: Site) -> None:
    place = site.sources / "bin"
    place.mkdir()
    program = place / "python"
    program.symlink_to(sys.executable)
    (site.home / "flows").mkdir(parents=True)
    copy = site.home / "flows" / "python"
    shutil.copy("/bin/true", copy)
    open_place = site.root / "open"
    open_place.mkdir()
    shutil.copy("/bin/true", open_place / "python")
    open_place.chmod(0o777)
    text = """
        from flowagent import flow
        from flowagent.run_configs import LocalRun
        @flow(run_config=LocalRun(python={python!r}))
        def {name}():
            print("ran")
    """
    cases = {"good": program, "home": copy, "others": open_place / "python"}
    for name, python in cases.items():
        site.command("register", site.write(f"{name}.py", text.format(name=name, python=str(python))))
    site.start()
    assert "ran" in site.watch("good")
    assert "is open to flows or holds their sources" in site.wait_for(site.submit("home"))["reason"]
    reason = site.wait_for(site.submit("others"))["reason"]
    assert f"may change {open_place}" in reason and "chmod go-w" in reason


def _launchers(site: Site) -> set[Path]:
    """Sockets of launchers; the agent's own is there as well."""
    return {path for path in site.home.glob("agents/*/launchers/*.sock") if path.name != "control.sock"}


def test_a_newer_version_takes_over_while_the_older_finishes_its_runs(flows: Site, tmp_path: Path) -> None:
    agent = flows.start()
    run = flows.submit("slow")
    until(lambda: "line 5" in flows.output(run))
    agent.kill()
    agent.wait()
    old = _launchers(flows)
    newer = tmp_path / "newer"
    shutil.copytree(Path(flowagent.__file__).parent, newer / "flowagent")
    with open(newer / "flowagent" / "runtime" / "__init__.py", "a") as file:
        file.write("\n# a newer version\n")
    log = open(flows.root / "newer.log", "wb")  # noqa: SIM115 - it outlives this line
    upgraded = subprocess.Popen(
        [*COMMAND, "start", "--log-format", "json"],
        env={**flows.environment, "PYTHONPATH": str(newer)},
        stderr=log,
        cwd=tmp_path,
    )
    log.close()
    upgraded.log = flows.root / "newer.log"  # type: ignore[attr-defined]
    flows.agents.append(upgraded)
    assert "cold" in flows.watch("warm")
    new = _launchers(flows) - old
    assert len(old) == len(new) == 1, "each version has a launcher of its own"
    shown = flows.wait_for(run)
    assert (shown["state"], shown["attempt"]) == ("completed", 1), shown
    lines = [line for line in flows.output(run).splitlines() if line.startswith("line")]
    assert lines == [f"line {number}" for number in range(60)]


def test_launchers_that_nobody_needs_end(flows: Site) -> None:
    """By the launcher's own clock, in a process of its own: nobody connects for a second."""
    code = """
import socket, sys
from flowagent.runtime import launcher, sandbox
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.bind(sys.argv[1] + "/sock")
server.listen()
open(sys.argv[1] + "/key", "wb").write(b"k" * 32)
rules = sandbox.Rules(home=sys.argv[1], runs=sys.argv[1]).to_json()
launcher.main([str(server.detach()), sys.argv[1] + "/key", rules, ""], idle_exit=1.0)
"""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(flows.shared)], check=True, timeout=30)
    assert 1.0 <= time.monotonic() - began < 15

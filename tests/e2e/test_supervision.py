"""However a flow ends, its run ends at once, with the right state and a reason."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tests.e2e.harness import Site, processes_of, until

from flowagent.runtime.rundir import RunDirectory

FLOWS = """
    import os, signal, subprocess, sys, time
    from flowagent import flow
    from flowagent.run_configs import LocalRun

    @flow
    def fine():
        print("all is well")

    @flow(run_config=LocalRun(limits={"memory": "64M"}))
    def greedy():
        hoard = []
        while True:
            hoard.append(bytearray(os.urandom(1 << 20)))

    @flow
    def raises():
        print("before")
        raise ValueError("no such row")

    @flow
    def exits():
        os._exit(3)

    @flow
    def leaves():
        sys.exit(4)

    @flow
    def dies():
        os.kill(os.getpid(), signal.SIGKILL)

    @flow
    def segfaults():
        os.kill(os.getpid(), signal.SIGSEGV)

    @flow
    def hangs():
        print("hanging", flush=True)
        time.sleep(600)

    @flow
    def stubborn():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = '''if 1:
            import os, signal, time
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if os.fork(): os._exit(0)
            os.setsid()
            if os.fork(): os._exit(0)
            open(os.environ["MARK"], "w").write(str(os.getpid()))
            time.sleep(600)
        '''
        subprocess.run([sys.executable, "-c", code])
        print("daemon is out", flush=True)
        time.sleep(600)

    @flow
    def shells():
        print("before")
        subprocess.run("echo truncating > /dev/stderr", shell=True, check=True)
        for change, *to in ((os.ftruncate, 0), (os.ftruncate, 1 << 50), (os.lseek, 0, 0)):
            try:
                change(1, *to)
            except OSError:
                print("refused")
        print("after")

    @flow
    def floods(lines: int = 20):
        for _ in range(lines):
            os.write(1, b"x" * 16383 + b"\\n")

    @flow
    def leaks():
        subprocess.Popen(["sleep", "600"], start_new_session=True)
"""


@pytest.fixture
def flows(site: Site) -> Site:
    site.command("register", site.write("flows.py", FLOWS))
    site.start()
    return site


@pytest.mark.parametrize(
    ("name", "state", "reason"),
    [
        ("fine", "completed", None),
        ("raises", "failed", "ValueError: no such row"),
        ("exits", "failed", "exited with code 3"),
        ("leaves", "failed", "4"),
        ("dies", "crashed", "killed by SIGKILL"),
        ("segfaults", "crashed", "killed by SIGSEGV"),
    ],
)
def test_every_end_is_told_apart(flows: Site, name: str, state: str, reason: str | None) -> None:
    shown = flows.wait_for(flows.submit(name))
    assert shown["state"] == state
    assert (shown["reason"] or "") == "" if reason is None else reason in shown["reason"]


def test_exit_at_import_ends_the_run(site: Site) -> None:
    script = site.write("flow.py", "from flowagent import flow\n@flow\ndef one():\n    pass\n")
    site.command("register", script)
    script.write_text("import sys\nprint('loading')\nsys.exit(7)\n")
    site.start()
    run = site.submit("one")
    shown = site.wait_for(run)
    assert (shown["state"], "sys.exit(7)" in shown["reason"]) == ("failed", True), shown
    assert "loading" in site.output(run)


def test_a_traceback_is_in_the_output_and_points_into_the_script(flows: Site) -> None:
    run = flows.submit("raises")
    flows.wait_for(run)
    output = flows.output(run)
    assert "before" in output
    assert "sources/flows.py" in output and 'raise ValueError("no such row")' in output


def test_a_hang_past_the_timeout_fails(site: Site) -> None:
    site.command(
        "register",
        site.write(
            "flow.py",
            """
            import time
            from flowagent import flow
            from flowagent.run_configs import LocalRun
            @flow(run_config=LocalRun(timeout=0.5))
            def slow():
                print("begun", flush=True)
                try:
                    time.sleep(600)
                finally:
                    print("cleaned up", flush=True)
            """,
        ),
    )
    site.start()
    run = site.submit("slow")
    shown = site.wait_for(run, timeout=10)
    assert (shown["state"], shown["reason"]) == ("failed", "timed out after 0.5 s")
    assert "cleaned up" in site.output(run)


def test_cancel_reaches_daemonised_grandchildren_that_ignore_sigterm(flows: Site) -> None:
    mark = flows.shared / "mark"
    run = flows.submit("stubborn", "--env", f"MARK={mark}")
    until(lambda: mark.exists() and mark.read_text() and "daemon is out" in flows.output(run))
    daemon = int(mark.read_text())
    os.kill(daemon, 0)
    flows.command("cancel", run, "--reason", "enough")
    shown = flows.wait_for(run, timeout=30)
    assert (shown["state"], shown["reason"]) == ("cancelled", "enough")
    with pytest.raises(ProcessLookupError):
        os.kill(daemon, 0)


def test_what_a_flow_leaves_running_ends_with_it(flows: Site) -> None:
    run = flows.submit("leaks")
    assert flows.wait_for(run)["state"] == "completed"
    stamped = [
        pid for pid in processes_of(flows.home) if b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert stamped == []


def test_a_killed_supervisor_is_a_crash_and_leaves_nothing(flows: Site) -> None:
    run = flows.submit("hangs")
    until(lambda: "hanging" in flows.output(run))
    (directory,) = flows.home.glob(f"agents/*/runs/{run}.1")
    supervisor = RunDirectory(directory).supervisor()
    assert supervisor is not None
    os.kill(supervisor, signal.SIGKILL)
    shown = flows.wait_for(run)
    assert (shown["state"], "supervisor" in shown["reason"]) == ("crashed", True)
    until(lambda: not [pid for pid in processes_of(flows.home) if _comm(pid).startswith("flow:")], 5)


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


@pytest.mark.parametrize("level", ["process", "landlock", "namespace"])
def test_no_flow_can_cut_its_output_or_put_a_hole_into_it(site: Site, level: str) -> None:
    site.command("register", site.write("flows.py", FLOWS))
    site.start("--sandbox", level)
    run = site.submit("shells")
    assert site.wait_for(run)["state"] == "completed"
    printed = site.command("logs", run).stdout
    assert printed == "before\ntruncating\nrefused\nrefused\nrefused\nafter\n"


def test_output_ends_at_its_limit_however_soon_the_flow_does(site: Site) -> None:
    site.command("register", site.write("flows.py", FLOWS))
    site.start("--max", "output=100K")
    for lines in (5, 10, 1000):  # what a pipe holds, and more
        run = site.submit("floods", "-p", f"lines={lines}")
        shown = site.wait_for(run)
        kept = len(site.command("logs", run).stdout)
        if lines == 5:
            assert shown["state"] == "completed" and kept == 5 * 16384
        else:
            assert shown["state"] == "failed" and 101_000 < kept <= 100 << 10  # events count, too
            assert shown["reason"] == "stopped: it used more than its limit of 100K of output"


def test_much_output_is_kept_whole(site: Site) -> None:
    site.command("register", site.write("flows.py", FLOWS))
    site.start()
    run = site.submit("floods", "-p", "lines=3000")
    assert site.wait_for(run)["state"] == "completed"
    assert len(site.command("logs", run).stdout) == 3000 * 16384


def test_out_of_memory_is_named(flows: Site) -> None:
    shown = flows.wait_for(flows.submit("greedy"))
    assert shown["state"] == "crashed", shown
    assert shown["reason"] == "killed: out of memory (its limit is 64M)"


def test_a_full_run_is_recorded_with_its_figures(flows: Site) -> None:
    run = flows.submit("fine")
    shown = flows.wait_for(run)
    attempt = shown["attempts"][-1]
    assert attempt["exit_code"] == 0 and attempt["signal"] is None
    assert attempt["peak_memory"] > 1 << 20 and attempt["cpu_time"] > 0
    assert attempt["revision"].startswith("sha256:") and attempt["sandbox"] == "landlock"

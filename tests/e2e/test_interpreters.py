"""Flows in other interpreters than the agent's: nothing but CPython is needed there."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tests.e2e.harness import Site

SCRIPT = """
    import importlib.util, json, os, sys
    from pathlib import Path
    from flowagent import Flow, Parameter, context, get_logger, task, unmapped
    from flowagent.results import JSONSerializer, LocalResult
    from flowagent.run_configs import LocalRun
    from flowagent.storage import Local

    @task(result=LocalResult(serializer=JSONSerializer()))
    def version():
        return list(sys.version_info[:3])

    @task(max_retries=1, log_stdout=True)
    def read(suffix):
        if context.task_run_count < 2:
            raise OSError("not yet")
        text = (Path(__file__).parent / "side.txt").read_text() + suffix
        print("read", text)
        return text

    @task(timeout=20)
    def show(version, texts):
        origin = importlib.util.find_spec("cloudpickle").origin
        seen = [version, texts, "site-packages" in origin, sys.implementation.name]
        print("seen " + json.dumps(seen))

    @task
    def fail(x):
        get_logger().info("about to fail")
        raise ValueError("as it has to")

    with Flow(NAME, Local(stored_as_script=True), LocalRun(python=PYTHON)) as flow:
        show(version(), read.map(["!", "?"]))

    with Flow(NAME + " failing", Local(stored_as_script=True), LocalRun(python=PYTHON)) as failing:
        fail(Parameter("x", default=1))
"""


def interpreters() -> list[str]:
    return os.environ.get("FLOWAGENT_TEST_PYTHONS", sys.executable).split(os.pathsep)


def version_of(python: str) -> list[int]:
    code = "import json, sys; print(json.dumps(sys.version_info[:3]))"
    return list(json.loads(subprocess.run([python, "-c", code], capture_output=True, timeout=30).stdout))


def with_python(site: Site, name: str, python: str) -> str:
    """Register the flow of that name, to be executed by that interpreter."""
    site.write("side.txt", "beside")
    text = SCRIPT.replace("PYTHON", repr(python)).replace("NAME", repr(name))
    script = site.write(f"{re.sub(r'[^a-z0-9]', '_', name)}.py", text)
    site.command("register", script)
    return name


@pytest.fixture(scope="module")
def site(workshop: Site) -> Site:
    return workshop


@pytest.mark.parametrize("python", interpreters())
def test_a_flow_runs_in_the_interpreter_that_it_names(site: Site, python: str) -> None:
    version = version_of(python)
    name = with_python(site, f"in {'.'.join(map(str, version))}", python)
    output = site.watch(name)
    seen = json.loads(re.search(r"seen (\[.*\])", output).group(1))  # type: ignore[union-attr]
    assert seen == [version, ["beside!", "beside?"], False, "cpython"]
    assert "read beside!" in output
    failed = site.watch(f"{name} failing", code=1)
    assert "about to fail" in failed
    assert 'raise ValueError("as it has to")' in failed
    assert "task fail-1 failed: ValueError: as it has to" in failed


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_what_is_no_interpreter_is_said_and_disturbs_nobody(site: Site, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    wrong = {
        str(tmp_path / "nowhere"): "No such file or directory",
        str(plain): "Permission denied",
        "/bin/true": "did not come up as a launcher",
        program(
            tmp_path / "complains", "#!/bin/sh\necho 'no license found' >&2\nexit 3\n"
        ): "no license found",
        program(tmp_path / "garbage", "\x7fELF no program"): "Exec format error",
        str(tmp_path): "Permission denied",
    }
    runs = {
        python: site.submit(with_python(site, f"wrong {number}", python))
        for number, python in enumerate(wrong)
    }
    good = site.submit(with_python(site, "right", sys.executable))
    assert site.wait_for(good)["state"] == "completed"
    for python, run in runs.items():
        shown = site.wait_for(run)
        assert shown["state"] == "crashed"
        reason = shown["reason"]
        assert wrong[python] in reason, reason
        assert python in reason
        assert "\n" not in reason and "Traceback" not in reason
    assert stat.S_ISREG(plain.stat().st_mode)
    assert site.wait_for(site.submit("right"))["state"] == "completed"


def test_a_pickle_of_another_minor_version_names_both(site: Site) -> None:
    here = version_of(sys.executable)
    others = [python for python in interpreters() if version_of(python)[:2] != here[:2]]
    text = """
        from flowagent import Flow, task
        from flowagent.run_configs import LocalRun
        from flowagent.storage import Local

        @task
        def one():
            print("one")

        with Flow("pickled", Local(), LocalRun(python=PYTHON)) as flow:
            one()
    """
    other = others[0] if others else sys.executable
    site.command("register", site.write("pickled.py", text.replace("PYTHON", repr(other))))
    if not others:  # one interpreter only: let the pickle say that it was made by another
        with closing(sqlite3.connect(site.home / "flowagent.db", timeout=10)) as database, database:
            old = '"python":"{}"'.format(".".join(map(str, here)))
            database.execute("UPDATE flow_version SET spec = replace(spec, ?, ?)", [old, '"python":"3.8.1"'])
    output = site.watch("pickled", code=1)
    made = ".".join(map(str, here)) if others else "3.8.1"
    running = ".".join(map(str, version_of(other)))
    assert f"a flow pickled by Python {made} cannot run in Python {running}" in output
    assert "stored_as_script=True" in output

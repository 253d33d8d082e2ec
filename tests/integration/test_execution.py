"""``flowagent execute``: a brief in a file or on standard input, and what comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.gitservers import Repository

from flowagent import ground
from flowagent.runtime import container
from flowagent.runtime.container import boot_id
from flowagent.runtime.events import Event, Parser, Text
from flowagent.runtime.limits import Limits
from flowagent.runtime.rundir import boottime

FLOW = """
import os, time
from flowagent import flow, get_logger

@flow
def once(seconds=0):
    print("here", os.environ["COLOUR"], os.path.basename(__file__), flush=True)
    time.sleep(seconds)
"""


def brief(script: Path, **changes: Any) -> dict[str, Any]:
    return {
        "spec": {
            "run_id": "r", "attempt": 1, "flow_name": "once", "parameters": {}, "scheduled_for": 0,
            "labels": [], "source": {}, "revision": "unresolved", "in_place": False, "result": None,
            "env": {"COLOUR": "red"}, "working_dir": None, "import_paths": [],
            "sandbox": "container", "grants": {},
        },
        "storage": {"type": "Local", "path": str(script), "stored_as_script": True},
        "files": None, "secrets": {}, "limits": Limits()._asdict(), "grace": 1.0,
        "deadline": boottime() + 60, "boot_id": boot_id(), **changes,
    }  # fmt: skip


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "once.py"
    path.write_text(FLOW)
    return path


EXECUTE = (sys.executable, "-m", "flowagent", "execute", "--spec")


def execute(
    spec: str, given: str = "", command: Sequence[str] = EXECUTE
) -> tuple[int, str, list[dict[str, Any]]]:
    """The exit code, the text and the events."""
    done = subprocess.run([*command, spec], input=given.encode(), stdout=subprocess.PIPE, timeout=60)
    items = list(Parser().feed(done.stdout))
    text = b"".join(item.data for item in items if isinstance(item, Text)).decode()
    return done.returncode, text, [item.data for item in items if isinstance(item, Event)]


def test_a_brief_in_a_file(script: Path, tmp_path: Path, home: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(brief(script)))
    code, text, events = execute(str(spec))
    assert (code, text) == (0, "here red once.py\n"), events
    kinds = [event["event"] for event in events if event["event"] != "task"]
    assert kinds[:2] == ["container.began", "resolved"]
    assert kinds[2:] == ["container.began", "loaded", "container.at", "container.ended"]
    assert events[1]["revision"].startswith("sha256:")
    assert events[-2]["output"] > len(text)
    status = events[-1]["status"]
    assert status["exit_code"] == 0 and status["outcome"]["state"] == "completed"


@pytest.mark.parametrize("without_flowagent", [False, True])
def test_a_flow_that_is_there_already(
    script: Path, tmp_path: Path, home: Path, without_flowagent: bool
) -> None:
    given = brief(script, storage=None, deadline=0, boot_id="of another machine")
    given["spec"]["source"] = {"kind": "script", "directory": str(script.parent), "path": script.name}
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(given))
    inside = (sys.executable, str(ground.lay_out(tmp_path / "ground") / ground.ENTRY), "--container")
    code, text, events = execute(str(spec), command=inside if without_flowagent else EXECUTE)
    assert (code, text) == (0, "here red once.py\n"), events
    assert events[-1]["status"]["outcome"]["state"] == "completed"


@pytest.mark.parametrize("builtin", [True, False])
def test_the_spec_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builtin: bool) -> None:
    if not builtin:
        monkeypatch.delattr(os, "memfd_create")
    run = container.lay_out(str(tmp_path), {"env": {"WORD": "onyx"}, "parameters": {"n": 1}}, 5.0)
    spec = run.read_spec()
    assert (spec["env"]["WORD"], spec["parameters"], run.read_lease()) == ("onyx", {"n": 1}, 5.0)
    assert run.read_spec() == spec  # from its beginning again
    assert os.stat(run.spec_path).st_dev != tmp_path.stat().st_dev
    os.close(int(os.path.basename(os.readlink(run.spec_path))))


def test_what_follows_a_brief_reaches_the_supervisor(script: Path, home: Path) -> None:
    sleepy = brief(script)
    sleepy["spec"]["parameters"] = {"seconds": 60}
    words = [sleepy, {"lease": boottime() + 50}, {"stop": 0.5, "reason": "enough"}]
    code, _, events = execute("-", "".join(json.dumps(word) + "\n" for word in words))
    status = events[-1].get("status", {})
    assert code == 1 and status["stop"] == "stop" and status.get("reason") == "enough", events


def test_nothing_runs_after_its_lease(script: Path, home: Path) -> None:
    code, text, events = execute("-", json.dumps(brief(script, deadline=boottime() - 1)) + "\n")
    assert code == 1 and text == "" and events[-1]["status"]["stop"] == "lease"


def test_what_cannot_be_fetched_is_said(script: Path, home: Path) -> None:
    script.unlink()
    code, _, events = execute("-", json.dumps(brief(script)) + "\n")
    status = events[-1]["status"]
    assert code == 1 and "the flow could not be fetched: Local: no file" in status["gone"]
    assert status["retryable"] is False


@pytest.mark.parametrize("checkout", ["shared", "private"])
def test_a_source_is_checked_and_sealed_as_those_of_agents(checkout: str, tmp_path: Path, home: Path) -> None:
    repository = Repository.make(tmp_path, "one")
    repository.write(
        "once.py", FLOW + "    print(oct(os.stat(__file__).st_mode), os.stat(__file__).st_nlink)"
    )
    repository.commit()
    storage = {
        "type": "Git",
        "flow_path": "once.py",
        "git_clone_url_secret_name": "URL",
        "checkout": checkout,
    }
    given = brief(tmp_path, storage=storage)
    given["spec"]["env"]["FLOWAGENT_SECRET_URL"] = str(repository.bare)
    code, text, events = execute("-", json.dumps(given) + "\n")
    mode = "0o100600" if checkout == "private" else "0o100444"
    assert (code, text) == (0, f"here red once.py\n{mode} 1\n"), events
    (repository.work / "data").symlink_to("/etc")
    repository.commit()
    code, text, events = execute("-", json.dumps(given) + "\n")
    assert code == 1 and text == ""
    assert "symbolic link data leads out of it, to '/etc'" in events[-1]["status"]["gone"]


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ({"type": "Nope"}, "no backend is installed for storage 'Nope'"),
        ({"type": "Local", "path": 5}, "Local: the flow's storage is wrong (TypeError: "),
        ({"type": "Git"}, "Git: the flow's storage is wrong"),
        ({"type": "S3", "bucket": 5}, "S3: the flow's storage is wrong"),
    ],
)
def test_a_storage_that_is_wrong_is_said(
    script: Path, tmp_path: Path, home: Path, storage: dict[str, Any], words: str
) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(brief(script, storage=storage)))
    code, text, events = execute(str(spec))
    status = events[-1].get("status", {})
    assert code == 1 and text == "" and status["retryable"] is False, events
    assert f"the flow could not be fetched: {words}" in status["gone"] and "\n" not in status["gone"]


@pytest.mark.parametrize("storage", [5, "Local", [], {}, {"type": None}, {"type": ["Local"]}])
def test_what_is_no_storage(script: Path, tmp_path: Path, home: Path, storage: Any) -> None:
    test_what_is_no_brief(tmp_path, home, json.dumps(brief(script, storage=storage)))


@pytest.mark.parametrize("content", ["", "{}", "[1]", "nonsense", '{"spec": 1}'])
def test_what_is_no_brief(tmp_path: Path, home: Path, content: str) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(content)
    command = [sys.executable, "-m", "flowagent", "execute", "--spec", str(spec)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "holds nothing that can be executed" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1

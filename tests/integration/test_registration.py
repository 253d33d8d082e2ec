from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.forges import gitlab, server
from tests.forges.repository import BareRepository
from tests.room import files_of_at_most

from flowagent import Flow, Parameter, Secret, flow, settings, task
from flowagent.errors import BackendError, StorageNotFoundError, UsageError
from flowagent.models import Registration
from flowagent.registration import (
    Candidate,
    Registrar,
    changes,
    register_all,
    register_flow,
    registrar,
    summary,
)
from flowagent.results import LocalResult
from flowagent.run_configs import DockerRun, KubernetesRun, LocalRun, UniversalRun
from flowagent.settings import Settings
from flowagent.storage import GitLab, Local, Module

HOST = settings.hostname()


@task
def add(x: int, y: int) -> int:
    return x + y


def build(name: str = "My Flow", default: int = 1, **options: Any) -> Flow:
    with Flow(name, **options) as built:
        add(Parameter("x", default=default), 2)
    return built


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    return settings.load(None, {"FLOWAGENT_HOME": str(tmp_path / "home")})


@pytest.fixture
async def open_registrar(home: Settings) -> AsyncIterator[Registrar]:
    async with registrar(home) as opened:
        yield opened


def uploads(home: Settings) -> list[Path]:
    return sorted(path for path in home.flows_dir.rglob("*") if path.is_file())


async def test_a_flow_gets_all_defaults_of_its_storage(open_registrar: Registrar, home: Settings) -> None:
    found = await open_registrar.register(Candidate(build()))
    assert found.created
    assert found.previous is None
    spec = found.version.spec
    assert (spec.name, spec.kind, found.version.number) == ("My Flow", "dag", 1)
    assert spec.labels == (HOST,)
    assert spec.run_config == UniversalRun().to_json()
    assert spec.result == LocalResult().to_json()
    assert [parameter["name"] for parameter in spec.parameters] == ["x"]
    assert spec.storage["path"] == str(uploads(home)[0])
    assert summary(found) == f"registered My Flow version 1 (labels: {HOST}): new"


async def test_unchanged_content_is_the_same_version_and_one_upload(
    open_registrar: Registrar, home: Settings
) -> None:
    first = await open_registrar.register(Candidate(build()))
    second = await open_registrar.register(Candidate(build()))
    assert second.version == first.version
    assert not second.created
    assert len(uploads(home)) == 1
    assert summary(second) == "My Flow is unchanged: version 1"


async def test_each_change_is_a_version_and_is_said(open_registrar: Registrar) -> None:
    @task
    def other(x: int) -> int:
        return x

    def with_other() -> Flow:
        with Flow("My Flow") as built:
            other(Parameter("x", default=1))
        return built

    await open_registrar.register(Candidate(build()))
    for number, (candidate, expected) in enumerate(
        [
            (build(default=2), "parameters, code"),
            (build(default=2, run_config=LocalRun(env={"A": "1"})), "run config, code"),
            (build(default=2, run_config=LocalRun(labels=["gpu"])), "labels, run config, code"),
            (build(default=2, storage=Module("os")), "storage, labels, run config, result, code"),
            (with_other(), "storage, labels, parameters, tasks, result, code"),
        ],
        start=2,
    ):
        found = await open_registrar.register(Candidate(candidate))
        assert found.created
        assert found.version.number == number
        assert set(expected.split(", ")) - {"code"} <= set(changes(found.previous.spec, found.version.spec))  # type: ignore[union-attr]
        assert "changed " in summary(found)
    back = await open_registrar.register(Candidate(build()))
    assert (back.created, back.version.number) == (False, 1)
    assert summary(back).startswith("went back to My Flow version 1 (labels: ")


async def test_labels_come_from_everywhere(open_registrar: Registrar) -> None:
    candidate = build(
        storage=Local(labels=["s"], add_default_labels=False), run_config=DockerRun("img", labels=["r"])
    )
    found = await open_registrar.register(Candidate(candidate), labels=["a,b", "r"], project="etl")
    assert found.version.spec.labels == ("a", "b", "r", "s")
    assert found.version.spec.project == "etl"
    with pytest.raises(UsageError, match="white space"):
        await open_registrar.register(Candidate(build()), labels=["a b"])


async def test_a_lost_or_changed_artifact_is_uploaded_again(
    open_registrar: Registrar, home: Settings
) -> None:
    first = await open_registrar.register(Candidate(build()))
    uploads(home)[0].unlink()
    second = await open_registrar.register(Candidate(build()))
    assert second.created
    assert Path(second.version.spec.storage["path"]).is_file()
    assert (await open_registrar.register(Candidate(build()))).version == second.version
    Path(second.version.spec.storage["path"]).write_bytes(b"x")
    third = await open_registrar.register(Candidate(build()))
    assert [found.version.number for found in (first, second, third)] == [1, 2, 3]


async def test_one_path_for_two_versions(open_registrar: Registrar, tmp_path: Path) -> None:
    storage = Local(path=tmp_path / "f.pkl")
    first = await open_registrar.register(Candidate(build(storage=storage)))
    await open_registrar.register(Candidate(build(default=2, storage=storage)))
    third = await open_registrar.register(Candidate(build(storage=storage)))
    assert third.version.number == 3  # version 1 points to a file that holds version 2
    assert third.version.spec.storage["path"] == first.version.spec.storage["path"]


async def test_a_script_needs_no_registration_after_an_edit(
    open_registrar: Registrar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "flow.py"
    script.write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    storage = Local(stored_as_script=True)
    first = await open_registrar.register(Candidate(build(storage=storage), Path("flow.py")))
    assert first.version.spec.storage["path"] == str(script)
    assert first.version.spec.storage["artifact"] is None
    script.write_text("x = 2\n")
    second = await open_registrar.register(Candidate(build(storage=storage), script))
    assert second.version == first.version
    with pytest.raises(BackendError, match=r"'My Flow' .*give path="):
        await open_registrar.register(Candidate(build(storage=storage)))
    with pytest.raises(StorageNotFoundError, match=f"no file {tmp_path}/none.py on {HOST}"):
        await open_registrar.register(Candidate(build(storage=storage), tmp_path / "none.py"))


async def test_the_caller_chooses_the_storage_of_a_flow_without_one(
    open_registrar: Registrar, tmp_path: Path
) -> None:
    script = tmp_path / "flow.py"
    script.write_text("")
    default = Local(path=script, stored_as_script=True)
    found = await open_registrar.register(Candidate(build(), script, default))
    assert found.version.spec.storage["stored_as_script"] is True
    kept = await open_registrar.register(Candidate(build("other", storage=Module("os")), script, default))
    assert kept.version.spec.storage["type"] == "Module"
    assert kept.version.spec.labels == ()
    assert kept.version.spec.result is None


async def test_values_of_secrets_are_nowhere(
    open_registrar: Registrar, home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWAGENT_SECRET_TOKEN", "hunter2-hunter2")
    with Flow("f", secrets=["OTHER"]) as built:
        add(Secret("TOKEN"), 1)
    found = await open_registrar.register(Candidate(built))
    assert found.version.spec.secrets == ("OTHER", "TOKEN")
    for path in home.home.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes()


NO_ROOM = (
    r"flow 'My Flow' is not registered, as {place} has no room for it: File too large; "
    r"free space there, or set TMPDIR to another directory$"
)


async def test_no_room_for_what_is_looked_at_in_a_forge(
    open_registrar: Registrar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    git = BareRepository(tmp_path / "git", default="trunk")
    git.commit({"flow.py": "x = 1\n", "large.txt": "x" * 5000})
    stand_in = gitlab.GitLab()
    stand_in.repositories["acme/flows"] = server.Kept(git)
    with server.serving(stand_in) as url:
        storage = GitLab("acme/flows", "flow.py", host=url, files=["large.txt"])
        message = "GitLab: " + NO_ROOM.format(place=tmp_path)
        with files_of_at_most(4096), pytest.raises(UsageError, match=message):
            await open_registrar.register(Candidate(build(storage=storage)))
        assert list(tmp_path.glob("flowagent-*")) == []
        assert (await open_registrar.register(Candidate(build(storage=storage)))).created


async def test_no_room_for_what_was_registered_before(
    open_registrar: Registrar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    await open_registrar.register(Candidate(build()))
    message = "Local: " + NO_ROOM.format(place=tmp_path)
    with files_of_at_most(64), pytest.raises(UsageError, match=message):
        await open_registrar.register(Candidate(build()))
    assert not (await open_registrar.register(Candidate(build()))).created


async def test_a_job_template_in_a_file_goes_along(open_registrar: Registrar, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("kind: Job\n")
    found = await open_registrar.register(Candidate(build(run_config=KubernetesRun(path))))
    assert found.version.spec.run_config["job_template"] == "kind: Job\n"
    assert found.version.spec.run_config["job_template_path"] is None
    path.unlink()
    with pytest.raises(UsageError, match=r"job\.yaml cannot be read: No such file or directory; correct the"):
        await open_registrar.register(Candidate(build(run_config=KubernetesRun(path))))


async def test_a_job_template_stays_where_an_agent_reads_it(open_registrar: Registrar) -> None:
    url = "https://example.com/job.yaml"
    found = await open_registrar.register(Candidate(build(run_config=KubernetesRun(url))))
    assert found.version.spec.run_config["job_template_path"] == url
    with pytest.raises(UsageError, match=r"s3://b/job\.yaml is neither a file nor an http or https URL"):
        await open_registrar.register(Candidate(build(run_config=KubernetesRun("s3://b/job.yaml"))))


async def test_several_at_once(home: Settings) -> None:
    @flow
    def plain(x: int = 1) -> int:
        return x

    found = await register_all([Candidate(build()), Candidate(plain)], labels=["a"], settings=home)
    assert [registration.version.spec.name for registration in found] == ["My Flow", "plain"]
    assert [registration.version.spec.kind for registration in found] == ["dag", "function"]
    assert found[1].version.spec.labels == tuple(sorted(("a", HOST)))


def test_from_code_that_is_not_async(home: Settings) -> None:
    assert register_flow(build(), settings=home).created


async def test_from_within_a_running_loop(home: Settings) -> None:
    found: Registration = register_flow(build(), settings=home)
    assert found.created


def test_a_script_that_registers_itself(tmp_path: Path) -> None:
    script = tmp_path / "work" / "my_flow.py"
    script.parent.mkdir()
    (script.parent / "helper.py").write_text("def twice(x):\n    return 2 * x\n")
    text = """
        from flowagent import Flow, task
        from helper import twice

        @task
        def work():
            return twice(21)

        with Flow("itself") as flow:
            work()

        print("version", flow.register())
    """
    script.write_text(textwrap.dedent(text))
    environ = {
        **os.environ,
        "FLOWAGENT_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def run(seed: str) -> str:
        environ["PYTHONHASHSEED"] = seed
        done = subprocess.run(
            [sys.executable, str(script)], env=environ, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    first, second = run("1"), run("2")
    assert "registered itself version 1" in first
    assert "itself is unchanged: version 1" in second
    (script.parent / "helper.py").write_text("def twice(x):\n    return x + x\n")
    assert "registered itself version 2" in run("3")
    assert len(list((tmp_path / "home" / "flows" / "itself").iterdir())) == 2

"""Storages, run configs and results as plain data."""

from __future__ import annotations

import copy
import datetime
import json
import os
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from flowagent import FlowError
from flowagent.flows.declarations import Declaration
from flowagent.flows.results import format_location, result_from_json, serializer_named
from flowagent.results import JSONSerializer, LocalResult, PickleSerializer
from flowagent.run_configs import DockerRun, KubernetesRun, LocalRun, RunConfig, UniversalRun
from flowagent.storage import (
    Azure,
    Bitbucket,
    CodeCommit,
    Docker,
    GitHub,
    GitLab,
    Local,
    Module,
    Storage,
    Webhook,
)

DECLARATIONS: list[Declaration] = [
    Local(),
    Local("/flows", add_default_labels=False, labels=["b", "a", "b"], secrets=["TOKEN"]),
    Local(path="/flows/etl.py", stored_as_script=True),
    Module("pkg.flows:make.flow"),
    GitHub("acme/flows", "etl.py", "v1", "TOKEN", "https://github.example/api/v3", files=["sql/", "a.txt"]),
    GitLab(278964, "etl.py", host="gitlab.example", upload=True),
    Bitbucket("ETL", "flows", "etl.py", "dev", host="https://bitbucket.example/context", secrets=["OTHER"]),
    Bitbucket("ETL", "flows", "etl.py", cloud_username_secret="USER", cloud_app_password_secret="TOKEN"),
    CodeCommit("flows", "etl.py", "dev", {"region_name": "eu-central-1"}),
    Webhook(
        {"url": "https://x/${A}", "headers": {"B": "${B}"}, "timeout": 5, "auth": ("me", "${PASSWORD}")},
        "post",
        {"url": "https://x", "data": b"\xff", "cookies": {"a": "b"}, "allow_redirects": False},
        "POST",
        stored_as_script=True,
        flow_script_path="/flows/etl.py",
    ),
    UniversalRun({"A": "1"}, ["x"]),
    LocalRun(
        env={"A": ""},
        working_dir="/srv",
        python="python3.9",
        timeout=2.5,
        retries=2,
        retry_delay=1,
        sandbox="landlock",
    ),
    DockerRun("python:3.12", ports=[80], host_config={"mem_limit": "1g"}, volumes=["/a:/b:ro"]),
    KubernetesRun(
        job_template={"kind": "Job"}, cpu_limit=0.5, memory_request="1Gi", image_pull_policy="Never"
    ),
    LocalResult(),
    LocalResult("/results", location="{flow_name}/{task_slug}-{date:%Y}.json", serializer=JSONSerializer()),
]


@pytest.mark.parametrize("declaration", DECLARATIONS, ids=repr)
def test_the_json_form_and_back(declaration: Declaration) -> None:
    data = json.loads(json.dumps(declaration.to_json()))
    again = type(declaration).from_json(data)
    assert again == declaration
    assert hash(again) == hash(declaration)
    assert again.to_json() == declaration.to_json() == data
    assert data["type"] == type(declaration).__name__


def test_the_family_finds_the_type() -> None:
    assert Storage.from_json(Module("a").to_json()) == Module("a")
    assert RunConfig.from_json(UniversalRun().to_json()) == UniversalRun()
    with pytest.raises(FlowError, match=r"unknown storage type 'FTP' \(known: .*Local, Module"):
        Storage.from_json({"type": "FTP", "host": "h"})
    with pytest.raises(FlowError, match="no argument 'colour'"):
        Storage.from_json({**Local().to_json(), "colour": 1})


def test_third_parties_add_storages() -> None:
    class Ftp(Storage):
        fields = ("host",)

        def __init__(self, host: str, **options: Any) -> None:
            super().__init__(**options)
            self.host = host

    data = Ftp("example.org", labels=["a"]).to_json()
    assert data["labels"] == ["a"]
    assert Storage.from_json(data) == Ftp("example.org", labels=["a"])
    with pytest.raises(FlowError, match="'Local' is built in"):
        type("Local", (Storage,), {})


def test_json_keeps_the_artifact_of_a_reference() -> None:
    reference = {**Local(path="/x").to_json(), "artifact": {"sha256": "00"}}
    assert Storage.from_json(reference).to_json() == reference
    assert Local().to_json()["artifact"] is None


def test_what_is_never_stored_is_in_no_pickle_either() -> None:
    """Of any storage, one of a third party too; copies in one process have all of it."""

    class Vault(Storage):
        fields = ("place",)
        unstored = ("password",)

        def __init__(self, place: str, password: str | None = None, **options: Any) -> None:
            super().__init__(**options)
            self.place, self.password = place, password

    key = "U0VDUkVUS0VZ"
    azure = Azure("flows", connection_string=f"AccountName=acme;AccountKey={key}", labels=["a"])
    for storage, name in ((azure, "connection_string"), (Vault("p", key), "password")):
        for protocol in (2, 4, 5):
            pickled = cloudpickle.dumps({"a flow's": storage}, protocol)
            assert key.encode() not in pickled
        (again,) = cloudpickle.loads(pickled).values()
        assert again.to_json() == storage.to_json()
        assert getattr(again, name) is None
        for copied in (copy.copy(storage), copy.deepcopy(storage)):
            assert copied == storage
            assert key in getattr(copied, name)
    copied = copy.deepcopy(GitHub("acme/flows", "etl.py"))
    assert copied == GitHub("acme/flows", "etl.py")


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Local(path="etl.py").path == str(tmp_path / "etl.py")
    assert Local("~/flows").directory == "/home/somebody/flows"
    assert LocalRun(working_dir="w").working_dir == str(tmp_path / "w")
    assert LocalRun(python="bin/python").python == str(tmp_path / "bin/python")
    assert LocalRun(python="python3").python == "python3"
    assert KubernetesRun("s3://b/job.yaml").job_template_path == "s3://b/job.yaml"
    assert LocalResult(os.curdir).dir == str(tmp_path)


def test_the_callers_data_is_copied() -> None:
    env, labels, config = {"A": "1"}, ["a"], {"x": {"y": 1}}
    run = DockerRun(env=env, labels=labels, host_config=config)
    env["A"], config["x"]["y"] = "2", 2
    labels.append("b")
    assert (run.env, run.labels, run.host_config) == ({"A": "1"}, ("a",), {"x": {"y": 1}})
    run.to_json()["host_config"]["x"]["y"] = 3
    assert run.host_config == {"x": {"y": 1}}


def test_runners() -> None:
    found = [kind().runners for kind in (UniversalRun, LocalRun, DockerRun, KubernetesRun)]
    assert found == [(), ("process",), ("docker",), ("kubernetes",)]


def test_durations_may_be_timedeltas() -> None:
    assert UniversalRun(timeout=datetime.timedelta(minutes=1)).timeout == 60.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Local("/a", path="/b"), "exclude each other"),
        (lambda: Local("/a", stored_as_script=True), "name the script with path="),
        (lambda: Local("/a", True), "path takes a non-empty string"),
        (lambda: Local(stored_as_script="yes"), "True or False"),
        (lambda: Local(labels="host1"), "takes a list of strings"),
        (lambda: Local(result=LocalResult()), "give result= to the Flow"),
        (lambda: Local(validate=True), "leave it out"),
        (lambda: Module("a b"), "'a b' is no module"),
        (lambda: Module("a:"), "'a:' is no module"),
        (lambda: Module(""), "non-empty string"),
        (lambda: UniversalRun({"A": 1}), r"env\['A'\] must be a string"),
        (lambda: UniversalRun({"A=B": "1"}), "name that no environment can hold"),
        (lambda: UniversalRun(timeout=0), "positive number of seconds; got 0"),
        (lambda: UniversalRun(timeout=float("nan")), "positive number of seconds"),
        (lambda: UniversalRun(retries=-1), "whole number; got -1"),
        (lambda: UniversalRun(retries=True), "whole number; got True"),
        (lambda: UniversalRun(image="x"), "no argument 'image'; only DockerRun"),
        (lambda: LocalRun(sandbox="none"), "one of process, landlock, namespace"),
        (lambda: Docker(build_kwargs={"buildargs": ["A=1"]}), "buildargs of build_kwargs takes a dict"),
        (lambda: DockerRun(ports=[0]), "from 1 to 65535"),
        (lambda: DockerRun(volumes="/a:/b"), "list of 'source:target"),
        (lambda: DockerRun(host_config={"x": object()}), "JSON data only"),
        (lambda: KubernetesRun("a", job_template={}), "exclude each other"),
        (lambda: KubernetesRun(image_pull_policy="Maybe"), "Always, IfNotPresent, Never"),
        (lambda: LocalResult(location="{nope}"), "no value 'nope'"),
        (lambda: LocalResult(location="{run_id.__class__}"), "no value 'run_id.__class__'"),
        (lambda: LocalResult(location="{parameters[x].__class__}"), "no value"),
        (lambda: LocalResult(location="../{run_id}"), "must name a file below"),
        (lambda: LocalResult(location="/tmp/{run_id}"), "must name a file below"),
        (lambda: LocalResult(location="{run_id"), "cannot be formatted"),
        (lambda: LocalResult(location="{map_index:%Y}"), "cannot be formatted"),
        (lambda: LocalResult(serializer="xml"), "unknown serializer 'xml'"),
        (lambda: LocalResult(storage="S3"), "kept by storage 'Local'"),
    ],
)
def test_contradictions_are_found_at_construction(make: Any, message: str) -> None:
    with pytest.raises(FlowError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_locations() -> None:
    values = {"flow_name": "etl", "task_slug": "load-1", "today": "2026-01-31", "parameters": {"x": 3}}
    result = LocalResult(location="{flow_name}/{task_slug}-{today}-{parameters[x]}.pkl")
    assert format_location(result, values) == "etl/load-1-2026-01-31-3.pkl"
    assert format_location(result.to_json(), values) == "etl/load-1-2026-01-31-3.pkl"
    assert format_location(LocalResult(), values) is None
    with pytest.raises(FlowError, match="there is no value 'x'"):
        format_location(result, {**values, "parameters": {}})
    with pytest.raises(FlowError, match="must name a file below"):
        format_location(result, {**values, "flow_name": "../../etc"})


def test_results_from_json() -> None:
    assert result_from_json(None) is None
    assert result_from_json({"type": "LocalResult", "storage": "Local", "dir": None}) == LocalResult()


@pytest.mark.parametrize("name", ["cloudpickle", "json"])
def test_serializers(name: str) -> None:
    serializer = serializer_named(name)
    assert serializer.loads(serializer.dumps({"a": [1, None, "ü"]})) == {"a": [1, None, "ü"]}
    assert serializer == (PickleSerializer() if name == "cloudpickle" else JSONSerializer())

"""An agent and its cluster, without one: where the cluster is, what agents need."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from flowagent.cli import app
from flowagent.errors import SettingsError, UsageError
from flowagent.kubernetes import Cluster
from flowagent.kubernetes.manifest import RIGHTS, manifest


def token(subject: Any) -> str:
    claims = base64.urlsafe_b64encode(json.dumps({"sub": subject}).encode()).decode().rstrip("=")
    return f"e30.{claims}.c2ln"


AGENT = token("system:serviceaccount:flows:agent")


def kubeconfig(namespace: str = "flows", **user: Any) -> dict[str, Any]:
    return {
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:9"}}],
        "users": [{"name": "u", "user": user or {"token": AGENT}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
        "current-context": "x",
    }


# -- where the cluster is ------------------------------------------------------------------------------


def test_whose_token_a_kubeconfig_has(tmp_path: Path) -> None:
    config = tmp_path / "kubeconfig"
    (tmp_path / "token").write_text(AGENT + "\n")
    known: list[tuple[dict[str, Any], Any]] = [
        ({"token": AGENT}, ("flows", "agent")),
        ({"tokenFile": "token"}, ("flows", "agent")),
        ({"tokenFile": "missing"}, None),
        ({"username": "u", "password": "p"}, None),
    ]
    for user, account in known:
        config.write_text(json.dumps(kubeconfig(**user)))
        assert Cluster(environ={"KUBECONFIG": str(config)}).account == account


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        "",
        "null",
        "a: [",
        "{}",
        "clusters: 3",
        "{clusters: [3], contexts: [], users: []}",
        "{clusters: null, contexts: null, users: null}",
        "{clusters: [], contexts: [], users: [], current-context: [x]}",
        json.dumps(kubeconfig(exec=[])),
        json.dumps(kubeconfig(token=3)),
    ],
)
def test_a_kubeconfig_that_is_none(text: str, tmp_path: Path) -> None:
    config = tmp_path / "kubeconfig"
    config.write_text(text)
    with pytest.raises(
        SettingsError, match=f"^{config} cannot be used: .*see kubectl config view$"
    ) as refused:
        Cluster(environ={"KUBECONFIG": str(config)})
    said = str(refused.value)
    assert "\n" not in said
    assert "' object" not in said, "that is Python's way to say it"


@pytest.mark.parametrize("name", ["../kube-system", "A", "a.b", "-a"])
def test_a_namespace_that_is_none(name: str, tmp_path: Path) -> None:
    config = tmp_path / "kubeconfig"
    config.write_text(json.dumps(kubeconfig()))
    with pytest.raises(SettingsError, match="is no name of a namespace"):
        Cluster(name, environ={"KUBECONFIG": str(config)})


# -- in the cluster ------------------------------------------------------------------------------------


def objects(**given: Any) -> dict[str, dict[str, Any]]:
    asked = {"name": "agent", "namespace": "agents", "labels": ["x"], "storage": "1Gi"}
    found = manifest(**{**asked, "image": "a:1", "job_image": "b:1", **given})
    for each in found:
        kubernetes_validate.validate(each, "1.30", strict=True)
    return {each["kind"]: each for each in found}


def test_jobs_in_a_namespace_of_their_own() -> None:
    found = objects(job_namespace="flows")
    places = {kind: each["metadata"]["namespace"] for kind, each in found.items()}
    assert {kind for kind, place in places.items() if place == "flows"} == {"Role", "RoleBinding"}
    assert set(places.values()) == {"flows", "agents"}
    subject = {"kind": "ServiceAccount", "name": "agent", "namespace": "agents"}
    assert found["RoleBinding"]["subjects"] == [subject]
    assert len(found["Role"]["rules"]) == len(RIGHTS)
    arguments = found["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--namespace") + 1] == "flows"
    assert {each["metadata"]["namespace"] for each in objects().values()} == {"agents"}


BAD = ["", "A", "a b", "-a", "a-", "a.b", "a_b", "a\n", "x" * 64]


@pytest.mark.parametrize("option", ["name", "namespace", "job_namespace"])
@pytest.mark.parametrize("bad", BAD)
def test_names_that_are_none(option: str, bad: str) -> None:
    with pytest.raises(UsageError, match=f"^--{option.replace('_', '-')}: .* can be no name in a cluster"):
        objects(**{option: bad})


def test_the_command_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = app.run(["kubernetes", "manifest", "--name", "Bad Name"])
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (app.EXIT_ERROR, "", 1)
    assert printed.err.startswith("Error: --name: 'Bad Name' can be no name in a cluster")

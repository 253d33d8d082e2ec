"""An agent and its cluster, without one: what flows may ask for, where the cluster is, what agents need."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import kubernetes_validate
import pytest

from flowagent import http
from flowagent.cli import app
from flowagent.errors import SandboxError, SettingsError, UsageError
from flowagent.kubernetes import Cluster
from flowagent.kubernetes.manifest import RIGHTS, manifest
from flowagent.kubernetes.names import account_of
from flowagent.run_configs import KubernetesRun
from flowagent.runners.kubernetes import KubernetesRunner
from flowagent.runners.kubernetes.templates import TemplateError, fetch
from flowagent.runners.protocol import Order
from flowagent.runtime.rundir import RunDirectory, boottime
from flowagent.settings import Settings


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


# -- what flows ask for --------------------------------------------------------------------------------


class Agent:
    """A runner whose cluster takes everything, and keeps what it was sent."""

    def __init__(self, directory: Path, **given: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.runner = KubernetesRunner(Settings(home=directory, store="sqlite://", **given), directory)
        self.runner._cluster.call = self._take  # type: ignore[method-assign,assignment]
        self._directory = directory

    async def _take(self, *_: Any, body: Any = None, **__: Any) -> Any:
        self.sent.append(body)

    def job(self, config: KubernetesRun, stored: str | None = None) -> dict[str, Any]:
        """What it makes of a run: a job, or an error."""
        path = self._directory / "runs" / f"00ff.{len(self.sent)}"
        run = RunDirectory(str(path))
        path.mkdir(parents=True, exist_ok=True)
        run.write_lease(boottime() + 30)
        asked = config.to_json()
        order = Order(run, "00ff", 1, "mine", asked, {}, grace=10, image=stored)
        self.runner.admit(asked)
        anyio.run(self.runner.make_ready, order)
        return self.sent[-1]


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Agent]:
    """Agents whose service account is ``agent`` of namespace ``flows``, where their jobs are too."""
    config = tmp_path / "kubeconfig"
    config.write_text(json.dumps(kubeconfig()))
    monkeypatch.setenv("KUBECONFIG", str(config))

    def made(**given: Any) -> Agent:
        return Agent(tmp_path, **given)

    return made


def containers(*named: dict[str, Any], kind: str = "containers") -> dict[str, Any]:
    return {"spec": {"template": {"spec": {kind: list(named)}}}}


FOREIGN = {"name": "other", "image": "elsewhere.example.com/a:1"}


@pytest.mark.parametrize(
    "config",
    [
        KubernetesRun(image="elsewhere.example.com/a:1"),
        KubernetesRun(job_template=containers({**FOREIGN, "name": "flow"})),
        KubernetesRun(job_template=containers(FOREIGN)),
        KubernetesRun(job_template=containers(FOREIGN, kind="initContainers")),
        # what goes before it does not make it good
        KubernetesRun(image="r.example.com/a:1", job_template=containers({**FOREIGN, "name": "flow"})),
    ],
)
def test_images_that_flows_name_are_from_where_they_may(
    agent: Callable[..., Agent], config: KubernetesRun
) -> None:
    with pytest.raises(SandboxError, match=r"elsewhere.example.com/a:1 is from a registry that this agent"):
        agent(image="r.example.com/a:1", registry_allow=("r.example.com",)).runner.admit(config.to_json())


def test_the_agent_s_own_images_are_from_anywhere(agent: Callable[..., Agent], tmp_path: Path) -> None:
    limited = {"registry_allow": ("r.example.com",)}
    made = agent(image="own.example.com/a:1", **limited).job(KubernetesRun())
    assert made["spec"]["template"]["spec"]["containers"][0]["image"] == "own.example.com/a:1"
    template = tmp_path / "template.yaml"
    template.write_text(json.dumps(containers({"name": "flow", "image": "own.example.com/b:1"}, FOREIGN)))
    made = agent(job_template=template, **limited).job(KubernetesRun())
    images = [each["image"] for each in made["spec"]["template"]["spec"]["containers"]]
    assert images == ["own.example.com/b:1", FOREIGN["image"]]
    with pytest.raises(SandboxError, match=r"elsewhere.example.com/c:1 is from a registry"):
        agent(job_template=template, **limited).job(KubernetesRun(), stored="elsewhere.example.com/c:1")


def test_an_image_that_no_cluster_can_get(agent: Callable[..., Agent]) -> None:
    with pytest.raises(SandboxError, match=r"image sha256:0{12} is in no registry.* with registry_url="):
        agent().job(KubernetesRun(), stored="sha256:" + "0" * 64)


class Refusing(BaseHTTPRequestHandler):
    """Answers with the status that is asked for."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.strip("/").partition("?")[0]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize(("status", "retryable"), [(404, False), (503, True)])
def test_a_template_that_a_server_does_not_give(
    status: int, retryable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "BACKOFF", 0.001)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{status}"
        with pytest.raises(TemplateError) as refused:
            anyio.run(fetch, f"{url}?key=hunter2")
        server.shutdown()
    reason = f"job template {url}: the server answers {status}; correct job_template_path"
    assert (str(refused.value), refused.value.retryable) == (reason, retryable)


def test_a_template_whose_server_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BACKOFF", 0.001)
    with socket.socket() as held:  # and does not listen
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/a"
        with pytest.raises(TemplateError, match=r"job template: .* cannot be reached") as refused:
            anyio.run(fetch, f"{url}?key=hunter2")
    assert refused.value.retryable and "hunter2" not in str(refused.value)


USING = containers({"name": "flow", "envFrom": [{"secretRef": {"name": "nightly"}}]})


def test_an_agent_knows_what_is_its_own(agent: Callable[..., Agent]) -> None:
    mine = agent(image="a:1", name="nightly")
    for config in (KubernetesRun(service_account_name="agent"), KubernetesRun(job_template=USING)):
        with pytest.raises(SandboxError, match="which is an agent's own"):
            mine.job(config)
        apart = agent(image="a:1", name="nightly", namespace="elsewhere")
        assert apart.job(config)["kind"] == "Job"
    accounts = (None, "", "opaque", "a.b.c", token("somebody"), token(3), token("system:serviceaccount:x"))
    assert [account_of(each) for each in accounts] == [None] * len(accounts)
    assert account_of(AGENT) == ("flows", "agent")


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


def test_a_context_of_any_file(tmp_path: Path) -> None:
    """As for kubectl: of the same name the first; relative paths are those of its own file."""
    here, there = tmp_path / "here" / "config", tmp_path / "there" / "config"
    second = kubeconfig("second", tokenFile="token")
    second["contexts"][0]["name"] = second["current-context"] = "y"
    second["users"][0]["name"] = second["contexts"][0]["context"]["user"] = "v"
    for path, content in ((here, kubeconfig("first")), (there, second)):
        path.parent.mkdir()
        path.write_text(json.dumps(content))
    (there.parent / "token").write_text(token("system:serviceaccount:second:other"))
    listed = {"KUBECONFIG": f"{tmp_path}/nowhere:{here}:{there}"}
    assert Cluster(environ=listed).namespace == "first"
    assert Cluster(context="x", environ=listed).namespace == "first"
    found = Cluster(context="y", environ=listed)
    assert found.namespace == "second" and found.account is not None and found.account.name == "other"
    with pytest.raises(SettingsError, match=r"here/config:.*there/config cannot be used: .*'z' not found"):
        Cluster(context="z", environ=listed)
    here.write_text(json.dumps({**kubeconfig("first"), "current-context": ""}))
    assert Cluster(environ=listed).namespace == "second"


def test_kubeconfigs_of_which_each_has_a_part(tmp_path: Path) -> None:
    whole = kubeconfig("whole", tokenFile="token")
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "token").write_text(AGENT)
    parts = {"current": ["current-context"], "users/config": ["users"], "rest": ["clusters", "contexts"]}
    for name, keys in parts.items():
        (tmp_path / name).write_text(json.dumps({key: whole[key] for key in keys}))
    (tmp_path / "empty").write_text("")
    listed = ":".join(str(tmp_path / name) for name in (*parts, "empty"))
    found = Cluster(environ={"KUBECONFIG": listed})
    assert found.namespace == "whole" and found.account == ("flows", "agent")
    (tmp_path / "empty").write_text("a: [")
    with pytest.raises(SettingsError, match=f"^{listed} cannot be used: "):
        Cluster(environ={"KUBECONFIG": listed})


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

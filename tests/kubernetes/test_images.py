"""Flows in images of a registry that asks who one is, and the Secrets with which a cluster pulls them."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from tests.containers.machinery import PYTHON, Registry, wait_for
from tests.containers.test_runs import text
from tests.containers.test_storage import storage_of
from tests.e2e.harness import Site
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.flows import NAMESPACE, job_of, start

SCRIPT = """
import sys
from flowagent import Flow, Parameter, task
from flowagent.results import LocalResult
from flowagent.run_configs import KubernetesRun
from flowagent.storage import Docker

@task
def work(n):
    print({word!r}, flush=True)
    print("to stderr", file=sys.stderr)
    return n + 1

storage = Docker(
    {registry!r}, image_tag="newest", base_image={base!r}, local_image=True,
    build_kwargs={{"network_mode": "none"}},
)
with Flow({name!r}, storage=storage, result=LocalResult(), run_config=KubernetesRun({config})) as flow:
    work(Parameter("n", 1))
"""


@pytest.fixture
def site(site: Site, field: Cluster, registry: Registry) -> Site:
    """A site whose images are built by the node's engine. In the cluster are a good login and a bad one."""
    for name, password in (("login", registry.PASSWORD), ("outdated", "hal-9000")):
        variables = registry.login(site.root / name, password)
        held = {".dockerconfigjson": Path(variables["DOCKER_CONFIG"], "config.json").read_text()}
        secret = {"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/dockerconfigjson"}
        field.apply({**secret, "metadata": {"name": name, "namespace": NAMESPACE}, "stringData": held})
    site.environment |= {"DOCKER_HOST": field.node.docker_url, **registry.login(site.root / "login")}
    return site


def register(
    site: Site, cluster: Cluster, registry: Registry, name: str, word: str = "hello", config: str = ""
) -> str:
    """Register a flow in an image that is in the registry, and nowhere else; the image, by its digest."""
    script = SCRIPT.format(name=name, word=word, config=config, registry=registry.name, base=PYTHON)
    site.command("register", site.write(f"{name}.py", script))
    artifact = storage_of(site, name)["artifact"]
    image = str(artifact["image"])
    assert image.startswith(f"{registry.name}/{name}@sha256:")
    take_away(cluster, image, artifact["tag"])
    return image


def take_away(cluster: Cluster, *images: str) -> None:
    """The node has an image no more, and has to pull it."""
    cluster.node.docker("rmi", "-f", *images)
    left = cluster.node.docker("images", "--digests", "--format", "{{.Repository}}@{{.Digest}}")
    assert images[0] not in left


def ran(site: Site, name: str, *options: str) -> tuple[str, dict[str, Any]]:
    """The id of a run of a flow, and how it ended."""
    run = site.submit(name, *options)
    return run, site.wait_for(run, timeout=60)


def test_a_flow_in_an_image_runs_in_a_pod(site: Site, field: Cluster, registry: Registry) -> None:
    start(site, "--image-pull-secret", "login", "--registry-allow", registry.name)
    first = register(site, field, registry, "packed", "the first one")
    run, shown = ran(site, "packed", "-p", "n=41")
    assert shown["state"] == "completed", (shown["reason"], text(site, run))
    assert text(site, run) == "the first one\nto stderr\n"
    assert "42" in site.command("result", run).stdout
    assert shown["attempts"][0]["revision"] == first

    second = register(site, field, registry, "packed", "the second one")  # with the tag of the first
    run, shown = ran(site, "packed")
    assert shown["state"] == "completed", (shown["reason"], text(site, run))
    assert text(site, run).startswith("the second one\n")
    assert shown["attempts"][0]["revision"] == second != first

    registry.forget(second)
    take_away(field, second)
    run, shown = ran(site, "packed")
    assert shown["state"] == "crashed"
    assert f"image {second} cannot be pulled: there is no such image" in shown["reason"], shown["reason"]


REFUSED = "cannot be pulled: the registry refuses"


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ((), {"unnamed": REFUSED, "good": None, "bad": REFUSED, "lost": REFUSED}),
        (("--image-pull-secret", "login"), {"unnamed": None, "bad": REFUSED}),
    ],
    ids=["no agent's", "agent's"],
)
def test_who_may_pull(
    site: Site, field: Cluster, registry: Registry, options: tuple[str, ...], ends: dict[str, str | None]
) -> None:
    """The Secrets of the flow, or else the agent's."""
    named = {"unnamed": "", "good": "['login']", "bad": "['outdated']", "lost": "['nobody-has-made']"}
    start(site, *options)
    for name, reason in ends.items():
        config = f"image_pull_secrets={named[name]}" if named[name] else ""
        register(site, field, registry, name, config=config)
        _, shown = ran(site, name)
        if reason is None:
            assert shown["state"] == "completed", (name, shown["reason"])
        else:
            assert shown["state"] == "crashed" and reason in shown["reason"], (name, shown["reason"])
            assert "the Secret with its login: image_pull_secrets=" in shown["reason"]
            assert "hal-9000" not in shown["reason"]


def test_why_a_pull_is_not_tried_any_more(site: Site, field: Cluster, registry: Registry) -> None:
    """An agent that was away finds a pod that waits for the next try, and which says no more than that."""
    agent = start(site, "--image-pull-secret", "login")
    register(site, field, registry, "delayed")
    registry.stop()
    try:
        with socket.create_server((registry.address, registry.port)):  # takes calls, and never answers
            run = site.submit("delayed")
            pod = field.pod_of(job_of(run), NAMESPACE)["metadata"]["name"]
            wait_for(lambda: "Pulling" in happened(field, pod), 30, lambda: str(happened(field, pod)))
            agent.send_signal(signal.SIGKILL)
            agent.wait()
        field.wait_for("Pod", pod, lambda it: "ImagePullBackOff" in str(it["status"]), NAMESPACE, 40)
        start(site, "--image-pull-secret", "login")
        shown = site.wait_for(run, timeout=30)
        assert shown["state"] == "crashed"
        assert "cannot be pulled: the registry cannot be reached" in shown["reason"], shown["reason"]
    finally:
        registry.start()


def happened(cluster: Cluster, pod: str) -> list[str]:
    """The reasons of a pod's events."""
    events = cluster.list("Event", NAMESPACE)
    return [each["reason"] for each in events if each["involvedObject"].get("name") == pod]

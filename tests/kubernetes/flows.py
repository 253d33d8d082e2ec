"""Flows that run in pods of the cluster, the site where they are registered, and agents that reach it."""

from __future__ import annotations

import os
from typing import Any

import yaml
from tests.containers.test_runs import text
from tests.e2e.harness import Site, until
from tests.kubernetes.cluster import Cluster

FLOWAGENT = "base/flowagent:1"
AGENT, NAMESPACE = "agent", "flows"
FLOW = """
import json, os, signal, sys, time
from flowagent import Flow, task
from flowagent.run_configs import KubernetesRun
from flowagent.storage import Local

def mounting(volume):
    container = {{"name": "flow", "volumeMounts": [{{"name": "v", "mountPath": "/volume"}}]}}
    pod = {{"containers": [container], "volumes": [{{"name": "v", **volume}}]}}
    return {{"spec": {{"template": {{"spec": pod}}}}}}

MISSING = mounting({{"secret": {{"secretName": "missing"}}}})
SMALL = mounting({{"emptyDir": {{"sizeLimit": "1Mi"}}}})

@task
def work():
{body}

with Flow({name!r}, storage=Local(stored_as_script=True, add_default_labels=False),
          run_config=KubernetesRun({config})) as flow:
    work()
"""


def objects(site: Site) -> list[dict[str, Any]]:
    """What an agent in the cluster needs, as it is printed for people."""
    printed = site.command(
        "kubernetes", "manifest", "--name", AGENT, "--namespace", NAMESPACE, "--image", FLOWAGENT
    )
    return list(yaml.safe_load_all(printed.stdout))


def prepare(site: Site, cluster: Cluster) -> None:
    """Let agents of the site reach the cluster, with the rights that they need and no others."""
    for each in objects(site):
        if each["kind"] in ("Role", "RoleBinding", "ServiceAccount"):
            cluster.apply(each)
    token = cluster.service_account_token(NAMESPACE, AGENT)
    mount = {"name": "sources", "mountPath": str(site.sources), "readOnly": True}
    pod = {
        "containers": [{"name": "flow", "volumeMounts": [mount]}],
        "volumes": [{"name": "sources", "hostPath": {"path": str(site.sources)}}],
    }
    template = site.root / "template.yaml"
    template.write_text(yaml.safe_dump({"kind": "Job", "spec": {"template": {"spec": pod}}}))
    for path in (site.root, *site.root.parents):
        path.chmod(path.stat().st_mode | 0o011) if path.stat().st_uid == os.getuid() else None
    site.environment |= {"KUBECONFIG": str(cluster.kubeconfig(token, NAMESPACE))}


def start(site: Site, *options: str) -> Any:
    return site.start(
        "--runner", "kubernetes", "--image", FLOWAGENT, "--job-template", str(site.root / "template.yaml"),
        *options,
    )  # fmt: skip


def register(site: Site, name: str, body: str, config: str = "") -> None:
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    path = site.sources / f"{name}.py"
    path.write_text(FLOW.format(body=lines, name=name, config=config))
    site.command("register", path)


def job_of(run: str) -> str:
    return f"flowagent-{run}.1"


def jobs(cluster: Cluster) -> list[str]:
    return [each["metadata"]["name"] for each in cluster.list("Job", NAMESPACE)]


def begun(site: Site, run: str, word: str = "ready") -> None:
    until(lambda: word in text(site, run), 40)

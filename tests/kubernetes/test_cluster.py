"""The cluster of these tests is a real one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.containers.machinery import BARE, PYTHON, wait_for
from tests.kubernetes.cluster import Cluster


@pytest.fixture(autouse=True)
def emptied(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.clear()


def job(name: str, code: str, *, memory: str = "64Mi", **spec: Any) -> dict[str, Any]:
    """A Job that runs Python code once; ``spec`` is of its pod."""
    container = {
        "name": "main",
        "image": PYTHON,
        "command": ["/usr/bin/python3", "-u", "-c", code],
        "resources": {"limits": {"memory": memory}},
        "volumeMounts": spec.pop("mounts", []),
    }
    pod = {"restartPolicy": "Never", "containers": [container], **spec}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"backoffLimit": 0, "template": {"spec": pod}},
    }


def test_a_job_completes_and_its_log_is_followed(cluster: Cluster) -> None:
    cluster.apply(job("slow", "import time; print('begun'); time.sleep(5); print('done')"))
    pod = cluster.pod_of("slow")["metadata"]["name"]
    cluster.wait_for("Pod", pod, lambda it: it["status"]["phase"] != "Pending")
    with cluster.follow(pod) as log:
        assert next(log) == b"begun\n"
        assert b"".join(log) == b"done\n"
    done = cluster.wait_for("Job", "slow", lambda it: it["status"].get("succeeded"))
    assert done["status"]["conditions"][0]["type"] == "Complete"


def test_over_its_memory_it_is_killed(cluster: Cluster) -> None:
    cluster.apply(job("big", "bytearray(200_000_000)", memory="32Mi"))
    pod = cluster.wait_ended(cluster.pod_of("big")["metadata"]["name"])
    (status,) = pod["status"]["containerStatuses"]
    assert status["state"]["terminated"]["reason"] == "OOMKilled"
    assert status["state"]["terminated"]["exitCode"] == 137


def test_a_secret_is_a_file_with_its_mode(cluster: Cluster) -> None:
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "keys"},
            "stringData": {"password": "wall-e"},
        }
    )
    code = "import os; f = '/keys/password'; print(oct(os.stat(f).st_mode & 0o777), open(f).read())"
    volumes = [{"name": "keys", "secret": {"secretName": "keys", "defaultMode": 0o600}}]
    mounts = [{"name": "keys", "mountPath": "/keys", "readOnly": True}]
    cluster.apply(job("reader", code, volumes=volumes, mounts=mounts))
    pod = cluster.wait_ended(cluster.pod_of("reader")["metadata"]["name"])["metadata"]["name"]
    assert cluster.log(pod) == b"0o600 wall-e\n"


def test_an_account_has_the_rights_it_is_given(cluster: Cluster) -> None:
    token = cluster.service_account_token("default", "nobody")
    pods = cluster.path("Pod")
    assert cluster.request("GET", pods, token).status_code == 403
    assert cluster.request("GET", pods, "of-nobody").status_code == 401
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "reader"}}
    cluster.apply({**role, "rules": rules})
    cluster.apply(
        {
            **role,
            "kind": "RoleBinding",
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"},
            "subjects": [{"kind": "ServiceAccount", "name": "nobody", "namespace": "default"}],
        }
    )
    wait_for(lambda: cluster.request("GET", pods, token).status_code == 200, 10, lambda: "still refused")
    assert cluster.request("DELETE", pods, token).status_code == 403


def test_an_image_that_is_not_there_is_waited_for(cluster: Cluster) -> None:
    manifest = job("lost", "pass")
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    container |= {"image": "base/missing:1", "imagePullPolicy": "Never"}
    cluster.apply(manifest)
    pod = cluster.pod_of("lost")["metadata"]["name"]

    def reason(it: dict[str, Any]) -> bool:
        states = it["status"].get("containerStatuses", [])
        return any(each["state"].get("waiting", {}).get("reason") == "ErrImageNeverPull" for each in states)

    cluster.wait_for("Pod", pod, reason)


def test_a_pod_reaches_the_api(cluster: Cluster) -> None:
    """At the address and with the token that every pod is given."""
    code = """
import os, ssl, urllib.request
home = "/var/run/secrets/kubernetes.io/serviceaccount/"
request = urllib.request.Request(f"https://{os.environ['KUBERNETES_SERVICE_HOST']}/version")
request.add_header("Authorization", "Bearer " + open(home + "token").read())
trust = ssl.create_default_context(cafile=home + "ca.crt")
print(urllib.request.urlopen(request, context=trust, timeout=5).status)
"""
    cluster.apply(job("inside", code))
    pod = cluster.wait_ended(cluster.pod_of("inside")["metadata"]["name"])["metadata"]["name"]
    assert cluster.log(pod) == b"200\n"


def test_a_node_without_network_loses_its_pods(cluster: Cluster) -> None:
    """Its containers run on until it is back and learns that they were to go."""
    cluster.apply(job("away", "import time; time.sleep(300)", terminationGracePeriodSeconds=1))
    pod = cluster.pod_of("away")["metadata"]["name"]
    cluster.wait_for("Pod", pod, lambda it: it["status"]["phase"] == "Running")
    cluster.disconnect_node()
    try:
        wait_for(lambda: not cluster.ready(), 30, lambda: "the node is still ready")
        cluster.wait_for("Pod", pod, lambda it: "deletionTimestamp" in it["metadata"])
        assert f"k8s_main_{pod}" in cluster.node.docker("ps", "--format", "{{.Names}}")
    finally:
        cluster.connect_node()
    cluster.wait_ready()
    wait_for(
        lambda: f"k8s_main_{pod}" not in cluster.node.docker("ps", "--format", "{{.Names}}"),
        30,
        lambda: "the container of the evicted pod still runs",
    )


def test_a_node_comes_back_after_its_power_was_cut(cluster: Cluster) -> None:
    cluster.kill_node()
    try:
        wait_for(lambda: not cluster.ready(), 30, lambda: "the node is still ready")
    finally:
        cluster.start_node()
    cluster.wait_ready()
    cluster.apply(job("after", "print('here')"))
    cluster.wait_for("Job", "after", lambda it: it["status"].get("succeeded"))


def test_pods_run_on_while_the_api_is_away(cluster: Cluster) -> None:
    cluster.apply(job("on", "import time; time.sleep(6); print('done')"))
    pod = cluster.pod_of("on")["metadata"]["name"]
    cluster.wait_for("Pod", pod, lambda it: it["status"]["phase"] == "Running")
    cluster.restart_api(1)
    cluster.wait_for("Job", "on", lambda it: it["status"].get("succeeded"))
    assert cluster.log(pod) == b"done\n"


def test_bare_images_do_without_python(cluster: Cluster) -> None:
    manifest = job("bare", "")
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    container |= {"image": BARE, "command": ["sh", "-c", "echo here; exit 3"]}
    cluster.apply(manifest)
    pod = cluster.wait_ended(cluster.pod_of("bare")["metadata"]["name"])
    assert pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 3

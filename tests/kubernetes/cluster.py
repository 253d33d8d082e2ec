"""A Kubernetes cluster of the tests' own: API server, controllers and scheduler here, and one node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import trustme
from tests.containers.machinery import wait_for
from tests.kubernetes import node
from tests.kubernetes.api import ADMIN, Api, ok
from tests.kubernetes.node import Node
from tests.object_stores import free_ports

VERSION = "1.20.2"
BINARIES = (
    Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    / "flowagent-tests"
    / f"kubernetes-{VERSION}"
)
PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet")
NEEDED = (
    "etcd", "dockerd", "runc", "tini", "iptables", "ip", "nsenter", "unshare", "setpriv", "busybox",
    "openssl",
)  # fmt: skip
SERVICES, API_IN_CLUSTER = "10.96.0.0/24", "10.96.0.1"
ISSUER = "https://kubernetes.default.svc"
TOKENS = f"""{ADMIN},admin,admin,system:masters
controllers,system:kube-controller-manager,controllers,system:masters
scheduler,system:kube-scheduler,scheduler
kubelet,system:node:{node.NAME},kubelet,system:nodes
"""
GRACE = 4
"""Seconds of silence that make a node not ready, and seconds after which its pods are evicted."""


def check_programs() -> None:
    """A missing component fails the tests, with the command that mends it."""
    missing = [name for name in PROGRAMS if not os.access(BINARIES / name, os.X_OK)]
    missing += [
        name for name in NEEDED if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    ]
    if missing:
        pytest.fail(f"{', '.join(missing)}: missing; run: bash tests/kubernetes/binaries", pytrace=False)
    if os.geteuid():
        pytest.fail(
            "a node makes namespaces and mounts: run the tests of tests/kubernetes as root", pytrace=False
        )


class Cluster(Api):
    """It can be stopped and started again with all that it knows. One namespace, ``default``, is there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.node = Node(root / "node", BINARIES)
        self._port, self._etcd, self._etcd_peer = free_ports(3)
        self._write_keys()
        super().__init__(f"https://{self.node.address}:{self._port}", root / "ca.pem")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._standin = StandIn(self)

    def _write_keys(self) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.root / "ca.pem")
        names = (
            self.node.address,
            "127.0.0.1",
            API_IN_CLUSTER,
            "kubernetes.default.svc",
            "kubernetes.default",
        )
        server = authority.issue_cert(*names)
        server.private_key_pem.write_to_path(self.root / "server.key")
        for number, part in enumerate(server.cert_chain_pems):
            part.write_to_path(self.root / "server.pem", append=bool(number))
        accounts = self.root / "accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", accounts, "2048"], check=True, capture_output=True)
        (self.root / "tokens.csv").write_text(TOKENS)

    # life

    def start(self) -> None:
        """Return when the node is ready and takes pods."""
        new = not (self.root / "node" / "docker").exists()
        self.node.connect()
        self._run(
            "etcd",
            "etcd", "--data-dir", f"{self.root}/etcd", "--unsafe-no-fsync", "--log-level", "error",
            "--listen-client-urls", f"http://127.0.0.1:{self._etcd}",
            "--advertise-client-urls", f"http://127.0.0.1:{self._etcd}",
            "--listen-peer-urls", f"http://127.0.0.1:{self._etcd_peer}",
        )  # fmt: skip
        self._launch_api()
        self.node.boot()
        if new:
            self.node.redirect(API_IN_CLUSTER, self._port)
            self.node.build_images()
        self._await_api()
        self._run_controllers()
        self.start_kubelet()
        self.wait_ready(60)
        self._await_account("default")

    def stop(self) -> None:
        """Everything ends, the node as if its power were cut."""
        self.node.kill()
        for name in list(self._processes):
            self._end(name)

    def close(self) -> None:
        self._standin.go()
        self.stop()
        self.http.close()
        self.node.close()

    def _run(self, name: str, *command: str) -> None:
        self._processes[name] = node.run(self.root / f"{name}.log", *command)

    def _end(self, name: str) -> None:
        """At once, as by a crash; asked to, an API server waits long for those who watch."""
        process = self._processes.pop(name)
        process.kill()
        process.wait(20)

    def _launch_api(self) -> None:
        key = f"{self.root}/accounts.key"
        self._run(
            "kube-apiserver",
            str(BINARIES / "kube-apiserver"), "--etcd-servers", f"http://127.0.0.1:{self._etcd}",
            "--bind-address", self.node.address, "--advertise-address", self.node.address,
            "--secure-port", str(self._port), "--insecure-port", "0",
            "--tls-cert-file", f"{self.root}/server.pem", "--tls-private-key-file", f"{self.root}/server.key",
            "--authorization-mode", "Node,RBAC", "--token-auth-file", f"{self.root}/tokens.csv",
            "--service-account-issuer", ISSUER, "--service-account-key-file", key,
            "--service-account-signing-key-file", key, "--service-cluster-ip-range", SERVICES,
            "--kubelet-preferred-address-types", "InternalIP", "--allow-privileged",
            "--default-not-ready-toleration-seconds", str(GRACE),
            "--default-unreachable-toleration-seconds", str(GRACE),
            "--enable-priority-and-fairness=false", "--feature-gates", "TTLAfterFinished=true",
        )  # fmt: skip

    def _await_api(self) -> None:
        wait_for(self._api_answers, 60, lambda: node.tail(self.root / "kube-apiserver.log"))

    def _api_answers(self) -> bool:
        with suppress(httpx.HTTPError):
            return self.http.get("/readyz").status_code == 200
        return False

    def _run_controllers(self) -> None:
        self._run(
            "kube-controller-manager",
            str(BINARIES / "kube-controller-manager"), "--kubeconfig", str(self.kubeconfig("controllers")),
            "--leader-elect=false", "--port", "0", "--secure-port", "0", "--root-ca-file", str(self.ca),
            "--service-account-private-key-file", f"{self.root}/accounts.key",
            "--node-monitor-period", "1s", "--node-monitor-grace-period", f"{GRACE}s",
            "--node-startup-grace-period", "20s", "--pod-eviction-timeout", f"{GRACE}s",
            "--node-eviction-rate", "10",
            "--feature-gates", "TTLAfterFinished=true",
        )  # fmt: skip
        self._run(
            "kube-scheduler",
            str(BINARIES / "kube-scheduler"), "--kubeconfig", str(self.kubeconfig("scheduler")),
            "--leader-elect=false", "--port", "0", "--secure-port", "0",
        )  # fmt: skip

    # what can go wrong

    def stop_api(self) -> None:
        """The API server goes away; everything else stays and misses it."""
        self._end("kube-apiserver")

    def start_api(self) -> None:
        self._launch_api()
        self._await_api()

    def restart_api(self, away: float = 3) -> None:
        """The API server is gone for ``away`` seconds, and for those that its start takes."""
        self.stop_api()
        time.sleep(away)
        self.start_api()

    def kill_node(self) -> None:
        """The node's power is cut: containers, kubelet and engine are gone. ``start_node`` brings it back."""
        self._standin.come()
        self.node.kill()

    def start_node(self) -> None:
        self.node.boot()
        self.start_kubelet()

    def stop_kubelet(self) -> None:
        """Nobody speaks for the node any more; its containers run on."""
        self._standin.come()
        self.node.stop_kubelet()

    def start_kubelet(self) -> None:
        self._standin.go()
        self.node.start_kubelet(self.kubeconfig("kubelet"))

    def disconnect_node(self) -> None:
        """The node loses its network; its containers run on. ``connect_node`` mends it."""
        self._standin.come()
        self.node.disconnect()

    def connect_node(self) -> None:
        self._standin.go()
        self.node.connect()

    def ready(self, since: datetime | None = None) -> bool:
        """Whether the node is seen as ready, and takes pods; ``since``: by what it has said after that."""
        found = self.request("GET", f"/api/v1/nodes/{node.NAME}")
        if found.status_code != 200 or found.json()["spec"].get("taints"):
            return False
        conditions = {each["type"]: each for each in found.json()["status"].get("conditions", [])}
        if conditions.get("Ready", {}).get("status") != "True":
            return False
        return since is None or datetime.fromisoformat(conditions["Ready"]["lastHeartbeatTime"]) > since

    def wait_ready(self, timeout: float = 60) -> None:
        """Wait until the node is ready, by what it says from now on."""
        now = datetime.now(UTC)
        wait_for(lambda: self.ready(now), timeout, lambda: node.tail(self.node.root / "kubelet.log"))

    # who asks

    def kubeconfig(self, token: str, namespace: str = "default") -> Path:
        """A file for whoever has this token."""
        path = self.root / f"kubeconfig-{abs(hash((token, namespace))):x}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "tests",
            "clusters": [
                {"name": "tests", "cluster": {"server": self.url, "certificate-authority": str(self.ca)}}
            ],
            "users": [{"name": "tests", "user": {"token": token}}],
            "contexts": [
                {"name": "tests", "context": {"cluster": "tests", "user": "tests", "namespace": namespace}}
            ],
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))
        return path

    def service_account_token(self, namespace: str, name: str, seconds: int = 3600) -> str:
        """A token of an account, which is made if need be; it has the rights that bindings give it: none."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts"
        self.request("POST", path, json={"metadata": {"name": name}})
        wanted = {"spec": {"expirationSeconds": seconds, "audiences": [ISSUER]}}
        made = ok(self.request("POST", f"{path}/{name}/token", json=wanted))
        return str(made.json()["status"]["token"])

    def namespace(self, name: str) -> str:
        """A namespace, made if need be, where pods can start."""
        self.request("POST", "/api/v1/namespaces", json={"metadata": {"name": name}})
        self._await_account(name)
        return name

    def _await_account(self, namespace: str) -> None:
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default"
        wait_for(
            lambda: bool(self.request("GET", path).json().get("secrets")),
            30,
            lambda: node.tail(self.root / "kube-controller-manager.log"),
        )


class StandIn:
    """A second node while the first one is lost: where none is ready, Kubernetes takes the network to be at
    fault and evicts nobody. There is only the heartbeat of it, and no pod is put on it."""

    NAME = "stand-in"

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._gone = threading.Event()
        self._heart: threading.Thread | None = None

    def come(self) -> None:
        if self._heart is not None:
            return
        ready = {"type": "Ready", "status": "True", "reason": "StandIn", "message": "for tests"}
        body = {
            "metadata": {"name": self.NAME},
            "spec": {"unschedulable": True},
            "status": {"conditions": [ready]},
        }
        ok(self._cluster.request("POST", "/api/v1/nodes", json=body))
        self._gone.clear()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

        def seen() -> bool:
            found = self._cluster.get("Node", self.NAME)["spec"].get("taints", [])
            return all("unschedulable" in taint["key"] for taint in found)

        wait_for(seen, 20, lambda: json.dumps(self._cluster.get("Node", self.NAME)))

    def go(self) -> None:
        if self._heart is None:
            return
        self._gone.set()
        self._heart.join(60)
        self._heart = None
        with suppress(httpx.HTTPError):
            self._cluster.delete("Node", self.NAME)

    def _beat(self) -> None:
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self.NAME, "namespace": "kube-node-lease"},
        }
        while not self._gone.is_set():
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            spec = {"holderIdentity": self.NAME, "leaseDurationSeconds": GRACE, "renewTime": now}
            with suppress(httpx.HTTPError, AssertionError):  # the API may be away
                self._cluster.apply({**lease, "spec": spec})
            self._gone.wait(1)

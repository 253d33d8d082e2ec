"""What the tests ask the API of their cluster for."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from tests.containers.machinery import wait_for

ADMIN = "admin-of-the-tests"
"""Token of one who may do everything."""
GROUPS = {
    "Job": "batch/v1",
    "Role": "rbac.authorization.k8s.io/v1",
    "RoleBinding": "rbac.authorization.k8s.io/v1",
    "ClusterRole": "rbac.authorization.k8s.io/v1",
    "ClusterRoleBinding": "rbac.authorization.k8s.io/v1",
    "Deployment": "apps/v1",
    "Lease": "coordination.k8s.io/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "PriorityClass": "scheduling.k8s.io/v1",
}
"""API groups of kinds; all others are of v1."""


class Api:
    """Objects and pods, as an administrator sees them."""

    def __init__(self, url: str, ca: Path) -> None:
        self.url = url
        self.ca = ca
        self.token = ADMIN
        self._trust = ssl.create_default_context(cafile=str(ca))
        self._plurals: dict[str, dict[str, dict[str, Any]]] = {}
        self.http = httpx.Client(
            base_url=url, verify=self._trust, timeout=30, trust_env=False, headers=bearer(ADMIN)
        )

    def request(self, method: str, path: str, token: str | None = None, **options: Any) -> httpx.Response:
        """Whatever the API answers, to the administrator or whose token it is."""
        return self.http.request(method, path, headers=bearer(token or ADMIN), **options)

    def path(self, kind: str, name: str = "", namespace: str = "default", version: str = "") -> str:
        """Where objects of a kind are, or one of them, like ``("Job", "a")``."""
        version = version or GROUPS.get(kind, "v1")
        prefix = f"/apis/{version}" if "/" in version else f"/api/{version}"
        if prefix not in self._plurals:
            resources = ok(self.request("GET", prefix)).json()["resources"]
            self._plurals[prefix] = {each["kind"]: each for each in resources if "/" not in each["name"]}
        resource = self._plurals[prefix][kind]
        place = f"{prefix}/namespaces/{namespace}" if resource["namespaced"] else prefix
        return f"{place}/{resource['name']}" + (f"/{name}" if name else "")

    def apply(self, manifest: Mapping[str, Any], token: str | None = None) -> dict[str, Any]:
        """Make an object, or make it as it is here, as ``kubectl apply --server-side`` does."""
        metadata = manifest["metadata"]
        path = self.path(
            manifest["kind"], metadata["name"], metadata.get("namespace", "default"), manifest["apiVersion"]
        )
        response = self.http.patch(
            path,
            params={"fieldManager": "tests", "force": "true"},
            content=json.dumps(manifest),
            headers={**bearer(token or ADMIN), "Content-Type": "application/apply-patch+yaml"},
        )
        return object_of(response)

    def get(self, kind: str, name: str, namespace: str = "default") -> dict[str, Any]:
        return object_of(self.request("GET", self.path(kind, name, namespace)))

    def list(self, kind: str, namespace: str = "default", selector: str = "") -> list[dict[str, Any]]:
        query = {"labelSelector": selector} if selector else {}
        found = object_of(self.request("GET", self.path(kind, "", namespace), params=query))
        items: list[dict[str, Any]] = found["items"]
        return items

    def delete(self, kind: str, name: str, namespace: str = "default", *, grace: int | None = None) -> None:
        """Delete an object and what it owns; one that is not there is fine."""
        options: dict[str, Any] = {"propagationPolicy": "Background"}
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        response = self.request("DELETE", self.path(kind, name, namespace), json=options)
        assert response.status_code in (200, 202, 404), response.text

    def clear(self, namespace: str = "default") -> None:
        """Delete jobs, pods, secrets and configurations of tests, and wait until the pods are gone."""
        for job in self.list("Job", namespace):
            self.delete("Job", job["metadata"]["name"], namespace)
        for pod in self.list("Pod", namespace):
            self.delete("Pod", pod["metadata"]["name"], namespace, grace=0)
        for secret in self.list("Secret", namespace):
            if secret["type"] != "kubernetes.io/service-account-token":
                self.delete("Secret", secret["metadata"]["name"], namespace)
        wait_for(lambda: not self.list("Pod", namespace), 30, lambda: str(self.list("Pod", namespace)))

    # pods

    def pod_of(self, job: str, namespace: str = "default", timeout: float = 30) -> dict[str, Any]:
        """The pod of a job, as soon as there is one."""
        selector = f"job-name={job}"
        found: list[dict[str, Any]] = []

        def made() -> bool:
            found[:] = self.list("Pod", namespace, selector)
            return bool(found)

        wait_for(made, timeout, lambda: f"job {job} has no pod")
        return found[0]

    def wait_for(
        self,
        kind: str,
        name: str,
        condition: Callable[[dict[str, Any]], Any],
        namespace: str = "default",
        timeout: float = 30,
    ) -> dict[str, Any]:
        """An object, as soon as the condition holds for it."""
        found: dict[str, Any] = {}

        def holds() -> bool:
            found.clear()
            found.update(self.get(kind, name, namespace))
            return bool(condition(found))

        wait_for(holds, timeout, lambda: f"{kind} {name}: {json.dumps(found.get('status'))}")
        return found

    def wait_ended(self, pod: str, namespace: str = "default", timeout: float = 60) -> dict[str, Any]:
        """A pod that has succeeded or failed."""
        return self.wait_for(
            "Pod", pod, lambda it: it["status"].get("phase") in ("Succeeded", "Failed"), namespace, timeout
        )

    def log(self, pod: str, namespace: str = "default") -> bytes:
        return ok(self.request("GET", f"{self.path('Pod', pod, namespace)}/log")).content

    @contextmanager
    def follow(self, pod: str, namespace: str = "default") -> Iterator[Iterator[bytes]]:
        """What a pod writes, while it does."""
        path = f"{self.path('Pod', pod, namespace)}/log"
        with self.http.stream("GET", path, params={"follow": "true"}, timeout=60) as response:
            assert response.status_code == 200, response.read()
            yield response.iter_bytes()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def ok(response: httpx.Response) -> httpx.Response:
    assert response.is_success, f"{response.request.method} {response.request.url}: {response.text}"
    return response


def object_of(response: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = ok(response).json()
    return found

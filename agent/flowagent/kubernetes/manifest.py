"""What an agent in a cluster consists of, and the rights it needs there: these, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from flowagent.errors import UsageError
from flowagent.kubernetes.names import is_label

HOME = "/var/lib/flowagent"
PORT = 8080
USER = 1000
"""Of the agent's image."""


class Right(NamedTuple):
    """What may be done with one kind of object in the namespace of the jobs."""

    group: str
    resource: str
    verbs: tuple[str, ...]


RIGHTS = (
    Right("batch", "jobs", ("create", "get", "list", "patch", "delete")),
    Right("", "pods", ("list", "watch", "deletecollection")),
    Right("", "pods/log", ("get",)),
    Right("", "events", ("list",)),
    Right("", "secrets", ("create", "delete")),
)


def manifest(
    *,
    name: str,
    namespace: str,
    image: str,
    labels: Sequence[str],
    job_image: str,
    storage: str,
    job_namespace: str | None = None,
) -> list[dict[str, Any]]:
    """The objects of one agent. ``job_image`` is for runs that name none; ``storage`` the size of the volume
    on which it keeps what it knows of its runs, as Kubernetes writes sizes; ``job_namespace`` where it makes
    jobs, and has its rights; None: where it is itself.

    Where the store is, a Secret of the agent's name says: a key ``store``. It is not among the objects.

    :raises UsageError: a name can be none in a cluster."""
    jobs = namespace if job_namespace is None else job_namespace
    for what, given in (("name", name), ("namespace", namespace), ("job-namespace", jobs)):
        if not is_label(given):
            raise UsageError(
                f"--{what}: {given[:100]!r} can be no name in a cluster; "
                "take at most 63 lower case letters, digits and hyphens, no hyphen first or last"
            )
    meta = {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/name": name}}
    for_jobs = {**meta, "namespace": jobs}
    rules = [
        {"apiGroups": [right.group], "resources": [right.resource], "verbs": list(right.verbs)}
        for right in RIGHTS
    ]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    rbac = "rbac.authorization.k8s.io/v1"
    volume = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": storage}}}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        {"apiVersion": rbac, "kind": "Role", "metadata": for_jobs, "rules": rules},
        {
            "apiVersion": rbac,
            "kind": "RoleBinding",
            "metadata": for_jobs,
            "roleRef": role,
            "subjects": [subject],
        },
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": volume},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": meta,
            "spec": {
                "replicas": 1,
                "strategy": {"type": "Recreate"},  # two agents of one name would get in each other's way
                "selector": {"matchLabels": meta["labels"]},
                "template": {
                    "metadata": {"labels": meta["labels"]},
                    "spec": _pod(name, jobs, image, labels, job_image),
                },
            },
        },
    ]


def _pod(name: str, jobs: str, image: str, labels: Sequence[str], job_image: str) -> dict[str, Any]:
    arguments = ["start", "--runner", "kubernetes", "--name", name, "--namespace", jobs]
    arguments += ["--no-hostname-label", "--image", job_image, "--health-address", f"0.0.0.0:{PORT}"]
    if labels:
        arguments += ["--labels", ",".join(labels)]
    store = {"secretKeyRef": {"name": name, "key": "store"}}
    probe = {"port": PORT, "scheme": "HTTP"}
    return {
        "serviceAccountName": name,
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER},
        "terminationGracePeriodSeconds": 30,
        "containers": [
            {
                "name": "agent",
                "image": image,
                "args": arguments,
                "env": [
                    {"name": "FLOWAGENT_HOME", "value": HOME},
                    {"name": "FLOWAGENT_DRAIN", "value": "20s"},
                    {"name": "FLOWAGENT_STORE", "valueFrom": store},
                ],
                "ports": [{"name": "health", "containerPort": PORT}],
                "livenessProbe": {"httpGet": {"path": "/livez", **probe}, "periodSeconds": 10},
                "readinessProbe": {"httpGet": {"path": "/readyz", **probe}, "periodSeconds": 10},
                "resources": {
                    "requests": {"cpu": "100m", "memory": "128Mi"},
                    "limits": {"memory": "512Mi"},
                },
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "volumeMounts": [{"name": "home", "mountPath": HOME}],
            }
        ],
        "volumes": [{"name": "home", "persistentVolumeClaim": {"claimName": name}}],
    }

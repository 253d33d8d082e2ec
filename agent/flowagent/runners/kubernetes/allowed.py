"""What flows may say in their job templates, and ask for in their run configs.

All that is not listed here is refused, so that a field which a later Kubernetes brings is refused too until
somebody has looked at it. The agent's own template is its operator's, and may say anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from flowagent.errors import SandboxError, one_line
from flowagent.runners.kubernetes.jobs import FLOW, VOLUME
from flowagent.runners.kubernetes.templates import TemplateError, containers, pod_spec

Leaf = Callable[[Any], "str | None"]
"""Says what of a value is refused; None: nothing."""
JOB_SECRET = re.compile(r"flowagent-.+\.[0-9]+")
"""Names of Secrets that hold what attempts are told: those of other runs, with their secrets."""
RESERVED_PREFIX = "flowagent."
DOMAINS = ("app.kubernetes.io", "cluster-autoscaler.kubernetes.io", "prometheus.io")
"""Of labels and annotations that mean no harm. Those of other domains can be orders to parts of a cluster: to
leave AppArmor out, to use another network, to take a role of the cloud's."""
CONTROL_PLANE = "node-role.kubernetes.io/"
SYSTEM = "system-"


def _any(value: Any) -> str | None:
    return None


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else one_line(repr(value), 40)


def _no(value: Any) -> str | None:
    return None if value is False else one_line(str(value), 40)


def _runtime_default(value: Any) -> str | None:
    return None if value == {"type": "RuntimeDefault"} else "a profile other than RuntimeDefault"


def _keys(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return _text(value)
    for key in value:
        domain, slash, _ = key.partition("/")
        if key.startswith(RESERVED_PREFIX) or (slash and domain not in DOMAINS):
            return one_line(key, 80)
    return None


def _priority(value: Any) -> str | None:
    return None if isinstance(value, str) and not value.startswith(SYSTEM) else one_line(str(value), 80)


def _tolerated(value: Any) -> str | None:
    if not isinstance(value, str) or not value:
        return "no key, which is all taints"
    return one_line(value, 80) if value.startswith(CONTROL_PLANE) else None


def _added(value: Any) -> str | None:
    return one_line(str(value), 80) if value else None


class _Foreign:
    """The name of a Secret, a service account or a volume claim: not one of the agent's own."""


FOREIGN = _Foreign()
REFERENCE: dict[str, Any] = {"name": FOREIGN, "key": _any, "optional": _any, "items": _any}
METADATA = {
    "labels": _keys,
    "annotations": _keys,
    "name": _any,  # the agent's goes over it
    "namespace": _any,  # likewise
    "creationTimestamp": _any,  # null, in what kubectl prints
}
USER = {
    "runAsUser": _any,
    "runAsGroup": _any,
    "runAsNonRoot": _any,
    "seccompProfile": _runtime_default,
    "appArmorProfile": _runtime_default,
}
PROBE = {
    "exec": _any,
    "grpc": _any,
    "httpGet": {"path": _any, "port": _any, "scheme": _any, "httpHeaders": _any},  # host: the node asks it
    "tcpSocket": {"port": _any},
    "initialDelaySeconds": _any,
    "periodSeconds": _any,
    "timeoutSeconds": _any,
    "successThreshold": _any,
    "failureThreshold": _any,
}
CONTAINER = {
    "name": _text,
    "image": _text,
    "imagePullPolicy": _any,
    "command": _any,
    "args": _any,
    "workingDir": _any,
    "env": [
        {
            "name": _text,
            "value": _any,
            "valueFrom": {
                "secretKeyRef": REFERENCE,
                "configMapKeyRef": _any,
                "fieldRef": _any,
                "resourceFieldRef": _any,
            },
        }
    ],
    "envFrom": [{"prefix": _any, "configMapRef": _any, "secretRef": REFERENCE}],
    "ports": [{"name": _any, "containerPort": _any, "protocol": _any}],
    "resources": {"limits": _any, "requests": _any},
    "volumeMounts": [
        {
            "name": _text,
            "mountPath": _text,
            "subPath": _any,
            "subPathExpr": _any,
            "readOnly": _any,
            "recursiveReadOnly": _any,
        }
    ],
    "securityContext": {
        **USER,
        "readOnlyRootFilesystem": _any,
        "allowPrivilegeEscalation": _no,
        "privileged": _no,
        "capabilities": {"drop": _any, "add": _added},
    },
    "livenessProbe": PROBE,
    "readinessProbe": PROBE,
    "startupProbe": PROBE,
    "stdin": _no,
    "tty": _no,
    "terminationMessagePath": _any,
    "terminationMessagePolicy": _any,
}
CLAIM = {
    "metadata": {"labels": _keys, "annotations": _keys, "creationTimestamp": _any},
    # neither dataSource, which copies other volumes, nor volumeName, which takes one of somebody else's
    "spec": {"accessModes": _any, "resources": _any, "storageClassName": _any, "volumeMode": _any},
}
VOLUME_KINDS = {
    "secret": {"secretName": FOREIGN, "optional": _any, "defaultMode": _any, "items": _any},
    "configMap": _any,
    "emptyDir": {"medium": _any, "sizeLimit": _any},
    "persistentVolumeClaim": {"claimName": FOREIGN, "readOnly": _any},
    "downwardAPI": _any,
    "projected": {
        "defaultMode": _any,
        "sources": [{"secret": REFERENCE, "configMap": _any, "downwardAPI": _any}],
    },
    "ephemeral": {"volumeClaimTemplate": CLAIM},
}
POD = {
    "containers": [CONTAINER],
    "initContainers": [{**CONTAINER, "restartPolicy": _any}],  # Always: it runs beside the flow
    "volumes": [{"name": _text, **VOLUME_KINDS}],
    "securityContext": {
        **USER,
        "fsGroup": _any,
        "fsGroupChangePolicy": _any,
        "supplementalGroups": _any,
        "supplementalGroupsPolicy": _any,
    },
    "serviceAccountName": FOREIGN,
    "automountServiceAccountToken": _no,
    "imagePullSecrets": [{"name": FOREIGN}],
    "nodeSelector": _any,
    "affinity": _any,
    "topologySpreadConstraints": _any,
    "tolerations": [
        {"key": _tolerated, "operator": _any, "value": _any, "effect": _any, "tolerationSeconds": _any}
    ],
    "priorityClassName": _priority,
    "activeDeadlineSeconds": _any,
    "resources": {"limits": _any, "requests": _any},
    "hostname": _any,
    "subdomain": _any,
    "setHostnameAsFQDN": _any,
    "hostAliases": _any,
    "dnsPolicy": _any,
    "dnsConfig": _any,
    "enableServiceLinks": _any,
    "hostNetwork": _no,
    "hostPID": _no,
    "hostIPC": _no,
    "hostUsers": _no,
    "shareProcessNamespace": _no,
    "restartPolicy": _any,  # the agent's goes over it
    "terminationGracePeriodSeconds": _any,  # likewise
}
ALLOWED = {
    "apiVersion": _any,
    "kind": _any,
    "metadata": METADATA,
    "status": _any,  # dropped
    "spec": {
        "activeDeadlineSeconds": _any,
        "ttlSecondsAfterFinished": _any,
        "template": {"metadata": METADATA, "spec": POD},
        # the agent's go over these
        "backoffLimit": _any,
        "completions": _any,
        "parallelism": _any,
        "suspend": _any,
    },
}


def check(
    template: Mapping[str, Any],
    where: str,
    *,
    own: Mapping[str, Any] | None = None,
    reserved: Collection[str] = (),
) -> None:
    """See that a flow's template, whose shape was checked, says nothing but what flows may.

    ``own`` is the agent's template, whose containers and volumes stay as they are. ``reserved``: the names of
    the agent's own Secrets, service accounts and volume claims, where jobs are in its namespace.

    :raises TemplateError: a value is null, or of another kind than belongs there.
    :raises SandboxError: it says more."""
    for what in (*_refused(template, ALLOWED, "", where, reserved), *_shared(template, own or {})):
        raise SandboxError(
            f"{where} asks for {what}, which is not for flows to set; "
            "an agent can have it in a template of its own: --job-template FILE"
        )


def check_config(config: Mapping[str, Any], reserved: Collection[str]) -> None:
    """The same for what a run config names. :raises SandboxError: it is the agent's own."""
    for name in (config.get("service_account_name"), *(config.get("image_pull_secrets") or ())):
        _check_foreign(name, "the flow's run config", reserved)


def images(template: Mapping[str, Any]) -> list[str]:
    """Of all containers that a checked template brings."""
    return [container["image"] for container in containers(pod_spec(template)) if "image" in container]


def _refused(value: Any, allowed: Any, path: str, where: str, reserved: Collection[str]) -> Iterator[str]:
    if value is None and not path.endswith("creationTimestamp"):
        raise TemplateError(f"{where}: {path} is null; give it a value, or leave it out")
    if isinstance(allowed, dict):
        if not isinstance(value, Mapping):
            raise TemplateError(f"{where}: {path} takes a table")
        for key, inner in value.items():
            field = f"{path}.{one_line(key, 60)}".lstrip(".")
            if key in allowed:
                yield from _refused(inner, allowed[key], field, where, reserved)
            else:
                yield field
    elif isinstance(allowed, list):
        if not isinstance(value, list):
            raise TemplateError(f"{where}: {path} takes a list of tables")
        for number, inner in enumerate(value):
            name = inner.get("name", number) if isinstance(inner, Mapping) else number
            entry = f"{path}[{one_line(str(name), 60)}]"
            yield from _refused(inner, allowed[0], entry, where, reserved)
            if path.endswith("tolerations") and "key" not in inner:
                yield f"{entry}: {_tolerated(None)}"
    elif isinstance(allowed, _Foreign):
        _check_foreign(value, f"{where}, at {path},", reserved)
    elif (what := allowed(value)) is not None:
        yield f"{path}: {what}"


def _check_foreign(name: Any, where: str, reserved: Collection[str]) -> None:
    if name is None:
        return
    if not isinstance(name, str):
        raise TemplateError(f"{where} takes a name; got {one_line(repr(name), 40)}")
    tokens = any(name.startswith(f"{each}-token-") for each in reserved)  # of accounts, in older clusters
    if name in reserved or tokens or JOB_SECRET.fullmatch(name):
        raise SandboxError(
            f"{where} asks for {one_line(name, 80)}, which is an agent's own; use another, or have jobs "
            "in a namespace without the agent: flowagent kubernetes manifest --job-namespace NAME"
        )


def _shared(template: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """What of the agent's template a flow's would change or make use of: its containers can have rights that
    flows have not, its volumes can be mounted for reading only."""
    pod, agents = pod_spec(template), pod_spec(own)
    taken = {container["name"] for container in containers(agents)} - {FLOW}
    volumes = {VOLUME, *(volume["name"] for volume in agents.get("volumes") or ())}
    mine = {volume["name"] for volume in pod.get("volumes") or ()}
    yield from (f"volume {one_line(name, 60)} of the agent" for name in sorted(mine & volumes))
    for container in containers(pod):
        if container["name"] in taken:
            yield f"container {one_line(container['name'], 60)} of the agent"
        for mount in container.get("volumeMounts") or ():
            if mount["name"] not in mine:
                yield f"a mount of volume {one_line(mount['name'], 60)}, which it does not have"

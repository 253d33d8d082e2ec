"""What jobs are made of: the default, the agent's template, the flow's, and what none of them changes."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowagent.errors import LauncherError, SettingsError
from flowagent.models import Json
from flowagent.runners.kubernetes.templates import containers, merged, pod_spec
from flowagent.settings import Settings

FLOW = "flow"
"""The container in which the flow runs."""
JOBS = "apis/batch/v1"
BRIEF = "brief.json"
PLACE = "/var/run/flowagent"
"""Where the brief is, in the flow's container."""
VOLUME = "flowagent-brief"
OWNER, JOB, RUN, ATTEMPT, KEPT = (f"flowagent.{key}" for key in ("owner", "job", "run", "attempt", "kept"))
"""Labels."""
FLOW_NAME = "flowagent.flow"
"""An annotation: names of flows can be longer than labels."""
ORPHANED, LOOKED_AT = 600, 7 * 86400
"""Seconds after which the cluster removes a job that has ended: one whose agent is gone; one that is kept."""
AWAY = 30
"""Seconds that a node may be away before the cluster gives its pods up."""
KILL_MARGIN = 5
"""Seconds that the supervisor has to end the flow after its grace, before the node does."""
MOST_BRIEF = 1_000_000
"""Bytes that a Secret can hold, less a little."""


FIXED = ("securityContext", "nodeSelector", "affinity", "priorityClassName")
"""Fields of pods of which flows' templates change nothing that the agent's says."""
OF_BOTH = frozenset(
    {
        "runAsUser",
        "runAsGroup",
        "runAsNonRoot",
        "seccompProfile",
        "appArmorProfile",
        "seLinuxOptions",
        "windowsOptions",
    }
)
"""Fields that security contexts of pods and of containers have, where those of containers go first."""


def job(
    settings: Settings,
    own: Mapping[str, Any],
    asked: Sequence[Mapping[str, Any]],
    config: Mapping[str, Json],
    *,
    name: str,
    image: str,
    command: Sequence[str],
    owner: str,
    run_id: str,
    attempt: int,
    flow_name: str,
    grace: float,
    lasts: int,
) -> dict[str, Any]:
    """A Job for one attempt. ``own``: the agent's template; ``asked``: the flow's; ``command`` runs a brief
    whose path is its last argument; ``grace``: seconds from SIGTERM to SIGKILL for the flow; ``lasts``:
    seconds that the job may live if nobody says otherwise later."""
    base = merged(_default(settings), own)
    found = base
    for template in asked:
        found = merged(found, template)
    found = _confined(merged(found, _asked(config, image)), base)
    pod = pod_spec(found)
    pod["automountServiceAccountToken"] = _mounts_token(settings, own, config, pod)
    deadline = own_deadline([found])
    labels = {OWNER: owner, JOB: name, RUN: run_id, ATTEMPT: str(attempt)}
    fixed = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels, "annotations": {FLOW_NAME: flow_name}},
        "spec": {
            "parallelism": 1,
            "completions": 1,
            "backoffLimit": 0,  # what is tried again, flowagent tries again
            "activeDeadlineSeconds": min(lasts, deadline) if deadline else lasts,
            "suspend": False,
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": math.ceil(grace) + KILL_MARGIN,
                    "containers": [
                        {
                            "name": FLOW,
                            "command": [*command, f"{PLACE}/{BRIEF}"],
                            "args": [],
                            "volumeMounts": [{"name": VOLUME, "mountPath": PLACE, "readOnly": True}],
                        }
                    ],
                    "volumes": [{"name": VOLUME, "secret": {"secretName": name, "defaultMode": 0o444}}],
                },
            },
        },
    }
    found = merged(found, fixed)
    found["metadata"].pop("namespace", None)
    found.pop("status", None)
    # the flow's container comes first: what looks at pods shows that one
    pod_spec(found)["containers"].sort(key=lambda container: container["name"] != FLOW)
    return found


def _default(settings: Settings) -> dict[str, Any]:
    away = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": AWAY}
    pod: dict[str, Any] = {
        "enableServiceLinks": False,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "tolerations": [
            {"key": f"node.kubernetes.io/{state}", **away} for state in ("not-ready", "unreachable")
        ],
        "containers": [
            {
                "name": FLOW,
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    }
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    if settings.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": secret} for secret in settings.image_pull_secrets]
    kept = settings.keep == "failed"
    return {
        "metadata": {"labels": {"app.kubernetes.io/managed-by": "flowagent"}},
        "spec": {
            "ttlSecondsAfterFinished": LOOKED_AT if kept else ORPHANED,
            "template": {
                "metadata": {"labels": {"app.kubernetes.io/managed-by": "flowagent"}},
                "spec": pod,
            },
        },
    }


def _confined(found: dict[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """``found`` with all that confines a flow as it is in ``base``, the default and the agent's template,
    whatever was laid over it."""
    own, pod = pod_spec(base), dict(pod_spec(found))
    for key in FIXED:
        if own.get(key) is not None:
            pod[key] = _over(pod.get(key), own[key])
    agents = {container["name"] for container in containers(own)} - {FLOW}
    of_pod = {key: value for key, value in _table(own.get("securityContext")).items() if key in OF_BOTH}
    of_flow = next((each.get("securityContext") for each in own["containers"] if each["name"] == FLOW), None)
    rights = {**of_pod, **_table(of_flow)}
    for kind in ("initContainers", "containers"):
        if pod.get(kind):  # what flows add has the rights of the container in which they run
            pod[kind] = [
                each
                if each["name"] in agents
                else {**each, "securityContext": _over(each.get("securityContext"), rights)}
                for each in pod[kind]
            ]
    labelled = _labelled(found["spec"]["template"], base["spec"]["template"])
    return {
        **_labelled(found, base),
        "spec": {**found["spec"], "template": {**labelled, "spec": pod}},
    }


def _labelled(found: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """With the labels and annotations of ``base``: by such the cluster's rules for the network find pods."""
    own = base["metadata"]
    kept = {
        key: _over(found["metadata"].get(key), own[key]) for key in ("labels", "annotations") if own.get(key)
    }
    return {**found, "metadata": {**found["metadata"], **kept}}


def _over(value: Any, fixed: Any) -> Any:
    return {**_table(value), **fixed} if isinstance(fixed, Mapping) else fixed


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mounts_token(
    settings: Settings, own: Mapping[str, Any], config: Mapping[str, Json], pod: Mapping[str, Any]
) -> bool:
    """Whether the pod gets a token of its service account: if somebody who may has named the account, unless
    the agent's template says otherwise. A flow's template can only go without."""
    said = pod_spec(own).get("automountServiceAccountToken")
    if said is not None:
        return bool(said)
    if config.get("service_account_name"):
        return True
    return bool(settings.service_account) and pod.get("automountServiceAccountToken") is not False


def _asked(config: Mapping[str, Json], image: str) -> dict[str, Any]:
    """What the arguments of a KubernetesRun say, which go before any template."""
    resources = {
        kind: {
            what: value for what in ("cpu", "memory") if (value := config.get(f"{what}_{one}")) is not None
        }
        for kind, one in (("limits", "limit"), ("requests", "request"))
    }
    container: dict[str, Any] = {"name": FLOW, "image": image}
    if any(resources.values()):
        container["resources"] = {kind: values for kind, values in resources.items() if values}
    if config.get("image_pull_policy"):
        container["imagePullPolicy"] = config["image_pull_policy"]
    pod: dict[str, Any] = {"containers": [container]}
    if config.get("service_account_name"):
        pod |= {"serviceAccountName": config["service_account_name"]}
    if config.get("image_pull_secrets"):
        pod["imagePullSecrets"] = [{"name": secret} for secret in config["image_pull_secrets"]]
    return {"spec": {"template": {"spec": pod}}}


def own_deadline(templates: Sequence[Mapping[str, Any]]) -> int | None:
    """The seconds that templates give the job to live, if they do."""
    given = [(template.get("spec") or {}).get("activeDeadlineSeconds") for template in templates]
    return next((seconds for seconds in reversed(given) if isinstance(seconds, int)), None)


def image_of(
    settings: Settings, templates: Sequence[Mapping[str, Any]], config: Mapping[str, Json], stored: str | None
) -> str:
    """The image of the flow's container. ``templates``: the agent's, then the flow's; ``stored``: that which
    the flow is in.

    :raises SettingsError: nobody names one."""
    named = stored or config.get("image")
    for template in reversed(templates):
        for container in containers(pod_spec(template)):
            if named is None and container.get("name") == FLOW:
                named = container.get("image")
    named = named or settings.image
    if not named:
        raise SettingsError(
            "no image is named for the pod: give KubernetesRun(image=...), or start the agent with --image; "
            "it has to have flowagent"
        )
    return str(named)


def secret(name: str, brief: Mapping[str, Any], owner: Mapping[str, Any]) -> dict[str, Any]:
    """The Secret that holds the brief of a job, ``owner``, and goes with it.

    :raises LauncherError: it is more than a Secret can hold."""
    data = json.dumps(brief).encode()
    if len(data) > MOST_BRIEF:
        raise LauncherError(
            f"the run's parameters, environment and secrets take {len(data)} bytes, and a pod can be told "
            f"{MOST_BRIEF}; pass the name of a file instead of what is in it"
        )
    reference = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": owner["metadata"]["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": owner["metadata"]["labels"], "ownerReferences": [reference]},
        "immutable": True,  # nodes need not watch it
        "data": {BRIEF: base64.b64encode(data).decode()},
    }

"""What a cluster shows of a pod, in words: what keeps it from starting, and how it ended.

https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

from flowagent.docker import images
from flowagent.errors import one_line
from flowagent.runners.kubernetes.jobs import FLOW

PULLING, BACK_OFF = "ErrImagePull", "ImagePullBackOff"
HOPELESS = {
    PULLING: "image {image} cannot be pulled",
    BACK_OFF: "image {image} cannot be pulled",
    "InvalidImageName": "image {image} is no name of an image",
    "ErrImageNeverPull": "image {image} is not on the node, and is not to be pulled",
    "ImageInspectError": "image {image} cannot be used",
    "CreateContainerConfigError": "its container cannot be configured",
    "CreateContainerError": "its container cannot be created",
    "RunContainerError": "its container cannot be started",
}
"""Reasons for which a container waits that do not pass by waiting."""
FINAL = frozenset({"InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError"})
"""Of these, what another try does not help either."""
ON_ITS_WAY = frozenset({"ContainerCreating", "PodInitializing"})
TROUBLE = frozenset(
    {
        "FailedScheduling",
        "FailedMount",
        "FailedAttachVolume",
        "FailedCreate",
        "FailedCreatePodSandBox",
        "Failed",
    }
)
"""Reasons of events that say why a pod does not come up."""
OUT_OF_MEMORY = "OOMKilled"
OVERDUE = 20.0
"""Seconds after the end of its grace when a pod that is still there is not ending any more."""
NOT_EXECUTABLE, NOT_FOUND = 126, 127
TO_LOG_IN = "the Secret with its login: image_pull_secrets=, or --image-pull-secret of the agent"


class Obstacle(NamedTuple):
    """What keeps a pod from starting. ``passes``: it may go away by itself."""

    reason: str
    passes: bool
    retryable: bool = True


def flow_status(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """The status of the flow's container; empty before there is one."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    found: Mapping[str, Any] = next((each for each in statuses if each.get("name") == FLOW), {})
    return found


def state(pod: Mapping[str, Any], which: str) -> Mapping[str, Any] | None:
    """``waiting``, ``running`` or ``terminated``, if that is the state of the flow's container."""
    found: Mapping[str, Any] | None = (flow_status(pod).get("state") or {}).get(which)
    return found


def began(pod: Mapping[str, Any]) -> bool:
    """Whether the flow's container runs, or did."""
    return state(pod, "running") is not None or state(pod, "terminated") is not None


def over(pod: Mapping[str, Any]) -> bool:
    """Whether nothing of the flow's container runs any more, as far as the cluster knows."""
    return state(pod, "terminated") is not None or pod["status"].get("phase") in ("Succeeded", "Failed")


def lost(pod: Mapping[str, Any], now: float) -> bool:
    """Whether the pod was to be gone by now, and nobody has seen to it: its node is away."""
    deletion = pod["metadata"].get("deletionTimestamp")
    return deletion is not None and (_unready_node(pod) or now > timestamp(deletion) + OVERDUE)


def _unready_node(pod: Mapping[str, Any]) -> bool:
    """Whether the cluster takes the node for away: then pods are not ready whose containers are."""
    conditions = _conditions(pod)
    ready = conditions.get("Ready", {}).get("status")
    running = state(pod, "running") is not None and flow_status(pod).get("ready")
    return bool(
        running and ready == "False" and conditions.get("ContainersReady", {}).get("status") == "True"
    )


def obstacle(pod: Mapping[str, Any] | None, events: Iterable[Mapping[str, Any]]) -> Obstacle | None:
    """What keeps a pod from starting, as far as it is known. ``pod`` None: the job has not made it yet."""
    if pod is not None:
        statuses = pod.get("status") or {}
        for each in (*(statuses.get("initContainerStatuses") or ()), flow_status(pod)):
            waiting = (each.get("state") or {}).get("waiting")
            if waiting and waiting.get("reason") in HOPELESS:
                return _hopeless(each, waiting, events)
            ended = (each.get("state") or {}).get("terminated")
            if each.get("name") != FLOW and ended and ended.get("exitCode"):
                return Obstacle(
                    f"its container {each['name']} ended with exit code {ended['exitCode']}", False
                )
        scheduled = _conditions(pod).get("PodScheduled", {})
        if scheduled.get("status") == "False":
            return Obstacle(f"no node takes its pod: {_said(scheduled)}", True)
    troubles = [event for event in events if event.get("reason") in TROUBLE]
    if troubles:
        return Obstacle(f"its pod does not come up: {_said(max(troubles, key=_when))}", True)
    return None


def _hopeless(
    status: Mapping[str, Any], waiting: Mapping[str, Any], events: Iterable[Mapping[str, Any]]
) -> Obstacle:
    reason, image = waiting["reason"], status.get("image")
    what = HOPELESS[reason].format(image=image)
    said = one_line(str(waiting.get("message") or ""), 2000)
    if reason in (PULLING, BACK_OFF):
        if reason == BACK_OFF:  # which says no more than that: why, an event has said before
            said = _why_unpulled(events, f'Failed to pull image "{image}": ') or said
        error = images.failure(what, said, TO_LOG_IN)
        return Obstacle(str(error), False, error.retryable)
    said = one_line(said)
    return Obstacle(f"{what}: {said}" if said else what, False, reason not in FINAL)


def _why_unpulled(events: Iterable[Mapping[str, Any]], prefix: str) -> str:
    """What the node's engine said, if there are events of it; they begin with ``prefix``."""
    told = [event for event in events if str(event.get("message")).startswith(prefix)]
    return str(max(told, key=_when)["message"]).removeprefix(prefix) if told else ""


def _when(event: Mapping[str, Any]) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or "")


def end(
    pod: Mapping[str, Any] | None, job: Mapping[str, Any] | None, last_line: str, *, asked: bool = False
) -> dict[str, Any]:
    """What is noted of an attempt whose supervisor had no last words, or was ``asked`` to end by the node.
    ``pod`` or ``job`` None: it is gone."""
    if deadline := exceeded(job):
        return deadline
    if job is None:
        return {"gone": "its job was deleted by somebody else"}
    if pod is None:
        return {"gone": "its pod was deleted, or its node is lost"}
    status = pod["status"]
    node = pod["spec"].get("nodeName")
    if status.get("reason"):  # of the pod as a whole: Evicted, NodeLost, Shutdown ...
        said = one_line(str(status.get("message") or ""))
        return {"gone": f"{status['reason']} from node {node}" + (f": {said}" if said else "")}
    ended = state(pod, "terminated")
    if asked:
        return {"gone": f"its pod was deleted from node {node}"}
    if ended is None:
        return {"gone": f"node {node} is lost, with its pod on it"}
    return _terminated(ended, last_line)


def _terminated(ended: Mapping[str, Any], last_line: str) -> dict[str, Any]:
    code = ended.get("exitCode")
    if ended.get("reason") == OUT_OF_MEMORY:
        return {"ended": True, "out_of_memory": True}
    if code in (NOT_EXECUTABLE, NOT_FOUND) or ended.get("reason") == "ContainerCannotRun":
        said = _said(ended)
        return {
            "gone": "its image has no flowagent" + (f": {said}" if said else "") + "; use one that has it",
            "retryable": False,
        }
    said = f": {last_line}" if last_line else ""
    return {"gone": f"the pod ended with exit code {code} before the flow had{said}"}


def exceeded(job: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What is noted of a job that lived for longer than it might; None: it did not."""
    for condition in ((job or {}).get("status") or {}).get("conditions") or ():
        if condition.get("type") == "Failed" and condition.get("reason") == "DeadlineExceeded":
            return {"ended": True, "stop": "lease", "reason": "no agent renewed the deadline of its job"}
    return None


def _conditions(pod: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {each["type"]: each for each in (pod.get("status") or {}).get("conditions") or ()}


def _said(what: Mapping[str, Any]) -> str:
    return one_line(str(what.get("message") or ""))


def timestamp(stamp: str) -> float:
    """Seconds since the epoch."""
    return datetime.fromisoformat(stamp).timestamp()


def age(job: Mapping[str, Any] | None) -> float:
    """Seconds that a job was active before it failed; 0 if it did not."""
    status = (job or {}).get("status") or {}
    failed = [each for each in status.get("conditions") or () if each.get("type") == "Failed"]
    if not failed or not status.get("startTime"):
        return 0.0
    return timestamp(failed[0]["lastTransitionTime"]) - timestamp(status["startTime"])


UNITS = {"": 1, "k": 1000, "M": 10**6, "G": 10**9, "T": 10**12} | {
    unit + "i": 1 << (10 * power) for power, unit in enumerate("KMGT", start=1)
}


def memory_limit(pod: Mapping[str, Any]) -> int | None:
    """Bytes that the flow's container may use, if that is limited."""
    for container in pod["spec"].get("containers") or ():
        if container.get("name") == FLOW:
            text = str(((container.get("resources") or {}).get("limits") or {}).get("memory") or "")
            number = text.rstrip("KMGTik")
            with suppress(ValueError, LookupError):
                return int(float(number) * UNITS[text.removeprefix(number)])
    return None

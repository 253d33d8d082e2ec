"""What an agent does for one job while it lives.

It sees it start, follows its log, keeps its deadline ahead of now for as long as the lease is renewed, and
notes how it ended.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import anyio

from flowagent.kubernetes import Cluster, ClusterError
from flowagent.kubernetes.client import MERGE
from flowagent.runners.following import FollowedTooFarError, Follower, noted
from flowagent.runners.kubernetes import symptoms
from flowagent.runners.kubernetes.jobs import FLOW, JOB, JOBS, KILL_MARGIN
from flowagent.runtime import relay
from flowagent.runtime.events import encode
from flowagent.runtime.limits import Limits
from flowagent.runtime.rundir import RunDirectory, boottime, open_plain

AGAIN = 0.5
"""Seconds before a cluster that failed is asked again."""
LOOK_EVERY = 2.0
"""Seconds between looks at the events of a pod that does not start."""
LAST_WORDS = 10.0
"""Seconds that a log may take to end after its container has."""
MARGIN = 2
"""Seconds by which clocks and the cluster's steps may be off."""
MOST_PATIENCE = 60.0
"""Seconds for which the log of what has ended is asked for, before it counts as lost."""
BAD_REQUEST, NOT_FOUND = 400, 404
"""What is answered for the log of a container that was removed, and of a pod."""


def lasting(deadline: float, grace: float) -> int:
    """Seconds from now after which the cluster has to begin to end a job that is to be gone at ``deadline``,
    by the boot time clock. However short the lease, half of it is left to the flow."""
    left = deadline - boottime()
    return max(1, math.floor(max(left - grace - KILL_MARGIN - MARGIN, left / 2)))


class Conversation:
    """Lives as long as the job does, through any failure of the cluster's API.

    ``grace``: seconds from SIGTERM to SIGKILL; ``patience``: seconds that the pod may take to start."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        run: RunDirectory,
        limits: Limits,
        *,
        boot_id: str,
        grace: float,
        patience: float,
    ) -> None:
        self.name = name
        self._cluster = cluster
        self._run = run
        self._limits = limits
        self._boot_id = boot_id
        self._grace = grace
        self._patience = patience
        self._word = anyio.Event()
        self._lease: float | None = None
        self._stop: float | None = None
        self._pods: list[dict[str, Any]] | None = None
        self._seen = anyio.Event()
        self._over_since: float | None = None
        self._born: float | None = None  # when the job began, by the cluster's clock

    # -- to the cluster ------------------------------------------------------------------------------

    def extend(self, deadline: float) -> None:
        """Let the job live until then, by this machine's boot time."""
        self._lease = deadline
        self._word.set()

    def stop(self, grace: float) -> None:
        """Delete the job; what runs has so many seconds to end."""
        self._stop = grace
        self._word.set()

    async def hold(self) -> None:
        """Stay with the job until it has ended, and note in the run directory how it did."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch)
            tasks.start_soon(self._speak)
            pod = await self._see_it_begin()
            if pod is not None:
                tasks.start_soon(self._forget_brief)
                await self._listen(pod["metadata"]["name"], pod["metadata"]["uid"])
            tasks.cancel_scope.cancel()

    async def _speak(self) -> None:
        while True:
            await self._word.wait()
            self._word = anyio.Event()
            stop, self._stop = self._stop, None
            try:
                if stop is not None:
                    await delete(self._cluster, self.name, stop)
                elif self._lease is not None:
                    await self._renew(self._lease)
            except ClusterError as error:
                if error.status != NOT_FOUND:
                    await anyio.sleep(AGAIN)
                    self._stop = stop if self._stop is None else self._stop
                    self._word.set()

    async def _renew(self, deadline: float) -> None:
        """The cluster counts from the job's beginning, in whole seconds."""
        path = self._cluster.path("jobs", self.name, JOBS)
        noted_before = self._run.status()
        if self._born is None:
            job = await self._cluster.call("GET", path)
            began = (job.get("status") or {}).get("startTime") or job["metadata"]["creationTimestamp"]
            self._born = symptoms.timestamp(began)
        lasts = int(self._cluster.now() - self._born) + lasting(deadline, self._grace)
        own = noted_before.get("own_deadline")
        body = {"spec": {"activeDeadlineSeconds": min(lasts, own) if own else lasts}}
        await self._cluster.call("PATCH", path, body=body, kind=MERGE)

    async def _forget_brief(self) -> None:
        """The pod has it. Without it no other pod of the job can begin the attempt once more,
        whatever becomes of this one, and the secrets are in the cluster no longer than need be."""
        while True:
            with suppress(ClusterError):
                await remove(self._cluster, self._cluster.path("secrets", self.name))
                return
            await anyio.sleep(AGAIN)

    # -- from the cluster ----------------------------------------------------------------------------

    async def _watch(self) -> None:
        path = self._cluster.path("pods")
        while True:
            with suppress(ClusterError):
                async for pods in self._cluster.watch(path, {"labelSelector": f"{JOB}={self.name}"}):
                    self._pods = sorted(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
                    self._seen.set()
            await anyio.sleep(AGAIN)

    async def _news(self, seconds: float) -> None:
        """Wait for a change of the pods, for so long at the most."""
        with anyio.move_on_after(seconds):
            await self._seen.wait()
        self._seen = anyio.Event()

    async def _job(self) -> dict[str, Any] | None:
        while True:
            try:
                found: dict[str, Any] = await self._cluster.call(
                    "GET", self._cluster.path("jobs", self.name, JOBS)
                )
                return found
            except ClusterError as error:
                if error.status == NOT_FOUND:
                    return None
                await anyio.sleep(AGAIN)

    def _pod(self, uid: str | None = None) -> dict[str, Any] | None:
        """The first that the job has made, or the one that is named."""
        pods = self._pods or ()
        return next((pod for pod in pods if uid in (None, pod["metadata"]["uid"])), None)

    # -- before it begins ----------------------------------------------------------------------------

    async def _see_it_begin(self) -> dict[str, Any] | None:
        """The pod whose container runs, or did; None: it will not, and that was noted."""
        known = self._run.status().get("pod_uid")
        since = boottime()
        told = ""
        while True:
            await self._news(LOOK_EVERY)
            pod = self._pod(known)
            if pod is not None and (symptoms.began(pod) or symptoms.over(pod)):
                return self._begun(pod)
            if self._pods is None:
                continue  # the cluster has not answered yet
            job = await self._job()
            if job is None or known is not None or symptoms.exceeded(job):
                self._conclude_without(pod, job)
                return None
            found = symptoms.obstacle(pod, await self._events(pod))
            late = boottime() - since > self._patience
            if late or (found is not None and not found.passes):
                reason = found.reason if found else "its pod does not come up, and nobody says why"
                waited = f" (waited {self._patience:g} s)" if late else ""
                retryable = found.retryable if found else True
                self._run.note({"gone": f"{reason}{waited}", "retryable": retryable})
                return None
            if found is not None and found.reason != told:
                told = found.reason
                self._tell(f"waiting: {told}")

    def _begun(self, pod: Mapping[str, Any]) -> dict[str, Any]:
        known = {"pod": pod["metadata"]["name"], "pod_uid": pod["metadata"]["uid"]}
        self._run.note({"began": True, **known, "node": pod["spec"].get("nodeName")})
        return dict(pod)

    async def _events(self, pod: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """Of the pod, or of the job that makes none."""
        name = pod["metadata"]["name"] if pod is not None else self.name
        params = {"fieldSelector": f"involvedObject.name={name}", "limit": 100}
        try:
            listed = await self._cluster.call("GET", self._cluster.path("events"), params=params)
        except ClusterError:
            return []
        found: list[dict[str, Any]] = listed.get("items") or []
        return found

    def _tell(self, text: str) -> None:
        """A line in the run's output, before anything of the flow's is in it. How long what was told is gets
        noted first: whoever reads the log of the pod once more has to know."""
        said = {"level": "WARNING", "logger": "flowagent", "message": text}
        line = encode({"event": "log", "time": time.time(), **said})
        self._run.note({"told": self._run.output_size() + len(line)})
        fd = open_plain(self._run.output_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        try:
            relay.write(fd, line)
        finally:
            os.close(fd)

    # -- while it lives ------------------------------------------------------------------------------

    async def _listen(self, name: str, uid: str) -> None:
        while True:
            follower = Follower(self._run, self._limits, self._boot_id)
            try:
                complete = await self._follow(follower, name, uid)
            except OSError:  # this machine's disk is full: the log keeps it all until there is room
                await anyio.sleep(AGAIN)
                continue
            except FollowedTooFarError as error:
                with suppress(ClusterError):
                    await delete(self._cluster, self.name, 0)
                self._run.note({"ended": True, "limit": str(error)})
                return
            if complete:
                follower.close()
                await self._conclude(follower, uid)
                return
            await anyio.sleep(AGAIN)

    async def _follow(self, follower: Follower, name: str, uid: str) -> bool:
        """Read the log from its beginning; whether it was to its end, as far as that can still be had."""
        path = self._cluster.path("pods", f"{name}/log")
        running = self._lives(uid)
        broke: ClusterError | None = None
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._give_up_later, uid, tasks.cancel_scope)
            try:
                params = {"container": FLOW, "follow": "true"}
                async with self._cluster.stream(path, params) as pieces:
                    async for piece in pieces:
                        follower.feed(piece)
            except ClusterError as error:
                broke = error
            except (OSError, FollowedTooFarError) as error:
                failure = error
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if follower.ended is not None:
            return True
        if running:
            return False
        gone = broke is not None and broke.status in (BAD_REQUEST, NOT_FOUND)
        return broke is None or gone or self._pod(uid) is None or self._is_lost(uid) or self._waited()

    def _waited(self) -> bool:
        """Whether the log of what has ended could not be read for too long: its node does not answer."""
        self._over_since = self._over_since or boottime()
        return boottime() - self._over_since > MOST_PATIENCE

    def _lives(self, uid: str) -> bool:
        """As far as it is known: while the API is away, what was seen last."""
        pod = self._pod(uid)
        return self._pods is None or (pod is not None and not symptoms.over(pod) and not self._is_lost(uid))

    def _is_lost(self, uid: str) -> bool:
        pod = self._pod(uid)
        return pod is not None and not symptoms.over(pod) and symptoms.lost(pod, self._cluster.now())

    async def _give_up_later(self, uid: str, scope: anyio.CancelScope) -> None:
        """Nobody ends the log of a pod whose node is away."""
        while self._lives(uid):
            await self._news(LOOK_EVERY)
        await anyio.sleep(LAST_WORDS)
        scope.cancel()

    # -- its end -------------------------------------------------------------------------------------

    async def _conclude(self, follower: Follower, uid: str) -> None:
        """Note how it ended: in its supervisor's words, or if that has none left, in the cluster's."""
        asked = self._run.read_stop() is not None
        by_node = follower.ended is not None and follower.ended.get("stop") == "stop" and not asked
        if by_node:  # which says why when it has done it
            with anyio.move_on_after(LAST_WORDS):
                while (found := self._pod(uid)) is not None and not symptoms.over(found):
                    await self._news(LOOK_EVERY)
        pod = self._pod(uid)
        limit = {"memory_limit": symptoms.memory_limit(pod) if pod is not None else None}
        if follower.ended is not None and not by_node:
            notes = {**noted(follower.ended), **limit, "ended": True}
            self._run.note(notes, follower.ended.get("outcome"))
            return
        if asked:
            self._run.note({"ended": True, "stop": "stop"})
            return
        job = await self._job()
        self._run.note({**self._end(pod, job, follower.last_line, by_node), **limit})

    def _conclude_without(self, pod: Mapping[str, Any] | None, job: Mapping[str, Any] | None) -> None:
        if self._run.read_stop() is not None:
            self._run.note({"ended": True, "stop": "stop"})
        else:
            self._run.note(self._end(pod, job, "", by_node=False))

    def _end(
        self, pod: Mapping[str, Any] | None, job: Mapping[str, Any] | None, last: str, by_node: bool
    ) -> dict[str, Any]:
        own = self._run.status().get("own_deadline")
        if own and symptoms.exceeded(job) and symptoms.age(job) >= own:
            return {
                "ended": True,
                "stop": "timeout",
                "reason": f"timed out after {own} s, by its job template",
            }
        return symptoms.end(pod, job, last, asked=by_node)


async def delete(cluster: Cluster, name: str, grace: float) -> None:
    """Delete a job and what runs of it, which has so many seconds to end.

    :raises ClusterError: it cannot be deleted."""
    background = {"propagationPolicy": "Background"}
    await remove(cluster, cluster.path("jobs", name, JOBS), background)
    pods = {"labelSelector": f"{JOB}={name}", "gracePeriodSeconds": max(1, round(grace))}
    await remove(cluster, cluster.path("pods"), params=pods)


async def remove(
    cluster: Cluster,
    path: str,
    body: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
) -> None:
    """Delete an object; that it is gone already is as good. :raises ClusterError: it stays."""
    try:
        await cluster.call("DELETE", path, body=body, params=params)
    except ClusterError as error:
        if error.status != NOT_FOUND:
            raise

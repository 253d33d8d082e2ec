"""The kubernetes runner: one job for each attempt.

The run directory on this machine is all that is known of an attempt, as everywhere; what the flow writes
comes into it by way of the pod's log. The pod is told what to execute by a Secret: without it nothing of an
attempt can begin, which is how a job is made ahead of its start. A job is found again by its name. Its
deadline is the lease: the cluster ends it when no agent has moved the deadline on.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio

from flowagent import ground
from flowagent.errors import LauncherError, SandboxError
from flowagent.kubernetes import Cluster, ClusterError
from flowagent.kubernetes.client import MERGE
from flowagent.models import Json
from flowagent.runners.contained import EXECUTE, IMAGE_ID, brief, check_image, furnish, limits_of
from flowagent.runners.kubernetes import allowed, jobs, templates
from flowagent.runners.kubernetes.conversation import AGAIN, NOT_FOUND, Conversation, delete, lasting
from flowagent.runners.protocol import Order
from flowagent.runtime.container import boot_id
from flowagent.runtime.limits import Limits
from flowagent.runtime.rundir import RunDirectory
from flowagent.runtime.sandbox import CONTAINER
from flowagent.settings import Settings

OWNER_FILE = "cluster-owner"
"""In the agent's directory: by what its jobs are known, for as long as their run directories are."""
CONFLICT = 409
IN_IMAGE = ("python3", f"{ground.IN_IMAGES}/{ground.ENTRY}", "--container")
"""What runs a flow in an image that was built with it."""
TRIES = 10
WHERE = "the flow's job template"


class JobError(LauncherError):
    """The cluster does not take a job; ``retryable`` says whether it may later."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class KubernetesRunner:
    """Runs attempts in the cluster and namespace of the settings. ``directory`` is the agent's own.

    :raises SettingsError: there is no cluster, or the agent's job template is none."""

    name = "kubernetes"
    floor = CONTAINER
    gaps: Sequence[str] = ()

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._settings = settings
        self._runs = directory / "runs"
        self._limits = limits_of(settings)
        self._template = templates.read(settings.job_template) if settings.job_template else {}
        self._cluster = Cluster(settings.namespace, settings.context)
        self._conversations: dict[str, Conversation] = {}
        self._boot_id = boot_id()
        self._owner = _owner(directory)

    async def open(self) -> None:
        """Reach the cluster, and delete jobs that this agent has left and forgotten."""
        listed = await self._cluster.call(
            "GET",
            self._cluster.path("jobs", group=jobs.JOBS),
            params={"labelSelector": f"{jobs.OWNER}={self._owner},!{jobs.KEPT}"},
        )
        for each in listed.get("items") or ():
            name = each["metadata"]["name"]
            if not (self._runs / name.removeprefix(_name(""))).exists():
                await delete(self._cluster, name, 0)

    async def prepare(self) -> None:
        """Nothing can be done ahead: the nodes have the images."""

    async def tend(self) -> None:
        """Nothing is kept that is not used."""

    async def check(self) -> None:
        """See whether the cluster answers. :raises ClusterError: it does not."""
        await self._cluster.call("GET", "/version")

    def reload(self, settings: Settings) -> None:
        """Take the limits of these settings from the next attempt on."""
        self._limits = limits_of(settings)

    async def close(self) -> None:
        """Let go of the cluster; jobs go on, until the deadline that they have."""
        await self._cluster.close()

    # -- before an attempt ---------------------------------------------------------------------------

    def admit(self, config: Mapping[str, Json]) -> dict[str, Json]:
        """:raises FlowagentError: the flow asks for what this agent does not allow, or for nonsense."""
        check_image(config.get("image"), self._settings.registry_allow)
        allowed.check_config(config, self._reserved())
        self._given(config)
        return {"sandbox": self.floor, "grants": {}}

    def resolves(self, config: Mapping[str, Json]) -> bool:
        """Always: a pod cannot be handed files."""
        return True

    def furnish(self, order: Order, plan: Mapping[str, Json]) -> dict[str, Json]:
        """Without paths of this machine."""
        return furnish(order, plan)

    async def make_ready(self, order: Order) -> None:
        """Create the job, whose pod waits for what :meth:`start` brings.

        :raises FlowagentError: it cannot be had, or asks for what this agent does not allow."""
        asked = self._given(order.config)
        if url := order.config.get("job_template_path"):
            asked.append(self._checked(await templates.fetch(url)))
        found = [self._template, *asked]
        image = jobs.image_of(self._settings, found, order.config, order.image)
        if image.startswith(IMAGE_ID):
            raise SandboxError(
                f"the flow's image {image[:19]} is in no registry, where the cluster could get it; "
                "register it with registry_url="
            )
        for named in (order.image, order.config.get("image")):  # the agent's own may be from anywhere
            check_image(named, self._settings.registry_allow)
        job = jobs.job(
            self._settings,
            self._template,
            asked,
            order.config,
            name=_name(order.run.path),
            image=image,
            command=EXECUTE if order.image is None else IN_IMAGE,
            owner=self._owner,
            run_id=order.run_id,
            attempt=order.attempt,
            flow_name=order.flow_name,
            grace=order.grace,
            lasts=lasting(order.run.read_lease(), order.grace),
        )
        order.run.note({"own_deadline": jobs.own_deadline(found), "image": image})
        try:
            await self._cluster.call("POST", self._cluster.path("jobs", group=jobs.JOBS), body=job)
        except ClusterError as error:
            if error.status != CONFLICT:
                why = f"the cluster does not take its job: {error}"
                raise JobError(why, retryable=error.retryable or error.status == 403) from None

    def _given(self, config: Mapping[str, Json]) -> list[dict[str, Any]]:
        """The flow's own template, if it was registered with one."""
        given = config.get("job_template")
        if given is None:
            return []
        found = templates.parse(given, WHERE) if isinstance(given, str) else templates.checked(given, WHERE)
        return [self._checked(found)]

    def _checked(self, template: dict[str, Any]) -> dict[str, Any]:
        """A flow's template that this agent allows. :raises FlowagentError: it does not."""
        allowed.check(template, WHERE, own=self._template, reserved=self._reserved())
        for image in allowed.images(template):
            check_image(image, self._settings.registry_allow)
        return template

    def _reserved(self) -> set[str]:
        """Names of what the agent itself uses in the namespace of its jobs: in the manifest that is printed
        for it, its Secret and its volume claim have the name that its account has."""
        account = self._cluster.account
        if account is None or account.namespace != self._cluster.namespace:
            return set()
        return {account.name, self._settings.name or account.name}

    # -- its life ------------------------------------------------------------------------------------

    async def start(self, order: Order) -> str:
        """Tell the pod what to execute; the job's name."""
        name = _name(order.run.path)
        job = await self._cluster.call("GET", self._cluster.path("jobs", name, jobs.JOBS))
        told = brief(order, self._limits_of(order.config), self._boot_id, resolves=order.image is None)
        await self._tell(name, told, job)
        self._conversations[order.run.path] = self._conversation(order.run)
        return name

    async def _tell(self, name: str, told: Mapping[str, Any], job: Mapping[str, Any]) -> bool:
        """Make the Secret; False: it was there already.

        :raises ClusterError: after several tries; that it was made all the same is unlikely then."""
        body = jobs.secret(name, told, job)
        for left in reversed(range(TRIES)):
            try:
                await self._cluster.call("POST", self._cluster.path("secrets"), body=body)
                return True
            except ClusterError as error:
                if error.status == CONFLICT:
                    return False
                if not error.retryable or not left:
                    raise
                await anyio.sleep(AGAIN)
        return False

    async def began(self, run: RunDirectory) -> bool:
        """Whether its pod was told what to execute; one that was not is told that there is nothing, which
        makes sure of it."""
        if "began" in run.status():
            return True
        name = _name(run.path)
        try:
            job = await self._cluster.call("GET", self._cluster.path("jobs", name, jobs.JOBS))
        except ClusterError as error:
            if error.status != NOT_FOUND:
                raise
            return False
        if not await self._tell(name, {}, job):
            return True
        await delete(self._cluster, name, 0)
        return False

    async def wait(self, run: RunDirectory, handle: str | None = None) -> dict[str, Any]:
        """Follow the pod's log until it has ended; what was noted of it."""
        conversation = self._conversations.get(run.path)
        if conversation is None:
            conversation = self._conversations[run.path] = self._conversation(run)
            conversation.extend(run.read_lease())
        try:
            await conversation.hold()
        finally:
            self._conversations.pop(run.path, None)
        return run.status()

    def _conversation(self, run: RunDirectory) -> Conversation:
        return Conversation(
            self._cluster,
            _name(run.path),
            run,
            self._limits,
            boot_id=self._boot_id,
            grace=self._settings.grace,
            patience=self._settings.start_timeout,
        )

    def _limits_of(self, config: Mapping[str, Json]) -> Limits:
        asked = {"wall_time": config["timeout"]} if config.get("timeout") else {}
        return self._limits.tightened(asked)

    def extend(self, run: RunDirectory, deadline: float) -> None:
        """Pass it on, if there is a job to be seen to."""
        run.write_lease(deadline)
        if (conversation := self._conversations.get(run.path)) is not None:
            conversation.extend(deadline)

    def stop(self, run: RunDirectory, reason: str, grace: float) -> bool:
        """Have the job deleted; what runs of it has ``grace`` seconds to end."""
        try:
            run.request_stop(reason, grace)
        except FileNotFoundError:
            raise
        except OSError:
            pass  # the disk is full: the cluster is told all the same
        conversation = self._conversations.get(run.path)
        if conversation is None:
            return False
        conversation.stop(grace)
        return True

    async def forbid(self, run: RunDirectory, reason: str, *, failed: bool = False) -> None:
        """Delete the job; one that failed stays if it is to be looked at."""
        name = _name(run.path)
        if failed and self._settings.keep == "failed":
            path = self._cluster.path("jobs", name, jobs.JOBS)
            kept = {"metadata": {"labels": {jobs.KEPT: "true"}}}
            try:
                await self._cluster.call("PATCH", path, body=kept, kind=MERGE)
                return
            except ClusterError as error:
                if error.status != NOT_FOUND:
                    raise
        await delete(self._cluster, name, 0)


def _name(run: str) -> str:
    """Of the job for a run directory: what is allowed in both are letters, digits, ``-`` and ``.``."""
    return f"flowagent-{os.path.basename(run)}"


def _owner(directory: Path) -> str:
    """Who this agent is, in a cluster where others of the same name may be: a number of its own, which is
    kept where its run directories are."""
    path = directory / OWNER_FILE
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
        return path.read_text().strip()

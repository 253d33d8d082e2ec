"""The docker runner: one container for each attempt.

The run directory on this machine is all that is known of an attempt, as everywhere. What the container writes
comes into it by way of its log; leases and requests to stop go the other way, through its standard input. A
container is found again by its name, and ends by itself when its lease does.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio

from flowagent.docker import Engine, EngineError, images, parse
from flowagent.errors import AgentError
from flowagent.files import write
from flowagent.models import Json
from flowagent.runners.contained import EXECUTE, IMAGE_ID, brief, check_image, furnish, limits_of
from flowagent.runners.docker import packing
from flowagent.runners.docker.containers import Rules
from flowagent.runners.docker.conversation import AGAIN, Conversation
from flowagent.runners.docker.grounds import Grounds, remove, start
from flowagent.runners.protocol import Order
from flowagent.runtime.container import boot_id
from flowagent.runtime.rundir import RunDirectory
from flowagent.runtime.sandbox import CONTAINER
from flowagent.settings import Settings

PYTHON = "python3"
OWNER = "owner"
"""The file in the agent's directory that says what its containers are labelled with."""
KEPT = "-kept"
"""At the end of the name of a container that is kept."""


class DockerRunner:
    """Runs attempts on the engine of the settings. ``directory`` is the agent's own.

    :raises SettingsError: the settings name something that cannot be."""

    name = "docker"
    floor = CONTAINER
    gaps: Sequence[str] = ()

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._settings = settings
        self._directory = directory
        self._runs = directory / "runs"
        self._rules = Rules(settings)
        self._engine = Engine(settings.engine)
        self._grounds = Grounds(self._engine, settings.home / "ground")
        self._conversations: dict[str, Conversation] = {}
        self._boot_id = boot_id()
        self._owner = ""

    async def open(self) -> None:
        """Reach the engine, and remove containers that this agent has left and forgotten."""
        self._owner = self._grounds.owner = await anyio.to_thread.run_sync(_owner, self._directory)
        filters = {"label": [f"flowagent.owner={self._owner}"]}
        listed = await self._engine.call("GET", "/containers/json", params={"all": 1, "filters": filters})
        for each in listed:
            name = each["Names"][0].lstrip("/") if each["Names"] else ""
            run = self._runs / name.removeprefix("flowagent-")
            if not name.endswith(KEPT) and not run.exists():
                await remove(self._engine, each["Id"])

    async def prepare(self) -> None:
        """Have the image at hand that runs get which name none."""
        image = await self._image(self._default_image)
        await self._grounds.volume(image, PYTHON, self._default_image)

    async def tend(self) -> None:
        """Nothing is kept that is not used."""

    async def check(self) -> None:
        """See whether the engine answers. :raises LauncherError: it does not."""
        await self._engine.call("GET", "/version")

    def reload(self, settings: Settings) -> None:
        """Take the limits of these settings from the next attempt on."""
        self._rules.limits = limits_of(settings)

    async def close(self) -> None:
        """Let go of the engine; containers go on."""
        for conversation in self._conversations.values():
            await conversation.close()
        await self._engine.close()

    # -- before an attempt ---------------------------------------------------------------------------

    def admit(self, config: Mapping[str, Json]) -> dict[str, Json]:
        """:raises SandboxError: the flow asks for what this agent does not allow."""
        self._rules.check(config)
        check_image(config.get("image"), self._settings.registry_allow)
        return {"sandbox": self.floor, "grants": {}}

    def resolves(self, config: Mapping[str, Json]) -> bool:
        """As the run config says."""
        return config.get("resolve") == "container"

    def _resolves(self, order: Order) -> bool:
        return order.image is None and self.resolves(order.config)

    def furnish(self, order: Order, plan: Mapping[str, Json]) -> dict[str, Json]:
        """Without paths of this machine."""
        return furnish(order, plan)

    async def make_ready(self, order: Order) -> None:
        """Pull the image, see that it can run flows, and create the container.

        :raises FlowagentError: one of these fails."""
        check_image(order.image, self._settings.registry_allow)
        name = order.image or order.config.get("image") or self._default_image
        image = await self._image(name)
        command, ground = [*EXECUTE, "-"], None
        python = order.config.get("python") or PYTHON
        if not self._resolves(order):
            ground = await self._grounds.volume(image, python, name)
            command = self._grounds.command(python, "--container")
        labels = {
            "flowagent.owner": self._owner,
            "flowagent.run": order.run_id,
            "flowagent.attempt": str(order.attempt),
            "flowagent.flow": order.flow_name,
        }
        body = self._rules.container(image, command, order.config, labels, ground)
        params = {"name": _name(order.run)}
        container = (await self._engine.call("POST", "/containers/create", params=params, body=body))["Id"]
        order.run.note({"container": container, "image": name, "program": command[0]})
        for network in self._rules.networks(order.config)[1:]:
            await self._engine.call("POST", f"/networks/{network}/connect", body={"Container": container})
        if ground is not None:
            await self._grounds.keep(image, python, name)
        self._conversations[order.run.path] = self._conversation(container, order.run)

    def _conversation(self, container: str, run: RunDirectory) -> Conversation:
        return Conversation(self._engine, container, run, self._rules.limits, self._boot_id)

    @property
    def _default_image(self) -> str:
        return self._settings.image or f"python:{sys.version_info[0]}.{sys.version_info[1]}-slim"

    async def _image(self, name: str) -> str:
        """The id of an image, pulled if need be. :raises FlowagentError: it cannot be had."""
        if name.startswith(IMAGE_ID):
            if await images.inspect(self._engine, name) is None:
                raise images.ImageError(
                    f"image {name[:19]} is not on this engine: it was registered without registry_url=, "
                    "and stays on the engine that built it"
                )
            return name
        reference = parse(name)
        pull = self._settings.pull
        found = await images.inspect(self._engine, name)
        if found is not None and (pull != "always" or reference.digest):
            return str(found["Id"])
        if pull == "never":
            raise images.ImageError(f"image {name} is not on the engine, and this agent does not pull")
        await images.pull(self._engine, reference)
        found = await images.inspect(self._engine, name)
        if found is None:
            raise images.ImageError(f"image {name} is not there after it was pulled", retryable=True)
        return str(found["Id"])

    # -- its life ------------------------------------------------------------------------------------

    async def start(self, order: Order) -> str:
        """Start the container and hand it what it is to execute; its id."""
        conversation = self._conversations[order.run.path]
        channel = await conversation.attach()
        noted = order.run.status()
        await start(self._engine, conversation.container, noted.get("program", ""), noted.get("image", ""))
        limits = self._rules.limits_of(order.config)
        told = brief(order, limits, self._boot_id, resolves=self._resolves(order))
        if (source := order.source) is None:
            await channel.send(json.dumps(told).encode() + b"\n")
            return conversation.container
        in_place = order.lease_fd is None and source == order.origin
        files = await anyio.to_thread.run_sync(
            lambda: packing.listed(source, self._settings.max_source, in_place=in_place)
        )
        head = json.dumps({**told, "files": files}).encode() + b"\n"
        await self._engine.feed(conversation.container, channel, packing.stream(head, source, files))
        return conversation.container

    async def began(self, run: RunDirectory) -> bool:
        """Whether its container was started; one that was only made is removed."""
        found = await self._find(run)
        if found is None:
            return "began" in run.status()
        if found["State"]["Status"] == "created":
            await remove(self._engine, found["Id"])
            return False
        return True

    async def wait(self, run: RunDirectory, handle: str | None = None) -> dict[str, Any]:
        """Follow the container's log until it has ended; what was noted of it."""
        conversation = self._conversations.get(run.path)
        if conversation is None:
            conversation = self._conversations[run.path] = self._conversation(_name(run), run)
            conversation.extend(run.read_lease())
        try:
            await conversation.hold()
        finally:
            self._conversations.pop(run.path, None)
        return run.status()

    def extend(self, run: RunDirectory, deadline: float) -> None:
        """Pass it on, if there is a container yet."""
        run.write_lease(deadline)
        if (conversation := self._conversations.get(run.path)) is not None:
            conversation.extend(deadline)

    def stop(self, run: RunDirectory, reason: str, grace: float) -> bool:
        """Pass it on, if there is a container; it is killed if it does not listen."""
        try:
            run.request_stop(reason, grace)
        except FileNotFoundError:
            raise
        except OSError:
            pass  # the disk is full: the container is told all the same
        conversation = self._conversations.get(run.path)
        if conversation is None:
            return False
        conversation.stop(reason, grace)
        return True

    async def forbid(self, run: RunDirectory, reason: str, *, failed: bool = False) -> None:
        """Remove the container; one that failed is only stopped if it is to be kept."""
        if (conversation := self._conversations.pop(run.path, None)) is not None:
            await conversation.close()
        found = await self._find(run)
        if found is None:
            return
        if failed and self._settings.keep == "failed":
            with suppress(EngineError):
                await self._engine.call("POST", f"/containers/{found['Id']}/kill")
            params = {"name": _name(run) + KEPT}
            await self._engine.call("POST", f"/containers/{found['Id']}/rename", params=params)
        else:
            await remove(self._engine, found["Id"])

    # -- the engine ----------------------------------------------------------------------------------

    async def _find(self, run: RunDirectory) -> dict[str, Any] | None:
        """What the engine knows of an attempt's container, however long it is away; None: there is none."""
        while True:
            try:
                found: dict[str, Any] = await self._engine.call("GET", f"/containers/{_name(run)}/json")
                return found
            except EngineError as error:
                if error.status == 404:
                    return None
                await anyio.sleep(AGAIN)


def _name(run: RunDirectory) -> str:
    return f"flowagent-{os.path.basename(run.path)}"


def _owner(directory: Path) -> str:
    """Whose containers those of an agent are: what a file in its directory says, made when it first starts.
    Its host is no part of it: an agent in a container is on another host whenever that is made anew.

    :raises AgentError: the file cannot be read or written."""
    file = directory / OWNER
    try:
        with suppress(FileExistsError):
            write(file, [secrets.token_hex(8).encode()], exclusive=True)
        owner = file.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise AgentError(f"{file} cannot be used: {error}; check its permissions") from None
    if not re.fullmatch("[0-9a-f]{16}", owner):
        raise AgentError(f"{file} does not hold what an agent writes there; remove it")
    return owner

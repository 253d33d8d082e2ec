"""Docker storage: images with flows in them, built and checked when a flow is registered."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from anyio import to_thread

from flowagent.backend import Artifact, BackendContext, Entry, Features, Revision
from flowagent.docker import Engine, EngineError, Reference, images, parse
from flowagent.docker.client import explained
from flowagent.docker.credentials import build_auth, registry_auth
from flowagent.docker.references import HUB
from flowagent.errors import BackendError, FlowagentError, StorageNotFoundError, UsageError
from flowagent.flows.names import slug
from flowagent.models import Json
from flowagent.runtime.check import FOUND
from flowagent_backends.code_only import CodeOnly
from flowagent_backends.docker_context import Context

LAST_LINES = 12
"""Lines of a build that failed which are shown."""
LINE = 100
"""Letters of a line that are shown while it is built."""
PIECE = 1 << 20
QUERY = {
    "buildargs": "buildargs",
    "target": "target",
    "nocache": "nocache",
    "pull": "pull",
    "network_mode": "networkmode",
    "platform": "platform",
    "labels": "labels",
    "shmsize": "shmsize",
    "extra_hosts": "extrahosts",
}
"""``build_kwargs`` -> parameter of the Engine API's ImageBuild."""


class DockerBackend(CodeOnly):
    """Images on the engine of this machine, and in registries that it has credentials for."""

    type = "Docker"
    features = Features(("pickle", "script"), "the image's digest", "docker login")

    def __init__(self, context: BackendContext) -> None:
        self._context = context
        self._engines: dict[str | None, Engine] = {}

    async def close(self) -> None:
        """Let go of the engines."""
        for engine in self._engines.values():
            await engine.close()
        self._engines.clear()

    def default_labels(self, storage: Mapping[str, Json]) -> tuple[str, ...]:
        """Without a registry, the image is on this machine only."""
        here = storage.get("registry_url") is None and storage.get("add_default_labels", True)
        return (self._context.host,) if here else ()

    # -- flows ---------------------------------------------------------------------------------------

    async def resolve(self, storage: Mapping[str, Json]) -> Revision:
        """The image as it was registered, by its digest. Asks nobody.

        :raises BackendError: it was never built."""
        artifact = storage.get("artifact")
        if not artifact:
            raise BackendError("Docker: the image was never built; register the flow again")
        path = Path(artifact["path"])
        entry = Entry(
            artifact["kind"],
            path.name,
            sha256=artifact["flow_sha256"],
            made_with=artifact.get("made_with") or {},
        )
        return Revision(artifact["image"], entry, directory=path.parent, image=artifact["image"])

    async def materialise(self, storage: Mapping[str, Json], revision: Revision, directory: Path) -> None:
        """Nothing is taken out of an image; see that it can still be had, and is what would be built now.

        :raises StorageNotFoundError: it is not."""
        artifact = storage["artifact"]
        context = await to_thread.run_sync(Context.outside_of_flow, storage)
        if context.digest != artifact["context"]:
            raise StorageNotFoundError("Docker: files that go into the image were changed; build it anew")
        image = str(artifact["image"])
        engine = self._engine(storage)
        if await images.inspect(engine, image) is None:
            await self._check_registry(engine, image)

    async def upload(self, storage: Mapping[str, Json], artifact: Artifact) -> dict[str, Json]:
        """Build the image, have it load the flow, and push it.

        :raises BackendError: one of these fails; with the last lines of what was said."""
        image = _image(storage, artifact.flow_name)
        engine = self._engine(storage)
        context = await to_thread.run_sync(Context.of, storage, artifact)
        if not storage.get("local_image") and storage.get("dockerfile") is None:
            await self._have(engine, context.bases[0])
        image_id, python = await self._build(engine, storage, context, image)
        here = [sys.version_info[0], sys.version_info[1]]
        if python is not None and python != here:
            self._context.say(
                f"warning: the image {image} has Python {_dotted(python)}, and the flow was registered by "
                f"{_dotted(here)}; a pickle may not load, and results may not be read"
            )
        pinned = image_id
        if storage.get("registry_url"):
            pinned = str(image.pinned(await self._push(engine, image)))
        else:
            self._context.say(f"{image} stays on this machine's engine: no registry_url was given")
        return {
            **storage,
            "artifact": {
                "kind": artifact.kind,
                "image": pinned,
                "tag": str(image),
                "path": context.flow_path,
                "flow_sha256": context.flow_sha256,
                "sha256": hashlib.sha256(f"{context.flow_sha256} {context.digest}".encode()).hexdigest(),
                "context": context.digest,
                "python": python,
                "made_with": dict(artifact.made_with),
            },
        }

    # -- steps ---------------------------------------------------------------------------------------

    def _engine(self, storage: Mapping[str, Json]) -> Engine:
        url = storage.get("base_url")
        if url not in self._engines:
            self._engines[url] = Engine(url, self._context.environ)
        return self._engines[url]

    async def _have(self, engine: Engine, image: str) -> None:
        """The newest base image there is; one that is here already will do if there is no newer one."""
        reference = _parse(image)
        try:
            with self._context.progress(f"pulling {image}") as advance:
                await images.pull(engine, reference, _progress(advance), self._context.environ)
        except FlowagentError:
            if await images.inspect(engine, image) is None:
                raise
            self._context.say(f"{image} could not be pulled: the one that is here is used")

    async def _build(
        self, engine: Engine, storage: Mapping[str, Json], context: Context, image: Reference
    ) -> tuple[str, list[int] | None]:
        """The image's id, and the version of its Python."""
        options = storage.get("build_kwargs") or {}
        params = {"t": str(image), "rm": 1, "forcerm": 1, "dockerfile": context.dockerfile_name}
        params |= {QUERY[name]: _flag(value) for name, value in options.items()}
        logins = await build_auth(map(_registry, context.bases), self._context.environ)
        headers = {"Content-Type": "application/x-tar", "X-Registry-Config": logins}
        lines: deque[str] = deque(maxlen=LAST_LINES)
        image_id, python = "", None
        with tempfile.TemporaryFile() as archive:
            await to_thread.run_sync(context.write, archive)
            size = archive.tell()
            archive.seek(0)
            with self._context.progress(f"sending {image}", size) as advance:
                try:
                    async with engine.messages(
                        "POST",
                        "/build",
                        params=params,
                        headers=headers,
                        content=_pieces(archive, advance),
                        silence=images.SILENCE,
                    ) as messages:
                        async for message in messages:
                            if said := message.get("error"):
                                raise self._failed(image, str(said), lines)
                            image_id = (message.get("aux") or {}).get("ID", image_id)
                            for line in str(message.get("stream", "")).splitlines():
                                python = self._line(line.strip(), lines) or python
                except EngineError as error:
                    if error.status == 0:
                        raise
                    raise self._failed(image, str(error), lines) from None
        if not image_id:
            raise self._failed(image, "the engine named no image", lines)
        return image_id, python

    def _line(self, line: str, lines: deque[str]) -> list[int] | None:
        """Show and remember a line of the build; the version of Python that it speaks of."""
        if line.startswith(FOUND):
            found: list[int] = json.loads(line[len(FOUND) :])["python"]
            return found
        if line:
            lines.append(line)
            if line.startswith("Step "):
                self._context.say(line[:LINE])
        return None

    def _failed(self, image: Reference, said: str, lines: deque[str]) -> BackendError:
        what = f"Docker: {image} could not be built"
        pulling = lines and " : from " in lines[-1].lower()  # what fails then is said by a registry
        why = str(images.failure(what, said)) if pulling else f"{what}: {explained(said.strip())}"
        before = " | ".join(line for line in lines if not line.startswith("--->"))
        return BackendError(f"{why}{f'; it said: {before}' if before else ''}"[:2000])

    async def _push(self, engine: Engine, image: Reference) -> str:
        with self._context.progress(f"pushing {image}") as advance:
            digest = await images.push(engine, image, _progress(advance), self._context.environ)
        self._context.say(f"pushed {image}")
        return digest

    async def _check_registry(self, engine: Engine, image: str) -> None:
        if image.startswith("sha256:"):
            raise StorageNotFoundError(f"Docker: image {image[:19]} is not on this machine's engine any more")
        reference = _parse(image)
        headers = {"X-Registry-Auth": await registry_auth(reference.registry, self._context.environ)}
        try:
            await engine.call("GET", f"/distribution/{image}/json", headers=headers)
        except EngineError as error:
            failure = images.failure(f"image {image} cannot be looked for", str(error))
            if failure.retryable:
                raise failure from None
            raise StorageNotFoundError(str(failure)) from None


def _image(storage: Mapping[str, Json], flow_name: str) -> Reference:
    """The name of the image: as declared, else of the flow and the time."""
    name = storage.get("image_name") or slug(flow_name)
    tag = storage.get("image_tag") or slug(datetime.now(UTC).isoformat(timespec="seconds"))
    registry = storage.get("registry_url")
    return _parse(f"{registry.removeprefix('https://')}/{name}:{tag}" if registry else f"{name}:{tag}")


def _parse(image: str) -> Reference:
    try:
        return parse(image)
    except UsageError as error:
        raise BackendError(f"Docker: {error}") from None


def _registry(base: str) -> str:
    """Where the engine pulls a base image from."""
    try:
        return parse(base).registry
    except UsageError:
        return HUB


def _flag(value: Json) -> Json:
    return int(value) if isinstance(value, bool) else value


def _dotted(version: list[int]) -> str:
    return ".".join(map(str, version))


def _progress(advance: Callable[[int], None]) -> images.Report:
    """Tells of bytes, out of messages that say of each layer how far it is."""
    done: dict[str, int] = {}

    def report(message: dict[str, Any]) -> None:
        layer, detail = message.get("id"), message.get("progressDetail") or {}
        if layer and isinstance(detail.get("current"), int):
            advance(max(0, detail["current"] - done.get(layer, 0)))
            done[layer] = max(done.get(layer, 0), detail["current"])

    return report


async def _pieces(archive: Any, advance: Callable[[int], None]) -> AsyncIterator[bytes]:
    while data := await to_thread.run_sync(archive.read, PIECE):
        advance(len(data))
        yield data

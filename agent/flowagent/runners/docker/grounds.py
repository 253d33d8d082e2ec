"""The ground floor in the engine: one volume for each image, with byte code of that image's Python.

Containers mount it read-only, which takes no time; copying it into each would take longer than the flow's
start. Nothing of any flow's runs where it is written, and no other image ever sees it.

People may prune volumes that no container has at the moment, while an agent believes them filled; an engine
makes a volume that is missing anew, and empty, for the container that asks for it. So each has a mark, which
is compared when a container has it, and it can no longer be pruned.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from flowagent import ground
from flowagent.docker import Engine, EngineError
from flowagent.errors import LauncherError
from flowagent.runners.docker.containers import CONFINED, GROUND_LABEL
from flowagent.runners.docker.conversation import NOT_FOUND
from flowagent.runners.docker.volumes import GROUND
from flowagent.runtime import seed

TIMEOUT = 120.0
"""Seconds that laying it out may take."""
BYTECODE = f"{GROUND}/bytecode"


class ImagePythonError(LauncherError):
    """The Python of an image is missing or too old; another try does not help."""

    retryable = False


@dataclass
class _Ground:
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    volume: str | None = None
    mark: str = ""
    """Of the volume that was filled: one that was made anew under its name has another."""


class Grounds:
    """The volumes of one agent in one engine. ``root``: where it is laid out on this machine.

    ``owner``: whose the containers are that fill them."""

    def __init__(self, engine: Engine, root: Path) -> None:
        self._engine = engine
        self._root = root
        self.owner = ""
        self._known: dict[tuple[str, str], _Ground] = {}
        self._files: dict[str, bytes] = {}
        self._seed_text = ""
        self.digest = ""

    async def volume(self, image_id: str, python: str, image: str) -> str:
        """The volume for an image, by its id. ``image`` is for messages.

        :raises ImagePythonError: there is no Python in the image that could run it.
        :raises EngineError: the engine fails."""
        if not self._files:
            self._files = await anyio.to_thread.run_sync(self._read)
        known = self._known.setdefault((image_id, python), _Ground())
        async with known.lock:
            if known.volume is None:
                name = f"flowagent-{self.digest}-{image_id.removeprefix('sha256:')[:16]}"
                known.mark = await self._lay_out(name, image_id, python, image)
                known.volume = name
            return known.volume

    async def keep(self, image_id: str, python: str, image: str) -> None:
        """See that the volume is still the one that was filled, now that a container was made with it, and
        fill it again if it is not.

        :raises ImagePythonError: as above.
        :raises EngineError: the engine fails."""
        known = self._known[image_id, python]
        async with known.lock:
            if known.volume is not None and await self._mark(known.volume) != known.mark:
                known.mark = await self._lay_out(known.volume, image_id, python, image)

    def command(self, python: str, *arguments: str) -> list[str]:
        """What runs the ground floor inside of a container."""
        entry = f"{GROUND}/{self.digest}/{ground.ENTRY}"
        return [python, "-X", f"pycache_prefix={BYTECODE}", entry, *arguments]

    def _read(self) -> dict[str, bytes]:
        directory = ground.lay_out(self._root)
        self.digest = directory.name
        self._seed_text = Path(seed.__file__).read_text("utf-8")
        return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.py")}

    async def _mark(self, volume: str) -> str:
        found = await self._engine.call("GET", f"/volumes/{volume}")
        return f"{found.get('CreatedAt')} {(found.get('Labels') or {}).get(GROUND_LABEL)}"

    async def _lay_out(self, name: str, image_id: str, python: str, image: str) -> str:
        """Fill a volume; its mark."""
        engine = self._engine
        labels = {GROUND_LABEL: secrets.token_hex(8)}  # times are in seconds, which may be too coarse
        await engine.call("POST", "/volumes/create", body={"Name": name, "Labels": labels})
        body = {
            "Image": image_id,
            "Entrypoint": [
                python,
                "-X",
                f"pycache_prefix={BYTECODE}",
                "-c",
                self._seed_text,
                GROUND,
                self.digest,
            ],
            "Cmd": [],
            "User": "0:0",
            "Labels": {GROUND_LABEL: "", "flowagent.owner": self.owner},
            "OpenStdin": True,
            "StdinOnce": True,
            "AttachStdin": True,
            "HostConfig": {**CONFINED, "Binds": [f"{name}:{GROUND}:rw"], "NetworkMode": "none"},
        }
        container = (await engine.call("POST", "/containers/create", body=body))["Id"]
        try:
            mark = await self._mark(name)
            with anyio.fail_after(TIMEOUT):
                code, output = await self._seed(container, python, image)
        except TimeoutError:
            raise LauncherError(f"{python} in image {image} did not come up in {TIMEOUT:g} s") from None
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(TIMEOUT):
                await remove(engine, container)
        _judge(code, output, python, image)
        return mark

    async def _seed(self, container: str, python: str, image: str) -> tuple[int, bytes]:
        """Run the seed with the files on its standard input; its exit code and what it wrote."""
        channel = await self._engine.attach(container)
        try:
            await start(self._engine, container, python, image)
            await self._engine.feed(container, channel, self._contents())
            ended = await self._engine.call("POST", f"/containers/{container}/wait", timeout=TIMEOUT)
        finally:
            await channel.close()
        async with self._engine.log(container, follow=False) as pieces:
            output = b"".join([piece async for piece in pieces])
        return int(ended["StatusCode"]), output

    async def _contents(self) -> AsyncIterator[bytes]:
        listed = [[name, len(data)] for name, data in self._files.items()]
        yield json.dumps(listed).encode() + b"\n"
        yield b"".join(self._files.values())


async def remove(engine: Engine, container: str) -> None:
    """Remove a container with all that is in it; that somebody else did so, or does now, is as good.

    :raises LauncherError: it cannot be removed."""
    try:
        await engine.call("DELETE", f"/containers/{container}", params={"force": 1, "v": 1})
    except EngineError as error:
        if error.status not in (404, 409):
            raise LauncherError(f"container {container[:12]} cannot be removed: {error}") from None


async def start(engine: Engine, container: str, python: str, image: str) -> None:
    """Start a container. :raises ImagePythonError: what it is to run is not in the image."""
    try:
        await engine.call("POST", f"/containers/{container}/start")
    except EngineError as error:
        if "executable file not found" in str(error) or "no such file or directory" in str(error):
            raise ImagePythonError(_missing(python, image)) from None
        raise


def _missing(python: str, image: str) -> str:
    return (
        f"image {image} has no {python}; use an image with Python 3.9 or newer, or name its interpreter: "
        "DockerRun(python=...)"
    )


def _judge(code: int, output: bytes, python: str, image: str) -> None:
    lines = output.decode(errors="replace").strip().splitlines()
    answer: Mapping[str, Any] = {}
    if code == 0 and lines:
        answer = json.loads(lines[-1])
        version = tuple(answer["python"])
        if version < seed.LEAST:
            raise ImagePythonError(
                f"{python} in image {image} is {'.'.join(map(str, version))}; flows need 3.9 or newer"
            )
    elif code == NOT_FOUND:
        raise ImagePythonError(_missing(python, image))
    else:
        said = lines[-1][:300] if lines else "nothing"
        raise LauncherError(f"{python} in image {image} ended with exit code {code} and said: {said}")

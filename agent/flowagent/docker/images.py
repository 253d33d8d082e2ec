"""Images: pulled and pushed, with what goes wrong told apart."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from flowagent.docker.client import MAKE_ROOM, Engine, EngineError, explained
from flowagent.docker.credentials import registry_auth
from flowagent.docker.references import Reference
from flowagent.errors import BackendError

SILENCE = 300.0
"""Seconds without a word after which a pull, push or build is given up."""
Report = Callable[[dict[str, Any]], None]
"""Told of each message of the engine."""


def _words(*alternatives: str) -> re.Pattern[str]:
    """Finds any of these as words of their own, and not in digests, sizes, ports, or names of images."""
    return re.compile(rf"(?<![-/:@.\w])(?:{'|'.join(alternatives)})(?![-/:@.]?\w)", re.IGNORECASE)


_UNREACHABLE = _words(
    *(
        "connection refused",
        "connection reset",
        "no such host",
        "network is unreachable",
        "server misbehaving",
    ),
    *("timeout", r"Client\.Timeout", "deadline exceeded", "TLS handshake", "EOF", "temporary failure"),
    r"5\d\d",
)
_DENIED = _words("unauthorized", "denied", "no basic auth", "authentication required", "401", "403")
_MISSING = _words("not found", "manifest unknown", "name unknown", "no such image", "404")


class ImageError(BackendError):
    """An image cannot be had, or not be stored."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


async def inspect(engine: Engine, image: str) -> dict[str, Any] | None:
    """What the engine knows of an image; None: it is not there. :raises EngineError: it does not answer."""
    try:
        found: dict[str, Any] = await engine.call("GET", f"/images/{image}/json")
    except EngineError as error:
        if error.status == 404:
            return None
        raise
    return found


async def pull(
    engine: Engine,
    image: Reference,
    report: Report = lambda message: None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Have the engine fetch an image. :raises ImageError: it cannot be had, and why."""
    params = {"fromImage": image.name, "tag": image.digest or image.tag or "latest"}
    headers = {"X-Registry-Auth": await registry_auth(image.registry, environ)}
    await _transfer(engine, "/images/create", params, headers, report, f"image {image} cannot be pulled")


async def push(
    engine: Engine,
    image: Reference,
    report: Report = lambda message: None,
    environ: Mapping[str, str] = os.environ,
) -> str:
    """Have the engine store an image in its registry; the digest it has there.

    :raises ImageError: it cannot be stored, and why."""
    digest = ""

    def note(message: dict[str, Any]) -> None:
        nonlocal digest
        digest = (message.get("aux") or {}).get("Digest", digest)
        report(message)

    params = {"tag": image.tag or "latest"}
    headers = {"X-Registry-Auth": await registry_auth(image.registry, environ)}
    what = f"image {image} cannot be pushed"
    await _transfer(engine, f"/images/{image.name}/push", params, headers, note, what)
    if not digest:
        raise ImageError(f"{what}: the registry did not say under which digest it is")
    return digest


async def _transfer(
    engine: Engine,
    path: str,
    params: Mapping[str, str],
    headers: Mapping[str, str],
    report: Report,
    what: str,
) -> None:
    try:
        async with engine.messages("POST", path, params=params, headers=headers, silence=SILENCE) as messages:
            async for message in messages:
                if said := message.get("error"):
                    raise failure(what, str(said))
                report(message)
    except EngineError as error:
        if error.status == 0:
            raise
        raise failure(what, str(error)) from None


def failure(what: str, said: str, login: str = "log in: docker login") -> ImageError:
    """The error that an engine speaks of, with what to do about it. ``what`` failed; ``login``: what helps
    where the registry asks who one is."""
    if not said.strip():
        return ImageError(what, retryable=True)
    said = explained(" ".join(said.split())[:1000])  # names are repeated in it, and it ends with the reason
    if MAKE_ROOM in said:
        return ImageError(f"{what}: {said}")
    if _UNREACHABLE.search(said):
        return ImageError(f"{what}: the registry cannot be reached ({said}); try again later", retryable=True)
    if _DENIED.search(said):
        return ImageError(f"{what}: the registry refuses ({said}); check the name, and {login}")
    if _MISSING.search(said):
        return ImageError(f"{what}: there is no such image ({said}); check its name and tag")
    return ImageError(f"{what}: {said}", retryable=True)

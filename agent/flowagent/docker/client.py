"""A client of the Docker Engine API, over a unix socket or TCP; podman speaks the same.

Plain HTTP by way of :mod:`flowagent.http`: no client library tells the two streams of a log apart, takes over
a connection and stays out of the way of anyio all at once.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio

from flowagent import http
from flowagent.docker import config
from flowagent.errors import FlowagentError, SettingsError

Version = tuple[int, int]
LEAST: Version = (1, 41)
"""The oldest API that has all that is asked for here: Docker 20.10, podman 4."""
NEWEST: Version = (1, 51)
"""The newest API in which what is used here is known to be as in the oldest: Docker 28."""
TIMEOUT = 60.0
"""Seconds that the engine may take to answer."""
FRAME = struct.Struct(">BxxxL")
"""Before each piece of a log: which stream, and how many bytes (Engine API, "Stream format")."""
TROUBLE = 3
"""The stream in which the engine itself speaks."""
MAKE_ROOM = "the engine's disk is full, make room: docker system prune"
_WAYS_OUT = (
    (re.compile(r"no space left|disk quota exceeded", re.IGNORECASE), MAKE_ROOM),
    (re.compile(r"network \S+ not found"), "make it, docker network create, or name another"),
    (re.compile(r"HTTP request to an HTTPS server"), "set DOCKER_TLS_VERIFY and DOCKER_CERT_PATH"),
)
"""What an engine says, and what to do then."""
_OTHER_VERSION = re.compile(r"client version [\d.]+ is too (?:old|new)")


class EngineError(FlowagentError):
    """The engine refused or failed; ``status`` is HTTP's, 0 if it could not be reached at all."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.retryable = status == 0 or status >= 500


class BrokenLogError(EngineError):
    """The engine cannot read a container's log any further."""


class Channel:
    """A connection to a container's standard input."""

    def __init__(self, response: http.Response) -> None:
        self._response = response
        self._stream = response.extensions["network_stream"]

    async def send(self, data: bytes) -> None:
        """:raises EngineError: it is gone."""
        with http.transport_errors(lambda why: EngineError(f"the container's input is closed: {why}")):
            await self._stream.write(data, timeout=TIMEOUT)

    async def close(self) -> None:
        await self._response.aclose()


class Engine:
    """One engine. ``url``: ``unix:///path``, ``tcp://host:port`` or ``http(s)://host:port``; None: what the
    docker command goes to (:func:`flowagent.docker.config.endpoint`). It is spoken to in the newest API that
    both sides know.

    :raises SettingsError: that is no engine.
    :raises BackendError: the docker command's configuration cannot be read."""

    def __init__(self, url: str | None = None, environ: Mapping[str, str] = os.environ) -> None:
        found = config.of_url(url, environ) if url else config.endpoint(environ)
        self.url = found.url
        self._certificates = found.certificates
        scheme, _, rest = self.url.partition("://")
        options: dict[str, Any] = {"timeout": TIMEOUT}
        if scheme == "unix" and rest:
            options |= {"base_url": "http://engine", "socket": rest}
        elif scheme in ("tcp", "http", "https") and rest:
            secure = found.certificates is not None
            options["base_url"] = f"{'https' if secure else 'http'}://{rest}"
            if secure:
                options["verify"] = found.tls()
        else:
            raise SettingsError(
                f"{self.url!r} is no engine; give unix:///path, tcp://HOST:PORT or https://HOST"
            )
        self._http = http.client(**options)
        self._api: str | None = None

    async def close(self) -> None:
        await self._http.aclose()

    # -- requests ------------------------------------------------------------------------------------

    async def _versioned(self, path: str, timeout: float = TIMEOUT) -> str:
        """The path with the version of the API before it. :raises EngineError: there is none in common."""
        if self._api is None:
            with self._reaching(), anyio.fail_after(timeout):
                response = await self._http.request("GET", "/version")
            self._check(response.status_code, response.content)
            self._api = _common(_answer(response.content), self.url)
        return self._api + path

    def _check(self, status: int, content: bytes) -> None:
        """:raises EngineError: it says no."""
        if status < 400:
            return
        said = _said(content)
        if _OTHER_VERSION.search(said):  # it was upgraded, or replaced, while we spoke to it
            self._api = None
            raise EngineError(explained(said), 503)
        raise EngineError(explained(said) or f"HTTP {status}", status)

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """The answer's JSON, or None if it is empty. ``timeout``: seconds, of the whole.

        :raises EngineError: the engine says no, or does not answer."""
        versioned = await self._versioned(path, timeout or TIMEOUT)
        with self._reaching():
            with anyio.fail_after(timeout or TIMEOUT):
                response = await self._http.request(
                    method,
                    versioned,
                    params=_query(params),
                    headers=headers,
                    json=body,
                    timeout=timeout or TIMEOUT,
                )
        self._check(response.status_code, response.content)
        return _answer(response.content)

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
        silence: float | None = None,
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The answer as it comes. ``silence``: seconds without a byte that are too long; None: any are fine.

        :raises EngineError: the engine says no, or breaks off."""
        request = self._http.build_request(
            method,
            await self._versioned(path),
            params=_query(params),
            headers=dict(headers or {}),
            content=content,
            timeout=http.timeout(TIMEOUT, read=silence),
        )
        with self._reaching():
            response = await self._http.send(request, stream=True)
        try:
            with self._reaching():
                if response.status_code >= 400:
                    self._check(response.status_code, await response.aread())
            yield self._pieces(response)
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(5):
                await response.aclose()

    async def _pieces(self, response: http.Response) -> AsyncIterator[bytes]:
        pieces = response.aiter_raw()
        while True:
            with self._reaching():
                piece = await anext(pieces, None)
            if piece is None:
                return
            yield piece

    @asynccontextmanager
    async def messages(
        self, method: str, path: str, **options: Any
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The JSON objects of a streamed answer, such as that of a build, a pull or a push."""
        async with self.stream(method, path, **options) as pieces:
            yield _objects(pieces)

    async def attach(self, container: str) -> Channel:
        """Take over a connection to a container's standard input. :raises EngineError: it cannot be had."""
        request = self._http.build_request(
            "POST",
            await self._versioned(f"/containers/{container}/attach"),
            params={"stream": "1", "stdin": "1"},
            headers={"Upgrade": "tcp", "Connection": "Upgrade"},
            timeout=http.timeout(TIMEOUT, read=None),
        )
        with self._reaching():
            response = await self._http.send(request, stream=True)
            if response.status_code not in (101, 200):
                try:
                    self._check(response.status_code, await response.aread())
                finally:
                    await response.aclose()
            return Channel(response)

    async def feed(self, container: str, channel: Channel, pieces: AsyncIterator[bytes]) -> None:
        """Send pieces to a container's standard input until all are sent, or it has ended: one that ended
        early never takes the rest, and its log says why.

        :raises EngineError: the connection broke, and the container goes on."""
        failure = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._await_end, container, tasks.cancel_scope)
            try:
                async for piece in pieces:
                    await channel.send(piece)
            except EngineError as error:
                failure = error
            tasks.cancel_scope.cancel()
        if failure is not None:
            found = await self.call("GET", f"/containers/{container}/json")
            if found["State"]["Running"]:
                raise failure

    async def _await_end(self, container: str, scope: anyio.CancelScope) -> None:
        with suppress(EngineError):  # then the sending will fail
            async with self.stream("POST", f"/containers/{container}/wait") as pieces:
                async for _ in pieces:  # the head of the answer comes before the end
                    scope.cancel()

    @asynccontextmanager
    async def log(self, container: str, *, follow: bool) -> AsyncIterator[AsyncIterator[bytes]]:
        """What a container has written, both streams as they came, from its beginning; with ``follow``, until
        it ends.

        :raises BrokenLogError: the log is cut, as it is by an engine whose disk was full."""
        params = {"stdout": 1, "stderr": 1, "follow": int(follow)}
        async with self.stream("GET", f"/containers/{container}/logs", params=params) as pieces:
            yield _unframed(pieces)

    def _reaching(self) -> Any:
        def error(why: str) -> EngineError:
            ask = (
                f"are the certificates in {self._certificates} for it?" if "SSL" in why else "is it running?"
            )
            return EngineError(f"the Docker engine at {self.url} cannot be reached: {why}; {ask}")

        return http.transport_errors(error)


async def _objects(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    pending = b""
    async for piece in pieces:
        *lines, pending = (pending + piece).split(b"\n")
        for line in filter(bytes.strip, lines):
            yield json.loads(line)
    if pending.strip():
        yield json.loads(pending)


async def _unframed(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    buffer = bytearray()
    async for piece in pieces:
        buffer += piece
        while len(buffer) >= FRAME.size:
            stream, size = FRAME.unpack_from(buffer)
            if len(buffer) < FRAME.size + size:
                break
            data = bytes(buffer[FRAME.size : FRAME.size + size])
            if stream == TROUBLE:
                said = " ".join(data.decode(errors="replace").split())
                raise BrokenLogError(f"its log on the engine is cut ({said}); is the engine's disk full?")
            yield data
            del buffer[: FRAME.size + size]


def _query(params: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Parameters as the engine takes them: tables as JSON, what is None left out."""
    if params is None:
        return None
    return {
        name: json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        for name, value in params.items()
        if value is not None
    }


def _said(content: bytes) -> str:
    """What an engine says of its refusal, on one line."""
    try:
        said = json.loads(content)["message"]
    except (ValueError, LookupError, TypeError):
        said = content.decode(errors="replace")
    return " ".join(str(said).split())[:1000]


def _answer(content: bytes) -> Any:
    if not content.strip():
        return None
    try:
        return json.loads(content)
    except ValueError:
        raise EngineError("what answers there is no Docker engine: it does not speak JSON", 502) from None


def _common(said: Any, url: str) -> str:
    """The newest API that an engine, by its ``/version``, has in common with us, as it begins paths.

    :raises EngineError: there is none."""
    try:
        newest, oldest = (_version(said.get(key) or "1.0") for key in ("ApiVersion", "MinAPIVersion"))
    except (ValueError, AttributeError):
        raise EngineError(f"what answers at {url} is no Docker engine: it has no API version", 400) from None
    engine = f"the Docker engine at {url}"
    if newest < LEAST:
        raise EngineError(
            f"{engine} is too old: it speaks API {_dotted(newest)}, and {_dotted(LEAST)} is needed; "
            "use Docker 20.10 or newer, or podman 4",
            400,
        )
    if oldest > NEWEST:
        raise EngineError(
            f"{engine} is too new: it speaks API {_dotted(oldest)} and newer, and {_dotted(NEWEST)} is the "
            "newest that is known here; update flowagent",
            400,
        )
    return f"/v{_dotted(min(newest, NEWEST))}"


def _version(text: str) -> Version:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def explained(said: str) -> str:
    """What an engine says, and what to do about it."""
    for known, way_out in _WAYS_OUT:
        if known.search(said) and way_out not in said:
            return f"{said.rstrip('.')}; {way_out}"
    return said

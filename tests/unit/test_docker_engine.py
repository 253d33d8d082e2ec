"""How an engine is found and spoken to: versions of its API, contexts of the docker command, TLS."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream

from flowagent.docker import Engine, EngineError
from flowagent.errors import BackendError, SettingsError


class Double:
    """What answers on a socket as an engine does that speaks some versions of the API, and no others."""

    def __init__(self, socket: Path, newest: str, oldest: str) -> None:
        self.socket = socket
        self.speaks(newest, oldest)
        self.asked: list[str] = []

    def speaks(self, newest: str, oldest: str) -> None:
        self.newest, self.oldest = newest, oldest

    def answer(self, path: str) -> tuple[int, Any]:
        if path == "/version":
            return 200, {"Version": "0", "ApiVersion": self.newest, "MinAPIVersion": self.oldest}
        asked = path.split("/")[1].removeprefix("v")
        if number(asked) > number(self.newest):
            return 400, {"message": f"client version {asked} is too new. Maximum is {self.newest}"}
        if number(asked) < number(self.oldest):
            return 400, {"message": f"client version {asked} is too old. Minimum is {self.oldest}"}
        return 200, {"path": path}

    async def serve(self, stream: ByteStream) -> None:
        async with stream:
            head = await stream.receive()
            path = head.split(b" ")[1].decode()
            self.asked.append(path)
            status, said = self.answer(path)
            body = said if isinstance(said, bytes) else json.dumps(said).encode()
            await stream.send(b"HTTP/1.1 %d X\r\nConnection: close\r\n" % status)
            await stream.send(b"Content-Length: %d\r\n\r\n" % len(body) + body)


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@asynccontextmanager
async def double(directory: Path, newest: str, oldest: str) -> AsyncIterator[tuple[Double, Engine]]:
    served = Double(directory / "s", newest, oldest)
    engine = Engine(f"unix://{served.socket}", {})
    async with (
        await anyio.create_unix_listener(served.socket) as listener,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(listener.serve, served.serve)
        yield served, engine
        await engine.close()
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("newest", "oldest", "spoken"),
    [
        ("1.41", "1.12", "/v1.41/x"),  # Docker 20.10
        ("1.41", "1.24", "/v1.41/x"),  # podman
        ("1.43", "1.12", "/v1.43/x"),
        ("1.52", "1.44", "/v1.51/x"),  # Docker 29
    ],
)
async def test_the_newest_api_that_both_know(tmp_path: Path, newest: str, oldest: str, spoken: str) -> None:
    async with double(tmp_path, newest, oldest) as (served, engine):
        assert await engine.call("GET", "/x") == {"path": spoken}
        async with engine.messages("GET", "/x") as messages:
            assert [message async for message in messages] == [{"path": spoken}]
        assert served.asked == ["/version", spoken, spoken]


@pytest.mark.parametrize(
    ("newest", "oldest", "words"),
    [("1.40", "1.12", "too old: it speaks API 1.40, and 1.41 is needed"), ("2.3", "2.0", "too new")],
)
async def test_an_engine_with_no_api_in_common(tmp_path: Path, newest: str, oldest: str, words: str) -> None:
    async with double(tmp_path, newest, oldest) as (_, engine):
        with pytest.raises(EngineError, match=words) as caught:
            await engine.call("GET", "/x")
    assert not caught.value.retryable and "\n" not in str(caught.value)


async def test_an_engine_that_was_upgraded_meanwhile(tmp_path: Path) -> None:
    async with double(tmp_path, "1.41", "1.12") as (served, engine):
        await engine.call("GET", "/x")
        served.speaks("1.52", "1.44")
        with pytest.raises(EngineError, match="too old") as caught:
            await engine.call("GET", "/x")
        assert caught.value.retryable
        assert await engine.call("GET", "/x") == {"path": "/v1.51/x"}


async def test_what_is_no_engine(tmp_path: Path) -> None:
    async with double(tmp_path, "1.41", "1.12") as (served, engine):
        for answer in (b"<html>", b"[]", b"", b'{"ApiVersion": "new"}', b'{"ApiVersion": 2}'):
            served.answer = lambda path, answer=answer: (200, answer)  # type: ignore[method-assign]
            with pytest.raises(EngineError, match="is no Docker engine"):
                await engine.call("GET", "/x")


def context(directory: Path, name: str, content: Any) -> Path:
    """Make a context as ``docker context create`` does; where its certificates are."""
    key = hashlib.sha256(name.encode()).hexdigest()
    meta = directory / "contexts/meta" / key
    meta.mkdir(parents=True)
    (meta / "meta.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return directory / "contexts/tls" / key / "docker"


def of(host: str, **more: Any) -> dict[str, Any]:
    return {"Name": "any", "Metadata": {}, "Endpoints": {"docker": {"Host": host, **more}}}


def test_the_engine_is_that_of_the_docker_command(tmp_path: Path) -> None:
    environ = {"DOCKER_CONFIG": str(tmp_path)}
    assert Engine(None, environ).url == "unix:///var/run/docker.sock"
    context(tmp_path, "rootless", of("unix:///run/user/1000/docker.sock"))
    context(tmp_path, "other", of("tcp://other:2375"))
    (tmp_path / "config.json").write_text('{"currentContext": "rootless"}')
    assert Engine(None, environ).url == "unix:///run/user/1000/docker.sock"
    assert Engine(None, {**environ, "DOCKER_CONTEXT": "other"}).url == "tcp://other:2375"
    assert Engine(None, {**environ, "DOCKER_CONTEXT": "default"}).url == "unix:///var/run/docker.sock"
    told = {**environ, "DOCKER_CONTEXT": "other", "DOCKER_HOST": "unix:///told"}
    assert Engine(None, told).url == "unix:///told"
    assert Engine("unix:///given", told).url == "unix:///given"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "'remote' does not exist; choose one: docker context use"),
        ("{", "names no engine"),
        ("[]", "names no engine"),
        ('{"Endpoints": {"kubernetes": {}}}', "names no engine"),
        (json.dumps(of("ssh://me@there")), "goes by ssh"),
        (json.dumps(of("npipe:////./pipe/x")), "is no engine"),
        (json.dumps({"Endpoints": {"docker": {"Host": 5}}}), "names no engine"),
    ],
)
def test_contexts_that_will_not_do(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        context(tmp_path, "remote", content)
    with pytest.raises(SettingsError, match=words) as caught:
        Engine(None, {"DOCKER_CONFIG": str(tmp_path), "DOCKER_CONTEXT": "remote"})
    assert "\n" not in str(caught.value)


def test_certificates_are_those_of_the_context(tmp_path: Path) -> None:
    environ = {"DOCKER_CONFIG": str(tmp_path), "DOCKER_CONTEXT": "far"}
    tls = context(tmp_path, "far", of("tcp://far:2376"))
    tls.mkdir(parents=True)
    assert str(Engine(None, environ)._http.base_url) == "https://far:2376"
    (tls / "ca.pem").write_text("none")
    with pytest.raises(SettingsError, match=r"certificates of the engine in .* cannot be used"):
        Engine(None, environ)
    context(tmp_path, "near", of("tcp://near:2376", SkipTLSVerify=True))
    assert str(Engine(None, {**environ, "DOCKER_CONTEXT": "near"})._http.base_url) == "https://near:2376"


@pytest.mark.parametrize("content", ["{", "[]", "5", '"x"', '{"currentContext": 5}', "[" * 100_000])
def test_a_configuration_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BackendError, match=r"config\.json cannot be read: .*; correct it") as caught:
        Engine(None, {"DOCKER_CONFIG": str(tmp_path)})
    assert "\n" not in str(caught.value)

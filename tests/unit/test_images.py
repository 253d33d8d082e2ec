"""References of images and credentials of registries."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from flowagent.docker import parse
from flowagent.docker.credentials import build_auth, registry_auth
from flowagent.docker.images import failure
from flowagent.errors import BackendError, UsageError
from flowagent_backends.docker_context import Context

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "registry", "path", "tag", "digest"),
    [
        ("python", "docker.io", "library/python", None, None),
        ("python:3.12-slim", "docker.io", "library/python", "3.12-slim", None),
        ("acme/flows", "docker.io", "acme/flows", None, None),
        ("ghcr.io/acme/flows:1", "ghcr.io", "acme/flows", "1", None),
        ("127.0.0.1:5000/x", "127.0.0.1:5000", "x", None, None),
        ("localhost/x/y:z", "localhost", "x/y", "z", None),
        (f"a.b:1/c@{DIGEST}", "a.b:1", "c", None, DIGEST),
        (f"a.b/c:t@{DIGEST}", "a.b", "c", "t", DIGEST),
    ],
)
def test_references(text: str, registry: str, path: str, tag: str | None, digest: str | None) -> None:
    found = parse(text)
    assert (found.registry, found.path, found.tag, found.digest) == (registry, path, tag, digest)
    assert str(found) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "Python", "../x", "x/../y", "-x", "--privileged", "x y", "x:", "x@", "x@sha256:12", "x\n"),
        *("x:t\nRUN y", "http://x/y", "x/", "/x", "x//y", "a.b:port/x", "x:" + "t" * 129, "x" * 300),
        *("x@md5:0", "x?y=z", "x#y", "é"),
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(UsageError, match="is no image"):
        parse(text)


def test_only_whole_names_are_allowed() -> None:
    image = parse("ghcr.io/acme/flows")
    assert image.allowed(["ghcr.io"]) and image.allowed(["x.y", "ghcr.io/acme/"])
    assert not image.allowed(["ghcr.i", "ghcr.io/ac", "acme", "ghcr.io/acme/flows/more"])
    assert parse("python").allowed(["docker.io/library"])
    assert not parse("ghcr.io.evil.example/acme/x").allowed(["ghcr.io"])


def told(header: str) -> dict[str, Any]:
    return dict(json.loads(base64.urlsafe_b64decode(header)))


async def test_credentials_are_those_of_the_registry_and_of_no_other(tmp_path: Path) -> None:
    auth = base64.b64encode(b"robot:wall:e").decode()
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"auths": {"r.example": {"auth": auth}, "https://index.docker.io/v1/": {"identitytoken": "t"}}}
        )
    )
    environ = {"DOCKER_CONFIG": str(tmp_path)}
    found = told(await registry_auth("r.example", environ))
    assert (found["username"], found["password"], found["serveraddress"]) == ("robot", "wall:e", "r.example")
    assert told(await registry_auth("docker.io", environ))["identitytoken"] == "t"
    assert told(await registry_auth("r.example.evil", environ)) == {}
    assert told(await registry_auth("r.example", {"DOCKER_CONFIG": str(tmp_path / "none")})) == {}


async def test_a_build_gets_those_of_the_registries_that_it_pulls_from(tmp_path: Path) -> None:
    auths = {name: {"identitytoken": name} for name in ("docker.io", "r.example", "other.example")}
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    found = told(await build_auth(["docker.io", "r.example", "no.example"], {"DOCKER_CONFIG": str(tmp_path)}))
    assert sorted(found) == ["https://index.docker.io/v1/", "r.example"]


async def test_credential_helpers_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text(
        '#!/bin/sh\nread name\n[ "$name" = r.example ] || exit 1\necho \'{"Username":"u","Secret":"s"}\'\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (tmp_path / "config.json").write_text(json.dumps({"credsStore": "test"}))
    environ = {"DOCKER_CONFIG": str(tmp_path)}
    assert told(await registry_auth("r.example", environ))["password"] == "s"
    assert told(await registry_auth("other.example", environ)) == {}
    for name in ("missing", "../test"):
        (tmp_path / "config.json").write_text(json.dumps({"credsStore": name}))
        with pytest.raises(BackendError, match="is not installed"):
            await registry_auth("r.example", environ)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BackendError, match="cannot be read"):
        await registry_auth("r.example", environ)


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "null", '"x"', "5", "[" * 100_000),
        *('{"auths": []}', '{"auths": {"r.example": "x"}}', '{"auths": {"r.example": {"auth": 5}}}'),
        *(
            '{"auths": {"r.example": {"auth": "/w=="}}}',
            '{"credHelpers": ["x"]}',
            '{"credHelpers": {"a": 1}}',
        ),
        '{"credsStore": {"a": 1}}',
    ],
)
async def test_a_configuration_that_is_none_is_said_on_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BackendError, match=r"config\.json (cannot be read: .*|holds .*); .*log in") as caught:
        await registry_auth("r.example", {"DOCKER_CONFIG": str(tmp_path)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "words", "retryable"),
    [
        ("Get https://r/v2/: dial tcp 127.0.0.1:1: connect: connection refused", "cannot be reached", True),
        ("lookup r: no such host", "cannot be reached", True),
        ("unauthorized: authentication required", "refuses", False),
        ("manifest for r/x:1 not found: manifest unknown", "there is no such image", False),
        ("write /x: no space left on device", "disk is full", False),
        ("something else", "something else", True),
        ("unexpected status code 401 Unauthorized", "refuses", False),
        ("received unexpected HTTP status: 503 Service Unavailable", "cannot be reached", True),
        ("Get https://r/v2/: net/http: TLS handshake timeout", "cannot be reached", True),
        ("unexpected EOF", "cannot be reached", True),
        ("error parsing HTTP 404 response body", "there is no such image", False),
        ("layer sha256:9401ab: wrong", "layer sha256:9401ab: wrong", True),
        ("layer sha256:ab4031 of 140404 is wrong", "x cannot be pulled: layer", True),
        ("r/timeouts/x: not found", "there is no such image", False),
        ("the size is 1500 and not 1501", "x cannot be pulled: the size", True),
        ("r/geofleet: denied", "refuses", False),
        ("401", "refuses", False),
        ("r/x:401: not found", "there is no such image", False),
        ("127.0.0.1:503: unauthorized", "refuses", False),
        ("context deadline exceeded (Client.Timeout exceeded while awaiting)", "cannot be reached", True),
    ],
)
def test_what_a_registry_says_is_told_apart(said: str, words: str, retryable: bool) -> None:
    error = failure("image x cannot be pulled", said)
    assert words in str(error) and error.retryable == retryable and "\n" not in str(error)


@pytest.mark.parametrize(
    ("dockerfile", "bases"),
    [
        ("FROM a.b/c:1\n", ["a.b/c:1"]),
        (
            "# FROM x\nfrom --platform=linux/amd64 a.b/c as Build\nFROM build\nFROM d.e/f\n",
            ["a.b/c", "d.e/f"],
        ),
        ('ARG BASE="a.b/c:1" TAG=2\nFROM ${BASE}\nFROM d.e/f:$TAG\n', ["a.b/c:1", "d.e/f:2"]),
        ("ARG HOST\nFROM ${HOST:-a.b}/c\nFROM d${HOST:+.e}/f\n", ["a.b/c", "d/f"]),
        ("ARG NAME=x\nFROM a.b/$NAME\n", ["a.b/given"]),
        ("FROM \\\n  a.b/c:1 \\\n  AS x\nFROM x\n", ["a.b/c:1"]),
        ("FROM scratch\n", []),
    ],
)
def test_what_a_dockerfile_builds_on(dockerfile: str, bases: list[str], tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(dockerfile)
    storage = {"dockerfile": str(tmp_path / "Dockerfile"), "build_kwargs": {"buildargs": {"NAME": "given"}}}
    assert Context.outside_of_flow(storage).bases == bases


def test_a_dockerfile_without_an_image_is_none(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("RUN true\n")
    with pytest.raises(BackendError, match="has no FROM"):
        Context.outside_of_flow({"dockerfile": str(tmp_path / "Dockerfile")})


def test_a_failure_that_nobody_explains() -> None:
    assert str(failure("image x cannot be pulled", " ")) == "image x cannot be pulled"

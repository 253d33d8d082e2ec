"""Where images come from and go to: tags that are moved, credentials, and who is asked for them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.containers.conftest import start
from tests.containers.machinery import PYTHON, Engine, Registry
from tests.containers.test_runs import register, text
from tests.containers.test_storage import script, storage_of
from tests.e2e.harness import Site


def helped(
    registry: Registry, directory: Path, config: Mapping[str, object], password: str
) -> dict[str, str]:
    """Variables of somebody whose credentials a helper on the PATH keeps, and no file."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    helper = directory / "docker-credential-box"
    answer = json.dumps({"ServerURL": registry.name, "Username": registry.USER, "Secret": password})
    helper.write_text(
        f"#!/bin/sh\nread name\n[ \"$1 $name\" = 'get {registry.name}' ] && echo '{answer}' && exit\n"
        "echo credentials not found in native keychain\nexit 1\n"
    )
    helper.chmod(0o755)
    return {"DOCKER_CONFIG": str(directory), "PATH": f"{directory}:{os.environ['PATH']}"}


class Moving:
    """A tag, on the engine that of one image and in the registry that of another, by the words in them."""

    def __init__(self, engine: Engine, registry: Registry, login: Path) -> None:
        self._engine = engine
        self._config = registry.login(login)["DOCKER_CONFIG"]
        self.name = f"{registry.name}/moving:1"
        for word in ("old", "new"):
            dockerfile = f"FROM {PYTHON}\nENV WORD={word}\n"
            engine.docker("build", "-q", "-t", f"base/{word}-word:1", "-", input=dockerfile)

    def publish(self, word: str) -> None:
        self._engine.docker("tag", f"base/{word}-word:1", self.name)
        self._engine.docker("--config", self._config, "push", "-q", self.name)

    def here(self, word: str) -> None:
        self._engine.docker("tag", f"base/{word}-word:1", self.name)

    def away(self) -> None:
        self._engine.docker("rmi", "-f", self.name)


@pytest.fixture(scope="module")
def moving(engine: Engine, registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moving]:
    moving = Moving(engine, registry, tmp_path_factory.mktemp("publisher") / "login")
    yield moving
    moving.away()


@pytest.mark.parametrize(
    ("options", "moved", "missing"),
    [
        ((), "old", "new"),
        (("--pull", "always"), "new", "new"),
        (("--no-pull",), "old", "is not on the engine, and this agent does not pull"),
    ],
    ids=["missing", "always", "never"],
)
def test_a_tag_that_was_moved(
    site: Site,
    engine: Engine,
    registry: Registry,
    moving: Moving,
    options: tuple[str, ...],
    moved: str,
    missing: str,
) -> None:
    moving.publish("new")
    site.environment |= registry.login(site.root / "login")
    start(site, "--image", engine.inspect(PYTHON)["Id"], *options)  # what is named so is never pulled
    register(site, "tells", "print(os.environ['WORD'])", f"image={moving.name!r}")
    for there, expected in ((True, moved), (False, missing)):
        moving.here("old") if there else moving.away()
        run = site.submit("tells")
        shown = site.wait_for(run)
        assert (text(site, run).strip() or shown["reason"]).endswith(expected), shown


def test_credentials_that_a_helper_keeps(
    site: Site, engine: Engine, registry: Registry, moving: Moving
) -> None:
    """They are used for what is built upon, for what is pushed, and for what is pulled to be run."""
    moving.publish("new")
    moving.away()
    dockerfile = site.write(
        "image/Dockerfile", f"ARG HOST\nFROM {PYTHON} AS first\nFROM ${{HOST}}/moving:1\n"
    )
    file = script(site, "kept", "print(os.environ['WORD'])", registry_url=registry.name)
    file.write_text(
        file.read_text()
        .replace(f"base_image={PYTHON!r}, ", f"dockerfile={str(dockerfile)!r}, ")
        .replace('"network_mode"', f'"buildargs": {{"HOST": {registry.name!r}}}, "network_mode"')
    )
    box = site.root / "box"
    for_one, for_all = {"credHelpers": {registry.name: "box"}}, {"credsStore": "box"}
    site.environment |= helped(registry, box, for_one, "hal-9000")
    refused = site.command("register", file, code=1).stderr.splitlines()[-1]
    assert "could not be built: the registry refuses" in refused and "log in: docker login" in refused
    helped(registry, box, for_one, registry.PASSWORD)
    site.command("register", file)
    image = storage_of(site, "kept")["artifact"]
    for name in (image["image"], image["tag"]):
        engine.docker("rmi", "-f", name)
    start(site)
    said = []
    for password in ("hal-9000", registry.PASSWORD):  # they are read when they are needed
        helped(registry, box, for_all, password)
        run = site.submit("kept")
        said.append(f"{site.wait_for(run)['reason']} {text(site, run)}")
    assert "cannot be pulled: the registry refuses" in said[0] and said[1] == "None new\n"
    assert "\n" not in said[0] and "hal-9000" not in refused + said[0]

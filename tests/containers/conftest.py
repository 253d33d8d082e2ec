from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.containers import machinery
from tests.containers.machinery import Engine, Registry
from tests.e2e.harness import Site


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    machinery.check_programs()
    root = Path(tempfile.mkdtemp(prefix="fa-engine-"))  # short: sockets are below it
    engine = Engine(root)
    engine.start()
    try:
        engine.build_images()
        yield engine
    finally:
        engine.close()
        for left in ("data", "exec/netns/default"):  # mounted, by one that was started more than once
            subprocess.run(["umount", "--lazy", root / left], capture_output=True)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    machinery.check_programs()
    registry = Registry(tmp_path_factory.mktemp("registry") / "r")
    registry.start()
    yield registry
    registry.stop()


@pytest.fixture
def site(tmp_path: Path, engine: Engine) -> Iterator[Site]:
    """A site whose agents find the engine."""
    site = Site(tmp_path)
    site.environment |= {"DOCKER_HOST": engine.url, "DOCKER_CONFIG": str(tmp_path / "no-login")}
    yield site
    site.close()
    for name in engine.containers():
        engine.docker("rm", "-fv", name, code=None)


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[Site]:
    """A site with a docker agent at work, for all tests of a file that do not disturb one another."""
    site = Site(tmp_path_factory.mktemp("yard"))
    site.environment |= {"DOCKER_HOST": engine.url, "DOCKER_CONFIG": str(site.root / "no-login")}
    start(site, "--grace", "1s", "--lease", "12s", "--limit", "4")
    yield site
    site.close()


def start(site: Site, *options: str, networks: tuple[str, ...] = ("none",)) -> None:
    site.start(
        "--runner",
        "docker",
        *(word for name in networks for word in ("--network", name)),
        "--image",
        machinery.PYTHON,
        "--max",
        "memory=256M",
        *options,
    )

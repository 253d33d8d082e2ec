from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.containers import images
from tests.containers.machinery import Registry
from tests.e2e.harness import Site
from tests.kubernetes.cluster import Cluster, check_programs
from tests.kubernetes.flows import FLOWAGENT, NAMESPACE, prepare, start

HERE = Path(__file__).parent


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Only whoever names this directory runs these tests: what they take is built for ten minutes."""
    named = [config.invocation_params.dir / argument.partition("::")[0] for argument in config.args]
    return None if any(path.resolve().is_relative_to(HERE) for path in named) else True


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One cluster for all tests."""
    check_programs()
    root = Path(tempfile.mkdtemp(prefix="fa-cluster-"))  # short: sockets are below it
    cluster = Cluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def field(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The cluster, with an image that has flowagent and a namespace for flows."""
    archive = tmp_path_factory.mktemp("images") / "image.tar"
    images.with_flowagent(archive)
    cluster.node.docker("import", str(archive), FLOWAGENT)
    archive.unlink()
    cluster.namespace(NAMESPACE)
    return cluster


@pytest.fixture(scope="session")
def registry(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that this machine and the node have under the same name."""
    registry = Registry(tmp_path_factory.mktemp("registry") / "r", cluster.node.address)
    registry.start()
    yield registry
    registry.stop()


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory, field: Cluster) -> Iterator[Site]:
    """A site with an agent at work, for tests that do not disturb one another."""
    site = Site(tmp_path_factory.mktemp("yard"))
    prepare(site, field)
    start(site, "--grace", "1s", "--limit", "8", "--start-timeout", "6s")
    yield site
    site.close()
    field.clear(NAMESPACE)


@pytest.fixture
def site(tmp_path: Path, field: Cluster) -> Iterator[Site]:
    site = Site(tmp_path)
    prepare(site, field)
    yield site
    site.close()
    field.clear(NAMESPACE)

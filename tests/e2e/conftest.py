from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.harness import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site with an agent at work, for all tests of a file that do not disturb one another."""
    site = Site(tmp_path_factory.mktemp("workshop"))
    site.start("--grace", "1s", "--lease", "10s", "--limit", "4")
    yield site
    site.close()

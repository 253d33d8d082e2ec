"""What all tests share: a clean home and nothing of the developer's own settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# servers, each started by the first test that asks for it
pytest_plugins = ("tests.object_stores", "benches")

for variable in [name for name in os.environ if name.startswith("FLOWAGENT_") and "TEST" not in name]:
    del os.environ[variable]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty FLOWAGENT_HOME."""
    directory = tmp_path / "home"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("FLOWAGENT_HOME", str(directory))
    return directory

"""How backends are found: by entry points, those of other packages among them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flowagent import backend
from flowagent.backend import BackendContext, Backends
from flowagent.errors import BackendError
from flowagent_backends.local import LocalBackend


@pytest.fixture
def backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backends]:
    """Another package is installed, with a backend that works and two that do not."""
    installed = tmp_path / "other-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[flowagent.backends]\nOther = other:Other\nGone = other:Gone\nLacking = lacking:Backend\n"
    )
    (tmp_path / "other.py").write_text("class Other:\n    def __init__(self, context): self.at = context\n")
    (tmp_path / "lacking.py").write_text("import cloud_sdk\n")
    monkeypatch.syspath_prepend(tmp_path)
    backend._entry_points.cache_clear()
    yield Backends(BackendContext(tmp_path, "host1"))
    backend._entry_points.cache_clear()


def test_they_are_made_once(backends: Backends) -> None:
    assert isinstance(backends.get("Local"), LocalBackend)
    other = backends.get("Other")
    assert other is backends.get("Other")
    assert other.at.host == "host1"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Nowhere",
            r"no backend is installed for storage 'Nowhere' \(installed: Azure, .*Other, S3, Webhook\)",
        ),
        ("Lacking", r"backend of storage 'Lacking' cannot be imported: No module named 'cloud_sdk'; install"),
        ("Gone", r"backend of storage 'Gone' cannot be imported: .*no attribute 'Gone'; install"),
    ],
)
def test_what_cannot_be_had(backends: Backends, name: str, message: str) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        backends.get(name)
    assert "\n" not in str(caught.value)

"""Services that answer what no documentation says: all of it comes out as one line that names them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.forges import server

from flowagent import http
from flowagent.backend import Artifact, BackendContext
from flowagent.errors import BackendError
from flowagent.results import GCSResult
from flowagent.storage import GCS
from flowagent_backends import objects
from flowagent_backends.gcs import GCSBackend

ODD = [
    b"",
    b"<html>sign in</html>",
    b"[" * 200_000,
    b"[]",
    b"{}",
    b"7",
    b'{"generation": 1, "size": 1e999}',
    b'{"generation": 1, "size": {}}',
    b'{"generation": 1, "size": "x", "metadata": 7}',
    b'{"error": []}',
    b'{"error": {"errors": [{"reason": []}], "message": {}}}',
    b'{"error": {"errors": 7}}',
    b"\xff\x00",
]


class Same(server.StandIn):
    """Gives the same answer to all."""

    given = server.Answer(200)

    def answer(self, asked: server.Asked) -> server.Answer:
        return self.given


@pytest.fixture
def service() -> Iterator[Same]:
    stand_in = Same()
    with server.serving(stand_in):
        yield stand_in


@pytest.fixture
async def backend(
    service: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[GCSBackend]:
    monkeypatch.setattr(http, "BACKOFF", 0.001)
    (tmp_path / "home").mkdir()
    environ = {"STORAGE_EMULATOR_HOST": service.url}
    made = GCSBackend(BackendContext(tmp_path / "home", "host1", environ=environ))
    yield made
    await made.close()


@pytest.mark.parametrize("status", [200, 308, 400, 403, 412])
@pytest.mark.parametrize("body", ODD, ids=lambda body: repr(body[:24]))
async def test_a_bucket(
    service: Same,
    backend: GCSBackend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    body: bytes,
) -> None:
    monkeypatch.setattr(objects, "PART", 1 << 18)
    headers = {"Location": f"{service.url}/session", "Range": "bytes=0-²"}
    service.given = server.Answer(status, body, headers if status in (200, 308) else {})
    (tmp_path / "small").write_bytes(b"x")
    (tmp_path / "large").write_bytes(bytes(3 << 18))
    result = GCSResult("bucket").to_json()
    attempts = [
        lambda: backend.resolve(GCS("bucket", "f.py", stored_as_script=True).to_json()),
        lambda: backend.upload(GCS("bucket").to_json(), Artifact("f", "pickle", data=b"x", sha256="0")),
        lambda: backend.put(result, "key", tmp_path / "small"),
        lambda: backend.put(result, "key", tmp_path / "large"),
    ]
    for attempt in attempts:
        try:
            await attempt()
        except BackendError as error:
            assert str(error).startswith("GCS")
            assert str(error).isprintable()
            assert len(str(error)) < 500
        else:  # there is enough in it, for an upload
            assert status == 200 and b"generation" in body

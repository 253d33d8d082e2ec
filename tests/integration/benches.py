"""One bench for each object store: a backend, a place of its own, and a gate in front of a real server."""

from __future__ import annotations

import base64
import hashlib
import hmac
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from tests.gate import Gate, gate
from tests.object_stores import ACCESS_KEY, SECRET_KEY, aws_environment

from flowagent.backend import BackendContext
from flowagent.results import AzureResult, GCSResult, Result, S3Result
from flowagent.storage import GCS, S3, Azure, Storage
from flowagent_backends.azure import AzureBackend
from flowagent_backends.gcs import GCSBackend
from flowagent_backends.objects import ObjectBackend
from flowagent_backends.s3 import S3Backend

AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class Bench:
    """``place`` is a bucket or container of this bench; ``environment`` is what an agent needs to use it."""

    kind: str

    def __init__(self, url: str, home: Path, opened: Gate) -> None:
        self.url = url
        self.home = home
        self.gate = opened
        self.place = f"flows-{uuid.uuid4().hex[:12]}"
        self.environment = self._environment(opened.url)
        self.context = BackendContext(home, "host1", environ=self.environment)
        self.backend = self._backend(self.context)
        self.make_place(self.place)

    key_field = "key"

    def storage(self, key: str | None = None, place: str | None = None, **options: Any) -> Storage:
        raise NotImplementedError

    def result(self, **options: Any) -> Result:
        raise NotImplementedError

    def _environment(self, url: str) -> dict[str, str]:
        raise NotImplementedError

    def _backend(self, context: BackendContext) -> ObjectBackend:
        raise NotImplementedError

    def make_place(self, name: str) -> None:
        raise NotImplementedError

    def write(self, key: str, data: bytes) -> None:
        """What another tool, or an attacker, puts there."""
        raise NotImplementedError

    def read(self, key: str) -> bytes:
        raise NotImplementedError


class S3Bench(Bench):
    kind = "S3"

    def _client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )

    def _environment(self, url: str) -> dict[str, str]:
        return {**aws_environment(self.home), "AWS_ENDPOINT_URL_S3": url}

    def _backend(self, context: BackendContext) -> S3Backend:
        return S3Backend(context)

    def storage(self, key: str | None = None, place: str | None = None, **options: Any) -> S3:
        return S3(place or self.place, key, **options)

    def result(self, **options: Any) -> S3Result:
        return S3Result(self.place, **options)

    def make_place(self, name: str) -> None:
        self._client().create_bucket(Bucket=name)

    def write(self, key: str, data: bytes) -> None:
        self._client().put_object(Bucket=self.place, Key=key, Body=data)

    def read(self, key: str) -> bytes:
        data: bytes = self._client().get_object(Bucket=self.place, Key=key)["Body"].read()
        return data


def fetch(method: str, url: str, data: bytes | None = None, **headers: str) -> bytes:
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as response:
        content: bytes = response.read()
    return content


class GCSBench(Bench):
    kind = "GCS"

    def _environment(self, url: str) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": url}

    def _backend(self, context: BackendContext) -> GCSBackend:
        return GCSBackend(context)

    def storage(self, key: str | None = None, place: str | None = None, **options: Any) -> GCS:
        return GCS(place or self.place, key, **options)

    def result(self, **options: Any) -> GCSResult:
        return GCSResult(self.place, **options)

    def make_place(self, name: str) -> None:
        body = f'{{"name": "{name}"}}'.encode()
        fetch("POST", f"{self.url}/storage/v1/b", body, **{"Content-Type": "application/json"})

    def write(self, key: str, data: bytes) -> None:
        name = urllib.parse.quote(key, safe="")
        fetch("POST", f"{self.url}/upload/storage/v1/b/{self.place}/o?uploadType=media&name={name}", data)

    def read(self, key: str) -> bytes:
        name = urllib.parse.quote(key, safe="")
        return fetch("GET", f"{self.url}/storage/v1/b/{self.place}/o/{name}?alt=media")


class AzureBench(Bench):
    kind = "Azure"
    key_field = "blob_name"

    def connection_string(self, url: str, key: str = AZURE_KEY) -> str:
        return f"AccountName=devstoreaccount1;AccountKey={key};BlobEndpoint={url}/devstoreaccount1;"

    def _environment(self, url: str) -> dict[str, str]:
        return {"AZURE_STORAGE_CONNECTION_STRING": self.connection_string(url)}

    def _backend(self, context: BackendContext) -> AzureBackend:
        return AzureBackend(context)

    def storage(self, key: str | None = None, place: str | None = None, **options: Any) -> Azure:
        if key is not None:
            options.setdefault("overwrite", True)
        return Azure(place or self.place, blob_name=key, **options)

    def result(self, **options: Any) -> AzureResult:
        return AzureResult(self.place, **options)

    def _ask(self, method: str, path: str, query: str = "", data: bytes | None = None, **more: str) -> bytes:
        """A request signed by a second hand, so that the backend's own is checked against it."""
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02", **more}
        size = str(len(data)) if data else ""
        lines = [method, "", "", size, "", "application/octet-stream" if data is not None else "", *[""] * 6]
        lines += [f"{name}:{value}" for name, value in sorted(headers.items())]
        lines.append(f"/devstoreaccount1/devstoreaccount1{path}")
        lines += [pair.replace("=", ":", 1) for pair in sorted(query.split("&")) if pair]
        digest = hmac.new(base64.b64decode(AZURE_KEY), "\n".join(lines).encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey devstoreaccount1:{base64.b64encode(digest).decode()}"
        if data is not None:
            headers["Content-Type"] = "application/octet-stream"
        url = f"{self.url}/devstoreaccount1{path}{'?' if query else ''}{query}"
        return fetch(method, url, data, **headers)

    def make_place(self, name: str) -> None:
        self._ask("PUT", f"/{name}", "restype=container")

    def write(self, key: str, data: bytes) -> None:
        path = f"/{self.place}/{urllib.parse.quote(key)}"
        self._ask("PUT", path, data=data, **{"x-ms-blob-type": "BlockBlob"})

    def read(self, key: str) -> bytes:
        return self._ask("GET", f"/{self.place}/{urllib.parse.quote(key)}")


BENCHES: dict[str, tuple[type[Bench], str]] = {
    "S3": (S3Bench, "seaweedfs"),
    "GCS": (GCSBench, "fake_gcs"),
    "Azure": (AzureBench, "azurite"),
}


@pytest.fixture(params=sorted(BENCHES))
def bench(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Each object store, one after the other."""
    kind, server = BENCHES[request.param]
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    url = request.getfixturevalue(server)
    with gate(url) as opened:
        made = kind(url, home, opened)
        for name, value in made.environment.items():  # AWS' client reads the process's own environment
            monkeypatch.setenv(name, value)
        yield made

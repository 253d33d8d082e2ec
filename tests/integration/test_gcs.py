"""What the emulators of Google Cloud Storage lack: preconditions, credentials, payers, limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from gcs_double import Double, double
from tests import gate as gates

from flowagent.backend import Artifact, BackendContext
from flowagent.errors import BackendError, StorageNotFoundError, StorageTransientError
from flowagent.results import GCSResult
from flowagent.secrets import SecretProvider
from flowagent.sources import SourceCache
from flowagent.storage import GCS
from flowagent_backends import objects
from flowagent_backends.gcs import SCOPE, GCSBackend


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    with double() as opened:
        monkeypatch.setattr("flowagent_backends.gcs.HOST", opened.url)
        monkeypatch.setattr("flowagent.http.BACKOFF", 0.01)
        yield opened


@pytest.fixture(scope="session")
def service_account() -> dict[str, str]:
    """The JSON of a service account, without where its tokens come from."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return {"type": "service_account", "client_email": "agent@example.com", "private_key": key.decode()}


@pytest.fixture
def account(
    store: Double, service_account: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """The Application Default Credentials of this process are a service account's."""
    made = {**service_account, "token_uri": f"{store.url}/token"}
    file = home / "account.json"
    file.write_text(json.dumps(made))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    return made


@pytest.fixture
async def backend(account: dict[str, str], home: Path) -> AsyncIterator[GCSBackend]:
    backend = GCSBackend(BackendContext(home, "host1", environ={}))
    yield backend
    await backend.close()


def script(**options: Any) -> dict[str, Any]:
    return GCS("bucket", "f.py", stored_as_script=True, **options).to_json()


async def put(backend: GCSBackend, home: Path, key: str, data: bytes) -> dict[str, Any]:
    file = home / "value"
    file.write_bytes(data)
    return await backend.put(GCSResult("bucket").to_json(), key, file)


# -- revisions -----------------------------------------------------------------------------------------


async def test_a_generation_is_exact(store: Double, backend: GCSBackend, tmp_path: Path) -> None:
    generation = store.write("f.py", b"x = 1\n")
    first = await backend.resolve(script())
    assert first.id == f"generation:{generation}"
    store.keeps_generations = True
    store.write("f.py", b"x = 2\n")
    cache = SourceCache(tmp_path / "cache")
    assert (await cache.acquire(backend, script(), first) / "f.py").read_bytes() == b"x = 1\n"
    second = await backend.resolve(script())
    store.keeps_generations = False
    store.write("f.py", b"x = 3\n")
    with pytest.raises(StorageTransientError, match="was replaced while it was read; run the flow again"):
        await cache.acquire(backend, script(), second)
    store.objects.clear()
    with pytest.raises(StorageNotFoundError, match="there is no such object"):
        await cache.acquire(backend, script(), second)
    with pytest.raises(StorageNotFoundError, match="there is no bucket other; create it"):
        await backend.resolve({**script(), "bucket": "other"})


@pytest.mark.parametrize("size", [5, (2 << 18) + 5])
async def test_a_result_takes_the_place_of_a_result_only(
    store: Double, backend: GCSBackend, home: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(objects, "PART", 1 << 18)
    data = os.urandom(size)
    await put(backend, home, "latest", b"before")
    reference = await put(backend, home, "latest", data)
    await backend.get(reference, home / "got")
    assert (home / "got").read_bytes() == data
    store.write("theirs.py", b"theirs")
    with pytest.raises(BackendError, match="is no result of a flow's, and is not replaced by one"):
        await put(backend, home, "theirs.py", data)
    assert [kept[0] for kept in store.objects["theirs.py"].values()] == [b"theirs"]


async def test_another_run_at_the_same_time(store: Double, backend: GCSBackend, home: Path) -> None:
    await put(backend, home, "latest", b"1")
    head = backend._head

    async def overtaken(*arguments: Any) -> Any:
        found = await head(*arguments)
        store.write("latest", b"2", {"flowagent": "result"})
        return found

    backend._head = overtaken  # type: ignore[method-assign]
    with pytest.raises(StorageTransientError, match="was replaced by another run at the same time"):
        await put(backend, home, "latest", b"3")


async def test_a_resumable_upload_goes_on_where_the_store_is(
    store: Double, backend: GCSBackend, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART", 2 << 18)
    store.forgetful = 2
    data = os.urandom((7 << 18) + 3)
    await put(backend, home, "large", data)
    assert [kept[0] for kept in store.objects["large"].values()] == [data]


# -- credentials ---------------------------------------------------------------------------------------


async def test_tokens_are_kept_and_renewed(store: Double, backend: GCSBackend) -> None:
    store.write("f.py", b"x = 1\n")
    for _ in range(3):
        await backend.resolve(script())
    assert store.minted == 1
    store.tokens.clear()  # it was revoked
    await backend.resolve(script())
    assert store.minted == 2
    store.refuses_all = True
    with pytest.raises(BackendError, match=r"gs://bucket/f.py: the Google credentials were refused; renew"):
        await backend.resolve(script())
    assert store.minted == 3


async def test_a_secret_goes_before_the_default(
    store: Double, account: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("f.py", b"x = 1\n")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent")
    backend = GCSBackend(BackendContext(home, "host1", environ={}))
    with pytest.raises(BackendError, match="no Google credentials are found here; run: gcloud auth"):
        await backend.resolve(script())
    # an agent need not be started again for another secret
    SecretProvider(home).set("GCP_CREDENTIALS", json.dumps(account))
    await backend.resolve(script())
    SecretProvider(home).set("GCP_CREDENTIALS", account["private_key"])
    await backend.resolve(script())
    store.tokens.clear()
    with pytest.raises(BackendError, match="the Google credentials were refused") as caught:
        await backend.resolve(script())
    assert "PRIVATE" not in str(caught.value)
    await backend.close()


async def test_a_service_of_tokens_that_is_away(
    store: Double, account: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("google.auth._exponential_backoff._DEFAULT_INITIAL_INTERVAL_SECONDS", 0.01)
    SecretProvider(home).set(
        "GCP_CREDENTIALS", json.dumps({**account, "token_uri": "http://127.0.0.1:9/token"})
    )
    backend = GCSBackend(BackendContext(home, "host1", environ={}))
    with pytest.raises(StorageTransientError, match=r"GCS: a token cannot be fetched: .*try again later"):
        await backend.resolve(script())
    await backend.close()


# what follows is found by a process's environment, which google-auth reads when it is imported

RESOLVES = """
import json, sys, anyio
from pathlib import Path
from flowagent.backend import BackendContext
from flowagent_backends import gcs

gcs.HOST = sys.argv[1]


async def main():
    backend = gcs.GCSBackend(BackendContext(Path(sys.argv[2]), "host1", environ={}))
    for _ in range(2):
        print((await backend.resolve(json.loads(sys.argv[3]))).id)
    await backend.close()


anyio.run(main)
"""


def resolved(store: Double, home: Path, **environ: str) -> None:
    """A process with nothing else of Google's in its environment finds what the store takes."""
    generation = store.write("f.py", b"x = 1\n")
    given = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GOOGLE_", "GCE_", "CLOUDSDK_", "NO_GCE"))
    }
    done = subprocess.run(
        [sys.executable, "-c", RESOLVES, store.url, str(home), json.dumps(script())],
        env={**given, "HOME": str(home), "GOOGLE_CLOUD_PROJECT": "etl", **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == [f"generation:{generation}"] * 2, done.stderr


def test_a_workload_identity_of_another_cloud(store: Double, home: Path) -> None:
    """A file's token is exchanged at a security token service: Workload Identity Federation."""
    (home / "token").write_text("header.payload.signature")
    account = {
        "type": "external_account",
        "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/q",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": f"{store.url}/token",
        "credential_source": {"file": str(home / "token")},
    }
    (home / "account.json").write_text(json.dumps(account))
    resolved(store, home, GOOGLE_APPLICATION_CREDENTIALS=str(home / "account.json"), NO_GCE_CHECK="true")
    assert store.requests[0] == "POST /token"
    assert store.minted == 1


def test_the_service_account_of_a_machine(store: Double, home: Path) -> None:
    """Compute Engine and GKE give it by their metadata server."""
    token = {"access_token": "of-the-machine", "expires_in": 3600, "token_type": "Bearer"}
    account = {"email": "agent@example.com", "scopes": [SCOPE], "aliases": ["default"]}
    flavour = {"Metadata_Flavor": "Google", "Content_Type": "application/json"}
    store.tokens = {"of-the-machine"}
    with gates.gate("http://127.0.0.1:9") as server:
        server.when("GET", "/default/token", gates.status(200, json.dumps(token), **flavour))
        server.when("GET", "/default/", gates.status(200, json.dumps(account), **flavour))
        server.when("GET", "^/$", gates.status(200, "computeMetadata/", **flavour))
        server.when("GET", "", gates.status(404, **flavour))
        address = server.url.removeprefix("http://")
        resolved(store, home, GCE_METADATA_HOST=address, GCE_METADATA_IP=address)
        assert server.count("GET", "/computeMetadata/v1/instance/service-accounts/default/token") == 1
        asked = [{name.lower(): value for name, value in headers.items()} for headers in server.headers]
        assert all(headers["metadata-flavor"] == "Google" for headers in asked)
    assert store.minted == 0


# -- refusals ------------------------------------------------------------------------------------------


async def test_who_pays(store: Double, backend: GCSBackend) -> None:
    store.write("f.py", b"x = 1\n")
    store.payer = "etl-project"
    with pytest.raises(BackendError, match="requester pays"):
        await backend.resolve(script())
    assert await backend.resolve(script(project="etl-project"))


async def test_refusals_in_words(store: Double, backend: GCSBackend) -> None:
    store.write("f.py", b"x = 1\n")
    store.refusals = [(403, "forbidden", "agent@example.com does not have storage.objects.get access")]
    with pytest.raises(BackendError, match=r"access was denied; let the identity .*objectUser") as caught:
        await backend.resolve(script())
    assert not caught.value.retryable
    store.refusals = [(403, "rateLimitExceeded", "The rate is exceeded")]
    with pytest.raises(StorageTransientError, match="busy or unwell"):
        await backend.resolve(script())
    store.refusals = [(429, "rateLimitExceeded", "slow down")] * 2
    assert await backend.resolve(script())
    store.refusals = [(400, "invalid", "Invalid bucket name\nwith two lines")]
    with pytest.raises(
        BackendError, match="was refused: 400 Invalid bucket name with two lines; correct that"
    ):
        await backend.resolve(script())
    artifact = Artifact("f", "pickle", data=b"x", sha256="0")
    store.refusals = [(403, "forbidden", "no")]
    with pytest.raises(BackendError, match="access was denied"):
        await backend.upload(GCS("bucket").to_json(), artifact)

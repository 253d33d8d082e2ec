"""What Azure alone has: connection strings, shared access signatures, identities, overwrite; with Azurite."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cloudpickle
import pytest
from benches import AZURE_KEY, AzureBench
from tests import gate as gates
from tests.gate import gate

from flowagent import Flow, FlowError, settings
from flowagent.backend import Artifact, BackendContext
from flowagent.errors import BackendError, StorageNotFoundError
from flowagent.flows import pickles
from flowagent.registration import Candidate, registrar
from flowagent.results import AzureResult
from flowagent.secrets import SecretProvider
from flowagent.storage import Azure, Storage
from flowagent_backends.azure import Account, AzureBackend

pytestmark = pytest.mark.parametrize("bench", ["Azure"], indirect=True)

PICKLE = Artifact("f", "pickle", data=b"x", sha256=hashlib.sha256(b"x").hexdigest())


def signature(permissions: str, end: str = "2099-01-01T00:00:00Z") -> str:
    """A shared access signature of the account, for blobs.

    https://learn.microsoft.com/rest/api/storageservices/create-account-sas"""
    fields = ["devstoreaccount1", permissions, "b", "co", "", end, "", "https,http", "2021-12-02", "", ""]
    digest = hmac.new(base64.b64decode(AZURE_KEY), "\n".join(fields).encode(), hashlib.sha256).digest()
    values = {"sv": "2021-12-02", "ss": "b", "srt": "co", "sp": permissions, "se": end, "spr": "https,http"}
    signed = {**values, "sig": base64.b64encode(digest).decode()}
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in signed.items())


@pytest.fixture
async def backends(bench: AzureBench) -> AsyncIterator[Any]:
    """Makes backends whose agents have these variables."""
    made: list[AzureBackend] = []

    def make(**environ: str) -> AzureBackend:
        made.append(AzureBackend(BackendContext(bench.home, "host1", environ=environ)))
        return made[-1]

    yield make
    for backend in made:
        await backend.close()


def by_signature(bench: AzureBench, permissions: str, **more: str) -> str:
    signed = signature(permissions, **more)
    return f"BlobEndpoint={bench.gate.url}/devstoreaccount1;SharedAccessSignature={signed}"


async def refusal(backend: AzureBackend, storage: dict[str, Any]) -> str:
    with pytest.raises(BackendError) as caught:
        await backend.resolve(storage)
    said = str(caught.value)
    assert "\n" not in said
    for secret in (AZURE_KEY, AZURE_KEY[:20], "sig=", "se=2", "127.0.0.1"):
        assert secret not in said
    return said


async def test_shared_access_signatures(bench: AzureBench, backends: Any) -> None:
    bench.write("f.py", b"x = 1\n")
    storage = Azure(bench.place, blob_name="f.py", stored_as_script=True).to_json()
    variable = "AZURE_STORAGE_CONNECTION_STRING"
    backend = backends(**{variable: by_signature(bench, "rwc")})
    assert await backend.resolve(storage)
    assert await backend.upload(Azure(bench.place).to_json(), PICKLE)
    reader = backends(**{variable: by_signature(bench, "r")})
    assert await reader.resolve(storage)
    with pytest.raises(
        BackendError, match=r"access was denied \(AuthorizationPermissionMismatch\); let the key"
    ):
        await reader.upload(Azure(bench.place).to_json(), PICKLE)
    expired = backends(**{variable: by_signature(bench, "r", end="2020-01-01T00:00:00Z")})
    assert "AuthorizationFailure" in await refusal(expired, storage)
    wrong = backends(**{variable: bench.connection_string(bench.gate.url, key="d3Jvbmc=")})
    assert re.search(r"\((AuthorizationFailure|AuthenticationFailed)\)", await refusal(wrong, storage))
    # so Azure answers, where the emulator says AuthorizationFailure
    bench.gate.when("HEAD", "", gates.status(403, x_ms_error_code="AuthenticationFailed"))
    assert "the credentials were refused (AuthenticationFailed); renew the key" in await refusal(
        backend, storage
    )


async def test_where_the_connection_string_comes_from(bench: AzureBench, backends: Any) -> None:
    bench.write("f.py", b"x = 1\n")
    storage = Azure(bench.place, blob_name="f.py", stored_as_script=True).to_json()
    named = {**storage, "connection_string_secret": "BLOBS"}
    text = bench.connection_string(bench.gate.url)
    backend = backends()
    said = await refusal(backend, storage)
    assert said.startswith(
        "Azure: there is no connection string here; set AZURE_STORAGE_CONNECTION_STRING in"
    )
    assert "the secret BLOBS, which holds the connection string, is not set here" in await refusal(
        backend, named
    )
    # what is named is meant: nothing else takes its place
    said = await refusal(backends(AZURE_STORAGE_CONNECTION_STRING=text), named)
    assert "run: flowagent secret set BLOBS" in said
    secrets = SecretProvider(bench.home)
    secrets.set("BLOBS", text)
    assert await backend.resolve(named)
    secrets.set("AZURE_STORAGE_CONNECTION_STRING", text)
    assert await backend.resolve(storage)
    assert (await backend.resolve(storage)).key != (await backend.resolve(named)).key
    secrets.set("BLOBS", f"the password of something else: {AZURE_KEY}")
    assert "the connection string is none; copy it from" in await refusal(backend, named)


async def test_a_connection_string_in_the_code_is_never_stored(
    bench: AzureBench, backends: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works for the upload, as documented; the agent has to have its own."""
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    storage = Azure(container=bench.place, connection_string=bench.connection_string(bench.gate.url))
    flow = Flow("azure-flow", storage=storage)
    assert AZURE_KEY not in json.dumps(storage.to_json()) + repr(storage)
    assert AZURE_KEY.encode() not in pickles.dump(flow).data
    home = settings.load(None, {"FLOWAGENT_HOME": str(tmp_path / "home")})
    async with registrar(home) as opened:
        registered = await opened.register(Candidate(flow))
    spec = registered.version.spec
    assert spec.result == AzureResult(bench.place).to_json()
    assert cloudpickle.loads(bench.read(spec.storage["blob_name"])).name == "azure-flow"
    for path in (tmp_path / "home").rglob("*"):
        assert not path.is_file() or AZURE_KEY.encode() not in path.read_bytes()
    assert Storage.from_json(spec.storage).to_json() == spec.storage
    revision = await backends().resolve(spec.storage)
    with pytest.raises(BackendError, match="Azure: there is no connection string here"):
        await backends().materialise(spec.storage, revision, tmp_path)
    with pytest.raises(FlowError, match="the agent writes results: put it into the agent's environment"):
        AzureResult("c", connection_string=AZURE_KEY)


async def test_an_existing_blob_is_replaced_on_demand(bench: AzureBench, backends: Any) -> None:
    backend = backends(**bench.environment)
    declared = Azure(bench.place, blob_name="flow").to_json()
    await backend.upload(declared, PICKLE)
    with pytest.raises(
        BackendError, match=r"Azure: .*/flow exists; add overwrite=True, or choose another name"
    ):
        await backend.upload(declared, PICKLE)
    await backend.upload({**declared, "overwrite": True}, PICKLE)


async def test_an_identity_where_there_is_no_key(
    bench: AzureBench, backends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azure's default chain finds the managed identity of an app service, and the store gets its token."""
    answer = {
        "access_token": "the-token",
        "expires_on": "4102444800",
        "token_type": "Bearer",
        "resource": "r",
    }
    with gate(bench.url) as service:
        service.when(
            "GET", "/msi/token", gates.status(200, json.dumps(answer), Content_Type="application/json")
        )
        monkeypatch.setenv("IDENTITY_ENDPOINT", f"{service.url}/msi/token")
        monkeypatch.setenv("IDENTITY_HEADER", "secret-header")
        storage = Azure(bench.place, blob_name="f.py", stored_as_script=True).to_json()
        bench.gate.when("HEAD", "/f.py", gates.status(200, ETag='"1"'))
        string = f"BlobEndpoint={bench.gate.url}/devstoreaccount1"
        backend = backends(AZURE_STORAGE_CONNECTION_STRING=string)
        for _ in range(2):
            assert (await backend.resolve(storage)).id == 'etag:"1"'
        last = {name.lower(): value for name, value in bench.gate.headers[-1].items()}
        assert last.get("authorization") == "Bearer the-token"
        assert service.count("GET", "/msi/token") == 1
        bench.gate.rules.clear()
        bench.gate.when("HEAD", "/f.py", gates.status(401, x_ms_error_code="InvalidAuthenticationInfo"), 1)
        bench.gate.when("HEAD", "/f.py", gates.status(200, ETag='"2"'))
        assert (await backend.resolve(storage)).id == 'etag:"2"'  # it was revoked, and there is a new one
        assert service.count("GET", "/msi/token") == 2
        bench.gate.when("GET", "/f.py", gates.status(401))
        bench.gate.when("PUT", "", gates.status(401))
        for attempt in (backend.get, backend.put):
            file = bench.home / "value"
            file.write_bytes(b"1")
            reference = {**storage, "key": "f.py", "revision": 'etag:"2"', "size": 1, "sha256": ""}
            arguments = (reference, file) if attempt == backend.get else (bench.result().to_json(), "k", file)
            with pytest.raises(
                BackendError, match=r"the credentials were refused .* or the identity of this"
            ):
                await attempt(*arguments)
        assert service.count("GET", "/msi/token") == 4
        assert "resource=https://storage.azure.com" in service.requests[0][1]
    monkeypatch.delenv("IDENTITY_ENDPOINT")
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")
    other = backends(AZURE_STORAGE_CONNECTION_STRING=string)
    assert "the connection string has no key, and no identity of Azure is found here" in await refusal(
        other, storage
    )


def test_connection_strings(bench: AzureBench) -> None:
    parse = Account.parse
    account = parse(
        "DefaultEndpointsProtocol=https;AccountName=acme;AccountKey=a2V5;EndpointSuffix=core.windows.net"
    )
    assert (account.url, account.name, account.key) == ("https://acme.blob.core.windows.net", "acme", b"key")
    assert parse("AccountName=acme").url == "https://acme.blob.core.windows.net"
    assert parse("UseDevelopmentStorage=true").url == "http://127.0.0.1:10000/devstoreaccount1"
    signed = parse(
        "BlobEndpoint=https://acme.blob.core.windows.net/;SharedAccessSignature=?sv=1&sig=a%2Bb%3D"
    )
    assert signed.signature == (("sv", "1"), ("sig", "a+b="))
    assert (signed.url, signed.name) == ("https://acme.blob.core.windows.net", "acme")
    for wrong in (
        "",
        "x",
        "AccountKey=a2V5",
        "AccountName=acme;AccountKey=!",
        "BlobEndpoint=file:///etc/passwd",
    ):
        with pytest.raises(BackendError, match="the connection string is none; copy it from") as caught:
            parse(wrong)
        assert not wrong or wrong not in str(caught.value)


async def test_a_missing_container_at_registration(bench: AzureBench, backends: Any) -> None:
    with pytest.raises(StorageNotFoundError, match="there is no container nowhere; create it"):
        await backends(**bench.environment).upload(Azure("nowhere").to_json(), PICKLE)

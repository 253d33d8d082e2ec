"""What S3 alone has: AWS' credentials and IAM, versions, options; with SeaweedFS and moto."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import boto3
import pytest
from benches import S3Bench
from tests import gate as gates

from flowagent.backend import Artifact, BackendContext
from flowagent.errors import BackendError, StorageNotFoundError, StorageTransientError
from flowagent.secrets import SecretProvider
from flowagent.sources import SourceCache
from flowagent.storage import S3
from flowagent_backends import objects
from flowagent_backends.s3 import S3Backend

DATA = b"x = 1\n"
SHA256 = hashlib.sha256(DATA).hexdigest()
POLICY = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::guarded/open/*"}],
}

pytestmark = pytest.mark.parametrize("bench", ["S3"], indirect=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts."""
    monkeypatch.setattr("flowagent_backends.s3.BACKOFF", 0.01)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)


@pytest.fixture
async def backend(bench: S3Bench) -> AsyncIterator[S3Backend]:
    backend = S3Backend(BackendContext(bench.home, "host1"))
    yield backend
    await backend.close()


def script(key: str, **options: Any) -> dict[str, Any]:
    return S3(options.pop("bucket", None) or "b", key, stored_as_script=True, **options).to_json()


async def refusal(backend: S3Backend, storage: dict[str, Any]) -> str:
    with pytest.raises(BackendError) as caught:
        await backend.resolve(storage)
    assert not isinstance(caught.value, StorageTransientError)
    said = str(caught.value)
    assert "\n" not in said
    for secret in (os.environ.get("AWS_SECRET_ACCESS_KEY") or "-", "Signature=", "Credential="):
        assert secret not in said or secret == "-"
    return said


# -- credentials ---------------------------------------------------------------------------------------


@pytest.fixture
def guarded(bench: S3Bench, moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A bucket of a moto that checks identities, and the keys of a user who may read below open/ only."""
    root = {"aws_access_key_id": "root", "aws_secret_access_key": "root", "region_name": "us-east-1"}
    urllib.request.urlopen(urllib.request.Request(f"{moto}/moto-api/reset", method="POST")).close()
    s3, iam = (boto3.client(name, endpoint_url=moto, **root) for name in ("s3", "iam"))
    s3.create_bucket(Bucket="guarded")
    for key in ("open/f.py", "closed/f.py"):
        s3.put_object(Bucket="guarded", Key=key, Body=DATA)
    iam.create_user(UserName="reader")
    iam.put_user_policy(UserName="reader", PolicyName="p", PolicyDocument=json.dumps(POLICY))
    made = iam.create_access_key(UserName="reader")["AccessKey"]
    _check_identities(moto, after=0)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", made["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made["SecretAccessKey"])
    yield made
    _check_identities(moto, after=10_000_000)


def _check_identities(moto: str, after: int) -> None:
    """Have moto check who asks, from this many requests on."""
    request = urllib.request.Request(
        f"{moto}/moto-api/reset-auth",
        str(after).encode(),
        {"Content-Type": "application/octet-stream"},
        method="POST",
    )
    urllib.request.urlopen(request).close()


async def test_what_iam_refuses(
    guarded: dict[str, str], backend: S3Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = script("open/f.py", bucket="guarded")
    revision = await backend.resolve(storage)
    assert await SourceCache(tmp_path / "cache").acquire(backend, storage, revision)
    denied = await refusal(backend, script("closed/f.py", bucket="guarded"))
    assert denied.startswith(
        "S3: s3://guarded/closed/f.py: access was denied (AccessDenied); let the identity"
    )
    with pytest.raises(BackendError, match="access was denied"):
        await backend.upload(S3("guarded").to_json(), Artifact("f", "pickle", data=b"x", sha256="0"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    other = S3Backend(BackendContext(tmp_path, "host1"))
    assert "the AWS credentials were refused (SignatureDoesNotMatch); renew them" in await refusal(
        other, storage
    )
    await other.close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
    other = S3Backend(BackendContext(tmp_path, "host1"))
    assert "the AWS credentials were refused (InvalidAccessKeyId); renew them" in await refusal(
        other, storage
    )
    await other.close()


async def test_credentials_that_expired_are_looked_for_once_more(
    bench: S3Bench, backend: S3Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of the operator's renews a file; the agent goes on without a restart."""
    expired = "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
    bench.write("f.py", DATA)
    storage = script("f.py", bucket=bench.place)
    await backend.resolve(storage)
    (first,) = backend._clients._clients.values()
    bench.gate.when("HEAD", "f.py", gates.status(400))
    bench.gate.when("GET", "f.py", gates.status(400, expired))
    said = await refusal(backend, storage)
    assert "the AWS credentials were refused (ExpiredToken); renew them on this machine" in said
    assert bench.gate.count("GET", "f.py") == 2
    bench.gate.clear()
    bench.gate.when("HEAD", "f.py", gates.status(400), times=1)
    bench.gate.when("GET", "f.py", gates.status(400, expired), times=1)
    assert await backend.resolve(storage)
    (again,) = backend._clients._clients.values()
    assert again is not first
    assert first.retired


async def test_the_chain_of_awss_tools(
    bench: S3Bench, backend: S3Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.write("f.py", DATA)
    key, secret = (os.environ.pop(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    storage = script("f.py", bucket=bench.place)
    said = await refusal(backend, storage)
    assert "no AWS credentials are found here; give them by a profile" in said
    named = script("f.py", bucket=bench.place, client_options={"profile_name": "etl"})
    assert "etl" in await refusal(backend, named)
    Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).write_text(
        f"[etl]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    )
    assert await backend.resolve(named)
    value = json.dumps({"ACCESS_KEY": key, "SECRET_ACCESS_KEY": secret})
    SecretProvider(bench.home).set("AWS_CREDENTIALS", value)
    other = S3Backend(BackendContext(bench.home, "host1"))
    assert await other.resolve(storage)
    await other.close()
    SecretProvider(bench.home).set("AWS_CREDENTIALS", secret)
    other = S3Backend(BackendContext(bench.home, "host1"))
    said = await refusal(other, storage)
    assert "the secret AWS_CREDENTIALS is not like" in said
    assert secret not in said


# what follows of the chain is found by a process's environment and home, so each is a process of its own

RESOLVES = """
import json, sys, anyio
from pathlib import Path
from flowagent.backend import BackendContext
from flowagent_backends.s3 import S3Backend


async def main():
    backend = S3Backend(BackendContext(Path(sys.argv[1]), "host1"))
    for storage in json.loads(sys.argv[2]):
        try:
            print((await backend.resolve(storage)).id)
        except Exception as error:
            print(error)
    await backend.close()


anyio.run(main)
"""


@dataclass
class Role:
    """A role of moto's that may read below open/ only, and credentials of a session of it."""

    arn: str
    session: dict[str, Any]
    home: Path
    moto: str

    def sees(self, **environ: str) -> None:
        """What a process finds in this environment are the role's credentials."""
        given = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        home = {"HOME": str(self.home), "AWS_CONFIG_FILE": str(self.home / "config")}
        asked = [script(key, bucket="guarded") for key in ("open/f.py", "closed/f.py")]
        done = subprocess.run(
            [sys.executable, "-c", RESOLVES, str(self.home), json.dumps(asked)],
            env={
                **given,
                **home,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL_S3": self.moto,
                **environ,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        found, denied = done.stdout.splitlines()
        assert re.fullmatch(r'etag:"[0-9a-f]{32}"', found), done.stdout + done.stderr
        assert denied.startswith("S3: s3://guarded/closed/f.py: access was denied (AccessDenied)")
        for value in self.session.values():
            assert str(value) not in done.stdout + done.stderr

    @property
    def expiration(self) -> datetime:
        return datetime.now(UTC) + timedelta(hours=1)


@pytest.fixture
def role(guarded: dict[str, str], moto: str, tmp_path: Path) -> Role:
    _check_identities(moto, after=10_000_000)
    root = {"aws_access_key_id": "root", "aws_secret_access_key": "root", "region_name": "us-east-1"}
    iam, sts = (boto3.client(name, endpoint_url=moto, **root) for name in ("iam", "sts"))
    arn = iam.create_role(RoleName="agent", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    iam.put_role_policy(RoleName="agent", PolicyName="p", PolicyDocument=json.dumps(POLICY))
    session = sts.assume_role(RoleArn=arn, RoleSessionName="session")["Credentials"]
    del session["Expiration"]
    _check_identities(moto, after=0)
    return Role(arn, session, tmp_path, moto)


def test_a_session_of_single_sign_on(role: Role) -> None:
    """The token that ``aws sso login`` left is exchanged at the portal."""
    (role.home / "config").write_text(
        "[default]\nsso_session = acme\nsso_account_id = 123456789012\nsso_role_name = agent\n"
        "[sso-session acme]\nsso_start_url = https://acme.awsapps.com/start\nsso_region = us-east-1\n"
    )
    cache = role.home / ".aws" / "sso" / "cache"
    cache.mkdir(parents=True)
    kept = {"accessToken": "the-token", "expiresAt": role.expiration.strftime("%Y-%m-%dT%H:%M:%SZ")}
    (cache / f"{hashlib.sha1(b'acme').hexdigest()}.json").write_text(json.dumps(kept))
    credentials = {
        "accessKeyId": role.session["AccessKeyId"],
        "secretAccessKey": role.session["SecretAccessKey"],
        "sessionToken": role.session["SessionToken"],
        "expiration": int(role.expiration.timestamp() * 1000),
    }
    answer = json.dumps({"roleCredentials": credentials})
    with gates.gate("http://127.0.0.1:9") as portal:
        portal.when("GET", "/federation/credentials", gates.status(200, answer))
        role.sees(AWS_ENDPOINT_URL_SSO=portal.url, AWS_EC2_METADATA_DISABLED="true")
        assert portal.requests == [("GET", "/federation/credentials?role_name=agent&account_id=123456789012")]
        assert portal.headers[0]["x-amz-sso_bearer_token"] == "the-token"


def test_a_web_identity(role: Role) -> None:
    """As in a Kubernetes cluster of Amazon's: a file with a token, which STS takes for a role."""
    token = role.home / "token"
    token.write_text("header.payload.signature")
    _check_identities(role.moto, after=1)  # STS is asked without a signature: the token is what counts
    with gates.gate(role.moto) as sts:
        role.sees(
            AWS_WEB_IDENTITY_TOKEN_FILE=str(token),
            AWS_ROLE_ARN=role.arn,
            AWS_ENDPOINT_URL_STS=sts.url,
            AWS_EC2_METADATA_DISABLED="true",
        )
        assert [method for method, _ in sts.requests] == ["POST"]
        assert "Authorization" not in sts.headers[0]


def test_the_role_of_an_instance(role: Role) -> None:
    """The metadata service of EC2, by its second version: a token comes first."""
    credentials = {
        "Code": "Success",
        "Type": "AWS-HMAC",
        "AccessKeyId": role.session["AccessKeyId"],
        "SecretAccessKey": role.session["SecretAccessKey"],
        "Token": role.session["SessionToken"],
        "LastUpdated": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "Expiration": role.expiration.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    with gates.gate("http://127.0.0.1:9") as service:
        service.when("PUT", "/latest/api/token$", gates.status(200, "the-token"))
        service.when("GET", "/security-credentials/agent$", gates.status(200, json.dumps(credentials)))
        service.when("GET", "/security-credentials/$", gates.status(200, "agent"))
        service.when("GET", "", gates.status(404))
        role.sees(AWS_EC2_METADATA_SERVICE_ENDPOINT=service.url)
        assert service.requests[0] == ("PUT", "/latest/api/token")
        asked = [{name.lower(): value for name, value in headers.items()} for headers in service.headers[1:]]
        assert asked
        assert all(headers["x-aws-ec2-metadata-token"] == "the-token" for headers in asked)


# -- buckets -------------------------------------------------------------------------------------------


async def test_versions_are_exact(bench: S3Bench, backend: S3Backend, tmp_path: Path) -> None:
    client = bench._client()
    client.put_bucket_versioning(Bucket=bench.place, VersioningConfiguration={"Status": "Enabled"})
    bench.write("f.py", DATA)
    storage = script("f.py", bucket=bench.place)
    first = await backend.resolve(storage)
    version = client.head_object(Bucket=bench.place, Key="f.py")["VersionId"]
    assert first.id == f"version:{version}"
    bench.write("f.py", b"x = 2\n")
    second = await backend.resolve(storage)
    cache = SourceCache(tmp_path / "cache")
    # the run that began with the first version gets it, whatever is there by now
    assert (await cache.acquire(backend, storage, first) / "f.py").read_bytes() == DATA
    assert (await cache.acquire(backend, storage, second) / "f.py").read_bytes() == b"x = 2\n"
    file = tmp_path / "value"
    file.write_bytes(b"1")
    reference = await backend.put(bench.result().to_json(), "latest", file)
    file.write_bytes(b"2")
    await backend.put(bench.result().to_json(), "latest", file)
    await backend.get(reference, file)
    assert file.read_bytes() == b"1"


async def test_options_of_client_and_upload(
    bench: S3Bench, backend: S3Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    options = {
        "client_options": {"endpoint_url": bench.gate.url, "config": {"s3": {"addressing_style": "path"}}},
        "upload_options": {"ContentType": "text/x-python", "Metadata": {"team": "etl"}},
    }
    storage = S3(bench.place, **options).to_json()
    stored = await backend.upload(storage, Artifact("f", "pickle", data=DATA, sha256=SHA256))
    found = bench._client().head_object(Bucket=bench.place, Key=stored["key"])
    assert (found["ContentType"], found["Metadata"]) == ("text/x-python", {"team": "etl"})
    result = backend.default_result(stored)
    assert result is not None
    assert {name: result[name] for name in options} == options
    file = bench.home / "value"
    file.write_bytes(DATA)
    reference = await backend.put(result, "r", file)
    assert reference["client_options"] == options["client_options"]
    assert bench._client().head_object(Bucket=bench.place, Key="r")["Metadata"]["team"] == "etl"
    assert f" at {bench.gate.url} was never registered" in await refusal(
        backend, {**stored, "artifact": None}
    )
    wrong = S3(bench.place, upload_options={"Colour": "red"}, client_options=options["client_options"])
    with pytest.raises(BackendError, match=r"S3: s3://.*Colour.*; correct that"):
        await backend.upload(wrong.to_json(), Artifact("f", "pickle", data=DATA, sha256=SHA256))


async def test_a_server_that_ignores_conditions(bench: S3Bench, backend: S3Backend, tmp_path: Path) -> None:
    """Some servers of the protocol do not know If-Match: what comes is compared with what was asked for."""
    bench.write("f.py", DATA)
    storage = script("f.py", bucket=bench.place)
    revision = await backend.resolve(storage)
    bench.write("f.py", b"x = 2\n")

    def unconditionally(handler: Any, body: bytes) -> None:
        answer = bench._client().get_object(Bucket=bench.place, Key="f.py")
        handler.answer(200, [("ETag", answer["ETag"])], answer["Body"].read())

    bench.gate.when("GET", "f.py", unconditionally)
    with pytest.raises(StorageTransientError, match="was replaced while it was read"):
        await SourceCache(tmp_path / "cache").acquire(backend, storage, revision)


REFUSALS = {
    404: "<Error><Code>NoSuchUpload</Code><Message>There is none.</Message></Error>",
    412: "<Error><Code>PreconditionFailed</Code><Message>It is there.</Message></Error>",
}


def in_parts(bench: S3Bench, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A value that is uploaded in parts."""
    monkeypatch.setattr(objects, "PART", 5 << 20)
    file = bench.home / "value"
    file.write_bytes(bytes(6 << 20))
    return file


async def test_an_upload_that_cannot_be_taken_back_is_told_of_by_its_own_error(
    bench: S3Bench, backend: S3Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = in_parts(bench, monkeypatch)
    bench.gate.when("DELETE", "uploadId", gates.status(404, REFUSALS[404]))
    bench.gate.when("POST", "uploadId", gates.status(412, REFUSALS[412]), times=1)
    # another run put it there meanwhile, or nobody did: that is looked at, as the store says it is taken
    with pytest.raises(StorageNotFoundError, match="there is no such object"):
        await backend.put(bench.result().to_json(), "large", file)
    assert bench.gate.count("DELETE", "uploadId") == 1


async def test_an_upload_that_cannot_be_taken_back_is_cancelled_all_the_same(
    bench: S3Bench, backend: S3Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = in_parts(bench, monkeypatch)
    bench.gate.when("DELETE", "uploadId", gates.status(500))
    bench.gate.when("PUT", "uploadId", gates.hang)
    with anyio.move_on_after(60) as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(backend.put, bench.result().to_json(), "large", file)
            while not bench.gate.count("PUT", "uploadId"):
                await anyio.sleep(0.01)
            scope.cancel()
    assert scope.cancelled_caught
    assert bench.gate.count("DELETE", "uploadId") >= 1


async def test_a_missing_bucket_at_registration(
    guarded: dict[str, str], backend: S3Backend, moto: str
) -> None:
    _check_identities(moto, after=10_000_000)
    with pytest.raises(StorageNotFoundError, match="there is no bucket nowhere; create it"):
        await backend.upload(S3("nowhere").to_json(), Artifact("f", "pickle", data=b"x", sha256="0"))
    with pytest.raises(StorageNotFoundError, match="there is no bucket nowhere; create it"):
        await backend.resolve(script("f.py", bucket="nowhere"))


async def test_one_client_for_all_and_closed_at_the_end(bench: S3Bench, backend: S3Backend) -> None:
    bench.write("f.py", DATA)
    storage = script("f.py", bucket=bench.place)
    async with anyio.create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(backend.resolve, storage)
    (client,) = backend._clients._clients.values()
    assert client.users == 0
    await backend.close()
    assert backend._clients._clients == {}
    assert await backend.resolve(storage)  # and it can go on

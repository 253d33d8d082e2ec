"""Azure storage: Blob Storage through its REST API, by a key, a shared access signature, or an identity.

https://learn.microsoft.com/rest/api/storageservices/blob-service-rest-api
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

from flowagent import http
from flowagent.backend import BackendContext, Features
from flowagent.errors import BackendError, StorageNotFoundError, StorageTransientError, one_line
from flowagent.flows.results import AzureResult
from flowagent.models import Json
from flowagent_backends import identities, objects
from flowagent_backends.objects import MARK, Head, ObjectBackend, Replaced, Taken, Upload

VERSION = "2021-12-02"
SCOPE = "https://storage.azure.com/.default"
VARIABLE = "AZURE_STORAGE_CONNECTION_STRING"
# every emulator has this account: https://learn.microsoft.com/azure/storage/common/storage-use-azurite
_EMULATED = {
    "AccountName": "devstoreaccount1",
    "AccountKey": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
    "BlobEndpoint": "http://127.0.0.1:10000/devstoreaccount1",
}
_SIGNED = ("Content-Encoding", "Content-Language", "Content-Length", "Content-MD5", "Content-Type", "Date")
_CONDITIONS = ("If-Modified-Since", "If-Match", "If-None-Match", "If-Unmodified-Since", "Range")
_BUSY = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Account:
    """What a connection string says."""

    url: str
    name: str
    key: bytes | None = None
    signature: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Account:
        """:raises BackendError: it is no connection string; without a word of what it is."""
        parts = dict(part.strip().partition("=")[::2] for part in text.strip().split(";") if part.strip())
        if parts.get("UseDevelopmentStorage", "").lower() == "true":
            parts = {**_EMULATED, **parts}
        name = parts.get("AccountName", "")
        scheme = parts.get("DefaultEndpointsProtocol", "https")
        suffix = parts.get("EndpointSuffix", "core.windows.net")
        url = parts.get("BlobEndpoint") or (f"{scheme}://{name}.blob.{suffix}" if name else "")
        try:
            host = urlsplit(url).hostname
            key = base64.b64decode(parts["AccountKey"], validate=True) if parts.get("AccountKey") else None
        except ValueError:
            host = None
        if not host or not url.startswith(("https://", "http://")):
            raise BackendError(
                "Azure: the connection string is none; copy it from the storage account's access keys, "
                "like AccountName=...;AccountKey=..."
            )
        signature = parts.get("SharedAccessSignature", "").lstrip("?")
        return cls(
            url.rstrip("/"),
            name or host.partition(".")[0],
            key,
            tuple(parse_qsl(signature, keep_blank_values=True)),
        )


class AzureBackend(ObjectBackend):
    """Blobs in containers. A revision is a blob's ETag, which each write changes."""

    type = "Azure"
    features = Features(
        kinds=("pickle", "script", "bundle"),
        revision="ETag",
        credentials=f"a connection string (`{VARIABLE}`, or a secret), with a key, a signature or Azure's "
        "default identity",
        results="AzureResult",
        extra="azure, for identities",
    )
    key_field = "blob_name"
    place_fields = ("container", "connection_string_secret")

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        self._client: http.AsyncClient | None = None
        self._tokens: identities.Tokens | None = None

    def default_result(self, storage: Mapping[str, Json]) -> dict[str, Json] | None:
        """The same container."""
        return AzureResult(storage["container"], storage["connection_string_secret"]).to_json()

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    # -- the transport -------------------------------------------------------------------------------

    def _where(self, place: Mapping[str, Json], key: str) -> str:
        return f"Azure: {place['container']}/{one_line(key)}"

    async def _head(self, place: Mapping[str, Json], key: str) -> Head:
        response = await self._send(place, key, "HEAD")
        name, value = MARK
        ours = response.headers.get(f"x-ms-meta-{name}") == value
        return Head(f"etag:{response.headers['etag']}", int(response.headers["content-length"]), ours)

    async def _fetch(
        self,
        place: Mapping[str, Json],
        key: str,
        revision: str | None,
        file: Path,
        limit: int,
        advance: Callable[[int], None],
    ) -> str:
        condition = {} if revision is None else {"If-Match": revision.removeprefix("etag:")}
        for last in (False, True):
            request = await self._request(place, key, "GET", headers=condition, limit=limit)
            found = await http.download(self._http(), request, file, advance=advance)
            if found.status == 200:
                return found.sha256
            if last or not self._renewable(found.status, request):
                break
        if found.status == 412:
            await self._head(place, key)  # says it if there is none at all
        raise self._refused(place, key, found.status, found.headers)

    async def _store(
        self, place: Mapping[str, Json], key: str, upload: Upload, advance: Callable[[int], None]
    ) -> str:
        headers = {f"x-ms-meta-{name}": value for name, value in upload.metadata}
        if upload.new:
            headers["If-None-Match"] = "*"
        elif upload.instead_of is not None:
            headers["If-Match"] = upload.instead_of.removeprefix("etag:")
        content = upload.content
        try:
            if content.size <= content.part_size():
                headers["x-ms-blob-type"] = "BlockBlob"
                data = await content.read(0, content.size)
                response = await self._send(place, key, "PUT", headers=headers, content=data)
                advance(content.size)
            else:
                blocks = await self._store_blocks(place, key, upload, advance)
                listed = "".join(f"<Latest>{block}</Latest>" for block in blocks)
                body = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{listed}</BlockList>'.encode()
                response = await self._send(
                    place, key, "PUT", {"comp": "blocklist"}, headers=headers, content=body
                )
        except Replaced as error:
            raise Taken(str(error)) from error
        return f"etag:{response.headers['etag']}"

    async def _store_blocks(
        self, place: Mapping[str, Json], key: str, upload: Upload, advance: Callable[[int], None]
    ) -> list[str]:
        """Blocks that are not put together yet; the store drops them after a week if they never are."""
        blocks = []
        for number, (offset, size) in enumerate(upload.content.parts()):
            block = base64.b64encode(f"{number:08d}".encode()).decode()
            data = await upload.content.read(offset, size)
            params = {"comp": "block", "blockid": block}
            await self._send(place, key, "PUT", params, content=data, deadline=5 * objects.PATIENCE)
            advance(size)
            blocks.append(block)
        return blocks

    # -- requests ------------------------------------------------------------------------------------

    def _http(self) -> http.AsyncClient:
        if self._client is None:
            self._client = http.client()
        return self._client

    def _account(self, place: Mapping[str, Json]) -> Account:
        """:raises BackendError: there is no connection string here."""
        named = place.get("connection_string_secret")
        text = place.get("connection_string")
        if text is None and named:
            text = self._secret(named)
            if text is None:
                raise BackendError(
                    f"Azure: the secret {named}, which holds the connection string, is not set here; "
                    f"run: flowagent secret set {named}"
                )
        text = text or self._context.environ.get(VARIABLE) or self._secret(VARIABLE)
        if not text:
            raise BackendError(
                f"Azure: there is no connection string here; set {VARIABLE} in the environment, "
                f"or run: flowagent secret set {VARIABLE}"
            )
        return Account.parse(text)

    async def _request(
        self,
        place: Mapping[str, Json],
        key: str,
        method: str,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        limit: int = http.BODY_LIMIT,
        deadline: float | None = None,
    ) -> http.Request:
        account = self._account(place)
        url = f"{account.url}/{quote(place['container'], safe='$')}/{quote(key, safe='/~')}"
        query = dict(params or {})
        sent = {**(headers or {}), "x-ms-version": VERSION, "x-ms-date": formatdate(usegmt=True)}
        if account.key is not None:
            size = str(len(content)) if content else ""
            sent["Authorization"] = _shared_key(account, method, url, query, {**sent, "Content-Length": size})
        elif account.signature:
            query.update(account.signature)
        else:
            if self._tokens is None:
                self._tokens = identities.azure("Azure", SCOPE)
            sent["Authorization"] = f"Bearer {await self._tokens.get()}"
        return http.Request(
            self._where(place, key),
            method,
            url,
            sent,
            query,
            content,
            limit=limit,
            deadline=deadline or objects.PATIENCE,
        )

    async def _send(
        self,
        place: Mapping[str, Json],
        key: str,
        method: str,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        deadline: float | None = None,
    ) -> http.Response:
        """A response of success. :raises BackendError: any other."""
        for last in (False, True):
            request = await self._request(place, key, method, params, headers, content, deadline=deadline)
            response = await http.send(self._http(), request)
            if response.is_success:
                return response
            if last or not self._renewable(response.status_code, request):
                break
        raise self._refused(place, key, response.status_code, response.headers)

    def _renewable(self, status: int, request: http.Request) -> bool:
        """Whether another token can make a difference."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if status != 401 or scheme != "Bearer" or self._tokens is None:
            return False
        self._tokens.forget(token)
        return True

    def _refused(
        self, place: Mapping[str, Json], key: str, status: int, headers: Mapping[str, str]
    ) -> BackendError:
        # https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes
        where = self._where(place, key)
        code = one_line(headers.get("x-ms-error-code", "")) or str(status)
        if status == 412 or code == "BlobAlreadyExists":
            return Replaced(where)
        if code == "ContainerNotFound":
            return StorageNotFoundError(
                f"{where}: there is no container {place['container']}; create it, or correct the name"
            )
        if status == 404:
            return StorageNotFoundError(
                f"{where}: there is no such blob; put it back, or register the flow again"
            )
        if status in _BUSY:
            return StorageTransientError(f"{where}: the store is busy or unwell ({code}); try again later")
        if status == 401 or code in ("AuthenticationFailed", "InvalidAuthenticationInfo"):
            return BackendError(
                f"{where}: the credentials were refused ({code}); renew the key or signature in the "
                "connection string, or the identity of this machine"
            )
        if status == 403:
            return BackendError(
                f"{where}: access was denied ({code}); let the key, signature or identity use that container"
            )
        return BackendError(f"{where} was refused: {code}; correct that")


def _shared_key(
    account: Account, method: str, url: str, params: Mapping[str, str], headers: Mapping[str, str]
) -> str:
    """The signature of a request by the account's key.

    https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key"""
    assert account.key is not None
    given = {name.lower(): value for name, value in headers.items()}
    lines = [method, *(given.get(name.lower(), "") for name in (*_SIGNED, *_CONDITIONS))]
    lines += [f"{name}:{given[name]}" for name in sorted(given) if name.startswith("x-ms-")]
    lines.append(f"/{account.name}{urlsplit(url).path}")
    lines += [f"{name}:{params[name]}" for name in sorted(params)]
    digest = hmac.new(account.key, "\n".join(lines).encode(), hashlib.sha256).digest()
    return f"SharedKey {account.name}:{base64.b64encode(digest).decode()}"

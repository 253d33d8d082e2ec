"""GCS storage: Google Cloud Storage through its JSON API, with Application Default Credentials.

https://cloud.google.com/storage/docs/json_api/v1
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flowagent import http
from flowagent.backend import BackendContext, Features
from flowagent.errors import BackendError, StorageNotFoundError, StorageTransientError, one_line
from flowagent.flows.results import GCSResult
from flowagent.models import Json
from flowagent_backends import answers, identities, objects
from flowagent_backends.answers import understood
from flowagent_backends.objects import MARK, Head, ObjectBackend, Replaced, Taken, Upload

HOST = "https://storage.googleapis.com"
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_TOO_MANY = frozenset({"rateLimitExceeded", "userRateLimitExceeded", "quotaExceeded"})


class GCSBackend(ObjectBackend):
    """Objects in buckets. A revision is an object's generation."""

    type = "GCS"
    features = Features(
        kinds=("pickle", "script", "bundle"),
        revision="generation",
        credentials="Application Default Credentials, or the secret `GCP_CREDENTIALS`",
        results="GCSResult",
        extra="gcs",
    )
    place_fields = ("bucket", "project")

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        # as Google's own libraries have it: an emulator asks for no credentials, and must get none
        emulator = context.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
        self._host = emulator if "://" in emulator or not emulator else f"http://{emulator}"
        self._client: http.AsyncClient | None = None
        self._tokens: identities.Tokens | None = None

    def default_result(self, storage: Mapping[str, Json]) -> dict[str, Json] | None:
        """The same bucket."""
        return GCSResult(storage["bucket"], storage["project"]).to_json()

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    # -- the transport -------------------------------------------------------------------------------

    def _where(self, place: Mapping[str, Json], key: str) -> str:
        return f"GCS: gs://{place['bucket']}/{one_line(key)}"

    async def _head(self, place: Mapping[str, Json], key: str) -> Head:
        fields = {"fields": "generation,size,metadata"}
        response = await self._send(place, key, "GET", self._object(place, key), fields)
        name, value = MARK
        with understood(self._where(place, key)):
            found = json.loads(response.content)
            ours = (found.get("metadata") or {}).get(name) == value
            return Head(f"generation:{found['generation']}", int(found["size"]), ours)

    async def _fetch(
        self,
        place: Mapping[str, Json],
        key: str,
        revision: str | None,
        file: Path,
        limit: int,
        advance: Callable[[int], None],
    ) -> str:
        params = {"alt": "media"}
        if revision is not None:
            params["generation"] = revision.removeprefix("generation:")
        for last in (False, True):
            request = await self._request(place, key, "GET", self._object(place, key), params, limit=limit)
            found = await http.download(self._http(), request, file, advance=advance)
            if found.status == 200:
                return found.sha256
            if not self._again(place, found.status, found.body, request, params, last):
                break
        if found.status == 404 and revision is not None:
            await self._head(place, key)  # says it if there is none at all
            raise Replaced(self._where(place, key))
        raise await self._refused(place, key, found.status, found.body)

    async def _store(
        self, place: Mapping[str, Json], key: str, upload: Upload, advance: Callable[[int], None]
    ) -> str:
        params = {"name": key}
        if upload.new:
            params["ifGenerationMatch"] = "0"
        elif upload.instead_of is not None:
            params["ifGenerationMatch"] = upload.instead_of.removeprefix("generation:")
        described = {"contentType": "application/octet-stream", "metadata": dict(upload.metadata)}
        whole = upload.content.size <= upload.content.part_size()
        store = self._store_whole if whole else self._store_in_parts
        try:
            with understood(self._where(place, key)):
                found = await store(place, key, upload, params, json.dumps(described).encode(), advance)
                return f"generation:{found['generation']}"
        except Replaced as error:
            raise Taken(str(error)) from error

    async def _store_whole(
        self,
        place: Mapping[str, Json],
        key: str,
        upload: Upload,
        params: Mapping[str, str],
        described: bytes,
        advance: Callable[[int], None],
    ) -> Mapping[str, Json]:
        boundary = secrets.token_hex(16).encode()
        data = await upload.content.read(0, upload.content.size)
        content = (
            b"--%b\r\nContent-Type: application/json\r\n\r\n%b\r\n"
            b"--%b\r\nContent-Type: application/octet-stream\r\n\r\n%b\r\n--%b--"
        ) % (boundary, described, boundary, data, boundary)
        kind = {"Content-Type": f"multipart/related; boundary={boundary.decode()}"}
        params = {**params, "uploadType": "multipart"}
        response = await self._send(place, key, "POST", self._uploads(place), params, kind, content)
        advance(len(data))
        found: Mapping[str, Json] = json.loads(response.content)
        return found

    async def _store_in_parts(
        self,
        place: Mapping[str, Json],
        key: str,
        upload: Upload,
        params: Mapping[str, str],
        described: bytes,
        advance: Callable[[int], None],
    ) -> Mapping[str, Json]:
        """A resumable upload. Its URL is a secret, which serves instead of a token."""
        kind = {"Content-Type": "application/json"}
        params = {**params, "uploadType": "resumable"}
        begun = await self._send(place, key, "POST", self._uploads(place), params, kind, described)
        where, size, offset = self._where(place, key), upload.content.size, 0
        session = begun.headers.get("location")
        if not session:
            raise BackendError(f"{where}: the store began no upload; try again")
        while True:
            part = min(upload.content.part_size(), size - offset)
            data = await upload.content.read(offset, part)
            extent = {"Content-Range": f"bytes {offset}-{offset + part - 1}/{size}"}
            request = http.Request(where, "PUT", session, extent, content=data, deadline=5 * objects.PATIENCE)
            response = await http.send(self._http(), request)
            if response.status_code in (200, 201):
                advance(size - offset)
                found: Mapping[str, Json] = json.loads(response.content)
                return found
            if response.status_code != 308:
                raise await self._refused(place, key, response.status_code, response.content)
            _, _, kept = response.headers.get("range", "").partition("-")
            reached = int(kept) + 1 if kept.isdigit() else 0
            if not offset < reached <= offset + part:
                raise StorageTransientError(f"{where}: the store lost a part of the upload; try again later")
            advance(reached - offset)
            offset = reached

    # -- requests ------------------------------------------------------------------------------------

    def _object(self, place: Mapping[str, Json], key: str) -> str:
        return f"/storage/v1/b/{quote(place['bucket'], safe='')}/o/{quote(key, safe='')}"

    def _uploads(self, place: Mapping[str, Json]) -> str:
        return f"/upload/storage/v1/b/{quote(place['bucket'], safe='')}/o"

    def _http(self) -> http.AsyncClient:
        if self._client is None:
            self._client = http.client()
        return self._client

    async def _token(self) -> str | None:
        if self._host:
            return None
        if self._tokens is None:
            self._tokens = identities.google("GCS", SCOPE, lambda: self._secret("GCP_CREDENTIALS"))
        return await self._tokens.get()

    async def _request(
        self,
        place: Mapping[str, Json],
        key: str,
        method: str,
        path: str,
        params: Mapping[str, str],
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        limit: int = http.BODY_LIMIT,
    ) -> http.Request:
        token = await self._token()
        authorised = {"Authorization": f"Bearer {token}"} if token else {}
        return http.Request(
            self._where(place, key),
            method,
            (self._host or HOST) + path,
            {**(headers or {}), **authorised},
            params,
            content,
            repeatable=True,  # an upload is repeated by the same, or refused by its condition
            limit=limit,
            deadline=objects.PATIENCE,
        )

    async def _send(
        self,
        place: Mapping[str, Json],
        key: str,
        method: str,
        path: str,
        params: dict[str, str],
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> http.Response:
        """A response of success. :raises BackendError: any other."""
        for last in (False, True):
            request = await self._request(place, key, method, path, params, headers, content)
            response = await http.send(self._http(), request)
            if response.is_success:
                return response
            if not self._again(place, response.status_code, response.content, request, params, last):
                break
        raise await self._refused(place, key, response.status_code, response.content)

    def _again(
        self,
        place: Mapping[str, Json],
        status: int,
        body: bytes,
        request: http.Request,
        params: dict[str, str],
        last: bool,
    ) -> bool:
        """Whether another token, or the project that pays, can make a difference."""
        if last:
            return False
        if status == 401 and self._tokens is not None:
            self._tokens.forget(request.headers["Authorization"].removeprefix("Bearer "))
            return True
        if status == 400 and place.get("project") and "requester pays" in _error(body)[1].lower():
            params["userProject"] = place["project"]
            return True
        return False

    async def _refused(self, place: Mapping[str, Json], key: str, status: int, body: bytes) -> BackendError:
        where = self._where(place, key)
        reason, said = _error(body)
        if status == 412:
            return Replaced(where)
        if status == 404:
            return await self._missing(place, where)
        if status in _BUSY or reason in _TOO_MANY:
            return StorageTransientError(f"{where}: the store is busy or unwell ({status}); try again later")
        if status == 401:
            return BackendError(f"{where}: the Google credentials were refused; renew them on this machine")
        if status == 403:
            return BackendError(
                f"{where}: access was denied; let the identity of this machine use that bucket "
                "(roles/storage.objectUser)"
            )
        return BackendError(f"{where} was refused: {status} {said}".rstrip() + "; correct that")

    async def _missing(self, place: Mapping[str, Json], where: str) -> BackendError:
        """An object, or its whole bucket: the answer need not say which."""
        path = f"/storage/v1/b/{quote(place['bucket'], safe='')}"
        bucket = await http.send(
            self._http(), await self._request(place, "", "GET", path, {"fields": "name"})
        )
        if bucket.status_code == 404:
            return StorageNotFoundError(
                f"{where}: there is no bucket {place['bucket']}; create it, or correct the name"
            )
        return StorageNotFoundError(
            f"{where}: there is no such object; put it back, or register the flow again"
        )


def _error(body: bytes) -> tuple[str, str]:
    """Reason and message of an error, as far as it has them."""
    try:
        error: Any = answers.refusal(body)["error"]
        reasons = [str(item.get("reason", "")) for item in error.get("errors", [])]
        return (reasons or [""])[0], one_line(str(error.get("message", "")))
    except (LookupError, TypeError, AttributeError):
        return "", one_line(body[:300].decode(errors="replace"))

"""S3 storage, on Amazon's own client, made async: aiobotocore finds credentials as all of AWS' tools do."""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import anyio

from flowagent.backend import BackendContext, Features
from flowagent.errors import BackendError, StorageNotFoundError, StorageTransientError, one_line
from flowagent.flows.results import S3Result
from flowagent.http import Counted, TooLargeError, shown, written
from flowagent.models import Json
from flowagent_backends import aws, objects
from flowagent_backends.objects import (
    MARK,
    Head,
    ObjectBackend,
    Replaced,
    Taken,
    Upload,
    deadline,
)

T = TypeVar("T")

CHUNK = 1 << 18
ATTEMPTS = 3
"""At a download that breaks off; what happens before its first byte is repeated by botocore."""
AT_A_TIME = 3
"""Parts of an upload. By the client's copies, each was seen to take about three times its size."""
BACKOFF = 0.2
TOO_MANY = 429
BUSY = frozenset({TOO_MANY, 500, 502, 503, 504})

_MISSING = frozenset({"NoSuchKey", "NoSuchVersion", "NotFound", "404"})
_TRANSIENT = frozenset(
    {
        "BandwidthLimitExceeded",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)


class _BrokenOff(StorageTransientError):
    """The connection was lost in the middle of a body."""


class _Unwritten(BackendError):
    """The disk here, not the store, is what failed; by what it is raised from."""


class S3Backend(ObjectBackend):
    """Objects in buckets. A revision is an object's version id, or its ETag where there are no versions."""

    type = "S3"
    features = Features(
        kinds=("pickle", "script", "bundle"),
        revision="version id, else ETag",
        credentials="those of AWS' tools, or the secret `AWS_CREDENTIALS`",
        results="S3Result",
    )
    place_fields = ("bucket", "client_options")

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        self._clients = aws.Clients("s3", context)

    def default_result(self, storage: Mapping[str, Json]) -> dict[str, Json] | None:
        """The same bucket."""
        options = {name: storage[name] for name in ("client_options", "upload_options")}
        return S3Result(storage["bucket"], **options).to_json()

    async def close(self) -> None:
        """Close the clients."""
        await self._clients.close()

    # -- the transport -------------------------------------------------------------------------------

    def _where(self, place: Mapping[str, Json], key: str) -> str:
        endpoint = (place.get("client_options") or {}).get("endpoint_url")
        at = f" at {shown(endpoint).rstrip('/')}" if endpoint else ""
        return f"S3: s3://{place['bucket']}/{one_line(key)}{at}"

    async def _head(self, place: Mapping[str, Json], key: str) -> Head:
        from botocore.exceptions import ClientError

        target = {"Bucket": place["bucket"], "Key": key}
        where = self._where(place, key)

        async def head(client: Any) -> Head:
            return _described(await client.head_object(**target))

        async def read(client: Any) -> Head:
            found = await client.get_object(**target)
            async with found["Body"]:
                return _described(found)

        try:
            return await self._ask(place, where, head, raises=ClientError)
        except ClientError as error:
            if aws.status_of(error) in BUSY:
                self._raise(where, place, error)
            return await self._ask(place, where, read)  # an answer to HEAD has no body to say why in

    async def _fetch(
        self,
        place: Mapping[str, Json],
        key: str,
        revision: str | None,
        file: Path,
        limit: int,
        advance: Callable[[int], None],
    ) -> str:
        where = self._where(place, key)
        kind, _, value = (revision or "").partition(":")
        exactly = {"version": {"VersionId": value}, "etag": {"IfMatch": value}}.get(kind, {})
        counted = Counted(advance)

        async def fetch(client: Any) -> str:
            with deadline(where, objects.PATIENCE):
                found = await client.get_object(Bucket=place["bucket"], Key=key, **exactly)
            try:
                return await receive(found)
            except BackendError:
                raise
            except Exception as error:
                raise _BrokenOff(
                    f"{where} broke off: {one_line(str(error)) or type(error).__name__}; try again later"
                ) from error

        async def receive(found: Mapping[str, Any]) -> str:
            async with found["Body"] as body:
                if revision is not None and _revision(found, kind) != revision:
                    raise Replaced(f"{where} is {_revision(found, kind)} now")  # a server without If-Match
                if found["ContentLength"] > limit:
                    raise TooLargeError(f"{where} has more than {limit} bytes; that is not taken")
                digest, size = hashlib.sha256(), 0
                async with written(file) as target:
                    async for chunk in body.iter_chunks(CHUNK):
                        digest.update(chunk)
                        size += len(chunk)
                        try:
                            await target.write(chunk)
                        except OSError as error:  # such are errors of the connection, too
                            raise _Unwritten(where) from error
                        counted(len(chunk))
            if size != found["ContentLength"]:
                raise _BrokenOff(
                    f"{where} broke off after {size} of {found['ContentLength']} bytes; try again later"
                )
            return digest.hexdigest()

        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._ask(place, where, fetch, streams=True)
            except _Unwritten as error:
                assert error.__cause__ is not None
                raise error.__cause__ from None
            except _BrokenOff:
                counted.take_back()
                if attempt == ATTEMPTS:
                    raise
                await anyio.sleep(BACKOFF * 4**attempt)
        raise AssertionError

    async def _store(
        self,
        place: Mapping[str, Json],
        key: str,
        upload: Upload,
        advance: Callable[[int], None],
    ) -> str:
        options: dict[str, Any] = dict(place.get("upload_options") or {})
        metadata = {**options.pop("Metadata", {}), **dict(upload.metadata)}
        target = {"Bucket": place["bucket"], "Key": key}
        made = {**options, **({"Metadata": metadata} if metadata else {})}
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if upload.new else {}
        kind, _, value = (upload.instead_of or "").partition(":")
        if kind == "etag":  # a version is not lost by being replaced
            condition = {"IfMatch": value}
        where = self._where(place, key)
        content = upload.content

        async def whole(client: Any) -> str:
            data = await content.read(0, content.size)
            return _revision(await client.put_object(**target, **made, **condition, Body=data))

        async def in_parts(client: Any) -> str:
            with deadline(where, objects.PATIENCE):
                begun = await client.create_multipart_upload(**target, **made)
            of = {**target, "UploadId": begun["UploadId"]}
            counted = Counted(advance)
            try:
                parts = await _parts(client, where, of, upload, counted)
                with deadline(where, 5 * objects.PATIENCE):  # it is put together there, which takes its time
                    done = await client.complete_multipart_upload(
                        **of, **condition, MultipartUpload={"Parts": parts}
                    )
                return _revision(done)
            except BaseException:
                counted.take_back()
                # what is left there costs money; why it ended is told, whatever becomes of that
                with anyio.move_on_after(10, shield=True), suppress(Exception):
                    await client.abort_multipart_upload(**of)
                raise

        try:
            if content.size > content.part_size():
                return await self._ask(place, where, in_parts, streams=True)
            revision = await self._ask(place, where, whole)
        except Replaced as error:
            raise Taken(str(error)) from error
        advance(content.size)
        return revision

    async def _ask(
        self,
        place: Mapping[str, Json],
        where: str,
        question: Callable[[Any], Awaitable[T]],
        *,
        streams: bool = False,
        raises: builtins.type[Exception] | None = None,
    ) -> T:
        """The answer of the store. Refused credentials are looked for once more, and the answer 429, which
        botocore does not know, is repeated. What ``streams`` sees to its own deadlines.

        :raises BackendError: in words, but for the errors that ``raises`` names."""
        options = place.get("client_options") or {}
        try:
            for attempt in range(1, ATTEMPTS + 1):
                async with self._clients.use(where, options) as client:
                    try:
                        with nullcontext() if streams else deadline(where, objects.PATIENCE):
                            return await question(client.client)
                    except BackendError:
                        raise
                    except Exception as error:
                        if aws.code_of(error) in aws.REFUSED and attempt == 1:
                            self._clients.retire(client)  # they may have been renewed
                        elif aws.status_of(error) != TOO_MANY or attempt == ATTEMPTS:
                            raise
                await anyio.sleep(BACKOFF * 4**attempt)
        except BackendError:
            raise
        except Exception as error:
            if raises is not None and isinstance(error, raises):
                raise
            self._raise(where, place, error)
        raise AssertionError

    # -- errors --------------------------------------------------------------------------------------

    def _raise(self, where: str, place: Mapping[str, Json], error: Exception) -> NoReturn:
        """In words: what it was, and what to do. :raises BackendError: unless it is not the store's."""
        code = aws.code_of(error)
        if code is not None:
            self._refused(where, place, code, error)
        aws.explain(where, error)

    def _refused(self, where: str, place: Mapping[str, Json], code: str, error: Exception) -> NoReturn:
        status = aws.status_of(error)
        if code == "NoSuchBucket":
            raise StorageNotFoundError(
                f"{where}: there is no bucket {place['bucket']}; create it, or correct the name"
            ) from error
        if code in _MISSING:
            raise StorageNotFoundError(
                f"{where}: there is no such object; put it back, or register the flow again"
            ) from error
        if code in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
            raise Replaced(where) from error
        if code in aws.REFUSED:
            raise aws.refused(where, code) from error
        if status == 403 or code in ("AccessDenied", "403"):
            raise BackendError(
                f"{where}: access was denied ({code}); let the identity of this machine use that bucket"
            ) from error
        if code in _TRANSIENT or status in BUSY:
            raise StorageTransientError(
                f"{where}: the store is busy or unwell ({code}); try again later"
            ) from error
        raise BackendError(f"{where} was refused: {code} {aws.said(error)}; correct that") from error


def _revision(found: Mapping[str, Any], kind: str = "") -> str:
    version = found.get("VersionId")
    if version and version != "null" and kind != "etag":
        return f"version:{version}"
    return f"etag:{found['ETag']}"


def _described(found: Mapping[str, Any]) -> Head:
    name, value = MARK
    return Head(_revision(found), found["ContentLength"], found.get("Metadata", {}).get(name) == value)


async def _parts(
    client: Any, where: str, of: Mapping[str, Any], upload: Upload, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Send the parts, some at a time; what names them."""
    sent: dict[int, str] = {}
    room = anyio.Semaphore(AT_A_TIME)

    async def send(number: int, offset: int, size: int) -> None:
        try:
            data = await upload.content.read(offset, size)
            with deadline(where, 5 * objects.PATIENCE):
                answer = await client.upload_part(**of, PartNumber=number, Body=data)
            sent[number] = answer["ETag"]
            advance(size)
        finally:
            room.release()

    try:
        async with anyio.create_task_group() as tasks:
            for number, (offset, size) in enumerate(upload.content.parts(), start=1):
                await room.acquire()
                tasks.start_soon(send, number, offset, size)
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return [{"PartNumber": number, "ETag": sent[number]} for number in sorted(sent)]

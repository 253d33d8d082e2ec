"""Object stores: flows as objects in buckets of Amazon S3, Google Cloud Storage and Azure Blob Storage."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from flowagent.flows.declarations import (
    absolute,
    aws_options,
    flag,
    patterns,
    text,
    upload_options_of,
)
from flowagent.flows.errors import FlowError
from flowagent.storage.base import Storage


class ObjectStorage(Storage):
    """What object stores share: a pickle, a script or a bundle as one object.

    Without a key, registration makes one: ``<slug of the flow>/<time>``, for a bundle ``<slug>/<digest>``.
    ``local_script_path`` is the script that registration uploads, by default the one that registers the flow.
    ``include`` names files beside the script, which are stored with it.
    """

    keeps_scripts = True
    unstored: ClassVar[tuple[str, ...]] = ("local_script_path",)
    fields: ClassVar[tuple[str, ...]] = ("include",)

    def __init__(
        self,
        *,
        stored_as_script: bool = False,
        local_script_path: str | os.PathLike[str] | None = None,
        include: Iterable[str] | None = None,
        **options: Any,
    ) -> None:
        what = f"storage {self.type}"
        self.include = patterns(include, f"{what}: include")
        super().__init__(stored_as_script=stored_as_script or bool(self.include), **options)
        self.local_script_path = absolute(local_script_path, f"{what}: local_script_path")
        if self.local_script_path and not self.stored_as_script:
            raise FlowError(f"{what}: local_script_path= is for scripts; add stored_as_script=True")


def _bucket(value: str, what: str, scheme: str) -> str:
    checked = text(value, what)
    if checked is None or "://" in checked:
        raise FlowError(f"{what} takes its bare name, without {scheme}://; got {value!r}")
    return checked


class S3(ObjectStorage):
    """An object in a bucket of Amazon S3, or of anything that speaks its protocol.

    Credentials come from where AWS' own tools find them. ``client_options``: ``endpoint_url``,
    ``region_name``, ``profile_name``, ``use_ssl``, ``verify``, ``config``; ``upload_options``: as for boto3's
    ``put_object``, such as ``ServerSideEncryption``.

    :raises FlowError: arguments that contradict each other, or an option that is unknown or a secret
    """

    fields: ClassVar[tuple[str, ...]] = ("bucket", "key", "client_options", "upload_options", "include")

    def __init__(
        self,
        bucket: str,
        key: str | None = None,
        stored_as_script: bool = False,
        local_script_path: str | os.PathLike[str] | None = None,
        client_options: Mapping[str, Any] | None = None,
        upload_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(stored_as_script=stored_as_script, local_script_path=local_script_path, **options)
        self.bucket = _bucket(bucket, "storage S3: bucket", "s3")
        self.key = text(key, "storage S3: key")
        self.client_options = aws_options(client_options, "storage S3: client_options")
        self.upload_options = upload_options_of(upload_options, "storage S3: upload_options")


class GCS(ObjectStorage):
    """An object in a bucket of Google Cloud Storage, with Application Default Credentials.

    ``project`` is billed for requests to buckets that ask for that.

    :raises FlowError: arguments that contradict each other
    """

    fields: ClassVar[tuple[str, ...]] = ("bucket", "key", "project", "include")

    def __init__(
        self,
        bucket: str,
        key: str | None = None,
        project: str | None = None,
        stored_as_script: bool = False,
        local_script_path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(stored_as_script=stored_as_script, local_script_path=local_script_path, **options)
        self.bucket = _bucket(bucket, "storage GCS: bucket", "gs")
        self.key = text(key, "storage GCS: key")
        self.project = text(project, "storage GCS: project")


class Azure(ObjectStorage):
    """A blob in a container of Azure Blob Storage.

    ``connection_string`` is used for the upload, and never stored. Agents find theirs in the secret that
    ``connection_string_secret`` names, else in ``AZURE_STORAGE_CONNECTION_STRING``. An existing blob is
    replaced with ``overwrite=True`` only.

    :raises FlowError: arguments that contradict each other
    """

    unstored: ClassVar[tuple[str, ...]] = ("local_script_path", "connection_string")
    fields: ClassVar[tuple[str, ...]] = (
        "container",
        "connection_string_secret",
        "blob_name",
        "overwrite",
        "include",
    )

    def __init__(
        self,
        container: str,
        connection_string: str | None = None,
        connection_string_secret: str | None = None,
        blob_name: str | None = None,
        overwrite: bool = False,
        stored_as_script: bool = False,
        local_script_path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(stored_as_script=stored_as_script, local_script_path=local_script_path, **options)
        self.container = _bucket(container, "storage Azure: container", "https")
        if connection_string is not None and not (
            isinstance(connection_string, str) and "=" in connection_string
        ):
            raise FlowError(
                "storage Azure: connection_string takes the string that Azure shows among the access keys"
            )
        self.connection_string = connection_string
        self.connection_string_secret = text(
            connection_string_secret, "storage Azure: connection_string_secret"
        )
        self.blob_name = text(blob_name, "storage Azure: blob_name")
        self.overwrite = flag(overwrite, "storage Azure: overwrite")

"""AWS' own client, made async: one for all that use the same identity, and what its errors mean."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

import anyio
from anyio import to_thread

from flowagent.backend import BackendContext
from flowagent.errors import BackendError, SecretError, StorageTransientError, one_line
from flowagent.models import Json

CREDENTIALS = "AWS_CREDENTIALS"
CONNECTIONS = 32
ATTEMPTS = 3
"""Of botocore's, at each request."""
REFUSED = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "InvalidToken",
        "MissingAuthenticationToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnrecognizedClientException",
    }
)
"""Codes that say: these credentials are not good, or not any more.

https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html and CommonErrors of the other services"""


@dataclass
class Client:
    """A client of botocore's, and how many use it."""

    name: str
    client: Any
    users: int = 0
    retired: bool = False

    async def close(self) -> None:
        await self.client.__aexit__(None, None, None)


class Clients:
    """The clients of one service, by their options. Making one takes 150 ms and 15 MiB: they are kept."""

    def __init__(self, service: str, context: BackendContext) -> None:
        self._service = service
        self._context = context
        self._clients: dict[str, Client] = {}
        self._lock = anyio.Lock()

    @asynccontextmanager
    async def use(self, what: str, options: Mapping[str, Json]) -> AsyncIterator[Client]:
        """The client for these options; a retired one is closed after its last user. ``what`` begins errors.

        :raises BackendError: it cannot be made."""
        name = json.dumps(options, sort_keys=True)
        async with self._lock:
            if name not in self._clients:
                self._clients[name] = Client(name, await self._connect(what, dict(options)))
            client = self._clients[name]
        client.users += 1
        try:
            yield client
        finally:
            client.users -= 1
            if client.retired and not client.users:
                with anyio.CancelScope(shield=True):
                    await client.close()

    def retire(self, client: Client) -> None:
        """Its credentials were refused: whoever comes next has others looked for."""
        client.retired = True
        if self._clients.get(client.name) is client:
            del self._clients[client.name]

    async def close(self) -> None:
        """Close all."""
        while self._clients:
            await self._clients.popitem()[1].close()

    async def _connect(self, what: str, options: dict[str, Json]) -> Any:
        try:
            aio = await to_thread.run_sync(import_module, "aiobotocore.session")
        except ImportError as error:
            raise BackendError(
                f"{what}: aiobotocore is not installed here: pip install aiobotocore"
            ) from error
        try:
            config = _config(options.pop("config", None) or {})
            session = aio.AioSession(profile=options.pop("profile_name", None))
            given = {**options, **self._credentials(what), "config": config}
            return await session.create_client(self._service, **given).__aenter__()
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"{what}: {said(error)}; correct client_options= or AWS' settings") from error

    def _credentials(self, what: str) -> dict[str, str]:
        """Those of the secret AWS_CREDENTIALS, which go before all others."""
        secrets = self._context.secrets
        try:
            if secrets.origin(CREDENTIALS) is None:
                return {}
            values = json.loads(secrets.get(CREDENTIALS))
            found = {
                "aws_access_key_id": values["ACCESS_KEY"],
                "aws_secret_access_key": values["SECRET_ACCESS_KEY"],
                "aws_session_token": values.get("SESSION_TOKEN"),
            }
        except SecretError as error:
            raise BackendError(f"{what}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BackendError(
                f"{what}: the secret {CREDENTIALS} is not like "
                '{"ACCESS_KEY": "...", "SECRET_ACCESS_KEY": "..."}; set it again'
            ) from None
        return {name: value for name, value in found.items() if value}


def _config(declared: Mapping[str, Json]) -> Any:
    from aiobotocore.config import AioConfig
    from botocore import UNSIGNED

    options = dict(declared)
    if options.get("signature_version") == "unsigned":
        options["signature_version"] = UNSIGNED
    return AioConfig(
        connect_timeout=5,
        read_timeout=30,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=CONNECTIONS,
        # other checksums are trailers, which many servers of the protocol do not know
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        **options,
    )


# -- errors ----------------------------------------------------------------------------------------------


def status_of(error: Exception) -> int:
    """The status of an answer that refuses; 0: it is another error."""
    response: Mapping[str, Any] = getattr(error, "response", None) or {}
    status: int = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status


def code_of(error: Exception) -> str | None:
    """The code of an answer that refuses; None: it is another error."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None
    return str(response.get("Error", {}).get("Code", "unknown"))


def said(error: Exception) -> str:
    """What an error, or the answer that it stands for, says."""
    response = getattr(error, "response", None)
    text = response.get("Error", {}).get("Message", "") if isinstance(response, dict) else str(error)
    return one_line(str(text)).rstrip(".") or type(error).__name__


def refused(what: str, code: str) -> BackendError:
    return BackendError(f"{what}: the AWS credentials were refused ({code}); renew them on this machine")


def explain(what: str, error: Exception) -> NoReturn:
    """Raise in words what is no answer. :raises BackendError: unless it is no error of the client's."""
    from aiohttp import ClientError as ConnectionError
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    if isinstance(error, exceptions.NoCredentialsError):
        raise BackendError(
            f"{what}: no AWS credentials are found here; give them by a profile, by AWS_ variables, "
            f"or as the secret {CREDENTIALS}"
        ) from error
    lost = (exceptions.ConnectionError, exceptions.HTTPClientError, ConnectionError, OSError)
    if isinstance(error, (*lost, exceptions.ResponseStreamingError, exceptions.IncompleteReadError)):
        raise StorageTransientError(f"{what} cannot be reached: {said(error)}; try again later") from error
    if isinstance(error, ResponseParserError):
        raise BackendError(f"{what}: its answers cannot be understood; check the endpoint") from error
    if isinstance(error, (exceptions.BotoCoreError, ValueError)):
        raise BackendError(f"{what}: {said(error)}; correct that") from error
    raise error

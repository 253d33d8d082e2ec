"""Tokens of cloud identities: Google's Application Default Credentials, Azure's default chain.

Their libraries are imported when a token is first needed, and asked in threads: they block.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC
from typing import Any

import anyio
from anyio import to_thread

from flowagent.errors import BackendError, StorageTransientError, one_line

PATIENCE = 60.0
"""Seconds that finding an identity and its token may take: metadata services are waited for."""
MARGIN = 300.0
"""Seconds before its end at which a token is renewed."""


class Tokens:
    """The token of one identity, renewed in time. ``fetch`` blocks; it returns a token and when it ends,
    in seconds since the epoch."""

    def __init__(self, what: str, fetch: Callable[[], tuple[str, float]]) -> None:
        self._what = what
        self._fetch = fetch
        self._token = ""
        self._ends = 0.0
        self._lock = anyio.Lock()

    async def get(self) -> str:
        """:raises BackendError: there is no identity, or it was refused."""
        async with self._lock:
            if time.time() > self._ends - MARGIN:
                with anyio.move_on_after(PATIENCE):
                    self._token, self._ends = await to_thread.run_sync(self._fetch, abandon_on_cancel=True)
                    return self._token
                raise StorageTransientError(
                    f"{self._what}: no token was to be had within {PATIENCE:g} s; try again later"
                )
        return self._token

    def forget(self, token: str) -> None:
        """It was refused: fetch another the next time."""
        if token == self._token:
            self._ends = 0.0


# Credentials are looked for whenever a token is fetched: they may have been replaced since the last time.


def google(what: str, scope: str, service_account: Callable[[], str | None]) -> Tokens:
    """Tokens of a service account's JSON, else of the Application Default Credentials of this machine."""

    def fetch() -> tuple[str, float]:
        try:
            import google.auth
            from google.auth import exceptions
            from google.auth.transport.requests import Request
            from google.oauth2 import service_account as accounts
        except ImportError as error:
            raise BackendError(
                f"{what}: google-auth is not installed here: pip install 'flowagent[gcs]'"
            ) from error
        secret = service_account()
        try:
            found: Any
            if secret is not None:
                found = accounts.Credentials.from_service_account_info(  # type: ignore[no-untyped-call]
                    json.loads(secret), scopes=[scope]
                )
            else:
                found = google.auth.default(scopes=[scope])[0]
            found.refresh(Request())
        except exceptions.DefaultCredentialsError as error:
            raise BackendError(
                f"{what}: no Google credentials are found here; run: gcloud auth application-default login, "
                "set GOOGLE_APPLICATION_CREDENTIALS, or store a service account as the secret GCP_CREDENTIALS"
            ) from error
        except exceptions.TransportError as error:
            raise StorageTransientError(
                f"{what}: a token cannot be fetched: {one_line(str(error))}; try again later"
            ) from error
        except (exceptions.GoogleAuthError, ValueError, KeyError, TypeError) as error:
            said = one_line(str(error.args[0] if error.args else type(error).__name__))
            raise BackendError(f"{what}: the Google credentials were refused: {said}; renew them") from error
        expiry = found.expiry  # in UTC, without saying so
        ends = time.time() + 600 if expiry is None else expiry.replace(tzinfo=UTC).timestamp()
        return str(found.token), ends

    return Tokens(what, fetch)


def azure(what: str, scope: str) -> Tokens:
    """Tokens of Azure's default chain: variables, workload identity, managed identity, the az command."""

    def fetch() -> tuple[str, float]:
        try:
            from azure.core import exceptions
            from azure.identity import CredentialUnavailableError, DefaultAzureCredential
        except ImportError as error:
            raise BackendError(
                f"{what}: the connection string has no key, and azure-identity is not installed here: "
                "pip install 'flowagent[azure]'"
            ) from error
        try:
            with DefaultAzureCredential() as credential:
                token = credential.get_token(scope)
        except (CredentialUnavailableError, exceptions.ClientAuthenticationError) as error:
            raise BackendError(
                f"{what}: the connection string has no key, and no identity of Azure is found here; "
                "add AccountKey= or SharedAccessSignature=, or run: az login"
            ) from error
        except exceptions.AzureError as error:
            raise StorageTransientError(
                f"{what}: a token cannot be fetched: {one_line(str(error))}; try again later"
            ) from error
        return token.token, float(token.expires_on)

    return Tokens(what, fetch)

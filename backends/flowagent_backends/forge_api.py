"""The API of a forge, as one identity sees it: tokens, conditions, limits, and what its refusals mean."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from flowagent import http
from flowagent.backend import BackendContext
from flowagent.errors import BackendError, SecretError, StorageNotFoundError, StorageTransientError, one_line
from flowagent.redaction import Redactor
from flowagent_backends import answers
from flowagent_backends.forges import RepositoryBackend, is_sha
from flowagent_backends.remembered import Remembered

LARGEST_ANSWER = 1 << 20
"""Bytes of an answer that is neither a listing nor a file."""
MOST_CLOSED = 500
"""How many services, or tokens, are remembered to have been closed to us."""
LONGEST_LIMIT = 24 * 3600.0
"""Seconds that a service is believed to be closed to us, whatever it says."""


@dataclass(frozen=True)
class Token:
    """A credential, whose it is in words, and the headers that it is sent in. Kept for one call only."""

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    secret: str | None = None
    name: str = ""
    """Where it came from; empty: there is none."""
    values: tuple[str, ...] = field(default=(), repr=False)
    """What must not be shown, also if the service says it."""
    hint: str = "give access_token_secret="
    """What to do if there is none."""

    @property
    def who(self) -> str:
        return f"the token in {self.name}" if self.name else "anybody (there is no token)"


class Keyring:
    """The tokens that may go to the service at ``base``. Those that no storage names are for the service at
    ``public``, and for hosts that the operator names: else authors, who choose hosts, would choose who gets
    them."""

    def __init__(self, what: str, context: BackendContext, base: str, public: str) -> None:
        self._what = what
        self._context = context
        self._base = base
        self._host = _host(base)
        self._public = _host(public)
        named = {host.lower().removesuffix(":443") for host in context.token_hosts}
        self._ours = self._host in {self._public, *named}

    def token(self, named: str | None, fallback: str) -> Token:
        """The secret that the storage names, else the secret or variable ``fallback``, else none.

        :raises BackendError: as :meth:`value`."""
        value = self.value(named, fallback)
        if value is None:
            return Token(hint=self.hint(fallback))
        return Token({"Authorization": f"Bearer {value}"}, named, named or fallback, (value,))

    def value(self, named: str | None, fallback: str) -> str | None:
        """Such a secret, as it is sent.

        :raises BackendError: the one that the storage names is not set, or all on its way could read it."""
        name = named or fallback
        if named is None and not self._ours:
            return None
        value = self._find(named, fallback)
        if value is not None and not http.confidential(self._base):
            raise BackendError(
                f"{self._what}: the token in {name} would go to {http.shown(self._base)} for all to read; "
                "give an address with https://"
            )
        return value

    def _find(self, named: str | None, fallback: str) -> str | None:
        secrets, name = self._context.secrets, named or fallback
        # no other variable: authors of flows choose the name, and the host that it is sent to
        variable = (self._context.environ.get(fallback) or None) if name == fallback else None
        try:
            if secrets.origin(name) is not None:
                return secrets.get(name).strip("\r\n")  # a line break after a token belongs to its file
            if variable is not None and not self._ours:
                raise BackendError(
                    f"{self._what}: the variable {name} is not given to {self._host}: name that host in "
                    f"token_hosts, or store the token for it: flowagent secret set {name}"
                )
            return variable or (secrets.get(name) if named else None)
        except SecretError as error:
            raise BackendError(f"{self._what}: {error}") from None

    def hint(self, fallback: str) -> str:
        """What to do if a token is wanted, and there is none."""
        secrets = self._context.secrets
        if self._ours or not (self._context.environ.get(fallback) or secrets.origin(fallback)):
            return "give access_token_secret="
        return (
            f"give access_token_secret=, as the token in {fallback} is for {self._public} "
            f"and hosts in token_hosts, and {self._host} is none of them"
        )


def _host(address: str) -> str:
    """Host and port of an address, the latter if it is not the usual one."""
    parts = urlsplit(address)
    usual = {"https": 443, "http": 80}.get(parts.scheme)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    return host if parts.port in (None, usual) else f"{host}:{parts.port}"


def basic(user: str, password: str) -> dict[str, str]:
    """The header of HTTP Basic authentication (RFC 7617)."""
    pair = base64.b64encode(f"{user}:{password}".encode(errors="surrogateescape"))
    return {"Authorization": f"Basic {pair.decode()}"}


class ForgeBackend(RepositoryBackend):
    """A backend that speaks HTTP, with one client for all repositories and tokens."""

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        self._client: http.AsyncClient | None = None
        self.memory = Memory()

    @property
    def client(self) -> http.AsyncClient:
        if self._client is None:
            self._client = http.client()
        return self._client

    async def close(self) -> None:
        """Close its connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


@dataclass
class Memory:
    """What was learned from responses: tags and what they stand for, and limits that are used up."""

    answers: Remembered = field(default_factory=Remembered)
    closed: dict[tuple[str, str | None], tuple[float, str]] = field(default_factory=dict)

    def close(self, who: tuple[str, str | None], until: float, why: str) -> None:
        """Ask no more for this service and token ``until`` then."""
        self.closed = {key: kept for key, kept in self.closed.items() if kept[0] > time.time()}
        if len(self.closed) >= MOST_CLOSED:
            del self.closed[next(iter(self.closed))]
        self.closed[who] = until, why


class Api:
    """Requests to the API at ``base`` with one token. ``what`` begins all errors."""

    def __init__(self, backend: ForgeBackend, what: str, base: str, token: Token) -> None:
        self.what = what
        self.base = base
        self.token = token
        self._backend = backend
        self._memory = backend.memory
        self.headers: dict[str, str] = {}

    async def get(self, path: str, *, method: str = "GET", **more: Any) -> http.Response:
        """The response, whatever its status.

        :raises StorageTransientError: a limit is used up, or the service does not work now.
        :raises TooLargeError: it is larger than answers are; listings and files take another ``limit``."""
        request = self._request(method, path, **{"limit": LARGEST_ANSWER, **more})
        response = await http.send(self._backend.client, request)
        if response.status_code != 304:
            self._judge(response.status_code, response.headers, response.content)
        return response

    async def find(
        self, path: str, read: Callable[[http.Response], str], **more: Any
    ) -> tuple[http.Response, str]:
        """A response, and what ``read`` finds in one of success, in few words. That is all that is kept,
        so that its service need only say the next time that nothing has changed. Raises as :meth:`get`."""
        key = (self.base, self.token.name, path, more)
        tag, before = self._memory.answers.get(key) or ("", "")
        headers = {**more.get("headers", {}), **({"If-None-Match": tag} if tag else {})}
        response = await self.get(path, **{**more, "headers": headers})
        if response.status_code == 304:
            return response, before
        found = read(response) if response.status_code == 200 else ""
        if found and (tag := response.headers.get("etag", "")):
            self._memory.answers.put(key, tag, found)
        return response, found

    async def write(self, method: str, path: str, **more: Any) -> http.Response:
        """The response to a change, whatever its status."""
        response = await http.send(
            self._backend.client,
            self._request(method, path, **{"repeatable": False, "limit": LARGEST_ANSWER, **more}),
        )
        self._judge(response.status_code, response.headers, response.content)
        return response

    async def download(self, path: str, target: Path, limit: int, **more: Any) -> http.Downloaded:
        """The body of a 200 into a file; what came otherwise, whatever its status."""
        request = self._request("GET", path, limit=limit, **more)
        got = await http.download(self._backend.client, request, target)
        self._judge(got.status, got.headers, got.body)
        return got

    def _request(self, method: str, path: str, **more: Any) -> http.Request:
        until, why = self._memory.closed.get((self.base, self.token.name), (0.0, ""))
        if until > time.time():  # to go on asking makes it worse, say the forges
            raise StorageTransientError(f"{self.what}: {why}")
        headers = {**self.headers, **self.token.headers, **more.pop("headers", {})}
        return http.Request(
            self.what,
            method,
            path if path.startswith(f"{self.base}/") else f"{self.base}{path}",
            headers=headers,
            passing=limited,
            **{"follow": True, **more},
        )

    def read(self, response: http.Response) -> Any:
        """The JSON of a response. :raises BackendError: it is none."""
        return answers.read(self.what, response.content)

    # -- refusals ------------------------------------------------------------------------------------

    def _judge(self, status: int, headers: http.Headers, body: bytes) -> None:
        """:raises StorageTransientError: for what passes by itself."""
        wait = limited(status, headers)
        if wait is None:
            return
        if status >= 500 or status == 408:
            because = said(body, self.token.values)
            raise StorageTransientError(
                f"{self.what}: {http.shown(self.base)} answers {status}{because}; try again later"
            )
        until = time.time() + min(wait or 60.0, LONGEST_LIMIT)
        clock = datetime.fromtimestamp(until, UTC).strftime("%H:%M:%S UTC")
        hint = "wait, or ask less often" if self.token.name else f"wait, or {self.token.hint}"
        why = f"the rate limit for {self.token.who} is used up until {clock}; {hint}"
        self._memory.close((self.base, self.token.name), until, why)
        raise StorageTransientError(f"{self.what}: {why}")

    def refusal(self, status: int, headers: http.Headers, body: bytes, doing: str) -> BackendError:
        """What a response that is no success means; ``doing`` is like ``"reading flows/etl.py"``."""
        because = said(body, self.token.values)
        name = self.token.name
        if status == 401 and name:
            return BackendError(
                f"{self.what}: the token in {name} is not accepted (401{because}): it is wrong, "
                f"expired or revoked; store a new one: flowagent secret set {name}"
            )
        if status in (401, 403) and not name:
            return BackendError(f"{self.what}: {doing} takes a token ({status}{because}); {self.token.hint}")
        if status == 403 and (sso := headers.get("x-github-sso", "")).startswith("required"):
            return BackendError(
                f"{self.what}: the token in {name} is not authorized for the organization's single sign-on "
                f"({'see ' + one_line(sso.partition('url=')[2]) if 'url=' in sso else '403'})"
            )
        if status == 403:
            return BackendError(
                f"{self.what}: {doing} is not allowed with the token in {name} (403{because}); "
                "give it the right to, or use another token"
            )
        return BackendError(f"{self.what}: {doing} failed ({status}{because}); check the storage's arguments")

    def hidden(self) -> StorageNotFoundError:
        """A repository that is not there, or that services say is not there to those who may not see it."""
        hint = (
            f"check the name, and what the token in {self.token.name} may read"
            if self.token.name
            else f"check the name, or if it is private, {self.token.hint}"
        )
        return StorageNotFoundError(f"{self.what}: there is no such repository, or it is private; {hint}")

    def no_ref(self, ref: str | None) -> StorageNotFoundError:
        return StorageNotFoundError(
            f"{self.what}: no branch, tag or commit {ref}; push it, or correct the reference"
        )

    def empty(self) -> StorageNotFoundError:
        return StorageNotFoundError(f"{self.what}: the repository is empty; push the flow to it")

    def sha(self, value: Any) -> str:
        """:raises BackendError: what the service answers is no commit."""
        if not is_sha(value):
            raise BackendError(
                f"{self.what}: {http.shown(self.base)} answers with what is no commit; check that address"
            )
        return str(value)


def limited(status: int, headers: http.Headers) -> float | None:
    """As :func:`http.passing`, and for the limits that GitHub and others tell by headers: 403 or 429, with
    nothing left until a time."""
    after = http.retry_after(headers)
    if status == 403 and after is not None:
        return after
    if status in (403, 429) and headers.get("x-ratelimit-remaining", "").strip() == "0":
        reset = headers.get("x-ratelimit-reset", "").strip()
        if after is None and reset.isascii() and reset.isdigit():
            return max(1.0, float(reset) - time.time())
        return after or 60.0
    return http.passing(status, headers)


def quoted(path: str, safe: str = "") -> str:
    """A value within a path of an URL."""
    return quote(path, safe=safe)


def said(body: bytes, hidden: Iterable[str]) -> str:
    """What a refusal says of itself, after a colon, within a line, and without ``hidden`` values."""
    message = one_line(Redactor(hidden).redact(_message(body)), 200).rstrip(".")
    return f": {message}" if message else ""


def _message(body: bytes) -> str:
    found = answers.refusal(body)
    for name in ("message", "error_description", "error_summary", "errors", "error"):
        value = found.get(name) if isinstance(found, dict) else None
        value = value[0] if isinstance(value, list) and value else value
        value = value.get("message") if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            return value
    return ""

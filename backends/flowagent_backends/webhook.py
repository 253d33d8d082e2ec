"""Webhook storage: one HTTP request stores a flow, another fetches it, as their declaration says."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from anyio import to_thread

from flowagent import files, http
from flowagent.backend import Artifact, BackendContext, Entry, Features, Revision
from flowagent.errors import BackendError, SecretError, StorageNotFoundError, StorageTransientError
from flowagent.models import Json
from flowagent_backends import artifacts, declared
from flowagent_backends.code_only import CodeOnly
from flowagent_backends.forge_api import basic, said
from flowagent_backends.remembered import Remembered
from flowagent_backends.turns import Turns

SCRIPT = "flow.py"
"""The file of a script whose own name is not known."""
LARGEST_SCRIPT = 16 << 20
MOST_KEPT = 32 << 20
"""How many bytes of scripts are kept between resolving and materialising."""
_TEMPLATE = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)\})")
_OURS = "FLOWAGENT_"
_HARMLESS = ("accept", "content-", "user-agent")
"""Beginnings of the names of headers that may go along to another host."""


class WebhookBackend(CodeOnly):
    """Pickles, scripts and bundles behind any HTTP service."""

    type = "Webhook"
    features = Features(
        kinds=("pickle", "script", "bundle"),
        revision="its sha-256 digest",
        credentials="`${NAME}` in its requests: variables of the environment, secrets",
    )

    def __init__(self, context: BackendContext) -> None:
        self._context = context
        self._http: http.AsyncClient | None = None
        self._turns: Turns[str] = Turns()
        self._answers = Remembered()
        """By place, what a service gave, and the header that asks whether it has changed."""
        self._scripts: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    async def resolve(self, storage: Mapping[str, Json]) -> Revision:
        """Pickles and bundles: the digest they were registered with. A script: the digest of what the service
        gives now, which is kept for materialising, and asked for with a condition the next time.

        :raises StorageNotFoundError: the service has none."""
        storage = declared.storage(storage)
        place = _place(storage)
        known = artifacts.pinned(storage, place)
        if known is not None:
            return known
        if storage.get("stored_as_script"):
            revision = f"sha256:{await self._turns.ask(place, lambda: self._script(storage, place))}"
            return Revision(
                revision, Entry("script", _name(storage)), key=f"{place} {revision} {_name(storage)}"
            )
        raise BackendError("Webhook: the flow was never registered as a pickle; register it again")

    async def materialise(self, storage: Mapping[str, Json], revision: Revision, directory: Path) -> None:
        """Fetch a pickle, or a bundle and unpack it, or put the script there that was resolved.

        :raises BackendError: it is not what was registered."""
        storage = declared.storage(storage)
        if artifacts.pinned(storage) is not None:
            await self._fetch(storage, directory)
            return
        place, sha256 = _place(storage), revision.id.removeprefix("sha256:")
        if (place, sha256) not in self._scripts:
            self._answers.forget(place)  # or it would only say that it is the same
            await self._script(storage, place)
        script = self._scripts.get((place, sha256))
        if script is None:
            raise StorageTransientError(
                f"Webhook: {_where(storage['get_flow_request_kwargs'])} gives another script "
                "than a moment ago; try again"
            )
        await to_thread.run_sync(files.write, directory / _name(storage), [script])

    async def upload(self, storage: Mapping[str, Json], artifact: Artifact) -> dict[str, Json]:
        """Send the flow as the body of the request that stores it. :raises BackendError: it is refused."""
        content: bytes | Path
        if artifact.kind == "pickle":
            assert artifact.data is not None
            content = artifact.data
            size, sha256 = len(content), artifact.sha256 or hashlib.sha256(content).hexdigest()
        elif artifact.kind == "bundle":
            assert artifact.path is not None
            content = artifact.path
            size, sha256 = await to_thread.run_sync(artifacts.digest, content)
        else:
            content = _script_path(storage, artifact)
            size, sha256 = await to_thread.run_sync(_digest, content, artifact)
        arguments, method = storage["build_request_kwargs"], storage["build_request_http_method"]
        with self._context.progress(f"storing flow {artifact.flow_name}", size) as advance:
            request = self._request(
                "build_request_kwargs", arguments, method, content=content, advance=advance
            )
            response = await http.send(self._client, request)
        if not 200 <= response.status_code < 300:
            raise _refusal(arguments, response.status_code, self._said(arguments, response.content))
        entry = artifact.entry or (content.name if isinstance(content, Path) else None)
        described = artifacts.describe(replace(artifact, sha256=sha256, entry=entry), size)
        return {**storage, "artifact": described}

    async def close(self) -> None:
        """Close the connections."""
        client, self._http = self._http, None
        if client is not None:
            await client.aclose()

    # -- what the service gives --------------------------------------------------------------------------

    async def _script(self, storage: Mapping[str, Json], place: str) -> str:
        """The digest of the script that is there now."""
        arguments, method = storage["get_flow_request_kwargs"], storage["get_flow_request_http_method"]
        known, *asks = self._answers.get(place) or ("", "", "")
        conditional = {"if-none-match", "if-modified-since"} & {
            key.lower() for key in arguments.get("headers", ())
        }
        condition = (asks[0], asks[1]) if known and method == "GET" and not conditional else None
        limit = min(LARGEST_SCRIPT, self._context.max_source)
        request = self._request(
            "get_flow_request_kwargs", arguments, method, condition=condition, limit=limit
        )
        response = await http.send(self._client, request)
        if response.status_code == 304 and condition is not None:
            return known
        if response.status_code != 200:
            raise _refusal(arguments, response.status_code, self._said(arguments, response.content))
        sha256 = hashlib.sha256(response.content).hexdigest()
        self._answers.forget(place)
        if given := _condition(response.headers):
            self._answers.put(place, sha256, *given)
        self._keep((place, sha256), response.content)
        return sha256

    def _keep(self, key: tuple[str, str], script: bytes) -> None:
        self._scripts[key] = script
        self._scripts.move_to_end(key)
        kept = sum(map(len, self._scripts.values()))
        while kept > MOST_KEPT and len(self._scripts) > 1:
            kept -= len(self._scripts.popitem(last=False)[1])

    async def _fetch(self, storage: Mapping[str, Json], directory: Path) -> None:
        arguments, method = storage["get_flow_request_kwargs"], storage["get_flow_request_http_method"]
        limit = self._context.max_source
        request = self._request("get_flow_request_kwargs", arguments, method, limit=limit)
        target = directory / f".{secrets.token_hex(8)}"
        with self._context.progress("fetching a flow", storage["artifact"].get("size")) as advance:
            got = await http.download(self._client, request, target, advance=advance)
        if got.status != 200:
            raise _refusal(arguments, got.status, self._said(arguments, got.body))
        what = f"Webhook: what {_where(arguments)} gives"
        await to_thread.run_sync(artifacts.settle, what, storage, target, got.sha256, directory)

    # -- requests ----------------------------------------------------------------------------------------

    @property
    def _client(self) -> http.AsyncClient:
        if self._http is None:
            self._http = http.client()
        return self._http

    def _request(self, name: str, arguments: Mapping[str, Any], method: str, **more: Any) -> http.Request:
        """The request, with the values of its templates; nobody keeps it.

        :raises BackendError: one is missing, or must not go there, or none of this can be sent."""
        try:
            return self._filled(name, arguments, method, **more)
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # which may hold a value
            raise BackendError(
                f"Webhook: {_where(arguments)}: {name} holds what cannot be sent ({type(error).__name__}); "
                "correct the storage's arguments"
            ) from None

    def _filled(
        self,
        name: str,
        arguments: Mapping[str, Any],
        method: str,
        *,
        content: bytes | Path | None = None,
        condition: tuple[str, str] | None = None,
        **more: Any,
    ) -> http.Request:
        what = f"Webhook: {_where(arguments)}"
        values = _Values(what, name, self._context)
        given = values.fill(arguments)
        if values.told and not http.confidential(given["url"]):
            raise BackendError(
                f"{what}: the value of {values.told[0]} would go there for all to read; "
                "give an address with https://"
            )
        headers = {str(key): str(value) for key, value in (given.get("headers") or {}).items()}
        present = {key.lower() for key in headers}
        body, media = _body(given) if content is None else (content, None)
        added = {"Content-Type": media} if media else {}
        if given.get("cookies"):
            added["Cookie"] = "; ".join(f"{key}={value}" for key, value in given["cookies"].items())
        if given.get("auth"):
            added |= basic(*given["auth"])
        added |= dict([condition]) if condition else {}
        headers |= {key: value for key, value in added.items() if key.lower() not in present}
        return http.Request(
            "Webhook",
            method,
            _with_params(given["url"], given.get("params") or {}),
            headers=headers,
            content=body,
            private=[key for key in headers if not key.lower().startswith(_HARMLESS)],
            # to fetch is harmless, says who declares it, whatever the method
            repeatable=True if content is None else None,
            follow=given.get("allow_redirects", True),
            deadline=given.get("timeout") or http.PATIENCE,
            where=_where(arguments),
            **more,
        )

    def _said(self, arguments: Mapping[str, Any], body: bytes) -> str:
        """What a refusal says, without the values of templates."""
        values = _Values("Webhook", "", self._context)
        hidden = []
        for name in _names(arguments):
            with suppress(SecretError):
                hidden.append((values.find(name) or "").strip())
        return said(body, hidden)


class _Values:
    """The values of ``${NAME}``: of the environment, else of the secrets."""

    def __init__(self, what: str, name: str, context: BackendContext) -> None:
        self._what = what
        self._name = name
        self._context = context
        self.told: list[str] = []
        """The names of those that nobody else should read: all secrets, and what a header or cookie holds."""

    def fill(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with all values in their strings, at any depth. Line breaks after a value, which
        come from its file, are for bodies only.

        :raises BackendError: there is no such variable or secret."""
        return {
            key: self._filled(value, key, strip=key not in ("json", "data"))
            for key, value in arguments.items()
        }

    def _filled(self, value: Any, at: str, *, strip: bool) -> Any:
        if isinstance(value, str):

            def put(found: re.Match[str]) -> str:
                return "$" if found[1] is None else self._value(found[1], at, strip=strip)

            return _TEMPLATE.sub(put, value)
        if isinstance(value, Mapping):
            return {key: self._filled(item, f"{at}.{key}", strip=strip) for key, item in value.items()}
        if isinstance(value, list):
            return [self._filled(item, at, strip=strip) for item in value]
        return value

    def _value(self, name: str, at: str, *, strip: bool) -> str:
        try:
            value = self.find(name)
        except SecretError as error:
            raise BackendError(f"{self._what}: {error}") from None
        if value is None:
            raise BackendError(
                f"{self._what}: ${{{name}}} in {self._name} ({at}) is neither a variable nor a secret here; "
                f"on this machine, run: flowagent secret set {name}"
            )
        credential = at.partition(".")[0] in ("headers", "cookies", "auth")
        if credential or not self._is_variable(name):
            self.told.append(name)
        return value.rstrip("\r\n") if strip else value

    def find(self, name: str) -> str | None:
        if self._is_variable(name):
            return self._context.environ[name]
        secrets = self._context.secrets
        return secrets.get(name) if secrets.origin(name) is not None else None

    def _is_variable(self, name: str) -> bool:
        # our own variables hold the store's password, and secrets under another name
        return not name.startswith(_OURS) and name in self._context.environ


def _names(value: Any) -> Iterator[str]:
    """The names in all templates."""
    if isinstance(value, str):
        yield from (found[1] for found in _TEMPLATE.finditer(value) if found[1])
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _names(item)
    elif isinstance(value, list):
        for item in value:
            yield from _names(item)


def _body(given: Mapping[str, Any]) -> tuple[bytes | None, str | None]:
    """The body of a request that fetches, and its media type, as requests has them."""
    if given.get("json") is not None:
        return json.dumps(given["json"]).encode(), "application/json"
    data = given.get("data")
    if isinstance(data, Mapping) and set(data) == {"$bytes"}:
        return base64.b64decode(data["$bytes"]), None
    if isinstance(data, Mapping):
        return urlencode(data, doseq=True).encode(), "application/x-www-form-urlencoded"
    return (None if data is None else str(data).encode(errors="surrogateescape")), None


def _with_params(url: str, params: Mapping[str, Any]) -> str:
    if not params:
        return url
    base, mark, fragment = url.partition("#")
    return f"{base}{'&' if '?' in base else '?'}{urlencode(params, quote_via=quote)}{mark}{fragment}"


def _condition(headers: http.Headers) -> tuple[str, str] | None:
    """The header that asks whether something has changed (RFC 9110)."""
    if tag := headers.get("etag"):
        return "If-None-Match", tag
    return ("If-Modified-Since", changed) if (changed := headers.get("last-modified")) else None


# -- declarations ----------------------------------------------------------------------------------------


def _place(storage: Mapping[str, Json]) -> str:
    """What a script depends on: the request that fetches it, as it was declared."""
    request = [storage["get_flow_request_http_method"], storage["get_flow_request_kwargs"]]
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _where(arguments: Mapping[str, Any]) -> str:
    """The address as declared, without what may be secret in it."""
    address = re.split(r"[?#]", arguments["url"], maxsplit=1)[0]
    return re.sub(r"//[^/]*@", "//", address)


def _name(storage: Mapping[str, Json]) -> str:
    name: str = (artifacts.registered(storage) or {}).get("entry", SCRIPT)
    return name


def _script_path(storage: Mapping[str, Json], artifact: Artifact) -> Path:
    declared = storage.get("flow_script_path") or artifact.path
    if declared is None:
        raise BackendError(
            f"Webhook: flow {artifact.flow_name!r} comes from no file; name its script with flow_script_path="
        )
    return Path(declared)


def _digest(path: Path, artifact: Artifact) -> tuple[int, str]:
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), sha256
    except OSError as error:
        raise BackendError(
            f"Webhook: script {path} of flow {artifact.flow_name!r} cannot be read: {error.strerror}"
        ) from error


def _refusal(arguments: Mapping[str, Any], status: int, because: str) -> BackendError:
    where = _where(arguments)
    if http.passing(status, http.Headers()) is not None:
        return StorageTransientError(f"Webhook: {where} answers {status}{because}; try again later")
    if status in (401, 403):
        names = ", ".join(dict.fromkeys(_names(arguments)))
        hint = f"check the value of {names}" if names else "give it credentials, as ${NAME}"
        return BackendError(f"Webhook: {where} refuses the request ({status}{because}); {hint}")
    if status in (404, 410):
        return StorageNotFoundError(
            f"Webhook: {where} has no such flow ({status}{because}); register it again"
        )
    return BackendError(f"Webhook: {where} answers {status}{because}; check the storage's arguments")

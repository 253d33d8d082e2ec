"""A client of the Kubernetes API: plain JSON objects over HTTP.

lightkube finds the cluster and its credentials, and renews these. Its typed objects stay out of it: fields of
users' templates that it does not know would be lost in them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from flowagent.errors import FlowagentError, SettingsError, one_line
from flowagent.kubernetes.names import Account, account_of, is_label

if TYPE_CHECKING:
    import httpx2
    from lightkube.config.kubeconfig import SingleConfig

TIMEOUT = 20.0
"""Seconds that the API may take to answer."""
WATCHED = 240
"""Seconds after which the API is to end a watch, so that one which nobody serves any more is noticed."""
EXTRA = "install flowagent[kubernetes]"
MERGE = "application/merge-patch+json"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PATHS = frozenset({"certificate-authority", "client-certificate", "client-key", "tokenFile"})
"""What is a path in a kubeconfig."""
EXEC_VERSION = "client.authentication.k8s.io/v1"


class ClusterError(FlowagentError):
    """The API refused or failed; ``status`` is HTTP's, 0 if it could not be reached at all."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.retryable = status in (0, 401, 408, 409, 429) or status >= 500


class Cluster:
    """One namespace of one cluster: that of ``KUBECONFIG``, else of the pod that this runs in, else of
    ``~/.kube/config``. ``namespace`` None: the one that is named there. ``account``: the service account
    that is used, if it is known to be one.

    :raises SettingsError: there is none, or what is written there cannot be used."""

    def __init__(
        self,
        namespace: str | None = None,
        context: str | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        try:
            import httpx2
            from lightkube.config import client_adapter
            from lightkube.core.exceptions import ConfigError
        except ImportError as error:
            raise SettingsError(f"Kubernetes takes a package that is not installed: {EXTRA}") from error
        config = _config(context, environ)
        self.namespace = namespace or config.namespace or "default"
        if not is_label(self.namespace):
            raise SettingsError(f"{self.namespace[:100]!r} is no name of a namespace; correct it")
        timeout = httpx2.Timeout(TIMEOUT)
        try:
            params = client_adapter.ConnectionParams(timeout=timeout)
            options = {**params.httpx_params(config), "timeout": timeout}
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
            self._http = httpx2.AsyncClient(**options, limits=limits)
        except Exception as error:  # of many kinds: certificates, keys, addresses, what lightkube asserts
            raise SettingsError(f"{_source(config)} cannot be used: {one_line(str(error), 300)}") from error
        self._errors = (httpx2.HTTPError, ConfigError, TimeoutError, OSError)
        self.url = config.cluster.server
        self.account = _account(config)
        self._ahead = 0.0  # seconds that the cluster's clock is ahead of this machine's

    async def close(self) -> None:
        await self._http.aclose()

    def now(self) -> float:
        """The time by the cluster's clock, as it was told with the last answer."""
        return time.time() + self._ahead

    def path(self, plural: str, name: str | None = None, group: str = "api/v1") -> str:
        """Of objects in the namespace, or of one of them; ``group`` is like ``"apis/batch/v1"``."""
        return f"/{group}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        kind: str = "application/json",
    ) -> Any:
        """The object that is answered. ``kind`` is the media type of ``body``.

        :raises ClusterError: the API says no, or does not answer."""
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": kind}
        with self._reaching():
            with anyio.fail_after(2 * TIMEOUT):
                response = await self._http.request(
                    method, path, params=_query(params), content=content, headers=headers
                )
        self._note_time(response)
        _check(response.status_code, response.content)
        try:
            return response.json()
        except ValueError:
            return response.text

    @asynccontextmanager
    async def stream(
        self, path: str, params: Mapping[str, Any], *, silence: float | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """An answer as it comes. ``silence``: seconds without a byte that are too long; None: any are fine.

        :raises ClusterError: the API says no, or breaks off."""
        import httpx2

        timeout = httpx2.Timeout(TIMEOUT, read=silence)
        request = self._http.build_request("GET", path, params=_query(params), timeout=timeout)
        with self._reaching():
            response = await self._http.send(request, stream=True)
        try:
            with self._reaching():
                if response.status_code >= 400:
                    _check(response.status_code, await response.aread())
            yield self._pieces(response)
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(5):
                await response.aclose()

    async def _pieces(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        pieces = response.aiter_bytes()
        while True:
            with self._reaching():
                piece = await anext(pieces, None)
            if piece is None:
                return
            yield piece

    async def watch(self, path: str, params: Mapping[str, Any]) -> AsyncIterator[list[dict[str, Any]]]:
        """The objects that a list has: now, and whenever one of them has changed, until the API fails.

        :raises ClusterError: it does."""
        while True:
            listed = await self.call("GET", path, params=params)
            objects = {each["metadata"]["uid"]: each for each in listed.get("items") or ()}
            yield list(objects.values())
            since = {"watch": "true", "timeoutSeconds": WATCHED, "allowWatchBookmarks": "true"}
            since["resourceVersion"] = listed["metadata"]["resourceVersion"]
            with suppress(_OutdatedError):
                async with self.stream(path, {**params, **since}, silence=WATCHED + TIMEOUT) as pieces:
                    async for event in _events(pieces):
                        if event["type"] == "BOOKMARK":
                            continue
                        changed = event["object"]
                        if event["type"] == "DELETED":
                            objects.pop(changed["metadata"]["uid"], None)
                        else:
                            objects[changed["metadata"]["uid"]] = changed
                        yield list(objects.values())

    def _note_time(self, response: httpx2.Response) -> None:
        with suppress(LookupError, ValueError):
            self._ahead = parsedate_to_datetime(response.headers["date"]).timestamp() - time.time()

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            why = one_line(str(error), 300) or "it did not answer in time"
            raise ClusterError(f"the Kubernetes API at {self.url} cannot be reached: {why}") from error


class _OutdatedError(Exception):
    """A watch that cannot go on: what it began with is too long ago."""


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    pending = b""
    async for piece in pieces:
        *lines, pending = (pending + piece).split(b"\n")
        for line in filter(None, lines):
            event = json.loads(line)
            if event["type"] == "ERROR":
                raise _OutdatedError
            yield event


def _query(params: Mapping[str, Any] | None) -> dict[str, str]:
    return {name: str(value) for name, value in (params or {}).items() if value is not None}


def _check(status: int, content: bytes) -> None:
    if status < 400:
        return
    try:
        said = str(json.loads(content)["message"])
    except (ValueError, LookupError, TypeError):
        said = content.decode(errors="replace")
    raise ClusterError(one_line(said, 1000) or f"HTTP {status}", status)


# -- where the cluster is ------------------------------------------------------------------------------


def _config(context: str | None, environ: Mapping[str, str]) -> SingleConfig:
    from lightkube.config.kubeconfig import KubeConfig

    files = kubeconfigs(environ)
    in_pod = environ.get("KUBERNETES_SERVICE_HOST") and (SERVICE_ACCOUNT / "token").exists()
    if not files and not in_pod:
        raise SettingsError(
            "no Kubernetes cluster: this is no pod with a service account, and there is no kubeconfig; "
            "set KUBECONFIG to one"
        )
    by_file = files and (bool(environ.get("KUBECONFIG")) or not in_pod)
    where = os.pathsep.join(map(str, files)) if by_file else str(SERVICE_ACCOUNT)
    try:
        if by_file:
            one = len(files) == 1
            known = KubeConfig.from_file(files[0]) if one else KubeConfig.from_dict(_merged(files), files[0])
            found = known.get(context)
        else:
            found = KubeConfig.from_service_account(SERVICE_ACCOUNT).get(context)
        assert found is not None and found.user is not None, "it names no user"
        plugin = found.user.exec
        if plugin is not None and plugin.apiVersion == EXEC_VERSION:
            plugin.apiVersion += "beta1"  # what comes back is the same
    except Exception as error:  # not YAML, a part of it missing, or not to be read
        raise SettingsError(f"{where} cannot be used: {_said(error)}; see kubectl config view") from error
    return found


def _merged(files: Sequence[Path]) -> dict[str, Any]:
    """What several kubeconfigs are together, as for kubectl: of entries with the same name the first, with
    paths relative to its own file. Each may have a part only."""
    import yaml

    found: dict[str, Any] = {"clusters": {}, "contexts": {}, "users": {}}
    for file in files:
        part = yaml.safe_load(file.read_text("utf-8")) or {}
        found["current-context"] = found.get("current-context") or part.get("current-context")
        for kind in ("clusters", "contexts", "users"):
            for entry in part.get(kind) or ():
                found[kind].setdefault(entry["name"], _located(entry, kind.removesuffix("s"), file))
    return {key: list(value.values()) if isinstance(value, dict) else value for key, value in found.items()}


def _located(entry: Mapping[str, Any], kind: str, file: Path) -> dict[str, Any]:
    body = dict(entry.get(kind) or {})
    for name in PATHS & body.keys():
        body[name] = str(file.parent.absolute() / body[name])
    return {**entry, kind: body}


def _account(config: SingleConfig) -> Account | None:
    """Whose token is used, as far as one can tell from here."""
    user = config.user
    if user is None or user.token or not user.token_file:
        return account_of(user.token if user else None)
    try:
        return account_of(Path(config.abs_file(user.token_file)).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _said(error: Exception) -> str:
    if isinstance(error, LookupError):
        return f"it has no {error}"
    if isinstance(error, (AttributeError, TypeError)):  # a list for a table, nothing for a list
        return "it is not made like a kubeconfig"
    return one_line(str(error), 300) or type(error).__name__


def _source(config: SingleConfig) -> str:
    return str(config.fname or SERVICE_ACCOUNT)


def kubeconfigs(environ: Mapping[str, str]) -> list[Path]:
    """Those of the kubeconfigs that are there which ``KUBECONFIG`` lists, or the usual one."""
    listed = environ.get("KUBECONFIG") or "~/.kube/config"
    files = (Path(file).expanduser() for file in listed.split(os.pathsep) if file)
    return [file for file in files if file.exists()]

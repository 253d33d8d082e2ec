"""Credentials of registries, where ``docker login`` leaves them: ``$DOCKER_CONFIG/config.json``, and the
credential helpers that it names. They are read when they are needed, and never kept."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import anyio

from flowagent.docker.config import read
from flowagent.docker.references import HUB
from flowagent.errors import BackendError

HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", HUB)
"""Under which names the hub's credentials are kept."""
HELPER_TIMEOUT = 20.0
"""Seconds that a credential helper may take."""


async def registry_auth(registry: str, environ: Mapping[str, str] = os.environ) -> str:
    """The value of the header X-Registry-Auth for a registry; that of nobody if there are no credentials.

    :raises BackendError: the file or the helper is broken."""
    return _header(await _credentials(registry, environ))


async def build_auth(registries: Iterable[str], environ: Mapping[str, str] = os.environ) -> str:
    """The value of the header X-Registry-Config for a build that pulls from these registries.

    :raises BackendError: the file or a helper is broken."""
    found = {registry: await _credentials(registry, environ) for registry in sorted(set(registries))}
    # the engine knows the hub by its first name only (Engine API, ImageBuild)
    return _header({HUB_KEYS[0] if name == HUB else name: login for name, login in found.items() if login})


async def _credentials(registry: str, environ: Mapping[str, str]) -> dict[str, str]:
    path, config = read(environ)
    keys = HUB_KEYS if registry == HUB else (registry, f"https://{registry}", f"https://{registry}/v1/")
    helpers, store = config.get("credHelpers") or {}, config.get("credsStore")
    for key in keys:
        helper = helpers.get(key) or store
        if helper and (found := await _from_helper(str(helper), key)):
            return {**found, "serveraddress": key}
        entry = (config.get("auths") or {}).get(key)
        if entry and (found := _from_entry(entry, path)):
            return {**found, "serveraddress": key}
    return {}


def _from_entry(entry: Mapping[str, Any], path: Path) -> dict[str, str]:
    if entry.get("identitytoken"):
        return {"identitytoken": str(entry["identitytoken"])}
    if not entry.get("auth"):
        return {}
    try:
        user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
    except (ValueError, TypeError):
        raise BackendError(f"{path} holds credentials that are none; log in again") from None
    return {"username": user, "password": password}


async def _from_helper(helper: str, key: str) -> dict[str, str]:
    name = f"docker-credential-{helper}"
    program = shutil.which(name) if re.fullmatch(r"[A-Za-z0-9_.-]+", helper) else None
    if program is None:
        raise BackendError(
            f"the credential helper {name} is not installed; install it, or log in without one"
        )
    try:
        with anyio.fail_after(HELPER_TIMEOUT):
            done = await anyio.run_process([program, "get"], input=key.encode(), check=False)
    except TimeoutError:
        raise BackendError(
            f"the credential helper {name} does not answer; run it by hand: {name} get"
        ) from None
    if done.returncode:
        return {}  # it has none for this registry
    try:
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, LookupError, TypeError):
        raise BackendError(f"the credential helper {name} did not answer with credentials") from None
    return {"identitytoken": secret} if user == "<token>" else {"username": user, "password": secret}


def _header(credentials: Mapping[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(dict(credentials)).encode()).decode()

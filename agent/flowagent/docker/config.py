"""The ``docker`` command's configuration, ``$DOCKER_CONFIG/config.json``, and where it says the engine is."""

from __future__ import annotations

import hashlib
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowagent.errors import BackendError, SettingsError

DEFAULT = "unix:///var/run/docker.sock"
DEFAULT_CONTEXT = "default"
"""The context that is in no file: the environment, or the usual socket."""
CERTIFICATES = ("ca.pem", "cert.pem", "key.pem")
TABLES = {"auths": dict, "credHelpers": str}
"""What is read of the configuration that has entries of one kind."""
WORDS = ("credsStore", "currentContext")


@dataclass(frozen=True)
class Endpoint:
    """Where an engine is. ``certificates``: a directory of them; None: it is spoken to without TLS.
    ``verified``: whether its own certificate has to be good. ``partial``: the directory may lack some."""

    url: str
    certificates: Path | None = None
    verified: bool = True
    partial: bool = False

    def tls(self) -> ssl.SSLContext:
        """:raises SettingsError: the certificates cannot be used."""
        directory = self.certificates or Path("~/.docker").expanduser()
        ca, cert, key = (directory / name for name in CERTIFICATES)
        try:
            context = ssl.create_default_context(cafile=str(ca) if self._has(ca) else None)
            if not self.verified:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if self._has(cert):
                context.load_cert_chain(cert, key)
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"the certificates of the engine in {directory} cannot be used: {error}"
            ) from None
        return context

    def _has(self, file: Path) -> bool:
        return not self.partial or file.exists()


def directory(environ: Mapping[str, str]) -> Path:
    """Where the ``docker`` command keeps its configuration."""
    return Path(environ.get("DOCKER_CONFIG") or Path.home() / ".docker")


def read(environ: Mapping[str, str]) -> tuple[Path, dict[str, Any]]:
    """The configuration and its file; it is empty if there is none.

    :raises BackendError: it is not what ``docker`` writes."""
    path = directory(environ) / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        _check(config)
    except (FileNotFoundError, NotADirectoryError):
        return path, {}
    except (OSError, ValueError, RecursionError) as error:
        raise BackendError(f"{path} cannot be read: {error}; correct it, or log in again") from None
    return path, config


def _check(config: Any) -> None:
    """:raises ValueError: something that is read has another shape than it should."""
    if not isinstance(config, dict):
        raise ValueError("it holds no JSON object")
    for name, kind in TABLES.items():
        table = config.get(name)
        if table is None:
            continue
        if not isinstance(table, dict) or not all(isinstance(each, kind) for each in table.values()):
            raise ValueError(f"{name} in it is no table of {'tables' if kind is dict else 'strings'}")
    for name in WORDS:
        if not isinstance(config.get(name) or "", str):
            raise ValueError(f"{name} in it is no string")


def endpoint(environ: Mapping[str, str]) -> Endpoint:
    """The engine that the ``docker`` command goes to: ``DOCKER_HOST``, else the context that
    ``DOCKER_CONTEXT`` or the configuration names, else the usual socket.

    :raises BackendError: the configuration cannot be read.
    :raises SettingsError: there is no such context, or it is none of an engine that can be reached."""
    if host := environ.get("DOCKER_HOST"):
        return of_url(host, environ)
    name = environ.get("DOCKER_CONTEXT") or read(environ)[1].get("currentContext") or DEFAULT_CONTEXT
    return of_url(DEFAULT, environ) if name == DEFAULT_CONTEXT else _of_context(name, environ)


def of_url(url: str, environ: Mapping[str, str]) -> Endpoint:
    """An engine by its URL, with the certificates that the environment names for it."""
    secure = bool(environ.get("DOCKER_TLS_VERIFY")) or url.startswith("https://")
    named = Path(environ.get("DOCKER_CERT_PATH") or "~/.docker").expanduser()
    return Endpoint(url, named if secure else None)


def _of_context(name: str, environ: Mapping[str, str]) -> Endpoint:
    key = hashlib.sha256(name.encode()).hexdigest()  # how docker names a context's directories
    place = directory(environ) / "contexts"
    path = place / "meta" / key / "meta.json"
    try:
        found = json.loads(path.read_text("utf-8"))["Endpoints"]["docker"]
        url, unverified = found.get("Host") or DEFAULT, found.get("SkipTLSVerify", False)
        if not isinstance(url, str):
            raise TypeError
    except (FileNotFoundError, NotADirectoryError):
        raise SettingsError(
            f"the Docker context {name!r} does not exist; choose one: docker context use NAME"
        ) from None
    except OSError as error:
        raise SettingsError(f"the Docker context {name!r} cannot be read: {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise SettingsError(
            f"the Docker context {name!r} cannot be read: {path} names no engine; make it anew: "
            "docker context create"
        ) from None
    if url.startswith("ssh://"):
        raise SettingsError(
            f"the Docker context {name!r} goes by ssh, which is not spoken here; forward the engine's socket "
            "(ssh -L) and give it with --base-url"
        )
    tls = place / "tls" / key / "docker"
    return Endpoint(url, tls if tls.is_dir() or unverified else None, not unverified, partial=True)

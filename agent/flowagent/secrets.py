"""Secrets, byte for byte, from the environment, systemd credentials, or files in the home."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from flowagent import files
from flowagent.errors import NotFoundError, SecretError

PREFIX = "FLOWAGENT_SECRET_"
DIRECTORY = "secrets_"
"""What systemd puts before the names of a directory's files: ``LoadCredential=secrets:/a/directory``."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def check_name(name: str) -> str:
    """The name, if it can be that of a secret. :raises SecretError: it cannot."""
    if not _NAME.fullmatch(name) or len(name) > 200:
        raise SecretError(
            f"secret {name!r} has no valid name; use letters, digits and _, not starting with a digit"
        )
    return name


class SecretProvider:
    """The secrets of one home. Values are read when asked for and never kept."""

    def __init__(self, home: Path, environ: Mapping[str, str] = os.environ) -> None:
        self._directory = home / "secrets"
        self._environ = environ

    def get(self, name: str) -> str:
        """The value, exactly as stored. :raises SecretError: it is missing, or its file is not safe."""
        return self.get_many([name])[name]

    def get_many(self, names: Iterable[str]) -> dict[str, str]:
        """The values of several secrets. :raises SecretError: naming all that are missing at once."""
        found = {name: self._find(check_name(name)) for name in dict.fromkeys(names)}
        if missing := [name for name, value in found.items() if value is None]:
            several = len(missing) > 1
            raise SecretError(
                f"secret{'s' * several} {', '.join(missing)} {'are' if several else 'is'} not set; "
                f"on the agent's machine, run: flowagent secret set {missing[0]}"
            )
        return {name: value for name, value in found.items() if value is not None}

    def origin(self, name: str) -> str | None:
        """Where the value would be read: ``environment``, ``systemd`` or ``file``; None: it is not set."""
        if PREFIX + check_name(name) in self._environ:
            return "environment"
        if any(path.is_file() for path in self._credentials(name)):
            return "systemd"
        return "file" if os.path.lexists(self._directory / name) else None

    def names(self) -> tuple[str, ...]:
        """The names of all secrets that are set, sorted."""
        candidates = [key.removeprefix(PREFIX) for key in self._environ if key.startswith(PREFIX)]
        with suppress(OSError):
            candidates += os.listdir(self._directory)
        if directory := self._environ.get("CREDENTIALS_DIRECTORY"):
            with suppress(OSError):
                candidates += [name.removeprefix(DIRECTORY) for name in os.listdir(directory)]
        return tuple(sorted({name for name in candidates if _NAME.fullmatch(name)}))

    def set(self, name: str, value: str) -> None:
        """Store a value as a file that only this user can read. :raises SecretError: it cannot be written."""
        path = self._directory / check_name(name)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory.chmod(0o700)
            files.write(path, [value.encode("utf-8")])
        except OSError as error:
            raise SecretError(
                f"secret {name} cannot be stored in {path}: {error.strerror}; check that directory"
            ) from error
        except UnicodeEncodeError as error:
            raise SecretError(
                f"secret {name} cannot be stored: its value is not UTF-8 text; encode it, say as base64"
            ) from error

    def remove(self, name: str) -> None:
        """Remove the file of a secret. :raises NotFoundError: there is none."""
        path = self._directory / check_name(name)
        try:
            path.unlink()
        except FileNotFoundError:
            raise NotFoundError(
                f"there is no secret {name} in {self._directory}; see: flowagent secret ls"
            ) from None
        except OSError as error:
            raise SecretError(
                f"secret {name} cannot be removed from {path}: {error.strerror}; remove it by hand"
            ) from error

    def _find(self, name: str) -> str | None:
        if (value := self._environ.get(PREFIX + name)) is not None:
            return _text(name, os.fsencode(value), f"the environment variable {PREFIX}{name}")
        for path in self._credentials(name):
            if (data := _read(name, path, ours=False)) is not None:
                return _text(name, data, str(path))
        path = self._directory / name
        data = _read(name, path, ours=True)
        return None if data is None else _text(name, data, str(path))

    def _credentials(self, name: str) -> list[Path]:
        """Where systemd may have put a secret: one by one, or of a whole directory."""
        directory = self._environ.get("CREDENTIALS_DIRECTORY")
        return [Path(directory, name), Path(directory, DIRECTORY + name)] if directory else []


def _text(name: str, data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise SecretError(
            f"secret {name} in {where} is not UTF-8 text; store binary values encoded, say as base64"
        ) from None


def _read(name: str, path: Path, *, ours: bool) -> bytes | None:
    """The bytes of a secret's file; with ``ours``, of one that nobody else can read or write."""
    # never waits on a FIFO, and never follows a link out of our own directory
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if ours else 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SecretError(
            f"secret {name} cannot be read from {path}: {error.strerror}; "
            f"store it again with: flowagent secret set {name}"
        ) from error
    try:
        _check(name, path, os.fstat(descriptor), ours=ours)
        return b"".join(files.read(descriptor))
    finally:
        os.close(descriptor)


def _check(name: str, path: Path, status: os.stat_result, *, ours: bool) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SecretError(
            f"secret {name}: {path} is not a regular file; store it again with: flowagent secret set {name}"
        )
    if ours and status.st_uid != os.geteuid():
        raise SecretError(f"secret {name}: {path} belongs to another user; run: chown {os.geteuid()} {path}")
    if ours and stat.S_IMODE(status.st_mode) & 0o077:
        raise SecretError(f"secret {name}: {path} can be read by other users; run: chmod 600 {path}")

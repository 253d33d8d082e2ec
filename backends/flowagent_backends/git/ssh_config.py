"""What OpenSSH's files say of a host (ssh_config(5), known_hosts in sshd(8)), as ``ssh`` understands them.

asyncssh reads them; here is what it leaves out or does otherwise. Imported when first needed, for it is slow.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

import anyio
import asyncssh
from asyncssh.config import SSHClientConfig

from flowagent.errors import BackendError
from flowagent_backends.git.remotes import Remote

GLOBAL_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts"
LISTED = 5.0
"""Seconds that an ssh agent has to say which keys it holds."""
_NO_NAME = re.compile(r"(?<!\S),+|,+(?=[,\s])")
_JUMP = re.compile(
    r"(?P<uri>ssh://)?((?P<user>[^/:]+)@)?(?P<host>[^@:/\[\]\s]+|\[[^@/\[\]\s]+\])(:(?P<port>[0-9]+))?/?"
)


class Config:
    """What the configuration file says of one host, if there is one.

    :raises OSError: it cannot be read. :raises ValueError: it is wrong."""

    def __init__(self, file: Path, remote: Remote, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._directory = file.parent
        self.files = [file] if file.is_file() else []
        asked = (getpass.getuser(), remote.user or (), remote.host, remote.port or ())
        self._said = SSHClientConfig.load(None, self.files, False, False, False, *asked)

    @property
    def jumps(self) -> str:
        """The hosts to go through, as ProxyJump has them."""
        return cast("str | None", self._said.get("ProxyJump")) or ""

    @property
    def alias(self) -> str:
        """The name of the host in known hosts, if it is not its own."""
        return cast("str | None", self._said.get("HostKeyAlias")) or ""

    @property
    def known_hosts(self) -> list[Path]:
        """The files of known hosts, the user's first."""
        user = self._paths("UserKnownHostsFile", [str(self._directory / "known_hosts")])
        return user + self._paths("GlobalKnownHostsFile", [GLOBAL_KNOWN_HOSTS])

    @property
    def agent(self) -> str:
        """The socket of an ssh agent."""
        named = cast("str | None", self._said.get("IdentityAgent", "SSH_AUTH_SOCK")) or ""
        if named == "SSH_AUTH_SOCK" or named.startswith("$"):
            named = self._environ.get(named.removeprefix("$"), "")
        return str(self._path(named)) if named else ""

    @property
    def certificates(self) -> list[Path]:
        """The files of certificates for keys."""
        return [file for file in self._paths("CertificateFile", []) if file.is_file()]

    def identities(self, names: Sequence[str]) -> Identities:
        """The keys to offer. ``names``: of those that count where the configuration names none."""
        files = self._paths("IdentityFile", [str(self._directory / name) for name in names])
        found = Identities(agent=self.agent, agents_own=not self._said.get("IdentitiesOnly"))
        for file in files:
            found.add(file)
        return found

    def _paths(self, option: str, default: list[str]) -> list[Path]:
        return [self._path(name) for name in cast(list[str], self._said.get(option, default))]

    def _path(self, name: str) -> Path:
        home = self._environ.get("HOME")
        return Path(home, name[2:]) if home and name.startswith("~/") else Path(name).expanduser()


@dataclass
class Identities:
    """Keys to offer: those of files, and what an agent holds. ``agents_own``: also what no file names."""

    keys: list[Any] = field(default_factory=list)
    agent: str = ""
    agents_own: bool = True
    unusable: list[str] = field(default_factory=list)
    _public: list[bytes] = field(default_factory=list)

    def add(self, file: Path) -> None:
        """The key of a file, if it is there and needs no passphrase; else an agent may have it."""
        for public in (file, file.with_name(f"{file.name}.pub")):
            with suppress(OSError, asyncssh.KeyImportError):
                self._public.append(asyncssh.read_public_key(public).public_data)
        try:
            pairs = asyncssh.load_keypairs(file)
        except FileNotFoundError:
            self.unusable.append(str(file))
        except (OSError, asyncssh.KeyImportError) as error:
            self.unusable.append(f"{file} ({getattr(error, 'strerror', None) or error})")
        else:
            self.keys += pairs
            self._public += [pair.public_data for pair in pairs]

    @asynccontextmanager
    async def offered(self) -> AsyncIterator[list[Any]]:
        """All keys in the order of ssh, which decides who one is for the host: an agent's that files name,
        an agent's others, those that only files have."""
        async with asyncssh.SSHAgentClient(self.agent) as agent:
            held: list[asyncssh.SSHKeyPair] = []
            with suppress(ValueError), anyio.move_on_after(LISTED):  # nobody has to run one
                held += await agent.get_keys()
            by_blob = {pair.public_data: pair for pair in held}
            named = [by_blob.pop(blob) for blob in self._public if blob in by_blob]
            own = list(by_blob.values()) if self.agents_own else []
            taken = {pair.public_data for pair in named + own}
            yield [*named, *own, *(key for key in self.keys if key.public_data not in taken)]

    def __str__(self) -> str:
        """Where keys were looked for, if none was found."""
        places = [*self.unusable, *([f"the ssh agent at {self.agent}"] if self.agent else [])]
        return ", ".join(places) or "no file and no ssh agent"


class KnownHosts:
    """The keys that a host may show. It is looked up as ssh does: by its HostKeyAlias, else by its HostName,
    with the port if that is not 22. A key that is known for its address alone is none of the host.

    :param pinned: lines of known hosts. :raises ValueError: one of these is wrong.
    :raises OSError: a file is there and cannot be read."""

    def __init__(self, pinned: Sequence[str], files: Sequence[Path], alias: str = "") -> None:
        self.files = files
        self.name = ""  # that was looked up last
        self.known = False  # whether it has a key
        self._alias = alias
        self._lines = asyncssh.import_known_hosts("")
        for line in pinned:
            self._add(line)
        for file in files:
            with suppress(FileNotFoundError, NotADirectoryError):
                for line in file.read_text("utf-8", "replace").splitlines():
                    with suppress(ValueError):  # ssh goes on with the next one as well
                        self._add(line)

    def __call__(self, host: str, address: str, port: int | None) -> tuple[list[Any], list[Any], list[Any]]:
        """Keys, keys of authorities, and revoked keys, as asyncssh asks for them. ``port``: None is 22."""
        names = [host] if port is None or host == self._alias else [f"[{host}]:{port}", host]
        found = [self._lines.match(name, "", None) for name in names]
        keys, authorities = next((trusted[:2] for trusted in found if trusted[0] or trusted[1]), ([], []))
        self.name, self.known = names[0], bool(keys)
        return list(keys), list(authorities), [key for every in found for key in every[2]]

    def _add(self, line: str) -> None:
        # asyncssh takes an empty name, as of a comma too many, for the name of every host
        self._lines.load(_NO_NAME.sub("", line))


def jump(remote: Remote, hosts: str) -> tuple[Remote, str]:
    """The host that leads to the remote: the last of ``[ssh://][user@]host[:port],…``; and those before it.

    :raises BackendError: it is none."""
    before, _, last = hosts.rpartition(",")
    found = _JUMP.fullmatch(last.strip())
    if found is None:
        raise BackendError(
            f"{remote.what}: ProxyJump of the ssh config names no host; write user@host:port,…"
        )
    host, port, user = found["host"].strip("[]"), found["port"], found["user"] or ""
    user = unquote(user) if found["uri"] else user
    what = f"{remote.what} (through {host})"
    return Remote(what, "", "ssh", host, int(port) if port else None, user=user), before

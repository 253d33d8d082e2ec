"""How git gets to a remote: by itself, or over a connection of ours."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio

from flowagent.backend import Progress, unseen
from flowagent.errors import BackendError, StorageTransientError
from flowagent.settings import Ssh
from flowagent_backends.git.remotes import Remote
from flowagent_backends.git.ssh import KEYS, PATIENCE, Channel, Connections

UPLOAD_PACK = "git-upload-pack"
_RECEIVED = re.compile(r"Receiving objects:.*?([0-9.]+) ([KMG])iB")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Way:
    """What a git process is given to reach its remote. ``channel``: of a server, whose words count."""

    config: Sequence[tuple[str, str]]
    env: Mapping[str, str] = field(default_factory=dict)
    descriptors: Sequence[int] = ()
    channel: Channel | None = None


class Transport:
    """Ways to remotes, of one agent."""

    def __init__(
        self, connections: Connections, settings: Ssh, environ: Mapping[str, str], progress: Progress
    ) -> None:
        self.connections = connections
        self._settings = settings
        self._environ = environ
        self._progress = progress

    def in_process(self, remote: Remote) -> bool:
        """Whether ssh is spoken by flowagent itself."""
        return remote.scheme == "ssh" and self._settings.client == "asyncssh"

    @asynccontextmanager
    async def way(self, remote: Remote) -> AsyncIterator[Way]:
        """For one fetch of the remote named origin."""
        if self.in_process(remote):
            async with self.connections.socket(remote, UPLOAD_PACK) as (descriptor, channel):
                fd = [("protocol.fd.allow", "always"), ("remote.origin.url", f"fd::{descriptor}")]
                yield Way(fd, descriptors=(descriptor,), channel=channel)
            return
        config = [("remote.origin.url", remote.url)]
        if remote.scheme == "ssh":
            with self._openssh(remote) as way:
                yield replace(way, config=[*config, *way.config])
            return
        yield Way(config)

    async def lfs(self, remote: Remote) -> list[tuple[str, str]]:
        """Where an ssh server's large files are, and what opens that (git-lfs, server discovery)."""
        async with self.connections.channel(remote, "git-lfs-authenticate", "download") as channel:
            with anyio.move_on_after(PATIENCE):
                said = await channel.process.stdout.read()
                try:
                    answer = json.loads(said)
                    href, headers = str(answer["href"]), dict(answer.get("header", {}))
                except (ValueError, KeyError, TypeError):
                    raise BackendError(
                        f"{remote.what}: its server does not say where large files are; leave lfs= out"
                    ) from None
                given = [(f"http.{href}.extraHeader", f"{name}: {value}") for name, value in headers.items()]
                return [("lfs.url", href), ("protocol.https.allow", "always"), *given]
        raise StorageTransientError(f"{remote.what}: {remote.host} did not answer in time; try again later")

    @contextmanager
    def _openssh(self, remote: Remote) -> Iterator[Way]:
        """The ssh client of this machine, as strict and as silent as ours."""
        directory = self.connections.directory
        name, rule = self.connections.rule(remote)
        if "key_secret" in rule:
            raise BackendError(
                f'{remote.what}: [ssh."{name}"] has a key_secret, which ssh_client = "openssh" cannot use; '
                "give key = the path of a file"
            )
        options = ["BatchMode=yes", "StrictHostKeyChecking=yes", "ForwardAgent=no", "ClearAllForwardings=yes"]
        keys = [Path(rule["key"]).expanduser()] if "key" in rule else _keys(directory)
        if "key" in rule:
            options += ["IdentitiesOnly=yes", "IdentityAgent=none"]
        with tempfile.NamedTemporaryFile("w", prefix="flowagent-known-hosts-") as pinned:
            pinned.write("\n".join([*self.connections.pinned(remote), ""]))
            pinned.flush()
            options.append(f'UserKnownHostsFile="{directory / "known_hosts"}" "{pinned.name}"')
            command = ["ssh", *(word for option in options for word in ("-o", option))]
            if (directory / "config").is_file():
                command += ["-F", str(directory / "config")]
            command += [word for key in keys for word in ("-i", str(key))]
            env = {name: self._environ[name] for name in ("HOME", "SSH_AUTH_SOCK") if name in self._environ}
            yield Way((("core.sshCommand", shlex.join(command)), ("ssh.variant", "ssh")), env)

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[str], None] | None]:
        """What is to hear git's progress; None: nobody waits for it."""
        if self._progress is unseen:
            yield None
            return
        with self._progress(what, None) as advance:
            done = 0

            def heard(line: str) -> None:
                nonlocal done
                advance(0)  # it is alive, whatever it says
                if found := _RECEIVED.search(line):
                    received = int(float(found[1]) * _UNITS[found[2]])
                    advance(max(0, received - done))
                    done = max(done, received)

            yield heard


def _keys(directory: Path) -> list[Path]:
    return [directory / name for name in KEYS if (directory / name).is_file()]

"""SSH without an ssh client: one connection for each host and key, kept and shared by many fetches.

What OpenSSH's files say holds: ``config``, ``known_hosts``, the keys of ``~/.ssh`` and an agent's socket.
Host keys are checked always.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from anyio import to_thread

from flowagent.errors import BackendError, StorageTransientError
from flowagent.secrets import SecretProvider
from flowagent.settings import Ssh
from flowagent_backends.git.program import ERRORS_KEPT, first_error, refused
from flowagent_backends.git.remotes import Remote

if TYPE_CHECKING:
    import asyncssh

    from flowagent_backends.git.ssh_config import Config, Identities, KnownHosts

KEYS = ("id_ed25519", "id_ecdsa", "id_rsa", "id_ed25519_sk", "id_ecdsa_sk")
PATIENCE = 20.0
TRIES, AGAIN = 60, 0.05
GOODBYE = 2.0
SESSIONS = 8  # servers allow ten in a connection (sshd_config, MaxSessions)
JUMPS = 4
PIECE = 1 << 18
VERSION_2 = {"GIT_PROTOCOL": "version=2"}


@dataclass
class _Connection:
    """A live connection, and how many channels it may still take."""

    connection: asyncssh.SSHClientConnection
    room: anyio.Semaphore = field(default_factory=lambda: anyio.Semaphore(SESSIONS))


@dataclass
class Channel:
    """A running command of a server, and the end of what it said on standard error."""

    process: Any
    said: bytearray = field(default_factory=bytearray)

    @property
    def errors(self) -> str:
        return self.said.decode("utf-8", "replace")


async def _session(connection: asyncssh.SSHClientConnection, line: str) -> asyncssh.SSHClientProcess[bytes]:
    """A session that runs a command. Servers count one that has ended until they have noticed: one that is
    refused is asked for again.

    :raises asyncssh.ChannelOpenError: it is refused for good. :raises TimeoutError: nobody answers."""
    import asyncssh

    tries = 0
    with anyio.fail_after(PATIENCE):
        while True:
            try:
                return await connection.create_process(line, env=VERSION_2, encoding=None)
            except asyncssh.ChannelOpenError:
                tries += 1
                if tries == TRIES or connection.is_closed():
                    raise
                await anyio.sleep(AGAIN)


class Connections:
    """The connections of one agent."""

    def __init__(self, settings: Ssh, environ: Mapping[str, str], secrets: SecretProvider) -> None:
        self._settings = settings
        self._environ = environ
        self._secrets = secrets
        self._open: dict[str, _Connection] = {}
        self._turns: dict[str, anyio.Lock] = {}

    @property
    def directory(self) -> Path:
        """Where keys, known hosts and the configuration are."""
        return self._settings.directory or Path(self._environ.get("HOME", "~")).expanduser() / ".ssh"

    async def close(self) -> None:
        """End all, those through other hosts first."""
        while self._open:
            _, known = self._open.popitem()
            known.connection.close()
            with anyio.move_on_after(GOODBYE):
                await known.connection.wait_closed()

    @asynccontextmanager
    async def channel(self, remote: Remote, command: str, *words: str) -> AsyncIterator[Channel]:
        """Run ``command`` on the remote's path, in protocol 2 if the server likes.

        :raises StorageTransientError: the host cannot be reached. :raises BackendError: it lets nobody in."""
        import asyncssh

        line = " ".join([command, _quoted(remote.path), *words])
        for again in (True, False):
            known = await self._connected(remote)
            async with known.room:
                try:
                    process = await _session(known.connection, line)
                except (asyncssh.Error, OSError, TimeoutError) as error:
                    if isinstance(error, asyncssh.ChannelOpenError) and not known.connection.is_closed():
                        raise _unreached(remote, error) from error  # others go on with the connection
                    self._forget(known)  # it died while nobody used it
                    if again:
                        continue
                    raise _unreached(remote, error) from error
                try:
                    yield Channel(process)
                finally:
                    process.close()
                return

    @asynccontextmanager
    async def socket(self, remote: Remote, command: str) -> AsyncIterator[tuple[int, Channel]]:
        """A descriptor that is connected to a command's standard input and output (git-remote-fd)."""
        async with self.channel(remote, command) as channel:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            with ours, theirs, first_error():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_upwards, ours, channel)
                    tasks.start_soon(_downwards, ours, channel)
                    tasks.start_soon(_listen, channel)
                    try:
                        yield theirs.fileno(), channel
                    finally:
                        with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                            await channel.process.wait_closed()  # so that all it said is heard
                        tasks.cancel_scope.cancel()

    # -- connections -----------------------------------------------------------------------------------

    async def _connected(self, remote: Remote, behind: tuple[str, ...] = (), jumps: str = "") -> _Connection:
        """:param behind: the connections that wait for this one, as it leads to their hosts.
        :param jumps: the hosts to go through; empty: those of its own entry."""
        name = f"{remote.user}@{remote.host}:{remote.port or ''} {self.rule(remote)[0]} {jumps}"
        if name in behind or len(behind) > JUMPS:
            raise BackendError(
                f"{remote.what}: ProxyJump leads through too many hosts; correct the ssh config"
            )
        async with self._turns.setdefault(name, anyio.Lock()):
            known = self._open.get(name)
            if known is None or known.connection.is_closed():
                module = "flowagent_backends.git.ssh_config"
                await to_thread.run_sync(importlib.import_module, module)  # takes a fifth of a second
                known = _Connection(await self._connect(remote, (*behind, name), jumps))
                self._open.pop(name, None)  # the new one comes after that which it leads through
                self._open[name] = known
            return known

    def _forget(self, dead: _Connection) -> None:
        for name in [name for name, known in self._open.items() if known is dead]:
            del self._open[name]
        dead.connection.abort()

    def rule(self, remote: Remote) -> tuple[str, Mapping[str, Any]]:
        """What the configuration says of this repository, else of its host."""
        path = remote.path.strip("/").removesuffix(".git")
        for name in (f"{remote.host}/{path}", remote.host):
            if name in self._settings.hosts:
                return name, self._settings.hosts[name]
        return "", {}

    async def _connect(
        self, remote: Remote, behind: tuple[str, ...], jumps: str
    ) -> asyncssh.SSHClientConnection:
        import asyncssh

        from flowagent_backends.git.ssh_config import jump

        config, known_hosts, identities = await to_thread.run_sync(self._read, remote)
        seen: list[asyncssh.SSHKey] = []

        class Client(asyncssh.SSHClient):
            def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
                seen.append(key)
                return False

        through: _Connection | None = None
        if hosts := jumps or config.jumps:
            last, before = jump(remote, hosts)
            through = await self._connected(last, behind, before)
        keys: list[Any] = []
        try:
            with anyio.fail_after(PATIENCE):
                async with identities.offered() as keys:
                    return await asyncssh.connect(
                        remote.host,
                        remote.port or (),
                        username=remote.user or (),
                        config=config.files or None,
                        known_hosts=known_hosts,
                        tunnel=through and through.connection,
                        client_factory=Client,
                        client_keys=keys or None,  # an empty list would be the keys of ~/.ssh
                        client_certs=config.certificates,
                        agent_path=None,  # its keys are among these
                        agent_identities=None,
                        agent_forwarding=False,
                        preferred_auth="publickey",
                        connect_timeout=PATIENCE,
                        login_timeout=PATIENCE,
                        keepalive_interval=60,
                    )
        except asyncssh.HostKeyNotVerifiable as error:
            raise _unknown_host(remote, known_hosts, seen, error) from error
        except asyncssh.PermissionDenied as error:
            said = "the host accepts none of the keys" if keys else f"no key was found in {identities}"
            raise refused(remote, remote.what, said) from error
        except (asyncssh.Error, OSError, TimeoutError) as error:
            if through is not None and not isinstance(error, asyncssh.ChannelOpenError):
                self._forget(through)  # whichever of the two it was
            raise _unreached(remote, error) from error
        except ValueError as error:
            raise BackendError(
                f"{remote.what}: the ssh configuration is wrong: {error}; correct it"
            ) from error

    def _read(self, remote: Remote) -> tuple[Config, KnownHosts, Identities]:
        """What OpenSSH's files and the configuration say of a host."""
        from flowagent_backends.git.ssh_config import Config, Identities, KnownHosts

        file = self.directory / "config"
        try:
            config = Config(file, remote, self._environ)
        except (OSError, ValueError) as error:
            raise BackendError(f"{remote.what}: {file} cannot be used: {error}; correct it") from error
        try:
            known_hosts = KnownHosts(self.pinned(remote), config.known_hosts, config.alias)
        except OSError as error:
            raise BackendError(
                f"{remote.what}: {error.filename} cannot be read: {error.strerror}; correct that"
            ) from error
        except ValueError as error:
            raise BackendError(
                f'{remote.what}: known_hosts of [ssh."{remote.host}"] is wrong: {error}; correct it'
            ) from error
        keys = self._keys(remote)
        return config, known_hosts, config.identities(KEYS) if keys is None else Identities(keys)

    def _keys(self, remote: Remote) -> list[Any] | None:
        """The deploy key that the configuration names for a repository or host."""
        import asyncssh

        name, rule = self.rule(remote)
        try:
            if "key" in rule:
                return [asyncssh.read_private_key(Path(rule["key"]).expanduser())]
            if "key_secret" in rule:
                return [asyncssh.import_private_key(self._secrets.get(rule["key_secret"]))]
        except (OSError, asyncssh.KeyImportError) as error:
            said = getattr(error, "strerror", None) or error
            raise BackendError(f'{remote.what}: the key of [ssh."{name}"] cannot be read: {said}') from error
        return None

    def pinned(self, remote: Remote) -> list[str]:
        """The lines of known hosts that the configuration has."""
        rules = (self.rule(remote)[1], self._settings.hosts.get(remote.host, {}))
        return [line for rule in rules for line in rule.get("known_hosts", ())]


def _quoted(path: str) -> str:
    """As git quotes it, always: git-shell takes nothing else."""
    return "'" + path.replace("'", "'\\''").replace("!", "'\\!'") + "'"


def _unknown_host(remote: Remote, known_hosts: KnownHosts, seen: list[Any], error: Exception) -> BackendError:
    name = known_hosts.name
    files = [str(file) for file in known_hosts.files if str(file) != os.devnull]
    place = files[0] if files else f'known_hosts of [ssh."{remote.host}"]'
    if not seen:
        return BackendError(f"{remote.what}: the host key of {name} cannot be checked: {error}; see {place}")
    key = seen[0]
    line = f"{name} {' '.join(key.export_public_key().decode().split()[:2])}"
    if known_hosts.known:
        return BackendError(
            f"{remote.what}: {name} shows another host key than the known one: {key.get_fingerprint()}; "
            f"somebody may be in between. If it was changed, replace the old line in {place} by: {line}"
        )
    return BackendError(
        f"{remote.what}: the host key of {name} is not known: {key.get_fingerprint()}; "
        f"if that is its key, add this line to {place}: {line}"
    )


def _unreached(remote: Remote, error: Exception) -> BackendError:
    said = (
        "it did not answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
    )
    return StorageTransientError(f"{remote.what}: {remote.host} cannot be reached: {said}; try again later")


# -- between a socket and a channel ----------------------------------------------------------------------


def _quietly() -> AbstractContextManager[None]:
    """One end goes while the other still has something to say: git, or the server, says what was wrong."""
    import asyncssh

    return suppress(OSError, asyncssh.Error)


async def _upwards(ours: socket.socket, channel: Channel) -> None:
    with _quietly():
        while True:
            await anyio.wait_readable(ours)
            data = ours.recv(PIECE)
            if not data:
                break
            channel.process.stdin.write(data)
            await channel.process.stdin.drain()
        channel.process.stdin.write_eof()


async def _downwards(ours: socket.socket, channel: Channel) -> None:
    with _quietly():
        while data := await channel.process.stdout.read(PIECE):
            view = memoryview(data)
            while view:
                await anyio.wait_writable(ours)
                with suppress(BlockingIOError):
                    view = view[ours.send(view) :]
        ours.shutdown(socket.SHUT_WR)


async def _listen(channel: Channel) -> None:
    with _quietly():
        while data := await channel.process.stderr.read(PIECE):
            channel.said += data
            del channel.said[:-ERRORS_KEPT]

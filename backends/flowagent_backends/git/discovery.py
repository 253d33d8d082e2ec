"""What refs a remote has now: asked in this process where that is possible, else with ``git ls-remote``."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from flowagent import http
from flowagent.errors import BackendError, StorageTransientError
from flowagent_backends.git import packets
from flowagent_backends.git.packets import Ref
from flowagent_backends.git.program import ERRORS_KEPT, Call, Git, failure, not_found, refused
from flowagent_backends.git.references import TAGS
from flowagent_backends.git.remotes import Remote
from flowagent_backends.git.ssh import PIECE, Channel
from flowagent_backends.git.transport import UPLOAD_PACK, Transport

ADVERTISEMENT = f"application/x-{UPLOAD_PACK}-advertisement"
REQUEST = f"application/x-{UPLOAD_PACK}-request"
PATIENCE = 30.0
BODY_LIMIT = 64 << 20
TIPS = 8192
"""Remotes whose capabilities are remembered."""


@dataclass(frozen=True)
class _Server:
    """A smart HTTP server that speaks protocol 2. ``url``: where it was found, after redirects."""

    url: str
    capabilities: frozenset[str]


class Discovery:
    """Asks remotes for refs. What a server can do is asked once, and connections are kept."""

    def __init__(self, git: Git, transport: Transport) -> None:
        self._git = git
        self._transport = transport
        self._client: http.AsyncClient | None = None
        self._servers: dict[str, _Server] = {}

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def refs(self, remote: Remote, prefixes: Sequence[str]) -> tuple[Ref, ...]:
        """The refs that start with one of ``prefixes``; more of them may come.

        :raises StorageNotFoundError: there is no such repository. :raises StorageTransientError: no answer.
        :raises BackendError: access is refused, or it is no repository."""
        try:
            if remote.scheme in ("https", "http"):
                found = await self._over_http(remote, prefixes)
            elif self._transport.in_process(remote):
                found = await self._over_ssh(remote, prefixes)
            else:
                found = None
        except BackendError as error:
            if str(error).startswith("it"):  # of the packets, which do not know whose they are
                raise type(error)(f"{remote.what}: {error}; check its address") from error
            raise
        return await self._by_program(remote, prefixes) if found is None else found

    # -- http ------------------------------------------------------------------------------------------

    async def _over_http(self, remote: Remote, prefixes: Sequence[str]) -> tuple[Ref, ...] | None:
        """None: the server is not a smart one."""
        server = self._servers.get(remote.identity)
        if server is None:
            said = await self._meet(remote)
            if said is None or isinstance(said, tuple):
                return said
            server = said
        request = http.Request(
            remote.what,
            "POST",
            f"{server.url}/{UPLOAD_PACK}",
            headers={
                **self._headers(remote, server.url),
                "Content-Type": REQUEST,
                "Accept": f"application/x-{UPLOAD_PACK}-result",
            },
            content=packets.list_refs(prefixes, server.capabilities),
            repeatable=True,
            deadline=PATIENCE,
            limit=BODY_LIMIT,
        )
        response = await http.send(self._using(), request)
        if response.status_code != 200:
            self._servers.pop(remote.identity, None)  # it may have moved: it is met again the next time
            raise self._error(remote, response)
        return packets.parse_refs(line for line in packets.packets(response.content) if line is not None)

    async def _meet(self, remote: Remote) -> _Server | tuple[Ref, ...] | None:
        """The server, if it speaks protocol 2; its refs, if an older one; None: neither."""
        request = http.Request(
            remote.what,
            "GET",
            f"{remote.url}/info/refs",
            params={"service": UPLOAD_PACK},
            headers=self._headers(remote, remote.url),
            follow=True,
            deadline=PATIENCE,
            limit=BODY_LIMIT,
        )
        response = await http.send(self._using(), request)
        if response.status_code != 200:
            raise self._error(remote, response)
        if response.headers.get("content-type", "").partition(";")[0].strip() != ADVERTISEMENT:
            return None
        said = packets.parse_advertisement(packets.packets(response.content))
        if said.version != 2:
            return said.refs
        url = str(response.url.copy_with(query=None)).removesuffix("/info/refs")
        if len(self._servers) >= TIPS:
            self._servers.clear()
        server = self._servers[remote.identity] = _Server(url, said.capabilities)
        return server

    def _using(self) -> http.AsyncClient:
        if self._client is None:
            self._client = http.client()
        return self._client

    def _headers(self, remote: Remote, url: str) -> dict[str, str]:
        """Git's protocol, and the credentials, if this is where they belong."""
        headers = {"Git-Protocol": "version=2"}
        if (remote.user or remote.password) and url.startswith(remote.origin + "/"):
            login = f"{remote.user}:{remote.password}".encode()
            headers["Authorization"] = f"Basic {b64encode(login).decode()}"
        return headers

    def _error(self, remote: Remote, response: http.Response) -> BackendError:
        code = response.status_code
        if code in (401, 403):
            return refused(remote, remote.what, f"status {code}")
        if code in (404, 410):
            return not_found(remote, remote.what)
        if code == 429 or code >= 500:
            wait = http.retry_after(response.headers)
            when = f"in {wait:.0f} s" if wait else "later"
            return StorageTransientError(f"{remote.what}: its server answers {code}; try again {when}")
        return BackendError(f"{remote.what}: its server answers {code}; check its address")

    # -- ssh -------------------------------------------------------------------------------------------

    async def _over_ssh(self, remote: Remote, prefixes: Sequence[str]) -> tuple[Ref, ...]:
        with anyio.move_on_after(PATIENCE):
            # not waiting for what the server can do saves the time of a round trip
            said, refs = await self._ask(remote, packets.list_refs(prefixes))
            if refs is None:  # its commits have names of another kind, and it wants to hear so
                said, refs = await self._ask(remote, packets.list_refs(prefixes, said.capabilities), said)
            return refs or ()
        raise StorageTransientError(f"{remote.what}: {remote.host} did not answer in time; try again later")

    async def _ask(
        self, remote: Remote, request: bytes, known: packets.Advertisement | None = None
    ) -> tuple[packets.Advertisement, tuple[Ref, ...] | None]:
        """What the server can do, and its refs; None: it does not take the request, which did not say its
        object format. ``known``: what it can do, if the request goes by that."""
        async with self._transport.connections.channel(remote, UPLOAD_PACK) as channel:
            channel.process.stdin.write(request)  # an older one has told its refs before it reads this
            sections = _Sections(remote, channel)
            said = packets.parse_advertisement(await sections.read())
            if said.version == 2 and known is None and not packets.is_usual(said):
                return said, None
            refs = packets.parse_refs(await sections.read()) if said.version == 2 else said.refs
            channel.process.stdin.write(packets.FLUSH)
            return said, refs

    # -- the program -----------------------------------------------------------------------------------

    async def _by_program(self, remote: Remote, prefixes: Sequence[str]) -> tuple[Ref, ...]:
        patterns = [prefix + "*" if prefix.endswith("/") else prefix for prefix in prefixes]
        patterns += [f"{prefix}^{{}}" for prefix in prefixes if prefix.startswith(TAGS)]  # what tags point at
        async with self._transport.way(remote) as way:
            call = Call(
                ["ls-remote", "--quiet", "--symref", "origin", *patterns],
                remote=remote,
                config=way.config,
                env=way.env,
                descriptors=way.descriptors,
                deadline=PATIENCE,
            )
            return _listed((await self._git.run(call)).decode("utf-8", "surrogateescape"))


class _Sections:
    """What comes through a channel, from one flush packet to the next."""

    def __init__(self, remote: Remote, channel: Channel) -> None:
        self._remote = remote
        self._channel = channel
        self._packets = packets.Reader()
        self._come: list[bytes | None] = []
        self._room = BODY_LIMIT

    async def read(self) -> list[bytes]:
        """:raises BackendError: the server ended it, saying why, or it has no end."""
        section: list[bytes] = []
        while True:
            for number, line in enumerate(self._come):
                if line is None:
                    self._come = self._come[number + 1 :]
                    return section
                section.append(line)
            data = await self._channel.process.stdout.read(PIECE)
            if not data:
                said = await self._channel.process.stderr.read(ERRORS_KEPT)
                raise failure(self._remote, self._remote.what, 128, said.decode("utf-8", "replace"))
            self._room -= len(data)
            if self._room < 0:
                raise BackendError(f"it lists more than {BODY_LIMIT >> 20} MB of refs")
            self._come = list(self._packets.feed(data))


def _listed(text: str) -> tuple[Ref, ...]:
    """The refs that ``git ls-remote --symref`` prints."""
    oids: dict[str, str] = {}
    targets: dict[str, str] = {}
    for line in text.splitlines():
        value, _, name = line.partition("\t")
        if value.startswith("ref: "):
            targets[name] = value[5:]
        else:
            oids[name] = value
    return tuple(
        Ref(name, oid, oids.get(f"{name}^{{}}", oid), targets.get(name))
        for name, oid in oids.items()
        if not name.endswith("^{}")
    )

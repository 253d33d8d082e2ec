"""Git storage: any repository, any ref, fetched once, checked out once."""

from __future__ import annotations

import re
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from anyio import to_thread

from flowagent.backend import Artifact, BackendContext, Entry, Features, Revision
from flowagent.errors import BackendError, SecretError, StorageNotFoundError, one_line
from flowagent.hints import near_path
from flowagent.models import Json
from flowagent_backends import declared
from flowagent_backends.code_only import CodeOnly
from flowagent_backends.git import checkout, references, remotes
from flowagent_backends.git.discovery import Discovery
from flowagent_backends.git.mirrors import Mirror, Mirrors, rebuildable, reported
from flowagent_backends.git.program import Git as Program
from flowagent_backends.git.references import HEADS, TAGS, Wanted
from flowagent_backends.git.remotes import Remote
from flowagent_backends.git.ssh import Connections
from flowagent_backends.git.transport import Transport

T = TypeVar("T")
NESTED = 8
MANY = 100
"""Submodules that a source may have, those of submodules included."""
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class _Request:
    """A commit of a remote, and how much of it."""

    remote: Remote
    commit: str
    wanted: Wanted
    depth: int = 1
    paths: Sequence[str] = ()
    submodules: bool = False
    lfs: bool = False

    @property
    def filtered(self) -> bool:
        """Whether contents of files come apart from history: they are not needed for all of it."""
        return bool(self.paths) or self.depth != 1

    @property
    def needed(self) -> Sequence[str]:
        """What is read of the commit; all of it if that is empty."""
        return (*self.paths, ".gitmodules") if self.paths and self.submodules else self.paths


@dataclass
class _Room:
    """What a source may still take: bytes, and submodules."""

    bytes: int
    submodules: int = MANY


class GitBackend(CodeOnly):
    """Scripts in Git repositories, over https, ssh, git:// or from this machine."""

    type = "Git"
    features = Features(
        kinds=("script",), revision="the commit", credentials="tokens and URLs in secrets, ssh keys"
    )

    def __init__(self, context: BackendContext) -> None:
        self._context = context
        self._git = Program(context.environ)
        self._connections = Connections(context.ssh, context.environ, context.secrets)
        transport = Transport(self._connections, context.ssh, context.environ, context.progress)
        self._transport = transport
        self._discovery = Discovery(self._git, transport)
        self._mirrors = Mirrors(context.mirrors or context.home / "mirrors", self._git, transport)
        self._abbreviations: dict[tuple[str, str], str] = {}

    async def close(self) -> None:
        await self._discovery.close()
        await self._connections.close()

    async def verify_mirrors(self) -> list[str]:
        """Discard mirrors that are broken, and say which, by their keys; the next run fetches them again."""
        return await self._mirrors.verify()

    async def resolve(self, storage: Mapping[str, Json]) -> Revision:
        """The commit that would run now; of a whole one, without asking anybody.

        :raises StorageNotFoundError: there is no such repository, or nothing of that name in it."""
        storage = declared.storage(storage)
        remote = remotes.of_storage(storage, self._context.secrets)
        wanted = Wanted.of(storage)
        commit = wanted.commit if wanted.pinned else await self._commit(remote, wanted)
        assert commit is not None
        what = (commit, remote.identity, storage.get("sparse"), storage.get("submodules"), storage.get("lfs"))
        return Revision(
            commit,
            Entry("script", storage["flow_path"]),
            key="\0".join(map(str, what)),
            private=storage.get("checkout") == "private",
        )

    async def materialise(self, storage: Mapping[str, Json], revision: Revision, directory: Path) -> None:
        """Fetch what is missing, and check the commit out.

        :raises BackendError: it cannot be had, or is more than this agent takes."""
        request = self._request(declared.storage(storage), revision.id)
        await self._write(request, directory, NESTED, _Room(self._context.max_source))

    async def upload(self, storage: Mapping[str, Json], artifact: Artifact) -> dict[str, Json]:
        """Check that the flow is there. What takes a secret that only agents have is left to them."""
        storage = declared.storage(storage)
        named = storage.get("flow_name")
        if named is not None and named != artifact.flow_name:
            raise BackendError(
                f"Git: flow_name={named!r} does not name this flow, {artifact.flow_name!r}; leave it out"
            )
        try:
            revision = await self.resolve(storage)
            request = self._request(storage, revision.id)
        except SecretError:
            return dict(storage)
        sha256 = _is_sha256(revision.id)
        async with self._mirrors.open(request.remote, sha256, history=True) as mirror:

            async def look(filtered: bool) -> None:
                await self._bring(mirror, request, filtered)
                path = storage["flow_path"]
                names = await mirror.git("ls-tree", "-r", "-z", "--name-only", "--full-tree", revision.id)
                files = names.decode("utf-8", "surrogateescape").split("\0")
                if path not in files:
                    scripts = [name for name in files if name.endswith(".py")]
                    where = f"{request.remote.what} at {revision.id[:12]}"
                    raise StorageNotFoundError(f"{where} has no file {path!r}{near_path(path, scripts)}")

            await self._repaired(mirror, sha256, look, filtered=True)
        return dict(storage)

    # -- which commit ----------------------------------------------------------------------------------

    async def _commit(self, remote: Remote, wanted: Wanted) -> str:
        if wanted.commit is not None and (remote.identity, wanted.commit) in self._abbreviations:
            return self._abbreviations[remote.identity, wanted.commit]
        refs = await self._discovery.refs(remote, wanted.prefixes)
        commit = wanted.choose(refs)
        if wanted.commit is not None and refs:
            commit = commit or await self._abbreviated(remote, wanted.commit, _is_sha256(refs[0].oid))
            if commit is not None:
                self._abbreviations[remote.identity, wanted.commit] = commit
        if commit is None:
            raise references.missing(remote.what, wanted, await self._discovery.refs(remote, (HEADS, TAGS)))
        return commit

    async def _abbreviated(self, remote: Remote, abbreviation: str, sha256: bool) -> str | None:
        """A commit that no ref points at: all of history is looked through, without the contents of files."""
        async with self._mirrors.open(remote, sha256, history=True) as mirror:

            async def look(filtered: bool) -> str | None:
                commit = await mirror.expand(abbreviation)
                if commit is None:
                    await mirror.fetch_history(self._context.max_source)
                    commit = await mirror.expand(abbreviation)
                return commit

            return await self._repaired(mirror, sha256, look, filtered=True)

    # -- how it gets here ------------------------------------------------------------------------------

    def _request(self, storage: Mapping[str, Json], commit: str) -> _Request:
        if not _COMMIT.fullmatch(commit):
            raise BackendError(f"Git: {one_line(commit)!r} is no commit; run the flow again")
        return _Request(
            remotes.of_storage(storage, self._context.secrets),
            commit,
            Wanted.of(storage),
            depth=storage.get("clone_depth", 1),
            paths=tuple(storage.get("sparse") or ()),
            submodules=bool(storage.get("submodules")),
            lfs=bool(storage.get("lfs")),
        )

    async def _write(self, request: _Request, directory: Path, nested: int, room: _Room) -> None:
        remote, commit = request.remote, request.commit
        lfs = await self._lfs(remote) if request.lfs else ()
        limit = self._context.max_source
        urls: dict[str, str] = {}
        sha256 = _is_sha256(commit)
        async with self._mirrors.open(remote, sha256) as mirror:

            async def write(filtered: bool) -> checkout.Listing:
                await self._bring(mirror, request, filtered)
                await mirror.complete(commit, request.needed, limit)
                return await checkout.check_out(
                    mirror, commit, directory, request.paths, lfs, limit=limit, room=room.bytes
                )

            listed = await self._repaired(mirror, sha256, write, request.filtered, directory)
            room.bytes -= listed.size
            if request.submodules and listed.submodules:
                urls = await checkout.submodule_urls(mirror, commit)
            await mirror.tidy()
        if request.submodules:
            room.submodules -= len(listed.submodules)
            if listed.submodules and (room.submodules < 0 or not nested):
                raise BackendError(
                    f"{remote.what}: it has too many submodules, or too deep ones; leave submodules= out"
                )
            for path, inner in listed.submodules:
                if path not in urls:
                    raise StorageNotFoundError(
                        f"{remote.what}: submodule {one_line(path)!r} has no URL; correct its .gitmodules"
                    )
                below = remotes.of_submodule(remote, urls[path], path)
                place = await to_thread.run_sync(checkout.place, directory, path, below.what)
                further = _Request(below, inner, Wanted(commit=inner), submodules=True, lfs=request.lfs)
                await self._write(further, place, nested - 1, room)

    async def _bring(self, mirror: Mirror, request: _Request, filtered: bool) -> None:
        limit = self._context.max_source
        await mirror.bring(request.commit, request.wanted, request.depth, filtered=filtered, limit=limit)

    async def _repaired(
        self,
        mirror: Mirror,
        sha256: bool,
        job: Callable[[bool], Awaitable[T]],
        filtered: bool,
        directory: Path | None = None,
    ) -> T:
        """Do a job in a mirror; if that may be broken, once more in a new one, in the plainest way.

        ``job`` is told whether the contents of files may come apart from history."""
        try:
            return await job(filtered)
        except (BackendError, OSError) as error:
            if not rebuildable(error):
                with reported(mirror.remote, mirror.path):
                    raise
        await self._mirrors.quarantine(mirror, sha256)
        with reported(mirror.remote, mirror.path):
            if directory is not None:
                await to_thread.run_sync(_clear, directory)
            return await job(False)

    async def _lfs(self, remote: Remote) -> list[tuple[str, str]]:
        config = await checkout.lfs_config(self._git, remote)
        if self._transport.in_process(remote):
            config += await self._transport.lfs(remote)
        return config


def _is_sha256(commit: str) -> bool:
    return len(commit) == 64


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

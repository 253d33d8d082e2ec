"""Bare mirrors of repositories: what was fetched once is not fetched again, by any agent of this machine.

<root>/<key>.git/   a bare repository; nothing refers to it but sources that are being made
<root>/<key>.lock   held by whoever works in it, and by every git process that does; its mtime is the last use
<root>/.tmp-<key>-*  being made, or taken out of use and on its way to be removed, by the holder of the lock

A mirror grows by exactly what sources need. A ref that it has not met comes with the history that was asked
for; a ref that it knows comes with what is new in it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
from anyio import to_thread

from flowagent import locks
from flowagent.errors import BackendError, StorageNotFoundError
from flowagent_backends.git.program import Call, DiskFullError, Git, MirrorError, RefusedError, failure
from flowagent_backends.git.references import Wanted
from flowagent_backends.git.remotes import Remote
from flowagent_backends.git.transport import Transport

FILTER = "--filter=blob:none"
ALL = ("+refs/heads/*:refs/flowagent/all/heads/*", "+refs/tags/*:refs/flowagent/all/tags/*")
NO_HAVES = (("fetch.negotiationAlgorithm", "noop"),)
"""With it, a server does not think that who has a commit has all of its files."""
MANY_PACKS = 40
WAIT = 600.0
_LEFT = re.compile(r"tmp_|\.tmp-|.*\.keep$")
"""Names of what git writes before it is whole."""


class Mirror:
    """The mirror of one remote, locked: nobody else works in it as long as this object is in use."""

    def __init__(
        self, path: Path, remote: Remote, title: str, git: Git, transport: Transport, lock: int
    ) -> None:
        self.path = path
        self.remote = remote
        self.title = title
        self._git = git
        self._transport = transport
        self.lock = lock

    async def git(self, *args: str, stdin: bytes = b"", **options: object) -> bytes:
        """Run git in it, without a way to the network. Raises as :meth:`Git.run`."""
        call = Call(args, what=self.remote.what, git_dir=self.path, stdin=stdin, descriptors=(self.lock,))
        return await self._git.run(replace(call, **options))  # type: ignore[arg-type]

    async def has(self, *names: str) -> list[bool]:
        """Whether commits of these names are there; what they hold is seen when they are listed."""
        asked = "".join(f"{name}^{{commit}}\n" for name in names).encode()
        try:
            said = (await self.git("cat-file", "--batch-check", stdin=asked)).split(b"\n")
        except MirrorError:
            return [False] * len(names)
        return [b" commit " in line for line in said[: len(names)]]

    @property
    def partial(self) -> bool:
        """Whether contents of files may be missing by intent."""
        try:
            return "promisor" in (self.path / "config").read_text("utf-8", "replace")
        except FileNotFoundError as error:
            raise MirrorError(f"{self.remote.what}: its mirror {self.path} has lost its config") from error

    async def bring(self, commit: str, wanted: Wanted, depth: int, *, filtered: bool, limit: int) -> None:
        """Fetch a commit that is not here. ``filtered``: without the contents of files, if the server can.

        :raises StorageNotFoundError: the server has it no more."""
        here, known = await self.has(commit, wanted.kept)
        if here:
            return
        options = [FILTER] if filtered else []
        shallow = [f"--depth={depth}"] if depth and not known else []
        try:
            await self._fetch([*options, *shallow, "origin", f"+{commit}:{wanted.kept}"], limit)
        except RefusedError:
            # a server of before protocol 2, or one that hands out no bare commits: then by name
            await self._fetch([*options, *self._deeper(), "--prune", "origin", *ALL], limit)
            if not all(await self.has(commit)):
                raise StorageNotFoundError(
                    f"{self.remote.what} has no commit {commit}; if it was replaced just now, run it again"
                ) from None
            await self.git("update-ref", wanted.kept, commit)

    async def fetch_history(self, limit: int) -> None:
        """Bring all commits of all branches and tags, without the contents of files."""
        await self._fetch([FILTER, *self._deeper(), "--prune", "origin", *ALL], limit)

    def _deeper(self) -> list[str]:
        return ["--unshallow"] if (self.path / "shallow").exists() else []

    async def expand(self, abbreviation: str) -> str | None:
        """The whole of an abbreviated commit, if it is here. :raises StorageNotFoundError: there are two."""
        listed = (await self.git("rev-parse", f"--disambiguate={abbreviation}")).split()
        if not listed:
            return None
        kinds = await self.git("cat-file", "--batch-check", stdin=b"\n".join(listed) + b"\n")
        commits = [
            line.split()[0].decode() for line in kinds.splitlines() if line.split()[1:2] == [b"commit"]
        ]
        if len(commits) > 1:
            raise StorageNotFoundError(
                f"{self.remote.what}: commit {abbreviation} may be {' or '.join(sorted(commits)[:3])}; "
                "give more of it"
            )
        return commits[0] if commits else None

    async def complete(self, commit: str, paths: Sequence[str], limit: int) -> None:
        """Bring the contents of files that a filtered fetch has left out."""
        if not self.partial:
            return
        lines = _Lines()
        await self.git("rev-list", "--objects", "--no-walk", "--missing=print", commit, take=lines.take)
        missing = lines.missing
        if missing and paths:
            listing = ("--literal-pathspecs", "ls-tree", "-r", "-z", "--full-tree", commit, "--", *paths)
            listed = await self.git(*listing)
            missing &= {
                entry.split(b"\t")[0].split(b" ")[2].decode() for entry in listed.split(b"\0") if entry
            }
        if missing:
            wants = "".join(f"{oid}\n" for oid in sorted(missing)).encode()
            try:
                await self._fetch([FILTER, "--stdin", "origin"], limit, stdin=wants, config=NO_HAVES)
            except RefusedError as error:
                raise MirrorError(f"{self.remote.what}: its server sends no single files") from error

    async def _fetch(
        self,
        args: Sequence[str],
        limit: int,
        stdin: bytes = b"",
        config: Sequence[tuple[str, str]] = (),
    ) -> None:
        what = f"fetching {self.remote.what.removeprefix('Git: ')}"
        async with self._transport.way(self.remote) as way:
            with self._transport.progress(what) as heard:
                command = ["fetch", "--no-tags", "--no-write-fetch-head", "--no-auto-gc", "--force"]
                call = Call(
                    [*command, "--progress" if heard else "--quiet", *args],
                    remote=self.remote,
                    git_dir=self.path,
                    config=[*way.config, *config],
                    env=way.env,
                    stdin=stdin,
                    descriptors=(self.lock, *way.descriptors),
                    file_limit=limit,
                    heard=heard,
                )
                try:
                    await self._git.run(call)
                except BackendError as error:
                    if way.channel is None or not way.channel.errors.strip():
                        raise
                    raise failure(self.remote, self.remote.what, 128, way.channel.errors) from error

    async def tidy(self) -> None:
        """Join packs when there are many of them: each makes finding an object slower. Where that fails
        nothing is lost."""
        with os.scandir(self.path / "objects" / "pack") as found:
            packs = sum(entry.name.endswith(".pack") for entry in found)
        if packs > MANY_PACKS:
            how = "-a" if self.partial else "--geometric=2"  # which partial ones cannot do
            with suppress(MirrorError):
                await self.git("repack", "-d", "-q", how)
                await self.git("pack-refs", "--all")


@dataclass
class _Lines:
    """Of what ``git rev-list --missing=print`` lists, the objects that are missing."""

    missing: set[str] = field(default_factory=set)
    _rest: bytes = b""

    def take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.missing |= {line[1:].decode() for line in lines if line.startswith(b"?")}


class Mirrors:
    """All mirrors below ``root``. Any number of processes may share it."""

    def __init__(self, root: Path, git: Git, transport: Transport) -> None:
        self._root = root
        self._git = git
        self._transport = transport
        self._turns: dict[str, anyio.Lock] = {}

    @asynccontextmanager
    async def open(
        self, remote: Remote, sha256: bool = False, *, history: bool = False
    ) -> AsyncIterator[Mirror]:
        """The mirror of a remote, made if it is not there. ``history``: another one, without the contents of
        files, for questions about commits and names: a mirror that has done without some contents needs two
        fetches for each new commit ever after.

        :raises SourceCacheError: its lock is not free.
        :raises BackendError: it cannot be made."""
        name = remote.identity + ("\0history" if history else "")
        key = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
        path = self._root / f"{key}.git"
        turn = self._turns.setdefault(key, anyio.Lock())
        async with turn:  # within this process; the lock file is for the others
            with reported(remote, path):
                self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = await locks.lock(self._root / f"{key}.lock", locks.EXCLUSIVE, WAIT)
            try:
                with reported(remote, path):
                    os.utime(lock)
                    await to_thread.run_sync(_mend, path)
                title = remote.what + (" (history)" if history else "")
                mirror = Mirror(path, remote, title, self._git, self._transport, lock)
                if not path.is_dir():
                    await self._make(mirror, sha256)
                try:
                    yield mirror
                except BaseException:  # what was half-done takes room until then
                    with anyio.CancelScope(shield=True), suppress(OSError):
                        await to_thread.run_sync(_mend, path)
                    raise
            finally:
                os.close(lock)

    async def quarantine(self, mirror: Mirror, sha256: bool = False) -> None:
        """Take a broken mirror out of use, and begin anew."""
        with reported(mirror.remote, mirror.path):
            await to_thread.run_sync(discard, mirror.path)
        await self._make(mirror, sha256)

    async def verify(self) -> list[str]:
        """Read all of every mirror that nobody works in, and discard the broken ones: their keys."""
        broken = []
        for path in sorted(self._root.glob("*.git")):
            lock = locks.try_lock(path.with_suffix(".lock"), locks.EXCLUSIVE)
            if lock is None:
                continue
            try:
                await to_thread.run_sync(_mend, path)
                if not path.exists() or not await self._whole(path, lock):
                    broken.append(path.stem)
                    await to_thread.run_sync(discard, path)
            finally:
                os.close(lock)
        return broken

    async def _whole(self, path: Path, lock: int) -> bool:
        """Whether each object is what its name says, and none that another needs is missing."""
        checks = [["fsck", "--connectivity-only", "--no-dangling", "--no-progress"]]
        if packs := [str(index) for index in (path / "objects" / "pack").glob("*.idx")]:
            checks.insert(0, ["verify-pack", *packs])
        try:
            for words in checks:
                await self._git.run(Call(words, what=f"mirror {path}", git_dir=path, descriptors=(lock,)))
        except MirrorError:
            return False
        return True

    async def _make(self, mirror: Mirror, sha256: bool) -> None:
        temporary = _temporary(mirror.path)
        kind = ["--object-format=sha256"] if sha256 else []
        words = ["init", "--quiet", "--bare", "--template=", *kind, str(temporary)]
        with reported(mirror.remote, mirror.path):
            temporary.mkdir(mode=0o700)
            guard = locks.try_lock_directory(temporary)  # keeps off who sweeps
        try:
            await self._git.run(Call(words, what=mirror.remote.what, descriptors=(mirror.lock,)))
            with reported(mirror.remote, mirror.path):
                (temporary / "description").write_text(f"{mirror.title}\n", "utf-8", "replace")
                await to_thread.run_sync(os.rename, temporary, mirror.path)
        finally:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(_remove, temporary)
            if guard is not None:
                os.close(guard)


def rebuildable(error: BackendError | OSError) -> bool:
    """Whether a new mirror can help: not against a network, a closed door, or a full disk."""
    if isinstance(error, OSError):
        return error.errno not in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, MirrorError)


def discard(path: Path) -> None:
    """Take a mirror out of use at once, and remove it; its lock is held."""
    taken = _temporary(path)
    with suppress(FileNotFoundError):
        os.rename(path, taken)
        _remove(taken)


def _temporary(path: Path) -> Path:
    """A new name for what is to become a mirror, or was one."""
    return path.parent / f".tmp-{path.stem}-{secrets.token_hex(8)}"


def _remove(path: Path) -> None:
    """Remove what may be closed to us, or no directory; what cannot be removed stays for the next time."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink()
        return
    with suppress(OSError):
        path.chmod(0o700)
    for directory, names, _ in os.walk(path):
        for name in names:  # before it is looked into
            inner = os.path.join(directory, name)
            with suppress(OSError):
                if not os.path.islink(inner):
                    os.chmod(inner, 0o700)
    shutil.rmtree(path, ignore_errors=True)


def _mend(path: Path) -> None:
    """Remove what a killed process has left, and a mirror that is closed to us.

    Whoever holds the mirror's lock knows that no git is alive in it."""
    for left in path.parent.glob(f".tmp-{path.stem}-*"):
        _remove(left)
    if os.path.lexists(path) and not _mended(path):
        discard(path)


def _mended(path: Path) -> bool:
    """Whether all of a mirror is open to us; left-overs in it go."""
    if path.is_symlink() or not path.is_dir() or not _open(path):
        return False
    for directory, names, found in os.walk(path):
        if not all(_open(os.path.join(directory, name)) for name in names):  # which walk leaves out
            return False
        inner = os.path.relpath(directory, path)
        if inner == ".":
            names[:] = [name for name in names if name != "lfs"]  # git-lfs cares for its own
        for name in found:
            file = os.path.join(directory, name)
            if name.endswith(".lock") or (not inner.startswith("refs") and _LEFT.match(name)):
                with suppress(OSError):
                    os.unlink(file)
            elif not os.access(file, os.R_OK):
                return False
    return True


def _open(directory: str | Path) -> bool:
    return os.access(directory, os.R_OK | os.W_OK | os.X_OK)


@contextmanager
def reported(remote: Remote, path: Path) -> Iterator[None]:
    """Errors of the disk that mirrors are on, in one line."""
    try:
        yield
    except OSError as error:
        said = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"{remote.what}: there is no room for it: {said}; free space, or run: flowagent cache prune"
            ) from error
        raise BackendError(
            f"{remote.what}: its mirror {path} cannot be used: {said}; check that directory"
        ) from error

"""From a commit in a mirror to a directory: exactly its tree, and never more than an agent takes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from flowagent.errors import BackendError, StorageNotFoundError
from flowagent.hints import near_path
from flowagent_backends.git.mirrors import Mirror
from flowagent_backends.git.program import Call, Git, MirrorError, first_error
from flowagent_backends.git.remotes import Remote

MOST_FILES = 1_000_000
INDEX = "tmp_index"  # a name that is mended away, should git be killed
ATTRIBUTES = "* -text -ident -working-tree-encoding\n"
"""Files are what is stored, as other storages have them; no commit chooses a converter."""
LFS = "git-lfs"
POINTER = 1024
"""Bytes that a pointer to a large file has at the most, as git-lfs has it."""
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\n(?:[^\n]*\n){0,20}?size (?P<size>\d{1,18})\n"
)
_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\*?[]!# "})


@dataclass(frozen=True)
class Listing:
    """What a commit holds: how many files, how many bytes in them, and its submodules: path and commit."""

    files: int
    size: int
    submodules: tuple[tuple[str, str], ...]


async def _listing(
    mirror: Mirror, commit: str, paths: Sequence[str], limit: int, *, lfs: bool = False
) -> Listing:
    chosen = ["--", *paths] if paths else []
    counting = _Counting(f"{mirror.remote.what}: commit {commit[:12]}", limit, set(paths))
    listed = ("--literal-pathspecs", "ls-tree", "-r", "-l", "-z", "--full-tree", commit, *chosen)
    await mirror.git(*listed, take=counting.take)
    if counting.unmet:
        path = min(counting.unmet)
        names = await mirror.git("ls-tree", "-r", "-t", "-z", "--name-only", "--full-tree", commit)
        known = names.decode("utf-8", "surrogateescape").split("\0")
        raise StorageNotFoundError(
            f"{counting.what} has no {path!r}, named in sparse={near_path(path, known)}"
        )
    if lfs and counting.small:
        asked = "".join(f"{oid}\n" for oid in counting.small).encode()
        await mirror.git("cat-file", "--batch", stdin=asked, take=_Pointers(counting.add).take)
    return Listing(counting.files, counting.size, tuple(counting.submodules))


@dataclass
class _Counting:
    """Adds up what git lists, as it comes: a few trees that repeat each other can list without an end."""

    what: str
    limit: int
    unmet: set[str]
    """Of the paths that were asked for, those that nothing is at or below."""
    files: int = 0
    size: int = 0
    submodules: list[tuple[str, str]] = field(default_factory=list)
    small: set[str] = field(default_factory=set)
    """Files that may be pointers to large ones."""
    _rest: bytes = b""

    def take(self, data: bytes) -> None:
        *entries, self._rest = (self._rest + data).split(b"\0")
        for entry in entries:
            about, _, name = entry.partition(b"\t")
            _, kind, oid, size = about.split()
            path = name.decode("utf-8", "surrogateescape")
            if kind == b"commit":
                self.submodules.append((path, oid.decode()))
            elif not size.isdigit():
                raise MirrorError(f"{self.what} is not whole: git knows no size of {oid.decode()}")
            else:
                self.size += int(size)
                if int(size) <= POINTER:
                    self.small.add(oid.decode())
            self.files += 1
            self.unmet -= {wanted for wanted in self.unmet if f"{path}/".startswith(f"{wanted}/")}
        self.check()

    def add(self, size: int) -> None:
        """Count bytes that are kept elsewhere."""
        self.size += size
        self.check()

    def check(self) -> None:
        if self.size > self.limit or self.files > MOST_FILES:
            held = f"{self.files} files, {self.size >> 20} MB or more"
            raise BackendError(
                f"{self.what} has more than this agent takes: {held}; name what is needed with sparse=, "
                "or see max_source in its configuration"
            )


@dataclass
class _Pointers:
    """Finds pointers of git-lfs in what ``git cat-file --batch`` prints: how large are their files?"""

    found: Callable[[int], None]
    _rest: bytes = b""

    def take(self, data: bytes) -> None:
        self._rest += data
        at = 0
        while (end := self._rest.find(b"\n", at)) >= 0:
            size = int(self._rest[at:end].rpartition(b" ")[2])
            if len(self._rest) < end + size + 2:
                break
            if pointer := _POINTER.match(self._rest, end + 1, end + 1 + size):
                self.found(int(pointer["size"]))
            at = end + size + 2
        self._rest = self._rest[at:]


async def check_out(
    mirror: Mirror,
    commit: str,
    directory: Path,
    paths: Sequence[str],
    lfs: Sequence[tuple[str, str]],
    *,
    limit: int,
    room: int,
) -> Listing:
    """Write a commit's files, or those below ``paths``, to an empty directory. ``lfs``: what makes git-lfs
    get those that it keeps; ``limit``: bytes of one file; ``room``: of all.

    :raises BackendError: it holds more than that."""
    if lfs:  # all is counted before the first of them comes
        listed = await _listing(mirror, commit, paths, room, lfs=True)
        await _write(mirror, commit, directory, paths, lfs, limit)
        return listed
    failed: list[BackendError] = []

    async def write() -> None:
        try:
            await _write(mirror, commit, directory, paths, (), limit)
        except BackendError as error:
            failed.append(error)  # what the listing says of the commit is worth more

    with first_error():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)  # it ends at once when the listing has counted too much
            listed = await _listing(mirror, commit, paths, room)
    if failed:
        raise failed[0]
    return listed


async def _write(
    mirror: Mirror,
    commit: str,
    directory: Path,
    paths: Sequence[str],
    lfs: Sequence[tuple[str, str]],
    limit: int,
) -> None:
    config = list(lfs)
    (mirror.path / "info").mkdir(exist_ok=True)
    (mirror.path / "info" / "attributes").write_text(ATTRIBUTES)
    if paths:
        patterns = "".join(f"/{path.translate(_SPECIAL)}\n" for path in paths)
        (mirror.path / "info" / "sparse-checkout").write_text(patterns, "utf-8", "surrogateescape")
        config += [("core.sparseCheckout", "true"), ("core.sparseCheckoutCone", "false")]
    index = mirror.path / INDEX
    env = {"GIT_INDEX_FILE": str(index), "GIT_WORK_TREE": str(directory)}
    if lfs:
        env["GIT_LFS_SKIP_SMUDGE"] = "0"
    try:
        await mirror.git(
            "read-tree",
            "--reset",
            "-u",
            commit,
            env=env,
            config=config,
            file_limit=limit,
            remote=mirror.remote if lfs else None,
        )
    finally:
        with suppress(OSError):
            index.unlink()


async def submodule_urls(mirror: Mirror, commit: str) -> dict[str, str]:
    """The URLs in a commit's .gitmodules, by path."""
    names = (
        "config",
        "--blob",
        f"{commit}:.gitmodules",
        "-z",
        "--get-regexp",
        r"^submodule\..*\.(path|url)$",
    )
    try:
        said = (await mirror.git(*names)).decode("utf-8", "surrogateescape")
    except MirrorError:
        return {}  # there is none, or nothing in it
    sections: dict[str, dict[str, str]] = {}
    for entry in said.split("\0"):
        key, _, value = entry.partition("\n")
        section, _, name = key.removeprefix("submodule.").rpartition(".")
        sections.setdefault(section, {})[name] = value
    return {part["path"]: part["url"] for part in sections.values() if "path" in part and "url" in part}


def place(directory: Path, path: str, what: str) -> Path:
    """The directory of a submodule, which git has made. :raises BackendError: something else is there."""
    inner = directory / path
    if os.path.realpath(inner) != os.path.join(os.path.realpath(directory), path):
        raise BackendError(f"{what}: its path leads elsewhere; remove it from its repository")
    with suppress(FileExistsError):
        inner.mkdir(parents=True)
    if not inner.is_dir() or any(inner.iterdir()):
        raise BackendError(f"{what}: there is something else at its path; remove it from its repository")
    return inner


async def lfs_config(git: Git, remote: Remote) -> list[tuple[str, str]]:
    """What makes git fetch large files through git-lfs. :raises BackendError: that is not installed."""
    try:
        await git.run(Call(["lfs", "version"]))
    except BackendError as error:
        raise BackendError(
            f"{remote.what}: lfs=True takes git-lfs on the agent's machine: apt-get install git-lfs"
        ) from error
    return [
        ("filter.lfs.clean", f"{LFS} clean -- %f"),
        ("filter.lfs.smudge", f"{LFS} smudge -- %f"),
        ("filter.lfs.process", f"{LFS} filter-process"),
        ("filter.lfs.required", "true"),
        ("remote.origin.url", remote.url),
        ("lfs.activitytimeout", "30"),
        ("lfs.dialtimeout", "30"),
        ("lfs.locksverify", "false"),
        ("lfs.transfer.maxretries", "2"),
        ("lfs.transfer.maxretrydelay", "1"),
    ]

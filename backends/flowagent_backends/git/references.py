"""Which ref of a repository a declaration asks for, and what to say if it is not there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flowagent.errors import BackendError, StorageNotFoundError
from flowagent.hints import near
from flowagent.models import Json
from flowagent_backends.git.packets import Ref

HEADS, TAGS = "refs/heads/", "refs/tags/"


@dataclass(frozen=True)
class Wanted:
    """A branch, a tag, a commit (whole or abbreviated), or with nothing set the remote's HEAD."""

    branch: str | None = None
    tag: str | None = None
    commit: str | None = None

    @classmethod
    def of(cls, storage: Mapping[str, Json]) -> Wanted:
        commit = storage.get("commit")
        return cls(storage.get("branch_name"), storage.get("tag"), commit.lower() if commit else None)

    @property
    def pinned(self) -> bool:
        """Whether it says the commit itself, in full."""
        return self.commit is not None and len(self.commit) in (40, 64)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What to ask a server for."""
        if self.branch is not None:
            return (HEADS + self.branch,)
        if self.tag is not None:
            return (TAGS + self.tag,)
        return (HEADS, TAGS) if self.commit is not None else ("HEAD",)

    @property
    def kept(self) -> str:
        """The name under which a mirror keeps it: each is a first contact of its own."""
        if self.branch is not None:
            return f"refs/flowagent/heads/{_flat(self.branch)}"
        if self.tag is not None:
            return f"refs/flowagent/tags/{_flat(self.tag)}"
        return f"refs/flowagent/commits/{self.commit}" if self.commit else "refs/flowagent/HEAD"

    def choose(self, refs: Iterable[Ref]) -> str | None:
        """The commit, if these refs say it."""
        if self.commit is not None:
            found = {ref.commit for ref in refs if ref.commit.startswith(self.commit)}
            return found.pop() if len(found) == 1 else None
        name = self.prefixes[0]
        return next((ref.commit for ref in refs if ref.name == name), None)


def _flat(name: str) -> str:
    """A name that is no part of any other's path: where a/b is now, there may have been a branch a."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def missing(what: str, wanted: Wanted, refs: Sequence[Ref]) -> BackendError:
    """The error for what none of all branches and tags is."""
    branches = [ref.name.removeprefix(HEADS) for ref in refs if ref.name.startswith(HEADS)]
    tags = [ref.name.removeprefix(TAGS) for ref in refs if ref.name.startswith(TAGS)]
    if not branches and not tags:
        return StorageNotFoundError(f"{what} is empty; push a branch to it")
    if wanted.branch is not None:
        also = (
            "; there is a tag of that name: use tag="
            if wanted.branch in tags
            else near(wanted.branch, branches)
        )
        return StorageNotFoundError(f"{what} has no branch {wanted.branch!r}{also}")
    if wanted.tag is not None:
        also = (
            "; there is a branch of that name: use branch_name="
            if wanted.tag in branches
            else near(wanted.tag, tags)
        )
        return StorageNotFoundError(f"{what} has no tag {wanted.tag!r}{also}")
    if wanted.commit is not None:
        return StorageNotFoundError(f"{what} has no commit {wanted.commit}; push it, or correct commit=")
    return StorageNotFoundError(
        f"{what} has a HEAD that names no branch{near('main', branches)}; name one with branch_name="
    )

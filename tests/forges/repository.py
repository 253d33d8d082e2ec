"""A bare git repository, made and read with git itself: what the stand-ins of forges serve."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

IDENTITY = {
    "GIT_AUTHOR_NAME": "A. U. Thor",
    "GIT_AUTHOR_EMAIL": "author@example.com",
    "GIT_COMMITTER_NAME": "A. U. Thor",
    "GIT_COMMITTER_EMAIL": "author@example.com",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
}


@dataclass(frozen=True)
class Entry:
    """What stands in a tree: ``mode`` as git has it, ``kind`` blob, tree or commit."""

    mode: str
    kind: str
    sha: str
    path: str
    size: int = 0


@dataclass(frozen=True)
class Link:
    """The content of a symbolic link."""

    target: str


class BareRepository:
    """One at ``path``; its default branch is ``default``."""

    def __init__(self, path: Path, default: str = "main") -> None:
        self.path = path
        self.default = default
        self._seen: dict[tuple[str, ...], list[Entry]] = {}
        self._blobs: dict[str, bytes] = {}
        self._run("init", "--quiet", "--bare", f"--initial-branch={default}", str(path))

    def _run(self, *arguments: str, data: bytes = b"", **environment: str) -> bytes:
        done = subprocess.run(
            ["git", "-C", str(self.path) if self.path.exists() else "/", *arguments],
            input=data,
            capture_output=True,
            env={**os.environ, **IDENTITY, **environment},
            check=False,
        )
        if done.returncode:
            raise LookupError(done.stderr.decode())
        return done.stdout

    def commit(
        self,
        files: Mapping[str, str | bytes | Link | None],
        *,
        branch: str | None = None,
        message: str = "change",
        onto: str | None = None,
    ) -> str:
        """Commit files, and None for those that go, to a branch; the commit."""
        branch = branch or self.default
        parent = self.find(onto or f"refs/heads/{branch}")
        data = message.encode()
        stream = [
            f"commit refs/heads/{branch}\ncommitter A <a@example.com> {len(self._seen)} +0000\n".encode()
        ]
        stream += [b"data %d\n" % len(data), data, f"\nfrom {parent}\n".encode() if parent else b"\n"]
        for path, content in files.items():
            if content is None:
                stream.append(f"D {path}\n".encode())
                continue
            mode = "120000" if isinstance(content, Link) else "100644"
            text = content.target if isinstance(content, Link) else content
            data = text.encode() if isinstance(text, str) else text
            stream += [f"M {mode} inline {path}\ndata {len(data)}\n".encode(), data, b"\n"]
        self._run("fast-import", "--quiet", "--force", data=b"".join(stream))
        commit = self.find(f"refs/heads/{branch}")
        assert commit is not None
        self._seen[commit, "time"] = []  # so that no two commits are made at the same time
        return commit

    def tag(self, name: str, commit: str, *, annotated: bool = False) -> None:
        self._run("tag", *(("-a", "-m", name) if annotated else ()), name, commit)

    def find(self, name: str) -> str | None:
        """The commit of a full ref or an id of it, perhaps shortened."""
        try:
            return self._run("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").decode().strip()
        except LookupError:
            return None

    def by_name(self, name: str) -> str | None:
        """The commit of a branch, a tag, or an id."""
        whole = [name] if name.startswith("refs/") else []
        for full in (*whole, f"refs/heads/{name}", f"refs/tags/{name}", f"refs/{name}"):
            if found := self.find(full):
                return found
        hexadecimal = len(name) >= 7 and not set(name) - set("0123456789abcdef")
        return self.find(name) if hexadecimal else None

    def refs(self, kind: str) -> dict[str, str]:
        """The commits of all ``heads`` or ``tags``."""
        out = self._run("for-each-ref", "--format=%(refname)", f"refs/{kind}").decode()
        names = [line.removeprefix(f"refs/{kind}/") for line in out.splitlines()]
        return {name: self.find(f"refs/{kind}/{name}") or "" for name in names}

    def entry(self, commit: str, path: str) -> Entry | None:
        """What is at a path; None: nothing."""
        return next((found for found in self.tree(commit, recursive=True) if found.path == path), None)

    def tree(self, treeish: str, path: str = "", *, recursive: bool = False) -> list[Entry]:
        """The entries of a directory; of a commit, they stay what they are."""
        key = (treeish, path, str(recursive))
        if key not in self._seen:
            self._seen[key] = self._listed(treeish, path, recursive=recursive)
        return self._seen[key]

    def _listed(self, treeish: str, path: str, *, recursive: bool) -> list[Entry]:
        where = (path.rstrip("/") + "/",) if path else ()
        flags = ("-r", "-t") if recursive else ()
        try:
            out = self._run("ls-tree", "-z", "--long", *flags, treeish, "--", *where).decode()
        except LookupError:
            return []
        entries = []
        for line in filter(None, out.split("\0")):
            head, _, name = line.partition("\t")
            mode, kind, sha, size = head.split()
            if not path or name.startswith(where[0]):
                entries.append(Entry(mode, kind, sha, name, 0 if size == "-" else int(size)))
        return entries

    def blob(self, sha: str) -> bytes:
        if sha not in self._blobs:
            self._blobs[sha] = self._run("cat-file", "blob", sha)
        return self._blobs[sha]

    def kind(self, sha: str) -> str | None:
        try:
            return self._run("cat-file", "-t", sha).decode().strip()
        except LookupError:
            return None

    def last_commit(self, commit: str, path: str) -> str:
        return self._run("log", "-1", "--format=%H", commit, "--", path).decode().strip()

    def message(self, commit: str) -> str:
        return self._run("log", "-1", "--format=%B", commit).decode().strip()

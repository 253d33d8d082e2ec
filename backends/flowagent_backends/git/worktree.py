"""The declaration of a script in a work tree: its remote, its branch, and what is not pushed yet."""

from __future__ import annotations

import ast
import os
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowagent.errors import FlowError, UsageError
from flowagent.storage import Git
from flowagent_backends.git.remotes import address, parse

PATIENCE = 30
NAMED = 3
"""Files that a warning names; of more it says how many."""


@dataclass(frozen=True)
class Found:
    """A declaration, and what its author should know before others run it."""

    storage: Git
    warnings: tuple[str, ...]


def declare(script: Path) -> Found:
    """Where a script is kept, by its work tree. :raises UsageError: it is in none, or that has no remote."""
    top = _asked(script, "rev-parse", "--show-toplevel")
    if top is None:
        raise UsageError(f"{script} is in no Git work tree; leave --git out, or commit it to a repository")
    path = _inner(script, top)
    if _asked(script, "ls-files", "--error-unmatch", "--", str(script)) is None:
        raise UsageError(f"{path} is not tracked in {top}; run: git add {path}, commit and push it")
    branch = _asked(script, "symbolic-ref", "--short", "-q", "HEAD")
    if not branch:
        raise UsageError(f"{top} is on no branch; check one out, as agents run what a branch says")
    remote = _asked(script, "config", f"branch.{branch}.remote") or "origin"
    upstream = (_asked(script, "config", f"branch.{branch}.merge") or branch).removeprefix("refs/heads/")
    url = _asked(script, "remote", "get-url", remote)
    if url is None:
        raise UsageError(f"{top} has no remote {remote!r}; run: git remote add {remote} URL, and push to it")
    return Found(_storage(path, url, upstream, top), tuple(_warnings(script, top, f"{remote}/{upstream}")))


def _storage(path: str, url: str, branch: str, top: str) -> Git:
    remote = parse(url, f"the remote of {top}")
    repo = remote.path.strip("/").removesuffix(".git")
    where: dict[str, Any] = {"repo": repo, "repo_host": remote.place, "use_ssh": remote.scheme == "ssh"}
    if address(where) != remote.url:
        where = {"repo": remote.url}  # what is not said by parts is said as it is
    try:
        if remote.password:
            raise FlowError("a password is no part of a declaration")
        return Git(path, branch_name=branch, **where)
    except FlowError:
        raise UsageError(
            f"the remote of {top} has a password, or is neither https://host/path nor user@host:path, so its "
            "address goes into a secret: run flowagent secret set CLONE_URL, and give the flow "
            f"storage=Git({path!r}, branch_name={branch!r}, git_clone_url_secret_name='CLONE_URL')"
        ) from None


def _warnings(script: Path, top: str, upstream: str) -> list[str]:
    said = []
    if names := _uncommitted(script, top):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        said.append(
            f"{top} has files that are not committed ({', '.join(names[:NAMED])}{more}); agents do not see "
            "them, as they run the commit and not the work tree: commit and push what the flow needs"
        )
    ahead = _asked(script, "rev-list", "--count", f"refs/remotes/{upstream}..HEAD")
    if ahead is None:
        said.append(f"{upstream} was never pushed to or fetched; run: git push")
    elif ahead != "0":
        commits = "1 commit is" if ahead == "1" else f"{ahead} commits are"
        said.append(f"{commits} not pushed to {upstream} yet; run: git push")
    return said


# -- what only the work tree has ---------------------------------------------------------------------------


def _uncommitted(script: Path, top: str) -> list[str]:
    """What is not as it was committed: first what the flow is made of, be it ignored; bytecode never."""
    made_of = {_inner(file, top) for file in _imported(script, Path(top))}
    listed = _asked(script, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all") or ""
    changed = {entry[3:] for entry in listed.split("\0") if entry and "__pycache__/" not in entry}
    changed |= made_of.difference((_asked(script, "ls-files", "-z", "--full-name", ":/") or "").split("\0"))
    return sorted(changed, key=lambda name: (name not in made_of, name))


def _imported(script: Path, top: Path) -> list[Path]:
    """A script, and the files of its work tree that it imports, and that those import."""
    found = [script]
    for file in found:  # it grows
        for root, name in _imports(file, (script.parent, top)):
            module = root
            for part in name.split("."):
                module /= part
                for candidate in (module / "__init__.py", module.with_name(f"{part}.py")):
                    if candidate.is_file() and candidate not in found:
                        found.append(candidate)
    return found


def _imports(file: Path, roots: tuple[Path, ...]) -> Iterator[tuple[Path, str]]:
    """The names that a file imports, each with the directories to look in."""
    try:
        with warnings.catch_warnings(action="ignore"):
            nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (OSError, SyntaxError, ValueError):
        return  # loading it says what is wrong
    for node in nodes:
        above, base = roots, ""
        if isinstance(node, ast.ImportFrom):
            base = f"{node.module}." if node.module else ""
            above = tuple(file.parents[node.level - 1 : node.level]) if node.level else roots
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((root, base + alias.name) for alias in node.names for root in above)


def _inner(file: Path, top: str) -> str:
    return os.path.relpath(os.path.realpath(file), os.path.realpath(top))


def _asked(script: Path, *args: str) -> str | None:
    """What git says to whoever works there; None: that it is not so."""
    command = ["git", "-C", str(script.parent), *args]
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, timeout=PATIENCE, check=False)
    except FileNotFoundError:
        raise UsageError("--git takes git on this machine; install it") from None
    except subprocess.TimeoutExpired:
        raise UsageError(f"git {args[0]} in {script.parent} took longer than {PATIENCE} s") from None
    return done.stdout.decode("utf-8", "surrogateescape").strip("\n") if done.returncode == 0 else None

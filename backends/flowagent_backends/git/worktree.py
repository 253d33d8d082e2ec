"""The declaration of a script in a work tree: its remote, its branch, and what is not pushed yet."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from flowagent.errors import UsageError
from flowagent.storage import Git
from flowagent_backends.git.remotes import parse

PATIENCE = 30


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
    path = os.path.relpath(os.path.realpath(script), os.path.realpath(top))
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
    host = f"{remote.host}:{remote.port}" if remote.port else remote.host
    repo = remote.path.strip("/").removesuffix(".git")
    if remote.scheme == "https" and not remote.password:
        return Git(path, repo, host, branch_name=branch)
    if remote.scheme == "ssh" and remote.user == "git" and not remote.path.startswith("~"):
        return Git(path, repo, host, branch_name=branch, use_ssh=True)
    raise UsageError(
        f"the remote of {top} is not https:// or git@host, so its address goes into a secret: run "
        f"flowagent secret set CLONE_URL, and give the flow storage=Git({path!r}, branch_name={branch!r}, "
        "git_clone_url_secret_name='CLONE_URL')"
    )


def _warnings(script: Path, top: str, upstream: str) -> list[str]:
    warnings = []
    if changed := _asked(script, "status", "--porcelain", "--untracked-files=no"):
        names = [line[2:].strip() for line in changed.splitlines()]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.append(
            f"{top} has changes that are not committed ({', '.join(names[:3])}{more}); agents do not see them"
        )
    ahead = _asked(script, "rev-list", "--count", f"refs/remotes/{upstream}..HEAD")
    if ahead is None:
        warnings.append(f"{upstream} was never pushed to or fetched; run: git push")
    elif ahead != "0":
        commits = "1 commit is" if ahead == "1" else f"{ahead} commits are"
        warnings.append(f"{commits} not pushed to {upstream} yet; run: git push")
    return warnings


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

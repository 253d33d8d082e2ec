"""Flows in Git repositories."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

from flowagent.flows.declarations import count, flag, names, text
from flowagent.flows.errors import FlowError
from flowagent.storage.base import Storage

_PLACE = re.compile(
    r"(?:[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?|\[(?P<ipv6>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]{1,5}))?"
)
_PREFIX = re.compile(r"[A-Za-z0-9._~%/-]*")
_REPO = re.compile(r"[A-Za-z0-9._~][^\s\\:?#*\[\]\x00-\x1f\x7f]*")
_USER = r"[A-Za-z0-9_][A-Za-z0-9._+-]*"
_URL = re.compile(
    rf"(?:https://|ssh://{_USER}@)(?P<place>[^/@]+)/(?P<path>.+)"
    rf"|{_USER}@(?P<host>[^/@:\[]+|\[[^\]]+\]):(?P<short>[^:-].*)"
)
_NO_PATH = re.compile(r"[\s\\?#\x00-\x1f\x7f]|(?:^|/)\.\.(?:/|$)")
_COMMIT = re.compile(r"[0-9a-fA-F]{4,64}")
BAD_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|^[./-]|[./]$|\.lock$|\.lock/")
"""What a name of a ref cannot have (git-check-ref-format)."""


class Git(Storage):
    """The script ``flow_path`` of a repository, as it is on a branch, at a tag or at a commit.

    ``repo`` is ``"org/repo"`` on ``repo_host``, which may have a port and a path, or a URL that is used as it
    is: ``https://host/path``, ``ssh://user@host/path`` or ``user@host:path``; any other address is the value
    of the secret ``git_clone_url_secret_name``. Without ``branch_name``, ``tag`` and ``commit``, it is the
    branch that the repository's HEAD names. The secret ``git_token_secret_name`` is a token, used with
    ``git_token_username`` (by default the owner of the repository; with ``format_access_token=False`` the
    token is used as it is, as ``user:password`` or as a user name); over ssh the agent's keys are used.

    ``clone_depth`` commits of history come with the first contact; 0: all. ``sparse`` names the directories
    and files that are needed, if not all are. ``checkout="private"`` gives each run a copy it may write to.

    :raises FlowError: arguments that contradict each other
    """

    fields: ClassVar[tuple[str, ...]] = (
        "flow_path",
        "repo",
        "repo_host",
        "flow_name",
        "git_token_secret_name",
        "git_token_username",
        "git_clone_url_secret_name",
        "branch_name",
        "tag",
        "commit",
        "clone_depth",
        "use_ssh",
        "format_access_token",
        "submodules",
        "lfs",
        "sparse",
        "checkout",
    )

    def __init__(
        self,
        flow_path: str,
        repo: str | None = None,
        repo_host: str = "github.com",
        flow_name: str | None = None,
        git_token_secret_name: str | None = None,
        git_token_username: str | None = None,
        git_clone_url_secret_name: str | None = None,
        branch_name: str | None = None,
        tag: str | None = None,
        commit: str | None = None,
        clone_depth: int | None = 1,
        use_ssh: bool = False,
        format_access_token: bool = True,
        submodules: bool = False,
        lfs: bool = False,
        sparse: Iterable[str] | None = None,
        checkout: str = "shared",
        **options: Any,
    ) -> None:
        if options.pop("stored_as_script", True) is not True:
            raise FlowError("storage Git: a repository holds scripts; leave stored_as_script out")
        super().__init__(stored_as_script=True, **options)
        self.flow_path = inner_path(flow_path, "storage Git: flow_path")
        self.repo = text(repo, "storage Git: repo")
        self.repo_host = text(repo_host, "storage Git: repo_host") or "github.com"
        self.flow_name = text(flow_name, "storage Git: flow_name")
        self.git_token_secret_name = text(git_token_secret_name, "storage Git: git_token_secret_name")
        self.git_token_username = text(git_token_username, "storage Git: git_token_username")
        self.git_clone_url_secret_name = text(
            git_clone_url_secret_name, "storage Git: git_clone_url_secret_name"
        )
        self.branch_name = _ref(branch_name, "branch_name")
        self.tag = _ref(tag, "tag")
        self.commit = text(commit, "storage Git: commit")
        self.clone_depth = count(clone_depth or 0, "storage Git: clone_depth")
        self.use_ssh = flag(use_ssh, "storage Git: use_ssh")
        self.format_access_token = flag(format_access_token, "storage Git: format_access_token")
        self.submodules = flag(submodules, "storage Git: submodules")
        self.lfs = flag(lfs, "storage Git: lfs")
        self.sparse = tuple(
            inner_path(path, "storage Git: sparse") for path in names(sparse, "storage Git: sparse")
        )
        self.checkout = checkout
        self._check_place()
        self._check_revision()
        if checkout not in ("shared", "private"):
            raise FlowError(f"storage Git: checkout is 'shared' or 'private'; got {checkout!r}")
        if self.sparse and not any(is_below(self.flow_path, path) for path in self.sparse):
            raise FlowError(
                f"storage Git: sparse leaves out the flow itself; add {self.flow_path!r} or its directory"
            )

    def _check_place(self) -> None:
        if not self.repo and not self.git_clone_url_secret_name:
            raise FlowError(
                "storage Git: which repository? give repo='org/repo' or git_clone_url_secret_name="
            )
        if self.git_clone_url_secret_name:
            also = [
                name
                for name in ("repo", "use_ssh", "git_token_secret_name", "git_token_username")
                if getattr(self, name)
            ]
            if also:
                raise FlowError(
                    f"storage Git: the URL in git_clone_url_secret_name= says all; leave out {also[0]}="
                )
        if self.repo and not _is_repo(self.repo):
            raise FlowError(
                "storage Git: repo is a path such as 'org/repo', or a URL such as https://host/org/repo or "
                f"git@host:org/repo; got {_shown(self.repo)} (any other address, and one with a password, "
                "goes into a secret, see git_clone_url_secret_name=)"
            )
        if not _is_host(self.repo_host):
            raise FlowError(
                "storage Git: repo_host is a host such as 'git.example.com', 'example.com:8443/prefix' or "
                f"'[::1]:8443'; got {_shown(self.repo_host)}"
            )
        url = ":" in (self.repo or "")
        if url and (self.use_ssh or self.repo_host != "github.com"):
            raise FlowError("storage Git: the URL in repo= says all; leave out repo_host= and use_ssh=")
        ssh = self.use_ssh or (url and not str(self.repo).startswith("https:"))
        if ssh and self.git_token_secret_name:
            raise FlowError("storage Git: ssh uses keys; leave out git_token_secret_name=, or use https")
        if self.git_token_username and not self.git_token_secret_name:
            raise FlowError("storage Git: git_token_username= needs the token: give git_token_secret_name=")

    def _check_revision(self) -> None:
        given = [name for name in ("branch_name", "tag", "commit") if getattr(self, name)]
        if len(given) > 1:
            raise FlowError(
                f"storage Git: {' and '.join(given)} exclude each other; give the one that is to be run"
            )
        if self.commit and not _COMMIT.fullmatch(self.commit):
            raise FlowError(
                f"storage Git: commit is 4 or more hexadecimal digits; got {self.commit!r} "
                "(names go into branch_name= or tag=)"
            )


def inner_path(value: str, what: str) -> str:
    """A path within a repository or archive, from its root. :raises FlowError: it leads out of it."""
    path = (text(value, what) or "").strip("/")
    parts = path.split("/")
    if not path or any(part in ("", ".", "..", ".git") for part in parts) or any(ord(c) < 32 for c in path):
        raise FlowError(f"{what} is a path within the repository, such as 'flows/etl.py'; got {value!r}")
    return path


def is_below(path: str, directory: str) -> bool:
    """Whether a path is this directory, or in it."""
    return path == directory or path.startswith(directory + "/")


def _is_repo(repo: str) -> bool:
    """Whether this is a path, or a URL without a password."""
    if ":" not in repo:
        return bool(_REPO.fullmatch(repo)) and ".." not in repo.split("/")
    found = _URL.fullmatch(repo)
    if found is None or _NO_PATH.search(found["path"] or found["short"]):
        return False
    return _is_place(found["place"] or found["host"])


def _is_host(host: str) -> bool:
    place, _, prefix = host.partition("/")
    return _is_place(place) and bool(_PREFIX.fullmatch(prefix)) and ".." not in host


def _is_place(place: str) -> bool:
    """Whether this is a host, or a host and a port."""
    found = _PLACE.fullmatch(place)
    if found is None or not 0 < int(found["port"] or 1) < 65536:
        return False
    if found["ipv6"]:
        from ipaddress import IPv6Address  # which takes milliseconds to import

        try:
            IPv6Address(found["ipv6"])
        except ValueError:
            return False
    return True


def _shown(address: str) -> str:
    """As an error may show it: a password may be before an @, or in a query."""
    return repr(re.sub(r"(?s)^(\w+://)?.*(?=@)|(?<=\?).*", r"\1***", address))


def _ref(value: str | None, name: str) -> str | None:
    ref = text(value, f"storage Git: {name}")
    if ref is not None and (BAD_REF.search(ref) or ref == "@"):
        raise FlowError(f"storage Git: {name} {value!r} is no name that Git allows; correct it")
    return ref

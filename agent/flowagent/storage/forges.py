"""Flows in repositories, read file by file through the API of the service that keeps them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar
from urllib.parse import urlsplit

from flowagent.flows.declarations import flag, plain, text
from flowagent.flows.errors import FlowError
from flowagent.storage.base import Storage
from flowagent.storage.git import BAD_REF

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.IGNORECASE)
_CREDENTIALS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


class Repository(Storage):
    """What storages in repositories share: a script at ``path``, and ``files`` beside it, at one commit.

    Paths are those of the repository; one that ends in ``/`` is a directory with all that is in it. They are
    there, at the same places, when the flow runs. With ``upload=True``, registering commits the script to
    the branch. Such storages hold scripts only, so ``stored_as_script`` is always true.
    """

    refers: ClassVar[str] = "ref"
    """The argument that names the branch, tag or commit."""

    def __init__(
        self,
        path: str,
        reference: str | None,
        *,
        files: Iterable[str] | None = None,
        upload: bool = False,
        **options: Any,
    ) -> None:
        what = f"storage {self.type}"
        if options.pop("stored_as_script", True) is not True:
            raise FlowError(f"{what}: repositories hold scripts; leave stored_as_script out")
        super().__init__(stored_as_script=True, **options)
        self.path = _path(path, f"{what}: path")
        if not self.path or self.path.endswith("/"):
            raise FlowError(f"{what}: path names the flow's file, as in 'flows/etl.py'; got {path!r}")
        self.files = _paths(files, f"{what}: files")
        self.upload = flag(upload, f"{what}: upload")
        reference = _ref(reference, f"{what}: {self.refers}")
        if upload and reference and (_SHA.fullmatch(reference) or reference.startswith("refs/tags/")):
            raise FlowError(
                f"{what}: upload=True commits to a branch, and {self.refers}={reference!r} is none; name one"
            )
        setattr(self, self.refers, reference)


class GitHub(Repository):
    """A script in a GitHub repository, by its REST API: ``GitHub("org/repo", "flows/etl.py")``.

    ``ref``: branch, tag or commit; by default the default branch. The token is the secret
    ``access_token_secret``, else the secret or variable ``GITHUB_ACCESS_TOKEN`` if this is GitHub's own host
    or one of the agent's ``token_hosts``, else there is none.
    ``base_url`` is that of a GitHub Enterprise Server's API: ``https://HOST/api/v3``.

    :raises FlowError: a value that cannot be, or values that contradict each other
    """

    fields: ClassVar[tuple[str, ...]] = (
        "repo",
        "path",
        "ref",
        "access_token_secret",
        "base_url",
        "files",
        "upload",
    )

    def __init__(
        self,
        repo: str,
        path: str,
        ref: str | None = None,
        access_token_secret: str | None = None,
        base_url: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, ref, **options)
        self.repo = _match(rf"{_NAME}/{_NAME}", repo, "storage GitHub: repo", "'owner/name'")
        self.access_token_secret = _secret(access_token_secret, "storage GitHub: access_token_secret")
        self.base_url = _url(base_url, "storage GitHub: base_url")


class GitLab(Repository):
    """A script in a GitLab repository, by its REST API: ``GitLab("group/project", "flows/etl.py")``.

    ``repo`` is the project's path, or its number. ``ref``: branch, tag or commit; by default the default
    branch. ``host``: of a server of one's own. The token is the secret ``access_token_secret``, else the
    secret or variable ``GITLAB_ACCESS_TOKEN`` if this is gitlab.com or one of the agent's ``token_hosts``,
    else there is none.

    :raises FlowError: a value that cannot be, or values that contradict each other
    """

    fields: ClassVar[tuple[str, ...]] = (
        "repo",
        "path",
        "ref",
        "host",
        "access_token_secret",
        "files",
        "upload",
    )

    def __init__(
        self,
        repo: str | int,
        path: str,
        ref: str | None = None,
        host: str | None = None,
        access_token_secret: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, ref, **options)
        given = str(repo) if isinstance(repo, int) and not isinstance(repo, bool) else repo
        form = "'group/project' or the project's number"
        self.repo = _match(rf"\d+|{_NAME}(/{_NAME})+", given, "storage GitLab: repo", form)
        self.host = _url(host, "storage GitLab: host")
        self.access_token_secret = _secret(access_token_secret, "storage GitLab: access_token_secret")


class Bitbucket(Repository):
    """A script in a Bitbucket repository, by its REST API: ``Bitbucket("PROJECT", "repo", "flows/etl.py")``.

    With ``host``, and no ``workspace``, a Bitbucket Server or Data Center there. Otherwise Bitbucket Cloud,
    where repositories are found by ``workspace``, by default the value of ``project``.

    The token is the secret ``access_token_secret``, else the secret or variable ``BITBUCKET_ACCESS_TOKEN`` if
    this is the Cloud or one of the agent's ``token_hosts``.
    In the cloud, ``cloud_username_secret`` and ``cloud_app_password_secret`` name the secrets of an API
    token: an account's email address, and the token; else the secrets or variables
    ``BITBUCKET_CLOUD_USERNAME`` and ``BITBUCKET_CLOUD_APP_PASSWORD``.

    :raises FlowError: a value that cannot be, or values that contradict each other
    """

    fields: ClassVar[tuple[str, ...]] = (
        "project",
        "repo",
        "path",
        "ref",
        "workspace",
        "host",
        "access_token_secret",
        "cloud_username_secret",
        "cloud_app_password_secret",
        "files",
        "upload",
    )

    def __init__(
        self,
        project: str,
        repo: str,
        path: str,
        ref: str | None = None,
        workspace: str | None = None,
        host: str | None = None,
        access_token_secret: str | None = None,
        cloud_username_secret: str | None = None,
        cloud_app_password_secret: str | None = None,
        **options: Any,
    ) -> None:
        what = "storage Bitbucket"
        super().__init__(path, ref, **options)
        # in the cloud, with a workspace, a project is a name for people
        form = r"[^\x00-\x1f\x7f]+" if workspace else rf"~?{_NAME}"
        self.project = _match(form, project, f"{what}: project", "the key of a project, as in 'ETL'")
        self.repo = _match(_NAME, repo, f"{what}: repo", "the repository's name in its address")
        found = rf"{_NAME}|\{{[0-9a-f-]+\}}"
        self.workspace = workspace and _match(found, workspace, f"{what}: workspace", "a workspace's id")
        self.host = _url(host, f"{what}: host")
        self.access_token_secret = _secret(access_token_secret, f"{what}: access_token_secret")
        self.cloud_username_secret = _secret(cloud_username_secret, f"{what}: cloud_username_secret")
        self.cloud_app_password_secret = _secret(
            cloud_app_password_secret, f"{what}: cloud_app_password_secret"
        )
        cloud = (self.cloud_username_secret, self.cloud_app_password_secret)
        if any(cloud) and not all(cloud):
            raise FlowError(
                f"{what}: cloud_username_secret= and cloud_app_password_secret= go together; give both"
            )
        if any(cloud) and self.access_token_secret:
            raise FlowError(
                f"{what}: access_token_secret= and cloud_username_secret= exclude each other; give one token"
            )
        if any(cloud) and self.host and not self.workspace:
            raise FlowError(
                f"{what}: cloud_username_secret= is for Bitbucket Cloud, and host= names a server; "
                "give access_token_secret="
            )


class CodeCommit(Repository):
    """A script in AWS CodeCommit: ``CodeCommit("repo", "flows/etl.py")``.

    ``commit``: branch, tag or commit; by default the default branch. Credentials are found as the AWS tools
    find them; ``client_options`` are options of the client, such as ``{"region_name": "eu-central-1"}``.
    Names of repositories have no owner: what stands before a ``/`` is left out.

    :raises FlowError: a value that cannot be, or values that contradict each other
    """

    fields: ClassVar[tuple[str, ...]] = ("repo", "path", "commit", "client_options", "files", "upload")
    refers: ClassVar[str] = "commit"

    def __init__(
        self,
        repo: str,
        path: str,
        commit: str | None = None,
        client_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, commit, **options)
        self.repo = _match(r"[\w.-]+", repo.rpartition("/")[2] if isinstance(repo, str) else repo,
                           "storage CodeCommit: repo", "the repository's name")  # fmt: skip
        what = "storage CodeCommit: client_options"
        if client_options is not None and not isinstance(client_options, Mapping):
            raise FlowError(f"{what} takes a dict; got {client_options!r}")
        for name in _CREDENTIALS:
            if name in (client_options or {}):
                raise FlowError(
                    f"{what}: {name} would be stored with the flow; "
                    "give credentials by the environment or a profile of the agent"
                )
        self.client_options = None if client_options is None else plain(dict(client_options), what)


# -- values ----------------------------------------------------------------------------------------------


def _match(form: str, value: Any, what: str, example: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(form, value):
        raise FlowError(f"{what} takes {example}; got {value!r}")
    return value


def _path(value: Any, what: str) -> str:
    """A path within a repository in its plain form; a directory's ends in ``/``. :raises FlowError: none."""
    checked = text(value, what) or ""
    parts = [part for part in checked.split("/") if part not in ("", ".")]
    if not checked.isprintable() or checked.startswith("/") or ".." in parts or "\\" in checked:
        raise FlowError(f"{what} takes a path within the repository, without '..'; got {value!r}")
    return "/".join(parts) + ("/" if parts and checked.endswith(("/", "/.")) else "")


def _paths(value: Iterable[str] | None, what: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)):
        raise FlowError(f"{what} takes a list of paths; got {value!r}")
    paths = [_path(item, what) for item in value]
    if "" in paths:
        raise FlowError(f"{what}: a whole repository is what Git(...) is for; name files and directories")
    return tuple(dict.fromkeys(paths))


def _ref(value: Any, what: str) -> str | None:
    """A name that Git takes for a branch or tag (git-check-ref-format), or a commit."""
    checked = text(value, what)
    if checked is None or checked == "HEAD":
        return None
    if BAD_REF.search(checked):
        raise FlowError(f"{what} takes a branch, a tag or a commit; got {value!r}")
    return checked.lower() if _SHA.fullmatch(checked) else checked


def _url(value: Any, what: str) -> str | None:
    """The address of a service: host, perhaps port and path; https unless it says otherwise."""
    checked = text(value, what)
    if checked is None:
        return None
    try:
        parts = urlsplit(checked if "://" in checked else f"https://{checked}")
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), 0
    host = r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]"
    if (
        parts.scheme not in ("http", "https")
        or not re.fullmatch(rf"({host})(:\d+)?", parts.netloc)
        or not re.fullmatch(rf"(/{_NAME})*/?", parts.path)
        or any(letter in checked for letter in "?#")
        or not checked.isprintable()
        or port == 0
    ):
        # what does not belong there may be a password
        shown = "one with more than that" if any(letter in checked for letter in "@?#") else repr(value)
        raise FlowError(f"{what} takes an address like https://host or https://host/path; got {shown}")
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


def _secret(value: Any, what: str) -> str | None:
    return None if value is None else _match(r"[A-Za-z_][A-Za-z0-9_]*", value, what, "the name of a secret")

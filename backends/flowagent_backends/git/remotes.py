"""Where a repository is, and what opens it: from a declaration and the agent's secrets."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import quote, unquote, urlsplit

from flowagent.errors import BackendError, one_line
from flowagent.models import Json
from flowagent.secrets import SecretProvider

SCHEMES = ("https", "http", "ssh", "git", "file")
USUAL = {"https": 443, "http": 80}
"""Ports that go without saying, and that HTTP clients leave out."""
TOKEN = 8
"""Characters that a token has, at least."""
_SCP = re.compile(r"(?:(?P<user>[^@:/\s-][^@:/\s]*)@)?(?P<host>[^@:/\s\[\]]+|\[[^\]]+\]):(?P<path>[^\s:-].*)")
_ANY_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?|[0-9A-Fa-f:.]+")
_BEFORE_PATH = re.compile(r"[a-z]+://[^/]*|[^/:\[]*(\[[^\]]*\])?:|")
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Remote:
    """A repository somewhere. ``url`` is what git and error messages get: it holds no credentials.

    ``identity`` is all that decides what may be read from there, the names of secrets included: caches are
    kept apart by it."""

    what: str  # printable, whoever named it
    url: str
    scheme: str
    host: str = ""
    port: int | None = None
    path: str = ""
    user: str = field(default="", repr=False)  # a token may be given as a user
    password: str = field(default="", repr=False)
    secret: str | None = None
    identity: str = ""

    @property
    def origin(self) -> str:
        """The part of the URL that credentials belong to."""
        return f"{self.scheme}://{self.place}"

    @property
    def place(self) -> str:
        """The host, with a port that is not the usual one."""
        return _bracketed(self.host) + (f":{self.port}" if self.port else "")

    @property
    def private(self) -> tuple[str, ...]:
        """What must be shown nowhere, in the forms in which a server may repeat it."""
        user = self.user if self.scheme.startswith("http") else ""
        if self.password and (len(user) < TOKEN or user in self.url):
            user = ""  # just a name
        bare = [part for part in (self.password, user) if part]
        if not bare:
            return ()
        login = b64encode(f"{self.user}:{self.password}".encode()).decode()
        forms = (form for part in bare for form in (part, quote(part), quote(part, "")))
        return tuple(dict.fromkeys((login, *forms)))


def of_storage(storage: Mapping[str, Json], secrets: SecretProvider) -> Remote:
    """The remote of a ``Git`` declaration. :raises SecretError: a secret is missing.

    :raises BackendError: the URL in a secret is none."""
    if name := storage.get("git_clone_url_secret_name"):
        remote = parse(secrets.get(name).strip(), f"the URL in secret {name}")
        return replace(
            remote, what=one_line(f"Git: {remote.what}"), secret=name, identity=f"{name}\0{remote.url}"
        )
    url = address(storage)
    remote = parse(url, one_line(url))
    what = one_line(f"Git: {remote.place}/{remote.path.strip('/').removesuffix('.git')}")
    if remote.scheme == "ssh":
        return replace(remote, what=what, identity=remote.url)
    if secret := storage.get("git_token_secret_name"):
        token = secrets.get(secret).strip()
        if not token or _CONTROL.search(token):
            raise BackendError(f"{what}: secret {secret} is not a token; store it again, on one line")
        user, password = _login(storage, remote, token)
        remote = replace(remote, user=user, password=password, secret=secret)
    identity = f"{remote.url}\0{secret or ''}\0{storage.get('git_token_username') or ''}"
    return replace(remote, what=what, identity=identity)


def address(storage: Mapping[str, Json]) -> str:
    """The URL of a declaration that has none in a secret: ``repo``, or what it makes with ``repo_host``."""
    repo: str = storage["repo"]
    if ":" in repo:
        return repo
    host = storage["repo_host"].rstrip("/")
    path = repo.strip("/").removesuffix(".git") + ".git"
    if not storage.get("use_ssh"):
        return f"https://{host}/{_encoded(path)}"
    place, _, prefix = host.partition("/")
    path = f"{prefix}/{path}" if prefix else path
    # the short form is relative to where the user git arrives; only the long one can have a port
    has_port = ":" in place.rpartition("]")[2]
    return f"ssh://git@{place}/{path}" if has_port else f"git@{place}:{path}"


def _login(storage: Mapping[str, Json], remote: Remote, token: str) -> tuple[str, str]:
    """User and password."""
    if not storage.get("format_access_token", True):
        user, _, password = token.partition(":")
        return user, password
    repo = storage["repo"]
    owner = unquote((remote.path if ":" in repo else repo).strip("/").partition("/")[0])
    return storage.get("git_token_username") or owner, token


def _encoded(path: str) -> str:
    """A path as it can stand in a URL; what is encoded there already stays as it is."""
    return quote(_BARE_PERCENT.sub("%25", path), safe="/%!$&'()*+,;=:@~")


def parse(url: str, called: str) -> Remote:
    """The remote of a URL in any of git's forms. ``called``: how errors name it, as it may hold a password.

    :raises BackendError: it is none that flowagent uses."""
    if not url or url.startswith("-") or _CONTROL.search(url):
        raise BackendError(
            f"Git: {called} is no URL of a repository; store one such as https://host/org/repo.git"
        )
    scheme, colon, rest = url.partition("://")
    if url.startswith("/"):
        return Remote(url, url, "file", path=url)
    if not colon:
        return _scp(url, called)
    if scheme.lower() not in SCHEMES:
        raise BackendError(
            f"Git: {called} starts with {scheme}://, which is not used; use {', '.join(SCHEMES)}"
        )
    if scheme.lower() == "file":
        place = rest.removeprefix("localhost")
        if not place.startswith("/"):
            raise BackendError(f"Git: {called} names no absolute path; store file:///path/of/repository")
        return Remote(f"file://{unquote(place)}", f"file://{place}", "file", path=unquote(place))
    return _network(scheme.lower(), rest, called)


def _network(scheme: str, rest: str, called: str) -> Remote:
    # a password may have been stored as it is: only the last @ before the host ends it
    found = _place(*rest.partition("/")[::2])
    if found is None and "@" in rest:
        login, _, place = rest.rpartition("@")
        authority, _, path = place.partition("/")
        found = _place(f"{login}@{authority}", path)
    if found is None:
        raise BackendError(
            f"Git: {called} is no URL of a repository; store one such as https://host/org/repo.git"
        )
    login, host, port, path = found
    user, _, password = login.partition(":")
    user, password = unquote(user), unquote(password)
    if _CONTROL.search(user + password):
        raise BackendError(f"Git: {called} has control characters in its password; store it percent-encoded")
    what = f"{_bracketed(host)}/{path.rstrip('/').removesuffix('.git')}"
    port = None if port == USUAL.get(scheme) else port
    remote = Remote(what, "", scheme, host, port, "", user, password)
    if scheme == "ssh":
        # as git does: what is encoded is decoded, and /~user/repo is relative to that user's home
        inner = unquote(path)
        if _CONTROL.search(inner):
            raise BackendError(f"Git: {called} has control characters in its path; correct it")
        at = f"{quote(user)}@" if user else ""
        inner = inner if inner.startswith("~") else f"/{inner}"
        return replace(remote, path=inner, password="", url=f"ssh://{at}{remote.place}/{path}")
    path = f"/{_encoded(path.rstrip('/'))}"
    return replace(remote, path=path, url=f"{remote.origin}{path}")


def _place(authority: str, path: str) -> tuple[str, str, int | None, str] | None:
    """Login, host, port and path; None: this is not where the path begins."""
    login, _, place = authority.rpartition("@")
    try:
        parts = urlsplit(f"//{place}/")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return None
    if not path.strip("/") or not _ANY_HOST.fullmatch(host) or "?" in path or "#" in path:
        return None
    return login, host, port, path


def _scp(url: str, called: str) -> Remote:
    found = _SCP.fullmatch(url)
    if found is None or not _ANY_HOST.fullmatch(found["host"].strip("[]")):
        raise BackendError(
            f"Git: {called} is no URL of a repository; store one such as https://host/org/repo.git"
        )
    user, host, path = found["user"] or "", found["host"].strip("[]"), found["path"]
    what = f"{_bracketed(host)}/{path.strip('/').removesuffix('.git')}"
    return Remote(what, url, "ssh", host, None, path, user)


def of_submodule(parent: Remote, url: str, name: str) -> Remote:
    """The remote of a submodule. It has its parent's credentials only on its parent's host, and leads to
    no place of this machine, unless its parent is there.

    :raises BackendError: its URL is none that is followed."""
    called = f"the URL of submodule {one_line(name)!r}"
    if url.startswith(("./", "../")):
        url = _relative(parent, url, called)
    remote = parse(url, f"{called} of {parent.what.removeprefix('Git: ')}")
    if remote.scheme not in {"https", "ssh", parent.scheme}:
        raise BackendError(
            f"{parent.what}: {called} starts with {remote.scheme}:, which is not followed there"
        )
    if (remote.scheme, remote.host, remote.port) == (parent.scheme, parent.host, parent.port):
        user = remote.user or parent.user
        remote = replace(remote, user=user, password=parent.password, secret=parent.secret)
    elif remote.password:
        remote = replace(remote, password="", user="")
    what = one_line(f"{parent.what}, submodule {name}")
    return replace(remote, what=what, identity=f"{parent.identity}\0{remote.url}")


def _relative(parent: Remote, url: str, called: str) -> str:
    """The URL, as git-submodule makes it: ``..`` takes a part off the parent's path."""
    before = _BEFORE_PATH.match(parent.url)
    assert before is not None
    whole, rest = parent.url[before.end() :], url
    path = whole.rstrip("/")
    while True:
        if rest.startswith("./"):
            rest = rest[2:]
        elif rest.startswith("../"):
            if not path.strip("/"):
                raise BackendError(f"{parent.what}: {called} leads above its host; correct .gitmodules")
            path, rest = path.rpartition("/")[0], rest[3:]
        else:
            break
    if not rest or ".." in rest.split("/") or _CONTROL.search(rest):
        raise BackendError(f"{parent.what}: {called} is no URL of a repository; correct .gitmodules")
    return before[0] + (f"{path}/{rest}" if path or whole.startswith("/") else rest)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host

"""Addresses of repositories: what a declaration takes, and what git and servers are given of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from flowagent.errors import BackendError, FlowError
from flowagent.storage import Git
from flowagent_backends.git.remotes import Remote, of_storage, of_submodule, parse

ABC = "0123456789abcdef"
AZURE = "https://dev.azure.com/org/My%20Project/_git/repo"
COMMIT = "https://git-codecommit.eu-west-1.amazonaws.com/v1/repos/flows"


@dataclass
class Secrets:
    value: str = ""

    def get(self, name: str) -> str:
        return self.value


def _remote(*where: str, secret: str = "", **options: Any) -> Remote:
    return of_storage(Git("flow.py", *where, **options).to_json(), Secrets(secret))


@pytest.mark.parametrize(
    ("where", "url"),
    [
        (("org/repo",), "https://github.com/org/repo.git"),
        (("org/repo.git",), "https://github.com/org/repo.git"),
        (
            ("org/My%20Flows", "git.example.com:8443/a%20b"),
            "https://git.example.com:8443/a%20b/org/My%20Flows.git",
        ),
        (("org/100%", "example.com"), "https://example.com/org/100%25.git"),
        (("org/grün",), "https://github.com/org/gr%C3%BCn.git"),
        (("org/repo", "my_forge.example_com"), "https://my_forge.example_com/org/repo.git"),
        (("org/repo", "[::1]:8080"), "https://[::1]:8080/org/repo.git"),
        (("org/repo", "example.com:443"), "https://example.com/org/repo.git"),  # as HTTP clients say it
        ((AZURE,), AZURE),
        ((COMMIT,), COMMIT),
        (("https://example.com/a+b@c/~x",), "https://example.com/a+b@c/~x"),
    ],
)
def test_an_address_over_https_is_as_it_was_written(where: tuple[str, ...], url: str) -> None:
    assert _remote(*where).url == url


@pytest.mark.parametrize(
    ("where", "url", "path"),
    [
        (("org/repo",), "git@github.com:org/repo.git", "org/repo.git"),
        (("org/repo", "my_forge:2222/at"), "ssh://git@my_forge:2222/at/org/repo.git", "/at/org/repo.git"),
        (("org/repo", "[::1]"), "git@[::1]:org/repo.git", "org/repo.git"),
        (("org/repo", "[::1]:2222"), "ssh://git@[::1]:2222/org/repo.git", "/org/repo.git"),
        (("~me/repo", "example.com:22"), "ssh://git@example.com:22/~me/repo.git", "~me/repo.git"),
    ],
)
def test_use_ssh(where: tuple[str, ...], url: str, path: str) -> None:
    remote = _remote(*where, use_ssh=True)
    assert (remote.url, remote.path, remote.user) == (url, path, "git")
    assert remote.host in ("github.com", "my_forge", "::1", "example.com")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("ssh://git@host/srv/repo", "/srv/repo"),
        ("git@host:/srv/repo", "/srv/repo"),
        ("git@host:srv/repo", "srv/repo"),
        (
            "git@ssh.dev.azure.com:v3/org/My%20Project/repo",
            "v3/org/My%20Project/repo",
        ),  # git decodes URLs only
        ("ssh://me@my_host:22/srv/My%20Repo", "/srv/My Repo"),
        ("ssh://git@[fe80::1]/~me/repo", "~me/repo"),
    ],
)
def test_what_an_ssh_server_is_asked_for(url: str, path: str) -> None:
    """As git asks it (git-clone, GIT URLS)."""
    for remote in (_remote(url), parse(url, "the URL")):
        assert (remote.url, remote.path) == (url, path)


def test_a_file_is_decoded_once() -> None:
    remote = parse("file://localhost/srv/100%2525%20done", "the URL")
    assert (remote.url, remote.path) == ("file:///srv/100%2525%20done", "/srv/100%25 done")


@pytest.mark.parametrize(
    ("above", "relative", "url"),
    [
        (AZURE, "../lib", "https://dev.azure.com/org/My%20Project/_git/lib"),
        ("https://[::1]:8443/org/repo", "../lib.git", "https://[::1]:8443/org/lib.git"),
        ("ssh://git@host:22/srv/a%20b/repo", "../lib", "ssh://git@host:22/srv/a%20b/lib"),
        ("ssh://git@host/~me/repo", "../lib", "ssh://git@host/~me/lib"),
        ("git@[::1]:org/repo", "../lib", "git@[::1]:org/lib"),
        ("git@host:/org/repo", "./lib", "git@host:/org/repo/lib"),
        ("git@host:repo", "../lib", "git@host:lib"),
        ("file:///srv/a%20b/repo", "../lib", "file:///srv/a%20b/lib"),
        ("/srv/a:b/repo", "../lib", "/srv/a:b/lib"),
    ],
)
def test_submodules_that_are_beside(above: str, relative: str, url: str) -> None:
    assert of_submodule(parse(above, "the URL"), relative, "lib").url == url


@pytest.mark.parametrize(
    ("options", "secret", "login"),
    [
        ({}, "t:k", ("org", "t:k")),
        ({"git_token_username": "me"}, "t:k", ("me", "t:k")),
        ({"format_access_token": False}, "token", ("token", "")),
        ({"format_access_token": False}, "me:to:k%20en", ("me", "to:k%20en")),
        ({"format_access_token": False}, f"{ABC}:x-oauth-basic\n", (ABC, "x-oauth-basic")),
    ],
)
def test_tokens_as_they_are(options: dict[str, Any], secret: str, login: tuple[str, str]) -> None:
    for where in ("org/repo", "https://github.com/org/repo"):
        remote = _remote(where, git_token_secret_name="TOKEN", secret=secret, **options)
        assert (remote.user, remote.password) == login
        assert secret.strip() not in f"{remote!r}{remote.url}{remote.what}{remote.identity}"
        assert (ABC in login) == (ABC in remote.private)


NO_HOSTS = """
two words|me@host|host\n|ho\x1bst|-host|host-|host:|host:0|host:65536|::1|[::1|[1::2::3]|[host]|[::1]x|https://host|
host/../x|host/a b
"""
NO_REPOSITORIES = f"""
https://{ABC}@host/x|https://me:{ABC}@host/x|https://host/x?token={ABC}|ssh://git:{ABC}@host/x|http://host/x|
file:///srv/x|/srv/x|ext::sh -c id|host:x|ssh://host/x|ssh://-oProxyCommand@host/x|ssh://git@-host/x|git@-host:x|
git@host:-x|git@host:|git@host::x|https://host/../x|https://host/|https://host/a b|https://host:99999/x|
https://[1::2::3]/x
"""


def _listed(text: str) -> list[str]:
    return text.strip().replace("|\n", "|").split("|")


@pytest.mark.parametrize("host", _listed(NO_HOSTS))
def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises(FlowError, match="storage Git: repo_host ") as caught:
        Git("flow.py", "org/repo", host)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("repo", _listed(NO_REPOSITORIES))
def test_repositories_that_are_none(repo: str) -> None:
    with pytest.raises(FlowError, match="storage Git: repo is a path such as") as caught:
        Git("flow.py", repo)
    assert str(caught.value).isprintable() and ABC not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_ssh": True}, "the URL in repo= says all"),
        ({"repo_host": "example.com"}, "the URL in repo= says all"),
        ({"repo": "git@host:x", "git_token_secret_name": "TOKEN"}, "ssh uses keys"),
    ],
)
def test_a_url_says_all(options: dict[str, Any], said: str) -> None:
    with pytest.raises(FlowError, match=said):
        Git("flow.py", **{"repo": AZURE, **options})


@pytest.mark.parametrize(
    "url", ["git@-host:x", "git@my host:x", "-x@host:x", "ssh://git@host/a%0ab", "https://[::1/x"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(BackendError, match="Git: the URL "):
        parse(url, "the URL")

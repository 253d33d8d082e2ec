"""From a work tree to a run: what is declared of it is what agents find, wherever its remote is."""

from __future__ import annotations

import socket
import socketserver
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from gitplace import Place, place
from tests.gitservers import (
    HttpServer,
    Repository,
    SshServer,
    connect_proxy,
    git,
    http_server,
    open_directory,
    sshd,
)

from flowagent import http
from flowagent.backend import Artifact
from flowagent.errors import BackendError, UsageError
from flowagent.settings import Ssh
from flowagent.storage import Git
from flowagent_backends.git import worktree

AZURE = "org/My Project/_git/repo"
LOGIN = {"alice": "to:k%20en"}


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with open_directory() as path:
        yield path


@pytest.fixture(scope="module")
def pem(root: Path) -> Path:
    """A certificate of this machine by its addresses, and of a host with an underscore."""
    path = root / "certificate.pem"
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(path)]
    name = ["-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1,IP:::1,DNS:my_forge"]
    command = ["openssl", "req", "-x509", "-days", "2", *key, *name, "-out", str(root / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + (root / "cert.pem").read_bytes())
    return path


@pytest.fixture(scope="module")
def forge(root: Path, pem: Path) -> Iterator[HttpServer]:
    with http_server(root / "repos", pem) as server:
        yield server


@pytest.fixture(scope="module")
def ssh(root: Path) -> Iterator[SshServer]:
    """One with homes: what is relative is relative to these."""
    (root / "home").mkdir()
    command = f'ForceCommand cd {root}/home && eval "$SSH_ORIGINAL_COMMAND"'
    with sshd(root / "repos", root / "client" / ".ssh", command, "ListenAddress ::1") as server:
        (server.directory / "config").write_text(f"Host forge\n  HostName 127.0.0.1\n  Port {server.port}\n")
        known = server.known_host
        (server.directory / "known_hosts").write_text(f"{known}\n{known.replace('127.0.0.1', '::1')}\n")
        yield server


@pytest.fixture
async def here(
    root: Path, pem: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Place]:
    authority = str(root / "cert.pem")
    monkeypatch.setenv("SSL_CERT_FILE", authority)
    http._tls.cache_clear()
    environ = {"HOME": str(root / "client"), "SSL_CERT_FILE": authority, "GIT_SSL_CAINFO": authority}
    async with place(tmp_path / "home", environ=environ) as made:
        yield made
    http._tls.cache_clear()


def _bare(root: Path, name: str, **files: str) -> Repository:
    """A repository whose directory has no .git at its end; git adds none where it looks for it."""
    made = Repository.make(root, name, **files)
    made.bare = made.bare.rename(root / name)
    made.git("remote", "set-url", "--push", "origin", str(made.bare))
    return made


def _declared(repository: Repository, url: str, script: str = "flow.py") -> worktree.Found:
    repository.git("remote", "set-url", "origin", url)
    return worktree.declare(repository.work / script)


@contextmanager
def _over_ipv6(target: int) -> Iterator[int]:
    """A port of ::1 that leads to one of 127.0.0.1."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", target)) as upstream:
                other = threading.Thread(target=pump, args=(upstream, self.request), daemon=True)
                other.start()
                pump(self.request, upstream)
                other.join(5)

    class Relay(socketserver.ThreadingTCPServer):
        address_family = socket.AF_INET6
        daemon_threads = True

    with Relay(("::1", 0), Handler) as relay:
        thread = threading.Thread(target=relay.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield relay.server_address[1]
        relay.shutdown()
        thread.join()


# -- where it is -----------------------------------------------------------------------------------------


async def test_a_url_that_is_encoded_and_has_no_ending(forge: HttpServer, root: Path, here: Place) -> None:
    repository = _bare(root / "repos", AZURE, flow="1")
    url = f"https://127.0.0.1:{forge.port}/org/My%20Project/_git/repo"
    declared = _declared(repository, url.replace("//", "//org@")).storage  # as Azure shows it
    assert (declared.repo, declared.branch_name) == (url, "main")
    storage = declared.to_json()
    assert Git.from_json(storage) == declared
    forge.requests.clear()
    assert await here.backend.upload(storage, Artifact("etl", "script", path=Path("flow.py"))) == storage
    assert await here.read(storage) == "1"
    repository.commit(flow="2")
    assert await here.read(storage) == "2"
    assert {path.partition("/repo/")[0] for _, path, _ in forge.requests} == {"/org/My%20Project/_git"}


def test_what_is_said_by_parts_is(root: Path) -> None:
    """As older agents read it."""
    repository = Repository.make(root / "parts", "org/one", flow="1")
    plain: dict[str, tuple[str, str, bool]] = {
        "https://github.com/org/one.git": ("org/one", "github.com", False),
        "https://me@example.com:8443/at/org/one.git": ("at/org/one", "example.com:8443", False),
        "https://[::1]:8443/org/one.git": ("org/one", "[::1]:8443", False),
        "git@my_forge:org/one.git": ("org/one", "my_forge", True),
        "ssh://git@example.com:2222/org/one.git": ("org/one", "example.com:2222", True),
        "https://github.com/org/one": ("https://github.com/org/one", "github.com", False),
        "git@example.com:org/one": ("git@example.com:org/one", "github.com", False),
    }
    for url, said in plain.items():
        declared = _declared(repository, url).storage
        assert (declared.repo, declared.repo_host, declared.use_ssh) == said


@pytest.mark.parametrize("client", ["asyncssh", "openssh"])
async def test_paths_over_ssh_are_absolute_or_from_home(
    client: str, ssh: SshServer, root: Path, tmp_path: Path
) -> None:
    top = root / "repos" / client
    absolute = _bare(top, "one two", flow="absolute")
    _bare(top, "one%20two", flow="literal")
    _bare(root / "home" / str(top).strip("/"), "one%20two", flow="relative")
    urls = {
        f"root@forge:{top}/one%20two": "literal",  # git decodes URLs, and nothing else
        f"root@forge:{str(top)[1:]}/one%20two": "relative",
        f"ssh://root@forge{top}/one%20two": "absolute",
        f"ssh://root@127.0.0.1:{ssh.port}{top}/one%20two": "absolute",
        f"ssh://root@[::1]:{ssh.port}{top}/one%20two": "absolute",
    }
    async with place(tmp_path, Ssh(client=client), environ={"HOME": str(root / "client")}) as here:
        for url, content in urls.items():
            declared = _declared(absolute, url).storage
            assert declared.repo == url
            assert await here.read(declared.to_json()) == content, url


@pytest.mark.parametrize("private", [False, True])
async def test_hosts_by_number_and_with_an_underscore(
    private: bool, forge: HttpServer, root: Path, here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    token: dict[str, Any] = {"git_token_secret_name": "TOKEN", "git_token_username": "alice"}
    here.secret("TOKEN", LOGIN["alice"])
    monkeypatch.setattr(forge, "logins", LOGIN if private else {})
    repository = Repository.make(root / "repos", f"org/hosts{private}", flow="1")
    with _over_ipv6(forge.port) as port, connect_proxy(forge.port) as proxy:
        for host in (f"[::1]:{port}", "my_forge:8443", "my_forge:443"):
            if "my_forge" in host:
                for environ in (monkeypatch.setenv, here.environ.__setitem__):
                    environ("HTTPS_PROXY", f"http://127.0.0.1:{proxy}")
                    environ("NO_PROXY", "")
            storage = Git("flow.py", f"org/hosts{private}", host, **(token if private else {})).to_json()
            async with place(here.home / host.replace(":", "_"), environ=here.environ) as agent:
                assert (await agent.backend.resolve(storage)).id == repository.head
                assert await agent.read(storage) == "1"


async def test_a_token_that_names_its_user(forge: HttpServer, root: Path, here: Place) -> None:
    Repository.make(root / "repos", "org/login", flow="1")
    forge.logins.update(LOGIN)
    try:
        with _over_ipv6(forge.port) as port:
            for where in (
                ("org/login", f"127.0.0.1:{forge.port}"),
                ("org/login", f"[::1]:{port}"),
                (f"https://[::1]:{port}/org/login",),
            ):
                token: dict[str, Any] = {"git_token_secret_name": "TOKEN", "format_access_token": False}
                storage = Git("flow.py", *where, **token).to_json()
                here.secret("TOKEN", "alice:to:k%20en\n")
                assert await here.read(storage) == "1"
                here.secret("TOKEN", "alice:wr:ong")
                with pytest.raises(BackendError, match="the token in secret TOKEN") as caught:
                    await here.hold(storage)
                assert "wr:ong" not in str(caught.value)
    finally:
        forge.logins.clear()


@pytest.mark.parametrize(
    "url",
    [
        "https://me:s3cr3t@example.com/org/repo.git",
        "http://s3cr3t@example.com/org/repo.git",
        "git://example.com/org/repo.git",
        "example.com:org/repo.git",
        "file:///srv/repo",
        "/srv/repo",
    ],
)
def test_what_no_declaration_can_have_goes_into_a_secret(url: str, root: Path, tmp_path: Path) -> None:
    repository = Repository.make(tmp_path, "one", flow="1")
    with pytest.raises(UsageError, match="goes into a secret: run flowagent secret set CLONE_URL") as caught:
        _declared(repository, url)
    assert "s3cr3t" not in str(caught.value) and "\n" not in str(caught.value)


# -- what only the work tree has ---------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Repository:
    made = Repository.make(
        tmp_path,
        "one",
        flows__etl="import json, helpers.sql\nfrom flows import words\n"
        "def later():\n    from helpers.deep import late as l\n",
        flows__words="from . import more\n",
        flows__more="",
        flows__other="",
        helpers__sql="import settings\n",
    )
    made.write(".gitignore", "settings.py\n")
    made.commit()
    git("fetch", "-q", "origin", cwd=made.work)
    return made


def _said(tree: Repository) -> str:
    return " ".join(_declared(tree, "git@example.com:org/one", "flows/etl.py").warnings)


def test_a_work_tree_that_is_as_committed(tree: Repository) -> None:
    tree.write("flows/__pycache__/words.pyc", b"")
    tree.write("broken.py", "(")
    tree.commit()
    assert _said(tree) == ""


def test_files_that_the_flow_imports_are_named_first(tree: Repository) -> None:
    tree.write("a note.txt", "")
    tree.write("flows/more.py", "changed = 1\n")
    tree.write("helpers/deep/late.py", "import broken\n")
    tree.write("broken.py", "(")
    tree.write("settings.py", "")  # ignored
    tree.write("unrelated.py", "")
    named = worktree.NAMED
    try:
        worktree.NAMED = 5
        said = _said(tree)
    finally:
        worktree.NAMED = named
    files = "broken.py, flows/more.py, helpers/deep/late.py, settings.py, a note.txt and 1 more"
    assert f"has files that are not committed ({files}); agents do not see them" in said
    assert "run the commit and not the work tree" in said


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("helpers/deep/late.py", ""),
        ("helpers/deep/__init__.py", ""),
        ("flows/etl.py", "new = 1\n"),
        ("flows/words.py", "new = 1\n"),
        ("settings.py", ""),
        ("sql/daily query.sql", ""),
        ("flows/grün.py", ""),
    ],
)
def test_one_file_that_only_the_work_tree_has(path: str, content: str, tree: Repository) -> None:
    tree.write(path, content)
    assert f"not committed ({path}); agents do not see them" in _said(tree)


def test_files_that_were_moved_or_removed(tree: Repository) -> None:
    tree.git("mv", "flows/more.py", "flows/less.py")
    (tree.work / "flows/other.py").unlink()
    assert "not committed (flows/less.py, flows/more.py, flows/other.py); agents" in _said(tree)


def test_imports_that_lead_out_of_the_work_tree(tree: Repository) -> None:
    tree.write("flows/etl.py", f"from {'.' * 99} import x\nfrom .....{'a' * 9} import *\n" + "x = '\\d'\n")
    tree.commit()
    assert _said(tree) == ""

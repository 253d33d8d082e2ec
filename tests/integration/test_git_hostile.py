"""Repositories, servers and declarations that mean harm, and what a token leaves behind: nothing."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
from gitplace import Place, place
from tests.gitservers import HttpServer, Repository, git, http_server

from flowagent.errors import (
    BackendError,
    FlowagentError,
    SourceCacheError,
    StorageNotFoundError,
    StorageTransientError,
)
from flowagent_backends.git import remotes

TOKEN = "t0p-s3cret-t0ken"


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Place]:
    async with place(tmp_path / "home", max_source=4 << 20) as made:
        yield made


def entry(bare: Path, mode: str, name: bytes, oid: str) -> bytes:
    return mode.encode() + b" " + name + b"\0" + bytes.fromhex(oid)


def hostile(root: Path, *entries: tuple[str, bytes, bytes]) -> Repository:
    """A repository whose commit has these entries, written as they are: (mode, name, content)."""
    repository = Repository.make(root, "hostile", flow="1")
    bare = repository.bare
    parts = [entry(bare, "100644", b"flow.py", git("hash-object", "-w", "--stdin", cwd=bare, stdin=b"1"))]
    for mode, name, content in entries:
        kind = "tree" if mode == "40000" else "blob"
        oid = git("hash-object", "-t", kind, "-w", "--stdin", "--literally", cwd=bare, stdin=content)
        parts.append(entry(bare, mode, name, oid))
    tree = git(
        "hash-object", "-t", "tree", "-w", "--stdin", "--literally", cwd=bare, stdin=b"".join(sorted(parts))
    )
    commit = git("commit-tree", tree, "-m", "x", cwd=bare)
    git("update-ref", "refs/heads/main", commit, cwd=bare)
    return repository


# -- trees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [b"..", b".", b".git", b".GIT", b"git~1", b".g\xe2\x80\x8cit", b"a/../../x", b"/etc/x"]
)
async def test_paths_that_lead_out(name: bytes, here: Place, tmp_path: Path) -> None:
    root = tmp_path / "r"
    repository = hostile(root, ("100644", name, b"evil")) if b"/" in name else _below(root, name)
    with pytest.raises(FlowagentError) as caught:
        await here.hold(here.of(str(repository.bare)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "home" / "evil").exists() and not list((here.home / "sources").glob("*/source"))


def _below(root: Path, name: bytes) -> Repository:
    """``evil`` in a directory of that name."""
    repository = Repository.make(root, "below", flow="1")
    bare = repository.bare
    blob = git("hash-object", "-w", "--stdin", cwd=bare, stdin=b"evil")
    inner = git(
        "hash-object",
        "-t",
        "tree",
        "-w",
        "--stdin",
        "--literally",
        cwd=bare,
        stdin=entry(bare, "100644", b"evil", blob),
    )
    outer = entry(bare, "40000", name, inner) + entry(bare, "100644", b"flow.py", blob)
    tree = git("hash-object", "-t", "tree", "-w", "--stdin", "--literally", cwd=bare, stdin=outer)
    git("update-ref", "refs/heads/main", git("commit-tree", tree, "-m", "x", cwd=bare), cwd=bare)
    return repository


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../etc/passwd", ".."])
async def test_links_that_lead_out(target: str, here: Place, tmp_path: Path) -> None:
    repository = Repository.make(tmp_path, "links", flow="1")
    (repository.work / "link").symlink_to(target)
    repository.commit()
    with pytest.raises(SourceCacheError, match="symbolic link link leads out of it"):
        await here.hold(here.of(str(repository.bare)))


async def test_a_link_and_what_is_below_it(here: Place, tmp_path: Path) -> None:
    """A tree with a link ``a`` and a directory ``a``: nothing is written through the link."""
    outside = tmp_path / "outside"
    outside.mkdir()
    repository = hostile(tmp_path / "r", ("120000", b"a", str(outside).encode()))
    bare = repository.bare
    blob = git("hash-object", "-w", "--stdin", cwd=bare, stdin=b"x")
    inner = git(
        "hash-object", "-t", "tree", "-w", "--stdin", cwd=bare, stdin=entry(bare, "100644", b"evil", blob)
    )
    link = git("hash-object", "-w", "--stdin", cwd=bare, stdin=str(outside).encode())
    both = entry(bare, "120000", b"a", link) + entry(bare, "40000", b"a", inner)
    tree = git("hash-object", "-t", "tree", "-w", "--stdin", "--literally", cwd=bare, stdin=both)
    git("update-ref", "refs/heads/main", git("commit-tree", tree, "-m", "x", cwd=bare), cwd=bare)
    with pytest.raises(FlowagentError):
        await here.hold(here.of(str(bare)))
    assert list(outside.iterdir()) == []


async def test_more_than_an_agent_takes(here: Place, tmp_path: Path) -> None:
    many = Repository.make(tmp_path, "many", flow="1")
    for number in range(6):
        many.write(f"f{number}.bin", os.urandom(1 << 20))
    many.commit()
    bomb = Repository.make(tmp_path, "bomb", flow="1")
    bomb.write("zeros", b"\0" * (64 << 20))  # some kilobytes in a pack
    bomb.commit()
    for repository in (many, bomb):
        with pytest.raises(BackendError, match=r"(larger|more) than this agent takes"):
            await here.hold(here.of(f"file://{repository.bare}"))
    assert list((here.home / "sources").glob("*/source")) == []


async def test_attributes_and_hooks_run_nothing(here: Place, tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    repository = Repository.make(tmp_path, "filters", flow="1")
    repository.write(".gitattributes", "* filter=evil diff=evil merge=evil\n")
    repository.write(".gitconfig", f'[filter "evil"]\n\tsmudge = touch {sign}\n')
    repository.commit()
    for directory in (repository.bare / "hooks", tmp_path / "home" / "hooks"):
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("post-checkout", "post-index-change", "reference-transaction", "pre-auto-gc"):
            hook = directory / name
            hook.write_text(f"#!/bin/sh\ntouch {sign}\n")
            hook.chmod(0o755)
    user = tmp_path / "home" / ".gitconfig"
    user.write_text(
        f"[filter \"evil\"]\n\tsmudge = sh -c 'touch {sign}; cat'\n"
        f"[core]\n\thooksPath = {tmp_path}/home/hooks\n"
    )
    here.environ |= {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.fsmonitor",
        "GIT_CONFIG_VALUE_0": f"touch {sign}",
    }
    here.environ |= {
        "GIT_EXTERNAL_DIFF": f"touch {sign}",
        "GIT_DIR": "/nowhere",
        "XDG_CONFIG_HOME": str(user.parent),
    }
    assert await here.read(here.of(str(repository.bare))) == "1"
    assert not sign.exists()


# -- submodules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "ext::sh -c touch% {sign}",
        "-u./payload",
        "--upload-pack=touch {sign}",
        "ssh://-oProxyCommand=touch+{sign}/x",
        "-oProxyCommand=touch@host:x",
        "fd::0",
        "git://127.0.0.1:9/x",
        "../../../../../../../../../etc",
        "http://127.0.0.1:9/\nx",
    ],
)
async def test_urls_of_submodules(url: str, here: Place, tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    repository = Repository.make(tmp_path, "outer", flow="1")
    text = url.format(sign=sign).replace("\n", "\\n")
    repository.write(".gitmodules", f'[submodule "x"]\n\tpath = sub\n\turl = "{text}"\n')
    git("update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},sub", cwd=repository.work)
    git("add", ".gitmodules", cwd=repository.work)
    git("commit", "-q", "-m", "x", cwd=repository.work)
    repository.push()
    with pytest.raises(BackendError) as caught:
        await here.hold(here.of(f"file://{repository.bare}", submodules=True))
    assert "\n" not in str(caught.value) and not sign.exists()
    assert await here.read(here.of(f"file://{repository.bare}")) == "1"  # nobody has to follow them


async def test_a_submodule_elsewhere_gets_no_credentials(here: Place, tmp_path: Path) -> None:
    inner = Repository.make(tmp_path / "b", "inner", value="x = 1\n")
    outer = Repository.make(tmp_path / "a", "outer", flow="1")
    with http_server(tmp_path / "a", logins={"me": TOKEN}) as first, http_server(tmp_path / "b") as second:
        outer.write(".gitmodules", f'[submodule "x"]\n\tpath = sub\n\turl = {second.url("inner")}\n')
        git("update-index", "--add", "--cacheinfo", f"160000,{inner.head},sub", cwd=outer.work)
        git("add", ".gitmodules", cwd=outer.work)
        git("commit", "-q", "-m", "x", cwd=outer.work)
        outer.push()
        storage = here.of(first.url("outer", f"me:{TOKEN}"), submodules=True)
        assert await here.tree(storage) == {".gitmodules", "flow.py", "sub/value.py"}
        assert second.fetches and not any("authorization" in headers for _, _, headers in second.requests)


# -- declarations and servers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"branch_name": "--upload-pack=touch /tmp/x"},
        {"branch_name": "a..b"},
        {"tag": "x\ny"},
        {"commit": "--all"},
        {"flow_path": "../../etc/passwd"},
        {"flow_path": "/../etc/passwd"},
        {"flow_path": ".git/config"},
        {"sparse": ["../.."]},
        {"checkout": "anything"},
        {"clone_depth": "--exec=x"},
        {"repo": "org/repo", "git_clone_url_secret_name": None, "repo_host": "host/../..@evil"},
        {"unknown": 1},
    ],
)
async def test_a_declaration_from_the_store_is_not_trusted(
    change: dict[str, Any], here: Place, tmp_path: Path
) -> None:
    repository = Repository.make(tmp_path, "one", flow="1")
    storage = {**here.of(str(repository.bare)), **change}
    with pytest.raises(BackendError, match="the flow's storage is wrong") as caught:
        await here.hold(storage)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"001e# service=git-upload-pack\n0000zzzz",
        b"001e# service=git-upload-pack\n0000ffff",
        b"001e# service=git-upload-pack\n0000000eversion 2\n0000",
        b"001e# service=git-upload-pack\n00000020ERR \x1b[31mevil\x1b[0m\rfoo\nbar",
        b"001e# service=git-upload-pack\n0000003f" + b"x" * 59,
    ],
)
async def test_servers_that_speak_something_else(body: bytes, here: Place) -> None:
    with _speaking(body) as port, anyio.fail_after(30), pytest.raises(BackendError) as caught:
        await here.hold(here.of(f"http://127.0.0.1:{port}/x.git"))
    said = str(caught.value)
    assert said.isprintable() and said.startswith("Git: 127.0.0.1/x"), said


@contextmanager
def _speaking(body: bytes) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/x-git-upload-pack-advertisement")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

    with _running(Handler) as port:
        yield port


@contextmanager
def _running(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    with Quiet(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


# -- a token ---------------------------------------------------------------------------------------------


async def test_a_token_is_nowhere(here: Place, tmp_path: Path) -> None:
    """Not on disk, not in any command line or environment while git runs, not in what is said."""
    repository = Repository.make(tmp_path / "repos", "org/one", flow="1")
    seen: set[str] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            for process in Path("/proc").glob("[0-9]*"):
                if int(process.name) != os.getpid():
                    for name in ("cmdline", "environ"):
                        with suppress(OSError):
                            if TOKEN.encode() in (process / name).read_bytes():
                                seen.add(f"{process}/{name}")

    watcher = threading.Thread(target=look)
    with http_server(tmp_path / "repos", logins={"org": TOKEN}) as server:
        here.secret("TOKEN", TOKEN)
        storage = here.of(server.url("org/one", f"org:{TOKEN}"))
        watcher.start()
        try:
            for content in ("2", "3", "4"):
                repository.commit(flow=content)
                assert await here.read(storage) == content
            server.logins["org"] = "another"
            with pytest.raises(BackendError) as caught:
                await here.hold(here.of(server.url("org/one", f"org:{TOKEN}"), branch_name="other"))
        finally:
            stop.set()
            watcher.join()
    encoded = base64.b64encode(f"org:{TOKEN}".encode()).decode()
    error: BaseException | None = caught.value
    while error is not None:
        assert TOKEN not in f"{error!r}{error}" and encoded not in f"{error!r}"
        error = error.__cause__ or error.__context__
    assert seen == set()
    for path in here.home.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert TOKEN.encode() not in content and encoded.encode() not in content, path
    assert TOKEN not in repr(remotes.of_storage(storage, here.backend._context.secrets))


# -- large files -----------------------------------------------------------------------------------------


@dataclass
class LargeFiles:
    """A server of the LFS batch API (git-lfs, docs/api/batch.md), for one password."""

    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    failing: dict[str, int] = field(default_factory=dict)  # the status of "batch", "object" or "item"


def _lfs(root: Path, store: LargeFiles) -> Any:
    """The git server of the tests, with an LFS server beside each repository."""
    from tests import gitservers

    described = HttpServer(root, gitservers.free_port(), "http", logins={"me": TOKEN})
    handler = gitservers._handler(described)

    class Both(handler):  # type: ignore[valid-type, misc]
        def do_POST(self) -> None:
            if not self.path.endswith("/info/lfs/objects/batch"):
                super().do_POST()
                return
            body = self.rfile.read(int(self.headers["content-length"]))
            if not self._allowed(self.headers.get("authorization", "")):
                self._answer(401, {"LFS-Authenticate": 'Basic realm="lfs"'})
                return
            if "batch" in store.failing:
                self._answer(store.failing["batch"])
                return
            here = f"http://127.0.0.1:{described.port}/objects"
            found = [
                {**item, "actions": {"download": {"href": f"{here}/{item['oid']}"}}}
                if "item" not in store.failing
                else {**item, "error": {"code": store.failing["item"], "message": "Object does not exist"}}
                for item in json.loads(body)["objects"]
            ]
            self._send(
                "application/vnd.git-lfs+json", json.dumps({"transfer": "basic", "objects": found}).encode()
            )

        def do_GET(self) -> None:
            if not self.path.startswith("/objects/"):
                super().do_GET()
                return
            oid = self.path.rpartition("/")[2]
            store.asked.append(oid)
            if "object" in store.failing:
                self._answer(store.failing["object"])
                return
            self._send("application/octet-stream", store.objects[oid])

        def _send(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return described, Both


@contextmanager
def lfs_server(root: Path, store: LargeFiles) -> Iterator[HttpServer]:
    described, handler = _lfs(root, store)

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    with Quiet(("127.0.0.1", described.port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield described
        server.shutdown()
        thread.join()


def pointer(content: bytes) -> str:
    oid = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n"


async def test_large_files(here: Place, tmp_path: Path) -> None:
    content = os.urandom(50_000)
    store = LargeFiles({hashlib.sha256(content).hexdigest(): content})
    repository = Repository.make(tmp_path / "repos", "large", flow="1")
    repository.write(".gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n")
    repository.write("data.bin", pointer(content))
    repository.write(".lfsconfig", "[lfs]\n\turl = http://127.0.0.1:9/elsewhere\n")
    repository.commit()
    with lfs_server(tmp_path / "repos", store) as server:
        url = server.url("large", f"me:{TOKEN}")
        assert await here.read(here.of(url), "data.bin") == pointer(content)
        _, source = await here.hold(here.of(url, lfs=True))
        with source:
            assert (source.directory / "data.bin").read_bytes() == content
        assert store.asked
        store.objects[next(iter(store.objects))] = b"x" * 50_000  # another content under that name
        repository.write("data.bin", pointer(content + b"!"))
        store.objects[hashlib.sha256(content + b"!").hexdigest()] = b"tampered" * 6250 + b"!"
        repository.commit()
        with pytest.raises(BackendError):
            await here.hold(here.of(url, lfs=True))


@pytest.mark.parametrize(
    ("failing", "kind", "words"),
    [
        ({"batch": 401}, BackendError, "access is refused"),
        ({"batch": 403}, BackendError, "access is refused"),
        ({"batch": 404}, StorageNotFoundError, "large file '404.bin'"),
        ({"batch": 503}, StorageTransientError, "large file '404.bin'"),
        ({"object": 403}, BackendError, "access is refused"),
        ({"object": 404}, StorageNotFoundError, "large file '404.bin'"),
        ({"object": 500}, StorageTransientError, "large file '404.bin'"),
        ({"item": 404}, StorageNotFoundError, "large file '404.bin'"),
    ],
    ids=str,
)  # fmt: skip
async def test_large_files_that_cannot_be_had(
    failing: dict[str, int], kind: type[Exception], words: str, here: Place, tmp_path: Path
) -> None:
    content = os.urandom(50_000)
    store = LargeFiles({hashlib.sha256(content).hexdigest(): content})
    repository = Repository.make(tmp_path / "repos", "large", flow="1")
    repository.write(".gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n")
    repository.write("404.bin", pointer(content))
    repository.commit()
    with lfs_server(tmp_path / "repos", store) as server:
        storage = here.of(server.url("large", f"me:{TOKEN}"), lfs=True)
        assert await here.read(here.of(server.url("large", f"me:{TOKEN}"))) == "1"
        (mirror,) = (here.home / "mirrors").glob("*.git")
        before = mirror.stat().st_ino
        store.failing = failing
        with anyio.fail_after(60), pytest.raises(kind, match=words) as caught:
            await here.read(storage)
        print(caught.value)
        assert mirror.stat().st_ino == before, "it was taken for a broken mirror"
        store.failing = {}
        assert await here.read(storage) == "1"


async def test_large_files_count_before_they_come(tmp_path: Path) -> None:
    contents = [os.urandom(1 << 20) for _ in range(12)]
    store = LargeFiles({hashlib.sha256(content).hexdigest(): content for content in contents})
    repository = Repository.make(tmp_path / "repos", "large", flow="1")
    repository.write(".gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n")
    for number, content in enumerate(contents):
        repository.write(f"{number}.bin", pointer(content))
    repository.commit()
    with lfs_server(tmp_path / "repos", store) as server:
        async with place(tmp_path / "home", max_source=4 << 20) as here:
            with pytest.raises(BackendError, match="more than this agent takes"):
                await here.read(here.of(server.url("large", f"me:{TOKEN}"), lfs=True))
            assert not store.asked


async def test_large_files_without_git_lfs(here: Place, tmp_path: Path) -> None:
    repository = Repository.make(tmp_path, "large", flow="1")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("git", "sh", "cat"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    here.environ["PATH"] = str(programs)
    here.environ["GIT_EXEC_PATH"] = git("--exec-path")
    if not Path(git("--exec-path"), "git-lfs").exists():
        with pytest.raises(
            BackendError, match="takes git-lfs on the agent's machine: apt-get install git-lfs"
        ):
            await here.hold(here.of(str(repository.bare), lfs=True))

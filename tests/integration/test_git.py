"""Git storage against real servers: which commit, what of it, and what is said when there is none."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import pytest
from gitplace import Place, place
from tests.gitservers import (
    HttpServer,
    Repository,
    SshServer,
    certificate,
    git,
    git_daemon,
    http_server,
    open_directory,
    sshd,
)

from flowagent import http
from flowagent.backend import Artifact
from flowagent.errors import BackendError, SecretError, StorageNotFoundError, StorageTransientError
from flowagent.storage import Git

LOGIN = {"me": "s3cret%41@:/"}


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with open_directory() as path:
        yield path


@pytest.fixture(scope="module")
def repository(root: Path) -> Repository:
    """Three commits on main, the last also on next; tags of both kinds on the second."""
    made = Repository.make(root / "repos", "org/one")
    made.commit(flow="one = 1\n")
    made.commit(flow="one = 2\n")
    made.git("tag", "light")
    made.git("tag", "-a", "-m", "x", "heavy/v1")
    made.push("light", "heavy/v1")
    made.commit(flow="one = 3\n", lib__helper="x = 1\n")
    made.branch("feature/next")
    made.commit(flow="one = 4\n")
    made.git("checkout", "-q", "main")
    return made


@pytest.fixture(scope="module")
def http_git(root: Path) -> Iterator[HttpServer]:
    with http_server(root / "repos", logins=LOGIN) as server:
        yield server


@pytest.fixture(scope="module")
def old(root: Path) -> Iterator[HttpServer]:
    with http_server(root / "repos", protocol=False) as server:
        yield server


@pytest.fixture(scope="module")
def ssh(root: Path) -> Iterator[SshServer]:
    with sshd(root / "repos", root / "client" / ".ssh") as server:
        yield server


@pytest.fixture(scope="module")
def daemon(root: Path) -> Iterator[int]:
    with git_daemon(root / "repos") as port:
        yield port


@pytest.fixture
async def here(root: Path, tmp_path: Path) -> AsyncIterator[Place]:
    async with place(tmp_path / "home", environ={"HOME": str(root / "client")}) as made:
        yield made


@pytest.fixture(params=["http_git", "old", "ssh", "daemon", "file", "path"])
def url(request: pytest.FixtureRequest, repository: Repository) -> str:
    """The repository by each way."""
    if request.param == "file":
        return f"file://{repository.bare}"
    if request.param == "path":
        return str(repository.bare)
    server = request.getfixturevalue(request.param)
    if request.param == "http_git":
        return str(server.url("org/one", "me:s3cret%2541%40:/"))
    return (
        f"git://127.0.0.1:{server}/org/one.git" if request.param == "daemon" else str(server.url("org/one"))
    )


# -- which commit ----------------------------------------------------------------------------------------


async def test_every_kind_of_ref_over_every_transport(url: str, repository: Repository, here: Place) -> None:
    commits = repository.git("rev-list", "--reverse", "feature/next").split()
    asked: list[tuple[dict[str, Any], int]] = [
        ({}, 3),
        ({"branch_name": "main"}, 3),
        ({"branch_name": "feature/next"}, 4),
        ({"tag": "light"}, 2),
        ({"tag": "heavy/v1"}, 2),
        ({"commit": commits[0]}, 1),
        ({"commit": commits[3][:8]}, 4),  # the tip of a branch
        ({"commit": commits[0][:10].upper()}, 1),  # somewhere in history
    ]
    for options, number in asked:
        revision, source = await here.hold(here.of(url, **options))
        with source:
            assert revision.id == commits[number - 1], options
            assert (source.directory / "flow.py").read_text() == f"one = {number}\n", options
            assert not (source.directory / ".git").exists()


async def test_a_new_commit_is_seen_at_once(http_git: HttpServer, root: Path, here: Place) -> None:
    repository = Repository.make(root / "repos", "org/moving", flow="1")
    storage = here.of(http_git.url("org/moving", "me:s3cret%2541%40:/"))
    for number in range(2, 6):
        repository.commit(flow=str(number))
        assert await here.read(storage) == str(number)
    repository.git("reset", "-q", "--hard", "HEAD~3")  # and a history that was replaced
    repository.commit(flow="other")
    assert await here.read(storage) == "other"
    assert await here.tree(storage) == {"flow.py"}


async def test_files_that_another_branch_has_are_not_there(ssh: SshServer, root: Path, here: Place) -> None:
    repository = Repository.make(root / "repos", "org/stale", flow="1", gone="x = 1\n")
    repository.branch("lean")
    (repository.work / "gone.py").unlink()
    repository.commit(flow="2")
    assert await here.tree(here.of(ssh.url("org/stale"))) == {"flow.py", "gone.py"}
    assert await here.tree(here.of(ssh.url("org/stale"), branch_name="lean")) == {"flow.py"}


async def test_a_pinned_commit_that_is_cached_takes_no_network(root: Path, here: Place) -> None:
    repository = Repository.make(root / "pinned", "one", flow="1")
    with http_server(root / "pinned") as server:
        storage = here.of(server.url("one"), commit=repository.head)
        short = here.of(server.url("one"), commit=repository.head[:9])
        assert await here.read(storage) == await here.read(short) == "1"
        asked = len(server.requests)
        assert await here.read(storage) == await here.read(short) == "1"
        assert len(server.requests) == asked
    assert await here.read(storage) == "1"  # the server is gone


async def test_what_was_resolved_is_what_is_fetched(http_git: HttpServer, root: Path, here: Place) -> None:
    repository = Repository.make(root / "repos", "org/race", flow="1")
    storage = here.of(http_git.url("org/race", "me:s3cret%2541%40:/"))
    revision = await here.backend.resolve(storage)
    repository.commit(flow="2")
    with await here.cache.hold(here.backend, storage, revision) as source:
        assert (source.directory / "flow.py").read_text() == "1"


async def test_credentials_decide_what_comes_from_the_cache(
    http_git: HttpServer, repository: Repository, here: Place
) -> None:
    """Somebody without the token gets nothing of what others have fetched with it."""
    pinned = {"commit": repository.head}
    assert await here.read(here.of(http_git.url("org/one", "me:s3cret%2541%40:/"), **pinned))
    with pytest.raises(BackendError, match="access is refused"):
        await here.read(here.of(http_git.url("org/one"), **pinned))
    with pytest.raises(BackendError, match="access is refused"):
        await here.read(here.of(http_git.url("org/one", "me:wrong"), **pinned))


# -- tokens, hosts ---------------------------------------------------------------------------------------


async def test_a_token_over_tls(root: Path, tmp_path: Path) -> None:
    repository = Repository.make(root / "tls", "group/sub/one", flow="1")
    pem = certificate(tmp_path)
    logins = {"group": "t0ken", "deployer": "t0ken", "t0ken": ""}
    environ = {"SSL_CERT_FILE": str(tmp_path / "cert.pem"), "GIT_SSL_CAINFO": str(tmp_path / "cert.pem")}
    os.environ["SSL_CERT_FILE"] = environ["SSL_CERT_FILE"]
    http._tls.cache_clear()
    try:
        with http_server(root / "tls", pem, logins=logins) as server:
            async with place(tmp_path / "home", environ=environ) as here:
                here.secret("TOKEN", "t0ken\n")
                host = f"127.0.0.1:{server.port}"
                for options in (
                    {},
                    {"git_token_username": "deployer"},
                    {"format_access_token": False},
                ):
                    storage = Git(
                        "/flow.py",
                        "group/sub/one",
                        host,
                        git_token_secret_name="TOKEN",
                        **options,  # type: ignore[arg-type]
                    ).to_json()
                    revision, source = await here.hold(storage)
                    source.close()
                    assert revision.id == repository.head
                here.secret("TOKEN", "wrong")
                with pytest.raises(
                    BackendError, match=r"Git: .*/group/sub/one: access .* the token in secret TOKEN"
                ):
                    await here.hold(storage)
    finally:
        del os.environ["SSL_CERT_FILE"]
        http._tls.cache_clear()


async def test_a_redirect_to_another_host_goes_without_credentials(root: Path, here: Place) -> None:
    repository = Repository.make(root / "moved", "one", flow="1")
    with http_server(root / "moved") as target, http_server(root / "empty", logins={"me": "token"}) as first:
        first.redirects["/one.git"] = f"http://127.0.0.1:{target.port}/one.git"
        storage = here.of(first.url("one", "me:token"))
        assert await here.read(storage) == "1"
        repository.commit(flow="2")
        assert await here.read(storage) == "2"
        assert any(headers.get("authorization") for _, _, headers in first.requests)
        assert target.fetches
        assert not any("authorization" in headers for _, _, headers in target.requests)


# -- what is said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"branch_name": "mian"}, r"Git: \S+/org/one\S* has no branch 'mian'; did you mean main\?"),
        ({"branch_name": "light"}, "there is a tag of that name: use tag="),
        ({"tag": "hevy/v1"}, r"has no tag 'hevy/v1'; did you mean heavy/v1\?"),
        ({"tag": "main"}, "there is a branch of that name: use branch_name="),
        ({"commit": "0" * 40}, "has no commit 0{40}"),
        ({"commit": "0123456"}, "has no commit 0123456; push it, or correct commit="),
        ({"path": "lib/flow.py"}, r"has no file 'lib/flow.py'; did you mean flow.py\?"),
        ({"path": "fow.py"}, r"has no file 'fow.py'; did you mean flow.py\?"),
    ],
)
async def test_what_is_missing_is_said_with_what_is_near(
    options: dict[str, Any], said: str, url: str, here: Place
) -> None:
    with pytest.raises(StorageNotFoundError, match=said) as caught:
        await here.hold(here.of(url, **options))
    assert "\n" not in str(caught.value) and "s3cret" not in str(caught.value)


async def test_a_repository_that_is_not_there(
    http_git: HttpServer, ssh: SshServer, daemon: int, root: Path, here: Place
) -> None:
    for url in (
        http_git.url("org/none", "me:s3cret%2541%40:/"),
        ssh.url("org/none"),
        f"git://127.0.0.1:{daemon}/org/none.git",
        f"file://{root}/repos/none.git",
        "/nowhere",
    ):
        with pytest.raises(StorageNotFoundError, match=r"there is no (such|Git) repository"):
            await here.hold(here.of(url))


async def test_nobody_there(here: Place) -> None:
    for url in ("http://127.0.0.1:9/x.git", "ssh://git@127.0.0.1:9/x.git", "git://127.0.0.1:9/x.git"):
        with pytest.raises(StorageTransientError, match="cannot be reached"):
            await here.hold(here.of(url))


async def test_a_server_in_trouble(root: Path, here: Place) -> None:
    Repository.make(root / "trouble", "one", flow="1")
    with http_server(root / "trouble") as server:
        storage = here.of(server.url("one"))
        server.failing += [503, 502]
        assert await here.read(storage) == "1"  # asked again
        server.failing += [500] * 8
        with pytest.raises(StorageTransientError, match="its server answers 500"):
            await here.hold(storage)
        server.failing[:] = [418]
        with pytest.raises(BackendError, match="its server answers 418"):
            await here.hold(storage)


async def test_many_at_once_ask_a_server_in_trouble(root: Path, here: Place) -> None:
    with http_server(root / "repos", logins={"me": "right"}) as server:
        storage = here.of(server.url("org/one", "me:right"))
        await here.backend.resolve(storage)
        server.logins["me"] = "other"
        said: list[str] = []

        async def ask() -> None:
            with pytest.raises(BackendError, match="access is refused") as caught:
                await here.backend.resolve(storage)
            said.append(str(caught.value))

        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(ask)
        assert len(said) == 6


async def test_a_server_of_plain_files(repository: Repository, here: Place) -> None:
    git("update-server-info", cwd=repository.bare)
    handler = partial(SimpleHTTPRequestHandler, directory=str(repository.bare.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/one.git"
        asked: tuple[dict[str, Any], ...] = ({}, {"clone_depth": 3}, {"sparse": ["flow.py"]})
        for options in asked:
            assert await here.read(here.of(url, **options)) == "one = 3\n"
        server.shutdown()


async def test_names_of_objects_by_sha256(
    http_git: HttpServer, ssh: SshServer, root: Path, here: Place
) -> None:
    bare = root / "repos/org/long.git"
    work = root / "long"
    git("init", "-q", "--bare", "--object-format=sha256", "-b", "main", str(bare), cwd=root)
    git("init", "-q", "--object-format=sha256", "-b", "main", str(work), cwd=root)
    commits = []
    for content in ("1", "2", "3"):
        (work / "flow.py").write_text(content)
        git("add", ".", cwd=work)
        git("commit", "-q", "-m", content, cwd=work)
        commits.append(git("rev-parse", "HEAD", cwd=work))
    git("push", "-q", str(bare), "main", cwd=work)
    for url in (str(bare), http_git.url("org/long", "me:s3cret%2541%40:/"), ssh.url("org/long")):
        assert await here.read(here.of(url)) == "3"
        assert await here.read(here.of(url, branch_name="main")) == "3"
        assert await here.read(here.of(url, commit=commits[0])) == "1"
        assert await here.read(here.of(url, commit=commits[1][:12])) == "2"


async def test_a_repository_that_is_empty(root: Path, here: Place) -> None:
    Repository.make(root / "repos", "org/empty")
    with pytest.raises(StorageNotFoundError, match="is empty; push a branch to it"):
        await here.hold(here.of(str(root / "repos/org/empty.git")))


async def test_secrets_that_are_not_what_they_should_be(here: Place) -> None:
    with pytest.raises(SecretError, match="secret NONE is not set"):
        await here.backend.resolve(Git("flow.py", git_clone_url_secret_name="NONE").to_json())
    for url in ("ext::sh -c id", "-upload-pack=id", "fd::7", "ftp://host/x", "https://", "x\ny"):
        with pytest.raises(BackendError, match="the URL in secret") as caught:
            await here.backend.resolve(here.of(url))
        assert url == "https://" or url not in str(caught.value)


# -- registration ----------------------------------------------------------------------------------------


async def test_registration_checks_that_the_flow_is_there(url: str, here: Place) -> None:
    artifact = Artifact("etl", "script", path=Path("flow.py"))
    storage = here.of(url)
    assert await here.backend.upload(storage, artifact) == storage
    with pytest.raises(StorageNotFoundError, match=r"has no file 'fl.py'; did you mean flow.py\?"):
        await here.backend.upload(here.of(url, "fl.py"), artifact)
    with pytest.raises(BackendError, match="flow_name='other' does not name this flow"):
        await here.backend.upload(here.of(url, flow_name="other"), artifact)
    assert await here.read(storage) == "one = 3\n"  # after a look at names alone


async def test_what_only_agents_can_open_is_left_to_them(here: Place) -> None:
    storage = Git("flow.py", "org/repo", git_token_secret_name="ON_THE_AGENT").to_json()
    assert await here.backend.upload(storage, Artifact("etl", "script")) == storage


# -- what of it ------------------------------------------------------------------------------------------


async def test_trees_are_exact(http_git: HttpServer, root: Path, here: Place) -> None:
    repository = Repository.make(root / "repos", "org/exact", flow="1")
    repository.write(
        ".gitattributes", "*.txt export-ignore\n*.py export-subst\n*.txt filter=evil\n*.txt eol=lf\n"
    )
    repository.write("a b/ä.txt", "x\n")
    repository.write("run.sh", "#!/bin/sh\n").chmod(0o755)
    repository.write("version.py", "v = '$Format:%H$'\n")
    (repository.work / "link.py").symlink_to("a b/ä.txt")
    repository.commit()
    _, source = await here.hold(here.of(http_git.url("org/exact", "me:s3cret%2541%40:/")))
    with source:
        top = source.directory
        assert (top / "a b/ä.txt").read_text() == "x\n"
        assert (top / "version.py").read_text() == "v = '$Format:%H$'\n"
        assert os.readlink(top / "link.py") == "a b/ä.txt"
        assert stat.S_IMODE((top / "run.sh").stat().st_mode) == 0o555
        assert stat.S_IMODE((top / "flow.py").stat().st_mode) == 0o444


async def test_sparse_paths_and_only_their_contents(http_git: HttpServer, root: Path, here: Place) -> None:
    repository = Repository.make(root / "repos", "org/huge", flow="1")
    repository.write("flows/etl.py", "1")
    repository.write("flows/sql/[a]!.sql", "select 1")
    repository.write("other/big.bin", os.urandom(3 << 20))
    repository.commit()
    storage = here.of(
        http_git.url("org/huge", "me:s3cret%2541%40:/"), "flows/etl.py", sparse=["flows", "flow.py"]
    )
    assert await here.tree(storage) == {"flow.py", "flows/etl.py", "flows/sql/[a]!.sql"}
    (mirror,) = (here.home / "mirrors").glob("*.git")
    assert sum(file.stat().st_size for file in mirror.rglob("*") if file.is_file()) < 1 << 20
    repository.write("flows/etl.py", "2")
    repository.commit()
    assert await here.read(storage, "flows/etl.py") == "2"
    whole = here.of(http_git.url("org/huge", "me:s3cret%2541%40:/"), "flows/etl.py")
    assert "other/big.bin" in await here.tree(whole)


async def test_a_sparse_path_that_is_not_there_is_named(root: Path, here: Place) -> None:
    repository = Repository.make(root, "org/typo", flow="1")
    repository.write("sql/daily/a.sql", "select 1")
    repository.write("sq", "1")
    repository.commit()
    for path, near in (("sql/dayly", "sql/daily"), ("sql/daily/b.sql", "sql/daily/a.sql"), ("sq/l", "sq")):
        with pytest.raises(StorageNotFoundError, match=f"has no '{path}', named in sparse=.*{near}"):
            await here.tree(here.of(f"file://{repository.bare}", sparse=["flow.py", "sql", path]))


async def test_sparse_paths_and_submodules(http_git: HttpServer, root: Path, here: Place) -> None:
    inner = Repository.make(root / "repos", "org/part", inner="1")
    repository = Repository.make(root / "repos", "org/parts", flow="1", other="x" * 5000)
    repository.write(".gitmodules", '[submodule "a"]\n\tpath = lib/a\n\turl = ../part.git\n')
    git("update-index", "--add", "--cacheinfo", f"160000,{inner.head},lib/a", cwd=repository.work)
    git("add", ".gitmodules", cwd=repository.work)
    git("commit", "-q", "-m", "with a submodule", cwd=repository.work)
    repository.push()
    storage = here.of(
        http_git.url("org/parts", "me:s3cret%2541%40:/"), sparse=["flow.py", "lib"], submodules=True
    )
    assert await here.tree(storage) == {"flow.py", "lib/a/inner.py"}


@pytest.mark.parametrize("depth", [1, 2, 0])
async def test_a_first_contact_brings_as_much_history_as_asked(
    depth: int, http_git: HttpServer, root: Path, here: Place
) -> None:
    name = f"org/deep{depth}"
    repository = Repository.make(root / "repos", name, flow="1")
    for number in range(2, 6):
        repository.commit(flow=str(number) + "x" * 1000)
    storage = here.of(http_git.url(name, "me:s3cret%2541%40:/"), clone_depth=depth)
    await here.read(storage)
    (mirror,) = (here.home / "mirrors").glob("*.git")
    assert git("rev-list", "--count", repository.head, cwd=mirror) == str(depth or 5)
    repository.commit(flow="new")
    assert await here.read(storage) == "new"
    assert git("rev-list", "--count", repository.head, cwd=mirror) == str((depth or 5) + 1)


async def test_submodules_from_beside_and_from_elsewhere(
    http_git: HttpServer, root: Path, here: Place
) -> None:
    inner = Repository.make(root / "repos", "libs/inner", value="x = 1\n")
    middle = Repository.make(root / "repos", "org/middle", value="x = 2\n")
    outer = Repository.make(root / "repos", "org/outer", flow="1")
    allow = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "protocol.file.allow",
        "GIT_CONFIG_VALUE_0": "always",
    }
    for above, url, path, below in (
        (middle, "../../libs/inner.git", "vendor/inner", inner),
        (outer, "./../middle.git", "lib", middle),
    ):
        above.git("submodule", "--quiet", "add", str(below.bare), path, env=allow)
        above.git("config", "-f", ".gitmodules", f"submodule.{path}.url", url)
        above.commit()
    storage = here.of(http_git.url("org/outer", "me:s3cret%2541%40:/"), submodules=True)
    assert await here.tree(storage) == {
        ".gitmodules",
        "flow.py",
        "lib/.gitmodules",
        "lib/value.py",
        "lib/vendor/inner/value.py",
    }
    assert await here.read(storage, "lib/vendor/inner/value.py") == "x = 1\n"
    assert await here.tree(here.of(http_git.url("org/outer", "me:s3cret%2541%40:/"))) == {
        ".gitmodules",
        "flow.py",
    }


# -- many at once ----------------------------------------------------------------------------------------


async def test_fifty_runs_of_five_repositories_fetch_each_commit_once(root: Path, here: Place) -> None:
    made = [Repository.make(root / "many", f"r{number}", flow="1") for number in range(5)]
    with http_server(root / "many") as server:
        storages = [here.of(server.url(f"r{number}")) for number in range(5)]
        for storage in storages:  # which leaves nothing that would make two fetches of one
            await here.backend.upload(storage, Artifact("etl", "script", path=Path("flow.py")))
        for content in ("1", "2"):
            if content == "2":
                for repository in made:
                    repository.commit(flow="2")
            server.requests.clear()

            async def run(storage: dict[str, Any], expected: str) -> None:
                assert await here.read(storage) == expected

            async with anyio.create_task_group() as tasks:
                for storage in storages * 10:
                    tasks.start_soon(run, storage, content)
            assert sorted(server.fetches) == [f"r{number}" for number in range(5)]


async def test_ssh_keeps_one_connection(ssh: SshServer, repository: Repository, here: Place) -> None:
    log = ssh.directory.parent / "sshd" / "log"
    before = log.read_text().count("Accepted publickey")
    storage = here.of(ssh.url("org/one"))

    async def resolve() -> None:
        assert (await here.backend.resolve(storage)).id == repository.head

    async with anyio.create_task_group() as tasks:
        for _ in range(30):
            tasks.start_soon(resolve)
    await here.read(storage)
    assert log.read_text().count("Accepted publickey") == before + 1

"""What holds for every storage in repositories: cases that the test modules of the forges run on theirs."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.forges.repository import BareRepository, Link
from tests.forges.server import Answer, Asked, StandIn

from flowagent import http
from flowagent.backend import Artifact, Backend, BackendContext, Revision
from flowagent.errors import BackendError, SourceCacheError, StorageNotFoundError, StorageTransientError
from flowagent.models import Json
from flowagent.secrets import SecretProvider
from flowagent.sources import SourceCache
from flowagent.storage import Storage
from flowagent_backends import forges
from flowagent_backends.forges import RepositoryBackend

SCRIPT = "from flowagent import Flow\nflow = Flow('etl')\n"
TOKEN = "t0ken-0f-the-tests"
ODD = "odd names/ä ö+%41 &=?#[x];,'~@:$.txt"


@dataclass
class Case:
    """A stand-in of a forge, a repository in it, the backend that reads it."""

    stand_in: StandIn
    git: BareRepository
    name: str
    """Of the repository, in the stand-in."""
    declare: Callable[..., Storage]
    """The storage for ``path``, with further arguments."""
    make: Callable[[BackendContext], RepositoryBackend]
    home: Path
    variable: str
    """That holds a token."""
    refers: str = "ref"
    environ: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.backend = self.knowing(self.host)
        self.first = self.git.commit({"flows/etl.py": SCRIPT, "README": "read me"})

    @property
    def host(self) -> str:
        return self.stand_in.url.partition("://")[2]

    def knowing(self, *hosts: str) -> RepositoryBackend:
        """A backend whose operator names these hosts as those that get its tokens."""
        return self.make(BackendContext(self.home, "host1", environ=self.environ, token_hosts=hosts))

    @property
    def private(self) -> bool:
        return self.stand_in.repositories[self.name].private

    @private.setter
    def private(self, value: bool) -> None:
        self.stand_in.repositories[self.name].private = value

    def storage(self, path: str = "flows/etl.py", ref: str | None = None, **more: Any) -> dict[str, Json]:
        named = {} if ref is None else {self.refers: ref}
        return self.declare(path, **named, **more).to_json()

    def give_token(self, *rights: str, secret: str | None = None) -> None:
        """A token that the forge knows, in the environment or as a secret."""
        self.stand_in.tokens[TOKEN] = set(rights)
        if secret is None:
            self.environ[self.variable] = TOKEN
        else:
            SecretProvider(self.home, {}).set(secret, TOKEN)

    async def fetch(self, storage: dict[str, Json], directory: Path) -> tuple[Revision, dict[str, str]]:
        """The revision now, and its files."""
        revision = await self.backend.resolve(storage)
        directory.mkdir()
        await self.backend.materialise(storage, revision, directory)
        return revision, contents(directory)


@asynccontextmanager
async def at_work(case: Case) -> AsyncIterator[Case]:
    """The case, until the test ends."""
    try:
        yield case
    finally:
        await case.backend.close()


@asynccontextmanager
async def closing(backend: RepositoryBackend) -> AsyncIterator[RepositoryBackend]:
    try:
        yield backend
    finally:
        await backend.close()


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): path.read_text(errors="replace")
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BACKOFF", 0.001)


class RepositoryCases:
    """A subclass has a fixture ``case``."""

    attempts = http.ATTEMPTS

    # -- references ------------------------------------------------------------------------------------

    async def test_it_is_a_backend(self, case: Case) -> None:
        assert isinstance(case.backend, Backend)
        assert case.backend.default_labels(case.storage()) == ()
        assert case.backend.default_result(case.storage()) is None

    async def test_the_default_branch_is_asked_for(self, case: Case, tmp_path: Path) -> None:
        assert case.git.default != "master"
        revision, files = await case.fetch(case.storage(), tmp_path / "source")
        assert revision.id == case.first
        assert (revision.entry.kind, revision.entry.path) == ("script", "flows/etl.py")
        assert files == {"flows/etl.py": SCRIPT}

    async def test_a_branch_that_moves(self, case: Case, tmp_path: Path) -> None:
        first = await case.backend.resolve(case.storage())
        second = case.git.commit({"flows/etl.py": SCRIPT + "# edited\n"})
        revision, files = await case.fetch(case.storage(), tmp_path / "source")
        assert revision.id == second
        assert revision.key != first.key
        assert files == {"flows/etl.py": SCRIPT + "# edited\n"}
        (tmp_path / "old").mkdir()
        await case.backend.materialise(case.storage(), first, tmp_path / "old")
        assert contents(tmp_path / "old") == {"flows/etl.py": SCRIPT}

    @pytest.mark.parametrize(
        "name",
        ["dev", "feature/new-things", "refs/heads/dev", "v1.0", "refs/tags/v1.0", "annotated", "SHORT"],
    )
    async def test_references(self, case: Case, tmp_path: Path, name: str) -> None:
        other = case.git.commit({"flows/etl.py": "other = 1\n"}, branch="dev")
        case.git.commit({"flows/etl.py": "other = 1\n"}, branch="feature/new-things", onto=other)
        case.git.tag("v1.0", other)
        case.git.tag("annotated", other, annotated=True)
        case.git.commit({"flows/etl.py": "later = 1\n"})
        ref = other[:10] if name == "SHORT" else name
        revision, files = await case.fetch(case.storage(ref=ref), tmp_path / "source")
        assert re.fullmatch(r"[0-9a-f]{40}", revision.id)
        assert files == {"flows/etl.py": "other = 1\n"}
        if name != "feature/new-things":
            assert revision.id == other

    async def test_a_commit_costs_no_request(self, case: Case, tmp_path: Path) -> None:
        case.git.commit({"flows/etl.py": "later = 1\n"})
        revision = await case.backend.resolve(case.storage(ref=case.first))
        assert not case.stand_in.log
        assert revision.id == case.first
        assert (await case.fetch(case.storage(ref=case.first.upper()), tmp_path / "x"))[1] == {
            "flows/etl.py": SCRIPT
        }

    async def test_a_key_is_for_all_that_a_source_depends_on(self, case: Case) -> None:
        storages = [
            case.storage(ref=case.first),
            case.storage("README", ref=case.first),
            case.storage(ref=case.first, files=["README"]),
        ]
        keys = [(await case.backend.resolve(storage)).key for storage in storages]
        assert len(set(keys)) == 3
        assert (await case.backend.resolve(case.storage())).key == keys[0]

    # -- files -----------------------------------------------------------------------------------------

    async def test_files_beside_the_script(self, case: Case, tmp_path: Path) -> None:
        case.git.commit(
            {"person.txt": "Marvin", "sql/a.sql": "a", "sql/deep/er/b.sql": "b", "sqlite.txt": "no"}
        )
        storage = case.storage(files=["person.txt", "sql/"])
        _, files = await case.fetch(storage, tmp_path / "source")
        assert files == {
            "flows/etl.py": SCRIPT,
            "person.txt": "Marvin",
            "sql/a.sql": "a",
            "sql/deep/er/b.sql": "b",
        }

    async def test_they_are_of_the_same_commit(self, case: Case, tmp_path: Path) -> None:
        case.git.commit({"sql/a.sql": "first"})
        storage = case.storage(files=["sql/"])
        revision = await case.backend.resolve(storage)
        case.git.commit({"sql/a.sql": "second", "sql/b.sql": "new", "flows/etl.py": "later = 1\n"})
        (tmp_path / "source").mkdir()
        await case.backend.materialise(storage, revision, tmp_path / "source")
        assert contents(tmp_path / "source") == {"flows/etl.py": SCRIPT, "sql/a.sql": "first"}

    async def test_names_and_bytes_of_all_kinds(self, case: Case, tmp_path: Path) -> None:
        data = bytes(range(256)) * 2000
        case.git.commit({ODD: data, "odd names/empty": b"", "odd names/ünder/x.py": "x"})
        storage = case.storage(ODD, files=["odd names/"])
        await case.fetch(storage, tmp_path / "source")
        assert (tmp_path / "source" / ODD).read_bytes() == data
        assert (tmp_path / "source" / "odd names/empty").read_bytes() == b""
        assert (tmp_path / "source" / "odd names/ünder/x.py").read_bytes() == b"x"
        _, files = await case.fetch(case.storage(ODD, files=["odd names/ünder/"]), tmp_path / "other")
        assert set(files) == {ODD, "odd names/ünder/x.py"}

    @pytest.mark.parametrize(
        "change",
        [
            {"path": "../../escaped.py"},
            {"path": "/etc/passwd"},
            {"files": ["../../"]},
            {"files": "x"},
            {"repo": "../../x?"},
            {"unknown": 1},
        ],
    )
    async def test_a_declaration_from_the_store_is_not_trusted(
        self, case: Case, tmp_path: Path, change: dict[str, Json]
    ) -> None:
        """The names in it are of files that an agent writes, as the agent."""
        good = case.storage(ref=case.first)
        (tmp_path / "source").mkdir()
        revision = await case.backend.resolve(good)
        with pytest.raises(BackendError, match=r"storage is wrong: .*; register it again"):
            await case.backend.resolve(good | change)
        with pytest.raises(BackendError, match=r"storage is wrong: .*; register it again"):
            await case.backend.materialise(good | change, revision, tmp_path / "source")
        assert not case.stand_in.log
        assert not list(tmp_path.rglob("escaped.py"))

    async def test_many_files(self, case: Case, tmp_path: Path) -> None:
        many = {f"data/{number // 50}/{number}.txt": str(number) for number in range(110)}
        case.git.commit(many)
        _, files = await case.fetch(case.storage(files=["data/"]), tmp_path / "source")
        assert files == {"flows/etl.py": SCRIPT, **many}

    async def test_progress(self, case: Case, tmp_path: Path) -> None:
        sizes = {f"data/{number}": 1000 * (number + 1) for number in range(5)}
        case.git.commit({name: "x" * size for name, size in sizes.items()})
        seen: list[tuple[str, list[int]]] = []

        @contextmanager
        def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
            amounts: list[int] = []
            seen.append((what, amounts))
            yield amounts.append

        case.backend = case.make(BackendContext(case.home, "host1", environ=case.environ, progress=progress))
        await case.fetch(case.storage(files=["data/"]), tmp_path / "source")
        ((what, amounts),) = seen
        assert what == "downloading flows/etl.py and 5 more"
        assert sorted(amounts) == sorted([len(SCRIPT), *sizes.values()])
        await case.fetch(case.storage(), tmp_path / "alone")
        assert seen[1:] == [("downloading flows/etl.py", [len(SCRIPT)])]

    async def test_bounds(self, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        case.git.commit({f"data/{number}": "x" * 100 for number in range(20)})
        storage = case.storage(files=["data/"])
        revision = await case.backend.resolve(storage)
        cache = SourceCache(tmp_path / "cache")
        monkeypatch.setattr(forges, "MOST_FILES", 20)
        with pytest.raises(BackendError, match=r"comes to 21 files; that is too much for this API, use Git"):
            await cache.acquire(case.backend, storage, revision)
        monkeypatch.setattr(forges, "MOST_FILES", 21)
        monkeypatch.setattr(forges, "MOST_BYTES", 1000)
        with pytest.raises(BackendError, match=r"comes to more than 1000 bytes; that is too much"):
            await cache.acquire(case.backend, storage, revision)
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()]
        monkeypatch.setattr(forges, "MOST_BYTES", 3000)
        assert len(contents(await cache.acquire(case.backend, storage, revision))) == 21

    async def test_a_directory_is_no_file(self, case: Case, tmp_path: Path) -> None:
        for path in ("flows", "nothing/", "README/"):
            with pytest.raises(
                BackendError, match=r"flows is a|no file (flows|nothing/|README/)|README is a"
            ):
                await case.fetch(case.storage(files=[path]), tmp_path / path.strip("/"))

    async def test_links_are_not_left_out_silently(self, case: Case, tmp_path: Path) -> None:
        case.git.commit({"sql/a.sql": "a", "sql/latest": Link("a.sql")})
        with pytest.raises(BackendError, match="sql/latest is a symbolic link, which is not fetched"):
            await case.fetch(case.storage(files=["sql/"]), tmp_path / "source")

    async def test_what_is_kept_in_lfs_is_refused(self, case: Case, tmp_path: Path) -> None:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
        case.git.commit({"data/big.bin": pointer})
        with pytest.raises(BackendError, match=r"data/big.bin is kept in Git LFS, .*; use Git\(\.\.\.\)"):
            await case.fetch(case.storage(files=["data/big.bin"]), tmp_path / "source")

    # -- what is missing -------------------------------------------------------------------------------

    async def test_a_missing_file(self, case: Case, tmp_path: Path) -> None:
        with pytest.raises(StorageNotFoundError) as missing:
            await case.fetch(case.storage("flows/gone.py"), tmp_path / "x")
        assert "no file flows/gone.py" in str(missing.value)

    @pytest.mark.parametrize("ref", ["gone", "feature/gone", "refs/tags/gone", "0123456789"])
    async def test_a_missing_reference(self, case: Case, ref: str) -> None:
        with pytest.raises(StorageNotFoundError, match=f"no branch, tag or commit {ref}"):
            await case.backend.resolve(case.storage(ref=ref))

    async def test_a_missing_commit(self, case: Case, tmp_path: Path) -> None:
        with pytest.raises(StorageNotFoundError, match="no branch, tag or commit 0123456789"):
            await case.fetch(case.storage(ref="0123456789" * 4), tmp_path / "x")

    async def test_a_missing_repository(self, case: Case, tmp_path: Path) -> None:
        del case.stand_in.repositories[case.name]
        for ref in (None, "dev", case.first):
            with pytest.raises(StorageNotFoundError, match="there is no such repository"):
                await case.fetch(case.storage(ref=ref), tmp_path / str(ref))

    # -- faults ----------------------------------------------------------------------------------------

    async def test_faults_that_pass(self, case: Case, tmp_path: Path) -> None:
        case.stand_in.fail(Answer(503), times=2)
        case.stand_in.fail(Answer(502), lambda asked: "etl.py" in asked.target)
        assert (await case.fetch(case.storage(), tmp_path / "source"))[1] == {"flows/etl.py": SCRIPT}

    async def test_faults_that_stay(self, case: Case) -> None:
        case.stand_in.fail(Answer(503, b"<h1>down</h1>"), times=100)
        with pytest.raises(StorageTransientError, match="503") as failed:
            await case.backend.resolve(case.storage())
        assert len(case.stand_in.log) == self.attempts
        one_line(case, failed.value)

    async def test_a_body_that_is_cut_off(self, case: Case, tmp_path: Path) -> None:
        storage = case.storage()
        revision = await case.backend.resolve(storage)
        cut = Answer(200, SCRIPT.encode(), cut=10)
        case.stand_in.fail(cut, times=100)
        cache = SourceCache(tmp_path / "cache")
        with pytest.raises(StorageTransientError, match="cannot be reached"):
            await cache.acquire(case.backend, storage, revision)
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()]
        case.stand_in.faults.clear()
        assert contents(await cache.acquire(case.backend, storage, revision)) == {"flows/etl.py": SCRIPT}

    async def test_a_server_that_does_not_answer(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http.Request, "deadline", 0.3)
        monkeypatch.setattr(http.Request, "__init__", _with_deadline(http.Request.__init__, 0.3))
        case.stand_in.fail(Answer(200, wait=1.0))
        with pytest.raises(StorageTransientError, match="it did not answer in time"):
            await case.backend.resolve(case.storage())

    @pytest.mark.parametrize(
        "body", [b"", b"<html>sign in</html>", b"[]", b"{}", b'{"id": "x"}', b"\xff\x00"]
    )
    async def test_answers_that_nobody_understands(self, case: Case, body: bytes) -> None:
        case.stand_in.fail(Answer(200, body, {"Content-Type": "application/json"}), times=100)
        with pytest.raises(BackendError) as failed:
            await case.backend.resolve(case.storage(ref="dev"))
        one_line(case, failed.value)

    @pytest.mark.parametrize("status", [200, 400, 403])
    async def test_answers_without_an_end(self, case: Case, tmp_path: Path, status: int) -> None:
        for body in (b"[" * 200_000, b'{"message": ' * 5000, b'{"message": "' + b"x" * 100_000 + b'"}'):
            case.stand_in.faults.clear()
            case.stand_in.fail(Answer(status, body, {"Content-Type": "application/json"}), times=100)
            with pytest.raises(BackendError) as failed:
                await case.backend.resolve(case.storage())
            one_line(case, failed.value)

    @pytest.mark.parametrize("path", ["x" * 300, "y/" + "ö" * 130, "x/" * 1500 + "x"])
    async def test_a_name_that_no_file_can_have(self, case: Case, tmp_path: Path, path: str) -> None:
        revision = await case.backend.resolve(case.storage())
        for storage in (case.storage(path), case.storage(files=[path])):
            with pytest.raises(BackendError, match="is no name that a file can have here") as failed:
                await case.backend.materialise(storage, revision, tmp_path)
            one_line(case, failed.value)

    # -- one for many ----------------------------------------------------------------------------------

    async def test_a_hundred_runs_are_one_download(self, case: Case, tmp_path: Path) -> None:
        storage = case.storage()
        await case.backend.resolve(storage)
        once = len(case.stand_in.log)
        case.stand_in.log.clear()
        cache = SourceCache(tmp_path / "cache")
        found: set[Path] = set()

        async def run() -> None:
            revision = await case.backend.resolve(storage)
            found.add(await cache.acquire(case.backend, storage, revision))

        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(run)
        assert len(found) == 1
        questions = len(case.stand_in.log)
        assert questions <= 2 * once + self.requests_for_a_file(case)

    def requests_for_a_file(self, case: Case) -> int:
        return 1

    # -- registration ----------------------------------------------------------------------------------

    async def test_registering_checks_that_it_is_there(self, case: Case, tmp_path: Path) -> None:
        artifact = Artifact("etl", "script", path=tmp_path / "etl.py")
        storage = case.storage()
        assert await case.backend.upload(storage, artifact) == storage
        with pytest.raises(StorageNotFoundError, match=r"no file flows/gone\.py"):
            await case.backend.upload(case.storage("flows/gone.py"), artifact)
        with pytest.raises(StorageNotFoundError, match=r"no file gone.txt"):
            await case.backend.upload(case.storage(files=["gone.txt"]), artifact)

    async def test_registering_has_an_end(
        self, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(forges, "LONGEST_CHECK", 0.2)
        case.stand_in.fail(Answer(200, wait=1.0), times=9)
        with pytest.raises(
            StorageTransientError, match=r"to look at flows/etl.py took longer than 0.2"
        ) as it:
            await case.backend.upload(case.storage(), Artifact("etl", "script", path=tmp_path / "etl.py"))
        one_line(case, it.value)

    async def test_pickles_are_refused(self, case: Case) -> None:
        with pytest.raises(BackendError, match="repositories hold scripts"):
            await case.backend.upload(case.storage(), Artifact("etl", "pickle", data=b""))

    @pytest.mark.parametrize("branch", [None, "dev", "refs/heads/dev", "feature/x"])
    async def test_registering_can_commit_the_script(
        self, case: Case, tmp_path: Path, branch: str | None
    ) -> None:
        case.give_token("read", "write")
        short = (branch or case.git.default).removeprefix("refs/heads/")
        if branch:
            case.git.commit({"other": "x"}, branch=short, onto=case.first)
        script = tmp_path / "etl.py"
        artifact = Artifact("My ETL", "script", path=script)
        storage = case.storage("new/ä etl.py", ref=branch, upload=True)
        for text in ("one = 1\n", "two = 2\n", "two = 2\n", ""):
            script.write_text(text)
            before = case.git.find(f"refs/heads/{short}")
            assert await case.backend.upload(storage, artifact) == storage
            revision, files = await case.fetch(storage, tmp_path / f"source-{len(list(tmp_path.iterdir()))}")
            assert files == {"new/ä etl.py": text}
            assert case.git.find(f"refs/heads/{short}") == revision.id
            if text != before and before is not None:
                assert case.git.message(revision.id) == "Register flow My ETL"
        log = case.git._run("log", "--format=%s", f"refs/heads/{short}").decode().splitlines()
        assert log.count("Register flow My ETL") == 3  # what was there already was left alone
        assert "etl.py" in str(case.git.tree(case.git.find(f"refs/heads/{short}") or "", recursive=True))

    async def test_somebody_else_commits_meanwhile(self, case: Case, tmp_path: Path) -> None:
        case.give_token("read", "write")
        script = tmp_path / "etl.py"
        script.write_text("mine = 1\n")
        interrupted: list[str] = []

        def interrupt(asked: Asked) -> bool:
            if (
                asked.method in ("PUT", "POST")
                and not interrupted
                and "Get" not in asked.headers.get("x-amz-target", "")
            ):
                interrupted.append(case.git.commit({"flows/etl.py": "theirs = 1\n", "more": "x"}))
            return False

        case.stand_in.fail(Answer(500), interrupt)
        await case.backend.upload(case.storage(upload=True), Artifact("etl", "script", path=script))
        assert interrupted
        _, files = await case.fetch(case.storage(files=["more"]), tmp_path / "source")
        assert files == {"flows/etl.py": "mine = 1\n", "more": "x"}

    async def test_committing_to_a_branch_that_is_not_there(self, case: Case, tmp_path: Path) -> None:
        case.give_token("read", "write")
        script = tmp_path / "etl.py"
        script.write_text("x = 1\n")
        with pytest.raises(BackendError) as failed:
            await case.backend.upload(
                case.storage(ref="gone", upload=True), Artifact("etl", "script", path=script)
            )
        assert "gone" in str(failed.value)
        one_line(case, failed.value)
        with pytest.raises(BackendError, match="comes from no file that could be uploaded"):
            await case.backend.upload(case.storage(upload=True), Artifact("etl", "script"))


class TokenCases(RepositoryCases):
    """For forges with tokens over HTTP."""

    @pytest.mark.parametrize("how", ["variable", "secret", "named"])
    async def test_a_private_repository_takes_a_token(self, case: Case, tmp_path: Path, how: str) -> None:
        case.private = True
        for ref in (None, "dev", case.first):
            with pytest.raises(BackendError, match=r"private|takes a token") as refused:
                await case.fetch(case.storage(ref=ref), tmp_path / f"none-{ref}")
            assert "access_token_secret=" in str(refused.value)
        secret = {"variable": None, "secret": case.variable, "named": "MY_TOKEN"}[how]
        case.give_token("read", secret=secret)
        storage = case.storage(**({"access_token_secret": "MY_TOKEN"} if how == "named" else {}))
        assert (await case.fetch(storage, tmp_path / "source"))[1] == {"flows/etl.py": SCRIPT}
        public = await case.backend.resolve(case.storage(ref=case.first))
        named = await case.backend.resolve({**storage, "ref": case.first})
        assert (public.key == named.key) == (how != "named")

    @pytest.mark.parametrize("how", ["variable", "secret"])
    async def test_a_host_that_nobody_named_gets_no_token(self, case: Case, how: str) -> None:
        """Authors of flows choose hosts: what they do not name themselves goes where the operator says."""
        case.private = True
        case.give_token("read", secret=case.variable if how == "secret" else None)
        for hosts in ((), ("127.0.0.1",), (f"x.{case.host}", "git.example")):
            case.stand_in.log.clear()
            async with closing(case.knowing(*hosts)) as unknown:
                with pytest.raises(BackendError, match=f"as the token in {case.variable} is for ") as refused:
                    await unknown.resolve(case.storage())
                assert f"and {case.host} is none of them" in str(refused.value)
                one_line(case, refused.value)
                assert case.stand_in.log
                assert all(asked.token is None for asked in case.stand_in.log)
                storage = case.storage(access_token_secret=case.variable)
                if how == "secret":
                    assert (await unknown.resolve(storage)).id == case.first
                else:
                    with pytest.raises(BackendError, match=rf"variable {case.variable} is not given to 127"):
                        await unknown.resolve(storage)
        async with closing(case.knowing("git.example", case.host)) as known:
            assert (await known.resolve(case.storage())).id == case.first

    @pytest.mark.parametrize("how", ["variable", "named"])
    async def test_no_token_goes_where_all_can_read_it(self, case: Case, how: str) -> None:
        case.give_token("read", secret="MY_TOKEN" if how == "named" else None)
        name = next(name for name in ("base_url", "host") if name in case.storage())
        address = "http://git.example:8080"
        storage = {**case.storage(), name: address}
        if how == "named":
            storage["access_token_secret"] = "MY_TOKEN"
        async with closing(case.knowing("git.example:8080")) as backend:
            with pytest.raises(BackendError, match=rf"would go to {address}.* for all to read") as refused:
                await backend.resolve(storage)
        one_line(case, refused.value)

    async def test_a_token_that_may_not_read_it(self, case: Case, tmp_path: Path) -> None:
        case.private = True
        case.give_token()
        with pytest.raises(
            BackendError, match=rf"private|not allowed with the token in {case.variable}"
        ) as refused:
            await case.fetch(case.storage(), tmp_path / "x")
        assert case.variable in str(refused.value)
        one_line(case, refused.value)

    async def test_a_wrong_token(self, case: Case, tmp_path: Path) -> None:
        case.environ[case.variable] = TOKEN
        with pytest.raises(BackendError, match=f"the token in {case.variable} is not accepted") as refused:
            await case.backend.resolve(case.storage())
        assert f"flowagent secret set {case.variable}" in str(refused.value)
        one_line(case, refused.value)
        with pytest.raises(BackendError, match="is not accepted") as refused:
            await case.fetch(case.storage(ref=case.first), tmp_path / "x")
        one_line(case, refused.value)

    async def test_a_secret_that_is_not_set(self, case: Case) -> None:
        case.environ["HOME"] = "/home/somebody"
        for name in (
            "MY_TOKEN",
            "HOME",
        ):  # no variable of the agent's goes out under a name that authors choose
            with pytest.raises(BackendError, match=f"secret {name} is not set; on the agent's machine, run"):
                await case.backend.resolve(case.storage(access_token_secret=name))
        assert not case.stand_in.log

    async def test_the_line_break_of_a_file_is_no_part_of_a_token(self, case: Case) -> None:
        case.give_token("read")
        case.environ[case.variable] += "\r\n"
        SecretProvider(case.home, {}).set(case.variable, TOKEN + "\n")
        assert (await case.backend.resolve(case.storage())).id == case.first

    @pytest.mark.parametrize("value", [f"{TOKEN}\r\nX-Evil: 1", f"a\n{TOKEN}", f"{TOKEN}\0"])
    async def test_a_token_cannot_hold_another_header(self, case: Case, value: str) -> None:
        SecretProvider(case.home, {}).set("MY_TOKEN", value)
        with pytest.raises(BackendError, match="would hold a line break") as refused:
            await case.backend.resolve(case.storage(access_token_secret="MY_TOKEN"))
        assert not case.stand_in.log
        one_line(case, refused.value)

    async def test_a_token_that_may_not_write(self, case: Case, tmp_path: Path) -> None:
        case.give_token("read")
        script = tmp_path / "etl.py"
        script.write_text("x = 1\n")
        for private in (False, True):
            case.private = private
            with pytest.raises(BackendError, match=case.variable) as refused:
                await case.backend.upload(case.storage(upload=True), Artifact("etl", "script", path=script))
            one_line(case, refused.value)
        assert case.git.find(f"refs/heads/{case.git.default}") == case.first

    async def test_a_limit_that_is_used_up(self, case: Case, tmp_path: Path) -> None:
        case.stand_in.fail(Answer(429, b"", {"Retry-After": "0"}))
        assert (await case.backend.resolve(case.storage())).id == case.first
        case.stand_in.fail(Answer(429, b"", {"Retry-After": "600"}))
        with pytest.raises(
            StorageTransientError, match=r"the rate limit for anybody .* is used up until \d\d:"
        ):
            await case.backend.resolve(case.storage(ref="dev"))
        asked = len(case.stand_in.log)
        with pytest.raises(StorageTransientError, match="is used up until"):
            await case.backend.resolve(case.storage(ref="other"))
        assert len(case.stand_in.log) == asked  # to go on asking makes it worse
        case.give_token("read")
        assert (await case.backend.resolve(case.storage())).id == case.first

    @pytest.mark.parametrize("value", ["9" * 18, "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
    async def test_a_limit_for_ever_is_not_believed(
        self, case: Case, monkeypatch: pytest.MonkeyPatch, value: str
    ) -> None:
        case.stand_in.fail(Answer(429, b"", {"Retry-After": value}))
        with pytest.raises(StorageTransientError, match=r"is used up until \d\d:\d\d:\d\d UTC"):
            await case.backend.resolve(case.storage())
        tomorrow = time.time() + 25 * 3600
        monkeypatch.setattr(time, "time", lambda: tomorrow)
        assert (await case.backend.resolve(case.storage())).id == case.first

    @pytest.mark.parametrize("status", [400, 401, 403, 500])
    async def test_a_token_that_comes_back_is_not_shown(
        self, case: Case, tmp_path: Path, status: int
    ) -> None:
        case.give_token("read")
        revision = await case.backend.resolve(case.storage())
        said = {"message": f"{'no ' * 64}such token: {TOKEN}"}
        case.stand_in.fail(Answer(status, said), times=http.ATTEMPTS)
        with pytest.raises(BackendError, match=r"no no") as refused:
            await case.backend.materialise(case.storage(), revision, tmp_path)
        assert TOKEN[:4] not in str(refused.value)


def _with_deadline(made: Any, seconds: float) -> Any:
    def init(self: http.Request, *arguments: Any, **more: Any) -> None:
        made(self, *arguments, **{"deadline": seconds, **more})

    return init


def one_line(case: Case, error: BaseException) -> None:
    """What every error is: one line that begins with whose it is, without a token."""
    text = str(error)
    assert text.startswith(f"{case.backend.type}: "), text
    assert text.isprintable(), text
    assert TOKEN not in text
    assert len(text) < 500


__all__ = [
    "Case",
    "RepositoryCases",
    "SourceCacheError",
    "TokenCases",
    "at_work",
    "contents",
    "one_line",
    "soon",
]

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from forge_cases import SCRIPT, TOKEN, Case, TokenCases, at_work, one_line, soon
from tests.forges import bitbucket, server
from tests.forges.repository import BareRepository, Link

from flowagent import FlowError
from flowagent.backend import BackendContext
from flowagent.errors import BackendError, StorageNotFoundError, StorageTransientError
from flowagent.secrets import SecretProvider
from flowagent.storage import Bitbucket
from flowagent_backends.bitbucket import BitbucketBackend

__all__ = ["soon"]


@pytest.fixture
def git(tmp_path: Path) -> BareRepository:
    (tmp_path / "home").mkdir()
    return BareRepository(tmp_path / "git", default="trunk")


class TestCloud(TokenCases):
    @pytest.fixture
    async def case(self, tmp_path: Path, git: BareRepository) -> AsyncIterator[Case]:
        stand_in = bitbucket.Cloud()
        stand_in.repositories["acme/flows"] = server.Kept(git)
        with server.serving(stand_in) as url:
            declare = partial(Bitbucket, "Data & More", "flows", workspace="acme", host=url)
            made = Case(
                stand_in,
                git,
                "acme/flows",
                declare,
                BitbucketBackend,
                tmp_path / "home",
                "BITBUCKET_ACCESS_TOKEN",
            )
            async with at_work(made) as case:
                yield case

    def requests_for_a_file(self, case: Case) -> int:
        return 2

    async def test_an_api_token(self, case: Case, tmp_path: Path) -> None:
        case.private = True
        case.stand_in.tokens[f"me@example.com:{TOKEN}"] = {"read"}
        secrets = SecretProvider(case.home, {})
        secrets.set("ME", "me@example.com")
        secrets.set("PASSWORD", TOKEN)
        named = case.storage(cloud_username_secret="ME", cloud_app_password_secret="PASSWORD")
        assert (await case.fetch(named, tmp_path / "source"))[1] == {"flows/etl.py": SCRIPT}
        basic = base64.b64encode(f"me@example.com:{TOKEN}".encode()).decode()
        assert {asked.headers["authorization"] for asked in case.stand_in.log} == {f"Basic {basic}"}
        case.environ["BITBUCKET_CLOUD_USERNAME"] = "me@example.com"
        with pytest.raises(StorageNotFoundError, match="or it is private"):
            await case.backend.resolve(case.storage())
        case.environ["BITBUCKET_CLOUD_APP_PASSWORD"] = TOKEN
        assert (await case.backend.resolve(case.storage())).id == case.first
        case.stand_in.tokens.clear()
        with pytest.raises(BackendError, match="the token in PASSWORD is not accepted") as refused:
            await case.backend.resolve(named)
        one_line(case, refused.value)

    async def test_a_limit_without_a_time(self, case: Case) -> None:
        case.stand_in.fail(case.stand_in.limit, times=9)  # type: ignore[attr-defined]
        with pytest.raises(StorageTransientError, match="is used up until"):
            await case.backend.resolve(case.storage())

    async def test_a_branch_before_a_tag_of_its_name(self, case: Case) -> None:
        case.git.tag("both", case.first)
        other = case.git.commit({"x": "y"}, branch="both")
        assert (await case.backend.resolve(case.storage(ref="both"))).id == other
        assert (await case.backend.resolve(case.storage(ref="refs/tags/both"))).id == case.first

    async def test_a_listing_goes_on_at_no_other_host(self, case: Case, tmp_path: Path) -> None:
        case.give_token("read")
        case.git.commit({"sql/a.sql": "a"})
        for following in ("http://evil.example/2.0/x?page=2", f"{case.stand_in.url}.evil.example/x?page=2"):
            page = {"values": [], "next": following}
            case.stand_in.fail(server.Answer(200, page), lambda asked: "pagelen" in asked.target)
            with pytest.raises(BackendError, match="goes on at another address, which is not asked"):
                await case.fetch(case.storage(files=["sql/"]), tmp_path / f"x{len(following)}")

    async def test_a_listing_without_an_end(self, case: Case, tmp_path: Path) -> None:
        revision = await case.backend.resolve(case.storage())
        at = f"{case.stand_in.url}/2.0/repositories/acme/flows/src/x"
        again = [{"type": "commit_directory", "path": "sql/"}]
        for page in ({"values": [], "next": f"{at}?page=2"}, {"values": again}):
            case.stand_in.faults.clear()
            case.stand_in.fail(server.Answer(200, page), times=100)
            with pytest.raises(BackendError, match=r"listing of sql/ leads back to where it was") as refused:
                await case.backend.materialise(case.storage(files=["sql/"]), revision, tmp_path)
            one_line(case, refused.value)

    @pytest.mark.parametrize("path", ["../../evil", "/etc/evil", "sql/../../evil", "other/x"])
    async def test_a_listing_that_leads_out(self, case: Case, tmp_path: Path, path: str) -> None:
        page = {"values": [{"type": "commit_file", "path": path, "size": 1}]}
        case.stand_in.fail(server.Answer(200, page), lambda asked: "pagelen" in asked.target)
        with pytest.raises(BackendError, match="which is not in it; that server cannot be trusted"):
            await case.fetch(case.storage(files=["sql/"]), tmp_path / "source")

    async def test_an_empty_repository(self, case: Case, tmp_path: Path) -> None:
        case.stand_in.repositories[case.name].git = BareRepository(tmp_path / "empty")
        with pytest.raises(StorageNotFoundError, match="the repository is empty"):
            await case.backend.resolve(case.storage())


class TestDataCenter(TokenCases):
    @pytest.fixture
    async def case(self, tmp_path: Path, git: BareRepository) -> AsyncIterator[Case]:
        stand_in = bitbucket.DataCenter()
        stand_in.repositories["~jane/project.repo"] = server.Kept(git)
        with server.serving(stand_in) as url:
            declare = partial(Bitbucket, "~jane", "project.repo", host=url)
            made = Case(
                stand_in,
                git,
                "~jane/project.repo",
                declare,
                BitbucketBackend,
                tmp_path / "home",
                "BITBUCKET_ACCESS_TOKEN",
            )
            async with at_work(made) as case:
                yield case

    async def test_links_are_not_left_out_silently(self, case: Case, tmp_path: Path) -> None:
        """Its API tells them from files nowhere: they come as git keeps them."""
        case.git.commit({"sql/a.sql": "a", "sql/latest": Link("a.sql")})
        _, files = await case.fetch(case.storage(files=["sql/"]), tmp_path / "source")
        assert files["sql/latest"] == "a.sql"

    async def test_what_is_asked(self, case: Case, tmp_path: Path) -> None:
        await case.fetch(case.storage(), tmp_path / "source")
        at = "/rest/api/latest/projects/~jane/repos/project.repo"
        assert [asked.target for asked in case.stand_in.log] == [
            f"{at}/commits?limit=1",
            f"{at}/raw/flows/etl.py?at={case.first}",
        ]

    async def test_a_listing_without_an_end(self, case: Case, tmp_path: Path) -> None:
        revision = await case.backend.resolve(case.storage())
        page = {"values": [], "isLastPage": False, "nextPageStart": 0}
        case.stand_in.fail(server.Answer(200, page), times=100)
        with pytest.raises(BackendError, match=r"listing of sql/ leads back to where it was") as refused:
            await case.backend.materialise(case.storage(files=["sql/"]), revision, tmp_path)
        one_line(case, refused.value)

    async def test_a_listing_that_leads_out(self, case: Case, tmp_path: Path) -> None:
        page = {"values": ["../../evil"], "isLastPage": True}
        case.stand_in.fail(server.Answer(200, page), lambda asked: "/files/" in asked.target)
        with pytest.raises(BackendError, match="which is not in it; that server cannot be trusted"):
            await case.fetch(case.storage(files=["sql/"]), tmp_path / "source")

    async def test_an_empty_repository(self, case: Case, tmp_path: Path) -> None:
        case.stand_in.repositories[case.name].git = BareRepository(tmp_path / "empty")
        with pytest.raises(StorageNotFoundError, match="the repository is empty"):
            await case.backend.resolve(case.storage())


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({}, ("https://api.bitbucket.org/2.0", "project/project.repo")),
        ({"host": "bitbucket.org"}, ("https://api.bitbucket.org/2.0", "project/project.repo")),
        ({"workspace": "acme"}, ("https://api.bitbucket.org/2.0", "acme/project.repo")),
        ({"host": "git.example"}, ("https://git.example/rest/api/latest", "project/project.repo")),
        (
            {"host": "https://example.org/bitbucket"},
            ("https://example.org/bitbucket/rest/api/latest", "project/project.repo"),
        ),
    ],
)
def test_where(tmp_path: Path, arguments: dict[str, str], key: tuple[str, ...]) -> None:
    backend = BitbucketBackend(BackendContext(tmp_path, "host1", environ={}))
    storage = Bitbucket("project", "project.repo", "flows/my_flow.py", **arguments)  # type: ignore[arg-type]
    assert backend.repository(storage.to_json()).key[:2] == key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"project": "a/b"}, "project takes the key of a project"),
        ({"project": ".."}, "project takes the key of a project"),
        ({"repo": "a/b"}, "repo takes the repository's name"),
        ({"repo": ".."}, "repo takes the repository's name"),
        ({"workspace": "a/b"}, "workspace takes a workspace's id"),
        ({"cloud_username_secret": "A"}, "go together; give both"),
        (
            {"cloud_username_secret": "A", "cloud_app_password_secret": "B", "access_token_secret": "C"},
            "exclude each other",
        ),
        (
            {"cloud_username_secret": "A", "cloud_app_password_secret": "B", "host": "git.example"},
            "is for Bitbucket Cloud, and host= names a server",
        ),
        ({"host": "https://me:pw@git.example"}, "host takes an address"),
    ],
)
def test_what_cannot_be(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(FlowError, match=message):
        Bitbucket(**{"project": "P", "repo": "r", "path": "p.py", **arguments})  # type: ignore[arg-type]

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from forge_cases import SCRIPT, TOKEN, Case, TokenCases, at_work, one_line, soon
from tests.forges import gitlab, server
from tests.forges.repository import BareRepository

from flowagent import FlowError
from flowagent.backend import BackendContext
from flowagent.errors import BackendError, StorageNotFoundError, StorageTransientError
from flowagent.storage import GitLab
from flowagent_backends import forges
from flowagent_backends.gitlab import GitLabBackend

__all__ = ["soon"]
NAME = "acme/data/flows"


@pytest.fixture
async def case(tmp_path: Path) -> AsyncIterator[Case]:
    stand_in = gitlab.GitLab()
    git = BareRepository(tmp_path / "git", default="trunk")
    stand_in.repositories[NAME] = server.Kept(git, number=42)
    home = tmp_path / "home"
    home.mkdir()
    with server.serving(stand_in) as url:
        made = Case(
            stand_in, git, NAME, partial(GitLab, NAME, host=url), GitLabBackend, home, "GITLAB_ACCESS_TOKEN"
        )
        async with at_work(made) as case:
            yield case


class TestGitLab(TokenCases):
    async def test_what_is_asked(self, case: Case, tmp_path: Path) -> None:
        case.give_token("read_repository")
        await case.fetch(case.storage(ref="trunk"), tmp_path / "source")
        project = "/api/v4/projects/acme%2Fdata%2Fflows/repository/files/flows%2Fetl.py"
        assert [(asked.method, asked.target) for asked in case.stand_in.log] == [
            ("HEAD", f"{project}?ref=trunk"),
            ("GET", f"{project}/raw?ref={case.first}"),
        ]
        for asked in case.stand_in.log:
            assert asked.headers["authorization"] == f"Bearer {TOKEN}"

    async def test_a_project_by_its_number(self, case: Case, tmp_path: Path) -> None:
        declared = GitLab(42, "flows/etl.py", host=case.stand_in.url).to_json()
        assert (await case.fetch(declared, tmp_path / "source"))[1] == {"flows/etl.py": SCRIPT}

    async def test_a_token_for_repositories_only(self, case: Case, tmp_path: Path) -> None:
        case.private = True
        case.give_token("read_repository")
        assert (await case.fetch(case.storage(), tmp_path / "source"))[1] == {"flows/etl.py": SCRIPT}
        with pytest.raises(
            BackendError, match=r"listing flows/ is not allowed .*\(403: The request requires"
        ):
            await case.fetch(case.storage(files=["flows/"]), tmp_path / "other")
        with pytest.raises(StorageNotFoundError):
            await case.fetch(case.storage("gone.py"), tmp_path / "gone")

    async def test_a_wrong_digest(self, case: Case, tmp_path: Path) -> None:
        case.stand_in.fail(
            server.Answer(200, b"evil = 1\n", {"X-Gitlab-Content-Sha256": "0" * 64}),
            lambda asked: asked.path.endswith("/raw"),
        )
        with pytest.raises(StorageTransientError, match=r"flows/etl.py came with a wrong digest"):
            await case.fetch(case.storage(), tmp_path / "source")

    async def test_a_listing_without_an_end(
        self, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        revision = await case.backend.resolve(case.storage())
        asked = len(case.stand_in.log)
        following = {"Link": '<https://x.example/?page_token=zzz>; rel="next"'}
        case.stand_in.fail(server.Answer(200, [], following), times=100)
        with pytest.raises(BackendError, match=r"listing of sql/ leads back to where it was") as refused:
            await case.backend.materialise(case.storage(files=["sql/"]), revision, tmp_path)
        one_line(case, refused.value)
        assert len(case.stand_in.log) == asked + 2
        case.stand_in.faults.clear()
        for number in range(100):
            following = {"Link": f'<https://x.example/?page_token={number}>; rel="next"'}
            case.stand_in.fail(server.Answer(200, [], following))
        monkeypatch.setattr(forges, "MOST_FILES", 20)
        with pytest.raises(BackendError, match=r"listing of sql/ takes more than 20 requests") as refused:
            await case.backend.materialise(case.storage(files=["sql/"]), revision, tmp_path)
        one_line(case, refused.value)

    async def test_the_limit_in_its_words(self, case: Case) -> None:
        case.stand_in.fail(gitlab.LIMITED)
        with pytest.raises(StorageTransientError, match="is used up until") as refused:
            await case.backend.resolve(case.storage())
        one_line(case, refused.value)

    async def test_an_empty_project(self, case: Case, tmp_path: Path) -> None:
        case.stand_in.repositories[NAME].git = BareRepository(tmp_path / "empty")
        with pytest.raises(StorageNotFoundError, match="the repository is empty"):
            await case.backend.resolve(case.storage())

    @pytest.mark.parametrize("path", ["../../evil", "/etc/evil", "sql/../../evil", "other/x", "sql"])
    async def test_a_listing_that_leads_out(self, case: Case, tmp_path: Path, path: str) -> None:
        tree = [{"path": path, "mode": "100644", "type": "blob", "id": "0" * 40}]
        case.stand_in.fail(server.Answer(200, tree), lambda asked: "tree" in asked.target)
        with pytest.raises(BackendError, match="which is not in it; that server cannot be trusted"):
            await case.fetch(case.storage(files=["sql/"]), tmp_path / "source")


@pytest.mark.parametrize(
    ("host", "base"),
    [
        (None, "https://gitlab.com/api/v4"),
        ("gitlab.example", "https://gitlab.example/api/v4"),
        ("https://gitlab.example:8443/", "https://gitlab.example:8443/api/v4"),
        ("https://example.org/gitlab", "https://example.org/gitlab/api/v4"),
        ("[::1]:8080", "https://[::1]:8080/api/v4"),
    ],
)
def test_hosts(tmp_path: Path, host: str | None, base: str) -> None:
    backend = GitLabBackend(BackendContext(tmp_path, "host1", environ={}))
    assert backend.repository(GitLab("a/b", "c.py", host=host).to_json()).key[0] == base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo": "flows"}, "repo takes 'group/project'"),
        ({"repo": True}, "repo takes 'group/project'"),
        ({"repo": "a/../b"}, "repo takes 'group/project'"),
        ({"repo": "a/b?x=y"}, "repo takes 'group/project'"),
        ({"host": "https://me:pw@gitlab.example"}, "host takes an address"),
        ({"host": "gitlab.example/../x"}, "host takes an address"),
        ({"host": "gitlab.example#x"}, "host takes an address"),
        ({"host": "gitlab.example\r\nHost: evil"}, "host takes an address"),
    ],
)
def test_what_cannot_be(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FlowError, match=message) as refused:
        GitLab(**{"repo": "acme/flows", "path": "flows/etl.py", **arguments})  # type: ignore[arg-type]
    assert "pw" not in str(refused.value)

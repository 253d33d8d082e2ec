from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from forge_cases import SCRIPT, TOKEN, Case, TokenCases, at_work, one_line, soon
from tests.forges import github, server
from tests.forges.openapi import Description
from tests.forges.repository import BareRepository, Link

from flowagent import FlowError
from flowagent.backend import Artifact, BackendContext
from flowagent.errors import BackendError, StorageNotFoundError, StorageTransientError
from flowagent.storage import GitHub
from flowagent_backends.github import GitHubBackend

__all__ = ["soon"]


@pytest.fixture(scope="session")
def description() -> Description:
    script = Path(__file__).parents[1] / "github-openapi"
    done = subprocess.run([str(script)], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    return Description(Path(done.stdout.strip()))


@pytest.fixture
async def case(description: Description, tmp_path: Path) -> AsyncIterator[Case]:
    stand_in = github.GitHub(description)
    git = BareRepository(tmp_path / "git", default="trunk")
    stand_in.repositories["acme/flows"] = server.Kept(git)
    home = tmp_path / "home"
    home.mkdir()
    with server.serving(stand_in) as url:
        declare = partial(GitHub, "acme/flows", base_url=url)
        made = Case(stand_in, git, "acme/flows", declare, GitHubBackend, home, "GITHUB_ACCESS_TOKEN")
        async with at_work(made) as case:
            yield case


class TestGitHub(TokenCases):
    async def test_conditional_requests(self, case: Case) -> None:
        """304 costs nothing of the limit, with a token."""
        case.give_token("read")
        for _ in range(3):
            assert (await case.backend.resolve(case.storage())).id == case.first
        conditional = [asked for asked in case.stand_in.log if "if-none-match" in asked.headers]
        assert [asked.headers["if-none-match"] for asked in conditional if "commits" in asked.path] == [
            f'"{case.first}"'
        ] * 2
        assert len(conditional) == 4
        second = case.git.commit({"x": "y"})
        assert (await case.backend.resolve(case.storage())).id == second

    async def test_little_is_kept_of_answers(self, case: Case) -> None:
        """A service says how large they are, and a flow how many."""
        assert isinstance(case.backend, GitHubBackend)
        pad = "x" * 900_000
        for number in range(30):
            said = server.Answer(200, {"default_branch": "trunk", "pad": pad}, {"ETag": f'"{number}"'})
            case.stand_in.fail(said, lambda asked: asked.path == "/repos/acme/flows")
            assert (await case.backend.resolve(case.storage())).id == case.first
        assert case.backend.memory.answers.bytes < 2000
        case.stand_in.fail(server.Answer(200, b"x" * (1 << 21), {"ETag": '"x"'}))
        with pytest.raises(BackendError, match="sends more than 1048576 bytes; that is not taken") as refused:
            await case.backend.resolve(case.storage())
        one_line(case, refused.value)

    async def test_limits_of_many_are_forgotten(self, case: Case) -> None:
        assert isinstance(case.backend, GitHubBackend)
        memory = case.backend.memory
        memory.close(("old", None), time.time() - 1, "it is over")
        for number in range(1000):
            memory.close((f"https://{number}.example", None), time.time() + 60, "it is closed")
        assert len(memory.closed) == 500
        assert ("https://999.example", None) in memory.closed

    async def test_what_is_asked(self, case: Case, tmp_path: Path) -> None:
        case.give_token("read")
        await case.fetch(case.storage(ref="dev/x") | {"ref": case.git.default}, tmp_path / "source")
        resolve, fetch = case.stand_in.log
        assert resolve.target == "/repos/acme/flows/commits/trunk"
        assert fetch.target == f"/repos/acme/flows/contents/flows/etl.py?ref={case.first}"
        for asked in case.stand_in.log:
            assert asked.headers["authorization"] == f"Bearer {TOKEN}"
            assert asked.headers["x-github-api-version"] == "2022-11-28"
            assert asked.headers["user-agent"].startswith("flowagent/")

    @pytest.mark.parametrize("status", [403, 429])
    async def test_the_primary_limit(self, case: Case, status: int) -> None:
        case.give_token("read")
        case.stand_in.fail(github.primary_limit(1200, status))
        with pytest.raises(
            StorageTransientError, match=r"limit for the token in GITHUB_ACCESS_TOKEN"
        ) as refused:
            await case.backend.resolve(case.storage())
        one_line(case, refused.value)
        assert re.search(r"used up until \d\d:\d\d:\d\d UTC", str(refused.value))
        assert len(case.stand_in.log) == 1

    async def test_the_hour_of_anybody(self, case: Case) -> None:
        case.stand_in.left = 3
        assert (await case.backend.resolve(case.storage())).id == case.first
        case.git.commit({"x": "y"})
        with pytest.raises(StorageTransientError, match=r"or give access_token_secret="):
            await case.backend.resolve(case.storage())

    async def test_a_secondary_limit(self, case: Case) -> None:
        case.stand_in.fail(github.secondary_limit(0), times=2)
        assert (await case.backend.resolve(case.storage())).id == case.first
        case.stand_in.fail(github.secondary_limit(90))
        with pytest.raises(StorageTransientError, match="is used up until"):
            await case.backend.resolve(case.storage())

    async def test_words_for_refusals(self, case: Case) -> None:
        case.give_token("read")
        said = {"message": "Resource protected by organization SAML enforcement.", "status": "403"}
        url = "https://github.com/orgs/acme/sso?authorization_request=AZ"
        case.stand_in.fail(server.Answer(403, said, {"X-GitHub-SSO": f"required; url={url}"}))
        with pytest.raises(BackendError, match="single sign-on") as refused:
            await case.backend.resolve(case.storage())
        assert url in str(refused.value)
        said = {"message": "Resource not accessible by personal access token", "status": "403"}
        case.stand_in.fail(server.Answer(403, said))
        with pytest.raises(
            BackendError, match=r"not allowed with the token in GITHUB_ACCESS_TOKEN \(403: Res"
        ):
            await case.backend.resolve(case.storage())

    async def test_an_empty_repository(self, case: Case, tmp_path: Path) -> None:
        case.stand_in.repositories["acme/flows"].git = BareRepository(tmp_path / "empty")
        with pytest.raises(StorageNotFoundError, match="the repository is empty; push the flow to it"):
            await case.backend.resolve(case.storage())

    async def test_a_link_is_read_as_what_it_leads_to(self, case: Case, tmp_path: Path) -> None:
        case.git.commit({"flows/latest.py": Link("etl.py")})
        _, files = await case.fetch(case.storage("flows/latest.py"), tmp_path / "source")
        assert files == {"flows/latest.py": SCRIPT}

    async def test_other_content_than_git_has(self, case: Case, tmp_path: Path) -> None:
        case.git.commit({"sql/a.sql": "a"})
        case.stand_in.fail(
            server.Answer(200, b"b", {"Content-Type": "application/vnd.github.raw+json"}),
            lambda asked: "a.sql" in asked.target,
        )
        with pytest.raises(StorageTransientError, match=r"sql/a.sql came with other content than git has"):
            await case.fetch(case.storage(files=["sql/"]), tmp_path / "source")

    @pytest.mark.parametrize("path", ["../../evil", "/etc/evil", "sql/../../evil", "a/../b", "."])
    async def test_a_listing_that_leads_out(self, case: Case, tmp_path: Path, path: str) -> None:
        case.git.commit({"sql/a.sql": "a"})
        tree = {"tree": [{"path": path, "mode": "100644", "type": "blob", "sha": "0" * 40, "size": 1}]}
        case.stand_in.fail(server.Answer(200, tree), lambda asked: "recursive" in asked.target)
        with pytest.raises(BackendError, match="which is not in it; that server cannot be trusted"):
            await case.fetch(case.storage(files=["sql/"]), tmp_path / "source")
        assert not (tmp_path / "evil").exists()

    @pytest.mark.parametrize("path", ["x" * 300, "\ud800x", "d/\ud800/x", "d/" * 1500 + "x"])
    async def test_a_listing_of_what_no_file_can_be(self, case: Case, tmp_path: Path, path: str) -> None:
        case.git.commit({"sql/a.sql": "a"})
        for mode in ("100644", "120000"):
            entry = {"path": path, "mode": mode, "type": "blob", "sha": "0" * 40, "size": 1}
            case.stand_in.fail(
                server.Answer(200, {"tree": [entry]}), lambda asked: "recursive" in asked.target
            )
            with pytest.raises(BackendError, match=r"no name that a file|is a symbolic link") as failed:
                await case.backend.upload(case.storage(files=["sql/"]), Artifact("etl", "script"))
            one_line(case, failed.value)

    @pytest.mark.parametrize(
        "odd", [{"path": ["x"]}, {"sha": 7}, {"sha": "x"}, {"size": "1"}, {"size": 10**400}, {"size": -1}]
    )
    async def test_a_listing_of_another_form(
        self, case: Case, tmp_path: Path, odd: dict[str, object]
    ) -> None:
        case.git.commit({"sql/a.sql": "a"})
        entry = {"path": "a", "mode": "100644", "type": "blob", "sha": "0" * 40, "size": 1, **odd}
        case.stand_in.fail(server.Answer(200, {"tree": [entry]}), lambda asked: "recursive" in asked.target)
        with pytest.raises(BackendError) as failed:
            await case.backend.upload(case.storage(files=["sql/"]), Artifact("etl", "script"))
        one_line(case, failed.value)

    async def test_a_listing_that_is_not_whole(self, case: Case, tmp_path: Path) -> None:
        case.git.commit({"sql/a.sql": "a"})
        case.stand_in.fail(
            server.Answer(200, {"tree": [], "truncated": True}), lambda asked: "recursive" in asked.target
        )
        with pytest.raises(BackendError, match=r"more files than GitHub lists; use Git"):
            await case.fetch(case.storage(files=["sql/"]), tmp_path / "source")

    async def test_a_token_goes_to_no_other_host(self, case: Case, tmp_path: Path) -> None:
        case.give_token("read")
        other = github.GitHub(case.stand_in._description)  # type: ignore[attr-defined]
        with server.serving(other) as elsewhere:
            other.fail(server.Answer(200, SCRIPT.encode()), times=9)
            case.stand_in.fail(
                server.Answer(302, b"", {"Location": f"{elsewhere}/raw"}),
                lambda asked: "contents" in asked.path,
            )
            _, files = await case.fetch(case.storage(), tmp_path / "source")
            assert files == {"flows/etl.py": SCRIPT}
            assert "authorization" not in other.log[0].headers


def test_the_api_is_that_of_the_default_host(tmp_path: Path) -> None:
    backend = GitHubBackend(BackendContext(tmp_path, "host1", environ={}))
    assert backend.repository(GitHub("a/b", "c.py").to_json()).key[0] == "https://api.github.com"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo": "flows"}, "repo takes 'owner/name'"),
        ({"repo": "acme/.."}, "repo takes 'owner/name'"),
        ({"repo": "acme/flows/x"}, "repo takes 'owner/name'"),
        ({"repo": "https://github.com/acme/flows"}, "repo takes 'owner/name'"),
        ({"repo": "acme/fl\r\nows"}, "repo takes 'owner/name'"),
        ({"path": ""}, "path takes a non-empty string"),
        ({"path": "/etc/passwd"}, "path takes a path within the repository"),
        ({"path": "a/../../b.py"}, "path takes a path within the repository"),
        ({"path": "flows/"}, "path names the flow's file"),
        ({"path": "a\nb.py"}, "path takes a path within the repository"),
        ({"files": "person.txt"}, "files takes a list of paths"),
        ({"files": ["../x"]}, "files takes a path within the repository"),
        ({"files": ["./"]}, r"a whole repository is what Git\(\.\.\.\) is for"),
        ({"ref": "a b"}, "ref takes a branch, a tag or a commit"),
        ({"ref": "-x"}, "ref takes a branch"),
        ({"ref": "a/../b"}, "ref takes a branch"),
        ({"ref": "a\r\nX: y"}, "ref takes a branch"),
        ({"ref": "0" * 40, "upload": True}, "commits to a branch"),
        ({"ref": "refs/tags/v1", "upload": True}, "commits to a branch"),
        ({"stored_as_script": False}, "repositories hold scripts"),
        ({"access_token_secret": "a b"}, "the name of a secret"),
        ({"base_url": "ftp://x"}, "base_url takes an address"),
        ({"base_url": "https://user:pw@github.example/api/v3"}, "got one with more than that"),
        ({"base_url": "https://github.example/api/v3?x=y"}, "got one with more than that"),
        ({"base_url": "https://github.example/../x"}, "base_url takes an address"),
        ({"base_url": "https://github.example\r\nX: y"}, "base_url takes an address"),
        ({"base_url": "https://evil.example\\@github.com"}, "base_url takes an address"),
        ({"base_url": "https://"}, "base_url takes an address"),
        ({"base_url": "https://x:99999"}, "base_url takes an address"),
        ({"token": "x"}, "no argument 'token'"),
    ],
)
def test_what_cannot_be(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FlowError, match=message) as refused:
        GitHub(**{"repo": "acme/flows", "path": "flows/etl.py", **arguments})  # type: ignore[arg-type]
    assert "pw" not in str(refused.value)


def test_the_declaration() -> None:
    declared = GitHub(
        "acme/flows",
        "./flows//etl.py",
        ref="HEAD",
        base_url="GitHub.example/api/v3/",
        files=["sql/.", "a", "a"],
    )
    assert (declared.path, declared.files, declared.ref) == ("flows/etl.py", ("sql/", "a"), None)  # type: ignore[attr-defined]
    assert declared.base_url == "https://github.example/api/v3"
    assert declared.stored_as_script
    assert GitHub.from_json(declared.to_json()) == declared

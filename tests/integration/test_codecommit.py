from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from forge_cases import SCRIPT, Case, RepositoryCases, at_work, one_line, soon
from tests.forges import codecommit, server
from tests.forges.repository import BareRepository, Link

from flowagent import FlowError
from flowagent.backend import Artifact
from flowagent.errors import BackendError, StorageNotFoundError, StorageTransientError
from flowagent.secrets import SecretProvider
from flowagent.storage import CodeCommit
from flowagent_backends import aws
from flowagent_backends import codecommit as driver
from flowagent_backends.codecommit import CodeCommitBackend

__all__ = ["soon"]
KEY, PASSWORD = "AKIDEXAMPLE", "s3cr3t-of-the-tests"


@pytest.fixture
async def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Case]:
    (tmp_path / "home").mkdir()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": PASSWORD,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }.items():
        monkeypatch.setenv(name, value)
    backoff = "botocore.retries.standard.ExponentialBackoff.delay_amount"
    monkeypatch.setattr(backoff, lambda self, context: 0.01)
    stand_in = codecommit.CodeCommit()
    stand_in.tokens[KEY] = {"read"}
    git = BareRepository(tmp_path / "git", default="trunk")
    stand_in.repositories["flows"] = server.Kept(git)
    with server.serving(stand_in) as url:
        options = {"endpoint_url": url, "region_name": "eu-central-1"}
        declare = partial(CodeCommit, "org/flows", client_options=options)
        made = Case(
            stand_in,
            git,
            "flows",
            declare,
            CodeCommitBackend,
            tmp_path / "home",
            "AWS_SECRET",
            refers="commit",
        )
        made.give_token = lambda *rights, secret=None: stand_in.tokens[KEY].update(  # type: ignore[method-assign]
            {"PutFile"} if "write" in rights else ()
        )
        async with at_work(made) as case:
            yield case


class TestCodeCommit(RepositoryCases):
    attempts = aws.ATTEMPTS

    async def test_a_commits_abbreviation_is_not_known_to_it(self, case: Case) -> None:
        with pytest.raises(StorageNotFoundError, match="no branch, tag or commit"):
            await case.backend.resolve(case.storage(ref=case.first[:10]))

    @pytest.mark.parametrize(
        "name", ["dev", "feature/new-things", "refs/heads/dev", "v1.0", "refs/tags/v1.0", "annotated"]
    )
    async def test_references(self, case: Case, tmp_path: Path, name: str) -> None:
        await super().test_references(case, tmp_path, name)

    async def test_what_is_asked(self, case: Case, tmp_path: Path) -> None:
        await case.fetch(case.storage(), tmp_path / "source")
        assert [asked.headers["x-amz-target"].partition(".")[2] for asked in case.stand_in.log] == [
            "GetRepository",
            "GetBranch",
            "GetFile",
        ]
        assert json.loads(case.stand_in.log[-1].body) == {
            "repositoryName": "flows",
            "commitSpecifier": case.first,
            "filePath": "flows/etl.py",
        }

    async def test_a_link_is_refused(self, case: Case, tmp_path: Path) -> None:
        case.git.commit({"flows/latest.py": Link("etl.py")})
        with pytest.raises(BackendError, match=r"flows/latest\.py is a symbolic link"):
            await case.fetch(case.storage("flows/latest.py"), tmp_path / "x")

    async def test_a_file_that_is_too_large_for_it(
        self, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(codecommit, "LARGEST", 10)
        with pytest.raises(BackendError, match=r"is larger than this API gives; use Git"):
            await case.fetch(case.storage(), tmp_path / "x")

    async def test_other_content_than_git_has(self, case: Case, tmp_path: Path) -> None:
        revision = await case.backend.resolve(case.storage())
        found = {"commitId": revision.id, "blobId": "0" * 40, "fileMode": "NORMAL", "fileContent": "eA=="}
        case.stand_in.fail(server.Answer(200, found))
        (tmp_path / "source").mkdir()
        with pytest.raises(StorageTransientError, match="came with other content than git has"):
            await case.backend.materialise(case.storage(), revision, tmp_path / "source")
        assert not list((tmp_path / "source").rglob("*.py"))

    async def test_a_listing_that_leads_out(self, case: Case, tmp_path: Path) -> None:
        await case.backend.resolve(case.storage())
        found = {
            "commitId": case.first,
            "folderPath": "sql",
            "files": [{"absolutePath": "../../evil", "blobId": "0" * 40, "fileMode": "NORMAL"}],
        }
        case.stand_in.fail(
            server.Answer(200, found), lambda asked: asked.headers["x-amz-target"].endswith("GetFolder")
        )
        with pytest.raises(BackendError, match="which is not in it; that server cannot be trusted"):
            await case.fetch(case.storage(files=["sql/"]), tmp_path / "source")

    # -- credentials -----------------------------------------------------------------------------------

    async def test_no_credentials(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        with pytest.raises(BackendError, match="no AWS credentials are found here") as refused:
            await case.backend.resolve(case.storage())
        one_line(case, refused.value)

    async def test_no_region(self, case: Case) -> None:
        with pytest.raises(BackendError, match="You must specify a region") as refused:
            await case.backend.resolve({**case.storage(), "client_options": {}})
        one_line(case, refused.value)

    async def test_those_of_the_secret_go_first(self, case: Case) -> None:
        case.stand_in.tokens["AKIDSECRET"] = {"read"}
        del case.stand_in.tokens[KEY]
        SecretProvider(case.home, {}).set("AWS_CREDENTIALS", "nonsense")
        with pytest.raises(BackendError, match="the secret AWS_CREDENTIALS is not like"):
            await case.backend.resolve(case.storage())
        values = {"ACCESS_KEY": "AKIDSECRET", "SECRET_ACCESS_KEY": PASSWORD}
        SecretProvider(case.home, {}).set("AWS_CREDENTIALS", json.dumps(values))
        assert (await case.backend.resolve(case.storage())).id == case.first

    async def test_a_profile(self, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        case.stand_in.tokens["AKIDPROFILE"] = {"read"}
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        (tmp_path / "credentials").write_text(
            f"[etl]\naws_access_key_id = AKIDPROFILE\naws_secret_access_key = {PASSWORD}\n"
        )
        options = case.storage()["client_options"]
        storage = {**case.storage(), "client_options": {**options, "profile_name": "etl"}}
        assert (await case.backend.resolve(storage)).id == case.first
        storage["client_options"]["profile_name"] = "gone"
        with pytest.raises(BackendError, match=r"profile \(gone\) could not be found"):
            await case.backend.resolve(storage)

    async def test_those_that_expired_are_looked_for_anew(self, case: Case) -> None:
        case.stand_in.fail(codecommit.error("ExpiredTokenException", "The security token is expired"))
        assert (await case.backend.resolve(case.storage())).id == case.first
        case.stand_in.fail(
            codecommit.error("ExpiredTokenException", "The security token is expired"), times=9
        )
        with pytest.raises(
            BackendError, match=r"credentials were refused \(ExpiredTokenException\)"
        ) as refused:
            await case.backend.resolve(case.storage())
        one_line(case, refused.value)

    async def test_others_are_not_disturbed_by_it(self, case: Case) -> None:
        """The client that is given up is still in use."""
        slow = {"branch": {"branchName": "slow", "commitId": case.first}}
        case.stand_in.fail(server.Answer(200, slow, wait=1), lambda asked: b'"slow"' in asked.body)
        expired = codecommit.error("ExpiredTokenException", "The security token is expired")
        found = []

        async def ask() -> None:
            found.append((await case.backend.resolve(case.storage(ref="slow"))).id)

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            with anyio.fail_after(20):
                while not case.stand_in.log:
                    await anyio.sleep(0.01)
            case.stand_in.fail(expired)
            assert (await case.backend.resolve(case.storage())).id == case.first
            assert not found
        assert found == [case.first]

    async def test_a_right_that_is_missing(self, case: Case, tmp_path: Path) -> None:
        script = tmp_path / "etl.py"
        script.write_text("x = 1\n")
        with pytest.raises(BackendError, match=r"allow the identity of this machine codecommit:PutFile$"):
            await case.backend.upload(case.storage(upload=True), Artifact("etl", "script", path=script))
        case.stand_in.tokens[KEY] = set()
        with pytest.raises(BackendError, match=r"access was denied \(AccessDeniedException\)") as refused:
            await case.backend.resolve(case.storage())
        one_line(case, refused.value)

    async def test_throttling(self, case: Case) -> None:
        throttled = codecommit.error("ThrottlingException", "Rate exceeded")
        case.stand_in.fail(throttled, times=2)
        assert (await case.backend.resolve(case.storage())).id == case.first
        case.stand_in.fail(throttled, times=99)
        with pytest.raises(StorageTransientError, match="ThrottlingException"):
            await case.backend.resolve(case.storage())

    # -- what speaks another way than over HTTP ------------------------------------------------------

    async def test_a_body_that_is_cut_off(self, case: Case, tmp_path: Path) -> None:
        case.stand_in.fail(server.Answer(200, {"repositoryMetadata": {"x": "y" * 100}}, cut=10), times=99)
        with pytest.raises(StorageTransientError, match="cannot be reached") as failed:
            await case.fetch(case.storage(), tmp_path / "x")
        one_line(case, failed.value)

    async def test_a_server_that_does_not_answer(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(driver, "PATIENCE", 0.3)
        case.stand_in.fail(server.Answer(200, wait=1.0))
        with pytest.raises(StorageTransientError, match="did not answer in time"):
            await case.backend.resolve(case.storage())

    async def test_a_server_that_is_not_there(self, case: Case) -> None:
        options = {"endpoint_url": "http://127.0.0.1:9", "region_name": "eu-central-1"}
        with pytest.raises(StorageTransientError, match="cannot be reached: Could not connect"):
            await case.backend.resolve({**case.storage(), "client_options": options})


async def test_scripts_of_it_are_as_elsewhere(case: Case, tmp_path: Path) -> None:
    assert (await case.fetch(case.storage(), tmp_path / "source"))[1] == {"flows/etl.py": SCRIPT}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo": "a b"}, "repo takes the repository's name"),
        ({"repo": 5}, "repo takes the repository's name"),
        ({"commit": "a b"}, "commit takes a branch, a tag or a commit"),
        ({"client_options": "x"}, "client_options takes a dict"),
        ({"client_options": {"aws_secret_access_key": PASSWORD}}, "would be stored with the flow"),
        ({"client_options": {"verify": object()}}, "takes JSON data only"),
    ],
)
def test_what_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FlowError, match=message) as refused:
        CodeCommit(**{"repo": "flows", "path": "flows/etl.py", **arguments})
    assert PASSWORD not in str(refused.value)

"""AWS CodeCommit, by Amazon's own client made async: https://docs.aws.amazon.com/codecommit/latest/APIReference/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import anyio
from anyio import to_thread

from flowagent import files
from flowagent.backend import BackendContext, Features
from flowagent.errors import BackendError, StorageNotFoundError, StorageTransientError
from flowagent.http import PATIENCE, TooLargeError
from flowagent.models import Json
from flowagent_backends import aws, forges
from flowagent_backends.forges import File, Repository, RepositoryBackend, blob_id, is_sha, no_file, special

_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "NotAuthorized", "OptInRequired"})
_BUSY = frozenset({"RequestExpired", "ServiceUnavailable", "Throttling", "ThrottlingException"})
"""https://docs.aws.amazon.com/codecommit/latest/APIReference/CommonErrors.html"""


class CodeCommitBackend(RepositoryBackend):
    """Scripts in CodeCommit repositories; one client for each set of options."""

    type = "CodeCommit"
    features = Features(kinds=("script",), revision="the commit", credentials="those of AWS' tools")
    refers = "commit"

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        self.clients = aws.Clients("codecommit", context)

    def repository(self, storage: Mapping[str, Json]) -> Repository:
        """The repository, as the credentials that are found here see it."""
        return CodeCommitRepository(self, storage["repo"], storage.get("client_options") or {})

    async def close(self) -> None:
        """Close the clients."""
        await self.clients.close()


class CodeCommitRepository:
    """Branches, folders and files of one repository."""

    def __init__(self, backend: CodeCommitBackend, name: str, options: Mapping[str, Json]) -> None:
        self.what = f"CodeCommit: {name}"
        self.key: tuple[str | None, ...] = (name, json.dumps(options, sort_keys=True))
        self._backend = backend
        self._name = name
        self._options = options

    async def commit_of(self, ref: str | None, path: str) -> str:
        from botocore.exceptions import ClientError

        name = ref or await self._default_branch()
        short = name.removeprefix("refs/heads/")
        if not name.startswith("refs/tags/"):
            try:
                found = await self._call("get_branch", {"BranchDoesNotExistException"}, branchName=short)
                return self._sha(found["branch"]["commitId"])
            except ClientError:
                if ref is None or short != name:
                    raise self._no_ref(ref) from None
        try:
            missing = {"CommitDoesNotExistException", "InvalidCommitException", "FolderDoesNotExistException"}
            found = await self._call("get_folder", missing, commitSpecifier=name, folderPath="")
            return self._sha(found["commitId"])
        except ClientError:
            raise self._no_ref(ref) from None

    async def fetch(self, commit: str, file: File, target: Path, limit: int) -> int:
        from botocore.exceptions import ClientError

        missing = {"FileDoesNotExistException", "CommitDoesNotExistException", "FileTooLargeException"}
        try:
            found = await self._call("get_file", missing, commitSpecifier=commit, filePath=file.path)
        except ClientError as error:
            if aws.code_of(error) == "CommitDoesNotExistException":
                raise self._no_ref(commit) from None
            if aws.code_of(error) == "FileTooLargeException":
                raise BackendError(
                    f"{self.what}: {file.path} is larger than this API gives; use Git(...) for this flow"
                ) from None
            raise no_file(self, file.path, commit) from None
        content: bytes = found["fileContent"]
        if found["fileMode"] == "SYMLINK":
            raise special(self, file.path, "symbolic link")
        if len(content) > limit:
            raise TooLargeError
        if found["commitId"] != commit or blob_id(content) != found["blobId"]:
            raise StorageTransientError(
                f"{self.what}: {file.path} came with other content than git has for it; try again"
            )
        await to_thread.run_sync(files.write, target, [content])
        return len(content)

    async def listing(self, commit: str, directory: str) -> list[File]:
        from botocore.exceptions import ClientError

        found: list[File] = []
        waiting = [directory]
        pages = forges.Pages(self.what, directory)
        while waiting and len(found) <= forges.MOST_FILES:
            folder = waiting.pop()
            pages.ask(folder)
            try:
                page = await self._call(
                    "get_folder", {"FolderDoesNotExistException"}, commitSpecifier=commit, folderPath=folder
                )
            except ClientError:
                raise no_file(self, f"{directory}/", commit) from None
            for kind, word in (("symbolicLinks", "symbolic link"), ("subModules", "submodule")):
                for entry in page.get(kind, ()):
                    raise special(self, entry["absolutePath"].lstrip("/"), word)
            waiting += [entry["absolutePath"].lstrip("/") for entry in page.get("subFolders", ())]
            found += [
                File(entry["absolutePath"].lstrip("/"), entry["blobId"]) for entry in page.get("files", ())
            ]
        return found

    async def save(self, branch: str | None, path: str, content: bytes, message: str) -> None:
        from botocore.exceptions import ClientError

        branch = branch or await self._default_branch()
        outdated = {"ParentCommitIdOutdatedException", "ParentCommitDoesNotExistException"}
        for attempt in (1, 2):
            tip = await self.commit_of(f"refs/heads/{branch}", path)
            try:
                await self._call(
                    "put_file",
                    {"SameFileContentException", *(outdated if attempt == 1 else ())},
                    branchName=branch,
                    filePath=path,
                    fileContent=content,
                    parentCommitId=tip,
                    commitMessage=message,
                )
                return
            except ClientError as error:
                if aws.code_of(error) == "SameFileContentException":
                    return

    async def _default_branch(self) -> str:
        metadata = (await self._call("get_repository", set()))["repositoryMetadata"]
        if not metadata.get("defaultBranch"):
            raise StorageNotFoundError(f"{self.what}: the repository is empty; push the flow to it")
        return str(metadata["defaultBranch"])

    async def _call(self, operation: str, expected: set[str], **arguments: Any) -> dict[str, Any]:
        """What an operation returns. :raises BackendError: in words, but for the codes that are expected."""
        from botocore.exceptions import ClientError

        with anyio.move_on_after(PATIENCE):
            for attempt in (1, 2):
                async with self._backend.clients.use(self.what, self._options) as client:
                    try:
                        found: dict[str, Any] = await getattr(client.client, operation)(
                            repositoryName=self._name, **arguments
                        )
                        return found
                    except ClientError as error:
                        if aws.code_of(error) in expected:
                            raise
                        if aws.code_of(error) not in aws.REFUSED or attempt == 2:
                            self._refuse(operation, error)
                        self._backend.clients.retire(client)  # they may have been renewed
                    except Exception as error:
                        aws.explain(self.what, error)
        raise StorageTransientError(f"{self.what}: CodeCommit did not answer in time; try again later")

    def _refuse(self, operation: str, error: Any) -> NoReturn:
        code, status = aws.code_of(error), aws.status_of(error)
        if code == "RepositoryDoesNotExistException":
            raise StorageNotFoundError(
                f"{self.what}: there is no such repository in that region and account; check name and region"
            ) from None
        if code in aws.REFUSED:
            raise aws.refused(self.what, code) from None
        if code in _DENIED or status == 403:
            action = "".join(part.capitalize() for part in operation.split("_"))
            raise BackendError(
                f"{self.what}: access was denied ({code}); "
                f"allow the identity of this machine codecommit:{action}"
            ) from None
        if code in _BUSY or status >= 500 or status == 429:
            raise StorageTransientError(
                f"{self.what}: CodeCommit answers {status} ({code}); try again later"
            ) from None
        raise BackendError(
            f"{self.what}: {operation} failed ({code}: {aws.said(error)}); correct that"
        ) from None

    def _sha(self, value: Any) -> str:
        if not is_sha(value):
            raise BackendError(f"{self.what}: CodeCommit answers with what is no commit; check the endpoint")
        return str(value)

    def _no_ref(self, ref: str | None) -> StorageNotFoundError:
        return StorageNotFoundError(
            f"{self.what}: no branch, tag or commit {ref}; push it, or correct the reference"
        )

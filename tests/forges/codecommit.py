"""A stand-in for AWS CodeCommit's API, version 2015-04-13, after its reference: one address, operations by
X-Amz-Target, JSON 1.1, errors by __type."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from tests.forges.server import Answer, Asked, Kept, StandIn

MODES = {"100644": "NORMAL", "100755": "EXECUTABLE", "120000": "SYMLINK"}
LARGEST = 6 << 20


class CodeCommit(StandIn):
    """Repositories by name; a token is an access key, with the operations that it may call, or ``read``."""

    def answer(self, asked: Asked) -> Answer:
        assert asked.path == "/" and asked.method == "POST", asked.target
        assert asked.headers["content-type"] == "application/x-amz-json-1.1"
        signed = re.match(
            r"AWS4-HMAC-SHA256 Credential=([^/]+)/\d{8}/([^/]+)/codecommit/aws4_request, SignedHeaders=",
            asked.headers.get("authorization", ""),
        )
        if signed is None:
            return error("MissingAuthenticationToken", "Missing Authentication Token", 403)
        if signed[1] not in self.tokens:
            return error(
                "UnrecognizedClientException", "The security token included in the request is invalid."
            )
        operation = asked.headers["x-amz-target"].removeprefix("CodeCommit_20150413.")
        rights = self.tokens[signed[1]]
        if operation not in rights and not ("read" in rights and operation.startswith("Get")):
            said = (
                f"User: arn:aws:iam::123456789012:user/x is not authorized to perform: codecommit:{operation}"
            )
            return error("AccessDeniedException", said)
        body = json.loads(asked.body)
        kept = self.repositories.get(body["repositoryName"])
        if kept is None:
            return error("RepositoryDoesNotExistException", f"{body['repositoryName']} does not exist")
        answer = getattr(self, f"_{operation}")(kept, body)
        answer.headers["Content-Type"] = "application/x-amz-json-1.1"
        assert isinstance(answer, Answer)
        return answer

    def _GetRepository(self, kept: Kept, body: dict[str, Any]) -> Answer:
        branch = {"defaultBranch": kept.git.default} if kept.git.refs("heads") else {}
        return Answer(200, {"repositoryMetadata": {"repositoryName": body["repositoryName"], **branch}})

    def _GetBranch(self, kept: Kept, body: dict[str, Any]) -> Answer:
        sha = kept.git.refs("heads").get(body["branchName"])
        if sha is None:
            return error("BranchDoesNotExistException", f"{body['branchName']} does not exist")
        return Answer(200, {"branch": {"branchName": body["branchName"], "commitId": sha}})

    def _commit(self, kept: Kept, body: dict[str, Any]) -> str | None:
        """A full id, a tag, a branch or a whole reference: no shortened id."""
        name = body.get("commitSpecifier", kept.git.default)
        if set(name) <= set("0123456789abcdef") and len(name) < 40:
            return None
        return kept.git.by_name(name)

    def _GetFolder(self, kept: Kept, body: dict[str, Any]) -> Answer:
        sha = self._commit(kept, body)
        if sha is None:
            return error("CommitDoesNotExistException", "Could not find the commit")
        path = body["folderPath"].strip("/")
        entries = kept.git.tree(sha, path)
        if not entries:
            return error("FolderDoesNotExistException", f"Could not find path {path}")
        found: dict[str, Any] = {"commitId": sha, "folderPath": path, "treeId": "0" * 40}
        for name in ("files", "subFolders", "symbolicLinks", "subModules"):
            found[name] = []
        for entry in entries:
            where = {"absolutePath": entry.path, "relativePath": entry.path.removeprefix(f"{path}/")}
            if entry.kind == "tree":
                found["subFolders"].append({**where, "treeId": entry.sha})
            elif entry.kind == "commit":
                found["subModules"].append({**where, "commitId": entry.sha})
            else:
                kind = "symbolicLinks" if entry.mode == "120000" else "files"
                found[kind].append({**where, "blobId": entry.sha, "fileMode": MODES[entry.mode]})
        return Answer(200, found)

    def _GetFile(self, kept: Kept, body: dict[str, Any]) -> Answer:
        sha = self._commit(kept, body)
        if sha is None:
            return error("CommitDoesNotExistException", "Could not find the commit")
        entry = kept.git.entry(sha, body["filePath"])
        if entry is None or entry.kind != "blob":
            return error("FileDoesNotExistException", f"Could not find path {body['filePath']}")
        if entry.size > LARGEST:
            return error("FileTooLargeException", "The file is too large")
        return Answer(
            200,
            {
                "commitId": sha,
                "blobId": entry.sha,
                "filePath": entry.path,
                "fileMode": MODES[entry.mode],
                "fileSize": entry.size,
                "fileContent": base64.b64encode(kept.git.blob(entry.sha)).decode(),
            },
        )

    def _PutFile(self, kept: Kept, body: dict[str, Any]) -> Answer:
        branch = body["branchName"]
        tip = kept.git.refs("heads").get(branch)
        if tip is None:
            return error("BranchDoesNotExistException", f"{branch} does not exist")
        if body.get("parentCommitId") != tip:
            return error("ParentCommitIdOutdatedException", "The parent commit ID is not the tip")
        content = base64.b64decode(body["fileContent"])
        entry = kept.git.entry(tip, body["filePath"])
        if entry is not None and kept.git.blob(entry.sha) == content:
            return error("SameFileContentException", "The content is the same")
        sha = kept.git.commit({body["filePath"]: content}, branch=branch, message=body["commitMessage"])
        now = kept.git.entry(sha, body["filePath"])
        assert now is not None
        return Answer(200, {"commitId": sha, "blobId": now.sha, "treeId": "0" * 40})


def error(kind: str, message: str, status: int = 400) -> Answer:
    return Answer(
        status, {"__type": kind, "message": message}, {"Content-Type": "application/x-amz-json-1.1"}
    )

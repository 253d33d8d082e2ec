"""A stand-in for GitHub's REST API, version 2022-11-28, after https://docs.github.com/rest and its OpenAPI
description, which every exchange is held against."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from tests.forges.openapi import Description
from tests.forges.repository import Entry
from tests.forges.server import Answer, Asked, Kept, StandIn

DOCS = "https://docs.github.com/rest"
RAW = ("application/vnd.github.raw+json", "application/vnd.github.raw")
OBJECT = ("application/vnd.github.object+json", "application/vnd.github.object")


class GitHub(StandIn):
    """Repositories by ``owner/name``; a token has ``read`` or ``write``, or both, or none."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self._description = description

    def answer(self, asked: Asked) -> Answer:
        answer = self._limited() or self._authenticated(asked)
        limit = 5000 if asked.token in self.tokens else 60
        left = limit if self.left is None else max(self.left, 0)
        answer.headers |= {
            "X-RateLimit-Limit": str(limit),
            "X-RateLimit-Remaining": str(left),
            "X-RateLimit-Reset": str(self.reset),
            "X-RateLimit-Used": str(limit - left),
            "X-RateLimit-Resource": "core",
            "X-GitHub-Media-Type": "github.v3; format=json",
            "Vary": "Accept, Authorization, Cookie, X-GitHub-OTP",
        }
        self._check(asked, answer)
        return answer

    def _limited(self) -> Answer | None:
        if self.left is None:
            return None
        self.left -= 1
        if self.left >= 0:
            return None
        return _error(
            403, "API rate limit exceeded for 203.0.113.7.", "/overview/rate-limits-for-the-rest-api"
        )

    def _authenticated(self, asked: Asked) -> Answer:
        if not asked.headers.get("user-agent"):
            return _error(403, "Request forbidden by administrative rules.")
        if asked.headers.get("x-github-api-version") != "2022-11-28":
            return _error(400, "The API version is not supported")
        if asked.token is not None and asked.token not in self.tokens:
            return _error(401, "Bad credentials")
        rights = self.tokens.get(asked.token or "")
        if len(asked.parts) < 3 or asked.parts[0] != "repos":
            return _error(404, "Not Found")
        kept = self.visible("/".join(asked.parts[1:3]), rights)
        if kept is None:
            return _error(404, "Not Found", "/repos/repos#get-a-repository")
        match (asked.method, *asked.parts[3:]):
            case ("GET",):
                return self._repository(kept, "/".join(asked.parts[1:3]))
            case ("GET", "commits", ref):
                return self._commit(kept, ref, asked)
            case ("GET", "git", "trees", sha):
                return self._tree(kept, sha, "recursive" in asked.query)
            case ("GET", "contents", *path):
                return self._contents(kept, "/".join(path), asked)
            case ("PUT", "contents", *path):
                return self._put(kept, "/".join(path), json.loads(asked.body), rights or set())
        return _error(404, "Not Found")

    def _repository(self, kept: Kept, name: str) -> Answer:
        example = self._description.example("/repos/{owner}/{repo}", "get", "200")
        own = {
            "id": kept.number,
            "name": name.partition("/")[2],
            "full_name": name,
            "private": kept.private,
            "default_branch": kept.git.default,
        }
        for name in ("source", "parent", "template_repository"):  # which departs from the description itself
            example.pop(name, None)
        example.setdefault("language", None)
        return Answer(200, {**example, **own}, {"ETag": f'W/"{kept.number}-{kept.git.default}"'})

    def _commit(self, kept: Kept, ref: str, asked: Asked) -> Answer:
        if not kept.git.refs("heads"):
            return _error(409, "Git Repository is empty.", "/commits/commits#get-a-commit")
        sha = kept.git.by_name(ref)
        if sha is None:
            return _error(422, f"No commit found for SHA: {ref}", "/commits/commits#get-a-commit")
        assert asked.headers["accept"] == "application/vnd.github.sha"
        media = "application/vnd.github.sha; charset=utf-8"
        return Answer(200, sha.encode(), {"ETag": f'"{sha}"', "Content-Type": media})

    def _tree(self, kept: Kept, sha: str, recursive: bool) -> Answer:
        if kept.git.kind(sha) not in ("commit", "tree"):
            return _error(404, "Not Found", "/git/trees#get-a-tree")
        entries = [
            {
                "path": entry.path,
                "mode": entry.mode,
                "type": entry.kind,
                "sha": entry.sha,
                **({"size": entry.size} if entry.kind == "blob" else {}),
                "url": f"{self.url}/git/{entry.kind}s/{entry.sha}",
            }
            for entry in kept.git.tree(sha, recursive=recursive)
        ]
        return Answer(
            200, {"sha": sha, "url": f"{self.url}/git/trees/{sha}", "tree": entries, "truncated": False}
        )

    def _contents(self, kept: Kept, path: str, asked: Asked) -> Answer:
        ref = asked.query.get("ref", kept.git.default)
        commit = kept.git.by_name(ref)
        if commit is None:
            return _error(404, f"No commit found for the ref {ref}", "/v3/repos/contents/")
        entry = kept.git.entry(commit, path)
        if entry is None:
            return _error(404, "Not Found", "/repos/contents#get-repository-content")
        accept = asked.headers.get("accept", "")
        if entry.kind == "tree":
            found = [self._content(each, path) for each in kept.git.tree(commit, path)]
            if accept in OBJECT:
                whole = self._content(entry, path) | {"entries": found}
                return Answer(
                    200, whole, {"Content-Type": "application/vnd.github.object+json; charset=utf-8"}
                )
            return Answer(200, found)
        data = kept.git.blob(entry.sha)
        if entry.mode == "120000":  # a link to a file within the repository is read as that file
            target = kept.git.entry(commit, "/".join([*path.split("/")[:-1], data.decode()]))
            data = kept.git.blob(target.sha) if target is not None and target.kind == "blob" else data
        if len(data) > 100 << 20:
            return _error(403, "This API returns blobs up to 100 MB in size.")
        if accept in RAW:
            return Answer(200, data, {"Content-Type": "application/vnd.github.raw+json; charset=utf-8"})
        content = self._content(entry, path)
        if len(data) <= 1 << 20:
            content |= {"encoding": "base64", "content": base64.encodebytes(data).decode()}
        else:
            content |= {"encoding": "none", "content": ""}
        media = "application/vnd.github.object+json" if accept in OBJECT else "application/json"
        return Answer(200, content, {"Content-Type": f"{media}; charset=utf-8"})

    def _content(self, entry: Entry, path: str) -> dict[str, Any]:
        url = f"{self.url}/contents/{entry.path}"
        return {
            "type": {"tree": "dir", "commit": "submodule"}.get(entry.kind, "file"),
            "size": entry.size,
            "name": entry.path.rpartition("/")[2],
            "path": entry.path,
            "sha": entry.sha,
            "url": url,
            "git_url": url,
            "html_url": url,
            "download_url": url,
            "_links": {"self": url, "git": url, "html": url},
        }

    def _put(self, kept: Kept, path: str, body: dict[str, Any], rights: set[str]) -> Answer:
        docs = "/repos/contents#create-or-update-file-contents"
        if "write" not in rights:
            if kept.private or not rights:
                return _error(404, "Not Found", docs)
            return _error(403, "Resource not accessible by personal access token", docs)
        branch = body.get("branch", kept.git.default)
        before = kept.git.find(f"refs/heads/{branch}")
        if before is None and kept.git.refs("heads"):
            return _error(404, f"Branch {branch} not found", docs)
        entry = kept.git.entry(before, path) if before else None
        if entry is not None and "sha" not in body:
            return _error(422, 'Invalid request.\n\n"sha" wasn\'t supplied.', docs)
        if entry is not None and body["sha"] != entry.sha:
            return _error(409, f"{path} does not match {body['sha']}", docs)
        content = base64.b64decode(body["content"], validate=True)
        sha = kept.git.commit({path: content}, branch=branch, message=body["message"])
        put = "/repos/{owner}/{repo}/contents/{path}"
        status = "200" if entry else "201"
        example = self._description.example(put, "put", status)
        now = kept.git.entry(sha, path)
        assert now is not None
        return Answer(
            int(status),
            {"content": self._content(now, path), "commit": {**example["commit"], "sha": sha}},
        )

    def _check(self, asked: Asked, answer: Answer) -> None:
        media = answer.headers.get("Content-Type", "application/json").partition(";")[0]
        media = media.replace("object+json", "object")
        self.problems += self._description.problems(
            asked.method,
            asked.path,
            asked.query,
            json.loads(asked.body) if asked.body else None,
            answer.status,
            media,
            answer.body.decode() if media.endswith(".sha") else answer.body,
        )


def _error(status: int, message: str, docs: str = "") -> Answer:
    return Answer(status, {"message": message, "documentation_url": f"{DOCS}{docs}", "status": str(status)})


def secondary_limit(seconds: int) -> Answer:
    """What GitHub answers to whoever asks too much at once."""
    answer = _error(
        403, "You have exceeded a secondary rate limit. Please wait a few minutes before you try again."
    )
    answer.headers["Retry-After"] = str(seconds)
    return answer


def primary_limit(seconds: int, status: int = 403) -> Answer:
    """What GitHub answers to whoever has used up an hour's requests."""
    answer = _error(status, "API rate limit exceeded for user ID 1.")
    answer.headers |= {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(time.time()) + seconds)}
    return answer

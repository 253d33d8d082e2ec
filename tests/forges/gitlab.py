"""A stand-in for GitLab's REST API, version 4, after doc/api/repository_files.md, repositories.md, commits.md
and projects.md of GitLab."""

from __future__ import annotations

import base64
import hashlib
import json
from urllib.parse import quote

from tests.forges.server import Answer, Asked, Kept, StandIn

LIMITED = Answer(429, b"Retry later\n", {"Retry-After": "60", "RateLimit-Remaining": "0"})


class GitLab(StandIn):
    """Projects by path; a token has scopes: ``read_repository``, ``read`` (read_api) or ``write`` (api)."""

    def answer(self, asked: Asked) -> Answer:
        assert asked.parts[:3] == ("api", "v4", "projects"), asked.target
        token = asked.headers.get("private-token") or asked.token
        if token is not None and token not in self.tokens:
            return Answer(401, {"message": "401 Unauthorized"})
        rights = self.tokens.get(token or "", set())
        name = asked.parts[3]
        for path, kept in self.repositories.items():
            if name == str(kept.number):
                name = path
        seen = {"read"} if "read_repository" in rights else rights
        kept_or_none = self.visible(name, seen)
        if kept_or_none is None:
            return Answer(404, {"message": "404 Project Not Found"})
        kept = kept_or_none
        files = asked.parts[4:6] == ("repository", "files")
        scopes = {"GET": "read", "HEAD": "read"}.get(asked.method, "write")
        if (
            rights
            and scopes not in rights
            and "write" not in rights
            and not (files and scopes == "read" and "read_repository" in rights)
        ):
            said = "The request requires higher privileges than provided by the access token."
            scope = "api read_api" if scopes == "read" else "api"
            refused = {"error": "insufficient_scope", "error_description": said, "scope": scope}
            return Answer(403, refused)
        match (asked.method, *asked.parts[4:]):
            case ("GET",):
                branch = kept.git.default if kept.git.refs("heads") else None
                return Answer(200, {"id": kept.number, "path_with_namespace": name, "default_branch": branch})
            case ("GET", "repository", "commits", ref):
                sha = self._commit(kept, ref)
                return Answer(200, {"id": sha}) if sha else Answer(404, {"message": "404 Commit Not Found"})
            case ("GET", "repository", "tree"):
                return self._tree(kept, asked)
            case ("GET" | "HEAD", "repository", "files", path, *raw) if raw in ([], ["raw"]):
                return self._file(kept, path, asked, raw=bool(raw))
            case ("POST" | "PUT", "repository", "files", path):
                if "write" not in rights:
                    return Answer(401, {"message": "401 Unauthorized"})
                return self._save(kept, path, json.loads(asked.body), new=asked.method == "POST")
        return Answer(404, {"error": "404 Not Found"})

    def _commit(self, kept: Kept, ref: str) -> str | None:
        return kept.git.find(f"refs/heads/{kept.git.default}") if ref == "HEAD" else kept.git.by_name(ref)

    def _file(self, kept: Kept, path: str, asked: Asked, *, raw: bool) -> Answer:
        if "ref" not in asked.query and not raw:
            return Answer(400, {"error": "ref is missing, ref is empty"})
        sha = self._commit(kept, asked.query.get("ref", "HEAD"))
        if sha is None:
            return Answer(404, {"message": "404 Commit Not Found"})
        entry = kept.git.entry(sha, path)
        if entry is None or entry.kind != "blob":
            return Answer(404, {"message": "404 File Not Found"})
        data = kept.git.blob(entry.sha)
        headers = {
            "X-Gitlab-Blob-Id": entry.sha,
            "X-Gitlab-Commit-Id": sha,
            "X-Gitlab-Content-Sha256": hashlib.sha256(data).hexdigest(),
            "X-Gitlab-Encoding": "base64",
            "X-Gitlab-Execute-Filemode": "false",
            "X-Gitlab-Last-Commit-Id": kept.git.last_commit(sha, path),
            "X-Gitlab-Size": str(len(data)),
        }
        if raw:
            return Answer(200, data, {**headers, "Content-Type": "text/plain; charset=utf-8"})
        content = {"content": base64.b64encode(data).decode(), "blob_id": entry.sha, "commit_id": sha}
        return Answer(200, content, headers)

    def _tree(self, kept: Kept, asked: Asked) -> Answer:
        sha = self._commit(kept, asked.query.get("ref", "HEAD"))
        if sha is None:
            return Answer(404, {"message": "404 Tree Not Found"})
        path = asked.query.get("path", "")
        entries = kept.git.tree(sha, path, recursive=asked.query.get("recursive") == "true")
        if not entries:
            return Answer(404, {"message": "404 invalid revision or path Not Found"})
        size = min(int(asked.query.get("per_page", "20")), 100)
        token = asked.query.get("page_token")
        start = [entry.sha + entry.path for entry in entries].index(token) + 1 if token else 0
        page = entries[start : start + size]
        found = [
            {
                "id": entry.sha,
                "name": entry.path.rpartition("/")[2],
                "type": entry.kind,
                "path": entry.path,
                "mode": entry.mode,
            }
            for entry in page
        ]
        headers = {}
        if start + size < len(entries):
            after = quote(page[-1].sha + page[-1].path, safe="")
            # not this server's address: what is behind a proxy often does not know its own
            address = f"http://internal.example/api/v4/x?pagination=keyset&page_token={after}&per_page={size}"
            headers["Link"] = f'<{address}>; rel="next"'
        return Answer(200, found, headers)

    def _save(self, kept: Kept, path: str, body: dict[str, str], *, new: bool) -> Answer:
        branch = body["branch"]
        before = kept.git.find(f"refs/heads/{branch}")
        if before is None:
            return Answer(400, {"message": "You can only create or edit files when you are on a branch"})
        entry = kept.git.entry(before, path)
        if new and entry is not None:
            return Answer(400, {"message": "A file with this name already exists"})
        if not new and entry is None:
            return Answer(400, {"message": "A file with this name doesn't exist"})
        if not new and body.get("last_commit_id") != kept.git.last_commit(before, path):
            said = "You are attempting to update a file that has changed since you started editing it."
            return Answer(400, {"message": said})
        assert body["encoding"] == "base64"
        content = base64.b64decode(body["content"], validate=True)
        kept.git.commit({path: content}, branch=branch, message=body["commit_message"])
        return Answer(201 if new else 200, {"file_path": path, "branch": branch})

"""Stand-ins for the REST APIs of Bitbucket Cloud, version 2.0, and Data Center, after their documentation."""

from __future__ import annotations

import email
import email.policy
import hashlib
import re
from typing import Any
from urllib.parse import quote

from tests.forges.repository import Entry
from tests.forges.server import Answer, Asked, Kept, StandIn


def form(asked: Asked) -> dict[str, bytes]:
    """The fields of a multipart form (RFC 7578)."""
    head = f"Content-Type: {asked.headers['content-type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + asked.body, policy=email.policy.HTTP)
    return {
        str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True)
        for part in message.iter_parts()  # type: ignore[attr-defined]
    }


class Cloud(StandIn):
    """Repositories by ``workspace/slug``; tokens are ``user:token`` for Basic, else for Bearer."""

    limit = Answer(
        429,
        {"type": "error", "error": {"message": "Rate limit for this resource has been exceeded"}},
        {"X-RateLimit-Limit": "1000", "X-RateLimit-Resource": "api-repositories"},
    )

    def answer(self, asked: Asked) -> Answer:
        assert asked.parts[:2] == ("2.0", "repositories"), asked.target
        if asked.token is not None and asked.token not in self.tokens:
            return _error(401, "Token is invalid, expired, or not supported for this endpoint.")
        rights = self.tokens.get(asked.token or "", set())
        name = "/".join(asked.parts[2:4])
        kept = self.visible(name, rights)
        if kept is None:
            return _error(404, f"Repository {name} not found")
        self._name = name
        match (asked.method, *asked.parts[4:]):
            case ("GET",):
                assert asked.query["fields"] == "mainbranch.name"
                branch = {"name": kept.git.default} if kept.git.refs("heads") else None
                return self._tagged({"mainbranch": branch})
            case ("GET", "refs", *kind):
                return self._refs(kept, kind, asked)
            case ("GET", "commit", sha):
                full = kept.git.find(sha)
                return Answer(200, {"hash": full}) if full else _error(404, "Commit not found")
            case ("GET", "src", commit, *path):
                return self._source(kept, commit, "/".join(path).rstrip("/"), asked)
            case ("POST", "src"):
                return self._save(kept, form(asked), rights)
        return _error(404, "Resource not found")

    def _tagged(self, body: Any) -> Answer:
        tag = hashlib.sha256(repr(body).encode()).hexdigest()[:16]
        return Answer(200, body, {"ETag": f'"{tag}"'})

    def _refs(self, kept: Kept, kind: list[str], asked: Asked) -> Answer:
        query = re.fullmatch(r'name = "(.+)"', asked.query["q"])
        assert query is not None, asked.query
        values = []
        for name, word in (("tags", "tag"), ("branches", "branch")):
            refs = kept.git.refs("heads" if name == "branches" else "tags")
            if kind in ([], [name]) and query[1] in refs:
                values.append({"type": word, "name": query[1], "target": {"hash": refs[query[1]]}})
        return self._tagged({"values": values})

    def _source(self, kept: Kept, commit: str, path: str, asked: Asked) -> Answer:
        assert re.fullmatch("[0-9a-f]{40}", commit), commit
        if kept.git.find(commit) is None:
            return _error(404, f"Commit '{commit}' not found")
        entry = kept.git.entry(commit, path)
        if entry is None:
            return _error(404, f"No such file or directory: {path}")
        if asked.query.get("format") == "meta":
            return Answer(200, self._entry(entry))
        if entry.kind == "tree":
            size = int(asked.query.get("pagelen", "10"))
            page = int(asked.query.get("page", "1"))
            found = kept.git.tree(commit, path)
            values = [self._entry(each) for each in found[(page - 1) * size : page * size]]
            body: dict[str, Any] = {"values": values, "pagelen": size, "page": page}
            if page * size < len(found):
                at = f"{self.url}/2.0/repositories/{self._name}/src/{commit}/{quote(path)}/"
                body["next"] = f"{at}?pagelen={size}&page={page + 1}"
            return Answer(200, body)
        data = kept.git.blob(entry.sha)
        return Answer(200, data, {"Content-Type": "text/plain", "ETag": f'"{entry.sha}"'})

    def _entry(self, entry: Entry) -> dict[str, Any]:
        if entry.kind == "tree":
            return {"type": "commit_directory", "path": entry.path}
        attributes = {"120000": ["link"], "160000": ["subrepository"], "100755": ["executable"]}
        found = attributes.get(entry.mode, [])
        return {"type": "commit_file", "path": entry.path, "size": entry.size, "attributes": found}

    def _save(self, kept: Kept, fields: dict[str, bytes], rights: set[str]) -> Answer:
        if "write" not in rights:
            said = "Your credentials lack one or more required privilege scopes."
            return _error(403, said) if rights else _error(401, "Access denied")
        message, branch = fields.pop("message").decode(), fields.pop("branch").decode()
        parent = fields.pop("parents").decode()
        if kept.git.find(f"refs/heads/{branch}") != parent:
            return _error(409, "The parent is not the tip of the branch")
        kept.git.commit(
            {path.lstrip("/"): data for path, data in fields.items()}, branch=branch, message=message
        )
        return Answer(201, b"", {"Location": f"{self.url}/commit"})


class DataCenter(StandIn):
    """Repositories by ``PROJECT/slug``; tokens for Bearer."""

    def answer(self, asked: Asked) -> Answer:
        assert asked.parts[:4] == ("rest", "api", "latest", "projects"), asked.target
        if asked.token is not None and asked.token not in self.tokens:
            said = "Authentication failed. Please check your credentials and try again."
            return _errors(401, said, "auth.IncorrectPasswordAuthenticationException")
        rights = self.tokens.get(asked.token or "", set())
        assert asked.parts[5] == "repos"
        name = f"{asked.parts[4]}/{asked.parts[6]}"
        if name not in self.repositories:
            return _errors(404, f"Repository {name} does not exist.", "repository.NoSuchRepositoryException")
        kept = self.visible(name, rights)
        if kept is None:
            said = "You are not permitted to access this resource"
            return _errors(401, said, "AuthorisationException")
        match (asked.method, *asked.parts[7:]):
            case ("GET",):
                return Answer(200, {"slug": asked.parts[6], "id": kept.number, "state": "AVAILABLE"})
            case ("GET", "default-branch"):
                return Answer(200, {"id": f"refs/heads/{kept.git.default}", "displayId": kept.git.default})
            case ("GET", "commits"):
                return self._commits(kept, asked.query)
            case ("GET", "raw", *path):
                return self._raw(kept, "/".join(path), asked.query["at"])
            case ("GET", "files", *path):
                return self._files(kept, "/".join(path), asked.query)
            case ("PUT", "browse", *path):
                if asked.headers.get("x-atlassian-token") != "no-check":
                    return Answer(403, b"XSRF check failed")
                return self._save(kept, "/".join(path), form(asked), rights)
        return _errors(404, "Not found", "NoSuchEntityException")

    def _commits(self, kept: Kept, query: dict[str, str]) -> Answer:
        if not kept.git.refs("heads"):
            return Answer(200, {"values": [], "size": 0, "isLastPage": True, "start": 0, "limit": 1})
        ref = query.get("until")
        sha = kept.git.by_name(ref) if ref else kept.git.find(f"refs/heads/{kept.git.default}")
        if sha is None:
            return _errors(404, f"Commit '{ref}' does not exist.", "commit.NoSuchCommitException")
        found = {"values": [{"id": sha, "displayId": sha[:11]}], "size": 1, "isLastPage": False, "limit": 1}
        return Answer(200, {**found, "start": 0, "nextPageStart": 1})

    def _raw(self, kept: Kept, path: str, at: str) -> Answer:
        if kept.git.find(at) is None:
            return _errors(404, f"Commit '{at}' does not exist.", "commit.NoSuchCommitException")
        entry = kept.git.entry(at, path)
        if entry is None or entry.kind != "blob":
            return _errors(404, f'The path "{path}" does not exist', "content.NoSuchPathException")
        return Answer(200, kept.git.blob(entry.sha), {"Content-Type": "text/plain"})

    def _files(self, kept: Kept, path: str, query: dict[str, str]) -> Answer:
        entry = kept.git.entry(query["at"], path)
        if entry is None or entry.kind != "tree":
            return _errors(404, f'The path "{path}" does not exist', "content.NoSuchPathException")
        found = [each for each in kept.git.tree(query["at"], path, recursive=True) if each.kind != "tree"]
        start, limit = int(query["start"]), min(int(query["limit"]), 25)  # a server may lower it
        values = [each.path.removeprefix(f"{path}/") for each in found[start : start + limit]]
        last = start + limit >= len(found)
        body = {"values": values, "size": len(values), "isLastPage": last, "start": start, "limit": limit}
        return Answer(200, {**body, "nextPageStart": None if last else start + limit})

    def _save(self, kept: Kept, path: str, fields: dict[str, bytes], rights: set[str]) -> Answer:
        if "write" not in rights:
            said = "You are not permitted to access this resource"
            return _errors(401, said, "AuthorisationException")
        branch, source = fields["branch"].decode(), fields.get("sourceCommitId", b"").decode()
        tip = kept.git.find(f"refs/heads/{branch}")
        assert tip is not None
        now = kept.git.entry(tip, path)
        before = kept.git.entry(source, path) if source else None
        if (now and now.sha) != (before and before.sha):
            said = "The file could not be edited because it has been modified."
            return _errors(409, said, "content.FileOutOfDateException")
        sha = kept.git.commit({path: fields["content"]}, branch=branch, message=fields["message"].decode())
        return Answer(200, {"id": sha})


def _error(status: int, message: str) -> Answer:
    return Answer(status, {"type": "error", "error": {"message": message}})


def _errors(status: int, message: str, kind: str) -> Answer:
    name = f"com.atlassian.bitbucket.{kind}"
    return Answer(status, {"errors": [{"context": None, "message": message, "exceptionName": name}]})

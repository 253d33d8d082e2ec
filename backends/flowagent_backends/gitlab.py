"""GitLab, by its REST API, version 4: https://docs.gitlab.com/api/rest/."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from flowagent import http
from flowagent.backend import Features
from flowagent.errors import BackendError, StorageTransientError
from flowagent.models import Json
from flowagent_backends import forges
from flowagent_backends.forge_api import Api, ForgeBackend, Keyring, quoted
from flowagent_backends.forges import File, Repository, no_file, special

HOST = "https://gitlab.com"
LINK = "120000"


class GitLabBackend(ForgeBackend):
    """Scripts in GitLab repositories."""

    type = "GitLab"
    features = Features(
        kinds=("script",), revision="the commit", credentials="a token in a secret, or `GITLAB_ACCESS_TOKEN`"
    )

    def repository(self, storage: Mapping[str, Json]) -> Repository:
        """The project, with the token that is there for it now."""
        what = f"GitLab: {storage['repo']}"
        named = storage.get("access_token_secret")
        base = f"{storage.get('host') or HOST}/api/v4"
        token = Keyring(what, self.context, base, HOST).token(named, "GITLAB_ACCESS_TOKEN")
        return GitLabRepository(Api(self, what, base, token), storage["repo"])


class GitLabRepository:
    """Files, trees and commits of one project.

    The commit of a reference is asked for through the file, which tokens that may read repositories only
    are allowed to; the other questions are for finding out what is missing."""

    def __init__(self, api: Api, name: str) -> None:
        self.what = api.what
        self.key: tuple[str | None, ...] = (api.base, name, api.token.secret)
        self._api = api
        self._at = f"/projects/{quoted(name)}"

    async def commit_of(self, ref: str | None, path: str) -> str:
        response, sha = await self._api.find(
            self._file(path),
            lambda response: self._api.sha(response.headers.get("x-gitlab-commit-id")),
            method="HEAD",
            params={"ref": ref or "HEAD"},
        )
        if sha:
            return sha
        if response.status_code == 404:
            raise await self._missing(path, ref)
        raise self._refusal(response, f"reading {path}")

    async def fetch(self, commit: str, file: File, target: Path, limit: int) -> int:
        got = await self._api.download(f"{self._file(file.path)}/raw", target, limit, params={"ref": commit})
        if got.status == 404:
            raise await self._missing(file.path, commit)
        if got.status != 200:
            raise self._api.refusal(got.status, got.headers, got.body, f"reading {file.path}")
        if got.headers.get("x-gitlab-content-sha256", got.sha256) != got.sha256:
            raise StorageTransientError(f"{self.what}: {file.path} came with a wrong digest; try again")
        return got.size

    async def listing(self, commit: str, directory: str) -> list[File]:
        files: list[File] = []
        params = {"path": directory, "ref": commit, "recursive": "true", "per_page": "100"}
        params["pagination"] = "keyset"
        pages = forges.Pages(self.what, directory)
        while True:
            pages.ask(params.get("page_token", ""))
            response = await self._api.get(
                f"{self._at}/repository/tree", params=params, limit=http.BODY_LIMIT
            )
            if response.status_code == 404:
                raise no_file(self, f"{directory}/", commit)
            if response.status_code != 200:
                raise self._refusal(response, f"listing {directory}/")
            for entry in self._api.read(response):
                if entry["mode"] == LINK or entry["type"] == "commit":
                    kind = "symbolic link" if entry["mode"] == LINK else "submodule"
                    raise special(self, entry["path"], kind)
                if entry["type"] == "blob":
                    files.append(File(entry["path"], entry["id"]))
            # only the place to go on from is taken: the rest of that address is not ours
            link = response.headers.get("link", "")
            following = re.search(r"[?&]page_token=([^&>]+)[^>]*>; *rel=\"next\"", link)
            if following is None or len(files) > forges.MOST_FILES:
                break
            params["page_token"] = unquote(following[1])
        if not files:
            raise no_file(self, f"{directory}/", commit)
        return files

    async def save(self, branch: str | None, path: str, content: bytes, message: str) -> None:
        branch = branch or await self._default_branch()
        change = {"branch": branch, "commit_message": message, "encoding": "base64"}
        change["content"] = base64.b64encode(content).decode()
        for attempt in (1, 2):
            found = await self._api.get(self._file(path), method="HEAD", params={"ref": branch})
            if found.status_code not in (200, 404):
                raise self._refusal(found, f"reading {path}")
            known = found.status_code == 200
            if known and found.headers.get("x-gitlab-content-sha256") == hashlib.sha256(content).hexdigest():
                return
            last = {"last_commit_id": found.headers["x-gitlab-last-commit-id"]} if known else {}
            response = await self._api.write(
                "PUT" if known else "POST",
                self._file(path),
                content=json.dumps({**change, **last}).encode(),
                headers={"Content-Type": "application/json"},
            )
            if response.status_code in (200, 201):
                return
            if response.status_code != 400 or attempt == 2:  # else somebody was faster, perhaps
                break
        raise self._refusal(response, f"committing {path} to {branch}")

    def _file(self, path: str) -> str:
        return f"{self._at}/repository/files/{quoted(path)}"

    async def _default_branch(self) -> str:
        response = await self._api.get(self._at)
        if response.status_code == 404:
            raise self._api.hidden()
        if response.status_code != 200:
            raise self._refusal(response, "reading the project")
        branch = self._api.read(response).get("default_branch")
        if not branch:
            raise self._api.empty()
        return str(branch)

    async def _missing(self, path: str, ref: str | None) -> BackendError:
        """Which of project, reference and file is not there."""
        project = await self._api.get(self._at)
        if project.status_code == 404:
            return self._api.hidden()
        if project.status_code == 200 and not self._api.read(project).get("default_branch"):
            return self._api.empty()
        if ref is not None:
            commit = await self._api.get(f"{self._at}/repository/commits/{quoted(ref)}")
            if commit.status_code == 404:
                return self._api.no_ref(ref)
        return no_file(self, path, ref or "HEAD")

    def _refusal(self, response: http.Response, doing: str) -> BackendError:
        return self._api.refusal(response.status_code, response.headers, response.content, doing)

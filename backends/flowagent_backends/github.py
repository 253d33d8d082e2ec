"""GitHub, by its REST API, version 2022-11-28: https://docs.github.com/rest."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowagent import http
from flowagent.backend import Features
from flowagent.errors import BackendError
from flowagent.models import Json
from flowagent_backends.forge_api import Api, ForgeBackend, Keyring, quoted
from flowagent_backends.forges import File, Repository, blob_id, no_file, special

API = "https://api.github.com"
LINK, SUBMODULE = "120000", "160000"


class GitHubBackend(ForgeBackend):
    """Scripts in GitHub repositories."""

    type = "GitHub"
    features = Features(
        kinds=("script",), revision="the commit", credentials="a token in a secret, or `GITHUB_ACCESS_TOKEN`"
    )

    def repository(self, storage: Mapping[str, Json]) -> Repository:
        """The repository, with the token that is there for it now."""
        what = f"GitHub: {storage['repo']}"
        named = storage.get("access_token_secret")
        base = storage.get("base_url") or API
        token = Keyring(what, self.context, base, API).token(named, "GITHUB_ACCESS_TOKEN")
        api = Api(self, what, base, token)
        api.headers["X-GitHub-Api-Version"] = "2022-11-28"
        return GitHubRepository(api, storage["repo"])


class GitHubRepository:
    """Commits, trees and contents of one repository."""

    def __init__(self, api: Api, name: str) -> None:
        self.what = api.what
        self.key: tuple[str | None, ...] = (api.base, name, api.token.secret)
        self._api = api
        self._at = f"/repos/{name}"

    async def commit_of(self, ref: str | None, path: str) -> str:
        name = (ref or f"heads/{await self._default_branch()}").removeprefix("refs/")
        response, sha = await self._api.find(
            f"{self._at}/commits/{quoted(name)}",
            lambda response: self._api.sha(response.content.decode("ascii", "replace").strip()),
            headers={"Accept": "application/vnd.github.sha"},
        )
        if sha:
            return sha
        if response.status_code == 409:
            raise self._api.empty()
        if response.status_code in (404, 422):
            await self._default_branch()  # raises if it is the repository that is not there
            raise self._api.no_ref(ref) if ref else self._api.empty()
        raise self._refusal(response, f"reading commit {name}")

    async def fetch(self, commit: str, file: File, target: Path, limit: int) -> int:
        got = await self._api.download(
            f"{self._at}/contents/{quoted(file.path, '/')}",
            target,
            limit,
            params={"ref": commit},
            headers={"Accept": "application/vnd.github.raw+json"},
        )
        if got.status == 404:
            await self.commit_of(commit, file.path)  # raises if it is the commit that is not there
            raise no_file(self, file.path, commit)
        if got.status != 200:
            raise self._api.refusal(got.status, got.headers, got.body, f"reading {file.path}")
        if got.headers.get("content-type", "").startswith("application/json"):
            raise special(self, file.path, "directory or a submodule")
        return got.size

    async def listing(self, commit: str, directory: str) -> list[File]:
        tree = commit
        for part in directory.split("/"):
            found = [entry for entry in await self._tree(tree) if entry["path"] == part]
            if not found:
                raise no_file(self, f"{directory}/", commit)
            if found[0]["type"] != "tree":
                raise special(self, directory, "file or a submodule, not a directory")
            tree = found[0]["sha"]
        files = []
        for entry in await self._tree(tree, recursive=True):
            path = f"{directory}/{entry['path']}"
            if entry["mode"] in (LINK, SUBMODULE):
                raise special(self, path, "symbolic link" if entry["mode"] == LINK else "submodule")
            if entry["type"] == "blob":
                files.append(File(path, entry["sha"], entry.get("size")))
        return files

    async def save(self, branch: str | None, path: str, content: bytes, message: str) -> None:
        at = f"{self._at}/contents/{quoted(path, '/')}"
        for attempt in (1, 2):
            response = await self._api.get(
                at,
                params={"ref": branch} if branch else None,
                headers={"Accept": "application/vnd.github.object+json"},
                limit=http.BODY_LIMIT,
            )
            if response.status_code not in (200, 404):
                raise self._refusal(response, f"reading {path}")
            known = self._api.read(response).get("sha") if response.status_code == 200 else None
            if known == blob_id(content):
                return
            change = {"message": message, "content": base64.b64encode(content).decode()}
            change |= {"branch": branch} if branch else {}
            change |= {"sha": known} if known else {}
            response = await self._api.write("PUT", at, content=json.dumps(change).encode())
            if response.status_code in (200, 201):
                return
            if response.status_code != 409 or attempt == 2:  # else somebody was faster
                break
        if response.status_code == 404:
            await self._default_branch()
            if branch:
                await self.commit_of(branch, path)
            raise BackendError(
                f"{self.what}: {path} cannot be written by {self._api.token.who} (404); "
                "give a token with the right to write contents"
            )
        raise self._refusal(response, f"committing {path}")

    async def _default_branch(self) -> str:
        response, branch = await self._api.find(
            self._at, lambda response: str(self._api.read(response).get("default_branch"))
        )
        if branch:
            return branch
        if response.status_code == 404:
            raise self._api.hidden()
        raise self._refusal(response, "reading the repository")

    async def _tree(self, sha: str, *, recursive: bool = False) -> list[dict[str, Any]]:
        response = await self._api.get(
            f"{self._at}/git/trees/{sha}",
            params={"recursive": "1"} if recursive else None,
            limit=http.BODY_LIMIT,
        )
        if response.status_code != 200:
            raise self._refusal(response, f"listing {sha[:12]}")
        tree = self._api.read(response)
        if tree.get("truncated"):
            raise BackendError(
                f"{self.what}: files= names a directory with more files than GitHub lists; use Git(...)"
            )
        entries: list[dict[str, Any]] = tree["tree"]
        return entries

    def _refusal(self, response: http.Response, doing: str) -> BackendError:
        return self._api.refusal(response.status_code, response.headers, response.content, doing)

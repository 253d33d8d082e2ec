"""Bitbucket: Cloud by its REST API, version 2.0 (https://developer.atlassian.com/cloud/bitbucket/rest/), and
Server or Data Center by theirs (https://developer.atlassian.com/server/bitbucket/rest/)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowagent import http
from flowagent.backend import Features
from flowagent.errors import BackendError
from flowagent.models import Json
from flowagent_backends import forges
from flowagent_backends.forge_api import Api, ForgeBackend, Keyring, Token, basic, quoted
from flowagent_backends.forges import File, Repository, no_file, special

CLOUD = "https://api.bitbucket.org"
CLOUD_HOSTS = (None, CLOUD, "https://bitbucket.org")
_SHORT = re.compile(r"[0-9a-f]{7,40}")


class BitbucketBackend(ForgeBackend):
    """Scripts in Bitbucket repositories, wherever they are."""

    type = "Bitbucket"
    features = Features(
        kinds=("script",),
        revision="the commit",
        credentials="a token, or a user and token, in secrets, or `BITBUCKET_ACCESS_TOKEN`",
    )

    def repository(self, storage: Mapping[str, Json]) -> Repository:
        """The repository, with the token that is there for it now."""
        host, workspace = storage.get("host"), storage.get("workspace")
        if workspace or host in CLOUD_HOSTS:
            name = f"{workspace or storage['project']}/{storage['repo']}"
            what = f"Bitbucket: {name}"
            base = f"{CLOUD if host in CLOUD_HOSTS else host}/2.0"
            keyring = Keyring(what, self.context, base, CLOUD)
            return CloudRepository(Api(self, what, base, self._cloud_token(keyring, storage)), name)
        name = f"{storage['project']}/{storage['repo']}"
        what = f"Bitbucket: {name}"
        named = storage.get("access_token_secret")
        base = f"{host}/rest/api/latest"
        token = Keyring(what, self.context, base, CLOUD).token(named, "BITBUCKET_ACCESS_TOKEN")
        return ServerRepository(Api(self, what, base, token), name)

    def _cloud_token(self, keyring: Keyring, storage: Mapping[str, Json]) -> Token:
        named = storage.get("access_token_secret")
        users, passwords = storage.get("cloud_username_secret"), storage.get("cloud_app_password_secret")
        if not users:
            token = keyring.token(named, "BITBUCKET_ACCESS_TOKEN")
            if token.name:
                return token
        user = keyring.value(users, "BITBUCKET_CLOUD_USERNAME")
        password = keyring.value(passwords, "BITBUCKET_CLOUD_APP_PASSWORD")
        if user is None or password is None:
            return Token(hint=keyring.hint("BITBUCKET_ACCESS_TOKEN"))
        name = passwords or "BITBUCKET_CLOUD_APP_PASSWORD"
        return Token(basic(user, password), passwords, name, (password,))


class CloudRepository:
    """Refs, commits and sources of one repository in the cloud."""

    def __init__(self, api: Api, name: str) -> None:
        self.what = api.what
        self.key: tuple[str | None, ...] = (api.base, name, api.token.secret)
        self._api = api
        self._at = f"/repositories/{quoted(name, '/')}"

    async def commit_of(self, ref: str | None, path: str) -> str:
        name = ref or f"refs/heads/{await self._main_branch()}"
        kind = {"refs/heads/": "/branches", "refs/tags/": "/tags"}.get(name[: name.rfind("/", 0, 11) + 1], "")
        name = re.sub("^refs/(heads|tags)/", "", name)
        # asked for by a condition: a name with a slash has no place in a path
        escaped = name.replace('"', '\\"')
        params = {"q": f'name = "{escaped}"', "fields": "values.type,values.name,values.target.hash"}

        def tip(response: http.Response) -> str:
            found = [item for item in self._api.read(response)["values"] if item["name"] == name]
            if not found:
                return ""
            # of a branch and a tag of one name, the branch
            return self._api.sha(min(found, key=lambda item: item["type"] != "branch")["target"]["hash"])

        response, sha = await self._api.find(f"{self._at}/refs{kind}", tip, params=params)
        if sha:
            return sha
        if response.status_code == 404:
            raise self._api.hidden()
        if response.status_code != 200:
            raise self._refusal(response, f"reading {name}")
        if _SHORT.fullmatch(name):
            commit = await self._api.get(f"{self._at}/commit/{name}", params={"fields": "hash"})
            if commit.status_code == 200:
                return self._api.sha(self._api.read(commit)["hash"])
        raise self._api.no_ref(ref) if ref else self._api.empty()

    async def fetch(self, commit: str, file: File, target: Path, limit: int) -> int:
        at = f"{self._at}/src/{commit}/{quoted(file.path, '/')}"
        if file.size is None:  # a directory's listing would come as its content
            response = await self._api.get(at, params={"format": "meta"})
            if response.status_code == 404:
                await self._main_branch()
                await self.commit_of(commit, file.path)
                raise no_file(self, file.path, commit)
            if response.status_code != 200:
                raise self._refusal(response, f"reading {file.path}")
            self._plain(self._api.read(response))
        got = await self._api.download(at, target, limit)
        if got.status != 200:
            raise self._api.refusal(got.status, got.headers, got.body, f"reading {file.path}")
        return got.size

    async def listing(self, commit: str, directory: str) -> list[File]:
        files: list[File] = []
        waiting = [f"{self._at}/src/{commit}/{quoted(directory, '/')}/"]
        pages = forges.Pages(self.what, directory)
        while waiting and len(files) <= forges.MOST_FILES:
            page = waiting.pop()
            pages.ask(page)
            params = None if "?" in page else {"pagelen": "100"}
            response = await self._api.get(page, params=params, limit=http.BODY_LIMIT)
            content = response.headers.get("content-type", "")
            if response.status_code == 404 or not content.startswith("application/json"):  # it is a file
                raise no_file(self, f"{directory}/", commit)
            if response.status_code != 200:
                raise self._refusal(response, f"listing {directory}/")
            found = self._api.read(response)
            for entry in found["values"]:
                if entry["type"] == "commit_directory":
                    waiting.append(f"{self._at}/src/{commit}/{quoted(entry['path'].rstrip('/'), '/')}/")
                else:
                    self._plain(entry)
                    files.append(File(entry["path"], size=int(entry["size"])))
            if following := found.get("next"):
                if not following.startswith(f"{self._api.base}{self._at}/"):
                    raise BackendError(
                        f"{self.what}: a listing goes on at another address, which is not asked"
                    )
                waiting.append(following)
        return files

    async def save(self, branch: str | None, path: str, content: bytes, message: str) -> None:
        branch = branch or await self._main_branch()
        for attempt in (1, 2):
            tip = await self.commit_of(f"refs/heads/{branch}", path)
            at = f"{self._at}/src/{tip}/{quoted(path, '/')}"
            known = await self._api.get(at, limit=http.BODY_LIMIT)
            if known.status_code == 200 and known.content == content:
                return
            # a path with a slash before it is no other field's name
            fields = {"message": message, "branch": branch, "parents": tip}
            body, media = http.multipart(fields, {f"/{path}": content})
            headers = {"Content-Type": media}
            response = await self._api.write("POST", f"{self._at}/src", content=body, headers=headers)
            if response.status_code == 201:
                return
            if response.status_code != 409 or attempt == 2:  # else somebody was faster
                break
        raise self._refusal(response, f"committing {path} to {branch}")

    def _plain(self, entry: Mapping[str, Any]) -> None:
        """:raises BackendError: this is no ordinary file."""
        attributes = entry.get("attributes") or ()
        for attribute, kind in (("link", "symbolic link"), ("subrepository", "submodule")):
            if attribute in attributes:
                raise special(self, entry["path"], kind)
        if entry["type"] != "commit_file":
            raise special(self, entry["path"], "directory")

    async def _main_branch(self) -> str:
        def name(response: http.Response) -> str:
            branch = self._api.read(response).get("mainbranch")
            return str(branch["name"]) if branch else ""

        response, branch = await self._api.find(self._at, name, params={"fields": "mainbranch.name"})
        if branch:
            return branch
        if response.status_code == 404:
            raise self._api.hidden()
        if response.status_code != 200:
            raise self._refusal(response, "reading the repository")
        raise self._api.empty()

    def _refusal(self, response: http.Response, doing: str) -> BackendError:
        return self._api.refusal(response.status_code, response.headers, response.content, doing)


class ServerRepository:
    """Commits and files of one repository on a server of one's own."""

    def __init__(self, api: Api, name: str) -> None:
        self.what = api.what
        self.key: tuple[str | None, ...] = (api.base, name, api.token.secret)
        self._api = api
        project, _, slug = name.partition("/")
        self._at = f"/projects/{quoted(project, '~')}/repos/{quoted(slug)}"

    async def commit_of(self, ref: str | None, path: str) -> str:
        # without until=, from the tip of the default branch
        params = {"limit": "1", **({"until": ref} if ref else {})}

        def newest(response: http.Response) -> str:
            commits = self._api.read(response)["values"]
            return self._api.sha(commits[0]["id"]) if commits else ""

        response, sha = await self._api.find(f"{self._at}/commits", newest, params=params)
        if sha:
            return sha
        if response.status_code == 404:
            raise await self._missing(ref)
        if response.status_code != 200:
            raise self._refusal(response, f"reading {ref or 'the default branch'}")
        raise self._api.empty()

    async def fetch(self, commit: str, file: File, target: Path, limit: int) -> int:
        at = f"{self._at}/raw/{quoted(file.path, '/')}"
        got = await self._api.download(at, target, limit, params={"at": commit})
        if got.status == 404:
            await self.commit_of(commit, file.path)
            raise no_file(self, file.path, commit)
        if got.status != 200:
            raise self._refused(got.status, got.headers, got.body, f"reading {file.path}")
        return got.size

    async def listing(self, commit: str, directory: str) -> list[File]:
        files: list[File] = []
        start: Any = 0
        pages = forges.Pages(self.what, directory)
        while start is not None and len(files) <= forges.MOST_FILES:
            pages.ask(str(start))
            response = await self._api.get(
                f"{self._at}/files/{quoted(directory, '/')}",
                params={"at": commit, "start": str(start), "limit": "1000"},
                limit=http.BODY_LIMIT,
            )
            if response.status_code == 404:
                raise no_file(self, f"{directory}/", commit)
            if response.status_code != 200:
                raise self._refusal(response, f"listing {directory}/")
            page = self._api.read(response)
            files += [File(f"{directory}/{path}") for path in page["values"]]
            start = None if page["isLastPage"] else int(page["nextPageStart"])
        return files

    async def save(self, branch: str | None, path: str, content: bytes, message: str) -> None:
        branch = branch or await self._default_branch()
        at = f"{self._at}/browse/{quoted(path, '/')}"
        for attempt in (1, 2):
            tip = await self.commit_of(f"refs/heads/{branch}", path)
            raw = f"{self._at}/raw/{quoted(path, '/')}"
            known = await self._api.get(raw, params={"at": tip}, limit=http.BODY_LIMIT)
            if known.status_code == 200 and known.content == content:
                return
            before = {"sourceCommitId": tip} if known.status_code == 200 else {}
            body, media = http.multipart(
                {"message": message, "branch": branch, **before}, {"content": content}
            )
            headers = {"Content-Type": media, "X-Atlassian-Token": "no-check"}
            response = await self._api.write("PUT", at, content=body, headers=headers)
            if response.status_code == 200:
                return
            if response.status_code != 409 or attempt == 2:  # else somebody was faster
                break
        raise self._refusal(response, f"committing {path} to {branch}")

    async def _default_branch(self) -> str:
        response = await self._api.get(f"{self._at}/default-branch")
        if response.status_code == 404:
            raise await self._missing(None)
        if response.status_code != 200:
            raise self._refusal(response, "reading the default branch")
        return str(self._api.read(response)["displayId"])

    async def _missing(self, ref: str | None) -> BackendError:
        """Which of repository and reference is not there."""
        if (await self._api.get(self._at)).status_code == 404:
            return self._api.hidden()
        return self._api.no_ref(ref) if ref else self._api.empty()

    def _refusal(self, response: http.Response, doing: str) -> BackendError:
        return self._refused(response.status_code, response.headers, response.content, doing)

    def _refused(self, status: int, headers: http.Headers, body: bytes, doing: str) -> BackendError:
        if status == 401 and b"AuthorisationException" in body:  # who it is was understood
            status = 403
        return self._api.refusal(status, headers, body, doing)

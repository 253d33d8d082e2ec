"""Services that webhooks speak to: a plain one that keeps what is PUT, and a stand-in for the content API of
Dropbox, after https://www.dropbox.com/developers/documentation/http/documentation."""

from __future__ import annotations

import hashlib
import json

from tests.forges.server import Answer, Asked, StandIn


class Shelf(StandIn):
    """Keeps bodies by path. ``tags``: it has ETags, and honours If-None-Match."""

    def __init__(self, *, tags: bool = True) -> None:
        super().__init__()
        self.kept: dict[str, bytes] = {}
        self.tags = tags

    def answer(self, asked: Asked) -> Answer:
        if self.tokens and asked.token not in self.tokens:
            return Answer(401 if asked.token is None else 403, {"message": f"no access with {asked.token}"})
        if asked.method in ("PUT", "PATCH") or (asked.method == "POST" and asked.path not in self.kept):
            self.kept[asked.path] = asked.body
            return Answer(201, {"id": 1})
        content = self.kept.get(asked.path)
        if content is None:
            return Answer(404, {"message": "there is nothing"})
        tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:12]}"'} if self.tags else {}
        return Answer(200, content, {"Content-Type": "application/octet-stream", **tag})


class Dropbox(StandIn):
    """``/2/files/upload`` and ``/2/files/download``, for the tokens that it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, bytes] = {}

    def answer(self, asked: Asked) -> Answer:
        if asked.token not in self.tokens:
            said = "invalid_access_token/.."
            return Answer(401, {"error_summary": said, "error": {".tag": "invalid_access_token"}})
        try:
            arguments = json.loads(asked.headers["dropbox-api-arg"])
        except (KeyError, ValueError):
            return Answer(400, b'Error in call to API function: missing "Dropbox-API-Arg" header')
        path = arguments["path"]
        if asked.method != "POST":
            return Answer(405, b"")
        if asked.path == "/2/files/upload":
            if asked.headers["content-type"] != "application/octet-stream":
                return Answer(400, b'Bad HTTP "Content-Type" header')
            if path in self.kept and arguments.get("mode") != "overwrite":
                return Answer(409, {"error_summary": "path/conflict/file/..", "error": {".tag": "path"}})
            self.kept[path] = asked.body
            return Answer(200, self._metadata(path))
        if asked.path == "/2/files/download":
            if asked.body or asked.headers.get("content-type", "text/plain").startswith("application/json"):
                return Answer(400, b"unexpected body")
            if path not in self.kept:
                found = {".tag": "path", "path": {".tag": "not_found"}}
                return Answer(409, {"error_summary": "path/not_found/..", "error": found})
            headers = {
                "Dropbox-API-Result": json.dumps(self._metadata(path)),
                "Content-Type": "application/octet-stream",
            }
            return Answer(200, self.kept[path], headers)
        return Answer(404, b"")

    def _metadata(self, path: str) -> dict[str, object]:
        digest = hashlib.sha256(self.kept[path]).hexdigest()
        return {
            "name": path.rpartition("/")[2],
            "id": "id:a4ayc_80_OEAAAAAAAAAXw",
            "rev": digest[:24],
            "size": len(self.kept[path]),
            "path_display": path,
            "content_hash": digest,
        }

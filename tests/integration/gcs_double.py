"""A stand-in for Google Cloud Storage with what the emulators lack: preconditions, tokens, payers, limits.

Its answers follow the JSON API's reference: https://cloud.google.com/storage/docs/json_api/v1/status-codes
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Double:
    """``objects``: by key, generation -> (data, metadata); the newest is the live one."""

    objects: dict[str, dict[int, tuple[bytes, dict[str, str]]]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    minted: int = 0
    refuses_all: bool = False
    payer: str | None = None
    keeps_generations: bool = False
    refusals: list[tuple[int, str, str]] = field(default_factory=list)  # (status, reason, message), in order
    sessions: dict[str, tuple[dict[str, list[str]], dict[str, Any], bytearray]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    forgetful: int = 0  # how often a part of an upload is kept in half only

    def __post_init__(self) -> None:
        handler = type("Handler", (_Handler,), {"double": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def write(self, key: str, data: bytes, metadata: dict[str, str] | None = None) -> int:
        generation = time.time_ns() // 1000
        kept = self.objects.setdefault(key, {})
        if not self.keeps_generations:
            kept.clear()
        kept[generation] = (data, metadata or {})
        return generation


@contextmanager
def double() -> Iterator[Double]:
    made = Double()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    double: Double
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        self.double.requests.append(f"{self.command} {self.path}")
        if parts.path == "/token":
            self.double.minted += 1
            token = f"token-{self.double.minted}"
            self.double.tokens = {token}
            self.answer(200, {"access_token": token, "expires_in": 3600, "token_type": "Bearer"})
        elif "upload_id" in query:
            self.part(query["upload_id"][0], body)
        elif self.double.refuses_all or self.token() not in self.double.tokens:
            self.refuse(401, "authError", "Invalid Credentials")
        elif self.double.refusals:
            self.refuse(*self.double.refusals.pop(0))
        elif self.double.payer is not None and query.get("userProject") != [self.double.payer]:
            said = "Bucket is a requester pays bucket but no user project provided."
            self.refuse(400, "required", said)
        elif parts.path == "/upload/storage/v1/b/bucket/o":
            self.upload(query, body)
        elif match := re.fullmatch(r"/storage/v1/b/bucket/o/([^/]+)", parts.path):
            self.read(unquote(match[1]), query)
        elif parts.path == "/storage/v1/b/bucket":
            self.answer(200, {"name": "bucket"})
        else:
            self.refuse(404, "notFound", "The specified bucket does not exist.")

    do_GET = do_POST = do_PUT = handle_any

    def token(self) -> str:
        return str(self.headers.get("Authorization", "")).removeprefix("Bearer ")

    def read(self, key: str, query: dict[str, list[str]]) -> None:
        kept = self.double.objects.get(key, {})
        generation = int(query.get("generation", [str(max(kept, default=0))])[0])
        if generation not in kept:
            self.refuse(404, "notFound", f"No such object: bucket/{key}")
            return
        data, metadata = kept[generation]
        if query.get("alt") == ["media"]:
            self.answer(200, data)
        else:
            self.answer(200, {"generation": str(generation), "size": str(len(data)), "metadata": metadata})

    def upload(self, query: dict[str, list[str]], body: bytes) -> None:
        if query["uploadType"] == ["resumable"]:
            name = f"session-{len(self.double.sessions)}"
            self.double.sessions[name] = (query, json.loads(body), bytearray())
            where = f"{self.double.url}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id={name}"
            self.answer(200, b"", Location=where)
            return
        boundary = self.headers["Content-Type"].partition("boundary=")[2].encode()
        _, described, content, _ = body.split(b"--" + boundary)
        described = described.partition(b"\r\n\r\n")[2]
        data = content.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        self.keep(query, json.loads(described), data)

    def part(self, name: str, body: bytes) -> None:
        query, described, kept = self.double.sessions[name]
        first, last, size = map(int, re.findall(r"\d+", self.headers["Content-Range"]))
        assert first == len(kept) and last - first + 1 == len(body)
        if self.double.forgetful:
            self.double.forgetful -= 1
            body = body[: 1 << 18]
        kept += body
        if len(kept) == size:
            self.keep(query, described, bytes(kept))
        else:
            assert len(body) % (1 << 18) == 0
            self.answer(308, b"", Range=f"bytes=0-{len(kept) - 1}")

    def keep(self, query: dict[str, list[str]], described: dict[str, Any], data: bytes) -> None:
        key = query["name"][0]
        expected = query.get("ifGenerationMatch")
        if expected is not None and int(expected[0]) != max(self.double.objects.get(key, {}), default=0):
            self.refuse(
                412, "conditionNotMet", "At least one of the pre-conditions you specified did not hold."
            )
            return
        generation = self.double.write(key, data, described.get("metadata"))
        self.answer(200, {"generation": str(generation), "size": str(len(data))})

    def refuse(self, status: int, reason: str, message: str) -> None:
        error = {"code": status, "message": message, "errors": [{"reason": reason, "message": message}]}
        self.answer(status, {"error": error})

    def answer(self, status: int, content: Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass

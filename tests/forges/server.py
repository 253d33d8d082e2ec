"""What the stand-ins of forges share: a server on loopback, tokens, limits, tags, and faults on demand."""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.forges.repository import BareRepository


@dataclass(frozen=True)
class Asked:
    """A request; ``parts`` are the segments of its path, decoded."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(unquote(part) for part in self.path.split("/")[1:])

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    @property
    def token(self) -> str | None:
        """The credential: of Bearer, the token, of Basic, ``user:password``."""
        scheme, _, value = self.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            return base64.b64decode(value).decode()
        return value if scheme.lower() in ("bearer", "token") else self.headers.get("private-token")


@dataclass
class Answer:
    """A response. ``cut``: how many bytes of the body are sent before the connection is closed."""

    status: int
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    wait: float = 0

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


@dataclass
class Kept:
    """A repository, who may see it besides those with rights, and who may write."""

    git: BareRepository
    private: bool = False
    number: int = 1


class StandIn:
    """The part of a forge that all have. ``tokens`` map to rights: names such as ``read`` and ``write``."""

    def __init__(self) -> None:
        self.repositories: dict[str, Kept] = {}
        self.tokens: dict[str, set[str]] = {}
        self.log: list[Asked] = []
        self.problems: list[str] = []
        self.faults: list[tuple[Callable[[Asked], bool], Answer]] = []
        self.left: int | None = None
        """How many requests are left in this hour; None: enough."""
        self.reset = int(time.time()) + 3600
        self.url = ""
        self._lock = threading.Lock()

    def fail(
        self, answer: Answer, when: Callable[[Asked], bool] = lambda asked: True, times: int = 1
    ) -> None:
        """Answer the next requests like this."""
        self.faults += [(when, answer)] * times

    def asked(self, *fragments: str) -> list[Asked]:
        """The requests whose target has all of these."""
        return [item for item in self.log if all(part in item.target for part in fragments)]

    def handle(self, asked: Asked) -> Answer:
        with self._lock:
            self.log.append(asked)
            for fault in self.faults:
                if fault[0](asked):
                    self.faults.remove(fault)
                    return fault[1]
            answer = self.answer(asked)
            tag = answer.headers.get("ETag")
            if tag and answer.status == 200 and asked.headers.get("if-none-match") in (tag, f"W/{tag}"):
                answer = Answer(
                    304, b"", {key: value for key, value in answer.headers.items() if key != "Content-Type"}
                )
            return answer

    def answer(self, asked: Asked) -> Answer:
        raise NotImplementedError

    def visible(self, name: str, rights: set[str] | None) -> Kept | None:
        kept = self.repositories.get(name)
        if kept is None or (kept.private and not (rights or set()) & {"read", "write"}):
            return None
        return kept


@contextmanager
def serving(stand_in: StandIn, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve it on loopback; the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one segment for head and body

        def _serve(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            if "chunked" in self.headers.get("transfer-encoding", ""):
                body = b"".join(self._chunks())
            else:
                body = self.rfile.read(length)
            headers = {name.lower(): value for name, value in self.headers.items()}
            try:
                answer = stand_in.handle(Asked(self.command, self.path, headers, body))
            except Exception as error:
                stand_in.problems.append(f"{self.command} {self.path}: {error!r}")
                raise
            time.sleep(answer.wait)
            content = answer.content
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if not isinstance(answer.body, bytes) and "Content-Type" not in answer.headers:
                self.send_header("Content-Type", "application/json; charset=utf-8")
            if "Content-Length" not in answer.headers and answer.status not in (204, 304):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD" and answer.status not in (204, 304):
                self.wfile.write(content if answer.cut is None else content[: answer.cut])
            self.close_connection = self.close_connection or answer.cut is not None

        def _chunks(self) -> Iterator[bytes]:
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _serve

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, address: Any) -> None:
            pass  # noted in problems, or a peer that went

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        stand_in.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
        yield stand_in.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert not stand_in.problems, stand_in.problems

"""A gate in front of an HTTP server: it counts what passes, and can do what servers do on bad days."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Action = Callable[["_Handler", bytes], None]
HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "expect"}


@dataclass
class Rule:
    """What happens to the next ``times`` requests that match."""

    method: str
    pattern: str
    action: Action
    times: int = 1_000_000
    seen: int = 0

    def takes(self, method: str, path: str) -> bool:
        if self.seen >= self.times or not (
            re.fullmatch(self.method, method) and re.search(self.pattern, path)
        ):
            return False
        self.seen += 1
        return True


@dataclass
class Gate:
    """``url`` is where it listens; ``requests`` are the (method, path with query) that came."""

    target: str
    rules: list[Rule] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"gate": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.closed = threading.Event()
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def when(self, method: str, pattern: str, action: Action, times: int = 1_000_000) -> Rule:
        rule = Rule(method, pattern, action, times)
        self.rules.append(rule)
        return rule

    def count(self, method: str, pattern: str) -> int:
        return sum(
            bool(re.fullmatch(method, verb) and re.search(pattern, path)) for verb, path in self.requests
        )

    def clear(self) -> None:
        self.rules.clear()
        self.requests.clear()
        self.headers.clear()

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def gate(target: str) -> Iterator[Gate]:
    opened = Gate(target)
    try:
        yield opened
    finally:
        opened.close()


class _Handler(BaseHTTPRequestHandler):
    gate: Gate
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with suppress(OSError):  # a client may break off at any time
            super().handle()

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.gate.closed.is_set():
            self.close_connection = True
            return
        self.gate.requests.append((self.command, self.path))
        self.gate.headers.append(dict(self.headers.items()))
        for rule in self.gate.rules:
            if rule.takes(self.command, self.path):
                rule.action(self, body)
                return
        self.answer(*self.forward(body))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = handle_any

    def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        target = urlsplit(self.gate.target)
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, cut: int | None = None
    ) -> None:
        self.send_response_only(status)
        length = None
        for name, value in headers:
            if name.lower() == "content-length":
                length = value
            elif name.lower() not in HOP:
                self.send_header(name, value)
        bare = self.command == "HEAD" or status in (204, 304)
        self.send_header("Content-Length", (length or "0") if bare else str(len(body)))
        self.end_headers()
        if not bare:
            self.wfile.write(body if cut is None else body[:cut])

    def log_message(self, *_: object) -> None:
        pass


def status(code: int, body: str = "", **headers: str) -> Action:
    """Answer with a status, a body and headers (``Retry_After="0"``)."""

    def act(handler: _Handler, _: bytes) -> None:
        named = [(name.replace("_", "-"), value) for name, value in headers.items()]
        handler.answer(code, named, body.encode())

    return act


def reset(handler: _Handler, _: bytes) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True
    handler.connection.close()


def hang(handler: _Handler, _: bytes) -> None:
    """Take the request, and never answer."""
    handler.close_connection = True
    handler.gate.closed.wait(60)


def truncate(handler: _Handler, body: bytes) -> None:
    """Announce the whole body, send half of it, and close."""
    code, headers, content = handler.forward(body)
    handler.answer(code, headers, content, cut=len(content) // 2)
    handler.wfile.flush()
    handler.close_connection = True


def corrupt(handler: _Handler, body: bytes) -> None:
    """Send a body of the same size with other bytes in it."""
    code, headers, content = handler.forward(body)
    handler.answer(code, headers, bytes(byte ^ 1 for byte in content))


def slow(seconds: float) -> Action:
    def act(handler: _Handler, body: bytes) -> None:
        time.sleep(seconds)
        handler.answer(*handler.forward(body))

    return act


def trickle(handler: _Handler, body: bytes) -> None:
    """Send the head, then a byte now and then, without an end."""
    code, headers, content = handler.forward(body)
    handler.send_response_only(code)
    for name, value in headers:
        if name.lower() not in HOP:
            handler.send_header(name, value)
    handler.end_headers()
    handler.close_connection = True
    for byte in content:
        if handler.gate.closed.wait(0.3):
            return
        try:
            handler.wfile.write(bytes([byte]))
        except OSError:
            return

"""A small HTTP/1.1 server for a few answers to trusted readers: one request to a connection.

The protocol is h11's; what is here is sockets, deadlines and bounds. Imported when somebody
asks, or a health address is configured.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio
import h11

from flowagent.daemon.log import Log
from flowagent.errors import one_line

MAX_HEADERS = 16 << 10
MAX_BODY = 16 << 10
"""Bytes of a request."""
MAX_CONNECTIONS = 32
PATIENCE = 10.0
"""Seconds that a client may take to send a request, and as many to receive the answer."""
TEXT, JSON = "text/plain; charset=utf-8", "application/json"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)  # by name in lower case
    body: bytes = b""


@dataclass(frozen=True)
class Response:
    body: bytes
    status: int = 200
    type: str = TEXT


def text(body: str, status: int = 200) -> Response:
    return Response(body.encode(), status)


def json_document(value: Any, status: int = 200) -> Response:
    return Response((json.dumps(value, indent=2) + "\n").encode(), status, JSON)


Answer = Callable[[Request], Awaitable[Response]]


class Server:
    """Answers on a listening socket, which it closes at its end."""

    def __init__(self, server: socket.socket, answer: Answer, log: Log) -> None:
        self._server = server
        self._answer = answer
        self._log = log
        self._open: dict[socket.socket, anyio.CancelScope] = {}  # oldest first

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer."""
        return bool(self._open)

    async def run(self) -> None:
        """Serve until cancelled."""
        with self._server:
            async with anyio.create_task_group() as tasks:
                while True:
                    try:
                        connection, _ = self._server.accept()
                    except BlockingIOError:
                        await anyio.wait_readable(self._server)
                        continue
                    except OSError:  # out of descriptors, or the client left again
                        await anyio.sleep(0.05)
                        continue
                    connection.setblocking(False)
                    if len(self._open) >= MAX_CONNECTIONS:  # whoever only holds them open has to go
                        next(iter(self._open.values())).cancel()
                    self._open[connection] = anyio.CancelScope()
                    tasks.start_soon(self._converse, connection)

    async def _converse(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError, TimeoutError, h11.ProtocolError), self._open[connection]:
                await self._exchange(connection)
        finally:
            del self._open[connection]

    async def _respond(self, request: Request) -> Response:
        """Whatever a request makes of what answers it, the agent lives on."""
        try:
            return await self._answer(request)
        except Exception as error:
            self._log.exception("a request could not be answered", path=one_line(request.path))
            return text(f"{type(error).__name__}: see the agent's log\n", 500)

    async def _exchange(self, connection: socket.socket) -> None:
        state = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADERS)
        bodiless = False
        try:
            with anyio.fail_after(PATIENCE):
                request = await _receive(connection, state)
            if request is None:
                return
            bodiless = request.method == "HEAD"
            response = await self._respond(request)
        except h11.RemoteProtocolError as error:
            if state.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                return
            response = text(f"{error}\n", error.error_status_hint)
        headers = [
            ("Content-Type", response.type),
            ("Content-Length", str(len(response.body))),
            ("Cache-Control", "no-store"),
            ("Connection", "close"),
        ]
        pieces = (
            h11.Response(status_code=response.status, headers=headers),
            h11.Data(data=b"" if bodiless else response.body),
            h11.EndOfMessage(),
        )
        data = b"".join(state.send(piece) or b"" for piece in pieces)
        with anyio.fail_after(PATIENCE):
            await _send(connection, data)


async def _receive(connection: socket.socket, state: h11.Connection) -> Request | None:
    """One whole request; None: the client left before. :raises h11.RemoteProtocolError: it is none."""
    head: h11.Request | None = None
    body = b""
    while True:
        event = state.next_event()
        if event is h11.NEED_DATA:
            try:
                state.receive_data(connection.recv(1 << 14))
            except BlockingIOError:
                await anyio.wait_readable(connection)
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_BODY:
                raise h11.RemoteProtocolError("the body is too long", error_status_hint=413)
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            return _read(head, body)
        else:
            return None


def _read(head: h11.Request, body: bytes) -> Request:
    try:
        parts = urlsplit(head.target.decode("ascii"))
    except ValueError:
        raise h11.RemoteProtocolError("the target is no URL") from None
    query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
    return Request(head.method.decode("ascii"), parts.path, query, headers, body)


async def _send(connection: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[connection.send(view) :]
        except BlockingIOError:
            await anyio.wait_writable(connection)

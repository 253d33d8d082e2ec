"""Doorbells between processes of one machine: datagram sockets in a directory next to the database.

A listener binds ``<topic>.<random>.sock`` for each of its topics; ringing sends one byte to all sockets of
the topic. Nothing is lost with a byte that is: a ring is only a hint to look at the store now.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import anyio

SETTLED = 0.1
"""Seconds after which a further change of a directory surely shows in its time; the kernel's step is 0.01."""
_TOPIC = re.compile(r"[\w-]{1,200}")


class Bells:
    """The doorbells of one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._listed: tuple[tuple[int, int, int], list[str]] | None = None

    def ring(self, topics: Iterable[str]) -> None:
        """Wake the listeners of the topics, without waiting for any of them. Never raises."""
        wanted = frozenset(topics)
        if not wanted:
            return
        with suppress(OSError):
            names = [name for name in self._listeners() if name.partition(".")[0] in wanted]
            if names:
                with ExitStack() as stack:
                    directory = _open(self._directory, stack)
                    sender = stack.enter_context(_datagram_socket())
                    for name in names:
                        _send(sender, directory, name)

    def _listeners(self) -> list[str]:
        """The sockets there are. The directory is listed again only when it has changed."""
        status = os.stat(self._directory)
        version = status.st_dev, status.st_ino, status.st_mtime_ns
        if self._listed is not None and self._listed[0] == version:
            return self._listed[1]
        now = time.time()
        with ExitStack() as stack:
            names = _sockets(_open(self._directory, stack))
        # while it is this new, it could change once more and keep its time
        self._listed = (version, names) if status.st_mtime < now - SETTLED else None
        return names

    @asynccontextmanager
    async def listen(self, topics: Sequence[str]) -> AsyncIterator[_Listener]:
        """Listen to topics. Where sockets cannot be had, the listener just waits: polling is the fallback."""
        with ExitStack() as stack:
            sockets: list[socket.socket] = []
            with suppress(OSError):
                self._directory.mkdir(mode=0o700, exist_ok=True)
                directory = _open(self._directory, stack)
                _sweep(directory)
                sockets.extend(_bind(directory, topic, stack) for topic in topics if _TOPIC.fullmatch(topic))
            yield _Listener(sockets, stack.enter_context(select.epoll()))


class _Listener:
    def __init__(self, sockets: list[socket.socket], poller: select.epoll) -> None:
        self._sockets = sockets
        self._poller = poller
        for bell in sockets:
            poller.register(bell, select.EPOLLIN)

    async def wait(self, timeout: float) -> bool:
        with anyio.move_on_after(timeout):
            await anyio.wait_readable(self._poller)
        return True in [_drain(bell) for bell in self._sockets]  # all of them, not up to the first


def _datagram_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)


def _open(directory: Path, stack: ExitStack) -> int:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


def _sockets(directory: int) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(".sock")]


def _address(directory: int, name: str) -> str:
    # a socket's address holds 108 bytes, the path of a store may be longer
    return f"/proc/self/fd/{directory}/{name}"


def _bind(directory: int, topic: str, stack: ExitStack) -> socket.socket:
    name = f"{topic}.{os.urandom(6).hex()}.sock"
    bell = stack.enter_context(_datagram_socket())
    bell.bind(_address(directory, name))
    stack.callback(_unlink, directory, name)
    return bell


def _send(sender: socket.socket, directory: int, name: str) -> None:
    try:
        sender.sendto(b"!", _address(directory, name))
    except BlockingIOError:
        pass  # it has rings waiting already
    except OSError as error:
        if error.errno == errno.ECONNREFUSED:  # its listener was killed
            _unlink(directory, name)


def _sweep(directory: int) -> None:
    """Remove the sockets of listeners that were killed, whose topics may never be rung again."""
    for name in _sockets(directory):
        with _datagram_socket() as probe:
            try:
                probe.connect(_address(directory, name))
            except OSError as error:
                if error.errno == errno.ECONNREFUSED:
                    _unlink(directory, name)


def _unlink(directory: int, name: str) -> None:
    with suppress(OSError):
        os.unlink(name, dir_fd=directory)


def _drain(bell: socket.socket) -> bool:
    rung = False
    with suppress(BlockingIOError):
        while bell.recv(1):
            rung = True
    return rung

"""Listening sockets: at a port, or at a path of any length."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress

from flowagent.errors import SettingsError
from flowagent.runtime.sockets import short_address

BACKLOG = 32


def listen(address: str, mode: int = 0o660) -> socket.socket:
    """A listening socket at ``HOST:PORT``, or at the path of a unix socket, which gets ``mode``; a stale one
    is replaced. :raises SettingsError: it cannot listen there."""
    try:
        return _listen_at_path(address, mode) if address.startswith("/") else _listen_at_port(address)
    except OSError as error:
        raise SettingsError(
            f"cannot listen at {address}: {error.strerror or error}; choose another --health-address"
        ) from error


def shown(server: socket.socket, address: str) -> str:
    """Where it listens, for people: the path, or the host and the port that it got."""
    if server.family == socket.AF_UNIX:
        return address
    host, port = server.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def identity(address: str) -> tuple[int, int] | None:
    """By which the file of a unix socket is known again; None: there is none."""
    try:
        status = os.lstat(address)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


def remove(path: str, made: tuple[int, int]) -> None:
    """Remove the file of a socket that has been closed, unless somebody else listens there by now."""
    if identity(path) == made:
        with suppress(OSError):
            os.unlink(path)


def _listen_at_port(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, where = found[0]
    server = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(where)
        server.listen(BACKLOG)
    except BaseException:
        server.close()
        raise
    return server


def _listen_at_path(path: str, mode: int) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with short_address(path) as address:
            _remove_stale(path, address)
            mask = os.umask(0o777 & ~mode)
            try:
                server.bind(address)
            finally:
                os.umask(mask)
        server.listen(BACKLOG)
    except BaseException:
        server.close()
        raise
    return server


def _remove_stale(path: str, address: str) -> None:
    """Remove a socket that nobody listens at any more. :raises OSError: somebody does, or it is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
        try:
            client.connect(address)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise OSError(None, "another process listens there")

"""Unix sockets at paths of any length, and the mutual proof that both ends know one key.

Socket addresses hold 107 bytes; a path through ``/proc/self/fd`` is always short enough.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

KEY_SIZE = 32
"""Bytes of the key that agent and launcher share."""


@contextmanager
def short_address(path: str) -> Iterator[str]:
    """An address for ``bind`` or ``connect`` that means ``path``."""
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def listen(path: str) -> socket.socket:
    """A listening packet socket at ``path``, readable by its owner only; a stale one is replaced."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with suppress(FileNotFoundError):
            os.unlink(path)
        with short_address(path) as address:
            server.bind(address)
        os.chmod(path, 0o600)
        server.listen(64)
    except BaseException:
        server.close()
        raise
    return server


def connect(path: str) -> socket.socket:
    """A connection that does not block. :raises OSError: nobody listens at ``path``, or too many wait."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        with short_address(path) as address:
            client.connect(address)
    except BaseException:
        client.close()
        raise
    return client


def peer_uid(connection: socket.socket) -> int:
    """The user behind the other end, as the kernel knows it."""
    credentials = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(credentials[1])


def nonce() -> str:
    return secrets.token_hex(16)


def proof(key: bytes | bytearray, role: str, challenge: str) -> str:
    """Shows knowledge of ``key`` without sending it; ``role`` keeps a proof from being reflected."""
    return hmac.new(key, (role + ":" + challenge).encode(), hashlib.sha256).hexdigest()


def proves(key: bytes | bytearray, role: str, challenge: str, claimed: object) -> bool:
    return isinstance(claimed, str) and hmac.compare_digest(proof(key, role, challenge), claimed)

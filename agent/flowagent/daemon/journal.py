"""The log as systemd's journal takes it: each entry with fields of its own.

The protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

ADDRESS = "/run/systemd/journal/socket"
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def is_behind(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written to a stream goes to the journal."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (str(status.st_dev), str(status.st_ino)) == (device, inode) and os.path.exists(ADDRESS)


class Journal:
    """A logger for structlog: entries go to the journal, and to ``stream`` should it not take them."""

    def __init__(self, stream: TextIO, address: str = ADDRESS) -> None:
        self._stream = stream
        self._address = address

    def msg(self, **event: Any) -> None:
        level = str(event.pop("level", "info"))
        text = str(event.pop("event", ""))
        words = " ".join([text, *(f"{key}={value}" for key, value in event.items() if key != "exception")])
        if "exception" in event:
            words += f"\n{event['exception']}"
        fields = {"MESSAGE": words, "PRIORITY": PRIORITIES.get(level, 6), "SYSLOG_IDENTIFIER": "flowagent"}
        fields |= {f"FLOWAGENT_{key.upper()}": value for key, value in {"event": text, **event}.items()}
        data = b"".join(_field(name, str(value)) for name, value in fields.items())
        try:
            self._send(data)
        except OSError:
            print(words, file=self._stream, flush=True)

    debug = info = warning = error = critical = exception = msg

    def _send(self, data: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(1)
            try:
                sock.sendto(data, self._address)
            except OSError as error:
                if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                    raise
                _send_file(sock, data, self._address)


def _send_file(sock: socket.socket, data: bytes, address: str) -> None:
    """What is too long for a datagram goes as a descriptor."""
    fd = os.memfd_create("journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, data)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        sock.sendmsg([], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))], 0, address)
    finally:
        os.close(fd)


def _field(name: str, value: str) -> bytes:
    key, data = name.encode("ascii", "replace"), value.encode(errors="replace")
    if b"\n" not in data:
        return key + b"=" + data + b"\n"
    return key + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"


def render(_: Any, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """The last processor: the entry as it is, for :class:`Journal`."""
    return event

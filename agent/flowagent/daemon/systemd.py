"""What the service manager is told: sd_notify, with neither a library nor a dependency on systemd.

The protocol: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress


class ServiceManager:
    """The one that started this process, if it wants to be told. All else is as if it listened."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET") or None
        if self._address is not None and self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        self.watchdog = self._watchdog(environ) if self.listens else None
        """Seconds within which it wants a sign of life; None: it does not."""

    @property
    def listens(self) -> bool:
        return self._address is not None

    def ready(self, status: str) -> None:
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """To be followed by :meth:`ready`."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._tell("RELOADING=1", f"MONOTONIC_USEC={usec}")

    def stopping(self, status: str) -> None:
        self._tell("STOPPING=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        self._tell(f"STATUS={text}")

    def alive(self) -> None:
        self._tell("WATCHDOG=1")

    def _tell(self, *lines: str) -> None:
        if self._address is None:
            return
        data = "\n".join(" ".join(line.splitlines()) for line in lines).encode()
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.settimeout(1)  # a manager whose queue is full is not worth more
            sock.sendto(data, self._address)

    @staticmethod
    def _watchdog(environ: Mapping[str, str]) -> float | None:
        try:
            usec = int(environ.get("WATCHDOG_USEC", "0"))
            pid = int(environ.get("WATCHDOG_PID", str(os.getpid())))
        except ValueError:
            return None
        return usec / 1e6 if usec > 0 and pid == os.getpid() else None

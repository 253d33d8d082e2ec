"""What the processes of an attempt write, from a pipe to the output file of its run directory.

A flow has no way to that file: it cannot cut it (as a shell does that writes to /dev/stderr), put a hole of
any size into it, or write more than its limit, however soon it ends.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

F_SETPIPE_SZ = 1031
CAPACITY = 1 << 18
"""Bytes that processes can write before they wait for us."""
PIECE = 1 << 16
MOST = 1 << 20
"""Bytes that are taken at a time: the supervisor has other things to do."""
LAST = 64
"""How often as much may be left in a pipe at the end."""


class Spool:
    """Takes what is written to :attr:`writer`; SIGIO says that something was. ``limit``: bytes in all.

    :raises OSError: the file cannot be made."""

    def __init__(self, path: str, limit: int | None) -> None:
        self.over = False
        """Whether more was written than the limit; no more is taken."""
        self.failed: OSError | None = None
        """Why the file took no more, when it was last tried."""
        self._room = float("inf") if limit is None else limit
        self._held = b""  # taken, but not in the file
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._reader, self.writer = os.pipe()
        except OSError:
            os.close(self._file)
            raise
        with suppress(OSError):  # who has many pipes gets smaller ones
            fcntl.fcntl(self._reader, F_SETPIPE_SZ, CAPACITY)
        with suppress(OSError):  # for /dev/stderr, which is opened anew, by another user than ours
            os.fchmod(self.writer, 0o622)
        fcntl.fcntl(self._reader, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._reader, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)

    def pump(self) -> bool:
        """Put what was written into the file; whether there was anything. Of a flood, a part."""
        taken = 0
        while taken < MOST and not self.over:
            if not self._held:
                try:
                    self._held = os.read(self._reader, PIECE)
                except BlockingIOError:
                    break
            if not self._held or not self._write():
                break
            taken += PIECE
        return taken > 0

    def finish(self) -> None:
        """No process of the attempt is left: all that they wrote, see :attr:`failed`; not what somebody
        goes on writing whom they gave it to."""
        for _ in range(LAST):
            if not self.pump():
                break

    def close_writer(self) -> None:
        """Others have it now."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def close(self) -> None:
        self.close_writer()
        os.close(self._reader)
        os.close(self._file)

    def _write(self) -> bool:
        while self._held and self._room > 0:
            try:
                written = os.write(self._file, self._held[: int(min(self._room, PIECE))])
            except OSError as error:
                self.failed = error
                return False
            self._held = self._held[written:]
            self._room -= written
        self.failed = None
        self.over = bool(self._held)
        return True

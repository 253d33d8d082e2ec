"""The launcher: a small warm process that forks a supervisor for each attempt.

It is single-threaded, imports only this floor and cloudpickle, and serves one interpreter. It knows nothing
of runs: a request names a run directory and carries descriptors that it passes on unread. Supervisors live
on without it. It ends when told to, or when no agent has been connected for a while.

Requests are packets of JSON on a unix socket, after a handshake in which both sides prove that they know
the key in the agent's directory::

    agent                                launcher
    {"nonce": A}                     →
                                     ←   {"proof": launcher(A), "nonce": B}
    {"proof": agent(B)}              →
    {"op": "spawn", "directory": D}  →   (descriptors: secrets or none, source lease or none)
                                     ←   {"pid": supervisor}  or  {"error": "..."}
    {"op": "exit"}                   →
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any, Callable

from flowagent.runtime import sockets, supervisor

IDLE_EXIT = 60.0
"""Seconds without a connection after which a launcher ends."""
MAX_PACKET = 1 << 16
HANDSHAKE_TIMEOUT = 5.0
"""Seconds a peer has to prove itself; others wait meanwhile."""


class Launcher:
    """Serves requests until told to exit or idle for too long."""

    def __init__(self, server: socket.socket, key: bytearray, idle_exit: float = IDLE_EXIT) -> None:
        self._server = server
        self._key = key
        self._idle_exit = idle_exit
        self._selector = selectors.DefaultSelector()
        self._connections: set[socket.socket] = set()
        self._job: Callable[[], None] | None = None  # set in a forked child only
        self._exit = False

    def serve(self) -> Callable[[], None] | None:
        """Returns None when the launcher is to end, and in a forked child the work that it is to do.

        The child leaves this frame before it does its work, so that it keeps nothing of the launcher."""
        self._selector.register(self._server, selectors.EVENT_READ)
        idle_since = time.monotonic()
        while not self._exit:
            for key, _ in self._selector.select(self._idle_exit):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._answer(key.fileobj)  # type: ignore[arg-type]
                if self._job is not None:
                    self._forget()
                    return self._job
            if self._connections:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since >= self._idle_exit:
                break
        return None

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        try:
            connection.settimeout(HANDSHAKE_TIMEOUT)
            if sockets.peer_uid(connection) != os.getuid():
                raise PermissionError("the peer is another user")
            hello = json.loads(connection.recv(MAX_PACKET))
            challenge = sockets.nonce()
            ours = sockets.proof(self._key, "launcher", str(hello["nonce"]))
            connection.send(json.dumps({"proof": ours, "nonce": challenge}).encode())
            answer = json.loads(connection.recv(MAX_PACKET))
            if not sockets.proves(self._key, "agent", challenge, answer.get("proof")):
                raise PermissionError("the peer does not know the key")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _note(f"refused a connection: {error}")
            connection.close()
            return
        self._connections.add(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _answer(self, connection: socket.socket) -> None:
        fds: list[int] = []
        try:
            packet, fds, _, _ = socket.recv_fds(connection, MAX_PACKET, 2)
            if not packet:
                raise ConnectionError
            request = json.loads(packet)
            if request["op"] == "exit":
                self._exit = True
                return
            reply = self._spawn(request, fds)
            if self._job is None:
                connection.send(json.dumps(reply).encode())
        except (OSError, ValueError, KeyError, TypeError):
            self._selector.unregister(connection)
            self._connections.discard(connection)
            connection.close()
        finally:
            if self._job is None:
                for fd in fds:
                    os.close(fd)

    def _spawn(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Fork the supervisor of one attempt; in the child, note its work."""
        directory = str(request["directory"])
        present = request["fds"]  # which of secrets, lease came along
        handed = dict(zip(present, fds))
        try:
            pid = os.fork()
        except OSError as error:
            return {"error": f"fork failed: {error}"}
        if pid:
            return {"pid": pid}
        self._job = lambda: supervisor.supervise(directory, handed.get("secrets"), handed.get("lease"))
        return {}

    def _forget(self) -> None:
        """In a child: let go of the launcher's sockets and key."""
        self._key[:] = bytes(len(self._key))
        self._selector.close()
        self._server.close()
        for connection in self._connections:
            connection.close()


def _reap() -> None:
    """Collect supervisors that have ended; what they had to say is in their run directories."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


def _note(message: str) -> None:
    sys.stderr.write(f"launcher {os.getpid()}: {message}\n")
    sys.stderr.flush()


PRELOADED = (
    "concurrent.futures.thread",
    "ctypes",
    "linecache",
    "logging",
    "traceback",
    "flowagent.flows.dag",
    "flowagent.flows.engine",
    "flowagent.flows.function",
    "flowagent.flows.mapping",
    "flowagent.flows.pickles",
    "flowagent.results",
    "flowagent.run_configs",
    "flowagent.runtime.child",
    "flowagent.storage",
    "flowagent.triggers",
)
"""What nearly every flow process would import first."""


def preload() -> None:
    """Import it once, here. cloudpickle may be missing in an interpreter that runs scripts only."""
    for name in PRELOADED:
        importlib.import_module(name)
    with suppress(ImportError):
        importlib.import_module("cloudpickle")


def main(listen_fd: int, key_path: str, idle_exit: float = IDLE_EXIT) -> None:
    """Run a launcher on an inherited listening socket. Returns only in the launcher itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: _reap())
    server = socket.socket(fileno=listen_fd)
    key = bytearray(sockets.KEY_SIZE)
    with open(key_path, "rb", buffering=0) as file:
        file.readinto(key)
    supervisor.make_undumpable()
    preload()
    gc.collect()
    gc.freeze()  # what is shared with the children is not touched by their collectors
    gc.disable()
    job = Launcher(server, key, idle_exit).serve()
    if job is None:
        return
    code = 70
    try:
        job()
        code = 0
    except BaseException as error:
        _note(f"supervisor failed: {error!r}")
    finally:
        os._exit(code)

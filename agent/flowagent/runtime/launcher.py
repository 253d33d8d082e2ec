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
"""Seconds that a peer has to prove itself; nobody waits for it meanwhile."""
MAX_STRANGERS = 32
"""Peers that have not proved themselves yet; of more, the oldest are dropped."""


class _Peer:
    """One connection, and how far its handshake has come."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.challenge: str | None = None
        self.trusted = False
        self.expires = time.monotonic() + HANDSHAKE_TIMEOUT


class Launcher:
    """Serves requests until told to exit or idle for too long."""

    def __init__(self, server: socket.socket, key: bytearray, idle_exit: float = IDLE_EXIT) -> None:
        self._server = server
        self._key = key
        self._idle_exit = idle_exit
        self._selector = selectors.DefaultSelector()
        self._peers: list[_Peer] = []  # oldest first
        self._supervisors: set[int] = set()
        self._wake = os.pipe()  # SIGCHLD writes to it: children are collected in the loop, not in between
        self._job: Callable[[], None] | None = None  # set in a forked child only
        self._exit = False

    def serve(self) -> Callable[[], None] | None:
        """Returns None when the launcher is to end, and in a forked child the work that it is to do.

        The child leaves this frame before it does its work, so that it keeps nothing of the launcher."""
        for fd in self._wake:
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake[0], selectors.EVENT_READ, self._reap)
        idle_since = time.monotonic()
        while not self._exit:
            strangers = [peer for peer in self._peers if not peer.trusted]
            for key, _ in self._selector.select(HANDSHAKE_TIMEOUT if strangers else self._idle_exit):
                key.data()
                if self._job is not None:
                    self._forget()
                    return self._job
            now = time.monotonic()
            for peer in strangers:
                if not peer.trusted and now >= peer.expires:
                    self._drop(peer, "it did not prove itself in time")
            if any(peer.trusted for peer in self._peers):
                idle_since = now
            elif now - idle_since >= self._idle_exit:
                break
        return None

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError as error:
            _note(f"cannot accept: {error}")
            time.sleep(0.01)  # out of descriptors: the peer is still there the next time
            return
        connection.setblocking(False)
        peer = _Peer(connection)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(peer))
        if sockets.peer_uid(connection) != os.getuid():
            self._drop(peer, "it is another user")
        strangers = [peer for peer in self._peers if not peer.trusted]
        if len(strangers) > MAX_STRANGERS:
            self._drop(strangers[0], "too many wait to prove themselves")

    def _hear(self, peer: _Peer) -> None:
        fds: list[int] = []
        if peer not in self._peers:
            return  # dropped a moment ago
        try:
            packet, fds, _, _ = socket.recv_fds(peer.connection, MAX_PACKET, 2)
            if not packet:
                self._drop(peer, None if peer.trusted else "it left")
                return
            reply = self._answer(peer, json.loads(packet), fds)
            if reply is not None:
                peer.connection.send(json.dumps(reply).encode())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            self._drop(peer, repr(error))
        finally:
            if self._job is None:
                for fd in fds:
                    os.close(fd)

    def _answer(self, peer: _Peer, message: dict[str, Any], fds: list[int]) -> dict[str, Any] | None:
        """The reply to one packet, if there is one. Raises what garbage leads to."""
        if peer.trusted:
            if message["op"] == "exit":
                self._exit = True
                return None
            return self._spawn(message, fds)
        if peer.challenge is None:
            ours = sockets.proof(self._key, "launcher", str(message["nonce"]))
            peer.challenge = sockets.nonce()
            return {"proof": ours, "nonce": peer.challenge}
        if not sockets.proves(self._key, "agent", peer.challenge, message["proof"]):
            raise PermissionError("it does not know the key")
        peer.trusted = True
        return None

    def _drop(self, peer: _Peer, why: str | None) -> None:
        if why is not None:
            _note(f"dropped a peer: {why}")
        self._peers.remove(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()

    def _spawn(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any] | None:
        """Fork the supervisor of one attempt; in the child, note its work."""
        directory = str(request["directory"])
        handed = dict(zip(request["fds"], fds))  # which of secrets, lease came along
        try:
            pid = os.fork()
        except OSError as error:
            return {"error": f"fork failed: {error.strerror}"}
        if pid:
            self._supervisors.add(pid)
            return {"pid": pid}
        self._job = lambda: supervisor.supervise(directory, handed.get("secrets"), handed.get("lease"))
        return None

    def _forget(self) -> None:
        """In a child: let go of the launcher's sockets and key."""
        signal.set_wakeup_fd(-1)
        self._key[:] = bytes(len(self._key))
        self._selector.close()
        self._server.close()
        for fd in self._wake:
            os.close(fd)
        for peer in self._peers:
            peer.connection.close()

    def _reap(self) -> None:
        """Collect supervisors that have ended; what they had to say is in their run directories.

        A supervisor that was killed leaves its descendants to the launcher, which ends them: nothing of an
        attempt lives on without its supervisor, whatever it did to its session or environment."""
        with suppress(BlockingIOError):
            while os.read(self._wake[0], 4096):
                pass
        killed = False
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                self._supervisors.discard(pid)
                killed = killed or status != 0
        if killed:
            for pid in supervisor.children_by_parent().get(os.getpid(), ()):
                if pid not in self._supervisors:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


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
    signal.signal(signal.SIGCHLD, lambda *_: None)  # the launcher's loop is woken
    supervisor.prctl(supervisor.PR_SET_CHILD_SUBREAPER, 1)
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

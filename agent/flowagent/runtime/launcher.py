"""The launcher: a small warm process that forks supervisors and hands attempts to them.

It is single-threaded, imports only this floor, cloudpickle and what it is told to preload, and serves one
interpreter. It knows nothing of runs: a request names a run directory and carries descriptors that it passes
on unread. Supervisors finish their attempts without it. It ends when told to, or when no agent has been
connected for a while.

Requests are packets of JSON on a unix socket, after a handshake in which both sides prove that they know
the key in the agent's directory::

    agent                                launcher
    {"nonce": A}                     →
                                     ←   {"proof": launcher(A), "nonce": B}
    {"proof": agent(B)}              →
    {"op": "spawn", "directory": D, "fds": [...], "level": L, "grace": S, "limits": {...}}  →
                                     ←   {"pid": supervisor}  or  {"error": "..."}
    {"op": "exit"}                   →

The descriptors that come with a request are, as "fds" names them: secrets, the source's lease, and one that
is open for as long as the attempt is supervised.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from flowagent.flows.errors import FlowError
from flowagent.runtime import cgroups, isolation, linux, sockets, supervisor
from flowagent.runtime.sandbox import Rules, Sandbox
from flowagent.runtime.warmth import preload, prepare_flows, rehearse_flows

IDLE_EXIT = 60.0
"""Seconds without a connection after which a launcher ends."""
SPARE_FOR = 15.0
"""Seconds without a request after which only one idle supervisor is kept."""
MAX_PACKET = 1 << 16
HANDSHAKE_TIMEOUT = 5.0
"""Seconds that a peer has to prove itself; nobody waits for it meanwhile."""
MAX_STRANGERS = 32
"""Peers that have not proved themselves yet; of more, the oldest are dropped."""
MOST_SPARES = 64
"""Supervisors beyond which none is forked before it is needed."""


class _Peer:
    """One connection, and how far its handshake has come."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.challenge: str | None = None
        self.trusted = False
        self.expires = time.monotonic() + HANDSHAKE_TIMEOUT


class Launcher:
    """Serves requests until told to exit or idle for too long."""

    def __init__(
        self, server: socket.socket, key: bytearray, sandbox: Sandbox, idle_exit: float = IDLE_EXIT
    ) -> None:
        self._server = server
        self._key = key
        self._sandbox = sandbox
        self._idle_exit = idle_exit
        self._selector = selectors.DefaultSelector()
        self._peers: list[_Peer] = []  # oldest first
        # Pids alone would not do: another pid namespace, as of a container, may have the same ones.
        self._names = os.urandom(6).hex()
        self._forked: set[int] = set()  # pids of supervisors that have not been collected yet
        self._supervisors: dict[int, socket.socket] = {}
        self._idle: list[int] = []  # pids of supervisors without an attempt, longest idle first
        self._last_request = time.monotonic()
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
            if not self._idle and len(self._supervisors) < MOST_SPARES:
                self._fork()
            if self._job is None:
                strangers = [peer for peer in self._peers if not peer.trusted]
                for key, _ in self._selector.select(self._patience(bool(strangers))):
                    key.data()
                    if self._job is not None:
                        break
            if self._job is not None:
                self._forget()
                return self._job
            now = time.monotonic()
            for peer in strangers:
                if not peer.trusted and now >= peer.expires:
                    self._drop(peer, "it did not prove itself in time")
            if now - self._last_request >= SPARE_FOR:
                for pid in self._idle[:-1]:
                    self._retire(pid)
            if any(peer.trusted for peer in self._peers):
                idle_since = now
            elif now - idle_since >= self._idle_exit:
                break
        return None

    def _patience(self, strangers: bool) -> float:
        wait = HANDSHAKE_TIMEOUT if strangers else self._idle_exit
        return min(wait, SPARE_FOR) if len(self._idle) > 1 else wait

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
            packet, fds, _, _ = socket.recv_fds(peer.connection, MAX_PACKET, supervisor.MAX_FDS)
            if not packet:
                self._drop(peer, None if peer.trusted else "it left")
                return
            reply = self._answer(peer, json.loads(packet), fds)
            if reply is not None:
                peer.connection.send(json.dumps(reply).encode())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            self._drop(peer, repr(error))
        finally:
            for fd in fds:
                os.close(fd)

    def _answer(self, peer: _Peer, message: dict[str, Any], fds: list[int]) -> dict[str, Any] | None:
        """The reply to one packet, if there is one. Raises what garbage leads to."""
        if peer.trusted:
            if message["op"] == "exit":
                self._exit = True
                return None
            if message["op"] == "ping":
                return {}
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

    # -- supervisors -----------------------------------------------------------------------------------

    def _spawn(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any] | None:
        """Hand an attempt to a supervisor. In a supervisor that is forked for it: nothing to answer."""
        self._last_request = time.monotonic()
        packet = json.dumps({name: value for name, value in request.items() if name != "op"}).encode()
        while True:
            if not self._idle:
                try:
                    if self._fork():
                        return None
                except OSError as error:
                    return {"error": f"fork failed: {error.strerror}"}
            pid = self._idle.pop()
            try:
                socket.send_fds(self._supervisors[pid], [packet], fds)
            except OSError:  # it was killed while it was idle
                self._retire(pid)
            else:
                return {"pid": pid}

    def _fork(self) -> bool:
        """A new supervisor that waits for an attempt; whether this is it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            ours.close()
            self._job = lambda: supervisor.serve(theirs, self._sandbox, self._names)
            return True
        theirs.close()
        ours.setblocking(False)
        self._forked.add(pid)
        self._supervisors[pid] = ours
        self._idle.append(pid)
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._done(pid))
        return False

    def _done(self, pid: int) -> None:
        """A supervisor has finished its attempt, or ended."""
        connection = self._supervisors.get(pid)
        if connection is None:
            return
        try:
            word = connection.recv(16)
        except BlockingIOError:
            return
        except OSError:
            word = b""
        if word:
            self._idle.append(pid)
        else:
            self._retire(pid)

    def _retire(self, pid: int) -> None:
        """Let a supervisor end, once it has no attempt."""
        connection = self._supervisors.pop(pid, None)
        if connection is not None:
            self._selector.unregister(connection)
            connection.close()
        if pid in self._idle:
            self._idle.remove(pid)

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
        for connection in self._supervisors.values():
            connection.close()

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
                if pid in self._forked:
                    killed = killed or status != 0
                    self._bury(pid, status != 0)
        if killed:
            for pid in supervisor.children_by_parent().get(os.getpid(), ()):
                if pid not in self._forked:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def _bury(self, pid: int, killed: bool) -> None:
        self._forked.remove(pid)
        self._retire(pid)
        group = cgroups.Group(dict(self._sandbox.rules.cgroups), f"{self._names}-{pid}")
        if killed:
            group.kill()
        group.remove()


def _note(message: str) -> None:
    sys.stderr.write(f"launcher {os.getpid()}: {message}\n")
    sys.stderr.flush()


def main(arguments: Sequence[str], idle_exit: float = IDLE_EXIT) -> None:
    """Run a launcher. Returns only in the launcher itself.

    ``arguments``: the descriptor of a listening socket, the path of the key, the sandbox' rules, and the
    modules to preload, with commas between."""
    listen_fd, key_path, rules, modules = arguments
    signal.signal(signal.SIGCHLD, lambda *_: None)  # the launcher's loop is woken
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    server = socket.socket(fileno=int(listen_fd))
    key = bytearray(sockets.KEY_SIZE)
    with open(key_path, "rb", buffering=0) as file:
        file.readinto(key)
    linux.make_undumpable()
    try:
        preload(list(filter(None, modules.split(","))))
    except FlowError as error:
        sys.exit(str(error))
    prepare_flows()
    rehearse_flows()
    read = Rules.from_json(rules)
    sandbox = Sandbox(read, isolates=isolation.possible(read.runs) is None)
    cgroups.sweep(dict(sandbox.rules.cgroups))
    gc.collect()
    gc.freeze()  # what is shared with the children is not touched by their collectors
    gc.disable()
    job = Launcher(server, key, sandbox, idle_exit).serve()
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

"""The process runner: attempts are forked by launchers on this machine, one launcher per interpreter.

What is true of an attempt is on disk in its run directory; launchers and their sockets only start things. So
an agent that restarts finds everything again, and a lost message loses nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from flowagent.errors import LauncherError
from flowagent.runners import ground
from flowagent.runtime import sandbox, sockets
from flowagent.runtime.rundir import RunDirectory

START_TIMEOUT = 30.0
"""Seconds that an interpreter may take to come up as a launcher."""
REQUEST_TIMEOUT = 20.0
"""Seconds that a running launcher may take to answer a request."""
GREETING_TIMEOUT = 5.0
"""Seconds that one found running may take to prove itself; then it is replaced."""


class ProcessRunner:
    """Starts attempts and watches their supervisors. ``directory`` is the agent's own (mode 0700)."""

    name = "process"

    def __init__(self, directory: Path, ground_root: Path, environ: Mapping[str, str] | None = None) -> None:
        self._directory = directory / "launchers"
        self._ground_root = ground_root
        self._environ = sandbox.base_environment(os.environ if environ is None else environ)
        self._launchers: dict[str, _Launcher] = {}
        self._ground: Path | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The variables that every flow process starts from."""
        return dict(self._environ)

    async def prepare(self, interpreter: str = sys.executable) -> None:
        """Warm up the launcher of an interpreter. :raises LauncherError: it does not start."""
        await self._launcher(interpreter).connected()

    async def start(
        self,
        run: RunDirectory,
        *,
        interpreter: str | None = None,
        values: Mapping[str, str] | None = None,
        lease_fd: int | None = None,
    ) -> int:
        """Start the attempt in a run directory; the pid of its supervisor.

        ``values`` are the secrets, handed over in memory. Starting an attempt twice does no harm: whoever
        comes second to the run directory leaves it alone.

        :raises LauncherError: no launcher of that interpreter can be had."""
        launcher = self._launcher(interpreter or sys.executable)
        fds: dict[str, int] = {}
        if values:
            fds["secrets"] = _memory_file(json.dumps(dict(values)).encode())
        try:
            if lease_fd is not None:
                fds["lease"] = lease_fd
            return await launcher.spawn(run.path, fds)
        finally:
            if "secrets" in fds:
                os.close(fds["secrets"])

    async def wait(self, run: RunDirectory, supervisor: int | None = None) -> dict[str, Any]:
        """Wait until the attempt's supervisor has ended; the merged status it left.

        Without ``"ended"`` in it the supervisor was killed. ``supervisor`` is the pid that ``start`` gave."""
        while True:
            pid = run.supervisor() or supervisor
            supervisor = None  # once: a request that was repeated told of one that left the place to another
            if pid is None or "ended" in run.status():
                return run.status()
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                # Reused before pidfd_open? The lock tells; before there is any, the journal is empty.
                if run.supervisor() == pid or not run.status():
                    await anyio.wait_readable(pidfd)
            finally:
                os.close(pidfd)

    def stop(self, run: RunDirectory, reason: str, grace: float) -> bool:
        """Ask for the end of an attempt: SIGTERM, ``grace`` seconds, SIGKILL to all. Whether anyone heard."""
        number = signal.SIGUSR1
        try:
            run.request_stop(reason, grace)
        except FileNotFoundError:
            raise
        except OSError:  # the disk is full: word cannot be left, yet it can be told to end
            number = signal.SIGTERM
        pid = run.supervisor()
        if pid is None:
            return False
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            if run.supervisor() != pid:
                return False
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True

    async def forbid(self, run: RunDirectory, reason: str) -> None:
        """See to it that nothing of the attempt lives, and that nothing of it can begin any more."""
        if not run.take_place() and run.supervisor() is not None:
            with suppress(FileNotFoundError):
                self.stop(run, reason, 0)
            await self.wait(run)

    def reap(self, run: RunDirectory, run_id: str, attempt: int) -> int:
        """Kill what a killed supervisor left behind; how many. Known by the session and by the stamp that
        every process of an attempt has in its environment."""
        main = run.status().get("pid")
        stamp = f"FLOWAGENT_RUN={run_id}.{attempt}".encode()
        killed = 0
        for entry in filter(str.isdigit, os.listdir("/proc")):
            pid = int(entry)
            with suppress(OSError, ValueError, IndexError):
                environment = Path(f"/proc/{entry}/environ").read_bytes()
                stat = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()
                if stamp in environment.split(b"\0") or (main is not None and int(stat[3]) == main):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        return killed

    async def close(self) -> None:
        """End the launchers; supervisors that still work go on by themselves."""
        for launcher in self._launchers.values():
            await launcher.exit()
        self._launchers.clear()

    def _launcher(self, interpreter: str) -> _Launcher:
        if self._ground is None:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._ground = ground.lay_out(self._ground_root)
        if interpreter not in self._launchers:
            self._launchers[interpreter] = _Launcher(
                self._directory, self._ground, interpreter, self._environ
            )
        return self._launchers[interpreter]


@dataclass
class _Launcher:
    """The agent's end of one launcher, found again or started when first needed."""

    directory: Path
    ground: Path
    interpreter: str
    environ: Mapping[str, str]
    _lock: anyio.Lock = field(default_factory=anyio.Lock)
    _connection: socket.socket | None = None
    _process: int | None = None  # the launcher's pid, if it is a child of this process: ours to reap

    async def connected(self) -> None:
        """Find or start it. :raises LauncherError: it does not start."""
        async with self._lock:
            try:
                await self._connect()
            except OSError as error:
                raise LauncherError(f"cannot start {self.interpreter}: {error.strerror}") from error

    async def spawn(self, directory: str, fds: Mapping[str, int]) -> int:
        request = {"op": "spawn", "directory": directory, "fds": list(fds)}
        async with self._lock:
            for last in (False, True):
                try:
                    connection = await self._connect()
                    with anyio.fail_after(REQUEST_TIMEOUT):
                        reply = await _exchange(connection, request, list(fds.values()))
                    break
                except (OSError, TimeoutError, ValueError) as error:
                    self._disconnect()  # it died or hangs: once more with a fresh one
                    if last:
                        raise LauncherError(
                            f"the launcher of {self.interpreter} does not answer: {error or 'timed out'}; "
                            f"see {self._log_path}"
                        ) from error
                except BaseException:
                    self._disconnect()  # cancelled in the middle: a late reply must not meet the next request
                    raise
        if "error" in reply:
            raise LauncherError(f"the launcher of {self.interpreter} refused: {reply['error']}")
        return int(reply["pid"])

    async def exit(self) -> None:
        async with self._lock:
            if self._connection is not None:
                with suppress(OSError):
                    self._connection.send(json.dumps({"op": "exit"}).encode())
                self._connection.close()
                self._connection = None

    @property
    def _key(self) -> str:
        try:
            stat = os.stat(self.interpreter)
        except OSError as error:
            raise LauncherError(f"cannot use the interpreter {self.interpreter}: {error.strerror}") from None
        identity = (self.ground.name, self.interpreter, stat.st_ino, stat.st_mtime_ns)
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]

    @property
    def _log_path(self) -> Path:
        return self.directory / f"{self._key}.log"

    async def _connect(self) -> socket.socket:
        if self._connection is None:
            path = str(self.directory / f"{self._key}.sock")
            key = self._shared_key()
            with suppress(OSError, LauncherError):  # left running by an agent before us, and well?
                self._connection = await self._greeted(sockets.connect(path), key, GREETING_TIMEOUT)
            if self._connection is None:
                self._end_process()
                self._process, connection = self._start(path)
                try:
                    self._connection = await self._greeted(connection, key, START_TIMEOUT)
                except BaseException:
                    self._end_process()
                    raise
        return self._connection

    async def _greeted(self, connection: socket.socket, key: bytes, timeout: float) -> socket.socket:
        """The connection, after both ends have proved themselves; closed if they do not."""
        try:
            await self._handshake(connection, key, timeout)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _handshake(self, connection: socket.socket, key: bytes, timeout: float) -> None:
        challenge = sockets.nonce()
        try:
            with anyio.fail_after(timeout):
                answer = await _exchange(connection, {"nonce": challenge})
                if not sockets.proves(key, "launcher", challenge, answer.get("proof")):
                    raise LauncherError(f"the launcher of {self.interpreter} does not know this agent's key")
                proof = sockets.proof(key, "agent", str(answer["nonce"]))
                await _send(connection, {"proof": proof})
        except (OSError, TimeoutError, ValueError) as error:
            why = self._last_words() or error or "timed out"
            raise LauncherError(f"{self.interpreter} did not come up as a launcher: {why}") from error

    def _shared_key(self) -> bytes:
        """The key of this agent's launchers, made once."""
        path = self.directory / "key"
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            key = b""
        if len(key) != sockets.KEY_SIZE:
            key = secrets.token_bytes(sockets.KEY_SIZE)
            temporary = self.directory / "key.tmp"
            temporary.touch(0o600)
            temporary.write_bytes(key)
            temporary.rename(path)
        return key

    def _start(self, path: str) -> tuple[int, socket.socket]:
        """Start the launcher on a socket that listens already, and to which the agent is connected: nobody
        has to wait for it to appear, and one that ends at once is heard to."""
        log = os.open(self._log_path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        server = sockets.listen(path)
        connection = sockets.connect(path)
        try:
            pid = os.posix_spawn(
                self.interpreter,
                [self.interpreter, str(self.ground / ground.ENTRY), "3", str(self.directory / "key")],
                dict(self.environ),
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, log, 1),
                    (os.POSIX_SPAWN_DUP2, log, 2),
                    (os.POSIX_SPAWN_DUP2, server.fileno(), 3),
                ],
                setsid=True,
            )
            return pid, connection
        except OSError as error:
            connection.close()
            raise LauncherError(f"cannot start {self.interpreter}: {error.strerror}") from error
        finally:
            server.close()
            os.close(log)

    def _last_words(self) -> str:
        with suppress(OSError):
            lines = self._log_path.read_text(errors="replace").strip().splitlines()
            return lines[-1] if lines else ""
        return ""

    def _end_process(self) -> None:
        """Have no launcher of ours that is dead, hangs, or never came up. Supervisors live on without it."""
        if self._process is not None:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._process, signal.SIGKILL)
                os.waitpid(self._process, 0)
            self._process = None

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


async def _send(connection: socket.socket, message: Mapping[str, Any], fds: list[int] | None = None) -> None:
    data = json.dumps(message).encode()
    while True:
        try:
            if fds:
                socket.send_fds(connection, [data], fds)
            else:
                connection.send(data)
            return
        except BlockingIOError:
            await anyio.wait_writable(connection)


async def _exchange(
    connection: socket.socket, message: Mapping[str, Any], fds: list[int] | None = None
) -> dict[str, Any]:
    """Send one packet and await one. :raises ConnectionResetError: the other end is gone."""
    await _send(connection, message, fds)
    while True:
        try:
            data = connection.recv(1 << 16)
        except BlockingIOError:
            await anyio.wait_readable(connection)
            continue
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "connection closed")
        answer: dict[str, Any] = json.loads(data)
        return answer


def _memory_file(data: bytes) -> int:
    """A descriptor with ``data`` behind it that is on no disk."""
    fd = os.memfd_create("secrets", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
    except BaseException:
        os.close(fd)
        raise
    return fd

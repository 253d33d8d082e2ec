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
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from flowagent import files, ground
from flowagent.errors import LauncherError
from flowagent.models import Json
from flowagent.runners.confinement import Confinement
from flowagent.runners.protocol import Order
from flowagent.runtime import sandbox, sockets
from flowagent.runtime.rundir import RunDirectory
from flowagent.settings import Settings

START_TIMEOUT = 30.0
"""Seconds that an interpreter may take to come up as a launcher."""
REQUEST_TIMEOUT = 20.0
"""Seconds that a running launcher may take to answer a request."""
GREETING_TIMEOUT = 5.0
"""Seconds that one found running may take to prove itself; then it is replaced."""


LOOK_EVERY = 0.1
"""Seconds between looks at an attempt that an agent before this one has started."""
IDLE = 300.0
"""Seconds after which a launcher that is not the agent's own is let go."""


class ProcessRunner:
    """Starts attempts and watches their supervisors. ``directory`` is the agent's own (mode 0700)."""

    name = "process"

    def __init__(
        self, directory: Path, ground_root: Path, confinement: Confinement, preload: Sequence[str] = ()
    ) -> None:
        self._directory = directory / "launchers"
        self._ground_root = ground_root
        self._confinement = confinement
        self._preload = tuple(preload)
        self._environ = sandbox.base_environment(os.environ)
        self._launchers: dict[tuple[str, tuple[str, ...]], _Launcher] = {}
        self._ground: Path | None = None

    @property
    def floor(self) -> str:
        return self._confinement.floor

    @property
    def gaps(self) -> Sequence[str]:
        return self._confinement.gaps

    async def open(self) -> None:
        """Remove byte code that nobody has used for long."""
        await anyio.to_thread.run_sync(self._confinement.sweep)

    async def prepare(self, interpreter: str = sys.executable) -> None:
        """Warm up the launcher of an interpreter. :raises LauncherError: it does not start."""
        await self._launcher(interpreter, self._preload).connected()

    def admit(self, config: Mapping[str, Json]) -> dict[str, Json]:
        """The level of isolation and the grants. :raises SandboxError: the flow asks for more."""
        return {"sandbox": self._confinement.level(config), "grants": self._confinement.grants(config)}

    def resolves(self, config: Mapping[str, Json]) -> bool:
        """The agent has the credentials; a flow process never does."""
        return False

    def furnish(self, order: Order, plan: Mapping[str, Json]) -> dict[str, Json]:
        """:raises LauncherError: the flow is in a container image."""
        if order.source is None or order.origin is None:
            raise LauncherError("the flow is in a container image; start an agent with --runner docker")
        return {
            **plan,
            "source": {**plan["source"], "directory": str(order.source)},
            "env": {**self._environ, **plan["env"]},
            "run_directory": order.run.path,
            "readable": self._confinement.readable(order.source),
            "bytecode": self._confinement.bytecode(order.origin),
        }

    async def make_ready(self, order: Order) -> None:
        """Nothing takes long: launchers are warm."""
        assert order.origin is not None
        self._confinement.hand_over(order.run.path, order.origin)

    async def start(self, order: Order) -> int:
        """Start the attempt in a run directory; a descriptor to wait for its end with.

        The secrets are handed over in memory. Starting an attempt twice does no harm: whoever comes second
        to the run directory leaves it alone.

        :raises LauncherError: no launcher of that interpreter can be had."""
        config = order.config
        preload = (*self._preload, *(config.get("preload") or ()))
        launcher = self._launcher(config.get("python") or sys.executable, preload)
        end, held = os.pipe()
        fds = {"held": held}
        try:
            if order.values:
                fds["secrets"] = _memory_file(json.dumps(dict(order.values)).encode())
            request = {
                "op": "spawn",
                "directory": order.run.path,
                "level": self._confinement.level(config),
                "limits": self._confinement.limits_of(config)._asdict(),
                "grace": order.grace,
            }
            await launcher.spawn(request, fds if order.lease_fd is None else {**fds, "lease": order.lease_fd})
        except BaseException:
            os.close(end)
            raise
        finally:
            for fd in fds.values():
                os.close(fd)
        return end

    async def began(self, run: RunDirectory) -> bool:
        """Whether a supervisor has begun it; the place of one that has not is taken."""
        return not run.take_place() and "abandoned" not in run.status()

    async def wait(self, run: RunDirectory, end: int | None = None) -> dict[str, Any]:
        """Wait until nobody supervises the attempt any more; the merged status that was left.

        Without ``"ended"`` in it the supervisor was killed. ``end`` is what ``start`` gave, and is closed
        here; without it, as for attempts of an agent before this one, the status file's lock is looked at."""
        if end is not None:
            try:
                await anyio.wait_readable(end)  # its other end is closed with the attempt
            finally:
                os.close(end)
        while run.supervisor() is not None and "ended" not in run.status():  # noqa: ASYNC110 - a lock
            await anyio.sleep(LOOK_EVERY)
        status = run.status()
        if "ended" not in status:
            status["leftovers"] = self._reap(run)
        return status

    def extend(self, run: RunDirectory, deadline: float) -> None:
        """The supervisor reads it when the time that it knows of is up."""
        run.write_lease(deadline)

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

    async def forbid(self, run: RunDirectory, reason: str, *, failed: bool = False) -> None:
        """See to it that nothing of the attempt lives, and that nothing of it can begin any more."""
        if not run.take_place() and run.supervisor() is not None:
            with suppress(FileNotFoundError):
                self.stop(run, reason, 0)
            await self.wait(run)

    def _reap(self, run: RunDirectory) -> int:
        """Kill what a killed supervisor left behind; how many. Known by the session and by the stamp that
        every process of an attempt has in its environment."""
        main = run.status().get("pid")
        stamp = f"FLOWAGENT_RUN={os.path.basename(run.path)}".encode()
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

    def reload(self, settings: Settings) -> None:
        """Take the limits of these settings from the next attempt on."""
        self._confinement.reload(settings)

    async def check(self) -> None:
        """See whether the agent's own launcher answers. :raises LauncherError: it does not."""
        await self._launcher(sys.executable, self._preload).ping()

    async def close(self) -> None:
        """End the launchers; supervisors that still work go on by themselves."""
        for launcher in self._launchers.values():
            await launcher.exit()
        self._launchers.clear()

    async def tend(self) -> None:
        """Let go of launchers that nothing was asked of for long, but of the agent's own; they end by
        themselves then."""
        for key, launcher in list(self._launchers.items()):
            if key != (sys.executable, self._preload) and launcher.idle > IDLE:
                del self._launchers[key]
                await launcher.exit()

    def _launcher(self, interpreter: str, preload: Sequence[str]) -> _Launcher:
        if self._ground is None:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._ground = ground.lay_out(self._ground_root)
        key = (interpreter, tuple(dict.fromkeys(preload)))
        if key not in self._launchers:
            self._launchers[key] = _Launcher(
                self._directory, self._ground, interpreter, key[1], self._confinement.rules, self._environ
            )
        return self._launchers[key]


@dataclass
class _Launcher:
    """The agent's end of one launcher, found again or started when first needed."""

    directory: Path
    ground: Path
    interpreter: str
    preload: tuple[str, ...]
    rules: sandbox.Rules
    environ: Mapping[str, str]
    _used: float = field(default_factory=time.monotonic)
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

    @property
    def idle(self) -> float:
        """Seconds since it was last asked for anything."""
        return time.monotonic() - self._used

    async def spawn(self, request: Mapping[str, Any], fds: Mapping[str, int]) -> None:
        self._used = time.monotonic()
        await self._ask({**request, "fds": list(fds)}, list(fds.values()))

    async def ping(self) -> None:
        await self._ask({"op": "ping"}, [])

    async def _ask(self, request: Mapping[str, Any], fds: list[int]) -> None:
        """:raises LauncherError: it does not answer, or refuses."""
        async with self._lock:
            for last in (False, True):
                try:
                    connection = await self._connect()
                    with anyio.fail_after(REQUEST_TIMEOUT):
                        reply = await _exchange(connection, request, fds)
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

    async def exit(self) -> None:
        async with self._lock:
            if self._connection is not None:
                with suppress(OSError):
                    self._connection.send(json.dumps({"op": "exit"}).encode())
                self._connection.close()
                self._connection = None

    @property
    def _key(self) -> str:
        path = shutil.which(self.interpreter) or self.interpreter
        try:
            status = os.stat(path)
        except OSError as error:
            raise LauncherError(f"cannot use the interpreter {self.interpreter}: {error.strerror}") from None
        check_interpreter(path, (self.rules.home, *self.rules.denied, *self.rules.write))
        identity = (
            self.ground.name,
            self.interpreter,
            status.st_ino,
            status.st_mtime_ns,
            self.preload,
            self.rules,
        )
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
                [
                    self.interpreter,
                    str(self.ground / ground.ENTRY),
                    "3",
                    str(self.directory / "key"),
                    self.rules.to_json(),
                    ",".join(self.preload),
                ],
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


def check_interpreter(interpreter: str, closed: Sequence[str]) -> None:
    """An interpreter is executed outside of any sandbox, and flows name it: it has to be one that nobody but
    root and this user can have put there, and not be where flows or their sources are (``closed``).

    Every name on the way counts, not only where the links lead: a virtual environment is its directory.

    :raises LauncherError: it is not."""
    path = shutil.which(interpreter) or interpreter
    for place in files.way(path):
        for top in closed:
            if os.path.commonpath([place, top]) == top:
                raise LauncherError(
                    f"the interpreter {path} is refused: {top} is open to flows or holds their sources; "
                    "install it elsewhere"
                )
        if files.changeable(place):
            raise LauncherError(
                f"the interpreter {path} is refused: others than root and the agent's user may change "
                f"{place}; take that right away: chmod go-w {place}"
            )


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

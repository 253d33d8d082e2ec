"""The git program, run so that nothing but its arguments decides what it does, and nothing outlives it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio.abc import ByteReceiveStream, Process

from flowagent.errors import BackendError, StorageNotFoundError, StorageTransientError, one_line
from flowagent_backends.git.remotes import Remote

DEADLINE = 600.0
NO_GIT = "git is not installed on the agent's machine; install it"
GRACE = 2.0
OUTPUT_LIMIT = 64 << 20
MEMORY = 2 << 30
"""Bytes of its own that each git process may have: an endless answer ends there."""
ERRORS_KEPT = 16 << 10
INHERITED = (
    "PATH",
    "TMPDIR",
    "http_proxy",
    "https_proxy",
    "HTTPS_PROXY",
    "all_proxy",
    "ALL_PROXY",
    "no_proxy",
    "NO_PROXY",
    "GIT_SSL_CAINFO",
    "GIT_CONFIG_GLOBAL",
)
"""What of the agent's environment git may know. With GIT_CONFIG_GLOBAL an operator names a configuration."""

CONFIG = (
    ("core.hooksPath", "/dev/null"),
    ("core.fsmonitor", "false"),
    ("core.attributesFile", "/dev/null"),
    ("core.excludesFile", "/dev/null"),
    ("core.askPass", ""),
    ("core.bigFileThreshold", "64m"),  # larger ones are never whole in memory
    ("core.symlinks", "true"),
    ("core.autocrlf", "false"),
    ("core.fsync", "none"),  # a mirror can be fetched again
    ("core.protectHFS", "true"),
    ("core.protectNTFS", "true"),
    ("checkout.workers", "0"),
    ("credential.helper", ""),
    ("fetch.recurseSubmodules", "false"),
    ("fetch.unpackLimit", "1"),  # one pack is fewer files than its objects
    ("fetch.writeCommitGraph", "false"),
    ("gc.auto", "0"),
    ("gc.autoDetach", "false"),
    ("http.followRedirects", "initial"),
    ("http.lowSpeedLimit", "1000"),
    ("http.lowSpeedTime", "30"),
    ("maintenance.auto", "false"),
    ("protocol.allow", "never"),
    ("protocol.version", "2"),
    ("submodule.recurse", "false"),
)

_AUTH = re.compile(
    r"Authentication failed|could not read (Username|Password)|terminal prompts disabled"
    r"|requested URL returned error: (401|403)|Permission denied|Access denied|access denied"
    r"|insufficient permission|not granted|dubious ownership",
    re.I,
)
_MISSING = re.compile(
    r"repository '?.*'? (not found|does not exist)|does not appear to be a git repository|no such repository"
    r"|project you were looking for could not be found|requested URL returned error: (404|410)"
    r"|repository not exported",
    re.I,
)
_NO_REF = re.compile(
    r"couldn't find remote ref|not our ref|unadvertised object|remote error: .*not our ref"
    r"|dumb http transport does not support",
    re.I,
)
_NETWORK = re.compile(
    r"Could not resolve host|Connection (refused|reset|timed out)|timed? ?out|Operation too slow|early EOF"
    r"|hung up|RPC failed|Failed to connect|Couldn't connect|unable to connect|gnutls|SSL|Empty reply"
    r"|requested URL returned error: (429|5\d\d)|unexpected disconnect|Network is unreachable"
    r"|no route to host",
    re.I,
)
_CERTIFICATE = re.compile(r"certificate verif|self.signed certificate|certificate problem", re.I)
_FULL = re.compile(r"No space left on device|Disk quota exceeded", re.I)
_MEMORY = re.compile(r"out of memory|memory exhausted|mmap failed: Cannot allocate", re.I)
_UNWRITTEN = re.compile(
    r"unable to (write|create) (file|symlink) |cannot create directory at|unable to stat just-written file"
    r"|invalid path '|File name too long",
)
_LARGE_FILE = re.compile(
    r"Smudge error: (Error downloading (?P<path>.*) \([0-9a-f]{64}\): )?(?P<said>.*)|smudge filter lfs failed"
)
_LARGE_REFUSED = re.compile(r"Authorization error|Authentication required|\b(401|403)\b|[Cc]redentials")
_LARGE_MISSING = re.compile(r"[Nn]ot found|does not exist|\b(404|410)\b")
_TOO_LARGE = re.compile(r"File too large|SIGXFSZ|signal 25|file size limit", re.I)
_NOISE = re.compile(
    r"^(hint:|remote: (Enumerating|Counting|Compressing|Total)|Receiving|Resolving|Updating|warning:)"
)
_URL = re.compile(r"(?P<scheme>[a-z]+://)[^/@\s]*@")


class RefusedError(BackendError):
    """The server does not hand out what was asked for by its name or commit; it may by another."""


class MirrorError(BackendError):
    """Git failed in a way that may be the mirror's fault: it is worth another try with a new one."""


class DiskFullError(BackendError):
    """There is no room for what git wants to write; a new mirror would need more of it."""


@dataclass(frozen=True)
class Call:
    """One run of git. ``channel`` is a descriptor connected to the remote's other end, for ``fd::``."""

    args: Sequence[str]
    remote: Remote | None = None
    what: str = ""  # how errors name it; by default as the remote is named
    git_dir: Path | None = None
    config: Sequence[tuple[str, str]] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes = b""
    descriptors: Sequence[int] = ()
    deadline: float = DEADLINE
    file_limit: int | None = None
    heard: Callable[[str], None] | None = None  # each line of progress
    take: Callable[[bytes], None] | None = None  # the output, piece by piece, instead of all at the end


class Git:
    """Runs the git that is on the agent's PATH."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    async def run(self, call: Call) -> bytes:
        """What git prints. :raises BackendError: it fails, in the words of :func:`failure`."""
        what = call.what or (call.remote.what if call.remote else "Git")
        credentials = _credentials(call.remote)
        descriptors = [*call.descriptors, *([credentials] if credentials is not None else ())]
        try:
            with anyio.move_on_after(call.deadline):
                code, output, errors = await self._run(call, what, descriptors, credentials)
                if code:
                    raise failure(call.remote, what, code, errors)
                return output
        finally:
            if credentials is not None:
                os.close(credentials)
        raise StorageTransientError(
            f"{what}: git {call.args[0]} took longer than {call.deadline:g} s; try again later"
        )

    async def _run(
        self, call: Call, what: str, descriptors: Sequence[int], credentials: int | None
    ) -> tuple[int, bytes, str]:
        # in KiB, and in blocks of 512 bytes (POSIX ulimit); it fails where less is allowed already
        limits = f"ulimit -d {MEMORY >> 10}; "
        if call.file_limit is not None:
            # with the signal, git's own processes would end without a word
            limits += f"trap '' XFSZ; ulimit -f {call.file_limit // 512 + 1}; "
        try:
            with anyio.CancelScope(shield=True):  # else it might begin, and nobody know of it
                process = await anyio.open_process(
                    ["sh", "-c", f'{{ {limits}}} 2>/dev/null; exec "$@"', "sh", "git", *call.args],
                    stdin=subprocess.PIPE if call.stdin else subprocess.DEVNULL,
                    env=self._environment(call, credentials),
                    cwd="/",
                    start_new_session=True,
                    pass_fds=tuple(descriptors),
                )
        except FileNotFoundError:
            raise BackendError(f"{what}: {NO_GIT}") from None
        output, errors = _Output(what), _Errors(call.heard)
        try:
            with first_error():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_read, process.stdout, call.take or output.take)
                    tasks.start_soon(errors.read, process.stderr)
                    if process.stdin is not None:
                        with suppress(anyio.BrokenResourceError):
                            await process.stdin.send(call.stdin)
                        await process.stdin.aclose()
                    code = await process.wait()
        finally:
            with anyio.CancelScope(shield=True):
                await _end(process)
        if code == 127 and "git" in errors.text:
            raise BackendError(f"{what}: {NO_GIT}")
        return code, bytes(output.kept), errors.text

    def _environment(self, call: Call, credentials: int | None) -> dict[str, str]:
        config = [*CONFIG, *call.config]
        env = {
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_LFS_SKIP_SMUDGE": "1",
            "GIT_NO_LAZY_FETCH": "1",
            "GIT_NO_REPLACE_OBJECTS": "1",
            "HOME": "/nonexistent",
            "LC_ALL": "C",
            **{name: self._environ[name] for name in INHERITED if name in self._environ},
        }
        if "SSL_CERT_FILE" in self._environ:
            env.setdefault("GIT_SSL_CAINFO", self._environ["SSL_CERT_FILE"])
        if call.git_dir is not None:
            env["GIT_DIR"] = str(call.git_dir)
        if call.remote is not None:
            config.append((f"protocol.{call.remote.scheme}.allow", "always"))
            if call.remote.scheme == "http":
                config.append(("protocol.https.allow", "always"))  # where it may redirect to
        if credentials is not None and call.remote is not None:
            # asked for in a pipe, and only for this host: not in the environment, not after a redirect. The
            # helper looks at the host itself: git takes none with an underscore for credential.<url>
            file = f"/proc/self/fd/{credentials}"
            asked = f"'protocol={call.remote.scheme}' | 'host={call.remote.place}'"
            ours = f'n=0; while read -r l; do case "$l" in {asked}) n=$((n + 1)) ;; esac; done; test $n = 2'
            # what was refused is not offered again: git-lfs would go on asking for it without an end
            helper = f'!f() {{ {ours} && case "$1" in get) cat {file} ;; erase) : >{file} ;; esac; }}; f'
            config.append(("credential.helper", helper))
        env["GIT_CONFIG_COUNT"] = str(len(config))
        for number, (key, value) in enumerate(config):
            env[f"GIT_CONFIG_KEY_{number}"] = key
            env[f"GIT_CONFIG_VALUE_{number}"] = value
        return {**env, **call.env}


@contextmanager
def first_error() -> Iterator[None]:
    """Of what failed in a task group, the first, as if there were no group."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from error.__cause__


def _credentials(remote: Remote | None) -> int | None:
    """A file in memory with what git's credential protocol asks for; None: there is nothing to tell."""
    if remote is None or not remote.scheme.startswith("http") or not (remote.user or remote.password):
        return None
    descriptor = os.memfd_create("credentials", os.MFD_CLOEXEC)
    os.write(descriptor, f"username={remote.user}\npassword={remote.password}\n".encode())
    return descriptor


async def _read(stream: ByteReceiveStream | None, take: Callable[[bytes], None]) -> None:
    assert stream is not None
    async for data in stream:
        take(data)


@dataclass
class _Output:
    """What a process prints, if that is not too much."""

    what: str
    kept: bytearray = field(default_factory=bytearray)

    def take(self, data: bytes) -> None:
        self.kept += data
        if len(self.kept) > OUTPUT_LIMIT:
            raise BackendError(
                f"{self.what}: git prints more than {OUTPUT_LIMIT >> 20} MB; use a smaller repository"
            )


class _Errors:
    """The end of what a process says on its standard error, line by line."""

    def __init__(self, heard: Callable[[str], None] | None) -> None:
        self._heard = heard
        self._kept = bytearray()

    async def read(self, stream: ByteReceiveStream | None) -> None:
        assert stream is not None
        async for data in stream:
            if self._heard is not None:
                for line in re.split(rb"[\r\n]", data):
                    self._heard(line.decode("utf-8", "replace"))
            self._kept += data
            del self._kept[:-ERRORS_KEPT]

    @property
    def text(self) -> str:
        return self._kept.decode("utf-8", "replace")


async def _end(process: Process) -> None:
    """Nothing of its process group is left when this returns."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        if process.returncode is not None and not _alive(process.pid):
            break
        with anyio.move_on_after(patience):
            await process.wait()
            while _alive(process.pid):  # noqa: ASYNC110 - of which only the kernel knows
                await anyio.sleep(0.01)
            break
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            await stream.aclose()


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


# -- errors --------------------------------------------------------------------------------------------


def failure(remote: Remote | None, what: str, code: int, errors: str) -> BackendError:
    """The error for what git said: whose fault it is decides what is done about it."""
    said = _last_line(remote, errors) or (
        f"git was killed by signal {-code}" if code < 0 else f"exit code {code}"
    )
    if _FULL.search(errors):
        return DiskFullError(
            f"{what}: there is no room for it: {said}; free space, or run: flowagent cache prune"
        )
    if _TOO_LARGE.search(errors) or code == -signal.SIGXFSZ or code == 128 + signal.SIGXFSZ:
        return BackendError(
            f"{what}: it is larger than this agent takes; see max_source in its configuration"
        )
    if _MEMORY.search(errors):
        return BackendError(
            f"{what}: git takes more than {MEMORY >> 20} MB of memory for it; name a smaller repository"
        )
    if unwritten := _UNWRITTEN.search(errors):  # from whatever mirror
        line = one_line(errors[unwritten.start() :].splitlines()[0])
        hint = "check the disk of the agent's home, or run: flowagent cache prune"
        if re.search("invalid path|File name too long", line):
            hint = "such a commit is not checked out"
        return BackendError(f"{what}: it cannot be written: {line}; {hint}")
    if large := _LARGE_FILE.search(errors):
        name = f"large file {large['path']!r}" if large["path"] else "its large files"
        return _large_file(remote, f"{what}: {name}", _clean(remote, large["said"] or said))
    if remote is None:
        return MirrorError(f"{what}: git failed: {said}")
    if _NO_REF.search(errors):
        return RefusedError(f"{what}: {said}; it was removed while it was being fetched: run the flow again")
    if _MISSING.search(errors):
        return not_found(remote, what)
    if _AUTH.search(errors):
        return refused(remote, what, said)
    if _CERTIFICATE.search(errors):
        return BackendError(
            f"{what}: its certificate is not trusted; set SSL_CERT_FILE to a file that has its authority's"
        )
    if _NETWORK.search(errors):
        return StorageTransientError(f"{what}: it cannot be reached: {said}; try again later")
    return MirrorError(f"{what}: git failed: {said}")


def _large_file(remote: Remote | None, what: str, said: str) -> BackendError:
    """For what git-lfs said: the mirror has its pointers, so a new mirror would not help."""
    if _LARGE_REFUSED.search(said):
        return refused(remote, what, said)
    if _LARGE_MISSING.search(said):
        return StorageNotFoundError(f"{what}: its server has not got it: {said}; try git lfs push --all")
    return StorageTransientError(f"{what}: it cannot be had: {said}; try again later")


def not_found(remote: Remote | None, what: str) -> BackendError:
    """Forges answer the same for what is not there and for what is not for these eyes."""
    if remote is not None and remote.scheme == "file":
        return StorageNotFoundError(f"{what}: there is no Git repository; check the path")
    return StorageNotFoundError(
        f"{what}: there is no such repository, or it is private; check {_door(remote)}"
    )


def refused(remote: Remote | None, what: str, said: str) -> BackendError:
    return BackendError(f"{what}: access is refused ({said}); check {_door(remote)}")


def _door(remote: Remote | None) -> str:
    if remote is None or remote.scheme == "ssh":
        return "its name and the key that the agent uses"
    if remote.secret:
        return f"its name and the token in secret {remote.secret}"
    return "its name, or give git_token_secret_name="


def _last_line(remote: Remote | None, errors: str) -> str:
    lines = [one_line(line) for line in re.split(r"[\r\n]+", errors)]
    told = [line for line in lines if line and not _NOISE.match(line)]
    fatal = [line for line in told if re.match(r"(fatal|error|ERROR|remote): ", line)] or told
    return _clean(remote, fatal[-1] if fatal else "")


def _clean(remote: Remote | None, line: str) -> str:
    line = _URL.sub(r"\g<scheme>", one_line(line))
    for private in remote.private if remote else ():
        line = line.replace(private, "***") if private else line
    return line

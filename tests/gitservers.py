"""Real git servers for tests, on loopback: smart HTTP with or without TLS and passwords, sshd, git daemon."""

from __future__ import annotations

import base64
import os
import pwd
import socket
import socketserver
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

IDENTITY = {
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.com",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.com",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
}
CLEAN = {
    name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "SSH_"))
} | IDENTITY


def git(
    *args: str | Path, cwd: Path | None = None, stdin: bytes = b"", env: dict[str, str] | None = None
) -> str:
    done = subprocess.run(
        ["git", *map(str, args)], cwd=cwd, input=stdin, capture_output=True, env={**CLEAN, **(env or {})}
    )
    assert done.returncode == 0, f"git {args}: {done.stderr.decode()}"
    return done.stdout.decode().strip()


@dataclass
class Repository:
    """A bare repository that a test writes to through a work tree."""

    bare: Path
    work: Path

    @classmethod
    def make(cls, root: Path, name: str, **files: str | bytes) -> Repository:
        bare, work = root / f"{name}.git", root / "work" / name
        bare.parent.mkdir(parents=True, exist_ok=True)
        git("init", "-q", "--bare", "-b", "main", bare)
        git("init", "-q", "-b", "main", work)
        git("remote", "add", "origin", bare, cwd=work)
        # what forges allow as well
        git("config", "uploadpack.allowFilter", "true", cwd=bare)
        repository = cls(bare, work)
        if files:
            repository.commit(**files)
        return repository

    def write(self, path: str, content: str | bytes) -> Path:
        file = self.work / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def commit(self, message: str = "m", push: bool = True, /, **files: str | bytes) -> str:
        """Commit these files (``a__b`` is a/b.py, see :meth:`named`) and all that was written; its sha."""
        for name, content in files.items():
            self.write(name.replace("__", "/") + ("" if "." in name else ".py"), content)
        git("add", "-A", cwd=self.work)
        git("commit", "-q", "--allow-empty", "-m", message, cwd=self.work)
        if push:
            self.push()
        return self.head

    def push(self, *what: str) -> None:
        git("push", "-q", "-f", "origin", *(what or ("HEAD",)), cwd=self.work)

    def branch(self, name: str) -> None:
        git("checkout", "-q", "-B", name, cwd=self.work)

    @property
    def head(self) -> str:
        return git("rev-parse", "HEAD", cwd=self.work)

    def git(self, *args: str, **options: Any) -> str:
        return git(*args, cwd=self.work, **options)


@contextmanager
def open_directory() -> Iterator[Path]:
    """A directory that other users can enter; those of pytest are closed to them."""
    with tempfile.TemporaryDirectory(prefix="flowagent-git-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int, process: subprocess.Popen[Any] | None = None) -> None:
    for _ in range(400):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process is None or process.poll() is None, "the server ended at once"
        time.sleep(0.02)
    raise AssertionError(f"nothing listens on port {port}")


# -- http ------------------------------------------------------------------------------------------------


@dataclass
class HttpServer:
    """``git http-backend`` below ``root``. With ``logins``, only for these; ``requests`` are what came."""

    root: Path
    port: int
    scheme: str
    logins: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    redirects: dict[str, str] = field(default_factory=dict)  # of a path's beginning, to a URL
    protocol: bool = True  # whether protocol 2 is spoken
    failing: list[int] = field(default_factory=list)  # statuses of the next requests
    duration: int = 0  # seconds that the answer to a fetch takes

    def url(self, name: str, login: str = "") -> str:
        return f"{self.scheme}://{login and login + '@'}127.0.0.1:{self.port}/{name}.git"

    @property
    def fetches(self) -> list[str]:
        """The repositories that something was fetched from, in order."""
        return [
            path.split(".git/")[0].strip("/")
            for method, path, headers in self.requests
            if method == "POST" and headers.get("x-command") == "fetch"
        ]


def _handler(server: HttpServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self._serve(b"")

        def do_POST(self) -> None:
            if self.headers.get("transfer-encoding", "") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
            self._serve(body)

        def _serve(self, body: bytes) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            if b"command=fetch" in body or b"want " in body:
                headers["x-command"] = "fetch"
            server.requests.append((self.command, self.path, headers))
            if server.failing:
                self._answer(server.failing.pop(0))
                return
            for start, target in server.redirects.items():
                if self.path.startswith(start):
                    self._answer(302, {"Location": target + self.path[len(start) :]})
                    return
            if server.logins and not self._allowed(headers.get("authorization", "")):
                self._answer(401, {"WWW-Authenticate": 'Basic realm="git"'})
                return
            self._backend(headers, body)

        def _allowed(self, authorization: str) -> bool:
            with suppress(ValueError):
                login = base64.b64decode(authorization.removeprefix("Basic ")).decode()
                user, _, password = login.partition(":")
                return server.logins.get(user) == password
            return False

        def _answer(self, status: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": "0", **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()

        def _backend(self, headers: dict[str, str], body: bytes) -> None:
            path, _, query = self.path.partition("?")
            env = {
                **CLEAN,
                "GIT_PROJECT_ROOT": str(server.root),
                "GIT_HTTP_EXPORT_ALL": "1",
                "PATH_INFO": unquote(path),
                "QUERY_STRING": query,
                "REQUEST_METHOD": self.command,
                "CONTENT_TYPE": headers.get("content-type", ""),
                "CONTENT_LENGTH": str(len(body)),
                "HTTP_CONTENT_ENCODING": headers.get("content-encoding", ""),
            }
            if server.protocol:
                env["GIT_PROTOCOL"] = headers.get("git-protocol", "")
            done = subprocess.run(["git", "http-backend"], input=body, capture_output=True, env=env)
            head, _, content = done.stdout.partition(b"\r\n\r\n")
            fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
            self.send_response(int(fields.pop("Status", "200").split()[0]))
            for name, value in fields.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(OSError):
                self._write(content, server.duration if headers.get("x-command") == "fetch" else 0)

        def _write(self, content: bytes, duration: int) -> None:
            each = len(content) // (duration * 4 + 1) + 1
            for at in range(0, len(content), each):
                if at:
                    time.sleep(0.25)
                self.wfile.write(content[at : at + each])

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that are killed


@contextmanager
def http_server(root: Path, certificate: Path | None = None, **options: Any) -> Iterator[HttpServer]:
    """``certificate``: a PEM file with a key, for TLS."""
    described = HttpServer(root, free_port(), "https" if certificate else "http", **options)
    server = _Server(("127.0.0.1", described.port), _handler(described))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield described
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def certificate(directory: Path) -> Path:
    """A self-signed certificate for 127.0.0.1 and github.com, with its key, in one file; cert.pem beside it
    has the certificate alone."""
    path = directory / "certificate.pem"
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(path)]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:github.com"]
    command = ["openssl", "req", "-x509", "-days", "2", *key, *name, "-out", str(directory / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + (directory / "cert.pem").read_bytes())
    return path


@contextmanager
def connect_proxy(target: int) -> Iterator[int]:
    """An HTTP proxy, at the port that it yields, for which every host is ``target`` on this machine."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
            with socket.create_connection(("127.0.0.1", target)) as upstream:
                self.wfile.write(b"HTTP/1.1 200 Connected\r\n\r\n")
                other = threading.Thread(target=pump, args=(upstream, self.connection), daemon=True)
                other.start()
                pump(self.connection, upstream)
                other.join(5)

    class Proxy(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    with Proxy(("127.0.0.1", 0), Handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield proxy.server_address[1]
        proxy.shutdown()
        thread.join()


# -- ssh -------------------------------------------------------------------------------------------------

USER = "flowagent-git"


@dataclass
class SshServer:
    """An sshd whose user has git-shell. ``directory`` is what a client has in ~/.ssh."""

    root: Path
    port: int
    host_key: str
    directory: Path
    process: subprocess.Popen[bytes]

    def url(self, name: str, user: str = USER) -> str:
        return f"ssh://{user}@127.0.0.1:{self.port}{self.root}/{name}.git"

    @property
    def known_host(self) -> str:
        return f"[127.0.0.1]:{self.port} {self.host_key}"


def keygen(path: Path, kind: str = "ed25519") -> str:
    """Make a key pair without a passphrase; its public half."""
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", path], check=True)
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


@contextmanager
def sshd(root: Path, directory: Path, *config: str) -> Iterator[SshServer]:
    """sshd on the repositories below ``root``; the keys of a client are put into ``directory``.

    Other users have to be able to enter both, see :func:`open_directory`."""
    try:
        pwd.getpwnam(USER)
    except KeyError:
        subprocess.run(["useradd", "--system", "--shell", "/usr/bin/git-shell", "-p", "*", USER], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    home = directory.parent / "sshd"
    home.mkdir()
    host_key = keygen(home / "host_key")
    authorized = home / "authorized_keys"
    authorized.write_text(keygen(directory / "id_ed25519") + "\n")
    authorized.chmod(0o644)
    port = free_port()
    (home / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host_key\nAuthorizedKeysFile {authorized}\n"
        f"UsePAM no\nStrictModes no\nPidFile none\nAcceptEnv GIT_PROTOCOL\nMaxStartups 100\n"
        + "\n".join(config)
    )
    # safe.directory: the repositories belong to whoever runs the tests
    (home / "gitconfig").write_text("[safe]\n\tdirectory = *\n[uploadpack]\n\tallowFilter = true\n")
    command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(home / "config")]
    command += ["-o", f"SetEnv=GIT_CONFIG_GLOBAL={home}/gitconfig"]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        wait_for(port, process)
        server = SshServer(root, port, host_key, directory, process)
        (directory / "known_hosts").write_text(server.known_host + "\n")
        yield server
    finally:
        process.terminate()
        process.wait()


@contextmanager
def git_daemon(root: Path) -> Iterator[int]:
    """``git daemon`` on the repositories below ``root``; its port."""
    port = free_port()
    process = subprocess.Popen(
        ["git", "daemon", f"--base-path={root}", "--export-all", "--listen=127.0.0.1", f"--port={port}"],
        env=CLEAN,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, process)
        yield port
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait()

"""A Docker engine and a registry of the tests' own, with images made of this machine's files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from tests.containers import images

PYTHON, BARE, OLD = "base/python:3.11", "base/bare:1", "base/old:1"
NEEDED = {
    "dockerd": "docker.io",
    "containerd": "containerd",
    "runc": "runc",
    "docker-init": "tini",
    "docker-registry": "docker-registry",
    "htpasswd": "apache2-utils",
    "busybox": "busybox-static",
}


def check_programs() -> None:
    """A missing component fails the tests, with the command that mends it."""
    places = os.pathsep.join([os.environ["PATH"], "/usr/libexec/docker", "/usr/lib/docker", "/usr/sbin"])
    missing = [package for program, package in NEEDED.items() if not shutil.which(program, path=places)]
    if "tini" in missing and shutil.which("tini"):
        missing.remove("tini")
    if missing:
        pytest.fail(f"apt-get install --no-install-recommends {' '.join(missing)}", pytrace=False)


class Engine:
    """dockerd below a directory, without a network of its own; containers live through its restarts. It
    listens on TCP, too, for those who have ``certificates``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.certificates = root / "certificates"
        self.secure_url = f"tcp://127.0.0.1:{free_port()}"
        self.socket = root / "docker.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if not self.certificates.exists():
            certify(self.certificates)
        ca, cert, key = (self.certificates / f"{name}.pem" for name in ("ca", "cert", "key"))
        with open(self.root / "log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    "dockerd", "--live-restore", "--iptables=false", "--ip6tables=false", "--bridge=none",
                    "--data-root", self.root / "data", "--exec-root", self.root / "exec",
                    "--pidfile", self.root / "pid", "-H", self.url, "-H", self.secure_url,
                    "--tlsverify", "--tlscacert", ca, "--tlscert", cert, "--tlskey", key,
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "HTTP_PROXY": "", "HTTPS_PROXY": "", "http_proxy": "", "https_proxy": ""},
            )  # fmt: skip
        wait_for(self._answers, 30, lambda: (self.root / "log").read_text()[-2000:])

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30)

    def close(self) -> None:
        for container in self.docker("ps", "-aq").split():
            self.docker("rm", "-fv", container)
        self.stop()

    def _answers(self) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.socket))
            connection.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b"200" in connection.recv(100)
        return False

    def docker(self, *arguments: str, code: int | None = 0, timeout: float = 60, **options: Any) -> str:
        """Run the docker command; what it printed."""
        done = subprocess.run(
            ["docker", *arguments],
            env={**os.environ, "DOCKER_HOST": self.url},
            capture_output=True,
            text=True,
            timeout=timeout,
            **options,
        )
        assert code is None or done.returncode == code, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def inspect(self, name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", name))
        return found[0]

    def containers(self) -> list[str]:
        """Names of flows' containers, ended ones too."""
        return self.docker("ps", "-a", "--filter", "label=flowagent.run", "--format", "{{.Names}}").split()

    def build_images(self) -> None:
        for name, make in (
            (PYTHON, images.with_python),
            (BARE, images.without_python),
            (OLD, images.with_old),
        ):
            archive = self.root / "image.tar"
            make(archive)
            self.docker("import", str(archive), name)
            archive.unlink()


class Registry:
    """docker-registry with one user, at an address of this machine."""

    USER, PASSWORD = "robot", "wall-e"

    def __init__(self, root: Path, address: str = "127.0.0.1") -> None:
        self.root = root
        root.mkdir(parents=True)
        self.address = address
        self.port = free_port()
        self.name = f"{address}:{self.port}"
        users = subprocess.run(
            ["htpasswd", "-Bbn", self.USER, self.PASSWORD], capture_output=True, text=True, check=True
        )
        (root / "users").write_text(users.stdout)
        (root / "config.yml").write_text(
            json.dumps(
                {
                    "version": 0.1,
                    "log": {"accesslog": {"disabled": True}},
                    "storage": {
                        "filesystem": {"rootdirectory": str(root / "data")},
                        "delete": {"enabled": True},
                    },
                    "http": {"addr": self.name},
                    "auth": {"htpasswd": {"realm": "tests", "path": str(root / "users")}},
                }
            )
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.root / "log", "ab") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", self.root / "config.yml"], stdout=log, stderr=log
            )
        wait_for(self._answers, 20, lambda: (self.root / "log").read_text()[-2000:])

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        with suppress(OSError):
            socket.create_connection((self.address, self.port), 1).close()
            return True
        return False

    def forget(self, image: str) -> None:
        """Delete an image, named by its digest."""
        name, _, digest = image.removeprefix(f"{self.name}/").partition("@")
        url = f"http://{self.name}/v2/{name}/manifests/{digest}"
        login = (self.USER, self.PASSWORD)
        assert httpx.delete(url, auth=login, trust_env=False).status_code == 202

    def login(self, directory: Path, password: str = PASSWORD) -> Mapping[str, str]:
        """Variables of somebody who has logged in."""
        import base64

        directory.mkdir(exist_ok=True)
        auth = base64.b64encode(f"{self.USER}:{password}".encode()).decode()
        (directory / "config.json").write_text(json.dumps({"auths": {self.name: {"auth": auth}}}))
        return {"DOCKER_CONFIG": str(directory)}


def certify(directory: Path) -> None:
    """Write an authority and a certificate of it, good for this machine and for whoever asks it."""
    directory.mkdir(parents=True)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    issued.private_key_pem.write_to_path(directory / "key.pem")


def wait_for(condition: Callable[[], bool], timeout: float, why: Callable[[], str]) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, why()
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])

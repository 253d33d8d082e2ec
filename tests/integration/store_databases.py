"""Real databases for the tests of the store: SQLite files, and a PostgreSQL server that is started for them.

A plugin: test modules name it in ``pytest_plugins``."""

from __future__ import annotations

import glob
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import anyio
import psycopg
import pytest

from flowagent.store import SQLStore, open_store

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


def _binaries() -> Path:
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
    initdb = found[-1] if found else shutil.which("initdb")
    if initdb is None:
        pytest.fail("PostgreSQL's server is not installed; mend it with: apt-get install -y postgresql")
    return Path(initdb).parent


def _server_user() -> str | None:
    """Whom the server runs as: it refuses to be root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server, without a database."""
    binaries, user, port = _binaries(), _server_user(), _free_port()
    directory = Path(tempfile.mkdtemp(prefix="flowagent-pg-", dir="/tmp"))
    if user:
        shutil.chown(directory, user)
    data = directory / "data"
    subprocess.run(
        [binaries / "initdb", "-D", data, "-U", "flowagent", "-A", "trust", "-E", "UTF8", "--no-sync"],
        check=True, user=user, cwd=directory, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with (directory / "log").open("w") as log:
        server = subprocess.Popen(
            [binaries / "postgres", "-D", data, "-k", directory, "-p", str(port),
             "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=200"],
            user=user, cwd=directory, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        url = f"postgresql://flowagent:secret@127.0.0.1:{port}"
        _wait_for(url, server, directory / "log")
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
        shutil.rmtree(directory)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(f"{url}/postgres").close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"PostgreSQL did not start:\n{log.read_text()}")
            time.sleep(0.05)


@pytest.fixture(scope="session")
def templates(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str], str]:
    """For each kind of database, one with the schema in it, made when first asked for."""
    made: dict[str, str] = {}

    async def make(url: str) -> None:
        await (await open_store(url)).close()

    def template(kind: str) -> str:
        if kind not in made:
            if kind == "sqlite":
                made[kind] = str(tmp_path_factory.mktemp("template") / "store.db")
                anyio.run(make, f"sqlite:///{made[kind]}")
            else:
                made[kind] = "template_store"
                url = request.getfixturevalue("postgresql")
                _create_database(url, made[kind], "template0")
                anyio.run(make, f"{url}/{made[kind]}")
        return made[kind]

    return template


def _create_database(url: str, name: str, template: str) -> None:
    with psycopg.connect(f"{url}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')


@pytest.fixture(params=["sqlite", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def empty_url(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A database without a schema."""
    if kind == "sqlite":
        return f"sqlite:///{tmp_path}/new/store.db"
    url = request.getfixturevalue("postgresql")
    name = f"empty_{next(_numbers)}"
    _create_database(url, name, "template0")
    return f"{url}/{name}"


@pytest.fixture
def url(kind: str, tmp_path: Path, request: pytest.FixtureRequest, templates: Callable[[str], str]) -> str:
    """An empty store."""
    template = templates(kind)
    if kind == "sqlite":
        shutil.copy(template, tmp_path / "store.db")
        return f"sqlite:///{tmp_path}/store.db"
    url = request.getfixturevalue("postgresql")
    name = f"store_{next(_numbers)}"
    _create_database(url, name, template)
    return f"{url}/{name}"


@pytest.fixture
async def store(url: str) -> AsyncIterator[SQLStore]:
    store = await open_store(url)
    yield store
    await store.close()

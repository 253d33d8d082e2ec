"""Mounts of a run's own, made by a child process, and the sockets that they cover."""

from __future__ import annotations

import errno
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import forked, refused

from flowagent.runtime import isolation, linux
from flowagent.runtime.limits import Limits
from flowagent.runtime.rundir import RunDirectory
from flowagent.runtime.sandbox import LANDLOCK, Rules, Sandbox


@pytest.fixture
def top() -> Iterator[Path]:
    """A directory whose path is short, as those of sockets have to be."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.fixture
def listening(top: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """Sockets below ``top``: three by their path, one by a link to it, one relative, one abstract."""
    monkeypatch.chdir(top)
    for name in ("granted", "runs/other.1/work", "runs/own.1/work", "empty"):
        (top / name).mkdir(parents=True)
    (top / "link").symlink_to(top)
    held = []
    for name, kind in (
        (f"{top}/a service", socket.SOCK_STREAM),
        (f"{top}/control", socket.SOCK_DGRAM),
        (f"{top}/granted/socket", socket.SOCK_STREAM),
        (f"{top}/link/runs/other.1/work/socket", socket.SOCK_SEQPACKET),
        ("relative", socket.SOCK_STREAM),
        (f"\0{top}/abstract", socket.SOCK_STREAM),
    ):
        held.append(socket.socket(socket.AF_UNIX, kind))
        held[-1].bind(name)
        if kind != socket.SOCK_DGRAM:
            held[-1].listen()
    yield held
    for each in held:
        each.close()


def test_what_is_bound_to_a_path_is_found_by_its_real_one(top: Path, listening: list[socket.socket]) -> None:
    bound = isolation.Bound()
    for _ in range(2):
        found = {path for path in bound.look() if path.startswith(str(top))}
        names = ("a service", "control", "granted/socket", "runs/other.1/work/socket")
        assert found == {f"{top}/{name}" for name in names}
    listening[0].close()
    assert f"{top}/a service" not in bound.look()


def test_all_of_them_are_covered_but_what_is_granted(top: Path, listening: list[socket.socket]) -> None:
    (top / "file").write_text("of the same name as a socket of another mount namespace")
    run = RunDirectory(top / "runs" / "own.1")
    rules = Rules(home="/nonexistent", runs=str(top / "runs"), covered=(str(top / "file"),))
    spec = {
        "grants": {"network": True, "read": [str(top / "granted")], "write": []},
        "bytecode": str(top),
        "readable": [],
    }

    def look() -> list[int | None]:
        sandbox = Sandbox(rules, isolates=True)
        linux.prctl(linux.PR_SET_DUMPABLE, 1)
        sandbox.make_ready()
        sandbox.confine(LANDLOCK, run, spec, Limits())

        def connect(name: str, kind: int = socket.SOCK_STREAM) -> int | None:
            with socket.socket(socket.AF_UNIX, kind) as client:
                return refused(lambda: client.connect(f"{top}/{name}"))

        return [
            connect("a service"),
            connect("control", socket.SOCK_DGRAM),
            connect("runs/other.1/work/socket", socket.SOCK_SEQPACKET),
            connect("granted/socket"),
            refused((top / "file").read_text),
        ]

    assert forked(look) == [errno.ECONNREFUSED, errno.ECONNREFUSED, errno.ENOENT, None, None]


@pytest.mark.parametrize("network", [True, False, {"connect": [443]}])
def test_names_of_hosts_are_looked_up_only_with_a_network(
    monkeypatch: pytest.MonkeyPatch, network: object
) -> None:
    names = {"/run/nscd/socket", "/run/systemd/resolve/io.systemd.Resolve"}
    others = {"/run/systemd/journal/dev-log", "/run/systemd/userdb/io.systemd.Multiplexer"}
    sandbox = Sandbox(Rules(home="/nonexistent", runs="/nonexistent/runs"), isolates=True)
    monkeypatch.setattr(sandbox._bound, "look", lambda: names | others | {"/run/systemd/io.systemd.Import"})
    found = sandbox._services((), network is not False)
    assert not found & others and "/run/systemd/io.systemd.Import" in found
    assert found & names == (names if network is False else set())

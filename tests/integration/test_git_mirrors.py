"""Mirrors of Git repositories under accidents: whatever is broken, the next run is a good one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from gitplace import Place, place
from tests.gitservers import Repository, free_port, git, http_server

from flowagent.errors import BackendError, SourceCacheError
from flowagent.sources import SourceCache
from flowagent_backends.git import mirrors

HERE = Path(__file__).parent


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    made = Repository.make(tmp_path / "repos", "one", flow="1", side="x = 1\n")
    made.commit(flow="2")
    return made


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Place]:
    async with place(tmp_path / "home") as made:
        yield made


def mirror_of(here: Place) -> Path:
    (found,) = (here.home / "mirrors").glob("*.git")
    return found


def pack_of(mirror: Path) -> Path:
    return next((mirror / "objects" / "pack").glob("*.pack"))


def left_over(here: Place) -> list[str]:
    """What nothing should have left in the home."""
    return [
        str(path)
        for path in here.home.rglob("*")
        if path.name.startswith((".tmp-", "tmp_"))
        # those of the caches themselves stay: a lock that is removed may be held by two
        or (path.suffix == ".lock" and path.parent.parent != here.home)
    ]


# -- broken in any way -----------------------------------------------------------------------------------


def _overwrite(file: Path, content: bytes) -> None:
    file.chmod(0o600)
    file.write_bytes(content)


def _truncate_pack(mirror: Path) -> None:
    pack = pack_of(mirror)
    _overwrite(pack, pack.read_bytes()[:40])


def _garbage_in_pack(mirror: Path) -> None:
    pack = pack_of(mirror)
    data = bytearray(pack.read_bytes())
    data[30:-25] = os.urandom(len(data) - 55)
    _overwrite(pack, bytes(data))


def _explode(mirror: Path) -> Path:
    """All objects as files of their own."""
    pack = pack_of(mirror)
    data = pack.read_bytes()
    shutil.rmtree(mirror / "objects" / "pack")
    (mirror / "objects" / "pack").mkdir()
    git("unpack-objects", "-q", cwd=mirror, stdin=data)
    return mirror


def _lose(kind: str) -> Callable[[Path], None]:
    def lose(mirror: Path) -> None:
        _explode(mirror)
        listed = git("cat-file", "--batch-all-objects", "--batch-check", cwd=mirror).splitlines()
        for oid in [line.split()[0] for line in listed if line.split()[1] == kind]:
            (mirror / "objects" / oid[:2] / oid[2:]).unlink()

    return lose


def _stale_locks(mirror: Path) -> None:
    names = "HEAD shallow config packed-refs index tmp_index objects/info/commit-graph info/sparse-checkout"
    names += " objects/pack/multi-pack-index refs/flowagent/HEAD refs/flowagent/heads/x"
    for name in names.split():
        lock = mirror / f"{name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    for name in ("objects/pack/tmp_pack_Ab12", "objects/pack/tmp_idx_x", "objects/pack/.tmp-7-pack-1.pack"):
        (mirror / name).write_bytes(b"PACK half")
    pack_of(mirror).with_suffix(".keep").write_text("fetch-pack 1 on host")


def _empty(mirror: Path) -> None:
    shutil.rmtree(mirror)
    mirror.mkdir()


def _file_instead(mirror: Path) -> None:
    shutil.rmtree(mirror)
    mirror.write_text("x")


BREAKS: dict[str, Callable[[Path], Any]] = {
    "truncated pack": _truncate_pack,
    "garbage in a pack": _garbage_in_pack,
    "pack without index": lambda mirror: pack_of(mirror).with_suffix(".idx").unlink(),
    "index without pack": lambda mirror: pack_of(mirror).unlink(),
    "lost blobs": _lose("blob"),
    "lost trees": _lose("tree"),
    "lost commits": _lose("commit"),
    "stale locks": _stale_locks,
    "lost refs": lambda mirror: shutil.rmtree(mirror / "refs"),
    "garbage in a ref": lambda mirror: (mirror / "refs/flowagent/HEAD").write_bytes(b"\xff\0rubbish"),
    "garbage in HEAD": lambda mirror: (mirror / "HEAD").write_bytes(b"\0\0\0"),
    "emptied HEAD": lambda mirror: (mirror / "HEAD").write_bytes(b""),
    "garbage in config": lambda mirror: (mirror / "config").write_bytes(b"[core\n\xff"),
    "no config": lambda mirror: (mirror / "config").unlink(),
    "garbage in shallow": lambda mirror: (mirror / "shallow").write_bytes(b"rubbish\n"),
    "garbage in packed-refs": lambda mirror: (mirror / "packed-refs").write_bytes(b"\0rubbish"),
    "no objects": lambda mirror: shutil.rmtree(mirror / "objects"),
    "an empty directory": _empty,
    "a file": _file_instead,
    "info is a file": lambda mirror: (shutil.rmtree(mirror / "info", True), (mirror / "info").touch()),
    "alternates that lead nowhere": lambda mirror: (mirror / "objects/info/alternates").write_text(
        "/nowhere\n"
    ),
}


@pytest.mark.parametrize("how", BREAKS)
async def test_a_broken_mirror_is_replaced(how: str, repository: Repository, here: Place) -> None:
    storage = here.of(str(repository.bare), clone_depth=2)
    assert await here.read(storage) == "2"
    BREAKS[how](mirror_of(here))
    (mirror_of(here) / "objects" / "info").mkdir(parents=True, exist_ok=True) if how.startswith("alt") else 0
    here.cache = SourceCache(here.home / "again")  # the same commit once more
    assert await here.tree(storage) == {"flow.py", "side.py"}
    assert await here.read(storage) == "2"
    BREAKS[how](mirror_of(here))
    repository.commit(flow="3")
    assert await here.read(storage) == "3"
    assert left_over(here) == []
    git("fsck", "--connectivity-only", cwd=mirror_of(here))


@pytest.mark.parametrize("options", [{}, {"clone_depth": 3}, {"sparse": ["flow.py"]}], ids=str)
async def test_whole_mirrors_are_kept_and_broken_ones_discarded(
    options: dict[str, Any], repository: Repository, here: Place
) -> None:
    for number in range(3):
        repository.commit(flow=f"more {number}")
    storage = here.of(repository.bare.as_uri(), **options)
    assert await here.read(storage) == "more 2"
    mirror = mirror_of(here)
    assert await here.backend.verify_mirrors() == [] and mirror.exists()
    data = bytearray(pack_of(mirror).read_bytes())
    data[len(data) // 2] ^= 1  # in the middle of what git would only see when it needs it
    _overwrite(pack_of(mirror), bytes(data))
    assert await here.backend.verify_mirrors() == [mirror.stem]
    assert not mirror.exists()
    shutil.rmtree(here.home / "sources")
    here.cache = SourceCache(here.home / "sources")
    assert await here.read(storage) == "more 2"
    _lose("blob" if not options.get("sparse") else "tree")(mirror_of(here))
    assert await here.backend.verify_mirrors() == [mirror.stem]


async def test_credentials_that_fail_leave_the_mirror_alone(repository: Repository, here: Place) -> None:
    with http_server(repository.bare.parent, logins={"me": "right"}) as server:
        storage = here.of(server.url("one", "me:right"))
        assert await here.read(storage) == "2"
        mirror = mirror_of(here)
        before = mirror.stat().st_ino, sorted(mirror.rglob("*"))
        server.logins["me"] = "other"
        repository.commit(flow="3")
        pinned = here.of(server.url("one", "me:right"), commit=repository.head)
        with pytest.raises(BackendError, match="access is refused"):
            await here.read(pinned)
        assert (mirror.stat().st_ino, sorted(mirror.rglob("*"))) == before
        server.logins["me"] = "right"
        assert await here.read(pinned) == "3"


async def test_a_branch_that_becomes_a_directory_of_branches(repository: Repository, here: Place) -> None:
    repository.branch("a")
    repository.commit(flow="a")
    assert await here.read(here.of(str(repository.bare), branch_name="a")) == "a"
    inode = mirror_of(here).stat().st_ino
    repository.git("push", "-q", "origin", ":a")
    repository.git("checkout", "-q", "--detach")
    repository.git("branch", "-D", "a")
    repository.branch("a/b")
    repository.commit(flow="b")
    assert await here.read(here.of(str(repository.bare), branch_name="a/b")) == "b"
    assert mirror_of(here).stat().st_ino == inode


@pytest.mark.parametrize(
    "options", [{}, {"sparse": ["flow.py"]}, {"clone_depth": 2}, {"clone_depth": 0}], ids=str
)
async def test_many_packs_are_joined(
    options: dict[str, Any], repository: Repository, here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "MANY_PACKS", 3)
    with http_server(repository.bare.parent) as server:
        storage = here.of(server.url("one"), **options)
        for number in range(8):
            repository.commit(flow=f"v{number}")
            assert await here.read(storage) == f"v{number}"
            assert len(list((mirror_of(here) / "objects" / "pack").glob("*.pack"))) <= 5
        assert await here.backend.verify_mirrors() == []
        repository.commit(flow="after")
        assert await here.read(storage) == "after"


async def test_a_join_that_fails_fails_nothing(
    repository: Repository, here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "MANY_PACKS", 0)
    storage = here.of(str(repository.bare))
    assert await here.read(storage) == "2"
    (mirror_of(here) / "refs" / "broken").write_text("rubbish")
    repository.commit(flow="3")
    assert await here.read(storage) == "3"


@pytest.mark.parametrize("kind", ["lost", "damaged"])
async def test_a_base_of_what_comes_is_broken(kind: str, repository: Repository, here: Place) -> None:
    lines = [os.urandom(30).hex() + "\n" for _ in range(400)]
    repository.commit(flow="".join(lines))
    storage = here.of(repository.bare.as_uri())
    await here.read(storage)
    mirror = mirror_of(here)
    if kind == "lost":
        _lose("blob")(mirror)
    else:
        _garbage_in_pack(mirror)
    repository.commit(flow="".join([*lines, "end"]))  # which comes as what is new in it
    assert (await here.read(storage)).endswith("end")


@pytest.mark.parametrize("how", ["emptied HEAD", "garbage in config", "truncated pack", "lost commits"])
async def test_a_broken_mirror_of_an_abbreviated_commit(
    how: str, repository: Repository, tmp_path: Path
) -> None:
    commit = repository.head
    repository.commit(flow="3")
    for _ in range(2):
        async with place(tmp_path / "home") as here:
            revision = await here.backend.resolve(here.of(str(repository.bare), commit=commit[:9]))
            assert revision.id == commit
            BREAKS[how](mirror_of(here))


# -- closed to us, and no room: as another user, on a disk of its own ----------------------------------

CHILD = """
import sys, anyio
from pathlib import Path
sys.path.insert(0, {here!r})
from gitplace import place
async def main():
    async with place(Path({home!r})) as it:
        try:
            print(await it.read(it.of({url!r}, **{options!r})))
        except Exception as error:
            print(type(error).__name__, error)
anyio.run(main)
"""


def child(home: Path, url: str, **options: Any) -> list[str]:
    """An agent in a process of its own, which reads flow.py."""
    code = CHILD.format(here=str(HERE), home=str(home), url=url, options=options)
    return [sys.executable, "-c", code]


def test_a_mirror_that_is_closed_to_us(repository: Repository, tmp_path: Path) -> None:
    home = tmp_path / "home"
    # modes bind root too, once it has no capability
    bound = ["setpriv", "--bounding-set=-all"] if os.getuid() == 0 else []

    def run() -> str:
        command = bound + child(home, str(repository.bare), commit=repository.head)
        done = subprocess.run(command, capture_output=True, text=True)
        assert not done.stderr, done.stderr
        return done.stdout.strip()

    assert run() == "2"
    for closed in ("", "objects", "objects/pack", "refs"):
        (mirror,) = (home / "mirrors").glob("*.git")
        (mirror / closed).chmod(0)
        shutil.rmtree(home / "sources")
        assert run() == "2", closed
    assert [path.name for path in (home / "mirrors").glob(".tmp-*")] == []


def test_a_full_disk_is_said_and_passes(tmp_path: Path) -> None:
    repository = Repository.make(tmp_path / "repos", "one", flow="1")
    repository.write("big.bin", os.urandom(5 << 20))
    repository.commit(flow="2")
    home = tmp_path / "small"
    home.mkdir()
    ready = repository.bare
    program = f"""
import os, shutil, subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "none", {str(home)!r}], check=True)
command = {child(home, str(ready))!r}
for size in ("4m", "8m", "40m"):
    subprocess.run(["mount", "-o", f"remount,size={{size}}", {str(home)!r}], check=True)
    subprocess.run(command, check=True)
    left = [n for d, _, f in os.walk({str(home)!r}) for n in f if n.startswith("tmp_")]
    print(left, flush=True)
"""
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    fetching, _, writing, _, good, left = done.stdout.splitlines()
    for said in (fetching, writing):
        assert "Git:" in said or "Git source" in said
        assert "flowagent cache prune" in said, said
    assert good == "2"
    assert done.stdout.count("[]") == 3 and left == "[]"


# -- kills -----------------------------------------------------------------------------------------------


@contextmanager
def slow_daemon(root: Path) -> Iterator[tuple[int, threading.Event, threading.Event]]:
    """``git daemon`` behind a relay that stops in the middle of a pack: port, "it has stopped", "go on"."""
    import socketserver

    from tests.gitservers import git_daemon

    stopped, go_on = threading.Event(), threading.Event()
    with git_daemon(root) as target:
        import socket

        class Relay(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", target)) as upstream, suppress(OSError):

                    def up() -> None:
                        with suppress(OSError):
                            while data := self.request.recv(1 << 16):
                                upstream.sendall(data)
                            upstream.shutdown(socket.SHUT_WR)

                    threading.Thread(target=up, daemon=True).start()
                    total = 0
                    while data := upstream.recv(1 << 14):
                        total += len(data)
                        self.request.sendall(data)
                        if total > 1 << 19:
                            stopped.set()
                            go_on.wait(60)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        port = free_port()
        with Server(("127.0.0.1", port), Relay) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            try:
                yield port, stopped, go_on
            finally:
                go_on.set()
                server.shutdown()


def processes(home: Path) -> set[int]:
    """The git processes that work in a home."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (
                str(home).encode() in (directory / "environ").read_bytes()
                and b"GIT_DIR=" in (directory / "environ").read_bytes()
            ):
                found.add(int(directory.name))
    return found


@pytest.fixture
def large(tmp_path: Path) -> Repository:
    made = Repository.make(tmp_path / "repos", "large", flow="1")
    made.write("big.bin", os.urandom(2 << 20))
    made.commit(flow="2")
    return made


def test_an_agent_is_killed_in_the_middle_of_a_fetch(large: Repository, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with slow_daemon(large.bare.parent) as (port, stopped, go_on):
        url = f"git://127.0.0.1:{port}/large.git"
        first = subprocess.Popen(child(home, url))
        assert stopped.wait(60)
        first.kill()
        first.wait()
        orphans = processes(home)
        assert orphans  # git goes on, and has the lock
        second = subprocess.Popen(child(home, url), stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(2)
        go_on.set()
        said, _ = second.communicate(timeout=60)
        assert said.strip() == "2"
    (mirror,) = (home / "mirrors").glob("*.git")
    git("fsck", "--strict", cwd=mirror)


def test_an_agent_and_its_git_are_killed_in_the_middle_of_a_fetch(large: Repository, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with slow_daemon(large.bare.parent) as (port, stopped, go_on):
        url = f"git://127.0.0.1:{port}/large.git"
        first = subprocess.Popen(child(home, url))
        assert stopped.wait(60)
        deadline = time.monotonic() + 30
        while not list(home.rglob("tmp_pack_*")):  # git takes a moment to write what it was sent
            assert time.monotonic() < deadline
            time.sleep(0.01)
        first.kill()
        first.wait()
        for pid in processes(home):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        go_on.set()
        done = subprocess.run(child(home, url), capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "2", done.stderr
        assert not list(home.rglob("tmp_pack_*"))


async def test_an_agent_is_killed_in_the_middle_of_a_checkout(tmp_path: Path) -> None:
    repository = Repository.make(tmp_path / "repos", "wide", flow="1")
    for number in range(6000):
        repository.write(f"d/{number}.txt", "x")
    repository.commit(flow="2")
    for number in range(10):  # it is over in a moment, which one may miss
        home = tmp_path / f"home-{number}"
        process = subprocess.Popen(child(home, str(repository.bare)), stdout=subprocess.DEVNULL)
        while process.poll() is None and not list((home / "sources").glob(".tmp-*/source/d")):
            await anyio.sleep(0.002)
        process.kill()
        process.wait()
        if list((home / "sources").glob(".tmp-*")):
            break
    else:
        pytest.fail("it was never seen in the middle of a checkout")
    async with place(home) as here:
        await here.cache.sweep()
        storage = here.of(str(repository.bare))
        assert len(await here.tree(storage)) == 6001
        with anyio.fail_after(10):  # its git may outlive it for a moment, and goes on writing
            while left_over(here):
                await anyio.sleep(0.05)
                await here.cache.prune()


async def test_two_agents_on_one_cache_fetch_once(large: Repository, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with http_server(large.bare.parent) as server:
        both = [
            subprocess.Popen(child(home, server.url("large")), stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        assert [process.communicate(timeout=60)[0].strip() for process in both] == ["2", "2"]
        assert server.fetches == ["large"]


# -- cancelled, late -------------------------------------------------------------------------------------


async def test_cancellation_leaves_nothing(large: Repository, here: Place) -> None:
    with slow_daemon(large.bare.parent) as (port, stopped, go_on):
        storage = here.of(f"git://127.0.0.1:{port}/large.git")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(here.hold, storage)
            assert await anyio.to_thread.run_sync(stopped.wait, 60)
            assert processes(here.home)
            tasks.cancel_scope.cancel()
        assert processes(here.home) == set()
        assert left_over(here) == []
        go_on.set()
        assert await here.read(storage) == "2"


async def test_a_fetch_that_takes_too_long_ends(large: Repository, here: Place) -> None:
    with slow_daemon(large.bare.parent) as (port, _, _):
        storage = here.of(f"git://127.0.0.1:{port}/large.git", commit=large.head)
        here.cache = SourceCache(here.home / "sources", timeout=2.0)
        begun = time.monotonic()
        with pytest.raises(SourceCacheError, match="took longer than"):
            await here.read(storage)
        assert time.monotonic() - begun < 30
        assert processes(here.home) == set() and left_over(here) == []

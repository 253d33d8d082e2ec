from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from flowagent import locks
from flowagent.backend import Entry, Revision
from flowagent.errors import BackendError, SourceCacheError, StorageNotFoundError
from flowagent.sources import Source, SourceCache, mirrors, trees
from flowagent.sources.upkeep import Upkeep


class Files:
    """A backend that writes what the storage says: ``{path: content}``; links as ``-> target``."""

    type = "Files"

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.calls = 0

    async def materialise(self, storage: Mapping[str, Any], revision: Revision, directory: Path) -> None:
        self.calls += 1
        for name, content in storage.items():
            path = directory / name
            for parent in reversed(path.relative_to(directory).parents):
                (directory / parent).mkdir(exist_ok=True)
            if content == "fifo":
                os.mkfifo(path)
            elif content.startswith("-> "):
                path.symlink_to(content[3:])
            else:
                path.write_text(content)
        await anyio.sleep(self.delay)


class Full(Files):
    """A backend whose disk is full after the first file."""

    async def materialise(self, storage: Mapping[str, Any], revision: Revision, directory: Path) -> None:
        await super().materialise(storage, revision, directory)
        Path("/dev/full").write_bytes(b"x")


def revision(name: str = "r1") -> Revision:
    return Revision(name, Entry("script", "flow.py"))


TREE = {"flow.py": "print(1)\n", "lib/a.txt": "a" * 1000, "link.py": "-> flow.py", "lib/up": "-> ../flow.py"}


def names(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if not name.endswith((".lock", ".lease")))


async def test_a_miss_is_published_whole_and_read_only_and_a_hit_asks_nobody(tmp_path: Path) -> None:
    backend, cache = Files(), SourceCache(tmp_path)
    directory = await cache.acquire(backend, TREE, revision())
    assert (directory / "flow.py").read_text() == (directory / "lib" / "up").read_text() == "print(1)\n"
    for path in (directory, *directory.rglob("*")):
        assert path.is_symlink() or not path.stat().st_mode & 0o222
    manifest = json.loads((directory.parent / "manifest.json").read_text())
    assert (manifest["backend"], manifest["revision"]) == ("Files", "r1")
    assert (manifest["bytes"], manifest["files"]) == (1009, 2)
    assert await cache.acquire(backend, TREE, revision()) == directory
    assert await SourceCache(tmp_path).acquire(backend, TREE, revision()) == directory
    assert backend.calls == 1


async def test_a_hit_takes_no_lock(tmp_path: Path) -> None:
    backend, cache = Files(), SourceCache(tmp_path, timeout=0.2)
    directory = await cache.acquire(backend, TREE, revision())
    held = locks.try_lock(directory.parent.with_suffix(".lock"), locks.EXCLUSIVE)
    assert held is not None
    assert await SourceCache(tmp_path, timeout=0.2).acquire(backend, TREE, revision()) == directory
    os.close(held)


async def test_a_source_in_place_is_used_as_it_is(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path / "cache")
    in_place = Revision("x", Entry("script", "flow.py"), directory=tmp_path)
    source = await cache.hold(Files(), {}, in_place)
    assert source == Source(tmp_path, None)
    source.close()
    assert os.listdir(tmp_path / "cache") == []


async def test_many_that_ask_at_once_are_served_by_one(tmp_path: Path) -> None:
    backend, cache = Files(0.1), SourceCache(tmp_path)
    found: list[Path] = []

    async def ask() -> None:
        found.append(await cache.acquire(backend, TREE, revision()))

    async with anyio.create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(ask)
    assert len(found) == 50
    assert len(set(found)) == 1
    assert backend.calls == 1


async def test_a_first_that_is_cancelled_does_not_fail_the_others(tmp_path: Path) -> None:
    backend, cache = Files(0.2), SourceCache(tmp_path)
    found: list[Path] = []

    async def ask() -> None:
        found.append(await cache.acquire(backend, TREE, revision()))

    async with anyio.create_task_group() as tasks, anyio.create_task_group() as first:
        first.start_soon(ask)
        await anyio.sleep(0.05)
        tasks.start_soon(ask)
        tasks.start_soon(ask)
        await anyio.sleep(0.05)
        first.cancel_scope.cancel()
    assert len(found) == 2
    assert backend.calls == 2
    assert [name for name in names(tmp_path) if name.startswith(".tmp-")] == []


async def test_a_failure_is_told_to_all_that_waited_and_forgotten_then(tmp_path: Path) -> None:
    class Failing(Files):
        async def materialise(self, storage: Any, revision: Revision, directory: Path) -> None:
            await super().materialise(storage, revision, directory)
            raise BackendError("Files: no luck")

    backend, cache = Failing(0.05), SourceCache(tmp_path)
    errors: list[BackendError] = []

    async def ask() -> None:
        try:
            await cache.acquire(backend, TREE, revision())
        except BackendError as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(ask)
    assert len(errors) == 5
    assert backend.calls == 1
    assert names(tmp_path) == []
    assert (await cache.acquire(Files(), TREE, revision())).is_dir()


async def test_a_full_disk_is_one_line_and_publishes_nothing(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)
    with pytest.raises(
        SourceCacheError, match=r"Files source r1 .*No space left on device; free space"
    ) as caught:
        await cache.acquire(Full(), TREE, revision())
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "tree",
    [
        {"a": "-> /etc/passwd"},
        {"a": "-> ../x"},
        {"d/a": "-> ../../manifest.json"},
        {"d/e": "-> ..", "b": "-> d/e/../.."},
        {"loop": "-> loop", "out": "-> ../../.."},
    ],
)
async def test_a_link_that_leads_out_is_refused(tmp_path: Path, tree: dict[str, str]) -> None:
    with pytest.raises(SourceCacheError, match=r"symbolic link .* leads out"):
        await SourceCache(tmp_path).acquire(Files(), tree, revision())
    assert names(tmp_path) == []


async def test_a_tree_deeper_than_the_stack_of_python(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)
    deep = "/".join("d" * 1100) + "/f"
    directory = await cache.acquire(Files(), {deep: "x"}, revision())
    assert (directory / deep).read_text() == "x"
    assert await cache.verify() == []
    assert len(await cache.prune(max_bytes=0)) == 1
    assert names(tmp_path) == []


def dig(directory: Path, names: list[str], mode: int = 0o700) -> None:
    """Directories in one another, however long their path gets, with a file and a link out in the last."""
    here = os.open(directory, os.O_RDONLY)
    above = []
    for name in names:
        os.mkdir(name, dir_fd=here)
        above.append(here)
        here = os.open(name, os.O_RDONLY, dir_fd=here)
    os.close(os.open("f", os.O_CREAT | os.O_WRONLY, 0o400, dir_fd=here))
    os.symlink(directory.parent.parent, "out", dir_fd=here)
    for descriptor in (here, *reversed(above)):
        os.fchmod(descriptor, mode)
        os.close(descriptor)


class Deep(Files):
    """A backend whose tree has a path longer than the system takes in one piece."""

    async def materialise(self, storage: Mapping[str, Any], revision: Revision, directory: Path) -> None:
        dig(directory, ["d" * 200] * 30)


async def test_a_path_that_is_too_long_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)
    with pytest.raises(
        SourceCacheError, match=r"r1 .*: File name too long; a path in the source is too long"
    ) as caught:
        await cache.acquire(Deep(), {}, revision())
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


async def test_a_source_that_can_be_read_when_it_is_made_can_be_when_it_is_published(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)
    above = len(os.fspath(cache.lease_path(Files(), revision()).with_suffix("") / "source"))  # type: ignore[arg-type]
    room = 4095 - above
    parts = ["d" * 200] * (room // 201)
    for length in (room - 30, room + 30):  # of the path of the file in it, with the slash before
        name = "/".join([*parts, "f" * (length - 201 * len(parts) - 1)])
        one = revision(f"r{length}")
        if length > room:
            with pytest.raises((SourceCacheError, OSError), match="File name too long"):
                await cache.acquire(Files(), {name: "x"}, one)
        else:
            assert (await cache.acquire(Files(), {name: "x"}, one) / name).read_text() == "x"


def test_leftovers_of_any_depth_are_swept_by_who_is_not_root() -> None:
    place = Path(tempfile.mkdtemp())

    def sweep() -> None:
        root = place / "sources"
        (root / ".tmp-1").mkdir(parents=True)
        (root / ".tmp-2").mkdir()
        (place / "kept").write_text("x")
        dig(root / ".tmp-1", ["d" * 200] * 30, 0o500)
        dig(root / ".tmp-2", ["d"] * 5000, 0)  # by far more than files may be open
        os.chmod(root / ".tmp-2", 0o500)
        assert anyio.run(SourceCache(root).sweep) == 2
        assert os.listdir(root) == []
        assert (place / "kept").read_text() == "x"
        assert place.stat().st_mode & 0o777 == 0o711  # the link was not followed

    try:
        place.chmod(0o711)
        if os.geteuid() == 0:
            os.chown(place, 65534, 65534)
            as_nobody(sweep)
        else:
            sweep()
    finally:
        trees.remove(place)


def test_a_tree_may_be_removed_by_many_at_once(tmp_path: Path) -> None:
    tree, failed = tmp_path / "a" / "tree", []
    for one in range(20):
        for two in range(20):
            (tree / str(one) / str(two) / "deep" / "er").mkdir(parents=True)
            (tree / str(one) / str(two) / "f").touch()

    def remove() -> None:
        try:
            trees.remove(tree)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=remove) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and not tree.exists()


async def test_what_is_neither_file_nor_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceCacheError, match="d/pipe in the source is neither"):
        await SourceCache(tmp_path).acquire(Files(), {"d/pipe": "fifo"}, revision())


async def test_waiting_for_a_lock_and_materialising_have_deadlines(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path, timeout=0.1)
    with pytest.raises(SourceCacheError, match=r"it took longer than 0.1 s"):
        await cache.acquire(Files(5), TREE, revision())
    lock = cache.lease_path(Files(), revision()).with_suffix(".lock")  # type: ignore[arg-type]
    held = locks.try_lock(lock, locks.EXCLUSIVE)
    assert held is not None
    with pytest.raises(SourceCacheError, match=r"not free within 0.1 s"):
        await cache.acquire(Files(), TREE, revision())
    os.close(held)
    assert (await cache.acquire(Files(), TREE, revision())).is_dir()


CHILD = """
    import sys, time, anyio
    from pathlib import Path
    from flowagent.backend import Entry, Revision
    from flowagent.sources import SourceCache

    class Slow:
        type = "Files"
        async def materialise(self, storage, revision, directory):
            with open(sys.argv[2], "a") as calls:
                calls.write("x")
            (directory / "flow.py").write_text("print(1)")
            print("filling", flush=True)
            await anyio.sleep(float(sys.argv[3]))

    async def main():
        cache = SourceCache(Path(sys.argv[1]))
        source = await cache.hold(Slow(), {}, Revision("r1", Entry("script", "flow.py")))
        print(source.directory, flush=True)
        if len(sys.argv) > 4:
            await anyio.sleep(float(sys.argv[4]))

    anyio.run(main)
"""


def child(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


async def test_processes_that_ask_at_once_are_served_by_one(tmp_path: Path) -> None:
    children = [child(tmp_path / "cache", tmp_path / "calls", 0.5) for _ in range(4)]
    lines = [process.communicate(timeout=60)[0].split() for process in children]
    assert all(process.returncode == 0 for process in children)
    assert len({found[-1] for found in lines}) == 1
    assert (tmp_path / "calls").read_text() == "x"


@pytest.mark.parametrize("remove", [SourceCache.sweep, SourceCache.prune])
async def test_a_kill_leaves_only_what_the_next_sweep_removes(
    remove: Callable[[SourceCache], Awaitable[object]], tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    killed = child(root, tmp_path / "calls", 60)
    living = None
    try:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "filling\n"
        cache = SourceCache(root)
        await remove(cache)
        assert len(names(root)) == 1  # it is being filled: not to be touched
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        left = names(root)
        assert len(left) == 1
        assert left[0].startswith(".tmp-")
        await remove(cache)
        assert names(root) == []
        living = child(root, tmp_path / "calls", 0)
        assert living.wait(60) == 0
    finally:
        for process in (killed, living):
            if process is not None:
                process.kill()
                process.communicate()


async def test_a_held_source_is_not_collected_though_its_first_holder_closed(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)
    source = await cache.hold(Files(), TREE, revision())
    assert source.lease is not None
    sleeper = subprocess.Popen(["sleep", "60"], pass_fds=[source.lease])
    source.close()
    try:
        assert [entry.in_use for entry in await cache.entries()] == [True]
        assert await cache.prune(max_bytes=0) == []
        assert source.directory.is_dir()
    finally:
        sleeper.kill()
        sleeper.wait()
    assert [entry.revision for entry in await cache.prune(max_bytes=0)] == ["r1"]
    assert os.listdir(tmp_path) == []
    with await cache.hold(Files(), TREE, revision()) as again:
        assert again.directory.is_dir()


async def test_a_flow_that_is_not_in_its_source_is_said_with_what_is_near(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)
    tree = {"flows/etl.py": "", "flows/other.py": "", "readme": ""}
    for path, near in [
        ("etl.py", "did you mean flows/etl.py?"),
        ("flows/elt.py", "did you mean flows/etl.py"),
    ]:
        with pytest.raises(StorageNotFoundError, match=f"Files source r1 has no file '{path}'; {near}"):
            await cache.hold(Files(), tree, Revision("r1", Entry("script", path)))
    assert [entry.in_use for entry in await cache.entries()] == [False]


async def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)
    now = time.time()
    for number in range(5):
        (await cache.hold(Files(), {"flow.py": "x" * 100}, revision(f"r{number}"))).close()
        os.utime(cache.lease_path(Files(), revision(f"r{number}")), (0, now - 1000 * (5 - number)))  # type: ignore[arg-type]
    (await cache.hold(Files(), {}, revision("r0"))).close()  # used again
    assert [entry.revision for entry in await cache.entries()] == ["r1", "r2", "r3", "r4", "r0"]
    assert [entry.revision for entry in await cache.prune(max_bytes=400)] == ["r1"]
    assert [entry.revision for entry in await cache.prune(max_age=2500)] == ["r2"]
    assert [entry.revision for entry in await cache.prune(max_bytes=0, keep=2)] == ["r3"]
    assert await cache.prune() == []
    assert [entry.revision for entry in await cache.entries()] == ["r4", "r0"]


async def test_holding_and_collecting_at_once_never_loses_a_held_source(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)
    pruned = 0

    async def hold() -> None:
        for _ in range(40):
            with await cache.hold(Files(), TREE, revision()) as source:
                await anyio.sleep(0.001)
                assert (source.directory / "flow.py").is_file()
            await anyio.sleep(0.001)

    async def collect(stop: anyio.Event) -> None:
        nonlocal pruned
        while not stop.is_set():
            pruned += len(await cache.prune(max_bytes=0))
            await anyio.sleep(0)

    stop = anyio.Event()
    async with anyio.create_task_group() as collector:
        collector.start_soon(collect, stop)
        async with anyio.create_task_group() as holders:
            for _ in range(3):
                holders.start_soon(hold)
        stop.set()
    assert pruned > 0


async def test_a_lock_on_a_file_that_was_unlinked_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    first = locks.try_lock(path, locks.EXCLUSIVE)
    assert first is not None
    stale = os.open(path, os.O_RDWR)
    path.unlink()
    second = locks.try_lock(path, locks.EXCLUSIVE)
    assert second is not None
    assert os.fstat(second).st_ino == path.stat().st_ino
    assert locks.try_lock(path, locks.SHARED) is None
    assert locks.held(path)
    for descriptor in (first, second, stale):
        os.close(descriptor)
    assert not locks.held(path)
    assert not locks.held(tmp_path / "none")


def rewrite(path: Path, text: str) -> None:
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_text(text)
    path.chmod(mode)


async def test_what_is_broken_is_found_and_rebuilt(tmp_path: Path) -> None:
    backend, cache = Files(), SourceCache(tmp_path)
    directory = await cache.acquire(backend, TREE, revision())
    await cache.acquire(backend, TREE, revision("good"))
    assert await cache.verify() == []
    rewrite(directory / "flow.py", "print(2)\n")
    assert [entry.revision for entry in await cache.verify()] == ["r1"]
    again = await cache.acquire(backend, TREE, revision())
    assert (again / "flow.py").read_text() == "print(1)\n"
    assert backend.calls == 3


async def test_after_a_boot_a_source_is_read_once_before_it_is_served(tmp_path: Path) -> None:
    backend = Files()
    directory = await SourceCache(tmp_path).acquire(backend, TREE, revision())
    manifest = directory.parent / "manifest.json"
    earlier = json.dumps({**json.loads(manifest.read_text()), "boot": "an earlier one"})
    rewrite(manifest, earlier)
    assert await SourceCache(tmp_path).acquire(backend, TREE, revision()) == directory
    assert backend.calls == 1
    assert json.loads(manifest.read_text())["boot"] != "an earlier one"
    rewrite(manifest, earlier)
    rewrite(directory / "flow.py", "")  # as a power cut leaves it
    await SourceCache(tmp_path).acquire(backend, TREE, revision())
    assert backend.calls == 2
    assert (directory / "flow.py").read_text() == "print(1)\n"
    manifest.unlink()
    await SourceCache(tmp_path).acquire(backend, TREE, revision())
    assert backend.calls == 3


def test_read_only_trees_are_removed_by_who_is_not_root() -> None:
    place = Path(tempfile.mkdtemp())  # pytest's own directories are closed to other users
    tree = place / "tree"

    def seal_and_remove() -> None:
        (tree / "a" / "b").mkdir(parents=True)
        (tree / "a" / "b" / "f").write_text("x")
        (tree / "to").symlink_to("a")
        (tree / "gone").symlink_to("none")
        trees.seal(tree)
        with pytest.raises(PermissionError):
            (tree / "a" / "new").touch()
        (tree / "a" / "b").chmod(0)
        trees.remove(tree)

    try:
        if os.geteuid() != 0:
            seal_and_remove()
        else:
            os.chown(place, 65534, 65534)
            as_nobody(seal_and_remove)
        assert os.listdir(place) == []
    finally:
        trees.remove(place)


def as_nobody(action: Callable[[], None]) -> None:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forks beside threads
        pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


# -- mirrors and sources together -------------------------------------------------------------------------


def mirror(root: Path, key: str, size: int = 100, age: float = 0.0) -> Path:
    """What a backend leaves of its mirror: a directory, and a lock whose time says when it was last used."""
    made = root / f"{key}.git"
    (made / "objects").mkdir(parents=True)
    (made / "objects" / "pack").write_bytes(b"x" * size)
    lock = root / f"{key}.lock"
    lock.touch()
    os.utime(lock, (0, time.time() - age))
    return made


@contextmanager
def locked(path: Path) -> Iterator[None]:
    lock = locks.try_lock(path, locks.EXCLUSIVE)
    assert lock is not None
    try:
        yield
    finally:
        os.close(lock)


@pytest.fixture
async def upkeep(tmp_path: Path) -> Upkeep:
    """Three sources of 100 bytes and three mirrors as large, not used for 10, 20 and 30 days."""
    cache = SourceCache(tmp_path / "sources")
    for days in (10, 20, 30):
        await cache.acquire(Files(), {"flow.py": "x" * 100}, revision(f"r{days}"))
        lease = cache.lease_path(Files(), revision(f"r{days}"))  # type: ignore[arg-type]
        lease.touch()
        os.utime(lease, (0, time.time() - days * 86400))
        mirror(tmp_path / "mirrors", f"m{days}", age=days * 86400)
    return Upkeep(tmp_path / "sources", tmp_path / "mirrors")


def pruned(upkeep: Upkeep, max_bytes: int | None, max_age: float | None) -> list[str]:
    removed = upkeep.prune(max_bytes, max_age)
    return [entry.revision for entry in removed.sources] + [entry.key for entry in removed.mirrors]


async def test_sources_go_before_mirrors_and_the_least_recently_used_before_others(upkeep: Upkeep) -> None:
    assert upkeep.bytes() == 600
    assert pruned(upkeep, 600, None) == []
    assert pruned(upkeep, 500, None) == ["r30"]
    assert pruned(upkeep, 250, None) == ["r20", "r10", "m30"]
    assert upkeep.bytes() == 200
    assert pruned(upkeep, 0, None) == ["m20", "m10"]
    assert os.listdir(upkeep.sources) == os.listdir(upkeep.mirrors) == []


async def test_age_counts_for_sources_and_for_mirrors(upkeep: Upkeep) -> None:
    assert pruned(upkeep, None, None) == []
    assert pruned(upkeep, None, 15 * 86400) == ["r30", "r20", "m30", "m20"]


async def test_neither_sources_nor_mirrors_in_use_are_collected(upkeep: Upkeep) -> None:
    lease = SourceCache(upkeep.sources).lease_path(Files(), revision("r20"))  # type: ignore[arg-type]
    with locked(lease), locked(upkeep.mirrors / "m30.lock"):
        assert pruned(upkeep, 0, 1.0) == ["r30", "r10", "m20", "m10"]
    assert pruned(upkeep, 0, None) == ["r20", "m30"]


async def test_a_cache_without_mirrors_is_kept_too(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path / "sources")
    await cache.acquire(Files(), TREE, revision())
    assert pruned(Upkeep(tmp_path / "sources", tmp_path / "mirrors"), 0, None) == ["r1"]
    assert not (tmp_path / "mirrors").exists()


def test_a_killed_prune_does_not_stop_the_next(tmp_path: Path) -> None:
    mirror(tmp_path, "ab")
    for left in (".tmp-ab", ".tmp-ab-0123", ".tmp-ef-0123"):
        (tmp_path / left / "objects").mkdir(parents=True)
        (tmp_path / left / "objects" / "pack").touch()
    assert [entry.key for entry in mirrors.prune(tmp_path, 0, None)] == ["ab"]
    assert os.listdir(tmp_path) == []
    mirror(tmp_path, "ab")
    assert [entry.key for entry in mirrors.prune(tmp_path, 0, None)] == ["ab"]


def test_what_is_being_made_of_a_mirror_is_not_swept(tmp_path: Path) -> None:
    assert mirrors.sweep(tmp_path / "none") == 0
    for left in (".tmp-ab-01", ".tmp-cd-01", ".tmp-ef-01"):
        (tmp_path / left).mkdir()
    made = locks.try_lock_directory(tmp_path / ".tmp-ab-01")
    assert made is not None
    with locked(tmp_path / "cd.lock"):  # it holds that of the directory only a moment later
        assert mirrors.sweep(tmp_path) == 1
        assert names(tmp_path) == [".tmp-ab-01", ".tmp-cd-01"]
    os.close(made)
    assert mirrors.sweep(tmp_path) == 2
    assert names(tmp_path) == []

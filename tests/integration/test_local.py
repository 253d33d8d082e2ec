from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from flowagent.backend import Artifact, Backend, BackendContext
from flowagent.errors import BackendError, SourceCacheError, StorageNotFoundError
from flowagent.flows.results import LocalResult
from flowagent.sources import SourceCache
from flowagent.storage import Local
from flowagent_backends.local import LocalBackend

DATA = b"\x80\x04N."
SHA256 = hashlib.sha256(DATA).hexdigest()
MADE_WITH = {"python": "3.12.1", "cloudpickle": "3.1.2"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    return home


@pytest.fixture
def backend(home: Path) -> LocalBackend:
    return LocalBackend(BackendContext(home, "host1"))


def pickle(name: str = "My Flow") -> Artifact:
    return Artifact(name, "pickle", data=DATA, sha256=SHA256, made_with=MADE_WITH)


def test_it_is_a_backend(backend: LocalBackend) -> None:
    assert isinstance(backend, Backend)
    assert backend.type == "Local"


# -- scripts -------------------------------------------------------------------------------------------


async def test_a_script_runs_where_it_is_as_it_is_then(backend: LocalBackend, tmp_path: Path) -> None:
    script = tmp_path / "flow.py"
    script.write_text("x = 1")
    declared = Local(stored_as_script=True).to_json()
    storage = await backend.upload(declared, Artifact("f", "script", path=script))
    assert storage == {**declared, "path": str(script)}
    first = await backend.resolve(storage)
    assert (first.directory, first.entry.kind, first.entry.path) == (tmp_path, "script", "flow.py")
    assert first.entry.sha256 is None
    assert first.id == f"sha256:{hashlib.sha256(b'x = 1').hexdigest()}"
    script.write_text("x = 2")
    second = await backend.resolve(storage)
    assert second.id != first.id
    assert await SourceCache(tmp_path / "cache").acquire(backend, storage, second) == tmp_path


async def test_a_script_is_read_again_only_when_its_file_has_changed(
    backend: LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def file_digest(file: Any, name: str) -> Any:
        reads.append(file)
        return hashlib.new(name, file.read())

    monkeypatch.setattr("flowagent_backends.local.hashlib.file_digest", file_digest)
    script = tmp_path / "flow.py"
    storage = {"type": "Local", "stored_as_script": True, "path": str(script)}
    script.write_text("x = 1")
    for _ in range(2):
        await backend.resolve(storage)
    assert len(reads) == 2  # so new that its times may not tell of a further change
    monkeypatch.setattr("flowagent_backends.local.SETTLED", -60)
    first = await backend.resolve(storage)
    assert await backend.resolve(storage) == first
    assert len(reads) == 3
    times = script.stat()
    script.write_text("x = 2")  # of the same size
    os.utime(script, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = await backend.resolve(storage)
    assert second.id == f"sha256:{hashlib.sha256(b'x = 2').hexdigest()}" != first.id
    other = tmp_path / "other.py"
    other.write_text("x = 3")
    other.rename(script)
    assert (await backend.resolve(storage)).id == f"sha256:{hashlib.sha256(b'x = 3').hexdigest()}"
    script.unlink()
    with pytest.raises(StorageNotFoundError):
        await backend.resolve(storage)


async def test_a_relative_script_is_made_absolute(
    backend: LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flow.py").write_text("")
    monkeypatch.chdir(tmp_path)
    storage = await backend.upload({"path": None}, Artifact("f", "script", path=Path("flow.py")))
    assert storage["path"] == str(tmp_path / "flow.py")


async def test_a_missing_script_is_told_with_the_host(backend: LocalBackend, tmp_path: Path) -> None:
    storage = {"type": "Local", "stored_as_script": True, "path": str(tmp_path / "x" / "flow.py")}
    for action in (
        backend.resolve(storage),
        backend.upload(storage, Artifact("f", "script")),
    ):
        with pytest.raises(StorageNotFoundError, match=r"^Local: no file /.*/x/flow.py on host1; ") as caught:
            await action
        assert "module" not in str(caught.value)
    storage["path"] = str(tmp_path)
    with pytest.raises(BackendError, match="not a regular file"):
        await backend.resolve(storage)


async def test_a_script_that_nobody_named(backend: LocalBackend) -> None:
    with pytest.raises(BackendError, match=r"which script flow 'f' .*give path="):
        await backend.upload(Local(stored_as_script=True).to_json(), Artifact("f", "script"))


# -- pickles -------------------------------------------------------------------------------------------


async def test_a_pickle_goes_to_the_home_and_from_there_to_the_cache(
    backend: LocalBackend, home: Path, tmp_path: Path
) -> None:
    storage = await backend.upload(Local().to_json(), pickle())
    path = Path(storage["path"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dt\d\d-\d\d-\d\d-\d{6}-00-00", path.name)
    assert path.parent == home / "flows" / "my-flow"
    assert path.read_bytes() == DATA
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert storage["artifact"] == {"kind": "pickle", "sha256": SHA256, "size": 4, "made_with": MADE_WITH}
    revision = await backend.resolve(storage)
    assert (revision.id, revision.directory) == (f"sha256:{SHA256}", None)
    assert (revision.entry.kind, revision.entry.sha256) == ("pickle", SHA256)
    assert revision.entry.made_with == MADE_WITH
    directory = await SourceCache(tmp_path / "cache").acquire(backend, storage, revision)
    assert revision.entry.path is not None
    assert (directory / revision.entry.path).read_bytes() == DATA
    assert Local.from_json(storage).to_json() == storage


async def test_each_upload_is_a_new_file(backend: LocalBackend) -> None:
    paths = {(await backend.upload(Local().to_json(), pickle(name)))["path"] for name in ["A", "a"] * 5}
    assert len(paths) == 10
    assert {len(os.listdir(Path(path).parent)) for path in paths} == {10}


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "日本", "x" * 300, "a\nb"])
async def test_no_name_leaves_the_directory(backend: LocalBackend, tmp_path: Path, name: str) -> None:
    storage = await backend.upload(Local(directory=tmp_path / "d").to_json(), pickle(name))
    assert Path(storage["path"]).resolve().parent.parent == tmp_path / "d"


async def test_a_declared_path_is_kept(backend: LocalBackend, tmp_path: Path) -> None:
    storage = await backend.upload(Local(path=tmp_path / "d" / "f.pkl").to_json(), pickle())
    assert storage["path"] == str(tmp_path / "d" / "f.pkl")
    assert (tmp_path / "d" / "f.pkl").read_bytes() == DATA


async def test_a_pickle_that_was_changed_is_not_published(backend: LocalBackend, tmp_path: Path) -> None:
    storage = await backend.upload(Local().to_json(), pickle())
    Path(storage["path"]).write_bytes(b"evil")
    cache = SourceCache(tmp_path / "cache")
    evil = hashlib.sha256(b"evil").hexdigest()
    with pytest.raises(BackendError, match=f"sha256:{evil}, .*sha256:{SHA256}"):
        await cache.acquire(backend, storage, await backend.resolve(storage))
    assert await cache.entries() == []


async def test_a_pickle_that_is_gone_or_was_never_there(backend: LocalBackend) -> None:
    storage = await backend.upload(Local().to_json(), pickle())
    revision = await backend.resolve(storage)
    Path(storage["path"]).unlink()
    with pytest.raises(StorageNotFoundError, match="Local: no file"):
        await backend.resolve(storage)
    with pytest.raises(StorageNotFoundError, match="Local: no file"):
        await backend.materialise(storage, revision, Path(storage["path"]).parent)
    with pytest.raises(BackendError, match="register the flow again"):
        await backend.resolve(Local(path="/x/flow.pickle").to_json())


async def test_where_nothing_can_be_written(backend: LocalBackend, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=r"'My Flow' cannot be written to .*Not a directory"):
        await backend.upload(Local(directory=tmp_path / "file").to_json(), pickle())


async def test_a_full_disk_while_it_is_materialised(
    backend: LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource
    import signal

    big = os.urandom(100_000)
    artifact = Artifact("f", "pickle", data=big, sha256=hashlib.sha256(big).hexdigest())
    storage = await backend.upload(Local().to_json(), artifact)
    cache = SourceCache(tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(SourceCacheError, match="File too large"):
            await cache.acquire(backend, storage, await backend.resolve(storage))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert await cache.entries() == []
    assert await cache.acquire(backend, storage, await backend.resolve(storage))


def test_default_labels_and_result(backend: LocalBackend) -> None:
    assert backend.default_labels(Local().to_json()) == ("host1",)
    assert backend.default_labels(Local(add_default_labels=False).to_json()) == ()
    assert backend.default_result(Local().to_json()) == LocalResult().to_json()


# -- results -------------------------------------------------------------------------------------------


async def put(backend: LocalBackend, key: str, data: bytes, directory: Path | None = None) -> Any:
    file = Path(backend._context.home) / "value"
    file.write_bytes(data)
    return await backend.put({"type": "LocalResult", "dir": directory and str(directory)}, key, file)


async def got(backend: LocalBackend, reference: Any) -> bytes:
    file = Path(backend._context.home) / "got"
    await backend.get(reference, file)
    return file.read_bytes()


async def test_results_are_kept_and_read_back(backend: LocalBackend, home: Path, tmp_path: Path) -> None:
    reference = await put(backend, "a/b/c.pkl", DATA)
    assert reference == {
        "storage": "Local",
        "path": str(home / "results" / "a" / "b" / "c.pkl"),
        "size": 4,
        "sha256": SHA256,
    }
    assert stat.S_IMODE(os.stat(reference["path"]).st_mode) == 0o600
    assert await got(backend, reference) == DATA
    elsewhere = await put(backend, "x", b"", tmp_path / "new" / "dir")
    assert elsewhere["path"] == str(tmp_path / "new" / "dir" / "x")
    assert await got(backend, elsewhere) == b""


@pytest.mark.parametrize("key", ["", "/etc/x", "../x", "a/../../x", "a/..", "a/", ".", "a\0b"])
async def test_no_key_leaves_the_directory(backend: LocalBackend, home: Path, key: str) -> None:
    with pytest.raises(BackendError, match="leaves"):
        await put(backend, key, b"x")
    assert not (home / "results").exists() or os.listdir(home / "results") == []


async def test_no_link_leads_out_of_the_directory(backend: LocalBackend, home: Path, tmp_path: Path) -> None:
    (home / "results").mkdir()
    (home / "results" / "a").symlink_to(tmp_path)
    (home / "results" / "b").symlink_to(tmp_path / "target")
    (tmp_path / "target").write_text("untouched")
    with pytest.raises(BackendError, match="no link is on the way"):
        await put(backend, "a/x", b"x")
    assert not (tmp_path / "x").exists()
    await put(backend, "b", b"x")  # replaces the link itself
    assert (tmp_path / "target").read_text() == "untouched"
    assert (home / "results" / "b").read_bytes() == b"x"


async def test_a_result_that_was_replaced_or_is_gone(backend: LocalBackend) -> None:
    reference = await put(backend, "latest", b"1")
    await put(backend, "latest", b"2")
    with pytest.raises(BackendError, match="was changed since"):
        await got(backend, reference)
    os.unlink(reference["path"])
    with pytest.raises(StorageNotFoundError, match="on host1"):
        await got(backend, reference)

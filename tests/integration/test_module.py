from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flowagent.backend import Artifact, Backend, BackendContext
from flowagent.errors import BackendError, StorageNotFoundError
from flowagent.sources import SourceCache
from flowagent.storage import Module
from flowagent_backends.module import ModuleBackend

ARTIFACT = Artifact("f", "script")


@pytest.fixture
def backend(tmp_path: Path) -> ModuleBackend:
    return ModuleBackend(BackendContext(tmp_path, "host1"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    directory = tmp_path / "lib" / "somepackage"
    directory.mkdir(parents=True)
    (directory / "__init__.py").write_text("")
    (directory / "flows.py").write_text("flow = 1\n")
    monkeypatch.syspath_prepend(directory.parent)
    for name in [name for name in sys.modules if name.partition(".")[0] == "somepackage"]:
        monkeypatch.delitem(sys.modules, name)
    return "somepackage"


@pytest.mark.parametrize("name", ["pkg", "pkg.flows", "pkg.flows:attr", "päkg._x:a.b"])
async def test_a_module_is_named_and_nothing_is_materialised(
    backend: ModuleBackend, tmp_path: Path, name: str
) -> None:
    assert isinstance(backend, Backend)
    storage = Module(name).to_json()
    revision = await backend.resolve(storage)
    assert (revision.id, revision.entry.kind, revision.entry.module) == (f"module:{name}", "module", name)
    directory = await SourceCache(tmp_path / "cache").acquire(backend, storage, revision)
    assert list(directory.iterdir()) == []
    assert backend.default_labels(storage) == ()
    assert backend.default_result(storage) is None


@pytest.mark.parametrize("name", ["__main__", "__main__:flow"])
async def test_main_is_not_importable_elsewhere(backend: ModuleBackend, name: str) -> None:
    for action in (
        backend.resolve({"module": name}),
        backend.upload({"module": name}, ARTIFACT),
    ):
        with pytest.raises(BackendError, match="give the importable name, like"):
            await action


@pytest.mark.parametrize("name", ["", "a b", ".a", "a.", "a:", "os;x", "a/b", None, 3])
async def test_what_is_no_module_name(backend: ModuleBackend, name: object) -> None:
    with pytest.raises(BackendError, match="is no module name"):
        await backend.resolve({"module": name})


async def test_upload_checks_what_it_can(backend: ModuleBackend, package: str) -> None:
    for name in (f"{package}.flows", f"{package}.flows:flow", "not_installed_here.flows"):
        storage = Module(name).to_json()
        assert await backend.upload(storage, ARTIFACT) == storage
    for name in (f"{package}.flws", f"{package}.sub.flows", f"{package}.flows.sub"):
        with pytest.raises(StorageNotFoundError, match=f"no module {name} on host1 for flow 'f'"):
            await backend.upload({"module": name}, ARTIFACT)
    __import__(f"{package}.flows")
    with pytest.raises(StorageNotFoundError, match=r"no attribute flw in module somepackage\.flows"):
        await backend.upload({"module": f"{package}.flows:flw"}, ARTIFACT)


async def test_a_package_that_fails_when_imported(backend: ModuleBackend, package: str) -> None:
    directory = Path(__import__(package).__path__[0])
    del sys.modules[package]
    (directory / "__init__.py").write_text("1 / 0")
    with pytest.raises(BackendError, match="ZeroDivisionError: division by zero"):
        await backend.upload({"module": f"{package}.flows"}, ARTIFACT)


async def test_it_keeps_no_results(backend: ModuleBackend, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="keeps no results"):
        await backend.put({}, "k", tmp_path)
    with pytest.raises(BackendError, match="keeps no results"):
        await backend.get({}, tmp_path)

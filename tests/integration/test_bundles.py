"""Bundles: a script and its side files as one archive, packed, stored everywhere, and unpacked safely."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benches import Bench

from flowagent import Flow, FlowError, bundles, settings
from flowagent.backend import BackendContext
from flowagent.errors import BackendError, UsageError
from flowagent.models import Registration
from flowagent.registration import Candidate, registrar
from flowagent.sources import SourceCache
from flowagent.storage import S3, Local, Storage
from flowagent_backends.local import LocalBackend

TREE = {
    "flow.py": "x = 1\n",
    "sql/a.sql": "select 1",
    "sql/b.sql": "select 2",
    "sql/deep/c.sql": "select 3",
    "sql/readme.txt": "no",
    "helpers/__init__.py": "",
    "helpers/.hidden": "h",
    "helpers/__pycache__/x.pyc": "no",
    "other.py": "no",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "project"


def pack(project: Path, *include: str, name: str = "bundle") -> bundles.Bundle:
    archive = project.parent / name
    archive.unlink(missing_ok=True)
    return bundles.pack(project / "flow.py", include, archive)


def unpack(archive: Path, directory: Path) -> list[str]:
    directory.mkdir()
    with archive.open("rb") as file:
        bundles.unpack(file, directory, "S3: s3://b/k")
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


# -- packing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ([], []),
        (["sql/*.sql"], ["sql/a.sql", "sql/b.sql"]),
        (["sql/**/*.sql"], ["sql/a.sql", "sql/b.sql", "sql/deep/c.sql"]),
        (["helpers/", "sql/a.sql"], ["helpers/.hidden", "helpers/__init__.py", "sql/a.sql"]),
        (["helpers", "./sql/a.sql"], ["helpers/.hidden", "helpers/__init__.py", "sql/a.sql"]),
    ],
)
def test_what_is_included(project: Path, include: list[str], expected: list[str]) -> None:
    bundle = pack(project, *include)
    assert unpack(bundle.path, project.parent / "out") == ["flow.py", *expected]
    assert (bundle.entry, bundle.size) == ("flow.py", bundle.path.stat().st_size)
    assert bundle.sha256 == hashlib.sha256(bundle.path.read_bytes()).hexdigest()


def test_equal_files_are_equal_bundles(project: Path) -> None:
    first = pack(project, "sql/*.sql", "helpers/")
    for number, path in enumerate(project.rglob("*")):
        os.utime(path, (number, number))
        path.chmod(0o700 if path.is_dir() else 0o640)
    assert pack(project, "helpers/", "sql/*.sql", "sql/a.sql", name="again").sha256 == first.sha256
    (project / "sql" / "a.sql").write_text("select 4")
    assert pack(project, "sql/*.sql", "helpers/").sha256 != first.sha256


def test_programs_stay_programs(project: Path) -> None:
    (project / "tool").write_text("#!/bin/sh\n")
    (project / "tool").chmod(0o755)
    unpack(pack(project, "tool").path, project.parent / "out")
    assert os.access(project.parent / "out" / "tool", os.X_OK)
    assert not os.access(project.parent / "out" / "flow.py", os.X_OK)


def test_what_cannot_be_included(project: Path) -> None:
    (project / "secrets").symlink_to("/etc")
    (project / "inside").symlink_to("sql")
    os.mkfifo(project / "pipe")
    (project / "x").mkdir()
    (project / "x" / ("n" * 120)).write_text("")
    (project / "odd").mkdir()
    Path(os.fsdecode(os.fsencode(project / "odd") + b"/\xff")).write_text("")
    for include, message in (
        ("odd/", r"odd/\\xff cannot be part of a bundle: its name is not UTF-8; rename it"),
        ("missing/*.sql", r"include='missing/\*\.sql' matches no file below .*project; correct it"),
        ("secrets/passwd", r"passwd leads out of .*project, to /etc/passwd; put a copy of it there"),
        ("pipe", "is no regular file, and cannot be part of a bundle"),
        ("x/", "cannot be part of a bundle: name is too long; rename it"),
    ):
        with pytest.raises(UsageError, match=message):
            pack(project, include)
    assert unpack(pack(project, "inside/a.sql").path, project.parent / "out") == ["flow.py", "inside/a.sql"]
    for wrong in ("/etc/passwd", "../x", "a/../../x", "~/x", "", 1):
        with pytest.raises(FlowError, match="S3: include takes paths below the script's directory"):
            S3("b", include=[wrong])  # type: ignore[list-item]
    with pytest.raises(FlowError, match="takes a list such as"):
        S3("b", include="sql/")
    assert S3("b", include=["sql/"]).stored_as_script


# -- unpacking what somebody else made -----------------------------------------------------------------


def member(name: str, **attributes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info


def archive_of(*members: tarfile.TarInfo, form: int = tarfile.GNU_FORMAT) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for each in members:
            tar.addfile(each, io.BytesIO(b"x" * each.size))
    return target.getvalue()


@pytest.mark.parametrize(
    "archive",
    [
        archive_of(member("../evil", size=1)),
        archive_of(member("/tmp/evil", size=1)),
        archive_of(member("a/../../evil", size=1)),
        archive_of(member("a//evil", size=1)),
        archive_of(member("link", type=tarfile.SYMTYPE, linkname="/etc")),
        archive_of(member("link", type=tarfile.SYMTYPE, linkname="/tmp"), member("link/evil", size=1)),
        archive_of(member("hard", type=tarfile.LNKTYPE, linkname="/etc/passwd")),
        archive_of(member("device", type=tarfile.CHRTYPE, devmajor=1)),
        archive_of(member("pipe", type=tarfile.FIFOTYPE)),
        archive_of(member("directory", type=tarfile.DIRTYPE)),
        archive_of(member("same", size=1), member("same", size=1)),
        archive_of(member("a", size=1), member("a/b", size=1)),
        archive_of(member("n" * 200, size=1)),  # a header that says how long the next one is
        archive_of(member("n" * 200, size=1), form=tarfile.PAX_FORMAT),
        archive_of(member("sparse", type=tarfile.GNUTYPE_SPARSE)),
        archive_of(member("cut", size=2000))[:1000],
        archive_of(member("cut", size=2000))[:100],
        b"",
        b"x" * 2000,
        archive_of(member("a\nb", size=1))[:512],
    ],
    ids=lambda data: hashlib.sha256(data).hexdigest()[:6],
)
def test_hostile_archives(archive: bytes, tmp_path: Path) -> None:
    file = tmp_path / "archive"
    file.write_bytes(archive)
    before = {path for path in tmp_path.parent.rglob("*") if "evil" in path.name}
    with pytest.raises(BackendError, match=r"^S3: s3://b/k: the bundle cannot be unpacked: ") as caught:
        unpack(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert {path for path in tmp_path.parent.rglob("*") if "evil" in path.name} == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert not Path("/tmp/evil").exists()


def test_an_archive_with_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MOST_FILES", 3)
    file = tmp_path / "archive"
    file.write_bytes(archive_of(*(member(f"{number}") for number in range(3))))
    assert len(unpack(file, tmp_path / "out")) == 3
    file.write_bytes(archive_of(*(member(f"{number}") for number in range(4))))
    with pytest.raises(BackendError, match="it holds more than 3 files"):
        unpack(file, tmp_path / "more")


@pytest.mark.parametrize("size", [5, 5 << 20])  # when the last of it is written, and before
def test_no_room_for_a_bundle(project: Path, size: int) -> None:
    (project / "sql" / "big.sql").write_bytes(b"x" * size)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        with pytest.raises(UsageError, match=r"bundle cannot be written to .*: File too large; free space"):
            pack(project, "sql/")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# -- registered and fetched ----------------------------------------------------------------------------


async def register(flow: Flow, script: Path, home: Path) -> Registration:
    loaded = settings.load(None, {"FLOWAGENT_HOME": str(home)})
    async with registrar(loaded) as opened:
        return await opened.register(Candidate(flow, script))


async def check(make: Callable[[], Storage], backend: Any, project: Path, place: Callable[[Any], str]) -> Any:
    """Register a bundle, fetch it, register it again, change it; the storage of the second version."""
    home, script = project.parent / "home", project / "flow.py"
    first = await register(Flow("bundled", storage=make()), script, home)
    spec = first.version.spec
    bundle = pack(project, "sql/*.sql", "helpers/")
    expected = {"kind": "bundle", "sha256": bundle.sha256, "size": bundle.size, "entry": "flow.py"}
    assert {name: spec.storage["artifact"][name] for name in expected} == expected
    assert bundle.sha256 in place(spec.storage)
    revision = await backend.resolve(spec.storage)
    assert (revision.id, revision.entry.kind) == (f"sha256:{bundle.sha256}", "script")
    directory = await SourceCache(project.parent / "cache").acquire(backend, spec.storage, revision)
    found = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    assert found == ["flow.py", "helpers/.hidden", "helpers/__init__.py", "sql/a.sql", "sql/b.sql"]
    assert (directory / "sql" / "b.sql").read_text() == "select 2"
    again = await register(Flow("bundled", storage=make()), script, home)
    assert (again.version.version_id, again.created) == (first.version.version_id, False)
    (project / "sql" / "b.sql").write_text("select 5")
    changed = await register(Flow("bundled", storage=make()), script, home)
    assert changed.created
    assert (directory / "sql" / "b.sql").read_text() == "select 2"
    assert await backend.resolve(spec.storage) == revision  # the first version stays what it was
    return changed.version.spec.storage


async def test_in_each_object_store(bench: Bench, project: Path) -> None:
    storage = await check(
        lambda: bench.storage(include=["sql/*.sql", "helpers/"]),
        bench.backend,
        project,
        lambda stored: str(stored[bench.key_field]),
    )
    bench.write(storage[bench.key_field], b"!" * storage["artifact"]["size"])
    cache = SourceCache(project.parent / "cache")
    with pytest.raises(BackendError, match="it was changed since: register the flow again"):
        await cache.acquire(bench.backend, storage, await bench.backend.resolve(storage))
    await bench.backend.close()


async def test_on_this_machine(project: Path) -> None:
    home = project.parent / "home"
    backend = LocalBackend(BackendContext(home, "host1"))
    stored = await check(
        lambda: Local(include=["sql/*.sql", "helpers/"]), backend, project, lambda stored: str(stored["path"])
    )
    assert Path(stored["path"]).parent == home / "flows" / "bundled"
    elsewhere = await register(
        Flow("elsewhere", storage=Local(project.parent / "d", include=["sql/"])), project / "flow.py", home
    )
    assert Path(elsewhere.version.spec.storage["path"]).parent == project.parent / "d" / "elsewhere"


async def test_which_script_is_not_known(project: Path) -> None:
    with pytest.raises(
        UsageError, match=r"which script flow 'f' is stored as is not known; register it with"
    ):
        await register(Flow("f", storage=Local(include=["sql/"])), None, project.parent / "home")  # type: ignore[arg-type]
    missing = Local(path=project / "no.py", include=["sql/"])
    with pytest.raises(UsageError, match=r"there is no script .*no.py to read"):
        await register(Flow("f", storage=missing), project / "flow.py", project.parent / "home")

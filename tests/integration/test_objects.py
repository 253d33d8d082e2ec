"""What all object stores have to do, with real servers: SeaweedFS, fake-gcs-server, Azurite."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from benches import Bench
from tests import gate as gates
from tests.room import files_of_at_most

from flowagent.backend import Artifact, Backend, Revision
from flowagent.errors import BackendError, SourceCacheError, StorageNotFoundError, StorageTransientError
from flowagent.sources import SourceCache
from flowagent.storage import Storage
from flowagent_backends import objects
from flowagent_backends.objects import ObjectBackend

DATA = b"\x80\x04N." * 50
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
async def backend(bench: Bench) -> AsyncIterator[ObjectBackend]:
    yield bench.backend
    await bench.backend.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts."""
    monkeypatch.setattr("flowagent.http.BACKOFF", 0.01)
    monkeypatch.setattr("flowagent_backends.s3.BACKOFF", 0.01)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)


def pickle(name: str = "My Flow", data: bytes = DATA) -> Artifact:
    return Artifact(name, "pickle", data=data, sha256=hashlib.sha256(data).hexdigest())


def script(path: Path, text: str = "x = 1\n") -> Artifact:
    path.write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Artifact("My Flow", "script", path=path, sha256=digest, entry=path.name)


async def acquire(bench: Bench, storage: dict[str, Any], tmp_path: Path) -> tuple[Revision, Path]:
    revision = await bench.backend.resolve(storage)
    return revision, await SourceCache(tmp_path / "cache").acquire(bench.backend, storage, revision)


def kept_nothing(tmp_path: Path) -> bool:
    cache = tmp_path / "cache"
    return not cache.exists() or not any(path.is_dir() for path in cache.iterdir())


# -- flows ---------------------------------------------------------------------------------------------


async def test_a_pickle_there_and_back(bench: Bench, backend: ObjectBackend, tmp_path: Path) -> None:
    assert isinstance(backend, Backend)
    declared = bench.storage().to_json()
    storage = await backend.upload(declared, pickle())
    key = storage[bench.key_field]
    assert re.fullmatch(r"my-flow/\d{4}-\d\d-\d\dt\d\d-\d\d-\d\d-\d{6}-00-00", key)
    assert bench.read(key) == DATA
    expected = {"kind": "pickle", "sha256": SHA256, "size": len(DATA), "made_with": {}}
    assert storage == {**declared, bench.key_field: key, "artifact": expected}
    assert Storage.from_json(storage).to_json() == storage
    bench.gate.clear()
    revision = await backend.resolve(storage)
    assert bench.gate.requests == []  # it is pinned: nobody has to be asked
    assert (revision.id, revision.entry.kind) == (f"sha256:{SHA256}", "pickle")
    directory = await SourceCache(tmp_path / "cache").acquire(backend, storage, revision)
    assert os.listdir(directory) == [revision.entry.path]
    assert (directory / str(revision.entry.path)).read_bytes() == DATA


async def test_an_edited_script_runs_without_registration(
    bench: Bench, backend: ObjectBackend, tmp_path: Path
) -> None:
    storage = await backend.upload(
        bench.storage("etl/current", stored_as_script=True).to_json(), script(tmp_path / "flow.py")
    )
    first, directory = await acquire(bench, storage, tmp_path)
    assert (first.entry.kind, first.entry.path) == ("script", "flow.py")
    assert (directory / "flow.py").read_text() == "x = 1\n"
    again, _ = await acquire(bench, storage, tmp_path)
    assert again == first
    bench.write("etl/current", b"x = 2\n")
    second, directory = await acquire(bench, storage, tmp_path)
    assert second.id != first.id
    assert (directory / "flow.py").read_text() == "x = 2\n"


async def test_a_script_that_is_there_already(bench: Bench, backend: ObjectBackend, tmp_path: Path) -> None:
    declared = bench.storage("by hand/prüfung ~1.py", stored_as_script=True).to_json()
    with pytest.raises(StorageNotFoundError, match=f"^{bench.kind}: .*there is no such"):
        await backend.upload(declared, Artifact("f", "script"))
    bench.write("by hand/prüfung ~1.py", b"x = 3\n")
    storage = await backend.upload(declared, Artifact("f", "script"))
    assert storage == declared
    _, directory = await acquire(bench, storage, tmp_path)
    assert (directory / "prüfung ~1.py").read_text() == "x = 3\n"


async def test_what_was_tampered_with_is_refused(
    bench: Bench, backend: ObjectBackend, tmp_path: Path
) -> None:
    storage = await backend.upload(bench.storage().to_json(), pickle())
    for evil in (b"!" * len(DATA), b"short", b"!" * 1000):
        bench.write(storage[bench.key_field], evil)
        with pytest.raises(BackendError, match=r"it was changed since: register the flow again") as caught:
            await acquire(bench, storage, tmp_path)
        assert not caught.value.retryable
        assert "\n" not in str(caught.value)
        assert kept_nothing(tmp_path)


async def test_another_place_or_secret_is_another_source(bench: Bench, backend: ObjectBackend) -> None:
    """A digest that was guessed, with a bucket of one's own, does not lead to what is cached for others."""
    storage = await backend.upload(bench.storage().to_json(), pickle())
    place = "container" if bench.kind == "Azure" else "bucket"
    keys = {(await backend.resolve({**storage, place: name})).key for name in (bench.place, "other")}
    assert len(keys) == 2


@pytest.mark.parametrize("bench", ["Azure", "S3"], indirect=True)  # fake-gcs-server ignores generations
async def test_a_script_that_is_replaced_while_it_is_read(
    bench: Bench, backend: ObjectBackend, tmp_path: Path
) -> None:
    bench.write("f.py", b"x = 1\n")
    storage = bench.storage("f.py", stored_as_script=True).to_json()
    revision = await backend.resolve(storage)
    bench.write("f.py", b"x = 2\n")
    with pytest.raises(StorageTransientError, match="was replaced while it was read; run the flow again"):
        await SourceCache(tmp_path / "cache").acquire(backend, storage, revision)
    assert kept_nothing(tmp_path)


async def test_many_runs_at_once_are_one_download(
    bench: Bench, backend: ObjectBackend, tmp_path: Path
) -> None:
    storage = await backend.upload(
        bench.storage("f.py", stored_as_script=True).to_json(), script(tmp_path / "f.py")
    )
    bench.gate.clear()
    cache = SourceCache(tmp_path / "cache")

    async def run() -> None:
        revision = await backend.resolve(storage)
        assert ((await cache.acquire(backend, storage, revision)) / "f.py").exists()

    async with anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(run)
    downloads = [path for method, path in bench.gate.requests if method == "GET"]
    if bench.kind == "GCS":
        downloads = [path for path in downloads if "alt=media" in path]
    assert len(downloads) == 1


# -- what goes wrong -----------------------------------------------------------------------------------


async def failing(
    bench: Bench, tmp_path: Path, storage: dict[str, Any] | None = None
) -> tuple[BackendError, int]:
    """What acquiring a pickle raises, and how many requests it took."""
    stored = storage or await bench.backend.upload(bench.storage("p").to_json(), pickle())
    bench.gate.requests.clear()
    with pytest.raises(BackendError) as caught:
        await acquire(bench, stored, tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{bench.kind}: ")
    assert "\n" not in said
    assert kept_nothing(tmp_path)
    for secret in ("Signature", "sig=", "AccountKey", "upload_id", "X-Amz"):
        assert secret not in said
    return caught.value, len(bench.gate.requests)


async def test_missing_objects_and_places(bench: Bench, backend: ObjectBackend, tmp_path: Path) -> None:
    for stored_as_script in (False, True):
        artifact = None if stored_as_script else {"kind": "pickle", "sha256": SHA256, "size": len(DATA)}
        gone = bench.storage("gone", stored_as_script=stored_as_script, artifact=artifact).to_json()
        error, _ = await failing(bench, tmp_path, gone)
        assert isinstance(error, StorageNotFoundError)
        assert re.search(r"/gone.*: there is no such (object|blob); put it back, or register", str(error))
        nowhere = bench.storage(
            "gone", place="no-such-place", stored_as_script=stored_as_script, artifact=artifact
        ).to_json()
        error, _ = await failing(bench, tmp_path, nowhere)
        assert isinstance(error, StorageNotFoundError)
        assert re.search(r"there is no (bucket|container) no-such-place; create it", str(error))
    if bench.kind != "S3":  # SeaweedFS makes buckets as they are needed
        with pytest.raises(StorageNotFoundError, match=r"there is no (bucket|container) no-such-place"):
            await backend.upload(bench.storage(place="no-such-place").to_json(), pickle())
    assert "never registered" in str((await failing(bench, tmp_path, bench.storage("x").to_json()))[0])


@pytest.mark.parametrize("body", ["", "<html>", "{}", "[1]"])
async def test_answers_that_nobody_understands(bench: Bench, backend: ObjectBackend, body: str) -> None:
    """Of a portal, a proxy, or a server that a flow's author chose."""
    script = bench.storage("f.py", stored_as_script=True).to_json()
    bench.gate.when(".*", "", gates.status(200, body))
    words = r"cannot be understood; check that the address|correct that|busy or unwell \(500\)"
    with pytest.raises(BackendError, match=words):
        await backend.resolve(script)
    with pytest.raises(BackendError, match=words):
        await put(bench, "r", b"value")
    with pytest.raises(BackendError, match=words):
        await backend.upload(script, pickle())


@pytest.mark.parametrize(
    "key", ["../other/f.py", "flows/../../f.py", "..", "./f.py", "a\nb", "\ud800", "x" * 1025]
)
async def test_keys_that_lead_elsewhere(bench: Bench, backend: ObjectBackend, key: str) -> None:
    """A flow says what the keys of its results are, as it runs; a client would shorten the path."""
    stored = bench.storage("f.py", stored_as_script=True).to_json() | {bench.key_field: key}
    bench.gate.requests.clear()
    words = r"the key .* cannot be used.*; choose another"
    with pytest.raises(BackendError, match=words) as caught:
        await put(bench, key, b"1")
    assert str(caught.value).isprintable()
    with pytest.raises(BackendError, match=words):
        await backend.resolve(stored)
    with pytest.raises(BackendError, match=words):
        await backend.upload(stored, pickle())
    assert not bench.gate.requests


@pytest.mark.parametrize("key", ["flows/", "flows/" + "x" * 300])
async def test_a_key_that_names_no_file(bench: Bench, backend: ObjectBackend, key: str) -> None:
    storage = bench.storage(key, stored_as_script=True).to_json()
    with pytest.raises(BackendError, match="does not end in the name of a file"):
        await backend.resolve(storage)
    with pytest.raises(BackendError, match="does not end in the name of a file"):
        await backend.upload(storage, Artifact("f", "script"))


ARTIFACT = {"kind": "script", "sha256": SHA256, "size": 6, "entry": "f.py"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"artifact": {**ARTIFACT, "entry": "../../escaped.py"}}, "has of the flow's artifact is wrong"),
        ({"artifact": {**ARTIFACT, "kind": "bundle", "entry": ".."}}, "has of the flow's artifact is wrong"),
        ({"artifact": {**ARTIFACT, "kind": "pickle", "size": "x"}}, "has of the flow's artifact is wrong"),
        ({"artifact": {"kind": "pickle"}}, "has of the flow's artifact is wrong"),
        ({"artifact": "x"}, "the flow's storage is wrong"),
        ({"stored_as_script": "x"}, "the flow's storage is wrong"),
        ({"unknown": 1}, "the flow's storage is wrong: .*; register it again"),
    ],
)
async def test_a_declaration_from_the_store_is_not_trusted(
    bench: Bench, backend: ObjectBackend, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """The names in it are of files that an agent writes, as the agent."""
    bench.write("flows/f.py", DATA)
    with pytest.raises(BackendError, match=message):
        await acquire(bench, bench.storage("flows/f.py", stored_as_script=True).to_json() | change, tmp_path)
    assert not list(tmp_path.rglob("escaped.py"))
    with pytest.raises(BackendError, match=r"the flow's result is wrong: .*; register it again"):
        await backend.put(bench.result().to_json() | {"unknown": 1}, "k", bench.home)


async def test_more_than_an_agent_takes(bench: Bench, backend: ObjectBackend, tmp_path: Path) -> None:
    storages = [
        await backend.upload(bench.storage("p").to_json(), pickle()),
        await backend.upload(bench.storage("s", stored_as_script=True).to_json(), script(tmp_path / "s")),
    ]
    small = type(backend)(dataclasses.replace(bench.context, max_source=5))
    for storage in storages:
        revision = await small.resolve(storage)
        cache = SourceCache(tmp_path / "cache")
        with pytest.raises(
            BackendError, match=r"larger than this agent takes; see max_source|more than 5 bytes; that is not"
        ):
            await cache.acquire(small, storage, revision)
    assert kept_nothing(tmp_path)
    await small.close()


@pytest.mark.parametrize("code", [429, 500, 503])
async def test_a_busy_store_is_asked_again(
    bench: Bench, backend: ObjectBackend, tmp_path: Path, code: int
) -> None:
    storage = await backend.upload(bench.storage("p").to_json(), pickle())
    bench.gate.when("GET", "/p", gates.status(code, Retry_After="0"), times=1)
    await acquire(bench, storage, tmp_path)
    bench.gate.clear()
    bench.gate.when("GET", "/p", gates.status(code, Retry_After="0"))
    storage = await backend.upload(bench.storage("p").to_json(), pickle(data=b"other"))
    with pytest.raises(StorageTransientError, match=r"busy or unwell .*; try again later"):
        await acquire(bench, storage, tmp_path / "2")
    assert 2 < bench.gate.count("GET", "/p") < 12


@pytest.mark.parametrize("how", [gates.truncate, gates.reset])
async def test_a_download_that_breaks_off(
    bench: Bench, backend: ObjectBackend, tmp_path: Path, how: Callable[..., None]
) -> None:
    storage = await backend.upload(bench.storage("p").to_json(), pickle())
    rule = bench.gate.when("GET", "/p", how)
    error, _ = await failing(bench, tmp_path, storage)
    assert isinstance(error, StorageTransientError)
    assert "try again later" in str(error)
    assert rule.seen > 1
    bench.gate.clear()
    bench.gate.when("GET", "/p", how, times=1)
    await acquire(bench, storage, tmp_path)


async def test_a_body_with_other_bytes(bench: Bench, backend: ObjectBackend, tmp_path: Path) -> None:
    storage = await backend.upload(bench.storage("p").to_json(), pickle())
    rule = bench.gate.when("GET", "/p", gates.corrupt)
    error, _ = await failing(bench, tmp_path, storage)
    assert "it was changed since" in str(error)
    assert rule.seen == 1  # the same bytes would come again


async def test_a_store_that_hangs(
    bench: Bench, backend: ObjectBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PATIENCE", 0.5)
    storage = bench.storage("f.py", stored_as_script=True).to_json()
    bench.gate.when(".*", "f.py", gates.hang)
    with anyio.fail_after(20):
        with pytest.raises(StorageTransientError, match=r"did not answer .*; try again later"):
            await backend.resolve(storage)


async def test_a_slow_body_ends_with_the_patience_of_the_cache(
    bench: Bench, backend: ObjectBackend, tmp_path: Path
) -> None:
    storage = await backend.upload(bench.storage("p").to_json(), pickle())
    bench.gate.when("GET", "/p", gates.trickle)
    cache = SourceCache(tmp_path / "cache", timeout=1.0)
    with anyio.fail_after(20):
        with pytest.raises(Exception, match="took longer than 1 s"):
            await cache.acquire(backend, storage, await backend.resolve(storage))
    assert kept_nothing(tmp_path)


async def test_no_room_for_what_comes(bench: Bench, backend: ObjectBackend, tmp_path: Path) -> None:
    """It is this machine that has to be mended, not the store."""
    data = os.urandom(2 << 20)
    storage = await backend.upload(bench.storage("p").to_json(), pickle(data=data))
    reference = await put(bench, "r", data)
    revision = await backend.resolve(storage)
    bench.gate.requests.clear()
    with files_of_at_most(1 << 20):
        with pytest.raises(SourceCacheError, match=r"was not published in .*: File too large; check that"):
            await SourceCache(tmp_path / "cache").acquire(backend, storage, revision)
        with pytest.raises(OSError, match="File too large"):
            await backend.get(reference, bench.home / "got")
    assert kept_nothing(tmp_path)
    assert len(bench.gate.requests) == 2  # the same would come again


async def test_nobody_listens(bench: Bench, backend: ObjectBackend, tmp_path: Path) -> None:
    storage = await backend.upload(bench.storage("p").to_json(), pickle())
    bench.gate.close()
    error, _ = await failing(bench, tmp_path, storage)
    assert isinstance(error, StorageTransientError)
    assert "cannot be reached" in str(error)


# -- results -------------------------------------------------------------------------------------------


async def put(bench: Bench, key: str, data: bytes) -> dict[str, Any]:
    file = bench.home / "value"
    file.write_bytes(data)
    return await bench.backend.put(bench.result().to_json(), key, file)


async def got(bench: Bench, reference: dict[str, Any]) -> bytes:
    file = bench.home / "got"
    await bench.backend.get(json.loads(json.dumps(reference)), file)
    return file.read_bytes()


async def test_results_there_and_back(bench: Bench, backend: ObjectBackend) -> None:
    reference = await put(bench, "a flow/1/täsk.pkl", b"value")
    assert bench.read("a flow/1/täsk.pkl") == b"value"
    assert reference["storage"] == bench.kind
    assert reference["uri"].endswith(f"{bench.place}/a flow/1/täsk.pkl")
    assert (reference["size"], reference["sha256"]) == (5, hashlib.sha256(b"value").hexdigest())
    assert await got(bench, reference) == b"value"
    empty = await put(bench, "empty", b"")
    assert await got(bench, empty) == b""


async def test_a_result_takes_the_place_of_a_result_only(bench: Bench, backend: ObjectBackend) -> None:
    """Flows choose the keys of their results; the code of another flow in the same bucket stays as it is."""
    first = await put(bench, "latest", b"1")
    second = await put(bench, "latest", b"22")
    assert await got(bench, second) == b"22"
    if bench.kind != "GCS":  # the emulator keeps the older generation
        with pytest.raises(BackendError, match=r"was changed since; a later run may have replaced it"):
            await got(bench, first)
    bench.write("other/flow.py", b"theirs")
    with pytest.raises(BackendError, match=r"is no result of a flow's, and is not replaced by one"):
        await put(bench, "other/flow.py", b"evil")
    assert bench.read("other/flow.py") == b"theirs"
    assert (await put(bench, "other/flow.pkl", b"fine"))["key"] == "other/flow.pkl"


async def test_a_result_that_was_changed_or_is_gone(bench: Bench, backend: ObjectBackend) -> None:
    reference = await put(bench, "r", b"value")
    bench.gate.when("GET", "/r", gates.corrupt)
    with pytest.raises(BackendError, match="was changed since"):
        await got(bench, reference)
    with pytest.raises(StorageNotFoundError, match="there is no such"):
        await got(bench, {**reference, "key": "other"})


async def test_large_results_go_in_parts(
    bench: Bench, backend: ObjectBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 5 << 20  # no less is allowed by S3
    monkeypatch.setattr(objects, "PART", part)
    data = os.urandom(2 * part + 1234)
    bench.gate.when("PUT", "", gates.status(503), times=1)
    reference = await put(bench, "large", data)
    assert bench.gate.count("PUT", "") >= 4
    assert await got(bench, reference) == data
    if bench.kind != "GCS":  # see test_gcs.py: the emulator ignores conditions of such uploads
        bench.write("theirs", b"x")
        with pytest.raises(BackendError, match="is no result of a flow's"):
            await put(bench, "theirs", data)
        assert bench.read("theirs") == b"x"
    assert await got(bench, await put(bench, "large", data[:-1])) == data[:-1]


async def test_an_upload_that_fails_leaves_nothing(
    bench: Bench, backend: ObjectBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART", 5 << 20)
    bench.gate.when("PUT", "partNumber=2|comp=block&|upload_id", gates.status(403))
    with pytest.raises(BackendError, match=r"access was denied|was refused"):
        await put(bench, "broken", os.urandom(12 << 20))
    with pytest.raises(Exception, match=r"404|NoSuchKey"):
        bench.read("broken")
    if bench.kind == "S3":
        assert bench.gate.count("DELETE", "uploadId=") == 1


# -- progress ------------------------------------------------------------------------------------------


async def test_progress_counts_once_what_is_done_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that broke off, an upload that was refused, and one that found at its end that the key is
    taken, and took the place of what is there."""
    seen: list[tuple[str, int | None, list[int]]] = []

    @contextmanager
    def progress(what: str, total: int | None = None) -> Iterator[Any]:
        amounts: list[int] = []
        seen.append((what.partition(" ")[0], total, amounts))
        yield amounts.append

    monkeypatch.setattr(objects, "PART", 5 << 20)
    backend = bench._backend(dataclasses.replace(bench.context, progress=progress))
    file = tmp_path / "value"
    file.write_bytes(bytes(6 << 20))
    bench.gate.when("PUT|POST", "/p", gates.status(503), times=1)
    storage = await backend.upload(bench.storage("p").to_json(), pickle(data=DATA * 5000))
    bench.gate.when("GET", "/p", gates.truncate, times=1)
    await SourceCache(tmp_path / "cache").acquire(backend, storage, await backend.resolve(storage))
    for _ in range(2):
        reference = await backend.put(bench.result().to_json(), "result", file)
    bench.gate.when("GET", "/result", gates.truncate, times=1)
    await backend.get(reference, tmp_path / "got")
    await backend.close()
    size, large = len(DATA) * 5000, 6 << 20
    assert [(what, total, sum(amounts)) for what, total, amounts in seen] == [
        ("uploading", size, size),
        ("downloading", size, size),
        ("uploading", large, large),
        ("uploading", large, large),
        ("downloading", large, large),
    ]

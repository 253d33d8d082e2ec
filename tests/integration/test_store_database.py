"""Opening, upgrading, durability, failures and doorbells, on both databases where both have them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio
import psycopg
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from store_cases import add_run, an_agent, version_of

import flowagent.store.contention
import flowagent.store.postgresql
from flowagent.errors import NotFoundError, SettingsError, StoreError, StoreUnavailableError
from flowagent.models import Outcome, OutputChunk, RunRequest, State
from flowagent.store import CANCEL, WORK, SQLStore, open_store, progress
from flowagent.store.database import VERSION_TABLE, Transaction
from flowagent.store.schema import metadata

pytest_plugins = ("store_databases",)

SQLITE = pytest.mark.parametrize("kind", ["sqlite"])
POSTGRESQL = pytest.mark.parametrize("kind", ["postgresql"])


def python(code: str, *arguments: str, stdin: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=stdin, stdout=subprocess.PIPE, text=True
    )


# -- opening -------------------------------------------------------------------------------------------

OPEN = """
import anyio, sys
from flowagent.store import open_store
async def main():
    store = await open_store(sys.argv[1])
    print(len(await store.flows()), "sqlalchemy" in sys.modules, "alembic" in sys.modules, flush=True)
    await store.close()
anyio.run(main)
"""


async def test_many_processes_may_start_at_once(empty_url: str) -> None:
    starters = [python(OPEN, empty_url) for _ in range(4)]
    answers = [starter.communicate(timeout=60)[0].split() for starter in starters]
    assert [starter.returncode for starter in starters] == [0] * 4
    assert [answer[0] for answer in answers] == ["0"] * 4


async def test_up_to_date_store_needs_no_sqlalchemy(url: str) -> None:
    assert python(OPEN, url).communicate(timeout=60)[0].split() == ["0", "False", "False"]


async def test_migrated_schema_is_the_metadata(empty_url: str) -> None:
    await (await open_store(empty_url)).close()
    engine = sqlalchemy.create_engine(empty_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, metadata) == []
        indexes = {index.name for table in metadata.tables.values() for index in table.indexes}
        found = sqlalchemy.inspect(connection)
        assert {index["name"] for name in ("run", "attempt") for index in found.get_indexes(name)} >= indexes
    engine.dispose()


async def test_store_that_is_newer_than_the_code(store: SQLStore, url: str) -> None:
    await store.database.write(lambda tx: tx.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(StoreError, match="written by a newer flowagent") as caught:
        await open_store(url)
    assert "\n" not in str(caught.value)


async def test_nothing_is_created_unless_allowed(empty_url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no store|not set up"):
        await open_store(empty_url, create=False)
    assert not (tmp_path / "new").exists()
    await (await open_store(empty_url)).close()
    await (await open_store(empty_url, create=False)).close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host", "not part of this version"),
        ("https://user:secret@host", "not part of this version"),
        ("mysql://user:secret@host/db", "must begin with"),
        ("sqlite://", "names a file"),
        ("sqlite:///:memory:", "names a file"),
        ("postgresql://user:s%zzecret@host/db", "not understood"),
        ("postgresql://user:half/secret@host/db", "not understood"),
        ("postgresql://user:1/secret@host/db", "not understood"),
    ],
)
async def test_urls_that_name_no_store(url: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        await open_store(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@POSTGRESQL
async def test_credentials_are_not_shown(store: SQLStore, url: str) -> None:
    assert "secret" in url
    assert store.url == f"postgresql://{url.partition('@')[2]}"
    with pytest.raises(StoreUnavailableError) as caught:
        await open_store("postgresql://me:secret@127.0.0.1:1/db")
    assert "127.0.0.1:1/db cannot be reached" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@SQLITE
async def test_files_are_private(empty_url: str, tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        store = await open_store(empty_url)
        await version_of(store)
        async with store.doorbell(WORK):
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
            assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
        await store.close()
    finally:
        os.umask(umask)
    assert modes == {
        "store.db": 0o600, "store.db-wal": 0o600, "store.db-shm": 0o600, "store.db.bells": 0o700,
    }  # fmt: skip


@SQLITE
async def test_sqlite_is_set_to_survive_power_cuts(store: SQLStore) -> None:
    def pragmas(tx: Transaction) -> list[object]:
        return [
            tx.execute(f"PRAGMA {name}")[0][0] for name in ("synchronous", "journal_mode", "foreign_keys")
        ]

    assert await store.database.write(pragmas) == [2, "wal", 1]


async def test_paths_that_cannot_be_a_store(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to be looked at " * 100)
    (tmp_path / "directory").mkdir()
    with sqlite3.connect(tmp_path / "foreign") as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    for name, message in {
        "text": "is not a store",
        "directory": "cannot be",
        "text/below/store.db": "cannot be opened",
        "foreign": "another program's database",
        "x" * 300: "cannot be opened",
    }.items():
        with pytest.raises(StoreError, match=message) as caught:
            await open_store(f"sqlite:///{tmp_path}/{name}")
        assert "\n" not in str(caught.value)
    with sqlite3.connect(tmp_path / "foreign") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)  # left as it was
    connection.close()


READ_ONLY = """
import anyio, os, sys
from flowagent.errors import StoreError
from flowagent.store import open_store
async def main():
    await (await open_store(sys.argv[1])).close()  # imports all that is needed
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    try:
        await open_store(sys.argv[2])
    except StoreError as error:
        print(error)
anyio.run(main)
"""


async def test_read_only_directory(tmp_path: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="flowagent-test-", dir="/tmp"))
    directory.chmod(0o555)
    try:
        urls = [f"sqlite:///{tmp_path}/good.db", f"sqlite:///{directory}/store.db"]
        message = python(READ_ONLY, *urls).communicate(timeout=60)[0]
    finally:
        shutil.rmtree(directory)
    assert "cannot be opened: Permission denied" in message
    assert len(message.splitlines()) == 1


@SQLITE
async def test_full_disk(store: SQLStore) -> None:
    version = await version_of(store)
    (pages,) = await store.database.read(lambda tx: tx.execute("PRAGMA page_count")[0])
    await store.database.write(lambda tx: tx.execute(f"PRAGMA max_page_count = {pages}"))
    written = 0
    with pytest.raises(
        StoreUnavailableError, match=r"disk of the store .* is full; free some space"
    ) as caught:
        while True:
            await store.create_run(RunRequest(version.version_id, {"x": "x" * 3000}))
            written += 1
    assert "\n" not in str(caught.value)
    await store.database.write(lambda tx: tx.execute("PRAGMA max_page_count = 1000000"))
    await store.create_run(RunRequest(version.version_id, {"x": "x" * 3000}))
    assert len(await store.runs()) == written + 1


@SQLITE
async def test_locked_by_another_process(
    store: SQLStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowagent.store.contention, "PATIENCE", 0.1)
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailableError, match="locked by another process"):
        await version_of(store)
    assert await store.flows() == []  # reading goes on
    other.execute("ROLLBACK")
    other.close()
    await version_of(store)


@SQLITE
async def test_file_that_was_replaced(store: SQLStore, tmp_path: Path) -> None:
    await store.ping()
    shutil.copy(tmp_path / "store.db", tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "store.db")
    with pytest.raises(StoreError, match="replaced"):
        await store.ping()
    (tmp_path / "store.db").unlink()
    with pytest.raises(StoreError, match="cannot be opened"):
        await store.ping()


@POSTGRESQL
async def test_connections_that_the_server_cut_are_made_again(store: SQLStore, url: str) -> None:
    await version_of(store)
    async with store.doorbell(WORK) as bell:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        assert len(await store.flows()) == 1
        run = await add_run(store)
        assert (await store.run(run.id)) == run
        with anyio.fail_after(10):
            while await bell.wait(0.2):  # what was missed is told as a ring
                pass
            await store.ring(WORK)
            assert await bell.wait(5)


@POSTGRESQL
async def test_server_that_hangs_is_given_up(
    store: SQLStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect() -> None:
        await store.database.read(lambda tx: tx.execute("SELECT pg_sleep(0.3)"))

    async with anyio.create_task_group() as group:
        for _ in range(4):  # all of its threads
            group.start_soon(connect)
    with psycopg.connect(url, autocommit=True) as connection:
        backends = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
            "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).fetchall()
    assert len(backends) == 4
    monkeypatch.setattr(flowagent.store.postgresql, "_DEADLINE", 0.5)
    for (pid,) in backends:
        os.kill(pid, signal.SIGSTOP)
    try:
        with anyio.fail_after(10), pytest.raises(StoreUnavailableError, match="does not answer") as caught:
            await store.flows()
    finally:
        for (pid,) in backends:
            os.kill(pid, signal.SIGCONT)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert await store.flows() == []  # with a new connection


# -- durability and group commit ---------------------------------------------------------------------------

WRITER = """
import anyio, sys
from flowagent.models import Outcome, OutputChunk, RunRequest, State
from flowagent.store import open_store
async def main():
    store = await open_store(sys.argv[1])
    version = (await store.flows())[0]
    async def write():
        while True:
            run, _ = await store.create_run(RunRequest(version.version_id))
            print(run.id, flush=True)
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(write)
anyio.run(main)
"""


async def test_acknowledged_writes_survive_sigkill(store: SQLStore, url: str, tmp_path: Path) -> None:
    await version_of(store)
    acknowledged: list[str] = []
    for attempt in range(4):
        with (tmp_path / f"ids{attempt}").open("w+") as ids:
            writer = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=ids)
            deadline = time.monotonic() + 30
            while os.fstat(ids.fileno()).st_size < 17 * random.randrange(20, 200):
                assert writer.poll() is None and time.monotonic() < deadline
                await anyio.sleep(random.uniform(0, 0.02))
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            ids.seek(0)
            acknowledged += [line.strip() for line in ids if len(line) == 17]
    reopened = await open_store(url)
    known = {run.id for run in await reopened.runs(limit=1_000_000)}
    assert len(acknowledged) > 80
    assert set(acknowledged) <= known
    for id in acknowledged[::50]:
        assert (await reopened.run(id)).id == id
    assert len(await reopened.claim(an_agent(), 10, 60)) == 10  # and the store works
    await reopened.close()


@SQLITE
async def test_concurrent_writes_share_commits(store: SQLStore) -> None:
    version = await version_of(store)
    before = store.database.commits

    async def submit() -> None:
        await store.create_run(RunRequest(version.version_id))

    async with anyio.create_task_group() as group:
        for _ in range(300):
            group.start_soon(submit)
    assert len(await store.runs(limit=1000)) == 300
    assert store.database.commits - before < 30


@SQLITE
async def test_another_process_that_writes_does_not_stop_the_event_loop(
    store: SQLStore, tmp_path: Path
) -> None:
    version = await version_of(store)
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    created: list[str] = []

    async def submit() -> None:
        created.append((await store.create_run(RunRequest(version.version_id)))[0].id)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(submit)
        began = time.monotonic()
        for _ in range(20):
            await anyio.sleep(0.01)
        assert time.monotonic() - began < 2  # SQLite alone would wait for 5 s
        assert created == []
        other.execute("ROLLBACK")
    other.close()
    assert {run.id for run in await store.runs()} == set(created)


@SQLITE
async def test_closing_commits_what_was_asked_for(store: SQLStore, url: str) -> None:
    version = await version_of(store)

    async def submit() -> None:
        await store.create_run(RunRequest(version.version_id))

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(submit)
        await anyio.sleep(0)
        await store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.create_run(RunRequest(version.version_id))
    reopened = await open_store(url)
    assert len(await reopened.runs()) == 20
    await reopened.close()


@SQLITE
async def test_a_commit_that_fails_undoes_the_whole_group(
    store: SQLStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = await version_of(store)
    errors: list[StoreError] = []

    def insert(tx: Transaction) -> None:
        # refused at the commit only, as constraints can be
        tx.execute("PRAGMA defer_foreign_keys = ON")
        tx.execute("INSERT INTO attempt (run_id, number, state, agent, lease_expires, claimed) "
                   "VALUES ('none', 1, 'pending', 'a', 0, 0)")  # fmt: skip

    async def fail() -> None:
        with pytest.raises(StoreError) as caught:
            await store.database.write(insert)
        errors.append(caught.value)

    async def submit() -> None:
        with pytest.raises(StoreError) as caught:
            await store.create_run(RunRequest(version.version_id))
        errors.append(caught.value)

    async with anyio.create_task_group() as group:
        group.start_soon(submit)
        group.start_soon(fail)
    assert len(set(map(id, errors))) == 2  # each has an exception of its own
    assert await store.runs() == []
    await add_run(store)  # and goes on


async def test_a_failing_write_does_not_undo_others(store: SQLStore) -> None:
    version = await version_of(store)
    failed: list[Exception] = []

    async def submit(number: int) -> None:
        try:
            await store.create_run(RunRequest(version.version_id if number % 3 else 999))
        except NotFoundError as error:
            failed.append(error)

    def broken(tx: Transaction) -> None:
        tx.execute('INSERT INTO label_set (canon) VALUES (\'{"labels":[],"runners":["never"]}\')')
        raise ZeroDivisionError

    async def fail() -> None:
        with pytest.raises(ZeroDivisionError):
            await store.database.write(broken)

    async with anyio.create_task_group() as group:
        for number in range(60):
            group.start_soon(submit, number)
            group.start_soon(fail)
    assert len(failed) == 20
    assert len(await store.runs()) == 40
    assert await store.database.read(lambda tx: tx.execute("SELECT count(*) FROM label_set")) == [(1,)]


async def test_statement_that_is_refused(store: SQLStore) -> None:
    with pytest.raises(StoreError, match="refused a statement") as caught:
        await store.database.write(lambda tx: tx.execute("SELECT * FROM nothing"))
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, StoreUnavailableError)


async def test_a_cancelled_write_is_not_left_in_the_air(store: SQLStore) -> None:
    version = await version_of(store)
    created: list[str] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        run, _ = await store.create_run(RunRequest(version.version_id))
        created.append(run.id)
    assert [run.id for run in await store.runs()] == created != []


# -- doorbells ---------------------------------------------------------------------------------------------


async def test_doorbell_within_a_process(store: SQLStore) -> None:
    run = await add_run(store)
    async with store.doorbell(WORK) as work, store.doorbell(WORK, progress(run.id)) as both:
        for bell in (work, both):  # what rang before may still arrive
            while await bell.wait(0.2):
                pass
        await store.ring(progress(run.id))
        assert await both.wait(5)
        assert not await work.wait(0.05)
        for _ in range(3):
            await store.ring(WORK)
        await anyio.sleep(0.1)
        assert await work.wait(5)
        assert not await work.wait(0.05)  # rings are coalesced
        assert await both.wait(5)
    await store.ring("../../etc/passwd\0")
    async with store.doorbell("../x", 'a"; DROP TABLE run; --') as odd:
        assert not await odd.wait(0.01)


async def test_what_rings(store: SQLStore) -> None:
    async with store.doorbell(WORK) as work, store.doorbell(CANCEL) as cancel:
        run = await add_run(store)
        assert await work.wait(5)
        async with store.doorbell(progress(run.id)) as bell:
            await store.claim(an_agent(), 1, 60)
            assert await bell.wait(5)
            await store.started(run.id, 1, "r", "s")
            assert await bell.wait(5)
            await store.append(run.id, 1, [OutputChunk(0, 1, b"x")])
            assert await bell.wait(5)
            assert not await work.wait(0.05)
            assert not await cancel.wait(0.05)
            await store.cancel(run.id, "stop")
            assert await bell.wait(5)
            assert await cancel.wait(5)
            assert not await work.wait(0.05)
            await store.finish(run.id, 1, Outcome(State.CANCELLED))
            assert await bell.wait(5)


@SQLITE
async def test_a_listener_is_rung_however_new_it_is(store: SQLStore) -> None:
    async with store.doorbell(CANCEL):
        await anyio.sleep(0.3)
        await store.ring(WORK)  # the directory is old enough now to be remembered
        for _ in range(30):
            async with store.doorbell(WORK) as bell:
                await store.ring(WORK)
                assert await bell.wait(1)
            await store.ring(WORK)


RINGER = """
import anyio, sys
from flowagent.store import open_store
async def main():
    store = await open_store(sys.argv[1])
    sys.stdin.readline()
    await store.ring("work")
    await store.close()
anyio.run(main)
"""


async def test_doorbell_across_processes(url: str, kind: str, tmp_path: Path) -> None:
    if kind == "sqlite":
        directory = tmp_path / ("long" * 50)
        directory.mkdir()
        shutil.move(tmp_path / "store.db", directory / "store.db")
        url = f"sqlite:///{directory}/store.db"
    store = await open_store(url)
    ringer = python(RINGER, url, stdin=subprocess.PIPE)
    async with store.doorbell(WORK) as bell:
        assert not await bell.wait(0.05)
        assert ringer.stdin is not None
        ringer.stdin.write("now\n")
        ringer.stdin.flush()
        assert await bell.wait(20)
    ringer.communicate(timeout=20)
    assert ringer.returncode == 0
    await store.close()


LISTENER = """
import anyio, sys
from flowagent.store import open_store
async def main():
    store = await open_store(sys.argv[1])
    async with store.doorbell("work"):
        print("listening", flush=True)
        await anyio.sleep(60)
anyio.run(main)
"""


@SQLITE
async def test_sockets_of_killed_listeners_go(store: SQLStore, url: str, tmp_path: Path) -> None:
    bells = tmp_path / "store.db.bells"
    for clean in ("ring", "listen"):
        listener = python(LISTENER, url)
        assert listener.stdout is not None
        listener.stdout.readline()
        listener.kill()
        listener.communicate()
        assert len(list(bells.iterdir())) == 1
        if clean == "ring":
            await store.ring(WORK)
        else:
            async with store.doorbell(progress("x")):
                assert len(list(bells.iterdir())) == 1
        assert list(bells.iterdir()) == []


@SQLITE
async def test_without_sockets_a_doorbell_just_waits(store: SQLStore, tmp_path: Path) -> None:
    (tmp_path / "store.db.bells").write_text("in the way")
    async with store.doorbell(WORK) as bell:
        await store.ring(WORK)
        assert not await bell.wait(0.05)

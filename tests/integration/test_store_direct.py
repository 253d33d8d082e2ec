"""The store that commands ask without an event loop: on SQLite, in the caller's thread."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import anyio
import pytest
from store_cases import an_agent, version_of

import flowagent.store.contention
from flowagent.errors import NotFoundError, StoreError, StoreUnavailableError
from flowagent.models import RunRequest
from flowagent.store import WORK, Store, ask, open_store
from flowagent.store.database import Transaction
from flowagent.store.direct import DirectDatabase


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store.db'}"


async def _asked_for(store: Store) -> str:
    run, created = await store.create_run(RunRequest((await version_of(store)).version_id))
    assert created
    return run.id


async def test_what_is_written_is_seen_and_rung_for_at_once(url: str) -> None:
    store = await open_store(url)
    async with store.doorbell(WORK) as bell:
        run_id = await anyio.to_thread.run_sync(ask, url, _asked_for)
        assert await bell.wait(10)
    assert (await store.run(run_id)).state == "scheduled"
    (claim,) = await store.claim(an_agent(), 1, 30)
    assert claim.run.id == run_id
    assert ask(url, lambda opened: opened.run(run_id)).state == "pending"
    await store.close()


def test_a_failing_operation_leaves_nothing(url: str) -> None:
    database = DirectDatabase(url, Path(url.removeprefix("sqlite://")))

    def write(tx: Transaction) -> None:
        tx.execute("INSERT INTO flow (name, created) VALUES ('half', 0)")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        database.write(write).send(None)
    with pytest.raises(StopIteration) as end:
        database.read(lambda tx: tx.execute("SELECT count(*) FROM flow")).send(None)
    assert end.value.value == [(0,)]
    assert database.commits == 0
    with pytest.raises(StopIteration):
        database.close().send(None)


def test_errors_are_those_of_the_store(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="no flow is registered as 'x'"):
        ask(url, lambda store: store.flow("x"))
    monkeypatch.setattr(flowagent.store.contention, "PATIENCE", 0.1)
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailableError, match="locked by another process"):
        ask(url, _asked_for)
    assert ask(url, lambda store: store.runs()) == []  # reading goes on
    other.close()
    (tmp_path / "text.db").write_text("no database " * 100)
    with pytest.raises(StoreError, match="is not a store"):
        ask(f"sqlite:///{tmp_path / 'text.db'}", lambda store: store.runs())


def test_what_waits_is_refused(url: str) -> None:
    async def sleeps(store: Store) -> None:
        class Once:
            def __await__(self):  # type: ignore[no-untyped-def]
                yield

        await Once()

    with pytest.raises(RuntimeError, match="needs an event loop"):
        ask(url, sleeps)

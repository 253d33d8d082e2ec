"""What surrounds an agent, piece by piece: service manager, watchdog, journal, disk guard."""

from __future__ import annotations

import array
import io
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flowagent.daemon import listening
from flowagent.daemon.disk import DiskGuard
from flowagent.daemon.journal import Journal, is_behind
from flowagent.daemon.log import make_log
from flowagent.daemon.metrics import Metrics, Readings
from flowagent.daemon.operations import Operations
from flowagent.daemon.progress import logged
from flowagent.daemon.pulse import Pulse
from flowagent.daemon.service import Service
from flowagent.daemon.systemd import ServiceManager
from flowagent.daemon.tally import Tally
from flowagent.daemon.webhook import Notices
from flowagent.errors import SettingsError, UsageError
from flowagent.secrets import SecretProvider
from flowagent.settings import Settings
from flowagent.sources.mirrors import MirrorEntry
from flowagent.sources.upkeep import Removed, Upkeep

pytestmark = pytest.mark.anyio


class Datagrams:
    """A socket that others write to, and what they wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.socket.bind(str(path))

    async def next(self) -> bytes:
        with anyio.fail_after(20):
            await anyio.wait_readable(self.socket)
        data, ancillary, _, _ = self.socket.recvmsg(1 << 16, 1024, socket.MSG_DONTWAIT)
        if not ancillary:
            return data
        descriptors = array.array("i", ancillary[0][2])
        with open(descriptors[0], "rb") as file:
            file.seek(0)
            return file.read()


@pytest.fixture
def datagrams(tmp_path: Path) -> Iterator[Datagrams]:
    made = Datagrams(tmp_path / "socket")
    yield made
    made.socket.close()


def log() -> Any:
    return make_log("json", "debug", io.StringIO())


# -- service manager -------------------------------------------------------------------------------------


async def test_what_the_service_manager_is_told(datagrams: Datagrams) -> None:
    manager = ServiceManager({"NOTIFY_SOCKET": str(datagrams.path), "WATCHDOG_USEC": "3000000"})
    assert manager.listens and manager.watchdog == 3
    manager.ready("idle\nREADY=0")
    assert await datagrams.next() == b"READY=1\nSTATUS=idle READY=0"
    manager.reloading()
    assert (await datagrams.next()).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    manager.stopping("x")
    assert await datagrams.next() == b"STOPPING=1\nSTATUS=x"


async def test_an_abstract_socket() -> None:
    name = f"flowagent-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        ServiceManager({"NOTIFY_SOCKET": f"@{name}"}).alive()
        assert listening.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"NOTIFY_SOCKET": ""},
        {"WATCHDOG_USEC": "1000000"},
        {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"},
        {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "0"},
    ],
)
async def test_no_watchdog(environ: dict[str, str]) -> None:
    manager = ServiceManager(environ)
    assert manager.watchdog is None
    manager.ready("nobody hears it")


async def test_the_watchdog_is_not_told_that_all_is_well_when_it_is_not(
    datagrams: Datagrams, tmp_path: Path
) -> None:
    manager = ServiceManager({"NOTIFY_SOCKET": str(datagrams.path), "WATCHDOG_USEC": "400000"})
    operations = Operations(Settings(tmp_path, ""), log(), manager)

    async def count(seconds: float) -> int:
        found = 0
        with anyio.move_on_after(seconds):
            while True:
                found += await datagrams.next() == b"WATCHDOG=1"
        return found

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(operations.run)
        assert await count(1.0) >= 3
        with operations.pulse.during("claiming runs"):
            await count(0.5)  # it is given a moment
            assert await count(1.0) == 0
        assert await count(1.0) >= 3
        tasks.cancel_scope.cancel()


def test_what_stalls_is_named() -> None:
    now = 100.0
    pulse = Pulse(lambda: now)
    with pulse.during("one"):
        now = 120.0
        with pulse.during("two"):
            now = 131.0
            assert pulse.stalled() == ["one"]
            assert pulse.stalled(5) == ["one", "two"]
            with pulse.during("three", 60):
                now = 151.0
                assert "three" not in pulse.stalled(5)
                now = 192.0
                assert "three" in pulse.stalled(5)
    assert pulse.stalled() == []


async def test_the_loops_lag_is_measured() -> None:
    import time

    pulse = Pulse()
    seen: list[float] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pulse.measure, seen.append)
        await anyio.sleep(0.9)
        time.sleep(0.5)  # the loop stands still
        await anyio.sleep(0.1)
        tasks.cancel_scope.cancel()
    assert 0.3 < pulse.lag < 5 and seen == [pulse.lag]


async def test_tracing_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry", None)
    monkeypatch.delitem(__import__("sys").modules, "flowagent.daemon.tracing", raising=False)
    with pytest.raises(UsageError, match=r"install flowagent\[otel\], or leave out --tracing"):
        Operations(Settings(tmp_path, "", tracing="otlp"), log())


async def test_an_address_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(SettingsError, match=f"cannot listen at {address}: Address already in use"):
            Operations(Settings(tmp_path, "", health_address=address), log())
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SettingsError, match="cannot listen at"):
        Operations(Settings(tmp_path, "", health_address=str(tmp_path / "file")), log())
    assert (tmp_path / "file").read_text() == "precious"


async def test_a_socket_is_called_by_its_path_and_goes_with_its_agent(tmp_path: Path) -> None:
    path, out = tmp_path / ("x" * 120) / "health.sock", io.StringIO()
    path.parent.mkdir()
    operations = Operations(Settings(tmp_path, "", health_address=str(path)), make_log("json", stream=out))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(operations.run)
        while "are served" not in out.getvalue():
            await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    assert json.loads(out.getvalue())["address"] == str(path)
    await operations.close()
    assert not path.exists()


async def test_a_socket_of_another_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "health.sock")
    first = Operations(Settings(tmp_path, "", health_address=path), log())
    os.rename(path, f"{path}.old")
    second = Operations(Settings(tmp_path, "", health_address=path), log())
    await first.close()
    assert os.path.exists(path)
    await second.close()
    assert not os.path.exists(path)


async def test_an_address_is_shown_with_the_port_that_it_got() -> None:
    for address, shown in (("127.0.0.1:0", r"127\.0\.0\.1:[1-9]\d*"), ("[::1]:0", r"\[::1\]:[1-9]\d*")):
        with listening.listen(address) as server:
            assert re.fullmatch(shown, listening.shown(server, address))


async def test_notices_that_are_not_sent_in_time_are_counted(tmp_path: Path) -> None:
    out, tally = io.StringIO(), Tally()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        notices = Notices(url, None, SecretProvider(tmp_path), tally, make_log("json", stream=out))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(notices.run)
            for number in range(3):
                notices.add({"run": str(number)})
            await notices.flush(0.5)
            tasks.cancel_scope.cancel()
    assert tally.notices_failed == 3
    said = json.loads(out.getvalue())
    assert said["event"].startswith("notifications were given up") and said["notices"] == 3


async def test_a_reload_keeps_the_format_of_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = iter([Settings(tmp_path, "", log_format="json"), Settings(tmp_path, "", log_format="console")])
    service = Service(lambda: next(read))
    service._reload(Operations(Settings(tmp_path, ""), log()))
    service._log.info("hello")
    assert json.loads(capsys.readouterr().err)["event"] == "hello"


def test_every_metric_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    readings = Readings(Tally(), 0, 1, 0.0, True, 0, queue_age=0.0)
    shown, _ = Metrics().exposition(readings, "")
    names = {family.name for family in text_string_to_metric_families(shown.decode())}
    ours = {name.removeprefix("flowagent_") for name in names if name.startswith("flowagent_")}
    missing = {name for name in ours if f"`{name}`" not in text and not name.endswith("_created")}
    assert len(ours) > 20 and not missing


# -- journal ---------------------------------------------------------------------------------------------


async def test_entries_have_fields(datagrams: Datagrams) -> None:
    Journal(io.StringIO(), str(datagrams.path)).msg(level="warning", event="it happened", run_id="r1", n=3)
    assert (await datagrams.next()).split(b"\n") == [
        b"MESSAGE=it happened run_id=r1 n=3",
        b"PRIORITY=4",
        b"SYSLOG_IDENTIFIER=flowagent",
        b"FLOWAGENT_EVENT=it happened",
        b"FLOWAGENT_RUN_ID=r1",
        b"FLOWAGENT_N=3",
        b"",
    ]


async def test_entries_of_many_lines_and_of_any_length(datagrams: Datagrams) -> None:
    journal = Journal(io.StringIO(), str(datagrams.path))
    journal.msg(event="one\nPRIORITY=0")
    data = await datagrams.next()
    assert data.startswith(b"MESSAGE\n" + (14).to_bytes(8, "little") + b"one\nPRIORITY=0\n")
    journal.msg(event="x" * 1_000_000)
    assert len(await datagrams.next()) > 2_000_000


async def test_without_a_journal_entries_are_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    Journal(stream, str(tmp_path / "nobody")).msg(level="error", event="it happened", exception="Traceback …")
    assert stream.getvalue() == "it happened\nTraceback …\n"


async def test_whether_a_stream_goes_to_the_journal(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        status = os.fstat(file.fileno())
        assert not is_behind(file, {})
        assert not is_behind(file, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"})
    assert not is_behind(io.StringIO(), {"JOURNAL_STREAM": "1:2"})


# -- progress --------------------------------------------------------------------------------------------


async def test_a_long_transfer_says_so_now_and_then(tmp_path: Path) -> None:
    now, out = 0.0, io.StringIO()
    with logged(make_log("json", stream=out), lambda: now)("fetching a/b", 3 << 20) as advance:
        for now in (5.0, 12.0, 13.0, 31.0):  # noqa: B007 - which the clock shows
            advance(512 << 10)
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(line["done"], line["of"], line["seconds"]) for line in said] == [
        ("1M", "3M", 12),
        ("2M", "3M", 31),
    ]
    assert {line["what"] for line in said} == {"fetching a/b"}


# -- disk guard ------------------------------------------------------------------------------------------


class Cache(Upkeep):
    """One of 300 bytes, of which nothing goes, unless told so; remembers what it was asked for."""

    asked: ClassVar[list[tuple[int | None, float | None]]]
    removed: ClassVar[Removed]

    def bytes(self) -> int:
        return 300

    def prune(self, max_bytes: int | None, max_age: float | None) -> Removed:
        self.asked.append((max_bytes, max_age))
        return self.removed


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    Cache.asked = []
    Cache.removed = Removed([], [])
    return Cache(tmp_path, tmp_path / "mirrors")


async def test_a_full_disk_is_pruned_and_then_waited_for(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, free = 0.0, 900
    monkeypatch.setattr("flowagent.daemon.disk._free", lambda directory: free)
    guard = DiskGuard([tmp_path], 1000, cache, log(), lambda: now)
    assert not await guard.room()
    assert guard.low == f"900 bytes are free at {tmp_path}, and 1000 bytes are to be"
    assert cache.asked == [(100, None)]
    free = 2000
    assert not await guard.room()  # an answer holds for a moment
    now = 6.0
    assert await guard.room() and guard.low is None
    free, now = 10, 12.0
    assert not await guard.room() and len(cache.asked) == 1  # not again so soon
    now = 61.0
    assert not await guard.room() and cache.asked[1:] == [(0, None)]


async def test_pruning_is_spoken_of_only_if_it_freed_something(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, out = 0.0, io.StringIO()
    monkeypatch.setattr("flowagent.daemon.disk._free", lambda directory: 900)
    guard = DiskGuard([tmp_path], 1000, cache, make_log("json", stream=out), lambda: now)
    assert not await guard.room()
    assert "a disk is nearly full" in out.getvalue() and "pruned" not in out.getvalue()
    now = 61.0
    Cache.removed = Removed([], [MirrorEntry("k", "m", 100, 0.0, False)])
    assert not await guard.room()
    assert '"freed": "100 bytes"' in out.getvalue()


async def test_a_cache_on_another_disk_than_the_full_one_is_left_alone(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowagent.daemon.disk._free", lambda path: 5000 if path == cache.sources else 10)
    guard = DiskGuard([tmp_path / "home"], 1000, cache, log())
    assert not await guard.room() and cache.asked == []


async def test_room_is_looked_for_where_the_agent_writes(tmp_path: Path, cache: Cache) -> None:
    guard = DiskGuard([tmp_path, tmp_path / "not there"], 1, cache, log())
    assert list(guard.free()) == [str(tmp_path)] and await guard.room()


async def test_the_cache_is_kept_within_limits_only_if_there_are_some(tmp_path: Path, cache: Cache) -> None:
    guard = DiskGuard([tmp_path], 1, cache, log())
    await guard.keep(None, None)
    assert cache.asked == []
    await guard.keep(7, None)
    await guard.keep(None, 9.0)
    assert cache.asked == [(7, None), (None, 9.0)]


async def test_a_cache_that_cannot_be_pruned_does_not_stop_the_agent(tmp_path: Path) -> None:
    (tmp_path / "sources").write_text("not a directory")
    guard = DiskGuard([tmp_path], 1, Upkeep(tmp_path / "sources", tmp_path / "mirrors"), log())
    await guard.keep(0, None)

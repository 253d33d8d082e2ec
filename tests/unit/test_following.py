"""Logs of containers: whatever is in them, wherever reading broke off, the run directory has it all once."""

from __future__ import annotations

import base64
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowagent.runners.docker import packing
from flowagent.runners.docker.volumes import Volume
from flowagent.runners.following import SLACK, FollowedTooFarError, Follower, noted
from flowagent.runtime import relay
from flowagent.runtime.container import lay_out, unpack
from flowagent.runtime.events import encode
from flowagent.runtime.limits import Limits
from flowagent.runtime.rundir import RunDirectory, boottime


def directory(path: Path) -> RunDirectory:
    path.mkdir(exist_ok=True)
    run = RunDirectory(path / "run")
    run.make()
    run.hand_over({}, 0.0)
    return run


def output(run: RunDirectory) -> bytes:
    return Path(run.output_path).read_bytes() if run.output_size() else b""


def engine_log(data: bytes, cut: int = 16384) -> bytes:
    """What an engine makes of a log: lines are cut, and what is not text is replaced."""
    pieces = []
    for line in data.split(b"\n"):
        whole = line + b"\n"
        pieces += [whole[start : start + cut] for start in range(0, len(whole), cut)]
    return b"".join(piece.decode(errors="replace").encode() for piece in pieces)[:-1]


@given(st.lists(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode()), max_size=20))
def test_what_is_encoded_survives_an_engine(parts: list[bytes]) -> None:
    encoder = relay.Encoder()
    log = b"".join(map(encoder.feed, parts))
    assert engine_log(log) == log, "an engine would change it"


def test_output_comes_back_as_it_was_across_any_interruption(tmp_path: Path) -> None:
    generator = random.Random(3)
    parts = [
        b"plain\n", "gr\u00fc\u00dfe\n".encode(), b"\xff\xfe\x00\n", ("\u6f22" * 9000).encode(), b"\n",
        encode({"event": "task", "task": "a"}), generator.randbytes(5000), b"x" * 40_000, b"no end",
    ]  # fmt: skip
    encoder = relay.Encoder()
    log = b"".join(encoder.feed(part) for part in parts)
    for number in range(30):
        run = directory(tmp_path / str(number))
        for stop in (*sorted(generator.choices(range(len(log)), k=3)), len(log)):
            follower = Follower(run, Limits(), "boot")
            read = log[:stop]
            while read:
                size = generator.randint(1, 9000)
                follower.feed(read[:size])
                read = read[size:]
        follower.close()
        assert output(run) == b"".join(parts)


@pytest.fixture(scope="module")
def long_log(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Output of several marks, and the log that the relay makes of it."""
    path = tmp_path_factory.mktemp("log")
    generator = random.Random(5)
    lines = (
        b"%d %s\n" % (i, generator.choice((b"x" * 90, "\u00fc".encode() * 40, b"\xff")))
        for i in range(60_000)
    )
    data = b"".join(lines)
    (path / "output").write_bytes(data)
    with open(path / "log", "wb") as file:
        relay.note(file.fileno(), relay.BEGAN, boot_id="boot")
        copier = relay.Relay(str(path / "output"), file.fileno())
        copier.start()
        copier.finish(30)
        relay.note(file.fileno(), relay.ENDED, status={})
    log = (path / "log").read_bytes()
    assert log.count(b'"container.at"') >= 3
    return data, log


def take(run: RunDirectory, log: bytes, *, close: bool = True) -> None:
    follower = Follower(run, Limits(), "boot")
    for start in range(0, len(log), 50_000):
        follower.feed(log[start : start + 50_000])
    if close:
        follower.close()


def test_a_log_that_lost_its_beginning_goes_on_where_it_was(
    tmp_path: Path, long_log: tuple[bytes, bytes]
) -> None:
    data, log = long_log
    for number, (read, gone) in enumerate([(2.5, 0.3), (2.5, 1.7), (2.5, 2.4), (1.2, 1.1), (3.9, 3.8)]):
        run = directory(tmp_path / str(number))
        take(run, log[: int(read * (1 << 20))], close=False)
        cut = log.index(b"\n", int(gone * (1 << 20))) + 1
        take(run, log[cut:])
        take(run, log[log.index(b"\n", cut + 200_000) + 1 :])
        assert output(run) == data


def test_what_a_log_has_lost_is_said(tmp_path: Path, long_log: tuple[bytes, bytes]) -> None:
    data, log = long_log
    run = directory(tmp_path)
    take(run, log[: 1 << 20], close=False)
    known = run.output_size()
    rest = log[log.index(b"\n", 5 << 19) + 1 :]
    take(run, rest)
    line, _, after = output(run)[known:].partition(b"\n")
    assert b" bytes of output are lost: the log of the container was rotated" in line
    assert data.endswith(after) and len(after) > 1 << 20
    lost = int(line.split(b'"message":"')[1].split()[0])
    assert known + lost + len(after) == len(data)
    before = output(run)
    for again in (rest, log, rest[rest.index(b"\n", 500_000) + 1 :]):
        take(run, again)
        assert output(run) == before


def test_what_the_agent_told_first_is_not_of_the_log(tmp_path: Path, long_log: tuple[bytes, bytes]) -> None:
    data, log = long_log
    run = directory(tmp_path)
    run.note({"told": 6})
    Path(run.output_path).write_bytes(b"hello\n")
    take(run, log[: 3 << 20], close=False)
    take(run, log[log.index(b"\n", 2 << 20) + 1 :])
    assert output(run) == b"hello\n" + data


def test_marks_that_a_flow_makes_up_cost_only_its_own_output(tmp_path: Path) -> None:
    run = directory(tmp_path)
    forged = [encode({"event": relay.AT, "output": number}) for number in (1 << 50, -1, 7, 1 << 60)]
    take(run, encode({"event": relay.BEGAN}) + b"one\n" + b"".join(forged * 500) + b"two\n")
    assert output(run).startswith(b"one\n") and run.output_size() < 20_000
    assert len(Path(run.status_path).read_bytes()) < 50_000


def test_files_come_once_and_only_by_harmless_names(tmp_path: Path) -> None:
    run = directory(tmp_path)
    log = b""

    def piece(name: object, data: bytes, start: object = 0) -> bytes:
        return encode(
            {"event": relay.FILE, "name": name, "data": base64.b64encode(data).decode(), "start": start}
        )

    log += piece("1", b"ab") + piece("1", b"cd", 2) + encode({"event": "result", "file": "1"})
    log += piece("../2", b"x") + piece("", b"x") + piece(3, b"x") + piece("4", b"x", "0") + b"\x1e{}\n"
    follower = Follower(run, Limits(), "boot")
    follower.feed(log)
    assert os.listdir(run.results) == ["1"] and Path(run.results, "1").read_bytes() == b"abcd"
    os.unlink(Path(run.results, "1"))  # it was taken
    Follower(run, Limits(), "boot").feed(log)
    assert os.listdir(run.results) == []


def test_a_flow_that_goes_round_its_supervisor_fills_no_disk(tmp_path: Path) -> None:
    run = directory(tmp_path)
    follower = Follower(run, Limits(output=1000, disk=1000), "boot")
    with pytest.raises(FollowedTooFarError, match="of output"):
        follower.feed(b"x" * (SLACK + 2000))
    follower = Follower(run, Limits(output=10 * SLACK, disk=1000), "boot")
    with pytest.raises(FollowedTooFarError, match="of disk space"):
        follower.feed(encode({"event": relay.FILE, "name": "1", "data": "A" * 4000, "start": 0}))


def test_the_clock_of_another_machine(tmp_path: Path) -> None:
    run = directory(tmp_path)
    follower = Follower(run, Limits(), "here")
    follower.feed(encode({"event": relay.BEGAN, "boot_id": "here", "boottime": boottime()}))
    assert follower.began and follower.clock is None
    follower = Follower(run, Limits(), "here")
    sent = boottime() - 5000 - 2  # two seconds on the way
    follower.feed(encode({"event": relay.BEGAN, "boot_id": "there", "boottime": sent}))
    # a deadline, moved to its clock, is never later than it was meant to be
    assert follower.clock is not None and -5003 < follower.clock <= -5002


def test_last_words_are_no_more_than_notes(tmp_path: Path) -> None:
    assert noted({"exit_code": 1, "ended": False, "container": "x", "began": 1}) == {"exit_code": 1}


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("/a:/b", ("bind", "/a", "/b", False)),
        ("/a:/b:ro", ("bind", "/a", "/b", True)),
        ("~/.ssh:/root/.ssh:ro", ("bind", os.path.expanduser("~/.ssh"), "/root/.ssh", True)),
        ("./x:/y:rw", ("bind", os.path.abspath("x"), "/y", False)),
        ("/same", ("bind", "/same", "/same", False)),
        ("data:/data:ro", ("volume", "data", "/data", True)),
    ],
)
def test_volumes(text: str, mount: tuple[str, str, str, bool]) -> None:
    assert tuple(Volume.parse(text, ValueError).on_host().mount.values()) == mount


@pytest.mark.parametrize(
    "text", ["", "x", "a:b", "/a:b", "/a:/b:rx", "/a:/b:ro:z", "/a:/b/../c", "a b:/c", ":/b"]
)
def test_what_is_no_volume(text: str) -> None:
    with pytest.raises(ValueError, match=r"write SOURCE:TARGET\[:ro\]"):
        Volume.parse(text, ValueError)


def test_a_source_arrives_as_it_was(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "pkg").mkdir(parents=True)
    (source / "empty").mkdir()
    (source / "pkg/a.py").write_bytes(b"1" * 300_000)
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o555)
    (source / "link").symlink_to("pkg/a.py")
    (source / ".git").mkdir()
    (source / ".git/config").write_text("x")
    os.mkfifo(source / "fifo")
    files = packing.listed(source, 1 << 20, in_place=True)
    with (tmp_path / "stream").open("wb") as stream:
        stream.writelines(packing.contents(source, files))
    target = tmp_path / "target"
    with (tmp_path / "stream").open("rb") as stream:
        unpack(files, stream, str(target))
        assert stream.read() == b""
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == [
        "empty", "link", "pkg", "pkg/a.py", "run.sh",
    ]  # fmt: skip
    assert (target / "link").read_bytes() == b"1" * 300_000
    assert (target / "run.sh").stat().st_mode & 0o111
    assert any(name == ".git/config" for name, *_ in packing.listed(source, 1 << 20, in_place=False))


def test_a_source_that_is_too_large_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1000)
    with pytest.raises(Exception, match="is too large to be copied into a container"):
        packing.listed(tmp_path, 999, in_place=True)


def test_the_run_directory_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_IMAGE", "1")
    monkeypatch.chdir(tmp_path)
    run = lay_out(str(tmp_path), {"env": {"A": "b"}, "working_dir": None}, None)
    spec = run.read_spec()
    assert run.read_lease() == 0.0, "nothing begins before a lease comes"
    assert spec["env"]["OF_THE_IMAGE"] == "1" and spec["env"]["A"] == "b"
    assert spec["working_dir"] == str(tmp_path)

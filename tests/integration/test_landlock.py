"""Landlock rulesets, enforced by the kernel on a child process."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path

import pytest
from forked import forked, refused

from flowagent.runtime import landlock, linux


@pytest.fixture(autouse=True)
def kernel() -> None:
    assert landlock.version() >= 6, "these tests need a kernel with Landlock 6: Linux 6.12 or newer"


def rules_of(readable: landlock.Readable) -> list[landlock.Rule]:
    return [rule for rules in readable._rules.values() for rule in rules]


def have_no_more_than(descriptors: int, *kept: int) -> None:
    """A limit of them, and none open but pipes, standard ones and ``kept``: other tests have left some."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if fd > 2 and fd not in kept and not stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.close(fd)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))


def confined(readable: landlock.Readable, *writable: Path) -> None:
    readable.refresh()
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    ruleset = landlock.Ruleset(landlock.version(), connect=None, bind=None)
    readable.hand_to(ruleset)
    ruleset.allow("/", landlock.READ_DIR)
    for path in writable:
        ruleset.allow(str(path), landlock.handled(landlock.version()))
    ruleset.enforce()


def test_everything_but_what_is_denied_can_be_read(tmp_path: Path) -> None:
    for name in ("open", "closed", "closed/inner"):
        (tmp_path / name).mkdir()
    files = [tmp_path / name for name in ("a", "open/b", "closed/c", "closed/inner/d", "secret")]
    for file in files:
        file.write_text("x")
    readable = landlock.Readable([str(tmp_path / "closed"), str(tmp_path / "secret")])

    def look() -> list[int | None]:
        confined(readable)
        return [refused(file.read_text) for file in files]

    assert forked(look) == [None, None, errno.EACCES, errno.EACCES, errno.EACCES]


def test_what_appears_later_is_seen_and_what_is_denied_stays_so(tmp_path: Path) -> None:
    denied = tmp_path / "denied"
    readable = landlock.Readable([str(denied), str(tmp_path / "sub" / "key")])
    readable.refresh()
    (tmp_path / "later").write_text("x")
    denied.mkdir()
    (denied / "file").write_text("x")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "key").write_text("x")
    (tmp_path / "sub" / "other").write_text("x")
    names = ("later", "denied/file", "sub/key", "sub/other")

    def look() -> list[int | None]:
        confined(readable)
        return [refused((tmp_path / name).read_text) for name in names]

    assert forked(look) == [None, errno.EACCES, errno.EACCES, None]


def test_a_link_to_what_is_denied_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "key").write_text("x")
    (tmp_path / "named").symlink_to(tmp_path / "real")  # as a home's .ssh may be
    (tmp_path / "other").symlink_to(tmp_path / "real" / "key")
    readable = landlock.Readable([str(tmp_path / "named")])

    def look() -> list[int | None]:
        confined(readable)
        return [refused((tmp_path / name).read_text) for name in ("real/key", "named/key", "other")]

    assert forked(look) == [errno.EACCES] * 3


def test_rules_that_did_not_change_are_not_made_again(tmp_path: Path) -> None:
    readable = landlock.Readable([str(tmp_path / "denied")])
    readable.refresh()
    time.sleep(0.1)  # until then, what changed last may change again unnoticed
    readable.refresh()
    before = rules_of(readable)
    readable.refresh()
    assert all(one is other for one, other in zip(before, rules_of(readable), strict=True))
    (tmp_path / "new").touch()
    readable.refresh()
    kept = [rule for rule in rules_of(readable) if any(rule is other for other in before)]
    assert 0 < len(kept) < len(rules_of(readable)), "of the one directory, and no others"


@pytest.mark.parametrize("descriptors", [64, 1024])
def test_there_may_be_more_entries_than_descriptors(tmp_path: Path, descriptors: int) -> None:
    for number in range(1200):
        (tmp_path / f"file-{number}").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "denied")
    (tmp_path / "denied").write_text("x")
    readable = landlock.Readable([str(tmp_path / "denied")])

    def look() -> dict[str, int | None]:
        have_no_more_than(descriptors)
        confined(readable)
        os.dup(0)  # some are left, for all else that a process does
        codes = {path.name: refused(path.read_text) for path in tmp_path.iterdir()}
        return {name: code for name, code in codes.items() if code is not None}

    assert forked(look) == {"denied": errno.EACCES, "link": errno.EACCES}


def test_that_no_descriptor_is_left_is_not_taken_for_a_file_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    readable = landlock.Readable([str(tmp_path / "denied")])

    def exhausted(before: bool) -> list[int | None]:
        ruleset = landlock.Ruleset(landlock.version(), connect=None, bind=None)
        have_no_more_than(64, ruleset._fd)
        found = []
        for _ in range(2):
            if not before:
                readable.refresh()
            held = []
            with suppress(OSError):
                while True:
                    held.append(os.dup(0))
            if before:
                readable.refresh()
            found.append(refused(lambda: readable.hand_to(ruleset)))
            for fd in held:
                os.close(fd)
            readable.refresh()
            found.append(refused(lambda: readable.hand_to(ruleset)))
        return found

    for before in (False, True):
        assert forked(lambda before=before: exhausted(before)) == [errno.EMFILE, None] * 2


def test_only_what_is_allowed_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").write_text("x")
    readable = landlock.Readable([])

    def write() -> list[int | None]:
        confined(readable, tmp_path / "mine")
        return [
            refused(lambda: (tmp_path / "mine" / "file").write_text("x")),
            refused(lambda: (tmp_path / "theirs").write_text("x")),
            refused(lambda: (tmp_path / "theirs").unlink()),
            refused(lambda: os.truncate(tmp_path / "theirs", 0)),
            refused(lambda: (tmp_path / "new").mkdir()),
            refused(lambda: os.rename(tmp_path / "theirs", tmp_path / "mine" / "taken")),
        ]

    assert forked(write)[0] is None
    assert None not in forked(write)[1:]


def test_processes_and_abstract_sockets_outside_are_out_of_reach() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0flowagent-test-{os.getpid()}")
        server.listen()
        me = os.getpid()

        def reach() -> list[int | None]:
            confined(landlock.Readable([]))
            with socket.socket(socket.AF_UNIX) as client:
                return [
                    refused(lambda: os.kill(me, 0)),
                    refused(lambda: client.connect(f"\0flowagent-test-{me}")),
                    refused(lambda: os.kill(os.getpid(), 0)),
                ]

        assert forked(reach) == [errno.EPERM, errno.EPERM, None]


def test_ports(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as good, socket.create_server(("127.0.0.1", 0)) as other:
        allowed, denied = good.getsockname()[1], other.getsockname()[1]

        def connect() -> list[int | None]:
            linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
            landlock.Ruleset(landlock.version(), connect=[allowed], bind=[]).enforce()

            def to(port: int) -> None:
                with socket.socket() as client:
                    client.connect(("127.0.0.1", port))

            return [
                refused(lambda: to(allowed)),
                refused(lambda: to(denied)),
                refused(lambda: socket.create_server(("127.0.0.1", 0)).close()),
            ]

        assert forked(connect) == [None, errno.EACCES, errno.EACCES]


def test_an_old_kernel_is_asked_for_no_more_than_it_knows() -> None:
    assert landlock.handled(1) == (1 << 13) - 1
    assert landlock.handled(4) == landlock.handled(3) == (1 << 15) - 1
    assert landlock.handled(99) == landlock.handled(5)
    with pytest.raises(OSError, match="cannot control TCP ports"):
        landlock.Ruleset(3, connect=[], bind=None)

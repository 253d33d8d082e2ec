from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flowagent.errors import NotFoundError, SecretError
from flowagent.secrets import SecretProvider

VALUES = ["plain", " spaces \n", "null", "1", "{a: $b}", "ünï\r\n\0", ""]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_comes_back_exactly(tmp_path: Path, value: str) -> None:
    provider = SecretProvider(tmp_path, {})
    provider.set("TOKEN", value)
    assert provider.get("TOKEN") == value
    path = tmp_path / "secrets" / "TOKEN"
    assert path.read_bytes() == value.encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["TOKEN"]


def test_environment_comes_before_systemd_before_files(tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    environ = {"FLOWAGENT_SECRET_TOKEN": "environment\n", "CREDENTIALS_DIRECTORY": str(credentials)}
    provider = SecretProvider(tmp_path, environ)
    provider.set("TOKEN", "file")
    (credentials / "TOKEN").write_text("systemd\n")
    (credentials / "TOKEN").chmod(0o440)
    (credentials / "OTHER").write_text("x")
    assert (provider.get("TOKEN"), provider.origin("TOKEN")) == ("environment\n", "environment")
    del environ["FLOWAGENT_SECRET_TOKEN"]
    assert (provider.get("TOKEN"), provider.origin("TOKEN")) == ("systemd\n", "systemd")
    (credentials / "TOKEN").unlink()
    assert (provider.get("TOKEN"), provider.origin("TOKEN")) == ("file", "file")
    assert provider.names() == ("OTHER", "TOKEN")


def test_a_value_of_the_real_environment_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom flowagent.secrets import SecretProvider\n"
        f"print(repr(SecretProvider(Path({str(tmp_path)!r})).get('OK')))\n"
        f"SecretProvider(Path({str(tmp_path)!r})).get('BAD')"
    )
    environ = {
        **os.environb,
        b"FLOWAGENT_SECRET_OK": "ü".encode(),
        b"FLOWAGENT_SECRET_BAD": b"\xff",
        b"PYTHONPATH": os.pathsep.join(sys.path).encode(),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.stdout == "'ü'\n"
    assert (
        "SecretError: secret BAD in the environment variable FLOWAGENT_SECRET_BAD is not UTF-8" in done.stderr
    )


def test_all_missing_secrets_are_named_at_once(tmp_path: Path) -> None:
    provider = SecretProvider(tmp_path, {"FLOWAGENT_SECRET_A": "1"})
    with pytest.raises(SecretError, match=r"secrets B, C are not set; .*flowagent secret set B"):
        provider.get_many(["A", "B", "C"])
    with pytest.raises(SecretError, match=r"secret B is not set; .*flowagent secret set B"):
        provider.get("B")
    assert provider.get_many(["A"]) == {"A": "1"}
    assert provider.get_many([]) == {}
    assert provider.origin("B") is None
    assert SecretProvider(tmp_path / "nowhere", {}).names() == ()


def test_a_file_that_others_can_read_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    provider = SecretProvider(tmp_path, {})
    provider.set("TOKEN", "x")
    path = tmp_path / "secrets" / "TOKEN"
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(SecretError, match=f"chmod 600 {path}"):
            provider.get("TOKEN")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    provider = SecretProvider(tmp_path, {})
    provider.set("TOKEN", "x")
    os.chown(tmp_path / "secrets" / "TOKEN", 65534, -1)
    with pytest.raises(SecretError, match="belongs to another user; run: chown"):
        provider.get("TOKEN")


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "secrets" / "TOKEN"
    path.parent.mkdir()
    if kind == "link":
        (tmp_path / "target").write_text("x")
        path.symlink_to(tmp_path / "target")
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.mkdir(0o700)
    with pytest.raises(SecretError, match=str(path)):
        SecretProvider(tmp_path, {}).get("TOKEN")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a.b", "1a", "a\n", "ä", "x" * 201])
def test_names_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    provider = SecretProvider(tmp_path, {})
    for action in (provider.get, provider.remove, provider.origin, lambda bad: provider.set(bad, "x")):
        with pytest.raises(SecretError, match="no valid name"):
            action(name)


def test_secrets_are_removed_and_listed(tmp_path: Path) -> None:
    provider = SecretProvider(tmp_path, {"FLOWAGENT_SECRET_B": ""})
    provider.set("C", "1")
    (tmp_path / "secrets" / ".tmp-half").write_text("")
    assert provider.names() == ("B", "C")
    provider.remove("C")
    assert provider.names() == ("B",)
    with pytest.raises(NotFoundError, match="no secret C"):
        provider.remove("C")


def test_a_write_that_fails_leaves_the_old_value_and_nothing_else(tmp_path: Path) -> None:
    import resource

    provider = SecretProvider(tmp_path, {})
    provider.set("TOKEN", "old")
    import signal

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(SecretError, match="cannot be stored"):
            provider.set("TOKEN", "new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert provider.get("TOKEN") == "old"
    assert os.listdir(tmp_path / "secrets") == ["TOKEN"]

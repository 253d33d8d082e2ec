"""What doctor says about what an agent has to reach."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import trustme
from tests.e2e.harness import Site
from tests.e2e.operating import executable

from flowagent.cli import reach
from flowagent.store import open_store


def finding(site: Site, check: str, *options: str, code: int | None = 0, **env: str) -> dict[str, str]:
    done = site.command("doctor", "--json", *options, code=code, env=env)
    (found,) = [each for each in json.loads(done.stdout) if each["check"] == check]
    return dict(found)


def test_a_repository_that_can_be_read_and_one_that_cannot(site: Site, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    subprocess.run(["git", "init", "-q", repository], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    found = finding(site, "repository", "--repo", f"file://{repository}")
    assert found["level"] == "ok" and head.strip() in found["detail"]
    found = finding(site, "repository", "--repo", "https://127.0.0.1/a?b=hunter2", code=1)
    assert found["detail"].startswith("Git: the URL in --repo is no URL of a repository")
    done = site.command("doctor", "--repo", "https://me:hunter2@127.0.0.1:1/a.git", code=1)
    assert "failed  repository" in done.stdout and "cannot be reached" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


def test_keys_and_known_hosts(site: Site, tmp_path: Path) -> None:
    home = tmp_path / "me"
    (home / ".ssh").mkdir(parents=True)
    me = {"HOME": str(home), "SSH_AUTH_SOCK": ""}
    assert "no keys in" in finding(site, "ssh", **me)["detail"]
    key = home / ".ssh" / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    found = finding(site, "ssh", **me)
    assert found["level"] == "note" and "keys: 1; no host is known" in found["detail"]
    (home / ".ssh" / "known_hosts").write_text("# a comment\nexample.com ssh-ed25519 AAAA\n")
    assert finding(site, "ssh", **me)["level"] == "ok"
    key.chmod(0o644)
    assert finding(site, "ssh", **me)["remedy"] == f"close it: chmod 600 {key}"


def test_a_disk_with_less_than_its_reserve(site: Site) -> None:
    found = finding(site, "disk", code=1, FLOWAGENT_RESERVE="500T")
    assert found["level"] == "failed" and "agents want 500 TiB" in found["detail"]


def test_an_engine_that_does_not_answer(site: Site) -> None:
    engine = {"FLOWAGENT_ENGINE": "unix:///nowhere.sock"}
    assert finding(site, "docker", **engine)["level"] == "note"
    found = finding(site, "docker", code=1, FLOWAGENT_RUNNER="docker", **engine)
    assert found["level"] == "failed" and "unix:///nowhere.sock" in found["detail"]


def test_a_cluster_by_kubectl(site: Site, tmp_path: Path) -> None:
    config = tmp_path / "kubeconfig"
    config.write_text("")
    program = executable(tmp_path / "bin" / "kubectl", "#!/bin/sh\necho ok\n")
    env = {"KUBECONFIG": str(config), "PATH": f"{program.parent}:{os.environ['PATH']}"}
    assert finding(site, "kubernetes", **env)["detail"] == f"the cluster of {config} is ready"
    program.write_text("#!/bin/sh\necho 'Unable to connect' >&2; exit 1\n")
    found = finding(site, "kubernetes", **env)
    assert found["level"] == "note" and "Unable to connect" in found["detail"]


class Api(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        right = self.path == "/readyz" and self.headers["Authorization"] == "Bearer t0ken"
        self.send_response(200 if right else 403)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.anyio
async def test_a_cluster_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    (tmp_path / "token").write_text("t0ken\n")
    monkeypatch.setattr(reach, "SERVICE_ACCOUNT", tmp_path)
    server = HTTPServer(("127.0.0.1", 0), Api)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.server_port)}
    settings = None
    try:
        assert (await reach.kubernetes(settings, environ)).level == "ok"  # type: ignore[arg-type]
        (tmp_path / "token").write_text("another")
        found = await reach.kubernetes(settings, environ)  # type: ignore[arg-type]
        assert found.level == "note" and "answered 403" in found.detail
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.anyio
async def test_a_clock_that_is_wrong(tmp_path: Path) -> None:
    store = await open_store(f"sqlite:///{tmp_path}/store.db")
    try:
        assert (await reach.clock(store)).level == "ok"
        found = await reach.clock(store, lambda: time.time() + 60)
        assert found.level == "note" and found.detail.startswith("60.0 s ahead of")
        assert "behind" in (await reach.clock(store, lambda: time.time() - 60)).detail
    finally:
        await store.close()

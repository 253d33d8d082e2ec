"""What doctor says about what an agent has to reach."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme
from tests.e2e.harness import Site
from tests.e2e.operating import executable

from flowagent.cli import doctor, reach
from flowagent.runtime import cgroups
from flowagent.settings import Settings
from flowagent.store import open_store


def findings(site: Site, *options: str, code: int | None = 0, **env: str) -> list[dict[str, str]]:
    return list(json.loads(site.command("doctor", "--json", *options, code=code, env=env).stdout))


def finding(site: Site, check: str, *options: str, code: int | None = 0, **env: str) -> dict[str, str]:
    (found,) = [each for each in findings(site, *options, code=code, **env) if each["check"] == check]
    return found


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


def test_what_settings_name_and_is_not_there(site: Site) -> None:
    named = {"FLOWAGENT_HOOKS": "/nope", "FLOWAGENT_NOTIFY_KEY": "K", "FLOWAGENT_IMPORT_PATHS": "/no:/tmp"}
    found = {each["check"]: each for each in findings(site, code=1, **named)}
    hooks, notify, imports = (found[check] for check in ("hooks", "notify", "imports"))
    assert hooks["level"] == "failed" and "the hooks in /nope cannot be read" in hooks["detail"]
    assert (
        notify["level"] == "note" and "no agent starts without the key: secret K is not" in notify["detail"]
    )
    assert imports["level"] == "note" and "nothing is imported from /no: " in imports["detail"]
    executable(site.root / "hooks" / "before-run", "#!/bin/sh\n")
    named = {
        "FLOWAGENT_HOOKS": f"{site.root}/hooks",
        "FLOWAGENT_SECRET_K": "x",
        "FLOWAGENT_IMPORT_PATHS": "/tmp",
    }
    found = {each["check"]: each for each in findings(site, FLOWAGENT_NOTIFY_KEY="K", **named)}
    assert {found[check]["level"] for check in ("hooks", "notify", "imports")} == {"ok"}


def test_what_is_wrong_has_a_remedy(site: Site) -> None:
    bad = {
        "FLOWAGENT_STORE": "postgresql://u:hunter2@127.0.0.1:1/d",
        "FLOWAGENT_PRELOAD": "no_such_module",
        "FLOWAGENT_ENGINE": "unix:///nowhere.sock",
        "KUBECONFIG": "/nope",
    }
    found = {each["check"]: each for each in findings(site, code=1, **bad)}
    assert "see that its server runs" in found["store"]["remedy"] and "hunter2" not in json.dumps(found)
    assert "install what preload names" in found["launcher"]["remedy"]
    assert "KUBECONFIG names /nope, and there is no such file" in found["kubernetes"]["detail"]
    assert all(each["remedy"] for each in found.values() if each["level"] != "ok")
    (again,) = [each for each in findings(site, KUBECONFIG="") if each["check"] == "kubernetes"]
    assert "set KUBECONFIG" in again["remedy"] and "with a kubeconfig: only runs in" in again["detail"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("held", "missing", "more"),
    [((), "memory and processes", True), (("pids",), "memory", True), (("memory",), "processes", False)],
)
async def test_limits_without_control_groups(
    held: tuple[str, ...], missing: str, more: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "find", lambda: dict.fromkeys(held, "/x"))
    found = await doctor._limits(Settings(tmp_path, ""))
    assert found.level == "note" and f"no control groups here for {missing}:" in found.detail
    assert "flowagent systemd install" in str(found.remedy)
    assert (
        "systemd 254 or newer, and before that all runs together, by MemoryMax=" in str(found.remedy)
    ) is more


def test_an_engine_that_does_not_answer(site: Site) -> None:
    engine = {"FLOWAGENT_ENGINE": "unix:///nowhere.sock"}
    assert finding(site, "docker", **engine)["level"] == "note"
    found = finding(site, "docker", code=1, FLOWAGENT_RUNNER="docker", **engine)
    assert found["level"] == "failed" and "unix:///nowhere.sock" in found["detail"]


class Api(BaseHTTPRequestHandler):
    """A cluster in which one may do everything but delete secrets."""

    def do_GET(self) -> None:
        self.answer({"gitVersion": "v1.30.1"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["spec"]["resourceAttributes"]
        self.answer({"status": {"allowed": (asked["verb"], asked["resource"]) != ("delete", "secrets")}})

    def answer(self, body: dict[str, object]) -> None:
        right = self.headers["Authorization"] == "Bearer t0ken"
        content = json.dumps(body if right else {"message": "Unauthorized"}).encode()
        self.send_response(200 if right else 401)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_a_cluster(site: Site, tmp_path: Path) -> None:
    authority = trustme.CA()
    server = HTTPServer(("127.0.0.1", 0), Api)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"https://127.0.0.1:{server.server_port}"
    config = tmp_path / "kubeconfig"
    trusted = base64.b64encode(authority.cert_pem.bytes()).decode()
    known: dict[str, Any] = {
        "clusters": [{"name": "c", "cluster": {"server": url, "certificate-authority-data": trusted}}],
        "users": [{"name": "u", "user": {"token": "t0ken"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "flows"}}],
        "current-context": "x",
    }
    config.write_text(json.dumps(known))
    env = {"KUBECONFIG": str(config)}
    try:
        found = finding(site, "kubernetes", **env)
        assert found["detail"] == f"v1.30.1 at {url}, namespace flows: an agent may not delete secrets"
        assert found["level"] == "note" and "kubernetes manifest" in found["remedy"]
        found = finding(site, "kubernetes", code=1, FLOWAGENT_RUNNER="kubernetes", **env)
        assert found["level"] == "failed"
        known["users"][0]["user"]["token"] = "another"
        config.write_text(json.dumps(known))
        assert finding(site, "kubernetes", **env)["detail"] == "Unauthorized"
        config.write_text("a: [")
        assert f"{config} cannot be used" in finding(site, "kubernetes", **env)["detail"]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    known["users"][0]["user"]["token"] = "t0ken"
    config.write_text(json.dumps(known))
    assert f"{url} cannot be reached" in finding(site, "kubernetes", **env)["detail"]


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
